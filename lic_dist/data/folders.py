"""Kinds of pictures, told apart by the folders in their paths."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

OTHERS = "others"


def folder_names(paths: Sequence[str]) -> list[str]:
    """Return the first folder of each path in which not all of them agree, from the root on; "." for the root.

    ["a/b/1", "a/c/d/2", "a/3"] => ["a/b", "a/c", "a"]
    """
    folders = _folders(paths)
    depth = len(_common(folders)) + 1
    return ["/".join(folder[:depth]) or "." for folder in folders]


def with_others(names: Sequence[str], most: int) -> tuple[list[str], tuple[str, ...]]:
    """Return names of which the rarest are `others` where there are more than `most`, and all of them in their order.

    ["b", "b", "c", "a", "a"], 2 => ["others", "others", "others", "a", "a"], ("a", "others")
    """
    counts = Counter(sorted(names)).most_common()
    own = {name for name, _ in counts[: most if len(counts) <= most else most - 1]}
    every = tuple(sorted(own)) + (OTHERS,) * (len(counts) > len(own))
    return [name if name in own else OTHERS for name in names], every


def folders_missing(training: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """Return the folders of training photos in which no photo is held out, told apart as sources are, from paths.

    Where the held-out photos have a folder of their own, what lies below it is compared with what lies below the
    training photos' folder; where that is a single folder, none are missing.
    """
    trained, judged = _folders(training), _folders(held_out)
    common = _common(judged)
    if common and all(folder[: len(common)] != common for folder in trained):
        there, here = _below(trained), _below(judged)
        there = there if len(here) > 1 else set()
    else:
        depth = len(_common([*trained, *judged])) + 1
        there, here = ({tuple(folder[:depth]) for folder in part} for part in (trained, judged))
    return sorted("/".join(folder) or "." for folder in there - here)


def _below(folders: Sequence[list[str]]) -> set[tuple[str, ...]]:
    """Return the names of the folders below the one that all are in; that of this one where all are just there."""
    depth = len(_common(folders))
    return {tuple(folder[depth : depth + 1]) for folder in folders} - {()} or {tuple(_common(folders)[-1:])}


def _folders(paths: Sequence[str]) -> list[list[str]]:
    return [path.split("/")[:-1] for path in paths]


def _common(folders: Sequence[list[str]]) -> list[str]:
    return list(os.path.commonprefix(folders))
