"""The papers that a hospital fills, and the folder for seismometer."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from evaluation.exports import source_attributes, tripod
from evaluation.exports.facts import facts_of
from evaluation.exports.model_card import ITEMS, NAMESPACE, xml_of
from evaluation.exports.papers import PAPERS, filled, read_answers, write_papers
from evaluation.exports.source_attributes import Item
from feature_pipeline import BadConfig, load_config

# 45 CFR 170.315(b)(11)(iv)(B): how many attributes each of the nine groups has
HTI_1 = {"1": 4, "2": 4, "3": 2, "4": 4, "5": 2, "6": 4, "7": 5, "8": 4, "9": 2}
# TRIPOD+AI: the parts of its 27 items
TRIPOD = {"3": 3, "5": 2, "6": 3, "8": 3, "9": 3, "12": 7, "18": 6, "20": 3, "23": 2, "27": 3}
# The CHAI schema 0.2: the elements of each section that must be there, in order
CHAI = {
    "BasicInfo": ["ModelName", "ModelDeveloper", "DeveloperContact"],
    "ReleaseInfo": ["ReleaseStage", "ReleaseDate", "ReleaseVersion", "GlobalAvailability", "RegulatoryApproval"],
    "ModelSummary": ["Summary", "Keywords"],
    "UsesAndDirections": [
        *("IntendedUseAndWorkflow", "PrimaryIntendedUsers", "HowToUse", "TargetedPatientPopulation"),
        "CautionedOutOfScopeSettings",
    ],
    "Warnings": ["KnownRisksAndLimitations", "KnownBiasesOrEthicalConsiderations", "ClinicalRiskLevel"],
    "TrustIngredients": ["AISystemFacts", "TransparencyInformation"],
    "KeyMetrics": ["UsefulnessUsabilityEfficacy", "FairnessEquity", "SafetyReliability"],
    "Resources": ["PeerReviewedPublications", "PatientConsentOrDisclosure"],
    "Bibliography": [],
}
METRIC = [
    *("MetricGoal", "Results", "Interpretation", "TestType"),
    *("TestingDataDescription", "ValidationProcessAndJustification"),
]
SYSTEM = [
    *("OutcomesAndOutputs", "ModelType", "InputDataSource", "OutputAndInputDataTypes"),
    *("DevelopmentDataCharacterization", "BiasMitigationApproaches", "OngoingMaintenance", "Security"),
]


def names(element):
    return [child.tag.removeprefix(f"{{{NAMESPACE}}}") for child in element]


def test_the_31_source_attributes():
    numbers = [item.number for item in source_attributes.ITEMS]
    assert len(numbers) == len(set(numbers)) == 31
    assert {g: sum(n.split(".")[0] == g for n in numbers) for g in HTI_1} == HTI_1


def test_the_27_items_of_tripod_ai():
    numbers = [item.number for item in tripod.ITEMS]
    assert len(numbers) == len(set(numbers)) == 52
    parts = {}
    for number in numbers:
        parts.setdefault(re.match(r"\d+", number)[0], []).append(number)
    assert list(parts) == [str(i) for i in range(1, 28)]
    assert {item: len(found) for item, found in parts.items() if len(found) > 1} == TRIPOD


@pytest.mark.parametrize("paper", PAPERS)
def test_every_item_is_answered_or_left_to_a_person(paper, evaluated, record, config_path):
    facts = facts_of(load_config(config_path), record)
    for item in PAPERS[paper][1]:
        assert item.facts or item.left, item.number
        assert set(item.facts) - {"synthetic"} <= set(facts), item.number
    for row in filled(PAPERS[paper][1], facts, {}):
        assert row["answer"] or row["left"], row["item"]
        assert "nan" not in row["answer"].lower().split() and "None" not in row["answer"]


def test_the_model_card_has_the_elements_of_the_schema_in_order(evaluated):
    root = ElementTree.parse(evaluated / "applied_model_card.xml").getroot()
    assert root.tag == f"{{{NAMESPACE}}}AppliedModelCard"
    assert {name: names(section) for name, section in zip(names(root), root, strict=True)} == CHAI
    assert names(root) == list(CHAI)
    trust = root.find(f"{{{NAMESPACE}}}TrustIngredients")
    assert [names(part) for part in trust] == [SYSTEM, ["FundingSource", "StakeholdersConsulted"]]
    for metric in root.find(f"{{{NAMESPACE}}}KeyMetrics"):
        assert names(metric) == METRIC
        [result] = metric.find(f"{{{NAMESPACE}}}Results")
        assert names(result) == ["Label", "ValueJson"] and json.loads(result[1].text)
    leaves = [element for element in root.iter() if not len(element)]
    assert all(element.text and element.text.strip() for element in leaves)


def test_the_model_card_escapes_what_people_write():
    answers = {item.number: "a < b & 'c'" for item in ITEMS}
    root = ElementTree.fromstring(xml_of(answers))
    assert root.find(f".//{{{NAMESPACE}}}ModelDeveloper").text == "a < b & 'c'"


def test_what_a_person_wrote_counts_and_stands_beside_what_is_known(tmp_path, record, config_path):
    path = tmp_path / "answers.toml"
    path.write_text('[source_attributes]\n"1.i" = "Data team of St. Example"\n"8.i" = "Each Monday."\n')
    config = load_config(config_path)
    before = write_papers(tmp_path / "a", config, record, {})
    after = write_papers(tmp_path / "b", config, record, read_answers(str(path)))
    assert before["source_attributes"][0] - after["source_attributes"][0] == 2
    assert after["tripod_ai"] == before["tripod_ai"]
    rows = {r["item"]: r for r in json.loads((tmp_path / "b" / "source_attributes.json").read_text())["items"]}
    assert rows["1.i"]["answered_by"] == ["person"] and rows["1.i"]["left"] is None
    assert rows["8.i"]["answered_by"] == ["project", "person"] and rows["8.i"]["answer"].endswith("Each Monday.")
    assert json.loads((tmp_path / "b" / "source_attributes.json").read_text())["open"] == sum(
        row["left"] is not None for row in rows.values()
    )
    assert "Data team of St. Example" in (tmp_path / "b" / "papers.html").read_text()


def test_an_item_whose_fact_is_not_known_is_left_to_a_person():
    [row] = filled((Item("x", "Fairness", ("fairness_here",)),), {}, {})
    assert row["left"] == "this evaluation does not tell it" and not row["answer"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[sources]\n"1.i" = "x"\n', "unknown paper 'sources'"),
        ('[tripod_ai]\n"99" = "x"\n', "has no item '99'"),
        ('[tripod_ai]\n"17" = 3\n', "must be a text"),
        ("[tripod_ai\n", "cannot be read"),
    ],
)
def test_bad_answers_are_refused_in_words(tmp_path, text, told):
    (tmp_path / "answers.toml").write_text(text)
    with pytest.raises(BadConfig, match=told):
        read_answers(str(tmp_path / "answers.toml"))


def test_the_folder_for_seismometer(evaluated, record, new_patients, config_path):
    folder = evaluated / "seismometer"
    config = {path.name: json.loads(path.read_text()) for path in folder.glob("*.yml")}
    other = config["config.yml"]["other_info"]
    for key in ("usage_config", "event_definition", "prediction_definition", "prediction_path", "event_path"):
        assert (folder / other[key]).is_file()
    usage = config["usage_config.yml"]["data_usage"]
    predictions = pd.read_parquet(folder / "predictions.parquet")
    events = pd.read_parquet(folder / "events.parquet")
    columns = [usage[key] for key in ("entity_id", "context_id", "primary_output", "predict_time")]
    assert set(columns) | {cohort["source"] for cohort in usage["cohorts"]} <= set(predictions.columns)
    assert {usage["event_table"][key] for key in ("type", "time", "value")} <= set(events.columns)
    assert usage["primary_target"] in {event["display_name"] for event in usage["events"]}
    assert {event["source"] for event in usage["events"]} == set(events["Type"])
    assert {d["name"] for d in config["prediction_dictionary.yml"]["predictions"]} == set(predictions.columns)
    data = record["data"]
    assert len(predictions) == data["judged_moments"] and len(events) == data["septic_visits"]
    assert predictions["visit"].nunique() == data["visits"]
    levels = load_config(config_path).risk_thresholds
    assert json.loads((folder / "metadata.json").read_text())["thresholds"] == [levels["high"], levels["medium"]]
    assert ((predictions["risk_high"] == 1) == (predictions["sepsis_probability"] >= levels["high"])).all()
    # the outcome by the tool's rule (the first event at or after the prediction, in its window) is that of the report
    joined = predictions.merge(events, on=["client", "visit"], how="left")
    ahead = (joined["EventTime"] - joined["prediction_time"]) / np.timedelta64(1, "h")
    hours = {event["display_name"]: event["window_hr"] for event in usage["events"]}[usage["primary_target"]]
    assert int(((ahead >= 0) & (ahead <= hours)).sum()) == data["positive_moments"]
    # nobody is named
    text = " ".join(predictions["client"]) + " ".join(events["visit"])
    known = pd.read_csv(new_patients / "labels.csv", dtype=str)["client"]
    assert not any(client in text for client in known)
