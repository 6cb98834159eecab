"""`bench gpu`: all of its code runs here, on the CPU with Triton's interpreter; on a GPU it keeps to three minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lic_dist.benchmarks import gpu, on_device, photo_reading
from lic_dist.errors import UsageError

ROOT = Path(__file__).parents[2]
PLAIN = {"decoder, float32", "decoder, bf16", "base training, float32", "base training, bf16"}


def figures_of(out: Path, *arguments: str, **environment: str) -> tuple[str, dict]:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    command = [sys.executable, "-m", "lic_dist", "bench", "gpu", *arguments, "--json", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return " ".join(done.stdout.split()), json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.nightly
def test_all_of_it_runs_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    hidden = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    out, found = figures_of(tmp_path / "f.json", "--megapixels", "0.3", "--price", "3", "--crops", "2", **hidden)
    assert "whose figures say nothing" in out and "Triton's rows" not in out and found["tiny"]
    assert list(found["search"]) == ["tcq4", "tcq8", "tcq16", "tcq32", "tcq64"]
    for row in found["search"].values():
        assert set(row) == {"cpu", "torch", "triton"} and all(arm["equal"] for arm in row.values())
    assert set(found["training"]) == PLAIN and min(found["training"].values()) > 0
    assert found["all-reduce"]["unchanged"] and found["all-reduce"]["backend"] == "gloo"
    assert found["batch"]["seconds"]["all"] > found["batch"]["seconds"]["rows"] and list(found["reading"]) == ["1"]
    paid = found["dollars"]
    assert paid["dollars"]["build"] == pytest.approx(3e6 / min(paid["photos_per_second"].values()) / 3600)
    assert paid["bottleneck"] in out


def test_triton_without_a_gpu_or_its_interpreter_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "GPU" in on_device.why_no_triton(torch.device("cpu")) or "installed" in on_device.why_no_triton(
        torch.device("cpu")
    )
    monkeypatch.setattr(on_device, "find_spec", lambda name: None)
    assert on_device.why_no_triton(torch.device("cuda")) == "Triton is not installed"
    with pytest.raises(UsageError, match="there are search, batch, all-reduce, training, reading"):
        gpu.bench(["warp"], None, 2.0, 1, 3.0)


def test_the_parts_leave_time_to_start() -> None:
    assert sum(gpu.SECONDS.values()) <= 150


def test_the_search_finds_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "SEARCHES", on_device.SEARCHES[:1])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = on_device.search(torch.device("cpu"), on_device.Extent(2, 8, 1, 64), 0.0)
    assert found["tcq4"]["torch"]["equal"]
    wrong = on_device.tensors.search
    monkeypatch.setattr(on_device.tensors, "search", lambda *given: (wrong(*given)[0] + 1, wrong(*given)[1]))
    found = on_device.search(torch.device("cpu"), on_device.Extent(2, 8, 1, 64), 0.0)
    assert found["tcq4"]["cpu"]["equal"] and not found["tcq4"]["torch"]["equal"]


def test_dollars_are_of_the_slowest_stage() -> None:
    figures = {
        "reading": {"1": 10.0, "2": 20.0},
        "batch": {"crops_per_second": 200.0, "crops": 64, "seconds": {"all": 1.0, "search": 0.2, "rows": 0.1}},
        "training": {"decoder, float32": 1.0, "decoder, bf16": 2.0, "base training, bf16": 9.0},
    }
    found = gpu.dollars(figures, crops=4, price=3.6)
    assert found["photos_per_second"] == {"reading": 20.0, "the device": 50.0} and found["bottleneck"] == "reading"
    assert found["dollars"]["build"] == pytest.approx(50.0) and found["slowest_on_the_device"] == "search"
    assert found["hours"]["an epoch of decoder, bf16"] == pytest.approx(4e6 / 16 / 3600)
    assert gpu.dollars(figures, crops=40, price=3.6)["bottleneck"] == "the device"


@pytest.mark.slow
def test_photos_are_read_by_processes() -> None:
    found = photo_reading.rates(0.2, 0.4, (1, 2))
    assert list(found) == ["1", "2"] and min(found.values()) > 1


@pytest.mark.slow
@pytest.mark.nightly
def test_photos_are_read_from_a_folder_and_a_bucket_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moto.server")
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    found = photo_reading.from_a_bucket(0.2, rounds=1, milliseconds=5)
    (one,) = found["processes"].values()
    assert one["ratio"] == pytest.approx(one["bucket"] / one["folder"]) and one["folder"] > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_keeps_to_three_minutes_and_all_indices_are_equal(tmp_path: Path) -> None:
    _, found = figures_of(tmp_path / "f.json")
    assert found["seconds"]["all"] < 180 and not found["tiny"]
    assert all(arm["equal"] for row in found["search"].values() for arm in row.values())
    assert found["all-reduce"]["backend"] == "nccl" and found["all-reduce"]["unchanged"]
    assert set(found["training"]) == PLAIN | {f"base training, {one}, one graph a step" for one in ("float32", "bf16")}
