// Global accesses that nothing orders: a happens-before check by vector clocks.
//
// Two accesses of one address by different warps, at least one of them a store, must be ordered by the
// program's order, by barriers of a block, or by a release that an acquire of the same address has seen.
// Warps' clocks, and the last accesses of every address, say whether they are (FastTrack: Flanagan and
// Freund, 2009).
#pragma once

#include <unordered_map>
#include <vector>

#include "warp.h"

namespace ptx {

class Races {
public:
    explicit Races(const Launch& launch) : buffers(launch.buffers), on(launch.races) {
        if (!on) return;
        warps_of_block = launch.warps;
        clocks.resize(size_t(launch.grid_x * launch.grid_y * launch.grid_z * launch.warps));
        for (s64 i = 0; i < launch.n_buffers; i++)
            touched.emplace_back(size_t((buffers[i].end - buffers[i].begin + GRANULE - 1) / GRANULE));
    }

    void begin(const Block& block) {
        if (!on) return;
        for (const Warp& warp : block.warps) {
            clocks[size_t(warp.number)].resize(clocks.size());
            tick(warp);
        }
    }
    void end(const Block& block) {
        if (!on) return;
        for (const Warp& warp : block.warps) Clock().swap(clocks[size_t(warp.number)]);
    }

    void load(s64 buffer, u64 address, int bytes, const Warp& warp) {
        if (!on) return;
        for_granules(buffer, address, bytes, [&](Touched& t, u64 at) {
            ordered_or_fail(t.store, warp, buffer, at, "load", "the store");
            if (t.atomics) ordered_or_fail(atomics[address_of(buffer, at)], warp, buffer, at, "load");
            if (t.load.warp == warp.number || before(t.load, warp))
                t.load = now(warp);
            else
                share(t, address_of(buffer, at), warp);
        });
    }
    void store(s64 buffer, u64 address, int bytes, const Warp& warp) {
        if (!on) return;
        for_granules(buffer, address, bytes, [&](Touched& t, u64 at) {
            ordered_or_fail(t.store, warp, buffer, at, "store", "the store");
            after_loads(t, buffer, at, warp, "store");
            if (t.atomics) ordered_or_fail(atomics[address_of(buffer, at)], warp, buffer, at, "store");
            t.store = now(warp);
        });
    }
    // Atomics order one another; a relaxed one orders nothing else. One that only loads is not remembered: of
    // what comes after it, a store that nothing orders is missed.
    void atomic(s64 buffer, u64 address, int bytes, const Warp& warp, s32 semantics, bool stores) {
        if (!on) return;
        if (semantics & ACQUIRE) join(clocks[size_t(warp.number)], released[address]);
        if (!stores) {
            for_granules(buffer, address, bytes, [&](Touched& t, u64 at) {
                ordered_or_fail(t.store, warp, buffer, at, "atomic", "the store");
            });
            return;
        }
        for_granules(buffer, address, bytes, [&](Touched& t, u64 at) {
            ordered_or_fail(t.store, warp, buffer, at, "atomic", "the store");
            after_loads(t, buffer, at, warp, "atomic");
            t.atomics = true;
            remember(atomics[address_of(buffer, at)], warp);
        });
        if (semantics & RELEASE) {
            join(released[address], clocks[size_t(warp.number)]);
            tick(warp);
        }
    }
    void barrier(const Block& block) {
        if (!on) return;
        Clock all;
        for (const Warp& warp : block.warps) join(all, clocks[size_t(warp.number)]);
        for (const Warp& warp : block.warps) {
            clocks[size_t(warp.number)] = all;
            tick(warp);
        }
    }

private:
    using Clock = std::vector<u32>;
    static constexpr u64 GRANULE = 2;  // bytes: the narrowest number that kernels store

    struct Access {
        s64 warp = -1;
        u32 clock = 0;
        s32 line = 0;
    };
    struct Touched {
        Access store, load;  // the last store, and a load that no later one follows
        bool loads = false;  // further loads, in `readers`
        bool atomics = false;
    };
    using Accesses = std::vector<Access>;

    void tick(const Warp& warp) { clocks[size_t(warp.number)][size_t(warp.number)]++; }
    Access now(const Warp& warp) const {
        return {warp.number, clocks[size_t(warp.number)][size_t(warp.number)], warp.line};
    }
    bool before(const Access& access, const Warp& warp) const {
        return access.warp < 0 || clocks[size_t(warp.number)][size_t(access.warp)] >= access.clock;
    }
    static void join(Clock& to, const Clock& from) {
        if (to.size() < from.size()) to.resize(from.size());
        for (size_t n = 0; n < from.size(); n++) to[n] = std::max(to[n], from[n]);
    }

    u64 address_of(s64 buffer, u64 at) const { return buffers[buffer].begin + at * GRANULE; }
    template <class F>
    void for_granules(s64 buffer, u64 address, int bytes, F visit) {
        u64 const from = address - buffers[buffer].begin, last = from + u64(bytes) - 1;
        for (u64 at = from / GRANULE; at <= last / GRANULE; at++) visit(touched[size_t(buffer)][at], at);
    }

    void remember(Accesses& list, const Warp& warp) const {
        for (Access& access : list)
            if (access.warp == warp.number) {
                access = now(warp);
                return;
            }
        list.push_back(now(warp));
    }
    void share(Touched& t, u64 address, const Warp& warp) {
        t.loads = true;
        remember(readers[address], warp);
    }
    void after_loads(Touched& t, s64 buffer, u64 at, const Warp& warp, const char* what) {
        ordered_or_fail(t.load, warp, buffer, at, what, "the load");
        t.load = Access();
        if (!t.loads) return;
        ordered_or_fail(readers[address_of(buffer, at)], warp, buffer, at, what);
        readers.erase(address_of(buffer, at));
        t.loads = false;
    }
    void ordered_or_fail(const Accesses& others, const Warp& warp, s64 buffer, u64 at,
                         const char* what) const {
        for (const Access& other : others) ordered_or_fail(other, warp, buffer, at, what, "an access");
    }
    void ordered_or_fail(const Access& other, const Warp& warp, s64 buffer, u64 at, const char* what,
                         const char* of) const {
        if (other.warp == warp.number || before(other, warp)) return;
        fail(
            "race: nothing orders this %s of byte %lld of buffer %lld and %s in PTX line %d by block %lld "
            "warp %lld",
            what, (long long)(at * GRANULE), (long long)buffer, of, other.line,
            (long long)(other.warp / warps_of_block), (long long)(other.warp % warps_of_block));
    }

    const Buffer* buffers;
    bool on;
    s64 warps_of_block = 1;
    std::vector<Clock> clocks;                  // of every warp, while its block runs
    std::vector<std::vector<Touched>> touched;  // by buffer and granule
    std::unordered_map<u64, Accesses> readers;  // where several warps have loaded since the last store
    std::unordered_map<u64, Accesses> atomics;  // by address
    std::unordered_map<u64, Clock> released;    // by address
};

}  // namespace ptx
