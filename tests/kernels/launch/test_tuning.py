"""Launch configurations: files are read strictly, and lookups are cached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastllama import env
from fastllama.errors import TuningError
from fastllama.kernels.launch import heuristics, tuned, tuning
from fastllama.kernels.launch.device import CPU, device_info, slug
from tests.kernels.launch.test_heuristics import H200

GPU = torch.device("cuda", 0)


def content(**changes: Any) -> dict[str, Any]:
    """A legal file for norm on an H200."""
    entry = {
        "shape": {"size": 4096, "itemsize": 2},
        "launch": {"num_warps": 2},
        "microseconds": 1.5,
        "heuristic_microseconds": 2,
    }
    return {"op": "norm", "gpu": H200.name, "provenance": {"triton": "3.6.0"}, "launches": [entry]} | changes


def one(part: str, **changes: Any) -> dict[str, Any]:
    """That file with changes in a part of its only entry."""
    found = content()
    entry = found["launches"][0]
    if part == "entry":
        entry |= changes
    else:
        entry[part] |= changes
    return found


def read(path: Path, found: Any) -> list[tuned.TunedLaunch]:
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    family = tuning.FAMILIES["norm"]
    return tuned.read(path, "norm", H200.name, family.shape, family.launch)


class TestFiles:
    """Named fields, and nothing else."""

    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        family = tuning.FAMILIES["swiglu"]
        entries = [
            tuned.TunedLaunch({"rows": n, "size": 64, "itemsize": 2}, heuristics.SwigluLaunch(32, n), 1.0, 1.5)
            for n in (1, 4)
        ]
        path = tmp_path / "new" / "swiglu.json"
        tuned.write(path, "swiglu", "cpu", {"date": "today"}, entries)
        assert tuned.read(path, "swiglu", "cpu", family.shape, family.launch) == entries
        assert [each.name for each in path.parent.iterdir()] == ["swiglu.json"]

    def test_stages_may_be_three(self, tmp_path: Path) -> None:
        family, shape = tuning.FAMILIES["matmul"], {"features": 4096, "size": 4096, "itemsize": 2}
        entries = [tuned.TunedLaunch(shape, heuristics.MatmulLaunch(64, 128, 4, 3, 4), 1.0, 1.5)]
        tuned.write(tmp_path / "matmul.json", "matmul", "cpu", {}, entries)
        assert tuned.read(tmp_path / "matmul.json", "matmul", "cpu", family.shape, family.launch) == entries

    def test_no_file_is_no_entry(self, tmp_path: Path) -> None:
        family = tuning.FAMILIES["norm"]
        assert tuned.read(tmp_path / "norm.json", "norm", H200.name, family.shape, family.launch) == []

    @pytest.mark.parametrize(
        ("found", "message"),
        [
            ("{", "is not JSON: "),
            ("[]", r"the file is \[\]; legal: an object"),
            ("{}", "the file lacks 'op'"),
            (content(extra=1), "the file has an unknown field 'extra'; legal: op, gpu, provenance, launches"),
            (content(op="rope"), "op is 'rope'; legal here: 'norm'"),
            (content(gpu="nvidia-a100"), "gpu is 'nvidia-a100'; legal here: 'nvidia-h200'"),
            (content(provenance={"triton": 3}), "provenance is .*; legal: an object of strings"),
            (content(launches={}), r"launches is \{\}; legal: a list"),
            (content(launches=[3]), r"launches\[0\] is 3; legal: an object"),
            (content(launches=content()["launches"] * 2), r"launches\[1\].shape is .*, as launches\[0\].shape is"),
            (one("entry", note=""), r"launches\[0\] has an unknown field 'note'"),
            (one("shape", rows=1), r"launches\[0\].shape has an unknown field 'rows'; legal: size, itemsize"),
            (one("entry", shape={"size": 4096}), r"launches\[0\].shape lacks 'itemsize'"),
            (one("shape", size=0), r"launches\[0\].shape.size is 0; legal: an integer of at least 1"),
            (one("shape", size=True), r"launches\[0\].shape.size is True"),
            (one("entry", launch={}), r"launches\[0\].launch lacks 'num_warps'"),
            (one("launch", num_warps="8"), r"launches\[0\].launch.num_warps is '8'; legal: an integer"),
            (one("launch", num_warps=3), r"launches\[0\].launch.num_warps is 3; legal: a power of two"),
            (one("launch", num_stages=1), r"launches\[0\].launch has an unknown field 'num_stages'"),
            (one("entry", microseconds=0), r"launches\[0\].microseconds is 0; legal: a positive number"),
            (one("entry", heuristic_microseconds=None), r"launches\[0\].heuristic_microseconds is None"),
        ],
    )
    def test_a_broken_or_foreign_file_names_file_and_field(self, tmp_path: Path, found: Any, message: str) -> None:
        path = tmp_path / "norm.json"
        with pytest.raises(TuningError, match=rf"norm\.json: {message}"):
            read(path, found)

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "norm.json").mkdir()
        family = tuning.FAMILIES["norm"]
        with pytest.raises(TuningError, match=r"norm\.json: cannot be read"):
            tuned.read(tmp_path / "norm.json", "norm", H200.name, family.shape, family.launch)

    @pytest.mark.parametrize(
        ("rows", "expected"), [(1, 1), (2, 1), (3, 2), (4, 2), (8, 2), (100, 4), (1 << 20, 4), (0, 1)]
    )
    def test_the_nearest_number_of_rows_decides(self, rows: int, expected: int) -> None:
        entries = [
            tuned.TunedLaunch({"rows": n, "size": size, "itemsize": 2}, launch, 1.0, 1.0)
            for n, size, launch in ((1, 64, 1), (1, 128, 9), (4, 64, 2), (64, 64, 4))
        ]
        assert tuned.nearest(entries, {"rows": rows, "size": 64, "itemsize": 2}) == expected
        assert tuned.nearest(entries, {"rows": rows, "size": 64, "itemsize": 4}) is None

    def test_every_packaged_file_is_legal(self) -> None:
        for path in tuning.PACKAGED.rglob("*.json"):
            family = tuning.FAMILIES[path.stem]
            entries = tuned.read(path, path.stem, path.parent.name, family.shape, family.launch)
            assert entries, f"{path} holds nothing"


@pytest.fixture
def _h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An H200 as cuda:0, the folders of both kinds of files empty, and no lookup remembered."""
    monkeypatch.setattr(tuning, "device_info", lambda device: H200 if device.type == "cuda" else CPU)
    monkeypatch.setattr(tuning, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuning._launch.cache_clear()
    yield
    tuning._launch.cache_clear()


def put(folder: Path, num_warps: int, size: int = 4096) -> None:
    family = heuristics.NormLaunch(num_warps)
    tuned.write(
        folder / "norm.json", "norm", H200.name, {}, [tuned.TunedLaunch({"size": size, "itemsize": 2}, family, 1, 2)]
    )


@pytest.mark.usefixtures("_h200")
class TestLookup:
    """User's file, packaged file, heuristic."""

    def test_the_users_file_goes_before_the_packaged_one_and_that_before_the_heuristic(self) -> None:
        def found() -> int:
            tuning._launch.cache_clear()
            return tuning.norm(GPU, size=4096, itemsize=2).num_warps

        assert found() == 8
        put(tuning.PACKAGED / H200.name, 4)
        assert found() == 4
        put(tuning.user_folder(H200), 2)
        assert found() == 2
        put(tuning.user_folder(H200), 2, size=8192)  # has no entry for 4096
        assert found() == 4

    def test_another_device_is_left_alone(self) -> None:
        put(tuning.PACKAGED / H200.name, 2)
        assert tuning.norm(torch.device("cpu"), size=4096, itemsize=2).num_warps == 8

    def test_a_broken_file_is_an_error_where_the_launch_is_asked_for(self) -> None:
        put(tuning.user_folder(H200), 2)
        (tuning.user_folder(H200) / "norm.json").write_text("{}")
        with pytest.raises(TuningError, match=r"tuned/nvidia-h200/norm\.json: the file lacks 'op'"):
            tuning.norm(GPU, size=4096, itemsize=2)

    def test_files_are_read_once(self) -> None:
        first = tuning.norm(GPU, size=4096, itemsize=2)
        put(tuning.user_folder(H200), 2)
        assert tuning.norm(GPU, size=4096, itemsize=2) is first

    def test_rows_share_a_lookup_up_to_a_power_of_two(self) -> None:
        def swiglu(rows: int) -> heuristics.SwigluLaunch:
            return tuning.swiglu(GPU, rows=rows, size=11008, itemsize=2)

        assert swiglu(129) is swiglu(256)
        assert swiglu(256) is not swiglu(257)
        assert tuning._launch.cache_info().currsize == 2

    def test_every_family_has_its_function(self) -> None:
        for name, family in tuning.FAMILIES.items():
            found = getattr(tuning, name)(GPU, **dict.fromkeys(family.shape, 64))
            assert type(found) is family.launch
            assert found == family.heuristic(H200, **dict.fromkeys(family.shape, 64))


class TestWarmUp:
    """Warm-up requests every launch that serving will."""

    @pytest.mark.parametrize(("kind", "expected"), [("cuda", [1, 2, 4, 8, 16, 20]), ("cpu", [1, 2])])
    def test_the_rows_it_runs(self, monkeypatch: pytest.MonkeyPatch, kind: str, expected: list[int]) -> None:
        ran: list[Any] = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: ran.append("synchronised"))
        seconds = tuning.warm_up(ran.append, 20, torch.device(kind))
        assert ran == expected + ["synchronised"] * (kind == "cuda")
        assert seconds >= 0

    @pytest.mark.usefixtures("_h200")
    @pytest.mark.parametrize("most", [1, 2, 100, 2048])
    def test_no_other_launch_is_left(self, most: int) -> None:
        def rope(rows: int) -> heuristics.RopeLaunch:
            return tuning.rope(GPU, rows=rows, heads=96, head_dim=128, itemsize=2)

        def swiglu(rows: int) -> heuristics.SwigluLaunch:
            return tuning.swiglu(GPU, rows=rows, size=11008, itemsize=2)

        for ask in (rope, swiglu):
            warm = {ask(rows) for rows in tuning.row_counts(most)}
            assert {ask(rows) for rows in range(1, most + 1)} == warm


class TestCacheFolder:
    """The XDG rule."""

    def test_the_variable(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert env.cache_dir() == tmp_path / "fastllama"

    @pytest.mark.parametrize("value", [None, "", "relative/path"])
    def test_not_set_empty_or_relative(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str | None
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if value is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert env.cache_dir() == tmp_path / ".cache" / "fastllama"


class TestDevice:
    """Properties that the driver reports, queried once."""

    def test_a_cpu_is_answered_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device_info.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_properties", None)
        assert device_info(torch.device("cpu")) is CPU

    @pytest.mark.parametrize(
        ("hip", "properties", "expected"),
        [
            (
                None,
                {"name": "NVIDIA H200", "major": 9, "minor": 0, "warp_size": 32},
                ("nvidia-h200", "sm_90", 227 << 10),
            ),
            (
                "6.4",
                {"name": "AMD Instinct MI300X", "gcnArchName": "gfx942:sramecc+:xnack-", "warp_size": 64},
                ("amd-instinct-mi300x", "gfx942", 64 << 10),
            ),
        ],
    )
    def test_a_gpu_is_asked_once(
        self, monkeypatch: pytest.MonkeyPatch, hip: str | None, properties: dict[str, Any], expected: tuple[Any, ...]
    ) -> None:
        asked = []
        facts: dict[str, Any] = {"multi_processor_count": 132, "L2_cache_size": 60 << 20} | properties
        if hip is None:
            facts |= {"shared_memory_per_block_optin": 227 << 10, "shared_memory_per_block": 48 << 10}
        else:
            facts["shared_memory_per_block"] = 64 << 10

        def get_device_properties(device: torch.device) -> SimpleNamespace:
            asked.append(device)
            return SimpleNamespace(**facts)

        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_properties", get_device_properties)
        device_info.cache_clear()
        found = [device_info(GPU) for _ in range(2)]
        device_info.cache_clear()
        assert (found[0].name, found[0].arch, found[0].shared_memory) == expected
        assert (found[0].num_sms, found[0].warp_size, found[0].l2_cache) == (132, properties["warp_size"], 60 << 20)
        assert found[0] is found[1]
        assert asked == [GPU]

    @pytest.mark.parametrize(
        ("name", "expected"), [("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"), (" Tesla (T4) ", "tesla-t4")]
    )
    def test_slug(self, name: str, expected: str) -> None:
        assert slug(name) == expected
