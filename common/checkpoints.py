"""A run's files that others read: its arguments, its checkpoints."""

import csv
import json
import os
import zipfile
from pathlib import Path

import torch

from common import InputError, flag

FORMAT = 5  # of checkpoints; 1 and before had none


def write_beside(path: Path, content: bytes) -> None:
    """Write `path` as a whole or not at all: beside it first, then renamed."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_record(folder: str | Path) -> dict:
    """What args.json of the run in `folder` holds: args, script, seed and the folders of its seeds.

    Raises:
        InputError: no run, or not a readable one.
    """
    path = Path(folder) / "args.json"
    try:
        record = json.loads(path.read_text())
        record["args"]["seed"], record["script"]
        return record
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is not a run folder: {path} is missing or unreadable") from None


def read_returns(folder: str | Path, *columns: str) -> list[dict[str, str]]:
    """The rows of returns.csv of the run in `folder`, those that were written whole; none where the
    run has not got so far.

    Raises:
        InputError: unreadable, or without one of these columns.
    """
    path = Path(folder) / "returns.csv"
    try:
        lines = path.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    rows = csv.DictReader(lines[: -1 if lines and lines[-1][-1] != "\n" else None])
    for missing in (name for name in columns if name not in (rows.fieldnames or columns)):
        raise InputError(f"{path} has no column {missing}")
    return [row for row in rows if None not in (*row, *row.values())]


def read_args(folder: str | Path) -> dict:
    """The arguments of the run in `folder`; raises as `read_record`."""
    return read_record(folder)["args"]


def args_of(folder: str, args_type: type):
    """The arguments of the run in `folder`; raises InputError where they are another version's."""
    try:
        return args_type(**read_args(folder))
    except TypeError:
        raise InputError(f"{folder} is a run of another version of its script") from None


def seeds_folders(folder: str | Path) -> list[Path]:
    """The folders of all the seeds of the run in `folder`, the first seed's first; InputError: no
    run, or several seeds' whose folders do not have their names any more."""
    folder, names = Path(folder).resolve(), read_record(folder).get("folders", [])
    if not isinstance(names, list) or len(names) < 2:
        return [folder]  # by whatever name
    if folder.name not in names:
        raise InputError(
            f"{folder} was copied or renamed; the seeds of a run find each other by their names: "
            f"{names[0]} and {len(names) - 1} more"
        )
    return [folder.parent / name for name in names]


def read_checkpoint(folder: str, name: str, script: str) -> dict:
    """A checkpoint's content; `folder` may be any of the folders of a run of several seeds.

    Raises:
        InputError: missing, damaged, foreign, of another version, or of another script than
            `script`.
    """
    path = seeds_folders(folder)[0] / name
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is missing, the first of the folders of {folder}'s run")
    if not path.exists():
        raise InputError(f"{path} does not exist: the run was stopped before it was first written")
    try:
        with zipfile.ZipFile(path) as parts:  # torch checks no checksums
            damaged = parts.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} in it is damaged")
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
        if not {"agent", "script"} <= set(checkpoint):
            raise ValueError("keys are missing")
    except Exception as error:  # zipfile and torch.load raise many kinds
        first_line = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a readable checkpoint: {first_line}") from None
    if checkpoint["script"] != script:
        raise InputError(f"{folder} is a run of {checkpoint['script']}, not {script}")
    if checkpoint.get("format") != FORMAT:
        code = read_record(folder).get("code", "eca3235")
        raise InputError(f"{path} is of another version; continue it with commit {code}")
    return checkpoint


def stamp_of(path: Path) -> tuple[int, int] | None:
    """Of a file as it was last written; None: it cannot be read."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def read_resumed(args, script: str) -> dict:
    """The checkpoint of --resume.

    Raises:
        InputError: as `read_checkpoint`, or args.json was changed since it was written.
    """
    stamp = stamp_of(seeds_folders(args.resume)[0] / "checkpoint.pt")
    checkpoint = read_checkpoint(args.resume, "checkpoint.pt", script)
    check_same(checkpoint["args"], args, set(vars(args)) - {"resume", "dataset"}, "--resume")
    return checkpoint | {"stamp": stamp}


def read_offline_checkpoint(args, script: str) -> dict:
    """The offline policy of --offline-checkpoint, trained on the same data for the same seeds.

    Raises:
        InputError: as `read_checkpoint`, or trained with other arguments.
    """
    its = read_args(args.offline_checkpoint).get("offline_checkpoint")
    if its is not None:
        raise InputError(
            f"--offline-checkpoint {args.offline_checkpoint}: its policy is that of {its}, which "
            "holds it"
        )
    checkpoint = read_checkpoint(args.offline_checkpoint, "offline.pt", script)
    check_same(checkpoint["args"], args, args.SAME_POLICY, "--offline-checkpoint")
    return checkpoint


def check_same(was: dict, args, names, what: str) -> None:
    """Raises InputError where an argument differs from the checkpoint's."""
    for name in sorted(names):
        before, now = was.get(name), getattr(args, name, None)
        if before != now:
            asked = f"{flag(name)} {before}, not {now}"
            raise InputError(f"{what}: the checkpoint was trained with {asked}")


def check_unchanged(checkpoint: dict, name: str, now: str, what: str) -> None:
    """Raises InputError unless the `data`, `TeamDataset.fingerprint`, or the `task`, named agents
    in their order and the time limit, is the checkpoint's."""
    was = checkpoint.get(name) or ""
    if was != now:
        raise InputError(f"{what}: the {name} is not what it was: {now}, {was} then")
