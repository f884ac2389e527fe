"""The text of a sample as it grows: stop strings across tokens, what is held back and released, the ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama import LLM, SamplingParams
from fastllama.errors import RequestError
from fastllama.io.tokenizer import Tokenizer, Vocabulary
from fastllama.runtime.generation import Completion, Generation, TextStream
from fastllama.runtime.outputs import TokenLogprob
from fastllama.runtime.planning.sequence import Request
from fastllama.runtime.planning.sequence import Sequence as TokenSequence
from tests.runtime.models import VOCAB, Scripted, ours, running

EOS, FILLER = 2, 3


class Pieces(Tokenizer):
    """A tokenizer whose ids from 4 on stand for the given bytes; 1 is BOS, 2 EOS, 3 a full stop."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        text = dict(enumerate([b"<unk>", b"<s>", b"</s>", b".", *pieces]))
        names = {i: str(piece) for i, piece in text.items()}
        super().__init__(Path("pieces"), Vocabulary(names, text, frozenset({0, 1, 2})), 1, EOS, None)

    def _encode_raw(self, text: str, *, template: bool = False) -> list[int]:
        return []


def stopped(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The text before the stop string that ends it: the first to be complete, the longest of those."""
    for end in range(len(text) + 1):
        reached = [stop for stop in stops if text[:end].endswith(stop)]
        if reached:
            stop = max(reached, key=len)
            return text[: end - len(stop)], stop
    return text, None


def certain(text: str, stops: Sequence[str]) -> str:
    """A text without the longest end that a stop string begins with."""
    ends = [n for n in range(1, len(text) + 1) for stop in stops if stop.startswith(text[-n:])]
    return text[: len(text) - max(ends, default=0)]


@given(
    text=st.text("abé☺", max_size=12),
    stops=st.lists(st.text("abé☺", min_size=1, max_size=4), max_size=3),
    cuts=st.sets(st.integers(0, 30)),
)
def test_stop_strings_do_not_depend_on_tokens(text: str, stops: list[str], cuts: set[int]) -> None:
    data = text.encode()
    bounds = sorted({0, len(data)} | {cut for cut in cuts if cut < len(data)})
    pieces = [data[start:end] for start, end in pairwise(bounds)]
    stream = TextStream(Pieces(pieces), (1,), SamplingParams(stop=stops))
    final, expected = stopped(text, stops)
    taken = ""
    for token, end in enumerate(bounds[1:], 4):
        reached = stream.push(token)
        taken += stream.take()
        assert stream.text == taken
        if reached is not None:
            break
        so_far = data[:end].decode("utf-8", "ignore")
        assert taken == certain(so_far, stops), "held back too long, or released too early"
    else:
        reached = stream.close()
        taken += stream.take()
    assert (stream.text, taken, reached) == (final, final, expected)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("pieces", "tokens", "stop", "text"),
    [
        ([b"ab"], [4, EOS], "</s>", "ab"),
        ([b"ab"], [4, EOS], "b</s>", "a"),
        ([b"ab", b"c"], [4, EOS, 5], "b</s>c", "a"),
        ([b"a</", b"s>"], [4, 5], "</s>", "a"),  # spelled by plain pieces
        ([b"a"], [4, EOS, EOS], "</s></s>", "a"),
    ],
)
def test_a_special_token_that_shows_no_text_ends_it_where_a_stop_string_spells_it(
    skip: bool, pieces: list[bytes], tokens: list[int], stop: str, text: str
) -> None:
    stream = TextStream(Pieces(pieces), (1,), SamplingParams(stop=["zz", stop], skip_special_tokens=skip))
    *before, last = [stream.push(token) for token in tokens]
    assert (before, last) == ([None] * len(before), stop)
    assert stream.text == text


def test_special_tokens_within_a_text_that_no_stop_string_ends_stay_hidden() -> None:
    stream = TextStream(Pieces([b"a", b"b"]), (1,), SamplingParams(stop="</s>!"))
    assert [stream.push(token) for token in (4, EOS, 5, EOS)] == [None] * 4
    assert (stream.close(), stream.text) == (None, "ab")
    other = TextStream(Pieces([b"a"]), (1,), SamplingParams(stop="</s>!"))
    other.push(EOS)
    forked = other.fork(SamplingParams(stop="x"))
    forked.push(4)
    assert (forked.close(), forked.text) == (None, "a")


def test_an_id_in_a_gap_of_the_tokenizers_ids_adds_no_text() -> None:
    tokenizer = Pieces([b"a", b"b"])
    tokenizer._vocabulary = tokenizer._vocabulary._replace(pieces={9: "c"}, text=tokenizer._vocabulary.text | {9: b"c"})
    tokenizer.vocab_size = 10
    stream = TextStream(tokenizer, (1, 7), SamplingParams(stop="bc"))
    assert [stream.push(token) for token in (4, 7, 8, 5, 6, 9)] == [None] * 5 + ["bc"]
    assert stream.text == "a"


def sample_of(params: SamplingParams, tokenizer: Tokenizer | None, prompt: tuple[int, ...] = (1,)) -> Completion:
    """A completion without an engine, whose sequence holds the prompt."""
    request = Request("0", prompt, params, arrival=0.0)
    return Completion(
        TokenSequence(0, request, index=0, token_ids=list(prompt), max_length=99, num_seats=1),
        TextStream(tokenizer, prompt, params) if tokenizer is not None else None,
    )


@pytest.mark.parametrize("tokenizer", [Pieces([b"a", b"b"]), None])
@pytest.mark.parametrize(
    ("options", "tokens", "reasons"),
    [
        ({"min_tokens": 2}, [EOS, EOS, EOS], [None, None, ("stop", None)]),
        ({"min_tokens": 1}, [4, EOS], [None, ("stop", None)]),
        ({"min_tokens": 2, "stop_token_ids": [4]}, [4, 4, 4], [None, None, ("stop", 4)]),
        ({"min_tokens": 2, "ignore_eos": True}, [EOS, EOS, EOS], [None, None, None]),
        ({}, [EOS], [("stop", None)]),
    ],
)
def test_the_first_min_tokens_end_nothing(
    tokenizer: Tokenizer | None, options: dict[str, Any], tokens: list[int], reasons: list[Any]
) -> None:
    sample = sample_of(SamplingParams(**options), tokenizer)
    for token, reason in zip(tokens, reasons, strict=True):
        sample.seq.token_ids.append(token)
        assert sample.push(token, (EOS,)) == reason


def test_an_abort_within_min_tokens_shows_all_its_text() -> None:
    sample = sample_of(SamplingParams(stop="\ufffd", min_tokens=3), Pieces([b"a\xe2"]))
    sample.seq.token_ids.append(4)
    assert sample.push(4, ()) is None
    generation = Generation(sample.seq.request, None, None, {0: sample})
    sample.seq.request.sequences.append(sample.seq)
    generation.abort()
    assert sample.output().text == "a\ufffd"


@pytest.mark.parametrize(
    ("tokenizer", "texts"), [(Pieces([b"a", b"\xe2\x98"]), ["a", "\ufffd", "</s>", ""]), (None, [None] * 4)]
)
def test_a_reported_token_comes_with_its_own_text(tokenizer: Tokenizer | None, texts: list[str | None]) -> None:
    sample = sample_of(SamplingParams(logprobs=0), tokenizer)
    generation = Generation(sample.seq.request, None, tokenizer, {0: sample})
    tokens = (4, 5, EOS, 50)
    given = [TokenLogprob(token, -0.5 * token, ((token, -1.0),), rank=token) for token in tokens]
    for report in given:
        sample.report(report)
    generation.report_prompt(3, given)
    expected = [replace(report, text=text) for report, text in zip(given, texts, strict=True)]
    assert sample.logprobs == expected
    assert generation.prompt_logprobs == dict(enumerate(expected, 3))
    assert sample.output().cumulative_logprob == -0.5 * sum(tokens)


def test_a_text_is_taken_whole_while_another_thread_adds_to_it() -> None:
    class Growing(list[str]):
        """Grows whenever it is read, as if another thread ran in between."""

        def __getitem__(self, place: Any) -> Any:
            found = super().__getitem__(place)
            self.append(f"{len(self)},")
            return found

    stream = TextStream(Pieces([]), (1,), SamplingParams())
    stream._released = Growing()
    taken = "".join(stream.take() for _ in range(5))
    assert taken == "0,1,2,3,"
    assert stream.text == f"{taken}4,"


def test_a_text_that_ends_inside_a_character_shows_it() -> None:
    stream = TextStream(Pieces([b"a\xe2", b"\x98"]), (1,), SamplingParams(stop="\ufffd!"))
    assert (stream.push(4), stream.push(5), stream.take()) == (None, None, "a")
    assert (stream.close(), stream.take()) == (None, "\ufffd")


def test_a_broken_character_can_complete_a_stop_string() -> None:
    stream = TextStream(Pieces([b"a\xe2"]), (1,), SamplingParams(stop="\ufffd"))
    assert (stream.push(4), stream.close(), stream.text) == (None, "\ufffd", "a")


@contextmanager
def spelling(pieces: Sequence[str | bytes | int], **options: Any) -> Iterator[tuple[LLM, list[int]]]:
    """An LLM that answers BOS with these pieces (or ids), then full stops; and the ids of the answer."""
    spelled = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    vocabulary = list(dict.fromkeys(piece for piece in spelled if isinstance(piece, bytes)))
    answer = [piece if isinstance(piece, int) else 4 + vocabulary.index(piece) for piece in spelled]
    model = ours(eos=(EOS,), kind=Scripted)
    assert isinstance(model, Scripted)
    model.script = [1, *answer] + [FILLER] * 300
    with running(model, tokenizer=Pieces(vocabulary), **options) as llm:
        yield llm, answer


HELLO = ["Hello", " wor", "ld", EOS]
# pieces, options -> text, number of tokens, finish_reason, stop_reason
ENDS: dict[str, tuple[list[str | bytes | int], dict[str, Any], tuple[str, int, str, str | int | None]]] = {
    "eos": (HELLO, {}, ("Hello world", 4, "stop", None)),
    "eos ignored": (HELLO, {"ignore_eos": True, "max_tokens": 6}, ("Hello world..", 6, "length", None)),
    "eos shown": (HELLO, {"skip_special_tokens": False}, ("Hello world</s>", 4, "stop", None)),
    "eos as the last token": (HELLO, {"max_tokens": 4}, ("Hello world", 4, "stop", None)),
    "eos asked for by id": (HELLO, {"stop_token_ids": [EOS]}, ("Hello world", 4, "stop", EOS)),
    "eos ignored, but asked for": (
        HELLO,
        {"stop_token_ids": [EOS], "ignore_eos": True},
        ("Hello world", 4, "stop", EOS),
    ),
    "max_tokens": (HELLO, {"max_tokens": 3}, ("Hello world", 3, "length", None)),
    "one token": (HELLO, {"max_tokens": 1}, ("Hello", 1, "length", None)),
    "a stop id is no text": (HELLO, {"stop_token_ids": [5, 90]}, ("Hello", 2, "stop", 5)),
    "a stop id as the last token": (HELLO, {"stop_token_ids": [5], "max_tokens": 2}, ("Hello", 2, "stop", 5)),
    "a stop id releases what was held": (HELLO, {"stop": "lo!", "stop_token_ids": [5]}, ("Hello", 2, "stop", 5)),
    "a stop string in a token": (HELLO, {"stop": "ell"}, ("H", 1, "stop", "ell")),
    "a stop string is a token": (HELLO, {"stop": " wor"}, ("Hello", 2, "stop", " wor")),
    "a stop string across tokens": (HELLO, {"stop": ["x", "lo world"]}, ("Hel", 3, "stop", "lo world")),
    "a stop string at the very end": (HELLO, {"stop": "world", "max_tokens": 3}, ("Hello ", 3, "stop", "world")),
    "a stop string at the start": (HELLO, {"stop": "Hello w"}, ("", 2, "stop", "Hello w")),
    "a stop string, shown": (
        HELLO,
        {"stop": "lo w", "include_stop_str_in_output": True},
        ("Hello w", 2, "stop", "lo w"),
    ),
    "a stop string that a special token spells, shown": (
        HELLO,
        {"stop": "d</s>", "include_stop_str_in_output": True},
        ("Hello world</s>", 4, "stop", "d</s>"),
    ),
    "a stop id is no text, even so": (
        HELLO,
        {"stop_token_ids": [5], "include_stop_str_in_output": True},
        ("Hello", 2, "stop", 5),
    ),
    "a stop string too early": (HELLO, {"stop": ["ell", "world"], "min_tokens": 2}, ("Hello ", 3, "stop", "world")),
    "a stop string begun early": (HELLO, {"stop": "lo w", "min_tokens": 1}, ("Hel", 2, "stop", "lo w")),
    "a stop string begun early, and one within": (
        ["aba", "b", "c"],
        {"stop": ["ab", "ababc"], "min_tokens": 2},
        ("", 3, "stop", "ababc"),
    ),
    "as many tokens as must be": (
        HELLO,
        {"stop": "ld", "min_tokens": 3, "max_tokens": 3},
        ("Hello world", 3, "length", None),
    ),
    "a stop string at the very end, too early": (
        [b"a\xe2"],
        {"stop": "\ufffd", "min_tokens": 1, "max_tokens": 1},
        ("a\ufffd", 1, "length", None),
    ),
    "no stop follows, then eos": (HELLO, {"stop": "world!"}, ("Hello world", 4, "stop", None)),
    "no stop follows, then length": (HELLO, {"stop": "world.", "max_tokens": 3}, ("Hello world", 3, "length", None)),
    "a false start": (["a", "a", "a", "b", "c"], {"stop": "aab"}, ("a", 4, "stop", "aab")),
    "the first to be complete": (["a", "b", "c", "d"], {"stop": ["abcd", "bc"]}, ("a", 3, "stop", "bc")),
    "the same in one token": (["abcd"], {"stop": ["abcd", "bc"]}, ("a", 1, "stop", "bc")),
    "the longest of two": (["abc", "d"], {"stop": ["c", "bc", "x"]}, ("a", 1, "stop", "bc")),
    "text after the stop": (["one\n\nQ: two"], {"stop": ["Q:", "\n\n"]}, ("one", 1, "stop", "\n\n")),
    "broken characters": (
        [b"\xf0\x9f", b"\x98", b"\x80", b"\xe2\x98"],
        {"max_tokens": 4},
        ("😀\ufffd", 4, "length", None),
    ),
    "ids without a piece": ([96, "Hello", 50, " you", 96, EOS], {"stop": "you."}, ("Hello you", 6, "stop", None)),
}


@pytest.mark.parametrize("case", ENDS)
def test_ends(case: str) -> None:
    pieces, options, (text, count, finish_reason, stop_reason) = ENDS[case]
    with spelling(pieces) as (llm, answer):
        params = SamplingParams(temperature=0, logprobs=0, **({"max_tokens": 9} | options))
        output = llm.generate([1], params)[0].outputs[0]
        streamed = list(llm.stream([1], params))
    assert (output.text, output.finish_reason, output.stop_reason) == (text, finish_reason, stop_reason)
    assert list(output.token_ids) == (answer + [FILLER] * 9)[:count]
    assert output.logprobs is not None
    assert [report.token_id for report in output.logprobs] == list(output.token_ids)
    assert "".join(streamed) == text
    assert "" not in streamed


def test_broken_logits_end_it_with_what_came_before() -> None:
    params = SamplingParams(temperature=0, logprobs=0, stop="worn")
    with spelling(["Hello", " wor", Scripted.BROKEN]) as (llm, answer):
        with pytest.raises(RequestError, match="the model's logits are not finite numbers") as failure:
            llm.generate([1], params)
        streamed: list[str] = []
        pieces = llm.stream([1], params)
        with pytest.raises(RequestError, match="the model's logits are not finite numbers"):
            streamed.extend(pieces)
    (output,) = failure.value.outputs[0].outputs
    assert (output.text, output.finish_reason, list(output.token_ids)) == ("Hello wor", "error", answer[:2])
    assert output.stop_reason == "the model's logits are not finite numbers"
    assert [report.token_id for report in output.logprobs] == answer[:2]
    assert "".join(streamed) == "Hello wor"


def test_the_context_is_full() -> None:
    with spelling(["a"], max_model_len=21) as (llm, _):
        output, longest = llm.generate([[1], [1] * 20], SamplingParams(temperature=0, max_tokens=99, stop="..!"))
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (20, "length")
    assert output.outputs[0].text == "a" + 19 * "."
    assert (longest.outputs[0].text, longest.outputs[0].finish_reason) == (".", "length")


def test_pieces_come_as_soon_as_they_are_certain() -> None:
    with spelling(["ab", "c", "x", "a", EOS]) as (llm, _):
        assert list(llm.stream([1], SamplingParams(temperature=0, stop="cd"))) == ["ab", "cx", "a"]


def test_an_abort_releases_what_was_held() -> None:
    with spelling(["Hel", "lo", "."]) as (llm, _):
        generation = llm.start([1], SamplingParams(temperature=0, stop="Hello!"))
        for _ in range(2):
            llm.engine.step()
        assert generation.output().outputs[0].text == ""
        llm.engine.abort(generation)
        output = generation.output()
    assert (output.outputs[0].text, output.outputs[0].finish_reason, output.finished) == ("Hello", "abort", True)


def test_a_prompt_may_hold_ids_without_a_piece() -> None:
    with spelling(["a", "b", EOS]) as (llm, _):
        output = llm.generate([1, VOCAB - 1], SamplingParams(temperature=0))[0].outputs[0]
    assert (output.text, output.finish_reason) == ("b", "stop")


def test_a_generation_can_be_read_at_any_time() -> None:
    with spelling(["ab", "c", "x", EOS]) as (llm, answer):
        generation = llm.start([1], SamplingParams(temperature=0, stop="cd", prompt_logprobs=0))
        before = generation.output()
        assert (before.outputs[0].text, before.outputs[0].token_ids, before.finished) == ("", (), False)
        assert (before.prompt_token_ids, before.prompt_logprobs) == ((1,), (None,))
        times = (before.metrics.first_scheduled_time, before.metrics.first_token_time, before.metrics.finish_time)
        assert times == (None, None, None)
        pieces = llm.follow(generation)
        assert next(pieces) == "ab"
        during = generation.output()
        assert during.metrics.first_scheduled_time is not None
        assert (during.outputs[0].text, list(during.outputs[0].token_ids)) == ("ab", answer[:1])
        assert (during.outputs[0].finish_reason, during.finished) == (None, False)
        assert list(pieces) == ["cx"]
        metrics = generation.output().metrics
    assert generation.finished
    assert generation.output().finished
    assert before.outputs[0].text == "", "an output is a value"
    assert metrics.first_scheduled_time == during.metrics.first_scheduled_time
    assert metrics.first_scheduled_time is not None
    assert metrics.first_token_time is not None
    assert metrics.finish_time is not None
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finish_time
    assert (metrics.num_prompt_tokens, metrics.num_cached_tokens, metrics.num_generated_tokens) == (1, 0, 4)
