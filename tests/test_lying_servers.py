"""Servers that answer what they should not: every one ends in a named error, in bounded time."""

import contextlib
import gzip
import socket
import threading
import time

import pytest

import latentds.store.transport
from latentds.errors import FormatError, InputError
from latentds.store.client_errors import wait_of
from latentds.store.transport import Transport

BODY = b"0123456789abcdef" * 8
OK = b"HTTP/1.1 206 Partial Content\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


@contextlib.contextmanager
def answering(*parts: bytes, pause_s: float = 0.0):
    """Address of a server that sends these parts to whoever asks, whatever for."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.recv(1 << 16)
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause_s)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=serve, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/set"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


def read(location: str) -> bytes:
    return Transport(location).read("x", 16, len(BODY), len(BODY), attempts=1)


def test_a_server_that_tells_the_truth_is_read():
    with answering(OK + LENGTH + b"Content-Range: bytes 16-143/999\r\n\r\n" + BODY) as location:
        assert read(location) == BODY


@pytest.mark.parametrize(
    ("head", "body", "message"),
    [
        (b"Content-Length: many\r\n", BODY, "content-length is 'many', no number"),
        (b"Content-Length: \xb2\r\n", BODY, "content-length is"),
        (b"Content-Length: -5\r\n", BODY, "content-length is '-5'"),
        (b"Content-Length: 1" + b"0" * 5000 + b"\r\n", BODY, "content-length is|IncompleteRead"),
        (LENGTH, BODY[:-1], "IncompleteRead|127 of 128|ProtocolError"),
        (b"Content-Length: 200\r\n", BODY + BODY, "more than 128 bytes"),
        (b"Content-Range: bytes 0-127/999\r\n" + LENGTH, BODY, "bytes from 0 came, not from 16"),
        (b"Content-Encoding: gzip\r\n", gzip.compress(BODY, mtime=0), "comes compressed .'gzip'."),
        (b"Content-Encoding: br, gzip\r\n" + LENGTH, BODY, "comes compressed"),
        (b"Transfer-Encoding: chunked\r\n", b"zz\r\nabc\r\n", "after 1 tries"),
        (b"Transfer-Encoding: chunked\r\n", b"-5\r\nabc\r\n", "after 1 tries"),
        (b"X: " + b"a" * 70_000 + b"\r\n", BODY, "after 1 tries"),
        (b"X: 1\r\n" * 200, BODY, "after 1 tries"),
        (b"Location: file:///etc/passwd\r\n" + LENGTH, b"", "after 1 tries"),
    ],
)
def test_headers_and_bodies_that_lie_are_named(head, body, message):
    with (
        answering(OK + head + b"\r\n" + body) as location,
        pytest.raises((InputError, FormatError), match=message),
    ):
        read(location)


@pytest.mark.parametrize("start", [b"", b"garbage\r\n\r\n", b"HTTP/9.9 abc\r\n\r\n", b"\0" * 99])
def test_what_is_no_http_is_named(start):
    with answering(start) as location, pytest.raises(InputError, match="after 1 tries"):
        read(location)


@pytest.mark.parametrize(
    "status", [b"302 Found\r\nLocation: http://[", b"301 Moved\r\nLocation: x:"]
)
def test_redirects_to_nowhere_are_named(status):
    with (
        answering(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n") as location,
        pytest.raises(InputError, match="after 1 tries"),
    ):
        read(location)


def test_a_body_that_drips_is_given_up(monkeypatch):
    monkeypatch.setattr(latentds.store.transport, "GRACE_S", 0.3)
    drops = [BODY[place : place + 1] for place in range(len(BODY))]
    with (
        answering(OK + LENGTH + b"\r\n", *drops, pause_s=0.02) as location,
        pytest.raises(InputError, match=r"bytes in 0 s, too slow, after 1 tries"),
    ):
        read(location)


def test_headers_that_drip_are_given_up(monkeypatch):
    monkeypatch.setattr(latentds.store.transport, "HEADERS_S", 0.3)
    with (
        answering(OK, *([b"X: y\r\n"] * 60), pause_s=0.02) as location,
        pytest.raises(InputError, match=r"no answer in 0\.3 s, after 1 tries"),
    ):
        read(location)


def test_a_slow_line_is_not_a_server_that_drips(monkeypatch):
    monkeypatch.setattr(latentds.store.transport, "GRACE_S", 0.05)
    monkeypatch.setattr(latentds.store.transport, "LEAST_RATE", 64)
    drops = [BODY[place : place + 16] for place in range(0, len(BODY), 16)]
    with answering(OK + LENGTH + b"\r\n", *drops, pause_s=0.05) as location:
        assert read(location) == BODY


@pytest.mark.parametrize(
    "text", ["", "soon", "\xb2", "-5", "1e9", "9" * 30, "Mon, 99 Jan 99999 99:99:99 GMT", ",,,"]
)
def test_waits_that_are_none_are_no_error(text):
    assert wait_of(text) is None
