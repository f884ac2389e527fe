"""The cost of HTTP: `fastllama serve` compared with a bare AsyncEngine, burst by burst in one run.

python -m benchmarks.serving [--streams 1 8 32 64] [--rounds 10] [--out FILE]
python -m benchmarks.serving --step-ms 5 --switch-interval 0.005 0.0005

A burst is a number of completions that start at once and stream the same number of tokens each. One process answers
them over HTTP; in another, tasks read the streams of its AsyncEngine: the same model, arguments, threads and kind of
event loop. Both take turns, in changing order, and the first round is not counted. Columns, each HTTP and direct:

tokens/s: of all streams, from the first request to the last token, and the median ratio of the two per round; goal
    0.95.
CPU us/token: CPU time of the serving process, all threads, model included. The median difference of the rounds is the
    cost of HTTP; goal 30 at most. It includes reading /proc's clock, and none of the client's work.
first ms: from a request to its first token while streams are running: the median of requests for one token, sent one
    after another, in separate bursts; and the difference, goal 5 at most.
all ms: time to first token of the streams of a burst, which all start at once.
gap ms: between two reads of a stream, p50 and p99. A late reader gets the tokens of two steps in one read.

The client is a separate process, which only reads bytes and times while a burst runs; its share of the CPU is printed.
On two cores engine, event loop and client compete, as they would not over a network, so that tokens/s and times favour
AsyncEngine; CPU time does not depend on it. --step-ms replaces the model by an asynchronous device, like a GPU, that
computes nothing and takes that long for a step: the p50 of the gap is then the step as clients see it. Only there does
sys.setswitchinterval matter much: between steps the engine's thread waits for the GIL, which the event loop holds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from benchmarks.serving.process import DirectProcess, ServerProcess
from benchmarks.serving.samples import Burst, Sample, percentile
from benchmarks.serving.settings import Settings
from benchmarks.serving.streams import StreamingClient
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.serve.server import SWITCH_SECONDS

Run = Callable[[Burst], Sample]
SEATS = 160  # sequences that run at once: probes must not wait for the streams to end
HEADINGS = (
    f"{'':>7} {'switch':>8} {'tokens/s':>17} {'':>5} {'CPU us/token':>15} {'':>6} {'first ms':>13} {'':>5} "
    f"{'all ms':>13} {'gap p50 ms':>13} {'gap p99 ms':>13} {'client':>6}\n"
    f"{'streams':>7} {'ms':>8} {'HTTP':>8} {'direct':>8} {'ratio':>5} {'HTTP':>7} {'direct':>7} {'diff':>6} "
    f"{'HTTP':>6} {'direct':>6} {'diff':>5} {'HTTP':>6} {'direct':>6} {'HTTP':>6} {'direct':>6} "
    f"{'HTTP':>6} {'direct':>6} {'CPU':>6}"
)


class Pair(NamedTuple):
    """Both contenders under one switch interval; None leaves the server's."""

    interval: float | None
    http: Run
    direct: Run


class Figures(NamedTuple):
    """Figures of one pair's rounds, times in seconds; the module's docstring defines them."""

    http: Sequence[Sample]
    direct: Sequence[Sample]

    def medians(self, value: Callable[[Sample], float]) -> tuple[float, float]:
        """Medians over the rounds."""
        return statistics.median(map(value, self.http)), statistics.median(map(value, self.direct))

    @property
    def ratio(self) -> float:
        """Median ratio of tokens/s."""
        pairs = zip(self.http, self.direct, strict=True)
        return statistics.median(http.tokens_per_second / direct.tokens_per_second for http, direct in pairs)

    @property
    def cpu_difference(self) -> float:
        """Median difference of CPU seconds per token."""
        pairs = zip(self.http, self.direct, strict=True)
        return statistics.median(http.cpu_per_token - direct.cpu_per_token for http, direct in pairs)

    @property
    def client_share(self) -> float:
        """Share of one core that the client used."""
        return statistics.median(sample.client_cpu_seconds / sample.seconds for sample in self.http)

    @property
    def first(self) -> tuple[float, float]:
        """Median time to first token of all probes."""
        http, direct = ([each for sample in side for each in sample.probes] for side in self)
        return statistics.median(http), statistics.median(direct)

    @property
    def first_of_all(self) -> tuple[float, float]:
        """Median time to first token of all streams."""
        http, direct = ([each for sample in side for each in sample.first] for side in self)
        return statistics.median(http), statistics.median(direct)

    def gap(self, percent: int) -> tuple[float, float]:
        """A percentile of the gaps of all streams."""
        http, direct = ([each for sample in side for each in sample.gaps] for side in self)
        return percentile(http, percent), percentile(direct, percent)

    def line(self, streams: int, interval: float | None) -> str:
        """A row of the table."""
        speed, cpu = (
            self.medians(lambda sample: sample.tokens_per_second),
            self.medians(lambda sample: sample.cpu_per_token),
        )
        times = (self.first, self.first_of_all, self.gap(50), self.gap(99))
        first, all_, p50, p99 = ([1e3 * each for each in pair] for pair in times)
        switch = "server's" if interval is None else f"{1e3 * interval:g}"
        return (
            f"{streams:7} {switch:>8} {speed[0]:8.0f} {speed[1]:8.0f} {self.ratio:5.2f} "
            f"{1e6 * cpu[0]:7.1f} {1e6 * cpu[1]:7.1f} {1e6 * self.cpu_difference:6.1f} "
            f"{first[0]:6.1f} {first[1]:6.1f} {first[0] - first[1]:5.1f} "
            f"{all_[0]:6.1f} {all_[1]:6.1f} {p50[0]:6.2f} {p50[1]:6.2f} {p99[0]:6.2f} {p99[1]:6.2f} "
            f"{self.client_share:6.0%}"
        )

    def record(self, streams: int, interval: float | None) -> dict[str, Any]:
        """The row and its samples, for a file; gaps, which are many, as percentiles of each round."""
        percents = (10, 50, 90, 99, 100)

        def raw(sample: Sample) -> dict[str, Any]:
            gaps = {f"p{percent}": percentile(sample.gaps, percent) for percent in percents}
            return asdict(sample) | {"gaps": {"count": len(sample.gaps), **gaps}}

        return {
            "streams": streams,
            "switch_interval": interval,
            "ratio": self.ratio,
            "cpu_seconds_per_token_beyond_direct": self.cpu_difference,
            "first_token_seconds": self.first,
            "first_token_seconds_of_all_at_once": self.first_of_all,
            "gap_seconds": {f"p{percent}": self.gap(percent) for percent in percents},
            "http": [raw(sample) for sample in self.http],
            "direct": [raw(sample) for sample in self.direct],
        }


def tokens_of(streams: int) -> int:
    """Tokens of each stream: at least 768 in a burst, so that its CPU time is measurable."""
    return max(128, 768 // streams)


def take_turns(pairs: Sequence[Pair], streams: int, rounds: int) -> list[Figures]:
    """Samples of each contender, after a warm-up round; every second round runs them in reverse order."""
    burst = Burst(streams, tokens_of(streams))
    probed = replace(burst, probed=True)
    runs = [run for pair in pairs for run in (pair.http, pair.direct)]
    samples: list[list[Sample]] = [[] for _ in runs]
    for number in range(rounds + 1):
        order = list(range(len(runs)))
        for place in order if number % 2 else reversed(order):
            sample = replace(runs[place](burst), probes=runs[place](probed).probes)
            if number:
                samples[place].append(sample)
    return [Figures(http, direct) for http, direct in zip(samples[::2], samples[1::2], strict=True)]


def start(interval: float | None, step_seconds: float | None, within: ExitStack) -> Pair:
    """Start the two processes of a pair, which end with `within`."""
    settings = Settings(step_seconds=step_seconds, switch_interval=interval, llm={"max_num_seqs": SEATS})
    server = within.enter_context(ServerProcess(settings))
    client = StreamingClient(server)
    within.callback(client.close)
    if interval is None:
        settings = replace(settings, switch_interval=SWITCH_SECONDS)
    direct = within.enter_context(DirectProcess(settings))
    return Pair(interval, client.run, lambda burst: Sample(**direct.ask(asdict(burst))))


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 8, 32, 64], help="concurrent streams (default 1 8 32 64)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="counted rounds (default 10)")
    parser.add_argument("--step-ms", type=float, help="step time of an emulated device (default: the real model)")
    parser.add_argument(
        "--switch-interval", type=float, nargs="+", default=[None], help="seconds, of both (default: as the server's)"
    )
    parser.add_argument("--out", type=output_file, help="where to write conditions and samples as JSON")
    return parser.parse_args(arguments)


def main() -> None:
    """Take the measurements, print the table, write the file."""
    asked = options()
    step_seconds = None if asked.step_ms is None else asked.step_ms / 1e3
    results = []
    with ExitStack() as processes:
        pairs = [start(interval, step_seconds, processes) for interval in asked.switch_interval]
        print(HEADINGS)
        for streams in asked.streams:
            for pair, figures in zip(pairs, take_turns(pairs, streams, asked.rounds), strict=True):
                print(figures.line(streams, pair.interval), flush=True)
                results.append(figures.record(streams, pair.interval))
    if asked.out is not None:
        record = {"benchmark": "serving", "environment": environment(), "step_seconds": step_seconds}
        write_record(asked.out, record | {"rounds": asked.rounds, "results": results})


if __name__ == "__main__":
    main()
