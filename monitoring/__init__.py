"""The log of predictions, and what is read from it."""
