"""What every stage's command line does alike: logging, params.yaml, and errors a person can read."""

import sys
from collections.abc import Callable

from pipeline.errors import InputError
from pipeline.params import Params, load_params
from pipeline.progress import configure_logging


def stage(main: Callable[[Params], None]) -> None:
    """Run `main` with the parameters of ./params.yaml; an expected failure is one message and exit status 1.

    Expected are InputError and what the system refuses (OSError: no space, no permission, no network); anything else
    is a defect of ours and keeps its traceback.
    """
    configure_logging()
    try:
        main(load_params())
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
