"""Whatever code and unit a quantity comes in, it means the same to the model, or it is named."""

import numpy as np
import pytest

import feature_pipeline as fp
from feature_pipeline import CONCEPTS, BadConfig, ProductionPipeline, read_observations, to_unit

pytestmark = pytest.mark.filterwarnings("ignore::feature_pipeline.SetAsideWarning")  # the cohort has dirt on purpose
START = "2024-03-01 08:00"
BY_NUMBER = [(c, unit, code) for c in CONCEPTS for unit, codes in c.coded_in.items() for code in codes.split(", ")]
CODED = [(c, code) for c in CONCEPTS for code in c.codes.split(", ")]
OTHER_UNITS = [
    (c, name, unit)
    for c in CONCEPTS
    for unit in c.units
    for name in unit.spellings.split(", ")
]  # fmt: skip
OWN_UNITS = [(c, name) for c in CONCEPTS for name in fp._SPELLINGS.get(c.unit, c.unit).split(", ")]


def record(code, value, unit=None, **changes):
    return {
        "visit_id": "1",
        "client": "a",
        "observation_date": START,
        "observation_type_code": code,
        "observation_value": value,
        "unit": unit,
    } | changes


def typical(concept) -> float:
    """A value in the concept's own unit that it allows."""
    low, high = (concept.low, concept.high) if np.isfinite(concept.high) else (0.0, 1.0)
    return round(low + (high - low) * 0.21, 3)


@pytest.mark.parametrize(("concept", "code"), CODED, ids=lambda p: getattr(p, "name", p))
def test_every_code_of_a_concept_has_its_limits(concept, code):
    observations = read_observations([record(code, typical(concept))])
    assert observations.concepts == (concept,) and observations.value.tolist() == [typical(concept)]


@pytest.mark.parametrize(("concept", "name"), OWN_UNITS, ids=lambda p: getattr(p, "name", p))
def test_every_spelling_of_the_own_unit_changes_nothing(concept, name):
    for spelling in (name, name.upper(), f" {name} "):
        assert to_unit(concept, typical(concept), spelling) == typical(concept)


@pytest.mark.parametrize(
    ("concept", "name", "unit"), OTHER_UNITS, ids=lambda p: getattr(p, "name", p if isinstance(p, str) else "")
)
def test_every_other_unit_is_converted_in_tables_and_with_its_range(concept, name, unit):
    own = typical(concept)
    sent = (own - unit.offset) / unit.factor
    row = record(
        concept.codes.split(", ")[0],
        sent,
        name,
        reference_range_min=sent - 0.01 * abs(sent),
        reference_range_max=sent + 0.01 * abs(sent),
    )
    observations = read_observations([row])
    assert observations.value == pytest.approx(own, abs=1e-4 if unit.decimals == 4 else 1e-8)
    assert (observations.low < observations.value).all() and (observations.value < observations.high).all()
    assert observations.value[0] == to_unit(concept, sent, name)


@pytest.mark.parametrize(("concept", "unit", "code"), BY_NUMBER, ids=lambda p: getattr(p, "name", p))
def test_a_code_of_another_unit_brings_it_unless_one_is_named(concept, unit, code):
    own = typical(concept)
    sent = own / concept.unit_named(unit).factor
    assert read_observations([record(code, sent)]).value == pytest.approx(own)
    assert read_observations([record(code, sent, unit)]).value == pytest.approx(own)
    assert read_observations([record(code, own, concept.unit)]).value.tolist() == [own]


def test_a_unit_that_cannot_be_converted_sets_the_row_aside():
    rows = [record("HR", 80, "mmol/L"), record("HR", 80, "bpm"), record("HR", 81)]
    observations = read_observations(rows)
    assert observations.value.tolist() == [80, 81]
    assert observations.set_aside == {"unknown_unit": 1} and observations.set_aside_rows == {"unknown_unit": [0]}


def test_codes_without_a_concept_keep_their_values_whatever_the_unit():
    assert read_observations([record("HEIGHT", 180, "cm")]).value.tolist() == [180]


def test_a_named_unit_is_not_second_guessed():
    """100.4 is Fahrenheit where no unit is named; said to be Celsius it is impossible."""
    assert read_observations([record("Temp", 100.4)]).value.tolist() == [38.0]
    assert read_observations([record("Temp", 100.4, "Cel")]).set_aside == {"implausible": 1}


@pytest.mark.parametrize("code", fp.BLOOD_PRESSURE_CODES)
def test_a_blood_pressure_is_split_in_two(code):
    rows = [record(code, "120/80"), record("HR", 70), record(code, " 131 / 79.5 ", observation_date="2024-03-01 09:00")]
    observations = read_observations(rows)
    assert observations.codes == tuple(sorted({"8462-4", "8480-6", code, "HR"}))
    by_code = {
        observations.codes[c]: observations.value[
            observations.group_start[g] : observations.group_start[g + 1]
        ].tolist()
        for g, c in enumerate(observations.group_code.tolist())
    }
    assert by_code == {"8480-6": [120, 131], "8462-4": [80, 79.5], "HR": [70]}
    assert observations.visit_of_row.tolist() == [0, 0, 0] and observations.set_aside == {}


def test_what_is_no_pair_is_no_number():
    rows = [record("BP", text) for text in ("120/", "a/b", "120/80/60", "-120/80")]
    assert read_observations([*rows, record("HR", 120), record("HR", "120/80")]).set_aside == {"bad_value": 5}


def test_ranges_of_single_pressures_stay(tmp_path):
    rows = [record("BP", "120/80"), record("8462-4", 70, reference_range_min=60, reference_range_max=90)]
    observations = read_observations(rows)
    assert np.nanmax(observations.low) == 60 and np.isnan(observations.low).sum() == 2


# ------------------------------------------------------------------------------------------ in a model's terms


@pytest.fixture
def frame(cohort):
    """A few visits."""
    return cohort[0][cohort[0]["visit_id"].isin(cohort[0]["visit_id"].unique()[:12])]


def in_code(frame, code, new, factor=1.0):
    out = frame.copy()
    hit = out["observation_type_code"] == code
    out.loc[hit, "observation_type_code"] = new
    out.loc[hit, "observation_value"] = out.loc[hit, "observation_value"] / factor
    for bound in ("reference_range_min", "reference_range_max"):
        out.loc[hit, bound] = out.loc[hit, bound] / factor
    return out


@pytest.mark.parametrize("concept", [c for c in CONCEPTS if not c.static], ids=lambda c: c.name)
def test_every_code_of_a_concept_gives_the_scores_of_the_models_own(pipeline, frame, concept):
    """To the last bit where the unit is the same; within the rounding of the unit's factor where it is not."""
    foreign = concept.codes.split(", ")[-1]
    own = pipeline.reproducer.codes.own_code(foreign)
    if own == foreign:
        pytest.skip("the demo cohort does not measure it")
    expected = pipeline.predict(frame)["sepsis_probability"].to_numpy()
    for code in concept.codes.split(", "):
        given = pipeline.predict(in_code(frame, own, code))["sepsis_probability"].to_numpy()
        assert np.array_equal(given, expected), code
    for unit, codes in concept.coded_in.items():
        for code in codes.split(", "):
            sent = in_code(frame, own, code, concept.unit_named(unit).factor)
            assert np.allclose(pipeline.predict(sent)["sepsis_probability"], expected, rtol=1e-6, atol=1e-9), code


def test_codes_that_training_saw_are_read_as_they_were_then(pipeline):
    for code in pipeline.config.observed_codes:
        assert pipeline.reproducer.codes.own_code(code) == code


def test_unused_codes_are_named_with_their_counts(pipeline):
    rows = [record("HEIGHT", v) for v in (180, 181, 182)] + [record("FUNNY", 1), record("8867-4", 80)]
    observations = pipeline.reproducer.read(rows)
    assert pipeline.unused_codes(observations) == {"HEIGHT": 3, "FUNNY": 1}
    assert "HR" in observations.codes


# ------------------------------------------------------------------------------------------------- a site's map


@pytest.fixture
def site(config_path, model_path):
    return lambda codes: ProductionPipeline(config_path, model_path, codes)


def test_a_sites_map_takes_effect_without_a_search(pipeline, site, frame):
    expected = pipeline.predict(frame)["sepsis_probability"].to_numpy()
    renamed = in_code(in_code(frame, "HR", "PULS"), "Creatinine", "KREA", 0.011312)
    mapped = site({"PULS": ("heart_rate", ""), "KREA": ("creatinine", "umol/L")})
    assert np.allclose(mapped.predict(renamed)["sepsis_probability"], expected, rtol=1e-6)
    only_puls = site({"PULS": ("heart_rate", "")}).predict(in_code(frame, "HR", "PULS"))
    assert np.array_equal(only_puls["sepsis_probability"], expected)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({"PULS": ("pulse", "")}, "unknown concept 'pulse'"),
        ({"PULS": ("heart_rate", "kg")}, "cannot be converted from 'kg'"),
        ({"HR": ("respiratory_rate", "")}, "trained with it as heart_rate in 1/min"),
        ({"8480-6": ("diastolic_bp", ""), "8462-4": ("systolic_bp", "")}, "LOINC says that it is systolic_bp"),
        ({"Creatinine": ("creatinine", "umol/L")}, "trained with it as creatinine in mg/dL"),
    ],
)
def test_a_map_that_contradicts_the_training_is_refused(site, codes, message):
    with pytest.raises(BadConfig, match=message):
        site(codes)


def test_maps_can_be_told_apart(site, pipeline):
    one, two = site({"PULS": ("heart_rate", "")}), site({"PULS": ("respiratory_rate", "")})
    assert len({pipeline.reproducer.codes.sha256, one.reproducer.codes.sha256, two.reproducer.codes.sha256}) == 3
    assert site({"HR": ("heart_rate", "")}).reproducer.codes.sha256  # says what was true all along
