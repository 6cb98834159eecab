"""Checkpoints as people bring them: names, wrappers, types and what is refused by name."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from typer.testing import CliRunner

from lic_dist import config
from lic_dist.app.cli import app
from lic_dist.building.job import load_parent
from lic_dist.codec.codec import ImageCodec
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.models.architectures import build
from lic_dist.models.compat import import_compressai
from lic_dist.models.recognise import WRAPPERS, as_named, parse_published_name, recognise, tensors_of


def state(architecture: str = "mbt2018-mean") -> dict[str, Tensor]:
    torch.manual_seed(3)
    return dict(build(architecture, 4, 6).state_dict())


def loads_same(path: Path, expected: dict[str, Tensor]) -> None:
    loaded = checkpoint.load(str(path), lmbda=0.05)
    held = loaded.model.state_dict()
    assert (loaded.spec.N, loaded.spec.M) == (4, 6)
    for name, value in expected.items():
        if value.numel():
            assert torch.equal(held[name], value), name


@pytest.mark.parametrize("architecture", ["mbt2018-mean", "bmshj2018-hyperprior", "block-transform"])
def test_architecture_and_sizes_are_read_off_the_tensors(architecture: str) -> None:
    assert recognise(state(architecture)) == (architecture, {"N": 4, "M": 6})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_modules_are_taken_off(prefix: str, tmp_path: Path) -> None:
    made = state()
    torch.save({"state_dict": {prefix + name: value for name, value in made.items()}}, tmp_path / "a.tar")
    loads_same(tmp_path / "a.tar", made)


@pytest.mark.parametrize("old", ["_matrices.{}", "_matrix{}"])
def test_published_names_of_the_bottleneck_load(old: str, tmp_path: Path) -> None:
    made, kinds = state(), {"matrices": "matri", "biases": "bias", "factors": "factor"}
    named = {}
    for name, value in made.items():
        parts = name.split(".")
        if parts[0] == "entropy_bottleneck" and parts[1] in kinds:
            short = {"matrices": "_matrix", "biases": "_bias", "factors": "_factor"}[parts[1]]
            name = f"{parts[0]}.{f'_{parts[1]}.' if '.' in old else short}{parts[2]}"
        named[name] = value
    assert not any(".matrices." in name for name in named)
    torch.save(named, tmp_path / "a.tar")
    loads_same(tmp_path / "a.tar", made)


@pytest.mark.parametrize("key", WRAPPERS)
def test_wrappers_of_training_scripts_are_opened(key: str, tmp_path: Path) -> None:
    made = state()
    torch.save({key: made, "epoch": 3}, tmp_path / "a.tar")
    loads_same(tmp_path / "a.tar", made)


def test_a_namespace_and_numpy_numbers_beside_the_tensors_load(tmp_path: Path) -> None:
    made = state()
    beside = {"args": argparse.Namespace(lr=1e-4), "loss": np.float64(0.5), "best": np.float32(0.25), "n": np.int64(7)}
    torch.save({"state_dict": made, **beside}, tmp_path / "a.tar")
    loads_same(tmp_path / "a.tar", made)


def test_safetensors_load(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    made = state()
    save_file(made, tmp_path / "a.safetensors")
    loads_same(tmp_path / "a.safetensors", made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loads_to_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state().items()}
    torch.save(half, tmp_path / "a.tar")
    loads_same(tmp_path / "a.tar", {n: v.float() if v.is_floating_point() else v for n, v in half.items()})


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_a_tensor_that_is_not_finite_is_refused_by_name(value: float, kind: str, tmp_path: Path) -> None:
    made = state()
    made["g_s.2.weight"][0, 0, 0, 0] = value
    torch.save(made, tmp_path / "a.tar")
    with pytest.raises(LicError, match=rf"g_s\.2\.weight holds {kind}"):
        checkpoint.load(str(tmp_path / "a.tar"), lmbda=0.05)


def test_a_picture_that_is_not_finite_is_an_error(base: Path) -> None:
    from lic_dist.codec.records import local_record

    loaded = checkpoint.load(str(base))
    codec = ImageCodec(loaded.model, local_record(loaded, "sq"))
    encoded = codec.encode(np.zeros((64, 64, 3), np.uint8))
    encoded.y_hat[...] = float("inf")
    with pytest.raises(LicError, match="not finite"):
        codec.picture(encoded)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"model:\n  checkpoint: base-small\n", "a text file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"", "it is empty"),
        (b"PK\x03\x04cut", "cut, damaged"),
    ],
)
def test_other_files_are_named_as_what_they_are(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(LicError, match=said) as caught:
        checkpoint.load(str(tmp_path / "a.tar"), lmbda=0.05)
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickled_module_is_named_and_not_run(tmp_path: Path) -> None:
    torch.save(build("mbt2018-mean", 4, 6), tmp_path / "a.tar")
    with pytest.raises(LicError, match=r"compressai\.models\.\S*MeanScaleHyperprior.*state_dict"):
        checkpoint.load(str(tmp_path / "a.tar"), lmbda=0.05)


def test_families_that_are_not_served_are_named() -> None:
    with pytest.raises(LicError, match=r"this is a video model \(ssf2020\), a family that is not served"):
        recognise({"motion_encoder.0.weight": torch.zeros(1)})


def test_published_file_names_tell_lambda_and_the_metric(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "mbt2018-mean-4-6dba02a3.pth.tar")
    assert checkpoint.load(str(tmp_path / "mbt2018-mean-4-6dba02a3.pth.tar")).spec.lmbda == 0.013
    torch.save(state(), tmp_path / "mbt2018-mean-ms-ssim-4-12626c13.pth.tar")
    with pytest.raises(UsageError, match=r"MS-SSIM with lambda 16\.64"):
        checkpoint.load(str(tmp_path / "mbt2018-mean-ms-ssim-4-12626c13.pth.tar"))


def test_every_file_name_that_compressai_publishes_tells_its_quality() -> None:
    import_compressai()
    from compressai.zoo.image import model_urls

    names = [
        (url.rsplit("/", 1)[1], metric, quality)
        for family in model_urls.values()
        for metric, urls in family.items()
        for quality, url in urls.items()
    ]
    assert len(names) > 80
    for name, metric, quality in names:
        assert (found := parse_published_name(name)) is not None and found[1:] == (metric, quality), name


def test_compressais_zoo_is_read_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    made = state()
    torch.save(made, tmp_path / "hub" / "checkpoints" / "mbt2018-mean-4-6dba02a3.pth.tar")
    loaded = checkpoint.load("compressai:mbt2018-mean/mse/4")
    assert (loaded.spec.architecture, loaded.spec.lmbda) == ("mbt2018-mean", 0.013)
    assert torch.equal(loaded.model.state_dict()["g_a.0.weight"], made["g_a.0.weight"])
    with pytest.raises(UsageError, match="compressai:mbt2018-mean/mse/9"):
        checkpoint.load("compressai:mbt2018-mean/mse/9")


def test_quality_is_lmbda_and_contradicts_it_aloud() -> None:
    assert config.Model(checkpoint="a", quality=4).lmbda == 0.013
    with pytest.raises(ValidationError, match=r"quality 4 is lmbda 0\.013, not 0\.05"):
        config.Model(checkpoint="a", quality=4, lmbda=0.05)


@pytest.mark.parametrize(
    "said", [{"lmbda": 0.07}, {"N": 192}, {"M": 320}, {"architecture": "bmshj2018-hyperprior"}], ids=str
)
def test_a_contradiction_with_the_file_names_both_values(said: dict[str, object], base: Path) -> None:
    section = config.Model.model_validate({"checkpoint": str(base), **said})
    ((key, value),) = said.items()
    held = getattr(checkpoint.load(str(base)).spec, key)
    with pytest.raises(UsageError, match=rf"{key} {value} is given, the checkpoint has {held}"):
        load_parent(config.Experiment(model=section))


@pytest.mark.parametrize("command", ["encode", "decode", "export"])
def test_a_command_that_contradicts_the_file_names_both_values(command: str, base: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert CliRunner().invoke(app, ["encode", *map(str, paths(tmp_path)), "--model", str(base)]).exit_code == 0
    arguments = [str(base), str(tmp_path / "b.tar")] if command == "export" else [*map(str, paths(tmp_path))]
    model = [] if command == "export" else ["--model", str(base)]
    if command == "decode":
        arguments = [arguments[1], str(tmp_path / "b.png")]
    done = CliRunner().invoke(app, [command, *arguments, *model, "--lambda", "0.07"])
    assert isinstance(done.exception, UsageError) and "lmbda 0.07 is given, the checkpoint has" in str(done.exception)


def paths(folder: Path) -> tuple[Path, Path]:
    return folder / "a.png", folder / "a.bin"


def test_old_names_of_strided_blocks_are_renamed_as_compressai_does_where_a_model_has_no_such_names() -> None:
    from compressai.zoo.pretrained import rename_key

    old, today = "module.g_a.0.downsample.weight", "g_a.0.skip.weight"
    found = tensors_of({old: torch.zeros(2, 2)})
    assert list(as_named([today], found)) == [rename_key(rename_key(old))] == [today]
    assert list(as_named(["g_a.0.downsample.weight"], found)) == ["g_a.0.downsample.weight"]


def test_a_checkpoint_of_cheng2020_with_old_names_loads(tmp_path: Path) -> None:
    made = dict(build("cheng2020-anchor", 4, 4).state_dict())
    torch.save({name.replace(".skip.", ".downsample."): value for name, value in made.items()}, tmp_path / "a.tar")
    held = checkpoint.load(str(tmp_path / "a.tar"), lmbda=0.05).model.state_dict()
    assert torch.equal(held["g_a.0.skip.weight"], made["g_a.0.skip.weight"])


@pytest.mark.parametrize("name", ["40_module_prefix", "41_legacy_names", "44_npfloat", "45_model_key"])
def test_the_files_found_load(name: str, shared: Path) -> None:
    checkpoint.load(str(shared / "faults" / f"{name}.pth.tar"), lmbda=0.05)


def test_the_file_with_nan_is_refused(shared: Path) -> None:
    with pytest.raises(LicError, match=r"g_s\.\S+ holds NaN"):
        checkpoint.load(str(shared / "faults" / "42_nan_gs.pth.tar"), lmbda=0.05)
