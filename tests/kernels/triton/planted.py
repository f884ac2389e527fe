"""A fault in a file of the Triton kernels, and the tests that must find it."""

from __future__ import annotations

from fastllama.testing.mutants import Mutant

KERNELS = "fastllama/kernels/triton"
TESTS = "tests/kernels"


def mutant(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """A fault in a kernel's file, and the tests under tests/kernels that find it in the interpreter."""
    return Mutant(name, f"{KERNELS}/{file}.py", old, new, ("-m", "interpreter", *(f"{TESTS}/{test}" for test in tests)))
