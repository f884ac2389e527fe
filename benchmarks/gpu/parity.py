"""Every op against the fp64 reference: at a shape of Llama 2 and at three rows, in bf16, then in fp32."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from benchmarks.gpu import results, stage
from fastllama.bench.ops import comparison
from fastllama.bench.ops.judge import judged
from fastllama.catalogue.llama_calls import MEASURED, LlamaCall
from fastllama.catalogue.sizes import LLAMA_2, TOY

ROWS = {"attention_varlen": 512, "attention_prefill": 512}
MOST_ROWS = 64  # rows of the other ops: within their kernels' limit


def cases(dtype: torch.dtype, dry: bool) -> Iterator[LlamaCall]:
    """Two cases of each op, ordered by op, so that a hang loses only the cases after it."""
    for op in MEASURED:
        for model, rows in ((TOY, 3),) if dry else ((LLAMA_2[0], ROWS.get(op, MOST_ROWS)), (LLAMA_2[0], 3)):
            context = {TOY: 70}.get(model, 4096) if op == "attention_decode" else 0
            yield LlamaCall(op, model, rows, context, dtype)


def main() -> int:
    """Add a line for each case; returns 1 if one is wrong or does not run."""
    options = stage.options(__doc__)
    device, wrong = stage.device(options.dry), 0
    with torch.inference_mode(), comparison.interpreted(options.dry):
        for dtype in (torch.bfloat16, torch.float32):
            for case in cases(dtype, options.dry):
                start = time.monotonic()
                found: dict[str, object] = {}
                try:
                    with comparison.running(case.op, device) as function:
                        error, bound = judged(case, function, device)
                    found |= {"error": error, "bound": bound, "right": error <= bound}
                except Exception as failure:  # of one op; the others may still run
                    found |= {"failed": f"{type(failure).__name__}: {failure}"[:500], "right": False}
                    stage.say_failure(failure)
                seconds = round(time.monotonic() - start, 2)
                name = str(dtype).removeprefix("torch.")
                results.append(
                    options.results, stage="parity", op=case.op, dtype=name, label=case.label, seconds=seconds, **found
                )
                said = " ".join(
                    f"{key} {value:.2g}" if isinstance(value, float) else "" for key, value in found.items()
                )
                print(f"{'right' if found['right'] else 'WRONG'} {case.op}, {name}, {case.label}: {said}", flush=True)
                wrong += not found["right"]
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
