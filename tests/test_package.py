"""A version as one file for another hospital: it holds no patients' data, and a bad one is refused whole."""

import getpass
import hashlib
import io
import json
import pickle
import zipfile

import pytest

import train_best_model
from feature_pipeline import ProductionPipeline, ScoreModel, load_config
from training import package as package_module
from training.package import CONCEPTS, FILES, MANIFEST, export_package, read_package
from training.versions import CARD, CONFIG, DEPLOYED, MODEL


@pytest.fixture(scope="module")
def package(models_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "model.zip"
    assert train_best_model.main(["--models-dir", str(models_dir), "--export", str(path), "--quiet"]) == 0
    return path


def contents(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as found:
        return {name: found.read(name) for name in found.namelist()}


def written(path, files: dict[str, bytes], consistent: bool = True, **manifest) -> None:
    """A package of `files`; `consistent`: the manifest and the config have the hashes that belong to them."""
    files = dict(files)
    if consistent:
        config = json.loads(files[CONFIG])
        config["model_sha256"] = hashlib.sha256(files[MODEL]).hexdigest()
        files[CONFIG] = json.dumps(config).encode()
        about = json.loads(files.pop(MANIFEST))
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        files[MANIFEST] = json.dumps({**about, "files": hashes, **manifest}).encode()
    with zipfile.ZipFile(path, "w") as out:
        for name, data in files.items():
            out.writestr(name, data)


def imported(directory, path, capsys) -> tuple[int, str]:
    status = train_best_model.main(["--models-dir", str(directory), "--import", str(path)])
    return status, "".join(capsys.readouterr())


def test_an_imported_model_gives_the_same_probabilities_and_shows_its_card(
    package, models_dir, pipeline, cohort, tmp_path, capsys
):
    status, shown = imported(tmp_path, package, capsys)
    version = pipeline.model_version
    assert status == 0 and f"# Model card: sepsis risk {version}" in shown and "golden example reproduced" in shown
    assert hashlib.sha256(package.read_bytes()).hexdigest() in shown
    assert not (tmp_path / CONFIG).exists()  # archived, not deployed
    assert train_best_model.main(["--models-dir", str(tmp_path), "--rollback", version, "--quiet"]) == 0
    other = ProductionPipeline(tmp_path / CONFIG, tmp_path / MODEL)
    some = cohort[0][cohort[0]["visit_id"].isin(cohort[0]["visit_id"].unique()[:20])]
    observations = pipeline.reproducer.read(some)
    visit, moments = [*range(observations.n_visits)], observations.last_time
    assert (other.score(observations, visit, moments) == pipeline.score(observations, visit, moments)).all()
    assert sorted(p.name for p in tmp_path.glob("*")) == sorted([*DEPLOYED, "archive", ".deploy.lock"])


def test_it_holds_no_patients_no_paths_and_no_names_of_staff(package, models_dir, cohort, cohort_files):
    files = contents(package)
    assert sorted(files) == sorted((MANIFEST, *FILES))
    everything = b"\n".join(files.values())
    for text in (*map(str, cohort_files), str(models_dir), f"set by {getpass.getuser()}"):
        assert text.encode() not in everything
    config = json.loads(files[CONFIG])
    assert config["thresholds"]["by"] != getpass.getuser()
    assert {config[key]["labels"] for key in ("data", "trained_on")} == {None}
    clients = {f'"{client}"'.encode() for client in cohort[1]["client"].astype(str)}
    assert not any(client in everything for client in clients)
    assert b"HR,heart_rate,1/min" in files[CONCEPTS]


def test_an_imported_model_does_not_train_on_the_demo_cohort_by_itself(package, tmp_path, capsys):
    imported(tmp_path, package, capsys)
    version = next((tmp_path / "archive").iterdir()).name
    options = ["--models-dir", str(tmp_path), "--quiet"]
    assert train_best_model.main([*options, "--rollback", version]) == 0
    assert train_best_model.main([*options, "--full"]) == 2
    assert "are not here" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def without(files, name):
    return {key: data for key, data in files.items() if key != name}


CHANGED = {
    "an extra file": (lambda f: ({**f, "more.txt": b""}, {}), "not exactly those of a package"),
    "a file outside": (lambda f: ({**without(f, CARD), f"../{CARD}": f[CARD]}, {}), "not exactly those of a package"),
    "a missing file": (lambda f: (without(f, CARD), {}), "not exactly those of a package"),
    "a newer package": (lambda f: (f, {"format": 2}), "package format 2, newer"),
    "an older package": (lambda f: (f, {"format": 0}), "package format 0, older"),
    "a newer config": (lambda f: (f, {"schema_version": 99}), "config format 99, newer"),
    "a version that is a path": (lambda f: (f, {"model_version": "../x"}), "not of one version"),
    "another manifest": (lambda f: ({**f, MANIFEST: b"[]"}, None), "not the manifest"),
    "a manifest of numbers": (lambda f: ({**f, MANIFEST: b'{"format": "1"}'}, None), "not the manifest"),
    "a changed card": (lambda f: ({**f, CARD: f[CARD] + b"!"}, None), "was changed after the export"),
    "a changed model": (lambda f: ({**f, MODEL: f[MODEL][:-1] + b"x"}, None), "was changed after the export"),
    "code in the model": (lambda f: ({**f, MODEL: pickle.dumps(Evil())}, {}), "builtins.print is no part of a model"),
    "no model": (lambda f: ({**f, MODEL: pickle.dumps([1])}, {}), "holds no model"),
    "half a pickle": (lambda f: ({**f, MODEL: f[MODEL][:100]}, {}), "cannot be loaded"),
    "another model": (
        lambda f: ({**f, MODEL: pickle.dumps(ScoreModel(pickle.loads(f[MODEL]).members, 2.0), 4)}, {}),
        "golden example gives another probability",
    ),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_package_is_refused_whole(what, package, tmp_path, capsys):
    change, expected = CHANGED[what]
    files, manifest = change(contents(package))
    path, directory = tmp_path / "changed.zip", tmp_path / "models"
    written(path, files, manifest is not None, **(manifest or {}))
    status, shown = imported(directory, path, capsys)
    assert status == 2 and expected in shown and shown.count("\n") == 1 and "executed" not in shown
    assert not [p for p in directory.rglob("*") if p.is_file()]


def test_a_version_that_names_another_folder_is_refused(package, tmp_path, capsys):
    files = contents(package)
    files[CONFIG] = json.dumps({**json.loads(files[CONFIG]), "model_version": ".."}).encode()
    written(tmp_path / "changed.zip", files, model_version="..")
    status, shown = imported(tmp_path / "models", tmp_path / "changed.zip", capsys)
    assert status == 2 and "not named as versions are" in shown


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-30], lambda b: b""])
def test_a_damaged_file_is_refused(damage, package, tmp_path, capsys):
    path = tmp_path / "damaged.zip"
    path.write_bytes(damage(package.read_bytes()))
    status, shown = imported(tmp_path / "models", path, capsys)
    assert status == 2 and shown.count("\n") == 1 and "cannot be unpacked" in shown


def test_a_package_with_a_changed_byte_is_refused(package, tmp_path, capsys):
    path = tmp_path / "changed.zip"
    flipped = bytearray(package.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(flipped)
    status, shown = imported(tmp_path / "models", path, capsys)
    assert status == 2 and shown.count("\n") == 1


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    status, shown = imported(tmp_path, tmp_path / "none.zip", capsys)
    assert status == 2 and shown.count("\n") == 1 and "none.zip" in shown


def test_a_zip_bomb_is_not_unpacked(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(package_module, "LARGEST_OTHER", package_module.MB)
    files = {**contents(package), CARD: bytes(200 * package_module.MB)}
    path, directory = tmp_path / "bomb.zip", tmp_path / "models"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in files.items():
            out.writestr(name, data)
    assert path.stat().st_size < 2 * package_module.MB
    sizes = []
    opened = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: sizes.append(n) or opened(self, n))
    status, shown = imported(directory, path, capsys)
    assert status == 2 and f"{CARD} is larger than 1 MB" in shown and 0 < max(sizes) < 600 * package_module.MB


def test_a_file_of_a_name_twice_is_refused(package, tmp_path, capsys):
    path = tmp_path / "twice.zip"
    path.write_bytes(package.read_bytes())
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as out:
        out.writestr(CARD, "another")
    status, shown = imported(tmp_path / "models", path, capsys)
    assert status == 2 and "not exactly those of a package" in shown


def test_a_version_that_is_there_already_is_refused(package, models_dir, capsys):
    before = {p: p.stat().st_mtime_ns for p in models_dir.rglob("*") if p.is_file()}
    status, shown = imported(models_dir, package, capsys)
    assert status == 2 and "has a version" in shown
    assert {p: p.stat().st_mtime_ns for p in models_dir.rglob("*") if p.is_file()} == before


def test_every_kind_of_model_can_be_packed():
    """What scikit-learn and LightGBM pickle may change with their versions."""
    import numpy as np

    from training.candidates import MODEL_CONFIGURATIONS
    from training.fitting import FeatureTable, fit_model
    from training.package import _check_model

    generator = np.random.default_rng(0)
    plain = generator.normal(size=(4, 400))
    table = FeatureTable(plain, plain, np.ones(400, dtype=bool))
    label = (plain[0] > 0.5).astype(np.int8)
    small = {"n_estimators": 2, "max_iter": 2, "num_iterations": 2}
    for configuration in {c.kind: c for c in MODEL_CONFIGURATIONS}.values():
        params = {**configuration.params, **{k: n for k, n in small.items() if k in configuration.params}}
        model = fit_model(
            type(configuration)(configuration.name, configuration.kind, params, 0.0),
            table,
            np.arange(400),
            np.arange(4),
            label,
        )
        _check_model(pickle.dumps(model, protocol=4), "here")


def test_exporting_without_a_deployed_model_is_refused(tmp_path, capsys):
    assert train_best_model.main(["--models-dir", str(tmp_path), "--export", str(tmp_path / "x.zip")]) == 2
    assert not (tmp_path / "x.zip").exists()


def test_what_was_exported_is_what_is_read(models_dir, tmp_path):
    exported = export_package(models_dir, tmp_path / "model.zip")
    read = read_package((tmp_path / "model.zip").read_bytes(), "it")
    assert read == exported and read.version == load_config(models_dir / CONFIG).model_version
    assert isinstance(pickle.load(io.BytesIO(read.files[MODEL])), ScoreModel)
