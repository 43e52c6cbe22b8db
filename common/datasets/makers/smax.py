"""The built-in data of SMAX's maps, in one process.

`random` is uniform legal actions. `{task}.npz` beside this file holds the shared actors of one
training (`behaviours.train_battles`): `w0 (S, obs_dim, hidden) b0 (S, hidden) w1 b1 w2 b2`
float16, `steps (S,)` environment steps trained, `medium` and `expert` the indices of those
policies. They act stochastically, as they were trained; a dead agent's action is all zeros.
"""

from importlib.metadata import version
from typing import Any

import h5py
import numpy as np

from common.datasets.makers import episodes
from common.datasets.makers.mpe import Policy, load_policies, snapshot
from common.envs import make_vec
from common.envs.vec import choose

VERSION = 1
"""names the files; another one where their content changes"""
EPISODES = 128
"""rolled out side by side; a file depends on it"""


def one_hot(scores: np.ndarray, legal: np.ndarray) -> np.ndarray:
    """The legal action with the largest score, one-hot float32, zeros where none is legal; all
    (..., action_dim)."""
    best = choose(scores, legal, idle=0)
    return np.eye(legal.shape[-1], dtype=np.float32)[best] * legal.any(axis=-1, keepdims=True)


def random_actor(action_dim: int) -> episodes.Act:
    """The team that acts uniformly at random."""

    def act(obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        legal = obs[..., -action_dim:] > 0
        return one_hot(rng.random(legal.shape, np.float32), legal)

    return act


def actor(policy: Policy, action_dim: int) -> episodes.Act:
    """The team that acts by a shared softmax policy."""

    def act(obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        legal = obs[..., -action_dim:] > 0
        noise = rng.gumbel(size=legal.shape).astype(np.float32)
        return one_hot(logits(policy, obs) + noise, legal)

    return act


def logits(policy: Policy, obs: np.ndarray) -> np.ndarray:
    """Of every action, legal or not: (..., obs_dim) -> (..., action_dim)."""
    h = np.maximum(obs @ policy["w0"] + policy["b0"], 0)
    h = np.maximum(h @ policy["w1"] + policy["b1"], 0)
    return h @ policy["w2"] + policy["b2"]


def team(task: str, quality: str) -> episodes.Act:
    """Who made the data of a quality; `expert` acts too, though it has none."""
    vec = make_vec(task, 1, 0)
    vec.close()
    if quality == "random":
        return random_actor(vec.action_dim)
    policies = load_policies(task)
    return actor(snapshot(policies, int(policies[quality])), vec.action_dim)


def write(file: h5py.File, task: str, quality: str, size: int, bar: Any, num_workers: int) -> None:
    """`size` transitions into an empty file."""
    batches = episodes.roll_out(task, team(task, quality), EPISODES, f"{task}-{quality}")
    episodes.append(file, batches, range(size), size, bar, compression="lzf")
    file["metadata/algorithm"] = "uniform legal actions" if quality == "random" else "PPO"
    if quality != "random":
        policies = load_policies(task)
        file["metadata/policy_steps"] = policies["steps"][[int(policies[quality])]]
    for name in ("jax", "jaxlib", "jaxmarl"):
        file[f"metadata/versions/{name}"] = version(name)


def returns(task: str, quality: str, num_episodes: int) -> np.ndarray:
    """Returns (num_episodes,) of a quality's policy."""
    rows = next(episodes.roll_out(task, team(task, quality), num_episodes, f"{task}-evaluation"))
    ends = np.flatnonzero(rows["terminals"] | rows["timeouts"])
    return np.add.reduceat(rows["rewards"].astype(np.float64), np.append(0, ends[:-1] + 1))
