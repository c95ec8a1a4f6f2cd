// Stores that other blocks cannot see yet: they arrive in any order, unless a release puts them before it.
#pragma once

#include <cstring>
#include <random>
#include <vector>

#include "program.h"

namespace ptx {

class StoreBuffer {
public:
    void store(u64 address, u64 value, int bytes, int warp, s64 epoch) {
        pending.push_back({address, value, bytes, warp, epoch});
    }

    // What a load by this block finds: memory, under what the block itself has stored.
    u64 load(u64 address, int bytes) const {
        u64 value = 0;
        memcpy(&value, reinterpret_cast<const void*>(address), size_t(bytes));
        for (const Pending& p : pending) {
            if (!overlap(p, address, bytes)) continue;
            for (int x = 0; x < p.bytes; x++) {
                s64 const to = s64(p.address) + x - s64(address);
                if (to >= 0 && to < bytes)
                    reinterpret_cast<u8*>(&value)[to] = reinterpret_cast<const u8*>(&p.value)[x];
            }
        }
        return value;
    }

    // What a release by this warp orders: its own stores, and those of others before the last barrier.
    void publish(int warp, s64 epoch) {
        write_where([=](const Pending& p) { return p.warp == warp || p.epoch < epoch; });
    }
    // What an atomic access by the block itself works on.
    void publish_at(u64 address, int bytes) {
        write_where([=](const Pending& p) { return overlap(p, address, bytes); });
    }

    void let_one_arrive(std::mt19937_64& random) {
        if (pending.empty()) return;
        size_t n = random() % pending.size();
        // Of the stores to one address the oldest goes first.
        for (size_t j = 0; j < n; j++)
            if (overlap(pending[j], pending[n].address, pending[n].bytes)) {
                n = j;
                break;
            }
        write(pending[n]);
        pending.erase(pending.begin() + s64(n));
    }
    void let_arrive_beyond(size_t most, std::mt19937_64& random) {
        while (pending.size() > most) let_one_arrive(random);
    }

    // What an ended block has left.
    void take(StoreBuffer& other) {
        pending.insert(pending.end(), other.pending.begin(), other.pending.end());
        other.pending.clear();
    }

private:
    struct Pending {
        u64 address, value;
        int bytes, warp;
        s64 epoch;
    };
    static bool overlap(const Pending& p, u64 address, int bytes) {
        return p.address < address + u64(bytes) && address < p.address + u64(p.bytes);
    }
    template <class F>
    void write_where(F arrives) {
        size_t kept = 0;
        for (const Pending& p : pending)
            if (arrives(p))
                write(p);
            else
                pending[kept++] = p;
        pending.resize(kept);
    }
    static void write(const Pending& p) {
        memcpy(reinterpret_cast<void*>(p.address), &p.value, size_t(p.bytes));
    }

    std::vector<Pending> pending;
};

}  // namespace ptx
