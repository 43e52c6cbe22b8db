"""Make a built-in dataset: roll the shipped policies out in parallel processes into one file.

The file has D4RL's layout. The policies, `common/behaviours/{task}.npz`, are S snapshots of one SAC
training in increasing order: `w0 (S, obs_dim, 64) b0 (S, 64) w1 b1 w_mean b_mean w_log_std
b_log_std`, `steps (S,)` environment steps trained (`steps[0]` is 0: freshly initialised), `medium`
the index of the medium policy, `replay (R,)` the indices of those that make medium-replay.
As in D4RL, `random` is the fresh policy and every policy acts stochastically. D4RL's medium-replay
is what training had seen until it was medium; here its snapshots share the rows equally.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import gymnasium
import h5py
import mujoco
import numpy as np
from tqdm import tqdm

from common import InputError, nearest
from common.behaviours import battles, teams, uniform, waypoints
from common.datasets import BUILT_IN_SIZES, QUALITIES, data_name, made_once
from common.envs import TASKS, num_cores
from common.envs.mujoco import make_single

POLICY_DIR = Path(__file__).parent
CHUNK_ROWS = 10_000
"""A piece of work. A file depends on it, but not on how many processes share the pieces."""
WEIGHTS = ("w0", "b0", "w1", "b1", "w_mean", "b_mean", "w_log_std", "b_log_std")

Policy = dict[str, np.ndarray]


def is_teams(task: str) -> bool:
    """Whether teams.py makes the task's data: its agents each see their own state."""
    return TASKS[task].family == "mpe" or TASKS[task].local


def load_policies(task: str) -> dict[str, np.ndarray]:
    """The shipped policies of a task, arrays as at the top of this file.

    Raises InputError if there are none.
    """
    path = POLICY_DIR / f"{task}.npz"
    if not path.exists():
        names = [p.stem for p in POLICY_DIR.glob("*.npz")]
        raise InputError(f"no behaviour policies for {task!r}: {nearest(task, names)}")
    with np.load(path) as arrays:
        return dict(arrays)


def snapshot(policies: dict[str, np.ndarray], index: int) -> Policy:
    """One policy of the stack."""
    return {name: policies[name][index] for name in WEIGHTS}


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
    indices = {"random": [0], "medium": [int(policies["medium"])]}.get(quality, policies["replay"])
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


# --- Worker processes ---


class Workers:
    """Processes that roll chunks out, each driven by a thread.

    They are plain subprocesses because multiprocessing would import the script that the user runs,
    and torch with it, in each of them. Ctrl-C does not reach them: leaving the `with` block ends
    them.
    """

    def __init__(self, num_workers: int):
        root = Path(__file__).parents[2]
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "common.behaviours.rollout"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.processes: list[subprocess.Popen] = []
        self.idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        self.threads = ThreadPoolExecutor(num_workers)
        for _ in range(num_workers):
            process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
            self.processes.append(process)
            self.idle.put(process)

    def submit(self, chunk: Chunk) -> Future:
        """`chunk.roll()` in one of the processes; the future raises RuntimeError if that dies."""
        return self.threads.submit(self._roll, chunk)

    def _roll(self, chunk: Chunk) -> dict[str, np.ndarray]:
        process = self.idle.get()
        try:
            pickle.dump(chunk, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise RuntimeError(f"a rollout process died (status {process.poll()})") from error
        finally:
            self.idle.put(process)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            process.kill()
        self.threads.shutdown()
        for process in self.processes:
            process.wait()
            process.stdout.close()
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass  # killed while it was being given a chunk


def work() -> None:
    """A worker process: chunks from stdin, their rows to stdout, until stdin closes."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up between the replies
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            pickle.dump(chunk.roll(), replies, protocol=pickle.HIGHEST_PROTOCOL)
            replies.flush()
        except BrokenPipeError:
            os._exit(0)  # the parent was killed


# --- The file ---


class Bar(tqdm):
    """A progress bar at whose next update Ctrl-C takes effect, at the latest at its end.

    Raised at once, KeyboardInterrupt would now and then be lost: h5py runs Python code in callbacks
    that no exception leaves.
    """

    interrupted = False

    def __enter__(self):
        # Other threads cannot set a handler, and whoever handles or ignores it shall go on doing so
        self.handles = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self.handles:
            signal.signal(signal.SIGINT, self._on_signal)
        return super().__enter__()

    def _on_signal(self, number, frame) -> None:
        self.interrupted = True

    def update(self, n: float = 1) -> bool | None:
        if self.interrupted:
            raise KeyboardInterrupt
        return super().update(n)

    def __exit__(self, exc_type, exc_value, traceback) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if self.handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.interrupted and exc_type is None:
            raise KeyboardInterrupt


def _write(file: h5py.File, task: str, quality: str, size: int, num_workers: int, bar: Bar) -> None:
    if TASKS[task].family == "particle":
        uniform.write(file, task, size, bar)
        return
    if TASKS[task].family == "maze":
        with Workers(min(num_workers, -(-size // waypoints.PIECE_ROWS))) as workers:
            waypoints.write(file, task, size, bar, workers)
        for module in (mujoco, np):
            file[f"metadata/versions/{module.__name__}"] = module.__version__
        return
    if TASKS[task].family == "smax":
        battles.write(file, task, quality, size, bar)
        return
    if is_teams(task):
        teams.write(file, task, quality, size, bar)
        return
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
    indices = {"random": [0], "medium": [policies["medium"]]}.get(quality, policies["replay"])
    file["metadata/algorithm"] = "SAC"
    file["metadata/policy_steps"] = policies["steps"][np.array(indices)]
    file["metadata/policy_rows"] = [rows for rows, _ in parts]
    for module in (gymnasium, mujoco, np):
        file[f"metadata/versions/{module.__name__}"] = module.__version__


def make(
    task: str, quality: str, size: int, path: Path | str, num_workers: int | None = None
) -> None:
    """Write `size` transitions of task's built-in data to `path`, behind a progress bar, unless
    the file is there already.

    `quality` is random, medium, medium-replay or expert; of the particle tasks random only, of
    MuJoCo's all but expert, of SMAX's maps random and medium, of the mazes none (""). The file
    depends on task, quality and size, not on `num_workers` (default: one per core). The last row of
    each policy has timeouts=True even where the episode is unfinished: an episode of the file is
    whole if its last row is terminal or reaches the time limit. If another process is making
    `path`, waits for that instead.
    Raises InputError for unknown names, a size below 1 and a place that cannot be written to.
    """
    expected = tuple(BUILT_IN_SIZES.get(task, QUALITIES))
    if quality not in expected:
        hint = nearest(quality, expected) if expected[0] else "expected none"
        raise InputError(f"unknown built-in data quality {quality!r} of {task}: {hint}")
    if size < 1:
        raise InputError(f"built-in data of {size} transitions: expected at least 1")
    family = TASKS[task].family if task in TASKS else "mujoco"
    if family == "mujoco" or (family in ("mpe", "smax") and quality != "random"):
        load_policies(task)
    path = Path(path)
    try:
        with made_once(path) as partial:
            if partial is None:
                return
            try:
                every = 0.3 if sys.stderr.isatty() else 10
                name = f"making {data_name(task, quality)}"
                with (
                    Bar(total=size, desc=name, unit_scale=True, mininterval=every) as bar,
                    h5py.File(partial, "w", locking=False) as file,
                ):
                    _write(file, task, quality, size, num_workers or num_cores(), bar)
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except (OSError, RuntimeError) as error:
        # Closing a file that could not be written, h5py raises a RuntimeError over the OSError
        cause = error if isinstance(error, OSError) or error.__cause__ else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"cannot write {path}: {cause.strerror or cause}") from error


if __name__ == "__main__":
    # Pickled chunks name the module, not the script, as their home
    from common.behaviours.rollout import work

    work()
