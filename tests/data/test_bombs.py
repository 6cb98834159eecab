"""Files that claim huge pictures, or are huge themselves, are refused before they take memory."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from lic_dist.data import images
from lic_dist.data.manifest import scan
from tests.data.files import RGB, claims
from tests.data.kinds import decoded_size, outcome


@pytest.fixture()
def little_memory() -> Iterator[None]:
    """No more than 200 MB of address space on top of what the process has; the smallest bomb claims 4 GB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (200 << 20), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "ICO"])
def test_a_bomb_is_refused_by_its_header(kind: str, little_memory: None) -> None:
    for look in (images.measure, decoded_size):
        assert outcome(look, claims(kind), kind.lower()) == "too large"


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(images.LARGEST_FILE + 1)  # a hole: takes no room
    Image.fromarray(RGB).save(tmp_path / "y.png")
    assert [photo.fault for photo in scan(tmp_path)] == ["too large", ""]
