// Instructions of a lane by itself.

#include <cmath>
#include <limits>

#include "state.h"

namespace ptx {
namespace {

struct Half {
    uint16_t v;
};
struct Brain {
    uint16_t v;
};
float wide(Half h) { return float(as<_Float16>(h.v)); }
float wide(Brain b) { return as<float>(uint64_t(b.v) << 16); }

// Rounded once, to nearest, ties to even.
Half to_half(double v) { return {uint16_t(bits(_Float16(v)))}; }
Brain to_brain(double v) {
    if (std::isnan(v)) return {0x7fff};
    float f = float(v);
    const double over = double(f) - v;  // to odd: a second rounding cannot go wrong then
    if (over != 0 && !std::isinf(f)) {
        if ((over > 0) == (v > 0)) f = std::nextafterf(f, 0.0f);
        f = as<float>(bits(f) | 1);
    }
    const uint32_t b = uint32_t(bits(f));
    return {uint16_t((uint64_t(b) + 0x7fff + (b >> 16 & 1)) >> 16)};
}
// a b + c of numbers of at most 11 bits, to odd in double.
double fused(double a, double b, double c) {
    const double p = a * b, s = p + c, t = s - p, e = (p - (s - t)) + (c - t);
    if (e == 0 || !std::isfinite(s)) return s;
    const double low = (e > 0) == (s > 0) ? s : std::nextafter(s, 0.0);
    return as<double>(bits(low) | 1);
}

template <class T, class F>
void one(Warp& w, const Inst& i, uint32_t lanes, F f) {
    uint64_t *d = w.of(i.at[0]), *a = w.of(i.at[1]);
    each(lanes, [&](int l) { d[l] = bits(f(as<T>(a[l]))); });
}
template <class T, class F>
void two(Warp& w, const Inst& i, uint32_t lanes, F f) {
    uint64_t *d = w.of(i.at[0]), *a = w.of(i.at[1]), *b = w.of(i.at[2]);
    each(lanes, [&](int l) { d[l] = bits(f(as<T>(a[l]), as<T>(b[l]))); });
}
template <class T, class F>
void three(Warp& w, const Inst& i, uint32_t lanes, F f) {
    uint64_t *d = w.of(i.at[0]), *a = w.of(i.at[1]), *b = w.of(i.at[2]), *c = w.of(i.at[3]);
    each(lanes, [&](int l) { d[l] = bits(f(as<T>(a[l]), as<T>(b[l]), as<T>(c[l]))); });
}
#define ONE(T, E) [](Warp& w, const Inst& i, uint32_t m) { one<T>(w, i, m, [](T a) { return E; }); }
#define TWO(T, E) [](Warp& w, const Inst& i, uint32_t m) { two<T>(w, i, m, [](T a, T b) { return E; }); }
#define THREE(T, E) [](Warp& w, const Inst& i, uint32_t m) { three<T>(w, i, m, [](T a, T b, T c) { return E; }); }

template <class T>
T smaller(T a, T b) {
    if constexpr (std::is_floating_point_v<T>)
        if (a == 0 && b == 0) return std::signbit(a) ? a : b;
    return a != a ? b : b != b ? a : b < a ? b : a;
}
template <class T>
T larger(T a, T b) {
    if constexpr (std::is_floating_point_v<T>)
        if (a == 0 && b == 0) return std::signbit(a) ? b : a;
    return a != a ? b : b != b ? a : a < b ? b : a;
}

template <class T>
void comparisons(Table& t, const std::string& type) {
#define COMPARE(NAME, E) t["setp." NAME "." + type] = TWO(T, uint8_t(E))
    COMPARE("eq", a == b), COMPARE("ne", a != b && a == a && b == b);
    COMPARE("lt", a < b), COMPARE("le", a <= b), COMPARE("gt", a > b), COMPARE("ge", a >= b);
    COMPARE("equ", !(a < b || a > b)), COMPARE("neu", !(a == b)), COMPARE("ltu", !(a >= b)), COMPARE("leu", !(a > b));
    COMPARE("gtu", !(a <= b)), COMPARE("geu", !(a < b)), COMPARE("num", a == a && b == b), COMPARE("nan", a != a || b != b);
}

template <class T, class W>
void integers(Table& t, const std::string& type) {
    using U = std::make_unsigned_t<T>;
    constexpr int N = 8 * sizeof(T);
    t["add." + type] = TWO(T, T(U(a) + U(b))), t["sub." + type] = TWO(T, T(U(a) - U(b)));
    t["mul.lo." + type] = TWO(T, T(uint64_t(a) * uint64_t(b)));
    if constexpr (sizeof(W) <= 8) t["mul.wide." + type] = TWO(T, W(W(a) * W(b)));
    t["mul.hi." + type] = TWO(T, T(W(a) * W(b) >> N));
    t["mad.lo." + type] = THREE(T, T(uint64_t(a) * uint64_t(b) + uint64_t(c)));
    t["mad.wide." + type] = [](Warp& w, const Inst& i, uint32_t m) {
        uint64_t *d = w.of(i.at[0]), *a = w.of(i.at[1]), *b = w.of(i.at[2]), *c = w.of(i.at[3]);
        each(m, [&](int l) { d[l] = uint64_t(W(as<T>(a[l])) * W(as<T>(b[l]))) + c[l]; });
    };
    t["div." + type] = TWO(T, b == 0 ? T(-1) : T(a / b)), t["rem." + type] = TWO(T, b == 0 ? a : T(a % b));
    t["neg." + type] = ONE(T, T(U(0) - U(a))), t["abs." + type] = ONE(T, T(a < 0 ? U(0) - U(a) : U(a)));
    t["min." + type] = TWO(T, smaller<T>(a, b)), t["max." + type] = TWO(T, larger<T>(a, b));
    t["shr." + type] = [](Warp& w, const Inst& i, uint32_t m) {
        uint64_t *d = w.of(i.at[0]), *a = w.of(i.at[1]), *b = w.of(i.at[2]);
        each(m, [&](int l) {
            const uint32_t by = uint32_t(b[l]);
            const T v = as<T>(a[l]);
            d[l] = bits(by < N ? T(v >> by) : T(v < 0 ? -1 : 0));
        });
    };
    comparisons<T>(t, type);
}

template <class T>
void logic(Table& t, const std::string& n) {
    constexpr uint32_t N = 8 * sizeof(T);
    t["and." + n] = TWO(T, T(a & b)), t["or." + n] = TWO(T, T(a | b)), t["xor." + n] = TWO(T, T(a ^ b)), t["not." + n] = ONE(T, T(~a));
    t["popc." + n] = ONE(T, uint32_t(__builtin_popcountll(a))), t["setp.eq." + n] = TWO(T, uint8_t(a == b));
    t["setp.ne." + n] = TWO(T, uint8_t(a != b));
    t["shl." + n] = [](Warp& w, const Inst& i, uint32_t m) {
        uint64_t *d = w.of(i.at[0]), *a = w.of(i.at[1]), *b = w.of(i.at[2]);
        each(m, [&](int l) { d[l] = uint32_t(b[l]) < N ? T(as<T>(a[l]) << uint32_t(b[l])) : 0; });
    };
    t["bfi." + n] = [](Warp& w, const Inst& i, uint32_t m) {
        uint64_t *d = w.of(i.at[0]), *a = w.of(i.at[1]), *b = w.of(i.at[2]), *c = w.of(i.at[3]), *e = w.of(i.at[4]);
        each(m, [&](int l) {
            const uint32_t at = c[l] & 255, count = e[l] & 255;
            const T ones = count >= N ? T(-1) : T((T(1) << count) - 1), mask = at >= N ? 0 : T(ones << at);
            d[l] = T((as<T>(b[l]) & ~mask) | (at >= N ? 0 : T(as<T>(a[l]) << at) & mask));
        });
    };
}

template <class T>
void floats(Table& t, const std::string& type) {
    for (const char* mode : {".", ".rn."}) {
        const std::string n = mode + type;
        t["add" + n] = TWO(T, a + b), t["sub" + n] = TWO(T, a - b), t["mul" + n] = TWO(T, a * b), t["div" + n] = TWO(T, a / b);
        t["fma" + n] = THREE(T, std::fma(a, b, c)), t["sqrt" + n] = ONE(T, std::sqrt(a)), t["rcp" + n] = ONE(T, T(1) / a);
    }
    t["neg." + type] = ONE(T, -a), t["abs." + type] = ONE(T, std::fabs(a)), t["copysign." + type] = TWO(T, std::copysign(b, a));
    t["min." + type] = TWO(T, smaller<T>(a, b)), t["max." + type] = TWO(T, larger<T>(a, b));
    comparisons<T>(t, type);
}

void select(Warp& w, const Inst& i, uint32_t m) {
    uint64_t *d = w.of(i.at[0]), *a = w.of(i.at[1]), *b = w.of(i.at[2]), *p = w.of(i.at[3]);
    each(m, [&](int l) { d[l] = p[l] & 1 ? a[l] : b[l]; });
}
template <class T>
void move(Warp& w, const Inst& i, uint32_t m) {
    one<T>(w, i, m, [](T a) { return a; });
}

// Of n equal parts, lowest first.
void pack(Warp& w, const Inst& i, uint32_t m) {
    const int n = int(i.at.size()) - 1, each_bits = 8 * i.width / n;
    each(m, [&](int l) {
        uint64_t v = 0;
        for (int k = 0; k < n; k++) v |= (w.of(i.at[1 + k])[l] & (~uint64_t(0) >> (64 - each_bits))) << each_bits * k;
        w.of(i.at[0])[l] = v;
    });
}
void unpack(Warp& w, const Inst& i, uint32_t m) {
    const int n = int(i.at.size()) - 1, each_bits = 8 * i.width / n;
    each(m, [&](int l) {
        const uint64_t v = w.of(i.at[n])[l];
        for (int k = 0; k < n; k++) w.of(i.at[k])[l] = v >> each_bits * k & (~uint64_t(0) >> (64 - each_bits));
    });
}

void lop3(Warp& w, const Inst& i, uint32_t m) {
    each(m, [&](int l) {
        const uint32_t a = uint32_t(w.of(i.at[1])[l]), b = uint32_t(w.of(i.at[2])[l]), c = uint32_t(w.of(i.at[3])[l]);
        const uint32_t table = uint32_t(w.of(i.at[4])[l]);
        uint32_t d = 0;
        for (int k = 0; k < 8; k++)
            if (table >> k & 1) d |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
        w.of(i.at[0])[l] = d;
    });
}
void prmt(Warp& w, const Inst& i, uint32_t m) {
    each(m, [&](int l) {
        const uint64_t both = uint64_t(uint32_t(w.of(i.at[2])[l])) << 32 | uint32_t(w.of(i.at[1])[l]);
        const uint32_t by = uint32_t(w.of(i.at[3])[l]);
        uint32_t d = 0;
        for (int k = 0; k < 4; k++) {
            const uint32_t of = by >> 4 * k & 15, byte = uint32_t(both >> 8 * (of & 7)) & 255;
            d |= (of & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * k;
        }
        w.of(i.at[0])[l] = d;
    });
}
uint32_t mask_of(uint32_t at, uint32_t count) {  // bmsk.clamp
    if (at >= 32) return 0;
    return uint32_t(((uint64_t(1) << (count > 32 ? 32 : count)) - 1) << at);
}

// Conversions. To whole numbers they saturate, NaN gives 0; between whole numbers they wrap.
double rounded(double v, const std::string& mode) {
    return mode == "rni" ? std::nearbyint(v) : mode == "rzi" ? std::trunc(v) : mode == "rmi" ? std::floor(v) : std::ceil(v);
}
template <class D, class S>
D converted(S v, const std::string& mode) {
    if constexpr (std::is_same_v<S, Half> || std::is_same_v<S, Brain>) {
        return converted<D>(wide(v), mode);
    } else if constexpr (std::is_same_v<D, Half>) {
        return to_half(double(v));
    } else if constexpr (std::is_same_v<D, Brain>) {
        return to_brain(double(v));
    } else if constexpr (std::is_floating_point_v<S> && std::is_integral_v<D>) {
        if (v != v) return 0;
        const double r = rounded(double(v), mode);
        if (r <= double(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
        return r >= std::ldexp(1.0, std::numeric_limits<D>::digits) ? std::numeric_limits<D>::max() : D(r);
    } else if constexpr (std::is_floating_point_v<D> && std::is_floating_point_v<S>) {
        if (mode.size() == 3) return D(rounded(double(v), mode));
        D r = D(v);
        if (mode == "rm" && S(r) > v) r = std::nextafter(r, -std::numeric_limits<D>::infinity());
        if (mode == "rp" && S(r) < v) r = std::nextafter(r, std::numeric_limits<D>::infinity());
        if (mode == "rz" && std::fabs(S(r)) > std::fabs(v)) r = std::nextafter(r, D(0));
        return r;
    } else {
        return D(v);
    }
}
template <class D, class S>
void convert(Warp& w, const Inst& i, uint32_t m) {
    static const std::string MODES[] = {"", "rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"};
    one<S>(w, i, m, [&](S v) { return converted<D>(v, MODES[i.width]); });
}
template <class D, class S>
void conversion(Table& t, const std::string& types) {
    t["cvt." + types] = convert<D, S>;
}
template <class D>
void conversions(Table& t, const std::string& to) {
    conversion<D, uint8_t>(t, to + ".u8"), conversion<D, int8_t>(t, to + ".s8"), conversion<D, uint16_t>(t, to + ".u16");
    conversion<D, int16_t>(t, to + ".s16"), conversion<D, uint32_t>(t, to + ".u32"), conversion<D, int32_t>(t, to + ".s32");
    conversion<D, uint64_t>(t, to + ".u64"), conversion<D, int64_t>(t, to + ".s64"), conversion<D, float>(t, to + ".f32");
    conversion<D, double>(t, to + ".f64"), conversion<D, Half>(t, to + ".f16"), conversion<D, Brain>(t, to + ".bf16");
}

#define PAIR(T, MAKE, E)                                                                        \
    [](uint32_t a_, uint32_t b_, uint32_t c_) {                                                 \
        const auto f = [](double a, double b, double c) { return uint32_t(MAKE(E).v); };       \
        const auto low = [](uint32_t v) { return double(wide(T{uint16_t(v)})); };              \
        return f(low(a_), low(b_), low(c_)) | f(low(a_ >> 16), low(b_ >> 16), low(c_ >> 16)) << 16; \
    }

}  // namespace

void add_arithmetic(Table& t) {
    integers<int16_t, int32_t>(t, "s16"), integers<uint16_t, uint32_t>(t, "u16"), integers<int32_t, int64_t>(t, "s32");
    integers<uint32_t, uint64_t>(t, "u32"), integers<int64_t, __int128>(t, "s64"), integers<uint64_t, unsigned __int128>(t, "u64");
    for (const char* n : {"16", "32", "64"}) t[std::string("shr.b") + n] = t[std::string("shr.u") + n];
    logic<uint16_t>(t, "b16"), logic<uint32_t>(t, "b32"), logic<uint64_t>(t, "b64");
    floats<float>(t, "f32"), floats<double>(t, "f64");
    t["rcp.approx.ftz.f32"] = ONE(float, std::fabs(a) < 0x1p-126f ? std::copysign(INFINITY, a) : [](float y) {
        return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y;
    }(1.0f / a));
    for (const std::string n : {"16", "32", "64"})
        for (const std::string k : {"b", "u", "s", "f"})
            t["selp." + k + n] = select, t["mov." + k + n] = n[0] == '1' ? move<uint16_t> : n[0] == '3' ? move<uint32_t> : move<uint64_t>;
    t["mov.pred"] = ONE(uint8_t, uint8_t(a & 1)), t["not.pred"] = ONE(uint8_t, uint8_t(!(a & 1)));
    t["and.pred"] = TWO(uint8_t, uint8_t(a & b & 1)), t["or.pred"] = TWO(uint8_t, uint8_t((a | b) & 1));
    t["xor.pred"] = TWO(uint8_t, uint8_t((a ^ b) & 1));
    t["pack"] = pack, t["unpack"] = unpack, t["lop3.b32"] = lop3, t["prmt.b32"] = prmt, t["bmsk.clamp.b32"] = TWO(uint32_t, mask_of(a, b));
    conversions<uint8_t>(t, "u8"), conversions<int8_t>(t, "s8"), conversions<uint16_t>(t, "u16"), conversions<int16_t>(t, "s16");
    conversions<uint32_t>(t, "u32"), conversions<int32_t>(t, "s32"), conversions<uint64_t>(t, "u64"), conversions<int64_t>(t, "s64");
    conversions<float>(t, "f32"), conversions<double>(t, "f64"), conversions<Half>(t, "f16"), conversions<Brain>(t, "bf16");
    // The first given is the high half.
    t["cvt.bf16x2.f32"] = TWO(float, (uint32_t(to_brain(a).v) << 16 | to_brain(b).v));
    t["cvt.f16x2.f32"] = TWO(float, (uint32_t(to_half(a).v) << 16 | to_half(b).v));
    t["fma.rn.bf16x2"] = THREE(uint32_t, (PAIR(Brain, to_brain, fused(a, b, c))(a, b, c)));
    t["add.rn.f16x2"] = TWO(uint32_t, (PAIR(Half, to_half, a + b)(a, b, 0)));
    t["max.u16x2"] = TWO(uint32_t, (larger(a >> 16, b >> 16) << 16 | larger(a & 65535, b & 65535)));
}

}  // namespace ptx
