r"""Which part of BCQ a draw of OTC helps or hurts: what it clones, or what it learns of values.

    python -m benchmarks.bcq_parts cloning --distance embedding --finetune-updates 1000
    python -m benchmarks.bcq_parts values --distance embedding --finetune-updates 1000

otc_bcq.py with its flags, of which --sampling is otc. With `cloning` the draw's transitions train
the generative model, and uniform draws the critics and the perturbation; with `values` it is the
other way round. Offline nothing changes. Runs are called otc-DISTANCE-for-cloning and -for-values;
they cannot be resumed.
"""

import dataclasses
from unittest import mock

import torch

import otc_bcq
from benchmarks import altered
from common import InputError
from common.nets import kl_divergence, mean_over_own, step

PARTS = "cloning", "values"


class Parts(otc_bcq.BCQ):
    """BCQ whose generative model may learn from a batch of its own."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        # What `update` is handed instead while `apart` trains the generative model
        self.idle = torch.optim.SGD(self.vae.parameters(), lr=0.0)

    def apart(self, cloned: dict[str, torch.Tensor], learned: dict[str, torch.Tensor]) -> dict:
        """One update of the generative model on one batch and of the rest on another."""
        decoded, mean, log_std = self.vae(cloned["obs"], cloned["actions"])
        error = mean_over_own((decoded - cloned["actions"]).square(), self.own)
        kl_loss = kl_divergence(mean, log_std, self.vae.own_latents)
        step(self.vae_optimizer, error + 0.5 * kl_loss)
        with mock.patch.object(self, "vae_optimizer", self.idle):
            losses = self.update(learned)
        losses |= {"losses/vae_reconstruction": error.detach(), "losses/vae_kl": kl_loss.detach()}
        return losses


def draws_for(part: str) -> type:
    """OTC whose draws are for a part of BCQ alone."""

    class Draws(otc_bcq.OTC):
        def __init__(self, replay, args):
            plain = args.distance.removesuffix(f"-for-{part}")
            super().__init__(replay, dataclasses.replace(args, distance=plain))

    return Draws


def choose(words: list[str]) -> tuple:
    """For `altered.run`."""
    part, *flags = words or [""]
    if part not in PARTS:
        raise InputError(f"which part? python -m benchmarks.bcq_parts {'|'.join(PARTS)}")

    def tune(args) -> None:
        if args.sampling != "otc":
            raise InputError(f"--sampling {args.sampling}: only the draws of otc are for a part")
        args = dataclasses.replace(args, distance=f"{args.distance}-for-{part}")
        original = otc_bcq.Training.finetune

        def finetune(run, update):
            replay, agent, strategy = run.replay, run.agent, run.strategy

            def in_parts() -> dict[str, torch.Tensor]:
                index = strategy.draw(agent)
                drawn = replay.gather(index)
                uniform = replay.gather(replay.draw_merged(args.batch_size))
                batches = (drawn, uniform) if part == "cloning" else (uniform, drawn)
                return agent.apart(*batches) | strategy.diagnostics(index)

            original(run, in_parts)

        with (
            mock.patch.object(otc_bcq, "BCQ", Parts),
            mock.patch.object(otc_bcq, "OTC", draws_for(part)),
            mock.patch.object(otc_bcq.Training, "finetune", finetune),
        ):
            otc_bcq.main(args)

    return otc_bcq.Args, tune, flags


def main() -> None:
    altered.run(choose)


if __name__ == "__main__":
    main()
