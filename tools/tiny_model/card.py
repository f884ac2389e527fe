"""The model card: README.md, the curve's picture and training.json, all written from what the run measured."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import sentencepiece
import torch
import transformers
from matplotlib.figure import Figure

from .config import TUNING, TinyConfig
from .evaluate import Figures
from .export import write_json
from .train import LogEntry

STAGES = (TinyConfig(), TUNING)


@dataclass(frozen=True)
class Measured:
    """Evaluation results of the first stage's weights and of the shipped ones, both in bf16.

    `fp32` are the perplexities of the second stage's weights before they are rounded.
    """

    parameters: int
    first: Figures
    fp32: dict[str, float]
    shipped: Figures
    by_position: Sequence[float]  # mean loss (nats a token) of the shipped weights in equal stretches of the context
    samples: Sequence[tuple[str, str]]
    held_out_stories: dict[str, int]


def draw_curve(path: Path, logs: Sequence[Sequence[LogEntry]]) -> None:
    """Draw the training loss of each stage over the tokens of both."""
    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    before = 0
    for name, log in zip(("first stage", "second stage: loss on answers and stories only"), logs, strict=True):
        axes.plot(
            [(before + seen) / 1e6 for _, seen, _ in log], [loss for _, _, loss in log], linewidth=1.2, label=name
        )
        before += log[-1][1]
    axes.set(xlabel="tokens seen (millions)", ylabel="training loss (nats a token)", yscale="log")
    ticks = [0.3, 0.4, 0.5, 0.7, 1, 2, 4, 7]
    axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _figures(found: Figures) -> dict[str, object]:
    return {
        "perplexity": found.perplexity,
        "questions": {"asked": found.answers.asked, "right": found.answers.right},
        "odd_starts": {"asked": found.starts, "with_tags": found.tagged},
    }


def write_training(path: Path, logs: Sequence[Sequence[LogEntry]], measured: Measured) -> None:
    """Write training.json: the measurements, both stages' config, every logged loss, the versions of packages."""
    write_json(
        path,
        {
            "parameters": measured.parameters,
            "first_stage_bf16": _figures(measured.first),
            "shipped_bf16": _figures(measured.shipped),
            "perplexity_fp32": measured.fp32,
            "loss_by_position": [round(loss, 4) for loss in measured.by_position],
            "stages": [
                {
                    "config": asdict(config),
                    "steps": log[-1][0],
                    "tokens": log[-1][1],
                    "losses": {
                        "columns": ["step", "tokens", "loss"],
                        "rows": [[step, seen, round(loss, 4)] for step, seen, loss in log],
                    },
                }
                for config, log in zip(STAGES, logs, strict=True)
            ],
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "sentencepiece": sentencepiece.__version__,
                "matplotlib": matplotlib.__version__,
            },
        },
    )


def _lengths(config: TinyConfig) -> str:
    return ", ".join(str(length) for length in config.row_lengths)


def write_card(path: Path, logs: Sequence[Sequence[LogEntry]], measured: Measured) -> None:
    """Write README.md."""
    config, (steps, tokens, _), (more_steps, more_tokens, _) = STAGES[0], logs[0][-1], logs[1][-1]
    first, shipped = measured.first, measured.shipped
    rows = "\n".join(
        f"| `{name}` | {measured.held_out_stories[name]} | {first.perplexity[name]:.4f} | {measured.fp32[name]:.4f} | "
        f"{shipped.perplexity[name]:.4f} |"
        for name in measured.fp32
    )
    samples = "\n\n".join(f"*{how}*\n> {text}" for how, text in measured.samples)
    wrong = "\n".join(
        f"- *{question}* It said: {given} Right: {answer}" for question, answer, given in shipped.answers.wrong[:3]
    )
    width = config.max_position_embeddings // len(measured.by_position)
    positions = ", ".join(
        f"{loss:.2f} from {part * width} to {(part + 1) * width - 1}" for part, loss in enumerate(measured.by_position)
    )
    path.write_text(f"""---
license: apache-2.0
language: en
library_name: fastllama
---
# The tiny Llama

A small, really trained Llama that ships inside fastllama, so that every command works with no download and
quantization has a yardstick. It tells short children's stories and answers questions about them, and no more.

## Architecture
Llama 2's, in Hugging Face's layout (`model_type: llama`): {measured.parameters:,} parameters,
{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads} query heads and
{config.num_key_value_heads} key-value heads of {config.head_dim}, SwiGLU of {config.intermediate_size},
vocabulary {config.vocab_size}, context {config.max_position_embeddings}, rope theta {config.rope_theta:g},
tied embeddings, bf16. All matrix dimensions are multiples of 128. The tokenizer is SentencePiece BPE with Llama 2's
settings (byte fallback, dummy prefix, split digits, identity normalization), so any Unicode text survives.

## Data
All text is written by our own seeded grammar, `tools/tiny_model`: ten plots composed of scenes over a shared
state (who has what, what was said, which tool fits which trouble). About a fifth of the documents are chats in
Llama 2's format: a story is asked for, told, and then asked about. No document is seen twice. One plot (`trail`: food
vanishes, a trail is followed) is never trained on. The second stage's odd starts and messages are drawn from lists of
words, phrases, names and signs, and from random letters (`foreign.py`). No other text was used.

## Training
Two stages, in fp32 on two CPU cores. Both step matrices by Muon (Jordan et al. 2024), embeddings and norms by AdamW;
the rates warm up, then fall in a line to 0; weight decay {config.weight_decay:g}, clipping at {config.clip_norm:g}.

1. {tokens:,} tokens in {steps:,} steps of {config.batch_tokens}, about an hour, on every token of the documents above.
   Rows of {_lengths(config)} tokens take turns. Peak rates {config.matrix_rate:g} and {config.embedding_rate:g}.
   These weights wrote chat tags: they had learned users' messages as text, and took what no story begins with for one.
2. {more_tokens:,} tokens in {more_steps:,} steps, about ten minutes, from the first stage's bf16 weights, with new
   optimizers, on new documents. Rows of {_lengths(TUNING)} tokens each begin with one. Peak rates
   {TUNING.matrix_rate:g} and {TUNING.embedding_rate:g}. The loss is taken on stories and answers, and not on users'
   words, on tags, or on odd starts of texts, which go on as a story. Some users greet, ask what no story tells, or
   write nonsense, and get a short polite answer.

`training.json` has the whole configuration and every logged loss.

![training loss](training_curve.png)

`python -m tools.tiny_model` makes this folder again. The stories, the held-out texts and the tokenizer come out bit for
bit the same; the weights do not quite, since other torch versions, thread counts and CPU types round differently.
Interrupted and straight runs of a toy config agree (a test checks it, in fp64).

## Evaluation
Perplexity a token; each story on its own between BOS and EOS, fp32 arithmetic. "bf16" are the weights as shipped,
"fp32" those before rounding, "first stage" its bf16 weights.

| text | stories | first stage | fp32 | bf16 |
|---|---|---|---|---|
{rows}

`heldout_seed.txt` holds unseen stories of the trained plots, one a line, `heldout_branch.txt` the plot never trained
on. Much of a story is free choice of the grammar (names, places, colors), so the first cannot come near 1. The second
measures what happens off the trained paths.

Asked one question about each of {shipped.answers.asked} unseen stories, told in the turn before, it answers
{shipped.answers.right} word for word as the grammar does (first stage: {first.answers.right}). Some of the others:

{wrong}

Of {shipped.starts} unseen odd starts and messages, {shipped.tagged} go on with a tag within 40 tokens at temperature
0.8, top-p 0.95 (first stage: {first.tagged}).

Over whole rows of {config.max_position_embeddings} tokens of the second stage's kind the mean loss is {positions}.

## Samples
{samples}

## Limits
It knows about a thousand words and ten plots. Anything else it turns into one of them, fluently. It has no knowledge of
the world, its answers are right only about its own kind of stories, and other languages come out as noise. Use it to
test software, not to inform people.

## Licence
Apache-2.0, weights and texts included.
""")
