"""Parses Triton IR, the first stage of a compiled kernel: its values, their operands, and pointer offsets.

The text is that of `str(module)`, with locations and all helpers inlined. About 20 ms per kernel, without a GPU.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend

from fastllama.testing.recorder import Launch
from fastllama.testing.triton_api import quiet


def triton_ir(launch: Launch) -> str:
    """The Triton IR of a recorded launch, inlined and simplified, as input to the compiler's later stages."""
    target = launch.target.triton
    backend = make_backend(target)
    options = backend.parse_options({**launch.options, **launch.source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Callable[..., object]] = {}
    backend.add_stages(stages, options, launch.source.language)
    with quiet():
        functions = backend.get_codegen_implementation(options), backend.get_module_map()
        module = launch.source.make_ir(target, options, *functions, context)
        return str(stages["ttir"](module, dict(options.__dict__)))


# Operations whose values are unrelated to their operands.
_OPAQUE = re.compile(r"tt\.(load|atomic_\w+|descriptor_\w+)|arith\.cmp[if]|tt\.call")
# Operations with offsets: the index of the first offset operand.
_ROOTS = {"tt.addptr": 1, "tt.advance": 1, "tt.make_tensor_ptr": 1, "tt.make_tensor_descriptor": 1}


@dataclass(eq=False)
class Value:
    """An SSA value: its operation, operands, and the bits of its elements (0 where they are not integers)."""

    number: int
    name: str
    kind: str
    operands: list[Value]
    width: int
    text: str = ""  # of its line
    location: str = ""

    @property
    def sources(self) -> list[Value]:
        """The operands from which an overflow propagates."""
        if _OPAQUE.fullmatch(self.kind):
            return []
        return self.operands[1:] if self.kind == "arith.select" else self.operands


@dataclass
class _Region:
    """A region in braces: its names, its blocks and the branches to them, and its owning operation."""

    kind: str = ""
    names: dict[str, list[Value]] = field(default_factory=dict)
    owner: list[Value] = field(default_factory=list)  # results of its yield or return
    passed: list[Value] = field(default_factory=list)  # of a while: the operands of its condition
    blocks: dict[str, list[Value]] = field(default_factory=dict)
    branches: list[tuple[str, list[Value]]] = field(default_factory=list)


_LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_FILE = re.compile(r'^"([^"]*)":(\d+):\d+')
_SUFFIX = re.compile(r"\s+loc\((#loc\d*|[^()]*(?:\([^()]*\)[^()]*)*)\)\s*$")
_OPERATION = re.compile(r'^(?:(%.*?) = )?"?((?:[a-z_]+)\.[\w.]+)"?(.*)$')
_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_ARGUMENT = re.compile(r"(%[\w$.-]+): ([^%]*)")
_WIDTH = re.compile(r"(?:^|[x<])i(\d+)>*$")
_BRANCH = re.compile(r"(\^bb\d+)(?:\(([^:)]*))?")


class Reader:
    """Parses one function: its values in order of definition, and the offsets among them."""

    def __init__(self, text: str) -> None:
        self.values: list[Value] = []
        self.offsets: list[Value] = []
        self.kernel = ""
        self._locations: dict[str, str] = {}
        self._regions = [_Region()]
        for line in text.splitlines():
            if found := _LOCATION.match(line):
                self._locations[found[1]] = found[2]
            elif line.strip():
                suffix = _SUFFIX.search(line)
                self._line(line[: suffix.start()].strip() if suffix else line.strip(), suffix[1] if suffix else "")

    def place(self, location: str) -> tuple[str, str]:
        """The file and line of a location, and the source line: the innermost frame outside Triton's own library."""
        found = [(path, int(number)) for path, number in self._frames(location)]
        own = [each for each in found if not Path(each[0]).is_relative_to(Path(triton.__file__).parent)] or found
        if not own:
            return "?", ""
        path, number = own[0]
        return f"{Path(path).name}:{number}", linecache.getline(path, number).strip()

    def _frames(self, location: str) -> Iterator[tuple[str, str]]:
        if location in self._locations:
            location = self._locations[location]
        if found := _FILE.match(location):
            yield found[1], found[2]
            return
        for alias in re.findall(r"#loc\d*", location):  # an alias; a callee at its caller
            yield from self._frames(alias)

    def _line(self, line: str, location: str) -> None:
        if line.startswith("^bb"):
            self._block(line)
        elif line.startswith("tt.func"):
            self.kernel = line.split("@")[1].split("(")[0].strip('"')
            body = _Region("tt.func")
            self._regions.append(body)
            for name, kind in _ARGUMENT.findall(line):
                kind = re.sub(r"\s*(\{|loc\(|,|\)).*", "", kind)
                body.names[name] = [self._value(name, "argument", [], kind, line, location)]
        elif line.startswith("}"):
            self._close(line)
        elif found := _OPERATION.match(line):
            self._operation(found[1] or "", found[2], found[3], location)
        elif line.endswith("{"):  # module
            self._regions.append(_Region("module"))

    def _close(self, line: str) -> None:
        region = self._regions.pop()
        for label, operands in region.branches:
            for argument, operand in zip(region.blocks.get(label, []), operands, strict=False):
                argument.operands.append(operand)
        if line.startswith(("} else", "} do", "}, {")):
            following = _Region(region.kind, owner=region.owner, passed=region.passed)
            self._regions.append(following)

    def _block(self, line: str) -> None:
        region = self._regions[-1]
        label = line.split("(")[0].rstrip(":")
        arguments = []
        for at, (name, kind) in enumerate(_ARGUMENT.findall(line)):
            kind = re.sub(r"\s*(loc\(|,|\)).*", "", kind)
            if region.kind == "scf.while":
                value = region.passed[at]
            else:
                value = self._value(name, "phi", [], kind, line, "")
                if region.kind.startswith("tt."):  # a reduction's: from one of its operands
                    operands = region.owner[0].operands if region.owner else []
                    value.operands += [each for each in operands if each.width == value.width]
            region.names[name] = [value]
            arguments.append(value)
        region.blocks[label] = arguments

    def _operation(self, results: str, kind: str, rest: str, location: str) -> None:
        names = [each.split(":") for each in results.split(", ")] if results else []
        region, types = self._regions[-1], _types(rest)
        if kind == "scf.for":
            self._for(names, rest, location)
        elif kind == "scf.while":
            inner = _Region(kind)
            for name, start in re.findall(r"(%[\w$.-]+) = (%[\w$.#-]+)", rest):
                first = self._find(start)
                inner.names[name] = [self._value(name, "phi", [first], f"i{first.width}", rest, location)]
            inner.owner = [value for values in inner.names.values() for value in values]
            count = int(names[0][1]) if names and len(names[0]) > 1 else len(names)
            inner.passed = [self._value(names[0][0], "phi", [], "", rest, location) for _ in range(count)]
            if names:
                region.names[names[0][0]] = inner.passed
            self._regions.append(inner)
        elif kind in ("scf.yield", "scf.condition", "tt.reduce.return", "tt.scan.return"):
            operands = self._all(rest)
            if kind == "scf.condition":
                targets, operands = region.passed, operands[1:]
            else:
                targets = region.owner
            for target, operand in zip(targets, operands, strict=False):
                target.operands.append(operand)
                target.width = target.width or operand.width
        elif kind in ("cf.br", "cf.cond_br"):
            for label, arguments in _BRANCH.findall(rest):
                region.branches.append((label, self._all(arguments)))
        else:
            operands = self._all(rest)
            values = []
            for name in names:
                count = int(name[1]) if len(name) > 1 else 1
                made = [self._value(name[0], kind, list(operands), types, rest, location) for _ in range(count)]
                region.names[name[0]] = made
                values += made
            if kind == "scf.if":
                for value in values:
                    value.kind, value.operands, value.width = "phi", [], 0
            if kind in _ROOTS or kind.startswith("tt.descriptor_"):
                self.offsets += operands[_ROOTS.get(kind, 1) :]
            if rest.endswith("{"):
                self._regions.append(_Region(kind, owner=values))

    def _for(self, names: list[list[str]], rest: str, location: str) -> None:
        inner = _Region("scf.for")
        index = re.match(r"\s*(?:unsigned )?(%[\w$.-]+) = (%[\w$.#-]+) to (%[\w$.#-]+) step (%[\w$.#-]+)", rest)
        assert index is not None, rest
        bounds = [self._find(index[place]) for place in (2, 3, 4)]
        inner.names[index[1]] = [self._value(index[1], "index", bounds, f"i{bounds[0].width}", rest, location)]
        for name, start in re.findall(r"(%[\w$.-]+) = (%[\w$.#-]+)", rest[index.end() :]):
            first = self._find(start)
            value = self._value(name, "phi", [first], f"i{first.width}" if first.width else "", rest, location)
            inner.names[name] = [value]
            inner.owner.append(value)
        if names:
            self._regions[-1].names[names[0][0]] = list(inner.owner)
        self._regions.append(inner)

    def _value(self, name: str, kind: str, operands: list[Value], types: str, text: str, location: str) -> Value:
        width = _WIDTH.search(types)
        value = Value(len(self.values), name, kind, operands, int(width[1]) if width else 0, text, location)
        if kind.startswith("arith.cmp"):
            value.width = 1
        self.values.append(value)
        return value

    def _find(self, name: str) -> Value:
        base, _, place = name.partition("#")
        for region in reversed(self._regions):
            if base in region.names:
                return region.names[base][int(place or 0)]
        raise ValueError(f"Triton IR uses {name} before it is defined")

    def _all(self, text: str) -> list[Value]:
        return [self._find(name) for name in _NAME.findall(text)]


def _types(rest: str) -> str:
    """The result's type, from the end of an operation's line."""
    text = rest.rstrip(" {")
    return re.split(r" -> | to |, (?=[!a-z])|: ", text)[-1] if ":" in text else ""
