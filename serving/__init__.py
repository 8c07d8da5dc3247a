"""The ways of scoring, and what they share."""
