"""Files of a model besides its weights: the tokenizer, and the sampling settings of generation_config.json."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastllama.errors import CheckpointError
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
    "stop_strings": "stop",
}
_GREEDY_SETTINGS = ("repetition_penalty", "max_tokens", "stop")
# Settings of transformers that change its tokens and have no counterpart here, with the values that turn them off.
_UNLESS_ONE = ("num_beams", "guidance_scale", "encoder_repetition_penalty", "typical_p", "top_h")
_UNLESS_EMPTY = (
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_new_tokens", "min_length", "sequence_bias"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id"),
    *("exponential_decay_length_penalty", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "watermarking_config"),
)
_LOG = logging.getLogger("fastllama")


def find_tokenizer(*places: Path) -> Tokenizer | None:
    """The tokenizer of the first of these models or adapters that has one, else None.

    For Meta's layout the parent folder is searched too, where download.sh of Llama 1 and 2 puts it. Raises the errors
    of load_tokenizer.
    """
    folders = [place if place.is_dir() else place.parent for place in places]
    folders += [folder.parent for folder in folders if (folder / "params.json").is_file()]
    for folder in folders:
        try:
            return load_tokenizer(folder)
        except FileNotFoundError:
            continue
        except PermissionError as error:
            place = error.filename or folder
            raise CheckpointError(f"{place} may not be read by this user; change its permissions") from None
    return None


def read_sampling_settings(model: Path) -> tuple[Path, dict[str, Any]]:
    """The file of a model's sampling settings, and the unchecked settings by SamplingParams' names; {} without any.

    They are read from generation_config.json, or, for older models as in transformers 5, from config.json.
    `do_sample: false` is a temperature of 0, as in transformers. Where it is absent the settings are used, as in vLLM;
    transformers would decode greedily. Settings without a counterpart here that change tokens are logged as a warning.
    max_length, a limit of prompt and answer together, is ignored. Raises CheckpointError for a broken file.
    """
    file = model / GENERATION_CONFIG
    if not file.is_file():
        file = model / "config.json"
    if not file.is_file():
        return file, {}
    return file, sampling_settings(read_json(file), str(file))


def sampling_settings(generation_config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The sampling settings in the content of a generation_config.json; source: its file, for the warning."""
    given = {name: value for name, value in generation_config.items() if value is not None}
    found = {ours: given[name] for name, ours in _SETTINGS.items() if name in given}
    if "do_sample" in given and not given["do_sample"]:
        found = {"temperature": 0.0} | {name: value for name, value in found.items() if name in _GREEDY_SETTINGS}
    unused = [name for name in _UNLESS_ONE if given.get(name, 1) != 1]
    unused += [name for name in _UNLESS_EMPTY if given.get(name)]
    if unused:
        _LOG.warning("%s sets %s: no counterpart here, ignored", source, ", ".join(unused))
    return found
