"""Environments stepped in parallel processes: the same numbers as in one, on several cores.

Every process, this one too, holds some of the teams in a `VecEnv` of its own. Actions, results and
orders are in memory that all share; who waits looks at it over and over, giving its core to whoever
else wants it, and sleeps in between only when nothing has come for a while, since a sleeper wakes
later than a step takes. The processes are
plain subprocesses because multiprocessing would import the user's script, and torch with it, in
each of them.
"""

import mmap
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from common import InputError
from common.envs.families import make_vec
from common.envs.parallel import refuse_others
from common.envs.vec import VecEnv

try:
    import fcntl
except ImportError:  # Windows, which has no workers
    fcntl = None

STEP, CALL = 1, 2
WORK = "import sys; from common.envs.workers import work; work(*map(int, sys.argv[1:]))"
FENCE = threading.Lock()
RESULTS = ("obs", "rewards", "terminations", "truncations", "final_obs")


def shared_arrays(fd: int, sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The arrays that the processes share, in the memory behind `fd`; sizes: teams, agents,
    obs_dim, action_dim and workers."""
    num_envs, num_agents, obs_dim, action_dim, num_workers = sizes
    shapes = {
        "orders": ((2,), np.int64),  # how many so far, and the latest: STEP or CALL
        "done": ((num_workers, 8), np.int64),  # orders that each has carried out; a cache line each
        "actions": ((num_envs, num_agents, action_dim), np.float32),
        "obs": ((num_envs, num_agents, obs_dim), np.float32),
        "rewards": ((num_envs,), np.float32),
        "terminations": ((num_envs,), np.bool_),
        "truncations": ((num_envs,), np.bool_),
        "final_obs": ((num_envs, num_agents, obs_dim), np.float32),
    }
    counts = [int(np.prod(shape)) for shape, _ in shapes.values()]
    starts, end = [], 0
    for count, (_, kind) in zip(counts, shapes.values(), strict=True):
        starts.append(end)
        end += -(-count * np.dtype(kind).itemsize // 64) * 64
    if os.fstat(fd).st_size < end:
        allocate = getattr(os, "posix_fallocate", None)  # which tells now that there is no room
        os.ftruncate(fd, end) if allocate is None else allocate(fd, 0, end)
    memory = mmap.mmap(fd, end)
    return {
        name: np.frombuffer(memory, kind, count, start).reshape(shape)
        for (name, (shape, kind)), count, start in zip(shapes.items(), counts, starts, strict=True)
    }


def shared_file(sizes: tuple[int, ...]) -> tuple[IO, dict[str, np.ndarray]]:
    """A file and its `shared_arrays`: in memory, or on disk where the memory for that is full."""
    for where in ("/dev/shm", None):
        if where is not None and not os.path.isdir(where):
            continue
        file = tempfile.TemporaryFile(dir=where)  # noqa: SIM115
        if file.fileno() < 3:  # where a standard stream was closed, which a worker's would replace
            copy = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD, 3)
            file.close()
            file = os.fdopen(copy, "r+b")
        try:
            return file, shared_arrays(file.fileno(), sizes)
        except OSError as error:
            file.close()
            failed = error
    raise failed


def num_cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def free_cores() -> int:
    """The cores that this process may use and nobody else does now, at least its own."""
    running = []
    for _ in range(5):  # the least: who wakes up for a moment is not busy
        try:
            running.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]))
        except (OSError, ValueError, IndexError):  # no Linux
            return num_cores()
        time.sleep(0.005)
    return max(1, num_cores() - max(0, min(running) - 1))


def fence() -> None:
    """What this process wrote before is seen by the others before what it writes after, on
    processors that reorder writes as well."""
    with FENCE:
        pass


def wait(ready: Callable[[], bool], check: Callable[[], None]) -> None:
    """Until `ready()`: looks for a millisecond, after everyone else who waits for this core, then
    sleeps longer and longer, up to 10 ms, and calls `check` as well."""
    begin = time.perf_counter()
    while not ready():
        waited = time.perf_counter() - begin
        if waited > 1e-3:
            if waited > 0.1:
                check()
            time.sleep(min(waited / 100, 0.01))
        else:
            os.sched_yield()
    fence()


def kill(processes: list[subprocess.Popen]) -> None:
    """End the processes."""
    for process in processes:
        process.kill()
        process.wait()
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass  # killed while it was being told something
    processes.clear()


class WorkerVecEnv(VecEnv):
    """E teams of a task, stepped by this process and `num_workers` others; steps, seeds and numbers
    as of `VecEnv`.

    The others start at the first reset and end with `close`, or when this process ends.
    Raises InputError where one of them ends.
    """

    def __init__(self, task: str, num_envs: int, seed: int, split: str | None, num_workers: int):
        self.task, self.split, self.num_workers = task, split, min(num_workers, num_envs - 1)
        self.shares = [
            slice(int(rows[0]), int(rows[-1]) + 1)
            for rows in np.array_split(np.arange(num_envs), self.num_workers + 1)
        ]
        self.own = make_vec(task, self.shares[0].stop, seed, split)
        super().__init__(self.own.teams, seed)
        self.num_envs = num_envs
        self.processes: list[subprocess.Popen] = []
        self.deployment: tuple[int, int] | None = None
        weakref.finalize(self, kill, self.processes)

    def _begin(self) -> None:
        root = str(Path(__file__).parents[2])
        paths = [root, *(path or os.getcwd() for path in sys.path)]  # a user's own task, too
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        sizes = (self.num_envs, self.num_agents, self.obs_dim, self.action_dim, self.num_workers)
        file, self.shared = shared_file(sizes)
        with file:
            fd = file.fileno()
            for number, share in enumerate(self.shares[1:]):
                process = subprocess.Popen(
                    [sys.executable, "-c", WORK, str(fd), str(os.getpid())],
                    stdin=subprocess.PIPE,
                    env=env,
                    pass_fds=[fd],
                    start_new_session=True,  # Ctrl-C is for this process alone
                )
                self.processes.append(process)
                self._tell(process, (self.task, self.split, sizes, number, share, form_of(self)))
            self.shared["orders"][0] = 1  # their first: to begin
            self._wait()
        if self.deployment is not None:
            self.set_deployment(*self.deployment)

    def _tell(self, process: subprocess.Popen, message: tuple) -> None:
        try:
            pickle.dump(message, process.stdin)
            process.stdin.flush()
        except BrokenPipeError:
            pass  # `_wait` says so

    def _order(self, kind: int) -> None:
        self.shared["orders"][1] = kind
        fence()
        self.shared["orders"][0] += 1

    def _call(self, method: str, arguments: list) -> None:
        """Order a call of a method, with an argument for each process. The order comes first: they
        read what follows, which a pipe may not hold."""
        self._order(CALL)
        for process, argument in zip(self.processes, arguments, strict=True):
            self._tell(process, (method, argument))

    def _wait(self) -> None:
        """Until every process has carried out the latest order."""
        orders, done = self.shared["orders"], self.shared["done"]

        def check() -> None:
            for process in self.processes:
                if process.poll() is not None:
                    self.close()
                    status = process.returncode
                    why = "it says why above" if status == 1 else "killed? out of memory?"
                    raise InputError(f"an environment process ended with status {status} ({why})")

        wait(lambda: (done[:, 0] == orders[0]).all(), check)

    def restart(self, seeds: list[int | None]) -> np.ndarray:
        """See `VecEnv.restart`."""
        if not self.processes:
            self._begin()
        self._call("restart", [seeds[share] for share in self.shares[1:]])
        obs = self.own.restart(seeds[self.shares[0]])
        self._wait()
        self.shared["obs"][self.shares[0]] = obs
        return self.shared["obs"].copy()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """See `VecEnv.step`."""
        self.shared["actions"][:] = actions
        self._order(STEP)
        found = self.own.step(self.shared["actions"][self.shares[0]])
        self._wait()
        for name, values in zip(RESULTS, found, strict=True):
            self.shared[name][self.shares[0]] = values
        return tuple(self.shared[name].copy() for name in RESULTS)

    def set_deployment(self, k: int, num_deployments: int) -> None:
        """See `VecEnv.set_deployment`."""
        self.deployment = k, num_deployments
        self.own.set_deployment(k, num_deployments)
        if self.processes:
            self._call("set_deployment", [self.deployment] * len(self.processes))
            self._wait()

    def close(self) -> None:
        kill(self.processes)
        self.own.close()


def form_of(vec: VecEnv) -> dict:
    """What may differ from process to process: of a PettingZoo task alone."""
    return getattr(next(iter(vec.teams), None), "form", {})


def work(fd: int, parent: int) -> None:
    """A process: carries out orders until its parent is gone."""
    try:
        carry_out(fd, parent)
    except InputError as error:  # a task's
        sys.exit(str(error))


def hear() -> tuple:
    """What its parent tells; where that was killed meanwhile, the process ends."""
    try:
        return pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):
        sys.exit()


def carry_out(fd: int, parent: int) -> None:
    """Orders, one after another. Raises InputError where the task is not what its parent's is, or
    gives no numbers."""
    task, split, sizes, number, share, form = hear()
    shared = shared_arrays(fd, sizes)
    orders, done = shared["orders"], shared["done"][number]
    mine = {name: shared[name][share] for name in ("actions", *RESULTS)}
    vec = make_vec(task, share.stop - share.start, 0, split)
    refuse_others(task, form, form_of(vec), "processes")
    done[0] = 1

    def check() -> None:
        if os.getppid() != parent:
            sys.exit()

    while True:
        wait(lambda: orders[0] != done[0], check)
        if orders[1] == STEP:
            for name, values in zip(RESULTS, vec.step(mine["actions"]), strict=True):
                mine[name][:] = values
        else:
            method, argument = hear()
            if method == "restart":
                mine["obs"][:] = vec.restart(argument)
            else:
                vec.set_deployment(*argument)
        fence()
        done[0] += 1
