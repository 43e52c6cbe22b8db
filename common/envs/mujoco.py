"""Multi-agent MuJoCo: Gymnasium's tasks, the joints divided among agents that see the full state,
or, in a task whose name ends in -local and in two of the reacher tasks, parts of it.

An agent's action is a contiguous slice of the single agent's, in actuator order or in the task's
own. The tasks are those of Peng et al., 2021 (https://arxiv.org/abs/2003.06709), but for the
reacher and ant-local, which are Barde et al.'s (https://arxiv.org/abs/2305.17198);
gymnasium-robotics' MaMuJoCo gives the same joints to an agent, but reverses a Walker2d leg and
numbers Ant's agents from another leg.
"""

import warnings

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv

from common import InputError
from common.envs.tasks import AGENT_COLOURS, TASKS
from common.envs.vec import VecEnv, own_entries


def _warn(message: str) -> None:
    if "settotalmass" not in message:
        warnings.warn(f"MuJoCo: {message}", RuntimeWarning, stacklevel=2)


# Without it MuJoCo says at every build that half_cheetah.xml uses a deprecated attribute (it still
# works), and writes every warning to MUJOCO_LOG.TXT in the current folder.
mujoco.set_mju_user_warning(_warn)


def make_single(task: str, render_mode: str | None = None) -> gym.Env:
    """The plain single-agent Gymnasium environment of a task, time limit included."""
    return gym.make(TASKS[task].env_id, render_mode=render_mode, **TASKS[task].kwargs)


def parse_split(task: str, split: str | None, num_joints: int) -> tuple[int, int]:
    """Agents and joints of "2x3"; None is the task's own. Raises InputError if it does not fit."""
    valid = [f"{n}x{num_joints // n}" for n in range(1, num_joints + 1) if num_joints % n == 0]
    if TASKS[task].views:  # whose agents are its own
        valid = [TASKS[task].split]
    split = TASKS[task].split if split is None else split
    if split not in valid:
        raise InputError(
            f"unknown split {split!r} of {task}'s {num_joints} joints (AGENTSxJOINTS): "
            f"expected one of {', '.join(valid)}"
        )
    num_agents, joints = split.split("x")
    return int(num_agents), int(joints)


def observed(num_agents: int, num_joints: int, obs_dim: int) -> np.ndarray:
    """What each agent of a local task sees of the full state: indices (N, local_dim).

    As in MaMuJoCo with obsk 0: position and velocity of each of its joints, from the last to the
    first, then the root's positions and velocities. The state is (root and joint positions, root
    and joint velocities), the root's x left out of the positions.
    """
    num_positions = (obs_dim - 1) // 2
    root = num_positions - num_joints  # positions that are not joints'
    positions = np.split(np.arange(root, num_positions)[::-1], num_agents)[::-1]
    own = [np.stack([q, q + num_positions + 1], axis=1).ravel() for q in positions]
    globals_ = np.concatenate([np.arange(root), num_positions + np.arange(root + 1)])
    return np.stack([np.append(indices, globals_) for indices in own])


def views_of(task: str, num_agents: int, num_joints: int, obs_dim: int) -> list | None:
    """What each agent sees of the full state: indices, an array per agent; None: all of it."""
    if TASKS[task].local:
        return list(observed(num_agents, num_joints, obs_dim))
    return [np.array(view) for view in TASKS[task].views] or None


def actuators_of(task: str, num_joints: int) -> np.ndarray:
    """The robot's actuators (num_joints,) in the order in which the agents share them."""
    return np.array(TASKS[task].actuators or range(num_joints))


def colour_agents(model: mujoco.MjModel, num_agents: int, actuators: np.ndarray) -> None:
    """Give the limbs that each agent's joints move the agent's colour."""
    for joints, colour in zip(np.split(actuators, num_agents), AGENT_COLOURS, strict=False):
        bodies = model.jnt_bodyid[model.actuator_trnid[joints, 0]]
        geoms = np.isin(model.geom_bodyid, bodies)
        model.geom_matid[geoms] = -1  # a material's colour would hide it
        model.geom_rgba[geoms] = (*np.array(colour) / 255, 1)


class MujocoTeam:
    """One team for VecEnv, without Gymnasium's wrappers: VecEnv keeps the time limit."""

    def __init__(self, task: str, split: str | None = None):
        self.env = make_single(task).unwrapped
        space = self.env.action_space
        self.num_agents, joints = parse_split(task, split, space.shape[0])
        self.obs_dim = self.state_dim = self.env.observation_space.shape[0]
        self.seen = None  # of the full state: all of it
        self.actuators = actuators_of(task, space.shape[0])
        views = views_of(task, self.num_agents, space.shape[0], self.state_dim)
        if views is not None:  # -1, where a smaller view is padded, is a 0 behind the state
            sizes = [len(view) for view in views]
            self.obs_dim, self.own_obs = max(sizes), own_entries(sizes)
            self.seen = np.full((self.num_agents, self.obs_dim), -1)
            for row, view in zip(self.seen, views, strict=True):
                row[: len(view)] = view
        self.action_low = space.low.reshape(self.num_agents, joints)
        self.action_high = space.high.reshape(self.num_agents, joints)
        self.max_episode_steps = gym.spec(TASKS[task].env_id).max_episode_steps

    def view(self, state: np.ndarray) -> np.ndarray:
        """The agents' observations of a full state."""
        return state if self.seen is None else np.append(state, 0)[self.seen]

    def reset(self, seed: int | None) -> np.ndarray:
        return self.view(self.env.reset(seed=seed)[0])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        controls = np.empty(actions.size, actions.dtype)
        controls[self.actuators] = actions.ravel()
        state, reward, terminated, truncated, _ = self.env.step(controls)
        return self.view(state), reward, terminated, truncated

    def close(self) -> None:
        self.env.close()


class MujocoVecEnv(VecEnv):
    """Teams of a MuJoCo task, with the simulator's state."""

    @property
    def seen(self) -> np.ndarray | None:
        """Indices (N, obs_dim) into the full state of what the agents see, -1 where a smaller view
        is padded; None: all of it."""
        return self.teams[0].seen

    @property
    def actuators(self) -> np.ndarray:
        """The robot's actuators in the order in which the agents share them."""
        return self.teams[0].actuators

    @property
    def state_dim(self) -> int:
        """Size of the full state."""
        return self.teams[0].state_dim

    def qpos_qvel(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions (E, nq) and velocities (E, nv) now, float64: D4RL's infos/qpos and infos/qvel.

        Where the last step ended an episode, they belong to the next one's start, as obs does.
        """
        data = [team.env.data for team in self.teams]
        return np.stack([d.qpos for d in data]), np.stack([d.qvel for d in data])

    def set_state(self, e: int, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """Start an episode of team e at qpos (nq,), qvel (nv,) -> obs (N, obs_dim) float32."""
        env = self.teams[e].env
        env.set_state(np.asarray(qpos, np.float64), np.asarray(qvel, np.float64))
        self.elapsed[e] = 0
        obs = self.teams[e].view(env._get_obs()).astype(np.float32)
        return np.broadcast_to(obs, (self.num_agents, self.obs_dim)).copy()


def make_vec(task: str, num_envs: int, seed: int, split: str | None = None) -> MujocoVecEnv:
    """See `common.envs.make_vec`."""
    return MujocoVecEnv([MujocoTeam(task, split) for _ in range(num_envs)], seed)


class MujocoParallelEnv(ParallelEnv):
    """A MuJoCo task for PettingZoo; every agent gets Gymnasium's reward, and its observation or, in
    a local task, what the agent sees of it."""

    def __init__(self, task: str, split: str | None = None, render_mode: str | None = None):
        self.env = make_single(task, render_mode)
        self.render_mode = render_mode
        self.max_episode_steps = self.env.spec.max_episode_steps
        space = self.env.action_space
        num_agents, joints = parse_split(task, split, space.shape[0])
        self.actuators = actuators_of(task, space.shape[0])
        if render_mode is not None:
            colour_agents(self.env.unwrapped.model, num_agents, self.actuators)
        self.metadata = {**self.env.metadata, "name": f"{task}_{num_agents}x{joints}"}
        self.possible_agents = [f"agent_{i}" for i in range(num_agents)]
        self.agents = []
        view = self.env.observation_space
        self.seen = views_of(task, num_agents, space.shape[0], view.shape[0])
        self.observation_spaces = dict.fromkeys(self.possible_agents, view)
        if self.seen is not None:
            for agent, seen in zip(self.possible_agents, self.seen, strict=True):
                box = Box(-np.inf, np.inf, (len(seen),), view.dtype)
                self.observation_spaces[agent] = box
        low, high = (np.split(x[self.actuators], num_agents) for x in (space.low, space.high))
        self.action_spaces = {
            agent: Box(low[i], high[i], dtype=space.dtype)
            for i, agent in enumerate(self.possible_agents)
        }

    def observation_space(self, agent: str) -> Box:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Box:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.agents = self.possible_agents[:]
        obs, info = self.env.reset(seed=seed, options=options)
        return self._observe(obs), self._each(info)

    def step(self, actions: dict[str, np.ndarray]) -> tuple[dict, dict, dict, dict, dict]:
        joint = np.concatenate([actions[agent] for agent in self.possible_agents])
        controls = np.empty_like(joint)
        controls[self.actuators] = joint
        obs, reward, terminated, truncated, info = self.env.step(controls)
        others = map(self._each, (float(reward), terminated, truncated, info))
        results = self._observe(obs), *others
        if terminated or truncated:
            self.agents = []
        return results

    def _observe(self, state: np.ndarray) -> dict[str, np.ndarray]:
        if self.seen is None:
            return self._each(state)
        return {agent: state[self.seen[i]] for i, agent in enumerate(self.agents)}

    def _each(self, value) -> dict:
        """Every agent its own copy, so that none can change what the others see."""
        return {a: value.copy() if hasattr(value, "copy") else value for a in self.agents}

    def state(self) -> np.ndarray:
        """The full state, (obs_dim,) where every agent observes it."""
        return self.env.unwrapped._get_obs()

    def render(self) -> np.ndarray | None:
        return self.env.render()

    def close(self) -> None:
        self.env.close()


def parallel_env(
    task: str, split: str | None = None, render_mode: str | None = None
) -> MujocoParallelEnv:
    """See `common.envs.parallel_env`."""
    return MujocoParallelEnv(task, split, render_mode)
