"""The coordination game, its data, and what the closed form says of who coordinates."""

import numpy as np
import pytest
import torch
from pettingzoo.test import parallel_api_test

import bc
import iql
import maiql
from common import InputError, loop
from common.datasets import load
from common.datasets.makers.matrix_game import P_RIGHT
from common.envs import make_vec, normalized_score, parallel_env
from common.envs.matrix_game import CoordinationGame
from common.replay import Replay

TASKS = ["coordination-game", "coordination-game-joint"]


@pytest.mark.parametrize("task", TASKS)
def test_pettingzoos_own_test_passes(task):
    parallel_api_test(parallel_env(task), num_cycles=30)


@pytest.mark.parametrize("task", TASKS)
def test_equal_choices_are_paid_and_end_the_episode(task):
    vec = make_vec(task, 4, 0)
    assert vec.reset().tolist() == np.ones((4, vec.num_agents, 1 + vec.action_dim)).tolist()
    choices = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    actions = np.eye(2)[choices] if vec.num_agents == 2 else np.eye(4)[:, None]
    for _ in range(2):
        _, rewards, terminations, truncations, _ = vec.step(actions)
        assert rewards.tolist() == [1, 0, 0, 1] and terminations.all()
    assert normalized_score(task, 0.5) == 50


def test_an_episode_of_several_steps_pays_each_and_ends_with_the_last():
    env = CoordinationGame("coordination-game", steps=3)
    env.reset()
    ends, total = [], 0
    for actions in ((0, 0), (0, 1), (1, 1)):
        _, rewards, terminations, _, _ = env.step(
            dict(zip(env.possible_agents, actions, strict=True))
        )
        ends.append(terminations["agent_0"])
        total += rewards["agent_1"]
    assert ends == [False, False, True] and total == 2 and not env.agents


def test_pictures_show_the_choices_and_other_modes_are_refused():
    env = parallel_env("coordination-game", render_mode="rgb_array")
    env.reset()
    before = env.render()
    env.step({"agent_0": 0, "agent_1": 1})
    assert before.shape == (240, 240, 3) and not np.array_equal(before, env.render())
    with pytest.raises(InputError, match="rgb_array"):
        parallel_env("coordination-game", render_mode="human")


@pytest.mark.parametrize("quality", P_RIGHT)
def test_the_data_has_its_shares_and_both_forms_the_same_choices(quality):
    team, one = (load(f"{task}-{quality}", discrete=True) for task in TASKS)
    assert len(team) == len(one) == 10_000 and team.terminations.all()
    share = team.actions[:, :, 1].mean(0)
    np.testing.assert_allclose(share, P_RIGHT[quality], atol=0.02)
    both = one.actions[:, 0].reshape(-1, 2, 2)  # (n, a_1, a_2)
    np.testing.assert_array_equal(team.actions[:, 0], both.sum(2))
    np.testing.assert_array_equal(team.actions[:, 1], both.sum(1))
    np.testing.assert_array_equal(team.rewards, both[:, 0, 0] + both[:, 1, 1])
    np.testing.assert_array_equal(one.rewards, team.rewards)
    assert (both.sum(0) > 0).all()  # all four joint actions occur
    # chosen independently
    joint, outer = both.mean(0), np.outer(both.sum(2).mean(0), both.sum(1).mean(0))
    np.testing.assert_allclose(joint, outer, atol=0.01)


# --- The closed form ---


def trained(module, learner, task, quality, num_updates=300, **options):
    """P(right) of each group, (G,), or P of the joint actions (S, 4)."""
    data = load(f"{task}-{quality}", discrete=True)
    args = module.Args(num_seeds=2, hidden_size=16, learning_rate=3e-3, **options)
    replay = Replay(data, 2, 0, 1)
    torch.manual_seed(0)
    agent = learner(replay.num_groups, data.obs.shape[2], data.actions.shape[2], args, True)
    agent.measure_scales(replay)
    for _ in range(num_updates):
        agent.update(replay.gather_teams(replay.draw_teams(256)))
    obs = torch.ones(replay.num_groups, 1, data.obs.shape[2])
    legal = torch.ones(replay.num_groups, 1, data.actions.shape[2], dtype=torch.bool)
    with torch.no_grad():
        return agent, agent.actor.logits(agent.scaled(obs), legal).softmax(2)[:, 0]


@pytest.mark.parametrize("quality", P_RIGHT)
def test_clones_take_over_the_datas_shares(quality):
    agent, p = trained(bc, bc.BC, "coordination-game", quality)
    expected = torch.tensor(P_RIGHT[quality] * 2)
    torch.testing.assert_close(p[:, 1], expected, atol=0.04, rtol=0)
    if quality != "neutral":  # there it is chance which side is the likelier
        envs = make_vec("coordination-game", 2 * 3, 0)
        played = loop.episode_returns(envs, agent, 2, 0, torch.device("cpu"))
        assert played == [[float(quality == "favourable")] * 3] * 2


def test_one_agent_with_joint_actions_reaches_the_optimum():
    for quality in ("neutral", "unfavourable"):
        agent, p = trained(iql, iql.IQL, "coordination-game-joint", quality, 600, tau=0.05)
        best = agent.act(torch.ones(2, 1, 5)).argmax(2).flatten().tolist()
        assert set(best) <= {0, 3} and (p[:, 1:3].sum(1) < 0.2).all()


def test_weighted_clones_of_a_team_equal_the_closed_form():
    """Weights exp(b A) with A = r - V: relative to each other e^b for equal choices and 1 for
    others."""
    quality = "unfavourable"
    _, found = trained(maiql, maiql.MAIQL, "coordination-game", quality, 1000, tau=0.05)
    p, q = P_RIGHT[quality]
    w = np.exp(3.0)
    right = p * (q * w + 1 - q)
    expected_p = right / (right + (1 - p) * ((1 - q) * w + q))
    right = q * (p * w + 1 - p)
    expected_q = right / (right + (1 - q) * ((1 - p) * w + p))
    np.testing.assert_allclose(found[:2, 1], [expected_p, expected_q], atol=0.06)
    # So that greedy agents never agree
    np.testing.assert_allclose([expected_p, expected_q], [0.59, 0.41], atol=0.001)
    assert (found[::2, 1] > 0.5).all() and (found[1::2, 1] < 0.5).all()
