"""Choose the snapshots of `behaviours.train_teams` that ship.

    python -m behaviours.select_teams --task simple-spread --snapshots FOLDER
    python -m behaviours.select_teams --task simple-tag --snapshots FOLDER --prey 2000

Every snapshot acts for `--episodes` episodes with the data's noise; their returns are kept in
FOLDER/evaluation.csv. `expert` is the best snapshot, `medium` the one, trained less than that,
whose return is nearest halfway between uniform actions and expert; `replay` are snapshots evenly
spaced in updates from the fresh policy to medium. Writes `common/datasets/makers/{task}.npz`; with
`--prey` it writes the prey that was trained so many updates to `common/envs/{task}-prey.npz`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from behaviours.select import check_name
from behaviours.train_teams import make_team
from common import InputError, cli
from common.datasets.makers import episodes
from common.datasets.makers.mpe import WEIGHTS, Policy, actor, policy_file
from common.envs import VecEnv, mpe


@dataclass
class Args:
    task: str
    """a task of common.envs"""
    snapshots: Path
    """folder that behaviours.train_teams wrote to"""
    prey: int | None = None
    """write the prey of a training with --prey, after so many updates"""
    noise: float = 0.1
    """standard deviation of the Gaussian noise on every action of the data"""
    episodes: int = 1000
    """of every snapshot"""
    replay: int = 10
    """snapshots that make medium-replay"""
    out: Path | None = None
    """file to write, by default the shipped one"""


def returns(task: str, act: episodes.Act | None, num_episodes: int) -> np.ndarray:
    """Returns (num_episodes,) of episodes that all end at the time limit."""
    rows = next(episodes.roll_out(task, act, num_episodes, f"{task}-evaluation"))
    return rows["rewards"].astype(np.float64).reshape(num_episodes, -1).sum(axis=1)


def read(path: Path, args: Args, vec: VecEnv) -> Policy:
    """A snapshot of the team `vec`, of which the prey is the last agent with --prey.

    Raises:
        InputError: it is of another.
    """
    with np.load(path) as arrays:
        found = {name: arrays[name] for name in WEIGHTS if name in arrays}
    if len(found) < len(WEIGHTS) or found["w0"].shape[:2] != (vec.num_agents, vec.obs_dim):
        of_prey = args.prey is not None
        flags = f"--task {args.task} --prey" if of_prey else f"--task {args.task}"
        hint = "" if of_prey else "; of one with --prey, select the prey by --prey UPDATES"
        raise InputError(f"{path} is not of a training with {flags}{hint}")
    return found


def main(args: Args) -> None:
    check_name(args.out)
    paths = {int(path.stem): path for path in sorted(args.snapshots.glob("[0-9]*[0-9].npz"))}
    if not paths:
        raise InputError(f"--snapshots {args.snapshots}: no snapshots (UPDATES.npz) there")
    vec = make_team(args.task, args.prey is not None, 1, 0)
    vec.close()
    if args.prey is not None:
        if args.prey not in paths:
            close = min(paths, key=lambda step: abs(step - args.prey))
            raise InputError(
                f"--prey {args.prey}: no such snapshot in {args.snapshots}; the nearest is {close}"
            )
        team = read(paths[args.prey], args, vec)
        prey = {name: values[-1] for name, values in team.items()}
        prey["w0"] = prey["w0"][: mpe.CLASSES[args.task].own_obs_dim[-1]]
        out = args.out or mpe.prey_file(args.task)
        np.savez_compressed(out, **prey)
        return print(f"wrote {out} ({out.stat().st_size / 1e3:.0f} kB)")

    snapshots = [read(path, args, vec) for path in paths.values()]
    policies = [  # as they ship
        {name: values.astype(np.float16) for name, values in each.items()} for each in snapshots
    ]
    steps = np.array(list(paths))
    random = returns(args.task, None, args.episodes).mean()
    means = []
    lines = [f"updates,episodes,mean,std\nuniform,{args.episodes},{random:.3f},"]
    for step, policy in zip(steps, policies, strict=True):
        weights = {name: values.astype(np.float32) for name, values in policy.items()}
        found = returns(args.task, actor(weights, args.noise), args.episodes)
        means.append(found.mean())
        lines.append(f"{step},{args.episodes},{found.mean():.3f},{found.std():.3f}")
        print(lines[-1], flush=True)
    (args.snapshots / "evaluation.csv").write_text("\n".join(lines) + "\n")

    expert = int(np.argmax(means))
    medium = int(np.argmin(np.abs(np.array(means[: expert + 1]) - (random + means[expert]) / 2)))
    grid = np.linspace(0, medium, args.replay).round().astype(int)
    chosen = sorted({*grid.tolist(), expert})
    arrays = {name: np.stack([policies[i][name] for i in chosen]) for name in WEIGHTS}
    arrays |= {"steps": steps[chosen], "medium": chosen.index(medium)}
    arrays |= {"expert": chosen.index(expert), "noise": args.noise}
    arrays["replay"] = np.array([chosen.index(i) for i in sorted(set(grid.tolist()))])
    out = args.out or policy_file(args.task)
    np.savez_compressed(out, **arrays)
    print(
        f"random {random:.1f}, medium {means[medium]:.1f} after {steps[medium]} updates", end=", "
    )
    print(f"expert {means[expert]:.1f} after {steps[expert]} updates")
    print(f"wrote {out} ({out.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
