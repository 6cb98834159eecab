"""Kinds of pictures by their folders."""

from __future__ import annotations

import pytest

from lic_dist.data.folders import folder_names, folders_missing, with_others


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/b/1.png", "a/c/d/2.png", "a/3.png"], ["a/b", "a/c", "a"]),
        (["1.png", "street/x/2.png"], [".", "street"]),
        (["valid/1.png", "valid/2.png"], ["valid", "valid"]),
    ],
)
def test_a_source_is_the_first_folder_in_which_paths_differ(paths: list[str], names: list[str]) -> None:
    assert folder_names(paths) == names


@pytest.mark.parametrize(
    ("training", "held_out", "missing"),
    [
        (["a/1", "b/1", "c/1"], ["a/2", "b/2"], ["c"]),
        (["a/1", "b/1"], ["a/2"], ["b"]),
        (["train/a/1", "train/b/1", "train/c/1"], ["valid/a/1", "valid/b/1"], ["c"]),
        (["train/a/1", "train/a/2"], ["valid/a/1", "valid/b/1"], []),
        (["train/a/1", "train/b/1"], ["valid/1", "valid/2"], []),  # of any kind
        (["1", "2"], ["3"], []),
    ],
)
def test_folders_that_nobody_measures(training: list[str], held_out: list[str], missing: list[str]) -> None:
    assert folders_missing(training, held_out) == missing


def test_the_rarest_of_many_are_one() -> None:
    names = ["b"] * 3 + ["d"] * 2 + ["c", "a", "a"]
    assert with_others(names, 4) == (names, ("a", "b", "c", "d"))
    assert with_others(names, 3) == (["b"] * 3 + ["others"] * 3 + ["a", "a"], ("a", "b", "others"))
