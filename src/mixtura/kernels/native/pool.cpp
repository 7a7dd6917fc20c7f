#include "pool.hpp"

#include <chrono>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace mixtura {
namespace {

// Long enough to bridge what Python does between two layers, short enough not to be felt by others.
constexpr auto spin_time = std::chrono::microseconds(200);
constexpr int pauses_per_look_at_the_clock = 64;
constexpr std::uint64_t open_bit = 1ull << 31;
constexpr std::uint64_t joined_mask = open_bit - 1;
constexpr std::uint64_t one_loop = 1ull << 32;
constexpr int half_bits = 32;
constexpr std::uint64_t half_mask = (1ull << half_bits) - 1;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

Pool* the_pool = nullptr;

}  // namespace

Pool& Pool::shared() {
    // Never destroyed: its threads may still sleep when the interpreter ends. A process that was forked
    // has none of them and gets a pool of its own.
    static const bool made = [] {
        the_pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });
#endif
        return true;
    }();
    static_cast<void>(made);
    return *the_pool;
}

std::unique_lock<std::mutex> Pool::hold() { return std::unique_lock<std::mutex>(held_); }

void Pool::run(std::int64_t num, int threads, Call call, const void* context) {
    const int workers = static_cast<int>(num < threads ? num : threads) - 1;
    if (workers <= 0) {
        for (std::int64_t i = 0; i < num; ++i) call(context, i);
        return;
    }
    start(workers);
    num_stretches_ = workers + 1;
    for (std::int64_t i = 0, begin = 0; i <= workers; ++i) {
        const std::int64_t end = num * (i + 1) / (workers + 1);
        const auto left = static_cast<std::uint64_t>(begin) << half_bits | static_cast<std::uint64_t>(end);
        stretches_[static_cast<std::size_t>(i)].left.store(left, std::memory_order_relaxed);
        begin = end;
    }
    call_ = call;
    context_ = context;
    wanted_.store(workers, std::memory_order_relaxed);
    const std::uint64_t number = (state_.load(std::memory_order_relaxed) & ~(one_loop - 1)) + one_loop;
    state_.store(number | open_bit, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
        wakings_.fetch_add(1, std::memory_order_release);
        wakings_.notify_all();
    }
    take_items(0);
    std::uint64_t state = state_.fetch_and(~open_bit, std::memory_order_acq_rel);
    for (int looks = 0; (state & joined_mask) != 0; ++looks) {
        // Whoever is waited for may need this very core.
        if (looks > 2000) std::this_thread::yield();
        pause();
        state = state_.load(std::memory_order_acquire);
    }
}

void Pool::start(int workers) {
    if (static_cast<int>(workers_.size()) < workers || !stretches_) {
        stretches_ = std::make_unique<Stretch[]>(static_cast<std::size_t>(workers) + 1);
    }
    while (static_cast<int>(workers_.size()) < workers) {
        const int number = static_cast<int>(workers_.size());
        workers_.emplace_back([this, number] { work(number); });
        workers_.back().detach();
    }
}

void Pool::take_items(int mine) {
    std::int64_t item = 0;
    while (take_one(mine, true, item)) call_(context_, item);
    for (int other = 1; other < num_stretches_; ++other) {
        while (take_one((mine + other) % num_stretches_, false, item)) call_(context_, item);
    }
}

bool Pool::take_one(int owner, bool first, std::int64_t& item) {
    auto& left = stretches_[static_cast<std::size_t>(owner)].left;
    std::uint64_t seen = left.load(std::memory_order_relaxed);
    for (;;) {
        const std::uint64_t begin = seen >> half_bits, end = seen & half_mask;
        if (begin >= end) return false;
        const std::uint64_t less = first ? (begin + 1) << half_bits | end : begin << half_bits | (end - 1);
        if (left.compare_exchange_weak(seen, less, std::memory_order_relaxed)) {
            item = static_cast<std::int64_t>(first ? begin : end - 1);
            return true;
        }
    }
}

bool Pool::join(std::uint64_t seen) {
    while (seen & open_bit) {
        if (state_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) return true;
    }
    return false;
}

void Pool::work(int number) {
    using clock = std::chrono::steady_clock;
    std::uint64_t last = 0;
    auto until = clock::now() + spin_time;
    for (int looks = 1;; ++looks) {
        const std::uint64_t state = state_.load(std::memory_order_acquire);
        const bool is_new = (state & open_bit) && (state / one_loop) != last;
        if (is_new) {
            last = state / one_loop;
            if (number < wanted_.load(std::memory_order_relaxed) && join(state)) {
                // The loop joined may be a later one than the one seen.
                take_items(number + 1);
                last = state_.fetch_sub(1, std::memory_order_acq_rel) / one_loop;
            }
            until = clock::now() + spin_time;
            continue;
        }
        pause();
        if (looks % pauses_per_look_at_the_clock == 0 && clock::now() > until) {
            const std::uint32_t wakings = wakings_.load(std::memory_order_acquire);
            sleeping_.fetch_add(1, std::memory_order_seq_cst);
            const std::uint64_t now = state_.load(std::memory_order_seq_cst);
            if (!((now & open_bit) && (now / one_loop) != last)) wakings_.wait(wakings);
            sleeping_.fetch_sub(1, std::memory_order_seq_cst);
            until = clock::now() + spin_time;
        }
    }
}

}  // namespace mixtura
