"""Extracts the signatures that the drop-in adapters must match, and writes the table of their arguments.

    mkdir -p build/signatures && cd build/signatures
    pip download --no-deps flashinfer-python==0.6.18.post1
    pip download --no-deps flashinfer-python==0.7.2.post1
    FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE pip download --no-deps --no-build-isolation flash-attn==2.8.3.post2
    cd ../..
    python -m tools.signatures read build/signatures/*    # writes tests/integrations/signatures/*.json
    python -m tools.signatures docs                       # writes the table of docs/use/integrations.md

Sources are parsed within the archive and never imported, so neither a GPU nor their dependencies are needed. The JSON
holds names, order, kinds and defaults of public parameters; functions that treatment.py (beside the JSON) lists as
missing here are written by name alone.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from typing import Any

from tests.integrations.signatures.treatment import TREATMENTS, Treatment

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "integrations" / "signatures"
PAGE = ROOT / "docs" / "use" / "integrations.md"
MARK = "## Every argument\n"  # from here on the page is generated
GENERATED = """
Written by `make docs` from `tests/integrations/signatures`: signatures read from the packages' sources, and what tests
hold us to. In parentheses: an argument of that variant or version alone; (here): of none of them, but of a fork of one.
Packed functions pass on the keywords of those that they call.
"""

# By distribution, the files that are read.
SOURCES = {
    "flash_attn": (
        "flash_attn/flash_attn_interface.py",
        "flash_attn/bert_padding.py",
        "hopper/flash_attn_interface.py",  # FlashAttention-3
        "flash_attn/cute/interface.py",  # FlashAttention-4
    ),
    "flashinfer_python": (
        "flashinfer/activation.py",
        "flashinfer/cascade.py",
        "flashinfer/decode.py",
        "flashinfer/norm/__init__.py",
        "flashinfer/page.py",
        "flashinfer/prefill.py",
        "flashinfer/rope.py",
        "flashinfer/sampling.py",
    ),
}

NAMES = """### Other names
Properties, and second names of functions, which take the same arguments: {}.
"""
# FlashAttention's three interfaces are one module here; each has a name of its own in the table.
VARIANTS = {
    "flash_attn.flash_attn_interface": ("flash_attn", "FA2"),
    "hopper.flash_attn_interface": ("flash_attn", "FA3"),
    "flash_attn.cute.interface": ("flash_attn", "FA4"),
}
HEAD = "| function | taken | ignored | refused |\n|---|---|---|---|"

# The parameters in order: name, kind as in `inspect`, and the default as source, if there is one;
# for what is not a function, the source of its value, or "property".
Signature = list[list[str]] | str


def signature(node: ast.FunctionDef, *, method: bool = False, positional: Iterable[str] = ()) -> Signature:
    """The parameters of a definition, without `self` of a method.

    positional: keyword-only parameters that are also accepted by position, in this order.
    """
    args = node.args
    named = [*args.posonlyargs, *args.args]
    defaults = [*[None] * (len(named) - len(args.defaults)), *args.defaults]
    keywords = {each.arg: default for each, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)}
    first = [(each.arg, default) for each, default in zip(named, defaults, strict=True)][1 if method else 0 :]
    first += [(name, keywords.pop(name)) for name in positional]
    found = [_parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default) for name, default in first]
    if args.vararg:
        found.append(_parameter(args.vararg.arg, Parameter.VAR_POSITIONAL))
    found += [_parameter(name, Parameter.KEYWORD_ONLY, default) for name, default in keywords.items()]
    if args.kwarg:
        found.append(_parameter(args.kwarg.arg, Parameter.VAR_KEYWORD))
    return found


def _parameter(name: str, kind: Any, default: ast.expr | None = None) -> list[str]:
    return [name, kind.description, *([ast.unparse(default)] if default else [])]


def signatures(source: str) -> dict[str, Signature]:
    """Signatures in a module's source: of each public function and method, and of other names for them."""
    body = ast.parse(source).body
    found = dict(_callables(body))
    # `plan` of FlashInfer's decode wrapper takes the arguments of this tuple by position, too
    legacy = [value for name, value in _assigned(body) if name.endswith("_LEGACY_POS_ARGS")]
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not _is_autograd(node):
            methods = _callables(node.body, method=True, legacy=ast.literal_eval(legacy[0]) if legacy else ())
            found |= {f"{node.name}.{name}": each for name, each in methods}
    return dict(sorted(found.items()))


def _callables(
    body: list[ast.stmt], *, method: bool = False, legacy: Iterable[str] = ()
) -> Iterator[tuple[str, Signature]]:
    # of overloads the last is the implementation
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    for name, node in functions.items():
        decorators = {ast.unparse(each) for each in node.decorator_list}
        if (name.startswith("_") and name != "__init__") or "functools.cache" in decorators:
            continue  # cached functions return compiled modules
        if "property" in decorators:
            yield name, "property"
        elif f"_{name}_impl" in functions and node.args.kwarg:  # it passes all its arguments on
            yield name, signature(functions[f"_{name}_impl"], method=method, positional=legacy)
        else:
            yield name, signature(node, method=method)
    for name, value in _assigned(body):
        partial = isinstance(value, ast.Call) and ast.unparse(value.func).startswith("functools.partial")
        of = value.args[0] if partial else value
        if not name.startswith("_") and (ast.unparse(of) in functions or ast.unparse(of).endswith(".apply")):
            yield name, ast.unparse(value)


def _assigned(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _is_autograd(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base) == "torch.autograd.Function" for base in node.bases)


def read(archive: Path) -> dict[str, Any]:
    """The JSON of an sdist or a wheel."""
    stem = archive.name.removesuffix(".tar.gz")
    package, version = stem.split("-")[:2]
    if package not in SOURCES:
        raise ValueError(f"{archive} is none of {', '.join(SOURCES)}")
    top = "" if archive.suffix == ".whl" else f"{stem}/"
    modules = {}
    for path in SOURCES[package]:
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        modules[module] = _without_absent(signatures(_source(archive, top + path)), treatment_of(package))
    here = {name.split(".")[0] for found in modules.values() for name, each in found.items() if each is not None}
    root = _source(archive, f"{top}{package.removesuffix('_python')}/__init__.py")
    return {"package": package, "version": version, "root": sorted(exported(root) & here), "modules": modules}


def exported(source: str) -> set[str]:
    """The names that a package's __init__ imports."""
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names}


def _without_absent(found: dict[str, Signature], treatment: Treatment) -> dict[str, Signature | None]:
    """None for absent functions; an absent class is one entry."""
    here: dict[str, Signature | None] = {}
    for name, each in found.items():
        if treatment.why_absent(owner := name.split(".")[0]):
            here[owner] = None
        else:
            here[name] = None if treatment.why_absent(name) else each
    return here


def treatment_of(package: str) -> Treatment:
    return TREATMENTS["flash_attn" if package == "flash_attn" else "flashinfer"]


def _source(archive: Path, path: str) -> str:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(path).decode()
    with tarfile.open(archive) as sdist:
        file = sdist.extractfile(path)
        assert file is not None, f"{path} is a file"
        return file.read().decode()


def as_json(value: Any, depth: int = 0) -> str:
    """JSON with each parameter on a line of its own, so that a changed one is one line of a diff."""
    if isinstance(value, dict):
        inner, ends = [f"{json.dumps(key)}: {as_json(each, depth + 1)}" for key, each in value.items()], "{}"
    elif isinstance(value, list) and value:
        inner, ends = [json.dumps(each) for each in value], "[]"
    else:
        return json.dumps(value)
    indent = "\n" + " " * depth
    return ends[0] + ",".join(f"{indent} {each}" for each in inner) + indent + ends[1]


@dataclass(frozen=True)
class Theirs:
    """A public name of a package, the module here that replaces its own, and its signature; None if absent."""

    package: str
    variant: str
    module: str
    name: str
    signature: Signature | None

    @property
    def treatment(self) -> Treatment:
        return treatment_of(self.package)

    def becomes(self, argument: str) -> tuple[str, str]:
        """The treatment of an argument, and its key in the table of treatments."""
        return self.treatment.of(self.module, self.name, argument)

    def ours(self) -> Any:
        """Its replacement here; a method as the class holds it. Raises AttributeError without one."""
        found: Any = import_module(f"fastllama.integrations.{self.module}")
        for part in self.name.split("."):
            found = inspect.getattr_static(found, part)
        return found

    def our_parameters(self) -> list[Parameter]:
        """Parameters of its replacement, without a method's self."""
        return list(inspect.signature(self.ours()).parameters.values())[1 if "." in self.name else 0 :]


def theirs() -> list[Theirs]:
    """All entries of the committed files."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        version = ".".join(file["version"].split(".")[:2])
        for module, names in file["modules"].items():
            module, variant = VARIANTS.get(module, (module, version))
            found += [Theirs(file["package"], variant, module, name, each) for name, each in names.items()]
    return found


def table() -> str:
    """The generated end of docs/use/integrations.md: by module and function, the treatment of each argument."""
    modules: dict[str, dict[str, list[Theirs]]] = {}
    for each in theirs():
        if isinstance(each.signature, list):
            modules.setdefault(each.module, {}).setdefault(each.name, []).append(each)
    parts = [MARK + GENERATED]
    for module, functions in modules.items():
        parts.append("\n".join([f"### {module}", HEAD, *map(_row, functions.values())]) + "\n")
    parts.append(NAMES.format(_listed({each.name for each in theirs() if isinstance(each.signature, str)})))
    for title, treatment in TREATMENTS.items():
        whys: dict[str, set[str]] = {}
        for argument, (_, why) in treatment.ignored.items():
            whys.setdefault(why, set()).add(".".join(argument.split(".")[-2:]))
        rows = [f"| {_listed(names)} | {why} |" for why, names in whys.items()]
        parts.append("\n".join([f"### Ignored by {title}", "| argument | because |\n|---|---|", *rows]) + "\n")
        rows = [f"| {_listed(set(names.split()))} | {why} |" for why, names in treatment.absent.items()]
        parts.append("\n".join([f"### Not in {title}", "| name | because |\n|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _listed(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _row(variants: list[Theirs]) -> str:
    """The row of a function: its arguments, and the variants that alone have them."""
    where: dict[str, list[str]] = {}
    for each in variants:
        for argument, *_ in each.signature or ():
            where.setdefault(argument, []).append(each.variant)
    for parameter in variants[0].our_parameters():
        if parameter.kind is not Parameter.VAR_KEYWORD:
            where.setdefault(parameter.name, ["here"])
    cells: dict[str, list[str]] = {"taken": [], "ignored": [], "refused": []}
    for argument, found in where.items():
        kind, _ = variants[0].becomes(argument)
        cells[kind].append(f"`{argument}`" + ("" if len(found) == len(variants) else f" ({', '.join(found)})"))
    return "| " + " | ".join([f"`{variants[0].name}`", *(", ".join(each) or "-" for each in cells.values())]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    reading = commands.add_parser("read", help="write the signatures that these archives hold")
    reading.add_argument("archives", nargs="+", type=Path)
    commands.add_parser("docs", help="write the table of docs/use/integrations.md")
    arguments = parser.parse_args()
    if arguments.command == "docs":
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(page[: page.index(MARK)] + table(), encoding="utf-8")
        return
    for archive in arguments.archives:
        found = read(archive)
        path = FOLDER / f"{found['package']}-{found['version']}.json"
        path.write_text(as_json(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
