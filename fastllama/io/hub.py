"""Resolves a model's name ("tiny", a path, a Hugging Face Hub id) to a local path."""

from __future__ import annotations

import importlib.resources
import os
import re
from pathlib import Path
from urllib.parse import unquote

from fastllama.errors import nearest, why_unusable
from fastllama.progress import has_console

# Suggested when a name is mistyped.
KNOWN_MODELS = (
    *(f"meta-llama/Llama-2-{size}{kind}-hf" for size in ("7b", "13b", "70b") for kind in ("", "-chat")),
    *(f"codellama/CodeLlama-{size}{kind}-hf" for size in ("7b", "13b", "34b") for kind in ("", "-Python", "-Instruct")),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
)
# Weights in order of preference: .bin files duplicate safetensors where both exist.
_WEIGHTS = (["*.safetensors"], ["pytorch_model*.bin", "consolidated.*.pth", "adapter_model.bin"])
_DESCRIPTIONS = ["*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt"]
# Folders such as original/ and onnx/ duplicate the weights; only additional_chat_templates/ is needed.
_IGNORED = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*"]
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
_HUB_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#@]+)(?:/(?:tree|commit)/([^?#]+?))?/?"
)
_PATH_ENDS = ("/", ".bin", ".pth", ".pt", ".safetensors", ".gguf", ".json")


def resolve_model(model: str, *, argument: str = "model") -> Path:
    """The folder or llama2.c file of `model`; error messages call it `argument`.

    "tiny" is the packaged model, an existing path is returned without network access, anything of the form
    owner/name or owner/name@revision (a branch, tag or commit), or the address of its page, is fetched from the Hugging
    Face Hub into its cache. Raises FileNotFoundError when the model does not exist or cannot be fetched, ValueError for
    an impossible name; each message states what to do.
    """
    if model == "tiny":
        return Path(str(importlib.resources.files("fastllama"))) / "assets" / "tiny"
    path = _expanded(model)
    if model and os.path.lexists(path):  # a dangling link is reported where it is opened
        return path
    if page := _HUB_PAGE.fullmatch(model):
        return _download(page[1], unquote(page[2]) if page[2] else None, argument)
    if "://" in model:
        raise ValueError(f"{argument} is {model!r}; legal: a path, or a Hub id as {KNOWN_MODELS[0]!r}")
    name = model.partition("@")[0]
    if model.startswith((".", "/", "~")) or "\\" in model or name.count("/") > 1 or name.endswith(_PATH_ENDS):
        raise FileNotFoundError(f"{argument} is {model!r}, but no such file or folder exists")
    if not (hub := _HUB_ID.fullmatch(model)):
        raise ValueError(
            f"{argument} is {model!r}{_meant(model)}; "
            f"legal: 'tiny', an existing path, or a Hub id as {KNOWN_MODELS[0]!r}, with @revision if wanted"
        )
    return _download(hub[1], hub[2], argument)


def _expanded(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError:  # there is no home directory for ~
        return Path(model)


def _download(repo_id: str, revision: str | None, argument: str) -> Path:
    if why := why_unusable("huggingface_hub"):
        raise FileNotFoundError(f"{repo_id} cannot be fetched: huggingface_hub is needed: {why}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not has_console():
        disable_progress_bars()
    at = "" if revision is None else f" at revision {revision!r}"
    try:
        for weights in _WEIGHTS:
            patterns = [*_DESCRIPTIONS, *weights]
            path = Path(
                snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED)
            )
            if any(file for pattern in weights for file in path.glob(pattern)):
                return path
    except HFValidationError:
        raise ValueError(f"{argument} is {repo_id!r}, which is not a Hub id; legal: owner/name") from None
    except GatedRepoError:  # a subclass of RepositoryNotFoundError, so it comes first
        raise FileNotFoundError(
            f"{repo_id} is gated: accept its licence at https://huggingface.co/{repo_id}, then run 'hf auth login'"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repo_id} is not on the Hugging Face Hub{_meant(repo_id)}; if it is private, run 'hf auth login'"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(
            f"{repo_id} has no revision {revision!r}; legal: a branch, tag or commit that "
            f"https://huggingface.co/{repo_id} shows"
        ) from None
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the Hugging Face Hub cannot be reached"
        way = "unset it" if HF_HUB_OFFLINE else "go online"
        raise FileNotFoundError(
            f"{repo_id}{at} is not complete in the local cache and {why}; {way} once, or give a local path"
        ) from None
    except PermissionError as error:
        raise FileNotFoundError(
            f"{repo_id} cannot be fetched: {error.filename or HF_HUB_CACHE} may not be written by this user; "
            "set HF_HOME to a folder that may"
        ) from None
    except OSError as error:
        if isinstance(error, HfHubHTTPError) or error.errno is None:
            raise FileNotFoundError(f"{repo_id} cannot be fetched: {_first_line(error)}") from None
        where = error.filename or HF_HUB_CACHE
        raise FileNotFoundError(
            f"{repo_id} cannot be fetched: {where}: {error.strerror}; HF_HOME names another folder"
        ) from None
    except Exception as error:  # a failure of requests or httpx, whichever huggingface_hub uses
        raise FileNotFoundError(f"{repo_id} cannot be fetched: {_first_line(error)}") from None
    kinds = ", ".join(pattern for patterns in _WEIGHTS for pattern in patterns)
    missing = f"{repo_id}{at} has no weights that are read ({kinds})"
    if HF_HUB_OFFLINE:
        raise FileNotFoundError(f"{missing} in the local cache, and HF_HUB_OFFLINE is set; unset it once")
    raise FileNotFoundError(f"{missing}: others, such as GGUF, or the Hub is out of reach and its copy here not whole")


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return "".join(letter for letter in line if letter.isprintable())


def _meant(model: str) -> str:
    known = {name.lower(): name for name in ("tiny", *KNOWN_MODELS)}
    known |= {name.split("/")[1].lower(): name for name in KNOWN_MODELS}
    hint = nearest(model.lower(), known)
    return f" (did you mean {known[hint]!r}?)" if hint and known[hint] != model else ""
