"""The pictures of the page. Each colour has its own line style or marker, so that prints in black are readable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

STYLES = (
    {"color": "#1f77b4", "ls": "--", "marker": "s"},
    {"color": "#d62728", "ls": ":", "marker": "^"},
    {"color": "#2ca02c", "ls": "-.", "marker": "D"},
    {"color": "#9467bd", "ls": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#8c564b", "ls": (0, (8, 3)), "marker": "P"},
)
MODEL = {"color": "black", "ls": "-", "lw": 2}
GREY = {"color": "grey", "ls": "--", "lw": 1}


def figure(width: float = 13, height: float = 4.4) -> Any:
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _line(style: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in style.items() if name != "marker"}


def roc_and_precision(record: Mapping[str, Any]) -> Any:
    """ROC and precision-recall curves of the model and the ward scores, each score's usual cut as a marker."""
    picture = figure(13, 5)
    roc, precision = picture.subplots(1, 2)
    roc.plot([0, 1], [0, 1], **GREY, label="chance")
    share = record["data"]["positive_moments"] / record["data"]["judged_moments"]
    precision.axhline(share, **GREY, label="chance: share of positives")
    own = record["ranking"]["curves"]
    roc.plot([0, *own["false_positive_rate"]], [0, *own["sensitivity"]], **MODEL, label="model")
    precision.plot(own["sensitivity"], own["ppv"], **MODEL, label="model")
    for ward, style in zip(record.get("ward_scores", {}).values(), cycle(STYLES), strict=False):
        curves, at = ward["curves"], ward["differences"]["moment_sensitivity"]["comparator"]
        if curves is None or at is None:
            continue
        label = f"{ward['title']} (marker: {ward['cut']:g} or more)"
        roc.plot([0, *curves["false_positive_rate"]], [0, *curves["sensitivity"]], **_line(style), label=label)
        precision.plot(curves["sensitivity"], curves["ppv"], **_line(style), label=label)
        place = int(np.argmin(np.abs(np.array(curves["sensitivity"]) - at)))
        for axes, x, y in ((roc, "false_positive_rate", "sensitivity"), (precision, "sensitivity", "ppv")):
            axes.plot(curves[x][place], curves[y][place], color=style["color"], marker=style["marker"], ms=8)
    roc.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1))
    top = np.quantile(own["ppv"], 0.98) if own["ppv"] else 1
    precision.set(title="Precision-recall", xlabel="sensitivity", ylabel="PPV (precision)", xlim=(0, 1))
    precision.set_ylim(0, min(max(1.3 * top, 4 * share), 1.02))
    roc.legend(loc="lower right", fontsize=9)
    return picture


def load_and_yield(record: Mapping[str, Any]) -> Any:
    """PPV and sensitivity over the load of alerts: the model's thresholds, the deployed one, chance, ward scores."""
    picture = figure(13, 4.6)
    right, caught = picture.subplots(1, 2)
    rows = [row for row in record["thresholds"]["table"] if row["ppv"] is not None]
    deployed, chance = record["alerts"]["deployed"], record["alerts"]["random"]
    window = record["settings"]["window_hours"]
    dated = f"ppv_{window:g}h" in deployed
    names = (f"ppv_{window:g}h", f"sensitivity_{window:g}h") if dated else ("visit_ppv", "visit_sensitivity")
    rate = "alerts_per_100_patient_days"
    for axes, key, name in ((right, "ppv", names[0]), (caught, "sensitivity", names[1])):
        axes.plot([r[rate] for r in rows], [r[key] for r in rows], **MODEL, marker="o", ms=4, label="model, thresholds")
        if deployed.get(rate) and deployed.get(name) is not None:
            axes.plot(deployed[rate], deployed[name], "*", color="black", ms=16, label="model as deployed")
        if chance.get(name) is not None:
            axes.plot(chance[rate], chance[name], "X", color="grey", ms=10, label="random scores, same load")
        for ward, style in zip(record.get("ward_scores", {}).values(), cycle(STYLES), strict=False):
            theirs = ward["equal_alerts"]["comparator"]
            if theirs.get(rate) and theirs.get(name) is not None:
                look = {"color": style["color"], "marker": style["marker"], "ls": "", "ms": 8}
                axes.plot(theirs[rate], theirs[name], **look, label=f"{ward['title']} {ward['cut']:g} or more")
    if (answer := record["thresholds"].get("answer")) and answer[rate]:
        for axes in (right, caught):
            axes.axvline(answer[rate], **GREY)
            axes.annotate(
                "what the ward can answer", (answer[rate], 0.02), xycoords=("data", "axes fraction"), rotation=90
            )
    load = "alerts per 100 patient-days"
    right.set(title="How many alerts are right", xlabel=load, ylabel="PPV of an alert", xscale="log", ylim=(0, None))
    caught.set(
        title="How many septic visits are alerted before onset",
        xlabel=load,
        ylabel="share of septic visits",
        xscale="log",
        ylim=(0, 1.02),
    )
    for axes in (right, caught):
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    caught.legend(fontsize=9)
    return picture


def net_benefit(record: Mapping[str, Any]) -> Any:
    curve, titles = record["net_benefit"]["curve"], record.get("ward_scores", {})
    picture = figure(9, 4.6)
    axes = picture.subplots()
    x = np.array(curve["threshold"])
    axes.plot(x, curve["all"], color="grey", ls="-", lw=1, label="respond at each moment")
    axes.plot(x, curve["none"], **GREY, label="never respond")
    axes.plot(x, curve["model"], **MODEL, label="model")
    named = [name for name in curve if name not in ("threshold", "model", "all", "none")]
    for name, style in zip(named, cycle(STYLES), strict=False):
        shown = {**_line(style), "marker": style["marker"], "markevery": 8, "ms": 5}
        axes.plot(x, curve[name], **shown, label=f"{titles[name]['title']} {titles[name]['cut']:g} or more")
    top = max(curve["model"])
    axes.set(xscale="log", ylim=(-0.6 * top if top > 0 else -0.01, 1.25 * top if top > 0 else 0.01))
    axes.set(title="Net benefit", xlabel="threshold probability", ylabel="net benefit of a moment")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(fontsize=9)
    return picture


def calibration(record: Mapping[str, Any]) -> Any:
    """Reliability, and ROC AUC by hours since admission."""
    found = record["calibration"]
    picture = figure(13, 4.4)
    reliability, hours = picture.subplots(1, 2)
    curve = found["curve"]
    top = 1.1 * max(max(row["mean_probability"], row["observed_rate"]) for row in curve) or 1
    reliability.plot([0, top], [0, top], **GREY, label="perfect")
    x, y = ([row[name] for row in curve] for name in ("mean_probability", "observed_rate"))
    reliability.plot(x, y, **MODEL, marker="o", label="model, tenths of the moments")
    reliability.set(title="Reliability", xlabel="mean predicted probability", ylabel="observed share of positives")
    reliability.legend()
    rows = [row for row in found.get("by_hours", []) if row["roc_auc"] is not None]
    hours.plot([row["hours"] for row in rows], [row["roc_auc"] for row in rows], **MODEL, marker="o")
    hours.axhline(0.5, **GREY)
    hours.set(title="ROC AUC by hours since admission", ylabel="ROC AUC", ylim=(0.4, 1))
    if not rows:
        hours.annotate("too few septic visits in each stretch", (0.5, 0.5), xycoords="axes fraction", ha="center")
    return picture


def hours_of_day(counts: Sequence[int]) -> Any:
    picture = figure(9, 3)
    axes = picture.subplots()
    axes.bar(range(len(counts)), counts, color="white", edgecolor="black", hatch="//")
    axes.set(title="Alerts by hour of the day", xlabel="hour (time of the data)", ylabel="alerts", xlim=(-0.7, 23.7))
    return picture


def groups(rows: Sequence[Mapping[str, Any]], overall: Mapping[str, float | None]) -> Any:
    """Sensitivity, PPV, alert rate and expected over observed of each group with intervals, beside the whole cohort."""
    shown = [row for row in rows if row["visits"] is not None]
    measures = {
        "sensitivity": "sensitivity",
        "ppv": "PPV of an alert",
        "alerts_per_100_patient_days": "alerts per 100 patient-days",
        "expected_over_observed": "expected / observed",
    }
    picture = figure(13, 1.3 + 0.3 * len(shown))
    for place, (axes, (name, title)) in enumerate(
        zip(picture.subplots(1, len(measures), sharey=True), measures.items(), strict=True)
    ):
        for y, row in enumerate(shown):
            if row.get(name) is None:
                continue
            if row[f"{name}_95"]:
                axes.plot(row[f"{name}_95"], [y, y], color="black", lw=1)
            axes.plot(row[name], y, "o", color="black", ms=5)
        if overall.get(name) is not None:
            axes.axvline(overall[name], **GREY)
        axes.set_title(title, fontsize=10)
        if not place:
            axes.set_yticks(range(len(shown)), [f"{row['attribute']}: {row['group']}" for row in shown], fontsize=9)
            axes.set_ylim(len(shown) - 0.5, -0.5)
    return picture
