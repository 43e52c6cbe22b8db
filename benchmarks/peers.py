"""Our learners beside d3rlpy's: updates per second and agent, the same networks, batches, numbers
of sampled actions and data (d3rlpy holds its first 100,000 transitions), one thread each, in turn;
on a CPU in processor time.

    OMP_NUM_THREADS=1 python -m benchmarks.peers --json peers.json

d3rlpy needs other versions of our requirements; this makes an environment of its own for it, once.
Both draw their batches as they do in training. d3rlpy trains one agent at a time; ours train two
agents, and with five seeds ten, in one update: the ratio is d3rlpy's time per update over ours per
agent and seed.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks import write, write_json
from benchmarks.speed import introduction, learner_of, machine, times_of, update_of
from common import cache_dir, cli, datasets
from common.datasets import makers
from common.device import Graphed, pick_device
from common.replay import Replay

VERSION = "2.8.1"
SCRIPTS = {"BCQ": "otc_bcq", "AWAC": "otc_awac", "CQL": "otc_cql", "TD3BC": "otc_td3bc"}


@dataclass
class Args:
    algorithms: tuple[str, ...] = tuple(SCRIPTS)
    """learners to time"""
    env: str = "halfcheetah-medium"
    """built-in data; its values do not matter"""
    num_seeds: tuple[int, ...] = (1, 5)
    """seeds trained together here"""
    repetitions: int = 7
    """rounds through everything"""
    seconds: float = 0.5
    """least time that each side is run for in a round"""
    environment: Path = cache_dir() / f"d3rlpy-{VERSION}"
    """d3rlpy's virtual environment, made where there is none"""
    compile: bool = False
    """d3rlpy's compiled mode"""
    device: str = "auto"
    """auto, cpu or cuda"""
    json: str | None = None
    """file for the raw times"""


class Peer:
    """d3rlpy in a process of its own; called as one of our updates would be, in turn with them."""

    def __init__(self, args: Args, data: Path, action_dim: int, device: torch.device):
        python = args.environment / "bin" / "python"
        complete = args.environment / "complete"
        if not complete.exists():
            print(f"making d3rlpy's environment in {args.environment}")
            subprocess.run([sys.executable, "-m", "venv", args.environment], check=True)
            packages = [f"d3rlpy=={VERSION}", f"torch=={torch.__version__.split('+')[0]}"]
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
            complete.touch()
        worker = Path(__file__).with_name("d3rlpy_worker.py")
        hidden = [str(learner_args(a).hidden_size) for a in ("BCQ", "TD3BC")]
        flags = [str(action_dim), *hidden, str(int(args.compile)), device.type]
        self.process = subprocess.Popen(
            [python, worker, data, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def seconds(self, algorithm: str, updates: int) -> float:
        """How long so many updates took there."""
        self.process.stdin.write(f"{algorithm} {updates}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def learner_args(algorithm: str):
    """The script's defaults, without OTC."""
    module = __import__(SCRIPTS[algorithm])
    return module.Args(sampling="uniform")


def main(args: Args) -> None:
    if args.json:
        write(args.json, "", mode="a")  # refused before and not after the measurement
    device = pick_device(args)
    dataset = datasets.load(args.env)
    data = makers.built_in_path(*datasets.parse_env(args.env), len(dataset))
    replays = {n: Replay(dataset, n, 1, len(dataset) // 100, device) for n in args.num_seeds}
    peer = Peer(args, data, dataset.actions.shape[2], device)
    del dataset
    what = machine(device) | {"d3rlpy": VERSION, "compiled": args.compile}
    print(introduction(args.env, what))
    print("\n| learner | seeds | ms per agent, d3rlpy | ours | times as fast, median | quartiles |")
    print("|---|---|---|---|---|---|", flush=True)
    rows = []
    record = {"args": vars(args), "machine": what, "ms_per_agent": rows}
    for algorithm in args.algorithms:
        calls = {}
        for num_seeds, replay in replays.items():
            calls[num_seeds] = offline_update(SCRIPTS[algorithm], replay, device)
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
                {"algorithm": algorithm, "seeds": num_seeds, "ms_d3rlpy": theirs, "ms_ours": times}
            )
        if args.json:  # as soon as it is known: the whole takes long
            write_json(args.json, record)
    peer.process.stdin.close()


def offline_update(script: str, replay: Replay, device: torch.device) -> Graphed:
    """A script's update on offline data."""
    agent, strategy, its_args = learner_of(script, replay, {"sampling": "offline"})
    update, kind_of = update_of(script, replay, agent, strategy, its_args)
    return Graphed(update, device.type == "cuda", kind_of)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
