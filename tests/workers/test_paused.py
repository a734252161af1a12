"""One forward that waits at every site gives what a forward for every site gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import linear

from quant.scheme import ActivationScheme
from tests.workers.stage_runs import calibration_text, quantize_spec, quantized, tiny_context
from workers import feeding
from workers.blocks import linear_view, tap_inputs
from workers.paused import PausedForward
from workers.quantize import run_quantize
from workers.rebuild import rebuild
from workers.rounding import BlockQuantizer
from workers.specs import ModelSpec
from workers.stream import Call

SEQUENTIAL = quantize_spec("gptq", propagation="quantized", true_sequential=True)


@pytest.mark.parametrize("family", ["llama", "falcon_old", "gpt2", "opt"])
def test_artifacts_equal_those_of_a_forward_for_every_site(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = tiny_context(family, tmp_path)
    paused, _ = quantized(ctx, tmp_path / "paused", SEQUENTIAL, {})
    assert not any("forward of its own" in note for note in ctx.notes)
    monkeypatch.setattr(feeding, "free_bytes", lambda device: 0)
    anew, _ = quantized(ctx, tmp_path / "anew", SEQUENTIAL, {})
    assert sum("forward of its own" in note for note in ctx.notes) == 1, "the reason is noted once, not for every block"
    files = sorted(p.name for p in (paused / "payload").glob("*.safetensors"))
    assert files
    for name in files:
        a, b = (load_file(folder / "payload" / name) for folder in (paused, anew))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize(
    ("family", "transforms"),
    [("llama_mha", ()), ("llama", ("smoothquant", "qllm_reassembly")), ("mistral", ("quarot", "awq")), ("opt", ("clip",))],
)
def test_every_linear_is_rounded_with_the_inputs_it_has_in_the_final_model(
    family: str, transforms: tuple[str, ...], sequential: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """True-sequential: all that comes before a linear is final. At once: only what comes before its block is, so that the Hessians of
    queries, keys and values alone are those of the final model. Hessians are float32 sums over 72 tokens: off by 72 units of 2^-24."""
    used: dict[str, torch.Tensor] = {}
    plain = BlockQuantizer.statistics_to_round

    def recorded(worker: BlockQuantizer, name: str) -> Any:
        found = plain(worker, name)
        assert found[0].hessian is not None
        used[worker.path(name)] = found[0].hessian.double()
        return found

    monkeypatch.setattr(BlockQuantizer, "statistics_to_round", recorded)
    ctx = tiny_context(family, tmp_path)
    activation = ActivationScheme(8) if "qllm_reassembly" in transforms else None
    spec = quantize_spec("gptq", *transforms, propagation="quantized", activation=activation, true_sequential=sequential)
    artifact, summary = quantized(ctx, tmp_path / "q", spec, {})
    assert summary["flags"] == []
    model, tokens = rebuild(ctx, ModelSpec("model"), artifact), calibration_text(ctx, family)
    final: dict[str, torch.Tensor] = {}

    def seen(name: str, x: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).double()
        final[name] = 2 / len(tokens) * flat.T @ flat
        return x

    taps = tap_inputs(model, list(used), seen)
    with torch.no_grad():
        model(tokens, use_cache=False)
    taps.remove()
    apart = {n: float((h - used[n]).norm() / h.norm()) for n, h in final.items()}
    first = {n: a for n, a in apart.items() if n.endswith(("q_proj", "k_proj", "v_proj"))}
    assert max((apart if sequential else first).values()) < 72 * 2**-24
    if not sequential:
        assert min(a for n, a in apart.items() if n not in first) > 1e-3


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
        self.runs = 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return hidden_states + self.down(self.up(hidden_states).relu())


def forward_of(block: Two) -> PausedForward:
    hidden = list(torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0)))
    return PausedForward(block, {"up": 4, "down": 6}, frozenset({"hessian"}), [Call((), {})] * 3, hidden, 0)


def test_each_site_sees_the_linears_before_it_as_they_are_by_then() -> None:
    block = Two()
    forward = forward_of(block)
    hidden = torch.stack(forward._hidden)
    names = []
    for name, found in forward.sites():
        names.append(name)
        with torch.no_grad():
            x = hidden if name == "up" else linear(hidden, block.up.weight).relu()
            flat = x.flatten(0, -2)
            hessian = found.sites[name].hessian
            assert hessian is not None
            assert torch.allclose(hessian, 2 / 6 * flat.T @ flat, rtol=1e-5, atol=1e-6)
            linear_view(block, name).write(torch.ones_like(linear_view(block, name).weight()))
    assert names == ["up", "down"]
    assert block.runs == 3, "one forward a batch"
    with torch.no_grad():
        assert torch.equal(torch.stack(forward.outputs), torch.stack([block(h) for h in hidden]))
    assert not forward.outputs[0].requires_grad


def test_an_error_between_sites_ends_the_waiting_forwards() -> None:
    block = Two()
    ended: list[str] = []
    block.down.register_forward_hook(lambda *_: ended.append("down ran"))
    sites = forward_of(block).sites()
    next(sites)
    sites.close()
    assert ended == []
    assert not block.up._forward_pre_hooks, "the taps are gone"


def test_an_error_while_a_method_rounds_leaves_no_writer_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = tiny_context("llama", tmp_path)
    monkeypatch.setattr("workers.quantize.round_site", lambda *_: (_ for _ in ()).throw(RuntimeError("planted")))
    (tmp_path / "payload").mkdir()
    with pytest.raises(RuntimeError, match="planted"):
        run_quantize(SEQUENTIAL, {}, tmp_path / "payload", ctx)
    assert list((tmp_path / "payload").iterdir()) == []
