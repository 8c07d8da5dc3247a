"""Features, reasons and times in the words of a ward: for the page and for CDS Hooks cards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from feature_pipeline import UNKNOWN_REASONS, BadConfig, Codes, Feature, parse_feature

# a statistic in words, and the unit of its value: that of the code's concept, another one, or none
_OF_CODE = {
    "last": ("latest", "own"),
    "min": ("lowest", "own"),
    "max": ("highest", "own"),
    "mean": ("mean", "own"),
    "std": ("spread", "own"),
    "count": ("number of measurements", ""),
    "slope": ("trend per hour", "own"),
    "change": ("change since the first", "own"),
    "delta": ("change since the previous", "own"),
    "age": ("time since the latest", "h"),
    "measured": ("measured at all", ""),
    "rate": ("measurements per hour", ""),
    "gap": ("time between the last two", "h"),
    "outside": ("distance outside its range, in range widths", ""),
    "share_below": ("share below its range", ""),
    "share_above": ("share above its range", ""),
    "range": ("highest minus lowest", "own"),
    "cv": ("relative spread", ""),
    "mean_abs_change": ("mean step", "own"),
    "departure": ("latest minus mean", "own"),
    "zscore": ("distance of the latest from the mean, in standard deviations", ""),
    "ewm": ("recent mean", "own"),
    "departure_ewm": ("latest minus recent mean", "own"),
    "hours_since_max": ("time since the highest", "h"),
    "hours_since_min": ("time since the lowest", "h"),
}
_SCORES = {"sirs": "SIRS", "qsofa": "qSOFA", "news2": "NEWS2", "sofa": "partial SOFA"}
_CLINICAL = {
    "shock_index": "shock index (heart rate / systolic pressure)",
    "pulse_pressure": "pulse pressure",
    "bun_creatinine": "urea nitrogen / creatinine",
    "sf_ratio": "SpO2 / FiO2",
    "pf_ratio": "PaO2 / FiO2",
}
_CONTEXT = {
    "hours": ("time since the first observation", "h"),
    "types": ("number of different quantities measured", ""),
    "observations_6h": ("observations in the last 6 h", ""),
    "observations_24h": ("observations in the last 24 h", ""),
    "types_6h": ("different quantities measured in the last 6 h", ""),
    "types_24h": ("different quantities measured in the last 24 h", ""),
    "hour_of_day": ("hour of the day", "h"),
}
_ABBREVIATIONS = {
    **dict.fromkeys(("ph", "fio2", "crp", "ast", "alt", "ptt", "gcs", "bun"), str.upper),
    **{"spo2": lambda _: "SpO2", "pao2": lambda _: "PaO2", "paco2": lambda _: "PaCO2", "sao2": lambda _: "SaO2"},
    **{"ph": lambda _: "pH", "fio2": lambda _: "FiO2", "etco2": lambda _: "EtCO2"},
    **{"wbc": lambda _: "white blood cells", "bun": lambda _: "urea nitrogen"},
    **{f"{kind}_bp": lambda name: f"{name[:-3]} blood pressure" for kind in ("systolic", "diastolic", "mean")},
}


def concept_words(name: str) -> str:
    """A concept of `CONCEPTS` (or a code without one) for people: ``systolic blood pressure``."""
    return _ABBREVIATIONS[name](name) if name in _ABBREVIATIONS else name.replace("_", " ")


def code_words(code: str, codes: Codes) -> tuple[str, str]:
    """(what a code measures, its unit)."""
    concept, _ = codes.meaning(code)
    if concept is None:
        return code, ""
    unit = "" if concept.unit in ("1", "code", "0/1", "fraction") else concept.unit
    return concept_words(concept.name), "/min" if unit == "1/min" else unit


def feature_words(feature: str, codes: Codes) -> tuple[str, str]:
    """(a feature's name for people, the unit of its value).

    >>> feature_words("HR__max__24h", Codes()), feature_words("clinical__news2", Codes())
    (('heart rate, highest in 24 h', '/min'), ('NEWS2 score', ''))
    """
    try:
        asked = parse_feature(feature)
    except BadConfig:
        return feature, ""
    if asked.block == "clinical":
        return _clinical_words(asked), ""
    if asked.block == "context":
        return _CONTEXT.get(asked.name, (asked.name.replace("_", " "), ""))
    what, own_unit = code_words(asked.code, codes)
    concept, _ = codes.meaning(asked.code)
    if concept is not None and concept.static:  # age and sex have only one value
        return what, own_unit
    statistic, unit = _OF_CODE.get(asked.name, (asked.name.replace("_", " "), ""))
    window = f" in {asked.window} h" if asked.window else ""
    return f"{what}, {statistic}{window}", own_unit if unit == "own" else unit


def _clinical_words(feature: Feature) -> str:
    score, _, part = feature.name.partition("_")
    if score not in _SCORES:
        return _CLINICAL.get(feature.name, feature.name.replace("_", " "))
    if not part:
        return f"{_SCORES[score]} score"
    if part == "parts":
        return f"parts of {_SCORES[score]} that were measured"
    return f"{_SCORES[score]} points for {part.replace('_', ' ')}"


def reason_text(reason: dict[str, Any], codes: Codes) -> str:
    """A feature with its value: ``heart rate, highest in 24 h: 124 /min``."""
    words, unit = feature_words(reason["feature"], codes)
    return f"{words}: not measured" if reason["value"] is None else f"{words}: {reason['value']:.4g} {unit}".rstrip()


def unknown_text(reason: str, missing: Sequence[str], hours: float | None) -> str:
    """Why a risk is unknown, in a sentence."""
    text = UNKNOWN_REASONS[reason]
    if missing:
        text += f"; missing: {', '.join(map(concept_words, missing))}"
    elif reason == "stale" and hours is not None:
        text += f" ({age_text(hours)} old)"
    return text


def age_text(hours: float) -> str:
    """A length of time for people.

    >>> age_text(0.4), age_text(7.21), age_text(100)
    ('24 min', '7 h', '4 days')
    """
    if hours < 1:
        return f"{round(hours * 60)} min"
    return f"{round(hours)} h" if hours < 72 else f"{round(hours / 24):,} days"
