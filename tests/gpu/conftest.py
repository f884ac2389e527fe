"""What every test on a device gets: torch as users run it, and its failure said at once."""

from __future__ import annotations

import pytest
import torch


class _AtOnce:
    """Prints a failure where it happens, not at the end, which a run that is cut short does not reach."""

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
    """Torch's deterministic mode changes its own kernels and warns of others; here outputs are poisoned one by one."""
    torch.use_deterministic_algorithms(False)
