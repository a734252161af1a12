// One block of columns of BiLLM on a GPU, from its weights to its errors, in seven launches none of which waits for the host. The twin of
// quant/kernels/braq_block/eager.py.
//
//   rank_columns     saliencies m, what they add up to in each column, and the order of columns
//   choose_count     the errors of all counts of salient columns, and the first of the least
//   pick<0, 1, 2>    the 81 quantiles of |m|, exactly: counts of all values by 15 of their bits, of values that begin like a wanted one by
//                    8 more, and by the last 8
//   choose_threshold the errors of all splits, and the first of the least
//   round_rows       a warp has a row: its masks, scales, means, signs and errors
//
// What takes all rows is done by the thread block that is the last of its launch to come to the end: sums over tiles are in a fixed order,
// and counts are integers, so that results do not depend on which it is. Products, differences and quotients of weights are rounded one by
// one, as in torch; sums over a row's part are float64.
//
// Plain C ABI; returns a cudaError_t. State is int32 [words], its first 16 zeros before the first call and after each; what follows them
// and `totals` need not be set.

#include "braq_quantiles.h"
#include "claq_block.h"  // stored

namespace {

constexpr int SUM_WARPS = 16, SUM_ROWS = 32, LANE_COLUMNS = MOST_COLUMNS / 32, ROUND_WARPS = 8;

GLOBAL void BOUNDS(32 * SUM_WARPS, 1) rank_columns(const __grid_constant__ Block b, int tiles) {
    DYNAMIC_SHARED(memory);
    constexpr int THREADS = 32 * SUM_WARPS;
    double* const room = reinterpret_cast<double*>(memory);
    State& s = *b.state;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // For the picks to come.
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < BINS; i += tiles * THREADS) s.first[i] = 0, s.row_of_bin[i] = NONE;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < TARGETS * DIGITS; i += tiles * THREADS)
        s.second[i] = s.third[i] = 0, s.row_of_digit[i] = NONE;
    double sums[LANE_COLUMNS] = {};
    for (int r = warp; r < SUM_ROWS; r += SUM_WARPS) {
        const int64_t row = int64_t(blockIdx.x) * SUM_ROWS + r;
        if (row >= b.rows) break;
#pragma unroll
        for (int i = 0; i < LANE_COLUMNS; i++) {
            const int c = lane + 32 * i;
            if (c >= b.columns) break;
            float x = b.weight[row * b.stride + c];
            if (b.hessian) {
                const float d = b.diagonal[c * b.step];
                x = __fdiv_rn(__fmul_rn(x, x), __fmul_rn(d, d));
            }
            b.m[row * b.columns + c] = x;
            sums[i] += double(fabsf(x));
        }
    }
#pragma unroll
    for (int i = 0; i < LANE_COLUMNS; i++)
        if (lane + 32 * i < b.columns) room[warp * b.columns + lane + 32 * i] = sums[i];
    __syncthreads();
    for (int c = threadIdx.x; c < b.columns; c += THREADS) {
        double sum = 0;
        for (int w = 0; w < SUM_WARPS; w++) sum += room[w * b.columns + c];
        b.totals[int64_t(blockIdx.x) * b.columns + c] = sum;
    }
    if (!last(s.arrived + 0, tiles)) return;
    const int parts = THREADS / b.columns, part = threadIdx.x / b.columns, column = threadIdx.x % b.columns;
    double sum = 0;
    if (part < parts) {
#pragma unroll 8
        for (int t = part; t < tiles; t += parts) sum += b.totals[int64_t(t) * b.columns + column];
        room[part * b.columns + column] = sum;
    }
    __syncthreads();
    const bool own = threadIdx.x < b.columns;
    for (int p = 1; own && p < parts; p++) sum += room[p * b.columns + column];
    // What is not a number counts as infinite, so that every column has a place of its own.
    if (!(sum <= INFINITY)) sum = INFINITY;
    __syncthreads();
    if (own) room[column] = sum;
    __syncthreads();
    if (!own) return;
    int place = 0;
    for (int c = 0; c < b.columns; c++) place += room[c] > sum || (room[c] == sum && c < column);
    s.order[place] = column;
}

GLOBAL void BOUNDS(32 * COUNT_WARPS, 1) choose_count(const __grid_constant__ Block b, int tiles, int warps) {
    DYNAMIC_SHARED(memory);
    State& s = *b.state;
    count_tile(Values{b.m, b.columns, s.order}, nullptr, b.least, b.totals, b.rows, b.columns, b.number, warps, memory);
    if (!last(s.arrived + 1, tiles)) return;
    const int count = b.least + first_least(b.totals, tiles, b.number, 32 * warps, memory);
    for (int i = threadIdx.x; i < b.columns; i += 32 * warps) b.salient[s.order[i]] = i < count;
    if (threadIdx.x == 0) s.count = count;
}

GLOBAL void BOUNDS(32 * SPLIT_WARPS, 2) choose_threshold(const __grid_constant__ Block b, int tiles) {
    DYNAMIC_SHARED(memory);
    State& s = *b.state;
    split_tile(Values{b.m, b.columns, s.order}, s.thresholds, &s.count, b.totals, b.rows, b.columns, QUANTILES, memory);
    if (!last(s.arrived + 5, tiles)) return;
    const int found = first_least(b.totals, tiles, QUANTILES, 32 * SPLIT_WARPS, memory);
    if (threadIdx.x == 0) s.threshold = s.thresholds[found];
}

enum Part { LOW, HIGH, SALIENT, SECOND, PARTS = SECOND };

// Sums over a row's parts ▸ means of a part of so many; 0 of none.
DEVICE float mean_of(double sum, int count) { return float(warp_sum(sum) / double(max(count, 1))); }

template <int ITEMS>
GLOBAL void BOUNDS(32 * ROUND_WARPS, 2) round_rows(const __grid_constant__ Block b) {
    const int lane = threadIdx.x % 32;
    const int64_t row = int64_t(blockIdx.x) * ROUND_WARPS + threadIdx.x / 32;
    if (row >= b.rows) return;
    const float threshold = b.state->threshold;
    float x[ITEMS], left[ITEMS];  // weights; what a binarization leaves, less its mean
    int part[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int c = lane + 32 * i;
        x[i] = 0, part[i] = -1;
        if (c >= b.columns) continue;
        x[i] = b.weight[row * b.stride + c];
        part[i] = b.salient[c] ? SALIENT : fabsf(b.m[row * b.columns + c]) >= threshold ? HIGH : LOW;
    }
    int count[PARTS] = {};
    float scale[4], mean[4];
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        double sum = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            count[p] += __popc(__ballot_sync(ALL, part[i] == p));
            if (part[i] == p) sum += double(x[i]);
        }
        mean[p] = mean_of(sum, count[p]);
    }
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        double sum = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if (part[i] == p) left[i] = __fsub_rn(x[i], mean[p]), sum += double(fabsf(left[i]));
        scale[p] = mean_of(sum, count[p]);
    }
    uint32_t plus = 0, also = 0;  // signs of this lane's columns
    double sum = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        if (part[i] < 0) continue;
        if (left[i] >= 0) plus |= 1u << i;
        if (part[i] != SALIENT) continue;
        const float value = left[i] >= 0 ? scale[SALIENT] : -scale[SALIENT];
        left[i] = __fsub_rn(x[i], __fadd_rn(value, mean[SALIENT]));
        sum += double(left[i]);
    }
    mean[SECOND] = mean_of(sum, count[SALIENT]);
    sum = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        if (part[i] != SALIENT) continue;
        left[i] = __fsub_rn(left[i], mean[SECOND]);
        if (left[i] >= 0) also |= 1u << i;
        sum += double(fabsf(left[i]));
    }
    scale[SECOND] = mean_of(sum, count[SALIENT]);
    mean[SALIENT] = __fadd_rn(mean[SALIENT], mean[SECOND]);

    float largest = 0;
#pragma unroll
    for (int p = 0; p < 4; p++) largest = fmaxf(largest, p < PARTS ? fmaxf(scale[p], fabsf(mean[p])) : scale[p]);
    int wrong = 0;
    // What is not a number is not within the bound either.
    const auto narrowed = [&](float v) {
        const float out = stored(v, b.type);
        wrong += !(fabsf(__fsub_rn(out, v)) <= 0x1p-10f * largest);
        return out;
    };
#pragma unroll
    for (int p = 0; p < 4; p++) scale[p] = narrowed(scale[p]);
#pragma unroll
    for (int p = 0; p < PARTS; p++) mean[p] = narrowed(mean[p]);
    if (lane == 0) {
#pragma unroll
        for (int p = 0; p < 4; p++) b.scale[row * b.blocks * 4 + p] = scale[p];
#pragma unroll
        for (int p = 0; p < PARTS; p++) b.mean[row * b.blocks * PARTS + p] = mean[p];
        if (wrong) atomicAdd(b.wrong, static_cast<unsigned long long>(wrong));
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int c = lane + 32 * i;
        if (part[i] < 0) continue;
        const bool sign = plus >> i & 1, second = also >> i & 1;
        const float first = part[i] == SALIENT ? scale[SALIENT] : part[i] == HIGH ? scale[HIGH] : scale[LOW];
        float value = sign ? first : -first;
        if (part[i] == SALIENT) value = __fadd_rn(value, second ? scale[SECOND] : -scale[SECOND]);
        value = __fadd_rn(value, part[i] == SALIENT ? mean[SALIENT] : part[i] == HIGH ? mean[HIGH] : mean[LOW]);
        const int64_t at = row * b.width + c;
        b.signs[at] = sign;
        b.second[at] = second;
        b.split[at] = part[i] == HIGH;
        b.errors[row * b.columns + c] = __fdiv_rn(__fsub_rn(x[i], value), b.diagonal[c * b.step]);
    }
}

template <int ITEMS>
int rounded(const Block& b, int64_t stream) {
    return LAUNCH(round_rows<ITEMS>, dim3(tiles_of(b.rows, ROUND_WARPS)), 32u * ROUND_WARPS, 0, stream, b);
}

}  // namespace

// Columns from `start` on, `columns` of all `width`, of weights [rows, width] with `stride` between rows; the diagonal has `step` between
// its entries. Counts from `least` on, `number` of them. signs, second and split are bool [rows, width], salient bool [width], scale [rows,
// blocks, 4], mean [rows, blocks, 3], of which block `index` is written, errors [rows, columns], m [rows, columns]. wrong is int64 [1], to
// which scales and means are added that their type does not hold. totals: max(ceil(rows / 32) max(columns, number), ceil(rows / 16) 81).
extern "C" int bitgrid_braq_block(const float* weight, int64_t stride, const float* diagonal, int64_t step, int64_t rows, int64_t width,
                                  int64_t start, int64_t columns, int64_t hessian, int64_t least, int64_t number, int64_t type,
                                  uint8_t* signs, uint8_t* second, uint8_t* split, uint8_t* salient, float* scale, float* mean,
                                  int64_t blocks, int64_t index, unsigned long long* wrong, float* errors, float* m, double* totals,
                                  int32_t* state, int64_t words, int64_t stream) {
    if (rows == 0 || columns == 0) return 0;
    if (words * 4 < int64_t(sizeof(State)) || columns > MOST_COLUMNS || number < 1) return 1;  // cudaErrorInvalidValue
    const Block b{weight + start, diagonal + start * step, m, totals, reinterpret_cast<State*>(state), signs + start, second + start,
                  split + start, salient + start, scale + 4 * index, mean + 3 * index, errors, wrong, stride, step, width, blocks,
                  int(rows), int(columns), int(least), int(number), int(type), int(hessian)};
    const int64_t sums = 8 * std::max<int64_t>(SUM_WARPS * columns, 32 * SUM_WARPS);
    const unsigned tiles = tiles_of(rows, SUM_ROWS);
    int failed = LAUNCH(rank_columns, dim3(tiles), 32u * SUM_WARPS, sums, stream, b, int(tiles));
    if (failed) return failed;
    const int warps = count_warps(number);
    const int64_t bytes = std::max<int64_t>(count_bytes(columns), 8 * 32 * warps);
    const unsigned counted = tiles_of(rows, COUNT_ROWS), parted = tiles_of(rows, SPLIT_ROWS);
    failed = LAUNCH(choose_count, dim3(counted), unsigned(32 * warps), bytes, stream, b, int(counted), warps);
    if (!failed) failed = picked<0>(b, stream);
    if (!failed) failed = picked<1>(b, stream);
    if (!failed) failed = picked<2>(b, stream);
    if (failed) return failed;
    failed = LAUNCH(choose_threshold, dim3(parted), 32u * SPLIT_WARPS, split_bytes(columns, QUANTILES), stream, b, int(parted));
    if (failed) return failed;
    return columns <= 128 ? rounded<4>(b, stream) : columns <= 256 ? rounded<8>(b, stream) : rounded<12>(b, stream);
}
