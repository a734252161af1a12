"""Build the C++ libraries of quant/csrc, so that no first use waits for the compiler; without one, torch does their work.

python scripts/build_libraries.py
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from quant.kernels.native import SOURCES, NoLibrary, library


def main() -> None:
    # The largest first: they take as long as all others together.
    names = [p.stem for p in sorted(SOURCES.glob("*.cpp"), key=lambda p: -p.stat().st_size)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        reasons = {str(found) for found in threads.map(library, names) if isinstance(found, NoLibrary)}
    for reason in sorted(reasons):
        print(f"  {reason}")


if __name__ == "__main__":
    main()
