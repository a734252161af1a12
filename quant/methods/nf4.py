"""NF4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): 4-bit codes at quantiles of the normal distribution, in groups.

Objective: min |w / max|w| - v| over the 16 values v of `quant.number_formats.normal_values`, per weight; no data. Weight `[N, K]`.
The format itself is a number of the scheme (nf4, or nf4_dq with double-quantized scales), which rtn and gptq make too; this
method adds the choice of who makes the codes. QLoRA's groups are 64 consecutive weights of the flattened matrix: the same
as groups of a row where 64 divides K; other K are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quant.affine import group_width
from quant.errors import require_finite
from quant.methods.base import ANY, Linear, Rounded
from quant.methods.bitsandbytes import nf4_codes
from quant.methods.rtn import round_floating
from quant.parameters import Checked
from quant.scheme import Supports, WeightScheme
from quant.statistics import Statistics
from quant.tensors.floating import FloatingTensor


@dataclass(frozen=True)
class Nf4(Checked):
    name: ClassVar[str] = "nf4"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    uses_seed: ClassVar[bool] = False
    supports: ClassVar[Supports] = Supports(bits=(4,), granularity=("group",), numbers=("nf4", "nf4_dq"))

    backend: str = "native"
    """native, or bitsandbytes: the codes are made by that package, where it is installed (float32 scales, no double quantization)."""

    def quantize(self, weight: Tensor, statistics: Statistics, scheme: WeightScheme, linear: Linear = ANY) -> Rounded:
        """`[N, K]` ▸ codes of NF4. Raises NonFiniteError, and ValueError for groups that do not divide K."""
        require_finite("weight", weight)
        if self.backend == "native":
            return round_floating(weight, scheme)
        if scheme.number != "nf4" or scheme.scale_dtype != "float32":
            raise ValueError(
                f"backend=bitsandbytes makes number=nf4 with scale_dtype=float32; got {scheme.number} with {scheme.scale_dtype}: "
                "set them so, or backend=native"
            )
        codes, peak = nf4_codes(weight.float(), group_width(scheme, *weight.shape))
        return Rounded(FloatingTensor(codes, {"scale": peak.where(peak != 0, 1.0)}, "nf4"))
