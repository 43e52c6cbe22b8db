"""The command line of programs that run a script with a part of it replaced."""

import dataclasses
import sys
from collections.abc import Callable

from common import InputError, cli


def run(choose: Callable[[list[str]], tuple[type, Callable, list[str]]]) -> None:
    """Call what `choose` makes of the words of the command line: the script's Args, what to call
    with them in place of its `main`, and the flags that are left for the script."""

    def parse(_, description):
        words = sys.argv[1:]
        if words[:1] in (["-h"], ["--help"]):
            print(sys.modules[choose.__module__].__doc__)
            sys.exit()
        args_type, main, flags = choose(words)
        args = cli.parse(args_type, flags)
        if args.resume is not None:
            raise InputError("--resume: these runs cannot be resumed")
        return main, dataclasses.replace(args, cuda_graph=False)

    def call(found) -> None:
        main, args = found
        main(args)

    cli.cli(call, type(None), parse)
