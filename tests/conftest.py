"""One thread per process: the tests' networks are too small for more, and a second thread that has
to wait for its core makes an update take as long as a thousand."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
