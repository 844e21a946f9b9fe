"""The command line, in this process: another one takes seconds to import what a command needs."""

import os
import signal
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest

from pipeline import cli


def cosface(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`cosface` in a folder, as a process of its own would have ended; this one is left as it was."""
    out, err = StringIO(), StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with (
            chdir(folder),
            patch.dict(os.environ, env),
            patch.object(sys, "argv", ["cosface", *arguments]),
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), out.getvalue(), err.getvalue())
