"""A vocabulary's settings files: added tokens, the names of special tokens, BOS and EOS rules, the chat template."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastllama.errors import CheckpointError
from fastllama.io.formats.json_files import json_kind, read_json
from fastllama.io.tokenizer.added import AddedPiece

CONFIG, OVERRIDES, NUMBERS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT2 = dict.fromkeys(_LLAMA, "<|endoftext|>")
# transformers' fifth of Code Llama, <FILL_ME>, is no token of the model: Tokenizer.encode_infilling takes two texts.
_INFILLING = {"prefix_token": "▁<PRE>", "middle_token": "▁<MID>", "suffix_token": "▁<SUF>", "eot_token": "▁<EOT>"}
_NAMED_BY_CLASS = {"LlamaTokenizer": _LLAMA, "CodeLlamaTokenizer": _LLAMA | _INFILLING, "GPT2Tokenizer": _GPT2}
_LOG = logging.getLogger("fastllama")
_T = TypeVar("_T", str, bool)


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings in the files beside a vocabulary, by the precedence of transformers 5.23.

    added_tokens_decoder in tokenizer_config.json overrides special_tokens_map.json and added_tokens.json; without it,
    the former overrides tokenizer_config.json and the latter specifies the ids of added tokens.

    Attributes:
        is_given: whether tokenizer_config.json exists.
        tokenizer_class: the class name without "Fast".
        special_tokens: transformers' special_tokens_map, such as {"bos_token": "<s>"}.
        removed: names that the files set to null.
        numbered: added tokens with ids in the files, ordered by id.
        named: special and extra tokens, appended to the vocabulary where they have no id.
        lists_extra: whether extra tokens are listed: then only named control pieces of tokenizer.model are special.
        chat_template: jinja source; of several templates the one named "default".
        add_bos, add_eos: whether BOS is added before a text and EOS after it, None where not specified.
        legacy: whether text after an added token gets the leading space too.
        add_prefix_space: whether text gets a leading space, None where not specified.
    """

    is_given: bool = False
    tokenizer_class: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    numbered: tuple[AddedPiece, ...] = ()
    named: tuple[AddedPiece, ...] = ()
    lists_extra: bool = False
    chat_template: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    legacy: bool = False
    add_prefix_space: bool | None = None

    @property
    def is_llama(self) -> bool:
        """Whether transformers 5 lets these settings override the leading space of tokenizer.json."""
        return self.tokenizer_class in ("LlamaTokenizer", "CodeLlamaTokenizer")

    def added(self, known: Iterable[AddedPiece] = ()) -> list[AddedPiece]:
        """The pieces to add to a vocabulary, in order; known: those that its own file declares."""
        pieces = list(self.numbered)
        seen = {piece.content for piece in (*pieces, *known)}
        for piece in self.named:
            if piece.content not in seen:
                seen.add(piece.content)
                pieces.append(piece)
        special = set(self.special_tokens.values())
        return [piece._replace(special=piece.special or piece.content in special) for piece in pieces]


def read_settings(folder: Path, *, spec: Mapping[str, Any] | None = None) -> TokenizerSettings:
    """The settings in `folder`, for its tokenizer.model or for the tokenizer.json whose content is `spec`.

    CheckpointError, with file and key, for a value of the wrong type.
    """
    config = _File(folder / CONFIG)
    decides = "added_tokens_decoder" in config.content
    overrides = _File(folder / OVERRIDES, ignored=decides)
    kind = config.get("tokenizer_class", str) or _File(folder / "config.json").get("tokenizer_class", str)
    kind = kind.removesuffix("Fast") if kind else None
    if (
        spec is not None
        and "ByteLevel" in f"{spec.get('pre_tokenizer')} {spec.get('decoder')}"
        and kind == "LlamaTokenizer"
    ):
        kind = None  # Llama 3's tokenizer, declared with the wrong class

    read: dict[str, AddedPiece | None] = {}
    for file in (config, overrides):
        for key, value in file.content.items():
            is_own = key.endswith("_token") and not key.startswith(("add_", "fill_")) and isinstance(value, str)
            if key in NAMES or is_own:
                read[key] = file.token(key)
    removed = frozenset(key for key, piece in read.items() if piece is None)
    found = {key: piece for key, piece in read.items() if piece and piece.content}
    defaults = {
        key: AddedPiece(text) for key, text in _NAMED_BY_CLASS.get(kind or "", {}).items() if key not in removed
    }
    found = defaults | found
    names = [*(name for name in NAMES if name in found), *(name for name in found if name not in NAMES)]

    extra = config.tokens("extra_special_tokens") or config.tokens("additional_special_tokens")
    extra += overrides.tokens("extra_special_tokens")
    special = {piece.content for piece in (*found.values(), *extra)}
    if spec is not None and not extra:  # beside a tokenizer.model, transformers 5 ignores these
        extra = overrides.tokens("additional_special_tokens")
    numbered = config.numbered_by_id() if decides else _File(folder / NUMBERS).numbered_by_text(special)
    if spec is not None and not decides:
        numbered += [
            added_piece(f"{folder / 'tokenizer.json'}: added_tokens", each) for each in spec.get("added_tokens", ())
        ]
    return TokenizerSettings(
        is_given=config.path.is_file(),
        tokenizer_class=kind,
        special_tokens={name: found[name].content for name in names},
        removed=removed,
        numbered=tuple(sorted((piece for piece in numbered if piece.content), key=lambda piece: piece.token_id or 0)),
        named=(*(found[name] for name in names), *(piece for piece in extra if piece.content)),
        lists_extra=bool(extra),
        chat_template=_chat_template(folder, config),
        add_bos=config.get("add_bos_token", bool),
        add_eos=config.get("add_eos_token", bool),
        legacy=bool(config.get("legacy", bool)) and kind != "CodeLlamaTokenizer",
        add_prefix_space=config.get("add_prefix_space", bool),
    )


def added_piece(where: str, value: Any) -> AddedPiece:
    """The added token that a JSON value describes: its text, or an object with `content` and flags."""
    described = {"content": value} if isinstance(value, str) else value
    if not isinstance(described, dict) or not isinstance(described.get("content"), str):
        raise CheckpointError(f"{where} is {json_kind(value)}; legal: a token's text, or an object with its content")
    content = _valid(where, described["content"])
    flags = {key: described.get(key) for key in ("lstrip", "rstrip", "single_word", "normalized", "special")}
    for key, flag in flags.items():
        if flag is not None and not isinstance(flag, bool):
            raise CheckpointError(f"{where} has {key} {flag!r}; legal: true or false")
    special = True if flags["special"] is None else flags["special"]
    normalized = not special if flags["normalized"] is None else flags["normalized"]
    return AddedPiece(
        content,
        described.get("id"),
        bool(flags["lstrip"]),
        bool(flags["rstrip"]),
        bool(flags["single_word"]),
        normalized,
        special,
    )


class _File:
    """A JSON file that may be missing; values of the wrong type raise with file and key."""

    def __init__(self, path: Path, *, ignored: bool = False) -> None:
        self.path = path
        self.content = read_json(path) if path.is_file() and not ignored else {}

    def get(self, key: str, kind: type[_T]) -> _T | None:
        value = self.content.get(key)
        if value is not None and not isinstance(value, kind):
            raise self._wrong(key, value, "text" if kind is str else "true or false")
        return value

    def token(self, key: str) -> AddedPiece | None:
        value = self.content[key]
        return None if value is None else added_piece(f"{self.path}: {key}", value)._replace(special=True)

    def tokens(self, key: str) -> list[AddedPiece]:
        value = self.content.get(key)
        if value is not None and not isinstance(value, list | dict):
            raise self._wrong(key, value, "a list of tokens")
        return [
            added_piece(f"{self.path}: {key}", each)
            for each in (value.values() if isinstance(value, dict) else value or ())
        ]

    def numbered_by_id(self) -> list[AddedPiece]:
        """The added tokens of added_tokens_decoder, which has one for each id."""
        value = self.content["added_tokens_decoder"]
        if not isinstance(value, dict):
            raise self._wrong("added_tokens_decoder", value, "an object of ids and tokens")
        pieces = []
        for key, each in value.items():
            where = f"{self.path}: added_tokens_decoder[{key!r}]"
            if not (key.isascii() and key.isdigit()):
                raise CheckpointError(f"{where} is not a token id; legal: the decimal digits of one")
            if not isinstance(each, dict):
                raise CheckpointError(f"{where} is {json_kind(each)}; legal: an object with the token's content")
            described = {"special": False} | each
            pieces.append(added_piece(where, described)._replace(token_id=int(key)))
        return pieces

    def numbered_by_text(self, special: Collection[str]) -> list[AddedPiece]:
        """The added tokens of added_tokens.json, which has an id for each; special where another file declares it."""
        pieces = []
        for text, token_id in self.content.items():
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise self._wrong(text, token_id, "a token id")
            _valid(str(self.path), text)
            pieces.append(AddedPiece(text, token_id, normalized=text not in special, special=text in special))
        return pieces

    def _wrong(self, key: str, value: Any, legal: str) -> CheckpointError:
        seen = repr(value) if isinstance(value, str | int | float) else json_kind(value)
        return CheckpointError(f"{self.path}: {key} is {seen}; legal: {legal}")


def _chat_template(folder: Path, config: _File) -> str | None:
    """The template in a file of its own, else in tokenizer_config.json; the default one of several."""
    files = {path.stem: path for path in sorted((folder / "chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        templates = {name: _text(path) for name, path in files.items()}
    else:
        value = config.content.get("chat_template")
        if value is None or isinstance(value, str):
            return value if value is None else _valid(f"{config.path}: chat_template", value)
        where = f"{config.path}: chat_template"
        if isinstance(value, list) and all(isinstance(each, dict) for each in value):
            value = {str(each.get("name")): each.get("template") for each in value}
        if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
            raise CheckpointError(f"{where} is {json_kind(value)}; legal: a template's text, or several with names")
        templates = {name: _valid(where, text) for name, text in value.items()}
    if templates and "default" not in templates:
        _LOG.warning("%s has the chat templates %s, none of them 'default': none is used", folder, ", ".join(templates))
    return templates.get("default")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None


def _valid(where: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where} holds a lone surrogate, U+{ord(text[error.start]):04X}") from None
    return text
