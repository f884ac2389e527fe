"""transformers' models on fastllama's ops.

`patch` for a loaded Llama, FastLlamaConfig to quantize one while loading, `register` for the attention of any model.
"""

from fastllama.errors import ExtraRequiredError, why_unusable

if why_unusable("transformers"):
    raise ExtraRequiredError(__name__, "transformers", "hf")

from fastllama.integrations.transformers.flash import register

__all__ = ["register"]
