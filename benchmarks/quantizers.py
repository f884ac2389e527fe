"""Quality loss of each quantizer on a model, and on the same model with outliers: KL divergence, agreement, seconds.

python -m benchmarks.quantizers [--model tiny] [--text FILE --calibration FILE] [--output FILE] [--plot FILE]

Each line of a text is one document, between BOS and EOS. Without files, stories that the bundled model was not trained
on, different ones for calibration and evaluation. Outliers are planted (`fastllama.verify.plant_outliers`) so that the
model's function, and thus the reference, stays the same. All in fp32; two models are in memory at once.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.quality import differences, lines_of, protocol_of
from fastllama import LLM, LlamaForCausalLM, quantize
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.bench.plot import check_plot
from fastllama.layers.quantization import METHODS
from fastllama.verify import compare, plant_outliers
from tools.tiny_model.evaluate import CALIBRATION_SEED, held_out_text
from tools.tiny_model.stories import story


class Case(NamedTuple):
    """A quantizer. group_size: as for `quantize`."""

    scheme: str
    method: str
    group_size: int

    @property
    def weights(self) -> str:
        """`int4 g128`; of whole rows `int8`, and `int4 rows` since others are usual."""
        if self.group_size != -1:
            return f"{self.scheme} g{self.group_size}"
        return f"{self.scheme} rows" if self.scheme == "int4" else self.scheme


CASES = [
    Case(scheme, method, group_size)
    for scheme, group_size, methods in (
        ("int4", 128, METHODS),
        ("int4", 64, ("rtn", "gptq")),
        ("int4", 32, ("rtn", "gptq")),
        ("int4", -1, ("rtn", "gptq")),
        ("int8", -1, METHODS),
        ("w8a8", -1, METHODS),
    )
    for method in methods
    if scheme in METHODS[method]
]
MODELS = {"as it is": False, "with planted outliers": True}
CALIBRATION_STORIES = 48
HEAD = """| weights | method | dNLL (SE) | KL (SE) | top-1, % (SE) | seconds |
|---|---|---|---|---|---|"""


def main() -> None:
    """Quantize both models by each method, and print a row of a table for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="as LLM takes it")
    parser.add_argument("--text", type=Path, help="evaluation text: a file in UTF-8, a document a line")
    parser.add_argument("--calibration", type=Path, help="calibration text: a file in UTF-8, a document a line")
    parser.add_argument("--output", type=output_file, help="where to write conditions and figures as JSON")
    parser.add_argument("--plot", type=output_file, help="where to plot KL divergences, as .png or .svg")
    options = parser.parse_args()
    if options.plot:
        check_plot(options.plot)
    cases: list[dict[str, Any]] = []
    with LLM(options.model, dtype="float32", quantization=None) as reference:
        documents = lines_of(options.text, held_out_text(story), reference)
        stories = [story(CALIBRATION_SEED + number).text for number in range(CALIBRATION_STORIES)]
        calibration = lines_of(options.calibration, stories, reference)
        for title, outliers in MODELS.items():
            model = copy.deepcopy(reference.engine.model)
            if outliers:
                plant_outliers(model)
            print(f"The model {title}:", HEAD, sep="\n\n", flush=True)
            for case in CASES:
                measured, row = measure(case, copy.deepcopy(model), reference, documents, calibration)
                print(row, flush=True)
                cases.append({"outliers": outliers} | measured)
            print()
        conditions = {key: str(vars(options)[key]) for key in ("model", "text", "calibration")}
        read = {"calibration_documents": len(calibration), "calibration_tokens": sum(map(len, calibration))}
        conditions |= {"dtype": "float32"} | read | protocol_of(reference)
    record = {"benchmark": "quantizers", "environment": environment(), "conditions": conditions, "cases": cases}
    if options.output:
        write_record(options.output, record)
    if options.plot:
        from tools.plots import quantizers, style

        with style.settings():
            style.save(quantizers.draw(record), options.plot)


def measure(
    case: Case,
    model: LlamaForCausalLM,
    reference: LLM,
    documents: Sequence[Sequence[int]],
    calibration: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], str]:
    """Figures of a case for the record, and its row. model: dense; becomes the quantized one."""
    begin = time.perf_counter()
    quantize(model, case.scheme, case.method, documents=calibration, group_size=case.group_size, progress=False)
    seconds = time.perf_counter() - begin
    with LLM(model, quantization=None, progress=False) as llm:
        found = compare(llm, reference, documents, **protocol_of(reference))
    row = f"| {case.weights} | {case.method} | {differences(found)} | {seconds:.1f} |"
    return case._asdict() | {"weights": case.weights, "quantizing_seconds": seconds} | found.as_json(), row


if __name__ == "__main__":
    main()
