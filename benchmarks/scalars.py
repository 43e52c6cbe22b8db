"""Copy what TensorBoard shows of many runs into one CSV file.

python -m benchmarks.scalars runs/RUN runs/RUN --csv FILE.csv
"""

import os
import sys
from dataclasses import dataclass

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import write_csv
from common import InputError, checkpoints, cli, strategies


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """run folders"""
    csv: str
    """file to write: script, env, strategy, seed, tag, step, value"""
    tags: tuple[str, ...] = ("otc/", "losses/vae_", "offline/")
    """beginnings of the tags to copy"""
    by: tuple[str, ...] = ()
    """arguments of the runs that are added to the strategy, as of benchmarks.aggregate"""


def main(args: Args) -> None:
    rows, names = [], [name.replace("-", "_") for name in args.by]
    for folder in dict.fromkeys(map(os.path.normpath, args.runs)):
        run = checkpoints.read_record(folder)
        for name in names:
            if name not in run["args"]:
                raise InputError(f"--by {name}: {folder} has no such argument")
        added = "".join(f" {name}={run['args'][name]}" for name in names)
        events = EventAccumulator(folder, size_guidance={"scalars": 0})
        events.Reload()
        found = [tag for tag in events.Tags()["scalars"] if tag.startswith(args.tags)]
        if not found:
            print(f"{folder} has no such tag", file=sys.stderr)
        for tag in found:
            first = {
                "script": run["script"],
                "env": run["args"]["env"],
                "strategy": strategies.strategy_name(run["args"]) + added,
                "seed": run["seed"],
                "tag": tag,
            }
            rows += [
                first | {"step": e.step, "value": f"{e.value:.6g}"} for e in events.Scalars(tag)
            ]
    if not rows:
        tags = " or ".join(args.tags)
        raise InputError(
            f"nothing to copy: {len(args.runs)} run folders with tags that begin with {tags}"
        )
    write_csv(args.csv, rows)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
