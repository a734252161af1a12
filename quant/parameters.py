"""What every parameter of every method may be, by kind of rounding (or tuner) and of transform.

Standard library only: planning refuses by this table what a class of `quant.methods` refuses by it too. Defaults and meanings stand in
the classes, and in `conf/`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from quant.scheme import Granularity, Supports, WeightScheme

INF = math.inf


@dataclass(frozen=True)
class Param:
    """Values of one type, and of those only some."""

    type: type[Any]
    """bool, int, float (which takes whole numbers too), str, tuple (or a list), or dict: a mapping, or pairs of names and values, as specs
    keep one."""
    words: tuple[str, ...] = ()
    """Of str: all there are; none for any text."""
    least: float = -INF
    most: float = INF
    above: float = -INF
    """Of float: as `least`, but itself too small."""
    below: float = INF
    """Of float: as `most`, but itself too large."""
    endless: bool = False
    """Infinity is a value."""
    each: Param | None = None
    """Of dict and tuple: their values."""
    null: str | None = None
    """What null does; None where it is no value."""
    tells: str = ""
    """What the value means or is usually."""

    def takes(self, value: Any) -> bool:
        if value is None:
            return self.null is not None
        if self.type is dict:
            return self._takes_mapping(value)
        if self.type is tuple:
            return isinstance(value, (tuple, list)) and (self.each is None or all(self.each.takes(v) for v in value))
        if not self.of_type(value):
            return False
        if self.type is str:
            return not self.words or value in self.words
        if self.type is bool:
            return True
        return self.least <= value <= self.most and self.above < value and (value < self.below or (self.endless and value == INF))

    def of_type(self, value: Any) -> bool:
        return type(value) is self.type or (self.type is float and type(value) is int)

    def _takes_mapping(self, value: Any) -> bool:
        pairs = tuple(value.items()) if isinstance(value, Mapping) else value
        if not isinstance(pairs, tuple) or not all(isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in pairs):
            return False
        return self.each is None or all(self.each.takes(v) for _, v in pairs)

    @property
    def allowed(self) -> str:
        """`a number from 0; 0.01 is usual`."""
        text = self._values + (f" or null ({self.null})" if self.null else "")
        return f"{text}; {self.tells}" if self.tells else text

    @property
    def _values(self) -> str:
        if self.type is dict:
            return "a mapping" + (f" to {self.each.allowed}" if self.each else "")
        if self.type is tuple:
            return "a list" + (f", each element {self.each.allowed}" if self.each else "")
        if self.type is str:
            return f"one of {', '.join(self.words)}" if self.words else "text"
        if self.type is bool:
            return "true or false"
        words = "a whole number" if self.type is int else "a number"
        if self.least > -INF:
            words += f" from {self.least:g}"
        elif self.above > -INF:
            words += f" above {self.above:g}"
        if self.most < INF:
            words += f" {'to' if self.least > -INF else 'up to'} {self.most:g}"
        elif self.below < INF:
            words += f" below {self.below:g}"
        return words


def _whole(least: int, most: float = INF, tells: str = "") -> Param:
    return Param(int, least=least, most=most, tells=tells)


def _word(*words: str) -> Param:
    return Param(str, words)


GRIDS = ("g_asym", "g_sym", "awq_asym", "omni", "q_sym", "hqq", "kivi", "absmax", "absmax8")
"""Of `quant.grids`."""
_FLAG = Param(bool)
_GRID = replace(_word(*GRIDS), null="g_asym or g_sym as the scheme says")
_POSITIVE = Param(float, above=0)
_FROM_0 = Param(float, least=0)
_SHARE = Param(float, above=0, most=1)
_DAMP = Param(float, least=0, tells="a fraction of mean(diag H), 0.01 is usual")
_BLOCK = _whole(1, tells="128 is usual")
_AXIS = _whole(0, 1, "groups along the outputs or along the inputs")
_BACKEND = _word("native", "bitsandbytes")
_RELEASE = Param(str)
_BIT_LISTS = Param(dict, each=Param(tuple, each=_whole(1, 8)), null="searched")
_OBJECTIVE = _word("kl", "mse")
_REFERENCE = _word("reference", "corrected")
_CLIP = {
    "kind": _word("none", "symmetric", "asymmetric", "learned"),
    "steps": _whole(1),
    "max_shrink": _SHARE,
    "grid": _GRID,
    "iters": _whole(1),
    "lr": _POSITIVE,
}

Params = Mapping[str, Param]
ROUNDINGS: dict[str, Params] = {
    "rtn": {"grid": _GRID, "mse": _FLAG},
    "gptq": {
        "grid": _GRID,
        "mse": _FLAG,
        "act_order": _FLAG,
        "static_groups": _FLAG,
        "block_size": _BLOCK,
        "damp": _DAMP,
        "true_sequential": _FLAG,
        "outlier_columns": _whole(0, tells="columns of every linear"),
        "outlier_metric": _word("owq", "quik"),
    },
    "claq": {
        "adaptive_bits": replace(Param(float, above=2, most=4), null="every column has weight.bits"),
        "outlier_reservation": _FLAG,
        "score": _word("magnitude", "hessian"),
        "variant": _REFERENCE,
        "layer_bits": replace(Param(dict, each=Param(float, least=2, most=4)), null="every layer has weight.bits"),
        "kmeans_start": _word("plus_plus", "partition"),
        "codebooks": _word("in_loop", "batched"),
        "act_order": _FLAG,
        "block_size": _BLOCK,
        "damp": _DAMP,
        "true_sequential": _FLAG,
    },
    "slim_llm": {
        "objective": _OBJECTIVE,
        "variant": _REFERENCE,
        "lam": _FROM_0,
        "sigma": _FROM_0,
        "damp": _DAMP,
        "bit_lists": _BIT_LISTS,
    },
    "spqr": {
        "outlier_threshold": Param(float, least=0, endless=True, tells="0.2 is usual, 1e9 keeps no outlier"),
        "scale_bits": _whole(1, 8, "3 is usual"),
        "zero_bits": _whole(1, 8, "3 is usual"),
        "stat_rows": _whole(1, tells="16 is usual"),
        "round_zero": _FLAG,
        "act_order": _FLAG,
        "damp": replace(_DAMP, tells="a fraction of mean(diag H), 1 is usual"),
    },
    "llm_int8": {"backend": _BACKEND},
    "nf4": {"backend": _BACKEND},
    "hqq": {
        "axis": _AXIS,
        "iters": _whole(1, tells="20 is usual, and optimize=false takes no step"),
        "optimize": _FLAG,
        "round_zero": replace(_FLAG, null="for 4 bits only"),
        "p": replace(_POSITIVE, tells="0.7 is usual"),
        "beta": replace(_POSITIVE, tells="10 is usual"),
        "kappa": replace(_POSITIVE, tells="1.01 is usual"),
    },
    "billm": {
        "variant": _word("reference", "paper", "joint"),
        "metric": _word("hessian", "magnitude"),
        "block_size": _BLOCK,
        "salient_columns": replace(_whole(0), null="the count is searched"),
        "damp": _DAMP,
    },
    "pb_llm": {
        "low_fraction": replace(_SHARE, tells="gptq rounds all weights to one width"),
        "high_bits": _whole(2, 8),
        "metric": _word("magnitude", "hessian"),
        "masked_stats": _FLAG,
        "variant": _REFERENCE,
        "block_size": _BLOCK,
        "damp": _DAMP,
    },
    "quip": {
        "incoherence": _FLAG,
        "rescale": _FLAG,
        "width": replace(_POSITIVE, tells="in units of the RMS, 2.4 is usual"),
        "sort": _FLAG,
        "npasses": _whole(0),
        "damp": _DAMP,
    },
    "quip_sharp": {
        "ridge": replace(_FROM_0, tells="in units of mean(diag H), 0.01 is usual"),
        "tune_iters": _whole(0, tells="10 is usual"),
        "scale_override": replace(_POSITIVE, null="the codebook's own, 0.9 is the advice for 2 bits"),
    },
    "squeezellm": {"weighting": _word("hessian", "none")},
    "omniquant": {
        "lwc": _FLAG,
        "let": _FLAG,
        "epochs": _whole(0),
        "lwc_lr": _POSITIVE,
        "let_lr": _POSITIVE,
        "alpha": Param(float, least=0, most=1),
        "aug_loss": _FLAG,
        "grid": _GRID,
    },
    "learned_rounding": {
        "rule": _word("autoround", "adaround"),
        "iters": _whole(0),
        "lr": replace(_POSITIVE, null="1 / iters for autoround, 0.01 for adaround"),
        "batch_size": _whole(1),
        "tune_range": _FLAG,
        "reg": _FROM_0,
        "checks": _whole(1),
        # Those whose zeros are whole numbers.
        "grid": replace(_GRID, words=tuple(g for g in GRIDS if g not in ("hqq", "kivi"))),
    },
    "qllm_correction": {
        "rank": _whole(1),
        "alpha": _POSITIVE,
        "blocks": _whole(1),
        "epochs": _whole(0),
        "lr": _POSITIVE,
        "norms": _FLAG,
        "remainder": _FLAG,
        "grid": _GRID,
    },
    "slim_llm_plus": {
        "epochs": _whole(0),
        "lwc_lr": _POSITIVE,
        "aug_loss": _FLAG,
        "objective": _OBJECTIVE,
        "variant": _REFERENCE,
        "damp": _DAMP,
        "bit_lists": _BIT_LISTS,
    },
    "zeroquant": {
        "iters": _whole(0),
        "lr": _POSITIVE,
        "batch_size": _whole(1),
        "checks": _whole(1),
        "stream": _word("original", "quantized"),
        "grid": _GRID,
    },
    # Of other toolkits.
    "hqq_package": {"release": _RELEASE, "axis": _AXIS, "optimize": _FLAG, "round_zero": replace(_FLAG, null="for 4 bits only")},
    "llm_compressor": {
        "release": _RELEASE,
        "algorithm": _word("gptq", "rtn"),
        "act_order": _FLAG,
        "block_size": _BLOCK,
        "damp": _DAMP,
    },
    "auto_round": {
        "release": _RELEASE,
        "iters": _whole(0, tells="0 rounds to nearest, 200 is usual"),
        "lr": replace(_POSITIVE, null="1 / iters"),
        "batch_size": _whole(1),
        "tune_range": _FLAG,
    },
}
TRANSFORMS: dict[str, Params] = {
    "awq": {
        "scale_grid": _whole(1),
        "duo_scaling": _FLAG,
        "clip_search": _FLAG,
        "clip_grid": _whole(1),
        "max_shrink": _SHARE,
        "clip_tokens": _whole(1),
        "grid": _GRID,
    },
    "smoothquant": {"alpha": Param(float, least=0, most=1, tells="0.5 is usual")},
    "qllm_reassembly": {
        "variant": _word("reference", "paper"),
        "ratio": Param(float, above=0, below=0.5),
        "sequences": _whole(1),
        "grid": _GRID,
    },
    "os_plus": {"shifting": _FLAG, "steps": _whole(1, tells="50 is usual"), "grid": _GRID},
    "clip": _CLIP,
    "clip_output": _CLIP,
    "quarot": {"online": _FLAG, "qk": _FLAG},
    "learned_rotation": {
        "steps": _whole(0),
        "lr": replace(_POSITIVE, tells="1.5 is usual"),
        "checked": _whole(1),
        "check_every": _whole(1),
        "weights": _FLAG,
        "online": _FLAG,
        "qk": _FLAG,
    },
}
PARAMETERS = {**ROUNDINGS, **TRANSFORMS}
"""Of a kind of either."""


def refusal(kind: str, name: str, value: Any, shown: str | None = None) -> str | None:
    """Why a parameter of a known kind cannot have this value; `shown` is how the error writes the two. None where it can."""
    param = PARAMETERS[kind][name]
    if param.takes(value):
        return None
    near = difflib.get_close_matches(value, param.words, n=1, cutoff=0.5) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]}?" if near else ""
    # Text that reads like a number, and a number of another library, look right.
    odd = "" if value is None or param.type is dict or param.of_type(value) else f" of type {type(value).__name__}"
    return f"{shown or f'{name}={value!r}'}{odd} is not a value for {kind}; give {param.allowed}{hint}"


def refuses_scheme(kind: str, params: Mapping[str, Any], scheme: WeightScheme) -> str | None:
    """Why a part of a method with these parameters cannot make a scheme; None where only `Supports` decides."""
    columns = params.get("outlier_columns", 0) if kind == "gptq" else 0
    if columns and scheme.number != "int":
        return f"outlier_columns={columns} works with integer codes; weight.number={scheme.number} has none: use 0"
    if kind == "awq" and params.get("clip_search", True) and scheme.granularity is Granularity.TENSOR:
        return "awq's clip search works per group or channel; set weight.granularity to one of them, or clip_search=false"
    return None


def undivided(
    parts: Iterable[tuple[str, Mapping[str, Any], Supports]], group_size: int | None, rows: int, cols: int
) -> tuple[str, int, str] | None:
    """What the first part of a method that cannot do so would cut a weight `[rows, cols]` into, how many there are, and of what; None where
    all can. parts: kind, parameters and class's facts of each."""
    each = (_undivided(kind, params, supports, group_size, rows, cols) for kind, params, supports in parts)
    return next((found for found in each if found is not None), None)


def _undivided(
    kind: str, params: Mapping[str, Any], supports: Supports, group_size: int | None, rows: int, cols: int
) -> tuple[str, int, str] | None:
    together = supports.inputs_together
    if cols % together:
        return f"{together} weights that {kind} codes together do not divide", cols, "inputs"
    rounds = kind == "learned_rotation" and params.get("weights", False)  # to nearest, in its search
    if group_size is None or (supports.ragged_groups and not rounds):
        return None
    # HQQ's axis 0 folds the whole weight into groups.
    count, of = (rows * cols, "weights, as axis=0 needs") if params.get("axis") == 0 else (cols, "inputs")
    return None if count % group_size == 0 else (f"group size {group_size} does not divide", count, of)


class Checked:
    """Base of a method's class: raises ValueError for a parameter that cannot have its value."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for name in PARAMETERS[self.name]:
            value = getattr(self, name)
            # As `quant.grids.grid` reads names.
            value = value.lower().replace("-", "_") if name == "grid" and isinstance(value, str) else value
            reason = refusal(self.name, name, value)
            if reason is not None:
                raise ValueError(reason)
