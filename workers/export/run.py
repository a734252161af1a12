"""One entry for every export format: checks the target, writes beside it, moves it into place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from workers.artifact import rename_flushed, share
from workers.export import auto_gptq, dense
from workers.export.model import read_quantized
from workers.export.report import ExportError, ExportReport, folder_bytes

Writer = Callable[[Path, Path, Path], tuple[int, list[str]]]


def run(format: str, artifact: Path, model_folder: Path, out: Path) -> ExportReport:
    """Write a quantize artifact in a format of `FORMATS` as the new folder `out`.

    Args:
        artifact: folder of the committed quantize stage (record.json, payload/).
        model_folder: the unquantized model it was made from.

    Raises ExportError where the format cannot hold the model or `out` cannot be written, InputError, CorruptArtifactError; then `out` is
    not made.
    """
    check_format(format)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not an empty folder; give a new one")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".export-", dir=out.parent))
    except OSError as e:
        raise ExportError(f"no folder can be made in {out.parent}: {e}; give --out a folder that can be written") from e
    try:
        linears, notes = FORMATS[format](artifact, model_folder, staging)
        share(staging)
        if out.exists():
            out.rmdir()
        rename_flushed(staging, out)
    except (OSError, SafetensorError) as e:
        raise ExportError(f"{out} was not written: {e}; put that right, or give --out a new folder elsewhere") from e
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ExportReport(format, str(out), linears, folder_bytes(out), tuple(notes))


def check_format(format: str) -> None:
    """Raises ExportError for a name that is none of `FORMATS`."""
    if format not in FORMATS:
        raise ExportError(f"unknown export format {format!r}; allowed: {', '.join(FORMATS)}")


def _auto_gptq(artifact: Path, model_folder: Path, staging: Path) -> tuple[int, list[str]]:
    model = read_quantized(artifact, model_folder)
    return len(model.linears), auto_gptq.write(model, staging)


FORMATS: dict[str, Writer] = {"auto_gptq": _auto_gptq, "dense": dense.write}
