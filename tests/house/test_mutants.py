"""The list of mutants: the pieces that each changes stand in the package once, whatever words changed there."""

from __future__ import annotations

from pathlib import Path

import pytest

import lic_dist
from tests.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_changes_what_stands_there_once(mutant: Mutant) -> None:
    text = (Path(lic_dist.__file__).parent / mutant.file).read_text()
    assert [text.count(old) for old, _ in mutant.changes] == [1] * len(mutant.changes)
    assert all(old != new for old, new in mutant.changes)
    assert (ROOT / mutant.tests[0]).exists()
