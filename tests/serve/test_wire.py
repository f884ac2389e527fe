"""JSON bodies leave out fields without a value."""

from __future__ import annotations

import json

import msgspec

from fastllama.serve.wire import ModelCard


def test_a_card_has_a_notice_only_where_one_is_given() -> None:
    card = {"object": "model", "id": "tiny", "created": 1, "owned_by": "fastllama", "max_model_len": 8}
    given = ModelCard(id="tiny", created=1, owned_by="fastllama", max_model_len=8)
    assert json.loads(msgspec.json.encode(given)) == card
    given.notice = "# Limits"
    assert json.loads(msgspec.json.encode(given)) == card | {"notice": "# Limits"}
