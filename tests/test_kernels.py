"""How many kernels an update launches on a GPU: counted without one, on the meta device. In a CUDA
graph each takes a microsecond or more, however little it does."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import strategies
from common.replay import Replay
from tests.helpers import ACTION_DIM, OBS_DIM, WITH_OTC, learner_of, random_team

# Operations that launch nothing, beside views
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view"}


class Kernels(TorchDispatchMode):
    """Counts operations that are not views: a sort, which launches several kernels, as one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func._schema.returns
        alias = returned[0].alias_info if returned else None
        is_view = alias is not None and not alias.is_write
        self.count += not is_view and func._schema.name.split("::")[1] not in FREE
        return func(*args, **(kwargs or {}))


def kernels_of(monkeypatch, script, *kind, **options):
    """Of one fine-tuning update with the defaults of the script."""
    module, device = importlib.import_module(script), torch.device("meta")
    args = module.Args(num_seeds=2, **options)
    replay = Replay(random_team(), args.num_seeds, 1, args.references, device)
    with device:
        agent = learner_of(script)(replay.num_groups, OBS_DIM, ACTION_DIM, args)
        strategy = strategies.make(replay, args, module.OTC)
    if strategy.embedding is not None:
        strategy.embedding.latest = torch.empty(
            replay.num_groups, args.references, args.embedding_dim, device=device
        )
    gather = replay.gather_following if script == "icq" else replay.gather
    counter = Kernels()

    def step(optimizer):  # the steps' numbers, and the fused kernel, which meta has not
        counter.count += 2

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with counter:
        index = strategy.draw(agent)
        agent.update(gather(index), *kind)
        strategy.diagnostics(index)
    return counter.count


KINDS = {"otc_td3bc": [True, False], "otc_bremen": ["fit"]}
# A change that makes fewer of them lowers these
EXPECTED = {
    "icq": {"uniform": 204, "value": 334, "embedding": 259},
    "omar": {"uniform": 289, "value": 421, "embedding": 344},
    "otc_awac": {"uniform": 172, "value": 302, "embedding": 227},
    "otc_bcq": {"uniform": 249, "value": 391, "embedding": 304},
    "otc_bremen": {"uniform fit": 95, "value fit": 238, "embedding fit": 150},
    "otc_cql": {"uniform": 278, "value": 410, "embedding": 333},
    "otc_cql_discrete": {"uniform": 138, "value": 269, "embedding": 193},
    "otc_td3bc": {
        "uniform True": 143,
        "value True": 273,
        "embedding True": 198,
        "uniform False": 85,
        "value False": 215,
        "embedding False": 140,
    },
}


@pytest.mark.parametrize("script", WITH_OTC)
def test_an_update_launches_as_many_kernels_as_it_did(monkeypatch, script):
    found = {}
    for kind in KINDS.get(script, [None]):
        kinds = () if kind is None else (kind,)
        for distance in (None, "value", "embedding"):
            options = {"sampling": "uniform"} if distance is None else {"distance": distance}
            name = f"{distance or 'uniform'}{'' if kind is None else f' {kind}'}"
            found[name] = kernels_of(monkeypatch, script, *kinds, **options)
    assert found == EXPECTED[script]


def test_the_count_is_that_of_the_operations():
    """Two products and a sum are three; views are none; an operation that writes is one."""
    x = torch.empty(2, 3, 3, device="meta")
    with Kernels() as counter:
        y = (x @ x @ x.mT.flatten(0, 1).view(2, 3, 3)).sum()
        x.add_(1)[0].expand(4, 3, 3).transpose(0, 1)
    assert counter.count == 5 and y.shape == ()
