"""MOMA-PPO, against brute force, closed forms and worlds that are known."""

import csv
import math

import numpy as np
import pytest
import torch

import moma_ppo
from benchmarks import model_error
from common import checkpoints, cli, loop
from common.datasets import load
from common.datasets.team import TeamDataset
from common.envs import make_vec
from common.nets import joint
from common.replay import Replay
from common.world_model import first_copies
from moma_ppo import MOMAPPO, Args, advantages_and_returns, covariance_norm, push
from tests.helpers import Watch, only, plain_mlp, random_team, run, tiny
from tests.test_learners import addresses
from tests.tiny_task import ENV
from tools import render

SMALL = {"hidden_size": 8, "model_hidden_size": 8, "memory_size": 8, "num_models": 3}
SMALL |= {"num_elites": 3, "history": 3, "rollout_length": 4}


def made(G=4, obs_dim=5, action_dim=2, **options):
    torch.manual_seed(0)
    options = SMALL | {"num_seeds": G // 2} | options
    return MOMAPPO(G, obs_dim, action_dim, Args(**options), options.get("discrete", False))


# --- The world model ---


def linear_world(n=4000, seed=0):
    """One agent, s' = A s + B a + noise, a linear reward; it ends where s_0 > 1."""
    random = np.random.default_rng(seed)
    A, B = np.array([[0.9, 0.2], [-0.1, 0.8]]), np.array([[0.3], [0.5]])
    std = np.array([0.05, 0.2])
    obs, actions = random.uniform(-1.5, 1.5, (n, 2)), random.uniform(-1, 1, (n, 1))
    next_obs = obs @ A.T + actions @ B.T + std * random.normal(size=(n, 2))
    rewards = obs @ [1.0, -2.0] + 3 * actions[:, 0] + 0.1 * random.normal(size=n)
    team = TeamDataset(
        obs=obs[:, None].astype(np.float32),
        actions=actions[:, None].astype(np.float32),
        rewards=rewards.astype(np.float32),
        next_obs=next_obs[:, None].astype(np.float32),
        terminations=obs[:, 0] > 1,
        truncations=np.zeros(n, bool),
        source="a linear world",
    )
    return team, A, B, std


@pytest.fixture(scope="module")
def fitted():
    """A model of the linear world, as `fit` and `rank` train it."""
    team, *world = linear_world()
    args = Args(num_models=3, num_elites=2, model_hidden_size=32, batch_size=128)
    args.model_learning_rate = 3e-3
    torch.manual_seed(0)
    agent, replay = MOMAPPO(1, 2, 1, args), Replay(team, 1, 0, 1)
    agent.measure_scales(replay)
    for _ in range(600):
        agent.fit(replay.gather_teams(replay.draw_teams(3 * 128)))
    losses = agent.rank(replay.gather_teams(replay.draw_teams(1000)))
    return agent, losses, world


def test_the_world_model_recovers_a_linear_gaussian_system(fitted):
    agent, losses, (A, B, std) = fitted
    state, actions = torch.rand(1, 500, 2) * 2 - 1, torch.rand(1, 500, 1) * 2 - 1
    with torch.no_grad():
        mean, variance, goes_on = agent.model.expect(state, actions, torch.tensor([[0, 1, 2]]))
    change = state @ torch.tensor(A.T - np.eye(2)).float() + actions @ torch.tensor(B.T).float()
    reward = state @ torch.tensor([1.0, -2.0]) + 3 * actions[..., 0]
    error = (mean.mean(1)[..., :2] - change).square().mean((0, 1)).sqrt()
    assert (error < 0.06).all(), error
    assert (mean.mean(1)[..., 2] - reward).abs().mean() < 0.15
    predicted = variance.sqrt().mean((0, 1, 2))
    np.testing.assert_allclose(predicted, [*std, 0.1], rtol=0.5)
    clear = (state[..., 0] - 1).abs() > 0.15
    ends = (goes_on.mean(1) < 0.5)[clear]
    assert (ends == (state[..., 0] > 1)[clear]).float().mean() > 0.97
    # what noise alone explains: 0.05 and 0.2 over the changes' deviations
    assert losses["losses/model_error"].item() < 0.6


def test_members_disagree_away_from_the_data(fitted):
    agent = fitted[0]
    actions = torch.rand(1, 400, 1) * 2 - 1
    near = torch.rand(1, 400, 2) * 2 - 1
    norms = [
        covariance_norm(agent.model.expect(scale * near, actions, torch.tensor([[0, 1, 2]]))[0])
        for scale in (1, 4, 10)
    ]
    means = [norm.mean().item() for norm in norms]
    assert means[1] > 3 * means[0] and means[2] > 3 * means[1], means


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_loss_is_the_gaussians_and_bernoullis(beta):
    """Member by member in float64, each on its own part of the batch."""
    agent = made(2, num_models=3, model_beta=beta).double()
    model = agent.model
    replay = Replay(random_team(num_agents=2), 1, 0, 1)
    agent.measure_scales(replay)
    batch = {k: v.double() for k, v in replay.gather_teams(replay.draw_teams(12)).items()}
    found = model.losses(batch)
    assert model.predicted.tolist() == [1.0] * 5 + [0.0] * 5 + [1.0]  # both see the same
    for m in range(3):
        nlls, reward_nlls, crosses = [], [], []
        for b in range(4 * m, 4 * m + 4):
            o, o2 = batch["obs"][0, b].numpy(), batch["next_obs"][0, b].numpy()
            x = (np.tile(o, 2) - model.mean.numpy()) / model.std.numpy()
            x[5:] = 0
            a = batch["actions"][:, b].flatten().numpy()
            out = plain_mlp(model.network, np.concatenate([x, a]), m)
            mean, log_std = out[:11], 8 / (1 + np.exp(-out[11:22])) - 6
            target = np.append(np.tile(o2 - o, 2), batch["rewards"][0, b].item())
            target = (target - model.change_mean.numpy()) / model.change_std.numpy()
            nll = log_std + 0.5 * ((target - mean) / np.exp(log_std)) ** 2
            nll *= np.exp(2 * beta * log_std)
            nlls.append(nll[:5].mean())
            reward_nlls.append(nll[10])
            end = batch["terminations"][0, b].item()
            crosses.append(np.log1p(np.exp(-out[22])) + end * out[22])
        for values, loss in zip((nlls, reward_nlls, crosses), found, strict=True):
            assert loss[0, m].item() == pytest.approx(np.mean(values), rel=1e-6)


def test_copies_and_constants_are_found():
    torch.manual_seed(0)
    obs, next_obs = torch.randn(2, 50, 3), torch.randn(2, 50, 3)
    for x in (obs, next_obs):
        x[1, :, 0] = x[0, :, 2]  # agent 1's first entry is agent 0's last
        x[1, :, 2] = 7.0
        x[0, :, 1] = x[0, :, 0]
    next_obs[0, 3, 1] += 1  # but not always
    assert first_copies(obs, next_obs).tolist() == [[0, 1, 2], [2, 4, 5]]


def test_the_covariances_norm_against_numpy_and_in_closed_form():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    found = covariance_norm(x)
    for s in range(2):
        for b in range(3):
            expected = np.linalg.norm(np.cov(x[s, :, b].numpy().T))
            assert found[s, b].item() == pytest.approx(expected)
    # One of E members away by delta: |delta|^2 / E, and n times that with n copies of the state
    for E in (2, 5):
        delta = torch.tensor([3.0, 4.0])
        members = torch.zeros(1, E, 1, 2)
        members[0, 2 % E, 0] = delta
        assert covariance_norm(members).item() == pytest.approx(25 / E)
        assert covariance_norm(members.repeat(1, 1, 1, 3)).item() == pytest.approx(3 * 25 / E)


# --- Imagined steps ---


def pretend(agent, changes, goes_on=1.0, variance=0.0):
    """Let the members expect `changes` (E, state_dim + 1) everywhere."""
    changes = torch.as_tensor(changes, dtype=torch.float32)

    def expect(state, actions, members):
        shape = (len(state), len(changes), state.shape[1], changes.shape[1])
        mean = changes.view(1, len(changes), 1, -1).expand(shape)
        return mean, torch.full(shape, variance), torch.full(shape[:3], goes_on)

    agent.model.expect = expect


def test_states_and_rewards_stay_in_the_box_and_penalties_come_after():
    agent = made(2, obs_dim=1, action_dim=1)
    model = agent.model
    model.low.copy_(torch.tensor([-1.0, -2.0, -3.0]))
    model.high.copy_(torch.tensor([1.0, 2.0, 3.0]))
    pretend(agent, [[1e6, -1e6, 1e6], [1e6, -1e6, 1e6], [1e6, -1e6, 1e6 + 3]], variance=9.0)
    state, actions = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
    for coefficients in ((0.1, 0.05, 0.0), (1.0, 0.0, 0.0), (0.0, 2.0, 0.5)):
        agent.args.uncertainty_penalty, agent.args.reward_penalty = coefficients[:2]
        agent.args.aleatoric_penalty = coefficients[2]
        following, reward, goes_on, uncertainty, penalty = agent.imagined_step(state, actions)
        assert following[0, 0].tolist() == [1.0, -2.0] and goes_on.all()
        # covariance: 3 for the reward alone; its variance 3; both at most 2, and so is |(9, 9, 9)|
        np.testing.assert_allclose(uncertainty, 3.0, rtol=0.05)
        expected = 2 * sum(coefficients)
        np.testing.assert_allclose(penalty, expected, rtol=1e-5)
        np.testing.assert_allclose(reward, 3.0 - expected, rtol=1e-5)
    agent.args.box = False
    assert agent.imagined_step(state, actions)[0].abs().min() > 1e5


def test_copies_of_an_entry_move_together_and_constants_stay():
    team = random_team(num_agents=2)
    both = np.repeat(team.obs, 2, axis=1), np.repeat(team.next_obs, 2, axis=1)
    for x in both:
        x[:, 1, 0], x[:, 1, 1], x[:, 1, 3] = x[:, 0, 4], 5.0, x[:, 0, 0] * 2
    team.obs, team.next_obs = both
    replay, agent = Replay(team, 1, 0, 1), made(2)
    agent.measure_scales(replay)
    assert agent.model.source.tolist() == [0, 1, 2, 3, 4, 4, 6, 2, 8, 4]
    assert agent.model.predicted.tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 1, 0, 1]
    batch = replay.gather_teams(replay.draw_teams(20))
    state, actions, *_ = agent.model.transitions(batch)
    following = agent.imagined_step(state, actions)[0][0]
    assert (following[:, 6] == 5).all() and torch.equal(following[:, 5], following[:, 4])
    assert torch.equal(following[:, 7], following[:, 2]) and (following != state[0]).any()


def rolled(agent, n=8, **rows):
    G, (obs, actions) = len(agent.obs_mean), (agent.obs_mean.shape[2], agent.action_dim)
    torch.manual_seed(1)
    batch = {"obs": torch.randn(G, n, obs)}
    history = {"obs": torch.randn(G, n, 3, obs), "actions": torch.rand(G, n, 3, actions)}
    batch["history"] = history | {"is_there": torch.ones(G, n, 3)}
    return batch, agent.imagine(batch | rows)


@pytest.mark.parametrize("cuts", [True, False])
def test_rollouts_are_cut_where_members_disagree_and_begin_anew(cuts):
    """Members apart by delta: |delta|^2 / 2 for two of them, 1.9 or 2.1."""
    agent = made(2, obs_dim=1, action_dim=1, num_models=2, num_elites=2)
    batch, rollouts = rolled(agent)
    distance = math.sqrt(2 * (2.1 if cuts else 1.9))
    pretend(agent, [[1.0, 2.0, 0.0], [1.0 + distance, 2.0, 0.0]])
    batch, rollouts = rolled(agent)
    assert rollouts["is_cut"][:, :3].eq(float(cuts)).all() and (rollouts["is_cut"][:, 3] == 1).all()
    begins = batch["obs"].unflatten(1, (4, 2))
    for t in range(1, 4):
        previous = rollouts["next_obs"][:, t - 1]
        expected = begins[:, t] if cuts else previous
        torch.testing.assert_close(rollouts["obs"][:, t], expected)
        frames = rollouts["frames"][:, t]
        if cuts:
            torch.testing.assert_close(
                frames[..., :1], batch["history"]["obs"][:, 2 * t : 2 * t + 2]
            )
        else:
            torch.testing.assert_close(frames, rollouts["next_frames"][:, t - 1])
    agent.args.early_termination = False  # as in the released code
    assert (rolled(agent)[1]["is_cut"][:, :3] == 0).all()


@pytest.mark.parametrize(("length", "cuts", "share"), [(1, 1, 0), (4, 1, 1), (4, 0, 0), (3, 0, 0)])
def test_the_last_step_is_no_cut_and_whole_rollouts_make_a_minibatch(length, cuts, share):
    """Of rollouts of 3 steps 6 rows of 8 are left, less than the minibatch of 8."""
    options = {"rollout_length": length, "transitions": 8, "minibatch_size": 8}
    agent = made(2, obs_dim=1, action_dim=1, num_models=2, num_elites=2, **options)
    distance = math.sqrt(2 * (2.1 if cuts else 1.9))
    pretend(agent, [[1.0, 2.0, 0.0], [1.0 + distance, 2.0, 0.0]])
    batch, _ = rolled(agent, 8 // length * length)
    assert (agent.improve(batch)["losses/cut_share"] == share).all()


def test_a_termination_begins_anew_without_a_cut_and_mistakes_of_actions_are_clipped():
    agent = made(2, obs_dim=1, action_dim=1)
    pretend(agent, [[1.0, 2.0, 0.5]] * 3, goes_on=0.2)
    batch, rollouts = rolled(agent)
    assert (rollouts["goes_on"] == 0).all() and (rollouts["is_cut"][:, :3] == 0).all()
    torch.testing.assert_close(rollouts["obs"], batch["obs"].unflatten(1, (4, 2)))
    assert (rollouts["rewards"] == 0.5).all()
    played = rollouts["next_frames"][:, :, :, -1, 1:]
    torch.testing.assert_close(played, rollouts["actions"].clamp(-1, 1))


def test_in_a_perfect_model_a_rollout_is_the_world_itself():
    """s' = 0.5 s + (own action, the other's): four steps equal the simulation."""
    agent = made(2, obs_dim=1, action_dim=1)

    def expect(state, actions, members):
        change = torch.cat([0.5 * state + actions - state, state.sum(2, keepdim=True)], dim=2)
        mean = change.unsqueeze(1).expand(-1, 3, -1, -1)
        return mean, torch.zeros_like(mean), torch.ones_like(mean[..., 0])

    agent.model.expect = expect
    batch, rollouts = rolled(agent)
    state = joint(batch["obs"].unflatten(1, (4, 2))[:, 0], 2)
    for t in range(4):
        torch.testing.assert_close(joint(rollouts["raw_obs"][:, t], 2), state)
        torch.testing.assert_close(rollouts["rewards"][:, t], state.sum(2))
        state = 0.5 * state + joint(rollouts["actions"][:, t].clamp(-1, 1), 2)


# --- Advantages ---


def test_advantages_and_returns_equal_a_loop():
    torch.manual_seed(0)
    rewards, values, next_values = torch.randn(3, 2, 6, 4, dtype=torch.float64)
    goes_on, is_cut = (torch.rand(2, 2, 6, 4) < 0.7).double()
    is_cut[:, -1] = 1
    found = advantages_and_returns(rewards, values, next_values, goes_on, is_cut, 0.9, 0.8)
    for s in range(2):
        for b in range(4):
            for t in range(6):
                advantage, factor, k = 0.0, 1.0, t
                result, discount = 0.0, 1.0
                while True:
                    r, v, v2, m, c = (
                        x[s, k, b].item() for x in (rewards, values, next_values, goes_on, is_cut)
                    )
                    advantage += factor * (r + 0.9 * m * v2 - v)
                    result += discount * r
                    if not m:
                        break
                    if c:
                        result += discount * 0.9 * v2
                        break
                    factor, discount, k = factor * 0.72, discount * 0.9, k + 1
                assert found[0][s, t, b].item() == pytest.approx(advantage)
                assert found[1][s, t, b].item() == pytest.approx(result)


def test_advantages_of_constant_rewards_are_geometric():
    zeros, ones = torch.zeros(1, 4, 1), torch.ones(1, 4, 1)
    advantages, returns = advantages_and_returns(
        ones, zeros, zeros, ones, torch.tensor([0.0, 0, 0, 1]).view(1, 4, 1), 0.9, 0.5
    )
    expected = [sum(0.45**k for k in range(n)) for n in (4, 3, 2, 1)]
    np.testing.assert_allclose(advantages.flatten(), expected, rtol=1e-6)
    expected = [sum(0.9**k for k in range(n)) for n in (4, 3, 2, 1)]
    np.testing.assert_allclose(returns.flatten(), expected, rtol=1e-6)


@pytest.mark.parametrize("box", [True, False])
def test_rollouts_are_cut_with_what_rewards_in_the_box_can_add_up_to(monkeypatch, box):
    """However large a value the networks give a state that nobody has left."""
    agent, seen = made(2, obs_dim=1, action_dim=1, gamma=0.9, box=box), []
    agent.threshold.fill_(3.0)
    agent.model.low[-1], agent.model.high[-1] = 1.0, 2.0
    agent.args.uncertainty_penalty, agent.args.reward_penalty = 0.5, 0.25

    def keep(rewards, values, next_values, *rest):
        seen.append(next_values)
        return advantages_and_returns(rewards, values, next_values, *rest)

    monkeypatch.setattr(moma_ppo, "advantages_and_returns", keep)
    for value in (1e9, -1e9, 7.0, -7.0):
        agent.team_value = lambda features, obs, value=value: torch.full((1, obs.shape[1]), value)
        agent.policy_step = lambda rows: {}
        batch, _ = rolled(agent)
        agent.improve(batch)
    found = [float(x.mean()) for x in seen]
    # At most 2 a step for ever; at least 1 less the penalty of 0.75 * 3
    bounds = [20.0, -12.5, 7.0, -7.0] if box else [1e9, -1e9, 7.0, -7.0]
    assert found == pytest.approx(bounds)


# --- The policies' step ---


def minibatch(agent, size=6):
    """Rows as `improve` makes them, by the present policies."""
    G, S = len(agent.obs_mean), agent.args.num_seeds
    torch.manual_seed(2)
    dims = agent.obs_mean.shape[2], agent.action_dim
    rows = {"obs": torch.randn(G, size, dims[0]), "frames": torch.randn(G, size, 3, sum(dims))}
    rows |= {"actions": torch.randn(G, size, dims[1]), "legal": torch.ones(G, size, dims[1]).bool()}
    rows |= {n: torch.randn(S, size) for n in ("advantages", "returns", "values")}
    rows = {n: x.to(agent.obs_mean.dtype) if x.is_floating_point() else x for n, x in rows.items()}
    with torch.no_grad():
        features = agent.features(rows["frames"], rows["obs"])
        log_prob = agent.actor.log_prob(features, rows["actions"]).unflatten(0, (S, -1)).sum(1)
    return rows | {"log_prob": log_prob}


def test_at_first_the_ratio_is_one_and_the_loss_minus_the_mean_advantage():
    agent = made(learning_rate=0.0)
    rows = minibatch(agent)
    measured = agent.policy_step(rows)
    torch.testing.assert_close(measured["actor_loss"], -rows["advantages"].mean(1))
    assert (measured["clip_share"] == 0).all()


def test_the_losses_equal_a_loop_with_one_ratio_per_team():
    agent = made(learning_rate=0.0).double()
    rows = minibatch(agent)
    old = rows["log_prob"] + 0.3 * torch.randn(2, 6, dtype=torch.float64)
    with torch.no_grad():
        features = agent.features(rows["frames"], rows["obs"])
        mean, log_std = agent.actor(features)
        values = agent.vf(features).squeeze(2)
    measured = agent.policy_step(rows | {"log_prob": old})
    for s in range(2):
        losses, near, far, entropies = [], [], [], ([], [])
        for b in range(6):
            log_prob = 0.0
            for g in (2 * s, 2 * s + 1):
                z = (rows["actions"][g, b] - mean[g, b]) / log_std[g, b].exp()
                density = -(0.5 * z**2 + log_std[g, b] + 0.5 * math.log(2 * math.pi))
                log_prob += density.sum().item()
            ratio = math.exp(log_prob - old[s, b].item())
            clipped = min(max(ratio, 0.8), 1.2)
            a = rows["advantages"][s, b].item()
            losses.append(-min(ratio * a, clipped * a))
            entropies[0].append(-ratio * log_prob)
            entropies[1].append(-clipped * log_prob)
            team = rows["obs"][2 * s : 2 * s + 2, b].flatten().numpy()
            w = plain_mlp(agent.mixer.network, team, s)
            v = w[0] * values[2 * s, b].item() + w[1] * values[2 * s + 1, b].item() + w[2]
            v_old, y = rows["values"][s, b].item(), rows["returns"][s, b].item()
            near.append((v_old + min(max(v - v_old, -0.2), 0.2) - y) ** 2)
            far.append((v - y) ** 2)
        entropy = min(np.mean(each) for each in entropies)
        assert measured["actor_loss"][s].item() == pytest.approx(np.mean(losses))
        assert measured["vf_loss"][s].item() == pytest.approx(max(np.mean(near), np.mean(far)))
        assert measured["entropy"][s].item() == pytest.approx(entropy)
        weight = max(0.0, 1e-3 * (-2 - entropy))
        assert measured["entropy_weight"][s].item() == pytest.approx(weight)


def test_the_entropys_weight_rises_by_the_gap_and_stops_at_zero():
    agent = made(learning_rate=0.0, target_entropy=10.0)
    rows, expected = minibatch(agent), torch.zeros(2)
    for _ in range(3):
        measured = agent.policy_step(rows)
        expected = (expected + 1e-3 * (10 - measured["entropy"].detach())).clamp(min=0)
        torch.testing.assert_close(measured["entropy_weight"], expected)
    assert expected.max() > 0
    agent.args.target_entropy = -1e6
    assert (agent.policy_step(rows)["entropy_weight"] == 0).all()


def on_policy(agent, size=64):
    """A minibatch of the present policy's own actions, with nothing to gain."""
    obs = torch.randn(2, size, 5)
    with torch.no_grad():
        actions = agent.actor.sample(obs)
        log_prob = agent.actor.log_prob(obs, actions).sum(0, keepdim=True)
    rows = {"obs": obs, "frames": None, "actions": actions, "legal": None, "log_prob": log_prob}
    return rows | {n: torch.zeros(1, size) for n in ("advantages", "returns", "values")}


def test_the_entropy_settles_at_its_target():
    """Likely actions pay, so that a policy alone would narrow without end."""
    options = {"learning_rate": 1e-3, "entropy_gain": 0.2, "history": 0}
    last = []
    for target in (1.0, -1e6):
        agent, entropies = made(2, target_entropy=target, **options), []
        for _ in range(320):
            rows = on_policy(agent, 32)
            rows["advantages"] = 0.3 * (rows["log_prob"] - rows["log_prob"].mean())
            entropies.append(agent.policy_step(rows)["entropy"].item())
        assert entropies[0] > 2
        last.append(np.mean(entropies[-120:]))
    assert last[0] == pytest.approx(1.0, abs=0.4) and last[1] < 0, last


def test_a_mean_outside_the_box_is_brought_back():
    agent = made(2, learning_rate=1e-2, history=0)
    with torch.no_grad():
        agent.actor.network[-1].bias[..., :2] = 2.0
    for _ in range(120):
        agent.policy_step(on_policy(agent))
    assert agent.actor(torch.randn(2, 64, 5))[0].abs().max() < 1.15


# --- Memory ---


def walks(lengths, seed=0):
    """Episodes of these lengths, one after another; every second one ends by a termination."""
    random = np.random.default_rng(seed)
    obs, next_obs, ends = [], [], []
    for number, length in enumerate(lengths):
        states = random.normal(size=(length + 1, 2, 3)).astype(np.float32)
        obs.append(states[:-1])
        next_obs.append(states[1:])
        ends += [False] * (length - 1) + [number % 2 == 0]
    n = len(ends)
    actions = random.uniform(-1, 1, (n, 2, 2)).astype(np.float32)
    obs, next_obs = np.concatenate(obs), np.concatenate(next_obs)
    rest = np.zeros(n, np.float32), next_obs, np.array(ends), np.zeros(n, bool)
    return TeamDataset(obs, actions, *rest, "walks")


def test_histories_are_the_rows_before_of_the_same_episode():
    team = walks([4, 1, 6, 3])
    replay = Replay(team, 2, 0, 1)
    index = torch.arange(14).repeat(4, 1)
    history = replay.gather_history(index, 3)
    begin = np.repeat([0, 4, 5, 11], [4, 1, 6, 3])
    assert replay.elapsed.tolist() == (np.arange(14) - begin).tolist()
    for g in range(4):
        for row in range(14):
            for k in range(3):
                before = row - 3 + k
                there = before >= begin[row]
                assert history["is_there"][g, row, k].item() == there
                if there:
                    for name in ("obs", "actions"):
                        expected = getattr(team, name)[before, g % 2]
                        np.testing.assert_array_equal(history[name][g, row, k], expected)


def test_acting_online_equals_acting_on_stored_frames_and_begins_clean():
    """What an agent does in an episode, step by step, it does on the episode's rows in the data."""
    agent = made(2, obs_dim=3, action_dim=2, num_seeds=1)
    team = walks([6, 6])
    agent.measure_scales(Replay(team, 1, 0, 1))
    obs = torch.as_tensor(team.obs).transpose(0, 1)  # (G, 12, 3)
    agent.begin_episodes(torch.ones(2, 2).bool())
    both = torch.stack([obs[:, :6], obs[:, 6:]], dim=1)  # two environments
    chosen = [agent.act(both[:, :, t]) for t in range(6)]
    team.actions = torch.stack(chosen, 2).flatten(1, 2).transpose(0, 1).numpy()
    replay = Replay(team, 1, 0, 1)
    index = torch.arange(12).repeat(2, 1)
    frames = agent.remember(replay.gather_history(index, 3))
    features = agent.features(frames, agent.scaled(obs))
    stored = agent.actor.mode(features).clamp(-1, 1).unflatten(1, (2, 6))
    torch.testing.assert_close(stored, torch.stack(chosen, 2))
    assert not torch.allclose(agent.act(both[:, :, 0]), chosen[0])  # it remembers
    agent.begin_episodes(torch.tensor([[True, False]] * 2))
    again = agent.act(both[:, :, 0])
    assert torch.equal(again[:, 0], chosen[0][:, 0])
    assert not torch.allclose(again[:, 1], chosen[0][:, 1])


def test_the_loop_says_where_episodes_begin():
    """At the first step everywhere, and then where the one before ended."""
    told = []

    class Noting:
        def act(self, obs):
            return obs[..., :1]

        def begin_episodes(self, begins):
            told.append(begins.clone())

    class Short:
        num_envs, num_agents = 4, 2
        lengths = np.array([2, 3, 1, 3])

        def reset(self, seed):
            self.time = np.zeros(4, int)
            return np.zeros((4, 2, 1), np.float32)

        def to_box(self, actions):
            return actions

        def step(self, actions):
            self.time += 1
            ends = self.time == self.lengths
            self.time[ends] = 0
            obs = np.zeros((4, 2, 1), np.float32)
            return obs, np.ones(4), ends, np.zeros(4, bool), obs

    returns = loop.episode_returns(Short(), Noting(), 2, 0, torch.device("cpu"))
    assert returns == [[2, 3], [1, 3]]
    expected = [[1, 1, 1, 1], [0, 0, 1, 0], [1, 0, 1, 0]]
    for begins, envs in zip(told, expected, strict=True):
        by_seed = torch.tensor(envs).bool().view(2, 2)
        assert torch.equal(begins, by_seed.repeat_interleave(2, dim=0))


def test_frames_move_up_by_one():
    frames = torch.arange(6.0).view(1, 1, 3, 2)
    new = push(frames, torch.tensor([[[7.0]]]), torch.tensor([[[8.0]]]))
    assert new.flatten().tolist() == [2, 3, 4, 5, 7, 8]


# --- The whole ---


def test_every_kind_of_update_can_be_captured():
    """It never waits for the host, makes tensors on its own device only (any other would be a meta
    tensor here), and what it reads and writes stays where it is."""
    team = random_team(num_agents=2)
    replay, agent = Replay(team, 2, 0, 1), made(4, transitions=16, minibatch_size=5, epochs=2)
    agent.measure_scales(replay)

    def call(kind):
        index = replay.draw_teams(24)
        batch = replay.gather_teams(index) | {"history": replay.gather_history(index, 3)}
        return agent.update(batch, kind)

    kinds = [agent.kind(n, True) for n in (1, 3_000, 3_001, 3_002, 3_401)]
    assert kinds == ["fit", "fit", "rank", "improve", "improve"]
    for kind in ("fit", "rank", "improve", "improve"):
        call(kind)
    before = addresses(agent, replay)
    for kind in ("fit", "rank", "improve"):
        with torch.device("meta"), Watch():
            returned = call(kind)
        assert all(value.device.type == "cpu" for value in returned.values())
    assert addresses(agent, replay) == before


def test_the_members_parts_and_ranking():
    """Elites are those with the smallest error, by seed, and the threshold is the 99 % quantile of
    their disagreement where that is above 2."""
    agent = made(2, obs_dim=1, action_dim=1, num_models=3, num_elites=2)
    changes = [[9.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0]]
    pretend(agent, changes)
    expect = agent.model.expect
    agent.model.expect = lambda s, a, members: expect(s, a, members)
    zeros = torch.zeros(2, 10, 1)
    batch = {"obs": zeros, "next_obs": zeros, "actions": zeros}
    losses = agent.rank(batch | {"rewards": zeros[..., 0], "terminations": zeros[..., 0]})
    assert sorted(agent.elites[0].tolist()) == [1, 2]
    assert losses["losses/uncertainty_99"][0].item() == pytest.approx(4.5)
    assert agent.threshold.item() == pytest.approx(4.5)


@pytest.mark.parametrize("quality", ["unfavourable", "neutral"])
def test_agents_that_meet_in_the_model_coordinate(quality):
    """The game's own table as the model."""
    data = load(f"coordination-game-{quality}", discrete=True)
    args = Args(num_seeds=2, hidden_size=16, model_hidden_size=8, history=0, rollout_length=1)
    args.learning_rate, args.minibatch_size = 3e-3, 128
    torch.manual_seed(0)
    agent, replay = MOMAPPO(4, 3, 2, args, discrete=True), Replay(data, 2, 0, 1)
    agent.measure_scales(replay)

    def expect(state, actions, members):
        same = (actions[..., :2] == actions[..., 2:]).all(2, keepdim=True).float()
        mean = torch.cat([torch.zeros_like(state), same], dim=2).unsqueeze(1).expand(-1, 5, -1, -1)
        return mean, torch.zeros_like(mean), torch.zeros_like(mean[..., 0])

    agent.model.expect = expect
    for _ in range(25):
        index = replay.draw_teams(256)
        history = replay.gather_history(index, 0)
        agent.improve(replay.gather_teams(index) | {"history": history})
    chosen = agent.act(torch.ones(4, 1, 3)).argmax(2).view(2, 2)
    assert (chosen[:, 0] == chosen[:, 1]).all()
    assert agent.report()["losses/imagined_reward"].min() > 0.9


BAD = {
    "no policy": (["--model-updates", "60"], "--offline-updates 60: with --model-updates 60"),
    "elites": (["--num-elites", "4"], "--num-elites 4: expected at least 2 and at most"),
    "one elite": (["--num-elites", "1"], "--num-elites 1: expected at least 2"),
    "minibatch": (["--minibatch-size", "33"], "--transitions 32: expected at least"),
    "threshold": (["--uncertainty-threshold", "0"], "--uncertainty-threshold is 0.0"),
    "one transition": (
        "--transitions 1 --rollout-length 1 --minibatch-size 1".split(),
        "--transitions 1: expected at least 2",
    ),
    "history": (["--history", "-1"], "--history is -1; it must be at least 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_in_a_line(fails, data, name):
    argv, message = BAD[name]
    fails(message, "moma_ppo", "--env", ENV, "--dataset", data, *tiny("moma_ppo"), *argv)


def test_help_names_what_is_published():
    assert "published 1024" in cli.described(Args)["model_hidden_size"][1]


# --- Its model's error, as benchmarks.model_error measures it ---


def walk(n, length, seed=0):
    """A team of two that see the same two numbers; the second counts an episode's steps, the first
    is the sum of all actions in it. The reward is what the first becomes."""
    actions = np.random.default_rng(seed).uniform(-1, 1, (n, 2, 1)).astype(np.float32)
    obs = np.zeros((n, 1, 2), np.float32)
    next_obs = np.zeros_like(obs)
    for t in range(n):
        obs[t, 0] = next_obs[t - 1, 0] if t % length else 0
        next_obs[t, 0] = obs[t, 0] + [actions[t].sum(), 1]
    ends = np.arange(n) % length == length - 1
    rewards, never = next_obs[:, 0, 0].copy(), np.zeros(n, bool)
    return TeamDataset(obs, actions, rewards, next_obs, never, ends, "walks")


def test_the_models_error_is_measured_along_a_sequence_of_its_own_states():
    team = walk(n=35, length=7)
    elapsed = Replay(team, 1, 0, 1).elapsed
    first = model_error.sequences(elapsed, 5, True, 100)
    later = model_error.sequences(elapsed, 5, False, 100)
    assert first.tolist() == [0, 7, 14, 21, 28]
    assert later.tolist() == [s + k for s in (0, 7, 14, 21, 28) for k in (1, 2)]
    assert model_error.sequences(elapsed, 5, False, 3).tolist() == [1, 15, 30]
    assert not len(model_error.sequences(elapsed, 8, True, 100))

    agent = made(4, obs_dim=2, action_dim=1)
    agent.measure_scales(Replay(team, 2, 0, 1))

    def wrong(state, actions):  # of seed 0 right, of seed 1 the sum drifts and rewards are promised
        off = torch.tensor([0.0, 0.25]).view(2, 1)
        total = state[..., 0] + actions.sum(2) + off
        next_state = torch.stack([total, state[..., 1] + 1], dim=2).repeat(1, 1, 2)
        penalty = torch.full_like(total, 0.5)
        return next_state, total + off - penalty, None, penalty, penalty

    agent.imagined_step = wrong
    found = model_error.errors(agent, team, later, 5)
    std = agent.model.std[
        0
    ].item()  # the second number's copies and the other agent's are no entries
    for h, row in enumerate(found, start=1):
        assert row["step"] == h
        error = h * 0.25 / std / math.sqrt(2)  # two entries are predicted
        torch.testing.assert_close(row["state_error"], torch.tensor([0, error]), atol=1e-5, rtol=0)
        bias = torch.tensor([0, (h + 1) * 0.25])
        torch.testing.assert_close(row["reward_bias"], bias, atol=1e-5, rtol=0)
        rewards = torch.as_tensor(team.rewards)[later + h - 1].mean()
        torch.testing.assert_close(row["reward"], rewards.expand(2))


def test_the_models_error_of_a_run(monkeypatch, tmp_path, data, capsys):
    argv = "--env", ENV, "--dataset", data, *tiny("moma_ppo"), "--num-seeds", "2"
    run(monkeypatch, "moma_ppo", *argv, "--run-dir", str(tmp_path / "runs"))
    folder, path = sorted((tmp_path / "runs").iterdir())[0], tmp_path / "error.csv"
    args = model_error.Args((str(folder),), str(path), horizon=3, episodes=2, sequences=20)
    model_error.main(args)
    with open(path) as file:
        rows = list(csv.DictReader(file))
    kinds = {(row["seed"], row["actions"], row["begins"], row["step"]) for row in rows}
    assert len(kinds) == len(rows) == 2 * 2 * 2 * 3
    assert all(math.isfinite(float(row["state_error"])) for row in rows)
    assert "policy later    step   3" in capsys.readouterr().out


def test_a_run_goes_on_with_the_flags_it_was_given(monkeypatch, tmp_path):
    """Also where its episodes are too short for its memory; and a picture of it can be made."""
    argv = "--env", "coordination-game-neutral", *tiny("moma_ppo"), "--history", "5"
    run(monkeypatch, "moma_ppo", *argv, "--run-dir", str(tmp_path / "runs"))
    folder = only(tmp_path / "runs")
    assert checkpoints.read_args(folder)["history"] == 5
    run(monkeypatch, "moma_ppo", "--history", "5", "--resume", str(folder))
    act, begin = render.trained_policy(str(folder), make_vec("coordination-game", 1, 0))
    begin()
    assert act(np.zeros((2, 3), np.float32)).shape == (2, 2)
    path = tmp_path / "error.csv"  # of discrete actions too
    model_error.main(model_error.Args((str(folder),), str(path), episodes=5))
    with open(path) as file:
        assert {(r["begins"], r["step"]) for r in csv.DictReader(file)} == {("episode", "1")}
