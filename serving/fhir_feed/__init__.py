"""FHIR client: reads the encounters in progress of a FHIR server, and writes RiskAssessments back."""
