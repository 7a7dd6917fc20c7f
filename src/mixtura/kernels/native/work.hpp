// How work is cut into pieces, and the memory and prepared inputs that it needs.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "numbers.hpp"

namespace mixtura {

// Bytes of weights in one piece of work: enough to hide what a piece costs to start, few enough to share
// out evenly.
inline constexpr std::int64_t piece_bytes = 48 << 10;
inline constexpr std::int64_t least_pieces_per_thread = 16;
// Less than this, counted once for each input that it is multiplied with, is done before another thread has begun,
// and a thread that the system holds back while it has a piece would keep the caller waiting for milliseconds.
inline constexpr std::int64_t least_shared_bytes = 128 << 10;
inline constexpr std::int64_t number_bytes = sizeof(float);
// Input vectors that are multiplied with a piece before the next ones are.
inline constexpr std::int64_t most_vectors = 64;

// Memory that is kept from one call to the next and starts at a cache line.
class Room {
public:
    template <class T>
    T* of(std::int64_t num) {
        const std::size_t bytes = static_cast<std::size_t>(num) * sizeof(T);
        if (bytes > size_) {
            memory_.reset();
            memory_.reset(static_cast<unsigned char*>(::operator new(bytes, alignment)));
            size_ = bytes;
        }
        return reinterpret_cast<T*>(memory_.get());
    }

private:
    static constexpr std::align_val_t alignment{64};
    struct Free {
        void operator()(unsigned char* memory) const { ::operator delete(memory, alignment); }
    };
    std::unique_ptr<unsigned char, Free> memory_;
    std::size_t size_ = 0;
};

// What threads keep for themselves.
struct Scratch {
    Room row, gate, up, sums;
};
inline Scratch& scratch() {
    static thread_local Scratch mine;
    return mine;
}

inline int threads_for(const Way& way, std::int64_t bytes) { return bytes < least_shared_bytes ? 1 : way.threads; }

// Rows of a matrix to take as one piece of work.
inline std::int64_t rows_of_piece(const Matrix& matrix, std::int64_t rows, std::int64_t bytes_of_row, int threads,
                           std::int64_t pieces_beside) {
    const std::int64_t unit = matrix.transposed || matrix.format == Format::trellis ? 64 : 8;
    std::int64_t piece = std::max<std::int64_t>(1, piece_bytes / std::max<std::int64_t>(1, bytes_of_row));
    const std::int64_t least = least_pieces_per_thread * threads / std::max<std::int64_t>(1, pieces_beside);
    piece = std::min(piece, rows / std::max<std::int64_t>(1, least));
    return std::max<std::int64_t>(unit, (piece + unit - 1) / unit * unit);
}

inline std::int64_t bytes_of_row(const Matrix& matrix) {
    if (matrix.format == Format::trellis) return matrix.cols * matrix.rate / 8;
    static constexpr int bits[num_formats] = {32, 16, 8, 4, 2, 8, 4};
    return (matrix.cols * bits[static_cast<int>(matrix.format)] + 7) / 8;
}

// Input vectors as the kernels of several matrices want them: prepared once for each kind of kernel.
class Prepared {
public:
    Prepared(const Way& way, std::int64_t cols) : way_(way), cols_(cols) {}

    // The number of the kernel that a matrix takes.
    std::size_t add(const Matrix& matrix) {
        const Kernel* kernel = way_.isa->find(matrix, way_.inputs);
        std::size_t place = places_.size();
        for (std::size_t k = 0; k < kernels_.size(); ++k) {
            if (kernels_[k] == kernel) return k;
            if (kernels_[k]->prepare == kernel->prepare) place = place_of_[k];
        }
        if (place == places_.size()) places_.push_back({kernel, apart(kernel->prepared_bytes(cols_)), 0});
        kernels_.push_back(kernel);
        place_of_.push_back(place);
        return kernels_.size() - 1;
    }

    // Room for `num` vectors; then `prepare` each of them, on any threads.
    void reserve(Room& room, std::int64_t num) {
        std::size_t total = 0;
        for (auto& place : places_) {
            place.offset = total;
            total += place.bytes * static_cast<std::size_t>(num);
        }
        memory_ = room.of<unsigned char>(static_cast<std::int64_t>(total));
    }

    void prepare(std::int64_t vector, const float* values) {
        for (const auto& place : places_) place.kernel->prepare(values, cols_, at(place, vector));
    }

    const unsigned char* vector(std::size_t kernel, std::int64_t vector) const {
        return at(places_[place_of_[kernel]], vector);
    }

    const Kernel& kernel(std::size_t number) const { return *kernels_[number]; }

private:
    // An odd number of cache lines: vectors a power of two apart would fight for the same lines.
    static std::size_t apart(std::size_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

    struct Place {
        const Kernel* kernel;
        std::size_t bytes, offset;
    };

    unsigned char* at(const Place& place, std::int64_t vector) const {
        return memory_ + place.offset + place.bytes * static_cast<std::size_t>(vector);
    }

    Way way_;
    std::int64_t cols_;
    std::vector<const Kernel*> kernels_;
    std::vector<std::size_t> place_of_;
    std::vector<Place> places_;
    unsigned char* memory_ = nullptr;
};

inline void add_bias(const Rows& bias, std::int64_t first, std::int64_t stride, std::int64_t num, float* to) {
    if (!bias.data) return;
    for (std::int64_t i = 0; i < num; ++i) to[i] += number_at(bias, 0, first + i * stride);
}

}  // namespace mixtura
