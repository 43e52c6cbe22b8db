"""Whole episodes of many teams side by side, by any policy."""

import zlib
from collections.abc import Callable, Iterator

import h5py
import numpy as np
from tqdm import tqdm

from common.envs import make_vec
from common.envs.tasks import TASKS

EPISODES = 1024
"""rolled out side by side; a file depends on it"""

Act = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""From observations (E, N, obs_dim) to actions (E, N, action_dim) in [-1, 1]"""


def roll_out(
    task: str, act: Act | None = None, num_envs: int | None = None, name: str | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of whole episodes without end, one after another: D4RL's keys, (rows, ...).

    `act` is by default uniform. `num_envs` episodes are a batch, by default `EPISODES`; `name`, by
    default TASK-random, seeds them. Where the agents all see the same, `observations` holds it
    once, elsewhere theirs side by side.
    """
    num_envs = num_envs or EPISODES
    key = zlib.crc32((name or f"{task}-random").encode())
    vec = make_vec(task, num_envs, key)
    rng = np.random.default_rng(np.random.SeedSequence(key, spawn_key=(1,)))
    shape = num_envs, vec.num_agents, vec.action_dim
    seen = 1 if TASKS[task].family == "particle" else vec.num_agents
    obs = vec.reset()
    while True:
        running, columns = np.ones(num_envs, dtype=bool), []
        for _ in range(vec.max_episode_steps):
            actions = 2 * rng.random(shape, np.float32) - 1 if act is None else act(obs, rng)
            actions = vec.to_box(actions).astype(np.float32)
            actions = np.clip(actions, vec.action_low, vec.action_high)  # rounding
            next_obs, rewards, terminations, truncations, final_obs = vec.step(actions)
            timeouts = truncations & ~terminations
            joint, state, next_state = (
                x.reshape(num_envs, -1) for x in (actions, obs[:, :seen], final_obs[:, :seen])
            )
            columns.append((state, joint, rewards, next_state, terminations, timeouts, running))
            running = running & ~(terminations | truncations)
            obs = next_obs
            if not running.any():
                break
        obs = vec.reset()  # those that ended early have begun a further episode
        names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
        *columns, kept = (np.stack(column, axis=1) for column in zip(*columns, strict=True))
        yield {name: column[kept] for name, column in zip(names, columns, strict=True)}


def append(
    file: h5py.File,
    batches: Iterator[dict[str, np.ndarray]],
    rows: range,
    size: int,
    bar: tqdm,
    compression: str | None = None,
) -> None:
    """Fill a range of the rows of a file of `size`; the last row ends its episode, whole or not."""
    done = rows.start
    while done < rows.stop:
        arrays = next(batches)
        n = min(len(arrays["rewards"]), rows.stop - done)
        for key, values in arrays.items():
            if key not in file:
                shape = size, *values.shape[1:]
                file.create_dataset(key, shape, values.dtype, compression=compression)
            file[key][done : done + n] = values[:n]
        done += n
        bar.update(n)
    file["timeouts"][done - 1] = not file["terminals"][done - 1]
