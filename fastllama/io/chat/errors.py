"""Errors of chat templates that are not syntax errors."""

from __future__ import annotations

from fastllama.errors import CheckpointError


class ConversationRefusedError(ValueError):
    """A template called `raise_exception`: it rejects the conversation."""


class TemplateBudgetError(CheckpointError):
    """A template exceeded its budget of loop steps, recursion or output."""
