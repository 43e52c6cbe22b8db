"""d3rlpy's side of `benchmarks.peers`; runs in the environment which that makes, and needs nothing
of this project.

    python benchmarks/d3rlpy_worker.py DATA.hdf5 ACTION_DIM SIZES COMPILE DEVICE

SIZES is JSON, {ALGORITHM: [batch size, hidden units], ...}. Reads lines "ALGORITHM UPDATES" and
answers each with the seconds that they took, batches included.
"""

import json
import sys
import time

import d3rlpy
import h5py
import torch
from d3rlpy.models import VectorEncoderFactory

path, action_dim, sizes, compile_graph, device = sys.argv[1:]
sizes = json.loads(sizes)
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


def options(name: str, *networks: str) -> dict:
    batch_size, hidden = sizes[name]
    layers = [hidden] * 2
    its = {f"{n}_encoder_factory": VectorEncoderFactory(layers) for n in networks}
    return its | {"batch_size": batch_size, "compile_graph": compile_graph == "1"}


both, algos = ("actor", "critic"), d3rlpy.algos
configs = {
    "BCQ": algos.BCQConfig(n_action_samples=10, **options("BCQ", *both, "imitator")),
    "AWAC": algos.AWACConfig(n_action_samples=1, **options("AWAC", *both)),
    "CQL": algos.CQLConfig(n_action_samples=10, alpha_learning_rate=0.0, **options("CQL", *both)),
    "TD3BC": algos.TD3PlusBCConfig(**options("TD3BC", *both)),
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
        losses = learners[name].update(dataset.sample_transition_batch(sizes[name][0]))
    float(next(iter(losses.values())))  # waits for a GPU
    print(now() - start, file=answers, flush=True)
