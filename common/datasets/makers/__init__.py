"""Built-in data, made on this machine once: a maker per family of tasks, and the policies that
ship."""

import os
import signal
import sys
import threading
from pathlib import Path

import h5py
from tqdm import tqdm

from common import InputError, cache_dir, nearest
from common.datasets.files import add_checksums, made_once
from common.datasets.makers import (
    bandit,
    grid,
    matrix_game,
    maze,
    mpe,
    mujoco,
    particle,
    reacher,
    smax,
)
from common.datasets.names import BUILT_IN_SIZES, QUALITIES, data_name, is_hosted
from common.envs import num_cores
from common.envs.tasks import TASKS


def maker_of(task: str):
    """The module that makes a task's data; its VERSION is in the file's name."""
    makers = bandit, grid, matrix_game, maze, mpe, mujoco, particle, smax
    of_family = {maker.__name__.rpartition(".")[2]: maker for maker in makers}
    if TASKS[task].env_id == "Reacher-v5":
        return reacher
    return mpe if TASKS[task].local else of_family[TASKS[task].family]


def built_in_path(task: str, quality: str, size: int) -> Path:
    """A built-in file's place in the cache."""
    name = f"{data_name(task, quality)}-{size}-v{maker_of(task).VERSION}.hdf5"
    return cache_dir() / name


def built_in(task: str, quality: str, size: int | None) -> Path:
    """The built-in file, made first where it is not there yet."""
    env = data_name(task, quality)
    if quality not in BUILT_IN_SIZES.get(task, {}):
        names = [data_name(t, q) for t, qualities in BUILT_IN_SIZES.items() for q in qualities]
        hint = nearest(env, names)
        more = " (--dataset d4rl has it)" if is_hosted("d4rl", task, quality) else ""
        raise InputError(f"no built-in data for {env}: {hint}{more}")
    full = BUILT_IN_SIZES[task][quality]
    size = size or full
    if size > full:
        raise InputError(f"--dataset-size {size}: expected at most {full} for {env}")
    path = built_in_path(task, quality, size)
    if not path.exists():
        make(task, quality, size, path)
    return path


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


def make(
    task: str, quality: str, size: int, path: Path | str, num_workers: int | None = None
) -> None:
    """Write `size` transitions of task's built-in data to `path`, behind a progress bar, unless
    the file is there already.

    `quality` is one of those of `names.BUILT_IN_SIZES`; of mazes and bandits none (""). The file
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
    maker, path = maker_of(task) if task in TASKS else mujoco, Path(path)
    if maker is mujoco or (maker in (mpe, smax) and quality != "random"):
        maker.load_policies(task)
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
                    maker.write(file, task, quality, size, bar, num_workers or num_cores())
                add_checksums(partial)
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
