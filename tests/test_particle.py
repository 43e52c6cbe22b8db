"""The particle tasks against plain loops, their data, their face for PettingZoo, their pictures."""

import json
import math

import h5py
import imageio.v3 as imageio
import numpy as np
import pytest
from pettingzoo.test import parallel_api_test

import otc_bcq
from common import InputError, cli
from common.datasets import load, makers, parse_env
from common.datasets.makers import episodes
from common.envs import TASKS, VecEnv, make_vec, normalized_score, parallel_env
from common.envs.particle import Streams
from tools import check_data
from tools import render as render_tool

F = np.float32
PARTICLE = [task for task, row in TASKS.items() if row.family == "particle"]
SOME = ["predator-prey", "navigation", "cooperative-navigation-2", "cooperative-navigation-4"]


def uniform_actions(vec, rng):
    return rng.uniform(vec.action_low, vec.action_high, (vec.num_envs, vec.num_agents, 2))


def world(vec, e):
    """The positions of team e: a list of [x, y] per body."""
    return [[F(x), F(y)] for x, y in vec.at[:, :, e]]


# --- Dynamics and rewards, one environment and one number at a time ---


def clip(x, bound):
    return max(F(-bound), min(F(bound), x))


def distance(p, q):
    return F(math.sqrt((p[0] - q[0]) * (p[0] - q[0]) + (p[1] - q[1]) * (p[1] - q[1])))


def prey_flees(bodies, wall=0.7, speed=0.15):
    *agents, prey = bodies
    if min(distance(agent, prey) for agent in agents) >= 0.2:
        return prey
    push = [F(0), F(0)]
    for axis in (0, 1):
        for agent in agents:
            d = distance(prey, agent)
            push[axis] += (prey[axis] - agent[axis]) / max(d * d * d, F(1e-6))
        low, high = max(prey[axis] + F(wall), F(0.02)), max(F(wall) - prey[axis], F(0.02))
        push[axis] += F(0.1) * (1 / (low * low) - 1 / (high * high))
    largest = max(abs(push[0]), abs(push[1]), F(1e-6))
    return [clip(prey[axis] + F(speed) * push[axis] / largest, wall) for axis in (0, 1)]


def loop_step(task, bodies, actions, beta):
    """(bodies, reward, terminated) after one step of one team."""
    num_agents = len(actions)
    bodies = [list(body) for body in bodies]
    wall = 0.7 if task == "predator-prey" else 1.0
    bound = 1.0 if task == "navigation" else 0.1
    for body, action in zip(bodies, actions, strict=False):
        for axis in (0, 1):
            move = clip(F(action[axis]), bound)
            body[axis] = clip(body[axis] + (beta * move if task == "navigation" else move), wall)
    agents, others = bodies[:num_agents], bodies[num_agents:]
    if task == "predator-prey":
        bodies[-1] = prey_flees(bodies)
        return bodies, float(any(distance(a, bodies[-1]) < 0.1 for a in agents)), False
    if task == "navigation":
        reached = distance(agents[0], others[0]) < 0.1
        return bodies, 10.0 * reached, reached
    return bodies, -sum(min(distance(a, mark) for a in agents) for mark in others), False


@pytest.mark.parametrize("task", SOME)
def test_equals_a_plain_loop(task):
    num_envs = 10
    vec, rng = make_vec(task, num_envs, 1), np.random.default_rng(0)
    vec.set_deployment(3, 5)  # of navigation: beta is 0.15
    obs = vec.reset()
    assert obs.shape == (num_envs, vec.num_agents, vec.obs_dim) and obs.dtype == np.float32
    elapsed, touched = np.zeros(num_envs, int), 0
    for t in range(110):
        bodies = [world(vec, e) for e in range(num_envs)]
        for e in range(num_envs):
            assert (obs[e] == np.ravel(bodies[e])).all()
        # beyond the box, towards the others, so that the edges and the prey's alarm are met
        chase = vec.at[vec.num_agents :].mean(0) - vec.at[: vec.num_agents]
        actions = uniform_actions(vec, rng) * 1.5 + 0.5 * chase.transpose(2, 0, 1) * (t % 3)
        obs, rewards, terminations, truncations, final_obs = vec.step(actions)
        elapsed += 1
        for e in range(num_envs):
            following, reward, ended = loop_step(task, bodies[e], actions[e], F(0.15))
            np.testing.assert_allclose(final_obs[e, 0], np.ravel(following), atol=1e-5)
            np.testing.assert_allclose(rewards[e], reward, atol=1e-5)
            assert terminations[e] == ended
            touched += reward > 0
            assert truncations[e] == (elapsed[e] == vec.max_episode_steps)
            if ended or truncations[e]:
                elapsed[e] = 0
                assert (obs[e] != final_obs[e]).any()
            else:
                assert (obs[e] == final_obs[e]).all()
        assert (final_obs == final_obs[:, :1]).all()  # all agents see the same
    assert task.startswith("coop") or touched > 2


def test_cooperative_navigation_by_hand():
    vec = make_vec("cooperative-navigation-2", 1, 0)
    vec.reset()
    vec.at[:, :, 0] = [[0, 0], [0.5, 0], [0, 0.3], [0.5, 0.4]]
    _, rewards, *_ = vec.step(np.zeros((1, 2, 2)))
    assert rewards[0] == pytest.approx(-0.7)
    vec.at[:, :, 0] = [[0, 0], [0.9, 0.9], [0, 0], [0, 0.1]]  # one agent may cover both
    assert vec.step(np.zeros((1, 2, 2)))[1][0] == pytest.approx(-0.1)


def test_touching_pays_one_however_many_touch():
    vec = make_vec("predator-prey", 1, 0)
    vec.reset()
    vec.at[:, :, 0] = [[0.65, 0.65], [0.6, 0.69], [0.69, 0.6], [0.7, 0.7]]
    rewards, terminations = vec.judge()
    assert rewards[0] == 1 and not terminations[0]
    vec.at[:3, :, 0] = 0
    assert vec.judge()[0][0] == 0


# --- The prey ---


def test_prey_rests_until_an_agent_is_near_and_is_faster():
    vec = make_vec("predator-prey", 500, 0)
    rng = np.random.default_rng(0)
    vec.reset()
    largest = 0.0
    for _ in range(100):
        agents, prey = vec.at[:-1].copy(), vec.at[-1].copy()
        actions = uniform_actions(vec, rng) + 0.1 * np.sign((prey - agents).transpose(2, 0, 1))
        ended = vec.elapsed == vec.max_episode_steps - 1
        vec.step(actions)
        moved = np.clip(agents + np.clip(actions, -0.1, 0.1).transpose(1, 2, 0), -0.7, 0.7)
        near = np.hypot(*np.moveaxis(moved - prey, 1, 0)).min(0) < 0.2
        step = np.abs(vec.at[-1] - prey).max(0)[~ended]
        assert (step[~near[~ended]] == 0).all() and (step <= 0.15 + 1e-6).all()
        largest = max(largest, step.max(initial=0))
        assert (np.abs(vec.at) <= F(0.7)).all()
    assert largest == pytest.approx(0.15)


def test_prey_runs_away_and_off_the_wall():
    vec = make_vec("predator-prey", 1, 0)
    vec.reset()
    far = [-0.6, -0.6]
    vec.at[:, :, 0] = [[-0.1, 0], far, far, [0, 0]]
    x, y = vec.flight()[:, 0]
    assert x == pytest.approx(0.15) and abs(y) < 0.02
    vec.at[:, :, 0] = [[0, 0.5], far, far, [0, 0.69]]  # against the wall it turns aside, or passes
    assert vec.flight()[1, 0] < 0
    vec.at[:, :, 0] = [[0, 0]] * 4  # an agent on top of it
    assert np.isfinite(vec.flight()).all()


def test_the_prey_needs_three():
    from benchmarks.particle import returns

    random, one, corner = (
        returns("predator-prey", play, 100).mean() for play in ("random", "one", "corner")
    )
    assert random < 1 < one < 8 and corner > 20 > 2.5 * one


# --- Seeds ---


def test_numbers_of_the_streams():
    streams, everyone = Streams(3), np.ones(3, bool)
    streams.seed(np.array([1, 2, 1], np.uint64))
    numbers = streams.draw(50_000, everyone)
    assert numbers.dtype == np.float32 and (numbers[:, 0] == numbers[:, 2]).all()
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers[:, :2].mean() - 0.5) < 0.005 and abs(numbers[:, 1].var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(numbers[:, 0], numbers[:, 1])[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers[1:, 0], numbers[:-1, 0])[0, 1]) < 0.02
    state = 1 + int(Streams.STEP)  # the published SplitMix64 in plain integers

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    state = mix(state % 2**64)
    for number in numbers[:5, 0]:
        state = (state + int(Streams.STEP)) % 2**64
        assert number == (mix(state) >> 40) / 2**24


@pytest.mark.parametrize("task", SOME)
def test_seeds_and_batches(task):
    many, again, other = make_vec(task, 6, 3), make_vec(task, 6, 3), make_vec(task, 6, 4)
    one = make_vec(task, 1, 0)
    obs = many.reset()
    assert (obs == again.reset()).all() and (obs != other.reset()).any()
    assert len(np.unique(obs[:, 0], axis=0)) == 6
    seeds = np.random.SeedSequence(3).generate_state(6)
    one.seed_teams(seeds[4:5])
    assert (one.start(one.everyone)[0] == obs[4]).all()
    rng = np.random.default_rng(0)
    for _ in range(70):
        actions = uniform_actions(many, rng)
        results, alone = many.step(actions), one.step(actions[4:5])
        for x, y, z in zip(results, again.step(actions), alone, strict=True):
            assert (x == y).all() and (x[4] == z[0]).all()
    kept = many.reset()
    assert (kept != obs).any() and (kept == again.reset()).all()
    assert (many.reset(seed=(3, 1)) == again.reset(seed=(3, 1))).all()
    assert (many.reset(seed=3) == obs).all()


def test_results_stay_as_they_were():
    for num_envs in (1, 3):
        vec = make_vec("cooperative-navigation-2", num_envs, 0)
        obs = vec.reset()
        before = obs.copy()
        obs2, *_, final_obs = vec.step(np.full((num_envs, 2, 2), 0.1))
        obs2[:] = np.nan
        assert (obs == before).all() and np.isfinite(final_obs).all() and np.isfinite(vec.at).all()


# --- Navigation's beta ---


def betas(vec, steps=200):
    """The beta of every step that no edge cut short and after which no episode began."""
    found = []
    vec.reset()
    for _ in range(steps):
        before = vec.at[0].copy()
        actions = np.full((vec.num_envs, 1, 2), (1.0, 0.5))
        *_, terminations, truncations, final_obs = vec.step(actions)
        moved = final_obs[:, 0, :2].T - before
        inside = (np.abs(final_obs[:, 0, :2]) < 1).all(1)
        found.append(moved[0, inside])
        np.testing.assert_allclose(moved[1, inside], moved[0, inside] / 2, atol=1e-6)
    return np.concatenate(found)


def test_beta_in_the_data_and_over_the_deployments():
    vec = make_vec("navigation", 50, 0)
    found = betas(vec)
    assert found.min() < -0.19 and found.max() > 0.19 and np.abs(found).max() <= 0.2 + 1e-6
    assert abs(found.mean()) < 0.005 and abs(found.var() - 0.04 / 3) < 1e-3
    for k, beta in ((1, 0.1), (2, 0.125), (5, 0.2), (6, 0.2)):
        vec.set_deployment(k, 5)
        np.testing.assert_allclose(betas(vec, 20), beta, atol=1e-6)
    for k, beta in ((1, 0.1), (2, 0.2)):
        vec.set_deployment(k, 1)
        np.testing.assert_allclose(betas(vec, 5), beta, atol=1e-6)
    vec.set_deployment(1, 0)  # no deployments: where pi^0 is judged
    np.testing.assert_allclose(betas(vec, 5), 0.2, atol=1e-6)
    vec.set_deployment(0, 5)
    assert betas(vec, 20).std() > 0.1


def test_other_tasks_do_not_change():
    for task in ("hopper", "predator-prey", "cooperative-navigation-2", "tests.test_envs:Team"):
        vec, same = make_vec(task, 1, 0), make_vec(task, 1, 0)
        vec.set_deployment(7, 10)
        assert (vec.reset() == same.reset()).all()
        actions = np.zeros((1, vec.num_agents, vec.action_dim))
        assert all((x == y).all() for x, y in zip(vec.step(actions), same.step(actions), strict=1))


def test_a_users_env_may_change():
    class Changing:
        num_agents, obs_dim, max_episode_steps = 1, 1, 5
        action_low, action_high = np.full((1, 1), -1.0), np.ones((1, 1))

        def set_deployment(self, k, num_deployments):
            self.told = k, num_deployments

    vec = VecEnv([Changing(), Changing()], 0)
    vec.set_deployment(2, 3)
    assert [team.told for team in vec.teams] == [(2, 3)] * 2


# --- PettingZoo ---


@pytest.mark.parametrize("task", PARTICLE)
def test_parallel_api(task, recwarn):
    parallel_api_test(parallel_env(task), num_cycles=60)
    assert not [w for w in recwarn if "gent" in str(w.message)]


@pytest.mark.parametrize("task", SOME)
def test_parallel_env_equals_vec(task):
    env, vec = parallel_env(task), make_vec(task, 1, 5)
    observations, _ = env.reset(seed=int(np.random.SeedSequence(5).generate_state(1)[0]))
    assert (vec.reset()[0, 0] == observations["agent_0"]).all()
    while env.agents:
        actions = {agent: env.action_space(agent).sample() for agent in env.agents}
        joint = np.stack(list(actions.values()))[None]
        observations, rewards, terminations, truncations, _ = env.step(actions)
        obs, team_rewards, team_terminations, team_truncations, final_obs = vec.step(joint)
        assert all(env.observation_space(a).contains(o) for a, o in observations.items())
        assert (final_obs[0, 0] == observations["agent_0"]).all()
        assert team_rewards[0] == rewards["agent_0"]
        assert team_terminations[0] == terminations["agent_0"]
        assert team_truncations[0] == truncations["agent_0"]
        assert (env.state() == final_obs[0, 0]).all()
    assert (env.reset()[0]["agent_0"] == obs[0, 0]).all()  # the next episode, of the same stream


@pytest.mark.parametrize("task", SOME)
def test_pictures(task):
    env = parallel_env(task, render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[2] == 3
    env.step({agent: env.action_space(agent).high for agent in env.agents})
    assert (env.render() != first).any()
    assert parallel_env(task).render() is None
    with pytest.raises(InputError, match="rgb_array"):
        parallel_env(task, render_mode="human")


# --- Data ---


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("task", SOME)
def test_built_in_data(task):
    size = 60_000 + 7
    data = load(f"{task}-random", size=size)
    vec = make_vec(task, 1, 0)
    assert "built-in" in data.source and len(data) == size
    assert data.obs.shape == data.next_obs.shape == (size, 1, vec.obs_dim)
    assert data.actions.shape == (size, vec.num_agents, 2)
    flat = data.actions.reshape(-1)
    histogram = np.histogram(flat, 10, (-1, 1))[0] / len(flat)
    np.testing.assert_allclose(histogram, 0.1, atol=0.005)
    assert (
        np.abs(np.corrcoef(data.actions.reshape(size, -1).T) - np.eye(2 * vec.num_agents)).max()
        < 0.02
    )
    ends = data.terminations | data.truncations
    lengths = np.diff(np.flatnonzero(np.append(True, ends)))
    same = (data.next_obs[:-1] == data.obs[1:]).all((1, 2))
    assert (same == ~ends[:-1]).all()
    whole = data.truncations[:-1].nonzero()[0]
    if task == "navigation":
        assert lengths.max() == 25
        assert (data.rewards == 10 * data.terminations).all() and 50 < data.terminations.sum() < 300
    else:
        assert not data.terminations.any() and (lengths[:-1] == vec.max_episode_steps).all()
    assert len(whole) > 1000 and not (data.terminations & data.truncations).any()
    if task == "predator-prey":
        assert set(np.unique(data.rewards)) == {0, 1} and 0.0005 < data.rewards.mean() < 0.005
    # the dynamics of the stored transitions
    if task != "navigation":
        n = vec.num_agents
        step = data.next_obs[:, 0, : 2 * n] - data.obs[:, 0, : 2 * n]
        inside = np.abs(data.next_obs[:, 0, : 2 * n]) < vec.half_width
        difference = np.abs(step - 0.1 * data.actions.reshape(size, -1))[inside]
        assert difference.max() < 1e-6
    else:
        beta = (data.next_obs - data.obs)[:, 0, 0] / data.actions[:, 0, 0]
        clear = (np.abs(data.next_obs[:, 0, 0]) < 1) & (np.abs(data.actions[:, 0, 0]) > 0.1)
        assert np.abs(beta[clear]).max() < 0.2001 and abs(beta[clear].mean()) < 0.005


def test_data_is_in_the_agents_box_and_reproducible(tmp_path):
    for name in ("a", "b"):
        makers.make("cooperative-navigation-2", "random", 30_000, tmp_path / name)
    with h5py.File(tmp_path / "a") as a, h5py.File(tmp_path / "b") as b:
        for key in ("observations", "actions", "rewards", "next_observations", "timeouts"):
            assert (a[key][...] == b[key][...]).all()
        assert a["actions"].shape == (30_000, 4) and np.abs(a["actions"]).max() <= F(0.1)
        assert a["metadata/algorithm"][()] == b"uniform actions"
        a_second = a["observations"][25_600 : 25_600 + 50]
        assert (a_second != a["observations"][:50]).any()  # batches differ


def test_the_wind_is_as_told_and_only_who_knows_it_stays_in_the_middle():
    num_envs, returns = 500, {}
    vec = make_vec("wind", num_envs, 0)
    for k in (0, 3):
        for knows in (False, True):
            vec.set_deployment(k, 5)
            obs, total = vec.reset(seed=1), 0
            for _ in range(25):
                x, y = at = obs[:, 0].T
                push = 0.15 * np.stack([np.cos(3 * y), np.sin(3 * x + 1)])
                actions = np.clip(-at - push * knows, -0.2, 0.2).T[:, None]
                _, rewards, ends, _, final_obs = vec.step(actions)
                expected = np.clip(at + actions[:, 0].T + push, -1, 1)
                error = np.abs(final_obs[:, 0].T - expected)
                assert error.max() < (1e-6 if k else 0.301) and (k or error.mean() > 0.05)
                apart = np.hypot(*final_obs[:, 0].T)
                np.testing.assert_allclose(rewards, np.maximum(0, 1 - apart / 0.2), atol=1e-5)
                assert not ends.any()
                total, obs = total + rewards, final_obs
            returns[k, knows] = total.mean()
    assert returns[3, True] > 20 and returns[3, False] < 0.5 and returns[0, False] > 9


def test_the_winds_data_knows_nothing_of_its_policy(tmp_path):
    makers.make("wind", "random", 20_000, tmp_path / "wind")
    with h5py.File(tmp_path / "wind") as file:
        obs, next_obs, actions = (
            file[k][...] for k in ("observations", "next_observations", "actions")
        )
    pushed, inside = next_obs - obs - actions, (np.abs(next_obs) < 1).all(1)
    assert np.abs(actions).max() <= F(0.2) and np.abs(pushed[inside]).max() < 0.1501
    middle = pushed[inside & (np.abs(obs) < 0.5).all(1)]
    histogram = np.histogram(middle, 6, (-0.15, 0.15))[0] / middle.size
    np.testing.assert_allclose(histogram, 1 / 6, atol=0.02)


def test_early_ends_leave_whole_episodes(monkeypatch):
    monkeypatch.setattr(episodes, "EPISODES", 64)
    batches = episodes.roll_out("navigation")
    for _ in range(3):
        rows = next(batches)
        ends = rows["terminals"] | rows["timeouts"]
        assert ends.sum() == 64 and ends[-1]


# --- Names and scores ---


def test_names():
    assert parse_env("cooperative-navigation-3-random") == ("cooperative-navigation-3", "random")
    assert parse_env("cooperative-navigation-10-random") == ("cooperative-navigation-10", "random")
    assert parse_env("cooperative-navigation-10") == ("cooperative-navigation-10", "")
    assert parse_env("predator-prey-medium-replay") == ("predator-prey", "medium-replay")
    assert parse_env("navigation-random") == ("navigation", "random")


@pytest.mark.parametrize(
    "env, dataset, split, words",
    [
        ("cooperative-navigation-11-random", "built-in", None, "-11'.*N from 2 to 10"),
        ("cooperative-navigation-1-random", "built-in", None, "N from 2 to 10"),
        ("cooperative-navigation-random", "built-in", None, "N from 2 to 10"),
        ("cooperative-navigation", "built-in", None, "N from 2 to 10"),
        ("predator-pray-random", "built-in", None, "'predator-pray'.*predator-prey"),
        ("predator-prey-rando", "built-in", None, "quality 'rando'.*random"),
        ("predator-prey-medium", "built-in", None, "no built-in data for predator-prey-medium"),
        ("predator-prey", "built-in", None, "expected for example predator-prey-random"),
        ("navigation-random", "d4rl", None, "no data of navigation"),
        ("navigation-random", "built-in", "1x2", "no joints"),
    ],
)
def test_wrong_names_of_data(env, dataset, split, words):
    with pytest.raises(InputError, match=words):
        load(env, dataset, split=split)


def test_a_script_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["otc_bcq.py", "--env", "cooperative-navigation-11-random"])
    with pytest.raises(SystemExit) as stop:
        cli.cli(otc_bcq.main, otc_bcq.Args)
    assert stop.value.code == 2 and "N from 2 to 10" in capsys.readouterr().err


def test_check_is_for_mujoco(tmp_path, capsys):
    command = [str(tmp_path / "x.hdf5"), "--env", "navigation"]
    assert check_data.main(command) == 2 and "halfcheetah" in capsys.readouterr().err


def test_scores():
    assert normalized_score("navigation", [0.0, 5.0]).tolist() == [0, 50]
    for task in PARTICLE:
        row = TASKS[task]
        assert row.random_return < row.expert_return
        assert normalized_score(task, row.expert_return) == pytest.approx(100)


# --- python -m tools.render ---


def render(*argv):
    return render_tool.main(list(map(str, argv)))


def test_gif_of_random_actions(tmp_path, capsys):
    out = tmp_path / "a.gif"
    assert render("--env", "navigation-random", "--out", out, "--steps", 7) == 0
    frames = imageio.imread(out, index=None)
    assert len(frames) == 7 and "navigation" in capsys.readouterr().out
    content = out.read_bytes()
    assert render("--env", "predator-prey", "--out", out) == 2
    assert "not overwritten" in capsys.readouterr().err and out.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--env", "navigation", "--out", "x.mp4"], "ends in .gif"),
        (["--env", "navigation", "--out", "no_such_folder/x.gif"], "no folder"),
        (["--env", "navigatio", "--out", "x.gif"], "did you mean navigation"),
        (["--out", "x.gif"], "--env TASK"),
        (["--run", "nowhere", "--out", "x.gif"], "nowhere is not a run folder"),
        (["--env", "navigation", "--out", "x.gif", "--steps", "0"], "expected at least 1"),
    ],
)
def test_render_errors(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert render(*argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") <= 2 and not list(tmp_path.iterdir())


def test_gif_of_a_run(tmp_path, monkeypatch, capsys):
    """Two seeds of BCQ on a tiny data set; each folder's picture shows its own seed's policy."""
    args = otc_bcq.Args(
        env="cooperative-navigation-2-random",
        dataset_size=500,
        num_seeds=2,
        offline_updates=3,
        deployments=1,
        deployment_steps=50,
        finetune_updates=2,
        references=20,
        candidates=30,
        batch_size=8,
        run_dir=str(tmp_path / "runs"),
        device="cpu",
    )
    otc_bcq.main(args)
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    seen = []
    for i, folder in enumerate(folders):
        out = tmp_path / f"{i}.gif"
        assert render("--run", folder, "--out", out, "--steps", 5) == 0
        seen.append(out.read_bytes())
    assert seen[0] != seen[1]
    capsys.readouterr()
    assert render("--run", folder, "--env", "predator-prey", "--out", tmp_path / "2.gif") == 2
    assert "not trained on such a task" in capsys.readouterr().err
    info = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**info, "script": "no_such_script"}))
    assert render("--run", folder, "--out", tmp_path / "2.gif") == 2
    assert "no_such_script" in capsys.readouterr().err


def test_gif_of_mujoco_in_the_agents_colours(tmp_path):
    mujoco = pytest.importorskip("mujoco")
    if render("--env", "halfcheetah", "--out", tmp_path / "a.gif", "--steps", 2) == 2:
        pytest.skip("MuJoCo cannot draw here")
    assert len(imageio.imread(tmp_path / "a.gif", index=None)) == 2
    env = parallel_env("halfcheetah", render_mode="rgb_array")
    model = env.env.unwrapped.model
    colours = {}
    for name in ("bthigh", "bfoot", "fthigh", "ffoot", "torso"):
        body = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, name)
        colours[name] = tuple(model.geom_rgba[model.geom_bodyid == body][0].round(2))
    assert colours["bthigh"] == colours["bfoot"] != colours["fthigh"] == colours["ffoot"]
    assert colours["torso"] not in (colours["bthigh"], colours["fthigh"])
