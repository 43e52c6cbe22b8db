"""Many runs from one small file: scripts x tasks x strategies x seeds, on this machine, on Ray or
on SLURM; what is done is not done again.

    python -m benchmarks.sweep plan benchmarks/grids/quick.toml
    python -m benchmarks.sweep run benchmarks/grids/quick.toml --workers 2
    python -m benchmarks.sweep status benchmarks/grids/quick.toml
    python -m benchmarks.sweep report benchmarks/grids/quick.toml --csv quick.csv

A grid, in TOML:

    scripts = ["otc_bcq"]                  # a table [script.NAME] may say script = "..."
    envs = ["hopper-medium"]               # a table [env.NAME] may say env = "..."
    strategies = ["uniform", "otc-value"]  # a --sampling or a table's name; [] trains pi^0 alone
    seeds = 5                              # how many,
    seeds-per-job = 5                      # trained together
    [flags]                                # of all jobs; [script.X], [env.X], [strategy.X] of some
    offline-updates = 20000
    [strategy.otc-value]
    sampling = "otc"
    distance = "value"

Every job is a script in a process of its own. Jobs of the same script, task and seeds start from
one offline job; the first job of a task makes its data. A job's folder, OUT/GRID/NAME-HASH with the
hash of its flags, is its state: done, to be resumed, or to start. So a seed, a task or a strategy
more runs only what is missing.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import tyro

from benchmarks import write_csv
from common import ROOT, InputError, checkpoints, cli, nearest, strategies
from common.datasets import parse_env
from common.envs import num_cores

SAMPLING = (*strategies.OTHERS, "otc")
TABLES = {"script": "scripts", "env": "envs", "strategy": "strategies"}


@dataclass
class Args:
    what: tyro.conf.Positional[Literal["plan", "run", "status", "report", "job"]]
    """plan: check all flags and list the jobs; run; status; report: returns of what is done;
    job: run the job of --number, as SLURM's arrays do"""
    grid: tyro.conf.Positional[Path]
    """TOML file"""
    out: Path = Path("sweeps")
    """folder of all sweeps"""
    executor: Literal["local", "ray", "slurm"] = "local"
    """slurm writes two job arrays and submits nothing"""
    workers: cli.Natural | None = None
    """jobs at a time on this machine; default: its cores"""
    address: str | None = None
    """of a Ray cluster, such as auto; default: Ray on this machine"""
    gpus_per_job: float = 0
    """for Ray and SLURM; Ray takes fractions"""
    csv: str | None = None
    """report: file for every return"""
    number: cli.Natural | None = None
    """job: which of the plan's jobs"""


@dataclass(frozen=True)
class Job:
    """A run of one script for some seeds; `start` is the job whose offline policy it begins from.
    `cell` is what it has in common with the same for other seeds."""

    cell: str
    script: str
    flags: dict[str, object]
    start: "Job | None" = None

    @property
    def name(self) -> str:
        first, last = self.flags["seed"], self.flags["seed"] + self.flags["num_seeds"] - 1
        return f"{self.cell}-{first}" + (f"-{last}" if last > first else "")

    @property
    def key(self) -> str:
        """Its folder's name: readable, with a hash of all that it depends on."""
        depends = [self.script, self.flags, self.start and self.start.key]
        text = json.dumps(depends, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


# --- Grid -> jobs ---


def read_grid(path: Path) -> dict:
    """A grid file's content; raises InputError if it is not one."""
    try:
        grid = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    kinds = {"scripts": list, "envs": list, "strategies": list, "seeds": int, "seeds-per-job": int}
    kinds |= {"first-seed": int, "flags": dict} | dict.fromkeys(TABLES, dict)
    for name, value in grid.items():
        if name not in kinds:
            raise InputError(f"{path}: unknown {name!r}: {nearest(name, kinds)}")
        if type(value) is not kinds[name]:
            raise InputError(f"{path}: {name} must be a {kinds[name].__name__}, not {value!r}")
    for name in ("scripts", "envs", "seeds"):
        if not grid.get(name):
            raise InputError(f"{path}: {name} is missing or empty")
    for table, names in TABLES.items():
        for name, its in grid.get(table, {}).items():
            if name not in grid.get(names, []):
                raise InputError(f"{path}: [{table}.{name}] is not among {names}")
            if not isinstance(its, dict):
                raise InputError(f"{path}: [{table}] {name} must be a table of flags, not {its!r}")
            if table != "env" and "env" in its:
                raise InputError(f"{path}: [{table}.{name}] env: tasks are those of envs")
            if not isinstance(its.get(table, ""), str):
                raise InputError(f"{path}: [{table}.{name}] {table} must be a name")
        for name in grid.get(names, []):
            if not isinstance(name, str) or grid[names].count(name) > 1:
                raise InputError(f"{path}: {name!r} in {names} is no name, or there twice")
    if "env" in grid.get("flags", {}):
        raise InputError(f"{path}: [flags] env: tasks are those of envs")
    for name in grid.get("strategies", []):
        if name not in (*SAMPLING, *grid.get("strategy", {})):
            hint = nearest(name, SAMPLING)
            raise InputError(f"{path}: strategy {name!r}: {hint}, or a table [strategy.{name}]")
    return grid


def jobs_of(grid: dict) -> list[Job]:
    """The jobs of a grid, every offline job before those that start from it.

    Raises InputError for a script that there is not, and for a flag that a script does not have.
    """
    first, count = grid.get("first-seed", 1), grid["seeds"]
    each = grid.get("seeds-per-job", count)
    if min(count, each) < 1 or first < 0:
        raise InputError("seeds and seeds-per-job must be at least 1, first-seed at least 0")
    jobs = []
    for script_name, env_name in itertools.product(grid["scripts"], grid["envs"]):
        of_script = {**grid.get("script", {}).get(script_name, {})}
        script = of_script.pop("script", script_name)
        groups, tables = arguments_of(script), grid.get("strategy", {})
        of_env = {"env": env_name, **grid.get("env", {}).get(env_name, {})}
        common = checked({**grid.get("flags", {}), **of_script, **of_env}, groups, script)
        strategies = {}
        for name in grid.get("strategies", []):
            sampling = {"sampling": name} if name in SAMPLING else {}
            strategies[name] = checked(sampling | tables.get(name, {}), groups, script)
        cell = re.sub(r"[^\w.-]", "-", f"{script_name}-{env_name}")
        for start in range(first, first + count, each):
            seeds = {"seed": start, "num_seeds": min(each, first + count - start)}
            flags = common
            if "deployments" in groups:
                flags = {k: v for k, v in common.items() if not is_online(k, groups)}
                flags |= {"deployments": 0, "sampling": "uniform"}
            offline = Job(f"{cell}-pi0", script, flags | seeds)
            jobs.append(offline)
            for strategy, its in strategies.items():
                jobs.append(Job(f"{cell}-{strategy}", script, common | its | seeds, offline))
    keys = [job.key for job in jobs]
    return [job for i, job in enumerate(jobs) if job.key not in keys[:i]]


def arguments_of(script: str) -> dict[str, str]:
    """The group of --help of every argument of a script."""
    names = sorted(path.stem for path in ROOT.glob("*.py"))
    if script not in names:
        raise InputError(f"there is no script {script!r}: {nearest(script, names)}")
    described = cli.described(importlib.import_module(script).Args)
    return {name: group for name, (group, _) in described.items()}


def checked(flags: dict, groups: dict[str, str], script: str) -> dict:
    """Flags by their arguments' names, all of which the script has."""
    found = {name.replace("-", "_"): value for name, value in flags.items()}
    own = {"seed", "num_seeds", "run_dir", "resume", "offline_checkpoint", "env_workers", "threads"}
    for name, value in found.items():
        if name in own:
            raise InputError(f"{cli.flag(name)} is the sweep's own business")
        if name not in groups:
            raise InputError(f"{script}.py has no {cli.flag(name)}: {nearest(name, groups)}")
        if not isinstance(value, bool | int | float | str):
            raise InputError(f"{cli.flag(name)} must be one value, not {value!r}")
    return found


def is_online(name: str, groups: dict[str, str]) -> bool:
    """Of no use to the offline phase."""
    return groups[name] in ("deployment", "otc") or name in cli.OF_TUNING


def argv_of(flags: dict) -> list[str]:
    """Flags as the command line has them."""
    argv = []
    for name, value in flags.items():
        if isinstance(value, bool):
            argv.append(cli.flag(name) if value else cli.flag(f"no-{name}"))
        else:
            argv += [cli.flag(name), str(value)]
    return argv


@functools.cache
def parsed(script: str, *argv: str):
    """What a script makes of a command line; those of an offline job's strategies ask for its own,
    too."""
    return cli.parse(importlib.import_module(script).Args, list(argv))


def check(job: Job) -> None:
    """Parse a job's flags as its script will; raises InputError for what it will not take, and for
    a strategy whose policy would not be that of its offline job."""
    said = io.StringIO()
    try:
        parse_env(job.flags["env"])
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            args = parsed(job.script, *argv_of(job.flags))
            start = job.start and parsed(job.start.script, *argv_of(job.start.flags))
        if start is not None:
            checkpoints.check_same(vars(start), args, args.SAME_POLICY, "its offline job")
    except InputError as error:
        raise InputError(f"{job.name}: {error}") from None
    except SystemExit:  # tyro draws a box around what it says
        text = " ".join(re.sub(r"[─│╭╮╰╯]|-{3,}", " ", said.getvalue()).split())
        raise InputError(f"{job.name}: {text[:200]}") from None


# --- A job's folder ---


class Place:
    """The state of a job, read from its folder."""

    def __init__(self, job: Job, out: Path):
        self.job, self.folder = job, out / job.key

    def run_folder(self) -> Path | None:
        """The first seed's folder of the latest run that can be resumed or is done."""
        found = sorted(
            path.parent
            for path in self.folder.glob("*/checkpoint.pt")
            if checkpoints.read_record(path.parent)["seed"] == self.job.flags["seed"]
        )
        return found[-1] if found else None

    def is_done(self) -> bool:
        """Whether every seed's last return is there."""
        folder = self.run_folder()
        if folder is None:
            return False
        last = str(checkpoints.read_args(folder).get("deployments", 0))
        rows = map(checkpoints.read_returns, checkpoints.seeds_folders(folder))
        return all(its and its[-1]["deployment"] == last for its in rows)

    def lock(self) -> IO | None:
        """Held by the job's process as long as it lives, whatever becomes of this one; None where
        another holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.folder / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            file.close()
            return None

    def state(self) -> str:
        """done, running, failed, resumable or to start."""
        if self.is_done():
            return "done"
        if self.folder.exists():
            lock = self.lock()
            if lock is None:
                return "running"
            lock.close()
            if (self.folder / "exit").exists():
                return "failed"
        return "resumable" if self.run_folder() else "to start"

    def command(self, out: Path) -> list[str]:
        """What starts it, or goes on with it; raises InputError where its offline job is not
        done."""
        command = [sys.executable, str(ROOT / f"{self.job.script}.py")]
        going_on = self.run_folder()
        if going_on is not None:
            return [*command, "--resume", str(going_on)]
        command += [*argv_of(self.job.flags), "--env-workers", "0", "--threads", "1"]
        if self.job.start is not None:
            start = Place(self.job.start, out)
            if not start.is_done():
                raise InputError(f"{self.job.name}: its offline job, {start.folder}, is not done")
            command += ["--offline-checkpoint", str(start.run_folder())]
        return [*command, "--run-dir", str(self.folder)]

    def start(self, out: Path) -> subprocess.Popen | None:
        """Its process, or None where another has it."""
        lock = self.lock()
        if lock is None:
            return None
        with lock, open(self.folder / "log.txt", "a") as log:
            (self.folder / "exit").unlink(missing_ok=True)
            command = self.command(out)
            print("$", shlex.join(command), file=log, flush=True)
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=[lock.fileno()],  # keeps the lock
                start_new_session=True,  # Ctrl-C is for this process alone
            )

    def ended(self, status: int) -> str:
        """Note how it ended; a line about it."""
        if self.is_done():
            return "done"
        if status in (130, 143, -signal.SIGTERM, -signal.SIGINT):
            return "stopped"
        with contextlib.suppress(OSError):  # a full disk's: without it the job is resumable
            (self.folder / "exit").write_text(f"{status}\n")
        log = (self.folder / "log.txt").read_text(errors="replace").replace("\r", "\n").splitlines()
        last = next((line.strip() for line in reversed(log) if line.strip()), "")
        return f"failed, exit status {status}: {last[:200]}"


# --- Executors: begin(place) -> handle or None; status(handle) -> exit status or None; stop ---


class Local:
    """Processes of this machine."""

    def __init__(self, args: Args, out: Path):
        self.out, self.slots = out, args.workers or num_cores()

    def begin(self, place: Place):
        return place.start(self.out)

    def status(self, process):
        return process.poll()

    def stop(self, process):
        process.terminate()


def run_one(place: Place, out: Path) -> int:
    """Run a job to its end, once no other process has it; its exit status. SIGTERM and an interrupt
    are passed on."""
    while not place.is_done():
        process = place.start(out)
        if process is not None:
            break
        time.sleep(0.2)  # another has it
    else:
        return 0
    try:
        with contextlib.suppress(ValueError):  # Ray's threads have no signals
            signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        while process.poll() is None:  # Ray's interrupt does not end a wait
            time.sleep(0.2)
    except KeyboardInterrupt:
        process.terminate()
    return process.wait()


class Ray:
    """Tasks of a Ray cluster, whose machines share this folder."""

    def __init__(self, args: Args, out: Path):
        os.environ.setdefault("RAY_worker_niceness", "0")  # instead of 15
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            hint = "pip install -r requirements-sweep.txt"
            raise InputError(f"--executor ray needs Ray: {hint}") from None
        self.ray, self.out = ray, out.resolve()
        ray.init(
            address=args.address,
            num_cpus=None if args.address else args.workers or num_cores(),
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
            log_to_driver=False,
        )
        self.slots = 10**6  # Ray knows what fits
        self.run = ray.remote(num_cpus=1, num_gpus=args.gpus_per_job, max_retries=0)(run_one)

    def begin(self, place: Place):
        return self.run.remote(Place(place.job, self.out), self.out)

    def status(self, task):
        if not self.ray.wait([task], timeout=0)[0]:
            return None
        try:
            return self.ray.get(task)
        except self.ray.exceptions.TaskCancelledError:
            return 130
        except self.ray.exceptions.RayError:  # its machine died
            return 1

    def stop(self, task):
        self.ray.cancel(task)


class Sweep:
    """The jobs of a grid while they run; `places` by their keys."""

    def __init__(self, jobs: list[Job], out: Path, executor):
        self.executor, self.places = executor, {job.key: Place(job, out) for job in jobs}
        self.done = {key for key, place in self.places.items() if place.is_done()}
        self.waiting = [key for key in self.places if key not in self.done]
        self.running, self.failed, self.begun = {}, {}, time.perf_counter()
        self.asked = 0  # the signal that asked to stop

    def say(self, key: str, text: str) -> None:
        minutes = (time.perf_counter() - self.begun) / 60
        count = f"{len(self.done)}/{len(self.places)} done, {minutes:.1f} min"
        print(f"[{count}] {self.places[key].job.name}: {text}", flush=True)

    def begin(self) -> None:
        """Begin what can be begun."""
        for key in list(self.waiting):
            place, start = self.places[key], self.places[key].job.start
            if start is not None and start.key in self.failed:
                self.waiting.remove(key)
                self.failed[key] = "not begun: its offline job failed"
                self.say(key, self.failed[key])
            elif place.is_done():  # by another
                self.waiting.remove(key)
                self.done.add(key)
            elif len(self.running) < self.executor.slots and (
                start is None or start.key in self.done
            ):
                try:
                    handle = self.executor.begin(place)
                except OSError as error:  # of its folder
                    self.waiting.remove(key)
                    self.failed[key] = f"not begun: {error}"
                    self.say(key, self.failed[key])
                    continue
                if handle is not None:  # None: another process has it
                    self.waiting.remove(key)
                    self.running[key] = handle

    def look(self) -> None:
        """Note what has ended."""
        for key, handle in list(self.running.items()):
            status = self.executor.status(handle)
            if status is None:
                continue
            del self.running[key]
            text = self.places[key].ended(status)
            if text == "done":
                self.done.add(key)
            elif text != "stopped" or not self.asked:
                self.failed[key] = text
            self.say(key, text)

    def run(self) -> int:
        """Run what is not done, and the rest where something fails; the exit status: 0, 1 if any
        failed, 128 + signal if stopped."""

        def stop(number, frame):
            self.asked = number

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        print(f"{len(self.places)} jobs, {len(self.done)} of them done", flush=True)
        told = False
        while self.running or (self.waiting and not self.asked):
            self.look()
            if not self.asked:
                self.begin()
            elif not told:
                told = True
                print("stopping: running jobs save and end", flush=True)
                for handle in self.running.values():
                    self.executor.stop(handle)
            time.sleep(0.2)
        for key, text in self.failed.items():
            print(f"{self.places[key].folder}: {text}", file=sys.stderr)
        if self.asked:
            count = f"{len(self.done)} of {len(self.places)} jobs are done"
            print(f"stopped; {count}; the same command goes on")
            return 128 + self.asked
        return 1 if self.failed else 0


SBATCH = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --array={array}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1{gpus}
#SBATCH --output={folder}/slurm-%A_%a.txt
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
cd {cwd}
exec {python} -m benchmarks.sweep job {grid} --out {out} --number "$SLURM_ARRAY_TASK_ID"
"""


def write_slurm(jobs: list[Job], args: Args, out: Path) -> None:
    """Two job arrays: the offline jobs, and those that start from them, each of which is refused
    where its own offline job failed."""
    if args.gpus_per_job < 0 or args.gpus_per_job % 1:
        raise InputError(f"--gpus-per-job {args.gpus_per_job:g}: SLURM gives whole GPUs")
    out.mkdir(parents=True, exist_ok=True)
    paths = {"grid": args.grid.resolve(), "out": args.out.resolve(), "folder": out.resolve()}
    quoted = {name: shlex.quote(str(path)) for name, path in paths.items()}
    gpus = f"\n#SBATCH --gpus-per-task={args.gpus_per_job:g}" if args.gpus_per_job else ""
    commands = []
    for name, is_first in (("offline", True), ("strategies", False)):
        numbers = [i for i, job in enumerate(jobs) if (job.start is None) == is_first]
        if not numbers:
            continue
        text = SBATCH.format(
            name=f"{args.grid.stem}-{name}", array=",".join(map(str, numbers)), gpus=gpus,
            cwd=shlex.quote(str(ROOT)), python=shlex.quote(sys.executable), **quoted,
        )  # fmt: skip
        path = out / f"{name}.sbatch"
        path.write_text(text)
        wait = "" if is_first else "--dependency=afterany:$offline "
        submit = f"sbatch --parsable {wait}{shlex.quote(str(path))}"
        commands.append(f"offline=$({submit})" if is_first else submit)
    print("\n".join(commands))


def report(jobs: list[Job], out: Path, path: str | None) -> None:
    """A row per script, task and strategy of what is done, mean and standard deviation over seeds;
    every return to `path`."""
    rows, cells = [], defaultdict(list)
    places = [Place(job, out) for job in jobs]
    for place in places:
        if not place.is_done():
            continue
        for folder in checkpoints.seeds_folders(place.run_folder()):
            found, job = checkpoints.read_returns(folder), place.job
            names = {"cell": job.cell, "script": job.script, "env": job.flags["env"]}
            seed = checkpoints.read_record(folder)["seed"]
            rows += [{**names, "seed": seed, **row} for row in found]
            ends = (
                found[0]["mean_return"],
                *(found[-1][n] for n in ("mean_return", "normalized_score")),
            )
            cells[job.cell].append([float(x) for x in ends])
    print("| script, task, strategy | seeds | pi^0 | pi^K | score of pi^K |\n|---|---|---|---|---|")
    for cell, ends in cells.items():
        pairs = zip(np.mean(ends, 0), np.std(ends, 0), strict=True)
        print(f"| {cell} | {len(ends)} |", *(f"{mean:.1f} +- {std:.1f} |" for mean, std in pairs))
    if path and rows:
        write_csv(path, rows)
    count = sum(not place.is_done() for place in places)
    print(f"\n{count} of {len(jobs)} jobs are not done" if count else "\nall jobs are done")
    print(f"intervals, paired by seed: python -m benchmarks.aggregate {out}")


def main(args: Args) -> None:
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers {args.workers}: expected at least 1")
    jobs, out = jobs_of(read_grid(args.grid)), args.out / args.grid.stem
    if args.what in ("plan", "run"):
        for job in jobs:
            check(job)
    if args.what == "plan":
        for number, job in enumerate(jobs):
            print(number, Place(job, out).state(), job.key)
            print("   ", shlex.join([f"{job.script}.py", *argv_of(job.flags)]))
    elif args.what == "status":
        states = [(Place(job, out).state(), job) for job in jobs]
        for state, job in states:
            print(f"{state:10} {out / job.key}")
        counts = Counter(state for state, _ in states)
        print(", ".join(f"{count} {state}" for state, count in counts.items()))
    elif args.what == "report":
        report(jobs, out, args.csv)
    elif args.what == "job":
        if args.number is None or not 0 <= args.number < len(jobs):
            raise InputError(f"--number {args.number}: expected 0 to {len(jobs) - 1}")
        place = Place(jobs[args.number], out)
        text = place.ended(run_one(place, out))
        print(f"{place.folder}: {text}")
        sys.exit(0 if text == "done" else 1)
    elif args.executor == "slurm":
        write_slurm(jobs, args, out)
    else:
        sys.exit(Sweep(jobs, out, {"local": Local, "ray": Ray}[args.executor](args, out)).run())


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
