"""`python -m tools.tiny_model`: stories, tokenizer, two stages of training (resumed if interrupted), export."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from .card import Measured, draw_curve, write_card, write_training
from .config import TUNING, TinyConfig
from .evaluate import calibration_text, figures, held_out_texts, loss_by_position, perplexities, samples
from .export import replace_folder, write_model
from .tokenizer import document_ids, load_tokenizer, train_tokenizer
from .train import LogEntry, Packer, PromptPacker, build_model, train
from .tuning import tuning_ids

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "tiny_model"
ASSETS = ROOT / "fastllama" / "assets"
TARGET = ASSETS / "tiny"


def report(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    config = TinyConfig()
    tokenizer_model = train_tokenizer(config.tokenizer_documents, config.vocab_size)
    packer = Packer(partial(document_ids, load_tokenizer(tokenizer_model)))
    model = build_model(config)
    log = train(config, model, packer, WORK / "first", report)
    write_model(WORK / "first" / "model", config, model, tokenizer_model)
    tune(WORK / "first" / "model", log)


def tune(first: Path, first_log: Sequence[LogEntry]) -> None:
    """The second stage, from the bf16 weights in the folder `first`; evaluates, and replaces the packaged folder."""
    tokenizer_model = (first / "tokenizer.model").read_bytes()
    tokenizer = load_tokenizer(tokenizer_model)
    trained = LlamaForCausalLM.from_pretrained(first, dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(first, dtype=torch.float32)
    log = train(TUNING, model, PromptPacker(partial(tuning_ids, tokenizer)), WORK / "second", report)

    folder = WORK / "export"
    shutil.rmtree(folder, ignore_errors=True)
    write_model(folder, TinyConfig(), model, tokenizer_model)
    texts = held_out_texts()
    for name, lines in texts.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    shipped = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    measured = Measured(
        parameters=model.num_parameters(),
        first=figures(trained, tokenizer, texts),
        fp32=perplexities(model, tokenizer, texts),
        shipped=figures(shipped, tokenizer, texts),
        by_position=loss_by_position(shipped, tokenizer, TUNING.max_position_embeddings),
        samples=samples(shipped, tokenizer),
        held_out_stories={name: len(lines) for name, lines in texts.items()},
    )
    logs = (first_log, log)
    draw_curve(folder / "training_curve.png", logs)
    write_training(folder / "training.json", logs, measured)
    write_card(folder / "README.md", logs, measured)
    replace_folder(folder, TARGET)
    (ASSETS / "calibration.txt").write_text(calibration_text())
    report(f"wrote {TARGET}: {measured.shipped}")


if __name__ == "__main__":
    main()
