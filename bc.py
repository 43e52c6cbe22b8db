"""BC: behaviour cloning, decentralised, offline: every agent imitates its own part of the data.

Each agent maximises the likelihood of its logged actions, given its observations, and knows nothing
of its teammates, of rewards or of what follows. It is the baseline IBC of Barde et al.: where the
data holds several conventions, independent clones mix them.

Task and tables: Barde, Foerster, Nowrouzezahrai and Zhang, A Model-Based Solution to the Offline
Multi-Agent Reinforcement Learning Coordination Problem, AAMAS 2024,
https://arxiv.org/abs/2305.17198. Continuous and discrete actions. What is chosen where the source
leaves room is in docs/bc.md.

    python bc.py --env coordination-game-unfavourable

What it scores and how long it takes: docs/bc.md.
"""

from dataclasses import dataclass

import torch

from common import cli
from common.cli import OfflineArgs
from common.loop import Training
from common.nets import (
    GaussianPolicy,
    Learner,
    SoftmaxPolicy,
    adam,
    legal_actions,
    mean_over_own,
    step,
)


@dataclass
class Args(OfflineArgs):
    # Other defaults than the other scripts'
    env: str = "reacher-full-expert-mix"
    offline_updates: cli.Natural = 20_000
    batch_size: int = 256
    eval_every: int = 5_000

    # BC arguments
    hidden_size: int = 256
    """units in each of the two hidden layers of the policy"""
    learning_rate: float = 3e-4
    """Adam's"""


# --- Networks ---
# Every tensor starts with the group dimension G: g = seed_index * num_agents + agent. The policy is
# common.nets.GaussianPolicy, with discrete actions common.nets.SoftmaxPolicy.


# --- Learner ---


class BC(Learner):
    """G independent cloners; losses are averaged over the batch and summed over G."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, args: Args, discrete: bool = False):
        super().__init__(G, obs_dim)
        self.action_dim = action_dim
        policy = SoftmaxPolicy if discrete else GaussianPolicy
        self.actor = policy(G, obs_dim, action_dim, args.hidden_size)
        self.actor_optimizer = adam(self.actor.parameters(), args.learning_rate)
        self.optimizers = [self.actor_optimizer]

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update on a batch as `Replay.gather` returns it; losses (G,)."""
        obs, legal = self.scaled(batch["obs"]), legal_actions(batch["obs"], self.action_dim)
        actor_loss = -self.actor.log_prob(obs, batch["actions"], legal).mean(1)
        step(self.actor_optimizer, actor_loss)
        with torch.no_grad():
            error = (self.actor.mode(obs, legal) - batch["actions"]).square()
        return {
            "losses/actor_loss": actor_loss.detach(),
            "losses/bc_error": mean_over_own(error, self.own),
        }

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The likeliest action: (G, E, obs_dim) -> (G, E, action_dim)."""
        return self.actor.mode(self.scaled(obs), legal_actions(obs, self.action_dim))


# --- Main ---


def main(args: Args) -> None:
    run = Training(args, __file__, discrete=None)  # each agent's own actions only
    replay = run.replay
    with run.device:
        agent = BC(*run.sizes, args, run.discrete)
    agent.measure_scales(replay)
    run.begin(agent)

    def update() -> dict[str, torch.Tensor]:
        return agent.update(replay.gather(replay.draw_offline(args.batch_size)))

    run.train_offline(update)
    run.finish()


if __name__ == "__main__":
    cli.cli(main, Args)
