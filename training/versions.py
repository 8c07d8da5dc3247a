"""Versions of the deployed model: the archive, switching between them, comparing two on the same patients."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.artifacts import locked, write_atomic
from common.command_line import log
from common.shadow import challenger, write_shadow
from feature_pipeline import BadConfig, Config, ProductionPipeline, load_config

CONFIG = "best_model_config.json"
MODEL, NAMES = "best_model.pkl", "feature_names.json"
INFO, REPORT, CARD = REPORTS = ("production_model_info.txt", "training_report.html", "MODEL_CARD.md")
DEPLOYED = (MODEL, NAMES, *REPORTS, CONFIG)  # in the order in which they are deployed


def archive_of(directory: Path, version: str) -> Path:
    """The folder of an archived version. Raises `BadConfig`."""
    folder = directory / "archive" / version
    if not version or Path(version).name != version or not (folder / CONFIG).is_file():
        raise BadConfig(f"no version {version!r} in {directory / 'archive'}; train_best_model.py --list shows them")
    return folder


def list_versions(directory: Path) -> list[tuple[Config, bool]]:
    """The configs of the archived versions, the latest first, and whether each is the one that is served."""
    try:
        current = load_config(directory / CONFIG).model_version
    except BadConfig:
        current = None
    found = []
    for path in sorted((directory / "archive").glob(f"*/{CONFIG}"), reverse=True):
        try:
            found.append((load_config(path), path.parent.name == current))
        except BadConfig as error:
            log.warning("warning: %s", error)
    return found


def new_version(archive: Path) -> str:
    """A version name YYYYMMDD_HHMMSS (UTC) that the archive does not have yet; its folder is made, so that nobody
    else takes it."""
    archive.mkdir(parents=True, exist_ok=True, mode=0o750)
    while True:
        version = datetime.now(UTC).strftime("%Y%m%d_%H%M%S")
        try:
            (archive / version).mkdir(mode=0o750)
            return version
        except FileExistsError:
            time.sleep(0.2)


def deploy(directory: Path, version: str, files: Mapping[str, bytes | str]) -> None:
    """Archives a version (see `archive_version`) and deploys it from there."""
    if not (directory / "archive" / version / CONFIG).exists():  # else an earlier try got this far
        archive_version(directory, version, files)
    switch(directory, version)


def archive_version(
    directory: Path,
    version: str,
    files: Mapping[str, bytes | str],
    passes: Callable[[Path], Any] = lambda folder: None,
) -> None:
    """Writes the files of a version (`DEPLOYED`) to its archive folder, all of them or none.

    Raises `BadConfig`, `BadModel` if they would not load, or what `passes` raises, which is called with a folder that
    has them; then nothing is changed.
    """
    archive = directory / "archive"
    archive.mkdir(parents=True, exist_ok=True, mode=0o750)
    try:
        with tempfile.TemporaryDirectory(prefix=".new-", dir=archive, ignore_cleanup_errors=True) as unfinished:
            folder = Path(unfinished) / "version"
            for name, content in files.items():
                write_atomic(folder / name, content)
            ProductionPipeline(folder / CONFIG, folder / MODEL)  # what could not be served is not kept
            passes(folder)
            folder.replace(archive / version)
    except BaseException:
        with contextlib.suppress(OSError):
            (archive / version).rmdir()  # the empty one that keeps the name
        raise


def switch(directory: Path, version: str) -> None:
    """Deploys an archived version: every file whole, the config last, so that whoever loads has one version or the
    other (see `ProductionPipeline`). Raises `BadConfig`, `BadModel` where the version is not fit to be served."""
    folder = archive_of(directory, version)
    ProductionPipeline(folder / CONFIG, folder / MODEL)
    with locked(directory / ".deploy.lock"):  # two that deploy at once must not mix their files
        for name in DEPLOYED:
            if (folder / name).is_file():
                write_atomic(directory / name, (folder / name).read_bytes())


def set_shadow(directory: Path, version: str | None) -> None:
    """Has every service of the deployed model score with the archived `version` too; None ends that.

    Raises `BadConfig`, `BadModel` if it is not fit for it.
    """
    if version is not None:
        archive_of(directory, version)
        deployed = ProductionPipeline(directory / CONFIG, directory / MODEL)
        if version == deployed.model_version:
            raise BadConfig(f"model {version} is the deployed one; name another version")
        challenger(deployed, directory, version)
    write_shadow(directory, version)


def fingerprint_of_files(*paths: str) -> str:
    """SHA-256 over the contents of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()
