"""Scores observations on a Ray cluster: its workers read, score and write, each by itself.

On each worker's machine, on the path of its Python, a folder with this project and its models (`pip install -r
requirements-cluster.txt`). Any address that Arrow knows works, such as ``s3://bucket/observations``.

    python examples/ray_cluster.py observations scores models/archive/20261125_232723 64
"""

import sys
from functools import partial

import ray


def with_part(rows, n_parts):
    import pandas as pd

    keys = rows[["client", "visit_id"]].astype(str)
    return rows.assign(part=pd.util.hash_pandas_object(keys, index=False).to_numpy() % n_parts)


def score(rows, folder):
    from batch_processor import score_partition

    rows = rows.drop(columns="part")
    return score_partition(rows, f"{folder}/best_model_config.json", f"{folder}/best_model.pkl")


if __name__ == "__main__":
    source, target, folder, n_parts = sys.argv[1:]  # a part is read whole: a million rows take about 1 GB
    ray.init()  # the cluster of RAY_ADDRESS, or this machine
    rows = ray.data.read_parquet(source)
    rows = rows.map_batches(partial(with_part, n_parts=int(n_parts)), batch_format="pandas")
    # all rows of a visit in one part; a block alone may cut a visit
    rows.groupby("part").map_groups(partial(score, folder=folder), batch_format="pandas").write_parquet(target)
