"""A rebuilt model whose linears multiply with the packed weights themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quant.kernels import TABLE, kernel
from quant.kernels.products import MANY_ROWS, TENSOR_CORE_ROWS, most_rows, rows_alone, with_many_rows
from quant.scheme import ActivationScheme
from quant.tensors.affine import AffineTensor
from quant.tensors.base import Stored
from quant.tensors.binary import BinaryTensor
from quant.tensors.codebook import CodebookTensor
from quant.tensors.row_codebook import RowCodebookTensor
from workers.blocks import Once, linear_view
from workers.errors import InputError
from workers.recipe import Operation, Recipe
from workers.runtime import attach

OPERATIONS: dict[type[Stored], str] = {
    AffineTensor: "wq_gemv",
    CodebookTensor: "lut_gemv",
    RowCodebookTensor: "row_lut_gemv",
    BinaryTensor: "binary_gemv",
}
"""Stored format ▸ the kernel that multiplies with it."""
INTEGER = "int8_linear"
"""The kernel that does, of the first format, where activations are in fewer bits too."""
DENSE, SIMULATED = "dense", "simulated"
"""In place of a backend: weights dequantized once; and their inputs fake-quantized, as in an evaluation."""
TENSOR_CORES = "wq_gemm"
"""The kernel that does, of the first format, on a GPU where x has more rows than `wq_gemv` is for, in a type of 16 bits."""
TYPES = (torch.float32, torch.bfloat16)
"""Of activations that kernels take; others are converted to float32 and back."""


@dataclass
class Packed:
    """What became of the quantized linears of a model."""

    backends: Counter[str] = field(default_factory=Counter)
    """Backend, `dense` or `simulated` ▸ linears."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why linears have no kernel ▸ linears."""
    notes: set[str] = field(default_factory=set)
    """Why a faster kernel was passed over."""
    bytes: int = 0
    """That kernels read of packed weights, all linears together."""
    products: set[str] = field(default_factory=set)
    """Operation and backend of the products that ran, of linears with rows of codes: `wq_gemv: cuda`, `wq_gemm: triton`, or `weight made,
    wq_gemv: cuda`. Filled while they run."""


def pack_linears(
    model: nn.Module, recipe: Recipe, backend: str, device: torch.device, activation: ActivationScheme | None = None
) -> Packed:
    """Replace the dense weights of `model`, rebuilt from `recipe`, by what the recipe stores, wherever a kernel computes with it.

    backend: auto, dense, or the name of a twin, which must then take every linear; where only kernels for other formats have it, auto.
    With an activation scheme the kernel is `int8_linear`, and linears that it does not take get fake-quantized inputs. Steps and taps on
    the inputs of a linear stay. Raises InputError for a backend that is not known, or does not take a linear.
    """
    made, left, shared = Packed(), [], _Shared()
    name, backend = DENSE if activation is None else SIMULATED, _own(backend, activation)
    for op in recipe.replaced():
        if backend == DENSE:
            reason: str | None = "workload.backend=dense"
        else:
            reason = _pack(model, recipe, op, backend, device, made, activation, shared)
        if reason is None:
            continue
        if backend not in ("auto", DENSE):
            raise InputError(f"workload.backend={backend} does not take {op['module']}: {reason}; use auto, which leaves it {name}")
        left.append(op["module"])
        made.backends[name] += 1
        made.reasons[reason] += 1
    if activation is not None and left:
        attach(model, recipe, activation, None, only=left)
    return made


def _own(backend: str, activation: ActivationScheme | None) -> str:
    """`auto` for a backend that only kernels for other formats have: one name serves a grid of several."""
    known = {o: set(TABLE[o]) for o in (*OPERATIONS.values(), INTEGER)}
    own = known.pop(INTEGER) if activation is not None else set().union(*(known[o] for o in OPERATIONS.values()))
    return "auto" if backend in set().union(*known.values()) - own else backend


def _pack(
    model: nn.Module,
    recipe: Recipe,
    op: Operation,
    backend: str,
    device: torch.device,
    made: Packed,
    activation: ActivationScheme | None,
    shared: _Shared,
) -> str | None:
    """None, or why the linear has no kernel."""
    view = linear_view(model, op["module"])
    if not isinstance(view.module, nn.Linear):
        return f"a weight kept as {type(view.module).__name__} has no packed product"
    stored = recipe.stored(op, device)
    operation = OPERATIONS.get(type(stored))
    if activation is not None:
        operation = INTEGER if isinstance(stored, AffineTensor) and recipe.exact_inputs(op) is None else None
    if operation is None:
        return f"the stored format {op['format']} has no packed product" + ("" if activation is None else " with rounded activations")
    order: _Order | None = None
    if activation is None and isinstance(stored, AffineTensor) and stored.g_idx is not None:
        stored, order = _in_order(stored, shared)
    try:
        chosen = kernel(operation, backend, device)
        packed = chosen.run.prepare(stored) if activation is None else chosen.run.prepare(stored, activation)
    except (ValueError, RuntimeError) as e:
        return str(e)
    if activation is None:
        cores, beside = _with_tensor_cores(stored, backend, device, made) if operation == "wq_gemv" else (None, None)
        _multiply_rows(view.module, chosen.run, operation, packed, cores, beside, order, made.products)
    else:
        _multiply_codes(view.module, chosen.run, packed, shared)
    made.backends[chosen.backend] += 1
    made.notes.update(chosen.notes)
    made.bytes += sum(t.numel() * t.element_size() for t in stored.pack().values()) if packed is stored else packed.bytes
    made.bytes += 0 if order is None else order.columns.nbytes
    return None


def _in_order(stored: AffineTensor, shared: _Shared) -> tuple[AffineTensor, _Order | None]:
    """The tensor with the columns of a group side by side, and the order of its inputs; as it was where groups differ in size."""
    assert stored.g_idx is not None
    groups = torch.bincount(stored.g_idx.long(), minlength=stored.scale.shape[1])
    if bool((groups != groups[0]).any()):
        return stored, None
    columns = torch.argsort(stored.g_idx.long(), stable=True)
    scale = None if stored.input_scale is None else stored.input_scale[columns]
    made = replace(stored, codes=stored.codes[:, columns].contiguous(), g_idx=None, stream=None, input_scale=scale)
    in_place = torch.equal(columns, torch.arange(len(columns), device=columns.device))
    return made, None if in_place else shared.order(columns)


def _with_tensor_cores(stored: Stored, backend: str, device: torch.device, made: Packed) -> tuple[Any, Any]:
    """The kernel for some rows and its own layout of the weight; None and None where there is none, and why in the notes."""
    if device.type != "cuda":
        return None, None
    try:
        chosen = kernel(TENSOR_CORES, backend if backend in TABLE[TENSOR_CORES] else "auto", device)
        if chosen.backend == "reference":
            return None, None
        packed = chosen.run.prepare(stored)
    except (ValueError, RuntimeError) as e:
        made.notes.add(f"{TENSOR_CORES} runs not at all: {e}")
        return None, None
    made.notes.update(chosen.notes)
    made.bytes += packed.bytes
    return chosen.run, packed


def _multiply_rows(
    linear: nn.Linear,
    run: Any,
    operation: str,
    packed: Any,
    cores: Any = None,
    beside: Any = None,
    order: _Order | None = None,
    ran: set[str] | None = None,
) -> None:
    """cores, beside: the kernel for some rows and the weight as it reads it. ran: told which products run."""
    width, bias, product, most = linear.in_features, linear.bias, getattr(run, operation), most_rows(run)
    few, some, many = _name(operation, run), _name(TENSOR_CORES, cores), f"weight made, {_name(operation, run)}"
    ran = set() if ran is None else ran

    def forward(x: Tensor) -> Tensor:
        rows = (x if order is None else order.of(x)).reshape(-1, width)
        gemm = cores is not None and x.dtype is not torch.float32 and len(rows) <= TENSOR_CORE_ROWS
        if gemm and len(rows) > rows_alone(run, packed, x.dtype):
            ran.add(some)
            out = cores.wq_gemm(rows, beside)
        elif len(rows) > MANY_ROWS[x.device.type]:
            ran.add(many)
            out = with_many_rows(rows, packed, run)
        else:
            ran.add(few)
            kind = x.dtype if x.dtype in TYPES else torch.float32
            parts = [product(part.to(kind).contiguous(), packed) for part in rows.split(most)]
            out = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(x.dtype)
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    _replace(linear, forward)


def _name(operation: str, run: Any) -> str:
    """Of a product of a backend's module, for a record."""
    return f"{operation}: {getattr(run, '__name__', '').rpartition('.')[2]}"


class _Shared:
    """What linears of a model have in common."""

    def __init__(self) -> None:
        self.rounded = Once()
        """Codes of an input."""
        self._orders: list[_Order] = []

    def order(self, columns: Tensor) -> _Order:
        """One for all linears whose inputs come in the same order: those with one input share its Hessian."""
        known = next((o for o in self._orders if torch.equal(o.columns, columns.int())), None)
        if known is None:
            known = _Order(columns.int())
            self._orders.append(known)
        return known


class _Order:
    """In which a linear's inputs come, int32 `[K]`; an input is gathered once."""

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns
        self._gathered = Once()

    def of(self, x: Tensor) -> Tensor:
        return self._gathered.of(lambda: x.index_select(-1, self.columns), x)


def _multiply_codes(linear: nn.Linear, run: Any, packed: Any, shared: _Shared) -> None:
    width, bias = linear.in_features, linear.bias

    def forward(x: Tensor) -> Tensor:
        rounded = shared.rounded.of(lambda: run.rounded(x.reshape(-1, width), packed), x)
        out: Tensor = run.multiply(rounded, packed, x.dtype).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    _replace(linear, forward)


def _replace(linear: nn.Linear, forward: Callable[[Tensor], Tensor]) -> None:
    """Give up the dense weight. The module stays, and with it its hooks."""
    linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
    linear.forward = forward  # type: ignore[method-assign]
