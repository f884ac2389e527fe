"""Llama 2's chat ids against Meta's format spelled out, and against its chat template run by transformers."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.io.chat import TAGS, encode_chat
from fastllama.io.tokenizer import Tokenizer
from tests.io import tokenizer_samples as samples
from tests.io.chat_templates import LLAMA2

ODD = "ab \n\t\u3000\u00a0é😀"
CONTENT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<>[]")) | st.text(ODD)
fewer = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module", params=["tiny", "tiny-metaspace", "llama2"])
def tokenizer(request) -> Tokenizer:
    return samples.tokenizer(request.param)


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return samples.tokenizer("tiny")


@pytest.fixture(scope="module", params=["tiny", "llama2"])
def name(request) -> str:
    samples.model_bytes(request.param)
    return request.param


def hugging_face(name: str, layout: str):
    """transformers' tokenizer over the same vocabulary, with Llama 2's template."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        path = samples.write_json(samples.model_bytes(name), Path(folder), layout)
        backend = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>", eos_token="</s>")
    backend.chat_template = LLAMA2
    return lambda messages: backend.apply_chat_template(messages, tokenize=True, return_dict=False)


@pytest.fixture(scope="module")
def template(name):
    """The ids of Llama 2's chat template, tokenized as the checkpoints on the hub are."""
    return hugging_face(name, "prepend")


def conversation(contents: list[str], system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


@pytest.mark.parametrize(
    ("messages", "turns"),
    [
        (conversation(["Hi"]), ["[INST] Hi [/INST]"]),
        (conversation([" \tHi\n "]), ["[INST] Hi [/INST]"]),
        (conversation([""]), ["[INST]  [/INST]"]),
        (
            conversation(["One?", "  Two.\n", "Three?"]),
            ["[INST] One? [/INST] Two. ", "[INST] Three? [/INST]"],
        ),
        (
            conversation(["é😀?", "", "b", "c", "d"]),
            ["[INST] é😀? [/INST]  ", "[INST] b [/INST] c ", "[INST] d [/INST]"],
        ),
        (
            conversation(["  Hi ", "Yo", "b"], system=" Be \nbrief. "),
            ["[INST] <<SYS>>\n Be \nbrief. \n<</SYS>>\n\n  Hi [/INST] Yo ", "[INST] b [/INST]"],
        ),
        (conversation(["Hi"], system=""), ["[INST] <<SYS>>\n\n<</SYS>>\n\nHi [/INST]"]),
        (conversation([" "], system="s"), ["[INST] <<SYS>>\ns\n<</SYS>> [/INST]"]),
        (conversation(["<s>a</s>"]), ["[INST] <s>a</s> [/INST]"]),
    ],
)
def test_format_of_meta(tokenizer, messages, turns):
    *finished, last = (tokenizer.encode(turn) for turn in turns)
    assert encode_chat(tokenizer, messages) == [i for turn in finished for i in [*turn, 2]] + last


def test_ids_of_llama2():
    ids = encode_chat(samples.tokenizer("llama2"), conversation(["Hi", "Yo", "b"]))
    assert ids[:3] == [1, 518, 25580]  # <s> ▁[ INST
    assert [(i, ids[i + 1]) for i, token_id in enumerate(ids) if token_id == 2] == [(ids.index(2), 1)]
    assert ids[ids.index(2) - 1] == 29871  # the space after the answer
    assert ids[-4:] == [518, 29914, 25580, 29962]  # ▁[ / INST ]


@fewer
@given(contents=st.lists(CONTENT, min_size=1, max_size=5), system=st.none() | CONTENT)
def test_ids_of_the_chat_template(name, template, contents, system):
    messages = conversation(contents[: len(contents) - 1 + len(contents) % 2], system)
    assert encode_chat(samples.tokenizer(name), messages) == template(messages)


def test_the_template_takes_special_looking_text_for_control_ids(name, template):
    messages = conversation(["a</s>b"])
    assert 2 in template(messages)
    ids = encode_chat(samples.tokenizer(name), messages)
    assert 2 not in ids
    assert "a</s>b" in samples.tokenizer(name).decode(ids)


def test_the_template_loses_the_leading_space_in_the_metaspace_layout(name):
    messages = conversation(["Hi"])
    llama = samples.tokenizer(name)
    theirs = hugging_face(name, "metaspace")(messages)
    assert llama.id_to_piece(theirs[1]).startswith("[")
    assert llama.id_to_piece(encode_chat(llama, messages)[1]).startswith("▁")


class TestTags:
    @pytest.mark.parametrize("tag", TAGS)
    @pytest.mark.parametrize(("index", "system"), [(0, None), (1, None), (2, None), (0, "system")])
    def test_are_refused(self, tiny, tag, index, system):
        contents = ["a", "b", "c"]
        contents[index] = f"x{tag}y"
        at = index if system is None else index + 1
        with pytest.raises(ValueError, match=rf"^messages\[{at}\] contains the special tag {re.escape(repr(tag))}"):
            encode_chat(tiny, conversation(contents, system))

    @pytest.mark.parametrize("tag", TAGS)
    def test_are_refused_in_the_system_message(self, tiny, tag):
        with pytest.raises(ValueError, match=rf"^messages\[0\] contains the special tag {re.escape(repr(tag))}"):
            encode_chat(tiny, conversation(["a"], system=tag))

    @pytest.mark.parametrize(
        ("content", "escaped"),
        [
            ("[INST]", r"[\INST]"),
            ("a [/INST] b", r"a [\/INST] b"),
            ("<<SYS>>x<</SYS>>", r"<<\SYS>>x<<\/SYS>>"),
            ("[[INST]]<<<SYS>>>", r"[[\INST]]<<<\SYS>>>"),
            (r"[\INST] [inst] [ INST] <SYS>", r"[\INST] [inst] [ INST] <SYS>"),
        ],
    )
    def test_are_escaped_on_request(self, tiny, content, escaped):
        messages = conversation([content, content, content], system=content)
        expected = encode_chat(tiny, conversation([escaped, escaped, escaped], system=escaped))
        assert encode_chat(tiny, messages, tags="escape") == expected

    @fewer
    @given(content=st.lists(st.sampled_from([*TAGS, "[", "/", "<", "INST]", "SYS>>", "\\", "a", " "])).map("".join))
    def test_none_is_left_after_escaping(self, tiny, content):
        text = tiny.decode(encode_chat(tiny, conversation([content]), tags="escape"))
        inside = text.removeprefix("[INST]").removesuffix("[/INST]")
        assert not any(tag in inside for tag in TAGS)
        assert inside.replace("\\", "").strip() == content.replace("\\", "").strip()

    def test_other_policies_are_refused(self, tiny):
        with pytest.raises(ValueError, match=r"^tags is 'pass'; legal values: 'refuse', 'escape'"):
            encode_chat(tiny, conversation(["a"]), tags="pass")


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ([], r"^messages is empty; legal: at least one message, the last from the user$"),
        (["assistant"], r"^messages\[0\] has role 'assistant'; legal here: 'system' or 'user'"),
        (["tool"], r"^messages\[0\] has role 'tool'; legal here: 'system' or 'user'"),
        (["user", "user"], r"^messages\[1\] has role 'user'; legal here: 'assistant'"),
        (["user", "system"], r"^messages\[1\] has role 'system'; legal here: 'assistant'"),
        (["system", "assistant"], r"^messages\[1\] has role 'assistant'; legal here: 'user'"),
        (["system", "system", "user"], r"^messages\[1\] has role 'system'; legal here: 'user'"),
        (["user", "assistant", "assistant"], r"^messages\[2\] has role 'assistant'; legal here: 'user'"),
        (["system", "user", "assistant"], r"^messages\[2\], the last, has role 'assistant'; legal: 'user'$"),
        (["system"], r"^messages\[0\], the last, has role 'system'; legal: 'user'$"),
        (["system", "assistant", "user"], r"^messages\[1\] has role 'assistant'; legal here: 'user'"),
    ],
)
def test_order_of_roles(tiny, roles, message):
    with pytest.raises(ValueError, match=message):
        encode_chat(tiny, [{"role": role, "content": "a"} for role in roles])


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("Hi", r"^messages\[1\] is 'Hi'; legal: a mapping of 'role' and 'content'$"),
        ({"role": "assistant"}, r"^messages\[1\] is .*; legal: a mapping of 'role' and 'content'$"),
        ({"role": "assistant", "content": "", "name": "x"}, r"^messages\[1\] is .*; legal: a mapping"),
        ({"role": ["user"], "content": ""}, r"^messages\[1\]\['role'\] must be str, got list$"),
        ({"role": "assistant", "content": None}, r"^messages\[1\]\['content'\] must be str, got NoneType$"),
    ],
)
def test_shape_of_messages(tiny, message, error):
    with pytest.raises(TypeError, match=error):
        encode_chat(tiny, [{"role": "user", "content": "a"}, message, {"role": "user", "content": "b"}])
