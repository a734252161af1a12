"""Text of NVIDIA's PTX ▸ what `machine.cpp` reads: instructions on registers, of which constants and special registers are some."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
MODES = ("", "rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi")
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid|clusterid)\.[xyz]|%(laneid|cluster_ctarank|cluster_nctarank)")
PLAIN, BRANCH, EXIT, TOGETHER, ALIGNED = range(5)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{(.*)\}", re.DOTALL)
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z]+(\d+)\s+(?:\.ptr[^,]*?\s)?([\w$]+)(?:\[(\d+)\])?")
SHARED = re.compile(r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.[a-z]+(\d+)\s+([\w$]+)\[(\d*)\]")


@dataclass
class Kernel:
    name: str
    program: str
    texts: list[str]
    parameters: list[tuple[int, int]]
    """Of each its place among all and its bytes."""
    fixed: int
    """Bytes of static shared memory: where the dynamic one begins."""
    most: int = 1024
    """Threads of a block."""


@dataclass
class _Body:
    """What a function's statements are made into."""

    symbols: dict[str, tuple[str, int]]
    registers: dict[str, int] = field(default_factory=dict)
    constants: dict[tuple[str, int], int] = field(default_factory=dict)
    scopes: list[dict[str, str]] = field(default_factory=lambda: [{}])
    numbers: list[int] = field(default_factory=lambda: [0])
    """Of the scopes."""
    labels: dict[tuple[int, str], int] = field(default_factory=dict)
    lines: list[tuple[int, str, bool, list[tuple[int, str]], int, int, str, list[int], str]] = field(default_factory=list)
    made: int = 0

    def open(self) -> None:
        self.made += 1
        self.scopes.append({})
        self.numbers.append(self.made)

    def close(self) -> None:
        self.scopes.pop()
        self.numbers.pop()

    def known(self, name: str) -> str:
        return next((s[name] for s in reversed(self.scopes) if name in s), name)

    def register(self, name: str) -> int:
        return self.registers.setdefault(name, len(self.registers))

    def constant(self, kind: str, value: int) -> int:
        key = (kind, value % 2**64)
        if key not in self.constants:
            self.constants[key] = self.register(f"{kind} {value % 2**64}")
        return self.constants[key]

    def operand(self, text: str) -> int:
        name = self.known(text)
        if name != text:
            return self.register(name)
        if SPECIAL.fullmatch(text):
            return self.constant(text[1:], 0)
        if text.startswith("%"):
            return self.register(text)
        if text in self.symbols:
            return self.constant(*self.symbols[text])
        if text == "_":
            return self.register(text)
        return self.constant("value", number(text))

    def operands(self, text: str) -> list[int]:
        found = []
        for place, offset, plain in re.findall(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+))?\s*\]|([\w$%.-]+)", text):
            found += [self.operand(place), self.operand(offset or "0")] if place else [self.operand(plain)]
        return found


def number(text: str) -> int:
    if text[:2] in ("0f", "0F"):
        return int(text[2:], 16)
    if text[:2] in ("0d", "0D"):
        return int(text[2:], 16)
    try:
        return int(text.rstrip("U"), 0)
    except ValueError:
        if re.fullmatch(r"-?\d+\.\d*(e-?\d+)?", text):
            return int(struct.unpack("<Q", struct.pack("<d", float(text)))[0])
        raise ValueError(f"{text} is no register, symbol or number") from None


def statements(body: str) -> Iterator[str]:
    """Of a function, without their ";"; braces of scopes, and labels with their ":", by themselves."""
    text = ""
    for part in re.split(r"([;{}]|(?<![\w$:])[\w$]+:(?!:))", body):
        if part in "{}" and part and not text.strip():
            yield part
        elif part == ";":
            yield " ".join(text.split())
            text = ""
        elif part.endswith(":") and not text.strip():
            yield part
        else:
            text += part


def kernels(text: str) -> dict[str, str]:
    """Of each its whole text; of none what comes before the first."""
    first, *all_others = re.split(r"(?=\.entry\s)", text)
    return {"": first} | {own.split("(")[0].split()[1]: own for own in all_others}


def kernel(module: str, name: str) -> Kernel:
    """Raises ValueError for what is not understood."""
    texts = kernels(module)
    found = ENTRY.match(texts[name])
    if found is None:
        raise ValueError(f"{name} is not understood")
    _, given, limits, body = found.groups()
    body = re.sub(r"//[^\n]*|/\*.*?\*/", "", body, flags=re.DOTALL)
    symbols, parameters, end = {}, [], 0
    for align, size, symbol, count in PARAMETER.findall(given):
        whole = SIZES[size] * int(count or 1)
        end = -(-end // int(align or SIZES[size])) * int(align or SIZES[size])
        symbols[symbol] = ("value", end)
        parameters.append((end, whole))
        end += whole
    fixed, last = 0, []
    for extern, align, size, symbol, count in SHARED.findall(texts[""] + body):
        if extern:
            last.append((symbol, int(align)))
        elif re.search(re.escape(symbol) + r"\b(?!\[)", body):
            fixed = -(-fixed // int(align)) * int(align)
            symbols[symbol] = ("shared", fixed)
            fixed += SIZES[size] * int(count)
    fixed = -(-fixed // 16) * 16 if any(s in body for s, _ in last) else fixed
    for symbol, align in last:
        fixed = -(-fixed // align) * align if symbol in body else fixed
        symbols[symbol] = ("shared", fixed)
    made = _Body(symbols)
    for statement in statements(body):
        _read(made, statement)
    made.lines.append((EXIT, "", False, [], 0, 0, "ret", [], "the end"))
    lines = [f"R {len(made.registers)}", *(f"C {at} {kind} {value}" for (kind, value), at in made.constants.items())]
    for kind, guard, negated, target, n, width, own, at, said in made.lines:
        to = next((made.labels[label] for label in target if label in made.labels), -1)
        if kind == BRANCH and to < 0:
            raise ValueError(f"{said}: there is no such label")
        where = (-1 if not guard else made.registers[guard], int(negated), to)
        lines.append(" ".join(map(str, ("I", kind, *where, n, width, own, *at, "|", said))))
    threads = re.search(r"\.maxntid\s+(\d+),\s*(\d+),\s*(\d+)", limits)
    most = 1024 if threads is None else int(threads[1]) * int(threads[2]) * int(threads[3])
    return Kernel(name, "\n".join(lines), [line[-1] for line in made.lines], parameters, fixed, most)


def _read(to: _Body, statement: str) -> None:
    if statement == "{":
        to.open()
    elif statement == "}":
        to.close()
    elif statement.endswith(":"):
        to.labels[to.numbers[-1], statement[:-1]] = len(to.lines)
    elif statement.startswith(".reg"):
        for name in statement.split(None, 2)[2].split(","):
            if len(to.scopes) > 1 and "<" not in name:
                to.scopes[-1][name.strip()] = f"{name.strip()} {to.made}"
    elif statement.startswith((".shared", ".pragma")) or not statement:
        pass
    elif statement.startswith("."):
        raise ValueError(f"{statement} is not understood")
    else:
        _instruct(to, statement)


def _instruct(to: _Body, statement: str) -> None:
    found = re.fullmatch(r"(?:@(!?)([\w%$]+)\s+)?([\w.:]+)\s*(.*)", statement)
    if found is None:
        raise ValueError(f"{statement} is not understood")
    negated, guard, name, given = found.groups()
    guard = to.known(guard) if guard else ""
    if guard:
        to.register(guard)
    if name in ("bra", "bra.uni"):
        to.lines.append((BRANCH, guard, bool(negated), [(n, given) for n in reversed(to.numbers)], 0, 0, "bra", [], statement))
    elif name in ("ret", "exit"):
        to.lines.append((EXIT, guard, bool(negated), [], 0, 0, "ret", [], statement))
    else:
        kind, own, n, width = _named(name, given)
        to.lines.append((kind, guard, bool(negated), [], n, width, own, to.operands(given), statement))


def _named(name: str, given: str) -> tuple[int, str, int, int]:
    """Kind, name in the machine's table, elements of a vector, and bytes of one (negative: signed) or a mode."""
    parts = name.split(".")
    first, last = parts[0], parts[-1]
    width = SIZES.get(last[1:], 0)
    if first in ("ld", "st") and parts[1] != "async":
        space = [p for p in parts[1:] if p in ("param", "shared", "global")]
        n = next((int(p[1:]) for p in parts if p in ("v2", "v4")), 1)
        return PLAIN, ".".join([first, *space]), n, -width if last[0] == "s" else width
    if first == "cvt":
        mode = next((p for p in parts[1:-2] if p in MODES), "")
        return PLAIN, ".".join(["cvt", *(p for p in parts[1:] if p not in MODES)]), 0, MODES.index(mode)
    if first == "mov" and "{" in given:
        return PLAIN, "unpack" if given.startswith("{") else "pack", 0, width
    if first in ("mma", "bar", "barrier") and name != "bar.warp.sync":
        return ALIGNED, name if first == "mma" else name.replace(".aligned", ""), 0, 0
    if first in ("shfl", "vote", "redux") or name == "bar.warp.sync":
        return TOGETHER, name, 0, 0
    if first == "atom":
        return PLAIN, ".".join(p for p in parts if p != "gpu"), 0, 0
    if first == "mbarrier":
        return (
            PLAIN,
            ".".join(p for p in parts if p in ("mbarrier", "init", "arrive", "expect_tx", "test_wait", "try_wait", "parity")),
            0,
            0,
        )
    if name.startswith(("cp.async.ca.", "cp.async.cg.")):
        return PLAIN, "cp.async", 0, 0
    if name.startswith("cp.async.mbarrier"):
        return PLAIN, "cp.async.mbarrier.arrive.noinc", 0, 0
    if name.startswith("st.async"):
        return PLAIN, "st.async", 1, width
    return PLAIN, name, 0, 0
