// What the kernels multiply, and the table of kernels of one instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mixtura {

// How the weights of a matrix are stored; the numbers are known to Python. Nested codes of 8 bits (n8), or the
// upper 4 of them (n4), lie in planes; the upper 2 alone are q2. For `trellis`, see there.
enum class Format : int { f32 = 0, bf16 = 1, q8 = 2, q4 = 3, q2 = 4, n8 = 5, n4 = 6, trellis = 7 };
inline constexpr int num_formats = 8;
inline constexpr int most_planes = 4;

// What the inputs are turned into before they are multiplied.
enum class Inputs : int { f32 = 0, bf16 = 1, int8 = 2 };
inline constexpr int num_inputs = 3;

// One weight matrix, as it lies in somebody else's memory.
struct Matrix {
    const unsigned char* data = nullptr;  // of row 0
    const std::uint16_t* scales = nullptr;  // bfloat16, of row 0; none for f32 and bf16
    std::int64_t rows = 0;                // output features
    std::int64_t cols = 0;                // input features
    std::int64_t row_bytes = 0;           // from one row to the next; of inputs where transposed
    std::int64_t row_scales = 0;          // scales from one row to the next
    std::int64_t group = 0;               // neighbouring weights of a row that share a scale
    Format format = Format::f32;
    bool transposed = false;              // stored as [inputs, outputs]; f32 and bf16 only
    // Nested codes, of row 0: what lies below the upper two bits, in planes laid out as those in `data`.
    const unsigned char* lower[most_planes - 1] = {};
    // Of a trellis, whose `row_bytes` and `row_scales` lead from one strip of rows to the next.
    const std::int8_t* table = nullptr;
    int rate = 0;  // bits of eight weights
};

// Rows that the same thread reads after those of a call, so that memory is asked for them in time; none where
// nobody knows.
struct Later {
    const Matrix* matrix = nullptr;
    std::int64_t first = 0;
};

// A way to multiply: inputs are prepared once, then any rows of the matrix are multiplied with them.
// For one row and one input vector the order of additions is the same in every call, however many
// rows and vectors a call has.
struct Kernel {
    std::size_t (*prepared_bytes)(std::int64_t cols);
    void (*prepare)(const float* x, std::int64_t cols, unsigned char* to);
    // out[i * out_stride + r] = dot(row `first + r`, x[i]), 0 <= r < count, 0 <= i < num
    void (*dot)(const Matrix& matrix, std::int64_t first, std::int64_t count, const unsigned char* const* x,
                std::int64_t num, float* out, std::int64_t out_stride, const Later& later);
};

// What lies between the two matrices of an expert; the numbers are known to Python.
enum class Curve : int { none = 0, silu = 1, gelu = 2, gelu_tanh = 3, relu = 4, relu_squared = 5 };

// hidden = curve(min(gate, limit)) * (clamp(up, -limit, limit) + offset), or curve(up) where not gated.
struct Activation {
    Curve curve = Curve::none;
    bool gated = false;
    bool interleaved = false;  // rows of gate and up take turns; else all of gate come first
    float slope = 1.0f;        // silu(x) = x * sigmoid(slope * x)
    float limit = 0.0f;        // none where it is 0
    float offset = 0.0f;
};

// Some queries of one sequence and the keys and values that they share. Numbers of keys and values are
// bfloat16 or float32; strides count numbers.
struct AttentionHead {
    const float* queries = nullptr;
    const void* keys = nullptr;
    const void* values = nullptr;
    const float* biases = nullptr;  // added to scores, `num_keys` for each of `num_biases` queries in turn; or none
    float* scores = nullptr;        // room, `score_stride` (a multiple of 16) for each query
    float* out = nullptr;
    std::int64_t num_queries = 0, num_keys = 0, num_biases = 1, width = 0;
    std::int64_t query_stride = 0, key_stride = 0, value_stride = 0, score_stride = 0, out_stride = 0;
    float scaling = 1.0f;
    bool is_bf16 = false;
};

struct NormWay {
    float epsilon = 0.0f, offset = 0.0f;
    bool rounds_before = false, rounds_after = false;
};

// Columns of a matrix to be rounded to codes of a trellis, one after the other. Numbers of a column lie together.
struct TrellisColumns {
    float* weights = nullptr;          // [cols][rows], with what columns before these handed on
    const float* originals = nullptr;  // [cols][rows], without
    const float* scales = nullptr;     // [cols][rows]
    const float* feedback = nullptr;   // [cols][cols]: what is left of column c goes on to column k > c by [c][k]
    float* left = nullptr;             // [cols][rows]: what each column is off from its original
    std::uint8_t* codes = nullptr;    // [cols][rows / 64][rate]
    const std::int8_t* table = nullptr;
    std::int64_t rows = 0, cols = 0, feedback_stride = 0;
    int rate = 0;
};

// All that depends on the instruction set.
struct Isa {
    const char* name;
    // Null where there is no such kernel.
    const Kernel* (*find)(const Matrix& matrix, Inputs inputs);
    void (*activate)(const Activation& activation, float* gate, const float* up, std::int64_t num);
    void (*attend)(const AttentionHead& head);
    void (*normalize)(const float* from, const float* weight, std::int64_t num, const NormWay& way, float* to);
    void (*search_trellis)(const TrellisColumns& columns);
    // 64 rows of a trellis as float32, one row after the other.
    void (*decode_strip)(const Matrix& matrix, std::int64_t strip, float* to);
};

const Isa& isa_portable();
const Isa& isa_avx2();
const Isa& isa_avx512();
const Isa& isa_avx512_bf16();

}  // namespace mixtura
