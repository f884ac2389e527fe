"""The parity report anyone can run on their device: our ops, layers, logits and tokens against an fp64 oracle."""

from fastllama.verify.check import check
from fastllama.verify.report import Report, Row

__all__ = ["Report", "Row", "check"]
