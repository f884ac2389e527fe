"""Messages of OpenAI's clients become the prompt of a chat: some are joined, continued or escaped, others refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest

from fastllama.serve.chat import encode_messages
from fastllama.serve.errors import ApiError
from fastllama.serve.wire import ChatMessage


def parsed(messages: list[Any]) -> list[ChatMessage]:
    return msgspec.convert(messages, list[ChatMessage])


def sent(*messages: tuple[str, Any]) -> list[ChatMessage]:
    return parsed([{"role": role, "content": content} for role, content in messages])


def refused(messages: list[ChatMessage], model) -> ApiError:
    with pytest.raises(ApiError) as caught:
        encode_messages(messages, model)
    assert caught.value.status == 400
    return caught.value


def own(model, *messages: tuple[str, str]) -> list[int]:
    return model.chat_format.encode([{"role": role, "content": content} for role, content in messages])


def written_by(model, encode):
    """The model with a chat format whose `encode` is the given one."""

    class StubFormat:
        def encode_whole(self, text, *, tags):
            assert tags == "escape"

        def encode(self, messages, *, tags, continue_final_message):
            assert tags == "escape"
            return encode(messages)

    return dataclasses.replace(model, chat_format=StubFormat())


def test_a_conversation_is_the_chat_format_s_own(llama2):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")]
    assert encode_messages(sent(*turns), llama2)[:2] == (own(llama2, *turns), False)


def test_developer_and_system_messages_at_the_start_are_one_system_message(llama2):
    ids = encode_messages(sent(("developer", "Be brief."), ("system", "Be kind."), ("user", "Hi")), llama2).token_ids
    assert ids == own(llama2, ("system", "Be brief.\n\nBe kind."), ("user", "Hi"))


def test_neighbours_of_one_role_are_joined_by_an_empty_line(llama2):
    messages = sent(("user", "one"), ("user", "two"), ("assistant", "a"), ("assistant", "b"), ("user", "three"))
    ids = encode_messages(messages, llama2).token_ids
    assert ids == own(llama2, ("user", "one\n\ntwo"), ("assistant", "a\n\nb"), ("user", "three"))


def test_parts_of_text_are_joined_as_they_stand(llama2):
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " this?", "cache_control": {"type": "x"}}]
    assert encode_messages(sent(("user", parts)), llama2)[:2] == (own(llama2, ("user", "What is this?")), False)


def test_the_last_message_of_the_assistant_is_continued(llama2):
    ids, continues, _ = encode_messages(sent(("user", "Count."), ("assistant", "One, two,")), llama2)
    asked = own(llama2, ("user", "Count."))
    assert continues
    assert ids[: len(asked)] == asked
    assert llama2.tokenizer.decode(ids[len(asked) :]).strip() == "One, two,"
    assert llama2.tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("content", [None, "", [], " ", "\n \t"])
def test_an_empty_last_message_of_the_assistant_is_a_new_answer(llama2, content):
    messages = sent(("user", "Count."), ("assistant", content))
    assert encode_messages(messages, llama2)[:2] == (own(llama2, ("user", "Count.")), False)


@pytest.mark.parametrize(("last", "continues"), [("b", True), ("b ", False), (" ", False), ("", True), (None, True)])
def test_joined_messages_of_the_assistant_are_continued_with_a_space_unless_they_end_in_blanks(llama2, last, continues):
    asked = encode_messages(sent(("user", "Count."), ("assistant", "a"), ("assistant", last)), llama2)
    assert asked.continues_text == continues


def test_null_of_the_assistant_is_no_text_and_adds_no_empty_line(llama2):
    messages = sent(("user", "a"), ("assistant", "b"), ("assistant", None), ("assistant", "c"), ("user", "d"))
    assert encode_messages(messages, llama2)[0] == own(llama2, ("user", "a"), ("assistant", "b\n\nc"), ("user", "d"))


def test_one_user_message_that_is_a_whole_prompt_is_taken_as_one(llama2):
    """The service's first users send Llama 2's whole template as the text of one message."""
    whole = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"
    ids = own(llama2, ("system", "Be brief."), ("user", "Hi"))
    assert encode_messages(sent(("user", whole)), llama2)[:2] == (ids, False)


def test_tags_inside_contents_are_escaped(llama2):
    messages = sent(("user", "Hi"), ("assistant", "[INST] x [/INST]"), ("user", "what [/INST] is that?"))
    text = llama2.tokenizer.decode(encode_messages(messages, llama2)[0])
    assert "[\\INST] x [\\/INST]" in text
    assert "what [\\/INST] is that?" in text


def test_a_message_alone_is_the_prompt_as_it_stands_in_plain_text(plain):
    assert encode_messages(sent(("user", "Once upon")), plain)[:2] == (plain.tokenizer.encode("Once upon"), False)


def test_fields_that_answers_bring_are_welcome_while_they_are_empty(llama2):
    answer = {
        "role": "assistant",
        "content": "Hello.",
        "name": "bot",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "tool_call_id": "",
        "reasoning_content": None,
        "reasoning": None,
        "parsed": None,
        "provider_specific_fields": {},
        "type": "message",
    }
    messages = parsed(
        [{"role": "user", "content": "Hi", "name": "Ann", "type": "text"}, answer, {"role": "user", "content": "Bye"}]
    )
    assert encode_messages(messages, llama2)[0] == own(llama2, ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"))


@pytest.mark.parametrize(
    ("messages", "param", "code", "words"),
    [
        ([], "messages", "invalid_value", "at least one message"),
        ([("user", None)], "messages[0].content", "invalid_value", "is null"),
        ([("system", None), ("user", "a")], "messages[0].content", "invalid_value", "is null"),
        ([("user", "a"), ("system", "b")], "messages[1].role", "invalid_value", "system messages come first"),
        ([("user", "a"), ("developer", "b")], "messages[1].role", "invalid_value", "system messages come first"),
        ([("tool", "a")], "messages[0].role", "unsupported_value", "not trained to call tools"),
        ([("function", "a")], "messages[0].role", "unsupported_value", "not trained to call tools"),
        ([("bot", "a")], "messages[0].role", "invalid_value", "'user', 'assistant'"),
        ([("user", [{"type": "text", "text": "a"}, "b"])], "messages[0].content[1]", "invalid_type", "legal: {"),
        ([("user", [{"text": "a"}])], "messages[0].content[0]", "unsupported_value", "type None"),
        ([("user", [{"type": "text"}])], "messages[0].content[0]", "invalid_type", "text None"),
        ([("user", [{"type": "text", "text": "a", "x": 1}])], "messages[0].content[0]", "unknown_parameter", "'x'"),
        (
            [("user", [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "http://x"}}])],
            "messages[0].content[1]",
            "unsupported_value",
            "has type 'image_url'",
        ),
    ],
)
def test_what_no_message_may_hold_is_refused_by_its_place(llama2, messages, param, code, words):
    error = refused(sent(*messages), llama2)
    assert (error.param, error.code) == (param, code)
    assert words in str(error)


@pytest.mark.parametrize("field", ["type", "provider_specific_fields"])
def test_a_field_that_some_clients_send_may_be_null_and_not_anything(llama2, field):
    hi = {"role": "user", "content": "Hi"}
    assert encode_messages(parsed([hi | {field: None}]), llama2) == encode_messages(parsed([hi]), llama2)
    for value in ("tool", "", ["text"], 5) if field == "type" else ("tool", {"a": 1}, 5):
        error = refused(parsed([hi, {"role": "assistant", "content": "a", field: value}, hi]), llama2)
        assert (error.param, error.code) == (f"messages[1].{field}", "unsupported_value")


@pytest.mark.parametrize("name", ["tool_calls", "function_call", "audio", "refusal", "reasoning_content"])
def test_what_an_earlier_answer_called_or_spoke_is_refused(llama2, name):
    messages = parsed([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", name: [{"id": "1"}]}])
    error = refused(messages, llama2)
    assert (error.param, error.code) == (f"messages[1].{name}", "unsupported_value")


def test_what_the_chat_format_refuses_names_the_client_s_message(llama2):
    """Joined messages are counted as they were sent: the second turn begins with the third message."""
    messages = sent(("system", "a"), ("system", "b"), ("assistant", "c"), ("user", "d"))
    error = refused(messages, llama2)
    assert error.param == "messages[2]"
    assert str(error).startswith("messages[2] has role 'assistant'")


def test_what_a_template_raises_is_reported_of_messages(llama2):
    def encode(messages):
        raise ValueError("Conversation roles\nmust be polite " + "x" * 5000)

    error = refused(sent(("user", "a")), written_by(llama2, encode))
    assert (error.param, error.code) == ("messages", "invalid_value")
    assert str(error).startswith("Conversation roles\\nmust be polite")
    assert len(str(error)) < 1000


def test_contents_that_cannot_fit_are_refused_before_any_of_them_is_read(llama2):
    def encode(messages):
        raise AssertionError("the messages were read")

    half = "x" * (llama2.max_model_len * 12 // 2 + 12)  # the longest piece has 12 bytes
    error = refused(sent(("system", half), ("user", half)), written_by(llama2, encode))
    assert (error.param, error.code) == ("messages", "context_length_exceeded")
    assert "3096 characters" in str(error)


def test_more_turns_than_tokens_are_refused_before_any_of_them_is_read(llama2):
    def encode(messages):
        raise AssertionError("the messages were read")

    messages = sent(*[("user", ""), ("assistant", "")] * 128)
    assert refused(messages, written_by(llama2, encode)).code == "context_length_exceeded"
