"""The story grammar, the training loop on a toy model, and the packaged model folder."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tools.tiny_model.card import Measured, draw_curve, write_card, write_training
from tools.tiny_model.chat import CHAT_SHARE, document, turn
from tools.tiny_model.config import TUNING, TinyConfig
from tools.tiny_model.evaluate import (
    CALIBRATION_SEED,
    HELD_OUT_SEED,
    Answers,
    Figures,
    calibration_text,
    held_out_texts,
)
from tools.tiny_model.export import CHAT_TEMPLATE, model_config, replace_folder
from tools.tiny_model.muon import Muon, orthogonalized
from tools.tiny_model.plots import HELD_OUT, TRAINED
from tools.tiny_model.stories import MAX_WORDS, MIN_WORDS, held_out_story, story
from tools.tiny_model.tell import article, listed
from tools.tiny_model.tokenizer import document_ids, encode, load_tokenizer, train_tokenizer
from tools.tiny_model.train import Packer, build_model, rate_share, train

TINY = Path(__file__).parents[2] / "fastllama" / "assets" / "tiny"
TOY = TinyConfig(
    vocab_size=512,
    tokenizer_documents=60,
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=64,
    num_hidden_layers=1,
    max_position_embeddings=64,
    steps=70,
    batch_tokens=128,
    row_lengths=(32, 64),
    matrix_rate=2e-2,
    embedding_rate=2e-2,
    warmup_steps=4,
    threads=1,
    log_steps=10,
    checkpoint_steps=40,
)
MARKS = re.compile(r"[{}<>_]|\bNone\b|  |\.\.|[,.?!]\.|[?!],|\s[,.?!]|\b[aA] [aeiou]|\b[aA]n [^aeiou\W]|\b(\w+) \1\b")


@pytest.fixture(scope="module")
def stories() -> list:
    return [story(seed) for seed in range(500)]


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, ...]]:
    return [document(seed) for seed in range(1500)]


@pytest.fixture(scope="module")
def toy_tokenizer():
    return load_tokenizer(train_tokenizer(TOY.tokenizer_documents, TOY.vocab_size))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer((TINY / "tokenizer.model").read_bytes())


def test_a_seed_names_one_story_and_one_document(stories, documents):
    assert [story(seed) for seed in range(20)] == stories[:20]
    assert [document(seed) for seed in range(20)] == documents[:20]


def test_no_two_stories_are_alike(stories):
    assert len({told.text for told in stories}) == len(stories)


def test_every_trained_plot_occurs_equally_often(stories):
    counts = Counter(told.plot for told in stories)
    assert set(counts) == {plot.__name__ for plot in TRAINED}
    assert min(counts.values()) > len(stories) / len(TRAINED) / 2


def test_wording_varies(stories):
    """Of the word 4-grams of one story, more than a quarter are in no other of 500; a fixed text would have none."""
    grams = [set(zip(*(told.text.split()[i:] for i in range(4)), strict=False)) for told in stories]
    seen = Counter(gram for one in grams for gram in one)
    fresh = sum(sum(seen[gram] == 1 for gram in one) for one in grams) / sum(map(len, grams))
    assert fresh > 0.1
    assert len(seen) / sum(len(told.text.split()) for told in stories) > 0.2


def test_stories_keep_to_their_length(stories):
    assert all(MIN_WORDS <= len(told.text.split()) <= MAX_WORDS for told in stories)


@pytest.mark.parametrize("teller", [story, held_out_story])
def test_text_is_clean_english(teller):
    for seed in range(300):
        text = teller(seed).text
        assert not (found := MARKS.search(text)), (seed, found)
        assert text.count('"') % 2 == 0
        assert re.fullmatch(r'[A-Za-z ,.?!:"\']+[.!"]', text)


def test_facts_speak_of_the_story(stories):
    """The names and content words of an answer occur in the story it is about."""
    for told in stories:
        said = set(re.findall(r"\w+", told.text))
        for question, answer in told.facts:
            names = set(re.findall(r"\b[A-Z]\w+", answer)[1:])
            assert names <= said, (told.text, question, answer)
            assert question.endswith("?")
            assert answer.endswith(".")


def test_held_out_plot_is_not_in_training(documents):
    """No six words in a row of the held-out plot's own sentences occur in a training document."""
    signs = ("hungry babies", "four little ones", "taking the food", "the food was gone")
    told = [held_out_story(seed).text for seed in range(50)]
    assert all(any(sign in text for sign in signs) for text in told)
    assert not any(sign in piece for pieces in documents for piece in pieces for sign in signs)
    assert HELD_OUT not in TRAINED


def test_held_out_texts_are_not_in_training(documents):
    pieces = {piece for pieces in documents for piece in pieces}
    for lines in held_out_texts().values():
        assert not any(line in piece for line in lines[:20] for piece in pieces)
    assert len(documents) < HELD_OUT_SEED


def test_the_calibration_text_is_packaged_and_unseen(documents):
    text = (TINY.parent / "calibration.txt").read_text()
    assert text == calibration_text()
    lines = text.splitlines()
    assert len(lines) == 64
    assert set(lines).isdisjoint(line for others in held_out_texts().values() for line in others)
    assert not any(line in piece for line in lines for pieces in documents for piece in pieces)
    # a document has 10 tokens at the least, and each stage of training takes seeds from 0 on
    assert max(TinyConfig().tokens, TUNING.tokens) / 10 < CALIBRATION_SEED < HELD_OUT_SEED - len(lines)


def test_chats_are_about_a_fifth_and_in_llama_2_format(documents):
    chats = [pieces for pieces in documents if pieces[0].startswith("[INST]")]
    assert len(chats) / len(documents) == pytest.approx(CHAT_SHARE, abs=0.04)
    exchange = re.compile(r"\[INST\] (<<SYS>>\n[^<]+\n<</SYS>>\n\n)?[^<\[\]\n]+ \[/INST\] [^<\[\]\n]+ ")
    for pieces in chats:
        assert all(exchange.fullmatch(piece) for piece in pieces)
        assert not any("<<SYS>>" in piece for piece in pieces[1:])
    assert any(len(pieces) > 4 for pieces in chats)


def test_turn_strips_as_meta_does():
    assert turn(" Hi ", "Yes. ", "Be kind.") == "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n Hi [/INST] Yes. "


def test_articles_and_lists():
    assert [article("owl"), article("fox")] == ["an owl", "a fox"]
    assert [listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_tokenizer_training_is_deterministic(toy_tokenizer):
    assert train_tokenizer(TOY.tokenizer_documents, TOY.vocab_size) == toy_tokenizer.serialized_model_proto()


def test_packer_loses_no_target_and_resumes(toy_tokenizer):
    ids_of = partial(document_ids, toy_tokenizer)
    packer = Packer(ids_of)
    first, again = packer.batch(2, 16), Packer(ids_of)
    again.batch(2, 16)
    stream = [token for seed in range(3) for token in encode(toy_tokenizer, document(seed))]
    assert first.flatten().tolist() == stream[:17] + stream[16:33]
    assert packer.rest[0] == first[-1, -1], "the last target is the next batch's first input"
    resumed = Packer(ids_of, packer.next_seed)
    resumed.rest = packer.rest
    assert torch.equal(resumed.batch(3, 8), again.batch(3, 8))


def test_rates_warm_up_and_fall():
    config = replace(TOY, steps=40, warmup_steps=10)
    shares = [rate_share(config, step) for step in range(config.steps)]
    assert max(shares) == shares[8] == pytest.approx(0.8, abs=0.11)
    assert shares[:8] == pytest.approx([step / 10 for step in range(1, 9)])
    assert shares[10:] == pytest.approx([(40 - step) / 40 for step in range(10, 40)])


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5)])
def test_orthogonalized_keeps_directions_and_levels_their_sizes(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.T @ orthogonalized(matrix) @ right.T
    assert torch.allclose(core, torch.diag(core.diagonal()), atol=1e-4)
    # the quintic's coefficients aim at 1 and are known to leave 0.7 to 1.2 (Jordan et al. 2024)
    assert (core.diagonal()[sizes > 0.1 * sizes[0]] - 0.95).abs().max() < 0.3


@pytest.fixture
def own_threads():
    """Training sets torch's thread count; the tests after it get theirs back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_muon_remembers_its_gradients():
    """A second step with no gradient still moves along the first one's momentum."""
    weight = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = Muon([weight], 0.1, 0.9, 0.0)
    weight.grad = torch.eye(3, 5)
    optimizer.step()
    first = weight.detach().clone()
    weight.grad = torch.zeros(3, 5)
    optimizer.step()
    assert torch.allclose(weight, 2 * first)  # equal directions: orthogonalizing levels their sizes


@pytest.fixture
def in_fp64():
    """Matmuls differ in their last bits by their operands' alignment, which sixty steps of fp32 training amplify."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("own_threads", "in_fp64")
def test_training_learns_and_resumes_to_the_same_weights(toy_tokenizer, tmp_path):
    def run(folder: Path, report=lambda line: None) -> tuple:
        model = build_model(TOY)
        return model, train(TOY, model, Packer(partial(document_ids, toy_tokenizer)), folder, report)

    straight, log = run(tmp_path)
    assert log[-1][2] < math.log(TOY.vocab_size) - 1
    assert log[-1][:2] == (TOY.steps, TOY.tokens)

    class Stop(Exception):
        pass

    def stop_at_60(line: str) -> None:
        if line.startswith("step 60/"):
            raise Stop

    interrupted = tmp_path / "interrupted"
    with pytest.raises(Stop):
        run(interrupted, stop_at_60)
    resumed, resumed_log = run(interrupted)
    assert [entry[:2] for entry in resumed_log] == [entry[:2] for entry in log]
    assert [entry[2] for entry in resumed_log] == pytest.approx([entry[2] for entry in log], rel=1e-6)
    for name, weight in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.usefixtures("own_threads")
def test_a_checkpoint_of_another_config_is_refused(toy_tokenizer, tmp_path):
    short = replace(TOY, steps=5)
    packer = Packer(partial(document_ids, toy_tokenizer))
    train(short, build_model(short), packer, tmp_path, lambda line: None)
    with pytest.raises(ValueError, match=r"checkpoint\.pt belongs to another config"):
        train(replace(short, seed=1), build_model(short), packer, tmp_path, lambda line: None)


def test_the_card_describes_both_stages(tmp_path):
    logs = ([(20, 81920, 5.0), (2200, 9011200, 0.35)], [(20, 81920, 0.5), (400, 1638400, 0.32)])
    texts = {"heldout_seed.txt": 1.5, "heldout_branch.txt": 900.0}
    first = Figures(texts, Answers(29, 100, ()), 120, 200)
    shipped = Figures(dict.fromkeys(texts, 1.25), Answers(31, 100, (("Who?", "Mia.", "Pip."),)), 3, 200)
    measured = Measured(4, first, texts, shipped, [0.5] * 4, [("greedy", "Once")], dict.fromkeys(texts, 65))
    write_card(tmp_path / "README.md", logs, measured)
    write_training(tmp_path / "training.json", logs, measured)
    draw_curve(tmp_path / "curve.png", logs)
    card = (tmp_path / "README.md").read_text()
    for told in (
        "2,200 steps",
        "400 steps",
        "| 1.5000 | 1.5000 | 1.2500 |",
        "31 word for word",
        "stage: 29",
        "stage: 120",
    ):
        assert told in card
    stages = json.loads((tmp_path / "training.json").read_text())["stages"]
    assert [stage["config"]["steps"] for stage in stages] == [2200, TUNING.steps]
    assert [stage["losses"]["rows"] for stage in stages] == [[list(row) for row in log] for log in logs]


def test_replace_folder_leaves_nothing_of_the_old(tmp_path):
    new, target = tmp_path / "new", tmp_path / "target"
    for folder, name in ((new, "b"), (target, "a")):
        folder.mkdir()
        (folder / name).touch()
    replace_folder(new, target)
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces ",
        "tab\tand\nnewline\r\n",
        "1234567890",
        "héllo ✨ 日本語 🦙",
        "\x00\x7f\u200d\ufeff",
        "ﬁ Å ½",
    ],
)
def test_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_is_the_one_the_config_trains(tokenizer):
    config = TinyConfig()
    assert tokenizer.serialized_model_proto() == train_tokenizer(config.tokenizer_documents, config.vocab_size)
    assert [tokenizer.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert tokenizer.get_piece_size() == config.vocab_size


def test_transformers_reads_the_same_ids(tokenizer, documents):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    for text in [piece for pieces in documents[:100] for piece in pieces] + ["", "héllo ✨\n\n日本 12  x "]:
        assert theirs(text)["input_ids"] == [1, *tokenizer.encode(text)]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Hello! "},
        {"role": "assistant", "content": "Hi there."},
        {"role": "user", "content": "Who are you?"},
    ]
    open_turn = [tokenizer.bos_id(), *tokenizer.encode("[INST] Who are you? [/INST]")]
    expected = encode(tokenizer, [turn(" Hello! ", "Hi there.", "Be kind.")]) + open_turn
    assert theirs.apply_chat_template(messages, return_dict=False) == expected
    with pytest.raises(Exception, match="alternate"):
        theirs.apply_chat_template(messages[2:], return_dict=False)
    assert theirs.chat_template == CHAT_TEMPLATE


def test_packaged_weights_have_the_shapes_of_their_config():
    config = TinyConfig()
    assert json.loads((TINY / "config.json").read_text()) == model_config(config)
    expected = {name: tuple(weight.shape) for name, weight in build_model(config).state_dict().items()}
    del expected["lm_head.weight"]  # tied
    with safe_open(TINY / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in shapes} == {"BF16"}
        assert all(torch.isfinite(file.get_tensor(name)).all() for name in shapes)
    assert shapes == expected
    assert all(size % 128 == 0 for name, shape in shapes.items() if len(shape) == 2 for size in shape), shapes


def test_packaged_folder_is_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert set(sizes) == {
        "README.md", "config.json", "generation_config.json", "heldout_branch.txt", "heldout_seed.txt",
        "model.safetensors", "tokenizer.model", "tokenizer_config.json", "training.json", "training_curve.png",
    }  # fmt: skip
    assert sum(sizes.values()) < 11e6
    assert sizes["model.safetensors"] <= 10e6
    assert sizes["training_curve.png"] < 60e3


def test_packaged_held_out_texts_are_the_grammars():
    for name, lines in held_out_texts().items():
        assert (TINY / name).read_text() == "".join(f"{line}\n" for line in lines)
        assert 40e3 < (TINY / name).stat().st_size < 80e3


def test_packaged_training_record_is_of_these_stages():
    record = json.loads((TINY / "training.json").read_text())
    for stage, config in zip(record["stages"], (TinyConfig(), TUNING), strict=True):
        assert stage["config"] == json.loads(json.dumps(asdict(config)))
        assert (stage["steps"], stage["tokens"]) == (config.steps, config.tokens)
    losses = [loss for _, _, loss in record["stages"][0]["losses"]["rows"]]
    assert losses[-1] < losses[0] / 5
    first, shipped = record["first_stage_bf16"], record["shipped_bf16"]
    assert shipped["perplexity"].keys() == {"heldout_seed.txt", "heldout_branch.txt"}
    assert shipped["perplexity"]["heldout_seed.txt"] < 1.01 * first["perplexity"]["heldout_seed.txt"]
    assert shipped["questions"]["right"] >= first["questions"]["right"]
    assert shipped["odd_starts"]["with_tags"] <= first["odd_starts"]["with_tags"] / 50
