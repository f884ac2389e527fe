"""The op write_kv: separate key and value tensors into pages."""

from __future__ import annotations

from torch import Tensor

from fastllama.errors import check_shape
from fastllama.kernels import reference
from fastllama.kernels.dispatch.checks import (
    CODES,
    FLOATS,
    INTEGERS,
    check_elements,
    check_page_scales,
    check_scale,
    check_tensor,
)
from fastllama.kernels.dispatch.op import Op
from fastllama.kernels.ops import values
from fastllama.kernels.ops.compiled import numba_kernels, triton_kernels


def _check_write_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    k_scale: float | None,
    v_scale: float | None,
) -> None:
    pages = k_pages.shape
    if len(pages) != 4 or 0 in pages:
        raise ValueError(f"k_pages has shape {list(pages)}; legal: [P, Hkv, page_size, D], each at least 1")
    check_shape("k", k, ("T", pages[1], pages[3]))
    check_elements("k", k, FLOATS)
    check_tensor("v", v, k.shape, (k.dtype,))
    check_tensor("slots", slots, k.shape[:1], INTEGERS)
    check_elements("k_pages", k_pages, (*CODES, k.dtype))
    check_tensor("v_pages", v_pages, pages, (k_pages.dtype,))
    check_page_scales(k_scales, v_scales, k_scale, v_scale, k_pages)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            if k_pages.dtype not in CODES:
                raise ValueError(f"{name} is {scale!r}; legal for pages of {k_pages.dtype}: None")
            check_scale(name, scale)


_WRITE_KV = Op(
    "write_kv(Tensor k, Tensor v, Tensor slots, Tensor(c!) k_pages, Tensor(d!) v_pages, "
    "Tensor(e!)? k_scales, Tensor(f!)? v_scales, float? k_scale, float? v_scale) -> ()",
    check=_check_write_kv,
    reference=reference.write_kv,
    values=values.check_write_kv,
    kept_apart=[("k_pages", "v_pages")],
    numba=numba_kernels,
    triton=triton_kernels,
)


def write_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> None:
    """Write keys and values into their pages, as `rope_and_write_kv` does, without a rotation.

    k, v: [T, Hkv, D], one floating dtype, any strides but the last. slots: [T] int32 or int64, as for
    `rope_and_write_kv`: nothing is written for a slot that is negative or past the last page.
    k_pages, v_pages: [P, Hkv, page_size, D], k's dtype, int8 or float8_e4m3fn, any strides but the last; written in
    place. Both may be views of one buffer, offset by whole pages, as in transformers' pool, if the slots keep keys and
    values apart. Quantized pages have either one scale for each token and head, computed and written into k_scales,
    v_scales: [P, Hkv, page_size] fp32, as for `rope_and_write_kv`; or k_scale, v_scale, calibrated numbers of fp32: the
    page then holds x / scale in fp32, rounded to nearest even and clamped to 127 (int8) or 448 (fp8), infinities too.
    NaN stays NaN in float8_e4m3fn and becomes 0 in int8.
    Returns nothing. Raises ValueError for a shape, stride, device or scale, TypeError for a dtype; nothing is written
    then.
    Source: pages as in Kwon et al., Efficient Memory Management for LLM Serving (2023).

    Example:
        >>> k, v = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]])
        >>> k_pages, v_pages = torch.zeros(3, 1, 4, 2), torch.zeros(3, 1, 4, 2)  # 3 pages of 4 tokens, one head
        >>> kernels.write_kv(k, v, torch.tensor([9]), k_pages, v_pages)
        >>> k_pages[2, 0, 1].tolist(), v_pages[2, 0, 1].tolist()
        ([1.0, 2.0], [3.0, 4.0])
    """
    _WRITE_KV(k, v, slots, k_pages, v_pages, k_scales, v_scales, k_scale, v_scale)
