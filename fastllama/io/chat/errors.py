"""How a chat template can fail beside being broken."""

from __future__ import annotations

from fastllama.errors import CheckpointError


class ConversationRefusedError(ValueError):
    """A template called `raise_exception`: the conversation is not one that it writes."""


class TemplateBudgetError(CheckpointError):
    """A template loops, calls itself or grows beyond reason."""
