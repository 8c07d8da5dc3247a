"""Chunks of observations to scores, in this process or another."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from feature_pipeline import (
    MICROSECONDS_PER_HOUR,
    NO_TIME,
    SET_ASIDE_REASONS,
    BadObservations,
    Codes,
    Observations,
    ProductionPipeline,
    Rows,
    SiteCodes,
    iso_times,
    read_rows,
)
from monitoring.log import OFF
from serving.batch.reading import Chunk, Chunks
from serving.deployed import LAST, ServedModel, moments_of

FEATURE_CELLS = 10_000_000  # of the feature matrix held at once by a thread: 80 MB
THREAD_ROWS = 400_000  # parsed and validated at once by a thread: about 150 MB
LEAST_ROWS, LEAST_CHUNKS, ROW_BYTES = 100_000, 4, 64  # fewer of a smaller file, so that all threads have some
PART_ROWS = 250_000  # put in order at once
MOST_PARTS = 60_000  # their numbers fit in 16 bits


class Moment(NamedTuple):
    """What a run scores for, see `moments_of`; rows later than `now` (seconds since 1970) are set aside."""

    as_of: str = LAST
    now: float | None = None


@dataclass
class Scores:
    """The scores of a table: `visits` with the columns ``number`` (in order of first appearance), ``visit_id``,
    ``client``, ``sepsis_probability``, ``risk_level``, ``reason``, ``as_of`` (microseconds), ``hours_since_newest``;
    the codes with a usable value; rows of codes that the model does not use; the number of visits with a usable row;
    rows that the prediction log lost meanwhile."""

    visits: pa.Table
    codes: set[str]
    unused_codes: Counter[str]
    usable_visits: int
    unlogged: int

    @classmethod
    def merged(cls, parts: Sequence[Scores]) -> Scores:
        return cls(
            pa.concat_tables([part.visits for part in parts]).sort_by("number"),
            set().union(*(part.codes for part in parts)),
            sum((part.unused_codes for part in parts), Counter()),
            sum(part.usable_visits for part in parts),
            sum(part.unlogged for part in parts),
        )


@dataclass
class FileScores:
    """The scores of a file, the number of its rows, and by reason those that were not used."""

    scores: Scores
    rows: int
    set_aside: Counter[str]


OUTPUT_TYPES = {
    "visit_id": pa.string(),
    "client": pa.string(),
    "sepsis_probability": pa.float64(),
    "risk_level": pa.string(),
    "reason": pa.string(),  # of UNKNOWN
    "as_of": pa.string(),
    "hours_since_newest": pa.float64(),  # from the newest observation that the model uses
    "processed_at": pa.string(),
    "model_version": pa.string(),
}


def output_frame(visits: pa.Table, processed_at: str, model_version: str) -> pd.DataFrame:
    """`Scores.visits` as they are written, with the columns of `OUTPUT_TYPES`."""
    n = visits.num_rows
    columns = {name: visits[name] for name in visits.column_names if name in OUTPUT_TYPES}
    columns["as_of"] = pa.array(iso_times(visits["as_of"].to_numpy()), pa.string())
    columns |= {"processed_at": pa.repeat(processed_at, n), "model_version": pa.repeat(model_version, n)}
    table = pa.table([columns[name] for name in OUTPUT_TYPES], pa.schema(OUTPUT_TYPES))
    # the same types whatever the rows: a column of nothing but None would be another one
    return table.to_pandas(types_mapper={pa.string(): pd.StringDtype(na_value=np.nan)}.get)


def scores_of(model: ServedModel, moment: Moment, observations: Observations, number: np.ndarray) -> Scores:
    """The scores of whole visits. `number` (n_visits,) is the place of each in the output."""
    visit, moments = np.arange(observations.n_visits), moments_of(observations, *moment)
    block = max(1, FEATURE_CELLS // len(model.pipeline.feature_names))
    parts = [
        model.score(observations, visit[start : start + block], moments[start : start + block])
        for start in range(0, max(len(visit), 1), block)
    ]
    newest = np.concatenate([part.newest for part in parts])
    known = newest != NO_TIME
    scored = pa.table(
        {
            "number": pa.array(number, pa.int64()),
            "visit_id": pa.array(observations.visit_text, pa.string()),
            "client": pa.array(observations.client_text, pa.string()),
            "sepsis_probability": pa.array(np.concatenate([part.probability for part in parts]), pa.float64()),
            "risk_level": pa.array(np.concatenate([part.level for part in parts]), pa.string()),
            "reason": pa.array(np.concatenate([part.reason for part in parts]), pa.string()),
            "as_of": pa.array(moments, pa.int64()),
            "hours_since_newest": pa.array(
                np.round((moments - newest) / MICROSECONDS_PER_HOUR, 3), pa.float64(), mask=~known
            ),
        }
    )
    return Scores(
        scored,
        {observations.codes[code] for code in np.unique(observations.group_code)},
        Counter(model.pipeline.unused_codes(observations)),
        int((observations.first_time != NO_TIME).sum()),
        model.log.newly_lost(),
    )


BETWEEN = "\ufffd"  # client and visit_id: neither holds it, for then the row would be set aside as `not_utf8`
ROW = np.dtype([("visit", "i4"), ("code", "i4"), ("time", "i8"), ("value", "f8"), ("low", "f8"), ("high", "f8")])


@dataclass
class Part:
    """All validated rows of some visits."""

    visits: list[str]  # client `BETWEEN` visit_id
    number: np.ndarray  # of each visit in the file
    codes: list[str]
    rows: list[bytes]  # of `ROW`; the visit is a place in `visits`, the code one in `codes`

    def observations(self, codes: Codes) -> Observations:
        names = np.array([visit.split(BETWEEN) for visit in self.visits], dtype=object).reshape(-1, 2)
        client, visit_id = names[:, 0], names[:, 1]
        known = sorted(self.codes)
        concepts = tuple(codes.meaning(code)[0] for code in known)
        place = np.array([known.index(code) for code in self.codes], dtype=np.int64)
        rows = np.frombuffer(b"".join(self.rows), ROW)
        return Rows(
            Observations.without_rows(visit_id, client, visit_id, client, tuple(known), concepts),
            rows["visit"].astype(np.int64),
            place[rows["code"]],
            {name: np.ascontiguousarray(rows[name]) for name in ("time", "value", "low", "high")},
        ).in_order()


class Parts:
    """Validated rows, cut by visit: every row of a visit lies in the same part. The rows are in an unnamed temporary
    file, which the system frees even when the process is killed."""

    def __init__(self, directory: str | Path | None, n_parts: int):
        self.file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (lives as long as the parts)
        self.blocks: list[list[tuple[int, int]]] = [[] for _ in range(n_parts)]
        # of visits, and of codes, in order of first appearance: a new one gets the next number
        self.numbers: defaultdict[str, int] = defaultdict(count().__next__)
        self.codes: defaultdict[str, int] = defaultdict(count().__next__)

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, rows: Rows) -> None:
        """Appends the next rows of the file."""
        n_parts, known = len(self.blocks), rows.known
        visits = (known.client_text + BETWEEN + known.visit_text).tolist()  # looked up twice as fast as pairs
        visit = np.fromiter(map(self.numbers.__getitem__, visits), np.int64)
        code = np.fromiter(map(self.codes.__getitem__, known.codes), np.int64)
        part = (visit % n_parts).astype(np.uint16)[rows.visit]  # NumPy sorts these by counting
        order = np.argsort(part, kind="stable")
        bounds = np.searchsorted(part[order], np.arange(n_parts + 1))
        table = np.empty(len(order), ROW)
        table["visit"], table["code"] = (visit // n_parts)[rows.visit[order]], code[rows.code[order]]
        for name, column in rows.columns.items():
            table[name] = column[order]
        start = self.file.tell()
        self.file.write(table)
        for blocks, (first, end) in zip(self.blocks, pairwise((start + bounds * ROW.itemsize).tolist()), strict=True):
            if end > first:
                blocks.append((first, end - first))

    def __iter__(self) -> Iterator[Part]:
        n_parts, visits, codes = len(self.blocks), list(self.numbers), list(self.codes)
        for part, blocks in enumerate(self.blocks):
            rows = []
            for offset, length in blocks:
                self.file.seek(offset)
                rows.append(self.file.read(length))
            yield Part(visits[part::n_parts], np.arange(part, len(visits), n_parts), codes, rows)


def described(set_aside: Counter[str]) -> str:
    return "; ".join(f"{n:,} rows: {SET_ASIDE_REASONS[reason]}" for reason, n in sorted(set_aside.items()))


@dataclass(frozen=True)
class Deployment:
    """What one run uses everywhere, also when the files are replaced meanwhile: config and model as bytes."""

    config: bytes
    model: bytes
    site_codes: SiteCodes = field(default_factory=dict)
    monitor: str = OFF  # URL of the prediction log
    directory: Path | None = None  # of the models, for a challenger

    @cached_property
    def version(self) -> str:
        """What decides over the scores. The config names the model's SHA-256."""
        return hashlib.sha256(self.config + json.dumps(sorted(self.site_codes.items())).encode()).hexdigest()

    @cached_property
    def key(self) -> str:
        """Differs also where predictions are logged elsewhere, or another challenger scores."""
        return hashlib.sha256(f"{self.version} {self.monitor} {self.directory}".encode()).hexdigest()


models: dict[str, ServedModel] = {}  # of this process, by deployment


def install(deployment: Deployment, model: ServedModel | None = None) -> None:
    """Makes the deployment ready in this process, once: `model` where it is loaded already."""
    if deployment.key in models:
        return
    if model is None:
        with tempfile.TemporaryDirectory() as folder:
            config, file = Path(folder, "config.json"), Path(folder, "model.pkl")
            config.write_bytes(deployment.config)
            file.write_bytes(deployment.model)
            pipeline = ProductionPipeline(config, file, deployment.site_codes)
        model = ServedModel(pipeline, "batch", deployment.monitor, directory=deployment.directory)
    models[deployment.key] = model


def read_chunk(key: str, moment: Moment, chunk: Chunk) -> tuple[Rows, int, int]:
    """(the validated rows, the number of malformed lines, the position in the file after them)."""
    frame, malformed = chunk.parse()
    now = None if moment.now is None else int(moment.now * 1e6)
    return read_rows(frame, models[key].pipeline.reproducer.codes, now), malformed, chunk.position


def score_part(key: str, moment: Moment, part: Part) -> Scores:
    model = models[key]
    return scores_of(model, moment, part.observations(model.pipeline.reproducer.codes), part.number)


class StillWritten(Exception):
    """A file is not as it was when its turn came."""


def state_of(stat: os.stat_result) -> list[int]:
    """By which a file is known again: another one of the same size and time has another inode."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def score_file(
    key: str,
    moment: Moment,
    path: Path,
    state: list[int],
    chunk_rows: int,
    spill_dir: str | Path | None,
    read_with: Callable[..., Iterator[tuple[Rows, int, int]]] = map,
    score_with: Callable[..., Iterator[Scores]] = map,
    advance: Callable[[int], Any] = lambda position: None,
) -> FileScores:
    """The scores of a whole file with the deployment `key`: straight when one chunk holds it all, else part by part.

    `read_with` and `score_with` do what `map` does, where the work is to be done. Raises `BadObservations`, and
    `StillWritten` when the file, once read, is not in the `state` that it was found in; nothing is logged then.
    """
    n_rows, set_aside = 0, Counter[str]()

    def counted(read: tuple[Rows, int, int]) -> Rows:
        nonlocal n_rows
        rows, malformed, position = read
        n_rows += len(rows.known.visit_of_row)
        set_aside.update(rows.known.set_aside | ({"malformed": malformed} if malformed else {}))
        advance(position)
        return rows

    def check_state() -> None:
        if state_of(os.stat(path)) != state:
            raise StillWritten

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at_once = min(max(size // LEAST_CHUNKS // ROW_BYTES, LEAST_ROWS), THREAD_ROWS, chunk_rows)
        chunks = Chunks(file, path.name, size, at_once)
        reader = read_with(partial(read_chunk, key, moment), chunks)
        read = next(reader)
        first, second = counted(read), next(reader, None)
        if second is None:
            check_state()
            observations = first.in_order()
            scores = scores_of(models[key], moment, observations, np.arange(observations.n_visits))
        else:
            part_rows = max(min(chunk_rows // 2, PART_ROWS), 1)  # parts are of uneven size
            n_parts = -(-max(n_rows, chunks.chunk_rows) * chunks.size // (max(read[2], 1) * part_rows))
            with Parts(spill_dir, min(n_parts, MOST_PARTS)) as parts:
                parts.add(first)
                for read in chain([second], reader):
                    parts.add(counted(read))
                check_state()
                scores = Scores.merged(list(score_with(partial(score_part, key, moment), parts)))
    if not scores.usable_visits:
        raise BadObservations(
            f"file {path.name!r}: no usable observation in {n_rows:,} rows ({described(set_aside) or 'empty'})"
        )
    return FileScores(scores, n_rows, set_aside)
