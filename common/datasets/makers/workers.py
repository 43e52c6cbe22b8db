"""Processes that make pieces of data side by side."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import h5py
import numpy as np

from common import InputError


class Workers:
    """Processes that roll pieces out, each driven by a thread.

    They are plain subprocesses because multiprocessing would import the script that the user runs,
    and torch with it, in each of them. Ctrl-C does not reach them: leaving the `with` block ends
    them.
    """

    def __init__(self, num_workers: int):
        root = Path(__file__).parents[3]
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-c", f"from {__name__} import work; work()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.processes: list[subprocess.Popen] = []
        self.idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        self.threads = ThreadPoolExecutor(num_workers)
        for _ in range(num_workers):
            process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
            self.processes.append(process)
            self.idle.put(process)

    def submit(self, chunk: Any) -> Future:
        """`chunk.roll()` in one of the processes; the future raises InputError if that dies."""
        return self.threads.submit(self._roll, chunk)

    def _roll(self, chunk: Any) -> dict[str, np.ndarray]:
        process = self.idle.get()
        try:
            pickle.dump(chunk, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise InputError(
                f"a process that makes data died (status {process.poll()}): out of memory?"
            ) from error
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


def write_pieces(file: h5py.File, pieces: list, size: int, bar: Any, num_workers: int) -> None:
    """The rows of `pieces`, in their order and `size` in all, into an empty file."""
    done = 0
    with Workers(min(num_workers, len(pieces))) as workers:
        futures = [workers.submit(piece) for piece in pieces]
        while futures:
            arrays = futures.pop(0).result()  # and free the rows once they are written
            n = len(arrays["rewards"])
            for key, values in arrays.items():
                if key not in file:
                    file.create_dataset(key, (size, *values.shape[1:]), values.dtype)
                file[key][done : done + n] = values
            done += n
            bar.update(n)


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
