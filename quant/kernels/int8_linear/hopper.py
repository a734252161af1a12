"""The product for GPUs of compute capability 9.0, in Gluon, the layer beneath Triton: what `program.py` does, and multiplying never pauses.

Triton waits for the product of one step before it starts that of the next wherever sums are integers. Here a step's product is started
first; then that of the step before is waited for, whose place in shared memory takes the operands of a later step.

A tile may have half as many columns aside: 192, say, which no shape of Triton is.
"""

# Other ways of writing an assignment than these the compiler does not take.
# ruff: noqa: SIM108

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

# Before Triton 3.7 and from then on.
copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def place(m, n, ROWS: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr):
    """First row and column of the program's tile of out [m, n], of which GROUP rows are gone through together."""
    across = GROUP * gl.cdiv(n, COLUMNS)
    index = gl.program_id(0)
    top = index // across * GROUP
    high = gl.minimum(gl.cdiv(m, ROWS) - top, GROUP)
    return (top + index % across % high) * ROWS, (index % across // high) * COLUMNS


# Compiled once for all numbers of rows.
@gluon.jit(do_not_specialize=["m"])
def multiply(
    x,  # descriptor of int8 [M, K] in tiles [ROWS, STEP]
    weight,  # descriptor of int8 [N, K] in tiles [COLUMNS, STEP]
    beside,  # the same in tiles [ASIDE, STEP], or anything where that is 0
    out,  # [M, N]
    row_scale,  # float32 [M]
    row_zero,  # float32 [M], read with ROW_ZERO
    row_sums,  # int32 [M]: of the codes of x; read with ZERO
    scale,  # float32 [N]
    zero,  # float32 [N], read with ZERO
    sums,  # float32 [N]: of codes - zero of the weight; read with ROW_ZERO
    m,
    n,
    k,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    ASIDE: gl.constexpr,  # more columns
    STEP: gl.constexpr,
    GROUP: gl.constexpr,  # rows of tiles that are gone through together, so that their operands stay in a cache
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    WIDE: gl.constexpr,  # columns of one instruction
    ZERO: gl.constexpr,
    ROW_ZERO: gl.constexpr,
    EARLY: gl.constexpr,  # the kernel before may still run, and the next, which waits likewise, may be started
):
    first_row, first_column = place(m, n, ROWS, COLUMNS + ASIDE, GROUP)

    lefts = gl.allocate_shared_memory(gl.int8, [STAGES, ROWS, STEP], x.layout)
    rights = gl.allocate_shared_memory(gl.int8, [STAGES, COLUMNS, STEP], weight.layout)
    if ASIDE:
        others = gl.allocate_shared_memory(gl.int8, [STAGES, ASIDE, STEP], beside.layout)
    else:
        others = rights
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    steps = gl.cdiv(k, STEP)
    for i in gl.static_range(STAGES - 1):
        _fetch(x, weight, beside, lefts, rights, others, ready, first_row, first_column, i, steps, ROWS, COLUMNS, ASIDE, STEP, STAGES)

    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, WIDE, 32])
    total = gl.zeros([ROWS, COLUMNS], gl.int32, mma)
    if ASIDE:
        narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, ASIDE, 32])
        more = gl.zeros([ROWS, ASIDE], gl.int32, narrow)
    for i in range(steps):
        slot = i % STAGES
        mbarrier.wait(ready.index(slot), i // STAGES & 1)
        total = warpgroup_mma(lefts.index(slot), rights.index(slot).permute((1, 0)), total, is_async=True)
        # At most this step's products are under way.
        if ASIDE:
            more = warpgroup_mma(lefts.index(slot), others.index(slot).permute((1, 0)), more, is_async=True)
            total, more = warpgroup_mma_wait(num_outstanding=2, deps=(total, more))
        else:
            total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
        next_ = i + STAGES - 1
        _fetch(x, weight, beside, lefts, rights, others, ready, first_row, first_column, next_, steps, ROWS, COLUMNS, ASIDE, STEP, STAGES)
    if ASIDE:
        total, more = warpgroup_mma_wait(num_outstanding=0, deps=(total, more))
    else:
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))

    _finish(
        total, out, row_scale, row_zero, row_sums, scale, zero, sums, first_row, first_column, m, n,
        ROWS, COLUMNS, WARPS, ZERO, ROW_ZERO,
    )  # fmt: skip
    if ASIDE:
        aside = first_column + COLUMNS
        _finish(more, out, row_scale, row_zero, row_sums, scale, zero, sums, first_row, aside, m, n, ROWS, ASIDE, WARPS, ZERO, ROW_ZERO)


@gluon.jit
def _finish(
    total, out, row_scale, row_zero, row_sums, scale, zero, sums, first_row, first_column, m, n,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr, ZERO: gl.constexpr, ROW_ZERO: gl.constexpr,
):  # fmt: skip
    """Sums [ROWS, COLUMNS] to where they belong in out, as products."""
    # As tensor cores leave them, numbers of 16 bits would be written four bytes a thread: sixteen. With all of the terms, what is read of
    # the weight takes too many registers unless the sums go there first.
    ACROSS: gl.constexpr = COLUMNS // 8 if COLUMNS < 256 else 32
    side: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    NARROW: gl.constexpr = out.dtype.element_ty.primitive_bitwidth == 16
    EARLY: gl.constexpr = NARROW and ZERO and ROW_ZERO
    if EARLY:
        total = gl.convert_layout(total, side)
    layout: gl.constexpr = total.type.layout
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    product = total.to(gl.float32)
    if ZERO:
        added = gl.load(row_sums + rows, mask=rows < m, other=0).to(gl.float32)
        product -= added[:, None] * gl.load(zero + columns, mask=columns < n, other=0.0)[None, :]
    if ROW_ZERO:
        of_rows = gl.load(row_zero + rows, mask=rows < m, other=0.0)
        product -= of_rows[:, None] * gl.load(sums + columns, mask=columns < n, other=0.0)[None, :]
    product *= gl.load(row_scale + rows, mask=rows < m, other=0.0)[:, None]
    product *= gl.load(scale + columns, mask=columns < n, other=0.0)[None, :]
    written = product.to(out.dtype.element_ty)
    if NARROW:
        _store(out, gl.convert_layout(written, side), first_row, first_column, m, n, ROWS, COLUMNS, side)
    else:
        _store(out, written, first_row, first_column, m, n, ROWS, COLUMNS, layout)


@gluon.jit
def _store(out, product, first_row, first_column, m, n, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    at = rows.to(gl.int64)[:, None] * n + columns[None, :]
    gl.store(out + at, product, mask=(rows < m)[:, None] & (columns < n)[None, :])


@gluon.jit
def _fetch(
    x, weight, beside, lefts, rights, others, ready, first_row, first_column, step, steps,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, ASIDE: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Have the operands of a step, if there is one, copied to its place; what lies outside of them becomes 0."""
    slot = step % STAGES
    wanted = step < steps
    mbarrier.expect(ready.index(slot), (ROWS + COLUMNS + ASIDE) * STEP, pred=wanted)
    copy(x, [first_row, step * STEP], ready.index(slot), lefts.index(slot), pred=wanted)
    copy(weight, [first_column, step * STEP], ready.index(slot), rights.index(slot), pred=wanted)
    if ASIDE:
        copy(beside, [first_column + COLUMNS, step * STEP], ready.index(slot), others.index(slot), pred=wanted)
