"""Plugin of pytest for processes whose C++ is built with a sanitizer (`test_sanitized.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quant.kernels import native

_built = native.kept_library


def _or_ends(source: Path, *given: Any) -> Path:
    """Without its library a test would be skipped."""
    try:
        return _built(source, *given)
    except Exception as e:
        pytest.exit(f"{source.name} was not built: {e}", returncode=1)


native.kept_library = _or_ends
native.LONGEST = 3600  # seconds: such libraries take some ten times as long to compile
torch.get_num_threads = lambda: 4  # of the C++ twins; torch itself keeps to what OMP_NUM_THREADS says
