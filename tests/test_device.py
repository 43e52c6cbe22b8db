"""The device: threads of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHOW = (
    "import torch\nfrom common.device import pick_device\nimport otc_bcq\n"
    "pick_device(otc_bcq.Args(device='cpu', threads={threads}))\nprint(torch.get_num_threads())"
)


@pytest.mark.parametrize(
    ("threads", "environment", "expected"), [(None, None, 1), (None, "2", 2), (3, "2", 3)]
)
def test_one_thread_unless_the_user_says_otherwise(threads, environment, expected):
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env |= {} if environment is None else {"OMP_NUM_THREADS": environment}
    command = [sys.executable, "-c", SHOW.format(threads=threads)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == expected
