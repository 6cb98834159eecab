"""Submission: what is sent, what a user is told when it cannot be, and real jobs on a real head."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from lic_dist.cluster.submit import entrypoint
from tests.forked import free_port, run

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
CLEAN |= {
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}
Done = subprocess.CompletedProcess[str]


def submit(*arguments: object, folder: Path | None = None, **environment: str) -> Done:
    """`lic-dist submit ...` in a process of its own: Ray reads its environment once."""
    return run("submit", *arguments, environment={**CLEAN, **environment}, folder=folder)


def refused(done: Done, code: int, *words: str) -> None:
    lines = done.stderr.splitlines()
    assert done.returncode == code and len(lines) == 2, done.stderr
    assert lines[0].startswith("error:") and lines[1].startswith("hint:")
    assert all(word in done.stderr for word in words), lines


def experiment(path: Path, **sections: object) -> Path:
    path.write_text(
        yaml.safe_dump({"name": "a b/c", "engine": {"name": "ray", "encoders": 1, "readers": 1}, **sections})
    )
    return path


Dashboard = tuple[str, list[dict[str, Any]], dict[str, int]]


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    """A stand-in for Ray's dashboard: its address, the jobs it was sent, and the status it answers by path."""
    sent: list[dict[str, Any]] = []
    answers: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            answer: dict[str, object] = {"version": "4", "ray_version": "2.60.0"}
            if body:
                sent.append(body)
                answer = {"job_id": body["submission_id"], "submission_id": body["submission_id"]}
            code = answers.get(self.path.split("/")[2], 200)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode() if code == 200 else b"no")

        do_POST = do_GET

        def log_message(self, format: str, *values: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", sent, answers
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
def test_the_file_alone_is_sent_with_the_cluster_as_its_engine(dashboard: Dashboard, tmp_path: Path) -> None:
    address, sent, _ = dashboard
    (tmp_path / "photos").mkdir()
    file = experiment(tmp_path / "x.yaml", cache={"path": "x.zarr"}, finetune={})
    done = submit("cache", file, "--set", "cache.shard=8", RAY_ADDRESS=address, folder=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("a-b-c-cache-2"), done.stderr
    (job,) = done.stdout.split()  # alone, for scripts; what to do next stands beside it
    where = f" --address {address}"
    assert done.stderr.splitlines() == [
        f"watch it: lic-dist submit logs {job} --follow{where}",
        f"end it:   lic-dist submit stop {job}{where}",
        f"it writes x.zarr; then: lic-dist submit finetune {file}{where}",
    ]
    done = submit(
        "finetune",
        file,
        "--set",
        "engine.trainers=2",
        "--folder",
        "/mnt/shared",
        "--address",
        address,
        RAY_ADDRESS="http://nowhere.invalid:1",
    )
    assert done.returncode == 0 and "then: an evaluate section in the file" in done.stderr, done.stderr
    cache, finetune = sent
    assert cache["submission_id"] and cache["entrypoint_num_cpus"] == finetune["entrypoint_num_cpus"] == 0
    assert f"cd {tmp_path} " in cache["entrypoint"]
    assert cache["entrypoint"].endswith('cache build "$file" --set cache.shard=8 --set engine.address=auto')
    assert cache["runtime_env"]["working_dir"].startswith("gcs://")
    assert "cd /mnt/shared " in finetune["entrypoint"]
    command = 'lic_dist finetune "$file" --engine ray --set engine.trainers=2 --set engine.address=auto'
    assert finetune["entrypoint"].endswith(command)
    assert cache["runtime_env"] == finetune["runtime_env"]  # the same one file


def test_the_entrypoint_survives_a_shell(tmp_path: Path) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$PYTHONSAFEPATH" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    folder = tmp_path / "it's here"
    folder.mkdir()
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = entrypoint("evaluate", "a $b.yaml", ["evaluate.checkpoints=[a, 'b']"], str(folder))
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    expected = [
        folder,
        1,
        "-m",
        "lic_dist",
        "evaluate",
        tmp_path / "a $b.yaml",
        "--set",
        "evaluate.checkpoints=[a, 'b']",
    ]
    assert done.stdout.splitlines() == [str(word) for word in expected]
    command = entrypoint("cache", "x.yaml", [], str(folder / "none"))
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "--folder" in done.stderr and not done.stdout


@pytest.mark.slow
def test_a_faulty_experiment_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    for kind in ("cache", "finetune", "evaluate"):
        refused(submit(kind, experiment(tmp_path / "x.yaml")), 2, f"no section '{kind}'")
    refused(submit("cache", experiment(tmp_path / "x.yaml", cahce={})), 2, "cahce", "did you mean 'cache'")


@pytest.mark.slow
def test_what_is_no_dashboard_is_one_line(dashboard: Dashboard) -> None:
    address, _, answers = dashboard
    refused(submit("status", "--address", f"http://127.0.0.1:{free_port()}"), 1, "no answer", "ray start --head")
    refused(submit("status", RAY_ADDRESS="10.0.0.1:6379"), 2, "10.0.0.1:6379", "http://HEAD:8265")
    refused(submit("status", "x", "--address", "ray://head:10001"), 2, "no URL")
    answers["version"] = 404
    refused(submit("logs", "x", "--address", address), 1, "no Ray dashboard")
    for code in (401, 403):
        answers["version"] = code
        refused(submit("stop", "x", "--address", address), 1, "refused the token", "RAY_AUTH_TOKEN")
    answers["version"] = 200
    answers["jobs"] = 404
    refused(submit("stop", "x", "--address", address), 1, "knows no job x", "submit status")
    answers["jobs"] = 500
    refused(submit("status", "x", "--address", address), 1, "status code 500")
