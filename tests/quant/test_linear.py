"""`quantize_linear`, and the options in `conf/` that must agree with the code."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from quant import kv, methods, quantize_linear
from quant.errors import NonFiniteError, QuantizationWarning
from quant.methods.registry import METHODS, MODEL_METHODS, MODEL_TRANSFORMS, ROUNDINGS, TOOLKIT_METHODS, TRANSFORMS, TUNERS, Recipe
from quant.scheme import NUMBERS, ActivationScheme, Granularity, Scheme, Supports
from quant.tensors.affine import AffineTensor
from tests.quick import QUICK
from workers.specs import from_json

CONF = Path(__file__).resolve().parents[2] / "conf"
COMPONENTS: dict[str, Any] = {**ROUNDINGS, **TRANSFORMS, **MODEL_TRANSFORMS, **TUNERS, **TOOLKIT_METHODS}


def data(n: int = 8, k: int = 32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 50, k, generator=g)
    x[..., 3] *= 20
    return torch.randn(n, k, generator=g), x


def composed(group: str, option: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values = OmegaConf.to_container(compose(f"{group}/{option}"))
    assert isinstance(values, dict)
    return values[group]  # type: ignore[no-any-return]


def facts(component: dict[str, Any]) -> dict[str, Any]:
    return {k: sorted(v) if isinstance(v, list) else v for k, v in component.items() if k not in ("params", "supports")}


def declared(name: str) -> dict[str, Any]:
    c: Any = COMPONENTS[name]
    own = {"for_activations": c.for_activations} if name in {**TRANSFORMS, **MODEL_TRANSFORMS} else {}
    own |= {"maps": sorted(c.maps)} if name in MODEL_TRANSFORMS else {}
    own |= {"feeds_text": c.feeds_text, "working_set": c.working_set} if name in {**TUNERS, **TOOLKIT_METHODS} else {}
    own |= {"toolkit": c.toolkit} if name in TOOLKIT_METHODS else {}
    return {"kind": c.name, "version": c.version, "needs": sorted(c.needs), "reads": sorted(c.reads), "uses_seed": c.uses_seed, **own}


@pytest.mark.parametrize("option", sorted(p.stem for p in (CONF / "method").glob("*.yaml")))
def test_method_options_equal_the_code(option: str) -> None:
    values = composed("method", option)
    name = option.removesuffix("_sequential")
    recipe = {**METHODS, **MODEL_METHODS, **{m: Recipe(m) for m in TOOLKIT_METHODS}}[name]
    assert list(values["transforms"]) == list(recipe.transforms)
    assert values["propagation"] == ("quantized" if option.endswith("_sequential") else "original")
    own = {"true_sequential": True} if option == "claq_sequential" else {}  # the paper's own order
    for component, changed in [(values["rounding"], {**recipe.rounding_params, **own}), *((t, {}) for t in values["transforms"].values())]:
        cls = COMPONENTS[component["kind"]]
        assert facts(component) == declared(component["kind"])
        assert from_json(Supports, component["supports"]) == cls.supports
        expected = {**{f.name: f.default for f in dataclasses.fields(cls)}, **changed}
        left_out = set(expected) - set(component["params"])
        assert left_out <= getattr(cls, "optional", frozenset()) - set(changed)
        assert component["params"] == {k: v for k, v in expected.items() if k not in left_out}
    make = methods.toolkit_method if name in TOOLKIT_METHODS else methods.rounding_or_tuner
    assert make(values["rounding"]["kind"], values["rounding"]["params"], version=values["rounding"]["version"])


def test_every_parameter_is_explained() -> None:
    for path in [*(CONF / "method").glob("*.yaml"), *(CONF / "transform").glob("*.yaml")]:
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# ")
        inside = False
        for line in lines:
            inside = (inside and line.startswith(" ")) or line.strip() == "params:"
            if inside and line.strip() != "params:":
                assert " # " in line, f"{path.name}: {line}"


@pytest.mark.parametrize("path", sorted((CONF / "scheme").glob("*.yaml")), ids=lambda p: p.stem)
def test_scheme_options_are_complete_schemes_named_after_their_bits(path: Path) -> None:
    values = composed("scheme", path.stem)
    assert values.pop("overrides") == {}
    if path.stem == "auto":
        assert set(values.pop("auto")) == {"budget", "bits", "sequences"}
        path = path.with_stem("w4a16_g64")
    scheme = from_json(Scheme, values)
    assert set(values) == {"weight", "activation", "kv"}
    for part in filter(None, (scheme.weight, scheme.activation, scheme.kv)):
        by_planning = {"outlier_version", "steps_version", "number_version", "first_few_version"}
        given = {f.name for f in dataclasses.fields(part)} - by_planning
        assert set(values[next(k for k in values if getattr(scheme, k) is part)]) == given
    assert scheme != Scheme()
    if scheme.kv is not None:
        assert kv.make(scheme.kv).version == scheme.kv.version
    weight = f"w{scheme.weight.bits}{NUMBERS[scheme.weight.number].label}" if scheme.weight else "w16"
    bits = weight + (f"a{scheme.activation.bits}{NUMBERS[scheme.activation.number].label}" if scheme.activation else "a16")
    assert path.stem.startswith(bits + (f"kv{scheme.kv.bits}" if scheme.kv else ""))
    if scheme.weight and scheme.weight.group_size:
        assert path.stem.endswith(f"_g{scheme.weight.group_size}")


def supported(method: str) -> Supports:
    return COMPONENTS[METHODS[method].rounding].supports  # type: ignore[no-any-return]


def widest(method: str, most: int) -> int:
    """The most bits, up to `most`, that the method makes; or the fewest."""
    return max((b for b in supported(method).bits if b <= most), default=min(supported(method).bits))


def quick(method: str) -> dict[str, Any]:
    rounding = METHODS[method].rounding
    return QUICK.get(rounding, {}) if rounding in TUNERS else {}


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_method_approximates_the_given_weight(method: str, group_size: int | None, symmetric: bool) -> None:
    w, x = data()
    before, bits = w.clone(), max(supported(method).bits)
    # Half the columns kept would leave groups of one weight, which g_sym clips to half its size where it is positive.
    params = {"outlier_columns": 4} if method == "quik" else quick(method)
    if ("channel" if group_size is None else "group") not in supported(method).granularity:
        with pytest.raises(ValueError, match="granularity="):
            quantize_linear(w, method=method, bits=bits, group_size=group_size, symmetric=symmetric, inputs=x, **params)
        return
    tensor = quantize_linear(w, method=method, bits=bits, group_size=group_size, symmetric=symmetric, inputs=x, **params)
    assert torch.equal(w, before)
    # QuIP cuts weights off at 2.4 times their RMS, whatever the bits.
    limit = 0.15 if method == "quip" else min(0.7, 0.05 * 2 ** (8 - bits))
    assert float((tensor.dequantize() - w).norm() / w.norm()) < limit
    again = quantize_linear(w, method=method, bits=bits, group_size=group_size, symmetric=symmetric, inputs=x, **params)
    assert all(torch.equal(a, b) for a, b in zip(tensor.pack().values(), again.pack().values(), strict=True))


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_transform_methods_keep_their_input_scale(method: str) -> None:
    w, x = data()
    tensor = quantize_linear(w, method=method, bits=4, group_size=8, inputs=x)
    assert isinstance(tensor, AffineTensor)
    assert tensor.input_scale is not None
    assert tensor.input_scale.shape == (32,)
    plain = quantize_linear(w, method="rtn", bits=4, group_size=8, grid="awq_asym" if method == "awq" else "absmax")
    assert tensor.bits_stored - plain.bits_stored == 32 * 32 / w.numel()


def test_an_input_scale_beyond_float16_is_kept_in_float32() -> None:
    w, x = data()
    tensor = quantize_linear(1e-9 * w, method="smoothquant", bits=8, inputs=1e7 * x, scale_dtype="float16")
    assert isinstance(tensor, AffineTensor)
    assert tensor.input_scale is not None
    assert float(tensor.input_scale.max()) > 65504
    assert float((tensor.dequantize() - 1e-9 * w).norm() / (1e-9 * w).norm()) < 0.05


def test_awq_beats_rounding_where_few_inputs_are_large() -> None:
    w, x = data(32, 64)

    def error(tensor: Any) -> float:
        return float((x @ (tensor.dequantize() - w).T).square().sum())

    awq = quantize_linear(w, method="awq", bits=3, group_size=16, inputs=x)
    assert error(awq) < error(quantize_linear(w, method="rtn", bits=3, group_size=16, grid="awq_asym"))


def test_inputs_and_their_hessian_give_the_same_weight() -> None:
    w, x = data()
    h = (2 / 4) * torch.einsum("stk,stl->kl", x, x)
    given = quantize_linear(w, method="gptq", bits=3, hessian=h).dequantize()
    torch.testing.assert_close(given, quantize_linear(w, method="gptq", bits=3, inputs=x).dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_hessian_needs_both_triangles(dtype: torch.dtype) -> None:
    """GPTQ read one of them: rounding to nearest came out where it was empty. Sums in another order are symmetric enough."""
    w, x = data()
    rows = (x.view(-1, x.shape[-1]) / 8).to(dtype)
    flipped = rows.flip(0)
    h = torch.tril(rows.T @ rows) + torch.triu(flipped.T @ flipped, 1)
    quantize_linear(w, method="gptq", bits=3, hessian=h)
    for half in (h.tril(), h.triu()):
        with pytest.raises(ValueError, match=r"the Hessian is not symmetric: \[0, \d+\] is .*, \[\d+, 0\] is .*give the whole of xᵀx"):
            quantize_linear(w, method="gptq", bits=3, hessian=half)
    with pytest.raises(NonFiniteError):
        quantize_linear(w, method="gptq", bits=3, hessian=torch.full_like(h, float("inf")))


def test_symmetric_is_the_grid_g_sym() -> None:
    w, _ = data()
    a, b = (quantize_linear(w, method="rtn", bits=4, **p).dequantize() for p in ({"symmetric": True}, {"grid": "G-sym"}))
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_half_precision_weights_and_inputs_work(method: str, dtype: torch.dtype) -> None:
    w, x = data()
    size = None if "channel" in supported(method).granularity else 8
    stored = {"bits": widest(method, 4), "group_size": size, "scale_dtype": "float16", **quick(method)}
    tensor = quantize_linear(w.to(dtype), method=method, inputs=x.to(dtype), **stored)
    assert torch.isfinite(tensor.dequantize()).all()
    assert tensor.dequantize().dtype is torch.float32


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"method": "gptqq"}, "method 'gptqq' is unknown; choose one of .*; did you mean gptq"),
        ({"method": "quarot"}, "quarot rewrites a whole model; for one weight use its rounding alone: method=gptq"),
        ({"method": "gptq", "act_ordr": True}, "parameter of gptq 'act_ordr' is unknown; .*did you mean act_order"),
        ({"method": "rtn", "alpha": 0.5}, "parameter of rtn 'alpha' is unknown"),
        ({"method": "gptq"}, r"method gptq needs data \(hessian\); give inputs \[M, K\] or \[S, T, K\] or hessian \[K, K\]"),
        ({"method": "awq", "hessian": torch.eye(32)}, r"method awq needs data \(absmean, samples\)"),
        ({"method": "gptq", "hessian": torch.eye(31)}, r"the Hessian has shape \(31, 31\)"),
        ({"method": "gptq", "inputs": torch.zeros(5, 31)}, r"a weight with 32 inputs needs \[M, 32\]"),
        ({"method": "gptq", "hessian": torch.eye(32), "damp": "high"}, "damp='high' of type str is not a value for gptq; give a number"),
        ({"method": "rtn", "group_size": 5}, "group_size=5 does not divide in_features=32"),
        ({"method": "rtn", "group_size": -1}, "group_size=-1; give a whole number of inputs, or None"),
        ({"method": "rtn", "bits": 4.0}, "bits=4.0; give a whole number from 1 to 8"),
        ({"method": "rtn", "symmetric": "no"}, "symmetric='no'; give True or False"),
        ({"method": "gptq", "inputs": [[1.0]]}, r"inputs is a list; give a torch tensor, as torch.as_tensor\(inputs\)"),
        (
            {"method": "gptq", "inputs": torch.zeros(5, 32, dtype=torch.cfloat)},
            "inputs is complex; give an ordinary tensor of real numbers",
        ),
        ({"method": "gptq", "hessian": torch.eye(32).to_sparse()}, "hessian is of layout torch.sparse_coo; give an ordinary tensor"),
        ({"method": "gptq", "hessian": torch.eye(32, device="meta")}, "hessian is on the device meta; give an ordinary tensor"),
        ({"method": "rtn", "activation": {"bits": 8}}, "activation is a dict; give a quant.scheme.ActivationScheme"),
        ({"method": "rtn", "seed": "0"}, "seed='0'; give a whole number"),
        ({"method": "rtn", "bits": 1}, "rtn does not make weight.bits=1; it makes 2, 3, 4, 5, 6, 7, 8"),
        ({"method": "rtn", "bits": 9}, "weight.bits=9 is not between 1 and 8"),
        ({"method": "rtn", "symmetric": True, "grid": "awq_asym"}, "grid=awq_asym is asymmetric and symmetric=True was given"),
        ({"method": "rtn", "scale_dtype": "bfloat16"}, "scale_dtype=bfloat16; choose float16 or float32"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_linear(data()[0], **{"bits": 4, **params})


def test_what_a_method_notes_is_a_warning() -> None:
    w, x = data()
    dead = x.index_fill(-1, torch.tensor([3]), 0.0)
    with pytest.warns(QuantizationWarning, match="gptq: 1 of 32 inputs are always 0 on the calibration text"):
        quantize_linear(w, method="gptq", bits=4, inputs=dead)
    with pytest.warns(QuantizationWarning, match="rtn does not read activation"):
        quantize_linear(w, method="rtn", bits=4, activation=ActivationScheme(8))


def test_a_tuner_learns_for_the_quantized_inputs() -> None:
    w, x = data()
    given: dict[str, Any] = {"method": "omniquant", "bits": 3, "inputs": x, "epochs": 2, "lwc_lr": 0.5}
    plain, a4 = (quantize_linear(w, **given, activation=a) for a in (None, ActivationScheme(4)))
    assert not torch.equal(plain.dequantize(), a4.dequantize())
    with pytest.raises(ValueError, match="dynamic=True, not static ranges"):
        quantize_linear(
            w, method="omniquant", bits=4, inputs=x, activation=ActivationScheme(8, granularity=Granularity.TENSOR, dynamic=False)
        )


@pytest.mark.parametrize(
    "given",
    [
        {"method": "nf4", "bits": 4, "group_size": 16},
        {"method": "gptq", "bits": 4},
        {"method": "claq", "bits": 2},
        {"method": "slim_llm_corrected", "bits": 2, "group_size": 16},
        {"method": "clip_gptq", "bits": 4, "kind": "learned", "iters": 3},
        {"method": "zeroquant", "bits": 4, "iters": 2},
    ],
    ids=lambda given: given["method"],
)
def test_what_a_notebook_has_set_for_torch_changes_no_result(given: dict[str, Any]) -> None:
    weight, x = data(16)
    wanted = quantize_linear(weight, inputs=x, **given).pack()

    def same() -> None:
        found = quantize_linear(weight.clone(), inputs=x.clone(), **given).pack()
        assert all(torch.equal(found[k], wanted[k]) and found[k].dtype is wanted[k].dtype for k in wanted)

    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            same()
            assert torch.get_default_dtype() is dtype
        finally:
            torch.set_default_dtype(torch.float32)
    for setting in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta")):
        with setting:
            same()


def test_another_version_of_a_method_is_refused() -> None:
    with pytest.raises(ValueError, match="rounding gptq has version 2 here; version 1 was asked for"):
        methods.rounding("gptq", {}, version=1)
    with pytest.raises(ValueError, match="transform 'gptq' is unknown; choose one of awq, smoothquant"):
        methods.transform("gptq", {})
