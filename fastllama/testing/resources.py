"""Compiles one recorded launch and reads its resource usage from the machine code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastllama.testing import machine_code, triton_api
from fastllama.testing.machine_code import Mix
from fastllama.testing.recorder import Launch
from fastllama.testing.targets import Occupancy, Target, occupancy

NARROW = 32  # bits per thread at least, for a warp to use whole 128-byte lines

_NONE: Mapping[str, int] = {}
_NO_OCCUPANCY = Occupancy(0, 0, "")
_NO_CODE = Mix(0, {}, {}, 0, {}, 0)

_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
# Performance warnings are called "info", with a number: (C7512) is for serialised wgmma instructions.
_WARNING = re.compile(r"^ptxas.*(?:warning|\(C7\d+\)).*$", re.MULTILINE)


@dataclass(frozen=True)
class KernelReport:
    """One launch compiled for one target. Registers, spills and stack are those of one thread."""

    launch: str
    target: str
    error: str = ""  # why the fields below are empty: a compile error, or a missing tool
    num_warps: int = 0
    num_stages: int = 0
    registers: int = 0
    spilled_bytes: int = 0  # NVIDIA: stored and loaded, as ptxas counts them; AMD: four for each spilled register
    stack_bytes: int = 0
    shared_bytes: int = 0
    shared_limit: int = 0  # of one block
    tensor_memory: int = 0  # columns, on Blackwell
    occupancy: Occupancy = _NO_OCCUPANCY
    program: Mix = _NO_CODE
    loops: tuple[Mix, ...] = ()  # the innermost loops that access global memory
    warnings: tuple[str, ...] = ()  # from ptxas

    @property
    def hot(self) -> Mix:
        """The hot loop: the longest of the loops, or the whole program where there is none."""
        return max(self.loops, key=lambda loop: loop.instructions, default=self.program)

    def narrow(self, bits: int = NARROW) -> dict[str, int]:
        """Loads and stores of fewer than `bits` per thread in the loops, or in the program where there is none.

        "load 16" -> count.
        """
        found: dict[str, int] = {}
        for mix in self.loops or (self.program,):
            for access, count in mix.narrower_than(bits).items():
                found[access] = found.get(access, 0) + count
        return found

    def problems(self, narrowest: int = NARROW, besides: Mapping[str, int] = _NONE) -> list[str]:
        """The problems, one sentence each.

        narrowest: the minimum bits of a global access in a loop. besides: allowed numbers of narrower ones
        ({"load 16": 1}).
        """
        if self.error:
            return [self.error]
        narrow = {access: count for access, count in self.narrow(narrowest).items() if count > besides.get(access, 0)}
        listed = ", ".join(f"{count} x {access}" for access, count in narrow.items())
        place = "a loop" if self.loops else "a program without loops"
        found = {
            f"{self.spilled_bytes} bytes a thread are spilled": self.spilled_bytes > 0,
            f"{self.stack_bytes} bytes of stack a thread": self.stack_bytes > 0 and not self.spilled_bytes,
            f"{self.shared_bytes} bytes of shared memory, and a block may take {self.shared_limit}": (
                self.shared_bytes > self.shared_limit
            ),
            f"global accesses narrower than {narrowest} bits in {place}: {listed}": bool(narrow),
        }
        return [*(sentence for sentence, is_wrong in found.items() if is_wrong), *self.warnings]

    def to_json(self) -> dict[str, Any]:
        """Plain values, the inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> KernelReport:
        """The inverse of `to_json`."""
        rebuilt = {
            "occupancy": Occupancy(**values["occupancy"]),
            "program": Mix(**values["program"]),
            "loops": tuple(Mix(**loop) for loop in values["loops"]),
            "warnings": tuple(values["warnings"]),
        }
        return cls(**{**values, **rebuilt})


def compile_launch(launch: Launch) -> tuple[KernelReport, str]:
    """The report on a recorded launch, and its machine code as text.

    Where the kernel does not compile, a report with the compiler's error, and empty text.

    Raises triton_api.ToolMissingError where this installation of Triton cannot compile for the target.
    """
    target = launch.target
    try:
        compiled = triton_api.compile_source(launch.source, target.triton, launch.options)
    except triton_api.ToolMissingError:
        raise
    except Exception as error:  # a compiler can raise anything, from its own errors to a failed assertion
        return KernelReport(str(launch), target.name, error=f"does not compile: {triton_api.reason(error)}"), ""
    report = KernelReport(
        str(launch),
        target.name,
        num_warps=compiled.num_warps,
        num_stages=launch.options["num_stages"],
        shared_bytes=compiled.shared,
        shared_limit=target.shared_per_block,
        tensor_memory=compiled.tensor_memory,
    )
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        read = _with_code(_read_gcn(report, text), machine_code.gcn(text))
    else:
        text = triton_api.disassemble(compiled.asm["cubin"])
        read = _with_code(_read_ptxas(report, compiled.ptxas_log), machine_code.sass(text))
    return _with_occupancy(read, target), text


def _read_ptxas(report: KernelReport, log: str) -> KernelReport:
    stack, stores, loads = map(int, _only(_STACK, log))
    return replace(
        report,
        registers=int(_only(_REGISTERS, log)[0]),
        spilled_bytes=stores + loads,
        stack_bytes=stack,
        warnings=tuple(sorted(set(_WARNING.findall(log)))),
    )


def _read_gcn(report: KernelReport, text: str) -> KernelReport:
    def number(name: str) -> int:
        return int(_only(re.compile(rf"\.{name}:\s+(\d+)"), text)[0])

    return replace(
        report,
        registers=number("vgpr_count"),  # accumulation registers included: on CDNA 2 and 3 they share one file
        spilled_bytes=4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        stack_bytes=number("private_segment_fixed_size"),
        shared_bytes=max(report.shared_bytes, number("group_segment_fixed_size")),
    )


def _with_code(report: KernelReport, code: machine_code.Code) -> KernelReport:
    return replace(
        report,
        program=machine_code.mix(code.instructions),
        loops=tuple(machine_code.mix(body) for body in machine_code.memory_loops(code)),
    )


def _with_occupancy(report: KernelReport, target: Target) -> KernelReport:
    fits = occupancy(target, report.num_warps, report.registers, report.shared_bytes, report.tensor_memory)
    return replace(report, occupancy=fits)


def _only(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    """The groups of the only match: a kernel is one function, so the compiler reports once."""
    found = list(pattern.finditer(text))
    assert len(found) == 1, f"{pattern.pattern} occurs {len(found)} times in the compiler's output"
    return found[0].groups()
