"""The only reader of the environment: every variable with its default, legal values and meaning.

`python -m fastllama.env` prints docs/reference/env.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastllama.errors import check_choice


@dataclass(frozen=True)
class Variable:
    """One environment variable; an empty `legal` accepts any text."""

    name: str
    default: str
    meaning: str
    legal: tuple[str, ...] = ()

    def read(self) -> str:
        """The current value. Raises ValueError when it is not legal."""
        value = os.environ.get(self.name, self.default)
        if self.legal:
            check_choice(f"environment variable {self.name}", value, self.legal)
        return value

    @contextmanager
    def set_to(self, value: str) -> Iterator[None]:
        """Set the variable within a `with` block, to measure both values of a switch in one process."""
        before = os.environ.get(self.name)
        os.environ[self.name] = value
        try:
            yield
        finally:
            del os.environ[self.name]
            if before is not None:
                os.environ[self.name] = before


BACKEND = Variable(
    "FASTLLAMA_BACKEND",
    "auto",
    "The backend of every op. `auto`: by the tensors' device (Triton kernels on CUDA and HIP, the CPU implementation "
    "on CPU). `reference` forces the PyTorch reference. `triton` forces the Triton kernel of every op that has one and "
    "raises where it cannot run: on CPU tensors it also needs TRITON_INTERPRET=1. An op without one runs as with "
    "`auto`; `fastllama info` lists them. Read once for each op and device.",
    ("auto", "reference", "triton"),
)
_SWITCH = ("1", "0")
CHECK = Variable(
    "FASTLLAMA_CHECK",
    "0",
    "`1`: before each op, the contents of its index tensors are checked on the host: token ids, positions, slots, "
    "lengths, page ids and sequence bounds; a ValueError names the first illegal value. For debugging: on a GPU each "
    "op then synchronizes with the device, so set FASTLLAMA_GRAPHS=0 as well. `0`: an illegal value gives NaN. Read "
    "once for each op and device.",
    _SWITCH,
)
GRAPHS = Variable(
    "FASTLLAMA_GRAPHS",
    "1",
    "`0`: decode steps run eagerly through the modules; `1` captures them as CUDA graphs or, on a CPU, as a recorded "
    "list of ops. Read when an `LLM` is made.",
    _SWITCH,
)
PDL = Variable(
    "FASTLLAMA_PDL",
    "1",
    "`1`: programmatic dependent launch: a kernel may start before the previous one has ended (NVIDIA, from sm_90 on). "
    "`0`: off. Read when an op is first called with new shapes, strides or dtypes; later such calls reuse it.",
    _SWITCH,
)
AHEAD = Variable(
    "FASTLLAMA_AHEAD",
    "1",
    "Asynchronous scheduling on a GPU: with `1` the next step is scheduled before the tokens of the previous one have "
    "been read, with `0` after. Read when an `LLM` is made.",
    _SWITCH,
)
TRITON_INTERPRET = Variable(
    "TRITON_INTERPRET",
    "0",
    "Triton's own variable: `1` runs Triton kernels in its NumPy interpreter, on CPU tensors. Slow; for tests. The "
    "`fastllama` command patches the interpreter's bf16 rounding; other programs have to do it themselves "
    "(docs/kernels/testing.md). Triton reads it when a kernel is defined, so set it before Python starts.",
)
XDG_CACHE_HOME = Variable(
    "XDG_CACHE_HOME",
    "~/.cache",
    "The folder of caches, by the XDG Base Directory Specification: launch configurations tuned on this machine are "
    "read from `fastllama/tuned/<gpu>` in it; CPU kernels compiled by Numba are kept in `fastllama/numba`, a few "
    "megabytes per version, which may be removed at any time. Where that cannot be written, they are compiled again in "
    "each process, as `fastllama info` reports. An empty or relative path counts as not set, as XDG requires.",
)
NUMBA_CACHE_DIR = Variable(
    "NUMBA_CACHE_DIR",
    "",
    "Numba's own variable: where it is set, compiled CPU kernels are kept in its folder `fastllama`. Read when Numba's "
    "kernels are loaded.",
)
API_KEY = Variable(
    "FASTLLAMA_API_KEY",
    "",
    "The API key that `fastllama serve` requires of its clients, of visible ASCII characters. Several keys, or keys "
    "with limits, go into the file of `--api-keys`. Empty counts as not set. Read once, when the server starts.",
)
VARIABLES = (BACKEND, CHECK, GRAPHS, PDL, AHEAD, API_KEY, TRITON_INTERPRET, XDG_CACHE_HOME, NUMBA_CACHE_DIR)


def triton_interpret() -> bool:
    """Whether Triton kernels run in the interpreter, by Triton's own rule for the variable."""
    return TRITON_INTERPRET.read().lower() in ("1", "true", "on", "yes", "y")


def cache_dir() -> Path:
    """The cache folder, by the XDG rule; it need not exist, and cannot for a user without a home."""
    folder = Path(XDG_CACHE_HOME.read())
    if not folder.is_absolute():
        try:
            folder = Path(XDG_CACHE_HOME.default).expanduser()
        except RuntimeError:  # a user without a passwd entry, as in a container, and no HOME
            folder = Path(os.devnull)
    return folder / "fastllama"


def machine_code_dir() -> Path:
    """The cache folder of compiled CPU kernels; it need not exist."""
    given = NUMBA_CACHE_DIR.read()
    return Path(given).absolute() / "fastllama" if given else cache_dir() / "numba"


def markdown() -> str:
    """The text of docs/reference/env.md."""
    legal = {v: ", ".join(f"`{word}`" for word in v.legal) or "any" for v in VARIABLES}
    rows = [f"| `{v.name}` | `{v.default}` | {legal[v]} | {v.meaning} |" for v in VARIABLES]
    head = "# Environment variables\n\nGenerated by `make docs` from `fastllama/env.py`; edit it there.\n\n"
    return head + "\n".join(["| variable | default | legal | meaning |", "|---|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
