"""Trains the tiny Llama with transformers' own LlamaForCausalLM in fp32; resumes from its last checkpoint."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch.nn import functional
from transformers import LlamaForCausalLM

from .chat import document
from .config import Phase, TinyConfig
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
    """The share of a phase's rates at `step`: linear warmup, a plateau, a cosine fall over the last `decay_steps`."""
    into_decay = max(0, step - (config.steps - config.decay_steps)) / config.decay_steps
    fall = config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * into_decay))
    return min(1.0, (step + 1) / config.warmup_steps) * fall


def build_model(config: TinyConfig) -> LlamaForCausalLM:
    """The untrained model; output projections start smaller, by the depth, as in GPT-2."""
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(config.llama())
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def build_optimizers(config: TinyConfig, model: LlamaForCausalLM, kind: str) -> tuple[torch.optim.Optimizer, ...]:
    """An optimizer of `kind` for the matrices, and AdamW without decay for the embeddings and norms."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim < 2 or "embed" in name]
    second = torch.optim.AdamW(others, betas=config.betas, weight_decay=0.0, fused=True)
    if kind == "muon":
        return Muon(matrices, 0.0, config.momentum, config.weight_decay), second
    return torch.optim.AdamW(matrices, betas=config.betas, weight_decay=config.weight_decay, fused=True), second


def add_embedding_noise(model: LlamaForCausalLM, deviation: float, seed: int) -> None:
    """Adds seeded Gaussian noise to the embedding table in place."""
    table = model.get_input_embeddings().weight.data
    table += deviation * torch.randn(table.shape, generator=torch.Generator().manual_seed(seed))


def _schedule(config: TinyConfig) -> Iterator[tuple[Phase, bool]]:
    """The phase of each step, and whether the step is the phase's first."""
    for phase in config.phases:
        yield from ((phase, step == 0) for step in range(phase.steps))


def train(
    config: TinyConfig,
    tokenizer: SentencePieceProcessor,
    folder: Path,
    report: Callable[[str], None] = print,
) -> tuple[LlamaForCausalLM, list[tuple[int, int, float]]]:
    """Trains, or goes on from `folder`'s checkpoint; returns the model and its log: (step, tokens seen, mean loss)."""
    torch.set_num_threads(config.threads)
    model = build_model(config)
    kind = config.phases[0].optimizer
    optimizers = build_optimizers(config, model, kind)
    packer, log, done, seen = Packer(tokenizer), [], 0, 0
    path = folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["config"] != json.dumps(asdict(config)):
            raise ValueError(f"{path} belongs to another config; remove it or restore that config")
        model.load_state_dict(saved["model"])
        kind = saved["kind"]
        optimizers = build_optimizers(config, model, kind)
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        packer = Packer(tokenizer, saved["next_seed"], saved["rest"])
        log, done, seen = saved["log"], saved["done"], saved["seen"]
    model.train()
    losses: list[float] = []
    started, seen_before = time.perf_counter(), seen
    for step, (phase, begins) in enumerate(_schedule(config)):
        if step < done:
            continue
        if phase.optimizer != kind:
            kind = phase.optimizer
            optimizers = build_optimizers(config, model, kind)
        if begins and phase.embedding_noise:
            add_embedding_noise(model, phase.embedding_noise, config.seed)
        ids = packer.batch(phase.batch, phase.length)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for optimizer, rate in zip(optimizers, (phase.rate, phase.embedding_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_share(config, step)
            optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
        seen += phase.batch * phase.length
        if (step + 1) % config.log_steps == 0 or step + 1 == config.steps:
            log.append((step + 1, seen, sum(losses) / len(losses)))
            rate = (seen - seen_before) / (time.perf_counter() - started)
            report(f"step {step + 1}/{config.steps}  tokens {seen}  loss {log[-1][2]:.4f}  {rate:.0f} tokens/s")
            losses = []
        if (step + 1) % config.checkpoint_steps == 0 or step + 1 == config.steps:
            state = {
                "config": json.dumps(asdict(config)), "model": model.state_dict(),
                "kind": kind, "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "next_seed": packer.next_seed, "rest": packer.rest, "log": log, "done": step + 1, "seen": seen,
            }  # fmt: skip
            torch.save(state, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
    return model.eval(), log
