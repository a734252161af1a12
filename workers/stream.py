"""A model whose decoder blocks are read from the checkpoint one at a time.

The model is built on the meta device; embeddings, final norm, head and rotary tables are loaded at once, the blocks on
demand. Checkpoint names and shapes pass through transformers' own conversion (experts merged into 3-D tensors, prefixes,
tied weights), restricted to the tensors of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from workers import families
from workers.blocks import input_of, replace_input, replaced_forward
from workers.checkpoint import Checkpoint, bad_config, open_checkpoint, require_floats, unread
from workers.context import Context
from workers.errors import InputError, NumericalError, UnsupportedModel
from workers.specs import ModelSpec
from workers.steps import drop_reassemblies
from workers.structure import Structure

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Call:
    """Arguments of a module besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def beside_input(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Of all arguments that a module was called with."""
        input_of(args, kwargs)  # raises where the module has no hidden states
        return cls((None, *args[1:]) if args else (), dict(kwargs))

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """Output of `module` on `hidden` `[B, T, K]`; both return types (tensor, tuple) are handled."""
        args, kwargs = replace_input(self.args, self.kwargs, hidden)
        out = module(*args, **kwargs)
        states: Tensor = out[0] if isinstance(out, tuple) else out
        return states


@dataclass
class Prepared:
    """Token batches as they enter the first block."""

    hidden: list[Tensor]
    """Per batch `[B, T, K]`."""
    calls: list[list[Call]]
    """Per batch, per block; batches of one shape share the list."""


@dataclass
class BlockModel:
    """The model with its blocks on demand."""

    model: Any
    checkpoint: Checkpoint
    structure: Structure
    dtype: torch.dtype
    device: torch.device
    sources: dict[str, list[str]]
    """Parameter name ▸ checkpoint tensors it is made of; none of those that are left out."""
    loaded: set[int] = field(default_factory=set)
    _ahead: dict[int, Future[dict[str, Tensor]]] = field(default_factory=dict)
    """Blocks whose tensors are being read already."""
    on_load: list[Callable[[int], None]] = field(default_factory=list)
    """Called after a block was loaded: a recipe's operations on that block."""

    @property
    def blocks(self) -> nn.ModuleList:
        module: nn.ModuleList = self.model.get_submodule(self.structure.blocks)
        return module

    def block_bytes(self, i: int) -> int:
        """Of parameters; shared ones count once."""
        return sum(p.numel() for p in self.blocks[i].parameters()) * self.dtype.itemsize

    def outer_bytes(self) -> int:
        """Of everything outside the blocks; tied weights count once."""
        tied = self.model.all_tied_weights_keys
        whole: int = sum(p.numel() for n, p in self.model.named_parameters(remove_duplicate=False) if n not in tied)
        return whole * self.dtype.itemsize - sum(self.block_bytes(i) for i in range(self.structure.count))

    def whole_bytes(self) -> int:
        return self.outer_bytes() + sum(self.block_bytes(i) for i in range(self.structure.count))

    def leave_out(self, parameter: str) -> None:
        """Of a block, which is read without it from now on: it stays on the meta device for what is called on loading to give."""
        del self.sources[parameter]

    def load(self, i: int) -> nn.Module:
        """Read block `i` unless it is there. Raises NumericalError for values that are not finite."""
        if i not in self.loaded:
            prefix = f"{self.structure.blocks}.{i}."
            ahead = self._ahead.pop(i, None)
            self._read(self._tensors_of(i), {} if ahead is None else ahead.result())
            # A bias that a recipe adds is in no checkpoint and has no values yet.
            require_finite((n, p) for n, p in self.blocks[i].named_parameters(prefix.rstrip(".")) if n in self.sources)
            self.loaded.add(i)
            for act in self.on_load:
                act(i)
        return self.blocks[i]

    def prefetch(self, i: int) -> None:
        """Start reading block `i` into memory that a GPU copies from fastest, while the GPU works. Nothing to do for a CPU, which would be
        kept from its work."""
        if self.device.type == "cuda" and i not in self.loaded and i not in self._ahead:
            pool = ThreadPoolExecutor(1, "prefetch")
            self._ahead[i] = pool.submit(self._pinned, self._tensors_of(i))
            pool.shutdown(wait=False)

    def _pinned(self, names: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            files = {str(f): stack.enter_context(safe_open(f, framework="pt")) for f in {self.checkpoint.tensors[n].file for n in names}}
            for n in names:
                entry = self.checkpoint.tensors[n]
                found[n] = files[str(entry.file)].get_tensor(entry.name).pin_memory()
        return found

    def _tensors_of(self, i: int) -> list[str]:
        prefix = f"{self.structure.blocks}.{i}."
        return [s for name, sources in self.sources.items() if name.startswith(prefix) for s in sources]

    def release(self, i: int) -> None:
        """Give up block `i`'s memory; changes to it are lost."""
        drop_reassemblies(self.blocks[i])
        self.blocks[i].to_empty(device="meta")
        self.loaded.discard(i)

    def prepare(self, batches: list[Tensor]) -> Prepared:
        """Embed token batches `[B, T]` and record every block's arguments, without running a block."""
        hidden: list[Tensor] = []
        calls: list[list[Call]] = []
        known: dict[tuple[int, ...], list[Call]] = {}
        for tokens in batches:
            entered, made = self._embed(tokens)
            hidden.append(entered)
            # Without padding a block's arguments depend on the shape of the batch alone.
            calls.append(known.setdefault(tuple(tokens.shape), made))
        return Prepared(hidden, calls)

    def block_calls(self, batch: int, length: int) -> list[Call]:
        """Every block's arguments for a batch of that shape."""
        return self._embed(torch.zeros(batch, length, dtype=torch.long))[1]

    @torch.no_grad()
    def _embed(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        entered: list[Tensor] = []
        calls: list[Call] = []

        def record(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = input_of(args, kwargs)
                entered.append(hidden)
                calls.append(Call.beside_input(args, kwargs))
                return self._returned(hidden)

            return forward

        with replaced_forward(self.blocks, record):
            self.model.base_model(input_ids=tokens.to(self.device), use_cache=False)
        return entered[0], calls

    @torch.no_grad()
    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """`[B, T, V]` from the output of the last block for `tokens` `[B, T]`."""

        def skip(i: int) -> Callable[..., Any]:
            return lambda *_, **__: self._returned(hidden)

        with replaced_forward(self.blocks, skip):
            out: Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return out

    def _returned(self, hidden: Tensor) -> Any:
        """As a block returns it."""
        more = self.structure.outputs - 1
        return (hidden, *[None] * more) if more else hidden

    def stream_in_forward(self) -> None:
        """Make `self.model` usable as it is: a block is read before its forward, while the one before it works where that helps, and given
        up after it."""
        last = len(self.blocks) - 1

        def read(i: int) -> None:
            self.load(i)
            if i < last:
                self.prefetch(i + 1)

        for i, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda _m, _a, i=i: read(i))
            block.register_forward_hook(lambda _m, _a, _o, i=i: self.release(i))

    def _read(self, names: list[str], ahead: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """ahead: those of them that were read before."""
        by_file: dict[str, list[tuple[str, str]]] = {}
        for n in names:
            if n in ahead:
                continue
            entry = self.checkpoint.tensors[n]
            by_file.setdefault(str(entry.file), []).append((n, entry.name))
        with ExitStack() as stack, _silent():
            slices: dict[str, Any] = dict(ahead)
            for file, wanted in by_file.items():
                handle = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                slices.update({n: handle.get_slice(stored) for n, stored in wanted})
            load_config = LoadStateDictConfig(
                device_map={"": self.device},
                dtype=self.dtype,
                dtype_plan=self.model._get_dtype_plan(self.dtype),
                weight_mapping=get_model_conversion_mapping(self.model),
            )
            # On a GPU memory is taken beforehand for what is expected: without names that is the whole model, for every block.
            expected = [n for n, sources in self.sources.items() if not slices.keys().isdisjoint(sources)]
            info, _ = type(self.model)._load_pretrained_model(self.model, slices, None, load_config, expected)
        if info.mismatched_keys or info.conversion_errors or info.error_msgs:
            raise InputError(
                f"{self.checkpoint.folder} does not fit its config.json: "
                f"{sorted(map(str, info.mismatched_keys)) or info.conversion_errors or info.error_msgs}; fetch the model again"
            )


def open_blocks(context: Context, spec: ModelSpec) -> BlockModel:
    """Build the model with only what is outside its blocks loaded, in eval mode on `context.device`.

    Raises InputError (missing or damaged files; not even one block fits `hints.memory_bytes`), UnsupportedModel, NumericalError.
    """
    with context.phase("read"):
        checkpoint = open_checkpoint(context.model_location(spec))
    return open_checked(context, spec, checkpoint)


def open_checked(context: Context, spec: ModelSpec, checkpoint: Checkpoint) -> BlockModel:
    """As `open_blocks`, of a checkpoint whose headers were read already."""
    context.notes += checkpoint.notes
    structure = families.structure(checkpoint.config)
    dtype = DTYPES[spec.dtype]
    try:
        model = _skeleton(checkpoint, dtype)
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError, StrictDataclassError) as e:
        raise bad_config(checkpoint.folder, f"{structure.model_type} model", e) from e
    opened = BlockModel(model, checkpoint, structure, dtype, context.device, _sources(model, checkpoint))
    _check_complete(opened)
    require_floats(checkpoint, (s for name, _ in model.named_parameters() for s in opened.sources.get(name, ())))
    context.notes += unread(checkpoint, {s for names in opened.sources.values() for s in names}, model._keys_to_ignore_on_load_unexpected)
    largest = max((opened.block_bytes(i) for i in range(structure.count)), default=0)
    needed = opened.outer_bytes() + largest
    if context.hints.memory_bytes is not None and needed > context.hints.memory_bytes:
        raise InputError(
            f"the model does not fit even block by block: {needed} bytes are needed (largest block {largest}, the rest outside "
            f"blocks), {context.hints.memory_bytes} are given; raise hints.memory_bytes or use a 16-bit dtype"
        )
    with context.phase("read"):
        prefix = structure.blocks + "."
        opened._read([s for name, sources in opened.sources.items() if not name.startswith(prefix) for s in sources])
        _finish_outer(opened)
        require_finite((n, p) for n, p in model.named_parameters() if not n.startswith(prefix))
    return opened


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    config = AutoConfig.from_pretrained(checkpoint.folder)
    cls = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if cls is None:
        raise UnsupportedModel(f"transformers has no causal language model for model_type {config.model_type!r}")
    config._experts_implementation = "eager"  # the one whose linears can be observed one by one
    every = getattr(config, "rescale_every", 0)
    if every > 0:
        config.rescale_every = 0
    with ExitStack() as stack:
        for entered in cls.get_init_context(dtype, False, False, None):
            stack.enter_context(entered)
        model = cls(config)
    if every > 0:
        _as_rescaled(model, every)
    return model.eval().requires_grad_(False)


def _as_rescaled(model: Any, every: int) -> None:
    """Make an RWKV that is not rescaled compute what transformers does. Against overflow of float16 that halves hidden states after so
    many blocks, and divides later blocks' weights in place: they would not be the checkpoint's. Norms take the factor out again:
    norm(x / 2ⁿ, ε) = norm(x, 4ⁿ ε), bit for bit, as powers of two are exact."""
    blocks = model.rwkv.blocks
    for i, block in enumerate(blocks):
        for norm in (block.ln1, block.ln2):
            norm.eps *= 4 ** (i // every)
    model.rwkv.ln_out.eps *= 4 ** (len(blocks) // every)


def _sources(model: Any, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Which checkpoint tensors make up each parameter, by transformers' renaming rules."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    state = model.state_dict()
    out: dict[str, list[str]] = {}
    for source in checkpoint.tensors:
        target, _ = rename_source_key(source, renamings, converters, model.base_model_prefix, state)
        if target not in state and source in state:
            target = source
        if target in state:
            out.setdefault(target, []).append(source)
    return out


def _check_complete(opened: BlockModel) -> None:
    """A parameter may be absent where one it is tied to is there."""
    partners: dict[str, set[str]] = {}
    for target, source in opened.model.all_tied_weights_keys.items():
        partners.setdefault(target, set()).add(source)
        partners.setdefault(source, set()).add(target)
    have = set(opened.sources)
    missing = sorted(n for n in opened.model.state_dict() if n not in have and not partners.get(n, set()) & have)
    if missing:
        raise InputError(f"{opened.checkpoint.folder} lacks {len(missing)} tensors of its model, first {missing[0]}; fetch it again")


def _finish_outer(opened: BlockModel) -> None:
    """Tie weights, and compute buffers that checkpoints do not hold (rotary tables)."""
    model = opened.model
    owners: dict[str, nn.Module] = {}
    for key, buffer in list(model.named_non_persistent_buffers()):
        owner, _, name = key.rpartition(".")
        owners[owner] = model.get_submodule(owner)
        owners[owner]._buffers[name] = torch.empty_like(buffer, device=opened.device)
    for module in owners.values():
        model._init_weights(module)
    with _silent():
        model.tie_weights(missing_keys=set(model.state_dict()) - set(opened.sources), recompute_mapping=False)


def require_finite(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raises NumericalError naming the first tensor with NaN or infinite values, and how many it has."""
    for name, p in parameters:
        if p.is_floating_point() and not torch.isfinite(p).all():
            bad = int((~torch.isfinite(p)).sum())
            why = "the checkpoint is damaged" + (
                ", or its values are too large: try model.dtype=float32" if p.dtype is torch.float16 else ""
            )
            raise NumericalError(f"weights of {name} hold {bad} NaN or infinite values of {p.numel()}; {why}")


def streams(model: nn.Module) -> bool:
    """Whether the model reads its blocks in every forward (`BlockModel.stream_in_forward`); in between they are on the meta device."""
    return any(p.is_meta for p in model.parameters())


@contextmanager
def _silent() -> Iterator[None]:
    """No progress bars or loading reports of transformers: partial loads are meant here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
