"""What the scripts share: environments, datasets, replay, the OTC sampler and run folders."""

import contextlib
import difflib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import filelock
import platformdirs

ROOT = Path(__file__).resolve().parent.parent


class InputError(ValueError):
    """What the user got wrong, in one or two lines; the scripts print it and exit with status 2."""


class Stopped(SystemExit):
    """A run's own end after a signal, with status 128 + signal, wherever it was heard."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The valid names, those nearest to `name` first, for the end of an error message."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}"


def flag(name: str) -> str:
    """The flag of an argument."""
    return "--" + name.replace("_", "-")


def code_version() -> str:
    """The commit of the code, with -dirty where files were changed since; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def release(lock: filelock.BaseFileLock) -> None:
    """Give a lock back, and take its file away."""
    if lock.is_locked:
        with contextlib.suppress(OSError):  # Windows keeps what is open
            os.unlink(lock.lock_file)
        lock.release()


def cache_dir() -> Path:
    """Where built-in data is kept: $OTC_CACHE_DIR, or the system's cache, ~/.cache/otc on Linux."""
    return expanded(os.environ.get("OTC_CACHE_DIR") or platformdirs.user_cache_dir("otc", False))


def expanded(path: str) -> Path:
    """A path that may begin with ~. Raises InputError where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: {error}") from error
