"""The returns of the built-in datasets, MuJoCo's beside D4RL v2's.

    python -m behaviours.report

Reads the full-size files that are in the cache folder, prints a Markdown table of their whole
episodes, and writes it with more digits to docs/results/datasets/datasets.csv and the return
distributions to docs/figures/dataset_returns.png (with matplotlib, see requirements-dev.txt). Those
of the tasks whose agents each see their own state go to team_datasets.csv beside it, with scores.
"""

import csv
from pathlib import Path

import h5py
import numpy as np

from common.datasets.makers import built_in_path, maker_of, mpe
from common.datasets.names import BUILT_IN_SIZES
from common.envs import make_vec, normalized_score
from common.envs.mujoco import make_single

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


def draw(returns: dict[str, np.ndarray], path: Path) -> None:
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def teams(docs: Path) -> None:
    """The table of team_datasets.csv, of the full-size files that are there."""
    rows = [["dataset", "episodes", "mean", "std", "min", "max", "score"]]
    for task, sizes in BUILT_IN_SIZES.items():
        for quality, size in sizes.items() if maker_of(task) is mpe else ():
            if (path := built_in_path(task, quality, size)).exists():
                time_limit = make_vec(task, 1, 0).max_episode_steps
                numbers = statistics(whole_episode_returns(path, time_limit))
                cells = [*numbers[1:], normalized_score(task, numbers[1]).item()]
                rows.append([f"{task}-{quality}", numbers[0], *(f"{x:.1f}" for x in cells)])
                print("| " + " | ".join(map(str, rows[-1])) + " |")
    if len(rows) > 1:
        with open(docs / "results/datasets/team_datasets.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def main() -> None:
    docs = Path(__file__).parents[1] / "docs"
    teams(docs)
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
        return

    table = docs / "results/datasets/datasets.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    with open(table, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["dataset", "source", "episodes", "mean", "std", "min", "max"])
        print("| dataset | source | episodes | mean | std | min | max |")
        print("|---|---|---:|---:|---:|---:|---:|")
        for name, episodes in returns.items():
            for source, numbers in [("built-in", statistics(episodes)), ("D4RL v2", D4RL[name])]:
                rows.writerow([name, source, numbers[0], *(f"{x:.1f}" for x in numbers[1:])])
                cells = " | ".join(f"{x:,.0f}" for x in numbers)
                print(f"| {name} | {source} | {cells} |")
    draw(returns, docs / "figures" / "dataset_returns.png")


if __name__ == "__main__":
    main()
