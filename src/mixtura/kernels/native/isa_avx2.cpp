#define MIXTURA_ISA avx2
#include "isa.hpp"

namespace mixtura {

const Isa& isa_avx2() {
    static constexpr Isa isa = {
        "avx2", [](const Matrix& matrix, Inputs) { return avx2::find_float(matrix); }, avx2::activate,
                                avx2::attend, avx2::normalize, avx2::search_trellis, avx2::decode_strip};
    return isa;
}

}  // namespace mixtura
