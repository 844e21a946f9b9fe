"""The functions in kernels.cpp, which are compiled when the project is installed."""

import ctypes
import math
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

LANES = 8
"""Floats that they compute at once."""
_VERSION = 1
"""Of what they take and give."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there are none that can be used.

    Raises:
        InputError: they are of another version of the project.
    """
    path = _path()
    if path is None:
        return None
    found = ctypes.CDLL(str(path))
    if found.version() != _VERSION:
        raise InputError(
            f"{path} was compiled from version {found.version()} of kernels.cpp, and {_VERSION} is needed: "
            "install the project again (rm .venv/installed, then make repro)"
        )
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    found.layer.argtypes = [pointer, *[integer] * 6, *[pointer] * 3, ctypes.c_int, integer, pointer]
    found.crops.argtypes = [*[pointer] * 3, *[integer] * 3, ctypes.c_int, pointer]
    return found if found.supported() else None


def missing() -> str | None:
    """Why there are no compiled functions; None where there are."""
    if _path() is None:
        return "kernels.cpp was not compiled when the project was installed, for want of a C++ compiler"
    return "this processor has no AVX2" if library() is None else None


def _path() -> Path | None:
    paths = [Path(__file__).with_name("_kernels" + suffix) for suffix in EXTENSION_SUFFIXES]
    return next((path for path in paths if path.exists()), None)


def room(*shape: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Memory for a result, with the lanes beyond its end that may be written, and the result as a part of it."""
    size = math.prod(shape)
    out = np.empty(size + LANES, np.float32)
    return out, out[:size].reshape(shape)
