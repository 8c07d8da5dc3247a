"""The live stream on one core: observations a second through add-and-score, latency, memory, beside the guide's way.

The guide's way keeps a list of records a visit, and makes a new DataFrame of it at every score. With --observations a
file's rows are replayed in order of time, at full speed, and the last score of every visit compared with the batch's.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.features import clean
from common.command_line import DONE, SOME_FAILED, make_parser, number, run, spare_the_loaded
from feature_pipeline import COLUMNS, ProductionPipeline, read_observations, resolve_snapshots
from serving.deployed import LAST
from serving.stream.alerts import AlertBook, AlertSinks
from serving.stream.feed import Feed
from serving.stream.journal import Journal
from serving.stream.visits import Visit
from sources.demo_cohort import make_demo_cohort
from stream_processor import StreamProcessor


def open_visits(n_visits: int, length: int) -> list[list[dict[str, Any]]]:
    """Records of synthetic visits of `length` observations each, in order of time."""
    frame = clean(make_demo_cohort(n_patients=1000, seed=3)[0])
    frame = frame.sort_values("observation_date", kind="stable")
    frame["observation_date"] = frame["observation_date"].dt.strftime("%Y-%m-%dT%H:%M:%S")
    sizes = frame["visit_id"].value_counts()
    chosen = [part.head(length).to_dict("records") for _, part in frame.groupby("visit_id") if len(part) >= length]
    assert len(chosen), f"no visit has {length} observations ({sizes.max()} at the most)"
    return [[{**row, "visit_id": f"v{k}"} for row in chosen[k % len(chosen)]] for k in range(n_visits)]


def records_of(frame: pd.DataFrame, batch: int) -> Iterator[list[dict[str, Any]]]:
    columns = [name for name in COLUMNS if name in frame.columns]
    for start in range(0, len(frame), batch):
        yield frame[columns].iloc[start : start + batch].to_dict("records")


def throughput(processor: StreamProcessor, arrivals: list[dict[str, Any]], batch: int) -> float:
    """Observations a second, every visit scored after each micro-batch it has changed in."""
    start = time.perf_counter()
    for k in range(0, len(arrivals), batch):
        processor.add_observations(arrivals[k : k + batch])
        processor.predict_due()
    return len(arrivals) / (time.perf_counter() - start)


def latencies(processor: StreamProcessor, arrivals: list[dict[str, Any]], rate: float) -> np.ndarray:
    """Milliseconds from each arrival, at fixed moments, until its visit's score is there."""
    waiting = deque(enumerate(arrivals))
    start = time.perf_counter()
    out = []
    while waiting:
        now, due = time.perf_counter() - start, []
        while waiting and waiting[0][0] / rate <= now:
            due.append(waiting.popleft())
        if not due:
            time.sleep(max(waiting[0][0] / rate - now, 0))
            continue
        processor.add_observations([row for _, row in due])
        processor.predict_due()
        done = time.perf_counter() - start
        out += [(done - n / rate) * 1e3 for n, _ in due]
    return np.array(out)


def guides_way(pipeline: ProductionPipeline, visits: list[list[dict[str, Any]]], repeats: int) -> float:
    """Observations a second: each is appended to its visit's list, of which a frame is made and scored."""
    seconds = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(repeats):
            buffer = list(visits[k % len(visits)])
            start = time.perf_counter()
            buffer.append(buffer[-1])
            frame = pd.DataFrame(buffer)
            frame["observation_date"] = pd.to_datetime(frame["observation_date"])
            pipeline.predict(frame)
            seconds.append(time.perf_counter() - start)
    return 1 / statistics.mean(seconds)


def synthetic(arguments: argparse.Namespace) -> int:
    process = psutil.Process()
    visits = open_visits(arguments.visits, arguments.length)
    processor = StreamProcessor(arguments.config, arguments.model, 1, as_of=LAST)
    spare_the_loaded()  # as the script does
    split = arguments.length - arguments.length // 8
    processor.add_observations(visits[0][:split])
    processor.predict_due()
    before = process.memory_info().rss
    for visit in visits:
        processor.add_observations(visit[:split])
    processor.settle()
    processor.predict_due()
    rows = sum(visit.n_rows for visit in processor.visits.values())
    kept = (process.memory_info().rss - before) / len(visits)
    print(f"{len(visits):,} open visits of {rows // len(visits)} observations, {kept / 1e3:.1f} kB each, one core")
    arrivals = [row for visit in visits for row in visit[split:]]
    np.random.default_rng(0).shuffle(arrivals)
    late = arrivals[: int(arguments.rate * arguments.seconds)]
    rest = arrivals[len(late) :]
    times = latencies(processor, late, arguments.rate)
    p50, p99 = np.percentile(times, [50, 99])
    print(f"at {arguments.rate:,.0f} observations/s: arrival to score p50 {p50:.1f} ms, p99 {p99:.1f} ms, "
          f"longest {times.max():.1f} ms")  # fmt: skip
    third = len(rest) // 3
    guide = guides_way(processor.pipeline, visits, 100)
    for k, batch in enumerate((500, 2000, 10_000)):
        rate = throughput(processor, rest[k * third : (k + 1) * third], batch)
        print(f"micro-batches of {batch:6,d}: {rate:9,.0f} observations/s, {rate / guide:,.0f} times the guide's way")
    print(f"guide's way (a frame a score): {guide:9,.0f} observations/s")
    return DONE


def replay(arguments: argparse.Namespace) -> int:
    frame = pd.read_parquet(arguments.observations).sort_values("observation_date", kind="stable")
    if arguments.patients:
        frame = frame[frame["client"].isin(frame["client"].unique()[: arguments.patients])]
    frame["observation_date"] = frame["observation_date"].dt.strftime("%Y-%m-%dT%H:%M:%S.%f")
    processor = StreamProcessor(arguments.config, arguments.model, 1, as_of=LAST)
    last: dict[tuple[str, str], float] = {}
    start, n_scores = time.perf_counter(), 0
    for records in records_of(frame, arguments.batch):
        processor.add_observations(records)
        for result in processor.predict_due():
            last[str(result["client"]), str(result["visit_id"])] = result["sepsis_probability"]
            n_scores += 1
    seconds = time.perf_counter() - start
    print(f"{len(frame):,} observations of {len(last):,} visits replayed in {seconds:.0f} s "
          f"({len(frame) / seconds:,.0f}/s), {n_scores:,} scores")  # fmt: skip
    observations = read_observations(frame, processor.pipeline.config.synonyms)
    visit, moments, _ = resolve_snapshots(observations)
    batch = dict(zip(observations.keys(), processor.pipeline.score(observations, visit, moments).tolist(), strict=True))
    batch = {key: p for key, p in batch.items() if p == p}
    different = [key for key, p in batch.items() if last.get(key) != p]
    print(f"{len(batch) - len(different):,} of {len(batch):,} last scores equal the batch's to the last bit")
    return SOME_FAILED if different or last.keys() != batch.keys() else DONE


def kept(arguments: argparse.Namespace) -> int:
    """A state file with all visits open: the longest stall while observations arrive, then a restart."""
    if arguments.restart:
        started = time.perf_counter()
        processor = StreamProcessor(arguments.config, arguments.model, 1, as_of=LAST)
        loaded = time.perf_counter()
        Feed(processor, AlertBook(), AlertSinks(), Journal(arguments.state), io.StringIO()).finish()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        rows = sum(visit.n_rows for visit in processor.visits.values())
        print(f"restart: {rows:,} observations of {len(processor.visits):,} visits in "
              f"{time.perf_counter() - loaded:.1f} s, with the model in {time.perf_counter() - started:.1f} s; "
              f"at most {peak:,.0f} MB")  # fmt: skip
        return DONE
    templates = open_visits(min(200, arguments.visits), arguments.length)
    read = StreamProcessor(arguments.config, arguments.model, 1, as_of=LAST)
    read.add_observations([row for visit in templates for row in visit])
    read.settle()
    rows = [np.concatenate(visit.rows) for visit in read.visits.values()]
    journal = Journal(arguments.state, arguments.durable)
    journal.load()
    meaning = read.pipeline.reproducer.codes.meaning_sha256
    for start in range(0, arguments.visits, 500):
        visits = [Visit("bench", f"v{n}", level="LOW") for n in range(start, min(start + 500, arguments.visits))]
        for part in range(10):  # as if they had come in ten parts
            for n, visit in enumerate(visits, start):
                visit.fresh = [np.array_split(rows[n % len(rows)], 10)[part]]
            journal.settle(visits, [], [], read.codes, set(), {}, meaning)
    journal.close()
    again = [sys.executable, __file__, "--restart", "--state", arguments.state]
    again += ["--config", arguments.config, "--model", arguments.model]
    if subprocess.run(again).returncode:
        return SOME_FAILED
    processor = StreamProcessor(arguments.config, arguments.model, 1, as_of=LAST, max_visits=10**9)
    feed = Feed(processor, AlertBook(), AlertSinks(), Journal(arguments.state, arguments.durable), io.StringIO())
    spare_the_loaded()
    calls, rng = [], np.random.default_rng(0)
    batch = max(int(arguments.rate * 0.05), 1)
    end = time.perf_counter() + arguments.seconds
    while (began := time.perf_counter()) < end:
        some = rng.integers(0, arguments.visits, batch).tolist()
        value = 80 + len(calls) % 40
        records = [
            {**templates[v % len(templates)][-1], "visit_id": f"v{v}", "client": "bench", "observation_value": value}
            for v in some
        ]
        feed.accept(records)
        feed.score()
        calls.append(time.perf_counter() - began)
        time.sleep(max(0.05 - calls[-1], 0))
    size = sum(path.stat().st_size for path in Path(arguments.state).parent.glob(f"{Path(arguments.state).name}*"))
    calls_ms = np.array(calls) * 1e3
    print(f"at {batch / 0.05:,.0f} observations/s: a micro-batch is accepted, scored and kept in "
          f"{np.median(calls_ms):.1f} ms (median), {np.percentile(calls_ms, 99):.0f} ms (p99), longest "
          f"{calls_ms.max():.0f} ms; {size / 1e6:,.0f} MB on disk")  # fmt: skip
    feed.finish()
    return DONE


def benchmark(arguments: argparse.Namespace) -> int:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if arguments.state:
        return kept(arguments)
    return replay(arguments) if arguments.observations else synthetic(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python benchmarks/stream.py", "config", "model")
    parser.add_argument("--visits", type=number(int, 1), default=5000, help="open at once")
    parser.add_argument("--length", type=number(int, 10), default=200, help="observations of each")
    parser.add_argument("--rate", type=number(float, 1), default=1000.0, help="observations a second, for the latency")
    parser.add_argument("--seconds", type=number(float, 1), default=20.0, help="of that rate")
    parser.add_argument("--observations", metavar="FILE", help="replay a .parquet file instead")
    parser.add_argument("--patients", type=number(int, 0), default=0, help="of the replay; 0 is all")
    parser.add_argument("--batch", type=number(int, 1), default=20_000, help="micro-batch of the replay")
    parser.add_argument("--state", metavar="FILE", help="measure a new state file of --visits by --length instead")
    parser.add_argument("--durable", action="store_true", help="what the state file acknowledged survives a power cut")
    parser.add_argument("--restart", action="store_true", help="measure only a restart from --state")
    return run(benchmark, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
