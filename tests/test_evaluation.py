"""The record of an evaluation, its page, and bad input."""

import html
import json
import re
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
from evaluated import options
from stays import HOUR, scored_of, stays_of

import evaluate_model
import train_best_model
from common.alerts import Judged, Scored, judged_moments
from common.labels import read_labels
from evaluation.alerts import random_alerts
from evaluation.comparators import event_figures
from evaluation.evaluate import Settings, evaluate
from evaluation.exports.papers import write_papers
from evaluation.report import chance_in_words, report_page
from evaluation.resampling import Clients
from evaluation.scoring import doubts_about_times, first_cells, past_of, ward_scores_of
from evaluation.subgroups import observed_groups
from feature_pipeline import NO_TIME, BadObservations, load_config, read_observations

ONE_RESAMPLE = 4  # of figures whose intervals do not matter


def test_the_record_agrees_with_itself(record):
    data, found, sums = record["data"], record["alerts"]["deployed"], record["alerts"]["deployed"]["sums"]
    assert data["visits"] == sums["visits"] and data["unknown_moments"] == sums["unknown"]
    assert found["alerts_per_100_patient_days"] == pytest.approx(100 * sums["alerts"] / data["patient_days"])
    assert sum(record["alerts"]["hours_of_day"]) == sums["alerts"]
    rows = record["thresholds"]["table"]
    assert all(row["alerts_per_100_patient_days"] <= row["budget"] + 1e-9 for row in rows)
    assert [row["threshold"] for row in rows] == sorted((row["threshold"] for row in rows), reverse=True)
    sites = record["side_by_side"]["parts"]
    assert sum(part["alerts"]["sums"]["alerts"] for part in sites.values()) == sums["alerts"]
    antibiotics = record["alerts"]["before_antibiotics"]
    assert antibiotics["septic_visits_with_antibiotic"] == data["septic_visits"]
    assert 0 < antibiotics["alerted_before"] <= data["septic_visits"]
    low, high = found["ppv_48h_95"]
    assert low <= found["ppv_48h"] <= high
    groups = [row for row in record["groups"]["table"] if row["attribute"] == "site"]
    assert sum(row["visits"] for row in groups) == data["visits"]


def test_a_model_beats_chance_and_itself_not_at_all(record):
    assert record["alerts"]["beyond_chance"] == {"ppv_48h": True, "sensitivity_48h": True}
    for name in ("roc_auc", "average_precision"):
        assert record["comparison"]["ranking_differences"][name]["difference"] == 0
    for gap in record["comparison"]["equal_alerts"]["differences"].values():
        assert gap["difference"] in (0, None)


def test_the_page_stands_alone_and_every_picture_has_words(evaluated, record):
    page = (evaluated / "evaluation.html").read_text()
    assert "http://" not in page and "https://" not in page and "<script" not in page
    pictures = page.split("<img ")[1:]
    assert len(pictures) == 6 and all('alt="' in p and len(p.split('alt="')[1].split('"')[0]) > 30 for p in pictures)
    for text in (
        "In short",
        "synthetic",
        "random",
        "Net benefit",
        "Two versions",
        "Side by side: site",
        "NEWS2",
        "MEWS",
    ):
        assert text in page, text
    assert "--set-thresholds" in page and html.escape(record["thresholds"]["command"]) in page
    assert ">nan<" not in page.lower() and ">None<" not in page


def test_the_command_of_the_page_deploys_the_threshold_of_its_table(record, models_dir, tmp_path):
    shutil.copytree(models_dir, tmp_path / "models")
    command = shlex.split(record["thresholds"]["command"])
    assert command[:2] == ["python", "train_best_model.py"]
    assert train_best_model.main([*command[2:], "--models-dir", str(tmp_path / "models"), "--quiet"]) == 0
    levels = load_config(tmp_path / "models" / "best_model_config.json").risk_thresholds
    asked = record["thresholds"]["answer"]["threshold"]
    assert asked <= levels["high"] < 1.001 * asked and levels["medium"] < levels["high"]


def test_random_alerts_are_named_as_what_they_are(record):
    """The report's own words, for scores without any information."""
    generator = np.random.default_rng(0)
    n, hours = 400, 60
    stays = stays_of(*((hours, int(generator.integers(20, 60)) if i % 4 == 0 else None) for i in range(n)))
    p = generator.random(n * hours)
    scored = Scored.of(stays, np.repeat(np.arange(n), hours), np.tile(np.arange(hours), n) * HOUR, p, p > 0.97)
    figures, _ = event_figures(scored, Clients(stays.client, 50))
    words = chance_in_words(
        record | {"alerts": {"deployed": figures, "random": random_alerts(scored)}, "settings": {"window_hours": 48.0}}
    )
    assert "no better than random ones" in words and "proves nothing" in words
    assert 0.8 < float(re.search(r"PPV is ([\d.]+) times", words)[1]) < 1.2


@pytest.mark.slow
def test_rows_in_another_order_give_the_same_record(new_patients, models_dir, tmp_path):
    plain, shuffled = tmp_path / "plain", tmp_path / "shuffled"
    for name, kind in (("past.parquet", pd.read_parquet), ("labels.csv", lambda p: pd.read_csv(p, dtype=str))):
        frame = kind(new_patients / name).sample(frac=1, random_state=3)
        shuffled.mkdir(exist_ok=True)
        frame.to_parquet(shuffled / name, index=False) if name.endswith("parquet") else frame.to_csv(
            shuffled / name, index=False
        )
    for folder, out in ((new_patients, plain), (shuffled, tmp_path / "other")):
        assert evaluate_model.main(options(folder, models_dir, out)) == 0
    assert (plain / "evaluation.json").read_text() == (tmp_path / "other" / "evaluation.json").read_text()


def test_labels_without_onset_say_what_cannot_be_said(new_patients, models_dir, tmp_path):
    labels = pd.read_csv(new_patients / "labels.csv", dtype=str).drop(columns=["sepsis_onset", "antibiotic_time"])
    labels.to_csv(tmp_path / "labels.csv", index=False)
    more = ["--labels", str(tmp_path / "labels.csv")]
    assert evaluate_model.main(options(new_patients, models_dir, tmp_path / "out", *more)) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert "ppv_48h" not in found["alerts"]["deployed"] and found["alerts"]["deployed"]["visit_ppv"] is not None
    assert any("no onset times" in line for line in found["cannot_be_said"])
    assert any("antibiotic_time" in line for line in found["cannot_be_said"])
    assert found["data"]["judged_moments"] == found["data"]["visits"]
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "retrospective" in page and "Lead time of the first alert" not in page


def test_the_first_cells_of_a_file_are_read_as_the_reader_reads_it(tmp_path):
    path = tmp_path / "o.csv"
    path.write_bytes("visit_id, observation_date\nä,2024-01-01\n1,2,3\n,\n".encode("latin-1"))
    assert first_cells(str(path), "observation_date").tolist() == ["2024-01-01", ""]


def test_labels_without_onset_are_no_events_of_seismometer(new_patients, models_dir, tmp_path, capsys):
    labels = pd.read_csv(new_patients / "labels.csv", dtype=str)[["visit_id", "client", "sepsis"]]
    labels.to_csv(tmp_path / "labels.csv", index=False)
    more = ["--labels", str(tmp_path / "labels.csv"), "--export", "seismometer"]
    assert evaluate_model.main(options(new_patients, models_dir, tmp_path / "out", *more)) == 2
    assert "needs onset times" in capsys.readouterr().err and not (tmp_path / "out").exists()


def doubts(observations, labels, tmp_path):
    observations.to_csv(tmp_path / "o.csv", index=False)
    labels.to_csv(tmp_path / "l.csv", index=False)
    past = past_of(read_observations(observations), read_labels(labels), 6.0)
    lines = doubts_about_times(past, str(tmp_path / "o.csv"), str(tmp_path / "l.csv"))
    observations.to_parquet(tmp_path / "o.parquet")
    assert doubts_about_times(past, str(tmp_path / "o.parquet"), str(tmp_path / "l.csv")) == lines
    return lines


def test_times_that_cannot_be_right_are_doubted(new_patients, tmp_path):
    """Onsets of another zone, and dates without a time of day, make a model look better than it is."""
    observations = pd.read_parquet(new_patients / "past.parquet")
    labels = pd.read_csv(new_patients / "labels.csv", dtype=str, keep_default_na=False)
    onset, time = labels["sepsis_onset"], pd.to_datetime(observations["observation_date"])
    observations["observation_date"] = time.dt.strftime("%Y-%m-%dT%H:%M:%S")
    assert doubts(observations, labels, tmp_path) == []
    zoned = labels.assign(sepsis_onset=[text and f"{text}-11:00" for text in onset])
    (line,) = doubts(observations, zoned, tmp_path)
    assert line.startswith("The onsets have an offset from UTC and the observations have none.")
    both = observations.assign(observation_date=time.dt.strftime("%Y-%m-%dT%H:%M:%SZ"))
    assert doubts(both, zoned, tmp_path) == []
    (line,) = doubts(both, labels, tmp_path)
    assert line.startswith("The observations have an offset")
    (line,) = doubts(observations, labels.assign(sepsis_onset=onset.str[:10]), tmp_path)
    assert line.startswith("Most onsets are at midnight")
    dates = observations.assign(observation_date=time.dt.strftime("%Y-%m-%d"))
    (line,) = doubts(dates, labels, tmp_path)
    assert line.startswith("Most times of ") and "flatter" in line


def test_no_septic_visit(new_patients, models_dir, tmp_path):
    labels = pd.read_csv(new_patients / "labels.csv", dtype=str)
    labels[labels["sepsis"] == "0"].to_csv(tmp_path / "labels.csv", index=False)
    more = ["--labels", str(tmp_path / "labels.csv"), "--export", "papers", "seismometer"]
    assert evaluate_model.main(options(new_patients, models_dir, tmp_path / "out", *more)) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert any("No visit was septic" in line for line in found["cannot_be_said"])
    assert found["alerts"]["deployed"]["alerts_per_100_patient_days"] is not None
    assert found["ranking"]["roc_auc"] is None and "net_benefit" not in found


def test_a_model_that_never_alerts(new_patients, models_dir, tmp_path):
    """Thresholds that are never reached: the page says so, and shows what would."""
    config = load_config(models_dir / "best_model_config.json")
    labels = read_labels(new_patients / "labels.csv")
    past = past_of(read_observations(new_patients / "past.parquet"), labels, 12.0)
    p = np.random.default_rng(0).random(len(past.visit)) / 10
    scored = Scored.of(past.stays, past.visit, past.time, p, p > 2)
    found = evaluate(past, scored, config, Settings())
    assert any("No score reached" in line for line in found["cannot_be_said"])
    page = report_page(found, [])
    assert "gives no alert" in page and "Thresholds" in page


@pytest.mark.slow
def test_patients_that_it_learned_from_are_left_out_or_refused(
    models_dir, cohort_files, new_patients, tmp_path, capsys
):
    observations, labels = map(str, cohort_files)
    named = ["--observations", observations, "--labels", labels, "--models-dir", str(models_dir)]
    assert evaluate_model.main([*named, "--out", str(tmp_path)]) == 2
    assert "was trained on all of these patients" in capsys.readouterr().err
    both = tmp_path / "both"
    both.mkdir()
    pd.concat([pd.read_parquet(new_patients / "past.parquet"), pd.read_parquet(observations)]).to_parquet(
        both / "past.parquet", index=False
    )
    rows = [pd.read_csv(path, dtype=str) for path in (new_patients / "labels.csv", labels)]
    pd.concat(rows).to_csv(both / "labels.csv", index=False)
    assert evaluate_model.main(options(both, models_dir, both / "out")) == 0
    alone = json.loads((both / "out" / "evaluation.json").read_text())["data"]["visits"]
    assert alone == len(rows[0])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--version", "20200101_000000"], "no version"),
        (["--compare", "../models"], "no version"),
        (["--by", "site"], "no such group"),
        (["--labels", "absent.csv"], "does not exist"),
        (["--from-log", "sqlite:///x.db"], "either --observations"),
        (["--answers", "absent.toml", "--export", "papers"], "does not exist"),
        (["--answers", "answers.toml"], "give --export papers too"),
        (["--stop-rule", "stop_rule.toml"], "give --from-log too"),
    ],
)
def test_bad_options_are_one_line(new_patients, models_dir, tmp_path, capsys, more, told):
    assert evaluate_model.main(options(new_patients, models_dir, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1


def test_a_model_of_another_schema_is_refused(new_patients, models_dir, tmp_path, capsys):
    config = json.loads((models_dir / "best_model_config.json").read_text()) | {"schema_version": 99}
    (tmp_path / "best_model_config.json").write_text(json.dumps(config))
    assert evaluate_model.main(options(new_patients, tmp_path, tmp_path / "out")) == 2
    assert "schema" in capsys.readouterr().err


def test_labels_of_nobody(new_patients):
    labels = pd.DataFrame({"visit_id": ["x"], "client": ["y"], "sepsis": [1], "sepsis_onset": [0]})
    with pytest.raises(BadObservations, match="no labelled visit"):
        past_of(read_observations(new_patients / "past.parquet"), labels, 1.0)


def test_moments_at_each_new_observation(cohort):
    observations = read_observations(cohort[0])
    labels = pd.DataFrame(observations.keys(), columns=["client", "visit_id"]).assign(sepsis=0, sepsis_onset=NO_TIME)
    past = past_of(observations, labels, "observation")
    table = cohort[0].assign(time=pd.to_datetime(cohort[0]["observation_date"], format="ISO8601", errors="coerce"))
    first = past.keys[0]
    own = table[(table["client"].astype(str) == first[0]) & (table["visit_id"].astype(str) == first[1])]
    expected = set(own["time"].dropna().astype("datetime64[us]").astype(np.int64))
    assert set(past.time[past.visit == 0].tolist()) <= expected
    assert len(past.time[past.visit == 0]) >= 0.9 * len(expected)
    assert (np.diff(past.time)[np.diff(past.visit) == 0] > 0).all()


def test_judged_moments_by_hand():
    scored = scored_of(stays_of((12, 8), (12, None)), {0: 0.1, 2: 0.1, 8: 0.1, 9: 0.1}, {0: 0.1, 12: 0.1})
    found = judged_moments(scored, 6, False)
    assert isinstance(found, Judged)
    assert found.label.tolist() == [0, 1, 1, 0, 0]  # onset in 8, 6, 0 h; 9 h is past
    assert judged_moments(scored, 6, True).label.tolist() == [0, 1, 1, 1, 0, 0]


def test_codes_that_nobody_knows_are_named_and_no_score_is_made_up(new_patients, models_dir, tmp_path):
    """A hospital whose codes are all foreign: the ward scores have no input, and the page says so."""
    frame = pd.read_parquet(new_patients / "past.parquet")
    frame["observation_type_code"] = "X" + frame["observation_type_code"].astype(str)
    frame.to_parquet(tmp_path / "past.parquet", index=False)
    more = ["--observations", str(tmp_path / "past.parquet")]
    assert evaluate_model.main(options(new_patients, models_dir, tmp_path / "out", *more)) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert "ward_scores" not in found and any("NEWS2, qSOFA, SIRS" in line for line in found["cannot_be_said"])
    assert any("none has them here" in line for line in found["cannot_be_said"])
    assert "XHR" in found["data"]["unused_codes"]
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "XHR (" in page and "Against the scores" not in page


def test_a_model_that_answers_nothing(new_patients, models_dir, tmp_path):
    """Every moment UNKNOWN, as where a hospital measures too little: no figure of the model, those of the ward stay."""
    config = load_config(models_dir / "best_model_config.json")
    labels = read_labels(new_patients / "labels.csv")
    past = past_of(read_observations(new_patients / "past.parquet"), labels, 12.0)
    silent = np.full(len(past.visit), np.nan)
    scored = Scored.of(past.stays, past.visit, past.time, silent, np.zeros(len(silent), dtype=bool))
    groups = observed_groups(past.observations, past.place)
    found = evaluate(past, scored, config, Settings(alerts_a_day=1), ward_scores_of(past), groups)
    json.dumps(found, allow_nan=False)
    assert found["alerts"]["deployed"]["unknown_share"] == 1 and found["ranking"]["roc_auc"] == 0.5
    assert found["ward_scores"]["news2"]["ranking"]["comparator"]["roc_auc"] > 0.5
    assert found["calibration"]["expected_over_observed"] is None and found["thresholds"]["table"] == []
    page = report_page(found, [])
    assert "100.0% of the scores" in page and ">nan<" not in page
    write_papers(tmp_path, config, found, {})


@pytest.mark.parametrize("septic", [0, 1])
def test_one_visit_alone(new_patients, models_dir, septic):
    config = load_config(models_dir / "best_model_config.json")
    labels = read_labels(new_patients / "labels.csv")
    labels = labels[labels["sepsis"] == septic].head(1)
    past = past_of(read_observations(new_patients / "past.parquet"), labels, 3.0)
    p = np.linspace(0, 0.9, len(past.visit))
    scored = Scored.of(past.stays, past.visit, past.time, p, p > 0.5)
    found = evaluate(
        past, scored, config, Settings(), ward_scores_of(past), observed_groups(past.observations, past.place)
    )
    json.dumps(found, allow_nan=False)
    assert found["data"]["visits"] == 1 and ">nan<" not in report_page(found, [])
