// The portable kernels on any processor: `make aarch64` builds this for 64-bit ARM and runs it in an emulator.
//
// Products of every format, by all threads, against the same sums in double precision; then one layer of
// experts. Exits with 1 where an error is larger than float32 explains.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "experts.hpp"

using namespace mixtura;

namespace {

std::mt19937 engine(0);
int num_wrong = 0;

float bf16_value(std::uint16_t half) {
    const std::uint32_t bits = std::uint32_t{half} << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

std::uint16_t bf16_bits(float value) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return static_cast<std::uint16_t>(bits >> 16);
}

// A matrix of random numbers, what holds them, and the numbers themselves.
struct Made {
    Matrix matrix;
    std::vector<float> floats;
    std::vector<std::uint16_t> halves, scales;
    std::vector<unsigned char> codes;
    std::vector<std::int8_t> table;
    std::vector<double> numbers;  // row by row
};

int bits_of(Format format) {
    constexpr int bits[num_formats] = {32, 16, 8, 4, 2, 8, 4};
    return bits[static_cast<int>(format)];
}

// The code of a weight, taken apart here in another way than by the kernels.
int code_of(const Made& made, std::int64_t row, std::int64_t c) {
    const Matrix& m = made.matrix;
    const auto field = [](const unsigned char* plane, std::int64_t place, int bits) {
        int code = 0;
        for (int b = 0; b < bits; ++b) {
            const std::int64_t bit = place * bits + b;
            code |= (plane[bit / 8] >> (bit % 8) & 1) << b;
        }
        return code;
    };
    const unsigned char* first = m.data + row * m.row_bytes;
    if (m.format != Format::n8 && m.format != Format::n4) return field(first, c, bits_of(m.format));
    const int upper = field(first, c, 2) << 2 | field(m.lower[0] + row * m.row_bytes, c, 2);
    if (m.format == Format::n4) return upper;
    return upper << 4 | field(m.lower[1 + c % 2] + row * m.row_bytes, c / 2, 4);
}

// Rings of bits, 64 rows of a column in each, of which a weight's window is the eight bits that end at its own.
void fill_trellis(Made& made, std::int64_t group, int rate) {
    constexpr std::int64_t strip = 64;
    std::normal_distribution<float> normal;
    Matrix& m = made.matrix;
    m.group = std::min(group, m.cols), m.rate = rate;
    const std::int64_t strips = (m.rows + strip - 1) / strip, groups = (m.cols + m.group - 1) / m.group;
    m.row_bytes = m.cols * rate, m.row_scales = groups * strip;
    made.codes.resize(static_cast<std::size_t>(strips * m.row_bytes));
    for (auto& code : made.codes) code = static_cast<unsigned char>(engine());
    for (int i = 0; i < 256; ++i) made.table.push_back(static_cast<std::int8_t>(engine()));
    for (std::int64_t i = 0; i < strips * m.row_scales; ++i) {
        made.scales.push_back(bf16_bits(0.01f + std::fabs(normal(engine))));
    }
    m.data = made.codes.data(), m.scales = made.scales.data(), m.table = made.table.data();
    for (std::int64_t r = 0; r < m.rows; ++r) {
        for (std::int64_t c = 0; c < m.cols; ++c) {
            const unsigned char* ring = m.data + r / strip * m.row_bytes + c * rate;
            int window = 0;
            for (int b = 0; b < 8; ++b) {
                const std::int64_t bit = ((r % strip + 1) * rate / 8 - 8 + b + 8 * rate) % (8 * rate);
                window |= (ring[bit / 8] >> (bit % 8) & 1) << b;
            }
            const auto at = static_cast<std::size_t>(r / strip * m.row_scales + c / m.group * strip + r % strip);
            made.numbers[static_cast<std::size_t>(r * m.cols + c)] =
                made.table[static_cast<std::size_t>(window)] * double{bf16_value(made.scales[at])};
        }
    }
}

void fill(Made& made, Format format, std::int64_t rows, std::int64_t cols, std::int64_t group) {
    std::normal_distribution<float> normal;
    Matrix& m = made.matrix;
    m.rows = rows, m.cols = cols, m.format = format;
    made.numbers.resize(static_cast<std::size_t>(rows * cols));
    if (format == Format::f32 || format == Format::bf16) {
        for (auto& number : made.numbers) {
            const std::uint16_t half = bf16_bits(normal(engine));
            made.halves.push_back(half), made.floats.push_back(bf16_value(half));
            number = made.floats.back();
        }
        const bool wide = format == Format::f32;
        m.data = wide ? reinterpret_cast<unsigned char*>(made.floats.data())
                      : reinterpret_cast<unsigned char*>(made.halves.data());
        m.row_bytes = cols * (wide ? 4 : 2);
        return;
    }
    if (format == Format::trellis) {
        constexpr int rates[] = {8, 12, 16, 20, 24, 28, 32, 40, 48};
        return fill_trellis(made, group, rates[(cols + group) % 9]);
    }
    const bool nested = format == Format::n8 || format == Format::n4;
    m.group = std::min(format == Format::q8 ? cols : group, cols);
    m.row_scales = (cols + m.group - 1) / m.group;
    m.row_bytes = (cols * (nested ? 2 : bits_of(format)) + 7) / 8;
    const std::int64_t plane = rows * m.row_bytes;
    made.codes.resize(static_cast<std::size_t>(plane * (nested ? most_planes : 1)));
    for (auto& code : made.codes) code = static_cast<unsigned char>(engine());
    m.data = made.codes.data();
    for (int p = 1; nested && p < most_planes; ++p) m.lower[p - 1] = m.data + p * plane;
    for (std::int64_t i = 0; i < rows * m.row_scales; ++i) {
        made.scales.push_back(bf16_bits(0.01f + std::fabs(normal(engine))));
    }
    m.scales = made.scales.data();
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < cols; ++c) {
            const double level = code_of(made, r, c) - ((1 << bits_of(format)) - 1) / 2.0;
            const std::uint16_t scale = made.scales[static_cast<std::size_t>(r * m.row_scales + c / m.group)];
            made.numbers[static_cast<std::size_t>(r * cols + c)] = level * bf16_value(scale);
        }
    }
}

void tell(const std::string& what, double error, double most) {
    if (error > most || std::isnan(error)) {
        ++num_wrong;
        std::printf("%s: error %.3g, at most %.3g is explained\n", what.c_str(), error, most);
    }
}

void check_products(const Way& way, Format format, std::int64_t rows, std::int64_t cols, std::int64_t group,
                    std::int64_t num) {
    Made made;
    fill(made, format, rows, cols, group);
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<std::size_t>(num * cols)), out(static_cast<std::size_t>(num * rows));
    for (auto& value : x) value = normal(engine);
    linear(way, made.matrix, {}, {x.data(), Number::f32, cols}, num, {out.data(), Number::f32, rows});
    double worst = 0.0;
    for (std::int64_t i = 0; i < num; ++i) {
        for (std::int64_t r = 0; r < rows; ++r) {
            double sum = 0.0, size = 0.0;
            for (std::int64_t c = 0; c < cols; ++c) {
                const double term = made.numbers[static_cast<std::size_t>(r * cols + c)] *
                                    x[static_cast<std::size_t>(i * cols + c)];
                sum += term, size += term * term;
            }
            const double error = std::fabs(out[static_cast<std::size_t>(i * rows + r)] - sum);
            worst = std::max(worst, error / std::sqrt(size + 1e-30));
        }
    }
    tell("format " + std::to_string(static_cast<int>(format)) + ", " + std::to_string(rows) + " x " +
             std::to_string(cols) + ", group " + std::to_string(group) + ", " + std::to_string(num) + " rows",
         worst, 4e-6);
}

// Two experts in different formats; every token goes to both.
void check_experts(const Way& way) {
    constexpr std::int64_t d_model = 96, d_expert = 80, num = 3;
    Made made[4];
    fill(made[0], Format::n8, 2 * d_expert, d_model, 32);
    fill(made[1], Format::q4, d_model, d_expert, 16);
    fill(made[2], Format::bf16, 2 * d_expert, d_model, 0);
    fill(made[3], Format::q2, d_model, d_expert, 16);
    Experts experts;
    experts.all = {{made[0].matrix, made[1].matrix, {}, {}}, {made[2].matrix, made[3].matrix, {}, {}}};
    const std::int64_t ids[2 * num] = {0, 1, 1, 0, 0, 1};
    const float weights[2 * num] = {0.5f, 0.25f, 1.0f, 0.75f, 0.125f, 2.0f};
    std::normal_distribution<float> normal;
    std::vector<float> x(num * d_model), out(num * d_model);
    for (auto& value : x) value = normal(engine);
    Activation silu;
    silu.curve = Curve::silu, silu.gated = true;
    run_experts(way, experts, {ids, nullptr, 2, 2 * num, num}, {x.data(), Number::f32, d_model},
                {weights, Number::f32, 1}, silu, {out.data(), Number::f32, d_model});
    // Brought one after the other, in their order or against it, they give the same bits.
    for (const bool in_order : {true, false}) {
        std::vector<float> apart(num * d_model);
        std::int64_t calls = 0;
        experts.most_waiting_bytes = in_order ? 0 : 1 << 20;
        experts.fetch = [&](const Need& need) {
            const bool as_told = need.in_order == in_order && need.num == 2 - calls && need.num_rows[0] == num;
            calls += as_told && need.experts[0] == (in_order ? calls : 0) ? 1 : 100;
            return std::vector<std::int64_t>{in_order ? 0 : need.num - 1};
        };
        run_experts(way, experts, {ids, nullptr, 2, 2 * num, num}, {x.data(), Number::f32, d_model},
                    {weights, Number::f32, 1}, silu, {apart.data(), Number::f32, d_model});
        tell("experts that are brought one by one", calls == 2 && apart == out ? 0.0 : 1.0, 1e-9);
    }
    double lost = 0.0, size = 0.0;
    for (std::int64_t t = 0; t < num; ++t) {
        std::vector<double> sum(d_model, 0.0);
        for (std::int64_t k = 0; k < 2; ++k) {
            const std::int64_t e = ids[2 * t + k];
            const auto row = [&](const Made& m, std::int64_t r, const auto& values) {
                double total = 0.0;
                for (std::int64_t c = 0; c < m.matrix.cols; ++c) {
                    total += m.numbers[static_cast<std::size_t>(r * m.matrix.cols + c)] * values(c);
                }
                return total;
            };
            const auto token = [&](std::int64_t c) { return x[static_cast<std::size_t>(t * d_model + c)]; };
            std::vector<double> hidden;
            for (std::int64_t f = 0; f < d_expert; ++f) {
                const double gate = row(made[2 * e], f, token), up = row(made[2 * e], d_expert + f, token);
                hidden.push_back(gate / (1.0 + std::exp(-gate)) * up);
            }
            const auto feature = [&](std::int64_t c) { return hidden[static_cast<std::size_t>(c)]; };
            for (std::int64_t d = 0; d < d_model; ++d) {
                sum[static_cast<std::size_t>(d)] += weights[2 * t + k] * row(made[2 * e + 1], d, feature);
            }
        }
        for (std::int64_t d = 0; d < d_model; ++d) {
            const double truth = sum[static_cast<std::size_t>(d)];
            lost += std::pow(out[static_cast<std::size_t>(t * d_model + d)] - truth, 2), size += truth * truth;
        }
    }
    tell("a layer of experts", std::sqrt(lost / size), 2e-6);
}

}  // namespace

int main() {
    int num_checks = 0;
    for (int threads = 1; threads <= 3; threads += 2) {
        const Way way{&isa_portable(), Inputs::f32, threads};
        for (int format = 0; format < num_formats; ++format) {
            for (const std::int64_t cols : {1, 37, 256, 300, 515, 1100}) {
                for (const std::int64_t group : {5, 16, 64, 512}) {
                    for (const std::int64_t num : {1, 3, 9}) {
                        check_products(way, static_cast<Format>(format), 70, cols, group, num);
                        ++num_checks;
                    }
                }
            }
        }
        check_experts(way);
        ++num_checks;
    }
    std::printf("%d checks, %d wrong\n", num_checks, num_wrong);
    return num_wrong == 0 ? 0 : 1;
}
