"""One thread per process: the tests' networks are too small for more, and a second thread that has
to wait for its core makes an update take as long as a thousand. Matrix products as in the scripts,
whatever a test calls first. Pictures without a screen, whichever test draws first: a process that
OpenGL refused once aborts at the next."""

import os
import sys
from ctypes.util import find_library

os.environ.setdefault("OMP_NUM_THREADS", "1")
has_screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
if sys.platform == "linux" and not has_screen and find_library("EGL"):
    os.environ.setdefault("MUJOCO_GL", "egl")

import pytest  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402

from common import cli  # noqa: E402
from common.device import multiply_by_onednn  # noqa: E402
from tests.helpers import run  # noqa: E402
from tests.tiny_task import write_data, write_discrete_data  # noqa: E402

multiply_by_onednn()
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])])
def device(request):
    torch.manual_seed(0)
    return request.param


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Built-in data is made anew, by the makers as they are, and stays out of the user's folder."""
    os.environ["OTC_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def data(tmp_path):
    write_discrete_data(tmp_path / "steps.hdf5")
    return write_data(tmp_path / "point.hdf5")


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Check that a script refuses its command line with `words` and writes no run into b/."""

    def check(words, script, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run(monkeypatch, script, *argv)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.startswith("error: ") and words in error, error
        assert len(error.strip().splitlines()) <= 2 and not (tmp_path / "b").exists()

    return check


@pytest.fixture
def refusal(monkeypatch, capsys, tmp_path):
    """What a tool says on refusing its command line, having written no file."""

    def of(tool, *argv):
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, argv)])
        with pytest.raises(SystemExit) as error:
            cli.cli(tool.main, tool.Args, tyro.cli)
        assert error.value.code == 2 and sorted(tmp_path.rglob("*")) == before
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") <= 2 and not said.out
        return said.err

    return of
