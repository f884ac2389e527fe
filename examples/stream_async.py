"""Stream answers to several users at once: two read to the end, one has a deadline, one leaves early.

python examples/stream_async.py [MODEL] [--device cuda]

One AsyncEngine runs all requests in one batch; each user is an asyncio task that iterates over deltas.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from contextlib import aclosing

from fastllama import LLM, AsyncEngine, SamplingParams

START = time.perf_counter()
LONG = SamplingParams(temperature=0.8, seed=1, max_tokens=400, ignore_eos=True)


def log(prompt: str, text: str) -> None:
    """Print a line with the seconds since the program's start."""
    print(f"{time.perf_counter() - START:5.2f} s  {prompt:<19} {text.strip()}", flush=True)


async def reader(engine: AsyncEngine, prompt: str, pause: float) -> None:
    """Read an answer to its end, resting between deltas: the tokens that come meanwhile are one delta."""
    deltas, stream = 0, engine.add_request(prompt, SamplingParams(temperature=0.8, seed=1, max_tokens=48))
    async for delta in stream:
        log(prompt, "".join(sample.text for sample in delta.outputs))
        deltas += 1
        await asyncio.sleep(pause)
    log(prompt, f"-- {stream.output().metrics.num_generated_tokens} tokens in {deltas} deltas")


async def hurried(engine: AsyncEngine, prompt: str) -> None:
    """Take what there is after 0.2 s: a deadline ends the answer, and raises nothing."""
    answer = (await engine.generate(prompt, LONG, deadline=0.2)).outputs[0]
    log(prompt, f"-- {answer.finish_reason} after {len(answer.token_ids)} tokens: {answer.text}")


async def leaver(engine: AsyncEngine, prompt: str) -> None:
    """Leave the loop after ten words: `aclosing` aborts the request, and its KV pages are free for others."""
    text = ""
    async with aclosing(engine.add_request(prompt, LONG)) as stream:
        async for delta in stream:
            text += delta.outputs[0].text
            if len(text.split()) >= 10:
                break
    log(prompt, f"-- left: {text}")


async def serve(llm: LLM) -> None:
    """Serve all users at once, and print what the engine counted."""
    async with AsyncEngine(llm) as engine:
        await asyncio.gather(
            reader(engine, "Once upon a time", pause=0.05),
            reader(engine, "The old baker", pause=0.1),
            hurried(engine, "The dog was hungry."),
            leaver(engine, "A fox met a bear."),
        )
        await engine.drain()  # the aborted request has returned its pages
        counted = engine.statistics()
    print(f"{counted.num_generated_tokens} tokens, samples ended: {dict(counted.num_finished)}", end=", ")
    print(f"{counted.num_available_pages} of {counted.num_pages} KV pages free")


def main() -> None:
    """Load the model, compile its kernels with a first request, and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    with LLM(options.model, device=options.device) as llm:
        llm.generate("Once", SamplingParams(max_tokens=2))
        asyncio.run(serve(llm))


if __name__ == "__main__":
    main()
