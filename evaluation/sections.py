"""Sections of the page that compare the model: with other scores, by decisions, groups, weeks, versions, sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.pages import facts_table, heading, image, listing, paragraph
from evaluation import plots
from evaluation.words import NOTHING, dated, hours, of, plain, points, share, signed, table, window_of


def ward_scores(record: Mapping[str, Any]) -> list[str]:
    found = record.get("ward_scores")
    if not found:
        return []
    w, model = window_of(record), record["ranking"]
    ppv, caught = (f"ppv_{w:g}h", f"sensitivity_{w:g}h") if dated(record) else ("visit_ppv", "visit_sensitivity")
    ranks = [_ranks("model", model) | {"ROC AUC, model minus score": ""}]
    moments, events, leads, lacking = [], [], [], []
    for ward in found.values():
        gap, equal = ward["differences"], ward["equal_alerts"]
        name = f"{ward['title']}, {ward['cut']:g} or more"
        ranks.append(
            _ranks(ward["title"], ward["ranking"]["comparator"])
            | {"ROC AUC, model minus score": signed(gap["roc_auc"])}
        )
        moments.append(
            {
                "score": name,
                "moments flagged": share(ward["called_share"]),
                "sensitivity of the score": share(gap["moment_sensitivity"]["comparator"]),
                "of the model": share(gap["moment_sensitivity"]["model"]),
                "difference, points": points(gap["moment_sensitivity"]),
                "PPV of the score": share(gap["moment_ppv"]["comparator"]),
                "PPV of the model": share(gap["moment_ppv"]["model"]),
            }
        )
        ours, its = equal["model"], equal["comparator"]
        events.append(
            {
                "score": name,
                "alerts per 100 patient-days": plain(its["alerts_per_100_patient_days"], digits=1),
                "of the model": plain(ours["alerts_per_100_patient_days"], digits=1),
                "PPV of the score": share(its.get(ppv)),
                "PPV of the model": share(ours.get(ppv)),
                "PPV, difference in points": points(equal["differences"][ppv]),
                "septic visits alerted by the score": share(its.get(caught)),
                "by the model": share(ours.get(caught)),
                "difference in points": points(equal["differences"][caught]),
            }
        )
        leads.append(
            {
                "score": name,
                "threshold of the model": NOTHING if equal["threshold"] is None else f"{equal['threshold']:.4g}",
                "lead time of the score": hours(its.get(f"lead_hours_{w:g}h")),
                "lead time of the model": hours(ours.get(f"lead_hours_{w:g}h")),
                "hours, model minus score": signed(equal["differences"].get(f"lead_hours_{w:g}h"), digits=1),
            }
        )
        parts = ", ".join(
            f"{part.replace('_', ' ')} {share(n, digits=0)}" for part, n in ward["inputs_missing"].items()
        )
        lacking.append(f"{ward['title']}: no input at all {share(ward['without_input'])}; by part: {parts}")
    out = [
        heading("Compared with ward scores"),
        paragraph(
            "All scores are computed for the same visits and moments, from the observations of the last 24 h. A score "
            "without inputs, and UNKNOWN, ranks lowest and causes no alert. Differences are the model minus the score, "
            "paired, with 95% intervals. If an interval does not include 0, the difference is more than chance."
        ),
    ]
    if model["curves"]:
        known = ", ".join(f"{row['score']} {row['ROC AUC'][:5]}" for row in ranks)
        out.append(image(plots.roc_and_precision(record), f"ROC and precision-recall curves. ROC AUC: {known}"))
    out += [
        table(ranks),
        paragraph(
            "A moment is one score of a visit. The ward score at its usual threshold flags a share of the moments; the "
            "model flags as many. Sensitivity is the share of the positive moments that are flagged, PPV the share of "
            "the flagged moments that are positive."
        ),
        table(moments),
        paragraph("Alerts, with a threshold of the model that causes at most as many alerts as the ward score:"),
        table(events),
    ]
    if dated(record):
        out += [paragraph(f"Lead time of the first alert in the last {w:g} h before onset:"), table(leads)]
    cuts = "; ".join(f"{ward['title']} {ward['cut']:g}, {ward['source']}" for ward in found.values())
    return [
        *out,
        paragraph(
            "Share of the moments at which inputs were missing in the last 24 h (a missing part counts as 0 points):"
        ),
        listing(lacking),
        paragraph(f"Thresholds: {cuts}."),
    ]


def _ranks(name: str, figures: Mapping[str, Any]) -> dict[str, str]:
    return {
        "score": name,
        "ROC AUC": of(figures, "roc_auc", plain, digits=3),
        "average precision": of(figures, "average_precision", plain, digits=3),
    }


def net_benefit(record: Mapping[str, Any]) -> list[str]:
    found = record.get("net_benefit")
    if not found:
        return []
    ranges = found["model_best_between"]
    spans = ", ".join(f"{low:.3g} to {high:.3g}" for low, high in ranges)
    said = (
        f"The model has the highest net benefit of all at threshold probabilities of {spans}."
        if ranges
        else "At no threshold probability does the model have the highest net benefit of all."
    )
    text = (
        "The threshold probability says how many needless responses a ward accepts for one response in time: at 0.02, "
        "49. Net benefit is the number of positive moments with a response, minus the needless responses, weighted by "
        "this ratio (Vickers and Elkin, Med Decis Making 2006;26:565)."
    )
    alt = (
        f"Net benefit over threshold probabilities of the model, of always and never responding, of ward scores. {said}"
    )
    return [heading("What it is worth"), paragraph(text), image(plots.net_benefit(record), alt), paragraph(said)]


def calibration(record: Mapping[str, Any]) -> list[str]:
    found = record["calibration"]
    if not found.get("curve") or found["expected_over_observed"] is None:
        return []
    facts = {
        "expected over observed (1 is right)": of(found, "expected_over_observed", plain),
        "slope (1 is right; below, scores are too extreme)": plain(found["slope"]),
        "intercept (0 is right)": plain(found["intercept"]),
        "calibration in the large (0 is right)": plain(found["in_the_large"]),
        "Brier score": plain(found["brier"], digits=5),
    }
    ratio = found["expected_over_observed"]
    word = "as often as" if 0.9 <= ratio <= 1.1 else ("more often than" if ratio > 1 else "less often than")
    said = f"The model predicts sepsis {word} it occurs: {ratio:.2f} expected for each observed positive moment."
    out = [
        heading("Are the probabilities right?"),
        paragraph(said),
        facts_table(facts),
        image(plots.calibration(record), f"Reliability curve, and ROC AUC by hours since admission. {said}"),
    ]
    if rows := found.get("by_hours"):
        out.append(table([_stretch(row, "hours", "since admission") for row in rows]))
    months = found["by_month"]
    if len(months) > 1:
        out += [paragraph("By month:"), table([_stretch(row, "month", "month") for row in months])]
    else:
        out.append(paragraph("All scores are of one month: whether figures change over time is not known."))
    return out


def _stretch(row: Mapping[str, Any], key: str, title: str) -> dict[str, Any]:
    few = "too few septic visits" if row["roc_auc"] is None else ""
    return {
        title: row[key],
        "visits": f"{row['visits']:,}",
        "with positive moments": f"{row['positive_visits']:,}",
        "ROC AUC": few or plain(row["roc_auc"], digits=3),
        "expected / observed": few or plain(row["expected_over_observed"]),
    }


def groups(record: Mapping[str, Any]) -> list[str]:
    found = record.get("groups")
    if not found:
        return []
    rows = [
        {
            "group": f"{row['attribute']}: {row['group']}",
            "visits": "too few" if row["visits"] is None else f"{row['visits']:,}",
            "septic": f"{row.get('septic', 0):,}" if row["visits"] is not None else "",
            "alerts per 100 patient-days": of(row, "alerts_per_100_patient_days", plain),
            "septic visits alerted": of(row, "sensitivity"),
            "PPV": of(row, "ppv"),
            "expected / observed": of(row, "expected_over_observed", plain),
            "slope": plain(row["calibration"]["slope"]) if "calibration" in row else "",
        }
        for row in found["table"]
    ]
    names = {
        "alerts_per_100_patient_days": "alerts per 100 patient-days",
        "sensitivity": "share of septic visits alerted",
        "ppv": "PPV of an alert",
        "expected_over_observed": "expected over observed",
    }
    named = [
        f"{row['attribute']} {row['group']}: {names[row['measure']]} {row['value']:.3g}, all others {row['others']:.3g}"
        for row in found["beyond_chance"]
    ]
    measured = record["alerts"]["deployed"]
    w = window_of(record)
    overall = {
        "alerts_per_100_patient_days": measured["alerts_per_100_patient_days"],
        "sensitivity": measured.get(f"sensitivity_{w:g}h", measured["visit_sensitivity"]),
        "ppv": measured.get(f"ppv_{w:g}h", measured["visit_ppv"]),
        "expected_over_observed": record["calibration"]["expected_over_observed"],
    }
    shown = sum(row["visits"] is not None for row in found["table"])
    alt = f"Figures of {shown} groups with intervals; a dashed line shows the whole cohort. The table has the numbers"
    text = (
        f"At the deployed threshold. Groups of fewer than {found['held_back_below']} visits are not shown. Each group "
        f"is compared with all other visits; {found['comparisons']} comparisons, corrected for their number (Holm)."
    )
    out = [heading("Groups"), paragraph(text), table(rows)]
    if shown:
        out.append(image(plots.groups(found["table"], overall), alt))
    if named:
        out += [paragraph("These differences are more than chance:"), listing(named)]
    else:
        out.append(paragraph("No difference between groups is more than chance. Small groups may hide one."))
    return out


def weeks(record: Mapping[str, Any]) -> list[str]:
    found = record.get("silent_trial")
    if not found:
        return []
    rows = [
        {
            "week of": row["week"],
            "visits": f"{row['visits']:,}",
            "septic": f"{row['septic_visits']:,}",
            "alerts per 100 patient-days": plain(row["alerts_per_100_patient_days"]),
            "PPV": share(row["ppv"]),
            "septic visits alerted": share(row["sensitivity"]),
            "ROC AUC": plain(row["roc_auc"], digits=3),
            "expected / observed": plain(row["expected_over_observed"]),
            "UNKNOWN": share(row["unknown_share"]),
        }
        for row in found["weeks"]
    ]
    out = [heading("Silent trial, by week"), paragraph("A visit counts in the week of its first score."), table(rows)]
    if found["stop_rule"]:
        out += [paragraph("Stop rule:"), listing(line["text"] for line in found["stop_rule"])]
    else:
        out.append(paragraph("No stop rule was given; --stop-rule names one."))
    return out


def versions(record: Mapping[str, Any]) -> list[str]:
    found = record.get("comparison")
    if not found:
        return []
    own, equal = found["own_thresholds"], found["equal_alerts"]
    old, new = found["old_version"], found["new_version"]
    rows = []
    for title, name, show in _side_figures(record):
        gap = own["differences"].get(name)
        if gap is None:
            continue
        at_equal = equal["differences"][name]
        rows.append(
            {
                "figure": title,
                old: show(gap["comparator"]),
                new: show(gap["model"]),
                f"{new} at the load of {old}": show(at_equal["model"]),
                "difference at that load, 95%": ""
                if at_equal["difference_95"] is None
                else "{:+.3g} to {:+.3g}".format(*at_equal["difference_95"]),
            }
        )
    for name, title in (("roc_auc", "ROC AUC"), ("average_precision", "average precision")):
        gap = found["ranking_differences"][name]
        span = "" if gap["difference_95"] is None else "{:+.4f} to {:+.4f}".format(*gap["difference_95"])
        values = {key: plain(found["ranking"][which][name], digits=4) for key, which in ((old, "old"), (new, "new"))}
        rows.append({"figure": title, **values, "difference at that load, 95%": span})
    text = f"Model {new} against model {old} on the same moments. Differences are {new} minus {old}, paired."
    return [heading("Two versions"), paragraph(text), table(rows)]


def sites(record: Mapping[str, Any]) -> list[str]:
    found = record.get("side_by_side")
    if not found:
        return []
    shown = {name: part for name, part in found["parts"].items() if part is not None}
    rows: list[dict[str, Any]] = [
        {"figure": "visits", **{name: f"{part['data']['visits']:,}" for name, part in shown.items()}},
        {"figure": "septic visits", **{name: f"{part['data']['septic_visits']:,}" for name, part in shown.items()}},
    ]
    for title, name, show in _side_figures(record):
        rows.append({"figure": title, **{site: of(part["alerts"], name, show) for site, part in shown.items()}})
    for name, title in (("roc_auc", "ROC AUC"), ("average_precision", "average precision")):
        values = {site: of(part["ranking"], name, plain, digits=3) for site, part in shown.items()}
        rows.append({"figure": title, **values})
    for name, title in (("expected_over_observed", "expected / observed"), ("slope", "calibration slope")):
        rows.append({"figure": title, **{site: plain(part["calibration"][name]) for site, part in shown.items()}})
    out = [heading(f"Side by side: {found['column']}"), table(rows)]
    if held := [name for name, part in found["parts"].items() if part is None]:
        out.append(paragraph(f"{len(held)} values with too few visits are not shown."))
    return out


def _side_figures(record: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    w = f"{window_of(record):g}h"
    return [
        ("alerts per 100 patient-days", "alerts_per_100_patient_days", plain),
        ("visits alerted of 100", "visits_alerted_per_100", plain),
        *(
            [(f"PPV of an alert ({w})", f"ppv_{w}", share), (f"septic visits alerted ({w})", f"sensitivity_{w}", share)]
            if dated(record)
            else [("PPV of a visit", "visit_ppv", share), ("septic visits alerted", "visit_sensitivity", share)]
        ),
        ("UNKNOWN scores", "unknown_share", share),
    ]
