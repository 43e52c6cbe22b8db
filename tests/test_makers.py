"""What a maker makes has a VERSION, which names the files: who changes the one raises the other."""

import subprocess
import sys

import h5py
import numpy as np
import pytest

from common.datasets import makers
from tests.helpers import ROOT

# The sum of the first rows, each number times one of its own. Few: processors round differently,
# and a run amplifies it. After 20 rows of halfcheetah the third digit differs, after 5 none here.
FIRST_ROWS = {
    ("halfcheetah", "medium"): (1, -11.4732),
    ("hopper", "medium-replay"): (1, 16.144),
    ("walker2d", "random"): (1, 63.7161),
    ("maze2d-umaze", ""): (1, 1.975),
    ("bandit-3", ""): (1, 598.58),
    ("predator-prey", "random"): (1, 8.43977),
    ("wind", "random"): (1, 12.7202),
    ("navigation", "random"): (1, 18.1139),
    ("simple-spread", "medium"): (1, -0.279434),
    ("simple-tag", "random"): (1, 15.1713),
    ("simple-world", "expert"): (1, 9.80857),
    ("halfcheetah-local", "medium"): (1, 19.2177),
    ("ant", "random"): (1, -16.8308),
    ("ant", "medium"): (1, -1.18645),
    ("ant", "full-replay"): (1, 16.8059),
    ("ant", "expert"): (1, -0.117145),
    ("coordination-game", "neutral"): (1, 604.007),
    ("reacher-leader", "expert-mix"): (1, 8.73628),
}


def sum_of_first_rows(path, num_rows=5) -> float:
    with h5py.File(path) as file:
        total = 0.0
        for key in ("observations", "actions", "rewards", "next_observations"):
            values = file[key][:num_rows].astype(np.float64).ravel()
            total += values @ np.cos(np.arange(len(values)) + len(key))
        return total + float(file["timeouts"][...].sum() + 2 * file["terminals"][...].sum())


@pytest.mark.parametrize(("task", "quality"), FIRST_ROWS)
def test_what_a_version_makes_stays_as_it_is(tmp_path, task, quality):
    makers.make(task, quality, 300, tmp_path / "data.hdf5", num_workers=1)
    version, expected = FIRST_ROWS[task, quality]
    found = sum_of_first_rows(tmp_path / "data.hdf5")
    same = found == pytest.approx(expected, abs=1e-3)
    is_version = makers.maker_of(task).VERSION == version
    assert same and is_version, (
        f"{makers.maker_of(task).__name__} makes other data: {found!r}; raise its VERSION, so that "
        "nobody trains on files of before under the same name, and write both here"
    )


def test_the_sum_sees_another_seed_or_reward(tmp_path):
    makers.make("navigation", "random", 300, tmp_path / "data.hdf5")
    before = sum_of_first_rows(tmp_path / "data.hdf5")
    for key, row in (("rewards", 3), ("observations", (4, 0)), ("timeouts", 250)):
        with h5py.File(tmp_path / "data.hdf5", "r+") as file:
            was = file[key][row]
            file[key][row] = not was if key == "timeouts" else was + 0.1
        after = sum_of_first_rows(tmp_path / "data.hdf5")
        assert after != pytest.approx(before, abs=1e-3), key
        with h5py.File(tmp_path / "data.hdf5", "r+") as file:
            file[key][row] = was


def test_a_files_name_says_its_version(tmp_path, monkeypatch):
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path))
    for task, quality, name in (
        ("hopper", "medium", "hopper-medium-5-v1.hdf5"),
        ("maze2d-large", "", "maze2d-large-5-v1.hdf5"),
    ):
        assert makers.built_in_path(task, quality, 5) == tmp_path / name
        monkeypatch.setattr(makers.maker_of(task), "VERSION", 2)
        assert makers.built_in_path(task, quality, 5).name == name.replace("v1", "v2")


@pytest.mark.parametrize(
    ("module", "new"),
    [("common.envs", "python -m tools.render"), ("common.datasets", "python -m tools.check_data")],
)
def test_commands_of_before_say_the_new_ones(module, new):
    command = [sys.executable, "-m", module, "render", "--env", "navigation"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().endswith(new) and not done.stdout
