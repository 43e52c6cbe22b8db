"""How long one fine-tuning update of every script takes: without OTC, with either distance, for one
seed and several, eagerly and as a CUDA graph, and where OTC's time goes.

    OMP_NUM_THREADS=1 python -m benchmarks.speed --json speed.json

The strategies of a script are timed in turn within every repetition, so that whatever else the
machine does falls on all of them; with one thread of a CPU it is processor time, in which that
counts little. The table shows medians over the repetitions, and ratios within them. The second
table has the shares of an eager update with OTC: draw (indices and rows), forward (networks for the
distances), match, rank (and the draw by rank), learner, and the rest. BREMEN's time is that of an
update of its models; its improvement of the policy, once in `--improve-every` updates whatever the
strategy, is timed by itself.
"""

import importlib
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import tyro

from benchmarks import check_outputs, write_json
from common import InputError, cli, code_version, datasets, nearest, sampler, strategies
from common.datasets import TeamDataset
from common.device import Graphed, pick_device
from common.replay import Replay

LEARNERS = {
    "otc_bcq": "BCQ",
    "otc_awac": "AWAC",
    "otc_cql": "CQL",
    "otc_cql_discrete": "DiscreteCQL",
    "otc_td3bc": "TD3BC",
    "otc_bremen": "BREMEN",
    "omar": "OMAR",
    "icq": "ICQ",
}
STRATEGIES = {
    "uniform": {"sampling": "uniform"},
    "otc (value)": {"sampling": "otc", "distance": "value"},
    "otc (embedding)": {"sampling": "otc", "distance": "embedding"},
    "otc (two-stage)": {"sampling": "otc", "distance": "two-stage"},
    "otc (raw)": {"sampling": "otc", "distance": "raw"},
    "otc (residual)": {"sampling": "otc", "distance": "residual"},
    "balanced": {"sampling": "balanced"},
}


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(LEARNERS)
    """scripts to time"""
    env: str = "halfcheetah-medium"
    """built-in data, its values do not matter; the discrete script gets random data of the shapes
    of 5m_vs_6m, which has five agents"""
    num_seeds: tuple[int, ...] = (1, 5, 10)
    """seeds trained together"""
    repetitions: int = 5
    """rounds through all strategies"""
    seconds: cli.Positive = 0.2
    """least time that a strategy is run for in a round"""
    device: cli.Device = "auto"
    """auto, cpu or cuda"""
    json: str | None = None
    """file for the raw times"""


def machine(device: torch.device) -> dict[str, str | int | float]:
    """What a time was measured on, and what else ran there."""
    info, caches = Path("/proc/cpuinfo"), Path("/sys/devices/system/cpu/cpu0/cache")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else ()
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    sizes = (
        [(cache / name).read_text().strip() for name in ("level", "type", "size")]
        for cache in sorted(caches.glob("index*"))
    )
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "family": cpu.get("cpu family", "unknown"),
        "model": cpu.get("model", "unknown"),
        "flags": cpu.get("flags", "unknown"),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "caches": ", ".join(f"L{level} {kind} {size}" for level, kind, size in sizes),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": code_version(),
    }


def introduction(env: str, what: dict) -> str:
    """The line above a table: the data, and the machine without its long list of flags."""
    return ", ".join([env, *(f"{key} {value}" for key, value in what.items() if key != "flags")])


def discrete_data() -> TeamDataset:
    """Random transitions of 5m_vs_6m's shapes, in which every action is legal."""
    n, num_agents, obs_dim, num_actions = 50_000, 5, 151, 11
    random = np.random.default_rng(0)
    obs, next_obs = (random.random((n, num_agents, obs_dim), np.float32) for _ in range(2))
    chosen = random.integers(num_actions, size=(n, num_agents))
    obs[..., -num_actions:] = next_obs[..., -num_actions:] = 1
    return TeamDataset(
        obs=obs,
        actions=np.eye(num_actions, dtype=np.float32)[chosen],
        rewards=random.random(n, np.float32),
        next_obs=next_obs,
        terminations=np.zeros(n, bool),
        truncations=np.arange(n) % 50 == 49,
        source="random",
        discrete=True,
    )


def fill(dataset: TeamDataset, num_seeds: int, device: torch.device) -> Replay:
    """A replay whose one deployment is 1 % of the offline data, at least 2,000 rows of it."""
    steps = max(2000, len(dataset) // 100)
    replay = Replay(dataset, num_seeds, 1, steps, device)
    rows = np.random.default_rng(0).integers(len(dataset), size=(num_seeds, steps))
    obs, next_obs = (
        np.repeat(x[rows], replay.num_agents // x.shape[1], axis=2)
        for x in (dataset.obs, dataset.next_obs)
    )
    actions, rewards = dataset.actions[rows], dataset.rewards[rows]
    replay.add(obs, actions, rewards, next_obs, dataset.terminations[rows])
    return replay


def learner_of(script: str, replay: Replay, options: dict):
    """A script's agent and sampler after one deployment, and its arguments."""
    module = importlib.import_module(script)
    args = module.Args(num_seeds=replay.num_seeds, **options)
    sizes = (replay.num_groups, replay.obs.shape[2], replay.actions.shape[2])
    with replay.device:
        agent = getattr(module, LEARNERS[script])(*sizes, args)
        strategy = strategies.make(replay, args, module.OTC)
    if hasattr(agent, "measure_scales"):
        agent.measure_scales(replay)
    strategy.start_deployment(agent, 1)
    return agent, strategy, args


def update_of(script: str, replay: Replay, agent, strategy, args) -> tuple[Callable, Callable]:
    """The fine-tuning update as in the script's main, and from its number to its kind."""
    gather = replay.gather_following if script == "icq" else replay.gather

    def update(*kind):
        index = strategy.draw(agent)
        losses = agent.update(gather(index), *kind)
        return losses | strategy.diagnostics(index)

    kind_of = None
    if script == "otc_bremen":  # its improvement is timed by itself
        kind_of = lambda number: "fit"  # noqa: E731
    elif hasattr(agent, "kind"):
        kind_of = lambda number: agent.kind(number, False)  # noqa: E731
    return update, kind_of


def improvement_of(replay: Replay, agent, args) -> Callable:
    """BREMEN's improvement of its policy."""
    return lambda: agent.improve(replay.gather(replay.draw_merged(args.rollouts))["obs"])


def stages_of(script: str, replay: Replay, options: dict, updates: int) -> dict[str, float]:
    """Share of an eager update's time by stage."""
    agent, strategy, args = learner_of(script, replay, options)
    update, kind_of = update_of(script, replay, agent, strategy, args)
    spent, running = defaultdict(float), ["rest"]
    last = None

    def switch():
        nonlocal last
        if replay.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if last is not None:
            spent[running[-1]] += now - last
        last = now

    def patch(owner, name, stage):
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            switch()
            # What the learner calls inside its update is the learner's.
            running.append("learner" if running[-1] == "learner" else stage)
            try:
                return function(*args, **kwargs)
            finally:
                switch()
                running.pop()

        return mock.patch.object(owner, name, timed)

    patches = [patch(replay, name, "draw") for name in ("draw_merged", "draw_latest", "gather")]
    patches += [patch(agent, name, "forward") for name in ("q_value", "value")]
    if strategy.embedding is not None:
        patches.append(patch(strategy.embedding, "place", "forward"))
    patches += [
        patch(sampler, "match_by_value", "match"),
        patch(sampler, "match_by_embedding", "match"),
        patch(sampler, "nearest_distance", "match"),
        patch(sampler, "draw_by_rank", "rank"),
        patch(agent, "update", "learner"),
    ]
    call = Graphed(update, False, kind_of)
    for number in range(2):
        call(number)
    for each in patches:
        each.start()
    switch()
    for number in range(updates):
        call(number)
    switch()
    for each in patches:
        each.stop()
    total = sum(spent.values())
    names = ("draw", "forward", "match", "rank", "learner", "rest")
    return {name: spent[name] / total for name in names}


def clock() -> Callable[[], float]:
    """Seconds of a CPU's: the processor's, which other work leaves alone, where there is one
    thread."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def times_of(calls: dict, device: torch.device, least: float, repetitions: int) -> dict:
    """Milliseconds per call of each function of the call's number, one per repetition, in turn; at
    least so many seconds of each in a repetition."""

    def seconds(call, count: int) -> float:
        if device.type != "cuda":
            now = clock()
            start = now()
            for number in range(count):
                call(number)
            return now() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for number in range(count):
            call(number)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    counts, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        seconds(call, 8 if device.type == "cuda" else 2)  # warm-up and capture
        pair = max(seconds(call, 2), 1e-5)  # two: TD3+BC's delay
        counts[name] = 2 * max(1, round(least / pair))
    for _ in range(repetitions):
        for name, call in calls.items():
            times[name].append(1e3 * seconds(call, counts[name]) / counts[name])
    return times


def exact_seconds(match: Callable, shape: tuple, device: torch.device) -> float:
    """Seconds that the exact mean distance of equation (4) spends in matching, one group."""
    share = 100 if shape and device.type == "cpu" else 1
    candidates = torch.randn(1, 1_000_000 // share, *shape, device=device)
    references = torch.randn(1, 10_000, *shape, device=device)
    found = times_of({"": lambda number: match(candidates, references)}, device, 0.0, 3)[""]
    return share * float(np.median(found)) / 1e3


def main(args: Args) -> None:
    for script in args.scripts:
        if script not in LEARNERS:
            raise InputError(f"--scripts {script}: {nearest(script, LEARNERS)}")
    check_outputs(args.json)
    device = pick_device(args)
    dataset = datasets.load(args.env)
    discrete = discrete_data() if "otc_cql_discrete" in args.scripts else None
    what = machine(device)
    print(introduction(args.env, what))
    print("\n| script | seeds | mode | update | ms, median | over uniform, median | quartiles |")
    print("|---|---|---|---|---|---|---|", flush=True)
    times, stages, exact = [], [], {}
    record = {"args": vars(args), "machine": what, "times": times, "stages": stages}
    record["exact_match_s"] = exact
    for num_seeds in args.num_seeds:
        continuous_replay = fill(dataset, num_seeds, device)
        discrete_replay = None if discrete is None else fill(discrete, num_seeds, device)
        for script in args.scripts:
            replay = discrete_replay if script == "otc_cql_discrete" else continuous_replay
            for mode in ("eager", "graph") if device.type == "cuda" else ("eager",):
                calls = {}
                for name, options in STRATEGIES.items():
                    agent, strategy, its_args = learner_of(script, replay, options)
                    update, kind_of = update_of(script, replay, agent, strategy, its_args)
                    calls[name] = Graphed(update, mode == "graph", kind_of)
                if script == "otc_bremen":
                    improve = improvement_of(replay, agent, its_args)
                    calls["improvement"] = Graphed(improve, mode == "graph")
                found = times_of(calls, device, args.seconds, args.repetitions)
                base = np.array(found["uniform"])
                for name, milliseconds in found.items():
                    low, middle, high = np.quantile(milliseconds / base, [0.25, 0.5, 0.75])
                    cells = script, num_seeds, mode, name, f"{np.median(milliseconds):.2f}"
                    ratios = f"{middle:.2f} | {low:.2f} to {high:.2f}"
                    print("|", *(f"{cell} |" for cell in cells), ratios, "|", flush=True)
                    row = {"script": script, "seeds": num_seeds, "mode": mode, "update": name}
                    times.append(row | {"ms": milliseconds})
            for name in ("otc (value)", "otc (embedding)"):
                share = stages_of(script, replay, STRATEGIES[name], 10)
                stages.append({"script": script, "seeds": num_seeds, "update": name, **share})
            if args.json:  # as soon as it is known: the whole takes long
                write_json(args.json, record)
    names = list(stages[0])[3:]
    print("\n| script | seeds | update |", *(f"{name}, % |" for name in names))
    print("|---|---|---|" + "---|" * len(names))
    for row in stages:
        shares = " | ".join(f"{100 * row[name]:.0f}" for name in names)
        print(f"| {row['script']} | {row['seeds']} | {row['update']} | {shares} |")
    exact["value"] = exact_seconds(sampler.match_by_value, (), device)
    # On a CPU on a hundredth of the candidates: the time is in proportion to them
    exact["embedding"] = exact_seconds(sampler.nearest_distance, (10,), device)
    print("\n1,000,000 candidates x 10,000 references, seconds of the match per group:", end=" ")
    print(", ".join(f"{name} {seconds:.2f}" for name, seconds in exact.items()))
    if args.json:
        write_json(args.json, record)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
