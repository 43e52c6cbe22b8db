"""Train the behaviour policies of the built-in datasets: SAC with a small actor, kept at many
moments.

    pip install -r requirements-dev.txt
    python -m behaviours.train --task hopper --steps 400000 --out snapshots/hopper

stable-baselines3's SAC (Haarnoja et al., 2018, https://arxiv.org/abs/1801.01290) trains one policy
over all joints. Every `--snapshot-every` steps the actor is written to `OUT/{step}.npz`; `python -m
behaviours.select` then chooses the snapshots that ship. The arrays: `w0 b0 w1 b1` hidden
layers, `w_mean b_mean` and `w_log_std b_log_std` heads, weights as `(in, out)`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from behaviours.select import SAC_TASKS
from common import InputError, cli, nearest


@dataclass
class Args:
    task: str = "halfcheetah"
    """halfcheetah, walker2d, hopper or ant"""
    seed: int = 1
    """seed of the environment, the networks and the exploration"""
    steps: int = 400_000
    """environment steps"""
    update_every: int = 1
    """environment steps per SAC update"""
    snapshot_every: int = 2_500
    """environment steps between two snapshots of the actor"""
    batch_size: int = 128
    """transitions per SAC update"""
    out: Path | None = None
    """folder for the snapshots, by default snapshots/{task}"""
    resume: bool = False
    """go on from the learner and the replay buffer in `out`, written every 50,000 steps"""


def new_folder(out: Path) -> Path:
    """Make the folder of a training, which must hold no snapshots yet.

    Raises:
        InputError: it holds another training's, or cannot be made.
    """
    if any(out.glob("[0-9]*.npz")):
        raise InputError(f"--out {out} holds the snapshots of another training: take a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror})") from None
    return out


def actor_arrays(actor: torch.nn.Module) -> dict[str, np.ndarray]:
    """stable-baselines3's SAC actor as float32 arrays, weights (in, out)."""
    layers = {
        "0": actor.latent_pi[0],
        "1": actor.latent_pi[2],
        "_mean": actor.mu,
        "_log_std": actor.log_std,
    }
    arrays = {}
    for name, layer in layers.items():
        arrays["w" + name] = layer.weight.detach().cpu().numpy().T.copy()
        arrays["b" + name] = layer.bias.detach().cpu().numpy().copy()
    return arrays


def main(args: Args) -> None:
    if args.task not in SAC_TASKS:
        raise InputError(f"unknown --task {args.task}: {nearest(args.task, SAC_TASKS)}")
    out = args.out or Path("snapshots", args.task)
    if not args.resume:
        new_folder(out)
    elif not (out / "sac.zip").exists():
        raise InputError(f"--resume: no sac.zip in {out}")

    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.monitor import Monitor

    from common.envs.mujoco import make_single

    torch.set_num_threads(1)

    class Snapshots(BaseCallback):
        def _on_training_start(self) -> None:
            self._on_step()

        def _on_step(self) -> bool:
            if self.num_timesteps % args.snapshot_every == 0:
                np.savez(out / f"{self.num_timesteps:07d}.npz", **actor_arrays(self.model.actor))
            if self.num_timesteps % 50_000 == 0 and self.num_timesteps:
                self.model.save_replay_buffer(out / "buffer.pkl")
                self.model.save(out / "sac.zip")
            return True

    env = Monitor(make_single(args.task))
    if args.resume:
        model = SAC.load(out / "sac.zip", env, device="cpu")
        model.load_replay_buffer(out / "buffer.pkl")
        left = args.steps - model.num_timesteps
        model.learn(left, callback=Snapshots(), log_interval=20, reset_num_timesteps=False)
        return
    model = SAC(
        "MlpPolicy",
        env,
        batch_size=args.batch_size,
        learning_starts=5_000,
        train_freq=args.update_every,
        policy_kwargs={"net_arch": {"pi": [64, 64], "qf": [256, 256]}},
        seed=args.seed,
        device="cpu",
        verbose=1,
    )
    model.learn(args.steps, callback=Snapshots(), log_interval=20)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
