#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace kl {
namespace {

struct Job {
    Task task;
    void* context;
    std::int64_t items;
    int helpers_wanted;  // this and the next but one are guarded by the pool's mutex
    std::atomic<std::int64_t> next{0};
    int helpers_inside = 0;

    void work() {
        for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) task(context, i);
    }
};

class Pool {
public:
    void run(Job& job) {
        const int helpers = job.helpers_wanted;
        {
            std::lock_guard lock(mutex_);
            for (; started_ < helpers && started_ < kMostHelpers; ++started_)
                std::thread([this] { help(); }).detach();
            open_.push_back(&job);
        }
        for (int i = 0; i < helpers; ++i) wake_.notify_one();
        job.work();
        std::unique_lock lock(mutex_);
        // A helper that is still asleep must not find a job whose caller has gone.
        std::erase(open_, &job);
        done_.wait(lock, [&] { return job.helpers_inside == 0; });
    }

private:
    static constexpr int kMostHelpers = 1024;

    void help() {
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return !open_.empty(); });
            Job& job = *open_.front();
            if (--job.helpers_wanted == 0) open_.pop_front();
            ++job.helpers_inside;
            lock.unlock();
            job.work();
            lock.lock();
            if (--job.helpers_inside == 0) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::deque<Job*> open_;
    int started_ = 0;
};

// Never destroyed: helpers may still be waiting in it when the process ends. After fork the child
// has the memory of the pool and none of its threads, and its mutex may be held by one of them, so
// the child forgets it and makes its own when it needs one.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
    Pool* p = current.load(std::memory_order_acquire);
    if (p != nullptr) return *p;
#if defined(__unix__) || defined(__APPLE__)
    static const int registered =
        pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_release); });
    (void)registered;
#endif
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(p, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
    return *p;
}

}  // namespace

void run_items(std::int64_t items, int threads, Task task, void* context) {
    if (threads > items) threads = static_cast<int>(items);
    if (threads <= 1) {
        for (std::int64_t i = 0; i < items; ++i) task(context, i);
        return;
    }
    Job job{task, context, items, threads - 1};
    pool().run(job);
}

}  // namespace kl
