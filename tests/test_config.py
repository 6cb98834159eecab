from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lic_dist import config
from lic_dist.errors import UsageError
from lic_dist.sweeps import expand


def write(path: Path, document: object) -> Path:
    path.write_text(yaml.safe_dump(document))
    return path


def test_defaults_and_overrides(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", {"name": "x", "train": {"N": 16}})
    experiment = config.load(file, ["train.lr=1e-3", "train.lmbda=0.05", "quantizer.step=0.7"])
    assert experiment.train is not None and experiment.quantizer is not None
    assert (experiment.train.N, experiment.train.lr, experiment.train.lmbda) == (16, 1e-3, 0.05)
    assert experiment.quantizer.step == 0.7 and experiment.quantizer.lambda_scale == "auto"
    assert experiment.model is None


@pytest.mark.parametrize(
    ("document", "near"),
    [
        ({"quantiser": {}}, "quantizer"),
        ({"quantizer": {"lamda_scale": 1}}, "quantizer.lambda_scale"),
        ({"finetune": {"step": 5}}, "finetune.steps"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, document: dict, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        config.load(write(tmp_path / "a.yaml", document))
    assert near in caught.value.hint and "unknown key" in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "- a\n",
        "a: [",
        "",
        "train: {N: many}",
        "images: {path: x, crop: 100}",
        "quantizer: {states: 5}",
        "quantizer: {step: 0}",
        "quantizer: {group: sq}",
        "evaluate: {images: x, quantizers: []}",
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        config.load(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_missing_section(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="no section 'train'"):
        config.need(config.load(write(tmp_path / "a.yaml", {"name": "x"})).train, "train")


@pytest.mark.parametrize("override", ["train.N", "=3", "name.x=3"])
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(UsageError):
        config.load(write(tmp_path / "a.yaml", {"name": "x"}), [override])


def test_canonical_json_is_the_same_for_equal_files(tmp_path: Path) -> None:
    one = config.load(write(tmp_path / "a.yaml", {"name": "x", "train": {"N": 16, "M": 32}}))
    two = config.load(write(tmp_path / "b.yaml", {"train": {"M": 32, "N": 16}, "name": "x"}))
    assert one.canonical_json() == two.canonical_json()
    assert config.Experiment.model_validate_json(one.canonical_json()) == one


def test_every_experiment_file_of_the_repository_is_valid() -> None:
    files = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert files
    for file in files:
        assert list(expand(file))
