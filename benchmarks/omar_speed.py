"""Milliseconds per offline update of the four learners of OMAR's table, in turn.

OMP_NUM_THREADS=1 python -m benchmarks.omar_speed --csv speed.csv
"""

from dataclasses import dataclass

import numpy as np
import tyro

from benchmarks import check_outputs, write_csv
from benchmarks.speed import fill, introduction, learner_of, machine, times_of, update_of
from common import cli, datasets
from common.device import Graphed, pick_device

LEARNERS = {
    "MA-ICQ": ("icq", {}),
    "MA-TD3+BC": ("otc_td3bc", {"hidden_size": 64}),
    "MA-CQL": ("omar", {"omar_coefficient": 0.0}),
    "OMAR": ("omar", {}),
}


@dataclass
class Args:
    env: str = "simple-spread-expert"
    """built-in data; its values do not matter"""
    num_seeds: tuple[int, ...] = (1, 5)
    """seeds trained together"""
    batch_sizes: tuple[int, ...] = (256, 1024)
    """transitions per update"""
    repetitions: int = 5
    """rounds through all learners"""
    device: cli.Device = "auto"
    """auto, cpu or cuda"""
    csv: str | None = None
    """file for the raw times, a row per round"""


def main(args: Args) -> None:
    device = pick_device(args)
    check_outputs(args.csv)
    dataset = datasets.load(args.env)
    what, rows = machine(device), []
    print(introduction(args.env, what))
    print("\n| seeds | batch |", *(f"{name} |" for name in LEARNERS))
    print("|---|---|" + "---|" * len(LEARNERS))
    for num_seeds in args.num_seeds:
        replay = fill(dataset, num_seeds, device)
        for batch_size in args.batch_sizes:
            calls = {}
            for name, (script, options) in LEARNERS.items():
                options = {"sampling": "offline", "batch_size": batch_size, **options}
                agent, strategy, its_args = learner_of(script, replay, options)
                update, kind_of = update_of(script, replay, agent, strategy, its_args)
                calls[name] = Graphed(update, device.type == "cuda", kind_of)
            found = times_of(calls, device, 0.2, args.repetitions)
            cells = (f"{np.median(times):.1f} |" for times in found.values())
            print(f"| {num_seeds} | {batch_size} |", *cells, flush=True)
            for name, times in found.items():
                row = {"learner": name, "seeds": num_seeds, "batch_size": batch_size}
                rows += [row | {"ms": ms, **what} for ms in times]
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
