"""The lower triangle for GPUs of compute capability 9.0, in Gluon, the layer beneath Triton: what `program.py` does, and multiplying pauses
for partial sums alone.

A program adds one block of channels times two others. Blocks of the lower triangle are taken as neighbours of a row; where their number is
odd, that of the first column is left over, and two of these are a program whose products are those of the upper triangle, turned. So 4096
channels are 264 programs, two for each of 132 multiprocessors.

Operands of a later step are copied while this one's are multiplied, across partial sums and sequences too. Partial sums go to the total by
atomic additions, for which nothing waits: no two programs add to the same place, so that the order is that of the tokens. They take
subnormal numbers as zero.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

# Before Triton 3.7 and from then on.
copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit(do_not_specialize=["sequences", "steps"])
def add_lower(
    total,  # float32 [K, K], K a multiple of BLOCK
    x,  # descriptor of 16-bit floats [S T, K] in blocks [STEP, BLOCK]
    tiles,  # int32 [programs, 5]: left block, two right ones, 1 where the second of these counts, 1 where products are turned
    sequences,
    steps,  # of a sequence
    k,
    BLOCK: gl.constexpr,  # channels
    STEP: gl.constexpr,  # tokens that are multiplied at a time
    PROMOTE: gl.constexpr,  # steps of a partial sum
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    which = tiles + 5 * gl.program_id(0)
    left = gl.load(which)
    first = gl.load(which + 1)
    second = gl.load(which + 2)

    lefts = gl.allocate_shared_memory(x.dtype, [STAGES, STEP, BLOCK], x.layout)
    firsts = gl.allocate_shared_memory(x.dtype, [STAGES, STEP, BLOCK], x.layout)
    seconds = gl.allocate_shared_memory(x.dtype, [STAGES, STEP, BLOCK], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    end = sequences * steps
    for i in gl.static_range(STAGES - 1):
        _fetch(x, lefts, firsts, seconds, ready, left, first, second, i, end, BLOCK, STEP, STAGES)

    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK, 16])
    one = gl.zeros([BLOCK, BLOCK], gl.float32, mma)
    two = gl.zeros([BLOCK, BLOCK], gl.float32, mma)
    at = 0  # the step, of all
    inside = 0  # likewise, of the sequence
    while at < end:
        stop = at + gl.minimum(steps - inside, PROMOTE)
        inside = inside + stop - at
        inside = gl.where(inside == steps, 0, inside)
        begin = at
        while at < stop:
            slot = at % STAGES
            mbarrier.wait(ready.index(slot), at // STAGES & 1)
            operand = lefts.index(slot).permute((1, 0))
            # The first of a partial sum is added to nothing.
            one = warpgroup_mma(operand, firsts.index(slot), one, use_acc=at > begin, is_async=True)
            two = warpgroup_mma(operand, seconds.index(slot), two, use_acc=at > begin, is_async=True)
            # At most these two are under way: the place of the step before is free.
            one, two = warpgroup_mma_wait(num_outstanding=2, deps=(one, two))
            _fetch(x, lefts, firsts, seconds, ready, left, first, second, at + STAGES - 1, end, BLOCK, STEP, STAGES)
            at += 1
        one, two = warpgroup_mma_wait(num_outstanding=0, deps=(one, two))
        _to_total(total, which, one, 1, k, BLOCK)
        if gl.load(which + 3, volatile=True) != 0:
            _to_total(total, which, two, 2, k, BLOCK)
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))


@gluon.jit
def _to_total(total, which, part, SIDE: gl.constexpr, k, BLOCK: gl.constexpr):
    # Read anew, so that where the products belong is computed here and not held since the start.
    i = gl.load(which, volatile=True) * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, part.type.layout))
    j = gl.load(which + SIDE, volatile=True) * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, part.type.layout))
    # Offsets of 32 bits, which K² does not exceed (`triton.MOST`).
    if gl.load(which + 4, volatile=True) == 0:
        gl.atomic_add(total + (i[:, None] * k + j[None, :]), part, sem="relaxed")
    else:
        gl.atomic_add(total + (j[None, :] * k + i[:, None]), part, sem="relaxed")


@gluon.jit
def _fetch(
    x, lefts, firsts, seconds, ready, left, first, second, step, end,
    BLOCK: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Have the operands of a step, if there is one, copied to its place; tokens past the last become 0."""
    slot = step % STAGES
    wanted = step < end
    mbarrier.expect(ready.index(slot), 3 * BLOCK * STEP * 2, pred=wanted)
    copy(x, [step * STEP, left * BLOCK], ready.index(slot), lefts.index(slot), pred=wanted)
    copy(x, [step * STEP, first * BLOCK], ready.index(slot), firsts.index(slot), pred=wanted)
    copy(x, [step * STEP, second * BLOCK], ready.index(slot), seconds.index(slot), pred=wanted)
