"""Divergence: hand-made logits, properties of KL, and the two ways to have the reference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.workers.fake_models import given_logits, logits_of, table_model
from workers.artifact import CorruptArtifactError, payload_files
from workers.errors import NumericalError
from workers.tasks import base, divergence

WINDOWS = torch.tensor([[0, 1, 2], [2, 1, 0]])


def log_of(probabilities: list[list[float]]) -> Tensor:
    """`[3, V]` probabilities of the three positions ▸ logits; the last position predicts nothing and is never read."""
    return torch.tensor(probabilities).log()


REFERENCE = torch.stack([log_of([[0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [1, 1, 1]]), log_of([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [1, 1, 1]])])
VARIANT = torch.stack([log_of([[0.6, 0.2, 0.2], [0.3, 0.1, 0.6], [1, 1, 1]]), log_of([[0.3, 0.6, 0.1], [0.2, 0.7, 0.1], [1, 1, 1]])])


def run(reference: Tensor, variant: Tensor, windows: Tensor = WINDOWS, batch_tokens: int = 3) -> base.Result:
    walked = divergence.walk(given_logits(reference), windows, batch_tokens)
    return divergence.run(walked, given_logits(variant), windows, batch_tokens)


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_hand_made_logits() -> None:
    result = run(REFERENCE, VARIANT)
    expected = [
        (kl([0.2, 0.5, 0.3], [0.6, 0.2, 0.2]) + kl([0.1, 0.2, 0.7], [0.3, 0.1, 0.6])) / 2,
        (kl([0.6, 0.3, 0.1], [0.3, 0.6, 0.1]) + kl([0.5, 0.3, 0.2], [0.2, 0.7, 0.1])) / 2,
    ]
    assert result.columns["kl"] == pytest.approx(expected, rel=1e-5)
    # Window 0: tops 1, 2 against 0, 2, targets 1, 2: right ▸ wrong, right ▸ right.
    # Window 1: tops 0, 0 against 1, 1, targets 1, 0: wrong ▸ right, right ▸ wrong.
    assert result.columns["top1_agreement"] == [0.5, 0.0]
    assert result.columns["flips"] == [0.5, 1.0]
    assert result.columns["nll"] == pytest.approx([-(math.log(0.2) + math.log(0.6)) / 2, -(math.log(0.6) + math.log(0.2)) / 2], rel=1e-5)
    assert result.scores["kl"] == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert result.scores["flips"] == 0.75
    assert result.n_tokens == 4


def test_two_wrong_predictions_are_no_flip() -> None:
    reference, variant = log_of([[0.6, 0.3, 0.1]] * 3)[None], log_of([[0.1, 0.3, 0.6]] * 3)[None]
    result = run(reference, variant, torch.tensor([[1, 1, 1]]))
    assert result.scores["top1_agreement"] == 0.0
    assert result.scores["flips"] == 0.0


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.floats(1e-6, 30.0))
def test_kl_is_never_negative_and_zero_for_the_same_model(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (scale * torch.randn(3, 5, 40, generator=generator) for _ in range(2))
    windows = torch.randint(40, (3, 5), generator=generator)
    result = run(a, b, windows, 5)
    assert min(result.columns["kl"]) >= 0  # type: ignore[type-var]
    reference = torch.nn.functional.kl_div(
        b[:, :-1].double().log_softmax(-1), a[:, :-1].double().log_softmax(-1), log_target=True, reduction="none"
    )
    assert result.scores["kl"] == pytest.approx(float(reference.sum(-1).mean()), rel=1e-4, abs=1e-6)
    same = run(a, a, windows, 5)
    assert (same.scores["kl"], same.scores["top1_agreement"], same.scores["flips"]) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 1.0])
def test_a_small_divergence_is_as_exact_as_a_large_one(noise: float) -> None:
    """Near-equal models, about noise² / 2 nats, against float64. A log-probability is off by some 1e-6 in float32, and d by the
    same, of about the noise's size: hence the relative error."""
    generator = torch.Generator().manual_seed(0)
    a = 4 * torch.randn(2, 9, 4000, generator=generator)
    b = a + noise * torch.randn(2, 9, 4000, generator=generator)
    windows = torch.randint(4000, (2, 9), generator=generator)
    exact = torch.nn.functional.kl_div(
        b[:, :-1].double().log_softmax(-1), a[:, :-1].double().log_softmax(-1), log_target=True, reduction="none"
    )
    assert run(a, b, windows, 9).columns["kl"] == pytest.approx(exact.sum(-1).mean(-1).tolist(), rel=3e-6 / noise)


def test_a_prediction_the_reference_all_but_excludes_counts() -> None:
    """log P = -100 where Q is nearly 1: Q counts, though P is nothing in float32."""
    a, b = torch.tensor([[[0.0, -200.0, -100.0]] * 3]), torch.tensor([[[-100.0, -100.0, 0.0]] * 3])
    exact = (a.double().softmax(-1) * (a.double().log_softmax(-1) - b.double().log_softmax(-1))).sum(-1)
    assert run(a, b, torch.tensor([[0, 1, 2]])).columns["kl"] == pytest.approx([float(exact[0, 0])], rel=1e-6)


def test_masked_vocabulary_counts_as_zero() -> None:
    a, b = REFERENCE.clone(), VARIANT.clone()
    a[..., 0] = b[..., 0] = -torch.inf
    assert 0 < run(a, b, torch.ones(2, 3, dtype=torch.long)).scores["kl"] < 10


def test_a_token_the_variant_excludes_is_an_error_not_infinity() -> None:
    b = VARIANT.clone()
    b[1, 0, 2] = -torch.inf
    with pytest.raises(NumericalError, match="window 1"):
        run(REFERENCE, b)


def reference_artifact(folder: Path, windows: Tensor, budget_bytes: int) -> base.Result:
    (folder / "payload").mkdir(parents=True)
    result = divergence.run_reference(logits_of(table_model()), windows, 14, folder / "payload", budget_bytes)
    (folder / "record.json").write_text(json.dumps({"files": payload_files(folder)}))
    return result


@pytest.mark.parametrize("batch_tokens", [7, 21, 1000])
def test_stored_and_walked_references_give_the_same_scores(tmp_path: Path, batch_tokens: int) -> None:
    windows = torch.randint(11, (9, 7), generator=torch.Generator().manual_seed(0))
    own = reference_artifact(tmp_path / "reference", windows, 10**9)
    assert (own.scores["kl"], own.scores["top1_agreement"], own.scores["flips"]) == (0.0, 1.0, 0.0)
    variant = logits_of(table_model(seed=1))
    stored = divergence.stored(tmp_path / "reference", windows, batch_tokens)
    assert stored is not None
    from_file = divergence.run(stored, variant, windows, batch_tokens)
    walked = divergence.run(divergence.walk(logits_of(table_model()), windows, batch_tokens), variant, windows, batch_tokens)
    for name in divergence.METRICS:
        assert from_file.columns[name] == pytest.approx(walked.columns[name], abs=1e-6)
    assert from_file.scores["kl"] > 0.1


def test_budget_decides_to_the_byte_and_the_marker_says(tmp_path: Path) -> None:
    windows = torch.zeros(9, 7, dtype=torch.long)
    needed = 9 * 6 * 11 * 4
    reference_artifact(tmp_path / "fits", windows, needed)
    reference_artifact(tmp_path / "above", windows, needed - 1)
    kept = divergence.stored(tmp_path / "fits", windows, 7)
    assert kept is not None
    assert sum(part.nbytes for part in kept) == needed
    assert divergence.stored(tmp_path / "above", windows, 7) is None
    assert not (tmp_path / "above" / "payload" / divergence.STORED).exists()


def test_reference_of_other_windows_or_damaged_is_corrupt(tmp_path: Path) -> None:
    windows = torch.zeros(9, 7, dtype=torch.long)
    reference_artifact(tmp_path / "a", windows, 10**9)
    with pytest.raises(CorruptArtifactError, match="9 x 7"):
        divergence.stored(tmp_path / "a", windows[:4], 7)
    reference_artifact(tmp_path / "b", windows, 10**9)
    path = tmp_path / "b" / "payload" / divergence.STORED
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtifactError, match="differs"):
        divergence.stored(tmp_path / "b", windows, 7)
