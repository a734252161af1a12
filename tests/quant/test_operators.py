"""Operators of `torch.ops.bitgrid` on whatever lies in memory otherwise, by every backend that works here; and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from quant.kernels import TABLE, kv_attention, preferring, unavailable, wq_gemm, wq_gemv
from quant.kernels.kv_attention import per_token
from quant.kernels.library import operands
from tests.quant.products_affine import stored
from tests.quant.products_tables import PREPARE, cases
from tests.quant.test_library import CASES

OPS = torch.ops.bitgrid
KERNEL = {"gptq_block_fitted": "gptq_block", "nearest_centre": "kmeans_columns", "hadamard_codes": "hadamard", "braq_counts": "braq_search"}
KERNEL |= {"braq_splits": "braq_search", "kv_attention_per_token": "kv_attention"}
RUNS = [
    (name, backend)
    for name in sorted(CASES)
    for backend in TABLE[KERNEL.get(name, name.rstrip("_"))]
    if unavailable(KERNEL.get(name, name.rstrip("_")), backend) is None
]


def turned(t: Tensor) -> Tensor:
    if t.dim() < 2:
        return torch.stack([t, t], dim=-1)[..., 0]
    return t.mT.contiguous().mT


def amid(t: Tensor) -> Tensor:
    return torch.nn.functional.pad(t, (3, 2))[..., 3:-2] if t.dim() else t


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_results_do_not_depend_on_how_tensors_lie(name: str, backend: str) -> None:
    """Values as of contiguous tensors, and shapes, types and strides that the fake kernel says."""
    run, written = getattr(OPS, name), name.endswith("_")
    for arguments in CASES[name]():
        if backend == "reference" and "partition" in str(arguments[1:]):
            continue  # the fast backends' own
        results = []
        for laid in (torch.clone, turned, amid):
            given = tree_map_only(Tensor, laid, arguments)
            if written:  # in place, where a backend may refuse how it lies
                given = (arguments[0].clone(), *given[1:])
            with FakeTensorMode() as fake:
                expected = run(*tree_map_only(Tensor, fake.from_tensor, given))
            with preferring(backend):
                made = tree_leaves(run(*given)) if not written else run(*given) or [given[0]]
            for one, like in zip(made, [] if written else tree_leaves(expected), strict=not written):
                assert (one.shape, one.dtype) == (like.shape, like.dtype)
                assert all(a == b for a, b, n in zip(one.stride(), like.stride(), one.shape, strict=True) if n > 1 and one.numel())
            results.append(made)
        for other in results[1:]:
            for one, as_it_was in zip(other, results[0], strict=True):
                # Torch's own products sum in an order that strides decide: 2^-24 of some tens.
                torch.testing.assert_close(one, as_it_was, rtol=1e-5, atol=1e-5, equal_nan=True)


def _filled(make: Callable[..., Tensor], value: int) -> Callable[..., Tensor]:
    def made(*given: Any, **more: Any) -> Tensor:
        return make(*given, **more).fill_(value)

    return made


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_all_of_a_result_is_written(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the same, whatever new memory holds."""
    run, written = getattr(OPS, name), name.endswith("_")
    for arguments in CASES[name]():
        if backend == "reference" and "partition" in str(arguments[1:]):
            continue  # the fast backends' own
        results = []
        for value in (3, 100):
            given = tree_map_only(Tensor, torch.clone, arguments)
            with monkeypatch.context() as patched, preferring(backend):
                for where, make in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
                    patched.setattr(where, make, _filled(getattr(where, make), value))
                made = run(*given)
            results.append([given[0]] if written else tree_leaves(made))
        assert all(torch.equal(*both) for both in zip(*results, strict=True))


def _affine(**other: Any) -> dict[str, Any]:
    given = {"block": torch.randn(4, 6), "upper": torch.eye(4), "scale": torch.ones(2, 6), "zero": torch.ones(2, 6)}
    return given | {"group": [0, 0, 1, 1], "bits": 3, "zero_kind": "code"} | other


def _product(operation: str, width: int = 0, rows: int = 0) -> Callable[[], object]:
    prepare = {"wq_gemv": wq_gemv.prepare, "wq_gemm": wq_gemm.prepare, **PREPARE}[operation]
    tensor = stored(5, 96, 3, 32) if operation.startswith("wq") else cases(operation)[0]
    held = [*operands(prepare(tensor))]
    if rows:
        held[-1 if operation == "lut_gemv" else -2] = rows
    x = torch.randn(2, width or tensor.shape[1]).to(torch.float16 if operation == "wq_gemm" else torch.float32)
    return lambda: getattr(OPS, operation)(x, *held)


def _tails(*tails: int) -> object:
    return OPS.claq_block(torch.randn(2, 40), torch.eye(2), [2, 2], torch.float32, "partition", list(tails))


def _changed(names: str, given: tuple[Any, ...], changes: dict[str, Any]) -> list[Any]:
    """Tensors by a function of them, numbers by others."""
    held = dict(zip(names.split(), given, strict=False))
    return [changes[n](v) if callable(changes.get(n)) else changes.get(n, v) for n, v in held.items()]


def _attended(width: int = 16, **changes: Any) -> object:
    x = torch.randn(2, 2, 40, width)
    names = "keys key_ranges values value_ranges window_keys window_values counts key_bits value_bits"
    return OPS.kv_attention(x[:, :, 0], *_changed(names, operands(kv_attention.prepare(x, x, 4, 2, 16, 16)), changes))


def _attended_per_token(**changes: Any) -> object:
    x = torch.randn(2, 2, 40, 64)
    names = "keys values ranges counts bits"
    return OPS.kv_attention_per_token(x[:, :, 0], *_changed(names, operands(per_token.prepare(x, x, 4, False, 16)), changes))


X, LOGITS = torch.randn(3, 12), torch.randn(4, 7)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a group that there is not": (lambda: OPS.gptq_block(**_affine(group=[0, 0, 1, 9_000_000])), r"group=\[0, 0, 1, 9000000\]; .* 0 to 1"),
    "a group below 0": (lambda: OPS.gptq_block(**_affine(group=[0, 0, 1, -1])), "group="),
    "too few groups": (lambda: OPS.gptq_block(**_affine(group=[0, 0])), "give 4 numbers"),
    "a factor of another size": (lambda: OPS.gptq_block(**_affine(upper=torch.eye(2))), r"upper is \(2, 2\)"),
    "ranges of one row": (lambda: OPS.gptq_block(**_affine(scale=torch.ones(2, 1), zero=torch.ones(2, 1))), r"scale is \(2, 1\)"),
    "a block of 16 bits": (lambda: OPS.gptq_block(**_affine(block=torch.randn(4, 6).bfloat16())), "float32 or float64"),
    "no columns": (lambda: OPS.gptq_block(**_affine(block=torch.randn(0, 6), upper=torch.eye(0), group=[])), "B of 1 or more"),
    "groups that do not divide": (
        lambda: OPS.gptq_block_fitted(torch.randn(4, 6), torch.eye(4), 0, "g_asym", 3),
        "width=0; give a divisor",
    ),
    "an update of other sizes": (lambda: OPS.lazy_update_(torch.ones(3, 5), torch.ones(3, 2), torch.ones(2, 9)), r"right is \(2, 9\)"),
    "a total of fewer channels": (lambda: OPS.hessian_syrk_(torch.zeros(5, 5), torch.ones(2, 7, 6)), r"total is \(5, 5\)"),
    "a total that is a view": (lambda: OPS.hessian_syrk_(torch.zeros(5, 9)[:, :5], torch.ones(2, 7, 5)), "contiguous"),
    "activations of a batch": (lambda: OPS.fake_quantize(torch.randn(2, 3, 12), 8, True), r"x is \(2, 3, 12\).*flatten\(0, -2\)"),
    "one activation": (lambda: OPS.fake_quantize(torch.randn(12), 8, False), r"x is \(12,\)"),
    "activations of 9 bits": (lambda: OPS.fake_quantize(X, 9, True), "bits=9; give 2 to 8"),
    "a transform of integers": (lambda: OPS.hadamard(torch.ones(2, 8, dtype=torch.int32)), r"x is \(2, 8\), torch.int32"),
    "a transform of a batch": (lambda: OPS.hadamard(torch.ones(2, 3, 8)), r"x is \(2, 3, 8\).*flatten\(0, -2\)"),
    "codes of 9 bits": (lambda: OPS.rtn_pack(X, "g_asym", 9, 12, torch.float16), "bits=9; give 1 to 8"),
    "a sign without a step": (lambda: OPS.rtn_pack(X, "absmax", 1, 12, torch.float16), "bits=1; give 2 to 8"),
    "an unknown grid": (lambda: OPS.rtn_pack(X, "linear", 4, 12, torch.float16), "grid='linear'; choose one of g_asym, "),
    "scales of bfloat16": (lambda: OPS.hqq_pack(X, 4, 12, torch.bfloat16, False), "scale_dtype=torch.bfloat16; choose torch.float16 or"),
    "fewer tokens than rows": (lambda: OPS.token_log_probs(LOGITS, torch.zeros(2, dtype=torch.long)), r"tokens is \(2,\)"),
    "tokens of a float type": (lambda: OPS.token_log_probs(LOGITS, torch.zeros(4)), "tokens torch.float32; give floats, and int32 or"),
    "columns without a value": (lambda: OPS.kmeans_columns(torch.randn(3, 0), 4), "at least one value"),
    "centres of fewer columns": (lambda: OPS.nearest_centre(torch.randn(2, 40), torch.randn(1, 4)), r"centres is \(1, 4\)"),
    "fewer widths than columns": (lambda: OPS.claq_block(torch.randn(3, 40), torch.eye(3), [2, 2], torch.float32), "2 widths"),
    "codebooks of 9 bits": (lambda: OPS.claq_block(torch.randn(2, 40), torch.eye(2), [2, 9], torch.float32), "bits=9; give 1 to 8"),
    "codebooks of no bits": (lambda: OPS.claq_block(torch.randn(2, 40), torch.eye(2), [0, 2], torch.float32), "bits=0; give 1 to 8"),
    "codebooks of integers": (lambda: OPS.claq_block(torch.randn(2, 40), torch.eye(2), [2, 2], torch.int32), "dtype=torch.int32; choose"),
    "more weights kept than there are": (lambda: _tails(30, 20, 1, 1), r"tails=\[30, 20, 1, 1\]; give .* no more than 40"),
    "fewer weights kept than none": (lambda: _tails(-1, 2, 1, 1), "tails="),
    "tails of one column": (lambda: _tails(1, 1), "give two numbers for each of 2 columns"),
    "a number to skip for each column": (lambda: OPS.braq_splits(X, torch.ones(2), torch.ones(5, dtype=torch.bool)), r"skip is \(5,\)"),
    "keys in other bits": (lambda: _attended(64, key_bits=8), r"keys is .*; give what `operands` gives of a cache"),
    "keys of 9 bits": (lambda: _attended(key_bits=9), "bits=9; give 2 to 8"),
    "values of fewer heads": (lambda: _attended(values=lambda t: t[:, :1]), "values is"),
    "ranges of fewer blocks": (lambda: _attended(key_ranges=lambda t: t[:, :, :1]), "key_ranges is"),
    "ranges of float32": (lambda: _attended(value_ranges=Tensor.float), "ranges are torch.float16, torch.float32"),
    "counts of fewer sequences": (lambda: _attended(counts=lambda t: t[:1]), "counts is"),
    "codes per token in other bits": (lambda: _attended_per_token(bits=8), "keys is"),
    "ranges per token of fewer heads": (lambda: _attended_per_token(ranges=lambda t: t[:, :1]), "ranges is"),
    "more columns than a block has": (lambda: OPS.braq_counts(X, [0, 90]), r"counts=\[0, 90\].*0 to 12"),
    "another width of int8": (
        lambda: OPS.int8_linear(X, torch.ones(4, 8, dtype=torch.int8), torch.ones(4), None, torch.ones(4), 8, True),
        r"codes is \(4, 8\)",
    ),
    "codes of 5 bits": (lambda: OPS.wq_gemv(X, torch.ones(1, 1, 1), torch.ones(1, 1, 2, 8), None, 5, 5), "bits=5; choose 2, 3, 4 or 8"),
}
PRODUCTS = ("wq_gemv", "wq_gemm", "lut_gemv", "row_lut_gemv", "binary_gemv")


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_would_be_read_beyond_its_end_is_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("operation", PRODUCTS)
def test_products_refuse_other_weights(operation: str) -> None:
    _product(operation)()
    for call in (_product(operation, width=9600), _product(operation, rows=5_000_000)):
        with pytest.raises(ValueError, match=r"x is \(2, "):
            call()
