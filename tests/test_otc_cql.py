"""The CQL learner, against brute force, closed forms and tasks whose solution is known."""

import math

import numpy as np
import pytest
import torch

from otc_cql import CQL, Args
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
    args = Args(hidden_size=32, lagrange=True)
    args.actor_learning_rate, args.critic_learning_rate = 1e-3, 4e-3
    agent = CQL(2, OBS_DIM, ACTION_DIM, args)
    slow = [*agent.actor.parameters(), agent.log_temperature]
    fast = [*agent.live.parameters(), agent.log_factor]
    before = [p.detach().clone() for p in slow + fast]
    agent.update(random_batch(2))
    rates = [1e-3] * len(slow) + [4e-3] * len(fast)
    for p, old, rate in zip(slow + fast, before, rates, strict=True):
        step = -rate * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach() - old, step, rtol=1e-3, atol=1e-6)


def set_policy(agent, mean, raw_log_std):
    """Make the policy's Gaussian the same at every state: (G, action_dim) each."""
    with torch.no_grad():
        agent.actor.network[-1].weight.zero_()
        output = torch.cat([torch.as_tensor(mean), torch.as_tensor(raw_log_std)], dim=1)
        agent.actor.network[-1].bias.copy_(output.unsqueeze(1))


def test_the_log_density_is_a_change_of_variables_also_where_actions_are_at_the_bounds():
    """Up to 1 - |a| of 1e-17, where the slope 1 - a^2 is 0 in single precision."""
    torch.manual_seed(0)
    agent = CQL(1, OBS_DIM, ACTION_DIM, Args())
    for means in ([0.0, 0.5], [3.0, -3.0], [-8.0, 8.0], [-15.0, 20.0]):
        set_policy(agent, [means], [[1.0, -1.0]])  # log-stds 0 and -2
        state = torch.get_rng_state()
        with torch.no_grad():
            actions, found = agent.actor.sample(*agent.actor(torch.zeros(1, 1, OBS_DIM)), 500)
        torch.set_rng_state(state)
        noise = torch.randn(1, 1, 500, ACTION_DIM).double().numpy()[0, 0]
        std = np.exp([0.0, -2.0])
        before = np.array(means) + std * noise
        log_normal = -0.5 * ((before - means) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))
        log_slope = -2 * (np.logaddexp(before, -before) - np.log(2))  # log of 1 / cosh^2
        expected = (log_normal - log_slope).sum(1)
        np.testing.assert_allclose(found[0, 0].numpy(), expected, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(actions[0, 0].numpy(), np.tanh(before), atol=1e-6)


@pytest.mark.parametrize("mean, log_std", [(0.0, -1.0), (0.8, -0.5), (-1.5, 0.5)])
def test_the_density_integrates_to_one(monkeypatch, mean, log_std):
    agent = CQL(1, 1, 1, Args()).double()
    set_policy(agent, [[mean]], [[log_std + 1]])
    noise = torch.linspace(-8, 8, 20_001, dtype=torch.float64).view(1, 1, -1, 1)
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None: noise)
    with torch.no_grad():
        actions, log_prob = agent.actor.sample(*agent.actor(torch.zeros(1, 1, 1).double()), 20_001)
    mass = torch.trapezoid(log_prob.flatten().exp(), actions.flatten())
    assert mass.item() == pytest.approx(1, abs=1e-5)


def test_the_log_std_is_held_between_its_bounds():
    agent = CQL(1, OBS_DIM, ACTION_DIM, Args())
    set_policy(agent, [[0.0, 0.0]], [[-100.0, 100.0]])
    assert agent.actor(torch.zeros(1, 1, OBS_DIM))[1].flatten().tolist() == [-20, 2]
    _, log_prob = agent.actor.sample(*agent.actor(torch.zeros(1, 50, OBS_DIM)))
    assert log_prob.isfinite().all()


def test_acting_is_the_mean_and_value_the_smaller_critic_there():
    torch.manual_seed(0)
    agent = CQL(2, OBS_DIM, ACTION_DIM, Args())
    set_scales(agent)
    obs = torch.randn(2, 4, OBS_DIM)
    found, acted = agent.value(obs), agent.act(obs)
    for g in range(2):
        for b in range(4):
            s = scaled(agent, obs[g, b].double().numpy(), g)
            mean = np.tanh(plain_mlp(agent.actor.network, s, g)[:ACTION_DIM])
            np.testing.assert_allclose(acted[g, b].numpy(), mean, atol=1e-5)
            pair = np.concatenate([s, mean])
            value = min(plain_mlp(q.network, pair, g)[0] for q in twins(agent))
            assert found[g, b].item() == pytest.approx(value, abs=1e-5)
    assert torch.equal(agent.value(obs), found)  # nothing in it is drawn


# --- The update ---


def losses_by_hand(agent, batch, noise, g):
    """Group g's losses in float64, state by state and action by action."""
    args, data = agent.args, {key: value[g].double().numpy() for key, value in batch.items()}
    noise = [n[g].double().numpy() for n in noise]
    target_noise, obs_noise, next_obs_noise, uniform, actor_noise = noise
    log_temperature, log_factor = agent.log_temperature[g].item(), agent.log_factor[g].item()

    def policy(s, z):
        """An action, and its log density by the change of variables from the action back."""
        mean, log_std = np.split(plain_mlp(agent.actor.network, s, g), 2)
        std = np.exp(np.clip(log_std - 1, -20, 2))
        a = np.tanh(mean + std * z)
        z = (np.arctanh(a) - mean) / std
        return a, np.sum(np.log(np.exp(-(z**2) / 2) / (std * np.sqrt(2 * np.pi)) / (1 - a**2)))

    def q(networks, s, a):
        return np.array([plain_mlp(qf.network, np.concatenate([s, a]), g)[0] for qf in networks])

    live, target = twins(agent), twins(agent, "target_qf")
    td, gaps, actor_loss, entropy = [], [], [], []
    for b in range(len(data["rewards"])):
        s, s2 = (scaled(agent, data[key][b], g) for key in ("obs", "next_obs"))
        a = data["actions"][b]
        a2, _ = policy(s2, target_noise[b, 0])
        bootstrap = args.gamma * (1 - data["terminations"][b]) * min(q(target, s2, a2))
        q_data = q(live, s, a)
        td.append((q_data - data["rewards"][b] - bootstrap) ** 2)

        total = np.zeros(2)
        for c in range(args.num_penalty_actions):
            total += np.exp(q(live, s, 2 * uniform[b, c] - 1)) / 0.5 ** len(a)
            for state, z in ((s, obs_noise[b, c]), (s2, next_obs_noise[b, c])):
                a_sampled, log_density = policy(state, z)
                total += np.exp(q(live, s, a_sampled)) / np.exp(log_density)
        gaps.append(np.log(total) - q_data)

        a, log_density = policy(s, actor_noise[b, 0])
        actor_loss.append(math.exp(log_temperature) * log_density - min(q(live, s, a)))
        entropy.append(-log_density)
    td, gaps = np.mean(td, 0), np.mean(gaps, 0)
    entropy, mean_gap = np.mean(entropy), np.mean(gaps)
    weight, target_gap = args.cql_alpha, 0.0
    if args.lagrange:
        weight, target_gap = weight * math.exp(log_factor), args.target_gap
    losses = {
        "losses/qf1_loss": td[0],
        "losses/qf2_loss": td[1],
        "losses/conservative_gap": mean_gap,
        "losses/actor_loss": np.mean(actor_loss),
        "losses/entropy": entropy,
        "losses/temperature": math.exp(log_temperature),
    }
    critics = td + weight * (gaps - target_gap)
    return losses, {
        "qf1": critics[0],
        "qf2": critics[1],
        "actor": losses["losses/actor_loss"],
        "temperature": entropy + ACTION_DIM,  # the slopes themselves, of the last two
        "factor": math.exp(log_factor) * (target_gap - mean_gap) if args.lagrange else None,
    }


@pytest.mark.parametrize("lagrange", [False, True])
def test_losses_and_gradients_equal_a_brute_force_without_batches(monkeypatch, lagrange):
    """Every loss of one update in float64 loops over groups, states and sampled actions, and the
    slopes of these along random directions; the sampled actions and their densities are constants
    in the critics', temperature and factor are in the others'."""
    torch.manual_seed(0)
    args = Args(hidden_size=16, num_penalty_actions=3, cql_alpha=2.0, lagrange=lagrange, tau=0.0)
    args.target_gap, args.actor_learning_rate, args.critic_learning_rate = 1.5, 0.0, 0.0
    agent = CQL(2, OBS_DIM, ACTION_DIM, args).double()
    set_scales(agent)
    with torch.no_grad():
        for p in agent.target.parameters():  # of their own: a live network in their place shows
            p += 0.1 * torch.randn_like(p)
        for network in (agent.actor, *twins(agent)):
            network.network[-1].weight *= 5
        agent.log_temperature += torch.tensor([-1.0, 0.5])
        agent.log_factor += torch.tensor([-0.5, 0.7])
    batch = {key: value.double() for key, value in random_batch(2, size=6).items()}
    noise = []

    def kept(draw):
        def make(*args, **kwargs):
            noise.append(draw(*args, **kwargs))
            return noise[-1]

        return make

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", kept(torch.randn))
        patch.setattr(torch, "rand_like", kept(torch.rand_like))
        losses = agent.update(batch)
    for g in range(2):
        expected, slopes = losses_by_hand(agent, batch, noise, g)
        assert expected.keys() | {"losses/qf1_values"} == losses.keys()
        for name, value in expected.items():
            assert losses[name][g].item() == pytest.approx(value, rel=1e-6), name
        assert agent.log_temperature.grad[g].item() == pytest.approx(slopes["temperature"])
        if lagrange:
            assert agent.log_factor.grad[g].item() == pytest.approx(slopes["factor"])

    names = ("actor", "qf1", "qf2")
    for name, part in zip(names, (agent.actor, *twins(agent)), strict=True):
        parameters = list(part.parameters())
        for g in (0, 1, 0, 1):
            direction = [torch.zeros_like(p) for p in parameters]
            for d in direction:
                d[g] = torch.randn_like(d[g])

            def loss(name=name, g=g):
                return losses_by_hand(agent, batch, noise, g)[1][name]

            slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))
            expected = central_difference(parameters, direction, loss)
            assert slope.item() == pytest.approx(expected, rel=1e-5, abs=1e-7), name


def test_a_groups_update_does_not_feel_the_others_scale():
    """Group 0's rewards and critics times a hundred: bit for bit nothing changes in group 1."""
    updates = []
    for scale in (1, 100):
        torch.manual_seed(0)
        agent = CQL(2, OBS_DIM, ACTION_DIM, Args(lagrange=True, num_penalty_actions=2))
        batch = random_batch(2)
        batch["rewards"][0] *= scale
        with torch.no_grad():
            for qf in (*twins(agent), *twins(agent, "target_qf")):
                qf.network[-1].weight[0] *= scale
        for _ in range(3):
            losses = agent.update(batch)
        updates.append([*losses.values(), *(p.detach() for p in agent.parameters())])
    for plain, enlarged in zip(*updates, strict=True):
        assert torch.equal(plain[1], enlarged[1])
    assert not torch.equal(updates[0][0][0], updates[1][0][0])


def test_the_temperature_falls_where_there_is_entropy_enough_and_rises_elsewhere():
    torch.manual_seed(0)
    agent = CQL(2, OBS_DIM, ACTION_DIM, Args())
    set_policy(agent, [[0.0, 0.0]] * 2, [[0.0, 0.0], [-4.0, -4.0]])
    entropy = agent.update(random_batch(2))["losses/entropy"]
    assert entropy[0] > -ACTION_DIM > entropy[1]
    assert agent.log_temperature[0] < 0 < agent.log_temperature[1]


def test_the_factor_grows_above_the_target_gap_shrinks_below_and_rests_without_lagrange():
    """Group 0's data are the worst of the random actions, group 1's the best: their gaps differ."""
    for lagrange in (True, False):
        torch.manual_seed(0)
        agent = CQL(2, OBS_DIM, ACTION_DIM, Args(lagrange=lagrange))
        batch = random_batch(2)
        with torch.no_grad():
            agent.qf.network[-1].weight *= 60
            actions = torch.rand(2, 32 * 50, ACTION_DIM) * 2 - 1
            q = agent.q_value(batch["obs"].repeat_interleave(50, dim=1), actions).view(2, 32, 50)
            pick = torch.stack([q[0].argmin(1), q[1].argmax(1)])
            index = pick.view(2, 32, 1, 1).expand(-1, -1, -1, ACTION_DIM)
            batch["actions"] = actions.view(2, 32, 50, -1).gather(2, index).squeeze(2)
            q = agent.qf(batch["obs"], batch["actions"])
            policies = agent.actor(batch["obs"]), agent.actor(batch["next_obs"])
            gap = agent.conservative_gap(batch["obs"], *policies, q).mean(0)
        assert gap[0] > gap[1] + 1
        agent.args.target_gap = gap.mean().item()
        for _ in range(5):
            agent.update(batch)
        if lagrange:
            assert agent.log_factor[0] > 1 + 1e-4 and agent.log_factor[1] < 1 - 1e-4
        else:
            assert agent.log_factor.tolist() == [1, 1] and agent.log_factor.grad is None


# --- Tasks with a known solution ---


def test_the_penalty_keeps_unseen_actions_below_the_datas():
    """Half of the actions is in the data, and the reward climbs towards the other half: without the
    penalty the critics extrapolate and the policy follows, with it neither does."""
    side = torch.tensor([1.0, -1.0]).view(2, 1, 1)  # the data's side of each group
    for cql_alpha in (0.0, 1.0):
        torch.manual_seed(0)
        args = Args(cql_alpha=cql_alpha, num_penalty_actions=4, hidden_size=32)
        args.actor_learning_rate = args.critic_learning_rate = 5e-3
        agent = CQL(2, 1, 1, args)
        for _ in range(150):
            obs, actions = torch.zeros(2, 64, 1), side * torch.rand(2, 64, 1)
            rewards, ones = -3 * (side * actions).squeeze(2), torch.ones(2, 64)
            batch = {"obs": obs, "actions": actions, "rewards": rewards, "terminations": ones}
            agent.update(batch | {"next_obs": obs})
        obs = torch.zeros(2, 20, 1)
        seen = agent.q_value(obs, side * torch.linspace(0.05, 0.5, 20).view(1, 20, 1)).mean(1)
        unseen = agent.q_value(obs, -side * torch.linspace(0.2, 1, 20).view(1, 20, 1)).mean(1)
        chosen = (side * agent.act(obs)).mean((1, 2))
        if cql_alpha:
            assert (unseen < seen - 1).all() and (chosen > 0).all()
        else:
            assert (unseen > seen + 0.3).all() and (chosen < -0.3).all()


def test_a_bandit_ends_in_its_closed_form_and_each_group_in_its_own():
    """Uniform actions, reward 3 - 2 (a - best)^2. Where the gradient of squared error and penalty
    is zero, Q = r - alpha / 2 * (softmax of Q over the density of the data's actions - 1)."""
    torch.manual_seed(0)
    args = Args(cql_alpha=2.0, num_penalty_actions=5, hidden_size=32)
    args.actor_learning_rate = args.critic_learning_rate = 5e-3
    agent = CQL(2, 1, 1, args)
    agent.log_temperature.data.fill_(-1.0)
    best = torch.tensor([0.3, -0.3]).view(2, 1, 1)
    grid, found, chosen = torch.linspace(-1, 1, 201), [], []
    for i in range(450):
        obs, actions = torch.zeros(2, 128, 1), torch.rand(2, 128, 1) * 2 - 1
        rewards, ones = 3 - 2 * (actions - best).square().squeeze(2), torch.ones(2, 128)
        batch = {"obs": obs, "actions": actions, "rewards": rewards, "terminations": ones}
        agent.update(batch | {"next_obs": obs})
        if i >= 350:
            obs = torch.zeros(2, 201, 1)
            found.append(agent.q_value(obs, grid.view(1, 201, 1).expand(2, -1, -1)))
            chosen.append(agent.act(obs[:, :1]))
    found, chosen = torch.stack(found).mean(0), torch.stack(chosen).mean(0)
    for g in range(2):
        reward = 3 - 2 * (grid - best[g, 0]).square()
        q = reward
        for _ in range(500):
            softmax = q.exp() / q.exp().mean()  # relative to the data's uniform density
            q = 0.9 * q + 0.1 * (reward - 1.0 * (softmax - 1))
        assert (q - reward).abs().mean() > 0.25
        assert (found[g] - q).abs()[10:-10].mean() < 0.12
    assert ((chosen - best).abs() < 0.1).all()


def test_a_linear_quadratic_task_is_solved_with_the_best_gain():
    torch.manual_seed(0)
    args = Args(cql_alpha=0.01, num_penalty_actions=1, hidden_size=32, gamma=0.9, tau=0.05)
    args.critic_learning_rate = args.actor_learning_rate = 5e-3
    agent = CQL(2, 1, 1, args)
    agent.log_temperature.data.fill_(-2.0)
    assert (linear_quadratic_error(agent, 600, 100) < 0.08).all()
