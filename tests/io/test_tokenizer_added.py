"""Added tokens: how they are found in a text and numbered, and which descriptions are refused."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from fastllama.errors import CheckpointError
from fastllama.io.detokenizer import IncrementalDetokenizer
from fastllama.io.tokenizer import load_tokenizer
from fastllama.io.tokenizer.added import AddedMatcher, AddedPiece, number
from tests.io import tokenizer_folders as folders
from tests.io import tokenizer_samples as samples

SIGNS = "ab<_ \n\t\u00a0\u0301é²\u200dⅧ\x1c"
CONTENT = st.text("ab<", min_size=1, max_size=3) | st.text("ab<_ é", min_size=1, max_size=3).filter(
    lambda text: text == text.strip()
)
PIECES = st.lists(st.tuples(CONTENT, *[st.booleans()] * 5), max_size=5, unique_by=lambda piece: piece[0])
KINDS = [True, 3, -1, 2.5, 10**30, [], ["a"], [[]], [None], {}, {"a": 1}, {"content": 3}, {"content": "\ud800"}]
KINDS += [{"content": "x", "special": "y"}, {"content": "x", "lstrip": 1}]


@settings(deadline=None, max_examples=400)
@given(described=PIECES, text=st.text("ab< ", max_size=20) | st.text(SIGNS, max_size=20))
def test_a_text_is_split_as_the_package_tokenizers_does(described, text):
    pieces = [AddedPiece(content, None, *flags) for content, *flags in described]
    backend = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    backend.add_tokens(
        [AddedToken(piece.content, **{flag: getattr(piece, flag) for flag in flags}) for piece in pieces]
    )
    numbered = number(pieces, {"?": 0})
    assert {i: piece.content for i, piece in numbered.items()} == {
        i: token.content for i, token in backend.get_added_tokens_decoder().items()
    }
    parts = list(AddedMatcher(numbered).split(text))
    encoded = backend.encode(text)
    assert [token_id or 0 for token_id, _, _ in parts] == encoded.ids
    assert [part for _, part, _ in parts] == [text[start:end] for start, end in encoded.offsets]
    assert [begins for _, _, begins in parts] == [start == 0 for start, _ in encoded.offsets]


def folder(path: Path, **files: Any) -> Path:
    """The bundled tokenizer.model with files beside it: `a__json` is a.json."""
    (path / "tokenizer.model").write_bytes(samples.model_bytes("tiny"))
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(json.dumps(content))
    return path


def test_ids_of_the_files_are_kept_across_a_gap(tmp_path, caplog):
    tokenizer = load_tokenizer(folder(tmp_path, added_tokens__json={"<a>": 2050, "<b>": 2060}))
    assert tokenizer.encode("<a><b>", bos=False) == [2050, 2060]
    assert tokenizer.vocab_size == 2061
    assert tokenizer.decode([2055, 2060]) == "<b>"  # 2055 is in the gap: no text
    assert IncrementalDetokenizer(tokenizer, []).push(2055) == ""
    with pytest.raises(ValueError, match="token id 2055 is not in "):
        tokenizer.id_to_piece(2055)
    assert not caplog.records


def test_an_id_that_another_piece_has_is_not_taken_and_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(folder(tmp_path, added_tokens__json={"<a>": 300}))
    assert tokenizer.encode("<a>", bos=False) == [2048]
    (record,) = caplog.records
    assert "added token '<a>' has the id 300 in the files" in record.getMessage()


def test_a_config_without_add_bos_token_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(folder(tmp_path, tokenizer_config__json={"tokenizer_class": "LlamaTokenizer"}))
    assert tokenizer.encode("a") == tokenizer.encode("a", bos=False)
    assert [record.getMessage()[-62:] for record in caplog.records] == [
        "r_config.json does not set add_bos_token: no BOS, as in transformers 5"[-62:]
    ]


@pytest.mark.parametrize(
    "name", ["llama2_json", "llama2_json_legacy", "metaspace_json", "chatml_json", "code_llama_json"]
)
def test_both_files_of_a_folder_give_the_same_ids(name, tmp_path, monkeypatch):
    config = json.loads((folders.folder(name) / "tokenizer_config.json").read_text())
    folder(tmp_path, tokenizer_config__json=config | {"add_bos_token": True})
    if name.startswith("code_llama"):
        model = samples.with_pieces(samples.model_bytes("tiny"), samples.INFILLING, samples.CONTROL)
        (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer.json").write_bytes((folders.folder(name) / "tokenizer.json").read_bytes())
    of_json, of_model = load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.model")
    assert type(of_json) is not type(of_model)
    for text in ["", "a fox", "  a", "<s>a</s> b", "<|im_start|>user\nhi <|im_end|>  \n x", "é<unk>😀 <PRE>", " "]:
        assert of_json.encode(text) == of_model.encode(text)
        assert of_json.encode_template(text) == of_model.encode_template(text)
        ids = of_json.encode_template(text)
        assert of_json.decode(ids, skip_special_tokens=False) == of_model.decode(ids, skip_special_tokens=False)
    assert of_json.special_ids == of_model.special_ids
    assert of_json.special_pieces() == of_model.special_pieces()


def test_merges_do_not_make_a_control_piece_of_plain_text(tmp_path):
    model = samples.with_pieces(samples.model_bytes("tiny"), ["s>", "/s>"], samples.NORMAL)
    tokenizer = samples.load(model, tmp_path, "metaspace")
    for text in ["<s>", "a</s>"]:
        assert not {1, 2} & set(tokenizer.encode(text, bos=False))
        assert {1, 2} & set(tokenizer.encode_template(text))


def test_special_pieces_are_what_steers_a_model(tmp_path):
    numbers = {"<|im_start|>": 2048, "<turn>": 2049, "wordy": 2050}
    tokenizer = load_tokenizer(folder(tmp_path, added_tokens__json=numbers))
    assert tokenizer.special_pieces() == {"<s>", "</s>", "<unk>", "<|im_start|>"}
    tokenizer = load_tokenizer(folder(tmp_path, tokenizer_config__json={"chat_template": "<turn>{{ messages }}"}))
    assert tokenizer.special_pieces() == {"<s>", "</s>", "<unk>", "<|im_start|>", "<turn>"}


class TestChatTemplate:
    def test_a_file_of_its_own_goes_before_the_configuration(self, tmp_path):
        folder(tmp_path, tokenizer_config__json={"chat_template": "configured"})
        assert load_tokenizer(tmp_path).chat_template == "configured"
        (tmp_path / "chat_templates").mkdir()
        (tmp_path / "chat_templates" / "default.jinja").write_text("one of several")
        assert load_tokenizer(tmp_path).chat_template == "one of several"
        (tmp_path / "chat_template.jinja").write_text("é alone\n")
        assert load_tokenizer(tmp_path).chat_template == "é alone\n"

    @pytest.mark.parametrize("several", [{"tool": "t", "default": "d"}, [{"name": "default", "template": "d"}]])
    def test_the_default_one_of_several(self, tmp_path, several):
        assert load_tokenizer(folder(tmp_path, tokenizer_config__json={"chat_template": several})).chat_template == "d"

    def test_several_without_a_default_are_reported(self, tmp_path, caplog):
        folder(tmp_path, tokenizer_config__json={"chat_template": {"tool": "t"}, "add_bos_token": True})
        assert load_tokenizer(tmp_path).chat_template is None
        assert "has the chat templates tool, none of them 'default'" in caplog.text

    def test_what_is_not_utf_8(self, tmp_path):
        (folder(tmp_path) / "chat_template.jinja").write_bytes(b"a\xff")
        with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8 text: byte 1 is 0xff$"):
            load_tokenizer(tmp_path)


def refusal(path: Path) -> list[str]:
    """The error where the tokenizer is refused; any other error fails the test."""
    try:
        load_tokenizer(path).encode_template("a <x> b")
    except CheckpointError as error:
        return [str(error)]
    return []


TOKENS = ["bos_token", "eos_token", "additional_special_tokens", "extra_special_tokens"]
DESCRIBED = [("tokenizer_config.json", key) for key in [*TOKENS, "added_tokens_decoder", "chat_template"]]
DESCRIBED += [("tokenizer_config.json", key) for key in ["add_bos_token", "add_eos_token", "legacy", "tokenizer_class"]]
DESCRIBED += [
    ("tokenizer_config.json", "add_prefix_space"),
    ("added_tokens.json", "<x>"),
    ("config.json", "tokenizer_class"),
]
DESCRIBED += [("special_tokens_map.json", key) for key in ["bos_token", "pad_token", "extra_special_tokens"]]


@pytest.mark.parametrize(("file", "key"), DESCRIBED)
def test_a_value_of_the_wrong_kind_names_file_and_key(tmp_path, file, key):
    folder(tmp_path)
    refusals = []
    for value in [*KINDS, "\ud800"]:
        (tmp_path / file).write_text(json.dumps({key: value}))
        refusals += refusal(tmp_path)
    assert len(refusals) >= 8
    for line in refusals:
        assert re.search(rf"{re.escape(file)}: {re.escape(key)}|{re.escape(file)} holds a lone", line), line


@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"]
)
@pytest.mark.parametrize("content", ["null", "[]", "3", '"a"', "{", "", "version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_no_object_is_named(tmp_path, file, content):
    (folder(tmp_path) / file).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(file)):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_of_wrong_kinds_is_refused_by_name(tmp_path):
    path = samples.write_json(samples.model_bytes("tiny"), tmp_path, "metaspace")
    spec = json.loads(path.read_text())
    refusals = []
    for key in spec:
        for value in [*KINDS, None, "text"]:
            path.write_text(json.dumps({**spec, key: value}))
            refusals += refusal(path)
    assert len(refusals) > 80
    assert all(line.startswith(str(path)) and "\n" not in line for line in refusals)


def test_a_post_processor_that_loses_the_text_is_refused(tmp_path):
    path = samples.write_json(samples.model_bytes("tiny"), tmp_path, "metaspace")
    spec = json.loads(path.read_text())
    spec["post_processor"]["single"] = spec["post_processor"]["single"][:1]
    path.write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: post_processor changes the text's own tokens"):
        load_tokenizer(path)
