"""An address becomes a file on this machine: resumable, retried, and checked before anyone reads it."""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Self

import filelock
import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_combine, wait_exponential

from pipeline.params import is_remote, local_path, shown
from pipeline.progress import bar
from pipeline.tables import atomic, sha256_file
from stages.download.errors import DamagedError, SourceError

log = logging.getLogger(__name__)

ATTEMPTS = 5
"""So many attempts in a row without a new byte, and a download is given up."""
WAIT = wait_exponential(multiplier=1, max=30)
"""Seconds between attempts: 1, 2, 4, ..., 30."""
LONGEST_WAIT = 3600.0
"""Seconds that a host may ask for besides."""
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""


@dataclass(frozen=True)
class Wanted:
    """A file that params.yaml asks for."""

    location: str
    """A path, a file:// or an http(s):// address."""
    sha256: str | None
    """What its content must hash to; None for whatever is there."""
    key: str
    """Where params.yaml gives the location, such as `download.lfw.pairs`."""
    sha256_key: str
    """Where params.yaml gives the hash."""


@dataclass(frozen=True)
class Obtained:
    """A checked file on this machine."""

    path: Path
    sha256: str
    downloaded: bool
    vouched: bool
    """params.yaml has its hash: it is the file that is meant, whatever may be wrong with it."""

    @contextmanager
    def used(self) -> Iterator[None]:
        """Use it within the block; where it proves damaged, the next run fetches it again."""
        try:
            yield
        except DamagedError:
            if self.downloaded and not self.vouched:
                self.path.unlink()
                log.warning("%s: removed; the next run fetches it again", self.path)
            raise

    def discard(self) -> None:
        """Remove the file if it was fetched; what was there before us stays."""
        if self.downloaded:
            self.path.unlink()


def obtain(wanted: Wanted, downloads: Path) -> Obtained:
    """Have a file on this machine, fetched into `downloads` where it is behind an address.

    Raises:
        SourceError: it does not exist, is a web page, or is not the one that the hash means.
    """
    remote = is_remote(wanted.location)
    path = download(wanted.location, wanted.key, downloads) if remote else local_path(wanted.location)
    if path.is_dir():
        raise SourceError(f"{path}: a folder, where {wanted.key} in params.yaml needs a file; is it `source: folder`?")
    if not path.exists():
        raise SourceError(f"{path}: no such file; set {wanted.key} in params.yaml to where it is")
    origin, page = shown(wanted.location), _web_page(path)
    if page is not None:
        if remote:
            path.unlink()  # the next run asks again
        raise SourceError(
            f"{origin}: a web page{page}, not the file: the host wants a login or a confirmation. "
            f"Download the file with a browser and set {wanted.key} in params.yaml to its path"
        )
    actual = sha256_file(path)
    if wanted.sha256 not in (None, actual):
        again = f"delete {path} to fetch it again" if remote else "get it again"
        raise SourceError(
            f"{origin}: wrong checksum: expected sha256 {wanted.sha256}, the file has {actual}. If it is "
            f"damaged, {again}; if it is the one you want, set {wanted.sha256_key} in params.yaml to its hash"
        )
    return Obtained(path, actual, downloaded=remote, vouched=wanted.sha256 is not None)


def _web_page(path: Path) -> str | None:
    """The title of a web page, in quotes or empty; None for any other file."""
    with path.open("rb") as file:
        head = file.read(4096)
    if not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return None
    title = re.search(rb"<title[^>]*>\s*(.*?)\s*</title>", head, re.IGNORECASE | re.DOTALL)
    return f' ("{title[1].decode(errors="replace")}")' if title else ""


def download(address: str, key: str, downloads: Path) -> Path:
    """Fetch an address into `downloads`; go on where an earlier attempt or run stopped.

    A download that was finished before is not fetched again. While it lasts it is called `<name>.partial`, with a
    note beside it of which version of the file it is part of.

    Args:
        address: http(s)://...
        key: where params.yaml gives the address.
        downloads: the folder.

    Raises:
        SourceError: the address is wrong, the host refuses, or it stays out of reach.
    """
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(address.partition("?")[0]).name)[-80:]
    # different addresses may end alike, `.../download` for one
    path = downloads / f"{hashlib.sha256(address.encode()).hexdigest()[:8]}-{name}"
    partial = path.with_name(f"{path.name}.partial")
    downloads.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f"{path.name}.lock")):
        if path.exists():
            log.info("%s: fetched before", path)
            return path
        attempts = Retrying(
            retry=retry_if_exception(_worth_another_attempt),
            stop=_stalled(partial),
            wait=wait_combine(WAIT, _asked_wait),
            before_sleep=_tell,
            reraise=True,
        )
        try:
            attempts(_go_on, address, partial)
        except httpx.HTTPStatusError as error:
            raise SourceError(
                f"{shown(address)}: {_why(error)}; set {key} in params.yaml to an address that works, "
                "or to the path of a copy on this machine"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SourceError(
                f"{shown(address)}: cannot be fetched: {_why(error)}. Run again to go on with what has "
                f"come so far, or set {key} in params.yaml to another address or to the path of a copy on this machine"
            ) from error
        partial.replace(path)
        _note_path(partial).unlink()
    return path


def _worth_another_attempt(error: BaseException) -> bool:
    """A lost connection or a host in trouble; not a refusal, and not an address that can never work."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.is_server_error or error.response.status_code == httpx.codes.TOO_MANY_REQUESTS
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)


def _asked_wait(state: RetryCallState) -> float:
    """Seconds that the host asks to be left alone for."""
    assert state.outcome is not None
    error = state.outcome.exception()
    return retry_after(error.response.headers.get("Retry-After", "")) if isinstance(error, httpx.HTTPStatusError) else 0


def retry_after(value: str) -> float:
    """Seconds by a Retry-After header (RFC 9110, 10.2.3), a number or a date: 0 by none, LONGEST_WAIT at most."""
    try:
        seconds = float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0
    return min(max(seconds, 0), LONGEST_WAIT)


def _tell(state: RetryCallState) -> None:
    assert state.outcome is not None
    log.warning("%s; trying again in %.0f s", _why(state.outcome.exception()), state.upcoming_sleep)


def _why(error: BaseException | None) -> str:
    """What has gone wrong; not in httpx's words where they repeat the address."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"the host answers {error.response.status_code} {error.response.reason_phrase}".strip()
    return str(error) or type(error).__name__


def _stalled(partial: Path) -> Callable[[RetryCallState], bool]:
    """Give up once the last `ATTEMPTS` attempts together have brought nothing."""
    sizes: list[int] = []

    def stop(_: RetryCallState) -> bool:
        sizes.append(_size(partial))
        return len(sizes) >= ATTEMPTS and sizes[-1] <= sizes[-ATTEMPTS]

    return stop


@dataclass(frozen=True)
class _Version:
    """What tells one version of a file from another, as far as the host says."""

    validator: str | None
    """The strong ETag or else the Last-Modified date."""
    total: int | None
    """Size of the whole file in bytes."""

    @classmethod
    def of(cls, response: httpx.Response) -> Self:
        """The version of the file that an answer carries, whole (200) or in part (206)."""
        etag = response.headers.get("ETag", "W/")
        validator = response.headers.get("Last-Modified") if etag.startswith("W/") else etag
        if response.status_code == httpx.codes.PARTIAL_CONTENT:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
        else:
            total = response.headers.get("Content-Length", "")
        return cls(validator, int(total) if total.isdecimal() else None)


def _go_on(address: str, partial: Path) -> None:
    """One attempt: ask for what `partial` lacks, or for all if the host cannot go on or has a new version."""
    offset, begun = _size(partial), _read_note(partial)
    if offset and begun.total == offset:
        return
    headers = {"Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if begun.validator:
            headers["If-Range"] = begun.validator
    with httpx.stream("GET", address, headers=headers, follow_redirects=True, timeout=TIMEOUT) as response:
        if offset and response.status_code in (
            httpx.codes.PARTIAL_CONTENT,
            httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE,
        ):
            starts_here = response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
            if not starts_here or _Version.of(response) != begun:
                partial.unlink()
                raise httpx.RemoteProtocolError("the file behind the address has changed; starting again")
            _receive(response, partial, "ab", offset)
        else:
            response.raise_for_status()
            _receive(response, partial, "wb", 0)


def _receive(response: httpx.Response, partial: Path, mode: str, offset: int) -> None:
    """Append an answer's bytes, as sent, to `partial`."""
    version = _Version.of(response)
    name = partial.name.removesuffix(".partial")
    with (
        partial.open(mode) as file,
        bar(total=version.total, label=name, unit="B", initial=offset) as shown,
    ):
        shown.unit_scale = True
        if not offset:
            with atomic(_note_path(partial)) as note:
                note.write_text(json.dumps(asdict(version)))
        for chunk in response.iter_raw():  # as they come: a chunk size would lose what has come when the line drops
            file.write(chunk)
            shown.update(len(chunk))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _note_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _read_note(partial: Path) -> _Version:
    note = _note_path(partial)
    return _Version(**json.loads(note.read_text())) if note.exists() else _Version(None, None)
