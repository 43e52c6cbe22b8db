"""What the scripts share: environments, datasets, replay, the OTC sampler and run folders."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user got wrong, in one or two lines; the scripts print it and exit with status 2."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The valid names, those nearest to `name` first, for the end of an error message."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}"
