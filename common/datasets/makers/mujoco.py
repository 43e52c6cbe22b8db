"""The built-in data of the MuJoCo tasks: the shipped policies, rolled out in parallel processes.

The file has D4RL's layout. The policies, `{task}.npz` beside this file, are S snapshots of one SAC
training in increasing order: `w0 (S, obs_dim, 64) b0 (S, 64) w1 b1 w_mean b_mean w_log_std
b_log_std`, `steps (S,)` environment steps trained (`steps[0]` is 0: freshly initialised), `medium`
the index of the medium policy, `replay (R,)` the indices of those that make medium-replay. Of ant
`replay` goes to the training's end and makes full-replay, and there is the index of an `expert`.
As in D4RL, `random` is the fresh policy and every policy acts stochastically. D4RL's replay data is
what training had seen until then; here its snapshots share the rows equally.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import mujoco
import numpy as np

from common import InputError, nearest
from common.datasets.makers.workers import Workers
from common.envs.mujoco import make_single

VERSION = 1
"""names the files; another one where their content changes"""
POLICY_DIR = Path(__file__).parent
CHUNK_ROWS = 10_000
"""A piece of work. A file depends on it, but not on how many processes share the pieces."""
WEIGHTS = ("w0", "b0", "w1", "b1", "w_mean", "b_mean", "w_log_std", "b_log_std")

Policy = dict[str, np.ndarray]


def load_policies(task: str) -> dict[str, np.ndarray]:
    """The shipped policies of a task, arrays as at the top of this file.

    Raises InputError if there are none.
    """
    path = POLICY_DIR / f"{task.removesuffix('-local')}.npz"
    if not path.exists():
        names = [p.stem for p in POLICY_DIR.glob("*.npz")]
        raise InputError(f"no behaviour policies for {task!r}: {nearest(task, names)}")
    with np.load(path) as arrays:
        return dict(arrays)


def snapshot(policies: dict[str, np.ndarray], index: int) -> Policy:
    """One policy of the stack."""
    return {name: policies[name][index] for name in WEIGHTS}


def acting(policies: dict[str, np.ndarray], quality: str) -> list[int]:
    """The indices of the policies that make a quality."""
    if quality == "random":
        return [0]
    return np.atleast_1d(policies["replay" if "replay" in quality else quality]).tolist()


def sample_action(policy: Policy, obs: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """SAC's stochastic action (action_dim,) in [-1, 1] from obs (obs_dim,) and normal noise."""
    h = np.maximum(obs @ policy["w0"] + policy["b0"], 0)
    h = np.maximum(h @ policy["w1"] + policy["b1"], 0)
    mean = h @ policy["w_mean"] + policy["b_mean"]
    log_std = h @ policy["w_log_std"] + policy["b_log_std"]
    return np.tanh(mean + np.exp(np.minimum(np.maximum(log_std, -20), 2)) * noise)


def steps(task: str, policy: Policy, seed: np.random.SeedSequence) -> Iterator[tuple]:
    """The policy's transitions without end, episode after episode, in the order of `columns`."""
    time_limit = (env := make_single(task)).spec.max_episode_steps
    env = env.unwrapped
    dim = env.action_space.shape[0]
    env_seed, noise_seed = seed.spawn(2)
    rng = np.random.default_rng(noise_seed)
    obs = env.reset(seed=int(env_seed.generate_state(1)[0]))[0].astype(np.float32)
    elapsed = 0
    while True:
        qpos, qvel = env.data.qpos.copy(), env.data.qvel.copy()
        action = sample_action(policy, obs, rng.standard_normal(dim, np.float32))
        next_obs, reward, terminal, _, _ = env.step(action)
        next_obs = next_obs.astype(np.float32)
        elapsed += 1
        timeout = elapsed == time_limit and not terminal
        yield obs, action, reward, next_obs, terminal, timeout, qpos, qvel
        obs = next_obs
        if terminal or timeout:
            obs, elapsed = env.reset()[0].astype(np.float32), 0


def columns(task: str) -> dict[str, tuple[tuple[int, ...], type]]:
    """D4RL's keys, with the shape and type of a row.

    infos/qpos and infos/qvel are the state before the action, exact, so that it can be replayed.
    """
    env = make_single(task).unwrapped
    obs, action = env.observation_space.shape, env.action_space.shape
    return {
        "observations": (obs, np.float32),
        "actions": (action, np.float32),
        "rewards": ((), np.float32),
        "next_observations": (obs, np.float32),
        "terminals": ((), np.bool_),
        "timeouts": ((), np.bool_),
        "infos/qpos": ((env.model.nq,), np.float64),
        "infos/qvel": ((env.model.nv,), np.float64),
    }


@dataclass
class Chunk:
    """Whole episodes of one environment until there are at least `rows` rows, at most `limit`."""

    task: str
    policy: Policy
    seed: np.random.SeedSequence
    rows: int
    limit: int

    def roll(self) -> dict[str, np.ndarray]:
        """The rows, `columns` as arrays; an episode is unfinished only where `limit` ended it."""
        transitions = []
        for transition in steps(self.task, self.policy, self.seed):
            transitions.append(transition)
            n, ended = len(transitions), transition[4] or transition[5]
            if n == self.limit or (ended and n >= self.rows):
                break
        values = zip(columns(self.task).items(), zip(*transitions, strict=True), strict=True)
        return {key: np.array(rows, dtype) for (key, (_, dtype)), rows in values}


def plan(task: str, quality: str, size: int) -> list[tuple[int, list[Chunk]]]:
    """The parts of a dataset, one per policy: (rows, chunks); the first `rows` of the chunks' rows
    are the part.

    Chunks end with an episode, so that only a part's last one can be unfinished, as in D4RL's
    files. Cutting every chunk at a fixed row would leave out long episodes more often than short
    ones. The plan depends on the arguments and the shipped policies alone.
    """
    policies = load_policies(task)
    indices = acting(policies, quality)
    # Where the policies get several episodes each, their shares are multiples of the time limit
    unit = 1_000 if size >= 4_000 * len(indices) else 1
    bounds = np.arange(len(indices) + 1) * size // (len(indices) * unit) * unit
    bounds[-1] = size
    parts = []
    for part, (index, rows) in enumerate(zip(indices, np.diff(bounds).tolist(), strict=True)):
        policy, chunks = snapshot(policies, index), []
        for start in range(0, rows, CHUNK_ROWS):
            key = (zlib.crc32(f"{task}-{quality}".encode()), part, start)
            seed, limit = np.random.SeedSequence(key), rows - start
            chunks.append(Chunk(task, policy, seed, min(CHUNK_ROWS, limit), limit))
        parts.append((rows, chunks))
    return parts


def write(file: h5py.File, task: str, quality: str, size: int, bar: Any, num_workers: int) -> None:
    """`size` transitions into an empty file."""
    parts = plan(task, quality, size)
    shapes = columns(task)
    for key, (shape, dtype) in shapes.items():
        file.create_dataset(key, (size, *shape), dtype)
    num_chunks = sum(len(chunks) for _, chunks in parts)
    done = 0
    with Workers(min(num_workers, num_chunks)) as workers:
        submitted = [(rows, [workers.submit(chunk) for chunk in chunks]) for rows, chunks in parts]
        for rows, futures in submitted:
            end = done + rows
            for future in futures:
                if done == end:  # earlier chunks ran past their rows by enough
                    future.cancel()
                    continue
                arrays = future.result()
                n = min(len(arrays["rewards"]), end - done)
                if n == end - done and not arrays["terminals"][n - 1]:
                    arrays["timeouts"][n - 1] = True
                for key, values in arrays.items():
                    file[key][done : done + n] = values[:n]
                done += n
                bar.update(n)
            futures.clear()  # the rows are written: free them
    policies = load_policies(task)
    file["metadata/algorithm"] = "SAC"
    file["metadata/policy_steps"] = policies["steps"][acting(policies, quality)]
    file["metadata/policy_rows"] = [rows for rows, _ in parts]
    for module in (gymnasium, mujoco, np):
        file[f"metadata/versions/{module.__name__}"] = module.__version__
