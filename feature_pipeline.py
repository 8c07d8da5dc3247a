"""Hospital observations to features to probability of sepsis: the one module that every script imports.

A deployment is this file and the files of ``models/``. It reads from top to bottom: errors, clinical concepts,
the validating reader, snapshots and segments, the feature blocks, ``FeatureReproducer``, ``ProductionPipeline``.

It knows no web framework, database, broker, command line, clock or environment: the same observations give the
same numbers in training, batch, API, database and stream.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import date
from functools import lru_cache, reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd

SCHEMA_VERSION = 1
DEFAULT_CONFIG = "models/best_model_config.json"
DEFAULT_MODEL = "models/best_model.pkl"

MICROSECONDS_PER_HOUR = 3_600_000_000
NO_TIME = np.iinfo(np.int64).min


# ---------------------------------------------------------------------------------------------------- errors


class FeaturePipelineError(Exception):
    """Base of this module's errors; `code` is a stable name for programs, the text is for people."""

    code = "feature_pipeline_error"


class BadObservations(FeaturePipelineError):
    """The observations cannot be used: a missing column, an unreadable file, or no usable row."""

    code = "bad_observations"

    def __init__(
        self,
        message: str,
        set_aside: Mapping[str, int] | None = None,
        set_aside_rows: Mapping[str, list[int]] | None = None,
    ):
        super().__init__(message)
        self.set_aside = dict(set_aside or {})  # rows by reason
        self.set_aside_rows = dict(set_aside_rows or {})  # the first few of them, counted from 0


class BadConfig(FeaturePipelineError):
    """The model configuration is missing, not JSON, from another schema version, or contradicts itself."""

    code = "bad_config"


class BadModel(FeaturePipelineError):
    """The model file is missing, was changed since training, or does not reproduce its golden example."""

    code = "bad_model"


class NotExplainable(FeaturePipelineError):
    """The model offers no additive contributions of its features."""

    code = "not_explainable"


class UnknownRiskWarning(UserWarning):
    """Some visits do not have enough evidence for a score; the text says how many, and why."""


class UnfinishedSwitchWarning(UserWarning):
    """Config and model file belong to different versions; the config's version is served, from the archive."""


class MissingCodesWarning(UserWarning):
    """The data to be scored lack codes that nearly every visit had in training."""


class cached_property(functools.cached_property):
    """As in Python 3.12: without the lock of 3.11, which takes longer than many a property of one visit."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        value = instance.__dict__[self.attrname] = self.func(instance)
        return value


def listed(items: Iterable[Any], most: int = 5) -> str:
    """The first few `items`, quoted and joined, with the number of the others."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(repr(str(item)) for item in items[:most]) + more


# ------------------------------------------------------------------------------------------ clinical concepts


@dataclass(frozen=True)
class Unit:
    """Another unit of a concept: ``value * factor + offset``, rounded to `decimals`, is in the concept's own unit.

    Some units can be recognised by the number alone: if no unit is named, a value in the interval `told` that is
    implausible in the concept's own unit is taken to be in this one.
    """

    spellings: str  # separated by commas, as are codes below
    factor: float = 1.0
    offset: float = 0.0
    decimals: int = 10
    told: tuple[float, float] | None = None

    def convert(self, value: Any) -> Any:
        """A number or an array in the concept's own unit."""
        if (self.factor, self.offset) == (1.0, 0.0):
            return value
        return np.round(value * self.factor + self.offset, self.decimals)


@dataclass(frozen=True)
class Concept:
    """A clinical quantity, with all codes and units that hospitals use for it.

    `low` and `high` are the limits of what a living patient can show, in `unit`. They are wide: they exclude errors of
    transmission, not extreme patients. `codes` are names and LOINC codes of values in `unit`, unless a row names a
    unit; `coded_in` are codes of values in another unit. `units` can be converted. `static`: does not change during a
    stay.
    """

    name: str
    unit: str
    low: float
    high: float
    codes: str
    units: tuple[Unit, ...] = ()
    coded_in: Mapping[str, str] = field(default_factory=dict)
    static: bool = False

    def unit_named(self, name: str) -> Unit | None:
        """The unit that `name` (UCUM or a usual spelling) means; None if this concept does not have it."""
        return _units_of(self.name).get(_unit_key(name), _ANY_UNIT if self.unit in ("code", "0/1") else None)

    def has_ucum(self, code: str) -> bool:
        """Is a UCUM code one of this concept's units? Case counts, as it tells milli from mega; litre is l or L.

        >>> [CONCEPT["glucose"].has_ucum(code) for code in ("mmol/L", "mmol/l", "Mmol/L")]
        [True, True, False]
        """
        spelled = {name.strip().replace("L", "l") for unit in self._all_units() for name in unit.spellings.split(",")}
        return code.strip().replace("L", "l") in spelled or self.unit in ("code", "0/1")

    def _all_units(self) -> list[Unit]:
        return [*self.units, Unit(self.unit), Unit(_SPELLINGS.get(self.unit, self.unit))]


_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")


def _unit_key(name: str) -> str:
    name = re.sub("[⁰¹²³⁴-⁹]+", lambda power: f"^{power[0].translate(_SUPERSCRIPTS)}", name)  # 10³/µL
    return re.sub(r"[\s]+", "", name).casefold().replace("µ", "u").replace("μ", "u").replace("mcmol", "umol")


@lru_cache(maxsize=256)
def _units_of(concept: str) -> dict[str, Unit]:
    """The units of a concept by spelling."""
    return {_unit_key(name): unit for unit in CONCEPT[concept]._all_units() for name in unit.spellings.split(",")}


_ANY_UNIT = Unit("")
# Other spellings of a concept's own unit, in UCUM and by interfaces.
_SPELLINGS: dict[str, str] = {
    "1/min": "/min, {beats}/min, beats/min, beats/minute, bpm, {breaths}/min, breaths/min, min-1, insp/min",
    "°C": "Cel, C, degC, deg C, degrees C",
    "mmHg": "mm[Hg]",
    "fraction": "1, {fraction}",
    "1": "[pH], {pH}, pH, units",
    "U/L": "[IU]/L, IU/L",
    "10^3/uL": "10*3/uL, 10e3/uL, x10^3/uL, x10e3/uL, x10*3/uL, 10*3/mm3, 10^3/mm3, x1000/uL, 1000/uL, 10*9/L, 10^9/L, "
    "10e9/L, x10^9/L, x10e9/L, G/L, Gpt/L, giga/L, giga.L-1, K/uL, K/mm3, K/cumm, thou/uL, thousand/uL, thousand/mm3, "
    "th/mm3, Tsd/uL",
    "points": "{score}, score, 1",
    "years": "a, y, yr, year",
    "s": "sec, seconds",
    "ng/mL": "ug/L",
}
_KPA, _MEQ, _PORTION = Unit("kPa", 7.50062), Unit("mEq/L"), Unit("1, fraction, {fraction}, L/L", 100.0)
_FAHRENHEIT = Unit("[degF], F, degF, deg F, °F, fahrenheit", 5 / 9, -160 / 9, 4, told=(77.0, 113.0))
_PERCENT = Unit("%, percent", 0.01, 0.0, 4, told=(20.0, 100.0))
_CELLS = Unit("/uL, {cells}/uL, cells/uL, /mm3, cells/mm3, 10*6/L, 10^6/L, /cumm", 0.001)
_KATAL = Unit("ukat/L", 60.0)

# Plausible limits follow the idea of MIMIC-Extract's table of variable ranges (Wang et al., ACM CHIL 2020,
# doi 10.1145/3368555.3384469), rounded outwards. Numbers with a hyphen are LOINC codes of the same quantity;
# venous pH and gases, ionised calcium, and urea by mass are others. 2708-6 is by name the saturation of arterial blood
# by any method, and in FHIR's vital signs profile the code of pulse oximetry. Molar masses: glucose 180.16, creatinine
# 113.12, bilirubin 584.66, urea nitrogen 28.01 (two atoms a molecule of urea), lactate 89.07 (lactate ion), calcium
# 40.08, magnesium 24.31, phosphorus 30.97, haemoglobin monomer 16,114 g/mol.
_INF = np.inf
# fmt: off
CONCEPTS: tuple[Concept, ...] = (
    Concept("heart_rate", "1/min", 10, 350, "HR, heart rate, pulse, pulse rate, 8867-4, 8889-8, 76282-3, 8893-0"),
    Concept("spo2", "%", 20, 100, "O2Sat, SpO2, pulse oximetry, pulse oxi, pulse ox, oxygen saturation, 59408-5, "
            "2708-6", (_PORTION,)),
    Concept("temperature", "°C", 25, 45, "Temp, temperature, body temperature, Temp C, Temp F, 8310-5, 8331-1, 8332-9, "
            "8333-7, 8328-7, 8329-5, 8334-5", (_FAHRENHEIT,)),
    Concept("systolic_bp", "mmHg", 20, 350, "SBP, systolic, systolic blood pressure, ABPs, 8480-6, 76215-3, 76534-7",
            (_KPA,)),
    Concept("mean_bp", "mmHg", 10, 300, "MAP, MBP, mean arterial pressure, mean blood pressure, 8478-0, 76214-6, "
            "76536-2", (_KPA,)),
    Concept("diastolic_bp", "mmHg", 5, 250, "DBP, diastolic, diastolic blood pressure, ABPd, 8462-4, 76213-8, 76535-4",
            (_KPA,)),
    Concept("respiratory_rate", "1/min", 0, 120, "Resp, RR, respiratory rate, respiration, 9279-1"),
    Concept("etco2", "mmHg", 0, 150, "EtCO2, end tidal co2, 19891-1", (_KPA,)),
    Concept("base_excess", "mmol/L", -50, 60, "BaseExcess, BE, base excess, 1925-7, 11555-0", (_MEQ,)),
    Concept("bicarbonate", "mmol/L", 0, 75, "HCO3, bicarbonate, total co2, 1963-8, 1959-6, 1960-4, 2028-9, 20565-8",
            (_MEQ,)),
    Concept("fio2", "fraction", 0.2, 1.0, "FiO2, fraction of inspired oxygen, inspired oxygen, 3150-6, 19994-3",
            (_PERCENT,)),
    Concept("ph", "1", 6.3, 8.2, "pH, arterial ph, 2744-1, 11558-4"),
    Concept("paco2", "mmHg", 5, 250, "PaCO2, pCO2, 2019-8", (_KPA,)),
    Concept("pao2", "mmHg", 10, 800, "PaO2, pO2, 2703-7", (_KPA,)),
    Concept("sao2", "%", 10, 100, "SaO2, arterial oxygen saturation", (_PORTION,)),
    Concept("ast", "U/L", 0, 50_000, "AST, SGOT, 1920-8, 30239-8", (_KATAL,)),
    Concept("alt", "U/L", 0, 50_000, "ALT, SGPT, 1742-6, 1743-4", (_KATAL,)),
    Concept("bun", "mg/dL", 0, 300, "BUN, urea nitrogen, blood urea nitrogen, 3094-0, 6299-2",
            (Unit("mmol/L", 2.801),), {"mmol/L": "22664-7, 14937-7"}),
    Concept("alkaline_phosphatase", "U/L", 0, 10_000, "Alkalinephos, ALP, 6768-6", (_KATAL,)),
    Concept("calcium", "mg/dL", 1, 30, "Calcium, Ca, 17861-6, 49765-1", (Unit("mmol/L", 4.008),), {"mmol/L": "2000-8"}),
    Concept("chloride", "mmol/L", 40, 200, "Chloride, Cl, 2075-0, 2069-3", (_MEQ,)),
    Concept("creatinine", "mg/dL", 0, 60, "Creatinine, creat, crea, 2160-0, 38483-4",
            (Unit("umol/L", 0.011312),), {"umol/L": "14682-9, 59826-8"}),
    Concept("bilirubin_direct", "mg/dL", 0, 60, "Bilirubin_direct, direct bilirubin, 1968-7",
            (Unit("umol/L", 0.058466),), {"umol/L": "14629-0"}),
    Concept("bilirubin_total", "mg/dL", 0, 100, "Bilirubin_total, bilirubin, total bilirubin, 1975-2, 42719-5",
            (Unit("umol/L", 0.058466),), {"umol/L": "14631-6"}),
    Concept("glucose", "mg/dL", 5, 2500, "Glucose, blood glucose, 2345-7, 2339-0, 41653-7, 41651-1, 2340-8, 32016-8",
            (Unit("mmol/L", 18.016),), {"mmol/L": "14749-6, 15074-8"}),
    Concept("lactate", "mmol/L", 0, 40, "Lactate, lactic acid, 2524-7, 32693-4, 2518-9, 2519-7",
            (Unit("mg/dL", 1 / 8.907), _MEQ), {"mg/dL": "59032-3"}),
    Concept("magnesium", "mg/dL", 0, 20, "Magnesium, Mg, 19123-9",
            (Unit("mmol/L", 2.431), Unit("mEq/L", 2.431 / 2)), {"mmol/L": "2601-3"}),
    Concept("phosphate", "mg/dL", 0, 30, "Phosphate, phosphorus, 2777-1",
            (Unit("mmol/L", 3.097),), {"mmol/L": "14879-1"}),
    Concept("potassium", "mmol/L", 0.5, 15, "Potassium, K, 2823-3, 6298-4", (_MEQ,)),
    Concept("sodium", "mmol/L", 80, 220, "NA, sodium, 2951-2, 2947-0", (_MEQ,)),
    Concept("troponin_i", "ng/mL", 0, 2000, "TroponinI, troponin i, 10839-9", (Unit("ng/L, pg/mL", 0.001),)),
    Concept("hematocrit", "%", 3, 80, "Hct, hematocrit, haematocrit, 4544-3, 20570-8", (_PORTION,)),
    Concept("hemoglobin", "g/dL", 1, 30, "Hgb, Hb, hemoglobin, haemoglobin, 718-7, 20509-6",
            (Unit("g/L", 0.1), Unit("mmol/L", 1.6114))),
    Concept("ptt", "s", 5, 300, "PTT, aPTT, 3173-2, 14979-9"),
    Concept("wbc", "10^3/uL", 0, 1000, "WBC, leukocytes, white blood cells, 6690-2, 26464-8, 804-5", (_CELLS,)),
    Concept("fibrinogen", "mg/dL", 0, 2500, "Fibrinogen, 3255-7", (Unit("g/L", 100.0), Unit("umol/L", 34.0))),
    Concept("platelets", "10^3/uL", 0, 3000, "Platelets, PLT, platelet count, 777-3, 26515-7, 778-1", (_CELLS,)),
    Concept("crp", "mg/L", 0, 1000, "CRP, c-reactive protein, 1988-5", (Unit("mg/dL", 10.0),)),
    Concept("gcs", "points", 3, 15, "GCS, glasgow coma scale, 9269-2"),
    Concept("age", "years", 0, 130, "Age, 30525-0",
            (Unit("mo", 1 / 12), Unit("wk", 7 / 365.25), Unit("d", 1 / 365.25)), static=True),
    Concept("sex", "code", -_INF, _INF, "Gender, Sex, 46098-0", static=True),
    Concept("unit_medical", "0/1", -_INF, _INF, "Unit1", static=True),
    Concept("unit_surgical", "0/1", -_INF, _INF, "Unit2", static=True),
    Concept("admission_delay", "h", -_INF, _INF, "HospAdmTime", static=True),
)
# fmt: on
CONCEPT = {concept.name: concept for concept in CONCEPTS}
_CONCEPT_PLACE = {concept.name: i for i, concept in enumerate(CONCEPTS)}
_STATIC = np.array([concept.static for concept in CONCEPTS] + [False])  # the last for a code without a concept, -1

# Codes whose value is two numbers, ``120/80``: their rows are split into these two.
BLOOD_PRESSURE_CODES = ("BP", "NIBP", "ABP", "blood pressure", "85354-9", "35094-2", "55284-4")
SYSTOLIC, DIASTOLIC = "8480-6", "8462-4"


@lru_cache(maxsize=4096)
def _code_key(code: str) -> str:
    return code.casefold().replace(" ", "").replace("_", "")


_MEANING: dict[str, tuple[Concept, str]] = {  # of a code: concept, unit of its values where none is named
    _code_key(code): (concept, unit)
    for concept in CONCEPTS
    for unit, codes in ((concept.unit, f"{concept.name},{concept.codes}"), *concept.coded_in.items())
    for code in codes.split(",")
}
_PAIRED = {_code_key(code) for code in BLOOD_PRESSURE_CODES}
_LOINC = re.compile(r"\d{1,7}-\d", re.ASCII)


def concept_of(code: str, synonyms: Mapping[str, str] | None = None) -> Concept | None:
    """The clinical concept of `code`, or None. `synonyms` (code to concept name) override the built-in codes.

    >>> concept_of("TEMP").name, concept_of("8310-5").name, concept_of("heart_RATE").name, concept_of("XYZ")
    ('temperature', 'temperature', 'heart_rate', None)
    """
    return Codes(synonyms or {}).meaning(code)[0]


def to_unit(concept: Concept, value: float, unit: str | None) -> float | None:
    """`value` in the concept's own unit; None if `unit` cannot be converted. Without a unit, `value` itself.

    >>> to_unit(CONCEPT["hemoglobin"], 120.0, "g/L"), to_unit(CONCEPT["temperature"], 100.4, "[degF]")
    (12.0, 38.0)
    >>> to_unit(CONCEPT["heart_rate"], 60.0, "mmol/L") is None
    True
    """
    if not unit or not unit.strip():
        return value
    known = concept.unit_named(unit)
    return None if known is None else float(known.convert(value))


SiteCodes = Mapping[str, tuple[str, str]]  # code -> name of a concept, unit of its values ("": the concept's own)


@dataclass(frozen=True)
class Codes:
    """The meaning of codes: built in, from the `synonyms` of the search (code to concept name), and from a site's map.

    `site` maps further codes to the concept's name and the unit of their values ("" for the concept's own). `own` are
    the codes that the model knows, each with its share of the training visits: another code of the same concept is read
    as the most frequent of them. `seen` are all codes of the training data: they are read as in training.
    """

    synonyms: Mapping[str, str] = field(default_factory=dict)
    site: SiteCodes = field(default_factory=dict)
    own: Mapping[str, float] = field(default_factory=dict)
    seen: frozenset[str] = frozenset()

    @classmethod
    def by_concept(cls, synonyms: Mapping[str, str] | None = None) -> Codes:
        """Reads every code that has a concept as the concept's name, as a portable model does."""
        return cls(synonyms or {}, own={concept.name: 0.0 for concept in CONCEPTS})

    def meaning(self, code: str) -> tuple[Concept | None, str]:
        """The concept of `code`, and the unit of its values if a row names none; (None, "") for an unknown code."""
        if code in self.site:
            name, unit = self.site[code]
            return CONCEPT[name], unit or CONCEPT[name].unit
        if code in self.synonyms:
            name = self.synonyms[code]
            if name not in CONCEPT:
                raise BadConfig(f"synonym {code!r} names the unknown concept {name!r}; known: {listed(CONCEPT, 60)}")
            return CONCEPT[name], CONCEPT[name].unit
        return _MEANING.get(_code_key(code), (None, ""))

    def own_code(self, code: str) -> str:
        """The model's code for `code`: itself if training had it, else the model's code of the same concept (LOINC
        8867-4 may be this hospital's HR), else `code`."""
        if code in self.seen or not self.own:
            return code
        concept = self.meaning(code)[0]
        return self._of_concept.get(concept.name, code) if concept else code

    def with_site(self, site: SiteCodes) -> Codes:
        """These codes with a site's map. Raises `BadConfig` if it names an unknown concept or unit, or gives a code of
        the training data another meaning."""
        for code, (name, unit) in site.items():
            if name not in CONCEPT:
                raise BadConfig(f"site code {code!r} names the unknown concept {name!r}; known: {listed(CONCEPT, 60)}")
            concept, own_unit = self.meaning(code)
            if re.fullmatch(_LOINC, code) and concept not in (None, CONCEPT[name]):
                raise BadConfig(f"site code {code!r}: LOINC says that it is {concept.name}, not {name}; leave it out")
            if unit and CONCEPT[name].unit_named(unit) is None:
                raise BadConfig(f"site code {code!r}: {name} cannot be converted from {unit!r}")
            if code in self.seen and (
                concept is not CONCEPT[name] or (unit and concept.unit_named(unit) != concept.unit_named(own_unit))
            ):
                taken = f"{concept.name} in {own_unit}" if concept else "a quantity of its own"
                raise BadConfig(
                    f"site code {code!r} means {name} {unit}".rstrip()
                    + f" here, but the model was trained with it as {taken}; leave it out, or search again"
                )
        return replace(self, site=dict(site))

    @cached_property
    def sha256(self) -> str | None:
        """Identifies a site's map; None without one."""
        return hashlib.sha256(json.dumps(sorted(self.site.items())).encode()).hexdigest()[:16] if self.site else None

    @cached_property
    def meaning_sha256(self) -> str:
        """The same for two models that read every row alike."""
        seen = sorted(code for code in self.seen if self.meaning(code)[0])
        mapped = [sorted(mapping.items()) for mapping in (self.synonyms, self.site, self._of_concept)]
        return hashlib.sha256(json.dumps([seen, mapped]).encode()).hexdigest()

    @cached_property
    def _of_concept(self) -> dict[str, str]:
        rarest_first = sorted(self.own, key=lambda code: (self.own[code], code))
        return {concept.name: code for code in rarest_first if (concept := self.meaning(code)[0])}


# --------------------------------------------------------------------------------------------------- reader

REQUIRED_COLUMNS = ("visit_id", "client", "observation_date", "observation_type_code", "observation_value")
RANGE_COLUMNS = ("reference_range_min", "reference_range_max")
UNIT_COLUMN = "unit"
COLUMNS = (*REQUIRED_COLUMNS, *RANGE_COLUMNS, UNIT_COLUMN)

# A row is set aside for the first of these that applies.
SET_ASIDE_REASONS = {
    "malformed": "not a row of the expected form",
    "no_visit": "no visit_id",
    "no_client": "no client",
    "no_code": "no observation_type_code",
    "not_utf8": "visit_id, client or observation_type_code is not UTF-8 text",
    "no_date": "no observation_date",
    "bad_date": "observation_date is not an ISO 8601 date between 1900 and 2299",
    "future": "observation_date is more than 5 minutes later than now",
    "no_value": "no observation_value",
    "bad_value": "observation_value is not a number",
    "infinite": "observation_value is infinite, or larger than 1e30",
    "unknown_unit": "unit is none that the code's concept can be converted from",
    "implausible": "observation_value is outside what the code's concept allows",
}
FUTURE_TOLERANCE = 5 * 60 * 1_000_000  # microseconds by which clocks may differ
LARGEST = 1e30  # its square is a float64, it itself is a float32
_EARLIEST = np.datetime64("1900-01-01", "us").astype(np.int64)
_LATEST = np.datetime64("2300-01-01", "us").astype(np.int64)


@dataclass(frozen=True)
class Observations:
    """Validated observations of many visits, in canonical order: by visit, code, time, value, range.

    Visits keep the order of their first row. A group is one code of one visit: rows
    ``group_start[g]:group_start[g + 1]``. Times are microseconds since 1970, UTC. Ranges are NaN where empty.
    """

    visit_id: np.ndarray  # (n_visits,) as given
    client: np.ndarray  # (n_visits,) as given
    visit_text: np.ndarray  # (n_visits,) text; identifies a visit together with client_text
    client_text: np.ndarray  # (n_visits,)
    codes: tuple[str, ...]  # sorted
    concepts: tuple[Concept | None, ...]  # of each code
    group_visit: np.ndarray  # (n_groups,)
    group_code: np.ndarray  # (n_groups,)
    group_start: np.ndarray  # (n_groups + 1,)
    time: np.ndarray  # (n_observations,) int64
    value: np.ndarray  # (n_observations,) float64
    low: np.ndarray  # (n_observations,) float64
    high: np.ndarray  # (n_observations,) float64
    set_aside: dict[str, int] = field(default_factory=dict)  # rows that were not used, by reason
    set_aside_rows: dict[str, list[int]] = field(default_factory=dict)  # the first few of them, counted from 0
    remarks: dict[str, int] = field(default_factory=dict)  # rows that were used after a change, by what it was
    visit_of_row: np.ndarray | None = None  # (n_rows,) of the rows as given: the visit, -1 for rows that name none
    first_row: np.ndarray | None = None  # (n_visits,) the first row of each visit, as given
    where: str = "the observations"  # what was read, for messages

    def check_usable(self) -> Observations:
        """These observations. Raises `BadObservations` if not one row can be used."""
        if len(self.time):
            return self
        counted = "; ".join(f"{n} x {SET_ASIDE_REASONS[reason]}" for reason, n in self.set_aside.items())
        n_rows = sum(self.set_aside.values())
        raise BadObservations(
            f"{self.where}: no usable observation in {n_rows} rows ({counted or 'empty'})",
            self.set_aside,
            self.set_aside_rows,
        )

    @property
    def n_visits(self) -> int:
        return len(self.visit_id)

    @cached_property
    def concept_of_code(self) -> np.ndarray:
        """(n_codes,) place of each code's concept in `CONCEPTS`, -1 for none."""
        return np.array([_CONCEPT_PLACE[c.name] if c else -1 for c in self.concepts], dtype=np.int64)

    @cached_property
    def concepts_have_several_codes(self) -> bool:
        """Do two codes have the same concept?"""
        known = [c.name for c in self.concepts if c]
        return len(set(known)) < len(known)

    @cached_property
    def visit_group_start(self) -> np.ndarray:
        """(n_visits + 1,) first group of each visit; a visit without usable rows has none."""
        return np.searchsorted(self.group_visit, np.arange(self.n_visits + 1))

    @cached_property
    def first_time(self) -> np.ndarray:
        """(n_visits,) time of the first usable observation, or NO_TIME."""
        return self._per_visit(np.minimum)

    @cached_property
    def last_time(self) -> np.ndarray:
        """(n_visits,) time of the last usable observation, or NO_TIME."""
        return self._per_visit(np.maximum)

    def _per_visit(self, ufunc: np.ufunc) -> np.ndarray:
        out = np.full(self.n_visits, NO_TIME)
        first_group = self.visit_group_start[:-1]
        has_rows = first_group < self.visit_group_start[1:]
        if has_rows.any():
            out[has_rows] = ufunc.reduceat(self.time, self.group_start[first_group[has_rows]])
        return out

    @classmethod
    def of_rows(
        cls,
        visits: Sequence[tuple[Any, Any]],
        codes: Sequence[str],
        concepts: Sequence[Concept | None],
        visit: np.ndarray,
        code: np.ndarray,
        columns: Mapping[str, np.ndarray],
    ) -> Observations:
        """Observations from rows that were validated before, for example those of several readings.

        `visits` are (client, visit_id) as given; `codes` must be sorted; for each row `visit` and `code` are places in
        these, and `columns` hold ``time``, ``value``, ``low``, ``high``. Exact duplicates count once.
        """
        client, number = _object_array([v[0] for v in visits]), _object_array([v[1] for v in visits])
        texts = _object_array([as_text(v) for v in number]), _object_array([as_text(v) for v in client])
        known = cls.without_rows(number, client, *texts, tuple(codes), tuple(concepts))
        return Rows(known, visit, code, dict(columns)).in_order()

    @classmethod
    def without_rows(cls, visit_id, client, visit_text, client_text, codes, concepts, **counts: Any) -> Observations:
        """Observations of these visits and codes that have no row yet; see `Rows`."""
        nothing = np.zeros(0, dtype=np.int64)
        return cls(
            visit_id, client, visit_text, client_text, codes, concepts,
            group_visit=nothing, group_code=nothing, group_start=np.zeros(1, dtype=np.int64),
            time=nothing, value=nothing, low=nothing, high=nothing, **counts,
        )  # fmt: skip

    @classmethod
    def stacked(cls, parts: Sequence[Observations]) -> Observations:
        """The visits of several readings, one after the other. A visit of two readings occurs twice.

        Counts of rows set aside are not carried over.
        """
        concept = {code: c for part in parts for code, c in zip(part.codes, part.concepts, strict=True)}
        place = {code: i for i, code in enumerate(sorted(concept))}
        own = [np.array([place[code] for code in part.codes]) for part in parts]
        first_visit, first_row = (
            np.cumsum([0, *counts[:-1]])
            for counts in ([part.n_visits for part in parts], [len(part.time) for part in parts])
        )
        last = [np.array([first_row[-1] + len(parts[-1].time)])]

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(part, name) for part in parts])

        return cls(
            codes=tuple(place),
            concepts=tuple(concept[code] for code in place),
            group_visit=np.concatenate([p.group_visit + n for p, n in zip(parts, first_visit, strict=True)]),
            group_code=np.concatenate([codes[p.group_code] for p, codes in zip(parts, own, strict=True)]),
            group_start=np.concatenate([p.group_start[:-1] + n for p, n in zip(parts, first_row, strict=True)] + last),
            **{name: joined(name) for name in ("visit_id", "client", "visit_text", "client_text")},
            **{name: joined(name) for name in ("time", "value", "low", "high")},
        )

    def without(self, groups: np.ndarray) -> Observations:
        """The same visits as if the codes of these groups (n_groups,) had never been measured there."""
        keep = ~groups
        length = np.diff(self.group_start)
        rows = np.repeat(keep, length)
        return replace(
            self,
            group_visit=self.group_visit[keep],
            group_code=self.group_code[keep],
            group_start=np.append(0, np.cumsum(length[keep])),
            **{name: getattr(self, name)[rows] for name in ("time", "value", "low", "high")},
        )

    def without_code(self, code: str) -> Observations:
        """The same visits as if `code` had never been measured."""
        return self.without(self.group_code == self.codes.index(code))

    def keys(self) -> list[tuple[str, str]]:
        """The identity of each visit: (client, visit_id) as texts."""
        return list(zip(self.client_text, self.visit_text, strict=True))


@dataclass(frozen=True)
class Rows:
    """The usable rows of a table as they came, validated: for who puts the rows of many tables in order together.

    `known` are their observations without any row: visits, codes, and what was set aside.
    """

    known: Observations
    visit: np.ndarray  # (n_rows,) place among the visits of `known`
    code: np.ndarray  # (n_rows,) place among its codes
    columns: dict[str, np.ndarray]  # time, value, low, high

    def in_order(self) -> Observations:
        columns, groups, duplicates = _canonical_order(self.visit, self.code, len(self.known.codes), **self.columns)
        if duplicates:
            groups["remarks"] = {**self.known.remarks, "duplicate": duplicates}
        return replace(self.known, **columns, **groups)


def read_observations(
    source: str | Path | pd.DataFrame | Sequence[Mapping[str, Any]] | Observations,
    codes: Codes | Mapping[str, str] | None = None,
    now: int | None = None,
) -> Observations:
    """Reads a file (.csv, .csv.gz, .parquet), a frame or a list of records into `Observations`.

    Rows that cannot be used are set aside and counted by reason (`SET_ASIDE_REASONS`). Exact duplicates count once.
    ``<0.5`` and ``>200`` count as their number. Dates with a zone are converted to UTC, dates without a zone are UTC. A
    row whose visit, client or code is not UTF-8 is set aside: with replaced bytes, two patients could become one.
    `codes` says what codes mean, or maps further codes to names of concepts. With a column ``unit``, values are
    converted to their concept's unit. A blood pressure ``120/80`` becomes two observations. Rows later than `now`
    (microseconds since 1970 UTC) plus a tolerance are set aside; without `now`, none are.

    If no row can be used, the observations are empty; see `Observations.check_usable`. Raises `BadObservations` if a
    column is missing or the file cannot be read.
    """
    return source if isinstance(source, Observations) else read_rows(source, codes, now).in_order()


def read_rows(
    source: str | Path | pd.DataFrame | Sequence[Mapping[str, Any]],
    codes: Codes | Mapping[str, str] | None = None,
    now: int | None = None,
) -> Rows:
    """The same before the rows are put in order. Exact duplicates are still there."""
    if isinstance(source, str | Path):
        table, malformed = read_table(Path(source))
        where = f"file {str(source)!r}"
    elif isinstance(source, pd.DataFrame):
        table, malformed, where = source, 0, "the frame"
    elif isinstance(source, Sequence):
        table, malformed, where = *_read_records(source), "the records"
    else:
        raise BadObservations(f"observations must be a file, a frame or a list of records, not {type(source).__name__}")
    _check_columns(list(table), where)
    table = {name: table[name] for name in COLUMNS if name in table}
    return _validate(table, malformed, where, codes if isinstance(codes, Codes) else Codes(codes or {}), now)


def _check_columns(columns: list[Any], where: str) -> None:
    names = [name for name in columns if name in COLUMNS]
    missing = [name for name in REQUIRED_COLUMNS if name not in names]
    if missing:
        # the other names are not shown: in a file without a header they are data of a patient
        found = f"found {listed(names, 7) if names else 'none of them'}"
        if others := len(columns) - len(names):
            found += f" and {others} other{'s' if others > 1 else ''}"
        first = str(columns[0]) if len(columns) == 1 else ""
        hint = "; is the separator a comma?" if re.search(r"[;\t|]", first) else ""
        raise BadObservations(
            f"{where}: missing column {listed(missing)}; {found}; expected {', '.join(COLUMNS)}{hint}"
        )
    if len(set(names)) < len(names):
        raise BadObservations(f"{where}: a column occurs twice; expected {', '.join(COLUMNS)}")


def read_table(path: Path) -> tuple[pd.DataFrame, int]:
    """(a file's table before anything is checked, the number of lines with too many fields, which are left out).

    The cells of a text file are texts. Raises `BadObservations` if the file cannot be read.
    """
    where = f"file {str(path)!r}"
    try:
        if path.name.endswith(".parquet"):
            return pd.read_parquet(path), 0
        if path.name.endswith((".csv", ".csv.gz")):
            return _read_csv(path, where)
    except FileNotFoundError:
        raise BadObservations(f"{where} does not exist") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadObservations(f"{where} cannot be read: {reason}") from error
    raise BadObservations(f"{where}: unknown kind of file; expected .csv, .csv.gz or .parquet")


# How pandas.read_csv reads observations. Texts stay texts: the code NA is sodium. Numbers too are read as text, since
# pandas' own parser may be off by a bit where JSON and parquet are not. The header is read as a row: pandas does not
# count the fields of a first row.
CSV_AS_TEXT: dict[str, Any] = {
    "header": None,
    "dtype": str,
    "keep_default_na": False,
    "encoding": "utf-8-sig",
    "encoding_errors": "replace",
    "on_bad_lines": "warn",
    "low_memory": False,
}


def _read_csv(path: Path, where: str) -> tuple[pd.DataFrame, int]:
    """The table, all of it text, and the number of lines with too many fields."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", pd.errors.ParserWarning)
        try:
            table = pd.read_csv(path, **CSV_AS_TEXT)
        except pd.errors.EmptyDataError:
            raise BadObservations(f"{where} is empty; expected the columns {', '.join(COLUMNS)}") from None
    malformed = sum(str(warning.message).count("Skipping line") for warning in caught)
    table.columns = pd.Index([as_text(name) for name in table.iloc[0]])
    return table.iloc[1:].reset_index(drop=True), malformed


def _read_records(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[Any]], int]:
    rows = [record for record in records if isinstance(record, Mapping)]
    # lists: a column may mix numbers and texts, and each keeps its own meaning
    table = {name: [row.get(name) for row in rows] for name in COLUMNS if any(name in row for row in rows)}
    return table, len(records) - len(rows)


_WHOLE_FLOAT = re.compile(r"(0|-?[1-9][0-9]{0,15})\.0", re.ASCII)  # as a column of floats is written; 007.0 is not


def as_text(value: Any) -> str:
    """7, 7.0, "7" and "7.0" are the same visit: a column of whole numbers with a gap arrives as floats, or was written
    as floats. Any other text stays as it is.

    >>> as_text(7.0), as_text("7.0"), as_text("007"), as_text("7.00")
    ('7', '7', '007', '7.00')
    """
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    text = str(value).strip()
    return text[:-2] if text.endswith(".0") and _WHOLE_FLOAT.fullmatch(text) else text


Column = pd.Series | list[Any]  # of a frame, or of records

_LONG = 1000  # from here on distinct cells are sorted out first: quicker for many rows, slower for a few


def _distinct(column: Column) -> tuple[np.ndarray, list[Any]]:
    """(index of each row's cell, cells). If it is quick to find out, each distinct cell occurs once."""
    if isinstance(column, list):
        if set(map(type, column)) not in ({str}, {int}):  # among others True and 1.0 would pass for the same
            return np.arange(len(column)), column
        place = {cell: i for i, cell in enumerate(dict.fromkeys(column))}
        return np.array([place[cell] for cell in column]), list(place)
    if len(column) < _LONG or column.dtype == object:
        return np.arange(len(column)), column.tolist()
    index, distinct = pd.factorize(column)
    return index, distinct.tolist() + ([None] if (index < 0).any() else [])


def _is_empty(cell: Any) -> bool:
    return cell is None or cell is pd.NA or (isinstance(cell, str) and not cell.strip()) or cell != cell


def _empty_among(cells: Sequence[Any], asked: np.ndarray) -> np.ndarray:
    """Which of the cells that are `asked` for are empty."""
    empty = np.zeros(len(cells), dtype=bool)
    for i in np.flatnonzero(asked).tolist():
        empty[i] = _is_empty(cells[i])
    return empty


_EMPTY, _UNDECODED = -1, -2
_NO_CHARACTER = re.compile("[\ufffd\ud800-\udfff]")  # replaces bytes that are not UTF-8, in files and in JSON


def text_places(column: Column) -> tuple[np.ndarray, list[str]]:
    """(index of each row's text, -1 if empty or not UTF-8; the distinct texts in order of appearance)."""
    index, texts = _text_places(column)
    return np.maximum(index, -1), texts


def _text_places(column: Column) -> tuple[np.ndarray, list[str]]:
    """As `text_places`, with `_EMPTY` and `_UNDECODED` instead of -1."""
    index, cells = _distinct(column)
    if len(index) >= _LONG and not pd.api.types.is_object_dtype(column) and _are_plain(cells):
        return index.astype(np.int64), cells
    place: dict[str, int] = {}
    merged = [_EMPTY if _is_empty(cell) else place.setdefault(as_text(cell), len(place)) for cell in cells]
    index = np.asarray(merged, dtype=np.int64)[index]
    texts = list(place)
    undecoded = [not text.isascii() and _NO_CHARACTER.search(text) is not None for text in texts]
    if any(undecoded):
        kept = ~np.array(undecoded)
        index = np.append(np.where(kept, np.cumsum(kept) - 1, _UNDECODED), _EMPTY)[index]
        texts = [text for text, keep in zip(texts, kept, strict=True) if keep]
    return index, texts


def _are_plain(cells: list[Any]) -> bool:
    """Is each cell its own `as_text`, and in ASCII? Asked of all together, which is ten times as fast."""
    if set(map(type, cells)) != {str}:
        return False
    joined = "\n".join(cells) + "\n"
    return joined.isascii() and ".0\n" not in joined and joined.split() == cells


def parse_times(column: Column) -> tuple[np.ndarray, np.ndarray]:
    """(microseconds since 1970 UTC, was the cell empty); NO_TIME if there is no usable date."""
    if isinstance(column, pd.Series) and column.dtype.kind == "M":
        if isinstance(column.dtype, pd.DatetimeTZDtype):
            column = column.dt.tz_convert("UTC").dt.tz_localize(None)
        micros = column.to_numpy().astype("datetime64[us]", copy=False).view(np.int64)
        empty = micros == NO_TIME
    else:
        index, cells = _distinct(column)
        texts = _date_texts(cells)
        micros = _plain_times(texts)
        if micros is None:
            texts = np.array(texts, dtype=object)
            micros = pd.to_datetime(texts, format="ISO8601", utc=True, errors="coerce").as_unit("us").asi8
        empty = _empty_among(cells, micros == NO_TIME)[index]
        micros = micros[index]
    return np.where((micros >= _EARLIEST) & (micros < _LATEST), micros, NO_TIME), empty


_PLAIN_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?)(?:Z|\+00:00)?", re.ASCII)


def _plain_times(texts: list[Any]) -> np.ndarray | None:
    """Microseconds of a few texts that are all plain UTC times, else None: faster than pandas for a request."""
    matches = [_PLAIN_TIME.fullmatch(text) if isinstance(text, str) else None for text in texts[:_LONG]]
    if None in matches or len(matches) < len(texts):
        return None
    try:
        return np.array([f"{m[1]}T{m[2]}" for m in matches], dtype="datetime64[us]").astype(np.int64)
    except ValueError:  # 30 February
        return None


def _date_texts(cells: list[Any]) -> list[Any]:
    """`_date_text` of each cell."""
    if set(map(type, cells)) == {str}:
        texts = [cell.strip() for cell in cells]
        lengths = set(map(len, texts))
        if min(lengths) >= SHORTEST_DATE and max(lengths) <= LONGEST_DATE:
            return texts
    return [_date_text(cell) for cell in cells]


SHORTEST_DATE = 8  # 2024 and 2024-01 are ISO 8601, but not the time of a measurement
LONGEST_DATE = 26  # to the microsecond


def _date_text(cell: Any) -> Any:
    """A text that may be a date."""
    if isinstance(cell, int | np.integer) and not isinstance(cell, bool):
        cell = str(cell)
    if isinstance(cell, np.datetime64):
        cell = pd.Timestamp(cell)
    if isinstance(cell, str):
        cell = cell.strip()
        if len(cell) > LONGEST_DATE:  # one longer fraction would make all dates nanoseconds, until 2262 only
            cell = re.sub(r"(\.[0-9]{6})[0-9]+", r"\1", cell)
        return cell if len(cell) >= SHORTEST_DATE else None
    return cell if isinstance(cell, date) else None


def _number(cell: Any) -> float:
    """The number in a cell, or NaN; ``<0.5`` and ``>= 200`` count as their number."""
    if isinstance(cell, bool | np.bool_):
        return np.nan
    if isinstance(cell, str):
        cell = cell.strip().lstrip("<>=≤≥~").strip()
        if "_" in cell:
            return np.nan
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return np.nan


def _numbers(column: Column) -> tuple[np.ndarray, np.ndarray]:
    """(float64, NaN if there is no number; was the cell empty)."""
    if isinstance(column, pd.Series) and column.dtype.kind in "iuf" and isinstance(column.dtype, np.dtype):
        numbers = column.to_numpy(dtype=np.float64)
        return numbers, np.isnan(numbers)
    if isinstance(column, list) and set(map(type, column)) <= {float, int, type(None)}:
        with contextlib.suppress(OverflowError):  # an integer beyond all floats
            numbers = np.array(column, dtype=np.float64)  # None becomes NaN
            return numbers, np.isnan(numbers)
    index, cells = _distinct(column)
    numbers = np.array([_number(cell) for cell in cells], dtype=np.float64)
    return numbers[index], _empty_among(cells, np.isnan(numbers))[index]


def _object_array(cells: Sequence[Any]) -> np.ndarray:
    out = np.empty(len(cells), dtype=object)
    out[:] = cells
    return out


def _as_given(column: Column, rows: np.ndarray) -> np.ndarray:
    """The cells of some rows, as the caller wrote them."""
    if isinstance(column, list):
        return _object_array([column[row] for row in rows.tolist()])
    if isinstance(column.dtype, np.dtype):
        return column.to_numpy()[rows]
    if len(column) < _LONG:
        return column.to_numpy(dtype=object)[rows]
    return column.take(rows).to_numpy(dtype=object)


def _validate(table: Mapping[str, Column], malformed: int, where: str, meanings: Codes, now: int | None) -> Rows:
    n_rows = len(table["visit_id"])
    visit_index, visit_texts = _text_places(table["visit_id"])
    client_index, client_texts = _text_places(table["client"])
    code_index, codes = _text_places(table["observation_type_code"])
    undecoded = (visit_index == _UNDECODED) | (client_index == _UNDECODED) | (code_index == _UNDECODED)
    time, date_empty = parse_times(table["observation_date"])
    value, value_empty = _numbers(table["observation_value"])
    low, high = (_numbers(table[name])[0] if name in table else np.full(n_rows, np.nan) for name in RANGE_COLUMNS)
    with np.errstate(invalid="ignore"):  # an infinite limit excludes nothing
        low, high = (np.where(np.abs(bound) <= LARGEST, bound, np.nan) for bound in (low, high))

    # visits in order of first appearance, also those of which no row is usable
    named = (visit_index >= 0) & (client_index >= 0)
    pair = np.where(named, client_index * len(visit_texts) + visit_index, -1)
    if n_rows < _LONG:
        visit, pairs = _distinct(pair.tolist())
        pairs = np.array(pairs, dtype=np.int64)
    else:
        visit, pairs = pd.factorize(pair, use_na_sentinel=False)
    first_row = np.empty(len(pairs), dtype=np.int64)
    first_row[visit[::-1]] = np.arange(n_rows)[::-1]
    if (pairs < 0).any():  # rows without a visit make no visit
        nameless = int(np.flatnonzero(pairs < 0)[0])
        first_row = np.delete(first_row, nameless)
        visit = np.where(visit == nameless, -1, visit - (visit > nameless))

    unit, units = _text_places(table[UNIT_COLUMN]) if UNIT_COLUMN in table else (np.full(n_rows, _EMPTY), [])
    columns = {
        "visit": visit,
        "code": code_index,
        "time": time,
        "value": value,
        "low": low,
        "high": high,
        "unit": unit,
        "row": np.arange(n_rows),
    }
    paired = np.array([_code_key(code) in _PAIRED for code in codes] + [False, False], dtype=bool)
    given: Any = slice(None)  # the place of each row as given
    if paired.any():
        codes, columns = _split_pressures(codes, columns, paired, table["observation_value"])
        given = columns["row"]
    row, time, code_index = (columns[name] for name in ("row", "time", "code"))

    value, low, high, converted, unknown_unit = _in_own_units(codes, columns, units, meanings)
    concepts = [meanings.meaning(code)[0] for code in codes]
    floor = np.array([c.low if c else -np.inf for c in concepts] + [-np.inf, -np.inf])
    ceiling = np.array([c.high if c else np.inf for c in concepts] + [np.inf, np.inf])
    with np.errstate(invalid="ignore"):
        odd_range = ~(low < high) & ~np.isnan(low) & ~np.isnan(high)
        problems = {
            "no_visit": visit_index[given] == _EMPTY,
            "no_client": client_index[given] == _EMPTY,
            "no_code": code_index == _EMPTY,
            "not_utf8": undecoded[given],
            "no_date": date_empty[given],
            "bad_date": time == NO_TIME,
            "future": time > (_LATEST if now is None else now + FUTURE_TOLERANCE),
            "no_value": value_empty[given],
            "bad_value": np.isnan(value),
            "infinite": np.abs(value) > LARGEST,
            "unknown_unit": unknown_unit,
            "implausible": (value < floor[code_index]) | (value > ceiling[code_index]),
        }
    usable = ~np.logical_or.reduce(list(problems.values()))
    left = ~usable
    set_aside = {"malformed": malformed} if malformed else {}
    set_aside_rows: dict[str, list[int]] = {}
    for reason, hit in problems.items():
        if not left.any():
            break
        hit = hit & left
        if hit.any():
            set_aside[reason] = int(hit.sum())
            set_aside_rows[reason] = row[hit][:5].tolist()
            left &= ~hit
    remarks = {}
    if converted.any():
        remarks["unit_converted"] = int((converted & usable).sum())
    if (odd_range & usable).any():
        remarks["range_ignored"] = int((odd_range & usable).sum())
        low, high = np.where(odd_range, np.nan, low), np.where(odd_range, np.nan, high)

    # from here on, codes are the model's own, in sorted order
    rows = slice(None) if usable.all() else np.flatnonzero(usable)
    own = [meanings.own_code(code) for code in codes]
    sorted_codes = sorted(set(own))
    place = {code: i for i, code in enumerate(sorted_codes)}
    own_place = np.array([place[code] for code in own] + [-1, -1], dtype=np.int64)
    known = Observations.without_rows(
        _as_given(table["visit_id"], first_row),
        _as_given(table["client"], first_row),
        np.array(visit_texts, dtype=object)[visit_index[first_row]],
        np.array(client_texts, dtype=object)[client_index[first_row]],
        tuple(sorted_codes),
        tuple(meanings.meaning(code)[0] for code in sorted_codes),
        set_aside=set_aside,
        set_aside_rows=set_aside_rows,
        remarks=remarks,
        visit_of_row=visit,
        first_row=first_row,
        where=where,
    )
    # + 0.0: there is one zero
    kept = {"time": time[rows], "value": value[rows] + 0.0, "low": low[rows], "high": high[rows]}
    return Rows(known, columns["visit"][rows], own_place[code_index[rows]], kept)


_TWO_NUMBERS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*", re.ASCII)


def _split_pressures(codes, columns, paired, values) -> tuple[list[str], dict[str, np.ndarray]]:
    """Splits each row of a blood pressure ``120/80`` into a systolic row and, at the end, a diastolic row."""
    rows = np.flatnonzero(paired[columns["code"]] & np.isnan(columns["value"]))
    matches = [_TWO_NUMBERS.fullmatch(str(cell)) for cell in _as_given(values, rows)]
    rows = rows[[match is not None for match in matches]]
    pressures = np.array([[float(match[1]), float(match[2])] for match in matches if match]).reshape(-1, 2)
    codes = [*codes, *(code for code in (SYSTOLIC, DIASTOLIC) if code not in codes)]
    for name in ("low", "high"):  # a range would be of which of the two?
        columns[name][rows] = np.nan
    added = {name: column[rows] for name, column in columns.items()}
    added |= {"code": np.full(len(rows), codes.index(DIASTOLIC)), "value": pressures[:, 1]}
    columns = {name: np.concatenate([column, added[name]]) for name, column in columns.items()}
    columns["code"][rows], columns["value"][rows] = codes.index(SYSTOLIC), pressures[:, 0]
    return codes, columns


def _in_own_units(codes, columns, units, meanings):
    """(value, low, high) in the units of the codes' concepts; which rows were converted; which rows cannot be."""
    code, unit, value, low, high = (columns[name] for name in ("code", "unit", "value", "low", "high"))
    converted, unknown = np.zeros(len(value), dtype=bool), np.zeros(len(value), dtype=bool)

    def convert(rows: np.ndarray, other: Unit, bounds_above: float = -np.inf) -> None:
        nonlocal value, low, high
        value, low, high = value.copy(), low.copy(), high.copy()
        value[rows] = other.convert(value[rows])
        for bound in (low, high):
            of_unit = rows[bound[rows] > bounds_above]
            bound[of_unit] = other.convert(bound[of_unit])
        converted[rows] = True

    width = len(units) + 1  # the last: no unit
    if units:
        with_code = code >= 0
        present = np.unique(code[with_code] * width + np.where(unit >= 0, unit, len(units))[with_code]).tolist()
    else:
        present = range(len(codes))
    for key in present:
        text, which = codes[key // width], key % width
        concept, default = meanings.meaning(text)
        if concept is None:
            continue
        named = units[which] if which < len(units) else (default if default != concept.unit else "")
        if named:
            other = concept.unit_named(named)
            if other is not None and (other.factor, other.offset) == (1.0, 0.0):
                continue
            rows = np.flatnonzero((code == key // width) & ((unit == which) if which < len(units) else (unit < 0)))
            if other is None:
                unknown[rows] = True
            else:
                convert(rows, other)
            continue
        for other in concept.units:
            if other.told:
                rows = np.flatnonzero((code == key // width) & (unit < 0) & (value > concept.high))
                rows = rows[(value[rows] >= other.told[0]) & (value[rows] <= other.told[1])]
                if len(rows):
                    convert(rows, other, concept.high)
    return value, low, high, converted, unknown


def _canonical_order(visit, code, n_codes, time, value, low, high):
    """Sorts by (visit, code, time, value, low, high), drops exact duplicates, finds the groups."""
    if not len(time):
        nothing = np.zeros(0, dtype=np.int64)
        groups = {"group_visit": nothing, "group_code": nothing, "group_start": np.zeros(1, dtype=np.int64)}
        return {"time": time, "value": value, "low": low, "high": high}, groups, 0
    group = visit * n_codes + code
    start = time.min()
    span = int(time.max()) - int(start) + 1
    if int(group.max() + 1) * span < 2**63:  # one fused key sorts twice as fast
        key = group * span + (time - start)
        order = np.argsort(key)  # not stable, five times as fast; ties are put in order below
        key = key[order]
        tied = key[1:] == key[:-1]
    else:
        order = np.lexsort((time, group))
        tied = (group[order][1:] == group[order][:-1]) & (time[order][1:] == time[order][:-1])
    duplicates = 0
    if tied.any():
        in_run = np.append(tied, False) | np.insert(tied, 0, False)
        place = np.flatnonzero(in_run)
        rows = order[place]
        order[place] = rows[np.lexsort((high[rows], low[rows], value[rows], time[rows], group[rows]))]
        same = np.zeros(len(order), dtype=bool)
        a, b = order[:-1][tied], order[1:][tied]
        same[1:][tied] = (value[a] == value[b]) & _same(low[a], low[b]) & _same(high[a], high[b])
        duplicates = int(same.sum())
        order = order[~same]
    group = group[order]
    is_start = np.ones(len(group), dtype=bool)
    np.not_equal(group[1:], group[:-1], out=is_start[1:])
    group_start = np.flatnonzero(is_start)
    groups = {
        "group_visit": group[group_start] // n_codes,
        "group_code": group[group_start] % n_codes,
        "group_start": np.append(group_start, len(group)),
    }
    columns = {"time": time[order], "value": value[order], "low": low[order], "high": high[order]}
    return columns, groups, duplicates


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b) | (np.isnan(a) & np.isnan(b))


# ------------------------------------------------------------------------------------ snapshots and segments


def _ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The index ranges ``start[i], start[i] + 1, ...`` of the given lengths, one after the other."""
    shift = start - (np.cumsum(length) - length)
    return np.arange(length.sum()) + np.repeat(shift, length)


class Snapshots:
    """Which rows: snapshots (each is a visit at a moment) joined to the groups of their visits.

    A pair is one snapshot with one group; `begin` and `end` are the rows of the group that the snapshot knows,
    those with ``time <= as_of``. `visit` must be ascending.
    """

    def __init__(self, observations: Observations, visit: np.ndarray, as_of: np.ndarray):
        self.observations = observations
        self.visit, self.as_of = visit, as_of
        first_group = observations.visit_group_start[visit]
        n_groups = observations.visit_group_start[visit + 1] - first_group
        self.snapshot = np.repeat(np.arange(len(visit)), n_groups)  # of each pair
        self.group = _ranges(first_group, n_groups)
        self.code = observations.group_code[self.group]
        self.begin = observations.group_start[self.group]
        self.start_time = observations.first_time[visit]
        self.usable = (self.start_time != NO_TIME) & (self.start_time <= as_of)
        # Times of one group and of its queries become one ascending integer key: one search for all pairs.
        self._first_group = observations.visit_group_start[visit[0]]
        last_group = observations.visit_group_start[visit[-1] + 1]
        self._first_row = observations.group_start[self._first_group]
        rows = slice(self._first_row, observations.group_start[last_group])
        group_of_row = np.repeat(
            np.arange(last_group - self._first_group),
            np.diff(observations.group_start[self._first_group : last_group + 1]),
        )
        start_of_group = observations.first_time[observations.group_visit[self._first_group : last_group]]
        since_start = observations.time[rows] - start_of_group[group_of_row]
        self._width = int(since_start.max(initial=0)) + 2
        if int(last_group - self._first_group) * self._width >= 2**63:  # Python's integers do not wrap
            raise OverflowError
        self._key = group_of_row * self._width + since_start + 1
        self._window_start: dict[int | None, np.ndarray] = {None: self.begin}
        self.end = self._first_row_after(as_of)

    def _first_row_after(self, moment: np.ndarray) -> np.ndarray:
        """For each pair the first row of its group later than its snapshot's `moment`."""
        since_start = np.where(self.usable, moment - np.where(self.usable, self.start_time, 0), -1)
        place = np.minimum(np.maximum(since_start, -1), self._width - 2) + 1
        query = (self.group - self._first_group) * self._width + place[self.snapshot]
        return self._first_row + np.searchsorted(self._key, query, side="right")

    def window_start(self, hours: int | None) -> np.ndarray:
        """For each pair the first row inside the window ``(as_of - hours, as_of]``; None: the visit so far."""
        if hours not in self._window_start:
            self._window_start[hours] = self._first_row_after(self.as_of - hours * MICROSECONDS_PER_HOUR)
        return self._window_start[hours]

    def observations_within(self, hours: int | None) -> np.ndarray:
        """(n_snapshots,) number of observations of any code in a window."""
        return np.bincount(self.snapshot, weights=self.end - self.window_start(hours), minlength=len(self.as_of))

    def types_within(self, hours: int | None) -> np.ndarray:
        """(n_snapshots,) number of different codes in a window."""
        observed = self.window_start(hours) < self.end
        return np.bincount(self.snapshot[observed], minlength=len(self.as_of)).astype(np.float64)

    def segments(self, pairs: np.ndarray, begin: np.ndarray) -> Segments:
        """The runs of rows of `pairs` from `begin` on; each must hold at least one row."""
        snapshot = self.snapshot[pairs]
        return Segments(self.observations, begin, self.end[pairs], self.as_of[snapshot], self.start_time[snapshot])


class Segments:
    """What to compute on: non-empty runs of one code's observations, oldest first, one for each pair.

    Per run: `count`, `first`, `last`, `previous`, `as_of`, `start_time`. Flat over all runs, one after the other:
    `values`, `hours_since_first`, `low`, `high`, `deviation` (from the run's mean). `total`, `lowest`, `highest` reduce
    a flat array to the runs; each run gives the same bits as it would alone.
    """

    def __init__(self, observations, begin, end, as_of, start_time):
        self._observations = observations
        self.begin, self.end, self.as_of, self.start_time = begin, end, as_of, start_time
        self.length = end - begin
        self.count = self.length.astype(np.float64)

    @cached_property
    def _rows(self) -> np.ndarray:
        return _ranges(self.begin, self.length)

    @cached_property
    def _offsets(self) -> np.ndarray:
        return np.cumsum(self.length) - self.length

    def total(self, flat: np.ndarray) -> np.ndarray:
        return np.add.reduceat(flat, self._offsets)

    def lowest(self, flat: np.ndarray) -> np.ndarray:
        return np.minimum.reduceat(flat, self._offsets)

    def highest(self, flat: np.ndarray) -> np.ndarray:
        return np.maximum.reduceat(flat, self._offsets)

    def spread(self, per_run: np.ndarray) -> np.ndarray:
        return np.repeat(per_run, self.length)

    def hours_before(self, row: np.ndarray) -> np.ndarray:
        """Hours from the rows' times to as_of, for one row of each run."""
        return (self.as_of - self._observations.time[row]) / MICROSECONDS_PER_HOUR

    @cached_property
    def first(self) -> np.ndarray:
        return self._observations.value[self.begin]

    @cached_property
    def last(self) -> np.ndarray:
        return self._observations.value[self.end - 1]

    @cached_property
    def previous(self) -> np.ndarray:
        """The value before the last; NaN in a run of one."""
        value = self._observations.value[np.maximum(self.end - 2, self.begin)]
        return np.where(self.length > 1, value, np.nan)

    @cached_property
    def values(self) -> np.ndarray:
        return self._observations.value[self._rows]

    @cached_property
    def hours_since_first(self) -> np.ndarray:
        time = self._observations.time
        return (time[self._rows] - self.spread(time[self.begin])) / MICROSECONDS_PER_HOUR

    @cached_property
    def low(self) -> np.ndarray:
        return self._observations.low[self._rows]

    @cached_property
    def high(self) -> np.ndarray:
        return self._observations.high[self._rows]

    @cached_property
    def mean(self) -> np.ndarray:
        return self.total(self.values) / self.count

    @cached_property
    def minimum(self) -> np.ndarray:
        return self.lowest(self.values)

    @cached_property
    def maximum(self) -> np.ndarray:
        return self.highest(self.values)

    @cached_property
    def deviation(self) -> np.ndarray:
        return self.values - self.spread(self.mean)

    @cached_property
    def std(self) -> np.ndarray:
        return np.sqrt(self.total(self.deviation * self.deviation) / self.count)

    @cached_property
    def weighted_mean(self) -> np.ndarray:
        """Mean with weights that halve every 12 h before the run's last value."""
        hours_before_last = self.spread(self.hours_since_first[np.cumsum(self.length) - 1]) - self.hours_since_first
        weight = np.exp2(hours_before_last / -12)
        return self.total(weight * self.values) / self.total(weight)

    def latest_row(self, hit: np.ndarray) -> np.ndarray:
        """The last row of each run where `hit` (flat) is true; each run must have one."""
        return self.highest(np.where(hit, self._rows, -1))


# ----------------------------------------------------------------------------------------- feature blocks
#
# A statistic is declared once, here: its name, its block, whether the windows block offers it too, what an empty run
# gives, and whether it looks at the latest observation only. Its function takes `Segments` and gives one number for
# each run. To add one, add a function.


@dataclass(frozen=True)
class Statistic:
    name: str
    block: str
    function: Callable[[Segments], np.ndarray]
    windowed: bool
    empty: float
    of_latest: bool  # over the visit so far it needs no more than the latest observation


STATISTICS: dict[str, Statistic] = {}


def _quotient(above: np.ndarray, below: np.ndarray, where: np.ndarray) -> np.ndarray:
    """`above` / `below`; NaN outside `where`, and beyond `LARGEST`: scikit-learn's trees only take float32."""
    with np.errstate(over="ignore"):
        quotient = np.divide(above, below, out=np.full(len(below), np.nan), where=where)
    quotient[np.abs(quotient) > LARGEST] = np.nan
    return quotient


def statistic(block: str, name: str, windowed: bool = False, empty: float = np.nan, of_latest: bool = False):
    def declare(function):
        STATISTICS[name] = Statistic(name, block, function, windowed, empty, of_latest)
        return function

    return declare


@statistic("last", "last", of_latest=True)
def _last(s: Segments) -> np.ndarray:
    """The latest value; of several at the same time the largest."""
    return s.last


@statistic("summary", "min", windowed=True)
def _min(s: Segments) -> np.ndarray:
    """The smallest value."""
    return s.minimum


@statistic("summary", "max", windowed=True)
def _max(s: Segments) -> np.ndarray:
    """The largest value."""
    return s.maximum


@statistic("summary", "mean", windowed=True)
def _mean(s: Segments) -> np.ndarray:
    """The arithmetic mean."""
    return s.mean


@statistic("summary", "std", windowed=True)
def _std(s: Segments) -> np.ndarray:
    """The population standard deviation; 0 for one value."""
    return s.std


@statistic("summary", "count", windowed=True, empty=0.0)
def _count(s: Segments) -> np.ndarray:
    """The number of values; 0 without any."""
    return s.count


@statistic("trend", "slope")
def _slope(s: Segments) -> np.ndarray:
    """Least-squares slope, in units per hour; NaN if all values have the same time."""
    hours = s.hours_since_first
    off = hours - s.spread(s.total(hours) / s.count)
    across = s.total(off * off)
    one_time = s._observations.time[s.begin] == s._observations.time[s.end - 1]
    return _quotient(s.total(off * s.deviation), across, ~one_time)


@statistic("trend", "change")
def _change(s: Segments) -> np.ndarray:
    """Last minus first value; 0 for one value."""
    return s.last - s.first


@statistic("trend", "delta")
def _delta(s: Segments) -> np.ndarray:
    """Last minus previous value; NaN for one value."""
    return s.last - s.previous


@statistic("recency", "age", of_latest=True)
def _age(s: Segments) -> np.ndarray:
    """Hours since last measured."""
    return s.hours_before(s.end - 1)


@statistic("recency", "measured", empty=0.0, of_latest=True)
def _measured(s: Segments) -> np.ndarray:
    """1 if measured in the visit so far, else 0."""
    return np.ones(len(s.count))


@statistic("recency", "rate", empty=0.0)
def _rate(s: Segments) -> np.ndarray:
    """Values per hour of the visit so far, which counts as one hour at least; 0 without any."""
    return s.count / np.maximum((s.as_of - s.start_time) / MICROSECONDS_PER_HOUR, 1.0)


@statistic("recency", "gap")
def _gap(s: Segments) -> np.ndarray:
    """Hours between the last two values; NaN for one value."""
    gap = s.hours_before(np.maximum(s.end - 2, s.begin)) - s.hours_before(s.end - 1)
    return np.where(s.length > 1, gap, np.nan)


@statistic("reference", "outside", of_latest=True)
def _outside(s: Segments) -> np.ndarray:
    """Distance of the last value from its reference range, in range widths: negative below, 0 inside.

    With only one bound, the width is the size of that bound. NaN without a range, or if the width is (nearly) 0.
    """
    row = s.end - 1
    low, high = s._observations.low[row], s._observations.high[row]
    no_low, no_high = np.isnan(low), np.isnan(high)
    width = np.where(no_low, np.abs(high), np.where(no_high, np.abs(low), high - low))
    distance = np.where(s.last < low, s.last - low, np.where(s.last > high, s.last - high, 0.0))
    return _quotient(distance, width, width > 0)


@statistic("reference", "share_below")
def _share_below(s: Segments) -> np.ndarray:
    """Share of values below their lower bound, among those that have one; NaN if none has."""
    return _share(s, s.values < s.low, s.low)


@statistic("reference", "share_above")
def _share_above(s: Segments) -> np.ndarray:
    """Share of values above their upper bound, among those that have one; NaN if none has."""
    return _share(s, s.values > s.high, s.high)


def _share(s: Segments, hit: np.ndarray, bound: np.ndarray) -> np.ndarray:
    bounded = s.total((~np.isnan(bound)).astype(np.float64))
    return np.divide(s.total(hit.astype(np.float64)), bounded, out=np.full(len(bounded), np.nan), where=bounded > 0)


@statistic("variability", "range")
def _range(s: Segments) -> np.ndarray:
    """Largest minus smallest value; 0 for one value."""
    return s.maximum - s.minimum


@statistic("variability", "cv")
def _cv(s: Segments) -> np.ndarray:
    """Coefficient of variation: population standard deviation over the absolute mean; NaN if the mean is 0, or so
    close to it (a billionth of the largest value) that the difference may be rounding."""
    size = np.abs(s.mean)
    largest = np.maximum(np.abs(s.minimum), np.abs(s.maximum))
    return np.divide(s.std, size, out=np.full(len(size), np.nan), where=size > 1e-9 * largest)


@statistic("variability", "mean_abs_change")
def _mean_abs_change(s: Segments) -> np.ndarray:
    """Mean absolute difference of consecutive values; NaN for one value."""
    step = np.abs(np.diff(s.values, prepend=s.values[:1]))
    step[s._offsets] = 0.0
    steps = s.count - 1
    return np.divide(s.total(step), steps, out=np.full(len(steps), np.nan), where=steps > 0)


# Deviation: how far the latest value is from the patient's own past.


@statistic("deviation", "departure", windowed=True)
def _departure(s: Segments) -> np.ndarray:
    """Last value minus the mean; over a window: minus the window's mean."""
    return s.last - s.mean


@statistic("deviation", "zscore")
def _zscore(s: Segments) -> np.ndarray:
    """Last value minus the mean, in population standard deviations; NaN if the values do not vary."""
    varies = s.std > 1e-9 * np.maximum(np.abs(s.minimum), np.abs(s.maximum))  # beyond rounding
    return np.divide(s.last - s.mean, s.std, out=np.full(len(s.std), np.nan), where=varies)


@statistic("deviation", "ewm")
def _ewm(s: Segments) -> np.ndarray:
    """Exponentially weighted mean: weights halve every 12 h before the last value."""
    return s.weighted_mean


@statistic("deviation", "departure_ewm")
def _departure_ewm(s: Segments) -> np.ndarray:
    """Last value minus `ewm`."""
    return s.last - s.weighted_mean


@statistic("deviation", "hours_since_max")
def _hours_since_max(s: Segments) -> np.ndarray:
    """Hours since the largest value; the latest, if there are several."""
    return s.hours_before(s.latest_row(s.values == s.spread(s.maximum)))


@statistic("deviation", "hours_since_min")
def _hours_since_min(s: Segments) -> np.ndarray:
    """Hours since the smallest value; the latest, if there are several."""
    return s.hours_before(s.latest_row(s.values == s.spread(s.minimum)))


CLINICAL_HOURS = 24  # how far back the clinical scores look, but for the latest value of a static concept


class Concepts:
    """Clinical quantities of many snapshots: all codes of a concept together, NaN without a value."""

    def __init__(self, snapshots: Snapshots):
        self._snapshots = snapshots
        self._concept = snapshots.observations.concept_of_code[snapshots.code]  # of each pair, -1 for none
        self._known: dict[Callable[[Concepts], np.ndarray], np.ndarray] = {}

    def once(self, compute: Callable[[Concepts], np.ndarray]) -> np.ndarray:
        """What `compute` makes of these concepts; computed at the first call."""
        if compute not in self._known:
            self._known[compute] = compute(self)
        return self._known[compute]

    def latest(self, name: str) -> np.ndarray:
        """The latest value of the last 24 h (of a static concept: of the visit); of several at one time the largest."""
        return self._latest[_CONCEPT_PLACE[name]]

    @cached_property
    def _latest(self) -> np.ndarray:
        """(n_concepts, n_snapshots)"""
        shots = self._snapshots
        start = np.where(_STATIC[self._concept], shots.begin, shots.window_start(CLINICAL_HOURS))
        pairs = np.flatnonzero((self._concept >= 0) & (start < shots.end))
        row = shots.end[pairs] - 1
        value = shots.observations.value[row]
        if shots.observations.concepts_have_several_codes:  # assignment below: the last of several wins
            order = np.lexsort((value, shots.observations.time[row]))
            pairs, value = pairs[order], value[order]
        out = np.full((len(CONCEPTS), len(shots.as_of)), np.nan)
        out[self._concept[pairs], shots.snapshot[pairs]] = value
        return out

    def lowest(self, name: str) -> np.ndarray:
        """The smallest value of the last 24 h, of a concept of `SOFA_BANDS`."""
        return self._extremes[0, _CONCEPT_PLACE[name]]

    def highest(self, name: str) -> np.ndarray:
        """The largest value of the last 24 h, of a concept of `SOFA_BANDS`."""
        return self._extremes[1, _CONCEPT_PLACE[name]]

    @cached_property
    def _extremes(self) -> np.ndarray:
        """(2, n_concepts, n_snapshots) the smallest and the largest value of the concepts of `SOFA_BANDS`."""
        shots = self._snapshots
        out = np.full((2, len(CONCEPTS), len(shots.as_of)), np.nan)
        begin = shots.window_start(CLINICAL_HOURS)
        pairs = np.flatnonzero(_IN_SOFA[self._concept] & (begin < shots.end))
        if len(pairs):
            segments, place = shots.segments(pairs, begin[pairs]), (self._concept[pairs], shots.snapshot[pairs])
            np.fmin.at(out[0], place, segments.minimum)
            np.fmax.at(out[1], place, segments.maximum)
        return out


class _Inputs:
    """Replaces `Concepts` to find out which concepts a clinical feature asks for."""

    def __init__(self):
        self.names: set[str] = set()

    def once(self, compute: Callable[[Any], np.ndarray]) -> np.ndarray:
        return compute(self)

    def latest(self, name: str) -> np.ndarray:
        self.names.add(name)
        return np.full(1, np.nan)

    lowest = highest = latest


@lru_cache(maxsize=256)
def clinical_inputs(name: str) -> frozenset[str]:
    """The names of the concepts that a clinical feature is computed from."""
    inputs = _Inputs()
    CLINICAL[name].function(inputs)
    return frozenset(inputs.names)


@dataclass(frozen=True)
class Clinical:
    """A feature: one row of what a function of `Concepts` returns, (n_snapshots,) or (n_rows, n_snapshots)."""

    function: Callable[[Any], np.ndarray]
    row: int = 0


CLINICAL: dict[str, Clinical] = {}
FOR_COMPARISON: set[str] = set()  # those of them that no block makes: evaluation compares the model with them


def clinical(name: str, in_block: bool = True):
    def declare(function):
        CLINICAL[name] = Clinical(function)
        if not in_block:
            FOR_COMPARISON.add(name)
        return function

    return declare


def clinical_score(name: str, *parts: str, in_block: bool = True):
    """Declares a sum of parts as several features.

    `<name>`: the sum of the parts whose inputs are known, NaN if none are; `<name>_parts`: the number of those
    parts; `<name>_<part>`: each part's points, NaN if its inputs are missing. With `in_block=False` the block
    ``clinical`` does not make them: models keep the features that they have.
    """

    def declare(function):
        def rows(c: Concepts) -> np.ndarray:
            """(2 + n_parts, n_snapshots): the sum, the number of known parts, the points of each part."""
            points = np.array(list(function(c)))
            missing = np.isnan(points)
            known = np.add.reduce(~missing, axis=0, dtype=np.float64)
            total = np.add.reduce(np.where(missing, 0.0, points), axis=0)
            return np.concatenate([[np.where(known > 0, total, np.nan), known], points])

        for i, suffix in enumerate(("", "_parts", *(f"_{part}" for part in parts))):
            CLINICAL[name + suffix] = Clinical(rows, i)
            if not in_block:
                FOR_COMPARISON.add(name + suffix)
        return function

    return declare


def _points(value: np.ndarray, edges: Sequence[float], points: Sequence[float], side: str = "left") -> np.ndarray:
    """Points by band, NaN for NaN; with side "left" an edge belongs to the band below it, with "right" above."""
    edges, points = _bands(tuple(edges), tuple(points))
    return points[edges.searchsorted(value, side)]


@lru_cache(maxsize=128)
def _bands(edges: tuple[float, ...], points: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """With a last band for NaN, which sorts after infinity."""
    return np.array([*edges, np.inf]), np.array([*points, np.nan])


def _either(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 if one of two criteria (1, 0 or NaN) is 1, 0 if none of the known ones is, NaN if both are NaN."""
    return np.fmax(a, b)


@clinical_score("sirs", "temperature", "heart_rate", "respiration", "wbc")
def _sirs(c: Concepts):
    """Systemic inflammatory response syndrome criteria, Bone et al., Chest 1992;101:1644, doi 10.1378/chest.101.6.1644.

    Temperature > 38 or < 36 °C; heart rate > 90; respiratory rate > 20 or PaCO2 < 32 mmHg; white count > 12 or
    < 4 (bands are not known).
    """
    temperature, wbc = c.latest("temperature"), c.latest("wbc")
    yield np.where(np.isnan(temperature), np.nan, (temperature > 38) | (temperature < 36))
    yield _points(c.latest("heart_rate"), [90], [0, 1])
    yield _either(
        _points(c.latest("respiratory_rate"), [20], [0, 1]), _points(c.latest("paco2"), [32], [1, 0], "right")
    )
    yield np.where(np.isnan(wbc), np.nan, (wbc > 12) | (wbc < 4))


@clinical_score("qsofa", "respiration", "blood_pressure", "mentation")
def _qsofa(c: Concepts):
    """Quick SOFA, Singer et al., JAMA 2016;315:801, doi 10.1001/jama.2016.0287; Seymour et al., JAMA 2016;315:762.

    Respiratory rate >= 22; systolic pressure <= 100 mmHg; Glasgow coma scale < 15.
    """
    yield _points(c.latest("respiratory_rate"), [22], [0, 1], "right")
    yield _points(c.latest("systolic_bp"), [100], [1, 0])
    yield _points(c.latest("gcs"), [15], [1, 0], "right")


@clinical_score(
    "news2",
    "respiration",
    "oxygen_saturation",
    "oxygen",
    "blood_pressure",
    "pulse",
    "consciousness",
    "temperature",
)
def _news2(c: Concepts):
    """National Early Warning Score 2, Royal College of Physicians, London 2017 (SpO2 scale 1).

    Supplemental oxygen is taken from FiO2 > 0.21, consciousness from a Glasgow coma scale < 15.
    """
    yield _points(c.latest("respiratory_rate"), [8, 11, 20, 24], [3, 1, 0, 2, 3])
    yield _points(c.latest("spo2"), [91, 93, 95], [3, 2, 1, 0])
    yield _points(c.latest("fio2"), [0.21], [0, 2])
    yield _points(c.latest("systolic_bp"), [90, 100, 110, 219], [3, 2, 1, 0, 3])
    yield _points(c.latest("heart_rate"), [40, 50, 90, 110, 130], [3, 1, 0, 1, 2, 3])
    yield _points(c.latest("gcs"), [15], [3, 0], "right")
    yield _points(c.latest("temperature"), [35, 36, 38, 39], [3, 1, 0, 1, 2])


# SOFA, Vincent et al., doi 10.1007/BF01709751: what is measured -> edges, points; an edge belongs to the band above.
SOFA_BANDS: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = {
    "pf_ratio": ((100, 200, 300, 400), (4, 3, 2, 1, 0)),  # 3 and 4 only with ventilation
    "platelets": ((20, 50, 100, 150), (4, 3, 2, 1, 0)),
    "bilirubin_total": ((1.2, 2.0, 6.0, 12.0), (0, 1, 2, 3, 4)),
    "mean_bp": ((70,), (1, 0)),
    "gcs": ((6, 10, 13, 15), (4, 3, 2, 1, 0)),
    "creatinine": ((1.2, 2.0, 3.5, 5.0), (0, 1, 2, 3, 4)),
}
_IN_SOFA = np.array([concept.name in SOFA_BANDS for concept in CONCEPTS] + [False])  # the last for -1
SOFA_UNVENTILATED = 2  # the most that respiration scores without ventilation


def _sofa_points(measured: str, value: np.ndarray) -> np.ndarray:
    return _points(value, *SOFA_BANDS[measured], "right")


@clinical_score("sofa", "respiration", "coagulation", "liver", "cardiovascular", "nervous", "renal")
def _partial_sofa(c: Concepts):
    """Partial SOFA, Vincent et al., Intensive Care Med 1996;22:707, doi 10.1007/BF01709751: worst of 24 h, but
    respiration by the latest ratio.

    Observations do not show ventilation, vasopressors and urine output: respiration gives at most 2 points, circulation
    at most 1, and urine is not counted. If PaO2 is missing, SpO2/FiO2 replaces it, with 512 for 400 and 357 for 300
    (Pandharipande et al., Crit Care Med 2009;37:1317).
    """
    with_pao2 = np.minimum(_sofa_points("pf_ratio", c.once(pf_ratio)), SOFA_UNVENTILATED)
    with_spo2 = _points(c.once(sf_ratio), [357, 512], [2, 1, 0], "right")
    yield np.where(np.isnan(with_pao2), with_spo2, with_pao2)
    yield _sofa_points("platelets", c.lowest("platelets"))
    yield _sofa_points("bilirubin_total", c.highest("bilirubin_total"))
    yield _sofa_points("mean_bp", c.lowest("mean_bp"))
    yield _sofa_points("gcs", c.lowest("gcs"))
    yield _sofa_points("creatinine", c.highest("creatinine"))


@clinical_score("mews", "respiration", "pulse", "blood_pressure", "temperature", "consciousness", in_block=False)
def _mews(c: Concepts):
    """Modified Early Warning Score, Subbe et al., QJM 2001;94:521, doi 10.1093/qjmed/94.10.521.

    Consciousness (alert, voice, pain, unresponsive) is taken from the Glasgow coma scale by the medians 15, 13, 8 and 6
    (McNarry and Goldhill, Anaesthesia 2004;59:34, doi 10.1111/j.1365-2044.2004.03526.x): 15; 11 to 14; 7 to 10; up to
    6. As in NEWS2, only 15 is alert.
    """
    yield _points(c.latest("respiratory_rate"), [9, 15, 21, 30], [2, 0, 1, 2, 3], "right")
    yield _points(c.latest("heart_rate"), [40, 50, 100, 110, 129], [2, 1, 0, 1, 2, 3])
    systolic = c.latest("systolic_bp")
    yield np.where(systolic >= 200, 2.0, _points(systolic, [70, 80, 100], [3, 2, 1, 0]))
    yield _points(c.latest("temperature"), [35, 38.5], [2, 0, 2], "right")
    yield _points(c.latest("gcs"), [6, 10, 14], [3, 2, 1, 0])


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return _quotient(above, below, below > 0)


@clinical("shock_index")
def shock_index(c: Concepts) -> np.ndarray:
    """Heart rate over systolic pressure, Allgöwer and Burri, Dtsch Med Wochenschr 1967;92:1947."""
    return _ratio(c.latest("heart_rate"), c.latest("systolic_bp"))


@clinical("pulse_pressure")
def pulse_pressure(c: Concepts) -> np.ndarray:
    """Systolic minus diastolic pressure, mmHg."""
    return c.latest("systolic_bp") - c.latest("diastolic_bp")


@clinical("bun_creatinine")
def bun_creatinine(c: Concepts) -> np.ndarray:
    """Urea nitrogen over creatinine, both in mg/dL."""
    return _ratio(c.latest("bun"), c.latest("creatinine"))


@clinical("sf_ratio")
def sf_ratio(c: Concepts) -> np.ndarray:
    """SpO2 (percent) over FiO2 (fraction), Rice et al., Chest 2007;132:410, doi 10.1378/chest.07-0617."""
    return _ratio(c.latest("spo2"), c.latest("fio2"))


@clinical("pf_ratio")
def pf_ratio(c: Concepts) -> np.ndarray:
    """PaO2 (mmHg) over FiO2 (fraction)."""
    return _ratio(c.latest("pao2"), c.latest("fio2"))


@dataclass(frozen=True)
class Context:
    function: Callable[[Snapshots], np.ndarray]
    look_back: float | None  # hours; None: the whole visit


CONTEXT: dict[str, Context] = {}


def context(name: str, look_back: float | None):
    """Declares a feature of a snapshot's circumstances. It looks at `look_back` hours before `as_of`, or at the whole
    visit (None)."""

    def declare(function):
        CONTEXT[name] = Context(function, look_back)
        return function

    return declare


@context("hours", look_back=None)
def _hours(s: Snapshots) -> np.ndarray:
    """Hours since the visit's first observation."""
    return (s.as_of - s.start_time) / MICROSECONDS_PER_HOUR


@context("types", look_back=None)
def _types(s: Snapshots) -> np.ndarray:
    """Number of different codes observed in the visit so far."""
    return s.types_within(None)


@context("observations_6h", look_back=6)
def _observations_6h(s: Snapshots) -> np.ndarray:
    """Number of observations of any code in the last 6 h."""
    return s.observations_within(6)


@context("observations_24h", look_back=24)
def _observations_24h(s: Snapshots) -> np.ndarray:
    """Number of observations of any code in the last 24 h."""
    return s.observations_within(24)


@context("types_6h", look_back=6)
def _types_6h(s: Snapshots) -> np.ndarray:
    """Number of different codes observed in the last 6 h."""
    return s.types_within(6)


@context("types_24h", look_back=24)
def _types_24h(s: Snapshots) -> np.ndarray:
    """Number of different codes observed in the last 24 h."""
    return s.types_within(24)


@context("hour_of_day", look_back=0)
def _hour_of_day(s: Snapshots) -> np.ndarray:
    """Hour of the day of as_of, with its fraction, as the data have it; UTC for times with a zone."""
    return (s.as_of % (24 * MICROSECONDS_PER_HOUR)) / MICROSECONDS_PER_HOUR


DEFAULT_WINDOWS = (6, 12, 24)
BLOCKS = (*dict.fromkeys(s.block for s in STATISTICS.values()), "windows", "clinical", "context")


@dataclass(frozen=True)
class Feature:
    """A parsed feature name: a code's statistic (over the last `window` hours, or the visit so far), or a named
    feature of the clinical or the context block (`code` None)."""

    block: str
    name: str
    code: str | None = None
    window: int | None = None

    def __str__(self) -> str:
        window = f"__{self.window}h" if self.window else ""
        return f"{self.block if self.code is None else self.code}__{self.name}{window}"


def parse_feature(text: str) -> Feature:
    """The feature that a name asks for.

    >>> parse_feature("HR__mean__6h")
    Feature(block='windows', name='mean', code='HR', window=6)
    >>> parse_feature("clinical__sirs")
    Feature(block='clinical', name='sirs', code=None, window=None)

    Raises `BadConfig` if no block makes such a feature.
    """
    head, _, tail = text.rpartition("__")
    if head == "clinical" and tail in CLINICAL:
        return Feature("clinical", tail)
    if head == "context" and tail in CONTEXT:
        return Feature("context", tail)
    if head and tail in STATISTICS:
        return Feature(STATISTICS[tail].block, tail, head)
    if re.fullmatch(r"[1-9][0-9]{0,4}h", tail):
        code, _, name = head.rpartition("__")
        if code and name in STATISTICS and STATISTICS[name].windowed:
            return Feature("windows", name, code, int(tail[:-1]))
    raise BadConfig(f"unknown feature {text!r}; expected <code>__<statistic>, clinical__<score> or context__<name>")


def block_features(
    block: str,
    codes: Iterable[str],
    windows: Iterable[int] = DEFAULT_WINDOWS,
    synonyms: Mapping[str, str] | None = None,
) -> list[str]:
    """The names of all features that a block makes of `codes`. Static codes (age, sex) are `last` only."""
    if block == "clinical":
        return [str(Feature(block, name)) for name in CLINICAL if name not in FOR_COMPARISON]
    if block == "context":
        return [str(Feature(block, name)) for name in CONTEXT]
    if block not in BLOCKS:
        raise BadConfig(f"unknown feature block {block!r}; known: {', '.join(BLOCKS)}")
    if block != "last":
        codes = [code for code in codes if not ((concept := concept_of(code, synonyms)) and concept.static)]
    if block == "windows":
        names = [s.name for s in STATISTICS.values() if s.windowed]
        return [str(Feature(block, n, code, w)) for code in codes for w in windows for n in names]
    names = [s.name for s in STATISTICS.values() if s.block == block]
    return [str(Feature(block, name, code)) for code in codes for name in names]


# ------------------------------------------------------------------------------------------- evaluation

_PAIRS_AT_ONCE = 1 << 15  # bounds the memory of one chunk, and keeps it in the cache; the numbers do not depend on it
_ROWS_AT_ONCE = 1 << 15


def _parts(sizes: np.ndarray, at_once: int) -> list[tuple[int, int]]:
    """Neighbours whose sizes add up to about `at_once`: (start, end) of each part."""
    if not len(sizes):
        return []
    if sizes.sum() < at_once:
        return [(0, len(sizes))]
    chunk = np.cumsum(sizes) // at_once
    cuts = np.flatnonzero(chunk[1:] != chunk[:-1]) + 1
    return list(pairwise([0, *cuts.tolist(), len(sizes)]))


@dataclass(frozen=True)
class _Task:
    """Statistics that are computed together: all of them in the same windows, of the same codes."""

    windows: list[int | None]
    functions: list[Callable[[Segments], np.ndarray]]
    columns: np.ndarray  # (n_functions, n_windows, n_codes) of the features; -1 for a code that is not asked for


class FeaturePlan:
    """A parsed list of feature names. `evaluate` computes these features and no others."""

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        if len(set(self.names)) != len(self.names):
            raise BadConfig("a feature name occurs twice")
        features = [parse_feature(name) for name in self.names]
        self.codes = sorted({f.code for f in features if f.code is not None})
        place = {code: i for i, code in enumerate(self.codes)}
        columns: dict[tuple[int | None, str], np.ndarray] = {}  # of each code (-1: not asked for)
        self.clinical: dict[str, int] = {}
        self.context: dict[str, int] = {}
        self.empty = np.full(len(features), np.nan)
        for column, feature in enumerate(features):
            if feature.code is None:
                (self.clinical if feature.block == "clinical" else self.context)[feature.name] = column
            else:
                of_codes = columns.setdefault((feature.window, feature.name), np.full(len(self.codes), -1))
                of_codes[place[feature.code]] = column
                self.empty[column] = STATISTICS[feature.name].empty
        looks = [CLINICAL_HOURS] if self.clinical else [0]
        looks += [CONTEXT[name].look_back for name in self.context]
        looks += [window for window, name in columns if window is not None or not STATISTICS[name].of_latest]
        # hours before as_of beyond which only the latest observation of each code counts; None: all observations count
        self.look_back: float | None = None if None in looks else float(max(looks))
        of_function: dict[Callable[[Any], np.ndarray], list[tuple[int, int]]] = {}
        for name, column in self.clinical.items():
            of_function.setdefault(CLINICAL[name].function, []).append((CLINICAL[name].row, column))
        self._clinical = [(function, *np.array(rows).T) for function, rows in of_function.items()]
        # windows with the same statistics of the same codes are one task
        of_codes_and_window: dict[tuple[bytes, int | None], list[str]] = {}
        for (window, name), of_codes in columns.items():
            of_codes_and_window.setdefault(((of_codes >= 0).tobytes(), window), []).append(name)
        windows: dict[tuple[bytes, tuple[str, ...]], list[int | None]] = {}
        for (codes, window), statistics in of_codes_and_window.items():
            windows.setdefault((codes, tuple(statistics)), []).append(window)
        self._tasks = [
            _Task(
                of_task,
                [STATISTICS[name].function for name in statistics],
                np.array([[columns[window, name] for window in of_task] for name in statistics]),
            )
            for (_, statistics), of_task in windows.items()
        ]

    def evaluate(
        self,
        observations: Observations,
        visit: np.ndarray,
        as_of: np.ndarray,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """The features of snapshots.

        `visit` (n_snapshots,) index into the visits, `as_of` (n_snapshots,) microseconds since 1970. Gives float64
        (n_snapshots, n_features), column-major; NaN where empty, a whole row of NaN where the snapshot has no
        observation at all. Each snapshot's numbers are the same alone or among others. `out` (n_features, n_snapshots)
        may name where to write them, such as a file in memory.
        """
        visit, as_of = np.asarray(visit, dtype=np.int64), np.asarray(as_of, dtype=np.int64)
        out = np.empty((len(self.names), len(visit))) if out is None else out
        if not len(visit):
            return out.T
        ascending = bool(np.all(visit[1:] >= visit[:-1]))
        order = None if ascending else np.argsort(visit, kind="stable")
        if order is not None:
            visit, as_of = visit[order], as_of[order]
        place = {code: i for i, code in enumerate(self.codes)}
        own_code = np.array([place.get(code, -1) for code in observations.codes], dtype=np.int64)

        n_groups = observations.visit_group_start[visit + 1] - observations.visit_group_start[visit]
        for part in _parts(n_groups, _PAIRS_AT_ONCE):
            self._fill_part(part, out, observations, visit, as_of, own_code)
        if order is not None:
            out[:, order] = out.copy()
        return out.T

    def _fill_part(self, part: tuple[int, int], out, observations, visit, as_of, own_code) -> None:
        """Writes the features of the snapshots from `part[0]` to `part[1]`."""
        rows = slice(*part)
        try:
            self._fill(out[:, rows], observations, visit[rows], as_of[rows], own_code)
        except OverflowError:  # stays of centuries: fewer visits at once
            middle = sum(part) // 2
            if middle == part[0]:
                raise BadObservations("a visit spans too many years; check its dates") from None
            for half in ((part[0], middle), (middle, part[1])):
                self._fill_part(half, out, observations, visit, as_of, own_code)

    def _fill(self, out, observations, visit, as_of, own_code) -> None:
        """Writes the features of some snapshots to `out` (n_features, n_snapshots)."""
        shots = Snapshots(observations, visit, as_of)
        out[:] = self.empty[:, None]
        code = own_code[shots.code]
        # code after code: neighbouring results then stand side by side in the column-major output
        by_code = np.argsort(code.astype(np.int16), kind="stable")
        by_code = by_code[np.count_nonzero(code < 0) :]
        for task in self._tasks:
            begin = np.array([shots.window_start(window) for window in task.windows])
            wanted = by_code[task.columns[0, 0, code[by_code]] >= 0]
            window, place = np.nonzero(begin[:, wanted] < shots.end[wanted])
            pairs = wanted[place]
            begin = begin[window, pairs]
            for some in _parts(shots.end[pairs] - begin, _ROWS_AT_ONCE):
                part = slice(*some)
                segments = shots.segments(pairs[part], begin[part])
                values = np.array([function(segments) for function in task.functions])
                out[task.columns[:, window[part], code[pairs[part]]], shots.snapshot[pairs[part]]] = values
        if self.clinical:
            concepts = Concepts(shots)
            for function, rows, columns in self._clinical:
                out[columns] = concepts.once(function).reshape(-1, len(visit))[rows]
        for name, column in self.context.items():
            out[column] = CONTEXT[name].function(shots)
        out[:, ~shots.usable] = np.nan


# ------------------------------------------------------------------------------------ configuration, snapshots


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _are_thresholds(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"medium", "high"}
        and all(map(_is_number, value.values()))
        and 0 < value["medium"] < value["high"] < 1
    )


def _is_golden(value: Any) -> bool:
    """Observations and a probability (null before training) of one visit, each feature a number or null."""
    if not isinstance(value, dict) or not {"observations", "features", "probability"} <= set(value):
        return False
    rows, probability = value["features"], value["probability"]
    return (
        isinstance(value["observations"], list)
        and isinstance(rows, list)
        and len(rows) == 1
        and isinstance(rows[0], list)
        and all(v is None or _is_number(v) for v in rows[0])
        and (probability is None or (isinstance(probability, list) and list(map(_is_share, probability)) == [True]))
    )


MOST_HOURS = 1_000_000  # between snapshots, or before onset: more than a life


@dataclass(frozen=True)
class SnapshotSettings:
    """When a visit is scored in training, and which snapshots are positive. Hours.

    Raises `ValueError` beyond `MOST_HOURS`.
    """

    every_hours: float = 6.0
    horizon_hours: float = 6.0
    after_onset: bool = False  # also take snapshots after onset, as positives
    retrospective: bool = False  # no onsets: one snapshot at the end of each visit

    def __post_init__(self):
        if not (0 < self.every_hours <= MOST_HOURS and 0 <= self.horizon_hours <= MOST_HOURS):
            raise ValueError(f"snapshots every {self.every_hours} h, horizon {self.horizon_hours} h")


@dataclass(frozen=True)
class MinimumEvidence:
    """What a snapshot needs for a probability: `at_least` of the `inputs` (names of concepts, or codes without one)
    measured in the last `within_hours`, the newest of them no older than `newest_hours`, nor the newest observation
    that the model uses.

    Raises `ValueError` if that is impossible.
    """

    inputs: list[str]
    at_least: int
    within_hours: float
    newest_hours: float

    def __post_init__(self):
        if not 0 <= self.at_least <= len(set(self.inputs)) or not (self.within_hours > 0 and self.newest_hours > 0):
            raise ValueError(f"{self.at_least} of {len(self.inputs)} within {self.within_hours} h")


def _key(does: Callable[[Any], bool], expected: str, **default: Any) -> Any:
    """A field of `Config` with its check and what is expected, in words. With a default it may be absent or null."""
    return field(metadata={"does": does, "expected": expected}, **default)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


@dataclass(frozen=True)
class Config:
    """The content of ``best_model_config.json``: everything that features and scores depend on, and facts about the
    model. All scripts read it through this class."""

    schema_version: int = _key(lambda v: v == SCHEMA_VERSION, f"schema version {SCHEMA_VERSION}")
    feature_set: str = _key(_is_text, "a text")
    blocks: list[str] = _key(_are_texts, "a list of texts")
    windows: list[int] = _key(
        lambda v: isinstance(v, list) and all(type(w) is int and 0 < w < 100_000 for w in v), "a list of whole hours"
    )
    codes: list[str] = _key(_are_texts, "a list of texts")
    feature_names: list[str] = _key(lambda v: _are_texts(v) and len(v) > 0, "a list of texts, not empty")
    model: dict[str, Any] = _key(
        lambda v: _is_table(v) and _is_text(v.get("name")), "a model configuration with its name"
    )
    snapshots: SnapshotSettings = _key(_is_table, "the settings of the snapshots")
    risk_thresholds: dict[str, float] = _key(_are_thresholds, "0 < medium < high < 1")
    decision_threshold: float = _key(_is_share, "a number from 0 to 1")
    golden: dict[str, Any] = _key(
        _is_golden, "one visit's observations, features and probability, as search and training wrote them"
    )
    seed: int = _key(lambda v: type(v) is int and v >= 0, "a whole number from 0")
    data: dict[str, Any] = _key(
        lambda v: _is_table(v) and {"observations", "labels", "synthetic", "fingerprint"} <= set(v),
        "the observations and labels of the search, with their fingerprint",
    )
    metrics: dict[str, Any] = _key(_is_table, "figures by name")
    thresholds: dict[str, Any] = _key(  # the rule, the curves it reads, by whom, when and why it was set
        _is_table, "how the risk thresholds were chosen", default_factory=dict
    )
    decision_sensitivity: float | None = _key(_is_share, "a number from 0 to 1, or null", default=None)
    synonyms: dict[str, str] = _key(_is_table, "a concept for each code", default_factory=dict)
    portable: bool = _key(lambda v: type(v) is bool, "true or false", default=False)  # the codes are names of concepts
    fill_value: float | None = _key(_is_number, "a number or null", default=None)
    model_version: str | None = _key(
        lambda v: _is_text(v) and Path(v).name == v, "the name of a version or null", default=None
    )  # names a folder of the archive
    model_sha256: str | None = _key(_is_text, "a text or null", default=None)
    code_prevalence: dict[str, float] = _key(
        lambda v: _is_table(v) and all(map(_is_share, v.values())), "a share for each code", default_factory=dict
    )
    loss_without_code: dict[str, float] = _key(
        lambda v: _is_table(v) and all(map(_is_number, v.values())), "a number for each code", default_factory=dict
    )
    observed_codes: list[str] = _key(_are_texts, "a list of texts", default_factory=list)  # all of the training data
    minimum_evidence: MinimumEvidence | None = _key(_is_table, "the least that a score needs, or null", default=None)
    rank_by: str = _key(_is_text, "a text", default="score")
    library_versions: dict[str, str] = _key(_is_table, "a version for each library", default_factory=dict)
    trained_at: str | None = _key(_is_text, "a time, ISO 8601", default=None)
    trained_on: dict[str, Any] = _key(_is_table, "the data of the training", default_factory=dict)
    retrained_with: list[str] = _key(_are_texts, "fingerprints of data", default_factory=list)
    adapted: dict[str, Any] = _key(_is_table, "the parent, and how it was adapted", default_factory=dict)
    reference_profile: dict[str, Any] = _key(_is_table, "the distributions in training", default_factory=dict)

    @property
    def training_source(self) -> dict[str, Any]:
        """What the model was trained on: ``observations``, ``labels`` (paths, None for the demo cohort), ``synthetic``,
        ``fingerprint``, ``description``; before training, what the search used."""
        return {**self.data, **self.trained_on}

    @property
    def training_codes(self) -> Codes:
        """How observations are read to train the model, anew or further."""
        return Codes.by_concept(self.synonyms) if self.portable else Codes(self.synonyms)

    def text(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def load_config(path: str | Path) -> Config:
    """Reads and checks ``best_model_config.json``. Raises `BadConfig` with what is wrong and what to do."""
    where = f"config {str(path)!r}"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError:
        raise BadConfig(f"{where} does not exist; run generate_features.py first") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadConfig(f"{where} cannot be read as JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict) or "schema_version" not in found:
        raise BadConfig(f"{where} has no schema_version; it was not written by generate_features.py")
    if found["schema_version"] != SCHEMA_VERSION:
        raise BadConfig(
            f"{where} has schema version {found['schema_version']!r}, this code reads version {SCHEMA_VERSION}; "
            "search and train again, or use the code the config was made with"
        )
    known = {key.name: key for key in fields(Config)}
    if unknown := sorted(found.keys() - known.keys()):
        raise BadConfig(f"{where} has unknown keys: {listed(unknown)}; search and train again")
    for name, key in known.items():
        absent = found.get(name) is None
        required = key.default is MISSING and key.default_factory is MISSING
        if required if absent else not key.metadata["does"](found[name]):
            wrong = "is missing" if absent else "is not as it must be"
            raise BadConfig(f"{where}: {name!r} {wrong}; expected {key.metadata['expected']}; search and train again")
    given = {name: value for name, value in found.items() if value is not None}
    for name, kind in (("snapshots", SnapshotSettings), ("minimum_evidence", MinimumEvidence)):
        try:
            if name in given:
                given[name] = kind(**given[name])
        except (TypeError, ValueError) as error:
            raise BadConfig(f"{where}: {name!r} is wrong ({error}); search and train again") from None
    config = Config(**given)
    if config.model.get("fill_value") != config.fill_value:
        raise BadConfig(f"{where}: 'fill_value' differs from the model's; search and train again")
    check_synonyms(config.synonyms, where)
    return config


def check_synonyms(synonyms: Any, where: str) -> None:
    """Raises `BadConfig` unless `synonyms` maps codes to names of `CONCEPTS`."""
    if not isinstance(synonyms, dict) or not all(isinstance(name, str) for name in synonyms.values()):
        raise BadConfig(f"{where}: 'synonyms' must map codes to names of concepts")
    for code, name in synonyms.items():
        if name not in CONCEPT:
            raise BadConfig(
                f"{where}: synonym {code!r} names the unknown concept {name!r}; known: {listed(CONCEPT, 60)}"
            )


def _stamp(path: str | Path) -> tuple[int, ...]:
    """Changes when the file is replaced or written to."""
    try:
        stat = Path(path).stat()
    except OSError:
        return ()
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def to_micros(moment: Any) -> int:
    """One moment (ISO 8601 text, datetime, Timestamp) as microseconds since 1970 UTC."""
    times, _ = parse_times(pd.Series([moment]))
    if times[0] == NO_TIME:
        raise BadObservations(f"as_of {str(moment)!r} is not an ISO 8601 date between 1900 and 2299")
    return int(times[0])


def iso_times(micros: np.ndarray) -> list[str | None]:
    """Microseconds since 1970 as ISO 8601 texts in UTC, without needless fractions; None for NO_TIME."""
    texts = np.asarray(micros, dtype=np.int64).astype("datetime64[us]").astype(str).tolist()
    return [None if text == "NaT" else text.removesuffix(".000000") + "Z" for text in texts]


def resolve_snapshots(observations: Observations, as_of: Any = None) -> tuple[np.ndarray, np.ndarray, bool]:
    """(visit index, microseconds, several moments?) of the snapshots that `as_of` names.

    None: each visit at its last usable observation. One moment: every visit at that moment. Several moments: every
    visit at each of them. A frame with the columns ``visit_id, client, as_of``: its rows, in its order.
    """
    every = np.arange(observations.n_visits)
    if as_of is None:
        return every, observations.last_time, False
    if isinstance(as_of, pd.DataFrame):
        missing = [name for name in ("visit_id", "client", "as_of") if name not in as_of.columns]
        if missing:
            raise BadObservations(f"as_of: missing column {listed(missing)}; expected visit_id, client, as_of")
        place = {key: i for i, key in enumerate(observations.keys())}
        keys = zip(as_of["client"].map(as_text), as_of["visit_id"].map(as_text), strict=True)
        visit = np.array([place.get(key, -1) for key in keys], dtype=np.int64)
        moments, _ = parse_times(as_of["as_of"])
        for bad, what in ((visit < 0, "name no visit of the observations"), (moments == NO_TIME, "hold no date")):
            if bad.any():
                raise BadObservations(f"as_of: {int(bad.sum())} rows {what}, the first is row {int(bad.argmax())}")
        return visit, moments, True
    if isinstance(as_of, list | tuple | np.ndarray | pd.Series | pd.Index):
        moments = np.array([to_micros(moment) for moment in as_of], dtype=np.int64)
        if not len(moments):
            raise BadObservations("as_of names no moment")
        return np.repeat(every, len(moments)), np.tile(moments, len(every)), True
    return every, np.full(len(every), to_micros(as_of)), False


class SetAsideWarning(UserWarning):
    """Rows of the observations were not used; the text says how many and why."""


def describe_set_aside(observations: Observations) -> str:
    """One line, without any value or identifier; empty if every row was used."""
    return "; ".join(f"{n} rows: {SET_ASIDE_REASONS[reason]}" for reason, n in observations.set_aside.items())


class FeatureReproducer:
    """Computes a model's features from observations, as in training.

    >>> FeatureReproducer("models/best_model_config.json").transform(df)   # doctest: +SKIP
    """

    def __init__(self, config_path: str | Path = DEFAULT_CONFIG, site_codes: SiteCodes | None = None):
        self.config = load_config(config_path)
        self.feature_names: list[str] = self.config.feature_names
        self.plan = FeaturePlan(self.feature_names)
        known = {*self.config.codes, *self.plan.codes}
        self.codes = Codes(
            synonyms=self.config.synonyms,
            own={code: self.config.code_prevalence.get(code, 0.0) for code in known},
            seen=frozenset(known.union(self.config.observed_codes)),
        )
        if site_codes:
            self.codes = self.codes.with_site(site_codes)

    @cached_property
    def all_plan(self) -> FeaturePlan:
        """Every feature that the blocks make of the config's codes."""
        config = self.config
        names = [
            name for block in BLOCKS for name in block_features(block, config.codes, config.windows, config.synonyms)
        ]
        return FeaturePlan(names)

    def read(self, source: Any, now: int | None = None) -> Observations:
        """`read_observations` with the model's codes: other codes of a concept that it knows become its own."""
        return read_observations(source, self.codes, now)

    def read_and_warn(self, source: Any) -> Observations:
        """`read`, with a `SetAsideWarning` for rows that are not used. Raises `BadObservations` if none can be used."""
        observations = self.read(source).check_usable()
        if observations.set_aside and observations is not source:
            warnings.warn(SetAsideWarning(f"set aside: {describe_set_aside(observations)}"), stacklevel=3)
        return observations

    def is_used(self, code: str) -> bool:
        """Does a feature of the model look at this code, by itself or through its concept?"""
        if code in self.codes.own and code in self._codes_of_plan:
            return True
        concept = self.codes.meaning(code)[0]
        return concept is not None and concept.name in self._clinical_inputs

    @cached_property
    def _codes_of_plan(self) -> frozenset[str]:
        return frozenset(self.plan.codes)

    @cached_property
    def _clinical_inputs(self) -> frozenset[str]:
        return frozenset().union(*(clinical_inputs(name) for name in self.plan.clinical))

    def matrix(
        self,
        observations: Observations,
        visit: np.ndarray,
        as_of: np.ndarray,
        plan: FeaturePlan | None = None,
    ) -> np.ndarray:
        """(n_snapshots, n_features) float64, filled by the config's `fill_value`; a row without any observation
        stays NaN."""
        features = (plan or self.plan).evaluate(observations, visit, as_of)
        fill = self.config.fill_value
        if fill is not None:
            usable = _usable(observations, visit, as_of)
            features[np.isnan(features) & usable[:, None]] = fill
        return features

    def transform(self, df: Any, return_all_features: bool = False, as_of: Any = None) -> pd.DataFrame:
        """Observations (frame, file or records) to features.

        Returns one row for each visit, in order of first appearance, at its last observation or at `as_of`. With
        several moments in `as_of` (see `resolve_snapshots`): one row for each snapshot, with `as_of` as third column.
        Columns: ``visit_id, client``, then the model's features in its order, or with `return_all_features` every
        feature that the blocks make of the config's codes. Raises `BadObservations`.
        """
        observations = self.read_and_warn(df)
        visit, moments, several = resolve_snapshots(observations, as_of)
        plan = self.all_plan if return_all_features else self.plan
        features = self.matrix(observations, visit, moments, plan)
        index = _index_columns(observations, visit, moments, several)
        return pd.concat([pd.DataFrame(index), pd.DataFrame(features, columns=plan.names)], axis=1)


def _usable(observations: Observations, visit: np.ndarray, as_of: np.ndarray) -> np.ndarray:
    first = observations.first_time[visit]
    return (first != NO_TIME) & (first <= as_of)


def _index_columns(observations, visit, moments, several) -> dict[str, np.ndarray]:
    columns = {"visit_id": observations.visit_id[visit], "client": observations.client[visit]}
    if several:
        columns["as_of"] = moments.astype("datetime64[us]")
    return columns


# --------------------------------------------------------------------------------------------------- model


class BoostedTrees:
    """A LightGBM booster, used with one thread: a second thread is slower for a few rows, and hangs after fork."""

    def __init__(self, booster: Any):
        self.booster = booster

    def log_odds(self, features: np.ndarray) -> np.ndarray:
        return self.booster.predict(features, raw_score=True, num_threads=1)

    def contributions(self, features: np.ndarray) -> np.ndarray:
        """(n_rows, n_features) share of each feature in the log-odds, TreeSHAP as LightGBM computes it."""
        return self.booster.predict(features, pred_contrib=True, num_threads=1)[:, :-1]


class LinearModel:
    """Logistic regression on standardised features, clipped at `CLIP` standard deviations so that one odd value cannot
    decide alone. NumPy sums each row by itself: with BLAS, the bits of a row would depend on the batch."""

    CLIP = 4.0

    def __init__(self, mean: np.ndarray, scale: np.ndarray, coefficient: np.ndarray, intercept: float):
        self.mean, self.scale, self.coefficient, self.intercept = mean, scale, coefficient, intercept

    @classmethod
    def standardise(cls, features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return np.clip((features - mean) / scale, -cls.CLIP, cls.CLIP)

    def contributions(self, features: np.ndarray) -> np.ndarray:
        """(n_rows, n_features) coefficient times the distance from the mean, in standard deviations."""
        return np.ascontiguousarray(self.standardise(features, self.mean, self.scale) * self.coefficient)

    def log_odds(self, features: np.ndarray) -> np.ndarray:
        return np.add.reduce(self.contributions(features), axis=1) + self.intercept


class Classifier:
    """Any scikit-learn classifier with `predict_proba`. It has no explanations."""

    def __init__(self, estimator: Any):
        self.estimator = estimator

    def log_odds(self, features: np.ndarray) -> np.ndarray:
        probability = np.clip(self.estimator.predict_proba(features)[:, 1], 1e-6, 1 - 1e-6)
        return np.log(probability / (1 - probability))


def names_sha256(names: Sequence[str]) -> str:
    """SHA-256 of feature names in their order."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


class ScoreModel:
    """What ``best_model.pkl`` holds: fitted members, whose log-odds are averaged, and a calibration.

    The calibrated log-odds are ``slope * log_odds + intercept`` (Platt 1999, on out-of-fold log-odds). `weights` of the
    members add up to 1; None: all count alike.
    """

    weights: list[float] | None = None

    def __init__(
        self,
        members: Sequence[Any],
        slope: float = 1.0,
        intercept: float = 0.0,
        metadata=None,
        weights: Sequence[float] | None = None,
    ):
        self.members = list(members)
        self.slope, self.intercept = float(slope), float(intercept)
        self.metadata = dict(metadata or {})
        self.weights = None if weights is None else [float(weight) for weight in weights]
        if self.weights and (len(self.weights) != len(self.members) or abs(sum(self.weights) - 1) > 1e-9):
            raise ValueError(f"{len(self.members)} members need as many weights that add up to 1")

    def _mean(self, of_member: Callable[[Any], np.ndarray], times: float | None = None) -> np.ndarray:
        """The mean over the members, summed in their order, times a number."""
        weights = self.weights or [None] * len(self.members)
        parts = (of_member(m) if w is None else w * of_member(m) for w, m in zip(weights, self.members, strict=True))
        total = reduce(np.add, parts)
        total = total if times is None else times * total
        return total if self.weights else total / len(self.members)

    def log_odds(self, features: np.ndarray) -> np.ndarray:
        """(n_rows,) before calibration."""
        features = np.ascontiguousarray(features)
        return self._mean(lambda member: member.log_odds(features))

    def probability(self, features: np.ndarray) -> np.ndarray:
        """(n_rows,) calibrated probability of sepsis within the horizon."""
        return self.calibrate(self.log_odds(features))

    def calibrate(self, log_odds: np.ndarray) -> np.ndarray:
        """Uncalibrated log-odds to calibrated probabilities."""
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-(self.slope * log_odds + self.intercept)))

    def contributions(self, features: np.ndarray) -> np.ndarray:
        """(n_rows, n_features) in calibrated log-odds. Raises `NotExplainable`."""
        silent = [member for member in self.members if not hasattr(member, "contributions")]
        if silent:
            raise NotExplainable(
                f"explanations are available for LightGBM and logistic regression, not for "
                f"{type(silent[0].estimator).__name__}"
            )
        features = np.ascontiguousarray(features)
        if not len(features):  # LightGBM refuses them
            return np.empty_like(features)
        return self._mean(lambda member: member.contributions(features), self.slope)


INSUFFICIENT_EVIDENCE, STALE, NOTHING_USABLE = "insufficient_evidence", "stale", "nothing_usable"
INCOMPLETE = "incomplete"  # of a stream only: `assess` takes what it gets for all there is
RISK_LEVELS = ("HIGH", "MEDIUM", "LOW", "UNKNOWN")
# Why a risk is unknown, in words.
UNKNOWN_REASONS = {
    INSUFFICIENT_EVIDENCE: "too little of what the model needs was measured recently",
    STALE: "the newest observation that the model uses is too old",
    NOTHING_USABLE: "no observation can be used",
    INCOMPLETE: "observations of the visit were lost before they were read",
}


@dataclass(frozen=True)
class Assessment:
    """What `ProductionPipeline.assess` returns for snapshots."""

    probability: np.ndarray  # (n_snapshots,) NaN where the risk is unknown
    level: np.ndarray  # (n_snapshots,) HIGH, MEDIUM, LOW or UNKNOWN
    reason: np.ndarray  # (n_snapshots,) None, or a key of UNKNOWN_REASONS
    newest: np.ndarray  # (n_snapshots,) microseconds, time of the newest observation that the model uses, or NO_TIME
    known: np.ndarray  # (n_snapshots, n_inputs) was the input of the minimum of evidence measured recently?
    inputs: tuple[str, ...]  # names of concepts, or codes without one
    features: np.ndarray  # (n_snapshots, n_features) filled; NaN where a snapshot has no observation

    def missing(self) -> list[list[str]]:
        """For each snapshot without enough evidence, the inputs that were not measured recently; else an empty list."""
        return [
            [name for name, there in zip(self.inputs, known, strict=True) if not there]
            if reason == INSUFFICIENT_EVIDENCE
            else []
            for reason, known in zip(self.reason.tolist(), self.known.tolist(), strict=True)
        ]

    def remark(self) -> str | None:
        """How many risks are unknown and why, in one line without identifiers; None if all are known."""
        count = {r: int(n) for r in UNKNOWN_REASONS if (n := np.count_nonzero(self.reason == r))}
        told = "; ".join(f"{n} x {UNKNOWN_REASONS[reason]}" for reason, n in count.items())
        return f"{sum(count.values())} of {len(self.reason)} risks are UNKNOWN: {told}" if count else None


def _finite(hours: np.ndarray) -> np.ndarray:
    return np.where(np.isinf(hours), 0.0, hours)


class ProductionPipeline:
    """Observations to probability of sepsis, with the deployed config and model.

    Loading checks the model file's SHA-256 before it is unpickled, and recomputes the config's golden example. A model
    that would give other numbers than in training is refused (`BadConfig`, `BadModel`). When another version is
    deployed, its model file is replaced before its config. Until then, or if that deployment was interrupted, the
    config's model comes from the archive, with an `UnfinishedSwitchWarning`. A model file that belongs to no archived
    version is always refused.
    """

    def __init__(
        self,
        config_path: str | Path = DEFAULT_CONFIG,
        model_path: str | Path = DEFAULT_MODEL,
        site_codes: SiteCodes | None = None,
    ):
        self._files = Path(config_path), Path(model_path)
        self._stamp = _stamp(config_path)  # before it is read: what is deployed meanwhile is seen as new
        self.site_codes = site_codes
        self.reproducer = FeatureReproducer(config_path, site_codes)
        self.config = self.reproducer.config
        self.feature_names = self.reproducer.feature_names
        self.model_version: str = self.config.model_version or "unversioned"
        self.model = self._load_model(Path(model_path))
        self._expected_codes = self.config.code_prevalence
        # entered for the two parts of `assess`, by their names, for who wants to time them
        self.stage: Callable[[str], contextlib.AbstractContextManager[Any]] = lambda name: contextlib.nullcontext()
        self._check_golden_example()

    def _load_model(self, path: Path) -> ScoreModel:
        where = f"model file {str(path)!r}"
        expected = self.config.model_sha256
        if not expected:
            raise BadModel("the config has no trained model yet; run train_best_model.py --full")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadModel(f"{where} cannot be read ({error.strerror}); run train_best_model.py --full") from None
        if (digest := hashlib.sha256(content).hexdigest()) != expected:
            archived = path.parent / "archive" / self.model_version / path.name
            content = archived.read_bytes() if archived.is_file() else b""
            other = self._version_of(digest, path.parent / "archive")
            if other is None or hashlib.sha256(content).hexdigest() != expected:
                raise BadModel(
                    f"{where} is not the one that the config was made with (its SHA-256 differs); "
                    "deploy config and model together, or run train_best_model.py --full"
                )
            unfinished = (
                f"{where} is of version {other}, the config of {self.model_version}, which is served from the archive: "
                "another version is being deployed, or that was cut short; train_best_model.py --rollback ends it"
            )
            warnings.warn(UnfinishedSwitchWarning(unfinished), stacklevel=3)
        self.model_file = content  # for other processes, which must use the same
        try:
            model = joblib.load(io.BytesIO(content))
        except Exception as error:  # unpickling may raise anything, most often a library that is not installed
            raise BadModel(f"{where} cannot be unpickled here: {type(error).__name__}: {error}") from error
        if not isinstance(model, ScoreModel):
            raise BadModel(f"{where} holds a {type(model).__name__}, not a ScoreModel")
        if not {"feature_names_sha256", "fill_value"} <= set(model.metadata):  # a model from before they were kept
            return model
        if model.metadata["feature_names_sha256"] != names_sha256(self.feature_names):
            raise BadModel(
                f"{where} was trained on other features, or in another order, than the config's feature_names"
            )
        if model.metadata["fill_value"] != self.config.fill_value:
            raise BadModel(f"{where} was trained with another fill_value than the config's")
        return model

    @staticmethod
    def _version_of(digest: str, archive: Path) -> str | None:
        """The archived version whose model file has this SHA-256."""
        for path in archive.glob("*/best_model_config.json"):
            with contextlib.suppress(BadConfig):
                if load_config(path).model_sha256 == digest:
                    return path.parent.name
        return None

    @property
    def directory(self) -> Path:
        """Where the config lies, and the archive of versions."""
        return self._files[0].parent

    def outdated(self) -> bool:
        """Was the config file replaced since it was loaded? Reads only the file's date: a service may ask often."""
        return _stamp(self._files[0]) != self._stamp

    def successor(self) -> ProductionPipeline | None:
        """The pipeline that was deployed to the same files since, or None. Raises as loading does."""
        return ProductionPipeline(*self._files, self.site_codes) if self.outdated() else None

    def _check_golden_example(self) -> None:
        golden = self.config.golden
        if golden["probability"] is None:
            raise BadConfig("config: 'golden' has no probability; run train_best_model.py --full")
        try:
            observations = self.reproducer.read(golden["observations"]).check_usable()
        except BadObservations as error:
            raise BadConfig(
                f"config: 'golden' holds no usable observations ({error}); search and train again"
            ) from None
        visit, moments, _ = resolve_snapshots(observations)
        features = self.reproducer.matrix(observations, visit, moments)
        expected = np.array(golden["features"], dtype=np.float64)  # null becomes NaN
        if features.shape != expected.shape or not np.allclose(features, expected, 1e-9, 1e-12, equal_nan=True):
            wrong = [
                n
                for n, a, b in zip(self.feature_names, features.T, expected.T, strict=False)
                if not np.allclose(a, b, 1e-9, 1e-12, equal_nan=True)
            ]
            raise BadModel(f"the golden example gives other features here than in training: {listed(wrong)}")
        if not np.allclose(self.model.probability(features), golden["probability"], 1e-9, 1e-12):
            raise BadModel(
                "the golden example gives another probability here than in training; compare the library versions"
            )

    def predict(
        self, df: Any, return_probabilities: bool = True, as_of: Any = None, details: bool = False
    ) -> pd.DataFrame:
        """Observations (frame, file, records or `Observations`) to a score for each visit.

        Columns: ``visit_id, client, sepsis_probability``, or with ``return_probabilities=False``
        ``visit_id, client, sepsis_prediction`` (0 or 1 at the config's decision threshold); visits in order of
        first appearance. A visit without the minimum of evidence (at `as_of`) has an empty score, and an
        `UnknownRiskWarning` counts them. With several moments in `as_of` one row a snapshot, with `as_of` as third
        column. `details` adds ``risk_level``, ``reason`` and ``missing`` of an unknown one, and
        ``newest_observation``. Raises `BadObservations`.
        """
        observations = self.reproducer.read_and_warn(df)
        if remark := self.missing_codes_remark(observations):
            warnings.warn(MissingCodesWarning(remark), stacklevel=2)
        visit, moments, several = resolve_snapshots(observations, as_of)
        columns = _index_columns(observations, visit, moments, several)
        assessed = self.assess(observations, visit, moments)
        if remark := assessed.remark():
            warnings.warn(UnknownRiskWarning(remark), stacklevel=2)
        if return_probabilities:
            columns["sepsis_probability"] = assessed.probability
        else:
            decision = pd.array(assessed.probability >= self.config.decision_threshold, dtype="Int64")
            decision[np.isnan(assessed.probability)] = pd.NA
            columns["sepsis_prediction"] = decision
        if details:
            columns["risk_level"], columns["reason"] = assessed.level, assessed.reason
            columns["missing"] = _object_array([", ".join(names) for names in assessed.missing()])
            columns["newest_observation"] = assessed.newest.astype("datetime64[us]")
        return pd.DataFrame(columns, copy=False)

    def evaluate(
        self, observations: Observations, visit: np.ndarray, as_of: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities (n_snapshots,) and the filled features that gave them (n_snapshots, n_features).

        Both are NaN where a snapshot has no observation.
        """
        features = self.reproducer.matrix(observations, visit, as_of)
        return self._probability(features, observations, visit, as_of), features

    def own_code(self, code: str) -> str:
        return self.reproducer.codes.own_code(code)

    def score(self, observations: Observations, visit: np.ndarray, as_of: np.ndarray) -> np.ndarray:
        """(n_snapshots,) the model's probabilities whatever the evidence, NaN where a snapshot has no observation: to
        judge a model by, not for a ward. See `assess`."""
        return self._probability(self.reproducer.matrix(observations, visit, as_of), observations, visit, as_of)

    def _probability(self, features, observations, visit, as_of) -> np.ndarray:
        usable = _usable(observations, visit, as_of)
        if usable.all():
            return self.model.probability(features)
        probability = np.full(len(visit), np.nan)
        if usable.any():
            probability[usable] = self.model.probability(features[usable])
        return probability

    def assess(self, observations: Observations, visit: np.ndarray, as_of: np.ndarray) -> Assessment:
        """Snapshots to risk: a probability and its level if the evidence is enough, else UNKNOWN with a reason.

        `visit` (n_snapshots,) places of visits in the observations, `as_of` (n_snapshots,) microseconds since 1970 UTC.
        """
        n = len(self.feature_names)
        with self.stage("features"):
            table = self._plan_with_ages.evaluate(observations, visit, as_of)
        features = table[:, :n]
        ages = np.full((len(visit), len(self._age_columns) + 1), np.inf)  # the last of no code
        np.fmin(table[:, self._age_columns], np.inf, out=ages[:, :-1])
        usable = _usable(observations, visit, as_of)
        if (fill := self.config.fill_value) is not None:
            features[np.isnan(features) & usable[:, None]] = fill
        with self.stage("model"):
            probability = self._probability(features, observations, visit, as_of)
        age = ages.min(axis=1, initial=np.inf)
        newest = np.where(
            np.isinf(age), NO_TIME, as_of - np.rint(_finite(age) * MICROSECONDS_PER_HOUR).astype(np.int64)
        )
        minimum = self.config.minimum_evidence
        # static and unused codes alone are no evidence, whatever the minimum
        reason = np.where(np.isinf(age), INSUFFICIENT_EVIDENCE, None)
        known = np.zeros((len(visit), 0), dtype=bool)
        if minimum is not None:
            of_inputs = ages[:, self._inputs].min(axis=2)
            # a fresh laboratory value says nothing of vital signs of last night
            recent = of_inputs.min(axis=1, initial=np.inf) <= minimum.newest_hours
            known = (of_inputs < minimum.within_hours) & recent[:, None]
            reason[known.sum(axis=1) < minimum.at_least] = INSUFFICIENT_EVIDENCE
            reason[~np.isinf(age) & (age > minimum.newest_hours)] = STALE
        reason[~usable] = NOTHING_USABLE
        probability[reason != None] = np.nan  # noqa: E711, element by element
        inputs = tuple(minimum.inputs) if minimum else ()
        return Assessment(probability, self.risk_level(probability), reason, newest, known, inputs, features)

    @cached_property
    def _age_codes(self) -> list[str]:
        """The codes whose age counts as evidence: those that the model uses, except static ones."""
        codes = sorted(self.reproducer.codes.own)
        concept = {code: self.reproducer.codes.meaning(code)[0] for code in codes}
        return [c for c in codes if self.reproducer.is_used(c) and not (concept[c] and concept[c].static)]

    @cached_property
    def _plan_with_ages(self) -> FeaturePlan:
        ages = [str(Feature("recency", "age", code)) for code in self._age_codes]
        return FeaturePlan([*self.feature_names, *(name for name in ages if name not in set(self.feature_names))])

    @cached_property
    def _age_columns(self) -> np.ndarray:
        place = {name: i for i, name in enumerate(self._plan_with_ages.names)}
        return np.array([place[str(Feature("recency", "age", code))] for code in self._age_codes], dtype=np.int64)

    @cached_property
    def _inputs(self) -> np.ndarray:
        """(n_inputs, n) the places in `_age_codes` of what measures each input of the minimum of evidence, filled up
        with -1."""
        names = []
        for code in self._age_codes:
            concept = self.reproducer.codes.meaning(code)[0]
            names.append(concept.name if concept else code)
        places = [np.flatnonzero(np.array(names) == name) for name in self.config.minimum_evidence.inputs]
        inputs = np.full((len(places), max((len(columns) for columns in places), default=0) + 1), -1)
        for row, columns in zip(inputs, places, strict=True):
            row[: len(columns)] = columns
        return inputs

    def unused_codes(self, observations: Observations) -> dict[str, int]:
        """Observations of codes that no feature of the model looks at, by code; the most frequent first."""
        length = np.diff(observations.group_start)
        count = np.bincount(observations.group_code, weights=length, minlength=len(observations.codes))
        unused = {
            code: int(n)
            for code, n in zip(observations.codes, count.tolist(), strict=True)
            if n and not self.reproducer.is_used(code)
        }
        return dict(sorted(unused.items(), key=lambda item: (-item[1], item[0])))

    def risk_level(self, probabilities: Any) -> Any:
        """'LOW', 'MEDIUM' or 'HIGH' by the config's thresholds, 'UNKNOWN' for an empty probability.

        One number gives a text, an array or a series gives an array of texts.
        """
        levels = self.config.risk_thresholds
        p = np.asarray(probabilities, dtype=np.float64)
        names = np.where(p >= levels["high"], "HIGH", np.where(p >= levels["medium"], "MEDIUM", "LOW"))
        names = np.where(np.isnan(p), "UNKNOWN", names)
        return names if names.ndim else str(names)

    def explain(self, df: Any, top: int = 5, as_of: Any = None) -> pd.DataFrame:
        """The `top` features that raised or lowered each visit's score the most.

        Columns: ``visit_id, client`` (and ``as_of``), ``feature``, ``value`` (empty where not measured),
        ``contribution`` (to the log-odds, after calibration; positive raises the risk); the strongest first. Visits
        of unknown risk have no row. Raises `NotExplainable` for models without additive contributions,
        `BadObservations`, and `ValueError` if `top` is not a whole number from 1.
        """
        if isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 1:
            raise ValueError("top, the number of features to explain by, must be a whole number from 1")
        observations = self.reproducer.read_and_warn(df)
        visit, moments, several = resolve_snapshots(observations, as_of)
        assessed = self.assess(observations, visit, moments)
        given = ~np.isnan(assessed.probability)
        visit, moments, features = visit[given], moments[given], assessed.features[given]
        contributions = self.model.contributions(features)
        best = np.argsort(-np.abs(contributions), axis=1, kind="stable")[:, :top]
        row = np.repeat(np.arange(len(visit)), best.shape[1])
        values = self.reproducer.plan.evaluate(observations, visit, moments)  # before filling
        columns = _index_columns(observations, visit[row], moments[row], several)
        columns["feature"] = np.array(self.feature_names, dtype=object)[best.ravel()]
        columns["value"] = values[row, best.ravel()]
        columns["contribution"] = contributions[row, best.ravel()]
        return pd.DataFrame(columns)

    def absent_codes(self, present: Iterable[str], n_visits: int) -> list[str]:
        """Codes that are not `present`, though among so many visits at least one should have them, by their share
        of the training visits."""
        present = set(present)
        return [
            code
            for code, share in self._expected_codes.items()
            if code not in present and (1 - share) ** n_visits < 0.01
        ]

    def missing_codes_remark(self, observations: Observations) -> str | None:
        """The `absent_codes`, each with the ROC AUC that its absence costs; None if there are none."""
        present = {observations.codes[i] for i in set(observations.group_code.tolist())}
        absent = self.absent_codes(present, int(np.count_nonzero(np.diff(observations.visit_group_start))))
        if not absent:
            return None
        loss = self.config.loss_without_code
        told = [f"{code} (ROC AUC {-loss[code]:+.3f} without it)" if code in loss else code for code in absent]
        return f"nearly every visit had these codes in training, none has them here: {listed(told)}"


@lru_cache(maxsize=4)
def get_pipeline(
    config_path: str | Path = DEFAULT_CONFIG, model_path: str | Path = DEFAULT_MODEL
) -> ProductionPipeline:
    """The pipeline of these files, loaded once in a process; `get_pipeline.cache_clear()` forgets it."""
    return ProductionPipeline(config_path, model_path)
