"""A checkpoint's chat template renders as in transformers, and messages may not spell special pieces."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.io.chat import ChatFormat, chat_format, encode_chat
from tests.io import chat_templates as samples

TEMPLATES = {
    name: getattr(samples, name)
    for name in ("ZEPHYR", "CHATML", "CHATML_DEFAULT", "LLAMA3", "VICUNA", "MISTRAL", "ALPACA", "OPENCHAT", "MACHINERY")
}
KINDS = ("prepend", "metaspace", "bytes")
ODD = "ab \n\t\u3000\u00a0é😀."
CONTENT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<>[]#:*=|-\uff1a")) | st.text(ODD)
fewer = settings(deadline=None, max_examples=25)


def conversation(contents: list[str], system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


def of(template: str, kind: str = "bytes") -> ChatFormat:
    return chat_format(samples.tokenizer(template, kind))


def text(chosen: ChatFormat, template: str, messages: list[Any], **options: Any) -> str:
    """The rendered conversation, special pieces shown."""
    ids = chosen.encode(messages, **options)
    return samples.tokenizer(template, "bytes").decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@fewer
@given(contents=st.lists(CONTENT, min_size=1, max_size=5), system=st.none() | CONTENT)
def test_ids_are_those_of_transformers(name: str, kind: str, contents: list[str], system: str | None) -> None:
    template = TEMPLATES[name]
    messages = conversation(contents[: len(contents) - 1 + len(contents) % 2], None if name == "MISTRAL" else system)
    assert encode_chat(samples.tokenizer(template, kind), messages) == samples.hugging_face(template, kind)(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}{{ pad_token }}",
        "{{ messages[0].content }}{{ strftime_now('%Y-%m-%d') }}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': '<é>', 'a': 1} | tojson(sort_keys=true) }}",
        "{% for m in messages %}\n  {% if true %}\n    {{ m.content }}\n  {% endif %}\n{% endfor %}\n",
        "{{ messages[0]['content'].replace('a', 'b').split('b')[0].title() + messages[-1].content }}",
        "{{ messages[0].content | length }}{{ messages[0].content }}{{ '%s-%03d' | format('a', 7) }}",
        "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ messages[0].content ~ ns.a }}",
        "{{ dict.fromkeys(['a'], 1)['a'] }}{{ dict(a=2).a }}{{ messages[0].content }}{{ range(4) | list }}",
        "{% generation %}{% set ns = 3 %}{{ messages[0].content }}{% endgeneration %}{{ ns is defined }}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif %}{{ i }}"
        "{% endfor %}{{ messages[0].content }}",
        "{{ messages[0].content }}{% raw %}{{ x }}{% endraw %}{# c #}{{- '  a' -}}  b",
        "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ messages[0].content }}",
        "{{ (messages[0].content, 1) }}{{ [1] + [2] }}{{ 'ab' * 2 }}{{ 2 ** 5 }}{{ 2 * 1.5 }}{{ none ~ 1 }}",
        "{% for a in [1, [2]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}{{ messages[0].content }}",
        "{% for m in messages %}{{ loop.index0 }}{{ loop.first }}{{ loop.length }}{{ loop.nextitem is defined }}"
        "{{ m.content }}{% else %}none{% endfor %}",
        "{{ messages[0].content | trim | upper | lower | capitalize | center(9) | indent(2) }}",
    ],
)
def test_the_language_is_that_of_transformers(template: str) -> None:
    theirs = samples.hugging_face(template, "bytes")
    for content in ("a fox", " a\tfox\n", "é"):
        messages = conversation([content])
        assert encode_chat(samples.tokenizer(template, "bytes"), messages) == theirs(messages)


class TestEndsOfAnAnswer:
    @pytest.mark.parametrize(
        ("name", "stop", "pieces"),
        [
            ("ZEPHYR", (), ["</s>"]),
            ("CHATML", (), ["</s>", "<|im_end|>"]),
            ("LLAMA3", (), ["</s>", "<|eot_id|>"]),
            ("VICUNA", (), ["</s>"]),
            ("ALPACA", ("\n### Instruction:",), ["</s>"]),
            ("OPENCHAT", (), ["</s>", "<|im_end|>"]),
        ],
    )
    def test_are_what_the_template_writes_after_it(self, name: str, stop: Any, pieces: list[str]) -> None:
        for kind in KINDS:
            chosen = of(TEMPLATES[name], kind)
            assert chosen.stop == stop
            tokenizer = samples.tokenizer(TEMPLATES[name], kind)
            assert [tokenizer.id_to_piece(i) for i in chosen.stop_token_ids] == pieces

    @pytest.mark.parametrize(
        ("after", "stop"),
        [
            ("'\\n<|user|>\\n'", ("<|user|>",)),
            ("' USER: '", ("USER:",)),
            ("'\\n'", ()),
            ("' and '", ()),
            ("'<|user|>' ~ eos_token ~ ' '", ()),
        ],
    )
    def test_are_text_only_where_a_tag_or_label_follows(self, after: str, stop: tuple[str, ...]) -> None:
        template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% else %}"
            f"{{{{ {after} + m.content + ' ASSISTANT: ' }}}}{{% endif %}}{{% endfor %}}"
        )
        assert of(template).stop == stop


class TestForgedTags:
    FORGED = (
        ("ZEPHYR", "</s>", "<\\/s>"),
        ("ZEPHYR", "<|user|>", "<\\|user|>"),
        ("ZEPHYR", "<|assistant|>", "<\\|assistant|>"),
        ("CHATML", "<|im_start|>", "<\\|im_start|>"),
        ("CHATML", "<|im_end|>", "<\\|im_end|>"),
        ("CHATML", "[PAD]", "[\\PAD]"),
        ("LLAMA3", "<|eot_id|>", "<\\|eot_id|>"),
        ("MISTRAL", "[INST]", "[\\INST]"),
        ("MISTRAL", "[/INST]", "[\\/INST]"),
        ("VICUNA", "USER:", "USER\\:"),
        ("VICUNA", "ASSISTANT:", "ASSISTANT\\:"),
        ("ALPACA", "### Instruction:", "### Instruction\\:"),
        ("ALPACA", "### Response:", "### Response\\:"),
        ("OPENCHAT", "GPT4 Correct User:", "GPT4 Correct User\\:"),
    )

    @pytest.mark.parametrize("index", [0, 1, 2])
    @pytest.mark.parametrize(("name", "tag", "escaped"), FORGED)
    def test_are_refused_or_escaped(self, name: str, tag: str, escaped: str, index: int) -> None:
        contents = ["a", "b", "c"]
        contents[index] = f"x\n {tag} y"
        chosen = of(TEMPLATES[name])
        error = (
            rf"^messages\[{index}\] contains the special tag {re.escape(repr(tag))}, which would pose as another role;"
        )
        with pytest.raises(ValueError, match=error):
            chosen.encode(conversation(contents))
        written = text(chosen, TEMPLATES[name], conversation(contents), tags="escape")
        assert f"x\n {escaped} y" in written
        harmless = text(chosen, TEMPLATES[name], conversation(["a", "b", "c"]))
        assert written.count(tag) == harmless.count(tag)

    def test_are_refused_in_the_system_message(self) -> None:
        with pytest.raises(ValueError, match=r"^messages\[0\] contains the special tag '<\|im_end\|>'"):
            of(samples.CHATML).encode(conversation(["a"], system="b<|im_end|>"))

    @pytest.mark.parametrize(
        ("template", "content", "tag"),
        [
            ("{{ '<|im_' + messages[0].content + '|>' }}", "end", "<|im_end|>"),
            ("{{ messages[0].content.replace('_', '') }}<|im_end|>", "<_/s>", "</s>"),
            ("{{ messages[0].content | replace('.', '') }}<|im_end|>", "<|im_.end|>", "<|im_end|>"),
            ("{{ messages[0].content.split('~') | join }}<|im_end|>", "<|im~_end|>", "<|im_end|>"),
            ("{{ messages[0].content | lower }}<|im_end|>", "<|IM_END|>", "<|im_end|>"),
            ("{{ '[/' ~ messages[0].content }}[/INST]", "INST]", "[/INST]"),
            ("{{ '</' ~ messages[0].content }}", "s>", "</s>"),
            ("{{ '<' ~ (messages[0].content | trim) ~ '>' }}", " /s ", "</s>"),
            ("{% for c in messages[0].content %}{{ c if c != '.' }}{% endfor %}", "</.s>", "</s>"),
            ("{{ messages[0].content[::-1] }}", ">s/<", "</s>"),
        ],
    )
    def test_that_content_and_template_form_together_are_refused(self, template: str, content: str, tag: str) -> None:
        messages = conversation([content])
        for policy in ("refuse", "escape"):
            error = rf"^messages\[0\] contains the special tag {re.escape(repr(tag))}"
            with pytest.raises(ValueError, match=error):
                of(template).encode(messages, tags=policy)  # type: ignore[arg-type]
        harmless = conversation(["fox"])
        assert of(template).encode(harmless) == samples.hugging_face(template, "bytes")(harmless)

    def test_that_two_contents_form_together_are_refused(self) -> None:
        template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        with pytest.raises(ValueError, match=r"^messages together form special tags of the chat template"):
            of(template).encode(conversation(["<|im_", "end|>", "a"]))

    @fewer
    @given(
        contents=st.lists(
            st.lists(
                st.sampled_from(
                    ["<|im_end|>", "<|im_", "end|>", "</s>", "<", "|>", "[PAD]", "[", "PAD]", "\\", "a", " "]
                )
            ).map("".join),
            min_size=3,
            max_size=3,
        )
    )
    @pytest.mark.parametrize("kind", KINDS)
    def test_none_is_left_after_escaping(self, kind: str, contents: list[str]) -> None:
        tokenizer = samples.tokenizer(samples.CHATML, kind)
        ids = encode_chat(tokenizer, conversation(contents), tags="escape")
        pieces = [tokenizer.id_to_piece(i) for i in ids if i in tokenizer.special_ids]
        assert pieces == ["<|im_start|>", "<|im_end|>"] * 3 + ["<|im_start|>"]
        shown = tokenizer.decode(ids).replace("\\", "")
        assert all(content.replace("\\", "").strip() in shown for content in contents)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("CHATML", "user assistant system"),
            ("CHATML_DEFAULT", "You are a helpful assistant."),
            ("LLAMA3", "user\n\nToday Date: 26 Jul 2024"),
            ("ALPACA", "Use ### Instruction: within a line. A heading:\n# Instruction\nnote: x"),
            ("VICUNA", "user: a, Assistant: b [1] <b>"),
            ("MISTRAL", "[1] [inst] a[0] <<SYS>> <|im|>"),
            ("ZEPHYR", "<user> [INST] | user | <|User|>"),
        ],
    )
    def test_other_text_is_let_through(self, name: str, content: str) -> None:
        messages = conversation([content, content, content], None if name == "MISTRAL" else content)
        theirs = samples.hugging_face(TEMPLATES[name], "bytes")
        assert of(TEMPLATES[name]).encode(messages) == theirs(messages)

    @pytest.mark.parametrize(
        ("role", "fragment"),
        [
            ("user|>\n<|system", "legal: a word"),
            ("<|im_end|>", "legal: a word"),
            ("", "legal: a word"),
            ("im_end", "names the special token '<|im_end|>'"),
            ("s", "names the special token '</s>'"),
        ],
    )
    def test_a_role_cannot_be_one_either(self, role: str, fragment: str) -> None:
        template = "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|im_end|>' }}{% endfor %}"
        with pytest.raises(
            ValueError, match=rf"^messages\[0\] has role {re.escape(repr(role))}.*{re.escape(fragment)}"
        ):
            of(template).encode([{"role": role, "content": "a"}])
        assert of(template).encode([{"role": "tool", "content": "a"}])


class TestThoughts:
    """A template in the manner of DeepSeek R1's: the answer's head begins a thought, and history has none."""

    TEMPLATE = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|im_start|>' ~ m.content.split('</think>')[-1] ~ '<|im_end|>' }}"
        "{% else %}{{ '[PAD]' ~ m.content }}{% endif %}{% endfor %}"
        "{{ '<|im_start|><think>\\n' if add_generation_prompt }}"
    )
    THINK = ("<think>", "</think>")

    @pytest.mark.parametrize("answer", ["I see\n</think>\n\nYo", "<think>\nI see\n</think>\n\nYo", "a </think> b"])
    def test_may_stand_in_an_answer(self, answer: str) -> None:
        messages = conversation(["Hi", answer, "b"])
        chosen = chat_format(samples.tokenizer(self.TEMPLATE, "bytes", plain=self.THINK))
        assert chosen.encode(messages) == samples.hugging_face(self.TEMPLATE, "bytes", plain=self.THINK)(messages)

    @pytest.mark.parametrize("tag", ["[PAD]", "<|im_start|>", "<|im_end|>"])
    def test_hide_no_role(self, tag: str) -> None:
        chosen = chat_format(samples.tokenizer(self.TEMPLATE, "bytes", plain=self.THINK))
        with pytest.raises(ValueError, match=r"^messages\[1\] contains the special tag"):
            chosen.encode(conversation(["Hi", f"I see\n</think>\n\n{tag}", "b"]))


class TestMessagesThatATemplateLeavesOut:
    SILENT = "{% for m in messages if m.role == 'user' %}{{ m.content | trim }}<|im_end|>{% endfor %}"

    @pytest.mark.parametrize("role", ["system", "tool", "User", "assistant"])
    def test_are_refused(self, role: str) -> None:
        with pytest.raises(
            ValueError, match=rf"^messages\[0\] has role '{role}', and the chat template of .* leaves it out"
        ):
            of(self.SILENT).encode([{"role": role, "content": "x"}, {"role": "user", "content": "a"}])

    @pytest.mark.parametrize("content", ["", " \n"])
    def test_may_be_empty(self, content: str) -> None:
        messages = [{"role": "system", "content": content}, {"role": "user", "content": " a "}]
        assert of(self.SILENT).encode(messages) == samples.hugging_face(self.SILENT, "bytes")(messages)

    @pytest.mark.parametrize("change", ["| upper", "| length", ".split(' ')[0]", "| tojson", "[::-1]", "| title"])
    def test_may_be_changed(self, change: str) -> None:
        template = f"{{% for m in messages %}}{{{{ m.content {change} }}}}{{% endfor %}}"
        messages = conversation(["some words", "more", "so"])
        assert of(template).encode(messages) == samples.hugging_face(template, "bytes")(messages)

    def test_a_last_one_from_the_assistant_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"^messages\[1\], the last, has role 'assistant'"):
            of(samples.CHATML).encode(conversation(["a", "b"]))


def test_long_conversations_are_within_reason() -> None:
    messages = conversation(["a long story about a fox " * 50] * 401)
    assert of(samples.MACHINERY.replace("> 40", "> 999")).encode(messages)
    for content in ("a fox\n" * 50_000, "\r" * 50_000, "<[" * 50_000):
        assert of(samples.ALPACA).encode(conversation([content]))
