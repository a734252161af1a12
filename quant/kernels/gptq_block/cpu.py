"""The block in C++ (`quant/csrc/gptq_block.cpp`), on torch's number of threads.

An error times the factor is taken off a weight in one operation, rounded once, where the reference rounds the product first: results are
those of the reference with such an operation, bit for bit, and at least 99.9 % of its codes (docs/adr/0027-the-block-fuses-on-cpus.md).
They do not depend on the width of vectors, the number of threads, or what other rows a block has.

Where the processor has no such operation (x86 before Haswell), or the compiler makes none of its instructions, it does not work here: the
C library's takes longer than torch's loop does.
"""

from __future__ import annotations

from array import array
from functools import cache

import torch
from torch import Tensor

from quant.affine import Affine
from quant.kernels import native
from quant.kernels.gptq_block import KINDS, Fits, SolvedBlock

ENTRIES = {torch.float32: "bitgrid_gptq_block_f32", torch.float64: "bitgrid_gptq_block_f64"}
BEST, LANES, AVX2, AVX512 = range(4)
"""Forms: number by number, and in vectors of 32 and 64 bytes."""


def unavailable(device: torch.device) -> str | None:
    reason = native.unavailable("gptq_block", device)
    if reason is None and not forms():
        reason = "this processor, or its compiler, has no fused multiply-add (x86: AVX2 and FMA, with GCC or Clang)"
    return reason


@cache
def forms() -> tuple[int, ...]:
    """Those that work here with instructions of the processor's own."""
    found = torch.zeros(1, dtype=torch.int64)
    native.call("gptq_block", "bitgrid_gptq_block_forms", found)
    return tuple(form for form in (LANES, AVX2, AVX512) if int(found) >> form & 1)


def solve_block(
    block: Tensor,
    upper: Tensor,
    affine: Affine,
    group: list[int],
    out: SolvedBlock | None = None,
    fits: Fits | None = None,
    form: int = BEST,
) -> SolvedBlock:
    """form: BEST, LANES or one of `forms()`; all give the same bits."""
    if form not in (BEST, LANES, *forms()):
        raise ValueError(f"form {form} does not work here; choose one of {', '.join(map(str, (BEST, LANES, *forms())))}")
    if fits is not None:
        fits.check(block, affine)
    w = block.contiguous()
    # A view's rows may lie apart; only their numbers must lie together.
    u = upper if upper.stride(-1) == 1 and upper.dtype == w.dtype else upper.to(w).contiguous()
    scale, zero = (t.to(w).contiguous() for t in (affine.scale, affine.zero))
    tops = 0 if affine.tops is None else affine.tops.to(w).contiguous()
    rows = array("q", group)
    out = SolvedBlock.like(w) if out is None else out
    out.check(w)
    found = (0, 0) if fits is None else (fits.words, fits.odd)
    made = (out.codes, out.values, out.errors, torch.get_num_threads(), form)
    numbers = (u.stride(0), *w.shape, affine.top, KINDS.get(affine.kind, 0))
    native.call("gptq_block", ENTRIES[w.dtype], w, u, scale, zero, tops, rows.buffer_info()[0], *found, *numbers, *made)
    return out
