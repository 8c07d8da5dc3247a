"""Converts what interfaces send to the model's own terms: its code, and the unit of the concept of the code.

A table of observations has no units: its codes always mean one. FHIR and HL7 name a unit with every value, so that a
value in another one can be converted, and a value in an unknown one must not be taken as a number.
"""

from __future__ import annotations

from typing import Any

from feature_pipeline import Concept, ProductionPipeline, concept_of

# (concept, unit as sent, lower case) -> factor. Units are UCUM codes and their common spellings. Molar masses: glucose
# 180.16, creatinine 113.12, bilirubin 584.66, urea nitrogen 28.01 (two atoms a molecule of urea), lactate 89.07
# (lactate ion), calcium 40.08, magnesium 24.31, phosphorus 30.97, haemoglobin monomer 16,114 g/mol.
_FACTORS: dict[str, dict[str, float]] = {
    "glucose": {"mmol/l": 18.016},
    "creatinine": {"umol/l": 0.011312},
    "bilirubin_total": {"umol/l": 0.058466},
    "bilirubin_direct": {"umol/l": 0.058466},
    "bun": {"mmol/l": 2.801},
    "lactate": {"mg/dl": 1 / 8.907},
    "calcium": {"mmol/l": 4.008},
    "magnesium": {"mmol/l": 2.431, "meq/l": 2.431 / 2},
    "phosphate": {"mmol/l": 3.097},
    "hemoglobin": {"g/l": 0.1, "mmol/l": 1.6114},
    "hematocrit": {"l/l": 100.0, "1": 100.0},
    "crp": {"mg/dl": 10.0},
    "fibrinogen": {"g/l": 100.0, "umol/l": 34.0},
    "troponin_i": {"ng/l": 0.001, "pg/ml": 0.001, "ug/l": 1.0},
    "fio2": {"%": 0.01},
    "spo2": {"1": 100.0},
    "sao2": {"1": 100.0},
    "pao2": {"kpa": 7.50062},
    "paco2": {"kpa": 7.50062},
    "etco2": {"kpa": 7.50062},
    "mean_bp": {"kpa": 7.50062},
    "systolic_bp": {"kpa": 7.50062},
    "diastolic_bp": {"kpa": 7.50062},
    "bicarbonate": {"meq/l": 1.0},
    "base_excess": {"meq/l": 1.0},
    "chloride": {"meq/l": 1.0},
    "potassium": {"meq/l": 1.0},
    "sodium": {"meq/l": 1.0},
    "age": {"mo": 1 / 12, "wk": 7 / 365.25, "d": 1 / 365.25},
}
# spellings of the unit that a concept is kept in
_SAME: dict[str, tuple[str, ...]] = {
    "1/min": ("/min", "{beats}/min", "beats/min", "beats/minute", "bpm", "{breaths}/min", "breaths/min", "min-1"),
    "°C": ("cel", "c", "degc", "deg c", "degrees c"),
    "mmHg": ("mm[hg]", "mm hg"),
    "fraction": ("1", "{fraction}"),
    "1": ("[ph]", "{ph}", "ph"),
    "U/L": ("[iu]/l", "iu/l"),
    "10^3/uL": ("10*3/ul", "10*9/l", "10^9/l", "10e3/ul", "10e9/l", "k/ul", "thou/ul", "x10^3/ul", "x10e3/ul"),
    "points": ("{score}", "score", "1"),
    "years": ("a", "y", "yr", "year"),
    "s": ("sec", "seconds"),
    "ng/mL": ("ug/l",),
}


def to_kept_unit(concept: Concept, value: float, unit: str | None) -> float | None:
    """`value` in the concept's unit; None where it cannot be told how to convert `unit`.

    Without a unit the value is taken as it is, as in a table.

    >>> from feature_pipeline import CONCEPT
    >>> to_kept_unit(CONCEPT["hemoglobin"], 120.0, "g/L")
    12.0
    >>> to_kept_unit(CONCEPT["temperature"], 100.4, "[degF]")
    38.0
    >>> to_kept_unit(CONCEPT["heart_rate"], 60.0, "mmol/L") is None
    True
    """
    if not unit or not unit.strip():
        return value
    name = unit.strip().lower().replace("µ", "u").replace("μ", "u").replace("mcmol", "umol")
    if concept.unit in ("code", "0/1") or name == concept.unit.lower() or name in _SAME.get(concept.unit, ()):
        return value
    if concept.name == "temperature" and name in ("[degf]", "f", "degf", "deg f", "°f", "fahrenheit"):
        return round((value - 32) * 5 / 9, 4)
    factor = _FACTORS.get(concept.name, {}).get(name)
    return None if factor is None else float(f"{value * factor:.10g}")


def own_terms(
    pipeline: ProductionPipeline,
    code: str,
    value: float,
    unit: str | None,
    low: float | None,
    high: float | None,
) -> dict[str, Any] | str:
    """An observation's code, value and range in the model's own terms, or why there is none, as a text."""
    concept = concept_of(code, pipeline.config.synonyms)
    if concept is not None:
        converted = to_kept_unit(concept, value, unit)
        if converted is None:
            return f"its unit is not one that {concept.name.replace('_', ' ')} can be converted from"
        value = converted
        low, high = (None if bound is None else to_kept_unit(concept, bound, unit) for bound in (low, high))
    return {
        "observation_type_code": pipeline.own_code(code),
        "observation_value": value,
        "reference_range_min": low,
        "reference_range_max": high,
    }
