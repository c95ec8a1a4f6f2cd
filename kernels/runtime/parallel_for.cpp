#include "runtime/parallel_for.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace kl {
namespace {

// A sleeping thread takes longer to wake than a row takes to read: a waiting thread spins first.
constexpr std::chrono::microseconds kSpinTime{40};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Whether `done` came true within the time.
template <class Done>
bool spin_until(Done done) {
    const auto end = std::chrono::steady_clock::now() + kSpinTime;
    do {
        for (int i = 0; i < 16; ++i) {
            if (done()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

struct Job {
    Task task;
    void* context;
    std::int64_t items;
    int helpers_wanted;  // guarded by the pool's mutex
    std::atomic<std::int64_t> next{0};
    std::atomic<int> helpers_inside{0};  // changed under the mutex only

    void work() {
        for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) task(context, i);
    }
};

class ThreadPool {
public:
    void run(Job& job) {
        const int helpers = job.helpers_wanted;
        int sleepers = 0;
        {
            std::lock_guard lock(mutex_);
            for (; started_ < helpers && started_ < kMostHelpers; ++started_)
                std::thread([this] { help(); }).detach();
            open_.push_back(&job);
            any_open_.store(true, std::memory_order_relaxed);
            sleepers = std::min(helpers, asleep_);
        }
        for (int i = 0; i < sleepers; ++i) wake_.notify_one();
        job.work();
        {
            std::lock_guard lock(mutex_);
            // A helper that comes late must not find a job whose caller has gone.
            std::erase(open_, &job);
            any_open_.store(!open_.empty(), std::memory_order_relaxed);
        }
        const auto left = [&] { return job.helpers_inside.load(std::memory_order_acquire) == 0; };
        // The lock is needed even after the spin: the last helper holds it while it says that it has left.
        spin_until(left);
        std::unique_lock lock(mutex_);
        done_.wait(lock, left);
    }

private:
    static constexpr int kMostHelpers = 1024;

    void help() {
        std::unique_lock lock(mutex_);
        for (;;) {
            if (open_.empty()) {
                lock.unlock();
                spin_until([this] { return any_open_.load(std::memory_order_relaxed); });
                lock.lock();
            }
            ++asleep_;
            wake_.wait(lock, [this] { return !open_.empty(); });
            --asleep_;
            Job& job = *open_.front();
            if (--job.helpers_wanted == 0) {
                open_.pop_front();
                any_open_.store(!open_.empty(), std::memory_order_relaxed);
            }
            job.helpers_inside.fetch_add(1, std::memory_order_relaxed);
            lock.unlock();
            job.work();
            lock.lock();
            if (job.helpers_inside.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::deque<Job*> open_;
    std::atomic<bool> any_open_{false};  // what open_ holds, for those who look without the lock
    int asleep_ = 0;
    int started_ = 0;
};

// Never destroyed: helpers may wait in it when the process ends. A forked child has none of its threads, and
// one of them may hold its mutex, so the child forgets the pool and makes its own when it needs one.
std::atomic<ThreadPool*> current{nullptr};

ThreadPool& pool() {
    ThreadPool* p = current.load(std::memory_order_acquire);
    if (p != nullptr) return *p;
#if defined(__unix__) || defined(__APPLE__)
    static const int registered =
        pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_release); });
    (void)registered;
#endif
    ThreadPool* fresh = new ThreadPool;
    if (current.compare_exchange_strong(p, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
    return *p;
}

}  // namespace

void parallel_for(std::int64_t items, int threads, Task task, void* context) {
    if (threads > items) threads = static_cast<int>(items);
    if (threads <= 1) {
        for (std::int64_t i = 0; i < items; ++i) task(context, i);
        return;
    }
    Job job{task, context, items, threads - 1};
    pool().run(job);
}

}  // namespace kl
