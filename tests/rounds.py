"""The two rounds of tests: `make test` runs the quick one, `make test-all` also tests marked `exhaustive`.

`@pytest.mark.exhaustive`: the test, or with `pytest.param(..., marks=...)` the case, repeats another:
the same kernel and code path, with other numbers.
`@pytest.mark.in_turn("heads", "page_size")`: of a grid in the interpreter, the named parameters take turns. In the
quick round each of their values occurs, and each combination of the others, but not each of one with each of the other:
a grid of 3 dtypes x 4 heads x 3 page sizes is 4 cases instead of 36.
"""

from __future__ import annotations

from typing import Any

import pytest

_TIERS = {"interpreter", "compile", "gpu", "fakegpu"}


def exhaustive(*values: Any, id: str | None = None) -> Any:
    """A case of a parametrisation that only the full round runs."""
    return pytest.param(*values, marks=pytest.mark.exhaustive, id=id)


def repeats(item: pytest.Item) -> bool:
    """Whether a case of a grid is left to the full round, by its test's `in_turn`.

    The k-th case of the quick round has the k-th value of each parameter, counted cyclically. All this is of the
    interpreter, where a case takes 0.1 to 1 s; compiled for the CPU it takes milliseconds.
    """
    marker = item.get_closest_marker("in_turn")
    if marker is None or item.get_closest_marker("interpreter") is None:
        return False
    assert isinstance(item, pytest.Function)
    given = item.callspec.params
    assert set(marker.args) <= set(given), f"{item.nodeid}: {marker.args} take turns; legal: {', '.join(given)}"
    turns, rest = [], (0, 1)
    for grid in item.iter_markers("parametrize"):
        names = [grid.args[0]] if isinstance(grid.args[0], str) else list(grid.args[0])
        values = list(grid.args[1])
        at = next(place for place, value in enumerate(values) if _holds(value, [given[name] for name in names]))
        own = [place for place, value in enumerate(values) if _tiers(value) == _tiers(values[at])]  # a process runs one
        axis = own.index(at), len(own)
        if set(names) & set(marker.args):
            turns.append(axis)
        else:
            rest = rest[0] * axis[1] + axis[0], rest[1] * axis[1]
    turns.append(rest)
    rounds = range(max(size for _, size in turns))
    return not any(all(k % size == place for place, size in turns) for k in rounds)


def _holds(value: Any, expected: list[Any]) -> bool:
    """Whether an entry of a parametrisation gives these arguments."""
    given = getattr(value, "values", None) if hasattr(value, "marks") else value if len(expected) > 1 else [value]
    return all(ours is theirs for ours, theirs in zip(given, expected, strict=True))


def _tiers(value: Any) -> set[str]:
    return _TIERS & {mark.name for mark in getattr(value, "marks", ())}
