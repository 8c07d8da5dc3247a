"""Files, scored by an hourly job."""
