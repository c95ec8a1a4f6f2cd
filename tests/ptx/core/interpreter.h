// Executes a warp's instructions, those of other blocks in between.
#pragma once

#include "approximations.h"
#include "collectives.h"
#include "global_memory.h"

namespace ptx {

// What operations.py generates: `enum Opcode`, and LANEWISE, a function for each operation on lanes alone.
using Lanewise = void (*)(u8* registers, const Instruction& i, u32 lanes);

template <class T>
inline void put(T* to, const T* made, u32 lanes) {
    if (lanes == ALL)
        std::copy_n(made, LANES, to);
    else
        for (int lane = 0; lane < LANES; lane++) to[lane] = lanes >> lane & 1 ? made[lane] : to[lane];
}

#include "operations.inc"

class Interpreter {
public:
    Interpreter(const Launch& launch, GlobalMemory& memory) : launch(launch), memory(memory) {}

    u64 executed = 0;
    bool progress = false;  // whether an atomic access has changed anything since this was last set to false

    // Up to `turn` instructions of one warp, fewer where it ends or waits.
    void run(Block& block, Warp& warp, s64 turn) {
        for (int n; turn > 0 && (n = warp.next_path()) >= 0;) {
            if (warp.paths.size() > 1) {
                warp.join_paths();
                n = warp.next_path();
            }
            s32 other = INT32_MAX;  // where lanes that went another way can be met
            for (int m = 0; m < int(warp.paths.size()); m++)
                if (m != n && !warp.paths[m].waits) other = std::min(other, warp.paths[m].pc);
            while (turn-- > 0 && step(block, warp, n) && warp.paths[n].pc < other) {
            }
        }
    }

private:
    // One instruction of one path. False where the warp's paths are not what they were.
    bool step(Block& block, Warp& warp, int n) {
        Path& path = warp.paths[n];
        const Instruction& i = launch.code[path.pc];
        u32 const all = path.lanes;
        u32 lanes = all;
        if (i.guard >= 0) lanes &= i.negated ? ~warp.mask(i.guard) : warp.mask(i.guard);
        warp.line = i.line;
        executed++;
        if (launch.executed) {
            launch.executed[2 * path.pc]++;
            launch.executed[2 * path.pc + 1] += u64(std::popcount(lanes));
        }
        path.pc++;
        switch (i.opcode) {
            case BRANCH:
                if (lanes == all)
                    path.pc = s32(i.immediate);
                else if (lanes)
                    path.lanes = all & ~lanes, warp.paths.push_back({s32(i.immediate), lanes, false});
                return lanes == 0 || (lanes == all && warp.paths.size() == 1);
            case RETURN:
                path.lanes &= ~lanes;
                if (!path.lanes) warp.paths.erase(warp.paths.begin() + n);
                return lanes == 0;
            case BARRIER:
                if (!lanes) return true;
                if (lanes != ALL) fail("a barrier that only lanes %08x reach", lanes);
                path.waits = true;
                return false;
            case NOTHING:
                break;
            case TRAP:
                if (lanes) fail("trap");
                break;
            case SHARED_LOAD:
                load_shared(block, warp, i, lanes);
                break;
            case SHARED_STORE:
                store_shared(block, warp, i, lanes);
                break;
            case GLOBAL_LOAD:
                memory.load(block, warp, i, lanes);
                break;
            case GLOBAL_STORE:
                memory.store(block, warp, i, lanes);
                break;
            case ATOMIC_LOAD_B32:
                atomic<u32>(block, warp, i, lanes, [](u32 old, auto) { return old; });
                break;
            case ATOMIC_LOAD_B64:
                atomic<u64>(block, warp, i, lanes, [](u64 old, auto) { return old; });
                break;
            case ATOMIC_EXCH_B32:
                atomic<u32>(block, warp, i, lanes, [](u32, auto b) { return b(1); });
                break;
            case ATOMIC_ADD_F32:
                atomic<f32>(block, warp, i, lanes, [](f32 a, auto b) { return a + b(1); });
                break;
            case ATOMIC_ADD_F64:
                atomic<f64>(block, warp, i, lanes, [](f64 a, auto b) { return a + b(1); });
                break;
            case ATOMIC_ADD_U32:
                atomic<u32>(block, warp, i, lanes, [](u32 a, auto b) { return a + b(1); });
                break;
            case ATOMIC_ADD_U64:
                atomic<u64>(block, warp, i, lanes, [](u64 a, auto b) { return a + b(1); });
                break;
            case ATOMIC_MAX_S32:
                atomic<s32>(block, warp, i, lanes, [](s32 a, auto b) { return std::max(a, b(1)); });
                break;
            case ATOMIC_MIN_S32:
                atomic<s32>(block, warp, i, lanes, [](s32 a, auto b) { return std::min(a, b(1)); });
                break;
            case ATOMIC_OR_B32:
                atomic<u32>(block, warp, i, lanes, [](u32 a, auto b) { return a | b(1); });
                break;
            case ATOMIC_AND_B32:
                atomic<u32>(block, warp, i, lanes, [](u32 a, auto b) { return a & b(1); });
                break;
            case ATOMIC_CAS_B32:
                atomic<u32>(block, warp, i, lanes, [](u32 old, auto b) { return old == b(1) ? b(2) : old; });
                break;
            case SHUFFLE_BFLY:
                shuffle(together(warp, i, lanes), i, Shuffle::butterfly);
                break;
            case SHUFFLE_IDX:
                shuffle(together(warp, i, lanes), i, Shuffle::index);
                break;
            case SHUFFLE_UP:
                shuffle(together(warp, i, lanes), i, Shuffle::up);
                break;
            case SHUFFLE_DOWN:
                shuffle(together(warp, i, lanes), i, Shuffle::down);
                break;
            case REDUCE_ADD_S32:
                reduce<u32>(together(warp, i, lanes), i, std::plus<u32>());
                break;
            case REDUCE_MAX_S32:
                reduce<s32>(together(warp, i, lanes), i, [](s32 a, s32 b) { return std::max(a, b); });
                break;
            case REDUCE_MIN_S32:
                reduce<s32>(together(warp, i, lanes), i, [](s32 a, s32 b) { return std::min(a, b); });
                break;
            case REDUCE_MAX_U32:
                reduce<u32>(together(warp, i, lanes), i, [](u32 a, u32 b) { return std::max(a, b); });
                break;
            case REDUCE_MIN_U32:
                reduce<u32>(together(warp, i, lanes), i, [](u32 a, u32 b) { return std::min(a, b); });
                break;
            case REDUCE_AND_B32:
                reduce<u32>(together(warp, i, lanes), i, std::bit_and<u32>());
                break;
            case REDUCE_OR_B32:
                reduce<u32>(together(warp, i, lanes), i, std::bit_or<u32>());
                break;
            case REDUCE_XOR_B32:
                reduce<u32>(together(warp, i, lanes), i, std::bit_xor<u32>());
                break;
            case BALLOT:
                ballot(together(warp, i, lanes), i);
                break;
            case WARP_BARRIER:
                together(warp, i, lanes);
                break;
            case MATRIX_LOAD:
                matrices(block, together(warp, i, lanes), i, false, false);
                break;
            case MATRIX_LOAD_TRANS:
                matrices(block, together(warp, i, lanes), i, false, true);
                break;
            case MATRIX_STORE:
                matrices(block, together(warp, i, lanes), i, true, false);
                break;
            case MATRIX_STORE_TRANS:
                matrices(block, together(warp, i, lanes), i, true, true);
                break;
            case UNPACK:
                unpack(warp, i, lanes);
                break;
            case PACK:
                pack(warp, i, lanes);
                break;
            default:
                LANEWISE[i.opcode - FIRST_LANEWISE](warp.registers, i, lanes);
        }
        return true;
    }

    // On a GPU lanes that have gone another way hang it, or leave a number that nobody has set.
    static Warp& together(Warp& warp, const Instruction& i, u32 lanes) {
        if (lanes != ALL) fail("only lanes %08x reach what all lanes of a warp do together", lanes);
        // ldmatrix and stmatrix have no mask of members.
        if (i.source[3] >= 0 && *warp.at<u32>(i.source[3]) != ALL)
            fail("an exchange of some of a warp's lanes");
        return warp;
    }

    template <class T, class F>
    void atomic(Block& block, Warp& warp, const Instruction& i, u32 lanes, F make) {
        bool const stores = i.opcode != ATOMIC_LOAD_B32 && i.opcode != ATOMIC_LOAD_B64;
        progress |= memory.atomic<T>(block, warp, i, lanes, stores, make);
    }

    void load_shared(Block& block, Warp& warp, const Instruction& i, u32 lanes) {
        const u32* address = warp.at<u32>(i.source[0]);
        for (int lane = 0; lane < LANES; lane++) {
            if (!(lanes >> lane & 1)) continue;
            u8 found[16];
            block.shared.load(warp.id, block.epoch, lane, u64(address[lane]) + u64(i.immediate), found,
                              i.width * i.count);
            for (int c = 0; c < i.count; c++) {
                u64 value = 0;
                memcpy(&value, found + c * i.width, size_t(i.width));
                if (i.destination[c] >= 0) warp.set(i.destination[c], i.width, lane, value);
            }
        }
    }
    void store_shared(Block& block, Warp& warp, const Instruction& i, u32 lanes) {
        const u32* address = warp.at<u32>(i.source[0]);
        for (int lane = 0; lane < LANES; lane++) {
            if (!(lanes >> lane & 1)) continue;
            u8 made[16];
            for (int c = 0; c < i.count; c++) {
                u64 const value = warp.get(i.destination[c], i.width, lane);
                memcpy(made + c * i.width, &value, size_t(i.width));
            }
            block.shared.store(warp.id, block.epoch, lane, u64(address[lane]) + u64(i.immediate), made,
                               i.width * i.count);
        }
    }

    const Launch& launch;
    GlobalMemory& memory;
};

}  // namespace ptx
