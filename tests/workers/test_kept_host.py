"""What the host keeps for a GPU: results do not change, both budgets hold, and a GPU's memory is given up to it. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from quant.scheme import WeightScheme
from tests.workers.stage_runs import calibrated, quantize_spec, quantized, tiny_context
from tests.workers.test_kept import entry, stored
from workers import kept
from workers.kept import CPU, Kept

GPU = torch.device("cuda")


class Copies:
    """A GPU that is none: what comes to it or goes to the host is copied, and counted."""

    def __init__(self, free: Callable[[torch.device], int] = lambda device: 2**30) -> None:
        self.to: list[str] = []
        self.holder = Kept(free, self._copied)

    def _copied(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.to.append(device.type)
        return tensor.clone()

    def begin(self, budget: int | None, host_budget: int | None = None) -> Kept:
        self.to.clear()
        self.holder.begin(GPU, budget, host_budget)
        return self.holder


def test_what_a_gpu_has_no_room_for_comes_back_from_the_host_and_gives_the_same_bits(tmp_path: Path) -> None:
    plain = tiny_context("llama", tmp_path)
    inputs = calibrated(plain, tmp_path, "hessian")
    first, further = (quantize_spec("gptq", weight=WeightScheme(bits)) for bits in (2, 3))
    want, _ = quantized(plain, tmp_path / "plain", further, inputs)
    gpu = Copies()
    context = replace(plain, kept=gpu.begin(None))
    quantized(context, tmp_path / "first", first, inputs)
    whole = gpu.holder.bytes
    gpu.begin(whole // 2, 2 * whole)  # powers of two are pinned
    assert 0 < gpu.holder.bytes <= whole // 2 < gpu.holder.bytes + gpu.holder.host_bytes
    got, _ = quantized(context, tmp_path / "got", further, inputs)
    told = gpu.holder.told()
    assert (told["statistics_loaded"], told["factors_made"]) == (0, 0), "nothing is read or factored again"
    assert 4 * told["statistics_read_host"] + told["factors_read_host"] == gpu.to.count("cuda") > 0, "a file has four sites"
    assert told["statistics_read"] + told["statistics_read_host"] + told["factors_read"] + told["factors_read_host"] == 2 + 8
    assert stored(got) == stored(want)


@pytest.mark.parametrize(("budget", "host_budget"), [(0, 64), (1, 64), (20, 0), (20, 40), (40, 20)])
def test_both_budgets_hold_and_every_entry_is_itself_in_one_place(budget: int, host_budget: int) -> None:
    sizes = {name: 3 + i for i, name in enumerate("abcdefgh")}
    gpu, random = Copies(), Random(0)
    for _ in range(20):
        holder = gpu.begin(budget, host_budget)
        for name in random.choices("abcdefgh", k=8):
            found = holder.statistics(name, lambda name=name: {"x": torch.full((sizes[name],), ord(name), dtype=torch.uint8)})["x"]
            assert found.tolist() == sizes[name] * [ord(name)]
            near, host = holder._near._entries, holder._host._entries
            assert not near.keys() & host.keys()
            assert holder.bytes == sum(e.value["x"].nbytes for e in near.values()) <= budget
            assert sum(e.value["x"].nbytes for e in host.values()) <= holder.host_bytes <= (host_budget if budget else 0)


def test_a_walk_over_more_than_a_gpu_holds_copies_what_is_over_and_nothing_else() -> None:
    gpu = Copies()
    for stage in range(3):
        holder = gpu.begin(32, 32)
        for name in "abcde":
            entry(holder, name, 16)
        counts = holder.counts
        assert (counts.statistics_read, counts.statistics_read_host) == ((2, 2) if stage else (0, 0))
        assert gpu.to == (["cuda"] * 2 if stage else ["cpu"] * 2)
    holder = gpu.begin(32, 48)
    for name in "vw":
        entry(holder, name, 16)
    assert (set(holder._near._entries), set(holder._host._entries)) == (set("vw"), set("cda")), "what one stage used pushes none of it out"
    holder = gpu.begin(32, 48)
    entry(holder, "d", 16)
    assert set(holder._host._entries) == set("cav"), "what goes takes the place of what comes"


def test_a_gpu_gives_memory_up_to_the_host_and_all_where_none_is_to_be_kept() -> None:
    total = {GPU: 1000, CPU: 4000}
    gpu = Copies(lambda device: total[device] - (gpu.holder.bytes if device == GPU else gpu.holder.host_bytes))
    holder = gpu.begin(None)
    for name in "abcd":
        entry(holder, name, 128)
    assert (holder.bytes, holder.host_bytes) == (384, 128), "half of the GPU's memory, a quarter of the host's at most"
    holder.make_room(800)
    assert (holder.bytes, holder.host_bytes) == (128, 384)
    for name in "abcd":
        entry(holder, name, 128)
    assert (holder.counts.statistics_loaded, holder.counts.statistics_read, holder.counts.statistics_read_host) == (4, 1, 3)
    assert holder.clear() == 512
    assert (holder.bytes, holder.host_bytes) == (0, 0)
    holder = gpu.begin(None)
    for name in "abcd":
        entry(holder, name, 128)
    gpu.begin(0)
    assert (holder.bytes, holder.host_bytes) == (0, 0)
    holder.begin(CPU, 100)
    for name in "abcd":
        entry(holder, name, 64)
    assert (holder.bytes, holder.host_bytes) == (64, 0), "the host has no host beside it"


def test_the_host_counts_what_is_pinned_of_every_tensor() -> None:
    """A power of two of each that has any bytes: of 100, 4, 1 and none."""
    holder = Copies().begin(1, 256)
    holder.statistics("a", lambda: {str(n): torch.zeros(n, dtype=torch.uint8) for n in (100, 4, 1, 0)})
    assert (holder.bytes, holder.host_bytes) == (0, 128 + 4 + 1)


@pytest.mark.parametrize(("device", "share"), [(CPU, 250), (GPU, 500)])
def test_without_a_budget_a_quarter_of_a_hosts_free_memory_is_kept_and_half_of_a_gpus(device: torch.device, share: int) -> None:
    """What is kept counts as free."""
    for size, held in ((share, share), (share + 1, 0)):
        holder = Kept(lambda place: 1000 - holder.bytes, lambda tensor, place: tensor)  # noqa: B023
        holder.begin(device, None, 0)
        for name in "ab":
            entry(holder, name, size)
        assert (holder.bytes, holder.host_bytes) == (held, 0)


def test_another_device_begins_with_nothing() -> None:
    holder = Copies().begin(None)
    holder.statistics("file", lambda: {"site": torch.ones(4)})
    assert holder.bytes
    holder.begin(CPU, None)
    assert (holder.bytes, holder.host_bytes) == (0, 0)


def test_a_copy_has_the_strides_of_its_tensor() -> None:
    upper = torch.randn(3, 4).T
    there = kept.copied(upper, CPU)
    assert (there.stride(), there.tolist()) == (upper.stride(), upper.tolist())
    assert there.data_ptr() != upper.data_ptr()


@pytest.mark.gpu
def test_a_gpus_factor_waits_in_pinned_memory_and_comes_back_with_its_bits_and_strides() -> None:
    holder, upper = Kept(), torch.randn(300, 400, device="cuda").T
    holder.begin(upper.device, 1)
    holder.factor(("f", "s"), "inverse", torch.eye(3, device="cuda"), 0.01, lambda: (upper, 0.1))
    ((held, _),) = (e.value for e in holder._host._entries.values())
    assert held.is_pinned()
    assert holder.host_bytes == 2**19
    got, damp = holder.factor(("f", "s"), "inverse", torch.eye(3, device="cuda"), 0.01, lambda: (torch.zeros(1), 0.0))
    assert (got.stride(), damp, holder.counts.factors_read_host) == (upper.stride(), 0.1, 1)
    assert torch.equal(got, upper)
