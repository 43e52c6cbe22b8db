"""A checkout's side of `benchmarks.turns`, run in that checkout: of this project it imports what is
there.

Reads lines "SCRIPT SEEDS UPDATES STRATEGY" and answers each with the processor's seconds that they
took.
"""

import sys
import time

from benchmarks import speed
from common import datasets
from common.device import Graphed, pick_device

answers, sys.stdout = sys.stdout, sys.stderr
device = pick_device(speed.Args(device="cpu"))
data, replays, calls = {}, {}, {}


def replay_of(discrete: bool, num_seeds: int):
    if (discrete, num_seeds) not in replays:
        if discrete not in data:
            small = speed.Args().env, "built-in", 100_000
            data[discrete] = speed.discrete_data() if discrete else datasets.load(*small)
        replays[discrete, num_seeds] = speed.fill(data[discrete], num_seeds, device)
    return replays[discrete, num_seeds]


for line in sys.stdin:
    script, num_seeds, updates, strategy = line.rstrip("\n").split(" ", 3)
    if (script, num_seeds, strategy) not in calls:
        replay = replay_of(script == "otc_cql_discrete", int(num_seeds))
        parts = speed.learner_of(script, replay, speed.STRATEGIES[strategy])
        update, kind_of = speed.update_of(script, replay, *parts)
        calls[script, num_seeds, strategy] = Graphed(update, False, kind_of)
    start = time.process_time()
    for number in range(int(updates)):
        calls[script, num_seeds, strategy](number)
    print(time.process_time() - start, file=answers, flush=True)
