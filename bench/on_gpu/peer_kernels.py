"""Calls of other packages' kernels for `bench.on_gpu.peers`: what each needs, and what its weight stands for.

A peer's packages are imported when it is started. Inputs of products are as many as no cache holds together.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bench.on_gpu.clock import Bench

SHAPES = ((4096, 4096), (4096, 11008), (8192, 8192), (8192, 28672))
BLOCKS = (4096, 12288, 16384, 8 * 4096)
GROUP, COLUMNS, COLD = 128, 128, 512e6


@dataclass(frozen=True)
class Case:
    """One figure: a product `[M, K] · [N, K]ᵀ`, or the solving of a block of N rows and K columns, where M is 0."""

    n: int
    k: int
    m: int
    bits: int

    def __str__(self) -> str:
        return f"{self.bits} bits, {self.n} x {self.k}" + (f", M={self.m}" if self.m else "")


@dataclass(frozen=True)
class Ready:
    """A peer's work for a case."""

    run: Callable[[int], Tensor]
    """Number of a copy of the input ▸ result."""
    copies: int
    read: int
    """Bytes that a call has to read of the weight; 0: not told."""
    error: Callable[[Tensor], float]
    """Of a result."""
    allowed: float
    beside: Callable[[int], object] | None = None
    """Part of `run` that is no work of the peer's; its time is taken off."""


@dataclass(frozen=True)
class Peer:
    start: Callable[[Bench, list[Case]], Callable[[Case], Ready]]
    """Imports and compiles what all cases need."""
    cases: tuple[Case, ...]
    seconds: float
    """After these no other case is begun."""
    kind: str = "products"


def product(x: Tensor, weight: Tensor, rows: slice, run: Callable[[int], Tensor], read: int, allowed: float) -> Ready:
    """weight: those rows of what the peer's weight stands for, in any type."""
    want = x.double() @ weight.double().T

    def error(got: Tensor) -> float:
        return float((got[:, rows].double() - want).norm() / want.norm())

    return Ready(run, 1 + int(COLD / read), read, error, allowed)


def some(n: int) -> slice:
    """Rows to compare: 128 of n, from everywhere."""
    return slice(None, None, max(1, n // 128))


def size(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def copied(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """As many copies as `Ready.copies` says, the originals first."""
    more = int(COLD / size(*tensors))
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(more))]


def drawn(b: Bench, case: Case) -> tuple[Tensor, Tensor]:
    """Codes, uint8 `[N, K]`, and scales, float32 `[N, G]`."""
    g = torch.Generator(b.device).manual_seed(case.bits)
    codes = torch.randint(0, 2**case.bits, (case.n, case.k), generator=g, dtype=torch.uint8, device=b.device)
    return codes, (torch.rand(case.n, case.k // GROUP, generator=g, device=b.device) + 0.5) / 2**case.bits


def decoded(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """(code - half the range) · scale, float64."""
    made: Tensor = (codes.double() - 2 ** (bits - 1)) * scale.double().repeat_interleave(GROUP, 1)
    return made


def tinygemm(b: Bench, cases: list[Case]) -> Callable[[Case], Ready]:
    """PyTorch's own. A code's value is (code - 8) · scale + zero; the even column is in the higher half of a byte."""

    def make(case: Case) -> Ready:
        codes, scale = drawn(b, case)
        rows = some(case.n)
        packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
        scale = scale.bfloat16()
        ranges = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
        x = b.random(case.m, case.k, dtype=torch.bfloat16)
        inputs = copied(packed, ranges)
        weight = decoded(codes[rows], scale[rows], 4)

        def run(i: int) -> Tensor:
            made: Tensor = torch.ops.aten._weight_int4pack_mm(x, inputs[i][0], GROUP, inputs[i][1])
            return made

        return product(x, weight, rows, run, size(packed, ranges), 1e-2)

    return make


def humming(b: Bench, cases: list[Case]) -> Callable[[Case], Ready]:
    """Symmetric codes in groups, which is what it is fastest with. Words hold the codes of a row as one stream of bits. Every kernel that
    the cases need is compiled first, all at once."""
    os.environ.setdefault("HUMMING_CACHE_DIR", str(Path(tempfile.gettempdir()) / "bitgrid-bench-humming"))
    from humming import ops
    from humming.kernel.humming import HummingKernel
    from humming.kernel.repack_weight import RepackWeightKernel
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_layer_config, transform_humming_tensors
    from humming.tune import get_heuristics_config
    from humming.utils.nvrtc import get_nvrtc_library_path

    layers, settings = {}, {}
    for case in cases:
        schema = HummingWeightSchema(b_dtype=f"uint{case.bits}", weight_scale_group_size=GROUP)
        layers[case] = prepare_layer_config(case.n, case.k, schema, torch_dtype=torch.bfloat16, device=0)
        settings[case] = json.loads(json.dumps(get_heuristics_config(layers[case], shape_m=case.m, device=0)))
    sms = {case: settings[case].pop("num_sms", 0) for case in cases}
    wanted: list[tuple[Any, dict[str, Any]]] = [(HummingKernel, json.loads(layers[c].to_str()) | settings[c]) for c in cases]
    plain = {"activation_bits": 16, "is_weight_packed": True}
    widths = sorted({case.bits for case in cases})
    wanted += [(RepackWeightKernel, plain | {"weight_bits": n, "should_preprocess_for_int2fp": n == 8}) for n in widths]
    try:
        # The compiler library looks for its other half there, and not beside itself.
        found = str(Path(get_nvrtc_library_path()).parent)
        os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, (found, os.environ.get("LD_LIBRARY_PATH"))))
        kernels = HummingKernel.compile_many(wanted, 0)
    except Exception:  # nvcc may do
        os.environ["HUMMING_COMPILER"] = "nvcc"
        kernels = HummingKernel.compile_many(wanted, 0)
    chosen = {
        case: torch.tensor([kernel.kernel_id, sms[case]] if sms[case] else [kernel.kernel_id])
        for case, kernel in zip(cases, kernels[: len(cases)], strict=True)
    }

    def make(case: Case) -> Ready:
        g = torch.Generator(b.device).manual_seed(case.bits)
        words = torch.randint(-(2**31), 2**31, (case.n, case.k * case.bits // 32), generator=g, dtype=torch.int32, device=b.device)
        scale = drawn(b, case)[1].bfloat16()
        rows = some(case.n)
        weight = decoded(streamed(words[rows], case.bits), scale[rows], case.bits)
        tensors = transform_humming_tensors(layers[case], {"weight": words, "weight_scale": scale})
        inputs = copied(tensors["weight"], tensors["weight_scale"])
        locks = torch.zeros(2048, dtype=torch.int32, device=b.device)
        x = b.random(case.m, case.k, dtype=torch.bfloat16)

        def run(i: int) -> Tensor:
            made: Tensor = ops.launch_kernel(configs=chosen[case], inputs=x, weight=inputs[i][0], weight_scale=inputs[i][1], locks=locks)
            return made

        return product(x, weight, rows, run, size(*inputs[0]), 1e-2)

    return make


def streamed(words: Tensor, bits: int) -> Tensor:
    """Codes, uint8 `[N, K]`, of int32 words that hold a row's codes as one stream, the lowest bits first."""
    place = torch.arange(32, dtype=torch.int32, device=words.device)
    stream = (words[..., None] >> place & 1).reshape(words.shape[0], -1, bits)
    return (stream << place[:bits]).sum(-1).to(torch.uint8)


def gemlite(b: Bench, cases: list[Case]) -> Callable[[Case], Ready]:
    """float16: with bfloat16 it adds hundreds of partial sums in that type. It has settings measured on an H100 for some shapes; the best
    of the nearest ones is taken, because its own search takes a minute a shape."""
    import gemlite as package
    from gemlite import core

    known = json.loads((Path(package.__file__).parent / "configs" / "h100.json").read_text())
    began = time.perf_counter()

    def settings(kind: str, case: Case, each: int) -> list[dict[str, Any]]:
        shapes = {tuple(json.loads(key.replace("(", "[").replace(")", "]"))): value for key, value in known[kind].items()}
        near = sorted(
            (abs(math.log(n / case.n)) + abs(math.log(k / case.k)), json.dumps(value, sort_keys=True))
            for (m, n, k, group, *_), value in shapes.items()
            if m == case.m and group == GROUP
        )
        made = [json.loads(text) for text in dict.fromkeys(text for _, text in near)]
        for one in made:  # a step must not be shorter than what a word holds
            one["BLOCK_SIZE_K"] = max(one["BLOCK_SIZE_K"], each)
        return made

    def make(case: Case) -> Ready:
        codes, scale = drawn(b, case)
        scale = scale.half()
        rows = some(case.n)
        layer = package.GemLiteLinear(case.bits, GROUP, case.k, case.n, package.DType.FP16, package.DType.FP16)
        layer.pack(codes, scale, 2 ** (case.bits - 1))
        told = layer.get_meta_args()
        packed, ranges, zeros, other = layer.get_tensor_args()
        inputs = copied(packed.data, ranges.data)
        x = b.random(case.m, case.k, dtype=torch.float16)

        def run(i: int) -> Tensor:
            made: Tensor = core.forward_functional(x, None, [*inputs[i], zeros, other], told, -1)
            return made

        kind, each = core.get_matmul_type(case.m, case.bits), layer.elements_per_sample
        signature = str((case.m, case.n, case.k, GROUP, each, 100 + case.bits))
        best: tuple[float, dict[str, Any]] | None = None
        for one in settings(kind, case, each)[: 2 if case.bits == 4 else 1]:
            if best is not None and time.perf_counter() - began > 12:
                break
            core.GEMLITE_TRITON_CONFIG_CACHE.setdefault(kind, {})[signature] = one
            forget(core.GEMLITE_TRITON_MAPPING[kind].kernel)
            took = b.time(run, len(inputs))
            if took is not None and (best is None or took < best[0]):
                best = took, one
        if best is not None:
            core.GEMLITE_TRITON_CONFIG_CACHE[kind][signature] = best[1]
            forget(core.GEMLITE_TRITON_MAPPING[kind].kernel)
        return product(x, decoded(codes[rows], scale[rows], case.bits), rows, run, size(*inputs[0]), 2e-2)

    return make


def forget(kernels: Any) -> None:
    """What their search has found so far."""
    for kernel in kernels if isinstance(kernels, (list, tuple)) else [kernels]:
        kernel.cache.clear()


def bitsandbytes(b: Bench, cases: list[Case]) -> Callable[[Case], Ready]:
    """NF4 in blocks as long as our groups."""
    from bitsandbytes import functional

    def make(case: Case) -> Ready:
        dense = b.random(case.n, case.k, dtype=torch.bfloat16)
        packed, state = functional.quantize_4bit(dense, blocksize=GROUP, quant_type="nf4")
        rows = some(case.n)
        weight = functional.dequantize_4bit(packed, state)[rows].clone()
        inputs = copied(packed.view(-1, 1), state.absmax)
        x = b.random(case.m, case.k, dtype=torch.bfloat16)

        def run(i: int) -> Tensor:
            codes, largest = inputs[i]
            made: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(x, codes, [case.n, case.k], largest, GROUP, "nf4")
            return made

        return product(x, weight, rows, run, size(*inputs[0]), 1e-2)

    return make


def marlin(b: Bench, cases: list[Case]) -> Callable[[Case], Ready]:
    from bench.on_gpu.marlin import start

    return start(b, cases)


def llm_compressor(b: Bench, cases: list[Case]) -> Callable[[Case], Ready]:
    """Its Triton kernel for a block of GPTQ columns, out of its one file: what the file imports beside that is stood in for. Scales and
    zeros are given as views, fewer bytes than in its own use. It writes over its input, so that is written anew before each call."""
    from quant.affine import Affine, ZeroKind
    from quant.factors import inverse_factor
    from quant.grids import GRIDS, fit
    from quant.kernels import kernel

    solve = alone("llmcompressor", "modifiers/gptq/gptq_quantize.py").fused_gptq_block_update

    def make(case: Case) -> Ready:
        x = b.random(4 * case.k, case.k)
        upper, _ = inverse_factor(x.T @ x, 0.01)
        block = b.random(case.k, case.n)
        ranges = fit(GRIDS["g_asym"], block.T.reshape(case.n, 1, case.k), case.bits, torch.float32)
        affine = Affine(ranges.scale[..., 0].T.contiguous(), ranges.zero[..., 0].T.contiguous(), case.bits, ZeroKind.CODE)
        want = kernel("gptq_block", "torch", b.device).run.solve_block(block, upper, affine, [0] * case.k).codes
        given = block.T.contiguous()[None]
        work, values, errors = (torch.empty_like(given) for _ in range(3))
        scale, zero = (t.T.float()[None].expand(1, case.n, case.k) for t in (affine.scale, affine.zero))
        factor = upper[None].contiguous()

        def run(i: int) -> Tensor:
            work.copy_(given)
            solve(work, factor, scale, zero, values, errors, 0.0, 2.0**case.bits - 1, 0)
            return values

        def error(got: Tensor) -> float:
            codes = (got[0] / affine.scale.T + affine.zero.T).round()
            return float((codes != want.T).double().mean())

        return Ready(run, 1, 0, error, 1e-2, lambda i: work.copy_(given))

    return make


def alone(package: str, path: str) -> ModuleType:
    """A file of an installed package that is not imported: other packages that the file names are mocks while it is executed, but for
    Triton."""
    import triton
    import triton.language as tl
    import triton.language.extra.cuda.libdevice

    top = importlib.util.find_spec(package)
    if top is None or not top.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named '{package}'")
    file = Path(top.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(f"peer_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    names = ("quantization", "quantization.lifecycle", "quantization.lifecycle.forward_helpers", "utils", "utils.impl_backend")
    stood_in: dict[str, Any] = {name: MagicMock() for name in ("compressed_tensors", *(f"compressed_tensors.{n}" for n in names))}
    stood_in["compressed_tensors.utils.triton"] = SimpleNamespace(HAS_TRITON=True, tl=tl, triton=triton, triton_req=MagicMock())
    parts = path.removesuffix(".py").split("/")[:-1]
    stood_in |= {".".join([package, *parts[:i]]): MagicMock() for i in range(len(parts) + 1)}
    stood_in[".".join([package, *parts, "helpers"])] = MagicMock()
    with patch.dict(sys.modules, stood_in):
        spec.loader.exec_module(module)
    sys.modules[spec.name] = module  # Triton looks a kernel's module up by its name
    return module


def cases(*bits: int, rows: tuple[int, ...] = (1, 16)) -> tuple[Case, ...]:
    return tuple(Case(n, k, m, width) for m in rows for n, k in SHAPES for width in bits)


OTHER_WIDTHS = tuple(Case(8192, 8192, m, bits) for m in (1, 16) for bits in (2, 3))

PEERS = {
    "tinygemm": Peer(tinygemm, cases(4), 15),
    "humming": Peer(humming, (*cases(4), *OTHER_WIDTHS), 45),
    "marlin": Peer(marlin, cases(4, rows=(16,)), 60),
    "bitsandbytes_nf4": Peer(bitsandbytes, cases(4), 15),
    "gemlite": Peer(gemlite, (*cases(4), Case(8192, 8192, 1, 2)), 20),
    "llm_compressor": Peer(llm_compressor, tuple(Case(n, COLUMNS, 0, 4) for n in BLOCKS), 20, "block"),
}
