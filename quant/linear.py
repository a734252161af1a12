"""`quantize_linear`: one weight, one method, for notebooks and tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from quant.errors import QuantizationWarning, require_finite
from quant.grids import grid as grid_named
from quant.methods.base import Linear, Rounded, Rounding, ScaleGroup, StoredTensor, Transform
from quant.methods.make import param_names, rounding_or_tuner, transform, unknown
from quant.methods.registry import METHODS, MODEL_METHODS, ROUNDERS, TOOLKIT_METHODS, TRANSFORMS, TUNERS
from quant.methods.single import single_linear
from quant.methods.tuner import BlockTuner
from quant.scheme import ANY_NUMBER, ActivationScheme, Granularity, WeightScheme
from quant.statistics import Statistics, collect


def quantize_linear(
    weight: Tensor,
    *,
    method: str,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
    inputs: Tensor | None = None,
    hessian: Tensor | None = None,
    seed: int = 0,
    number: str | None = None,
    activation: ActivationScheme | None = None,
    **method_params: Any,
) -> StoredTensor:
    """Quantizes one weight `[N, K]` of any float type, which is not changed.

    method: a name of `quant.methods.registry.METHODS`, with its own defaults (those of `conf/method/`); method_params override them.
    group_size: inputs that share a scale; None is one group per output channel.
    symmetric: the grid g_sym; `grid=` names any other of `quant.grids`.
    inputs: `[M, K]` (one sequence) or `[S, T, K]`, for the statistics the method needs; a tuner takes the linear for its block.
    hessian: `[K, K]`, symmetric, instead of inputs, for methods that need nothing else.
    seed: for methods that draw random numbers.
    number: number format of the codes (`quant.scheme.NUMBERS`), whose bits must be given as `bits`; None is the first that the
    method makes, integers for most.
    activation: how the inputs will be quantized, for methods that search with it (os_plus does nothing without); a single linear's
    inputs are scaled but never shifted.
    scale_dtype (a method parameter): float32 here, so that results equal the reference code's; the schemes in
    `conf/scheme/` store float16.

    Returns the stored tensor: `dequantize()` approximates the given weight (transform methods keep their input scale in
    it), `bits_stored`, `bits_nominal`, `pack()`. What a method notes (a fallback, the damping that was needed) is a
    QuantizationWarning. Raises ValueError for unknown names, missing inputs, groups that do not
    divide K, a Hessian of which one triangle is missing; NonFiniteError; SingularHessianError.
    """
    if method in MODEL_METHODS:
        raise ValueError(f"{method} rewrites a whole model; for one weight use its rounding alone: method={MODEL_METHODS[method].rounding}")
    if method in TOOLKIT_METHODS:
        raise ValueError(f"{method} is another toolkit's and takes a whole model; for one weight choose one of {', '.join(METHODS)}")
    if method not in METHODS:
        raise unknown("method", str(method), METHODS)
    _check_types(weight, bits, group_size, symmetric, {"inputs": inputs, "hessian": hessian})
    if type(seed) is not int:
        raise ValueError(f"seed={seed!r}; give a whole number")
    if activation is not None and not isinstance(activation, ActivationScheme):
        raise ValueError(f"activation is a {type(activation).__name__}; give a quant.scheme.ActivationScheme, as ActivationScheme(8)")
    with _own_settings(weight.device):
        tensor, notes = _quantized(
            _usable(weight),
            None if inputs is None else _usable(inputs),
            None if hessian is None else _usable(hessian),
            method,
            bits,
            group_size,
            symmetric,
            seed,
            number,
            activation,
            method_params,
        )
    for note in notes:
        warnings.warn(note, QuantizationWarning, stacklevel=2)
    return tensor


def _usable(x: Tensor) -> Tensor:
    """Where gradients are taken, too."""
    return x.detach().clone() if x.is_inference() else x.detach()


@contextmanager
def _own_settings(device: torch.device) -> Iterator[None]:
    """Nothing that a notebook has set for its own code changes a result: default dtype and device, autocast, gradients off."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # torch.get_default_device in torch 2.6 does not see `with torch.device`.
        placed = nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")
        with placed, torch.autocast(device.type, enabled=False), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def _quantized(
    weight: Tensor,
    inputs: Tensor | None,
    hessian: Tensor | None,
    method: str,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    seed: int,
    number: str | None,
    activation: ActivationScheme | None,
    method_params: Mapping[str, Any],
) -> tuple[StoredTensor, list[str]]:
    params, recipe = dict(method_params), METHODS[method]
    rounder_class = ROUNDERS[recipe.rounding]
    granularity = Granularity.CHANNEL if group_size is None else Granularity.GROUP
    numbers = rounder_class.supports.numbers
    number = number or ("int" if numbers == ANY_NUMBER else numbers[0])
    signed = symmetric or number != "int"
    scheme = WeightScheme(bits, signed, granularity, group_size, params.pop("scale_dtype", "float32"), number)
    named = params.get("grid")
    if symmetric and named is not None and not grid_named(named).symmetric:
        raise ValueError(f"grid={named} is asymmetric and symmetric=True was given; leave one of them out")

    transforms = [transform(t, _own(params, TRANSFORMS[t])) for t in recipe.transforms]
    rounder = rounding_or_tuner(recipe.rounding, {**recipe.rounding_params, **_own(params, rounder_class)})
    parts: list[Any] = [*(TRANSFORMS[t] for t in recipe.transforms), rounder_class]
    allowed = list(dict.fromkeys(name for part in parts for name in param_names(part)))
    for name in params:
        if name not in allowed:
            raise unknown(f"parameter of {method}", name, [*allowed, "scale_dtype"])

    supports = [*(t.supports for t in transforms), rounder.supports]
    reason = next((r for s in supports if (r := s.refuses(method, scheme)) is not None), None)
    if reason is not None:
        raise ValueError(reason)
    needs = rounder.needs.union(*(t.needs for t in transforms), {"samples"} if recipe.rounding in TUNERS else ())
    statistics = _statistics(method, needs, weight, inputs, hessian)
    current, scale = weight, None
    for t in transforms:
        current, statistics, scale = _apply(t, current, statistics, scheme, scale, activation)
    rounded = _rounded(rounder, current, statistics, scheme, Linear(seed=seed), activation)
    unread = activation is not None and not any("activation" in part.reads for part in parts)
    notes = [f"{method} does not read activation: its result is the same without"] if unread else []
    notes += [f"{method}: {note}" for note in rounded.notes]
    tensor = rounded.tensor
    return (tensor if scale is None else tensor.with_input_scale(scale)), notes


def _rounded(
    by: Rounding | BlockTuner,
    weight: Tensor,
    statistics: Statistics,
    scheme: WeightScheme,
    about: Linear,
    activation: ActivationScheme | None,
) -> Rounded:
    if by.name not in TUNERS:
        return cast(Rounding, by).quantize(weight, statistics, scheme, about)
    assert statistics.samples is not None
    read = activation if "activation" in by.reads else None
    if read is not None and not read.dynamic:
        raise ValueError(f"{by.name} learns with ranges of the tensor at hand; give activation with dynamic=True, not static ranges")
    tuned = cast(BlockTuner, by).tune(single_linear(weight, statistics.samples, scheme, about, statistics, read))
    rounded = tuned.tensors[about.name]
    rounded.notes = list(dict.fromkeys([*tuned.notes, *rounded.notes]))
    return rounded


def _check_types(weight: object, bits: object, group_size: object, symmetric: object, data: Mapping[str, object]) -> None:
    """What a notebook may get wrong: raises ValueError."""
    given = {"weight": weight, **{name: value for name, value in data.items() if value is not None}}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; give a torch tensor, as torch.as_tensor({name})")
        if value.layout is not torch.strided or value.is_meta or value.is_complex():
            kind = "complex" if value.is_complex() else "on the device meta" if value.is_meta else f"of layout {value.layout}"
            raise ValueError(f"{name} is {kind}; give an ordinary tensor of real numbers")
    assert isinstance(weight, Tensor)
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"weight of shape {tuple(weight.shape)} and type {weight.dtype}; give a float matrix [N, K] (out, in)")
    if type(bits) is not int:
        raise ValueError(f"bits={bits!r}; give a whole number from 1 to 8")
    if group_size is not None and (type(group_size) is not int or group_size < 1):
        raise ValueError(f"group_size={group_size!r}; give a whole number of inputs, or None for one group per output channel")
    if type(symmetric) is not bool:
        raise ValueError(f"symmetric={symmetric!r}; give True or False")


def _own(params: Mapping[str, Any], cls: type[Any]) -> dict[str, Any]:
    names = param_names(cls)
    return {k: v for k, v in params.items() if k in names}


def _statistics(method: str, needs: frozenset[str], weight: Tensor, inputs: Tensor | None, hessian: Tensor | None) -> Statistics:
    k = weight.shape[1]
    missing = needs - ({"hessian"} if hessian is not None else set())
    if missing and inputs is None:
        other = " or hessian [K, K]" if missing == {"hessian"} else ""
        raise ValueError(f"method {method} needs data ({', '.join(sorted(missing))}); give inputs [M, K] or [S, T, K]{other}")
    found = Statistics()
    if missing and inputs is not None:
        if inputs.dim() not in (2, 3) or inputs.shape[-1] != k or not inputs.numel():
            raise ValueError(f"inputs of shape {tuple(inputs.shape)}; a weight with {k} inputs needs [M, {k}] or [S, T, {k}]")
        require_finite("inputs", inputs)
        found = collect(inputs.to(weight.device), missing)
    if hessian is not None and "hessian" in needs:
        _check_symmetric(hessian)
        found.hessian = hessian
    return found


def _check_symmetric(hessian: Tensor) -> None:
    """Methods read either triangle: one left empty would count as no correlation, without a word. Raises ValueError.

    Each entry may be off by what rounding makes of a sum of products: sums of T in float32 differ by about √T 2^-24 of √(H_ii H_jj),
    2^-10 being T = 2^28; types of fewer digits by their own steps."""
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        return  # refused by its shape
    h = hessian if hessian.dtype is torch.float64 else hessian.float()
    digits = torch.finfo(hessian.dtype).eps if hessian.is_floating_point() else 0.0
    roots = max(2**-10, 4 * digits) ** 0.5 * h.diagonal().clamp(min=0).sqrt()
    wrong = (h - h.T).abs_() > torch.outer(roots, roots)
    if bool(wrong.any()):
        i, j = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"the Hessian is not symmetric: [{i}, {j}] is {float(h[i, j]):g}, [{j}, {i}] is {float(h[j, i]):g}; give the whole of xᵀx: "
            "with a lower triangle h alone, h + h.tril(-1).T"
        )


def _apply(
    t: Transform,
    weight: Tensor,
    statistics: Statistics,
    scheme: WeightScheme,
    scale: Tensor | None,
    activation: ActivationScheme | None,
) -> tuple[Tensor, Statistics, Tensor | None]:
    """One transform on a single linear. The stored input scale stands for the norm that would hold 1 / s."""

    def forward(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return x.float() @ weights["weight"].T

    group = ScaleGroup("linear", "norm", {"weight": weight}, statistics, forward, linear=True, activation=activation)
    s = t.scale(group, scheme)
    current = weight.float()
    if s is not None:
        s = _stored(s, scheme)
        current, statistics = current * s, statistics.scaled(s)
        scale = s if scale is None else scale * s
    rewritten = t.rewrite("weight", current, statistics, scheme)
    return (current if rewritten is None else rewritten), statistics, scale


def _stored(s: Tensor, scheme: WeightScheme) -> Tensor:
    """s as it will be kept: in float16 where the scheme says so and every value stays positive and finite."""
    half = s.half().float()
    fits = scheme.scale_dtype == "float16" and bool((torch.isfinite(half) & (half > 0)).all())
    return half if fits else s
