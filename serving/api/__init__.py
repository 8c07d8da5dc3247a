"""The REST service: settings, the loaded model, security, metrics, and the routes for JSON, FHIR and CDS Hooks.

No module here imports training code, scikit-learn or LightGBM; the model file brings what it needs when it is loaded,
which must happen in a worker process, after the fork.
"""
