"""The solver's codes follow from one Cholesky factor without the inverse of the matrix: docs/adr/0021-push-form.md says why the solver has
the inverse all the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.affine import Affine
from quant.factors import inverse_factor
from quant.kernels import kernel
from quant.solver import solve_affine
from tests.quant.test_gptq_block import problem


def pulled(weight: Tensor, damped: Tensor, block_size: int, affine: Affine, group: list[int]) -> Tensor:
    """Codes `[K, N]` for ranges known from the start. With H = R Rᵀ and (W - Q) R = E, the columns of a block become
    W_b + (W - Q)_{<b} R_{<b,b} R_bb⁻¹ before they are rounded: read from what is finished, and only R's blocks on the diagonal inverted."""
    run = kernel("gptq_block", "reference").run
    r = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    codes, missed = torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, len(weight), block_size):
        end = min(start + block_size, len(weight))
        corner = torch.linalg.inv(r[start:end, start:end]).triu()
        block = weight[start:end] + (r[:start, start:end] @ corner).T @ missed[:start]
        solved = run.solve_block(block, corner, affine, group[start:end])
        codes[start:end], missed[start:end] = solved.codes, weight[start:end] - solved.values
    return codes


@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 1.0), (torch.float32, 0.9999)])
@pytest.mark.parametrize("block_size", [32, 40])
def test_pull_form_gives_the_codes_of_the_push_form(dtype: torch.dtype, least: float, block_size: int) -> None:
    w, _, affine, group = problem(256, 96, "g_asym", 3, dtype)
    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(1), dtype=dtype)
    h = x.T @ x
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(96, dtype=dtype)
    solved = solve_affine(w, inverse_factor(h, 0.01)[0], block_size, lambda start, end, _: (affine, group[start:end]), "reference")
    assert float((pulled(w, damped, block_size, affine, group) == solved.codes).double().mean()) >= least
