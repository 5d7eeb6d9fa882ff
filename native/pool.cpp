#include "pool.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace elmoe {

namespace {
constexpr uint64_t kField = (1u << 24) - 1;  // tasks and next have 24 bits each, the generation 16
constexpr int kSpins = 20000;                // some 200-400 us: longer than the serial stretches of a decode step

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}
}  // namespace

Pool& Pool::instance() {
    static Pool pool;
    return pool;
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    stopping_ = true;
    ++wake_;
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stopping_ = false;
}

void Pool::set_threads(int threads) {
    std::lock_guard guard(mutex_);
    if (threads == threads_) return;
    stop();
    threads_ = threads;
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

bool Pool::claim(int thread) {
    uint64_t word = word_.load(std::memory_order_acquire);
    if ((word & kField) >= ((word >> 24) & kField)) return false;
    word = word_.fetch_add(1, std::memory_order_acq_rel);
    const uint64_t next = word & kField;
    if (next >= ((word >> 24) & kField)) return false;
    function_(context_, static_cast<int>(next), thread);
    done_.fetch_add(1, std::memory_order_acq_rel);
    return true;
}

void Pool::run(int tasks, Function function, const void* context) {
    if (threads_ == 1 || tasks <= 1) {
        for (int task = 0; task < tasks; ++task) function(context, task, 0);
        return;
    }
    function_ = function;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t generation = (word_.load(std::memory_order_relaxed) >> 48) + 1;
    word_.store(generation << 48 | static_cast<uint64_t>(tasks) << 24, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
        ++wake_;
        wake_.notify_all();
    }
    while (claim(0)) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < tasks; ++spins) {
        if (spins < kSpins)
            relax();
        else
            std::this_thread::yield();
    }
}

void Pool::work(int thread) {
    while (!stopping_.load(std::memory_order_acquire)) {
        int spins = 0;
        while (spins < kSpins) {
            if (claim(thread))
                spins = 0;
            else
                ++spins, relax();
        }
        const uint32_t seen = wake_.load(std::memory_order_seq_cst);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        // A job stored before this check is taken here; one stored after it sees the sleeper and wakes it.
        if (!stopping_.load(std::memory_order_seq_cst) && !claim(thread)) wake_.wait(seen, std::memory_order_seq_cst);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
}

}  // namespace elmoe
