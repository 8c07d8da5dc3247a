"""Stays and their scores, by hand: hours and probabilities."""

import numpy as np

from common.alerts import Scored, Stays
from feature_pipeline import NO_TIME

HOUR = 3_600_000_000


def stays_of(*visits):
    """Visits (hours from 0 to `end`, onset or None), each with a client of its own."""
    end, onset = zip(*visits, strict=True)
    return Stays(
        client=np.arange(len(visits)),
        start=np.zeros(len(visits), dtype=np.int64),
        end=np.array([round(e * HOUR) for e in end]),
        septic=np.array([o is not None for o in onset]),
        onset=np.array([NO_TIME if o is None else round(o * HOUR) for o in onset]),
    )


def scored_of(stays, *scores, threshold=0.5, cooldown=6.0):
    """Scores of each visit: {hour: probability}."""
    rows = [(i, round(t * HOUR), p) for i, of_visit in enumerate(scores) for t, p in of_visit.items()]
    visit, time, p = (np.array(column) for column in zip(*rows, strict=True))
    p = p.astype(float)
    return Scored.of(stays, visit, time, p, p >= threshold, cooldown)


def starts(scored):
    return [(int(v), t / HOUR) for v, t in zip(scored.visit[scored.alerts], scored.time[scored.alerts], strict=True)]
