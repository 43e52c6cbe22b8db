"""d3rlpy's side of `benchmarks.peers`; runs in the environment which that makes, and needs nothing
of this project.

    python benchmarks/d3rlpy_worker.py DATA.hdf5 ACTION_DIM HIDDEN_BCQ HIDDEN COMPILE DEVICE

Reads lines "ALGORITHM UPDATES" and answers each with the seconds that they took, batches included.
"""

import sys
import time

import d3rlpy
import h5py
import torch
from d3rlpy.models import VectorEncoderFactory

path, action_dim, hidden_bcq, hidden, compile_graph, device = sys.argv[1:]
answers, sys.stdout = sys.stdout, sys.stderr
torch.set_num_threads(1)
with h5py.File(path) as file:
    # The first agent's: everything observed, its own actions
    n = min(len(file["rewards"]), 100_000)
    dataset = d3rlpy.dataset.MDPDataset(
        file["observations"][:n],
        file["actions"][:n, : int(action_dim)],
        file["rewards"][:n],
        terminals=file["terminals"][:n].astype("float32"),
        timeouts=file["timeouts"][:n].astype("float32"),
    )


def encoders(units: str, *names: str) -> dict:
    return {f"{n}_encoder_factory": VectorEncoderFactory([int(units)] * 2) for n in names}


both = encoders(hidden, "actor", "critic")
every = {"batch_size": 128, "compile_graph": compile_graph == "1"}
configs = {
    "BCQ": d3rlpy.algos.BCQConfig(
        n_action_samples=10, **encoders(hidden_bcq, "actor", "critic", "imitator"), **every
    ),
    "AWAC": d3rlpy.algos.AWACConfig(n_action_samples=1, **both, **every),
    "CQL": d3rlpy.algos.CQLConfig(n_action_samples=10, alpha_learning_rate=0.0, **both, **every),
    "TD3BC": d3rlpy.algos.TD3PlusBCConfig(**both, **every),
}
learners = {}
for line in sys.stdin:
    name, updates = line.split()
    if name not in learners:
        learners[name] = configs[name].create(device=device)
        learners[name].build_with_dataset(dataset)
    now = time.process_time if device == "cpu" else time.perf_counter
    start = now()
    for _ in range(int(updates)):
        losses = learners[name].update(dataset.sample_transition_batch(128))
    float(next(iter(losses.values())))  # waits for a GPU
    print(now() - start, file=answers, flush=True)
