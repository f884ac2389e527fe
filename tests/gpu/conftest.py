"""What every test on a device gets: torch as users run it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _as_users_run_it(_poison_and_seed: None) -> None:
    """Torch's deterministic mode changes its own kernels and warns of others; here outputs are poisoned one by one."""
    torch.use_deterministic_algorithms(False)
