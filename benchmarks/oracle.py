r"""Fine-tune by the draw of an oracle, which knows what no learner does: what a perfect correction
is worth on a task.

    python -m benchmarks.oracle otc_bcq --env halfcheetah-medium --finetune-updates 1000
    python -m benchmarks.oracle otc_bcq offline --env halfcheetah-medium --finetune-updates 1000

A script of OTC with its flags. Candidates are ranked by `dev` of benchmarks.correction: how far
what the other agents did in the data is from what they do there now, by the policies that were
deployed last. Online data agrees best, and so leads the ranks; with `offline` it is drawn as often
as chance would, and the oracle chooses among offline transitions alone. Its runs are called
otc-oracle and otc-oracle-offline; they cannot be resumed.

BCQ's agents act by the best of ten of their actions here, as the oracle asks them at every update.
"""

import copy
import dataclasses
import importlib
from unittest import mock

import torch

from benchmarks import altered
from benchmarks.correction import deviation, present_actions
from common import InputError, sampler

SCRIPTS = "otc_bcq", "otc_awac", "otc_cql", "otc_td3bc", "otc_bremen"  # of continuous actions
ACT_ACTIONS = 10


def oracle(otc: type, only_offline: bool) -> type:
    """A script's OTC with the oracle's distance."""

    class Oracle(otc):
        def __init__(self, replay, args):
            if replay.num_agents < 2:
                raise InputError("a team of one has no others whose actions an oracle could know")
            # It needs no space of its own
            super().__init__(replay, dataclasses.replace(args, distance="value"))
            self.deployed = []  # a list, which no checkpoint holds

        def start_deployment(self, agent, k):
            self.deployed = [copy.deepcopy(agent)]
            if hasattr(self.args, "num_act_actions"):
                its = dataclasses.replace(agent.args, num_act_actions=ACT_ACTIONS)
                self.deployed[0].args = its
            return super().start_deployment(agent, k)

        @torch.no_grad()
        def transition_distance(self, agent, candidates, references):
            replay = self.replay
            logged = replay.gather_team(candidates)["actions"][:, :, 1:]
            present = present_actions(self.deployed[0], replay, candidates, first=1)
            distance = deviation(logged, present, discrete=False)
            if not only_offline:
                return distance
            return sampler.rank_at_random(distance, replay.is_online(candidates))

    return Oracle


def choose(words: list[str]) -> tuple:
    """For `altered.run`."""
    script, *flags = words or [""]
    if script not in SCRIPTS:
        raise InputError(f"which script? python -m benchmarks.oracle {'|'.join(SCRIPTS)} [offline]")
    only_offline = flags[:1] == ["offline"]
    module = importlib.import_module(script)

    def tune(args) -> None:
        name = "oracle-offline" if only_offline else "oracle"
        with mock.patch.object(module, "OTC", oracle(module.OTC, only_offline)):
            module.main(dataclasses.replace(args, sampling="otc", distance=name))

    return module.Args, tune, flags[only_offline:]


def main() -> None:
    altered.run(choose)


if __name__ == "__main__":
    main()
