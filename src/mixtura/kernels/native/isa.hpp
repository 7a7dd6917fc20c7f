// The kernels of one instruction set, beside float32 inputs, and what lies between an expert's matrices.
#pragma once

#include <cstdlib>

#include "attend.hpp"
#include "dot.hpp"
#include "nested.hpp"
#include "trellis.hpp"
#include "trellis_search.hpp"

namespace mixtura::MIXTURA_ISA {

// Room for one row of weights as float32, one for each thread.
MIXTURA_INLINE float* room_for_row(std::int64_t cols) {
    static thread_local float* room = nullptr;
    static thread_local std::int64_t size = 0;
    if (cols > size) {
        std::free(room);
        room = static_cast<float*>(std::malloc(static_cast<std::size_t>(cols) * sizeof(float)));
        if (room == nullptr) std::abort();
        size = cols;
    }
    return room;
}

// Codes of which a byte holds several, the first in its lowest bits.
template <int bits>
struct PackedCodes {
    MIXTURA_INLINE float level(const Matrix& m, std::int64_t row, std::int64_t c) {
        constexpr int per_byte = 8 / bits;
        const int code = m.data[row * m.row_bytes + c / per_byte] >> (c % per_byte * bits) & ((1 << bits) - 1);
        return static_cast<float>(code) - ((1 << bits) - 1) / 2.0f;
    }
};

// Groups that no lane holds whole: each row is decoded first.
template <class Codes>
static void dot_decoded(const Matrix& m, std::int64_t first, std::int64_t count, const unsigned char* const* x,
                        std::int64_t num, float* out, std::int64_t out_stride, const Later&) {
    float* row = room_for_row(m.cols);
    Matrix decoded;
    decoded.data = reinterpret_cast<const unsigned char*>(row);
    decoded.cols = m.cols;
    decoded.row_bytes = m.cols * static_cast<std::int64_t>(sizeof(float));
    for (std::int64_t r = 0; r < count; ++r) {
        const std::uint16_t* scales = m.scales + (first + r) * m.row_scales;
        for (std::int64_t c = 0; c < m.cols; ++c) {
            row[c] = Codes::level(m, first + r, c) * from_bf16(scales[c / m.group]);
        }
        for (std::int64_t i = 0; i < num; ++i) {
            all_rows<FloatInputs<DecodeF32>, Scaled::never, 1, 1>(decoded, 0, 1, x + i, out + i * out_stride + r, 1,
                                                                  {0, 1, 1}, {});
        }
    }
}

template <class T>
MIXTURA_INLINE Floats load_weights(const unsigned char* from) {
    if constexpr (sizeof(T) == 4) return load<Floats>(from);
    else return widen_bf16(load<Halves16>(from));
}

template <class T>
MIXTURA_INLINE float load_weight(const unsigned char* from) {
    if constexpr (sizeof(T) == 4) return load<float>(from);
    else return from_bf16(load<std::uint16_t>(from));
}

// A strip of 16 * width outputs of a matrix stored as [inputs, outputs].
template <class T, int width, int num_inputs>
static void strip(const Matrix& m, std::int64_t first, const unsigned char* const* x, float* out,
                  std::int64_t out_stride) {
    Floats sums[width][num_inputs] = {};
    const unsigned char* w = m.data + first * static_cast<std::int64_t>(sizeof(T));
    constexpr std::int64_t ahead = 8;
    for (std::int64_t c = 0; c < m.cols; ++c, w += m.row_bytes) {
        if (c + ahead < m.cols) {
            _Pragma("GCC unroll 4") for (int v = 0; v < width; ++v) {
                __builtin_prefetch(w + ahead * m.row_bytes + v * 16 * static_cast<int>(sizeof(T)), 0, 3);
            }
        }
        Floats weights[width];
        _Pragma("GCC unroll 4") for (int v = 0; v < width; ++v) {
            weights[v] = load_weights<T>(w + v * 16 * static_cast<int>(sizeof(T)));
        }
        _Pragma("GCC unroll 4") for (int i = 0; i < num_inputs; ++i) {
            const Floats input = all(load<float>(x[i] + c * static_cast<std::int64_t>(sizeof(float))));
            _Pragma("GCC unroll 4") for (int v = 0; v < width; ++v) {
                sums[v][i] = multiply_add(weights[v], input, sums[v][i]);
            }
        }
    }
    for (int i = 0; i < num_inputs; ++i) {
        for (int v = 0; v < width; ++v) store(out + i * out_stride + 16 * v, sums[v][i]);
    }
}

template <class T, int num_inputs>
static void strips(const Matrix& m, std::int64_t first, std::int64_t count, const unsigned char* const* x,
                   float* out, std::int64_t out_stride) {
    std::int64_t r = 0;
    for (; r + 64 <= count; r += 64) strip<T, 4, num_inputs>(m, first + r, x, out + r, out_stride);
    for (; r + 16 <= count; r += 16) strip<T, 1, num_inputs>(m, first + r, x, out + r, out_stride);
    for (; r < count; ++r) {
        for (int i = 0; i < num_inputs; ++i) {
            float total = 0.0f;
            const unsigned char* w = m.data + (first + r) * static_cast<std::int64_t>(sizeof(T));
            for (std::int64_t c = 0; c < m.cols; ++c, w += m.row_bytes) {
                total += load_weight<T>(w) * load<float>(x[i] + c * static_cast<std::int64_t>(sizeof(float)));
            }
            out[i * out_stride + r] = total;
        }
    }
}

template <class T>
static void dot_transposed(const Matrix& m, std::int64_t first, std::int64_t count,
                           const unsigned char* const* x, std::int64_t num, float* out,
                           std::int64_t out_stride, const Later&) {
    std::int64_t i = 0;
    for (; i + 4 <= num; i += 4) strips<T, 4>(m, first, count, x + i, out + i * out_stride, out_stride);
    for (; i < num; ++i) strips<T, 1>(m, first, count, x + i, out + i * out_stride, out_stride);
}

using PlainInputs = FloatInputs<DecodeF32>;

template <class T>
inline constexpr Kernel transposed_kernel = {prepared_bytes<PlainInputs>, prepare<PlainInputs>, dot_transposed<T>};
template <class Codes>
inline constexpr Kernel decoded_kernel = {prepared_bytes<PlainInputs>, prepare<PlainInputs>, dot_decoded<Codes>};

template <class Inputs, class Strip>
inline constexpr Kernel trellis_kernel = {prepared_bytes<Inputs>, prepare<Inputs>, dot_trellis<Strip>};

template <class Codes>
const Kernel* or_decoded(const Kernel* found) {
    return found ? found : &decoded_kernel<Codes>;
}

static const Kernel* find_float(const Matrix& m) {
    switch (m.format) {
        case Format::f32:
            return m.transposed ? &transposed_kernel<float> : &kernel_of<PlainInputs, Scaled::never>;
        case Format::bf16:
            return m.transposed ? &transposed_kernel<std::uint16_t>
                                : &kernel_of<FloatInputs<DecodeBf16>, Scaled::never>;
        case Format::q8:
            if (m.group >= m.cols) return &kernel_of<FloatInputs<DecodeQ8>, Scaled::by_row>;
            return &decoded_kernel<PackedCodes<8>>;
        case Format::q4: return or_decoded<PackedCodes<4>>(find_grouped<FloatInputs<DecodeBits<4>>>(m));
        case Format::q2: return or_decoded<PackedCodes<2>>(find_grouped<FloatInputs<DecodeBits<2>>>(m));
        case Format::n8: return or_decoded<NestedCodes<8>>(find_by_block<FloatInputs<DecodeNested<8>>>(m));
        case Format::n4: return or_decoded<NestedCodes<4>>(find_by_block<FloatInputs<DecodeNested<4>>>(m));
        case Format::trellis: return &trellis_kernel<PlainInputs, StripOfFloats>;
    }
    return nullptr;
}

MIXTURA_INLINE Floats curve(const Activation& a, Floats x) {
    switch (a.curve) {
        case Curve::none: return x;
        case Curve::silu: return x / (exponential(x * -a.slope) + 1.0f);
        case Curve::relu: return x <= 0.0f ? Floats{} : x;
        case Curve::relu_squared: {
            const Floats positive = x <= 0.0f ? Floats{} : x;
            return positive * positive;
        }
        case Curve::gelu_tanh: {
            // 0.5 (1 + tanh u) is the logistic function of 2 u.
            const Floats u = x * 1.5957691216f + x * x * x * 0.0713548162726f;
            return x / (exponential(-u) + 1.0f);
        }
        case Curve::gelu: {
            for (int l = 0; l < 16; ++l) x[l] = 0.5f * x[l] * (1.0f + __builtin_erff(x[l] * 0.70710678118f));
            return x;
        }
    }
    return x;
}

MIXTURA_INLINE Floats activate_block(const Activation& a, Floats gate, Floats up) {
    if (!a.gated) return curve(a, gate);
    if (a.limit > 0.0f) {
        const Floats most = all(a.limit), least = all(-a.limit);
        gate = gate > most ? most : gate;
        up = up > most ? most : up;
        up = up < least ? least : up;
    }
    return curve(a, gate) * (up + a.offset);
}

static void activate(const Activation& a, float* gate, const float* up, std::int64_t num) {
    std::int64_t i = 0;
    for (; i + 16 <= num; i += 16) {
        const Floats other = a.gated ? load<Floats>(up + i) : Floats{};
        store(gate + i, activate_block(a, load<Floats>(gate + i), other));
    }
    if (i < num) {
        Floats first = {}, second = {};
        const std::size_t bytes = static_cast<std::size_t>(num - i) * sizeof(float);
        std::memcpy(&first, gate + i, bytes);
        if (a.gated) std::memcpy(&second, up + i, bytes);
        first = activate_block(a, first, second);
        std::memcpy(gate + i, &first, bytes);
    }
}

}  // namespace mixtura::MIXTURA_ISA
