"""FHIR R4 for every pattern that speaks it: resources to observations, scores to RiskAssessments."""
