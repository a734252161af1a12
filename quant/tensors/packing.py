"""Codes of 1 to 8 bits as a dense little-endian bit stream: eight codes of b bits fill exactly b bytes. And types of other integers."""

from __future__ import annotations

import torch
from torch import Tensor


def narrowest(largest: int) -> torch.dtype:
    """Type in which integers 0 .. `largest` are stored whole."""
    return torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Integers in 0 .. 2^bits - 1, any shape ▸ uint8 `[ceil(numel · bits / 8)]`, row-major, lowest bit first."""
    flat = codes.reshape(-1).to(torch.uint8)
    if bits == 8:
        return flat.clone()
    length = (flat.numel() * bits + 7) // 8
    if 8 % bits == 0:  # no code lies in two bytes
        each = 8 // bits
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % each)).view(-1, each)
        byte = flat[:, 0].clone()
        for i in range(1, each):
            byte |= flat[:, i] << (bits * i)
        return byte
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    # At most 7 · 8 = 56 bits: no sign trouble in int64.
    word = torch.zeros(flat.shape[0], dtype=torch.int64, device=flat.device)
    for i in range(8):
        word |= flat[:, i].long() << (bits * i)
    return torch.stack([(word >> (8 * i) & 255).to(torch.uint8) for i in range(bits)], dim=1).reshape(-1)[:length].clone()


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: uint8 `[count]`."""
    length = (count * bits + 7) // 8
    if stream.dtype is not torch.uint8 or stream.numel() != length:
        raise ValueError(f"{count} codes of {bits} bits take {length} bytes; got {stream.numel()} values of {stream.dtype}")
    if bits == 8:
        return stream.clone()
    mask = 2**bits - 1
    if 8 % bits == 0:
        return torch.stack([stream >> (bits * i) & mask for i in range(8 // bits)], dim=1).reshape(-1)[:count].clone()
    rows = torch.nn.functional.pad(stream, (0, -length % bits)).view(-1, bits)
    word = torch.zeros(rows.shape[0], dtype=torch.int64, device=stream.device)
    for i in range(bits):
        word |= rows[:, i].long() << (8 * i)
    return torch.stack([(word >> (bits * i) & mask).to(torch.uint8) for i in range(8)], dim=1).reshape(-1)[:count].clone()
