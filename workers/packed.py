"""A rebuilt model whose linears multiply with the packed weights themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quant.accounting import size_bytes
from quant.kernels import TABLE, kernel
from quant.kernels.products import MANY_ROWS, TENSOR_CORE_ROWS, most_rows, rows_alone, with_many_rows
from quant.methods.base import StoredTensor
from quant.scheme import ActivationScheme
from quant.tensors.affine import AffineTensor
from quant.tensors.binary import BinaryTensor
from quant.tensors.codebook import CodebookTensor
from quant.tensors.row_codebook import RowCodebookTensor
from workers.alike import check_bias, check_product
from workers.blocks import LinearView, Once, expert_forward, linear_view
from workers.errors import InputError
from workers.failures import classify
from workers.recipe import Operation, Recipe, bias_and_steps, replace_linear
from workers.request import ErrorClass
from workers.runtime import attach
from workers.steps import held

OPERATIONS: dict[type[StoredTensor], str] = {
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
ANY_ROWS = range(1, TENSOR_CORE_ROWS + 1)
"""Of x, also those of tensor cores."""
Product = Callable[[Tensor], Tensor]
"""x `[..., K]` ▸ `[..., N]`, without a bias."""
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
    """In memory, of what kernels read in place of dense weights, all linears together."""
    exact_inputs: int = 0
    """Bytes that tell which inputs of simulated linears are not rounded."""
    error: float = 0.0
    """The largest of a linear's product (`workers.alike`)."""
    products: set[str] = field(default_factory=set)
    """Operation and backend of the products that ran, of linears with rows of codes: `wq_gemv: cuda`, `wq_gemm: triton`, or `weight made,
    wq_gemv: cuda`. Filled while they run."""


class Packer:
    """Puts what a recipe stores in the place of a model's linears, wherever a kernel computes with it; others get it dequantized.

    backend: auto, dense, or the name of a twin, which must then take every linear; where only kernels for other formats have it, auto.
    With an activation scheme the kernel is `int8_linear`, and linears that it does not take get fake-quantized inputs. Steps and taps on
    the inputs of a linear stay. Every product is checked (`workers.alike`). rows: of x, all the numbers that products will have. Codes are
    laid out a second time, for tensor cores, only where these multiply some of them.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        backend: str,
        device: torch.device,
        activation: ActivationScheme | None = None,
        rows: Collection[int] = ANY_ROWS,
    ) -> None:
        self.made = Packed()
        """So far."""
        self._model, self._recipe, self._device, self._activation = model, recipe, device, activation
        self._asked, self._backend, self._rows = backend, _own(backend, activation), rows
        self._products: dict[str, Product] = {}
        """Linear ▸ what multiplies with it packed; until it is replaced."""
        self._experts: dict[nn.Module, dict[tuple[str, int], Product]] = {}
        """Module ▸ parameter and expert ▸ what multiplies with it packed."""
        self._left: list[str] = []
        self._shared = _Shared()

    def pack(self, below: str = "") -> list[str]:
        """Read what is stored of linears whose path starts with `below`. Returns the parameters that `replace` gives up: nobody reads them.
        Raises InputError for a backend that is not known, or does not take a linear."""
        linears = [(linear_view(self._model, op["module"]), op) for op in self._recipe.replaced() if op["module"].startswith(below)]
        found = {view: self._packed_linear(view, op) for view, op in linears}
        _all_experts_or_none(found)
        given_up = []
        for view, made in found.items():
            if isinstance(made, str):
                self._leave(view.name, made)
                continue
            self._products[view.name] = made.product
            self.made.backends[made.backend] += 1
            self.made.notes.update(made.notes)
            self.made.bytes += made.bytes
            given_up.append(f"{view.name}.weight" if view.expert is None else view.name.rpartition(".")[0])
        return list(dict.fromkeys(given_up))

    def replace(self, model: nn.Module, op: Operation, tensors: dict[str, Tensor]) -> None:
        """Carry out a replace_linear operation of the recipe, once its linear was packed or left."""
        product = self._products.pop(op["module"], None)
        if product is None:
            replace_linear(model, op, tensors)
            return
        # The module stays, and with it its hooks; of experts their number.
        view = linear_view(model, op["module"])
        weight: Tensor = getattr(view.module, view.parameter)
        none = weight.new_empty((0,) if view.expert is None else (len(weight), 0, 0), device=self._device)
        setattr(view.module, view.parameter, nn.Parameter(none, requires_grad=False))
        bias_and_steps(view, op, tensors)
        if view.expert is None:
            _multiply(view.module, product)
            check_bias(view, tensors[op["bias"]] if op.get("bias") is not None else view.bias)
        else:
            products = self._experts.setdefault(view.module, {})
            products[view.parameter, view.expert] = product
            _multiply_by_expert(view.module, products)

    def finish(self) -> Packed:
        """After the last operation."""
        self.made.products.clear()  # so far they ran to be checked
        self._shared.forget()
        if self._activation is not None and self._left:
            handle = attach(self._model, self._recipe, self._activation, None, only=self._left)
            self.made.exact_inputs = size_bytes(*handle.exact_inputs)
        return self.made

    def _rows_of(self, view: LinearView) -> Collection[int]:
        """An expert gets any part of the rows."""
        return self._rows if view.expert is None else range(1, max(self._rows) + 1)

    def _leave(self, linear: str, reason: str) -> None:
        name = DENSE if self._activation is None else SIMULATED
        if self._backend not in ("auto", DENSE):
            raise InputError(f"workload.backend={self._asked} does not take {linear}: {reason}; use auto, which leaves it {name}")
        self._left.append(linear)
        self.made.backends[name] += 1
        self.made.reasons[reason] += 1

    def _packed_linear(self, view: LinearView, op: Operation) -> _PackedLinear | str:
        """What multiplies with what is stored of the linear, checked, or why the linear has no kernel."""
        if self._backend == DENSE:
            return "workload.backend=dense"
        stored = self._recipe.stored(op, self._device)
        made = self._laid_out(view, op, stored)
        if not isinstance(made, str):
            error = check_product(view, stored, made.product, self._rows_of(view), self._activation, self._device)
            self.made.error = max(self.made.error, error)
        return made

    def _laid_out(self, view: LinearView, op: Operation, stored: StoredTensor) -> _PackedLinear | str:
        device, activation, backend = self._device, self._activation, self._backend
        operation = OPERATIONS.get(type(stored))
        if activation is not None:
            operation = INTEGER if isinstance(stored, AffineTensor) and self._recipe.exact_inputs(op) is None else None
        if operation is None:
            return f"the stored format {op['format']} has no packed product" + ("" if activation is None else " with rounded activations")
        order, orders = None, self._shared.bytes
        if activation is None and isinstance(stored, AffineTensor) and stored.g_idx is not None:
            stored, order = _in_order(stored, self._shared)
        try:
            chosen = kernel(operation, backend, device)
            packed = chosen.run.prepare(stored) if activation is None else chosen.run.prepare(stored, activation)
        except (ValueError, RuntimeError) as e:
            return _reason(e)
        notes = list(chosen.notes)
        size = _held_bytes(packed) if packed is stored else packed.bytes
        if activation is not None:
            return _PackedLinear(_codes_product(chosen.run, packed, self._shared), chosen.backend, notes, size)
        cores, beside = None, None
        if operation == "wq_gemv" and any(_on_tensor_cores(m, chosen.run, packed, view.storage.dtype) for m in self._rows_of(view)):
            cores, beside = _with_tensor_cores(stored, backend, device, notes)
        size += (0 if beside is None else beside.bytes) + self._shared.bytes - orders
        product = _rows_product(chosen.run, operation, packed, cores, beside, order, self.made.products)
        return _PackedLinear(product, chosen.backend, notes, size)


class _PackedLinear(NamedTuple):
    """A linear, packed."""

    product: Product
    backend: str
    notes: list[str]
    """Why a faster kernel was passed over."""
    bytes: int


def _all_experts_or_none(found: dict[LinearView, _PackedLinear | str]) -> None:
    """Linears of a module of experts run packed together, as one forward has them all; changes `found`."""
    modules: dict[nn.Module, list[LinearView]] = {}
    for view in found:
        if view.expert is not None:
            modules.setdefault(view.module, []).append(view)
    for module, views in modules.items():
        whole = sum(len(p) for p in module.parameters(recurse=False))
        if len(views) < whole or any(isinstance(found[v], str) for v in views):
            for view in views:
                if not isinstance(found[view], str):
                    found[view] = "other experts of the module are not packed"


def _reason(refused: Exception) -> str:
    """Raises it where memory was lacking: a dense weight would take more, and the same variant would be timed with other kernels."""
    if classify(refused) is ErrorClass.MEMORY:
        raise refused
    return str(refused)


def _held_bytes(weight: Any) -> int:
    """Of a stored weight's tensors as they lie in memory: codes and signs have a byte each there, however few bits they are stored in."""
    found = (getattr(weight, f.name) for f in fields(weight))
    return sum(v.nbytes if isinstance(v, Tensor) else _held_bytes(v) for v in found if isinstance(v, Tensor) or is_dataclass(v))


def weights_bytes(model: nn.Module, packed: Packed | None) -> int:
    """Of all weights that are on the device, and of what is done to inputs of linears for them."""
    own = size_bytes(*(t for t in (*model.parameters(), *model.buffers()) if not t.is_meta), *held(model))
    return own + (0 if packed is None else packed.bytes + packed.exact_inputs)


def _own(backend: str, activation: ActivationScheme | None) -> str:
    """`auto` for a backend that only kernels for other formats have: one name serves a grid of several."""
    known = {o: set(TABLE[o]) for o in (*OPERATIONS.values(), INTEGER)}
    own = known.pop(INTEGER) if activation is not None else set().union(*(known[o] for o in OPERATIONS.values()))
    return "auto" if backend in set().union(*known.values()) - own else backend


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


def _with_tensor_cores(stored: StoredTensor, backend: str, device: torch.device, notes: list[str]) -> tuple[Any, Any]:
    """The kernel for some rows and its own layout of the weight; None and None where there is none, and why in the notes."""
    if device.type != "cuda":
        return None, None
    try:
        chosen = kernel(TENSOR_CORES, backend if backend in TABLE[TENSOR_CORES] else "auto", device)
        if chosen.backend == "reference":
            return None, None
        packed = chosen.run.prepare(stored)
    except (ValueError, RuntimeError) as e:
        notes.append(f"{TENSOR_CORES} runs not at all: {_reason(e)}")
        return None, None
    notes += chosen.notes
    return chosen.run, packed


def _on_tensor_cores(rows: int, run: Any, packed: Any, dtype: torch.dtype) -> bool:
    """Whether so many rows of x are theirs, where there are any; run, packed: the kernel for fewer."""
    return dtype is not torch.float32 and rows <= TENSOR_CORE_ROWS and rows > rows_alone(run, packed, dtype)


def _multiply(module: Any, product: Product) -> None:
    """Make a linear (Linear or Conv1D) multiply by it; its bias stays."""
    bias = module.bias

    def forward(x: Tensor) -> Tensor:
        out = product(x)
        return out if bias is None else out + bias

    module.forward = forward


def _multiply_by_expert(module: Any, products: Mapping[tuple[str, int], Product]) -> None:
    def product(parameter: str, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
        return products[parameter, expert](x)

    module.forward = partial(expert_forward, module, product)


def _rows_product(
    run: Any,
    operation: str,
    packed: Any,
    cores: Any = None,
    beside: Any = None,
    order: _Order | None = None,
    ran: set[str] | None = None,
) -> Product:
    """cores, beside: the kernel for some rows and the weight as it reads it. ran: told which products run."""
    product, most = getattr(run, operation), most_rows(run)
    few, some, many = _name(operation, run), _name(TENSOR_CORES, cores), f"weight made, {_name(operation, run)}"
    ran = set() if ran is None else ran

    def multiply(x: Tensor) -> Tensor:
        rows = (x if order is None else order.of(x)).reshape(-1, x.shape[-1])
        out: Tensor
        if cores is not None and _on_tensor_cores(len(rows), run, packed, x.dtype):
            ran.add(some)
            out = cores.wq_gemm(rows, beside)
        elif len(rows) > MANY_ROWS[x.device.type]:
            ran.add(many)
            out = with_many_rows(rows, packed, run)
        else:
            ran.add(few)
            kind = x.dtype if x.dtype in TYPES else torch.float32
            parts = [product(part.to(kind).contiguous(), packed) for part in torch.split(rows, most)]
            out = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(x.dtype)
        return out.view(*x.shape[:-1], -1)

    return multiply


def _name(operation: str, run: Any) -> str:
    """Of a product of a backend's module, for a record."""
    return f"{operation}: {getattr(run, '__name__', '').rpartition('.')[2]}"


class _Shared:
    """What linears of a model have in common."""

    def __init__(self) -> None:
        self.rounded = Once()
        """Codes of an input."""
        self._orders: list[_Order] = []

    @property
    def bytes(self) -> int:
        return sum(o.columns.nbytes for o in self._orders)

    def forget(self) -> None:
        """Inputs, and what was made of them."""
        self.rounded.forget()
        for order in self._orders:
            order.gathered.forget()

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
        self.gathered = Once()

    def of(self, x: Tensor) -> Tensor:
        return self.gathered.of(lambda: x.index_select(-1, self.columns), x)


def _codes_product(run: Any, packed: Any, shared: _Shared) -> Product:
    def multiply(x: Tensor) -> Tensor:
        rounded = shared.rounded.of(lambda: run.rounded(x.reshape(-1, x.shape[-1]), packed), x)
        out: Tensor = run.multiply(rounded, packed, x.dtype)
        return out.view(*x.shape[:-1], -1)

    return multiply
