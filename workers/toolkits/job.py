"""What a toolkit is given, and how its results travel back: one safetensors file per linear and an index.

job.json               method, schemes by linear, propagation, seed
tokens.safetensors     tokens int64 `[S, T]`, where the method feeds text
results: linears.json  name ▸ stored format, meta, notes, details
         00000.safetensors ...  `pack()` of each stored tensor
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.methods.base import Rounded
from quant.methods.make import toolkit_method
from quant.scheme import WeightScheme
from quant.tensors import unpack
from workers.errors import InputError, UnsupportedModel
from workers.specs import Component, ModelSpec, from_json, to_json

JOB, TOKENS, LINEARS = "job.json", "tokens.safetensors", "linears.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Job:
    """One model, quantized by one method of a toolkit."""

    method: Component
    folder: Path
    """Of the checkpoint."""
    model: ModelSpec
    linears: dict[str, WeightScheme]
    """Full module path ▸ format."""
    propagation: str
    seed: int
    tokens: Tensor | None = None
    """int64 `[S, T]`."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    notes: list[str] = field(default_factory=list)

    @property
    def made(self) -> Any:
        """The method with its parameters (`quant.methods.toolkits`)."""
        return toolkit_method(self.method.name, dict(self.method.params), version=self.method.version)

    @property
    def dtype(self) -> torch.dtype:
        if self.model.dtype not in DTYPES:
            raise InputError(f"model.dtype={self.model.dtype}; toolkits take models in {', '.join(DTYPES)}")
        return DTYPES[self.model.dtype]

    def write(self, folder: Path) -> None:
        """Everything but the device and notes, into an existing folder."""
        plain = {
            "method": to_json(self.method),
            "folder": str(self.folder),
            "model": to_json(self.model),
            "linears": {name: to_json(scheme) for name, scheme in self.linears.items()},
            "propagation": self.propagation,
            "seed": self.seed,
        }
        (folder / JOB).write_text(json.dumps(plain))
        if self.tokens is not None:
            save_file({"tokens": self.tokens.contiguous()}, folder / TOKENS)

    @staticmethod
    def read(folder: Path, device: torch.device) -> Job:
        plain = json.loads((folder / JOB).read_text())
        tokens = load_file(folder / TOKENS)["tokens"] if (folder / TOKENS).is_file() else None
        return Job(
            method=from_json(Component, plain["method"]),
            folder=Path(plain["folder"]),
            model=from_json(ModelSpec, plain["model"]),
            linears={name: from_json(WeightScheme, scheme) for name, scheme in plain["linears"].items()},
            propagation=plain["propagation"],
            seed=plain["seed"],
            tokens=tokens,
            device=device,
        )

    def load_model(self) -> Any:
        """The whole model on the CPU, by the toolkit's own transformers, in the spec's dtype."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype, local_files_only=True)
        return model.eval().requires_grad_(False)

    def load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    def modules(self, model: Any) -> dict[str, Any]:
        """Linears by name. Raises UnsupportedModel for one that is no module of its own."""
        found = dict(model.named_modules())
        other = next((n for n in self.linears if not isinstance(found.get(n), torch.nn.Linear)), None)
        if other is not None:
            raise UnsupportedModel(f"{self.method.name} takes plain linears; {other} is {type(found.get(other)).__name__}")
        return {n: found[n] for n in self.linears}

    def text(self) -> Tensor:
        """Calibration tokens int64 `[S, T]`. Raises InputError where there are none."""
        if self.tokens is None:
            raise InputError(f"{self.method.name} feeds text: the spec needs a calibration")
        return self.tokens


class ResultWriter:
    """Writes what a toolkit made, one linear after the other, for `Results` to read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: dict[str, dict[str, Any]] = {}

    def add(self, name: str, rounded: Rounded) -> None:
        file = f"{len(self._rows):05d}.safetensors"
        save_file({k: t.detach().cpu().contiguous() for k, t in rounded.tensor.pack().items()}, self._folder / file)
        self._rows[name] = {
            "file": file,
            "format": rounded.tensor.format,
            "meta": rounded.tensor.meta(),
            "damp": rounded.damp,
            "notes": rounded.notes,
            "details": rounded.details,
        }

    def close(self) -> None:
        (self._folder / LINEARS).write_text(json.dumps(self._rows))


class Results:
    """What a toolkit made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: Mapping[str, dict[str, Any]] = json.loads((folder / LINEARS).read_text())

    @property
    def names(self) -> set[str]:
        return set(self._rows)

    def read(self, name: str, device: torch.device) -> Rounded:
        row = self._rows[name]
        tensors = load_file(self._folder / row["file"], device=str(device))
        return Rounded(unpack(row["format"], tensors, row["meta"]), row["damp"], list(row["notes"]), dict(row["details"]))
