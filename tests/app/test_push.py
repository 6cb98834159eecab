"""What is pushed to Hugging Face: which files, by which names, and in one commit to a server that stands for it."""

from __future__ import annotations

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lic_dist.app.commands.push import push
from lic_dist.app.publishing import files_of
from lic_dist.errors import LicError, UsageError

COMMIT = f"https://huggingface.co/datasets/team/codec/commit/{'1' * 40}"


class Stub(BaseHTTPRequestHandler):
    """Takes what HfApi sends for a commit of small files, and keeps it."""

    def do_POST(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.seen.append((self.path, self.headers.get("Authorization"), body))  # type: ignore[attr-defined]
        answer: dict = {"url": f"http://{self.headers['Host']}/team/codec", "errors": [], "warnings": []}
        if "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": COMMIT, "commitOid": "1" * 40, "success": True}
        status = 403 if server.refuses else 200  # type: ignore[attr-defined]
        data = json.dumps({"error": "no right to write"} if status == 403 else answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture()
def server(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("huggingface_hub")
    made = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    made.seen, made.refuses = [], False  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture()
def results(tmp_path: Path) -> Path:
    """A finetuning, a store and a card."""
    group = "a.zarr/quantized/tcq8"
    of_training = ("run/checkpoint.pth.tar", "run/log.jsonl", "run/states/0001.pth", "empty/x")
    of_store = ("a.zarr/zarr.json", "a.zarr/pixels/c/0", f"{group}/record.json", f"{group}/k/c/0", "card.md")
    for name in (*of_training, *of_store):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"of {name}")
    return tmp_path


def test_checkpoints_records_and_cards_are_chosen(results: Path) -> None:
    given = [str(results / "run"), f"{results}/a.zarr=store", f"{results}/card.md=README.md"]
    assert files_of(given) == {
        "run/checkpoint.pth.tar": results / "run/checkpoint.pth.tar",
        "run/log.jsonl": results / "run/log.jsonl",
        "store/quantized/tcq8/record.json": results / "a.zarr/quantized/tcq8/record.json",
        "README.md": results / "card.md",
    }
    assert set(files_of([f"{results}/run=."])) == {"checkpoint.pth.tar", "log.jsonl"}
    for wrong, why in {
        "none.json": "there is no",
        "empty": "nothing to push in",
        "card.md=../x": "no name in a repo",
    }.items():
        with pytest.raises(UsageError, match=why):
            files_of([f"{results}/{wrong}"])
    with pytest.raises(UsageError, match=r"would both be card\.md"):
        files_of([str(results / "card.md"), f"{results}/run/log.jsonl=card.md"])


def test_one_commit_has_all_files(results: Path, server, capsys: pytest.CaptureFixture[str]) -> None:
    push(
        "team/codec",
        [f"{results}/run=.", f"{results}/card.md=README.md"],
        kind="dataset",
        private=True,
        message="first",
    )
    assert capsys.readouterr().out.splitlines()[-1] == COMMIT
    created = next(json.loads(body) for path, _, body in server.seen if path == "/api/repos/create")
    assert (created["name"], created["organization"], created["type"]) == ("codec", "team", "dataset")
    assert created.get("visibility", created.get("private")) in ("private", True)  # newer, older versions
    path, token, body = next(one for one in server.seen if "/commit/" in one[0])
    assert path == "/api/datasets/team/codec/commit/main" and token == "Bearer hf_secret"
    lines = [json.loads(line) for line in body.splitlines()]
    assert lines[0]["key"] == "header" and lines[0]["value"]["summary"] == "first"
    sent = {one["value"]["path"]: base64.b64decode(one["value"]["content"]).decode() for one in lines[1:]}
    assert sent == {
        "checkpoint.pth.tar": "of run/checkpoint.pth.tar",
        "log.jsonl": "of run/log.jsonl",
        "README.md": "of card.md",
    }


def test_a_dry_run_lists_and_sends_nothing(results: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    push("team/codec", [str(results / "run")], dry_run=True)
    said = capsys.readouterr().out
    assert "run/checkpoint.pth.tar" in said and "2 files would go to team/codec (model); nothing is sent" in said
    with pytest.raises(UsageError, match="push needs huggingface_hub"):
        push("team/codec", [str(results / "run")])


def test_no_token_and_a_server_that_refuses_are_one_line(
    results: Path, server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.refuses = True
    with pytest.raises(LicError, match="team/codec is not written: HfHubHTTPError.*403"):
        push("team/codec", [str(results / "card.md")])
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match="no token for Hugging Face"):
        push("team/codec", [str(results / "card.md")])
