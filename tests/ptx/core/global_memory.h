// The tensors' memory as the warps of all blocks see it: bounds, order, races, traffic.
#pragma once

#include "bounds.h"
#include "races.h"
#include "traffic.h"
#include "warp.h"

namespace ptx {

class GlobalMemory {
public:
    GlobalMemory(const Launch& launch, std::mt19937_64& random)
        : races(launch), bounds(launch), traffic(launch), random(random), weak(launch.weak) {}

    void load(Block& block, Warp& warp, const Instruction& i, u32 lanes) {
        const u64* address = warp.at<u64>(i.source[0]);
        int const whole = i.width * i.count;
        for (int lane = 0; lane < LANES; lane++) {
            if (!(lanes >> lane & 1)) continue;
            u64 const x = address[lane] + u64(i.immediate);
            s64 const buffer = bounds.find(lane, x, whole, false);
            races.load(buffer, x, whole, warp);
            traffic.note(buffer, x, whole, false);
            for (int c = 0; c < i.count; c++)
                if (i.destination[c] >= 0)
                    warp.set(i.destination[c], i.width, lane, read(block, x + u64(c * i.width), i.width));
        }
    }
    void store(Block& block, Warp& warp, const Instruction& i, u32 lanes) {
        const u64* address = warp.at<u64>(i.source[0]);
        int const whole = i.width * i.count;
        for (int lane = 0; lane < LANES; lane++) {
            if (!(lanes >> lane & 1)) continue;
            u64 const x = address[lane] + u64(i.immediate);
            s64 const buffer = bounds.find(lane, x, whole, true);
            races.store(buffer, x, whole, warp);
            traffic.note(buffer, x, whole, true);
            for (int c = 0; c < i.count; c++) {
                u64 const value = warp.get(i.destination[c], i.width, lane);
                u64 const at = x + u64(c * i.width);
                if (weak)
                    block.stores.store(at, value, i.width, warp.id, block.epoch);
                else
                    memcpy(reinterpret_cast<void*>(at), &value, size_t(i.width));
            }
        }
        if (weak) block.stores.let_arrive_beyond(256, random);
    }

    // Replaces a number by one made of it and the operand. True where that changed it.
    template <class T, class F>
    bool atomic(Block& block, Warp& warp, const Instruction& i, u32 lanes, bool stores, F make) {
        bool changed = false;
        const u64* address = warp.at<u64>(i.source[0]);
        order(block, warp, i.width, lanes);
        for (int lane = 0; lane < LANES; lane++) {
            if (!(lanes >> lane & 1)) continue;
            u64 const x = address[lane] + u64(i.immediate);
            s64 const buffer = bounds.find(lane, x, sizeof(T), stores);
            races.atomic(buffer, x, sizeof(T), warp, i.width, stores);
            traffic.note(buffer, x, sizeof(T), stores);
            if (weak) block.stores.publish_at(x, sizeof(T));
            T old;
            memcpy(&old, reinterpret_cast<const void*>(x), sizeof(T));
            auto operand = [&](int n) {
                T value;
                u64 const raw = warp.get(i.source[n], sizeof(T), lane);
                memcpy(&value, &raw, sizeof(T));
                return value;
            };
            T const made = make(old, operand);
            if (stores) memcpy(reinterpret_cast<void*>(x), &made, sizeof(T));
            changed |= memcmp(&made, &old, sizeof(T)) != 0;
            if (i.destination[0] < 0) continue;
            u64 raw = 0;
            memcpy(&raw, &old, sizeof(T));
            warp.set(i.destination[0], sizeof(T), lane, raw);
        }
        return changed;
    }

    Races races;

private:
    u64 read(const Block& block, u64 address, int bytes) const {
        if (weak) return block.stores.load(address, bytes);
        u64 value = 0;
        memcpy(&value, reinterpret_cast<const void*>(address), size_t(bytes));
        return value;
    }
    void order(Block& block, const Warp& warp, s32 semantics, u32 lanes) const {
        if (weak && lanes && (semantics & RELEASE)) block.stores.publish(warp.id, block.epoch);
    }

    Bounds bounds;
    Traffic traffic;
    std::mt19937_64& random;
    bool weak;
};

}  // namespace ptx
