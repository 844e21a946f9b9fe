import hashlib
import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from stages.download import fetch
from stages.download.errors import SourceError
from stages.download.fetch import Obtained, Wanted, download, obtain

CONTENT = bytes(range(256)) * 12_000  # 3 MB: several chunks
KEY = "download.lfw.location"


def wanted(location: str, sha256: str | None = None) -> Wanted:
    return Wanted(location, sha256, KEY, "download.lfw.sha256")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def ranges(host: Any) -> list[str | None]:
    return [request[1] for request in host.requests]


def test_a_file_is_fetched_once(host: Any, tmp_path: Path) -> None:
    host.files["lfw.tgz"] = CONTENT
    first = download(host.address("lfw.tgz"), KEY, tmp_path)
    assert first.read_bytes() == CONTENT
    assert first.name.endswith("-lfw.tgz")
    assert download(host.address("lfw.tgz"), KEY, tmp_path) == first
    assert len(host.requests) == 1
    assert not list(tmp_path.glob("*.partial*"))


def test_addresses_that_end_alike_do_not_meet(host: Any, tmp_path: Path) -> None:
    host.files |= {"one/download": b"first", "two/download": b"second"}
    paths = [download(host.address(path), KEY, tmp_path) for path in host.files]
    assert [path.read_bytes() for path in paths] == [b"first", b"second"]


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"v1"'},
        {"Last-Modified": "Sat, 01 Jan 2022 00:00:00 GMT"},
        {"ETag": 'W/"v1"', "Last-Modified": "Sat, 01 Jan 2022 00:00:00 GMT"},
        {},
    ],
)
def test_a_dropped_connection_is_resumed(host: Any, tmp_path: Path, headers: dict[str, str]) -> None:
    host.files["a.zip"], host.headers, host.drops = CONTENT, headers, [1_234_567]
    assert download(host.address("a.zip"), KEY, tmp_path).read_bytes() == CONTENT
    assert ranges(host) == [None, "bytes=1234567-"]
    strong = headers.get("ETag") if headers.get("ETag") == '"v1"' else headers.get("Last-Modified")
    assert host.requests[1][2] == strong


def test_a_host_that_falls_silent_is_left_and_asked_for_the_rest(
    host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT", 1.0)
    host.files["a.zip"], host.stalls = CONTENT, [1_234_567]
    assert download(host.address("a.zip"), KEY, tmp_path).read_bytes() == CONTENT
    assert not host.silences  # it is silent still
    assert ranges(host) == [None, "bytes=1234567-"]


def test_drops_with_progress_between_them_are_not_counted(host: Any, tmp_path: Path) -> None:
    host.files["a.zip"], host.drops = CONTENT, [100_000] * (3 * fetch.ATTEMPTS)
    assert download(host.address("a.zip"), KEY, tmp_path).read_bytes() == CONTENT
    assert len(host.requests) == 3 * fetch.ATTEMPTS + 1


def test_a_later_run_goes_on_where_an_earlier_one_failed(host: Any, tmp_path: Path) -> None:
    host.files["a.zip"], host.drops = CONTENT, [2_000_000] + [0] * (fetch.ATTEMPTS - 1 + fetch.ATTEMPTS)
    with pytest.raises(SourceError, match=rf"a\.zip: cannot be fetched: .*Run again to go on .* or set {KEY} in"):
        download(host.address("a.zip"), KEY, tmp_path)
    host.requests, host.drops = [], []
    assert download(host.address("a.zip"), KEY, tmp_path).read_bytes() == CONTENT
    assert ranges(host) == ["bytes=2000000-"]


@pytest.mark.parametrize("if_range", [True, False], ids=["answers 200", "ignores If-Range"])
@pytest.mark.parametrize("size", [3_000_000, 1000], ids=["long", "shorter than what came"])
def test_a_file_that_changed_in_between_is_fetched_afresh(host: Any, tmp_path: Path, if_range: bool, size: int) -> None:
    host.files["a.zip"], host.headers, host.drops = CONTENT, {"ETag": '"v1"'}, [1_000_000] + [0] * 9
    with pytest.raises(SourceError):
        download(host.address("a.zip"), KEY, tmp_path)
    host.files["a.zip"], host.headers, host.drops = b"new" * size, {"ETag": '"v2"'}, []
    host.if_range = if_range
    assert download(host.address("a.zip"), KEY, tmp_path).read_bytes() == b"new" * size


def test_a_host_that_cannot_go_on_is_asked_for_all(host: Any, tmp_path: Path) -> None:
    host.files["a.zip"], host.drops, host.ranges = CONTENT, [1_000_000], False
    assert download(host.address("a.zip"), KEY, tmp_path).read_bytes() == CONTENT


def test_what_was_complete_but_not_renamed_is_not_asked_for_again(host: Any, tmp_path: Path) -> None:
    host.files["a.zip"] = CONTENT
    path = download(host.address("a.zip"), KEY, tmp_path)
    partial = path.rename(path.with_name(f"{path.name}.partial"))
    note = {"validator": None, "total": len(CONTENT)}
    partial.with_name(f"{partial.name}.json").write_text(json.dumps(note))
    assert download(host.address("a.zip"), KEY, tmp_path).read_bytes() == CONTENT
    assert len(host.requests) == 1


def test_a_redirection_is_followed(host: Any, tmp_path: Path) -> None:
    host.files["a.zip"], host.drops = CONTENT, [1_000_000]
    assert download(host.address("moved/a.zip"), KEY, tmp_path).read_bytes() == CONTENT


def test_a_host_in_trouble_is_asked_again(host: Any, tmp_path: Path) -> None:
    host.files["a.zip"], host.statuses = CONTENT, [503, 500]
    assert download(host.address("a.zip"), KEY, tmp_path).read_bytes() == CONTENT
    host.statuses = [503] * 99
    with pytest.raises(SourceError, match=rf"b\.zip: the host answers 503 Service Unavailable; set {KEY} in"):
        download(host.address("b.zip"), KEY, tmp_path)
    assert len(host.requests) == 3 + fetch.ATTEMPTS


def test_a_host_with_too_many_requests_is_asked_again_when_it_says(
    host: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host.files["a.zip"], host.statuses, host.retry_after = CONTENT, [429], "1"
    assert download(host.address("a.zip"), KEY, tmp_path).read_bytes() == CONTENT
    assert "the host answers 429 Too Many Requests; trying again in 1 s" in caplog.text
    host.statuses, host.retry_after = [429] * 99, None
    with pytest.raises(SourceError, match=rf"b\.zip: the host answers 429 Too Many Requests; set {KEY} in"):
        download(host.address("b.zip"), KEY, tmp_path)
    assert len(host.requests) == 2 + fetch.ATTEMPTS


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("120", 120, 120),
        ("0", 0, 0),
        ("999999999", fetch.LONGEST_WAIT, fetch.LONGEST_WAIT),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0, 0),
        ("", 0, 0),
        ("soon", 0, 0),
        ("-5", 0, 0),
    ],
)
def test_when_a_host_asks_to_come_again(value: str, least: float, most: float) -> None:
    assert least <= fetch.retry_after(value) <= most


def test_a_host_may_ask_by_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(minutes=30), usegmt=True)
    assert 1700 < fetch.retry_after(date) <= 1800


def test_a_refusal_is_final_and_names_address_and_key(host: Any, tmp_path: Path) -> None:
    address = host.address("gone.zip")
    with pytest.raises(SourceError) as caught:
        download(address, KEY, tmp_path)
    assert str(caught.value) == (
        f"{address}: the host answers 404 Not Found; set {KEY} in params.yaml to an address that works, "
        "or to the path of a copy on this machine"
    )
    assert len(host.requests) == 1


def test_what_signs_an_address_is_not_told(host: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    address = host.address("a.zip").replace("//", "//me:SECRET@") + "?signature=SECRET"
    host.statuses = [503, 404]
    for reason in ("the host answers 404 Not Found", "a web page"):
        with pytest.raises(SourceError, match=f"^{host.address('a.zip')}: {reason}") as caught:
            obtain(wanted(address), tmp_path)
        assert "SECRET" not in str(caught.value) + caplog.text
        host.files["a.zip?signature=SECRET"] = b"<html>"
    assert "the host answers 503 Service Unavailable; trying again" in caplog.text


def test_a_host_out_of_reach_is_named(host: Any, tmp_path: Path) -> None:
    address = host.address("a.zip")
    host.server_close()
    host.shutdown()
    with pytest.raises(SourceError, match=rf"^{address}: cannot be fetched: .*refused.*set {KEY} in params.yaml"):
        download(address, KEY, tmp_path)


@pytest.mark.parametrize("address", ["http://", "http://[::1/a.zip"])
def test_an_impossible_address_is_named(tmp_path: Path, address: str) -> None:
    with pytest.raises(SourceError, match=rf"cannot be fetched: .*set {KEY} in params.yaml"):
        download(address, KEY, tmp_path)


def test_a_web_page_is_not_taken_for_the_file(host: Any, tmp_path: Path) -> None:
    address = host.address("uc")
    host.files["uc"] = b"\n<!DOCTYPE html><html><head><title>Virus scan warning</title></head></html>"
    with pytest.raises(SourceError) as caught:
        obtain(wanted(address), tmp_path)
    assert str(caught.value) == (
        f'{address}: a web page ("Virus scan warning"), not the file: the host wants a login or a confirmation. '
        f"Download the file with a browser and set {KEY} in params.yaml to its path"
    )
    host.files["uc"] = CONTENT
    assert obtain(wanted(address), tmp_path).path.read_bytes() == CONTENT


def test_a_wrong_checksum_shows_both_and_costs_no_second_download(host: Any, tmp_path: Path) -> None:
    host.files["a.zip"], address = CONTENT, host.address("a.zip")
    with pytest.raises(SourceError) as caught:
        obtain(wanted(address, "0" * 64), tmp_path)
    path = next(tmp_path.glob("*-a.zip"))
    assert str(caught.value) == (
        f"{address}: wrong checksum: expected sha256 {'0' * 64}, the file has {sha256(CONTENT)}. If it is damaged, "
        f"delete {path} to fetch it again; if it is the one you want, set download.lfw.sha256 in params.yaml to its "
        "hash"
    )
    assert obtain(wanted(address, sha256(CONTENT)), tmp_path) == Obtained(
        path, sha256(CONTENT), downloaded=True, vouched=True
    )
    assert len(host.requests) == 1


def test_only_what_was_fetched_is_discarded(host: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine.zip"
    mine.write_bytes(CONTENT)
    host.files["a.zip"] = CONTENT
    for location in (str(mine), mine.as_uri(), host.address("a.zip")):
        got = obtain(wanted(location, sha256(CONTENT)), tmp_path / "downloads")
        assert got.path.read_bytes() == CONTENT
        got.discard()
    assert mine.exists()
    assert not list((tmp_path / "downloads").glob("*.zip"))


def test_a_local_file_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with pytest.raises(SourceError) as caught:
        obtain(wanted(str(path)), tmp_path)
    assert str(caught.value) == f"{path}: no such file; set {KEY} in params.yaml to where it is"
    path.write_bytes(CONTENT)
    with pytest.raises(SourceError, match=f"wrong checksum: expected sha256 {'1' * 64}.*damaged, get it again; "):
        obtain(wanted(str(path), "1" * 64), tmp_path)
    with pytest.raises(SourceError, match=f"a folder, where {KEY} in params.yaml needs a file; is it `source: folder`"):
        obtain(wanted(str(tmp_path)), tmp_path)
    path.write_bytes(b"<html>")
    with pytest.raises(SourceError, match=f"{path}: a web page, not the file"):
        obtain(wanted(str(path)), tmp_path)
