"""Pending visits of a database: same bits as `predict`, each visit once, whoever is killed or cut off."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa

import db_predictor
from common.pseudonyms import Pseudonyms
from db_predictor import main
from serving.db import predictor as scoring
from serving.db import reading
from serving.db.connection import MYSQL, BatchUndone, DatabaseError, connect, driver_words, safe_url
from serving.db.predictor import DatabasePredictor, skips_locked
from serving.db.tables import make_tables, read_mapping, schema

ROOT = Path(db_predictor.__file__).parent
Predictor = partial(DatabasePredictor, as_of="last")  # of past stays


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def url(request, tmp_path):
    """The URL of an empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/data/sepsis.db"
    else:
        yield request.getfixturevalue({"postgresql": "postgres"}.get(request.param, request.param))


@pytest.fixture(scope="session")
def rows(cohort):
    """Observations of 40 visits, in scattered order."""
    observations = cohort[0]
    visits = observations["visit_id"].unique()[:40]
    some = observations[observations["visit_id"].isin(visits)].sample(frac=1, random_state=2)
    return some.assign(visit_id=some["visit_id"].astype(str), client=some["client"].astype(str)).reset_index(drop=True)


@pytest.fixture
def predictor(url, config_path, model_path):
    predictor = Predictor(url, config_path, model_path, batch_size=7)
    predictor.init_db()
    yield predictor
    predictor.close()


def load(engine: sa.Engine, observations: pd.DataFrame, visits: pd.DataFrame | None = None) -> None:
    """Observations, and the visits among them (or `visits`) as pending."""
    tables = schema().tables
    if visits is None:
        visits = observations[["client", "visit_id"]].drop_duplicates()
    records = observations.astype(object).where(observations.notna(), None).to_dict("records")
    with engine.begin() as connection:
        if len(visits):
            connection.execute(sa.insert(tables["visits"]), visits.to_dict("records"))
        connection.execute(sa.insert(tables["patient_observations"]), records)


def frame(engine: sa.Engine, query: str) -> pd.DataFrame:
    with engine.connect() as connection:
        return pd.DataFrame(connection.execute(sa.text(query)).mappings().all())


def predict(pipeline, source) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = pipeline.predict(source)
    return table.sort_values(["client", "visit_id"]).reset_index(drop=True)


def key(engine: sa.Engine) -> str:
    """The type of a key of a hospital's own tables, by which no two patients are equal."""
    return "VARCHAR(64)" + (" COLLATE utf8mb4_nopad_bin" if engine.dialect.name in MYSQL else "")


VISITS = "SELECT * FROM visits ORDER BY client, visit_id"
PREDICTIONS = "SELECT * FROM sepsis_predictions ORDER BY client, visit_id, id"


# --------------------------------------------------------------------------------------------------- scores


def test_scores_are_those_of_predict_to_the_last_bit(predictor, rows, pipeline):
    load(predictor.engine, rows)
    result = predictor.process_pending_visits()
    expected = predict(pipeline, rows)
    assert result.scored == len(expected) == 40 and result.batches == 6
    assert result.observations == len(rows)
    visits, predictions = frame(predictor.engine, VISITS), frame(predictor.engine, PREDICTIONS)
    for table in (visits, predictions):
        assert table["visit_id"].tolist() == expected["visit_id"].tolist()
        np.testing.assert_array_equal(table["sepsis_score"], expected["sepsis_probability"])
        assert table["risk_level"].tolist() == pipeline.risk_level(expected["sepsis_probability"]).tolist()
    assert set(predictions["model_version"]) == {pipeline.model_version}
    assert predictions["observations"].sum() == len(rows)
    moment = pd.to_datetime(visits["scored_at"])
    assert (abs(moment - pd.Timestamp.now("UTC").tz_localize(None)) < pd.Timedelta(minutes=5)).all()
    assert predictor.process_pending_visits().scored == 0
    assert "scored 40 visits" in str(result)


def test_dirt_of_a_foreign_table_is_set_aside(url, config_path, model_path, pipeline, tmp_path):
    """A hospital's own tables, with other names and all columns as text or number as it pleases."""
    engine = connect(url)
    if engine.dialect.name == "sqlite":
        Path(engine.url.database).parent.mkdir()
    number = "INTEGER" if engine.dialect.name == "sqlite" else "BIGINT"
    with engine.begin() as connection:
        for statement in (
            f"CREATE TABLE results (encounter {number}, patient {key(engine)}, taken TEXT, code TEXT, result TEXT)",
            f"CREATE TABLE encounters (encounter {number}, patient {key(engine)}, score NUMERIC(12,10), level TEXT, "
            "scored_at TIMESTAMP, ward TEXT, PRIMARY KEY (encounter, patient))",
            "INSERT INTO encounters (encounter, patient) VALUES (7, 'a'), (8, 'a'), (9, 'b'), (10, 'b')",
            "INSERT INTO results VALUES (7, 'a', '2024-01-01T00:00', 'HR', '80'), (7, 'a', '2024-01-01 01:00', 'HR', "
            "'>100'), (7, 'a', 'yesterday', 'HR', '90'), (7, 'a', NULL, 'HR', '90'), (8, 'a', '2024-01-01', 'NA', "
            "'130'), (9, 'b', '2024-01-01', 'HR', 'high'), (8, 'a', '2024-01-01T00:30:00+02:00', 'Temp', '100.4')",
        ):
            connection.execute(sa.text(statement))
    names = {
        "observations": {
            "table": "results",
            "columns": {
                "visit_id": "encounter",
                "client": "patient",
                "observation_date": "taken",
                "observation_type_code": "code",
                "observation_value": "result",
                "reference_range_min": None,
                "reference_range_max": None,
            },
        },
        "visits": {
            "table": "encounters",
            "columns": {"visit_id": "encounter", "client": "patient", "sepsis_score": "score", "risk_level": "level"},
        },
        "predictions": {"table": "scores"},
    }
    mapping = tmp_path / "tables.json"
    mapping.write_text(json.dumps(names))
    assert main(["--db-url", url, "--tables", str(mapping), "--init-db"]) == 0  # makes the missing one only
    predictor = Predictor(url, config_path, model_path, tables=read_mapping(mapping))
    result = predictor.process_pending_visits()
    assert (result.scored, result.unknown, result.without_observations) == (2, {"nothing_usable": 1}, 1)
    assert result.set_aside == {"bad_date": 1, "no_date": 1, "bad_value": 1}
    found = frame(engine, "SELECT * FROM scores WHERE reason IS NULL ORDER BY visit_id")
    raw = frame(engine, "SELECT * FROM results")
    raw.columns = ["visit_id", "client", "observation_date", "observation_type_code", "observation_value"]
    expected = predict(pipeline, raw).dropna()
    np.testing.assert_array_equal(found["sepsis_score"], expected["sepsis_probability"])
    left = frame(engine, "SELECT encounter FROM encounters WHERE score IS NULL ORDER BY encounter")
    assert left["encounter"].tolist() == [9, 10]
    assert predictor.process_pending_visits().scored == 0
    predictor.close()
    engine.dispose()


def test_a_date_that_python_lacks_is_set_aside(postgres, rows, config_path, model_path, pipeline):
    predictor = Predictor(postgres, config_path, model_path)
    predictor.init_db()
    load(predictor.engine, rows)
    first = rows.iloc[0]
    with predictor.engine.begin() as connection:
        for date in ("infinity", "-infinity", "0044-03-15 12:00:00 BC", "12024-01-01 00:00:00"):
            connection.execute(
                sa.text(
                    "INSERT INTO patient_observations (visit_id, client, observation_date, observation_type_code, "
                    f"observation_value) VALUES (:visit_id, :client, '{date}', 'HR', 80)"
                ),
                {"visit_id": first["visit_id"], "client": first["client"]},
            )
    result = predictor.process_pending_visits()
    assert result.scored == 40 and result.set_aside["bad_date"] == 4
    np.testing.assert_array_equal(
        frame(predictor.engine, VISITS)["sepsis_score"], predict(pipeline, rows)["sepsis_probability"]
    )
    predictor.close()


# database, type of the keys in visits and in observations, keys (visit_id, client) in visits and in observations
KEYS = {
    "letters": (
        "sqlite",
        "TEXT COLLATE NOCASE",
        "TEXT COLLATE NOCASE",
        [("V", "A"), ("W", "B")],
        [("v", "a"), ("w", "b")],
    ),
    "numbers": ("postgresql", "BIGINT", "NUMERIC(10, 2)", [(7, 1), (8, 2)], None),
    "padding": ("postgresql", "CHAR(4)", "VARCHAR(4)", [("1   ", "a   "), ("2   ", "b   ")], [("1", "a"), ("2", "b")]),
    "blanks": ("sqlite", "TEXT", "TEXT", [("1", "a"), ("1 ", "a"), ("1", " a")], None),
    "cases": ("postgresql", "TEXT", "TEXT", [("v", "a"), ("V", "a"), ("v", "A")], None),
}


@pytest.mark.parametrize("which", KEYS)
def test_keys_are_equal_where_the_database_says_so(
    which, request, tmp_path, rows, config_path, model_path, pipeline, monkeypatch
):
    monkeypatch.setenv("SEPSIS_PSEUDONYM_KEY", "a-key-for-this-test-alone")
    database, own, other, visits, keys = KEYS[which]
    engine = connect(f"sqlite:///{tmp_path}/x.db" if database == "sqlite" else request.getfixturevalue("postgres"))
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                f"CREATE TABLE visits (visit_id {own}, client {own}, sepsis_score DOUBLE PRECISION, risk_level TEXT, "
                "scored_at TIMESTAMP, PRIMARY KEY (visit_id, client))"
            )
        )
        connection.execute(
            sa.text(
                f"CREATE TABLE patient_observations (visit_id {other}, client {other}, observation_date TIMESTAMP, "
                "observation_type_code TEXT, observation_value FLOAT)"
            )
        )
    parts = [rows[rows["visit_id"] == visit].iloc[:, :5] for visit in rows["visit_id"].unique()[: len(visits)]]
    expected = [predict(pipeline, part)["sepsis_probability"][0] for part in parts]
    assert len(set(expected)) == len(visits)
    with engine.begin() as connection:
        tables = sa.MetaData()
        tables.reflect(connection)
        for part, (visit, client) in zip(parts, keys or visits, strict=True):
            records = part.assign(visit_id=visit, client=client).astype(object).where(part.notna(), None)
            connection.execute(sa.insert(tables.tables["patient_observations"]), records.to_dict("records"))
        pending = [{"visit_id": visit, "client": client} for visit, client in visits]
        connection.execute(sa.insert(tables.tables["visits"]), pending)
    predictor = Predictor(engine.url, config_path, model_path, monitor=f"sqlite:///{tmp_path}/log.db")
    predictor.init_db()
    result = predictor.process_pending_visits()
    assert (result.scored, result.without_observations) == (len(visits), 0)
    for table in ("visits", "sepsis_predictions"):
        found = frame(engine, f"SELECT * FROM {table}").set_index(["visit_id", "client"])["sepsis_score"]
        assert [found[key] for key in visits] == expected
    names = Pseudonyms("a-key-for-this-test-alone")
    with contextlib.closing(sqlite3.connect(tmp_path / "log.db")) as log:
        logged = {visit for (visit,) in log.execute("SELECT visit FROM predictions")}
    assert logged == {names.visit(str(client).strip(), str(visit).strip()) for visit, client in visits}
    predictor.close()
    engine.dispose()


ALIKE = [("A1", "V"), ("a1", "V"), ("Müller", "1"), ("Muller", "1")]
ALIKE += [("T1", "2"), ("T1 x", "2"), ("b", "v"), ("b", "V")]


def test_patients_with_similar_keys_stay_apart(predictor, rows, pipeline):
    parts = [rows[rows["visit_id"] == visit] for visit in rows["visit_id"].unique()[: len(ALIKE)]]
    named = [part.assign(client=client, visit_id=visit) for part, (client, visit) in zip(parts, ALIKE, strict=True)]
    load(predictor.engine, pd.concat(named))
    assert predictor.process_pending_visits().scored == len(ALIKE)
    found = frame(predictor.engine, VISITS).set_index(["client", "visit_id"])["sepsis_score"]
    assert {case: found[case] for case in ALIKE} == {
        case: predict(pipeline, part)["sepsis_probability"][0] for case, part in zip(ALIKE, named, strict=True)
    }


@pytest.mark.parametrize("collation", ["utf8mb4_general_ci", "utf8mb4_bin"])
def test_a_collation_that_makes_patients_equal_is_refused(mariadb, collation, config_path, model_path):
    engine = connect(mariadb)
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                f"CREATE TABLE visits (client VARCHAR(64) COLLATE {collation}, "
                f"visit_id VARCHAR(64) COLLATE {collation}, sepsis_score DOUBLE, risk_level VARCHAR(16), "
                "scored_at DATETIME(6), PRIMARY KEY (client, visit_id))"
            )
        )
    make_tables(engine)
    engine.dispose()
    predictor = Predictor(mariadb, config_path, model_path)
    with pytest.raises(DatabaseError, match=r"ALTER TABLE visits MODIFY client .* utf8mb4_nopad_bin NOT NULL"):
        predictor.process_pending_visits()
    predictor.close()


def test_dates_with_a_zone_of_the_server_are_read_as_utc(mariadb, rows, config_path, model_path, pipeline):
    """The server's own zone is +02:00."""
    predictor = Predictor(mariadb, config_path, model_path)
    predictor.init_db()
    with predictor.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE patient_observations MODIFY observation_date TIMESTAMP(6) NULL"))
    load(predictor.engine, rows)
    with contextlib.closing(predictor.engine.raw_connection()) as raw, raw.cursor() as cursor:
        cursor.execute("SELECT @@global.time_zone, @@session.time_zone")
        assert cursor.fetchone() == ("+02:00", "+00:00")
    predictor.process_pending_visits()
    np.testing.assert_array_equal(
        frame(predictor.engine, VISITS)["sepsis_score"], predict(pipeline, rows)["sepsis_probability"]
    )
    predictor.close()


def test_a_claim_among_many_scored_visits_goes_by_the_index(mariadb, config_path, model_path):
    predictor = Predictor(mariadb, config_path, model_path)
    predictor.init_db()
    with predictor.engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO visits (client, visit_id, sepsis_score, risk_level) "
                "SELECT 'a', seq, IF(seq % 5000, 0.5, NULL), IF(seq % 5000, 'LOW', NULL) FROM seq_1_to_20000"
            )
        )
        connection.execute(
            sa.text(
                "INSERT INTO patient_observations (client, visit_id, observation_date, observation_type_code, "
                "observation_value) SELECT 'a', seq, '2024-01-01', 'HR', 80 FROM seq_1_to_20000"
            )
        )
        connection.execute(sa.text("ANALYZE TABLE visits, patient_observations"))
    plans = []

    def explain(connection, cursor, statement, parameters, *_):
        if "FOR UPDATE" in statement and not statement.startswith("EXPLAIN"):
            plans.append(connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).mappings().all())

    sa.event.listen(predictor.engine, "before_cursor_execute", explain)
    assert predictor.process_pending_visits().scored == 4
    first = next(row for row in plans[0] if row["table"] == "visits")
    assert first["key"] == "ix_visits_pending" and int(first["rows"]) < 100
    predictor.close()


@pytest.mark.parametrize("when", ["serving.db.reading.newest_dates", "serving.db.predictor.read_observations"])
def test_observations_that_go_meanwhile_are_none(predictor, rows, when, monkeypatch):
    """The hospital purges between the claim and the reading."""
    if when.endswith("newest_dates") and predictor.engine.dialect.name == "postgresql":
        pytest.skip("read in one statement")
    load(predictor.engine, rows)
    gone = rows.sort_values(["client", "visit_id"])["visit_id"].unique()[:3]  # the first that are claimed
    original = getattr(reading, when.rpartition(".")[2])

    def purged(connection, *arguments):
        for visit in gone:
            connection.execute(sa.text("DELETE FROM patient_observations WHERE visit_id = :visit"), {"visit": visit})
        return original(connection, *arguments)

    monkeypatch.setattr(when, purged)
    monkeypatch.setattr(predictor, "batch_size", 3)
    result = predictor.process_pending_visits()
    assert (result.scored, result.unknown, result.without_observations) == (37, {}, 3)


def test_texts_of_rows_mean_what_rows_mean(postgres, rows, config_path, model_path):
    """PostgreSQL writes a visit's rows as one text, with quotes and backslashes of its own."""
    predictor = Predictor(postgres, config_path, model_path)
    predictor.init_db()
    codes = ["a,b", 'say "so"', "\\N", "two\\\\", "line\nbreak\r\n", "(", ")", "", " HR ", "NULL", "é", "''", '"']
    numbers = [80.0, None, float("nan"), float("inf"), 0.1 + 0.2, 1e-300, -5.0]
    odd = pd.concat([rows.head(20)] * 7, ignore_index=True)
    odd["observation_type_code"] = [codes[i % len(codes)] for i in range(140)]
    odd["observation_value"] = [numbers[i % 7] for i in range(140)]
    odd["unit"] = [(codes[i % len(codes)], None, "")[i % 3] for i in range(140)]
    load(predictor.engine, rows)
    load(predictor.engine, odd.assign(visit_id="odd", client="odd"))
    with predictor.engine.begin() as connection:
        connection.execute(sa.text("UPDATE patient_observations SET observation_value = 'NaN' WHERE id % 11 = 0"))
    with predictor.engine.begin() as connection:
        keys = [claim[:2] for claim in predictor._claim(connection, predictor.tables, None, False, lock=True)]
        ways = [way(connection, predictor.tables, keys) for way in (reading.aggregated, reading.fetched)]
    found = []
    for place, table, newest in ways:
        table = table.assign(visit_id=place, client=1)[[*rows.columns, "unit"]]
        table = table.assign(observation_date=pd.to_datetime(table["observation_date"]))
        table["reference_range_min"] = table["reference_range_min"].astype(float)
        table["reference_range_max"] = table["reference_range_max"].astype(float)
        found.append((table.sort_values([*table.columns], ignore_index=True), newest))
    pd.testing.assert_frame_equal(found[0][0], found[1][0], check_dtype=False)
    assert found[0][1] == found[1][1] and len(found[0][1]) == 41
    predictor.close()


def test_visits_without_observations_are_reported_and_left(predictor, rows):
    lonely = pd.DataFrame({"client": ["x", "y"], "visit_id": ["1", "1"]})
    load(predictor.engine, rows, pd.concat([rows[["client", "visit_id"]].drop_duplicates(), lonely]))
    result = predictor.process_pending_visits()
    assert (result.scored, result.without_observations) == (40, 2)
    assert "2 pending visits have no observations" in str(result)
    assert predictor.count_pending() == 2


def test_rescore_takes_visits_with_new_observations(predictor, rows, pipeline):
    late = rows.groupby("visit_id").tail(3)
    late = late[late["visit_id"].isin(late["visit_id"].unique()[:5])]
    load(predictor.engine, rows.drop(late.index))
    assert predictor.process_pending_visits().scored == 40
    load(predictor.engine, late, rows.head(0)[["client", "visit_id"]])
    assert predictor.process_pending_visits().scored == 0
    result = predictor.process_pending_visits(rescore=True)
    assert (result.scored, result.rescored) == (5, 5) and "5 of them again" in str(result)
    np.testing.assert_array_equal(
        frame(predictor.engine, VISITS)["sepsis_score"], predict(pipeline, rows)["sepsis_probability"]
    )
    assert len(frame(predictor.engine, PREDICTIONS)) == 45  # the history stays
    assert predictor.process_pending_visits(rescore=True).batches == 0


def test_rescore_takes_visits_whose_newest_observation_is_another(predictor, rows, pipeline):
    """Also where old ones were purged, so that there are fewer; a purge alone is nothing new."""
    first, second = rows["visit_id"].unique()[:2]
    both = rows[rows["visit_id"].isin([first, second])].sort_values("observation_date", kind="stable")
    load(predictor.engine, both)
    assert predictor.process_pending_visits().scored == 2
    scores = frame(predictor.engine, VISITS).set_index("visit_id")["sepsis_score"]
    kept = both.groupby("visit_id").tail(8)
    new = kept[kept["visit_id"] == first].head(3)
    new = new.assign(observation_date=new["observation_date"] + pd.Timedelta(days=30))
    with predictor.engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM patient_observations"))
    load(predictor.engine, pd.concat([kept, new]), both.head(0)[["client", "visit_id"]])
    assert predictor.process_pending_visits(rescore=True).rescored == 1
    assert predictor.process_pending_visits(rescore=True).batches == 0
    found = frame(predictor.engine, VISITS).set_index("visit_id")["sepsis_score"]
    expected = predict(pipeline, pd.concat([kept, new])).set_index("visit_id")["sepsis_probability"]
    assert found[first] == expected[first] and found[second] == scores[second]


@pytest.mark.parametrize("how", ["null", "absent"])
def test_without_the_newest_date_rescore_goes_by_numbers(url, rows, config_path, model_path, tmp_path, how):
    """A predictions table of the hospital's own."""
    mapping = tmp_path / "tables.json"
    mapping.write_text(json.dumps({"predictions": {"columns": {"newest_observation": None}}}))
    without = read_mapping(mapping)
    engine = connect(url)
    if engine.dialect.name == "sqlite":
        Path(engine.url.database).parent.mkdir()
    make_tables(engine, without)
    load(engine, rows)
    predictor = Predictor(url, config_path, model_path, tables=without if how == "null" else None)
    assert predictor.process_pending_visits().scored == 40
    assert predictor.process_pending_visits(rescore=True).batches == 0
    late = rows.head(1).assign(observation_date=rows["observation_date"].max() + pd.Timedelta(days=1))
    load(engine, late, rows.head(0)[["client", "visit_id"]])
    assert predictor.process_pending_visits(rescore=True).rescored == 1
    predictor.close()
    engine.dispose()


def test_a_visit_made_pending_by_hand_is_scored_again(predictor, rows):
    load(predictor.engine, rows)
    predictor.process_pending_visits()
    with predictor.engine.begin() as connection:
        connection.execute(sa.text("UPDATE visits SET sepsis_score = NULL"))
    assert predictor.process_pending_visits().scored == 40
    assert len(frame(predictor.engine, PREDICTIONS)) == 40


def test_visits_without_enough_evidence_are_kept_apart_until_something_new_comes(
    url, careful_files, evidence_cases, tmp_path
):
    """A score is due only where what the model needs was measured, and recently."""
    rows, moment = evidence_cases
    monitor = f"sqlite:///{tmp_path}/log.db"
    predictor = DatabasePredictor(url, *careful_files, clock=moment.timestamp, monitor=monitor)
    predictor.init_db()
    load(predictor.engine, rows)
    result = predictor.process_pending_visits()
    assert (result.scored, result.set_aside) == (2, {"no_value": 1, "future": 1})
    assert result.unknown == {"insufficient_evidence": 1, "stale": 1, "nothing_usable": 1}
    assert result.unused_codes == {"8302-2": 2} and "'8302-2' (2 rows)" in str(result)
    found = frame(predictor.engine, PREDICTIONS).set_index("visit_id")
    reasons = {visit: found["reason"][visit] for visit in ("heights", "stale", "words")}
    assert reasons == {"heights": "insufficient_evidence", "stale": "stale", "words": "nothing_usable"}
    assert found["hours_since_newest"]["known"] == found["hours_since_newest"]["ahead"] == 1.0
    assert found["hours_since_newest"]["stale"] == 40.0 and pd.isna(found["hours_since_newest"]["heights"])
    assert (pd.to_datetime(found["as_of"]) == moment).all()
    state = frame(predictor.engine, VISITS).set_index("visit_id")
    assert state["risk_level"][["heights", "stale", "words"]].tolist() == ["UNKNOWN"] * 3
    assert state["sepsis_score"].notna().sum() == 2 and state["sepsis_score"]["known"] == state["sepsis_score"]["ahead"]
    assert predictor.count_pending() == 0
    assert (again := predictor.process_pending_visits()).batches == 0 and not again.unknown
    more = {"heights": rows[rows["visit_id"] == "known"], "stale": rows[rows["visit_id"] == "heights"]}
    new = pd.concat([part.assign(visit_id=visit) for visit, part in more.items()])
    load(predictor.engine, new, new.head(0)[["client", "visit_id"]])
    third = predictor.process_pending_visits()
    assert third.scored == 1 and third.unknown == {"stale": 1}
    assert frame(predictor.engine, VISITS).set_index("visit_id")["sepsis_score"]["heights"] > 0
    predictor.close()


def test_a_site_map_of_codes_makes_foreign_codes_count(url, careful_files, site_codes, site_cases, monkeypatch):
    monkeypatch.setenv("SEPSIS_CODES", str(site_codes))
    engine = connect(url)
    make_tables(engine)
    load(engine, site_cases)
    config, model = map(str, careful_files)
    assert main(["--config", config, "--model", model, "--db-url", url, "--as-of", "2024-05-01T12:00"]) == 0
    scores = frame(engine, VISITS)["sepsis_score"]
    assert scores[0] == scores[1] and scores.notna().all()
    engine.dispose()


def test_what_was_undone_is_not_in_the_prediction_log(predictor, rows, tmp_path, config_path, model_path, url):
    load(predictor.engine, rows)
    logged = Predictor(url, config_path, model_path, batch_size=15, monitor=f"sqlite:///{tmp_path}/log.db")
    updates = []

    def fail(connection, cursor, statement, *_):
        updates.append("UPDATE visits" in statement)
        if sum(updates) == 2:
            raise sa.exc.OperationalError(statement, None, Exception("gone"))

    sa.event.listen(logged.engine, "before_cursor_execute", fail)
    with pytest.raises(BatchUndone):
        logged.process_pending_visits()
    logged.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "log.db")) as log:
        assert log.execute("SELECT count(*) FROM predictions").fetchall() == [(15,)]
        assert log.execute("SELECT kind, n FROM prediction_errors").fetchall() == [("batch_undone", 1)]


def test_a_dry_run_writes_nothing(predictor, rows, config_path, model_path, url, capsys):
    load(predictor.engine, rows)
    arguments = ["--db-url", url, "--config", str(config_path), "--model", str(model_path), "--dry-run"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("would score 40 visits (")
    assert predictor.count_pending() == 40 and frame(predictor.engine, PREDICTIONS).empty


def test_a_dry_run_waits_for_no_writer(tmp_path, rows, config_path, model_path, capsys):
    url = f"sqlite:///{tmp_path}/sepsis.db"
    engine = connect(url)
    make_tables(engine)
    load(engine, rows)
    engine.dispose()
    arguments = ["--db-url", url, "--config", str(config_path), "--model", str(model_path), "--dry-run"]
    with contextlib.closing(sqlite3.connect(tmp_path / "sepsis.db", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert main(arguments) == 0
    assert "would score 40 visits" in capsys.readouterr().out


def test_the_prediction_log_needs_a_file_of_its_own(tmp_path, config_path, model_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ["--config", str(config_path), "--model", str(model_path), "--as-of", "last"]
    assert main(["--init-db", "--db-url", "sqlite:///sepsis.db"]) == 0
    assert main([*model, "--db-url", "sqlite:///sepsis.db", "--monitor", f"sqlite:///{tmp_path}/sepsis.db"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "name another --monitor" in err
    assert main([*model, "--db-url", "sqlite:///sepsis.db", "--monitor", f"sqlite:///{tmp_path}/log.db"]) == 0


def test_statements_do_not_grow_with_the_visits(predictor, rows, monkeypatch):
    monkeypatch.setattr(predictor, "batch_size", 500)
    predictor.tables  # noqa: B018
    statements = []
    sa.event.listen(predictor.engine, "before_cursor_execute", lambda *a: statements.append(a[2]))
    claim, count = "SELECT", "SELECT"
    batch = [claim, "SELECT", "SELECT", "INSERT", "UPDATE"]
    if predictor.engine.dialect.name == "postgresql":
        batch = [claim, "SELECT", "WITH"]
    for n, visits in (10, rows["visit_id"].unique()[:10]), (30, rows["visit_id"].unique()[10:]):
        load(predictor.engine, rows[rows["visit_id"].isin(visits)])
        statements.clear()
        assert predictor.process_pending_visits().scored == n
        # without what begins a transaction: on PostgreSQL it sets the zone and the lease
        words = [text.split()[0] for text in statements if "set_config" not in text]
        words = [word for word in words if word not in ("BEGIN", "SAVEPOINT")]
        # nothing is left, not for another pass either
        # the next claim goes beside the scores
        assert sorted(words) == sorted([*batch, claim, claim, count])
        assert not any(client in text for text in statements for client in rows["client"].unique())


# --------------------------------------------------------------------------------------------------- schema


def test_the_migrations_make_the_schema(url):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    engine = connect(url)
    make_tables(engine)
    make_tables(engine)  # once more changes nothing
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "include_name": lambda name, kind, _: kind != "table" or name in schema().tables,
                "compare_type": True,
            },
        )
        assert compare_metadata(context, schema(dialect=engine.dialect.name)) == []
        for table in schema().tables:
            checks = {check["name"] for check in sa.inspect(connection).get_check_constraints(table)}
            expected = {c.name for c in schema().tables[table].constraints if isinstance(c, sa.CheckConstraint)}
            assert len(checks) == len(expected)
    engine.dispose()


def test_tables_that_the_hospital_made_are_left_as_they_are(url, rows, config_path, model_path):
    engine = connect(url)
    if engine.dialect.name == "sqlite":
        Path(engine.url.database).parent.mkdir()
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                f"CREATE TABLE visits (visit_id {key(engine)} PRIMARY KEY, client {key(engine)}, sepsis_score FLOAT, "
                "risk_level VARCHAR(10), scored_at TIMESTAMP)"
            )
        )
    predictor = Predictor(url, config_path, model_path)
    predictor.init_db()
    load(engine, rows)
    assert predictor.process_pending_visits().scored == 40
    assert set(frame(engine, VISITS).columns) == {"visit_id", "client", "sepsis_score", "risk_level", "scored_at"}
    predictor.close()
    engine.dispose()


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("visits", {"client": "a", "visit_id": "1"}),
        ("visits", {"client": "b", "visit_id": "1", "sepsis_score": 1.5}),
        ("visits", {"client": "b", "visit_id": "1", "sepsis_score": 0.5, "risk_level": "none"}),
        ("sepsis_predictions", {"client": "z"}),
        ("sepsis_predictions", {"observations": 0}),
        ("sepsis_predictions", {}),
    ],
)
def test_constraints_keep_nonsense_out(predictor, table, values):
    whole = {
        "client": "a",
        "visit_id": "1",
        "sepsis_score": 0.5,
        "risk_level": "LOW",
        "model_version": "v",
        "scored_at": pd.Timestamp("2024-01-01").to_pydatetime(),
        "observations": 3,
    }
    tables = schema().tables
    with predictor.engine.begin() as connection:
        connection.execute(sa.insert(tables["visits"]).values(client="a", visit_id="1"))
        connection.execute(sa.insert(tables["sepsis_predictions"]).values(whole))
    values = values if table == "visits" else whole | values
    refused = sa.exc.IntegrityError, sa.exc.OperationalError  # MariaDB's
    with pytest.raises(refused), predictor.engine.begin() as connection:
        connection.execute(sa.insert(tables[table]).values(values))


def test_every_database_s_dialect_can_say_it(config_path, model_path):
    """MySQL and MariaDB: the statements compile; the schema too."""
    from sqlalchemy.dialects import mysql
    from sqlalchemy.schema import CreateIndex, CreateTable

    tables = schema().tables
    for table in tables.values():
        assert "DATETIME(6)" in str(CreateTable(table).compile(dialect=mysql.dialect())) or not any(
            isinstance(column.type, sa.DateTime) for column in table.c
        )
        for index in table.indexes:
            assert "WHERE" not in str(CreateIndex(index).compile(dialect=mysql.dialect()))


@pytest.mark.parametrize(
    ("name", "is_mariadb", "version", "skips"),
    [
        ("mysql", False, (8, 4, 0), True),
        ("mysql", False, (5, 7, 1), False),
        ("mysql", True, (10, 5, 9), False),
        ("mariadb", True, (11, 4, 2), True),
        ("postgresql", False, (16, 0), True),
    ],
)
def test_skip_locked_where_the_database_has_it(name, is_mariadb, version, skips):
    class Dialect:
        server_version_info = version

    Dialect.name, Dialect.is_mariadb = name, is_mariadb
    connection = type("Connection", (), {"dialect": Dialect})
    assert skips_locked(connection) is skips


# -------------------------------------------------------------------------------------------------- bad input

BAD_URLS = {
    "nonsense": "hunter2 is no url",
    "dialect": "oraclesql://scorer:hunter2@localhost/sepsis",
    "driver": "postgresql+pg8001://scorer:hunter2@localhost/sepsis",
    "port": "postgresql+psycopg://scorer:hunter2@localhost:port/sepsis",
    "at": "postgresql+psycopg://scorer:hunt@hunter2@localhost/sepsis",
    "nobody": "postgresql+psycopg://scorer:hunter2@127.0.0.1:1/sepsis?connect_timeout=2",
    "query": "postgresql+psycopg://127.0.0.1:1/sepsis?password=hunter2&connect_timeout=2",
    "name": "postgresql+psycopg://scorer:hunter2@no-such-host.invalid/sepsis?connect_timeout=2",
    "folder": "sqlite:////dev/null/hunter/sepsis.db",
    "absent": "sqlite:///nowhere/sepsis.db",
}


@pytest.mark.parametrize("which", BAD_URLS)
def test_a_wrong_url_is_one_line_without_the_password(which, config_path, model_path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("psycopg")
    for extra in ([], ["--init-db"]) if which != "absent" else ([],):
        arguments = ["--config", str(config_path), "--model", str(model_path), "--db-url", BAD_URLS[which], *extra]
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and err.startswith("error: ") and not out
        assert "hunter2" not in err and "Traceback" not in err


def test_the_password_of_a_url_that_works_is_not_shown(postgres, capsys):
    url = sa.make_url(postgres).set(password="hunter2").render_as_string(hide_password=False)
    assert main(["--db-url", url, "--init-db"]) == 0
    assert "hunter2" not in capsys.readouterr().out
    assert "hunter2" not in safe_url(url)


def test_missing_tables_and_columns_are_named(url, config_path, model_path):
    engine = connect(url)
    if engine.dialect.name == "sqlite":
        Path(engine.url.database).parent.mkdir()
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE something (a INTEGER)"))
    predictor = Predictor(url, config_path, model_path)
    with pytest.raises(DatabaseError, match="no table 'patient_observations'; --init-db"):
        predictor.process_pending_visits()
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE patient_observations (client INTEGER)"))
    with pytest.raises(DatabaseError, match="has no column 'visit_id', 'observation_date'"):
        predictor.process_pending_visits()
    predictor.close()
    engine.dispose()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ('{"visit": {}}', "'visit'"),
        ('{"visits": {"columns": {"score": "x"}}}', "'score'"),
        ('{"visits": {"columns": {"client": null}}}', "needs a column for 'client'"),
        ('{"visits": {"table": null}}', "must be texts"),
        ('{"visits": {"table": " "}}', "must be texts"),
        ('{"visits": {"columns": {"client": 5}}}', "must be texts"),
        ('{"visits": {"table": "same"}, "predictions": {"table": "same"}}', "'same' stands twice"),
        ('{"predictions": {"columns": {"visit_id": "client"}}}', "'client' stands twice"),
    ],
)
def test_a_bad_mapping_is_one_line(tmp_path, content, told, capsys):
    path = tmp_path / "tables.json"
    path.write_text(content)
    assert main(["--tables", str(path)]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_options_that_make_no_sense(capsys):
    assert main(["--dry-run", "--watch", "5"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    for extra in (["--batch-size", "0"], ["--batch-size", "100000"], ["--watch", "-5"], ["--watch", "0"]):
        with pytest.raises(SystemExit) as ended:
            main(extra)
        assert ended.value.code == 2 and f"argument {extra[0]}: {extra[1]} is not a number" in capsys.readouterr().err


def test_a_visits_table_without_its_key_writes_nothing(url, rows, config_path, model_path):
    """Two rows of a visit: no half of it is written, and it is told."""
    engine = connect(url)
    if engine.dialect.name == "sqlite":
        Path(engine.url.database).parent.mkdir()
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                f"CREATE TABLE visits (visit_id {key(engine)}, client {key(engine)}, sepsis_score FLOAT, "
                "risk_level VARCHAR(10), scored_at TIMESTAMP)"
            )
        )
    predictor = Predictor(url, config_path, model_path)
    predictor.init_db()
    load(engine, rows)
    load(engine, rows.head(1), rows.head(1)[["client", "visit_id"]])
    with pytest.raises(DatabaseError, match="must be its key"):
        predictor.process_pending_visits()
    assert frame(engine, PREDICTIONS).empty
    predictor.close()
    engine.dispose()


# -------------------------------------------------------------------------------- lost, killed, and in parallel


@pytest.mark.parametrize(("event", "at"), [("before", "UPDATE visits"), ("after", "FOR UPDATE")])
def test_a_lost_connection_in_mid_batch_loses_nothing(
    postgres, rows, config_path, model_path, capsys, pipeline, event, at
):
    """The server ends the session between insert and update of the third batch, or before its observations are read."""
    engine = connect(postgres)
    make_tables(engine)
    load(engine, rows)
    updates = []

    def cut(connection, cursor, statement, *_):
        if at in statement:
            updates.append(1)
            if len(updates) == 3:
                pid = connection.connection.dbapi_connection.info.backend_pid
                with engine.connect() as other:
                    other.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    original = connect

    def watched(url):
        made = original(url)
        sa.event.listen(made, f"{event}_cursor_execute", cut)
        return made

    arguments = ["--config", str(config_path), "--model", str(model_path), "--db-url", postgres, "--batch-size", "7"]
    arguments += ["--as-of", "last"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "connect", watched)
        assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "14 visits were scored before and are kept, run again to go on" in err
    assert len(frame(engine, PREDICTIONS)) == 14
    assert frame(engine, VISITS)["sepsis_score"].notna().sum() == 14
    assert main(arguments) == 0
    np.testing.assert_array_equal(frame(engine, VISITS)["sepsis_score"], predict(pipeline, rows)["sepsis_probability"])
    assert len(frame(engine, PREDICTIONS)) == 40
    engine.dispose()


def test_errors_quote_no_data(postgres, rows, config_path, model_path):
    """What PostgreSQL says of a violated constraint holds the row."""
    predictor = Predictor(postgres, config_path, model_path)
    predictor.init_db()
    load(predictor.engine, rows)
    with predictor.engine.begin() as connection:
        connection.execute(
            sa.text("ALTER TABLE sepsis_predictions ADD CONSTRAINT no CHECK (observations < 0) NOT VALID")
        )
    with pytest.raises(BatchUndone) as caught:
        predictor.process_pending_visits()
    assert "CheckViolation 23514" in str(caught.value)
    assert not any(text in str(caught.value) for text in (*rows["client"].unique(), *rows["visit_id"].unique()))
    predictor.close()


def test_what_a_trigger_says_is_not_told(postgres, rows, config_path, model_path):
    predictor = Predictor(postgres, config_path, model_path)
    predictor.init_db()
    load(predictor.engine, rows)
    with predictor.engine.begin() as connection:
        connection.execute(
            sa.text(
                "CREATE FUNCTION closed() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'visit % of % is closed', "
                "new.visit_id, new.client; END $$ LANGUAGE plpgsql"
            )
        )
        connection.execute(
            sa.text("CREATE TRIGGER closed BEFORE UPDATE ON visits FOR EACH ROW EXECUTE FUNCTION closed()")
        )
    with pytest.raises(BatchUndone) as caught:
        predictor.process_pending_visits()
    assert "RaiseException P0001; 0 visits" in str(caught.value)
    predictor.close()


@pytest.mark.parametrize(
    ("number", "text", "told"),
    [
        (1146, "Table 'sepsis.visits' doesn't exist", True),
        (2003, "Can't connect to MySQL server on 'db'", True),
        (1644, "visit 77001 is closed", False),
    ],
)
def test_what_mysql_may_say_of_data_is_not_told(number, text, told):
    error = sa.exc.OperationalError(None, None, Exception(number, text))
    words = driver_words(error, sa.make_url("mysql+pymysql://scorer@db/sepsis"))
    assert words == (f"Exception {number}: {(number, text)}" if told else f"Exception {number}")


def test_a_text_that_sqlite_cannot_decode_is_not_told(predictor, rows):
    if predictor.engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL takes no such text")
    load(predictor.engine, rows)
    with predictor.engine.begin() as connection:
        connection.execute(sa.text("UPDATE patient_observations SET observation_type_code = CAST(x'ff41' AS TEXT)"))
    with pytest.raises(BatchUndone, match="OperationalError; 0 visits"):
        predictor.process_pending_visits()


def test_two_predictors_claim_different_visits(postgres, rows, config_path, model_path):
    engine = connect(postgres)
    make_tables(engine)
    load(engine, rows)
    predictors = [Predictor(postgres, config_path, model_path, batch_size=15) for _ in range(2)]
    claims = []
    with predictors[0].engine.begin() as one, predictors[1].engine.begin() as two:
        for predictor, connection in zip(predictors, (one, two), strict=True):
            claims.append(set(predictor._claim(connection, predictor.tables, None, False, lock=True)))
    assert len(claims[0] | claims[1]) == 30
    for predictor in predictors:
        predictor.close()
    engine.dispose()


@pytest.mark.parametrize("database", ["postgres", "mariadb"])
def test_what_a_frozen_predictor_holds_is_told_and_taken_after_a_while(
    database, request, rows, config_path, model_path, monkeypatch
):
    url = request.getfixturevalue(database)
    monkeypatch.setattr("serving.db.connection.LEASE_SECONDS", 3)
    engine = connect(url)
    make_tables(engine)
    load(engine, rows)
    predictor = Predictor(url, config_path, model_path)
    with pytest.raises(sa.exc.DBAPIError), engine.begin() as frozen:
        visits = schema().tables["visits"]
        held = sa.select(visits).order_by(visits.c.client).limit(3).with_for_update()
        assert len(frozen.execute(held).all()) == 3
        result = predictor.process_pending_visits()
        assert (result.scored, result.held) == (37, 3) and "3 are held by others" in str(result)
        deadline = time.monotonic() + 60
        while predictor.count_pending() and time.monotonic() < deadline:
            predictor.process_pending_visits()
            time.sleep(0.2)
        assert predictor.count_pending() == 0
        frozen.execute(sa.text("SELECT 1"))  # it wakes up, and its session has gone
    predictor.close()
    engine.dispose()


def test_predictors_behind_a_pooler_of_transactions(postgres, pgbouncer, rows, config_path, model_path, pipeline):
    engine = connect(pgbouncer)
    make_tables(engine)
    load(engine, rows)
    with engine.begin() as connection:  # dates with a zone, and sessions that are in another one
        zone = "ALTER TABLE patient_observations ALTER observation_date TYPE timestamptz"
        connection.execute(sa.text(f"{zone} USING observation_date AT TIME ZONE 'UTC'"))
        connection.execute(sa.text(f"ALTER DATABASE {engine.url.database} SET TimeZone = 'Asia/Tokyo'"))
    server = connect(postgres)
    with server.connect() as connection:
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
        connection.execute(sa.text(f"{others} AND pid <> pg_backend_pid()"))
    server.dispose()
    predictors = [Predictor(pgbouncer, config_path, model_path, batch_size=1) for _ in range(4)]
    results = []

    def work(predictor):
        results.append(predictor.process_pending_visits())

    threads = [threading.Thread(target=work, args=(predictor,)) for predictor in predictors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(result.scored for result in results) == 40
    np.testing.assert_array_equal(frame(engine, VISITS)["sepsis_score"], predict(pipeline, rows)["sepsis_probability"])
    for predictor in predictors:
        assert predictor.process_pending_visits(rescore=True).batches == 0
        predictor.close()
    engine.dispose()


def test_a_visit_rescored_by_another_meanwhile_is_left(postgres, rows, config_path, model_path):
    """The second predictor has found the visits before the first one's commit, and gets their locks after it."""
    first, second = (Predictor(postgres, config_path, model_path) for _ in range(2))
    first.init_db()
    late = rows.groupby("visit_id").tail(1)
    load(first.engine, rows.drop(late.index))
    first.process_pending_visits()
    load(first.engine, late, rows.head(0)[["client", "visit_id"]])
    with second.engine.begin() as connection:
        claims = second._claim(connection, second.tables, None, True, lock=False)
        assert len(claims) == 40
        assert first.process_pending_visits(rescore=True).rescored == 40
        read = reading.read_observations(connection, second.tables, [claim[:2] for claim in claims])
        assert second._score(connection, second.tables, claims, read).rows["client"] == []
    for predictor in (first, second):
        predictor.close()


def test_watch_goes_on_with_the_old_model_where_the_new_one_cannot_be_loaded(
    url, rows, models_dir, tmp_path, monkeypatch
):
    shutil.copytree(models_dir, tmp_path / "models")
    config = tmp_path / "models/best_model_config.json"
    predictor = Predictor(url, config, config.with_name("best_model.pkl"))
    predictor.init_db()
    load(predictor.engine, rows)
    config.write_text("{")
    lines: list[str] = []
    monkeypatch.setattr(db_predictor.log, "error", lambda text, *values: lines.append(text % values))
    stop, results = threading.Event(), []

    def told(result):
        results.append(result.scored)
        if len(results) == 2:
            stop.set()

    predictor.watch(0.01, stop, told=told)
    assert results == [40, 0]
    # a database that was busy for a moment is told too, and tried again
    told_once = [line for line in lines if line.endswith(f"; model {predictor.pipeline.model_version} stays in use")]
    assert len(told_once) == 1, lines
    predictor.close()


def test_watch_scores_what_arrives_and_survives_trouble(predictor, rows):
    stop, results = threading.Event(), []
    load(predictor.engine, rows[rows["visit_id"] == rows["visit_id"][0]])
    original = predictor.process_pending_visits

    def once(*arguments):
        if len(results) == 1 and not failed:
            failed.append(1)
            raise BatchUndone("the database is away")
        return original(*arguments)

    def told(result):
        results.append(result.scored)
        if len(results) == 1:
            load(predictor.engine, rows[rows["visit_id"] != rows["visit_id"][0]])
        else:
            stop.set()

    failed: list[int] = []
    predictor.process_pending_visits = once
    predictor.watch(0.01, stop, told=told)
    assert results == [1, 39] and failed


def _run(arguments: list[str], die_at: int | None = None) -> None:
    """A predictor in a process of its own; it may kill itself before its statement number `die_at`."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    if die_at is not None:
        statements = []

        @sa.event.listens_for(sa.Engine, "before_cursor_execute")
        def count(connection, cursor, statement, *_):
            statements.append(statement)
            if sum(s.split()[0] in ("SELECT", "DELETE", "INSERT", "UPDATE") for s in statements) > die_at:
                os.kill(os.getpid(), 9)

    sys.exit(main(arguments))


@pytest.fixture(scope="session")
def fork():
    """Starts processes in a tenth of a second, so that kills meet work and not imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pandas", "lightgbm", "sqlalchemy", "psycopg", "tqdm", "joblib"])
        yield context


@pytest.mark.slow
def test_four_may_make_the_tables_at_once(url, fork):
    processes = [fork.Process(target=_run, args=(["--db-url", url, "--init-db"],)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * 4
    engine = connect(url)
    assert set(schema().tables) < set(sa.inspect(engine).get_table_names())
    engine.dispose()


@pytest.mark.slow
def test_killed_before_any_statement_nothing_is_half_done(url, rows, config_path, model_path, fork, pipeline):
    engine = connect(url)
    make_tables(engine)
    load(engine, rows)
    arguments = ["--config", str(config_path), "--model", str(model_path), "--db-url", url, "--batch-size", "5"]
    arguments += ["--as-of", "last"]
    codes = []
    for die_at in range(4, 40, 2):  # the first ones look at the tables
        process = fork.Process(target=_run, args=(arguments, die_at))
        process.start()
        process.join(60)
        codes.append(process.exitcode)
        with engine.connect() as connection:  # until the server has seen it, the next one skips what the dead one holds
            deadline = time.monotonic() + 60
            while other_sessions(connection) and time.monotonic() < deadline:
                time.sleep(0.02)
        visits, predictions = frame(engine, VISITS), frame(engine, PREDICTIONS)
        scored = visits[visits["sepsis_score"].notna()]
        assert len(scored) == len(predictions) and len(scored) % 5 == 0
        if len(scored):
            assert scored["visit_id"].tolist() == predictions["visit_id"].tolist()
    assert codes.count(-9) >= 5
    process = fork.Process(target=_run, args=(arguments,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    np.testing.assert_array_equal(frame(engine, VISITS)["sepsis_score"], predict(pipeline, rows)["sepsis_probability"])
    assert len(frame(engine, PREDICTIONS)) == 40
    engine.dispose()


def copy_visits(engine: sa.Engine, times: int) -> None:
    """Copies of all visits, made by the database itself."""
    mysql = engine.dialect.name in MYSQL
    numbers = f"(SELECT seq AS n FROM seq_1_to_{times}) AS s" if mysql else f"generate_series(1, {times}) AS s(n)"
    columns = "client, observation_date, observation_type_code, observation_value, reference_range_min"
    columns += ", reference_range_max"
    with engine.begin() as connection:
        for table, others in (("visits", "client"), ("patient_observations", columns)):
            copies = f"SELECT {others}, concat(visit_id, '-', n) FROM {table}, {numbers}"
            connection.execute(sa.text(f"INSERT INTO {table} ({others}, visit_id) {copies}"))
        connection.execute(sa.text("ANALYZE TABLE visits, patient_observations" if mysql else "ANALYZE"))


def other_sessions(connection: sa.Connection) -> list[int]:
    """Of others in the same database."""
    queries = dict.fromkeys(
        MYSQL, "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()"
    )
    queries["postgresql"] = (
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    query = queries.get(connection.dialect.name)
    return list(connection.execute(sa.text(query)).scalars()) if query else []


def cut(admin: sa.Engine, rng: random.Random) -> bool:
    """Ends the session of somebody else in the same database; says whether there was one."""
    mysql = admin.dialect.name in MYSQL
    with admin.connect() as connection:
        sessions = other_sessions(connection)
        if sessions:
            chosen = rng.choice(sorted(sessions))
            with contextlib.suppress(sa.exc.DBAPIError):  # it has ended by itself
                connection.execute(sa.text(f"KILL {chosen}" if mysql else f"SELECT pg_terminate_backend({chosen})"))
    return bool(sessions)


@pytest.mark.slow
@pytest.mark.parametrize(("server", "copies"), [("postgres", 499), ("pgbouncer", 149), ("mariadb", 149)])
def test_four_predictors_killed_and_cut_at_random_score_every_visit_once(
    server, copies, request, rows, config_path, model_path, fork, pipeline
):
    """20,000 or 6,000 visits."""
    url = request.getfixturevalue(server)
    direct = request.getfixturevalue("postgres") if server == "pgbouncer" else url
    engine, admin = connect(direct), connect(direct)
    make_tables(engine)
    arguments = ["--config", str(config_path), "--model", str(model_path), "--db-url", url, "--batch-size", "200"]
    arguments += ["--as-of", "last"]

    def start() -> multiprocessing.Process:
        process = fork.Process(target=_run, args=(arguments,))
        process.start()
        return process

    start().join(60)
    began = time.monotonic()
    start().join(60)
    usual = time.monotonic() - began  # with nothing to do
    short = rows.groupby("visit_id").head(10)
    load(engine, short)
    copy_visits(engine, copies)
    engine.dispose()  # so that no session of the test is cut
    rng = random.Random(5)

    def doom() -> float:
        return time.monotonic() + usual * rng.uniform(0.7, 3)

    running = {number: (start(), doom()) for number in range(4)}
    kills = cuts = failed = 0
    next_cut = doom()
    deadline = time.monotonic() + 240
    while running and time.monotonic() < deadline:
        time.sleep(0.02)
        if time.monotonic() > next_cut and cuts < 8:
            cuts += cut(admin, rng)
            next_cut = time.monotonic() + usual * rng.uniform(0.3, 1)
        for number, (process, moment) in list(running.items()):
            if process.exitcode is not None:
                del running[number]
                if process.exitcode != 0:  # its session was cut: cron starts it again
                    failed += 1
                    running[number] = start(), doom()
            elif time.monotonic() > moment and kills < 16:
                process.kill()
                process.join()
                kills += 1
                running[number] = start(), doom()
    assert not running, "not done in time"
    assert kills >= 2 and cuts >= 2 and failed <= cuts
    predictor = Predictor(url, config_path, model_path)
    assert predictor.count_pending() == 0
    visits = frame(engine, "SELECT client, visit_id, sepsis_score, scored_at FROM visits")
    logged = frame(engine, "SELECT client, visit_id, sepsis_score, scored_at, model_version FROM sepsis_predictions")
    assert len(visits) == len(logged) == 40 * (copies + 1) and visits["sepsis_score"].notna().all()
    key = ["client", "visit_id"]
    assert not logged.duplicated([*key, "model_version"]).any()
    pd.testing.assert_frame_equal(
        visits.sort_values(key, ignore_index=True), logged[visits.columns].sort_values(key, ignore_index=True)
    )
    expected = predict(pipeline, short).set_index(key)["sepsis_probability"]
    original = visits["visit_id"].str.split("-").str[0]
    np.testing.assert_array_equal(
        visits["sepsis_score"], expected.loc[list(zip(visits["client"], original, strict=True))]
    )
    predictor.close()
    engine.dispose()
    admin.dispose()


# ------------------------------------------------------------------------------------------------ the script


def test_the_script_from_the_shell(tmp_path, rows, config_path, model_path, monkeypatch, capsys):
    """The embedded default, and the URL from the environment."""
    monkeypatch.chdir(tmp_path)
    model = ["--config", str(config_path), "--model", str(model_path), "--as-of", "last"]
    assert main(model) == 2
    assert "--init-db makes it" in capsys.readouterr().err
    assert main(["--init-db"]) == 0
    assert capsys.readouterr().out == "tables are ready in sqlite:///data/sepsis.db\n"
    engine = connect("sqlite:///data/sepsis.db")
    load(engine, rows)
    engine.dispose()
    assert main(model) == 0
    out, err = capsys.readouterr()
    assert out.startswith("scored 40 visits (") and out.count("\n") == 1
    assert not any(client in out + err for client in rows["client"].unique())
    monkeypatch.setenv("SEPSIS_DB_URL", "sqlite:///elsewhere/x.db")
    assert main(["--init-db"]) == 0
    assert (tmp_path / "elsewhere/x.db").exists()
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python db_predictor.py --init-db" in capsys.readouterr().out


def test_the_alembic_command_works(tmp_path, monkeypatch):
    from alembic.config import main as alembic

    monkeypatch.setenv("SEPSIS_DB_URL", f"sqlite:///{tmp_path}/x.db")
    alembic(["-c", str(ROOT / "serving/db/migrations/alembic.ini"), "upgrade", "head"])
    engine = connect(f"sqlite:///{tmp_path}/x.db")
    assert set(schema().tables) < set(sa.inspect(engine).get_table_names())
    engine.dispose()
