"""transformers' Llama on this project's ops: `patch(model)` swaps the classes of one model's layers."""

import importlib.util

from fastllama.errors import ExtraRequiredError

if importlib.util.find_spec("transformers") is None:
    raise ExtraRequiredError("fastllama.patch", "transformers", "hf")
