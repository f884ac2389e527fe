"""The op of a fused matmul: a kernel computes the prologue and epilogue that it fuses, separate ops the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastllama.kernels.dispatch.backends import Function, Kernels, Table
from fastllama.kernels.dispatch.checks import as_rows
from fastllama.kernels.dispatch.fusion import SCHEMA, Fusion
from fastllama.kernels.dispatch.op import Op
from fastllama.kernels.ops.compose import compose


class MatmulOp(Op):
    """An op of x, the weight's tensors, bias, a Fusion's fields, out, and a workspace if there is a Triton kernel.

    weight: the weight's arguments in the schema, "Tensor packed, Tensor scales".
    check: takes x, the weight's arguments, bias, a Fusion, out and the workspace.
    numba, cpu: take the same without the Fusion, all of which runs as separate ops (`compose`). triton: takes the op's
    arguments, with the part of the Fusion that `Kernels.fuses` returns; the rest runs as separate ops.
    """

    def __init__(
        self,
        name: str,
        weight: str,
        *,
        check: Callable[..., None],
        reference: Function,
        cpu: Function | None = None,
        numba: Table | None = None,
        triton: Table | None = None,
    ) -> None:
        scratch = ", Tensor(c!)? workspace" if triton is not None else ""
        schema = f"{name}(Tensor x, {weight}, Tensor? bias, {SCHEMA}, Tensor(a!) out{scratch}) -> ()"
        self._before = weight.count(",") + 3  # arguments before the Fusion's
        self._after = self._before + len(Fusion._fields)
        self._composed: dict[Kernels, Function] = {}

        def check_fusion(*args: Any) -> None:
            check(*args[: self._before], Fusion(*args[self._before : self._after]), *args[self._after :])

        super().__init__(
            schema,
            check=check_fusion,
            reference=reference,
            in_place={"out": {"residual": 1}},
            cpu=cpu,
            numba=numba,
            triton=triton,
        )

    def _whole(self, kernels: Kernels) -> Function:
        """Adds separate ops for what the kernels do not fuse. The same kernels return the same function."""
        if kernels not in self._composed:
            self._composed[kernels] = self._unfused(kernels.run) if kernels.fuses is None else self._fused(kernels)
        return self._composed[kernels]

    def _unfused(self, multiply: Function) -> Function:
        before, after = self._before - 1, self._after - 1  # without x

        def run(x: Tensor, *args: Any) -> None:
            weight, out, workspace = args[:before], args[after], args[after + 1 :]
            compose(lambda x, out: multiply(x, *weight, out, *workspace), x, args[before:after], out)

        return run

    def _fused(self, kernels: Kernels) -> Function:
        before, after, fuses, launch = self._before, self._after, kernels.fuses, kernels.run
        assert fuses is not None

        def run(*args: Any) -> Function | None:
            given, fusion, (out, *workspace) = args[:before], Fusion(*args[before:after]), args[after:]
            fused = fuses(*given, fusion)
            if fused is fusion:
                again: Function | None = launch(*args)
                return again

            def multiply(x: Tensor, out: Tensor) -> None:
                launch(x, *given[1:], *fused, out, *workspace)

            compose(multiply, given[0], _less(fusion, fused), out)
            return None

        return run

    def by_row(self, x: Tensor, *args: Any) -> None:
        """Run the op batch-invariantly, bit for bit, in blocks of rows whose results do not depend on each other.

        A block has up to 64 rows where a Triton kernel runs, else one.
        """
        rows = x.numel() // x.shape[-1] if x.numel() else 1
        block = rows if rows == 1 else self._independent_rows(x, args[0])
        if rows <= block:
            self(x, *args)
            return
        self.check_all((x, *args))
        given = [x, *args]
        rowwise = {place: as_rows(name, given[place]) for place, name in self._rowwise(given)}
        for first in range(0, rows, block):
            for place, tensor in rowwise.items():
                given[place] = tensor[first : first + block]
            self(*given)

    def _rowwise(self, args: list[Any]) -> list[tuple[int, str]]:
        """Positions and names of the arguments that have one row for each row of x."""
        named = [(self.names.index(name), name) for name in ("x", "residual", "out")]
        return [(place, name) for place, name in named if args[place] is not None]

    def _independent_rows(self, x: Tensor, weight: Tensor) -> int:
        if self.implementation(x.device.type).backend != "triton":
            return 1
        few_rows = self._triton_kernels(x.device.type).few_rows
        assert few_rows is not None
        return max(few_rows(x, weight), 1)


def _less(fusion: Fusion, fused: Fusion) -> Fusion:
    """The part of a Fusion that is not fused."""
    return Fusion(
        norm=fusion.norm if fused.norm is None else None,
        eps=fusion.eps,
        residual=fusion.residual if fused.residual is None else None,
        gated=fusion.gated and not fused.gated,
    )
