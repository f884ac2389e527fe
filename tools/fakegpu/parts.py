"""The parts of `make fake-gpu`; CI runs the first ones, which take about five minutes."""

from __future__ import annotations

_PYTEST = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
_COMMAND = ["python", "-m", "fastllama"]
_GENERATE = ["generate", "--prompt", "Once upon a time", "--temperature", "0", "--max-tokens", "32"]
_DECODE = ["--shape", "7b", "--quantize", "none", "int8", "int4", "--batch", "1", "32", "--context", "512"]

GPU_PLAN = ["python", "-m", "benchmarks.gpu", "--out", "build/fake-gpu/plan"]

PARTS = {
    "own-tests": [*_PYTEST, "-m", "fakegpu", "tests/tools/fakegpu"],
    "info": [*_COMMAND, "info"],
    "generate": [*_COMMAND, *_GENERATE],
    "runtime-tests": [*_PYTEST, "-m", "gpu", "tests/gpu/test_runtime.py", "tests/gpu/test_warm_up.py"],
    # Without torch.compile's tests: at exit torch may wait five minutes for its compile workers.
    "patch-tests": [*_PYTEST, "-m", "gpu", "-k", "not compiled", "tests/gpu/test_patch.py"],
    "verify": [*_COMMAND, "verify", "--device", "cuda", "--quiet"],
    "decode": [*_COMMAND, "bench", "decode", *_DECODE],
    "op-tests": [*_PYTEST, "-m", "gpu", "tests/gpu/test_ops.py"],
    "gpu-plan": [*GPU_PLAN, "--minutes", "20"],  # on two cores mostly compiling, for peers and for tuning
}

# Violations that tests plant, by the parts that run them.
_A_CAPTURE_THAT_FAILS = {"cudaDeviceSynchronize while a stream is captured": 1}
PLANTED = {"runtime-tests": _A_CAPTURE_THAT_FAILS, "gpu-plan": _A_CAPTURE_THAT_FAILS}
