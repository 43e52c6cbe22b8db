"""An update's time in two checkouts of this project, in turn, one thread of a CPU: what a change
gains or costs.

    git worktree add ../before COMMIT
    OMP_NUM_THREADS=1 python -m benchmarks.turns --before ../before --json turns.json

Processor time, on 100,000 transitions. The ratio is the median of those within a repetition.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks import Worker, check_outputs, write_json
from benchmarks.speed import LEARNERS, introduction, machine
from common import cli

NAMES = "before", "now"


@dataclass
class Args:
    before: Path
    """the other checkout"""
    scripts: tuple[str, ...] = tuple(LEARNERS)
    """scripts to time"""
    strategies: tuple[str, ...] = ("uniform", "otc (value)", "otc (embedding)")
    """of `benchmarks.speed`"""
    num_seeds: tuple[int, ...] = (1, 5)
    """seeds trained together"""
    repetitions: int = 7
    """rounds through both"""
    seconds: cli.Positive = 0.3
    """least time that each is run for in a round"""
    json: str | None = None
    """file for the raw times"""


class Checkout:
    """A process of its own that makes a checkout's updates."""

    def __init__(self, folder: Path):
        command = [sys.executable, Path(__file__).with_name("speed_worker.py")]
        env = os.environ | {"PYTHONPATH": str(folder.resolve())}
        self.worker = Worker(f"the process in {folder}", command, cwd=folder, env=env)

    def seconds(self, script: str, num_seeds: int, updates: int, strategy: str) -> float:
        """How long so many updates took."""
        return self.worker.ask(f"{script} {num_seeds} {updates} {strategy}")


def main(args: Args) -> None:
    check_outputs(args.json)
    checkouts = [Checkout(args.before), Checkout(Path(__file__).parents[1])]
    torch.set_num_threads(1)
    what, rows = machine(torch.device("cpu")), []
    record = {"args": vars(args), "machine": what, "ms": rows}
    print(introduction("halfcheetah-medium", what))
    print("\n| script | seeds | update | before, ms | now, ms | now over before | quartiles |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for num_seeds in args.num_seeds:
        for script in args.scripts:
            for strategy in args.strategies:
                counts, times = [], {name: [] for name in NAMES}
                for checkout in checkouts:
                    checkout.seconds(script, num_seeds, 2, strategy)  # two: TD3+BC's delay
                    pair = max(1e-5, checkout.seconds(script, num_seeds, 2, strategy))
                    counts.append(2 * max(1, round(args.seconds / pair)))
                for _ in range(args.repetitions):
                    for name, checkout, count in zip(NAMES, checkouts, counts, strict=True):
                        seconds = checkout.seconds(script, num_seeds, count, strategy)
                        times[name].append(1e3 * seconds / count)
                before, now = (np.array(times[name]) for name in NAMES)
                low, middle, high = np.quantile(now / before, [0.25, 0.5, 0.75])
                cells = f"{np.median(before):.1f} | {np.median(now):.1f} | {middle:.2f}"
                print(f"| {script} | {num_seeds} | {strategy} | {cells} |", end=" ")
                print(f"{low:.2f} to {high:.2f} |", flush=True)
                rows.append({"script": script, "seeds": num_seeds, "update": strategy, **times})
                if args.json:  # as soon as it is known: the whole takes long
                    write_json(args.json, record)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
