"""Tables and one figure of many runs: interquartile means with bootstrap intervals over seeds,
strategies paired by seed.

    python -m benchmarks.aggregate runs/strategies --csv docs/results/RUNS.csv \
        --table docs/results/TABLE.csv --out docs/figures/FIGURE.png

docs/statistics.md explains the numbers. Paper: Agarwal et al., Deep Reinforcement Learning at the
Edge of the Statistical Precipice, NeurIPS 2021, https://arxiv.org/abs/2108.13264. Reference
implementation: https://github.com/google-research/rliable, which has no paired intervals.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from benchmarks import check_outputs, write_csv, write_figure
from common import InputError, checkpoints, cli, nearest, strategies


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """run folders, or folders with some in them at any depth"""
    csv: str | None = None
    """file for the raw numbers: a row per policy of every run"""
    table: str | None = None
    """CSV file for the printed tables, with all their intervals"""
    out: str | None = None
    """PNG file for curves and performance profiles"""
    baseline: str | None = None
    """strategy that its script's others are compared with, or a method's whole name as printed,
    that all are compared with; default: uniform, where there is one"""
    of: Literal["last", "mean", "gain", "improvement"] = "last"
    """a run's value: pi^K's; the mean of pi^1 ... pi^K; pi^K's less pi^0's; the same in % of
    |pi^0|, of returns also over tasks"""
    column: str = "mean_return"
    """of returns.csv, for the tables per task; such as win_rate"""
    by: tuple[str, ...] = ()
    """arguments of the runs that tell methods apart beside script and strategy, such as
    omar_coefficient"""
    curves: bool = False
    """print also the mean of every pi^k per task"""
    mixed: bool = False
    """take together what differs in its settings, its data, the code's commit or in how many seeds
    train together"""
    resamples: Annotated[int, cli.Range(100, 10**6)] = 10_000
    """of the bootstrap"""
    bootstrap_seed: cli.Natural = 0
    """of the resamples"""


# --- Statistics ---


def iqm(x: np.ndarray) -> np.ndarray:
    """Interquartile mean of all seeds and tasks, (..., S, T) -> (...).

    The mean without the floor(n / 4) smallest and largest of n = S T values: scipy's
    `trim_mean(x, 0.25)`, as rliable has it. Where 4 does not divide n it so cuts less than a
    quarter; it gives no value a part of its weight.
    """
    flat = np.sort(x.reshape(*x.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    return flat[..., cut : flat.shape[-1] - cut].mean(-1)


def summary(x: np.ndarray) -> np.ndarray:
    """Mean, median and interquartile mean, (..., S, T) -> (..., 3). The median is that of the
    tasks' means over seeds (rliable's); of a single task it is the seeds'."""
    median = np.median(x.mean(-2) if x.shape[-1] > 1 else x[..., 0], axis=-1)
    return np.stack([x.mean((-2, -1)), median, iqm(x)], axis=-1)


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """P(X > Y) + P(X = Y) / 2 of a run of x and one of y on the same task, averaged over tasks:
    (..., S, T), (..., S', T) -> (...). All S S' pairs of runs count (Mann and Whitney's U)."""
    x, y = x[..., :, None, :], y[..., None, :, :]
    return ((x > y) + 0.5 * (x == y)).mean((-3, -2, -1))


def differences(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Those of mean, median and interquartile mean, (..., S, T), (..., S', T) -> (..., 3)."""
    return summary(x) - summary(y)


def profile(x: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Performance profile: the share of runs above each threshold, (..., S, T) -> (..., H)."""
    return (x[..., None] > thresholds).mean((-3, -2))


def bootstrap(
    statistic: Callable,
    *samples: np.ndarray,
    resamples: int = 10_000,
    seed: int = 0,
    paired: bool = True,
    level: float = 0.95,
) -> np.ndarray:
    """Percentile interval by the stratified bootstrap: seeds are drawn with replacement, for every
    task by itself (Agarwal et al., section 4.1).

    Args:
        statistic: function of (resamples, S, T, ...) for each of the samples, to (resamples, ...).
        samples: (S, T, ...), seed s of task t; of equal S and T where they are paired.
        paired: draw the same seeds of all samples: seed s of one belongs to seed s of the other.

    Returns:
        (2, ...), the lower and the upper end; nan where a sample has a single seed.
    """
    random, found = np.random.default_rng(seed), []
    tasks = np.arange(samples[0].shape[1])
    for start in range(0, resamples, 500):  # what is in memory at a time
        drawn = []
        for i, sample in enumerate(samples):
            if i == 0 or not paired:
                shape = min(500, resamples - start), len(sample), len(tasks)
                index = random.integers(len(sample), size=shape)
            drawn.append(sample[index, tasks])
        found.append(statistic(*drawn))
    ends = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return ends if min(map(len, samples)) > 1 else np.full_like(ends, np.nan)


# --- Runs ---

SCORE = "normalized_score"
# Say where and how a run is made, not what it is
NO_SETTING = {
    *("seed", "run_dir", "resume", "offline_checkpoint", "device", "threads", "env_workers"),
    *("cuda_graph", "checkpoint_every", "save_policies", "log_every", "eval_every"),
    *("track", "wandb_project_name", "wandb_entity"),
}
# Of scripts that deploy nothing, which have no such arguments
UNDEPLOYED = {"deployments": 0, "deployment_steps": None}
# In what all runs on a task agree, whatever their method
SAME_TASK = ("dataset", "dataset_size", "deployment_steps", "num_seeds")


@dataclass
class Finished:
    """A run with all its policies."""

    folder: Path
    script: str
    strategy: str
    task: str
    seed: int
    args: dict
    rows: list[dict]  # returns.csv
    code: str = "unknown"  # commit
    data_return: float | None = None  # of the data's episodes
    method: str = ""  # as printed
    by: str = ""  # what --by adds to the strategy

    def value(self, column: str, of: str) -> float | np.ndarray:
        """One number, as --of says; the whole "curve", (K + 1,). All nan are the normalised scores
        of a task that has none.

        Raises:
            InputError: there is no such column, or something else that is no number.
        """
        column = "mean_return" if of == "improvement" and column == SCORE else column
        path = self.folder / "returns.csv"
        if column not in self.rows[0]:
            raise InputError(f"--column {column}: not in {path}; {nearest(column, self.rows[0])}")
        try:
            curve = np.array([float(row[column]) for row in self.rows])
        except (TypeError, ValueError):
            raise InputError(f"{path}: not all of {column} are numbers") from None
        if not np.isfinite(curve).all() and not (column == SCORE and np.isnan(curve).all()):
            raise InputError(f"{path}: not all of {column} are finite")
        first, last = curve[0], curve[-1]
        if of == "improvement" and first == 0:
            raise InputError(f"--of improvement: {column} of pi^0 is 0 in {path}")
        if of == "improvement":
            return 100 * (last - first) / abs(first)
        mean = curve[len(curve) > 1 :].mean()
        return {"curve": curve, "last": last, "mean": mean, "gain": last - first}[of]

    def differing(self, other: "Finished", names=None) -> list[str]:
        """The arguments, of `names` or of all that are settings, in which two runs differ."""
        names = sorted({*self.args, *other.args} - NO_SETTING) if names is None else names
        return [n for n in names if self.args.get(n, MISSING) != other.args.get(n, MISSING)]


MISSING = "not there"
Cells = dict[tuple[str, str], dict[int, Finished]]  # method, task -> seed -> run


def read(args: Args) -> tuple[Cells, list[str]]:
    """The finished runs, and a line about each kind of others.

    Raises:
        InputError: there are none, one is unreadable, or they cannot be compared.
    """
    folders = set()
    for each in args.runs:
        walk = os.walk(each, followlinks=True)
        its = {Path(folder).resolve() for folder, _, names in walk if "args.json" in names}
        if not its:
            raise InputError(f"no run in {each}")
        folders |= its
    found, unfinished, by = [], [], [name.replace("-", "_") for name in args.by]
    for folder in sorted(folders):
        record = checkpoints.read_record(folder)
        its, script = UNDEPLOYED | record["args"], record["script"]
        rows = checkpoints.read_returns(folder)
        if len(rows) <= its["deployments"]:
            unfinished.append(folder)
            continue
        task = its["env"] + (f" ({its['split']})" if its.get("split") else "")
        added = "".join(f" {n}={its.get(n)}" for n in by)
        strategy = strategies.strategy_name(its) + added
        more = {"code": record.get("code", "unknown"), "data_return": record.get("data_return")}
        of_run = folder, script, strategy, task, record["seed"], its, rows
        found.append(Finished(*of_run, **more, by=added))
    known = {name for run in found for name in run.args}
    for name in (name for name in by if found and name not in known):
        raise InputError(f"--by {name}: no run has it; {nearest(name, sorted(known))}")
    if not found:
        raise InputError(f"no finished run in {' '.join(args.runs) or 'no folder'}")
    said = [f"left out: {len(unfinished)} unfinished, {unfinished[0]}"] if unfinished else []
    deployed = [run for run in found if run.args["deployments"]]
    if 0 < len(deployed) < len(found):
        said.append(f"left out: {len(found) - len(deployed)} without deployments")
        found = deployed
    several, cells = len({run.script for run in found}) > 1, {}
    for run in sorted(found, key=lambda run: (run.script, run.strategy, run.task, run.seed)):
        run.method = f"{run.script} {run.strategy}" if several else run.strategy
        other = cells.setdefault((run.method, run.task), {}).setdefault(run.seed, run)
        if other is not run:
            names = ", ".join(map(cli.flag, run.differing(other)[:3]))
            raise InputError(
                f"{other.folder} and\n{run.folder} are both {run.method}, seed {run.seed}"
                + (f" (see --by; they differ in {names})" if names else "")
            )
    check(cells, args.mixed)
    return cells, said


def check(cells: Cells, mixed: bool) -> None:
    """Refuse other numbers of deployments, and unless `mixed` other settings among the seeds of a
    method and task, other data or stacks of seeds on a task, built-in data beside others, and other
    commits of the code.

    Raises:
        InputError: names two runs and in what they differ.
    """
    firsts, first = {}, next(run for cell in cells.values() for run in cell.values())
    for (_, task), cell in cells.items():
        its_first = next(iter(cell.values()))
        for run in cell.values():
            kinds = {each.args.get("dataset") == "built-in" for each in (run, first)}
            if not mixed and run.code != first.code:
                raise InputError(
                    f"not comparable: commit {first.code} in {first.folder}\n"
                    f"and {run.code} in {run.folder} (see --mixed)"
                )
            rules = [(first, ["deployments"])]
            if not mixed:
                rules += [(its_first, None), (firsts.setdefault(task, run), SAME_TASK)]
                rules += [(first, ["dataset"])] * (len(kinds) > 1)
            for other, names in rules:
                for name in run.differing(other, names):
                    was, now = (each.args.get(name, MISSING) for each in (other, run))
                    hint = "" if name == "deployments" else " (see --mixed and --by)"
                    raise InputError(
                        f"not comparable: {cli.flag(name)} is {was} in {other.folder}\n"
                        f"and {now} in {run.folder}{hint}"
                    )


def sample(cells: Cells, method: str, tasks: list[str], column: str, of: str):
    """The seeds that a method has on all these tasks, and their values (S, T) or curves
    (S, T, K + 1); None where there is no such seed."""
    its = [cells.get((method, task), {}) for task in tasks]
    seeds = sorted(set.intersection(*map(set, its)))
    values = [[cell[seed].value(column, of) for cell in its] for seed in seeds]
    return (seeds, np.array(values)) if seeds else None


def paired(one: tuple, other: tuple) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The seeds that two samples share, and their values of those."""
    seeds = [seed for seed in one[0] if seed in other[0]]
    if not seeds:
        return seeds, one[1], other[1]
    return seeds, *(x[[its.index(seed) for seed in seeds]] for its, x in (one, other))


# --- Tables ---

NAMES = "mean", "median", "iqm"


def baselines(cells: Cells, asked: str | None) -> dict[str, str]:
    """{method: the method that it is compared with}.

    Raises:
        InputError: there is none of that name.
    """
    its = {method: next(iter(cell.values())) for (method, _), cell in cells.items()}
    plain = {method: run.strategy.removesuffix(run.by) for method, run in its.items()}
    names = {name for run in its.values() for name in (run.strategy, run.method)}
    names = sorted(names | set(plain.values()))
    if asked and asked not in names:
        raise InputError(f"--baseline {asked}: no run is of it; {nearest(asked, names)}")
    name, found = asked or "uniform", {}
    for method, run in its.items():
        of_script = [other for other, r in its.items() if r.script == run.script]
        named = [other for other in of_script if name in (its[other].strategy, plain[other])]
        alike = [m for m in named if its[m].by == run.by] or named  # the only one, of other --by
        base = name if name in its else alike[0] if len(alike) == 1 else None
        if base not in (None, method):
            found[method] = base
    return found


def rows_of(where: str, samples: dict, base: dict[str, str], options: dict) -> list[dict]:
    """A row of numbers per method: its own, and those beside its baseline: differences paired where
    two seeds or more are in both; the probability of improvement of all their seeds."""
    rows = []
    for method, (seeds, x) in samples.items():
        row = {"where": where, "method": method, "seeds": len(seeds)}
        row |= numbers(NAMES, summary(x), bootstrap(summary, x, **options))
        if base.get(method) in samples:
            its_seeds, y = samples[base[method]]
            better = probability_of_improvement
            p, ends = better(x, y), bootstrap(better, x, y, paired=False, **options)
            pairs, *both = paired(samples[method], samples[base[method]])
            if len(pairs) > 1:
                x, y = both
                row["won"] = f"{((x > y) + 0.5 * (x == y)).sum():g} of {x.size}"
            row |= {"baseline": base[method], "pairs": len(pairs) if len(pairs) > 1 else 0}
            its_ends = bootstrap(differences, x, y, paired=len(pairs) > 1, **options)
            row |= numbers([f"difference_{n}" for n in NAMES], differences(x, y), its_ends)
            row |= numbers(["better"], p[None], ends[:, None])
        rows.append(row)
    return rows


def numbers(names, values: np.ndarray, ends: np.ndarray) -> dict[str, float]:
    """{name, name_low, name_high: number}"""
    found = {}
    for name, value, low, high in zip(names, values, *ends, strict=True):
        found |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def digits_for(values) -> int:
    largest = np.abs(values).max()
    return 0 if largest >= 1000 else 1 if largest >= 10 else 2


def print_table(header: list[str], lines: list[list[str]]) -> None:
    for each in (header, ["---"] * len(header), *lines):
        print(f"| {' | '.join(each)} |")


def print_rows(rows: list[dict]) -> None:
    """The tables' Markdown; the CSV has the median's difference too."""
    digits = digits_for([row[name] for row in rows for name in NAMES])

    def cell(row: dict, name: str, digits: int = digits) -> str:
        if name not in row:
            return ""
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        interval = "" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
        return f"{row[name]:.{digits}f}{interval}"

    header, lines = ["method", "seeds", "mean", "median", "IQM"], []
    compared = any("baseline" in row for row in rows)
    more = "difference_mean", "difference_iqm"
    if compared:
        finer = digits_for([row[name] for row in rows for name in more if name in row])
        header += ["baseline", "pairs", "mean: more by", "IQM: more by", "won", "P(better)"]
    for row in rows:
        lines.append([row["method"], str(row["seeds"]), *(cell(row, name) for name in NAMES)])
        if compared:
            lines[-1] += [row.get("baseline", ""), str(row.get("pairs", ""))]
            lines[-1] += [cell(row, name, finer) for name in more]
            lines[-1] += [row.get("won", ""), cell(row, "better", 2)]
    print_table(header, lines)


def print_curves(curves: dict) -> None:
    """The mean over seeds of every pi^k and their standard deviation."""
    lines = []
    for method, (_, x) in curves.items():
        each, digits = x[:, 0], digits_for(x)  # (S, K + 1)
        pairs = zip(each.mean(0), each.std(0), strict=True)
        lines.append([method, *(f"{m:.{digits}f} +- {s:.{digits}f}" for m, s in pairs)])
    print()
    print_table(["method", *(f"pi^{k}" for k in range(len(lines[0]) - 1))], lines)


# --- Figure ---


def draw(path: str, cells: Cells, parts: list, base: dict[str, str], args: Args) -> None:
    """Curves over deployments of every table, and of the first one the differences to the baseline
    and the performance profile; bands are bootstrap intervals."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    methods, count = sorted({method for method, _ in cells}), len(parts) + 1 + bool(base)
    columns = min(3, count)
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(4.2 * columns, 3.3 * rows + 0.5),
        squeeze=False,
        layout="constrained",
    )
    axes = iter(grid.flat)

    def panel(title: str, xlabel: str, ylabel: str, x, statistic: Callable, samples: dict):
        axis = next(axes)
        for method, arrays in samples.items():
            ends = bootstrap(statistic, *arrays, resamples=2000, seed=args.bootstrap_seed)
            counts = sorted({len(cell) for (its, _), cell in cells.items() if its == method})
            label = f"{method}, {'-'.join(map(str, counts))} seeds"
            colour = f"C{methods.index(method)}"
            marker = "." if len(x) < 50 else None
            axis.plot(x, statistic(*arrays), color=colour, label=label, marker=marker)
            axis.fill_between(x, *ends, color=colour, alpha=0.12, lw=0)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(xlabel, fontsize=9)
        axis.set_ylabel(ylabel, fontsize=9)
        return axis

    def each_iqm(x: np.ndarray) -> np.ndarray:
        return iqm(np.moveaxis(x, -1, 0)).T  # (..., S, T, K + 1) -> (..., K + 1)

    def of_methods(tasks: list[str], column: str, of: str) -> dict:
        return {m: its for m in methods if (its := sample(cells, m, tasks, column, of))}

    deployed = range(len(next(iter(next(iter(cells.values())).values())).rows))
    step = "deployments fine-tuned on"
    for title, tasks, column in parts:
        samples = {m: (x,) for m, (_, x) in of_methods(tasks, column, "curve").items()}
        axis = panel(title, step, f"IQM of {column}", deployed, each_iqm, samples)
        cells_of = [cell for (_, task), cell in cells.items() if task in tasks]
        its = {run.data_return for cell in cells_of for run in cell.values()}
        if len(tasks) == 1 and column == "mean_return" and len(its) == 1 and None not in its:
            axis.axhline(its.pop(), color="grey", ls="--", lw=0.8, label="the data's episodes")
    title, tasks, column = parts[0]
    if base:
        samples, pairs = of_methods(tasks, column, "curve"), {}
        for method in samples:
            shared, *both = paired(samples[method], samples.get(base.get(method), ([], None)))
            pairs |= {method: both} if len(shared) > 1 else {}
        if pairs:
            axis = panel(
                f"{title}, paired with {', '.join(sorted(set(base.values())))}", step,
                "IQM less the baseline's", deployed,
                lambda x, y: each_iqm(x) - each_iqm(y), pairs,
            )  # fmt: skip
            axis.axhline(0, color="grey", lw=0.8)
    samples = {m: (x,) for m, (_, x) in of_methods(tasks, column, args.of).items()}
    values = np.concatenate([x.ravel() for (x,) in samples.values()])
    steps = np.linspace(values.min(), values.max(), 200)
    panel(
        f"{title}: performance profile", column if args.of == "last" else args.of,
        "share of runs above", steps, lambda x: profile(x, steps), samples,
    )  # fmt: skip
    for axis in axes:
        axis.remove()
    legend = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            legend.setdefault(label, handle)
    labels = sorted(legend)
    figure.legend([legend[x] for x in labels], labels, loc="outside lower center", ncols=3)
    write_figure(path, figure, 100)


def main(args: Args) -> None:
    cells, said = read(args)
    base = baselines(cells, args.baseline)
    methods, tasks = (sorted({key[i] for key in cells}) for i in (0, 1))
    all_runs = [run for cell in cells.values() for run in cell.values()]
    last = len(all_runs[0].rows) - 1
    if not last and args.of != "last":
        raise InputError(f"--of {args.of}: these runs have no deployments")
    scored = [
        task
        for task in tasks
        if all((method, task) in cells for method in methods)
        and not any(
            np.isnan(r.value(SCORE, "last")) for m in methods for r in cells[m, task].values()
        )
    ]
    parts = [(f"{len(scored)} task{'s' * (len(scored) > 1)}", scored, SCORE)] if scored else []
    parts += [(task, [task], args.column) for task in tasks]

    def samples_of(tasks: list[str], column: str, of: str = args.of) -> dict:
        return {m: its for m in methods if (its := sample(cells, m, tasks, column, of))}

    parts = [part for part in parts if samples_of(*part[1:])]  # no table of no common seed
    for run in all_runs:  # what is wrong is said before anything is written
        run.value(args.column, args.of)
    check_outputs(args.csv, args.table, figure=args.out, flag="--out")
    options = {"resamples": args.resamples, "seed": args.bootstrap_seed}
    tables = [
        rows_of(title, samples_of(its_tasks, column), base, options)
        for title, its_tasks, column in parts
    ]
    # Files before words, whose reader may leave early
    if args.csv:
        names = "script", "task", "strategy", "seed"
        columns = [({name: getattr(run, name) for name in names}, run.rows) for run in all_runs]
        write_csv(args.csv, [first | row for first, rows in columns for row in rows])
    if args.table:
        write_csv(args.table, [row for rows in tables for row in rows])
    if args.out:  # of one task, its own curves say it all
        draw(args.out, cells, parts[-1:] if len(tasks) == 1 else parts, base, args)
    value = {"last": f"pi^{last}", "mean": f"mean of pi^1 ... pi^{last}"}
    value |= {"gain": f"pi^{last} less pi^0", "improvement": f"pi^{last} above pi^0 in %"}
    print(
        f"{len(all_runs)} runs, {value[args.of]}; [95 % stratified bootstrap interval over seeds]"
    )
    few = [
        f"{method} on {task}: {len(its)}" for (method, task), its in cells.items() if len(its) < 5
    ]
    if few:
        each = ", ".join(few[:3] + ["..."] * (len(few) > 3))
        said.append(f"warning: fewer than five seeds, their intervals are too narrow: {each}")
    if len(scored) < len(tasks):
        missing = ", ".join(task for task in tasks if task not in scored)
        said.append(f"per task only, unscored or not of every method: {missing}")
    for line in said:
        print(line)
    for rows, (title, its_tasks, column) in zip(tables, parts, strict=True):
        measured = "mean_return" if args.of == "improvement" and column == SCORE else column
        print(f"\n**{title}, {measured}**\n")
        print_rows(rows)
        if args.curves and column == args.column and len(its_tasks) == 1:
            print_curves(samples_of(its_tasks, column, "curve"))


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
