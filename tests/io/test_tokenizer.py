"""Tokenizers against SentencePiece itself, tokenizer.json against tokenizer.model, and files that are neither."""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from fastllama.errors import CheckpointError, ExtraRequiredError
from fastllama.io.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from tests.io import tokenizer_samples as samples

SENTENCEPIECE = ["tiny", "llama2"]
HUGGING_FACE = [f"{name}-{layout}" for name in SENTENCEPIECE for layout in samples.LAYOUTS]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")) | st.text("a <s>/[INST]\n\t 😀é\x00")
IDS = st.lists(st.integers(0, 10**9) | st.integers(3, 258), max_size=12)  # 3 to 258: Llama's byte pieces
fewer = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module", params=SENTENCEPIECE)
def model(request) -> SentencePieceTokenizer:
    return samples.tokenizer(request.param)


@pytest.fixture(scope="module", params=SENTENCEPIECE + HUGGING_FACE)
def any_tokenizer(request) -> Tokenizer:
    return samples.tokenizer(request.param)


@pytest.fixture(scope="module", params=HUGGING_FACE)
def pair(request) -> tuple[Tokenizer, Tokenizer]:
    """The SentencePiece tokenizer and its conversion."""
    return samples.tokenizer(request.param.partition("-")[0]), samples.tokenizer(request.param)


@functools.cache
def reference(tokenizer: Tokenizer) -> SentencePieceProcessor:
    name = next(name for name in SENTENCEPIECE if samples.tokenizer(name) is tokenizer)
    return SentencePieceProcessor(model_file=str(samples.MODELS[name]))


def in_vocabulary(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token_id % tokenizer.vocab_size for token_id in ids]


@fewer
@given(text=TEXT)
def test_encode_is_sentencepiece_after_bos(model, text):
    ids = reference(model).encode(text)
    assert model.encode(text) == [1, *ids]
    assert model.encode(text, bos=False) == ids


def test_ids_of_llama2():
    llama2 = samples.tokenizer("llama2")
    assert (llama2.vocab_size, llama2.bos_token_id, llama2.eos_token_id, llama2.pad_token_id) == (32000, 1, 2, None)
    assert llama2.encode("Hello this is a test") == [1, 15043, 445, 338, 263, 1243]  # as transformers documents them
    assert llama2.encode("") == [1]
    assert llama2.id_to_piece(15043) == "▁Hello"


@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "<s>Hi</s>", " <s> ", "a</s>b", "<0x41>", "<pad>", "▁</s>"])
def test_special_looking_text_is_plain_text(any_tokenizer, text):
    ids = any_tokenizer.encode(text, bos=False)
    assert not any_tokenizer.special_ids & set(ids)
    assert any_tokenizer.decode(ids) == text.replace("▁", " ")


@fewer
@given(text=TEXT)
def test_decode_inverts_encode(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert any_tokenizer.decode(ids, skip_special_tokens=False).startswith("<s>")


@fewer
@given(ids=IDS)
def test_encoding_what_was_decoded_is_stable(any_tokenizer, ids):
    text = any_tokenizer.decode(in_vocabulary(any_tokenizer, ids))
    again = any_tokenizer.encode(text)
    assert any_tokenizer.decode(again) == text.replace("▁", " ")  # bytes E2 96 81 spell U+2581
    assert any_tokenizer.encode(any_tokenizer.decode(again)) == again


@fewer
@given(ids=IDS)
def test_decode_is_sentencepiece_up_to_how_often_an_invalid_sequence_is_marked(model, ids):
    ids = [i for i in in_vocabulary(model, ids) if i not in model.special_ids]
    while ids and model.id_to_piece(ids[0]) == "<0x20>":
        del ids[0]  # the leading space that we drop and SentencePiece keeps: it never adds this one
    once = re.compile("\ufffd+")  # SentencePiece writes one for every byte
    assert once.sub("\ufffd", model.decode(ids)) == once.sub("\ufffd", reference(model).decode(ids))


def test_special_ids_are_hidden_or_shown(any_tokenizer):
    ids = [*any_tokenizer.encode("a b"), any_tokenizer.eos_token_id, 0]
    assert any_tokenizer.decode(ids) == "a b"
    assert any_tokenizer.decode(ids, skip_special_tokens=False) == "<s> a b</s><unk>"


@fewer
@given(text=TEXT, ids=IDS, skip=st.booleans())
def test_tokenizer_json_equals_tokenizer_model(pair, text, ids, skip):
    model, converted = pair
    assert converted.encode(text) == model.encode(text)
    ids = in_vocabulary(model, ids)
    assert converted.decode(ids, skip_special_tokens=skip) == model.decode(ids, skip_special_tokens=skip)


def test_tokenizer_json_has_the_same_vocabulary(pair):
    model, converted = pair
    ids = range(model.vocab_size)
    assert [converted.id_to_piece(i) for i in ids] == [model.id_to_piece(i) for i in ids]
    assert (converted.vocab_size, converted.special_ids) == (model.vocab_size, model.special_ids)
    assert (converted.bos_token_id, converted.eos_token_id) == (model.bos_token_id, model.eos_token_id)


@pytest.mark.parametrize(("text", "kind"), [(b"bytes", "bytes"), (None, "NoneType"), (["a"], "list")])
def test_encode_refuses_what_is_not_text(any_tokenizer, text, kind):
    with pytest.raises(TypeError, match=rf"^text must be str, got {kind}$"):
        any_tokenizer.encode(text)


def test_encode_refuses_a_lone_surrogate(any_tokenizer):
    with pytest.raises(ValueError, match=r"^text is not valid Unicode: lone surrogate U\+D800 at index 3$"):
        any_tokenizer.encode("abc\ud800d")


@pytest.mark.parametrize("offset", [-1, None])
def test_ids_out_of_range_are_refused(any_tokenizer, offset):
    token_id = any_tokenizer.vocab_size if offset is None else offset
    for call in (lambda: any_tokenizer.decode([5, token_id]), lambda: any_tokenizer.id_to_piece(token_id)):
        last = any_tokenizer.vocab_size - 1
        with pytest.raises(ValueError, match=rf"^token id {token_id} is not in .*legal: 0 to {last}$"):
            call()


class TestInfilling:
    @pytest.fixture(scope="class", params=[samples.NORMAL, samples.CONTROL, samples.USER_DEFINED])
    @classmethod
    def model(cls, request) -> bytes:
        """The bundled tokenizer with Code Llama's four pieces, of every type that could hold them."""
        return samples.with_pieces(samples.model_bytes("tiny"), samples.INFILLING, request.param)

    @pytest.fixture(scope="class")
    @classmethod
    def code_llama(cls, model, tmp_path_factory) -> SentencePieceTokenizer:
        return samples.load(model, tmp_path_factory.mktemp("code"))

    def test_published_ids_of_code_llama(self, tmp_path):
        """Code Llama's vocabulary is Llama 2's and 16 more; the ids are those of ggml-org/llama.cpp issue 3503."""
        pieces = [*(f"<filler{n}>" for n in range(7)), *samples.INFILLING]
        code_llama = samples.load(samples.with_pieces(samples.model_bytes("llama2"), pieces, samples.CONTROL), tmp_path)
        assert code_llama.infilling == (32007, 32008, 32009, 32010)
        prefix, suffix = 'def remove_non_ascii(s: str) -> str:\n    """ ', "\n    return result\n"
        before = [822, 3349, 29918, 5464, 29918, 294, 18869, 29898, 29879, 29901, 851, 29897, 1599, 851, 29901, 13]
        before += [1678, 9995, 29871]
        after = [13, 1678, 736, 1121, 13]
        assert code_llama.encode_infilling(prefix, suffix) == [1, 32007, *before, 32008, *after, 32009]

    @given(prefix=TEXT, suffix=TEXT)
    @fewer
    def test_parts_are_the_two_texts(self, code_llama, prefix, suffix):
        ids = code_llama.encode_infilling(prefix, suffix)
        assert ids[:2] == [1, code_llama.infilling.prefix]
        assert ids[-1] == code_llama.infilling.middle
        middle = ids.index(code_llama.infilling.suffix)
        assert code_llama.decode(ids[2:middle]) == prefix
        assert code_llama.decode([*code_llama.encode("x"), *ids[middle + 1 :]]) == f"x{suffix}"  # no space between

    @pytest.mark.parametrize("text", ["<PRE>", " <PRE>", "<SUF> <MID>", "a <EOT>b", "a▁<EOT> <PRE", "<PRE>x</PRE>"])
    def test_pieces_in_text_are_plain_text(self, code_llama, text):
        ids = code_llama.encode(text, bos=False)
        assert not code_llama.special_ids & set(ids)
        assert code_llama.decode(ids) == text.replace("▁", " ")
        assert not set(code_llama.infilling) & set(code_llama.encode_infilling(text, text)[2:-1]) - {
            code_llama.infilling.suffix
        }

    def test_pieces_are_special_in_a_tokenizer_json_too(self, model, code_llama, tmp_path):
        converted = samples.load(model, tmp_path, "prepend")
        assert converted.infilling == code_llama.infilling
        assert converted.encode_infilling("def f(", "\n return") == code_llama.encode_infilling("def f(", "\n return")
        assert not converted.special_ids & set(converted.encode(" <PRE>", bos=False))

    def test_other_vocabularies_refuse(self, any_tokenizer):
        with pytest.raises(ValueError, match=r"cannot infill: its vocabulary lacks .*▁<PRE>, ▁<SUF>, ▁<MID>, ▁<EOT>$"):
            any_tokenizer.encode_infilling("a", "b")


class TestByteLevel:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory) -> Path:
        """A byte-level tokenizer.json as Llama 3's, trained on a line."""
        from tokenizers import ByteLevelBPETokenizer

        backend = ByteLevelBPETokenizer()
        backend.train_from_iterator(["the cat saw the théâtre 😀"], vocab_size=280, show_progress=False)
        backend.add_special_tokens(["<|begin▁of text|>", "<|eot_id|>"])
        backend.add_tokens(["<|Ġtool|>"])
        folder = tmp_path_factory.mktemp("bytes")
        backend.save(str(folder / "tokenizer.json"))
        named = {"bos_token": {"content": "<|begin▁of text|>"}, "eos_token": "<|eot_id|>", "pad_token": None}
        (folder / "tokenizer_config.json").write_text(json.dumps(named))
        return folder

    @given(text=st.text(st.characters(exclude_categories=["Cs"])))
    @fewer
    def test_decode_inverts_encode(self, folder, text):
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode(text, bos=True)
        assert ids == [tokenizer.bos_token_id, *tokenizer.encode(text)]  # no post-processor: no BOS by itself
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(f"{text}<|eot_id|>", bos=False)[-1] == tokenizer.eos_token_id

    def test_special_pieces_are_shown_as_they_are(self, folder):
        tokenizer = load_tokenizer(folder)
        ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<|begin▁of text|><|eot_id|>"
        assert tokenizer.decode(ids) == ""

    def test_an_added_piece_that_is_not_special_is_text(self, folder):
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode("the<|Ġtool|>", bos=False)
        assert ids[-1] == tokenizer.vocab_size - 1
        assert tokenizer.decode(ids) == "the<| tool|>"  # as in transformers: Ġ is a space wherever it stands


class TestFiles:
    def test_a_folder_prefers_tokenizer_json_if_it_can_be_read(self, tmp_path, monkeypatch):
        (tmp_path / "tokenizer.model").write_bytes(samples.model_bytes("tiny"))
        assert isinstance(load_tokenizer(str(tmp_path)), SentencePieceTokenizer)
        samples.write_json(samples.model_bytes("tiny"), tmp_path, "prepend")
        assert isinstance(load_tokenizer(tmp_path), HFTokenizer)
        assert isinstance(load_tokenizer(tmp_path / "tokenizer.model"), SentencePieceTokenizer)
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        assert load_tokenizer(tmp_path).path == tmp_path / "tokenizer.model"

    @pytest.mark.parametrize("wrong", [3, None, b"tokenizer.model", ["a"]])
    def test_what_is_no_path(self, wrong):
        with pytest.raises(TypeError, match=f"^tokenizer must be a path, got {type(wrong).__name__}$"):
            load_tokenizer(wrong)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"^no tokenizer in .*; legal: tokenizer.model or tokenizer.json$"):
            load_tokenizer(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"^no tokenizer at .*none\.model; legal: "):
            load_tokenizer(tmp_path / "none.model")

    @pytest.mark.parametrize(
        ("name", "data", "message"),
        [
            ("tokenizer.model", b"", "is empty"),
            ("tokenizer.model", b"IQ== 0\nIg== 1\n" * 100, "use its tokenizer.json"),  # Llama 3's tiktoken
            ("tokenizer.model", samples.model_bytes("tiny")[:-100], "is broken or not a SentencePiece"),
            ("tokenizer.bin", b"\x1b\x00\x00\x00\x00\x00\x00\x00", "is broken or not a SentencePiece"),
            ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run `git lfs pull`"),
            ("tokenizer.model", b"<!DOCTYPE html><html>", "is a web page"),
            ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run `git lfs pull`"),
            ("tokenizer.json", b"null", "holds null"),
            ("tokenizer.json", b"{", "is not valid JSON"),
            ("tokenizer.json", b"\xff\xfe", "UTF-16"),
            ("tokenizer.json", b"[]", "holds a list"),
            ("tokenizer.json", b'{"model": {}}', "is not a tokenizer.json that tokenizers can read"),
        ],
    )
    def test_broken_or_foreign(self, tmp_path, capfd, name, data, message):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
            load_tokenizer(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert capfd.readouterr() == ("", "")

    @pytest.fixture
    def converted(self, tmp_path) -> Path:
        path = samples.write_json(samples.model_bytes("tiny"), tmp_path, "prepend")
        path.with_name("tokenizer_config.json").unlink()
        return path

    def test_a_foreign_tokenizer_json_names_its_decoder(self, converted):
        spec = json.loads(converted.read_text())
        for decoder, seen in ((None, "absent"), ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece")):
            spec["decoder"] = decoder
            converted.write_text(json.dumps(spec))
            with pytest.raises(CheckpointError, match=f"its decoder is {seen}; legal: "):
                load_tokenizer(converted)

    def test_bos_and_eos_from_config_json(self, converted):
        config = converted.with_name("config.json")
        config.write_text(json.dumps({"bos_token_id": 5, "eos_token_id": [7, 8], "pad_token_id": 9}))
        tokenizer = load_tokenizer(converted)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (5, 7, 9)

    @pytest.mark.parametrize("config", [{}, {"bos_token_id": None}, {"bos_token_id": -1}, {"bos_token_id": []}])
    def test_a_tokenizer_may_have_no_bos(self, converted, config):
        converted.with_name("config.json").write_text(json.dumps({"eos_token_id": 2, **config}))
        tokenizer = load_tokenizer(converted)
        assert tokenizer.bos_token_id is None
        with pytest.raises(
            ValueError, match=r"^BOS is requested, but .*tokenizer.json and the files beside it specify none"
        ):
            tokenizer.encode("a", bos=True)

    def test_a_model_may_have_no_bos(self, tmp_path):
        tokenizer = samples.load(samples.without_bos(samples.model_bytes("tiny")), tmp_path)
        assert tokenizer.bos_token_id is None
        assert tokenizer.encode("a") == samples.tokenizer("tiny").encode("a", bos=False)

    @pytest.mark.parametrize("value", [-1, 2048, 10**9, "2", 2.5, True, {}, [[]]])
    def test_an_eos_that_is_no_piece_names_file_and_key(self, converted, value):
        converted.with_name("config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(
            CheckpointError, match=r"config\.json: eos_token_id is .*; legal: an id of tokenizer\.json, 0 to 2047$"
        ):
            load_tokenizer(converted)
        converted.with_name("config.json").unlink()
        with pytest.raises(CheckpointError, match=r"holds no EOS piece: tokenizer_config\.json .* name none$"):
            load_tokenizer(converted)

    def test_tokenizer_json_needs_the_extra(self, converted, monkeypatch):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ExtraRequiredError, match=re.escape("pip install 'fastllama[hf]'")):
            load_tokenizer(converted)
