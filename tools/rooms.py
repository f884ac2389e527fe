"""Counts the imports between folders of the package, and cycles: `python -m tools.rooms [ROOT]`.

Each folder is a room; the files and folders in it are its boxes. An arrow is an import between two boxes of one room,
from any depth; a circle is a strongly connected set of boxes; floors are the boxes on the longest chain of arrows, with
a circle as one. `tests/contracts/test_imports.py` allows no circle.
"""

from __future__ import annotations

import argparse
import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


def module_name(path: Path, root: Path = ROOT) -> str:
    """The module name of a file under root."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, root: Path = ROOT) -> set[str]:
    """Every module that a file imports, also within functions, by absolute name."""
    here = module_name(path, root).split(".")
    if path.name != "__init__.py":
        here = here[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # `from fastllama import env` imports the module fastllama.env: keep both readings
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


@dataclass(frozen=True)
class Room:
    """A folder: its name, the number of files directly in it, and for each box the boxes that it imports."""

    name: str
    files: int
    arrows: dict[str, set[str]]

    @property
    def circles(self) -> list[list[str]]:
        """Sets of boxes that import each other."""
        reach = {box: self._reached(box) for box in self.arrows}
        together = {frozenset({box, *(other for other in reach[box] if box in reach[other])}) for box in reach}
        return sorted(sorted(each) for each in together if len(each) > 1)

    @property
    def floors(self) -> int:
        """Number of boxes on the longest chain of imports."""
        reach = {box: self._reached(box) for box in self.arrows}
        below = {box: {other for other in reach[box] if box not in reach[other]} for box in reach}
        height: dict[str, int] = {}
        for box in sorted(below, key=lambda box: len(below[box])):
            height[box] = 1 + max((height[other] for other in below[box]), default=0)
        return max(height.values(), default=0)

    def _reached(self, box: str) -> set[str]:
        found: set[str] = set()
        new = {box}
        while new:
            new = set().union(*(self.arrows[each] for each in new)) - found
            found |= new
        return found


def rooms(root: Path = ROOT) -> list[Room]:
    """Every folder of the package under root."""
    paths = sorted((root / "fastllama").rglob("*.py"))
    modules = {module_name(path, root): imported(path, root) for path in paths}
    found = []
    for folder in sorted({path.parent for path in paths}):
        name = ".".join(folder.relative_to(root).parts)
        boxes = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        files = len(boxes)
        boxes |= {path.parent.name for path in folder.glob("*/__init__.py")}
        arrows: dict[str, set[str]] = {box: set() for box in sorted(boxes)}
        for module, targets in modules.items():
            if box := _box(module, name, boxes):
                arrows[box] |= {other for each in targets if (other := _box(each, name, boxes)) and other != box}
        found.append(Room(name, files, arrows))
    return found


def _box(module: str, room: str, boxes: set[str]) -> str | None:
    """The box of a room that contains a module."""
    if not module.startswith(f"{room}."):
        return None
    box = module.removeprefix(f"{room}.").split(".")[0]
    return box if box in boxes else None


def main() -> None:
    """Print a line for each room."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="another checkout")
    print(f"{'room':<40}{'files':>7}{'boxes':>7}{'arrows':>8}{'floors':>8}  circles")
    for room in rooms(parser.parse_args().root.resolve()):
        circles = "; ".join(", ".join(circle) for circle in room.circles) or "none"
        arrows = sum(map(len, room.arrows.values()))
        print(f"{room.name:<40}{room.files:>7}{len(room.arrows):>7}{arrows:>8}{room.floors:>8}  {circles}")


if __name__ == "__main__":
    main()
