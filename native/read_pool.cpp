#include "read_pool.hpp"

#include <algorithm>
#include <cerrno>
#include <unistd.h>
#include <utility>

namespace elmoe {

namespace {
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void sleep_until(double time) {
    double left = time - now();
    if (left > 0) std::this_thread::sleep_for(std::chrono::duration<double>(left));
}
}  // namespace

ReadPool::ReadPool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
}

ReadPool::~ReadPool() {
    if (forked()) {
        new std::vector<std::thread>(std::move(threads_));
        (void)submitted_.release();
        (void)completed_.release();
        return;
    }
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
    }
    submitted_->notify_all();
    for (auto& thread : threads_) thread.join();
}

uint64_t ReadPool::submit(int file, uint64_t offset, uint64_t bytes, uint64_t destination, int64_t priority) {
    uint64_t ticket;
    {
        std::lock_guard lock(mutex_);
        ticket = next_ticket_++;
        states_[ticket] = State{};
        const double submitted = now();
        if (outstanding_++ == 0) busy_since_ = submitted;
        queue_.push(Request{priority, ticket, file, offset, bytes, destination, submitted});
    }
    submitted_->notify_one();
    return ticket;
}

std::vector<ReadFailure> ReadPool::wait(const std::vector<uint64_t>& tickets) {
    std::vector<ReadFailure> failures;
    if (forked()) return failures;
    std::unique_lock lock(mutex_);
    for (uint64_t ticket : tickets) {
        auto found = states_.find(ticket);
        if (found == states_.end()) continue;
        State& state = found->second;  // a reference stays valid when others submit; an iterator would not
        completed_->wait(lock, [&] { return state.complete; });
        if (state.error) failures.push_back({ticket, state.error});
        states_.erase(ticket);
    }
    return failures;
}

bool ReadPool::done(uint64_t ticket) {
    std::lock_guard lock(mutex_);
    auto found = states_.find(ticket);
    return found == states_.end() || found->second.complete;
}

void ReadPool::hasten(const std::vector<uint64_t>& tickets, int64_t priority) {
    std::lock_guard lock(mutex_);
    std::vector<Request> all;
    while (!queue_.empty()) {
        all.push_back(queue_.top());
        queue_.pop();
    }
    for (auto& request : all) {
        for (uint64_t ticket : tickets)
            if (request.ticket == ticket) request.priority = priority;
        queue_.push(request);
    }
}

double ReadPool::busy_seconds() {
    std::lock_guard lock(mutex_);
    return busy_ + (outstanding_ ? now() - busy_since_ : 0);
}

void ReadPool::set_bandwidth(double bytes_per_second) {
    std::lock_guard lock(mutex_);
    bandwidth_ = bytes_per_second;
    device_free_ = 0;
}

void ReadPool::inject_failure(int error, int64_t after) {
    std::lock_guard lock(mutex_);
    failure_ = error;
    failure_after_ = after;
}

void ReadPool::inject_delay(double seconds, uint64_t seed) {
    std::lock_guard lock(mutex_);
    delay_ = seconds;
    random_.seed(seed);
}

void ReadPool::record(bool on) {
    std::lock_guard lock(mutex_);
    recording_ = on;
    events_.clear();
}

std::vector<ReadEvent> ReadPool::take_events() {
    std::lock_guard lock(mutex_);
    return std::exchange(events_, {});
}

int ReadPool::read(const Request& request, int injected) {
    if (injected && injected != ENODATA) return injected;
    uint64_t done = 0;
    while (done < request.bytes) {
        ssize_t got = pread(request.file, reinterpret_cast<char*>(request.destination) + done, request.bytes - done,
                            static_cast<off_t>(request.offset + done));
        if (got < 0) {
            if (errno == EINTR) continue;
            return errno;
        }
        if (got == 0 || injected) return ENODATA;  // the file ends before the record
        done += static_cast<uint64_t>(got);
    }
    bytes_read_ += done;
    return 0;
}

void ReadPool::work() {
    std::unique_lock lock(mutex_);
    for (;;) {
        submitted_->wait(lock, [&] { return stopping_ || !queue_.empty(); });
        if (queue_.empty()) return;  // stopping, and nothing is left to complete
        Request request = queue_.top();
        queue_.pop();
        double started = now(), release = 0;
        if (bandwidth_ > 0) {
            device_free_ = std::max(device_free_, started) + static_cast<double>(request.bytes) / bandwidth_;
            release = device_free_;
        }
        if (delay_ > 0) release = std::max(release, started + delay_ * std::uniform_real_distribution<>(0, 1)(random_));
        int injected = 0;
        if (failure_ && failure_after_-- == 0) injected = std::exchange(failure_, 0);
        lock.unlock();
        int error = read(request, injected);
        if (release > 0) sleep_until(release);
        double finished = now();
        lock.lock();
        auto found = states_.find(request.ticket);
        if (found != states_.end()) found->second = State{true, error};
        if (--outstanding_ == 0) busy_ += finished - busy_since_;
        if (recording_) events_.push_back({request.submitted, started, finished, request.bytes, request.priority});
        completed_->notify_all();
    }
}

}  // namespace elmoe
