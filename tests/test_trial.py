"""The silent trial: live scores with outcomes, weeks, and the stop rule that monitor.py follows."""

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from stays import HOUR, starts

import evaluate_model
import monitor
from common.pseudonyms import KEY_VARIABLE, Pseudonyms
from common.trial import FIGURES, judge, live_scores, read_stop_rule
from evaluation.silent_trial import by_week
from feature_pipeline import NO_TIME, BadConfig, BadObservations, load_config
from monitoring.log import open_engine, predictions

KEY = "a key of more than sixteen characters"
MONDAY = datetime(2026, 3, 2)


def log_rows(*visits, version="v1"):
    """Rows of the log from (client, visit, start, {hour: (score, level)})."""
    pseudonyms = Pseudonyms(KEY)
    return pd.DataFrame(
        [
            {
                "visit": pseudonyms.visit(client, visit),
                "as_of": start + timedelta(hours=hour),
                "score": score,
                "risk_level": level,
                "model_version": version,
            }
            for client, visit, start, scores in visits
            for hour, (score, level) in scores.items()
        ]
    ).astype({"as_of": "datetime64[us]", "score": "float64"})


def labels_of(*visits):
    """Labels from (client, visit, onset or None)."""
    onset = [NO_TIME if o is None else int(np.datetime64(o, "us").astype(np.int64)) for _, _, o in visits]
    frame = pd.DataFrame([(c, v) for c, v, _ in visits], columns=["client", "visit_id"])
    return frame.assign(sepsis=[int(o is not None) for _, _, o in visits], sepsis_onset=onset, bad_onset=False)


def test_live_scores_by_hand():
    scores = {0: (0.1, "LOW"), 5: (0.9, "HIGH"), 6: (0.95, "HIGH"), 7: (None, "UNKNOWN")}
    rows = log_rows(("a", "1", MONDAY, scores), ("b", "2", MONDAY, {0: (0.9, "HIGH")}), ("z", "9", MONDAY, scores))
    labels = labels_of(("a", "1", MONDAY + timedelta(hours=8)), ("b", "2", None), ("c", "3", None))
    scored, left_out = live_scores(rows.sample(frac=1, random_state=1), labels, Pseudonyms(KEY))
    assert left_out == {"visits of the log without an outcome": 1}
    assert scored.stays.septic.tolist() == [True, False] and scored.stays.days.tolist() == [7 / 24, 0]
    assert [(visit, t % 24) for visit, t in starts(scored)] == [(0, 5), (1, 0)]
    assert np.isnan(scored.probability).sum() == 1 and scored.lead[0] == 8


def test_live_scores_of_another_key_join_nothing():
    rows = log_rows(("a", "1", MONDAY, {0: (0.1, "LOW")}))
    with pytest.raises(BadObservations, match="pseudonym key"):
        live_scores(rows, labels_of(("a", "1", None)), Pseudonyms("another key of sixteen letters"))


def rules(tmp_path, text):
    path = tmp_path / "stop_rule.toml"
    path.write_text(text)
    return read_stop_rule(path)


def cohort():
    """Ten septic visits a week for two weeks, with one not septic each; in the second week no alert is right."""
    visits, labels = [], []
    for week in range(2):
        for i in range(10):
            start = MONDAY + timedelta(days=7 * week, hours=i)
            high = {0: (0.1, "LOW"), 10: (0.9, "HIGH")}
            low = {0: (0.1, "LOW"), 10: (0.2, "LOW")}
            septic, other = (high, low) if week == 0 else (low, high)
            visits += [(f"s{week}", str(i), start, septic), (f"n{week}", str(i), start, other)]
            labels += [(f"s{week}", str(i), start + timedelta(hours=12)), (f"n{week}", str(i), None)]
    return live_scores(log_rows(*visits), labels_of(*labels), Pseudonyms(KEY))[0]


def test_weeks_by_hand(config_path):
    first, second = by_week(cohort(), load_config(config_path), 48)
    assert (first["week"], second["week"]) == ("2026-03-02", "2026-03-09")
    assert (first["ppv"], first["sensitivity"], first["visits"]) == (1, 1, 20)
    assert (second["ppv"], second["sensitivity"], second["septic_visits"]) == (0, 0, 10)
    assert first["alerts_per_100_patient_days"] == pytest.approx(100 * 10 / (20 * 10 / 24))
    assert set(FIGURES) <= set(first)


def test_the_stop_rule_looks_at_the_latest_septic_visits(config_path, tmp_path):
    """10 septic visits: the second week, PPV 0. 20: both weeks, PPV 0.5. 21: not judged."""
    found = judge(
        rules(
            tmp_path,
            "".join(f"[[stop]]\nfigure='ppv'\nat_least=0.4\nseptic_visits={n}\n" for n in (10, 20, 21))
            + "[[stop]]\nfigure='alerts_per_100_patient_days'\nat_most=500\nseptic_visits=5\n",
        ),
        cohort(),
        load_config(config_path),
    )
    assert [row["state"] for row in found] == ["stop", "holds", "not judged", "holds"]
    assert [row["value"] for row in found[:3]] == [0, 0.5, None]
    assert "so far 20" in found[2]["text"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected one or more"),
        ("[[stop]]\nfigure='accuracy'\nat_least=1\nseptic_visits=1\n", "figure must be one of"),
        ("[[stop]]\nfigure='ppv'\nseptic_visits=1\n", "at_least or at_most"),
        ("[[stop]]\nfigure='ppv'\nat_least=1\nat_most=1\nseptic_visits=1\n", "at_least or at_most"),
        ("[[stop]]\nfigure='ppv'\nat_least='1'\nseptic_visits=1\n", "at_least or at_most"),
        ("[[stop]]\nfigure='ppv'\nat_least=1\nseptic_visits=0\n", "whole number"),
        ("[[stop]]\nfigure='ppv'\nat_least=1\nseptic_visits=1\nwindow_hours=0\n", "window_hours"),
        ("[[stop]]\nfigure='ppv'\nat_leest=1\nseptic_visits=1\n", "unknown 'at_leest'"),
        ("[[stop\n", "cannot be read"),
    ],
)
def test_a_bad_stop_rule_is_refused_in_words(tmp_path, text, told):
    with pytest.raises(BadConfig, match=told):
        rules(tmp_path, text)


@pytest.fixture
def live(models_dir, tmp_path, monkeypatch):
    """A prediction log with outcomes: random scores, so that PPV is that of chance."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    url, version = f"sqlite:///{tmp_path}/log.db", load_config(models_dir / "best_model_config.json").model_version
    engine, pseudonyms, generator = open_engine(url), Pseudonyms(KEY), np.random.default_rng(0)
    now = datetime.now(UTC).replace(tzinfo=None, microsecond=0)
    rows, labels = [], []
    for i in range(60):
        start = now - timedelta(days=20, hours=i)
        for hour in range(0, 36, 3):
            score = float(generator.random())
            rows.append(
                {
                    **{"time": start + timedelta(hours=hour), "source": "api", "model_version": version},
                    **{"visit": pseudonyms.visit("c", str(i)), "as_of": start + timedelta(hours=hour)},
                    **{"score": score, "risk_level": "HIGH" if score > 0.9 else "LOW", "bins": "", "codes": ""},
                    **{"unknown": 0, "seconds": 0.01, "shadow": False},
                }
            )
        onset = (start + timedelta(hours=30)).isoformat() if i % 3 == 0 else ""
        labels.append({"visit_id": i, "client": "c", "sepsis": int(i % 3 == 0), "sepsis_onset": onset})
    with engine.begin() as connection:
        connection.execute(sa.insert(predictions), rows)
    engine.dispose()
    pd.DataFrame(labels).to_csv(tmp_path / "outcomes.csv", index=False)
    (tmp_path / "stop_rule.toml").write_text("[[stop]]\nfigure='ppv'\nat_least=0.99\nseptic_visits=10\n")
    return url, tmp_path


def test_the_report_of_a_silent_trial(live, models_dir, capsys):
    url, folder = live
    options = ["--labels", str(folder / "outcomes.csv"), "--models-dir", str(models_dir), "--out", str(folder / "out")]
    options += ["--from-log", url, "--quiet"]
    assert evaluate_model.main([*options, "--stop-rule", str(folder / "stop_rule.toml")]) == 0
    assert "STOP: PPV of an alert at least 0.99" in capsys.readouterr().out
    found = json.loads((folder / "out" / "evaluation.json").read_text())
    weeks = found["silent_trial"]["weeks"]
    assert sum(row["visits"] for row in weeks) == found["data"]["visits"] == 60 and len(weeks) >= 1
    assert found["data"]["moments"] == 60 * 12 and "ward_scores" not in found
    page = (folder / "out" / "evaluation.html").read_text()
    assert "Silent trial, by week" in page and "STOP" in page


def test_monitor_follows_the_stop_rule(live, models_dir, capsys):
    url, folder = live
    check = ["check", "--monitor", url, "--config", str(models_dir / "best_model_config.json"), "--days", "30"]
    rule, labels = str(folder / "stop_rule.toml"), str(folder / "outcomes.csv")
    assert monitor.main([*check, "--labels", labels, "--stop-rule", rule]) == 1
    assert "stop rule: STOP" in capsys.readouterr().out
    (folder / "stop_rule.toml").write_text("[[stop]]\nfigure='ppv'\nat_least=0.0\nseptic_visits=10\n")
    monitor.main([*check, "--labels", labels, "--stop-rule", rule])
    told = capsys.readouterr()
    assert "stop rule" not in told.out and "stop rule: holds" in told.err
    assert monitor.main([*check, "--stop-rule", rule]) == 2
    assert "--labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "told"),
    [("off", "no prediction log"), ("no url at all", "cannot be read"), ("x+y://u:secret@h/d", "cannot")],
)
def test_a_log_that_is_not_there_is_one_line(url, told, models_dir, live, capsys):
    _, folder = live
    options = ["--labels", str(folder / "outcomes.csv"), "--models-dir", str(models_dir), "--from-log", url]
    assert evaluate_model.main([*options, "--out", str(folder / "out")]) == 2
    error = capsys.readouterr().err
    assert told in error and "secret" not in error and len(error.splitlines()) == 1


def test_a_log_of_another_version_is_no_trial(live, models_dir, capsys):
    url, folder = live
    engine = open_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.update(predictions).values(model_version="other"))
    engine.dispose()
    options = ["--labels", str(folder / "outcomes.csv"), "--models-dir", str(models_dir), "--from-log", url]
    assert evaluate_model.main([*options, "--out", str(folder / "out")]) == 2
    assert "no score of model" in capsys.readouterr().err


def test_the_time_of_live_scores_is_that_of_the_observations():
    rows = log_rows(("a", "1", MONDAY, {0: (0.1, "LOW"), 2: (0.2, "LOW")}))
    rows.loc[1, "as_of"] = pd.NaT
    scored, left_out = live_scores(rows, labels_of(("a", "1", None)), Pseudonyms(KEY))
    assert left_out == {"scores of the log without a moment": 1} and len(scored.time) == 1
    assert scored.time[0] == int(np.datetime64(MONDAY, "us").astype(np.int64)) and HOUR == 3_600_000_000
