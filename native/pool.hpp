// A small thread pool for memory-bound work on a shared machine.
//
// Tasks are claimed dynamically from one atomic word, the caller takes part, and it never waits for a worker that has not
// claimed a task: a worker whose core was taken by another process delays nothing but the task in its hands. Workers spin
// briefly after a job and then sleep on a futex.
//
// The word holds (tasks, taken from the end, taken from the start): a claim is valid or not by the word it was taken from alone,
// and a valid claim keeps its job's parameters alive, because the caller leaves only when all tasks are done. Every other thread
// takes from the end, so that in step after step a thread reads much the same weights: those of small models lie in its cache.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace elmoe {

class Pool {
  public:
    static Pool& instance();
    ~Pool();

    void set_threads(int threads);  // 1..64
    int threads() const { return threads_; }

    // Calls body(task, thread) for every task in 0..tasks-1; thread is in 0..threads()-1. One job at a time: hold `lock()`.
    template <class Body>
    void run(int tasks, const Body& body) {
        run(tasks, [](const void* context, int task, int thread) { (*static_cast<const Body*>(context))(task, thread); },
            &body);
    }
    std::mutex& lock() { return mutex_; }

  private:
    using Function = void (*)(const void*, int, int);
    void run(int tasks, Function function, const void* context);
    bool claim(int thread);
    void work(int thread);
    void stop();

    std::mutex mutex_;
    int threads_ = 1;
    std::vector<std::thread> workers_;
    alignas(64) std::atomic<uint64_t> word_{0};
    alignas(64) std::atomic<int> done_{0};
    alignas(64) std::atomic<uint32_t> wake_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stopping_{false};
    Function function_ = nullptr;
    const void* context_ = nullptr;
};

}  // namespace elmoe
