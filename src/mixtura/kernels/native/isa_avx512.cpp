#define MIXTURA_ISA avx512
#include "isa.hpp"

namespace mixtura {

const Isa& isa_avx512() {
    static constexpr Isa isa = {
        "avx512", [](const Matrix& matrix, Inputs) { return avx512::find_float(matrix); }, avx512::activate,
                                avx512::attend, avx512::normalize, avx512::search_trellis, avx512::decode_strip};
    return isa;
}

}  // namespace mixtura
