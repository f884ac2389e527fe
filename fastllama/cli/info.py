"""`fastllama info`: versions, devices, and the backend of each op."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import fastllama
from fastllama import env
from fastllama.cli.parser import add_command as add
from fastllama.errors import NOT_INSTALLED, BackendError, counted, summary, why_unusable

PACKAGES = ("torch", "triton", "numba", "transformers", "safetensors", "sentencepiece", "huggingface_hub")


def add_command(commands: Any) -> None:
    """Define the subcommand."""
    parser = add(
        commands,
        "info",
        "show versions, devices, and the backend of each op and why it was chosen",
        run,
        examples=("", "--json"),
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the report, and return the exit status."""
    versions, devices = _versions(), _devices()
    variables = {variable.name: variable.read() for variable in env.VARIABLES}
    ops = {device["type"]: _ops(device["type"]) for device in devices}
    machine_code = _machine_code()
    if args.json:
        found = {
            "versions": versions,
            "devices": devices,
            "environment": variables,
            "machine_code": machine_code,
            "ops": ops,
        }
        print(json.dumps(found), flush=True)
        return 0
    sections = [
        [(name, version or "not installed") for name, version in versions.items()],
        [(device["name"], _describe(device)) for device in devices],
        [*variables.items(), ("compiled CPU kernels", machine_code)],
    ]
    for kind, table in ops.items():
        lines = [(name, f"{row['backend']}: {row['reason']}") for name, row in table.items()]
        sections.append([(f"op on {kind}", "runs on"), *lines])
    width = max(len(name) for section in sections for name, _ in section)
    print("\n\n".join("\n".join(f"{name:{width}}  {value}" for name, value in section) for section in sections))
    return 0


def _versions() -> dict[str, str | None]:
    """Version by package, from its metadata without an import; None where it is not installed."""
    versions: dict[str, str | None] = {"fastllama": fastllama.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _devices() -> list[dict[str, Any]]:
    """The CPU and every GPU that torch sees; memory_bytes is the total, not the free memory."""
    import torch

    from fastllama.runtime.device.memory import physical_bytes

    cpu = {
        "type": "cpu",
        "name": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_bytes": physical_bytes(),
    }
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [cpu] + [
        {
            "type": "cuda",
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
        }
        for gpu in gpus
    ]


def _describe(device: dict[str, Any]) -> str:
    kind, capability, memory = device["type"], device["capability"], device["memory_bytes"] / 2**30
    noun = "thread" if kind == "cpu" else "multiprocessor"
    units = counted(device[f"{noun}s"], noun)
    return f"{kind}, capability {capability}, {units}, {memory:.1f} GiB"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _machine_code() -> str:
    """The folder that caches compiled CPU kernels, or why there is none."""
    why = why_unusable("numba")
    if why == NOT_INSTALLED:
        return "none, as numba is not installed"
    try:
        from fastllama.kernels.numba import table  # noqa: F401  # imports every compiled kernel, which may fail
        from fastllama.kernels.numba.cache import described
    except Exception as error:
        return f"none, as numba cannot be used: {why or summary(error)}"
    return described()


def _ops(kind: str) -> dict[str, dict[str, str]]:
    """The backend of each op for tensors on a kind of device, and the reason."""
    from fastllama.kernels.dispatch.op import OPS

    table = {}
    for name, op in sorted(OPS.items()):
        try:
            found = op.implementation(kind)
            table[name] = {"backend": found.backend, "reason": found.reason}
        except BackendError as error:
            table[name] = {"backend": "nothing", "reason": str(error)}
    return table
