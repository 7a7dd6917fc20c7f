#include "experts.hpp"

#include <algorithm>
#include <memory>

#include "pool.hpp"
#include "work.hpp"

namespace mixtura {
namespace {

// Rows `start` to `stop` of the sorted assignments, which belong to one expert.
struct Run {
    const Expert* expert;
    std::int64_t start, stop;
};

struct Sorted {
    std::vector<std::int64_t> order;  // of the assignments that are present
    std::vector<Run> runs;
};

Sorted sort_by_expert(const std::vector<Expert>& experts, const Assignments& given) {
    const auto num_experts = static_cast<std::int64_t>(experts.size());
    std::vector<std::int64_t> starts(experts.size() + 1, 0);
    const auto present = [&](std::int64_t i) { return given.expert_ids[i] >= 0 && given.expert_ids[i] < num_experts; };
    for (std::int64_t i = 0; i < given.num; ++i) {
        if (present(i)) ++starts[static_cast<std::size_t>(given.expert_ids[i]) + 1];
    }
    Sorted sorted;
    for (std::size_t e = 0; e < experts.size(); ++e) {
        starts[e + 1] += starts[e];
        if (starts[e + 1] > starts[e]) sorted.runs.push_back({&experts[e], starts[e], starts[e + 1]});
    }
    sorted.order.resize(static_cast<std::size_t>(starts.back()));
    for (std::int64_t i = 0; i < given.num; ++i) {
        if (!present(i)) continue;
        auto& place = starts[static_cast<std::size_t>(given.expert_ids[i])];
        sorted.order[static_cast<std::size_t>(place++)] = i;
    }
    return sorted;
}

// A piece of work: some rows of one run's expert.
struct Piece {
    std::size_t run;
    std::int64_t first, count;
};

// One call: its assignments sorted, and the memory it uses. Whoever makes one holds the pool.
class Call {
public:
    // Of `sorted`, the runs from `first` to `last`.
    Call(const Way& way, const Assignments& assignments, const Sorted& sorted, std::size_t first, std::size_t last)
        : Call(way, assignments, sorted,
               std::vector<Run>(sorted.runs.begin() + static_cast<std::ptrdiff_t>(first),
                                sorted.runs.begin() + static_cast<std::ptrdiff_t>(last)),
               first == 0, last == sorted.runs.size()) {}

    // Of `sorted`, any runs, ascending; `is_first` and `is_last` where they are all or part of an ordered sum.
    Call(const Way& way, const Assignments& assignments, const Sorted& sorted, std::vector<Run> runs,
         bool is_first = true, bool is_last = true)
        : way_(way), assignments_(assignments), order_(sorted.order), runs_(std::move(runs)), is_first_(is_first),
          is_last_(is_last) {}

    void up_and_activate(Rows x, const Activation& activation) {
        Prepared inputs = tokens(x);
        const Matrix& some = runs_[0].expert->up;
        features_ = activation.gated ? some.rows / 2 : some.rows;
        const std::int64_t rows_per_feature = activation.gated ? 2 : 1;
        hidden_ = hidden_room().of<float>(static_cast<std::int64_t>(order_.size()) * features_);
        const auto pieces = cut(features_, rows_per_feature);
        Pool::shared().loop(static_cast<std::int64_t>(pieces.size()), threads_for(way_, up_bytes_by_input()), [&](std::int64_t p) {
            const Piece& piece = pieces[static_cast<std::size_t>(p)];
            const Expert& expert = *runs_[piece.run].expert;
            const std::int64_t rows = piece.count * rows_per_feature;
            float* gate = scratch().gate.of<float>(most_vectors * rows);
            float* up = scratch().up.of<float>(most_vectors * piece.count);
            const bool apart = activation.gated && !activation.interleaved;
            for_vectors(piece.run, inputs, [&](const unsigned char* const* x_rows, std::int64_t start, std::int64_t num) {
                const Kernel& kernel = inputs.kernel(up_kernels_[piece.run]);
                const Matrix& m = expert.up;
                const Later next = rows_of_next(pieces, p, apart ? 1 : rows_per_feature);
                if (apart) {
                    const std::int64_t first = features_ + piece.first;
                    kernel.dot(m, piece.first, piece.count, x_rows, num, gate, piece.count, {&m, first});
                    kernel.dot(m, first, piece.count, x_rows, num, up, piece.count, next);
                } else {
                    kernel.dot(m, piece.first * rows_per_feature, rows, x_rows, num, gate, rows, next);
                }
                for (std::int64_t i = 0; i < num; ++i) {
                    float* mine = gate + i * (apart ? piece.count : rows);
                    float* other = up + i * piece.count;
                    if (apart) {
                        add_bias(expert.up_bias, piece.first, 1, piece.count, mine);
                        add_bias(expert.up_bias, features_ + piece.first, 1, piece.count, other);
                    } else {
                        add_bias(expert.up_bias, piece.first * rows_per_feature, 1, rows, mine);
                    }
                    if (activation.interleaved) {
                        for (std::int64_t f = 0; f < piece.count; ++f) {
                            other[f] = mine[2 * f + 1];
                            mine[f] = mine[2 * f];
                        }
                    }
                    way_.isa->activate(activation, mine, other, piece.count);
                    std::copy(mine, mine + piece.count, hidden_ + (start + i) * features_ + piece.first);
                }
            });
        });
    }

    void up_only(Rows x, Result out) {
        Prepared inputs = tokens(x);
        features_ = runs_[0].expert->up.rows;
        const auto pieces = cut(features_, 1);
        Pool::shared().loop(static_cast<std::int64_t>(pieces.size()), threads_for(way_, up_bytes_by_input()), [&](std::int64_t p) {
            const Piece& piece = pieces[static_cast<std::size_t>(p)];
            const Expert& expert = *runs_[piece.run].expert;
            float* made = scratch().gate.of<float>(most_vectors * piece.count);
            for_vectors(piece.run, inputs, [&](const unsigned char* const* x_rows, std::int64_t start, std::int64_t num) {
                const Later next = rows_of_next(pieces, p, 1);
                inputs.kernel(up_kernels_[piece.run]).dot(expert.up, piece.first, piece.count, x_rows, num, made, piece.count, next);
                for (std::int64_t i = 0; i < num; ++i) {
                    add_bias(expert.up_bias, piece.first, 1, piece.count, made + i * piece.count);
                    write_row(out, assignment(start + i), piece.first, piece.count, made + i * piece.count);
                }
            });
        });
    }

    // From the rows of `hidden` by assignment, or from what `up_and_activate` left where there are none.
    void down(Rows hidden, Rows weights, Result out) {
        const Matrix& some = runs_[0].expert->down;
        Prepared inputs(way_, some.cols);
        std::vector<std::size_t> kernels;
        for (const Run& run : runs_) kernels.push_back(inputs.add(run.expert->down));
        std::vector<std::int64_t> places;
        for (const Run& run : runs_) {
            for (std::int64_t i = run.start; i < run.stop; ++i) places.push_back(i);
        }
        const auto num_rows = static_cast<std::int64_t>(places.size());
        inputs.reserve(prepared_room(), static_cast<std::int64_t>(order_.size()));
        Pool::shared().loop(num_rows, threads_for(way_, num_rows * some.cols * number_bytes), [&](std::int64_t r) {
            const std::int64_t i = places[static_cast<std::size_t>(r)];
            const float* values = hidden_ + i * features_;
            if (hidden.data) {
                float* row = scratch().row.of<float>(some.cols);
                read_row(hidden, assignment(i), some.cols, row);
                values = row;
            }
            inputs.prepare(i, values);
        });
        if (weights.data && !(is_first_ && is_last_)) {
            carried_ = carried_room().of<float>(assignments_.num_tokens * some.rows);
        }
        std::int64_t bytes = 0, bytes_by_input = 0;
        for (const Run& run : runs_) {
            bytes += bytes_of_row(run.expert->down) * some.rows;
            bytes_by_input += (run.stop - run.start) * bytes_of_row(run.expert->down) * some.rows;
        }
        const auto num_runs = static_cast<std::int64_t>(runs_.size());
        // A piece reads each expert in turn: its share of each should be more than a glimpse.
        const std::int64_t each = std::max<std::int64_t>(1, bytes / num_runs / some.rows);
        const std::int64_t rows = rows_of_piece(some, some.rows, each, way_.threads, 1);
        const std::int64_t num = (some.rows + rows - 1) / rows;
        Pool::shared().loop(num, threads_for(way_, bytes_by_input), [&](std::int64_t p) {
            const std::int64_t first = p * rows, count = std::min(rows, some.rows - first);
            down_piece(inputs, kernels, first, count, weights, out);
        });
    }

private:
    static Room& prepared_room() {
        static Room room;
        return room;
    }

    static Room& hidden_room() {
        static Room room;
        return room;
    }

    static Room& carried_room() {
        static Room room;
        return room;
    }

    std::int64_t assignment(std::int64_t sorted) const { return order_[static_cast<std::size_t>(sorted)]; }

    // Every token, prepared for the first matrices of all experts that run.
    Prepared tokens(Rows x) {
        const std::int64_t cols = runs_[0].expert->up.cols;
        Prepared inputs(way_, cols);
        for (const Run& run : runs_) up_kernels_.push_back(inputs.add(run.expert->up));
        inputs.reserve(prepared_room(), assignments_.num_tokens);
        const std::int64_t bytes = assignments_.num_tokens * cols * number_bytes;
        Pool::shared().loop(assignments_.num_tokens, threads_for(way_, bytes), [&](std::int64_t t) {
            float* row = scratch().row.of<float>(cols);
            read_row(x, t, cols, row);
            inputs.prepare(t, row);
        });
        return inputs;
    }

    std::int64_t up_bytes_by_input() const {
        std::int64_t bytes = 0;
        for (const Run& run : runs_) {
            bytes += (run.stop - run.start) * run.expert->up.rows * bytes_of_row(run.expert->up);
        }
        return bytes;
    }

    std::vector<Piece> cut(std::int64_t features, std::int64_t rows_per_feature) const {
        std::vector<Piece> pieces;
        const auto num_runs = static_cast<std::int64_t>(runs_.size());
        for (std::size_t r = 0; r < runs_.size(); ++r) {
            const Matrix& m = runs_[r].expert->up;
            const std::int64_t step =
                rows_of_piece(m, features, bytes_of_row(m) * rows_per_feature, way_.threads, num_runs);
            for (std::int64_t first = 0; first < features; first += step) {
                pieces.push_back({r, first, std::min(step, features - first)});
            }
        }
        return pieces;
    }

    // Where the piece after one begins.
    Later rows_of_next(const std::vector<Piece>& pieces, std::int64_t p, std::int64_t rows_per_feature) const {
        const auto next = static_cast<std::size_t>(p) + 1;
        if (next == pieces.size()) return {};
        const std::int64_t first = pieces[next].first * rows_per_feature;
        return {&runs_[pieces[next].run].expert->up, first};
    }

    // Calls body with the tokens of a run, a few at a time, as its first matrix wants them.
    template <class Body>
    void for_vectors(std::size_t r, const Prepared& inputs, const Body& body) const {
        const Run& run = runs_[r];
        for (std::int64_t start = run.start; start < run.stop; start += most_vectors) {
            const std::int64_t num = std::min(most_vectors, run.stop - start);
            const unsigned char* rows[most_vectors];
            for (std::int64_t i = 0; i < num; ++i) {
                rows[i] = inputs.vector(up_kernels_[r], assignments_.token(assignment(start + i)));
            }
            body(rows, start, num);
        }
    }

    void down_piece(const Prepared& inputs, const std::vector<std::size_t>& kernels, std::int64_t first,
                    std::int64_t count, const Rows& weights, const Result& out) const {
        const std::int64_t num_tokens = assignments_.num_tokens;
        float* made = scratch().gate.of<float>(most_vectors * count);
        float* sums = weights.data ? scratch().sums.of<float>(num_tokens * count) : nullptr;
        if (sums) begin_sums(runs_[0].expert->down.rows, first, count, sums);
        for (std::size_t r = 0; r < runs_.size(); ++r) {
            const Run& run = runs_[r];
            const bool is_last = r + 1 == runs_.size();
            const Later next = {&runs_[is_last ? 0 : r + 1].expert->down, is_last ? first + count : first};
            for (std::int64_t start = run.start; start < run.stop; start += most_vectors) {
                const std::int64_t num = std::min(most_vectors, run.stop - start);
                const unsigned char* rows[most_vectors];
                for (std::int64_t i = 0; i < num; ++i) rows[i] = inputs.vector(kernels[r], start + i);
                inputs.kernel(kernels[r]).dot(run.expert->down, first, count, rows, num, made, count, next);
                for (std::int64_t i = 0; i < num; ++i) {
                    float* mine = made + i * count;
                    add_bias(run.expert->down_bias, first, 1, count, mine);
                    const std::int64_t a = assignment(start + i);
                    if (!sums) {
                        write_row(out, a, first, count, mine);
                        continue;
                    }
                    const float weight = number_at(weights, a, 0);
                    float* sum = sums + assignments_.token(a) * count;
                    for (std::int64_t c = 0; c < count; ++c) sum[c] += weight * mine[c];
                }
            }
        }
        for (std::int64_t t = 0; sums && t < num_tokens; ++t) {
            if (is_last_) {
                write_row(out, t, first, count, sums + t * count);
            } else {
                std::copy(sums + t * count, sums + (t + 1) * count, carried_ + t * runs_[0].expert->down.rows + first);
            }
        }
    }

    // Sums from zero, or from where the call for the experts before these left them.
    void begin_sums(std::int64_t width, std::int64_t first, std::int64_t count, float* sums) const {
        if (is_first_) {
            std::fill(sums, sums + assignments_.num_tokens * count, 0.0f);
            return;
        }
        for (std::int64_t t = 0; t < assignments_.num_tokens; ++t) {
            const float* from = carried_ + t * width + first;
            std::copy(from, from + count, sums + t * count);
        }
    }

    const Way& way_;
    const Assignments& assignments_;
    const std::vector<std::int64_t>& order_;
    const std::vector<Run> runs_;
    const bool is_first_, is_last_;
    float* carried_ = nullptr;
    std::vector<std::size_t> up_kernels_;
    std::int64_t features_ = 0;
    float* hidden_ = nullptr;
};

void write_zeros(const Result& out, std::int64_t rows, std::int64_t cols) {
    const std::vector<float> zeros(static_cast<std::size_t>(cols), 0.0f);
    for (std::int64_t row = 0; row < rows; ++row) write_row(out, row, 0, cols, zeros.data());
}

void zero_absent(const Result& out, const std::vector<Expert>& experts, const Assignments& given, std::int64_t cols) {
    const std::vector<float> zeros(static_cast<std::size_t>(cols), 0.0f);
    for (std::int64_t i = 0; i < given.num; ++i) {
        const std::int64_t e = given.expert_ids[i];
        if (e < 0 || e >= static_cast<std::int64_t>(experts.size())) write_row(out, i, 0, cols, zeros.data());
    }
}

// Calls body with the first and the last of runs whose experts are in memory together, until all have had their turn.
template <class Body>
void for_present(const Experts& experts, const Sorted& sorted, Rows x, std::int64_t num_tokens, const Body& body) {
    const std::size_t total = sorted.runs.size();
    if (!experts.fetch) {
        body(std::size_t{0}, total);
        return;
    }
    std::vector<std::int64_t> numbers, num_rows;
    for (const Run& run : sorted.runs) {
        numbers.push_back(run.expert - experts.all.data());
        num_rows.push_back(run.stop - run.start);
    }
    for (std::size_t first = 0; first < total;) {
        const auto left = static_cast<std::int64_t>(total - first);
        const std::size_t num = experts.fetch({&numbers[first], &num_rows[first], left, x, num_tokens, true}).size();
        body(first, first + num);
        first += num;
    }
}

// Calls body with the runs whose experts are in memory, in whatever order they come, until all have had their turn.
template <class Body>
void as_they_come(const Experts& experts, const Sorted& sorted, Rows x, std::int64_t num_tokens, const Body& body) {
    std::vector<Run> left = sorted.runs;
    while (!left.empty()) {
        std::vector<std::int64_t> numbers, num_rows;
        for (const Run& run : left) {
            numbers.push_back(run.expert - experts.all.data());
            num_rows.push_back(run.stop - run.start);
        }
        const auto num = static_cast<std::int64_t>(left.size());
        std::vector<Run> come, rest;
        auto place = std::int64_t{0};
        const auto places = experts.fetch({numbers.data(), num_rows.data(), num, x, num_tokens, false});
        auto next = places.begin();
        for (const Run& run : left) {
            const bool is_here = next != places.end() && *next == place++;
            (is_here ? come : rest).push_back(run);
            if (is_here) ++next;
        }
        body(std::move(come));
        left = std::move(rest);
    }
}

// Each token's sum of weight times row, experts ascending: the additions of `Call::down`, one for one.
void sum_rows(const Way& way, const Assignments& given, const Sorted& sorted, const float* rows, std::int64_t width,
              Rows weights, Result out) {
    const std::int64_t step = 256, num = (width + step - 1) / step;
    const auto present = static_cast<std::int64_t>(sorted.order.size());
    Pool::shared().loop(num, threads_for(way, present * width * number_bytes), [&](std::int64_t p) {
        const std::int64_t first = p * step, count = std::min(step, width - first);
        float* sums = scratch().sums.of<float>(given.num_tokens * count);
        std::fill(sums, sums + given.num_tokens * count, 0.0f);
        for (const std::int64_t a : sorted.order) {
            const float weight = number_at(weights, a, 0);
            const float* row = rows + a * width + first;
            float* sum = sums + given.token(a) * count;
            for (std::int64_t c = 0; c < count; ++c) sum[c] += weight * row[c];
        }
        for (std::int64_t t = 0; t < given.num_tokens; ++t) write_row(out, t, first, count, sums + t * count);
    });
}

}  // namespace

void run_experts(const Way& way, const Experts& experts, const Assignments& assignments, Rows x, Rows weights,
                 const Activation& activation, Result out) {
    const auto hold = Pool::shared().hold();
    run_experts_held(way, experts, assignments, x, weights, activation, out);
}

void run_experts_held(const Way& way, const Experts& experts, const Assignments& assignments, Rows x, Rows weights,
                      const Activation& activation, Result out) {
    const Sorted sorted = sort_by_expert(experts.all, assignments);
    if (sorted.order.empty()) {
        write_zeros(out, assignments.num_tokens, experts.all.empty() ? 0 : experts.all[0].down.rows);
        return;
    }
    const std::int64_t width = experts.all[0].down.rows;
    if (experts.fetch && assignments.num * width * number_bytes <= experts.most_waiting_bytes) {
        static Room room;
        float* rows = room.of<float>(assignments.num * width);
        as_they_come(experts, sorted, x, assignments.num_tokens, [&](std::vector<Run> runs) {
            Call call(way, assignments, sorted, std::move(runs));
            call.up_and_activate(x, activation);
            call.down({}, {}, {rows, Number::f32, width});
        });
        sum_rows(way, assignments, sorted, rows, width, weights, out);
        return;
    }
    for_present(experts, sorted, x, assignments.num_tokens, [&](std::size_t first, std::size_t last) {
        Call call(way, assignments, sorted, first, last);
        call.up_and_activate(x, activation);
        call.down({}, weights, out);
    });
}

void run_up(const Way& way, const Experts& experts, const Assignments& assignments, Rows x, Result out) {
    const auto hold = Pool::shared().hold();
    const Sorted sorted = sort_by_expert(experts.all, assignments);
    if (!sorted.order.empty()) {
        for_present(experts, sorted, x, assignments.num_tokens, [&](std::size_t first, std::size_t last) {
            Call(way, assignments, sorted, first, last).up_only(x, out);
        });
    }
    zero_absent(out, experts.all, assignments, experts.all.empty() ? 0 : experts.all[0].up.rows);
}

void run_down(const Way& way, const Experts& experts, const Assignments& assignments, Rows hidden, Rows weights,
              Result out) {
    const auto hold = Pool::shared().hold();
    const Sorted sorted = sort_by_expert(experts.all, assignments);
    const std::int64_t cols = experts.all.empty() ? 0 : experts.all[0].down.rows;
    if (!sorted.order.empty()) {
        for_present(experts, sorted, {}, assignments.num_tokens, [&](std::size_t first, std::size_t last) {
            Call(way, assignments, sorted, first, last).down(hidden, weights, out);
        });
    }
    if (!weights.data) {
        zero_absent(out, experts.all, assignments, cols);
    } else if (sorted.order.empty()) {
        write_zeros(out, assignments.num_tokens, cols);
    }
}

}  // namespace mixtura
