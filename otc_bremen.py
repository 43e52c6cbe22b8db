"""OTC on BREMEN: online tuning for offline decentralised multi-agent reinforcement learning.

Every agent learns an ensemble of dynamics models from its own logged data (s, a_i, r, s'), without
the other agents' actions, clones the data's policy, and improves it by TRPO on rollouts that it
imagines in that ensemble. The agents are then deployed K times for M steps; after each deployment
they fine-tune on the merged data, where OTC (online transition correction) draws the transitions
that the models are fitted to: those whose next states agree with what the latest deployment shows.

Papers: OTC, Jiang and Lu, AAAI 2023; BREMEN, Matsushima et al., ICLR 2021,
https://arxiv.org/abs/2006.03647; TRPO, Schulman et al., ICML 2015. Against BREMEN's own code
(https://github.com/matsuolab/BREMEN): agents and seeds are stacked, reward and termination are
learned, rollouts are short, start from states of the data and bootstrap with a learned value at
their end, and models and policy go on from deployment to deployment. The whole list, and what OTC
leaves open, is in docs/otc_bremen.md and docs/otc.md.

    python otc_bremen.py --env halfcheetah-medium

What it scores and how long it takes: docs/otc_bremen.md.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import InputError, cli, embedding, sampler, strategies
from common.cli import Count, Natural, OnlineArgs, Positive, Share
from common.embedding import Distance
from common.loop import Training
from common.nets import Actor, Learner, adam, follow, keep_own, mean_over_own, mlp, step
from common.replay import Replay
from common.strategies import Strategy


@dataclass
class Args(OnlineArgs):
    # OTC arguments, the same in every script
    sampling: Literal["otc", "uniform", "mixed", "balanced", "online", "offline"] = "otc"
    """transitions of a fine-tuning update: otc; uniform over all data; mixed, with --online-share
    of online data; balanced (Balanced Replay); online data only; or offline data only, the control
    that further updates alone are measured by"""
    online_share: Share | None = None
    """of mixed; default: what alpha 1 draws if all online candidates come before all others"""
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
    distance_candidates: Count = 25_600
    """transitions of all data whose mean distance to the latest deployment's data enters equation
    (4); where the data has no more, all of it"""
    embedding_updates: Natural | None = None
    """updates of the distance's networks on the offline data, before the first deployment; default:
    as many as --offline-updates"""
    embedding_dim: int = 10
    """latent size of the VAEs of the embedding and two-stage distances"""
    embedding_kl_weight: float = 5e-4
    """weight of the KL divergence against the squared error in those VAEs; see docs/otc.md"""
    embedding_learning_rate: float = 1e-4
    """Adam's, of a distance's networks"""

    # BREMEN arguments
    finetune_updates: int = 2000
    """L, updates after each deployment"""
    distance: Distance = "embedding"
    """what a draw compares: value (d_q), or, by networks of their own, embedding (d_e, section 3.5)
    and two-stage (section 3.3); not the paper's: raw (scaled states and actions) and residual (what
    the own action does not explain)"""
    value_mean: Literal["matches", "references"] = "matches"
    """whose V(s'*) is averaged in d_q, section 3.3: that of the matches, or of all references"""
    hidden_size: int = 256
    """units in each of the two hidden layers of every network"""
    actor_learning_rate: float = 1e-4
    """Adam's, of the policy while it clones the data"""
    critic_learning_rate: float = 5e-4
    """Adam's, of the dynamics models and the value network"""
    gamma: Share = 0.99
    """discount"""
    tau: Share = 0.005
    """rate at which the target value network follows"""
    num_models: int = 5
    """members of the dynamics ensemble of each agent"""
    termination: Literal["learned", "never"] = "learned"
    """whether imagined rollouts end where a member says so; never: for tasks that only time ends"""
    clone_updates: Natural = 50_000
    """offline updates that clone the data's policy and learn its value, before any improvement"""
    improve_every: int = 100
    """updates of the models per TRPO step on imagined rollouts, after cloning"""
    rollouts: int = 200
    """imagined rollouts per improvement, from states of the data"""
    rollout_length: int = 25
    """steps of an imagined rollout"""
    policy_std: Annotated[float, cli.Range(0.01, 0.95)] = 0.1
    """standard deviation of the policy's noise at first; TRPO changes it"""
    kl_limit: Positive = 0.05
    """largest mean KL divergence of the policy before an improvement from the one after it"""
    cg_iterations: int = 10
    """iterations of the conjugate gradient"""
    gae_lambda: Share = 0.95
    """lambda of the generalised advantages and of the returns that the value is fitted to"""
    value_updates: int = 40
    """minibatch steps of the value network per improvement"""

    SAME_POLICY: ClassVar = (*OnlineArgs.SAME_POLICY, "num_models", "policy_std")

    def check(self) -> None:
        """Refuse a phase in which the policy would never improve."""
        super().check()
        if self.deployments and self.improve_every > self.finetune_updates:
            raise InputError(
                f"--improve-every {self.improve_every}: with --finetune-updates "
                f"{self.finetune_updates} the policy would not improve in any deployment"
            )
        first = self.clone_updates + self.improve_every
        if self.offline_checkpoint is None and self.offline_updates < first:
            raise InputError(
                f"--offline-updates {self.offline_updates}: with --clone-updates "
                f"{self.clone_updates} and --improve-every {self.improve_every} the policy would "
                f"only be cloned; at least {first}"
            )


# --- Networks ---
# Every tensor starts with the group dimension G: g = seed_index * num_agents + agent.


class DynamicsEnsemble(nn.Module):
    """num_models deterministic networks per group, from scaled observation and action to the change
    of the former, the reward and the logit of termination; row g * num_models + m is member m of
    group g."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.num_models, self.own_obs = args.num_models, None
        self.terminates = args.termination == "learned"
        sizes = obs_dim + action_dim, args.hidden_size, obs_dim + 2
        self.network = mlp(G * args.num_models, *sizes)
        # Of each agent's scaled offline data, kept with the weights and applied to online data
        # unchanged: scales of changes and rewards, and the box that imagined states do not leave
        self.register_buffer("delta_mean", torch.zeros(G, 1, obs_dim))
        self.register_buffer("delta_std", torch.ones(G, 1, obs_dim))
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))
        self.register_buffer("low", torch.full((G, 1, obs_dim), -torch.inf))
        self.register_buffer("high", torch.full((G, 1, obs_dim), torch.inf))

    def outputs(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Of every member, (G, num_models, batch, obs_dim + 2)."""
        x = torch.cat([obs, actions], dim=2).repeat_interleave(self.num_models, dim=0)
        return self.network(x).unflatten(0, (-1, self.num_models))

    def loss(self, obs, actions, next_obs, rewards, terminations) -> tuple[torch.Tensor, ...]:
        """Squared errors of the scaled change of state and reward, cross-entropy of termination;
        (G, num_models) each. Members see the same batch and differ by their initialisation."""
        delta = (next_obs - obs - self.delta_mean) / self.delta_std
        rewards = (rewards - self.reward_mean) / self.reward_std
        output = self.outputs(obs, actions)
        # (G, num_models, batch, obs_dim), and twice (G, num_models, batch)
        output_delta, output_reward, logit = output[..., :-2], output[..., -2], output[..., -1]
        terminations = terminations.unsqueeze(1).expand_as(logit)
        return (
            mean_over_own((output_delta - delta.unsqueeze(1)).square(), self.own_obs),
            (output_reward - rewards.unsqueeze(1)).square().mean(2),
            F.binary_cross_entropy_with_logits(logit, terminations, reduction="none").mean(2),
        )

    def predict(self, obs: torch.Tensor, actions: torch.Tensor, members: torch.Tensor):
        """What member `members[g]` (G,) of each group g expects, and no other is evaluated.

        Returns the next scaled observation (G, batch, obs_dim), the reward and the probability of
        termination (G, batch).
        """
        rows = self.num_models * torch.arange(len(members), device=obs.device) + members
        weights = {name: p.index_select(0, rows) for name, p in self.network.named_parameters()}
        output = torch.func.functional_call(self.network, weights, torch.cat([obs, actions], 2))
        return self.expected(obs, output)

    def predict_all(self, obs: torch.Tensor, actions: torch.Tensor):
        """What every member expects, one member's (G, batch) after another's."""
        output = self.outputs(obs, actions).flatten(1, 2)
        return self.expected(obs.repeat(1, self.num_models, 1), output)

    def expected(self, obs: torch.Tensor, output: torch.Tensor):
        """What outputs of the network say of transitions from `obs`."""
        next_obs = obs + self.delta_mean + self.delta_std * output[..., :-2]
        rewards = self.reward_mean + self.reward_std * output[..., -2]
        p_end = torch.sigmoid(output[..., -1]) * self.terminates
        return torch.clamp(next_obs, self.low, self.high), rewards, p_end


class GaussianActor(Actor):
    """pi(a_i | s): a Gaussian with a tanh mean and a learned log-std per action dimension.

    It is not squashed: what leaves the action box is clamped where it is used.
    """

    def __init__(self, G: int, obs_dim: int, action_dim: int, hidden_size: int, std: float):
        super().__init__()
        self.network = mlp(G, obs_dim, hidden_size, action_dim)
        share = 1 + math.log(std) / 5
        self.raw_log_std = nn.Parameter(torch.full((G, 1, action_dim), share).logit())

    @property
    def log_std(self) -> torch.Tensor:
        """(G, 1, action_dim) in (-5, 0); a sigmoid, as a clamp would lose its gradient outside."""
        return 5 * torch.sigmoid(self.raw_log_std) - 5

    def sample(self, mean, log_std):
        """Actions around means, (G, batch, action_dim)."""
        return mean + keep_own(log_std.exp() * torch.randn_like(mean), self.own)

    def forward(self, obs):
        """Mean (G, batch, action_dim) and log-std (G, 1, action_dim)."""
        return keep_own(torch.tanh(self.network(obs)), self.own), self.log_std


class ValueNetwork(nn.Module):
    """V(s); its network's output is in units of the reward's spread over the horizon."""

    def __init__(self, G: int, obs_dim: int, hidden_size: int):
        super().__init__()
        self.network = mlp(G, obs_dim, hidden_size, 1)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, obs):
        """(G, batch)"""
        return self.mean + self.scale * self.network(obs).squeeze(2)

    def loss(self, obs, target):
        """Squared error in those units, (G, batch)."""
        return ((self(obs) - target) / self.scale).square()


# --- Learner ---


class BREMEN(Learner):
    """G independent BREMEN learners; losses are averaged over the batch and summed over G."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__(G, obs_dim)
        self.args = args
        self.model = DynamicsEnsemble(G, obs_dim, action_dim, args)
        self.actor = GaussianActor(G, obs_dim, action_dim, args.hidden_size, args.policy_std)
        self.vf = ValueNetwork(G, obs_dim, args.hidden_size)
        self.target_vf = ValueNetwork(G, obs_dim, args.hidden_size)
        self.target_vf.load_state_dict(self.vf.state_dict())
        self.target_vf.requires_grad_(False)
        self.model_optimizer = adam(self.model.parameters(), args.critic_learning_rate)
        self.vf_optimizer = adam(self.vf.parameters(), args.critic_learning_rate)
        self.clone_optimizer = adam(self.actor.network.parameters(), args.actor_learning_rate)
        self.optimizers = [self.model_optimizer, self.vf_optimizer, self.clone_optimizer]
        self.keep_measured(
            *("model_loss", "reward_loss", "termination_loss", "clone_loss", "value_loss"),
            *("surrogate", "kl", "step_size", "imagined_return"),
        )

    def measure_scales(self, replay: Replay) -> None:
        """Once, before training: the scales of the offline data and the box around it."""
        super().measure_scales(replay)
        model, n = self.model, replay.num_offline
        model.own_obs = replay.own_obs
        delta_mean, delta_std = replay.change_statistics()
        model.delta_mean.copy_(delta_mean / self.obs_std)
        model.delta_std.copy_((delta_std + 1e-3) / self.obs_std)
        model.reward_mean.copy_(replay.rewards[0, :n].mean())
        model.reward_std.copy_(replay.reward_std() + 1e-3)
        obs, next_obs = replay.obs[:, :n], replay.next_obs[:, :n]
        low = torch.minimum(obs, next_obs).amin(1, keepdim=True)
        high = torch.maximum(obs, next_obs).amax(1, keepdim=True)
        model.low.copy_(self.scaled(replay.per_group(low)))
        model.high.copy_(self.scaled(replay.per_group(high)))
        horizon = 1 / max(1 - self.args.gamma, 1e-3)
        for vf in (self.vf, self.target_vf):
            vf.mean.copy_(model.reward_mean * horizon)
            vf.scale.copy_(model.reward_std * horizon)

    def report(self, **measured: torch.Tensor) -> dict[str, torch.Tensor]:
        """And the policy's noise as it is."""
        policy_std = mean_over_own(self.actor.log_std.detach().exp(), self.own)
        return super().report(**measured) | {"losses/policy_std": policy_std}

    def update(self, batch: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
        """One update of the models, and of the cloned policy and its value where `kind` is "clone",
        on a batch as `Replay.gather` returns it; losses (G,)."""
        args, actions = self.args, batch["actions"]
        obs, next_obs = self.scaled(batch["obs"]), self.scaled(batch["next_obs"])
        rewards, terminations = batch["rewards"], batch["terminations"]
        of_models = self.model.loss(obs, actions, next_obs, rewards, terminations)
        model_loss, reward_loss, termination_loss = of_models  # (G, num_models)
        loss = model_loss + reward_loss + self.model.terminates * termination_loss
        step(self.model_optimizer, loss)
        names = "model_loss", "reward_loss", "termination_loss"
        measured = {name: x.mean(1) for name, x in zip(names, of_models, strict=True)}
        if kind == "clone":
            mean, _ = self.actor(obs)
            clone_loss = mean_over_own((mean - actions).square(), self.own)
            step(self.clone_optimizer, clone_loss)

            # The value of the policy that made the data, by TD(0)
            with torch.no_grad():
                target = rewards + args.gamma * (1 - terminations) * self.target_vf(next_obs)
            value_loss = self.vf.loss(obs, target).mean(1)
            step(self.vf_optimizer, value_loss)
            follow(self.target_vf, self.vf, args.tau)
            measured |= {"clone_loss": clone_loss, "value_loss": value_loss}
        return self.report(**measured)

    def improve(self, start_obs: torch.Tensor) -> dict[str, torch.Tensor]:
        """One TRPO step on rollouts imagined from start_obs (G, rollouts, obs_dim), then the value
        is fitted to their lambda-returns; losses (G,)."""
        args = self.args
        obs, actions, rewards, ends, valid = self.imagine(self.scaled(start_obs))
        with torch.no_grad():
            values = self.vf(obs.flatten(1, 2)).unflatten(1, obs.shape[1:3])  # (G, T + 1, R)
            advantages = generalized_advantages(rewards, values, ends, args.gamma, args.gae_lambda)
            returns = advantages + values[:, :-1]
            imagined_return = (rewards * valid).sum(1).mean(1)

        # Every imagined step is a row, (G, T * R); those after an end have weight 0.
        obs, actions = obs[:, :-1].flatten(1, 2), actions.flatten(1, 2)
        advantages, returns, valid = (x.flatten(1) for x in (advantages, returns, valid))
        weights = valid / valid.sum(1, keepdim=True)
        advantages = advantages - (weights * advantages).sum(1, keepdim=True)
        spread = (weights * advantages.square()).sum(1, keepdim=True).sqrt()
        measured = self.improve_policy(obs, actions, advantages / (spread + 1e-8), weights)

        for _ in range(args.value_updates):
            index = torch.randint(obs.shape[1], (len(obs), args.batch_size), device=obs.device)
            some_obs = obs.take_along_dim(index.unsqueeze(2), dim=1)
            value_loss = self.vf.loss(some_obs, returns.gather(1, index))  # (G, batch)
            some_valid = valid.gather(1, index)
            value_loss = (some_valid * value_loss).sum(1) / some_valid.sum(1).clamp(min=1)
            step(self.vf_optimizer, value_loss)
        return self.report(**measured, imagined_return=imagined_return, value_loss=value_loss)

    @torch.no_grad()
    def imagine(self, obs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """T = rollout_length steps of the policy in the ensemble from scaled obs (G, R, obs_dim),
        one random member per group and step.

        Returns:
            scaled obs (G, T + 1, R, obs_dim), actions (G, T, R, action_dim), rewards, ends and
            valid (G, T, R): valid is 1 up to the step where a rollout ends, 0 behind it.
        """
        args, steps, all_obs = self.args, [], [obs]
        valid = torch.ones_like(obs[..., 0])
        for _ in range(args.rollout_length):
            actions = self.actor.sample(*self.actor(obs))
            members = torch.randint(args.num_models, (len(obs),), device=obs.device)
            obs, rewards, p_end = self.model.predict(obs, actions.clamp(-1, 1), members)
            ends = (p_end > 0.5).float()
            steps.append((actions, rewards, ends, valid))
            all_obs.append(obs)
            valid = valid * (1 - ends)
        columns = (all_obs, *zip(*steps, strict=True))
        return tuple(torch.stack(column, dim=1) for column in columns)

    def improve_policy(self, obs, actions, advantages, weights) -> dict[str, torch.Tensor]:
        """A TRPO step on weighted rows (G, n): surrogate's improvement, KL and step size, (G,)."""
        theta = flat_parameters(self.actor).requires_grad_()  # (G, P)
        with torch.no_grad():
            old_mean, old_log_std = self.actor(obs)
            old_log_prob = log_prob(old_mean, old_log_std, actions, self.own)

        def policy(theta, obs):
            return torch.func.functional_call(self.actor, shaped_like(self.actor, theta), obs)

        def surrogate(mean, log_std):
            ratio = (log_prob(mean, log_std, actions, self.own) - old_log_prob).exp()
            return (weights * ratio * advantages).sum(1)

        @torch.no_grad()
        def evaluate(theta):
            mean, log_std = policy(theta, obs)
            kl = (weights * kl_between(old_mean, old_log_std, mean, log_std, self.own)).sum(1)
            return surrogate(mean, log_std), kl

        (gradient,) = torch.autograd.grad(surrogate(*policy(theta, obs)).sum(), theta)
        # The Fisher matrix needs fewer rows than the gradient (Schulman et al.'s appendix C).
        some = weights[:, ::FISHER_EVERY] / weights[:, ::FISHER_EVERY].sum(1, keepdim=True)
        new = policy(theta, obs[:, ::FISHER_EVERY])
        kl = (some * kl_between(*(x.detach() for x in new), *new, self.own)).sum()
        (kl_gradient,) = torch.autograd.grad(kl, theta, create_graph=True)

        def fisher(vector):
            product = torch.autograd.grad(kl_gradient, theta, vector, retain_graph=True)[0]
            return product + CG_DAMPING * vector

        limits = self.args.kl_limit, self.args.cg_iterations
        new_theta, *result = trust_region_step(theta.detach(), gradient, fisher, evaluate, *limits)
        with torch.no_grad():
            for name, value in shaped_like(self.actor, new_theta).items():
                self.actor.get_parameter(name).copy_(value)
        return dict(zip(("surrogate", "kl", "step_size"), result, strict=True))

    def kind(self, number: int, offline: bool) -> str:
        """What update `number` of a phase does: the `kind` of `update`."""
        if offline and number <= self.args.clone_updates:
            return "clone"
        number -= self.args.clone_updates if offline else 0
        return "fit" if number % self.args.improve_every else "improve"

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The policy's mean: (G, E, obs_dim) -> (G, E, action_dim)."""
        return self.actor(self.scaled(obs))[0]

    @torch.no_grad()
    def explore(self, obs: torch.Tensor) -> torch.Tensor:
        """A sample of the policy; shapes as of `act`."""
        return self.actor.sample(*self.actor(self.scaled(obs))).clamp(-1, 1)

    @torch.no_grad()
    def q_value(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q(s, a_i), the mean over members of the reward and the value they expect: (G, batch)."""
        next_obs, rewards, p_end = self.model.predict_all(self.scaled(obs), actions)
        q = rewards + self.args.gamma * (1 - p_end) * self.vf(next_obs)
        return q.unflatten(1, (self.args.num_models, -1)).mean(1)

    @torch.no_grad()
    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """V(s): (G, batch)."""
        return self.vf(self.scaled(obs))


# --- Trust region policy optimisation ---
# Parameters and directions are flat, (G, P). A group's step depends on no other group's.

FISHER_EVERY = 5  # share of the imagined steps in the Fisher matrix: one of so many
CG_DAMPING = 0.1  # multiple of the identity added to it
LINE_SEARCH = [0.7**j for j in range(10)]  # shares of the full step that are tried


def flat_parameters(module: nn.Module) -> torch.Tensor:
    """A copy of the parameters of a stack of networks, (G, P)."""
    return torch.cat([p.detach().flatten(1) for p in module.parameters()], dim=1)


def shaped_like(module: nn.Module, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Flat parameters (G, P) by name and in their shapes."""
    named = dict(module.named_parameters())
    pieces = flat.split([p[0].numel() for p in named.values()], dim=1)
    return {n: piece.view_as(p) for (n, p), piece in zip(named.items(), pieces, strict=True)}


def log_prob(mean, log_std, actions, own=None) -> torch.Tensor:
    """Log-density of a Gaussian, without its constant, of the actions' own entries: (G, n)."""
    log_density = -(0.5 * ((actions - mean) / log_std.exp()).square() + log_std)
    return keep_own(log_density, own).sum(2)


def kl_between(old_mean, old_log_std, mean, log_std, own=None) -> torch.Tensor:
    """KL(old || new) of two Gaussians, of the actions' own entries: (G, n)."""
    old_var, var = (2 * old_log_std).exp(), (2 * log_std).exp()
    distance = (old_var + (old_mean - mean).square()) / (2 * var)
    return keep_own(log_std - old_log_std + distance - 0.5, own).sum(2)


def generalized_advantages(rewards, values, ends, gamma: float, gae_lambda: float) -> torch.Tensor:
    """GAE(lambda): rewards, ends (G, T, R), values (G, T + 1, R) -> (G, T, R).

    A rollout that is cut bootstraps with its last value; one that ends does not.
    """
    deltas = rewards + gamma * (1 - ends) * values[:, 1:] - values[:, :-1]
    advantages, advantage = [], torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + gamma * gae_lambda * (1 - ends[:, t]) * advantage
        advantages.append(advantage)
    return torch.stack(advantages[::-1], dim=1)


def conjugate_gradient(product, b: torch.Tensor, iterations: int) -> torch.Tensor:
    """Solve A x = b for every group: `product(v)` is A v, (G, P) -> (G, P)."""
    x, residual, direction = torch.zeros_like(b), b, b
    squared = b.square().sum(1, keepdim=True)
    for _ in range(iterations):
        along = product(direction)
        curvature = (direction * along).sum(1, keepdim=True)
        size = torch.where(curvature > 0, squared / curvature, 0.0)
        x = x + size * direction
        residual = residual - size * along
        new_squared = residual.square().sum(1, keepdim=True)
        keep = torch.where(squared > 0, new_squared / squared, 0.0)  # 0 / 0 once it is solved
        direction, squared = residual + keep * direction, new_squared
    return x


def trust_region_step(
    theta: torch.Tensor, gradient: torch.Tensor, product, evaluate, limit: float, iterations: int
) -> tuple[torch.Tensor, ...]:
    """The natural gradient step to the edge of the trust region, shortened until it improves the
    surrogate within the limit; none at all where no such step is found.

    Args:
        theta, gradient: parameters and the surrogate's gradient there, (G, P).
        product: v -> F v, (G, P), F the Hessian of the KL divergence.
        evaluate: parameters -> surrogate and KL divergence, (G,) each.

    Returns:
        the new parameters (G, P); improvement, KL and accepted share of the step, (G,) each.
    """
    direction = conjugate_gradient(product, gradient, iterations)
    curvature = (direction * product(direction)).sum(1, keepdim=True)
    full_step = direction * (2 * limit / curvature.clamp(min=1e-20)).sqrt()
    before = evaluate(theta)[0]
    improvement, kl, share = (torch.zeros_like(before) for _ in range(3))
    # All sizes are tried, largest first, so that the host need not know which one is accepted.
    for size in LINE_SEARCH:
        new_surrogate, new_kl = evaluate(theta + size * full_step)
        accept = (share == 0) & (new_surrogate > before) & (new_kl <= limit)
        share = torch.where(accept, size, share)
        improvement = torch.where(accept, new_surrogate - before, improvement)
        kl = torch.where(accept, new_kl, kl)
    # Not theta + 0 * step: a step that is not finite must leave no trace.
    moved = torch.where(share.unsqueeze(1) > 0, share.unsqueeze(1) * full_step, 0.0)
    return theta + moved, improvement, kl, share


# --- Online transition correction ---


class OTC(Strategy):
    """The draw of a fine-tuning update, with --sampling otc; Algorithm 1, lines 6 to 14."""

    def __init__(self, replay: Replay, args: Args):
        super().__init__(replay, args)
        self.alpha.fill_(args.alpha)
        # Mean transition distance of the deployment before, for equation (4)
        self.register_buffer("mean_distance", torch.full_like(self.alpha, torch.nan))
        self.embedding = embedding.make(replay, args)  # None with --distance value

    @torch.no_grad()
    def start_deployment(self, agent: Learner, k: int) -> dict[str, torch.Tensor]:
        """Lines 6 to 8: alpha by equation (4), from a large sample of B^k and the whole of D^k,
        before any update."""
        args, latest = self.args, self.replay.latest()
        candidates = self.replay.sample_of_all(args.distance_candidates)
        if self.embedding is not None:
            self.embedding.remember(latest)
        distance = self.transition_distance(agent, candidates, latest).mean(1)
        if args.adaptive_alpha and k > 1:
            alpha = sampler.adapt_alpha(self.alpha, distance, self.mean_distance)
            self.alpha.copy_(alpha if args.alpha_max is None else alpha.clamp(max=args.alpha_max))
        usable = sampler.usable(distance)
        self.mean_distance.copy_(torch.where(usable, distance, self.mean_distance))
        return {
            "otc/alpha": self.alpha,
            "otc/transition_distance": self.mean_distance,
            "otc/effective_sample_size": sampler.effective_sample_size(self.alpha, args.candidates),
        }

    def draw(self, agent: Learner) -> torch.Tensor:
        """(G, batch_size) indices of the transitions of one update."""
        args = self.args
        candidates = self.replay.draw_merged(args.candidates)  # line 10: the minibatch B
        references = self.replay.draw_latest(args.references)  # line 10: the minibatch D
        distance = self.transition_distance(agent, candidates, references)  # lines 11 to 13
        picked = sampler.draw_by_rank(distance, self.alpha, args.batch_size, args.replacement)
        return candidates.gather(1, picked)  # line 14

    @torch.no_grad()
    def transition_distance(self, agent: Learner, candidates, references) -> torch.Tensor:
        """Distance of each candidate's next state to its best match's: indices (G, B), and (G, D)
        of the latest deployment's transitions -> (G, B)."""
        exclude = None
        if self.args.exclude_self_matches:
            exclude = sampler.find_self_matches(candidates, references)
        if self.embedding is not None:
            return self.embedding.distance(candidates, references, exclude)

        def value_and_end(next_obs, terminations):
            return torch.stack([agent.value(next_obs), terminations], dim=2)

        # d_q, equation (1): the match by Q(s, a_i)
        both = torch.cat([candidates, references], dim=1)
        q = self.replay.in_parts(agent.q_value, both, ("obs", "actions"))
        sizes = [candidates.shape[1], references.shape[1]]
        match = sampler.match_by_value(*q.split(sizes, dim=1), exclude)
        # d_q, section 3.3: V(s') and V(s'*), each over its mean. The mean over all of D lets low
        # values rank first wherever it differs from that of the matches; see docs/otc.md
        of_all = self.args.value_mean == "references"
        both = torch.cat([candidates, references if of_all else references.gather(1, match)], dim=1)
        columns = ("next_obs", "terminations")
        next_states = self.replay.in_parts(value_and_end, both, columns)  # (G, 2 B or B + D, 2)
        sizes = [sizes[0], both.shape[1] - sizes[0]]
        (v_next, end), (v_star, end_star) = (x.unbind(2) for x in next_states.split(sizes, 1))
        if of_all:
            v_star = sampler.relative_to_mean(v_star, end_star > 0).gather(1, match)
            end_star = end_star.gather(1, match)
        # Nothing follows an end, and its V is not learned: pairs with one are drawn as by chance
        is_end = (end > 0) | (end_star > 0)
        if of_all:
            v_next = sampler.relative_to_mean(v_next, is_end)
        else:
            v_next, v_star = sampler.relative_to_mean(torch.stack([v_next, v_star]), is_end)
        return sampler.rank_at_random((v_next - v_star).abs(), is_end)


# --- Main: Algorithm 1 ---


def main(args: Args) -> None:
    run = Training(args, __file__)  # reads B^0: each agent's own actions only
    replay = run.replay
    with run.device:  # line 1: initialise the learners and alpha
        agent = BREMEN(*run.sizes, args)
        strategy = strategies.make(replay, args, OTC)
    agent.measure_scales(replay)
    run.begin(agent, strategy)

    def offline_update(kind: str) -> dict[str, torch.Tensor]:
        batch = replay.gather(replay.draw_offline(args.batch_size))
        losses = agent.update(batch, kind)
        if kind == "improve":
            losses |= agent.improve(replay.gather(replay.draw_offline(args.rollouts))["obs"])
        return losses

    def finetune_update(kind: str) -> dict[str, torch.Tensor]:
        index = strategy.draw(agent)  # lines 10 to 14
        losses = agent.update(replay.gather(index), kind)  # line 15
        if kind == "improve":
            losses |= agent.improve(replay.gather(replay.draw_merged(args.rollouts))["obs"])
        return losses | strategy.diagnostics(index)

    run.train_offline(offline_update)  # line 2: pi^0 from B^0
    for k in run.deployments():  # line 3
        if run.is_new(k):  # and not resumed amid its updates
            data = run.deploy(k)  # line 4: D^k; evaluates pi^{k-1} by episodes of their own
            replay.add(**data)  # line 5: B^k = B^{k-1} with D^k
            run.enter(k, strategy.start_deployment(agent, k))  # lines 6 to 8: alpha, equation (4)
        run.finetune(finetune_update)  # lines 9 to 16: pi^k
    run.finish()


if __name__ == "__main__":
    cli.cli(main, Args)
