"""The mazes: D4RL's own model, starts and rewards, PettingZoo, the built-in data, D4RL's files."""

import sys

import h5py
import mujoco
import numpy as np
import pytest
from pettingzoo.test import parallel_api_test

from common import InputError
from common.datasets import files, load, makers, parse_env, readers
from common.datasets.makers import maze as waypoints
from common.datasets.makers.maze import Controller, shortest_path
from common.envs import TASKS, make_vec, normalized_score, parallel_env
from tools import render

pytest.importorskip(
    "gymnasium_robotics", reason="gymnasium-robotics (requirements-dev.txt) is not installed"
)
MAZES = [task for task, row in TASKS.items() if row.family == "maze"]
# D4RL's maps; G is the goal
MAPS = {
    "maze2d-umaze": ("#####", "#G  #", "### #", "#   #", "#####"),
    "maze2d-medium": (
        "########",
        "#  ##  #",
        "#  #   #",
        "##   ###",
        "#  #   #",
        "# #  # #",
        "#   # G#",
        "########",
    ),
    "maze2d-large": (
        "############",
        "#    #     #",
        "# ## # # # #",
        "#      #   #",
        "# #### ### #",
        "#  # #     #",
        "## # # # ###",
        "#  #   # G #",
        "############",
    ),
}


def d4rl_model(task):
    """D4RL's simulator: walls centred at 1 + (row, column), the ball's coordinates from 1.2 on."""
    walls = [
        f'<geom type="box" size="0.5 0.5 0.2" pos="{i + 1} {j + 1} 0" conaffinity="1"/>'
        for i, row in enumerate(MAPS[task])
        for j, tile in enumerate(row)
        if tile == "#"
    ]
    joints = [
        f'<joint name="{n}" type="slide" axis="{a}"/>' for n, a in (("x", "1 0 0"), ("y", "0 1 0"))
    ]
    motors = [f'<motor joint="{n}" ctrlrange="-1 1" ctrllimited="true" gear="100"/>' for n in "xy"]
    return mujoco.MjModel.from_xml_string(f"""<mujoco>
        <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
        <default>
          <joint damping="1"/>
          <geom friction=".5 .1 .1" density="1000" margin="0.002" condim="1" contype="2"
                conaffinity="1"/>
        </default>
        <worldbody>{"".join(walls)}
          <body pos="1.2 1.2 0">{"".join(joints)}<geom type="sphere" size="0.1" contype="1"/></body>
        </worldbody>
        <actuator>{"".join(motors)}</actuator></mujoco>""")


@pytest.mark.parametrize("task", MAZES)
def test_steps_equal_d4rls_simulator(task):
    model = d4rl_model(task)
    data = mujoco.MjData(model)
    goal = next((i, row.index("G")) for i, row in enumerate(MAPS[task]) if "G" in row)
    vec, rng = make_vec(task, 1, 2), np.random.default_rng(0)
    vec.reset()
    touched = rewarded = fast = 0
    for cell in np.argwhere([[tile != "#" for tile in row] for row in MAPS[task]]):
        team = vec.teams[0]
        data.qpos[:], data.qvel[:] = cell + rng.uniform(-0.1, 0.1, 2), rng.uniform(-6, 6, 2)
        obs = team.set_state(data.qpos, data.qvel)
        np.testing.assert_allclose(obs, [*data.qpos, *data.qvel], atol=1e-12)
        vec.elapsed[:] = 0
        for _ in range(60):
            action = rng.uniform(-1.5, 1.5, 2).astype(np.float32)
            fast += (np.abs(data.qvel) > 5).any()
            data.qvel[:] = np.clip(data.qvel, -5, 5)
            data.ctrl[:] = np.clip(action, -1, 1)
            mujoco.mj_step(model, data)
            touched += data.ncon > 0
            _, rewards, terminations, truncations, final_obs = vec.step(action[None, None])
            np.testing.assert_allclose(final_obs[0, 0], [*data.qpos, *data.qvel], atol=1e-4)
            near = np.linalg.norm(data.qpos - goal) <= 0.5
            rewarded += near
            assert rewards[0] == near and not terminations[0] and not truncations[0]
    assert touched > 20 and rewarded > 10 and fast > 0


@pytest.mark.parametrize("task", MAZES)
def test_starts_and_time_limit(task):
    free = {(i, j) for i, row in enumerate(MAPS[task]) for j, t in enumerate(row) if t != "#"}
    vec = make_vec(task, 1, 0)
    assert (vec.num_agents, vec.obs_dim, vec.action_dim) == (1, 4, 2)
    starts = np.array([vec.reset()[0, 0] for _ in range(600)])
    cells = np.round(starts[:, :2])
    assert set(map(tuple, cells.astype(int).tolist())) == free
    spread = np.abs(starts[:, :2] - cells)
    assert 0.09 < spread.max() <= 0.1 and starts[:, 2:].std() == pytest.approx(0.1, rel=0.1)
    limit = {"maze2d-umaze": 300, "maze2d-medium": 600, "maze2d-large": 800}[task]
    for t in range(limit):
        *_, truncations, _ = vec.step(np.zeros((1, 1, 2)))
        assert truncations[0] == (t == limit - 1)
    same, again = make_vec(task, 2, 7), make_vec(task, 2, 7)
    assert (same.reset() == again.reset()).all() and (same.reset() == again.reset()).all()


def test_parallel_api(recwarn):
    parallel_api_test(parallel_env("maze2d-umaze"), num_cycles=700)
    assert not [w for w in recwarn if "gent" in str(w.message)]


def test_parallel_env_equals_vec():
    env, vec = parallel_env("maze2d-umaze"), make_vec("maze2d-umaze", 1, 5)
    obs, _ = env.reset(seed=int(np.random.SeedSequence(5).generate_state(1)[0]))
    assert (vec.reset()[0, 0] == obs["agent_0"].astype(np.float32)).all()
    env.action_space("agent_0").seed(0)
    steps = 0
    while env.agents:
        action = env.action_space("agent_0").sample()
        obs, rewards, _, truncations, _ = env.step({"agent_0": action})
        _, team_rewards, _, team_truncations, final_obs = vec.step(action[None, None])
        steps += 1
        assert (final_obs[0, 0] == obs["agent_0"].astype(np.float32)).all()
        assert (env.state() == obs["agent_0"]).all()
        assert rewards["agent_0"] == team_rewards[0]
        assert truncations["agent_0"] == team_truncations[0] == (steps == 300)
    with pytest.warns(UserWarning, match="call reset first"):
        assert env.step({}) == ({}, {}, {}, {}, {})


def test_bad_input(monkeypatch, capsys, tmp_path):
    with pytest.raises(InputError, match="split 1x2: maze2d-umaze has no joints"):
        make_vec("maze2d-umaze", 1, 0, "1x2")
    for name in ("gymnasium_robotics", "gymnasium_robotics.envs.maze"):
        monkeypatch.setitem(sys.modules, name, None)
    argv = ["--env", "maze2d-umaze", "--out", str(tmp_path / "a.gif")]
    assert render.main(argv) == 2
    error = capsys.readouterr().err
    assert "maze2d-umaze needs gymnasium-robotics: pip install" in error and error.count("\n") == 1


# --- The controller and its data ---


@pytest.mark.parametrize("task", MAZES)
def test_shortest_paths(task):
    cells = [(i, j) for i, row in enumerate(MAPS[task]) for j, t in enumerate(row) if t != "#"]
    apart = np.abs(np.array(cells)[:, None] - np.array(cells)).sum(-1).astype(float)
    length = np.where(apart > 1, np.inf, apart)
    for k in range(len(cells)):  # Floyd and Warshall
        length = np.minimum(length, length[:, k, None] + length[k])
    for i, start in enumerate(cells):
        for j, goal in enumerate(cells):
            path = shortest_path(cells, start, goal)
            assert path[-1] == goal and set(path) <= set(cells)
            steps = np.abs(np.diff([start, *path], axis=0)).sum(1)
            assert len(path) == max(length[i, j], 1) and (steps == (start != goal)).all()


@pytest.mark.parametrize("task", MAZES)
def test_controller_reaches_the_goal_from_everywhere(task):
    team = make_vec(task, 1, 0).teams[0]
    goal = tuple(TASKS[task].kwargs["goal"])
    for cell in team.cells[:: len(team.cells) // 6]:
        obs = team.set_state(np.array(cell, float), np.zeros(2))
        controller = Controller(team.cells, np.random.default_rng(0))
        controller.walk_to(goal, obs[:2])
        reached = False
        for _ in range(team.max_episode_steps):
            action, reached = controller.act(obs)
            obs, reward, _, _ = team.step(action)
            if reached:
                break
        assert reached and reward == 1 and np.abs(obs[:2] - goal).max() < 0.11


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(waypoints, "PIECE_ROWS", 1000)
    for num_workers in (1, 2):
        makers.make("maze2d-umaze", "", 2500, tmp_path / f"{num_workers}.hdf5", num_workers)
    return tmp_path


def read(path):
    keys = (*readers.KEYS, "next_observations", "infos/goal", "infos/qpos", "infos/qvel")
    with h5py.File(path) as file:
        return {key: file[key][()] for key in keys}


def test_data(made):
    data, other = read(made / "1.hdf5"), read(made / "2.hdf5")
    for key in data:
        np.testing.assert_array_equal(data[key], other[key], err_msg=key)
    obs, next_obs, goals = data["observations"], data["next_observations"], data["infos/goal"]
    # a walk goes on over its goals; only a piece's end breaks it
    same = (next_obs[:-1] == obs[1:]).all(1)
    assert np.flatnonzero(~same).tolist() == [999, 1999]
    assert not data["terminals"].any()
    near = np.linalg.norm(next_obs[:, :2].astype(float) - (1, 1), axis=1) <= 0.5
    assert (data["rewards"] == near).all() and 0 < near.mean() < 0.5
    # a goal stays until it is reached or for 300 steps
    ends = np.flatnonzero(data["timeouts"])
    assert {999, 1999, 2499} <= set(ends.tolist())
    reached = np.linalg.norm(obs[:, :2] - goals, axis=1) < 0.1
    start = 0
    for end in ends:
        assert (goals[start : end + 1] == goals[start]).all()
        assert not reached[start:end].any() and end - start < 300
        assert reached[end] or end - start == 299 or end in (999, 1999, 2499)
        start = end + 1
    assert len(np.unique(goals, axis=0)) == 7
    actions = data["actions"]
    assert np.abs(actions).max() == 1 and 0.3 < (np.abs(actions) < 1).mean() < 0.95
    # what the file says happened happens again
    team = make_vec("maze2d-umaze", 1, 0).teams[0]
    for t in range(0, 2500, 83):
        before = team.set_state(data["infos/qpos"][t], data["infos/qvel"][t])
        np.testing.assert_allclose(before, obs[t], atol=1e-6)
        np.testing.assert_allclose(team.step(actions[t])[0], next_obs[t], atol=1e-5)


def test_a_maze_has_one_set_without_a_quality(made, tmp_path, monkeypatch):
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path / "cache"))
    assert parse_env("maze2d-umaze") == ("maze2d-umaze", "")
    path = makers.built_in_path("maze2d-umaze", "", 2500)
    assert path.name.startswith("maze2d-umaze-2500-")
    path.parent.mkdir()
    path.write_bytes((made / "1.hdf5").read_bytes())
    team = load("maze2d-umaze", size=2500)
    assert team.source == (
        f"built-in maze2d-umaze (made on this machine, not D4RL): 2,500 transitions, {path}"
    )
    assert team.obs.shape == (2500, 1, 4) and team.actions.shape == (2500, 1, 2)
    assert team.truncations.sum() == read(path)["timeouts"].sum()
    for env, message in [
        ("maze2d-umaze-medium", "maze2d-umaze has one set of data, expected --env maze2d-umaze"),
        ("maze2d-umze", "unknown task 'maze2d-umze'.*did you mean maze2d-umaze"),
        ("maze2d", "unknown task 'maze2d'"),
    ]:
        with pytest.raises(InputError, match=message):
            load(env)
    with pytest.raises(InputError, match="--dataset minari has no data of maze2d-umaze"):
        load("maze2d-umaze", "minari")
    with pytest.raises(InputError, match="unknown built-in data quality 'medium' of maze2d-umaze"):
        makers.make("maze2d-umaze", "medium", 10, tmp_path / "no.hdf5")


@pytest.mark.parametrize("size", ["umaze", "medium", "large"])
def test_d4rls_files(tmp_path, monkeypatch, size):
    asked = []

    def download(url, path):
        asked.append(url)
        rng = np.random.default_rng(0)
        with h5py.File(path, "w") as file:
            file["observations"] = rng.normal(size=(50, 4)).astype(np.float32)
            file["actions"] = rng.uniform(-1, 1, (50, 2)).astype(np.float32)
            file["rewards"] = (rng.random(50) < 0.2).astype(np.float32)
            file["terminals"] = np.zeros(50, bool)
            file["timeouts"] = np.isin(np.arange(50), (10, 30))
            file["infos/goal"] = np.zeros((50, 2), np.float32)

    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr(files, "download", download)
    team = load(f"maze2d-{size}", "d4rl")
    name = f"maze2d-{size}-sparse-v1"
    assert asked == [f"https://rail.eecs.berkeley.edu/datasets/offline_rl/maze2d/{name}.hdf5"]
    assert team.source == f"D4RL {name}: 47 transitions, {tmp_path / name}.hdf5"
    assert np.flatnonzero(team.truncations).tolist() == [9, 28, 46]
    assert not team.terminations.any() and team.obs.shape == (47, 1, 4)


def test_scores_are_d4rls():
    for task, pair in zip(MAZES, [(23.85, 161.86), (13.13, 277.39), (6.7, 273.99)], strict=True):
        np.testing.assert_allclose(normalized_score(task, pair), [0, 100], atol=1e-9)


def test_picture_from_above():
    """Walls, ball and goal are where the observation says; the picture's top is row 0."""
    env = parallel_env("maze2d-umaze", render_mode="rgb_array")
    env.reset(seed=0)
    env.team.set_state(np.array([3.0, 1.0]) - 0.2, np.zeros(2))
    try:
        frame = env.render().astype(int)
    except Exception as error:  # OpenGL's libraries fail in many ways
        pytest.skip(f"MuJoCo cannot draw here: {error}")
    height, width = frame.shape[:2]

    def middle(mask):
        return np.argwhere(mask).mean(0) / (height, width)

    blue = middle((frame[..., 2] > 1.5 * frame[..., 0]) & (frame[..., 2] > 120))
    red = middle((frame[..., 0] > 2 * frame[..., 1]) & (frame[..., 0] > 2 * frame[..., 2]))
    assert red[0] < 0.45 and red[1] < 0.45 and blue[0] > 0.55 and blue[1] < 0.45
    env.close()
