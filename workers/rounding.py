"""One block of the quantize stage: transforms on its scale groups, then the rounding of every linear."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from quant import methods
from quant.errors import NonFiniteError, SingularHessianError
from quant.methods.base import Linear, ModelTransform, Rounded, Rounding, ScaleGroup, Shifts, Transform
from quant.methods.registry import MODEL_TRANSFORMS, TOOLKIT_METHODS, TUNERS
from quant.methods.toolkits import ToolkitMethod
from quant.methods.tuner import BlockTuner
from quant.parameters import undivided
from quant.scheme import ActivationScheme, WeightScheme
from quant.statistics import KINDS, Statistics
from workers.aside import aside
from workers.capture import BlockStatistics
from workers.errors import InputError, NumericalError
from workers.fold import BlockWeights
from workers.reassemble import OTHERS, REASSEMBLED, reassemble
from workers.rounding_errors import Errors, in_quadratic_form, size
from workers.scaling import GroupForward
from workers.specs import Component, Rule
from workers.structure import LinearShape, ScaleRule, Structure

UNREACHED = "no calibration token reached it"


@dataclass(frozen=True)
class Method:
    """A rule with its transforms and its rounding or tuner made."""

    rule: Rule
    by: Rounding | BlockTuner
    transforms: tuple[Transform, ...]
    """Of groups of linears, in order."""
    whole: ModelTransform | None = None
    """Of the whole model, before all others."""

    @property
    def rounding(self) -> Rounding:
        assert self.tuner is None
        return cast(Rounding, self.by)

    @property
    def tuner(self) -> BlockTuner | None:
        return cast(BlockTuner, self.by) if self.by.name in TUNERS else None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(part.needs for part in self.parts))

    @property
    def parts(self) -> tuple[ModelTransform | Transform | Rounding | BlockTuner, ...]:
        return (*((self.whole,) if self.whole is not None else ()), *self.transforms, self.by)

    @property
    def scheme(self) -> WeightScheme:
        return self.rule.weight

    @property
    def sequential(self) -> bool:
        """Linears of a block see the already quantized ones before them (true-sequential)."""
        return bool(getattr(self.by, "true_sequential", False))


def make_methods(rules: tuple[Rule, ...]) -> tuple[Method, ...]:
    """Raises InputError for unknown names or parameters, and for transforms of the whole model that do not come first or that not
    all rules share."""
    made = tuple(_make_method(r) for r in rules)
    wholes = {r.method.transforms[:1] if m.whole is not None else () for r, m in zip(rules, made, strict=True)}
    if len(wholes) > 1:
        names = sorted({m.whole.name if m.whole is not None else "none" for m in made})
        raise InputError(f"a transform of the whole model must be the same in all rules; got {', '.join(names)} with different parameters")
    return made


def _make_method(rule: Rule) -> Method:
    first, rest = rule.method.transforms[:1], rule.method.transforms[1:]
    if not first or first[0].name not in MODEL_TRANSFORMS:
        first, rest = (), rule.method.transforms
    late = next((t.name for t in rest if t.name in MODEL_TRANSFORMS), None)
    if late is not None:
        raise InputError(
            f"{late} rewrites the whole model: it must be the first transform; got {', '.join(t.name for t in rule.method.transforms)}"
        )
    whole = _make(methods.model_transform, first[0]) if first else None
    factory = methods.toolkit_method if rule.method.rounding.name in TOOLKIT_METHODS else methods.rounding_or_tuner
    return Method(rule, _make(factory, rule.method.rounding), tuple(_make(methods.transform, t) for t in rest), whole)


def _make(factory: Callable[..., Any], component: Component) -> Any:
    with translated(component.name):
        return factory(component.name, dict(component.params), version=component.version)


def toolkit_of(made: tuple[Method, ...]) -> ToolkitMethod | None:
    """Of the first rule that another toolkit carries out."""
    return next((cast(ToolkitMethod, m.by) for m in made if m.by.name in TOOLKIT_METHODS), None)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Errors of the quantization code ▸ errors the driver knows how to answer."""
    try:
        yield
    except (NonFiniteError, SingularHessianError) as e:
        raise NumericalError(f"{what}: {e}") from e
    except ValueError as e:
        raise InputError(f"{what}: {e}") from e


def method_for(made: tuple[Method, ...], name: str) -> Method | None:
    """Of the last rule whose pattern matches the linear's full name."""
    return next((m for m in reversed(made) if fnmatchcase(name, m.rule.pattern)), None)


def check_shapes(shapes: tuple[LinearShape, ...], made: tuple[Method, ...], family: str) -> None:
    """Raises InputError for a scheme or family that a method does not support, and for linears that it cannot cut into groups."""
    for method in made:
        for part in method.parts:
            reason = part.supports.refuses(part.name, method.scheme, family)
            if reason is not None:
                raise InputError(reason)
    for shape in shapes:
        own = method_for(made, shape.name)
        if own is None:
            continue
        size, spec = own.scheme.group_size, own.rule.method
        components = zip((*spec.transforms, spec.rounding), own.parts, strict=True)
        found = undivided(((c.name, dict(c.params), part.supports) for c, part in components), size, shape.rows, shape.cols)
        if found is None:
            continue
        if size is None or shape.cols % size == 0 or found[2] != "inputs":
            raise InputError(f"{shape.name}: {found[0]} {found[1]} {found[2]}")
        fitting = [d for d in range(8, shape.cols + 1) if shape.cols % d == 0]
        raise InputError(
            f"group_size={size} does not divide the {shape.cols} inputs of {shape.name}; "
            f"divisors are {', '.join(map(str, fitting[:8]))}; or use granularity channel"
        )


@dataclass
class LinearResult:
    """One row of layers.parquet, and the stored tensor."""

    name: str
    rounded: Rounded
    errors: Errors
    seconds: float
    notes: list[str] = field(default_factory=list)
    lacks_rank: bool = False
    """Of a factored Hessian: fewer tokens reached the linear than it has inputs."""


@dataclass
class BlockQuantizer:
    """Works on one block, whose modules hold the current weights after every step."""

    index: int
    block: nn.Module
    structure: Structure
    methods: Mapping[str, Method]
    """Linear (relative name) ▸ method; linears without one are left alone."""
    weights: BlockWeights
    statistics: dict[str, Statistics]
    """Site (relative name) ▸ statistics of its input, in the scaled block's terms."""
    tokens: dict[str, int]
    forward: GroupForward
    left_alone: dict[tuple[str, str, str], int]
    """(transform, group, reason) ▸ blocks: filled here."""
    worked: set[str]
    """Transforms that changed something: filled here."""
    seed: int = 0
    activation: ActivationScheme | None = None
    """Of the run time, where a method reads it."""
    linear_notes: dict[str, list[str]] = field(default_factory=dict)
    tuned: list[LinearResult] = field(default_factory=list)
    """Of the linears that a tuner quantized, filled by it."""
    reassembled: list[dict[str, Any]] = field(default_factory=list)
    """Searches of transforms that change inputs at run time."""

    def path(self, name: str) -> str:
        return self.structure.path(self.index, name)

    def site(self, name: str) -> str:
        return next((s.linears[0] for s in self.structure.sites if name in s.linears), name)

    def transform(self) -> None:
        """All scales of the block, transform by transform; then all rewrites."""
        depth = max((len(m.transforms) for m in self.methods.values()), default=0)
        for position in range(depth):
            self._shift_groups(position)
            reassemble(self, position)
            found = [(rule, s) for rule in self.structure.groups if (s := self._scale_of(rule, position)) is not None]
            for rule, s in found:
                self.weights.scale(rule, s)
                self.map_statistics(rule, partial(Statistics.scaled, s=s.to(torch.float32)))
            if found:
                self.weights.write()
        for name, method in self.methods.items():
            for transform in method.transforms:
                self._rewrite(name, method, transform)
        self.weights.write()

    def _shift_groups(self, position: int) -> None:
        """Before any scale of this position: a transform sees its own shift when it searches."""
        found = [(rule, z) for rule in self.structure.groups if (z := self._shift_of(rule, position)) is not None]
        for rule, z in found:
            self.weights.shift(rule, z)
            self.map_statistics(rule, partial(Statistics.shifted, z=z.to(torch.float32)))
        if found:
            self.weights.write()

    def _shift_of(self, rule: ScaleRule, position: int) -> Tensor | None:
        wanted = self._wanted(rule, position)
        if wanted is None:
            return None
        transform, method, reason = wanted
        if reason is not None or not isinstance(transform, Shifts):
            return None  # a reason is said when it is asked for a scale
        with translated(rule.name):
            z = transform.shift(self._group(rule), method.scheme)
        if z is None:
            return None
        refusal = self.weights.no_shift(rule)
        if refusal is not None:
            self.leave(f"{transform.name} (shift)", rule, refusal)
            return None
        if "hessian" in method.needs:
            raise InputError(f"{transform.name} shifts the input of {rule.name}, and its Hessian cannot follow; set shifting=false")
        if not torch.isfinite(z).all():
            raise NumericalError(f"{transform.name} gave a shift that is not finite for {rule.name}")
        return z

    def _wanted(self, rule: ScaleRule, position: int) -> tuple[Transform, Method, str | None] | None:
        """The transform at work on a group, its method, and why it must leave the group alone."""
        wanted = {n: self.methods.get(n) for n in rule.consumers}
        some = next((m for m in wanted.values() if m is not None and len(m.transforms) > position), None)
        if some is None:
            return None
        transform = some.transforms[position]
        if hasattr(transform, "reassemble"):
            return None
        reason = rule.reason
        if any(m is None or m.rule.method != some.rule.method for m in wanted.values()):
            reason = OTHERS
        elif any(n in self.weights.inputs for n in rule.consumers):
            reason = REASSEMBLED
        elif reason is None and self.tokens.get(rule.input, 1) == 0:
            reason = UNREACHED
        return transform, some, reason

    def leave(self, what: str, rule: ScaleRule, reason: str) -> None:
        key = (what, rule.name, reason)
        self.left_alone[key] = self.left_alone.get(key, 0) + 1

    def _group(self, rule: ScaleRule) -> ScaleGroup:
        group = self.forward.group(rule, self._of(rule.input), f"{self.structure.blocks}.{self.index}.")
        return replace(group, activation=self.activation, schemes=self.schemes(rule))

    def schemes(self, rule: ScaleRule) -> dict[str, WeightScheme]:
        """Of a group's consumers (full names) that a rule names."""
        return {self.path(n): self.methods[n].scheme for n in rule.consumers if n in self.methods}

    def _scale_of(self, rule: ScaleRule, position: int) -> Tensor | None:
        wanted = self._wanted(rule, position)
        if wanted is None:
            return None
        transform, method, reason = wanted
        if reason is not None:
            self.leave(transform.name, rule, reason)
            return None
        group = self._group(rule)
        with translated(group.name):
            s = transform.scale(group, method.scheme)
        if s is not None and not (torch.isfinite(s).all() and (s > 0).all()):
            raise NumericalError(f"{transform.name} gave a scale that is not finite and positive for {group.name}")
        if s is not None:
            self.worked.add(transform.name)
        return s

    def map_statistics(self, rule: ScaleRule, map: Callable[[Statistics], Statistics]) -> None:
        for site in {*(self.site(n) for n in rule.consumers), *rule.routers}:
            if site in self.statistics:
                self.statistics[site] = map(self.statistics[site])

    def _rewrite(self, name: str, method: Method, transform: Transform) -> None:
        site = self.site(name)
        if transform.needs and self.tokens.get(site, 1) == 0:
            self.linear_notes.setdefault(name, []).append(f"{transform.name}: {UNREACHED}")
            return
        with translated(self.path(name)):
            changed = transform.rewrite(self.path(name), self.weights.current[name], self._of(site), method.scheme)
        if changed is not None:
            self.weights.current[name] = changed
            self.worked.add(transform.name)

    def round(self, name: str, rounded: Rounded | None = None, seconds: float = 0.0) -> LinearResult:
        """Quantize one linear; the block then holds the dequantized weight. rounded: what `workers.together` has made in `seconds`."""
        start = time.perf_counter() - seconds
        notes = list(self.linear_notes.get(name, ()))
        if "hessian" in self.methods[name].by.needs and self.statistics_to_round(name)[1]:
            notes.append(f"{UNREACHED}: rounded with an identity Hessian")
        rounded = rounded or self.rounded(name)
        stored = rounded.tensor.dequantize().to(self.weights.current[name])
        self.weights.current[name] = stored
        self.weights.views[name].write(stored)
        errors = self.errors(name, self.statistics_of(name).hessian)
        few = rounded.damp is not None and 0 < self.tokens.get(self.site(name), 0) < stored.shape[1]
        return LinearResult(self.path(name), rounded, errors, time.perf_counter() - start, [*notes, *rounded.notes], few)

    def rounded(self, name: str) -> Rounded:
        """What its rounding makes of a linear; nothing in the block changes."""
        method = self.methods[name]
        with translated(self.path(name)):
            return method.rounding.quantize(self.weights.current[name], self.statistics_to_round(name)[0], method.scheme, self.linear(name))

    def statistics_to_round(self, name: str) -> tuple[Statistics, bool]:
        """And whether no token reached the input of the linear: a zero Hessian would make every column dead and the weight zero; without
        knowledge all inputs count alike."""
        statistics = self.statistics_of(name)
        hessian = statistics.hessian
        if hessian is None or self.tokens.get(self.site(name), 1) != 0:
            return statistics, False
        return Statistics(hessian=torch.eye(hessian.shape[0], device=hessian.device)), True

    def linear(self, name: str) -> Linear:
        """What a rounding or tuner may know of it."""
        bias = self.weights.biases.get(name, self.weights.views[name].bias)
        return Linear(self.path(name), self.seed, None if bias is None else bias.detach())

    def errors(self, name: str, hessian: Tensor | None = None) -> Errors:
        """Of the present weight, with all scales taken back out; found aside."""
        stored = self.weights.current[name]
        with aside(stored.device, *(() if hessian is None else (hessian,))):
            original = self.weights.original[name].double()
            distance = (self.weights.unscaled(name, stored.double()) - original).norm(), original.norm()
            if hessian is None:
                return Errors(distance)
            h, given, full = hessian.double(), stored.double(), self.weights.scaled_original(name).double()
            if name in self.weights.rows:
                rows = self.weights.rows[name].double()[:, None]
                given, full = given / rows, full / rows
            return Errors(distance, (in_quadratic_form(given - full, h), size(full, h)))

    def statistics_of(self, name: str) -> Statistics:
        """Of the input of a linear."""
        return self._of(self.site(name))

    def _of(self, site: str) -> Statistics:
        return self.statistics.get(site, Statistics())


def missing_statistics(made: tuple[Method, ...], given: frozenset[str]) -> list[str]:
    """Kinds that the methods need and the stage was not given."""
    return sorted(frozenset().union(*(m.needs for m in made)) - given)


def merge(parts: list[BlockStatistics]) -> tuple[dict[str, Statistics], dict[str, int]]:
    """Kinds collected separately ▸ one Statistics per site."""
    sites: dict[str, Statistics] = {}
    tokens: dict[str, int] = {}
    for part in parts:
        for name, statistics in part.sites.items():
            target = sites.setdefault(name, Statistics())
            for kind in KINDS:
                if getattr(statistics, kind) is not None:
                    setattr(target, kind, getattr(statistics, kind))
        tokens.update(part.tokens)
    return sites, tokens
