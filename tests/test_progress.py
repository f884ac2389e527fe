"""Progress bars: shown on a terminal or on request, silent without a standard error."""

from __future__ import annotations

import io
import sys

import pytest

from fastllama.progress import has_console, progress_bar


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("shown", [None, True, False])
@pytest.mark.parametrize("stderr", [None, closed()], ids=["none", "closed"])
def test_without_a_console_a_bar_counts_in_silence(
    monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO | None, shown: bool | None
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    assert not has_console()
    with progress_bar("Working", shown, total=3) as bar:
        bar.update(2)
    assert list(progress_bar("Working", shown, iterable=[1, 2])) == [1, 2]


def test_a_bar_that_is_asked_for_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    assert has_console()
    with progress_bar("Working", True, total=3) as bar:
        bar.update(3)
    assert "Working:" in stream.getvalue()
