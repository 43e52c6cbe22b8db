"""Processor time per update of the scripts for offline coordination, at their defaults.

    python -m benchmarks.team_speed --csv team_speed.csv

On reacher-full-expert-mix, one core; processor time, so that other work on the machine counts
little. MOMA-PPO's updates are of two kinds, and those of the policies depend on the history.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

import bc
import iql
import maiql
import matd3bc
import moma_ppo
from benchmarks import check_outputs, write_csv
from common import cli
from common.datasets import load
from common.device import keep_freed_memory, multiply_by_onednn
from common.replay import Replay


@dataclass
class Args:
    csv: str | None = None
    """file for the raw numbers"""
    num_seeds: tuple[int, ...] = (1, 5)
    """seeds that train together"""
    dataset_size: int = 50_000
    """transitions"""


def milliseconds(update: Callable[[], object], count: int) -> float:
    """Processor time of an update, the mean of `count` after one."""
    update()
    start = time.process_time()
    for _ in range(count):
        update()
    return 1e3 * (time.process_time() - start) / count


def updates(replay: Replay, S: int) -> dict[str, tuple[Callable, int]]:
    """By name: an update, and how many to time."""
    G, obs_dim, action_dim = replay.num_groups, replay.obs.shape[2], replay.actions.shape[2]
    sizes = G, obs_dim, action_dim

    def made(kind, **options):
        args = kind[1](num_seeds=S, **options)
        agent = kind[0](*sizes, args)
        agent.measure_scales(replay)
        return agent, args

    def own(agent, args):
        return agent.update(replay.gather(replay.draw_offline(args.batch_size)))

    def team(agent, args, *turn):
        return agent.update(replay.gather_teams(replay.draw_teams(args.batch_size)), *turn)

    def fit(agent, args):
        size = args.num_models * args.batch_size
        return agent.fit(replay.gather_teams(replay.draw_teams(size)))

    def improve(agent, args):
        index = replay.draw_teams(args.transitions)
        history = replay.gather_history(index, args.history)
        return agent.improve(replay.gather_teams(index) | {"history": history})

    def finetune(agent, args):
        agent.imagine(replay.gather_teams(replay.draw_teams(args.rollout_length))["obs"])
        return agent.update(agent.imagined.draw_with(replay, args.batch_size))

    of_moma = moma_ppo.MOMAPPO, moma_ppo.Args
    cloner, learner = made((bc.BC, bc.Args)), made((iql.IQL, iql.Args))
    mixed, td3 = made((maiql.MAIQL, maiql.Args)), made((matd3bc.MATD3BC, matd3bc.Args))
    tuned = made((maiql.MAIQL, maiql.Args), finetune=True)
    short, long = made(of_moma, history=0), made(of_moma)
    return {
        "bc": (lambda: own(*cloner), 20),
        "iql": (lambda: own(*learner), 20),
        "maiql": (lambda: team(*mixed), 20),
        "maiql --finetune, model": (lambda: fit(*tuned), 10),
        "maiql --finetune, in the model": (lambda: finetune(*tuned), 3),
        "matd3bc, actors too": (lambda: team(*td3, True), 20),
        "moma_ppo, model": (lambda: fit(*short), 10),
        "moma_ppo, policies without history": (lambda: improve(*short), 2),
        "moma_ppo, policies": (lambda: improve(*long), 1),
    }


def main(args: Args) -> None:
    check_outputs(args.csv)
    torch.set_num_threads(1)
    keep_freed_memory()
    multiply_by_onednn()
    data, rows = load("reacher-full-expert-mix", size=args.dataset_size), []
    for S in args.num_seeds:
        for name, (update, count) in updates(Replay(data, S, 0, 1), S).items():
            rows.append({"update": name, "seeds": S, "ms": round(milliseconds(update, count), 1)})
            print(f"{name}, {S} seeds: {rows[-1]['ms']} ms", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of all together {peak:.0f} MB")
    if args.csv is not None:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
