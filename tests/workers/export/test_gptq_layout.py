"""The AutoGPTQ layout: every bit where the format has it, and a reason for what it cannot hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from workers.export.gptq_layout import pack, pack_rows, unholdable


def stream(column: np.ndarray, bits: int) -> list[int]:
    """The values of a packed column, read one bit at a time from the little-endian byte stream."""
    raw = np.unpackbits(column.astype("<i4").view(np.uint8), bitorder="little")
    return [int(sum(int(b) << i for i, b in enumerate(raw[p : p + bits]))) for p in range(0, len(raw), bits)]


def example(bits: int, n: int = 64, k: int = 96, groups: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, groups).add(0.01).to(torch.float16)
    zero = torch.randint(1, 2**bits, (n, groups))
    return codes, scale, zero, torch.randint(0, groups, (k,))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_column_is_one_bit_stream(bits: int) -> None:
    values = torch.randint(0, 2**bits, (96, 5), generator=torch.Generator().manual_seed(0))
    packed = pack_rows(values, bits)
    assert packed.shape == (96 * bits // 32, 5)
    assert packed.dtype == torch.int32
    for c in range(5):
        assert stream(packed[:, c].numpy(), bits) == values[:, c].tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacked_codes_zeros_and_scales_give_the_weight_back(bits: int) -> None:
    codes, scale, zero, g_idx = example(bits)
    packed = pack(bits, codes, scale, zero, g_idx)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in packed.items()} == {
        "qweight": (torch.int32, (96 * bits // 32, 64)),
        "qzeros": (torch.int32, (3, 64 * bits // 32)),
        "scales": (torch.float16, (3, 64)),
        "g_idx": (torch.int32, (96,)),
    }
    for n in range(64):
        assert stream(packed["qweight"][:, n].numpy(), bits) == codes[n].tolist()
    for g in range(3):
        assert stream(packed["qzeros"][g].numpy(), bits) == (zero[:, g] - 1).tolist()
    assert torch.equal(packed["scales"].T, scale)
    assert torch.equal(packed["g_idx"], g_idx.to(torch.int32))


def test_what_the_format_cannot_hold_is_named() -> None:
    codes, scale, zero, _ = example(4)

    def why(bits: int, codes: Tensor, scale: Tensor, zero: Tensor) -> str:
        return str(unholdable(bits, codes, scale, zero, act_order=False))

    assert why(4, codes, scale, zero) == "None"
    assert why(8, codes, scale, torch.full_like(zero, 255).to(torch.uint8)) == "None"
    assert "5 bits" in why(5, codes, scale, zero)
    assert "172 inputs" in why(4, torch.zeros(64, 172), scale, zero)
    assert "48 outputs" in why(4, codes[:48], scale[:48], zero[:48])
    assert "floating-point" in why(4, codes, scale, zero + 0.5)
    assert "float16" in why(4, codes, scale.double() + 1e-9, zero)
    assert "positive" in why(4, codes, scale * 0, zero)


@pytest.mark.parametrize(
    ("bits", "act_order", "lowest"), [(2, False, 0), (4, False, 0), (8, False, 0), (3, False, 1), (2, True, 1), (4, True, 1), (8, True, 1)]
)
def test_zero_points_reach_as_far_as_auto_gptq_reads_them(bits: int, act_order: bool, lowest: int) -> None:
    codes, scale, zero, _ = example(bits)
    for value in (lowest, 2**bits - 1):
        zero[3, 1] = value
        assert unholdable(bits, codes, scale, zero, act_order=act_order) is None
    for value in (lowest - 1, 2**bits):
        zero[3, 1] = value
        assert f"1 of {zero.numel()} zero points outside {lowest} .. {2**bits - 1}" in str(
            unholdable(bits, codes, scale, zero, act_order=act_order)
        )


def test_a_zero_point_of_0_wraps() -> None:
    codes, scale, zero, g_idx = example(4)
    zero[5, 2] = 0
    assert stream(pack(4, codes, scale, zero, g_idx)["qzeros"][2].numpy(), 4)[5] == 15
