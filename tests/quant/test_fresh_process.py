"""A stored tensor has the same values in another process, whatever its threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from quant import quantize_linear

CODE = """
import sys
import torch
from quant.tensors import unpack
torch.set_num_threads(int(sys.argv[2]))
stored = torch.load(sys.argv[1] + "/stored.pt")
torch.save({name: unpack(*packed).dequantize() for name, packed in stored.items()}, sys.argv[1] + "/values.pt")
"""


def test_values_are_bit_equal_in_a_fresh_process_with_other_threads(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(3)
    w, x = torch.randn(60, 96, generator=g), torch.randn(4, 64, 96, generator=g)
    made = {
        "affine": quantize_linear(w, method="gptq", bits=3, group_size=12, act_order=True, inputs=x),
        "codebook": quantize_linear(w, method="claq", bits=2, inputs=x),
        "binary": quantize_linear(w, method="billm", bits=1, inputs=x),
        "incoherent": quantize_linear(w, method="quip", bits=3, inputs=x),
        "lattice": quantize_linear(w, method="quip_sharp", bits=3, inputs=x, tune_iters=0),
    }
    assert {name: t.format for name, t in made.items()} == {name: name for name in made}
    torch.save({name: (t.format, t.pack(), t.meta()) for name, t in made.items()}, tmp_path / "stored.pt")
    threads = "2" if torch.get_num_threads() == 1 else "1"
    subprocess.run([sys.executable, "-c", CODE, tmp_path, threads], check=True, cwd=Path(__file__).resolve().parents[2], timeout=120)
    fresh: dict[str, Tensor] = torch.load(tmp_path / "values.pt")
    assert all(torch.equal(fresh[name], t.dequantize()) for name, t in made.items())
