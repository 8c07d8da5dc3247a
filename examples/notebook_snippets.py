"""How analysts use feature_pipeline: run from the project's folder after the quick start.

python examples/notebook_snippets.py
"""

import multiprocessing
import sys
import warnings
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from feature_pipeline import FeatureReproducer, ProductionPipeline, SetAsideWarning

# the demo cohort has dirt on purpose; in real use read these warnings
warnings.simplefilter("ignore", SetAsideWarning)


def score_file(path: str) -> pd.DataFrame:
    """What a worker process does: makes its own pipeline, then scores a file."""
    pipeline = ProductionPipeline("models/best_model_config.json", "models/best_model.pkl")
    return pipeline.predict(path)


def main() -> None:
    # read clients as text: 007 and 7 are different clients, and NA is sodium
    df_new = pd.read_csv("data/sample_new_patients.csv", dtype={"client": str}, keep_default_na=False)

    # the model's features, one row a visit
    FeatureReproducer("models/best_model_config.json").transform(df_new, return_all_features=False).to_csv(
        "patient_features.csv", index=False
    )

    # one score a visit, at its last observation
    pipeline = ProductionPipeline(config_path="models/best_model_config.json", model_path="models/best_model.pkl")
    scores = pipeline.predict(df_new, return_probabilities=True)
    scores["risk_level"] = pipeline.risk_level(scores["sepsis_probability"])
    print(scores.sort_values("sepsis_probability", ascending=False).head(3).to_string(index=False))

    # why: the features that raised (+) or lowered (-) the log-odds the most
    first = scores.sort_values("sepsis_probability").iloc[-1]["visit_id"]
    print(pipeline.explain(df_new[df_new["visit_id"] == first], top=3).to_string(index=False))

    # how a visit's score moved: the same features as anywhere else, as of earlier moments
    rows = df_new[df_new["visit_id"] == first]
    end = pd.to_datetime(rows["observation_date"]).max()
    print(pipeline.predict(rows, as_of=pd.date_range(end=end, periods=3, freq="12h")).to_string(index=False))

    # many files on many cores: each worker makes its own pipeline
    with multiprocessing.Pool(4) as pool:
        for result in pool.map(score_file, ["data/sample_new_patients.csv"] * 4):
            assert result["sepsis_probability"].equals(scores["sepsis_probability"])
    print("four processes, the same numbers")


if __name__ == "__main__":
    main()
