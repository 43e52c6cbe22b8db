r"""Returns of OMSD's policies by score and over beta: critics and denoisers are trained once per
score and data set, then fresh policies per beta; of the score none, IQL's own policies, once.

    OMP_NUM_THREADS=1 python -m benchmarks.omsd_beta simple-spread-expert simple-spread-random \
        --csv FILE.csv

All seeds are stacked. A row per data set, split, score, beta and seed; what there is of the file is
kept, and what was measured with the same settings is not measured again.
"""

import copy
import csv
import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

import omsd
from benchmarks import check_outputs, write_csv
from common import InputError, cli, datasets
from common.datasets import parse_env
from common.device import pick_device
from common.envs import make_vec, normalized_score
from common.loop import episode_returns
from common.replay import Replay

Score = Literal["none", "independent", "decomposed", "joint"]


@dataclass
class Args:
    envs: tyro.conf.Positional[tuple[str, ...]]
    """task-quality, any number"""
    csv: str
    """file for the raw numbers"""
    scores: tuple[Score, ...] = ("none", "independent", "decomposed")
    betas: tuple[float, ...] = ()
    """default: the data set's own"""
    num_seeds: int = 5
    episodes: int = 100
    """per seed"""
    model_updates: int = 2000
    policy_updates: int = 600
    device: cli.Device = "cpu"
    settings: omsd.Args = field(default_factory=omsd.Args)
    """of the script"""


def train(agent, replay: Replay, kind: str, updates: int, batch: int) -> float:
    """Seconds per update."""
    begun = time.process_time()
    for _ in range(updates):
        index = replay.draw_offline(batch)[:: agent.N].repeat_interleave(agent.N, dim=0)
        agent.update(replay.gather(index), kind)
    return (time.process_time() - begun) / updates


def main(args: Args) -> None:
    check_outputs(args.csv)
    rows = []
    if Path(args.csv).exists():
        rows = list(csv.DictReader(Path(args.csv).read_text().splitlines()))
    if rows and not columns_of(args, args.settings, 0.0).keys() <= rows[0].keys():
        raise InputError(f"{args.csv} does not say how it was made: name another file")
    its = {"num_seeds": args.num_seeds, "policy_updates": args.policy_updates}
    its["offline_updates"] = args.model_updates + args.policy_updates
    for env, score in ((env, score) for env in args.envs for score in args.scores):
        settings = dataclasses.replace(args.settings, **its, env=env, score=score)
        betas = (args.betas if score != "none" else ()) or (omsd.preset(settings)["beta"],)
        left = []
        for beta in dict.fromkeys(betas):
            columns = columns_of(args, settings, beta)
            found = sum(all(str(row[k]) == str(v) for k, v in columns.items()) for row in rows)
            if found not in (0, args.num_seeds):
                raise InputError(
                    f"{args.csv} has {found} rows of {env} {score} beta {beta}, not "
                    f"--num-seeds {args.num_seeds}: cut short? Name another file"
                )
            if found:
                print(f"{env} {score} beta {beta}: in {args.csv} already")
            else:
                left.append(beta)
        if left:
            rows += measure(args, settings, left)
            write_csv(args.csv, rows)


def columns_of(args: Args, settings: omsd.Args, beta: float) -> dict:
    """What the numbers of a row depend on, beside its seed."""
    columns = {"env": settings.env, "split": settings.split or "", "score": settings.score}
    columns["beta"] = "" if settings.score == "none" else beta
    names = "num_seeds", "episodes", "model_updates", "policy_updates"
    columns |= {name: getattr(args, name) for name in names}
    default = vars(omsd.Args())
    given = [f"{k}={v}" for k, v in vars(args.settings).items() if v != default[k]]
    return columns | {"settings": " ".join(given)}


def measure(args: Args, settings: omsd.Args, betas: tuple[float, ...]) -> list[dict]:
    pick_device(args)
    env, score = settings.env, settings.score
    task, S = parse_env(env)[0], args.num_seeds
    envs = make_vec(task, S * args.episodes, settings.seed, settings.split)
    data = datasets.load(env, settings.dataset, settings.dataset_size, settings.split)
    sizes = S * envs.num_agents, envs.obs_dim, envs.action_dim
    torch.manual_seed(settings.seed)
    replay, models = Replay(data, S, 0, 1), omsd.OMSD(*sizes, settings)
    models.measure_scales(replay)
    of_model = train(models, replay, "model", args.model_updates, settings.batch_size)
    rows = []
    for beta in betas:
        torch.manual_seed(settings.seed + 1)  # whichever betas come before
        agent = copy.deepcopy(models)
        agent.settings["beta"] = beta
        of_policy = train(agent, replay, "policy", args.policy_updates, settings.batch_size)
        returns = episode_returns(envs, agent, S, (settings.seed, 0), torch.device("cpu"))
        for s, its in enumerate(returns):
            mean = sum(its) / len(its)
            rows.append(
                columns_of(args, settings, beta)
                | {
                    "seed": settings.seed + s,
                    "mean_return": mean,
                    "normalized_score": float(normalized_score(task, mean)),
                    "data_return": data.mean_return(),
                    "policy_q": agent.report()["losses/policy_q"][s * agent.N].item(),
                    "model_update_ms": 1000 * of_model,
                    "policy_update_ms": 1000 * of_policy,
                }
            )
        scores = torch.tensor([row["normalized_score"] for row in rows[-S:]])
        mean, std = scores.mean(), scores.std(correction=0)
        print(f"{env} {score} beta {beta}: {mean:.1f} +- {std:.1f}", flush=True)
    return rows


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
