// Nested codes: the 2-bit code of a weight is the upper half of its 4-bit code, and that of its 8-bit code.
//
// The upper two bits, the two below and the lower four lie apart, so that reading fewer bits reads fewer
// bytes: in planes with two bits for each weight, the lower four in one plane of even columns and one of odd.
#pragma once

#include "formats.hpp"
#include "matrix.hpp"

namespace mixtura::MIXTURA_ISA {

constexpr int nested_planes(int bits) { return bits / 2; }

MIXTURA_INLINE Words all_words(std::uint32_t value) { return value - Words{}; }

// 256 weights, upper and lower four bits apart: weight 8 n + 2 k + p of 8 is nibble k of 16 bits of word vector p.
template <int bits>
struct NestedWords {
    Words upper[2], lower[2];
};
template <>
struct NestedWords<4> {
    Words upper[2];
};

template <int bits>
MIXTURA_INLINE NestedWords<bits> nested_words(const unsigned char* const* planes, std::int64_t at) {
    const Words first = load<Words>(planes[0] + at), second = load<Words>(planes[1] + at);
    const Words even = all_words(0x33333333u);
    NestedWords<bits> made;
    made.upper[0] = ((first & even) << 2) | (second & even);
    made.upper[1] = (first & ~even) | (second >> 2 & even);
    if constexpr (bits == 8) {
        for (int p = 0; p < 2; ++p) made.lower[p] = load<Words>(planes[2 + p] + at);
    }
    return made;
}

// Decodes as the formats of `formats.hpp`, from several planes.
template <int bits>
struct DecodeNested {
    static constexpr int planes = nested_planes(bits), steps = 16, block_bytes = 64, weights = 16 * steps;
    using Raw = NestedWords<bits>;
    using Vector = Floats;
    static constexpr int place(int j, int l) { return l * steps + j; }

    MIXTURA_INLINE Raw raw(const unsigned char* const* planes, std::int64_t at) {
        return nested_words<bits>(planes, at);
    }
    MIXTURA_INLINE Vector vector(const Raw& raw, int j) {
        const Floats upper = DecodeBits<4>::vector(raw.upper[j % 2], j / 2);
        if constexpr (bits == 4) return upper;
        else return multiply_add(upper, all(16.0f), DecodeBits<4>::vector(raw.lower[j % 2], j / 2));
    }
};

// One weight at a time.
template <int bits>
struct NestedCodes {
    MIXTURA_INLINE float level(const Matrix& m, std::int64_t row, std::int64_t c) {
        const std::int64_t at = row * m.row_bytes + c / 4;
        const int shift = static_cast<int>(c % 4) * 2;
        int code = (m.data[at] >> shift & 3) << 2 | (m.lower[0][at] >> shift & 3);
        if constexpr (bits == 8) code = code << 4 | (m.lower[1 + c % 2][at] >> (c % 4 / 2 * 4) & 15);
        return static_cast<float>(code) - ((1 << bits) - 1) / 2.0f;
    }
};

}  // namespace mixtura::MIXTURA_ISA
