"""What a ward would see of the deployed model on past visits: alerts per 100 patient-days, and how long before onset.

    python examples/alert_burden.py --observations past.parquet --labels past_labels.csv

Scores every visit each --score-every hours until onset or its end, as an hourly job would. An alert is a score that
reaches the threshold where the visit's score before did not. Take patients that the model has not learned from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.command_line import DONE, make_parser, number, run
from common.labels import read_labels
from feature_pipeline import MICROSECONDS_PER_HOUR, NO_TIME, BadConfig, ProductionPipeline, SnapshotSettings
from training.snapshots import TrainingData, make_training_data


def burden(data: TrainingData, probability: np.ndarray, onset: np.ndarray, threshold: float) -> dict[str, object]:
    """Alerts and lead times at one threshold; `onset` (n_visits,) is in microseconds, NaN for visits without sepsis."""
    same_visit = np.append(False, data.visit[1:] == data.visit[:-1])
    above = probability >= threshold
    alert = above & ~(same_visit & np.append(False, above[:-1]))
    ends = np.append(~same_visit[1:], True)
    stay = (data.as_of - data.observations.first_time[data.visit])[ends] / MICROSECONDS_PER_HOUR
    visit, first = np.unique(data.visit[alert], return_index=True)  # ascending in time within a visit
    lead = (onset[visit] - data.as_of[alert][first]) / MICROSECONDS_PER_HOUR
    lead = lead[~np.isnan(lead)]
    hours = "{:.1f} ({:.1f} to {:.1f})".format(*np.percentile(lead, [50, 25, 75])) if len(lead) else "-"
    return {
        "threshold": f"{threshold:.4g}",
        "alerts per 100 patient-days": f"{100 * alert.sum() / (stay.sum() / 24):.1f}",
        "visits alerted": f"{len(visit)} of {data.n_visits}",
        "septic visits alerted": f"{len(lead)} of {int((~np.isnan(onset[np.unique(data.visit)])).sum())}",
        "hours before onset, median (quartiles)": hours,
    }


def onsets(data: TrainingData, labels: pd.DataFrame) -> np.ndarray:
    """(n_visits,) microseconds since 1970, NaN for visits without sepsis."""
    septic = labels[(labels["sepsis"] == 1) & (labels["sepsis_onset"] != NO_TIME)]
    known = dict(zip(zip(septic["client"], septic["visit_id"], strict=True), septic["sepsis_onset"], strict=True))
    return np.array([known.get(key, np.nan) for key in data.observations.keys()])  # noqa: SIM118


def work(arguments: argparse.Namespace) -> int:
    if not (arguments.observations and arguments.labels):
        raise BadConfig("name --observations and --labels of patients that the model has not learned from")
    pipeline = ProductionPipeline(arguments.config, arguments.model)
    labels = read_labels(arguments.labels)
    settings = SnapshotSettings(every_hours=arguments.score_every)
    data = make_training_data(pipeline.reproducer.read(arguments.observations), labels, settings)
    if data.settings.retrospective:
        raise BadConfig("the labels have no sepsis_onset: how long before it an alert comes cannot be told")
    onset = onsets(data, labels)
    probability = pipeline.score(data.observations, data.visit, data.as_of)
    levels = {**pipeline.config.risk_thresholds, "decision": pipeline.config.decision_threshold}
    rows = [{"": name, **burden(data, probability, onset, value)} for name, value in levels.items()]
    print(pd.DataFrame(rows).to_string(index=False))
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    example = "python examples/alert_burden.py --observations past.parquet --labels past_labels.csv"
    parser = make_parser(__doc__, example, "observations", "labels", "config", "model")
    parser.add_argument(
        "--score-every", type=number(float, 0.25), default=1.0, metavar="HOURS", help="between scores of a visit"
    )
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
