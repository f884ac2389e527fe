"""transformers' models on this project's ops.

`patch` for a Llama that stands, FastLlamaConfig for one to be quantized, `register` for the attention of any model.
"""

from fastllama.errors import ExtraRequiredError, why_unusable

if why_unusable("transformers"):
    raise ExtraRequiredError(__name__, "transformers", "hf")

from fastllama.integrations.transformers.flash import register

__all__ = ["register"]
