"""The page for people who decide: each figure with a sentence that says what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.pages import facts_table, heading, image, listing, page, paragraph
from evaluation import plots
from evaluation.sections import calibration, groups, net_benefit, sites, versions, ward_scores, weeks
from evaluation.words import NOTHING, beyond, dated, hours, of, plain, share, table, window_of


def report_page(record: Mapping[str, Any], notices: Sequence[str]) -> str:
    """The whole document of a record of `evaluate`."""
    sections = [summary, alerts, thresholds, ward_scores, net_benefit, calibration, groups, weeks, versions, sites]
    parts = [text for section in sections for text in section(record)]
    model = record["model"]
    return page(f"Is it good enough here? Model {model['version']}", [*notices, *record["cannot_be_said"]], *parts)


def summary(record: Mapping[str, Any]) -> list[str]:
    data, model, found = record["data"], record["model"], record["alerts"]["deployed"]
    w, chance = window_of(record), record["alerts"]["random"]
    facts = {
        "model": f"{model['version']}, {model['feature_set']} with {model['kind']}, {model['features']} features",
        "visits": f"{data['visits']:,} of {data['clients']:,} clients, {data['septic_visits']:,} septic",
        "followed": f"{data['patient_days']:,.0f} patient-days, {data['moments']:,} scores",
        "UNKNOWN": share(data["unknown_moments"] / max(data["moments"], 1)) + " of the scores",
        "HIGH from": f"{model['risk_thresholds']['high']:.4g}",
        "positive": f"moments with onset at most {model['horizon_hours']:g} h away"
        if dated(record)
        else "septic visits",
        "intervals": "95%, whole clients resampled",
    }
    lines = [f"{name}: {number:,}" for name, number in data["left_out"].items()]
    out = [facts_table(facts)]
    if unused := data.get("unused_codes"):
        most = ", ".join(f"{code} ({n:,})" for code, n in list(unused.items())[:10])
        more = f" and {len(unused) - 10:,} more" if len(unused) > 10 else ""
        out.append(paragraph(f"Codes that the model does not use, with their observations: {most}{more}."))
    if reasons := data.get("unknown_reasons"):
        out += [paragraph("UNKNOWN, by reason:"), listing(f"{text}: {n:,} scores" for text, n in reasons.items())]
    if lines:
        out += [paragraph("Left out of the evaluation:"), listing(lines)]
    ppv, caught = (f"ppv_{w:g}h", f"sensitivity_{w:g}h") if dated(record) else ("visit_ppv", "visit_sensitivity")
    load = plain(_scaled(found["alerts_per_100_patient_days"], record))
    said = [f"A ward of {record['settings']['beds']} beds gets {load} alerts a day."]
    if found.get(ppv) is not None:
        said.append(f"Of the alerts, {of(found, ppv)} are right; of random alerts, {share(chance.get(ppv))} would be.")
    if found.get(caught) is not None and chance:
        when = "in time" if dated(record) else "at some time"
        said.append(
            f"Of the septic visits, {of(found, caught)} have an alert {when}; with as many random alerts, "
            f"{share(chance.get(caught))} would."
        )
    for ward in record.get("ward_scores", {}).values():
        difference = ward["differences"]["moment_sensitivity"]
        if difference["difference"] is None:
            continue
        said.append(
            f"{ward['title']} of {ward['cut']:g} or more finds {share(difference['comparator'])} of the positive "
            f"moments; the model finds {share(difference['model'])} if it flags as many moments "
            f"({share(ward['called_share'])}): {beyond(difference)}."
        )
    if worse := record.get("groups", {}).get("beyond_chance"):
        said.append(f"{len(worse)} differences between groups exceed chance; see Groups.")
    return [*out, heading("In short"), listing(said)]


def _scaled(rate: float | None, record: Mapping[str, Any]) -> float | None:
    return None if rate is None else rate * record["settings"]["beds"] / 100


def alerts(record: Mapping[str, Any]) -> list[str]:
    found, chance, w = record["alerts"]["deployed"], record["alerts"]["random"], window_of(record)
    settings = record["settings"]
    names = {
        "alerts_per_100_patient_days": ("alerts per 100 patient-days", plain),
        "rises_per_100_patient_days": ("of these, alerts at a rise of the risk level", plain),
        "visits_alerted_per_100": ("visits with an alert, of 100", plain),
        "late_alerts_per_100_patient_days": ("alerts too late, per 100 patient-days", plain),
        "visit_ppv": ("visits with an alert that are septic", share),
        "visit_sensitivity": ("septic visits with an alert at any time", share),
    }
    for hours_ahead in settings["windows"]:
        key = f"{hours_ahead:g}h"
        names |= {
            f"false_alerts_per_100_patient_days_{key}": (f"false alerts per 100 patient-days ({key})", plain),
            f"ppv_{key}": (f"PPV of an alert ({key})", share),
            f"sensitivity_{key}": (f"septic visits alerted before onset ({key})", share),
        }
    rows = [
        {"figure": title, "model": of(found, name, show), "random scores": show(chance.get(name))}
        for name, (title, show) in names.items()
        if name in found
    ]
    if dated(record):
        for hours_ahead in settings["windows"]:
            name = f"lead_hours_{hours_ahead:g}h"
            by_chance = chance.get(name)
            rows.append(
                {
                    "figure": f"lead time, first alert in the last {hours_ahead:g} h before onset",
                    "model": hours(found.get(name)),
                    "random scores": NOTHING if by_chance is None else f"{by_chance:.1f} h",
                }
            )
    text = (
        f"An alert starts at a HIGH score. A visit that stays HIGH alerts again after {settings['cooldown_hours']:g} h."
        " A service that alerts only when the risk level rises sends the alerts of the second line."
    )
    out = [heading("Alerts"), paragraph(text)]
    if dated(record):
        out.append(
            paragraph(
                f"An alert is right if onset follows within {w:g} h (or the hours in brackets), or was at most "
                f"{settings['grace_hours']:g} h before. Later alerts are too late: they count in the number of alerts, "
                "but as neither right nor false."
            )
        )
    out += [table(rows), paragraph(chance_in_words(record))]
    if any(record["alerts"]["hours_of_day"]):
        counts = record["alerts"]["hours_of_day"]
        peak = max(range(24), key=counts.__getitem__)
        alt = f"Bars: alerts by hour of the day; most start in the hour from {peak}:00, {counts[peak]:,} alerts"
        out.append(image(plots.hours_of_day(counts), alt))
    if left_out := record["alerts"]["left_out"]:
        out += [paragraph("Counted apart:"), listing(f"{name}: {n:,}" for name, n in left_out.items())]
    if before := record["alerts"].get("before_antibiotics"):
        out.append(
            paragraph(
                f"{before['alerted_before']:,} of {before['septic_visits_with_antibiotic']:,} septic visits with an "
                f"antibiotic had an alert in the {before['window_hours']:g} h before it (the labels' antibiotic_time; "
                "in those of prepare_data.py that of the suspected infection, not the first of the stay); lead time "
                f"{hours(before['lead_hours'])}. An alert after it tells the ward what the ward knows."
            )
        )
    return out


def chance_in_words(record: Mapping[str, Any]) -> str:
    """What of the figures is noise."""
    found, chance, w = record["alerts"]["deployed"], record["alerts"]["random"], window_of(record)
    if not chance:
        return "The model gives no alert, so there is nothing to compare with chance."
    ppv, caught = (f"ppv_{w:g}h", f"sensitivity_{w:g}h") if dated(record) else ("visit_ppv", "visit_sensitivity")
    better = [
        found.get(name) is not None and chance[f"{name}_range"] is not None and found[name] > chance[f"{name}_range"][1]
        for name in (ppv, caught)
    ]
    words = {
        (True, True): "The alerts are right more often than random ones, and reach more septic visits.",
        (True, False): "The alerts are right more often than random ones, but reach no more septic visits.",
        (False, True): "The alerts reach more septic visits than random ones, but are right no more often.",
        (False, False): "The alerts are no better than random ones: neither more often right, nor more complete.",
    }[tuple(better)]
    if found.get(ppv) is not None and chance.get(ppv):
        words += f" The PPV is {found[ppv] / chance[ppv]:.1f} times that of random alerts."
    if dated(record):
        lead, by_chance = found.get(f"lead_hours_{w:g}h"), chance.get(f"lead_hours_{w:g}h")
        if lead and by_chance is not None:
            words += (
                f" The lead time by itself proves nothing: random alerts have one of {by_chance:.1f} h in the median, "
                f"the model's {lead[0]:.1f} h."
            )
    return words


def thresholds(record: Mapping[str, Any]) -> list[str]:
    found, beds = record["thresholds"], record["settings"]["beds"]
    if not found["table"]:
        return []
    rows = [
        {
            "budget": f"{row['budget']:g}",
            "threshold": f"{row['threshold']:.4g}",
            "alerts per 100 patient-days": plain(row["alerts_per_100_patient_days"]),
            f"alerts a day, {beds} beds": plain(row["alerts_a_day"]),
            "visits alerted of 100": plain(row["visits_alerted_per_100"], digits=1),
            "PPV": share(row["ppv"]),
            "septic visits alerted": share(row["sensitivity"]),
            "lead time": NOTHING if row.get("lead_hours") is None else f"{row['lead_hours']:.1f} h",
        }
        for row in found["table"]
    ]
    first, last = found["table"][0], found["table"][-1]
    alt = (
        "Two curves over alerts per 100 patient-days. PPV goes from "
        f"{share(first['ppv'])} at {plain(first['alerts_per_100_patient_days'], digits=1)} to {share(last['ppv'])} at "
        f"{plain(last['alerts_per_100_patient_days'], digits=1)}; septic visits alerted from "
        f"{share(first['sensitivity'])} to {share(last['sensitivity'])}"
    )
    out = [
        heading("Thresholds"),
        paragraph(
            "Each line keeps to a budget of alerts per 100 patient-days with the lowest threshold that does. A higher "
            "threshold gives fewer alerts of which more are right, and misses more."
        ),
        table(rows),
        image(plots.load_and_yield(record), alt),
    ]
    if "answer" in found:
        asked = record["settings"]["alerts_a_day"]
        if found["answer"] is None:
            out.append(paragraph(f"No threshold keeps to {asked:g} alerts a day."))
        else:
            row = found["answer"]
            out.append(
                paragraph(
                    f"Budget of the ward: {asked:g} a day for {beds} beds. HIGH then starts at "
                    f"{row['threshold']:.4g}: {plain(row['alerts_a_day'])} alerts a day, {share(row['ppv'])} right, "
                    f"{share(row['sensitivity'])} of the septic visits alerted. To deploy it: {found['command']}"
                )
            )
    return out
