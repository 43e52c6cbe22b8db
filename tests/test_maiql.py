"""MAIQL-ft: the fine-tuning of MAIQL in a world model; MAIQL itself is in test_iql.py."""

import csv

import numpy as np
import pytest
import torch

from common.replay import Replay
from maiql import MAIQL, Args, Imagined
from tests.helpers import (
    ACTION_DIM,
    OBS_DIM,
    Watch,
    assert_frequencies,
    assert_same,
    logged,
    only,
    random_team,
    run,
    state_of,
    tiny,
)
from tests.test_learners import addresses
from tests.test_scripts import end_life
from tests.tiny_task import ENV


def made(G=4, obs_dim=OBS_DIM, action_dim=ACTION_DIM, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "model_hidden_size": 8, "num_models": 3, "num_seeds": G // 2}
    sizes |= {"finetune": True, "offline_updates": 30, "model_updates": 10, "rollout_length": 4}
    return MAIQL(G, obs_dim, action_dim, Args(**(sizes | {"finetune_updates": 5} | options)))


# --- Imagined transitions ---


def rows(first, n, G=4):
    """Transitions whose entries are all their number."""
    numbers = torch.arange(first, first + n).float()
    of_each = {"obs": OBS_DIM, "next_obs": OBS_DIM, "actions": ACTION_DIM}
    batch = {name: numbers.view(1, n, 1).expand(G, n, dim) for name, dim in of_each.items()}
    return batch | {name: numbers.expand(G, n) for name in ("rewards", "terminations")}


def test_the_oldest_imagined_transitions_make_room():
    imagined = Imagined(4, 2, OBS_DIM, ACTION_DIM, 10)
    for first in (0, 4, 8, 12):
        imagined.add(rows(first, 4))
    expected = torch.tensor([10.0, 11, 12, 13, 14, 15, 6, 7, 8, 9])
    assert imagined.count == 16
    for g in range(4):
        assert torch.equal(imagined.rewards[g], expected)
        assert torch.equal(imagined.obs[g, :, 3], expected)


@pytest.mark.parametrize("added", [0, 4, 12])
def test_draws_are_uniform_over_offline_and_imagined_data(added):
    """And the agents of a seed get the same transition, with its own columns."""
    team = random_team(20)
    replay, imagined = Replay(team, 2, 0, 1), Imagined(4, 2, OBS_DIM, ACTION_DIM, 8)
    for first in range(0, added, 4):
        imagined.add(rows(100 + first, 4))
    there = [100 + i for i in range(added)][-8:]
    torch.manual_seed(0)
    batch = imagined.draw_with(replay, 20_000)
    all_rewards = np.concatenate([team.rewards, np.array(there, np.float32)])
    drawn = []
    for g in range(4):
        index = np.abs(batch["rewards"][g].numpy()[:, None] - all_rewards).argmin(1)
        np.testing.assert_array_equal(batch["rewards"][g], all_rewards[index])
        drawn.append(index)
        real = index < 20
        for name in ("obs", "next_obs"):
            its = getattr(team, name)[index[real], 0]
            np.testing.assert_array_equal(batch[name][g].numpy()[real], its)
        its = team.actions[index[real], g % 2]
        np.testing.assert_array_equal(batch["actions"][g].numpy()[real], its)
        for name in ("obs", "next_obs", "actions"):
            assert (batch[name][g].numpy()[~real] == all_rewards[index[~real], None]).all()
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[2], drawn[3])
    assert (drawn[0] != drawn[2]).any()
    for each in drawn[::2]:
        assert_frequencies(each, np.full(len(all_rewards), 1.0))


# --- Rollouts ---


def test_a_rollout_is_pessimistic_stays_in_the_box_and_begins_anew_where_it_ends():
    """Against a loop with numbers: members that differ by state, one of which says when it ends."""
    agent = made(4, obs_dim=1, action_dim=1, uncertainty_penalty=0.5)
    agent.model.low.copy_(torch.tensor([-9.0, -9.0, -1.0]))
    agent.model.high.copy_(torch.tensor([9.0, 1.5, 5.0]))

    def expect(state, actions, members):
        assert members.tolist() == [[0, 1, 2]] * 2
        own = torch.stack([actions[..., :1], actions[..., 1:], state[..., :1]], dim=3).squeeze(2)
        mean = torch.stack([own + torch.tensor([0.0, 0.0, m]) for m in (0.0, 1.0, 4.0)], dim=1)
        variance = torch.tensor([[0.0, 0.3, 0.4], [0.0, 0.0, 0.1], [0.0, 0.0, 0.2]])
        goes_on = (state[..., 0] < 2).float().unsqueeze(1).expand(-1, 3, -1)
        return mean, variance.view(1, 3, 1, 3).expand_as(mean), goes_on

    agent.model.expect = expect
    starts = torch.tensor([[0.0, 1.0, 3.0, -1.0], [0.5, 0.5, 1.0, 1.0]]).repeat(2, 1)
    starts[2:, 0] = 2.5  # which ends at once
    agent.imagine(starts.unsqueeze(2))
    found = agent.imagined
    assert found.count == 4
    penalty = 0.5 * (np.var([0.0, 1.0, 4.0], ddof=1) + 0.5)
    for s in (0, 2):
        state = starts[s : s + 2, 0]
        for t in range(4):
            assert torch.equal(found.obs[s : s + 2, t, 0], state)
            actions = found.actions[s : s + 2, t, 0]
            assert (actions.abs() <= 1).all()
            expected = (state + actions).clamp(max=torch.tensor([9.0, 1.5]))
            torch.testing.assert_close(found.next_obs[s : s + 2, t, 0], expected)
            reward = max(state[0].item(), -1.0) - penalty
            assert found.rewards[s, t].item() == pytest.approx(reward)
            assert found.rewards[s + 1, t] == found.rewards[s, t]
            ends = state[0] >= 2
            assert (found.terminations[s : s + 2, t] == float(ends)).all()
            if t < 3:
                state = starts[s : s + 2, t + 1] if ends else found.next_obs[s : s + 2, t, 0]
    assert found.terminations[2, 0] == 1 and found.terminations[0, 0] == 0
    reported = agent.report()
    torch.testing.assert_close(reported["losses/penalty"], torch.full((4,), float(penalty)))
    mean_reward = found.rewards[:, :4].mean(1) + penalty
    torch.testing.assert_close(reported["losses/imagined_reward"], mean_reward.float())


def test_every_member_may_say_what_follows():
    agent = made(2, obs_dim=1, action_dim=1, finetune_updates=60, rollout_length=1)

    def expect(state, actions, members):
        mean = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0]]).view(1, 3, 1, 3)
        return mean, torch.zeros_like(mean), torch.ones(1, 3, 1)

    agent.model.expect = expect
    for _ in range(60):
        agent.imagine(torch.zeros(2, 1, 1))
    assert set(agent.imagined.next_obs[0, :, 0].tolist()) == {0.0, 1.0, 2.0}


def test_each_kind_of_update_trains_its_own_networks():
    agent, replay = made(), Replay(random_team(), 2, 0, 1)
    agent.measure_scales(replay)
    kinds = [agent.kind(n, True) for n in (1, 10, 11, 25, 26, 30)]
    assert kinds == ["fit", "fit", "learn", "learn", "finetune", "finetune"]
    for kind in ("fit", "learn"):
        before = {name: p.detach().clone() for name, p in agent.named_parameters()}
        agent.update(replay.gather_teams(replay.draw_teams(24)), kind)
        for name, p in agent.named_parameters():
            moved = not torch.equal(p, before[name])
            assert moved == (name.startswith("model.") == (kind == "fit")), name


def test_every_kind_of_update_can_be_captured():
    agent, replay = made(), Replay(random_team(), 2, 0, 1)
    agent.measure_scales(replay)

    def call(kind):
        if kind == "finetune":
            agent.imagine(replay.gather_teams(replay.draw_teams(4))["obs"])
            return agent.update(agent.imagined.draw_with(replay, 8))
        return agent.update(replay.gather_teams(replay.draw_teams(24)), kind)

    for kind in ("fit", "learn", "finetune"):
        call(kind)
    before = addresses(agent, replay)
    for kind in ("fit", "learn", "finetune"):
        with torch.device("meta"), Watch():
            losses = call(kind)
        assert all(value.device.type == "cpu" for value in losses.values())
    assert addresses(agent, replay) == before


# --- Runs ---

FINETUNE = ["--finetune", "--model-updates", 20, "--finetune-updates", 20, "--rollout-length", 4]
FINETUNE += ["--model-hidden-size", 8, "--num-models", 3]


@pytest.mark.parametrize("life", [15, 35, 50])
def test_a_run_that_is_stopped_in_any_of_its_stages_ends_where_the_unbroken_one_does(
    tmp_path, monkeypatch, data, life
):
    argv = ["--env", ENV, "--dataset", data, *tiny("maiql"), *FINETUNE, "--num-seeds", 2]
    run(monkeypatch, "maiql", *argv, "--run-dir", tmp_path / "unbroken")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        end_life(patch, None, "SIGTERM", life)
        run(patch, "maiql", *argv, "--run-dir", tmp_path / "broken")
    assert exit.value.code == 143
    whole, broken = (sorted((tmp_path / name).iterdir()) for name in ("unbroken", "broken"))
    run(monkeypatch, "maiql", "--resume", broken[0])
    for one, other in zip(whole, broken, strict=True):
        assert (one / "returns.csv").read_bytes() == (other / "returns.csv").read_bytes()
    states = [state_of(f[0] / "checkpoint.pt") for f in (whole, broken)]
    assert_same(*states)
    assert states[0]["agent"]["imagined.count"] == 80
    (row,) = csv.DictReader((whole[0] / "returns.csv").open())
    assert row["deployment"] == "0"
    tags = {tag for tag in logged(whole[0]) if tag.startswith("losses/")}
    assert any("model_loss" in tag for tag in tags) and any("penalty" in tag for tag in tags)


BAD = {
    "nothing left": (
        ["--finetune", "--model-updates", "40", "--finetune-updates", "20"],
        "--offline-updates 60: with --finetune more than --model-updates 40 and",
    ),
    "one member": ([*map(str, FINETUNE), "--num-models", "1"], "--num-models 1: expected at least"),
    "no room": (
        [*map(str, FINETUNE), "--imagined-size", "3", "--rollout-length", "4"],
        "--imagined-size 3: expected room for --rollout-length 4",
    ),
    "no rollouts": (["--finetune-updates", "0"], "--finetune-updates is 0; it must be at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_in_a_line(fails, data, name):
    argv, message = BAD[name]
    fails(message, "maiql", "--env", ENV, "--dataset", data, *tiny("maiql"), *argv)


def test_without_it_there_is_no_model(tmp_path, monkeypatch, data):
    argv = ["--env", ENV, "--dataset", data, *tiny("maiql"), "--run-dir", tmp_path / "runs"]
    run(monkeypatch, "maiql", *argv)
    state = torch.load(only(tmp_path / "runs") / "checkpoint.pt", weights_only=True)["agent"]
    assert not [name for name in state if name.startswith(("model.", "imagined."))]
