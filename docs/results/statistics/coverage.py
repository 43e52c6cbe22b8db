"""PYTHONPATH=. python docs/results/statistics/coverage.py > coverage.csv"""

import numpy as np

from benchmarks.aggregate import bootstrap, iqm


def mean(x):
    return x.mean((-2, -1))


print("seeds,tasks,statistic,sets,covered")
for tasks in 1, 9:
    for seeds in 3, 5, 10, 20:
        for name, statistic in (("mean", mean), ("IQM", iqm)):
            random, hits = np.random.default_rng(0), 0
            for i in range(4000):
                x = random.normal(size=(seeds, tasks))
                low, high = bootstrap(statistic, x, resamples=500, seed=i)
                hits += low <= 0 <= high
            print(seeds, tasks, name, 4000, hits / 4000, sep=",", flush=True)
