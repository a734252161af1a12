"""Build the C++ libraries of quant/csrc, so that no first use waits for the compiler; without one, torch does their work. And the CUDA
sources that tests run on the host.

python scripts/build_libraries.py
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quant.kernels.native import SOURCES, NoLibrary, library
from tests.quant.cuda_on_host import EMULATED, emulated


def main() -> None:
    # The largest first: they take as long as all others together.
    names = [p.stem for p in sorted(SOURCES.glob("*.cpp"), key=lambda p: -p.stat().st_size)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        others = [threads.submit(emulated, name) for name in EMULATED]
        reasons = {str(found) for found in threads.map(library, names) if isinstance(found, NoLibrary)}
    reasons |= {str(e) for done in others if (e := done.exception()) is not None and not isinstance(e, pytest.skip.Exception)}
    for reason in sorted(reasons):
        print(f"  {reason}")


if __name__ == "__main__":
    main()
