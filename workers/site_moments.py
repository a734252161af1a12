"""The statistic `moments`: kurtosis and absmax / σ of what a block's quantization would touch, to explain what breaks.

Per decoder block: every distinct input of linears, every linear's weight, and keys and values as they enter the cache (after the
rotary embedding; families without a cache have none), all values of a tensor together, over all calibration tokens. No method reads
it; the report does. Payload: `moments.parquet`, one row per block and tensor, and `sites.json` as for the other kinds.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor, nn

from quant.moments import Moments, MomentSums, moments
from workers.blocks import Taps, linear_view
from workers.capture import MOMENTS, BlockStatistics, check_finite
from workers.structure import Structure

KIND = MOMENTS
FILE = "moments.parquet"
SCHEMA = pa.schema(
    [
        ("block", pa.int32()),
        ("kind", pa.string()),  # input, weight, keys, values
        ("site", pa.string()),  # relative to the block; an input is named by the first linear that reads it, as everywhere
        ("module", pa.string()),  # the same with the block's path
        ("linears", pa.string()),  # of an input: all that read it, relative to the block, with ", " between
        ("count", pa.int64()),
        ("mean", pa.float64()),
        ("std", pa.float64()),
        ("absmax", pa.float64()),
        ("kurtosis", pa.float64()),  # 3 for a normal distribution; null where there is no spread
        ("absmax_sigma", pa.float64()),  # null where there is no spread
    ]
)


class SiteMoments:
    """Rows of all blocks. For each block: `watch`, run it once, `add`."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        self._rows: list[dict[str, Any]] = []
        self._described: list[dict[str, Any]] = []
        self._cached: dict[str, MomentSums] = {}
        self._taps = Taps()

    def watch(self, block: nn.Module) -> None:
        """From now on keys and values of the block are counted, where there are any."""
        s = self._structure
        if not s.cache_argument:
            return
        self._cached = {"keys": MomentSums(), "values": MomentSums()}

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, {**kwargs, s.cache_argument: _Watcher(kwargs.get(s.cache_argument), self._cached)}

        self._taps.add(block.get_submodule(s.attention).register_forward_pre_hook(hook, with_kwargs=True).remove)

    def add(self, index: int, block: nn.Module, found: BlockStatistics) -> None:
        """Inputs as collected, weights as they are, keys and values as watched. Raises NumericalError for overflown keys or values."""
        self._taps.remove()
        s = self._structure
        readers = {site.linears[0]: site.linears for site in s.sites}
        for name, value in found.moments.items():
            self._put(index, "input", name, value, ", ".join(readers.get(name, (name,))))
        for name in s.linear_names():
            self._put(index, "weight", name, moments(linear_view(block, name).weight()))
        for name, sums in self._cached.items():
            self._put(index, name, name, check_finite(sums.value(), f"{name} of {s.blocks}.{index}"))
        self._cached = {}
        sites = {
            s.path(index, n): {"tokens": t, "cols": v.count // t if t else 0} for n, v in found.moments.items() for t in [found.tokens[n]]
        }
        self._described.append({"file": FILE, "sites": sites})

    def write(self, payload: Path) -> list[dict[str, Any]]:
        """Save the rows; returns the blocks' entries of the index."""
        pq.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA), payload / FILE)
        return self._described

    def _put(self, block: int, kind: str, site: str, value: Moments, linears: str = "") -> None:
        place = {"block": block, "kind": kind, "site": site, "module": self._structure.path(block, site), "linears": linears}
        self._rows.append({**place, **asdict(value)})


class _Watcher:
    """Stands in for the cache, counts what it is given and passes it on."""

    def __init__(self, inner: Any, sums: dict[str, MomentSums]) -> None:
        self._inner = inner
        self._sums = sums

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """keys, values `[B, heads, T, D]`; sequence by sequence, so that batching changes nothing."""
        for name, x in (("keys", keys), ("values", values)):
            for sequence in x:
                self._sums[name].update(sequence)
        if self._inner is None:
            return keys, values
        out: tuple[Tensor, Tensor] = self._inner.update(keys, values, *args, **kwargs)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
