"""What a hospital's codes mean: the concept that is suggested for each, and what speaks against it."""

from __future__ import annotations

import re

import pandas as pd

from common.command_line import read_synonyms
from feature_pipeline import CONCEPT, Codes, Concept, concept_of

FITTING = 0.9  # share of a code's values that its concept must allow

# Words of a name that do not change what is measured, once the name is known to be about blood or the patient.
_NOISE = re.compile(
    r"\b(serum|plasma|whole blood|blood gas|blood|arterial|capillary|non[- ]?invasive(ly)?|invasive|manual|"
    r"automated count|level|measured|measurement|patient|fahrenheit|celsius|calc(ulated)?|estimated)\b|"
    r"\[[^\]]*\]|\b(in|by|of|or|on)\b"
)
# What is measured elsewhere than in the blood, is set on a machine, or is a limit of an alarm.
_OTHER = re.compile(
    r"\b(urine|urinary|csf|cerebrospinal|spinal|pleural|venous|dipstick|ascites|ascitic|peritoneal|joint|synovial|stool|fluid|gastric|"
    r"dialysate|amniotic|bone marrow|sweat|cord|alarm|goal|target|set|setting|limit|high|low|desired|type|rhythm|"
    r"site|source|route|device|free|ionized|ionised|hold|inspired gas|room|skin|variation|pulmonary|intracranial|"
    r"fetal|spontaneous|orthostatic|lying|standing|supine|sitting|iabp|pain|score|history|therapeutic|mixed|central)\b"
)
# Names that are no synonym but for their order or length; the first that matches counts.
_NAMES = tuple(
    (re.compile(pattern), concept)
    for pattern, concept in (
        (r"(pressure|\bn?i?a?bp\b).*systolic|systolic.*(pressure|\bbp\b)", "systolic_bp"),
        (r"(pressure|\bn?i?a?bp\b).*diastolic|diastolic.*(pressure|\bbp\b)", "diastolic_bp"),
        (r"(blood pressure|\bn?i?a?bp\b).*mean|mean.*(blood pressure|arterial pressure|\bbp\b)", "mean_bp"),
        (r"oxygen saturation.*(blood gas|arterial blood$)", "sao2"),
        (r"^(oxygen|o2) \[partial pressure\] in (arterial )?blood", "pao2"),
        (r"^carbon dioxide \[partial pressure\] in (arterial )?blood", "paco2"),
        (r"^c[- ]reactive protein", "crp"),
        (r"^aptt\b", "ptt"),
        (r"(o2|oxygen) sat\w*.*pulse|pulse ox|spo2", "spo2"),
        (r"inspired (o2|oxygen) fraction|inhaled oxygen concentration|fio2", "fio2"),
        (r"^respiratory rate|^resp(iratory)? rate|^respirations?$", "respiratory_rate"),
        (r"^heart rate$|^pulse( rate)?$", "heart_rate"),
        (r"^(body )?temp(erature)?( [cf])?$", "temperature"),
        (r"glasgow coma (scale|score).*(total|sum)|^gcs total$", "gcs"),
        (r"^glucose( finger ?stick| meter)?$", "glucose"),
        (r"^calcium (total|non-?ioni[sz]ed)$", "calcium"),
        (r"^bilirubin total$|^total bilirubin$|^bilirubin\.total", "bilirubin_total"),
        (r"^bilirubin direct$|^direct bilirubin$|^bilirubin\.(glucuronid|direct)", "bilirubin_direct"),
        (r"^(platelet count|platelets)", "platelets"),
        (r"^(white blood cells?|wbc|leukocytes)", "wbc"),
        (r"^(urea nitrogen|bun|blood urea nitrogen)$", "bun"),
        (r"^(hemoglobin|hgb)$", "hemoglobin"),
        (r"^alk(aline)? phosph\w*$", "alkaline_phosphatase"),
        (r"^asp?arate aminotransferase|^aspartate aminotransferase", "ast"),
        (r"^alanine aminotransferase", "alt"),
        (r"^po2$|^(o2|oxygen) pressure$|^oxygen partial pressure|^pao2$", "pao2"),
        (r"^pco2$|^co2 pressure$|^carbon dioxide partial pressure|^paco2$", "paco2"),
        (r"^base excess", "base_excess"),
        (r"^(lactate|lactic acid)$", "lactate"),
    )
)


def given_concepts(path: str | None) -> dict[str, str]:
    """{code: concept} of a corrected codes.csv; empty for a code that has none in it, so that nothing is suggested."""
    if path is None:
        return {}
    concepts = read_synonyms(path)
    return dict.fromkeys(pd.read_csv(path, dtype=str, keep_default_na=False)["code"], "") | concepts


def suggest(code: str, name: str) -> tuple[Concept | None, str]:
    """The concept that a code may stand for, and whether the code itself or its name says so.

    Unit and values are still to be asked: see `doubts`.

    >>> suggest("8867-4", "")[0].name, suggest("220179", "Non Invasive Blood Pressure systolic")[0].name
    ('heart_rate', 'systolic_bp')
    >>> suggest("51478", "Glucose (Urine)")
    (None, '')
    """
    if (concept := concept_of(code)) is not None:
        return concept, "the code"
    concept = _by_name(name) or _by_name(code)
    return concept, "the name" if concept else ""


def linear(concept: Concept, code: str, unit: str) -> tuple[float, float] | None:
    """(factor, offset) from `unit` to the concept's own; None where it cannot be converted. Without a unit the code may
    say which it is.

    >>> factor, offset = linear(CONCEPT["temperature"], "Temp", "[degF]")
    >>> round(factor * 212 + offset, 6)
    100.0
    >>> linear(CONCEPT["creatinine"], "14682-9", "")
    (0.011312, 0.0)
    """
    meant, default = Codes().meaning(code)
    known = concept.unit_named(unit or (default if meant is concept else concept.unit))
    return (known.factor, known.offset) if known else None


def doubts(concept: Concept, code: str, unit: str, share_allowed: float) -> str:
    """Why a code does not stand for `concept` after all, from its most frequent unit and the share of its values that
    the concept allows; empty where nothing speaks against it."""
    if linear(concept, code, unit) is None:
        return f"but its unit {unit!r} cannot be converted"
    if share_allowed < FITTING:
        return f"but only {share_allowed:.0%} of its values fit {concept.unit}"
    return ""


def _by_name(name: str) -> Concept | None:
    lower = re.sub(r"[,;_/|]+", " ", name.lower()).strip()
    if not lower or _OTHER.search(lower):
        return None
    inside = re.findall(r"\(([^)]*)\)", lower)
    bare = re.sub(r"\([^)]*\)", " ", lower)
    short = _NOISE.sub(" ", bare)
    texts = [" ".join(text.split()) for text in (lower, bare, short)]
    swapped = " ".join(reversed(texts[-1].split(" ", 1)))
    for pattern, concept_name in _NAMES:
        if any(pattern.search(text) for text in texts):
            return CONCEPT[concept_name]
    for text in (*texts, swapped, *inside):
        if text and (concept := concept_of(text)):
            return concept
    return None
