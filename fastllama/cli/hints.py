"""Our names for the options of other programs (llama.cpp, vLLM, transformers, Ollama).

Options that are Python parameters too are listed in `runtime.peer_names`, where "--n-ctx" is "n_ctx".
"""

from __future__ import annotations

from collections.abc import Collection

from fastllama.errors import nearest
from fastllama.runtime.peer_names import instead, names_here

ALIKE = 0.7  # similarity above which a name is suggested: --promt suggests --prompt, --port does not

_SAME = {
    "--prompt": ("--input", "--text", "--query"),
    "--prompt-file": ("--input-file",),
    "--escape": ("--process-escapes",),
    "--system": ("--system-prompt", "--system-message", "-sys"),
    "--model": ("--model-name-or-path", "--hf-repo", "-hf", "-hfr", "-M"),
    "--tokenizer": ("--tokenizer-name", "--vocab-file"),
    "--adapter": ("--lora", "--peft", "--adapter-path"),
    "--max-tokens": ("--predict", "--length"),
    "--max-model-len": ("--context-size",),
    "--temperature": ("-T",),
    "--top-k": ("-k",),
    "--logprobs": ("--num-logprobs",),
    "--n": ("--num-samples", "--num-completions", "--best-of"),
    "--seed": ("--rng-seed",),
    "--stop": ("--reverse-prompt", "-r", "--eos"),
    "--device": ("--gpu-layers", "-ngl", "--gpu", "--cuda", "--cpu", "--main-gpu", "-mg"),
    "--dtype": ("--precision", "--bf16", "--fp16", "--half"),
    "--quantize": ("--quantization", "--quant", "--load-in-4bit", "--load-in-8bit", "--int4", "--int8", "--bits"),
    "--kv-cache-dtype": ("-ctk", "-ctv"),
    "--speculation": ("--model-draft", "-md"),
    "--num-draft-tokens": ("--draft", "--draft-n"),
    "--quiet": ("--log-disable", "--silent", "--no-progress"),
    "--debug": ("--verbose", "-v", "--log-verbose", "--log-level", "--traceback"),
    "--help": ("-?", "--usage"),
    "--batch": ("--batch-size", "-b", "-npl"),
    "--context": ("--depth", "-d", "-npp", "--input-len", "--ctx-size"),
    "--tokens": ("--output-len", "-ntg"),
    "--requests": ("--num-prompts", "--num-requests"),
    "--loads": ("--request-rate",),
    "--rounds": ("--repetitions", "-r", "--repeat", "--num-iters"),
    "--output": ("--output-json", "--output-file", "-o", "--out"),
}
_ELSEWHERE = {
    ("--prompt", "-p", "--prompt-file", "-f"): "fastllama generate takes a prompt",
    ("--system", "--system-prompt", "--system-message", "-sys"): "fastllama chat takes a system message",
    ("--file",): "a prompt comes from --prompt-file, and the text of fastllama perplexity from --file",
    ("--interactive", "-i", "--conversation", "-cnv", "--chat"): "fastllama chat holds a conversation",
    ("--threads", "-t", "--threads-batch", "-tb"): "threads are torch's: set OMP_NUM_THREADS",
}


def is_foreign(name: str) -> bool:
    """Whether a name is an option of another program: `-ngl` is not our `-n` with a value `gl`."""
    return any(name in theirs for theirs in _SAME.values())


def hint(word: str, options: Collection[str]) -> str:
    """A suggestion to append to `unknown argument WORD`, from the existing options; "" where none is similar.

    A name of one letter is similar to every other, so it is looked up and never compared.
    """
    name = word.split("=")[0]
    if f"-{name}" in options:
        return f"; did you mean -{name}?"
    names = (name, name[:2]) if not name.startswith("--") else (name.replace("_", "-"),)
    for said in names:
        for ours, theirs in _SAME.items():
            if ours in options and said in theirs:
                return f"; did you mean {ours}?"
        for theirs, sentence in _ELSEWHERE.items():
            if said in theirs:
                return f"; {sentence}"
    if name.startswith("--"):
        parameter = names[0][2:].replace("-", "_")
        for ours in (f"--{each.replace('_', '-')}" for each in names_here(parameter)):
            if ours in options:
                return f"; did you mean {ours}?"
        if (why_not := instead(parameter)) is not None:
            return f"; {why_not}"
        long = {option[2:]: option for option in options if option.startswith("--")}
        found = nearest(names[0][2:], long, ALIKE)
        return f"; did you mean {long[found]}?" if found else ""
    return ""
