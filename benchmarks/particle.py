"""The particle tasks: what scripted play scores, steps per second, and the pictures in the docs.

    OMP_NUM_THREADS=1 python -m benchmarks.particle plays --csv plays.csv
    OMP_NUM_THREADS=1 python -m benchmarks.particle speed --csv speed.csv
    OMP_NUM_THREADS=1 python -m benchmarks.particle speed --family mpe --csv mpe_speed.csv
    python -m benchmarks.particle pictures --family mpe

Predator-prey: `random`; `one` and `three` run straight at the prey; `one planning` and `corner`
(all three) know the prey's rule and choose their next moves in turn, by what the prey would do.
Cooperative navigation: `random`; `straight`, to the matched landmark; `one responds` to others that
move at random, and `all respond` to each other as if the others did.
"""

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tyro

from benchmarks import check_outputs, write_csv
from common import ROOT, cli
from common.datasets import makers
from common.envs import TASKS, make_vec, mpe
from common.envs.particle import REACH, SPEED, CooperativeNavigation, PredatorPrey, draw

MOVES = SPEED * np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)], np.float32)


@dataclass
class Args:
    what: tyro.conf.Positional[Literal["plays", "speed", "pictures"]]
    """what to measure or draw"""
    episodes: int = 1000
    """of every play"""
    family: Literal["particle", "mpe"] = "particle"
    """of tasks whose speed is measured or whose pictures are drawn"""
    csv: str | None = None
    """file for the raw numbers"""


def toward(at: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The longest step from `at` to `target`, (..., 2, E)."""
    return np.clip(target - at, -SPEED, SPEED)


def plan(vec: PredatorPrey, planners: int, sweeps: int = 2) -> np.ndarray:
    """Moves (3, 2, E) of the first `planners` agents, each the best against the prey's answer.

    An agent wants the prey's next place to be touched, close to all agents, and towards a corner.
    """
    trial = PredatorPrey(vec.num_envs, 0)
    start, prey = vec.at[:-1].copy(), vec.at[-1].copy()
    after = start.copy()
    for agent in [*range(planners)] * sweeps:
        best, chosen = np.full(vec.num_envs, np.inf), after[agent].copy()
        moves = [*MOVES[:, :, None], *(MOVES[:, :, None] / 2), toward(start[agent], prey)]
        for move in moves:
            trial.at[:-1], trial.at[-1] = after, prey
            place = np.clip(start[agent] + move, -vec.half_width, vec.half_width)
            trial.at[agent] = place
            answer = np.clip(prey + trial.flight(), -vec.half_width, vec.half_width)
            distance = np.hypot(*np.moveaxis(trial.at[:-1] - answer, 1, 0))  # (3, E)
            cost = distance.min(0) + 0.3 * distance[:planners].sum(0)
            cost -= 1.0 * (distance < REACH).any(0) + 0.2 * np.abs(answer).sum(0)
            better = cost < best
            best = np.where(better, cost, best)
            chosen = np.where(better, place, chosen)
        after[agent] = chosen
    return after - start


def cover(vec: CooperativeNavigation) -> np.ndarray:
    """Moves (N, 2, E): the closest pair of agent and landmark is matched first; all go straight."""
    n = vec.num_agents
    agents, landmarks = vec.at[:n], vec.at[n:]
    apart = np.hypot(*np.moveaxis(agents[:, None] - landmarks[None], 2, 0)).reshape(n * n, -1)
    moves, e = np.zeros_like(agents), np.arange(vec.num_envs)
    for _ in range(n):
        agent, landmark = np.divmod(apart.argmin(0), n)
        moves[agent, :, e] = toward(agents[agent, :, e], landmarks[landmark, :, e])
        grid = apart.reshape(n, n, -1)
        grid[agent, :, e] = np.inf
        grid[:, landmark, e] = np.inf
    return moves


def respond(vec: CooperativeNavigation, agents: int) -> np.ndarray:
    """Moves (N, 2, E) of the first `agents`: each straight to the landmark where it would lower the
    sum of distances most if all others stayed, as randomly moving ones nearly do."""
    n, e = vec.num_agents, np.arange(vec.num_envs)
    at, landmarks = vec.at[:n], vec.at[n:]
    apart = np.hypot(*np.moveaxis(at[:, None] - landmarks[None], 2, 0))  # (agent, landmark, E)
    between = np.hypot(*np.moveaxis(landmarks[:, None] - landmarks[None], 2, 0))
    moves = np.zeros_like(at)
    for i in range(agents):
        others = np.delete(apart, i, axis=0).min(0)  # (landmark, E)
        target = np.minimum(others[None], between).sum(1).argmin(0)  # (E,)
        moves[i, :, e] = toward(at[i, :, e], landmarks[target, :, e])
    return moves


def act(vec, play: str, rng: np.random.Generator) -> np.ndarray:
    """Actions (E, N, 2) in the agents' boxes."""
    shape = vec.num_agents, 2, vec.num_envs
    moves = np.zeros(shape, np.float32)
    if play == "random":
        moves = rng.uniform(-vec.action_bound, vec.action_bound, shape)
    elif play == "straight":
        moves = cover(vec)
    elif play == "one responds":
        moves = rng.uniform(-vec.action_bound, vec.action_bound, shape)
        moves[0] = respond(vec, 1)[0]
    elif play == "all respond":
        moves = respond(vec, vec.num_agents)
    elif play in ("one", "three"):
        agents = slice(1 if play == "one" else 3)
        moves[agents] = toward(vec.at[:-1][agents], vec.at[-1])
    elif play in ("one planning", "corner"):
        moves = plan(vec, 1 if play == "one planning" else 3)
    elif play == "to the landmark":
        moves = np.clip((vec.at[1:] - vec.at[:1]) / vec.beta, -1, 1)
    elif play in ("to the middle", "against the wind"):
        push = vec.PUSH * vec.push() if play == "against the wind" else 0
        moves = np.clip(-vec.at - push, -vec.action_bound, vec.action_bound)
    return moves.transpose(2, 0, 1).astype(np.float32)


def returns(task: str, play: str, episodes: int, deployment: int = 0) -> np.ndarray:
    """Returns (episodes,) of first episodes side by side; deployment 1 to 11 of 11."""
    vec, rng = make_vec(task, episodes, 0), np.random.default_rng(0)
    vec.set_deployment(deployment, 11)
    vec.reset()
    total, running = np.zeros(episodes), np.ones(episodes, bool)
    for _ in range(vec.max_episode_steps):
        _, rewards, terminations, truncations, _ = vec.step(act(vec, play, rng))
        total += rewards * running
        running &= ~(terminations | truncations)
    return total


def plays(args: Args) -> list[dict]:
    todo = [("predator-prey", p, 0) for p in ("random", "one", "one planning", "three", "corner")]
    todo += [("navigation", "random", k) for k in (0, 1, 11)]
    todo += [("navigation", "to the landmark", k) for k in (1, 11)]
    todo += [("wind", play, k) for play in ("random", "to the middle") for k in (0, 1)]
    todo += [("wind", "against the wind", 1)]
    for task in TASKS:
        if task.startswith("cooperative"):
            todo += [(task, "random", 0), (task, "straight", 0)]
            todo += [(task, "one responds", 0), (task, "all respond", 0)]
    rows = []
    for task, play, k in todo:
        found = returns(task, play, args.episodes, k)
        worlds = {"navigation": {1: "beta 0.1", 11: "beta 0.2"}, "wind": {1: "policy"}}
        world = ({0: "data"} | worlds[task])[k] if task in worlds else ""
        rows.append({"task": task, "play": play, "world": world, "episodes": len(found)})
        error = found.std() / len(found) ** 0.5
        rows[-1] |= {"mean": found.mean(), "std": found.std(), "standard_error": error}
        print(f"{task:26}{play:16}{world:10}{found.mean():9.2f} +- {error:.2f}", flush=True)
    return rows


def speed(family: str, num_envs: int = 1024, steps: int = 400) -> list[dict]:
    """All tasks of a family; per second of processor time as well, for a machine that is busy with
    other work."""
    rows = []
    for task in [task for task, row in TASKS.items() if row.family == family]:
        vec = make_vec(task, num_envs, 0)
        vec.reset()
        shape = num_envs, vec.num_agents, 2
        actions = np.random.default_rng(0).uniform(vec.action_low, vec.action_high, shape)
        actions = actions.astype(np.float32)
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            vec.step(actions)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        done = num_envs * steps
        rows.append({"task": task, "num_envs": num_envs, "steps": done})
        rows[-1] |= {"per_second": done / wall, "per_processor_second": done / processor}
        print(f"{task:26}{done / wall:12,.0f} per s{done / processor:12,.0f} per processor s")
    return rows


def pictures(family: str) -> None:
    """docs/figures/{task}.png: three moments of scripted play, or of the expert's, side by side."""
    import imageio.v3 as imageio

    figures = ROOT / "docs" / "figures"
    scenes = {
        "particle": (
            ("predator-prey", "corner", (0, 10, 30)),
            ("cooperative-navigation-3", "straight", (0, 4, 12)),
            ("navigation", "to the landmark", (0, 4, 8)),
            ("wind", "against the wind", (0, 3, 8)),
        ),
        "mpe": tuple((task, "expert", (0, 5, 20)) for task in mpe.CLASSES),
    }[family]
    for task, play, moments in scenes:
        vec, rng = make_vec(task, 1, 3), np.random.default_rng(0)
        vec.set_deployment(1, 10)
        obs = vec.reset()
        if play == "expert":
            policies = makers.mpe.load_policies(task)
            expert = makers.mpe.actor(makers.mpe.snapshot(policies, int(policies["expert"])), 0.0)
        painter = draw if family == "particle" else mpe.draw
        frames = []
        for t in range(max(moments) + 1):
            if t in moments:
                frames += [painter(vec, size=160), np.full((160, 6, 3), 255, np.uint8)]
            obs = vec.step(expert(obs, rng) if play == "expert" else act(vec, play, rng))[0]
        path = figures / f"{task}.png"
        imageio.imwrite(path, np.concatenate(frames[:-1], axis=1))
        print(path)


def main(args: Args) -> None:
    if args.what == "pictures":
        return pictures(args.family)
    check_outputs(args.csv)
    rows = plays(args) if args.what == "plays" else speed(args.family)
    if args.csv is not None:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
