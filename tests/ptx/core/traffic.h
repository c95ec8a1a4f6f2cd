// Bytes that a launch loads and stores of each buffer, and how many different ones: what is read again shows.
#pragma once

#include <vector>

#include "program.h"

namespace ptx {

class Traffic {
public:
    explicit Traffic(const Launch& launch) : buffers(launch.buffers), counts(launch.traffic) {
        if (!counts) return;
        for (s64 i = 0; i < launch.n_buffers; i++)
            for (int what = 0; what < 2; what++)
                seen.emplace_back(size_t(launch.buffers[i].end - launch.buffers[i].begin));
    }

    void note(s64 buffer, u64 address, int bytes, bool store) {
        if (!counts) return;
        std::vector<bool>& before = seen[size_t(2 * buffer + store)];
        u64* count = counts + 4 * buffer + store;
        count[0] += u64(bytes);
        for (u64 x = address - buffers[buffer].begin, end = x + u64(bytes); x < end; x++)
            if (!before[x]) before[x] = true, count[2]++;
    }

private:
    const Buffer* buffers;
    u64* counts;
    std::vector<std::vector<bool>> seen;
};

}  // namespace ptx
