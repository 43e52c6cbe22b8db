r"""Does correcting the transitions pay where it must? A team so small that everything is exact.

    python -m benchmarks.tabular_team --csv tabular.csv --figure tabular.png

Two agents push one token on a 13 x 13 grid: s' = s + 2 a_1 + strength a_2, clipped to the grid. It
pays 1 to end a step on the goal or beside it. In the data both act uniformly at random; online the
partner has a fixed policy, "arbitrary" (another action in every cell, drawn once) or "smooth" (up
in the left half, left in the right one). Agent 1 starts from the exact Q of the data's dynamics and
fine-tunes by minibatch Q-learning over K deployments, from what a strategy draws. Strategies differ
in the draw alone; seeds are paired: same data, same partner.

Reported after the last deployment: the return (exact discounted value of the greedy policy with
today's partner, a mean over cells), the root mean square error of Q against the exact one, the
share of online transitions drawn in the last deployment and the share of the drawn transitions in
which the partner did what it does today.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro

from benchmarks import check_outputs, write_csv, write_figure
from common import InputError, cli, nearest, sampler

SIZE, GAMMA, NUM_ACTIONS = 13, 0.9, 5
MOVES = torch.tensor([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
CELLS = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE))  # (S, 2)
NUM_CELLS = len(CELLS)
GOAL = torch.tensor([SIZE - 3, SIZE - 3])
APART = (CELLS[:, None] - CELLS[None]).abs().sum(2).float()  # l1 of two cells (S, S)
NEARNESS = torch.exp(-2 * APART)


@dataclass
class Args:
    strategies: tyro.conf.Positional[tuple[str, ...]] = ()
    """names of `STRATEGIES`, each with its alpha as in oracle@2; default: all of the table"""
    partner: Literal["arbitrary", "smooth"] = "arbitrary"
    """its policy online"""
    strength: int = 2
    """how far the partner's actions move"""
    num_seeds: int = 20
    """trained together"""
    offline: int = 100_000
    """transitions of the data"""
    deployments: int = 5
    """K"""
    deployment_steps: int = 1000
    """M; an episode has 50"""
    finetune_updates: int = 1000
    """L"""
    candidates: int = 512
    """of a draw"""
    references: int = 500
    """of a draw"""
    reference_data: Literal["latest", "online"] = "latest"
    """what references are drawn from: the last deployment, or all of them"""
    batch_size: int = 128
    """transitions of an update"""
    learning_rate: float = 0.2
    """of Q-learning"""
    csv: str | None = None
    """file for the raw numbers, a row per strategy and seed"""
    figure: str | None = None
    """PNG file"""


# --- The world ---


def follow(s, a, b, strength: int) -> torch.Tensor:
    """The next cell."""
    xy = (CELLS[s] + 2 * MOVES[a] + strength * MOVES[b]).clamp(0, SIZE - 1)
    return xy[..., 0] * SIZE + xy[..., 1]


def reward(s_next) -> torch.Tensor:
    return ((CELLS[s_next] - GOAL).abs().sum(-1) <= 1).double()


def partner_of(kind: str) -> torch.Tensor:
    """Its action online in every cell, (S,)."""
    if kind == "smooth":
        return torch.where(CELLS[:, 1] < SIZE // 2, 2, 4)
    return torch.randint(NUM_ACTIONS, (NUM_CELLS,), generator=torch.Generator().manual_seed(0))


def exact_q(partner: torch.Tensor, strength: int) -> torch.Tensor:
    """Agent 1's optimal Q (S, A) with a partner's probabilities (S, A)."""
    s, a, b = torch.meshgrid(
        torch.arange(NUM_CELLS), *[torch.arange(NUM_ACTIONS)] * 2, indexing="ij"
    )
    s_next, q = follow(s, a, b, strength), torch.zeros(NUM_CELLS, NUM_ACTIONS).double()
    for _ in range(400):
        q = (partner[:, None] * (reward(s_next) + GAMMA * q.amax(1)[s_next])).sum(2)
    return q


def exact_return(q: torch.Tensor, partner: torch.Tensor, strength: int) -> torch.Tensor:
    """Discounted value of Q's greedy policy (..., S, A) with the partner of today: (...)."""
    s_next = follow(torch.arange(NUM_CELLS), q.argmax(-1), partner, strength)
    value = torch.zeros(s_next.shape).double()
    for _ in range(400):
        value = reward(s_next) + GAMMA * value.gather(-1, s_next)
    return value.mean(-1)


# --- What is drawn ---


class Data:
    """Transitions (s, a, s', b) of every seed, (G, n) each; b, the partner's action, is the
    oracle's alone. `latest`: those of the last deployment."""

    def __init__(self, args: Args, generator: torch.Generator):
        self.generator, G = generator, args.num_seeds
        s = torch.randint(NUM_CELLS, (G, args.offline), generator=generator)
        a, b = torch.randint(NUM_ACTIONS, (2, G, args.offline), generator=generator)
        self.all = torch.stack([s, a, follow(s, a, b, args.strength), b])  # (4, G, n)
        self.num_offline = args.offline
        # What an own action does on average in the data, (G, S * A, 2): the forward model
        key = s * NUM_ACTIONS + a
        moved = (CELLS[self.all[2]] - CELLS[s]).float()
        total = torch.zeros(G, NUM_CELLS * NUM_ACTIONS, 3)
        values = torch.cat([moved, torch.ones(G, args.offline, 1)], dim=2)
        total.scatter_add_(1, key.unsqueeze(2).expand(-1, -1, 3), values)
        self.expected = total[..., :2] / total[..., 2:].clamp(min=1)

    def add(self, transitions: torch.Tensor) -> None:
        self.latest = transitions
        self.all = torch.cat([self.all, transitions], dim=2)

    def draw(self, num: int, start: int, stop: int) -> torch.Tensor:
        """(G, num) indices of `all` in a range."""
        shape = self.all.shape[1], num
        return torch.randint(start, stop, shape, generator=self.generator)

    def residual(self, transitions: torch.Tensor) -> torch.Tensor:
        """s' - s less what the own action does on average: (4, G, n) -> (G, n, 2)."""
        s, a, s_next, _ = transitions
        expected = self.expected.take_along_dim((s * NUM_ACTIONS + a).unsqueeze(2), 1)
        return (CELLS[s_next] - CELLS[s]).float() - expected


def near_pairs(c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Distance of (s, a): the cells' over the grid's size, and 2 where actions differ."""
    return APART[c[0][:, :, None], d[0][:, None]] / SIZE + 2 * (c[1][:, :, None] != d[1][:, None])


def matched(c, d, pairs: torch.Tensor, what: torch.Tensor, of: torch.Tensor):
    """l1 of `what` (G, B, k) of candidates and `of` (G, D, k) of their nearest references, and how
    near those are; (G, B) each."""
    gap, match = pairs.min(dim=2)
    return (what - of.take_along_dim(match.unsqueeze(2), 1)).abs().sum(2), gap


def raw(data, c, d, q, partner):
    return matched(c, d, near_pairs(c, d), CELLS[c[2]].float(), CELLS[d[2]].float())[0]


def delta(data, c, d, q, partner):
    return matched(c, d, near_pairs(c, d), *(CELLS[x[2]].float() - CELLS[x[0]] for x in (c, d)))[0]


def match_residuals(data, c, d):
    """As `matched`, by the cells alone."""
    pairs = APART[c[0][:, :, None], d[0][:, None]]
    return matched(c, d, pairs, data.residual(c), data.residual(d))


def mean_residuals(data, c, d):
    """Distance from the mean residual of the references around, each with weight exp(-2 distance),
    and the sum of these weights; (G, B) each."""
    weight = NEARNESS[c[0][:, :, None], d[0][:, None]]
    mean = weight @ data.residual(d) / weight.sum(2, keepdim=True).clamp(min=1e-12)
    return (data.residual(c) - mean).abs().sum(2), weight.sum(2)


def shrunk(distance, trust):
    """To the mean of all where there is no reason to trust it."""
    return trust * distance + (1 - trust) * distance.mean(1, keepdim=True)


def residual(data, c, d, q, partner):
    return match_residuals(data, c, d)[0]


def residual_near(data, c, d, q, partner):
    """Without a match in its own cell a candidate is neither good nor bad."""
    distance, gap = match_residuals(data, c, d)
    return sampler.rank_at_random(distance, gap > 0)


def residual_scaled(data, c, d, q, partner):
    """Trusted as far as the match is near."""
    distance, gap = match_residuals(data, c, d)
    return shrunk(distance, torch.exp(-gap))


def residual_kernel(data, c, d, q, partner):
    return mean_residuals(data, c, d)[0]


def kernel_near(data, c, d, q, partner):
    """Trusted as far as there are references around."""
    distance, weight = mean_residuals(data, c, d)
    return shrunk(distance, weight.clamp(max=1))


def value(data, c, d, q, partner):
    """d_q, with the mean over the matches."""
    flat = q.flatten(1).float()
    match = sampler.match_by_value(*(flat.gather(1, x[0] * NUM_ACTIONS + x[1]) for x in (c, d)))
    v = q.amax(2).float()
    values = v.gather(1, c[2]), v.gather(1, d[2].gather(1, match))
    ours, theirs = (sampler.relative_to_mean(x) for x in values)
    return (ours - theirs).abs()


def oracle(data, c, d, q, partner):
    return (c[3] != partner[c[0]]).float()


def oracle_seen(data, c, d, q, partner):
    """As far as the references can tell without a guess: candidates in other cells are neither good
    nor bad."""
    seen = torch.zeros(len(d[0]), NUM_CELLS, dtype=torch.bool).scatter_(1, d[0], True)
    return sampler.rank_at_random(oracle(data, c, d, q, partner), ~seen.gather(1, c[0]))


DISTANCES: dict[str, Callable] = {
    "value": value,
    "raw": raw,
    "delta": delta,
    "residual": residual,
    "residual-near": residual_near,
    "residual-scaled": residual_scaled,
    "residual-kernel": residual_kernel,
    "kernel-near": kernel_near,
    "oracle-seen": oracle_seen,
    "oracle": oracle,
}
STRATEGIES = (
    *("offline", "uniform", "online", "mixed0.3", "mixed0.6"),
    *(f"{name}@{alpha}" for name in DISTANCES for alpha in (1, 2)),
)


def parsed(strategy: str) -> tuple[str, float]:
    """Its name, and a distance's alpha, a mix's share, or 0.

    Raises:
        InputError: there is no such strategy.
    """
    if strategy in ("offline", "uniform", "online"):
        return strategy, 0.0
    name, _, number = strategy.partition("@")
    if strategy.startswith("mixed"):
        name, number = "mixed", strategy.removeprefix("mixed")
    with contextlib.suppress(ValueError):
        most = {"mixed": 1.0, **dict.fromkeys(DISTANCES, float("inf"))}.get(name, -1.0)
        if 0 <= float(number) <= most:
            return name, float(number)
    hint = nearest(strategy, STRATEGIES)
    raise InputError(f"unknown strategy {strategy!r}: {hint} (of DISTANCE@ALPHA, mixedSHARE)")


def train(strategy: str, args: Args) -> dict[str, np.ndarray]:
    """{measure: (G,)} of a strategy, after the last deployment."""
    generator = torch.Generator().manual_seed(1)
    partner, G = partner_of(args.partner), args.num_seeds
    data = Data(args, generator)
    uniform = torch.full((NUM_CELLS, NUM_ACTIONS), 1 / NUM_ACTIONS).double()
    q = exact_q(uniform, args.strength).repeat(G, 1, 1)
    name, number = parsed(strategy)
    alpha, numbers = torch.full((G,), number), torch.arange(G).unsqueeze(1)
    torch.manual_seed(2)  # of the draws by rank
    for k in range(args.deployments):
        data.add(deploy(q, partner, args, generator))
        n, shares, agree = data.all.shape[2], [], []
        for _ in range(args.finetune_updates):
            if name in ("uniform", "offline", "online"):
                start = data.num_offline if name == "online" else 0
                picked = data.draw(
                    args.batch_size, start, data.num_offline if name == "offline" else n
                )
            elif name == "mixed":
                online = data.draw(args.batch_size, data.num_offline, n)
                offline = data.draw(args.batch_size, 0, data.num_offline)
                is_online = torch.rand(online.shape, generator=generator) < number
                picked = torch.where(is_online, online, offline)
            else:
                index = data.draw(args.candidates, 0, n)
                of = data.latest
                if args.reference_data == "online":
                    of = data.all[:, :, data.num_offline :]
                keys = torch.rand(G, of.shape[2], generator=generator)
                order = keys.topk(args.references, dim=1).indices
                c, d = data.all[:, numbers, index], of[:, numbers, order]
                distance = DISTANCES[name](data, c, d, q, partner)
                picked = index.gather(1, sampler.draw_by_rank(distance, alpha, args.batch_size))
            batch = data.all[:, numbers, picked]
            learn(q, batch, args.learning_rate)
            if k == args.deployments - 1:
                shares.append((picked >= data.num_offline).double().mean(1))
                agree.append((batch[3] == partner[batch[0]]).double().mean(1))
    exact = exact_q(torch.eye(NUM_ACTIONS).double()[partner], args.strength)
    return {
        "return": exact_return(q, partner, args.strength).numpy(),
        "error": (q - exact).square().mean((1, 2)).sqrt().numpy(),
        "online": torch.stack(shares).mean(0).numpy(),
        "as_today": torch.stack(agree).mean(0).numpy(),
    }


def deploy(q, partner, args: Args, generator) -> torch.Tensor:
    """M steps of the greedy policy beside today's partner, (4, G, M)."""
    policy, found = q.argmax(2), []
    for t in range(args.deployment_steps):
        if t % 50 == 0:
            s = torch.randint(NUM_CELLS, (args.num_seeds,), generator=generator)
        a, b = policy.gather(1, s.unsqueeze(1)).squeeze(1), partner[s]
        s_next = follow(s, a, b, args.strength)
        found.append(torch.stack([s, a, s_next, b]))
        s = s_next
    return torch.stack(found, dim=2)


def learn(q: torch.Tensor, batch: torch.Tensor, learning_rate: float) -> None:
    """Every pair of a batch moves towards its mean target, as far as that many updates would."""
    s, a, s_next, _ = batch
    target = reward(s_next) + GAMMA * q.amax(2).gather(1, s_next)
    key, flat = s * NUM_ACTIONS + a, q.view(len(q), -1)
    count, total = torch.zeros_like(flat), torch.zeros_like(flat)
    count.scatter_add_(1, key, torch.ones_like(target))
    total.scatter_add_(1, key, target)
    step = (1 - (1 - learning_rate) ** count) * (total / count.clamp(min=1) - flat)
    flat += torch.where(count > 0, step, 0.0)


def draw_figure(rows: list[dict], path: str, least: float, most: float) -> None:
    """Return of every strategy: a dot per seed and the mean, between greedy on the data's Q and
    greedy on today's."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["strategy"] for row in rows))
    figure, axis = plt.subplots(figsize=(6.5, 0.24 * len(names) + 1))
    for i, name in enumerate(names):
        values = [row["return"] for row in rows if row["strategy"] == name]
        axis.plot(values, [i] * len(values), ".", color="C0", alpha=0.3, ms=4)
        axis.plot(np.mean(values), i, "o", color="C3" if "oracle" in name else "C0", ms=6)
    for x in (least, most):
        axis.axvline(x, color="0.6", lw=1, zorder=0)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("return (grey: greedy on the data's exact Q, and on today's)", fontsize=8)
    figure.tight_layout()
    write_figure(path, figure, 130)


def main(args: Args) -> None:
    chosen = args.strategies or STRATEGIES
    for strategy in chosen:
        parsed(strategy)
    if args.references > args.deployment_steps:
        raise InputError(
            f"--references {args.references}: more than --deployment-steps {args.deployment_steps}"
        )
    check_outputs(args.csv, figure=args.figure)
    torch.set_num_threads(1)
    partner = partner_of(args.partner)
    uniform = torch.full((NUM_CELLS, NUM_ACTIONS), 1 / NUM_ACTIONS).double()
    today = torch.eye(NUM_ACTIONS).double()[partner]
    ends = [
        exact_return(exact_q(p, args.strength), partner, args.strength).item()
        for p in (uniform, today)
    ]
    print(f"greedy on the data's exact Q: {ends[0]:.2f}, on today's: {ends[1]:.2f}\n")
    print("| draw | return | error of Q | online | partner as today |\n|---|---|---|---|---|")
    rows = []
    for strategy in chosen:
        found = train(strategy, args)
        cells = (f"{x.mean():.2f} +- {x.std():.2f}" for x in found.values())
        print(f"| {strategy} | " + " | ".join(cells) + " |", flush=True)
        for seed in range(args.num_seeds):
            its = {key: float(x[seed]) for key, x in found.items()}
            rows.append({"strategy": strategy, "partner": args.partner, "seed": seed} | its)
        if args.csv:
            write_csv(args.csv, rows)
    if args.figure:
        draw_figure(rows, args.figure, *ends)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
