"""Decode attention on a quantized cache: what it holds is KIVI's, and every backend attends to that.

Tolerances. The reference is float64 on the decoded cache. Kernels multiply codes, and round to float16 (u = 2^-11) two things, q · step and
p · step; keys and values in the window are multiplied by q in its type and p in theirs (2^-8 for bfloat16). A score is off by
e = u Σ_d |q_d| step_d code_d at most, which changes p by that share of itself, so that the output is off by 2 e max |v|, and by u max |v|.
In float32 it would be 2^-24 for each of some hundred sums: much below. `bound` is twice this, with e of the largest |q| · |k|. Where ranges
of keys are per token, it is q alone that is rounded, before its product with codes: the same e.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from quant.kernels import kernel
from quant.kernels.kv_attention import (
    Cache,
    Packed,
    Plain,
    ages,
    append,
    append_one,
    packed,
    per_token,
    prepare,
    reference,
    told_one,
    unpacked,
)
from quant.kernels.library import operands
from quant.kernels.on_triton import interpreted, unavailable
from quant.kv import Kivi, PerToken

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA and not interpreted() else "cpu"
needs_triton = pytest.mark.skipif(
    unavailable(torch.device(DEVICE)) is not None,
    reason="Triton's kernels run neither on a GPU nor in the interpreter (TRITON_INTERPRET=1)",
)
needs_gpu = pytest.mark.gpu("triton")


def random(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))
    # Channels of unlike size, and not around zero, as keys are.
    return (x * (0.2 + torch.arange(shape[-1]) % 7 / 3) + torch.arange(shape[-1]) % 5 / 4).to(DEVICE, dtype)


def cache(
    s: int, kv: int, n: int, d: int, bits: tuple[int, int] = (4, 4), group: int = 32, residual: int = 32,
    dtype: torch.dtype = torch.float16, steps: int = 1, room: int = 0,
) -> Packed:  # fmt: skip
    """After a prompt of n - steps tokens and as many steps of decoding."""
    keys, values = random(s, kv, n, d, dtype=dtype), random(s, kv, n, d, dtype=dtype, seed=1)
    made = prepare(keys[:, :, : n - steps], values[:, :, : n - steps], *bits, group, residual, n + room)
    for t in range(n - steps, n):
        append(made, keys[:, :, t : t + 1], values[:, :, t : t + 1])
    return made


def check(got: Tensor, q: Tensor, held: Cache) -> None:
    want = reference.kv_attention(q.double(), held)
    keys, values = held.decoded(torch.float64)
    unit = 2.0**-8 if torch.bfloat16 in (q.dtype, getattr(held, "window_keys", held.keys).dtype) else 2.0**-11
    d = q.shape[-1]
    e = unit * q.double().norm(dim=-1).amax() * keys.norm(dim=-1).amax() * d**-0.5
    bound = 2 * (2 * e + unit) * values.abs().amax()
    assert got.dtype == q.dtype
    assert torch.isfinite(got).all()
    assert (got.double() - want).abs().max() <= bound
    # All in all far less: errors of channels and tokens are independent.
    assert (got.double() - want).norm() <= 4 * unit * want.norm()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("d", [16, 32, 64, 128, 256])
def test_words_hold_the_codes(bits: int, d: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, d), generator=torch.Generator().manual_seed(d))
    assert torch.equal(unpacked(packed(codes, bits), bits, d), codes.to(torch.uint8))


@pytest.mark.parametrize(("bits", "d", "group", "residual"), [((2, 2), 32, 16, 32), ((4, 3), 64, 32, 32), ((8, 5), 64, 64, 64)])
@pytest.mark.parametrize("prompt", [1, 31, 64, 100])
def test_the_cache_holds_what_kivi_reads(bits: tuple[int, int], d: int, group: int, residual: int, prompt: int) -> None:
    """At every step; float32, in which Kivi does not round what it decoded."""
    n = prompt + 70
    keys, values = random(2, 3, n, d, dtype=torch.float32).cpu(), random(2, 3, n, d, dtype=torch.float32, seed=1).cpu()
    keys[0, 1, :, 3] = 0.75
    state = Kivi(*bits, group, residual).new_state(2, 3, d)
    state.append(keys[:, :, :prompt], values[:, :, :prompt])
    ours = prepare(keys[:, :, :prompt], values[:, :, :prompt], *bits, group, residual, n)
    for t in range(prompt, n):
        new = keys[:, :, t : t + 1], values[:, :, t : t + 1]
        state.append(*new)
        append(ours, *new)
        for got, want in zip(ours.decoded(torch.float32), state.read(), strict=True):
            assert torch.equal(got[:, :, : t + 1], want)
            assert not got[:, :, t + 1 :].any()


def test_the_device_appends_as_the_host_does() -> None:
    """Bit for bit in every step between those in which keys age, after prompts that leave values due and not; float16 and float32 alike."""
    for prompt, dtype, steps_by_host in ((3, torch.float16, 1), (16, torch.float32, 2), (41, torch.float16, 2)):
        keys, values = random(2, 1, prompt + 60, 16, dtype=dtype), random(2, 1, prompt + 60, 16, dtype=dtype, seed=1)
        host, device = (prepare(keys[:, :, :prompt], values[:, :, :prompt], 4, 3, 16, 32, prompt + 60) for _ in range(2))
        by_host = 0
        for t in range(prompt, prompt + 60):
            new = keys[:, :, t : t + 1], values[:, :, t : t + 1]
            append(host, *new)
            if ages(device):
                append(device, *new)
                by_host += 1
            else:
                append_one(device, *new)
                told_one(device)
            for f in fields(Packed):
                got, want = getattr(device, f.name), getattr(host, f.name)
                assert torch.equal(got, want) if isinstance(want, Tensor) else got == want, (t, f.name)
        assert by_host == steps_by_host


@pytest.mark.parametrize(
    ("bits", "symmetric", "group", "d", "clip"),
    [(2, False, 16, 32, 1.0), (3, True, None, 16, 0.9), (4, False, None, 64, 0.95), (8, True, 32, 64, 1.0)],
)
def test_the_cache_holds_what_per_token_reads(bits: int, symmetric: bool, group: int | None, d: int, clip: float) -> None:
    """At every step, bit for bit, whether the host says where a token goes or the device; blocks end within the prompt and after it."""
    prompt, n = 19, 36
    keys, values = random(2, 3, n, d, dtype=torch.float32).cpu(), random(2, 3, n, d, dtype=torch.float32, seed=1).cpu()
    keys[0, 1, 20] = 0.75
    values[1, 0, 21] = 0
    state = PerToken(bits, symmetric, group, clip).new_state(2, 3, d)
    state.append(keys[:, :, :prompt], values[:, :, :prompt])
    host, device = (
        per_token.prepare(keys[:, :, :prompt], values[:, :, :prompt], bits, symmetric, group, clip, n, block=16) for _ in range(2)
    )
    for t in range(prompt, n):
        new = keys[:, :, t : t + 1], values[:, :, t : t + 1]
        state.append(*new)
        per_token.append(host, *new)
        per_token.append_one(device, *new)
        for got, want in zip(host.decoded(torch.float32), state.read(), strict=True):
            assert torch.equal(got[:, :, : t + 1], want)
            assert not got[:, :, t + 1 :].any()
    for name in ("keys", "values", "ranges", "counts"):
        assert torch.equal(getattr(device, name), getattr(host, name)), name
    # What the format is said to store, but for fields that hold 3 bits in 4.
    assert host.bytes * 8 == 2 * 2 * 3 * n * d * (PerToken(bits, symmetric, group).bits(n, 3, d) + (bits == 3))


def test_several_tokens_at_once_read_as_one_by_one_where_nothing_ages() -> None:
    one, several = cache(1, 2, 43, 32, steps=0, room=60), cache(1, 2, 43, 32, steps=0, room=60)
    new = random(1, 2, 9, 32), random(1, 2, 9, 32, seed=1)
    append(several, *new)
    coded = several.coded
    for t in range(9):
        append(one, *(x[:, :, t : t + 1] for x in new))
    assert one.coded == (coded[0], coded[1] + 8)
    got, want = (c.decoded(torch.float32) for c in (one, several))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1][:, :, coded[1] + 8 :], want[1][:, :, coded[1] + 8 :])


@pytest.mark.parametrize("rows", [1, 3])
def test_reference_is_attention(rows: int) -> None:
    held = cache(2, 2, 77, 32)
    q = random(2, 2 * rows, 32, dtype=torch.float64)
    keys, values = (x[:, :, :77].repeat_interleave(rows, 1) for x in held.decoded(torch.float64))
    want = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values, scale=0.3)[:, :, 0]
    assert torch.allclose(reference.kv_attention(q, held, 0.3), want, rtol=1e-12, atol=1e-12)
    plain = Plain(keys[:, ::rows].contiguous(), values[:, ::rows].contiguous(), held.counts)
    assert torch.allclose(reference.kv_attention(q, plain, 0.3), want, rtol=1e-12, atol=1e-12)


CASES = [
    # KV, query heads of each, n, D, bits, G, R, steps, splits
    (2, 1, 77, 32, (4, 4), 32, 32, 1, 2),  # a lone query head; keys in codes past those of values
    (1, 3, 33, 64, (2, 2), 32, 32, 1, 1),
    (1, 1, 129, 64, (8, 8), 64, 64, 2, 1),
    (1, 9, 65, 128, (4, 2), 64, 64, 1, 2),  # sixteen columns
    (1, 2, 49, 64, (3, 8), 16, 16, 17, 1),  # pieces of a plane of values
    (1, 1, 5, 16, (4, 4), 16, 16, 1, 1),  # nothing in codes
]


@needs_triton
@pytest.mark.parametrize(("kv", "rows", "n", "d", "bits", "group", "residual", "steps", "splits"), CASES)
def test_attention(kv: int, rows: int, n: int, d: int, bits: tuple[int, int], group: int, residual: int, steps: int, splits: int) -> None:
    held = cache(1, kv, n, d, bits, group, residual, steps=steps, room=group)
    q = random(1, kv * rows, d)
    out = torch.full_like(q, torch.nan)
    assert kernel("kv_attention", "triton", DEVICE).run.kv_attention(q, held, splits=splits, out=out) is out
    check(out, q, held)


@needs_triton
@pytest.mark.parametrize(
    ("s", "rows", "d", "bits", "symmetric", "group", "splits"),
    [
        (1, 1, 64, 4, False, 32, 2),  # a lone query head
        (2, 3, 32, 2, True, None, 1),
        (1, 2, 64, 8, False, 16, 1),  # pieces of a plane, and a group to each
        (1, 9, 64, 3, True, 32, 1),  # sixteen columns
    ],
)
def test_attention_to_ranges_per_token(s: int, rows: int, d: int, bits: int, symmetric: bool, group: int | None, splits: int) -> None:
    """Of two sequences the last is shorter, and ends within its first block."""
    kv = s
    held = per_token.prepare(random(s, kv, 23, d), random(s, kv, 23, d, seed=1), bits, symmetric, group, block=16)
    held.counts[1:] = 11
    q = random(s, kv * rows, d)
    out = torch.full_like(q, torch.nan)
    assert kernel("kv_attention", "triton", DEVICE).run.kv_attention(q, held, splits=splits, out=out) is out
    check(out, q, held)


@needs_triton
def test_bfloat16_and_plain_caches() -> None:
    held = cache(1, 1, 43, 16, group=16, residual=16, dtype=torch.bfloat16)
    run = kernel("kv_attention", "triton", DEVICE).run
    q = random(1, 1, 16, dtype=torch.bfloat16)
    check(run.kv_attention(q, held), q, held)
    for dtype in (torch.float16, torch.bfloat16):
        plain = Plain(*(random(1, 1, 128, 16, dtype=dtype, seed=i) for i in (0, 1)), held.counts)
        plain.counts[:, 2] = 75
        plain.keys[:, :, 75:] = torch.nan
        plain.values[:, :, 75:] = torch.nan
        check(run.kv_attention(q.to(dtype), plain, splits=2), q.to(dtype), plain)


@needs_triton
def test_heads_and_splits_do_not_matter() -> None:
    """Heads share nothing: permuted, results are, bit for bit. Splits change the order of sums, and the scale of p: two roundings of it."""
    held = cache(1, 2, 67, 16, group=16, residual=16)
    run = kernel("kv_attention", "triton", DEVICE).run
    q = random(1, 4, 16, dtype=torch.float32)
    one = run.kv_attention(q, held, splits=1)
    names = ("keys", "key_ranges", "values", "value_ranges", "window_keys", "window_values")
    other = replace(held, **{name: getattr(held, name).flip(1) for name in names})
    turned = run.kv_attention(q.unflatten(1, (2, 2)).flip(1).flatten(1, 2), other, splits=1)
    assert torch.equal(turned.unflatten(1, (2, 2)).flip(1).flatten(1, 2), one)
    made = run.kv_attention(q, held, splits=3)
    assert (made - one).abs().max() <= 2 * 2.0**-11 * held.decoded(torch.float32)[1].abs().amax()


@needs_triton
def test_sequences_of_other_lengths_and_large_queries() -> None:
    """Counts on the device say what is read; a step of 0, and scores far apart."""
    held = cache(3, 1, 67, 16, group=16, residual=16)
    held.key_ranges[1, :, 0, :, 0] = 0
    held.counts[1] = torch.tensor([48, 48, 48])
    held.counts[2] = torch.tensor([16, 10, 16])
    run = kernel("kv_attention", "triton", DEVICE).run
    for size in (1e-3, 30.0):
        q = random(3, 2, 16) * size
        want = reference.kv_attention(q.double(), held)
        # What a score is off by moves p that much: 2^-11 Σ |q| |k| / √D, about 1 for the largest q, where the greatest score takes all.
        error = (run.kv_attention(q, held).double() - want).norm() / want.norm()
        assert error <= 2.0**-9 * (1 + size), (size, error)


@pytest.mark.parametrize("place", [pytest.param("interpreter", marks=needs_triton), pytest.param("gpu", marks=needs_gpu)])
@pytest.mark.parametrize("keys_too", [False, True])
def test_tokens_count_beside_one_that_has_nearly_all_of_the_weight(keys_too: bool, place: str) -> None:
    """And says next to nothing, as first tokens of language models do: p times a step of 8 bits is little there."""
    n, d = 160, 64
    keys, values = random(1, 1, n, d) / 8, random(1, 1, n, d, seed=1)
    keys[:, :, 0], values[:, :, 0] = 1.0, values[:, :, 0] / 256
    q = torch.full((1, 1, d), 1.4, dtype=torch.float16, device=DEVICE)
    held = per_token.prepare(keys, values, 8, False, None) if keys_too else prepare(keys, values, 8, 8, 32, 32)
    scores = d**-0.5 * q[0] @ held.decoded(torch.float64)[0][0, 0, :n].to(q).T
    assert 0.99 < float(torch.softmax(scores.double(), -1)[0, 0]) < 0.999
    check(kernel("kv_attention", "triton", DEVICE).run.kv_attention(q, held, splits=1), q, held)


def test_what_is_refused() -> None:
    x = random(1, 1, 32, 32)
    for arguments, text in (
        ((1, 4, 32, 32), "2 to 8"), ((4, 4, 64, 64), "groups of"), ((4, 4, 32, 48), "multiple of the group size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            prepare(x, x, *arguments)
    for bits, group, text in ((9, None, "2 to 8"), (4, 8, "groups of as many")):
        with pytest.raises(ValueError, match=text):
            per_token.prepare(x, x, bits, False, group)
    with pytest.raises(ValueError, match="room for 32"):
        per_token.append(per_token.prepare(x, x, 4, False, None), *[random(1, 1, 33, 32)] * 2)
    for shape in ((1, 2, 1, 32), (2, 1, 1, 32), (1, 2, 1, 16)):  # torch would spread one sequence or head over all
        with pytest.raises(ValueError, match="takes as many tokens of both"):
            per_token.append(per_token.prepare(*[random(2, 2, 8, 32)] * 2, 4, False, None), *[random(*shape)] * 2)
    held = prepare(x, x, 4, 4, 32, 32, 40)
    with pytest.raises(ValueError, match=r"room for both of \[1, 1, 64, 32\]"):
        prepare(random(1, 1, 65, 32), random(1, 1, 65, 32), 4, 4, 32, 32, into=held)
    with pytest.raises(ValueError, match="1 to 32 tokens"):
        append(held, *[random(1, 1, 33, 32)] * 2)
    for q in (random(1, 32), random(1, 1, 16), random(2, 1, 32)):
        with pytest.raises(ValueError, match="this cache takes"):
            reference.kv_attention(q, held)
    with pytest.raises(ValueError, match="it must be contiguous"):
        reference.kv_attention(random(1, 1, 32), held, out=torch.empty(1, 1, 32, dtype=torch.float64))


def test_the_operator_is_the_kernel() -> None:
    held = cache(1, 1, 20, 16, (4, 2), 16, 16)
    q = random(1, 2, 16)
    assert torch.allclose(torch.ops.bitgrid.kv_attention(q, *operands(held), None), reference.kv_attention(q, held), rtol=0.02, atol=0.02)


@needs_gpu
@pytest.mark.parametrize(
    ("bits", "rows", "d", "group", "residual"),
    [((4, 4), 1, 128, 64, 64), ((2, 2), 1, 128, 32, 128), ((8, 8), 8, 128, 64, 64), ((4, 2), 4, 64, 32, 32), ((4, 4), 1, 256, 128, 128)],
)
def test_shapes_of_models_on_a_gpu(bits: tuple[int, int], rows: int, d: int, group: int, residual: int) -> None:
    """Few, since each takes the compiler seconds."""
    run = kernel("kv_attention", "triton", DEVICE).run
    for n in (group, 1000, 2049):
        held = cache(2, 2, n, d, bits, group, residual, torch.bfloat16, room=700)
        q = random(2, 2 * rows, d, dtype=torch.bfloat16)
        for splits in (None, 1, 5):
            check(run.kv_attention(q, held, splits=splits), q, held)


@needs_gpu
@pytest.mark.parametrize(
    ("bits", "symmetric", "rows", "d", "group"),
    [(4, False, 1, 128, None), (2, True, 1, 128, 32), (8, False, 8, 128, 64), (3, False, 1, 256, None)],
)
def test_ranges_per_token_on_a_gpu(bits: int, symmetric: bool, rows: int, d: int, group: int | None) -> None:
    """A captured step appends its token and attends, in every replay to one more."""
    run = kernel("kv_attention", "triton", DEVICE).run
    for n in (1, 64, 2049):
        keys, values = (random(2, 2, n, d, dtype=torch.bfloat16, seed=i) for i in (0, 1))
        held = per_token.prepare(keys, values, bits, symmetric, group, capacity=n + 70)
        q = random(2, 2 * rows, d, dtype=torch.bfloat16)
        for splits in (None, 1, 5):
            check(run.kv_attention(q, held, splits=splits), q, held)
    new = random(2, 2, 1, d, dtype=torch.bfloat16, seed=2), random(2, 2, 1, d, dtype=torch.bfloat16, seed=3)
    out, graph = torch.empty_like(q), torch.cuda.CUDAGraph()
    per_token.append_one(held, *new)
    with torch.cuda.graph(graph):
        per_token.append_one(held, *new)
        run.kv_attention(q, held, out=out)
    for _ in range(3):
        graph.replay()
        check(out, q, held)
    assert int(held.counts[0, 2]) == n + 4


@needs_gpu
def test_a_captured_graph_reads_what_was_appended_since() -> None:
    run = kernel("kv_attention", "triton", DEVICE).run
    held = cache(2, 2, 200, 128, group=64, residual=64, dtype=torch.bfloat16, room=100)
    q = random(2, 2, 128, dtype=torch.bfloat16)
    out = run.kv_attention(q, held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.kv_attention(q, held, out=out)
    for t in range(40):
        append(held, random(2, 2, 1, 128, dtype=torch.bfloat16, seed=t), random(2, 2, 1, 128, dtype=torch.bfloat16, seed=-t))
        graph.replay()
        check(out, q, held)
