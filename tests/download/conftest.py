import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tenacity import wait_none

from stages.download import fetch


class Host(ThreadingHTTPServer):
    """A host on loopback whose moods a test sets."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        """Sent with every file, such as an ETag."""
        self.drops: list[int] = []
        """After how many bytes each of the next answers breaks off."""
        self.stalls: list[int] = []
        """After how many bytes each of the next answers falls silent, the connection open, until it is `over`."""
        self.over = threading.Event()
        self.silences: list[bool] = []
        """Of answers that fell silent and have ended: whether it was over, or a minute had passed."""
        self.statuses: list[int] = []
        """What the next answers are instead of a file."""
        self.retry_after: str | None = None
        """When they say to come again."""
        self.ranges = True
        """Whether it can go on in the middle."""
        self.if_range = True
        """Whether it minds If-Range."""
        self.requests: list[tuple[str, str | None, str | None]] = []
        """Path, Range and If-Range of each request."""

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class _Handler(BaseHTTPRequestHandler):
    server: Host  # pyrefly: ignore[bad-override-mutable-attribute]  # by no other is it made

    def do_GET(self) -> None:
        host, wanted, condition = self.server, self.headers["Range"], self.headers["If-Range"]
        path = self.path.lstrip("/")
        host.requests.append((path, wanted, condition))
        if host.statuses:
            self.send_response(host.statuses.pop(0))
            if host.retry_after is not None:
                self.send_header("Retry-After", host.retry_after)
            return self.end_headers()
        if path.startswith("moved/"):
            self.send_response(302)
            self.send_header("Location", f"/{path.removeprefix('moved/')}")
            return self.end_headers()
        content = host.files.get(path)
        if content is None:
            return self.send_error(404)
        self._send(content, self._start(wanted, condition, len(content)))
        return None

    def _start(self, wanted: str | None, condition: str | None, size: int) -> int | None:
        """Where the answer begins; None for past the end."""
        host = self.server
        current = condition in (None, host.headers.get("ETag"), host.headers.get("Last-Modified"))
        if wanted is None or not host.ranges or (host.if_range and not current):
            return 0
        match = re.fullmatch(r"bytes=(\d+)-", wanted)
        assert match is not None
        return int(match[1]) if int(match[1]) < size else None

    def _send(self, content: bytes, start: int | None) -> None:
        host = self.server
        self.send_response(416 if start is None else 206 if start else 200)
        if start is None:
            self.send_header("Content-Range", f"bytes */{len(content)}")
        elif start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        body = b"" if start is None else content[start:]
        for name, value in host.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if host.stalls:
            self.wfile.write(body[: host.stalls.pop(0)])
            host.silences.append(host.over.wait(60))
            return
        self.wfile.write(body[: host.drops.pop(0)] if host.drops else body)  # the connection closes when we return

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(fetch, "WAIT", wait_none())
    with Host() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()
