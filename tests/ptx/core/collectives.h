// What the lanes of a warp do together: shuffles, reductions, votes, and 8 x 8 matrices from shared memory.
#pragma once

#include "warp.h"

namespace ptx {

enum class Shuffle { butterfly, index, up, down };

inline void shuffle(Warp& warp, const Instruction& i, Shuffle kind) {
    u32 value[LANES];
    memcpy(value, warp.at<u32>(i.source[0]), sizeof value);
    const u32 *operand = warp.at<u32>(i.source[1]), *clamp_and_segment = warp.at<u32>(i.source[2]);
    for (int lane = 0; lane < LANES; lane++) {
        u32 const segment = clamp_and_segment[lane] >> 8 & 31, clamp = clamp_and_segment[lane] & 31;
        s64 const low = s64(lane & segment), high = low | s64(clamp & ~segment), by = operand[lane] & 31;
        s64 from = lane;
        switch (kind) {
            case Shuffle::butterfly:
                from = lane ^ by;
                break;
            case Shuffle::index:
                from = low | (by & ~s64(segment));
                break;
            case Shuffle::up:
                from = lane - by;
                break;
            case Shuffle::down:
                from = lane + by;
                break;
        }
        bool const valid = kind == Shuffle::up ? from >= high : from <= high;
        warp.at<u32>(i.destination[0])[lane] = value[valid ? from : lane];
        if (i.destination[1] >= 0) warp.at<u32>(i.destination[1])[lane] = valid;
    }
}

template <class T, class F>
void reduce(Warp& warp, const Instruction& i, F combine) {
    const u32* of = warp.at<u32>(i.source[0]);
    T total = T(of[0]);
    for (int lane = 1; lane < LANES; lane++) total = combine(total, T(of[lane]));
    std::fill_n(warp.at<u32>(i.destination[0]), LANES, u32(total));
}

inline void ballot(Warp& warp, const Instruction& i) {
    std::fill_n(warp.at<u32>(i.destination[0]), LANES, warp.mask(i.source[0]));
}

// Matrices of 16-bit numbers: row r of matrix j lies where lane 8 j + r points; a lane holds two neighbours.
inline void matrices(Block& block, Warp& warp, const Instruction& i, bool store, bool transposed) {
    const u32* address = warp.at<u32>(i.source[0]);
    for (int j = 0; j < i.count; j++) {
        u16 whole[8][8];
        auto element = [&](int lane, int half) -> u16& {
            int const row = lane / 4, column = 2 * (lane % 4) + half;
            return transposed ? whole[column][row] : whole[row][column];
        };
        auto rows = [&](auto access) {
            for (int r = 0; r < 8; r++)
                access(8 * j + r, u64(address[8 * j + r]) + u64(i.immediate), whole[r]);
        };
        u32* held = warp.at<u32>(i.destination[j]);
        if (store) {
            for (int lane = 0; lane < LANES; lane++)
                element(lane, 0) = u16(held[lane]), element(lane, 1) = u16(held[lane] >> 16);
            rows([&](int lane, u64 at, u16* row) {
                block.shared.store(warp.id, block.epoch, lane, at, reinterpret_cast<u8*>(row), 16);
            });
        } else {
            rows([&](int lane, u64 at, u16* row) {
                block.shared.load(warp.id, block.epoch, lane, at, reinterpret_cast<u8*>(row), 16);
            });
            for (int lane = 0; lane < LANES; lane++)
                held[lane] = u32(element(lane, 0)) | u32(element(lane, 1)) << 16;
        }
    }
}

// One register into several of `width` bytes each, the lowest first, and back.
inline void unpack(Warp& warp, const Instruction& i, u32 lanes) {
    int const whole = i.width * i.count;
    for (int lane = 0; lane < LANES; lane++) {
        if (!(lanes >> lane & 1)) continue;
        u64 const value = warp.get(i.source[0], whole, lane);
        for (int c = 0; c < i.count; c++)
            if (i.destination[c] >= 0)
                warp.at<u32>(i.destination[c])[lane] =
                    u32(value >> (8 * i.width * c)) & (ALL >> (32 - 8 * i.width));
    }
}
inline void pack(Warp& warp, const Instruction& i, u32 lanes) {
    for (int lane = 0; lane < LANES; lane++) {
        if (!(lanes >> lane & 1)) continue;
        u64 value = 0;
        for (int c = 0; c < i.count; c++)
            value |= u64(warp.at<u32>(i.source[c])[lane] & (ALL >> (32 - 8 * i.width))) << (8 * i.width * c);
        warp.set(i.destination[0], i.width * i.count, lane, value);
    }
}

}  // namespace ptx
