"""Scores observations on a Dask cluster: its workers read, score and write, each by itself.

On each worker's machine, in a folder with this project and its models: ``dask worker tcp://HOST:8786``. The scheduler
(``dask scheduler``) needs no project. Any address that fsspec knows works, such as ``s3://bucket/observations/*.parquet``.

    python examples/dask_cluster.py tcp://HOST:8786 'observations/*.parquet' scores models/archive/20261125_232723
"""

import sys

import dask.dataframe as dd
from distributed import Client


def score(frame, folder):
    from batch_processor import score_partition  # here: the scheduler unpacks this function, and has no such module

    return score_partition(frame, f"{folder}/best_model_config.json", f"{folder}/best_model.pkl")


if __name__ == "__main__":
    scheduler, source, target, folder = sys.argv[1:]
    with Client(scheduler):
        observations = dd.read_parquet(source).shuffle(["client", "visit_id"])  # all rows of a visit in one partition
        types = score(observations.head(0), folder)  # of no rows
        observations.map_partitions(score, folder, meta=types).to_parquet(target, write_index=False)
