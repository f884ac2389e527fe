"""How a Triton kernel is launched: device facts, heuristics, tuned files, planned calls."""
