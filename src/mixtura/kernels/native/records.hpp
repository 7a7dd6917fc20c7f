// Records as Python makes them: addresses and sizes.
#pragma once

#include <nanobind/nanobind.h>

#include <stdexcept>
#include <vector>

#include "experts.hpp"

namespace mixtura {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// The experts of a layer: where they lie, not their weights.
struct Layer {
    Experts experts;

    void add(const Matrix& up, const Matrix& down, Address up_bias, Address down_bias, int bias_number) {
        if (!experts.all.empty()) {
            const Expert& first = experts.all.front();
            if (up.rows != first.up.rows || up.cols != first.up.cols || down.rows != first.down.rows ||
                down.cols != first.down.cols) {
                throw std::invalid_argument("the experts of a layer have the same sizes");
            }
        }
        const auto number = static_cast<Number>(bias_number);
        experts.all.push_back({up, down, {at<const void>(up_bias), number, 0}, {at<const void>(down_bias), number, 0}});
    }

    // Experts one behind the other, as in a tensor of three axes.
    void add_all(std::int64_t num, Matrix up, std::int64_t up_bytes, Matrix down, std::int64_t down_bytes,
                 Address up_bias, std::int64_t up_bias_bytes, Address down_bias, std::int64_t down_bias_bytes,
                 int bias_number) {
        experts.all.reserve(experts.all.size() + static_cast<std::size_t>(num));
        for (std::int64_t e = 0; e < num; ++e) {
            add(up, down, up_bias, down_bias, bias_number);
            up.data += up_bytes;
            down.data += down_bytes;
            if (up_bias != 0) up_bias += static_cast<Address>(up_bias_bytes);
            if (down_bias != 0) down_bias += static_cast<Address>(down_bias_bytes);
        }
    }

    // An expert, all of it in one piece of memory, lies so many bytes further on from now on.
    void shift(std::int64_t expert, std::int64_t bytes) {
        Expert& one = experts.all.at(static_cast<std::size_t>(expert));
        for (Matrix* matrix : {&one.up, &one.down}) {
            matrix->data += bytes;
            if (matrix->scales) matrix->scales += bytes / static_cast<std::int64_t>(sizeof(*matrix->scales));
            for (auto& plane : matrix->lower) {
                if (plane) plane += bytes;
            }
        }
        for (Rows* bias : {&one.up_bias, &one.down_bias}) {
            if (bias->data) bias->data = static_cast<const char*>(bias->data) + bytes;
        }
    }
};

struct Assigned {
    Address expert_ids, token_ids;
    std::int64_t per_token, num, num_tokens;

    Assignments get() const {
        return {at<const std::int64_t>(expert_ids), at<const std::int64_t>(token_ids), per_token, num, num_tokens};
    }
};

struct Strided {
    Address data;
    int number;
    std::int64_t stride;

    Rows rows() const { return {at<const void>(data), static_cast<Number>(number), stride}; }
    Result result() const { return {at<void>(data), static_cast<Number>(number), stride}; }
};

// Adds the records and calls of `step.hpp` to the module.
void bind_step(nanobind::module_& m);

// Adds what `watch.cpp` has.
void bind_watch(nanobind::module_& m);

}  // namespace mixtura
