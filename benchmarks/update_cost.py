"""What one fine-tuning update costs with each sampling strategy, against uniform sampling.

    OMP_NUM_THREADS=1 python -m benchmarks.update_cost --env halfcheetah-medium

The strategies are timed in turn within every repetition, so that whatever else the machine does
falls on all of them; the table shows medians over the repetitions, and ratios within them.
"""

import json
import platform
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro

import otc_bcq
from common import datasets, runs
from common.replay import Replay

STRATEGIES = {
    "uniform": {"sampling": "uniform"},
    "otc (embedding)": {"sampling": "otc", "distance": "embedding"},
    "otc (value, 1 action)": {"sampling": "otc", "distance": "value", "num_value_actions": 1},
    "otc (value, 10 actions)": {"sampling": "otc", "distance": "value", "num_value_actions": 10},
    "balanced": {"sampling": "balanced"},
}


@dataclass
class Args:
    env: str = "halfcheetah-medium"
    """built-in data; its values do not matter"""
    num_seeds: int = 1
    """seeds trained together"""
    repetitions: int = 20
    """rounds through all strategies"""
    updates: int = 20
    """updates of a strategy per round"""
    device: str = "auto"
    """auto, cpu or cuda"""
    json: str | None = None
    """file for the raw times"""


def main(args: Args) -> None:
    device = runs.pick_device(args)
    dataset = datasets.load(args.env)
    random = np.random.default_rng(0)
    calls = {}
    for name, options in STRATEGIES.items():
        options = otc_bcq.Args(env=args.env, **options)
        steps = len(dataset) // 100
        replay = Replay(dataset, args.num_seeds, 1, steps, device)
        rows = random.integers(len(dataset), size=(args.num_seeds, steps))
        N = replay.num_agents
        online = [np.repeat(x[rows], N, axis=2) for x in (dataset.obs, dataset.next_obs)]
        replay.add(online[0], dataset.actions[rows], dataset.rewards[rows], online[1],
                   dataset.terminations[rows])  # fmt: skip
        with device:
            obs_dim, action_dim = dataset.obs.shape[2], dataset.actions.shape[2]
            agent = otc_bcq.BCQ(replay.num_groups, obs_dim, action_dim, options)
            transitions = otc_bcq.TransitionSampler(replay, options)
        transitions.start_deployment(agent, 1)

        def update(agent=agent, replay=replay, transitions=transitions):
            index = transitions.draw(agent)
            return agent.update(replay.gather(index)) | transitions.diagnostics(index)

        calls[name] = runs.Graphed(update, device.type == "cuda")

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = {name: [] for name in calls}  # milliseconds per update
    for repetition in range(args.repetitions + 1):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(args.updates):
                call(0)
            wait()
            if repetition > 0:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start) / args.updates)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    what = f"{machine or platform.machine()}, torch {torch.__version__}"
    what += f", {torch.get_num_threads()} thread(s)"
    print(f"{args.env}, {args.num_seeds} seed(s) x {N} agents, {what}\n")
    print("| update | ms, median | over uniform, median | quartiles |\n|---|---|---|---|")
    base = np.array(times["uniform"])
    for name, milliseconds in times.items():
        ratio = np.array(milliseconds) / base
        low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
        print(
            f"| {name} | {np.median(milliseconds):.2f} | {middle:.2f} | {low:.2f} to {high:.2f} |"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"args": vars(args), "machine": what, "ms_per_update": times}, file, indent=1)


if __name__ == "__main__":
    main(tyro.cli(Args))
