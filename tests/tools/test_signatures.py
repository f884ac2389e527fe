"""tools.signatures: what it reads of a module's source, and that the committed files are what it writes."""

from __future__ import annotations

import json
import tarfile
import textwrap
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from tools.signatures import FOLDER, PAGE, SOURCES, as_json, read, signatures, table

EITHER, KEYWORD = "positional or keyword", "keyword-only"


def of(source: str) -> dict[str, object]:
    return dict(signatures(textwrap.dedent(source)))


def test_a_function_is_its_parameters_in_order_with_kind_and_default() -> None:
    found = of("def f(a, /, b: int, c=(-1, -1), *args, d, e: str | None = None, **more): ...")
    assert found == {
        "f": [
            ["a", EITHER],
            ["b", EITHER],
            ["c", EITHER, "(-1, -1)"],
            ["args", "variadic positional"],
            ["d", KEYWORD],
            ["e", KEYWORD, "None"],
            ["more", "variadic keyword"],
        ]
    }


def test_of_overloads_the_implementation_counts() -> None:
    source = """
        @overload
        def f(x, flag: Literal[True] = True): ...
        @overload
        def f(x, flag: Literal[False] = False): ...
        @traced("f")
        def f(x, flag=False): ...
    """
    assert of(source) == {"f": [["x", EITHER], ["flag", EITHER, "False"]]}


def test_what_is_private_and_what_gives_modules_is_left_out() -> None:
    source = """
        def _f(x): ...
        @functools.cache
        def get_module(x): ...
        class _Hidden:
            def f(self): ...
        class Function(torch.autograd.Function):
            def forward(ctx, x): ...
        def f(): ...
    """
    assert of(source) == {"f": []}


def test_a_class_is_its_methods_without_self() -> None:
    source = """
        class Wrapper:
            def __init__(self, workspace, layout="NHD"): ...
            def _helper(self): ...
            @property
            def ready(self): ...
            def run(self, q): ...
            run_twice = functools.partialmethod(run, twice=True)
            begin = run
    """
    assert of(source) == {
        "Wrapper.__init__": [["workspace", EITHER], ["layout", EITHER, "'NHD'"]],
        "Wrapper.begin": "run",
        "Wrapper.ready": "property",
        "Wrapper.run": [["q", EITHER]],
        "Wrapper.run_twice": "functools.partialmethod(run, twice=True)",
    }


def test_a_method_that_passes_all_on_takes_what_that_takes() -> None:
    """FlashInfer's decode `plan`: options by keyword, or in the order of a constant."""
    source = """
        _PLAN_LEGACY_POS_ARGS = ("late", "early")
        class Wrapper:
            def plan(self, x, *args, **kwargs): ...
            def _plan_impl(self, x, *, early=1, other=2, late=3): ...
    """
    assert of(source)["Wrapper.plan"] == [
        ["x", EITHER],
        ["late", EITHER, "3"],
        ["early", EITHER, "1"],
        ["other", KEYWORD, "2"],
    ]


def test_an_autograd_function_may_be_called_by_another_name() -> None:
    assert of("index_first_axis = IndexFirstAxis.apply\nlibrary = torch.ops.library")["index_first_axis"] == (
        "IndexFirstAxis.apply"
    )


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    path = tmp_path / "flash_attn-9.9.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("flash_attn/__init__.py", *SOURCES["flash_attn"]):
            data = b"from .g import f, h, maybe_contiguous\ndef maybe_contiguous(x): ...\ndef f(x): ..."
            member = tarfile.TarInfo(f"flash_attn-9.9/{name}")
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "flashinfer_python-9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("flashinfer/__init__.py", "from .page import f as f, other as other")
        for name in SOURCES["flashinfer_python"]:
            archive.writestr(name, "def f(x): ...\nclass TrtllmGenDecodeModule:\n    def run(self): ...")
    return path


def test_an_sdist_is_read_where_it_lies(sdist: Path) -> None:
    found = read(sdist)
    assert (found["package"], found["version"], found["root"]) == ("flash_attn", "9.9", ["f"])
    assert list(found["modules"])[::2] == ["flash_attn.flash_attn_interface", "hopper.flash_attn_interface"]
    assert found["modules"]["flash_attn.bert_padding"]["f"] == [["x", EITHER]]


def test_a_wheel_is_read_where_it_lies(wheel: Path) -> None:
    found = read(wheel)
    assert (found["package"], found["version"], found["root"]) == ("flashinfer_python", "9.9", ["f"])
    assert "flashinfer.norm" in found["modules"], "a package is its __init__"


def test_what_is_absent_here_is_written_by_its_name_alone(sdist: Path, wheel: Path) -> None:
    assert read(sdist)["modules"]["hopper.flash_attn_interface"] == {"f": [["x", EITHER]], "maybe_contiguous": None}
    assert read(wheel)["modules"]["flashinfer.page"] == {"f": [["x", EITHER]], "TrtllmGenDecodeModule": None}


def test_another_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torch-9\.9-py3-none-any\.whl is none of flash_attn, flashinfer_python"):
        read(tmp_path / "torch-9.9-py3-none-any.whl")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_file_is_in_the_form_that_the_tool_writes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = json.loads(text)
    assert as_json(found) + "\n" == text
    assert path.stem == f"{found['package']}-{found['version']}"


def test_the_table_of_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8").endswith(table()), "run `make docs`"
