"""Sets of pictures that publications name: where each is had, and whether a folder holds one, whole and unaltered.

What is known of them stands in `named_sets.json`: their number, names and sizes, and of some the digests of their
pixels. These are digests of what decodes, so that a copy that was packed anew without loss, or has another name, is
the same picture. Nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import PurePosixPath

from lic_dist.data import images
from lic_dist.data.photo import PhotoError
from lic_dist.data.source import PhotoSource
from lic_dist.errors import UsageError
from lic_dist.text import counted


@dataclass(frozen=True)
class NamedSet:
    """A set: what it is, where it is had, how many pictures, their file names and (width, height), pixel digests by
    name; what is not known is empty.
    """

    name: str
    about: str
    where: tuple[str, ...]
    count: int
    names: tuple[str, ...]
    sizes: frozenset[tuple[int, int]]
    digests: Mapping[str, str]

    @property
    def known_by(self) -> str:
        """What a check looks at."""
        if self.digests:
            return "digests of pixels"
        known = ["number"] + ["names"] * bool(self.names) + ["sizes"] * bool(self.sizes)
        return f"{', '.join(known)} alone: no digests are known"


@dataclass(frozen=True)
class Check:
    """What is wrong with a folder's pictures against a set; empty where nothing is.

    `missing` are names of the set, `surplus` pictures of the folder, `altered` maps such to why. Of a set without known
    names `beyond` says how many more pictures there are than there should be, below zero how many fewer. `renamed` maps
    pictures of the folder to the set's, which is no fault.
    """

    missing: tuple[str, ...] = ()
    altered: Mapping[str, str] = field(default_factory=dict)
    surplus: tuple[str, ...] = ()
    beyond: int = 0
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def faults(self) -> str:
        """The faults in a few words, "" without any."""
        lacking = len(self.missing) + max(0, -self.beyond)
        more = len(self.surplus) + max(0, self.beyond)
        parts = [(lacking, "missing"), (len(self.altered), "altered"), (more, "surplus")]
        return ", ".join(f"{number} {what}" for number, what in parts if number)


@cache
def named_sets() -> Mapping[str, NamedSet]:
    """Return all sets by name."""
    content = json.loads((resources.files("lic_dist.data") / "named_sets.json").read_text("utf-8"))
    return {
        name: NamedSet(
            name,
            one["about"],
            tuple(one["where"]),
            one["count"],
            tuple(one["names"].format(one["first"] + number) for number in range(one["count"] if one["names"] else 0)),
            frozenset((width, height) for width, height in one["sizes"]),
            one["digests"],
        )
        for name, one in content.items()
    }


def named_set(name: str) -> NamedSet:
    """Return the set of this name, or the only one whose name begins like that.

    Raises:
        UsageError: there is none, or several.
    """
    known = named_sets()
    alike = [name] if name in known else [one for one in known if name and one.startswith(name)]
    if len(alike) != 1:
        raise UsageError(f"no set of pictures '{name}'", hint=f"there are {', '.join(alike or known)}")
    return known[alike[0]]


def check(wanted: NamedSet, source: PhotoSource) -> Check:
    """Compare a source's pictures with a set; files that are no pictures are passed over.

    Raises:
        LicError: there is no such folder, or it holds no pictures.
    """
    names = source.search().names
    return _by_digest(wanted, source, names) if wanted.digests else _by_name(wanted, source, names)


def _by_digest(wanted: NamedSet, source: PhotoSource, names: Sequence[str]) -> Check:
    """Recognise pictures by their pixels; what is of a name of the set, but of other pixels, is altered."""
    of_digest = {digest: name for name, digest in wanted.digests.items()}
    by_stem = {_stem(name): name for name in wanted.names}
    present: set[str] = set()
    altered, surplus, renamed = {}, [], {}
    for name in names:
        named = by_stem.get(_stem(name))
        try:
            known = of_digest.get(images.pixel_digest(images.picture(source, name)))
            fault = "other pixels"
        except PhotoError as error:
            known, fault = None, error.fault
        if known is not None and known not in present:
            present.add(known)
            if known != named:
                renamed[name] = known
        elif known is None and named is not None:
            altered[name] = fault
        else:
            surplus.append(name)
    touched = {by_stem[_stem(name)] for name in altered}
    missing = tuple(name for name in wanted.names if name not in present | touched)
    return Check(missing, altered, tuple(surplus), renamed=renamed)


def _by_name(wanted: NamedSet, source: PhotoSource, names: Sequence[str]) -> Check:
    """Count pictures, and look at their names and sizes as far as these are known."""
    by_stem = {_stem(name): name for name in wanted.names}
    present: dict[str, str] = {}
    altered, surplus = {}, []
    for name in names:
        known = by_stem.get(_stem(name)) if by_stem else name
        if known is None or known in present:
            surplus.append(name)
            continue
        present[known] = name
        try:
            size = images.measure(source.read(name)[0], name)
        except PhotoError as error:
            altered[name] = error.fault
            continue
        if wanted.sizes and size not in wanted.sizes:
            altered[name] = f"{size[0]}x{size[1]} pixels"
    missing = tuple(name for name in wanted.names if name not in present)
    return Check(missing, altered, tuple(surplus), 0 if wanted.names else len(present) - wanted.count)


def _stem(name: str) -> str:
    return PurePosixPath(name).stem.lower()


def described(one: NamedSet) -> str:
    """Return a line on a set."""
    return f"{one.name}: {one.about}; {counted(one.count, 'picture')}, known by {one.known_by}"
