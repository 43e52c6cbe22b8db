"""Moving pictures of the tasks.

    python -m tools.render --env predator-prey --out chase.gif
    python -m tools.render --run runs/RUN --out walk.gif

The agents act at random, or as those of a run's latest checkpoint; each agent has its own colour.
MuJoCo draws without a screen where MUJOCO_GL=egl (the default there on Linux) or osmesa works.
"""

import argparse
import inspect
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from common import InputError, checkpoints
from common.datasets import parse_env
from common.envs import VecEnv, parallel_env
from common.envs.parallel import ParallelTeam

Policy = Callable[[np.ndarray], np.ndarray]
"""From a team's observations (N, obs_dim) to its actions (N, action_dim) in [-1, 1]"""


def trained_policy(folder: str, vec: VecEnv) -> tuple[Policy, Callable[[], None]]:
    """The policy of a run's `checkpoint.pt`, for the seed whose folder it is, and what to call at
    the beginning of an episode.

    Raises InputError if the folder, its script or its checkpoint cannot be used with the task.
    """
    info = checkpoints.read_record(folder)
    script = info.get("script", "")
    try:
        module = import_module(script)
    except (ImportError, ValueError) as error:
        raise InputError(f"cannot import {script!r}, the script of {folder}: {error}") from None
    classes = [
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if value.__module__ == script and hasattr(value, "act") and hasattr(value, "update")
    ]
    if len(classes) != 1 or not hasattr(module, "Args"):
        raise InputError(f"{script}.py: expected Args and one class with `update` and `act`")
    checkpoint = checkpoints.read_checkpoint(folder, "checkpoint.pt", script)
    args = checkpoints.args_of(folder, module.Args)
    if hasattr(args, "within"):
        args = args.within(vec.max_episode_steps)
    num_groups = args.num_seeds * vec.num_agents
    takes_both = "discrete" in inspect.signature(classes[0]).parameters
    kind = (vec.discrete,) if takes_both else ()
    try:
        agent = classes[0](num_groups, vec.obs_dim, vec.action_dim, args, *kind)
        agent.load_state_dict(checkpoint["agent"])
    except (RuntimeError, ValueError) as error:  # other shapes
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{folder} was not trained on such a task: {reason}") from None
    first = (info["seed"] - args.seed) * vec.num_agents

    def act(obs: np.ndarray) -> np.ndarray:
        groups = torch.as_tensor(obs).repeat(args.num_seeds, 1).unsqueeze(1)  # (G, 1, obs_dim)
        with torch.no_grad():
            actions = agent.act(groups)  # (G, 1, action_dim)
        return actions[first : first + vec.num_agents, 0].numpy()

    def begin() -> None:
        if hasattr(agent, "begin_episodes"):
            agent.begin_episodes(torch.ones(num_groups, 1, dtype=torch.bool))

    return act, begin


def shrink(frame: np.ndarray, largest: int = 320) -> np.ndarray:
    """Halve a picture (height, width, 3) until no side is longer than `largest`."""
    while max(frame.shape[:2]) > largest:
        height, width = frame.shape[0] // 2, frame.shape[1] // 2
        blocks = frame[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3)
        frame = blocks.mean(axis=(1, 3)).astype(np.uint8)
    return frame


def cannot_draw(task: str, error: Exception) -> InputError:
    """One line about what a task or OpenGL raised."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    hint = "MuJoCo needs MUJOCO_GL=egl or osmesa where there is no screen"
    if ":" in task:
        hint = "its factory must take render_mode and draw"
    return InputError(f"cannot draw {task} with render_mode='rgb_array' ({reason}); {hint}")


def play(
    team: ParallelTeam, vec: VecEnv, policy: Policy, begin: Callable, steps: int, seed: int
) -> list:
    """`steps` frames, episode after episode; `begin()` before each.

    Raises InputError if nothing can be drawn here.
    """
    frames = []
    begin()
    obs, elapsed = team.reset(seed), 0
    while len(frames) < steps:
        try:
            frame = team.env.render()
        except Exception as error:  # OpenGL's libraries fail in many ways
            raise cannot_draw(team.name, error) from None
        if not isinstance(frame, np.ndarray):
            raise InputError(f"{team.name}: render() gave no picture with render_mode rgb_array")
        frames.append(shrink(frame))
        obs, _, terminated, truncated = team.step(vec.to_box(policy(obs)))
        elapsed += 1
        if terminated or truncated or elapsed == team.max_episode_steps:
            begin()
            obs, elapsed = team.reset(None), 0
    return frames


def render(env: str | None, run: str | None, out: Path, steps: int, seed: int, fps: int) -> None:
    """Write the GIF. Raises InputError for whatever is wrong with the arguments."""
    if out.suffix.lower() != ".gif":
        raise InputError(f"--out {out}: expected a name that ends in .gif")
    if out.exists():
        raise InputError(f"--out {out} exists already and is not overwritten; name another file")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    if steps < 1 or not 0 <= seed < 2**63 or not 1 <= fps <= 50:
        expected = "expected at least 1, 0 to 2**63 - 1, and 1 to 50"
        raise InputError(f"--steps {steps} --seed {seed} --fps {fps}: {expected}")
    split, deployment = None, (0, 0)
    if run is not None:
        options = checkpoints.read_args(run)
        env = env or options["env"]
        split = options.get("split")
        # the world that the finished run's last evaluation saw
        last = options.get("deployments", 0)
        deployment = last + 1, last
    if env is None:
        raise InputError("which task? --env TASK, or --run RUN")
    task = parse_env(env)[0]
    has_screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not has_screen:
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        team = ParallelTeam(task, parallel_env(task, split, "rgb_array"))
    except InputError:
        raise
    except Exception as error:  # no such argument, or MuJoCo without its drawing library
        raise cannot_draw(task, error) from None
    team.set_deployment(*deployment)
    vec = VecEnv([team], seed)
    rng = np.random.default_rng(seed)
    shape = vec.num_agents, vec.action_dim
    policy, begin = (lambda obs: rng.uniform(-1, 1, shape).astype(np.float32)), lambda: None
    if run is not None:
        policy, begin = trained_policy(run, vec)
    frames = play(team, vec, policy, begin, steps, seed)
    team.close()

    import imageio.v3 as imageio

    content = imageio.imwrite("<bytes>", frames, extension=".gif", duration=1000 / fps, loop=0)
    partial = out.with_name(out.name + ".partial")
    try:
        partial.write_bytes(content)
        os.link(partial, out)  # unlike a rename, it refuses to overwrite
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    who = "random actions" if run is None else run
    print(f"{out}: {len(frames)} steps of {task}, {who}")


def main(argv: list[str] | None = None) -> int:
    """The command line -> exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m tools.render")
    parser.add_argument("--env", help="task; by default that of --run")
    parser.add_argument("--run", help="run folder whose policy acts; by default random actions")
    parser.add_argument("--out", type=Path, required=True, help="FILE.gif, a new file")
    parser.add_argument(
        "--steps", type=int, default=100, help="frames; episodes follow one another"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the start and of random actions")
    parser.add_argument("--fps", type=int, default=10, help="frames per second")
    args = parser.parse_args(argv)
    try:
        render(args.env, args.run, args.out, args.steps, args.seed, args.fps)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
