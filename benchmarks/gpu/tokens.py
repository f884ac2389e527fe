"""End to end: the bundled model's tokens on this device, compared with those of a CPU."""

from __future__ import annotations

import json
import time

from benchmarks.gpu import answers, results, stage
from fastllama import LLM
from fastllama.bench.ops import comparison


def main() -> int:
    """Add a line; returns 1 if tokens differ by more than rounding explains."""
    options = stage.options(__doc__, mode="as it is")
    start = time.monotonic()
    device, few = ("cpu", (1, 4)) if options.dry else ("cuda", ())
    with (
        comparison.interpreted(options.dry),
        LLM("tiny", dtype="float32", device=device, max_num_seqs=len(answers.PROMPTS), progress=False) as llm,
    ):
        found = answers.answers(llm, *few)
    outcome = answers.compared(found, json.loads(answers.FILE.read_text(encoding="utf-8")))
    seconds = round(time.monotonic() - start, 1)
    results.append(options.results, stage="tokens", mode=options.mode, seconds=seconds, **outcome)
    print(f"tokens, {options.mode}: {outcome}", flush=True)
    return int(not outcome["right"])


if __name__ == "__main__":
    raise SystemExit(main())
