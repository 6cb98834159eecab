"""Families by name, by entry point, and by a class that a user names."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lic_dist.app.cli import app
from lic_dist.errors import UsageError
from lic_dist.models import architectures, checkpoint
from lic_dist.models.architectures import ARCHITECTURES, ModelSpec, adapt, build, family, installed
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.recognise import recognise

PLUGIN = """
from lic_dist.models.block_transform import BlockTransform
from lic_dist.models.families.hyperprior import BlockTransform as Family

class Twin(BlockTransform):
    def __init__(self, N, M, loud=False):
        super().__init__(N, M)
        self.loud = loud

class TwinFamily(Family):
    name = "twin"
    module_class = Twin
    @classmethod
    def fits(cls, state):
        return "h_a.0.deviation" in state
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of a user's own, in the folder that the process is in; all is forgotten after the test."""
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(architectures, "_NAMED", dict(architectures._NAMED))
    yield "my_plugin:TwinFamily"
    sys.modules.pop("my_plugin", None)
    installed.cache_clear()
    family.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    points = [EntryPoint("twin", value, "lic_dist.families"), EntryPoint("mbt2018-mean", value, "lic_dist.families")]
    monkeypatch.setattr(architectures, "entry_points", lambda group: points)
    installed.cache_clear()
    family.cache_clear()


def saved(named: str, path: Path) -> Path:
    torch.manual_seed(0)
    made = Checkpoint(build(named, 8, 12, loud=True).eval(), ModelSpec(named, 8, 12, 0.05, {"loud": True}))
    checkpoint.save(made, path)
    return path


def test_a_class_that_is_named_is_a_family(plugin: str, tmp_path: Path) -> None:
    path = saved(plugin, tmp_path / "a.tar")
    loaded = checkpoint.load(str(path), plugin)
    assert loaded.model.loud and loaded.spec == ModelSpec(plugin, 8, 12, 0.05, {"loud": True})
    assert loaded.codec.name == "twin" and type(adapt(loaded.model)) is family(plugin)
    content = checkpoint.read(path)
    assert content["options"] == {"loud": True} and "options" not in checkpoint.read(checkpoint.zoo()["base-small"])


def test_an_installed_package_provides_families_and_replaces_none(
    plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(plugin, tmp_path / "a.tar")
    install(monkeypatch, plugin)
    assert installed() == {"twin": plugin} and family("twin").name == "twin"
    assert family("mbt2018-mean").__module__.startswith("lic_dist.")
    assert checkpoint.load(str(path)).model.loud  # the entry point provides the class that the file names
    named = checkpoint.load(str(saved("twin", tmp_path / "b.tar")))
    assert named.spec.architecture == "twin" and type(named.model).__name__ == "Twin"


def test_a_file_cannot_have_a_class_imported(plugin: str, tmp_path: Path) -> None:
    path = saved(plugin, tmp_path / "a.tar")
    sys.modules.pop("my_plugin")
    with pytest.raises(UsageError, match="my_plugin:TwinFamily, which is not imported") as caught:
        checkpoint.load(str(path))
    assert "my_plugin" not in sys.modules and "--architecture" in str(caught.value.hint)
    with pytest.raises(UsageError, match="not imported"):
        checkpoint.load(str(path), "mbt2018-mean")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("no_such_module:A", "No module named 'no_such_module'"),
        ("json:Encoder", "module 'json' has no attribute 'Encoder'"),
        ("json:JSONEncoder", "is no subclass of CodecModel"),
        ("vgg", "unknown architecture 'vgg'"),
    ],
)
def test_what_is_no_family_is_one_line(named: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        family(named)


def test_options_that_a_class_does_not_take_are_one_line() -> None:
    with pytest.raises(UsageError, match=r"mbt2018-mean with N 8, M 12, options \{'depth': 3\}: .*depth"):
        build("mbt2018-mean", 8, 12, depth=3)


def test_a_named_family_is_asked_before_others(plugin: str) -> None:
    state = build(plugin, 8, 12).state_dict()
    assert recognise(state) == ("block-transform", {"N": 8, "M": 12})
    assert recognise(state, plugin) == (plugin, {"N": 8, "M": 12})
    assert recognise(build("mbt2018-mean", 8, 12).state_dict(), plugin)[0] == "mbt2018-mean"


def test_models_lists_families_and_what_they_support(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, plugin)
    said = CliRunner().invoke(app, ["models"]).output
    for name in ("mbt2018-mean", "bmshj2018-hyperprior", "block-transform", "twin"):
        assert f"  {name}: y a 16th, z a 64th of the sides; deterministic, refinement, tiles\n" in said
    assert "  base-small: architecture mbt2018-mean, N 48, M 72, lmbda 0.013; quantizers: sq\n" in said


def test_describe_says_what_a_plain_checkpoint_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("bmshj2018-hyperprior", 8, 12)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "plain.tar")
    said = CliRunner().invoke(app, ["models", "describe", str(tmp_path / "plain.tar")]).output.splitlines()
    assert said[0] == f"{tmp_path / 'plain.tar'}: bmshj2018-hyperprior, told by its tensors"
    assert said[1:4] == [
        "  N 8, M 12, lambda not said",
        "  strides: y 16, z 64; pictures are padded to multiples of 64",
        "  stages of a crop of 256x256: 1; channels of y: 12",
    ]
    counts = [int(line.split()[1].replace(",", "")) for line in said if line.endswith("parameters")]
    assert [line.split(":")[0].strip() for line in said[5:9]] == ["encoder", "decoder", "hyper", "prior"]
    assert sum(counts) == sum(values.numel() for values in model.parameters()) and said[-1] == "  quantizers: sq"


def test_the_page_says_what_every_family_costs_in_lines() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    said = {name: int(lines) for name, lines in re.findall(r"^\| `([\w-]+)` \| (\d+) \|", page, re.MULTILINE)}
    assert said.keys() == ARCHITECTURES.keys()
    for name, lines in said.items():
        assert abs(len(inspect.getsource(family(name)).splitlines()) - lines) <= 5, name
