from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lic_dist import config
from lic_dist.config.experiment import parse
from lic_dist.data.manifest import scan
from lic_dist.data.sources.opening import open_source
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.models.architectures import build
from lic_dist.training import base as job
from lic_dist.training import loop
from lic_dist.training.distributed import Ranks
from lic_dist.training.log import read_log
from lic_dist.training.photos import RandomCrops
from tests.conftest import dying_at
from tests.forked import ranks, run


def section(out: Path, **changes: object) -> config.Train:
    settings = {
        "N": 4, "M": 6, "lmbda": 0.05, "steps": 12, "batch": 2, "crop": 64, "lr": 1e-3, "warmup": 2,
        "evaluate_every": 4, "out": out, **changes,
    }  # fmt: skip
    return config.Train(**settings)


def weights(path: Path) -> str:
    return checkpoint.digest(checkpoint.load(str(path)).model.state_dict())


def test_training_lowers_the_loss_and_closes_the_quantiles(base: Path) -> None:
    rows = read_log(base.parent / "log.jsonl")
    assert rows[-1]["step"] == 150
    loaded = checkpoint.load(str(base))
    history = loaded.history[0]
    assert history["auxiliary_loss"] < 1e-3 * 8  # about 40 a channel before: quantiles start at -10, 0, 10
    assert history["held_out_figures"]["psnr"] > 12 and history["photos"] == 6
    tables = loaded.model.entropy_bottleneck._cdf_length
    assert int(tables.max()) < 600


KLT = {"architecture": "block-transform", "M": 16, "relaxation": "mixed", "optimizer": "muon", "initial_crops": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"relaxation": "noise"}, {"relaxation": "mixed"}, KLT], ids=["noise", "mixed", "klt"]
)
def test_a_killed_job_goes_on_to_the_same_weights(
    changes: dict[str, object], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = config.Images(path=photos, held_out="valid")
    whole = job.train(section(tmp_path / "whole", **changes), folder)
    monkeypatch.setattr(loop, "take_step", dying_at(7))
    with pytest.raises(KeyboardInterrupt):
        job.train(section(tmp_path / "cut", **changes), folder)
    monkeypatch.undo()
    resumed = job.train(section(tmp_path / "cut", **changes), folder)
    medians = checkpoint.load(str(resumed)).model.entropy_bottleneck.quantiles[:, 0, 1]
    mixed = changes["relaxation"] == "mixed"  # where the hyper-decoder learned to expect medians of zero
    assert bool((medians == 0).all()) == mixed
    assert weights(resumed) == weights(whole)
    assert [row["step"] for row in read_log(tmp_path / "cut" / "log.jsonl")] == [4, 8, 12]


@pytest.mark.slow
def test_a_warm_start_keeps_its_history_and_fits(photos: Path, tmp_path: Path) -> None:
    folder = config.Images(path=photos, held_out="valid")
    first = job.train(section(tmp_path / "first"), folder)
    second = job.train(section(tmp_path / "second", start=str(first), lmbda=0.1), folder)
    loaded = checkpoint.load(str(second))
    assert [entry["lmbda"] for entry in loaded.history] == [0.05, 0.1] and loaded.spec.lmbda == 0.1
    assert loaded.history[1]["start"] != loaded.history[0]["start"]
    with pytest.raises(LicError, match="N=4, M=6"):
        job.train(section(tmp_path / "third", start=str(first), N=8), folder)


def test_held_out_figures_leave_the_mode_alone(photos: Path) -> None:
    model = job._initial_checkpoint(section(Path("unused"))).model
    model.train()
    crops = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    job.evaluate_held_out(model, crops, section(Path("unused")), Ranks(0, 1, torch.device("cpu")))
    assert model.training and model.gaussian_conditional.training


@pytest.mark.slow
def test_another_job_in_the_same_folder_is_refused(photos: Path, tmp_path: Path) -> None:
    folder = config.Images(path=photos, held_out="valid")
    job.train(section(tmp_path), folder)
    with pytest.raises(UsageError, match="lr .*batch|batch .*lr"):
        job.train(section(tmp_path, lr=1e-4, batch=4), folder)


def test_crops_larger_than_all_photos_are_one_line(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(LicError, match="as large as a crop"):
        job.train(section(tmp_path, crop=512), config.Images(path=photos, held_out="valid"))


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(photos: Path, tmp_path: Path) -> None:
    """Equal global batches: rank 0's noise differs, so the losses agree only in the first forward's distortion;
    what must agree to the bit is the set of crops, and the job must end with one checkpoint."""
    document = {
        "train": json.loads(section(tmp_path / "two").model_dump_json()),
        "images": {"path": str(photos), "held_out": "valid"},
    }
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(document))
    said = tmp_path / "said"
    assert ranks("train", file, output=said) == [0, 0], said.read_text()[-2000:]
    assert checkpoint.load(str(tmp_path / "two")).spec.M == 6
    assert [row["step"] for row in read_log(tmp_path / "two" / "log.jsonl")] == [4, 8, 12]


def test_strided_shortcuts_of_few_channels_keep_out_of_onednns_channels_last() -> None:
    cpu = torch.device("cpu")
    assert job._memory_format(build("cheng2020-anchor", 8, 8), cpu) == torch.contiguous_format
    assert job._memory_format(build("cheng2020-anchor", 8, 8), torch.device("cuda")) == torch.channels_last
    assert job._memory_format(build("mbt2018-mean", 8, 12), cpu) == torch.channels_last


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["cheng2020-attn", "elic2022-official", "mbt2018"])
def test_a_family_trains_in_a_process_that_lives(architecture: str, photos: Path, tmp_path: Path) -> None:
    """oneDNN's fault ended the process within a few steps."""
    sizes = {"N": 8, "M": 8} if architecture != "elic2022-official" else {"N": 8, "M": 16}
    options = {"options": {"groups": [4, 4, 8]}} if architecture == "elic2022-official" else {}
    section = {"architecture": architecture, **sizes, **options, "steps": 6, "batch": 4, "crop": 64, "warmup": 1}
    document = {
        "images": {"path": str(photos), "held_out": "valid"},
        "train": {**section, "evaluate_every": 3, "out": "made"},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(document))
    done = run("train", "a.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    made = checkpoint.load(str(tmp_path / "made"))
    assert made.spec.architecture == architecture


def test_halved_photos_are_drawn_by_their_area_too(photos: Path) -> None:
    chosen = [photo for photo in scan(photos) if photo.path.startswith("train")]
    plain, halved = (RandomCrops(open_source(photos), chosen, 80, 0, halved=one) for one in (False, True))
    assert torch.equal(plain[3], RandomCrops(open_source(photos), chosen, 80, 0)[3]) and len(plain.photos) == 6
    assert [photo.path for photo in halved.photos[6:]] == ["train/3.png", "train/4.png", "train/5.png"]
    assert halved.chances[5] == pytest.approx(192_000 / (192_000 + 25_800))  # pixels
    reduced = np.asarray(Image.open(photos / "train/3.png").resize((100, 82), Image.Resampling.LANCZOS))
    number = next(number for number in range(1000) if halved._index(np.random.default_rng((0, number))) == 6)
    windows = [reduced[y : y + 80, x : x + 80] for y in range(3) for x in range(21)]
    crop = halved[number].numpy().transpose(1, 2, 0)
    assert any(np.array_equal(crop, one) or np.array_equal(crop, one[:, ::-1]) for one in windows)


@pytest.mark.slow
def test_a_block_transform_begins_as_a_klt_and_goes_on_at_another_lambda(photos: Path, tmp_path: Path) -> None:
    folder = config.Images(path=photos, held_out="valid")
    block = {
        "architecture": "block-transform", "N": 4, "M": 16, "relaxation": "mixed", "optimizer": "muon", "steps": 3,
    }  # fmt: skip
    made = checkpoint.load(str(job.train(section(tmp_path / "first", **block, initial_crops=16), folder)))
    assert made.history[0]["held_out_figures"]["psnr"] > 30  # a random one: 5
    assert made.history[0]["initial_crops"] == 16
    again = job._initial_checkpoint(section(tmp_path, **block, start=str(tmp_path / "first"), lmbda=0.2, rescale=True))
    assert torch.equal(again.model.g_a[-1].gain, 2 * made.model.g_a[-1].gain) and again.spec.lmbda == 0.2
    with pytest.raises(LicError, match="mbt2018-mean has no start"):
        job.train(section(tmp_path / "other", initial_crops=4), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rescale": True}, "give start too"), ({"start": "base-small", "initial_crops": 4}, "are for fresh weights")],
)
def test_starts_that_do_not_go_together_are_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse({"train": changes}, "a.yaml")
