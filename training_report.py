"""One self-contained HTML page on a trained model: figures, calibration, operating points, curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_curve, roc_curve

from metrics import OperatingPoint, calibration_table
from pages import facts_table, frame_table, heading, image, page, paragraph


def curves(label: np.ndarray, probability: np.ndarray) -> Any:
    """Reliability, ROC and precision-recall curves side by side, as a matplotlib figure."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    reliability, roc, recall = figure.subplots(1, 3)
    table = calibration_table(label, probability)
    top = 1.1 * max(table["mean_probability"].max(), table["observed_rate"].max())
    reliability.plot([0, top], [0, top], "--", color="grey", label="perfect")
    reliability.plot(table["mean_probability"], table["observed_rate"], "o-", label="model, tenths of the snapshots")
    reliability.set(title="Reliability", xlabel="mean predicted probability", ylabel="observed share of positives")
    reliability.legend()
    false, true, _ = roc_curve(label, probability)
    roc.plot([0, 1], [0, 1], "--", color="grey")
    roc.plot(false, true)
    roc.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity")
    precision, sensitivity, _ = precision_recall_curve(label, probability)
    recall.axhline(label.mean(), ls="--", color="grey", label="share of positives")
    recall.plot(sensitivity[:-1], precision[:-1])
    recall.set(title="Precision-recall", xlabel="sensitivity", ylabel="precision (PPV)")
    recall.legend()
    return figure


def report_page(
    title: str,
    notices: Sequence[str],
    facts: dict[str, Any],
    basis: str,
    label: np.ndarray,
    probability: np.ndarray,
    points: Sequence[OperatingPoint],
) -> str:
    """The page; `basis` says which predictions the tables and curves were drawn from."""
    return page(
        title,
        notices,
        facts_table(facts),
        paragraph(f"Tables and curves: {basis}."),
        image(curves(label, probability), "Reliability, ROC and precision-recall curves"),
        heading("Calibration"),
        frame_table(calibration_table(label, probability)),
        heading("Operating points"),
        frame_table(pd.DataFrame([vars(point) for point in points])),
    )
