"""Chunks of observations to scores, in this process or another."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from feature_pipeline import (
    SET_ASIDE_REASONS,
    BadObservations,
    ProductionPipeline,
    resolve_snapshots,
    text_places,
)
from monitoring.log import OFF, PredictionLog
from serving.batch.reading import Chunks

FEATURE_CELLS = 10_000_000  # of the feature matrix held at once: 80 MB


@dataclass
class Scores:
    """What a table gives: `visits` with the columns ``row`` (of its first observation), ``visit_id``, ``client``,
    ``sepsis_probability`` (NaN where nothing is usable); `rows` read; rows not used by reason; codes with a usable
    value; visits with one."""

    visits: pa.Table
    rows: int
    set_aside: Counter[str]
    codes: set[str]
    usable_visits: int

    @classmethod
    def merged(cls, parts: Sequence[Scores]) -> Scores:
        return cls(
            pa.concat_tables([part.visits for part in parts]).sort_by("row"),
            sum(part.rows for part in parts),
            sum((part.set_aside for part in parts), Counter()),
            set().union(*(part.codes for part in parts)),
            sum(part.usable_visits for part in parts),
        )


def score_table(key: str, table: pd.DataFrame, row: np.ndarray) -> Scores:
    """Scores whole visits with the deployment `key`. `row` numbers the rows of `table` in the file, ascending."""
    pipeline, prediction_log = pipelines[key], logs.get(key)
    visit_index, visits = text_places(table["visit_id"])
    client_index, clients = text_places(table["client"])
    named = np.flatnonzero((visit_index >= 0) & (client_index >= 0))
    pair = client_index[named] * max(len(visits), 1) + visit_index[named]
    first = named[~pd.Series(pair).duplicated().to_numpy()]  # rows in which a visit appears first
    probability = np.full(len(first), np.nan)
    codes: set[str] = set()
    usable = 0
    try:
        observations = pipeline.reproducer.read(table)
        set_aside = observations.set_aside
    except BadObservations as error:  # no usable row here; the file's other parts may have some
        set_aside = error.set_aside
    else:
        visit, moments, _ = resolve_snapshots(observations)
        block = max(1, FEATURE_CELLS // len(pipeline.feature_names))
        for start in range(0, len(visit), block):
            some = slice(start, start + block)
            began = time.perf_counter()
            found = pipeline.assess(observations, visit[some], moments[some])
            probability[some] = found.probability
            if prediction_log:
                prediction_log.record(observations, visit[some], moments[some], found, time.perf_counter() - began)
        codes = {observations.codes[code] for code in np.unique(observations.group_code)}
        usable = int((~np.isnan(probability)).sum())
    scored = pa.table(
        {
            "row": pa.array(row[first], pa.int64()),
            "visit_id": pa.array(np.array(visits, dtype=object)[visit_index[first]], pa.string()),
            "client": pa.array(np.array(clients, dtype=object)[client_index[first]], pa.string()),
            "sepsis_probability": pa.array(probability, pa.float64()),
        }
    )
    return Scores(scored, len(table), Counter(set_aside), codes, usable)


class Parts:
    """A table cut by visit: every row of a visit lies in the same part. The rows are in an unnamed temporary file,
    which the system frees even when the process is killed."""

    def __init__(self, directory: str | Path | None, n_parts: int):
        self.file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (lives as long as the parts)
        self.blocks: list[list[tuple[int, int]]] = [[] for _ in range(n_parts)]
        self.rows = 0

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, table: pd.DataFrame) -> None:
        """Appends the next rows of the file."""
        n_parts = len(self.blocks)
        hashed = np.zeros(len(table), dtype=np.uint64)
        for name in ("client", "visit_id"):
            index, texts = text_places(table[name])
            # the last entry is for empty cells, whose index is -1
            hashed = hashed * np.uint64(1_000_003) + pd.util.hash_array(np.array([*texts, ""], dtype=object))[index]
        part = (hashed % np.uint64(n_parts)).astype(np.int64)
        order = np.argsort(part, kind="stable")
        bounds = np.searchsorted(part[order], np.arange(n_parts + 1))
        rows = pa.Table.from_pandas(table.assign(row=self.rows + np.arange(len(table))), preserve_index=False)
        rows = rows.take(pa.array(order))
        for blocks, (start, end) in zip(self.blocks, pairwise(bounds.tolist()), strict=True):
            if end > start:
                block = _packed(rows.slice(start, end - start))
                blocks.append((self.file.tell(), len(block)))
                self.file.write(block)
        self.rows += len(table)

    def __iter__(self) -> Iterator[list[bytes]]:
        """The packed blocks of each part that has any."""
        for blocks in self.blocks:
            packed = []
            for offset, length in blocks:
                self.file.seek(offset)
                packed.append(self.file.read(length))
            if packed:
                yield packed


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpacked(blocks: Sequence[bytes]) -> pd.DataFrame:
    tables = [pa.ipc.open_stream(block).read_all().to_pandas(ignore_metadata=True) for block in blocks]
    return pd.concat(tables, ignore_index=True)


def score_chunks(
    chunks: Chunks,
    score: Callable[[pd.DataFrame, np.ndarray], Scores],
    score_parts: Callable[[Iterable[list[bytes]]], Iterable[Scores]],
    spill_dir: str | Path | None,
    advance: Callable[[int], Any] = lambda position: None,
) -> Scores:
    """A file's scores: straight when one chunk holds it all, else part by part."""
    with contextlib.closing(iter(chunks)) as reader:
        first, malformed = next(reader)
        first_position = chunks.position
        advance(first_position)
        second = next(reader, None)
        if second is None:
            scores = score(first, np.arange(len(first)))
        else:
            # twice as many parts as chunks: parts are of uneven size, and should be smaller than a chunk
            n_parts = 2 * -(-chunks.size // max(first_position, 1))
            with Parts(spill_dir, n_parts) as parts:
                parts.add(first)
                del first
                while second is not None:
                    parts.add(second[0])
                    malformed += second[1]
                    advance(chunks.position)
                    second = next(reader, None)
                scores = Scores.merged(list(score_parts(parts)))
    if malformed:
        scores.set_aside["malformed"] += malformed
    if not scores.usable_visits:
        reasons = described(scores.set_aside) or "empty"
        raise BadObservations(f"file {chunks.name!r}: no usable observation in {scores.rows:,} rows ({reasons})")
    return scores


def described(set_aside: Counter[str]) -> str:
    return "; ".join(f"{n:,} rows: {SET_ASIDE_REASONS[reason]}" for reason, n in sorted(set_aside.items()))


@dataclass(frozen=True)
class Deployment:
    """Config and model as bytes: what one run uses everywhere, also when the files are replaced meanwhile."""

    config: bytes
    model: bytes
    monitor: str = OFF  # URL of the prediction log

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(self.config).hexdigest()  # the config names the model's SHA-256

    def save(self, folder: str) -> tuple[Path, Path]:
        """The paths of config and model, written to `folder`."""
        config, model = Path(folder, "config.json"), Path(folder, "model.pkl")
        config.write_bytes(self.config)
        model.write_bytes(self.model)
        return config, model


pipelines: dict[str, ProductionPipeline] = {}  # of this process, by deployment


logs: dict[str, PredictionLog] = {}


def install(deployment: Deployment, pipeline: ProductionPipeline | None = None) -> None:
    """Makes the deployment's pipeline ready in this process, once: `pipeline` where it is loaded already."""
    if deployment.key not in pipelines:
        if pipeline is None:
            with tempfile.TemporaryDirectory() as folder:
                pipeline = ProductionPipeline(*deployment.save(folder))
        pipelines[deployment.key] = pipeline
    if deployment.monitor != OFF and deployment.key not in logs:
        logs[deployment.key] = PredictionLog.open(deployment.monitor, pipelines[deployment.key], "batch")


def score_blocks(key: str, blocks: list[bytes]) -> Scores:
    """The scores of one part."""
    table = _unpacked(blocks)
    return score_table(key, table, table.pop("row").to_numpy())


def score_file(
    key: str,
    source: str | bytes,
    name: str,
    chunk_rows: int,
    spill_dir: str | None,
    advance: Callable[[int], Any] = lambda position: None,
) -> Scores:
    """The scores of a whole file, given by its path or its content."""
    with open(source, "rb") if isinstance(source, str) else io.BytesIO(source) as file:
        size = len(source) if isinstance(source, bytes) else os.fstat(file.fileno()).st_size
        return score_chunks(
            Chunks(file, name, size, chunk_rows),
            partial(score_table, key),
            lambda parts: (score_blocks(key, blocks) for blocks in parts),
            spill_dir,
            advance,
        )
