"""Methods that another toolkit carries out, in an environment of its own: their names, parameters, and what they can make.

Nothing is computed here: `workers.toolkits` runs the toolkit and turns its codes, scales and zeros into the stored formats. Codes
are chosen by the toolkit; its scales are then stored in the scheme's `scale_dtype`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from quant.methods.base import Declared
from quant.parameters import Checked
from quant.scheme import Supports

FAMILIES = ("llama",)
"""On which toolkits that run the model were tried."""


class ToolkitMethod(Declared, Protocol):
    """Declared as a rounding; `quantize` is the toolkit's."""

    toolkit: ClassVar[str]
    """Name of its environment."""
    feeds_text: ClassVar[bool]
    """The toolkit runs the calibration text."""
    working_set: ClassVar[str]

    @property
    def release(self) -> str:
        """Of the toolkit's package, part of the key: the environment must hold this one."""


@dataclass(frozen=True)
class HqqPackage(Checked):
    """HQQ by its authors' package (`hqq`, dropbox/hqq): no data. On CUDA the package searches zeros in float16, on a CPU in float32."""

    name: ClassVar[str] = "hqq_package"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports(bits=(1, 2, 3, 4, 5, 6, 8), granularity=("channel", "group"))
    toolkit: ClassVar[str] = "hqq"
    feeds_text: ClassVar[bool] = False
    working_set: ClassVar[str] = "model"

    release: str = "0.2.8.post1"
    axis: int = 1
    """1: groups of consecutive inputs; 0: groups of outputs of one input."""
    optimize: bool = True
    """False keeps the min-max zeros."""
    round_zero: bool | None = None
    """Round the zeros before the search; None for 4 bits only, as the package's own settings for models have it."""


@dataclass(frozen=True)
class LlmCompressor(Checked):
    """GPTQ, or round to nearest, by llm-compressor (vllm-project). Its inputs come from the quantized blocks before
    (propagation=quantized, its own default) or from the unquantized model (original). Ranges are static."""

    name: ClassVar[str] = "llm_compressor"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports(families=FAMILIES)
    toolkit: ClassVar[str] = "llm_compressor"
    feeds_text: ClassVar[bool] = True
    working_set: ClassVar[str] = "model"

    release: str = "0.14.0.1"
    algorithm: str = "gptq"
    """gptq or rtn."""
    act_order: bool = True
    """Columns by decreasing Hessian diagonal (its `actorder: static`)."""
    block_size: int = 128
    damp: float = 0.01
    """Fraction of mean(diag H) added to the diagonal (its `dampening_frac`)."""


@dataclass(frozen=True)
class AutoRound(Checked):
    """Learned rounding by AutoRound (intel/auto-round, arXiv 2309.05516); with iters=0 its round to nearest. It leaves linears alone
    whose sizes 32 does not divide, which bitgrid refuses."""

    name: ClassVar[str] = "auto_round"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = True
    supports: ClassVar[Supports] = Supports(granularity=("channel", "group"), families=FAMILIES)
    toolkit: ClassVar[str] = "auto_round"
    feeds_text: ClassVar[bool] = True
    working_set: ClassVar[str] = "model"

    release: str = "0.16.1"
    iters: int = 200
    """Steps of signed gradient descent per block; 0 rounds to nearest."""
    lr: float | None = None
    """None: 1 / iters."""
    batch_size: int = 8
    """Sequences a step."""
    tune_range: bool = True
    """Learn the ends of every range too (its `enable_minmax_tuning`)."""
