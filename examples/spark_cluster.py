"""Scores observations with Spark: its executors read, score and write, each by itself.

On each executor's machine, on the path of its Python, a folder with this project and its models (`pip install -r
requirements-cluster.txt`). Any address that Spark knows works, such as ``s3a://bucket/observations``.

    spark-submit examples/spark_cluster.py observations scores models/archive/20261125_232723
"""

import sys
from functools import partial

from pyspark.sql import SparkSession

SCHEMA = """visit_id string, client string, sepsis_probability double, risk_level string, reason string, as_of string,
hours_since_newest double, processed_at string, model_version string"""


def score(frames, folder):
    import pandas as pd

    from batch_processor import score_partition  # here: only executors have the project's modules

    rows = list(frames)  # a partition comes in pieces, which may cut a visit
    if rows:
        yield score_partition(pd.concat(rows), f"{folder}/best_model_config.json", f"{folder}/best_model.pkl")


if __name__ == "__main__":
    source, target, folder = sys.argv[1:]
    spark = SparkSession.builder.getOrCreate()
    observations = spark.read.parquet(source).repartition("client", "visit_id")  # all rows of a visit in one partition
    observations.mapInPandas(partial(score, folder=folder), SCHEMA).write.parquet(target)
    spark.stop()
