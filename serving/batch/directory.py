"""A directory of files: what is new, what was done, where results go."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from common.artifacts import atomic_file, locked, write_atomic
from common.command_line import (
    log,
    progress,
)
from feature_pipeline import (
    DEFAULT_CONFIG,
    DEFAULT_MODEL,
    RISK_LEVELS,
    BadObservations,
    FeaturePipelineError,
    ProductionPipeline,
    SiteCodes,
    listed,
    to_micros,
)
from monitoring.log import OFF
from serving.batch.backends import MODEL_PREFIX, Processes, Threads, in_order
from serving.batch.manifest import MANIFEST, Manifest
from serving.batch.reading import UNPACKED, kind_of
from serving.batch.scoring import (
    OUTPUT_TYPES,
    Deployment,
    FileScores,
    Moment,
    StillWritten,
    described,
    install,
    models,
    output_frame,
    score_file,
    state_of,
)
from serving.deployed import LAST, NOW, Deployed
from serving.evidence import unused_text

INPUT_DIR, OUTPUT_DIR, FAILED_DIR = "data/incoming", "data/predictions", "data/failed"


LOCK = ".lock"


CHUNK_ROWS = 1_000_000  # held at once by a process: about 0.6 GB


LARGE_BYTES = 64_000_000  # of text; such a file is spread over the processes by itself


LARGE_FOR_THREADS = 16_000_000  # likewise over the threads, where there are no processes


WORTH_A_POOL = 16_000_000  # below, starting processes takes longer than the work


SETTLE_SECONDS = 10.0  # of the script


UNUSED_CODES = 100  # in the manifest, for each file


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
    unused_codes: dict[str, int]  # rows by code, the most frequent codes only


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
    unlogged: int = 0  # rows that the prediction log lost, or that wait for it

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
        counts += [f"{self.unlogged:,} rows of the prediction log not written"] if self.unlogged else []
        unused = sum((Counter(f.unused_codes) for f in self.scored), Counter())
        return ", ".join(counts) + (f"; {unused_text(unused)}" if unused else "")


class BatchProcessor:
    """Scores the files of a directory with one config and model.

    `jobs` processes work at once. Files that changed in the last `settle_seconds` are left for the next run. `as_of` is
    the moment that visits are scored for: ``last`` (the last observation of each), ``now``, or a time. `codes` is the
    site's map of codes, `clock` returns the time in seconds since 1970, `monitor` is the URL of the prediction log.
    Raises `BadConfig`, `BadModel`, `BadObservations` (for `as_of`).
    """

    def __init__(
        self,
        config_path: str | Path = DEFAULT_CONFIG,
        model_path: str | Path = DEFAULT_MODEL,
        *,
        jobs: int = 1,
        chunk_rows: int = CHUNK_ROWS,
        settle_seconds: float = 0.0,
        quiet: bool = True,
        as_of: str = LAST,
        codes: SiteCodes | None = None,
        clock: Callable[[], float] = time.time,
        monitor: str = OFF,
    ):
        if as_of not in (NOW, LAST):
            to_micros(as_of)  # raises `BadObservations`
        self.jobs, self.chunk_rows, self.monitor = jobs, chunk_rows, monitor
        self.settle_seconds, self.quiet, self.as_of, self.clock = settle_seconds, quiet, as_of, clock
        self.deployed = Deployed(ProductionPipeline(config_path, model_path, codes), "batch", monitor)

    @property
    def pipeline(self) -> ProductionPipeline:
        return self.deployed.pipeline

    def deployment(self) -> Deployment:
        """The present version, ready to score in this process."""
        pipeline = self.pipeline
        deployment = Deployment(
            pipeline.config.text().encode(),
            pipeline.model_file,
            dict(pipeline.site_codes or {}),
            self.monitor,
            pipeline.directory,
        )
        if deployment.key not in models:
            models.clear()
            install(deployment, self.deployed.current)
        return deployment

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
        deployment = self.deployment()
        todo = self._new_files(input_dir, manifest, f"{deployment.version} {self.as_of}", result)
        if not todo:
            return
        moment = Moment(self.as_of, self.clock() if self.as_of == NOW else None)
        run_ = _Run(self, deployment, moment, output_dir, failed_dir, manifest, result)
        backend, large_bytes = self._backend(deployment, todo, output_dir)
        large = [path for path, stat in todo if _text_bytes(path, stat) > large_bytes]
        try:
            with progress([], sum(s.st_size for _, s in todo), self.quiet, unit="B", unit_scale=True) as bar:
                run_.work(todo, large, backend, bar)
        finally:
            backend.close()
            result.unlogged += self.deployed.current.log.waiting

    def _new_files(
        self, input_dir: Path, manifest: Manifest, scored_by: str, result: BatchResult
    ) -> list[tuple[Path, os.stat_result]]:
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
            if known and (known["state"], known["config"]) == (state_of(stat), scored_by):
                result.unchanged.append(path.name)
                continue
            if self.settle_seconds and self.clock() - stat.st_mtime < self.settle_seconds:  # or dated ahead
                result.still_written.append(path.name)
                continue
            todo.append((path, stat))
        return sorted(todo, key=lambda item: (item[1].st_mtime_ns, item[0].name))

    def _backend(
        self, deployment: Deployment, todo: list[tuple[Path, os.stat_result]], output_dir: Path
    ) -> tuple[Threads, int]:
        """Where to score, and from how many bytes on a file is spread over all that is there."""
        work = sum(stat.st_size for _, stat in todo)
        long = any(_text_bytes(path, stat) > LARGE_BYTES for path, stat in todo)
        if self.jobs > 1 and (long or (len(todo) > 1 and work > WORTH_A_POOL)):
            return Processes(deployment, self.jobs, output_dir), LARGE_BYTES
        return Threads(deployment), LARGE_FOR_THREADS


def _text_bytes(path: Path, stat: os.stat_result) -> int:
    return stat.st_size * UNPACKED[kind_of(path.name) or ".csv"]


@dataclass
class _Run:
    """One run over the files of a directory, by the process that holds the lock: only it writes."""

    processor: BatchProcessor
    deployment: Deployment
    moment: Moment
    output_dir: Path
    failed_dir: Path
    manifest: Manifest
    result: BatchResult

    def work(self, todo: list[tuple[Path, os.stat_result]], large: list[Path], backend: Threads, bar: Any) -> None:
        def advance_from(start: int) -> Callable[[int], Any]:
            return lambda position: bar.update(start + position - bar.n)

        for path, stat in [item for item in todo if item[0] in large]:
            done = bar.n
            get = partial(score_file, *self._call(path, stat), backend.reader.map, backend.map, advance_from(done))
            self._finish(path, stat, get, backend.lost)
            bar.update(done + stat.st_size - bar.n)

        taken: deque[tuple[Path, os.stat_result]] = deque()

        def calls() -> Iterator[tuple[Any, ...]]:
            for path, stat in todo:
                if path in large:
                    continue
                taken.append((path, stat))
                yield score_file, *self._call(path, stat)

        again = []
        for future in in_order(backend, calls()):
            path, stat = taken.popleft()
            if isinstance(future.exception(), BrokenProcessPool):
                again.append((path, stat))  # it or a neighbour broke the pool: one by one shows which
                continue
            self._finish(path, stat, future.result, backend.lost)
            bar.update(stat.st_size)
        for path, stat in again:
            future = backend.submit(score_file, *self._call(path, stat))
            self._finish(path, stat, future.result, backend.lost)
            bar.update(stat.st_size)

    def _call(self, path: Path, stat: os.stat_result) -> tuple[Any, ...]:
        """The arguments of `score_file`."""
        how = self.deployment.key, self.moment
        return *how, path, state_of(stat), self.processor.chunk_rows, self.output_dir

    def _finish(
        self, path: Path, stat: os.stat_result, get: Callable[[], FileScores], lost: tuple[type[Exception], ...]
    ) -> None:
        """Writes one file's predictions and notes it; or says why not, and where the file is now."""
        try:
            found = get()
            self.result.unlogged += found.scores.unlogged
            result = self._write(path, found)
            config = f"{self.deployment.version} {self.moment.as_of}"
            deployed = {"config": config, "model_version": self.processor.pipeline.model_version}
            origin = {"input_dir": str(path.parent.resolve()), "state": state_of(stat)}
            self.manifest.add(asdict(result) | origin | deployed)
        except StillWritten:
            self.result.still_written.append(path.name)
            return
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
        absent = self.processor.pipeline.absent_codes(found.scores.codes, found.scores.usable_visits)
        if absent:
            log.warning(
                "%s: nearly every visit had these codes in training, none has them here: %s", path.name, listed(absent)
            )

    def _write(self, path: Path, found: FileScores) -> FileResult:
        pipeline, scores = self.processor.pipeline, found.scores
        moment = datetime.fromtimestamp(self.processor.clock(), UTC).isoformat(timespec="seconds")
        output = self.output_dir / f"predictions_{path.name}"
        levels: Counter[str] = Counter()
        with atomic_file(output) as raw, _table_writer(raw, kind_of(path.name)) as write:
            for start in range(0, scores.visits.num_rows, 100_000):
                frame = output_frame(scores.visits.slice(start, 100_000), moment, pipeline.model_version)
                levels.update(frame["risk_level"])
                write(frame)
        return FileResult(
            path.name,
            output.name,
            found.rows + found.set_aside["malformed"],
            scores.visits.num_rows,
            dict(sorted(levels.items())),
            dict(sorted(found.set_aside.items())),
            dict(scores.unused_codes.most_common(UNUSED_CODES)),
        )

    def _told(self, result: FileResult) -> str:
        levels = ", ".join(f"{result.risk_levels.get(name, 0)} {name}" for name in RISK_LEVELS)
        aside = described(Counter(result.set_aside))
        told = f"{result.visits:,} visits ({levels}), {result.observations:,} observations"
        told += f"; set aside: {aside}" if aside else ""
        return told + (f"; {unused_text(result.unused_codes)}" if result.unused_codes else "")

    def _fail(self, path: Path, stat: os.stat_result, error: BadObservations) -> None:
        """Moves a bad file away, its reason first: killed in between, the next run does both again."""
        try:
            if state_of(path.stat()) != state_of(stat):
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
        self.processor.deployed.current.log.record_error("bad_file")
        self.result.failed[path.name] = str(error)
        log.error("failed: %s; it is in %s now", error, self.failed_dir)

    def _keep(self, path: Path, problem: OSError | str) -> None:
        text = problem if isinstance(problem, str) else problem.strerror or type(problem).__name__
        self.processor.deployed.current.log.record_error("file_kept")
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
        schema = pa.schema(list(OUTPUT_TYPES.items()))
        with pq.ParquetWriter(raw, schema) as writer:
            yield lambda frame: writer.write_table(pa.Table.from_pandas(frame, schema, preserve_index=False))
        return
    with contextlib.ExitStack() as stack:
        if kind == ".csv.gz":
            raw = stack.enter_context(gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0))  # type: ignore[assignment]
        raw.write((",".join(OUTPUT_TYPES) + "\n").encode())
        yield lambda frame: raw.write(frame.to_csv(index=False, header=False, lineterminator="\n").encode())
