"""An environment of a toolkit that is not there: a folder like a virtual environment's, whose package is a stand-in written here.

Its Python is this one, called through a script, and its `hqq` rounds to nearest between minimum and maximum, in the shapes of the
real package.
"""

from __future__ import annotations

import sys
from pathlib import Path

HQQ_RELEASE = "0.2.8.post1"
QUANTIZER = """
class Quantizer:
    @classmethod
    def quantize(cls, tensor, *, nbits, channel_wise, group_size, optimize, round_zero, axis, bitpack, compute_dtype, device):
        assert channel_wise and axis == 1 and not bitpack
        rows = tensor.float().reshape(-1, group_size or tensor.shape[1])
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        scale = (high - low) / (2**nbits - 1)
        zero = -low / scale
        return (rows / scale + zero).round().clamp(0, 2**nbits - 1), {"scale": scale, "zero": zero}


class HQQLinear:
    pass  # transformers 5.20 imports it wherever there is an hqq
"""


def fake_hqq(parent: Path, release: str = HQQ_RELEASE, script: str | None = None) -> Path:
    """The environment `hqq` in `parent`. `script`: shell lines in the place of its Python."""
    folder = parent / "hqq"
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    about = site / f"hqq-{release}.dist-info"
    core = site / "hqq" / "core"
    for path in (folder / "bin", about, core):
        path.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: hqq\nVersion: {release}\n")
    for package in (core.parent, core):
        (package / "__init__.py").write_text("")
    (core / "quantize.py").write_text(QUANTIZER)
    python = folder / "bin" / "python"
    lines = script or f'exec env PYTHONPATH="{site}" "{sys.executable}" "$@"'
    python.write_text(f"#!/bin/sh\n{lines}\n")
    python.chmod(0o755)
    return folder
