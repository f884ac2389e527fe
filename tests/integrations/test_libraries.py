"""A patched model with PEFT, accelerate, safetensors and FSDP: right numbers, whole files, named in the report."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import safetensors.torch
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_execution_device_hook
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import fastllama
from tests.integrations.models import IDS, SIZES, VOCAB, assert_close, llama, on_our_ops, pair

ALL = SIZES["num_hidden_layers"]
OWN_CODE = "ignore:layers of a patched model run transformers' own code"


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.filterwarnings(OWN_CODE)
@pytest.mark.filterwarnings("ignore:patched 0 of")
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when: str) -> None:
    stock = llama()
    patched = copy.deepcopy(stock)
    if when == "after":
        fastllama.patch(patched)
    stock, patched = adapted(stock), adapted(patched)
    if when == "before":
        report = fastllama.patch(patched)
        assert (report.patched, len(report.left)) == (0, ALL)
        assert set(report.left.values()) == {"q_proj is a peft.tuners.lora.layer.Linear"}
    with torch.no_grad():
        assert_close(patched(IDS).logits, stock(IDS).logits)
        with patched.disable_adapter(), stock.disable_adapter():
            assert_close(patched(IDS).logits, stock(IDS).logits)
        stock, patched = stock.merge_and_unload(), patched.merge_and_unload()
        assert fastllama.patch(patched, strict=True).patched == ALL
        assert_close(patched(IDS).logits, stock(IDS).logits)
    assert on_our_ops(patched)


@pytest.mark.filterwarnings(OWN_CODE)
def test_lora_is_trained_on_a_patched_model() -> None:
    found = []
    for patched in (False, True):
        model = llama()
        if patched:
            fastllama.patch(model)
        model = adapted(model).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found.append(model.eval()(IDS).logits)
    assert_close(found[1], found[0], bound=1e-4)


def test_hooks_that_move_inputs_to_a_device_are_passed_over() -> None:
    """As accelerate spreads a model over GPUs: by a hook on each layer and each module in it."""
    stock = llama()
    patched = copy.deepcopy(stock)
    for layer in patched.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        attach_execution_device_hook(layer, "cpu")
    add_hook_to_module(patched.model.norm, AlignDevicesHook(execution_device="cpu"))
    report = fastllama.patch(patched, strict=True)
    assert (report.patched, report.norms) == (ALL, 1)
    with torch.no_grad():
        assert_close(patched(IDS).logits, stock(IDS).logits)
        assert on_our_ops(patched)
        fastllama.unpatch(patched)
        assert torch.equal(patched(IDS).logits, stock(IDS).logits)


class Doubles(AlignDevicesHook):
    """A hook that does more."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return 2 * output


@pytest.mark.filterwarnings(OWN_CODE)
@pytest.mark.parametrize("append", [False, True])
def test_a_hook_in_another_ones_place_is_noticed(append: bool) -> None:
    stock, patched = pair()
    with torch.no_grad():
        for model in (stock, patched):
            add_hook_to_module(model.model.layers[1].mlp, AlignDevicesHook(execution_device="cpu"))
        patched(IDS)
        for model in (stock, patched):
            add_hook_to_module(model.model.layers[1].mlp, Doubles(execution_device="cpu"), append=append)
        assert_close(patched(IDS).logits, stock(IDS).logits)


@pytest.mark.filterwarnings(OWN_CODE)
@pytest.mark.filterwarnings("ignore:patched 0 of")
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_weights(when: str) -> None:
    stock = llama()
    patched = copy.deepcopy(stock)
    if when == "after":
        fastllama.patch(patched)
    accelerate.cpu_offload(patched, execution_device=torch.device("cpu"))
    if when == "before":
        assert "meta device: offloaded" in next(iter(fastllama.patch(patched).left.values()))
    with torch.no_grad():
        for _ in range(2):
            assert_close(patched(IDS).logits, stock(IDS).logits)


@pytest.mark.parametrize("still", [True, False], ids=["patched", "unpatched"])
def test_files_of_other_libraries_are_whole(still: bool, tmp_path: Path) -> None:
    """Both take two tensors of one storage for two names of one tensor, and drop the second."""
    stock, patched = pair()
    if not still:
        fastllama.unpatch(patched)
    safetensors.torch.save_model(patched, str(tmp_path / "alone.safetensors"))
    accelerate.Accelerator(cpu=True).save_model(patched, tmp_path)
    sizes = []
    for model in (stock, patched):
        torch.save(model.model.layers[0].self_attn.k_proj.weight, tmp_path / "one.pt")
        sizes.append((tmp_path / "one.pt").stat().st_size)
    assert sizes[0] == sizes[1]
    for name in ("alone.safetensors", "model.safetensors"):
        found = safetensors.torch.load_file(tmp_path / name)
        assert found.keys() == stock.state_dict().keys()
        assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in found.items())


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore")  # FSDP's warning about one process
@pytest.mark.parametrize("when", ["before", "after"])
def test_sharded_weights_are_gathered_anew(when: str) -> None:
    stock, patched = llama(), llama()
    if when == "after":
        fastllama.patch(patched)
    for layer in patched.model.layers:
        fully_shard(layer, mesh=distributed.init_device_mesh("cpu", (1,)))
    if when == "before":
        assert fastllama.patch(patched).patched == 0
    for model in (stock, patched):
        optimizer = torch.optim.SGD(model.model.layers.parameters(), lr=0.1)
        for step in range(2):
            ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(step))
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        assert_close(patched(IDS).logits, stock(IDS).logits, bound=1e-4)
