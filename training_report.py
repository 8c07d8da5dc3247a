"""One self-contained HTML page on a trained model: figures, calibration, operating points, curves."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_curve, roc_curve

from metrics import OperatingPoint, calibration_table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
.notice { background: #fff4d6; border-left: .3rem solid #d99a00; padding: .5rem 1rem; }
img { max-width: 100%; }
"""


def figures_png(label: np.ndarray, probability: np.ndarray) -> bytes:
    """Reliability, ROC and precision-recall curves side by side, as PNG."""
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


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
    table = calibration_table(label, probability)
    image = base64.b64encode(figures_png(label, probability)).decode()
    operating = pd.DataFrame([vars(point) for point in points])
    operating.columns = [name.replace("_", " ") for name in operating.columns]
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    alerts = "".join(f'<p class="notice">{html.escape(line)}</p>' for line in notices)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{alerts}<table>{rows}</table>"
        f"<p>Tables and curves: {html.escape(basis)}.</p>"
        f'<img alt="Reliability, ROC and precision-recall curves" src="data:image/png;base64,{image}">'
        f"<h2>Calibration</h2>{table.to_html(index=False, float_format='%.4f', border=0)}"
        f"<h2>Operating points</h2>{operating.to_html(index=False, float_format='%.4f', border=0)}"
        "<p>Research software, not a medical device. Validate on local data before any patient is scored.</p></html>\n"
    )
