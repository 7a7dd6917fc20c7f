// Linear layers and mixtures of experts on the kernels of `matrix.hpp`.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "matrix.hpp"

namespace mixtura {

enum class Number : int { f32 = 0, bf16 = 1 };

// Rows of numbers in somebody else's memory; a stride counts numbers.
struct Rows {
    const void* data = nullptr;
    Number number = Number::f32;
    std::int64_t stride = 0;
};

struct Result {
    void* data = nullptr;
    Number number = Number::f32;
    std::int64_t stride = 0;
};

// How to run: on which kernels, on how many threads.
struct Way {
    const Isa* isa = nullptr;
    Inputs inputs = Inputs::f32;
    int threads = 1;
};

struct Expert {
    Matrix up, down;
    Rows up_bias, down_bias;  // one row each, or no data
};

// What a call is about to multiply with: experts, ascending, the rows of each, and the tokens they come from;
// whether they must come in this order.
struct Need {
    const std::int64_t* experts;
    const std::int64_t* num_rows;
    std::int64_t num;
    Rows x;
    std::int64_t num_tokens;
    bool in_order;
};

// The experts of a layer. Where `fetch` is there, they are not all in memory at once: it brings some of those that
// are needed, at least one, to where their records say, keeps them there until it is called again, and gives their
// places among the needed ones, ascending; where they must come in order these are the first ones. A call that gets
// fewer than it needs computes with them and asks for the rest, so that reading goes on meanwhile. What a token gets
// is added up in the order of experts all the same, so that its bits do not depend on what comes when.
struct Experts {
    std::vector<Expert> all;
    std::function<std::vector<std::int64_t>(const Need&)> fetch;
    // Of rows of outputs that wait for those of lower experts; a call that would have more takes experts in order.
    std::int64_t most_waiting_bytes = 0;
};

// Assignments of tokens to experts. One whose expert does not exist is absent.
struct Assignments {
    const std::int64_t* expert_ids = nullptr;
    const std::int64_t* token_ids = nullptr;  // none: assignment i belongs to token i / per_token
    std::int64_t per_token = 1;
    std::int64_t num = 0;
    std::int64_t num_tokens = 0;

    std::int64_t token(std::int64_t i) const { return token_ids ? token_ids[i] : i / per_token; }
};

// out[i] = matrix x[i] + bias for `num` rows.
void linear(const Way& way, const Matrix& matrix, Rows bias, Rows x, std::int64_t num, Result out);

// Each token's sum over its experts of weight times output, experts ascending. `weights` has a number for
// each assignment. All in one: for activations known here.
void run_experts(const Way& way, const Experts& experts, const Assignments& assignments, Rows x,
                 Rows weights, const Activation& activation, Result out);

// The same for whoever holds the pool already.
void run_experts_held(const Way& way, const Experts& experts, const Assignments& assignments, Rows x,
                      Rows weights, const Activation& activation, Result out);

// The two halves of `run_experts`, for whatever else lies between or after the matrices. The first gives
// each assignment's row of outputs of `up`; the second takes such rows for `down`, and without
// weights gives each assignment's row of outputs. Rows of absent assignments are zeros.
void run_up(const Way& way, const Experts& experts, const Assignments& assignments, Rows x,
            Result out);
void run_down(const Way& way, const Experts& experts, const Assignments& assignments, Rows hidden,
              Rows weights, Result out);

// All rows of a trellis as numbers.
void decode(const Way& way, const Matrix& matrix, Result out);

// Reads `bytes` bytes on `threads` threads as fast as the machine can; gives their sum by words.
std::uint64_t read_all(const unsigned char* data, std::int64_t bytes, int threads);
// Drops memory from the processor's caches, so that the next reading is from memory; where that is not known
// how, it does nothing.
void evict(const unsigned char* data, std::int64_t bytes);

}  // namespace mixtura
