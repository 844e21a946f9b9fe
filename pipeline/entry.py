"""What every stage's command line does alike: its argument, logging, params.yaml, and errors a person can read."""

import argparse
import sys
from collections.abc import Callable, Sequence

from pipeline.errors import InputError, said
from pipeline.params import load_params
from pipeline.progress import configure_logging


def stage(main: Callable[..., None], sets: Sequence[str] = ()) -> None:
    """Run `main` with the parameters of ./params.yaml, and with the one of `sets`, if there are any, that is asked for.

    An expected failure is one message and exit status 1, an interruption by Ctrl-C one and 130; a command line that
    asks for anything else is 2. Expected are InputError and what the system refuses (OSError: no space, no permission,
    no network); anything else is a defect of ours and keeps its traceback.
    """
    configure_logging()
    asked = _parser(main, sets).parse_args()
    try:
        main(load_params(), *vars(asked).values())
    except (InputError, OSError) as error:
        print(f"error: {said(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is finished", file=sys.stderr)
        sys.exit(130)


def _parser(main: Callable[..., None], sets: Sequence[str]) -> argparse.ArgumentParser:
    module = sys.modules["__main__"].__spec__
    name = f"python -m {module.name.removesuffix('.__main__')}" if module else None
    parser = argparse.ArgumentParser(prog=name, description=f"{main.__doc__} Everything else is in ./params.yaml.")
    if sets:
        parser.add_argument("set", choices=sets)
    return parser
