"""What a result says of a visit, beside whose it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from feature_pipeline import MICROSECONDS_PER_HOUR, NO_TIME, Assessment, Observations, ProductionPipeline, iso_times


def columns_of(
    assessed: Assessment, pipeline: ProductionPipeline, observations: Observations, moments: np.ndarray
) -> dict[str, list[Any]]:
    """Each part of the results by its name, for all visits; `moments` are those that were scored."""
    used, unused = _by_use(pipeline, observations)
    hours = np.where(assessed.newest == NO_TIME, np.nan, (moments - assessed.newest) / MICROSECONDS_PER_HOUR)
    return {
        "sepsis_probability": _or_none(assessed.probability),
        "risk_level": assessed.level.tolist(),
        "reason": assessed.reason.tolist(),
        "missing": assessed.missing(),
        "num_observations": used,
        "unused_codes": unused,
        "timestamp": iso_times(observations.last_time),
        "as_of": iso_times(moments),
        "hours_since_newest": _or_none(np.round(hours, 3)),
    }


def _by_use(pipeline: ProductionPipeline, observations: Observations) -> tuple[list[int], list[dict[str, int]]]:
    """For each visit the number of observations that the model uses, and the numbers of others by code."""
    is_used = np.array([pipeline.reproducer.is_used(code) for code in observations.codes], dtype=bool)
    used = is_used[observations.group_code]
    length = np.diff(observations.group_start)
    counted = np.bincount(observations.group_visit, weights=length * used, minlength=observations.n_visits)
    unused: list[dict[str, int]] = [{} for _ in range(observations.n_visits)]
    for group in np.flatnonzero(~used).tolist():
        unused[observations.group_visit[group]][observations.codes[observations.group_code[group]]] = int(length[group])
    return counted.astype(np.int64).tolist(), unused


def _or_none(numbers: np.ndarray) -> list[float | None]:
    return [None if number != number else number for number in numbers.tolist()]
