"""A finished run, as the programs here look into it."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from benchmarks.speed import LEARNERS
from common import InputError, checkpoints, cli, datasets
from common.nets import Learner
from common.replay import Replay


@dataclass
class Restored:
    """A run's data B^K, offline and online, and its last policy."""

    folder: Path
    """the first seed's"""
    script: str
    module: ModuleType
    args: object
    steps: int
    """M"""
    replay: Replay
    agent: Learner

    def policy(self, name: str) -> dict:
        """A checkpoint of the run's, whose policy `agent` becomes; offline.pt may be another run's.

        Raises InputError where there is none.
        """
        folder = self.folder
        if name == "offline.pt" and self.args.offline_checkpoint is not None:
            folder = self.args.offline_checkpoint
        if name.startswith("policy_") and not (self.folder / name).exists():
            raise InputError(f"{folder / name} does not exist: the run needs --save-policies")
        state = checkpoints.read_checkpoint(str(folder), name, self.script)
        # Policies that were kept have no optimisers' states
        self.agent.load_state_dict(state["agent"], strict="_extra_state" in state["agent"])
        return state


def restore(folder: str, more: int = 0) -> Restored:
    """The run in `folder`, any of its seeds', with room for `more` deployments.

    Raises InputError for what is no run, and for one of another script or without deployments.
    """
    script = checkpoints.read_record(folder)["script"]
    if script not in LEARNERS:
        raise InputError(f"{folder} is a run of {script}; expected one of {', '.join(LEARNERS)}")
    module = importlib.import_module(script)
    args = checkpoints.args_of(folder, module.Args)
    if not args.deployments:
        raise InputError(f"{folder} has no deployment to match with")
    where = args.env, args.dataset, args.dataset_size, args.split
    dataset = datasets.load(*where, discrete=script == "otc_cql_discrete")
    checkpoint = checkpoints.read_checkpoint(folder, "checkpoint.pt", script)
    checkpoints.check_unchanged(checkpoint, "data", dataset.fingerprint(), folder)
    steps = cli.deployment_steps(args, len(dataset.rewards))
    replay = Replay(dataset, args.num_seeds, args.deployments + more, steps)
    sizes = replay.num_groups, replay.obs.shape[2], replay.actions.shape[2]
    agent = getattr(module, LEARNERS[script])(*sizes, args)
    run = Restored(checkpoints.seeds_folders(folder)[0], script, module, args, steps, replay, agent)
    agent.load_state_dict(checkpoint["agent"])
    replay.load_state_dict(checkpoint["replay"])
    return run
