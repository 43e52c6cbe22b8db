"""Why OMAR samples: on a critic with two peaks the policy gradient climbs the nearer one.

    python -m benchmarks.omar_sampler --csv sampler.csv --figure sampler.png

One action dimension; 1,000 policies start at the lower peak's foot. Prints the share of them that
ends at the higher peak, by gradient ascent and by the sampler with one to many samples a round.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

import omar
from benchmarks import check_outputs, write_csv, write_figure
from common import cli


@dataclass
class Args:
    csv: str | None = None
    """file for the shares"""
    figure: str | None = None
    """PNG file"""
    start: Annotated[float, cli.Range(-1, 1)] = -0.4
    """the policies' action"""
    states: int = 1000
    """states, each with its own noise"""


def two_peaks(obs, actions):
    """Q of height 1 at -0.6, broad, and 2 at 0.7, narrow."""
    a = actions[..., 0]
    return torch.exp(-((a + 0.6) ** 2) / 0.18) + 2 * torch.exp(-((a - 0.7) ** 2) / 0.05)


def climb(start: torch.Tensor, steps: int = 2000, rate: float = 0.01) -> torch.Tensor:
    """Gradient ascent on Q from actions (1, states, 1)."""
    action = start.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(two_peaks(None, action).sum(), action)
        action.data += rate * gradient
    return action.detach()


def sample(start: torch.Tensor, **options) -> torch.Tensor:
    """The sampler's best actions (1, states, 1)."""
    torch.manual_seed(0)
    agent = omar.OMAR(1, 1, 1, omar.Args(**options))
    agent.qf.first = two_peaks
    team = torch.zeros(1, start.shape[1], 1, 1)
    return agent.best_actions(team, team, start)[0]


def main(args: Args) -> None:
    check_outputs(args.csv, figure=args.figure)
    start = torch.full((1, args.states, 1), args.start)
    found = {"gradient": climb(start)}
    for refit in ("softmax", "elite"):
        for samples in (5, 10, 20, 40):
            options = {"refit": refit, "sampler_samples": samples, "elites": min(5, samples)}
            found[f"{refit}, {samples} samples"] = sample(start, **options)
    rows = []
    for name, actions in found.items():
        q = two_peaks(None, actions)
        share = (actions > 0.4).float().mean().item()
        rows.append({"method": name, "share_at_higher_peak": share, "mean_q": q.mean().item()})
        print(f"{name:22} at the higher peak {100 * share:5.1f} %   mean Q {q.mean():.2f}")
    if args.csv:
        write_csv(args.csv, rows)
    if args.figure:
        from matplotlib import pyplot as plt

        a = torch.linspace(-1, 1, 401).view(1, -1, 1)
        plt.figure(figsize=(7, 3))
        plt.plot(a.flatten(), two_peaks(None, a).flatten(), color="black", label="Q(s, a)")
        q_start = two_peaks(None, start[:, :1]).flatten()
        plt.plot(start[0, :1, 0], q_start, "o", color="black", label="policy")
        for name, marker in (("softmax, 10 samples", "x"), ("gradient", "^")):
            actions = found[name][0, :60, 0]
            q = two_peaks(None, found[name][:, :60]).flatten()
            plt.plot(actions, q, marker, label=name, markersize=9)
        plt.xlabel("action")
        plt.legend()
        plt.tight_layout()
        write_figure(args.figure, plt.gcf(), 120)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
