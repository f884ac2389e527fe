"""Fixtures of every device test: torch as users run it, and failures printed at once."""

from __future__ import annotations

import pytest
import torch


class _AtOnce:
    """Prints a failure when it happens: a run that is cut short never reaches the summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:  # pytest-xdist's workers have none: they report to its controller
            terminal.ensure_newline()
            terminal.write_line(f"{report.when} of {report.nodeid} failed:\n{report.longreprtext}", flush=True)


def pytest_configure(config: pytest.Config) -> None:
    """Listen to every report."""
    config.pluginmanager.register(_AtOnce(config))


@pytest.fixture(autouse=True)
def _as_users_run_it(_poison_and_seed: None) -> None:
    """Deterministic mode off: it changes torch's kernels and warns of others. Outputs are poisoned singly."""
    torch.use_deterministic_algorithms(False)
