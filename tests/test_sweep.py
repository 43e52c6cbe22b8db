"""A grid becomes jobs; what is done is not done again, whatever ended it before."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from benchmarks import sweep
from common import InputError, cli
from tests.helpers import QUICK, ROOT, assert_same, state_of
from tests.tiny_task import ENV, write_data

GRID = {
    "scripts": ["otc_bcq", "ours"],
    "envs": ["hopper-medium", "one-agent"],
    "strategies": ["uniform", "near"],
    "seeds": 5,
    "seeds-per-job": 3,
    "flags": {"offline-updates": 7, "finetune-updates": 3, "cuda-graph": False},
    "script": {"ours": {"script": "otc_awac", "temperature": 2.0}},
    "env": {"one-agent": {"env": "hopper-random", "split": "1x3"}},
    "strategy": {"near": {"sampling": "otc", "distance": "value", "candidates": 300}},
}


def test_a_grids_jobs():
    jobs = sweep.jobs_of(GRID)
    assert len(jobs) == 2 * 2 * 2 * (1 + 2) and len({job.key for job in jobs}) == len(jobs)
    by_name = {job.name: job for job in jobs}
    start, job = by_name["ours-one-agent-pi0-4-5"], by_name["ours-one-agent-near-4-5"]
    common = {"offline_updates": 7, "cuda_graph": False, "temperature": 2.0, "split": "1x3"}
    common |= {"env": "hopper-random", "seed": 4, "num_seeds": 2}
    assert start.script == job.script == "otc_awac" and start.start is None
    assert start.flags == common | {"deployments": 0, "sampling": "uniform"}
    otc = {"sampling": "otc", "distance": "value", "candidates": 300}
    assert job.flags == common | otc | {"finetune_updates": 3} and job.start == start
    assert jobs.index(start) < jobs.index(job)
    argv = sweep.argv_of(job.flags)
    assert "--no-cuda-graph" in argv and argv[argv.index("--finetune-updates") + 1] == "3"
    args = cli.parse(__import__("otc_awac").Args, argv)
    assert (args.temperature, args.candidates, args.num_seeds) == (2.0, 300, 2)


def test_strategies_with_other_distances_have_one_start():
    embedding = {"sampling": "otc", "distance": "embedding", "embedding-dim": 4}
    grid = GRID | {"strategy": GRID["strategy"] | {"near": embedding}}
    for one, other in zip(sweep.jobs_of(GRID), sweep.jobs_of(grid), strict=True):
        assert one.start == other.start and (one == other) == ("near" not in one.cell)


def test_more_of_something_leaves_the_others_as_they_are():
    keys = [job.key for job in sweep.jobs_of(GRID | {"seeds": 3})]
    for more in (
        {"seeds": 6},
        {"strategies": [*GRID["strategies"], "offline"], "seeds": 3},
        {"envs": [*GRID["envs"], "walker2d-medium"], "seeds": 3},
        {"scripts": [*GRID["scripts"], "otc_td3bc"], "seeds": 3},
    ):
        found = [job.key for job in sweep.jobs_of(GRID | more)]
        assert set(keys) < set(found)
    other = sweep.jobs_of(GRID | {"seeds": 3, "flags": GRID["flags"] | {"offline-updates": 8}})
    assert not set(keys) & {job.key for job in other}  # a strategy's start counts as well


def test_a_table_named_as_a_sampling_is_that_sampling():
    tables = {"strategies": ["balanced"], "strategy": {"balanced": {"finetune-updates": 7}}}
    job = sweep.jobs_of(GRID | tables)[-1]
    assert job.flags["sampling"] == "balanced" and job.flags["finetune_updates"] == 7


def test_a_script_without_deployments_keeps_all_its_flags():
    """Also those that are named as others' flags of fine-tuning."""
    flags = {"finetune": True, "finetune-updates": 10, "model-updates": 20, "offline-updates": 100}
    grid = {"scripts": ["maiql"], "envs": ["ant-random"], "seeds": 1, "flags": flags}
    (job,) = sweep.jobs_of(grid)
    sweep.check(job)
    assert job.flags["finetune_updates"] == 10


def test_a_lost_folder_of_a_seed_is_its_jobs_matter_alone(tmp_path):
    (job, *_) = sweep.jobs_of(GRID | {"strategies": [], "strategy": {}})
    place, names = sweep.Place(job, tmp_path), ["a", "b"]
    (place.folder / "a").mkdir(parents=True)
    seed = job.flags["seed"]
    record = {"args": {"seed": seed}, "seed": seed, "script": job.script, "folders": names}
    (place.folder / "a" / "args.json").write_text(json.dumps(record))
    (place.folder / "a" / "checkpoint.pt").touch()
    assert place.state() == "resumable"


def test_a_report_of_nothing_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "grid.toml").write_text(
        'scripts = ["otc_bcq"]\nenvs = ["hopper-medium"]\nseeds = 5'
    )
    (tmp_path / "kept.csv").write_text("kept")
    args = sweep.Args("report", tmp_path / "grid.toml", tmp_path, csv=str(tmp_path / "kept.csv"))
    sweep.main(args)
    assert "1 of 1 jobs are not done" in capsys.readouterr().out
    assert (tmp_path / "kept.csv").read_text() == "kept"
    args.workers = 0
    with pytest.raises(InputError, match="--workers 0: expected at least 1"):
        sweep.main(args)


def test_without_strategies_there_are_offline_jobs_alone():
    jobs = sweep.jobs_of(GRID | {"strategies": [], "strategy": {}})
    assert len(jobs) == 8 and not any(job.start for job in jobs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scripts = [", "not TOML"),
        ('scripts = ["otc_bcq"]\nenvs = ["hopper-medium"]', "seeds is missing"),
        ("script = 1", "script must be a dict"),
        ("sseeds = 3", "unknown 'sseeds': did you mean seeds"),
        ("BASE\nseeds-per-job = 0", "at least 1"),
        ('BASE\nstrategies = ["unifrom"]', "'unifrom': did you mean uniform"),
        ("BASE\n[strategy.near]\ndistance = 'value'", r"\[strategy.near\] is not among"),
        ("BASE\n[flags]\noffline-update = 3", "no --offline-update: did you mean offline_updates"),
        ("BASE\n[flags]\nseed = 3", "--seed is the sweep's own"),
        ("BASE\n[flags]\ngamma = [1]", "must be one value"),
        ("BASE\n[flags]\ngamma = 2020-01-01", "must be one value"),
        ('scripts = ["otc_bcq"]\nenvs = ["hoper-medium"]\nseeds = 1', "did you mean hopper"),
        ("BASE\n[flags]\ngamma = 2.0", "otc_bcq-hopper-medium-pi0-1-5: --gamma is 2.0; it must be"),
        ("BASE\n[flags]\noffline-updates = 'many'", "pi0-1-5: .*many"),
        ("BASE\n[flags]\ndevice = 'gpu'", "pi0-1-5: .*gpu"),
        ("BASE\n[script.otc_bcq]\nscript = 'otc_bqc'", "no script 'otc_bqc': did you mean otc_bcq"),
        ("BASE\n[script.otc_bcq]\nscript = 3", "script must be a name"),
        ("BASE\n[script]\notc_bcq = 3", "otc_bcq must be a table of flags, not 3"),
        ("BASE\nstrategies = ['uniform', 'uniform']", "'uniform' in strategies is .* there twice"),
        ("BASE\n[flags]\nenv = 'walker2d-medium'", r"\[flags\] env: tasks are those of envs"),
        (
            "BASE\nstrategies = ['uniform']\n[strategy.uniform]\nhidden-size = 32",
            "uniform-1-5: its offline job: .* trained with --hidden-size 64, not 32",
        ),
    ],
)
def test_bad_grids(tmp_path, capsys, text, message):
    base = 'scripts = ["otc_bcq"]\nenvs = ["hopper-medium"]\nseeds = 5'
    (tmp_path / "grid.toml").write_text(text.replace("BASE", base))
    for what in ("plan", "run"):
        args = sweep.Args(what, tmp_path / "grid.toml", tmp_path / "out")
        with pytest.raises(InputError, match=message) as found:
            sweep.main(args)
        assert str(found.value).count("\n") < 2
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="cannot be read"):
        sweep.main(sweep.Args("plan", tmp_path / "none.toml"))


def test_slurms_arrays(tmp_path, capsys):
    path = tmp_path / "my grid.toml"
    path.write_text('scripts = ["otc_bcq"]\nenvs = ["hopper-medium", "hopper-random"]\n'
                    'strategies = ["uniform", "otc"]\nseeds = 1\n')  # fmt: skip
    out = tmp_path / "out"
    sweep.main(sweep.Args("run", path, out, executor="slurm", gpus_per_job=1))
    first, second = (
        (out / "my grid" / f"{n}.sbatch").read_text() for n in ("offline", "strategies")
    )
    assert "--array=0,3\n" in first and "--array=1,2,4,5\n" in second
    assert "#SBATCH --ntasks=1\n" in first  # or sbatch refuses --gpus-per-task
    assert "#SBATCH --gpus-per-task=1\n" in first and f"--out {out.resolve()}" in first
    assert f"job '{path}' --out" in first and '--number "$SLURM_ARRAY_TASK_ID"' in second
    said = capsys.readouterr().out
    assert re.search(r"offline=\$\(sbatch --parsable '.*offline.sbatch'\)", said)
    assert "--dependency=afterany:$offline" in said
    for text in (first, second):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
        assert "#SBATCH --signal=B:TERM@120\n" in text  # to the batch script itself
    with pytest.raises(InputError, match="--number 6: expected 0 to 5"):
        sweep.main(sweep.Args("job", path, out, number=6))
    with pytest.raises(InputError, match="--gpus-per-job 0.25: SLURM gives whole GPUs"):
        sweep.main(sweep.Args("run", path, out, executor="slurm", gpus_per_job=0.25))


# --- One job, as SLURM runs it ---


@pytest.fixture
def job(tmp_path, capsys):
    """Runs a job of a grid of two; its exit status and what is printed."""
    path = tmp_path / "grid.toml"
    path.write_text(
        'scripts = ["otc_bcq"]\nenvs = ["hopper-medium"]\nstrategies = ["uniform"]\nseeds = 1'
    )

    def of(number):
        with pytest.raises(SystemExit) as exit:
            sweep.main(sweep.Args("job", path, tmp_path / "out", number=number))
        return exit.value.code, capsys.readouterr().out

    of.places = [
        sweep.Place(job, tmp_path / "out" / "grid") for job in sweep.jobs_of(sweep.read_grid(path))
    ]
    return of


def test_a_job_whose_offline_job_is_not_done_is_refused(job):
    with pytest.raises(InputError, match="uniform-1: its offline job, .*pi0-1-.*, is not done"):
        job(1)
    assert job.places[1].state() == "to start"


def test_a_job_that_another_process_has_is_waited_for(job, monkeypatch):
    (place, _), waits = job.places, []
    lock = place.lock()
    monkeypatch.setattr(sweep.time, "sleep", waits.append)
    monkeypatch.setattr(sweep.Place, "is_done", lambda its: len(waits) > 2)
    status, said = job(0)
    assert status == 0 and said.strip().endswith("done") and len(waits) == 3
    assert not (place.folder / "exit").exists() and not (place.folder / "log.txt").exists()
    lock.close()


def test_a_job_says_how_it_failed(job, monkeypatch):
    words = "os.write(1, b'caf\\xe9\\n'); os.write(1, b'these words')"  # no UTF-8
    fails = [sys.executable, "-c", f"import os; {words}; exit(3)"]
    monkeypatch.setattr(sweep.Place, "command", lambda its, out: fails)
    status, said = job(0)
    assert status == 1 and "failed, exit status 3: these words" in said
    assert job.places[0].state() == "failed"


def test_a_job_that_cannot_be_begun_is_listed_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    """An executor whose first job meets a full disk and whose others end at once."""
    done = []

    class Executor:
        slots = 1

        def begin(self, place):
            if not done and "1" in place.job.name[-1]:
                raise OSError(28, "No space left on device")
            done.append(place.job.key)
            return place

        def status(self, place):
            return 0

    monkeypatch.setattr(sweep.Place, "is_done", lambda its: its.job.key in done)
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    jobs = sweep.jobs_of(
        {**GRID, "envs": ["hopper-medium"], "scripts": ["otc_bcq"], "seeds": 2}
        | {"strategies": ["uniform"], "seeds-per-job": 1}
    )
    assert sweep.Sweep(jobs, tmp_path, Executor()).run() == 1
    said = capsys.readouterr().out
    assert "pi0-1: not begun: [Errno 28] No space left on device" in said
    assert "uniform-1: not begun: its offline job failed" in said and len(done) == 2


# --- Whole sweeps ---


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """One script, two seeds together, two strategies, and one that fails as it begins."""
    folder = tmp_path_factory.mktemp("sweep")
    flags = {k[2:]: v for k, v in QUICK.items() if k not in ("--num-seeds", "--env-workers")}
    flags |= {"dataset": str(write_data(folder / "point.hdf5")), "offline-updates": 1200}
    flags |= {"eval-every": 300, "checkpoint-every": 100, "finetune-updates": 100}
    for own in ("seed", "threads"):
        flags.pop(own, None)
    too_many = flags["deployment-steps"] + 1
    lines = ['scripts = ["otc_bcq"]', f'envs = ["{ENV}"]', "seeds = 2"]
    lines += ['strategies = ["otc", "uniform", "too-many"]', "[flags]"]
    lines += [f"{name} = {value!r}".replace("True", "true") for name, value in flags.items()]
    lines += ["[strategy.too-many]", 'sampling = "otc"', f"references = {too_many}"]
    (folder / "grid.toml").write_text("\n".join(lines))
    return folder / "grid.toml"


def driver(grid, out, what="run", executor="local"):
    command = [sys.executable, "-m", "benchmarks.sweep", what, grid, "--out", out]
    command += ["--workers", "1", "--executor", executor]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def whole(grid, tmp_path_factory):
    """The sweep that nothing interrupts: its folder, exit status and what it said."""
    out = tmp_path_factory.mktemp("whole")
    process = driver(grid, out)
    return out, *process.communicate(), process.returncode


def finished(out):
    """{job: (returns.csv of both seeds, checkpoint)}"""
    found = {}
    for folder in sorted(out.glob("grid/*")):
        runs = sorted(path.parent for path in folder.glob("*/returns.csv"))
        if not runs:
            continue
        texts = [(run / "returns.csv").read_text() for run in runs]
        found[folder.name] = texts, state_of(runs[0] / "checkpoint.pt")
    return found


def test_a_failure_is_listed_and_the_rest_goes_on(whole, grid):
    out, said, errors, status = whole
    assert status == 1 and "4 jobs, 0 of them done" in said
    assert len(finished(out)) == 3 and errors.count("\n") == 1
    assert "too-many" in errors and "exit status 2: error: --references" in errors
    status_said = driver(grid, out, "status").communicate()[0]
    assert status_said.strip().endswith("3 done, 1 failed")
    report = driver(grid, out, "report").communicate()[0]
    assert "| 2 |" in report and "1 of 4 jobs are not done" in report


def test_what_is_done_is_not_done_again(whole, grid):
    out = whole[0]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("returns.csv")}
    said, errors = driver(grid, out).communicate()
    assert "4 jobs, 3 of them done" in said and "too-many" in errors
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("returns.csv")}


no_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs requirements-sweep.txt")


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=no_ray)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_an_interrupted_sweep_ends_as_if_it_had_not_been(whole, grid, tmp_path, number, executor):
    process = driver(grid, tmp_path, executor=executor)
    deadline = time.time() + 300
    while not list(tmp_path.glob("grid/*pi0*/*/checkpoint.pt")):
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate()[0]
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    if number == signal.SIGTERM:
        assert "0 of 4 jobs are done; the same command goes on" in said
        assert not list(tmp_path.glob("grid/*pi0*/*/offline.pt"))  # amid its updates
    else:  # its job lives, but Ray's: end that too, or the test would not see a second life
        found = ["pgrep", "-f", f"run-dir {tmp_path}"]
        pids = subprocess.run(found, capture_output=True, text=True).stdout.split()
        for pid in pids:  # it holds its run, and does not end before it is looked at
            os.kill(int(pid), signal.SIGSTOP)
        busy = driver(grid, tmp_path, "status").communicate()[0]
        assert "running" in busy or executor == "ray"
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
    driver(grid, tmp_path, executor=executor).communicate()
    expected, found = finished(whole[0]), finished(tmp_path)
    assert list(expected) == list(found) and len(found) == 3
    for job in expected:
        assert expected[job][0] == found[job][0], job
        assert_same(expected[job][1], found[job][1])
    assert len(list(tmp_path.glob("grid/*pi0*/*/args.json"))) == 2  # went on, did not begin anew


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "grids").glob("*.toml")), ids=str)
def test_the_grids_here_parse(path):
    jobs = sweep.jobs_of(sweep.read_grid(path))
    last_env = jobs[-1].flags["env"]
    for job in jobs:
        if job.flags["env"] == last_env:
            sweep.check(job)
