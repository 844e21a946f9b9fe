"""Whether there are compiled functions, and what is said where there are none."""

import ctypes
from pathlib import Path

import pytest

from pipeline.errors import InputError
from stages.align import kernels


class Library:
    """A compiled file of some version, for some processors."""

    def __init__(self, version: int, supported: int) -> None:
        self.version, self.supported = lambda: version, lambda: supported
        self.layer = self.crops = ctypes.CDLL(None).abs


def given(monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    monkeypatch.setattr(kernels, "_path", lambda: Path("_kernels.so"))
    monkeypatch.setattr(kernels, "library", kernels.library.__wrapped__)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: library)


@pytest.mark.usefixtures("compiled")
def test_what_is_compiled_here_can_be_used() -> None:
    library = kernels.library()
    assert library is not None
    assert library.version() == kernels._VERSION


def test_of_another_version_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, Library(kernels._VERSION + 1, 1))
    with pytest.raises(InputError, match=r"_kernels\.so was compiled from version .* install the project again"):
        kernels.library()


def test_a_processor_that_lacks_what_it_needs_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, Library(kernels._VERSION, 0))
    assert kernels.library() is None
    assert kernels.missing() == "this processor has no AVX2"


def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_path", lambda: None)
    monkeypatch.setattr(kernels, "library", kernels.library.__wrapped__)
    assert kernels.library() is None
    assert "for want of a C++ compiler" in str(kernels.missing())
