"""Trains the tiny Llama with transformers' own LlamaForCausalLM in fp32, stage by stage; resumes from a checkpoint."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from .config import TinyConfig
from .muon import Muon

LogEntry = tuple[int, int, float]  # step, tokens seen, mean training loss since the entry before


class Packer:
    """Packs documents into rows, each used once, in order of their seeds.

    `ids_of` returns a document's ids by its seed; an id without loss is stored as its complement, `~id`.
    """

    def __init__(self, ids_of: Callable[[int], list[int]], next_seed: int = 0) -> None:
        self.ids_of, self.next_seed = ids_of, next_seed
        self.rest: list[int] = []

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """The next `[rows, length + 1]` int64 ids; a row's last is the next row's first, so no target is skipped."""
        needed = rows * length + 1
        while len(self.rest) < needed:
            self.rest += self.ids_of(self.next_seed)
            self.next_seed += 1
        ids = torch.tensor(self.rest[:needed])
        self.rest = self.rest[needed - 1 :]
        return ids.unfold(0, length + 1, length)


class PromptPacker(Packer):
    """Packs documents into rows that each start with a new one, as a prompt does; the excess is cut off."""

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """The next `[rows, length + 1]` int64 ids."""
        return torch.cat([self._row(length) for _ in range(rows)])

    def _row(self, length: int) -> torch.Tensor:
        self.rest = []
        return super().batch(1, length)


def learned_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of `logits` `[rows, length, vocabulary]` to the ids `[rows, length]` that are learned."""
    return functional.cross_entropy(logits.flatten(0, 1), ids.clamp_min(-1).flatten(), ignore_index=-1)


def rate_share(config: TinyConfig, step: int) -> float:
    """The share of the peak rates at `step`: linear warmup, then linear decay to 0 (Bergsma et al. 2025)."""
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
    model: LlamaForCausalLM,
    packer: Packer,
    folder: Path,
    report: Callable[[str], None] = print,
) -> list[LogEntry]:
    """Trains `model` in place, or resumes from `folder`'s checkpoint; returns its log."""
    torch.set_num_threads(config.threads)
    optimizers = build_optimizers(config, model)
    log: list[LogEntry] = []
    done = 0
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["config"] != json.dumps(asdict(config)):
            raise ValueError(f"{path} belongs to another config; remove it or restore that config")
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        packer.next_seed, packer.rest = saved["next_seed"], saved["rest"]
        log, done = saved["log"], saved["done"]
    model.train()
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(done, config.steps):
        length = config.row_lengths[step % len(config.row_lengths)]
        ids = packer.batch(config.batch_tokens // length, length)
        inputs = torch.where(ids < 0, ~ids, ids)[:, :-1]
        loss = learned_loss(model(input_ids=inputs, use_cache=False).logits, ids[:, 1:])
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
    model.eval()
    return log
