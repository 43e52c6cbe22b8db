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


@pytest.mark.parametrize("is_late", [False, True])
def test_no_product_is_rounded_even_where_onednn_was_at_work_before(is_late):
    """oneDNN reads which instructions it may use at its first primitive."""
    code = (
        "import torch\nfrom common import device\n"
        "x, weight = torch.randn(8, 3, 16, 16), torch.randn(8, 3, 3, 3)\n"
        f"{is_late} and torch.nn.functional.conv2d(x, weight)\n"
        "class Cpu(type(device.Path())):\n"
        "    def read_text(self):\n        return 'AuthenticAMD'\n"
        "device.Path = Cpu\n"
        "device.multiply_by_onednn()\n"
        "a, b = torch.randn(600, 300), torch.randn(300, 400)\n"
        "assert (a @ b - (a.double() @ b.double()).float()).abs().max() < 1e-3\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
