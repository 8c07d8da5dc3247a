"""The applied model card of the Coalition for Health AI (CHAI), version 0.2 of its schema, as XML.

The elements and their order are those of https://mc.chai.org/v0.2/schema.xsd.
"""

from __future__ import annotations

from collections.abc import Mapping
from xml.etree import ElementTree

from evaluation.exports.source_attributes import Item

NAMESPACE = "https://mc.chai.org/v0.2/schema.xsd"
LEFT = "To be written: "

METRIC = (
    "MetricGoal",
    "Results",
    "Interpretation",
    "TestType",
    "TestingDataDescription",
    "ValidationProcessAndJustification",
)

# Sections in the schema's order. A metric's "Results" is made of a label and a value.
TREE: Mapping[str, Mapping] = {
    "BasicInfo": dict.fromkeys(("ModelName", "ModelDeveloper", "DeveloperContact")),
    "ReleaseInfo": dict.fromkeys(
        ("ReleaseStage", "ReleaseDate", "ReleaseVersion", "GlobalAvailability", "RegulatoryApproval")
    ),
    "ModelSummary": {"Summary": None, "Keywords": {}},
    "UsesAndDirections": dict.fromkeys(
        (
            *("IntendedUseAndWorkflow", "PrimaryIntendedUsers", "HowToUse", "TargetedPatientPopulation"),
            "CautionedOutOfScopeSettings",
        )
    ),
    "Warnings": dict.fromkeys(("KnownRisksAndLimitations", "KnownBiasesOrEthicalConsiderations", "ClinicalRiskLevel")),
    "TrustIngredients": {
        "AISystemFacts": dict.fromkeys(
            (
                *("OutcomesAndOutputs", "ModelType", "InputDataSource", "OutputAndInputDataTypes"),
                *("DevelopmentDataCharacterization", "BiasMitigationApproaches", "OngoingMaintenance", "Security"),
            )
        ),
        "TransparencyInformation": dict.fromkeys(("FundingSource", "StakeholdersConsulted")),
    },
    "KeyMetrics": {
        name: dict.fromkeys(METRIC) for name in ("UsefulnessUsabilityEfficacy", "FairnessEquity", "SafetyReliability")
    },
    "Resources": dict.fromkeys(("PeerReviewedPublications", "PatientConsentOrDisclosure")),
    "Bibliography": {},
}
KEYWORDS = ("sepsis", "early warning", "vital signs", "laboratory values")
LITERATURE = (
    "@article{collins2024, author={Collins, Gary S and others}, journal={BMJ}, year={2024}, volume={385}, "
    "pages={e078378}, doi={10.1136/bmj-2023-078378}}\n"
    "@article{vickers2006, author={Vickers, Andrew J and Elkin, Elena B}, journal={Med Decis Making}, "
    "year={2006}, volume={26}, pages={565}, doi={10.1177/0272989X06295361}}"
)

_MEASURED = ("process_here",)
ITEMS = (
    Item("ModelName", "Name", ("name",)),
    Item("ModelDeveloper", "Developer", (), "who developed the model"),
    Item("DeveloperContact", "Contact", (), "how to reach the developer"),
    Item("ReleaseStage", "Stage", (), "research, shadow operation, or in use"),
    Item("ReleaseDate", "Date", ("date",)),
    Item("ReleaseVersion", "Version", ("version",)),
    Item("GlobalAvailability", "Availability", (), "in which countries or hospitals it is used"),
    Item("RegulatoryApproval", "Regulatory approval", ("out_of_scope",), "approvals, or that there is none"),
    Item("Summary", "Summary", ("use", "output")),
    Item("IntendedUseAndWorkflow", "Use and workflow", ("use", "role"), "the place in this hospital's workflow"),
    Item("PrimaryIntendedUsers", "Users", ("users",)),
    Item("HowToUse", "How to use", ("output",), "what to do at an alert"),
    Item("TargetedPatientPopulation", "Patients", (), "for which patients this hospital uses it"),
    Item("CautionedOutOfScopeSettings", "Out of scope", ("out_of_scope",)),
    Item("KnownRisksAndLimitations", "Risks and limitations", ("limits",)),
    Item("KnownBiasesOrEthicalConsiderations", "Biases", ("fairness_here",), "ethical considerations"),
    Item("ClinicalRiskLevel", "Clinical risk level", (), "the clinical risk level"),
    Item("OutcomesAndOutputs", "Outcomes and outputs", ("output",)),
    Item("ModelType", "Kind of model", ("model_kind",)),
    Item("InputDataSource", "Source of the inputs", ("inputs",)),
    Item("OutputAndInputDataTypes", "Types of data", ("inputs", "kind_of_output")),
    Item("DevelopmentDataCharacterization", "Development data", ("training_data", "inclusion", "synthetic")),
    Item("BiasMitigationApproaches", "Against bias", ("fairness_approach",)),
    Item("OngoingMaintenance", "Maintenance", ("monitoring", "updating"), "who is in charge, and how often"),
    Item("Security", "Security", ("security",)),
    Item("FundingSource", "Funding", (), "who paid"),
    Item("StakeholdersConsulted", "Stakeholders", (), "who was consulted"),
    *(
        item
        for metric, result, goal in (
            ("UsefulnessUsabilityEfficacy", "validity_here", "which discrimination and PPV the hospital asks for"),
            ("FairnessEquity", "fairness_here", "which differences between groups the hospital accepts"),
            ("SafetyReliability", "alerts_here", "which load of alerts the hospital accepts"),
        )
        for item in (
            Item(f"{metric}.MetricGoal", "Goal", (), goal),
            Item(f"{metric}.Results", "Result", (result,)),
            Item(f"{metric}.Interpretation", "Interpretation", (), "what the result means here"),
            Item(f"{metric}.TestType", "Kind of test", _MEASURED),
            Item(f"{metric}.TestingDataDescription", "Test data", ("here",)),
            Item(f"{metric}.ValidationProcessAndJustification", "Validation", _MEASURED),
        )
    ),
    Item("PeerReviewedPublications", "Publications", (), "publications on this model, or that there is none"),
    Item("PatientConsentOrDisclosure", "Consent", (), "whether patients are told"),
)


def xml_of(answers: Mapping[str, str]) -> bytes:
    """The card; `answers` has a text for each number of `ITEMS`."""
    import json

    ElementTree.register_namespace("", NAMESPACE)
    root = ElementTree.Element(f"{{{NAMESPACE}}}AppliedModelCard")

    def add(parent: ElementTree.Element, name: str, text: str | None = None) -> ElementTree.Element:
        element = ElementTree.SubElement(parent, f"{{{NAMESPACE}}}{name}")
        element.text = text
        return element

    def fill(parent: ElementTree.Element, tree: Mapping, prefix: str) -> None:
        for name, below in tree.items():
            if name == "Keywords":
                keywords = add(parent, name)
                for word in KEYWORDS:
                    add(keywords, "Keyword", word)
            elif name == "Bibliography":
                add(parent, name, LITERATURE)
            elif name == "Results":
                result = add(add(parent, name), "MetricResult")
                add(result, "Label", "On the evaluated visits")
                add(result, "ValueJson", json.dumps(answers[f"{prefix}{name}"]))
            elif below:
                fill(add(parent, name), below, f"{name}." if "MetricGoal" in below else "")
            else:
                add(parent, name, answers[f"{prefix}{name}"])

    fill(root, TREE, "")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"
