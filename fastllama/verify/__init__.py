"""Reports for the user's device: parity of ops, layers, logits and tokens, and the loss of quantization."""

from fastllama.io.documents import text_documents
from fastllama.verify.check import check
from fastllama.verify.comparison import Comparison, compare
from fastllama.verify.estimate import Estimate
from fastllama.verify.outliers import plant_outliers
from fastllama.verify.perplexity import Perplexity, perplexity
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
    "plant_outliers",
    "text_documents",
]
