"""What CUDA C++ copies 16 bytes at a time begins at multiples of 16: elsewhere a device ends with an error that nothing after it in the
process gets past. No device is needed: calls of the library are only looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.kernels import on_cuda
from quant.kernels.binary_gemv import cuda as signs_cuda
from quant.kernels.lut_gemv import cuda as lut_cuda
from quant.kernels.wq_gemv import cuda as codes_cuda
from tests.quant.products_affine import inputs, stored
from tests.quant.products_tables import codebook, signs


def moved(t: Tensor) -> Tensor:
    """The same, one number further than memory that begins at a multiple of 16."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype)
    assert room.data_ptr() % 16 == 0
    return room[1:].view(t.shape).copy_(t)


def test_weights_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(on_cuda, "call", lambda *given: calls.append(given))
    monkeypatch.setattr(codes_cuda, "_early", lambda device: 0)
    codes = codes_cuda.prepare(stored(20, 256, 4, 128, scaled=True))
    lut, flags = lut_cuda.prepare(codebook(40, 300, (4,))), signs_cuda.prepare(signs(20, 256, 128))
    part = lut.parts[0]
    products = [
        (codes_cuda, codes_cuda.wq_gemv, codes, [{n: moved(getattr(codes, n))} for n in ("words", "ranges", "input_scale")]),
        (lut_cuda, lut_cuda.lut_gemv, lut, [{"parts": (replace(part, **{n: moved(getattr(part, n))}),)} for n in ("words", "values")]),
        (signs_cuda, signs_cuda.binary_gemv, flags, [{n: moved(getattr(flags, n))} for n in ("words", "tables", "salient", "largest")]),
    ]
    for backend, product, packed, elsewhere in products:
        # x may begin anywhere.
        product(moved(inputs(2, packed.shape[1])), packed)
        backend.values(packed)
        for change in elsewhere:
            before = len(calls)
            with pytest.raises(ValueError, match="bytes after a multiple of 16"):
                product(inputs(2, packed.shape[1]), replace(packed, **change))
            assert len(calls) == before
    assert len(calls) == 6


def test_an_input_scale_is_taken_from_anywhere() -> None:
    tensor = stored(20, 256, 4, 128, dtype=torch.float32, scaled=True)
    assert tensor.input_scale is not None
    packed = codes_cuda.prepare(replace(tensor, input_scale=moved(tensor.input_scale)))
    assert packed.input_scale is not None
    assert packed.input_scale.data_ptr() % 16 == 0
    assert torch.equal(packed.input_scale, tensor.input_scale)
