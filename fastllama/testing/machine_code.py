"""Parses disassembled machine code (NVIDIA's SASS, AMD's GCN): instructions and loops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction, classified for reports."""

    name: str
    access: str = ""  # of global memory: "load", "store" or "atomic"
    bits: int = 0  # moved by one thread; 0 where the instruction does not encode it (a bulk copy by TMA)
    is_async: bool = False  # from global memory straight into shared memory
    matrix: str = ""  # the kind of tensor-core instruction: "HMMA", "HGMMA", "MFMA", ...
    jumps_to: str = ""
    falls_through: bool = True


@dataclass(frozen=True)
class Mix:
    """Counts over a range of code: global accesses by width ("128", "async 128", "bulk"), tensor-core by kind."""

    instructions: int
    loads: dict[str, int]
    stores: dict[str, int]
    atomics: int
    matrix: dict[str, int]
    bytes_moved: (
        int | None
    )  # by the global accesses of one thread, each counted once; None where a bulk copy moves some

    @property
    def instructions_per_byte(self) -> float | None:
        """Instructions per byte that a thread moves; None where it moves none, or an unknown number."""
        return self.instructions / self.bytes_moved if self.bytes_moved else None

    def narrower_than(self, bits: int) -> dict[str, int]:
        """Loads and stores of fewer than `bits`, as "load 16" -> count."""
        accesses = [("load", self.loads), ("store", self.stores)]
        return {
            f"{kind} {width}": count
            for kind, widths in accesses
            for width, count in widths.items()
            if width != "bulk" and int(width.split()[-1]) < bits
        }


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, and the position of each label."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def mix(instructions: Iterable[Instruction]) -> Mix:
    """Count."""
    instructions = list(instructions)
    accesses = [each for each in instructions if each.access in ("load", "store")]
    widths = {"load": Counter[str](), "store": Counter[str]()}
    for each in accesses:
        widths[each.access][("async " if each.is_async else "") + str(each.bits) if each.bits else "bulk"] += 1
    known = all(each.bits for each in accesses)
    return Mix(
        instructions=len(instructions),
        loads=dict(sorted(widths["load"].items())),
        stores=dict(sorted(widths["store"].items())),
        atomics=sum(each.access == "atomic" for each in instructions),
        matrix=dict(sorted(Counter(each.matrix for each in instructions if each.matrix).items())),
        bytes_moved=sum(each.bits for each in accesses) // 8 if known else None,
    )


def loops(code: Code) -> list[list[Instruction]]:
    """The bodies of the natural loops, merged by head. Bodies of outer loops include the inner ones.

    Not every backward jump is a loop: compilers move cold paths to the end, and these jump back too. A loop's head
    dominates the jump to it.
    """
    starts, successors = _blocks(code)
    dominators = _dominators(successors)
    predecessors: list[list[int]] = [[] for _ in starts]
    for block, following in enumerate(successors):
        for next_block in following:
            predecessors[next_block].append(block)
    bodies: dict[int, set[int]] = {}
    for tail, following in enumerate(successors):
        for head in following:
            if tail in dominators and head in dominators[tail]:
                body, todo = bodies.setdefault(head, {head}), [tail]
                while todo:
                    block = todo.pop()
                    if block not in body and block in dominators:
                        body.add(block)
                        todo += predecessors[block]
    ends = [*starts[1:], len(code.instructions)]
    return [
        [each for block in sorted(body) for each in code.instructions[starts[block] : ends[block]]]
        for _, body in sorted(bodies.items())
        if any(code.instructions[starts[block] : ends[block]] for block in body)
    ]


def memory_loops(code: Code) -> list[list[Instruction]]:
    """The innermost loops that access global memory; loops that wait for a barrier do not count."""
    bodies = [body for body in loops(code) if any(each.access for each in body)]
    members = [{id(each) for each in body} for body in bodies]
    return [body for body, own in zip(bodies, members, strict=True) if not any(other < own for other in members)]


def _blocks(code: Code) -> tuple[list[int], list[list[int]]]:
    """Basic blocks: the start of each, and its successors."""
    count = len(code.instructions)
    targets = {code.labels[each.jumps_to] for each in code.instructions if each.jumps_to in code.labels}
    behind = {i + 1 for i, each in enumerate(code.instructions) if each.jumps_to or not each.falls_through}
    starts = sorted(start for start in {0} | targets | behind if start < count)
    number = {start: block for block, start in enumerate(starts)}
    successors = []
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        last = code.instructions[end - 1] if end > start else None
        following = []
        if last is not None and last.jumps_to in code.labels and code.labels[last.jumps_to] in number:
            following.append(number[code.labels[last.jumps_to]])
        if end in number and (last is None or last.falls_through):
            following.append(number[end])
        successors.append(following)
    return starts, successors


def _dominators(successors: list[list[int]]) -> dict[int, set[int]]:
    """The dominators of each block that is reachable from block 0, itself included."""
    order, seen, todo = [], {0}, [0]
    while todo:
        block = todo.pop()
        order.append(block)
        for each in successors[block]:
            if each not in seen:
                seen.add(each)
                todo.append(each)
    dominators = {block: set(order) for block in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order:
            for each in successors[block]:
                if each == 0:
                    continue
                before = len(dominators[each])
                # Intersect over predecessors, one edge at a time: sets only shrink.
                dominators[each] &= dominators[block] | {each}
                changed |= len(dominators[each]) != before
    return dominators


_SASS = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SASS_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_SASS_JUMP = re.compile(r"`\((\.L_x_\d+)\)")
_SASS_MATRIX = re.compile(r"(?:[HIQOBDE]G?MMA|UTC\w*MMA)$")
_SASS_ACCESSES = {
    "LDG": "load",
    "LD": "load",
    "LDGSTS": "load",
    "UBLKCP": "load",
    "UTMALDG": "load",
    "STG": "store",
    "ST": "store",
    "UTMASTG": "store",
    "ATOM": "atomic",
    "ATOMG": "atomic",
    "RED": "atomic",
    "REDG": "atomic",
    "UTMAREDG": "atomic",
}


def sass(text: str) -> Code:
    """NVIDIA machine code as `nvdisasm -c` prints it, padding left out."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := _SASS_LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif (found := _SASS.match(line)) and found[2] != "NOP":
            instructions.append(_sass_instruction(bool(found[1]), found[2], found[3]))
    # An unreachable jump to itself follows the last instruction.
    if instructions and labels.get(instructions[-1].jumps_to) == len(instructions) - 1:
        instructions.pop()
    return Code(tuple(instructions), labels)


def _sass_instruction(predicated: bool, name: str, operands: str) -> Instruction:
    base = name.split(".")[0]
    access = _SASS_ACCESSES.get(base, "")
    is_jump = base in ("BRA", "BRX", "JMP")
    jump = _SASS_JUMP.search(operands) if is_jump else None
    # A jump with its condition as an operand: `BRA.U UP0, ...`.
    always = not predicated and (base in ("EXIT", "RET", "BRX") or (is_jump and operands.startswith("`")))
    return Instruction(
        name=name,
        access=access,
        bits=0 if not access or base.startswith(("UTMA", "UBLK")) else _sass_bits(name),
        is_async=base == "LDGSTS",
        matrix=base if _SASS_MATRIX.match(base) else "",
        jumps_to=jump[1] if jump else "",
        falls_through=not always,
    )


def _sass_bits(name: str) -> int:
    for part in name.split(".")[1:]:
        if part in ("256", "128", "64"):
            return int(part)
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:])
    return 32


_GCN = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*(.*)$")
_GCN_LABEL = re.compile(r"^(\.LBB\w+):")
_GCN_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store|atomic)_(lds_)?(\w+)")
_GCN_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}


def gcn(text: str) -> Code:
    """AMD machine code as LLVM prints it, padding left out."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := _GCN_LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif (found := _GCN.match(line)) and found[1] not in ("s_nop", "s_code_end"):
            instructions.append(_gcn_instruction(found[1], found[2].split(";")[0].strip()))
    return Code(tuple(instructions), labels)


def _gcn_instruction(name: str, operands: str) -> Instruction:
    found = _GCN_ACCESS.match(name)
    access = found[1] if found else ""
    return Instruction(
        name=name,
        access=access,
        bits=_gcn_bits(found[3]) if found and access != "atomic" else 0,
        is_async=bool(found and found[2]) or (bool(access) and operands.endswith(" lds")),
        matrix="MFMA" if "mfma" in name or "smfmac" in name else "",
        jumps_to=operands if name == "s_branch" or name.startswith("s_cbranch") else "",
        falls_through=name not in ("s_branch", "s_endpgm", "s_setpc_b64"),
    )


def _gcn_bits(width: str) -> int:
    """Bits of `dwordx4`, `ushort`, `sbyte`, `short_d16_hi`."""
    word = width.split("_")[0]
    return _GCN_BITS[word if word in _GCN_BITS else word[1:]]
