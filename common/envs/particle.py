"""The OTC paper's particle tasks: points that move as told on a square, all teams in one array.

`predator-prey`, `cooperative-navigation-N` and `navigation`; docs/environments.md says what the
paper leaves open and what is chosen. Every agent observes the full state, the x and y of every
body: agents first, then the prey or the landmarks.

A team's random numbers come from its own stream, so that no team depends on the others.
"""

import warnings

import numpy as np
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv

from common import InputError
from common.envs.tasks import AGENT_COLOURS, TASKS
from common.envs.vec import VecEnv

SPEED = 0.1
"""an agent's largest displacement per step along either axis"""
REACH = 0.1
"""an agent touches what is closer than this"""


class Streams:
    """A stream of uniform numbers per team (SplitMix64)."""

    STEP = np.array(0x9E3779B97F4A7C15, dtype=np.uint64)

    def __init__(self, num_envs: int):
        self.state = np.zeros(num_envs, dtype=np.uint64)

    def seed(self, seeds: np.ndarray) -> None:
        """Start every stream anew from its seed (E,) uint64."""
        self.state = self._mix(seeds + self.STEP)

    def draw(self, count: int, teams: np.ndarray) -> np.ndarray:
        """The next `count` numbers of the teams in a mask (E,): (count, teams) in [0, 1)."""
        steps = self.STEP * np.arange(1, count + 1, dtype=np.uint64)
        numbers = self._mix(self.state[teams] + steps[:, None])
        self.state[teams] += steps[-1]
        return (numbers >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)

    @staticmethod
    def _mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class ParticleVecEnv(VecEnv):
    """E teams; a subclass is a task.

    `at (bodies, 2, E)` holds the positions with the teams last, where numpy is fastest.
    """

    teams = ()
    num_others: int
    """bodies that are not agents"""
    max_episode_steps = 25
    half_width = 1.0
    """the arena is [-half_width, half_width]^2"""
    action_bound = SPEED

    def __init__(self, num_agents: int, num_envs: int, seed: int):
        self.num_envs, self.num_agents = num_envs, num_agents
        self.num_bodies = num_agents + self.num_others
        self.obs_dim, self.action_dim = 2 * self.num_bodies, 2
        self.action_high = np.full((num_agents, 2), self.action_bound, dtype=np.float32)
        self.action_low = -self.action_high
        self.unit_box = self.action_bound == 1
        self.first_seed = seed
        self.streams = Streams(num_envs)
        self.everyone = np.ones(num_envs, dtype=bool)
        self.at = np.zeros((self.num_bodies, 2, num_envs), dtype=np.float32)
        self.elapsed = np.zeros(num_envs, dtype=np.int64)

    def reset(self, seed: int | tuple[int, ...] | None = None) -> np.ndarray:
        """See `VecEnv.reset`."""
        seed, self.first_seed = (self.first_seed if seed is None else seed), None
        if seed is not None:
            self.seed_teams(np.random.SeedSequence(seed).generate_state(self.num_envs))
        return self.start(self.everyone)

    def seed_teams(self, seeds: np.ndarray) -> None:
        """Start the teams' random numbers anew from seeds (E,)."""
        self.streams.seed(np.asarray(seeds).astype(np.uint64))

    def start(self, teams: np.ndarray) -> np.ndarray:
        """Start an episode in the teams of a mask (E,) -> obs (E, N, obs_dim) of all."""
        numbers = self.streams.draw(2 * self.num_bodies, teams)
        self.at[:, :, teams] = (self.half_width * (2 * numbers - 1)).reshape(self.num_bodies, 2, -1)
        self.elapsed[teams] = 0
        return self.observe()

    def observe(self) -> np.ndarray:
        """(E, N, obs_dim), in new memory that the agents of a team share: for ten agents it is the
        copies that would take the time."""
        state = np.ascontiguousarray(self.at.reshape(self.obs_dim, -1).T)  # (E, obs_dim)
        if state.base is not None:  # one team: nothing was copied
            state = state.copy()
        row, item = state.strides
        shape = self.num_envs, self.num_agents, self.obs_dim
        return np.ndarray(shape, np.float32, state, strides=(row, 0, item))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """See `VecEnv.step`."""
        actions = np.clip(np.asarray(actions, np.float32), self.action_low, self.action_high)
        self.move(np.ascontiguousarray(actions.transpose(1, 2, 0)))
        rewards, terminations = self.judge()
        self.elapsed += 1
        truncations = self.elapsed >= self.max_episode_steps
        final_obs = self.observe()
        ended = terminations | truncations
        obs = self.start(ended) if ended.any() else self.observe()
        return obs, rewards, terminations, truncations, final_obs

    def move(self, actions: np.ndarray) -> None:
        """Every body moves by one step; actions (N, 2, E) are in the box."""
        agents = self.at[: self.num_agents]
        np.clip(agents + actions, -self.half_width, self.half_width, out=agents)

    def judge(self) -> tuple[np.ndarray, np.ndarray]:
        """Rewards (E,) float32 and terminations (E,) bool of the present positions."""
        raise NotImplementedError

    def close(self) -> None:
        pass


class PredatorPrey(ParticleVecEnv):
    """Three agents chase a faster prey; +1 after each step that ends with one of them touching it.

    The prey moves last. While no agent is within `SIGHT` it rests; otherwise it runs away from the
    agents and the walls, each pushing with 1 / distance^2, the walls at a tenth.
    """

    num_others = 1
    max_episode_steps = 50
    half_width = 0.7
    PREY_SPEED = 0.15
    SIGHT = 0.2

    def __init__(self, num_envs: int, seed: int):
        super().__init__(3, num_envs, seed)

    def move(self, actions: np.ndarray) -> None:
        super().move(actions)
        prey = self.at[-1]
        np.clip(prey + self.flight(), -self.half_width, self.half_width, out=prey)

    def flight(self) -> np.ndarray:
        """The prey's next displacement (2, E)."""
        prey = self.at[-1]
        away = prey - self.at[:-1]  # (3, 2, E)
        distance = np.sqrt(away[:, 0] * away[:, 0] + away[:, 1] * away[:, 1])  # (3, E)
        push = away / np.maximum(distance * distance * distance, 1e-6)[:, None]
        left = np.maximum(prey + self.half_width, 0.02)
        right = np.maximum(self.half_width - prey, 0.02)
        wall = 1 / (left * left) - 1 / (right * right)
        push = push[0] + push[1] + push[2] + np.float32(0.1) * wall  # (2, E)
        largest = np.maximum(np.maximum(np.abs(push[0]), np.abs(push[1])), 1e-6)
        alarmed = distance.min(axis=0) < self.SIGHT
        return np.where(alarmed, np.float32(self.PREY_SPEED) * (push / largest), 0)

    def judge(self) -> tuple[np.ndarray, np.ndarray]:
        apart = self.at[:-1] - self.at[-1]
        distance = np.sqrt(apart[:, 0] * apart[:, 0] + apart[:, 1] * apart[:, 1])
        rewards = (distance.min(axis=0) < REACH).astype(np.float32)
        return rewards, np.zeros(self.num_envs, dtype=bool)


class CooperativeNavigation(ParticleVecEnv):
    """N agents cover N landmarks: minus the sum over landmarks of the closest agent's distance."""

    def __init__(self, num_agents: int, num_envs: int, seed: int):
        self.num_others = num_agents
        super().__init__(num_agents, num_envs, seed)

    def judge(self) -> tuple[np.ndarray, np.ndarray]:
        agents, landmarks = self.at[: self.num_agents], self.at[self.num_agents :]
        rewards = np.zeros(self.num_envs, dtype=np.float32)
        for landmark in landmarks:
            apart = agents - landmark  # (N, 2, E)
            squared = apart[:, 0] * apart[:, 0] + apart[:, 1] * apart[:, 1]
            rewards -= np.sqrt(squared.min(axis=0))
        return rewards, np.zeros(self.num_envs, dtype=bool)


class Navigation(ParticleVecEnv):
    """One agent moves by beta times its action; its landmark pays 10 and ends the episode.

    beta is drawn from [-0.2, 0.2] at every step, as in the data, until `set_deployment` fixes it.
    """

    num_others = 1
    action_bound = 1.0  # beta stands in for the other tasks' speed of 0.1
    BETA = 0.2

    def __init__(self, num_envs: int, seed: int):
        super().__init__(1, num_envs, seed)
        self.beta = None

    def set_deployment(self, k: int, num_deployments: int) -> None:
        """beta goes from 0.1 in deployment 1 to 0.2 in the last, and is 0.2 after it."""
        progress = 1.0 if k > num_deployments else (k - 1) / max(1, num_deployments - 1)
        self.beta = None if k < 1 else np.float32(0.1 + 0.1 * progress)

    def move(self, actions: np.ndarray) -> None:
        beta = self.beta
        if beta is None:
            beta = np.float32(self.BETA) * (2 * self.streams.draw(1, self.everyone) - 1)  # (1, E)
        super().move(beta * actions)

    def judge(self) -> tuple[np.ndarray, np.ndarray]:
        apart = self.at[0] - self.at[1]
        reached = np.sqrt(apart[0] * apart[0] + apart[1] * apart[1]) < REACH
        return np.where(reached, np.float32(10), np.float32(0)), reached


class Wind(ParticleVecEnv):
    """One agent shall stay at the middle, where a step pays up to 1; a partner that is no learner
    pushes it as well, and is not seen.

    In the data the partner acts uniformly at random. From `set_deployment(1)` on it has a policy, a
    push for every place. Who knows it lands in the middle and stays; who aims as the data teaches
    is pushed off at every step. Not the paper's: a world in which all hangs on correcting the
    transitions.
    """

    num_others = 0
    action_bound = 0.2
    PUSH = 0.15
    RADIUS = 0.2

    def __init__(self, num_envs: int, seed: int):
        super().__init__(1, num_envs, seed)
        self.has_policy = False

    def set_deployment(self, k: int, num_deployments: int) -> None:
        """The partner's policy is the same in all deployments; in 0 it acts at random."""
        self.has_policy = k >= 1

    def push(self) -> np.ndarray:
        """The partner's next action (2, E), in [-1, 1]."""
        if not self.has_policy:
            return 2 * self.streams.draw(2, self.everyone) - 1
        x, y = self.at[0]
        return np.stack([np.cos(3 * y), np.sin(3 * x + 1)])

    def move(self, actions: np.ndarray) -> None:
        super().move(actions + np.float32(self.PUSH) * self.push())

    def judge(self) -> tuple[np.ndarray, np.ndarray]:
        x, y = self.at[0]
        rewards = np.maximum(0, 1 - np.sqrt(x * x + y * y) / np.float32(self.RADIUS))
        return rewards.astype(np.float32), np.zeros(self.num_envs, dtype=bool)


CLASSES = {
    "wind": Wind,
    "predator-prey": PredatorPrey,
    "cooperative-navigation": CooperativeNavigation,
    "navigation": Navigation,
}


def make_vec(task: str, num_envs: int, seed: int) -> ParticleVecEnv:
    """See `common.envs.make_vec`."""
    row = TASKS[task]
    return CLASSES[row.env_id](num_envs=num_envs, seed=seed, **row.kwargs)


# --- PettingZoo ---


class ParticleParallelEnv(ParallelEnv):
    """A particle task for PettingZoo: one team of the batched tasks."""

    make_vec = staticmethod(make_vec)

    def __init__(self, task: str, render_mode: str | None = None):
        if render_mode not in (None, "rgb_array"):
            raise InputError(f"render_mode {render_mode!r}: {task} has only rgb_array")
        self.vec = self.make_vec(task, 1, 0)
        self.vec.first_seed = None
        self.task, self.render_mode = task, render_mode
        self.metadata = {"name": task, "render_modes": ["rgb_array"], "render_fps": 10}
        self.max_episode_steps = self.vec.max_episode_steps
        self.possible_agents = [f"agent_{i}" for i in range(self.vec.num_agents)]
        self.agents: list[str] = []
        low, high = self.vec.action_low[0], self.vec.action_high[0]
        self.observation_spaces = {agent: self.observation_box() for agent in self.possible_agents}
        self.action_spaces = {agent: Box(low, high) for agent in self.possible_agents}
        self.seeded = False

    def observation_box(self) -> Box:
        width = self.vec.half_width
        return Box(-width, width, (self.vec.obs_dim,), np.float32)

    def observation_space(self, agent: str) -> Box:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Box:
        return self.action_spaces[agent]

    def set_deployment(self, k: int, num_deployments: int) -> None:
        """See `VecEnv.set_deployment`."""
        self.vec.set_deployment(k, num_deployments)

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed is not None or not self.seeded:
            seeds = np.random.SeedSequence().generate_state(1) if seed is None else np.array([seed])
            self.vec.seed_teams(seeds)
            self.seeded = True
        self.agents = self.possible_agents[:]
        return self._own(self.vec.start(self.vec.everyone)), {a: {} for a in self.agents}

    def step(self, actions: dict[str, np.ndarray]) -> tuple[dict, dict, dict, dict, dict]:
        if not self.agents:
            warnings.warn("the episode has ended: call reset first", stacklevel=2)
            return {}, {}, {}, {}, {}
        vec = self.vec
        joint = np.stack([actions[agent] for agent in self.possible_agents]).astype(np.float32)
        vec.move(np.clip(joint, vec.action_low, vec.action_high)[:, :, None])
        reward, terminated = (values.item() for values in vec.judge())
        vec.elapsed += 1
        truncated = bool(vec.elapsed[0] >= vec.max_episode_steps)
        outcome = (dict.fromkeys(self.agents, value) for value in (reward, terminated, truncated))
        results = (self._own(vec.observe()), *outcome, {a: {} for a in self.agents})
        if terminated or truncated:
            self.agents = []
        return results

    def _own(self, obs: np.ndarray) -> dict[str, np.ndarray]:
        """Every agent its own copy, so that none can change what the others see."""
        return {agent: obs[0, i].copy() for i, agent in enumerate(self.agents)}

    def state(self) -> np.ndarray:
        """The full state (obs_dim,): what every agent observes."""
        return self.vec.observe()[0, 0]

    def render(self) -> np.ndarray | None:
        return None if self.render_mode is None else draw(self.vec)

    def close(self) -> None:
        pass


def parallel_env(task: str, render_mode: str | None = None) -> ParticleParallelEnv:
    """See `common.envs.parallel_env`."""
    return ParticleParallelEnv(task, render_mode)


# --- Pictures ---


def blank(half_width: float, size: int, margin: float = 0.1) -> tuple[np.ndarray, float]:
    """A white arena on grey, (size, size, 3) float, and its pixels per unit of length."""
    image = np.full((size, size, 3), 255.0)
    scale = size / 2 / ((1 + margin) * half_width)
    rows, columns = np.mgrid[:size, :size] + 0.5 - size / 2
    image[np.maximum(np.abs(rows), np.abs(columns)) > scale * half_width] = 225.0
    return image, scale


def disc(
    image: np.ndarray, scale: float, x: float, y: float, radius: float, colour, ring: float = 0.0
) -> None:
    """Paint a disc, or a ring so many pixels wide, over a picture of `blank`."""
    size = len(image)
    rows, columns = np.mgrid[:size, :size] + 0.5 - size / 2
    distance = np.hypot(columns - scale * x, rows + scale * y) - scale * radius
    cover = np.clip(0.5 - distance, 0, 1)
    if ring:
        cover = np.minimum(cover, np.clip(0.5 + distance + ring, 0, 1))
    image += cover[:, :, None] * (np.array(colour) - image)


def draw(vec: ParticleVecEnv, team: int = 0, size: int = 240) -> np.ndarray:
    """A picture (size, size, 3) uint8 of one team: agents are coloured discs, the prey a black one
    within the ring that touches it, landmarks grey rings as wide as an agent's reach."""
    image, scale = blank(vec.half_width, size)
    bodies = vec.at[:, :, team].tolist()
    if isinstance(vec, Wind):
        disc(image, scale, 0, 0, vec.RADIUS, (150, 150, 150), ring=2.0)
    for x, y in bodies[vec.num_agents :]:
        disc(image, scale, x, y, REACH, (150, 150, 150), ring=2.0)
        if isinstance(vec, PredatorPrey):
            disc(image, scale, x, y, 0.03, (0, 0, 0))
    for i, (x, y) in enumerate(bodies[: vec.num_agents]):
        disc(image, scale, x, y, 0.045, AGENT_COLOURS[i % len(AGENT_COLOURS)])
    return image.round().astype(np.uint8)
