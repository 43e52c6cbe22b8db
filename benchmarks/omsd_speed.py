"""Milliseconds of processor time per update of OMSD's two stages, and memory.

OMP_NUM_THREADS=1 python -m benchmarks.omsd_speed --csv speed.csv
"""

import resource
from dataclasses import dataclass

import tyro

import omsd
from benchmarks import check_outputs, write_csv
from benchmarks.omsd_beta import train
from common import cli, datasets
from common.device import pick_device
from common.replay import Replay

# Name: the script's arguments, and how many updates are timed
SIZES = {
    "default": ({}, 40),
    "published": ({"hidden_size": 256, "denoiser_size": 512, "batch_size": 512}, 3),
}


@dataclass
class Args:
    csv: str
    """file for the times, a row per size, score and number of seeds"""
    env: str = "simple-spread-expert"
    """built-in data; its values do not matter"""
    dataset_size: int = 20_000
    device: cli.Device = "cpu"


def main(args: Args) -> None:
    pick_device(args)
    check_outputs(args.csv)
    data, rows = datasets.load(args.env, size=args.dataset_size), []
    N, obs_dim, action_dim = data.actions.shape[1], data.obs.shape[2], data.actions.shape[2]
    cases = [("default", s, seeds) for seeds in (1, 5) for s in ("decomposed", "joint")]
    for size, score, seeds in [*cases, ("published", "decomposed", 1)]:
        options, updates = SIZES[size]
        its = omsd.Args(env=args.env, num_seeds=seeds, score=score, **options)
        replay = Replay(data, seeds, 0, 1)
        agent = omsd.OMSD(seeds * N, obs_dim, action_dim, its)
        row = {"size": size, "score": score, "seeds": seeds, "batch_size": its.batch_size}
        for kind in ("model", "policy"):
            train(agent, replay, kind, 2, its.batch_size)
            row[f"{kind}_ms"] = round(1000 * train(agent, replay, kind, updates, its.batch_size), 1)
        # of the process so far: the cases are in increasing order
        row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        rows.append(row)
        print(row, flush=True)
    write_csv(args.csv, rows)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
