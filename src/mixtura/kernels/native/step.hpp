// What a decoder layer does with few tokens between and around its large matrices, in one call.
#pragma once

#include <cstdint>
#include <vector>

#include "experts.hpp"

namespace mixtura {

// x / rms(x) times (weight + offset); nothing where it has no weight.
struct Norm {
    Rows weight;  // one row
    std::int64_t width = 0;
    float epsilon = 0.0f;
    float offset = 0.0f;
    bool rounds_once = false;  // after the weight alone, not before it too
};

// A linear layer; nothing where it has no rows.
struct Linear {
    Matrix matrix;
    Rows bias;
};

// How tables of cosines and sines turn a head: number i with the one half a table later, or neighbours; by
// an entry each, or both by entry i of a table of half the width. The numbers are known to Python.
enum class Rotation : int { halves = 0, pairs = 1, halves_of_half_tables = 2, none = 3, pairs_by_first_half = 4 };

struct Attention {
    Norm norm, q_norm, k_norm;  // the latter two for each head, or for all heads in one
    Linear q, k, v, o;
    std::int64_t head = 0;  // width of one
    float scaling = 1.0f;
    Rotation rotation = Rotation::halves;
};

// How choices and weights come from logits; the numbers are known to Python.
enum class Scores : int { softmax_all = 0, softmax_chosen = 1, sigmoid = 2 };

struct Router {
    Linear gate;
    Rows correction;  // one row, added to scores for the choice alone; or no data
    std::int64_t top_k = 1;
    Scores scores = Scores::softmax_all;
    bool normed = false;  // weights divided by their sum
    float scale = 1.0f;
    bool rounds_logits = true, rounds_weights = true;
};

// An expert that every token has.
struct Shared {
    Linear gate, up, down;
    Linear switched;  // one row: its sigmoid times the output; or nothing
    Activation activation;
};

// What follows attention: experts, a shared one, or both.
struct Mixture {
    Norm norm;
    Router router;
    const Experts* experts = nullptr;
    Activation activation;
    Shared shared;
    std::int64_t* loads = nullptr;  // tokens that each expert had, counted on; or nothing
};

// Keys or values in a cache; strides count numbers.
struct Cached {
    void* data = nullptr;
    std::int64_t by_sequence = 0, by_head = 0, by_token = 0;
};

// Numbers that are added to scores, or bytes that say which count.
struct Mask {
    const void* data = nullptr;
    bool is_bytes = false;
    Number number = Number::f32;
    std::int64_t by_sequence = 0, by_query = 0, by_key = 0;
};

// Tokens on their way: `num` of each of some sequences, in the model's number.
struct Pass {
    Way way;
    Number number = Number::f32;
    std::int64_t num_sequences = 1, num = 1, width = 0;
    const void* x = nullptr;  // rows without gaps
    void* out = nullptr;

    std::int64_t tokens() const { return num_sequences * num; }
};

// Where one sequence stands that has a cache of its own: its keys and values, and how many there are.
struct Seat {
    Cached keys, values;
    std::int64_t past = 0;
};

// Where a pass stands in its sequences.
struct Place {
    Rows cosines, sines;  // a row for each token
    std::int64_t table_width = 0, table_by_sequence = 0;  // 0 where all sequences share one
    Cached keys, values;
    std::int64_t past = 0;  // tokens before the pass, in the cache
    Mask mask;              // none: each token sees those before it and itself
    // One for each sequence where they have caches of their own; `keys`, `values` and the mask are unused then, and
    // `past` is that of the longest.
    std::vector<Seat> seats = {};
};

// Whether tables of this width turn no more of a head than there is.
bool fits(Rotation rotation, std::int64_t table_width, std::int64_t head);

// out = x + attention(norm(x)), keys and values put behind those in the cache.
void run_attention(const Pass& pass, const Attention& attention, const Place& place);

// Its halves, for caches that take keys and values themselves: `queries` has room for each token's heads.
void run_projections(const Pass& pass, const Attention& attention, const Place& place, float* queries);
void run_attending(const Pass& pass, const Attention& attention, const Place& place, const float* queries);

// out = x + mixture(norm(x)).
void run_mixture(const Pass& pass, const Mixture& mixture);

// How choices of experts differ from a router's own: a row for each of `num` tokens, no data where they do not. They
// act in this order; what the router does besides stays where it is in between.
struct Steered {
    std::int64_t num = 0, num_experts = 0;
    const float* logits = nullptr;          // added to logits
    const float* spread = nullptr;          // times the deviation of a token's logits, added to them, too
    const bool* highest = nullptr;          // logits raised above the token's highest
    const float *mixture = nullptr, *share = nullptr;  // probabilities mixed into a softmax's
    const float* bias = nullptr;            // added to what is compared, never to weights
    const bool* allowed = nullptr;          // others are not chosen
    const std::int64_t* ranks = nullptr;    // the first place that is kept, and the place after the last
    const float* least = nullptr;           // of a token's weights: experts of a smaller share are left out
    const float* scale = nullptr;           // times weights in the end
    std::int64_t columns = 0;               // choices that a token may come to
    std::int64_t* kept = nullptr;           // how many a token has in the end
};

// Layers one after the other, and a last norm: `pass.out` holds what comes out of each, `pass.x` stays.
struct Step {
    const Attention* attention;
    const Mixture* mixture;
    const Place* place;
    const Steered* steered;  // or none
};
void run_layers(const Pass& pass, const std::vector<Step>& steps, const Norm& last);

// Each token's choices and their weights, from its logits: `top_k` of each, steered as many as it has columns. What is
// left out has a number that no expert has.
void choose(const Router& router, Number number, const float* logits, std::int64_t num, std::int64_t* ids,
            float* weights, const Steered* steered = nullptr);

}  // namespace mixtura
