"""Damaged and odd inputs, seeded: each is taken or refused in words, and nothing else.

    python -m tests.fuzz files 1000
    python -m tests.fuzz checkpoints 300
    python -m tests.fuzz flags 1000 [FIRST]

Prints the number of an input before trying it, and ends with an error at one that fails.
"""

import contextlib
import dataclasses
import importlib
import io
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from common import InputError, checkpoints, cli, datasets
from tests.helpers import SCRIPTS, for_learner, tiny
from tests.tiny_task import ENV, write_data, write_discrete_data


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """One of: bits flipped, cut short, a block of zeros or of noise, a block moved."""
    spoilt, kind = bytearray(content), random.integers(5)
    start = int(random.integers(len(spoilt)))
    stop = min(len(spoilt), start + int(random.integers(1, 2000)))
    if kind == 0:
        for at in random.integers(0, len(spoilt), random.integers(1, 20)).tolist():
            spoilt[at] ^= 1 << int(random.integers(8))
    elif kind == 1:
        del spoilt[start:]
    elif kind == 2:
        spoilt[start:stop] = bytes(stop - start)
    elif kind == 3:
        spoilt[start:stop] = random.bytes(stop - start)
    else:
        del spoilt[start:stop]
    return bytes(spoilt)


def files(folder: Path, numbers: range) -> None:
    content = write_data(folder / "data.hdf5", episodes=10).read_bytes()
    for number in numbers:
        print(number, flush=True)
        path = folder / "spoilt.hdf5"
        path.write_bytes(damaged(content, np.random.default_rng(number)))
        with contextlib.suppress(InputError):
            team = datasets.load(ENV, str(path))
            assert np.isfinite(team.obs).all() and np.isfinite(team.rewards).all()


def launched(argv: list, script: str) -> int | None:
    """The exit status of a run in this process; signals' handlers stay this process's."""
    module = importlib.import_module(script)
    sys.argv = [f"{script}.py", *for_learner(script, argv)]
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        try:
            cli.cli(module.main, module.Args)
            return 0
        except SystemExit as end:
            assert "Traceback" not in said.getvalue()
            return end.code
        finally:
            for n, handler in handlers.items():
                signal.signal(n, handler)


def run_of(folder: Path, script: str = "otc_td3bc") -> tuple[Path, list]:
    data = write_data(folder / "point.hdf5", episodes=30)
    write_discrete_data(folder / "steps.hdf5", episodes=30)
    argv = ["--env", ENV, "--dataset", str(data), *tiny(script), "--env-workers", "0"]
    return folder / "runs", [*argv, "--run-dir", str(folder / "runs")]


def checkpoint_files(folder: Path, numbers: range) -> None:
    """A damaged one equals the whole or is refused; a run that is resumed from every tenth ends
    with the numbers of before, or is refused."""
    runs, argv = run_of(folder)
    assert launched(argv, "otc_td3bc") == 0
    (run,) = runs.iterdir()
    path = run / "checkpoint.pt"
    whole, true = path.read_bytes(), torch.load(path, weights_only=True)
    for number in numbers:
        print(number, flush=True)
        path.write_bytes(damaged(whole, np.random.default_rng(number)))
        if number % 10 == 0:
            returns = (run / "returns.csv").read_bytes()
            assert launched(["--resume", str(run)], "otc_td3bc") in (0, 2)
            assert (run / "returns.csv").read_bytes() == returns
            path.write_bytes(damaged(whole, np.random.default_rng(number)))
        try:
            state = checkpoints.read_checkpoint(str(run), "checkpoint.pt", "otc_td3bc")
        except InputError:
            continue
        for name, value in true["agent"].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(state["agent"][name], value), name


VALUES = ["0", "-1", "1", "2", "3", "0.5", "1e-300", "1e18", "1e300", "nan", "inf", "-inf", ""]
VALUES += ["abc", "None", "9" * 30, "1000000000", "True", "ü", "../..", "~nobody/x"]
# What a number as large as these would only make last for hours, or load the machine
LARGE = ("1e18", "1000000000")
LASTING = ("_updates", "_every", "deployment", "episodes", "threads", "env_workers", "elites")
LASTING += ("rollout", "iterations", "rounds", "seeds", "clone")


def flags(folder: Path, numbers: range) -> None:
    names = sorted(SCRIPTS)
    for number in numbers:
        random = np.random.default_rng(number)
        script = names[number % len(names)]
        fields = dataclasses.fields(importlib.import_module(script).Args)
        while True:
            field = fields[random.integers(len(fields))].name
            value = VALUES[random.integers(len(VALUES))]
            lasts = value in LARGE and any(name in field for name in LASTING)
            if field not in ("device", "track", "run_dir", "cuda_graph") and not lasts:
                break
        print(number, script, field, repr(value), flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as where:
            _, argv = run_of(Path(where), script)
            status = launched([*argv, f"--{field.replace('_', '-')}", value], script)
            assert status in (0, 2), status


if __name__ == "__main__":
    kind, (stop, *first) = sys.argv[1], map(int, sys.argv[2:])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        fuzz = {"files": files, "checkpoints": checkpoint_files, "flags": flags}[kind]
        fuzz(Path(place), range(*first, stop))
