"""The built-in data of the coordination game: two agents that choose independently, in an instant.

The shares of their choices are not known from its source, which says in words how each set is.
"""

from typing import Any

import h5py
import numpy as np

from common.envs import make_vec
from common.envs.matrix_game import rewards_of
from common.envs.tasks import TASKS

VERSION = 1
"""names the files; another one where their content changes"""
P_RIGHT = {"favourable": (0.9, 0.9), "neutral": (0.5, 0.5), "unfavourable": (0.9, 0.1)}
"""of agents 1 and 2"""


def write(file: h5py.File, task: str, quality: str, size: int, bar: Any, num_workers: int) -> None:
    """`size` transitions into an empty file; the same choices for both forms of the game."""
    rng = np.random.default_rng(list(P_RIGHT).index(quality))
    choices = (rng.random((size, 2)) < P_RIGHT[quality]).astype(int)
    vec = make_vec(task, 1, 0)
    if TASKS[task].kwargs.get("joint"):
        actions = np.eye(4, dtype=np.float32)[2 * choices[:, 0] + choices[:, 1]]
    else:
        actions = np.eye(2, dtype=np.float32)[choices].reshape(size, 4)
    obs = np.broadcast_to(vec.reset()[0, :1], (size, 1, vec.obs_dim)).reshape(size, vec.obs_dim)
    last = np.arange(1, size + 1) % vec.max_episode_steps == 0
    columns = {
        "observations": obs,
        "actions": actions,
        "rewards": rewards_of(choices),
        "next_observations": obs,
        "terminals": last,
        "timeouts": np.zeros(size, dtype=bool),
    }
    for key, values in columns.items():
        file.create_dataset(key, values.shape, values.dtype)
        file[key][...] = values
    file["timeouts"][size - 1] = not last[-1]
    file["metadata/algorithm"] = f"independent choices, right with {P_RIGHT[quality]}"
    bar.update(size)
