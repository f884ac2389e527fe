"""Builds the libraries that torch's CUDA wheel links: CUDA's runtime and driver from cuda/, the others empty.

The others (cuBLAS, cuDNN, NCCL, ...) have just the symbols that torch's libraries leave undefined. Each function
returns 0, which is success everywhere; a few also return a handle.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

SOURCES = Path(__file__).parent / "cuda"
RUNTIME, DRIVER = "libcudart.so", "libcuda.so"
HANDED_OUT = {
    "cudnnGetVersion": "unsigned long {name}(void) {{ return 92000; }}",
    "cublasCreate_v2": "int {name}(void **handle) {{ *handle = (void *)1; return 0; }}",
    "cublasLtCreate": "int {name}(void **handle) {{ *handle = (void *)1; return 0; }}",
    "cublasGetMathMode": "int {name}(void *handle, int *mode) {{ *mode = 0; return 0; }}",
    "cublasGetPointerMode_v2": "int {name}(void *handle, int *mode) {{ *mode = 0; return 0; }}",
    "cublasLtMatmulAlgoGetHeuristic": (
        "int {name}(void *a, void *b, void *c, void *d, void *e, void *f, void *g, int wanted, void *results,"
        " int *found) {{ *found = 1; return 0; }}"
    ),
}
NOTHING = "int {name}(void) {{ return 0; }}"
DECLARED = "int fake_violation(int, const char *, ...);\n"
UNKNOWN = 'int {name}(void) {{ return fake_violation(801, "{name}, which the fake GPU does not have"); }}'


def build(torch_libraries: Path, headers: Path, out: Path) -> None:
    """Write the libraries into `out`, for the torch whose libraries are in a folder. Raises CalledProcessError."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = unresolved(torch_libraries)
    names = {soname: soname.split(".so")[0] + ".so" for soname in wanted}
    played = {symbol for source in SOURCES.glob("*.c") for symbol in _defined(source)}
    (runtime,) = (soname for soname, name in names.items() if name == RUNTIME)
    (driver,) = (soname for soname, name in names.items() if name == DRIVER)
    missing = sorted((set(wanted[runtime]) | set(wanted[driver])) - played)
    rest = out / "unknown.c"
    rest.write_text(DECLARED + "".join(UNKNOWN.format(name=name) + "\n" for name in missing))
    script = out / "cudart.map"
    script.write_text(f"{runtime} {{ global: cu*; __cuda*; fakegpu_*; local: *; }};\n")
    sources = [*sorted(SOURCES.glob("*.c")), rest]
    options = [f"-I{headers}", f"-I{SOURCES}", "-lpthread", "-ldl"]
    _compile(out / runtime, sources, [f"-Wl,--version-script={script}", *options])
    empty = out / "empty.c"
    empty.write_text("")
    # The driver's soname resolves to the runtime, which holds both.
    _compile(out / driver, [empty], ["-Wl,--no-as-needed", f"-L{out}", f"-l:{runtime}", "-Wl,-rpath,$ORIGIN"])
    for soname, symbols in wanted.items():
        if soname not in (runtime, driver):
            _stub(out, soname, symbols)


def unresolved(folder: Path) -> dict[str, dict[str, str]]:
    """Undefined symbols of the libraries in a folder that NVIDIA's define, by soname, each with its version or ""."""
    files = sorted(folder.glob("*.so*"))
    needed = {name for file in files for name in _needed(file) if re.match(r"lib(cu|nccl|nv)", name)}
    defined = {symbol for file in files for symbol, _ in _symbols(file, "--defined-only")}
    found: dict[str, dict[str, str]] = {name: {} for name in needed}
    for file in files:
        for symbol, version in _symbols(file, "--undefined-only"):
            owner = None if symbol in defined else _owner(symbol, version, needed)
            if owner is not None:
                found[owner][symbol] = version
    return found


def _owner(symbol: str, version: str, sonames: Iterable[str]) -> str | None:
    """The library of a symbol: by its version, else the one with the longest prefix in common with the symbol."""
    if version in sonames:
        return version
    stems = {re.sub(r"_host$", "", name.split(".so")[0].removeprefix("lib")).lower(): name for name in sonames}
    stems["cuda"] = stems.pop("cudart", stems.get("cuda", ""))
    stems["cu"] = next((name for name in sonames if name.startswith(DRIVER)), "")
    plain = symbol.lstrip("_p").lower() if symbol.startswith(("__cuda", "pnccl")) else symbol.lower()
    fits = [stem for stem in stems if plain.startswith(stem) and stems[stem]]
    if not fits or (max(fits, key=len) == "cu" and not re.match(r"cu[A-Z]", symbol)):
        return None
    return stems[max(fits, key=len)]


def _stub(out: Path, soname: str, symbols: Mapping[str, str]) -> None:
    """A library of empty functions with the symbol versions that torch links."""
    source = out / f"{soname}.c"
    source.write_text("".join(HANDED_OUT.get(name, NOTHING).format(name=name) + "\n" for name in sorted(symbols)))
    versions = defaultdict(list)
    for name, version in symbols.items():
        versions[version].append(name)
    versions.pop("", None)
    options = ["-w", "-fno-builtin"]
    if versions:
        script = out / f"{soname}.map"
        script.write_text("".join(f"{key} {{ global: {'; '.join(names)}; }};\n" for key, names in versions.items()))
        options.append(f"-Wl,--version-script={script}")
    _compile(out / soname, [source], options)


def _compile(library: Path, sources: list[Path], options: list[str]) -> None:
    shared = ["gcc", "-std=gnu11", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{library.name}", "-o", str(library)]
    subprocess.run([*shared, *map(str, sources), *options], check=True)


def _defined(source: Path) -> list[str]:
    """The functions that a source file of cuda/ exports."""
    return re.findall(r"^\w[\w *]*?[ *]((?:cu|__cuda)\w+)\(", source.read_text(encoding="utf-8"), re.MULTILINE)


def _symbols(file: Path, which: str) -> list[tuple[str, str]]:
    """Names and versions of dynamic symbols."""
    lines = subprocess.run(["nm", "-D", which, str(file)], capture_output=True, text=True, check=True).stdout
    found = [line.split()[-1].partition("@") for line in lines.splitlines()]
    return [(name, version.lstrip("@")) for name, _, version in found]


def _needed(file: Path) -> list[str]:
    """The sonames that a library needs."""
    text = subprocess.run(["readelf", "-d", str(file)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", text)
