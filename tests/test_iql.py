"""IQL, MAIQL and MATD3+BC against closed forms and brute force."""

import copy

import numpy as np
import pytest
import torch

from bc import BC
from bc import Args as BCArgs
from common.nets import GaussianPolicy, SoftmaxPolicy, clipped, joint
from common.replay import Replay
from iql import IQL
from iql import Args as IQLArgs
from maiql import MAIQL
from maiql import Args as MAIQLArgs
from matd3bc import MATD3BC
from matd3bc import Args as MATD3BCArgs
from tests.helpers import (
    ACTION_DIM,
    OBS_DIM,
    by_group,
    plain_mlp,
    random_batch,
    random_team,
    set_scales,
    twins,
)

# --- Policies ---


def test_a_gaussians_density_integrates_to_one_and_peaks_at_its_mode():
    torch.manual_seed(0)
    policy = GaussianPolicy(2, OBS_DIM, 1, 16)
    obs = torch.randn(2, 1, OBS_DIM).expand(-1, 40_001, -1)
    line = torch.linspace(-8, 8, 40_001).view(1, -1, 1).expand(2, -1, -1)
    with torch.no_grad():
        density = policy.log_prob(obs, line).exp()
    np.testing.assert_allclose(density.sum(1) * 16 / 40_000, 1, atol=1e-3)
    peak = line[0, density.argmax(1), 0]
    np.testing.assert_allclose(peak, policy.mode(obs)[:, 0, 0].detach(), atol=1e-3)


def test_a_softmax_is_over_the_legal_actions():
    torch.manual_seed(0)
    policy = SoftmaxPolicy(1, OBS_DIM, 3, 16)
    obs = torch.randn(1, 5, OBS_DIM)
    legal = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]]).bool()[None]
    each = torch.eye(3).view(3, 1, 1, 3).expand(-1, 1, 5, -1)
    p = torch.stack([policy.log_prob(obs, a, legal).exp() for a in each])  # (3, 1, 5)
    assert (p[:, 0].T[:4][~legal[0, :4]] == 0).all()
    torch.testing.assert_close(p.sum(0)[0, :4], torch.ones(4))
    mode = policy.mode(obs, legal)
    assert (mode <= legal).all() and mode.sum(2)[0].tolist() == [1, 1, 1, 1, 0]


def test_clones_recover_a_gaussians_mean_and_std():
    torch.manual_seed(0)
    agent = BC(2, 1, 1, BCArgs(hidden_size=32, learning_rate=1e-2))
    slope, std = torch.tensor([0.5, -0.3]).view(2, 1, 1), torch.tensor([0.1, 0.3]).view(2, 1, 1)
    for _ in range(400):
        obs = torch.rand(2, 256, 1) * 2 - 1
        actions = slope * obs + std * torch.randn(2, 256, 1)
        agent.update({"obs": obs, "actions": actions})
    obs = torch.linspace(-0.8, 0.8, 9).view(1, 9, 1).expand(2, -1, -1)
    mean, log_std = agent.actor(obs)
    torch.testing.assert_close(mean, slope * obs, atol=0.04, rtol=0)
    torch.testing.assert_close(log_std.exp(), std.expand(-1, 9, -1), atol=0, rtol=0.25)


# --- IQL ---


def expectile(values, tau):
    """The minimiser of the mean of |tau - 1[u < 0]| u^2, u = values - v, by bisection."""
    low, high = values.min(), values.max()
    for _ in range(100):
        v = (low + high) / 2
        u = values - v
        low, high = (v, high) if (np.where(u < 0, 1 - tau, tau) * u).sum() > 0 else (low, v)
    return v


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.95])
def test_v_becomes_the_expectile_and_weights_are_exp_of_the_advantage(tau):
    """One state, five actions with known Q, every episode of one step."""
    torch.manual_seed(0)
    args = IQLArgs(expectile=tau, hidden_size=16, learning_rate=1e-2, tau=0.05, weight_max=5.0)
    agent = IQL(1, 1, 1, args)
    paid = np.array([0.0, 0.1, 0.3, 0.8, 1.0])
    at = torch.linspace(-1, 1, 5).repeat(50).view(1, -1, 1)
    rewards = torch.as_tensor(paid, dtype=torch.float32).repeat(50).view(1, -1)
    batch = {"obs": torch.zeros_like(at), "next_obs": torch.zeros_like(at), "actions": at}
    batch |= {"rewards": rewards, "terminations": torch.ones_like(rewards)}
    for _ in range(500):
        losses = agent.update(batch)
    expected = expectile(paid, tau)
    assert agent.value(torch.zeros(1, 1, 1)).item() == pytest.approx(expected, abs=0.02)
    weights = np.minimum(np.exp(3 * (paid - expected)), 5.0)
    assert losses["losses/mean_weight"].item() == pytest.approx(weights.mean(), rel=0.05)
    # A weighted clone of one state: the policy's mean is the weighted mean of the actions
    mean = (weights * np.linspace(-1, 1, 5)).sum() / weights.sum()
    assert agent.act(torch.zeros(1, 1, 1)).item() == pytest.approx(mean, abs=0.05)


def test_maiql_of_one_agent_whose_mixers_pass_values_on_is_iql():
    torch.manual_seed(0)
    options = {"hidden_size": 16, "num_seeds": 2}
    one = IQL(2, OBS_DIM, ACTION_DIM, IQLArgs(**options))
    team = MAIQL(2, OBS_DIM, ACTION_DIM, MAIQLArgs(max_grad_norm=1e9, **options))
    set_scales(one)
    for name in ("obs_mean", "obs_std"):
        getattr(team, name).copy_(getattr(one, name))
    team.actor.load_state_dict(one.actor.state_dict())
    team.vf.network.load_state_dict(one.vf.network.state_dict())
    for mine in (team.qf, team.target_qf):
        for its, theirs in zip((mine.qf1, mine.qf2), twins(one), strict=True):
            its.load_state_dict(theirs.state_dict())
    passing = torch.tensor([1.0, 0.0])  # weight 1, bias 0
    for module in (team.vf, team.qf, team.target_qf):
        module.mixer.forward = lambda values, seen: passing[0] * values + passing[1] * seen.sum(2)
        for parameter in module.mixer.parameters():
            parameter.requires_grad_(False)
    for optimizer, module in ((team.vf_optimizer, team.vf), (team.qf_optimizer, team.qf)):
        live = [p for p in module.parameters() if p.requires_grad]
        optimizer.param_groups[0]["params"] = live
    for number in range(5):
        batch = random_batch(2, seed=number)
        ours, expected = team.update(batch), one.update(batch)
        for tag in expected:
            torch.testing.assert_close(ours[tag], expected[tag], msg=tag)
    torch.testing.assert_close(list(team.actor.parameters()), list(one.actor.parameters()))


def test_maiqls_losses_equal_a_loop_in_float64():
    """Two seeds of three agents: mixing, the smaller of the mixed critics, one weight per team."""
    S, N = 2, 3
    args = MAIQLArgs(hidden_size=8, num_seeds=S, learning_rate=0.0, weight_max=2.0, tau=0.0)
    torch.manual_seed(0)
    agent = MAIQL(S * N, OBS_DIM, ACTION_DIM, args)
    agent.target_qf.load_state_dict(MAIQL(S * N, OBS_DIM, ACTION_DIM, args).qf.state_dict())
    agent.double()
    replay = Replay(random_team(num_agents=N), S, 0, 1)
    batch = replay.gather_teams(replay.draw_teams(7))
    batch = {k: v.double() for k, v in batch.items()}
    assert all(torch.equal(batch["rewards"][0], batch["rewards"][g]) for g in range(N))
    losses = agent.update(batch)

    def team_value(networks, mixer, s, inputs):
        seen = np.concatenate(inputs)
        out = plain_mlp(mixer.network, seen, s)
        values = [plain_mlp(networks, x, s * N + i)[0] for i, x in enumerate(inputs[:N])]
        return sum(w * v for w, v in zip(out[:N], values, strict=True)) + out[N]

    for s in range(S):
        vf_losses, q_losses, weights = [], [], []
        for b in range(7):
            o, o2, a = (
                [batch[k][s * N + i, b].numpy() for i in range(N)]
                for k in ("obs", "next_obs", "actions")
            )
            pairs = [np.concatenate(pair) for pair in zip(o, a, strict=True)]
            v, v2 = (team_value(agent.vf.network, agent.vf.mixer, s, x) for x in (o, o2))
            old = [
                team_value(qf.network, agent.target_qf.mixer, s, pairs)
                for qf in (agent.target_qf.qf1, agent.target_qf.qf2)
            ]
            advantage = min(old) - v
            vf_losses.append((0.7 if advantage > 0 else 0.3) * advantage**2)
            weights.append(min(np.exp(3 * advantage), 2.0))
            r, end = batch["rewards"][s * N, b].item(), batch["terminations"][s * N, b].item()
            y = r + 0.99 * (1 - end) * v2
            q1 = team_value(agent.qf.qf1.network, agent.qf.mixer, s, pairs)
            q_losses.append((q1 - y) ** 2)
        for i in range(N):
            g = s * N + i
            assert losses["losses/vf_loss"][g].item() == pytest.approx(np.mean(vf_losses))
            assert losses["losses/qf1_loss"][g].item() == pytest.approx(np.mean(q_losses))
            log_prob = agent.actor.log_prob(agent.scaled(batch["obs"]), batch["actions"])[g]
            expected = -(np.array(weights) * log_prob.detach().numpy()).mean()
            assert losses["losses/actor_loss"][g].item() == pytest.approx(expected)


def test_a_seeds_team_learns_in_the_stack_as_it_does_alone():
    """Two agents per team; the other seed's data is larger by far, which clipping would show."""
    for kind, args_type in ((MAIQL, MAIQLArgs), (MATD3BC, MATD3BCArgs)):
        options = {"hidden_size": 8}
        if kind is MATD3BC:
            options["policy_noise"] = 0.0
        torch.manual_seed(0)
        both = kind(4, OBS_DIM, ACTION_DIM, args_type(num_seeds=2, **options)).double()
        alone = kind(2, OBS_DIM, ACTION_DIM, args_type(num_seeds=1, **options)).double()
        pairs = [
            (one, by_group(name, many.detach(), 2)[1])
            for one, (name, many) in zip(alone.parameters(), both.named_parameters(), strict=True)
        ]
        with torch.no_grad():
            for one, many in pairs:
                one.copy_(many)
        for number in range(1, 7):
            batch = {k: v.double() for k, v in random_batch(4, seed=number).items()}
            batch["rewards"][:2] *= 100
            turn = (number % 2 == 0,) if kind is MATD3BC else ()
            both.update(batch, *turn)
            alone.update({k: v[2:] for k, v in batch.items()}, *turn)
        for one, many in pairs:
            torch.testing.assert_close(one.detach(), many, rtol=1e-9, atol=1e-12)


def test_gradients_are_shortened_per_team():
    torch.manual_seed(0)
    gradients = (torch.randn(4, 3, 2), torch.randn(2, 5))  # two teams of two agents, and a mixer
    gradients[0][:2] *= 100
    found = clipped(gradients, 2, 1.0)
    for s in range(2):
        own = torch.cat([gradients[0][2 * s : 2 * s + 2].flatten(), gradients[1][s]])
        got = torch.cat([found[0][2 * s : 2 * s + 2].flatten(), found[1][s]])
        torch.testing.assert_close(got, own / own.norm())
    small = tuple(1e-3 * g for g in gradients[1:])
    torch.testing.assert_close(clipped(small, 2, 1.0), list(small))


# --- MATD3+BC ---


def test_matd3bcs_losses_equal_a_loop_in_float64():
    S, N, alpha = 2, 3, 2.5
    args = MATD3BCArgs(hidden_size=8, num_seeds=S, policy_noise=0.0, tau=0.0)
    torch.manual_seed(0)
    agent = MATD3BC(S * N, OBS_DIM, ACTION_DIM, args).double()
    replay = Replay(random_team(num_agents=N), S, 0, 1)
    batch = replay.gather_teams(replay.draw_teams(7))
    batch = {k: v.double() for k, v in batch.items()}
    before = copy.deepcopy(agent)
    losses = agent.update(batch, True)

    def policy(x, g):
        return np.tanh(plain_mlp(before.actor.network, x, g))

    for s in range(S):
        errors, q_own = [], np.zeros((N, 7))
        for b in range(7):
            o, o2, a = (
                [batch[k][s * N + i, b].numpy() for i in range(N)]
                for k in ("obs", "next_obs", "actions")
            )
            following = [policy(x, s * N + i) for i, x in enumerate(o2)]
            q2 = min(
                plain_mlp(qf.network, np.concatenate([*o2, *following]), s)[0]
                for qf in twins(before, "target_qf")
            )
            r, end = batch["rewards"][s * N, b].item(), batch["terminations"][s * N, b].item()
            y = r + 0.99 * (1 - end) * q2
            q1 = plain_mlp(before.qf.network, np.concatenate([*o, *a]), s)[0]
            errors.append((q1 - y) ** 2)
            for i in range(N):  # by the critics after their step
                changed = [policy(x, s * N + j) if i == j else a[j] for j, x in enumerate(o)]
                q_own[i, b] = plain_mlp(agent.qf.network, np.concatenate([*o, *changed]), s)[0]
        for i in range(N):
            g = s * N + i
            assert losses["losses/qf1_loss"][g].item() == pytest.approx(np.mean(errors))
            own = np.stack([policy(x.numpy(), g) for x in batch["obs"][g]])
            cloning = ((own - batch["actions"][g].numpy()) ** 2).mean()
            expected = -alpha * q_own[i].mean() / np.abs(q_own[i]).mean() + cloning
            assert losses["losses/actor_loss"][g].item() == pytest.approx(expected)


# --- Transitions of teams ---


def test_the_agents_of_a_seed_get_the_same_transitions_with_their_own_actions():
    team = random_team(num_agents=3)
    replay = Replay(team, 2, 0, 1)
    torch.manual_seed(0)
    index = replay.draw_teams(50)
    batch = replay.gather_teams(index)
    assert not torch.equal(index[0], index[3])
    for g in range(6):
        rows = index[g]
        assert torch.equal(rows, index[g // 3 * 3])
        np.testing.assert_array_equal(batch["actions"][g], team.actions[rows, g % 3])
        np.testing.assert_array_equal(batch["obs"][g], team.obs[rows, 0])
        np.testing.assert_array_equal(batch["rewards"][g], team.rewards[rows])
    seen = joint(batch["actions"], 3)
    np.testing.assert_array_equal(seen[1], team.actions[index[3]].reshape(50, -1))
