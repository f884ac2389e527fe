"""Arguments that an adapter's function does not implement are refused by name."""

from __future__ import annotations

import pytest
import torch

from fastllama.integrations.arguments import refuse_arguments


def test_values_that_mean_off_are_accepted() -> None:
    refuse_arguments(
        "attend", softcap=(0, 0.0, None), window=((-1, -1), (-1, -1)), bias=(None, None), p=(None, 0.0, None)
    )


@pytest.mark.parametrize(
    ("given", "off", "seen"),
    [
        (0.5, (0.0, None), "softcap is 0.5, which attend does not implement here; legal: 0.0"),
        (
            torch.zeros(2, 3),
            (None,),
            r"softcap is a tensor \[2, 3\], which attend does not implement here; legal: None",
        ),
        ((4, 0), ((-1, -1),), r"softcap is \(4, 0\), .*; legal: \(-1, -1\)"),
        (float("nan"), (0.0,), "softcap is nan"),
    ],
)
def test_any_other_value_is_refused_by_its_name(given: object, off: tuple[object, ...], seen: str) -> None:
    with pytest.raises(NotImplementedError, match=seen):
        refuse_arguments("attend", first=(None, None), softcap=(given, *off))
