"""What lies with a model besides its weights: the tokenizer, and the sampling settings of generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastllama.io.formats.json_files import read_json
from fastllama.io.tokenizer import Tokenizer, load_tokenizer

GENERATION_CONFIG = "generation_config.json"
# transformers' name -> SamplingParams' name
_SETTINGS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
_GREEDY_SETTINGS = ("repetition_penalty", "max_tokens")


def find_tokenizer(*places: Path) -> Tokenizer | None:
    """The tokenizer of the first of these models or adapters that has one, None where none has.

    Beside Meta's params.json it may lie one folder up, where download.sh of Llama 1 and 2 puts it. Raises what
    load_tokenizer raises for a broken one.
    """
    folders = [place if place.is_dir() else place.parent for place in places]
    folders += [folder.parent for folder in folders if (folder / "params.json").is_file()]
    for folder in folders:
        try:
            return load_tokenizer(folder)
        except FileNotFoundError:
            continue
    return None


def read_sampling_settings(model: Path) -> dict[str, Any]:
    """The sampling settings that a model's folder holds, by SamplingParams' names, unchecked; {} where there are none.

    `do_sample: false` is a temperature of 0, as in transformers. Where it is absent the settings count, as in vLLM;
    transformers would decode greedily. Raises CheckpointError if the file is no JSON object.
    """
    file = model / GENERATION_CONFIG
    if not file.is_file():
        return {}
    given = {name: value for name, value in read_json(file).items() if value is not None}
    found = {ours: given[name] for name, ours in _SETTINGS.items() if name in given}
    if given.get("do_sample") is False:
        found = {"temperature": 0.0} | {name: value for name, value in found.items() if name in _GREEDY_SETTINGS}
    return found
