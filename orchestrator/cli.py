"""The command line: `bitgrid VERB ...`. Verbs that plan take Hydra overrides; the others a sweep by key prefix or name.

Exit codes: 0 everything asked for is there; 1 some stages failed; 2 wrong input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator.errors import BitgridError, ConfigError, unknown_name
from orchestrator.output import lasting_output, lost
from orchestrator.places import denied_told

if TYPE_CHECKING:
    from orchestrator.command import Command

USAGE = """bitgrid VERB ...

  run [-m] [OVERRIDES]      run a cell, or with -m a grid: bitgrid run -m method=rtn,gptq scheme=w4a16_g64,w3a16_g64
  plan [-m] [OVERRIDES]     what that would do: stages, what is cached, estimates, what is skipped and why; runs nothing
  explain [-m] [OVERRIDES]  for every stage that would run, the field that makes it new
  status [SWEEP]            stages of a sweep by status, and its failures
  report [SWEEP]            the table, and one HTML page with CSV and Parquet beside it
  reconcile [SWEEP]         write MLflow anew from the store (all sweeps, when none is named); takes tracking=...
  resume [SWEEP]            run what a stopped sweep still lacks
  export SWEEP VARIANT      a quantized checkpoint for other tools: --format auto_gptq|dense --out FOLDER
  ui [SWEEP]                the MLflow dashboard on 127.0.0.1; takes tracking=...
  toolkit install NAME      the environment of another toolkit (hqq, llm_compressor, auto_round); `toolkit list` says what is there

SWEEP is a name or the start of a key; the latest when left out. Where the store is not ./bitgrid-store: BITGRID_STORE; or store=FOLDER
for run, plan and explain, --store FOLDER for verbs on a sweep.
`bitgrid VERB --help` tells more."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    with lasting_output() as output:
        code = _main(arguments)
        reason = lost(output)
        if reason is not None:
            print(f"bitgrid: not all could be written to standard output: {reason}", file=sys.stderr)
            code = code or int(not WORK.intersection(arguments[:1]))
    return code


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"bitgrid {version('bitgrid')}")
        return 0
    try:
        _refuse_surroundings()
        verb = VERBS.get(arguments[0])
        if verb is None:
            raise ConfigError(unknown_name("verb", arguments[0], VERBS))
        with denied_told():
            return verb(arguments[1:])
    except BitgridError as e:
        print(f"bitgrid: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bitgrid: interrupted", file=sys.stderr)
        return 130


def _refuse_surroundings() -> None:
    """Raises BitgridError where no verb can work."""
    try:
        os.getcwd()
    except OSError as e:
        raise BitgridError(f"the folder that this is called in cannot be read, as if it was removed ({e}); cd to one that is there") from e
    if sys.flags.optimize > 1:
        raise BitgridError("Python is to leave out docstrings, which transformers and Ray read; unset PYTHONOPTIMIZE, or leave out -OO")


def _run(arguments: list[str]) -> int:
    from orchestrator.app import run_command

    return run_command(arguments)


def _planning(arguments: list[str], verb: str) -> Command:
    """The command line of `bitgrid run`, with those of Hydra's flags that change what is composed."""
    from orchestrator.command import Command, read_flags, refuse_store_flag
    from orchestrator.config import help_text

    if any(a in ("-h", "--help") for a in arguments):
        print(f"bitgrid {verb} [-m] [--config-dir FOLDER] [--config-name NAME] [OVERRIDES]\n\n{help_text()}")
        raise SystemExit(0)
    refuse_store_flag(arguments)
    given, overrides = read_flags(f"bitgrid {verb}", arguments)
    unknown = [a for a in overrides if a.startswith("-")]
    if unknown:
        allowed = ("-m", "--multirun", "--config-dir", "--config-name", "--help")
        raise ConfigError(unknown_name(f"flag of bitgrid {verb}", unknown[0], allowed))
    return Command.of_flags(given, overrides)


def _plan(arguments: list[str]) -> int:
    from orchestrator.preview import print_plan

    print_plan(_planning(arguments, "plan"), Console())
    return 0


def _explain(arguments: list[str]) -> int:
    from orchestrator.preview import print_explanations

    print_explanations(_planning(arguments, "explain"), Console())
    return 0


def _parser(verb: str, about: str) -> argparse.ArgumentParser:
    from orchestrator.store import usual_place

    parser = argparse.ArgumentParser(prog=f"bitgrid {verb}", description=about)
    parser.add_argument("--store", type=Path, default=usual_place(), help="folder of the store")
    return parser


def _sweep_parser(verb: str, about: str, left_out: str = "the latest") -> argparse.ArgumentParser:
    parser = _parser(verb, about)
    parser.add_argument("sweep", nargs="?", help=f"name or start of the key; {left_out} when left out")
    return parser


def _status(arguments: list[str]) -> int:
    from orchestrator.verbs import status

    given = _sweep_parser("status", "Stages of a sweep by status.").parse_args(arguments)
    return status(given.store, given.sweep, Console())


def _report(arguments: list[str]) -> int:
    from orchestrator.verbs import report

    given = _sweep_parser("report", "The table, and one HTML page with CSV and Parquet beside it.").parse_args(arguments)
    return report(given.store, given.sweep, Console())


def _reconcile(arguments: list[str]) -> int:
    from orchestrator.verbs import reconcile

    about = "Write MLflow anew from the store; tracking=... and tracking.KEY=... say where."
    parser = _sweep_parser("reconcile", about, left_out="all sweeps")
    given, overrides = _with_tracking(parser, arguments)
    return reconcile(given.store, given.sweep, overrides, Console())


def _with_tracking(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What the parser knows, and overrides of the tracking group; a sweep's name may begin with that word."""
    overrides = [a for a in arguments if a.startswith(("tracking=", "tracking."))]
    return parser.parse_args([a for a in arguments if a not in overrides]), overrides


def _resume(arguments: list[str]) -> int:
    from orchestrator.verbs import resume

    given = _sweep_parser("resume", "Run what a stopped sweep still lacks.").parse_args(arguments)
    return resume(given.store, given.sweep, Console())


def _export(arguments: list[str]) -> int:
    from orchestrator.verbs import export

    parser = _parser("export", "Write a quantized checkpoint for other tools.")
    parser.add_argument("sweep", help="name or start of the key")
    parser.add_argument("variant", help="its label, start of its key, or words of the label: 'gptq w4a16_g64'")
    parser.add_argument("--format", default="auto_gptq", help="auto_gptq (default) or dense")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the checkpoint")
    given = parser.parse_args(arguments)
    return export(given.store, given.sweep, given.variant, given.format, given.out, Console())


def _ui(arguments: list[str]) -> int:
    from orchestrator.verbs import ui

    parser = _sweep_parser("ui", "The MLflow dashboard on 127.0.0.1; tracking=... and tracking.KEY=... say of which runs.")
    parser.add_argument("--port", type=int, default=5000)
    given, overrides = _with_tracking(parser, arguments)
    return ui(given.store, given.sweep, overrides, given.port, Console())


def _toolkit(arguments: list[str]) -> int:
    from orchestrator.lines import say
    from orchestrator.toolkits import FOLDER, describe, install
    from workers.toolkits.environments import TOOLKITS

    parser = argparse.ArgumentParser(prog="bitgrid toolkit", description="Environments of other toolkits, whose methods run in them.")
    parser.add_argument("action", choices=("install", "list"))
    parser.add_argument("name", nargs="?", help=f"{', '.join(TOOLKITS)}; for install")
    parser.add_argument("--dir", type=Path, default=Path(os.environ.get("BITGRID_TOOLKITS") or FOLDER), help="folder of the environments")
    parser.add_argument("--python", default=sys.executable, help="interpreter to make it with; this one when left out")
    given = parser.parse_args(arguments)
    if given.name is None and given.action == "install":
        raise ConfigError(f"which toolkit? `bitgrid toolkit install NAME`, with one of {', '.join(TOOLKITS)}")
    if given.name is not None and given.name not in TOOLKITS:
        raise ConfigError(unknown_name("toolkit", given.name, TOOLKITS))
    console = Console()
    if given.action == "install":
        install(given.name, given.dir, given.python, console)
    for toolkit in TOOLKITS.values():
        if given.name in (None, toolkit.name):
            say(console, describe(toolkit, given.dir))
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "plan": _plan,
    "explain": _explain,
    "status": _status,
    "report": _report,
    "reconcile": _reconcile,
    "resume": _resume,
    "export": _export,
    "ui": _ui,
    "toolkit": _toolkit,
}
WORK = frozenset({"run", "resume", "reconcile", "export", "ui", "toolkit"})
"""Verbs that do more than say something."""


if __name__ == "__main__":
    sys.exit(main())
