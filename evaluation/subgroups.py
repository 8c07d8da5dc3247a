"""For whom is it worse? Figures of each group at the deployed threshold; differences that are more than chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import erfc, sqrt
from typing import Any

import numpy as np
import pandas as pd

from common.labels import read_cells
from evaluation.comparators import number
from evaluation.resampling import Clients, interval, ratio_interval
from feature_pipeline import BadConfig, Observations, as_text, listed

AGE_BANDS = (0, 18, 45, 65, 80, 131)
STATIC = ("age", "sex", "unit_medical", "unit_surgical")
FEWEST_VISITS = 20  # smaller groups are held back: they could tell who is in them
FEWEST_SEPTIC = 5  # septic visits; below, sensitivity and PPV of a group are held back
MOST_GROUPS = 40  # of one column; more is no grouping
SIGNIFICANCE = 0.05  # over all comparisons together

Groups = dict[str, np.ndarray]  # attribute -> (n_visits,) text of each visit's group, "" for not known

# What is compared between groups: numerator and denominator among the sums of each visit.
MEASURES = {
    "alerts_per_100_patient_days": ("alerts", "days", 100.0),
    "sensitivity": ("caught", "at_risk", 1.0),
    "ppv": ("true", "judged", 1.0),
    "expected_over_observed": ("expected", "observed", 1.0),
}


def observed_groups(observations: Observations, place: np.ndarray) -> Groups:
    """Age, sex and unit of the visits at `place`, by the first value of the visit, where the observations have them."""
    out: Groups = {}
    for name in STATIC:
        codes = [i for i, concept in enumerate(observations.concepts) if concept and concept.name == name]
        value = np.full(observations.n_visits, np.nan)
        for code in reversed(codes):
            groups = np.flatnonzero(observations.group_code == code)
            value[observations.group_visit[groups]] = observations.value[observations.group_start[groups]]
        value = value[place]
        if np.isnan(value).all():
            continue
        if name == "age":
            texts = np.full(len(value), "", dtype=object)
            for low, high in pairwise(AGE_BANDS):
                shown = f"{low} to {high - 1}" if high < AGE_BANDS[-1] else f"{low} and older"
                texts[(value >= low) & (value < high)] = shown
        else:
            texts = np.array([f"code {v:g}" if v == v else "" for v in value.tolist()], dtype=object)
        out[name.replace("_", " ")] = texts
    return out


def named_groups(path: str, keys: list[tuple[str, str]]) -> Groups:
    """The columns of a table ``visit_id, client, ...`` for the visits `keys`. Raises `BadConfig`."""
    where = f"groups {path!r}"
    table = read_cells(path, where)
    if lacking := [name for name in ("visit_id", "client") if name not in table.columns]:
        raise BadConfig(f"{where}: missing column {listed(lacking)}; expected visit_id, client and the groups")
    names = [name for name in table.columns if name not in ("visit_id", "client")]
    if not names or len(set(names)) < len(names):
        raise BadConfig(f"{where}: expected visit_id, client and at least one other column, each once")
    own = dict(
        zip(zip(table["client"].map(as_text), table["visit_id"].map(as_text), strict=True), table.index, strict=True)
    )
    rows = [own.get(key) for key in keys]
    if not any(row is not None for row in rows):
        raise BadConfig(f"{where}: none of its visits is among those that are evaluated")
    out = {}
    for name in names:
        cells = table[name]
        texts = ["" if row is None or pd.isna(cells.loc[row]) else as_text(cells.loc[row]) for row in rows]
        if len(set(texts)) > MOST_GROUPS:
            raise BadConfig(f"{where}: column {str(name)!r} has more than {MOST_GROUPS} groups")
        out[str(name)] = np.array(texts, dtype=object)
    return out


def members(groups: Groups) -> Iterator[tuple[str, str, np.ndarray]]:
    """(attribute, group, (n_visits,) bool); visits whose group is not known come last."""
    for attribute, texts in groups.items():
        names = sorted(set(texts.tolist()) - {""}, key=lambda text: (len(text) > 8, text))
        for name in [*names, *([""] if (texts == "").any() else [])]:
            yield attribute, name or "not known", texts == name


SHARES = ("at_risk", "judged")  # what is counted of these is a share of them


def _settled(
    counted: np.ndarray, of: np.ndarray, client: np.ndarray, factor: float, is_share: bool
) -> tuple[float, float]:
    """(a ratio, the variance that its resamples do not show). All resamples of "none of 5" and of "all of 5" are the
    same: such a share counts with two clients more of each kind (Agresti and Coull, Am Stat 1998;52:119), such a rate
    with one event more."""
    above, below = float(counted.sum()), float(of.sum())
    if above > 0 and not (is_share and above == below):
        return factor * above / below, 0.0
    if not is_share:
        return factor / below, (factor / below) ** 2
    n = len(np.unique(client[of > 0]))
    share = (above / below * n + 2) / (n + 4)
    return factor * share, factor**2 * share * (1 - share) / (n + 4)


def group_table(visits: Mapping[str, np.ndarray], groups: Groups, clients: Clients) -> list[dict[str, Any]]:
    """One row a group: visits, septic visits, and each of `MEASURES` with its 95% interval; `visits` are the sums of
    each visit, NaN nowhere. Small groups are held back."""
    rows = []
    for attribute, group, member in members(groups):
        n = int(visits["visits"][member].sum())
        row: dict[str, Any] = {"attribute": attribute, "group": group, "visits": n}
        if n < FEWEST_VISITS:
            rows.append({"attribute": attribute, "group": group, "visits": None, "held_back": True})
            continue
        row["septic"] = int(visits["septic"][member].sum())
        drawn = clients.sums(visits, member)
        for name, (above, below, factor) in MEASURES.items():
            if above not in visits:
                continue
            few = name != "alerts_per_100_patient_days" and row["septic"] < FEWEST_SEPTIC
            under = visits[below][member].sum()
            row[name] = None if few or not under else number(factor * visits[above][member].sum() / under)
            row[f"{name}_95"] = None
            if row[name] is not None:
                columns = (visits[above][member], visits[below][member], clients.client[member])
                is_rate = below not in SHARES
                row[f"{name}_95"] = ratio_interval(
                    _quotients(drawn, above, below, factor), *columns, factor, is_rate=is_rate
                )
        rows.append(row)
    return rows


def _quotients(drawn: Mapping[str, np.ndarray], above: str, below: str, factor: float) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(drawn[below] > 0, factor * drawn[above] / drawn[below], np.nan)


def differences(visits: Mapping[str, np.ndarray], groups: Groups, clients: Clients) -> list[dict[str, Any]]:
    """Each group against all other visits of known group, with p values from the spread of paired resamples, corrected
    for the number of comparisons (Holm, Scand J Stat 1979;6:65). `exceeds_chance` names those that stay."""
    found = []
    for attribute, group, member in members(groups):
        rest = ~member & (groups[attribute] != "")
        if len(set(groups[attribute][rest])) == 1 and any(row["attribute"] == attribute for row in found):
            continue  # the second of two groups: the same comparison
        if group == "not known" or min(visits["visits"][some].sum() for some in (member, rest)) < FEWEST_VISITS:
            continue
        own, other = clients.sums(visits, member), clients.sums(visits, rest)
        for name, (above, below, factor) in MEASURES.items():
            if above not in visits:
                continue
            few = min(visits["septic"][some].sum() for some in (member, rest)) < FEWEST_SEPTIC
            sides = [float(visits[below][some].sum()) for some in (member, rest)]
            if not all(sides) or (few and name != "alerts_per_100_patient_days"):
                continue
            here, there = (
                factor * float(visits[above][some].sum()) / n for some, n in zip((member, rest), sides, strict=True)
            )
            drawn = _quotients(own, above, below, factor) - _quotients(other, above, below, factor)
            drawn = drawn[np.isfinite(drawn)]
            (mine, more), (theirs, most) = (
                _settled(visits[above][some], visits[below][some], clients.client[some], factor, below in SHARES)
                for some in (member, rest)
            )
            spread = sqrt((float(drawn.var()) if len(drawn) > 1 else 0.0) + more + most)
            p = erfc(abs(mine - theirs) / spread / sqrt(2)) if spread > 0 else 1.0
            found.append(
                {
                    **{"attribute": attribute, "group": group, "measure": name, "value": here, "others": there},
                    **{"difference": here - there, "difference_95": interval(drawn), "p": p},
                }
            )
    still = True
    for place, row in enumerate(sorted(found, key=lambda row: row["p"])):
        still = still and row["p"] <= SIGNIFICANCE / (len(found) - place)
        row["exceeds_chance"] = bool(still)
    return found
