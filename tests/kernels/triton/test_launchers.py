"""What holds for every Triton launcher: refusals before a launch, torch.compile, memory beyond 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.catalogue import matmuls
from fastllama.catalogue.arguments import in_order, inputs, positional
from fastllama.catalogue.maker import Maker
from fastllama.catalogue.table import small_call
from fastllama.kernels.dispatch.fusion import Fusion
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.triton.table import KERNELS
from fastllama.testing.monitor import CheckedRun
from fastllama.testing.targets import TARGETS
from tests.kernels.honest import assert_equal, public
from tests.kernels.ops.test_compile import copy, same
from tests.kernels.ops.test_rope import cache
from tests.kernels.triton.launches import META, on

ATTENTION = ["attention_varlen", "attention_prefill", "attention_decode"]
OURS = [op for op in OPS if OPS[op].has_triton and op != "sample"]  # whose tests are in sampling/test_draw.py
every_op = pytest.mark.parametrize("op", OURS)
KEPT = ("cos_sin", "a_lse", "b_lse", "lse_out", "x_scales", "scales_out")  # in fp32
FAR = 1 << 30  # elements; two of it are more than int32 counts


@pytest.fixture
def _bound(op: str, bind: Callable[..., None]) -> None:
    bind(op, OPS[op].launcher("cpu"))


@pytest.mark.interpreter
@every_op
def test_fp64_is_the_references_alone(op: str) -> None:
    given = small_call(op)
    floats = [name for name, value in given.items() if isinstance(value, Tensor) and value.is_floating_point()]
    # Biases and penalties stay in fp32 whatever the logits are.
    given |= {name: given[name].double() for name in (("logits", "out") if op == "adjust_logits" else floats)}
    first = next(name for name, value in given.items() if isinstance(value, Tensor) and value.is_floating_point())
    message = f"^{first} has dtype torch.float64; legal: torch.bfloat16, torch.float16, torch.float32$"
    with pytest.raises(TypeError, match=message):
        public(op, "triton")(**given)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("rms_norm", "x"),
        ("rms_norm", "out"),
        ("add_rms_norm", "x"),
        ("add_rms_norm", "residual"),
        ("add_rms_norm", "out"),
        ("add_rms_norm", "residual_out"),
        ("silu_mul", "gate_up"),
        ("silu_mul", "up"),
        ("silu_mul", "out"),
    ],
)
def test_rows_at_two_strides_are_refused_before_anything_is_written(op: str, name: str) -> None:
    given = small_call(op)
    rows = {key for key, value in given.items() if isinstance(value, Tensor) and value.dim() == 2}
    given |= {key: given[key].expand(4, *given[key].shape).clone() for key in rows}
    given[name] = given[name].transpose(0, 1).contiguous().transpose(0, 1)
    before = copy(given)
    with pytest.raises(ValueError, match=rf"^{name} has strides \[.*\]; legal: all rows at one stride"):
        public(op, "triton")(**given)
    same(given, before)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("form", ["norm", "residual", "norm, gated"])
@pytest.mark.parametrize("op", [op for op, table in KERNELS.items() if table.fuses])
def test_what_is_fused_is_the_same_for_all_few_rows(op: str, form: str, name: str) -> None:
    """A norm that is not fused is rounded: a row's bits would depend on how many the others are."""
    fuses, few_rows = KERNELS[op].fuses, KERNELS[op].few_rows
    assert fuses is not None
    assert few_rows is not None
    place = OPS[op].names.index("norm")
    fused = set()
    with on(name):
        for rows in (1, 16, 17, 32, 33, 64):
            call = getattr(matmuls, op)(Maker(torch.bfloat16, META), rows, 256, 256, form=form)
            args = positional(op, in_order(op, call))
            if rows <= few_rows(*args[:2]):
                found = fuses(*args[:place], Fusion(*args[place : place + len(Fusion._fields)]))
                fused.add((found.norm is not None, found.residual is not None, found.gated))
    assert fused == {("norm" in form, "residual" in form, "gated" in form)}


@pytest.mark.interpreter
@pytest.mark.usefixtures("_bound")
@every_op
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.fastllama, op).default, positional(op, small_call(op)))


@pytest.mark.interpreter
@pytest.mark.usefixtures("_bound")
@every_op
def test_compiled_is_eager(op: str) -> None:
    given = inputs(op, small_call(op))
    function = getattr(kernels, op)
    ours, theirs = copy(given), copy(given)
    torch.compiler.reset()
    compiled = torch.compile(lambda **args: function(**args), fullgraph=True, backend="aot_eager")
    same(compiled(**ours), function(**theirs))
    same(ours, theirs)


@pytest.fixture
def _lazy_memory() -> Iterator[None]:
    """Uninitialised memory that takes none until it is touched; poison would touch it all."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled


def far_rows(values: Tensor) -> Tensor:
    """A tensor [3, ...] of values whose last row starts past 2^31 elements."""
    inner = values[0]
    buffer = torch.empty(2 * FAR + 64 + inner.numel(), dtype=values.dtype)
    view = buffer.as_strided(values.shape, (FAR + 16, *inner.stride()))
    return view.copy_(values)


@pytest.mark.interpreter
@pytest.mark.usefixtures("_lazy_memory")
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("rms_norm", "x"),
        ("rms_norm", "out"),
        ("add_rms_norm", "residual"),
        ("add_rms_norm", "residual_out"),
        ("silu_mul", "gate_up"),
        ("silu_mul", "up"),
        ("silu_mul", "out"),
        ("matmul_int4", "x"),
        ("matmul_int4", "out"),
        ("matmul_int8", "x"),
        ("matmul_int8", "out"),
        ("matmul_w8a8", "x"),
        ("matmul_w8a8", "out"),
        ("quantize_rows", "x"),
        ("rope", "q"),
        ("rope", "k"),
        ("rope", "q_out"),
        ("rope", "k_out"),
        ("rope_and_write_kv", "qkv"),
        ("rope_and_write_kv", "q_out"),
        ("write_kv", "k"),
        ("write_kv", "v"),
        *(("merge_state", name) for name in ("a", "a_lse", "b", "b_lse", "out", "lse_out")),
        *((op, name) for op in ATTENTION for name in ("q", "out")),
        ("attention_varlen", "k"),
        ("attention_varlen", "v"),
    ],
)
def test_rows_past_two_to_the_31_elements(op: str, name: str) -> None:
    run = public(op, "triton")
    given = {k: v.half() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in small_call(op).items()}
    given |= {name: given[name].float() for name in KEPT if name in given}
    expected, far = copy(given), copy(given)
    far[name] = far_rows(given[name])
    same(run(**far), run(**expected))


@pytest.mark.interpreter
@pytest.mark.usefixtures("_lazy_memory")
@pytest.mark.parametrize("name", ["k_pages", "v_pages"])
@pytest.mark.parametrize("op", ["attention_prefill", "attention_decode"])
def test_pages_past_two_to_the_31_elements_are_read(op: str, name: str) -> None:
    given = {k: v.half() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in small_call(op).items()}
    pages = given[name]
    apart = (2 * FAR + 64) // (pages.shape[0] - 1)
    buffer = torch.empty(apart * (pages.shape[0] - 1) + pages[0].numel(), dtype=pages.dtype)
    far = buffer.as_strided(pages.shape, (apart, *pages[0].stride())).copy_(pages)
    run = public(op, "triton")
    same(run(**copy(given) | {name: far}), run(**copy(given)))


@pytest.mark.interpreter
@pytest.mark.usefixtures("_lazy_memory")
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_pool_past_two_to_the_31_elements(dtype: torch.dtype, checked: CheckedRun) -> None:
    """Its last slot is written, by a byte for each element; the pool itself takes no memory."""
    heads, page_size, head_dim = 8, 64, 128
    num_pages = (1 << 31) // (heads * page_size * head_dim) + 2
    pages = [torch.empty(num_pages, heads, page_size, head_dim, dtype=torch.int8).view(dtype) for _ in "kv"]
    scales = [torch.empty(num_pages, heads, page_size) for _ in "kv"]
    small = [torch.zeros(1, heads, page_size, head_dim, dtype=torch.int8).view(dtype) for _ in "kv"]
    small += [torch.zeros(1, heads, page_size) for _ in "kv"]
    qkv, cos_sin, position = torch.randn(1, 3 * heads * head_dim), cache(head_dim), torch.tensor([5])
    run = public("rope_and_write_kv", "triton")
    run(qkv, cos_sin, position, torch.tensor([page_size - 1]), *small)
    run(qkv, cos_sin, position, torch.tensor([num_pages * page_size - 1]), *pages, *scales)
    for found, expected in zip((*pages, *scales), small, strict=True):
        assert_equal(found[-1, :, -1].float(), expected[0, :, -1].float())
    assert checked.launches[-1].stored["k_pages_ptr"] == heads * head_dim
    _, k, v = (-qkv).view(1, 3, heads, head_dim).unbind(1)
    run = public("write_kv", "triton")
    run(k, v, torch.tensor([page_size - 1]), *small)
    run(k, v, torch.tensor([num_pages * page_size - 1]), *pages, *scales)
    for found, expected in zip((*pages, *scales), small, strict=True):
        assert_equal(found[-1, :, -1].float(), expected[0, :, -1].float())


@pytest.mark.interpreter
@pytest.mark.usefixtures("_lazy_memory")
def test_pages_far_apart() -> None:
    """Pages of one layer in a pool of all layers: few of them, past 2^31 elements by their stride."""
    buffers = [torch.empty(2 * FAR + (1 << 20), dtype=torch.float16) for _ in "kv"]
    pages = [buffer.as_strided((3, 2, 4, 16), (FAR + 16, 64, 16, 1)) for buffer in buffers]
    small = [torch.zeros(3, 2, 4, 16, dtype=torch.float16) for _ in "kv"]
    qkv, position, slot = torch.randn(1, 6 * 16).half(), torch.tensor([5]), torch.tensor([11])
    run = public("rope_and_write_kv", "triton")
    run(qkv, cache(16), position, slot, *small)
    run(qkv, cache(16), position, slot, *pages)
    for found, expected in zip(pages, small, strict=True):
        assert_equal(found[2, :, 3], expected[2, :, 3])


class TestSeveralGpus:
    """Triton launches on the current GPU, so the tensors' GPU is made current where there are several."""

    @pytest.fixture(autouse=True)
    def _cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two fake GPUs, the first of them current, and a launcher that notes which one is."""
        self.current, self.launched, self.switched, self.asked = 0, [], [], 0

        def current_device() -> int:
            self.asked += 1
            return self.current

        @contextmanager
        def device(index: int) -> Iterator[None]:
            before, self.current = self.current, index
            self.switched.append(index)
            try:
                yield
            finally:
                self.current = before

        def launch(*args: Any) -> None:
            self.launched.append(self.current)
            if args[2] < 0:
                raise RuntimeError("refused")

        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", current_device)
        monkeypatch.setattr(torch.cuda, "device", device)
        monkeypatch.setattr(OPS["rms_norm"], "launcher", lambda device: launch)
        monkeypatch.setattr(OPS["rms_norm"], "_bound", {})
        monkeypatch.delenv("FASTLLAMA_BACKEND", raising=False)

    def call(self, index: int, eps: float = 1e-5) -> None:
        OPS["rms_norm"].bound(torch.device("cuda", index))(None, None, eps, None)

    def test_each_call_launches_on_its_tensors_gpu(self) -> None:
        for index in (1, 0, 1):
            self.call(index)
        assert self.launched == [1, 0, 1]
        assert self.switched == [1, 1]  # tensors on the current GPU switch nothing
        assert self.current == 0

    def test_the_current_gpu_is_another_later(self) -> None:
        self.call(0)
        self.current = 1
        self.call(0)
        self.call(1)
        assert self.launched == [0, 0, 1]
        assert self.switched == [0]
        assert self.current == 1

    def test_a_refusal_leaves_the_callers_gpu_current(self) -> None:
        with pytest.raises(RuntimeError, match="refused"):
            self.call(1, eps=-1.0)
        assert self.launched == [1]
        assert self.current == 0

    def test_one_gpu_pays_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        self.call(0)
        assert self.launched == [0]
        assert self.asked == 0
