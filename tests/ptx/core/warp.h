// Warps of 32 lanes that may take several ways through the code, and the blocks they form.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "program.h"
#include "shared_memory.h"
#include "store_buffer.h"

namespace ptx {

// Lanes that stand at one instruction.
struct Path {
    s32 pc;
    u32 lanes;
    bool waits;  // at the block's barrier
};

struct Warp {
    u8* registers;
    int id;
    s64 number;  // among the warps of all blocks
    std::vector<Path> paths{{0, ALL, false}};
    s32 line = 0;  // of the instruction it executes

    template <class T>
    T* at(s32 reg) {
        return reinterpret_cast<T*>(registers + reg);
    }
    u64 get(s32 reg, int bytes, int lane) { return bytes == 8 ? at<u64>(reg)[lane] : at<u32>(reg)[lane]; }
    void set(s32 reg, int bytes, int lane, u64 value) {
        if (bytes == 8)
            at<u64>(reg)[lane] = value;
        else
            at<u32>(reg)[lane] = u32(value);
    }
    u32 mask(s32 predicate) {
        const u32* p = at<u32>(predicate);
        u32 m = 0;
        for (int lane = 0; lane < LANES; lane++) m |= (p[lane] & 1u) << lane;
        return m;
    }

    bool done() const { return paths.empty(); }

    // The path to go on with: the one furthest behind, so that others are met again as soon as can be.
    int next_path() const {
        int best = -1;
        for (int n = 0; n < int(paths.size()); n++)
            if (!paths[n].waits && (best < 0 || paths[n].pc < paths[best].pc)) best = n;
        return best;
    }
    // Paths that have met go on as one.
    void join_paths() {
        for (size_t i = 0; i < paths.size(); i++)
            for (size_t j = i + 1; j < paths.size();)
                if (paths[j].pc == paths[i].pc && paths[j].waits == paths[i].waits) {
                    paths[i].lanes |= paths[j].lanes;
                    paths.erase(paths.begin() + j);
                } else {
                    j++;
                }
    }
};

struct Block {
    s64 id;
    s64 epoch = 1;  // barriers passed, and one
    SharedMemory shared;
    StoreBuffer stores;
    std::vector<Warp> warps;

    Block(const Launch& launch, s64 id) : id(id), shared(launch.shared_bytes, launch.hazards) {
        // Aligned to a cache line, which the operations' vector code is quicker on.
        memory.reset(new (std::align_val_t(64)) u8[size_t(launch.register_bytes * launch.warps)]);
        for (int n = 0; n < launch.warps; n++) {
            Warp warp{memory.get() + launch.register_bytes * n, n, id * launch.warps + n};
            memcpy(warp.registers, launch.registers, size_t(launch.register_bytes));
            for (int lane = 0; lane < LANES; lane++) {
                warp.at<u32>(launch.tid)[lane] = u32(LANES * n + lane);
                warp.at<u32>(launch.ctaid_x)[lane] = u32(id % launch.grid_x);
                warp.at<u32>(launch.ctaid_y)[lane] = u32(id / launch.grid_x % launch.grid_y);
                warp.at<u32>(launch.ctaid_z)[lane] = u32(id / launch.grid_x / launch.grid_y);
                warp.at<u32>(launch.nctaid_x)[lane] = u32(launch.grid_x);
            }
            warps.push_back(std::move(warp));
        }
    }

    bool done() const {
        return std::all_of(warps.begin(), warps.end(), [](const Warp& w) { return w.done(); });
    }

    // Whether every live lane waits at the barrier; then all go on.
    bool pass_barrier() {
        bool any = false;
        for (const Warp& warp : warps)
            for (const Path& path : warp.paths) {
                if (!path.waits) return false;
                any = true;
            }
        if (!any) return false;
        for (Warp& warp : warps) {
            for (Path& path : warp.paths) path.waits = false;
            warp.join_paths();
        }
        epoch++;
        return true;
    }

private:
    struct Free {
        void operator()(u8* p) const { ::operator delete[](p, std::align_val_t(64)); }
    };
    std::unique_ptr<u8[], Free> memory;
};

}  // namespace ptx
