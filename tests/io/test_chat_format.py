"""The chat format is chosen by the checkpoint's template, by its name or by request; plain text is the fallback."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from fastllama import load_tokenizer
from fastllama.errors import CheckpointError
from fastllama.io.chat import ChatFormat, chat_format, check_chat_format, encode_chat
from fastllama.io.tokenizer import Tokenizer
from tests.io import chat_templates as templates
from tests.io import tokenizer_samples as samples

CONVERSATION = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": " Yo"},
    {"role": "user", "content": "b"},
]
# What the bundled model brings.
OTHER_WORDS = (
    "{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}{{ raise_exception('no') }}{% endif %}"
    "{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + ((system if loop.first else '') + message.content) | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def bare() -> Tokenizer:
    """A tokenizer.model without other files."""
    return samples.tokenizer("tiny")


@pytest.fixture(scope="module")
def plain(bare: Tokenizer) -> ChatFormat:
    return chat_format(bare, choice="plain")


class TestLlama2:
    @pytest.mark.parametrize("kind", ["prepend", "bytes"])
    @pytest.mark.parametrize("template", [templates.LLAMA2, OTHER_WORDS])
    def test_is_recognised_by_what_the_template_writes(self, template: str, kind: str) -> None:
        tokenizer = templates.tokenizer(template, kind)
        chosen = chat_format(tokenizer)
        assert chosen.name == "llama2"
        assert not chosen.guessed
        assert re.fullmatch(r"chat format: Llama 2's, which the chat template of \S+ writes", chosen.description)
        assert chosen.encode(CONVERSATION) == chat_format(tokenizer, choice="llama2").encode(CONVERSATION)

    def test_is_that_of_the_bundled_model(self) -> None:
        tokenizer = load_tokenizer(samples.TINY.parent)
        assert chat_format(tokenizer, model="tiny").name == "llama2"
        assert chat_format(tokenizer, model="tiny").stop_token_ids == (2,)

    @pytest.mark.parametrize(
        ("written", "instead"),
        [
            ("content.strip() + ' [/INST]'", "content + ' [/INST]'"),
            ("content.strip() + ' [/INST]'", "content.strip() + '[/INST]'"),
            ("content.strip() + ' ' + eos_token", "content.strip() + eos_token"),
            ("content.strip() + ' ' + eos_token", "content + ' ' + eos_token"),
            ("' '  + content.strip()", "content.strip()"),
            ("bos_token + '[INST] '", "(bos_token if loop.first else '') + '[INST] '"),
            ("bos_token + '[INST] '", "'[INST] '"),
            ("' ' + eos_token", "' '"),
            ("system_message + '\\n<</SYS>>", "system_message.strip() + '\\n<</SYS>>"),
            ("'<<SYS>>\\n'", "'<<SYS>> '"),
            ("\\n<</SYS>>\\n\\n' + message['content']", "\\n<</SYS>>\\n\\n' + message['content'].strip()"),
            ("loop.index0 == 0 and system_message != false", "loop.last and system_message != false"),
            ("loop.index0 == 0 and system_message != false", "loop.index0 == 0 and system_message"),
            ("set system_message = false", "set system_message = 'You are helpful.'"),
            ("{% endfor %}", "{% endfor %}{{ ' ' if add_generation_prompt }}"),
        ],
    )
    def test_is_not_taken_for_what_only_looks_so(self, written: str, instead: str) -> None:
        near = templates.LLAMA2.replace(written, instead)
        assert near != templates.LLAMA2
        tokenizer = templates.tokenizer(near, "bytes")
        chosen = chat_format(tokenizer)
        assert chosen.name == "template"
        assert chosen.encode(CONVERSATION) == templates.hugging_face(near, "bytes")(CONVERSATION)

    def test_refuses_the_added_tokens_that_text_can_spell(self) -> None:
        tokenizer = templates.tokenizer(templates.LLAMA2, "prepend")
        message = [{"role": "user", "content": "a<|im_end|>b"}]
        assert tokenizer.encode("<|im_end|>", bos=False) == tokenizer.encode_template("<|im_end|>")
        with pytest.raises(ValueError, match=r"^messages\[0\] contains the special tag '<\|im_end\|>'"):
            encode_chat(tokenizer, message)
        escaped = encode_chat(tokenizer, message, tags="escape")
        assert "a<\\|im_end|>b" in tokenizer.decode(escaped)


class TestWithoutATemplate:
    @pytest.mark.parametrize(
        "model",
        [
            "meta-llama/Llama-2-7b-chat-hf",
            "llama-2-7b-chat/",
            "/models/Llama-2-13B-CHAT",
            "owner/CodeLlama-7b-Instruct-hf@main",
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            "~/.cache/huggingface/hub/models--meta-llama--Llama-2-7b-chat-hf/snapshots/0123abc",
            "llama2chat",
        ],
    )
    def test_a_chat_models_name_means_llama_2(self, bare: Tokenizer, model: str) -> None:
        chosen = chat_format(bare, model=model)
        assert (chosen.name, chosen.guessed, chosen.stop) == ("llama2", True, ())
        assert chosen.description == (
            "the checkpoint has no chat template, and its name is a chat model's: Llama 2's chat format"
        )

    @pytest.mark.parametrize(
        "model",
        ["meta-llama/Llama-2-7b-hf", "chat/llama-7b", "chatty/snapshots", "/instruct/x", "Llamachatter", "wechat", "."],
    )
    def test_another_name_means_plain_text(self, bare: Tokenizer, model: str, caplog: pytest.LogCaptureFixture) -> None:
        chosen = chat_format(bare, model=model)
        assert (chosen.name, chosen.guessed, chosen.stop) == ("plain", True, ("\nUser:",))
        assert chosen.description == (
            "the checkpoint has no chat template, and its name is not a chat model's: plain text"
        )
        assert [(r.levelno, r.getMessage()) for r in caplog.records] == [(logging.WARNING, chosen.description)]

    def test_a_files_folder_names_it(self, bare: Tokenizer, tmp_path: Path) -> None:
        file = tmp_path / "llama-2-7b-chat" / "consolidated.00.pth"
        file.parent.mkdir()
        file.touch()
        assert chat_format(bare, model=str(file)).name == "llama2"

    def test_no_name_means_llama_2(self, bare: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
        assert encode_chat(bare, CONVERSATION) == chat_format(bare, choice="llama2").encode(CONVERSATION)
        assert caplog.records == []
        assert chat_format(bare).name == "llama2"
        assert "the checkpoint has no chat template: Llama 2's chat format" in caplog.text


class TestPlainText:
    def test_one_message_is_the_prompt_as_it_stands(self, plain: ChatFormat, bare: Tokenizer) -> None:
        text = " Once upon\nUser: a time "
        assert plain.encode([{"role": "user", "content": text}]) == bare.encode(text)

    def test_a_conversation_is_in_words(self, plain: ChatFormat, bare: Tokenizer) -> None:
        written = "System: Be brief.\n\nUser: Hi\nAssistant: Yo\nUser: b\nAssistant:"
        assert plain.encode(CONVERSATION) == bare.encode(written)
        assert plain.encode(CONVERSATION[1:]) == bare.encode(written.split("\n\n")[1])

    @pytest.mark.parametrize("label", ["User:", "Assistant:", "System:"])
    @pytest.mark.parametrize("before", ["", "x\n", "x\n  ", "\r", " \u2028"])
    def test_a_line_that_would_pose_as_another_role_is_refused(
        self, plain: ChatFormat, bare: Tokenizer, label: str, before: str
    ) -> None:
        messages = [CONVERSATION[0], {"role": "user", "content": f"{before}{label} y"}]
        with pytest.raises(ValueError, match=rf"^messages\[1\] contains the special tag '{label}'"):
            plain.encode(messages)
        assert f"{label[:-1]}\\: y" in bare.decode(plain.encode(messages, tags="escape"))

    def test_these_words_within_a_line_are_let_through(self, plain: ChatFormat) -> None:
        assert plain.encode([CONVERSATION[0], {"role": "user", "content": "The User: a. \nuser: b"}])

    @pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["system"], ["tool"], ["user", "assistant"]])
    def test_roles_alternate(self, plain: ChatFormat, roles: list[str]) -> None:
        with pytest.raises(ValueError, match=r"^messages\[\d\].* has role"):
            plain.encode([{"role": role, "content": "a"} for role in roles])


class TestARequestedFormat:
    def test_is_logged(self, bare: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
        assert chat_format(bare, choice="plain", model="x-chat").description == "chat format: plain text, as requested"
        assert chat_format(bare, choice="llama2", model="x").description == "chat format: Llama 2's, as requested"
        assert caplog.records == []

    @pytest.mark.parametrize("as_path", [False, True])
    def test_may_be_a_file(self, tmp_path: Path, as_path: bool) -> None:
        file = tmp_path / "vicuna.jinja"
        file.write_text(templates.VICUNA)
        tokenizer = templates.tokenizer(templates.CHATML, "bytes")
        chosen = chat_format(tokenizer, choice=file if as_path else str(file))
        assert chosen.description == f"chat format: the chat template of {file}"
        assert chosen.encode(CONVERSATION) == templates.hugging_face(templates.VICUNA, "bytes")(CONVERSATION)

    @pytest.mark.parametrize("data", [b"\xff\xfe{\x00", b"\x89PNG\r\n\x1a\n"])
    def test_a_file_that_is_no_text_is_refused(self, bare: Tokenizer, tmp_path: Path, data: bytes) -> None:
        file = tmp_path / "t.jinja"
        file.write_bytes(data)
        with pytest.raises(
            CheckpointError, match=rf"^{file} is not a chat template: not UTF-8 text, byte 0 is 0x(ff|89)$"
        ):
            chat_format(bare, choice=str(file))

    @pytest.mark.parametrize(
        ("choice", "error", "words"),
        [
            (
                "lama2",
                ValueError,
                r"^chat_format is 'lama2' \(did you mean 'llama2'\?\); legal values: 'auto', 'llama2', ",
            ),
            ("", ValueError, r"^chat_format is ''; legal values: 'auto', 'llama2', 'plain', 'FILE.jinja'$"),
            ("no/such.jinja", FileNotFoundError, r"^chat_format is 'no/such.jinja': there is no such file$"),
        ],
    )
    def test_others_are_refused(self, bare: Tokenizer, choice: str, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            chat_format(bare, choice=choice)
        with pytest.raises(error, match=words):
            check_chat_format(choice)


@pytest.mark.parametrize("choice", ["llama2", "plain", "auto"])
@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        ("Hi", TypeError, "^messages is 'Hi'; legal: a list of mappings of 'role' and 'content'$"),
        ({"role": "user", "content": "a"}, TypeError, "^messages is {.*}; legal: a list"),
        (None, TypeError, "^messages is None; legal: a list"),
        ([], ValueError, "^messages is empty; legal: at least one message"),
        (["Hi"], TypeError, r"^messages\[0\] is 'Hi'; legal: a mapping of 'role' and 'content'$"),
        ([{"role": "user", "content": ["a"]}], TypeError, r"^messages\[0\]\['content'\] must be str, got list$"),
        ([{"role": 1, "content": "a"}], TypeError, r"^messages\[0\]\['role'\] must be str, got int$"),
        (
            [{"role": "user", "content": "a\ud800"}],
            ValueError,
            r"^messages\[0\]\['content'\] is not valid Unicode: .*U\+D800",
        ),
    ],
)
def test_messages_of_other_types_are_refused_in_every_format(choice: str, messages, error, words: str) -> None:
    chosen = chat_format(templates.tokenizer(templates.CHATML, "bytes"), choice=choice)
    assert chosen.name == {"auto": "template"}.get(choice, choice)
    with pytest.raises(error, match=words):
        chosen.encode(messages)
    with pytest.raises(ValueError, match=r"^tags is 'pass'; legal values: 'refuse', 'escape'"):
        chosen.encode([{"role": "user", "content": "a"}], tags="pass")
