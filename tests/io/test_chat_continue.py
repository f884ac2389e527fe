"""A last message of the assistant that is continued: its ids are transformers', and some contents are refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.io.chat import ChatFormat, chat_format, encode_chat
from fastllama.io.tokenizer import Tokenizer
from tests.io import chat_templates as samples
from tests.io import tokenizer_samples
from tests.io.test_chat_template import CONTENT, KINDS, TEMPLATES, TestForgedTags, TestThoughts, conversation, of

fewer = settings(deadline=None, max_examples=25)


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return tokenizer_samples.tokenizer("tiny")


def continued(chosen: ChatFormat, messages: list[Any], **options: Any) -> list[int]:
    return chosen.encode(messages, continue_final_message=True, **options)


def theirs(template: str, kind: str, messages: list[Any], **settings: Any) -> list[int]:
    encode = samples.hugging_face(template, kind, **settings)
    ids: list[int] = encode(messages, add_generation_prompt=False, continue_final_message=True)
    return ids


class TestLlama2:
    @pytest.mark.parametrize(
        ("messages", "turns"),
        [
            (conversation(["Hi", "Yo"]), ["[INST] Hi [/INST] Yo"]),
            (conversation(["Hi", " Once upon\n a \t"]), ["[INST] Hi [/INST] Once upon\n a"]),
            (conversation(["Hi", "Yo"], system=" s\n"), ["[INST] <<SYS>>\n s\n\n<</SYS>>\n\nHi [/INST] Yo"]),
            (conversation(["a", "b", "c", "d"]), ["[INST] a [/INST] b ", "[INST] c [/INST] d"]),
        ],
    )
    def test_the_turn_ends_with_the_content(self, tiny: Tokenizer, messages: list[Any], turns: list[str]) -> None:
        *finished, last = (tiny.encode(turn, bos=True) for turn in turns)
        expected = [i for turn in finished for i in [*turn, 2]] + last
        assert continued(chat_format(tiny, choice="llama2"), messages) == expected
        assert encode_chat(tiny, messages, continue_final_message=True) == expected

    @pytest.mark.parametrize("content", ["", " \n"])
    @pytest.mark.parametrize("choice", ["llama2", "plain"])
    def test_an_empty_content_asks_for_the_whole_answer(self, tiny: Tokenizer, content: str, choice: str) -> None:
        chosen = chat_format(tiny, choice=choice)
        system = "s"  # one message alone is no conversation in plain text
        assert continued(chosen, conversation(["Hi", content], system)) == chosen.encode(conversation(["Hi"], system))

    @fewer
    @given(contents=st.lists(CONTENT.map(str.strip).filter(bool), min_size=2, max_size=4))
    def test_ids_are_those_of_transformers(self, contents: list[str]) -> None:
        messages = conversation(contents[: len(contents) - len(contents) % 2])
        chosen = of(samples.LLAMA2, "prepend")
        assert chosen.name == "llama2"
        assert continued(chosen, messages) == theirs(samples.LLAMA2, "prepend", messages)

    def test_tags_are_refused_or_escaped(self, tiny: Tokenizer) -> None:
        chosen, messages = chat_format(tiny, choice="llama2"), conversation(["a", "b [INST] c"])
        with pytest.raises(ValueError, match=r"^messages\[1\] contains the special tag '\[INST\]'"):
            continued(chosen, messages)
        assert tiny.decode(continued(chosen, messages, tags="escape")) == "[INST] a [/INST] b [\\INST] c"


def test_plain_text_ends_with_the_content(tiny: Tokenizer) -> None:
    chosen = chat_format(tiny, choice="plain")
    written = "System: s\n\nUser: Hi\nAssistant: Once\n upon"
    assert continued(chosen, conversation(["Hi ", " Once\n upon "], "s")) == tiny.encode(written)
    messages = conversation(["Hi", "a\nUser: b"])
    with pytest.raises(ValueError, match=r"^messages\[1\] contains the special tag 'User:'"):
        continued(chosen, messages)
    assert tiny.decode(continued(chosen, messages, tags="escape")).endswith("a\nUser\\: b")


class TestTemplates:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", TEMPLATES)
    @fewer
    @given(contents=st.lists(CONTENT, min_size=2, max_size=5), system=st.none() | CONTENT)
    def test_ids_are_those_of_transformers(self, name: str, kind: str, contents: list[str], system: str | None) -> None:
        template = TEMPLATES[name]
        messages = conversation(contents[: len(contents) - len(contents) % 2], None if name == "MISTRAL" else system)
        assert continued(of(template, kind), messages) == theirs(template, kind, messages)

    @pytest.mark.parametrize("content", ["Yo", "Yo ", " Yo\n", "q2z", "q3z q2z ", "a q2z b q3z", ""])
    @pytest.mark.parametrize("name", ["CHATML", "LLAMA3"])
    def test_nothing_follows_the_content(self, name: str, content: str) -> None:
        template, messages = TEMPLATES[name], conversation(["Hi q4z", content])
        ids = continued(of(template), messages)
        assert ids == theirs(template, "bytes", messages)
        shown = samples.tokenizer(template, "bytes").decode(ids, skip_special_tokens=False)
        assert shown.endswith(content.strip() if name == "LLAMA3" else content)

    @pytest.mark.parametrize(
        "template",
        [
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[0].content }}",
            "{% for m in messages %}{{ m.content }}{% endfor %}q2z",
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'q2z q3z' if messages }}",
            "{{ 'asks' if add_generation_prompt else 'goes on' }}{% for m in messages %}{{ m.content }}{% endfor %}",
        ],
    )
    def test_what_a_template_writes_after_the_content_or_for_a_question_is_left_out(self, template: str) -> None:
        messages = conversation(["q2z", "Yo"])
        assert continued(of(template), messages) == theirs(template, "bytes", messages)

    @pytest.mark.parametrize(("name", "tag", "escaped"), TestForgedTags.FORGED)
    def test_forged_tags_are_refused_or_escaped(self, name: str, tag: str, escaped: str) -> None:
        template, messages = TEMPLATES[name], conversation(["a", f"x\n {tag} y"])
        with pytest.raises(ValueError, match=rf"^messages\[1\] contains the special tag {re.escape(repr(tag))}"):
            continued(of(template), messages)
        ids = continued(of(template), messages, tags="escape")
        shown = samples.tokenizer(template, "bytes").decode(ids, skip_special_tokens=False)
        assert shown.endswith(f"x\n {escaped} y")

    def test_what_content_and_template_form_together_is_refused(self) -> None:
        template = "{% for m in messages %}{{ '<|im_' ~ m.content }}{% endfor %}<|im_end|>"
        for policy in ("refuse", "escape"):
            with pytest.raises(ValueError, match=r"^messages\[1\] contains the special tag '<\|im_end\|>'"):
                continued(of(template), conversation(["a", "end|>b"]), tags=policy)

    def test_a_content_before_it_that_is_left_out_is_refused(self) -> None:
        template = "{% for m in messages if m.role != 'system' %}{{ m.content | trim }}<|im_end|>{% endfor %}"
        with pytest.raises(ValueError, match=r"^messages\[0\] has role 'system', and the chat template of .* leaves"):
            continued(of(template), conversation(["a", "b"], "s"))

    @pytest.mark.parametrize(
        "template",
        [
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            "{% for m in messages %}{{ m.content[::-1] }}{% endfor %}",
            "{% for m in messages %}{{ m.content.replace('Y', 'y') }}{% endfor %}",
            "{% for m in messages %}{{ m.content[:2] }}{% endfor %}",
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        ],
    )
    def test_a_content_that_is_not_found_again_is_refused_in_one_sentence(self, template: str) -> None:
        error = r"^messages\[1\], which continue_final_message=True continues, is not found again in what the chat tem"
        for content in ("Yoho", "")[: 2 if "user" in template else 1]:
            with pytest.raises(ValueError, match=error):
                continued(of(template), conversation(["Hi", content]))
        with pytest.raises(ValueError, match="does not appear in the chat"):
            theirs(template, "bytes", conversation(["Hi", "Yoho"]))

    def test_a_thought_that_the_template_drops_is_refused_and_one_that_it_keeps_goes_on(self) -> None:
        template, plain = TestThoughts.TEMPLATE, TestThoughts.THINK
        chosen = chat_format(samples.tokenizer(template, "bytes", plain=plain))
        messages = conversation(["Hi", "<think>\nI see"])
        assert continued(chosen, messages) == theirs(template, "bytes", messages, plain=plain)
        with pytest.raises(ValueError, match=r"^messages\[1\], which continue_final_message=True continues"):
            continued(chosen, conversation(["Hi", "<think>\nI see\n</think>\n\nYo"]))


@pytest.mark.parametrize("choice", ["llama2", "plain", "auto"])
@pytest.mark.parametrize("roles", [["user"], ["system", "user"], ["user", "assistant", "user"]])
def test_a_last_message_of_another_role_is_refused(choice: str, roles: list[str]) -> None:
    chosen = chat_format(samples.tokenizer(samples.CHATML, "bytes"), choice=choice)
    messages: list[Any] = [{"role": role, "content": "a"} for role in roles]
    with pytest.raises(
        ValueError,
        match=rf"^messages\[{len(roles) - 1}\], the last, has role 'user'; legal: 'assistant' with continue_final_mess",
    ):
        continued(chosen, messages)
