// AVX-512 with products of pairs of bfloat16 and of quadruples of bytes.
#define MIXTURA_ISA avx512_bf16
#include "isa.hpp"

namespace mixtura::avx512_bf16 {
namespace {

// Half of a small odd number as bfloat16, which holds it exactly.
constexpr std::uint16_t half_of(int odd) {
    const unsigned sign = odd < 0 ? 0x8000u : 0u;
    const unsigned size = static_cast<unsigned>(odd < 0 ? -odd : odd);
    unsigned top = 0;
    while (size >> (top + 1)) ++top;
    const unsigned fraction = (size << 7 >> top) & 0x7fu;
    return static_cast<std::uint16_t>(sign | (top - 1 + 127) << 7 | fraction);
}

template <class T, int num>
struct alignas(64) Table {
    T of[num];
};

// As the decoders of `formats.hpp`, but to vectors of 32 bfloat16, whose neighbours are added in pairs.
// Number w of vector j is the weight `place(j, w)` of the block.
struct PairsBf16 {
    static constexpr int steps = 1, block_bytes = 64, weights = 32;
    using Raw = __m512i;
    using Vector = __m512i;
    static constexpr int place(int, int w) { return w; }
    MIXTURA_INLINE Raw raw(const unsigned char* from) { return load<__m512i>(from); }
    MIXTURA_INLINE Vector vector(const Raw& raw, int) { return raw; }
};

template <int bits>
struct PairsBits {
    static constexpr int steps = 16 / bits, block_bytes = 64, weights = 32 * steps;
    using Raw = __m512i;
    using Vector = __m512i;
    static constexpr int place(int j, int w) { return w * steps + j; }

    MIXTURA_INLINE Raw raw(const unsigned char* from) { return load<__m512i>(from); }
    MIXTURA_INLINE Vector vector(const Raw& raw, int j) {
        return _mm512_permutexvar_epi16(j == 0 ? raw : _mm512_srli_epi16(raw, bits * j), table());
    }

    // The index has five bits; the table repeats.
    MIXTURA_INLINE __m512i table() {
        static constexpr auto levels = [] {
            Table<std::uint16_t, 32> made{};
            for (int i = 0; i < 32; ++i) made.of[i] = half_of(2 * (i % (1 << bits)) - ((1 << bits) - 1));
            return made;
        }();
        return load<__m512i>(levels.of);
    }
};

// Nested codes; upper and lower four bits of 8 stay apart.
template <int bits>
struct PairsNested {
    static constexpr int planes = nested_planes(bits), steps = 8, block_bytes = 64, weights = 32 * steps;
    using Raw = NestedWords<bits>;
    struct Both {
        __m512i upper, lower;
    };
    static constexpr int place(int j, int w) { return w * steps + j; }

    MIXTURA_INLINE Raw raw(const unsigned char* const* planes, std::int64_t at) {
        return nested_words<bits>(planes, at);
    }
    MIXTURA_INLINE __m512i levels(const Words& words, int j) {
        return PairsBits<4>::vector(reinterpret_cast<__m512i>(words), j / 2);
    }
    MIXTURA_INLINE auto vector(const Raw& raw, int j) {
        if constexpr (bits == 8) return Both{levels(raw.upper[j % 2], j), levels(raw.lower[j % 2], j)};
        else return levels(raw.upper[j % 2], j);
    }
};

// One byte of m + 1/2 as bfloat16, for every m.
constexpr Table<std::uint8_t, 128> half_bytes(int shift) {
    Table<std::uint8_t, 128> made{};
    for (int m = 0; m < 128; ++m) made.of[m] = static_cast<std::uint8_t>(half_of(2 * m + 1) >> shift);
    return made;
}

// A code c >= 128 stands for m + 1/2 with m = c - 128, one below for the negative of that with m = 127 - c.
// Both bytes of the bfloat16 are looked up by m, and the sign put to them.
struct PairsQ8 {
    static constexpr int steps = 2, block_bytes = 64, weights = 64;
    struct Raw {
        __m512i lower, upper;
    };
    using Vector = __m512i;
    static constexpr int place(int j, int w) { return 16 * (w / 8) + 8 * j + w % 8; }

    MIXTURA_INLINE Raw raw(const unsigned char* from) {
        static constexpr auto low = half_bytes(0), high = half_bytes(8);
        const __m512i codes = load<__m512i>(from);
        const __mmask64 negative = ~_mm512_movepi8_mask(codes);
        const __m512i m = _mm512_xor_si512(codes, _mm512_maskz_set1_epi8(negative, 0x7f));
        const __m512i lower = _mm512_permutex2var_epi8(load<__m512i>(low.of), m, load<__m512i>(low.of + 64));
        const __m512i upper = _mm512_permutex2var_epi8(load<__m512i>(high.of), m, load<__m512i>(high.of + 64));
        constexpr int first_or_third_without_second = 0xf2;
        const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
        return {lower, _mm512_ternarylogic_epi32(upper, codes, sign, first_or_third_without_second)};
    }
    MIXTURA_INLINE Vector vector(const Raw& raw, int j) {
        return j == 0 ? _mm512_unpacklo_epi8(raw.lower, raw.upper) : _mm512_unpackhi_epi8(raw.lower, raw.upper);
    }
};

MIXTURA_INLINE Floats add_pairs(Floats sum, __m512i w, __m512i x) {
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), (__m512bh)w, (__m512bh)x));
}

template <class Decode>
struct PairInputs : Decode {
    static constexpr std::size_t block_inputs_bytes = Decode::steps * 64;

    using Sum = Floats;
    static constexpr bool continues = true;

    MIXTURA_INLINE Sum start(const unsigned char*) { return Floats{}; }
    MIXTURA_INLINE Sum add(Sum sum, const __m512i& w, const unsigned char* x, int j) {
        return add_pairs(sum, w, load<__m512i>(x + 64 * j));
    }
    MIXTURA_INLINE Floats finish(const Sum& sum, const unsigned char*) { return sum; }

    static void prepare_block(const float* x, std::int64_t left, unsigned char* to) {
        // Rounded in order, which becomes vectors, and only then moved to where the weights want them.
        std::uint16_t halves[Decode::weights] = {};
        if (left >= Decode::weights) {
            for (int at = 0; at < Decode::weights; ++at) halves[at] = to_bf16(x[at]);
        } else {
            for (int at = 0; at < static_cast<int>(left); ++at) halves[at] = to_bf16(x[at]);
        }
        for (int j = 0; j < Decode::steps; ++j) {
            std::uint16_t values[32];
            for (int w = 0; w < 32; ++w) values[w] = halves[Decode::place(j, w)];
            std::memcpy(to + 64 * j, values, sizeof values);
        }
    }
};

// The codes of `bits` bits that vector j has a byte each for; byte i is that of the weight `place(j, i)`.
template <int bits>
struct BytesOf {
    static constexpr int steps = 8 / bits, block_bytes = 64, weights = 64 * steps;
    static constexpr float half = ((1 << bits) - 1) / 2.0f;
    using Raw = __m512i;
    static constexpr int place(int j, int i) { return i * steps + j; }

    MIXTURA_INLINE Raw raw(const unsigned char* from) { return load<__m512i>(from); }
    MIXTURA_INLINE __m512i vector(const Raw& raw, int j) {
        const __m512i moved = j == 0 ? raw : _mm512_srli_epi16(raw, bits * j);
        return _mm512_and_si512(moved, _mm512_set1_epi8((1 << bits) - 1));
    }
};

// Codes of 8 bits as they lie.
struct WholeBytes {
    static constexpr int steps = 4, block_bytes = 64 * steps, weights = block_bytes;
    static constexpr float half = 127.5f;
    using Raw = const unsigned char*;
    static constexpr int place(int j, int i) { return 64 * j + i; }

    MIXTURA_INLINE Raw raw(const unsigned char* from) { return from; }
    MIXTURA_INLINE __m512i vector(const Raw& raw, int j) { return load<__m512i>(raw + 64 * j); }
};

template <int bits>
struct BytesNested {
    static constexpr int planes = nested_planes(bits), steps = 4, block_bytes = 64, weights = 64 * steps;
    static constexpr float half = ((1 << bits) - 1) / 2.0f;
    using Raw = NestedWords<bits>;
    static constexpr int place(int j, int i) { return i * steps + j; }

    MIXTURA_INLINE Raw raw(const unsigned char* const* planes, std::int64_t at) {
        return nested_words<bits>(planes, at);
    }
    MIXTURA_INLINE __m512i vector(const Raw& raw, int j) {
        const Words nibble = all_words(0x0f0f0f0fu), upper = raw.upper[j % 2];
        Words codes = (j < 2 ? upper : upper >> 4) & nibble;
        if constexpr (bits == 8) {
            const Words lower = raw.lower[j % 2];
            codes = j < 2 ? (upper << 4 & ~nibble) | (lower & nibble) : (upper & ~nibble) | (lower >> 4 & nibble);
        }
        return reinterpret_cast<__m512i>(codes);
    }
};

// Codes beside inputs of eight bits, which have a scale for each block. Levels lie half a step beside
// whole numbers: codes are multiplied as they are and `half` times the sum of inputs is taken off.
template <class Codes>
struct ByteInputs : Codes {
    using Codes::steps, Codes::weights, Codes::half;
    using Vector = __m512i;
    using Sum = __m512i;
    static constexpr bool continues = false;
    static constexpr std::size_t block_inputs_bytes = steps * 64 + 128;

    MIXTURA_INLINE Sum start(const unsigned char*) { return _mm512_setzero_si512(); }
    MIXTURA_INLINE Sum add(Sum sum, const __m512i& w, const unsigned char* x, int j) {
        return _mm512_dpbusd_epi32(sum, w, load<__m512i>(x + 64 * j));
    }
    MIXTURA_INLINE Floats finish(const Sum& sum, const unsigned char* x) {
        const Floats whole = reinterpret_cast<Floats>(_mm512_cvtepi32_ps(sum));
        return (whole - load<Floats>(x + 64 * steps)) * load<Floats>(x + 64 * steps + 64);
    }

    static void prepare_block(const float* x, std::int64_t left, unsigned char* to) {
        alignas(64) float values[weights] = {};
        std::memcpy(values, x, static_cast<std::size_t>(at_most(left, weights)) * sizeof(float));
        const float most = largest_size(values);
        const bool finite = most < __builtin_inff();
        const __m512 steps_per_unit = _mm512_set1_ps(finite && most > 0.0f ? 127.0f / most : 0.0f);
        alignas(64) std::int8_t in_order[weights], codes[weights];
        for (int at = 0; at < weights; at += 16) {
            const __m512 some = finite ? _mm512_load_ps(values + at) : _mm512_setzero_ps();
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(some, steps_per_unit));
            _mm_store_si128(reinterpret_cast<__m128i*>(in_order + at), _mm512_cvtepi32_epi8(whole));
        }
        for (int j = 0; j < steps; ++j) {
            for (int i = 0; i < 64; ++i) codes[64 * j + i] = in_order[Codes::place(j, i)];
        }
        __m512i sums = _mm512_setzero_si512();
        for (int j = 0; j < steps; ++j) {
            sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_load_si512(codes + 64 * j));
        }
        std::memcpy(to, codes, sizeof codes);
        _mm512_storeu_ps(to + sizeof codes, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(half)));
        _mm512_storeu_ps(to + sizeof codes + 64, _mm512_set1_ps(finite ? most / 127.0f : __builtin_nanf("")));
    }

private:
    // Not less than infinity where one value is not finite: as whole numbers, sizes and NaN are in order.
    MIXTURA_INLINE float largest_size(const float* values) {
        __m512i most = _mm512_setzero_si512();
        for (int at = 0; at < weights; at += 16) {
            const __m512i bits = _mm512_and_si512(_mm512_load_si512(values + at), _mm512_set1_epi32(0x7fffffff));
            most = _mm512_max_epi32(most, bits);
        }
        return __builtin_bit_cast(float, _mm512_reduce_max_epi32(most));
    }
};

// Upper and lower four bits of nested codes, in sums of their own.
struct NestedPairInputs : PairsNested<8> {
    static constexpr std::size_t block_inputs_bytes = steps * 64;
    struct Sum {
        Floats upper, lower;
    };
    static constexpr bool continues = false;

    MIXTURA_INLINE Sum start(const unsigned char*) { return {Floats{}, Floats{}}; }
    MIXTURA_INLINE Sum add(const Sum& sum, const Both& w, const unsigned char* x, int j) {
        const auto inputs = load<__m512i>(x + 64 * j);
        return {add_pairs(sum.upper, w.upper, inputs), add_pairs(sum.lower, w.lower, inputs)};
    }
    MIXTURA_INLINE Floats finish(const Sum& sum, const unsigned char*) {
        // The upper bits alone have a weight's sign: of an infinite input the lower ones could be its negative.
        constexpr int nan_or_infinite = 0x99;
        const __m512 upper = reinterpret_cast<__m512>(sum.upper);
        const __mmask16 is_final = _mm512_fpclass_ps_mask(upper, nan_or_infinite);
        const __m512 lower = _mm512_mask_mov_ps(reinterpret_cast<__m512>(sum.lower), is_final, upper);
        return multiply_add(sum.upper, all(16.0f), reinterpret_cast<Floats>(lower));
    }
    static void prepare_block(const float* x, std::int64_t left, unsigned char* to) {
        PairInputs<PairsNested<4>>::prepare_block(x, left, to);
    }
};

// The bytes of whole numbers of eight bits as bfloat16, which holds them exactly.
constexpr Table<std::uint8_t, 256> whole_bytes(int shift) {
    Table<std::uint8_t, 256> made{};
    for (int byte = 0; byte < 256; ++byte) {
        const int whole = byte < 128 ? byte : byte - 256;
        made.of[byte] = whole == 0 ? 0 : static_cast<std::uint8_t>(half_of(2 * whole) >> shift);
    }
    return made;
}

// The products of a strip's rows with inputs of bfloat16, two columns at a time.
struct StripOfPairs {
    template <int num_inputs>
    static void run(const Matrix& m, std::int64_t strip, const unsigned char* const* x,
                    float (&rows)[num_inputs][strip_rows]) {
        const Windows windows(m.rate);
        const Levels levels(m.table);
        const unsigned char* chunk = m.data + strip * m.row_bytes;
        const std::uint16_t* scales = m.scales + strip * m.row_scales;
        Floats sums[vectors_of_strip][num_inputs] = {};
        for (std::int64_t first = 0; first < m.cols; first += m.group, scales += strip_rows) {
            const std::int64_t end = at_most(first + m.group, m.cols);
            Floats group[vectors_of_strip][num_inputs] = {};
            for (std::int64_t c = first; c < end; c += 2, chunk += 2 * m.rate) {
                __builtin_prefetch(chunk + bytes_ahead, 0, 2);
                const bool is_last = c + 1 == end;
                __m512i pairs[vectors_of_strip];
                levels.pairs(windows.of(chunk), windows.of(is_last ? chunk : chunk + m.rate), pairs);
                for (int i = 0; i < num_inputs; ++i) {
                    const __m512i both = inputs_at(x[i], c, is_last);
                    for (int v = 0; v < vectors_of_strip; ++v) group[v][i] = add_pairs(group[v][i], pairs[v], both);
                }
                // A group of an odd number of columns leaves the next one its chunk.
                if (is_last) chunk -= m.rate;
            }
            for (int v = 0; v < vectors_of_strip; ++v) {
                const Floats scale = scales_of(scales, v);
                for (int i = 0; i < num_inputs; ++i) sums[v][i] = multiply_add(group[v][i], scale, sums[v][i]);
            }
        }
        for (int i = 0; i < num_inputs; ++i) {
            for (int v = 0; v < vectors_of_strip; ++v) {
                float four_by_four[16];
                store(four_by_four, sums[v][i]);
                for (int q = 0; q < 4; ++q) std::memcpy(rows[i] + row_of(v, q), four_by_four + 4 * q, 4 * sizeof(float));
            }
        }
    }

private:
    // Interleaving bytes and then words leaves to vector v of each sixteen rows the four from 4 v on.
    static constexpr int row_of(int v, int q) { return 16 * q + 4 * v; }

    // From windows to levels as bfloat16.
    class Levels {
    public:
        explicit Levels(const std::int8_t* table) : low_(bytes_of(table, 0).of), high_(bytes_of(table, 8).of) {}

        __attribute__((always_inline)) void pairs(__m512i one, __m512i other, __m512i (&to)[vectors_of_strip]) const {
            const __mmask64 one_upper = _mm512_movepi8_mask(one), other_upper = _mm512_movepi8_mask(other);
            const __m512i one_low = low_.at(one, one_upper), one_high = high_.at(one, one_upper);
            const __m512i other_low = low_.at(other, other_upper), other_high = high_.at(other, other_upper);
            const __m512i one_first = _mm512_unpacklo_epi8(one_low, one_high);
            const __m512i one_second = _mm512_unpackhi_epi8(one_low, one_high);
            const __m512i other_first = _mm512_unpacklo_epi8(other_low, other_high);
            const __m512i other_second = _mm512_unpackhi_epi8(other_low, other_high);
            to[0] = _mm512_unpacklo_epi16(one_first, other_first);
            to[1] = _mm512_unpackhi_epi16(one_first, other_first);
            to[2] = _mm512_unpacklo_epi16(one_second, other_second);
            to[3] = _mm512_unpackhi_epi16(one_second, other_second);
        }

    private:
        static Table<std::uint8_t, 256> bytes_of(const std::int8_t* table, int shift) {
            static constexpr auto low = whole_bytes(0), high = whole_bytes(8);
            const ByteTable numbers(shift == 0 ? low.of : high.of);
            Table<std::uint8_t, 256> made;
            for (int at = 0; at < 256; at += 64) {
                _mm512_store_si512(made.of + at, numbers.at(_mm512_loadu_si512(table + at)));
            }
            return made;
        }

        ByteTable low_, high_;
    };

    MIXTURA_INLINE __m512i inputs_at(const unsigned char* x, std::int64_t c, bool is_last) {
        const unsigned char* from = x + 2 * c;
        return _mm512_set1_epi32(static_cast<int>(is_last ? load<std::uint16_t>(from) : load<std::uint32_t>(from)));
    }

    MIXTURA_INLINE Floats scales_of(const std::uint16_t* scales, int v) {
        float some[16];
        for (int q = 0; q < 4; ++q) {
            for (int e = 0; e < 4; ++e) some[4 * q + e] = from_bf16(scales[row_of(v, q) + e]);
        }
        return load<Floats>(some);
    }
};

const Kernel* find_bf16(const Matrix& m) {
    switch (m.format) {
        case Format::bf16: return m.transposed ? nullptr : &kernel_of<PairInputs<PairsBf16>, Scaled::never>;
        case Format::q8: return m.group >= m.cols ? &kernel_of<PairInputs<PairsQ8>, Scaled::by_row> : nullptr;
        case Format::q4: return find_grouped<PairInputs<PairsBits<4>>>(m);
        case Format::q2: return find_grouped<PairInputs<PairsBits<2>>>(m);
        case Format::n8: return find_by_block<NestedPairInputs>(m);
        case Format::n4: return find_by_block<PairInputs<PairsNested<4>>>(m);
        case Format::trellis: return &trellis_kernel<PairInputs<PairsBf16>, StripOfPairs>;
        default: return nullptr;
    }
}

const Kernel* find_int8(const Matrix& m) {
    switch (m.format) {
        case Format::q8: return m.group >= m.cols ? &kernel_of<ByteInputs<WholeBytes>, Scaled::by_row> : nullptr;
        case Format::q4: return find_grouped<ByteInputs<BytesOf<4>>>(m);
        case Format::q2: return find_grouped<ByteInputs<BytesOf<2>>>(m);
        case Format::n8: return find_by_block<ByteInputs<BytesNested<8>>>(m);
        case Format::n4: return find_by_block<ByteInputs<BytesNested<4>>>(m);
        default: return nullptr;
    }
}

const Kernel* find(const Matrix& m, Inputs inputs) {
    const Kernel* found = nullptr;
    if (inputs == Inputs::int8) found = find_int8(m);
    if (!found && inputs != Inputs::f32) found = find_bf16(m);
    return found ? found : find_float(m);
}

}  // namespace
}  // namespace mixtura::avx512_bf16

namespace mixtura {

const Isa& isa_avx512_bf16() {
    static constexpr Isa isa = {"avx512_bf16", avx512_bf16::find, avx512_bf16::activate,
                                avx512_bf16::attend, avx512_bf16::normalize, avx512_bf16::search_trellis, avx512_bf16::decode_strip};
    return isa;
}

}  // namespace mixtura
