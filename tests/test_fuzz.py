"""The fuzz of `tests.fuzz`: a minute here, its long form behind `slow`. In processes of their own,
since a damaged file may end one."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import SCRIPTS, assert_same, for_learner, only, scalars, state_of, tiny
from tests.tiny_task import ENV

ROOT = Path(__file__).parent.parent
QUICK = {"files": 150, "checkpoints": 60, "flags": 24}
LONG = {"files": 1000, "checkpoints": 300, "flags": 1000}


def fuzz(kind, count):
    command = [sys.executable, "-m", "tests.fuzz", kind, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.splitlines() or ["none"])[-1]
    assert done.returncode == 0, f"{kind}, input {last}: {done.returncode}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("kind", QUICK)
def test_odd_inputs_are_taken_or_refused_in_words(kind):
    fuzz(kind, QUICK[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", LONG)
def test_many_odd_inputs_are_taken_or_refused_in_words(kind):
    fuzz(kind, LONG[kind])


def start(script, argv):
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, for_learner(script, argv))]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **quiet)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_runs_killed_at_random_moments_end_bit_identical(tmp_path, data, script):
    """Seven each, killed up to four times at any moment from the process's start on."""
    argv = ["--env", ENV, "--dataset", data, *tiny(script), "--checkpoint-every", 7]
    begun = time.perf_counter()
    assert start(script, [*argv, "--run-dir", tmp_path / "whole"]).wait() == 0
    lasts, whole = time.perf_counter() - begun, only(tmp_path / "whole")
    random = np.random.default_rng(0)
    for number in range(7):
        place, kills = tmp_path / str(number), 0
        while True:
            runs = [f for f in place.glob("*") if (f / "checkpoint.pt").exists()]
            going_on = ["--resume", runs[0]] if runs else [*argv, "--run-dir", place]
            process = start(script, going_on)
            if kills < 4:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(random.uniform(0, 1.1) * lasts)
                process.kill()
                kills += 1
            status = process.wait()
            if status == 0:
                break
            assert status == -9, status
        (run,) = [f for f in place.glob("*") if (f / "checkpoint.pt").exists()]
        assert (run / "returns.csv").read_bytes() == (whole / "returns.csv").read_bytes()
        assert_same(state_of(run / "checkpoint.pt"), state_of(whole / "checkpoint.pt"))
        found, expected = (
            {tag: values for tag, values in scalars(x).items() if not tag.startswith("time/")}
            for x in (run, whole)
        )
        assert_same(found, expected)
