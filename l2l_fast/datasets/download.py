"""Files fetched over HTTP: resumed where they broke off, checked, and put in place only when whole."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from l2l_fast.datasets.progress import progress

CHUNK = 1 << 16
ANSWER_SECONDS = 5.0
SILENCE_SECONDS = 20.0
RANGE_NOT_SATISFIABLE = 416
PARTIAL_CONTENT = 206


def download(urls: Sequence[str], target: Path, sha256: str) -> None:
    """Fetch a file from the first of ``urls`` that yields it.

    What has come lies beside ``target`` with the ending ``.part``; the next URL, or the next call, carries on from
    there. While one process downloads, others wait, and then find the file in place.

    Raises:
        ConnectionError: if no URL yields the file; it says why for each.
        OSError: if the file can't be written.
    """
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part) as file:
            if target.exists():
                part.unlink()
                return
            try:
                _fetch(urls, file, sha256)
                os.fsync(file.fileno())
                part.replace(target)
            except ConnectionError:
                if file.seek(0, os.SEEK_END) == 0:
                    part.unlink()
                raise
    except ConnectionError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"can't write {target}: {error.strerror}") from error


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """The file at ``path``, made if need be, open at its end for one process alone."""
    import fcntl  # here, because Windows lacks it and should miss the downloads only

    while True:
        with path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):  # whoever held the lock before may have renamed or deleted the file
                yield file
                return


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _fetch(urls: Sequence[str], file: IO[bytes], sha256: str) -> None:
    """Complete ``file`` from the first URL that can."""
    reasons = []
    for url in urls:
        reason = _attempt(url, file, sha256)
        if reason is None:
            return
        reasons.append(f"{url}: {reason}")
    raise ConnectionError("; ".join(reasons))


def _attempt(url: str, file: IO[bytes], sha256: str) -> str | None:
    """Complete ``file`` from one URL, or say why that failed."""
    try:
        _receive(url, file)
        _check(file, sha256)
    except ConnectionError as error:
        return str(error)
    return None


def _receive(url: str, file: IO[bytes]) -> None:
    """Append to ``file`` what it lacks; the whole anew where the server can't send a part."""
    received = file.seek(0, os.SEEK_END)
    response = _open(url, received)
    if response is None:
        return
    with response:
        if response.status != PARTIAL_CONTENT:
            file.truncate(0)
            received = 0
        announced = response.headers["Content-Length"]
        total = None if announced is None else received + int(announced)
        with progress(url.rpartition("/")[-1], received, total) as advance:
            while chunk := _read(response):
                file.write(chunk)
                received += len(chunk)
                advance(len(chunk))
    if total is not None and received < total:
        raise ConnectionError(f"the connection ended after {received} of {total} bytes")


def _open(url: str, offset: int) -> HTTPResponse | None:
    """The response from byte ``offset`` on; ``None`` if the server has no more than that.

    It is asked for in a thread: looking up a host's name knows no time limit, and can take minutes without a network.
    """
    request = Request(url, headers={"User-Agent": "l2l_fast"} | ({"Range": f"bytes={offset}-"} if offset else {}))
    answers: queue.SimpleQueue[HTTPResponse | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urlopen(request, timeout=SILENCE_SECONDS))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise ConnectionError(f"no answer within {ANSWER_SECONDS:g} seconds") from None
    match answer:
        case HTTPError():
            answer.close()
            if answer.code == RANGE_NOT_SATISFIABLE:
                return None
            raise ConnectionError(f"HTTP status {answer.code} {answer.reason}")
        case URLError():
            raise ConnectionError(str(answer.reason)) from answer
        case OSError() | HTTPException():
            raise ConnectionError(str(answer)) from answer
        case Exception():
            raise answer
    return answer


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"the connection broke: {error}") from error


def _check(file: IO[bytes], sha256: str) -> None:
    """Empty ``file`` and complain if its checksum is another."""
    file.seek(0)
    found = hashlib.sha256(file.read()).hexdigest()
    if found != sha256:
        file.truncate(0)
        raise ConnectionError(f"what came has the SHA-256 {found}, expected {sha256}, and was deleted")
