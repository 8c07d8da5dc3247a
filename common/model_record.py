"""What the project says about a model: the same sentences in the model card and in the papers that a hospital fills."""

from __future__ import annotations

from feature_pipeline import Config, concept_of

ROLE = "It informs: it stands beside clinical judgement and is not the only ground of any decision."
OUT_OF_SCOPE = (
    "It is no medical device. Not for children unless they were in the data, not for patients whose measurements "
    "differ from those that it learned from, not as the only ground of any decision."
)


def output_of(config: Config) -> str:
    """What the probability is of."""
    snapshots = config.snapshots
    if snapshots.retrospective:
        ahead = "whether the stay is septic, looking back at the whole of it"
    else:
        ahead = f"onset of sepsis within {snapshots.horizon_hours:g} h"
    return ahead + (" or past" if snapshots.after_onset else "")


def intended_use(config: Config) -> str:
    return (
        f"Gives each hospital visit a probability of {output_of(config)}, from its vital signs and laboratory values "
        "so far. Meant for research, and for shadow operation beside clinical judgement after local validation."
    )


def levels_of(config: Config) -> str:
    levels = config.risk_thresholds
    return f"MEDIUM from {levels['medium']:g}, HIGH from {levels['high']:g}"


def limits_of(config: Config) -> list[str]:
    """Known risks and limitations, one sentence each."""
    lines = [
        "What is measured, and how often, carries part of the signal: it differs between hospitals, and a model loses "
        "where it does. Validate on local patients, watch drift (`monitor.py`).",
        "Probabilities are calibrated to the share of positives in the training data.",
        "Sites are not told apart: observations name none.",
    ]
    worst = sorted(config.loss_without_code.items(), key=lambda item: -item[1])[:8]
    if worst:
        lost = ", ".join(f"{code} {loss:.3f}" for code, loss in worst)
        lines.append(f"ROC AUC lost where a code is never measured: {lost}")
    return lines


def demographics_of(config: Config) -> str:
    """Which of the variables that regulation asks about are inputs, as far as the codes' concepts tell."""
    concepts = {code: concept_of(code, config.synonyms) for code in config.codes}
    used = sorted({c.name for c in concepts.values() if c and c.name in ("age", "sex")})
    nameless = sorted(code for code, c in concepts.items() if c is None)
    text = (
        "Race, ethnicity, language, sexual orientation, gender identity, social determinants of health and health "
        "status assessments have no concept here and are no inputs by name. "
    )
    for name, shown in (("sex", "Sex"), ("age", "Age, which follows from the date of birth,")):
        text += f"{shown} is {'an input' if name in used else 'no input'}. "
    if nameless:
        text += f"Codes whose concept is not known: {', '.join(nameless[:20])}"
        text += f" and {len(nameless) - 20} more" if len(nameless) > 20 else ""
        text += ". Whether one of them holds such a variable, the hospital has to check."
    return text.strip()
