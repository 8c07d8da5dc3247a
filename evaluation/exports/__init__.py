"""Exports of an evaluation: for seismometer, and as papers that a hospital must fill in."""
