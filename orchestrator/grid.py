"""conf/*.yaml ▸ cells: compose a whole grid at once.

One Hydra compose makes the base. Options are loaded once each and cells are tuples of shared options
(`grid_options`); where an option reaches outside its own package, every cell goes through Hydra's compose instead, with the
same result and a note that says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from orchestrator.cell import AXES, Cell, Grid
from orchestrator.config import check_override, refuse_unknown_roots, resolved_settings, settings_of
from orchestrator.errors import ConfigError, SearchError
from orchestrator.grid_axes import (
    Choice,
    Request,
    axis_of,
    choices,
    common,
    dimensions,
    narrowed,
    read_overrides,
    swept_keys,
    varied_keys,
    zipped,
)
from orchestrator.grid_options import OptionLoader, OptionTable, ReachesOutside, plain_values, reaches_in
from orchestrator.grid_rules import Rules, apply_rules, extra_dimensions, read_rules, unzipped_conflicts
from orchestrator.grid_search import check_search
from orchestrator.hydra_bridge import Base, Composer, as_config_error, override_text, plain_key

Row = tuple[Choice, ...]
"""One choice per axis, in the order of AXES."""
RUN_ALL = ("BitgridSweeper", "BasicSweeper")
"""Classes of sweepers that run every cell of a grid. Others choose cells while they run."""


def compose_grid(overrides: Sequence[str], *, config_dir: str | None = None, config_name: str = "config", multirun: bool) -> Grid:
    """The grid of a command line.

    `config_dir` is searched after the shipped `conf`. Without `multirun` the grid has one cell. Raises ConfigError for
    anything that does not exist or is not allowed, before any cell is made.
    """
    return compose_with(Composer.at(config_dir=config_dir, config_name=config_name), overrides, multirun=multirun)


def compose_with(composer: Composer, overrides: Sequence[str], *, multirun: bool) -> Grid:
    """`compose_grid` with a composer at hand. Raises SearchError, with settings in order, where the sweeper is to choose the cells."""
    request = read_overrides(composer, overrides, multirun=multirun)
    root = _Root.of(composer, request)
    if multirun:
        _refuse_idle(root.base, request)
        _refuse_idle_rules(root)
        _refuse_storage(root.base)
        _refuse_search(composer, root, request)
    rules = read_rules(composer, root.plain["sweep"] if isinstance(root.plain.get("sweep"), Mapping) else {})
    axes = dict(request.axes)
    given = set(axes)
    params = _sweeper_params(root.base)
    if not multirun:
        if params or rules.zips or rules.extra:
            raise ConfigError(f"sweep={root.base.choices.get('sweep')} is a grid of several cells: add -m (bitgrid run -m ...)")
    elif params:
        axes = _with_params(composer, params, request)
    rows, extra = _rows(axes, given, rules, root.defaults)
    product_cells, extra_cells, notes = _cells(composer, root, rows, extra)
    rule_notes: list[str] = []
    excluded: list[tuple[Cell, str]] = []
    if multirun:
        narrowed_axes = set() if _rules_from_command_line(request) else {a for o in request.axes.values() if (a := axis_of(o))}
        product_cells, excluded, rule_notes = apply_rules(rules, product_cells, narrowed_axes)
    cells = tuple(dict.fromkeys([*product_cells, *extra_cells]))
    if not cells:
        raise ConfigError(
            f"the rules of sweep={root.base.choices.get('sweep')} leave no cell of {len(excluded)}; loosen sweep.exclude or only_if"
        )
    return Grid(cells, root.plain, tuple(excluded), (*notes, *rule_notes), common(request))


def compose_jobs(composer: Composer, jobs: Sequence[Sequence[str]], asked: Sequence[str] = ()) -> tuple[Grid, list[Cell]]:
    """The grid of a launcher's jobs, each a full list of overrides for one cell, and the cell of each job. `asked`: the command line
    behind all launches of the sweeper.

    Equal jobs share a cell. What was asked to vary is swept, and stands in the names of options, and so is what differs between jobs.
    Settings must be the same in every job. Rules of a named sweep are for bitgrid's own sweeper; a note says so where there are some.
    """
    roots: dict[tuple[str, ...], _Root] = {}
    rows: list[Row] = []
    requests = [read_overrides(composer, job, multirun=False) for job in jobs]
    varied = varied_keys(requests) | swept_keys(composer, asked)
    for request in requests:
        outside = tuple(str(o.input_line) for o in (*request.groups, *request.settings))
        if outside not in roots:
            roots[outside] = _Root.of(composer, request)
            varied |= swept_keys(composer, _lines(_sweeper_params(roots[outside].base)))
        rows.append(next(choices(dimensions(request.axes, varied), roots[outside].defaults)))
    settings = [r.plain for r in roots.values()]
    if any(s != settings[0] for s in settings):
        raise ConfigError("jobs of one launch differ in settings of the sweep (cluster, tracking, store, folders); these cannot be swept")
    root = next(iter(roots.values()))
    cells, _, notes = _cells(composer, root, rows, [])
    idle = _rules_given(root)
    if idle:
        notes = (*notes, f"{idle} had no effect: the sweeper in use chose the cells; hydra/sweeper=bitgrid applies rules")
    return Grid(tuple(dict.fromkeys(cells)), root.plain, (), notes, common(requests[0], varied)), cells


@dataclass(frozen=True)
class _Root:
    """The composed base and its settings."""

    base: Base
    settings: DictConfig
    plain: dict[str, Any]
    defaults: dict[str, str]
    """Axis ▸ option of the defaults list."""
    lines: list[str]
    """Overrides of the settings, for Hydra's own compose."""

    @classmethod
    def of(cls, composer: Composer, request: Request) -> _Root:
        base = composer.base(request.groups)
        refuse_unknown_roots(composer, base)
        missing = [axis for axis in AXES if axis not in base.choices]
        if missing:
            raise ConfigError(
                f"the defaults list of {composer.config_name}.yaml has no {', '.join(missing)}; every axis needs a default option"
            )
        settings = settings_of(base, request.settings)
        lines = [str(o.input_line) for o in (*request.groups, *request.settings)]
        return cls(base, settings, resolved_settings(settings), {axis: base.choices[axis] for axis in AXES}, lines)


def _sweeper_params(base: Base) -> dict[str, str]:
    params = OmegaConf.select(base.config, "hydra.sweeper.params")
    return {} if params is None else {str(k): v if isinstance(v, str) else override_text(_container(v)) for k, v in params.items()}


def _lines(params: Mapping[str, str]) -> list[str]:
    return [f"{k}={v}" for k, v in params.items()]


def _plugin(base: Base, kind: str) -> str:
    """Name of the class that is the sweeper or launcher."""
    return str(OmegaConf.select(base.config, f"hydra.{kind}._target_")).rpartition(".")[2]


def _refuse_idle(base: Base, request: Request) -> None:
    """Settings of Hydra's that a user would take for settings of the sweep."""
    sweeper, launcher = _plugin(base, "sweeper"), _plugin(base, "launcher")
    for override in request.groups:
        key = plain_key(override)
        if key.startswith("hydra.launcher.") and launcher == "BitgridLauncher":
            told = "it is for the jobs of other programs; cells run as cluster= says: cluster.slots, cluster.threads, cluster.address"
        elif key == "hydra/launcher" and launcher != "BitgridLauncher" and sweeper == "BitgridSweeper":
            told = "hydra/sweeper=bitgrid launches nothing; cells run as cluster= says, or give hydra/sweeper=basic too"
        elif key == "hydra.sweeper.max_batch_size" and sweeper == "BitgridSweeper":
            told = "all cells are one graph of stages; give hydra/sweeper=basic too for launches of so many cells"
        else:
            continue
        raise ConfigError(f"{override.input_line} would have no effect: {told}")


def _refuse_idle_rules(root: _Root) -> None:
    """Other sweepers than bitgrid's run another grid than the rules leave."""
    idle = _rules_given(root)
    if idle and _plugin(root.base, "sweeper") not in ("BitgridSweeper", "None"):
        named = root.base.choices.get("sweep")
        whose = "" if named in (None, "none") else f" of sweep={named}"
        raise ConfigError(
            f"{idle}{whose} would have no effect: "
            f"hydra/sweeper={root.base.choices.get('hydra/sweeper')} chooses the cells, and only hydra/sweeper=bitgrid applies rules; "
            "use that one, or take the rules out"
        )


def _rules_given(root: _Root) -> str:
    """`sweep.exclude, sweep.zip`."""
    return ", ".join(f"sweep.{k}" for k in ("exclude", "only_if", "zip", "extra") if (root.plain.get("sweep") or {}).get(k))


def _refuse_storage(base: Base) -> None:
    """Optuna 2 does not find what it has just written to a database through SQLAlchemy 2, and ends in an assertion."""
    storage = OmegaConf.select(base.config, "hydra.sweeper.storage")
    if _plugin(base, "sweeper") != "OptunaSweeper" or not isinstance(storage, str) or storage.startswith("redis"):
        return
    versions = {name: metadata.version(name) for name in ("optuna", "sqlalchemy")}
    if versions["optuna"].startswith("2.") and not versions["sqlalchemy"].startswith("1."):
        raise ConfigError(
            f"hydra.sweeper.storage={storage}: Optuna {versions['optuna']} cannot use a database through SQLAlchemy "
            f"{versions['sqlalchemy']}, which MLflow needs; leave it out: the same command with a hydra.sweeper.sampler.seed= "
            "takes from the store what ran before"
        )


def _refuse_search(composer: Composer, root: _Root, request: Request) -> None:
    if _plugin(root.base, "sweeper") in (*RUN_ALL, "None"):
        return
    axes = {**read_overrides(composer, _lines(_sweeper_params(root.base)), multirun=True).axes, **request.axes}
    check_search(root.base.config, axes, root.defaults, lambda row: _cells(composer, root, [row], [])[0][0])
    raise SearchError(
        f"hydra/sweeper={root.base.choices.get('hydra/sweeper')} chooses cells while it runs, by the scores of earlier ones: there is no "
        "grid to show before; start it with `bitgrid run -m`, or leave the sweeper out for a grid"
    )


def _container(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _with_params(composer: Composer, params: Mapping[str, str], request: Request) -> dict[str, Any]:
    """`hydra.sweeper.params` of the sweep's yaml, then the command line, which wins key by key."""
    from_yaml = read_overrides(composer, _lines(params), multirun=True)
    for override in (*from_yaml.groups, *from_yaml.settings):
        raise ConfigError(f"hydra.sweeper.params: {override.input_line} is a setting of the whole sweep; set it in the sweep's yaml itself")
    return {**from_yaml.axes, **request.axes}


def _rules_from_command_line(request: Request) -> bool:
    return any(o.key_or_group.startswith("sweep.") for o in request.settings)


def _rows(axes: Mapping[str, Any], given: set[str], rules: Rules, defaults: Mapping[str, str]) -> tuple[Iterable[Row], list[Row]]:
    """The product with its zips, and the extra cells."""
    unzipped_conflicts(rules.zips)
    keys = {k for row in rules.zips for k in row}
    for key in keys & (set(axes) - given):
        raise ConfigError(f"{key} is in both hydra.sweeper.params and sweep.zip; keep one")
    dims = [zipped(row, {k: axes[k] for k in given if k in row}) for row in rules.zips]
    dims += dimensions({k: o for k, o in axes.items() if k not in keys})
    extra = [r for row in rules.extra for r in choices([*narrowed(dims, row), *extra_dimensions(row)], defaults)]
    return choices(dims, defaults), extra


def _cells(composer: Composer, root: _Root, rows: Iterable[Row], extra: Sequence[Row]) -> tuple[list[Cell], list[Cell], tuple[str, ...]]:
    """Cells of the rows and of the extra rows, by the fast way where it gives what Hydra would."""
    table = OptionTable()
    rows = list(rows)
    reason = reaches_in(composer, root.base)
    if reason is None:
        loader = OptionLoader(composer, root.settings, table)
        try:
            return [_fast_cell(loader, r) for r in rows], [_fast_cell(loader, r) for r in extra], ()
        except ReachesOutside as outside:
            reason = str(outside)
    note = f"every cell was composed by Hydra itself, which is slow: {reason}"
    slow = _SlowComposer(composer, root, table)
    made = {r: slow.cell(r) for r in dict.fromkeys([*rows, *extra])}
    return [made[r] for r in rows], [made[r] for r in extra], (note,)


def _fast_cell(loader: OptionLoader, row: Row) -> Cell:
    return Cell(*map(loader.option, row))


class _SlowComposer:
    """Cells by Hydra's own compose."""

    def __init__(self, composer: Composer, root: _Root, table: OptionTable) -> None:
        self._composer = composer
        self._root = root
        self._table = table
        self._unchanged: dict[tuple[str, ...], DictConfig] = {}

    def cell(self, row: Row) -> Cell:
        self._check_changes(row)
        config = self._compose(line for choice in row for line in choice.lines)
        options = [self._table.add(c, self._values(config, c)) for c in row]
        plain = resolved_settings(OmegaConf.masked_copy(config, [str(k) for k in config if k not in AXES]))
        if plain != self._root.plain:
            changed = sorted(k for k in {*plain, *self._root.plain} if plain.get(k) != self._root.plain.get(k))
            what = " ".join(line for choice in row for line in choice.lines)
            raise ConfigError(
                f"{what}: an option changes {', '.join(changed)}, which belongs to the whole sweep; set it on the command line"
            )
        return Cell(*options)

    def _values(self, config: DictConfig, choice: Choice) -> dict[str, Any]:
        try:
            return plain_values(config, choice.axis, choice.file)
        except InterpolationResolutionError as error:
            said = str(error).splitlines()[0]
            raise ConfigError(f"{choice.axis}={choice.file}: {error.full_key}: {said}; name a key of an axis or a setting") from error

    def _check_changes(self, row: Row) -> None:
        """Keys and types of value overrides, against the composition without them."""
        before = tuple(line for choice in row for line in choice.group_lines)
        if before not in self._unchanged:
            self._unchanged[before] = self._compose(before)
        for choice in row:
            for change in choice.changes:
                if not change.is_group:
                    check_override(self._unchanged[before], change.override, f"{choice.axis} {choice.file}")

    def _compose(self, lines: Iterable[str]) -> DictConfig:
        lines = list(lines)
        with as_config_error(" ".join(lines)):
            return self._composer.compose([*self._root.lines, *lines])
