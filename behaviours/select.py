"""Choose the snapshots of a training that ship: `common/datasets/makers/{task}.npz`.

    python -m behaviours.select --task hopper --snapshots snapshots/hopper

Every snapshot acts stochastically for some episodes, whose returns are kept in
SNAPSHOTS/returns.csv, so that this can be run again while training goes on. `medium` is the
snapshot whose mean return is nearest D4RL v2's medium, the earliest of those within 5 % of it;
`replay` are snapshots evenly spaced in training steps from the fresh policy to medium.

Of ant, whose sets are random, medium, full-replay and expert, `expert` is the snapshot with the
highest mean return, `medium` that whose mean is nearest the middle between it and standing still,
and `replay` goes to the end.
"""

import csv
import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from common import InputError, cli, nearest
from common.datasets.makers.mujoco import POLICY_DIR, WEIGHTS, Policy, steps

MEDIUM = {"halfcheetah": (4770, 356), "hopper": (1422, 379), "walker2d": (2852, 1095)}
"""Mean and standard deviation of the returns in D4RL v2's medium data."""
SAC_TASKS = (*MEDIUM, "ant")
STANDING_STILL = 1001
"""Return of an ant that does nothing, docs/environments.md."""


@dataclass
class Args:
    task: str
    """halfcheetah, walker2d, hopper or ant"""
    snapshots: Path
    """folder that behaviours.train writes to"""
    episodes: int = 10
    """episodes of every snapshot"""
    close_episodes: int = 100
    """episodes of those whose mean is close to the medium return, and of the best"""
    close: int = 5
    """how many those are"""
    replay: int = 25
    """snapshots that make the replay data"""
    medium: int | None = None
    """take the snapshot of this many training steps as medium"""
    out: Path | None = None
    """file to write, by default the shipped one"""


def episode_returns(task: str, policy: Policy, episodes: int, seed: tuple[int, ...]) -> np.ndarray:
    """Returns (episodes,) of whole episodes of the stochastic policy."""
    returns, total = [], 0.0
    seeds = np.random.SeedSequence(seed)
    for _, _, reward, _, terminal, timeout, _, _ in steps(task, policy, seeds):
        total += reward
        if terminal or timeout:
            returns.append(total)
            total = 0.0
            if len(returns) == episodes:
                return np.array(returns)


class Evaluations:
    """Returns of the snapshots in a folder, kept in returns.csv: rows (training steps, return)."""

    def __init__(self, task: str, folder: Path):
        self.task, self.folder = task, folder
        self.file = folder / "returns.csv"
        self.returns: dict[int, list[float]] = {}
        if self.file.exists():
            with open(self.file, newline="") as file:
                try:
                    for row in csv.DictReader(file):
                        self.returns.setdefault(int(row["step"]), []).append(float(row["return"]))
                except (KeyError, TypeError, ValueError):
                    raise InputError(f"{self.file} has no rows of step and return") from None

    def policy(self, step: int) -> Policy:
        with np.load(self.folder / f"{step:07d}.npz") as arrays:
            return dict(arrays)

    def mean(self, step: int) -> float:
        return float(np.mean(self.returns[step]))

    def run(self, step: int, episodes: int) -> None:
        """Bring the snapshot's number of episodes up to `episodes`."""
        known = self.returns.get(step, [])
        missing = episodes - len(known)
        if missing <= 0:
            return
        try:
            policy = self.policy(step)
        except zipfile.BadZipFile:
            print(f"{step}: still being written, left out", file=sys.stderr)
            return
        new = episode_returns(self.task, policy, missing, (step, len(known)))
        self.returns[step] = known + new.tolist()
        partial = self.file.with_suffix(".partial")
        with open(partial, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["step", "return"])
            for s, returns in sorted(self.returns.items()):
                rows.writerows((s, round(r, 3)) for r in returns)
        os.replace(partial, self.file)
        print(f"{step}: {self.mean(step):.0f} +- {np.std(self.returns[step]):.0f}", file=sys.stderr)


def check_name(out: Path | None) -> None:
    """Raises InputError for a name of a file that NumPy would change."""
    if out is not None and out.suffix != ".npz":
        raise InputError(f"--out {out}: expected a name that ends in .npz")


def choose_medium(evaluations: Evaluations, target: float, close: int, episodes: int) -> int:
    """The training steps of the medium snapshot."""
    near = sorted(evaluations.returns, key=lambda step: abs(evaluations.mean(step) - target))
    for step in near[:close]:
        evaluations.run(step, episodes)

    def error(step: int) -> float:
        return abs(evaluations.mean(step) / target - 1)

    return min(near[:close], key=lambda step: (max(error(step), 0.05), step))


def choose_expert(evaluations: Evaluations, close: int, episodes: int) -> int:
    """The training steps of the best snapshot."""
    best = sorted(evaluations.returns, key=evaluations.mean)[-close:]
    for step in best:
        evaluations.run(step, episodes)
    return max(best, key=evaluations.mean)


def main(args: Args) -> None:
    if args.task not in SAC_TASKS:
        hint = nearest(args.task, SAC_TASKS)
        raise InputError(f"--task {args.task}: SAC makes no data of it; {hint}")
    check_name(args.out)
    stems = (path.stem for path in args.snapshots.glob("*.npz"))
    available = sorted(int(stem) for stem in stems if stem.isdecimal())
    if not available:
        raise InputError(f"--snapshots {args.snapshots}: no snapshots (STEPS.npz) there")
    evaluations = Evaluations(args.task, args.snapshots)
    medium, expert = args.medium, None
    if medium is None or args.task == "ant":
        for step in available:
            evaluations.run(step, args.episodes)
    if args.task == "ant":
        expert = choose_expert(evaluations, args.close, args.close_episodes)
        target = (STANDING_STILL + evaluations.mean(expert)) / 2
    else:
        target = MEDIUM[args.task][0]
    if medium is None:
        medium = choose_medium(evaluations, target, args.close, args.close_episodes)
    elif medium not in available:
        raise InputError(f"--medium {medium}: no such snapshot in {args.snapshots}")
    evaluations.run(medium, args.close_episodes)
    grid = np.linspace(0, medium if expert is None else available[-1], args.replay)
    replay = sorted({min(available, key=lambda step: abs(step - g)) for g in grid})
    needed = min(20, args.replay)
    if len(replay) < needed:
        raise InputError(
            f"only {len(replay)} snapshots until {grid[-1]:.0f} steps, need {needed}: "
            f"medium is at {medium}"
        )
    named = {"medium": medium} | ({"expert": expert} if expert is not None else {})
    chosen = sorted({*replay, *named.values()})
    for step in chosen:
        evaluations.run(step, args.episodes)

    print(f"{'steps':>8}{'episodes':>10}{'mean':>8}{'std':>8}{'min':>8}{'max':>8}")
    for step in chosen:
        r = evaluations.returns[step]
        numbers = "".join(f"{f(r):8.0f}" for f in (np.mean, np.std, np.min, np.max))
        print(f"{step:8d}{len(r):10d}{numbers}", *(n for n, at in named.items() if at == step))
    if expert is None:
        print("D4RL's medium:    {:8d}{:8d}".format(*MEDIUM[args.task]))

    policies = [evaluations.policy(step) for step in chosen]
    arrays = {name: np.stack([p[name] for p in policies]).astype(np.float32) for name in WEIGHTS}
    out = args.out or POLICY_DIR / f"{args.task}.npz"
    indices = {name: chosen.index(step) for name, step in named.items()}
    indices["replay"] = np.array([chosen.index(step) for step in replay])
    np.savez_compressed(out, steps=np.array(chosen), **indices, **arrays)
    print(f"wrote {out} ({out.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
