"""Hugging Face's tokenizer.json, with the added tokens of the files beside it."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastllama.errors import CheckpointError, ExtraRequiredError, why_unusable
from fastllama.io.formats.json_files import read_json
from fastllama.io.tokenizer.added import AddedPiece
from fastllama.io.tokenizer.base import CONTROL_PIECES, INFILLING_PIECES, SPACE, Frame, Tokenizer, Vocabulary
from fastllama.io.tokenizer.sentencepiece_model import piece_bytes
from fastllama.io.tokenizer.settings import CONFIG, TokenizerSettings, read_settings

if TYPE_CHECKING:
    import tokenizers

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_LOG = logging.getLogger("fastllama")


class HFTokenizer(Tokenizer):
    """A tokenizer.json: SentencePiece's BPE converted (Llama 2) or byte-level BPE (Llama 3). Needs the extra [hf].

    The package tokenizers encodes, set up as by transformers 5 for the same folder: where tokenizer_config.json names
    LlamaTokenizer, its `legacy` and `add_prefix_space` set the leading space, else tokenizer.json does. A byte-level
    pre-tokenizer is always the file's own; transformers replaces it where the class is GPT2Tokenizer, and so loses the
    splitting of digits that SmolLM 2 was trained with.

    For a converted Llama 2 tokenizer the results equal SentencePieceTokenizer's. BOS, EOS and padding come from the
    files beside it, else from config.json.
    """

    def __init__(self, path: Path) -> None:
        """path: the tokenizer.json. CheckpointError if it or a settings file is broken or of another family."""
        spec = read_json(path)
        content = path.read_text(encoding="utf-8")
        self._template = _backend(path, content)
        if not isinstance(spec["model"], dict) or not all(
            isinstance(each, dict) for each in spec.get("added_tokens", ())
        ):
            raise CheckpointError(f"{path}: model and each of added_tokens must be an object")
        decoders = _decoders(self._template)
        kinds = [decoder["type"] for decoder in decoders]
        is_byte_level = "ByteLevel" in kinds
        if not is_byte_level and not {"Metaspace", "ByteFallback"} & {*kinds}:
            raise CheckpointError(
                f"{path} is not a Llama tokenizer: its decoder is {', '.join(kinds) or 'absent'}; "
                "legal: ByteFallback or Metaspace (Llama 2), ByteLevel (Llama 3)"
            )
        settings = read_settings(path.parent, spec=spec)
        known = [AddedPiece(piece.content) for piece in self._template.get_added_tokens_decoder().values()]
        given = settings.added(known)
        spaced = settings.is_llama and spec["model"].get("type", "BPE") == "BPE"
        _set_up(self._template, given, settings if spaced else None)
        _report_moved(path, self._template, spec, given)

        added = self._template.get_added_tokens_decoder()
        pieces = {i: piece for piece, i in self._template.get_vocab(with_added_tokens=True).items()}
        unknown = self._template.token_to_id(spec["model"].get("unk_token") or "<unk>")
        special = {i for i, token in added.items() if token.special} | ({unknown} if unknown is not None else set())
        self._control = frozenset() if is_byte_level else frozenset((*CONTROL_PIECES, *INFILLING_PIECES))
        self._spelled = re.compile("|".join(re.escape(each.lstrip(SPACE)) for each in self._control) or "(?!)")
        self._content = "" if is_byte_level else content  # for _plain
        self._given, self._spaced = given, settings if spaced else None
        alphabet = _byte_level_alphabet()
        # Decoding prints added tokens in normalized form, as the package does.
        shown = pieces | {i: self._template.id_to_token(i) or "" for i in added}
        text = {
            i: _byte_level_bytes(piece, alphabet) if is_byte_level else piece_bytes(piece) for i, piece in shown.items()
        }
        bos, eos, pad = (_named_id(path, name, settings, pieces) for name in ("bos", "eos", "pad"))
        if eos is None:
            raise CheckpointError(
                f"{path} holds no EOS piece: {CONFIG} (eos_token) and config.json (eos_token_id) beside it name none"
            )
        self._swallows_space = False
        super().__init__(
            path,
            Vocabulary(pieces, text, frozenset(special), frozenset(added)),
            bos,
            eos,
            pad,
            frame=_frame(path, self._template, settings, bos),
            adds_leading_space=_strips_space(decoders) and (not spaced or settings.add_prefix_space is not False),
            settings=settings,
        )
        # The Metaspace layout adds no space to text that begins with one; SentencePiece always does.
        self._swallows_space = self.adds_leading_space and self._encode_raw(" a") == self._encode_raw("a")

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A second tokenizer without the control pieces: made for the first text that contains one."""
        backend = _backend(self.path, json.dumps(_without(json.loads(self._content), self._control)))
        _set_up(backend, [each for each in self._given if each.content not in self._control], self._spaced)
        return backend

    def _normalize(self, text: str) -> str:
        normalizer = self._template.normalizer
        normalized: str = text if normalizer is None else normalizer.normalize_str(text)
        return normalized

    def _encode_raw(self, text: str, *, template: bool = False) -> list[int]:
        if self._swallows_space and not template and text.startswith((" ", SPACE)):
            text = " " + text
        backend = self._template if template or not self._spelled.search(text) else self._plain
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids


def _backend(path: Path, content: str) -> tokenizers.Tokenizer:
    if why_unusable("tokenizers"):
        raise ExtraRequiredError(f"reading {path.name}", "tokenizers", "hf")
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the package raises bare Exception
        place = re.search(r"line \d+ column \d+", str(error))
        where = f" ({place[0]})" if place else ""
        raise CheckpointError(
            f"{path} is not a tokenizer.json that tokenizers can read{where}: it is broken, or newer than the package "
            f"({tokenizers.__version__})"
        ) from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _set_up(backend: tokenizers.Tokenizer, given: Collection[AddedPiece], settings: TokenizerSettings | None) -> None:
    """Add the settings files' added tokens to a backend; with `settings` also transformers' leading space."""
    from tokenizers import AddedToken, pre_tokenizers

    if settings is not None:
        after_added = "always" if settings.legacy else "first"
        scheme = "never" if settings.add_prefix_space is False else after_added
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    backend.add_tokens([AddedToken(each.content, **{flag: getattr(each, flag) for flag in _FLAGS}) for each in given])


def _without(spec: Mapping[str, Any], hidden: Collection[str]) -> dict[str, Any]:
    """The content of a tokenizer.json without the hidden pieces, as added tokens and as results of merges."""
    model = dict(spec["model"])
    if "merges" in model:
        joined = [merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in model["merges"]]
        model["merges"] = [merge for merge, whole in zip(model["merges"], joined, strict=True) if whole not in hidden]
    return {
        **spec,
        "model": model,
        "added_tokens": [each for each in spec.get("added_tokens", ()) if each["content"] not in hidden],
    }


def _report_moved(
    path: Path, backend: tokenizers.Tokenizer, spec: Mapping[str, Any], given: Collection[AddedPiece]
) -> None:
    declared = {each["content"]: each["id"] for each in spec.get("added_tokens", ())}
    declared |= {piece.content: piece.token_id for piece in given if piece.token_id is not None}
    for content, token_id in declared.items():
        found = backend.token_to_id(content)
        if found != token_id:
            message = "%s: added token %r has the id %d in the files, and %d here, as in transformers"
            _LOG.warning(message, path, content, token_id, found)


def _named_id(path: Path, name: str, settings: TokenizerSettings, pieces: Mapping[int, str]) -> int | None:
    """Id of the BOS, EOS or padding token in the files; the first of several EOS ids."""
    token = settings.special_tokens.get(f"{name}_token")
    if token is not None:
        return next(i for i, piece in pieces.items() if piece == token)
    if f"{name}_token" in settings.removed and name != "eos":
        return None
    config, key = path.with_name("config.json"), f"{name}_token_id"
    value = read_json(config).get(key) if config.is_file() else None
    token_id = next(iter(value), None) if isinstance(value, list) else value
    if token_id is None or (name != "eos" and token_id == -1):
        return None
    if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id not in pieces:
        raise CheckpointError(f"{config}: {key} is {value!r}; legal: an id of {path.name}, 0 to {max(pieces)}")
    return token_id


def _frame(path: Path, backend: tokenizers.Tokenizer, settings: TokenizerSettings, bos: int | None) -> Frame:
    """The ids that the post-processor adds to a text; as in transformers 5, it overrides add_bos_token."""
    if settings.tokenizer_class == "CodeLlamaTokenizer":
        return Frame((bos,) if bos is not None else ())
    inner = backend.encode("a", add_special_tokens=False).ids
    outer = backend.encode("a").ids
    start = next((i for i in range(len(outer)) if outer[i : i + len(inner)] == inner), None)
    if start is None or not inner:
        raise CheckpointError(
            f"{path}: post_processor changes the text's own tokens; legal: to add tokens before and after"
        )
    return Frame(outer[:start], outer[start + len(inner) :])


def _strips_space(decoders: Collection[Mapping[str, Any]]) -> bool:
    """Whether decoding drops the leading space that encoding added."""
    return any(
        (each["type"] == "Strip" and each["content"] == " " and each["start"] > 0)
        or (
            each["type"] == "Metaspace"
            and each.get("add_prefix_space") is not False
            and each.get("prepend_scheme") != "never"
        )
        for each in decoders
    )


def _byte_level_bytes(piece: str, alphabet: Mapping[str, bytes]) -> bytes:
    """The bytes of a piece of byte-level BPE; an added token with other characters stands for itself."""
    try:
        return b"".join(alphabet[sign] for sign in piece)
    except KeyError:
        return piece.encode()


def _byte_level_alphabet() -> dict[str, bytes]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2): itself, else U+0100 and upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {chr(byte): bytes([byte]) for byte in printable}
    return shown | {chr(0x100 + n): bytes([byte]) for n, byte in enumerate(others)}


def _decoders(backend: tokenizers.Tokenizer) -> list[Mapping[str, Any]]:
    """The decoders of tokenizer.json, sequences flattened."""
    waiting = [json.loads(backend.decoder.__getstate__())] if backend.decoder else []
    found = []
    while waiting:
        decoder = waiting.pop(0)
        waiting = decoder.get("decoders", []) + waiting
        found.append(decoder)
    return [decoder for decoder in found if decoder["type"] != "Sequence"]
