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

from .config import TinyConfig
from .evaluate import Answers
from .export import write_json

LogEntry = tuple[int, int, float]  # step, tokens seen, mean training loss since the entry before


@dataclass(frozen=True)
class Measured:
    """What evaluation found; perplexities by file name, for the fp32 weights and for the exported bf16 weights."""

    parameters: int
    fp32: dict[str, float]
    bf16: dict[str, float]
    by_position: Sequence[float]  # mean loss (nats a token) of the shipped weights in equal stretches of the context
    answers: Answers
    samples: Sequence[tuple[str, str]]
    held_out_stories: dict[str, int]


def draw_curve(path: Path, log: Sequence[LogEntry]) -> None:
    """Training loss against tokens."""
    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([seen / 1e6 for _, seen, _ in log], [loss for _, _, loss in log], linewidth=1.2)
    axes.set(xlabel="tokens seen (millions)", ylabel="training loss (nats a token)", yscale="log")
    ticks = [0.4, 0.5, 0.7, 1, 2, 4, 7]
    axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.savefig(path)


def write_training(path: Path, config: TinyConfig, log: Sequence[LogEntry], measured: Measured) -> None:
    """training.json: the config, every logged loss, the perplexities and the versions that made them."""
    write_json(
        path,
        {
            "config": asdict(config),
            "parameters": measured.parameters,
            "steps": log[-1][0],
            "tokens": log[-1][1],
            "perplexity": {"fp32": measured.fp32, "bf16_weights": measured.bf16},
            "loss_by_position": [round(loss, 4) for loss in measured.by_position],
            "questions": {"asked": measured.answers.asked, "right": measured.answers.right},
            "losses": {
                "columns": ["step", "tokens", "loss"],
                "rows": [[step, seen, round(loss, 4)] for step, seen, loss in log],
            },
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "sentencepiece": sentencepiece.__version__,
                "matplotlib": matplotlib.__version__,
            },
        },
    )


def write_card(path: Path, config: TinyConfig, log: Sequence[LogEntry], measured: Measured) -> None:
    """README.md."""
    tokens = log[-1][1]
    rows = "\n".join(
        f"| `{name}` | {measured.held_out_stories[name]} | {measured.fp32[name]:.4f} | {measured.bf16[name]:.4f} |"
        for name in measured.fp32
    )
    samples = "\n\n".join(f"*{how}*\n> {text}" for how, text in measured.samples)
    wrong = "\n".join(
        f"- *{question}* It said: {given} Right: {answer}" for question, answer, given in measured.answers.wrong[:3]
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
vanishes, a trail is followed) is never trained on. No other text and no data about real persons was used.

## Training
{tokens:,} tokens in {log[-1][0]:,} steps of {config.batch_tokens} in fp32 on two CPU cores, about an hour. Rows of
{", ".join(str(length) for length in config.row_lengths)} tokens take turns. Matrices are stepped by Muon (Jordan et al.
2024) at a peak rate of {config.matrix_rate:g}, embeddings and norms by AdamW at {config.embedding_rate:g};
{config.warmup_steps} steps of warmup, then a line to 0; weight decay {config.weight_decay:g}, clipping at
{config.clip_norm:g}. `training.json` has the whole configuration and every logged loss.

![training loss](training_curve.png)

`python -m tools.tiny_model` makes this folder again. The stories, the held-out texts and the tokenizer come out bit for
bit the same; the weights do not quite, since other torch versions, thread counts and CPU types round differently.
Interrupted and straight runs of a toy config agree (a test checks it, in fp64).

## Evaluation
Perplexity a token; each story on its own between BOS and EOS, fp32 arithmetic. "bf16" are the weights as shipped,
"fp32" those before rounding.

| text | stories | fp32 | bf16 |
|---|---|---|---|
{rows}

`heldout_seed.txt` holds unseen stories of the trained plots, one a line, `heldout_branch.txt` the plot never trained
on. Much of a story is free choice of the grammar (names, places, colors), so the first cannot come near 1. The second
measures what happens off the trained paths.

Asked one question about each of {measured.answers.asked} unseen stories, told in the turn before, it answers
{measured.answers.right} word for word as the grammar does. Some of the others:

{wrong}

Over whole rows of {config.max_position_embeddings} tokens of unseen documents the mean loss is {positions}.

## Samples
{samples}

## Limits
It knows about a thousand words and ten plots. Anything else it turns into one of them, fluently. It has no knowledge of
the world, its answers are right only about its own kind of stories, and other languages come out as noise. Use it to
test software, not to inform people.

## Licence
Apache-2.0, weights and texts included.
""")
