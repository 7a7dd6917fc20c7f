// A pool of threads for work that takes microseconds to milliseconds.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace mixtura {

// Runs loops on several threads. Each has a stretch of neighbouring items, so that it reads on where it stopped; who
// has done its own takes the last of another's, so that a thread that the system holds back does little instead of
// keeping the others. One that sleeps past the end of a loop is not waited for. Between loops threads spin for a
// short while and then sleep.
class Pool {
public:
    static Pool& shared();

    // Holds the pool for a sequence of loops; others wait until it is given back.
    std::unique_lock<std::mutex> hold();

    // Calls body(i) for 0 <= i < num on up to `threads` threads, the caller's among them. Needs `hold`.
    template <class Body>
    void loop(std::int64_t num, int threads, const Body& body) {
        run(num, threads, [](const void* context, std::int64_t i) { (*static_cast<const Body*>(context))(i); },
            &body);
    }

private:
    using Call = void (*)(const void* context, std::int64_t i);

    void run(std::int64_t num, int threads, Call call, const void* context);
    void start(int workers);
    void work(int number);
    void take_items(int mine);
    bool take_one(int owner, bool first, std::int64_t& item);
    bool join(std::uint64_t seen);

    std::mutex held_;
    std::vector<std::thread> workers_;
    // What is left of each thread's stretch, from its begin (upper half) to its end.
    struct alignas(64) Stretch {
        std::atomic<std::uint64_t> left{0};
    };
    std::unique_ptr<Stretch[]> stretches_;
    // The loop that runs: its number (upper half), whether it can be joined, and how many workers have.
    alignas(64) std::atomic<std::uint64_t> state_{0};
    alignas(64) std::atomic<std::uint32_t> wakings_{0};
    std::atomic<int> sleeping_{0};
    std::atomic<int> wanted_{0};
    int num_stretches_ = 0;
    Call call_ = nullptr;
    const void* context_ = nullptr;
};

}  // namespace mixtura
