"""The built-in `random` data of the particle tasks: uniform actions, whole episodes, in seconds."""

import zlib
from collections.abc import Iterator

import h5py
import numpy as np
from tqdm import tqdm

from common.envs import make_vec

EPISODES = 1024
"""rolled out side by side; a file depends on it"""


def episodes(task: str) -> Iterator[dict[str, np.ndarray]]:
    """Batches of whole episodes without end, one after another: D4RL's keys, (rows, ...)."""
    key = zlib.crc32(f"{task}-random".encode())
    vec = make_vec(task, EPISODES, key)
    rng = np.random.default_rng(np.random.SeedSequence(key, spawn_key=(1,)))
    shape = EPISODES, vec.num_agents, vec.action_dim
    obs = vec.reset()
    while True:
        running, columns = np.ones(EPISODES, dtype=bool), []
        for _ in range(vec.max_episode_steps):
            actions = vec.to_box(2 * rng.random(shape, np.float32) - 1).astype(np.float32)
            actions = np.clip(actions, vec.action_low, vec.action_high)  # rounding
            next_obs, rewards, terminations, truncations, final_obs = vec.step(actions)
            timeouts = truncations & ~terminations
            joint = actions.reshape(EPISODES, -1)
            state, next_state = obs[:, 0], final_obs[:, 0]  # the agents all see the same
            columns.append((state, joint, rewards, next_state, terminations, timeouts, running))
            running = running & ~(terminations | truncations)
            obs = next_obs
        obs = vec.reset()  # those that ended early have begun a further episode
        names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
        *columns, kept = (np.stack(column, axis=1) for column in zip(*columns, strict=True))
        yield {name: column[kept] for name, column in zip(names, columns, strict=True)}


def write(file: h5py.File, task: str, size: int, bar: tqdm) -> None:
    """`size` transitions into an empty file; the last row ends its episode, whole or not."""
    done = 0
    for arrays in episodes(task):
        if not done:
            for key, values in arrays.items():
                file.create_dataset(key, (size, *values.shape[1:]), values.dtype)
        n = min(len(arrays["rewards"]), size - done)
        for key, values in arrays.items():
            file[key][done : done + n] = values[:n]
        done += n
        bar.update(n)
        if done == size:
            file["timeouts"][-1] = not file["terminals"][-1]
            break
    file["metadata/algorithm"] = "uniform actions"
    file["metadata/versions/numpy"] = np.__version__
