"""Chunks of observations to scores, in this process or another."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
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
    ProductionPipeline,
    SiteCodes,
    iso_times,
    text_places,
)
from monitoring.log import OFF
from serving.batch.reading import Chunks
from serving.deployed import LAST, ServedModel, moments_of

FEATURE_CELLS = 10_000_000  # of the feature matrix held at once: 80 MB


class Moment(NamedTuple):
    """What a run scores for, see `moments_of`; rows later than `now` (seconds since 1970) are set aside."""

    as_of: str = LAST
    now: float | None = None


@dataclass
class Scores:
    """The scores of a table: `visits` with the columns ``row`` (of its first observation), ``visit_id``, ``client``,
    ``sepsis_probability``, ``risk_level``, ``reason``, ``as_of`` (microseconds), ``hours_since_newest``; number of
    `rows` read; rows not used by reason; the codes with a usable value; rows of codes that the model does not use; the
    number of visits with a usable row."""

    visits: pa.Table
    rows: int
    set_aside: Counter[str]
    codes: set[str]
    unused_codes: Counter[str]
    usable_visits: int

    @classmethod
    def merged(cls, parts: Sequence[Scores]) -> Scores:
        return cls(
            pa.concat_tables([part.visits for part in parts]).sort_by("row"),
            sum(part.rows for part in parts),
            sum((part.set_aside for part in parts), Counter()),
            set().union(*(part.codes for part in parts)),
            sum((part.unused_codes for part in parts), Counter()),
            sum(part.usable_visits for part in parts),
        )


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


def score_table(key: str, moment: Moment, table: pd.DataFrame, row: np.ndarray) -> Scores:
    """Scores whole visits with the deployment `key`. `row` numbers the rows of `table` in the file, ascending."""
    return scores_of(models[key], moment, table, row)


def scores_of(model: ServedModel, moment: Moment, table: pd.DataFrame, row: np.ndarray) -> Scores:
    """The same with a loaded model."""
    observations = model.read(table, moment.now)
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
            "row": pa.array(row[observations.first_row], pa.int64()),
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
        len(table),
        Counter(observations.set_aside),
        {observations.codes[code] for code in np.unique(observations.group_code)},
        Counter(model.pipeline.unused_codes(observations)),
        int((observations.first_time != NO_TIME).sum()),
    )


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
        part = (hashed % np.uint64(n_parts)).astype(np.uint16)  # NumPy sorts these by counting
        order = np.argsort(part, kind="stable")
        bounds = np.searchsorted(part[order], np.arange(n_parts + 1))
        rows = pa.Table.from_pandas(table.assign(row=self.rows + np.arange(len(table))), preserve_index=False)
        rows = _encoded(rows).take(pa.array(order))
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


def _encoded(table: pa.Table) -> pa.Table:
    """With places in a dictionary instead of texts, which are short to sort and to write; but dates are nearly all
    different."""
    for i, column in enumerate(table.schema):
        if pa.types.is_large_string(column.type) and column.name != "observation_date":
            table = table.set_column(i, column.name, table.column(i).dictionary_encode())
    return table


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpacked(blocks: Sequence[bytes]) -> pd.DataFrame:
    tables = [pa.ipc.open_stream(block).read_all() for block in blocks]
    return pa.concat_tables(tables).unify_dictionaries().to_pandas(ignore_metadata=True)


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


def score_blocks(key: str, moment: Moment, blocks: list[bytes]) -> Scores:
    """The scores of one part."""
    table = _unpacked(blocks)
    return score_table(key, moment, table, table.pop("row").to_numpy())


def score_file(
    key: str,
    moment: Moment,
    path: str,
    name: str,
    chunk_rows: int,
    spill_dir: str,
    advance: Callable[[int], Any] = lambda position: None,
) -> Scores:
    """The scores of a whole file."""
    with open(path, "rb") as file:
        return score_chunks(
            Chunks(file, name, os.fstat(file.fileno()).st_size, chunk_rows),
            partial(score_table, key, moment),
            lambda parts: (score_blocks(key, moment, blocks) for blocks in parts),
            spill_dir,
            advance,
        )
