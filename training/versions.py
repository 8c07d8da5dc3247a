"""Versions of the deployed model: the archive, switching between them, comparing two on the same patients."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from common.artifacts import locked, write_atomic
from common.command_line import log
from feature_pipeline import BadConfig, ProductionPipeline, load_config

CONFIG = "best_model_config.json"
REPORTS = ("production_model_info.txt", "training_report.html", "MODEL_CARD.md")
DEPLOYED = ("best_model.pkl", "feature_names.json", *REPORTS, CONFIG)


def archive_of(directory: Path, version: str) -> Path:
    """The folder of an archived version. Raises `BadConfig`."""
    folder = directory / "archive" / version
    if not version or Path(version).name != version or not (folder / CONFIG).is_file():
        raise BadConfig(f"no version {version!r} in {directory / 'archive'}; train_best_model.py --list shows them")
    return folder


def list_versions(directory: Path) -> list[dict[str, Any]]:
    """The archived versions, the latest first; ``deployed`` marks the one that is served."""
    try:
        current = load_config(directory / CONFIG).model_version
    except BadConfig:
        current = None
    found = []
    for path in sorted((directory / "archive").glob(f"*/{CONFIG}"), reverse=True):
        try:
            config = load_config(path)
        except BadConfig as error:
            log.warning("warning: %s", error)
            continue
        scores = config.metrics.get("out_of_fold", {})
        found.append(
            {
                "version": path.parent.name,
                "deployed": path.parent.name == current,
                "trained_at": config.trained_at,
                "feature_set": config.feature_set,
                "model": config.model["name"],
                "roc_auc": scores.get("roc_auc"),
                "average_precision": scores.get("average_precision"),
            }
        )
    return found


def switch(directory: Path, version: str) -> None:
    """Deploys an archived version: every file whole, the config last, so that whoever loads has one version or the
    other (see `ProductionPipeline`). Raises `BadConfig`, `BadModel` where the version is not fit to be served."""
    folder = archive_of(directory, version)
    ProductionPipeline(folder / CONFIG, folder / "best_model.pkl")
    with locked(directory / ".deploy.lock"):  # two that deploy at once must not mix their files
        for name in DEPLOYED:
            if (folder / name).is_file():
                write_atomic(directory / name, (folder / name).read_bytes())


def fingerprint_of_files(*paths: str) -> str:
    """SHA-256 over the contents of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()
