#include <algorithm>
#include <cmath>
#include <limits>
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

// Numbers as the model's are kept: rounded, or as they are.
struct Rounding {
    bool is_bf16;
    float operator()(float value) const { return is_bf16 ? rounded_to_bf16(value) : value; }
};

// A token's logits as they are steered.
void steer(const Steered& steered, std::int64_t token, Rounding rounded, std::vector<float>& logits) {
    const auto num = static_cast<std::int64_t>(logits.size()), first = token * num;
    if (steered.logits) {
        for (std::int64_t e = 0; e < num; ++e) {
            logits[static_cast<std::size_t>(e)] = rounded(logits[static_cast<std::size_t>(e)] + rounded(steered.logits[first + e]));
        }
    }
    if (steered.spread) {
        double sum = 0.0, squares = 0.0;
        for (const float value : logits) sum += value;
        for (const float value : logits) squares += (value - sum / num) * (value - sum / num);
        const auto deviation = static_cast<float>(std::sqrt(squares / num));
        for (std::int64_t e = 0; e < num; ++e) {
            float& value = logits[static_cast<std::size_t>(e)];
            // Where nothing is added, masked logits, whose deviation is no number, stay as they are.
            if (const float times = steered.spread[first + e]; times != 0.0f) value = rounded(value + rounded(deviation * times));
        }
    }
    if (steered.highest) {
        const float top = *std::max_element(logits.begin(), logits.end());
        const float epsilon = rounded.is_bf16 ? 0x1p-7f : std::numeric_limits<float>::epsilon();
        const float above = rounded(top + rounded(rounded(std::max(std::fabs(top), 1.0f) * 2) * epsilon));
        for (std::int64_t e = 0; e < num; ++e) {
            if (steered.highest[first + e]) logits[static_cast<std::size_t>(e)] = above;
        }
    }
    if (steered.mixture && steered.share && steered.share[token] > 0) {
        const float share = steered.share[token];
        softmax(logits.data(), num);
        for (std::int64_t e = 0; e < num; ++e) {
            float& value = logits[static_cast<std::size_t>(e)];
            value = rounded(std::log((1 - share) * value + share * steered.mixture[first + e]));
        }
    }
}

float sum_of(const float* values, std::int64_t first, std::int64_t last) {
    float sum = 0.0f;
    for (std::int64_t i = first; i < last; ++i) sum += values[i];
    return sum;
}

// Leaves out some of a token's choices, and weighs the others otherwise.
void thin(const Steered& steered, std::int64_t token, std::int64_t places, bool normalizes, Rounding rounded,
          std::int64_t* ids, float* weights) {
    const float tiny = std::numeric_limits<float>::min();
    const std::int64_t absent = steered.num_experts;
    const std::int64_t first = steered.ranks ? std::min(steered.ranks[2 * token], places) : 0;
    const std::int64_t last = steered.ranks ? std::clamp(steered.ranks[2 * token + 1], first, places) : places;
    if (first > 0 || last < places) {
        const float whole = rounded(sum_of(weights, 0, places)), rest = rounded(sum_of(weights, first, last));
        const float grown = rounded(whole / std::max(rest, tiny));
        for (std::int64_t i = 0; i < places; ++i) {
            const bool stays = i >= first && i < last;
            weights[i] = !stays ? 0.0f : normalizes ? rounded(weights[i] * grown) : weights[i];
            if (!stays) ids[i] = absent;
        }
    }
    if (steered.least) {
        const float sum = std::max(rounded(sum_of(weights, 0, places)), tiny), least = rounded(steered.least[token]);
        for (std::int64_t i = 0; i < places; ++i) {
            if (rounded(weights[i] / sum) >= least) continue;
            weights[i] = 0.0f;
            ids[i] = absent;
        }
    }
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < places; ++i) {
        if (ids[i] == absent) continue;
        ++kept;
        if (steered.scale) weights[i] = rounded(weights[i] * rounded(steered.scale[token * absent + ids[i]]));
    }
    if (steered.kept) steered.kept[token] = kept;
}

// What a token's experts are compared by, beside their scores.
void steer_choice(const Steered& steered, std::int64_t token, std::vector<Scored>& scored) {
    for (Scored& one : scored) {
        const std::int64_t place = token * steered.num_experts + one.second;
        if (steered.bias) one.first += steered.bias[place];
        if (steered.allowed && !steered.allowed[place]) one.first = -std::numeric_limits<float>::infinity();
    }
}

}  // namespace

void choose(const Router& router, Number number, const float* logits, std::int64_t num, std::int64_t* ids,
            float* weights, const Steered* steered) {
    const std::int64_t num_experts = router.gate.matrix.rows, columns = steered ? steered->columns : router.top_k;
    std::vector<float> scores(static_cast<std::size_t>(num_experts));
    std::vector<Scored> scored(scores.size());
    const bool is_bf16 = number == Number::bf16;
    const Rounding logit = {is_bf16 && router.rounds_logits}, weight = {is_bf16 && router.rounds_weights};
    for (std::int64_t t = 0; t < num; ++t) {
        for (std::size_t e = 0; e < scores.size(); ++e) {
            scores[e] = logit(logits[t * num_experts + static_cast<std::int64_t>(e)]);
        }
        if (steered) steer(*steered, t, logit, scores);
        if (router.scores == Scores::softmax_all) softmax(scores.data(), num_experts);
        if (router.scores == Scores::sigmoid) {
            for (float& score : scores) score = 1.0f / (1.0f + std::exp(-score));
        }
        for (std::size_t e = 0; e < scores.size(); ++e) {
            const auto expert = static_cast<std::int64_t>(e);
            scored[e] = {router.correction.data ? scores[e] + number_at(router.correction, 0, expert) : scores[e], expert};
        }
        if (steered) steer_choice(*steered, t, scored);
        const std::int64_t wanted = steered && steered->ranks ? std::min(steered->ranks[2 * t + 1], num_experts) : 0;
        const std::int64_t k = std::max(router.top_k, wanted);
        best_first(scored, k);
        float* chosen = weights + t * columns;
        std::int64_t* experts = ids + t * columns;
        for (std::int64_t i = 0; i < columns; ++i) {
            experts[i] = i < k ? scored[static_cast<std::size_t>(i)].second : num_experts;
            chosen[i] = i < k ? scores[static_cast<std::size_t>(experts[i])] : 0.0f;
        }
        if (router.scores == Scores::softmax_chosen) softmax(chosen, k);
        const float sum = sum_of(chosen, 0, k);
        for (std::int64_t i = 0; i < k; ++i) {
            if (router.normed) chosen[i] /= sum;
            chosen[i] = weight(chosen[i] * router.scale);
        }
        const bool normalizes = router.normed || router.scores == Scores::softmax_chosen;
        if (steered) thin(*steered, t, k, normalizes, weight, experts, chosen);
    }
}

}  // namespace mixtura
