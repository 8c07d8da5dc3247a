"""How many local patients are needed to adapt a model: the gain with more and more of them, on held-out patients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.artifacts import write_atomic
from common.command_line import log
from common.metrics import compared, resampled_scores
from common.pages import facts_table, frame_table, image, page, paragraph
from training.adapt import AdaptOptions, Local, fit_local, read_local
from training.transfer import FOLDS, Candidate, candidates

SIZES = (100, 250, 500, 1000, 2000, 4000, 8000, 16000, 32000)
PAGE = "learning_curve.html"


@dataclass(frozen=True)
class Point:
    """The parent adapted with some local patients, on those held out."""

    patients: int
    septic: int
    candidate: str
    figures: dict[str, dict[str, float]]  # against the parent, see metrics.compared
    probability: np.ndarray  # of the snapshots held out


def curve(local: Local, known: Sequence[Candidate], sizes: Sequence[int] = SIZES, jobs: int = 1) -> Iterator[Point]:
    """The points of nested draws of the patients to learn from, the last with all of them. A size with too few septic
    patients for cross-validation is left out."""
    source, data = local.source, local.source.data
    label, group = data.label[local.held_out], data.group[local.held_out]
    features = source.features(local.held_out)
    before = local.pipeline.model.probability(features)
    order = np.random.default_rng(source.seed).permutation(np.unique(data.group[local.learned]))
    for size in [*(size for size in sizes if size < len(order)), len(order)]:
        rows = local.learned[np.isin(data.group[local.learned], order[:size])]
        septic = len(np.unique(data.group[rows][data.label[rows] == 1]))
        if septic < FOLDS:
            log.info("%d patients: %d of them septic, too few to learn from", size, septic)
            continue
        _, fitted = fit_local(local, rows, known, jobs)
        after = fitted.model.probability(features)
        figures = compared(label, before, after, group, 0.05, seed=source.seed)
        yield Point(size, septic, fitted.candidate.name, figures, after)


def table(points: Sequence[Point]) -> pd.DataFrame:
    rows = []
    for point in points:
        row: dict[str, Any] = {"patients": point.patients, "septic": point.septic, "candidate": point.candidate}
        for name in ("roc_auc", "average_precision"):
            f = point.figures[name]
            row |= {name: f["new"], f"{name}_gain": f["difference"]}
            row |= {f"{name}_gain_low": f["low"], f"{name}_gain_high": f["high"]}
        rows.append(row)
    return pd.DataFrame(rows)


def flattens(points: Sequence[Point], label: np.ndarray, group: np.ndarray, seed: int = 0) -> str:
    """From which number of patients on all of them together bring nothing beyond chance, in words."""
    scores = [resampled_scores(label, p.probability, group, 500, seed).sum(axis=1) for p in points]
    behind = [np.nanpercentile(scores[-1] - score, 2.5) > 0 for score in scores]
    flat = points[behind.index(False)]
    if flat is points[-1] and len(points) > 1:
        return f"The gain still rises at {flat.patients:,} patients: more may bring more."
    return (
        f"From {flat.patients:,} patients on the gain is flat: {points[-1].patients:,} bring nothing more beyond "
        f"chance, as far as {len(np.unique(group)):,} held-out patients show."
    )


def learning_curve(directory: Path, options: AdaptOptions) -> list[str]:
    """Adapts the deployed model with more and more local patients and writes `PAGE`; deploys nothing. Gives lines for
    a person."""
    local = read_local(directory, options)
    known = candidates(local.pipeline.model, both=local.source.first is not None)
    points = []
    for point in curve(local, known, jobs=options.jobs):
        log.info("%d patients: %s", point.patients, point.candidate)
        points.append(point)
    found, data = table(points), local.source.data
    verdict = flattens(points, data.label[local.held_out], data.group[local.held_out], local.source.seed)
    auc, precision = (points[0].figures[name]["old"] for name in ("roc_auc", "average_precision"))
    facts = {
        "parent": f"model {local.config.model_version}: ROC AUC {auc:.4f}, average precision {precision:.4f}",
        "held out": f"{len(np.unique(data.group[local.held_out])):,} patients, {len(local.held_out):,} snapshots, "
        f"{int(data.label[local.held_out].sum()):,} positive",
    }
    explained = "Gains over the parent on the held-out patients; intervals are paired, 95%, resampled by client."
    shown = image(plot(found), "gain by number of local patients")
    parts = (facts_table(facts), paragraph(verdict), shown, frame_table(found), paragraph(explained))
    write_atomic(directory / PAGE, page("How many local patients", data.notices(), *parts))
    lines = [f"{name}: {text}" for name, text in facts.items()]
    return [*lines, *text_lines(found), verdict, f"written: {directory / PAGE}"]


def text_lines(found: pd.DataFrame) -> list[str]:
    lines = [
        "patients  septic  ROC AUC (gain, 95%)                    average precision (gain, 95%)          candidate"
    ]
    for row in found.to_dict("records"):
        told = "  ".join(
            f"{row[name]:.4f} ({row[f'{name}_gain']:+.4f}, {row[f'{name}_gain_low']:+.4f} to "
            f"{row[f'{name}_gain_high']:+.4f})"
            for name in ("roc_auc", "average_precision")
        )
        lines.append(f"{row['patients']:>8,}  {row['septic']:>6,}  {told}  {row['candidate']}")
    return lines


def plot(found: pd.DataFrame) -> Any:
    """The gains with their intervals, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2), ("roc_auc", "average_precision"), ("ROC AUC", "average precision"), strict=True
    ):
        gain = found[f"{name}_gain"]
        below, above = gain - found[f"{name}_gain_low"], found[f"{name}_gain_high"] - gain
        axes.errorbar(found["patients"], gain, np.clip([below, above], 0, None), fmt="o-", capsize=3)
        axes.axhline(0, color="grey", lw=1)
        axes.set(xscale="log", xlabel="local patients", ylabel=f"gain of {title}", title=title)
        axes.set_xticks(found["patients"], [f"{n:,}" for n in found["patients"]], minor=False)
        axes.minorticks_off()
    return figure
