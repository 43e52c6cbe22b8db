"""The OMAR learner, against brute force, closed forms and tasks whose solution is known."""

import math

import numpy as np
import pytest
import torch

from benchmarks.omar_sampler import climb, two_peaks
from common.replay import Replay
from omar import COEFFICIENTS, OMAR, Args
from tests.helpers import (
    ACTION_DIM,
    OBS_DIM,
    add_deployment,
    central_difference,
    linear_quadratic_error,
    plain_mlp,
    random_batch,
    random_team,
    set_scales,
    twins,
)

# --- The zeroth-order sampler ---


def made(num_agents=1, **options):
    torch.manual_seed(0)
    return OMAR(num_agents, 1, 1, Args(env="other", **options))


@pytest.mark.parametrize("options", [{"refit": "softmax"}, {"refit": "elite"}])
def test_the_sampler_finds_the_higher_peak_where_gradient_ascent_does_not(options):
    agent = made(sampler_samples=40, **options)
    agent.qf.first = two_peaks
    start = torch.full((1, 200, 1), -0.4)
    obs, data = torch.zeros(1, 200, 1, 1), torch.zeros(1, 200, 1, 1)
    assert (climb(start) + 0.6).abs().max() < 0.01
    found, _ = agent.best_actions(obs, data, start)
    share = (found > 0.4).float().mean()  # of the states, at the higher peak
    assert share > 0.9, share
    # never worse than the policy's own action
    assert (two_peaks(None, found) >= two_peaks(None, start)).all()


@pytest.mark.parametrize("refit", ["softmax", "elite"])
def test_one_round_without_spread_leaves_the_policys_own_action(refit):
    agent = OMAR(2, OBS_DIM, ACTION_DIM, Args(sampler_std=0.0, sampler_rounds=1, refit=refit))
    batch = random_batch(2)
    own = torch.rand_like(batch["actions"]) * 2 - 1
    team = (x.unsqueeze(2) for x in (batch["obs"], batch["actions"]))
    assert torch.equal(agent.best_actions(*team, own)[0], own)


@pytest.mark.parametrize("refit", ["softmax", "elite"])
def test_the_sampler_equals_a_loop_over_states(monkeypatch, refit):
    args = Args(refit=refit, sampler_rounds=3, sampler_samples=6, elites=2, sampler_std=0.7)
    torch.manual_seed(0)
    agent = OMAR(2, OBS_DIM, ACTION_DIM, args).double()
    batch = {k: v.double() for k, v in random_batch(2, size=8).items()}
    own = torch.rand(2, 8, ACTION_DIM, dtype=torch.float64) * 2 - 1
    drawn, draw = [], torch.randn

    def kept(*shape, **kwargs):
        drawn.append(draw(*shape, dtype=torch.float64))
        return drawn[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", kept)
        team = (x.unsqueeze(2) for x in (batch["obs"], batch["actions"]))
        found, its_q = agent.best_actions(*team, own)
    assert len(drawn) == 3
    for g in range(2):
        for b in range(8):
            s = batch["obs"][g, b].numpy()

            def q(a, s=s, g=g):
                return plain_mlp(agent.qf.network, np.concatenate([s, a]), g)[0]

            mean, std, elites = own[g, b].numpy(), np.full(ACTION_DIM, 0.7), []
            for noise in drawn:
                new = [np.clip(mean + std * x, -1, 1) for x in noise[g, b].numpy()]
                samples = [*elites, *new]
                values = np.array([q(a) for a in samples])
                if refit == "elite":
                    best = np.argsort(-values)[:2]
                    elites = [samples[i] for i in best]
                    mean, std = np.mean(elites, 0), np.std(elites, 0, ddof=1)
                else:
                    weights = np.exp(values) / np.exp(values).sum()
                    mean = sum(w * a for w, a in zip(weights, samples, strict=True))
                    std = np.sqrt(np.mean([(a - mean) ** 2 for a in samples], 0))
            samples.append(own[g, b].numpy())
            expected = max(samples, key=q)
            np.testing.assert_allclose(found[g, b].numpy(), expected, rtol=1e-9)
            np.testing.assert_allclose(its_q[g, b].item(), q(expected), rtol=1e-9)


# --- The update ---


def losses_by_hand(agent, batch, uniform, noise, best, g):
    """Group g's losses in float64, state by state, and what the actor and each critic descend;
    `noise` of the penalised policy actions."""
    args, data = agent.args, {key: value[g].double().numpy() for key, value in batch.items()}
    mean, std = (b[g, 0].double().numpy() for b in (agent.obs_mean, agent.obs_std))

    def policy(actor, s):
        return np.tanh(plain_mlp(actor.network, s, g))

    def q(qf, s, a):
        return agent.unit.item() * plain_mlp(qf.network, np.concatenate([s, a]), g)[0]

    live, target = twins(agent), twins(agent, "target_qf")
    errors, gaps, regression, own_q = ([], []), [[], []], [], []
    for b in range(len(data["rewards"])):
        s, s2 = ((data[key][b] - mean) / std for key in ("obs", "next_obs"))
        a, a2 = data["actions"][b], policy(agent.target_actor, s2)
        smaller = min(q(qf, s2, a2) for qf in target)
        y = data["rewards"][b] + args.gamma * (1 - data["terminations"][b]) * smaller
        sampled = [(2 * x - 1, -ACTION_DIM * np.log(2)) for x in uniform[g, b].numpy()]
        for its_s, its_noise in zip((s, s2), noise, strict=False):
            for x in its_noise[g, b].numpy():
                scale = args.penalty_noise
                action = np.clip(policy(agent.actor, its_s) + scale * x, -1, 1)
                density = np.exp(-0.5 * x**2) / (scale * np.sqrt(2 * np.pi))
                sampled.append((action, np.log(density).sum()))
        for qf, its_errors, its_gaps in zip(live, errors, gaps, strict=True):
            its_errors.append((q(qf, s, a) - y) ** 2)
            its_gaps.append(np.log(sum(np.exp(q(qf, s, x) - d) for x, d in sampled)) - q(qf, s, a))
        pi = policy(agent.actor, s)
        own_q.append(q(live[0], s, pi))
        regression.append(np.mean((pi - best[g, b].double().numpy()) ** 2))
    c, errors, gaps = agent.coefficient, np.mean(errors, 1), np.mean(gaps, 1)
    losses = {
        "losses/qf1_loss": errors[0],
        "losses/qf2_loss": errors[1],
        "losses/conservative_gap": np.mean(gaps),
        "losses/regression_loss": np.mean(regression),
        "losses/actor_loss": c * np.mean(regression) - (1 - c) * np.mean(own_q),
    }
    return losses, [losses["losses/actor_loss"], *(errors + agent.cql_alpha * gaps)]


@pytest.mark.parametrize("penalise_policy", [False, True])
def test_losses_and_gradients_equal_a_brute_force_without_batches(monkeypatch, penalise_policy):
    torch.manual_seed(0)
    args = Args(hidden_size=16, tau=0.0, omar_coefficient=0.7, cql_alpha=3.0)
    args.actor_learning_rate = args.critic_learning_rate = 0.0
    args.penalise_policy, args.penalty_noise, args.num_penalty_actions = penalise_policy, 0.4, 3
    agent, groups = OMAR(3, OBS_DIM, ACTION_DIM, args).double(), range(3)
    set_scales(agent)
    agent.unit.fill_(3.0)
    with torch.no_grad():
        for p in agent.target.parameters():  # of their own: a live network in their place shows
            p += 0.1 * torch.randn_like(p)
    batch = {key: value.double() for key, value in random_batch(3, size=8).items()}
    uniform, noise, best = [], [], []
    draw_uniform, draw_normal, find = torch.rand_like, torch.randn, OMAR.best_actions

    def kept_uniform(x):
        uniform.append(draw_uniform(x))
        return uniform[-1]

    def kept_normal(*shape, **kwargs):
        noise.append(draw_normal(*shape, dtype=torch.float64))
        return noise[-1]

    def kept_best(*args):
        found = find(*args)
        best.append(found[0])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand_like", kept_uniform)
        patch.setattr(torch, "randn", kept_normal)
        patch.setattr(OMAR, "best_actions", kept_best)
        losses = agent.update(batch)
    noise = noise[:2] if penalise_policy else []  # what follows is the sampler's
    hand = (agent, batch, uniform[0], noise, best[0])
    for g in groups:
        for name, value in losses_by_hand(*hand, g)[0].items():
            assert losses[name][g].item() == pytest.approx(value, rel=1e-8), name

    for number, part in enumerate((agent.actor, *twins(agent))):
        parameters = list(part.parameters())
        for g in groups:
            direction = [torch.zeros_like(p) for p in parameters]
            for d in direction:
                d[g] = torch.randn_like(d[g])

            def loss(number=number, g=g):
                return losses_by_hand(*hand, g)[1][number]

            slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))
            expected = central_difference(parameters, direction, loss)
            assert slope.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def actors_gradient(coefficient, scale=1.0):
    torch.manual_seed(0)
    agent = OMAR(2, OBS_DIM, ACTION_DIM, Args(omar_coefficient=coefficient, cql_alpha=0.0))
    agent.args.critic_learning_rate = 0.0
    for group in agent.qf_optimizer.param_groups:
        group["lr"] = 0.0
    with torch.no_grad():
        for p in agent.qf.network[-1].parameters():
            p *= scale
    batch = random_batch(2)
    agent.best_actions = lambda obs, actions, own: (torch.full_like(own, 0.3), own[..., 0])
    agent.update(batch)
    return agent, batch, [p.grad.clone() for p in agent.actor.parameters()]


def test_coefficient_0_leaves_the_gradient_of_q_alone():
    agent, batch, gradient = actors_gradient(0.0)
    torch.manual_seed(0)
    fresh = OMAR(2, OBS_DIM, ACTION_DIM, Args())  # the same start
    loss = -fresh.qf.first(batch["obs"], fresh.actor(batch["obs"])).mean(1).sum()
    expected = torch.autograd.grad(loss, list(fresh.actor.parameters()))
    torch.testing.assert_close(gradient, list(expected))


def test_coefficient_1_leaves_no_gradient_of_q():
    _, batch, gradient = actors_gradient(1.0)
    *_, scaled = actors_gradient(1.0, scale=100.0)
    torch.manual_seed(0)
    fresh = OMAR(2, OBS_DIM, ACTION_DIM, Args())
    loss = (fresh.actor(batch["obs"]) - 0.3).square().mean((1, 2)).sum()
    expected = torch.autograd.grad(loss, list(fresh.actor.parameters()))
    torch.testing.assert_close(gradient, list(expected))
    torch.testing.assert_close(gradient, scaled)


def test_coefficients_are_the_published_ones_of_a_known_data_set_unless_given():
    def of(**options):
        agent = OMAR(1, 2, 2, Args(**options))
        return agent.coefficient, agent.cql_alpha

    assert of(env="simple-tag-medium") == COEFFICIENTS["simple-tag-medium"] == (0.7, 5.0)
    assert of(env="simple-tag-medium", omar_coefficient=0.0) == (0.0, 5.0)
    assert of(env="simple-tag-medium", cql_alpha=0.0) == (0.7, 0.0)
    assert of(env="halfcheetah-medium") == (0.7, 1.0)


# --- Centralised critics ---


def centralised(team_size=3, seeds=2, **options):
    torch.manual_seed(0)
    args = Args(critic="centralised", num_seeds=seeds, hidden_size=16, **options)
    return OMAR(team_size * seeds, OBS_DIM, ACTION_DIM, args)


def test_a_team_acts_with_everyones_own_policy():
    agent = centralised()
    obs = torch.randn(6, 5, 3, OBS_DIM)
    found = agent.team_actions(agent.actor, obs)
    for g in range(6):
        for k in range(3):
            its_policy = g // 3 * 3 + (g + k) % 3
            everywhere = obs[g, :, k].expand(6, -1, -1)
            expected = agent.actor(everywhere)[its_policy]
            torch.testing.assert_close(found[g, :, k], expected)


def test_centralised_critics_see_the_team_and_keep_seeds_apart():
    replay = Replay(random_team(num_agents=3), 2, 1, 40)
    add_deployment(replay)
    index = replay.draw_merged(16)
    batch = replay.gather_team(index)
    ends = []
    for change in (None, "a teammate's action", "the other seed"):
        changed = {key: value.clone() for key, value in batch.items()}
        if change == "a teammate's action":  # what group 1's critic sees of agent 2
            changed["actions"][1, :, 1] *= -1
        if change == "the other seed":
            changed = {key: torch.cat([v[:3], v[3:] * 0.5]) for key, v in changed.items()}
        agent = centralised()
        torch.manual_seed(1)
        for _ in range(3):
            losses = agent.update(changed)
        assert all(loss.shape == (6,) and loss.isfinite().all() for loss in losses.values())
        ends.append([p.detach() for p in twins(agent)[0].parameters()])
    same, teammate, other_seed = ends
    assert all(torch.equal(a[:3], b[:3]) for a, b in zip(same, other_seed, strict=True))
    assert any(not torch.equal(a[3:], b[3:]) for a, b in zip(same, other_seed, strict=True))
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(same, teammate, strict=True))


def test_a_centralised_critic_of_one_agent_is_an_independent_one():
    replay = Replay(random_team(num_agents=1), 2, 0, 1)
    ends = []
    for critic in ("independent", "centralised"):
        torch.manual_seed(0)
        agent = OMAR(2, OBS_DIM, ACTION_DIM, Args(critic=critic, num_seeds=2, hidden_size=16))
        for _ in range(3):
            index = replay.draw_offline(16)
            gather = replay.gather if critic == "independent" else replay.gather_team
            agent.update(gather(index))
        ends.append([p.detach() for p in agent.parameters()])
    torch.testing.assert_close(*ends)


def test_a_centralised_critic_has_no_value_of_one_agent():
    agent = centralised()
    obs, actions = torch.randn(6, 4, OBS_DIM), torch.randn(6, 4, ACTION_DIM)
    assert agent.q_value(obs, actions).isnan().all() and agent.value(obs).shape == (6, 4)


# --- Tasks with a known solution ---


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_a_linear_quadratic_task_is_solved_with_the_best_gain(coefficient):
    """By the gradient of Q, and by the sampler alone."""
    torch.manual_seed(0)
    args = Args(omar_coefficient=coefficient, cql_alpha=0.0, gamma=0.9, tau=0.1)
    args.critic_learning_rate = args.actor_learning_rate = 5e-3
    agent = OMAR(2, 1, 1, args)
    assert (linear_quadratic_error(agent, 800, 150) < 0.08).all()


def test_the_penalty_keeps_the_policy_where_the_data_is():
    """Reward a, data in [-1, 0]: without the penalty the critics extrapolate and the policy goes to
    1; with it, it stays near the best action that the data holds."""
    chosen = []
    for cql_alpha in (0.0, 5.0):
        torch.manual_seed(0)
        args = Args(omar_coefficient=0.0, cql_alpha=cql_alpha, hidden_size=32)
        args.critic_learning_rate = args.actor_learning_rate = 3e-3
        agent = OMAR(1, 1, 1, args)
        for _ in range(500):
            obs, actions = torch.randn(1, 128, 1), -torch.rand(1, 128, 1)
            batch = {"obs": obs, "actions": actions, "rewards": actions.squeeze(2)}
            agent.update(batch | {"next_obs": obs, "terminations": torch.ones(1, 128)})
        chosen.append(agent.act(torch.zeros(1, 1, 1)).item())
    assert chosen[0] > 0.9 and -0.6 < chosen[1] < 0.2, chosen
    assert math.isfinite(chosen[1])


def test_critics_learn_in_units_of_the_rewards_spread():
    """With the default unit a first step moves Q in proportion to the rewards' unit."""
    moved = {}
    for value_unit in (None, 1.0):
        for unit in (1.0, 50.0):
            torch.manual_seed(0)
            team = random_team()
            team.rewards *= unit
            replay = Replay(team, 1, 0, 1)
            agent = OMAR(2, OBS_DIM, ACTION_DIM, Args(cql_alpha=0.0, value_unit=value_unit))
            agent.measure_scales(replay)
            probe = torch.ones(2, 1, OBS_DIM), torch.zeros(2, 1, ACTION_DIM)
            before = agent.q_value(*probe)
            losses = agent.update(replay.gather(replay.draw_offline(32)))
            moved[value_unit, unit] = (agent.q_value(*probe) - before).abs().max().item()
            if value_unit is None:  # the loss itself stays one in the rewards' own unit
                loss = losses["losses/qf1_loss"] / unit**2
                moved["loss", unit] = loss
    assert moved[None, 50.0] == pytest.approx(50 * moved[None, 1.0], rel=0.1)
    torch.testing.assert_close(moved["loss", 50.0], moved["loss", 1.0], rtol=0.01, atol=0)
    assert moved[1.0, 50.0] < 3 * moved[1.0, 1.0]
