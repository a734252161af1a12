"""What the stage `measure` says of packed models: quantized by stages, each decoded from the artifact that its stage committed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from bench.on_gpu.clock import Bench, Row, going_on
from bench.whole.runs import GB, Work, model_in, together
from bench.whole.shapes import SHAPES
from bench.whole.stages import Made, committed, grouped, quantize, spec_of
from bench.whole.streamed import one_for_all
from quant.scheme import ActivationScheme, Granularity, KVScheme, WeightScheme
from workers.comparison import TOLERANCE
from workers.environment import environment
from workers.request import Hints
from workers.specs import MeasureSpec, StageKind, Workload

KIVI = KVScheme(4, kind="kivi", group_size=64, residual_length=64)
LOADS = (Workload(1, 512, 64), Workload(16, 512, 64))
"""A step of one sequence, and of 16."""
MEMORY = 0.9
"""Share of the device's that weights may take; a larger model is streamed where it is compared with, and not timed."""


@dataclass(frozen=True)
class Variant:
    """Weights rounded to nearest: how a code was chosen does not matter to its kernel."""

    name: str
    weight: WeightScheme
    activation: ActivationScheme | None = None
    caches: tuple[KVScheme | None, ...] = (None,)


W4 = Variant("w4a16_g128", grouped(4))
W8A8 = Variant("w8a8", WeightScheme(8, symmetric=True, granularity=Granularity.CHANNEL), ActivationScheme(8))


@dataclass(frozen=True)
class Model:
    shape: str
    variants: tuple[Variant, ...]
    dry: str = "dry"
    one_file: bool = False
    """A single layer's file stands for all, which are more than a disk may hold."""


SHAPE_7B = Model("7b", (replace(W4, caches=(None, KIVI)),))
OTHER_WIDTHS = Model("7b", (Variant("w3a16_g128", grouped(3)), Variant("w2a16_g128", grouped(2)), W8A8))
SHAPE_70B = Model("70b", (W4,), one_file=True)
EXPERTS = Model("8x7b", (W4,), "dry_experts", one_file=True)


def decoded(root: Path, b: Bench, hints: Hints, model: Model) -> Iterator[Row]:
    """The error is of logits to the simulated model's, as `measure` has it."""
    return going_on(_Decoding(root, b, hints, model).rows())


class _Decoding:
    def __init__(self, root: Path, b: Bench, hints: Hints, model: Model) -> None:
        self._root, self._b, self._of = root, b, model
        self._work = Work("rtn", model.dry if b.dry else model.shape, layers=b.layers)
        self._layers = self._work.layers or SHAPES[self._work.shape].layers
        self._folder = model_in(root, self._work, self._layers, b.device.type, one=model.one_file)
        self._device = environment(str(b.device))["device_name"]
        total = torch.cuda.get_device_properties(b.device).total_memory if b.device.type == "cuda" else None
        self._hints = replace(hints, memory_bytes=None if total is None else int(MEMORY * total))
        self._plain: dict[Workload, float] = {}
        """Microseconds of a step that is not quantized."""

    def rows(self) -> Iterator[Callable[[], Row]]:
        loads = tuple(replace(w, prompt=80, tokens=3) if self._b.dry else w for w in LOADS)
        limit, size = self._hints.memory_bytes, SHAPES[self._work.shape].bytes(self._layers)
        if limit is None or size <= limit:
            yield from (partial(self._row, "not quantized", load) for load in loads)
        else:
            print(f"   not quantized: not timed: weights of {size / GB:.0f} GB are above {limit / GB:.0f} GB", flush=True)
        for v in self._of.variants:
            with self._files():
                made = quantize(
                    spec_of("rtn", self._work.samples, self._work.length, {}, weight=v.weight), self._folder, self._root, self._hints
                )
            print(f"  {v.name}: quantized in {made.seconds:.1f} s", flush=True)
            for kv in v.caches:
                name = v.name if kv is None else f"{v.name}kv{kv.bits}"
                yield from (partial(self._row, name, load, made, v.activation, kv) for load in loads)
            shutil.rmtree(made.folder)

    def _files(self) -> AbstractContextManager[None]:
        return one_for_all() if self._of.one_file else nullcontext()

    def _row(
        self, name: str, load: Workload, of: Made | None = None, activation: ActivationScheme | None = None, kv: KVScheme | None = None
    ) -> Row:
        spec = MeasureSpec(self._work.spec.model, load, self._device, activation, kv)
        with self._files():
            made = committed(
                StageKind.MEASURE, spec, {} if of is None else {"quantize": of.folder}, self._folder, {}, self._root, self._hints
            )
        shutil.rmtree(made.folder)
        found, took = made.record["summary"], 1e6 * made.record["summary"]["decode_p50_s"]
        if of is None:
            self._plain[load] = took
        said = f"{load.batch} x {load.prompt} tokens"
        energy = "" if found["token_energy_j"] is None else f", {found['token_energy_j']:.3f} J a token"
        print(
            f"  {name}, {said}: {found['decode_tokens_per_s']:.0f} tokens/s, prompt {1e3 * found['prefill_p50_s']:.1f} ms, weights "
            f"{found['weights_bytes'] / GB:.2f} GB, peak {found['peak_memory_bytes'] / GB:.2f} GB{energy}, {found['backends']}, "
            f"graph {found['graph']}; stage {made.stage_s:.1f} s"
        )
        for note in together(made.record["notes"]):
            print(f"  note: {note}", flush=True)
        # What the unquantized model says is what the others are compared with.
        error, beside = (0.0, {}) if of is None else (found["check_error"], {"bfloat16": self._plain[load]} if load in self._plain else {})
        dry, where = self._b.dry, f"{self._layers} layers, {self._work.shape}-shaped"
        return Row(
            f"decoding a token, {name}, {where}, {said}", error, TOLERANCE[spec.model.dtype], None if dry else took, {} if dry else beside,
            found["weights_bytes"], details=found,
        )  # fmt: skip
