"""The built-in datasets: layout, episodes, any number of processes, nothing left half-made."""

import csv
import os
import runpy
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import h5py
import numpy as np
import pytest

from behaviours import report, select, train, train_battles
from common import InputError
from common.datasets import makers
from common.datasets.makers import mujoco, particle
from common.envs.mujoco import make_single
from tests.helpers import is_running

ROOT = Path(__file__).parents[1]
SIZES = {"hopper": (11, 3), "halfcheetah": (17, 6)}


def fake_policies(task: str, num_snapshots: int = 20) -> dict[str, np.ndarray]:
    obs_dim, action_dim = SIZES[task]
    rng = np.random.default_rng(0)
    shapes = {
        "w0": (obs_dim, 64),
        "b0": (64,),
        "w1": (64, 64),
        "b1": (64,),
        "w_mean": (64, action_dim),
        "b_mean": (action_dim,),
        "w_log_std": (64, action_dim),
        "b_log_std": (action_dim,),
    }
    arrays = {k: rng.normal(0, 0.1, (num_snapshots, *s)) for k, s in shapes.items()}
    # The i-th snapshot's first action is near tanh(i / 4 - 2), so that rows tell who acted
    arrays["b_mean"][:] = np.linspace(-2, 2, num_snapshots)[:, None]
    arrays["b_log_std"][:] = -4
    arrays = {k: v.astype(np.float32) for k, v in arrays.items()}
    steps = np.arange(num_snapshots) * 2500
    return {
        **arrays,
        "steps": steps,
        "medium": num_snapshots - 1,
        "replay": np.arange(num_snapshots),
    }


@pytest.fixture
def policies(tmp_path, monkeypatch):
    for task in SIZES:
        np.savez(tmp_path / f"{task}.npz", **fake_policies(task))
    monkeypatch.setattr(mujoco, "POLICY_DIR", tmp_path)


def read(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        keys = []
        file.visititems(lambda k, v: keys.append(k) if isinstance(v, h5py.Dataset) else None)
        return {k: file[k][()] for k in keys}


def test_layout_and_episodes(policies, tmp_path):
    make_path = tmp_path / "data.hdf5"
    makers.make("hopper", "random", 3000, make_path, num_workers=1)
    data = read(make_path)
    for key, (shape, dtype) in mujoco.columns("hopper").items():
        assert data[key].shape == (3000, *shape) and data[key].dtype == dtype, key
    assert np.abs(data["actions"]).max() <= 1
    terminals, timeouts = data["terminals"], data["timeouts"]
    ends = terminals | timeouts
    assert ends[-1] and not (terminals & timeouts).any()
    assert ends.sum() > 10 and timeouts.sum() <= 1
    # Inside an episode a row's next observation is the next row's, across an end it is not
    same = (data["next_observations"][:-1] == data["observations"][1:]).all(1)
    np.testing.assert_array_equal(same, ~ends[:-1])

    # The simulator agrees: set to the stored state it gives back the stored transition
    env = make_single("hopper").unwrapped
    env.reset(seed=0)
    for i in range(20):
        env.set_state(data["infos/qpos"][i], data["infos/qvel"][i])
        np.testing.assert_allclose(env._get_obs(), data["observations"][i], atol=1e-6)
        obs, reward, terminal, _, _ = env.step(data["actions"][i])
        np.testing.assert_allclose(obs, data["next_observations"][i], atol=1e-4)
        np.testing.assert_allclose(reward, data["rewards"][i], atol=1e-4)
        assert terminal == data["terminals"][i]

    returns = report.whole_episode_returns(make_path, 1000)
    assert len(returns) == terminals.sum()
    np.testing.assert_allclose(returns[0], data["rewards"][: np.argmax(ends) + 1].sum(), rtol=1e-5)


def test_a_report_writes_what_it_is_asked_to(policies, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path / "cache"))
    sizes = dict.fromkeys(("random", "medium-replay", "medium"), 3000)
    monkeypatch.setattr(report, "BUILT_IN_SIZES", {"hopper": sizes})
    path = makers.built_in_path("hopper", "random", 3000)
    makers.make("hopper", "random", 3000, path, num_workers=1)
    before = {each: each.read_bytes() for each in ROOT.glob("docs/results/datasets/*.csv")}
    report.main(report.Args())
    assert "| hopper-random | built-in |" in capsys.readouterr().out
    assert before == {each: each.read_bytes() for each in before}
    args = report.Args(str(tmp_path / "one.csv"), figure=str(tmp_path / "one.png"))
    report.main(args)
    with open(args.csv) as file:
        ours, theirs = csv.DictReader(file)
    returns = report.whole_episode_returns(path, 1000)
    assert ours["source"] == "built-in" and int(ours["episodes"]) == len(returns)
    assert float(ours["max"]) == pytest.approx(returns.max(), abs=0.05)
    assert theirs["source"] == "D4RL v2" and theirs["mean"] == "18.4"
    assert Path(args.figure).stat().st_size > 0 and not list(tmp_path.glob("team*"))


def test_time_limit_and_cut(policies, tmp_path):
    makers.make("halfcheetah", "medium", 2500, tmp_path / "data.hdf5", num_workers=1)
    data = read(tmp_path / "data.hdf5")
    assert not data["terminals"].any()
    assert np.flatnonzero(data["timeouts"]).tolist() == [999, 1999, 2499]
    # The cut episode is not counted
    assert len(report.whole_episode_returns(tmp_path / "data.hdf5", 1000)) == 2


def test_any_number_of_workers_makes_the_same_file(policies, tmp_path, monkeypatch):
    monkeypatch.setattr(mujoco, "CHUNK_ROWS", 300)
    for num_workers in (1, 3):
        makers.make("hopper", "medium", 2000, tmp_path / f"{num_workers}.hdf5", num_workers)
    one, three = read(tmp_path / "1.hdf5"), read(tmp_path / "3.hdf5")
    assert one.keys() == three.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], three[key], err_msg=key)
    # Chunks end with an episode, so only the file's end cuts one; and they differ
    assert one["timeouts"].sum() <= 1
    assert len(np.unique(one["observations"], axis=0)) == 2000


def test_chunks_are_whole_episodes(policies):
    chunk = mujoco.plan("hopper", "random", 25_000)[0][1][0]
    chunk.rows = 100
    rows = chunk.roll()
    assert 100 <= len(rows["rewards"]) < 100 + 1000 and rows["terminals"][-1]
    chunk.limit = 100
    assert len(chunk.roll()["rewards"]) == 100


@pytest.mark.parametrize("size", [45, 2011, 202_000, 402_000])
def test_replay_plan_spans_its_snapshots(policies, size):
    parts = mujoco.plan("halfcheetah", "medium-replay", size)
    rows = np.array([rows for rows, _ in parts])
    assert len(rows) == 20 and rows.sum() == size
    assert rows.max() - rows.min() <= (1000 if size > 80_000 else 1)
    for n, chunks in parts:
        assert sum(chunk.rows for chunk in chunks) == n
    if size > 80_000:
        assert (rows % 1000 == 0).all()


def test_small_replay_file(policies, tmp_path):
    makers.make("halfcheetah", "medium-replay", 60, tmp_path / "data.hdf5", num_workers=2)
    data = read(tmp_path / "data.hdf5")
    np.testing.assert_array_equal(np.flatnonzero(data["timeouts"]), np.arange(2, 60, 3))
    np.testing.assert_array_equal(data["metadata/policy_rows"], np.full(20, 3))
    np.testing.assert_array_equal(data["metadata/policy_steps"], np.arange(20) * 2500)
    first = data["actions"][::3].mean(1)  # every snapshot acts, in order
    assert np.corrcoef(first, np.arange(20))[0, 1] > 0.9


def test_policy_acts_as_stable_baselines3(policies):
    torch = pytest.importorskip("torch")
    policy = mujoco.snapshot(mujoco.load_policies("hopper"), 3)
    rng = np.random.default_rng(0)
    obs, noise = rng.normal(size=11).astype(np.float32), rng.normal(size=3).astype(np.float32)
    t = {k: torch.from_numpy(v) for k, v in policy.items()}
    h = torch.relu(torch.from_numpy(obs) @ t["w0"] + t["b0"])
    h = torch.relu(h @ t["w1"] + t["b1"])
    log_std = torch.clamp(h @ t["w_log_std"] + t["b_log_std"], -20, 2)
    expected = torch.tanh(h @ t["w_mean"] + t["b_mean"] + log_std.exp() * torch.from_numpy(noise))
    action = mujoco.sample_action(policy, obs, noise)
    assert action.dtype == np.float32
    np.testing.assert_allclose(action, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "args", [("hoper", "medium", 10), ("hopper", "mediun", 10), ("hopper", "medium", 0)]
)
def test_bad_names_and_sizes(policies, tmp_path, args):
    with pytest.raises(InputError):
        makers.make(*args, tmp_path / "new" / "data.hdf5")
    assert not (tmp_path / "new").exists()


def test_failure_leaves_nothing(policies, tmp_path, monkeypatch):
    class Failing(mujoco.Workers):
        def submit(self, chunk):
            if self.processes[0].poll() is None:
                self.processes[0].kill()
            return super().submit(chunk)

    monkeypatch.setattr(mujoco, "Workers", Failing)
    with pytest.raises(InputError, match="a process that makes data died"):
        makers.make("hopper", "random", 1000, tmp_path / "out" / "data.hdf5", num_workers=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    script = (
        "import resource, signal, sys; from common import InputError\n"
        "from common.datasets import makers\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try:\n    makers.make('navigation', 'random', 100_000, sys.argv[1])\n"
        "except InputError as error:\n    print(error)\n    sys.exit(2)\n"
    )
    path = tmp_path / "data.hdf5"
    command = [sys.executable, "-c", script, str(path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2 and f"cannot write {path}" in process.stdout, process.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("last", [False, True])
def test_an_interrupt_inside_a_callback_is_not_lost(tmp_path, monkeypatch, last):
    """h5py forgets its objects in weak references' callbacks, which no exception leaves."""

    def write(file, task, quality, size, bar, num_workers):
        bar.update(size // 2)
        thing = set()
        forgotten = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing
        assert forgotten() is None
        if not last:
            bar.update(size // 2)
            pytest.fail("went on after Ctrl-C")

    monkeypatch.setattr(particle, "write", write)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            makers.make("navigation", "random", 1000, tmp_path / "data.hdf5")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)
    assert list(tmp_path.iterdir()) == []


def start_make(path: Path, size: int) -> subprocess.Popen:
    """A process, leading its own group, that makes halfcheetah-medium from fake policies."""
    script = (
        "import signal, sys; from pathlib import Path; from common.datasets import makers\n"
        # Whoever started the tests may have had SIGINT ignored, as shells do in the background.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "makers.mujoco.POLICY_DIR = Path(sys.argv[1]).parent\n"
        "makers.make('halfcheetah', 'medium', int(sys.argv[2]), sys.argv[1], 2)"
    )
    command = [sys.executable, "-c", script, str(path), str(size)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children]


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_interrupted(policies, tmp_path, sent):
    path = tmp_path / "data.hdf5"
    process = start_make(path, 1_000_000)
    wait_until(lambda: len(descendants(process.pid)) == 2)
    time.sleep(1)
    workers = descendants(process.pid)
    os.killpg(process.pid, sent)  # as a terminal does
    process.communicate(timeout=120)
    assert not path.exists()
    wait_until(lambda: not any(map(is_running, workers)))
    if sent == signal.SIGINT:
        assert not Path(f"{path}.partial").exists()
    else:  # what was left behind is no obstacle
        makers.make("halfcheetah", "medium", 100, path, 1)
        assert len(read(path)["rewards"]) == 100 and not Path(f"{path}.partial").exists()


def test_two_at_once_make_it_once(policies, tmp_path):
    path = tmp_path / "data.hdf5"
    both = [start_make(path, 20_000) for _ in range(2)]
    errors = b"".join(p.communicate(timeout=60)[1] for p in both)
    assert [p.returncode for p in both] == [0, 0] and errors.count(b"waiting for another") == 1
    assert len(read(path)["rewards"]) == 20_000 and not Path(f"{path}.partial").exists()


def test_select(tmp_path, monkeypatch):
    """Returns are known: medium is the earliest near the target, replay is evenly spaced."""
    fakes = fake_policies("hopper", 41)
    for i in range(41):
        np.savez(tmp_path / f"{2500 * i:07d}.npz", **mujoco.snapshot(fakes, i))
    calls = []

    def returns(task, policy, episodes, seed):
        calls.append(seed)
        return np.full(episodes, seed[0] / 2500 * 50.0)  # 1400 at the 28th

    monkeypatch.setattr(select, "episode_returns", returns)
    args = select.Args("hopper", tmp_path, episodes=2, close_episodes=4, out=tmp_path / "out.npz")
    select.main(args)
    with np.load(args.out) as chosen:
        assert chosen["steps"][chosen["medium"]] == 28 * 2500
        assert chosen["steps"][0] == 0 and len(chosen["replay"]) == 25
        gaps = np.diff(chosen["steps"])
        assert gaps.min() >= 2500 and gaps.max() <= 5000
        index = chosen["steps"] // 2500
        np.testing.assert_array_equal(chosen["w0"], fakes["w0"][index])
    calls.clear()
    select.main(args)  # again: everything is in returns.csv
    assert calls == []


def test_select_of_ant(tmp_path, monkeypatch):
    """Expert is the best, here before the end, medium in the middle between it and standing still,
    replay all of it."""
    fakes = fake_policies("hopper", 41)
    for i in range(41):
        np.savez(tmp_path / f"{2500 * i:07d}.npz", **mujoco.snapshot(fakes, i))

    def returns(task, policy, episodes, seed):
        step = seed[0] / 2500
        return np.full(episodes, 100 * (step if step <= 37 else 30))

    monkeypatch.setattr(select, "episode_returns", returns)
    args = select.Args("ant", tmp_path, episodes=1, close_episodes=2, out=tmp_path / "out.npz")
    select.main(args)
    with np.load(args.out) as chosen:
        policies = dict(chosen)
    steps = {
        quality: (policies["steps"][mujoco.acting(policies, quality)] // 2500).tolist()
        for quality in ("random", "medium", "expert", "full-replay")
    }
    assert steps["random"] == [0] and steps["expert"] == [37]
    assert steps["medium"] == [23]  # 2,350 is the middle of 1,001 and 3,700
    assert len(steps["full-replay"]) == 25 and steps["full-replay"][-1] == 40
    np.testing.assert_array_equal(policies["w0"], fakes["w0"][policies["steps"] // 2500])


def test_select_refuses(tmp_path):
    for task, words in (("reacher", "reacher: SAC makes no data"), ("hopper", "no snapshots")):
        with pytest.raises(InputError, match=words):
            select.main(select.Args(task, tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_training_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--task hoper: did you mean hopper"):
        train.main(train.Args("hoper"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(train_battles, "make_vec", lambda *args: None)
    for name, main, args in (
        ("0002500.npz", train.main, train.Args("hopper")),
        ("00010.npz", train_battles.main, train_battles.Args(Path("snapshots/hopper"))),
    ):
        folder = train.new_folder(Path("snapshots/hopper"))
        (folder / name).touch()
        with pytest.raises(InputError, match="snapshots/hopper holds the snapshots of another"):
            main(args)
        assert [path.name for path in folder.iterdir()] == [name]
        (folder / name).unlink()
    Path("file").touch()
    with pytest.raises(InputError, match="cannot write there"):
        train.new_folder(Path("file"))


@pytest.mark.parametrize(
    "tool, argv",
    [
        ("train", "--task foo"),
        ("train", "--task reacher-full --out new"),
        ("select", "--task hopper --snapshots nope --out chosen"),
        ("train_battles", "--iterations 5 --out new"),
        ("train_teams", "--task nope --out new"),
        ("train_teams", "--task simple-spread --prey --out new"),
        ("select", "--task ant --snapshots nope"),
        ("select_teams", "--task simple-spread --snapshots nope"),
    ],
)
def test_tools_refuse_in_one_line(tool, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [tool, *argv.split()])
    monkeypatch.delitem(sys.modules, f"behaviours.{tool}", raising=False)
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(f"behaviours.{tool}", run_name="__main__", alter_sys=True)
    assert exit.value.code == 2 and not list(tmp_path.iterdir())
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("task", ["halfcheetah", "hopper", "walker2d"])
def test_shipped_policies(task):
    policies = mujoco.load_policies(task)
    steps, replay = policies["steps"], policies["replay"]
    assert steps[0] == 0 and (np.diff(steps) > 0).all()
    assert len(replay) >= 20 and (np.diff(replay) > 0).all() and replay[-1] == policies["medium"]
    obs, action = (mujoco.columns(task)[k][0][0] for k in ("observations", "actions"))
    assert policies["w0"].shape == (len(steps), obs, 64)
    assert policies["w_mean"].shape == (len(steps), 64, action)
    assert all(np.isfinite(policies[name]).all() for name in mujoco.WEIGHTS)
