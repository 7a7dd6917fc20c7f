// Finds the codes of a trellis (`trellis.hpp`) for weights: of all paths through the windows the one of least squared
// error, for 16 strips at a time, and hands on what is left of each column to those that come after.
#pragma once

#include "trellis.hpp"

namespace mixtura::MIXTURA_ISA {

inline constexpr int num_windows = 256, lanes = 16;
// Weights on either side of where the ring is closed that are looked at to choose the window there.
inline constexpr int seam = 8;

class PathSearch {
public:
    PathSearch(int rate, const std::int8_t* table) : rate_(rate) {
        for (int w = 0; w < num_windows; ++w) levels_[w] = static_cast<float>(table[w]);
    }

    // Windows of 64 rows; weights and scales are [64][16], a lane for each strip.
    void find(const Floats* weights, const Floats* scales, std::uint8_t (&windows)[strip_rows][lanes]) {
        // The ring closes where the best path over its two ends, free on both sides, passes.
        Floats seam_weights[2 * seam], seam_scales[2 * seam];
        for (int i = 0; i < 2 * seam; ++i) {
            const int row = (strip_rows - seam + i) % strip_rows;
            seam_weights[i] = weights[row];
            seam_scales[i] = scales[row];
        }
        for (auto& cost : costs_) cost = Floats{};
        for (int i = 0; i < 2 * seam; ++i) {
            step((strip_rows - seam + i) % strip_rows, i, seam_weights[i], seam_scales[i]);
        }
        std::uint8_t closing[lanes];
        for (int lane = 0; lane < lanes; ++lane) {
            int window = cheapest(lane);
            for (int i = 2 * seam - 1; i >= seam; --i) {
                window = before(window, (strip_rows - seam + i) % strip_rows, i, lane);
            }
            closing[lane] = static_cast<std::uint8_t>(window);
        }
        for (int w = 0; w < num_windows; ++w) {
            for (int lane = 0; lane < lanes; ++lane) costs_[w][lane] = closing[lane] == w ? 0.0f : forbidden;
        }
        for (int row = 0; row < strip_rows; ++row) step(row, row, weights[row], scales[row]);
        for (int lane = 0; lane < lanes; ++lane) {
            int window = closing[lane];
            for (int row = strip_rows - 1; row >= 0; --row) {
                windows[row][lane] = static_cast<std::uint8_t>(window);
                window = before(window, row, row, lane);
            }
        }
    }

    int new_bits(int row) const { return (row + 1) * rate_ / 8 - row * rate_ / 8; }
    float level(int window) const { return levels_[window]; }

private:
    static constexpr float forbidden = 1e30f;

    void step(int row, int place, Floats weight, Floats scale) {
        switch (new_bits(row)) {
            case 1: return step_of<1>(place, weight, scale);
            case 2: return step_of<2>(place, weight, scale);
            case 3: return step_of<3>(place, weight, scale);
            case 4: return step_of<4>(place, weight, scale);
            case 5: return step_of<5>(place, weight, scale);
            default: return step_of<6>(place, weight, scale);
        }
    }

    // Windows that end in the same bits go on in the same ways: the cheapest of them does.
    template <int bits>
    void step_of(int place, Floats weight, Floats scale) {
        constexpr int ends = num_windows >> bits, ways = 1 << bits;
        Floats least[ends];
        for (int end = 0; end < ends; ++end) {
            const Floats* from = costs_ + end * ways;
            Floats best = from[0];
            Ints way = {};
            for (int w = 1; w < ways; ++w) {
                const Ints is_less = from[w] < best;
                best = is_less ? from[w] : best;
                way = is_less ? Ints{} + w : way;
            }
            least[end] = best;
            const auto small = __builtin_convertvector(way, Bytes16);
            std::memcpy(ways_[place][end], &small, sizeof small);
        }
        for (int added = 0; added < ways; ++added) {
            for (int end = 0; end < ends; ++end) {
                const int window = added * ends + end;
                const Floats off = weight - scale * levels_[window];
                costs_[window] = multiply_add(off, off, least[end]);
            }
        }
    }

    int cheapest(int lane) const {
        int best = 0;
        for (int w = 1; w < num_windows; ++w) {
            if (costs_[w][lane] < costs_[best][lane]) best = w;
        }
        return best;
    }

    // The window that the best path to `window` at a row comes from.
    int before(int window, int row, int place, int lane) const {
        const int bits = new_bits(row), end = window & ((num_windows >> bits) - 1);
        return end << bits | ways_[place][end][lane];
    }

    int rate_;
    float levels_[num_windows];
    Floats costs_[num_windows];
    std::uint8_t ways_[strip_rows][num_windows / 2][lanes];
};

// Bits of a column of one strip, from its windows.
static void write_chunk(const PathSearch& search, const std::uint8_t (&windows)[strip_rows][lanes], int lane, int rate,
                        std::uint8_t* to) {
    std::memset(to, 0, static_cast<std::size_t>(rate));
    for (int row = 0, at = 0; row < strip_rows; ++row) {
        const int bits = search.new_bits(row), added = windows[row][lane] >> (8 - bits);
        const unsigned both = static_cast<unsigned>(added) << at % 8;
        to[at / 8] = static_cast<std::uint8_t>(to[at / 8] | both);
        if (both >> 8) to[at / 8 + 1] = static_cast<std::uint8_t>(to[at / 8 + 1] | both >> 8);
        at += bits;
    }
}

static void search_trellis(const TrellisColumns& task) {
    PathSearch search(task.rate, task.table);
    const std::int64_t num_strips = task.rows / strip_rows;
    Floats weights[strip_rows], scales[strip_rows];
    std::uint8_t windows[strip_rows][lanes];
    for (std::int64_t c = 0; c < task.cols; ++c) {
        const float* column = task.weights + c * task.rows;
        const float* original = task.originals + c * task.rows;
        float* left = task.left + c * task.rows;
        const float* scale = task.scales + c * task.rows;
        const float* feedback = task.feedback + c * task.feedback_stride;
        for (std::int64_t first = 0; first < num_strips; first += lanes) {
            const int some = static_cast<int>(at_most(lanes, num_strips - first));
            for (int row = 0; row < strip_rows; ++row) {
                for (int lane = 0; lane < lanes; ++lane) {
                    const std::int64_t at = (first + (lane < some ? lane : 0)) * strip_rows + row;
                    weights[row][lane] = column[at];
                    scales[row][lane] = scale[at];
                }
            }
            search.find(weights, scales, windows);
            for (int lane = 0; lane < some; ++lane) {
                const std::int64_t strip = first + lane;
                write_chunk(search, windows, lane, task.rate, task.codes + (c * num_strips + strip) * task.rate);
                for (int row = 0; row < strip_rows; ++row) {
                    const std::int64_t at = strip * strip_rows + row;
                    left[at] = original[at] - search.level(windows[row][lane]) * scale[at];
                }
            }
        }
        for (std::int64_t later = c + 1; later < task.cols; ++later) {
            float* other = task.weights + later * task.rows;
            for (std::int64_t r = 0; r < task.rows; ++r) other[r] += feedback[later] * left[r];
        }
    }
}

}  // namespace mixtura::MIXTURA_ISA
