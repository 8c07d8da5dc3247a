"""Which archived version runs in the shadow of the deployed one: training writes it, every pattern reads it."""

from __future__ import annotations

import json
from pathlib import Path

from common.artifacts import write_json
from feature_pipeline import DEFAULT_CONFIG, DEFAULT_MODEL, BadConfig, ProductionPipeline, listed

SHADOW = "shadow.json"


def read_shadow(directory: Path) -> str | None:
    """The version in the shadow; None without one. Raises `BadConfig`."""
    path = directory / SHADOW
    try:
        version = json.loads(path.read_text())["version"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        version = None
    if not isinstance(version, str) or Path(version).name != version:
        raise BadConfig(f"{path} does not name a version; train_best_model.py --shadow writes it anew")
    return version


def write_shadow(directory: Path, version: str | None) -> None:
    """`version` runs in the shadow from now on; None ends it."""
    if version is None:
        (directory / SHADOW).unlink(missing_ok=True)
    else:
        write_json(directory / SHADOW, {"version": version})


def challenger(pipeline: ProductionPipeline, directory: Path, version: str) -> ProductionPipeline:
    """The `version` in the archive of `directory`, beside the deployed `pipeline`.

    Raises `BadConfig`, `BadModel` if it cannot be loaded, or if the deployed one reads some of its codes as others.
    """
    folder = directory / "archive" / version
    files = (folder / Path(name).name for name in (DEFAULT_CONFIG, DEFAULT_MODEL))
    found = ProductionPipeline(*files, pipeline.site_codes)
    other = [code for code in found.reproducer.plan.codes if pipeline.own_code(code) != code]
    if other:
        raise BadConfig(
            f"model {version} cannot run in the shadow of {pipeline.model_version}, which reads these of its codes as "
            f"others: {listed(other)}"
        )
    return found
