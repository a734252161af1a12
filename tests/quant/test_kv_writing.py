"""KIVI's packed cache as Triton writes it: bit for bit what torch does, which `test_kv_attention` compares with `quant.kv`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant.kernels import kernel
from quant.kernels.kv_attention import Packed, append, prepare, reference, told_one
from tests.quant.test_kv_attention import DEVICE, needs_triton, random


@needs_triton
@pytest.mark.parametrize(
    ("bits", "d", "group", "residual", "prompt", "steps", "dtype"),
    [
        ((4, 4), 32, 16, 16, 41, 24, torch.float16),  # keys age twice
        ((8, 2), 64, 32, 64, 63, 3, torch.bfloat16),  # two blocks of keys at once, after a prompt in which nothing does
        ((2, 8), 32, 16, 16, 16, 2, torch.float32),  # pieces of a plane of values
        ((3, 5), 16, 16, 32, 1, 1, torch.float16),
    ],
)
def test_triton_writes_what_torch_does(
    bits: tuple[int, int], d: int, group: int, residual: int, prompt: int, steps: int, dtype: torch.dtype
) -> None:
    """Bit for bit: a prompt, one into the memory of another, and tokens, keys that age included; several at once leave values due."""
    n = prompt + steps + 5
    # Keys as a model gives them: heads of a token are neighbours.
    keys, values = (random(2, n, 3, d, dtype=dtype, seed=i).transpose(1, 2) for i in (0, 1))
    keys[0, 1, :, 3] = 0.75
    run = kernel("kv_attention", "triton", DEVICE).run
    made, other = keys[:, :, :prompt], values[:, :, :prompt]
    want = prepare(made, other, *bits, group, residual, n)
    got = run.prepare(other, made, *bits, group, residual, n)
    assert run.prepare(made, other, *bits, group, residual, n, got) is got
    check_same(got, want)
    for t in range(prompt, n - 4):
        new = keys[:, :, t : t + 1], values[:, :, t : t + 1]
        append(want, *new)
        if t % 2:
            run.append(got, *new)
        else:
            run.append_one(got, *new)
            told_one(got)
        assert not run.ages(got)
        check_same(got, want, t)
    for several in (slice(n - 4, n - 1), slice(n - 1, n)):
        append(want, keys[:, :, several], values[:, :, several])
        run.append(got, keys[:, :, several], values[:, :, several])
        check_same(got, want, several)


def check_same(got: Packed, want: Packed, where: object = None) -> None:
    """What is held, that is: of places that are not in use there may be anything."""
    assert (got.length, got.coded) == (want.length, want.coded), where
    assert got.arrived is not None
    assert not got.arrived.any(), where
    assert torch.equal(got.counts, want.counts), where
    n, g = want.length, want.block
    for name, count in (("key", want.coded[0]), ("value", want.coded[1])):
        places = torch.arange(count, n, device=DEVICE) % want.window
        a, b = (getattr(c, f"window_{name}s")[:, :, places] for c in (got, want))
        assert torch.equal(a, b), (where, name)
        for part in (f"{name}s", f"{name}_ranges"):
            a, b = (getattr(c, part) for c in (got, want))
            if part == "key_ranges":
                a, b = (x[:, :, : count // g] for x in (a, b))
            else:
                # Tokens of a block are the last axis but for codes of keys, and the pairs of ranges.
                at = {"keys": 3, "values": 4, "value_ranges": 4}[part]
                a, b = (x.movedim(at, 3).flatten(2, 3)[:, :, :count] for x in (a, b))
            assert torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16)), (where, part)


@needs_triton
def test_sequences_may_differ_in_length() -> None:
    """Each goes by its own counts: what a short one does is what it does alone."""
    keys, values = (random(2, 2, 40, 16, dtype=torch.float16, seed=i) for i in (0, 1))
    run = kernel("kv_attention", "triton", DEVICE).run

    def after(prompts: list[int], rows: list[int]) -> Packed:
        alone = [
            run.prepare(keys[r : r + 1, :, :n], values[r : r + 1, :, :n], 4, 4, 16, 16, 48) for r, n in zip(rows, prompts, strict=True)
        ]
        names = ("keys", "key_ranges", "values", "value_ranges", "window_keys", "window_values", "counts", "arrived")
        held = alone[0]
        for name in names:
            setattr(held, name, torch.cat([getattr(c, name) for c in alone]))
        for t in range(3):
            run.append_one(held, *(x[rows, :, 30 + t : 31 + t] for x in (keys, values)))
        return held

    both = after([31, 17], [0, 1])
    assert both.counts.tolist() == [[32, 17, 34], [16, 3, 20]]
    for row, prompt in ((0, 31), (1, 17)):
        one = after([prompt], [row])
        for got, want in zip(both.decoded(torch.float32), one.decoded(torch.float32), strict=True):
            assert torch.equal(got[row], want[0])


def test_a_cache_for_reading_takes_no_token() -> None:
    from quant.kernels.kv_attention import on_device

    x = random(1, 1, 16, 16, dtype=torch.float32, seed=0)
    held = prepare(x, x, 4, 4, 16, 16, 32)
    assert not reference.ages(held)
    with pytest.raises(ValueError, match=r"got keys \(1, 1, 1, 8\).*takes \(1, 1, 1, 16\) of both"):
        on_device.append_one(replace(held, arrived=torch.zeros(1, dtype=torch.int32)), x[:, :, :1, :8], x[:, :, :1])
    held.arrived = None
    with pytest.raises(ValueError, match="this cache is for reading"):
        on_device.append_one(held, x[:, :, :1], x[:, :, :1])


@pytest.mark.gpu("triton")
@pytest.mark.parametrize(("bits", "residual"), [((4, 4), 64), ((2, 8), 128)])
def test_replays_write_what_torch_does(bits: tuple[int, int], residual: int) -> None:
    """One graph, in every replay another token, through steps in which keys age; heads of a model's width."""
    prompt, steps = 200, 150
    keys, values = (random(2, 4, prompt + steps, 128, dtype=torch.bfloat16, seed=i) for i in (0, 1))
    run = kernel("kv_attention", "triton", DEVICE).run
    want, got = (f(keys[:, :, :prompt], values[:, :, :prompt], *bits, 64, residual, prompt + steps + 1) for f in (prepare, run.prepare))
    check_same(got, want)
    new = keys[:, :, :1].clone(), values[:, :, :1].clone()
    other, graph = run.prepare(keys, values, *bits, 64, residual, prompt + steps + 1), torch.cuda.CUDAGraph()
    run.append_one(other, *new)
    with torch.cuda.graph(graph):
        run.append_one(got, *new)
    for t in range(prompt, prompt + steps):
        for held, x in zip(new, (keys, values), strict=True):
            held.copy_(x[:, :, t : t + 1])
        graph.replay()
        told_one(got)
        append(want, keys[:, :, t : t + 1], values[:, :, t : t + 1])
        if t % 10 == 0 or t % 64 < 2:
            check_same(got, want, t)
