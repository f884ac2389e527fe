"""Reports anyone can run on their device: parity of ops, layers, logits and tokens, and what quantization costs."""

from fastllama.verify.check import check
from fastllama.verify.comparison import Comparison, compare
from fastllama.verify.estimate import Estimate
from fastllama.verify.perplexity import Perplexity, perplexity, text_documents
from fastllama.verify.report import Report, Row

__all__ = [
    "Comparison",
    "Estimate",
    "Perplexity",
    "Report",
    "Row",
    "check",
    "compare",
    "perplexity",
    "text_documents",
]
