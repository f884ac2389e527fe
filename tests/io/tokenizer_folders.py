"""Tokenizer folders as people have them, made on the spot from the bundled vocabulary: one builder for each kind."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.io import tokenizer_samples as samples

LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LINES = ["the cat saw the théâtre 😀 of <stories> in 1999", "once upon a time there was a small fox | who lived"]
_FOLDERS: dict[str, Callable[[Path], None]] = {}


def names() -> list[str]:
    """Every kind of folder."""
    return sorted(_FOLDERS)


@functools.cache
def folder(name: str) -> Path:
    """The folder of a kind; it lasts as long as the process."""
    path = Path(_ALL.name, name)
    path.mkdir()
    _FOLDERS[name](path)
    write(path, "config.json", {"model_type": "llama"})
    return path


def write(path: Path, name: str, content: Any) -> None:
    (path / name).write_text(json.dumps(content))


def token(content: str, **flags: bool) -> dict[str, Any]:
    """An added token as the files describe it."""
    off = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content, **off, **flags}


_ALL = tempfile.TemporaryDirectory(prefix="tokenizer-folders-")


def _kind(build: Callable[[Path], None]) -> Callable[[Path], None]:
    _FOLDERS[build.__name__] = build
    return build


def _sentencepiece(path: Path, config: dict[str, Any], layout: str = "", **files: Any) -> None:
    """tokenizer.model, or tokenizer.json in a layout, beside tokenizer_config.json and others (`a__json` is a.json)."""
    model = samples.model_bytes("tiny")
    if layout:
        samples.write_json(model, path, layout)
    else:
        (path / "tokenizer.model").write_bytes(model)
    write(path, "tokenizer_config.json", config)
    for name, content in files.items():
        write(path, name.replace("__", "."), content)


def _size() -> int:
    return samples.tokenizer("tiny").vocab_size


def _add(path: Path, tokens: list[dict[str, Any]], **changes: Any) -> None:
    """Write added tokens into tokenizer.json, as saving does."""
    spec = json.loads((path / "tokenizer.json").read_text())
    spec["added_tokens"] += [{"id": _size() + n, **each} for n, each in enumerate(tokens)]
    write(path, "tokenizer.json", spec | changes)


@_kind
def llama2_slow(path: Path) -> None:
    _sentencepiece(path, LLAMA | {"add_bos_token": True, "add_eos_token": False, "legacy": False})


@_kind
def llama2_slow_legacy(path: Path) -> None:
    _sentencepiece(path, LLAMA | {"add_bos_token": True, "legacy": True})


@_kind
def llama2_json(path: Path) -> None:
    _sentencepiece(path, LLAMA | {"add_bos_token": True, "legacy": False}, "prepend")


@_kind
def llama2_json_legacy(path: Path) -> None:
    _sentencepiece(path, LLAMA | {"legacy": True, "add_bos_token": False}, "prepend")


@_kind
def llama2_json_of_its_own(path: Path) -> None:
    _sentencepiece(path, LLAMA | {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}, "prepend")
    _add(path, [token("<pad>")])


@_kind
def normalized_tokens_of_its_own(path: Path) -> None:
    """The normalizer puts a space before added tokens as well."""
    numbers = {"<|im_start|>": _size(), "<|im_end|>": _size() + 1}
    _sentencepiece(path, LLAMA | {"tokenizer_class": "PreTrainedTokenizerFast"}, "prepend", added_tokens__json=numbers)


@_kind
def normalized_tokens_of_llama(path: Path) -> None:
    _sentencepiece(path, LLAMA | {"legacy": False}, "prepend")
    _add(path, [token("<|im_start|>", normalized=True, special=False), token("<l>", normalized=True, lstrip=True)])


@_kind
def metaspace_json(path: Path) -> None:
    _sentencepiece(path, LLAMA | {"tokenizer_class": "TokenizersBackend"}, "metaspace")


@_kind
def bos_and_eos(path: Path) -> None:
    _sentencepiece(path, LLAMA | {"add_bos_token": True, "add_eos_token": True})


@_kind
def no_add_bos_token(path: Path) -> None:
    _sentencepiece(path, LLAMA)


@_kind
def no_bos_at_all(path: Path) -> None:
    _sentencepiece(path, LLAMA | {"bos_token": None, "add_bos_token": True})


@_kind
def no_leading_space(path: Path) -> None:
    _sentencepiece(path, LLAMA | {"add_prefix_space": False, "add_bos_token": True})


@_kind
def no_leading_space_json(path: Path) -> None:
    _sentencepiece(path, LLAMA | {"add_prefix_space": False}, "metaspace")


@_kind
def yi(path: Path) -> None:
    decoder = {"3": token("<|im_start|>", special=False), str(_size()): token("<|endoftext|>")}
    config = LLAMA | {
        "add_bos_token": False,
        "eos_token": "<|endoftext|>",
        "legacy": True,
        "added_tokens_decoder": decoder,
    }
    _sentencepiece(path, config)


@_kind
def chatml_slow(path: Path) -> None:
    numbers = {"<|im_end|>": _size(), "<|im_start|>": _size() + 1, "fox": _size() + 2}
    config = LLAMA | {"add_bos_token": True, "eos_token": "<|im_end|>", "chat_template": CHATML}
    config["additional_special_tokens"] = ["<|im_start|>"]
    _sentencepiece(path, config, added_tokens__json=numbers)


@_kind
def chatml_slow_legacy(path: Path) -> None:
    """The files of transformers 4: only special_tokens_map.json lists the special tokens."""
    numbers = {"[PAD]": _size(), "<|im_end|>": _size() + 1, "<|im_start|>": _size() + 2}
    named: dict[str, Any] = {
        "eos_token": token("<|im_end|>", lstrip=True),
        "pad_token": "[PAD]",
        "bos_token": token("<s>"),
    }
    for each in (named["eos_token"], named["bos_token"]):
        del each["special"]
    named["additional_special_tokens"] = ["<|im_start|>", "<x>"]
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True, "eos_token": "</s>"}
    _sentencepiece(path, config, added_tokens__json=numbers, special_tokens_map__json=named)


@_kind
def chatml_decoder(path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>"]
    decoder = {str(i): token(each) for i, each in enumerate(tokens)}
    decoder[str(_size())] = token("<|im_start|>", special=False)
    decoder[str(_size() + 1)] = token("<|im_end|>", rstrip=True)
    config = LLAMA | {"add_bos_token": True, "eos_token": "<|im_end|>", "added_tokens_decoder": decoder}
    _sentencepiece(path, config, special_tokens_map__json={"eos_token": "</s>"}, added_tokens__json={"void": 9})


@_kind
def chatml_json(path: Path) -> None:
    chatml_decoder(path)
    (path / "tokenizer.model").unlink()
    config = json.loads((path / "tokenizer_config.json").read_text())
    samples.write_json(samples.model_bytes("tiny"), path, "metaspace")
    write(path, "tokenizer_config.json", config)
    _add(path, [token("<|im_start|>", special=False), token("<|im_end|>", rstrip=True)])


@_kind
def new_pad(path: Path) -> None:
    """Names a token that no file gives an id: it gets the one after the last."""
    _sentencepiece(path, LLAMA | {"add_bos_token": True, "pad_token": "[PAD]", "additional_special_tokens": ["<x>"]})


@_kind
def new_pad_json(path: Path) -> None:
    _sentencepiece(path, LLAMA | {"pad_token": "[PAD]", "extra_special_tokens": ["<x>"]}, "prepend")


@_kind
def tinyllama_chat(path: Path) -> None:
    config = LLAMA | {"legacy": False, "pad_token": "</s>", "padding_side": "right", "use_default_system_prompt": False}
    _sentencepiece(path, config, "prepend")


@_kind
def code_llama_slow(path: Path) -> None:
    config = LLAMA | {"tokenizer_class": "CodeLlamaTokenizer", "fill_token": "<FILL_ME>", "suffix_first": False}
    _sentencepiece(path, config)
    model = samples.with_pieces(samples.model_bytes("tiny"), samples.INFILLING, samples.NORMAL)
    (path / "tokenizer.model").write_bytes(model)


@_kind
def code_llama_json(path: Path) -> None:
    samples.write_json(
        samples.with_pieces(samples.model_bytes("tiny"), samples.INFILLING, samples.CONTROL), path, "prepend"
    )
    spec = json.loads((path / "tokenizer.json").read_text())
    write(path, "tokenizer.json", spec | {"post_processor": None})
    config = LLAMA | {"tokenizer_class": "CodeLlamaTokenizerFast", "add_bos_token": False}
    write(path, "tokenizer_config.json", config)


@_kind
def control_and_user_defined_pieces(path: Path) -> None:
    """SentencePiece models that hold their chat tokens themselves."""
    _sentencepiece(path, LLAMA | {"add_bos_token": True, "eos_token": "<|im_end|>", "pad_token": "<x>"})
    model = samples.with_pieces(samples.model_bytes("tiny"), ["<|im_start|>", "<x>"], samples.USER_DEFINED)
    model = samples.with_pieces(model, ["<|im_end|>", "<pad>"], samples.CONTROL)
    (path / "tokenizer.model").write_bytes(model)


@_kind
def unigram_json(path: Path) -> None:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("the", -3.0), ("▁the", -3.0)]
    pieces += [(letter, -9.0) for letter in "abcdefhijknorstuw<>|/_[]PAD"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    backend.save(str(path / "tokenizer.json"))
    write(path, "tokenizer_config.json", LLAMA | {"tokenizer_class": "PreTrainedTokenizerFast"})


@_kind
def every_flag(path: Path) -> None:
    decoder = {
        str(_size() + 0): token("<l>", lstrip=True),
        str(_size() + 1): token("<r>", rstrip=True, special=False),
        str(_size() + 2): token("cat", single_word=True, normalized=True, special=False),
        str(_size() + 3): token("catalogue", special=False),
        str(_size() + 4): token("<lr>", lstrip=True, rstrip=True, normalized=True),
    }
    _sentencepiece(path, LLAMA | {"add_bos_token": True, "added_tokens_decoder": decoder, "legacy": True})


def _byte_level(special: list[str], plain: list[str] = [], split: Any = None) -> Tokenizer:  # noqa: B006
    backend = Tokenizer(models.BPE(ignore_merges=split is not None))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if split else level
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    backend.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special])
    backend.add_tokens(plain)
    return backend


@_kind
def smollm2(path: Path) -> None:
    backend = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"], ["<think>"])
    backend.save(str(path / "tokenizer.json"))
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    config = named | {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<|im_end|>", "chat_template": CHATML}
    config["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    write(path, "tokenizer_config.json", config)


@_kind
def llama3(path: Path) -> None:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    special += [f"<|reserved_special_token_{n}|>" for n in range(253)]
    backend = _byte_level(special, split=pre_tokenizers.Split(Regex(LLAMA3), "isolated"))
    bos = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    template = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[bos])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    backend.save(str(path / "tokenizer.json"))
    decoder = {str(backend.token_to_id(each)): token(each) for each in special}
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    write(
        path,
        "tokenizer_config.json",
        named | {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder},
    )


@_kind
def llama3_called_llama(path: Path) -> None:
    llama3(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    write(path, "tokenizer_config.json", config | {"tokenizer_class": "LlamaTokenizerFast", "legacy": False})


@_kind
def roberta_like(path: Path) -> None:
    backend = _byte_level(["<s>", "</s>"])
    ids = [(each, backend.token_to_id(each)) for each in ("</s>", "<s>")]
    backend.post_processor = processors.RobertaProcessing(*ids)
    backend.save(str(path / "tokenizer.json"))
    write(
        path,
        "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
    )
