"""Scores every file of a directory: made for an hourly cron job that never loses or doubles a visit.

``data/incoming/ward.csv`` becomes ``data/predictions/predictions_ward.csv`` (likewise ``.csv.gz`` and ``.parquet``,
each in its own format) with the columns ``visit_id, client, sepsis_probability, risk_level, processed_at`` (UTC),
``model_version``: one row a visit, in order of first appearance. A file that cannot be used goes to ``data/failed/``
with its reason beside it.

What a run has finished stands in ``manifest.jsonl`` of the output directory, a line a file, written after the
predictions are in place. A run killed at any moment leaves whole files and whole lines only; the next run does the
rest. Files longer than `CHUNK_ROWS` are cut by visit into parts on disk, so memory stays bounded and a visit's rows
may lie anywhere in the file.

    result = BatchProcessor("models/best_model_config.json", "models/best_model.pkl").process_directory()
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from artifacts import atomic_file, locked, write_atomic
from command_line import (
    COULD_NOT_START,
    DONE,
    SOME_FAILED,
    available_cores,
    log,
    make_parser,
    number,
    progress,
    run,
    run_every,
)
from feature_pipeline import (
    COLUMNS,
    CSV_AS_TEXT,
    DEFAULT_CONFIG,
    DEFAULT_MODEL,
    REQUIRED_COLUMNS,
    SET_ASIDE_REASONS,
    BadObservations,
    FeaturePipelineError,
    ProductionPipeline,
    as_text,
    listed,
    resolve_snapshots,
    text_places,
)
from prediction_log import OFF, PredictionLog, url_of

INPUT_DIR, OUTPUT_DIR, FAILED_DIR = "data/incoming", "data/predictions", "data/failed"
UNPACKED = {".csv.gz": 8, ".csv": 1, ".parquet": 4}  # about how many bytes of text a byte of the file holds
OUTPUT_COLUMNS = ("visit_id", "client", "sepsis_probability", "risk_level", "processed_at", "model_version")
MANIFEST, LOCK, MODEL_PREFIX = "manifest.jsonl", ".lock", ".model."
CRONTAB = """5 * * * * set -a && . /etc/sepsis-risk.env && cd "$HOME/sepsis-risk" && \
.venv/bin/python batch_processor.py --quiet >>data/batch.log 2>&1"""

CHUNK_ROWS = 1_000_000  # held at once by a process: about 0.6 GB
FEATURE_CELLS = 10_000_000  # of the feature matrix held at once: 80 MB
LARGE_BYTES = 64_000_000  # of text; such a file is spread over the processes by itself
WORTH_A_POOL = 16_000_000  # below, starting processes takes longer than the work
SETTLE_SECONDS = 10.0
CONNECT_SECONDS = 20  # to the Dask scheduler


# ------------------------------------------------------------------------------------------------- reading


def kind_of(name: str) -> str | None:
    """The suffix among those of `UNPACKED` that `name` ends with, whatever its case."""
    return next((suffix for suffix in UNPACKED if name.lower().endswith(suffix)), None)


_BLANK_LINES = re.compile(rb"\A(?:[ \t]*\n)+")  # no lines to pandas either


class Chunks:
    """Iterates over (frame, malformed lines) of at most `chunk_rows` rows; any cell means what it means to
    `read_observations`. `position` says how many of the file's `size` bytes are read.

    Raises `BadObservations`. Its texts quote nothing of the file: a file without header has a visit for header.
    """

    _parsing = threading.Lock()  # warnings are caught for the whole process; Dask's workers have threads

    def __init__(self, file: BinaryIO, name: str, size: int, chunk_rows: int):
        self.file, self.name, self.size, self.chunk_rows = file, name, size, chunk_rows
        self.position = 0

    def __iter__(self) -> Generator[tuple[pd.DataFrame, int]]:
        kind = kind_of(self.name)
        if self.size == 0:
            raise self._empty()
        try:
            if kind == ".parquet":
                yield from self._parquet()
            elif kind == ".csv" and self._is_plain():
                yield from self._plain_csv()
            else:
                yield from self._csv("gzip" if kind == ".csv.gz" else None)
        except (BadObservations, MemoryError):
            raise
        except (EOFError, ValueError, zlib.error, gzip.BadGzipFile, pd.errors.ParserError, pa.ArrowException) as error:
            raise BadObservations(f"file {self.name!r} cannot be read: {' '.join(str(error).split())[:200]}") from error
        except OSError as error:
            if error.errno is not None:  # the disk's fault, not the file's
                raise
            raise BadObservations(f"file {self.name!r} cannot be read: {' '.join(str(error).split())[:200]}") from error

    def _is_plain(self) -> bool:
        """Is the file free of quotes, carriage returns and zeros? Then every line is a row, every comma ends a cell."""
        # not by mmap: a file that is cut off meanwhile would end the process by a signal
        plain, block = True, bytearray(1 << 22)
        while plain and (length := self.file.readinto(block)):
            plain = all(block.find(character, 0, length) < 0 for character in (b'"', b"\r", b"\0"))
        self.file.seek(0)
        return plain

    def _plain_csv(self) -> Iterator[tuple[pd.DataFrame, int]]:
        """As `_csv`, by Arrow's parser, which takes a third of the time; what it refuses goes to pandas as before."""
        header = b""
        columns: list[str] = []
        line_bytes = 64.0
        while block := self.file.read(int(self.chunk_rows * line_bytes)):
            block += self.file.readline()
            self.position = self.file.tell()
            line_bytes = max(len(block) / max(block.count(b"\n"), 1), 8.0)
            if not header:
                block = _BLANK_LINES.sub(b"", block.removeprefix(b"\xef\xbb\xbf"))
                header, _, block = block.partition(b"\n")
                if not header:
                    continue
                columns = [as_text(name) for name in header.decode(errors="replace").split(",")]
                self._check(columns)
            yield self._parsed(header, block, columns)
        if not header:
            raise self._empty()

    def _parsed(self, header: bytes, block: bytes, columns: list[str]) -> tuple[pd.DataFrame, int]:
        wanted = [name for name in COLUMNS if name in columns]
        try:
            table = csv.read_csv(
                pa.BufferReader(block),
                csv.ReadOptions(column_names=columns, block_size=1 << 22),
                csv.ParseOptions(quote_char=False, double_quote=False),
                csv.ConvertOptions(
                    column_types=dict.fromkeys(columns, pa.large_string()),
                    include_columns=wanted,
                    null_values=[],
                    strings_can_be_null=False,
                ),
            )
            return table.to_pandas(ignore_metadata=True), 0
        except pa.ArrowInvalid:  # a row with a cell too many or too few, a byte that is no UTF-8, nothing at all
            with io.BytesIO(header + b"\n" + block) as again:
                rest = Chunks(again, self.name, len(header) + 1 + len(block), max(self.chunk_rows * 4, 1000))
                parts = list(rest._csv(None))
            return pd.concat([frame for frame, _ in parts], ignore_index=True), sum(n for _, n in parts)

    def _csv(self, compression: str | None) -> Iterator[tuple[pd.DataFrame, int]]:
        """As `read_observations` reads a file: all of it text, the header as the first row."""
        columns: list[str] | None = None
        with self._parsing, warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            try:
                reader = pd.read_csv(self.file, compression=compression, chunksize=self.chunk_rows + 1, **CSV_AS_TEXT)
            except pd.errors.EmptyDataError:
                raise self._empty() from None
        with reader:
            while True:
                with self._parsing, warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", pd.errors.ParserWarning)
                    frame = next(reader, None)
                if frame is None:
                    return
                self.position = min(self.file.tell(), self.size)
                if columns is None:
                    columns = [as_text(name) for name in frame.iloc[0]]
                    self._check(columns)
                    frame = frame.iloc[1:]
                frame.columns = pd.Index(columns)
                frame = frame[[name for name in COLUMNS if name in columns]].reset_index(drop=True)
                yield frame, sum(str(warning.message).count("Skipping line") for warning in caught)

    def _parquet(self) -> Iterator[tuple[pd.DataFrame, int]]:
        file = pq.ParquetFile(self.file, pre_buffer=False)
        self._check(file.schema_arrow.names)
        n_read, n_rows = 0, max(file.metadata.num_rows, 1)
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        nested = [name for name in columns if pa.types.is_nested(file.schema_arrow.field(name).type)]
        if nested:
            raise BadObservations(
                f"file {self.name!r}: column {listed(nested)} holds lists or records; "
                "expected one text, number or date a cell"
            )
        rest: list[pa.RecordBatch] = []  # row groups end where they like; chunks are filled up
        for batch in file.iter_batches(min(self.chunk_rows, 65_536), columns=columns):
            rest.append(batch)
            n_read += batch.num_rows
            if sum(len(part) for part in rest) >= self.chunk_rows:
                self.position = self.size * n_read // n_rows
                yield pa.Table.from_batches(rest).to_pandas(ignore_metadata=True), 0
                rest = []
        self.position = self.size
        if rest or n_read == 0:
            schema = pa.schema([file.schema_arrow.field(name) for name in columns])
            yield pa.Table.from_batches(rest, schema).to_pandas(ignore_metadata=True), 0

    def _empty(self) -> BadObservations:
        return BadObservations(f"file {self.name!r} is empty; expected the columns {', '.join(COLUMNS)}")

    def _check(self, found: Sequence[str]) -> None:
        missing = [name for name in REQUIRED_COLUMNS if name not in found]
        hint = ""
        if len(missing) == len(REQUIRED_COLUMNS):
            separated = len(found) == 1 and any(separator in str(found[0]) for separator in ";\t|")
            hint = "; is the separator a comma?" if separated else "; is the first line a header?"
        if missing:
            raise BadObservations(
                f"file {self.name!r}: missing column {listed(missing)}; expected {', '.join(COLUMNS)}{hint}"
            )
        if len(set(found) & set(COLUMNS)) < sum(name in COLUMNS for name in found):
            raise BadObservations(f"file {self.name!r}: a column stands twice; expected {', '.join(COLUMNS)}")


# ------------------------------------------------------------------------------------------------- scoring


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
    pipeline, prediction_log = _pipelines[key], _logs.get(key)
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
            probability[some], features = pipeline.evaluate(observations, visit[some], moments[some])
            if prediction_log:
                seconds = time.perf_counter() - began
                prediction_log.record(observations, visit[some], moments[some], probability[some], features, seconds)
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
        reasons = _described(scores.set_aside) or "empty"
        raise BadObservations(f"file {chunks.name!r}: no usable observation in {scores.rows:,} rows ({reasons})")
    return scores


def _described(set_aside: Counter[str]) -> str:
    return "; ".join(f"{n:,} rows: {SET_ASIDE_REASONS[reason]}" for reason, n in sorted(set_aside.items()))


# ------------------------------------------------------------------------------- where scores are computed


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


_pipelines: dict[str, ProductionPipeline] = {}  # of this process, by deployment
_logs: dict[str, PredictionLog] = {}


def install(deployment: Deployment, pipeline: ProductionPipeline | None = None) -> None:
    """Makes the deployment's pipeline ready in this process, once: `pipeline` where it is loaded already."""
    if deployment.key not in _pipelines:
        if pipeline is None:
            with tempfile.TemporaryDirectory() as folder:
                pipeline = ProductionPipeline(*deployment.save(folder))
        _pipelines[deployment.key] = pipeline
    if deployment.monitor != OFF and deployment.key not in _logs:
        _logs[deployment.key] = PredictionLog.open(deployment.monitor, _pipelines[deployment.key], "batch")


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


class Here:
    """Computes in this process, at once."""

    slots = 1
    sends_content = False
    lost: tuple[type[Exception], ...] = ()

    def __init__(self, deployment: Deployment):
        install(deployment)

    def submit(self, function: Callable[..., Scores], *arguments: Any) -> Any:
        future: Future[Scores] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass


def _start_worker(monitor: str, config: Path, model: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None
    # a worker of a killed parent would wait for work forever
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    install(Deployment(config.read_bytes(), model.read_bytes(), monitor), ProductionPipeline(config, model))


class Processes(Here):
    """A pool of processes with the model loaded in each. Spawned, not forked: LightGBM hangs after fork."""

    lost = (BrokenProcessPool,)

    def __init__(self, deployment: Deployment, jobs: int, output_dir: Path):
        self.slots = jobs
        # by file: what a worker is started with goes through a pipe, and blocks for good where the worker dies first;
        # in the output directory, where the next run finds what a killed one has left
        self.folder = tempfile.TemporaryDirectory(dir=output_dir, prefix=MODEL_PREFIX)
        self.initargs = (deployment.monitor, *deployment.save(self.folder.name))
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(self.slots, context, initializer=_start_worker, initargs=self.initargs)

    def submit(self, function: Callable[..., Scores], *arguments: Any) -> Any:
        try:
            return self.pool.submit(function, *arguments)
        except BrokenProcessPool:  # a worker died, and the pool with it
            self._start()
            return self.pool.submit(function, *arguments)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.folder.cleanup()


class Dask(Here):
    """A Dask cluster. Files and parts travel as bytes, so workers need no common disk; a worker without this
    project's modules is sent them, and the model."""

    sends_content = True
    modules = ("feature_pipeline", "command_line", "artifacts", "pseudonyms", "prediction_log", "batch_processor")

    def __init__(self, deployment: Deployment, scheduler: str):
        from distributed import Client, WorkerPlugin
        from distributed.client import FutureCancelledError
        from distributed.diagnostics.plugin import UploadFile
        from distributed.scheduler import KilledWorker

        self.lost = (KilledWorker, FutureCancelledError)
        self.client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        files = [Path(__file__).with_name(f"{module}.py") for module in self.modules]
        expected = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

        def lacks_modules() -> bool:  # nested, so that its code travels
            import hashlib
            import importlib.util
            from pathlib import Path

            for name, digest in expected.items():
                spec = importlib.util.find_spec(name)
                if not (spec and spec.origin and hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest() == digest):
                    return True
            return False

        class LoadModel(WorkerPlugin):
            name = f"sepsis-model-{deployment.key}"

            def setup(self, worker: Any) -> None:
                import batch_processor

                batch_processor.install(deployment_there)

        deployment_there = deployment
        if any(self.client.run(lacks_modules).values()):
            for path in files:
                self.client.register_plugin(UploadFile(str(path)))  # not client.upload_file: only workers need it
        self.client.register_plugin(LoadModel())
        self.slots = max(1, sum(self.client.nthreads().values()))

    def submit(self, function: Callable[..., Scores], *arguments: Any) -> Any:
        with warnings.catch_warnings():  # that a file is large; kept with its task, it outlives a lost worker
            warnings.filterwarnings("ignore", "Sending large graph")
            return self.client.submit(function, *arguments, pure=False)

    def close(self) -> None:
        self.client.close()


def in_order(backend: Here, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """The futures of the calls (function, arguments...), in order, with only so many at once in memory."""
    waiting: deque[Any] = deque()
    for call in calls:
        waiting.append(backend.submit(*call))
        if len(waiting) > 2 * backend.slots - 1:
            yield waiting.popleft()
    yield from waiting


# ------------------------------------------------------------------------------------------------ manifest


class Manifest:
    """What is finished: a JSON line a file, the last one counts. A torn last line is an unfinished file."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        lines = path.read_bytes().splitlines() if path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self.entries[entry["file"]] = {"state": None, "config": None} | entry
        self._n_lines = len(lines)

    def other_input(self, input_dir: Path) -> str | None:
        """A directory other than `input_dir` that has a file of which the predictions lie here."""
        for entry in self.entries.values():
            place = entry.get("input_dir", "")
            if place not in ("", str(input_dir.resolve())) and Path(place, entry["file"]).exists():
                return place
        return None

    def keep(self, names: set[str]) -> None:
        """Forgets files that are gone, and writes the rest anew where much of it is old."""
        self.entries = {name: entry for name, entry in self.entries.items() if name in names}
        if self._n_lines > 2 * len(self.entries) + 100:
            text = "".join(json.dumps(entry) + "\n" for entry in self.entries.values())
            write_atomic(self.path, text)
            self._n_lines = len(self.entries)

    def add(self, entry: dict[str, Any]) -> None:
        self.entries[entry["file"]] = entry
        with open(self.path, "ab+") as file:
            torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(b"\n" * torn + json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._n_lines += 1


# ------------------------------------------------------------------------------------------- the directory


class BadDirectories(FeaturePipelineError):
    """Input, output and failed directory do not go together."""

    code = "bad_directories"


@dataclass
class FileResult:
    """A file that was scored."""

    file: str
    output: str
    observations: int
    visits: int
    risk_levels: dict[str, int]
    set_aside: dict[str, int]


@dataclass
class BatchResult:
    """What a run did. `failed` files were moved away with their reason, `kept` ones could not be worked on now
    (disk full, no permission) and stay for the next run, as do those `still_written`."""

    scored: list[FileResult] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    still_written: list[str] = field(default_factory=list)
    locked: bool = False
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not (self.failed or self.kept)

    def __str__(self) -> str:
        if self.locked:
            return "another run is at work on this output directory; nothing to do"
        visits, rows = sum(f.visits for f in self.scored), sum(f.observations for f in self.scored)
        counts = [
            f"{len(self.scored)} files scored ({visits:,} visits, {rows:,} observations, {self.seconds:.1f} s)",
            f"{len(self.unchanged)} unchanged",
        ]
        counts += [f"{len(self.still_written)} still being written"] if self.still_written else []
        counts += [f"{len(self.failed)} failed"] if self.failed else []
        counts += [f"{len(self.kept)} kept for the next run"] if self.kept else []
        return ", ".join(counts)


class BatchProcessor:
    """Scores the files of a directory with one config and model.

    `jobs` processes work at once; `scheduler` is the address of a Dask cluster that does the work instead. `clock`
    gives the time in seconds since 1970; `monitor` is the URL of the prediction log. Raises `BadConfig`, `BadModel`.
    """

    def __init__(
        self,
        config_path: str | Path = DEFAULT_CONFIG,
        model_path: str | Path = DEFAULT_MODEL,
        *,
        jobs: int = 1,
        scheduler: str | None = None,
        chunk_rows: int = CHUNK_ROWS,
        settle_seconds: float = SETTLE_SECONDS,
        quiet: bool = True,
        clock: Callable[[], float] = time.time,
        monitor: str = OFF,
    ):
        self.jobs, self.scheduler, self.chunk_rows, self.monitor = jobs, scheduler, chunk_rows, monitor
        self.settle_seconds, self.quiet, self.clock = settle_seconds, quiet, clock
        self._use(ProductionPipeline(config_path, model_path))

    def _use(self, pipeline: ProductionPipeline) -> None:
        config = json.dumps(pipeline.config).encode()
        self.pipeline, self.deployment = pipeline, Deployment(config, pipeline.model_file, self.monitor)
        _pipelines.clear()
        _logs.clear()
        install(self.deployment, pipeline)

    def load_if_changed(self) -> None:
        """Takes up what was deployed since; after an error what was there goes on. Raises `BadConfig`, `BadModel`."""
        if successor := self.pipeline.successor():
            self._use(successor)
            log.info("model %s is loaded", successor.model_version)

    def process_directory(
        self,
        input_dir: str | Path = INPUT_DIR,
        output_dir: str | Path = OUTPUT_DIR,
        failed_dir: str | Path | None = None,
    ) -> BatchResult:
        """Scores what is new in `input_dir`; `failed_dir` is ``failed`` beside it unless given.

        Raises `BadDirectories`, and OSError when a directory cannot be read or written.
        """
        started = time.monotonic()
        input_dir, output_dir = Path(input_dir), Path(output_dir)
        failed_dir = Path(failed_dir) if failed_dir else input_dir.parent / Path(FAILED_DIR).name
        if not input_dir.is_dir():
            raise NotADirectoryError(f"input directory {str(input_dir)!r} does not exist; make it, or give --input-dir")
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, directory in (("output", output_dir), ("failed", failed_dir)):
            if directory.resolve() == input_dir.resolve():
                raise BadDirectories(
                    f"input and {name} directory are both {str(input_dir)!r}: what is written there would be scored"
                )
        result = BatchResult()
        with locked(output_dir / LOCK, wait=False) as alone:
            if alone:
                self._process(input_dir, output_dir, failed_dir, result)
            result.locked = not alone
        result.seconds = time.monotonic() - started
        return result

    def _process(self, input_dir: Path, output_dir: Path, failed_dir: Path, result: BatchResult) -> None:
        for directory, pattern in (
            (output_dir, ".predictions_*"),
            (output_dir, f".{MANIFEST}.*"),
            (failed_dir, ".*.reason.txt.*"),
        ):
            for leftover in directory.glob(pattern):  # of a run that was killed while writing
                leftover.unlink()
        for leftover in output_dir.glob(f"{MODEL_PREFIX}*"):
            shutil.rmtree(leftover)
        manifest = Manifest(output_dir / MANIFEST)
        other = manifest.other_input(input_dir)
        if other:
            raise BadDirectories(
                f"output directory {str(output_dir)!r} holds the predictions of {other!r}; files of one name would "
                "overwrite each other: give each input directory an --output-dir of its own"
            )
        todo = self._new_files(input_dir, manifest, result)
        if not todo:
            return
        run_ = _Run(self, output_dir, failed_dir, manifest, result)
        large = [path for path, stat in todo if self._is_large(path, stat)]
        backend = self._backend(todo, large, output_dir)
        try:
            with progress([], sum(s.st_size for _, s in todo), self.quiet, unit="B", unit_scale=True) as bar:
                run_.work(todo, large, backend, bar)
        finally:
            backend.close()

    def _new_files(self, input_dir: Path, manifest: Manifest, result: BatchResult) -> list[tuple[Path, os.stat_result]]:
        """The files to score with their state, oldest first."""
        found = []
        for path in sorted(input_dir.iterdir()):
            if kind_of(path.name) and not path.name.startswith(".") and path.is_file():
                with contextlib.suppress(FileNotFoundError):  # gone since
                    found.append((path, path.stat()))
        manifest.keep({path.name for path, _ in found})
        todo = []
        for path, stat in found:
            known = manifest.entries.get(path.name)
            # its predictions may be gone: somebody has fetched them
            if known and (known["state"], known["config"]) == (_state(stat), self.deployment.key):
                result.unchanged.append(path.name)
                continue
            if abs(self.clock() - stat.st_mtime) < self.settle_seconds:
                result.still_written.append(path.name)
                continue
            todo.append((path, stat))
        return sorted(todo, key=lambda item: (item[1].st_mtime_ns, item[0].name))

    def _is_large(self, path: Path, stat: os.stat_result) -> bool:
        return stat.st_size * UNPACKED[kind_of(path.name) or ".csv"] > LARGE_BYTES

    def _backend(self, todo: list[tuple[Path, os.stat_result]], large: list[Path], output_dir: Path) -> Here:
        if self.scheduler:
            return Dask(self.deployment, self.scheduler)
        work = sum(stat.st_size for _, stat in todo)
        if self.jobs > 1 and (large or (len(todo) > 1 and work > WORTH_A_POOL)):
            return Processes(self.deployment, self.jobs, output_dir)
        return Here(self.deployment)


def _state(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns]


@dataclass
class _Run:
    """One run over the files of a directory, by the process that holds the lock: only it writes."""

    processor: BatchProcessor
    output_dir: Path
    failed_dir: Path
    manifest: Manifest
    result: BatchResult

    def work(self, todo: list[tuple[Path, os.stat_result]], large: list[Path], backend: Here, bar: Any) -> None:
        def advance_from(start: int) -> Callable[[int], Any]:
            return lambda position: bar.update(start + position - bar.n)

        if backend.slots == 1 and not backend.sends_content:
            for path, stat in todo:
                done = bar.n
                get = partial(score_file, *self._call(path, str(path)), advance_from(done))
                self._finish(path, stat, get, backend.lost)
                bar.update(done + stat.st_size - bar.n)
            return

        for path, stat in [item for item in todo if item[0] in large]:
            done = bar.n
            self._finish(path, stat, partial(self._score_large, path, backend, advance_from(done)), backend.lost)
            bar.update(done + stat.st_size - bar.n)

        taken: deque[tuple[Path, os.stat_result]] = deque()

        def calls() -> Iterator[tuple[Any, ...]]:
            for path, stat in todo:
                if path in large:
                    continue
                try:
                    source = path.read_bytes() if backend.sends_content else str(path)
                except OSError as error:
                    self._keep(path, error)
                    continue
                taken.append((path, stat))
                yield score_file, *self._call(path, source)

        again = []
        for future in in_order(backend, calls()):
            path, stat = taken.popleft()
            if isinstance(future.exception(), BrokenProcessPool):
                again.append((path, stat))  # it or a neighbour broke the pool: one by one shows which
                continue
            self._finish(path, stat, future.result, backend.lost)
            bar.update(stat.st_size)
        for path, stat in again:
            future = backend.submit(score_file, *self._call(path, str(path)))
            self._finish(path, stat, future.result, backend.lost)
            bar.update(stat.st_size)

    def _call(self, path: Path, source: str | bytes) -> tuple[str, str | bytes, str, int, str | None]:
        """The arguments of `score_file`."""
        spill = None if isinstance(source, bytes) else str(self.output_dir)
        return self.processor.deployment.key, source, path.name, self.processor.chunk_rows, spill

    def _score_large(self, path: Path, backend: Here, advance: Callable[[int], Any]) -> Scores:
        """The file is read and cut here, its parts are scored where `backend` says."""
        key = self.processor.deployment.key

        def score_parts(parts: Iterable[list[bytes]]) -> Iterator[Scores]:
            return (future.result() for future in in_order(backend, ((score_blocks, key, part) for part in parts)))

        with open(path, "rb") as file:
            chunks = Chunks(file, path.name, os.fstat(file.fileno()).st_size, self.processor.chunk_rows)
            return score_chunks(chunks, partial(score_table, key), score_parts, self.output_dir, advance)

    def _finish(
        self, path: Path, stat: os.stat_result, get: Callable[[], Scores], lost: tuple[type[Exception], ...]
    ) -> None:
        """Writes one file's predictions and notes it; or says why not, and where the file is now."""
        try:
            scores = get()
            if _state(path.stat()) != _state(stat):
                self.result.still_written.append(path.name)
                return
            result = self._write(path, scores)
            deployed = {"config": self.processor.deployment.key, "model_version": self.processor.pipeline.model_version}
            origin = {"input_dir": str(path.parent.resolve()), "state": _state(stat)}
            self.manifest.add(asdict(result) | origin | deployed)
        except BadObservations as error:
            self._fail(path, stat, error)
            return
        except OSError as error:
            self._keep(path, error)
            return
        except lost as error:
            self._keep(path, f"a worker process died ({type(error).__name__}); out of memory? See --chunk-rows")
            return
        except Exception as error:  # whatever it is, it stops no other file; its text may quote the file
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._keep(path, f"unexpected {type(error).__name__} in {Path(place.filename).name}, line {place.lineno}")
            return
        self.result.scored.append(result)
        log.info("%s: %s", path.name, self._told(result))
        absent = self.processor.pipeline.absent_codes(scores.codes, scores.usable_visits)
        if absent:
            log.warning(
                "%s: nearly every visit had these codes in training, none has them here: %s", path.name, listed(absent)
            )

    def _write(self, path: Path, scores: Scores) -> FileResult:
        pipeline = self.processor.pipeline
        moment = datetime.fromtimestamp(self.processor.clock(), UTC).isoformat(timespec="seconds")
        output = self.output_dir / f"predictions_{path.name}"
        levels: Counter[str] = Counter()
        with atomic_file(output) as raw, _table_writer(raw, kind_of(path.name)) as write:
            for start in range(0, scores.visits.num_rows, 100_000):
                frame = scores.visits.slice(start, 100_000).drop_columns("row").to_pandas()
                frame["risk_level"] = pipeline.risk_level(frame["sepsis_probability"].to_numpy())
                frame["processed_at"] = moment
                frame["model_version"] = pipeline.model_version
                levels.update(frame["risk_level"])
                write(frame[list(OUTPUT_COLUMNS)])
        return FileResult(
            path.name,
            output.name,
            scores.rows + scores.set_aside.get("malformed", 0),
            scores.visits.num_rows,
            dict(sorted(levels.items())),
            dict(sorted(scores.set_aside.items())),
        )

    def _told(self, result: FileResult) -> str:
        levels = ", ".join(f"{result.risk_levels.get(name, 0)} {name}" for name in ("high", "medium", "low", "unknown"))
        aside = _described(Counter(result.set_aside))
        return f"{result.visits:,} visits ({levels}), {result.observations:,} observations" + (
            f"; set aside: {aside}" if aside else ""
        )

    def _fail(self, path: Path, stat: os.stat_result, error: BadObservations) -> None:
        """Moves a bad file away, its reason first: killed in between, the next run does both again."""
        try:
            if _state(path.stat()) != _state(stat):
                self.result.still_written.append(path.name)
                return
            place = _free_name(self.failed_dir / path.name)
            moment = datetime.fromtimestamp(self.processor.clock(), UTC).isoformat(timespec="seconds")
            write_atomic(place.with_name(place.name + ".reason.txt"), f"{moment}\n{error}\n")
            _move(path, place)
        except OSError as problem:
            self._keep(
                path, f"{error}; and it cannot be moved to {str(self.failed_dir)!r}: {problem.strerror or problem}"
            )
            return
        self.result.failed[path.name] = str(error)
        log.error("failed: %s; it is in %s now", error, self.failed_dir)

    def _keep(self, path: Path, problem: OSError | str) -> None:
        text = problem if isinstance(problem, str) else problem.strerror or type(problem).__name__
        self.result.kept[path.name] = text
        log.error("%s: not scored, kept for the next run: %s", path.name, text)


def _free_name(path: Path) -> Path:
    """`path`, or the same with a number where a file of that name is there already."""
    suffix = kind_of(path.name) or ""
    stem, number = path.name[: len(path.name) - len(suffix)], 2
    candidate = path
    while candidate.exists():
        candidate = path.with_name(f"{stem}.{number}{path.name[len(stem) :]}")
        number += 1
    return candidate


def _move(source: Path, target: Path) -> None:
    """Renames; onto another disk, copies whole and only then removes."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != 18:  # EXDEV
            raise
        write_atomic(target, source.read_bytes())
        source.unlink()


@contextlib.contextmanager
def _table_writer(raw: BinaryIO, kind: str | None) -> Iterator[Callable[[pd.DataFrame], Any]]:
    """A function that appends frames to `raw` in the format of `kind`; equal frames give equal bytes."""
    if kind == ".parquet":
        types = {name: pa.float64() if name == "sepsis_probability" else pa.string() for name in OUTPUT_COLUMNS}
        schema = pa.schema(list(types.items()))
        with pq.ParquetWriter(raw, schema) as writer:
            yield lambda frame: writer.write_table(pa.Table.from_pandas(frame, schema, preserve_index=False))
        return
    with contextlib.ExitStack() as stack:
        if kind == ".csv.gz":
            raw = stack.enter_context(gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0))  # type: ignore[assignment]
        raw.write((",".join(OUTPUT_COLUMNS) + "\n").encode())
        yield lambda frame: raw.write(frame.to_csv(index=False, header=False, lineterminator="\n").encode())


# ---------------------------------------------------------------------------------------------- the script


def watch(processor: BatchProcessor, seconds: float, once: Callable[[], BatchResult], stop: threading.Event) -> None:
    """Runs `once` every so many seconds until `stop`; a new config or model is taken up between runs."""
    run_every(seconds, processor, lambda: report(once(), quiet=processor.quiet), stop)


def report(result: BatchResult, quiet: bool) -> int:
    if not quiet:
        print(result, flush=True)
    return DONE if result.ok else SOME_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "Scores every new .csv, .csv.gz and .parquet file of a directory.",
        f"python batch_processor.py --jobs 2\n\ncrontab, every hour:\n  {CRONTAB}",
        "config",
        "model",
        "jobs",
    )
    parser.set_defaults(jobs=max(1, available_cores() // 2))  # a process reads with threads of its own
    parser.add_argument("--input-dir", default=INPUT_DIR, help="where the files arrive")
    parser.add_argument("--output-dir", default=OUTPUT_DIR, help="where predictions and manifest go")
    parser.add_argument("--failed-dir", help="where bad files go; 'failed' beside the input directory if not given")
    parser.add_argument(
        "--settle-seconds",
        type=number(float, 0),
        default=SETTLE_SECONDS,
        help="a file changed more recently is left for next time",
    )
    parser.add_argument(
        "--chunk-rows", type=number(int, 1), default=CHUNK_ROWS, help="rows that a process holds at once"
    )
    parser.add_argument("--watch", type=number(float, 1), metavar="SECONDS", help="look again so often, until stopped")
    parser.add_argument("--backend", choices=("local", "dask"), default="local", help="this machine or a Dask cluster")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of the Dask cluster, such as tcp://host:8786")
    parser.add_argument("--monitor", metavar="URL", help="database of the prediction log, off for none")
    return parser


def _work(arguments: argparse.Namespace) -> int:
    if (arguments.backend == "dask") != bool(arguments.scheduler):
        log.error("error: --backend dask and --scheduler ADDRESS belong together")
        return COULD_NOT_START
    processor = BatchProcessor(
        arguments.config,
        arguments.model,
        jobs=arguments.jobs,
        scheduler=arguments.scheduler,
        chunk_rows=arguments.chunk_rows,
        settle_seconds=arguments.settle_seconds,
        quiet=arguments.quiet,
        monitor=url_of(arguments.monitor),
    )

    def once() -> BatchResult:
        return processor.process_directory(arguments.input_dir, arguments.output_dir, arguments.failed_dir)

    if arguments.watch is None:
        return report(once(), arguments.quiet)
    watch(processor, arguments.watch, once, threading.Event())
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    parser.set_defaults(go_on="; the next run does the rest")
    return run(_work, parser, argv)


if __name__ == "__main__":
    import batch_processor  # under its own name, by which workers elsewhere find it

    sys.exit(batch_processor.main())
