"""The AWAC learner, against brute force, closed forms and tasks whose solution is known."""

import math

import numpy as np
import pytest
import torch

from otc_awac import AWAC, Args
from tests.helpers import (
    ACTION_DIM,
    OBS_DIM,
    central_difference,
    linear_quadratic_error,
    plain_mlp,
    random_batch,
    scaled,
    set_scales,
    twins,
)

# --- The learner's parts ---


def test_the_first_step_is_each_learning_rate_against_the_gradient():
    """Adam's first step is the learning rate times the gradient's sign."""
    torch.manual_seed(0)
    args = Args(actor_learning_rate=1e-3, critic_learning_rate=4e-3)
    agent = AWAC(2, OBS_DIM, ACTION_DIM, args)
    parts = (agent.actor, 1e-3), (agent.qf, 4e-3)
    before = [[p.detach().clone() for p in part.parameters()] for part, _ in parts]
    agent.update(random_batch(2))
    for (part, rate), olds in zip(parts, before, strict=True):
        for p, old in zip(part.parameters(), olds, strict=True):
            step = -rate * p.grad / (p.grad.abs() + 1e-8)
            torch.testing.assert_close(p.detach() - old, step, rtol=1e-3, atol=1e-6)


def test_the_log_density_is_a_gaussians_also_at_the_bounds():
    torch.manual_seed(0)
    agent = AWAC(3, OBS_DIM, ACTION_DIM, Args())
    with torch.no_grad():
        agent.actor.raw_log_std += torch.randn_like(agent.actor.raw_log_std)
    batch = random_batch(3, size=50)
    for actions in (batch["actions"], batch["actions"].sign()):
        with torch.no_grad():
            mean, std = agent.actor(batch["obs"]), agent.actor.log_std.double().exp()
            found = agent.actor.log_prob(mean, actions)
        expected = torch.distributions.Normal(mean.double(), std).log_prob(actions.double()).sum(2)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_sampled_actions_are_the_gaussians_moved_into_the_box(monkeypatch):
    torch.manual_seed(0)
    agent = AWAC(2, OBS_DIM, ACTION_DIM, Args())
    with torch.no_grad():
        agent.actor.raw_log_std.copy_(torch.tensor([[-1.0, 0.0], [-4.0, 2.0]]).unsqueeze(1))
    obs, noise = torch.randn(2, 50, OBS_DIM), torch.randn(2, 50, ACTION_DIM)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    with torch.no_grad():
        sampled = agent.actor.sample(agent.actor(obs)).numpy()
    std = np.exp(-6 / (1 + np.exp(-np.array([[-1.0, 0.0], [-4.0, 2.0]]))))
    clipped = 0
    for g in range(2):
        mean = np.tanh(plain_mlp(agent.actor.network, obs[g], g))
        expected = mean + std[g] * noise[g].numpy()
        clipped += (abs(expected) > 1).sum()
        np.testing.assert_allclose(sampled[g], np.clip(expected, -1, 1), atol=1e-5)
    assert clipped > 0
    assert torch.equal(agent.act(obs), agent.actor(obs))  # acting has no noise


def test_the_log_std_stays_in_its_range_and_finds_its_way_back():
    """Data at the policy's own mean narrows it for as long as it goes on; wide data widens it."""
    torch.manual_seed(0)
    args = Args(actor_learning_rate=0.1, critic_learning_rate=0.0, hidden_size=16)
    agent = AWAC(2, OBS_DIM, ACTION_DIM, args)
    batch = random_batch(2)

    def log_stds(spread):
        for _ in range(150):
            batch["actions"] = agent.act(batch["obs"])
            batch["actions"] += spread * torch.randn_like(batch["actions"])
            agent.update(batch)
            log_std = agent.actor.log_std
            assert ((log_std > -6) & (log_std < 0)).all()
            assert (agent.actor.raw_log_std.grad != 0).all()
        return agent.actor.log_std

    assert (log_stds(0.0) < -5.5).all()
    assert (log_stds(0.5) > -2.5).all()


def test_acting_is_the_mean_and_value_the_smaller_critic_there():
    torch.manual_seed(0)
    agent = AWAC(2, OBS_DIM, ACTION_DIM, Args())
    set_scales(agent)
    obs = torch.randn(2, 4, OBS_DIM)
    found = agent.value(obs)
    for g in range(2):
        for b in range(4):
            s = scaled(agent, obs[g, b].double().numpy(), g)
            mean = np.tanh(plain_mlp(agent.actor.network, s, g))
            assert agent.act(obs)[g, b].tolist() == pytest.approx(mean, abs=1e-5)
            pair = np.concatenate([s, mean])
            value = min(plain_mlp(q.network, pair, g)[0] for q in twins(agent))
            assert found[g, b].item() == pytest.approx(value, abs=1e-5)
    assert torch.equal(agent.value(obs), found)  # nothing in it is drawn


# --- The update ---


def losses_by_hand(agent, batch, noise, g, weights=None):
    """Group g's losses in float64, state by state; and its weights, unless those are given."""
    args, data = agent.args, {key: value[g].double().numpy() for key, value in batch.items()}
    target_noise, advantage_noise = (n[g].double().numpy() for n in noise)
    std = np.exp(-6 / (1 + np.exp(-agent.actor.raw_log_std[g, 0].detach().double().numpy())))
    live, target = twins(agent), twins(agent, "target_qf")
    q1_loss, q2_loss, actor_loss, found_weights = [], [], [], []
    for b in range(len(data["rewards"])):
        s, s2 = (scaled(agent, data[key][b], g) for key in ("obs", "next_obs"))
        a = data["actions"][b]

        def mean(s):
            return np.tanh(plain_mlp(agent.actor.network, s, g))

        def q(networks, s, a):
            return [plain_mlp(qf.network, np.concatenate([s, a]), g)[0] for qf in networks]

        a2 = np.clip(mean(s2) + std * target_noise[b], -1, 1)
        bootstrap = args.gamma * (1 - data["terminations"][b]) * min(q(target, s2, a2))
        y, (q1, q2) = data["rewards"][b] + bootstrap, q(live, s, a)
        q1_loss.append((q1 - y) ** 2)
        q2_loss.append((q2 - y) ** 2)

        own = np.clip(mean(s) + std * advantage_noise[b], -1, 1)
        advantage = min(q1, q2) - min(q(live, s, own))
        weight = min(math.exp(advantage / args.temperature), args.weight_max)
        found_weights.append(weight)
        log_density = -((a - mean(s)) ** 2) / (2 * std**2) - np.log(std * math.sqrt(2 * math.pi))
        weight = weight if weights is None else weights[b]
        actor_loss.append(-weight * log_density.sum())
    losses = {
        "losses/qf1_loss": np.mean(q1_loss),
        "losses/qf2_loss": np.mean(q2_loss),
        "losses/actor_loss": np.mean(actor_loss),
        "losses/advantage_weights": np.mean(found_weights),
        "losses/policy_std": np.mean(std),
    }
    return losses, found_weights


def test_losses_and_gradients_equal_a_brute_force_without_batches(monkeypatch):
    """Every loss of one update in float64 loops, and the slopes of these along random directions;
    the advantage weights and the target are constants in them."""
    torch.manual_seed(0)
    args = Args(hidden_size=16, temperature=0.3, weight_max=3.0, tau=0.0)
    args.actor_learning_rate = args.critic_learning_rate = 0.0
    agent, groups = AWAC(3, OBS_DIM, ACTION_DIM, args).double(), range(3)
    set_scales(agent)
    with torch.no_grad():
        agent.actor.raw_log_std += torch.randn_like(agent.actor.raw_log_std)
        for p in agent.target.parameters():  # of their own: a live network in their place shows
            p += 0.1 * torch.randn_like(p)
        agent.qf.network[-1].weight *= 30  # advantages of a size to matter
    batch = {key: value.double() for key, value in random_batch(3, size=16).items()}
    noise, draw = [], torch.randn_like

    def kept(*args, **kwargs):
        noise.append(draw(*args, **kwargs))
        return noise[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", kept)
        losses = agent.update(batch)
    by_hand = [losses_by_hand(agent, batch, noise, g) for g in groups]
    for g, (expected, weights) in enumerate(by_hand):
        for name, value in expected.items():
            assert losses[name][g].item() == pytest.approx(value, rel=1e-8), name
        assert 0 < sum(w == 3.0 for w in weights) < 16  # the ceiling matters, and not always

    names = ("actor", "qf1", "qf2")
    for name, part in zip(names, (agent.actor, *twins(agent)), strict=True):
        parameters = list(part.parameters())
        for g in [*groups, *groups]:
            direction = [torch.zeros_like(p) for p in parameters]
            for d in direction:
                d[g] = torch.randn_like(d[g])

            def loss(name=name, g=g):
                values, _ = losses_by_hand(agent, batch, noise, g, weights=by_hand[g][1])
                return values[f"losses/{name}_loss"]

            slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))
            expected = central_difference(parameters, direction, loss)
            assert slope.item() == pytest.approx(expected, rel=1e-5, abs=1e-7), name


def test_the_weights_follow_temperature_and_ceiling():
    """Known critics: the advantage is 3 (a - own action)."""
    torch.manual_seed(0)
    obs, actions = torch.randn(2, 200, OBS_DIM), torch.rand(2, 200, 1) * 2 - 1
    for temperature, weight_max in ((1.0, 100.0), (0.5, 100.0), (2.0, 1.5)):
        args = Args(temperature=temperature, weight_max=weight_max)
        agent = AWAC(2, OBS_DIM, 1, args)
        agent.qf.forward = lambda obs, actions: 3 * actions.squeeze(2).expand(2, -1, -1)
        own = torch.rand(2, 200, 1) * 2 - 1
        found = agent.advantage_weights(obs, actions, own).numpy()
        advantage = 3 * (actions - own).squeeze(2).double().numpy()
        expected = np.minimum(np.exp(advantage / temperature), weight_max)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_groups_weights_and_updates_do_not_feel_the_others_scale():
    """Group 0's rewards and critics times a hundred: bit for bit nothing changes in group 1."""
    updates = []
    for scale in (1, 100):
        torch.manual_seed(0)
        agent = AWAC(2, OBS_DIM, ACTION_DIM, Args())
        batch = random_batch(2)
        batch["rewards"][0] *= scale
        with torch.no_grad():
            for qf in (*twins(agent), *twins(agent, "target_qf")):
                qf.network[-1].weight[0] *= scale
        own = agent.explore(batch["obs"])
        weights = agent.advantage_weights(batch["obs"], batch["actions"], own)
        for _ in range(3):
            losses = agent.update(batch)
        updates.append([weights, *losses.values(), *(p.detach() for p in agent.parameters())])
    for plain, enlarged in zip(*updates, strict=True):
        assert torch.equal(plain[1], enlarged[1])
    assert not torch.equal(updates[0][0][0], updates[1][0][0])


def test_no_number_overflows_on_actions_at_the_bounds_with_huge_advantages():
    torch.manual_seed(0)
    args = Args(hidden_size=32, actor_learning_rate=1e-2, critic_learning_rate=1e-2)
    agent = AWAC(2, OBS_DIM, ACTION_DIM, args)
    with torch.no_grad():
        for qf in (*twins(agent), *twins(agent, "target_qf")):
            qf.network[-1].weight *= 1e5
    seen = []
    for i in range(200):
        batch = random_batch(2, seed=i % 10)
        batch["actions"] = batch["actions"].sign()
        batch["rewards"] *= 1e5
        own = agent.explore(batch["obs"])
        seen.append(agent.advantage_weights(batch["obs"], batch["actions"], own))
        assert all(loss.isfinite().all() for loss in agent.update(batch).values())
    assert all(p.isfinite().all() for p in agent.parameters())
    seen = torch.stack(seen)
    assert seen.max() == 100 and (seen == 100).float().mean() > 0.2
    assert seen.min() == 0 and (seen == 0).float().mean() > 0.2


# --- Tasks with a known solution ---


def test_a_bandit_ends_in_its_closed_form_and_each_group_in_its_own():
    """Reward -(a - best)^2 on uniform actions: the weights exp(A / temperature) make the policy a
    Gaussian at the best action, of variance temperature / 2."""
    torch.manual_seed(0)
    args = Args(temperature=0.1, hidden_size=32, policy_std=0.335)
    args.actor_learning_rate = args.critic_learning_rate = 5e-3
    agent = AWAC(2, 2, 1, args)
    best, chosen, stds = torch.tensor([0.3, -0.3]).view(2, 1, 1), [], []
    for i in range(700):
        obs, actions = torch.randn(2, 128, 2), torch.rand(2, 128, 1) * 2 - 1
        rewards, ones = -(actions - best).square().squeeze(2), torch.ones(2, 128)
        batch = {"obs": obs, "actions": actions, "rewards": rewards, "terminations": ones}
        agent.update(batch | {"next_obs": obs})
        if i >= 600:
            chosen.append(agent.act(obs))
            stds.append(agent.actor.log_std.detach().exp().flatten())
    assert ((torch.stack(chosen) - best).abs().mean((0, 2, 3)) < 0.08).all()
    assert torch.stack(stds).mean(0).tolist() == pytest.approx([0.05**0.5] * 2, abs=0.04)


def test_a_linear_quadratic_task_is_solved_with_the_best_gain():
    torch.manual_seed(0)
    args = Args(temperature=0.1, hidden_size=32, gamma=0.9, tau=0.05)
    args.critic_learning_rate = args.actor_learning_rate = 5e-3
    agent = AWAC(2, 1, 1, args)
    assert (linear_quadratic_error(agent, 800, 100) < 0.08).all()
