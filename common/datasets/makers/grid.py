"""The built-in `random` data of wind-grid: uniform actions of the agent and of its partner."""

from typing import Any

import h5py
import numpy as np

from common.datasets.makers import episodes
from common.datasets.makers.smax import random_actor
from common.envs import make_vec

VERSION = 1
"""names the files; another one where their content changes"""


def write(file: h5py.File, task: str, quality: str, size: int, bar: Any, num_workers: int) -> None:
    """`size` transitions into an empty file."""
    act = random_actor(make_vec(task, 1, 0).action_dim)
    episodes.append(file, episodes.roll_out(task, act, 64), range(size), size, bar)
    file["metadata/algorithm"] = "uniform actions"
    file["metadata/versions/numpy"] = np.__version__
