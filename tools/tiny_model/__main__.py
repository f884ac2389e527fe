"""`python -m tools.tiny_model`: stories, tokenizer, training (resumed if interrupted), evaluation, export."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from .card import Measured, draw_curve, write_card, write_training
from .config import TinyConfig
from .evaluate import answer_questions, held_out_texts, loss_by_position, perplexities, samples
from .export import replace_folder, write_model
from .tokenizer import load_tokenizer, train_tokenizer
from .train import train

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "tiny_model"
TARGET = ROOT / "fastllama" / "assets" / "tiny"
QUESTIONS = 100


def main() -> None:
    config = TinyConfig()
    WORK.mkdir(parents=True, exist_ok=True)
    tokenizer_model = train_tokenizer(config.tokenizer_documents, config.vocab_size)
    tokenizer = load_tokenizer(tokenizer_model)
    model, log = train(config, tokenizer, WORK, lambda line: print(line, flush=True))

    folder = WORK / "export"
    shutil.rmtree(folder, ignore_errors=True)
    write_model(folder, config, model, tokenizer_model)
    texts = held_out_texts()
    for name, lines in texts.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    shipped = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    measured = Measured(
        parameters=model.num_parameters(),
        fp32=perplexities(model, tokenizer, texts),
        bf16=perplexities(shipped, tokenizer, texts),
        by_position=loss_by_position(shipped, tokenizer, config.max_position_embeddings),
        answers=answer_questions(shipped, tokenizer, QUESTIONS),
        samples=samples(shipped, tokenizer),
        held_out_stories={name: len(lines) for name, lines in texts.items()},
    )
    draw_curve(folder / "training_curve.png", log)
    write_training(folder / "training.json", config, log, measured)
    write_card(folder / "README.md", config, log, measured)
    replace_folder(folder, TARGET)
    print(f"wrote {TARGET}: perplexity {measured.bf16}, {measured.answers.right} of {QUESTIONS} questions right")


if __name__ == "__main__":
    main()
