"""Files that are written whole or not at all, and the versions of the libraries that made them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from feature_pipeline import BadConfig

LIBRARIES = ("numpy", "pandas", "scikit-learn", "lightgbm", "joblib")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path`, which is renamed to `path` at the end. Readers see the whole old file or the
    whole new one. After an error the temporary file is deleted."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o640)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Writes `content` whole or not at all."""
    with atomic_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def locked(path: str | Path, wait: bool = True) -> Iterator[bool]:
    """True for the one process that holds the lock file `path`. Without `wait`: False if another process holds it. The
    lock ends with its process, however the process ends."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def write_tables(tables: Mapping[Path, Any]) -> None:
    """Writes each frame to its path, in the format of its suffix: all of them or none. Equal frames give equal
    bytes."""
    with contextlib.ExitStack() as stack:
        for path, frame in tables.items():
            file = stack.enter_context(atomic_file(path))
            if path.name.endswith(".parquet"):
                frame.to_parquet(file, index=False)
            elif path.name.endswith(".gz"):
                frame.to_csv(file, index=False, compression={"method": "gzip", "mtime": 0})
            else:
                frame.to_csv(file, index=False)


def read_toml(path: str | Path, what: str) -> dict[str, Any]:
    """The content of a TOML file that a person wrote. Raises `BadConfig`, which says `what` it is."""
    where = f"{what} {str(path)!r}"
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadConfig(f"{where} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{where} cannot be read: {error}") from error


def write_json(path: str | Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def library_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
