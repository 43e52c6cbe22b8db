"""The TD3+BC learner, against brute force, closed forms and tasks whose solution is known."""

import signal
import sys

import numpy as np
import pytest
import torch

import otc_td3bc
from common import cli
from otc_td3bc import TD3BC, Args
from tests.helpers import (
    ACTION_DIM,
    OBS_DIM,
    central_difference,
    linear_quadratic_error,
    plain_mlp,
    random_batch,
    twins,
)
from tests.tiny_task import ENV, write_data

# --- The learner's parts ---


def test_only_the_critics_move_when_it_is_not_the_actors_turn():
    torch.manual_seed(0)
    agent = TD3BC(2, OBS_DIM, ACTION_DIM, Args())
    reported = agent.update(random_batch(2), True)
    reported = [reported[name].clone() for name in ("losses/actor_loss", "losses/bc_loss")]
    before = {name: p.clone() for name, p in agent.named_parameters()}
    losses = agent.update(random_batch(2, seed=1), False)
    for name, p in agent.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("qf"), name
    # The actor's losses are reported until its next turn.
    assert torch.equal(losses["losses/actor_loss"], reported[0])
    assert torch.equal(losses["losses/bc_loss"], reported[1])


def test_the_first_step_is_each_learning_rate_against_the_gradient():
    """Adam's first step is the learning rate times the gradient's sign."""
    torch.manual_seed(0)
    args = Args(actor_learning_rate=1e-3, critic_learning_rate=4e-3)
    agent = TD3BC(2, OBS_DIM, ACTION_DIM, args)
    parts = (agent.actor, 1e-3), (agent.qf, 4e-3)
    before = [[p.detach().clone() for p in part.parameters()] for part, _ in parts]
    agent.update(random_batch(2), True)
    for (part, rate), olds in zip(parts, before, strict=True):
        for p, old in zip(part.parameters(), olds, strict=True):
            step = -rate * p.grad / (p.grad.abs() + 1e-8)
            torch.testing.assert_close(p.detach() - old, step, rtol=1e-3, atol=1e-6)


# --- The update ---


def losses_by_hand(agent, batch, noise, g, weight=None):
    """Group g's losses in float64, state by state; and its lambda, unless that is given."""
    args, data = agent.args, {key: value[g].double().numpy() for key, value in batch.items()}
    scales = [b[g, 0].double().numpy() for b in (agent.obs_mean, agent.obs_std)]
    noise = np.clip(args.policy_noise * noise[g].double().numpy(), -0.5, 0.5)

    def policy(actor, s):
        return np.tanh(plain_mlp(actor.network, s, g))

    def q(qf, s, a):
        return plain_mlp(qf.network, np.concatenate([s, a]), g)[0]

    live, target = twins(agent), twins(agent, "target_qf")
    losses = {"qf1_loss": [], "qf2_loss": [], "bc_loss": []}
    own = []
    for b in range(len(data["rewards"])):
        s, s2 = ((data[key][b] - scales[0]) / scales[1] for key in ("obs", "next_obs"))
        a2 = np.clip(policy(agent.target_actor, s2) + noise[b], -1, 1)
        smaller = min(q(qf, s2, a2) for qf in target)
        y = data["rewards"][b] + args.gamma * (1 - data["terminations"][b]) * smaller
        losses["qf1_loss"].append((q(live[0], s, data["actions"][b]) - y) ** 2)
        losses["qf2_loss"].append((q(live[1], s, data["actions"][b]) - y) ** 2)
        a = policy(agent.actor, s)
        own.append(q(live[0], s, a))
        losses["bc_loss"].append(np.mean((a - data["actions"][b]) ** 2))
    losses = {f"losses/{name}": np.mean(values) for name, values in losses.items()}
    found_weight = args.bc_alpha / np.mean(np.abs(own))
    weight = found_weight if weight is None else weight
    losses["losses/actor_loss"] = -weight * np.mean(own) + losses["losses/bc_loss"]
    return losses, found_weight


def test_losses_and_gradients_equal_a_brute_force_without_batches(monkeypatch):
    """Every loss of one update in float64 loops, and the slopes of these along random directions;
    lambda and the target are constants in them."""
    torch.manual_seed(0)
    args = Args(hidden_size=16, policy_noise=0.5, tau=0.0)
    args.actor_learning_rate = args.critic_learning_rate = 0.0
    agent, groups = TD3BC(3, OBS_DIM, ACTION_DIM, args).double(), range(3)
    with torch.no_grad():
        agent.obs_mean += torch.randn_like(agent.obs_mean)
        agent.obs_std += torch.rand_like(agent.obs_std)
        for p in agent.target.parameters():  # of their own: a live network in their place shows
            p += 0.1 * torch.randn_like(p)
        agent.target_actor.network[-1].weight *= 5  # near the bounds, where the noise is cut off
        twins(agent)[0].network[-1].weight *= torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1)
    batch = {key: value.double() for key, value in random_batch(3, size=16).items()}
    with torch.no_grad():  # Q of both signs, so that the mean of |Q| is not |the mean of Q|
        obs = agent.scaled(batch["obs"])
        own_q = agent.qf.first(obs, agent.actor(obs))
        twins(agent)[0].network[-1].bias -= own_q.mean(1).view(3, 1, 1)
    noise, draw = [], torch.randn_like

    def kept(*args, **kwargs):
        noise.append(draw(*args, **kwargs))
        return noise[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", kept)
        losses = agent.update(batch, True)
    (noise,) = noise
    by_hand = [losses_by_hand(agent, batch, noise, g) for g in groups]
    for g, (expected, _) in enumerate(by_hand):
        assert expected.keys() | {"losses/qf1_values"} == losses.keys()
        for name, value in expected.items():
            assert losses[name][g].item() == pytest.approx(value, rel=1e-8), name

    names = ("actor", "qf1", "qf2")
    for name, part in zip(names, (agent.actor, *twins(agent)), strict=True):
        parameters = list(part.parameters())
        for g in [*groups, *groups]:
            direction = [torch.zeros_like(p) for p in parameters]
            for d in direction:
                d[g] = torch.randn_like(d[g])

            def loss(name=name, g=g):
                values, _ = losses_by_hand(agent, batch, noise, g, weight=by_hand[g][1])
                return values[f"losses/{name}_loss"]

            slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))
            expected = central_difference(parameters, direction, loss)
            assert slope.item() == pytest.approx(expected, rel=1e-5, abs=1e-7), name


def test_the_targets_noise_is_cut_off_and_its_action_stays_in_the_box(monkeypatch):
    """Noise without limit, a target policy of (-0.2, 0.8): the target's action is (0.3, 1)."""
    agent = TD3BC(1, OBS_DIM, ACTION_DIM, Args())
    asked = []
    with torch.no_grad():
        agent.target_actor.network[-1].weight.zero_()
        agent.target_actor.network[-1].bias.copy_(torch.atanh(torch.tensor([[[-0.2, 0.8]]])))
    agent.target_qf.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[1]))
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 1e6))
    agent.update(random_batch(1), True)
    (actions,) = asked
    torch.testing.assert_close(actions, torch.tensor([0.3, 1.0]).expand(1, 32, 2))


def test_a_groups_update_does_not_feel_the_others_scale():
    """Group 0's rewards and critics times a hundred: bit for bit nothing changes in group 1."""
    updates = []
    for scale in (1, 100):
        torch.manual_seed(0)
        agent = TD3BC(2, OBS_DIM, ACTION_DIM, Args())
        batch = random_batch(2)
        batch["rewards"][0] *= scale
        with torch.no_grad():
            for qf in (*twins(agent), *twins(agent, "target_qf")):
                qf.network[-1].weight[0] *= scale
        for i in range(4):
            losses = agent.update(batch, i % 2 == 1)
        updates.append([*losses.values(), *(p.detach() for p in agent.parameters())])
    for plain, scaled in zip(*updates, strict=True):
        assert torch.equal(plain[1], scaled[1])
    assert not torch.equal(updates[0][0][0], updates[1][0][0])


def test_the_scale_of_its_critic_does_not_matter_to_the_actor():
    """Lambda divides it out: the actor's gradient is that of the critic itself."""
    gradients = []
    for scale in (1, 50):
        torch.manual_seed(0)
        agent = TD3BC(1, OBS_DIM, ACTION_DIM, Args(critic_learning_rate=0.0))
        with torch.no_grad():
            for p in twins(agent)[0].network[-1].parameters():
                p *= scale
        agent.update(random_batch(1), True)
        gradients.append([p.grad for p in agent.actor.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# --- A run ---


def test_a_run_gives_the_actor_every_third_turn(tmp_path, monkeypatch):
    turns, update = [], TD3BC.update

    def watched(self, batch, update_actor):
        turns.append(update_actor)
        return update(self, batch, update_actor)

    monkeypatch.setattr(TD3BC, "update", watched)
    data = write_data(tmp_path / "point.hdf5")
    flags = "--offline-updates 7 --deployments 2 --deployment-steps 20 --finetune-updates 4"
    flags += " --policy-delay 3 --sampling uniform --batch-size 8 --hidden-size 8 --device cpu"
    argv = ["--env", ENV, "--dataset", data, "--run-dir", tmp_path / "runs", *flags.split()]
    monkeypatch.setattr(sys, "argv", ["otc_td3bc.py", *map(str, argv)])
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        cli.cli(otc_td3bc.main, Args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    number_of_updates = [*range(1, 8), *range(1, 5), *range(1, 5)]
    assert turns == [number % 3 == 0 for number in number_of_updates]


# --- Tasks with a known solution ---


def test_a_bandit_ends_in_its_closed_form_and_each_group_in_its_own():
    """Uniform actions, reward scale * (2 - (a - best)^2): the gradient of minus lambda Q plus the
    squared difference from the data is zero at w best / (1 + w), w = alpha / (2 - (a - best)^2);
    the scale does not matter."""
    torch.manual_seed(0)
    args = Args(bc_alpha=2.5, hidden_size=64, actor_learning_rate=5e-3, critic_learning_rate=5e-3)
    agent = TD3BC(4, 1, 1, args)
    best = torch.tensor([0.6, -0.6, 0.6, -0.6]).view(4, 1, 1)
    scale = torch.tensor([1.0, 1.0, 5.0, 5.0]).view(4, 1)
    chosen = []
    for i in range(800):
        obs, actions = torch.randn(4, 128, 1), torch.rand(4, 128, 1) * 2 - 1
        rewards = scale * (2 - (actions - best).square().squeeze(2))
        batch = {"obs": obs, "actions": actions, "rewards": rewards, "next_obs": obs}
        agent.update(batch | {"terminations": torch.ones(4, 128)}, i % 2 == 1)
        if i >= 700:
            chosen.append(agent.act(torch.linspace(-1, 1, 21).view(1, 21, 1).expand(4, -1, -1)))
    expected = 0.0
    for _ in range(100):
        weight = 2.5 / (2 - (expected - 0.6) ** 2)
        expected = weight * 0.6 / (1 + weight)
    assert ((torch.stack(chosen).mean(0) - expected * best.sign()).abs().mean((1, 2)) < 0.08).all()


def test_a_linear_quadratic_task_is_solved_with_the_best_gain():
    torch.manual_seed(0)
    args = Args(bc_alpha=1000.0, hidden_size=64, gamma=0.9, tau=0.1)
    args.critic_learning_rate = args.actor_learning_rate = 5e-3
    agent = TD3BC(2, 1, 1, args)
    assert (linear_quadratic_error(agent, 800, 150, lambda number: number % 2 == 0) < 0.08).all()
