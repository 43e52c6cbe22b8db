"""An ensemble that learns how a team's joint observation follows its joint action."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.nets import Linear, joint
from common.replay import Replay


class WorldModel(nn.Module):
    """Members from (joint observation, joint action) to Gaussians of its change and of the reward,
    and the logit of going on; row s * num_models + m is member m of seed s.

    Entries of the joint observation that copy an earlier one, or never change, are not predicted.

    Args:
        S: number of seeds, each with a team of num_agents.
        hidden_size, layers: units and number of each member's hidden layers.
        beta: exponent of the predicted variance that weights each log-likelihood (Seitzer et al.,
            2022, https://arxiv.org/abs/2203.09168); 0 is the plain one.
    """

    def __init__(
        self,
        S: int,
        num_agents: int,
        obs_dim: int,
        action_dim: int,
        num_models: int,
        hidden_size: int,
        layers: int,
        beta: float,
    ):
        super().__init__()
        self.num_agents, self.num_models, self.beta = num_agents, num_models, beta
        rows, state_dim = S * num_models, num_agents * obs_dim
        sizes = [num_agents * (obs_dim + action_dim), *[hidden_size] * layers]
        hidden = []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            hidden += [Linear(rows, fan_in, fan_out), nn.ReLU(inplace=True)]
        self.network = nn.Sequential(*hidden, Linear(rows, sizes[-1], 2 * (state_dim + 1) + 1))
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("std", torch.ones(state_dim))
        # Of the changes of state and the reward behind them: scales, which are predicted; the box
        self.register_buffer("change_mean", torch.zeros(state_dim + 1))
        self.register_buffer("change_std", torch.ones(state_dim + 1))
        self.register_buffer("predicted", torch.ones(state_dim + 1))
        self.register_buffer("low", torch.full((state_dim + 1,), -torch.inf))
        self.register_buffer("high", torch.full((state_dim + 1,), torch.inf))
        self.register_buffer("source", torch.arange(state_dim))  # the entry that each one copies
        everyone = torch.arange(num_models).repeat(S, 1)
        self.register_buffer("everyone", everyone, persistent=False)

    def measure(self, replay: Replay) -> None:
        """Scales, box and copies, by the offline data."""
        n = replay.num_offline
        obs, next_obs, rewards = replay.obs[:, :n], replay.next_obs[:, :n], replay.rewards[:, :n]
        change, views = next_obs - obs, len(obs)  # of all agents, or one that all have

        def of_state(x: torch.Tensor) -> torch.Tensor:
            return x.flatten().repeat(replay.num_agents // views)

        low = of_state(torch.minimum(obs.amin(1), next_obs.amin(1)))
        high = of_state(torch.maximum(obs.amax(1), next_obs.amax(1)))
        self.mean.copy_(of_state(obs.mean(1)))
        self.std.copy_(of_state(obs.std(1, correction=0)) + 1e-3)
        self.change_mean.copy_(torch.cat([of_state(change.mean(1)), rewards.mean(1)]))
        stds = of_state(change.std(1, correction=0)), rewards.std(1, correction=0)
        self.change_std.copy_(torch.cat(stds) + 1e-3)
        self.low.copy_(torch.cat([low, rewards.amin(1)]))
        self.high.copy_(torch.cat([high, rewards.amax(1)]))
        self.source.copy_(of_state(first_copies(obs, next_obs).to(obs.device)))
        is_first = self.source == torch.arange(len(self.source), device=obs.device)
        self.predicted[:-1] = (is_first & (high > low)).float()

    def forward(self, state, actions, network=None):
        """Mean and log-std in (-6, 2) of the standardised changes and reward, and the logit: (rows,
        batch, state_dim), (rows, batch, action_dim) -> (rows, batch, state_dim + 1) twice, (rows,
        batch)."""
        scaled = (state - self.mean) / self.std * self.predicted[:-1]
        output = (network or self.network)(torch.cat([scaled, actions], dim=2))
        mean, raw_log_std = output[..., :-1].chunk(2, dim=2)
        return mean, 8 * torch.sigmoid(raw_log_std) - 6, output[..., -1]

    def transitions(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Of a batch as `Replay.gather_teams` returns it: the teams' joint observations and actions
        (S, n, N * dim), what follows, changes and then the reward, (S, n, state_dim + 1), and
        terminations (S, n)."""
        N = self.num_agents
        obs, actions, next_obs = (joint(batch[name], N) for name in ("obs", "actions", "next_obs"))
        outcome = torch.cat([next_obs - obs, batch["rewards"][::N].unsqueeze(2)], dim=2)
        return obs, actions, outcome, batch["terminations"][::N]

    def losses(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Negative log-likelihood of the changes, without its constant and averaged over the
        entries, likewise of the reward, and cross-entropy of going on; (S, num_models) each. Every
        member gets its own part of the batch."""
        members = self.num_models
        rows = (x.unflatten(1, (members, -1)).flatten(0, 1) for x in self.transitions(batch))
        state, actions, outcome, terminations = rows
        mean, log_std, logit = self(state, actions)
        target = (outcome - self.change_mean) / self.change_std
        nll = log_std + 0.5 * ((target - mean) * (-log_std).exp()).square()
        nll = nll * (2 * self.beta * log_std.detach()).exp()
        nll, reward_nll = (nll * self.predicted).split([nll.shape[2] - 1, 1], dim=2)
        count = self.predicted[:-1].sum().clamp(min=1)
        bce = F.binary_cross_entropy_with_logits(logit, 1 - terminations, reduction="none")
        losses = nll.sum(2).mean(1) / count, reward_nll.mean((1, 2)), bce.mean(1)
        return tuple(loss.unflatten(0, (-1, members)) for loss in losses)

    def expect(self, state, actions, members: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What members (S, E) expect of (S, batch, dim), in the data's units: mean and variance of
        changes and reward (S, E, batch, state_dim + 1), probability of going on (S, E, batch)."""
        S, E = members.shape
        rows = torch.arange(S, device=state.device).unsqueeze(1) * self.num_models + members
        rows = rows.flatten()
        weights = {name: p.index_select(0, rows) for name, p in self.network.named_parameters()}

        def network(x):
            return torch.func.functional_call(self.network, weights, x)

        inputs = (x.repeat_interleave(E, dim=0) for x in (state, actions))
        mean, log_std, logit = self(*inputs, network)
        mean = self.predicted * (self.change_mean + self.change_std * mean)
        variance = self.predicted * (self.change_std * log_std.exp()).square()
        return tuple(x.unflatten(0, (S, E)) for x in (mean, variance, torch.sigmoid(logit)))

    def following(self, state, outcome, box: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """The next state and the reward after changes and reward that are expected, within the
        data's box: (S, batch, state_dim), (S, batch, state_dim + 1) -> (S, batch, state_dim), (S,
        batch)."""
        after = torch.cat([state, torch.zeros_like(state[..., :1])], dim=2) + outcome
        if box:
            after = torch.clamp(after, self.low, self.high)
        return after[..., :-1].index_select(2, self.source), after[..., -1]


def first_copies(obs: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
    """Of every entry of observations (views, n, obs_dim), counted over all views, the first one
    that is equal to it in all of the data: (views, obs_dim)."""
    columns = [
        (o[:, j], o2[:, j]) for o, o2 in zip(obs, next_obs, strict=True) for j in range(o.shape[1])
    ]
    first: list[int] = []

    def same(i: int, k: int) -> bool:
        return all(torch.equal(a, b) for a, b in zip(columns[i], columns[k], strict=True))

    for k in range(len(columns)):
        first.append(next((i for i in range(k) if first[i] == i and same(i, k)), k))
    return torch.tensor(first).view(len(obs), -1)
