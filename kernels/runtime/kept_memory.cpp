#include "runtime/kept_memory.h"

#include <algorithm>
#include <bit>
#include <mutex>
#include <new>
#include <vector>

#include "runtime/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KL_POISONS 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define KL_POISONS 1
#endif
#if defined(KL_POISONS)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(data, bytes) ((void)(data), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(data, bytes) ((void)(data), (void)(bytes))
#endif

namespace kl {
namespace {

constexpr std::int64_t kHugePage = 2 << 20;
constexpr std::size_t kMostIdle = 2;                       // a gradient to each side
constexpr std::int64_t kMostIdleBytes = INT64_C(4) << 30;  // where nobody says another bound
// A block may serve what is this much smaller: what is held alive in it holds no more than twice its size.
constexpr std::int64_t kMostSlack = 2;

std::int64_t round_up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }

// Eight sizes between two powers of two, so that rows that come and go by a few ask for the same.
std::int64_t rounded(std::int64_t bytes) {
    const auto power = static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(bytes)));
    return round_up(bytes, std::max(kHugePage, power / 8));
}

void* map(std::int64_t bytes) {
#if defined(__linux__)
    // A huge page more, to begin at one: pages of 4 KiB at both ends would take a fault each.
    const auto size = static_cast<std::size_t>(bytes);
    void* all = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    auto* first = static_cast<char*>(all);
    const auto ahead = static_cast<std::size_t>(-reinterpret_cast<std::uintptr_t>(all) & (kHugePage - 1));
    if (ahead > 0) munmap(first, ahead);
    munmap(first + ahead + size, kHugePage - ahead);
    prefer_huge_pages(first + ahead, bytes);
    return first + ahead;
#else
    return ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{kHugePage});
#endif
}

void unmap(KeptBlock* block) {
    ASAN_UNPOISON_MEMORY_REGION(block->data, static_cast<std::size_t>(block->bytes));
#if defined(__linux__)
    munmap(block->data, static_cast<std::size_t>(block->bytes));
#else
    ::operator delete(block->data, std::align_val_t{kHugePage});
#endif
    delete block;
}

class KeptMemory {
public:
    KeptBlock* take(std::int64_t bytes) {
        const std::int64_t size = rounded(std::max<std::int64_t>(bytes, 1));
        std::lock_guard lock(mutex_);
        largest_ = std::max(largest_, size);
        KeptBlock* block = take_idle(size);
        taken_ += block != nullptr ? block->bytes : size;
        most_taken_ = std::max(most_taken_, taken_);
        // What lies idle is never added to the most that calls ever held at once.
        while (!idle_.empty() && taken_ + idle_bytes_ > most_taken_) release_oldest();
        if (block == nullptr) block = new_block(size);
        return block;
    }

    void give_back(KeptBlock* block) noexcept {
        std::lock_guard lock(mutex_);
        taken_ -= block->bytes;
        ASAN_POISON_MEMORY_REGION(block->data, static_cast<std::size_t>(block->bytes));
        idle_bytes_ += block->bytes;
        idle_.push_back(block);  // never grows: take() keeps room for all that are taken
        keep_to_limits();
    }

    void limit(std::int64_t bytes) {
        std::lock_guard lock(mutex_);
        limit_ = bytes;
        keep_to_limits();
    }

    void release() {
        std::lock_guard lock(mutex_);
        while (!idle_.empty()) release_oldest();
        most_taken_ = taken_;
        largest_ = 0;
    }

    KeptUse use() {
        std::lock_guard lock(mutex_);
        return {taken_, idle_bytes_, static_cast<std::int64_t>(idle_.size())};
    }

    // A forked child must find the mutex free, and its copies of idle pages cost it more than new ones.
    void before_fork() { mutex_.lock(); }
    void after_fork_in_parent() { mutex_.unlock(); }
    void after_fork_in_child() {
        while (!idle_.empty()) release_oldest();
        mutex_.unlock();
    }

private:
    // The smallest that is large enough and not too large.
    KeptBlock* take_idle(std::int64_t size) {
        auto best = idle_.end();
        for (auto it = idle_.begin(); it != idle_.end(); ++it) {
            const std::int64_t has = (*it)->bytes;
            if (has >= size && has <= kMostSlack * size && (best == idle_.end() || has < (*best)->bytes))
                best = it;
        }
        if (best == idle_.end()) return nullptr;
        KeptBlock* block = *best;
        idle_.erase(best);
        idle_bytes_ -= block->bytes;
        ASAN_UNPOISON_MEMORY_REGION(block->data, static_cast<std::size_t>(block->bytes));
        return block;
    }

    KeptBlock* new_block(std::int64_t size) {
        try {
            idle_.reserve(++blocks_);
            return new KeptBlock{map(size), size};
        } catch (...) {
            --blocks_;
            taken_ -= size;
            throw;
        }
    }

    void release_oldest() {
        KeptBlock* block = idle_.front();
        idle_.erase(idle_.begin());
        idle_bytes_ -= block->bytes;
        --blocks_;
        unmap(block);
    }

    void keep_to_limits() {
        const std::int64_t most = limit_ >= 0 ? limit_ : std::min(2 * largest_, kMostIdleBytes);
        while (!idle_.empty() && (idle_.size() > kMostIdle || idle_bytes_ > most)) release_oldest();
    }

    std::mutex mutex_;
    std::vector<KeptBlock*> idle_;  // the one that was given back last is the last
    std::int64_t taken_ = 0, most_taken_ = 0, idle_bytes_ = 0, largest_ = 0, limit_ = -1;
    std::size_t blocks_ = 0;  // taken and idle
};

// Never destroyed: a tensor may give its block back when the process ends.
KeptMemory& kept() {
    static KeptMemory* const memory = new KeptMemory;
#if defined(__unix__) || defined(__APPLE__)
    static const int registered =
        pthread_atfork([] { memory->before_fork(); }, [] { memory->after_fork_in_parent(); },
                       [] { memory->after_fork_in_child(); });
    (void)registered;
#endif
    return *memory;
}

}  // namespace

KeptBlock* take_block(std::int64_t bytes) { return kept().take(bytes); }
void give_back(KeptBlock* block) noexcept { kept().give_back(block); }
void limit_idle_bytes(std::int64_t bytes) { kept().limit(bytes); }
void release_idle_blocks() { kept().release(); }
KeptUse kept_use() { return kept().use(); }

}  // namespace kl
