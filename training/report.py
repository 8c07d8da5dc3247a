"""One self-contained HTML page on a trained model: figures, calibration, operating points, curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_curve, roc_curve

from common.metrics import (
    OperatingPoint,
    calibration_table,
    describe_figures,
    operating_point,
)
from common.pages import facts_table, frame_table, heading, image, page, paragraph
from feature_pipeline import (
    Config,
    describe_set_aside,
)
from training.evidence import describe_evidence
from training.portable import describe_portable
from training.snapshots import PARTS, TEST
from training.thresholds import describe_thresholds
from training.trials import Evaluation, Search


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


def info_text(config: Config, facts: dict[str, Any], notices: list[str], version: str) -> str:
    """``production_model_info.txt``, for a person."""
    lines = [
        *notices,
        f"Model {version}: {config.feature_set} with {config.model['name']}, {len(config.feature_names)} features",
        "",
        *(f"{name}: {value}" for name, value in facts.items()),
        describe_thresholds(config),
        "Libraries: " + ", ".join(f"{name} {v}" for name, v in config.library_versions.items()),
        "",
        "Use: from feature_pipeline import ProductionPipeline",
        "     ProductionPipeline('models/best_model_config.json', 'models/best_model.pkl').predict(observations)",
        "A deployment is feature_pipeline.py, best_model_config.json, best_model.pkl and feature_names.json.",
        "",
        "Do not use it on patients before it was validated on local data: it is research software, no medical device.",
        "Do not edit these files: the config names the model's SHA-256, and a changed model is refused.",
    ]
    return "\n".join(lines) + "\n"


def summary_text(
    search: Search,
    entries: list[dict[str, Any]],
    finalists: list[tuple[str, str, float]],
    evaluation: Evaluation,
    config: Config,
    seconds: float,
) -> str:
    """``optimization_summary.txt``, for a person."""
    test, data = evaluation.metrics["test"], search.data
    lines = [*data.notices(), f"{data.describe()}."]
    lines += [f"Left out: {n:,} {what}." for what, n in data.remarks.items()]
    if data.observations.set_aside:
        lines.append(f"Set aside: {describe_set_aside(data.observations)}.")
    horizon = f"onset within {data.settings.horizon_hours:g} h" + (" or past" if data.settings.after_onset else "")
    lines += [
        f"Positive means: {'septic at all' if data.settings.retrospective else horizon}. Split by {data.grouped_by}: "
        + ", ".join(f"{name} {int((search.part == k).sum()):,} snapshots" for k, name in enumerate(PARTS))
        + ".",
        "",
        f"Winner: {config.feature_set} with {config.model['name']}, {len(config.feature_names)} features",
        "Test part, used once, with 95% intervals resampled by " + data.grouped_by + ":",
        *(f"  {name:<18s} {value}" for name, value in describe_figures(test).items()),
        "",
        "Grouped cross-validation of the best, on training and validation parts (ROC AUC + average precision):",
        *(f"  {score:.4f}  {fs} with {model}" for fs, model, score in finalists),
        "",
        "Operating points, from out-of-fold predictions (rates over snapshots; alerts over whole visits):",
        "  threshold  sensitivity  specificity    PPV  visits alerted  septic visits",
        "                                              per 100         alerted",
        *(
            f"  {p.threshold:9.4f}  {p.sensitivity:11.3f}  {p.specificity:11.3f}  {p.ppv:5.3f}"
            f"  {p.visits_alerted_per_100:14.1f}  {p.septic_visits_alerted:13.3f}"
            for p in evaluation.points
        ),
        describe_thresholds(config),
        *_levels_on_test(search, config, evaluation),
    ]
    if config.portable:
        lines += ["", *describe_portable(data, config.metrics["portable"])]
    lines += ["", *describe_evidence(config)]
    if config.loss_without_code:
        worst = sorted(config.loss_without_code.items(), key=lambda item: -item[1])[:10]
        lines += [
            "",
            "ROC AUC lost where a code is never measured: " + ", ".join(f"{code} {loss:.3f}" for code, loss in worst),
        ]
    ranked = sorted(entries, key=lambda e: -e.get("score", -1))
    lines += [
        "",
        f"All {len(entries)} candidates by validation ROC AUC + average precision ({seconds:.0f} s in all):",
        "  rank   score  ROC AUC  av. prec.  codes hidden  features  seconds  feature set        model",
        *(
            f"  {i:4d}  {e['score']:.4f}   {e['roc_auc']:.4f}     {e['average_precision']:.4f}"
            f"        {e['hidden_score']:.4f}  {e['n_features']:8d}"
            f"  {e['seconds']:7.1f}  {e['feature_set']:<17s}  {e['model']}"
            if "score" in e
            else f"  {i:4d}  failed  {e['feature_set']} with {e['model']}: {e['error']}"
            for i, e in enumerate(ranked, 1)
        ),
    ]
    return "\n".join(lines) + "\n"


def _levels_on_test(search: Search, config: Config, evaluation: Evaluation) -> list[str]:
    """What the levels come to on visits that were used for no decision."""
    data, rows = search.data, np.flatnonzero(search.part == TEST)
    lines = []
    for level in ("medium", "high"):
        threshold = config.risk_thresholds[level]
        p = operating_point(data.label[rows], evaluation.test_probability, data.visit[rows], threshold)
        lines.append(
            f"  {level.upper():<6s} on the test part: {p.visits_alerted_per_100:.1f} of 100 visits, "
            f"{p.septic_visits_alerted:.0%} of the septic ones; PPV {p.ppv:.3f} over snapshots"
        )
    return lines
