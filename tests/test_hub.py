"""Rules on the Hugging Face Hub: huggingface_hub talks to a server here that keeps what is committed to it."""

from __future__ import annotations

import base64
import http.server
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import l2l_fast
from l2l_fast import CoordinatewiseLSTM, LogAndSign, RuleSpec
from l2l_fast.hub import FILE, model_card

TOKEN = "hf_may_write"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(http.server.ThreadingHTTPServer):
    """Repositories by id, each with its files; ``gated`` ones ask for consent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str | None] = {}
        self.gated: set[str] = set()
        self.commits = 0
        self.requests = 0


class Handler(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's API that a commit of small files and a download take."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.server.requests += 1
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            valid = json.loads(body)["content"].startswith("---\nlibrary_name: l2l_fast\n")
            self.answer(
                200 if valid else 400, {"errors": [] if valid else [{"message": "no metadata"}], "warnings": []}
            )
        elif self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            if repo_id not in self.server.files:
                self.server.files[repo_id] = {}
                self.server.visibility[repo_id] = asked.get("visibility")
            self.answer(200, {"url": f"{self.server.address}/{repo_id}"})
        elif preupload := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            assert preupload[1] in self.server.files
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer(200, {"files": modes})
        elif commit := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[commit[1]][line["value"]["path"]] = content
            self.server.commits += 1
            url = f"{self.server.address}/{commit[1]}/commit/{COMMIT}"
            self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer(404, {"error": self.path})

    def do_HEAD(self) -> None:
        self.server.requests += 1
        if self.path.startswith("/api/"):  # is there a repository, after all, that could not be made?
            self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            return
        match = re.fullmatch(r"/(.+?/.+?)/resolve/(.+?)/(.+)", self.path)
        assert match
        repo_id, revision, name = match.groups()
        files = self.server.files.get(repo_id)
        if files is None:
            self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        elif repo_id in self.server.gated:
            self.answer(403, {}, {"X-Error-Code": "GatedRepo"})
        elif revision not in ("main", COMMIT):
            self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        elif name not in files:
            self.answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self.answer(200, files[name], {"ETag": '"1234"', "X-Repo-Commit": COMMIT})

    do_GET = do_HEAD

    def answer(self, status: int, body: bytes | dict[str, Any], headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def use(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``address`` the Hub, as $HF_ENDPOINT does for a process of its own."""
    huggingface_hub.close_session()
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture(autouse=True)
def nobody_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No account of whoever runs the tests, no cache but an empty one, no Hub that answers."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use("http://127.0.0.1:1", monkeypatch)
    yield
    huggingface_hub.close_session()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        use(server.address, monkeypatch)
        yield server
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()


@pytest.fixture
def rule() -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(preprocess=LogAndSign(5.0), output_scale=0.25)
    rule.card = {"name": "mine", "problem": "Quadratic(dim=10)", "limits": "Nothing else\n# was tried."}
    return rule


def assert_same(actual: CoordinatewiseLSTM, expected: CoordinatewiseLSTM) -> None:
    assert (actual.spec, actual.card) == (expected.spec, expected.card)
    assert torch.equal(actual.flat_weights(), expected.flat_weights())


def test_round_trip(server: Server, rule: CoordinatewiseLSTM) -> None:
    assert rule.push_to_hub("user/rule", private=True, token=TOKEN) == f"{server.address}/user/rule/commit/{COMMIT}"
    assert server.files["user/rule"].keys() == {"rule.safetensors", "README.md"}
    assert (server.visibility, server.commits) == ({"user/rule": "private"}, 1)
    assert_same(CoordinatewiseLSTM.from_hub("user/rule"), rule)
    assert_same(CoordinatewiseLSTM.from_hub("user/rule", revision=COMMIT), rule)


def test_a_second_push_replaces(server: Server, rule: CoordinatewiseLSTM) -> None:
    rule.push_to_hub("user/rule", token=TOKEN)
    other = CoordinatewiseLSTM(hidden_size=3)
    other.push_to_hub("user/rule", token=TOKEN)
    assert server.commits == 2
    server.files["user/rule"]["README.md"].index(b"Two layers of 3 units")
    assert_same(CoordinatewiseLSTM.load(write(server.files["user/rule"][FILE], Path(constants.HF_TOKEN_PATH))), other)


def write(content: bytes, path: Path) -> Path:
    path.write_bytes(content)
    return path


def test_card(server: Server, rule: CoordinatewiseLSTM) -> None:
    rule.push_to_hub("user/rule", token=TOKEN)
    card = server.files["user/rule"]["README.md"].decode()
    for line in ("# mine", "Quadratic(dim=10)", "Nothing else # was tried."):
        assert line in card.splitlines()
    (facts,) = re.findall(r"```json\n(.*?)```", card, re.DOTALL)
    assert json.loads(facts) == rule.card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 3
    names: dict[str, Any] = {"model": torch.nn.Linear(2, 1)}
    exec(code, names)
    assert_same(names["optimizer"].rule, rule)


def test_card_of_a_rule_without_one() -> None:
    card = model_card(RuleSpec(), {}, "user/rule")
    assert "# user/rule" in card.splitlines()
    assert card.count("Its card does not say.") == 2


@pytest.mark.parametrize("name", l2l_fast.available_rules())
def test_card_of_shipped_rules(name: str) -> None:
    rule = l2l_fast.load_rule(name)
    card = model_card(rule.spec, rule.card, "user/rule")
    assert f"# {name}" in card.splitlines()
    assert "Its card does not say." not in card


@pytest.mark.parametrize("kind", [Path, str])
@pytest.mark.parametrize("name", ["here", f"here/{FILE}"])
def test_local_without_package_and_network(
    tmp_path: Path, rule: CoordinatewiseLSTM, monkeypatch: pytest.MonkeyPatch, name: str, kind: Callable[[str], Any]
) -> None:
    (tmp_path / "here").mkdir()
    rule.save(tmp_path / "here" / FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_same(CoordinatewiseLSTM.from_hub(kind(name)), rule)


def test_a_folder_here_goes_before_a_repository(
    tmp_path: Path, server: Server, rule: CoordinatewiseLSTM, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["user/rule"] = {FILE: b"another one"}
    folder = tmp_path / "user" / "rule"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"there is no file user/rule/{FILE}"):
        CoordinatewiseLSTM.from_hub("user/rule")
    rule.save(folder / FILE)
    assert_same(CoordinatewiseLSTM.from_hub("user/rule"), rule)
    with pytest.raises(ValueError, match="user/rule lies here and has no revision, got revision='main'"):
        CoordinatewiseLSTM.from_hub("user/rule", revision="main")
    assert server.requests == 0


def test_downloaded_once_serves_offline(
    server: Server, rule: CoordinatewiseLSTM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule.push_to_hub("user/rule", token=TOKEN)
    CoordinatewiseLSTM.from_hub("user/rule")
    use("http://127.0.0.1:1", monkeypatch)
    assert_same(CoordinatewiseLSTM.from_hub("user/rule"), rule)


def test_offline(rule: CoordinatewiseLSTM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts of huggingface_hub
    with pytest.raises(ConnectionError, match=r"user/rule can't be reached \(.*refused.*not been downloaded before"):
        CoordinatewiseLSTM.from_hub("user/rule")
    with pytest.raises(ConnectionError, match=r"user/rule can't be reached: .*refused"):
        rule.push_to_hub("user/rule", token=TOKEN)


@pytest.mark.parametrize("source", ["user/rule.safetensors", "./user/rule", "/user/rule", "~/rule", Path("user/rule")])
def test_missing_path(server: Server, source: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*rule"):
        CoordinatewiseLSTM.from_hub(source)
    assert server.requests == 0


@pytest.mark.parametrize("repo_id", ["quadratic", "a/b/c", "user/", "", "us er/rule", "user/a--b"])
def test_bad_id(server: Server, rule: CoordinatewiseLSTM, repo_id: str) -> None:
    for call in (CoordinatewiseLSTM.from_hub, rule.push_to_hub):
        with pytest.raises(ValueError, match=rf"{re.escape(repr(repo_id))}.*"):
            call(repo_id)
    assert server.requests == 0


@pytest.mark.parametrize("source", [3, None, b"user/rule"])
def test_bad_source(server: Server, source: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"'user/name', or the path .*, got {source!r} of type {type(source).__name__}"
    ):
        CoordinatewiseLSTM.from_hub(source)
    assert server.requests == 0


def test_missing_repository(server: Server) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a file or folder user/rule here nor a repository .* log in"):
        CoordinatewiseLSTM.from_hub("user/rule")


def test_missing_revision(server: Server) -> None:
    server.files["user/rule"] = {FILE: b""}
    with pytest.raises(FileNotFoundError, match="user/rule has no revision 'v2'"):
        CoordinatewiseLSTM.from_hub("user/rule", revision="v2")


def test_repository_of_something_else(server: Server) -> None:
    server.files["user/rule"] = {"pytorch_model.bin": b"a pickle"}
    with pytest.raises(FileNotFoundError, match=f"user/rule has no {FILE} at revision 'main'"):
        CoordinatewiseLSTM.from_hub("user/rule")


def test_file_of_something_else(server: Server, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other")
    server.files["user/rule"] = {FILE: (tmp_path / "other").read_bytes()}
    with pytest.raises(ValueError, match=r"has the format 'unknown', expected 'l2l_fast\.rule"):
        CoordinatewiseLSTM.from_hub("user/rule")


def test_gated(server: Server) -> None:
    server.files["user/rule"] = {FILE: b""}
    server.gated.add("user/rule")
    with pytest.raises(PermissionError, match="user/rule asks for a consent: give it on its page"):
        CoordinatewiseLSTM.from_hub("user/rule")


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_push_without_permission(server: Server, rule: CoordinatewiseLSTM, token: str | None) -> None:
    with pytest.raises(PermissionError, match="refused this account for the repository user/rule: log in with `hf"):
        rule.push_to_hub("user/rule", token=token)
    assert not server.files


def test_a_rule_that_diverged_is_not_pushed(server: Server, rule: CoordinatewiseLSTM) -> None:
    with torch.no_grad():
        rule.output.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="weights that are not finite"):
        rule.push_to_hub("user/rule", token=TOKEN)
    assert server.requests == 0


def test_package_missing(rule: CoordinatewiseLSTM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (CoordinatewiseLSTM.from_hub, rule.push_to_hub):
        with pytest.raises(ImportError, match=r"not installed; pip install 'l2l_fast\[hub\]'"):
            call("user/rule")
