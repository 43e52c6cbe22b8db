"""The built-in data of tasks whose agents each see their own state, in one process.

`{task}.npz` beside this file holds S snapshots of the N actors of one training in increasing
order: `w0 (S, N, obs_dim, hidden) b0 (S, N, hidden) w1 b1 w2 b2` float16, `steps (S,)` updates
trained, `medium` and `expert` the indices of those policies, `replay (R,)` of those that make
medium-replay in equal shares, and `noise`, the standard deviation of the Gaussian noise on every
action of the data. `random` is uniform actions.
"""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from common.datasets.makers import episodes
from common.envs import make_vec

VERSION = 1
"""names the files; another one where their content changes"""
BATCH_ROWS = 25_000
"""at most so many rows are rolled out side by side; a file depends on it"""
WEIGHTS = ("w0", "b0", "w1", "b1", "w2", "b2")

Policy = dict[str, np.ndarray]
"""A team's actors: `WEIGHTS`, each (N, ...)"""


def policy_file(task: str) -> Path:
    """Where the policies of a task are, if they ship."""
    return Path(__file__).with_name(f"{task}.npz")


def load_policies(task: str) -> dict[str, np.ndarray]:
    """Arrays as at the top of this file, weights float32."""
    with np.load(policy_file(task)) as arrays:
        return {k: arrays[k].astype(np.float32) if k in WEIGHTS else arrays[k] for k in arrays}


def snapshot(policies: dict[str, np.ndarray], index: int) -> Policy:
    """One policy of the stack."""
    return {name: policies[name][index] for name in WEIGHTS}


def actor(policy: Policy, noise: float) -> episodes.Act:
    """The team that acts by `policy`, with Gaussian noise, clipped to [-1, 1]."""

    def act(obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        h = obs.transpose(1, 0, 2)  # (N, E, obs_dim)
        h = np.maximum(h @ policy["w0"] + policy["b0"][:, None], 0)
        h = np.maximum(h @ policy["w1"] + policy["b1"][:, None], 0)
        actions = np.tanh(h @ policy["w2"] + policy["b2"][:, None]).transpose(1, 0, 2)
        actions = actions + np.float32(noise) * rng.standard_normal(actions.shape, np.float32)
        return np.clip(actions, -1, 1)

    return act


def write(file: h5py.File, task: str, quality: str, size: int, bar: Any, num_workers: int) -> None:
    """`size` transitions into an empty file; shares of several policies are whole episodes where
    there are enough rows."""
    vec = make_vec(task, 1, 0)
    length = vec.max_episode_steps
    vec.close()
    indices, acts = [0], [None]
    policies = {} if quality == "random" else load_policies(task)
    if policies:
        indices = np.atleast_1d(policies["replay" if quality == "medium-replay" else quality])
        acts = [actor(snapshot(policies, i), float(policies["noise"])) for i in indices]
    unit = length if size >= length * len(acts) else 1
    bounds = np.arange(len(acts) + 1) * size // (len(acts) * unit) * unit
    bounds[-1] = size
    for part, act in enumerate(acts):
        rows = range(int(bounds[part]), int(bounds[part + 1]))
        if rows:
            name = f"{task}-{quality}" + (f"-{part}" if part else "")
            num_envs = max(1, min(BATCH_ROWS // length, -(-len(rows) // length)))
            batches = episodes.roll_out(task, act, num_envs, name)
            episodes.append(file, batches, rows, size, bar)
    file["metadata/algorithm"] = "TD3" if policies else "uniform actions"
    if policies:
        file["metadata/policy_steps"] = policies["steps"][indices]
        file["metadata/policy_rows"] = np.diff(bounds)
    file["metadata/versions/numpy"] = np.__version__
