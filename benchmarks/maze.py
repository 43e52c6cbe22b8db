"""The mazes: what random actions and the waypoint controller score, and the built-in data.

    OMP_NUM_THREADS=1 python -m benchmarks.maze plays --csv maze_plays.csv
    OMP_NUM_THREADS=1 python -m benchmarks.maze data --csv maze_data.csv
    MUJOCO_GL=egl python -m benchmarks.maze pictures

`plays`: whole episodes of uniform actions, and of the controller that makes the built-in data, sent
to the task's own goal, with and without that data's noise in its actions; and, `planned once`, of
a controller that plans a path in its first episode only and then, its last waypoint being the
goal, heads straight for it, walls or not.
`data`: makes each full-size set in a temporary folder; the time that takes, and what is in it.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from benchmarks import check_outputs, write_csv
from common import cli, datasets
from common.datasets.makers import make
from common.datasets.makers.maze import NOISE, Controller
from common.datasets.names import BUILT_IN_SIZES
from common.envs import TASKS, normalized_score, num_cores, parallel_env
from common.envs.maze import MazeTeam
from tools.render import shrink

PLAYS = ("random", "planned once", "controller", "noisy controller")
MAZES = [task for task, row in TASKS.items() if row.family == "maze"]


@dataclass
class Args:
    what: tyro.conf.Positional[Literal["plays", "data", "pictures"]]
    """what to measure or draw"""
    episodes: int = 500
    """of every play"""
    csv: str | None = None
    """file for the raw numbers"""


def returns(task: str, name: str, episodes: int) -> np.ndarray:
    """Returns (episodes,) of a play of `PLAYS`."""
    team, rng = MazeTeam(task), np.random.default_rng(0)
    team.reset(0)
    controller = Controller(team.cells, rng)
    found = np.zeros(episodes)
    for episode in range(episodes):
        obs = team.reset(None)
        if episode == 0 or name != "planned once":
            controller.walk_to(tuple(team.goal.astype(int).tolist()), obs[:2])
        for _ in range(team.max_episode_steps):
            if name == "random":
                action = rng.uniform(-1, 1, 2)
            else:
                action = controller.act(obs)[0]
                if name == "noisy controller":
                    action += NOISE * rng.standard_normal(2)
            obs, reward, _, _ = team.step(action)
            found[episode] += reward
    team.close()
    return found


def plays(episodes: int) -> list[dict]:
    rows = []
    for task in MAZES:
        for name in PLAYS:
            start = time.process_time()
            found = returns(task, name, episodes)
            seconds = time.process_time() - start
            error = found.std() / episodes**0.5
            rows.append({"task": task, "play": name, "episodes": episodes, "mean": found.mean()})
            rows[-1] |= {"std": found.std(), "standard_error": error}
            rows[-1] |= {"score": normalized_score(task, found.mean()).item()}
            steps = episodes * TASKS[task].kwargs["limit"]
            rows[-1] |= {"steps_per_processor_second": steps / seconds}
            print(f"{task:16}{name:18}{found.mean():9.2f} +- {error:.2f}", flush=True)
    return rows


def data() -> list[dict]:
    rows = []
    for task in MAZES:
        size = BUILT_IN_SIZES[task][""]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.hdf5"
            start = time.perf_counter()
            make(task, "", size, path)
            seconds = time.perf_counter() - start
            team = datasets.load(task, str(path))
        rows.append({"task": task, "transitions": size, "goals": team.truncations.sum()})
        rows[-1] |= {"mean_reward": team.rewards.mean(), "seconds": seconds, "cores": num_cores()}
        print(rows[-1], flush=True)
    return rows


def pictures() -> None:
    """docs/figures/maze2d.png: the three mazes side by side, each at a start."""
    import imageio.v3 as imageio

    frames = []
    for task in MAZES:
        env = parallel_env(task, render_mode="rgb_array")
        env.reset(seed=2)
        frames += [shrink(env.render(), 240), np.full((240, 6, 3), 255, np.uint8)]
        env.close()
    path = Path(__file__).parents[1] / "docs" / "figures" / "maze2d.png"
    imageio.imwrite(path, np.concatenate(frames[:-1], axis=1))
    print(path)


def main(args: Args) -> None:
    if args.what == "pictures":
        return pictures()
    check_outputs(args.csv)
    rows = plays(args.episodes) if args.what == "plays" else data()
    if args.csv is not None:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
