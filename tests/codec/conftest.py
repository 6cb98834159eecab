"""What several tests of the codec share."""

from __future__ import annotations

from types import ModuleType

import pytest

from lic_dist.models.compat import import_compressai


@pytest.fixture(scope="session")
def ans() -> ModuleType:
    module: ModuleType = import_compressai().ans
    return module
