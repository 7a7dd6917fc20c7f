// Attention of few queries over a cache, and norms, on one instruction set.
#pragma once

#include <cmath>

#include "matrix.hpp"
#include "vectors.hpp"

namespace mixtura::MIXTURA_ISA {

template <class T>
MIXTURA_INLINE Floats load_numbers(const T* from) {
    if constexpr (sizeof(T) == 4) return load<Floats>(from);
    else return widen_bf16(load<Halves16>(from));
}

template <class T>
MIXTURA_INLINE float load_number(const T* from) {
    if constexpr (sizeof(T) == 4) return *from;
    else return from_bf16(*from);
}

// Scores of some neighbouring keys for some queries.
template <class T, int num_keys, int num_queries>
static void scores_of(const AttentionHead& a, std::int64_t query, std::int64_t key) {
    const T* keys = static_cast<const T*>(a.keys) + key * a.key_stride;
    const float* queries = a.queries + query * a.query_stride;
    Floats sums[num_queries][num_keys] = {};
    std::int64_t c = 0;
    for (; c + 16 <= a.width; c += 16) {
#pragma GCC unroll 8
        for (int j = 0; j < num_keys; ++j) {
            const Floats numbers = load_numbers(keys + j * a.key_stride + c);
#pragma GCC unroll 8
            for (int i = 0; i < num_queries; ++i) {
                sums[i][j] = multiply_add(numbers, load<Floats>(queries + i * a.query_stride + c), sums[i][j]);
            }
        }
    }
    for (int i = 0; i < num_queries; ++i) {
        float totals[num_keys];
        sums_of(sums[i], totals);
        for (int j = 0; j < num_keys; ++j) {
            for (std::int64_t d = c; d < a.width; ++d) {
                totals[j] += load_number(keys + j * a.key_stride + d) * queries[i * a.query_stride + d];
            }
            a.scores[(query + i) * a.score_stride + key + j] = totals[j] * a.scaling;
        }
    }
}

template <class T, int num_queries>
static void all_scores(const AttentionHead& a, std::int64_t query) {
    std::int64_t key = 0;
    for (; key + 4 <= a.num_keys; key += 4) scores_of<T, 4, num_queries>(a, query, key);
    for (; key < a.num_keys; ++key) scores_of<T, 1, num_queries>(a, query, key);
}

// Turns a row of scores into weights; gives one over their sum, or 0 where nothing is seen.
static float weigh(float* scores, std::int64_t num, std::int64_t room) {
    float most = -__builtin_inff();
    for (std::int64_t i = 0; i < num; ++i) most = scores[i] > most || scores[i] != scores[i] ? scores[i] : most;
    if (most == -__builtin_inff()) {
        for (std::int64_t i = 0; i < room; ++i) scores[i] = 0.0f;
        return 0.0f;
    }
    for (std::int64_t i = num; i < room; ++i) scores[i] = -__builtin_inff();
    Floats sum = {};
    for (std::int64_t i = 0; i < room; i += 16) {
        const Floats weights = exponential(load<Floats>(scores + i) - most);
        store(scores + i, weights);
        sum += weights;
    }
    const Floats one[1] = {sum};
    float total[1];
    sums_of(one, total);
    return 1.0f / total[0];
}

// Values of 16 * num_vectors neighbouring numbers, weighted, for some queries.
template <class T, int num_vectors, int num_queries>
static void values_of(const AttentionHead& a, std::int64_t query, std::int64_t first, const float* shares) {
    Floats sums[num_queries][num_vectors] = {};
    const T* values = static_cast<const T*>(a.values) + first;
    const float* weights = a.scores + query * a.score_stride;
    for (std::int64_t key = 0; key < a.num_keys; ++key, values += a.value_stride) {
        Floats numbers[num_vectors];
#pragma GCC unroll 8
        for (int v = 0; v < num_vectors; ++v) numbers[v] = load_numbers(values + 16 * v);
#pragma GCC unroll 8
        for (int i = 0; i < num_queries; ++i) {
            const Floats weight = all(weights[i * a.score_stride + key]);
#pragma GCC unroll 8
            for (int v = 0; v < num_vectors; ++v) sums[i][v] = multiply_add(numbers[v], weight, sums[i][v]);
        }
    }
    for (int i = 0; i < num_queries; ++i) {
        for (int v = 0; v < num_vectors; ++v) {
            store(a.out + (query + i) * a.out_stride + first + 16 * v, sums[i][v] * shares[i]);
        }
    }
}

template <class T, int num_queries>
static void all_values(const AttentionHead& a, std::int64_t query, const float* shares) {
    std::int64_t c = 0;
    for (; c + 64 <= a.width; c += 64) values_of<T, 4, num_queries>(a, query, c, shares);
    for (; c + 16 <= a.width; c += 16) values_of<T, 1, num_queries>(a, query, c, shares);
    for (int i = 0; i < num_queries; ++i) {
        for (std::int64_t d = c; d < a.width; ++d) {
            float sum = 0.0f;
            for (std::int64_t key = 0; key < a.num_keys; ++key) {
                sum += a.scores[(query + i) * a.score_stride + key] *
                       load_number(static_cast<const T*>(a.values) + key * a.value_stride + d);
            }
            a.out[(query + i) * a.out_stride + d] = sum * shares[i];
        }
    }
}

template <class T>
static void attend_numbers(const AttentionHead& a) {
    std::int64_t query = 0;
    for (; query + 4 <= a.num_queries; query += 4) all_scores<T, 4>(a, query);
    for (; query < a.num_queries; ++query) all_scores<T, 1>(a, query);
    if (a.biases != nullptr) {
        for (std::int64_t i = 0; i < a.num_queries; ++i) {
            const float* bias = a.biases + i % a.num_biases * a.num_keys;
            for (std::int64_t key = 0; key < a.num_keys; ++key) a.scores[i * a.score_stride + key] += bias[key];
        }
    }
    float shares[4];
    for (query = 0; query + 4 <= a.num_queries; query += 4) {
        for (int i = 0; i < 4; ++i) {
            shares[i] = weigh(a.scores + (query + i) * a.score_stride, a.num_keys, a.score_stride);
        }
        all_values<T, 4>(a, query, shares);
    }
    for (; query < a.num_queries; ++query) {
        shares[0] = weigh(a.scores + query * a.score_stride, a.num_keys, a.score_stride);
        all_values<T, 1>(a, query, shares);
    }
}

static void attend(const AttentionHead& a) {
    if (a.is_bf16) attend_numbers<std::uint16_t>(a);
    else attend_numbers<float>(a);
}

// to = from / rms(from) times (weight + offset), rounded to bfloat16 where it is wanted: before the weight and after.
static void normalize(const float* from, const float* weight, std::int64_t num, const NormWay& way, float* to) {
    Floats sums = {};
    std::int64_t i = 0;
    for (; i + 16 <= num; i += 16) {
        const Floats x = load<Floats>(from + i);
        sums += x * x;
    }
    const Floats one[1] = {sums};
    float total[1];
    sums_of(one, total);
    for (std::int64_t d = i; d < num; ++d) total[0] += from[d] * from[d];
    const float factor = 1.0f / std::sqrt(total[0] / static_cast<float>(num) + way.epsilon);
    const auto round = [](Floats x) {
        const Words bits = same_bits<Words>(x);
        const Words up = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
        return x != x ? x : same_bits<Floats>(up);
    };
    i = 0;
    for (; i < num; i += 16) {
        const auto bytes = static_cast<std::size_t>(num - i < 16 ? num - i : 16) * sizeof(float);
        Floats x = {}, w = {};
        std::memcpy(&x, from + i, bytes);
        std::memcpy(&w, weight + i, bytes);
        x = x * factor;
        if (way.rounds_before) x = round(x);
        x = x * (w + way.offset);
        if (way.rounds_after) x = round(x);
        std::memcpy(to + i, &x, bytes);
    }
}

}  // namespace mixtura::MIXTURA_ISA
