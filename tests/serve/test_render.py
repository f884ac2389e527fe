"""Deltas become the chunks and bodies that OpenAI's clients read, parsed by the types of its own SDK."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fastllama.io.detokenizer import IncrementalDetokenizer
from fastllama.io.tokenizer import Tokenizer, load_tokenizer
from fastllama.runtime.outputs import CompletionOutput, RequestDelta, RequestMetrics, TokenLogprob
from fastllama.runtime.params import SamplingParams
from fastllama.serve.errors import ApiError
from fastllama.serve.jobs import Job, PromptIds
from fastllama.serve.model import ServedModel
from fastllama.serve.render import Answer, answer_of, error_event

TOKENIZER = load_tokenizer(Path("fastllama/assets/tiny"))
ONCE = PromptIds(tuple(TOKENIZER.encode("Once upon")), "Once upon")
A_CAFE = TOKENIZER.encode(" a café", bos=False)[1:]  # the first is the space that encoding adds


def answer(job: Job, tokenizer: Tokenizer = TOKENIZER) -> Answer:
    """The empty answer of a request "1f"."""
    model = ServedModel(
        names=("tiny",),
        any_name=True,
        tokenizer=tokenizer,
        chat_format=cast(Any, None),
        eos_token_ids=(2,),
        vocab_size=tokenizer.vocab_size,
        max_model_len=512,
        max_n=16,
        created=1,
        fingerprint="fp_1",
        notice="",
    )
    return answer_of(job, model, "1f")


def chat(n: int = 1, **fields: Any) -> Job:
    """A job of the chat endpoint, whose answer is a text of its own."""
    return Job("chat", "tiny", (ONCE,), SamplingParams(n=n), **{"continues_text": False, **fields})


def completion(*prompts: PromptIds, n: int = 1, **fields: Any) -> Job:
    """A job of the completions endpoint."""
    return Job("completion", "tiny", prompts or (ONCE,), SamplingParams(n=n), **fields)


def report(token_id: int) -> TokenLogprob:
    """Log-probabilities of a token that was the likeliest but one."""
    return TokenLogprob(token_id, -1.5, ((5, -0.5), (token_id, -1.5)), 2)


def deltas(
    token_ids: Sequence[int],
    *,
    index: int = 0,
    prompt: PromptIds = ONCE,
    ends: Any = "stop",
    logprobs: bool = False,
    prompt_logprobs: bool = False,
    continues_text: bool = True,
) -> Iterator[RequestDelta]:
    """The deltas of an engine for a sample of these tokens, one by one."""
    detokenizer = IncrementalDetokenizer(TOKENIZER, prompt.token_ids if continues_text else ())
    for position, token_id in enumerate(token_ids):
        is_last = position == len(token_ids) - 1
        gained = CompletionOutput(
            index,
            detokenizer.push(token_id) + (detokenizer.flush() if is_last else ""),
            (token_id,),
            finish_reason=ends if is_last else None,
            logprobs=(report(token_id),) if logprobs else None,
        )
        first = (None, *map(report, prompt.token_ids[1:])) if prompt_logprobs and position == 0 else None
        metrics = RequestMetrics(0.0, num_cached_tokens=2) if is_last else None
        yield RequestDelta((gained,), first, metrics)


def events(data: bytes) -> list[Any]:
    """The JSON of server-sent events; "[DONE]" as it stands."""
    *found, rest = data.split(b"\n\n")
    assert rest == b""
    assert all(each.startswith(b"data: ") and b"\n" not in each for each in found)
    return [each[6:].decode() if each == b"data: [DONE]" else json.loads(each[6:]) for each in found]


def streamed(job: Job, *samples: Iterator[RequestDelta]) -> list[Any]:
    """All events of an answer."""
    made = answer(job)
    data = made.opening() + b"".join(made.take(0, delta) for sample in samples for delta in sample)
    return events(data + made.closing())


def body(job: Job, *samples: Iterator[RequestDelta]) -> Any:
    """The JSON of an answer that is not streamed."""
    made = answer(job)
    assert b"".join(made.take(0, delta) for sample in samples for delta in sample) == b""
    return json.loads(made.body())


def test_a_chat_is_the_body_that_the_sdk_reads() -> None:
    own: dict[str, Any] = {"continues_text": False, "logprobs": True}
    got = body(chat(n=2, logprobs=1), deltas(A_CAFE, **own), deltas([*A_CAFE, 2], index=1, ends="length", **own))
    read = ChatCompletion.model_validate(got, strict=True)
    assert (read.id, read.object, read.model, read.system_fingerprint) == (
        "chatcmpl-1f",
        "chat.completion",
        "tiny",
        "fp_1",
    )
    assert [(choice.index, choice.message.content, choice.finish_reason) for choice in read.choices] == [
        (0, "a café", "stop"),
        (1, "a café", "length"),
    ]
    assert got["choices"][0]["message"] == {"role": "assistant", "content": "a café", "refusal": None}
    for choice in read.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert b"".join(bytes(each.bytes or ()) for each in choice.logprobs.content).decode() == "a café"
    usage = read.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ONCE.token_ids), 2 * len(A_CAFE) + 1)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 4  # two of each request's delta that ends it


def test_a_streamed_chat_is_roles_then_content_then_reasons_then_usage() -> None:
    samples = (deltas([*A_CAFE, 2], continues_text=False), deltas(A_CAFE, index=1, continues_text=False))
    got = streamed(chat(n=2, stream=True, include_usage=True), *samples)
    *chunks, done = got
    assert done == "[DONE]"
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert [(chunk["choices"][0]["index"], chunk["choices"][0]["delta"]) for chunk in chunks[:2]] == [
        (0, {"role": "assistant", "content": ""}),
        (1, {"role": "assistant", "content": ""}),
    ]
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks[2:-1] if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "a café"
        assert (own[-1]["delta"], own[-1]["finish_reason"]) == ({}, "stop")
        assert {choice["finish_reason"] for choice in own[:-1]} == {None}
    assert {json.dumps(chunk["usage"]) for chunk in chunks[:-1]} == {"null"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2 * len(A_CAFE) + 1
    assert {(chunk["id"], chunk["created"]) for chunk in chunks} == {("chatcmpl-1f", chunks[0]["created"])}


def test_without_include_usage_no_chunk_speaks_of_it() -> None:
    for job in (chat(stream=True), completion(stream=True)):
        *chunks, _ = streamed(job, deltas(A_CAFE))
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


@pytest.mark.parametrize("texts", [(" ", " I"), ("", " I", " am ")])
def test_the_text_of_an_answer_is_shown_as_the_engine_gives_it(texts: Sequence[str]) -> None:
    gains = [RequestDelta((CompletionOutput(0, text, (5,)),)) for text in texts]
    gains.append(RequestDelta((CompletionOutput(0, "", (2,), "stop"),), metrics=RequestMetrics(0.0)))
    text = "".join(texts)
    assert body(chat(), iter(gains))["choices"][0]["message"]["content"] == text
    assert body(completion(), iter(gains))["choices"][0]["text"] == text
    chunks = [chunk["choices"][0] for chunk in streamed(chat(stream=True), iter(gains))[1:-1]]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == text
    assert all(chunk["delta"] != {"content": ""} for chunk in chunks)
    assert "".join(each["choices"][0]["text"] for each in streamed(completion(stream=True), iter(gains))[:-1]) == text


BROKEN, LETTER, STOP = TOKENIZER.encode("\U0001f600", bos=False)[1], *A_CAFE[:2]


@pytest.mark.parametrize(
    ("token_ids", "ends", "is_hidden"),
    [
        ([LETTER, STOP, BROKEN, STOP], "stop", True),  # the first within min_tokens, and so shown
        ([LETTER, STOP, BROKEN, 2], "stop", True),
        ([LETTER, STOP, BROKEN], "length", False),
        ([LETTER, STOP], "length", False),  # of the context
        ([LETTER, BROKEN, LETTER, LETTER], "stop", False),  # by a stop string
    ],
)
def test_the_token_that_ends_a_text_shows_none(token_ids: list[int], ends: Any, *, is_hidden: bool) -> None:
    data = [TOKENIZER.token_bytes(token_id) for token_id in token_ids]
    if is_hidden:
        data[-1] = b""
    params = SamplingParams(stop_token_ids=[STOP], min_tokens=3)
    text = b"".join(data).decode("utf-8", "replace")
    gained = CompletionOutput(0, text, tuple(token_ids), ends, logprobs=tuple(map(report, token_ids)))
    delta = RequestDelta((gained,), metrics=RequestMetrics(0.0))
    entries = body(Job("chat", "tiny", (ONCE,), params, logprobs=0), iter([delta]))["choices"][0]["logprobs"]["content"]
    assert [bytes(each["bytes"]) for each in entries] == data
    assert [each["token"] for each in entries][-1] == _spelled(token_ids[-1])
    columns = body(Job("completion", "tiny", (ONCE,), params, logprobs=0), iter([delta]))["choices"][0]["logprobs"]
    assert columns["tokens"] == list(map(_spelled, token_ids))
    ahead = [b"".join(data[:place]).decode("utf-8", "replace") for place in range(len(data))]
    assert columns["text_offset"] == list(map(len, ahead))


def _spelled(token_id: int) -> str:
    return TOKENIZER.token_bytes(token_id, skip_special_tokens=False).decode("utf-8", "replace")


def test_choices_that_gain_in_one_delta_are_events_in_one_piece() -> None:
    made = answer(completion(ONCE, ONCE, n=2, stream=True))
    both = RequestDelta((CompletionOutput(0, " a", (5,)), CompletionOutput(1, " b", (6,))))
    assert [[choice["index"] for choice in each["choices"]] for each in events(made.take(1, both))] == [[2], [3]]
    assert made.num_generated_tokens == 2


def test_tokens_without_certain_text_are_no_event_but_are_counted() -> None:
    for job in (chat(stream=True), completion(stream=True)):
        made = answer(job)
        assert made.take(0, RequestDelta((CompletionOutput(0, "", (198,)),))) == b""
        assert made.num_generated_tokens == 1


def test_a_completion_is_the_body_that_the_sdk_reads() -> None:
    made = answer(completion(ONCE, PromptIds((1,)), n=2, logprobs=1))
    for prompt_index in (1, 0):
        for index in (0, 1):
            for delta in deltas(A_CAFE, index=index, ends="length", logprobs=True):
                made.take(prompt_index, delta)
    read = Completion.model_validate(json.loads(made.body()), strict=True)
    assert (read.id, read.object, read.system_fingerprint) == ("cmpl-1f", "text_completion", "fp_1")
    assert [(choice.index, choice.text, choice.finish_reason) for choice in read.choices] == [
        (index, " a café", "length") for index in range(4)
    ]
    assert read.usage is not None
    assert read.usage.prompt_tokens == len(ONCE.token_ids) + 1
    assert made.num_prompt_tokens == len(ONCE.token_ids) + 1


def test_echo_shows_the_prompt_once_for_each_choice_streaming_or_not() -> None:
    samples = [list(deltas(A_CAFE, index=index)) for index in (0, 1)]
    whole = body(completion(n=2, echo=True), *map(iter, samples))
    assert [choice["text"] for choice in whole["choices"]] == ["Once upon a café"] * 2
    *chunks, _ = streamed(completion(n=2, echo=True, stream=True), *map(iter, samples))
    for index in (0, 1):
        texts = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(texts) == "Once upon a café"
    for chunk in chunks:
        Completion.model_validate({**chunk, "choices": []}, strict=True)  # the SDK's choice wants a reason in each


def test_echo_with_logprobs_reports_the_prompt_first_streaming_or_not() -> None:
    gains = list(deltas(A_CAFE, logprobs=True, prompt_logprobs=True))
    whole = body(completion(echo=True, logprobs=2), iter(gains))["choices"][0]["logprobs"]
    assert whole["tokens"][:3] == ["<s>", " Once", " upon"]
    assert whole["token_logprobs"] == [None] + [-1.5] * (len(whole["tokens"]) - 1)
    assert whole["top_logprobs"][0] is None
    assert whole["top_logprobs"][1] == {TOKENIZER.token_bytes(5).decode("utf-8", "replace"): -0.5, " Once": -1.5}
    text = "Once upon a café"
    assert [text[offset:][:1] for offset in whole["text_offset"][:4]] == ["O", "O", " ", " "]
    assert whole["text_offset"][3] == len("Once upon")
    *chunks, _ = streamed(completion(echo=True, logprobs=2, stream=True), iter(gains))
    assert len(chunks) == len(A_CAFE)
    for name, column in whole.items():
        assert [each for chunk in chunks for each in chunk["choices"][0]["logprobs"][name]] == column


def test_a_completion_with_logprobs_0_lists_no_likeliest_tokens() -> None:
    got = body(completion(logprobs=0), deltas(A_CAFE, logprobs=True))["choices"][0]["logprobs"]
    assert got["top_logprobs"] is None
    assert got["token_logprobs"] == [-1.5] * len(A_CAFE)


def test_offsets_count_special_tokens_where_they_are_shown() -> None:
    params = SamplingParams(skip_special_tokens=False)
    gains = deltas([2, *A_CAFE], logprobs=True)
    got = body(Job("completion", "tiny", (ONCE,), params, logprobs=1), gains)["choices"][0]["logprobs"]
    assert got["text_offset"][:2] == [0, len("</s>")]


def test_max_tokens_0_with_echo_is_the_prompt_alone_although_a_token_was_sampled() -> None:
    for ends in ("stop", "length"):
        made = answer(completion(echo=True, show_tokens=False, logprobs=0))
        for delta in deltas(A_CAFE[:1], ends=ends, logprobs=True, prompt_logprobs=True):
            made.take(0, delta)
        got = json.loads(made.body())
        assert (got["choices"][0]["text"], got["choices"][0]["finish_reason"]) == ("Once upon", "length")
        assert got["choices"][0]["logprobs"]["tokens"] == ["<s>", " Once", " upon"]
        assert got["choices"][0]["logprobs"]["top_logprobs"] is None
        assert got["usage"]["completion_tokens"] == 0
        assert got["usage"]["total_tokens"] == len(ONCE.token_ids)
        assert made.num_generated_tokens == 1
    event, _ = streamed(completion(echo=True, show_tokens=False, stream=True), deltas(A_CAFE[:1]))
    assert event["choices"] == [{"index": 0, "text": "Once upon", "logprobs": None, "finish_reason": "length"}]


@pytest.mark.parametrize("job", [chat(), chat(stream=True), completion(), completion(stream=True)])
def test_a_deadline_is_the_error_504_and_its_tokens_are_counted(job: Job) -> None:
    made = answer(job)
    with pytest.raises(ApiError) as caught:
        made.take(0, RequestDelta((CompletionOutput(0, " a", (5,), "deadline"),), metrics=RequestMetrics(0.0)))
    assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")
    assert made.num_generated_tokens == 1


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_what_was_aborted_is_shown_unfinished(reason: Any) -> None:
    for job in (chat(stream=True), completion(stream=True)):
        data = answer(job).take(0, RequestDelta((CompletionOutput(0, " a", (5,), reason),)))
        assert [each["choices"][0]["finish_reason"] for each in events(data)] == [None]


def test_an_error_is_one_event_of_one_line() -> None:
    (event,) = events(error_event(ApiError(500, "engine_error", "two\nlines")))
    assert event["error"]["code"] == "engine_error"


def test_text_of_any_kind_comes_back_as_it_was() -> None:
    text = 'a "quote", a \\, a \n, a \u2028, a \x00, \U0001f600 and </script>'
    gained = RequestDelta((CompletionOutput(0, text, (5,)),))
    (event,) = events(answer(chat(stream=True)).take(0, gained))
    assert event["choices"][0]["delta"] == {"content": text}
    (event,) = events(answer(completion(stream=True)).take(0, gained))
    assert event["choices"][0]["text"] == text


@given(
    kind=st.sampled_from(["chat", "completion"]),
    text=st.text(max_size=20),
    sizes=st.lists(st.integers(1, 4), max_size=8),
    logprobs=st.sampled_from([None, 0, 2]),
    echo=st.booleans(),
    continues_text=st.booleans(),
)
def test_however_tokens_come_in_deltas_the_stream_joins_to_the_body(
    kind: Any, text: str, sizes: list[int], logprobs: int | None, *, echo: bool, continues_text: bool
) -> None:
    shape: dict[str, Any] = {"echo": True} if echo and kind == "completion" else {"continues_text": continues_text}
    report_all = logprobs is not None
    how: dict[str, Any] = {"logprobs": report_all, "prompt_logprobs": report_all} | shape
    how.pop("echo", None)
    one_by_one = list(deltas([*TOKENIZER.encode(text, bos=False), 2], **how))
    merged = []
    while one_by_one:
        size = sizes.pop() if sizes else len(one_by_one)
        part, one_by_one = one_by_one[:size], one_by_one[size:]
        outputs = [delta.outputs[0] for delta in part]
        whole = replace(
            outputs[-1],
            text="".join(output.text for output in outputs),
            token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
            logprobs=tuple(report for output in outputs for report in output.logprobs or ()) if report_all else None,
        )
        merged.append(RequestDelta((whole,), part[0].prompt_logprobs, part[-1].metrics))
    job = Job(kind, "tiny", (ONCE,), SamplingParams(), logprobs=logprobs, **shape)
    choice = body(job, iter(merged))["choices"][0]
    chunks = [each["choices"][0] for each in streamed(replace(job, stream=True), iter(merged))[:-1]]
    assert chunks[-1]["finish_reason"] == choice["finish_reason"] == "stop"
    if kind == "chat":
        assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == choice["message"]["content"]
    else:
        assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    if kind == "chat" and report_all:
        spelled = b"".join(bytes(each["bytes"]) for each in choice["logprobs"]["content"])
        assert spelled.decode("utf-8", "replace") == choice["message"]["content"]
    columns = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
    for name, column in (choice["logprobs"] or {}).items():
        if column is not None:
            assert [each for columns_of_chunk in columns for each in columns_of_chunk[name]] == column


def test_rendering_loads_no_torch() -> None:
    code = "import sys, fastllama.serve.render; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
