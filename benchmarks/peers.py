"""Our learners beside those of d3rlpy and torchrl: updates per second and agent, the same networks,
batches, numbers of sampled actions and data (they hold its first 100,000 transitions), one thread
each, in turn; on a CPU in processor time.

    OMP_NUM_THREADS=1 python -m benchmarks.peers --json peers.json
    OMP_NUM_THREADS=1 python -m benchmarks.peers --peer torchrl --json peers_torchrl.json

They may need other versions of our requirements; this makes an environment of its own for each,
once. All draw their batches as they do in training. They train one agent at a time; ours train two
agents, and with five seeds ten, in one update: the ratio is their time per update over ours per
agent and seed.
"""

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

import iql
from benchmarks import Worker, check_outputs, write_json
from benchmarks.speed import LEARNERS, introduction, learner_of, machine, times_of, update_of
from common import InputError, cache_dir, cli, datasets, nearest
from common.datasets import makers
from common.device import Graphed, pick_device
from common.replay import Replay

VERSIONS = {"d3rlpy": "2.8.1", "torchrl": "0.14.1"}
SCRIPTS = {
    "d3rlpy": {"BCQ": "otc_bcq", "AWAC": "otc_awac", "CQL": "otc_cql", "TD3BC": "otc_td3bc"},
    "torchrl": {"TD3BC": "otc_td3bc", "IQL": "iql"},
}


@dataclass
class Args:
    peer: Literal["d3rlpy", "torchrl"] = "d3rlpy"
    """d3rlpy: BCQ, AWAC, CQL and TD3BC; torchrl: TD3BC and IQL"""
    algorithms: tuple[str, ...] | None = None
    """learners to time; default: all of the peer's"""
    env: str = "halfcheetah-medium"
    """built-in data; its values do not matter"""
    num_seeds: tuple[int, ...] = (1, 5)
    """seeds trained together here"""
    repetitions: int = 7
    """rounds through everything"""
    seconds: cli.Positive = 0.5
    """least time that each side is run for in a round"""
    environment: Path | None = None
    """the peer's virtual environment, made where there is none; default: in the cache"""
    compile: bool = False
    """d3rlpy's compiled mode"""
    device: cli.Device = "auto"
    """auto, cpu or cuda"""
    json: str | None = None
    """file for the raw times"""


class Peer:
    """A package in a process of its own; called as one of our updates would be, in turn with
    them."""

    def __init__(self, args: Args, data: Path, action_dim: int, device: torch.device):
        package = f"{args.peer}=={VERSIONS[args.peer]}"
        folder = args.environment or cache_dir() / package.replace("==", "-")
        python, complete = folder / "bin" / "python", folder / "complete"
        if not complete.exists():
            print(f"making {args.peer}'s environment in {folder}")
            packages = [package, "h5py", f"torch=={torch.__version__.split('+')[0]}"]
            for command in (
                [sys.executable, "-m", "venv", folder],
                [python, "-m", "pip", "install", "-q", *packages],
            ):
                if subprocess.run(command).returncode:  # it says why
                    raise InputError(f"{args.peer}'s environment in {folder} cannot be made")
            complete.touch()
        sizes = {
            name: [learner_args(script).batch_size, learner_args(script).hidden_size]
            for name, script in SCRIPTS[args.peer].items()
        }
        worker = Path(__file__).with_name(f"{args.peer}_worker.py")
        flags = [str(action_dim), json.dumps(sizes), str(int(args.compile)), device.type]
        self.worker = Worker(f"{args.peer}'s process", [python, worker, data, *flags])

    def seconds(self, algorithm: str, updates: int) -> float:
        """How long so many updates took there."""
        return self.worker.ask(f"{algorithm} {updates}")


def learner_args(script: str):
    """The script's defaults."""
    return importlib.import_module(script).Args()


def main(args: Args) -> None:
    scripts = SCRIPTS[args.peer]
    for algorithm in args.algorithms or ():
        if algorithm not in scripts:
            raise InputError(f"--algorithms {algorithm}: {nearest(algorithm, scripts)}")
    if args.compile and args.peer != "d3rlpy":
        raise InputError("--compile is d3rlpy's")
    check_outputs(args.json)
    device = pick_device(args)
    dataset = datasets.load(args.env)
    data = makers.built_in_path(*datasets.parse_env(args.env), len(dataset))
    replays = {n: Replay(dataset, n, 1, len(dataset) // 100, device) for n in args.num_seeds}
    peer = Peer(args, data, dataset.actions.shape[2], device)
    del dataset
    what = machine(device) | {args.peer: VERSIONS[args.peer], "compiled": args.compile}
    print(introduction(args.env, what))
    ms = f"ms per agent, {args.peer}"
    print(f"\n| learner | seeds | {ms} | ours | times as fast, median | quartiles |")
    print("|---|---|---|---|---|---|", flush=True)
    rows = []
    record = {"args": vars(args), "machine": what, "ms_per_agent": rows}
    for algorithm in args.algorithms or scripts:
        calls = {}
        for num_seeds, replay in replays.items():
            calls[num_seeds] = offline_update(scripts[algorithm], replay, device)
        peer.seconds(algorithm, 4)  # builds its networks
        updates = max(2, round(2 * args.seconds / peer.seconds(algorithm, 2)))
        ours, theirs = {n: [] for n in calls}, []
        for _ in range(args.repetitions):
            theirs.append(1e3 * peer.seconds(algorithm, updates) / updates)
            once = times_of(calls, device, args.seconds, repetitions=1)
            for num_seeds, replay in replays.items():
                ours[num_seeds] += [ms / replay.num_groups for ms in once[num_seeds]]
        for num_seeds, times in ours.items():
            ratios = np.array(theirs) / np.array(times)
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            cells = f"{np.median(theirs):.2f} | {np.median(times):.2f} | {middle:.2f}"
            print(f"| {algorithm} | {num_seeds} | {cells} | {low:.2f} to {high:.2f} |", flush=True)
            rows.append(
                {"algorithm": algorithm, "seeds": num_seeds}
                | {f"ms_{args.peer}": theirs, "ms_ours": times}
            )
        if args.json:  # as soon as it is known: the whole takes long
            write_json(args.json, record)
    peer.worker.process.stdin.close()


def offline_update(script: str, replay: Replay, device: torch.device) -> Graphed:
    """A script's update on offline data."""
    if script in LEARNERS:
        agent, strategy, its_args = learner_of(script, replay, {"sampling": "offline"})
        update, kind_of = update_of(script, replay, agent, strategy, its_args)
        return Graphed(update, device.type == "cuda", kind_of)
    its_args = iql.Args(num_seeds=replay.num_seeds)
    with device:
        agent = iql.IQL(replay.num_groups, replay.obs.shape[2], replay.actions.shape[2], its_args)
    agent.measure_scales(replay)

    def update():
        return agent.update(replay.gather(replay.draw_offline(its_args.batch_size)))

    return Graphed(update, device.type == "cuda")


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
