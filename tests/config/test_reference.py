"""What is made from the descriptions of the sections, and `lic-dist init`."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from lic_dist import config
from lic_dist.app import starting
from lic_dist.app.cli import app
from lic_dist.config import reference as config_reference
from lic_dist.config import yaml_file
from lic_dist.config.faults import keys
from lic_dist.config.sweeps import expand
from lic_dist.data.crops import require_held_out
from lic_dist.data.manifest import Manifest
from lic_dist.data.photo import Photo
from lic_dist.errors import LicError, UsageError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_every_key_has_a_description() -> None:
    bare = [name for name, section, last in keys(config.Experiment) if not section.model_fields[last].description]
    assert bare == [] and len(list(keys(config.Experiment))) > 90
    assert all(field.description for field in config.Phase.model_fields.values())


def test_the_page_is_current() -> None:
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == config_reference.markdown(), "lic-dist config explain --markdown > docs/configuration.md"


@pytest.mark.slow
def test_the_schema_is_current_and_every_config_names_it_and_fits() -> None:
    schema = json.loads((ROOT / "configs/schema.json").read_text())
    assert schema == config_reference.schema(), "lic-dist config schema > configs/schema.json"
    assert CONFIGS
    for file in CONFIGS:
        assert file.read_text().startswith("# yaml-language-server: $schema=schema.json\n"), file
        for document in yaml_file.read(file):
            jsonschema.validate(document, schema)
    for wrong in ({"sweep": {"finetune.lrr": [1]}}, {"finetune": {"lr": 0}}, {"model": {}}, {"trian": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_a_key_is_explained_and_a_wrong_one_names_the_nearest() -> None:
    lines = list(config_reference.explain("finetune.streams"))
    assert lines[0] == "finetune.streams" and "  takes: a whole number of at least 1 or auto" in lines
    assert "  default: auto" in lines
    assert [line for line in config_reference.explain("lr") if not line.startswith(" ")] == ["train.lr", "finetune.lr"]
    assert any(line.startswith("  images.held_out [0.05]: ") for line in config_reference.explain("images"))
    assert any("- steps: Steps of the optimizer" in line for line in config_reference.explain("finetune.phases"))
    assert next(config_reference.explain("cache.options.endpoint")) == "cache.options"
    for wrong, near in (("finetune.lrr", "finetune.lr"), ("quantiser", "quantizer"), ("steps_", "explain"), ("", "")):
        if wrong:
            with pytest.raises(UsageError) as caught:
                list(config_reference.explain(wrong))
            assert near in caught.value.hint


def test_show_all_has_every_key_and_reads_back_as_the_same(tmp_path: Path) -> None:
    (one,) = expand(ROOT / "configs/photos-tcq8.yaml")
    file = tmp_path / "a.yaml"
    file.write_text(CliRunner().invoke(app, ["config", "show", "--all", str(ROOT / "configs/photos-tcq8.yaml")]).output)
    assert config.load(file) == one
    text = file.read_text()
    assert all(f"{last}: " in text or f"{last}:\n" in text for _, _, last in keys(config.Experiment))
    (document,) = yaml.safe_load_all(text)
    assert document["finetune"]["stop_after"] is None


def test_a_first_file_fits_photos_and_checkpoint_and_is_never_overwritten(
    photos: Path, base: Path, tmp_path: Path
) -> None:
    said = starting.write(tmp_path / "mine", photos, str(base), test=photos)
    file = tmp_path / "mine" / "experiment.yaml"
    (one,) = expand(file)
    assert one.images and one.quantizer and one.evaluate and one.model and one.name == "mine"
    assert one.images.path == photos and one.images.held_out == "valid" and one.quantizer.group == "tcq8"
    assert one.model.checkpoint == str(base) and one.evaluate.images == photos
    count = len([path for path in photos.rglob("*") if path.suffix])
    assert f"{count} photos" in said and f"{count} photos" in file.read_text() and "lambda" in said
    before = file.read_bytes()
    with pytest.raises(UsageError, match="is there already"):
        starting.write(tmp_path / "mine", photos, str(base))
    assert file.read_bytes() == before
    starting.write(tmp_path / "other", photos, str(base))
    (other,) = expand(tmp_path / "other" / "experiment.yaml")
    assert other.evaluate is None and "# evaluate:" in (tmp_path / "other" / "experiment.yaml").read_text()
    with pytest.raises(LicError):
        starting.write(tmp_path / "none", tmp_path / "no-photos", str(base))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("held_out", "near"), [("Valid", "'valid'"), ("vlaid/", "'valid'"), ("x", "0.05"), ("5e", "5%")]
)
def test_a_folder_to_hold_out_that_is_not_there_names_those_that_are(held_out: str, near: str) -> None:
    manifest = Manifest.of([Photo("a.png", "00", 64, 64), Photo("valid/b.png", "01", 64, 64)])
    with pytest.raises(UsageError, match="there are valid") as caught:
        require_held_out(manifest, held_out)
    assert near in caught.value.hint
    for good in ("valid", "valid/", "./valid", 0.05, 0):
        require_held_out(manifest, good)
