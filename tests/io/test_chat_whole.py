"""Whole prompts: texts in Llama 2's chat format become the ids of the conversation, and no other special piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.io.chat import ChatFormat, chat_format
from fastllama.io.chat.whole import TAGS
from fastllama.io.tokenizer import Tokenizer, load_tokenizer
from tests.io import chat_templates as templates
from tests.io import tokenizer_samples as samples
from tests.io.test_chat_template import conversation

SYSTEM = """You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being \
safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. \
Please ensure that your responses are socially unbiased and positive in nature.

If a question does not make any sense, or is not factually coherent, explain why instead of answering something not \
correct. If you don't know the answer to a question, please don't share false information."""
QUESTION = "Why do I need to run machine learning models on-premise?"
SERVICE_PAGE = f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{QUESTION} [/INST]"  # of a llama-2-13b service's examples
KINDS = ("prepend", "metaspace", "bytes")


@pytest.fixture(scope="module", params=["tiny", "llama2"])
def tokenizer(request: Any) -> Tokenizer:
    return samples.tokenizer(request.param)


@pytest.fixture(scope="module")
def llama2(tokenizer: Tokenizer) -> ChatFormat:
    return chat_format(tokenizer, choice="llama2")


def of(template: str, kind: str) -> ChatFormat:
    return chat_format(templates.tokenizer(template, kind))


class TestLlama2:
    @pytest.mark.parametrize("before", ["<s>", "", " <s> ", "\n<s>\n"])
    @pytest.mark.parametrize("after", ["", "\n "])
    def test_ids_of_a_service_pages_example_are_those_of_its_messages(
        self, llama2: ChatFormat, before: str, after: str
    ) -> None:
        text = before + SERVICE_PAGE.removeprefix("<s>") + after
        assert llama2.encode_whole(text) == llama2.encode(conversation([QUESTION], SYSTEM))

    @pytest.mark.parametrize("between", ["</s><s>", "</s>\n<s> ", "</s> <s>"])
    def test_ids_of_several_turns_are_those_of_the_conversation(self, llama2: ChatFormat, between: str) -> None:
        text = f"<s>[INST] a [/INST] b {between}[INST] c\nd [/INST]  {between}[INST] e [/INST]"
        assert llama2.encode_whole(text) == llama2.encode(conversation(["a", "b", "c\nd", "", "e"]))

    def test_all_else_stays_as_it_is_written(self, llama2: ChatFormat, tokenizer: Tokenizer) -> None:
        ids = llama2.encode_whole("[INST]a  [/INST]b</s>[INST] <<SYS>>c[/INST] d [INST] e [/INST]")
        written = tokenizer.encode("[INST] <<SYS>>c[/INST] d [INST] e [/INST]", bos=False)
        assert ids == [*tokenizer.encode("[INST]a  [/INST]b", bos=True), 2, *written]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "Hi",
            "<s>",
            "[INST]",
            "[/INST]",
            "<s>Hi [INST] a [/INST]",
            "[INST] a",
            "[INST] a [/INST] Sure",
            "[INST] a [/INST] b </s>",
            "[INST] a [/INST] b </s><s>c",
            "[INST] a </s><s>[INST] b [/INST]",
            "[inst] a [/inst]",
            "<s><s>[INST] a [/INST]",
        ],
    )
    def test_any_other_text_is_none(self, llama2: ChatFormat, text: str) -> None:
        assert llama2.encode_whole(text) is None

    @settings(deadline=None, max_examples=100)
    @given(
        parts=st.lists(
            st.sampled_from(["<s>", "</s>", "<unk>", *TAGS, "<0x0A>", "▁<PRE>", "<|im_end|>", "[PAD]", " ", "a", "\\"])
        )
    )
    def test_ids_of_special_pieces_are_those_between_turns(self, parts: list[str]) -> None:
        for template, kind in ((templates.LLAMA2, "prepend"), (templates.MISTRAL, "bytes")):
            tokenizer = templates.tokenizer(template, kind)
            ids = of(template, kind).encode_whole(f"[INST] {''.join(parts)} [/INST]", tags="escape")
            assert ids is not None or "</s>" in parts
            found = "".join(tokenizer.id_to_piece(i) for i in ids or () if i in tokenizer.special_ids)
            assert found.replace("</s><s>", "").replace("</s>", "") in ("<s>", "")
            assert found.count("</s>") <= parts.count("</s>")

    def test_a_long_text_takes_no_longer_than_its_length(self, llama2: ChatFormat) -> None:
        for piece in ("</s>" + " " * 1000, "</s><s>", "</s> <s> ", "[INST] ", "[/INST]"):
            assert llama2.encode_whole("[INST] " + piece * (500_000 // len(piece)) + "x") is None
        assert llama2.encode_whole("[INST] </s>" + " " * 500_000 + "<s>" + " " * 500_000 + "x") is None


@pytest.mark.parametrize("choice", ["llama2", "plain"])
def test_added_tokens_inside_of_a_turn_are_refused_or_escaped(choice: str) -> None:
    tokenizer = templates.tokenizer(templates.LLAMA2, "prepend")
    chosen = chat_format(tokenizer, choice=choice)
    with pytest.raises(ValueError, match=r"^the prompt contains the special tag '<\|im_end\|>' inside a turn; remove"):
        chosen.encode_whole("[INST] a<|im_end|>b [/INST]")
    ids = chosen.encode_whole("[INST] a<|im_end|>b [/INST]", tags="escape")
    assert ids == tokenizer.encode("[INST] a<\\|im_end|>b [/INST]", bos=True)
    assert ids == chat_format(tokenizer).encode(conversation(["a<|im_end|>b"]), tags="escape")


def test_a_tokenizer_without_bos_gets_none() -> None:
    tokenizer = templates.tokenizer(templates.LLAMA2, "bytes", bos_token=None)
    assert tokenizer.bos_token_id is None
    chosen = chat_format(tokenizer, choice="plain")
    assert chosen.encode_whole("<s>[INST] a [/INST]") == tokenizer.encode("[INST] a [/INST]", bos=False)


def test_plain_text_takes_them_too(tokenizer: Tokenizer) -> None:
    chosen = chat_format(tokenizer, choice="plain")
    assert chosen.encode_whole(SERVICE_PAGE) == chat_format(tokenizer, choice="llama2").encode_whole(SERVICE_PAGE)
    assert chosen.encode_whole("User: a\nAssistant:") is None


class TestTemplates:
    @pytest.mark.parametrize("kind", KINDS)
    def test_ids_are_those_of_the_conversation(self, kind: str) -> None:
        chosen = of(templates.MISTRAL, kind)
        assert chosen.name == "template"
        messages = conversation(["Hi é", " b", "c"])
        for before in ("<s>", "", "<s> "):
            assert chosen.encode_whole(f"{before}[INST] Hi é [/INST] b</s>[INST] c [/INST]") == chosen.encode(messages)

    def test_bos_is_where_it_is_written(self) -> None:
        chosen, tokenizer = of(templates.MISTRAL, "bytes"), templates.tokenizer(templates.MISTRAL, "bytes")
        ids = chosen.encode_whole("[INST] a [/INST]b</s><s>[INST] c [/INST]")
        assert ids == tokenizer.encode_template("<s>[INST] a [/INST]b</s><s>[INST] c [/INST]")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("piece", "escaped"), [("<s>", "<\\s>"), ("</s>", "<\\/s>"), ("<unk>", "<\\unk>"), ("[PAD]", "[\\PAD]")]
    )
    def test_special_pieces_inside_of_a_turn_are_refused_or_escaped(self, piece: str, escaped: str, kind: str) -> None:
        chosen, tokenizer = of(templates.MISTRAL, kind), templates.tokenizer(templates.MISTRAL, kind)
        with pytest.raises(ValueError, match=r"^the prompt contains the special tag '.*' inside a turn"):
            chosen.encode_whole(f"[INST] a{piece}b [/INST]")
        ids = chosen.encode_whole(f"[INST] a{piece}b [/INST]", tags="escape")
        assert ids == tokenizer.encode_template(f"<s>[INST] a{escaped}b [/INST]")

    @pytest.mark.parametrize("tags", ["refuse", "escape"])
    def test_what_the_tokenizer_makes_a_special_piece_is_refused(self, tags: Any, tmp_path: Path) -> None:
        """A tokenizer that reads capital letters as small ones, in added tokens too."""
        file = templates.write_folder(tmp_path, templates.MISTRAL, kind="bytes") / "tokenizer.json"
        spec = json.loads(file.read_text())
        spec["normalizer"] = {"type": "Lowercase"}
        for token in spec["added_tokens"]:
            token["normalized"] = True
        file.write_text(json.dumps(spec))
        chosen = chat_format(load_tokenizer(tmp_path))
        with pytest.raises(ValueError, match=r"^the prompt contains the special tag '<\|im_end\|>' inside a turn"):
            chosen.encode_whole("[INST] a<|IM_END|>b [/INST]", tags=tags)
        assert chosen.encode_whole("[INST] a [/INST]", tags=tags) == chosen.encode(conversation(["a"]))

    @pytest.mark.parametrize("template", [templates.CHATML, templates.VICUNA])
    def test_one_that_does_not_write_the_tag_takes_none(self, template: str) -> None:
        assert of(template, "bytes").encode_whole("<s>[INST] a [/INST]") is None


def test_what_is_no_text_or_no_rule_is_refused(llama2: ChatFormat) -> None:
    with pytest.raises(TypeError, match=r"^text must be str, got list$"):
        llama2.encode_whole(["[INST] a [/INST]"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^tags is 'pass'; legal values: 'refuse', 'escape'"):
        llama2.encode_whole("a", tags="pass")  # type: ignore[arg-type]
