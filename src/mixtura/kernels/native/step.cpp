#include "step.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "pool.hpp"
#include "work.hpp"

namespace mixtura {
namespace {

// Memory of a pass. Whoever uses it holds the pool.
struct Rooms {
    Room residual, normed, weight, queries, keys, values, biases, attended, made, logits, weights, ids, gate, up, prepared;
};
Rooms& rooms() {
    static Rooms all;
    return all;
}

void round_row(Number number, float* row, std::int64_t num) {
    if (number != Number::bf16) return;
    for (std::int64_t i = 0; i < num; ++i) row[i] = rounded_to_bf16(row[i]);
}

const float* read_x(const Pass& pass) {
    float* x = rooms().residual.of<float>(pass.tokens() * pass.width);
    read_row({pass.x, pass.number, 0}, 0, pass.tokens() * pass.width, x);
    return x;
}

// Rows of `norm.width` numbers, in place or elsewhere.
void normalize(const Pass& pass, const Norm& norm, const float* from, std::int64_t num, float* to) {
    float* weight = rooms().weight.of<float>(norm.width);
    read_row(norm.weight, 0, norm.width, weight);
    const bool rounds = pass.number == Number::bf16;
    const NormWay way = {norm.epsilon, norm.offset, rounds && !norm.rounds_once, rounds};
    for (std::int64_t i = 0; i < num; ++i) {
        pass.way.isa->normalize(from + i * norm.width, weight, norm.width, way, to + i * norm.width);
    }
}

// A product of all tokens with a matrix, rounded as a linear layer's output unless it stays as it is.
struct Product {
    const Linear* linear;
    float* out;
    bool rounds = true;
};

// Products of the same rows, in one loop over all of their weights.
void multiply(const Pass& pass, const float* x, const std::vector<Product>& products) {
    const std::int64_t cols = products[0].linear->matrix.cols, num = pass.tokens();
    Prepared inputs(pass.way, cols);
    std::vector<std::size_t> kernels;
    std::int64_t bytes = 0;
    for (const Product& product : products) {
        kernels.push_back(inputs.add(product.linear->matrix));
        bytes += product.linear->matrix.rows * bytes_of_row(product.linear->matrix);
    }
    inputs.reserve(rooms().prepared, num);
    Pool::shared().loop(num, threads_for(pass.way, num * cols * number_bytes),
                        [&](std::int64_t i) { inputs.prepare(i, x + i * cols); });
    struct Part {
        std::size_t product;
        std::int64_t first, count;
    };
    std::vector<Part> parts;
    for (std::size_t p = 0; p < products.size(); ++p) {
        const Matrix& m = products[p].linear->matrix;
        const std::int64_t step =
            rows_of_piece(m, m.rows, bytes_of_row(m), pass.way.threads, static_cast<std::int64_t>(products.size()));
        for (std::int64_t first = 0; first < m.rows; first += step) {
            parts.push_back({p, first, std::min(step, m.rows - first)});
        }
    }
    const auto num_parts = static_cast<std::int64_t>(parts.size());
    Pool::shared().loop(num_parts, threads_for(pass.way, num * bytes), [&](std::int64_t at) {
        const Part& part = parts[static_cast<std::size_t>(at)];
        const Product& product = products[part.product];
        const Matrix& m = product.linear->matrix;
        Later next;
        if (at + 1 < num_parts) {
            const Part& after = parts[static_cast<std::size_t>(at) + 1];
            next = {&products[after.product].linear->matrix, after.first};
        }
        for (std::int64_t start = 0; start < num; start += most_vectors) {
            const std::int64_t some = std::min(most_vectors, num - start);
            const unsigned char* rows[most_vectors];
            for (std::int64_t i = 0; i < some; ++i) rows[i] = inputs.vector(kernels[part.product], start + i);
            float* out = product.out + start * m.rows + part.first;
            inputs.kernel(kernels[part.product]).dot(m, part.first, part.count, rows, some, out, m.rows, next);
            for (std::int64_t i = 0; i < some; ++i) {
                add_bias(product.linear->bias, part.first, 1, part.count, out + i * m.rows);
                if (product.rounds) round_row(pass.number, out + i * m.rows, part.count);
            }
        }
    });
}

// out = x + made
void add_and_write(const Pass& pass, const float* x, const float* made) {
    float* row = rooms().normed.of<float>(pass.tokens() * pass.width);
    for (std::int64_t i = 0; i < pass.tokens() * pass.width; ++i) row[i] = x[i] + made[i];
    write_row({pass.out, pass.number, 0}, 0, 0, pass.tokens() * pass.width, row);
}

// One token's tables, an entry for each number of a head that is turned.
struct Turn {
    Rotation rotation = Rotation::none;
    std::int64_t half = 0;  // pairs of numbers
    bool rounds = false;
    const float* cosines = nullptr;
    const float* sines = nullptr;
};

Turn turn_of(const Pass& pass, const Place& place, Rotation rotation, std::int64_t token) {
    const std::int64_t width = place.table_width, row = token % pass.num + token / pass.num * place.table_by_sequence;
    float* tables = scratch().row.of<float>(2 * width);
    read_row(place.cosines, row, width, tables);
    read_row(place.sines, row, width, tables + width);
    const std::int64_t half = rotation == Rotation::halves_of_half_tables ? width : width / 2;
    return {rotation, half, pass.number == Number::bf16, tables, tables + width};
}

template <bool rounds>
void turn_halves(const Turn& turn, const float* second_cosines, const float* second_sines, float* head) {
    const auto rounded = [](float value) { return rounds ? rounded_to_bf16(value) : value; };
    for (std::int64_t i = 0; i < turn.half; ++i) {
        const float first = head[i], second = head[i + turn.half];
        head[i] = rounded(rounded(first * turn.cosines[i]) - rounded(second * turn.sines[i]));
        head[i + turn.half] = rounded(rounded(second * second_cosines[i]) + rounded(first * second_sines[i]));
    }
}

void turn_head(const Turn& turn, float* head) {
    if (turn.rotation == Rotation::none) return;
    if (turn.rotation == Rotation::halves || turn.rotation == Rotation::halves_of_half_tables) {
        const std::int64_t second = turn.rotation == Rotation::halves ? turn.half : 0;
        (turn.rounds ? turn_halves<true> : turn_halves<false>)(turn, turn.cosines + second, turn.sines + second, head);
        return;
    }
    const auto rounded = [&](float value) { return turn.rounds ? rounded_to_bf16(value) : value; };
    const bool by_one = turn.rotation == Rotation::pairs_by_first_half;
    for (std::int64_t i = 0; i < turn.half; ++i) {
        const std::int64_t one = by_one ? i : 2 * i, other = by_one ? i : 2 * i + 1;
        const float first = head[2 * i], second = head[2 * i + 1];
        head[2 * i] = rounded(rounded(first * turn.cosines[one]) - rounded(second * turn.sines[one]));
        head[2 * i + 1] = rounded(rounded(second * turn.cosines[other]) + rounded(first * turn.sines[other]));
    }
}

void normalize_heads(const Pass& pass, const Norm& norm, float* rows, std::int64_t width) {
    if (norm.weight.data) normalize(pass, norm, rows, pass.tokens() * width / norm.width, rows);
}

// Rows of queries, keys and values of all tokens, before they are turned.
struct Projected {
    float *queries, *keys, *values;
};

Projected project(const Pass& pass, const Attention& attention, const float* x, float* queries) {
    const std::int64_t num = pass.tokens();
    const std::int64_t q_width = attention.q.matrix.rows, kv_width = attention.k.matrix.rows;
    float* normed = rooms().normed.of<float>(num * pass.width);
    normalize(pass, attention.norm, x, num, normed);
    float* keys = rooms().keys.of<float>(num * kv_width);
    float* values = rooms().values.of<float>(num * kv_width);
    multiply(pass, normed, {{&attention.q, queries}, {&attention.k, keys}, {&attention.v, values}});
    normalize_heads(pass, attention.q_norm, queries, q_width);
    normalize_heads(pass, attention.k_norm, keys, kv_width);
    return {queries, keys, values};
}

// A head of keys and values of one sequence, and the queries that share it.
struct Head {
    std::int64_t sequence, number;
};

// Where a sequence stands, its keys and values from the first on.
Seat seat_of(const Pass& pass, const Place& place, std::int64_t sequence) {
    if (!place.seats.empty()) return place.seats[static_cast<std::size_t>(sequence)];
    const std::int64_t size = pass.number == Number::bf16 ? 2 : number_bytes;
    Seat seat = {place.keys, place.values, place.past};
    for (Cached* cached : {&seat.keys, &seat.values}) {
        cached->data = static_cast<char*>(cached->data) + size * sequence * cached->by_sequence;
    }
    return seat;
}

void turn_and_keep(const Pass& pass, const Attention& attention, const Place& place, const Projected& made, Head one) {
    const std::int64_t width = attention.head, kv_width = attention.k.matrix.rows, q_width = attention.q.matrix.rows;
    const std::int64_t group = q_width / kv_width;
    const Seat seat = seat_of(pass, place, one.sequence);
    for (std::int64_t i = 0; i < pass.num; ++i) {
        const std::int64_t t = one.sequence * pass.num + i, at = seat.past + i;
        const Turn turn = turn_of(pass, place, attention.rotation, t);
        float* queries = made.queries + t * q_width + one.number * group * width;
        for (std::int64_t g = 0; g < group; ++g) turn_head(turn, queries + g * width);
        float* key = made.keys + t * kv_width + one.number * width;
        turn_head(turn, key);
        const auto to = [&](const Cached& cached) {
            return one.number * cached.by_head + at * cached.by_token;
        };
        const float* value = made.values + t * kv_width + one.number * width;
        write_row({seat.keys.data, pass.number, 0}, 0, to(seat.keys), width, key);
        write_row({seat.values.data, pass.number, 0}, 0, to(seat.values), width, value);
    }
}

float bias_at(const Mask& mask, std::int64_t sequence, std::int64_t query, std::int64_t key) {
    const std::int64_t at = sequence * mask.by_sequence + query * mask.by_query + key * mask.by_key;
    if (mask.is_bytes) return static_cast<const bool*>(mask.data)[at] ? 0.0f : -std::numeric_limits<float>::infinity();
    return number_at({mask.data, mask.number, 0}, 0, at);
}

// What is added to the scores of each query of each sequence; null where that is nothing.
const float* biases_of(const Pass& pass, const Place& place) {
    const std::int64_t total = place.past + pass.num;
    const bool is_causal = !place.mask.data && pass.num > 1;
    if (!place.mask.data && !is_causal) return nullptr;
    float* biases = rooms().biases.of<float>(pass.tokens() * total);
    for (std::int64_t t = 0; t < pass.tokens(); ++t) {
        const std::int64_t query = t % pass.num;
        for (std::int64_t key = 0; key < total; ++key) {
            const bool later = key > place.past + query;
            biases[t * total + key] = !is_causal ? bias_at(place.mask, t / pass.num, query, key)
                                      : later    ? -std::numeric_limits<float>::infinity()
                                                 : 0.0f;
        }
    }
    return biases;
}

void attend_head(const Pass& pass, const Attention& attention, const Place& place, const float* biases,
                 const float* queries, Head item, float* attended) {
    const std::int64_t head = attention.head, q_width = attention.q.matrix.rows;
    const Seat seat = seat_of(pass, place, item.sequence);
    const std::int64_t group = q_width / attention.k.matrix.rows, total = seat.past + pass.num;
    const std::int64_t size = pass.number == Number::bf16 ? 2 : number_bytes;
    const auto from = [&](const Cached& cached) {
        return static_cast<const char*>(cached.data) + size * item.number * cached.by_head;
    };
    AttentionHead one;
    one.keys = from(seat.keys);
    one.values = from(seat.values);
    one.key_stride = seat.keys.by_token;
    one.value_stride = seat.values.by_token;
    one.num_keys = total;
    one.width = head;
    one.scaling = attention.scaling;
    one.is_bf16 = pass.number == Number::bf16;
    one.score_stride = (total + 15) / 16 * 16;
    one.scores = scratch().sums.of<float>(std::max(group, pass.num) * one.score_stride);
    // All heads of a single token, else all tokens of a head.
    const bool by_head = pass.num == 1;
    one.num_queries = by_head ? group : pass.num;
    one.query_stride = one.out_stride = by_head ? head : q_width;
    one.num_biases = by_head ? 1 : pass.num;
    if (biases) one.biases = biases + item.sequence * pass.num * total;
    for (std::int64_t g = 0; g < (by_head ? 1 : group); ++g) {
        const std::int64_t first = item.sequence * pass.num * q_width + (item.number * group + g) * head;
        one.queries = queries + first;
        one.out = attended + first;
        pass.way.isa->attend(one);
        if (by_head) round_row(pass.number, one.out, group * head);
    }
}

// Calls body with each head of keys and values, on as many threads as so much work for a head is worth.
template <class Body>
void for_heads(const Pass& pass, const Attention& attention, std::int64_t numbers_of_head, const Body& body) {
    const std::int64_t kv_heads = attention.k.matrix.rows / attention.head, num = pass.num_sequences * kv_heads;
    Pool::shared().loop(num, threads_for(pass.way, num * numbers_of_head * number_bytes),
                        [&](std::int64_t item) { body(Head{item / kv_heads, item % kv_heads}); });
}

std::int64_t numbers_turned(const Pass& pass, const Attention& attention) {
    // A number that is turned, rounded and written costs what several cost that are only read.
    constexpr std::int64_t worth = 8;
    return worth * pass.num * attention.head * (attention.q.matrix.rows / attention.k.matrix.rows + 2);
}

std::int64_t numbers_attended(const Pass& pass, const Attention& attention, const Place& place) {
    const std::int64_t queries = pass.num * attention.q.matrix.rows / attention.k.matrix.rows;
    return 2 * (place.past + pass.num) * attention.head * std::max<std::int64_t>(1, queries / 4);
}

// out = x + what was attended, multiplied by the last of the four matrices
void finish_attention(const Pass& pass, const Attention& attention, const float* x, float* attended) {
    if (pass.num > 1) round_row(pass.number, attended, pass.tokens() * attention.q.matrix.rows);
    float* made = rooms().made.of<float>(pass.tokens() * pass.width);
    multiply(pass, attended, {{&attention.o, made}});
    add_and_write(pass, x, made);
}

// Adds the shared expert's output to `made`, both rounded.
void add_shared(const Pass& pass, const Shared& shared, const float* normed, bool alone, float* made) {
    const std::int64_t num = pass.tokens(), width = shared.up.matrix.rows;
    float* up = rooms().up.of<float>(num * width);
    float* gate = rooms().gate.of<float>(num * width);
    float* switches = rooms().logits.of<float>(num);
    std::vector<Product> products = {{&shared.up, up}};
    if (shared.gate.matrix.rows) products.push_back({&shared.gate, gate});
    if (shared.switched.matrix.rows) products.push_back({&shared.switched, switches});
    multiply(pass, normed, products);
    float* hidden = shared.gate.matrix.rows ? gate : up;
    pass.way.isa->activate(shared.activation, hidden, up, num * width);
    float* out = rooms().keys.of<float>(num * pass.width);
    multiply(pass, hidden, {{&shared.down, out}});
    for (std::int64_t t = 0; t < num; ++t) {
        float* row = out + t * pass.width;
        if (shared.switched.matrix.rows) {
            const float factor = 1.0f / (1.0f + std::exp(-switches[t]));
            for (std::int64_t c = 0; c < pass.width; ++c) row[c] *= factor;
            round_row(pass.number, row, pass.width);
        }
        float* to = made + t * pass.width;
        for (std::int64_t c = 0; c < pass.width; ++c) to[c] = alone ? row[c] : to[c] + row[c];
        round_row(pass.number, to, pass.width);
    }
}

}  // namespace

bool fits(Rotation rotation, std::int64_t table_width, std::int64_t head) {
    return rotation == Rotation::none || (rotation == Rotation::halves_of_half_tables ? 2 : 1) * table_width <= head;
}

namespace {

void attend_held(const Pass& pass, const Attention& attention, const Place& place) {
    const std::int64_t q_width = attention.q.matrix.rows;
    const float* x = read_x(pass);
    const Projected made = project(pass, attention, x, rooms().queries.of<float>(pass.tokens() * q_width));
    const float* biases = biases_of(pass, place);
    float* attended = rooms().attended.of<float>(pass.tokens() * q_width);
    const std::int64_t numbers = numbers_turned(pass, attention) + numbers_attended(pass, attention, place);
    for_heads(pass, attention, numbers, [&](Head head) {
        turn_and_keep(pass, attention, place, made, head);
        attend_head(pass, attention, place, biases, made.queries, head, attended);
    });
    finish_attention(pass, attention, x, attended);
}

void mix_held(const Pass& pass, const Mixture& mixture, const Steered* steered = nullptr) {
    const std::int64_t num = pass.tokens();
    const float* x = read_x(pass);
    float* normed = rooms().attended.of<float>(num * pass.width);
    normalize(pass, mixture.norm, x, num, normed);
    float* made = rooms().made.of<float>(num * pass.width);
    const bool has_shared = mixture.shared.up.matrix.rows != 0;
    if (mixture.experts) {
        const Router& router = mixture.router;
        float* logits = rooms().logits.of<float>(num * router.gate.matrix.rows);
        multiply(pass, normed, {{&router.gate, logits, router.rounds_logits}});
        const std::int64_t each = steered ? steered->columns : router.top_k;
        auto* ids = rooms().ids.of<std::int64_t>(num * each);
        float* weights = rooms().weights.of<float>(num * each);
        choose(router, pass.number, logits, num, ids, weights, steered);
        if (mixture.loads) {
            for (std::int64_t i = 0; i < num * each; ++i) {
                if (ids[i] < router.gate.matrix.rows) ++mixture.loads[ids[i]];
            }
        }
        const Assignments assignments = {ids, nullptr, each, num * each, num};
        run_experts_held(pass.way, *mixture.experts, assignments, {normed, Number::f32, pass.width},
                         {weights, Number::f32, 1}, mixture.activation, {made, Number::f32, pass.width});
        round_row(pass.number, made, num * pass.width);
    }
    if (has_shared) add_shared(pass, mixture.shared, normed, !mixture.experts, made);
    add_and_write(pass, x, made);
}

}  // namespace

void run_attention(const Pass& pass, const Attention& attention, const Place& place) {
    const auto hold = Pool::shared().hold();
    attend_held(pass, attention, place);
}

void run_mixture(const Pass& pass, const Mixture& mixture) {
    const auto hold = Pool::shared().hold();
    mix_held(pass, mixture);
}

void run_layers(const Pass& pass, const std::vector<Step>& steps, const Norm& last) {
    const auto hold = Pool::shared().hold();
    Pass next = pass;
    for (const Step& step : steps) {
        attend_held(next, *step.attention, *step.place);
        next.x = next.out;
        mix_held(next, *step.mixture, step.steered);
    }
    float* normed = rooms().normed.of<float>(pass.tokens() * pass.width);
    normalize(next, last, read_x(next), pass.tokens(), normed);
    write_row({pass.out, pass.number, 0}, 0, 0, pass.tokens() * pass.width, normed);
}

void run_projections(const Pass& pass, const Attention& attention, const Place& place, float* queries) {
    const auto hold = Pool::shared().hold();
    const Projected made = project(pass, attention, read_x(pass), queries);
    for_heads(pass, attention, numbers_turned(pass, attention),
              [&](Head head) { turn_and_keep(pass, attention, place, made, head); });
}

void run_attending(const Pass& pass, const Attention& attention, const Place& place, const float* queries) {
    const auto hold = Pool::shared().hold();
    const float* biases = biases_of(pass, place);
    float* attended = rooms().attended.of<float>(pass.tokens() * attention.q.matrix.rows);
    for_heads(pass, attention, numbers_attended(pass, attention, place),
              [&](Head head) { attend_head(pass, attention, place, biases, queries, head, attended); });
    finish_attention(pass, attention, read_x(pass), attended);
}

}  // namespace mixtura
