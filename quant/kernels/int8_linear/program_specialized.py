"""The product for GPUs of compute capability 9.0 with warp specialization, in Gluon: what `hopper.py` does, and warps that multiply do
nothing else.

A warp of its own has the operands copied, in the order of the steps, as soon as their place is free. A part of a tile's rows is a warp
group's, which waits for no other one: between two steps it waits for copies, starts the step's product, and frees the place of the one
before. Sums are turned into the product where the group's rows of x lay, and go from there to out.

The weight may be copied before the kernel in front is over, where that does not write it: FIRST.
"""

# Other ways of writing an assignment than these the compiler does not take.
# ruff: noqa: SIM108

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from quant.kernels.int8_linear.hopper import _store, copy, place

# Before Triton 3.7 and from then on.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
UNDERSCORED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))


# Compiled once for all numbers of rows.
@gluon.jit(do_not_specialize=["m"])
def multiply(
    x,  # descriptor of int8 [M, K] in tiles [HIGH, STEP]
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
    HIGH: gl.constexpr,  # rows of a part
    PARTS: gl.constexpr,  # 1 or 2, of the rows of a tile
    COLUMNS: gl.constexpr,
    ASIDE: gl.constexpr,  # more columns
    STEP: gl.constexpr,
    GROUP: gl.constexpr,  # rows of tiles that are gone through together, so that their operands stay in a cache
    STAGES: gl.constexpr,
    WIDE: gl.constexpr,  # columns of one instruction
    ZERO: gl.constexpr,
    ROW_ZERO: gl.constexpr,
    EARLY: gl.constexpr,  # the kernel before may still run, and the next, which waits likewise, may be started
    FIRST: gl.constexpr,  # that kernel does not write the weight
    REGISTERS: gl.constexpr,  # of a thread of the second part
):
    first_row, first_column = place(m, n, PARTS * HIGH, COLUMNS + ASIDE, GROUP)
    steps = gl.cdiv(k, STEP)

    lefts = gl.allocate_shared_memory(gl.int8, [STAGES, HIGH, STEP], x.layout)
    if PARTS == 2:
        seconds = gl.allocate_shared_memory(gl.int8, [STAGES, HIGH, STEP], x.layout)
    else:
        seconds = lefts
    rights = gl.allocate_shared_memory(gl.int8, [STAGES, COLUMNS, STEP], weight.layout)
    if ASIDE:
        others = gl.allocate_shared_memory(gl.int8, [STAGES, ASIDE, STEP], beside.layout)
    else:
        others = rights
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=PARTS)

    # Named apart, the tuples' constants would be none.
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_part, (
                    lefts, rights, others, ready, free, out, row_scale, row_zero, row_sums, scale, zero, sums, first_row, first_column,
                    steps, m, n, HIGH, COLUMNS, ASIDE, STEP, STAGES, WIDE, ZERO, ROW_ZERO, EARLY,
                )),
                (_part, (
                    seconds, rights, others, ready, free, out, row_scale, row_zero, row_sums, scale, zero, sums, first_row + HIGH,
                    first_column, steps, m, n, HIGH, COLUMNS, ASIDE, STEP, STAGES, WIDE, ZERO, ROW_ZERO, EARLY,
                )),
                (_copies, (
                    x, weight, beside, lefts, seconds, rights, others, ready, free, first_row, first_column, steps,
                    HIGH, PARTS, COLUMNS, ASIDE, STEP, STAGES, EARLY, FIRST,
                )),
            ],
            [4, 1],
            [REGISTERS, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_part, (
                    lefts, rights, others, ready, free, out, row_scale, row_zero, row_sums, scale, zero, sums, first_row, first_column,
                    steps, m, n, HIGH, COLUMNS, ASIDE, STEP, STAGES, WIDE, ZERO, ROW_ZERO, EARLY,
                )),
                (_copies, (
                    x, weight, beside, lefts, seconds, rights, others, ready, free, first_row, first_column, steps,
                    HIGH, PARTS, COLUMNS, ASIDE, STEP, STAGES, EARLY, FIRST,
                )),
            ],
            [1],
            [40],
        )  # fmt: skip


@gluon.jit
def _copies(
    x, weight, beside, lefts, seconds, rights, others, ready, free, first_row, first_column, steps,
    HIGH: gl.constexpr, PARTS: gl.constexpr, COLUMNS: gl.constexpr, ASIDE: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """Have the operands of every step copied; what lies outside of them becomes 0."""
    BYTES: gl.constexpr = (PARTS * HIGH + COLUMNS + ASIDE) * STEP
    begin = 0
    if EARLY and FIRST:
        for i in gl.static_range(STAGES):
            mbarrier.expect(ready.index(i), BYTES, pred=i < steps)
            _weights(weight, beside, rights, others, ready, first_column, i, i, i < steps, COLUMNS, ASIDE, STEP)
        tl.extra.cuda.gdc_wait()
        for i in gl.static_range(STAGES):
            _rows(x, lefts, seconds, ready, first_row, i, i, i < steps, HIGH, PARTS, STEP)
        begin = STAGES
    elif EARLY:
        tl.extra.cuda.gdc_wait()
    for i in range(begin, steps):
        slot = i % STAGES
        # No one has to free it the first time.
        mbarrier.wait(free.index(slot), i // STAGES & 1 ^ 1)
        mbarrier.expect(ready.index(slot), BYTES)
        _weights(weight, beside, rights, others, ready, first_column, i, slot, True, COLUMNS, ASIDE, STEP)
        _rows(x, lefts, seconds, ready, first_row, i, slot, True, HIGH, PARTS, STEP)


@gluon.jit
def _weights(
    weight, beside, rights, others, ready, first_column, step, slot, wanted,
    COLUMNS: gl.constexpr, ASIDE: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    copy(weight, [first_column, step * STEP], ready.index(slot), rights.index(slot), pred=wanted)
    if ASIDE:
        copy(beside, [first_column + COLUMNS, step * STEP], ready.index(slot), others.index(slot), pred=wanted)


@gluon.jit
def _rows(x, lefts, seconds, ready, first_row, step, slot, wanted, HIGH: gl.constexpr, PARTS: gl.constexpr, STEP: gl.constexpr):
    copy(x, [first_row, step * STEP], ready.index(slot), lefts.index(slot), pred=wanted)
    if PARTS == 2:
        copy(x, [first_row + HIGH, step * STEP], ready.index(slot), seconds.index(slot), pred=wanted)


@gluon.jit
def _part(
    lefts, rights, others, ready, free, out, row_scale, row_zero, row_sums, scale, zero, sums, first_row, first_column, steps, m, n,
    HIGH: gl.constexpr, COLUMNS: gl.constexpr, ASIDE: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    ZERO: gl.constexpr, ROW_ZERO: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The product of some of a tile's rows."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDE, 32])
    total = gl.zeros([HIGH, COLUMNS], gl.int32, mma)
    if ASIDE:
        narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ASIDE, 32])
        more = gl.zeros([HIGH, ASIDE], gl.int32, narrow)
    slot = 0
    before = 0
    phase = 0
    for i in range(steps):
        mbarrier.wait(ready.index(slot), phase)
        total = warpgroup_mma(lefts.index(slot), rights.index(slot).permute((1, 0)), total, is_async=True)
        # At most this step's products are under way.
        if ASIDE:
            more = warpgroup_mma(lefts.index(slot), others.index(slot).permute((1, 0)), more, is_async=True)
            total, more = warpgroup_mma_wait(num_outstanding=2, deps=(total, more))
        else:
            total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
        mbarrier.arrive(free.index(before), count=1, pred=i > 0)
        before = slot
        last = slot == STAGES - 1
        phase = gl.where(last, phase ^ 1, phase)
        slot = gl.where(last, 0, slot + 1)

    # Read while the last products are made.
    terms = _terms(row_scale, row_zero, row_sums, scale, zero, sums, first_row, first_column, m, n, HIGH, COLUMNS, mma, ZERO, ROW_ZERO)
    if ASIDE:
        total, more = warpgroup_mma_wait(num_outstanding=0, deps=(total, more))
    else:
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
    _finish(total, terms, lefts, out, first_row, first_column, m, n, HIGH, COLUMNS, ZERO, ROW_ZERO)
    if ASIDE:
        aside = first_column + COLUMNS
        terms = _terms(row_scale, row_zero, row_sums, scale, zero, sums, first_row, aside, m, n, HIGH, ASIDE, narrow, ZERO, ROW_ZERO)
        _finish(more, terms, lefts, out, first_row, aside, m, n, HIGH, ASIDE, ZERO, ROW_ZERO)


@gluon.jit
def _terms(
    row_scale, row_zero, row_sums, scale, zero, sums, first_row, first_column, m, n,
    HIGH: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr, ZERO: gl.constexpr, ROW_ZERO: gl.constexpr,
):  # fmt: skip
    """What sums [HIGH, COLUMNS] become products with; a scale stands for what is not needed."""
    rows = first_row + gl.arange(0, HIGH, layout=gl.SliceLayout(1, layout))
    columns = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    of_rows = gl.load(row_scale + rows, mask=rows < m, other=0.0)
    of_columns = gl.load(scale + columns, mask=columns < n, other=0.0)
    added, zeros, row_zeros, whole = of_rows, of_columns, of_rows, of_columns
    if ZERO:
        added = gl.load(row_sums + rows, mask=rows < m, other=0).to(gl.float32)
        zeros = gl.load(zero + columns, mask=columns < n, other=0.0)
    if ROW_ZERO:
        row_zeros = gl.load(row_zero + rows, mask=rows < m, other=0.0)
        whole = gl.load(sums + columns, mask=columns < n, other=0.0)
    return of_rows, of_columns, added, zeros, row_zeros, whole


@gluon.jit
def _finish(
    total, terms, held, out, first_row, first_column, m, n, HIGH: gl.constexpr, COLUMNS: gl.constexpr,
    ZERO: gl.constexpr, ROW_ZERO: gl.constexpr,
):  # fmt: skip
    """Sums to where they belong in out, as products; held: shared memory [STAGES, HIGH, STEP] of this warp group that nothing reads."""
    of_rows, of_columns, added, zeros, row_zeros, whole = terms
    product = total.to(gl.float32)
    if ZERO:
        product -= added[:, None] * zeros[None, :]
    if ROW_ZERO:
        product -= row_zeros[:, None] * whole[None, :]
    product *= of_rows[:, None]
    product *= of_columns[None, :]
    written = product.to(out.dtype.element_ty)
    # As tensor cores leave them, numbers of 16 bits would be written four bytes a thread: sixteen.
    if out.dtype.element_ty.primitive_bitwidth == 16:
        ACROSS: gl.constexpr = COLUMNS // 8 if COLUMNS < 256 else 32
        side: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
        shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        if UNDERSCORED:
            staged = held._reinterpret(out.dtype.element_ty, [HIGH, COLUMNS], shared)
        else:
            staged = held.reinterpret(out.dtype.element_ty, [HIGH, COLUMNS], shared)
        # The products of all four warps are over, and what was here is written.
        barrier()
        staged.store(written)
        barrier()
        _store(out, staged.load(side), first_row, first_column, m, n, HIGH, COLUMNS, side)
    else:
        layout: gl.constexpr = total.type.layout
        _store(out, written, first_row, first_column, m, n, HIGH, COLUMNS, layout)
