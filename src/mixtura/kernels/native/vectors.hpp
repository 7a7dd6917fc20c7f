// Vectors of 16 numbers by the compiler's own vector types: one register of AVX-512, two of AVX2, four of
// SSE2 and NEON. Included by the file of each instruction set, within its namespace: nothing here may be
// shared between them, or the linker could pick one set's code for another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mixtura::MIXTURA_ISA {

#define MIXTURA_INLINE static inline __attribute__((always_inline))

using Floats = float __attribute__((vector_size(64)));
using Words = std::uint32_t __attribute__((vector_size(64)));
using Ints = std::int32_t __attribute__((vector_size(64)));
using Bytes16 = std::uint8_t __attribute__((vector_size(16)));
using Halves16 = std::uint16_t __attribute__((vector_size(32)));

template <class T>
MIXTURA_INLINE T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class T>
MIXTURA_INLINE void store(void* to, const T& value) {
    std::memcpy(to, &value, sizeof value);
}

template <class To, class From>
MIXTURA_INLINE To same_bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

MIXTURA_INLINE Floats all(float value) { return value - Floats{}; }

MIXTURA_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                    reinterpret_cast<__m512>(c)));
#else
    return a * b + c;
#endif
}

// The sums of the 16 numbers of each vector, always in the same order.
template <int num>
MIXTURA_INLINE void sums_of(const Floats (&v)[num], float (&to)[num]) {
    using Eight = float __attribute__((vector_size(32)));
    Eight eight[num];
    for (int i = 0; i < num; ++i) {
        Eight halves[2];
        std::memcpy(halves, &v[i], sizeof v[i]);
        eight[i] = halves[0] + halves[1];
    }
    if constexpr (num == 4) {
#if defined(__AVX2__)
        const auto one = [&](int i) { return reinterpret_cast<__m256>(eight[i]); };
        const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(one(0), one(1)), _mm256_hadd_ps(one(2), one(3)));
        _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
        return;
#endif
    }
    for (int i = 0; i < num; ++i) {
        const Eight& e = eight[i];
        to[i] = ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
    }
}

MIXTURA_INLINE Floats widen_bf16(Halves16 halves) {
    return same_bits<Floats>(__builtin_convertvector(halves, Words) << 16);
}

MIXTURA_INLINE float from_bf16(std::uint16_t half) { return same_bits<float>(std::uint32_t{half} << 16); }

// Without a branch, so that loops over it become vectors.
MIXTURA_INLINE std::uint16_t to_bf16(float value) {
    const auto bits = same_bits<std::uint32_t>(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
    return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// e to the power of v: at most 2 units in the last place off; infinity and 0 beyond the range, NaN of NaN.
MIXTURA_INLINE Floats exponential(Floats v) {
    const Floats limit = all(88.72283f), floor = all(-87.33654f);
    Floats x = v > limit ? limit : v;
    x = x < floor ? floor : x;
    // x = n ln 2 + r, where n is rounded by adding a number at which floats are whole.
    const Floats shift = all(12582912.0f);
    const Floats n = (x * 1.44269504f + shift) - shift;
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^n in two factors, as n = 128 is one more than an exponent holds.
    const Ints whole = __builtin_convertvector(n, Ints);
    const Ints half = whole >> 1;
    const Floats low = same_bits<Floats>((half + 127) << 23), high = same_bits<Floats>((whole - half + 127) << 23);
    p = p * low * high;
    p = v > limit ? all(__builtin_inff()) : p;
    p = v < floor ? all(0.0f) : p;
    return v != v ? v : p;
}

}  // namespace mixtura::MIXTURA_ISA
