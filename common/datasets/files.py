"""Files of data: the cache folder, made once among all processes, downloaded once."""

import hashlib
import os
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import filelock
import h5py
import numpy as np
from tqdm import tqdm

from common import InputError, expanded, release
from common.envs.tasks import TASKS

D4RL_URL = "https://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
D4RL_MAZE_URL = "https://rail.eecs.berkeley.edu/datasets/offline_rl/maze2d/"


@contextmanager
def made_once(path: Path) -> Iterator[Path | None]:
    """`path.partial`, locked, to make `path` from; None where `path` is there, which another
    process may still be making at first: then waits for it.

    The partial file stays if the body fails, unless it is empty.
    Raises OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    lock = filelock.FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        note = f"waiting for another process that is making {path}"
        print(note, file=sys.stderr, flush=True)
        lock.acquire()
    except NotImplementedError:
        pass  # a file system without locks
    try:
        yield None if path.exists() else partial
    finally:
        if partial.exists() and partial.stat().st_size == 0:
            partial.unlink()
        release(lock)


def add_checksums(path: Path) -> None:
    """Give every array of an HDF5 file the checksum that reading compares."""
    with h5py.File(path, "r+", locking=False) as file:
        for column in file.values():
            if isinstance(column, h5py.Dataset):
                column.attrs["crc32"] = checksum(column)


def checksum(column: h5py.Dataset, rows: int = 65_536) -> int:
    """Of its numbers as they are in the file."""
    found = 0
    for start in range(0, len(column), rows):
        found = zlib.crc32(np.ascontiguousarray(column[start : start + rows]), found)
    return found


def d4rl(task: str, quality: str) -> Path:
    """D4RL's v2 file, of a maze the sparse v1 file, in $D4RL_DATASET_DIR or ~/.d4rl/datasets,
    downloaded first if not there."""
    folder = expanded(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets")
    if TASKS[task].family == "maze":
        url, name = D4RL_MAZE_URL, f"{task}-sparse-v1.hdf5"
    else:
        url, name = D4RL_URL, f"{robot(task)}_{quality.replace('-', '_')}-v2.hdf5"
    path = folder / name
    if not path.exists():
        download(url + name, path)
    return path


def robot(task: str) -> str:
    """What D4RL and Minari call a MuJoCo task, whatever its agents see."""
    return TASKS[task].env_id.partition("-")[0].lower()


def download(url: str, path: Path) -> None:
    """`url` -> `path` through `path.partial`, which the next call continues if this one is cut."""
    try:
        with made_once(path) as partial:
            if partial is not None:
                try:
                    _fetch(url, path, partial)
                except urllib.error.URLError as error:
                    if not url.startswith("https:"):
                        raise
                    print(f"{url}: {error}; trying http", file=sys.stderr)
                    _fetch(url.replace("https", "http", 1), path, partial)
    except (OSError, HTTPException) as error:
        raise InputError(
            f"cannot download {url}: {error}; or put the file by hand at {path}"
        ) from error


def _fetch(url: str, path: Path, partial: Path) -> None:
    """Continue `partial`, and move it to `path` when it is whole."""
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing after `start`: what is there cannot be trusted
            raise
        start = 0
        response = urllib.request.urlopen(url, timeout=60)
    with response:
        resumed = response.status == 206
        done = start if resumed else 0
        length = response.headers["Content-Length"]
        total = None if length is None else done + int(length)
        print(f"{'resuming' if resumed else 'downloading'} {url}", file=sys.stderr)
        bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, unit_divisor=1024)
        with bar, open(partial, "ab" if resumed else "wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))
    if total is not None and done != total:
        raise ConnectionError(f"cut off after {done} of {total} bytes, run again to continue")
    try:
        h5py.File(partial, "r", locking=False).close()
    except OSError as error:
        partial.unlink()
        raise InputError(f"{url} sent no HDF5 file; put it by hand at {path}") from error
    with open(partial, "rb") as file:
        print(f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}  {path}", file=sys.stderr)
    partial.rename(path)
