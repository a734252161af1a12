"""The update by halves of float16 for GPUs of compute capability 9.0, in Gluon, the layer beneath Triton: the products of
`program_halves.update_by_halves`, in the same order.

The copy engine brings the parts of both operands for a step while others are multiplied. Two programs share a multiprocessor, so that one
multiplies while the other reads and writes weights.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

# Before Triton 3.7 and from then on.
copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


# Rows become fewer with each block.
@gluon.jit(do_not_specialize=["r"])
def update_by_halves(
    later,  # float32 [R, N]
    left,  # descriptor of float16 [2 PADDED, R] in blocks [STEP, ROWS]: larger parts above smaller ones
    right,  # descriptor of float16 [2 PADDED, N] in blocks [STEP, COLUMNS]
    left_back,  # float32 [R]: what products with this row are to be multiplied with
    right_back,  # float32 [N]
    r,
    n,
    later_stride,
    PADDED: gl.constexpr,  # a multiple of STEP
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    top = gl.program_id(0)
    strip = gl.program_id(1)

    lefts = gl.allocate_shared_memory(gl.float16, [STAGES, STEP, ROWS], left.layout)
    rights = gl.allocate_shared_memory(gl.float16, [STAGES, STEP, COLUMNS], right.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(STAGES - 1):
        _fetch(left, right, lefts, rights, ready, top, strip, i, PADDED, ROWS, COLUMNS, STEP, STAGES)

    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 16])
    total = gl.zeros([ROWS, COLUMNS], gl.float32, mma)
    for at in range(3 * PADDED // STEP):
        slot = at % STAGES
        mbarrier.wait(ready.index(slot), at // STAGES & 1)
        total = warpgroup_mma(lefts.index(slot).permute((1, 0)), rights.index(slot), total, use_acc=at > 0, is_async=True)
        # At most this one is under way: the place of the step before is free.
        total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
        _fetch(left, right, lefts, rights, ready, top, strip, at + STAGES - 1, PADDED, ROWS, COLUMNS, STEP, STAGES)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))
    # By quarters: the places of all weights of a tile would take more registers than there are.
    left_half, right_half = _halves(total)
    a, b = _halves(left_half)
    _take_off(later, left_back, right_back, top, 4 * strip, a, r, n, later_stride)
    _take_off(later, left_back, right_back, top, 4 * strip + 1, b, r, n, later_stride)
    c, d = _halves(right_half)
    _take_off(later, left_back, right_back, top, 4 * strip + 2, c, r, n, later_stride)
    _take_off(later, left_back, right_back, top, 4 * strip + 3, d, r, n, later_stride)


@gluon.jit
def _fetch(
    left, right, lefts, rights, ready, top, strip, step,
    PADDED: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Have the operands of a step, if there is one, copied to its place; rows and columns past the last become 0. Steps of the smaller part
    of left come first, then those of the smaller part of right."""
    EACH: gl.constexpr = PADDED // STEP
    slot = step % STAGES
    wanted = step < 3 * EACH
    bar = ready.index(slot)
    mbarrier.expect(bar, 2 * STEP * (ROWS + COLUMNS), pred=wanted)
    from_left = gl.where(step < EACH, EACH + step, step % EACH)
    from_right = gl.where(step < 2 * EACH, step, step % EACH)
    copy(left, [from_left * STEP, top * ROWS], bar, lefts.index(slot), pred=wanted)
    copy(right, [from_right * STEP, strip * COLUMNS], bar, rights.index(slot), pred=wanted)


@gluon.jit
def _halves(x):
    """Of its columns: no number moves."""
    return gl.permute(x.reshape([x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)).split()


@gluon.jit
def _take_off(later, left_back, right_back, top, quarter, total, r, n, later_stride):
    ROWS: gl.constexpr = total.shape[0]
    COLUMNS: gl.constexpr = total.shape[1]
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, total.type.layout))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, total.type.layout))
    # Where a tile begins may lie beyond 2^31 numbers; within it 32 bits do.
    own = later + (gl.cast(top * ROWS, gl.int64) * later_stride + quarter * COLUMNS)
    at = own + (rows * later_stride)[:, None] + columns[None, :]
    row_there = top * ROWS + rows < r
    column_there = quarter * COLUMNS + columns < n
    inside = row_there[:, None] & column_there[None, :]
    was = gl.load(at, mask=inside, other=0.0)
    across = gl.load(right_back + quarter * COLUMNS + columns, mask=column_there, other=0.0)
    down = gl.load(left_back + top * ROWS + rows, mask=row_there, other=0.0)
    gl.store(at, was - total * across[None, :] * down[:, None], mask=inside)
