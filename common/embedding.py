"""Spaces in which OTC's draw compares transitions, besides that of the values.

A space says what stands for e(s, a_i) and e(s'). Its networks, where it has any, are trained on the
offline data and then frozen, so that distances stay comparable.
"""

from typing import Literal

import torch
import torch.nn as nn

from common import sampler
from common.nets import adam, keep_own, kl_divergence, mean_over_own, mlp, restore, step
from common.replay import Replay

Distance = Literal["embedding", "value", "two-stage", "raw", "residual"]
COLUMNS = ("obs", "actions", "next_obs")


class Space(nn.Module):
    """What spaces share: the scales of the offline data, and D^k in the space, made once."""

    def __init__(self, replay: Replay, args):
        super().__init__()
        self.replay, self.args = replay, args
        obs_mean, obs_std = replay.obs_statistics()
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std.clamp(min=1e-3))
        self.optimizer = None
        self.latest = None  # D^k, (G, M, size)

    def scaled(self, obs: torch.Tensor) -> torch.Tensor:
        return (obs - self.obs_mean) / self.obs_std

    def place(self, obs, actions, next_obs) -> torch.Tensor:
        """Where transitions lie: (G, n, ...) each -> (G, n, size)."""
        raise NotImplementedError

    def place_rows(self, index: torch.Tensor) -> torch.Tensor:
        """(G, n) indices of the replay -> (G, n, size)."""
        return self.replay.in_parts(self.place, index, COLUMNS)

    def remember(self, latest: torch.Tensor) -> None:
        """Place the whole of D^k, indices (G, M), once."""
        if self.latest is None:
            self.latest = self.place_rows(latest)
        else:  # in place, where a captured graph expects them
            self.latest.copy_(self.place_rows(latest))

    def remembered(self, references: torch.Tensor) -> torch.Tensor:
        """(G, D) indices of D^k -> (G, D, size)."""
        return self.latest.take_along_dim((references - self.replay.latest_start).unsqueeze(2), 1)

    def get_extra_state(self):
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        return {"optimizer": optimizer, "latest": self.latest}

    def set_extra_state(self, state) -> None:
        if self.optimizer is not None:
            restore(self.optimizer, state["optimizer"])
        if state["latest"] is not None:
            self.latest = state["latest"].to(self.replay.device)


def gaussian(encoder: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-std of the latent of x (G, n, ...), (G, n, latent_dim) each."""
    mean, log_std = encoder(x).chunk(2, dim=2)
    return mean, log_std.clamp(-4, 15)


class Embedding(Space):
    """--distance embedding, section 3.5: the mean of a conditional VAE, which encodes (s, a_i, s')
    into z and decodes a_i from (s, s', z), stands for both e(s, a_i) and e(s')."""

    def __init__(self, replay: Replay, args):
        super().__init__(replay, args)
        G, latent_dim = replay.num_groups, args.embedding_dim
        obs_dim, action_dim = replay.obs.shape[2], replay.actions.shape[2]
        self.encoder = mlp(G, 2 * obs_dim + action_dim, args.hidden_size, 2 * latent_dim)
        self.decoder = mlp(G, 2 * obs_dim + latent_dim, args.hidden_size, action_dim)
        self.optimizer = adam(self.parameters(), args.embedding_learning_rate)

    def encode(self, obs, actions, next_obs):
        """Mean and log-std of the embedding, each (G, batch, latent_dim)."""
        obs, next_obs = self.scaled(obs), self.scaled(next_obs)
        return gaussian(self.encoder, torch.cat([obs, actions, next_obs], dim=2))

    def place(self, obs, actions, next_obs):
        return self.encode(obs, actions, next_obs)[0]

    def loss(self, obs, actions, next_obs):
        """Squared error of the decoded action and KL divergence of the embedding; (G,) each."""
        mean, log_std = self.encode(obs, actions, next_obs)
        z = mean + log_std.exp() * torch.randn_like(mean)
        obs, next_obs = self.scaled(obs), self.scaled(next_obs)
        decoded = torch.tanh(self.decoder(torch.cat([obs, next_obs, z], dim=2)))
        error = mean_over_own((decoded - actions).square(), self.replay.own_actions)
        return error, kl_divergence(mean, log_std)

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update on a batch of offline data; losses (G,)."""
        error, kl = self.loss(*(batch[name] for name in COLUMNS))
        step(self.optimizer, error + self.args.embedding_kl_weight * kl)
        return {
            "losses/embedding_reconstruction": error.detach(),
            "losses/embedding_kl": kl.detach(),
        }

    def distance(self, candidates, references, exclude=None) -> torch.Tensor:
        """Of each candidate (G, B) to the nearest of some of D^k (G, D): (G, B). One search is the
        match and its distance."""
        placed = self.place_rows(candidates)
        return sampler.nearest_distance(placed, self.remembered(references), exclude)


class Raw(Space):
    """--distance raw: e(s, a_i) and e(s') are state, action and next state over their scales."""

    def __init__(self, replay: Replay, args):
        super().__init__(replay, args)
        self.action_dim = replay.actions.shape[2]
        self.pair_dim = self.match_dim = replay.obs.shape[2] + self.action_dim
        std = replay.actions[:, : replay.num_offline].std(1, correction=0, keepdim=True)
        self.register_buffer("action_scale", replay.per_group(std.clamp(min=1e-3)))

    def pair(self, obs, actions) -> torch.Tensor:
        """Scaled (s, a_i): (G, n, pair_dim)."""
        return torch.cat([self.scaled(obs), actions / self.action_scale], dim=2)

    def place(self, obs, actions, next_obs):
        return torch.cat([self.pair(obs, actions), self.scaled(next_obs)], dim=2)

    def distance(self, candidates, references, exclude=None) -> torch.Tensor:
        """Of each candidate's e(s') to that of its match, which is the nearest of some of D^k in
        e(s, a_i); indices (G, B) and (G, D) -> (G, B). Section 3.3."""
        d, placed, others = self.match_dim, self.place_rows(candidates), self.remembered(references)
        match = sampler.match_by_embedding(placed[..., :d], others[..., :d], exclude)
        matched = others[..., d:].take_along_dim(match.unsqueeze(2), dim=1)
        return (placed[..., d:] - matched).abs().sum(2)


class TwoStage(Raw):
    """--distance two-stage, section 3.3 to the letter: a VAE of (s, a_i) and another of s', whose
    means are e(s, a_i) and e(s')."""

    def __init__(self, replay: Replay, args):
        super().__init__(replay, args)
        G, latent_dim, size = replay.num_groups, args.embedding_dim, args.hidden_size
        input_dims = self.pair_dim, replay.obs.shape[2]
        self.encoders = nn.ModuleList(mlp(G, dim, size, 2 * latent_dim) for dim in input_dims)
        self.decoders = nn.ModuleList(mlp(G, latent_dim, size, dim) for dim in input_dims)
        self.optimizer = adam(self.parameters(), args.embedding_learning_rate)
        self.match_dim = latent_dim
        self.own = None, None  # of the inputs' entries
        if replay.own_obs is not None or replay.own_actions is not None:
            own = replay.own_obs, replay.own_actions
            sizes = replay.obs.shape[2], self.action_dim
            ones = (torch.ones(G, 1, size, device=replay.device) for size in sizes)
            obs, actions = (one if x is None else x for x, one in zip(own, ones, strict=True))
            self.own = torch.cat([obs, actions], dim=2), obs

    def place(self, obs, actions, next_obs):
        inputs = self.pair(obs, actions), self.scaled(next_obs)
        pairs = zip(self.encoders, inputs, strict=True)
        return torch.cat([gaussian(encoder, x)[0] for encoder, x in pairs], dim=2)

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update of both on a batch of offline data; losses (G,), sums of both."""
        errors, kls = [], []
        inputs = self.pair(batch["obs"], batch["actions"]), self.scaled(batch["next_obs"])
        networks = zip(self.encoders, self.decoders, strict=True)
        for (encoder, decoder), x, own in zip(networks, inputs, self.own, strict=True):
            mean, log_std = gaussian(encoder, x)
            z = mean + log_std.exp() * torch.randn_like(mean)
            errors.append(mean_over_own((decoder(z) - x).square(), own))
            kls.append(kl_divergence(mean, log_std))
        step(self.optimizer, sum(errors) + self.args.embedding_kl_weight * sum(kls))
        return {
            "losses/embedding_reconstruction": sum(errors).detach(),
            "losses/embedding_kl": sum(kls).detach(),
        }


class Residual(Raw):
    """--distance residual, not in the paper: what s' - s has beside the mean effect of (s, a_i) in
    the data, as a forward model learns it. That is the others' part, and it carries over from one
    own action to another: the match is that of the states alone."""

    def __init__(self, replay: Replay, args):
        super().__init__(replay, args)
        G, obs_dim = replay.num_groups, replay.obs.shape[2]
        self.register_buffer("change_std", replay.change_statistics()[1].clamp(min=1e-3))
        self.model = mlp(G, self.pair_dim, args.hidden_size, obs_dim)
        self.optimizer = adam(self.parameters(), args.embedding_learning_rate)
        self.match_dim = obs_dim

    def residual(self, obs, actions, next_obs) -> torch.Tensor:
        """In units of the change's standard deviation, 0 in padding: (G, n, obs_dim)."""
        found = (next_obs - obs) / self.change_std - self.model(self.pair(obs, actions))
        return keep_own(found, self.replay.own_obs)

    def place(self, obs, actions, next_obs):
        return torch.cat([self.scaled(obs), self.residual(obs, actions, next_obs)], dim=2)

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update of the model on a batch of offline data; losses (G,)."""
        residual = self.residual(*(batch[name] for name in COLUMNS))
        error = mean_over_own(residual.square(), self.replay.own_obs)
        step(self.optimizer, error)
        return {"losses/embedding_reconstruction": error.detach()}


def make(replay: Replay, args) -> Space | None:
    """The space of --distance; None for `value`."""
    spaces = {"embedding": Embedding, "two-stage": TwoStage, "raw": Raw, "residual": Residual}
    return None if args.distance == "value" else spaces[args.distance](replay, args)
