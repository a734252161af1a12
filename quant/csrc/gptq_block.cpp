// One block of the GPTQ column solver: round a column, spread its error over the later columns of the block.
// The twin of quant/kernels/gptq_block/reference.py, but that an error times the factor is taken off by one operation, rounded once
// (docs/adr/0027-the-block-fuses-on-cpus.md): what `plain_loop` of tests/quant/plain_loop.py gives, bit for bit.
//
// Plain C ABI. Column-major: block, codes (bytes), values, errors are [B, N] (a column's N rows lie together), upper is [B, B] with
// `stride` numbers from row to row, scale and zero are [G, N], group is [B] (row of scale and zero of each column). tops is [N], the
// largest code of each row, or null: then it is top in all. kind: how codes and values belong together, see `Kind`. words is [N], or null:
// of each row how its ranges are found, see `ranges::Fit`; scale and zero are written to then, and odd is added to. For float alone.
// block is not changed. threads >= 1: rows are independent of each other. form: see `Form`; one that works here, or BEST.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "gptq_stripe.h"

namespace {

// The last rows of a block, which fill no stripe, in memory of their own that does.
template <typename T>
struct Padded {
    const Block<T>& b;
    const int64_t first, count, all, groups = *std::max_element(b.group, b.group + b.columns) + 1;
    std::vector<T> block, scale, zero, tops, values, errors;
    std::vector<uint8_t> codes;

    Padded(const Block<T>& b, int64_t first, int64_t count, int64_t all) : b(b), first(first), count(count), all(all) {
        block = rows_of(b.block, b.columns, T(0));
        scale = rows_of(b.scale, groups, T(1)), zero = rows_of(b.zero, groups, T(0));
        if (b.tops) tops = rows_of(b.tops, 1, T(0));
        codes.resize(block.size());
        for (std::vector<T>* made : {&values, &errors}) made->resize(block.size());
    }

    std::vector<T> rows_of(const T* from, int64_t columns, T otherwise) const {
        std::vector<T> made(columns * all, otherwise);
        for (int64_t j = 0; j < columns; j++) std::copy_n(from + j * b.rows + first, count, made.data() + j * all);
        return made;
    }

    Block<T> whole() {
        Block<T> made = b;
        made.block = block.data(), made.scale = scale.data(), made.zero = zero.data(), made.tops = b.tops ? tops.data() : nullptr;
        made.codes = codes.data(), made.values = values.data(), made.errors = errors.data(), made.rows = all;
        return made;
    }

    void give_back() const {
        for (int64_t j = 0; j < b.columns; j++) {
            const int64_t from = j * all, to = j * b.rows + first;
            std::copy_n(codes.data() + from, count, b.codes + to);
            std::copy_n(values.data() + from, count, b.values + to);
            std::copy_n(errors.data() + from, count, b.errors + to);
        }
    }
};

template <typename T, int W>
INLINE void found_and_solved(const Block<T>& b, const T* panels, int64_t first, int64_t count, T* own) {
    constexpr int64_t all = ROWS<T, W>;
    if constexpr (std::is_same_v<T, float>)
        if (b.words) Finding<W>{b, first, count}.find();
    if (count == all) {
        Stripe<T, W>(b, first, own).solve(panels);
        return;
    }
    Padded<T> padded(b, first, count, all);
    const Block<T> whole = padded.whole();
    Stripe<T, W>(whole, 0, own).solve(panels);
    padded.give_back();
}

constexpr int64_t RUN = 4;  // neighbouring stripes that one thread takes together

// LANES calls a library's function for each number where the compiler knows no instruction: right, and for tests alone there.
enum Form : int64_t { BEST = 0, LANES = 1, AVX2 = 2, AVX512 = 3 };

template <typename T>
using Run = void (*)(const Block<T>&, const T*, int64_t, int64_t, T*);

// How rows are solved, how many at a time, and in panels of how many columns.
template <typename T>
struct Way {
    Run<T> run;
    int64_t rows, columns;
};

#define WAYS(NAME, TARGET, W)                                                                                                              \
    TARGET void NAME(const Block<float>& b, const float* panels, int64_t first, int64_t count, float* own) {                               \
        found_and_solved<float, W>(b, panels, first, count, own);                                                                          \
    }                                                                                                                                      \
    TARGET void NAME(const Block<double>& b, const double* panels, int64_t first, int64_t count, double* own) {                            \
        found_and_solved<double, W>(b, panels, first, count, own);                                                                         \
    }                                                                                                                                      \
    template <typename T>                                                                                                                  \
    Way<T> NAME##_way() {                                                                                                                  \
        return {static_cast<Run<T>>(NAME), ROWS<T, W>, PANEL<W>};                                                                          \
    }

WAYS(lanes, , 16)
#ifdef ON_X86
WAYS(avx2, __attribute__((target("avx2,fma"))), 32)
WAYS(avx512, __attribute__((target("avx512f"))), 64)
#endif

bool works(int64_t form) {
#ifdef ON_X86
    __builtin_cpu_init();
    if (form == AVX512) return __builtin_cpu_supports("avx512f");
    if (form == AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return form == LANES;
}

template <typename T>
Way<T> way(int64_t form) {
#ifdef ON_X86
    if (form == AVX512 || (form == BEST && works(AVX512))) return avx512_way<T>();
    if (form == AVX2 || (form == BEST && works(AVX2))) return avx2_way<T>();
#endif
    return lanes_way<T>();
}

// Rows of `upper` in panels of columns, one panel after another: [panels, B, columns], 0 beyond B.
template <typename T>
std::vector<T> in_panels(const Block<T>& b, int64_t columns) {
    const int64_t panels = (b.columns + columns - 1) / columns;
    std::vector<T> made(panels * b.columns * columns);
    for (int64_t p = 0; p < panels; p++) {
        const int64_t start = p * columns, width = std::min(columns, b.columns - start);
        for (int64_t i = 0; i < start + width; i++)
            std::copy_n(b.upper + i * b.stride + start, width, made.data() + (p * b.columns + i) * columns);
    }
    return made;
}

// Shared by the threads that solve a block's stripes: one that begins when all of them are taken finds so, and is not waited for.
template <typename T>
struct Work {
    const Block<T> b;
    const Way<T> way;
    const std::vector<T> panels;
    const int64_t stripes;
    std::atomic<int64_t> next{0}, left;

    Work(const Block<T>& block, const Way<T>& w)
        : b(block), way(w), panels(in_panels(b, way.columns)), stripes((b.rows + way.rows - 1) / way.rows), left(stripes) {}

    void go() {
        int64_t s = next.fetch_add(RUN);
        if (s >= stripes) return;
        const int64_t all = way.rows;
        const Own<T> own((b.columns + way.columns) * all);
        for (; s < stripes; s = next.fetch_add(RUN)) {
            for (int64_t first = s * all, end = std::min(b.rows, first + RUN * all); first < end; first += all)
                way.run(b, panels.data(), first, std::min(all, b.rows - first), own.start);
            left.fetch_sub(std::min(RUN, stripes - s), std::memory_order_release);
        }
    }
};

template <typename T>
void solve(const Block<T>& b, int64_t threads, int64_t form) {
    const auto work = std::make_shared<Work<T>>(b, way<T>(form));
    for (int64_t t = 1; t < std::min(threads, (work->stripes + RUN - 1) / RUN); t++) std::thread([work] { work->go(); }).detach();
    work->go();
    while (work->left.load(std::memory_order_acquire) > 0) std::this_thread::yield();
}

}  // namespace

// Of forms that work here with instructions of the processor's own, bit f of form f; 1 << LANES by itself is one without.
extern "C" void bitgrid_gptq_block_forms(int64_t* forms) {
    *forms = 0;
    for (const Form form : {AVX2, AVX512}) *forms |= int64_t(works(form)) << form;
#ifdef LANES_ARE_FUSED
    *forms |= int64_t(1) << LANES;
#endif
}

#define ENTRY(NAME, T)                                                                                                                     \
    extern "C" void NAME(const T* block, const T* upper, T* scale, T* zero, const T* tops, const int64_t* group, const int32_t* words,     \
                         int32_t* odd, int64_t stride, int64_t columns, int64_t rows, int64_t top, int64_t kind, uint8_t* codes,           \
                         T* values, T* errors, int64_t threads, int64_t form) {                                                            \
        const Block<T> b{block, upper, scale, zero, tops, group, words, odd, stride, columns, rows, T(top), kind, codes, values, errors};  \
        solve(b, threads, form);                                                                                                           \
    }

ENTRY(bitgrid_gptq_block_f32, float)
ENTRY(bitgrid_gptq_block_f64, double)
