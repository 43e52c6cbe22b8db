"""OMAR's particle tasks: physics and rewards against plain float64 loops, data, PettingZoo."""

import math

import h5py
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from pettingzoo.test import parallel_api_test

from behaviours import select_teams, train_teams
from common import InputError
from common.datasets import load, makers, parse_env
from common.datasets.makers import mpe as teams
from common.datasets.names import BUILT_IN_SIZES
from common.envs import TASKS, make_vec, mpe, normalized_score, parallel_env
from tools import render

MPE = [task for task, row in TASKS.items() if row.family == "mpe"]
CHASES = ["simple-tag", "simple-world"]
SOME = ["simple-spread", "simple-spread-1", *CHASES]


def uniform_actions(vec, rng):
    return rng.uniform(-1, 1, (vec.num_envs, vec.num_agents, 2)).astype(np.float32)


# --- Dynamics, rewards and observations, one team and one number at a time ---


def length(v):
    return math.sqrt(v[0] ** 2 + v[1] ** 2)


def minus(p, q):
    return [p[0] - q[0], p[1] - q[1]]


def loop_step(vec, at, velocity, actions):
    """(positions, velocities) of one team after a step, lists of [x, y]; actions of all movers."""
    movers, solid = len(velocity), vec.num_solid
    force = [[gain * u for u in action] for gain, action in zip(vec.gains, actions, strict=True)]
    for i in range(movers):
        for j in range(solid):
            if i == j:
                continue
            apart = minus(at[i], at[j])
            overlap = (vec.sizes[i] + vec.sizes[j] - length(apart)) / 1e-3
            soft = 1e-3 * (overlap if overlap > 30 else math.log1p(math.exp(max(overlap, -700))))
            for axis in (0, 1):
                force[i][axis] += 100 * apart[axis] / length(apart) * soft
    at, after = [list(p) for p in at], []
    for i in range(movers):
        v = [0.75 * velocity[i][axis] + 0.1 * force[i][axis] for axis in (0, 1)]
        if length(v) > vec.top_speeds[i]:
            v = [x * vec.top_speeds[i] / length(v) for x in v]
        after.append(v)
        at[i] = [at[i][axis] + 0.1 * v[axis] for axis in (0, 1)]
    return at, after


def loop_reward(vec, at):
    """The team's reward in one team."""

    def overlap(i, j):
        return length(minus(at[i], at[j])) < vec.sizes[i] + vec.sizes[j]

    if vec.task == "simple-spread":
        n, own = vec.num_agents, []
        for i in range(n):
            closest = [min(length(minus(at[k], mark)) for k in range(n)) for mark in at[n:]]
            crashes = sum(overlap(i, j) for j in range(n) if j != i)
            own.append(sum(min(1 / d, 10) for d in closest) - 5 * crashes)
        return sum(own) / n
    catch = {"simple-tag": 10, "simple-world": 5}[vec.task]
    near = sum(length(minus(at[i], at[3])) for i in range(3))
    return catch * sum(overlap(i, 3) for i in range(3)) - 0.1 * near


def loop_obs(vec, at, velocity, i):
    movers = len(velocity)
    obs = [*velocity[i], *at[i]]
    for j in [*range(movers, len(at)), *(j for j in range(movers) if j != i)]:
        obs += minus(at[j], at[i])
    if vec.task == "simple-spread":
        return obs + [0.0] * 2 * (movers - 1)
    if i < 3:
        obs += velocity[3]
    if vec.task == "simple-world":
        obs += [1 if length(minus(at[i], at[j])) < vec.sizes[i] + 0.3 else -1 for j in (7, 8)]
    return obs


def loop_prey(vec, obs):
    h = np.array(obs)
    for k in (0, 1):
        h = np.maximum(h @ vec.prey[f"w{k}"].astype(float) + vec.prey[f"b{k}"], 0)
    return np.tanh(h @ vec.prey["w2"].astype(float) + vec.prey["b2"]).tolist()


@pytest.mark.parametrize("task", MPE)
def test_equals_a_plain_loop(task):
    num_envs, crowd = 8, 0.5
    vec, rng = make_vec(task, num_envs, 1), np.random.default_rng(0)
    obs = vec.reset()
    vec.at *= crowd  # so that bodies touch
    obs = vec.observe()
    assert obs.shape == (num_envs, vec.num_agents, vec.obs_dim) and obs.dtype == np.float32
    assert vec.own_obs_dim[0] == vec.obs_dim
    touched = 0
    for t in range(1, 53):
        at, velocity = (np.float64(x).transpose(2, 0, 1).tolist() for x in (vec.at, vec.velocity))
        # beyond the box, often towards the middle of the others
        middle = -vec.at[: vec.num_agents].transpose(2, 0, 1) * (t % 3)
        actions = 1.3 * uniform_actions(vec, rng) + middle
        obs, rewards, terminations, truncations, final_obs = vec.step(actions)
        for e in range(num_envs):
            moves = np.clip(np.float64(np.float32(actions[e])), -1, 1).tolist()
            if task in CHASES:
                moves.append(loop_prey(vec, loop_obs(vec, at[e], velocity[e], 3)))
            now, speed = loop_step(vec, at[e], velocity[e], moves)
            for i in range(vec.num_agents):
                expected = loop_obs(vec, now, speed, i)
                np.testing.assert_allclose(final_obs[e, i], expected, atol=2e-5)
            reward = loop_reward(vec, now)
            # 1 / distance near its ceiling, and contacts at the last digit
            np.testing.assert_allclose(rewards[e], reward, atol=2e-3)
            touched += len(np.unique(np.round(speed, 3))) > 0 and reward != loop_reward(vec, at[e])
        assert not terminations.any() and truncations.all() == truncations.any() == (t % 25 == 0)
        if truncations.any():
            assert (vec.velocity == 0).all() and (obs[:, :, :2] == 0).all()
            vec.at *= crowd
        else:
            assert (obs == final_obs).all()
    assert touched


def test_contact_pushes_apart_as_much_as_it_should():
    vec = make_vec("simple-spread-2", 1, 0)
    vec.reset()
    still = np.zeros((1, 2, 2))
    vec.at[:2, :, 0] = [[0, 0], [0.3, 0]]  # they just touch: softplus(0) = log 2
    vec.step(still)
    force = 100 * 1e-3 * math.log(2)
    np.testing.assert_allclose(vec.velocity[:, :, 0], [[-0.1 * force, 0], [0.1 * force, 0]], 1e-4)
    vec.reset()
    vec.at[:2, :, 0] = [[0, 0], [0, 0.2]]  # 0.1 deep: 100 * 0.1
    vec.step(still)
    np.testing.assert_allclose(vec.velocity[:, :, 0], [[0, -1], [0, 1]], atol=1e-5)
    np.testing.assert_allclose(vec.at[:2, :, 0], [[0, -0.1], [0, 0.3]], atol=1e-5)
    vec.at[:2] = 0  # in the same place nobody knows where to go
    vec.velocity[:] = 0
    vec.step(still)
    assert (vec.at[:2] == 0).all()


def test_obstacles_push_and_do_not_move():
    vec = make_vec("simple-tag", 1, 0)
    vec.reset()
    vec.at[:, :, 0] = [[0, 0], [2, 2], [-2, 2], [2, -2], [0.2, 0], [-2, -2]]
    vec.step(np.zeros((1, 3, 2)))
    assert vec.velocity[0, 0, 0] == pytest.approx(-0.75)  # 0.075 deep; the others are far
    assert vec.at[4, :, 0].tolist() == pytest.approx([0.2, 0])


def test_forces_and_speeds():
    vec = make_vec("simple-spread-1", 1, 0)
    vec.reset()
    speeds = []
    for _ in range(24):
        vec.step(np.full((1, 1, 2), [1.0, 0.0]))
        speeds.append(float(vec.velocity[0, 0, 0]))
    assert speeds[0] == pytest.approx(0.5) and speeds[1] == pytest.approx(0.875)
    assert speeds[-1] == pytest.approx(2 * (1 - 0.75**24), rel=1e-5)
    vec = mpe.SimpleTag(1, 0, free_prey=True)
    vec.reset()
    vec.at[:, :, 0] = [[0, 0], [5, 0], [0, 5], [5, 5], [-5, 0], [-5, -5]]
    vec.step(np.full((1, 4, 2), [0.1, 0.0]))
    np.testing.assert_allclose(vec.velocity[:, 0, 0], [0.09, 0.09, 0.09, 0.16], rtol=1e-5)
    for _ in range(9):
        vec.step(np.ones((1, 4, 2)))
    np.testing.assert_allclose(np.hypot(*vec.velocity[:, :, 0].T), [1, 1, 1, 1.3], rtol=1e-5)


def test_rewards_by_hand():
    vec = make_vec("simple-spread-2", 1, 0)
    vec.reset()
    vec.at[:, :, 0] = [[0, 0], [1, 0], [0, 0.05], [1, 0.5]]
    assert vec.judge()[0][0] == pytest.approx(10 + 2)
    vec.at[:, :, 0] = [[0, 0], [0.29, 0], [0, 0.5], [0.29, 0.25]]
    assert vec.judge()[0][0] == pytest.approx(2 + 4 - 5)
    vec = make_vec("simple-spread", 1, 0)
    vec.reset()
    vec.at[:3, :, 0], vec.at[3:, :, 0] = [[0, 0], [0.2, 0], [0.4, 0]], [[5, 0]] * 3
    # the middle one meets two others
    assert vec.judge()[0][0] == pytest.approx(3 / 4.6 - 5 * (1 + 2 + 1) / 3)
    for task, catch, size in (("simple-tag", 10, 0.125), ("simple-world", 5, 0.12)):
        vec = make_vec(task, 1, 0)
        vec.reset()
        vec.at[:4, :, 0] = [[0, size - 0.001], [size - 0.001, 0], [0, 1], [0, 0]]
        assert vec.judge()[0][0] == pytest.approx(2 * catch - 0.1 * (2 * size - 0.002 + 1))
        vec.at[:2] += 0.01
        assert vec.judge()[0][0] < 0


def test_the_free_preys_reward():
    for task, cls in mpe.CLASSES.items():
        if task == "simple-spread":
            continue
        vec = cls(1, 0, free_prey=True)
        assert vec.reset().shape == (1, 4, vec.obs_dim)
        vec.at[:, :, 0] = 3
        vec.at[:4, :, 0] = [[0, 0], [0.1, 0], [0, -1], [0, 0]]
        rewards = vec.step(np.zeros((1, 4, 2)))[1]
        assert rewards.shape == (1, 4) and (rewards[0, :3] == rewards[0, 0]).all()
        vec.at[:4, :, 0] = [[1.95, 0], [1.95, 1], [0.95, 0], [0.95, 0]]
        near, weight = 0.1 * (1 + math.sqrt(2)), {"simple-tag": 1, "simple-world": 2}[task]
        own = vec.judge()[0][0, 3]
        assert own == pytest.approx(near - vec.CATCH - weight * 0.5, rel=1e-4)
        vec.at[3, :, 0] = [-4, 1.5]  # per axis at most 10; exp(1) at 1.5
        assert vec.outside()[0] == pytest.approx(10 + math.e)
    vec.at[:3], vec.at[3, :, 0], vec.at[5:7, :, 0] = 9, [0, 0], [[0, 0.05], [0.05, 0]]
    assert vec.prey_bonus()[0] == 4


# --- Seeds ---


@pytest.mark.parametrize("task", SOME)
def test_seeds_and_batches(task):
    many, again, other = make_vec(task, 6, 3), make_vec(task, 6, 3), make_vec(task, 6, 4)
    one = make_vec(task, 1, 0)
    obs = many.reset()
    assert (obs == again.reset()).all() and (obs != other.reset()).any()
    assert len(np.unique(obs[:, 0], axis=0)) == 6
    seeds = np.random.SeedSequence(3).generate_state(6)
    one.seed_teams(seeds[4:5])
    np.testing.assert_array_equal(one.start(one.everyone)[0], obs[4])
    rng = np.random.default_rng(0)
    for _ in range(30):
        actions = uniform_actions(many, rng)
        results, alone = many.step(actions), one.step(actions[4:5])
        for x, y, z in zip(results, again.step(actions), alone, strict=True):
            assert (x == y).all()
            np.testing.assert_allclose(x[4], z[0], atol=1e-4)  # the prey's products round otherwise
    kept = many.reset()
    assert (kept != obs).any() and (kept == again.reset()).all()
    assert (many.reset(seed=3) == obs).all()


def test_teams_do_not_depend_on_each_other():
    vec, same = make_vec("simple-tag", 3, 0), make_vec("simple-tag", 3, 0)
    vec.reset(), same.reset()
    actions = uniform_actions(vec, np.random.default_rng(0))
    changed = actions.copy()
    changed[1:] *= -1
    for x, y in zip(vec.step(actions), same.step(changed), strict=True):
        assert (x[0] == y[0]).all()


def test_where_bodies_start():
    for task in SOME:
        vec = make_vec(task, 2000, 0)
        vec.reset()
        largest = np.abs(vec.at).max(axis=(1, 2))
        np.testing.assert_allclose(largest, np.array(vec.starts), atol=0.005)
        assert (np.abs(vec.at.mean(2)) < 0.06).all() and (vec.velocity == 0).all()


def test_results_stay_as_they_were():
    for num_envs in (1, 3):
        vec = make_vec("simple-spread-2", num_envs, 0)
        obs = vec.reset()
        before = obs.copy()
        obs2, *_, final_obs = vec.step(np.full((num_envs, 2, 2), 0.1))
        obs2[:] = np.nan
        assert (obs == before).all() and np.isfinite(final_obs).all() and np.isfinite(vec.at).all()


# --- PettingZoo and pictures ---


@pytest.mark.parametrize("task", MPE)
def test_parallel_api(task, recwarn):
    parallel_api_test(parallel_env(task), num_cycles=60)
    assert not [w for w in recwarn if "gent" in str(w.message)]


@pytest.mark.parametrize("task", SOME)
def test_parallel_env_equals_vec(task):
    env, vec = parallel_env(task, render_mode="rgb_array"), make_vec(task, 1, 5)
    observations, _ = env.reset(seed=int(np.random.SeedSequence(5).generate_state(1)[0]))
    assert (vec.reset()[0] == np.stack(list(observations.values()))).all()
    first = env.render()
    while env.agents:
        actions = {agent: env.action_space(agent).sample() for agent in env.agents}
        observations, rewards, terminations, truncations, _ = env.step(actions)
        obs, team_rewards, _, team_truncations, final_obs = vec.step(
            np.stack(list(actions.values()))[None]
        )
        assert all(env.observation_space(a).contains(o) for a, o in observations.items())
        assert (final_obs[0] == np.stack(list(observations.values()))).all()
        assert set(rewards.values()) == {team_rewards[0]}
        assert set(truncations.values()) == {team_truncations[0]}
        assert not any(terminations.values()) and (env.state() == final_obs.ravel()).all()
    assert first.dtype == np.uint8 and first.ndim == 3 and (env.render() != first).any()


def test_gif(tmp_path):
    for task in SOME:
        out = tmp_path / f"{task}.gif"
        assert render.main(["--env", task, "--out", str(out), "--steps", "3"]) == 0
        assert len(imageio.imread(out, index=None)) == 3


# --- Data ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path / "cache"))


SHIPPED = [task for task in MPE if teams.policy_file(task).exists()]


@pytest.mark.parametrize("task", ["simple-spread", "simple-tag", "simple-world"])
@pytest.mark.parametrize("quality", BUILT_IN_SIZES["simple-spread"])
def test_built_in_data(cache, task, quality):
    size = 5013
    data = load(f"{task}-{quality}", size=size)
    vec = make_vec(task, 1, 0)
    assert "built-in" in data.source and len(data) == size
    assert data.obs.shape == data.next_obs.shape == (size, vec.num_agents, vec.obs_dim)
    assert data.actions.shape == (size, vec.num_agents, 2) and np.abs(data.actions).max() <= 1
    ends = data.truncations
    assert not data.terminations.any() and ends[-1]
    same = (data.next_obs[:-1] == data.obs[1:]).all((1, 2))
    assert (same == ~ends[:-1]).all()
    assert (np.diff(np.flatnonzero(ends[:-1])) <= 25).all() and ends.sum() <= size / 25 + 11
    # Every agent has its own view: positions in the others' coordinates, and the same distances
    assert (data.agent(0)["obs"] != data.agent(1)["obs"]).any()
    at = data.obs[:, :, 2:4]
    first = 4 + 2 * (vec.num_bodies - vec.num_movers)
    np.testing.assert_allclose(data.obs[:, 0, first : first + 2], at[:, 1] - at[:, 0], atol=1e-6)
    # a velocity after the step is what the next position has moved by
    moved = data.next_obs[:, :, 2:4] - at
    np.testing.assert_allclose(moved, 0.1 * data.next_obs[:, :, :2], atol=1e-6)
    if task != "simple-spread":
        near = np.linalg.norm(data.next_obs[:, :, first + 4 : first + 6], axis=2).sum(1)
        catches = (data.rewards + 0.1 * near) / vec.CATCH
        np.testing.assert_allclose(catches, np.round(catches), atol=1e-5)


@pytest.mark.parametrize("quality", ["random", "expert"])
def test_built_in_data_of_halfcheetah_local(cache, quality):
    """Made as the particle teams' is; each row is the simulator's."""
    data, vec = load(f"halfcheetah-local-{quality}", size=1200), make_vec("halfcheetah-local", 1, 0)
    assert data.obs.shape == data.next_obs.shape == (1200, 2, 11)
    assert data.actions.shape == (1200, 2, 3) and np.abs(data.actions).max() <= 1
    assert not data.terminations.any()
    assert np.flatnonzero(data.truncations).tolist() == [999, 1199]
    assert (data.next_obs[:999] == data.obs[1:1000]).all()
    # The reward is the speed, which every agent observes, less a tenth of the squared actions
    cost, speed = 0.1 * np.square(data.actions).sum((1, 2)), list(vec.seen[0]).index(8)
    expected = data.next_obs[:1000, :, speed].mean(0)
    np.testing.assert_allclose((data.rewards + cost)[:1000].mean(), expected, atol=0.1)
    returns = data.rewards[:1000].sum()
    assert returns > 1000 if quality == "expert" else returns < 0


def test_data_is_reproducible(cache, tmp_path):
    for name in ("a", "b"):
        makers.make("simple-tag", "medium-replay", 2000, tmp_path / name)
    with h5py.File(tmp_path / "a") as a, h5py.File(tmp_path / "b") as b:
        for key in ("observations", "actions", "rewards", "next_observations", "timeouts"):
            assert (a[key][...] == b[key][...]).all()
        assert a["observations"].shape == (2000, 48) and a["actions"].shape == (2000, 6)
        policies = teams.load_policies("simple-tag")
        steps = policies["steps"][policies["replay"]]
        assert a["metadata/policy_steps"][...].tolist() == steps.tolist()
        assert a["metadata/policy_rows"][...].sum() == 2000


@pytest.mark.parametrize("task", SHIPPED)
def test_shipped_policies(task):
    policies, vec = teams.load_policies(task), make_vec(task, 1, 0)
    steps, replay = policies["steps"], policies["replay"]
    medium, expert = policies["medium"], policies["expert"]
    assert steps[0] == 0 and (np.diff(steps) > 0).all() and medium < expert
    assert len(replay) >= 4 and (np.diff(replay) > 0).all() and replay[-1] == medium
    assert policies["w0"].shape[:3] == (len(steps), vec.num_agents, vec.obs_dim)
    assert all(np.isfinite(policies[name]).all() for name in teams.WEIGHTS)
    # the level of every quality, roughly
    scores = {}
    for quality in ("random", "medium", "expert"):
        act = None
        if quality != "random":
            policy = teams.snapshot(policies, int(policies[quality]))
            act = teams.actor(policy, float(policies["noise"]))
        found = select_teams.returns(task, act, 400).mean()
        scores[quality] = normalized_score(task, found)
    assert scores["random"] == pytest.approx(0, abs=10)
    assert scores["medium"] == pytest.approx(50, abs=18)
    assert scores["expert"] == pytest.approx(100, abs=15)


def test_actor_is_the_trained_network(tmp_path):
    args = train_teams.Args("simple-spread-2", tmp_path, hidden_size=7)
    agent = train_teams.TD3(2, 12, 2, args)
    obs = np.random.default_rng(0).normal(size=(5, 2, 12)).astype(np.float32)
    acts = teams.actor(agent.arrays(), 0.0)(obs, np.random.default_rng(0))
    np.testing.assert_allclose(acts, agent.act(obs), atol=1e-6)
    noisy = teams.actor(agent.arrays(), 0.1)(obs.repeat(2000, 0), np.random.default_rng(0))
    assert (noisy - agent.act(obs).repeat(2000, 0)).std() == pytest.approx(0.1, rel=0.05)


# --- Training ---


def test_learners_are_independent_and_descend(tmp_path):
    """Agent 1's data does not change agent 0; critics come to the value of a one-step task."""
    args = train_teams.Args(
        "simple-spread-2", tmp_path, gamma=0.0, hidden_size=16, learning_rate=1e-2, updates=600
    )
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(2, 256, 3, generator=generator)
    actions = torch.rand(2, 256, 1, generator=generator) * 2 - 1
    batch = {"obs": obs, "next_obs": obs, "actions": actions}
    batch["rewards"] = -(actions[:, :, 0] - 0.5 * torch.tanh(obs[:, :, 0])).square()
    batch["terminations"] = torch.zeros(2, 256)
    found = []
    for change in (0.0, 1.0):
        torch.manual_seed(0)
        agent = train_teams.TD3(2, 3, 1, args)
        rewards = batch["rewards"].clone()
        rewards[1] += change
        for _ in range(600):
            agent.update({**batch, "rewards": rewards})
        found.append(agent.arrays())
    assert all((found[0][name][0] == found[1][name][0]).all() for name in found[0])
    assert any((found[0][name][1] != found[1][name][1]).any() for name in found[0])
    best = 0.5 * np.tanh(obs[:, :, :1].numpy())
    acts = agent.act(obs.transpose(0, 1).contiguous().numpy()).transpose(1, 0, 2)
    assert np.abs(acts - best).mean() < 0.1


@pytest.mark.parametrize("task, prey", [("simple-spread-2", False), ("simple-tag", True)])
def test_train_and_select(task, prey, tmp_path):
    args = train_teams.Args(
        task, tmp_path, prey, updates=6, num_envs=4, steps_per_update=20, warmup_steps=100
    )
    args.snapshot_every, args.buffer_size = 2, 150
    train_teams.main(args)
    assert sorted(p.name for p in tmp_path.glob("*.npz")) == [f"{i:07d}.npz" for i in (0, 2, 4, 6)]
    assert len((tmp_path / "returns.csv").read_text().splitlines()) >= 2
    with pytest.raises(InputError, match="holds the snapshots of another training"):
        train_teams.main(args)
    out = tmp_path / "out" / "chosen.npz"
    out.parent.mkdir()
    refused = [("simple-world", 4, "not of a training with --task simple-world --prey$")]
    refused += [
        ("simple-tag", None, "not of a training with --task simple-tag; of one with --prey")
    ]
    refused += [("simple-tag", 70, "--prey 70: no such snapshot.* the nearest is 6")]
    refused += [("simple-spread", 4, "simple-spread has no prey")]
    for its_task, its_prey, words in refused:
        with pytest.raises(InputError, match=words):
            select_teams.main(select_teams.Args(its_task, tmp_path, its_prey, out=out))
    assert not out.exists() and not (tmp_path / "evaluation.csv").exists()
    chosen = select_teams.Args(task, tmp_path, 4 if prey else None, episodes=5, out=out)
    select_teams.main(chosen)
    with np.load(out) as chosen:
        if prey:
            assert chosen["w0"].shape == (14, 64) and chosen["b2"].shape == (2,)
        else:
            assert chosen["steps"][0] == 0 and chosen["w0"].dtype == np.float16
            assert len((tmp_path / "evaluation.csv").read_text().splitlines()) == 6


# --- Names and scores ---


def test_names():
    assert parse_env("simple-spread-medium-replay") == ("simple-spread", "medium-replay")
    assert parse_env("simple-spread-4-expert") == ("simple-spread-4", "expert")
    assert parse_env("simple-world-expert") == ("simple-world", "expert")
    for env, words in (
        ("simple-spread-3-medium", "quality .3-medium.*did you mean medium"),
        ("simple-tags-medium", "did you mean simple-tag"),
    ):
        with pytest.raises(InputError, match=words):
            parse_env(env)
    with pytest.raises(InputError, match="no built-in data for simple-tag-full-replay"):
        load("simple-tag-full-replay")
    with pytest.raises(InputError, match="no data of simple-tag"):
        load("simple-tag-medium", "d4rl")
    with pytest.raises(InputError, match="no joints"):
        make_vec("simple-tag", 1, 0, "1x6")


def test_scores():
    for task in MPE:
        row = TASKS[task]
        assert row.random_return < row.expert_return
        assert normalized_score(task, row.expert_return) == pytest.approx(100)
