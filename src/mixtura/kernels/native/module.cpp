// What Python sees: addresses and sizes in, nothing held, the interpreter free while work is done.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "experts.hpp"
#include "records.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace mixtura {
namespace {

// The sets this processor has, the best last.
std::vector<const Isa*> available() {
    std::vector<const Isa*> found = {&isa_portable()};
#if defined(MIXTURA_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool pairs =
        avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512vbmi");
    if (avx2) found.push_back(&isa_avx2());
    if (avx512) found.push_back(&isa_avx512());
    if (pairs) found.push_back(&isa_avx512_bf16());
#endif
    return found;
}

const Isa& isa_named(const std::string& name) {
    static const std::vector<const Isa*> all = available();
    if (name.empty()) return *all.back();
    for (const Isa* isa : all) {
        if (name == isa->name) return *isa;
    }
    throw std::invalid_argument("this processor does not have the instruction set " + name);
}

std::vector<std::string> isa_names() {
    std::vector<std::string> names;
    for (const Isa* isa : available()) names.emplace_back(isa->name);
    return names;
}

Way make_way(const std::string& isa, int inputs, int threads) {
    if (inputs < 0 || inputs >= num_inputs) throw std::invalid_argument("unknown kind of inputs");
    return {&isa_named(isa), static_cast<Inputs>(inputs), threads < 1 ? 1 : threads};
}

Matrix make_matrix(int format, Address data, Address scales, std::int64_t rows, std::int64_t cols,
                   std::int64_t row_bytes, std::int64_t row_scales, std::int64_t group, bool transposed,
                   const std::vector<Address>& lower, Address table, int rate) {
    if (format < 0 || format >= num_formats) throw std::invalid_argument("unknown format");
    const auto known = static_cast<Format>(format);
    const bool plain = known == Format::f32 || known == Format::bf16;
    if (rows < 1 || cols < 1) throw std::invalid_argument("a matrix needs rows and columns");
    if (transposed && !plain) throw std::invalid_argument("only plain numbers can lie transposed");
    if (!plain && (scales == 0 || group < 1 || (known != Format::trellis && row_scales < (cols + group - 1) / group))) {
        throw std::invalid_argument("codes need a scale for each group");
    }
    const bool is_trellis = known == Format::trellis;
    if (is_trellis != (table != 0) || (is_trellis && (rate < 8 || rate > 48))) {
        throw std::invalid_argument("a trellis needs its table and a rate, and nothing else does");
    }
    const std::size_t planes = known == Format::n8 ? 4 : known == Format::n4 ? 2 : 1;
    if (lower.size() != planes - 1) throw std::invalid_argument("nested codes need all of their planes");
    Matrix made{at<const unsigned char>(data), at<const std::uint16_t>(scales), rows, cols, row_bytes,
                plain ? 0 : row_scales, group, known, transposed};
    for (std::size_t p = 0; p < lower.size(); ++p) made.lower[p] = at<const unsigned char>(lower[p]);
    made.table = at<const std::int8_t>(table);
    made.rate = rate;
    return made;
}

// Experts come from a Python function, which must not run kernels: the pool is held while it works.
void set_fetch(Layer& layer, nb::callable fetch, std::int64_t most_waiting_bytes) {
    layer.experts.most_waiting_bytes = most_waiting_bytes;
    layer.experts.fetch = [fetch = std::move(fetch)](const Need& need) {
        nb::gil_scoped_acquire acquired;
        const std::vector<std::int64_t> experts(need.experts, need.experts + need.num);
        const std::vector<std::int64_t> num_rows(need.num_rows, need.num_rows + need.num);
        const nb::object come = fetch(experts, num_rows, reinterpret_cast<Address>(need.x.data),
                                      static_cast<int>(need.x.number), need.x.stride, need.num_tokens, need.in_order);
        const auto places = nb::cast<std::vector<std::int64_t>>(come);
        bool known = !places.empty() && places.front() >= 0 && places.back() < need.num;
        for (std::size_t i = 1; i < places.size(); ++i) known = known && places[i - 1] < places[i];
        if (known && need.in_order) known = places.back() + 1 == static_cast<std::int64_t>(places.size());
        if (!known) throw std::runtime_error("a store must bring at least one of the experts, ascending");
        return places;
    };
}

}  // namespace
}  // namespace mixtura

NB_MODULE(_native, m) {
    using namespace mixtura;
    // Records live in caches that Python does not empty before it ends.
    nb::set_leak_warnings(false);
    m.doc() = "Kernels for matrices of weights and few inputs; see mixtura.kernels.native.";
    nb::class_<Way>(m, "Way").def("__init__", [](Way* self, const std::string& isa, int inputs, int threads) {
        new (self) Way(make_way(isa, inputs, threads));
    }, "isa"_a, "inputs"_a, "threads"_a);
    nb::class_<Matrix>(m, "Matrix")
        .def("__init__",
             [](Matrix* self, int format, Address data, Address scales, std::int64_t rows, std::int64_t cols,
                std::int64_t row_bytes, std::int64_t row_scales, std::int64_t group, bool transposed,
                const std::vector<Address>& lower, Address table, int rate) {
                 new (self) Matrix(make_matrix(format, data, scales, rows, cols, row_bytes, row_scales, group,
                                               transposed, lower, table, rate));
             },
             "format"_a, "data"_a, "scales"_a, "rows"_a, "cols"_a, "row_bytes"_a, "row_scales"_a, "group"_a,
             "transposed"_a, "lower"_a = std::vector<Address>(), "table"_a = Address{0}, "rate"_a = 0);
    nb::class_<Activation>(m, "Activation")
        .def("__init__",
             [](Activation* self, int curve, bool gated, bool interleaved, float slope, float limit, float offset) {
                 new (self) Activation{static_cast<Curve>(curve), gated, interleaved, slope, limit, offset};
             },
             "curve"_a, "gated"_a, "interleaved"_a, "slope"_a, "limit"_a, "offset"_a);
    nb::class_<Assigned>(m, "Assignments")
        .def(nb::init<Address, Address, std::int64_t, std::int64_t, std::int64_t>(), "expert_ids"_a, "token_ids"_a,
             "per_token"_a, "num"_a, "num_tokens"_a);
    nb::class_<Strided>(m, "Rows").def(nb::init<Address, int, std::int64_t>(), "data"_a, "number"_a, "stride"_a);
    nb::class_<Layer>(m, "Layer")
        .def(nb::init<>())
        .def_prop_ro("num_experts", [](const Layer& self) { return self.experts.all.size(); })
        .def("add", &Layer::add, "up"_a, "down"_a, "up_bias"_a, "down_bias"_a, "bias_number"_a)
        .def("add_all", &Layer::add_all, "num"_a, "up"_a, "up_bytes"_a, "down"_a, "down_bytes"_a, "up_bias"_a,
             "up_bias_bytes"_a, "down_bias"_a, "down_bias_bytes"_a, "bias_number"_a)
        .def("shift", &Layer::shift, "expert"_a, "bytes"_a)
        .def("set_fetch", &set_fetch, "fetch"_a, "most_waiting_bytes"_a);
    bind_step(m);
    bind_watch(m);
    m.def("isas", &isa_names);
    m.def("linear", [](const Way& way, const Matrix& matrix, const Strided& bias, const Strided& x, std::int64_t num,
                       const Strided& out) {
        nb::gil_scoped_release released;
        linear(way, matrix, bias.rows(), x.rows(), num, out.result());
    });
    m.def("run_experts", [](const Way& way, const Layer& layer, const Assigned& assigned, const Strided& x,
                            const Strided& weights, const Activation& activation, const Strided& out) {
        nb::gil_scoped_release released;
        run_experts(way, layer.experts, assigned.get(), x.rows(), weights.rows(), activation, out.result());
    });
    m.def("run_up", [](const Way& way, const Layer& layer, const Assigned& assigned, const Strided& x,
                       const Strided& out) {
        nb::gil_scoped_release released;
        run_up(way, layer.experts, assigned.get(), x.rows(), out.result());
    });
    m.def("run_down", [](const Way& way, const Layer& layer, const Assigned& assigned, const Strided& hidden,
                         const Strided& weights, const Strided& out) {
        nb::gil_scoped_release released;
        run_down(way, layer.experts, assigned.get(), hidden.rows(), weights.rows(), out.result());
    });
    m.def("search_trellis", [](const std::string& isa, Address weights, Address originals, Address scales, Address feedback,
                               std::int64_t feedback_stride, Address left, Address codes, Address table, int rate,
                               std::int64_t rows, std::int64_t cols) {
        if (rate < 8 || rate > 48 || rows % 64 != 0) throw std::invalid_argument("no trellis has this rate or these rows");
        nb::gil_scoped_release released;
        isa_named(isa).search_trellis({at<float>(weights), at<const float>(originals), at<const float>(scales), at<const float>(feedback),
                                       at<float>(left), at<std::uint8_t>(codes), at<const std::int8_t>(table), rows,
                                       cols, feedback_stride, rate});
    }, "isa"_a, "weights"_a, "originals"_a, "scales"_a, "feedback"_a, "feedback_stride"_a, "left"_a, "codes"_a, "table"_a, "rate"_a,
       "rows"_a, "cols"_a);
    m.def("decode", [](const Way& way, const Matrix& matrix, const Strided& out) {
        if (matrix.format != Format::trellis) throw std::invalid_argument("only a trellis is decoded here");
        nb::gil_scoped_release released;
        decode(way, matrix, out.result());
    });
    m.def("read_all", [](Address data, std::int64_t bytes, int threads) {
        nb::gil_scoped_release released;
        return read_all(at<const unsigned char>(data), bytes, threads);
    });
    m.def("evict", [](Address data, std::int64_t bytes) { evict(at<const unsigned char>(data), bytes); });
}
