"""Every code and unit of every concept that the model measures, through every pattern: the score of the model's own."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from test_stream import ROOT

from batch_processor import BatchProcessor
from db_predictor import DatabasePredictor
from feature_pipeline import CONCEPTS
from serving.api.app import create_app
from serving.api.settings import Settings
from serving.db.tables import schema

pytestmark = pytest.mark.filterwarnings("ignore::feature_pipeline.SetAsideWarning")


def ways(concept):
    """(code, unit that is named, factor to the concept's unit, offset) of every code and of every other unit."""
    codes = concept.codes.split(", ")
    yield from ((code, None, 1.0, 0.0) for code in codes)
    for unit, coded in concept.coded_in.items():
        yield from ((code, None, concept.unit_named(unit).factor, 0.0) for code in coded.split(", "))
    for unit in concept.units:
        yield from ((codes[0], name, unit.factor, unit.offset) for name in unit.spellings.split(", "))


@pytest.fixture(scope="module")
def table(pipeline):
    """(observations, score of the visit as it is): the config's example, once for each way to send a concept."""
    golden = pd.DataFrame(pipeline.config.golden["observations"])
    visit = golden[golden["visit_id"] == golden["visit_id"].iloc[0]]
    visit = visit[["visit_id", "client", "observation_date", "observation_type_code", "observation_value"]]
    copies = [visit.assign(visit_id="as it is", unit=None)]
    for concept in (c for c in CONCEPTS if not c.static):
        own = pipeline.reproducer.codes.own_code(concept.codes.split(", ")[-1])
        hit = visit["observation_type_code"] == own
        for code, unit, factor, offset in ways(concept) if hit.any() else ():
            copy = visit.assign(visit_id=f"{concept.name} {code} {unit}", unit=None)
            copy.loc[hit, "observation_type_code"] = code
            copy.loc[hit, "observation_value"] = (copy.loc[hit, "observation_value"] - offset) / factor
            copy.loc[hit, "unit"] = unit
            copies.append(copy)
    return pd.concat(copies, ignore_index=True), pipeline.predict(visit)["sepsis_probability"].item()


@pytest.fixture(scope="module")
def scores(table, pipeline):
    found = pipeline.predict(table[0]).set_index("visit_id")["sepsis_probability"]
    return {visit: float(score) for visit, score in found.items()}


def test_the_same_to_the_last_bit_or_to_the_rounding_of_the_unit(table, scores):
    assert len(scores) > 150
    for visit, score in scores.items():
        own_unit = visit.endswith(" None") and not any(
            visit.split()[1] in codes.split(", ") for c in CONCEPTS for codes in c.coded_in.values()
        )
        assert score == table[1] if own_unit else np.isclose(score, table[1], rtol=1e-6), visit


def test_in_a_file(table, scores, tmp_path, config_path, model_path):
    (tmp_path / "in").mkdir()
    table[0].to_csv(tmp_path / "in" / "ward.csv", index=False)
    folders = [tmp_path / name for name in ("in", "output", "failed")]
    assert BatchProcessor(config_path, model_path).process_directory(*folders).ok
    found = pd.read_csv(tmp_path / "output" / "predictions_ward.csv").set_index("visit_id")["sepsis_probability"]
    assert found.to_dict() == scores


def test_in_a_database(table, scores, tmp_path, config_path, model_path):
    predictor = DatabasePredictor(f"sqlite:///{tmp_path}/visits.db", config_path, model_path, as_of="last")
    predictor.init_db()
    tables, rows = schema().tables, table[0]
    with predictor.engine.begin() as connection:
        visits = rows[["client", "visit_id"]].drop_duplicates().to_dict("records")
        connection.execute(sa.insert(tables["visits"]), visits)
        rows = rows.assign(observation_date=pd.to_datetime(rows["observation_date"]))
        records = rows.astype(object).where(rows.notna(), None).to_dict("records")
        connection.execute(sa.insert(tables["patient_observations"]), records)
    predictor.process_pending_visits()
    with predictor.engine.connect() as connection:
        found = connection.execute(sa.select(tables["visits"].c.visit_id, tables["visits"].c.sepsis_score))
        assert dict(map(tuple, found)) == scores
    predictor.engine.dispose()


def test_over_http(table, scores, config_path, model_path):
    client = create_app(Settings(config=str(config_path), model=str(model_path), insecure=True)).test_client()
    body = table[0].to_json(orient="records", date_format="iso", double_precision=15)
    answer = client.post("/predict?as_of=last", data=body, content_type="application/json").get_json()
    assert {p["visit_id"]: p["sepsis_probability"] for p in answer["predictions"]} == scores


def test_in_a_stream(table, scores, config_path, model_path):
    lines = table[0].to_json(orient="records", lines=True, date_format="iso", double_precision=15)
    options = ["--config", str(config_path), "--model", str(model_path), "--quiet", "--as-of", "last"]
    command = [sys.executable, "stream_processor.py", *options]
    done = subprocess.run(command, input=lines, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = map(json.loads, done.stdout.splitlines())
    assert {r["visit_id"]: r["sepsis_probability"] for r in results} == scores
