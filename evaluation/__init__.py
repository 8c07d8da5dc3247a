"""Is the model good enough here? What evaluate_model.py works out on labelled past visits."""
