"""Model names become paths: local ones without network, Hub ids with one clear sentence for each way they fail."""

from __future__ import annotations

import importlib
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
def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(
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
BIN_PATTERNS = ["pytorch_model*.bin", "consolidated.*.pth", "adapter_model.bin"]
WEIGHT_PATTERNS = ["*.safetensors", *BIN_PATTERNS]


def patch_download(monkeypatch: pytest.MonkeyPatch, download: Download) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


@pytest.mark.parametrize(
    ("weights", "downloads"),
    [
        (["model.safetensors"], [["*.safetensors"]]),
        (["adapter_model.safetensors"], [["*.safetensors"]]),
        (["pytorch_model.bin"], [["*.safetensors"], BIN_PATTERNS]),
        (["consolidated.00.pth"], [["*.safetensors"], BIN_PATTERNS]),
        (["adapter_model.bin"], [["*.safetensors"], BIN_PATTERNS]),
    ],
)
def test_bin_is_fetched_only_without_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: list[str], downloads: list[list[str]]
) -> None:
    asked = []
    companions = {
        "config.json",
        "tokenizer.model",
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    companions |= {"additional_chat_templates/tool_use.jinja", "adapter_config.json", "merges.txt", "vocab.json"}
    unwanted = ["README.md", "original/params.json", "original/tokenizer.model", "onnx/model.onnx", "optimizer.pt"]
    unwanted += ["adapters/a.json", "original/consolidated.00.pth", "assets/x.json", "llama.Q4_0.gguf"]

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (repo_id, revision) == (REPO, None)
        found = [*companions, *weights, *unwanted]
        for name in huggingface_hub.utils.filter_repo_objects(
            found, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        asked.append([pattern for pattern in allow_patterns if pattern in WEIGHT_PATTERNS])
        return str(tmp_path)

    patch_download(monkeypatch, download)
    assert resolve_model(REPO) == tmp_path
    assert asked == downloads
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*companions, *weights}


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    """The exception as huggingface_hub raises it, with a response of requests or httpx (0.x or 1.x and later)."""
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} from the server\nRequest ID: 1", response=response)


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
            f"{REPO} is not complete in the local cache and the Hugging Face Hub cannot be reached; go online once",
        ),
        (http_error(errors.HfHubHTTPError, 503), REPO, f"{REPO} cannot be fetched: 503 from the server"),
        (OSError(28, "No space left on device"), REPO, f"{REPO} cannot be fetched: /"),
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
    with pytest.raises(ValueError, match=r"model is 'owner/a--b', which is not a Hub id"):
        resolve_model("owner/a--b")  # huggingface_hub's own check comes before any request


def test_offline_is_known_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{REPO} is not complete in the local cache"):
        resolve_model(REPO)


def test_offline_by_choice_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as raised:
        resolve_model(f"{REPO}@v1")
    line = (
        "at revision 'v1' is not complete in the local cache and HF_HUB_OFFLINE is set; unset it once, or give a local"
    )
    assert line in str(raised.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(13, "Permission denied", "/cache/hub"),
            "/cache/hub may not be written by this user; set HF_HOME",
        ),
        (
            OSError(28, "No space left on device", "/cache/a"),
            "/cache/a: No space left on device; HF_HOME names another",
        ),
        (OSError(30, "Read-only file system"), "hub: Read-only file system; HF_HOME names another folder"),
        (NotADirectoryError(20, "Not a directory", "/dev/null/.cache"), "/dev/null/.cache: Not a directory; HF_HOME"),
        (RuntimeError("\x1b[1mred\x1b[0m"), "cannot be fetched: [1mred[0m"),
    ],
    ids=["permission", "disk", "read-only", "no home", "escape codes"],
)
def test_a_cache_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def download(*arguments: Any, **options: Any) -> str:
        raise error

    patch_download(monkeypatch, download)
    with pytest.raises(FileNotFoundError) as raised:
        resolve_model(REPO)
    assert message in str(raised.value)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("owner/name", "owner/name", None),
        ("owner/name@main", "owner/name", "main"),
        ("owner/na.me-1@v1.0", "owner/na.me-1", "v1.0"),
        ("owner/name@refs/pr/3", "owner/name", "refs/pr/3"),
        (
            "owner/name@08751db2aca9bf2f7f80d2e516117a53d7450235",
            "owner/name",
            "08751db2aca9bf2f7f80d2e516117a53d7450235",
        ),
        ("https://huggingface.co/owner/name", "owner/name", None),
        ("https://huggingface.co/owner/name/", "owner/name", None),
        ("huggingface.co/owner/name", "owner/name", None),
        ("http://hf.co/owner/name/tree/v1", "owner/name", "v1"),
        ("https://huggingface.co/owner/name/tree/refs%2Fpr%2F3", "owner/name", "refs/pr/3"),
        ("https://huggingface.co/owner/name/commit/abc123", "owner/name", "abc123"),
    ],
)
def test_a_revision_and_the_address_of_a_page_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, repository: str, revision: str | None
) -> None:
    asked = []

    def download(repo_id: str, *, revision: str | None, **options: Any) -> str:
        asked.append((repo_id, revision))
        (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    patch_download(monkeypatch, download)
    assert resolve_model(name) == tmp_path
    assert asked == [(repository, revision)]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "name",
    [
        "https://huggingface.co/owner/name/blob/main/config.json",
        "https://example.com/owner/name",
        "owner/name@",
        "owner/name@a b",
        "x" * 5000,
        "a\0b",
    ],
)
def test_what_is_no_model_is_refused_with_what_is_legal(name: str) -> None:
    with pytest.raises(ValueError, match=f"adapter is .*; legal: .*a Hub id as {REPO!r}"):
        resolve_model(name, argument="adapter")


def test_a_missing_revision_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: Any, **options: Any) -> str:
        raise http_error(errors.RevisionNotFoundError, 404)

    patch_download(monkeypatch, download)
    with pytest.raises(
        FileNotFoundError, match=f"{REPO} has no revision 'v9'; legal: a branch, tag or commit that http"
    ):
        resolve_model(f"{REPO}@v9")


def test_a_repository_without_readable_weights_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").touch()
    patch_download(monkeypatch, lambda *arguments, **options: str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"owner/name-GGUF has no weights that are read \(\*\.safetensors, .* GGUF"
    ):
        resolve_model("owner/name-GGUF")


def test_a_path_with_a_sign_in_it_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name@v1").mkdir(parents=True)
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name@v1") == Path("owner/name@v1")
    assert resolve_model("link") == Path("link")


def test_a_home_that_is_not_there_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(FileNotFoundError, match="model is '~/model', but no such file or folder exists"):
        resolve_model("~/model")


def test_a_download_without_a_console_shows_no_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").touch()
    patch_download(monkeypatch, lambda *arguments, **options: str(tmp_path))
    disabled: list[bool] = []
    bars = importlib.import_module("huggingface_hub.utils.tqdm")
    monkeypatch.setattr(bars, "disable_progress_bars", lambda: disabled.append(True))
    resolve_model(REPO)
    assert not disabled
    monkeypatch.setattr("sys.stderr", None)
    resolve_model(REPO)
    assert disabled


def test_known_models_are_hub_ids() -> None:
    for name in KNOWN_MODELS:
        huggingface_hub.utils.validate_repo_id(name)
