"""The returns of the built-in datasets, MuJoCo's beside D4RL v2's.

    python -m behaviours.report --csv FILE.csv --teams TEAMS.csv --figure FILE.png

Reads the full-size files that are in the cache folder and prints Markdown tables of their whole
episodes. Those of docs/results/datasets hold all data sets: make them first.
"""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import tyro

from benchmarks import check_outputs, write_csv, write_figure
from common import InputError, cli
from common.datasets.makers import built_in_path, maker_of, mpe, reacher
from common.datasets.names import BUILT_IN_SIZES
from common.envs import make_vec, normalized_score
from common.envs.mujoco import make_single

NAMES = "mean", "std", "min", "max"
D4RL = {
    "halfcheetah-random": (1000, -288.8, 80.4, -526.0, -85.4),
    "halfcheetah-medium": (1000, 4770.3, 355.8, -310.2, 5309.4),
    "halfcheetah-medium-replay": (202, 3093.3, 1680.7, -638.5, 4985.1),
    "hopper-random": (45240, 18.4, 17.5, 2.9, 292.6),
    "hopper-medium": (2186, 1422.1, 379.0, 315.9, 3222.4),
    "hopper-medium-replay": (2041, 467.3, 511.0, -1.4, 3192.9),
    "walker2d-random": (48908, 1.9, 5.8, -17.0, 75.0),
    "walker2d-medium": (1190, 2852.1, 1095.4, -6.6, 4226.9),
    "walker2d-medium-replay": (1093, 682.7, 896.0, -50.2, 4132.0),
}
"""Episodes, and the mean, standard deviation, minimum and maximum of their returns, in D4RL v2."""


@dataclass
class Args:
    csv: str | None = None
    """file for the returns of MuJoCo's tasks, beside D4RL's"""
    teams: str | None = None
    """file for those of the particle tasks and of the reacher, with scores"""
    figure: str | None = None
    """PNG file for the distributions of the first (needs matplotlib, requirements-dev.txt)"""


def whole_episode_returns(path: Path, time_limit: int) -> np.ndarray:
    """Undiscounted returns of the episodes that ended by themselves or at the time limit."""
    with h5py.File(path) as file:
        rewards = file["rewards"][...].astype(np.float64)
        terminals, timeouts = file["terminals"][...], file["timeouts"][...]
    ends = np.flatnonzero(terminals | timeouts)
    starts = np.append(0, ends[:-1] + 1)
    sums = np.add.reduceat(rewards[: ends[-1] + 1], starts)
    return sums[terminals[ends] | (ends - starts + 1 == time_limit)]


def statistics(returns: np.ndarray) -> tuple[int, float, float, float, float]:
    """Number, mean, standard deviation, minimum, maximum."""
    return len(returns), returns.mean(), returns.std(), returns.min(), returns.max()


def draw(returns: dict[str, np.ndarray], path: str) -> None:
    """A row of histograms per task, D4RL's mean as a line."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in BUILT_IN_SIZES if any(n.startswith(f"{task}-") for n in returns)]
    figure, axes = plt.subplots(len(tasks), 3, figsize=(9, 2.4 * len(tasks)), squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for axis, quality in zip(row, BUILT_IN_SIZES[task], strict=True):
            name = f"{task}-{quality}"
            axis.set_title(name, fontsize=9)
            axis.tick_params(labelsize=7)
            axis.set_yticks([])
            if name not in returns:
                axis.text(0.5, 0.5, "not made", ha="center", transform=axis.transAxes)
                continue
            axis.hist(returns[name], bins=50, color="#4c72b0")
            axis.axvline(D4RL[name][1], color="#c44e52", label="mean of D4RL v2")
        row[0].set_ylabel("episodes", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("return", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    write_figure(path, figure, 150)


def teams() -> list[dict]:
    """The rows of the particle tasks and of the reacher."""
    rows = []
    for task, sizes in BUILT_IN_SIZES.items():
        for quality, size in sizes.items() if maker_of(task) in (mpe, reacher) else ():
            if (path := built_in_path(task, quality, size)).exists():
                time_limit = make_vec(task, 1, 0).max_episode_steps
                count, *numbers = statistics(whole_episode_returns(path, time_limit))
                numbers.append(normalized_score(task, numbers[0]).item())
                row = {"dataset": f"{task}-{quality}", "episodes": count}
                row |= {k: f"{x:.1f}" for k, x in zip((*NAMES, "score"), numbers, strict=True)}
                rows.append(row)
    return rows


def main(args: Args) -> None:
    check_outputs(args.csv, args.teams, figure=args.figure)
    of_teams = teams()
    if args.teams and not of_teams:
        raise InputError("no data of the particle tasks or of the reacher has been made yet")
    for row in of_teams:
        print("| " + " | ".join(map(str, row.values())) + " |")
    if args.teams:
        write_csv(args.teams, of_teams)
    returns = {}
    for task, sizes in BUILT_IN_SIZES.items():
        for quality, size in sizes.items():
            if f"{task}-{quality}" not in D4RL:
                continue
            path = built_in_path(task, quality, size)
            if path.exists():
                time_limit = make_single(task).spec.max_episode_steps
                returns[f"{task}-{quality}"] = whole_episode_returns(path, time_limit)
            else:
                print(f"{path} has not been made yet")
    if not returns:
        if args.csv or args.figure:
            raise InputError("no data of halfcheetah, hopper or walker2d has been made yet")
        return

    rows = []
    print("| dataset | source | episodes | mean | std | min | max |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, episodes in returns.items():
        for source, numbers in [("built-in", statistics(episodes)), ("D4RL v2", D4RL[name])]:
            row = {"dataset": name, "source": source, "episodes": numbers[0]}
            rows.append(row | {k: f"{x:.1f}" for k, x in zip(NAMES, numbers[1:], strict=True)})
            cells = " | ".join(f"{x:,.0f}" for x in numbers)
            print(f"| {name} | {source} | {cells} |")
    if args.csv:
        write_csv(args.csv, rows)
    if args.figure:
        draw(returns, args.figure)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
