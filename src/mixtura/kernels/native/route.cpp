#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "numbers.hpp"
#include "step.hpp"

namespace mixtura {
namespace {

using Scored = std::pair<float, std::int64_t>;

// The algorithm of torch.topk, so that scores that are equal (bfloat16 logits often are) fall out as there.
void best_first(std::vector<Scored>& scored, std::int64_t k) {
    const auto before = [](const Scored& a, const Scored& b) {
        return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
    };
    const auto end = scored.begin() + k;
    if (k * 64 <= static_cast<std::int64_t>(scored.size())) {
        std::partial_sort(scored.begin(), end, scored.end(), before);
    } else {
        std::nth_element(scored.begin(), end - 1, scored.end(), before);
        std::sort(scored.begin(), end - 1, before);
    }
}

void softmax(float* values, std::int64_t num) {
    float most = values[0];
    for (std::int64_t i = 1; i < num; ++i) most = std::max(most, values[i]);
    float sum = 0.0f;
    for (std::int64_t i = 0; i < num; ++i) sum += values[i] = std::exp(values[i] - most);
    for (std::int64_t i = 0; i < num; ++i) values[i] /= sum;
}

}  // namespace

void choose(const Router& router, Number number, const float* logits, std::int64_t num, std::int64_t* ids,
            float* weights) {
    const std::int64_t num_experts = router.gate.matrix.rows, k = router.top_k;
    std::vector<float> scores(static_cast<std::size_t>(num_experts));
    std::vector<Scored> scored(scores.size());
    const auto rounded = [&](float value, bool rounds) {
        return rounds && number == Number::bf16 ? bf16_to_float(float_to_bf16(value)) : value;
    };
    for (std::int64_t t = 0; t < num; ++t) {
        for (std::size_t e = 0; e < scores.size(); ++e) {
            scores[e] = rounded(logits[t * num_experts + static_cast<std::int64_t>(e)], router.rounds_logits);
        }
        if (router.scores == Scores::softmax_all) softmax(scores.data(), num_experts);
        if (router.scores == Scores::sigmoid) {
            for (float& score : scores) score = 1.0f / (1.0f + std::exp(-score));
        }
        for (std::size_t e = 0; e < scores.size(); ++e) {
            const auto expert = static_cast<std::int64_t>(e);
            scored[e] = {router.correction.data ? scores[e] + number_at(router.correction, 0, expert) : scores[e], expert};
        }
        best_first(scored, k);
        float* chosen = weights + t * k;
        for (std::int64_t i = 0; i < k; ++i) {
            ids[t * k + i] = scored[static_cast<std::size_t>(i)].second;
            chosen[i] = scores[static_cast<std::size_t>(ids[t * k + i])];
        }
        if (router.scores == Scores::softmax_chosen) softmax(chosen, k);
        float sum = 0.0f;
        for (std::int64_t i = 0; i < k; ++i) sum += chosen[i];
        for (std::int64_t i = 0; i < k; ++i) {
            if (router.normed) chosen[i] /= sum;
            chosen[i] = rounded(chosen[i] * router.scale, router.rounds_weights);
        }
    }
}

}  // namespace mixtura
