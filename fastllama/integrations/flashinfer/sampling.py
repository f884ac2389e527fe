"""FlashInfer's sampling: softmax, sampling from probabilities or logits, and the filters alone.

Tokens are sampled by this library's `sample`: equal seeds and offsets give equal tokens, but other tokens than
FlashInfer's, whose random numbers come from another stream. The filters keep the same tokens as FlashInfer's, ties at a
threshold included; only its top_k_top_p functions keep exactly k, for one top_k of 256 or less and a V of 65536 or
more. Probabilities are converted to logarithms in fp32, so that those within 1e-6 of each other may count as a tie. Two
things differ: a row counts as normalised whatever its sum (FlashInfer assigns the rest to the last token), and a row
with a NaN is not valid.

Shared arguments:
indices: [B] int32 or int64, the row of each output, which gets their dtype; for an index out of range the token is 0
and not valid. None: int32, one output per row.
top_k, top_p, min_p: a number, or a tensor [rows]. A top_k of -1, of V or more, and 0 in a tensor keep all. top_p and
min_p: 0 to 1.
seed, offset: both 64-bit integers, or both int64 or uint64 tensors [1] or [B]. The random number of an output depends
on its index in the batch too, so that outputs of equal seeds are independent. Where either is None, both come from
`generator`, or torch's default of the device, which then advances (a CUDA graph samples anew at each replay).
check_nan: raise ValueError for a NaN; only this synchronizes with the device.
deterministic, is_deterministic: unused, everything is deterministic.
return_valid: also return bool [B], whether a row had a token to sample. For rows of zeros, or with a NaN, it is False
and the token is 0.
All raise ValueError for a shape, device or number, TypeError for a dtype, before a generator advances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.errors import check_choice, check_device, check_dtype, check_range, check_rows, check_shape
from fastllama.integrations.flashinfer.checks import check_tensors
from fastllama.kernels.dispatch.checks import FLOATS, INTEGERS
from fastllama.kernels.reference.sampling import filter_probs

_ORDERS = ("top_k_first", "joint")
_SIGNED, _WORD = 1 << 63, 1 << 64
# Odd factors, so that batch indices, and offsets that differ above their low 32 bits, get distinct keys.
_PLACE_KEY, _OFFSET_KEY = 0x9E3779B97F4A7C15 - _WORD, 0xD1342543DE82EF95 - _WORD


def softmax(logits: Tensor, temperature: Tensor | float | None = None, enable_pdl: bool | None = None) -> Tensor:
    """softmax(logits / temperature) over the last dimension, fp32.

    logits: [B, V], any floating dtype. temperature: a number, [B] in any floating dtype, or None for 1; 0 gives a
    uniform distribution, as in FlashInfer. enable_pdl: unused.
    """
    _check_rows("logits", logits, False)
    scores = logits.float()
    if isinstance(temperature, Tensor):
        check_shape("temperature", temperature, logits.shape[:1])
        check_dtype("temperature", temperature, FLOATS)
        check_device("temperature", temperature, "logits", logits)
        heat = temperature.float()[:, None]
        scores = scores * torch.where(heat == 0, 0.0, 1 / heat)
    elif temperature is not None:
        check_range("temperature", temperature, 0)
        scores = scores * (1 / temperature if temperature else 0.0)
    return scores.softmax(-1)


def sampling_from_logits(
    logits: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> Tensor:
    """Sample a token of softmax(logits) for each row. logits: [rows, V], any floating dtype."""
    _check_rows("logits", logits, check_nan)
    return _sample(logits.float(), indices, generator, seed, offset)[0]


def sampling_from_probs(
    probs: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sample a token for each row. probs: [rows, V], any floating dtype; tokens of 0 or less are never sampled."""
    _check_rows("probs", probs, check_nan)
    sampled = _sample(_logits(probs), indices, generator, seed, offset)
    return sampled if return_valid else sampled[0]


def top_p_sampling_from_probs(
    probs: Tensor,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sample among the tokens whose likelier tokens have less than top_p in total."""
    _check_rows("probs", probs, check_nan)
    sampled = _sample(_logits(probs), indices, generator, seed, offset, top_p=_fractions("top_p", top_p, probs))
    return sampled if return_valid else sampled[0]


def top_k_sampling_from_probs(
    probs: Tensor,
    top_k: Tensor | int,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sample among the tokens with fewer than top_k likelier tokens."""
    _check_rows("probs", probs, check_nan)
    sampled = _sample(_logits(probs), indices, generator, seed, offset, top_k=_counts(top_k, probs, "probs"))
    return sampled if return_valid else sampled[0]


def min_p_sampling_from_probs(
    probs: Tensor,
    min_p: Tensor | float,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sample among the tokens at least min_p times as likely as the likeliest."""
    _check_rows("probs", probs, check_nan)
    sampled = _sample(_logits(probs), indices, generator, seed, offset, min_p=_fractions("min_p", min_p, probs))
    return sampled if return_valid else sampled[0]


def top_k_top_p_sampling_from_logits(
    logits: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> Tensor:
    """`top_k_top_p_sampling_from_probs` of softmax(logits)."""
    _check_rows("logits", logits, check_nan)
    check_choice("filter_apply_order", filter_apply_order, _ORDERS)
    counts, fractions = _counts(top_k, logits, "logits"), _fractions("top_p", top_p, logits, "logits")
    if filter_apply_order == "joint":
        scores = _logits(_nucleus(logits.float().softmax(-1), fractions))
        return _sample(scores, indices, generator, seed, offset, top_k=counts)[0]
    return _sample(logits.float(), indices, generator, seed, offset, top_k=counts, top_p=fractions)[0]


def top_k_top_p_sampling_from_probs(
    probs: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sample among the tokens that both filters keep.

    filter_apply_order: "top_k_first" renormalises the tokens that top_k keeps before top_p is applied; "joint" applies
    both to the given probabilities, so that top_p keeps no more.
    """
    _check_rows("probs", probs, check_nan)
    check_choice("filter_apply_order", filter_apply_order, _ORDERS)
    counts, fractions = _counts(top_k, probs, "probs"), _fractions("top_p", top_p, probs)
    if filter_apply_order == "joint":
        # The op filters by top-k first. top-p keeps the likeliest tokens, whose top-k ranks do not depend on the
        # others.
        scores = _logits(_nucleus(probs.float(), fractions))
        sampled = _sample(scores, indices, generator, seed, offset, top_k=counts)
    else:
        sampled = _sample(_logits(probs), indices, generator, seed, offset, top_k=counts, top_p=fractions)
    return sampled if return_valid else sampled[0]


def top_p_renorm_probs(probs: Tensor, top_p: Tensor | float, is_deterministic: bool = False) -> Tensor:
    """Probabilities outside top_p set to 0, rows renormalised (rows of zeros stay zeros). fp32."""
    _check_rows("probs", probs, False)
    return _renormalised(_nucleus(probs.float(), _fractions("top_p", top_p, probs)))


def top_k_renorm_probs(probs: Tensor, top_k: Tensor | int, is_deterministic: bool = False) -> Tensor:
    """Probabilities outside top_k set to 0, rows renormalised (rows of zeros stay zeros), in the dtype of probs."""
    _check_rows("probs", probs, False)
    counts, off = _counts(top_k, probs, "probs"), _filled(0.0, probs)
    return _renormalised(filter_probs(probs.float(), counts, off + 1, off)).to(probs.dtype)


top_p_renorm_prob, top_k_renorm_prob = top_p_renorm_probs, top_k_renorm_probs


def top_k_mask_logits(logits: Tensor, top_k: Tensor | int) -> Tensor:
    """Logits outside top_k set to -inf, in their dtype."""
    _check_rows("logits", logits, False)
    counts, vocab = _counts(top_k, logits, "logits"), logits.shape[1]
    last = torch.where((counts > 0) & (counts < vocab), counts, vocab) - 1
    floor = logits.sort(dim=-1, descending=True).values.gather(1, last.long()[:, None])
    return logits.masked_fill(logits < floor, -torch.inf)


def _check_rows(name: str, rows: Tensor, check_nan: bool) -> None:
    check_tensors(**{name: rows})
    check_shape(name, rows, ("rows", "V"))
    if not rows.shape[1]:
        raise ValueError(f"{name} has shape {list(rows.shape)}; legal: [rows, V] with V at least 1")
    check_dtype(name, rows, FLOATS)
    check_rows(name, rows)
    if check_nan and bool(rows.isnan().any()):
        raise ValueError(f"{name} has a NaN; legal where check_nan is set: numbers")


def _filled(value: float, rows: Tensor) -> Tensor:
    return torch.full(rows.shape[:1], value, dtype=torch.float32, device=rows.device)


def _fractions(name: str, value: Tensor | float, rows: Tensor, rows_name: str = "probs") -> Tensor:
    """top_p or min_p of each row, fp32."""
    if not isinstance(value, Tensor):
        check_range(name, value, 0, 1)
        return _filled(value, rows)
    check_shape(name, value, rows.shape[:1])
    check_dtype(name, value, FLOATS)
    check_device(name, value, rows_name, rows)
    return value.float()


def _counts(top_k: Tensor | int, rows: Tensor, rows_name: str) -> Tensor:
    """top_k of each row, 0 or less for all."""
    if not isinstance(top_k, Tensor):
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise TypeError(f"top_k is {top_k!r}; legal: an integer or a tensor")
        if top_k < 1 and top_k != -1:
            raise ValueError(f"top_k is {top_k}; legal: at least 1, or -1 for all")
        return torch.full(rows.shape[:1], min(top_k, rows.shape[1]), dtype=torch.int64, device=rows.device)
    check_shape("top_k", top_k, rows.shape[:1])
    check_dtype("top_k", top_k, INTEGERS)
    check_device("top_k", top_k, rows_name, rows)
    return top_k


def _logits(probs: Tensor) -> Tensor:
    """Logits whose softmax is probs; -inf for tokens that are never sampled."""
    return probs.float().clamp(min=0).log()


def _nucleus(probs: Tensor, top_p: Tensor) -> Tensor:
    """probs with tokens outside top_p set to 0."""
    off = torch.zeros_like(top_p)
    return filter_probs(probs, off, top_p, off)


def _renormalised(probs: Tensor) -> Tensor:
    return probs / probs.sum(-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)


def _sample(
    logits: Tensor,
    indices: Tensor | None,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    *,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens [B] in the dtype of indices, and their validity [B]. The filters have one value per row of logits."""
    off = _filled(0.0, logits)
    top_k = off.int() if top_k is None else top_k.contiguous()
    top_p = off + 1 if top_p is None else top_p.contiguous()
    min_p = off if min_p is None else min_p.contiguous()
    inside = None
    if indices is not None:
        check_tensors(indices=indices)
        check_shape("indices", indices, ("B",))
        check_dtype("indices", indices, INTEGERS)
        check_device("indices", indices, "probs", logits)
        if indices.shape[0] and not logits.shape[0]:
            raise ValueError(f"indices has shape {list(indices.shape)}; legal for no rows: [0]")
        inside = (indices >= 0) & (indices < logits.shape[0])
        rows = torch.where(inside, indices, 0)
        logits, top_k, top_p, min_p = (each.index_select(0, rows) for each in (logits, top_k, top_p, min_p))
    keys, counters = _random_numbers(logits, generator, seed, offset)
    tokens, logprobs = kernels.sample(logits, torch.ones_like(top_p), top_k, top_p, min_p, keys, counters)
    valid = ~logprobs.isnan()
    if indices is None or inside is None:
        return tokens.to(torch.int32), valid
    return torch.where(inside, tokens, 0).to(indices.dtype), valid & inside


def _random_numbers(
    rows: Tensor, generator: torch.Generator | None, seed: int | Tensor | None, offset: int | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Key and counter of each row for `sample`, int64."""
    if seed is None or offset is None:
        if generator is not None and generator.device.type != rows.device.type:
            raise ValueError(f"generator is on {generator.device}, probs on {rows.device}; legal: one device for all")
        seed = torch.randint(-_SIGNED, _SIGNED - 1, (1,), generator=generator, dtype=torch.int64, device=rows.device)
        offset = torch.zeros_like(seed)
    elif isinstance(seed, Tensor) != isinstance(offset, Tensor):
        raise ValueError(f"seed is {_seen(seed)}, offset {_seen(offset)}; legal: two integers or two tensors")
    key, counter = _words("seed", seed, rows), _words("offset", offset, rows)
    places = torch.arange(rows.shape[0], dtype=torch.int64, device=rows.device)
    return key + (counter >> 32) * _OFFSET_KEY + places * _PLACE_KEY, counter + torch.zeros_like(places)


def _seen(value: int | Tensor) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else str(value)


def _words(name: str, value: int | Tensor, rows: Tensor) -> Tensor:
    """64-bit values as signed integers, [1] or one per row."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; legal: an integer or a tensor")
        check_range(name, value, -_SIGNED, _WORD - 1)
        word = value - _WORD if value >= _SIGNED else value
        return torch.full((1,), word, dtype=torch.int64, device=rows.device)
    if value.shape not in ((1,), rows.shape[:1]):
        raise ValueError(f"{name} has shape {list(value.shape)}; legal: [1] or [{rows.shape[0]}]")
    check_dtype(name, value, (torch.int64, torch.uint64))
    check_device(name, value, "probs", rows)
    return value.view(torch.int64)
