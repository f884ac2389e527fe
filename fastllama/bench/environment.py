"""The conditions of a measurement, stored with its figures."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastllama
from fastllama import env


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Day (UTC), versions, commit, environment variables, processor, load, threads and device.

    device: None is the first GPU, or the CPU of a machine without one.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "fastllama": fastllama.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build, which the package metadata lack: 2.11.0+cu130
    }
    found["switches"] = {each.name: each.read() for each in env.VARIABLES if each is not env.XDG_CACHE_HOME}
    for package in ("triton", "transformers", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["processor"] = _processor()
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    found["threads"] = torch.get_num_threads()
    found["load"] = os.getloadavg()[0]
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    found["gpu"] = gpu(device.index or 0) if device.type == "cuda" else None
    return found


def gpu(index: int = 0) -> dict[str, Any] | None:
    """A GPU's properties, and its current temperature and clocks; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(index)
    found: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    fields = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")
    query = f"--query-gpu={','.join(fields)}"
    seen = _output("nvidia-smi", f"--id={index}", query, "--format=csv,noheader")
    return found | dict(zip(fields, seen.split(", "), strict=False) if seen else ())


def _commit() -> str | None:
    """The commit of the sources, marked if they are modified; None outside their repository."""
    root = Path(__file__).parents[2]
    # An installed package's parent folder may belong to another repository.
    if _output("git", "-C", str(root), "rev-parse", "--show-toplevel") != str(root.resolve()):
        return None
    return _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _output(*command: str) -> str | None:
    """A command's output; None where it is missing or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
