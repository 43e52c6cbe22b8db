"""Replay: whose data each group sees, uniform draws, shapes, saved state, no host waits."""

import io
import itertools

import numpy as np
import pytest
import torch

from common import InputError
from common.datasets import TeamDataset
from common.replay import Replay
from tests.helpers import (
    ACTION_DIM,
    OBS_DIM,
    add_deployment,
    array,
    assert_frequencies,
    no_host_waits,
    random_team,
)

S, N, K, M = 2, 2, 3, 5  # seeds, agents, deployments, steps of each
OFFLINE, OBS, ACTION = 7, 4, 3


def dataset(viewers: int = 1, agents: int = N) -> TeamDataset:
    """Every number names its field, row and agent."""
    row = np.arange(OFFLINE, dtype=np.float32)
    obs = row[:, None, None] + 100 * np.arange(viewers)[:, None] + np.arange(OBS) / 10
    actions = -row[:, None, None] - 100 * np.arange(agents)[:, None] - np.arange(ACTION) / 10
    return TeamDataset(
        obs=obs.astype(np.float32),
        actions=actions.astype(np.float32),
        rewards=row * 2,
        next_obs=(obs + 0.5).astype(np.float32),
        terminations=row % 3 == 1,
        truncations=row == OFFLINE - 1,
        source="test",
    )


def deployment(k: int, agents: int = N, shared: bool = True) -> dict[str, np.ndarray]:
    """The arguments of `add`: every number names its seed, deployment, row and agent."""
    s, m, n, d = np.ogrid[:S, :M, :agents, :OBS]
    row = 10_000 * (s + 1) + 1000 * k + m
    obs = row + d / 10 + (0 if shared else 100) * n
    actions = -(row + 100 * n + np.arange(ACTION) / 10)
    return {
        "obs": np.broadcast_to(obs, (S, M, agents, OBS)).astype(np.float32),
        "actions": actions.astype(np.float32),
        "rewards": (row[..., 0, 0] * 2).astype(np.float32),
        "next_obs": np.broadcast_to(obs + 0.5, (S, M, agents, OBS)).astype(np.float32),
        "terminations": (row[..., 0, 0] + s[..., 0, 0]) % 4 == 2,
    }


def make(device, viewers: int = 1, deployments: int = 0, data=None) -> Replay:  # noqa: F811
    replay = Replay(data or dataset(viewers), S, K, M, device)
    for k in range(deployments):
        replay.add(**deployment(k, shared=viewers == 1))
    return replay


def expected(data: TeamDataset, deployments: list[dict], seed: int, agent: int) -> dict:
    """What one group may see, by index: its agent's offline rows, then its seed's online rows."""
    seen = agent if data.obs.shape[1] > 1 else 0
    rows = {
        "obs": [data.obs[:, seen]] + [x["obs"][seed, :, agent] for x in deployments],
        "next_obs": [data.next_obs[:, seen]] + [x["next_obs"][seed, :, agent] for x in deployments],
        "actions": [data.actions[:, agent]] + [x["actions"][seed, :, agent] for x in deployments],
        "rewards": [data.rewards] + [x["rewards"][seed] for x in deployments],
        "terminations": [data.terminations] + [x["terminations"][seed] for x in deployments],
    }
    return {name: np.concatenate(parts).astype(np.float32) for name, parts in rows.items()}


@pytest.mark.parametrize("viewers", [1, N])
@pytest.mark.parametrize("deployments", [0, 1, K])
def test_each_group_sees_its_own_transitions(viewers, deployments, device):  # noqa: F811
    replay = make(device, viewers, deployments)
    size = OFFLINE + deployments * M
    batch = replay.gather(torch.arange(size, device=device).expand(S * N, -1))
    added = [deployment(k, shared=viewers == 1) for k in range(deployments)]
    assert batch["obs"].shape == batch["next_obs"].shape == (S * N, size, OBS)
    assert batch["actions"].shape == (S * N, size, ACTION)
    assert batch["rewards"].shape == batch["terminations"].shape == (S * N, size)
    for seed, agent in itertools.product(range(S), range(N)):
        for name, rows in expected(dataset(viewers), added, seed, agent).items():
            assert batch[name].dtype == torch.float32
            np.testing.assert_array_equal(array(batch[name][seed * N + agent]), rows, name)


def test_three_agents_and_any_order_of_indices(device):  # noqa: F811
    replay = Replay(dataset(3, 3), S, K, M, device)
    added = [deployment(k, 3, shared=False) for k in range(2)]
    for data in added:
        replay.add(**data)
    index = torch.randint(0, OFFLINE + 2 * M, (S * 3, 50), device=device)
    batch = replay.gather(index)
    for seed, agent in itertools.product(range(S), range(3)):
        g = seed * 3 + agent
        for name, rows in expected(dataset(3, 3), added, seed, agent).items():
            np.testing.assert_array_equal(array(batch[name][g]), rows[array(index[g])], name)


@pytest.mark.parametrize("viewers", [1, N])
@pytest.mark.parametrize("seed, agent", list(itertools.product(range(S), range(N))))
def test_poison_in_others_data_is_never_seen(viewers, seed, agent, device):  # noqa: F811
    data, added = dataset(viewers), [deployment(k, shared=viewers == 1) for k in range(K)]
    others = [i for i in range(N) if i != agent]
    data.actions[:, others] = np.nan
    if viewers > 1:
        data.obs[:, others] = data.next_obs[:, others] = np.nan
    for x in added:
        for name in ("actions", "obs", "next_obs") if viewers > 1 else ("actions",):
            x[name][:, :, others] = np.nan
        for name in ("obs", "actions", "rewards", "next_obs"):
            x[name][[s for s in range(S) if s != seed]] = np.nan
    replay = make(device, data=data)
    for x in added:
        replay.add(**x)
    for draw in (replay.draw_merged, replay.draw_offline, replay.draw_online):
        for name, batch in replay.gather(draw(300)).items():
            assert batch[seed * N + agent].isfinite().all(), name
    for name, batch in replay.gather(replay.draw_latest(M)).items():
        assert batch[seed * N + agent].isfinite().all(), name


def test_an_agent_s_data_does_not_depend_on_the_other_agents_actions(device):  # noqa: F811
    changed = dataset()
    changed.actions[:, 1] *= -3
    index = torch.arange(OFFLINE, device=device).expand(S * N, -1)
    before = make(device).gather(index)
    after = make(device, data=changed).gather(index)
    for name in before:
        assert torch.equal(before[name][::N], after[name][::N])
    assert not torch.equal(before["actions"][1], after["actions"][1])


# --- Draws ---


@pytest.mark.parametrize("deployments", [1, 2, K])
def test_draws_are_uniform(deployments, device):  # noqa: F811
    replay = make(device, deployments=deployments)
    online = deployments * M
    for draw, first, count in (
        (replay.draw_merged, 0, OFFLINE + online),
        (replay.draw_offline, 0, OFFLINE),
        (replay.draw_online, OFFLINE, online),
    ):
        index = draw(10_000)
        assert index.shape == (S * N, 10_000) and index.dtype == torch.long
        for group in array(index):
            row = np.arange(OFFLINE + online)
            assert_frequencies(group, (row >= first) & (row < first + count))
    share = replay.is_online(replay.draw_merged(20_000)).double().mean(1)
    assert array(share) == pytest.approx(online / (OFFLINE + online), abs=0.02)


def test_merged_draws_are_offline_before_the_first_deployment(device):  # noqa: F811
    index = make(device).draw_merged(5000)
    for group in array(index):
        assert_frequencies(group, np.ones(OFFLINE))


def test_a_function_in_parts_is_that_of_the_whole(device):  # noqa: F811
    replay = make(device, deployments=2)
    index = torch.randint(OFFLINE + 2 * M, (S * N, 11), device=device)
    sizes = []

    def function(rewards, obs):
        sizes.append(rewards.shape[1])
        return obs * rewards.unsqueeze(2)

    whole = replay.gather(index)
    for size in (1, 4, 11, 12):
        found = replay.in_parts(function, index, ("rewards", "obs"), size)
        assert torch.equal(found, whole["obs"] * whole["rewards"].unsqueeze(2))
    assert sizes == [1] * 11 + [4, 4, 3] + [11] + [11]


def test_groups_draw_independently(device):  # noqa: F811
    index = array(make(device, deployments=1).draw_merged(40_000))
    size = OFFLINE + M
    for a, b in itertools.combinations(range(S * N), 2):
        assert_frequencies(index[a] * size + index[b], np.ones(size * size))
    assert_frequencies(index[0, ::2] * size + index[0, 1::2], np.ones(size * size))


def test_every_row_of_a_large_replay_can_be_drawn(device):  # noqa: F811
    """Even beyond the 2^24 numbers a float32 uniform has."""
    replay = make(device)
    size = 2**25 + 3
    index = replay._draw(50_000, size)
    assert index.min() >= 0 and index.max() < size
    assert_frequencies(array(index % 4), np.ones(4))


@pytest.mark.parametrize("deployments", [1, 2, K])
def test_draw_latest(deployments, device):  # noqa: F811
    replay = make(device, deployments=deployments)
    start = OFFLINE + (deployments - 1) * M
    assert int(replay.latest_start) == start
    orders = np.stack([array(replay.draw_latest(3)) for _ in range(1500)])  # (draws, G, 3)
    assert orders.shape == (1500, S * N, 3)
    assert orders.min() >= start and orders.max() < start + M
    assert (np.diff(np.sort(orders, axis=2), axis=2) > 0).all()
    law = np.zeros((M, M, M))
    for order in itertools.permutations(range(M), 3):
        law[order] = 1
    for g in range(S * N):  # every ordered choice equally often
        assert_frequencies((orders[:, g] - start) @ [M * M, M, 1], law.ravel())
    whole = array(replay.draw_latest(M))
    assert (np.sort(whole, axis=1) == np.arange(start, start + M)).all()
    rewards = array(replay.gather(replay.draw_latest(M))["rewards"]) / 2
    for g in range(S * N):
        row = 10_000 * (g // N + 1) + 1000 * (deployments - 1)
        assert (np.sort(rewards[g]) == row + np.arange(M)).all()


def test_is_online(device):  # noqa: F811
    index = torch.tensor([[0, OFFLINE - 1, OFFLINE, OFFLINE + 4]], device=device)
    assert make(device, deployments=1).is_online(index).tolist() == [[False, False, True, True]]


def test_no_draw_waits_for_the_host(device):  # noqa: F811
    replay = make(device, deployments=1)

    def everything():
        for draw in (replay.draw_merged, replay.draw_offline, replay.draw_online):
            replay.gather(draw(20))
        index = replay.draw_latest(M)
        replay.is_online(index)
        replay.gather(index)

    everything()  # kernels load
    with no_host_waits(device):
        everything()


def test_the_next_row_does_not_go_on_after_a_cut():
    """Though it begins in the very state in which the episode was cut, as where nothing is seen."""
    team = random_team(n=12, num_agents=2)
    team.obs[:], team.next_obs[:], team.terminations[:] = 1.0, 1.0, False
    team.truncations = np.arange(12) % 4 == 3
    replay = Replay(team, 2, 1, 4)
    assert replay.elapsed.tolist() == [0, 1, 2, 3] * 3
    assert replay.goes_on().tolist() == [True, True, True, False] * 3
    same = np.ones((2, 4, 2, team.obs.shape[2]), np.float32)
    actions = np.zeros((2, 4, 2, team.actions.shape[2]), np.float32)
    rewards, never = np.zeros((2, 4), np.float32), np.zeros((2, 4), bool)
    cuts = np.array([[False, True, False, False], [False, False, True, False]])
    replay.add(same, actions, rewards, same, never, cuts)
    found = replay.gather_following(torch.arange(16).expand(4, -1))["is_followed"]
    offline = [1, 1, 1, 0] * 3
    assert found[0].tolist() == found[1].tolist() == [*offline, 1, 0, 1, 0]
    assert found[2].tolist() == found[3].tolist() == [*offline, 1, 1, 0, 0]
    other = Replay(team, 2, 1, 4)
    other.load_state_dict(replay.state_dict())
    again = other.gather_following(torch.arange(16).expand(4, -1))["is_followed"]
    assert torch.equal(again, found)


def test_one_observation_for_all_is_refused_where_agents_see_different_ones():
    team = random_team(n=12, num_agents=2)
    team.obs, team.next_obs = team.obs[:, :1], team.next_obs[:, :1]
    replay = Replay(team, 1, 1, 4)
    obs = np.zeros((1, 4, 2, team.obs.shape[2]), np.float32)
    with pytest.raises(InputError, match="expected 2 in a row of the data, side by side"):
        replay.check_views(obs + [[[[0], [1]]]])
    replay.check_views(obs)
    Replay(random_team(n=12, num_agents=1), 1, 1, 4).check_views(obs[:, :, :1])


# --- Growth and state ---


@pytest.mark.parametrize("name", ["obs", "actions", "rewards", "next_obs", "terminations"])
def test_wrong_shapes_raise_and_change_nothing(name, device):  # noqa: F811
    replay = make(device, deployments=1)
    before = {k: v.clone() for k, v in replay.state_dict().items()}
    right = deployment(1)
    x = right[name]
    wrong = [x[:1], np.concatenate([x, x]), x[:, :1], x[:, :-1], np.concatenate([x, x], axis=1)]
    wrong += [x[:, :, :1], x[..., :1], x[..., None]] if x.ndim == 4 else [x[..., None]]
    for array_ in wrong:
        with pytest.raises(ValueError, match=name):
            replay.add(**{**right, name: array_})
    after = replay.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    replay.add(**right)
    assert int(replay.num_online) == 2 * M


def test_no_room_for_another_deployment(device):  # noqa: F811
    replay = make(device, deployments=K)
    before = replay.state_dict()
    with pytest.raises(ValueError, match="room"):
        replay.add(**deployment(K))
    after = replay.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_add_takes_tensors_and_other_number_types(device):  # noqa: F811
    replay, other = make(device, deployments=1), make(device)
    data = deployment(0)
    wide = {k: torch.tensor(v if v.dtype == bool else np.float64(v)) for k, v in data.items()}
    other.add(**wide)
    index = torch.arange(OFFLINE + M, device=device).expand(S * N, -1)
    a, b = replay.gather(index), other.gather(index)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("viewers", [1, N])
@pytest.mark.parametrize("deployments", [0, 1, K])
def test_state_survives_a_file(viewers, deployments, device):  # noqa: F811
    replay = make(device, viewers, deployments)
    file = io.BytesIO()
    torch.save(replay.state_dict(), file)
    file.seek(0)
    other = make(device, viewers)
    counter = other.num_online
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.num_online is counter  # where a captured graph looks
    assert int(counter) == deployments * M
    if deployments < K:  # both go on alike
        for r in (replay, other):
            r.add(**deployment(deployments, shared=viewers == 1))
    size = OFFLINE + min(K, deployments + 1) * M
    index = torch.arange(size, device=device).expand(S * N, -1)
    a, b = replay.gather(index), other.gather(index)
    assert all(torch.equal(a[k], b[k]) for k in a)
    torch.manual_seed(5)
    drawn = replay.draw_merged(50), replay.draw_latest(M)
    torch.manual_seed(5)
    again = other.draw_merged(50), other.draw_latest(M)
    assert all(torch.equal(x, y) for x, y in zip(drawn, again, strict=True))


def test_who_explored_is_kept(device):  # noqa: F811
    replay, other = make(device, deployments=1), make(device)
    turns = np.arange(S * M).reshape(S, M) % N
    replay.add(**deployment(1, shared=True), explorer=turns)
    state = replay.state_dict()
    other.load_state_dict(state)
    for r in (replay, other):
        assert (r.explorer[:, :M] == -1).all() and (r.explorer[:, 2 * M :] == -1).all()
        assert (r.explorer[:, M : 2 * M].numpy() == turns).all()


def test_state_holds_a_copy(device):  # noqa: F811
    replay = make(device, deployments=1)
    state = replay.state_dict()
    replay.rewards.zero_()
    assert state["rewards"].any()
    assert int(state["num_online"]) == M


def test_counter_is_updated_in_place(device):  # noqa: F811
    replay = make(device)
    counter = replay.num_online
    replay.add(**deployment(0))
    assert replay.num_online is counter and int(counter) == M


def test_a_teams_rows_come_with_the_own_agent_first():
    for own_views in (False, True):
        team = random_team(num_agents=3)
        if own_views:
            team.obs, team.next_obs = (
                np.concatenate([x, x + 10, x + 20], axis=1) for x in (team.obs, team.next_obs)
            )
        replay = Replay(team, 2, 1, 40)
        add_deployment(replay)
        index = replay.draw_merged(30)
        own, team_batch = replay.gather(index), replay.gather_team(index)
        assert {k: v.shape for k, v in team_batch.items()} == {
            "obs": (6, 30, 3, OBS_DIM),
            "next_obs": (6, 30, 3, OBS_DIM),
            "actions": (6, 30, 3, ACTION_DIM),
            "rewards": (6, 30),
            "terminations": (6, 30),
        }
        for name in ("rewards", "terminations"):
            assert torch.equal(own[name], team_batch[name])
        for g in range(6):
            for k in range(3):
                teammate = g // 3 * 3 + (g + k) % 3
                its = replay.gather(index[g].expand(6, -1))  # everyone at the rows of group g
                for name in ("obs", "next_obs", "actions"):
                    assert torch.equal(team_batch[name][g, :, k], its[name][teammate]), name


def test_following_actions_are_those_of_the_next_row_where_the_episode_goes_on():
    team = random_team(n=10, num_agents=2)
    goes_on = np.array([1, 1, 0, 1, 1, 1, 0, 1, 1, 0], bool)  # the last row ends the data
    for t in range(9):
        if goes_on[t]:
            team.next_obs[t] = team.obs[t + 1]
    team.terminations[:] = team.truncations[:] = False
    team.terminations[4] = True  # though the next row begins where it ended
    replay = Replay(team, 2, 2, 4)
    index = torch.arange(10).expand(4, -1)
    expected = torch.as_tensor(goes_on & ~team.terminations).float().expand(4, -1)
    for deployments in (0, 1):
        if deployments:
            add_deployment(replay)
        batch = replay.gather_following(index)
        actions, is_followed = batch.pop("next_actions"), batch.pop("is_followed")
        assert torch.equal(is_followed, expected)
        assert all(torch.equal(batch[key], value) for key, value in replay.gather(index).items())
        own = replay.gather(torch.arange(1, 10).expand(4, -1))["actions"]
        assert torch.equal(actions[:, :9], own)
    # online rows: random numbers do not follow one another, until they are made to
    online = torch.arange(10, 14).expand(4, -1)
    assert replay.gather_following(online)["is_followed"].sum() == 0
    rows = replay.num_offline + replay.capacity  # seed 1's first online row
    replay.next_obs[0, rows] = replay.obs[0, rows + 1]
    is_followed = replay.gather_following(online)["is_followed"]
    assert is_followed.tolist() == [[0, 0, 0, 0]] * 2 + [[1, 0, 0, 0]] * 2
