// Codes of a trellis beside inputs of float32. A matrix lies in strips of 64 rows; of a strip each column has a
// chunk of `rate` bytes, a ring of bits in which every weight is a window of eight bits, that of the weight below
// it moved on by `rate` / 8 bits on average. A table of 256 levels turns windows into numbers.
#pragma once

#include "dot.hpp"

namespace mixtura::MIXTURA_ISA {

inline constexpr int strip_rows = 64, most_rate = 48;

// The levels of one column of a strip.
MIXTURA_INLINE void decode_chunk_plainly(const unsigned char* chunk, int rate, const std::int8_t* table,
                                         std::int8_t* to) {
    unsigned char ring[most_rate + 2];
    ring[0] = chunk[rate - 1];
    std::memcpy(ring + 1, chunk, static_cast<std::size_t>(rate));
    ring[rate + 1] = 0;
    for (int row = 0; row < strip_rows; ++row) {
        const int at = (row + 1) * rate / 8;
        const unsigned both = ring[at / 8] | static_cast<unsigned>(ring[at / 8 + 1]) << 8;
        to[row] = table[both >> at % 8 & 255];
    }
}

#if defined(__AVX512VBMI__)

// Which bytes of a chunk each eight weights lie in, and where in these each window begins.
struct alignas(64) WindowPlaces {
    std::uint8_t bytes[64], shifts[64];
};

constexpr WindowPlaces window_places(int rate) {
    WindowPlaces made{};
    for (int eight = 0; eight < 8; ++eight) {
        for (int i = 0; i < 8; ++i) {
            const int byte = eight * rate / 8 + i - 1;
            made.bytes[8 * eight + i] = static_cast<std::uint8_t>(byte < 0 ? rate - 1 : byte & 63);
            made.shifts[8 * eight + i] = static_cast<std::uint8_t>(eight * rate % 8 + (i + 1) * rate / 8);
        }
    }
    return made;
}

struct AllWindowPlaces {
    WindowPlaces of[most_rate + 1];
};

inline constexpr AllWindowPlaces all_window_places = [] {
    AllWindowPlaces made{};
    for (int rate = 8; rate <= most_rate; ++rate) made.of[rate] = window_places(rate);
    return made;
}();

// Finds the windows of a column's weights, a byte each.
class Windows {
public:
    explicit Windows(int rate)
        : there_((std::uint64_t{1} << rate) - 1),
          bytes_(_mm512_load_si512(all_window_places.of[rate].bytes)),
          shifts_(_mm512_load_si512(all_window_places.of[rate].shifts)) {}

    __attribute__((always_inline)) __m512i of(const unsigned char* chunk) const {
        const __m512i ring = _mm512_maskz_loadu_epi8(there_, chunk);
        return _mm512_multishift_epi64_epi8(shifts_, _mm512_permutexvar_epi8(bytes_, ring));
    }

private:
    __mmask64 there_;
    __m512i bytes_, shifts_;
};

// A table of 256 bytes in registers.
class ByteTable {
public:
    explicit ByteTable(const void* table) {
        for (int q = 0; q < 4; ++q) quarters_[q] = _mm512_loadu_si512(static_cast<const char*>(table) + 64 * q);
    }

    __attribute__((always_inline)) __m512i at(__m512i index, __mmask64 is_upper) const {
        const __m512i lower = _mm512_permutex2var_epi8(quarters_[0], index, quarters_[1]);
        const __m512i upper = _mm512_permutex2var_epi8(quarters_[2], index, quarters_[3]);
        return _mm512_mask_blend_epi8(is_upper, lower, upper);
    }
    __attribute__((always_inline)) __m512i at(__m512i index) const {
        return at(index, _mm512_movepi8_mask(index));
    }

private:
    __m512i quarters_[4];
};

#endif

// Decodes columns of one matrix.
class ChunkReader {
public:
    explicit ChunkReader(const Matrix& m)
        : rate_(m.rate),
          table_(m.table)
#if defined(__AVX512VBMI__)
          ,
          windows_(m.rate),
          levels_(m.table)
#endif
    {
    }

    __attribute__((always_inline)) void read(const unsigned char* chunk, std::int8_t* to) const {
#if defined(__AVX512VBMI__)
        _mm512_store_si512(to, levels_.at(windows_.of(chunk)));
        static_cast<void>(rate_), static_cast<void>(table_);
#else
        decode_chunk_plainly(chunk, rate_, table_, to);
#endif
    }

private:
    int rate_;
    const std::int8_t* table_;
#if defined(__AVX512VBMI__)
    Windows windows_;
    ByteTable levels_;
#endif
};

MIXTURA_INLINE Floats widen_levels(const std::int8_t* from) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from))));
#else
    using SignedBytes16 = std::int8_t __attribute__((vector_size(16)));
    return __builtin_convertvector(load<SignedBytes16>(from), Floats);
#endif
}

inline constexpr int vectors_of_strip = strip_rows / 16;

// The products of a strip's rows with float32 inputs.
struct StripOfFloats {
    template <int num_inputs>
    static void run(const Matrix& m, std::int64_t strip, const unsigned char* const* x,
                    float (&rows)[num_inputs][strip_rows]) {
        const ChunkReader reader(m);
        const unsigned char* chunk = m.data + strip * m.row_bytes;
        const std::uint16_t* scales = m.scales + strip * m.row_scales;
        Floats sums[vectors_of_strip][num_inputs] = {};
        alignas(64) std::int8_t levels[strip_rows];
        for (std::int64_t first = 0; first < m.cols; first += m.group, scales += strip_rows) {
            const std::int64_t end = at_most(first + m.group, m.cols);
            Floats group[vectors_of_strip][num_inputs] = {};
            for (std::int64_t c = first; c < end; ++c, chunk += m.rate) {
                __builtin_prefetch(chunk + bytes_ahead, 0, 2);
                reader.read(chunk, levels);
                for (int i = 0; i < num_inputs; ++i) {
                    const Floats input = all(load<float>(x[i] + c * static_cast<std::int64_t>(sizeof(float))));
                    for (int v = 0; v < vectors_of_strip; ++v) {
                        group[v][i] = multiply_add(widen_levels(levels + 16 * v), input, group[v][i]);
                    }
                }
            }
            for (int v = 0; v < vectors_of_strip; ++v) {
                const Floats scale = widen_bf16(load<Halves16>(scales + 16 * v));
                for (int i = 0; i < num_inputs; ++i) sums[v][i] = multiply_add(group[v][i], scale, sums[v][i]);
            }
        }
        for (int i = 0; i < num_inputs; ++i) {
            for (int v = 0; v < vectors_of_strip; ++v) store(rows[i] + 16 * v, sums[v][i]);
        }
    }
};

// A strip's weights as numbers, row by row in `to`, which takes all 64 of them.
static void decode_strip(const Matrix& m, std::int64_t strip, float* to) {
    constexpr std::int64_t some = 16;
    const ChunkReader reader(m);
    const unsigned char* chunk = m.data + strip * m.row_bytes;
    const std::uint16_t* scales = m.scales + strip * m.row_scales;
    alignas(64) std::int8_t levels[strip_rows];
    alignas(64) float numbers[some][strip_rows];
    std::int64_t group_end = m.group;
    for (std::int64_t first = 0; first < m.cols; first += some) {
        const std::int64_t num = at_most(some, m.cols - first);
        for (std::int64_t c = 0; c < num; ++c, chunk += m.rate) {
            if (first + c == group_end) group_end += m.group, scales += strip_rows;
            reader.read(chunk, levels);
            for (int v = 0; v < vectors_of_strip; ++v) {
                const Floats scale = widen_bf16(load<Halves16>(scales + 16 * v));
                store(numbers[c] + 16 * v, widen_levels(levels + 16 * v) * scale);
            }
        }
        for (std::int64_t row = 0; row < strip_rows; ++row) {
            float* out = to + row * m.cols + first;
            for (std::int64_t c = 0; c < num; ++c) out[c] = numbers[c][row];
        }
    }
}

template <class Strip, int num_inputs>
static void strips_of_trellis(const Matrix& m, std::int64_t first, std::int64_t count,
                              const unsigned char* const* x, float* out, std::int64_t out_stride) {
    for (std::int64_t strip = first / strip_rows; strip * strip_rows < first + count; ++strip) {
        float rows[num_inputs][strip_rows];
        Strip::run(m, strip, x, rows);
        // A piece of work may begin and end within a strip.
        const std::int64_t begin = strip * strip_rows < first ? first - strip * strip_rows : 0;
        const std::int64_t end = at_most(strip_rows, first + count - strip * strip_rows);
        for (int i = 0; i < num_inputs; ++i) {
            std::memcpy(out + i * out_stride + strip * strip_rows + begin - first, rows[i] + begin,
                        static_cast<std::size_t>(end - begin) * sizeof(float));
        }
    }
}

template <class Strip>
static void dot_trellis(const Matrix& m, std::int64_t first, std::int64_t count, const unsigned char* const* x,
                        std::int64_t num, float* out, std::int64_t out_stride, const Later&) {
    std::int64_t i = 0;
    for (; i + 4 <= num; i += 4) {
        strips_of_trellis<Strip, 4>(m, first, count, x + i, out + i * out_stride, out_stride);
    }
    for (; i < num; ++i) strips_of_trellis<Strip, 1>(m, first, count, x + i, out + i * out_stride, out_stride);
}

}  // namespace mixtura::MIXTURA_ISA
