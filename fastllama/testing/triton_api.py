"""All differences between Triton versions (3.6 to the newest)."""

from __future__ import annotations

import contextlib
import inspect
import io
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.nvidia import compiler as nvidia
from triton.language import standard
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

__all__ = [
    "Compiled",
    "ToolMissingError",
    "TritonSemantic",
    "check_version",
    "compile_source",
    "compiler_state",
    "disassemble",
    "interpreter",
    "quiet",
    "reason",
]

# Private names that the repairs and checks of the interpreter replace or call.
_INTERPRETER = {
    interpreter: "_interpreter _implicit_cvt _patch_lang _patch_lang_tensor _get_np_dtype _ir interpreter_builder "
    "GridExecutor InterpreterBuilder InterpreterError ReduceOps ScanOps TensorHandle",
    interpreter.InterpreterBuilder: "binary_op ternary_op unary_op cast_impl create_assert create_dot create_fma "
    "create_fp_to_fp create_inline_asm create_maxnumf create_minnumf set_grid_dim set_grid_idx",
    interpreter.GridExecutor: "__call__ _init_args_hst",
    TritonSemantic: "binary_op_sanitize_overflow_impl",
    standard: "_xor_combine",
}


def check_version() -> None:
    """Raise RuntimeError unless this Triton's interpreter has the names that the repairs and checks replace."""
    missing = [
        f"{owner.__name__}.{name}"
        for owner, names in _INTERPRETER.items()
        for name in names.split()
        if not hasattr(owner, name)
    ]
    if missing:
        raise RuntimeError(f"the interpreter of Triton {triton.__version__} has no {', '.join(missing)}")


class ToolMissingError(RuntimeError):
    """This installation of Triton lacks a required program; the message names it and the searched place."""


@dataclass(frozen=True)
class Compiled:
    """The result of an ahead-of-time compile: every stage's text by Triton's name for it, and the log of ptxas."""

    asm: dict[str, Any]
    num_warps: int  # more than requested where a kernel is warp-specialised
    shared: int  # bytes
    tensor_memory: int  # columns of Blackwell's memory for tensor cores
    ptxas_log: str  # empty on AMD


def compile_source(source: Any, target: Any, options: Mapping[str, Any]) -> Compiled:
    """Compile a triton ASTSource for a GPUTarget that need not be present. Raises the compiler's errors.

    Triton's own cache is neither read nor written: ptxas logs only when it runs.
    """
    if target.backend == "cuda":
        if not hasattr(knobs.nvidia, "dump_ptxas_log"):
            raise ToolMissingError(f"Triton {triton.__version__} does not return the log of ptxas; 3.5 and newer do")
        _check_ptxas(target.arch)
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope(), quiet():
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(said):
            compiled = triton.compile(source, target=target, options=dict(options))
        metadata = compiled.metadata
        return Compiled(
            dict(compiled.asm),
            metadata.num_warps,
            metadata.shared,
            getattr(metadata, "tmem_size", 0),  # NVIDIA only
            said.getvalue(),
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide Triton 3.9's notice that 3.10 will by default compile `a * b + c` to two roundings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        yield


def compiler_state() -> str:
    """Inputs of a compile besides the source: the version, and the variables in the keys of Triton's cache."""
    return f"{triton.__version__} {sorted(get_cache_invalidating_env_vars().items())}"


def disassemble(cubin: bytes) -> str:
    """NVIDIA machine code as text. Raises ToolMissingError where there is no nvdisasm.

    Without its analysis of indirect jumps, which is not needed here: a quarter of its 0.25 s.
    """
    program = _found(lambda: knobs.nvidia.nvdisasm)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([program, "-c", "-ndf", str(path)], check=True, capture_output=True, text=True).stdout


def reason(error: BaseException) -> str:
    """A compile error in one line: the message of its cause, without the quoted source."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[-300:]}" if lines else type(error).__name__


def _check_ptxas(arch: int | str) -> None:
    """Check the ptxas for a target: Triton 3.6 added a second one for Blackwell, which 3.9 uses for Hopper too."""
    parameters = inspect.signature(nvidia.get_ptxas).parameters
    _found(lambda: nvidia.get_ptxas(arch) if parameters else nvidia.get_ptxas())


def _found(look: Callable[[], Any]) -> str:
    """The path of a program by Triton's own search: its environment variables, then its folder."""
    try:
        return str(look().path)
    except RuntimeError as error:
        folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        raise ToolMissingError(
            f"{error} in {folder}: this installation of Triton {triton.__version__} carries no NVIDIA tools. "
            "The wheel on PyPI does; AMD targets need none"
        ) from None
