"""Does a data file agree with the simulator?

    python -m tools.check_data FILE.hdf5 --env halfcheetah

replays a file's `infos/qpos, infos/qvel` through the simulator and says how well the two agree.
"""

import argparse
import sys
from pathlib import Path

import h5py
import numpy as np

from common import InputError
from common.datasets import parse_env
from common.datasets.readers import open_hdf5, read_hdf5
from common.datasets.team import lay_out, next_unknown
from common.envs import TASKS, make_vec


def replay(path: Path, task: str, rows: int = 10_000, seed: int = 0) -> dict[str, np.ndarray]:
    """Steps the simulator from `rows` rows of a file, chosen by `seed`, and compares.

    Row t's `infos/qpos, infos/qvel` are the state before its action. Returns each row's largest
    absolute difference, (m,) float64: observations, next_observations (nan: not in the file),
    rewards; and terminals (m,) bool.
    Raises InputError for a file without these keys or of other widths than the task's.
    """
    vec = make_vec(task, 1, 0)
    vec.reset()
    data = read_hdf5(path)
    terminals, timeouts = data["terminals"].reshape(-1), data["timeouts"].reshape(-1)
    all_known = "next_observations" in data
    team = lay_out(data, task, vec, str(path))
    # the file's row of each of the team's
    row = np.arange(len(team)) if all_known else np.flatnonzero(~next_unknown(terminals, timeouts))
    states = []
    with open_hdf5(path) as file:
        for key, values in zip(("infos/qpos", "infos/qvel"), vec.qpos_qvel(), strict=True):
            shape, has = (len(terminals), values.shape[1]), file.get(key)
            if not isinstance(has, h5py.Dataset) or has.shape != shape:
                has = f"shape {has.shape}" if isinstance(has, h5py.Dataset) else "none"
                raise InputError(f"{path}: expected {key} of shape {shape} for {task}, found {has}")
            states.append(has[...])
    chosen = np.sort(np.random.default_rng(seed).permutation(len(team))[:rows])
    found = {key: np.empty(len(chosen)) for key in ("observations", "next_observations", "rewards")}
    for k, t in enumerate(chosen):
        obs = vec.set_state(0, *(values[row[t]] for values in states))
        _, rewards, _, _, next_obs = vec.step(team.actions[t][None])
        found["observations"][k] = np.abs(obs - team.obs[t]).max()
        found["next_observations"][k] = np.abs(next_obs[0] - team.next_obs[t]).max()
        found["rewards"][k] = abs(float(rewards[0]) - team.rewards[t])
    vec.close()
    found = {key: np.where(np.isnan(values), np.inf, values) for key, values in found.items()}
    if not all_known:
        found["next_observations"][team.terminations[chosen]] = np.nan  # not in the file
    return {**found, "terminals": team.terminations[chosen]}


def agreement(found: dict[str, np.ndarray], task: str) -> tuple[str, bool]:
    """What `replay` found as a table; whether 95 % of next states and rewards agree to 1e-4.

    Not judged are the rewards of terminal rows, and Ant's.
    """
    ended = found["terminals"]
    table = {
        "observations": found["observations"],
        "next_observations": found["next_observations"][~np.isnan(found["next_observations"])],
        "rewards": found["rewards"][~ended],
        "rewards of terminal rows": found["rewards"][ended],
    }
    lines = [f"{'absolute difference':26}{'rows':>9}{'median':>11}{'max':>11}{'within 1e-4':>14}"]
    agree = True
    for key, values in table.items():
        if len(values):
            share = (values <= 1e-4).mean()
            numbers = f"{len(values):9,}{np.median(values):11.2e}{values.max():11.2e}"
            lines.append(f"{key:26}{numbers}{100 * share:12.2f} %")
            judged = key == "next_observations" or (key == "rewards" and task != "ant")
            agree &= not judged or bool(share >= 0.95)
    if ended.any():
        lines.append("Terminal rows: D4RL v2 pays the healthy bonus of 1, Gymnasium's v5 does not.")
    if task == "ant":
        # it measures speed from a torso position that is one simulation substep old
        lines.append("Rewards: Ant's depend a little on the step before, which is not replayed.")
    lines.append(f"Data and simulator {'agree' if agree else 'DISAGREE'}.")
    return "\n".join(lines), agree


def main(argv: list[str] | None = None) -> int:
    """The command line -> exit status: 0 agreement, 1 disagreement, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m tools.check_data")
    parser.add_argument("file", type=Path, help="HDF5 file with infos/qpos and infos/qvel")
    parser.add_argument("--env", help="task; by default the one that the file's name starts with")
    parser.add_argument("--rows", type=int, default=10_000, help="how many rows to replay")
    parser.add_argument("--seed", type=int, default=0, help="which rows")
    args = parser.parse_args(argv)
    try:
        if args.rows < 1 or not 0 <= args.seed < 2**63:
            expected = "expected at least 1, and 0 to 2**63 - 1"
            raise InputError(f"--rows {args.rows} --seed {args.seed}: {expected}")
        tasks = [t for t, r in TASKS.items() if r.family == "mujoco" and not (r.local or r.views)]
        task = max((t for t in tasks if args.file.name.startswith(t)), key=len, default="")
        if args.env:
            task = parse_env(args.env)[0]
        if task not in tasks:
            raise InputError(f"which task is {args.file}? --env {', '.join(tasks)}")
        found = replay(args.file, task, args.rows, args.seed)
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    text, agree = agreement(found, task)
    print(f"{args.file}: {len(found['rewards']):,} rows replayed in {task}\n{text}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
