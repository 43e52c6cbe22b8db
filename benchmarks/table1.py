"""Table 1 from its raw files, as Markdown and a picture: improvements beside the paper's, what the
draws amount to, and of every data set the returns and their differences, paired by seed.

    python -m benchmarks.table1 docs/results/otc_bcq/table1 --figure table1.png

The raw files, of one data set or more each:

    python -m benchmarks.aggregate sweeps/GRID --of improvement --csv FOLDER/SET.csv
    python -m benchmarks.scalars sweeps/GRID/*/*__*__* --csv FOLDER/SET_scalars.csv \
        --tags otc/online_fraction losses/vae_reconstruction
"""

import csv
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks import check_outputs, write_figure
from benchmarks.aggregate import bootstrap, print_table
from common import InputError, cli

# Improvement over the offline policy in %, mean and standard deviation over five seeds; Table 1 of
# Jiang and Lu, AAAI 2023: BCQ, with d_q and with d_e
PAPER = {
    "halfcheetah-medium": ("12.1 +- 3.0", "15.0 +- 1.1", "14.8 +- 4.1"),
    "hopper-medium": ("-6.8 +- 7.0", "12.0 +- 2.6", "2.6 +- 3.8"),
    "walker2d-medium": ("-13.9 +- 4.4", "23.3 +- 7.9", "27.1 +- 21.7"),
    "halfcheetah-medium-replay": ("4.9 +- 2.2", "8.9 +- 1.4", "13.0 +- 2.6"),
    "hopper-medium-replay": ("9.2 +- 4.3", "49.2 +- 52.1", "44.6 +- 12.3"),
    "walker2d-medium-replay": ("17.3 +- 25.8", "47.2 +- 14.6", "27.8 +- 8.1"),
    "halfcheetah-random": ("9.0 +- 2.4", "18.3 +- 1.7", "25.7 +- 1.2"),
    "hopper-random": ("1.2 +- 12.8", "6.4 +- 2.8", "7.3 +- 1.3"),
    "walker2d-random": ("20.5 +- 10.6", "43.1 +- 7.8", "43.7 +- 7.8"),
}
STRATEGIES = {
    "uniform": "uniform",
    "offline": "offline",
    "otc-value": "value",
    "otc-embedding": "embedding",
    "otc-two-stage": "two-stage",
    "otc-residual": "residual",
    "mixed0.25": "mixed 25 %",
    "mixed": "mixed",
}
# Of some data sets: benchmarks.oracle and bcq_parts, and --by embedding_kl_weight
LABELS = STRATEGIES | {
    "otc-oracle": "oracle",
    "otc-oracle-offline": "oracle, offline",
    "otc-embedding embedding_kl_weight=0.5": "embedding, KL weight 0.5",
    "otc-embedding-for-cloning": "embedding for cloning",
    "otc-embedding-for-values": "embedding for values",
}
# What chooses is compared with what takes online data and does not
CONTROLS = "uniform", "mixed0.25", "mixed"
CHOOSING = [name for name in LABELS if name.startswith("otc-")]
PER_PAGE = ("uniform", "otc-value", "otc-embedding")  # the columns of PAPER


@dataclass
class Args:
    folder: tyro.conf.Positional[str]
    """with the raw files"""
    figure: str | None = None
    """PNG file for the improvements"""


@dataclass
class Raw:
    """What the files hold, by task."""

    returns: dict[str, dict[str, np.ndarray]]  # of a strategy, (S, K + 1)
    scores: dict[str, dict[str, np.ndarray]]  # the same, normalised
    scalars: dict[str, dict[str, dict[str, list]]]  # of a strategy and tag, [(update, value)]
    files: dict[str, list[Path]]


def read(folder: Path) -> Raw:
    """All files of a folder.

    Raises:
        InputError: there are none, or the seeds of a task's strategies are not the same.
    """
    points = defaultdict(lambda: defaultdict(dict))
    scalars = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    files = defaultdict(dict)
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        try:
            for row in rows:
                if "tag" in row:
                    task, step, value = row["env"], int(row["step"]), float(row["value"])
                    scalars[task][row["strategy"]][row["tag"]].append((step, value))
                else:
                    task, key = row["task"], (int(row["seed"]), int(row["deployment"]))
                    values = float(row["mean_return"]), float(row["normalized_score"])
                    points[task][row["strategy"]][key] = values
                files[task][path] = None
        except (KeyError, ValueError, TypeError):
            raise InputError(f"{path}: no raw file of Table 1; see benchmarks/table1.py") from None
    returns, scores = {}, {}
    for task, strategies in points.items():
        first = sorted(next(iter(strategies.values())))
        seeds, deployments = (sorted({key[i] for key in first}) for i in (0, 1))
        for strategy, values in strategies.items():
            if sorted(values) != first:
                raise InputError(f"{folder}: {task}'s strategies differ in seeds or deployments")
            curves = np.array([[values[seed, k] for k in deployments] for seed in seeds])
            returns.setdefault(task, {})[strategy] = curves[..., 0]
            scores.setdefault(task, {})[strategy] = curves[..., 1]
    if not returns:
        raise InputError(f"no raw returns in {folder}; see benchmarks/table1.py")
    order = [task for task in [*PAPER, *sorted(set(returns) - set(PAPER))] if task in returns]
    of = ({task: each[task] for task in order} for each in (returns, scores))
    return Raw(*of, scalars, {task: list(files[task]) for task in order})


def improvement(curves: np.ndarray) -> np.ndarray:
    """Of pi^K over pi^0 in %, (S, K + 1) -> (S,)."""
    return 100 * (curves[:, -1] - curves[:, 0]) / np.abs(curves[:, 0])


def ends(values: np.ndarray) -> np.ndarray:
    """Of the 95 % interval of the mean over seeds (S,), or over seeds and tasks (S, T)."""
    return bootstrap(lambda x: x.mean((-2, -1)), values.reshape(len(values), -1))


def interval(values: np.ndarray, digits: int, bold: bool = False) -> str:
    """The mean with its `ends`; with `bold` in bold where both are above zero."""
    low, high = ends(values)
    text = f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return f"**{text}**" if bold and low > 0 else text


def pairs(strategies) -> list[tuple[str, str]]:
    """Which strategies are compared with which."""
    found = [("offline", "uniform"), ("mixed0.25", "uniform"), ("mixed", "uniform")]
    found += [(one, other) for other in CONTROLS for one in CHOOSING]
    return [pair for pair in found if set(pair) <= set(strategies)]


# --- Tables ---


def improvements(returns: dict) -> None:
    lines = []
    for task, paper in PAPER.items():
        its = returns.get(task, {})
        cells = [interval(improvement(its[s]), 1) if s in its else "" for s in STRATEGIES]
        lines.append([task, *(cells if its else ["not measured"] + cells[1:])])
        of_paper = dict(zip(PER_PAGE, paper, strict=True))
        lines.append(["*paper*", *(of_paper.get(s, "") for s in STRATEGIES)])
    print_table(["data set", *STRATEGIES.values()], lines)


def beside_uniform(returns: dict) -> None:
    """The last policy's return less that with uniform draws, in bold where the interval is above
    zero."""
    others = [name for name in STRATEGIES if name != "uniform"]

    def cell(its: dict, name: str) -> str:
        if not {name, "uniform"} <= set(its):
            return ""
        return interval(its[name][:, -1] - its["uniform"][:, -1], 0, bold=True)

    lines = [[task, *(cell(its, name) for name in others)] for task, its in returns.items()]
    print_table(["data set", *(STRATEGIES[name] for name in others)], lines)


def over_all(scores: dict) -> None:
    """Differences of the normalised score over all tasks that have both strategies."""
    lines = []
    for one, other in pairs(STRATEGIES):
        tasks = [task for task, its in scores.items() if {one, other} <= set(its)]
        sizes = {len(scores[task][one]) for task in tasks}
        if len(sizes) != 1:
            continue
        each = [scores[task][one][:, -1] - scores[task][other][:, -1] for task in tasks]
        ahead = sum(x.mean() > 0 for x in each)
        names = STRATEGIES[one], STRATEGIES[other]
        difference = interval(np.stack(each, axis=1), 1)
        lines.append([*names, difference, f"{ahead} of {len(tasks)}"])
    print_table(
        ["strategy", "less", "normalised score of the last policy", "data sets ahead"], lines
    )


def amounts(tags: dict, num_deployments: int) -> tuple[list[float], float]:
    """A strategy's online share of the draws, by deployment, and the error of its generative model
    in the updates after the last one."""
    steps, values = map(np.array, zip(*sorted(tags["otc/online_fraction"]), strict=True))
    # Offline updates log no draws: the first of fine-tuning's is one interval after them
    first, last = steps[0], steps[-1]
    start = first - (steps[steps > first].min() - first)
    k = np.ceil((steps - start) / (last - start) * num_deployments)
    begun = steps[k < num_deployments].max()  # the updates after the last deployment
    errors = [value for step, value in tags["losses/vae_reconstruction"] if step > begun]
    online = [values[k == each].mean() for each in range(1, num_deployments + 1)]
    return online, float(np.mean(errors))


def shares(scalars: dict, num_deployments: int) -> None:
    """The online share of the draws by deployment, and the error of the generative model."""
    lines, ks = [], sorted({1, max(1, num_deployments // 2), num_deployments})
    for strategy in [s for s in LABELS if s in scalars]:
        online, error = amounts(scalars[strategy], num_deployments)
        shown = [*(online[each - 1] for each in ks), np.mean(online)]
        cells = [f"{100 * x:.0f} %" for x in shown] + [f"{100 * error:.1f}"]
        lines.append([LABELS[strategy], *cells])
    names = [f"online: k = {k}" for k in ks]
    print_table(["draw", *names, "mean", "error of the generative model, times 100"], lines)


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's, of numbers of which no two are equal."""
    ranks = [np.argsort(np.argsort(each)) for each in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def correlations(raw: Raw) -> None:
    """Over the strategies of a data set: what goes with the last policy's mean return?"""
    lines = []
    for task, curves in raw.returns.items():
        scalars = raw.scalars.get(task, {})
        names = [name for name in curves if name in scalars]
        if len(names) < 3:
            continue
        found = [amounts(scalars[name], curves[name].shape[1] - 1) for name in names]
        last = [curves[name][:, -1].mean() for name in names]
        online, errors = [np.mean(each) for each, _ in found], [error for _, error in found]
        cells = (f"{rank_correlation(last, each):.2f}" for each in (errors, online))
        lines.append([task, str(len(names)), *cells])
    columns = ["data set", "strategies", "error of the generative model", "online share"]
    print_table(columns, lines)


def of_data_set(curves: dict) -> None:
    def cell(x: np.ndarray) -> str:
        return f"{x.mean():.0f} +- {x.std():.0f}"

    last = next(iter(curves.values())).shape[1] - 1
    policies = sorted({0, 1, last // 2, last})
    order = sorted(curves, key=lambda s: -curves[s][:, -1].mean())
    lines = [[LABELS.get(s, s), *(cell(curves[s][:, k]) for k in policies)] for s in order]
    print_table(["strategy", *(f"pi^{k}" for k in policies)], lines)
    print()
    lines = []
    for one, other in pairs(curves):
        difference = curves[one][:, -1] - curves[other][:, -1]
        ahead = f"{(difference > 0).sum()} of {len(difference)}"
        lines.append([LABELS[one], LABELS[other], interval(difference, 0), ahead])
    print_table(["strategy", "less", "difference", "seeds ahead"], lines)


# --- Figure ---


def draw(path: str, returns: dict) -> None:
    """A panel per data set: improvements with their intervals, and the paper's means; all on one
    axis, logarithmic beyond 20 %; what is below -1,000 % lies at its edge."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        3, 3, figsize=(11, 9), layout="constrained", sharex=True, sharey=True
    )
    names = list(STRATEGIES)
    for axis, (task, paper) in zip(grid.flat, PAPER.items(), strict=True):
        its = returns.get(task, {})
        for y, name in enumerate(names):
            if name in its:
                values = improvement(its[name])
                shown = np.maximum([*ends(values), values.mean()], -1000)
                axis.plot(shown[:2], [y, y], color="C0", lw=2)
                axis.plot(shown[2], y, "o", color="C0", clip_on=False)
            if name in PER_PAGE:
                mean = float(paper[PER_PAGE.index(name)].split()[0])
                axis.plot(mean, y, "D", mfc="none", color="C1")
        axis.axvline(0, color="grey", lw=0.8)
        axis.set_title(task if its else f"{task}: not measured", fontsize=10)
        axis.set_yticks(range(len(names)), STRATEGIES.values())
        axis.invert_yaxis() if axis is grid.flat[0] else None
    ticks = [-1000, -100, -20, 0, 20, 100, 1000]
    grid[0, 0].set_xscale("symlog", linthresh=20, linscale=1)
    grid[0, 0].set_xticks(ticks, ticks)
    grid[0, 0].set_xlim(-1000, 3000)
    grid[2, 1].set_xlabel(
        "improvement of the last policy over the offline one, %: ours with its 95 % interval, "
        "the paper's as diamonds\nlinear up to 20 %, logarithmic beyond; dots on the left edge are "
        "below -1,000 %"
    )
    write_figure(path, figure, 80)


def main(args: Args) -> None:
    raw = read(Path(args.folder))
    check_outputs(figure=args.figure)
    print("## Improvement\n")
    improvements(raw.returns)
    print("\n## Last policies, less uniform draws'\n")
    beside_uniform(raw.returns)
    print("\n## Over the data sets\n")
    over_all(raw.scores)
    print("\n## What goes with the return\n")
    print("Rank correlation, over the strategies, of the last policy's mean return with\n")
    correlations(raw)
    for task, curves in raw.returns.items():
        # As the page docs/table1.md links them
        links = ", ".join(f"[{x.name}]({os.path.relpath(x, 'docs')})" for x in raw.files[task])
        print(f"\n## {task}\n\nRaw: {links}.\n")
        of_data_set(curves)
        if task in raw.scalars:
            print()
            its = {name: tags for name, tags in raw.scalars[task].items() if name in curves}
            shares(its, next(iter(curves.values())).shape[1] - 1)
    if args.figure:
        draw(args.figure, raw.returns)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
