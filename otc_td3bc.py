"""OTC on TD3+BC: online tuning for offline decentralised multi-agent reinforcement learning.

Every agent learns a TD3+BC policy from its own logged data (s, a_i, r, s'), without the other
agents' actions. The agents are then deployed K times for M steps; after each deployment they
fine-tune on the merged data, where OTC (online transition correction) draws the transitions whose
next states agree with what the latest deployment shows.

Papers: OTC, Jiang and Lu, AAAI 2023; TD3+BC, Fujimoto and Gu, NeurIPS 2021,
https://arxiv.org/abs/2106.06860. Against TD3+BC's own code (https://github.com/sfujim/TD3_BC):
agents and seeds are stacked, and the batch is 128 (OTC's Table 3) in place of 256. What the OTC
paper leaves open, and what is chosen here, is in docs/otc.md.

    python otc_td3bc.py --env halfcheetah-medium

What it scores and how long it takes: docs/otc_td3bc.md.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import datasets, runs, sampler
from common.envs import make_vec
from common.replay import Replay


@dataclass
class Args:
    # General arguments, the same in every script
    env: str = "halfcheetah-medium"
    """task and data quality; or package.module:factory of a PettingZoo ParallelEnv, together with
    --dataset FILE"""
    dataset: str = "built-in"
    """built-in, d4rl, minari, a D4RL-layout HDF5 file, OMAR's folder, or a Minari id"""
    dataset_size: int | None = None
    """fewer offline transitions, for a quick look; default: the data's own size"""
    split: str | None = None
    """partition of the joints as AGENTSxJOINTS, such as 1x6 or 6x1; default: the task's own"""
    seed: int = 1
    """first seed"""
    num_seeds: int = 1
    """seeds `seed ... seed+num_seeds-1`, trained together and logged as separate runs"""
    offline_updates: int = 100_000
    """updates on the offline data before the first deployment"""
    deployments: int = 10
    """K, the number of deployments"""
    deployment_steps: int | None = None
    """M, environment steps per deployment and seed; default: 1 % of the offline data"""
    exploration: Literal["none", "sequential"] = "none"
    """deployed agents only exploit, or each in turn explores for an equal share of the M steps; the
    evaluations never explore"""
    batch_size: int = 128
    """transitions per update"""
    eval_every: int = 10_000
    """offline updates between two evaluations"""
    eval_episodes: int = 10
    """episodes of every evaluation and seed, besides those of the deployments"""
    checkpoint_every: int = 10_000
    """updates between two checkpoints, besides those at every deployment"""
    env_workers: int | None = None
    """processes beside this one that step the environments, the numbers stay the same; default: one
    per further core where there are enough environments, none for those that step as one batch"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one"""
    cuda_graph: bool = True
    """on CUDA, capture the whole update in one graph"""
    run_dir: str = "runs"
    """folder of the run folders"""
    resume: str | None = None
    """run folder to continue, with the arguments it was started with"""
    offline_checkpoint: str | None = None
    """run folder whose offline policy to start the deployments from, instead of training one; its
    own number of offline updates counts, not this one's"""

    # OTC arguments, the same in every script
    sampling: Literal["otc", "uniform", "balanced", "online", "offline"] = "otc"
    """transitions of a fine-tuning update: otc; uniform over all data; balanced (Balanced Replay);
    online data only; or offline data only, the control that further updates alone are measured
    by"""
    candidates: int = 512
    """size of the minibatch B of all data that OTC draws from"""
    references: int = 2000
    """size of the minibatch D of the latest deployment's data that candidates are matched with"""
    alpha: float = 1.0
    """first degree of the correction, equation (3); 0 is uniform"""
    adaptive_alpha: bool = True
    """change alpha with the mean transition distance, equation (4)"""
    alpha_max: float | None = None
    """ceiling of the adaptive alpha; default: none, as in the paper"""
    replacement: bool = True
    """draw ranks with replacement"""
    exclude_self_matches: bool = False
    """never match a candidate with itself"""
    distance_candidates: int = 25_600
    """transitions of all data whose mean distance to the latest deployment's data enters equation
    (4); where the data has no more, all of it"""
    embedding_dim: int = 10
    """latent size of the conditional VAE of the embedding distance"""
    embedding_kl_weight: float = 5e-4
    """weight of the KL divergence against the squared error in that VAE; see docs/otc.md"""
    embedding_learning_rate: float = 1e-4
    """Adam's, of that VAE"""

    # TD3+BC arguments
    finetune_updates: int = 2000
    """L, updates after each deployment"""
    distance: Literal["embedding", "value"] = "value"
    """value (d_q) or embedding (d_e: a conditional VAE's mean, trained in the offline phase)"""
    hidden_size: int = 256
    """units in each of the two hidden layers of every network"""
    actor_learning_rate: float = 3e-4
    """Adam's, of the actor"""
    critic_learning_rate: float = 3e-4
    """Adam's, of the critics"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """rate at which the target networks follow"""
    exploration_noise: float = 0.1
    """standard deviation of the Gaussian noise on the actions of an agent that explores"""
    bc_alpha: float = 2.5
    """weight of Q, relative to its mean magnitude, against cloning; TD3+BC's alpha"""
    policy_noise: float = 0.2
    """standard deviation of the noise on the target policy's actions"""
    noise_clip: float = 0.5
    """largest magnitude of that noise"""
    policy_delay: int = 2
    """critic updates per update of the actor and the target networks"""


# --- Networks ---
# Every tensor starts with the group dimension G: g = seed_index * num_agents + agent.


class Linear(nn.Module):
    """G independent linear layers: (G, batch, in) -> (G, batch, out)."""

    def __init__(self, num_groups: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_groups, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_groups, 1, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.shape[2] == 1 and not x.is_cuda:  # faster on a CPU
            return (x * self.weight.mT).sum(2, keepdim=True) + self.bias
        return torch.bmm(x, self.weight).add_(self.bias)


def mlp(num_groups: int, in_features: int, hidden_size: int, out_features: int) -> nn.Sequential:
    """Two hidden layers with ReLU."""
    return nn.Sequential(
        Linear(num_groups, in_features, hidden_size),
        nn.ReLU(inplace=True),
        Linear(num_groups, hidden_size, hidden_size),
        nn.ReLU(inplace=True),
        Linear(num_groups, hidden_size, out_features),
    )


class EmbeddingVAE(nn.Module):
    """OTC's conditional VAE: encodes (s, a_i, s') into an embedding and decodes a_i from (s, s',
    z); section 3.5."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, hidden_size: int, latent_dim: int):
        super().__init__()
        self.encoder = mlp(G, 2 * obs_dim + action_dim, hidden_size, 2 * latent_dim)
        self.decoder = mlp(G, 2 * obs_dim + latent_dim, hidden_size, action_dim)
        # Scales of the offline observations (obs_dim,), kept with the weights.
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))

    def encode(self, obs, actions, next_obs):
        """Mean and log-std of the embedding, each (G, batch, latent_dim)."""
        obs = (obs - self.obs_mean) / self.obs_std
        next_obs = (next_obs - self.obs_mean) / self.obs_std
        mean, log_std = self.encoder(torch.cat([obs, actions, next_obs], dim=2)).chunk(2, dim=2)
        return mean, log_std.clamp(-4, 15)

    def loss(self, obs, actions, next_obs):
        """Squared error of the decoded action and KL divergence of the embedding; (G,) each."""
        mean, log_std = self.encode(obs, actions, next_obs)
        z = mean + log_std.exp() * torch.randn_like(mean)
        obs = (obs - self.obs_mean) / self.obs_std
        next_obs = (next_obs - self.obs_mean) / self.obs_std
        decoded = torch.tanh(self.decoder(torch.cat([obs, next_obs, z], dim=2)))
        return (decoded - actions).square().mean((1, 2)), kl_divergence(mean, log_std)


def kl_divergence(mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """KL of N(mean, std) from N(0, 1), averaged over batch and latent dimensions: (G, batch,
    latent) -> (G,)."""
    return -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean((1, 2))


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


class Critic(nn.Module):
    """Q(s, a_i)."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, hidden_size: int):
        super().__init__()
        self.network = mlp(G, obs_dim + action_dim, hidden_size, 1)

    def forward(self, obs, actions):
        """(G, batch)"""
        return self.network(torch.cat([obs, actions], dim=2)).squeeze(2)


class DeterministicActor(nn.Module):
    """pi(s) in the action box [-1, 1]."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, hidden_size: int):
        super().__init__()
        self.network = mlp(G, obs_dim, hidden_size, action_dim)

    def forward(self, obs):
        """(G, batch, action_dim)"""
        return torch.tanh(self.network(obs))


# --- Agents ---


class TD3BC(nn.Module):
    """G independent TD3+BC learners; losses are averaged over the batch and summed over G."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        sizes = (G, obs_dim, action_dim, args.hidden_size)
        self.actor, self.target_actor = DeterministicActor(*sizes), DeterministicActor(*sizes)
        self.qf1, self.qf2 = Critic(*sizes), Critic(*sizes)
        self.target_qf1, self.target_qf2 = Critic(*sizes), Critic(*sizes)
        self.live = nn.ModuleList([self.actor, self.qf1, self.qf2])
        self.target = nn.ModuleList([self.target_actor, self.target_qf1, self.target_qf2])
        self.target.load_state_dict(self.live.state_dict())
        self.target.requires_grad_(False)
        # Scales of the offline observations (obs_dim,), applied to online ones unchanged
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        # Losses of the latest actor update, reported until the next
        self.register_buffer("actor_loss", torch.zeros(G))
        self.register_buffer("bc_loss", torch.zeros(G))
        qf_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.qf_optimizer = adam(qf_parameters, args.critic_learning_rate)
        self.actor_optimizer = adam(self.actor.parameters(), args.actor_learning_rate)
        self.optimizers = [self.qf_optimizer, self.actor_optimizer]

    def measure_scales(self, replay: Replay) -> None:
        """Take the mean and standard deviation of the offline observations."""
        obs_mean, obs_std = replay.obs_statistics()
        self.obs_mean.copy_(obs_mean)
        self.obs_std.copy_(obs_std + 1e-3)

    def scaled(self, obs: torch.Tensor) -> torch.Tensor:
        """Observations as the networks see them: (G, batch, obs_dim)."""
        return (obs - self.obs_mean) / self.obs_std

    def update(self, batch: dict[str, torch.Tensor], update_actor: bool) -> dict[str, torch.Tensor]:
        """One update of the critics, and of actor and targets where their turn has come, on a batch
        as `Replay.gather` returns it; losses (G,)."""
        args = self.args
        obs, next_obs = self.scaled(batch["obs"]), self.scaled(batch["next_obs"])
        actions = batch["actions"]

        # Critics: y = r + gamma * the smaller target critic at a smoothed action of the target
        # policy.
        with torch.no_grad():
            noise = (args.policy_noise * torch.randn_like(actions)).clamp(
                -args.noise_clip, args.noise_clip
            )
            next_actions = (self.target_actor(next_obs) + noise).clamp(-1, 1)
            next_q1 = self.target_qf1(next_obs, next_actions)
            next_q2 = self.target_qf2(next_obs, next_actions)
            next_q = torch.minimum(next_q1, next_q2)
            target = batch["rewards"] + args.gamma * (1 - batch["terminations"]) * next_q
        q1, q2 = self.qf1(obs, actions), self.qf2(obs, actions)
        qf1_loss, qf2_loss = (q1 - target).square().mean(1), (q2 - target).square().mean(1)
        step(self.qf_optimizer, qf1_loss + qf2_loss)

        if update_actor:
            # Actor: climb the first critic, relative to its mean magnitude, and clone the data.
            policy_actions = self.actor(obs)
            q = self.qf1(obs, policy_actions)  # (G, batch)
            weight = args.bc_alpha / q.detach().abs().mean(1)  # TD3+BC's lambda, (G,)
            bc_loss = (policy_actions - actions).square().mean((1, 2))
            actor_loss = -weight * q.mean(1) + bc_loss
            step(self.actor_optimizer, actor_loss)
            follow(self.target, self.live, args.tau)
            self.actor_loss.copy_(actor_loss.detach())
            self.bc_loss.copy_(bc_loss.detach())
        return {
            "losses/qf1_loss": qf1_loss.detach(),
            "losses/qf2_loss": qf2_loss.detach(),
            "losses/qf1_values": q1.detach().mean(1),
            "losses/actor_loss": self.actor_loss,
            "losses/bc_loss": self.bc_loss,
        }

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """(G, E, obs_dim) -> (G, E, action_dim)."""
        return self.actor(self.scaled(obs))

    @torch.no_grad()
    def explore(self, obs: torch.Tensor) -> torch.Tensor:
        """The policy's action with Gaussian noise; shapes as of `act`."""
        actions = self.act(obs)
        noise = self.args.exploration_noise * torch.randn_like(actions)
        return (actions + noise).clamp(-1, 1)

    @torch.no_grad()
    def q_value(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q(s, a_i), the smaller of the live twin critics: (G, batch)."""
        obs = self.scaled(obs)
        return torch.minimum(self.qf1(obs, actions), self.qf2(obs, actions))

    @torch.no_grad()
    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """V(s), Q of the policy's action: (G, batch)."""
        return self.q_value(obs, self.act(obs))

    def get_extra_state(self):
        """The optimisers' states, so that `state_dict` holds the whole learner."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def set_extra_state(self, state) -> None:
        for optimizer, its_state in zip(self.optimizers, state, strict=True):
            restore(optimizer, its_state)


def adam(parameters, learning_rate: float) -> torch.optim.Adam:
    """Adam in one kernel, able to be captured in a CUDA graph."""
    parameters = list(parameters)
    capturable = parameters[0].is_cuda
    return torch.optim.Adam(parameters, learning_rate, fused=True, capturable=capturable)


def restore(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load its state but for what this run sets: the learning rate, and what capture needs."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step on the sum of a loss (G,), with gradients of the optimiser's own parameters only."""
    parameters = optimizer.param_groups[0]["params"]
    gradients = torch.autograd.grad(loss.sum(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


@torch.no_grad()
def follow(target: nn.Module, live: nn.Module, tau: float) -> None:
    """Move target parameters by a share tau towards the live ones."""
    torch._foreach_lerp_(list(target.parameters()), list(live.parameters()), tau)


# --- Online transition correction ---


class TransitionSampler(nn.Module):
    """Draws the transitions of every fine-tuning update (--sampling); Algorithm 1, lines 6 to
    14."""

    def __init__(self, replay: Replay, args: Args):
        super().__init__()
        self.replay, self.args = replay, args
        G, device = replay.num_groups, replay.device
        obs_dim, action_dim = replay.obs.shape[2], replay.actions.shape[2]
        alpha = args.alpha if args.sampling == "otc" else torch.nan
        self.register_buffer("alpha", torch.full((G,), alpha, device=device))
        # Mean transition distance of the deployment before, for equation (4)
        self.register_buffer("distance", torch.full((G,), torch.nan, device=device))
        self.embedding = self.density = self.latest_embeddings = None
        if args.sampling == "otc" and args.distance == "embedding":
            sizes = (G, obs_dim, action_dim, args.hidden_size, args.embedding_dim)
            self.embedding = EmbeddingVAE(*sizes)
            obs_mean, obs_std = replay.obs_statistics()
            self.embedding.obs_mean.copy_(obs_mean)
            self.embedding.obs_std.copy_(obs_std.clamp(min=1e-3))
            self.optimizer = adam(self.embedding.parameters(), args.embedding_learning_rate)
        if args.sampling == "balanced":
            self.density = DensityRatio(G, obs_dim, action_dim)
            self.optimizer = adam(self.density.parameters(), 3e-4)
            size = replay.num_offline + replay.capacity
            self.priorities = sampler.Priorities(G, size, device)

    def update_embedding(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update of the conditional VAE; it ends with the offline phase, so that distances stay
        comparable."""
        error, kl = self.embedding.loss(batch["obs"], batch["actions"], batch["next_obs"])
        step(self.optimizer, error + self.args.embedding_kl_weight * kl)
        return {
            "losses/embedding_reconstruction": error.detach(),
            "losses/embedding_kl": kl.detach(),
        }

    @torch.no_grad()
    def start_deployment(self, agent: nn.Module, k: int) -> None:
        """Once per deployment, after its data has been merged: adapt alpha, or begin a new density
        ratio."""
        replay, args = self.replay, self.args
        if args.sampling == "otc":
            # Equation (4), before any update: a large sample of B against the whole of D.
            merged = torch.arange(replay.num_offline + int(replay.num_online), device=replay.device)
            latest = merged[-replay.deployment_steps :].expand(replay.num_groups, -1)
            candidates = merged.expand(replay.num_groups, -1)
            if args.distance_candidates < len(merged):
                candidates = replay.draw_merged(args.distance_candidates)
            if self.embedding is not None:
                self.embed_latest(latest)
            distance = self.transition_distance(agent, candidates, latest).mean(1)
            if args.adaptive_alpha and k > 1:
                alpha = sampler.adapt_alpha(self.alpha, distance, self.distance)
                self.alpha.copy_(
                    alpha if args.alpha_max is None else alpha.clamp(max=args.alpha_max)
                )
            usable = sampler.usable(distance)
            self.distance.copy_(torch.where(usable, distance, self.distance))
        elif args.sampling == "balanced":
            # In place, where a captured graph expects them.
            self.density.reset_parameters()
            for state in self.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
            # Half of the first draws' mass is online.
            online = int(replay.num_online)
            self.priorities.fill(0, replay.num_offline, 1.0)
            end = replay.num_offline + online
            self.priorities.fill(replay.num_offline, end, replay.num_offline / online)

    def draw(self, agent: nn.Module) -> torch.Tensor:
        """(G, batch_size) indices of the transitions of one update."""
        replay, args = self.replay, self.args
        if args.sampling == "uniform":
            return replay.draw_merged(args.batch_size)
        if args.sampling == "online":
            return replay.draw_online(args.batch_size)
        if args.sampling == "offline":
            return replay.draw_offline(args.batch_size)
        if args.sampling == "balanced":
            return self.draw_balanced()
        candidates = replay.draw_merged(args.candidates)  # the minibatch B of line 10
        references = replay.draw_latest(args.references)  # the minibatch D of line 10
        distance = self.transition_distance(agent, candidates, references)  # lines 11 to 13
        picked = sampler.draw_by_rank(distance, self.alpha, args.batch_size, args.replacement)
        return candidates.gather(1, picked)  # line 14

    @torch.no_grad()
    def transition_distance(
        self, agent: nn.Module, candidates: torch.Tensor, references: torch.Tensor
    ):
        """Distance of each candidate's next state to its best match's: indices (G, B), and (G, D)
        of the latest deployment's transitions -> (G, B)."""
        exclude = None
        if self.args.exclude_self_matches:
            exclude = sampler.find_self_matches(candidates, references)
        if self.embedding is not None:
            # One embedding of (s, a_i, s') stands for both e(s, a_i) and e(s'): the match's
            # distance is the result.
            row = (references - self.replay.latest_start).unsqueeze(2)
            embedded = self.latest_embeddings.take_along_dim(row, dim=1)
            return sampler.match_by_embedding(self.embed(candidates), embedded, exclude)

        def value_and_end(next_obs, terminations):
            return torch.stack([agent.value(next_obs), terminations], dim=2)

        both = torch.cat([candidates, references], dim=1)
        q = self.replay.in_parts(agent.q_value, both, ("obs", "actions"))
        sizes = [candidates.shape[1], references.shape[1]]
        match = sampler.match_by_value(*q.split(sizes, dim=1), exclude)
        # V(s'*) of the matches alone, and its mean over them and not over all of D: otherwise low
        # values rank first wherever the two means differ; see docs/otc.md.
        both = torch.cat([candidates, references.gather(1, match)], dim=1)
        columns = ("next_obs", "terminations")
        next_states = self.replay.in_parts(value_and_end, both, columns)  # (G, 2 B, 2)
        (v_next, end), (v_next_star, end_star) = (x.unbind(2) for x in next_states.chunk(2, 1))
        # Nothing follows an end, and its V is not learned: pairs with one are drawn as by chance.
        is_end = (end > 0) | (end_star > 0)
        v_next = sampler.relative_to_mean(v_next, is_end)
        v_next_star = sampler.relative_to_mean(v_next_star, is_end)
        return sampler.leave_unranked((v_next - v_next_star).abs(), is_end)

    def embed(self, index: torch.Tensor) -> torch.Tensor:
        """(G, n) -> (G, n, embedding_dim)."""
        columns = ("obs", "actions", "next_obs")
        return self.replay.in_parts(lambda **x: self.embedding.encode(**x)[0], index, columns)

    def embed_latest(self, latest: torch.Tensor) -> None:
        """Embed the whole of D^k, indices (G, M), once: the conditional VAE does not change any
        more."""
        if self.latest_embeddings is None:
            self.latest_embeddings = self.embed(latest)
        else:  # in place, where a captured graph expects them
            self.latest_embeddings.copy_(self.embed(latest))

    def draw_balanced(self, batch_size: int = 256, temperature: float = 5.0) -> torch.Tensor:
        """Balanced Replay: in proportion to the density ratio, which takes one update and is
        refreshed where drawn."""
        replay, columns = self.replay, ("obs", "actions")
        offline = replay.gather(replay.draw_offline(batch_size), columns)
        online = replay.gather(replay.draw_online(batch_size), columns)
        step(self.optimizer, self.density.loss(offline, online))
        index = self.priorities.draw(self.args.batch_size)
        batch = replay.gather(index, columns)
        with torch.no_grad():
            usual = self.density(offline["obs"], offline["actions"]).pow(1 / temperature).mean(1)
            ratio = self.density(batch["obs"], batch["actions"]).pow(1 / temperature)
            priority = ratio / (usual.unsqueeze(1) + 1e-10)
            self.priorities.update(index, priority.clamp(1e-3, 1e3))
        return index

    def diagnostics(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the draw of an update amounts to; (G,) each."""
        metrics = {
            "otc/unique_fraction": sampler.unique_fraction(index),
            "otc/online_fraction": self.replay.is_online(index).float().mean(1),
        }
        if self.args.sampling == "otc":
            size = sampler.effective_sample_size(self.alpha, self.args.candidates)
            metrics["otc/effective_sample_size"] = size
        return metrics

    def get_extra_state(self):
        """The optimiser's state, Balanced Replay's priorities and the embeddings of D^k."""
        state = {"latest_embeddings": self.latest_embeddings}
        if self.embedding is not None or self.density is not None:
            state["optimizer"] = self.optimizer.state_dict()
        if self.density is not None:
            state["priorities"] = self.priorities.state_dict()
        return state

    def set_extra_state(self, state) -> None:
        if state["latest_embeddings"] is not None:
            self.latest_embeddings = state["latest_embeddings"].to(self.replay.device)
        if "optimizer" in state:
            restore(self.optimizer, state["optimizer"])
        if "priorities" in state:
            self.priorities.load_state_dict(state["priorities"])


# --- Deployment ---


def act(
    agent: nn.Module, obs: np.ndarray, num_seeds: int, device: torch.device, explorer: int = -1
):
    """Actions of every seed's team, E environments per seed: (S * E, N, obs_dim) -> (S * E, N,
    action_dim) array. Agent number `explorer` explores; -1: none does."""
    by_group = torch.as_tensor(obs).unflatten(0, (num_seeds, -1)).transpose(1, 2).flatten(0, 1)
    by_group, N = by_group.to(device), obs.shape[1]
    actions = agent.act(by_group)  # (G, E, action_dim)
    if explorer >= 0:
        actions[explorer::N] = agent.explore(by_group)[explorer::N]
    by_env = actions.unflatten(0, (num_seeds, -1)).transpose(1, 2).flatten(0, 1)
    return by_env.cpu().numpy()


def deploy(
    envs, agent: nn.Module, steps: int, seed, device: torch.device, exploration: str = "none"
):
    """Run pi^{k-1} for M steps, one environment per seed; with sequential exploration agent i
    explores during the i-th of N equal shares of them, section 4.6.

    Returns the arguments of `Replay.add`, and each seed's returns of the episodes that began early
    enough to end within the M steps whatever their length, so that short episodes are not
    over-represented.
    """
    S, N = envs.num_envs, envs.num_agents
    obs = envs.reset(seed=seed)
    data = {
        "obs": np.empty((S, steps, N, envs.obs_dim), np.float32),
        "actions": np.empty((S, steps, N, envs.action_dim), np.float32),
        "rewards": np.empty((S, steps), np.float32),
        "next_obs": np.empty((S, steps, N, envs.obs_dim), np.float32),
        "terminations": np.empty((S, steps), bool),
        "explorer": np.empty((S, steps), np.int8),
    }
    returns, episode_return, begun = [[] for _ in range(S)], np.zeros(S), np.zeros(S, int)
    latest_begin = max(0, steps - envs.max_episode_steps)
    for t in range(steps):
        explorer = t * N // steps if exploration == "sequential" else -1
        actions = act(agent, obs, S, device, explorer)
        next_obs, rewards, terminations, truncations, final_obs = envs.step(envs.to_box(actions))
        step_data = (obs, actions, rewards, final_obs, terminations, explorer)
        for array, value in zip(data.values(), step_data, strict=True):
            array[:, t] = value
        obs = next_obs
        episode_return += rewards
        for s in np.flatnonzero(terminations | truncations):
            if begun[s] <= latest_begin:
                returns[s].append(float(episode_return[s]))
            episode_return[s], begun[s] = 0.0, t + 1
    return data, returns


def evaluate(
    envs, agent: nn.Module, num_seeds: int, seed, device: torch.device
) -> list[list[float]]:
    """Returns of the first episode in every environment, per seed."""
    obs = envs.reset(seed=seed)
    returns, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
    while running.any():
        actions = act(agent, obs, num_seeds, device)
        obs, rewards, terminations, truncations, _ = envs.step(envs.to_box(actions))
        returns += rewards * running
        running &= ~(terminations | truncations)
    return returns.reshape(num_seeds, -1).tolist()


# --- Main: Algorithm 1 ---


def main(args: Args) -> None:
    script = Path(__file__).stem
    device = runs.pick_device(args)
    checkpoint = None
    if args.resume is not None:
        checkpoint = runs.read_checkpoint(args.resume, "checkpoint.pt", script)
    elif args.offline_checkpoint is not None:
        checkpoint = runs.read_offline_checkpoint(args, script)

    # The offline data B^0, each agent with its own actions only
    dataset = datasets.load(args.env, args.dataset, args.dataset_size, args.split)
    print(dataset.source)
    num_steps = runs.deployment_steps(args, len(dataset.rewards))  # M
    S, task = args.num_seeds, datasets.parse_env(args.env)[0]
    envs = make_vec(task, S, args.seed, args.split, args.env_workers)
    num_eval_envs = args.eval_episodes * S
    eval_envs = make_vec(task, num_eval_envs, args.seed, args.split, args.env_workers)
    N = envs.num_agents

    # Line 1: initialise the learners and alpha
    torch.manual_seed(args.seed)
    replay = Replay(dataset, S, args.deployments, num_steps, device)
    del dataset
    with device:
        agent = TD3BC(S * N, envs.obs_dim, envs.action_dim, args)
        agent.measure_scales(replay)
        transitions = TransitionSampler(replay, args)
    graph = args.cuda_graph and device.type == "cuda"
    phase, done = 0, 0  # deployment k, 0 for the offline phase, and its updates so far
    if checkpoint is not None:
        agent.load_state_dict(checkpoint["agent"])
        transitions.load_state_dict(checkpoint["sampler"], strict=args.resume is not None)
        if args.resume:
            replay.load_state_dict(checkpoint["replay"])
        phase, done = checkpoint["progress"]
        runs.set_rng_state(checkpoint["rng"], device)
    run = runs.Run(args, script, checkpoint if args.resume else None)

    def state() -> dict:
        return {
            "agent": agent.state_dict(),
            "sampler": transitions.state_dict(),
            "replay": replay.state_dict(),
            "progress": (phase, done),
            "rng": runs.get_rng_state(device),
        }

    def is_actors_turn(number: int) -> bool:
        return number % args.policy_delay == 0

    def offline_update(update_actor: bool) -> dict[str, torch.Tensor]:
        batch = replay.gather(replay.draw_offline(args.batch_size))
        losses = agent.update(batch, update_actor)
        if transitions.embedding is not None:
            losses |= transitions.update_embedding(batch)
        return losses

    def finetune_update(update_actor: bool) -> dict[str, torch.Tensor]:
        index = transitions.draw(agent)  # lines 10 to 14
        losses = agent.update(replay.gather(index), update_actor)  # line 15
        return losses | transitions.diagnostics(index)

    def train(update: runs.Graphed, stop: int) -> None:
        """The updates of a phase that are still to do, logged, checkpointed and open to
        interruption."""
        nonlocal done
        before = runs.updates_before(args, phase)
        name = f"fine-tuning {phase}" if phase else "offline"
        for number in run.updates(name, done, stop, before):
            losses, done = update(number), number
            if done % runs.LOG_EVERY == 0:
                run.log_losses(losses, before + done)
                obs = replay.gather(replay.draw_offline(args.batch_size))["obs"]
                run.log({"otc/value_mean": agent.value(obs).mean(1).view(S, N)}, before + done)
            if phase == 0 and done % args.eval_every == 0:
                run.record_offline(done, evaluate(eval_envs, agent, S, (args.seed, 0), device))
            if done % args.checkpoint_every == 0:
                run.save(state())
            run.stop_if_asked(lambda: run.save(state()))

    # Line 2: learn pi^0 from B^0
    if phase == 0 and args.offline_checkpoint is None:
        train(runs.Graphed(offline_update, graph, is_actors_turn), args.offline_updates)
        run.save(state(), "offline.pt")
    finetune = runs.Graphed(finetune_update, graph, is_actors_turn)
    for k in range(max(1, phase), args.deployments + 1):  # line 3
        if k > phase:
            # Line 4: deploy pi^{k-1} for M steps; its episodes are its evaluation
            for each in (envs, eval_envs):  # a task may change between deployments
                each.set_deployment(k, args.deployments)
            start = time.perf_counter()
            seed = (args.seed, k)
            data, returns = deploy(envs, agent, num_steps, seed, device, args.exploration)
            steps_per_second = S * num_steps / (time.perf_counter() - start)
            exploring = None
            if args.exploration != "none":  # those episodes do not judge the policy
                exploring, returns = returns, [[]]
            if not all(returns):  # too short for one whole episode
                returns = evaluate(eval_envs, agent, S, seed, device)
            alpha = transitions.alpha.view(S, N)
            run.record_return(k - 1, (k - 1) * num_steps, returns, alpha, exploring)
            # Line 5: B^k = B^{k-1} with D^k
            replay.add(**data)
            # Lines 6 to 8: alpha by equation (4)
            transitions.start_deployment(agent, k)
            run.log({"time/env_steps_per_second": torch.full((S,), steps_per_second)}, k)
            if args.sampling == "otc":
                distance = transitions.distance.view(S, N)
                run.log({"otc/alpha": alpha, "otc/transition_distance": distance}, k)
            phase, done = k, 0
            run.save(state())
        # Lines 9 to 16: fine-tune to pi^k
        train(finetune, args.finetune_updates)
    run.save(state())
    eval_envs.set_deployment(args.deployments + 1, args.deployments)
    returns = evaluate(eval_envs, agent, S, (args.seed, args.deployments + 1), device)
    total_steps = args.deployments * num_steps
    run.record_return(args.deployments, total_steps, returns, transitions.alpha.view(S, N))
    run.finish()


if __name__ == "__main__":
    runs.cli(main, Args)
