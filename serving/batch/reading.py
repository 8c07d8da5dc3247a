"""Large files, cut into chunks of whole rows."""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import threading
import warnings
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from feature_pipeline import (
    COLUMNS,
    CSV_AS_TEXT,
    RANGE_COLUMNS,
    REQUIRED_COLUMNS,
    BadObservations,
    as_text,
    listed,
)

UNPACKED = {".csv.gz": 8, ".csv": 1, ".parquet": 4}  # about how many bytes of text a byte of the file holds


def kind_of(name: str) -> str | None:
    """The suffix among those of `UNPACKED` that `name` ends with, whatever its case."""
    return next((suffix for suffix in UNPACKED if name.lower().endswith(suffix)), None)


_BLANK_LINES = re.compile(rb"\A(?:[ \t]*\n)+")  # no lines to pandas either


# Where every cell of a chunk is one, Arrow reads it at once as what `read_observations` makes of its text.
_TYPED = {
    "observation_date": pa.timestamp("us"),
    **dict.fromkeys(("observation_value", *RANGE_COLUMNS), pa.float64()),
}


class Chunk(NamedTuple):
    """The next rows of a file. `parse` returns them with the number of malformed lines left out; any thread may call
    it. `position` is the number of bytes of the file up to their end."""

    position: int
    parse: Callable[[], tuple[pd.DataFrame, int]]


class Chunks:
    """Iterates over chunks of at most `chunk_rows` rows; any cell means what it means to `read_observations`.

    Raises `BadObservations`, as does parsing a chunk. Its texts quote nothing of the file: a file without header has a
    visit for header.
    """

    _parsing = threading.Lock()  # warnings are caught for the whole process; Dask's workers have threads

    def __init__(self, file: BinaryIO, name: str, size: int, chunk_rows: int):
        self.file, self.name, self.size, self.chunk_rows = file, name, size, chunk_rows
        self._typed = True  # until a chunk has other cells

    def __iter__(self) -> Generator[Chunk]:
        kind = kind_of(self.name)
        if self.size == 0:
            raise self._empty()
        with self._naming_the_file():
            if kind == ".parquet":
                yield from self._parquet()
            else:
                yield from self._text(gzip.GzipFile(fileobj=self.file) if kind == ".csv.gz" else self.file)

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Turns what libraries raise for a bad file into `BadObservations`."""
        try:
            yield
        except (BadObservations, MemoryError):
            raise
        except (EOFError, ValueError, zlib.error, gzip.BadGzipFile, pd.errors.ParserError, pa.ArrowException) as error:
            raise BadObservations(f"file {self.name!r} cannot be read: {' '.join(str(error).split())[:200]}") from error
        except OSError as error:
            if error.errno is not None:  # the disk's fault, not the file's
                raise
            raise BadObservations(f"file {self.name!r} cannot be read: {' '.join(str(error).split())[:200]}") from error

    def _text(self, file: BinaryIO) -> Iterator[Chunk]:
        """As `_csv`, by Arrow's parser, which takes a tenth of the time; what it refuses goes to pandas as before."""
        header = b""
        columns: list[str] = []
        line_bytes = 64.0
        while block := file.read(int(self.chunk_rows * line_bytes)):
            block += file.readline()
            if any(character in block for character in (b'"', b"\r", b"\0")):
                # a line may not be a row from here on, nor a comma end a cell
                yield from self._csv(io.BufferedReader(_Joined(header + b"\n" * bool(header) + block, file)))
                return
            some = block[: 1 << 20]
            line_bytes = max(len(some) / max(some.count(b"\n"), 1), 8.0)
            rows = memoryview(block)  # slices of it are no copies
            if not header:
                block = _BLANK_LINES.sub(b"", block.removeprefix(b"\xef\xbb\xbf"))
                header = block[: block.find(b"\n")] if b"\n" in block else block
                rows = memoryview(block)[len(header) + 1 :]
                if not header:
                    continue
                columns = [as_text(name) for name in header.decode(errors="replace").split(",")]
                self._check(columns)
            yield Chunk(self.file.tell(), partial(self._parsed, header, rows, columns))
        if not header:
            raise self._empty()

    def _parsed(self, header: bytes, block: memoryview, columns: list[str]) -> tuple[pd.DataFrame, int]:
        wanted = [name for name in COLUMNS if name in columns]
        for types in (_TYPED, {}) if self._typed else ({},):
            try:
                table = csv.read_csv(
                    pa.BufferReader(pa.py_buffer(block)),
                    csv.ReadOptions(column_names=columns, block_size=len(block) + 1, use_threads=False),
                    csv.ParseOptions(quote_char=False, double_quote=False),
                    csv.ConvertOptions(
                        column_types={name: types.get(name, pa.large_string()) for name in wanted},
                        include_columns=wanted,
                        null_values=[""],
                        strings_can_be_null=False,
                    ),
                )
            except pa.ArrowInvalid:
                continue
            if types and pc.any(pc.is_nan(table["observation_value"])).as_py():  # no number, but not empty either
                continue
            self._typed = bool(types)
            return self._frame(table)
        # a row with a cell too many or too few, a byte that is no UTF-8, nothing at all
        with self._naming_the_file(), io.BytesIO(b"\n".join((header, block))) as again:
            rest = Chunks(again, self.name, len(header) + 1 + len(block), max(self.chunk_rows * 4, 1000))
            parts = [chunk.parse() for chunk in rest._csv(again)]
        return pd.concat([frame for frame, _ in parts], ignore_index=True), sum(n for _, n in parts)

    def _frame(self, table: pa.Table) -> tuple[pd.DataFrame, int]:
        with self._naming_the_file():
            return table.to_pandas(ignore_metadata=True), 0

    def _csv(self, file: BinaryIO) -> Iterator[Chunk]:
        """As `read_observations` reads a file: all of it text, the header as the first row."""
        columns: list[str] | None = None
        with self._parsing, warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            try:
                reader = pd.read_csv(file, chunksize=self.chunk_rows + 1, **CSV_AS_TEXT)
            except pd.errors.EmptyDataError:
                raise self._empty() from None
        with reader:
            while True:
                with self._parsing, warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", pd.errors.ParserWarning)
                    frame = next(reader, None)
                if frame is None:
                    return
                if columns is None:
                    columns = [as_text(name) for name in frame.iloc[0]]
                    self._check(columns)
                    frame = frame.iloc[1:]
                frame.columns = pd.Index(columns)
                frame = frame[[name for name in COLUMNS if name in columns]].reset_index(drop=True)
                parsed = frame, sum(str(warning.message).count("Skipping line") for warning in caught)
                yield Chunk(min(self.file.tell(), self.size), lambda parsed=parsed: parsed)

    def _parquet(self) -> Iterator[Chunk]:
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
                yield Chunk(self.size * n_read // n_rows, partial(self._frame, pa.Table.from_batches(rest)))
                rest = []
        if rest or n_read == 0:
            schema = pa.schema([file.schema_arrow.field(name) for name in columns])
            yield Chunk(self.size, partial(self._frame, pa.Table.from_batches(rest, schema)))

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


class _Joined(io.RawIOBase):
    """Bytes and the rest of a file, as one file."""

    def __init__(self, start: bytes, rest: BinaryIO):
        self.start, self.rest = io.BytesIO(start), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.start.readinto(buffer) or self.rest.readinto(buffer)
