// Asynchronous reads for the slow tier: a few threads that take requests by priority and fill caller-owned memory.
//
// Requests are (file, offset, bytes, destination); the lowest priority value goes first, ties in order of submission. A
// request either fills its destination wholly or fails with an errno (EIO, or ENODATA for a file that ends early). Nothing
// is cancelled: a submitted read always completes, so the memory it fills stays valid until then.
//
// `bandwidth` throttles all threads together to a device of that many bytes per second: a read of n bytes occupies the
// device for n / bandwidth seconds after everything submitted to it before.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <queue>
#include <random>
#include <thread>
#include <unistd.h>
#include <unordered_map>
#include <vector>

namespace elmoe {

struct ReadEvent {  // seconds on the steady clock
    double submitted, started, finished;
    uint64_t bytes;
    int64_t priority;
};

struct ReadFailure {
    uint64_t ticket;
    int error;
};

class ReadPool {
  public:
    explicit ReadPool(int threads);
    ~ReadPool();
    ReadPool(const ReadPool&) = delete;
    ReadPool& operator=(const ReadPool&) = delete;

    // Returns a ticket that must be given to `wait` exactly once.
    uint64_t submit(int file, uint64_t offset, uint64_t bytes, uint64_t destination, int64_t priority);
    // Blocks until all tickets have completed and forgets them; returns those that failed.
    std::vector<ReadFailure> wait(const std::vector<uint64_t>& tickets);
    // Whether a ticket that was not waited for has completed.
    bool done(uint64_t ticket);
    // Moves a request that has not started to another priority.
    void hasten(const std::vector<uint64_t>& tickets, int64_t priority);

    void set_bandwidth(double bytes_per_second);
    // Tests: the request that is `after` requests away fails with `error` (ENODATA: a short read); 0 switches it off.
    void inject_failure(int error, int64_t after);
    // Tests: every read is delayed by up to `seconds`, drawn from `seed`, so that completion order is random.
    void inject_delay(double seconds, uint64_t seed);
    // Read events since the last call, when recording is on.
    void record(bool on);
    std::vector<ReadEvent> take_events();

    uint64_t bytes_read() const { return bytes_read_.load(); }
    // Seconds in which some read was asked for and not complete, so far.
    double busy_seconds();

  private:
    struct Request {
        int64_t priority;
        uint64_t ticket;
        int file;
        uint64_t offset, bytes, destination;
        double submitted;
        bool operator<(const Request& other) const {  // std::priority_queue takes the largest
            return priority != other.priority ? priority > other.priority : ticket > other.ticket;
        }
    };
    struct State {
        bool complete = false;
        int error = 0;
    };

    void work();
    int read(const Request& request, int injected);

    // Of a child of fork, which has the pool without its threads: nothing is waited for, and a condition variable that they
    // waited on cannot be destroyed, so it stays.
    bool forked() const { return getpid() != process_; }

    const pid_t process_ = getpid();
    std::mutex mutex_;
    std::unique_ptr<std::condition_variable> submitted_ = std::make_unique<std::condition_variable>(),
                                             completed_ = std::make_unique<std::condition_variable>();
    std::priority_queue<Request> queue_;
    std::unordered_map<uint64_t, State> states_;
    std::vector<std::thread> threads_;
    std::vector<ReadEvent> events_;
    std::mt19937_64 random_;
    uint64_t next_ticket_ = 1;
    double bandwidth_ = 0, device_free_ = 0, delay_ = 0;
    int failure_ = 0;
    int64_t failure_after_ = 0;
    int outstanding_ = 0;
    double busy_ = 0, busy_since_ = 0;
    bool recording_ = false, stopping_ = false;
    std::atomic<uint64_t> bytes_read_{0};
};

}  // namespace elmoe
