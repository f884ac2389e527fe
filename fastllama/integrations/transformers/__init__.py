"""transformers' Llama on this project's ops: `patch` for one that stands, FastLlamaConfig for one to be quantized."""

from fastllama.errors import ExtraRequiredError, why_unusable

if why_unusable("transformers"):
    raise ExtraRequiredError(__name__, "transformers", "hf")
