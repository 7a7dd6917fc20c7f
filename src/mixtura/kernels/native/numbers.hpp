// Numbers of either kind in somebody else's rows, read and written as float32.
#pragma once

#include <algorithm>
#include <cstring>

#include "experts.hpp"

namespace mixtura {

inline float bf16_to_float(std::uint16_t half) {
    const std::uint32_t bits = std::uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Without a branch, so that loops over it become vectors.
inline std::uint16_t float_to_bf16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t quiet = (bits >> 16) | 0x40u;
    return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// The nearest bfloat16, as float32.
inline float rounded_to_bf16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    bits = (bits & 0x7fffffffu) > 0x7f800000u ? bits : rounded;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float number_at(const Rows& rows, std::int64_t row, std::int64_t at) {
    const std::int64_t place = row * rows.stride + at;
    return rows.number == Number::f32 ? static_cast<const float*>(rows.data)[place]
                                      : bf16_to_float(static_cast<const std::uint16_t*>(rows.data)[place]);
}

inline void read_row(const Rows& rows, std::int64_t row, std::int64_t num, float* to) {
    if (rows.number == Number::f32) {
        const float* from = static_cast<const float*>(rows.data) + row * rows.stride;
        std::copy(from, from + num, to);
    } else {
        const std::uint16_t* from = static_cast<const std::uint16_t*>(rows.data) + row * rows.stride;
        for (std::int64_t i = 0; i < num; ++i) to[i] = bf16_to_float(from[i]);
    }
}

inline void write_row(const Result& result, std::int64_t row, std::int64_t first, std::int64_t num, const float* from) {
    const std::int64_t place = row * result.stride + first;
    if (result.number == Number::f32) {
        std::copy(from, from + num, static_cast<float*>(result.data) + place);
    } else {
        std::uint16_t* to = static_cast<std::uint16_t*>(result.data) + place;
        for (std::int64_t i = 0; i < num; ++i) to[i] = float_to_bf16(from[i]);
    }
}

}  // namespace mixtura
