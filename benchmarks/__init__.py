"""Measurements behind the documents' tables and figures."""

import contextlib
import csv
import io
import json
import os
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

from common import InputError
from common.checkpoints import write_beside


class Worker:
    """A process of its own that answers a line with a number; `name` for errors, `options` those of
    Popen."""

    def __init__(self, name: str, command: list, **options):
        self.name, self.errors = name, tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, text=True, **pipes, **options)

    def ask(self, question: str) -> float:
        """Its answer.

        Raises:
            InputError: it has ended.
        """
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:
            status = self.process.wait()
            self.errors.seek(0)
            last = (self.errors.read().splitlines() or [""])[-1]
            raise InputError(f"{self.name} ended with status {status}: {last}")
        return float(answer)


def write_csv(path: str, rows: list[dict]) -> None:
    """Raw numbers: a header of all rows' keys, then a line per row."""
    text = io.StringIO(newline="")
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def write_json(path: str, record: dict) -> None:
    """Raw numbers with what they were measured on, whose arguments are kept but for this file."""
    args = {name: value for name, value in record["args"].items() if name != "json"}
    write(path, json.dumps(record | {"args": args}, indent=1, default=str) + "\n")


def check_outputs(*paths: str | None, figure: str | None = None, flag: str = "--figure") -> None:
    """Find out before the work that what it makes can be kept, and a figure drawn.

    Raises:
        InputError: it cannot, two are one file, or the figure is no PNG file.
    """
    named = [Path(path).resolve() for path in filter(None, (*paths, figure))]
    twice = [path for path in named if named.count(path) > 1 and not path.is_char_device()]
    if twice:
        raise InputError(f"two outputs go to {twice[0]}: name two files")
    if figure and not figure.endswith(".png"):
        raise InputError(f"{flag} {figure} is not a name of a PNG file")
    if figure and find_spec("matplotlib") is None:
        raise InputError(f"{flag} needs matplotlib: pip install -r requirements-dev.txt")
    for path in map(Path, filter(None, (*paths, figure))):
        is_new = not path.exists()
        write(str(path), b"", "a")
        if is_new:  # nothing is left of a measurement that fails
            path.unlink()


def write_figure(path: str | Path, figure, dpi: int) -> None:
    """A figure of matplotlib's as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi)
    write(path, content.getvalue())


def write(path: str | Path, content: str | bytes, mode: str = "w") -> None:
    """Write a file as a whole or not at all, or with mode "a" and nothing find out that it can be.

    Raises:
        InputError: it cannot, or would lie among a run's files.
    """
    content = content.encode() if isinstance(content, str) else content
    if (Path(path).parent / "args.json").exists():
        raise InputError(f"{path} would lie in a run's folder: name another file")
    target = Path(path).resolve()
    is_special = target.exists() and not target.is_file()
    try:
        if mode == "w" and not is_special and os.access(target.parent, os.W_OK):
            write_beside(target, content)
        else:  # a pipe or a terminal, or a file in a folder that takes no new ones
            with open(path, f"{mode}b") as file:
                file.write(content)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
