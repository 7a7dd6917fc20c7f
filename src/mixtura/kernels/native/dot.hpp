// Inner products of rows of weights with prepared inputs: tiles of a few rows by a few input vectors, whose
// sums stay in registers. Each sum is made in the same order whatever the tile.
#pragma once

#include "formats.hpp"
#include "matrix.hpp"

namespace mixtura::MIXTURA_ISA {

// Where scales change: at the end of a row, at a block's end, or from lane to lane within a block.
enum class Scaled { never, by_row, by_block, by_lane };

MIXTURA_INLINE std::int64_t at_most(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Planes that the bits of a weight are spread over, all laid out alike.
template <class F>
constexpr int planes_of() {
    if constexpr (requires { F::planes; }) return F::planes;
    else return 1;
}

// The same place in each plane.
template <class F>
struct Place {
    const unsigned char* in[planes_of<F>()];
};

template <class F>
MIXTURA_INLINE Place<F> place_of(const Matrix& m, std::int64_t at) {
    Place<F> place;
    place.in[0] = m.data + at;
    for (int p = 1; p < planes_of<F>(); ++p) place.in[p] = m.lower[p - 1] + at;
    return place;
}

template <class F>
MIXTURA_INLINE Place<F> later(Place<F> place, std::int64_t bytes) {
    for (auto& one : place.in) one += bytes;
    return place;
}

template <class F>
MIXTURA_INLINE typename F::Raw raw_at(const Place<F>& place, std::int64_t bytes) {
    if constexpr (planes_of<F>() == 1) return F::raw(place.in[0] + bytes);
    else return F::raw(place.in, bytes);
}

// Spreads the scales of a block's groups over its lanes.
template <int weights>
class LaneScales {
public:
    MIXTURA_INLINE LaneScales of(const Matrix& m) {
        LaneScales made;
        made.groups_ = static_cast<int>(weights / m.group);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        // Of every pair of halves the upper one is looked up and the lower one is zero: a float32.
        const __m512i index = _mm512_srli_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(made.groups_)), 4);
        made.index_ = _mm512_slli_epi32(index, 16);
#endif
        return made;
    }

    // `left` scales of the row begin at the block's first; lanes beyond them get 0.
    MIXTURA_INLINE Floats spread(const LaneScales& self, const std::uint16_t* scales, std::int64_t left) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
        const auto there = static_cast<__mmask32>((1u << at_most(self.groups_, left)) - 1);
        const __m512i halves = _mm512_maskz_loadu_epi16(there, scales);
        constexpr __mmask32 upper = 0xaaaaaaaau;
        return reinterpret_cast<Floats>(_mm512_maskz_permutexvar_epi16(upper, self.index_, halves));
#else
        float values[16];
        for (int lane = 0; lane < 16; ++lane) {
            const int at = lane * self.groups_ / 16;
            values[lane] = at < left ? from_bf16(scales[at]) : 0.0f;
        }
        return load<Floats>(values);
#endif
    }

    int groups_;

private:
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    __m512i index_;
#endif
};

inline constexpr std::int64_t bytes_ahead = 8 << 10;
inline constexpr int bytes_of_line = 64;

// Which of several readings of the same rows this is: each has other inputs. `rows` are those of its widest tiles.
struct Pass {
    std::int64_t number, passes;
    int rows;
};

// The rows of a later tile. The processor's own look-ahead stops at a page's end and does not know where the next
// matrix begins, and the next tile of narrow rows would come too soon for memory to answer.
template <class F>
struct Ahead {
    Place<F> place;
    const std::uint16_t* scales;
    std::int64_t row_scales;
    // From a tile's row to the next and to the one after that; 0 asks for the same row again.
    std::int64_t one_row, two_rows, scales_of_one, scales_of_two;

    // Of several passes each asks for a share of the rows, so that memory works while the later ones compute.
    template <int num_rows>
    MIXTURA_INLINE Ahead of(const Matrix& m, std::int64_t row, const Pass& pass) {
        std::int64_t one = 1, two = 2;
        if (pass.passes > 1 && pass.rows == 2) {
            // Tiles of four rows, for the last inputs, lie beside ones of two: every second row.
            one = num_rows == 4 ? 2 : 0, two = 0;
            row += at_most(pass.number, at_most(1, num_rows - 1));
        } else if (pass.passes > 1) {
            const bool by_twos = num_rows == 4 && pass.passes < 4;
            one = by_twos ? 1 : 0, two = 0;
            row += at_most(by_twos ? 2 * pass.number : pass.number, num_rows - 1);
        }
        return {place_of<F>(m, row * m.row_bytes), m.scales + row * m.row_scales, m.row_scales,
                one * m.row_bytes, two * m.row_bytes, one * m.row_scales, two * m.row_scales};
    }

    template <int num_rows>
    MIXTURA_INLINE void ask_for_scales(const Ahead& self) {
        constexpr std::int64_t per_line = 32;
        for (int r = 0; r < num_rows; ++r) {
            const std::uint16_t* row = self.scales + r % 2 * self.scales_of_one + r / 2 * self.scales_of_two;
            for (std::int64_t at = 0; at < self.row_scales; at += per_line) __builtin_prefetch(row + at, 0, 2);
        }
    }

    template <int num_rows>
    MIXTURA_INLINE void ask_for_block(const Ahead& self, std::int64_t block) {
        for (int r = 0; r < num_rows; ++r) {
            const std::int64_t row = r % 2 * self.one_row + r / 2 * self.two_rows;
            for (const unsigned char* plane : self.place.in) {
                for (int line = 0; line < F::block_bytes; line += bytes_of_line) {
                    __builtin_prefetch(plane + row + block * F::block_bytes + line, 0, 2);
                }
            }
        }
    }
};

template <class F, Scaled scaled, int num_rows, int num_inputs>
struct Tile {
    // Adds the products of one block of each row; `at` is where its inputs lie in every input vector.
    MIXTURA_INLINE void add(Floats (&sums)[num_rows][num_inputs], const Matrix& m, const Place<F>& w,
                            std::int64_t row_bytes, const std::uint16_t* scales, const LaneScales<F::weights>& lanes,
                            std::int64_t block, std::int64_t left, const unsigned char* const* x) {
        const std::size_t at = static_cast<std::size_t>(block) * F::block_inputs_bytes;
        constexpr bool has_scale = scaled == Scaled::by_block || scaled == Scaled::by_lane;
        constexpr bool goes_on = F::continues && !has_scale;
        typename F::Raw raw[num_rows];
        typename F::Sum block_sums[num_rows][num_inputs];
#pragma GCC unroll 8
        for (int r = 0; r < num_rows; ++r) {
            raw[r] = raw_at<F>(w, r * row_bytes);
#pragma GCC unroll 8
            for (int i = 0; i < num_inputs; ++i) {
                if constexpr (goes_on) block_sums[r][i] = sums[r][i];
                else block_sums[r][i] = F::start(x[i] + at);
            }
        }
        // Step by step over all sums: each waits for its own last step only.
#pragma GCC unroll 16
        for (int j = 0; j < F::steps; ++j) {
#pragma GCC unroll 8
            for (int r = 0; r < num_rows; ++r) {
                const auto vector = F::vector(raw[r], j);
#pragma GCC unroll 8
                for (int i = 0; i < num_inputs; ++i) {
                    block_sums[r][i] = F::add(block_sums[r][i], vector, x[i] + at, j);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < num_rows; ++r) {
            Floats scale;
            if constexpr (scaled == Scaled::by_block) {
                scale = all(from_bf16(scales[r * m.row_scales + block * F::weights / m.group]));
            }
            if constexpr (scaled == Scaled::by_lane) {
                scale = LaneScales<F::weights>::spread(lanes, scales + r * m.row_scales + block * lanes.groups_, left);
            }
#pragma GCC unroll 8
            for (int i = 0; i < num_inputs; ++i) {
                const Floats sum = F::finish(block_sums[r][i], x[i] + at);
                if constexpr (has_scale) sums[r][i] = multiply_add(sum, scale, sums[r][i]);
                else if constexpr (goes_on) sums[r][i] = sum;
                else sums[r][i] += sum;
            }
        }
    }

    static void run(const Matrix& m, std::int64_t first, const unsigned char* const* x, float* out,
                    std::int64_t out_stride, std::int64_t bytes, const Ahead<F>& ahead) {
        Floats sums[num_rows][num_inputs] = {};
        const Place<F> w = place_of<F>(m, first * m.row_bytes);
        const std::uint16_t* scales = m.scales + first * m.row_scales;
        const std::int64_t blocks = bytes / F::block_bytes, rest = bytes % F::block_bytes;
        LaneScales<F::weights> lanes;
        if constexpr (scaled == Scaled::by_lane) lanes = LaneScales<F::weights>::of(m);
        if constexpr (scaled != Scaled::never) Ahead<F>::template ask_for_scales<num_rows>(ahead);
        for (std::int64_t block = 0; block < blocks; ++block) {
            Ahead<F>::template ask_for_block<num_rows>(ahead, block);
            add(sums, m, later<F>(w, block * F::block_bytes), m.row_bytes, scales, lanes, block, 16, x);
        }
        if (rest > 0) {
            unsigned char last[planes_of<F>()][num_rows][F::block_bytes] = {};
            Place<F> ends;
            for (int p = 0; p < planes_of<F>(); ++p) {
                for (int r = 0; r < num_rows; ++r) {
                    std::memcpy(last[p][r], w.in[p] + r * m.row_bytes + blocks * F::block_bytes,
                                static_cast<std::size_t>(rest));
                }
                ends.in[p] = last[p][0];
            }
            const std::int64_t left = scaled == Scaled::by_lane ? m.row_scales - blocks * lanes.groups_ : 0;
            add(sums, m, ends, F::block_bytes, scales, lanes, blocks, left, x);
        }
        for (int i = 0; i < num_inputs; ++i) {
            Floats column[num_rows];
            for (int r = 0; r < num_rows; ++r) column[r] = sums[r][i];
            float totals[num_rows];
            sums_of(column, totals);
            for (int r = 0; r < num_rows; ++r) {
                if constexpr (scaled == Scaled::by_row) totals[r] *= from_bf16(scales[r * m.row_scales]);
                out[i * out_stride + r] = totals[r];
            }
        }
    }
};

// In one plane.
template <class F>
constexpr int bits_per_weight() {
    return F::block_bytes * 8 / F::weights;
}

template <class F, Scaled scaled, int num_rows, int num_inputs>
static void all_rows(const Matrix& m, std::int64_t first, std::int64_t count, const unsigned char* const* x,
                     float* out, std::int64_t out_stride, const Pass& pass, const Later& later) {
    const std::int64_t bytes = (m.cols * bits_per_weight<F>() + 7) / 8;
    const std::int64_t tile = num_rows * m.row_bytes, near = (bytes_ahead + tile - 1) / tile * num_rows;
    const std::int64_t rows_ahead = pass.passes > 1 ? count : near;
    const bool goes_on = later.matrix == nullptr || later.matrix->format != m.format;
    const auto ahead_of = [&](std::int64_t r) {
        if (goes_on || r + rows_ahead < count) {
            return Ahead<F>::template of<num_rows>(m, first + r + rows_ahead, pass);
        }
        return Ahead<F>::template of<num_rows>(*later.matrix, later.first + r + rows_ahead - count, pass);
    };
    std::int64_t r = 0;
    for (; r + num_rows <= count; r += num_rows) {
        Tile<F, scaled, num_rows, num_inputs>::run(m, first + r, x, out + r, out_stride, bytes, ahead_of(r));
    }
    for (; r < count; ++r) {
        Tile<F, scaled, 1, num_inputs>::run(m, first + r, x, out + r, out_stride, bytes, ahead_of(r));
    }
}

template <class F, Scaled scaled>
static void dot(const Matrix& m, std::int64_t first, std::int64_t count, const unsigned char* const* x,
                std::int64_t num, float* out, std::int64_t out_stride, const Later& later) {
    // Tiles that registers and the nearest cache hold: blocks with scales have a second sum each, and what is decoded
    // needs registers of its own. Wider ones decode less often, but were slower where timed (AVX-512 with bfloat16).
    constexpr bool sums_of_blocks = scaled == Scaled::by_block || scaled == Scaled::by_lane;
    constexpr int rows = sums_of_blocks ? 2 : 4, most = sums_of_blocks ? 3 : scaled == Scaled::never ? 6 : 4;
    Pass pass = {0, (num + most - 1) / most, rows};
    const auto some = [&]<int num_rows, int num_inputs>() {
        all_rows<F, scaled, num_rows, num_inputs>(m, first, count, x, out, out_stride, pass, later);
    };
    for (; pass.number < pass.passes; ++pass.number) {
        const std::int64_t now = (num + pass.passes - pass.number - 1) / (pass.passes - pass.number);
        if constexpr (most == 6) {
            if (now == 6) some.template operator()<rows, 6>();
            if (now == 5) some.template operator()<rows, 5>();
        }
        if constexpr (most >= 4) {
            if (now == 4) some.template operator()<rows, 4>();
        }
        if (now == 3) some.template operator()<rows, 3>();
        if (now == 2) some.template operator()<4, 2>();
        if (now == 1) some.template operator()<4, 1>();
        x += now, out += now * out_stride, num -= now;
    }
}

template <class F>
static std::size_t prepared_bytes(std::int64_t cols) {
    return static_cast<std::size_t>((cols + F::weights - 1) / F::weights) * F::block_inputs_bytes;
}

template <class F>
static void prepare(const float* x, std::int64_t cols, unsigned char* to) {
    for (std::int64_t at = 0; at < cols; at += F::weights, to += F::block_inputs_bytes) {
        F::prepare_block(x + at, cols - at, to);
    }
}

template <class F, Scaled scaled>
constexpr Kernel kernel_of = {prepared_bytes<F>, prepare<F>, dot<F, scaled>};

// As `find_grouped`, for formats whose tiles are long: a row that is one group is a block's scale, too.
template <class F>
const Kernel* find_by_block(const Matrix& m) {
    constexpr std::int64_t weights = F::weights, per_lane = weights / 16;
    if (m.group >= m.cols || m.group % weights == 0) return &kernel_of<F, Scaled::by_block>;
    if (weights % m.group == 0 && m.group % per_lane == 0) return &kernel_of<F, Scaled::by_lane>;
    return nullptr;
}

// The kernel of a format in groups of any size; null where groups and lanes do not fit each other.
template <class F>
const Kernel* find_grouped(const Matrix& m) {
    constexpr std::int64_t weights = F::weights, per_lane = weights / 16;
    if (m.group >= m.cols) return &kernel_of<F, Scaled::by_row>;
    if (m.group % weights == 0) return &kernel_of<F, Scaled::by_block>;
    if (weights % m.group == 0 && m.group % per_lane == 0) return &kernel_of<F, Scaled::by_lane>;
    return nullptr;
}

}  // namespace mixtura::MIXTURA_ISA
