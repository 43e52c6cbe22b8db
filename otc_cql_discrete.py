"""OTC on discrete CQL: online tuning for offline decentralised multi-agent RL, discrete actions.

Every agent learns action values from its own logged data (s, a_i, r, s') by double Q-learning with
CQL's conservative penalty over its legal actions, and acts greedily. The agents are then deployed K
times for M steps; after each deployment they fine-tune on the merged data, where OTC (online
transition correction) draws the transitions whose next states agree with what the latest deployment
shows. With `--exploration sequential` one agent at a time explores while it is deployed.

Papers: OTC, Jiang and Lu, AAAI 2023, its section 4.6; CQL, Kumar et al., NeurIPS 2020,
https://arxiv.org/abs/2006.04779; double Q-learning, van Hasselt et al., AAAI 2016,
https://arxiv.org/abs/1509.06461. No implementation of OTC's discrete experiment is public; how
the learner learns is in docs/otc_cql_discrete.md, what the OTC paper leaves open in docs/otc.md.

    python otc_cql_discrete.py --env 5m_vs_6m-medium --exploration sequential

The task is SMAX, not SMAC, and needs requirements-smax.txt. What it scores and how long it takes:
docs/otc_cql_discrete.md.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from common import cli, embedding, sampler, strategies
from common.cli import Count, Natural, OnlineArgs, Share
from common.embedding import Distance
from common.loop import Training
from common.nets import Learner, adam, follow, legal_actions, mlp, step, twin
from common.replay import Replay
from common.strategies import Strategy


@dataclass
class Args(OnlineArgs):
    # Other defaults than the other scripts'
    env: str = "5m_vs_6m-medium"

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

    # Discrete CQL arguments
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
    learning_rate: float = 1e-4
    """Adam's, of the critics"""
    gamma: Share = 0.99
    """discount"""
    tau: Share = 0.005
    """rate at which the target networks follow"""
    cql_alpha: float = 1.0
    """weight of the conservative penalty"""
    epsilon: Share = 0.1
    """share of an exploring agent's actions that are random legal ones"""


# --- Networks ---
# Every tensor starts with the group dimension G: g = seed_index * num_agents + agent.


class ActionValues(nn.Module):
    """Twin Q(s, .), one value per action each; both in one stack of 2 G networks."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, hidden_size: int):
        super().__init__()
        self.network = twin(*(mlp(G, obs_dim, hidden_size, action_dim) for _ in range(2)))

    def forward(self, obs):
        """(2, G, batch, action_dim)"""
        return self.network(obs.expand(2, -1, -1, -1)).unflatten(0, (2, -1))


# --- Learner ---
# Actions are one-hot. The last action_dim entries of an observation are the mask of the legal
# actions, all zeros once the agent is dead.


class DiscreteCQL(Learner):
    """G independent learners; losses are averaged over the batch and summed over G."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__(G, obs_dim)
        self.args, self.action_dim = args, action_dim
        sizes = (G, obs_dim, action_dim, args.hidden_size)
        self.qf, self.target_qf = ActionValues(*sizes), ActionValues(*sizes)
        self.live, self.target = nn.ModuleList([self.qf]), nn.ModuleList([self.target_qf])
        self.target.load_state_dict(self.live.state_dict())
        self.target.requires_grad_(False)
        self.qf_optimizer = adam(self.live.parameters(), args.learning_rate)
        self.optimizers = [self.qf_optimizer]

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update of both critics on a batch as `Replay.gather` returns it; losses (G,)."""
        args, actions = self.args, batch["actions"]
        obs, next_obs = self.scaled(batch["obs"]), self.scaled(batch["next_obs"])
        legal = legal_actions(batch["obs"], self.action_dim)
        next_legal = legal_actions(batch["next_obs"], self.action_dim)
        # What happens while the agent is dead carries no loss.
        alive = legal.any(2).float()  # (G, batch)
        share = alive / alive.sum(1, keepdim=True).clamp(min=1)

        # Double Q-learning: y = r + gamma * the smaller target critic at the legal action that the
        # live critics prefer; the agent's death is an end.
        with torch.no_grad():
            next_actions = self.greedy(next_obs, next_legal)
            next_q = (self.target_qf(next_obs) * next_actions).sum(3).amin(0)  # (G, batch)
            target = batch["rewards"] + args.gamma * (1 - batch["terminations"]) * next_q
        values = self.qf(obs)  # (2, G, batch, action_dim)
        q = (values * actions).sum(3)
        qf_loss = (share * (q - target).square()).sum(2)  # (2, G)

        # The conservative penalty: legal actions down, the data's actions up.
        gap = (share * self.conservative_gap(values, q, legal)).sum(2)  # (2, G)
        step(self.qf_optimizer, qf_loss + args.cql_alpha * gap)

        follow(self.target, self.live, args.tau)
        greedy = one_hot_argmax(values.detach().amin(0), legal)
        return {
            "losses/qf1_loss": qf_loss[0].detach(),
            "losses/qf2_loss": qf_loss[1].detach(),
            "losses/qf1_values": (share * q[0].detach()).sum(1),
            "losses/conservative_gap": gap.detach().mean(0),
            "losses/greedy_agreement": (share * (greedy * actions).sum(2)).sum(1),
        }

    @staticmethod
    def conservative_gap(values, q, legal) -> torch.Tensor:
        """CQL's penalty with the entropy as R, exact: logsumexp of Q (2, G, batch, action_dim) over
        the legal actions minus Q of the data's action; (2, G, batch), 0 where no action is
        legal."""
        alive = legal.any(2)
        masked = values.masked_fill(~(legal | ~alive.unsqueeze(2)), -torch.inf)
        return (torch.logsumexp(masked, dim=3) - q) * alive

    def greedy(self, obs: torch.Tensor, legal: torch.Tensor) -> torch.Tensor:
        """The legal action with the largest smaller live critic, one-hot, zeros where none is
        legal: (G, batch, action_dim). Observations are scaled."""
        return one_hot_argmax(self.qf(obs).amin(0), legal)

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The greedy legal action: (G, E, obs_dim) -> (G, E, action_dim), one-hot."""
        return self.greedy(self.scaled(obs), legal_actions(obs, self.action_dim))

    @torch.no_grad()
    def explore(self, obs: torch.Tensor) -> torch.Tensor:
        """Epsilon-greedy over the legal actions; shapes as of `act`."""
        legal = legal_actions(obs, self.action_dim)
        uniform = one_hot_argmax(torch.rand(legal.shape, device=obs.device), legal)
        explores = torch.rand(legal.shape[:2], device=obs.device) < self.args.epsilon
        return torch.where(explores.unsqueeze(2), uniform, self.act(obs))

    @torch.no_grad()
    def q_value(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q(s, a_i), the smaller of the live twin critics: (G, batch)."""
        obs = self.scaled(obs)
        return (self.qf(obs).amin(0) * actions).sum(2)

    @torch.no_grad()
    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """V(s), Q of the greedy legal action, 0 where none is legal: (G, batch)."""
        scaled = self.scaled(obs)
        values = self.qf(scaled).amin(0)
        legal = legal_actions(obs, self.action_dim)
        return (values * one_hot_argmax(values, legal)).sum(2)


def one_hot_argmax(scores: torch.Tensor, legal: torch.Tensor) -> torch.Tensor:
    """The legal action with the largest score, one-hot, and zeros where none is legal."""
    best = scores.masked_fill(~legal, -torch.inf).argmax(dim=2, keepdim=True)
    return torch.zeros_like(scores).scatter(2, best, 1.0) * legal.any(2, keepdim=True)


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
    run = Training(args, __file__, discrete=True)  # reads B^0: each agent's own actions only
    replay = run.replay
    with run.device:  # line 1: initialise the learners and alpha
        agent = DiscreteCQL(*run.sizes, args)
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
