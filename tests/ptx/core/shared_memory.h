// A block's shared memory: accesses within its bounds, and ordered by barriers.
#pragma once

#include <cstring>
#include <vector>

#include "program.h"

namespace ptx {

class SharedMemory {
public:
    // Bytes that nothing wrote are all ones: NaN, and far from any index.
    SharedMemory(s64 size, bool hazards)
        : bytes(size_t(size), 0xff), shadow(hazards ? size_t(size) : 0), hazards(hazards) {}

    void load(int warp, s64 epoch, int lane, u64 at, u8* to, int n) {
        check(lane, at, n, "load");
        if (hazards) note_load(warp, epoch, at, n);
        memcpy(to, &bytes[at], size_t(n));
    }
    void store(int warp, s64 epoch, int lane, u64 at, const u8* from, int n) {
        check(lane, at, n, "store");
        if (hazards) note_store(warp, epoch, at, from, n);
        memcpy(&bytes[at], from, size_t(n));
    }

private:
    // Who touched a byte last, and in which epoch: between the same two barriers.
    struct Touched {
        s64 written = 0, read = 0;
        u64 readers = 0;
        int writer = -1;
    };

    void check(int lane, u64 at, int n, const char* what) const {
        if (at + u64(n) > bytes.size() || at % u64(n))
            fail("lane %d: %s of %d shared bytes at %lld of %lld", lane, what, n, (long long)at,
                 (long long)bytes.size());
    }
    void note_load(int warp, s64 epoch, u64 at, int n) {
        for (u64 x = at; x < at + u64(n); x++) {
            Touched& t = shadow[x];
            if (t.writer < 0) fail("shared byte %lld: read before it was written", (long long)x);
            if (t.written == epoch && t.writer != warp)
                fail("shared byte %lld: read without a barrier since warp %d wrote it", (long long)x,
                     t.writer);
            if (t.read != epoch) t.read = epoch, t.readers = 0;
            t.readers |= u64(1) << warp;
        }
    }
    void note_store(int warp, s64 epoch, u64 at, const u8* from, int n) {
        for (u64 x = at; x < at + u64(n); x++) {
            Touched& t = shadow[x];
            // Several warps may hold the same number and each store it.
            bool const same = bytes[x] == from[x - at];
            if (t.written == epoch && t.writer != warp && !same)
                fail("shared byte %lld: written without a barrier since warp %d wrote it", (long long)x,
                     t.writer);
            if (t.read == epoch && (t.readers & ~(u64(1) << warp)) && !same)
                fail("shared byte %lld: written without a barrier since another warp read it", (long long)x);
            t.written = epoch;
            t.writer = warp;
        }
    }

    std::vector<u8> bytes;
    std::vector<Touched> shadow;
    bool hazards;
};

}  // namespace ptx
