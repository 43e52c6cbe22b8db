"""OTC's embedding distance d_e: a conditional VAE whose mean stands for both e(s, a_i) and e(s');
section 3.5."""

import torch
import torch.nn as nn

from common import sampler
from common.nets import adam, kl_divergence, mlp, restore, step
from common.replay import Replay


class Embedding(nn.Module):
    """Encodes (s, a_i, s') into a latent z and decodes a_i from (s, s', z).

    Trained in the offline phase and then frozen, so that distances stay comparable.
    """

    def __init__(self, replay: Replay, args):
        super().__init__()
        self.replay, self.args = replay, args
        G, latent_dim = replay.num_groups, args.embedding_dim
        obs_dim, action_dim = replay.obs.shape[2], replay.actions.shape[2]
        self.encoder = mlp(G, 2 * obs_dim + action_dim, args.hidden_size, 2 * latent_dim)
        self.decoder = mlp(G, 2 * obs_dim + latent_dim, args.hidden_size, action_dim)
        obs_mean, obs_std = replay.obs_statistics()
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std.clamp(min=1e-3))
        self.optimizer = adam(self.parameters(), args.embedding_learning_rate)
        self.latest = None  # the embeddings of D^k, (G, M, latent_dim)

    def encode(self, obs, actions, next_obs):
        """Mean and log-std of the embedding, each (G, batch, latent_dim)."""
        obs, next_obs = ((x - self.obs_mean) / self.obs_std for x in (obs, next_obs))
        mean, log_std = self.encoder(torch.cat([obs, actions, next_obs], dim=2)).chunk(2, dim=2)
        return mean, log_std.clamp(-4, 15)

    def loss(self, obs, actions, next_obs):
        """Squared error of the decoded action and KL divergence of the embedding; (G,) each."""
        mean, log_std = self.encode(obs, actions, next_obs)
        z = mean + log_std.exp() * torch.randn_like(mean)
        obs, next_obs = ((x - self.obs_mean) / self.obs_std for x in (obs, next_obs))
        decoded = torch.tanh(self.decoder(torch.cat([obs, next_obs, z], dim=2)))
        return (decoded - actions).square().mean((1, 2)), kl_divergence(mean, log_std)

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update on a batch of offline data; losses (G,)."""
        error, kl = self.loss(batch["obs"], batch["actions"], batch["next_obs"])
        step(self.optimizer, error + self.args.embedding_kl_weight * kl)
        return {
            "losses/embedding_reconstruction": error.detach(),
            "losses/embedding_kl": kl.detach(),
        }

    def embed(self, index: torch.Tensor) -> torch.Tensor:
        """(G, n) -> (G, n, latent_dim)."""
        columns = ("obs", "actions", "next_obs")
        return self.replay.in_parts(lambda **x: self.encode(**x)[0], index, columns)

    def remember(self, latest: torch.Tensor) -> None:
        """Embed the whole of D^k, indices (G, M), once."""
        if self.latest is None:
            self.latest = self.embed(latest)
        else:  # in place, where a captured graph expects them
            self.latest.copy_(self.embed(latest))

    def distance(self, candidates, references, exclude=None) -> torch.Tensor:
        """Of each candidate (G, B) to the nearest of some of D^k (G, D): (G, B)."""
        row = (references - self.replay.latest_start).unsqueeze(2)
        nearest = self.latest.take_along_dim(row, dim=1)
        return sampler.match_by_embedding(self.embed(candidates), nearest, exclude)

    def get_extra_state(self):
        return {"optimizer": self.optimizer.state_dict(), "latest": self.latest}

    def set_extra_state(self, state) -> None:
        restore(self.optimizer, state["optimizer"])
        if state["latest"] is not None:
            self.latest = state["latest"].to(self.replay.device)
