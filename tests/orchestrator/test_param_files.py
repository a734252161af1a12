"""Bits given as a file count as the mapping that the file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.cell import Option
from orchestrator.errors import ConfigError
from orchestrator.parts import method_part
from workers.specs import MethodSpec, freeze

LISTS = {"model.layers.0.mlp.up_proj": [1, 2, 3], "model.layers.0.mlp.down_proj": [2, 2, 2]}


def planned(kind: str = "slim_llm", **params: Any) -> MethodSpec:
    return method_part(Option("method", "mine", {"rounding": {"kind": kind, "version": 1, "needs": [], "params": params}})).spec


@pytest.mark.parametrize("form", ["yaml", "json", "parquet"])
def test_a_file_counts_as_its_content(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"layers.{form}"
    if form == "parquet":
        rows = [{"module": n, "details": json.dumps({"group_bits": b, "p": 1})} for n, b in LISTS.items()]
        pq.write_table(pa.Table.from_pylist([*rows, {"module": "model.layers.0.self_attn.o_proj", "details": ""}]), path)
    else:
        path.write_text(json.dumps(LISTS) if form == "json" else "".join(f"{n}: {b}\n" for n, b in LISTS.items()))
    assert planned(bit_lists=str(path)) == planned(bit_lists=LISTS)


def test_bits_per_linear_and_other_parameters() -> None:
    assert dict(planned(bit_lists=None, damp=0.1).rounding.params) == {"bit_lists": None, "damp": 0.1}
    assert dict(planned(objective="kl.yaml").rounding.params) == {"objective": "kl.yaml"}


def test_bits_per_linear_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "bits.yaml"
    path.write_text("'*.down_proj': 3.2\n")
    assert planned("claq", layer_bits=str(path)).rounding.params == (("layer_bits", freeze({"*.down_proj": 3.2})),)
    path.write_text("'*.down_proj': 8\n")
    with pytest.raises(
        ConfigError, match=r"layer_bits=\{.*down_proj.*:8\} is not a value for claq; give a mapping to a number from 2 to 4"
    ):
        planned("claq", layer_bits=str(path))


@pytest.mark.parametrize(
    ("name", "content", "param", "says"),
    [
        ("none.yaml", None, "bit_lists", "cannot be read: .*No such file"),
        ("bits.txt", "a: [2]", "bit_lists", r"give YAML or JSON, or layers\.parquet of a quantize stage with group_bits"),
        ("layers.parquet", "", "layer_bits", "give YAML or JSON, or a mapping in place of the path"),
        ("bits.yaml", "[2, 3]", "bit_lists", r"must hold a mapping from names of linears, and holds '\[2, 3\]'"),
        ("bits.yaml", "a: [", "bit_lists", "cannot be read"),
    ],
)
def test_files_that_do_not_serve_are_refused(name: str, content: str | None, param: str, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=says):
        planned(**{param: str(tmp_path / name)})
