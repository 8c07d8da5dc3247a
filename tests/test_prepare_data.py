"""prepare_data.py: the same hospital from every format, what is left out and why, and bad input."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import formats
import pandas as pd
import pytest
import sqlalchemy as sa

import prepare_data
from common.command_line import read_synonyms
from common.fhir import Reading, readings
from feature_pipeline import CONCEPT, read_observations, to_unit
from sources.meanings import suggest
from training.snapshots import read_labels

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "own_tables"
SHARED_DATA = Path(os.environ.get("SEPSIS_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
DEMO = SHARED_DATA / "mimic_iv_demo_sources"


def run(*arguments, out: Path, status: int = 0) -> Path:
    options = [] if "--labels" in arguments or arguments[0] == "inspect" else ["--labels", "none"]
    assert prepare_data.main([*map(str, arguments), "--out", str(out), "--threads", "1", *options]) == status
    return out


def by_concept(folder: Path) -> list[tuple]:
    """(client, time, concept, value in the concept's unit) of all observations whose code has a concept."""
    table = pd.read_parquet(folder / "observations.parquet")
    concepts = read_synonyms(folder / "codes.csv")
    return sorted(
        (row.client, str(row.observation_date), concept, to_unit(CONCEPT[concept], row.observation_value, row.unit))
        for row in table.astype(object).where(table.notna(), None).itertuples()
        if (concept := concepts.get(row.observation_type_code))
    )


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def database(url: str) -> str:
    """The OMOP tables in a database, with ids as numbers and times as times."""
    engine = sa.create_engine(url)
    for name, rows in formats.omop_tables().items():
        frame = pd.DataFrame(rows)
        for column in frame:
            if column.endswith("_id") and column != "vocabulary_id":
                numbers = [None if pd.isna(cell) else int(cell) for cell in frame[column]]
                frame[column] = pd.array(numbers, dtype="Int64")
            elif column.endswith("datetime"):
                frame[column] = pd.to_datetime(frame[column])
        frame.to_sql(name, engine, index=False)
    engine.dispose()
    return url


# ----------------------------------------------------------------------------------------------- every format


SOURCES = {
    "mimic-iv": lambda folder: ("mimic-iv", formats.mimic_iv(folder)),
    "omop": lambda folder: ("omop", formats.omop(folder), "--ids", "source"),
    "omop, upper case": lambda folder: ("omop", formats.omop(folder, upper=True), "--ids", "source"),
    "omop, parquet": lambda folder: ("omop", formats.omop(folder, form="parquet"), "--ids", "source"),
    "omop, source codes": lambda folder: ("omop", formats.omop(folder), "--ids", "source", "--codes", "source"),
    "meds": lambda folder: ("meds", formats.meds(folder)),
    "fhir": lambda folder: ("fhir", formats.fhir(folder)),
    "fhir, bundle": lambda folder: ("fhir", formats.fhir(folder, bundle=True)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_format_gives_the_same_observations(source, tmp_path):
    out = run(*SOURCES[source](tmp_path / "in"), "--time", "charted", out=tmp_path / "out")
    assert by_concept(out) == formats.EXPECTED
    facts = report(out)
    assert facts["visits"] == 2
    # the text of the rhythm, and the creatinine of a day without a stay
    assert facts["left_out"]["no_visit"] == 1 and sum(facts["left_out"].values()) == 2
    assert facts["observations"] + sum(facts["left_out"].values()) == facts["rows"]


@pytest.mark.parametrize("source", ["mimic-iv", "omop", "fhir"])
def test_visits_have_the_hospitals_own_numbers(source, tmp_path):
    out = run(*SOURCES[source](tmp_path / "in"), out=tmp_path / "out")
    table = pd.read_parquet(out / "observations.parquet")
    assert set(zip(table["client"], table["visit_id"], strict=True)) == {("101", "20"), ("102", "21")}


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_database_gives_what_the_files_give(kind, tmp_path, request):
    url = f"sqlite:///{tmp_path}/omop.db" if kind == "sqlite" else request.getfixturevalue("postgres")
    out = run("omop", database(url), out=tmp_path / "out")
    files = run("omop", formats.omop(tmp_path / "in"), out=tmp_path / "files")
    for name in ("observations.parquet", "codes.csv"):
        assert (out / name).read_bytes() == (files / name).read_bytes()


def test_ids_of_64_bits_are_kept(tmp_path):
    out = run("omop", formats.omop(tmp_path / "in", form="parquet"), out=tmp_path / "out")
    clients = set(pd.read_parquet(out / "observations.parquet")["client"])
    assert clients == {formats.HASH["101"], formats.HASH["102"]}


def test_without_a_concept_table_codes_are_the_concepts_ids(tmp_path):
    folder = formats.omop(tmp_path / "in")
    (folder / "concept.csv.gz").unlink()
    out = run("omop", folder, out=tmp_path / "out")
    codes = pd.read_csv(out / "codes.csv", dtype=str)
    assert "1000" in set(codes["code"])
    assert codes.set_index("code").loc["1001", "unit"] == "[degF]"  # from unit_concept_id


def test_concept_0_falls_back_to_the_source_code(tmp_path):
    tables = formats.omop_tables()
    for row in tables["measurement"]:
        row["measurement_concept_id"] = "0"
    for name, rows in tables.items():
        formats.write(tmp_path / "in", name, rows)
    out = run("omop", tmp_path / "in", out=tmp_path / "out")
    assert {"220045", "50912"} <= set(pd.read_parquet(out / "observations.parquet")["observation_type_code"])


def test_a_visit_number_that_was_written_with_a_point_finds_its_visit(tmp_path):
    tables = formats.omop_tables()
    tables["measurement"] = tables["measurement"][-2:-1]  # of a stay whose number is small enough for a float
    tables["measurement"][0] |= {"visit_occurrence_id": "-77.0", "measurement_datetime": "2199-01-01 00:00:00"}
    for name, rows in tables.items():
        formats.write(tmp_path / "in", name, rows)
    out = run("omop", tmp_path / "in", out=tmp_path / "out")
    assert report(out)["times"]["after_the_visit"] == 1


def test_a_table_in_parts_in_a_subfolder_is_read_whole(tmp_path):
    folder = formats.omop(tmp_path / "in")
    rows = pd.read_csv(folder / "measurement.csv.gz", dtype=str)
    (folder / "measurement.csv.gz").unlink()
    (folder / "measurement").mkdir()
    for part in range(2):
        rows[part::2].to_csv(folder / "measurement" / f"part-{part}.csv", index=False)
    out = run("omop", folder, "--time", "charted", "--ids", "source", out=tmp_path / "out")
    assert by_concept(out) == formats.EXPECTED


# ------------------------------------------------------------------------------------------------ times, visits


@pytest.mark.parametrize("source", ["mimic-iv", "fhir"])
def test_a_result_is_known_when_it_could_be_seen(source, tmp_path):
    out = run(*SOURCES[source](tmp_path / "in"), out=tmp_path / "out")
    times = {row[1] for row in by_concept(out) if row[2] == "creatinine"}
    assert times == {"2180-03-09 03:10:00", "2151-11-03 02:00:00"}


def test_visits_can_be_stays_in_intensive_care(tmp_path):
    for source, stay in (("mimic-iv", "30"), ("omop", "30"), ("fhir", "30"), ("meds", "101-icu-21800309T090000")):
        folder = tmp_path / source
        out = run(*SOURCES[source](folder / "in"), "--visits", "icu", "--time", "charted", out=folder / "out")
        table = pd.read_parquet(out / "observations.parquet")
        measured = table[~table["observation_type_code"].isin(["Age", "Gender"])]
        assert measured["observation_value"].tolist() == [101.0, 97.5]
        assert set(table["visit_id"]) == {stay}
        static = table[table["observation_date"] == formats.ICU[3]]
        assert dict(zip(static["observation_type_code"], static["observation_value"], strict=True)) == {
            **{"Age": 70.0, "Gender": 1.0}
        }


def test_stays_in_intensive_care_with_the_number_of_their_visit_are_told_apart(tmp_path):
    resources = formats.fhir_resources()
    (first,) = [resource for resource in resources if resource["id"] == "i-30"]
    first["identifier"] = [{"value": "20"}]
    second = first | {"id": "i-31", "period": {"start": "2180-03-12T07:00:00Z", "end": "2180-03-12T09:00:00Z"}}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "all.ndjson").write_text("\n".join(map(json.dumps, [*resources, second])))
    out = run("fhir", tmp_path / "in", "--visits", "icu", "--time", "charted", out=tmp_path / "out")
    table = pd.read_parquet(out / "observations.parquet")
    measured = table[~table["observation_type_code"].isin(["Age", "Gender"])]
    assert list(zip(measured["visit_id"], measured["observation_value"], strict=True)) == [
        *(("i-30", 101.0), ("i-30", 97.5), ("i-31", 100.4))
    ]


def test_labels_are_written_unless_they_are_not_wanted(tmp_path):
    folder = formats.mimic_iv(tmp_path / "in")
    formats.write(
        *(folder / "hosp", "prescriptions"),
        [
            {
                "subject_id": "101",
                "hadm_id": "20",
                "starttime": "2180-03-09 12:00:00",
                "stoptime": "2180-03-12 12:00:00",
                "drug": "Vancomycin",
                "drug_type": "MAIN",
                "route": "IV",
                "pharmacy_id": "1",
            }
        ],
    )
    formats.write(
        *(folder / "hosp", "microbiologyevents"),
        [
            {
                "subject_id": "101",
                "hadm_id": "20",
                "micro_specimen_id": "9",
                "chartdate": "2180-03-09",
                "charttime": "2180-03-09 10:00:00",
                "spec_type_desc": "BLOOD CULTURE",
            }
        ],
    )
    out = run("mimic-iv", folder, "--labels", "sepsis3", out=tmp_path / "out")
    labels = read_labels(out / "labels.parquet")
    assert labels["visit_id"].tolist() == ["20"]
    assert not (run("mimic-iv", folder, out=tmp_path / "none") / "labels.parquet").exists()


# ------------------------------------------------------------------------------------------------------ output


def test_the_output_is_the_same_for_the_same_input(tmp_path):
    source = SOURCES["fhir"](tmp_path / "in")
    for name in ("a", "b"):
        threads = "1" if name == "a" else "2"
        arguments = [*map(str, source), "--labels", "none", "--out", str(tmp_path / name), "--threads", threads]
        assert prepare_data.main(arguments) == 0
    for name in ("observations.parquet", "codes.csv", "report.json", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_reader_takes_the_table_and_codes_csv(tmp_path):
    out = run(*SOURCES["mimic-iv"](tmp_path / "in"), out=tmp_path / "out")
    synonyms = read_synonyms(out / "codes.csv")
    assert synonyms["220045"] == "heart_rate" and "220048" not in synonyms
    observations = read_observations(out / "observations.parquet", synonyms)
    assert not observations.set_aside and observations.n_visits == 2
    place = observations.codes.index("223761")
    start = observations.group_start[list(observations.group_code).index(place)]
    assert observations.value[start] == 38.0


def test_a_corrected_codes_csv_replaces_the_suggestions(tmp_path):
    source = SOURCES["mimic-iv"](tmp_path / "in")
    out = run(*source, out=tmp_path / "out")
    codes = pd.read_csv(out / "codes.csv", dtype=str, keep_default_na=False)
    codes.loc[codes["code"] == "50813", "concept"] = "glucose"
    codes.loc[codes["code"] == "50912", "concept"] = ""
    codes.to_csv(tmp_path / "codes.csv", index=False)
    run(*source, "--synonyms", tmp_path / "codes.csv", out=tmp_path / "out")
    codes = pd.read_csv(out / "codes.csv", keep_default_na=False).set_index("code")
    assert codes.loc["50813", ["concept", "why"]].tolist() == ["glucose", "given"]
    assert codes.loc["50912", ["concept", "why"]].tolist() == ["", "given"]  # cleared: nothing is suggested again


def test_only_the_owner_and_the_group_read_what_is_written(tmp_path):
    out = run(*SOURCES["meds"](tmp_path / "in"), out=tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        *("codes.csv", "observations.parquet", "report.html", "report.json")
    ]
    assert not any(path.stat().st_mode & 0o007 for path in [out, *out.iterdir()])


def test_the_report_tells_what_of_a_code_is_left_out(tmp_path):
    out = run(*SOURCES["mimic-iv"](tmp_path / "in"), out=tmp_path / "out")
    facts = report(out)
    assert {"reason": "no_number", "code": "220048", "n": 1} in facts["left_out_by_code"]
    page = (out / "report.html").read_text()
    assert "its value is not a number" in page and "220048" in page and "data:image/png" in page


# -------------------------------------------------------------------------------------------- codes and units


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("Non Invasive Blood Pressure systolic", "systolic_bp"),
        ("Systolic blood pressure by Noninvasive", "systolic_bp"),
        ("ART BP Mean", "mean_bp"),
        ("O2 saturation pulseoxymetry", "spo2"),
        ("Oxygen Saturation (Blood, Blood Gas)", "sao2"),
        ("Temperature Celsius", "temperature"),
        ("Bilirubin, Total (Blood, Chemistry)", "bilirubin_total"),
        ("Creatinine [Mass/volume] in Serum or Plasma", "creatinine"),
        ("Leukocytes [#/volume] in Blood by Automated count", "wbc"),
        ("Potassium, Whole Blood", "potassium"),
        ("Alanine Aminotransferase (ALT)", "alt"),
        ("Inspired O2 Fraction", "fio2"),
        # something else, though a word of it sounds alike
        ("Glucose (Urine)", None),
        ("Creatinine [Mass/volume] in Urine", None),
        ("Heart Rate Alarm - High", None),
        ("Free Calcium", None),
        ("PH (Venous)", None),
        ("Heart Rhythm", None),
        ("Inspired Gas Temp.", None),
        ("Pulmonary Artery Pressure systolic", None),
        ("Lactate Dehydrogenase (LD)", None),
    ],
)
def test_a_concept_is_suggested_by_the_name(name, concept):
    found = suggest("x", name)[0]
    assert (found and found.name) == concept


def table_of(tmp_path, rows, header="csn,pat,time,name,value,unit") -> Path:
    path = tmp_path / "table.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


MAP = """[columns]
visit_id = "csn"
client = "pat"
observation_date = "time"
observation_type_code = "name"
observation_value = "value"
unit = "unit"
"""


def prepared_table(tmp_path, rows, map_text=MAP, **settings):
    (tmp_path / "map.toml").write_text(map_text)
    return run("table", table_of(tmp_path, rows), "--map", tmp_path / "map.toml", out=tmp_path / "out", **settings)


def test_units_that_do_not_fit_are_told_by_code(tmp_path):
    rows = [
        f"1,a,2024-01-0{day} 08:00,{cells}"
        for day in (1, 2, 3)
        for cells in ("Glucose,100,mmol/mol", "Creatinine,80,umol/L", "Temp,99,F", "Lactate,300,mmol/L")
    ]
    codes = pd.read_csv(prepared_table(tmp_path, rows) / "codes.csv", keep_default_na=False).set_index("code")
    assert codes.loc["Glucose", "concept"] == "" and "cannot be converted" in codes.loc["Glucose", "why"]
    assert codes.loc["Creatinine", "concept"] == "creatinine" and codes.loc["Temp", "concept"] == "temperature"
    assert codes.loc["Lactate", "concept"] == "" and "only 0% of its values fit" in codes.loc["Lactate", "why"]


def test_a_blood_pressure_in_one_cell_becomes_two_observations(tmp_path):
    out = prepared_table(tmp_path, ["1,a,2024-01-01 08:00,BP,120/80,mmHg", "1,a,2024-01-01 08:00,Ratio,12/80,"])
    table = pd.read_parquet(out / "observations.parquet")
    assert dict(zip(table["observation_type_code"], table["observation_value"], strict=True)) == {
        "8480-6": 120.0,
        "8462-4": 80.0,
    }


def test_the_coma_scale_is_the_sum_of_its_parts_of_one_time(tmp_path):
    parts = [("GCS - Eye Opening", 3), ("GCS - Verbal Response", 4), ("GCS - Motor Response", 6)]
    rows = [f"1,a,2024-01-01 08:00,{name},{value}," for name, value in parts] + [
        "1,a,2024-01-01 09:00,GCS - Eye Opening,4,"
    ]
    named = MAP + 'observation_name = "name"\n'
    table = pd.read_parquet(prepared_table(tmp_path, rows, named) / "observations.parquet")
    total = table[table["observation_type_code"] == "9269-2"]
    assert total["observation_value"].tolist() == [13.0]


# --------------------------------------------------------------------------------------------- any other table


def test_the_example_of_a_flowsheet_is_mapped_in_fewer_than_fifteen_lines(tmp_path):
    for name in ("flowsheet.toml", "vitals.sql"):
        lines = [
            line for line in (EXAMPLES / name).read_text().splitlines() if line and not line.startswith(("#", "--"))
        ]
        assert len(lines) < 15
    out = run("table", EXAMPLES / "flowsheet.csv", "--map", EXAMPLES / "flowsheet.toml", out=tmp_path / "a")
    concepts = {row[2] for row in by_concept(out)}
    assert concepts == {
        *("heart_rate", "respiratory_rate", "spo2", "temperature", "systolic_bp", "diastolic_bp", "lactate")
    }
    out = run("table", EXAMPLES, "--sql", EXAMPLES / "vitals.sql", out=tmp_path / "b")
    first = pd.read_parquet(out / "observations.parquet").iloc[0]
    assert str(first["observation_date"]) == "1999-12-31 23:00:00"  # an hour before admission
    assert {row[2] for row in by_concept(out)} == {
        "heart_rate",
        "respiratory_rate",
        "spo2",
        "temperature",
        "systolic_bp",
    }


def test_minutes_after_a_moment_are_times(tmp_path):
    text = MAP + '[time]\nminutes_after = "2020-02-28 23:00"\n'
    table = pd.read_parquet(
        prepared_table(tmp_path, ["1,a,90,HR,80,", "1,a,-30,HR,81,"], text) / "observations.parquet"
    )
    assert table["observation_date"].astype(str).tolist() == ["2020-02-28 22:30:00", "2020-02-29 00:30:00"]


def test_a_query_of_a_database_is_streamed(tmp_path):
    url = f"sqlite:///{tmp_path}/own.db"
    engine = sa.create_engine(url)
    frame = pd.DataFrame(
        {"v": [7, 7], "t": ["2024-01-01 08:00", "2024-01-01 09:00"], "c": ["HR", "SpO2"], "x": [80.5, 97]}
    )
    frame.to_sql("flow", engine, index=False)
    engine.dispose()
    (tmp_path / "q.sql").write_text(
        "SELECT v AS visit_id, t AS observation_date, c AS observation_type_code, x AS observation_value FROM flow;\n"
    )
    out = run("table", url, "--sql", tmp_path / "q.sql", out=tmp_path / "out")
    table = pd.read_parquet(out / "observations.parquet")
    assert table["observation_value"].tolist() == [80.5, 97.0] and set(table["client"]) == {"7"}
    lines = ["visit_id = 'v'", "observation_date = 't'", "observation_type_code = 'c'", "observation_value = 'x'"]
    (tmp_path / "map.toml").write_text("\n".join(["table = 'flow'", "[columns]", *lines]))
    mapped = run("table", url, "--map", tmp_path / "map.toml", out=tmp_path / "mapped")
    assert (mapped / "observations.parquet").read_bytes() == (out / "observations.parquet").read_bytes()


def test_inspect_writes_a_map_that_table_takes(tmp_path, capsys):
    out = run("inspect", EXAMPLES / "flowsheet.csv", out=tmp_path / "look")
    shown = capsys.readouterr().out
    assert "visit_id               PAT_ENC_CSN_ID" in shown and "heart_rate (the code)" in shown
    assert not (out / "observations.parquet").exists()
    again = run("table", EXAMPLES / "flowsheet.csv", "--map", out / "map.toml", out=tmp_path / "out")
    example = run("table", EXAMPLES / "flowsheet.csv", "--map", EXAMPLES / "flowsheet.toml", out=tmp_path / "example")
    assert (again / "observations.parquet").read_bytes() == (example / "observations.parquet").read_bytes()


@pytest.mark.parametrize(
    ("form", "doubt"), [("%d/%m/%Y %H:%M", False), ("%m/%d/%Y %H:%M", False), ("%Y%m%d%H%M%S", False), (None, True)]
)
def test_inspect_finds_the_form_of_times(form, doubt, tmp_path, capsys):
    """Not from the first ones: those of a table that is in order of time are all of the first days of a month."""
    days = pd.date_range("2024-01-03 10:00", "2024-01-28", periods=12_000 if form else 2)
    if doubt:
        days = days[:1]
    rows = [f"1,a,{day.strftime(form or '%d/%m/%Y %H:%M')},HR,80,bpm" for day in days]
    path = table_of(tmp_path, rows, "csn,pat,time,item,value,unit")
    run("inspect", path, out=tmp_path / "out")
    assert f'format = "{form or "%m/%d/%Y %H:%M"}"' in (tmp_path / "out" / "map.toml").read_text()
    assert ("day and month cannot be told apart" in capsys.readouterr().out) == doubt


def test_a_table_without_a_time_of_day_is_one_line(tmp_path, capsys):
    numbers = MAP + '[time]\nminutes_after = "2000-01-01"\n'
    for text, cell in ((MAP, "2024-01-01"), (MAP, ""), (numbers, "20240103100000"), (numbers, "x")):
        prepared_table(tmp_path, [f"1,a,{cell},HR,80,bpm"], text, status=2)
        assert "none of the 1 rows has a time of day in observation_date" in capsys.readouterr().err


def test_inspect_tells_which_columns_it_cannot_find(tmp_path, capsys):
    path = table_of(tmp_path, ["1,2,3"], header="csn,alpha,beta")
    run("inspect", path, out=tmp_path / "look", status=2)
    error = capsys.readouterr().err
    assert "no column looks like 'observation_date', 'observation_type_code', 'observation_value'" in error
    assert "# observation_date = " in (tmp_path / "look" / "map.toml").read_text()


# ---------------------------------------------------------------------------------------------------- bad input


def without_table(folder):
    formats.omop(folder)
    (folder / "measurement.csv.gz").unlink()


def without_column(folder):
    formats.omop(folder)
    frame = pd.read_csv(folder / "visit_occurrence.csv.gz", dtype=str).drop(columns="visit_concept_id")
    frame.to_csv(folder / "visit_occurrence.csv.gz", index=False)


def without_rows(folder):
    formats.omop(folder)
    pd.read_csv(folder / "measurement.csv.gz", dtype=str).head(0).to_csv(folder / "measurement.csv.gz", index=False)


def half_a_gzip(folder):
    formats.omop(folder)
    text = "\n".join([",".join(formats.omop_tables()["measurement"][0]), *[f"{i},{i * 7919}" for i in range(90_000)]])
    content = gzip.compress(text.encode())
    (folder / "measurement.csv.gz").write_bytes(content[: len(content) // 2])


def something_else(folder):
    formats.meds(folder)


def no_stay(folder):
    tables = formats.omop_tables()
    for row in tables["visit_occurrence"]:
        row["visit_concept_id"] = "9202"
    for name, rows in tables.items():
        formats.write(folder, name, rows)


def two_files(folder):
    formats.omop(folder)
    formats.omop(folder / "older")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (without_table, "no file of the table 'measurement'"),
        (without_column, "visit_occurrence.csv.gz: missing column 'visit_concept_id' among 7"),
        (without_rows, "the table measurement is empty"),
        (half_a_gzip, "it is no whole gzip file"),
        (something_else, "no file of the table 'measurement', 'visit_occurrence'"),
        (no_stay, "no hospital stay is among the visits"),
        (two_files, "two files hold the table measurement"),
    ],
)
def test_bad_input_is_one_line(broken, message, tmp_path, capsys):
    broken(tmp_path / "in")
    run("omop", tmp_path / "in", out=tmp_path / "out", status=2)
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("error: ") and "\n" not in error
    assert not list((tmp_path / "out").glob("*"))  # no half output, no working files


def test_the_other_commands_do_without_duckdb(tmp_path):
    code = "import sys; sys.modules['duckdb'] = None; import prepare_data; sys.exit(prepare_data.main(sys.argv[1:]))"
    files = ["--observations", tmp_path / "o.parquet", "--labels", tmp_path / "l.csv", "--patients", "20"]
    for command, status in ((["demo", *files], 0), (["omop", tmp_path, "--out", tmp_path / "out"], 2)):
        call = [sys.executable, "-c", code, *map(str, command)]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == status, done.stderr
    assert done.stderr == "error: reading tables needs DuckDB: pip install -r requirements-prepare.txt\n"


def test_a_folder_that_does_not_exist_is_one_line(tmp_path, capsys):
    for source in ("omop", "meds", "fhir", "mimic-iv"):
        run(source, tmp_path / "absent", out=tmp_path / "out", status=2)
        assert "no such folder" in capsys.readouterr().err


def test_a_database_that_cannot_be_reached_is_one_line_without_the_password(tmp_path, capsys):
    run("omop", "postgresql+psycopg://me:hunter2@127.0.0.1:1/x?connect_timeout=2", out=tmp_path / "out", status=2)
    error = capsys.readouterr().err
    assert "the database cannot be read" in error and "hunter2" not in error


def test_the_same_visit_twice_counts_once(tmp_path):
    tables = formats.omop_tables()
    tables["visit_occurrence"].append(tables["visit_occurrence"][0] | {"visit_start_datetime": "2180-03-10 00:00:00"})
    tables["person"].append(tables["person"][0])
    for name, rows in tables.items():
        formats.write(tmp_path / "in", name, rows)
    out = run("omop", tmp_path / "in", "--time", "charted", "--ids", "source", out=tmp_path / "out")
    measured = [row for row in by_concept(out) if row[2] not in ("age", "sex")]
    assert measured == [row for row in formats.EXPECTED if row[2] not in ("age", "sex")]
    assert report(out)["visits_left_out"] == {"the same visit_id again": 1}


def test_nan_and_infinity_are_no_numbers(tmp_path):
    out = prepared_table(tmp_path, [f"1,a,2024-01-01 08:00,HR,{value}," for value in ("80", "nan", "inf", "-Infinity")])
    assert pd.read_parquet(out / "observations.parquet")["observation_value"].tolist() == [80.0]
    assert report(out)["left_out"] == {"no_number": 3}


def test_two_clients_may_use_the_same_visit_number(tmp_path):
    rows = [f"{visit},{client},2024-01-0{day} 08:00,HR,{value}," for visit, client, day, value in (
        *((1, "a", 1, 80), (1, "b", 2, 120), (1, "", 3, 70)),  # whose is the third?
        *((2, "c", 1, 60), (2, "", 2, 61), (3, "", 1, 50)),
    )]  # fmt: skip
    table = pd.read_parquet(prepared_table(tmp_path, rows) / "observations.parquet")
    found = list(zip(table["client"], table["visit_id"], table["observation_value"], strict=True))
    assert found == [("3", "3", 50), ("a", "1", 80), ("b", "1", 120), ("c", "2", 60), ("c", "2", 61)]
    assert report(tmp_path / "out")["left_out"] == {"no_visit": 1}


@pytest.mark.parametrize(
    ("table", "column"), [("person", "person_source_value"), ("visit_occurrence", "visit_source_value")]
)
def test_source_ids_that_two_patients_share_are_not_taken(table, column, tmp_path):
    tables = formats.omop_tables()
    for row in tables[table]:
        row[column] = "1"
    for name, rows in tables.items():
        formats.write(tmp_path / "in", name, rows)
    out = run("omop", tmp_path / "in", "--ids", "source", out=tmp_path / "out")
    ours = {number: own for own, number in formats.HASH.items()}
    found = [(ours.get(client, client), *row) for client, *row in by_concept(out)]
    assert sorted(found) == formats.EXPECTED


def test_a_date_alone_is_no_time(tmp_path, capsys):
    out = prepared_table(tmp_path, ["1,a,2024-01-01,HR,80,", "1,a,2024-01-01 08:00,HR,81,", "1,a,infinity,HR,82,"])
    assert pd.read_parquet(out / "observations.parquet")["observation_value"].tolist() == [81]
    assert report(out)["left_out"] == {"no_time": 2}
    tables = formats.omop_tables()
    for row in tables["measurement"]:
        row["measurement_datetime"] = row["measurement_date"]
    for name, rows in tables.items():
        formats.write(tmp_path / "in", name, rows)
    out = run("omop", tmp_path / "in", out=tmp_path / "none", status=2)
    # age and sex are no reason to go on
    assert "no observation in 12 rows (8 x no time of day, or none that can be read)" in capsys.readouterr().err
    assert not list(out.glob("*"))


def test_times_that_are_all_midnight_are_doubted(tmp_path):
    rows = [f"{i},a{i},2024-01-02 {'00:00' if i % 3 else '00:01'},Lactate,1," for i in range(30)]
    rows += [f"{i},a{i},2024-01-02 {'00:00' if i % 3 == 0 else '00:01'},HR,80," for i in range(30)]
    (notice,) = report(prepared_table(tmp_path, rows))["notices"]
    assert notice.startswith("Most times of 'Lactate' are midnight.")


def test_a_decimal_comma_is_named(tmp_path):
    rows = ['1,a,2024-01-01 08:00,Temp,"37,5",', "1,a,2024-01-01 09:00,Temp,38,", "1,a,2024-01-01 09:00,Temp,high,"]
    out = prepared_table(tmp_path, rows)
    assert report(out)["left_out"] == {"no_number": 2}
    assert report(out)["notices"][0].startswith("1 values have a comma, such as 37,5")


def test_times_of_several_zones_are_doubted(tmp_path):
    rows = [f"1,a,2024-07-01T0{i}:00:00{z},HR,80," for i, z in enumerate(("-05:00", "-04:00", "-05:00"))]
    assert report(prepared_table(tmp_path, rows))["notices"] == []
    rows.append("1,a,2024-07-01T08:00:00.5Z,HR,80,")
    (notice,) = report(prepared_table(tmp_path, rows))["notices"]
    assert "offsets '-04:00', '-05:00', 'Z'" in notice
    resources = formats.fhir_resources()
    stay = next(resource for resource in resources if resource["resourceType"] == "Encounter")
    stay["meta"] = {"lastUpdated": "2180-03-09T10:00:00Z"}
    (tmp_path / "in").mkdir()
    for wrong in (False, True):
        if wrong:
            stay["period"]["start"] = "2180-03-09T11:00:00Z"
        (tmp_path / "in" / "all.ndjson").write_text("\n".join(map(json.dumps, resources)))
        notices = report(run("fhir", tmp_path / "in", out=tmp_path / "fhir"))["notices"]
        assert [("'Z'" in notice) for notice in notices] == [True] * wrong


def test_the_first_quotation_mark_may_come_late(tmp_path):
    """DuckDB decides from the first 20,000 rows how a file is quoted."""
    rows = [f"{i},a{i},2024-01-01 08:00,HR,80," for i in range(25_000)]
    late = ['1,a1,2024-01-01 09:00,"Temp, oral ""C""",37,', '1,a1,2024-01-01 09:00,"Temp\noral",38,']
    out = prepared_table(tmp_path, [*rows, *late])
    assert report(out)["observations"] == 25_002 and report(out)["rejected_lines"] == {}
    unclosed = ['1,a1,2024-01-01 09:00,"HR,80,', *rows[:7]]  # takes the seven along
    out = prepared_table(tmp_path, [*rows, *late, *unclosed])
    assert report(out)["observations"] == 25_002 and report(out)["rejected_lines"] == {"table.csv": 8}
    apostrophes = [row.replace("HR", "'HR, by hand'") for row in rows[:9]]
    assert report(prepared_table(tmp_path, apostrophes))["observations"] == 9


def test_lines_that_are_not_utf8_are_told(tmp_path, capsys):
    table_of(tmp_path, ["1,a,2024-01-01 08:00,HR,80,bpm"])
    with open(tmp_path / "table.csv", "ab") as file:
        file.write("1,a,2024-01-01 09:00,Temp,37.5,°C\n".encode("latin-1"))
    (tmp_path / "map.toml").write_text(MAP)
    run("table", tmp_path / "table.csv", "--map", tmp_path / "map.toml", out=tmp_path / "out")
    assert "table.csv: 1 lines are no rows of it and left out; is the file UTF-8?" in capsys.readouterr().err


def test_times_without_a_date_are_counted(tmp_path):
    out = prepared_table(tmp_path, ["1,a,08:00,HR,80,", "1,a,2024-01-01 08:00,HR,80,", "1,a,,HR,80,"])
    assert report(out)["left_out"] == {"no_time": 2}


def test_a_broken_line_of_ndjson_is_counted(tmp_path):
    folder = formats.fhir(tmp_path / "in")
    with gzip.open(folder / "Observation.ndjson.gz", "at") as file:
        file.write('{"resourceType": "Observation", "status": \n[1, 2]\n')
        file.write('{"resourceType": "Observation", "status": "final", "code": "x", "subject": 7}\n')
        file.write('{"resourceType": "Patient", "id": "\\ud800", "gender": "male"}\n')
        file.write('{"resourceType": "Patient", "id": "x", "identifier": [{"value": "1", "type": {"coding": [1]}}]}\n')
        file.write(json.dumps(formats.observation(0, formats.ROWS[0]) | {"specimen": "blood", "id": "y"}) + "\n")
    out = run("fhir", folder, "--time", "charted", out=tmp_path / "out")
    assert by_concept(out) == formats.EXPECTED
    assert report(out)["rejected_lines"] == {"Observation.ndjson.gz": 3}
    assert report(out)["left_out"]["bad_resource"] == 3


def test_half_a_gzip_of_ndjson_is_one_line(tmp_path, capsys):
    folder = formats.fhir(tmp_path / "in")
    path = folder / "Observation.ndjson.gz"
    path.write_bytes(path.read_bytes()[:-20])
    run("fhir", folder, out=tmp_path / "out", status=2)
    assert "Observation.ndjson.gz: it is no whole gzip file" in capsys.readouterr().err


def test_lines_that_are_no_rows_are_counted(tmp_path):
    out = prepared_table(tmp_path, ["1,a,2024-01-01 08:00,HR,80,bpm"] * 40 + ["1,a,2024,HR,80,bpm,7,8"])
    assert report(out)["observations"] == 40 and report(out)["rejected_lines"] == {"table.csv": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[columns\n", "cannot be read: "),
        ('[columns]\nvisit_id = "csn"\n', "does not say which column is 'observation_date'"),
        (MAP.replace('"value"', '"absent"'), "missing column 'absent' among 6"),
        (MAP.replace("unit =", "units ="), "[columns] names 'units'"),
        (MAP + '[concepts]\nHR = "pulse"\n', "unknown concept 'pulse'"),
        (MAP + "[tiem]\n", "unknown 'tiem'"),
        (MAP + '[time]\nformat = "%d.%m.%Y"\n', "the [time] format '%d.%m.%Y' has no hour"),
    ],
)
def test_a_map_that_is_wrong_is_one_line(text, message, tmp_path, capsys):
    prepared_table(tmp_path, ["1,a,2024-01-01 08:00,HR,80,bpm"], text, status=2)
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_a_query_that_is_wrong_is_one_line(tmp_path, capsys):
    path = table_of(tmp_path, ["1,a,2024-01-01 08:00,HR,80,bpm"])
    for query, message in (
        ("SELECT nothing FROM table", "q.sql: "),
        ("SELECT csn AS visit_id FROM files.table", "gives no column 'observation_date'"),
    ):
        (tmp_path / "q.sql").write_text(query)
        run("table", path, "--sql", tmp_path / "q.sql", out=tmp_path / "out", status=2)
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_long_query(number, status, tmp_path):
    (tmp_path / "q.sql").write_text("SELECT count(*) AS visit_id FROM range(1000000000000) a, range(1000) b")
    path = table_of(tmp_path, ["1,a,2024-01-01 08:00,HR,80,bpm"])
    command = [sys.executable, ROOT / "prepare_data.py", "table", path, "--sql", tmp_path / "q.sql"]
    process = subprocess.Popen([*map(str, command), "--out", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(1200):
            if list(tmp_path.glob("out/.prepare*/tables.duckdb")):
                break
            time.sleep(0.05)
        time.sleep(1)  # from the database to the query
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == status and error.startswith("interrupted") and "Traceback" not in error
    assert not list((tmp_path / "out").glob(".*"))


# ------------------------------------------------------------------------------------------------ one code path


def test_the_service_and_the_import_read_an_observation_alike(pipeline):
    from serving.api import fhir

    resources = [formats.observation(number, row) for number, row in enumerate(formats.ROWS)]
    found = fhir.observations_of({"resourceType": "Bundle", "entry": [{"resource": r} for r in resources]}, pipeline)
    parts = [part for r in resources for part in readings(r) if isinstance(part, Reading)]
    assert [row.visit for row in found.rows] == [(part.patient, part.encounter) for part in parts]
    assert [row.moment for row in found.rows] == [part.time for part in parts]


# ------------------------------------------------------------------------------------------ the MIMIC-IV demo


def prepared_demo(source: str, folder: str, out: Path, *options: str) -> pd.DataFrame:
    if not DEMO.is_dir():
        pytest.skip("the MIMIC-IV demo is not on this machine (SEPSIS_SHARED_DATA names the folder of shared data)")
    run(source, DEMO / folder, "--time", "charted", *options, out=out)
    table = pd.read_parquet(out / "observations.parquet")
    return table.assign(visit_id=table["visit_id"].str.rpartition("|")[2])


KEY = ["client", "observation_type_code", "observation_date", "observation_value"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "folder", "options", "same"),
    [
        ("omop", "omop", ("--ids", "source", "--codes", "source"), 229_692),
        ("meds", "meds", (), 347_785),
        ("fhir", "fhir", (), 262_966),
    ],
)
def test_the_demo_is_the_same_in_other_formats(source, folder, options, same, tmp_path):
    raw = prepared_demo("mimic-iv", "raw", tmp_path / "raw")
    other = prepared_demo(source, folder, tmp_path / "other", *options)
    for table in (raw, other):
        assert table[["client", "visit_id"]].drop_duplicates().shape[0] == 275
    counts = [table.groupby(KEY).size() for table in (raw, other)]
    assert int(pd.concat(counts, axis=1, join="inner").min(axis=1).sum()) == same


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    """Half a million rows within a DuckDB of 200 MB, in a process of its own."""
    folder = formats.omop(tmp_path / "in")
    frame = pd.read_csv(folder / "measurement.csv.gz", dtype=str)
    (folder / "measurement.csv.gz").unlink()
    pd.concat([frame] * 80_000).to_parquet(folder / "measurement.parquet", index=False)
    code = (
        "import re, sys, prepare_data; status = prepare_data.main(sys.argv[1:]); "
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024); sys.exit(status)"
    )
    command = ["omop", str(folder), "--out", str(tmp_path / "out"), "--memory", "200MB", "--labels", "none"]
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 900, done.stdout
    assert report(tmp_path / "out")["rows"] > 600_000
