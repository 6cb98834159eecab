"""Sets of pictures by name: what a folder lacks, what is altered, what does not belong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lic_dist.data import named_sets as module
from lic_dist.data.images import pixel_digest
from lic_dist.data.named_sets import NamedSet, check, named_set, named_sets
from lic_dist.data.sources.opening import open_source
from lic_dist.errors import UsageError
from tests.app.test_cli import lic_dist, refused
from tests.conftest import picture


@pytest.fixture()
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NamedSet:
    """The set `small` of three pictures, by digests; it lies whole in `set`."""
    pixels = {f"s{seed}.png": picture(seed, 16, 24) for seed in range(3)}
    (tmp_path / "set").mkdir()
    for name, one in pixels.items():
        Image.fromarray(one).save(tmp_path / "set" / name)
    digests = {name: pixel_digest(one) for name, one in pixels.items()}
    made = NamedSet("small", "a test", ("https://example.org/s",), 3, tuple(pixels), frozenset({(24, 16)}), digests)
    monkeypatch.setattr(module, "named_sets", lambda: {"small": made})
    return made


def of(wanted: NamedSet, folder: Path) -> module.Check:
    return check(wanted, open_source(str(folder)).absolute())


def test_what_is_known_is_consistent() -> None:
    for one in named_sets().values():
        assert one.where and all(place.startswith("https://") for place in one.where)
        assert len(one.names) in (0, one.count) and set(one.digests) in (set(), set(one.names))
        assert all(len(digest) == 64 for digest in one.digests.values())
    assert named_set("kodak").names[::23] == ("kodim01.png", "kodim24.png") and len(named_set("tecnick").names) == 100
    assert named_set("clic").name == "clic2020-professional"
    with pytest.raises(UsageError, match="no set of pictures 'codak'"):
        named_set("codak")


def test_kodak_is_known_by_its_pixels(shared: Path) -> None:
    assert not of(named_set("kodak"), shared / "data/kodak").faults


def test_a_picture_is_known_by_its_pixels_whatever_its_file(small: NamedSet, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    assert of(small, folder) == module.Check()
    (folder / "sub").mkdir()
    Image.open(folder / "s1.png").save(folder / "sub" / "S1.webp", lossless=True, exact=True)
    (folder / "s1.png").unlink()
    (folder / "s2.png").rename(folder / "another.png")
    (folder / "notes.txt").write_text("passed over")
    assert of(small, folder) == module.Check(renamed={"another.png": "s2.png"})


def test_what_is_missing_altered_or_surplus_is_told(small: NamedSet, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    changed = picture(0, 16, 24)
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(folder / "s0.png")
    (folder / "s1.png").unlink()
    Image.open(folder / "s2.png").save(folder / "copy.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "zero.png")
    found = of(small, folder)
    assert found.missing == ("s1.png",) and found.altered == {"s0.png": "other pixels"}
    assert sorted(found.surplus) == ["s2.png", "zero.png"] and found.renamed == {"copy.png": "s2.png"}
    (folder / "s0.png").write_bytes((folder / "s0.png").read_bytes()[:-40])
    assert of(small, folder).altered == {"s0.png": "truncated"}


def test_without_digests_names_sizes_and_number_are_looked_at(small: NamedSet, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    by_name = replace(small, digests={})
    assert of(by_name, folder) == module.Check() and "no digests are known" in by_name.known_by
    Image.fromarray(picture(0, 16, 23)).save(folder / "s0.png")
    (folder / "s1.png").rename(folder / "other.png")
    found = of(by_name, folder)
    assert (found.missing, found.surplus) == (("s1.png",), ("other.png",))
    assert found.altered == {"s0.png": "23x16 pixels"}
    counted = replace(by_name, names=(), sizes=frozenset(), count=5)
    assert of(counted, folder) == module.Check(beyond=-2) and of(counted, folder).faults == "2 missing"
    assert of(replace(counted, count=2), folder).faults == "1 surplus"


def test_the_command_tells_and_checks(small: NamedSet, tmp_path: Path) -> None:
    told = lic_dist("data")
    assert (
        told.returncode == 0 and "small: a test; 3 pictures" in told.stdout and "https://example.org/s" in told.stdout
    )
    told = lic_dist("data", "sm", tmp_path / "set")
    assert told.returncode == 0 and told.stdout.endswith("all 3 pictures of small, by digests of pixels\n")
    (tmp_path / "set" / "s1.png").unlink()
    told = lic_dist("data", "small", tmp_path / "set", "--json", tmp_path / "a.json")
    refused(told, 1, "is not small: 1 missing", "https://example.org/s")
    assert "missing: s1.png" in told.stdout and json.loads((tmp_path / "a.json").read_text())["missing"] == ["s1.png"]
    refused(lic_dist("data", "none", tmp_path), 2, "no set of pictures 'none'")
    refused(lic_dist("data", "small", tmp_path / "nowhere"), 1, "no such folder")
