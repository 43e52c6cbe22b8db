"""Collect the returns of many runs into one table, one CSV file and one figure.

    python -m benchmarks.curves runs/strategies/halfcheetah-medium/strategies \
        --csv docs/results/halfcheetah-medium.csv --figure docs/figures/halfcheetah-medium.png

Runs that differ in their seed alone are one curve: mean over seeds, band of one standard deviation.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks import write_csv
from common import InputError, cli, nearest, runs


@dataclass
class Args:
    folder: tyro.conf.Positional[str]
    """folder of run folders"""
    csv: str | None = None
    """file for every run's rows of returns.csv, with its strategy and seed"""
    column: str = "mean_return"
    """of returns.csv, such as win_rate"""
    figure: str | None = None
    """PNG file for the curves (needs matplotlib, requirements-dev.txt)"""


def name_of(args: dict) -> str:
    """A strategy's name from a run's arguments."""
    explores = args.get("exploration", "none") != "none"  # older runs had no such argument
    return sampling_of(args) + (f", {args['exploration']} exploration" if explores else "")


def sampling_of(args: dict) -> str:
    """Which transitions fine-tuning saw."""
    if args["sampling"] != "otc":
        return args["sampling"]
    extras = [] if args["adaptive_alpha"] else [f"alpha {args['alpha']:g}"]
    extras += [f"alpha-max {args['alpha_max']:g}"] if args["alpha_max"] is not None else []
    extras += ["no self-matches"] if args["exclude_self_matches"] else []
    extras += [] if args["replacement"] else ["no replacement"]
    return " ".join([f"otc ({args['distance']})", *extras])


def read(folder: str, column: str) -> list[dict]:
    """The rows of all returns.csv, with strategy and seed.

    Raises:
        InputError: there are none, `column` is not in one, two runs have the same strategy and
            seed, or not all are of one script and env.
    """
    rows, seen = [], {}
    for path in sorted(Path(folder).glob("*/returns.csv")):
        run = runs.read_record(path.parent)
        what = run["script"], run["args"]["env"]
        first, its_what = next(iter(seen.values()), (path.parent, what))
        if what != its_what:
            raise InputError(
                f"one table is of one script and env: {path.parent} is {' on '.join(what)}, "
                f"{first} is {' on '.join(its_what)}"
            )
        key = name_of(run["args"]), run["seed"]
        if key in seen:
            other = seen[key][0]
            raise InputError(f"{other} and {path.parent} are both {key[0]}, seed {key[1]}")
        seen[key] = path.parent, what
        reader = csv.DictReader(path.open())
        if column not in reader.fieldnames:
            hint = nearest(column, reader.fieldnames)
            raise InputError(f"--column {column}: not in {path}; {hint}")
        rows += [{"strategy": key[0], "seed": key[1], **row} for row in reader]
    if not rows:
        raise InputError(f"no returns.csv in the folders of {folder}")
    return rows


def main(args: Args) -> None:
    rows = read(args.folder, args.column)
    curves = {}  # strategy -> (seeds, deployments + 1)
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        of_seed = {}
        for row in rows:
            if row["strategy"] == strategy:
                of_seed.setdefault(row["seed"], []).append(float(row[args.column]))
        if len({len(returns) for returns in of_seed.values()}) > 1:
            raise InputError(f"{strategy}: some seeds have fewer deployments than others")
        curves[strategy] = np.array(list(of_seed.values()))
    if args.csv:
        write_csv(args.csv, rows)
    print("| strategy | " + " | ".join(f"pi^{k}" for k in range(len(curves[strategy][0]))), end="")
    print(" | improvement % |\n|" + "---|" * (len(curves[strategy][0]) + 2))
    largest = max(np.abs(returns).max() for returns in curves.values())
    digits = 0 if largest >= 1000 else 1 if largest >= 10 else 2
    for strategy, returns in curves.items():
        cells = [
            f"{m:.{digits}f} +- {s:.{digits}f}"
            for m, s in zip(returns.mean(0), returns.std(0), strict=True)
        ]
        gain = 100 * (returns[:, -1] - returns[:, 0]) / np.abs(returns[:, 0])
        print(f"| {strategy} | {' | '.join(cells)} | {gain.mean():.1f} +- {gain.std():.1f} |")

    if args.figure:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(7, 4.2))
        for strategy, returns in curves.items():
            x, mean, std = np.arange(returns.shape[1]), returns.mean(0), returns.std(0)
            (line,) = axis.plot(x, mean, marker="o", markersize=3, label=strategy)
            axis.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.12, lw=0)
        axis.set(
            xlabel="deployments fine-tuned on",
            ylabel=args.column.removeprefix("mean_").replace("_", " "),
        )
        axis.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(args.figure, dpi=120)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
