"""fastllama generate: the text that LLM gives, where and when it is expected."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fastllama import LLM, RequestOutput, SamplingParams
from fastllama.runtime.drafting.speculation import Pace
from tests.cli.conftest import Command
from tests.cli.models import write_model

PROMPT = "once upon a time"


def expected(model: str, prompt: str, **params: object) -> RequestOutput:
    """LLM's answer with the command's defaults, except for `params`."""
    defaults = {"max_tokens": 24, "temperature": 0.8, "top_p": 0.95, "seed": 0}
    with LLM(model) as llm:
        return llm.generate(prompt, SamplingParams(**(defaults | params)))[0]


def test_it_prints_the_prompt_and_its_completion(command: Command, model: str) -> None:
    done = command("generate", "--model", model, "--prompt", PROMPT, "--max-tokens", "24")
    assert (done.status, done.out) == (0, f"{PROMPT}{expected(model, PROMPT).outputs[0].text}\n")


@pytest.mark.parametrize(
    ("options", "params"),
    [
        (["--temperature", "0"], {"temperature": 0}),
        (["--seed", "5"], {"seed": 5}),
        (["--temperature", "1.5", "--top-k", "3"], {"temperature": 1.5, "top_k": 3}),
        (["--temperature", "2", "--top-p", "0.3"], {"temperature": 2, "top_p": 0.3}),
        (["--temperature", "2", "--min-p", "0.4"], {"temperature": 2, "min_p": 0.4}),
        (["--max-tokens", "3"], {"max_tokens": 3}),
        (["--temperature", "0", "--repetition-penalty", "9"], {"temperature": 0, "repetition_penalty": 9}),
        (["--temperature", "0", "--presence-penalty", "2"], {"temperature": 0, "presence_penalty": 2}),
        (["--temperature", "0", "--frequency-penalty", "2"], {"temperature": 0, "frequency_penalty": 2}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_each_option_reaches_the_sampler(
    command: Command, model: str, options: list[str], params: dict[str, object]
) -> None:
    done = command("generate", "--model", model, "--prompt", PROMPT, "--max-tokens", "24", *options)
    text = expected(model, PROMPT, **params).outputs[0].text
    assert done.out == f"{PROMPT}{text}\n"
    assert text != expected(model, PROMPT).outputs[0].text


def test_it_ends_before_any_stop_text(command: Command, model: str) -> None:
    text = expected(model, PROMPT, temperature=0).outputs[0].text
    args = ("generate", "--model", model, "--prompt", PROMPT, "--temperature", "0", "--max-tokens", "24")
    done = command(*args, "--stop", "never written", "--stop", text[5:8])
    assert done.out == f"{PROMPT}{text[: text.index(text[5:8])]}\n"
    assert "finish: stop" in done.err


def test_statistics_go_to_standard_error(command: Command, model: str) -> None:
    done = command("generate", "--model", model, "--prompt", PROMPT, "--max-tokens", "24", "--seed", "7")
    loaded, rates = done.err.splitlines()
    assert re.fullmatch(
        rf"{re.escape(model)}: 0\.1 M parameters, float32 on cpu \(ops: .+\), loaded in [\d.]+ s", loaded
    )
    count = len(expected(model, PROMPT).prompt_token_ids)
    number = r"[\d.,]+ tokens/s"
    assert re.fullmatch(
        rf"prompt: {count} tokens, {number}; generated: 24 tokens, {number}; finish: length; seed 7", rates
    )


def test_quiet_leaves_the_text_alone(command: Command, model: str) -> None:
    done = command("generate", "--model", model, "--prompt", PROMPT, "--max-tokens", "4", "--quiet")
    assert done.out.startswith(PROMPT)
    assert done.err == ""


def test_each_piece_is_shown_before_the_next_is_computed(
    command: Command, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text on the terminal grows between steps of the engine, and is flushed each time."""
    shown: list[str] = []
    follow = LLM.follow

    class Terminal:
        def write(self, text: str) -> int:
            pending.append(text)
            return len(text)

        def flush(self) -> None:
            shown.extend(pending)
            pending.clear()

    pending: list[str] = []
    seen: list[str] = []

    def watched(self: LLM, generation: object) -> object:
        for piece in follow(self, generation):
            seen.append("".join(shown))
            yield piece

    monkeypatch.setattr(LLM, "follow", watched)
    monkeypatch.setattr(sys, "stdout", Terminal())
    command("generate", "--model", model, "--prompt", PROMPT, "--max-tokens", "12", "--quiet")
    text = expected(model, PROMPT, max_tokens=12).outputs[0].text
    assert len(seen) >= 6
    assert seen[0] == PROMPT
    assert "".join(shown) == f"{PROMPT}{text}\n"
    assert all(len(before) < len(after) for before, after in itertools.pairwise(seen))


def test_an_empty_prompt_is_the_begin_token_alone(command: Command, model: str) -> None:
    for source, stdin in (([], b""), (["--prompt", ""], b"not read"), ([], b"\n")):
        done = command("generate", "--model", model, *source, "--max-tokens", "4", "--json", stdin=stdin)
        found = json.loads(done.out)
        assert (found["prompt"], found["prompt_token_ids"]) == ("", [1])
        assert len(found["token_ids"]) == 4


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_files_and_standard_input_lose_the_newline_at_their_end(
    command: Command, model: str, tmp_path: Path, end: bytes
) -> None:
    data = "Zoë \n was\n".encode() + b"here" + end
    file = tmp_path / "prompt.txt"
    file.write_bytes(data)
    args = ("generate", "--model", model, "--max-tokens", "2", "--json")
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbf" + data)
    for done in (
        command(*args, "--prompt-file", file),
        command(*args, "-f", marked),
        command(*args, "-", stdin=data),
        command(*args, stdin=data),
    ):
        assert json.loads(done.out)["prompt"] == "Zoë \n was\nhere"


def test_json_is_one_object(command: Command, model: str) -> None:
    done = command(
        "generate", "--model", model, "--prompt", PROMPT, "--max-tokens", "24", "--json", "--dtype", "bfloat16"
    )
    assert done.err == ""
    assert done.out.count("\n") == 1
    found = json.loads(done.out)
    with LLM(model, dtype="bfloat16") as llm:
        params = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=0)
        (output,) = llm.generate(PROMPT, params)
    timings = found.pop("timings")
    assert found.pop("backend")
    assert found == {
        "model": model,
        "dtype": "bfloat16",
        "device": "cpu",
        "prompt": PROMPT,
        "prompt_token_ids": list(output.prompt_token_ids),
        "text": output.outputs[0].text,
        "token_ids": list(output.outputs[0].token_ids),
        "finish_reason": "length",
        "stop_reason": None,
        "seed": 0,
    }
    prompt_tokens = len(output.prompt_token_ids)
    assert (timings["prompt_tokens"], timings["cached_tokens"], timings["generated_tokens"]) == (prompt_tokens, 0, 24)
    assert (timings["drafted_tokens"], timings["accepted_tokens"]) == (0, 0)
    assert timings["load_s"] > 0
    assert timings["prompt_tokens_per_s"] == pytest.approx(prompt_tokens / timings["prompt_s"])
    assert timings["decode_tokens_per_s"] == pytest.approx(23 / timings["decode_s"])


def test_several_samples(command: Command, model: str) -> None:
    outputs = expected(model, PROMPT, n=3, max_tokens=6).outputs
    args = ("generate", "--model", model, "--prompt", PROMPT, "--max-tokens", "6", "--n", "3")
    found = json.loads(command(*args, "--json").out)
    assert [sample["text"] for sample in found["samples"]] == [output.text for output in outputs]
    assert [sample["token_ids"] for sample in found["samples"]] == [list(output.token_ids) for output in outputs]
    assert len({output.text for output in outputs}) == 3
    assert "text" not in found
    shown = command(*args)
    assert shown.out == "".join(f"[{i}/3] {PROMPT}{output.text}\n\n" for i, output in enumerate(outputs, 1))
    assert "generated: 18 tokens" in shown.err
    assert "finish: length, length, length" in shown.err


def test_the_context_can_be_made_shorter(command: Command, model: str) -> None:
    done = command("generate", "--model", model, "--max-model-len", "10", "--json")
    assert len(json.loads(done.out)["token_ids"]) == 9


def test_a_tokenizer_may_lie_elsewhere(command: Command, model: str, tmp_path: Path) -> None:
    bare = write_model(tmp_path / "bare", tokenizer=False)
    args = ("--prompt", PROMPT, "--max-tokens", "8", "--quiet")
    done = command("generate", "--model", bare, "--tokenizer", Path(model) / "tokenizer.model", *args)
    assert done.out == command("generate", "--model", model, *args).out


def test_logits_that_are_no_numbers_are_an_error(command: Command, tmp_path: Path) -> None:
    """Weights that fit in float16, activations that do not."""
    large = write_model(tmp_path / "large")
    args = ("generate", "--model", large, "--prompt", PROMPT, "--max-tokens", "4")
    assert command(*args, "--dtype", "float16").status == 0
    weights = load_file(large / "model.safetensors")
    weights["lm_head.weight"] *= 40000 / weights["lm_head.weight"].abs().max()
    save_file(weights, large / "model.safetensors")
    done = command(*args, "--dtype", "float16", "--json")
    assert (done.status, done.out) == (2, "")
    assert done.err == (
        "fastllama: error: the model's logits are not finite numbers; if the dtype is float16, "
        "try --dtype bfloat16 or float32\n"
    )


def test_the_bundled_model_writes(command: Command) -> None:
    """`fastllama generate` alone works, with no download."""
    done = command("generate", "--max-tokens", "8", "--json")
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["model"] == "tiny"
    assert found["text"].strip()


@pytest.mark.parametrize("kind", ["int4", "int8", "w8a8"])
def test_rounded_weights(command: Command, kind: str) -> None:
    story = ("generate", "--prompt", "Once", "--max-tokens", "4", "--temperature", "0", "--dtype", "float32")
    done = command(*story, "--quantize", kind)
    assert done.status == 0
    assert f"float32, weights in {kind} on cpu" in done.err
    assert command(*story, "--quantize", "int3").status == 2


def test_drafts_are_counted_and_change_nothing(command: Command, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "pays", lambda *args: True)
    story = ("generate", "--model", model, "--prompt", PROMPT, "--max-tokens", "24", "--temperature", "0")
    told = ("--speculation", model, "--num-draft-tokens", "3")
    found = json.loads(command(*story, *told, "--json").out)
    plain = expected(model, PROMPT, temperature=0).outputs[0]
    assert found["token_ids"] == list(plain.token_ids)
    drafted, accepted = (found["timings"][f"{name}_tokens"] for name in ("drafted", "accepted"))
    assert (drafted, accepted) == (18, 17)  # six steps of four tokens but for the last, which had one too many
    done = command(*story, *told)
    assert done.out == f"{PROMPT}{plain.text}\n"
    assert re.search(rf" tokens/s; drafted {drafted}, accepted {accepted}; finish: length; ", done.err)


def test_options_reach_the_runtime(command: Command, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, object]] = []
    made = LLM.__init__

    def watched(self: LLM, *args: object, **options: object) -> None:
        told.append(options)
        made(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(LLM, "__init__", watched)
    story = ("generate", "--model", model, "--max-tokens", "2", "--json")
    given = ("--kv-cache-dtype", "int8", "--deterministic", "--speculation", "prompt_lookup", "--num-draft-tokens", "2")
    assert command(*story).status == command(*story, *given).status == 0
    names = ("kv_cache_dtype", "deterministic", "speculation", "num_draft_tokens")
    assert [[options[name] for name in names] for options in told] == [
        ["auto", False, None, 3],
        ["int8", True, "prompt_lookup", 2],
    ]


def test_a_plain_prompt_to_a_chat_model_logs_its_chat_format(command: Command) -> None:
    words = "--prompt is continued as plain text; fastllama chat applies the model's chat format\n"
    assert words in command("generate", "-p", "Once", "-n", 1).err  # the bundled model has a chat template
    for args in (("-n", 1), ("-p", "Once", "-n", 1, "--quiet")):
        assert words not in command("generate", *args).err


def test_a_model_without_a_chat_template_is_prompted_without_a_word(command: Command, model: str) -> None:
    assert "chat" not in command("generate", "--model", model, "-p", "Once", "-n", 1).err
