"""Where observations and labels come from."""
