"""One thread per process: the tests' networks are too small for more, and a second thread that has
to wait for its core makes an update take as long as a thousand. Matrix products as in the scripts,
whatever a test calls first."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common.device import multiply_by_onednn  # noqa: E402

multiply_by_onednn()
