"""Contract: imports follow the order of packages in docs/design/architecture.md; light imports stay light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.rooms import Room, imported, module_name, rooms

PACKAGE = Path(__file__).parents[2] / "fastllama"

# Each package with the packages it may import. Before adding one, check whether the code is in the right package.
BASE = {"errors", "env", "arithmetic"}
SHOWS = BASE | {"progress"}
MAY_IMPORT = {
    "errors": set(),
    "arithmetic": set(),
    "env": {"errors"},
    "progress": set(),
    "kernels": BASE,
    "testing": BASE,  # for kernels of any project; bench and the command take bounds and Triton's repaired interpreter
    "quant": BASE | {"kernels"},
    "layers": SHOWS | {"kernels", "quant"},
    "catalogue": BASE | {"kernels", "layers"},
    "io": SHOWS | {"kernels", "quant", "layers"},
    "runtime": SHOWS | {"kernels", "layers", "io"},
    "integrations": BASE | {"kernels", "quant", "layers", "io", "runtime"},  # runtime: lm_eval/ alone
    "serve": BASE | {"io", "runtime"},
    "verify": SHOWS | {"kernels", "layers", "io", "runtime", "catalogue"},
    "bench": BASE | {"kernels", "layers", "io", "runtime", "catalogue", "testing"},
    "cli": BASE
    | {"kernels", "layers", "io", "runtime", "catalogue", "integrations", "serve", "verify", "bench", "testing"},
}
# The same within kernels: implementations do not import the ops.
KERNELS_MAY_IMPORT = {
    "reference": set(),
    "dispatch": set(),
    "launch": {"dispatch"},
    "cpu": {"dispatch", "launch", "reference"},
    "numba": {"dispatch", "cpu", "reference"},
    "triton": {"dispatch", "launch", "reference"},
    "compiling": {"dispatch", "numba"},
    "ops": {"dispatch", "reference", "cpu", "numba", "triton"},
}
# Optional packages, each with the only folders that may import it.
HOMES = {
    "triton": ("fastllama.kernels.triton.", "fastllama.testing."),
    "numba": ("fastllama.kernels.numba.",),
    "transformers": ("fastllama.bench.", "fastllama.integrations.", "fastllama.verify."),
    "lm_eval": ("fastllama.integrations.lm_eval.",),
    "matplotlib": ("fastllama.bench.",),
    "starlette": ("fastllama.serve.",),
    "uvicorn": ("fastllama.serve.",),
    "msgspec": ("fastllama.serve.",),
    "prometheus_client": ("fastllama.serve.",),
}
# The planning half of the runtime is testable in microseconds because it knows no tensors.
PLANNING = (
    "params",
    "outputs",
    "drafting.speculation",
    "drafting.prompt_lookup",
    "serving.mailbox",
    "serving.statistics",
)


def planning() -> list[str]:
    folder = [module_name(path) for path in sorted((PACKAGE / "runtime" / "planning").glob("*.py"))]
    return [*folder, *(f"fastllama.runtime.{name}" for name in PLANNING)]


def packages(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def rooms_of(modules: set[str]) -> set[str]:
    return {parts[1] for module in modules if (parts := module.split("."))[0] == "fastllama" and len(parts) > 1}


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem in MAY_IMPORT]


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_a_room_imports_only_the_rooms_before_it(path: Path) -> None:
    room = module_name(path).split(".")[1]
    assert room in MAY_IMPORT, f"{room} is a new room: add it to MAY_IMPORT and to docs/design/architecture.md"
    # names of the root itself (fastllama.LLM) are for users: importing them inside would bypass the order
    wrong = rooms_of(imported(path)) - MAY_IMPORT[room] - {room, "__version__"}
    assert not wrong, f"{module_name(path)} imports {sorted(wrong)}"


def test_kernels_import_only_what_stands_before_them() -> None:
    (kernels,) = (room for room in rooms() if room.name == "fastllama.kernels")
    assert set(kernels.arrows) == set(KERNELS_MAY_IMPORT)
    wrong = {box: found - KERNELS_MAY_IMPORT[box] for box, found in kernels.arrows.items()}
    assert {box: found for box, found in wrong.items() if found} == {}


@pytest.mark.parametrize("room", rooms(), ids=lambda room: room.name)
def test_nothing_in_a_room_imports_what_imports_it(room: Room) -> None:
    assert room.circles == []


@pytest.mark.parametrize(("room", "others"), [("formats", ("packed",)), ("packed", ())], ids=["formats", "packed"])
def test_a_checkpoint_format_knows_only_the_formats(room: str, others: tuple[str, ...]) -> None:
    """What picks a format imports all formats, so none may import it; packed weights import no checkpoint."""
    found = set().union(*map(imported, (PACKAGE / "io" / room).glob("*.py")))
    legal = tuple(f"fastllama.io.{each}" for each in (room, *others))
    wrong = {each for each in found if each.startswith("fastllama.io.") and not each.startswith(legal)}
    assert wrong == set()


def test_what_the_runtime_calls_of_the_integrations_does_not_know_the_runtime() -> None:
    """They take over a model of transformers through `fastllama.from_transformers`, without an import."""
    found = set().union(*map(imported, (PACKAGE / "integrations" / "transformers").glob("*.py")))
    assert "runtime" not in rooms_of(found)


@pytest.mark.parametrize("adapter", ["flash_attn", "flashinfer"])
def test_an_adapter_of_functions_knows_the_ops_alone(adapter: str) -> None:
    """It replaces a library of functions on tensors, in programs that use neither our models nor our files."""
    folder = PACKAGE / "integrations" / adapter
    files = sorted(folder.rglob("*.py"))
    assert files
    found = set().union(*map(imported, files))
    assert rooms_of(found) <= BASE | {"kernels", "integrations"}
    legal = (f"fastllama.integrations.{adapter}", "fastllama.integrations.arguments")
    others = {each for each in found if each.startswith("fastllama.integrations.")}
    assert {each for each in others if not each.startswith(legal)} == set()


def test_import_fastllama_does_not_load_the_integrations() -> None:
    code = "import sys, fastllama; print([name for name in sys.modules if name.startswith('fastllama.integrations')])"
    assert run(code) == "[]\n"


@pytest.mark.parametrize("adapter", ["flash_attn", "flashinfer"])
def test_an_adapter_of_functions_needs_no_optional_package(adapter: str) -> None:
    assert run(f"import fastllama.integrations.{adapter}; print('ok')", *HOMES, "flash_attn", "flashinfer") == "ok\n"


def test_only_the_entries_stand_beside_the_rooms() -> None:
    beside = {path.stem for path in PACKAGE.glob("*.py")} - set(MAY_IMPORT)
    assert beside == {"__init__", "__main__"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels" / "reference").glob("*.py")), ids=module_name)
def test_the_reference_knows_neither_triton_nor_the_kernels(path: Path) -> None:
    modules = imported(path)
    assert "triton" not in packages(modules)
    kernels = {module for module in modules if module.startswith("fastllama.kernels.")}
    wrong = {module for module in kernels if not module.startswith("fastllama.kernels.reference")}
    assert not wrong, f"an oracle that imports what it judges proves nothing: {sorted(wrong)}"


@pytest.mark.parametrize("package", HOMES)
def test_an_optional_package_is_imported_only_at_home(package: str) -> None:
    users = {module_name(path) for path in sources() if package in packages(imported(path))}
    assert users, f"nothing imports {package}"
    assert {name for name in users if not name.startswith(HOMES[package])} == set()


def run(code: str, *absent: str) -> str:
    """What a fresh interpreter prints for `code` where the packages `absent` are not installed."""
    # None is Python's own mark of a module that cannot be imported, and importlib.util.find_spec honours it.
    block = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
    command = [sys.executable, "-c", block + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tokenizers_and_chat_formats_import_without_torch() -> None:
    assert run("import fastllama.io.tokenizer, fastllama.io.chat; print('ok')", "torch", "triton") == "ok\n"


def test_planning_imports_without_torch() -> None:
    assert run(f"import {', '.join(planning())}; print('ok')", "torch", "numpy", "triton") == "ok\n"


def test_import_fastllama_loads_nothing_heavy() -> None:
    heavy = "torch", "triton", "transformers", "numpy", "safetensors", "sentencepiece", "huggingface_hub"
    assert run(f"import fastllama; print(sorted(set({heavy!r}) & set(sys.modules)))") == "[]\n"


def test_import_fastllama_is_quick() -> None:
    """Under 0.15 s; the best of several processes, since a busy machine can make any one of them late."""
    code = "import time; start = time.perf_counter(); import fastllama; print(time.perf_counter() - start)"
    best = 1e9
    for _ in range(5):
        best = min(best, float(run(code)))
        if best < 0.15:
            return
    pytest.fail(f"import fastllama takes {best:.3f} s at best")


def test_ops_work_without_any_optional_package() -> None:
    code = """
import torch, fastllama, fastllama.kernels
x = torch.tensor([[3.0, 4.0]])
print(fastllama.kernels.rms_norm(x, torch.ones(2), 0.0).tolist())
"""
    root_mean_square = 12.5**0.5
    assert eval(run(code, *HOMES)) == [pytest.approx([3 / root_mean_square, 4 / root_mean_square])]
