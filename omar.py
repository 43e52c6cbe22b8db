"""OMAR: offline multi-agent reinforcement learning with actor rectification.

Every agent learns conservative twin critics from its own logged data, as in CQL. Their landscape
has many peaks, on which the policy gradient gets stuck; OMAR pulls the policy to the best action
that a zeroth-order sampler finds. Coefficient 0 is MA-CQL. With --deployments K the agents are
fine-tuned as in the OTC scripts, with any --sampling.

Paper: Pan, Huang, Ma and Xu, Plan Better Amid Conservatism, ICML 2022,
https://arxiv.org/abs/2111.11188. Against its own code (https://github.com/ling-pan/OMAR): agents
and seeds are stacked, observations are scaled by the data's statistics in place of batch
normalisation, and two slips are put right; see docs/omar.md.

    python omar.py --env simple-spread-medium-replay

What it scores and how long it takes: docs/omar.md.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn as nn

from common import InputError, cli, embedding, sampler, strategies
from common.cli import Count, Natural, OnlineArgs, Positive, Share
from common.embedding import Distance
from common.loop import Training
from common.nets import (
    DeterministicActor,
    Learner,
    TwinCritic,
    adam,
    count_own,
    follow,
    keep_own,
    mean_over_own,
    step,
)
from common.replay import Replay
from common.strategies import Strategy


@dataclass
class Args(OnlineArgs):
    # Other defaults than the other scripts'
    env: str = "simple-spread-medium-replay"
    deployments: Natural = 0
    batch_size: int = 1024

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

    # OMAR arguments
    finetune_updates: int = 2000
    """L, updates after each deployment"""
    distance: Distance = "value"
    """what a draw compares: value (d_q), or, by networks of their own, embedding (d_e, section 3.5)
    and two-stage (section 3.3); not the paper's: raw (scaled states and actions) and residual (what
    the own action does not explain)"""
    value_mean: Literal["matches", "references"] = "matches"
    """whose V(s'*) is averaged in d_q, section 3.3: that of the matches, or of all references"""
    hidden_size: int = 64
    """units in each of the two hidden layers of every network"""
    actor_learning_rate: float = 3e-3
    """Adam's, of the actor"""
    critic_learning_rate: float = 3e-3
    """Adam's, of the critics"""
    value_unit: Positive | None = None
    """value that one unit of the critics' outputs stands for; default: the standard deviation of
    the offline rewards"""
    gamma: Share = 0.95
    """discount"""
    tau: Share = 0.01
    """rate at which the target networks follow"""
    exploration_noise: float = 0.1
    """standard deviation of the Gaussian noise on the actions of an agent that explores"""
    critic: Literal["independent", "centralised"] = "independent"
    """what the critics see: the agent's own observation and action, or those of all agents"""
    omar_coefficient: Share | None = None
    """weight of the regression on the sampler's action against the gradient of Q, 0 (MA-CQL) to 1;
    default: the published one of this --env, else 0.7"""
    cql_alpha: float | None = None
    """weight of the conservative penalty; default: the published one of this --env, else 1"""
    num_penalty_actions: int = 10
    """actions per state in the penalty, of each kind"""
    penalise_policy: bool = False
    """also penalise noisy actions of the policy at s and at s', not uniform ones alone"""
    penalty_noise: Positive = 0.2
    """standard deviation of the noise on those actions of the policy"""
    refit: Literal["softmax", "elite"] = "softmax"
    """the sampler's next mean: weighted by the softmax of Q, or that of the best samples alone"""
    sampler_rounds: int = 3
    """rounds of sampling and refitting"""
    sampler_samples: int = 10
    """actions per state and round"""
    sampler_std: float = 2.0
    """the sampler's first standard deviation, around the policy's action"""
    elites: int = 5
    """best samples that --refit elite keeps, also for the next round"""

    SAME_POLICY: ClassVar = (*OnlineArgs.SAME_POLICY, "critic", "value_unit")

    def check(self) -> None:
        """Refuse more elites than samples, and a centralised critic with the value distance."""
        super().check()
        if self.refit == "elite" and not 2 <= self.elites <= self.sampler_samples:
            raise InputError(
                f"--elites {self.elites}: at least 2, at most --sampler-samples "
                f"{self.sampler_samples}"
            )
        needs_value = self.deployments and self.sampling == "otc" and self.distance == "value"
        if self.critic == "centralised" and needs_value:
            raise InputError(
                "--critic centralised has no Q(s, a_i) for --distance value: use --distance "
                "embedding or another --sampling"
            )


# The released code's coefficients: --omar-coefficient and --cql-alpha of each data set
COEFFICIENTS = {
    "simple-spread-random": (1.0, 0.5),
    "simple-spread-medium-replay": (1.0, 1.0),
    "simple-spread-medium": (1.0, 5.0),
    "simple-spread-expert": (1.0, 5.0),
    "simple-tag-random": (0.9, 0.5),
    "simple-tag-medium-replay": (0.9, 0.5),
    "simple-tag-medium": (0.7, 5.0),
    "simple-tag-expert": (0.9, 5.0),
    "simple-world-random": (1.0, 0.5),
    "simple-world-medium-replay": (0.7, 1.0),
    "simple-world-medium": (0.1, 0.5),
    "simple-world-expert": (0.9, 5.0),
    "halfcheetah-local-random": (1.0, 1.0),
    "halfcheetah-local-medium-replay": (0.9, 5.0),
    "halfcheetah-local-medium": (0.7, 1.0),
    "halfcheetah-local-expert": (0.5, 5.0),
}


# --- Networks ---
# Every tensor starts with the group dimension G: g = seed_index * num_agents + agent. The networks
# are common.nets.DeterministicActor and common.nets.TwinCritic.


# --- Learner ---


class OMAR(Learner):
    """G independent OMAR learners; losses are averaged over the batch and summed over G.

    A critic sees K agents, its own first: K = 1, or with --critic centralised the whole team.
    """

    def __init__(self, G: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__(G, obs_dim)
        self.args = args
        published = COEFFICIENTS.get(args.env, (0.7, 1.0))
        asked = args.omar_coefficient, args.cql_alpha
        self.coefficient, self.cql_alpha = (
            default if value is None else value
            for value, default in zip(asked, published, strict=True)
        )
        is_centralised = args.critic == "centralised"
        N = G // args.num_seeds
        K = N if is_centralised else 1
        sizes = (G, obs_dim, action_dim, args.hidden_size)
        critic_sizes = (G, K * obs_dim, K * action_dim, args.hidden_size)
        self.actor, self.target_actor = DeterministicActor(*sizes), DeterministicActor(*sizes)
        self.qf, self.target_qf = TwinCritic(*critic_sizes), TwinCritic(*critic_sizes)
        self.live = nn.ModuleList([self.actor, self.qf])
        self.target = nn.ModuleList([self.target_actor, self.target_qf])
        self.target.load_state_dict(self.live.state_dict())
        self.target.requires_grad_(False)
        # Value that one unit of the critics' outputs stands for
        self.register_buffer("unit", torch.ones(()))
        # The group of the k-th agent that g's critic sees, and whose critic sees g as its k-th
        g, k = torch.arange(G).unsqueeze(1), torch.arange(K)
        self.register_buffer("teammate", g // N * N + (g + k) % N, persistent=False)  # (G, K)
        self.register_buffer("seen_by", g // N * N + (g - k) % N, persistent=False)  # (G, K)
        self.register_buffer("place", k, persistent=False)
        self.qf_optimizer = adam(self.qf.parameters(), args.critic_learning_rate)
        self.actor_optimizer = adam(self.actor.parameters(), args.actor_learning_rate)
        self.optimizers = [self.qf_optimizer, self.actor_optimizer]

    def measure_scales(self, replay: Replay) -> None:
        """Take the mean and standard deviation of the offline observations, and the latter of the
        rewards as the critics' unit."""
        super().measure_scales(replay)
        given = self.args.value_unit
        self.unit.copy_(replay.reward_std() + 1e-3 if given is None else torch.tensor(given))

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update of every network on a batch as `Replay.gather` returns it, or with --critic
        centralised `Replay.gather_team`; losses (G,)."""
        args = self.args
        # (G, batch, K, dim), the agent itself first
        obs, next_obs, actions = batch["obs"], batch["next_obs"], batch["actions"]
        if args.critic == "independent":
            obs, next_obs, actions = (x.unsqueeze(2) for x in (obs, next_obs, actions))
        obs, next_obs = self.scaled_team(obs), self.scaled_team(next_obs)
        own_obs, own_actions = obs[:, :, 0], actions[:, :, 0]

        # Critics: y = r + gamma * the smaller target critic at the target policies' actions; and
        # the conservative penalty.
        with torch.no_grad():
            next_actions = self.team_actions(self.target_actor, next_obs).flatten(2)
            next_q = self.unit * self.target_qf(next_obs.flatten(2), next_actions).amin(0)
            target = batch["rewards"] + args.gamma * (1 - batch["terminations"]) * next_q
        q = self.unit * self.qf(obs.flatten(2), actions.flatten(2))  # (2, G, batch)
        qf_loss = (q - target).square().mean(2)  # (2, G)
        gap = self.conservative_gap(obs, next_obs, actions, q)  # (2, G)
        step(self.qf_optimizer, qf_loss + self.cql_alpha * gap)

        # Actor: climb the first critic, and approach the best action that the sampler finds.
        policy_actions = self.actor(own_obs)
        own_q = self.q_at(self.qf.first, obs, actions, policy_actions.unsqueeze(2)).squeeze(2)
        actor_loss, sampler_losses = -(1 - self.coefficient) * own_q.mean(1), {}
        if self.coefficient > 0:  # else MA-CQL, which needs no sampler
            best_actions, best_q = self.best_actions(obs, actions, policy_actions.detach())
            regression = mean_over_own((policy_actions - best_actions).square(), self.own)
            actor_loss = actor_loss + self.coefficient * regression
            sampler_losses["losses/regression_loss"] = regression.detach()
            sampler_losses["losses/sampler_gain"] = (best_q - own_q.detach()).mean(1)
        step(self.actor_optimizer, actor_loss)
        bc_error = mean_over_own((policy_actions.detach() - own_actions).square(), self.own)

        follow(self.target, self.live, args.tau)
        return {
            "losses/qf1_loss": qf_loss[0].detach(),
            "losses/qf2_loss": qf_loss[1].detach(),
            "losses/qf1_values": q[0].detach().mean(1),
            "losses/conservative_gap": gap.detach().mean(0),
            "losses/actor_loss": actor_loss.detach(),
            "losses/bc_error": bc_error,
            **sampler_losses,
        }

    def scaled_team(self, obs: torch.Tensor) -> torch.Tensor:
        """Every seen agent's observations by its own scales, (G, batch, K, obs_dim)."""
        mean, std = (
            x.squeeze(1)[self.teammate].unsqueeze(1) for x in (self.obs_mean, self.obs_std)
        )
        return (obs - mean) / std

    def team_actions(self, actor: nn.Module, obs: torch.Tensor) -> torch.Tensor:
        """Every seen agent's action by its own policy: (G, batch, K, obs_dim) -> (G, batch, K,
        action_dim)."""
        batch, K = obs.shape[1:3]
        # (G, K, batch, obs_dim): to the group whose policy acts, and back
        by_policy = obs.transpose(1, 2)[self.seen_by, self.place].flatten(1, 2)
        actions = actor(by_policy).unflatten(1, (K, batch))
        return actions[self.teammate, self.place].transpose(1, 2)

    def q_at(self, qf, obs, actions, own_actions) -> torch.Tensor:
        """Q of n own actions per state, the teammates' as in the data: (G, batch, K, obs_dim),
        (G, batch, K, action_dim), (G, batch, n, action_dim) -> (G, batch, n), of twins (2, G,
        batch, n)."""
        n = own_actions.shape[2]
        others = actions[:, :, 1:].flatten(2).unsqueeze(2).expand(-1, -1, n, -1)
        joint = torch.cat([own_actions, others], dim=3).flatten(1, 2)
        obs = obs.flatten(2).repeat_interleave(n, dim=1)
        return self.unit * qf(obs, joint).unflatten(-1, (-1, n))

    def conservative_gap(self, obs, next_obs, actions, q) -> torch.Tensor:
        """logsumexp of each critic over sampled own actions, each Q less the log of its density,
        minus its Q of the data's action, (2, G, batch): (2, G)."""
        n = self.args.num_penalty_actions
        shape = (*actions.shape[:2], n, actions.shape[3])
        uniform = keep_own(2 * torch.rand_like(actions[:, :, :1].expand(shape)) - 1, self.own)
        log_uniform = (-math.log(2) * count_own(uniform, self.own)).view(-1, 1, 1)
        sampled, log_density = [uniform], [log_uniform.expand(shape[:3])]
        if self.args.penalise_policy:
            std = self.args.penalty_noise
            for its_obs in (obs, next_obs):
                with torch.no_grad():
                    mean = self.actor(its_obs[:, :, 0]).unsqueeze(2)
                noise = keep_own(torch.randn(*shape, device=obs.device), self.own)
                sampled.append((mean + std * noise).clamp(-1, 1))
                log_normal = -0.5 * noise.square() - math.log(std * math.sqrt(2 * math.pi))
                log_density.append(keep_own(log_normal, self.own).sum(3))
        sampled, log_density = torch.cat(sampled, dim=2), torch.cat(log_density, dim=2)
        q_sampled = self.q_at(self.qf, obs, actions, sampled)  # (2, G, batch, n)
        return ((q_sampled - log_density).logsumexp(3) - q).mean(2)

    @torch.no_grad()
    def best_actions(self, obs, actions, policy_actions) -> tuple[torch.Tensor, torch.Tensor]:
        """OMAR's zeroth-order sampler: own actions (G, batch, action_dim) of the highest first
        critic, never worse than the policy's, and their Q (G, batch)."""
        args = self.args
        mean, std = policy_actions.unsqueeze(2), args.sampler_std
        shape = (*policy_actions.shape[:2], args.sampler_samples, policy_actions.shape[2])
        kept = mean[:, :, :0]
        for _ in range(args.sampler_rounds):
            noise = keep_own(torch.randn(*shape, device=obs.device), self.own)
            samples = torch.cat([kept, (mean + std * noise).clamp(-1, 1)], dim=2)
            q = self.q_at(self.qf.first, obs, actions, samples)  # (G, batch, n)
            if args.refit == "elite":
                best = q.topk(args.elites, dim=2).indices.unsqueeze(3)
                kept = samples.gather(2, best.expand(-1, -1, -1, shape[3]))
                mean, std = kept.mean(2, keepdim=True), kept.std(2, keepdim=True)
            else:
                mean = (q.softmax(2).unsqueeze(3) * samples).sum(2, keepdim=True)
                std = (samples - mean).square().mean(2, keepdim=True).sqrt()
        samples = torch.cat([samples, policy_actions.unsqueeze(2)], dim=2)
        own_q = self.q_at(self.qf.first, obs, actions, policy_actions.unsqueeze(2))
        best_q, best = torch.cat([q, own_q], dim=2).max(2, keepdim=True)  # (G, batch, 1)
        best = best.unsqueeze(3).expand(-1, -1, 1, shape[3])
        return samples.gather(2, best).squeeze(2), best_q.squeeze(2)

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """(G, E, obs_dim) -> (G, E, action_dim)."""
        return self.actor(self.scaled(obs))

    @torch.no_grad()
    def explore(self, obs: torch.Tensor) -> torch.Tensor:
        """The policy's action with Gaussian noise; shapes as of `act`."""
        actions = self.act(obs)
        noise = self.args.exploration_noise * torch.randn_like(actions)
        return (actions + keep_own(noise, self.own)).clamp(-1, 1)

    @torch.no_grad()
    def q_value(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q(s, a_i), the smaller of the live twin critics: (G, batch); nan where the critics are
        centralised and would need the teammates'."""
        if self.args.critic == "centralised":
            return torch.full(obs.shape[:2], torch.nan, device=obs.device)
        return self.unit * self.qf(self.scaled(obs), actions).amin(0)

    @torch.no_grad()
    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """V(s), Q of the policy's action: (G, batch)."""
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
        agent = OMAR(*run.sizes, args)
        strategy = strategies.make(replay, args, OTC)
    agent.measure_scales(replay)
    run.begin(agent, strategy)
    gather = replay.gather_team if args.critic == "centralised" else replay.gather

    def offline_update() -> dict[str, torch.Tensor]:
        index = replay.draw_offline(args.batch_size)
        return agent.update(gather(index))

    def finetune_update() -> dict[str, torch.Tensor]:
        index = strategy.draw(agent)  # lines 10 to 14
        losses = agent.update(gather(index))  # line 15
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
