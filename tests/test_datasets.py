"""Data sets: read from every usual layout, fetched once and whole, with clear errors for whatever is wrong."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import importlib.util
import multiprocessing
import os
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from l2l_fast import datasets
from l2l_fast.datasets import Dataset, mnist
from l2l_fast.datasets.download import download
from l2l_fast.datasets.idx import read_idx

NAMES = tuple(mnist.SHA256)
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES
HEADER = 16
CONTENT = bytes(range(256)) * 1024
CONTENT_SHA256 = hashlib.sha256(CONTENT).hexdigest()


def idx(values: Tensor) -> bytes:
    """``values``, uint8, as an IDX file has them."""
    return bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape) + values.numpy().tobytes()


@pytest.fixture
def contents(generator: torch.Generator) -> dict[str, bytes]:
    """The four files of a tiny MNIST, not compressed, by their names."""
    contents: dict[str, bytes] = {}
    for images_name, labels_name, count in ((TRAIN_IMAGES, TRAIN_LABELS, 12), (TEST_IMAGES, TEST_LABELS, 5)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.randint(10, (count,), generator=generator, dtype=torch.uint8)
        contents |= {images_name: idx(images), labels_name: idx(labels)}
    return contents


def write(folder: Path, contents: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)


def check_tiny_mnist(data: Dataset, contents: dict[str, bytes]) -> None:
    assert (data.name, data.classes, data.largest) == ("mnist", 10, 255)
    assert data.train_images.shape == (12, 28, 28)
    assert data.test_images.shape == (5, 28, 28)
    read = dict(zip(NAMES, (data.train_images, data.train_labels, data.test_images, data.test_labels), strict=True))
    for name, values in read.items():
        assert values.dtype == (torch.int64 if "labels" in name else torch.uint8)
        assert idx(values.to(torch.uint8)) == contents[name]


@pytest.mark.parametrize("place", [".", "mnist", "MNIST/raw"])
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.removesuffix(".gz"),
        lambda name: name.replace("-idx", ".idx"),
        lambda name: name.removesuffix(".gz").replace("-idx", ".idx"),
    ],
    ids=["gz", "plain", "dotted-gz", "dotted"],
)
def test_layouts(tmp_path: Path, contents: dict[str, bytes], place: str, rename: Callable[[str], str]) -> None:
    write(tmp_path / place, {rename(name): content for name, content in contents.items()})
    check_tiny_mnist(datasets.load("mnist", tmp_path), contents)


def test_decompressed_without_a_change_of_name(tmp_path: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    check_tiny_mnist(datasets.load("mnist", tmp_path), contents)


def test_loaded_once(tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", contents)
    write(tmp_path / "b", contents)
    data = datasets.load("mnist", tmp_path / "a")
    assert datasets.load("mnist", os.fspath(tmp_path / "b" / ".." / "a")) is data
    assert datasets.load("mnist", tmp_path / "b") is not data
    monkeypatch.setenv("L2L_FAST_DATA", str(tmp_path / "a"))
    assert datasets.load("mnist") is data
    assert repr(data) == "Dataset(name='mnist', classes=10, largest=255)"


@pytest.mark.parametrize("cache", ["XDG_CACHE_HOME", "HOME"])
def test_default_folder(
    tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    monkeypatch.delenv("L2L_FAST_DATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(cache, str(tmp_path))
    write((tmp_path if cache == "XDG_CACHE_HOME" else tmp_path / ".cache") / "l2l_fast", contents)
    check_tiny_mnist(datasets.load("mnist"), contents)


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown data set 'cifar'; known data sets: 'mnist', 'digits'"):
        datasets.load("cifar", tmp_path)


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "empty": (TRAIN_IMAGES, lambda content: b"", "got the magic number of an empty file, expected 00000803"),
    "magic": (TRAIN_IMAGES, lambda content: b"<html>", "got the magic number 3c68746d, expected 00000803"),
    "labels-for-images": (TRAIN_IMAGES, lambda content: b"\0\0\x08\x01" + content[4:], "00000801, expected 00000803"),
    "floats": (TEST_LABELS, lambda content: b"\0\0\x0d\x01" + content[4:], "00000d01, expected 00000801"),
    "header": (TEST_IMAGES, lambda content: content[:9], "got 9 bytes, expected a header of 16"),
    "no-items": (TRAIN_IMAGES, lambda content: content[:4] + bytes(4) + content[8:HEADER], "got 0 items"),
    "shape": (
        TRAIN_IMAGES,
        lambda content: content[:8] + struct.pack(">2I", 14, 56) + content[HEADER:],
        r"got 12 items of shape \[14, 56\], expected at least one of shape \[28, 28\]",
    ),
    "huge": (TEST_LABELS, lambda content: content[:4] + b"\xff" * 4 + content[8:], "got 13 bytes, expected 4294967303"),
    "truncated": (TRAIN_IMAGES, lambda content: content[:-1], "got 9423 bytes, expected 9424 for 12 items"),
    "garbage": (TRAIN_LABELS, lambda content: content + b"\0", "got 21 bytes, expected 20 for 12 items"),
    "label": (TEST_LABELS, lambda content: content[:-1] + b"\x0a", "got the label 10, expected labels from 0 to 9"),
    "counts": (
        TEST_LABELS,
        lambda content: idx(torch.zeros(6, dtype=torch.uint8)),
        "got 6 labels, expected 5 for the images of .*t10k-images",
    ),
}


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_file(
    tmp_path: Path,
    contents: dict[str, bytes],
    name: str,
    damage: Callable[[bytes], bytes],
    message: str,
    compressed: bool,
) -> None:
    contents[name] = damage(contents[name])
    write(tmp_path, {key if compressed else key.removesuffix(".gz"): content for key, content in contents.items()})
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}/{name[:12]}.*{message}.*delete it .*--data-dir"):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:100],
        lambda content: content[:-4],
        lambda content: content[:5],
        lambda content: content + b"rest",
        lambda content: content[:60] + b"\xff" * 40 + content[100:],
        lambda content: content[:-8] + bytes(4) + content[-4:],
    ],
    ids=["data", "trailer", "header", "rest", "deflate", "checksum"],
)
def test_broken_gzip(tmp_path: Path, contents: dict[str, bytes], damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / TRAIN_IMAGES
    path.write_bytes(damage(gzip.compress(contents[TRAIN_IMAGES])))
    with pytest.raises(ValueError, match=f"{TRAIN_IMAGES} is damaged .* got broken gzip data .*delete it"):
        read_idx(path, (28, 28))


def test_unreadable_file(tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, contents)

    def refuse(path: Path) -> bytes:  # permissions do not stop a superuser, so the system's answer is played
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError, match=f"can't read .*{TRAIN_IMAGES}: Permission denied"):
        datasets.load("mnist", tmp_path)


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("l2l_fast.datasets.mnist.os.listdir", refuse)
    with pytest.raises(PermissionError, match=f"can't read {re.escape(str(tmp_path))}: .*denied; name another folder"):
        datasets.load("mnist", tmp_path)


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"lacks train-images.*can't write .*file/MNIST/raw/.*; put .* --data-dir"):
        datasets.load("mnist", tmp_path / "file")


def test_digits(tmp_path: Path) -> None:
    data = datasets.load("digits", tmp_path)
    assert data is datasets.load("digits", tmp_path)
    assert (data.name, data.classes, data.largest) == ("digits", 10, 16)
    assert data.train_images.shape == (1497, 8, 8)
    assert data.test_images.shape == (300, 8, 8)
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.test_labels.bincount().tolist() == [30] * 10
    assert data.train_labels.bincount().tolist() == [148, 152, 147, 153, 151, 152, 151, 149, 144, 150]
    assert data.train_images.max() == data.test_images.max() == 16
    assert data.train_images[0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert data.train_labels[:10].tolist() == list(range(10))
    assert list(tmp_path.iterdir()) == []


def test_digits_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn, which is not installed; pip install 'l2l_fast\[cli\]'"):
        datasets.load("digits", tmp_path)


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files``: whole, from the byte asked for, or as badly as ``fault`` says for files under ``/bad/``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.fault = ""
        self.requests: list[tuple[str, str | None]] = []
        self.hang = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.requests.append((self.path, asked))
        fault = self.server.fault if self.path.startswith("/bad/") else ""
        content = self.server.files.get(self.path.rpartition("/")[-1])
        if fault == "hangs":
            self.server.hang.wait(10)
        if fault == "missing" or content is None:
            self.send_error(404)
            return
        if fault == "wrong":
            content = b"!" * len(content)
        start = 0
        if asked is not None and fault != "no ranges":
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : len(content) // 2] if fault == "truncated" else content[start:])

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.files["file"] = CONTENT
        yield server
        server.hang.set()
        server.shutdown()
        thread.join()


def only(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_download(tmp_path: Path, server: Server) -> None:
    target = tmp_path / "new" / "folder" / "file"
    download([server.url("file"), "http://never.asked/"], target, CONTENT_SHA256)
    assert target.read_bytes() == CONTENT
    assert only(target.parent) == ["file"]
    assert server.requests == [("/file", None)]


@pytest.mark.parametrize("fault", ["missing", "wrong", "truncated", "hangs"])
def test_second_mirror(tmp_path: Path, server: Server, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2l_fast.datasets.download.ANSWER_SECONDS", 0.3)
    server.fault = fault
    download([server.url("bad/file"), server.url("file")], tmp_path / "file", CONTENT_SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert only(tmp_path) == ["file"]
    carried_on = f"bytes={len(CONTENT) // 2}-" if fault == "truncated" else None
    assert server.requests == [("/bad/file", None), ("/file", carried_on)]


@pytest.mark.parametrize("fault", ["", "no ranges", "no length"])
def test_carries_on(tmp_path: Path, server: Server, fault: str) -> None:
    server.fault = fault
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    download([server.url("bad/file")], tmp_path / "file", CONTENT_SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert only(tmp_path) == ["file"]
    assert server.requests == [("/bad/file", "bytes=1000-")]


def test_carries_on_from_a_whole_file(tmp_path: Path, server: Server) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT)
    download([server.url("file")], tmp_path / "file", CONTENT_SHA256)
    assert only(tmp_path) == ["file"]


def test_truncated_response_is_kept_for_the_next_call(tmp_path: Path, server: Server) -> None:
    server.fault = "truncated"
    message = f"/bad/file: the connection ended after {len(CONTENT) // 2} of {len(CONTENT)} bytes"
    with pytest.raises(ConnectionError, match=message):
        download([server.url("bad/file")], tmp_path / "file", CONTENT_SHA256)
    assert only(tmp_path) == ["file.part"]
    download([server.url("file")], tmp_path / "file", CONTENT_SHA256)
    assert server.requests[-1] == ("/file", f"bytes={len(CONTENT) // 2}-")
    assert only(tmp_path) == ["file"]


@pytest.mark.parametrize("part", [b"", b"stale", CONTENT + b"more"], ids=["none", "stale", "long"])
def test_wrong_checksum_deletes_what_came(tmp_path: Path, server: Server, part: bytes) -> None:
    server.fault = "wrong"
    if part:
        (tmp_path / "file.part").write_bytes(part)
    with pytest.raises(ConnectionError, match=f"has the SHA-256 .*, expected {CONTENT_SHA256}, and was deleted"):
        download([server.url("bad/file")], tmp_path / "file", CONTENT_SHA256)
    assert only(tmp_path) == []


def test_every_mirror_is_named_with_its_reason(tmp_path: Path, server: Server) -> None:
    server.fault = "missing"
    with pytest.raises(ConnectionError, match=r"/bad/file: HTTP status 404 Not Found; http.*:1/x: .*refused"):
        download([server.url("bad/file"), "http://127.0.0.1:1/x"], tmp_path / "file", CONTENT_SHA256)
    assert only(tmp_path) == []


def test_unwritable_target(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("l2l_fast.datasets.download.os.fsync", fail)
    with pytest.raises(OSError, match=r"can't write .*/file: No space left on device"):
        download([server.url("file")], tmp_path / "file", CONTENT_SHA256)
    assert only(tmp_path) == ["file.part"]


def test_processes_at_once(tmp_path: Path, server: Server) -> None:
    """Each of them finds the file whole when its call returns, and one alone has asked for it."""
    context = multiprocessing.get_context("spawn")
    target = tmp_path / "file"
    arguments = ([server.url("file")], target, CONTENT_SHA256)
    processes = [context.Process(target=download, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert target.read_bytes() == CONTENT
    assert only(tmp_path) == ["file"]
    assert len(server.requests) == 1


def test_threads_at_once(tmp_path: Path, server: Server) -> None:
    target = tmp_path / "file"
    arguments = ([server.url("file")], target, CONTENT_SHA256)
    threads = [threading.Thread(target=download, args=arguments) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT
    assert only(tmp_path) == ["file"]
    assert len(server.requests) == 1


def test_progress_bar(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    download([server.url("file")], tmp_path / "file", CONTENT_SHA256)
    watched = capsys.readouterr()
    assert "file" in watched.err
    assert "262.1" in watched.err  # kB
    assert watched.out == ""


@pytest.mark.parametrize("installed", [True, False])
def test_no_progress_bar(
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    installed: bool,
) -> None:
    if not installed:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    download([server.url("file")], tmp_path / "file", CONTENT_SHA256)
    assert capsys.readouterr() == ("", "")


def test_missing_files_are_downloaded(
    tmp_path: Path, server: Server, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {TEST_LABELS: contents[TEST_LABELS]})
    server.files = {name: gzip.compress(content) for name, content in contents.items()}
    monkeypatch.setattr(mnist, "MIRRORS", (server.url("elsewhere/"), server.url("")))
    monkeypatch.setattr(
        mnist, "SHA256", {name: hashlib.sha256(content).hexdigest() for name, content in server.files.items()}
    )
    check_tiny_mnist(datasets.load("mnist", tmp_path), contents)
    assert sorted(only(tmp_path / "MNIST" / "raw")) == sorted({*NAMES} - {TEST_LABELS})
    assert len(server.requests) == 3


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(mnist, "MIRRORS", ("http://127.0.0.1:1/mnist/",))
    with pytest.raises(ConnectionError) as caught:
        datasets.load("mnist", tmp_path)
    message = str(caught.value)
    assert f"'mnist' lacks {TRAIN_IMAGES}: it is not in {tmp_path}, {tmp_path}/mnist, {tmp_path}/MNIST/raw" in message
    assert f"http://127.0.0.1:1/mnist/{TRAIN_IMAGES}: " in message
    assert message.endswith(f"put {', '.join(NAMES)} into a folder and name that with --data-dir or L2L_FAST_DATA")


def test_a_resolver_that_never_answers_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def look_up(*arguments: object, **options: object) -> None:
        answer.wait(10)
        raise OSError("too late")

    monkeypatch.setattr("l2l_fast.datasets.download.ANSWER_SECONDS", 0.05)
    monkeypatch.setattr("socket.getaddrinfo", look_up)
    with pytest.raises(ConnectionError, match=r"http://a.test/x: no answer within 0.05 seconds"):
        download(["http://a.test/x"], tmp_path / "file", CONTENT_SHA256)
    assert not answer.is_set()
    answer.set()
