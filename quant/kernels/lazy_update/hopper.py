"""The update by parts of bfloat16 for GPUs of compute capability 9.0, in Gluon, the layer beneath Triton: the products of `program.py`,
in the same order, while what comes next is read and split.

A program takes the columns of one tile and several tiles of rows. The parts of `right` are made once and stay in shared memory. Those of
`left` are made anew for each tile of rows: all six products of a tile are started, and as soon as a part's last product is over, that of
the next tile takes its place. The smallest part is needed first and is free first. Instructions that multiply bfloat16 take operands from
shared memory with either side contiguous, so that nothing is transposed. Weights are read while products are under way, and written while
those of the next tile are.
"""

# Other ways of writing an assignment than these the compiler does not take.
# ruff: noqa: SIM108

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

# Before Triton 3.7 and from then on.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


# Rows become fewer with each block.
@gluon.jit(do_not_specialize=["tiles"])
def update_by_parts(
    later,  # float32 [R, N]
    left,  # float32 [R, B]
    right,  # float32 [B, N]
    r,
    n,
    later_stride,
    left_row,
    left_column,
    right_stride,
    tiles,  # of rows, of a program
    B: gl.constexpr,
    PADDED: gl.constexpr,  # a power of two, 32 or more and B or more
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    WARPS: gl.constexpr,
    WHOLE: gl.constexpr,  # every tile is
):
    strip = gl.program_id(0)
    first = gl.program_id(1) * tiles
    end = gl.minimum(first + tiles, gl.cdiv(r, ROWS))

    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    rights = gl.allocate_shared_memory(gl.bfloat16, [3, PADDED, COLUMNS], shared)
    left_hi = gl.allocate_shared_memory(gl.bfloat16, [PADDED, ROWS], shared)
    left_mid = gl.allocate_shared_memory(gl.bfloat16, [PADDED, ROWS], shared)
    left_lo = gl.allocate_shared_memory(gl.bfloat16, [PADDED, ROWS], shared)

    x_hi, x_mid, x_lo = _operand(left, first, r, True, left_row, left_column, B, PADDED, ROWS, WARPS, WHOLE)
    y_hi, y_mid, y_lo = _operand(right, strip, n, True, 1, right_stride, B, PADDED, COLUMNS, WARPS, WHOLE)
    rights.index(0).store(y_hi)
    rights.index(1).store(y_mid)
    rights.index(2).store(y_lo)
    left_hi.store(x_hi)
    left_mid.store(x_mid)
    left_lo.store(x_lo)

    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 16])
    # By quarters, which share their offsets, as do those of an operand: all of them would take more registers than there are.
    p, q, u, v = _quarters(gl.zeros([ROWS, COLUMNS], gl.float32, mma))
    for t in range(first, end):
        zero = _zero(t)
        right_hi = rights.index(zero)
        right_mid = rights.index(zero + 1)
        right_lo = rights.index(zero + 2)
        fence_async_shared()
        total = gl.zeros([ROWS, COLUMNS], gl.float32, mma)
        total = warpgroup_mma(left_lo.permute((1, 0)), right_hi, total, use_acc=False, is_async=True)
        total = warpgroup_mma(left_mid.permute((1, 0)), right_mid, total, is_async=True)
        total = warpgroup_mma(left_mid.permute((1, 0)), right_hi, total, is_async=True)
        total = warpgroup_mma(left_hi.permute((1, 0)), right_lo, total, is_async=True)
        total = warpgroup_mma(left_hi.permute((1, 0)), right_mid, total, is_async=True)
        total = warpgroup_mma(left_hi.permute((1, 0)), right_hi, total, is_async=True)
        # Of the tile before.
        _write(later, t - 1, strip, t > first, p, q, u, v, r, n, later_stride + 16 * zero, WHOLE)
        hi, mid, lo = _operand(left, t + 1, r, t + 1 < end, left_row, left_column + 16 * zero, B, PADDED, ROWS, WARPS, WHOLE)
        # A part is free when the products of all warps are over.
        total = warpgroup_mma_wait(num_outstanding=5, deps=(total,))
        barrier()
        left_lo.store(lo)
        total = warpgroup_mma_wait(num_outstanding=3, deps=(total,))
        barrier()
        left_mid.store(mid)
        p, q, u, v = _read(later, t, strip, p, r, n, later_stride + 16 * zero, WHOLE)
        # Else the compiler moves reads behind the wait.
        barrier()
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        barrier()
        left_hi.store(hi)
        a, b, c, d = _quarters(total)
        p, q, u, v = p - a, q - b, u - c, v - d
        if t + 1 == end:
            _write(later, t, strip, True, p, q, u, v, r, n, later_stride + 16 * zero, WHOLE)


@gluon.jit
def _zero(t):
    """0, of which the compiler knows nothing. What depends on it is computed for each tile; it would be computed once, as it is the same
    for all, and take so many registers throughout that sums are spilled. 16 times it leaves known what a stride is a multiple of."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [t], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _reads(wide, warps):
    """Layout of an operand as it is read, 16 bytes a thread and whole rows."""
    across = min(wide // 4, 32)
    return gl.BlockedLayout([1, 4], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def _operand(
    x, tile, wide, wanted, step, stride,
    B: gl.constexpr, PADDED: gl.constexpr, WIDE: gl.constexpr, WARPS: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """`[PADDED, WIDE]`; 0 where there is none."""
    # By quarters, which share their offsets, which otherwise take registers.
    layout: gl.constexpr = _reads(WIDE, WARPS)
    QUARTER: gl.constexpr = PADDED // 4
    j = gl.arange(0, QUARTER, layout=gl.SliceLayout(1, layout))
    across = gl.arange(0, WIDE, layout=gl.SliceLayout(0, layout))
    # Where a tile begins may lie beyond 2^31 numbers; within it 32 bits do.
    own = x + gl.cast(tile * WIDE, gl.int64) * step
    at = j[:, None] * stride + across[None, :] * step
    inside = wanted if WHOLE else (wanted & (tile * WIDE + across < wide))[None, :]
    if B == PADDED:
        first, second, third, fourth = inside, inside, inside, inside
    else:
        first, second = inside & (j < B)[:, None], inside & (j + QUARTER < B)[:, None]
        third, fourth = inside & (j + 2 * QUARTER < B)[:, None], inside & (j + 3 * QUARTER < B)[:, None]
    a = gl.load(own + at, mask=first, other=0.0)
    b = gl.load(own + QUARTER * stride + at, mask=second, other=0.0)
    c = gl.load(own + 2 * QUARTER * stride + at, mask=third, other=0.0)
    d = gl.load(own + 3 * QUARTER * stride + at, mask=fourth, other=0.0)
    a_hi, a_mid, a_lo = _parts(a)
    b_hi, b_mid, b_lo = _parts(b)
    c_hi, c_mid, c_lo = _parts(c)
    d_hi, d_mid, d_lo = _parts(d)
    hi, mid = _above(_above(a_hi, b_hi), _above(c_hi, d_hi)), _above(_above(a_mid, b_mid), _above(c_mid, d_mid))
    return hi, mid, _above(_above(a_lo, b_lo), _above(c_lo, d_lo))


@gluon.jit
def _parts(x):
    """Three numbers of bfloat16 whose sum x is."""
    # By integers, as the compiler would convert numbers that are needed as float32 too one by one, on the unit of special functions.
    hi = _rounded(x)
    rest = x - hi
    mid = _rounded(rest)
    return hi.to(gl.bfloat16), mid.to(gl.bfloat16), (rest - mid).to(gl.bfloat16)


@gluon.jit
def _rounded(x):
    """To the nearest number of bfloat16, as float32."""
    return ((x.to(gl.int32, bitcast=True) + 0x8000) & -0x10000).to(gl.float32, bitcast=True)


@gluon.jit
def _above(a, b):
    """`[2 H, W]` of two `[H, W]`: no number moves."""
    return gl.permute(gl.join(a, b), (2, 0, 1)).reshape([2 * a.shape[0], a.shape[1]])


@gluon.jit
def _quarters(x):
    """Of its columns: no number moves."""
    left, right = _halves(x)
    a, b = _halves(left)
    c, d = _halves(right)
    return a, b, c, d


@gluon.jit
def _halves(x):
    return gl.permute(x.reshape([x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)).split()


@gluon.jit
def _read(later, t, strip, like, r, n, later_stride, WHOLE: gl.constexpr):
    """The weights of a tile by quarters, in the layout of one."""
    a = _read_quarter(later, t, strip, 0, like, r, n, later_stride, WHOLE)
    b = _read_quarter(later, t, strip, 1, like, r, n, later_stride, WHOLE)
    c = _read_quarter(later, t, strip, 2, like, r, n, later_stride, WHOLE)
    d = _read_quarter(later, t, strip, 3, like, r, n, later_stride, WHOLE)
    return a, b, c, d


@gluon.jit
def _write(later, t, strip, wanted, a, b, c, d, r, n, later_stride, WHOLE: gl.constexpr):
    _write_quarter(later, t, strip, 0, wanted, a, r, n, later_stride, WHOLE)
    _write_quarter(later, t, strip, 1, wanted, b, r, n, later_stride, WHOLE)
    _write_quarter(later, t, strip, 2, wanted, c, r, n, later_stride, WHOLE)
    _write_quarter(later, t, strip, 3, wanted, d, r, n, later_stride, WHOLE)


@gluon.jit
def _read_quarter(later, t, strip, QUARTER: gl.constexpr, like, r, n, later_stride, WHOLE: gl.constexpr):
    at, inside = _place(later, t, strip, QUARTER, True, like, r, n, later_stride, WHOLE)
    return gl.load(at, mask=inside, other=0.0)


@gluon.jit
def _write_quarter(later, t, strip, QUARTER: gl.constexpr, wanted, made, r, n, later_stride, WHOLE: gl.constexpr):
    at, inside = _place(later, t, strip, QUARTER, wanted, made, r, n, later_stride, WHOLE)
    gl.store(at, made, mask=inside)


@gluon.jit
def _place(later, t, strip, QUARTER: gl.constexpr, wanted, like, r, n, later_stride, WHOLE: gl.constexpr):
    """Of the weights of a tile's quarter, and which there are."""
    ROWS: gl.constexpr = like.shape[0]
    COLUMNS: gl.constexpr = like.shape[1]
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, like.type.layout))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, like.type.layout))
    first_column = (4 * strip + QUARTER) * COLUMNS
    own = later + (gl.cast(t * ROWS, gl.int64) * later_stride + first_column)
    at = (own + rows * later_stride)[:, None] + columns[None, :]
    if WHOLE:
        inside = gl.to_tensor(wanted)
    else:
        inside = (wanted & (t * ROWS + rows < r))[:, None] & (first_column + columns < n)[None, :]
    return at, inside
