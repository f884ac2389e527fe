"""Calls of every op, small and large, in a separate process: `python -m tests.kernels.numba.mixed_calls SCENARIO`.

A scenario prints nothing if it passes. The parent process enforces the time limit.
"""

from __future__ import annotations

import copy
import hashlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.catalogue.arguments import as_written, in_order
from fastllama.catalogue.maker import Maker
from fastllama.catalogue.sizes import LlamaSizes
from fastllama.catalogue.table import CATALOGUE, Shape, small_call

SIZES = LlamaSizes("some", hidden=256, intermediate=352, heads=4, kv_heads=2, head_dim=64, vocab=2000)
MANY = 200  # rows: helpers wake for them
# At so many rows, these matmuls are torch's.
PROMPTS = {f"{op}, {MANY}" for op in ("matmul", "matmul_bf12")}
CONVERSIONS = ("quantize_int4", "quantize_int8", "pack_int4", "pack_int8", "pack_bf12")
CHILD_SECONDS = 40
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def calls() -> dict[str, Call]:
    """By name: every op's small call, its calls in a Llama, and the conversions of weights."""
    torch.manual_seed(0)
    made = {f"{op}, small": (op, small_call(op)) for op in CATALOGUE}
    for rows in (1, 4, MANY):
        maker, shape = Maker(torch.bfloat16), Shape(rows, context=MANY)
        made |= {
            f"{op}, {rows}": (op, in_order(op, entry.llama(maker, SIZES, shape))) for op, entry in CATALOGUE.items()
        }
    found: dict[str, Call] = {name: (getattr(kernels, op), *as_written(op, call)) for name, (op, call) in made.items()}
    weight = torch.randn(256, 1024).bfloat16()
    found["quantize_int4"] = kernels.quantize_int4, (weight, 64), {}
    found["quantize_int8"] = kernels.quantize_int8, (weight, 64), {}
    found["pack_int4"] = kernels.pack_int4, (kernels.quantize_int4(weight, 64)[0],), {}
    found["pack_int8"] = kernels.pack_int8, (kernels.quantize_int8(weight, 64)[0],), {}
    found["pack_bf12"] = kernels.pack_bf12, (weight,), {}
    return found


def by_numba(found: dict[str, Call], conversions: bool = False) -> dict[str, Call]:
    """The calls that run on Numba alone; with conversions, whose arguments torch checks, on request."""
    ours = {name for name, each in kernels.backend_of("cpu").items() if each.backend == "numba"}
    ours |= set(CONVERSIONS) if conversions else set()
    return {name: call for name, call in found.items() if name.split(",")[0] in ours and name not in PROMPTS}


def bits(values: Iterable[Any]) -> str:
    """A hash over the tensors of a result, computed without torch's ops."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(value.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, tuple):
            digest.update(bits(value).encode())
    return digest.hexdigest()


def results(found: dict[str, Call]) -> dict[str, str]:
    """Hashes of all that each call writes and returns; `found` is not changed."""
    return run(copy.deepcopy(found))


def run(found: dict[str, Call], note: Callable[[str], None] = lambda name: None) -> dict[str, str]:
    """The same, for calls whose tensors may be overwritten."""
    hashes = {}
    for name, (function, args, named) in found.items():
        note(name)
        hashes[name] = bits([function(*args, **named), *args, *named.values()])
    return hashes


def check(found: dict[str, str], expected: dict[str, str], where: str) -> None:
    wrong = [name for name in found if found[name] != expected[name]]
    if wrong:
        raise SystemExit(f"other bits {where}: {wrong}")


def fork(work: Callable[[Callable[[str], None]], None], where: str) -> None:
    """Do work(note) in a child, which must end in time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(CHILD_SECONDS)  # ends it, whatever it waits for
        status = 1
        try:
            work(lambda name: os.write(writer, f"{name}\n".encode()) and None)
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        os._exit(status)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        notes = file.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise SystemExit(f"a forked child {where}: exit status {status}, last in {notes[-1:]}")


def forked() -> None:
    """A child runs what its parent ran on two threads: everything on one, then Numba's kernels on two."""
    found = calls()
    torch.set_num_threads(1)
    alone = results(found)
    torch.set_num_threads(2)
    results(found)  # torch's threads have started
    ours, all_of_it = copy.deepcopy(by_numba(found)), copy.deepcopy(found)

    def work(note: Callable[[str], None]) -> None:
        check(run(all_of_it, note), alone, "in a child")
        torch.set_num_threads(2)
        check(run(ours, note), alone, "in a child on two threads")
        helpers = [each for each in threading.enumerate() if each.name.startswith("fastllama")]
        assert len(helpers) == 1

    fork(work, "that runs everything")
    check(results(by_numba(found)), alone, "in its parent")


def forked_amid() -> None:
    """Children forked while the parent's other threads are in the middle of kernels."""
    torch.set_num_threads(2)
    found = by_numba(calls())
    alone, is_over = results(found), threading.Event()

    def go_on() -> None:
        torch.set_num_threads(2)
        while not is_over.is_set():
            check(results(found), alone, "beside forks")

    others = [threading.Thread(target=go_on) for _ in range(2)]
    for each in others:
        each.start()
    try:
        for _ in range(6):
            copied = copy.deepcopy(found)
            fork(lambda note, copied=copied: check(run(copied, note), alone, "in a child"), "amid kernels")
    finally:
        is_over.set()
        for each in others:
            each.join()


def forked_amid_compilation() -> None:
    """A child forked while another thread compiles, which the child has to do as well; needs an empty cache."""
    from numba.core import event

    begun = threading.Event()

    class Noted(event.Listener):
        def on_start(self, event: Any) -> None:
            begun.set()

        def on_end(self, event: Any) -> None:
            pass

    torch.set_num_threads(1)
    event.register("numba:compile", Noted())
    logits, x, weight = torch.randn(1, 1000), torch.randn(2, 64), torch.ones(64)
    parameters = {"temperature": torch.ones(1), "top_k": torch.full((1,), 5), "top_p": torch.full((1,), 0.9)}
    parameters |= {"min_p": torch.zeros(1), "seed": torch.ones(1).long(), "offset": torch.ones(1).long()}
    other = threading.Thread(target=lambda: kernels.sample(logits, **parameters))
    other.start()
    begun.wait()

    def work(note: Callable[[str], None]) -> None:
        note("rms_norm")
        kernels.rms_norm(x, weight)

    fork(work, "amid compilation")
    other.join()


def at_once() -> None:
    """Four Python threads run all ops, each starting at another one."""
    torch.set_num_threads(2)
    found = by_numba(calls(), conversions=True)
    alone, names, failures = results(found), list(found), []

    def work(number: int) -> None:
        torch.set_num_threads(2)
        turned = names[number * len(names) // 4 :] + names[: number * len(names) // 4]
        try:
            for _ in range(3):
                check(results({name: found[name] for name in turned}), alone, "beside other threads")
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if failures:
        raise SystemExit(failures[0])


def counts() -> None:
    """One, two and four of torch's threads."""
    found = by_numba(calls(), conversions=True)
    torch.set_num_threads(1)
    alone = results(found)
    for count in (2, 4):
        torch.set_num_threads(count)
        for _ in range(2):
            check(results(found), alone, f"on {count} threads")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of Python 3.12, for it finds threads at a fork
    {each.__name__: each for each in (forked, forked_amid, forked_amid_compilation, at_once, counts)}[sys.argv[1]]()
