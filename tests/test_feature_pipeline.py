"""The reproducer and the production pipeline: same numbers everywhere, and a clear word when something is wrong."""

import hashlib
import json
import multiprocessing
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import ExtraTreesClassifier

import feature_pipeline
from feature_pipeline import (
    BadConfig,
    BadModel,
    BadObservations,
    Classifier,
    FeatureReproducer,
    LinearModel,
    MissingCodesWarning,
    NotExplainable,
    ProductionPipeline,
    ScoreModel,
    SetAsideWarning,
    UnfinishedSwitchWarning,
    UnknownRiskWarning,
    get_pipeline,
    load_config,
    resolve_snapshots,
)

pytestmark = pytest.mark.filterwarnings("ignore::feature_pipeline.SetAsideWarning")  # the cohort has dirt on purpose


@pytest.fixture(scope="module")
def new_patients(cohort):
    """Observations of 60 visits."""
    observations = cohort[0]
    return observations[observations["visit_id"].isin(observations["visit_id"].unique()[:60])].reset_index(drop=True)


@pytest.fixture
def deployment(models_dir, tmp_path):
    """A copy of the models directory, without its archive, that a test may spoil."""
    return shutil.copytree(models_dir, tmp_path / "models", ignore=shutil.ignore_patterns("archive"))


def records_of(frame):
    dated = frame.assign(observation_date=frame["observation_date"].dt.strftime("%Y-%m-%dT%H:%M:%S"))
    return json.loads(dated.to_json(orient="records", double_precision=15))


# ------------------------------------------------------------------------------------------- what comes out


def test_transform_gives_a_row_a_visit_and_the_models_columns(config_path, new_patients):
    reproducer = FeatureReproducer(config_path)
    features = reproducer.transform(new_patients, return_all_features=False)
    assert list(features.columns) == ["visit_id", "client", *reproducer.feature_names]
    assert features["visit_id"].tolist() == new_patients["visit_id"].unique().tolist()
    assert features["visit_id"].dtype == new_patients["visit_id"].dtype


def test_transform_with_all_features_contains_the_models(config_path, new_patients):
    reproducer = FeatureReproducer(config_path)
    features, everything = (reproducer.transform(new_patients, return_all_features=f) for f in (False, True))
    assert everything.shape[1] > features.shape[1]
    pd.testing.assert_frame_equal(everything[features.columns], features)


def test_predict_gives_exactly_the_promised_columns(pipeline, new_patients):
    scores = pipeline.predict(new_patients, return_probabilities=True)
    assert list(scores.columns) == ["visit_id", "client", "sepsis_probability"]
    assert scores["sepsis_probability"].between(0, 1).all()
    decisions = pipeline.predict(new_patients, return_probabilities=False)
    assert list(decisions.columns) == ["visit_id", "client", "sepsis_prediction"]
    expected = scores["sepsis_probability"] >= pipeline.config.decision_threshold
    assert decisions["sepsis_prediction"].tolist() == expected.astype(int).tolist()


def test_visit_with_nothing_usable_keeps_its_row(pipeline, new_patients):
    broken = new_patients.copy()
    lost = broken["visit_id"].iloc[0]
    broken.loc[broken["visit_id"] == lost, "observation_value"] = np.nan
    with pytest.warns(UnknownRiskWarning, match="1 of 60 risks are UNKNOWN: 1 x no observation can be used"):
        scores = pipeline.predict(broken, details=True)
    assert scores["visit_id"].tolist() == new_patients["visit_id"].unique().tolist()
    assert scores["sepsis_probability"].isna().tolist() == [True] + [False] * (len(scores) - 1)
    assert (scores["risk_level"][0], scores["reason"][0]) == ("UNKNOWN", "nothing_usable")
    with pytest.warns(UnknownRiskWarning):
        assert pipeline.predict(broken, return_probabilities=False)["sepsis_prediction"].isna().sum() == 1
    assert lost not in pipeline.explain(broken)["visit_id"].tolist()


def test_rows_set_aside_are_told(pipeline, new_patients):
    broken = new_patients.head(50).astype({"observation_value": object})
    broken.loc[3, "observation_value"] = "secret 41.5"
    with pytest.warns(SetAsideWarning, match="1 rows: observation_value is not a number") as caught:
        pipeline.predict(broken)
    assert not any("41.5" in str(warning.message) for warning in caught)


def test_file_frame_and_records_give_the_same_bits(pipeline, new_patients, tmp_path):
    files = [tmp_path / name for name in ("a.csv", "a.csv.gz", "a.parquet")]
    for path in files[:2]:
        new_patients.to_csv(path, index=False)
    new_patients.to_parquet(files[2], index=False)
    expected = pipeline.predict(new_patients)["sepsis_probability"].to_numpy()
    for source in (*files, *map(str, files), records_of(new_patients)):
        assert np.array_equal(pipeline.predict(source)["sepsis_probability"].to_numpy(), expected)


def test_scores_do_not_depend_on_company_or_order(pipeline, new_patients):
    whole = pipeline.predict(new_patients).set_index("visit_id")["sepsis_probability"]
    shuffled = pipeline.predict(new_patients.sample(frac=1, random_state=3)).set_index("visit_id")
    assert shuffled["sepsis_probability"].loc[whole.index].tolist() == whole.tolist()
    for visit, rows in new_patients.groupby("visit_id"):
        assert pipeline.predict(rows)["sepsis_probability"].tolist() == [whole[visit]]


def test_as_of_one_moment_several_and_named(pipeline, new_patients):
    start = new_patients.groupby("visit_id")["observation_date"].min()
    visit = new_patients["visit_id"].iloc[0]
    one = new_patients[new_patients["visit_id"] == visit]
    moments = [start[visit] + pd.Timedelta(hours=h) for h in (1, 5, 9)]
    several = pipeline.predict(one, as_of=moments)
    assert list(several.columns) == ["visit_id", "client", "as_of", "sepsis_probability"]
    assert several["as_of"].tolist() == moments
    for moment, score in zip(moments, several["sepsis_probability"], strict=True):
        known = one[one["observation_date"] <= moment]
        assert pipeline.predict(one, as_of=moment)["sepsis_probability"].tolist() == [score]
        # the future adds nothing: the same rows without it give the same bits
        assert pipeline.predict(known, as_of=str(moment))["sepsis_probability"].tolist() == [score]
    named = pd.DataFrame({"visit_id": [visit], "client": [one["client"].iloc[0]], "as_of": [str(moments[1])]})
    chosen = pipeline.predict(new_patients, as_of=named)
    assert chosen["sepsis_probability"].tolist() == [several["sepsis_probability"][1]]


def test_as_of_before_the_first_observation_gives_no_score(pipeline, new_patients):
    with pytest.warns(UnknownRiskWarning):
        scores = pipeline.predict(new_patients, as_of="2000-01-01")
    assert scores["sepsis_probability"].isna().all() and len(scores) == 60


@pytest.mark.parametrize(
    ("as_of", "message"),
    [
        ("yesterday", "not an ISO 8601 date"),
        ([], "no moment"),
        (pd.DataFrame({"visit_id": [1]}), "missing column 'client', 'as_of'"),
        (pd.DataFrame({"visit_id": [-1], "client": ["x"], "as_of": ["2024-01-01"]}), "name no visit"),
    ],
)
def test_bad_as_of_is_an_error(pipeline, new_patients, as_of, message):
    with pytest.raises(BadObservations, match=message):
        pipeline.predict(new_patients, as_of=as_of)


def test_risk_level_by_the_configs_thresholds(pipeline):
    levels = pipeline.config.risk_thresholds
    probabilities = [0.0, levels["medium"], np.nextafter(levels["high"], 0), levels["high"], np.nan]
    assert pipeline.risk_level(probabilities).tolist() == ["LOW", "MEDIUM", "MEDIUM", "HIGH", "UNKNOWN"]
    assert pipeline.risk_level(1.0) == "HIGH"


def test_explanations_add_up_to_the_score(pipeline, new_patients):
    everything = pipeline.explain(new_patients, top=len(pipeline.feature_names))
    total = everything.groupby("visit_id", sort=False)["contribution"].sum()
    p = pipeline.predict(new_patients)["sepsis_probability"].to_numpy()
    rest = np.log(p / (1 - p)) - total.to_numpy()  # the model's expectation, the same for every visit
    assert np.allclose(rest, rest[0], rtol=0, atol=1e-6)
    top = pipeline.explain(new_patients, top=3)
    assert list(top.columns) == ["visit_id", "client", "feature", "value", "contribution"]
    sizes = top.groupby("visit_id", sort=False)["contribution"].apply(lambda c: c.abs().tolist())
    assert all(len(size) == 3 and size == sorted(size, reverse=True) for size in sizes)


def test_linear_models_explain_and_forests_say_they_cannot():
    features = np.random.default_rng(0).normal(size=(50, 3))
    linear = ScoreModel([LinearModel(np.zeros(3), np.ones(3), np.array([1.0, -2.0, 0.5]), -1.0)], 2.0, 0.3)
    assert np.allclose(
        2.0 * (linear.contributions(features).sum(axis=1) / 2.0 - 1.0) + 0.3,
        2.0 * linear.log_odds(features) + 0.3,
    )
    forest = ExtraTreesClassifier(5, random_state=0).fit(features, features[:, 0] > 0)
    with pytest.raises(NotExplainable, match="not for ExtraTreesClassifier"):
        ScoreModel([Classifier(forest)]).contributions(features)


def test_members_may_weigh_differently():
    generator = np.random.default_rng(3)
    features = generator.normal(size=(50, 4))
    a, b, c = (LinearModel(np.zeros(4), np.ones(4), generator.normal(size=4), 0.1 * k) for k in range(3))
    alike, weighted = ScoreModel([a, b, c], 1.5, 0.2), ScoreModel([a, b, c], 1.5, 0.2, weights=[0.5, 0.2, 0.3])
    before = (a.log_odds(features) + b.log_odds(features) + c.log_odds(features)) / 3
    assert np.array_equal(alike.log_odds(features), before)  # to the bit
    total = a.contributions(features) + b.contributions(features) + c.contributions(features)
    assert np.array_equal(alike.contributions(features), 1.5 * total / 3)
    expected = 0.5 * a.log_odds(features) + 0.2 * b.log_odds(features) + 0.3 * c.log_odds(features)
    assert np.allclose(weighted.log_odds(features), expected, rtol=1e-12)
    inner = 1.5 * (expected - 0.1 * (0.2 + 2 * 0.3))  # without the intercepts
    assert np.allclose(weighted.contributions(features).sum(axis=1), inner, rtol=1e-9)
    for weights in ([0.5, 0.5], [0.5, 0.5, 0.5]):
        with pytest.raises(ValueError, match="add up to 1"):
            ScoreModel([a, b, c], weights=weights)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 7, 8, 9, 64, 1000])
def test_every_kind_of_model_scores_a_row_alone_as_in_a_batch(n_rows):
    generator = np.random.default_rng(n_rows)
    features = generator.normal(size=(n_rows, 37)) * 10
    forest = ExtraTreesClassifier(20, random_state=0).fit(generator.normal(size=(200, 37)), np.arange(200) % 2)
    for member in (LinearModel(np.zeros(37), np.ones(37), generator.normal(size=37), 0.1), Classifier(forest)):
        model = ScoreModel([member], 1.3, -0.2)
        alone = [model.probability(row[None])[0] for row in features]
        assert np.array_equal(model.probability(np.asfortranarray(features)), alone)


def test_dropping_any_code_gives_a_warning_a_prediction_and_a_stated_loss(pipeline, new_patients):
    for code in pipeline.reproducer.plan.codes:
        without = new_patients[new_patients["observation_type_code"] != code]
        with pytest.warns(MissingCodesWarning, match=rf"{code} \(ROC AUC [-+]\d\.\d+ without it\)"):
            scores = pipeline.predict(without)
        assert scores["visit_id"].tolist() == new_patients["visit_id"].unique().tolist()
        assert scores["sepsis_probability"].notna().all()


def test_a_code_that_few_had_is_not_missed(pipeline, new_patients):
    """One visit without a laboratory value is no news."""
    one = new_patients[new_patients["visit_id"] == new_patients["visit_id"].iloc[0]]
    rare = min(pipeline.config.code_prevalence, key=pipeline.config.code_prevalence.get)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MissingCodesWarning)
        pipeline.predict(one[one["observation_type_code"] != rare])


def test_unknown_codes_change_only_what_counts_them(pipeline, new_patients):
    more = pd.concat([new_patients, new_patients.head(20).assign(observation_type_code="UNHEARD-OF")])
    assert pipeline.predict(more)["sepsis_probability"].notna().all()


# ------------------------------------------------------------------------------------------- in processes


def score_file(arguments):
    """What a worker of a pool does; at module level so that it can be found there."""
    config, model, path = arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ProductionPipeline(config_path=config, model_path=model).predict(path)


def test_pool_of_processes(pipeline, config_path, model_path, new_patients, tmp_path):
    expected = pipeline.predict(new_patients)  # the parent has used LightGBM before the fork
    path = tmp_path / "new.csv"
    new_patients.to_csv(path, index=False)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map_async(score_file, [(config_path, model_path, path)] * 4).get(timeout=120)
    for scores in results:
        assert scores["sepsis_probability"].tolist() == expected["sepsis_probability"].tolist()


def test_readme_snippets_run_as_they_stand(models_dir, new_patients, tmp_path, monkeypatch):
    shutil.copytree(models_dir, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    df_new = new_patients
    FeatureReproducer("models/best_model_config.json").transform(df_new, return_all_features=False).to_csv(
        "patient_features.csv", index=False
    )
    ProductionPipeline(config_path="models/best_model_config.json", model_path="models/best_model.pkl").predict(
        df_new, return_probabilities=True
    )
    assert len(pd.read_csv("patient_features.csv")) == 60
    assert get_pipeline() is get_pipeline()
    get_pipeline.cache_clear()


def test_three_files_in_an_empty_folder_predict_the_same(pipeline, models_dir, new_patients, tmp_path):
    """A deployment is feature_pipeline.py, the config and the model: in a fresh process, the same bits."""
    folder = tmp_path / "deployment"
    folder.mkdir()
    for path in (Path(feature_pipeline.__file__), models_dir / "best_model_config.json", models_dir / "best_model.pkl"):
        shutil.copy(path, folder)
    new_patients.to_csv(folder / "new.csv", index=False)
    script = """
        import warnings; warnings.simplefilter("ignore")
        from feature_pipeline import ProductionPipeline
        scores = ProductionPipeline("best_model_config.json", "best_model.pkl").predict("new.csv")
        print("\\n".join(float(p).hex() for p in scores["sepsis_probability"]))
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", "import sys; sys.path.insert(0, '.')\n" + textwrap.dedent(script)],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [float(p).hex() for p in pipeline.predict(new_patients)["sepsis_probability"]]


# ------------------------------------------------------------------------------------------------ bad files


def change_config(directory, **changes):
    path = directory / "best_model_config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del config[key]
        else:
            config[key] = value
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "schema version 99, this code reads version 1"),
        ({"schema_version": None}, "no schema_version"),
        ({"feature_names": None}, "'feature_names' is missing"),
        ({"feature_names": []}, "'feature_names' .* expected a list of texts, not empty"),
        ({"feature_names": ["HR__last", 5]}, "'feature_names' .* expected a list of texts"),
        ({"codes": [1]}, "'codes' .* expected a list of texts"),
        ({"windows": [6.5]}, "'windows' .* expected a list of whole hours"),
        ({"model": {"kind": "lightgbm"}}, "'model' .* expected"),
        ({"model_version": 5}, "'model_version' .* expected the name of a version or null"),
        ({"model_version": "../elsewhere"}, "'model_version' .* expected"),
        ({"decision_threshold": 1.5}, "'decision_threshold' .* expected a number from 0 to 1"),
        ({"decision_threshold": True}, "'decision_threshold'"),
        ({"decision_threshold": float("nan")}, "NaN is not a number in JSON"),
        ({"fill_value": float("inf")}, "Infinity is not a number in JSON"),
        ({"fill_value": 1e300}, "'fill_value'"),
        ({"fill_value": 7}, "'fill_value' differs from the model's"),
        ({"code_prevalence": ["HR"]}, "'code_prevalence' .* expected a share for each code"),
        ({"seed": "7"}, "'seed'"),
        ({"decision_sensitivity": "0.8"}, "'decision_sensitivity'"),
        ({"metrics": None}, "'metrics' is missing"),
        ({"colour": "red"}, "unknown keys: 'colour'"),
        ({"snapshots": {"every_hours": 0}}, "'snapshots' is wrong"),
        (
            {"minimum_evidence": {"inputs": ["spo2"], "at_least": 2, "within_hours": 24, "newest_hours": 6}},
            "'minimum_ev",
        ),
        ({"golden": None}, "'golden' is missing"),
        ({"golden": {"observations": [None], "features": [[0]], "probability": [0.1]}}, "'golden' holds no usable"),
        ({"golden": {"observations": [], "features": [[0], [1, 2]], "probability": [0.1]}}, "'golden' is not"),
        ({"golden": {"observations": [], "features": [["x"]], "probability": [0.1]}}, "'golden' is not"),
        ({"golden": {"observations": [], "features": [[0]], "probability": []}}, "'golden' is not"),
        ({"golden": {"observations": [], "features": [[0]], "probability": None}}, "'golden' has no probability"),
        ({"feature_names": ["HR__fortune"]}, "unknown feature 'HR__fortune'"),
        ({"feature_names": ["HR__last", "HR__last"]}, "occurs twice"),
        ({"risk_thresholds": {"medium": 0.8, "high": 0.7}}, "0 < medium < high < 1"),
        ({"fill_value": "zero"}, "'fill_value' .* expected a number or null"),
        ({"synonyms": {"X": "no such thing"}}, "unknown concept 'no such thing'"),
        ({"synonyms": {"X": ["heart_rate"]}}, "'synonyms' must map codes to names"),
    ],
)
def test_bad_config(deployment, changes, message):
    path = change_config(deployment, **changes)
    with pytest.raises(BadConfig, match=message):
        ProductionPipeline(path, deployment / "best_model.pkl").predict(
            [{"visit_id": 1, "client": "a", "observation_date": "2024-01-01", "observation_type_code": "X",
              "observation_value": 1}]
        )  # fmt: skip


def test_config_that_is_missing_or_not_json(tmp_path):
    with pytest.raises(BadConfig, match=r"does not exist; run generate_features\.py first"):
        load_config(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"schema_version": 1, ')
    with pytest.raises(BadConfig, match="cannot be read as JSON"):
        load_config(tmp_path / "half.json")


def test_tampered_model_is_refused_before_it_is_unpickled(deployment, config_path, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    joblib.dump(Trap(), deployment / "best_model.pkl")
    with pytest.raises(BadModel, match="SHA-256 differs"):
        ProductionPipeline(deployment / "best_model_config.json", deployment / "best_model.pkl")
    assert not (tmp_path / "sprung").exists()


def test_while_a_version_is_switched_in_the_config_finds_its_own_model(deployment, models_dir, tmp_path):
    """The model file is then a step ahead of the config; one that no version has is never passed over."""
    version = json.loads((deployment / "best_model_config.json").read_text())["model_version"]
    shutil.copytree(models_dir / "archive" / version, tmp_path / "archive" / version)
    shutil.copy(deployment / "best_model_config.json", tmp_path)
    (tmp_path / "best_model.pkl").write_bytes(b"the next version's model")
    files = tmp_path / "best_model_config.json", tmp_path / "best_model.pkl"
    with pytest.raises(BadModel, match="SHA-256 differs"):
        ProductionPipeline(*files)
    shutil.copytree(tmp_path / "archive" / version, tmp_path / "archive" / "next")
    digest = hashlib.sha256(files[1].read_bytes()).hexdigest()
    change_config(tmp_path / "archive" / "next", model_sha256=digest)
    with pytest.warns(UnfinishedSwitchWarning, match="is of version next"):
        assert ProductionPipeline(*files).model_version == version


def test_missing_model(deployment, config_path):
    (deployment / "best_model.pkl").unlink()
    with pytest.raises(BadModel, match=r"run train_best_model\.py --full"):
        ProductionPipeline(config_path, deployment / "best_model.pkl")


def test_config_before_training_has_no_model(deployment, model_path):
    path = change_config(deployment, model_sha256="")
    with pytest.raises(BadModel, match=r"no trained model yet; run train_best_model\.py --full"):
        ProductionPipeline(path, model_path)


def test_other_pickles_are_refused(deployment):
    joblib.dump({"a": 1}, deployment / "best_model.pkl")
    digest = hashlib.sha256((deployment / "best_model.pkl").read_bytes()).hexdigest()
    path = change_config(deployment, model_sha256=digest)
    with pytest.raises(BadModel, match="holds a dict, not a ScoreModel"):
        ProductionPipeline(path, deployment / "best_model.pkl")


def test_golden_example_guards_features_and_probability(deployment, model_path, config_path):
    golden = load_config(config_path).golden
    moved = json.loads(json.dumps(golden))
    column = next(i for i, v in enumerate(moved["features"][0]) if v is not None)
    moved["features"][0][column] += 1e-3
    with pytest.raises(BadModel, match="other features here than in training: '"):
        ProductionPipeline(change_config(deployment, golden=moved), model_path)
    with pytest.raises(BadModel, match="another probability"):
        ProductionPipeline(change_config(deployment, golden={**golden, "probability": [0.123]}), model_path)


def test_names_of_features_cannot_be_exchanged(deployment, pipeline):
    """The model knows the names it learned, and each code has values of its own in the golden example."""
    other = {"SBP": "Resp", "Resp": "SBP"}
    parts = [name.partition("__") for name in pipeline.feature_names]
    names = [f"{other.get(code, code)}__{tail}" for code, _, tail in parts]
    assert names != pipeline.feature_names and sorted(names) == sorted(pipeline.feature_names)
    path = change_config(deployment, feature_names=names)
    with pytest.raises(BadModel, match="on other features, or in another order"):
        ProductionPipeline(path, deployment / "best_model.pkl")
    golden = pipeline.config.golden
    features = FeatureReproducer(path).transform(golden["observations"]).iloc[:, 2:].to_numpy(float)
    assert not np.allclose(features, np.array(golden["features"], dtype=float), equal_nan=True)


def test_the_golden_example_leaves_hardly_a_feature_empty(pipeline):
    features = np.array(pipeline.config.golden["features"], dtype=float)
    assert np.isnan(features).mean() < 0.05
    known = {r["observation_type_code"] for r in pipeline.config.golden["observations"]}
    assert set(pipeline.reproducer.plan.codes) <= known


def test_another_fill_value_than_the_models_is_refused(deployment, pipeline):
    model = {**pipeline.config.model, "fill_value": 7}
    path = change_config(deployment, fill_value=7, model=model)
    with pytest.raises(BadModel, match="another fill_value"):
        ProductionPipeline(path, deployment / "best_model.pkl")


def test_explaining_nothing_usable_gives_no_row(pipeline):
    row = {"visit_id": 1, "client": "a", "observation_date": "2024-01-02", "observation_type_code": "HR"}
    table = pipeline.explain([row | {"observation_value": 80}], as_of="2024-01-01")
    assert len(table) == 0
    assert table.columns.tolist() == ["visit_id", "client", "feature", "value", "contribution"]


@pytest.mark.parametrize("top", [0, -1, 2.5, "5", None, True])
def test_explaining_by_no_number_of_features_is_refused(pipeline, new_patients, top):
    with pytest.raises(ValueError, match=r"top.* whole number from 1"):
        pipeline.explain(new_patients, top=top)


def test_snapshots_of_nothing_are_refused_with_a_word(pipeline):
    with pytest.raises(BadObservations, match="no usable observation in 0 rows"):
        pipeline.predict(pd.DataFrame(columns=["visit_id", "client", "observation_date", "observation_type_code",
                                               "observation_value"]))  # fmt: skip
    with pytest.raises(BadObservations, match="missing column 'observation_value'"):
        pipeline.predict([{"visit_id": 1, "client": "a", "observation_date": "2024-01-01",
                           "observation_type_code": "HR"}])  # fmt: skip


def test_resolve_snapshots_accepts_every_way_to_name_a_moment(pipeline, new_patients):
    observations = pipeline.reproducer.read(new_patients)
    texts = ["2024-03-01T00:00:00Z", "2024-03-01 00:00", "2024-03-01T02:00:00+02:00"]
    moments = [resolve_snapshots(observations, m)[1][0] for m in [*texts, pd.Timestamp(texts[0])]]
    assert len(set(moments)) == 1
