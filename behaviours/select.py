"""Choose the snapshots of a training that ship: `common/datasets/makers/{task}.npz`.

    python -m behaviours.select --task hopper --snapshots snapshots/hopper

Every snapshot acts stochastically for some episodes, whose returns are kept in
SNAPSHOTS/returns.csv, so that this can be run again while training goes on. `medium` is the
snapshot whose mean return is nearest D4RL v2's medium, the earliest of those within 5 % of it;
`replay` are snapshots evenly spaced in training steps from the fresh policy to medium.
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


@dataclass
class Args:
    task: str
    """halfcheetah, walker2d or hopper"""
    snapshots: Path
    """folder that behaviours.train writes to"""
    episodes: int = 10
    """episodes of every snapshot"""
    close_episodes: int = 100
    """episodes of those whose mean is close to D4RL's medium"""
    close: int = 5
    """how many those are"""
    replay: int = 25
    """snapshots that make medium-replay"""
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
                for row in csv.DictReader(file):
                    self.returns.setdefault(int(row["step"]), []).append(float(row["return"]))

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


def choose_medium(evaluations: Evaluations, target: float, close: int, episodes: int) -> int:
    """The training steps of the medium snapshot."""
    near = sorted(evaluations.returns, key=lambda step: abs(evaluations.mean(step) - target))
    for step in near[:close]:
        evaluations.run(step, episodes)

    def error(step: int) -> float:
        return abs(evaluations.mean(step) / target - 1)

    return min(near[:close], key=lambda step: (max(error(step), 0.05), step))


def main(args: Args) -> None:
    if args.task not in MEDIUM:
        hint = nearest(args.task, MEDIUM)
        raise InputError(f"--task {args.task}: D4RL has no medium data of it; {hint}")
    target, target_std = MEDIUM[args.task]
    available = sorted(int(p.stem) for p in args.snapshots.glob("[0-9]*.npz"))
    if not available:
        raise InputError(f"--snapshots {args.snapshots}: no snapshots (STEPS.npz) there")
    evaluations = Evaluations(args.task, args.snapshots)
    medium = args.medium
    if medium is None:
        for step in available:
            evaluations.run(step, args.episodes)
        medium = choose_medium(evaluations, target, args.close, args.close_episodes)
    elif medium not in available:
        raise InputError(f"--medium {medium}: no such snapshot in {args.snapshots}")
    evaluations.run(medium, args.close_episodes)
    grid = np.linspace(0, medium, args.replay)
    replay = sorted({min(available, key=lambda step: abs(step - g)) for g in grid})
    if len(replay) < 20:
        raise InputError(
            f"medium is at {medium} steps: only {len(replay)} snapshots until there, need 20"
        )
    for step in replay:
        evaluations.run(step, args.episodes)

    print(f"{'steps':>8}{'episodes':>10}{'mean':>8}{'std':>8}{'min':>8}{'max':>8}")
    for step in replay:
        r = evaluations.returns[step]
        numbers = "".join(f"{f(r):8.0f}" for f in (np.mean, np.std, np.min, np.max))
        print(f"{step:8d}{len(r):10d}{numbers}{'  medium' if step == medium else ''}")
    print(f"D4RL's medium:    {target:8d}{target_std:8d}")

    policies = [evaluations.policy(step) for step in replay]
    arrays = {name: np.stack([p[name] for p in policies]).astype(np.float32) for name in WEIGHTS}
    out = args.out or POLICY_DIR / f"{args.task}.npz"
    indices = {"medium": replay.index(medium), "replay": np.arange(len(replay))}
    np.savez_compressed(out, steps=np.array(replay), **indices, **arrays)
    print(f"wrote {out} ({out.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
