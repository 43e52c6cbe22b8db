"""What one fine-tuning update of every script costs with each sampling strategy, against uniform
sampling.

    OMP_NUM_THREADS=1 python -m benchmarks.update_cost --env halfcheetah-medium

The strategies of a script are timed in turn within every repetition, so that whatever else the
machine does falls on all of them; the table shows medians over the repetitions, and ratios within
them. BREMEN's time is that of an update of its models; its improvement of the policy, once in
`--improve-every` updates whatever the strategy, is timed by itself.
"""

import importlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import tyro

from common import datasets, runs
from common.datasets import TeamDataset
from common.replay import Replay

LEARNERS = {
    "otc_bcq": "BCQ",
    "otc_awac": "AWAC",
    "otc_cql": "CQL",
    "otc_td3bc": "TD3BC",
    "otc_bremen": "BREMEN",
}
STRATEGIES = {
    "uniform": {"sampling": "uniform"},
    "otc (value)": {"sampling": "otc", "distance": "value"},
    "otc (embedding)": {"sampling": "otc", "distance": "embedding"},
    "balanced": {"sampling": "balanced"},
}


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(LEARNERS)
    """scripts to time"""
    env: str = "halfcheetah-medium"
    """built-in data; its values do not matter"""
    num_seeds: int = 1
    """seeds trained together"""
    repetitions: int = 20
    """rounds through all strategies"""
    updates: int = 20
    """updates of a strategy per round; an even number, for TD3+BC's delay"""
    device: str = "auto"
    """auto, cpu or cuda"""
    json: str | None = None
    """file for the raw times"""


def fill(dataset: TeamDataset, num_seeds: int, device: torch.device) -> Replay:
    """A replay whose one deployment is 1 % of the offline data, drawn from it."""
    steps = len(dataset) // 100
    replay = Replay(dataset, num_seeds, 1, steps, device)
    rows = np.random.default_rng(0).integers(len(dataset), size=(num_seeds, steps))
    obs, next_obs = (
        np.repeat(x[rows], replay.num_agents // x.shape[1], axis=2)
        for x in (dataset.obs, dataset.next_obs)
    )
    actions, rewards = dataset.actions[rows], dataset.rewards[rows]
    replay.add(obs, actions, rewards, next_obs, dataset.terminations[rows])
    return replay


def updates_of(script: str, replay: Replay, graph: bool) -> dict[str, Callable]:
    """The fine-tuning update of each strategy of a script, as functions of the update's number."""
    module, calls = importlib.import_module(script), {}
    for name, options in STRATEGIES.items():
        args = module.Args(**options)
        with replay.device:
            learner = getattr(module, LEARNERS[script])
            agent = learner(replay.num_groups, replay.obs.shape[2], replay.actions.shape[2], args)
            transitions = module.TransitionSampler(replay, args)
        if hasattr(agent, "measure_scales"):
            agent.measure_scales(replay)
        transitions.start_deployment(agent, 1)

        def update(*kind, agent=agent, transitions=transitions):
            index = transitions.draw(agent)
            losses = agent.update(replay.gather(index), *kind)
            return losses | transitions.diagnostics(index)

        kind_of = None
        if script == "otc_td3bc":
            kind_of = lambda number, delay=args.policy_delay: number % delay == 0  # noqa: E731
        elif script == "otc_bremen":
            kind_of = lambda number: "fit"  # noqa: E731
        calls[name] = runs.Graphed(update, graph, kind_of)
    if script == "otc_bremen":
        improve = lambda: agent.improve(  # noqa: E731
            replay.gather(replay.draw_merged(args.rollouts))["obs"]
        )
        calls["improvement"] = runs.Graphed(improve, graph)
    return calls


def main(args: Args) -> None:
    device = runs.pick_device(args)
    replay = fill(datasets.load(args.env), args.num_seeds, device)

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    what = f"{machine or platform.machine()}, torch {torch.__version__}"
    what += f", {torch.get_num_threads()} thread(s)"
    print(f"{args.env}, {args.num_seeds} seed(s) x {replay.num_agents} agents, {what}\n")
    print("| script | update | ms, median | over uniform, median | quartiles |")
    print("|---|---|---|---|---|", flush=True)
    times = {}  # milliseconds per update
    for script in args.scripts:
        calls = updates_of(script, replay, device.type == "cuda")
        times[script] = {name: [] for name in calls}
        for repetition in range(args.repetitions + 1):
            for name, call in calls.items():
                count = 1 if name == "improvement" else args.updates
                wait()
                start = time.perf_counter()
                for number in range(count):
                    call(number)
                wait()
                if repetition > 0:  # the first round warms up
                    elapsed = time.perf_counter() - start
                    times[script][name].append(1e3 * elapsed / count)
        base = np.array(times[script]["uniform"])
        for name, milliseconds in times[script].items():
            low, middle, high = np.quantile(np.array(milliseconds) / base, [0.25, 0.5, 0.75])
            ratios = f"{middle:.2f} | {low:.2f} to {high:.2f}"
            print(f"| {script} | {name} | {np.median(milliseconds):.1f} | {ratios} |", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"args": vars(args), "machine": what, "ms_per_update": times}, file, indent=1)


if __name__ == "__main__":
    main(tyro.cli(Args))
