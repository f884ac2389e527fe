"""Versions of transformers that cannot register a flash-attention."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import transformers
from transformers import AttentionInterface
from transformers import modeling_flash_attention_utils as flash_utils

from fastllama.integrations.transformers import register
from tests.integrations.models import BEFORE_5

VERSION = re.escape(transformers.__version__)


@pytest.mark.skipif(not BEFORE_5, reason="later versions keep flash-attentions by name")
def test_transformers_4_is_refused_before_anything_is_registered() -> None:
    """They have one flash-attention for all models of a process, and masks by its name: padding in GPT-2 was wrong."""
    with pytest.raises(ImportError, match=rf"transformers {VERSION} has no .*\._loaded_implementation, .*legal: 5\.17"):
        register()
    assert "fastllama_flash" not in AttentionInterface().valid_keys()


def test_a_transformers_without_the_hook_is_refused() -> None:
    with (
        mock.patch.object(flash_utils, "_lazy_imports", None),
        pytest.raises(ImportError, match=rf"transformers {VERSION} has no .*, by which .*legal: 5\.17"),
    ):
        register()
