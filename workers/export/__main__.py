"""python -m workers.export --format auto_gptq --artifact FOLDER --model FOLDER --out FOLDER

Says what was written and exits 0 (`--json`: the report as one JSON object); exits 2 with the reason on stderr when the export is
refused. SIGTERM ends it, and nothing of what it has begun is left.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from workers.artifact import CorruptArtifactError
from workers.checkpoint import locate
from workers.errors import WorkerError
from workers.export import FORMATS, check_format, run
from workers.request import Location


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workers.export", description="Write a quantized model in another tool's format.")
    parser.add_argument("--format", required=True, help=" or ".join(FORMATS))
    parser.add_argument("--artifact", required=True, type=Path, help="folder of the quantize stage (holds record.json)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder of the unquantized model")
    source.add_argument("--hub-model", help="its hub id, with --revision")
    parser.add_argument("--revision", help="commit of the hub model")
    parser.add_argument("--out", required=True, type=Path, help="new folder to write")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    given = parser.parse_args(arguments)
    location = Location("folder", given.model) if given.model else Location("hub_model", given.hub_model, given.revision)
    try:
        check_format(given.format)  # before a model of the hub is fetched
        report = run(given.format, given.artifact, locate(location), given.out)
    except WorkerError as e:
        print(e, file=sys.stderr)
        return 2
    except CorruptArtifactError as e:
        print(f"{e}; remove {given.artifact} and run the sweep again (`bitgrid resume`), which makes it anew", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(asdict(report)))
    else:
        print(f"{report.format}: {report.linears} quantized linears, {report.bytes / 1e6:.1f} MB in {report.out}")
        for note in report.notes:
            print(f"note: {note}")
    return 0


def program(arguments: list[str] | None = None) -> NoReturn:
    """`main` as a process of its own."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    sys.exit(main(arguments))


if __name__ == "__main__":
    program()
