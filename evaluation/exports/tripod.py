"""The TRIPOD+AI checklist for reports on clinical prediction models: 27 items, some of them in parts.

Collins et al., BMJ 2024;385:e078378, doi 10.1136/bmj-2023-078378. The titles below are this project's short forms; the
statement's text binds. `where` of an item says which file answers it.
"""

from __future__ import annotations

from evaluation.exports.source_attributes import Item

ITEMS = (
    Item("1", "Title", ("name",), "the title of the report"),
    Item("2", "Abstract", (), "the abstract, by TRIPOD+AI for Abstracts"),
    Item("3a", "Background: context and rationale", (), "why the model is needed, and earlier models"),
    Item("3b", "Background: population, place in the pathway, users", ("use", "users"), "the place in this pathway"),
    Item("3c", "Background: known health inequalities", (), "known inequalities between groups"),
    Item("4", "Objectives", (), "development, evaluation, or both"),
    Item("5a", "Data: sources", ("training_data", "here"), "where the data come from, and why"),
    Item("5b", "Data: dates", (), "first and last date of the visits"),
    Item("6a", "Participants: setting", (), "kind, number and place of the centres"),
    Item("6b", "Participants: eligibility", ("inclusion",)),
    Item("6c", "Participants: treatments", (), "treatments that were given, and how they were handled"),
    Item("7", "Data preparation", ("inclusion", "missing")),
    Item("8a", "Outcome: definition and time", ("output",), "how onset was determined"),
    Item("8b", "Outcome: who assessed it", (), "who assessed onset, if people did"),
    Item("8c", "Outcome: blinding", (), "whether assessors were blind to predictors"),
    Item("9a", "Predictors: choice", ("inputs", "split")),
    Item("9b", "Predictors: definition and measurement", ("specification",)),
    Item("9c", "Predictors: who assessed them", (), "who interpreted predictors, if people did"),
    Item("10", "Sample size", ("sample_size",)),
    Item("11", "Missing data", ("missing",)),
    Item("12a", "Analysis: use of the data", ("split",)),
    Item("12b", "Analysis: handling of predictors", ("specification",)),
    Item("12c", "Analysis: kind of model, building, validation", ("model_kind", "split")),
    Item(
        "12d", "Analysis: differences between clusters", ("fairness_here",), "hospitals or wards, if there are several"
    ),
    Item("12e", "Analysis: measures of performance", ("process_here",)),
    Item("12f", "Analysis: model updating", ("updating",)),
    Item("12g", "Evaluation: how predictions were calculated", ("specification",)),
    Item("13", "Class imbalance", ("class_imbalance",)),
    Item("14", "Fairness", ("fairness_approach",)),
    Item("15", "Model output", ("output",)),
    Item("16", "Differences between training and evaluation data", (), "setting, eligibility, outcome, predictors"),
    Item("17", "Ethical approval", (), "the committee, and consent or waiver"),
    Item("18a", "Open science: funding", (), "who paid, and their part"),
    Item("18b", "Open science: conflicts of interest", (), "conflicts of the authors"),
    Item("18c", "Open science: protocol", (), "where the protocol is"),
    Item("18d", "Open science: registration", (), "the register and number"),
    Item("18e", "Open science: data", (), "whether data are available"),
    Item("18f", "Open science: code", ("specification",), "where the code is available"),
    Item("19", "Involvement of patients and public", (), "what part they had, or none"),
    Item("20a", "Results: flow of participants", ("here",)),
    Item("20b", "Results: characteristics", ("representativeness_here",)),
    Item("20c", "Results: evaluation data against training data", (), "distribution of important predictors in both"),
    Item("21", "Results: participants and events of each analysis", ("sample_size", "here")),
    Item("22", "Results: model specification", ("specification",)),
    Item("23a", "Results: performance, with intervals and key groups", ("validity_here", "fairness_here")),
    Item("23b", "Results: heterogeneity between clusters", (), "figures by hospital; evaluate_model.py --by"),
    Item("24", "Results: model updating", (), "results of an update, if one was made"),
    Item("25", "Discussion: interpretation", (), "what the results mean, with fairness"),
    Item("26", "Discussion: limitations", ("limits",)),
    Item("27a", "Usability: poor or missing input", ("missing",)),
    Item("27b", "Usability: interaction and expertise of users", ("users",), "what users have to know and do"),
    Item("27c", "Usability: next steps", (), "further research"),
)
