"""A model package: a version as one file for another hospital, without patients' data.

A package holds the files of a version, a map of its codes, and a manifest with the SHA-256 of each. The model file is
a pickle; before it is loaded here, every class that it names is compared with a list of those that models consist of.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.artifacts import write_atomic
from feature_pipeline import (
    SCHEMA_VERSION,
    BadConfig,
    BadModel,
    Config,
    FeaturePlan,
    FeatureReproducer,
    ProductionPipeline,
    ScoreModel,
    load_config,
)
from training.check import check
from training.thresholds import describe_thresholds
from training.versions import CARD, CONFIG, DEPLOYED, MODEL, REPORTS, archive_of, archive_version

FORMAT = 1
MANIFEST, CONCEPTS = "package.json", "concepts.csv"
FILES = (*DEPLOYED, CONCEPTS)
MB = 1 << 20
LARGEST = {MODEL: 512 * MB}  # bytes, unpacked
LARGEST_OTHER = 32 * MB

# What a model may consist of: module -> names.
_KNOWN = {
    "feature_pipeline": "ScoreModel BoostedTrees LinearModel Classifier",
    "lightgbm.basic": "Booster",
    "collections": "OrderedDict defaultdict",
    "numpy": "dtype ndarray",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.random._pcg64": "PCG64",
    "numpy.random._pickle": "__bit_generator_ctor __generator_ctor",
    "numpy.random.bit_generator": "SeedSequence __pyx_unpickle_SeedSequence",
    "sklearn.ensemble._forest": "ExtraTreesClassifier",
    "sklearn.tree._classes": "ExtraTreeClassifier",
    "sklearn.tree._tree": "Tree",
    "sklearn._loss._loss": "CyHalfBinomialLoss",
    "sklearn._loss.link": "Interval LogitLink",
    "sklearn._loss.loss": "HalfBinomialLoss",
    "sklearn.ensemble._hist_gradient_boosting.binning": "_BinMapper",
    "sklearn.ensemble._hist_gradient_boosting.gradient_boosting": "HistGradientBoostingClassifier",
    "sklearn.ensemble._hist_gradient_boosting.predictor": "TreePredictor",
    "sklearn.preprocessing._label": "LabelEncoder",
}
KNOWN = {(module, name) for module, names in _KNOWN.items() for name in names.split()}


class _KnownOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a model")
        return super().find_class(module, name)


@dataclass(frozen=True)
class Package:
    """A package that was read: its version, its files, and the SHA-256 of the whole."""

    version: str
    files: dict[str, bytes]
    sha256: str

    @property
    def card(self) -> str:
        return self.files[CARD].decode()


def export_package(directory: Path, path: Path, version: str | None = None) -> Package:
    """Writes the deployed version, or another one of the archive, as a package."""
    if version is None:
        version = load_config(directory / CONFIG).model_version
        if version is None:
            raise BadConfig(f"no model is deployed in {directory}; run train_best_model.py --full first")
    folder = archive_of(directory, version)
    pipeline = ProductionPipeline(folder / CONFIG, folder / MODEL)
    # without joblib's own format, so that its parts can be checked before they are loaded
    model = pickle.dumps(pipeline.model, protocol=4)
    old = pipeline.config
    config = replace(without_places(old), model_sha256=hashlib.sha256(model).hexdigest())
    files: dict[str, bytes] = {name: (folder / name).read_bytes() for name in DEPLOYED}
    for name in REPORTS:  # the name of who set the thresholds stays here
        text = files[name].decode()
        files[name] = text.replace(describe_thresholds(old), describe_thresholds(config)).encode()
    files |= {MODEL: model, CONFIG: config.text().encode(), CONCEPTS: concept_table(pipeline.reproducer).encode()}
    manifest = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "model_version": version,
        "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr(MANIFEST, json.dumps(manifest, indent=1) + "\n")
        for name, data in files.items():
            package.writestr(name, data)
    read_package(content.getvalue(), str(path))  # what could not be imported is not written
    write_atomic(path, content.getvalue())
    return Package(version, files, hashlib.sha256(content.getvalue()).hexdigest())


def without_places(config: Config) -> Config:
    """The config without paths and names of this hospital's files and staff."""

    def stripped(source: dict[str, Any]) -> dict[str, Any]:
        return {**source, "observations": None, "labels": None} if source else source

    adapted = dict(config.adapted)
    if "trained_before" in adapted:
        adapted["trained_before"] = [stripped(source) for source in adapted["trained_before"]]
    return replace(
        config,
        data=stripped(config.data),
        trained_on=stripped(config.trained_on),
        adapted=adapted,
        synonyms={} if config.portable else config.synonyms,  # this hospital's codes; elsewhere they mean other things
        thresholds={**config.thresholds, "by": "another hospital", "reason": ""} if config.thresholds else {},
    )


def concept_table(reproducer: FeatureReproducer) -> str:
    """What the model's codes mean, as CSV: code, concept, unit; empty for codes without a known concept."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("code", "concept", "unit"))
    for code in sorted({*reproducer.config.codes, *FeaturePlan(reproducer.feature_names).codes}):
        concept, unit = reproducer.codes.meaning(code)
        table.writerow((code, concept.name if concept else "", unit))
    return text.getvalue()


def read_package(content: bytes, where: str) -> Package:
    """The package, checked as far as that is possible without loading the model. Raises `BadConfig`, `BadModel`."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as package:
            members = package.infolist()
            if sorted(m.filename for m in members) != sorted((MANIFEST, *FILES)):
                raise BadConfig(f"{where} is not a model package: its files are not exactly those of a package")
            found = {m.filename: _unpacked(package, m, where) for m in members}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, zlib.error):
        raise BadConfig(f"{where} is not a model package, or it is damaged: it cannot be unpacked") from None
    manifest = _manifest(found.pop(MANIFEST), where)
    for name, data in found.items():
        if hashlib.sha256(data).hexdigest() != manifest["files"].get(name):
            raise BadConfig(f"{where}: {name} was changed after the export (its SHA-256 differs)")
    try:
        config = json.loads(found[CONFIG])
        named = config["model_version"], config["model_sha256"]
    except (ValueError, TypeError, KeyError):
        raise BadConfig(f"{where}: {CONFIG} is not the config of a model") from None
    if named != (manifest["model_version"], manifest["files"][MODEL]):
        raise BadConfig(f"{where}: config, model file and manifest are not of one version")
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", manifest["model_version"]):  # it names a folder here
        raise BadConfig(f"{where}: its version is not named as versions are")
    _check_model(found[MODEL], where)
    return Package(manifest["model_version"], found, hashlib.sha256(content).hexdigest())


def _unpacked(package: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> bytes:
    largest = LARGEST.get(member.filename, LARGEST_OTHER)
    with package.open(member) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise BadConfig(f"{where}: {member.filename} is larger than {largest // MB} MB")
    return data


def _manifest(content: bytes, where: str) -> Mapping[str, Any]:
    try:
        manifest = json.loads(content)
        numbers = manifest["format"], manifest["schema_version"]
        whole = isinstance(manifest["files"], dict) and isinstance(manifest["model_version"], str)
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole or not all(type(number) is int for number in numbers):
        raise BadConfig(f"{where}: {MANIFEST} is not the manifest of a model package")
    for name, number, own in zip(("package", "config"), numbers, (FORMAT, SCHEMA_VERSION), strict=True):
        if number != own:
            age = "newer" if number > own else "older"
            raise BadConfig(f"{where} is of {name} format {number}, {age} than {own}, which this release reads")
    return manifest


def _check_model(content: bytes, where: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other versions of scikit-learn: the golden example decides
            model = _KnownOnly(io.BytesIO(content)).load()
    except Exception as error:  # a pickle may raise anything
        raise BadModel(f"{where}: {MODEL} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(model, ScoreModel):
        raise BadModel(f"{where}: {MODEL} holds no model")


def import_package(directory: Path, path: Path) -> tuple[Package, list[str]]:
    """Adds the package to the archive as a version; deploys nothing. Gives also the results of its checks.

    Raises `BadConfig`, `BadModel` if anything is wrong; then nothing is changed.
    """
    if (size := path.stat().st_size) > LARGEST[MODEL] + len(FILES) * LARGEST_OTHER:
        raise BadConfig(f"{path} has {size // MB} MB: larger than any model package")
    package = read_package(path.read_bytes(), str(path))
    if (directory / "archive" / package.version / CONFIG).exists():
        raise BadConfig(f"{directory} has a version {package.version} already; train_best_model.py --list shows it")
    files = {name: package.files[name] for name in DEPLOYED}

    def passes(folder: Path) -> None:
        results.extend(check(folder / CONFIG, folder / MODEL))
        if failed := [str(result) for result in results if not result.passed]:
            raise BadModel(f"{path}: the model fails its checks ({'; '.join(failed)})")

    results: list[Any] = []
    archive_version(directory, package.version, files, passes)
    return package, [str(result) for result in results]
