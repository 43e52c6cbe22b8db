"""OTC on AWAC: online tuning for offline decentralised multi-agent reinforcement learning.

Every agent learns an AWAC policy from its own logged data (s, a_i, r, s'), without the other
agents' actions. The agents are then deployed K times for M steps; after each deployment they
fine-tune on the merged data, where OTC (online transition correction) draws the transitions whose
next states agree with what the latest deployment shows.

Papers: OTC, Jiang and Lu, AAAI 2023; AWAC, Nair et al., 2020, https://arxiv.org/abs/2006.09359.
Against AWAC's own code (https://github.com/rail-berkeley/rlkit): agents and seeds are stacked,
networks are 256-256 with learning rates 1e-4 and 5e-4 and batch 128 (OTC's Table 3), weights are
exp(A / temperature) with a ceiling in place of a softmax over the batch. What the OTC paper leaves
open, and what is chosen here, is in docs/otc.md.

    python otc_awac.py --env halfcheetah-medium

What it scores and how long it takes: docs/otc_awac.md.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn as nn

from common import cli, embedding, sampler, strategies
from common.cli import Count, Natural, OnlineArgs, Positive, Range, Share
from common.embedding import Distance
from common.loop import Training
from common.nets import (
    Actor,
    Learner,
    TwinCritic,
    adam,
    follow,
    keep_own,
    mean_over_own,
    mlp,
    step,
)
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

    # AWAC arguments
    finetune_updates: int = 2000
    """L, updates after each deployment"""
    distance: Distance = "value"
    """what a draw compares: value (d_q), or, by networks of their own, embedding (d_e, section 3.5)
    and two-stage (section 3.3); not the paper's: raw (scaled states and actions) and residual (what
    the own action does not explain)"""
    value_mean: Literal["matches", "references"] = "matches"
    """whose V(s'*) is averaged in d_q, section 3.3: that of the matches, or of all references"""
    hidden_size: int = 256
    """units in each of the two hidden layers of every network"""
    actor_learning_rate: float = 1e-4
    """Adam's, of the actor"""
    critic_learning_rate: float = 5e-4
    """Adam's, of the critics"""
    gamma: Share = 0.99
    """discount"""
    tau: Share = 0.005
    """rate at which the target networks follow"""
    policy_std: Annotated[float, Range(0.003, 0.99)] = 0.05
    """the policy's standard deviation before training"""
    temperature: Positive = 2.0
    """of the advantage in the weights exp(A / temperature); AWAC's lambda"""
    weight_max: Positive = 100.0
    """ceiling of these weights"""

    SAME_POLICY: ClassVar = (*OnlineArgs.SAME_POLICY, "policy_std")


# --- Networks ---
# Every tensor starts with the group dimension G: g = seed_index * num_agents + agent.


class GaussianActor(Actor):
    """pi(a_i | s): a Gaussian with a tanh mean and a learned log-std per action dimension.

    It is not squashed, so that the density of data actions at the bound stays finite.
    """

    def __init__(self, G: int, obs_dim: int, action_dim: int, hidden_size: int, std: float):
        super().__init__()
        self.network = mlp(G, obs_dim, hidden_size, action_dim)
        share = -math.log(std) / 6
        raw_log_std = math.log(share / (1 - share))
        self.raw_log_std = nn.Parameter(torch.full((G, 1, action_dim), raw_log_std))

    @property
    def log_std(self) -> torch.Tensor:
        """(G, 1, action_dim) in (-6, 0); a sigmoid, as a clamp would lose its gradient outside."""
        return -6 * torch.sigmoid(self.raw_log_std)

    def forward(self, obs):
        """Mean, (G, batch, action_dim)."""
        return keep_own(torch.tanh(self.network(obs)), self.own)

    def sample(self, mean):
        """Actions in the box around means, (G, batch, action_dim)."""
        noise = self.log_std.exp() * torch.randn_like(mean)
        return (mean + keep_own(noise, self.own)).clamp(-1, 1)

    def log_prob(self, mean, actions):
        """(G, batch)"""
        log_std = self.log_std
        scaled = (actions - mean) * (-log_std).exp()
        log_density = -(0.5 * scaled.square() + log_std + 0.5 * math.log(2 * math.pi))
        return keep_own(log_density, self.own).sum(2)


# --- Learner ---


class AWAC(Learner):
    """G independent AWAC learners; losses are averaged over the batch and summed over G."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__(G, obs_dim)
        self.args = args
        sizes = (G, obs_dim, action_dim, args.hidden_size)
        self.actor = GaussianActor(*sizes, args.policy_std)
        self.qf = TwinCritic(*sizes)
        self.target_qf = TwinCritic(*sizes)
        self.live = nn.ModuleList([self.qf])
        self.target = nn.ModuleList([self.target_qf])
        self.target.load_state_dict(self.live.state_dict())
        self.target.requires_grad_(False)
        self.qf_optimizer = adam(self.live.parameters(), args.critic_learning_rate)
        self.actor_optimizer = adam(self.actor.parameters(), args.actor_learning_rate)
        self.optimizers = [self.qf_optimizer, self.actor_optimizer]

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update of every network on a batch as `Replay.gather` returns it; losses (G,)."""
        args = self.args
        obs, next_obs = self.scaled(batch["obs"]), self.scaled(batch["next_obs"])
        actions = batch["actions"]

        # Critics: y = r + gamma * the smaller target critic at an action of the live policy.
        with torch.no_grad():
            next_actions = self.actor.sample(self.actor(next_obs))
            next_q = self.target_qf(next_obs, next_actions).amin(0)
            target = batch["rewards"] + args.gamma * (1 - batch["terminations"]) * next_q
        q = self.qf(obs, actions)  # (2, G, batch)
        qf_loss = (q - target).square().mean(2)  # (2, G)
        step(self.qf_optimizer, qf_loss)

        # Actor: the data's actions, weighted by their advantage over the policy's.
        mean = self.actor(obs)
        weights = self.advantage_weights(obs, actions, self.actor.sample(mean))
        actor_loss = -(weights * self.actor.log_prob(mean, actions)).mean(1)
        step(self.actor_optimizer, actor_loss)

        follow(self.target, self.live, args.tau)
        return {
            "losses/qf1_loss": qf_loss[0].detach(),
            "losses/qf2_loss": qf_loss[1].detach(),
            "losses/qf1_values": q[0].detach().mean(1),
            "losses/actor_loss": actor_loss.detach(),
            "losses/advantage_weights": weights.mean(1),
            "losses/policy_std": mean_over_own(self.actor.log_std.detach().exp(), self.own),
        }

    @torch.no_grad()
    def advantage_weights(
        self, obs: torch.Tensor, actions: torch.Tensor, policy_actions: torch.Tensor
    ) -> torch.Tensor:
        """exp(A / temperature) up to weight_max, A = Q(s, a_i) - Q(s, an action of the policy), of
        scaled observations: (G, batch)."""
        both = torch.cat([actions, policy_actions], dim=1)
        q, own_q = self.qf(obs.repeat(1, 2, 1), both).amin(0).chunk(2, dim=1)  # (G, batch) each
        return ((q - own_q) / self.args.temperature).exp().clamp(max=self.args.weight_max)

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The policy's mean: (G, E, obs_dim) -> (G, E, action_dim)."""
        return self.actor(self.scaled(obs))

    @torch.no_grad()
    def explore(self, obs: torch.Tensor) -> torch.Tensor:
        """A sample of the policy; shapes as of `act`."""
        return self.actor.sample(self.act(obs))

    @torch.no_grad()
    def q_value(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q(s, a_i), the smaller of the live twin critics: (G, batch)."""
        obs = self.scaled(obs)
        return self.qf(obs, actions).amin(0)

    @torch.no_grad()
    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """V(s) = Q(s, pi(s)) of the action that is deployed: (G, batch)."""
        return self.q_value(obs, self.act(obs))


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
        agent = AWAC(*run.sizes, args)
        strategy = strategies.make(replay, args, OTC)
    agent.measure_scales(replay)
    run.begin(agent, strategy)

    def offline_update() -> dict[str, torch.Tensor]:
        batch = replay.gather(replay.draw_offline(args.batch_size))
        return agent.update(batch)

    def finetune_update() -> dict[str, torch.Tensor]:
        index = strategy.draw(agent)  # lines 10 to 14
        losses = agent.update(replay.gather(index))  # line 15
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
