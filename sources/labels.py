"""What `prepare_data.py` does about labels: its options, `labels.parquet`, and the labels' part of the report."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import pandas as pd

from common import pages
from common.artifacts import write_tables
from common.command_line import log
from sources.sepsis3 import DEFINITIONS, ONSETS, LabelSettings, judge_visits, shares_of_evidence

if TYPE_CHECKING:
    import duckdb

# What others found with these definitions.
PUBLISHED: dict[str, tuple[dict[str, str], ...]] = {
    "sepsis3": (
        {
            "septic": "49.1 % of 11,791 patients in intensive care (MIMIC-III)",
            "source": "Johnson et al., Crit Care Med 2018;46:494-499",
        },
    ),
    "sepsis3-rise": (
        {
            "septic": "18.8 % of 136,478 stays in intensive care (four databases)",
            "source": "Moor et al., eClinicalMedicine 2023;62:102124, doi 10.1016/j.eclinm.2023.102124",
        },
    ),
    "ase": (
        {
            "septic": "6.0 % of 2,901,019 hospital stays of adults (409 hospitals)",
            "source": "Rhee et al., JAMA 2017;318:1241-1249, doi 10.1001/jama.2017.13836",
        },
        {
            "septic": "95,154 of 2.2 million hospital stays of adults (136 hospitals), 87.9 % of them community-onset",
            "source": "Rhee et al., Crit Care Med 2019;47:1169, doi 10.1097/CCM.0000000000003817",
        },
    ),
}

# Hours from the start of the visit to the onset: name, from, below.
WHEN = (
    ("before the visit", float("-inf"), 0),
    ("from 0 to 6 h", 0, 6),
    ("from 6 to 24 h", 6, 24),
    ("from 24 to 48 h", 24, 48),
    ("from 48 to 72 h", 48, 72),
    ("after 72 h", 72, float("inf")),
)
ARRIVAL_HOURS = 6
# Below these shares the report warns that the source may lack what the definition needs.
FEW_ANTIBIOTICS = 0.2  # of the patients; in the MIMIC-IV demo 80 % have one
FEW_CULTURES = 1 / 3  # of the orders; in the MIMIC-IV demo 88 %


def add_label_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("labels", "which visits became septic, and when; docs/labels.md explains them")
    option = group.add_argument
    option("--labels", choices=(*DEFINITIONS, "none"), default="sepsis3", help="the definition of sepsis")
    option(
        "--onset",
        choices=ONSETS,
        default="earlier",
        help="time of sepsis_onset: that of the suspected infection, that of the organ dysfunction (sofa), or the "
        "earlier or later one of the two",
    )
    option(
        "--sofa-hours",
        choices=("icu", "hospital"),
        default="icu",
        help="where SOFA is counted: in stays in intensive care, or in whole hospital stays; a source without stays in "
        "intensive care always takes the second",
    )
    option(
        "--ase-lactate", action="store_true", help="lactate of 2 mmol/L counts as an organ of the Adult Sepsis Event"
    )


def settings_of(arguments: argparse.Namespace) -> LabelSettings | None:
    """The settings that the options name; None where no labels are wanted. Raises `BadConfig`."""
    if arguments.labels == "none":
        return None
    return LabelSettings(
        arguments.labels, arguments.onset, arguments.visits, arguments.sofa_hours, arguments.ase_lactate
    )


def write_labels(con: duckdb.DuckDBPyConnection, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Writes `labels.parquet` where a visit can be judged. Returns the figures for the report, None without labels."""
    settings = settings_of(arguments)
    if settings is None:
        return None
    judged = judge_visits(con, settings)
    figures = summary(judged, settings) | shares_of_evidence(con, settings)
    left_out = "; ".join(f"{n} visits left out: {reason}" for reason, n in figures["left_out"].items())
    if not figures["visits"]:
        log.warning("no labels: %s", left_out or "there are no visits")
        return figures
    for warning in warnings_of(figures):
        log.warning("labels: %s", warning)
    write_tables({arguments.out / "labels.parquet": table_of(judged)})
    log.info(
        "labels by %s: %d of %d visits septic%s",
        settings.definition,
        figures["septic"],
        figures["visits"],
        f"; {left_out}" if left_out else "",
    )
    return figures


def table_of(judged: pd.DataFrame) -> pd.DataFrame:
    """The labels: one row for each visit that could be judged."""
    return judged[judged["left_out"].isna()].drop(columns=["left_out", "visit_start"]).reset_index(drop=True)


def summary(judged: pd.DataFrame, settings: LabelSettings) -> dict[str, Any]:
    """How many visits are septic, when in the stay, how many could not be judged, and what others found."""
    kept = judged[judged["left_out"].isna()]
    septic = kept[kept["sepsis"] == 1]
    hours = (septic["sepsis_onset"] - septic["visit_start"]).dt.total_seconds() / 3600
    days = (septic["sepsis_onset"].dt.normalize() - septic["visit_start"].dt.normalize()).dt.days
    n = len(septic)
    return {
        "definition": settings.definition,
        "meaning": DEFINITIONS[settings.definition],
        "onset": settings.onset,
        "visits": len(kept),
        "septic": n,
        "septic_share": n / len(kept) if len(kept) else None,
        "suspected": int(kept["suspicion_time"].notna().sum()),
        "when": {name: int(((hours >= low) & (hours < high)).sum()) for name, low, high in WHEN},
        "median_hours_to_onset": float(hours.median()) if n else None,
        "at_arrival_share": float((hours < ARRIVAL_HOURS).mean()) if n else None,
        "first_two_days_share": float((days < 2).mean()) if n else None,
        "left_out": {reason: int(count) for reason, count in judged["left_out"].value_counts().sort_index().items()},
        "published": list(PUBLISHED[settings.definition]),
    }


def warnings_of(figures: dict[str, Any]) -> list[str]:
    """What speaks for it that the source lacks antibiotics or cultures, so that septic visits are labelled as not."""
    found = []
    antibiotics, cultures = figures["antibiotic_share"], figures["culture_share"]
    if antibiotics is not None and antibiotics < FEW_ANTIBIOTICS:
        found.append(
            f"only {antibiotics:.0%} of the patients have an antibiotic. If the source lacks names of drugs, "
            "septic visits are labelled as not septic"
        )
    if cultures is not None and cultures < FEW_CULTURES:
        what = "courses of antimicrobials" if figures["definition"] == "ase" else "antibiotic orders"
        found.append(
            f"only {cultures:.0%} of the {what} have a culture near them. If the source lacks cultures, "
            "septic visits are labelled as not septic"
        )
    return found


def report_parts(figures: dict[str, Any] | None) -> list[str]:
    """The labels' part of the page; nothing where no labels were wanted."""
    if figures is None:
        return []
    parts = [pages.heading("Labels"), pages.paragraph(f"{figures['meaning']}.")]
    if figures["visits"]:
        shares = {
            "patients with an antibiotic": figures["antibiotic_share"],
            "antibiotic orders (ase: courses) with a culture near them": figures["culture_share"],
            "septic, of the visits judged": figures["septic_share"],
            "septic at arrival (onset before or in the first 6 h), of the septic": figures["at_arrival_share"],
            "onset on the first two days, of the septic": figures["first_two_days_share"],
        }
        median = figures["median_hours_to_onset"]
        parts += [
            *(pages.paragraph(f"Warning: {warning}.") for warning in warnings_of(figures)),
            pages.facts_table(
                {
                    "visits judged": figures["visits"],
                    "septic visits": figures["septic"],
                    "visits with a suspected infection": figures["suspected"],
                    **{name: "-" if share is None else f"{share:.1%}" for name, share in shares.items()},
                    "median hours from start to onset": "-" if median is None else f"{median:.1f}",
                    **{f"onset {name}": n for name, n in figures["when"].items()},
                }
            ),
            pages.paragraph("What others found with this definition:"),
            pages.frame_table(pd.DataFrame(figures["published"])),
        ]
    if figures["left_out"]:
        parts += [
            pages.paragraph("Visits without a label, because the definition cannot be judged in them:"),
            pages.facts_table(figures["left_out"]),
        ]
    return parts
