"""The endpoint as a first draft would be: frames and pandas groupby-apply in the route. The rival of api.py.

It computes 40 features a code (ten statistics over the visit and three windows) and fills the rest of the model's with
0, so its scores are not the project's; its speed is what is looked at.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from flask import Flask, jsonify, request

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.features import plain_features
from feature_pipeline import ProductionPipeline

app = Flask(__name__)
pipeline = None


@app.post("/predict")
def predict():
    global pipeline
    pipeline = pipeline or ProductionPipeline(os.environ["SEPSIS_CONFIG"], os.environ["SEPSIS_MODEL"])
    frame = pd.DataFrame(request.get_json())
    frame["observation_date"] = pd.to_datetime(frame["observation_date"])
    frame["observation_value"] = pd.to_numeric(frame["observation_value"])
    features = plain_features(frame).reindex(columns=pipeline.feature_names)
    probability = pipeline.model.probability(features.fillna(0).to_numpy(dtype=np.float64))
    clients = frame.drop_duplicates("visit_id").set_index("visit_id")["client"]
    predictions = [
        {"visit_id": int(v), "client": clients[v], "sepsis_probability": float(p), "risk_level": pipeline.risk_level(p)}
        for v, p in zip(features.index, probability, strict=True)
    ]
    return jsonify({"status": "success", "predictions": predictions})
