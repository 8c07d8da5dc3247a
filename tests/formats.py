"""One small hospital, written as MIMIC-IV, OMOP, MEDS and FHIR would have it. The patients are made up.

Patient 101 comes through the emergency department and spends a day in intensive care; 102 has a plain stay.
"""

import gzip
import json
from pathlib import Path

import pandas as pd

HASH = {
    "101": "-4406053801395356975",
    "102": "9123372036854775807",
    "20": "3736965967695233281",
    "21": "-77",
    "22": "5",
}

# visit, client, registered in the emergency department, admitted, discharged
VISITS = [
    ("20", "101", "2180-03-09 01:30:00", "2180-03-09 06:00:00", "2180-03-13 12:00:00"),
    ("21", "102", None, "2151-11-02 23:00:00", "2151-11-05 10:00:00"),
]
ICU = ("30", "20", "101", "2180-03-09 09:00:00", "2180-03-10 15:00:00")
CODES = {  # the hospital's code: LOINC, name, unit of MIMIC-IV, OMOP's id of the unit, UCUM
    "220045": ("8867-4", "Heart Rate", "bpm", "8483", "/min"),
    "223761": ("8310-5", "Temperature Fahrenheit", "°F", "9289", "[degF]"),
    "50912": ("2160-0", "Creatinine", "mg/dL", "8840", "mg/dL"),
    "50813": ("2524-7", "Lactate", "mmol/L", "8753", "mmol/L"),
    "220048": ("8884-9", "Heart Rhythm", "", "", ""),
}
# client, visit that the source names, taken, seen, code, value as text, number, range
ROWS = [
    ("101", "20", "2180-03-09 02:00:00", "2180-03-09 03:10:00", "50912", "1.4", 1.4, (0.5, 1.3)),
    ("101", None, "2180-03-09 02:00:00", "2180-03-09 03:10:00", "50813", "<0.5", 0.5, (0.5, 2.0)),
    # the clocks of New York go forward on the 10th at 2: the wall clock stays
    ("101", "20", "2180-03-09 09:30:00", "2180-03-09 09:31:00", "220045", "101", 101.0, None),
    ("101", "20", "2180-03-10 14:30:00", "2180-03-10 14:30:00", "220045", "97.5", 97.5, None),
    ("101", "20", "2180-03-10 14:30:00", "2180-03-10 14:30:00", "220048", "SR", None, None),
    ("101", "20", "2180-03-12 08:00:00", "2180-03-12 08:00:00", "223761", "100.4", 100.4, None),
    ("102", "21", "2151-11-03 00:10:00", "2151-11-03 02:00:00", "50912", "0.9", 0.9, (0.5, 1.3)),
    ("102", None, "2160-01-01 10:00:00", "2160-01-01 11:00:00", "50912", "1.0", 1.0, (0.5, 1.3)),  # in no stay
]
# what all formats must give with --time charted: client, admission, time, concept, value in its unit
EXPECTED = sorted(
    [
        ("101", "2180-03-09 01:30:00", "age", 70.0),
        ("101", "2180-03-09 01:30:00", "sex", 1.0),
        ("101", "2180-03-09 02:00:00", "creatinine", 1.4),
        ("101", "2180-03-09 02:00:00", "lactate", 0.5),
        ("101", "2180-03-09 09:30:00", "heart_rate", 101.0),
        ("101", "2180-03-10 14:30:00", "heart_rate", 97.5),
        ("101", "2180-03-12 08:00:00", "temperature", 38.0),
        ("102", "2151-11-02 23:00:00", "age", 41.0),
        ("102", "2151-11-02 23:00:00", "sex", 0.0),
        ("102", "2151-11-03 00:10:00", "creatinine", 0.9),
    ]
)


def write(folder: Path, name: str, rows: list[dict], upper: bool = False, form: str = "csv.gz") -> Path:
    frame = pd.DataFrame(rows)
    if upper:
        frame.columns = [column.upper() for column in frame.columns]
        name = name.upper()
    path = folder / f"{name}.{form}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "parquet":
        frame.to_parquet(path, index=False)
    else:
        frame.to_csv(path, index=False)
    return path


def mimic_iv(folder: Path) -> Path:
    hosp, icu = folder / "hosp", folder / "icu"
    write(
        *(hosp, "admissions"),
        [
            {
                "subject_id": client,
                "hadm_id": visit,
                "admittime": admitted,
                "dischtime": discharged,
                "edregtime": registered,
                "hospital_expire_flag": 0,
            }
            for visit, client, registered, admitted, discharged in VISITS
        ],
    )
    write(
        *(hosp, "patients"),
        [
            {"subject_id": "101", "gender": "M", "anchor_age": 65, "anchor_year": 2175},
            {"subject_id": "102", "gender": "F", "anchor_age": 40, "anchor_year": 2150},
        ],
    )
    events = [
        {
            "subject_id": client,
            "hadm_id": visit,
            "itemid": code,
            "charttime": taken,
            "storetime": seen,
            "value": value,
            "valuenum": number,
            "valueuom": CODES[code][2],
            "ref_range_lower": bounds and bounds[0],
            "ref_range_upper": bounds and bounds[1],
        }
        for client, visit, taken, seen, code, value, number, bounds in ROWS
    ]
    write(hosp, "labevents", [event for event in events if event["itemid"].startswith("5")])
    write(icu, "chartevents", [event for event in events if event["itemid"].startswith("2")])
    stay, visit, client, start, end = ICU
    write(icu, "icustays", [{"subject_id": client, "hadm_id": visit, "stay_id": stay, "intime": start, "outtime": end}])
    named = {code: meaning[1] for code, meaning in CODES.items()}
    write(icu, "d_items", [{"itemid": code, "label": name} for code, name in named.items() if code[0] == "2"])
    labs = [{"itemid": c, "label": name, "fluid": "Blood"} for c, name in named.items() if c[0] == "5"]
    write(hosp, "d_labitems", labs)
    return folder


def omop_tables() -> dict[str, list[dict]]:
    """The tables of the CDM. Visits have hashes for ids, one is an outpatient visit of the day in no stay."""
    kinds = {"20": "262", "21": "9201"}
    return {
        "person": [
            {
                "person_id": HASH[client],
                "year_of_birth": year,
                "gender_concept_id": sex,
                "person_source_value": client,
            }
            for client, year, sex in (("101", 2110, 8507), ("102", 2110, 8532))
        ],
        "visit_occurrence": [
            {
                "visit_occurrence_id": HASH[visit],
                "person_id": HASH[client],
                "visit_concept_id": kinds[visit],
                "visit_start_date": (registered or admitted)[:10],
                "visit_start_datetime": registered or admitted,
                "visit_end_date": discharged[:10],
                "visit_end_datetime": discharged,
                "visit_source_value": visit,
            }
            for visit, client, registered, admitted, discharged in VISITS
        ]
        + [
            {
                "visit_occurrence_id": HASH["22"],
                "person_id": HASH["102"],
                "visit_concept_id": "9202",
                "visit_start_date": "2160-01-01",
                "visit_start_datetime": "2160-01-01 10:00:00",
                "visit_end_date": "2160-01-01",
                "visit_end_datetime": "2160-01-01 10:00:00",
                "visit_source_value": "22",
            }
        ],
        "measurement": [
            {
                "measurement_id": number,
                "person_id": HASH[client],
                "measurement_concept_id": str(1000 + list(CODES).index(code)),
                "measurement_date": taken[:10],
                "measurement_datetime": taken,
                "value_as_number": value,
                "value_source_value": text,
                "unit_concept_id": CODES[code][3] or None,
                "unit_source_value": CODES[code][2] or None,
                "range_low": bounds and bounds[0],
                "range_high": bounds and bounds[1],
                "visit_occurrence_id": HASH[visit or "22"] if client == "102" else visit and HASH[visit],
                "measurement_source_value": code,
            }
            for number, (client, visit, taken, _, code, text, value, bounds) in enumerate(ROWS)
        ],
        "concept": [
            {
                "concept_id": str(1000 + place),
                "concept_name": meaning[1],
                "vocabulary_id": "LOINC",
                "concept_code": meaning[0],
            }
            for place, meaning in enumerate(CODES.values())
        ],
        "care_site": [{"care_site_id": "1", "care_site_name": "Medical Intensive Care Unit (MICU)"}],
        "visit_detail": [
            {
                "visit_detail_id": ICU[0],
                "visit_occurrence_id": HASH[ICU[1]],
                "visit_detail_start_datetime": ICU[3],
                "visit_detail_end_datetime": ICU[4],
                "care_site_id": "1",
            }
        ],
    }


def omop(folder: Path, upper: bool = False, form: str = "csv.gz") -> Path:
    for name, rows in omop_tables().items():
        write(folder, name, rows, upper, form)
    return folder


def meds(folder: Path) -> Path:
    events = [
        ("101", None, "GENDER//M", None),
        ("102", None, "GENDER//F", None),
        ("101", "2110-01-01 00:00:00", "MEDS_BIRTH", None),
        ("102", "2110-01-01 00:00:00", "MEDS_BIRTH", None),
        ("101", ICU[3], "ICU_ADMISSION//MICU", None),
        ("101", ICU[4], "ICU_DISCHARGE//MICU", None),
    ]
    for _, client, registered, admitted, discharged in VISITS:
        events += [(client, registered, "ED_REGISTRATION", None)] if registered else []
        events += [
            (client, admitted, "HOSPITAL_ADMISSION//EW", None),
            (client, discharged, "HOSPITAL_DISCHARGE//", None),
        ]
    for client, _, taken, _, code, _, number, _ in ROWS:
        name = f"LAB//{code}//{CODES[code][2] or 'UNK'}" if code != "50813" else f"LOINC//{CODES[code][0]}"
        events.append((client, taken, name, number))
    frame = pd.DataFrame(events, columns=["subject_id", "time", "code", "numeric_value"])
    frame = frame.astype({"subject_id": "int64", "numeric_value": "float32"})
    frame["time"] = pd.to_datetime(frame["time"]).astype("datetime64[us]")
    (folder / "data" / "train").mkdir(parents=True)
    (folder / "metadata").mkdir()
    frame.to_parquet(folder / "data" / "train" / "0.parquet", index=False)
    codes = [(f"LAB//{code}//{meaning[2] or 'UNK'}", meaning[1]) for code, meaning in CODES.items()]
    pd.DataFrame(codes, columns=["code", "description"]).to_parquet(folder / "metadata" / "codes.parquet", index=False)
    return folder


def zoned(text: str) -> str:
    """With New York's offset: daylight saving from the second Sunday of March, as in 2180."""
    summer = text[:10] >= "2180-03-12" and text.startswith("2180")
    return text.replace(" ", "T") + ("-04:00" if summer else "-05:00")


def fhir_resources() -> list[dict]:
    resources: list[dict] = [
        {
            "resourceType": "Patient",
            "id": f"p-{client}",
            "gender": sex,
            "birthDate": "2110-01-01",
            "identifier": [{"value": client, "system": "urn:hospital"}],
        }
        for client, sex in (("101", "male"), ("102", "female"))
    ]
    for visit, client, registered, admitted, discharged in VISITS:
        subject = {"reference": f"Patient/p-{client}"}
        own = [{"value": visit, "system": "urn:hospital:stay"}]
        kind = {"code": "IMP" if visit == "21" else "EMER"}
        resources.append(
            {
                "resourceType": "Encounter",
                "id": f"e-{visit}",
                "status": "finished",
                "class": kind,
                "subject": subject,
                "identifier": own,
                "period": {"start": zoned(admitted), "end": zoned(discharged)},
            }
        )
        if registered:
            resources.append(
                {
                    "resourceType": "Encounter",
                    "id": f"e-{visit}-ed",
                    "status": "finished",
                    "class": {"code": "EMER"},
                    "subject": subject,
                    "partOf": {"reference": f"Encounter/e-{visit}"},
                    "period": {"start": zoned(registered), "end": zoned(admitted)},
                }
            )
    stay, visit, client, start, end = ICU
    resources.append(
        {
            "resourceType": "Encounter",
            "id": f"i-{stay}",
            "status": "finished",
            "class": {"code": "ACUTE"},
            "subject": {"reference": f"Patient/p-{client}"},
            "partOf": {"reference": f"Encounter/e-{visit}"},
            "identifier": [{"value": stay, "system": "urn:hospital:icu"}],
            "type": [{"text": "Intensive care"}],
            "period": {"start": zoned(start), "end": zoned(end)},
        }
    )
    resources += [observation(number, row) for number, row in enumerate(ROWS)]
    return resources


def observation(number: int, row: tuple) -> dict:
    client, visit, taken, seen, code, text, value, bounds = row
    loinc, name, _, _, ucum = CODES[code]
    codings = [
        {"system": "urn:hospital:items", "code": code, "display": name},
        {"system": "http://loinc.org", "code": loinc, "display": name},
    ]
    inside = {"reference": f"Encounter/{'i-30' if code == '220045' else f'e-{visit}'}"}
    resource = {
        "resourceType": "Observation",
        "id": f"o-{number}",
        "status": "final",
        "code": {"coding": codings},
        "subject": {"reference": f"Patient/p-{client}"},
        "effectiveDateTime": zoned(taken),
        "issued": zoned(seen),
    }
    if visit:
        resource["encounter"] = inside
    if value is None:
        return resource | {"valueString": text}
    unit = {"unit": ucum, "code": ucum, "system": "http://unitsofmeasure.org"}
    resource["valueQuantity"] = {"value": value, **unit}
    if bounds:
        resource["referenceRange"] = [{"low": {"value": bounds[0], **unit}, "high": {"value": bounds[1], **unit}}]
    return resource


def fhir(folder: Path, bundle: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    resources = fhir_resources()
    if bundle:
        entries = [{"fullUrl": f"urn:uuid:{r['id']}", "resource": r} for r in resources]
        (folder / "all.json").write_text(json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entries}))
        return folder
    for kind in ("Observation", "Patient", "Encounter"):  # references to another file, of an order that does not help
        lines = [json.dumps(r) for r in resources if r["resourceType"] == kind]
        with gzip.open(folder / f"{kind}.ndjson.gz", "wt") as file:
            file.write("\n".join(lines) + "\n")
    return folder
