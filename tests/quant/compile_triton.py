"""Compile Triton kernels for one architecture, in their largest forms; one JSON object a line. No GPU is needed.

Each form takes the compiler a second or several. With BITGRID_COMPILE=first it is the first of each kernel for the newest architecture,
and for older ones of those kernels that are another there.

python compile_triton.py 90
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quant.kernels.binary_gemv.program import signs
from quant.kernels.binary_gemv.program import weight as signs_weight
from quant.kernels.fake_quantize.program import round_rows
from quant.kernels.fake_quantize.triton import BLOCK, warps_for
from quant.kernels.gptq_block.program import solve
from quant.kernels.hadamard.matrices import factors
from quant.kernels.hadamard.program import transform
from quant.kernels.hadamard.triton import held
from quant.kernels.hadamard.triton import shape as transform_shape
from quant.kernels.hessian_syrk import triton as syrk
from quant.kernels.hessian_syrk.program import add_lower
from quant.kernels.hqq_pack.program import step as hqq_step
from quant.kernels.int8_linear.program import multiply as product_of_codes
from quant.kernels.int8_linear.triton import GROUP, HOPPER, PLAIN, Tile, gluon_works
from quant.kernels.kv_attention.on_device import FEW as FEW_WRITTEN
from quant.kernels.kv_attention.on_device import PIECE, REGISTERS
from quant.kernels.kv_attention.on_device import warps as writing_warps
from quant.kernels.kv_attention.program import attend, attend_plain, merge
from quant.kernels.kv_attention.program_per_token import attend_per_token
from quant.kernels.kv_attention.program_write import append_token, fill
from quant.kernels.kv_attention.triton import FEW, STAGES, WARPS_PLAIN, WINDOW_STAGES
from quant.kernels.kv_attention.triton import shape as attention_shape
from quant.kernels.lazy_update.program import update
from quant.kernels.lazy_update.triton import ROOMY as UPDATED_ELSEWHERE
from quant.kernels.lazy_update.triton import TILE as UPDATED
from quant.kernels.lazy_update.triton import WIDE as UPDATED_BY_HALVES
from quant.kernels.lut_gemv.program import apart, entries
from quant.kernels.lut_gemv.program import weight as entries_weight
from quant.kernels.row_lut_gemv.program import rows as tables_of_rows
from quant.kernels.row_lut_gemv.program import weight as rows_weight
from quant.kernels.row_sums import triton as row_sums
from quant.kernels.row_sums.program import sum_rows
from quant.kernels.rtn_pack.program import long_groups, whole_groups
from quant.kernels.token_log_probs.program import pick
from quant.kernels.turned import triton as turned
from quant.kernels.turned.program import turn
from quant.kernels.wq_gemm.program import gemm
from quant.kernels.wq_gemm.triton import constants as constants_of
from quant.kernels.wq_gemm.triton import shape as cut_of
from quant.kernels.wq_gemv.program import gemv
from quant.kernels.wq_gemv.program import weight as codes_weight

FIRST = os.environ.get("BITGRID_COMPILE") == "first"
NEWEST = 90
STRIDES = tuple(f"{x}_{of}" for x in ("key", "value") for of in ("sequence", "head", "token"))
EVEN = ("k", "capacity", "later_stride", "left_column", "right_stride", "left_parts_stride", "right_parts_stride", *STRIDES)
"""Whole multiples of 16."""
APART = (add_lower, gemm, product_of_codes)
"""What they are depends on the architecture."""


def chosen(architecture: int) -> list[tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]]:
    found = forms(architecture)
    if not FIRST:
        return found
    first = {id(form[0]): form for form in reversed(found)}
    return [form for form in first.values() if architecture == NEWEST or form[0] in APART]


def forms(architecture: int) -> list[tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Kernel, of what, types of its arguments, constants, options."""
    found = []
    block = {n: "*fp32" for n in ("block", "upper", "scale", "zero", "tops", "values", "errors")}
    block |= {"codes": "*u8", "group": "*i32", "words": "*i32", "odd": "*i32", "n": "i32", "b": "i32", "top": "fp32"}
    for kind in (0, 1, 2):
        # Ranges that are found, g_asym and g_sym in float16, and none.
        constants = {"EACH": True, "KIND": kind, "GRIDS": (0b1010, 0, 0)[kind], "ROWS": 32, "COLUMNS": 128}
        found.append((solve, f"kind {kind}", block, constants, {"num_warps": 4, "enable_fp_fusion": False}))
    product = {"words": "*i32", "ranges": "*fp32", "x": "*fp32", "out": "*fp32"} | dict.fromkeys(
        ("n", "k", "units", "groups", "width"), "i32"
    )
    for bits, words, codes, units in ((4, 1, 8, 8), (3, 3, 32, 2)):
        constants = {"BITS": bits, "WORDS": words, "CODES": codes, "UNITS": units}
        found += [(program, f"{bits} bits", product, constants, {"num_warps": 4}) for program in (gemv, codes_weight)]
    types = {"words": "*i32", "tables": "*fp32", "salient": "*i32", "x": "*fp32", "out": "*fp32"}
    types |= dict.fromkeys(("n", "k", "units", "blocks", "block"), "i32")
    found += [(program, "2 bits", types, {"UNITS": 4}, {"num_warps": 4}) for program in (signs, signs_weight)]
    types = {"words": "*i32", "values": "*fp32", "columns": "*i64", "x": "*fp32", "out": "*fp32"}
    types |= dict.fromkeys(("n", "k", "count", "length"), "i32")
    for bits in (4, 2):
        constants = {"BITS": bits, "CODES": 32 // bits, "WORDS": 16}
        found += [(program, f"{bits} bits", types, constants, {"num_warps": 4}) for program in (entries, entries_weight)]
    types = {"words": "*i32", "tables": "*fp16", "x": "*fp32", "out": "*fp32"} | dict.fromkeys(("n", "k", "units"), "i32")
    found += [(program, "3 bits", types, {"BITS": 3, "COLUMNS": 64}, {"num_warps": 4}) for program in (tables_of_rows, rows_weight)]
    types = {"starts": "*i64", "columns": "*i32", "differences": "*fp32", "x": "*fp32", "out": "*fp32", "n": "i32", "k": "i32"}
    found.append((apart, "fp32", types, {"BLOCK": 64}, {"num_warps": 2}))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        tile = syrk.tile_for(dtype, 11008, architecture // 10)
        shape = {"ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.step, "PROMOTE": syrk.PROMOTE // tile.step}
        blocks = {f"{side}_tiles": f"tensordesc<{name}[1, {tile.step}, {n}]>" for side, n in (("left", tile.rows), ("right", tile.columns))}
        types = {"total": "*fp32", "x": f"*{name}", "tiles": "*i32", "sequences": "i32", "length": "i32", "k": "i32"}
        types |= blocks if tile.described else dict.fromkeys(blocks, f"*{name}")
        constants = {**shape, "PRECISION": "ieee", "DESCRIBED": tile.described}
        found.append((add_lower, name, types, constants, {"num_warps": tile.warps, "num_stages": tile.stages}))
    types = {"later": "*fp32", "left": "*fp32", "right": "*fp32"}
    types |= dict.fromkeys(("r", "n", "later_stride", "left_column", "right_stride"), "i32")
    tile = UPDATED if architecture >= 90 else UPDATED_ELSEWHERE
    shape = {"ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.step}
    shape |= {"left_row": 1, "B": 128, "PADDED": 128, "PRECISION": "tf32x3"}
    found.append((update, "128 columns", types, shape, {"num_warps": tile.warps, "num_stages": tile.stages}))
    if architecture == 90 and syrk.gluon_works():
        found += [_triangle(syrk.HOPPER), *_by_halves(types)]
    types = {"source": "*u8", "out": "*u8"} | dict.fromkeys(("r", "c", "source_stride", "out_stride"), "i32")
    found.append((turn, "codes", types, {"ROWS": turned.ROWS, "COLUMNS": turned.COLUMNS}, {"num_warps": turned.WARPS}))
    types = {"bits": "*i32", "odd": "*i64", "out": "*i64", "r": "i32", "c": "i32"}
    found.append((sum_rows, "fp32", types, {"ROWS": row_sums.ROWS, "COLUMNS": row_sums.COLUMNS}, {"num_warps": row_sums.WARPS}))
    scores = {"logits": "*bf16", "tokens": "*i64", "out": "*fp32", "vocabulary": "i32", "stride": "i32"}
    found.append((pick, "bf16", scores, {"BLOCK": 4096}, {"num_warps": 8}))
    found += transforms()
    types = {"x": "*bf16", "scales": "*fp32", "zeros": "*fp32", "sums": "*i32", "n": "i32"} | dict.fromkeys(("clip", "top", "half"), "fp32")
    for codes in (True, False):
        # Of a row that is in registers as a whole, and of a long one.
        block = 4096 if codes else BLOCK
        constants = {"SYMMETRIC": codes, "CODES": codes, "BLOCK": block, "ONCE": codes, "WHOLE": codes, "FMA": True}
        constants["EARLY"] = architecture >= 90
        options = {"num_warps": warps_for(block), "enable_fp_fusion": False}
        found.append((round_rows, "codes" if codes else "values", types | {"out": "*i8" if codes else "*bf16"}, constants, options))
    types = {"x": "*bf16", "codes": "*u8", "stream": "*u8", "told": "*i32", "errors": "*fp32", "groups": "i32"}
    types |= {"top": "fp32", "steps": "fp32"}
    for grid, bits, codes in (("omni", 3, False), ("g_asym", 4, False), ("g_asym", 4, True), ("hqq", 4, True)):
        each = 16 if codes else 8
        fixed = {"GRID": grid, "BITS": bits, "HALF": True, "CODES": codes, "STREAM": True, "FAST": True, "FMA": True}
        fixed["ERROR"] = grid == "omni"
        given = types | {"scales": "*fp16", "zeros": {"omni": "*i16", "hqq": "*fp16"}.get(grid, "*u8")}
        name, options = f"{grid}, {bits} bits{' and codes' * codes}", {"num_warps": 4, "enable_fp_fusion": False}
        short = {"WIDTH": 128, "PARTS": 4, "PART": 32, "ROWS": 4 * each}
        found.append((whole_groups, name, given, fixed | short, options))
        found.append((long_groups, name, given, fixed | {"WIDTH": 11008, "PART": 4096}, options | {"num_warps": 8}))
    types = dict.fromkeys(("x", "scales", "zeros", "moved", "size"), "*fp32") | {"large": "*i32", "count": "i32", "width": "i32"}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    found.append((hqq_step, "fp32", types | {"top": "fp32", "known": "fp32"}, {"BLOCK": 1024}, options))
    largest = HOPPER[0] if gluon_works() else next(t for t in HOPPER if not t.gluon)
    largest_aside = next(t for t in HOPPER if t.columns != t.whole) if largest.gluon else HOPPER[-2]
    found += [_sums_of_integers(tile) for tile in ((largest, largest_aside, HOPPER[-1]) if architecture == 90 else PLAIN[:1])]
    if architecture == 90 and gluon_works():
        # As many terms with zeros as registers are for.
        given = [(t, z) for t in HOPPER for z in (1, 0) if t.gluon and t.registers(z)]
        found += [_sums_of_integers(t, z) for t, z in given if z or not t.registers(1) or t.columns != t.whole]
    return [*found, *products(architecture), *attention(architecture)]


def transforms() -> Iterator[tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Rows of models' widths: values, and codes of them."""
    wanted = [(n, codes) for n in (28672, 11008, 13824, 14336, 16384, 512) for codes in (False, True) if held(*factors(n), codes)]
    types = {"x": "*bf16", "small": "*bf16", "scales": "*fp32", "zeros": "*fp32", "sums": "*i32", "rows": "i32", "m": "i32"}
    types |= dict.fromkeys(("factor", "clip", "top", "half"), "fp32")
    for n, codes in wanted:
        constants = transform_shape(*factors(n), codes) | {"CODES": codes, "SYMMETRIC": False, "FMA": True}
        options = {"num_warps": constants.pop("num_warps"), "enable_fp_fusion": False}
        yield transform, f"{n}{', codes' * codes}", types | {"out": "*i8" if codes else "*bf16"}, constants, options


def products(architecture: int) -> Iterator[tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """`wq_gemm` where it needs the most: zeros, offsets, narrow groups; sums of groups, and scales in the operand."""
    for bits, m, group, offsets in ((4, 64, 64, True), (3, 32, 128, False), (4, 256, 128, False)):
        cut = cut_of(bits, m, 8192, 8192, 132, architecture == 90)
        types = {"low": "*i32", "high": "*i32", "scale": "*fp16", "other": "*fp32" if offsets else "*u8", "x": "*bf16", "out": "*bf16"}
        types |= {"sums": "*fp32", "arrived": "*i32"} | dict.fromkeys(("n", "k", "m", "units", "rows", "each", "magic"), "i32")
        said = f"{bits} bits, {m} rows"
        yield gemm, said, types, constants_of(bits, 8192, group, True, offsets, cut, cut.split), {"num_warps": cut.warps}


def attention(architecture: int) -> Iterator[tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]]:
    split = {"partial": "*fp32", "weights": "*fp32", "splits": "i32"}
    given = split | {n: "*bf16" for n in ("q", "keys", "values")} | {"counts": "*i32", "scale": "fp32", "capacity": "i32"}
    constants = {"KV": 32, "ROWS": 1, "R": 8, "D": 128, "T": 64, "STAGES": STAGES, "PLAIN": False, "EARLY": architecture >= 90}
    yield attend_plain, "bf16", given, constants, {"num_warps": WARPS_PLAIN}
    yield merge, "bf16", split | {"out": "*bf16"}, {"D": 128, "SPLITS": 32, "EARLY": architecture >= 90}, {"num_warps": 4}
    given = given | dict.fromkeys(("keys", "values"), "*i16") | dict.fromkeys(("key_ranges", "value_ranges"), "*i32")
    given |= dict.fromkeys(("window_keys", "window_values"), "*bf16") | dict.fromkeys(("blocks", "window", "heavy"), "i32")
    for bits, rows in ((4, 1), (2, 1), (8, 8)):
        warps, most = attention_shape(128, 64, rows)
        own = constants | {"ROWS": rows, "G": 64, "KB": bits, "VB": bits, "KW": 8 * bits, "VW": 8 * bits, "FEW": FEW}
        own["WINDOW_STAGES"] = WINDOW_STAGES
        yield attend, f"{bits} bits", given, own, {"num_warps": warps, "maxnreg": most}
    # The widest block, the most groups of values to a head, and what has the most planes.
    yield from written(architecture, given | {"n": "i32"}, 4, 128, 128)
    yield from written(architecture, given | {"n": "i32"}, 2, 128, 32)
    yield from written(architecture, given | {"n": "i32"}, 8, 256, 128)
    yield from written(architecture, given | {"n": "i32"}, 4, 128, 64)
    given |= {"ranges": "*i32"}
    for bits, rows, group, half in ((4, 1, 128, 0), (8, 8, 64, 0), (2, 1, 32, 2), (8, 1, 16, 0)):
        warps, most = attention_shape(128, 64, rows, 128 // group)
        own = constants | {"ROWS": rows, "G": group, "BITS": bits, "W": 8 * bits, "HALF": half}
        yield attend_per_token, f"{bits} bits, groups of {group}", given, own, {"num_warps": warps, "maxnreg": most}


def written(
    architecture: int, types: dict[str, str], bits: int, d: int, g: int
) -> Iterator[tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """What makes KIVI's cache of a prompt and of a token: heads of d channels in groups of g."""
    given = types | dict.fromkeys(("new_keys", "new_values"), "*bf16") | {"arrived": "*i32"}
    given |= dict.fromkeys((*STRIDES, "aged", "due", "residual"), "i32")
    own = {"KV": 32, "D": d, "G": g, "KB": bits, "VB": bits, "KF": bits, "VF": bits, "KW": d * bits // 16, "VW": d * bits // 16}
    own["PLAIN"] = False
    said, options = f"{bits} bits, {d} channels, groups of {g}", {"num_warps": writing_warps(g)}
    yield append_token, said, given, own | {"PIECE": PIECE, "EARLY": architecture >= 90}, options | {"maxnreg": REGISTERS}
    yield fill, said, given, own | {"PIECE": PIECE, "FEW": FEW_WRITTEN}, options


def _by_halves(types: dict[str, str]) -> Iterator[tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]]:
    from triton.experimental.gluon import language as gl

    from quant.kernels.lazy_update import halves
    from quant.kernels.lazy_update.hopper_halves import update_by_halves
    from quant.kernels.lazy_update.program_halves import split

    tile, own = UPDATED_BY_HALVES, types | {"left_back": "*fp32", "right_back": "*fp32"}
    own |= dict.fromkeys(("left_parts", "right_parts"), "*fp16") | dict.fromkeys(
        ("left_parts_stride", "right_parts_stride", "rights"), "i32"
    )
    constants = {"left_row": 1, "B": 512, "PADDED": 512, "TALL": 512, "WIDE": halves.WIDE}
    yield split, "512 columns", own, constants, {"num_warps": halves.WARPS}
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    own = own | {side: f"tensordesc<fp16[{tile.step},{n}],{layout!r}>" for side, n in (("left", tile.rows), ("right", tile.columns))}
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.step, "STAGES": tile.stages, "WARPS": tile.warps, "PADDED": 512}
    yield update_by_halves, "512 columns", own, constants, {"num_warps": tile.warps}


def _triangle(tile: syrk.Tile) -> tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]:
    from triton.experimental.gluon import language as gl

    from quant.kernels.hessian_syrk.hopper import add_lower as hopper

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    types = {"total": "*fp32", "x": f"tensordesc<bf16[{tile.step},{tile.rows}],{layout!r}>", "tiles": "*i32"}
    types |= dict.fromkeys(("sequences", "steps", "k"), "i32")
    constants = {"BLOCK": tile.rows, "STEP": tile.step, "PROMOTE": syrk.PROMOTE // tile.step, "STAGES": tile.stages, "WARPS": tile.warps}
    return hopper, "bf16", types, constants, {"num_warps": tile.warps}


def _source(kernel: Any) -> Any:
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _sums_of_integers(tile: Tile, zeros: int = 2) -> tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]:
    types = {"out": "*bf16", "row_sums": "*i32"} | dict.fromkeys(("row_scale", "row_zero", "scale", "zero", "sums"), "*fp32")
    types |= {"x": "*i8", "weight": "*i8"} | dict.fromkeys(("m", "n", "k"), "i32")
    constants: dict[str, Any] = {"ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.step, "GROUP": GROUP}
    constants |= {"ZERO": zeros > 0, "ROW_ZERO": zeros > 1}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    layout = ""
    if tile.gluon:
        from triton.experimental.gluon import language as gl

        layout = f",{gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)!r}"
    if tile.descriptors:
        heights = (("x", tile.rows), ("weight", tile.whole), ("beside", tile.columns - tile.whole or tile.whole))
        types |= {name: f"tensordesc<i8[{high},{tile.step}]{layout}>" for name, high in heights}
    of = f"int8 {tile.rows} x {tile.columns}"
    if not tile.gluon:
        return product_of_codes, of, types, constants | {"DESCRIPTORS": tile.descriptors, "WHOLE": True, "STAY": False}, options
    from quant.kernels.int8_linear.hopper import multiply as hopper
    from quant.kernels.int8_linear.program_specialized import multiply as specialized

    constants |= {"STAGES": tile.stages, "WIDE": min(128, tile.whole), "EARLY": True}
    constants |= {"COLUMNS": tile.whole, "ASIDE": tile.columns - tile.whole}
    registers = tile.registers(zeros)
    if registers is None:
        return hopper, of, types, constants | {"WARPS": tile.warps}, options
    types["x"] = f"tensordesc<i8[{tile.high},{tile.step}]{layout}>"
    del constants["ROWS"]
    constants |= {"HIGH": tile.high, "PARTS": tile.rows // tile.high, "FIRST": True, "REGISTERS": registers[1]}
    return specialized, f"specialized {of}", types, constants, {"num_warps": 4, "maxnreg": registers[0]}


def main(architecture: int) -> None:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for kernel, of, types, constants, options in chosen(architecture):
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        # Multiples of 16, as the launcher finds them: addresses, and the channels of models.
        named = kernel is update or "left_parts" in signature or "specialized" in of
        whole = (*EVEN, "r", "n") if named else EVEN
        even = [i for i, name in enumerate(kernel.arg_names) if name in whole or signature[name].startswith("*")]
        attrs = {(i,): [["tt.divisibility", 16]] for i in even}
        source = _source(kernel)(kernel, signature, constants, attrs)
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(made.asm["cubin"])
            f.flush()
            used, told = (
                subprocess.run([tools / "cuobjdump", f"--dump-{what}", f.name], capture_output=True, text=True, check=True).stdout
                for what in ("resource-usage", "sass")
            )
        numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", used)}
        row = {
            "architecture": architecture,
            "kernel": kernel.__name__,
            "of": of,
            "registers": numbers["REG"],
            "stack": numbers["STACK"] + numbers["LOCAL"],
        }
        row |= {"shared": made.metadata.shared, "tensor_cores": bool(re.search(r"wgmma|mma\.sync", made.asm["ptx"]))}
        # Kernels of two commits are timed alike where these are alike.
        row |= {"code": hashlib.sha256("\n".join(line for line in told.splitlines() if "/*" in line).encode()).hexdigest()[:12]}
        row |= {"waits": sorted(set(re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", made.asm["ptx"])))}
        print(json.dumps(row))


if __name__ == "__main__":
    for given in sys.argv[1:]:
        main(int(given))
