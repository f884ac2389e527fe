"""transformers' Llama on this project's ops: `patch(model)` swaps the classes of one model's layers."""

from fastllama.errors import ExtraRequiredError, why_unusable

if why_unusable("transformers"):
    raise ExtraRequiredError("fastllama.patch", "transformers", "hf")
