"""What quantization costs a model: KL divergence, agreement and perplexity, with paired standard errors.

python -m benchmarks.quality [--model tiny] [--dtype float32] [--text FILE] [--output FILE]

Each line of the text is one document, between BOS and EOS. Without --text: stories that the bundled model was not
trained on. Two models are in memory at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastllama import LLM
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.layers.quantization import NONE, quantization_of
from fastllama.verify import Comparison, Estimate, Perplexity, compare, text_documents
from tools.tiny_model.evaluate import held_out_text
from tools.tiny_model.stories import story

CASES = (  # weights, keys and values
    ("int8", "auto"),
    ("int4", "auto"),
    ("w8a8", "auto"),
    (NONE, "int8"),
    (NONE, "fp8"),
    ("int4", "int8"),
)
CONTEXT, STRIDE = 1024, 512
HEAD = """| weights | keys and values | dNLL (SE) | KL (SE) | top-1, % (SE) | perplexity |
|---|---|---|---|---|---|"""


def main() -> None:
    """Compare each quantization with the unquantized model, and print a row of the table for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="as LLM takes it")
    parser.add_argument("--dtype", default="float32", help="in 16 bits the model's rounding hides small effects")
    parser.add_argument("--text", type=Path, help="a file in UTF-8, a document a line")
    parser.add_argument("--output", type=output_file, help="where to write conditions and figures as JSON")
    options = parser.parse_args()
    cases: list[dict[str, Any]] = []
    with LLM(options.model, dtype=options.dtype, quantization=None) as reference:
        documents = lines_of(options.text, held_out_text(story), reference)
        protocol = protocol_of(reference)
        for weights, kv in CASES:
            kind = {"quantization": quantization_of(weights), "kv_cache_dtype": kv}
            with LLM(options.model, dtype=options.dtype, **kind) as llm:
                found = compare(llm, reference, documents, **protocol)
            if not cases:
                print(HEAD, unquantized(found.reference), sep="\n", flush=True)
            print(row(weights, kv, found), flush=True)
            cases.append({"weights": weights, "kv_cache_dtype": kv} | found.as_json())
    if options.output:
        conditions = {key: str(value) for key, value in vars(options).items() if key != "output"} | protocol
        write_record(
            options.output,
            {"benchmark": "quality", "environment": environment(), "conditions": conditions, "cases": cases},
        )


def lines_of(path: Path | None, stories: list[str], llm: LLM) -> list[list[int]]:
    """Returns the documents of a UTF-8 file, one a line; without a file, stories."""
    text = path.read_text(encoding="utf-8") if path else "\n".join(stories)
    return text_documents(text, llm.prompts.needed_tokenizer(), per_line=True)


def protocol_of(llm: LLM) -> dict[str, int]:
    """Returns context and stride for `compare`."""
    context = min(CONTEXT, llm.max_model_len)
    return {"context": context, "stride": min(STRIDE, context)}


def unquantized(found: Perplexity) -> str:
    """Returns the row of the unquantized model."""
    return f"| {NONE} | auto | - | - | - | {found.perplexity.value:.4f} |"


def row(weights: str, kv: str, found: Comparison) -> str:
    """Returns the row of a case."""
    return f"| {weights} | {kv} | {differences(found)} | {found.model.perplexity.value:.4f} |"


def differences(found: Comparison) -> str:
    """Returns the cells of a row: dNLL, KL, top-1."""
    return f"{shown(found.nll_difference)} | {shown(found.kl)} | {shown(found.top1, '.2f', 100)}"


def shown(estimate: Estimate, form: str = ".3g", unit: float = 1) -> str:
    """Formats a figure with its standard error, which needs more than one document or window."""
    error = estimate.standard_error
    return f"{unit * estimate.value:{form}} ({'-' if error is None else format(unit * error, '.2g')})"


if __name__ == "__main__":
    main()
