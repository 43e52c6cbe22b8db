"""How long a whole run takes, by phase: data, offline updates, simulator, fine-tuning updates,
evaluation, logging with checkpoints, and the rest.

    OMP_NUM_THREADS=1 python -m benchmarks.whole_run --num-seeds 1 5 --json run.json
    OMP_NUM_THREADS=1 python -m benchmarks.whole_run --script otc_td3bc --offline-updates 2000 \
        --finetune-updates 100 --deployments 2 --deployment-steps 2000

Once with the data in the cache and the libraries loaded. `simulator` has the policies' actions in
it; `rest` is making the networks, the environments and their processes.
"""

import dataclasses
import importlib
import resource
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from unittest import mock

import torch
import tyro

from benchmarks import check_outputs, write_json
from benchmarks.speed import introduction, machine
from benchmarks.sweep import arguments_of
from common import cli, datasets, loop, runs
from common.device import pick_device

PHASES = (
    "data",
    "offline updates",
    "simulator",
    "fine-tuning updates",
    "evaluation",
    "logging",
    "rest",
)


@dataclass
class Args:
    script: str = "otc_bcq"
    """script to run, with its own defaults but for what follows"""
    env: str = "halfcheetah-medium"
    """task and data quality"""
    num_seeds: tuple[int, ...] = (1, 5)
    """seeds of each run"""
    offline_updates: cli.Natural = 100_000
    """updates before the first deployment"""
    deployments: cli.Natural = 10
    """K"""
    deployment_steps: int = 10_000
    """M"""
    finetune_updates: cli.Natural = 4000
    """updates after each deployment"""
    device: cli.Device = "auto"
    """auto, cpu or cuda"""
    json: str | None = None
    """file for the seconds"""


class Stopwatch:
    """Seconds by phase, where a function that is timed inside another one counts for itself."""

    def __init__(self, device: torch.device):
        self.device, self.spent, self.running = device, defaultdict(float), ["rest"]
        self.last = time.perf_counter()

    def switch(self) -> None:
        """Count the time since the last switch for what has been running."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.spent[self.running[-1]] += now - self.last
        self.last = now

    def patch(self, owner, name: str, phase: str):
        """A patcher that counts a function's time for `phase`."""
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            self.switch()
            self.running.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.running.pop()

        return mock.patch.object(owner, name, timed)


def phases_of(args: Args, num_seeds: int) -> dict[str, float]:
    """Seconds of each phase of one run."""
    module = importlib.import_module(args.script)
    names = arguments_of(args.script)
    flags = {k: v for k, v in dataclasses.asdict(args).items() if k in names}
    with tempfile.TemporaryDirectory() as folder:
        its_args = module.Args(**(flags | {"num_seeds": num_seeds, "run_dir": folder}))
        watch = Stopwatch(pick_device(its_args))

        # What happens between the other phases are the updates.
        updates = runs.Run.updates

        def timed_updates(run, phase, *rest):
            watch.switch()
            is_offline = phase == "offline"
            watch.running.append("offline updates" if is_offline else "fine-tuning updates")
            yield from updates(run, phase, *rest)
            watch.switch()
            watch.running.pop()

        patches = [
            mock.patch.object(runs.Run, "updates", timed_updates),
            watch.patch(datasets, "load", "data"),
            watch.patch(loop, "Replay", "data"),
            watch.patch(loop, "collect", "simulator"),
            watch.patch(loop, "episode_returns", "evaluation"),
        ]
        if hasattr(module, "OTC"):
            patches.append(watch.patch(module.OTC, "start_deployment", "fine-tuning updates"))
        for name in ("log", "log_losses", "record_return", "record_offline", "save", "finish"):
            patches.append(watch.patch(runs.Run, name, "logging"))
        for each in patches:
            each.start()
        try:
            module.main(its_args)
        finally:
            for each in patches:
                each.stop()
    watch.switch()
    return {phase: watch.spent[phase] for phase in PHASES}


def main(args: Args) -> None:
    arguments_of(args.script)  # refuses a name that is no script's
    check_outputs(args.json)
    datasets.load(args.env)  # into the cache
    what = machine(pick_device(args))
    rows = []
    record = {"args": vars(args), "machine": what, "seconds": rows}
    for num_seeds in args.num_seeds:
        seconds = phases_of(args, num_seeds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        total = sum(seconds.values())
        rows.append({"seeds": num_seeds, **seconds, "total": total, "peak_GiB": peak})
        if args.json:  # as soon as it is known: the whole takes long
            write_json(args.json, record)
    print("\n" + introduction(f"{args.script}, {args.env}", what))
    print("\n| seeds |", " | ".join(PHASES), "| total, s | peak memory, GiB |")
    print("|---|" + "---|" * (len(PHASES) + 2))
    for row in rows:
        cells = (f"{row[name]:.1f}" for name in (*PHASES, "total"))
        print(f"| {row['seeds']} |", " | ".join(cells), f"| {row['peak_GiB']:.2f} |")


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
