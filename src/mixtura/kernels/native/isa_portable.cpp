#define MIXTURA_ISA portable
#include "isa.hpp"

namespace mixtura {

const Isa& isa_portable() {
    static constexpr Isa isa = {
        "portable", [](const Matrix& matrix, Inputs) { return portable::find_float(matrix); }, portable::activate,
                                portable::attend, portable::normalize, portable::search_trellis, portable::decode_strip};
    return isa;
}

}  // namespace mixtura
