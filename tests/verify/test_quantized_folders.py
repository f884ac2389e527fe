"""verify judges models that are quantized on disk by their dequantized weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastllama.cli.main import main
from fastllama.io.checkpoint import open_checkpoint
from fastllama.io.load import load_model
from fastllama.io.save import save_model
from fastllama.kernels import matmul_int4
from fastllama.layers.quantized import LINEARS, QuantizedLinear
from fastllama.verify import check
from tests.cli.models import write_model

SIZES = {"hidden_size": 128, "intermediate_size": 160, "head_dim": 32}


@pytest.fixture(autouse=True)
def _no_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops have their own tests."""
    monkeypatch.setattr("fastllama.verify.ops.rows", lambda dtype, device: iter(()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("models")
    original = write_model(path / "original", **SIZES)
    for kind in LINEARS:
        save_model(load_model(original, quantization=kind), path / kind)
    return {kind: path / kind for kind in LINEARS}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_quantized_folder_agrees(folders: dict[str, Path], kind: str, dtype: str) -> None:
    report = check(folders[kind], dtype=dtype)
    assert report.ok, report.table()
    assert [row.name for row in report.rows] == ["weights", "layer 0", "layer 1", "logits", "tokens", "replayed tokens"]
    assert report.rows[0].error == 0.0


@pytest.mark.parametrize("wrong", ["values", "scales"])
def test_a_weight_that_is_not_the_files_is_seen(
    folders: dict[str, Path], wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = QuantizedLinear.set_quantized_rows

    def changed(layer: QuantizedLinear, start: int, rows: object) -> None:
        write(layer, start, rows)  # type: ignore[arg-type]
        with torch.inference_mode():
            if wrong == "scales":
                layer.scales[3] *= 1.5
            else:
                layer.packed.view(torch.uint8)[0, 0, 0, 5] ^= 1

    monkeypatch.setattr(QuantizedLinear, "set_quantized_rows", changed)
    report = check(folders["int4"], dtype="float32")
    assert report.rows[0].name == "weights"
    assert not report.rows[0].ok


def test_an_op_that_is_wrong_is_seen(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, *arguments: object, **settings: object) -> torch.Tensor:
        return matmul_int4(x * 1.01, *arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr("fastllama.kernels.matmul_int4", wrong)
    failed = [row.name for row in check(folders["int4"], dtype="float32").rows if not row.ok]
    assert failed[0] == "layer 0"
    assert "weights" not in failed


def test_w8a8_is_refused_in_a_sentence(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ValueError, match=r"which has layers in w8a8: these round their input to 8 bits.*; legal: weigh"
    ):
        check(folders["w8a8"])
    assert main(["verify", "--model", str(folders["w8a8"]), "--quiet"]) != 0
    assert "has layers in w8a8" in capsys.readouterr().err


def test_a_few_layers_in_w8a8_are_refused_too(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "mixed"
    shutil.copytree(folders["int8"], path)
    few, most = (json.loads((folders[kind] / "config.json").read_text()) for kind in ("w8a8", "int8"))
    scheme = few["quantization_config"]["config_groups"]["group_0"]
    scheme |= {"targets": ["re:.*down_proj"], "format": "pack-quantized"}
    most["quantization_config"]["config_groups"]["group_1"] = scheme
    (path / "config.json").write_text(json.dumps(most))
    assert open_checkpoint(path).quantization == "int8"
    with pytest.raises(ValueError, match="which has layers in w8a8"):
        check(path)
