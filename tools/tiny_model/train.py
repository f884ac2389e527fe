"""Trains the tiny Llama with transformers' own LlamaForCausalLM in fp32; resumes from its last checkpoint."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch.nn import functional
from transformers import LlamaForCausalLM

from .chat import document
from .config import TinyConfig
from .muon import Muon
from .tokenizer import encode


class Packer:
    """Documents, each used once and in order of their seeds, run together into rows."""

    def __init__(self, tokenizer: SentencePieceProcessor, next_seed: int = 0, rest: list[int] | None = None) -> None:
        self.tokenizer, self.next_seed, self.rest = tokenizer, next_seed, list(rest or [])

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """The next `[rows, length + 1]` int64 ids; a row's last is the next row's first, so no target is skipped."""
        needed = rows * length + 1
        while len(self.rest) < needed:
            self.rest += encode(self.tokenizer, document(self.next_seed))
            self.next_seed += 1
        ids = torch.tensor(self.rest[:needed])
        self.rest = self.rest[needed - 1 :]
        return ids.unfold(0, length + 1, length)


def rate_share(config: TinyConfig, step: int) -> float:
    """The share of the peak rates at `step`: linear warmup, then a line to 0 (Bergsma et al. 2025)."""
    return min((step + 1) / config.warmup_steps, 1 - step / config.steps)


def build_model(config: TinyConfig) -> LlamaForCausalLM:
    """The untrained model; output projections start smaller, by the depth, as in GPT-2."""
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(config.llama())
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def build_optimizers(config: TinyConfig, model: LlamaForCausalLM) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices, AdamW without decay for the embeddings and norms."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim < 2 or "embed" in name]
    return (
        Muon(matrices, config.matrix_rate, config.momentum, config.weight_decay),
        torch.optim.AdamW(others, config.embedding_rate, betas=config.betas, weight_decay=0.0, fused=True),
    )


def train(
    config: TinyConfig,
    tokenizer: SentencePieceProcessor,
    folder: Path,
    report: Callable[[str], None] = print,
) -> tuple[LlamaForCausalLM, list[tuple[int, int, float]]]:
    """Trains, or goes on from `folder`'s checkpoint; returns the model and its log: (step, tokens seen, mean loss)."""
    torch.set_num_threads(config.threads)
    model = build_model(config)
    optimizers = build_optimizers(config, model)
    packer, log, done = Packer(tokenizer), [], 0
    path = folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["config"] != json.dumps(asdict(config)):
            raise ValueError(f"{path} belongs to another config; remove it or restore that config")
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        packer = Packer(tokenizer, saved["next_seed"], saved["rest"])
        log, done = saved["log"], saved["done"]
    model.train()
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(done, config.steps):
        length = config.row_lengths[step % len(config.row_lengths)]
        ids = packer.batch(config.batch_tokens // length, length)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        share = rate_share(config, step)
        for optimizer, rate in zip(optimizers, (config.matrix_rate, config.embedding_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
        if (step + 1) % config.log_steps == 0 or step + 1 == config.steps:
            log.append((step + 1, (step + 1) * config.batch_tokens, sum(losses) / len(losses)))
            speed = (step + 1 - done) * config.batch_tokens / (time.perf_counter() - started)
            report(f"step {step + 1}/{config.steps}  loss {log[-1][2]:.4f}  {speed:.0f} tokens/s")
            losses = []
        if (step + 1) % config.checkpoint_steps == 0 or step + 1 == config.steps:
            state = {
                "config": json.dumps(asdict(config)), "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "next_seed": packer.next_seed, "rest": packer.rest, "log": log, "done": step + 1,
            }  # fmt: skip
            torch.save(state, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
    return model.eval(), log
