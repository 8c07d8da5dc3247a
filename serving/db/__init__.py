"""Pending visits of a database."""
