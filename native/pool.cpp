#include "pool.hpp"

#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace elmoe {

namespace {
constexpr int kBits = 21;  // of each of the word's three counts
constexpr uint64_t kField = (1u << kBits) - 1;
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
    auto field = [](uint64_t word, int index) { return word >> (index * kBits) & kField; };
    auto left = [&](uint64_t word) { return field(word, 0) + field(word, 1) < field(word, 2); };
    uint64_t word = word_.load(std::memory_order_acquire);
    if (!left(word)) return false;
    const int end = thread % 2;
    word = word_.fetch_add(uint64_t{1} << (end * kBits), std::memory_order_acq_rel);
    if (!left(word)) return false;
    const uint64_t taken = field(word, end);
    function_(context_, static_cast<int>(end ? field(word, 2) - 1 - taken : taken), thread);
    done_.fetch_add(1, std::memory_order_acq_rel);
    return true;
}

void Pool::run(int tasks, Function function, const void* context) {
    if (threads_ == 1 || tasks <= 1) {
        for (int task = 0; task < tasks; ++task) function(context, task, 0);
        return;
    }
    if (static_cast<uint64_t>(tasks) > kField) throw std::length_error("too many tasks for one parallel region");
    function_ = function;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    word_.store(static_cast<uint64_t>(tasks) << (2 * kBits), std::memory_order_seq_cst);
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
