"""The BREMEN learner: trust region step, dynamics ensemble, rollouts, whole improvements."""

import copy
import signal
import sys

import numpy as np
import pytest
import torch

import otc_bremen
from common import cli
from common.datasets import TeamDataset
from common.replay import Replay
from otc_bremen import BREMEN, Args, conjugate_gradient, trust_region_step
from tests.helpers import (
    ACTION_DIM,
    OBS_DIM,
    add_deployment,
    plain_mlp,
    random_batch,
    random_team,
)
from tests.tiny_task import ENV, write_data

SMALL = {"hidden_size": 8, "num_models": 3, "rollouts": 10, "rollout_length": 4}
SMALL |= {"value_updates": 3, "batch_size": 16, "cg_iterations": 5}


def positive_definite(G, P, seed=0):
    factor = torch.randn(G, P, P, dtype=torch.float64, generator=torch.manual_seed(seed))
    return factor @ factor.transpose(1, 2) + torch.eye(P)


def times(matrix):
    return lambda vector: (matrix @ vector.unsqueeze(2)).squeeze(2)


# --- Conjugate gradient and trust region ---


@pytest.mark.parametrize("iterations", [6, 200])
def test_conjugate_gradient_solves_every_groups_system(iterations):
    """With as many iterations as unknowns, and with many more, which must change nothing."""
    matrix = positive_definite(3, 6)
    b = torch.randn(3, 6, dtype=torch.float64)
    b[1] = 0.0
    x = conjugate_gradient(times(matrix), b, iterations)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-8)


def test_a_few_iterations_are_the_best_of_their_krylov_space():
    """After i iterations x minimises x'Ax/2 - b'x over the span of b, Ab ... A^(i-1) b."""
    matrix, b = positive_definite(2, 6), torch.randn(2, 6, dtype=torch.float64)
    space = torch.stack([b, times(matrix)(b), times(matrix)(times(matrix)(b))], dim=2)
    inner = space.transpose(1, 2) @ matrix @ space
    best = space @ torch.linalg.solve(inner, space.transpose(1, 2) @ b.unsqueeze(2))
    found = conjugate_gradient(times(matrix), b, 3)
    torch.testing.assert_close(found, best.squeeze(2), rtol=1e-6, atol=1e-8)


def test_the_step_to_the_edge_of_a_quadratic_trust_region_is_known():
    fisher, gradient = positive_definite(3, 4), torch.randn(3, 4, dtype=torch.float64)
    theta = torch.randn(3, 4, dtype=torch.float64)

    def evaluate(new):
        moved = new - theta
        # A hair inside the limit, so that rounding does not decide
        kl = 0.5 * (moved * times(fisher)(moved)).sum(1) * (1 - 1e-9)
        return (gradient * moved).sum(1), kl

    new, improvement, kl, share = trust_region_step(
        theta, gradient, times(fisher), evaluate, 0.05, 4
    )
    natural = torch.linalg.solve(fisher, gradient)
    slope = (gradient * natural).sum(1, keepdim=True)
    step = (2 * 0.05 / slope).sqrt() * natural
    torch.testing.assert_close(new, theta + step)
    torch.testing.assert_close(improvement, (gradient * step).sum(1))
    torch.testing.assert_close(kl, torch.full((3,), 0.05, dtype=torch.float64))
    assert (share == 1).all()


def test_the_line_search_takes_the_first_acceptable_share_and_each_group_its_own():
    """Shares are powers of 0.7. One group may go all the way; one is stopped by the KL divergence,
    one by a surrogate that turns, one finds nothing better and one nothing finite."""
    eye = torch.eye(2, dtype=torch.float64).expand(5, 2, 2)
    theta = torch.randn(5, 2, dtype=torch.float64)
    gradient = torch.ones(5, 2, dtype=torch.float64)
    length = (2 * 0.02) ** 0.5
    kl_factor = torch.tensor([0.9, 4.5, 0.9, 0.9, torch.nan], dtype=torch.float64)

    def evaluate(new):
        moved = (new - theta).sum(1) / 2**0.5 / length  # 1 for the full step
        kl = kl_factor * 0.02 * moved.square()
        surrogate = moved.clone()
        surrogate[2] = moved[2] - 7 * moved[2] ** 2  # better below 1/7
        surrogate[3] = -moved[3]
        return surrogate, kl

    new, improvement, kl, share = trust_region_step(theta, gradient, times(eye), evaluate, 0.02, 5)
    assert share.tolist() == pytest.approx([1, 0.343, 0.117649, 0, 0])
    expected = theta + share.unsqueeze(1) * length / 2**0.5
    torch.testing.assert_close(new, expected)
    assert torch.equal(new[3:], theta[3:])
    assert (improvement[:3] > 0).all() and (improvement[3:] == 0).all()
    assert (kl[:3] <= 0.02).all() and (kl[3:] == 0).all()


def test_a_gradient_of_zero_or_nan_moves_nothing():
    fisher = positive_definite(3, 4)
    gradient = torch.randn(3, 4, dtype=torch.float64)
    gradient[0], gradient[2] = 0.0, torch.nan
    theta = torch.randn(3, 4, dtype=torch.float64)

    def evaluate(new):
        return (gradient * (new - theta)).sum(1), 0.1 * (new - theta).square().sum(1)

    new, _, _, share = trust_region_step(theta, gradient, times(fisher), evaluate, 0.05, 10)
    assert torch.equal(new[[0, 2]], theta[[0, 2]])
    assert share.tolist()[::2] == [0, 0] and share[1] > 0 and new[1].isfinite().all()


def tiny_policy_problem(G=2, n=20):
    """A learner in float64, and weighted imagined steps for its policy's step."""
    torch.manual_seed(0)
    agent = BREMEN(G, 3, 2, Args(**SMALL | {"hidden_size": 4, "kl_limit": 0.01})).double()
    with torch.no_grad():
        agent.actor.raw_log_std += torch.randn_like(agent.actor.raw_log_std)
    obs = torch.randn(G, n, 3, dtype=torch.float64)
    mean, log_std = (x.detach() for x in agent.actor(obs))
    actions = mean + log_std.exp() * torch.randn_like(mean)
    advantages = torch.randn(G, n, dtype=torch.float64)
    weights = (torch.rand(G, n) < 0.7).double()
    weights[:, 0] = 1
    return agent, obs, actions, advantages, weights / weights.sum(1, keepdim=True)


def plain_policy(agent, g, theta, obs):
    """Mean and log-std of group g with flat parameters theta, in numpy: (n, A), (A,)."""
    moved = copy.deepcopy(agent.actor)
    flat = otc_bremen.flat_parameters(moved)
    flat[g] = torch.from_numpy(theta)
    with torch.no_grad():
        for name, value in otc_bremen.shaped_like(moved, flat).items():
            moved.get_parameter(name).copy_(value)
    raw = moved.raw_log_std[g, 0].detach().numpy()
    return np.tanh(plain_mlp(moved.network, obs, g)), 5 / (1 + np.exp(-raw)) - 5


def central_difference(function, theta, step=1e-6):
    columns = []
    for i in range(len(theta)):
        ahead, behind = theta.copy(), theta.copy()
        ahead[i] += step
        behind[i] -= step
        columns.append((function(ahead) - function(behind)) / (2 * step))
    return np.stack(columns, axis=-1)


def test_gradient_and_fisher_vector_product_equal_brute_force(monkeypatch):
    """Against differences of the surrogate, and J' H J with J from differences of the policy and H
    the known Fisher matrix of a Gaussian; the latter over every fifth step."""
    agent, obs, actions, advantages, weights = tiny_policy_problem()
    seen = {}

    def keep(theta, gradient, product, evaluate, limit, iterations):
        seen.update(theta=theta, gradient=gradient, product=product)
        return trust_region_step(theta, gradient, product, evaluate, limit, iterations)

    monkeypatch.setattr(otc_bremen, "trust_region_step", keep)
    before = copy.deepcopy(agent)
    agent.improve_policy(obs, actions, advantages, weights)
    vector = torch.randn_like(seen["theta"])
    product = seen["product"](vector)
    for g in range(2):
        theta, o, a = (x[g].numpy() for x in (seen["theta"], obs, actions))
        w, adv = weights[g].numpy(), advantages[g].numpy()

        def density(t, g=g, o=o, a=a):
            mean, log_std = plain_policy(before, g, t, o)
            z = (a - mean) / np.exp(log_std)
            return np.prod(np.exp(-0.5 * z**2) / np.exp(log_std), axis=1)

        start = density(theta)
        slope = (w * adv / start) @ central_difference(density, theta)
        np.testing.assert_allclose(seen["gradient"][g], slope, rtol=1e-5, atol=1e-7)

        def outputs(t, g=g, o=o):
            mean, log_std = plain_policy(before, g, t, o)
            return np.concatenate([mean, np.broadcast_to(log_std, mean.shape)], axis=1)

        jacobian = central_difference(outputs, theta)  # (n, 2 A, P)
        _, log_std = plain_policy(before, g, theta, o)
        information = np.concatenate([np.exp(-2 * log_std), np.full(2, 2.0)])
        rows = range(0, len(o), 5)
        fisher = sum(w[r] * jacobian[r].T @ (information[:, None] * jacobian[r]) for r in rows)
        fisher /= sum(w[r] for r in rows)
        expected = (fisher + 0.1 * np.eye(len(theta))) @ vector[g].numpy()
        np.testing.assert_allclose(product[g], expected, rtol=1e-5, atol=1e-6)


def test_a_policy_step_stays_within_the_kl_limit_and_improves_the_surrogate():
    """Measured afterwards with torch.distributions, over all valid steps."""
    agent, obs, actions, advantages, weights = tiny_policy_problem()

    def distribution():
        mean, log_std = agent.actor(obs)
        return torch.distributions.Normal(mean.detach(), log_std.detach().exp())

    old = distribution()
    improvement, kl, share = agent.improve_policy(obs, actions, advantages, weights).values()
    new = distribution()
    true_kl = (weights * torch.distributions.kl_divergence(old, new).sum(2)).sum(1)
    ratio = (new.log_prob(actions) - old.log_prob(actions)).sum(2).exp()
    torch.testing.assert_close(kl, true_kl)
    torch.testing.assert_close(improvement, (weights * (ratio - 1) * advantages).sum(1))
    assert (share > 0).all() and (improvement > 0).all()
    assert (kl > 1e-3).all() and (kl <= 0.01).all()


# --- Advantages ---


def test_advantages_equal_a_loop_over_rollouts():
    """Sums of discounted TD errors that stop where a rollout ends, and bootstrap where it is
    cut."""
    random = np.random.default_rng(0)
    G, T, R, gamma, lam = 2, 7, 5, 0.9, 0.8
    rewards, values = random.normal(size=(G, T, R)), random.normal(size=(G, T + 1, R))
    ends = (random.random((G, T, R)) < 0.2).astype(float)
    assert ends[:, :-1].any() and not ends[:, -1].all()
    found = otc_bremen.generalized_advantages(
        *map(torch.from_numpy, (rewards, values, ends)), gamma, lam
    )
    for g, t, r in np.ndindex(G, T, R):
        # The mean of n-step returns with weights (1 - lambda) lambda^(n-1), the last one the rest
        total, n_step, discount, weight = 0.0, 0.0, 1.0, 1.0
        for u in range(t, T):
            n_step += discount * rewards[g, u, r]
            discount *= gamma
            over = ends[g, u, r] == 1
            estimate = n_step + (0 if over else discount * values[g, u + 1, r])
            last = over or u == T - 1
            total += weight * (1 if last else 1 - lam) * estimate
            weight *= lam
            if last:
                break
        assert found[g, t, r].item() == pytest.approx(total - values[g, t, r])


# --- Dynamics ensemble ---


def test_members_differ_learn_alone_and_stay_different():
    torch.manual_seed(0)
    agent = BREMEN(2, OBS_DIM, ACTION_DIM, Args(**SMALL))
    batch = random_batch(2)
    losses = sum(agent.model.loss(**batch))  # (G, num_models)
    parameters = list(agent.model.parameters())
    for g, m in np.ndindex(2, 3):
        gradients = torch.autograd.grad(losses[g, m], parameters, retain_graph=True)
        for gradient in gradients:
            touched = gradient.flatten(1).abs().sum(1).nonzero().flatten().tolist()
            assert touched == [3 * g + m]
    for _ in range(2):
        weights = agent.model.network[0].weight
        assert all(not torch.equal(weights[i], weights[j]) for i in range(6) for j in range(i))
        for _ in range(50):
            agent.update(batch, "fit")


def measured_agent(G=2, args=None):
    """A learner with the scales of random data, and that data."""
    torch.manual_seed(0)
    replay = Replay(random_team(num_agents=G), 1, 1, 40)
    agent = BREMEN(G, OBS_DIM, ACTION_DIM, args or Args(**SMALL))
    agent.measure_scales(replay)
    return agent, replay


def plain_scales(agent, g):
    """Group g's scales and box, in numpy and in the data's units."""
    each = [*agent.model.named_buffers(), *agent.named_buffers(recurse=False)]
    s = {n: (x[g, 0] if x.dim() == 3 else x).double().numpy() for n, x in each}
    for name in ("delta_mean", "delta_std"):
        s[name] = s[name] * s["obs_std"]
    return s | {f"obs_{n}": s["obs_mean"] + s["obs_std"] * s[n] for n in ("low", "high")}


def scaled_batch(agent, batch):
    return {k: agent.scaled(v) if k in ("obs", "next_obs") else v for k, v in batch.items()}


def plain_prediction(agent, g, m, obs, action):
    """What member m of group g says of one state and action, in numpy."""
    s = plain_scales(agent, g)
    x = np.concatenate([(obs - s["obs_mean"]) / s["obs_std"], action])
    out = plain_mlp(agent.model.network, x, g * agent.model.num_models + m)
    next_obs = obs + s["delta_mean"] + s["delta_std"] * out[:-2]
    next_obs = np.clip(next_obs, s["obs_low"], s["obs_high"])
    reward = s["reward_mean"] + s["reward_std"] * out[-2]
    return next_obs, reward, 1 / (1 + np.exp(-out[-1])), out


def test_model_losses_equal_a_loop():
    agent, replay = measured_agent()
    index = replay.draw_offline(6)
    batch = replay.gather(index)
    found = agent.model.loss(**scaled_batch(agent, batch))
    data = {key: value.double().numpy() for key, value in batch.items()}
    for g, m in np.ndindex(2, 3):
        rows, s = [], plain_scales(agent, g)
        for b in range(6):
            obs, end = data["obs"][g, b], data["terminations"][g, b]
            _, _, p, out = plain_prediction(agent, g, m, obs, data["actions"][g, b])
            delta = (data["next_obs"][g, b] - obs - s["delta_mean"]) / s["delta_std"]
            reward = (data["rewards"][g, b] - s["reward_mean"]) / s["reward_std"]
            entropy = -np.log(p if end else 1 - p)
            rows.append([np.mean((out[:-2] - delta) ** 2), (out[-2] - reward) ** 2, entropy])
        for loss, expected in zip(found, np.mean(rows, axis=0), strict=True):
            assert loss[g, m].item() == pytest.approx(expected, rel=1e-4)


def test_scales_are_those_of_the_offline_data_and_stay():
    agent, replay = measured_agent()
    team = random_team(num_agents=2)
    obs, next_obs = team.obs[:, 0].astype(float), team.next_obs[:, 0].astype(float)
    names = ("obs", "delta", "reward")
    for name, data in zip(names, (obs, next_obs - obs, team.rewards.astype(float)), strict=True):
        for s in (plain_scales(agent, g) for g in range(2)):
            np.testing.assert_allclose(s[f"{name}_mean"], data.mean(0), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(s[f"{name}_std"], data.std(0) + 1e-3, rtol=1e-4)
    low, high = np.minimum(obs, next_obs).min(0), np.maximum(obs, next_obs).max(0)
    np.testing.assert_allclose(s["obs_low"], low, rtol=1e-6)
    np.testing.assert_allclose(s["obs_high"], high, rtol=1e-6)

    before = {k: v.clone() for k, v in agent.model.named_buffers()}
    add_deployment(replay)
    for kind in ("clone", "fit"):
        agent.update(replay.gather(replay.draw_merged(16)), kind)
    agent.improve(replay.gather(replay.draw_online(10))["obs"])
    for name, value in agent.model.named_buffers():
        assert torch.equal(value, before[name]), name
    assert {f"model.{name}" for name in before} <= set(agent.state_dict())


def test_rollouts_follow_exactly_the_drawn_members(monkeypatch):
    """Two groups, random members of their own at every step; in numpy, and the others' weights are
    nan."""
    args = Args(**SMALL)
    agent, replay = measured_agent(args=args)
    draws = iter([[0, 2], [0, 1], [2, 1], [0, 2]])
    monkeypatch.setattr(torch, "randint", lambda *a, **k: torch.tensor(next(draws)))
    noise = []
    draw = torch.randn_like

    def kept(x):
        noise.append(draw(x))
        return noise[-1]

    monkeypatch.setattr(torch, "randn_like", kept)
    with torch.no_grad():
        for p in agent.model.parameters():
            p[[1, 3]] = torch.nan  # member 1 of group 0, member 0 of group 1
        agent.actor.network[-1].bias += 0.9  # some actions leave the box
    start = replay.gather(replay.draw_offline(10))["obs"]
    obs, actions, rewards, ends, valid = agent.imagine(agent.scaled(start))
    assert obs.shape == (2, 5, 10, OBS_DIM) and actions.shape == (2, 4, 10, ACTION_DIM)
    assert actions.abs().max() > 1
    members = [[0, 2], [0, 1], [2, 1], [0, 2]]
    for g, r in np.ndindex(2, 10):
        scale = plain_scales(agent, g)
        state, alive = start[g, r].double().numpy(), 1.0
        for t in range(4):
            scaled = (state - scale["obs_mean"]) / scale["obs_std"]
            np.testing.assert_allclose(obs[g, t, r], scaled, rtol=1e-3, atol=1e-4)
            mean = np.tanh(plain_mlp(agent.actor.network, scaled, g))
            action = mean + 0.1 * noise[t][g, r].double().numpy()
            np.testing.assert_allclose(actions[g, t, r], action, rtol=1e-3, atol=1e-4)
            state, reward, p, _ = plain_prediction(
                agent, g, members[t][g], state, np.clip(action, -1, 1)
            )
            assert rewards[g, t, r].item() == pytest.approx(reward, rel=1e-3, abs=1e-4)
            assert ends[g, t, r].item() == float(p > 0.5) and valid[g, t, r].item() == alive
            alive *= 1 - float(p > 0.5)
    assert 0 < valid[:, 1:].mean() < 1


def test_imagined_states_stay_in_the_datas_box():
    agent, replay = measured_agent()
    with torch.no_grad():
        agent.model.network[-1].bias += 50.0
        next_obs, _, _ = agent.model.predict(
            torch.zeros(2, 3, OBS_DIM), torch.zeros(2, 3, ACTION_DIM), torch.tensor([0, 1])
        )
    assert torch.equal(next_obs, agent.model.high.expand(2, 3, -1))


def test_q_is_the_mean_over_members_of_reward_and_next_value():
    agent, replay = measured_agent()
    batch = replay.gather(replay.draw_offline(4))
    found = agent.q_value(batch["obs"], batch["actions"])
    never = copy.deepcopy(agent)
    never.model.terminates = False
    found_never = never.q_value(batch["obs"], batch["actions"])
    for g, b in np.ndindex(2, 4):
        obs, action = (batch[k][g, b].double().numpy() for k in ("obs", "actions"))
        q, q_never = [], []
        for m in range(3):
            next_obs, reward, p, _ = plain_prediction(agent, g, m, obs, action)
            value = agent.value(torch.from_numpy(next_obs).float().expand(2, 1, -1))[g, 0].item()
            q.append(reward + 0.99 * (1 - p) * value)
            q_never.append(reward + 0.99 * value)
        assert found[g, b].item() == pytest.approx(np.mean(q), rel=1e-4, abs=1e-3)
        assert found_never[g, b].item() == pytest.approx(np.mean(q_never), rel=1e-4, abs=1e-3)


# --- The learner ---


def test_cloning_losses_equal_brute_force_and_the_target_gets_no_gradient():
    args = Args(**SMALL, tau=0.25, actor_learning_rate=1e-3)
    agent, replay = measured_agent(args=args)
    with torch.no_grad():
        for p in agent.target_vf.parameters():
            p += 0.1 * torch.randn_like(p)
    before = copy.deepcopy(agent)
    batch = random_batch(2, size=4)
    losses = agent.update(batch, "clone")
    data = {key: value.double().numpy() for key, value in batch.items()}
    s = plain_scales(agent, 0)
    mean, scale = before.vf.mean.item(), before.vf.scale.item()
    assert mean == pytest.approx(100 * s["reward_mean"], rel=1e-4)
    assert scale == pytest.approx(100 * s["reward_std"], rel=1e-4)
    for g in range(2):
        clone, value, s = [], [], plain_scales(agent, g)
        for b in range(4):
            obs, next_obs = (
                (data[k][g, b] - s["obs_mean"]) / s["obs_std"] for k in ("obs", "next_obs")
            )
            policy = np.tanh(plain_mlp(before.actor.network, obs, g))
            clone.append(np.mean((policy - data["actions"][g, b]) ** 2))
            v_next = mean + scale * plain_mlp(before.target_vf.network, next_obs, g)[0]
            y = data["rewards"][g, b] + 0.99 * (1 - data["terminations"][g, b]) * v_next
            v = mean + scale * plain_mlp(before.vf.network, obs, g)[0]
            value.append(((v - y) / scale) ** 2)
        assert losses["losses/clone_loss"][g].item() == pytest.approx(np.mean(clone), rel=1e-4)
        assert losses["losses/value_loss"][g].item() == pytest.approx(np.mean(value), rel=1e-4)
    targets = [list(x.target_vf.parameters()) for x in (before, agent)]
    for old, new, live in zip(*targets, agent.vf.parameters(), strict=True):
        assert new.grad is None and not new.requires_grad
        torch.testing.assert_close(new, 0.75 * old + 0.25 * live)
    assert torch.equal(before.actor.raw_log_std, agent.actor.raw_log_std)


def changed(before, after):
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)


def test_each_kind_of_update_changes_what_it_should_and_reports_the_same_tags():
    agent, replay = measured_agent()
    tags = []
    for kind, moved in {"clone": (1, 1, 1), "fit": (1, 0, 0), "improve": (0, 1, 1)}.items():
        before = copy.deepcopy(agent)
        if kind == "improve":
            losses = agent.improve(replay.gather(replay.draw_offline(10))["obs"])
        else:
            losses = agent.update(random_batch(2), kind)
        parts = ("model", "actor", "vf")
        found = tuple(int(changed(getattr(before, p), getattr(agent, p))) for p in parts)
        assert found == moved, kind
        tags.append(list(losses))
        assert all(v.shape == (2,) and v.isfinite().all() for v in losses.values())
    assert tags[0] == tags[1] == tags[2]
    assert losses["losses/model_loss"].min() > 0  # kept from the update before


@pytest.mark.parametrize("std", [0.01, 0.1, 0.5, 0.95])
def test_the_policys_noise_starts_as_asked(std):
    agent = BREMEN(1, OBS_DIM, ACTION_DIM, Args(**SMALL, policy_std=std))
    losses = agent.update(random_batch(1), "fit")
    assert losses["losses/policy_std"].item() == pytest.approx(std, rel=1e-2)


# --- Whole problems with known answers ---


GAIN = torch.tensor([0.1, -0.1]).view(2, 1)  # what an action moves in each group


def quadratic_batch(n, obs=None, actions=None):
    """s' = s +- 0.1 a, r = -s^2 - 0.1 a^2, uniform states and actions."""
    obs = torch.rand(2, n, 1) * 2 - 1 if obs is None else obs
    actions = torch.rand(2, n, 1) * 2 - 1 if actions is None else actions
    rewards = -obs.square().squeeze(2) - 0.1 * actions.square().squeeze(2)
    next_obs = obs + GAIN.unsqueeze(1) * actions
    batch = {"obs": obs, "actions": actions, "rewards": rewards, "next_obs": next_obs}
    return batch | {"terminations": torch.zeros(2, n)}


def quadratic_replay(n=2000):
    """Such data as of two agents with a view each."""
    batch = quadratic_batch(n)
    return Replay(
        TeamDataset(
            obs=batch["obs"].transpose(0, 1).numpy(),
            actions=batch["actions"].transpose(0, 1).numpy(),
            rewards=batch["rewards"].mean(0).numpy(),
            next_obs=batch["next_obs"].transpose(0, 1).numpy(),
            terminations=np.zeros(n, bool),
            truncations=np.zeros(n, bool),
            source="a known system",
        ),
        1,
        0,
        1,
    )


def true_return(policy, steps=300):
    """Discounted return of a policy of (2, n, 1) states in the true system, per group."""
    obs = torch.linspace(-1, 1, 41).view(1, -1, 1).expand(2, -1, -1)
    total = torch.zeros(2)
    for t in range(steps):
        batch = quadratic_batch(41, obs, policy(obs).clamp(-1, 1))
        total += 0.99**t * batch["rewards"].mean(1)
        obs = batch["next_obs"]
    return total


def test_a_linear_quadratic_system_is_learned_and_solved():
    """Uniform actions are cloned to about zero, which leaves the state where it is; improvement
    then comes close to the solution of the Riccati equation. The groups need opposite signs."""
    torch.manual_seed(0)
    args = Args(
        hidden_size=32,
        num_models=3,
        actor_learning_rate=1e-3,
        critic_learning_rate=2e-3,
        clone_updates=600,
        rollouts=50,
        rollout_length=12,
        policy_std=0.3,
        value_updates=20,
    )
    agent = BREMEN(2, 1, 1, args)
    agent.measure_scales(quadratic_replay())
    for _ in range(args.clone_updates):
        agent.update(quadratic_batch(128), "clone")
    batch = quadratic_batch(200)
    for m in range(3):
        obs = agent.scaled(batch["obs"])
        predicted = agent.model.predict(obs, batch["actions"], torch.tensor([m, m]))
        # an action of 1 moves the state by 0.1
        next_obs = agent.obs_mean + agent.obs_std * predicted[0]
        assert (next_obs - batch["next_obs"]).abs().mean() < 0.01
        assert (predicted[1] - batch["rewards"]).abs().mean() < 0.05
        assert predicted[2].max() < 0.1
    cloned = true_return(agent.act)

    for _ in range(60):
        agent.update(quadratic_batch(128), "fit")
        losses = agent.improve(quadratic_batch(args.rollouts)["obs"])
    assert (losses["losses/kl"] <= args.kl_limit).all()
    improved = true_return(agent.act)

    cost = 1.0
    for _ in range(1000):  # Riccati: P = 1 + gamma P - (gamma b P)^2 / (0.1 + gamma b^2 P)
        cost = 1 + 0.99 * cost - (0.99 * 0.1 * cost) ** 2 / (0.1 + 0.99 * 0.01 * cost)
    gain = 0.99 * 0.1 * cost / (0.1 + 0.99 * 0.01 * cost)
    best = true_return(lambda obs: -GAIN.sign().unsqueeze(1) * gain * obs)
    reached = (improved - cloned) / (best - cloned)
    assert (best - cloned > 15).all() and (reached > 0.9).all(), (cloned, improved, best)
    assert (reached < 1.02).all()


def test_learned_termination_stops_imagined_rollouts_and_never_does_not():
    """s' = s + 0.1 a ends beyond 1. A policy that goes up ends after as many steps as it takes, one
    that goes down never."""
    torch.manual_seed(0)
    args = Args(hidden_size=32, num_models=2, critic_learning_rate=3e-3, policy_std=0.01)
    args.rollouts, args.rollout_length = 40, 12
    agent = BREMEN(2, 1, 1, args)
    for _ in range(600):
        batch = quadratic_batch(128)
        batch["next_obs"] = batch["obs"] + 0.1 * batch["actions"]
        batch["terminations"] = (batch["next_obs"] > 1).float().squeeze(2)
        agent.update(batch, "fit")
    with torch.no_grad():
        agent.actor.network[-1].weight.zero_()
        agent.actor.network[-1].bias.copy_(torch.tensor([5.0, -5.0]).view(2, 1, 1))
    start = torch.linspace(0.35, 0.85, 40).view(1, -1, 1).expand(2, -1, -1)
    _, _, _, ends, valid = agent.imagine(start)
    steps = torch.ceil((1 - start[0, :, 0]) / 0.1)
    assert ((valid[0].sum(0) - steps).abs() <= 1).all() and (valid[0].sum(0) < 12).all()
    assert (valid[1] == 1).all() and not ends[1].any()
    assert ((valid[:, :-1] - valid[:, 1:]) == valid[:, :-1] * ends[:, :-1]).all()

    never = BREMEN(2, 1, 1, Args(**vars(args) | {"termination": "never"}))
    never.load_state_dict(agent.state_dict())
    _, _, _, ends, valid = never.imagine(start)
    assert (valid == 1).all() and not ends.any()

    never = BREMEN(2, 1, 1, never.args)
    bias = never.model.network[-1].bias
    before = bias.clone()
    never.update(batch, "fit")  # and the logit, the last output, is not trained
    assert torch.equal(before[..., -1], bias[..., -1])
    assert not torch.equal(before[..., :-1], bias[..., :-1])


def test_steps_behind_an_end_do_not_matter(monkeypatch):
    """Imagined rewards, states and actions behind an end are spoilt: the same policy and value."""
    agent, replay = measured_agent()
    start = replay.gather(replay.draw_offline(10))["obs"]
    rolled = agent.imagine(agent.scaled(start))
    assert (rolled[4] == 0).any()
    trained = []
    for spoil in (False, True):
        obs, actions, rewards, ends, valid = (x.clone() for x in rolled)
        if spoil:
            behind = valid == 0
            rewards[behind] += 7.0
            actions[behind] += 0.05
            obs[:, :-1][behind] += 0.5
        other = copy.deepcopy(agent)
        monkeypatch.setattr(other, "imagine", lambda _, r=(obs, actions, rewards, ends, valid): r)
        torch.manual_seed(1)
        losses = other.improve(start)
        assert (losses["losses/step_size"] > 0).all()
        trained.append([*other.parameters(), *losses.values()])
    for one, two in zip(*trained, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_value_is_fitted_to_the_lambda_returns_of_the_imagined_steps(monkeypatch):
    """One minibatch, its loss in numpy: G_t = r + gamma ((1 - lambda) V' + lambda G_{t+1})."""
    agent, replay = measured_agent(args=Args(**SMALL | {"value_updates": 1}))
    start = replay.gather(replay.draw_offline(10))["obs"]
    rolled = agent.imagine(agent.scaled(start))
    obs, _, rewards, ends, valid = (x.double().numpy() for x in rolled)
    values = np.stack([[agent_values(agent, obs[g, t], g) for t in range(5)] for g in range(2)])
    returns, later = np.zeros((2, 4, 10)), values[:, 4]
    for t in (3, 2, 1, 0):
        later = 0.05 * values[:, t + 1] + 0.95 * later
        later = returns[:, t] = rewards[:, t] + 0.99 * (1 - ends[:, t]) * later
    index = torch.randint(40, (2, 16))
    monkeypatch.setattr(agent, "imagine", lambda _: rolled)
    monkeypatch.setattr(torch, "randint", lambda *a, **k: index)
    losses = agent.improve(start)
    for g in range(2):
        drawn = index[g].numpy()
        error = ((returns - values[:, :4]) / agent.vf.scale.item())[g].reshape(-1)[drawn]
        expected = np.average(error**2, weights=valid[g].reshape(-1)[drawn])
        assert losses["losses/value_loss"][g].item() == pytest.approx(expected, rel=1e-3)
        total = (rewards * valid)[g].sum(0).mean()
        assert losses["losses/imagined_return"][g].item() == pytest.approx(total, rel=1e-3)


def agent_values(agent, scaled_obs, g):
    """V of scaled observations (n, obs_dim), in numpy."""
    network = plain_mlp(agent.vf.network, scaled_obs, g)[:, 0]
    return agent.vf.mean.item() + agent.vf.scale.item() * network


# --- The script ---


def test_kinds_of_updates_follow_the_flags(tmp_path, monkeypatch):
    """Cloning first, then an improvement after every so many fits, and in fine-tuning likewise."""
    kinds, starts = [], []
    update, improve = BREMEN.update, BREMEN.improve

    def kept_update(self, batch, kind):
        kinds.append(kind)
        return update(self, batch, kind)

    def kept_improve(self, start_obs):
        starts.append((len(kinds), tuple(start_obs.shape)))
        return improve(self, start_obs)

    monkeypatch.setattr(BREMEN, "update", kept_update)
    monkeypatch.setattr(BREMEN, "improve", kept_improve)
    argv = ["--env", ENV, "--dataset", write_data(tmp_path / "point.hdf5")]
    argv += ["--run-dir", tmp_path / "runs", "--device", "cpu"]
    argv += "--deployments 1 --deployment-steps 60 --candidates 32 --references 40".split()
    argv += "--offline-updates 10 --clone-updates 4 --improve-every 3".split()
    argv += "--finetune-updates 7 --hidden-size 8 --rollouts 6 --rollout-length 3".split()
    monkeypatch.setattr(sys, "argv", ["otc_bremen.py", *map(str, argv)])
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        cli.cli(otc_bremen.main, Args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    offline = "clone clone clone clone fit fit improve fit fit improve".split()
    assert kinds == offline + "fit fit improve fit fit improve fit".split()
    assert starts == [(n, (2, 6, 2)) for n in (7, 10, 13, 16)]
