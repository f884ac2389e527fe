"""load_model: every format ends in the same parameters, within a measured memory, and no damage ends in a traceback."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from fastllama.errors import CheckpointError
from fastllama.io.load import load_model, resolve_device, resolve_dtype
from fastllama.layers.config import LlamaConfig
from fastllama.layers.weights import hf_tensors
from tests.io.checkpoints import hf_state, random_llama, write_hf_bin, write_llama2c, write_meta


def save_hf(model: object, path: Path, **options: object) -> Path:
    model.save_pretrained(path, **options)
    return path


FORMATS: dict[str, Callable[[object, Path], Path]] = {
    "safetensors": save_hf,
    "safetensors shards": lambda model, path: save_hf(model, path, max_shard_size="100KB"),
    "bin": write_hf_bin,
    "bin shards": lambda model, path: write_hf_bin(model, path, shards=2),
    "meta": write_meta,
    "meta shards": lambda model, path: write_meta(model, path, shards=8),
    "llama2c v0": lambda model, path: write_llama2c(model, path, version=0),
    "llama2c v1": lambda model, path: write_llama2c(model, path, version=1),
}
# formats that can store that head and embedding are one
TIED = ["safetensors", "safetensors shards", "bin", "bin shards", "llama2c v0", "llama2c v1"]


@pytest.mark.parametrize(
    ("form", "tied"), [*((form, False) for form in FORMATS), *((form, True) for form in TIED)], ids=str
)
def test_every_format_loads_to_the_same_parameters(tmp_path: Path, form: str, tied: bool) -> None:
    original = random_llama(tied=tied)
    model = load_model(FORMATS[form](original, tmp_path / "model"))
    assert not model.training
    found, expected = dict(hf_tensors(model)), hf_state(original)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied


def test_int8_loads_too(tmp_path: Path) -> None:
    original = random_llama()
    model = load_model(write_llama2c(original, tmp_path / "model.bin", version=2), dtype="bfloat16")
    expected = hf_state(original)["model.embed_tokens.weight"]
    # half a step of int8, and half of bfloat16's 2^-8
    bound = expected.abs().max() / 254 + expected.abs().max() / 512
    assert float((model.embed_tokens.weight.detach().float() - expected).abs().max()) <= float(bound)


@pytest.mark.parametrize(
    ("asked", "own", "resolved"),
    [
        ("auto", "bfloat16", torch.bfloat16),
        ("auto", "float16", torch.float16),
        ("auto", None, torch.float32),
        ("float32", "bfloat16", torch.float32),
        ("float16", None, torch.float16),
        (torch.bfloat16, "float16", torch.bfloat16),
    ],
)
def test_dtype(asked: str | torch.dtype, own: str | None, resolved: torch.dtype) -> None:
    assert resolve_dtype(asked, LlamaConfig(9, 8, 8, 1, 1, 1, 8, dtype=own)) == resolved


@pytest.mark.parametrize("asked", ["bf16", "float64", torch.float64, None])
def test_a_dtype_nothing_runs_in_is_refused(asked: object) -> None:
    with pytest.raises(ValueError, match=r"^dtype is .*legal values: 'auto', 'bfloat16', 'float16', 'float32'"):
        resolve_dtype(asked, LlamaConfig.preset("tinyllama-1.1b"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_model_has_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    model = load_model(write_llama2c(random_llama(), tmp_path / "model.bin", version=1), dtype=dtype)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}


def test_the_bar_counts_the_bytes_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    class Bar(tqdm):
        def close(self) -> None:
            counts.append((self.n, self.total))
            super().close()

    monkeypatch.setattr("fastllama.progress.tqdm", Bar)
    path = write_llama2c(random_llama(tied=True), tmp_path / "model.bin", version=2)
    model = load_model(path, dtype="float16", progress=True)
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert counts[0] == (total, total)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("progress", "stderr", "shown"),
    [
        (None, io.StringIO(), False),
        (None, Terminal(), True),
        (False, Terminal(), False),
        (True, io.StringIO(), True),
    ],
    ids=["pipe", "terminal", "forbidden", "asked"],
)
def test_the_bar_shows_itself_on_a_terminal_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: bool | None, stderr: io.StringIO, shown: bool
) -> None:
    monkeypatch.setattr("sys.stderr", stderr)
    load_model(write_llama2c(random_llama(), tmp_path / "model.bin", version=1), progress=progress)
    assert ("Loading weights" in stderr.getvalue()) == shown


def test_a_bad_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    model = random_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 7] = float("nan")
    path = save_hf(model, tmp_path / "model", max_shard_size="100KB")
    with pytest.raises(CheckpointError) as raised:
        load_model(path)
    file, _, trouble = str(raised.value).partition(": ")
    assert Path(file).parent == path
    assert file.endswith(".safetensors")
    assert trouble.startswith("tensor model.layers.1.mlp.up_proj.weight holds NaN or infinity")


def damage(path: Path, where: random.Random) -> None:
    """Change, cut or zero one file of the checkpoint somewhere; half of the time near an end, where headers are."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix != ".json")
    file = where.choice(files)
    data = bytearray(file.read_bytes())
    position = where.randrange(len(data))
    if where.random() < 0.5:
        position = where.choice([position % 2000, len(data) - 1 - position % 2000])
    kind = where.randrange(3)
    if kind == 0:
        data[position] ^= 1 << where.randrange(8)
    elif kind == 1:
        data = data[:position]
    else:
        data[position : position + 8] = where.randbytes(8)
    file.write_bytes(data)


@pytest.mark.parametrize("form", FORMATS)
def test_no_damage_raises_anything_but_a_checkpoint_error(tmp_path: Path, form: str) -> None:
    source = FORMATS[form](random_llama(), tmp_path / "model")
    contents = {file: file.read_bytes() for file in ([source] if source.is_file() else source.iterdir())}
    where, refusals = random.Random(form), []
    for _ in range(16):
        damage(source, where)
        try:
            load_model(source)
        except CheckpointError as error:
            refusals.append(str(error))
        for file, content in contents.items():
            file.write_bytes(content)
    assert len(refusals) >= 4  # what changes a weight a little is still a model
    assert all(str(source) in refusal and "\n" not in refusal for refusal in refusals), refusals


MEASURE = """
    import sys
    from fastllama.io.load import load_model

    def memory(key):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

    load_model(sys.argv[1])  # imports and thread pools are in memory from here on
    for path in sys.argv[2:]:
        before = memory("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
        model = load_model(path)
        print(memory("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
        del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure the peak of memory")
def test_memory_peaks_at_the_model_and_one_shard(tmp_path: Path) -> None:
    large = random_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=3)
    paths = [
        write_llama2c(random_llama(), tmp_path / "small", version=1),
        save_hf(large, tmp_path / "safetensors", max_shard_size="10MB"),
        write_hf_bin(large, tmp_path / "bin", shards=6),
    ]
    script = [sys.executable, "-c", textwrap.dedent(MEASURE), *map(str, paths)]
    result = subprocess.run(script, capture_output=True, text=True, check=True)
    for path, line in zip(paths[1:], result.stdout.splitlines(), strict=True):
        peak, model = map(int, line.split())
        shards = [file.stat().st_size for file in path.iterdir() if file.suffix == f".{path.name}"]
        assert sum(shards) > 4 * max(shards)  # so that holding all of them would show
        assert model < peak < model + 1.5 * max(shards), path.name


@pytest.mark.parametrize("count", [0, 2])
def test_devices(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    assert resolve_device("auto") == torch.device("cuda" if count else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    for device, needed in (("cuda", 1), ("cuda:1", 2), (torch.device("cuda", 2), 3)):
        if count >= needed:
            assert resolve_device(device) == torch.device(device)
        else:
            with pytest.raises(
                ValueError, match=rf"^device is '{device}', and torch sees {count} CUDA devices?; legal here: "
            ):
                resolve_device(device)


@pytest.mark.parametrize("size", [{"num_hidden_layers": 10_000}, {"vocab_size": 2**31 - 1}])
def test_sizes_that_the_files_cannot_hold_are_refused_before_memory_is_allocated(
    tmp_path: Path, size: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    random_llama().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | size))
    monkeypatch.setattr("fastllama.io.load.LlamaForCausalLM", lambda *args: pytest.fail("memory was asked for"))
    with pytest.raises(CheckpointError, match=r"declares [\d,]+ numbers, but the weight files have [\d,]+ bytes; do"):
        load_model(tmp_path, progress=False)
