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
    """One environment variable; `legal` is empty when any text will do."""

    name: str
    default: str
    meaning: str
    legal: tuple[str, ...] = ()

    def read(self) -> str:
        """The variable's value now. Raises ValueError when it is not legal."""
        value = os.environ.get(self.name, self.default)
        if self.legal:
            check_choice(f"environment variable {self.name}", value, self.legal)
        return value

    @contextmanager
    def set_to(self, value: str) -> Iterator[None]:
        """Within, the variable has that value: for measurements of both sides of a switch in one process."""
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
    "Which implementation of every op runs. `auto`: by the tensors' device (Triton kernels on CUDA and HIP, the CPU "
    "implementation on CPU). `reference` forces the reference. `triton` forces the Triton kernel of every op that has "
    "one, and raises where it cannot run: on CPU tensors it also needs TRITON_INTERPRET=1. An op that has none runs as "
    "with `auto`; `fastllama info` says which. Read once for each op and device.",
    ("auto", "reference", "triton"),
)
_SWITCH = ("1", "0")
CHECK = Variable(
    "FASTLLAMA_CHECK",
    "0",
    "`1`: before each op, what its tensors hold is checked on the host: token ids, positions, slots, lengths, page ids "
    "and bounds of sequences; a ValueError names the first that is not legal. For debugging: on a GPU each op then "
    "waits for the device, so set FASTLLAMA_GRAPHS=0 as well. `0`: such a value gives NaN. Read once for each op and "
    "device.",
    _SWITCH,
)
GRAPHS = Variable(
    "FASTLLAMA_GRAPHS",
    "1",
    "`0`: no decode step is captured, neither as a CUDA graph nor, on a CPU, as a record of its ops; every step runs "
    "the modules. Read when an `LLM` is made.",
    _SWITCH,
)
PDL = Variable(
    "FASTLLAMA_PDL",
    "1",
    "`0`: no launch begins before the one before it has ended (programmatic dependent launch, NVIDIA from sm_90 on). "
    "Read when an op is called in a new way; calls like an earlier one stay as they were.",
    _SWITCH,
)
AHEAD = Variable(
    "FASTLLAMA_AHEAD",
    "1",
    "`0`: on a GPU, too, the next step is scheduled only after the tokens of the one before have been read. Read when "
    "an `LLM` is made.",
    _SWITCH,
)
TRITON_INTERPRET = Variable(
    "TRITON_INTERPRET",
    "0",
    "Triton's own variable: `1` runs Triton kernels in its NumPy interpreter, on CPU tensors. Slow; for tests. "
    "The `fastllama` command repairs its bf16; a program does that itself (docs/kernels/testing.md). Triton "
    "reads it when a kernel is defined, so set it before Python starts.",
)
XDG_CACHE_HOME = Variable(
    "XDG_CACHE_HOME",
    "~/.cache",
    "Where caches lie, a variable of the XDG Base Directory Specification: launch configurations tuned on this machine "
    "are read from its folder `fastllama/tuned/<gpu>`; CPU kernels that Numba compiled are kept in `fastllama/numba`, "
    "a few megabytes for each version, which may be removed at any time. Where that cannot be written, they are "
    "compiled anew in each process, and `fastllama info` says so. Empty or not absolute counts as not set, as it "
    "demands.",
)
NUMBA_CACHE_DIR = Variable(
    "NUMBA_CACHE_DIR",
    "",
    "Numba's own variable: where it is set, the machine code of CPU kernels lies in its folder `fastllama`. Read when "
    "Numba's kernels are loaded.",
)
API_KEY = Variable(
    "FASTLLAMA_API_KEY",
    "",
    "The API key that `fastllama serve` asks of its clients, of visible ASCII characters. Keys with limits, and more "
    "than one, stand in the file of `--api-keys`. Empty counts as not set. Read once, when the server starts.",
)
VARIABLES = (BACKEND, CHECK, GRAPHS, PDL, AHEAD, API_KEY, TRITON_INTERPRET, XDG_CACHE_HOME, NUMBA_CACHE_DIR)


def triton_interpret() -> bool:
    """Whether Triton kernels run in the interpreter, by Triton's own rule for the variable."""
    return TRITON_INTERPRET.read().lower() in ("1", "true", "on", "yes", "y")


def cache_dir() -> Path:
    """The folder for what can be made again, by the XDG rule; it need not exist, and without a home it cannot."""
    folder = Path(XDG_CACHE_HOME.read())
    if not folder.is_absolute():
        try:
            folder = Path(XDG_CACHE_HOME.default).expanduser()
        except RuntimeError:  # a user whom the system does not know, as in a container, and no HOME
            folder = Path(os.devnull)
    return folder / "fastllama"


def machine_code_dir() -> Path:
    """The folder for the machine code of CPU kernels; it need not exist."""
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
