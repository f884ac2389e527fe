"""The fake GPU's environment: a virtual environment with torch's CUDA wheel and a Triton, and the fake libraries.

The wheels are large (torch 530 MB, Triton 190 MB), so each pair of versions is set up once, in build/fake-gpu. NVIDIA's
own libraries, on which torch's wheel depends, must not be installed: the fake ones replace them.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tools.fakegpu.build import SOURCES, build

ROOT = Path(__file__).parents[2]
HOME = ROOT / "build" / "fake-gpu"
HEADERS = ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-crt==13.0.88")
REQUIREMENTS = Path(__file__).parent / "requirements.txt"
PYTHON = (3, 12)
SITE = Path(__file__).parent / "site"


@dataclass(frozen=True)
class Environment:
    """The real software of one machine, over the fake GPU."""

    torch: str
    triton: str

    @property
    def folder(self) -> Path:
        """Folder of the environment."""
        return HOME / f"torch-{self.torch}-triton-{self.triton}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "venv" / "bin" / "python"

    @property
    def libraries(self) -> Path:
        """The fake ones."""
        return self.folder / "lib"

    @property
    def ready(self) -> bool:
        """Whether `set_up` has completed."""
        return (self.folder / "built").exists()

    @cached_property
    def packages(self) -> Path:
        """Where pip installs."""
        (found,) = self.folder.glob("venv/lib/python*/site-packages")
        return found

    def set_up(self) -> None:
        """Install and build what is missing. Raises CalledProcessError if pip or gcc fails."""
        installed = self.folder / "installed"
        wanted = f"{REQUIREMENTS.read_text(encoding='utf-8')}torch=={self.torch}\ntriton=={self.triton}\n"
        if not installed.exists() or installed.read_text(encoding="utf-8") != wanted:
            self._install()
            installed.write_text(wanted, encoding="utf-8")
        sources = "".join(path.read_text(encoding="utf-8") for path in _sources())
        built = self.folder / "built"
        if not built.exists() or built.read_text(encoding="utf-8") != sources:
            build(
                self.packages / "torch" / "lib", self.folder / "headers" / "nvidia" / "cu13" / "include", self.libraries
            )
            built.write_text(sources, encoding="utf-8")

    def _install(self) -> None:
        subprocess.run([newest_python(), "-m", "venv", "--clear", str(self.folder / "venv")], check=True)
        pip = [str(self.python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True)
        # Without dependencies: torch's wheel depends on NVIDIA's libraries.
        subprocess.run([*pip, "--no-deps", f"torch=={self.torch}", f"triton=={self.triton}"], check=True)
        subprocess.run([*pip, "--no-deps", "--target", str(self.folder / "headers"), "--upgrade", *HEADERS], check=True)

    def command(self, argv: list[str], log: Path | None = None, cache: Path | None = None) -> list[str]:
        """The command line that runs a command on the fake GPU, from ROOT; `python` is this environment's.

        log: prefix of each process's log file, followed by its id. cache: Triton's cache folder.
        """
        variables = {
            "LD_LIBRARY_PATH": self.libraries,
            "TRITON_LIBCUDA_PATH": self.libraries,
            "TRITON_CACHE_DIR": cache or self.folder / "triton",
            "PYTHONPATH": f"{ROOT}:{SITE}",
            "PYTHONUNBUFFERED": 1,
            "OMP_NUM_THREADS": 1,
        }
        if log is not None:
            variables["FAKEGPU_LOG"] = log
        given = [f"{name}={value}" for name, value in variables.items()]
        program = str(self.python) if argv[0] == "python" else argv[0]
        unset = ["-u", "TRITON_INTERPRET", "-u", "PYTEST_ADDOPTS"]
        return ["env", *unset, *given, program, *argv[1:]]


def current() -> Environment:
    """The environment of the running interpreter, else the GPU machines'."""
    home = Path(sys.prefix).parent
    if home.parent != HOME:
        return GPU_MACHINE
    _, torch, _, triton = home.name.split("-")
    return Environment(torch, triton)


def newest_python() -> str:
    """A Python of the GPU machines' version if installed, else the running one."""
    wanted = ".".join(map(str, PYTHON))
    candidates = [f"python{wanted}", *map(str, Path("~/.pyenv/versions").expanduser().glob(f"{wanted}.*/bin/python"))]
    for candidate in candidates:
        try:
            found = subprocess.run([candidate, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True)
        except OSError:
            continue
        if found.returncode == 0 and found.stdout.decode().strip() == str(PYTHON):
            return candidate
    return sys.executable


def _sources() -> list[Path]:
    return [Path(__file__).parent / "build.py", *sorted(SOURCES.glob("*.[ch]"))]


GPU_MACHINE = Environment(torch="2.11.0", triton="3.6.0")  # the versions on the GPU machines, with that Python
