"""From what a user calls a model (the packaged one, a path, a Hugging Face Hub id) to a path on this machine."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

from fastllama.errors import nearest

# Asked for by name, and offered when a name is mistyped.
KNOWN_MODELS = (
    *(f"meta-llama/Llama-2-{size}{kind}-hf" for size in ("7b", "13b", "70b") for kind in ("", "-chat")),
    *(f"codellama/CodeLlama-{size}{kind}-hf" for size in ("7b", "13b", "34b") for kind in ("", "-Python", "-Instruct")),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
)
_DESCRIPTIONS = ["*.json", "*.jinja", "tokenizer.model"]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PATH_ENDS = ("/", ".bin", ".pth", ".pt", ".safetensors", ".gguf", ".json")


def resolve_model(model: str) -> Path:
    """The folder, or the llama2.c file, that `model` means.

    "tiny" is the packaged model, an existing path is itself (the network is never asked), anything of the form
    owner/name is fetched from the Hugging Face Hub into its cache. Raises FileNotFoundError when there is no such model
    or it cannot be had, ValueError when the name cannot be one; each says what to do.
    """
    if model == "tiny":
        return Path(str(importlib.resources.files("fastllama"))) / "assets" / "tiny"
    path = Path(model).expanduser()
    if model and path.exists():
        return path
    if model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1 or model.endswith(_PATH_ENDS):
        raise FileNotFoundError(f"model is {model!r}, but no such file or folder exists")
    if not _HUB_ID.fullmatch(model):
        raise ValueError(
            f"model is {model!r}{_meant(model)}; legal: 'tiny', an existing path, or a Hub id as {KNOWN_MODELS[0]!r}"
        )
    return _download(model)


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        # Folders such as 'original/' repeat the weights in other formats, and so does .bin where safetensors exist.
        for weights in (["*.safetensors"], ["pytorch_model*.bin", "consolidated.*.pth"]):
            patterns = [*_DESCRIPTIONS, *weights]
            path = Path(snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=["*/*"]))
            if any(path.glob("*.safetensors")):
                break
    except HFValidationError as error:
        raise ValueError(f"model is {repo_id!r}, which is no Hub id ({error}); legal: owner/name") from None
    except GatedRepoError:  # a RepositoryNotFoundError too, so it comes first
        raise FileNotFoundError(
            f"{repo_id} is gated: accept its licence at https://huggingface.co/{repo_id}, then run 'hf auth login'"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repo_id} is not on the Hugging Face Hub{_meant(repo_id)}; if it is private, run 'hf auth login'"
        ) from None
    except LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"{repo_id} is not complete in the local cache and the Hugging Face Hub cannot be reached; "
            "go online once, or give a local path"
        ) from None
    except Exception as error:  # a full disk, or a failure of requests or httpx, whichever huggingface_hub uses
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"{repo_id} cannot be fetched: {reason}") from error
    return path


def _meant(model: str) -> str:
    known = {name.lower(): name for name in ("tiny", *KNOWN_MODELS)}
    known |= {name.split("/")[1].lower(): name for name in KNOWN_MODELS}
    hint = nearest(model.lower(), known)
    return f" (did you mean {known[hint]!r}?)" if hint and known[hint] != model else ""
