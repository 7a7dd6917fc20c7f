#include <algorithm>
#include <cstring>

#include "pool.hpp"
#include "work.hpp"

namespace mixtura {

void linear(const Way& way, const Matrix& m, Rows bias, Rows x, std::int64_t num, Result out) {
    const auto hold = Pool::shared().hold();
    static Room room;
    Prepared inputs(way, m.cols);
    const Kernel& kernel = inputs.kernel(inputs.add(m));
    inputs.reserve(room, num);
    Pool::shared().loop(num, threads_for(way, num * m.cols * number_bytes), [&](std::int64_t i) {
        float* row = scratch().row.of<float>(m.cols);
        read_row(x, i, m.cols, row);
        inputs.prepare(i, row);
    });
    const std::int64_t step = rows_of_piece(m, m.rows, bytes_of_row(m), way.threads, 1);
    Pool::shared().loop((m.rows + step - 1) / step, threads_for(way, num * m.rows * bytes_of_row(m)), [&](std::int64_t p) {
        const std::int64_t first = p * step, count = std::min(step, m.rows - first);
        float* made = scratch().gate.of<float>(most_vectors * count);
        for (std::int64_t start = 0; start < num; start += most_vectors) {
            const std::int64_t some = std::min(most_vectors, num - start);
            const unsigned char* rows[most_vectors];
            for (std::int64_t i = 0; i < some; ++i) rows[i] = inputs.vector(0, start + i);
            kernel.dot(m, first, count, rows, some, made, count, {});
            for (std::int64_t i = 0; i < some; ++i) {
                add_bias(bias, first, 1, count, made + i * count);
                write_row(out, start + i, first, count, made + i * count);
            }
        }
    });
}

void decode(const Way& way, const Matrix& m, Result out) {
    constexpr std::int64_t rows_of_strip = 64;
    const auto hold = Pool::shared().hold();
    const std::int64_t strips = (m.rows + rows_of_strip - 1) / rows_of_strip;
    Pool::shared().loop(strips, threads_for(way, m.rows * m.cols * number_bytes), [&](std::int64_t s) {
        float* made = scratch().gate.of<float>(rows_of_strip * m.cols);
        way.isa->decode_strip(m, s, made);
        const std::int64_t first = s * rows_of_strip, end = std::min(m.rows, first + rows_of_strip);
        for (std::int64_t row = first; row < end; ++row) write_row(out, row, 0, m.cols, made + (row - first) * m.cols);
    });
}

std::uint64_t read_all(const unsigned char* data, std::int64_t bytes, int threads) {
    const auto hold = Pool::shared().hold();
    constexpr std::int64_t piece = 1 << 20, line = 64;
    std::vector<std::uint64_t> sums(static_cast<std::size_t>((bytes + piece - 1) / piece), 0);
    Pool::shared().loop(static_cast<std::int64_t>(sums.size()), threads, [&](std::int64_t p) {
        using Lanes = std::uint64_t __attribute__((vector_size(64)));
        Lanes four[4] = {};
        const std::int64_t end = std::min(bytes, (p + 1) * piece);
        for (std::int64_t at = p * piece; at + 4 * line <= end; at += 4 * line) {
            for (int i = 0; i < 4; ++i) {
                Lanes some;
                std::memcpy(&some, data + at + i * line, sizeof some);
                four[i] += some;
            }
        }
        const Lanes total = four[0] + four[1] + four[2] + four[3];
        for (int lane = 0; lane < 8; ++lane) sums[static_cast<std::size_t>(p)] += total[lane];
    });
    std::uint64_t total = 0;
    for (const std::uint64_t one : sums) total += one;
    return total;
}

void evict(const unsigned char* data, std::int64_t bytes) {
#if defined(__x86_64__)
    constexpr std::int64_t line = 64;
    for (std::int64_t at = 0; at < bytes; at += line) __builtin_ia32_clflush(data + at);
    __builtin_ia32_mfence();
#else
    static_cast<void>(data);
    static_cast<void>(bytes);
#endif
}

}  // namespace mixtura
