"""Every operator of `torch.ops.bitgrid` by `torch.library.opcheck`: schema, fake kernel, autograd registration, and ahead-of-time dispatch
with other sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from quant.affine import ZeroKind
from quant.kernels import int8_linear, kv_attention, library, wq_gemm, wq_gemv
from quant.kernels.kv_attention import per_token
from quant.kernels.library import operands
from quant.kernels.operators import on_its_gpu
from quant.scheme import ActivationScheme
from tests.quant.products_affine import inputs, stored
from tests.quant.products_tables import PREPARE, cases

HALF = torch.float16


def _packed(operation: str, prepare: Callable[[Any], Any], *tensors: Any, rows: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    return operation, lambda: [(inputs(rows, t.shape[1], dtype), *operands(prepare(t))) for t in tensors]


def _gptq_block() -> Any:
    given = (torch.randn(4, 6), torch.eye(4), torch.full((2, 6), 0.5), torch.full((2, 6), 4.0), [0, 0, 1, 1], 3, "code")
    return [given, (*given, torch.full((6,), 3.0))]


def _claq_block() -> Any:
    yield torch.randn(40, 3).T, torch.eye(5)[:3, :3], [2, 1, 3], HALF
    yield torch.randn(3, 40), torch.eye(3), [2, 1, 2], torch.float32, "partition", [2, 1, 1, 0, 2, 1], torch.randn(3, 4).sort(1).values


def _int8_linear() -> Any:
    for symmetric, kind in ((True, ZeroKind.CONSTANT), (False, ZeroKind.CODE)):
        p = int8_linear.prepare(stored(8, 16, 4, 16, kind), ActivationScheme(8, symmetric))
        yield inputs(3, 16), p.codes, p.scale, p.zero, p.sums, p.bits, p.symmetric, p.clip


def _kv_attention() -> Any:
    keys, values, q = (torch.randn(1, heads, 20, 16, dtype=HALF) for heads in (1, 1, 2))
    return [(q[:, :, 0], *operands(kv_attention.prepare(keys, values, 4, 2, 16, 16, 20)), 0.2)]


def _kv_attention_per_token() -> Any:
    keys, values, q = (torch.randn(1, heads, 5, 32, dtype=HALF) for heads in (1, 1, 2))
    return [(q[:, :, 0], *operands(per_token.prepare(keys, values, 4, False, 16, block=16)))]


def _hadamard() -> Any:
    # The output is another tensor than x, and lies as the fake kernel says however x does.
    return [(torch.randn(1, 3).T,), (torch.randn(24, 3).T, 0.2, True)]


CASES: dict[str, Callable[[], Any]] = dict(
    (
        _packed("wq_gemv", wq_gemv.prepare, stored(5, 96, 3, 32, scaled=True)),
        _packed("wq_gemm", wq_gemm.prepare, stored(5, 96, 3, 32, scaled=True), rows=9, dtype=HALF),
        _packed("lut_gemv", PREPARE["lut_gemv"], cases("lut_gemv")[2]),
        _packed("row_lut_gemv", PREPARE["row_lut_gemv"], cases("row_lut_gemv")[2]),
        _packed("binary_gemv", PREPARE["binary_gemv"], cases("binary_gemv")[2]),
    )
)
CASES |= {
    "gptq_block": _gptq_block,
    "gptq_block_fitted": lambda: [(torch.randn(4, 6), torch.eye(4), 2, "g_asym", 3)],
    "lazy_update_": lambda: [(torch.randn(3, 5), torch.randn(2, 3).T, torch.randn(2, 5))],
    "claq_block": _claq_block,
    "kmeans_columns": lambda: [(torch.randn(2, 40), 4, "partition"), (torch.randn(2, 40), 4, "plus_plus", torch.rand(2, 40))],
    "nearest_centre": lambda: [(torch.randn(40, 2).T, torch.randn(2, 4).sort(1).values)],
    "hessian_syrk_": lambda: [(torch.zeros(5, 5), torch.randn(2, 7, 5))],
    "hadamard": _hadamard,
    "hadamard_codes": lambda: [(torch.randn(24, 3).T, 8, True, 0.9)],
    "fake_quantize": lambda: [(torch.randn(5, 12), 8, True, 0.9), (torch.randn(12, 5).T, 8, False)],
    "int8_linear": _int8_linear,
    "rtn_pack": lambda: [(torch.randn(6, 128), "omni", 3, 32, HALF), (torch.randn(3, 40), "g_asym", 4, 20, HALF, True, True)],
    "hqq_pack": lambda: [(torch.randn(6, 64) / 50, 3, 32, HALF, False)],
    "token_log_probs": lambda: [(torch.randn(2, 3, 7), torch.randint(7, (2, 3)))],
    "braq_counts": lambda: [(torch.randn(3, 9), [0, 2, 9])],
    "braq_splits": lambda: [(torch.randn(3, 9), torch.tensor([0.0, 0.5])), (torch.randn(3, 9), torch.ones(2), torch.tensor(2))],
    "kv_attention": _kv_attention,
    "kv_attention_per_token": _kv_attention_per_token,
}
"""Operator ▸ arguments to call it with."""


def test_no_operator_is_left_out() -> None:
    assert library.LIBRARY is not None
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("bitgrid::")}
    assert names == set(CASES)


@pytest.mark.parametrize("name", sorted(CASES))
def test_operators_keep_to_their_schemas(name: str) -> None:
    for arguments in CASES[name]():
        torch.library.opcheck(getattr(torch.ops.bitgrid, name).default, arguments)


def test_an_operator_launches_on_its_tensors_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton goes by the current device, whatever its arguments are on."""
    now, seen = [0], []

    @contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        now.append(device.index)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[-1])
    with FakeTensorMode():
        for device in ("cuda:1", "cuda:0"):
            on_its_gpu(lambda x, more: seen.append((now[-1], str(x.device), more)))(torch.empty(1, device=device), 2)
    assert seen == [(1, "cuda:1", 2), (0, "cuda:0", 2)]
