"""Names become paths: local ones without any network, Hub ids with one clear sentence for each way they fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

import fastllama
from fastllama.io.hub import KNOWN_MODELS, resolve_model

REPO = "meta-llama/Llama-2-7b-hf"


@pytest.fixture(autouse=True)
def offline_mode_is_not_what_passes_these(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def forbid(*arguments: Any, **options: Any) -> None:
    raise AssertionError("the network was asked")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", forbid)
    monkeypatch.setattr("socket.socket.connect", forbid)


@pytest.mark.usefixtures("no_network")
def test_tiny_is_in_the_package() -> None:
    assert resolve_model("tiny") == Path(fastllama.__file__).parent / "assets" / "tiny"


@pytest.mark.usefixtures("no_network")
def test_an_existing_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "stories.bin").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "HOME", str(tmp_path))
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("stories.bin") == Path("stories.bin")
    assert resolve_model("owner/name") == Path("owner/name")  # though a Hub id could look like this
    assert resolve_model("~/stories.bin") == tmp_path / "stories.bin"


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./model", "../model", "~/model", "models/llama/7b", "stories.bin", "folder/", "a\\b"]
)
def test_a_path_that_does_not_exist_is_told_from_a_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as raised:
        resolve_model(name)
    assert str(raised.value) == f"model is {name!r}, but no such file or folder exists"


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tny", " (did you mean 'tiny'?)"),
        ("llama-2-7b-hf", f" (did you mean {REPO!r}?)"),
        ("CodeLlama-7b-instruct", " (did you mean 'codellama/CodeLlama-7b-Instruct-hf'?)"),
        ("what is this", ""),
        ("", ""),
        ("ow ner/name", ""),
    ],
)
def test_a_name_that_is_neither_path_nor_id_gets_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match="legal: 'tiny', an existing path, or a Hub id") as raised:
        resolve_model(name)
    assert str(raised.value).startswith(f"model is {name!r}{hint}; legal:")


Download = Callable[..., str]


def patch_download(monkeypatch: pytest.MonkeyPatch, download: Download) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


@pytest.mark.parametrize(
    ("weights", "downloads"),
    [
        (["model.safetensors"], [["*.safetensors"]]),
        (["pytorch_model.bin"], [["*.safetensors"], ["pytorch_model*.bin", "consolidated.*.pth"]]),
    ],
)
def test_bin_is_fetched_only_without_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: list[str], downloads: list[list[str]]
) -> None:
    asked = []

    def download(repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert repo_id == REPO
        found = ["config.json", "tokenizer.model", *weights, "README.md", "original/params.json"]
        for name in huggingface_hub.utils.filter_repo_objects(
            found, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / name).touch()  # fails for what is in a folder
        asked.append([pattern for pattern in allow_patterns if pattern not in ("*.json", "*.jinja", "tokenizer.model")])
        return str(tmp_path)

    patch_download(monkeypatch, download)
    assert resolve_model(REPO) == tmp_path
    assert asked == downloads
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "tokenizer.model", *weights}


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    """The exception as huggingface_hub raises it, around a response of requests or httpx (0.x or 1.x and later)."""
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} said the server\nRequest ID: 1", response=response)


@pytest.mark.parametrize(
    ("error", "model", "message"),
    [
        (
            http_error(errors.GatedRepoError, 403),
            REPO,
            f"{REPO} is gated: accept its licence at https://huggingface.co/{REPO}",
        ),
        (
            http_error(errors.RepositoryNotFoundError, 401),
            "meta-llama/Llama-2-7b-fh",
            f"meta-llama/Llama-2-7b-fh is not on the Hugging Face Hub (did you mean {REPO!r}?); if it is private",
        ),
        (
            http_error(errors.RepositoryNotFoundError, 404),
            "someone/zzzzqqqq",
            "someone/zzzzqqqq is not on the Hugging Face Hub; if it is private, run 'hf auth login'",
        ),
        (
            errors.LocalEntryNotFoundError("no"),
            REPO,
            f"{REPO} is not complete in the local cache and the Hugging Face Hub cannot",
        ),
        (http_error(errors.HfHubHTTPError, 503), REPO, f"{REPO} cannot be fetched: 503 said the server"),
        (OSError(28, "No space left on device"), REPO, f"{REPO} cannot be fetched: [Errno 28] No space left on device"),
        (RuntimeError(), REPO, f"{REPO} cannot be fetched: RuntimeError"),
    ],
    ids=["gated", "mistyped", "missing", "offline", "refused", "disk", "silent"],
)
def test_each_failure_of_the_hub_has_its_own_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, model: str, message: str
) -> None:
    def download(*arguments: Any, **options: Any) -> str:
        raise error

    patch_download(monkeypatch, download)
    with pytest.raises(FileNotFoundError) as raised:
        resolve_model(model)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_an_id_the_hub_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model is 'owner/a--b', which is no Hub id"):
        resolve_model("owner/a--b")  # huggingface_hub's own check comes before any request


def test_offline_is_known_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{REPO} is not complete in the local cache"):
        resolve_model(REPO)


def test_known_models_are_hub_ids() -> None:
    for name in KNOWN_MODELS:
        huggingface_hub.utils.validate_repo_id(name)
