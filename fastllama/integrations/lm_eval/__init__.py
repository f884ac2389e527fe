"""EleutherAI's lm-evaluation-harness on fastllama's runtime: importing it adds "fastllama" to lm-eval's models."""

from fastllama.errors import ExtraRequiredError, why_unusable

if why_unusable("lm_eval"):
    raise ExtraRequiredError(__name__, "lm_eval", "eval")

from fastllama.integrations.lm_eval.model import FastLlamaLM

__all__ = ["FastLlamaLM"]
