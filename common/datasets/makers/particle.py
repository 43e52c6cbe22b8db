"""The built-in `random` data of the particle tasks: uniform actions, in seconds."""

from typing import Any

import h5py
import numpy as np

from common.datasets.makers import episodes

VERSION = 1
"""names the files; another one where their content changes"""


def write(file: h5py.File, task: str, quality: str, size: int, bar: Any, num_workers: int) -> None:
    """`size` transitions of uniform actions into an empty file."""
    episodes.append(file, episodes.roll_out(task), range(size), size, bar)
    file["metadata/algorithm"] = "uniform actions"
    file["metadata/versions/numpy"] = np.__version__
