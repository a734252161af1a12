// The codes of quant/affine.py on the grids of ranges.h, operation by operation: the same bits as torch makes.

#pragma once

#include "exact.h"
#include "ranges.h"

namespace {

using namespace ranges;
using Bytes __attribute__((vector_size(8))) = uint8_t;

INLINE Floats magnitude(Floats v) { return (Floats)((Ints)v & 0x7fffffff); }

// The first `count` lanes, 0 after them.
INLINE Floats first(Floats v, int64_t count) {
    Floats kept{};
    std::memcpy(&kept, &v, count * sizeof(float));
    return kept;
}

// A group's affine in every lane, and what it needs to round. REAL: zeros are real numbers of codes; MINIMUM: they are values.
enum Kind { WHOLE, REAL, MINIMUM };

INLINE Kind kind_of(int64_t grid) { return grid == HQQ ? REAL : grid == KIVI ? MINIMUM : WHOLE; }

template <Kind KIND>
struct Lanes {
    Floats scale, zero, top, round = all(ROUND);

    INLINE Lanes(Affine g, int64_t bits) : scale(all(g.scale)), zero(all(g.zero)), top(all(float((1 << bits) - 1))) {
        // A group of equal values has scale 0: its codes are 0.
        if (KIND == MINIMUM && g.scale == 0) top = Floats{}, divisor = all(1.0f);
        else divisor = scale;
    }

    INLINE Floats code(Floats v) const {
        if (KIND == WHOLE) return least(greatest(((v / divisor + round) - round) + zero, Floats{}), top);
        if (KIND == REAL) return least(greatest(((v / divisor + zero) + round) - round, Floats{}), top);
        return (least(greatest((v - zero) / divisor, Floats{}), top) + round) - round;
    }
    INLINE Floats value(Floats code) const { return KIND == MINIMUM ? code * scale + zero : (code - zero) * scale; }

   private:
    Floats divisor;
};

// Eight codes at a time as a stream of bits, the lowest first; `count` codes from a multiple of eight on.
inline void pack(const uint8_t* codes, int64_t count, int64_t bits, uint8_t* to) {
    for (int64_t i = 0; i < count; i += 8, to += bits) {
        const int64_t some = std::min<int64_t>(8, count - i);
        uint64_t word = 0;
        for (int64_t l = 0; l < some; l++) word |= uint64_t(codes[i + l]) << (bits * l);
        for (int64_t byte = 0; byte < (some * bits + 7) / 8; byte++) to[byte] = uint8_t(word >> (8 * byte));
    }
}

}  // namespace
