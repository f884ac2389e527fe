"""LLM: its arguments, the order of its answers, and one clear sentence for each mistake."""

from __future__ import annotations

import gc
import inspect
import io
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastllama import LLM, SamplingParams
from fastllama.errors import RequestError
from fastllama.io.chat import encode_chat
from fastllama.runtime.device import memory
from fastllama.runtime.engine import Engine
from fastllama.runtime.handle import EngineHandle
from fastllama.runtime.options import EngineOptions
from tests.io import tokenizer_samples as samples
from tests.runtime.models import Scripted, check_idle, ours, prompt_of, running

PIECES = 2048  # of the bundled tokenizer
SHORT = SamplingParams(temperature=0, max_tokens=3)


def talking(**options: Any) -> Any:
    """A random model with the bundled tokenizer."""
    return running(ours(vocab_size=PIECES), tokenizer=samples.tokenizer("tiny"), **options)


def test_prompts_of_every_kind() -> None:
    with talking() as llm:
        one = llm.generate("Hello", SHORT)
        ids = list(one[0].prompt_token_ids)
        assert ids == llm.tokenizer.encode("Hello")
        several = llm.generate(["A", "Hello", ""], SHORT)
        assert [output.prompt for output in several] == ["A", "Hello", ""]
        assert several[2].prompt_token_ids == (1,), "an empty text is BOS alone"
        tokens = several[1].outputs[0].token_ids
        assert tokens == one[0].outputs[0].token_ids
        for given in (ids, tuple(ids), [ids], [tuple(ids)]):
            (output,) = llm.generate(given, SHORT)
            assert (output.prompt, list(output.prompt_token_ids)) == (None, ids)
            assert output.outputs[0].token_ids == tokens
        assert [output.prompt for output in llm.generate(["A", ids], SHORT)] == ["A", None]
        assert llm.generate([], SHORT) == []
        assert llm.generate([], []) == []


def test_outputs_keep_the_order_of_prompts_and_take_each_its_params() -> None:
    lengths = [5, 1, 9, 2, 7]
    prompts = [prompt_of(length) for length in lengths]
    params = [SamplingParams(max_tokens=length, n=1 + length % 2) for length in lengths]
    with running(ours(), max_num_seqs=2, max_num_batched_tokens=4) as llm:
        outputs = llm.generate(prompts, params)
        assert len(llm.generate(prompts[0])[0].outputs[0].token_ids) == 251, "to max_tokens=256, or max_model_len"
    assert [list(output.prompt_token_ids) for output in outputs] == prompts
    assert [[len(sample.token_ids) for sample in output.outputs] for output in outputs] == [
        [length] * (1 + length % 2) for length in lengths
    ]
    assert [sample.index for sample in outputs[0].outputs] == [0, 1]


def test_chat_and_its_stream_ask_the_same() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    with talking() as llm:
        output = llm.chat(messages, SHORT)
        assert list(output.prompt_token_ids) == encode_chat(llm.tokenizer, messages)
        generation = llm.start(messages, SHORT)
        assert "".join(llm.follow(generation)) == output.outputs[0].text
        assert generation.output().outputs == output.outputs


def test_streams_take_turns() -> None:
    with talking() as llm:
        texts = [llm.generate(prompt, SHORT)[0].outputs[0].text for prompt in ("Hello", [5, 6])]
        first, second = llm.stream("Hello", SHORT), llm.stream([5, 6], SHORT)
        started = [next(first), next(second)]
        llm.generate("something between", SHORT)
        assert [started[0] + "".join(first), started[1] + "".join(second)] == texts


@pytest.mark.parametrize("num_pieces", [0, 1, 2])
def test_closing_a_stream_aborts_its_request(num_pieces: int) -> None:
    with talking() as llm:
        stream = llm.stream("Hello", SamplingParams(temperature=0, max_tokens=50))
        for _ in range(num_pieces):
            next(stream)
        assert llm.engine.has_work
        stream.close()  # type: ignore[attr-defined]
        check_idle(llm.engine)
        generation = llm.start("Hello", SHORT)
        follow = llm.follow(generation)
        del follow
        check_idle(llm.engine)
        assert generation.output().outputs[0].finish_reason == "abort"


def test_a_failed_step_ends_a_stream() -> None:
    with talking() as llm:
        stream = llm.stream("Hello", SHORT)
        next(stream)
        llm.engine.model.forward = None  # type: ignore[assignment]
        with pytest.raises(RequestError, match=r"^request '0' failed: TypeError\(") as raised:
            next(stream)
        assert isinstance(raised.value.__cause__, TypeError)
        check_idle(llm.engine)


@pytest.mark.parametrize("progress", [True, False, None])
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_a_bar_for_batches_where_it_is_asked_for_or_seen(
    count: int, terminal: bool, progress: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    with running(ours(), progress=progress) as llm:
        llm.generate([[3, 4]] * count, SHORT)
    shown = count > 1 and (terminal if progress is None else progress)
    assert ("Generating" in screen.getvalue()) == shown
    assert bool(screen.getvalue()) == shown


@pytest.mark.parametrize("speculation", [None, "prompt_lookup", "draft"])
def test_closing_frees_all_at_once(speculation: str | None) -> None:
    """Model, pages and graphs go as the last name for them does: what waits for the garbage collector holds memory."""
    draft = ours() if speculation == "draft" else speculation
    llm = LLM(ours(), kv_cache_tokens=256, host_cache_tokens=64, max_model_len=64, progress=False, speculation=draft)
    gc.collect()
    gc.disable()
    try:
        llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=8))
        held = [weakref.ref(each) for each in (llm.engine, llm.engine.model, llm.engine._runner, llm.engine.pool)]
        llm.close()
        assert [each() for each in held] == [None] * 4
    finally:
        gc.enable()


def test_a_closed_llm_raises() -> None:
    with talking() as llm:
        stream = llm.stream("Hello", SHORT)
        next(stream)
        engine = llm.engine
        llm.close()
        llm.close()
        uses: list[Callable[[], Any]] = [
            lambda: llm.generate("Hello"),
            lambda: llm.generate([1]),
            lambda: llm.score([1, 2]),
            lambda: llm.stream("Hello"),
            lambda: next(stream),
            lambda: llm.chat([{"role": "user", "content": "Hello"}]),
            lambda: llm.config,
        ]
        for use in uses:
            with pytest.raises(RuntimeError, match=r"^this LLM is closed; make a new one$"):
                use()
        llm._handle = EngineHandle(engine)  # for the check of `running`
        for request in list(engine._requests.generations.values()):
            engine.abort(request)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"max_model_length": 5},
            TypeError,
            "LLM got an unknown option 'max_model_length'; did you mean 'max_model_len'?",
        ),
        ({"zzz": 5}, TypeError, "LLM got an unknown option 'zzz'; legal options: model, tokenizer, dtype"),
        ({"page_size": 8}, ValueError, "page_size is 8; legal: 16 to 256"),
        ({"page_size": 32.5}, TypeError, "page_size must be an integer, got 32.5"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs is 0; legal: at least 1"),
        ({"max_num_batched_tokens": 0}, ValueError, "max_num_batched_tokens is 0; legal: at least 1"),
        (
            {"max_num_seqs": 64, "max_num_batched_tokens": 63},
            ValueError,
            "max_num_batched_tokens is 63; legal: at least 64",
        ),
        ({"kv_cache_tokens": "8G"}, TypeError, "kv_cache_tokens must be an integer, got '8G' of type str"),
        ({"max_num_seqs": True}, TypeError, "max_num_seqs must be an integer, got True of type bool"),
        ({"deterministic": 1}, TypeError, "deterministic must be True or False, got 1"),
        ({"max_model_len": 10**5000}, ValueError, "max_model_len is an integer of 5001 digits; legal: "),
        ({"host_cache_tokens": -1}, ValueError, "host_cache_tokens is -1; legal: at least 0"),
        ({"host_cache_tokens": 1e9}, TypeError, "host_cache_tokens must be an integer, got 1000000000.0"),
        ({"max_model_len": 1}, ValueError, "max_model_len is 1; legal: at least 2"),
        ({"seed": -1}, ValueError, "seed is -1; legal: at least 0"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ({"device": "tpu9"}, ValueError, "device is 'tpu9'; legal: 'auto', 'cpu', 'cuda', 'cuda:0' ..."),
        ({"device": "mps"}, ValueError, "device type is 'mps'; legal values: 'cpu', 'cuda'"),
        ({"dtype": "float8"}, ValueError, "dtype is 'float8'"),
        ({"model": "no/such/model"}, FileNotFoundError, "model is 'no/such/model', but no such file or folder exists"),
        ({"tokenizer": "no/such"}, FileNotFoundError, "no tokenizer at no/such"),
        ({"tokenizer": 3}, TypeError, "tokenizer is 3; legal: a path, fastllama's Tokenizer, a trans"),
        ({"model": None}, TypeError, "model is a NoneType; legal: 'tiny', a path, a Hub id, what fastllama.load_mo"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model is a Linear; legal: 'tiny', a path"),
    ],
)
def test_mistakes_are_reported_before_weights_are_read(
    options: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastllama.io.load.load_weights", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(error) as raised:
        LLM(**options)
    assert str(raised.value).startswith(message)


def test_none_is_an_options_default() -> None:
    left = {name: option.default for name, option in inspect.signature(LLM).parameters.items() if name != "unknown"}
    given = dict.fromkeys(left, None) | {"model": ours(), "quantization": "auto", "progress": False}
    with LLM(**(given | {"kv_cache_tokens": 128})) as llm:
        assert [*llm.generate([5, 6], SHORT)[0].prompt_token_ids] == [5, 6]
    assert EngineOptions(**dict.fromkeys(inspect.signature(EngineOptions).parameters, None)) == EngineOptions()
    with running(ours(vocab_size=PIECES), tokenizer=samples.tokenizer("tiny"), chat_format=None) as llm:
        assert llm.chat_format.encode([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize("kind", [np.int64, np.uint16, torch.tensor, np.array])
def test_numbers_of_numpy_and_torch_are_held_as_pythons(kind: Any) -> None:
    names = ("max_model_len", "kv_cache_tokens", "host_cache_tokens", "page_size", "max_num_seqs", "seed")
    options = EngineOptions(**{name: kind(64) for name in (*names, "max_num_batched_tokens")}, num_draft_tokens=kind(5))
    assert options == EngineOptions(**dict.fromkeys((*names, "max_num_batched_tokens"), 64), num_draft_tokens=5)
    assert {type(getattr(options, name)) for name in names} == {int}
    assert EngineOptions(deterministic=kind(1) == kind(1)).deterministic is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 513}, "max_model_len is 513; legal: 1 to 512"),
        (
            {"max_model_len": 100, "kv_cache_tokens": 99},
            "max_model_len is 100 and the KV cache has 99 tokens; legal: ",
        ),
        ({"dtype": "float32"}, "dtype is 'float32' beside a loaded model, which has its own; legal: 'auto'"),
        ({"device": "cpu"}, "device is 'cpu' beside a loaded model, which has its own; legal: 'auto'"),
        ({"adapter": "some/where"}, "adapter is 'some/where' beside a loaded model; legal: load_model(..., adapter=)"),
    ],
)
def test_what_does_not_fit_the_model(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="legal: ") as raised:
        LLM(ours(), **({"kv_cache_tokens": 1024} | options))
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("prompts", "params", "error", "message"),
    [
        (None, SHORT, TypeError, "prompts is None; legal: a text, texts, token ids, or lists of token ids"),
        (5, SHORT, TypeError, "prompts is 5; legal: "),
        (b"ab", SHORT, TypeError, "prompts is b'ab'; legal: "),
        ([None], SHORT, TypeError, r"prompts is \[None\]; legal: "),
        ([[1], 2], SHORT, TypeError, r"prompts is \[\[1\], 2\]; legal: "),
        ([[1], [2]], [SHORT], ValueError, "params has 1 entries for 2 prompts; legal: one for all, or one for each$"),
        ([], [SHORT], ValueError, "params has 1 entries for 0 prompts"),
        ([1], {"max_tokens": 3}, TypeError, r"params is {'max_tokens': 3}; legal: SamplingParams, or a list of one"),
        ([[1]], [None], TypeError, r"params is \[None\]; legal: "),
        ("Hello", SHORT, ValueError, "tokenizer is None and the model has none; legal for text: tokenizer="),
        ([[1], "Hello"], SHORT, ValueError, "tokenizer is None"),
    ],
)
def test_wrong_prompts_and_params(prompts: Any, params: Any, error: type[Exception], message: str) -> None:
    with running(ours()) as llm, pytest.raises(error, match=rf"^{message}"):
        llm.generate(prompts, params)


def test_a_stream_is_of_one_sample_and_of_text() -> None:
    with talking() as llm:
        with pytest.raises(ValueError, match=r"^n is 2; legal for a stream: 1$"):
            llm.stream("Hello", SamplingParams(n=2))
        for prompt in (5, b"ab"):
            with pytest.raises(TypeError, match=r"^prompt is .*; legal: a text, token ids, or the messages of a chat$"):
                llm.stream(prompt)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^messages is empty"):
            llm.chat([])
    with running(ours()) as llm, pytest.raises(ValueError, match=r"^tokenizer is None"):
        llm.stream([1, 2])


def test_what_was_chosen_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """2 layers, 2 heads of 16 in fp64: 1 KiB for a token's keys and values."""
    caplog.set_level(logging.INFO, "fastllama")
    with running(ours(), kv_cache_tokens=200, max_model_len=None, page_size=64) as llm:
        sizes, scheduler = llm.engine._sizes, llm.engine.scheduler
        assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (16, 2048)
        assert (llm.engine.pool.num_pages * 64, llm.max_model_len) == (256, sizes.max_model_len)
    chosen = "max_model_len 200, KV cache 256 tokens (0.00 GB), max_num_seqs 16, max_num_batched_tokens 2048"
    warning = "max_model_len is 200, not the model's 512: the KV cache has no room for more"
    assert [record.getMessage() for record in caplog.records] == [chosen, warning]
    monkeypatch.setattr(memory, "available_bytes", lambda device: 8 * 2**20)
    with running(ours(), kv_cache_tokens=None, max_num_seqs=20) as llm:
        scheduler = llm.engine.scheduler
        assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (20, 512)
        left = 8 * 2**20 - 512 * 3328 - 20 * 97 * 12
        assert llm.engine.pool.num_pages == left // 4 // 1024 // 16
    monkeypatch.undo()
    assert memory.available_bytes(torch.device("cpu")) > 2**20


def test_the_whole_cache_is_usable() -> None:
    """One request may fill it to the last token of the last page."""
    with running(ours(), kv_cache_tokens=40, max_model_len=40) as llm:
        assert llm.engine.pool.num_pages == 3
        output = llm.generate(prompt_of(30), SamplingParams(max_tokens=99))[0]
    assert len(output.outputs[0].token_ids) == 10
    with running(ours(), kv_cache_tokens=48, max_model_len=48) as llm:
        assert len(llm.generate(prompt_of(30), SamplingParams(max_tokens=99))[0].outputs[0].token_ids) == 18


def test_a_file_of_weights_brings_the_tokenizer_beside_it(tmp_path: Path) -> None:
    from tests.io.checkpoints import random_llama, write_llama2c

    path = write_llama2c(random_llama(vocab_size=PIECES), tmp_path / "model.bin", version=1)
    with LLM(path, kv_cache_tokens=128, progress=False) as llm:
        assert llm.tokenizer is None
        assert isinstance(llm.engine, Engine)
    (tmp_path / "tokenizer.model").write_bytes(samples.TINY.read_bytes())
    with LLM(str(path), kv_cache_tokens=128, progress=False) as llm:
        assert llm.generate("Hello", SHORT)[0].prompt_token_ids == tuple(samples.tokenizer("tiny").encode("Hello"))


def test_scripted_answers_are_their_scripts() -> None:
    """The scripted models of the text tests write their script, whatever the prompt."""
    model = ours(kind=Scripted)
    assert isinstance(model, Scripted)
    model.script = [0, 9, 8, 7, 6]
    with running(model) as llm:
        assert llm.generate([5], SHORT)[0].outputs[0].token_ids == (9, 8, 7)
        assert llm.generate([5, 5], SHORT)[0].outputs[0].token_ids == (8, 7, 6)


def test_without_progress_compilation_is_not_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    @contextmanager
    def announced(device: torch.device) -> Iterator[None]:
        devices.append(device.type)
        yield

    monkeypatch.setattr("fastllama.runtime.parts.compiling_announced", announced)
    for progress in (False, None):
        with running(ours(), progress=progress):
            pass
    assert devices == ["cpu", "cpu"], "for packing, and for the warm-up"
