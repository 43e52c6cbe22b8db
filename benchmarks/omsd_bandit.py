r"""Where OMSD's policies end on the bandit: score x weighting x beta, beside the exact solution.

    OMP_NUM_THREADS=1 python -m benchmarks.omsd_bandit --csv FILE.csv --fields FIELDS.csv
    python -m benchmarks.omsd_bandit --draw --csv FILE.csv --fields FIELDS.csv

Critics and denoisers are trained once per score, all seeds stacked; every weighting and beta then
moves fresh policies, the same of every seed at the start. The exact solution follows the same
drives by the scores of the data's density (its clipping left out) and the gradient of a1 a2 from
where each seed's policies start. --draw makes the two figures of docs/omsd.md of both files.
"""

import copy
import csv
import dataclasses
import itertools
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import omsd
from benchmarks import check_outputs, write_csv, write_figure
from benchmarks.omsd_beta import train
from common import InputError, cli, datasets
from common.device import pick_device
from common.envs.bandit import MODES
from common.replay import Replay

SCORES = ("decomposed", "independent", "joint")
WEIGHTINGS = ("vds 0.98", "one 0.98", "ratio 0.98", "ratio 0.2")
"""--score-weight and --t-max; the first is the published one"""
STD = 0.1


@dataclass
class Args:
    csv: str
    """file for the final actions, a row per setting and seed"""
    fields: str
    """file for the scores on a grid of both actions, the first seed's"""
    draw: bool = False
    """only draw the figures, from the files"""
    env: str = "bandit-2"
    scores: tuple[str, ...] = SCORES
    weightings: tuple[str, ...] = WEIGHTINGS
    num_seeds: int = 5
    betas: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0, 3.0)
    model_updates: int = 2500
    policy_updates: int = 800
    model_batch: int = 256
    policy_batch: int = 64
    learning_rate: float = 1e-3
    hidden_size: int = 64
    denoiser_size: int = 32
    dropout: cli.Share = 0.0
    control_variate: bool = True
    device: cli.Device = "cpu"


# --- Exact ---


def exact_noise(x, t, log_odds):
    """E[z | alpha a + sigma z = x] for a of N(+-.8, .1^2) in every one of the last dimension's
    entries, the same sign in all; `log_odds` of the positive sign before x is seen."""
    alpha, sigma = omsd.noise_schedule(t)
    mean, variance = alpha * MODES[1], (alpha * STD) ** 2 + sigma**2
    sign = torch.tanh((log_odds + 2 * mean * x.sum(-1, keepdim=True) / variance) / 2)
    return sigma * (x - mean * sign) / variance


def exact_drive(actions, score: str, weight: str, t_range, num_t=24):
    """The mean over t and z of the weighted noise in actions (S, 2): (S, 2)."""
    num_z = 6 if score == "joint" else 12  # of each action
    nodes, weights = (torch.as_tensor(x) for x in np.polynomial.hermite_e.hermegauss(num_z))
    weights = weights / weights.sum()
    t = t_range[0] + (t_range[1] - t_range[0]) * (torch.arange(num_t) + 0.5) / num_t
    t = t.double().view(-1, 1, 1, 1)
    alpha, sigma = omsd.noise_schedule(t)
    if score == "joint":
        z = torch.cartesian_prod(nodes, nodes).unsqueeze(1)  # (z, 1, 2)
        of_z = torch.cartesian_prod(weights, weights).prod(1)
        found = exact_noise(alpha * actions + sigma * z, t, 0.0)
    else:
        z, of_z = nodes.view(-1, 1, 1), weights
        log_odds = torch.zeros_like(actions)
        if score == "decomposed":
            log_odds[:, 1] = 2 * MODES[1] * actions[:, 0] / STD**2
        noised = (alpha * actions + sigma * z).unsqueeze(-1)  # each action by itself
        found = exact_noise(noised, t.unsqueeze(-1), log_odds.unsqueeze(-1)).squeeze(-1)
    weighted = omsd.WEIGHTS[weight](alpha, sigma) * found  # (t, z, S, 2)
    return torch.einsum("tzsa,z->sa", weighted, of_z) / num_t


def exact_end(start, score, weight, t_range, beta, steps=600, rate=0.05):
    """Where actions (S, 2) come to rest."""
    actions = start.double()
    for _ in range(steps):
        drive = exact_drive(actions, score, weight, t_range) - beta * actions.flip(1)
        actions = (actions - rate * drive / (1 + beta)).clamp(-1, 1)
    return actions


# --- Learned ---


def learner(args: Args, score: str, **options):
    its = {k: getattr(args, k) for k in ("num_seeds", "learning_rate", "hidden_size", "dropout")}
    its |= {"denoiser_size": args.denoiser_size, "policy_updates": args.policy_updates}
    its["control_variate"] = args.control_variate
    total = args.model_updates + args.policy_updates
    settings = omsd.Args(env=args.env, score=score, offline_updates=total, **its, **options)
    torch.manual_seed(1)
    return omsd.OMSD(2 * args.num_seeds, 5, 1, settings)


def actions_of(agent) -> torch.Tensor:
    """(S, 2)"""
    return agent.act(torch.ones(2 * agent.S, 1, 5)).view(agent.S, 2)


def weighting(text: str) -> tuple[str, float]:
    """A --score-weight and a --t-max; raises InputError for others."""
    found = re.fullmatch(r"(\w+) (0?\.\d+)", text)
    if not found or found[1] not in omsd.WEIGHTS:
        raise InputError(f"--weightings {text!r}: expected such as {WEIGHTINGS[0]!r}")
    return found[1], float(found[2])


def measure(args: Args) -> None:
    weightings = [weighting(text) for text in args.weightings]
    check_outputs(args.csv, args.fields)
    pick_device(args)
    data = datasets.load(args.env)
    rows, fields = [], []
    for score in args.scores:
        begun = time.time()
        models = learner(args, score)
        replay = Replay(data, args.num_seeds, 0, 1)
        models.measure_scales(replay)
        train(models, replay, "model", args.model_updates, args.model_batch)
        print(f"{score}: models in {time.time() - begun:.0f} s", flush=True)
        fields += field_rows(models, score)
        for (weight, t_max), beta in itertools.product(weightings, args.betas):
            agent = learner(args, score, score_weight=weight, t_max=t_max, beta=beta)
            state = copy.deepcopy(models.state_dict())
            agent.load_state_dict(state)
            start = actions_of(agent).clone()
            train(agent, replay, "policy", args.policy_updates, args.policy_batch)
            ends = actions_of(agent)
            exact = exact_end(start, score, weight, (0.02, t_max), beta)
            for s in range(args.num_seeds):
                rows.append(
                    {
                        "score": score,
                        "weight": weight,
                        "t_min": 0.02,
                        "t_max": t_max,
                        "beta": beta,
                        "seed": 1 + s,
                        **dict(zip(("start_1", "start_2"), start[s].tolist(), strict=True)),
                        **dict(zip(("a_1", "a_2"), ends[s].tolist(), strict=True)),
                        "reward": ends[s].prod().item(),
                        **dict(zip(("exact_1", "exact_2"), exact[s].tolist(), strict=True)),
                        "exact_reward": exact[s].prod().item(),
                    }
                )
            found, right = ends.prod(1), exact.prod(1)
            print(
                f"{score:12} {weight:6} [.02, {t_max}] beta {beta:<4} reward {found.mean():5.2f} "
                f"+- {found.std(correction=0):.2f}   exact {right.mean():5.2f} "
                f"+- {right.std(correction=0):.2f}",
                flush=True,
            )
        write_csv(args.csv, rows)
        write_csv(args.fields, fields)
    print(dataclasses.asdict(args))


def field_rows(agent, score: str, t_range=(0.02, 0.2), samples: int = 1000) -> list[dict]:
    """The drive of --score-weight ratio at --beta 0 on a grid of actions: learned and exact."""
    rows, line = [], torch.linspace(-1, 1, 11)
    probe = copy.deepcopy(agent)
    probe.settings |= {"score_weight": "ratio", "t_max": t_range[1], "beta": 0.0}
    for a1, a2 in torch.cartesian_prod(line, line).tolist():
        one = torch.tensor([a1, a2]).repeat(agent.S).view(-1, 1, 1).expand(-1, samples, 1)
        obs = agent.scaled(torch.ones(2 * agent.S, samples, 5))
        learned = probe.drives(obs, one)[0].mean(1).view(agent.S, 2)[0]
        (exact,) = exact_drive(torch.tensor([[a1, a2]]).double(), score, "ratio", t_range)
        row = {"score": score, "a_1": round(a1, 3), "a_2": round(a2, 3)}
        row |= {"drive_1": learned[0].item(), "drive_2": learned[1].item()}
        rows.append(row | {"exact_1": exact[0].item(), "exact_2": exact[1].item()})
    return rows


# --- Figures ---


def read(path: str) -> list[dict]:
    with open(path) as file:
        return [
            {k: v if k in ("score", "weight") else float(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def square(axes, title: str) -> None:
    """The square of both actions with the data's two clouds."""
    from matplotlib.patches import Circle

    for mode, radius in itertools.product(MODES, (STD, 2 * STD)):
        axes.add_patch(Circle((mode, mode), radius, color="black", alpha=0.12, linewidth=0))
    axes.set(xlim=(-1.08, 1.08), ylim=(-1.08, 1.08), aspect="equal", xticks=[-1, 0, 1])
    axes.set(yticks=[-1, 0, 1])
    axes.set_title(title, fontsize=8)
    axes.tick_params(labelsize=7)


def draw(args: Args) -> None:
    from matplotlib import pyplot as plt

    figures = Path(__file__).parents[1] / "docs" / "figures"
    rows, betas = read(args.csv), args.betas
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(betas)))
    fig, grid = plt.subplots(3, 4, figsize=(9.5, 7.6), sharex=True, sharey=True)
    for (i, score), (j, (weight, t_max)) in itertools.product(
        enumerate(SCORES), enumerate((w, float(t)) for w, t in map(str.split, WEIGHTINGS))
    ):
        axes = grid[i, j]
        square(axes, f"{score}\n{weight}, t in [.02, {t_max}]")
        if (score, weight, t_max) not in {(r["score"], r["weight"], r["t_max"]) for r in rows}:
            axes.set_axis_off()
            axes.set_title("not measured", fontsize=8)
        for beta, colour in zip(betas, colours, strict=True):
            its = [
                row
                for row in rows
                if (row["score"], row["weight"], row["t_max"], row["beta"])
                == (score, weight, t_max, beta)
            ]
            x, y, exact_x, exact_y = (
                [row[name] for row in its] for name in ("a_1", "a_2", "exact_1", "exact_2")
            )
            axes.scatter(exact_x, exact_y, s=60, facecolors="none", edgecolors=[colour])
            axes.scatter(x, y, s=9, color=[colour], label=f"beta {beta:g}")
    grid[0, 0].legend(fontsize=6, loc="upper left")
    fig.supxlabel("agent 0's action", fontsize=9)
    fig.supylabel("agent 1's action", fontsize=9)
    fig.tight_layout()
    write_figure(figures / "omsd_bandit.png", fig, 110)

    rows = read(args.fields)
    fig, grid = plt.subplots(2, 3, figsize=(8.5, 5.9), sharex=True, sharey=True)
    for (j, score), (i, kind) in itertools.product(
        enumerate(SCORES), enumerate(("drive", "exact"))
    ):
        its = [row for row in rows if row["score"] == score]
        square(grid[i, j], f"{score}, {'learned' if kind == 'drive' else 'exact'}")
        x, y, u, v = (
            np.array([row[name] for row in its])
            for name in ("a_1", "a_2", f"{kind}_1", f"{kind}_2")
        )
        grid[i, j].quiver(x, y, -u, -v, angles="xy", scale=45, width=0.006, color="tab:blue")
    fig.supxlabel("agent 0's action", fontsize=9)
    fig.supylabel("agent 1's action", fontsize=9)
    fig.tight_layout()
    write_figure(figures / "omsd_fields.png", fig, 110)


def main(args: Args) -> None:
    if args.draw:
        draw(args)
    else:
        measure(args)


if __name__ == "__main__":
    import tyro

    cli.cli(main, Args, tyro.cli)
