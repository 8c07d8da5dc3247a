"""The monitoring report as one self-contained page."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from common.labels import RETROSPECTIVE
from common.pages import frame_table, heading, image, listing, page, paragraph
from feature_pipeline import Config
from monitoring.findings import Findings


def report_html(findings: Findings, config: Config, until: datetime, days: int) -> str:
    """The page."""
    from matplotlib.figure import Figure

    parts = [paragraph(f"The {days} days to {until:%Y-%m-%d %H:%M} UTC.")]
    if not findings.warnings:
        parts.append(paragraph("No warning."))
    if findings.remarks:
        parts.append(listing(findings.remarks))
    parts += [heading("Service"), frame_table(pd.DataFrame(findings.service.items(), columns=["what", "now"]))]
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    if len(findings.daily):
        left.bar(findings.daily["day"], findings.daily["predictions"])
        middle.plot(findings.daily["day"], findings.daily["p95_seconds"] * 1e3, "o-")
    left.set(title="Predictions a day", ylabel="predictions")
    middle.set(title="Latency", ylabel="p95 of the day, ms", ylim=(0, None))
    last = pd.Timestamp(until).normalize()
    ticks = [last - pd.Timedelta(days=n) for n in range(0, days + 1, days // 8 + 1)]
    for axis in (left, middle):
        axis.set_xticks(ticks, [f"{day:%Y-%m-%d}" for day in ticks], rotation=60)
        axis.set_xlim(last - pd.Timedelta(days=days + 0.5), last + pd.Timedelta(days=0.5))
    if findings.score:
        edges, expected, actual = findings.score
        place = np.arange(len(expected) - 1)
        right.bar(place - 0.2, expected[:-1], 0.4, label="reference")
        right.bar(place + 0.2, actual[:-1], 0.4, label="now")
        right.set_xticks(place, [f"< {edge:.3g}" for edge in edges] + [f">= {edges[-1]:.3g}" if edges else "all"])
        right.tick_params(axis="x", rotation=60)
        right.legend()
    right.set(title="Scores", ylabel="share of patient-hours")
    parts.append(image(figure, "Predictions and latency by day; distribution of the scores"))
    if len(findings.answers):
        parts += [heading("Cards and their answers"), frame_table(findings.answers)]
    if len(findings.quality):
        parts += [heading("Quality by week, with outcomes"), frame_table(with_intervals(findings.quality))]
        parts.append(image(quality_figure(findings), "ROC AUC by week; calibration"))
    for title, table in findings.challengers.items():
        parts += [heading(title), frame_table(table)]
        parts.append(paragraph("Intervals of the differences are paired, 95%, resampled by visit."))
    for title, table in findings.drift.items():
        parts += [heading(title), frame_table(table)]
    notices = ["The model was trained on synthetic patients."] if config.training_source["synthetic"] else []
    if config.snapshots.retrospective:
        notices.append(RETROSPECTIVE)
    return page(f"Monitoring of model {config.model_version}", notices, *parts, warnings=findings.warnings)


def with_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """For a person: each figure in one cell with its interval."""
    out = table.copy()
    for name in [name.removesuffix("_to") for name in table if name.endswith("_to")]:
        ends = zip(table[name], out.pop(f"{name}_from"), out.pop(f"{name}_to"), strict=True)
        out[name] = ["" if pd.isna(x) else f"{x:.3f} ({low:.3f}\N{EN DASH}{high:.3f})" for x, low, high in ends]
    return out


def quality_figure(findings: Findings) -> Any:
    """ROC AUC by week with its interval, and calibration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if "roc_auc" in findings.quality:
        known = findings.quality.dropna(subset=["roc_auc"])
        below, above = known["roc_auc"] - known["roc_auc_from"], known["roc_auc_to"] - known["roc_auc"]
        left.errorbar(known["week"], known["roc_auc"], [below.clip(0), above.clip(0)], fmt="o", capsize=3)
    if "roc_auc" not in findings.quality or findings.quality["roc_auc"].isna().all():
        left.text(0.5, 0.5, "too few septic visits", ha="center", transform=left.transAxes)
        left.set_xticks([])
    left.set(title="ROC AUC by week", ylabel="ROC AUC, 95% interval")
    left.tick_params(axis="x", rotation=60)
    table = findings.calibration
    top = 1.1 * max(table["mean_probability"].max(), table["observed_rate"].max(), 1e-6)
    right.plot([0, top], [0, top], "--", color="grey")
    right.plot(table["mean_probability"], table["observed_rate"], "o-")
    right.set(title="Calibration", xlabel="mean predicted probability", ylabel="observed share")
    return figure
