"""The source attributes that certified health IT shows of a predictive decision support intervention in the USA.

45 CFR 170.315(b)(11)(iv)(B), from the HTI-1 final rule, 89 FR 1192 (9 January 2024): 31 attributes in nine groups. The
titles below are this project's short forms; the regulation's text binds.
"""

from __future__ import annotations

from typing import NamedTuple


class Item(NamedTuple):
    """One item of a paper: `facts` are names of `facts_of`; `left` is what a person has to write."""

    number: str
    title: str
    facts: tuple[str, ...] = ()
    left: str = ""


ITEMS = (
    Item("1.i", "Developer: name and contact", (), "who developed the model, and how to reach them"),
    Item("1.ii", "Funding of the technical implementation", (), "who paid"),
    Item("1.iii", "Value that it gives as output", ("output",)),
    Item("1.iv", "Kind of output", ("kind_of_output",)),
    Item("2.i", "Intended use", ("use",)),
    Item("2.ii", "Intended patients", ("training_data",), "for which patients this hospital will use it"),
    Item("2.iii", "Intended users", ("users",)),
    Item("2.iv", "Role in decisions", ("role",)),
    Item("3.i", "Tasks, situations and populations to be cautious with", ("out_of_scope",)),
    Item("3.ii", "Known risks, inappropriate settings and uses, limitations", ("limits",)),
    Item("4.i", "Inclusion and exclusion of the training data", ("inclusion", "training_data", "synthetic")),
    Item("4.ii", "Use of demographic and social variables as inputs", ("demographic_inputs",)),
    Item(
        "4.iii",
        "Demographic representativeness of the training data",
        (),
        "who is in the training data; see MODEL_CARD.md",
    ),
    Item(
        "4.iv", "Relevance of the training data to the place of use", (), "how the places of training and use compare"
    ),
    Item("5.i", "Approach to a fair output", ("fairness_approach",)),
    Item(
        "5.ii",
        "Approach to manage, reduce or eliminate bias",
        (),
        "what was done about the differences that were found",
    ),
    Item("6.i", "External validation: source, setting, environment", ("here",), "where these visits come from"),
    Item("6.ii", "External validation: who tested", (), "who ran the evaluation, and how they relate to the developer"),
    Item("6.iii", "External validation: demographic representativeness", ("representativeness_here",)),
    Item("6.iv", "External validation: process", ("process_here",)),
    Item("7.i", "Validity in test data of the training source", ("validity_test",)),
    Item("7.ii", "Fairness in test data of the training source", (), "figures by group; see MODEL_CARD.md"),
    Item("7.iii", "Validity in external data", ("validity_here",)),
    Item("7.iv", "Fairness in external data", ("fairness_here",)),
    Item(
        "7.v", "References to evaluations of its effect on outcomes", (), "studies of outcomes, or that there is none"
    ),
    Item("8.i", "How validity is monitored, how often", ("monitoring",), "how often"),
    Item("8.ii", "Validity in local data", ("validity_here",)),
    Item("8.iii", "How fairness is monitored, how often", ("fairness_monitoring",), "how often"),
    Item("8.iv", "Fairness in local data", ("fairness_here",)),
    Item("9.i", "How it is updated, how often", ("updating",), "how often"),
    Item("9.ii", "How often performance is corrected when risks are found", (), "how soon, and who decides"),
)
