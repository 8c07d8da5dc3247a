"""What the project knows of a model and of an evaluation, as sentences that papers can quote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.model_record import (
    OUT_OF_SCOPE,
    ROLE,
    demographics_of,
    intended_use,
    levels_of,
    limits_of,
    output_of,
)
from evaluation.words import of, plain, share
from feature_pipeline import Config


def facts_of(config: Config, record: Mapping[str, Any]) -> dict[str, str]:
    """Sentences by name. A name that is missing is not known."""
    data, found, model = record["data"], record["alerts"]["deployed"], record["model"]
    source = config.training_source
    facts = {
        "name": f"sepsis risk, version {model['version']}",
        "version": model["version"],
        "date": model["trained_at"] or "",
        "output": (
            f"A probability of {output_of(config)} for a visit at a moment, and a risk level: {levels_of(config)}, "
            "LOW below; UNKNOWN where the evidence is not enough."
        ),
        "kind_of_output": "A prediction (a probability), with a classification into risk levels.",
        "use": intended_use(config),
        "role": ROLE,
        "users": "Clinicians who care for the visit, and the data team that runs the service.",
        "out_of_scope": OUT_OF_SCOPE,
        "limits": " ".join(line if line.endswith(".") else f"{line}." for line in limits_of(config)),
        "training_data": source.get("description") or "The data of the search; see the config.",
        "synthetic": "The training data are synthetic: no real patients." if source["synthetic"] else "",
        "inclusion": (
            "Included: visits with a label and at least one usable observation. Excluded: rows that the validating "
            "reader sets aside (no date, no number, implausible), septic visits without a date of onset"
            + ("." if config.snapshots.after_onset else ", moments after onset.")
        ),
        "demographic_inputs": demographics_of(config),
        "model_kind": f"{config.model['name']} on {len(config.feature_names)} features, calibrated",
        "inputs": (
            f"Numbers with a time, a code and a visit, of {len(config.codes)} codes of vital signs, laboratory values "
            "and static facts; a table, records, FHIR, HL7 v2 or a stream."
        ),
        "missing": (
            "A feature without an observation is "
            + (
                "left empty for the model, which handles it"
                if config.fill_value is None
                else f"set to {config.fill_value:g}"
            )
            + ". Clinical scores add up the parts that are there."
        ),
        "fairness_approach": (
            "Figures are worked out for each group of age, sex, unit and each group that the hospital names, with "
            "intervals; differences that exceed chance are named. No group is treated otherwise by the model."
        ),
        "validity_test": validity_in_training(config),
        "validity_here": validity_here(record),
        "fairness_here": fairness_here(record),
        "here": (
            f"{data['visits']:,} visits of {data['clients']:,} clients, {data['septic_visits']:,} septic, "
            f"{data['patient_days']:,.0f} patient-days. Clients that the model learned from are left out."
        ),
        "representativeness_here": representativeness(record),
        "process_here": (
            f"Each visit was scored at {data['moments']:,} moments in all as in service, with the deployed thresholds. "
            f"An alert is right if onset follows within {record['settings']['window_hours']:g} h or lies at most "
            f"{record['settings']['grace_hours']:g} h back. Intervals: 95%, whole clients resampled."
        ),
        "monitoring": (
            "monitor.py check watches drift, missing codes, latency and errors, and, with outcomes, "
            "discrimination, calibration and the stop rule; evaluate_model.py --from-log reports on live scores."
        ),
        "fairness_monitoring": "evaluate_model.py --groups works out the figures of each group on newer visits.",
        "updating": (
            "train_best_model.py --retrain searches on old and new data, compares on held-out new patients, and "
            "deploys only what is not worse; --rollback goes back to an archived version."
        ),
        "class_imbalance": "No resampling. Probabilities are calibrated on out-of-fold predictions (Platt).",
        "split": (
            "Test, validation and training parts are split by client. Only the search's winner meets the test part."
        ),
        "specification": (
            f"best_model_config.json and best_model.pkl (SHA-256 {config.model_sha256}); feature_pipeline.py computes "
            "features and probability."
        ),
        "sample_size": f"Training: {source.get('description') or 'see config'}. Evaluation: {data['visits']:,} visits.",
        "alerts_here": (
            f"{of(found, 'alerts_per_100_patient_days', plain)} alerts per 100 patient-days, "
            f"{of(found, 'visits_alerted_per_100', plain)} visits of 100 with an alert."
        ),
        "security": (
            "The model file is checked by SHA-256 before it is loaded; logs, metrics and errors hold no observation, "
            "client or visit number. See SECURITY.md."
        ),
    }
    return {name: text for name, text in facts.items() if text}


def validity_in_training(config: Config) -> str:
    """Figures of the untouched test part, or of out-of-fold predictions."""
    for name, basis in (("test", "the untouched test part"), ("out_of_fold", "out-of-fold predictions of all data")):
        found = config.metrics.get(name)
        if found and "roc_auc" in found:
            return (
                f"On {basis}: ROC AUC {found['roc_auc']:.3f} ({found['roc_auc_95'][0]:.3f} to "
                f"{found['roc_auc_95'][1]:.3f}), average precision {found['average_precision']:.3f}, "
                f"share of positives {found['positive_rate']:.3f}."
            )
    return ""


def validity_here(record: Mapping[str, Any]) -> str:
    ranks, found, w = record["ranking"], record["alerts"]["deployed"], f"{record['settings']['window_hours']:g}h"
    calibration = record["calibration"]
    said = [
        f"ROC AUC {of(ranks, 'roc_auc', plain, digits=3)}, average precision "
        f"{of(ranks, 'average_precision', plain, digits=3)}; expected over observed "
        f"{of(calibration, 'expected_over_observed', plain)}, calibration slope {plain(calibration['slope'])}."
    ]
    if f"ppv_{w}" in found:
        said.append(
            f"At the deployed threshold: PPV of an alert {of(found, f'ppv_{w}')}, septic visits alerted before onset "
            f"{of(found, f'sensitivity_{w}')}, {of(found, 'alerts_per_100_patient_days', plain)} alerts per 100 "
            "patient-days."
        )
    for ward in record.get("ward_scores", {}).values():
        theirs = ward["ranking"]["comparator"]
        said.append(f"{ward['title']}: ROC AUC {of(theirs, 'roc_auc', plain, digits=3)}.")
    return " ".join(said)


def fairness_here(record: Mapping[str, Any]) -> str:
    found = record.get("groups")
    if not found:
        return ""
    lines = [
        f"{row['attribute']} {row['group']}: sensitivity {share(row.get('sensitivity'))}, PPV {share(row.get('ppv'))}, "
        f"expected over observed {plain(row.get('expected_over_observed'))}"
        for row in found["table"]
        if row["visits"] is not None
    ]
    named = [
        f"{row['attribute']} {row['group']} ({row['measure'].replace('_', ' ')})" for row in found["beyond_chance"]
    ]
    verdict = f"Differences that exceed chance: {', '.join(named)}." if named else "No difference exceeds chance."
    return f"{'; '.join(lines)}. {verdict}"


def representativeness(record: Mapping[str, Any]) -> str:
    found = record.get("groups")
    if not found:
        return ""
    shown = [row for row in found["table"] if row["visits"] is not None]
    return "; ".join(f"{row['attribute']} {row['group']}: {row['visits']:,} visits" for row in shown) + "."
