"""Steps per second of the environments in one process and in several.

    OMP_NUM_THREADS=1 python -m benchmarks.env_workers --csv env_workers.csv

Uniform actions; the two are timed in turn, and the median of the repetitions is printed.
"""

import time
from dataclasses import dataclass

import numpy as np
import tyro

from benchmarks import check_outputs, write_csv
from common import InputError, cli
from common.envs import make_vec, num_cores


@dataclass
class Args:
    tasks: tuple[str, ...] = ("halfcheetah", "hopper", "walker2d")
    """tasks of common.envs"""
    num_envs: int = 10
    """teams side by side, as in an evaluation of one seed"""
    workers: cli.Natural | None = None
    """processes beside the first; default: one per further core"""
    steps: int = 300
    """of every team and repetition"""
    repetitions: int = 5
    """of each"""
    csv: str | None = None
    """file for the raw numbers, a row per repetition"""


def main(args: Args) -> None:
    workers = num_cores() - 1 if args.workers is None else args.workers
    if workers < 1:
        raise InputError(f"{workers} processes beside the first: expected --workers 1 or more")
    check_outputs(args.csv)
    rows = []
    for task in args.tasks:
        vecs = {n: make_vec(task, args.num_envs, 0, None, n) for n in (0, workers)}
        shape = args.num_envs, vecs[0].num_agents, vecs[0].action_dim
        actions = np.random.default_rng(0).uniform(-1, 1, (args.steps, *shape))
        for vec in vecs.values():
            vec.reset()
        rates = {n: [] for n in vecs}
        for repetition in range(args.repetitions):
            for n, vec in vecs.items():
                begin = time.perf_counter()
                for each in actions:
                    vec.step(each)
                rates[n].append(args.steps * args.num_envs / (time.perf_counter() - begin))
                row = {"task": task, "num_envs": args.num_envs, "workers": n}
                rows.append(row | {"repetition": repetition, "steps_per_second": rates[n][-1]})
        one, several = (np.median(rates[n]) for n in vecs)
        print(f"| {task} | {args.num_envs} | {one:,.0f} | {several:,.0f} | {several / one:.2f} |")
        for vec in vecs.values():
            vec.close()
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
