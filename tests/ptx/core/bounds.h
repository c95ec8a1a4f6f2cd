// The bytes of the tensors that a kernel was given: nothing else may be touched.
#pragma once

#include "program.h"

namespace ptx {

class Bounds {
public:
    explicit Bounds(const Launch& launch) : buffers(launch.buffers), n(launch.n_buffers) {}

    // The number of the buffer that holds these bytes.
    s64 find(int lane, u64 address, int bytes, bool store) {
        if (address % u64(bytes))
            fail("lane %d: misaligned access of %d bytes at %llx", lane, bytes, (unsigned long long)address);
        if (holds(last, address, bytes, store)) return last;
        s64 read_only = -1;
        for (s64 i = 0; i < n; i++) {
            if (holds(i, address, bytes, store)) return last = i;
            if (holds(i, address, bytes, false)) read_only = i;
        }
        if (read_only >= 0)
            fail("lane %d: store into buffer %lld, which is read-only", lane, (long long)read_only);
        report(lane, address, bytes, store);
    }

private:
    bool holds(s64 i, u64 address, int bytes, bool store) const {
        return i < n && address >= buffers[i].begin && address + u64(bytes) <= buffers[i].end &&
               (!store || buffers[i].writable);
    }
    [[noreturn]] void report(int lane, u64 address, int bytes, bool store) const {
        s64 nearest = -1;
        u64 least = ~u64(0);
        for (s64 i = 0; i < n; i++) {
            u64 const begin = buffers[i].begin, end = buffers[i].end;
            u64 const distance = address < begin ? begin - address : address < end ? 0 : address - end;
            if (distance < least) least = distance, nearest = i;
        }
        const char* what = store ? "store" : "load";
        if (nearest < 0)
            fail("lane %d: %s of %d bytes, and the kernel was given no buffer", lane, what, bytes);
        fail("lane %d: %s of %d bytes outside every buffer, at byte %lld of buffer %lld, which has %lld",
             lane, what, bytes, (long long)(address - buffers[nearest].begin), (long long)nearest,
             (long long)(buffers[nearest].end - buffers[nearest].begin));
    }

    const Buffer* buffers;
    s64 n, last = 0;
};

}  // namespace ptx
