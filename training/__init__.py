"""The search, training, versions: everything that needs labels."""
