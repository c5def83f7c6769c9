"""Zoos to the Hub and back: the real client against a stand-in on this machine that speaks the part of the Hub's protocol that it uses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

import wslfast
from wslfast import Architecture, Population, WslfastError, load_zoo
from wslfast.cli import main
from wslfast.hub import pull_zoo, push_zoo
from wslfast.page import card
from wslfast.page.card import zoo_card, zoo_picture
from wslfast.zoo import read_manifest
from wslfast.zoo.splits import Split
from wslfast.zoo.store import save_zoo

NAME = "someone/digits-zoo"


@dataclass
class StandIn:
    """Repositories, commits and large files, as the Hub keeps them. Tokens: "writer" may all, "reader" only read."""

    repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""
    failing: str = ""  # paths that hold this text answer 500

    def files(self, name: str = NAME, revision: str | None = None) -> dict[str, bytes]:
        commits = self.repositories[name]
        return dict(commits)[revision] if revision not in (None, "main") else commits[-1][1]

    def put(self, files: dict[str, bytes], name: str = NAME) -> None:
        commits = self.repositories.setdefault(name, [])
        commits.append((hashlib.sha1(f"{name}{len(commits)}".encode()).hexdigest(), files))


def _handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: object = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def body(self) -> bytes:
            if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def handle_any(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            data = self.body()
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if hub.failing and hub.failing in path:
                return self.answer(500, {"error": "out of order"})
            if token == "stranger":
                return self.answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials in Authorization header")
            if path.startswith("/large/"):
                hub.large[path.rpartition("/")[2]] = data
                return self.answer(200)
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                if token != "writer":
                    return self.answer(403, {"error": "You don't have the rights to create a dataset"})
                wanted = json.loads(data)
                name = f"{wanted.get('organization') or 'someone'}/{wanted['name'].rpartition('/')[2]}"
                if name in hub.repositories:
                    known = {"error": "You already created this dataset repo", "url": f"{hub.endpoint}/datasets/{name}"}
                    return self.answer(409, known)
                hub.put({".gitattributes": b""}, name)
                return self.answer(200, {"url": f"{hub.endpoint}/datasets/{name}", "id": name, "name": name})
            found = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+?)(?:\.git)?(?:/(.*))?", path)
            if found is None or found[1] not in hub.repositories:
                return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return self.repository(found[1], found[2] or "", data, token)

        def repository(self, name: str, rest: str, data: bytes, token: str) -> None:
            if rest.startswith("resolve/"):
                _, revision, file = rest.split("/", 2)
                held = hub.files(name, revision)
                if file not in held:
                    return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound")
                digest = hashlib.sha256(held[file]).hexdigest()
                return self.answer(200, held[file], ETag=f'"{digest}"', X_Repo_Commit=revision)
            if rest in ("", "revision/main"):
                sha, held = hub.repositories[name][-1]
                siblings = [{"rfilename": path, "size": len(content), "blobId": "0" * 40} for path, content in held.items()]
                about = {"id": name, "sha": sha, "siblings": siblings, "private": False, "tags": [], "downloads": 0, "likes": 0}
                return self.answer(200, about)
            if rest.startswith("revision/"):
                return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            if token != "writer":
                return self.answer(403, {"error": "Forbidden: pass a write token"})
            if rest.startswith("preupload/"):
                mode = {True: "lfs", False: "regular"}
                files = [
                    {"path": f["path"], "uploadMode": mode[f["path"].endswith((".safetensors", ".png", ".npz"))]}
                    for f in json.loads(data)["files"]
                ]
                return self.answer(200, {"files": [{**f, "shouldIgnore": False} for f in files]})
            if rest == "info/lfs/objects/batch":
                wanted = json.loads(data)["objects"]
                actions = [{**o, "actions": {"upload": {"href": f"{hub.endpoint}/large/{o['oid']}"}}} for o in wanted]
                return self.answer(200, {"transfer": "basic", "objects": actions})
            if rest.startswith("commit/"):
                files = dict(hub.files(name))
                for line in map(json.loads, data.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = hub.large[value["oid"]]
                    elif line["key"] == "deletedFile":
                        del files[value["path"]]
                hub.put(files, name)
                sha = hub.repositories[name][-1][0]
                return self.answer(200, {"commitUrl": f"{hub.endpoint}/datasets/{name}/commit/{sha}", "commitOid": sha})
            return self.answer(404, {"error": f"the stand-in knows no {rest}"})

        do_GET = do_POST = do_HEAD = do_PUT = handle_any

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    constants = pytest.importorskip("huggingface_hub.constants")
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files by the Hub's older protocol, which is plain HTTP
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("wslfast.hub.zoo_picture", lambda zoo: b"\x89PNG of " + Path(zoo).name.encode())  # drawn in a test of its own
    stand_in = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(stand_in))
    stand_in.endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.endpoint)
    pattern = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", stand_in.endpoint + pattern[pattern.index("/{repo_id}") :])
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # the client waits before it asks again
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    yield stand_in
    server.shutdown()
    thread.join()
    server.server_close()


def small_zoo(folder: Path, rows: int = 12, seed: int = 0) -> Path:
    arch = Architecture.cnn(1, "tanh")
    table = {
        "model": tuple(j // 2 for j in range(rows)), "epoch": tuple(1 + j % 2 for j in range(rows)),
        "test_acc": tuple(0.3 + 0.05 * j for j in range(rows)), "note": tuple("a | <b>" for _ in range(rows)),
    }  # fmt: skip
    population = Population(arch, arch.initial_weights(["normal"] * rows, range(seed, seed + rows)), table)
    save_zoo(population, folder, splits=Split(), provenance={"made_by": "a <script> | test", "dataset": {"name": "digits"}}, shard_rows=5)
    return folder


def test_a_zoo_goes_up_and_comes_back_equal_to_the_bit(hub: StandIn, tmp_path: Path) -> None:
    zoo = small_zoo(tmp_path / "zoo")
    address = push_zoo(zoo, NAME, token="writer", endpoint=hub.endpoint)
    assert address.startswith(f"{hub.endpoint}/datasets/{NAME}/commit/")
    shards = [s.file for s in read_manifest(zoo).shards]
    assert set(hub.files()) == {".gitattributes", "README.md", "zoo.png", "manifest.json", *shards}
    hub.files()["setup.py"] = b"raise SystemExit('run')"  # whatever else is there is not asked for
    hub.asked.clear()
    manifest = pull_zoo(NAME, tmp_path / "back", endpoint=hub.endpoint)
    assert manifest == read_manifest(zoo)
    assert not [a for a in hub.asked if "setup.py" in a or "README" in a or "zoo.png" in a]
    assert {p.name for p in (tmp_path / "back").iterdir()} == {"manifest.json", *shards}
    assert not list(tmp_path.glob(".*"))
    for file in ("manifest.json", *shards):
        assert (tmp_path / "back" / file).read_bytes() == (zoo / file).read_bytes()
    ours, theirs = load_zoo(zoo), load_zoo(tmp_path / "back")
    assert torch.equal(ours.weights, theirs.weights)
    assert ours.properties == theirs.properties


def test_a_smaller_zoo_pushed_over_a_larger_one_leaves_no_shard_of_it(hub: StandIn, tmp_path: Path) -> None:
    push_zoo(small_zoo(tmp_path / "large", 12), NAME, token="writer", endpoint=hub.endpoint)
    first = hub.repositories[NAME][-1][0]
    push_zoo(small_zoo(tmp_path / "small", 4, seed=9), NAME, token="writer", endpoint=hub.endpoint)
    assert sum(f.endswith(".safetensors") for f in hub.files()) == 1
    assert len(hub.files(revision=first)) > len(hub.files())
    pull_zoo(NAME, tmp_path / "back", endpoint=hub.endpoint)
    assert torch.equal(load_zoo(tmp_path / "back").weights, load_zoo(tmp_path / "small").weights)


def test_from_the_shell(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    zoo = small_zoo(tmp_path / "zoo")
    monkeypatch.setenv("HF_TOKEN", "writer")
    main(["zoo", "push", str(zoo), NAME])
    main(["zoo", "pull", NAME, str(tmp_path / "back")])
    said = " ".join(capsys.readouterr().out.split())
    assert f"{hub.endpoint}/datasets/{NAME}/commit/" in said
    assert "12 rows of 6 models" in said
    with pytest.raises(SystemExit) as stopped:
        main(["zoo", "pull", NAME, str(tmp_path / "back")])
    assert stopped.value.code == 2
    assert "expected a new or an empty folder" in capsys.readouterr().err


def test_a_card_shows_the_zoo_and_a_strangers_words_are_words(tmp_path: Path) -> None:
    zoo = small_zoo(tmp_path / "zoo")
    card = zoo_card(zoo, NAME)
    assert card.startswith("---\npretty_name: 'digits-zoo'\n")
    assert "n<1K" in card
    assert "![Test accuracy of the zoo's models](zoo.png)" in card
    assert "| test images | 30.0 | 43.8 | 57.5 | 71.2 | 85.0 |" in card
    assert r"a \<script\> \| test" in card
    assert f"wslfast zoo pull {NAME} digits-zoo" in card
    pytest.importorskip("matplotlib")
    assert zoo_picture(zoo).startswith(b"\x89PNG")


@pytest.mark.parametrize("change", ["shard", "manifest", "size", "listed", "none", "path"])
def test_a_repository_that_is_no_sound_zoo_is_refused_and_nothing_is_made(hub: StandIn, tmp_path: Path, change: str) -> None:
    zoo = small_zoo(tmp_path / "zoo")
    files = {p.name: p.read_bytes() for p in zoo.iterdir()}
    shard = sorted(f for f in files if f.endswith(".safetensors"))[1]
    if change == "shard":
        files[shard] = files[shard][:-1] + bytes([files[shard][-1] ^ 1])
        words = f"{shard}: its SHA-256 is not the manifest's"
    elif change == "manifest":
        files["manifest.json"] = files["manifest.json"].replace(b"digits", b"digitz")
        words = "checksum: the manifest was changed"
    elif change == "size":
        files[shard] += b"more"
        words = f"{shard}: expected .* bytes, there are"
    elif change == "listed":
        del files[shard]
        words = f"no {shard} there"
    elif change == "path":
        files["manifest.json"] = files["manifest.json"].replace(shard.encode(), b"../evil.safetensors")
        words = "expected a plain name"
    else:
        files = {"model.bin": b"\x80\x04cos\nsystem\n"}
        words = "no manifest.json there; it is not a zoo"
    hub.put(files)
    with pytest.raises(WslfastError, match=words):
        pull_zoo(NAME, tmp_path / "back", endpoint=hub.endpoint)
    assert not (tmp_path / "back").exists()


def test_an_interrupted_pull_goes_on(hub: StandIn, tmp_path: Path) -> None:
    zoo = small_zoo(tmp_path / "zoo")
    push_zoo(zoo, NAME, token="writer", endpoint=hub.endpoint)
    last = read_manifest(zoo).shards[-1].file
    hub.failing = last
    with pytest.raises(WslfastError, match=r"what has come is kept in .*\.back\.pull"):
        pull_zoo(NAME, tmp_path / "back", endpoint=hub.endpoint)
    hub.failing = ""
    hub.asked.clear()
    pull_zoo(NAME, tmp_path / "back", endpoint=hub.endpoint)
    fetched = [a for a in hub.asked if a.startswith("GET") and "resolve" in a]
    assert len(fetched) == 1
    assert fetched[0].endswith(last)
    assert torch.equal(load_zoo(tmp_path / "back").weights, load_zoo(zoo).weights)


@pytest.mark.parametrize(
    ("token", "words"),
    [("reader", "the Hub refuses: your token may not do this"), ("stranger", "the Hub does not know you.*hf auth login")],
)
def test_a_refusal_is_one_sentence(hub: StandIn, tmp_path: Path, token: str, words: str) -> None:
    with pytest.raises(WslfastError, match=rf"cannot push {NAME}: {words}") as refused:
        push_zoo(small_zoo(tmp_path / "zoo"), NAME, token=token, endpoint=hub.endpoint)
    assert token not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_not_there_is_named(hub: StandIn, tmp_path: Path) -> None:
    with pytest.raises(WslfastError, match="cannot pull someone/other: no such repository or revision"):
        pull_zoo("someone/other", tmp_path / "back", endpoint=hub.endpoint)
    hub.put({"manifest.json": b""})
    with pytest.raises(WslfastError, match="no such repository or revision"):
        pull_zoo(NAME, tmp_path / "back", revision="v9", endpoint=hub.endpoint)
    with pytest.raises(WslfastError, match=r"repository: expected USER/NAME, got '\.\./x'"):
        pull_zoo("../x", tmp_path / "back")
    with pytest.raises(WslfastError, match="no such file; expected a zoo's manifest"):
        push_zoo(tmp_path / "nothing", NAME, endpoint=hub.endpoint)


def test_a_damaged_zoo_is_not_pushed(hub: StandIn, tmp_path: Path) -> None:
    zoo = small_zoo(tmp_path / "zoo")
    shard = zoo / read_manifest(zoo).shards[0].file
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(WslfastError, match="the shard is damaged"):
        push_zoo(zoo, NAME, token="writer", endpoint=hub.endpoint)
    assert hub.asked == []


def test_offline_is_said(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(WslfastError, match=r"cannot pull .*: the Hub cannot be reached"):
        pull_zoo(NAME, tmp_path / "back", endpoint="http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WslfastError, match="offline by its settings"):
        pull_zoo(NAME, tmp_path / "back", endpoint=hub.endpoint)


def test_without_the_client_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(WslfastError, match=r"pip install 'wslfast\[hub\]'"):
        pull_zoo(NAME, tmp_path / "back")
    assert wslfast.hub.pull_zoo is pull_zoo


def test_the_picture_of_a_zoo_that_records_no_accuracy_names_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    arch = Architecture.mlp(4, (3,), 2)
    rows = arch.initial_weights(["kaiming_uniform"] * 10, range(10))
    save_zoo(Population(arch, rows, {"train_loss": tuple(j / 10 for j in range(10))}), tmp_path / "zoo")
    labels: list[str] = []
    monkeypatch.setattr(card, "to_png", lambda page, dpi: labels.extend(axes.get_xlabel() for axes in page.axes) or b"")
    zoo_picture(tmp_path / "zoo")
    assert labels == ["accuracy (%)", "epoch"]  # and not "accuracy on accuracy (%)"
