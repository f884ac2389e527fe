"""What needs more than the package to measure ops: optional libraries, a block beside torch, tuning, a run's report."""
