"""The built-in data of the bandits: all agents near one mode, half of the rows each."""

from typing import Any

import h5py
import numpy as np

from common.envs import make_vec
from common.envs.bandit import MODES

VERSION = 1
"""names the files; another one where their content changes"""
STD = 0.1
"""standard deviation of every action around its mode, before actions are clipped to [-1, 1]"""


def write(file: h5py.File, task: str, quality: str, size: int, bar: Any, num_workers: int) -> None:
    """`size` transitions, each an episode, into an empty file."""
    vec, rng = make_vec(task, size, 0), np.random.default_rng(0)
    modes = rng.permutation(np.resize(MODES, size))[:, None, None]  # one for the whole team
    actions = modes + STD * rng.standard_normal((size, vec.num_agents, 1))
    actions = np.clip(actions, -1, 1).astype(np.float32)
    obs = vec.reset()
    _, rewards, terminations, _, final_obs = vec.step(actions)
    file["observations"], file["next_observations"] = obs[:, 0], final_obs[:, 0]
    file["actions"], file["rewards"] = actions[:, :, 0], rewards
    file["terminals"], file["timeouts"] = terminations, np.zeros(size, dtype=bool)
    file["metadata/algorithm"] = "two modes"
    file["metadata/versions/numpy"] = np.__version__
    bar.update(size)
