// What Python sees of `step.hpp`.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>

#include "records.hpp"
#include "step.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace mixtura {
namespace {

Linear make_linear(const Matrix& matrix, const Strided& bias) { return {matrix, bias.rows()}; }

Norm make_norm(const Strided& weight, std::int64_t width, float epsilon, float offset, bool rounds_once) {
    return {weight.rows(), width, epsilon, offset, rounds_once};
}

Place make_place(const Strided& cosines, const Strided& sines, std::int64_t table_width,
                 std::int64_t table_by_sequence, const Cached& keys, const Cached& values, std::int64_t past,
                 const Mask& mask) {
    return {cosines.rows(), sines.rows(), table_width, table_by_sequence, keys, values, past, mask, {}};
}

Pass make_pass(const Way& way, int number, std::int64_t num_sequences, std::int64_t num, std::int64_t width,
               Address x, Address out) {
    return {way, static_cast<Number>(number), num_sequences, num, width, at<const void>(x), at<void>(out)};
}

void bind_records(nb::module_& m) {
    nb::class_<Linear>(m, "Linear").def(nb::init<>()).def("__init__", [](Linear* self, const Matrix& matrix, const Strided& bias) {
        new (self) Linear(make_linear(matrix, bias));
    });
    nb::class_<Norm>(m, "Norm").def(nb::init<>()).def("__init__", [](Norm* self, const Strided& weight, std::int64_t width, float epsilon, float offset, bool rounds_once) {
        new (self) Norm(make_norm(weight, width, epsilon, offset, rounds_once));
    });
    nb::class_<Cached>(m, "Cached").def("__init__", [](Cached* self, Address data, std::int64_t by_sequence, std::int64_t by_head, std::int64_t by_token) {
        new (self) Cached{at<void>(data), by_sequence, by_head, by_token};
    });
    nb::class_<Mask>(m, "Mask").def(nb::init<>()).def("__init__", [](Mask* self, Address data, bool is_bytes, int number, std::int64_t by_sequence, std::int64_t by_query, std::int64_t by_key) {
        new (self) Mask{at<const void>(data), is_bytes, static_cast<Number>(number), by_sequence, by_query, by_key};
    });
    nb::class_<Place>(m, "Place").def("__init__", [](Place* self, const Strided& cosines, const Strided& sines, std::int64_t table_width, std::int64_t table_by_sequence, const Cached& keys, const Cached& values, std::int64_t past, const Mask& mask) {
        new (self) Place(make_place(cosines, sines, table_width, table_by_sequence, keys, values, past, mask));
    }).def("seat", [](Place& self, const Cached& keys, const Cached& values, std::int64_t past) {
        self.seats.push_back({keys, values, past});
        self.past = std::max(self.past, past);
    });
    nb::class_<Pass>(m, "Pass").def("__init__", [](Pass* self, const Way& way, int number, std::int64_t num_sequences, std::int64_t num, std::int64_t width, Address x, Address out) {
        new (self) Pass(make_pass(way, number, num_sequences, num, width, x, out));
    });
}

// Copies the rows of a table that ids name; false, and nothing done, where one names none.
bool look_up(Address table, std::int64_t row_bytes, std::int64_t num_rows, Address ids, std::int64_t num, Address out) {
    const std::int64_t* const first = at<const std::int64_t>(ids);
    if (std::any_of(first, first + num, [&](std::int64_t id) { return id < 0 || id >= num_rows; })) return false;
    for (std::int64_t i = 0; i < num; ++i) {
        std::memcpy(at<char>(out) + i * row_bytes, at<const char>(table) + first[i] * row_bytes,
                    static_cast<std::size_t>(row_bytes));
    }
    return true;
}

void check(const Pass& pass, const Attention& attention, const Place& place) {
    if (!place.seats.empty() && (static_cast<std::int64_t>(place.seats.size()) != pass.num_sequences || place.mask.data || pass.num != 1)) {
        throw std::invalid_argument("sequences with caches of their own take one token each, without a mask");
    }
    if (!fits(attention.rotation, place.table_width, attention.head)) {
        throw std::invalid_argument("tables of cosines are wider than a head");
    }
}

// How a token's places are counted that a steering may name, or what is wrong with it.
void check(const Pass& pass, const Mixture& mixture, const Steered& steered) {
    const std::int64_t num_experts = mixture.router.gate.matrix.rows, k = mixture.router.top_k;
    if (!mixture.experts || steered.num != pass.tokens() || steered.num_experts != num_experts) {
        throw std::invalid_argument("a steering is of other tokens or experts");
    }
    std::int64_t most = k;
    for (std::int64_t t = 0; steered.ranks && t < steered.num; ++t) {
        if (steered.ranks[2 * t] < 0) throw std::invalid_argument("places are counted from 0");
        most = std::max(most, std::min(steered.ranks[2 * t + 1], num_experts));
    }
    if (steered.columns < most || steered.columns > num_experts) {
        throw std::invalid_argument("a steering has too few columns for its places, or too many");
    }
}

Steered make_steered(std::int64_t num, std::int64_t num_experts, std::int64_t columns, const nb::dict& given) {
    Steered made;
    made.num = num, made.num_experts = num_experts, made.columns = columns;
    const auto set = [&](const char* name, auto& field) {
        if (given.contains(name)) field = at<std::remove_reference_t<decltype(*field)>>(nb::cast<Address>(given[name]));
    };
    set("logits", made.logits), set("spread", made.spread), set("highest", made.highest), set("mixture", made.mixture);
    set("share", made.share), set("bias", made.bias), set("allowed", made.allowed), set("ranks", made.ranks);
    set("least", made.least), set("scale", made.scale), set("kept", made.kept);
    return made;
}

void bind_parts(nb::module_& m) {
    nb::class_<Steered>(m, "Steered").def("__init__", [](Steered* self, std::int64_t num, std::int64_t num_experts, std::int64_t columns, const nb::dict& given) {
        new (self) Steered(make_steered(num, num_experts, columns, given));
    });
    nb::class_<Attention>(m, "Attention").def("__init__", [](Attention* self, const Norm& norm, const Norm& q_norm, const Norm& k_norm, const Linear& q, const Linear& k, const Linear& v, const Linear& o, std::int64_t head, float scaling, int rotation) {
        new (self) Attention{norm, q_norm, k_norm, q, k, v, o, head, scaling, static_cast<Rotation>(rotation)};
    });
    nb::class_<Router>(m, "Router").def(nb::init<>()).def("__init__", [](Router* self, const Linear& gate, const Strided& correction, std::int64_t top_k, int scores, bool normed, float scale, bool rounds_logits, bool rounds_weights) {
        if (top_k < 1 || top_k > gate.matrix.rows) throw std::invalid_argument("a router chooses some of its experts");
        new (self) Router{gate, correction.rows(), top_k, static_cast<Scores>(scores), normed, scale, rounds_logits, rounds_weights};
    });
    nb::class_<Shared>(m, "Shared").def(nb::init<>()).def("__init__", [](Shared* self, const Linear& gate, const Linear& up, const Linear& down, const Linear& switched, const Activation& activation) {
        new (self) Shared{gate, up, down, switched, activation};
    });
    nb::class_<Mixture>(m, "Mixture")
        .def("__init__", [](Mixture* self, const Norm& norm, const Router& router, const Layer* experts, const Activation& activation, const Shared& shared) {
            new (self) Mixture{norm, router, experts ? &experts->experts : nullptr, activation, shared, nullptr};
        }, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::keep_alive<1, 4>())
        .def("count", [](Mixture& self, Address loads) { self.loads = at<std::int64_t>(loads); });
}

}  // namespace

void bind_step(nb::module_& m) {
    bind_records(m);
    bind_parts(m);
    m.def("run_attention", [](const Pass& pass, const Attention& attention, const Place& place) {
        check(pass, attention, place);
        nb::gil_scoped_release released;
        run_attention(pass, attention, place);
    });
    m.def("run_projections", [](const Pass& pass, const Attention& attention, const Place& place, Address queries) {
        check(pass, attention, place);
        nb::gil_scoped_release released;
        run_projections(pass, attention, place, at<float>(queries));
    });
    m.def("run_attending", [](const Pass& pass, const Attention& attention, const Place& place, Address queries) {
        check(pass, attention, place);
        nb::gil_scoped_release released;
        run_attending(pass, attention, place, at<const float>(queries));
    });
    m.def("run_mixture", [](const Pass& pass, const Mixture& mixture) {
        nb::gil_scoped_release released;
        run_mixture(pass, mixture);
    });
    m.def("run_layers", [](const Pass& pass, const nb::list& given, const Norm& last) {
        std::vector<Step> steps;
        for (const nb::handle one : given) {
            const Steered* const steered = one[3].is_none() ? nullptr : nb::cast<const Steered*>(one[3]);
            const Step step = {nb::cast<const Attention*>(one[0]), nb::cast<const Mixture*>(one[1]), nb::cast<const Place*>(one[2]), steered};
            check(pass, *step.attention, *step.place);
            if (steered) check(pass, *step.mixture, *steered);
            steps.push_back(step);
        }
        nb::gil_scoped_release released;
        run_layers(pass, steps, last);
    });
    m.def("look_up", &look_up, "table"_a, "row_bytes"_a, "num_rows"_a, "ids"_a, "num"_a, "out"_a);
    m.def("choose", [](const Router& router, int number, Address logits, std::int64_t num, Address ids, Address weights) {
        choose(router, static_cast<Number>(number), at<const float>(logits), num, at<std::int64_t>(ids), at<float>(weights));
    });
}

}  // namespace mixtura
