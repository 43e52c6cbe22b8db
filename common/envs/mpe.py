"""OMAR's variant of the multi-agent particle environments, all teams in one array.

`simple-spread` (and `simple-spread-N`), `simple-tag` and `simple-world`. Bodies have inertia and
push each other; an action is a force. docs/environments.md has the numbers and what differs from
mpe2, which cannot be set up to be this variant. The prey of tag and world belongs to the task: a
small fixed policy, `{task}-prey.npz` beside this file.

A team's random numbers come from its own stream, so that no team depends on the others.
"""

from pathlib import Path

import numpy as np
from gymnasium.spaces import Box

from common.envs.particle import ParticleParallelEnv, ParticleVecEnv, blank, disc
from common.envs.tasks import AGENT_COLOURS, TASKS
from common.envs.vec import own_entries

DT = 0.1
DAMPING = 0.25
"""share of the velocity that a step takes away"""
CONTACT_FORCE = 100.0
CONTACT_MARGIN = 1e-3
"""how soft a contact is"""
FORCE = 5.0
"""of the action 1, for agents without an acceleration of their own"""


def prey_file(task: str) -> Path:
    """Where the policy of the task's prey is."""
    return Path(__file__).with_name(f"{task}-prey.npz")


class MpeVecEnv(ParticleVecEnv):
    """E teams; a subclass is a task.

    Bodies are the agents, the prey, the solid obstacles and what is only seen, in this order; the
    first `num_movers` have a velocity, the first `num_solid` push each other. With `free_prey` the
    prey is one more agent, and rewards are each agent's own, (E, N).
    """

    max_episode_steps = 25
    action_bound = 1.0
    task: str
    sizes: tuple[float, ...]
    """radius of every body"""
    num_movers: int
    num_solid: int
    gains: tuple[float, ...]
    """force of a mover's action 1"""
    top_speeds: tuple[float, ...]
    """a mover's largest speed"""
    starts: tuple[float, ...]
    """a body starts uniformly in [-start, start]^2"""
    own_obs_dim: tuple[int, ...]
    """size of every mover's observation; an agent's smaller one is padded with zeros"""

    def __init__(self, num_agents: int, num_envs: int, seed: int, free_prey: bool = False):
        self.num_others = len(self.sizes) - num_agents
        super().__init__(num_agents, num_envs, seed)
        self.obs_dim = max(self.own_obs_dim)
        self.own_obs = own_entries(self.own_obs_dim[:num_agents])
        self.velocity = np.zeros((self.num_movers, 2, num_envs), dtype=np.float32)
        self.free_prey = free_prey
        self.has_prey = num_agents < self.num_movers
        if self.has_prey:
            with np.load(prey_file(self.task)) as arrays:
                self.prey = {name: arrays[name].astype(np.float32) for name in arrays}
        self.gain, self.top_speed, self.extent = (
            np.array(values, np.float32).reshape(-1, 1, 1)
            for values in (self.gains, self.top_speeds, self.starts)
        )

    def start(self, teams: np.ndarray) -> np.ndarray:
        """See `ParticleVecEnv.start`; everyone starts at rest."""
        numbers = self.streams.draw(2 * self.num_bodies, teams).reshape(self.num_bodies, 2, -1)
        self.at[:, :, teams] = self.extent * (2 * numbers - 1)
        self.velocity[:, :, teams] = 0
        self.elapsed[teams] = 0
        return self.observe()

    def move(self, actions: np.ndarray) -> None:
        """The velocities change first, then every mover moves; actions (N, 2, E) are in the box."""
        if self.has_prey:
            actions = np.concatenate([actions, self.prey_action()[None]])
        force = self.gain * actions
        for i in range(self.num_movers):
            for j in range(i + 1, self.num_solid):
                push = self.contact(i, j)
                force[i] += push
                if j < self.num_movers:
                    force[j] -= push
        velocity = (1 - DAMPING) * self.velocity + DT * force
        speed = np.hypot(velocity[:, 0], velocity[:, 1])[:, None]
        velocity *= np.minimum(1, self.top_speed / np.maximum(speed, 1e-9))
        self.velocity = velocity.astype(np.float32)
        self.at[: self.num_movers] += np.float32(DT) * self.velocity

    def contact(self, i: int, j: int) -> np.ndarray:
        """Force (2, E) of body j on body i: along the line between them, a softplus of how far
        they overlap."""
        apart = self.at[i] - self.at[j]
        distance = np.hypot(apart[0], apart[1])
        overlap = (np.float32(self.sizes[i] + self.sizes[j]) - distance) / CONTACT_MARGIN
        soft = np.maximum(overlap, 0) + np.log1p(np.exp(-np.abs(overlap)))
        return apart * (CONTACT_FORCE * CONTACT_MARGIN * soft / np.maximum(distance, 1e-6))

    def touches(self, i: int, j: int) -> np.ndarray:
        """(E,) bool: bodies i and j overlap."""
        return self.distance(i, j) < np.float32(self.sizes[i] + self.sizes[j])

    def distance(self, i: int, j: int) -> np.ndarray:
        """(E,)"""
        return np.hypot(*(self.at[i] - self.at[j]))

    def observe(self) -> np.ndarray:
        """(E, N, obs_dim), in new memory."""
        obs = np.zeros((self.num_agents, self.obs_dim, self.num_envs), dtype=np.float32)
        for i in range(self.num_agents):
            seen = self.view(i)
            obs[i, : len(seen)] = seen
        return np.ascontiguousarray(obs.transpose(2, 0, 1))

    def view(self, i: int) -> np.ndarray:
        """What mover i sees, (own_obs_dim, E): its velocity and position, where the things and the
        other movers are from it, and what the task adds."""
        others = [j for j in range(self.num_movers) if j != i]
        bodies = [*range(self.num_movers, self.num_bodies), *others]
        apart = (self.at[bodies] - self.at[i]).reshape(2 * len(bodies), -1)
        return np.concatenate([self.velocity[i], self.at[i], apart, *self.also_seen(i)])

    def also_seen(self, i: int) -> list[np.ndarray]:
        """Further parts (rows, E) of mover i's observation."""
        return []

    def prey_action(self) -> np.ndarray:
        """(2, E) in the box, of the fixed policy: two ReLU layers, then tanh."""
        h, prey = self.view(self.num_movers - 1).T, self.prey
        h = np.maximum(h @ prey["w0"] + prey["b0"], 0)
        h = np.maximum(h @ prey["w1"] + prey["b1"], 0)
        return np.tanh(h @ prey["w2"] + prey["b2"]).T

    @property
    def never(self) -> np.ndarray:
        """Terminations (E,): there are none."""
        return np.zeros(self.num_envs, dtype=bool)


class SimpleSpread(MpeVecEnv):
    """N agents cover N landmarks without running into each other.

    The team's reward is the mean of what the agents get: the sum over landmarks of 1 / the closest
    agent's distance, at most 10 each, minus 5 for every other agent that it overlaps.
    """

    task = "simple-spread"
    SIZE = 0.15

    def __init__(self, num_envs: int, seed: int, num_agents: int = 3):
        n = num_agents
        self.num_movers = self.num_solid = n  # landmarks push nobody
        self.sizes = (self.SIZE,) * n + (0.05,) * n
        self.gains, self.top_speeds = (FORCE,) * n, (np.inf,) * n
        self.starts = (1.0,) * (2 * n)
        self.own_obs_dim = (6 * n,) * n
        super().__init__(n, num_envs, seed)

    def also_seen(self, i: int) -> list[np.ndarray]:
        """What the others say, two numbers each: they are silent."""
        return [np.zeros((2 * (self.num_agents - 1), self.num_envs), dtype=np.float32)]

    def judge(self) -> tuple[np.ndarray, np.ndarray]:
        n = self.num_agents
        rewards = np.zeros(self.num_envs, dtype=np.float32)
        for landmark in range(n, 2 * n):
            apart = self.at[:n] - self.at[landmark]  # (N, 2, E)
            closest = np.hypot(apart[:, 0], apart[:, 1]).min(axis=0)
            rewards += np.minimum(1 / np.maximum(closest, 1e-6), 10)
        for i in range(n):
            for j in range(i):
                rewards -= np.float32(5 * 2 / n) * self.touches(i, j)  # each of the two gets -5
        return rewards, self.never


class Chase(MpeVecEnv):
    """Three predators chase a prey that is smaller, quicker and faster.

    The predators share a reward: `CATCH` for every predator that touches the prey, minus a tenth of
    the sum of their distances to it.
    """

    CATCH: float
    PREY_SIZE: float
    OUTSIDE = 1.0
    """weight of what a free prey pays for leaving the square"""
    num_movers = 4
    top_speeds = (1.0, 1.0, 1.0, 1.3)
    # An acceleration of 3 and of 4 counts twice, once as the action's unit and once as its force
    gains = (9.0, 9.0, 9.0, 16.0)
    things: tuple[float, ...]
    """radius of every body that does not move"""

    def __init__(self, num_envs: int, seed: int, free_prey: bool = False):
        self.sizes = (0.075, 0.075, 0.075, self.PREY_SIZE, *self.things)
        self.starts = (1.0,) * 4 + (0.9,) * len(self.things)
        super().__init__(4 if free_prey else 3, num_envs, seed, free_prey)

    def also_seen(self, i: int) -> list[np.ndarray]:
        """The prey's velocity, which the predators see."""
        return [] if i == 3 else [self.velocity[3]]

    def judge(self) -> tuple[np.ndarray, np.ndarray]:
        rewards, caught = (np.zeros(self.num_envs, dtype=np.float32) for _ in range(2))
        for i in range(3):
            rewards -= np.float32(0.1) * self.distance(i, 3)
            caught += np.float32(self.CATCH) * self.touches(i, 3)
        predators = rewards + caught
        if not self.free_prey:
            return predators, self.never
        prey = self.prey_bonus() - rewards - caught - self.OUTSIDE * self.outside()
        return np.stack([predators] * 3 + [prey], axis=1), self.never

    def outside(self) -> np.ndarray:
        """(E,) what the prey pays near and beyond the square's edge, per axis."""
        x = np.abs(self.at[3]).astype(np.float64)
        far = np.minimum(np.exp(np.minimum(2 * x - 2, 3)), 10)
        cost = np.where(x < 0.9, 0, np.where(x < 1, 10 * (x - 0.9), far))
        return cost.sum(axis=0).astype(np.float32)

    def prey_bonus(self) -> np.ndarray:
        """(E,) what else a free prey gets."""
        return np.zeros(self.num_envs, dtype=np.float32)


class SimpleTag(Chase):
    """Two solid obstacles."""

    task = "simple-tag"
    CATCH = 10.0
    PREY_SIZE = 0.05
    things = (0.2, 0.2)
    num_solid = 6
    own_obs_dim = (16, 16, 16, 14)


class SimpleWorld(Chase):
    """One solid obstacle, two pieces of food that the prey wants, and two forests, which hide
    nobody; a mover sees which of them it is in."""

    task = "simple-world"
    CATCH = 5.0
    PREY_SIZE = 0.045
    OUTSIDE = 2.0
    things = (0.2, 0.03, 0.03, 0.3, 0.3)
    num_solid = 5
    own_obs_dim = (24, 24, 24, 22)

    def also_seen(self, i: int) -> list[np.ndarray]:
        """And for either forest 1 inside, -1 outside."""
        inside = np.stack([self.touches(i, forest) for forest in (7, 8)])
        return [*super().also_seen(i), np.where(inside, np.float32(1), np.float32(-1))]

    def prey_bonus(self) -> np.ndarray:
        return 2 * (self.touches(3, 5).astype(np.float32) + self.touches(3, 6))


CLASSES = {"simple-spread": SimpleSpread, "simple-tag": SimpleTag, "simple-world": SimpleWorld}


def make_vec(task: str, num_envs: int, seed: int) -> MpeVecEnv:
    """See `common.envs.make_vec`."""
    row = TASKS[task]
    return CLASSES[row.env_id](num_envs=num_envs, seed=seed, **row.kwargs)


# --- PettingZoo ---


class MpeParallelEnv(ParticleParallelEnv):
    """A task for PettingZoo: one team of the batched tasks."""

    make_vec = staticmethod(make_vec)

    def observation_box(self) -> Box:
        return Box(-np.inf, np.inf, (self.vec.obs_dim,), np.float32)

    def state(self) -> np.ndarray:
        """All agents' observations side by side, (N * obs_dim,)."""
        return self.vec.observe()[0].ravel()

    def render(self) -> np.ndarray | None:
        return None if self.render_mode is None else draw(self.vec)


def parallel_env(task: str, render_mode: str | None = None) -> MpeParallelEnv:
    """See `common.envs.parallel_env`."""
    return MpeParallelEnv(task, render_mode)


# --- Pictures ---


def draw(vec: MpeVecEnv, team: int = 0, size: int = 240) -> np.ndarray:
    """A picture (size, size, 3) uint8 of one team: agents are coloured discs, the prey a black one,
    obstacles dark grey, food orange, forests green, the landmarks of simple-spread grey rings
    within which they pay 10. Bodies may leave the white square [-1, 1]^2."""
    image, scale = blank(1.0, size, margin=0.3)
    obstacle, food, forest = (90, 90, 90), (255, 187, 120), (199, 233, 192)
    things = {
        "simple-tag": [obstacle] * 2,
        "simple-world": [obstacle, food, food, forest, forest],
    }
    colours = [*AGENT_COLOURS[:3], (0, 0, 0), *things.get(vec.task, [])]
    if vec.task == "simple-spread":
        colours = AGENT_COLOURS[: vec.num_agents]
    for i in reversed(range(len(colours))):  # agents are over what they stand on
        x, y = vec.at[i, :, team].tolist()
        disc(image, scale, x, y, vec.sizes[i], colours[i])
    if vec.task == "simple-spread":
        for x, y in vec.at[vec.num_agents :, :, team].tolist():
            disc(image, scale, x, y, 0.1, (90, 90, 90), ring=2.0)
    return image.round().astype(np.uint8)
