"""Statistics do not depend, to the last bit, on how sequences were batched; inputs here are exact, so nothing else differs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.statistics import KINDS
from tests.tiny_models import config_of
from workers.capture import MOMENTS, collect
from workers.stream import Call
from workers.structure import Site, Structure

SEQUENCES, LENGTH, WIDTH = 6, 7, 32
DENSE = "linear"
EXPERTS = ("experts.gate_up_proj.0", "experts.gate_up_proj.1", "experts.gate_up_proj.2")
STRUCTURE = Structure(
    model_type="made up",
    blocks="blocks",
    count=1,
    sites=tuple(Site((n,), (8,), WIDTH) for n in (DENSE, *EXPERTS)),
    groups=(),
    attention="",
    cache_argument="",
    experts="experts",
)


class Block(nn.Module):
    """A linear and experts that read the block's own input. Expert 1 is chosen by its first channel, expert 2 never."""

    def __init__(self) -> None:
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, 8)
        self.experts: Any = MixtralExperts(config_of("mixtral"))
        for p in self.experts.parameters():
            nn.init.normal_(p)

    def forward(self, hidden: Tensor) -> Tensor:
        self.linear(hidden)
        flat = hidden.reshape(-1, WIDTH)
        chosen = (flat[:, :1] > 0.8).long()
        self.experts(flat, chosen, torch.ones(flat.shape[0], 1))
        return hidden


def inputs() -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(SEQUENCES, LENGTH, WIDTH)
    x[2, :, 0] = 0  # a sequence that sends no token to expert 1
    return x


def collected(batch: int, dtype: torch.dtype) -> Any:
    hidden = [h.to(dtype) for h in inputs().split(batch)]
    calls = [Call((None,), {}) for _ in hidden]
    return collect(Block().to(dtype), STRUCTURE, frozenset({*KINDS, "range", MOMENTS}), calls, hidden, kept_sequences=4)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [2, 4, 6])
def test_batching_changes_no_bit(batch: int, dtype: torch.dtype) -> None:
    one, many = collected(1, dtype), collected(batch, dtype)
    assert one.tokens == many.tokens
    assert one.ranges.keys() == many.ranges.keys()
    for name, ends in one.ranges.items():
        assert all(torch.equal(a, b) for a, b in zip(ends, many.ranges[name], strict=True))
    assert one.moments == many.moments
    for name in (DENSE, *EXPERTS):
        for kind in KINDS:
            assert torch.equal(getattr(one.sites[name], kind), getattr(many.sites[name], kind)), (name, kind)


def test_experts_equal_brute_force() -> None:
    x = inputs()
    found = collected(4, torch.float32)
    for e, name in enumerate(EXPERTS):
        own = [t[(t[:, 0] > 0.8).long() == e] for t in x]
        all_ = torch.cat(own)
        assert found.tokens[name] == all_.shape[0]
        wide = all_.double()
        # All sequences count, those included that sent this expert nothing.
        torch.testing.assert_close(found.sites[name].hessian.double(), 2 / SEQUENCES * wide.T @ wide, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.sites[name].samples, torch.cat(own[:4])[None])
        if all_.numel():
            assert torch.equal(found.sites[name].absmax, all_.abs().amax(0))
            assert torch.equal(torch.stack(found.ranges[name]), torch.stack([all_.amin(0), all_.amax(0)]))
    assert EXPERTS[2] not in found.ranges
    assert not found.sites[EXPERTS[2]].hessian.any()


class Chain(nn.Module):
    """Two linears, the second of which reads the first one's outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.done = 0

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.down(self.up(hidden).relu())
        self.done += 1
        return out


@pytest.mark.parametrize("only", [None, ("up",)])
def test_statistics_alone_are_the_same_and_no_forward_is_finished(only: tuple[str, ...] | None) -> None:
    chain = replace(STRUCTURE, sites=(Site(("up",), (2 * WIDTH,), WIDTH), Site(("down",), (WIDTH,), 2 * WIDTH)), experts=None)
    hidden = list(inputs().split(2))
    calls = [Call((None,), {}) for _ in hidden]
    kinds = frozenset({"hessian", "absmax"})
    block = Chain()
    whole, outputs = collect(block, chain, kinds, calls, hidden, 0, only)
    assert (block.done, len(outputs)) == (3, 3)
    alone, none = collect(block, chain, kinds, calls, hidden, 0, only, statistics_alone=True)
    assert (block.done, none) == (3, [])
    assert alone.tokens == whole.tokens
    assert alone.sites.keys() == whole.sites.keys() == set(only or ("up", "down"))
    for name, found in whole.sites.items():
        assert torch.equal(alone.sites[name].hessian, found.hessian)
        assert torch.equal(alone.sites[name].absmax, found.absmax)


def test_statistics_alone_of_experts_see_all_of_them() -> None:
    hidden = list(inputs().split(2))
    calls = [Call((None,), {}) for _ in hidden]
    found, outputs = collect(Block(), STRUCTURE, frozenset({"hessian"}), calls, hidden, 0, statistics_alone=True)
    assert not outputs
    for name in (DENSE, *EXPERTS):
        assert torch.equal(found.sites[name].hessian, collected(2, torch.float32).sites[name].hessian)
