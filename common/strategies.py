"""Which transitions a fine-tuning update sees: what every strategy shares, and those that OTC is
compared with. OTC's own draw is in the scripts."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import sampler
from common.device import kept_rng_state
from common.nets import adam, mlp, restore, step
from common.replay import Replay

EULER_GAMMA = 0.5772156649015329


class Strategy(nn.Module):
    """Draws the transitions of an update; this one uniformly over all data (--sampling uniform)."""

    def __init__(self, replay: Replay, args):
        super().__init__()
        self.replay, self.args = replay, args
        # OTC's degree of the correction; none here
        alpha = torch.full((replay.num_groups,), torch.nan, device=replay.device)
        self.register_buffer("alpha", alpha)
        self.embedding = None

    def start_deployment(self, agent: nn.Module, k: int) -> dict[str, torch.Tensor]:
        """Once per deployment, after its data has been merged; what to log of it, (G,) each."""
        return {}

    def draw(self, agent: nn.Module) -> torch.Tensor:
        """(G, batch_size) indices of the transitions of one update."""
        return self.replay.draw_merged(self.args.batch_size)

    def diagnostics(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the draw of an update amounts to; (G,) each."""
        return {
            "otc/unique_fraction": sampler.unique_fraction(index),
            "otc/online_fraction": self.replay.is_online(index).float().mean(1),
        }


class Online(Strategy):
    """Online data only, of all deployments."""

    def draw(self, agent):
        return self.replay.draw_online(self.args.batch_size)


class Offline(Strategy):
    """Offline data only: the control that further updates alone are measured by."""

    def draw(self, agent):
        return self.replay.draw_offline(self.args.batch_size)


class Mixed(Strategy):
    """--online-share of the transitions are online, of all deployments; else uniform. What an OTC
    draw that puts online candidates first amounts to, without its choice."""

    def __init__(self, replay: Replay, args):
        super().__init__(replay, args)
        self.register_buffer("share", torch.zeros((), device=replay.device))

    def start_deployment(self, agent, k):
        """The share of ranks 1 ... n at alpha 1, H(n) / H(candidates) with the harmonic numbers H,
        where n of the candidates are online, unless it is given."""
        share, num_online = self.args.online_share, int(self.replay.num_online)
        if share is None:
            total = self.args.candidates
            online = total * num_online / (self.replay.num_offline + num_online)
            harmonic = torch.digamma(torch.tensor([online, total]).double() + 1) + EULER_GAMMA
            share = harmonic[0] / harmonic[1]
        self.share.fill_(share)
        return {}

    def draw(self, agent):
        replay, size = self.replay, self.args.batch_size
        online, offline = replay.draw_online(size), replay.draw_offline(size)
        is_online = torch.rand(online.shape, device=replay.device) < self.share
        return torch.where(is_online, online, offline)


class DensityRatio(nn.Module):
    """Balanced Replay's w(s, a_i), how much likelier a pair is online than offline; Lee et al.,
    CoRL 2021."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, hidden_size: int = 256):
        super().__init__()
        self.network = mlp(G, obs_dim + action_dim, hidden_size, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in self.network[::2]:
            layer.reset_parameters()
        nn.init.ones_(self.network[-1].bias)

    def forward(self, obs, actions):
        """(G, batch) ratio, at least 0."""
        return F.relu(self.network(torch.cat([obs, actions], dim=2))).squeeze(2)

    def loss(self, offline, online):
        """Jensen-Shannon bound on two batches; (G,)."""
        w_offline = self(offline["obs"], offline["actions"])
        w_online = self(online["obs"], online["actions"])
        offline_term = -torch.log(2 / (w_offline + 1) + 1e-10).mean(1)
        return offline_term - torch.log(2 * w_online / (w_online + 1) + 1e-10).mean(1)


class Balanced(Strategy):
    """Balanced Replay: in proportion to the density ratio, which takes one update per draw and is
    begun anew at each deployment."""

    BATCH_SIZE, TEMPERATURE = 256, 5.0  # of the ratio, as in its code

    def __init__(self, replay: Replay, args):
        super().__init__(replay, args)
        G, device = replay.num_groups, replay.device
        self.density = DensityRatio(G, replay.obs.shape[2], replay.actions.shape[2])
        self.optimizer = adam(self.density.parameters(), 3e-4)
        self.priorities = Priorities(G, replay.num_offline + replay.capacity, device)

    @torch.no_grad()
    def start_deployment(self, agent, k):
        self.density.reset_parameters()  # in place, where a captured graph expects them
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        # Half of the first draws' mass is online
        num_offline, num_online = self.replay.num_offline, int(self.replay.num_online)
        self.priorities.fill(0, num_offline, 1.0)
        self.priorities.fill(num_offline, num_offline + num_online, num_offline / num_online)
        return {}

    def draw(self, agent):
        replay, columns = self.replay, ("obs", "actions")
        offline = replay.gather(replay.draw_offline(self.BATCH_SIZE), columns)
        online = replay.gather(replay.draw_online(self.BATCH_SIZE), columns)
        step(self.optimizer, self.density.loss(offline, online))
        index = self.priorities.draw(self.args.batch_size)
        batch = replay.gather(index, columns)
        with torch.no_grad():  # refreshed where drawn
            ratio, usual = (
                self.density(x["obs"], x["actions"]).pow(1 / self.TEMPERATURE)
                for x in (batch, offline)
            )
            priority = ratio / (usual.mean(1, keepdim=True) + 1e-10)
            self.priorities.update(index, priority.clamp(1e-3, 1e3))
        return index

    def get_extra_state(self):
        return {
            "optimizer": self.optimizer.state_dict(),
            "priorities": self.priorities.state_dict(),
        }

    def set_extra_state(self, state) -> None:
        restore(self.optimizer, state["optimizer"])
        self.priorities.load_state_dict(state["priorities"])


# What --sampling may be beside otc
OTHERS = {
    "uniform": Strategy,
    "mixed": Mixed,
    "online": Online,
    "offline": Offline,
    "balanced": Balanced,
}


def make(replay: Replay, args, otc: type[Strategy]) -> Strategy:
    """The strategy of --sampling; `otc` is the script's own. What it draws for its networks leaves
    the policies' random numbers alone: pi^0 is the same for every strategy."""
    with kept_rng_state(replay.device):
        return {**OTHERS, "otc": otc}[args.sampling](replay, args)


def strategy_name(args: dict) -> str:
    """How a run's updates draw their transitions, from its arguments: otc-value, otc-embedding, or
    another --sampling, with what of it differs from the defaults but the first of adaptive alphas;
    pi0 where nothing is deployed. A changed script may lack arguments."""
    if not args.get("deployments"):
        return "pi0"
    sampling = args.get("sampling", "otc")
    if sampling != "otc":
        share = args.get("online_share") if sampling == "mixed" else None
        parts = [sampling + ("" if share is None else f"{share:g}")]
    else:
        distance = args.get("distance")
        parts = ["otc"] + ([] if distance is None else [distance])
        is_over_all = distance == "value" and args.get("value_mean") == "references"
        parts += ["over-references"] if is_over_all else []
        parts += [] if args.get("adaptive_alpha", True) else [f"alpha{args['alpha']:g}"]
        parts += [] if args.get("alpha_max") is None else [f"max{args['alpha_max']:g}"]
        parts += ["no-self-matches"] if args.get("exclude_self_matches") else []
        parts += [] if args.get("replacement", True) else ["no-replacement"]
    return "-".join(parts + (["exploring"] if args.get("exploration", "none") != "none" else []))


class Priorities:
    """Draws in proportion to one priority per transition: a sum tree of two levels, for Balanced
    Replay.

    Priorities live in blocks of `BLOCK`; a draw picks a block by the blocks' sums, then an item
    inside it.
    """

    BLOCK = 1024

    def __init__(self, num_groups: int, size: int, device: torch.device | str = "cpu"):
        num_blocks = -(-size // self.BLOCK)
        self.size = size
        self.values = torch.zeros(num_groups, num_blocks, self.BLOCK, device=device)
        self.sums = torch.zeros(num_groups, num_blocks, device=device, dtype=torch.float64)

    def fill(self, start: int, stop: int, priority: float) -> None:
        """Give the transitions start ... stop-1 of every group the same priority."""
        self.values.flatten(1)[:, start:stop] = priority
        self.sums.copy_(self.values.sum(dim=2, dtype=torch.float64))

    def update(self, index: torch.Tensor, priority: torch.Tensor) -> None:
        """Set the priorities (G, n) of the transitions `index` (G, n); of equal indices one
        wins."""
        self.values.flatten(1).scatter_(1, index, priority)
        block = index // self.BLOCK
        self.sums.scatter_(1, block, self._blocks(block).sum(dim=2, dtype=torch.float64))

    def draw(self, num_samples: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """(G, num_samples) indices, one from each of num_samples slices of equal mass."""
        ends = self.sums.cumsum(dim=1)
        offset = torch.rand(
            ends.shape[0], num_samples, generator=generator, device=ends.device, dtype=ends.dtype
        )
        mass = (torch.arange(num_samples, device=ends.device) + offset) / num_samples * ends[:, -1:]
        # Rounding may leave `mass` or `rest` at the very end, where only padding follows.
        mass = torch.minimum(mass, ends[:, -1:] * (1 - 1e-15))
        block = torch.searchsorted(ends, mass, right=True).clamp(max=ends.shape[1] - 1)
        inside = self._blocks(block).double().cumsum(dim=2)  # (G, num_samples, BLOCK)
        rest = mass - (ends.gather(1, block) - self.sums.gather(1, block))
        rest = torch.minimum(rest, inside[..., -1] * (1 - 1e-15)).clamp(min=0)
        item = torch.searchsorted(inside, rest.unsqueeze(2), right=True).squeeze(2)
        return (block * self.BLOCK + item).clamp(max=self.size - 1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All priorities."""
        return {"values": self.values, "sums": self.sums}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state_dict` returned."""
        self.values.copy_(state["values"])
        self.sums.copy_(state["sums"])

    def _blocks(self, block: torch.Tensor) -> torch.Tensor:
        """(G, n) block numbers -> (G, n, BLOCK) priorities."""
        groups = torch.arange(block.shape[0], device=block.device).unsqueeze(1)
        return self.values[groups, block]
