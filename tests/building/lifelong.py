"""The whole life of a store as a machine of Hypothesis: whatever is killed, damaged or repaired when, against a model.

The real jobs run (`building.build`) in memory (jobs_in_memory.py), so that a step takes milliseconds. What a store must
hold is computed from the photos alone, by the rule of the plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lic_dist.building import build as building
from lic_dist.cache import chain, growth, layout, markers, store
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import Finding, verify
from lic_dist.data.manifest import Manifest
from lic_dist.data.photo import Crop
from lic_dist.errors import LicError
from tests.building.instalments import Part, Rows, part_of
from tests.building.jobs_in_memory import (
    GROUPS,
    PHOTOS,
    SHARD,
    URL,
    digest_of,
    encoded,
    experiment,
    in_memory,
    pixels_of,
    searched,
)
from tests.memory import WORLD, Killed, Memory

LONG = "a folder of a name so long that its paths take a block more/" * 2
PATHS = [*(f"p{n}.png" for n in range(8)), *(f"{LONG}p{n}.png" for n in range(2))]
WHERE = ("data", "marker", "document", "group", "chain", "root")


def shard_of(key: str) -> int:
    return int(key.split("/c/")[1].split("/")[0])


def names(finding: Finding, key: str) -> bool:
    """Whether a finding is on the damage to this object, or on what a killed repair of it leaves: a shard to write."""
    if "/c/" in key:
        unmarked = finding.what == "missing" and finding.array.startswith(markers.FOLDER)
        return finding.shard == shard_of(key) and (
            finding.array == key.split("/c/")[0] or (unmarked and finding.group == (layout.group_of(key) or ""))
        )
    if key.startswith(markers.FOLDER):
        folder, _, shard = key.removesuffix(".json").rpartition("/")
        of_array = not finding.array.startswith(markers.FOLDER)  # whose checksum it holds
        return finding.shard == int(shard) and (of_array or finding.array == folder)
    return (finding.shard, finding.array) == (-1, key)


kills = st.one_of(st.none(), st.none(), st.integers(0, 45))
groups = st.sampled_from(sorted(GROUPS))


class Life(RuleBasedStateMachine):
    """A store, the folder of its photos, and what the store must be.

    `chain` are the instalments that are complete, `begun` one that may have been declared and is not. `whole` counts
    the shards that each group has for certain. `dirty` are the objects that were damaged, with what they held. After a
    rebuild that was killed while it removed, the store is a `wreck`: nothing is asked of it but no wrong values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patched = in_memory()
        self.patched.__enter__()
        self.contents = 0
        self.forget()

    def forget(self) -> None:
        self.chain: list[Part] = []
        self.begun: Part | None = None
        self.whole: dict[str, int] = {}
        self.names: dict[str, int] = {}
        self.digests: list[str] = []
        self.dirty: dict[str, bytes] = {}
        self.unread: set[int] = set()  # rows whose photo was away when their shard may have been written
        self.wreck = False
        self.calm = True  # nothing was killed since the last job that was not

    def teardown(self) -> None:
        self.patched.__exit__(None, None, None)

    @initialize(seed=st.integers(0, 2**32 - 1), photos=st.integers(1, 5))
    def start(self, seed: int, photos: int) -> None:
        WORLD.reset(seed)
        store._stored_document.cache_clear()
        PHOTOS.there.clear()
        for number in range(photos):
            self.put(PATHS[number])

    # The folder

    def put(self, path: str) -> None:
        self.contents += 1
        PHOTOS.there[path] = self.contents

    @rule(path=st.sampled_from(PATHS))
    def add_or_change_a_photo(self, path: str) -> None:
        self.put(path)

    @rule(data=st.data(), to=st.sampled_from(PATHS), copy=st.booleans())
    @precondition(lambda self: PHOTOS.there)
    def move_or_copy_a_photo(self, data: st.DataObject, to: str, copy: bool) -> None:
        path = data.draw(st.sampled_from(sorted(PHOTOS.there)))
        PHOTOS.there[to] = PHOTOS.there[path] if copy else PHOTOS.there.pop(path)

    @rule(data=st.data())
    @precondition(lambda self: PHOTOS.there)
    def remove_a_photo(self, data: st.DataObject) -> None:
        del PHOTOS.there[data.draw(st.sampled_from(sorted(PHOTOS.there)))]

    # Jobs

    def run(
        self,
        job: Callable[[], Any],
        kill: int | None,
        expected: Sequence[Part] = (),
        group: str = "",
        damaged: Iterable[int] = (),
    ) -> str:
        """Run a job that is to complete these instalments, or to write damaged shards again, and see what it has left;
        "" where it was not stopped.
        """
        away = self.away(damaged)
        WORLD.left = kill
        try:
            job()
            stopped = ""
        except Killed:
            stopped = "killed"
            store._stored_document.cache_clear()  # of a process that is gone
        except LicError as error:
            assert "\n" not in error.message
            stopped = error.message
        finally:
            WORLD.left = None
        self.unread |= away
        if not stopped and not self.wreck:
            self.chain += expected
            if self.begun in expected:
                self.begun = None
            self.calm = True
        elif not self.wreck:
            self.calm = self.calm and stopped != "killed" and not self.dirty
            self.take_what_is_left(expected)
        if group and not self.wreck and layout.read_group(Memory(URL), group) is not None:
            self.whole.setdefault(group, 0)
        if self.dirty and not self.wreck:
            self.look_at_the_damage()
        return stopped

    def away(self, damaged: Iterable[int]) -> set[int]:
        """The rows of unwritten and damaged shards whose photo is nowhere in the folder."""
        try:
            pending = {*store.pending(URL), *damaged}
        except LicError:
            pending = {*range(self.rows.shards)}
        there, rows = {digest_of(content) for content in PHOTOS.there.values()}, self.known
        return {row for shard in pending for row in rows.of(shard) if rows.crops[row].digest not in there}

    @property
    def rows(self) -> Rows:
        return Rows(self.chain)

    @property
    def unmarked(self) -> set[int]:
        """Shards that a killed repair may have left to write."""
        return {shard_of(key) for key in self.dirty if "/c/" in key and not self.calm}

    @property
    def known(self) -> Rows:
        return Rows([*self.chain, *([self.begun] if self.begun else [])])

    def take_what_is_left(self, expected: Sequence[Part]) -> None:
        """After a job that stopped: take which of the instalments were declared, and which are complete."""
        storage = Memory(URL)
        if layout.read_attributes(storage) is None:
            return
        header = layout.read_header(storage)
        declared = len(header.chain) + (storage.entry(f"{chain.FOLDER}/{len(header.chain)}.json") is not None)
        found = [*self.chain, *expected][:declared]
        if self.begun and self.begun not in expected:
            found = [*self.chain, self.begun, *expected][:declared]
        assert len(found) == declared
        if len(header.chain) == 1 == declared and (not self.chain or declared == 1):
            complete = len(self.chain)  # what is built first has no mark of its own
        else:
            complete = declared if declared == len(header.chain) and header.chain[-1].complete else declared - 1
        assert complete >= len(self.chain)
        self.chain, self.begun = found[:complete], found[complete] if complete < declared else None

    def changes(self, mask: bool) -> tuple[Manifest, tuple[int, ...]]:
        """The photos that an append takes up, and the rows that it masks."""
        live, photos = self.known.live, PHOTOS.manifest()
        had = {crop.digest for crop in live.values()}
        there = {photo.digest for photo in photos}
        added = Manifest.of([photo for photo in photos if photo.digest not in had])
        return added, tuple(row for row, crop in live.items() if crop.digest not in there)

    @rule(group=groups, append=st.booleans(), mask=st.booleans(), kill=kills)
    def build(self, group: str, append: bool, mask: bool, kill: int | None) -> None:
        expected, refused = self.expectation(append, mask)
        stopped = self.run(
            lambda: building.build(experiment(group), append=append, mask=append and mask), kill, expected, group
        )
        if self.wreck:
            return self.salvage()
        if stopped == "killed":
            return
        if self.dirty and stopped:
            return
        assert bool(stopped) == refused or refused is None, (stopped, refused)
        if not stopped:
            self.made(group)

    def expectation(self, append: bool, mask: bool) -> tuple[list[Part], bool | None]:
        """The instalments that a build completes, and whether it is refused (None: either)."""
        if not PHOTOS.there:
            return [], True
        if not self.chain:
            fresh = part_of(PHOTOS.manifest())
            if self.begun is None or self.begun.photos == fresh.photos:
                return [self.begun or fresh], False
            return [self.begun], None  # where it is wholly written it is like any other
        begun = [self.begun] if self.begun else []
        added, gone = self.changes(mask)
        if not append:
            return begun, bool(len(added) or gone)
        if len(added) or (mask and gone):
            return [*begun, part_of(added, gone if mask else ())], False
        return begun, False

    def made(self, group: str) -> None:
        """A job has made a group, and of a store that has grown those of the same model."""
        self.whole[group] = self.rows.shards
        for other in self.whole:
            if f"quantized/{other}/zarr.json" in self.dirty:
                continue  # it follows once that is there again
            if len(self.chain) > 1 and GROUPS[other][0] == GROUPS[group][0]:
                self.whole[other] = self.rows.shards

    @rule(group=groups, kill=kills)
    def requantize(self, group: str, kill: int | None) -> None:
        stopped = self.run(lambda: building.requantize(experiment(group)), kill, (), group)
        if stopped == "killed" or self.wreck or (self.dirty and stopped):
            return
        if self.chain:
            assert not stopped, stopped
            self.whole[group] = max(self.whole.get(group, 0), self.rows.shards)

    @rule(group=groups, kill=kills)
    def rebuild(self, group: str, kill: int | None) -> None:
        cleared, before = WORLD.cleared, self.wreck
        fresh = part_of(PHOTOS.manifest())
        had = layout.read_attributes(Memory(URL)) is not None
        self.wreck = True
        stopped = self.run(lambda: building.build(experiment(group), rebuild=True), kill)
        self.wreck = before
        if not stopped:
            names = {} if WORLD.cleared > cleared else self.names  # a store that had lost its root is completed
            self.forget()
            self.names = {name: number for name, number in growth.snapshot_names(Memory(URL)).items() if name in names}
            self.chain = [fresh]
            self.made(group)
        elif WORLD.cleared > cleared:
            self.forget()
            self.wreck = bool(Memory(URL).names())
            self.salvage()
        elif not had and not self.dirty and not before:
            self.calm = self.calm and stopped != "killed"
            self.take_what_is_left([fresh])
            assert stopped == "killed" or not PHOTOS.there
        else:
            assert stopped == "killed" or self.dirty or not PHOTOS.there or before, stopped

    def salvage(self) -> None:
        """A wreck of which nothing is left is no store."""
        if not Memory(URL).names():
            self.forget()

    # Damage

    @rule(data=st.data(), where=st.sampled_from(WHERE), how=st.sampled_from(["remove", "cut", "empty", "zero", "flip"]))
    @precondition(lambda self: self.chain and not self.begun and not self.dirty and not self.wreck and self.calm)
    def damage(self, data: st.DataObject, where: str, how: str) -> None:
        keys = self.keys(where)
        if not keys or (where == "root" and how == "flip"):  # one that parses has no checksum of its own
            return
        some = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3 if where == "data" else 1, unique=True))
        for key in some:
            if where == "data" and any(
                (shard_of(key), layout.group_of(key)) == (shard_of(one), layout.group_of(one)) for one in self.dirty
            ):
                continue
            held = WORLD.objects[f"{URL}/{key}"]
            self.dirty[key] = held
            spoilt = {"cut": held[:-5], "empty": b"", "zero": bytes(len(held))}
            flipped = bytearray(held)
            flipped[len(held) // 2] ^= 1
            if how == "remove":
                del WORLD.objects[f"{URL}/{key}"]
            else:
                WORLD.objects[f"{URL}/{key}"] = spoilt.get(how, bytes(flipped))
        store._stored_document.cache_clear()
        if where != "root":
            self.look_at_the_damage(exactly=True)

    def keys(self, where: str) -> list[str]:
        every = list(Memory(URL).listing())
        documents = [key for key in every if key.endswith("zarr.json") and key != "zarr.json"]
        if where == "chain" and len(self.chain) == 1:
            return []
        grown = [chain.manifest_key(one.manifest_sha256) for one in layout.read_header(Memory(URL)).chain]
        return {
            "data": [key for key in every if "/c/" in key],
            "marker": [key for key in every if key.startswith(markers.FOLDER)],
            "document": [key for key in documents if key.count("/") != 2 or not key.startswith("quantized/")],
            "group": [key for key in documents if key.count("/") == 2 and key.startswith("quantized/")],
            "chain": [key for key in every if key in grown or key.endswith(".mask.json")],
            "root": ["zarr.json"],
        }[where]

    def findings(self) -> list[Finding] | None:
        try:
            return verify(URL)
        except LicError:
            assert "zarr.json" in self.dirty or not self.chain or self.wreck
            return None

    def look_at_the_damage(self, exactly: bool = False) -> None:
        """What is still damaged is what `verify` names, and nothing else is damaged."""
        findings = self.findings()
        if findings is None:
            return
        still = {key for key in self.dirty if any(names(one, key) for one in findings)}
        if exactly:  # but for a bit that changes no meaning, as some of a manifest do (data/test_manifest.py)
            assert {*self.dirty} - still <= {key for key in self.dirty if key.endswith((".json", ".parquet"))}, findings
        self.dirty = {key: held for key, held in self.dirty.items() if key in still}
        lost = {layout.group_of(key) for key in self.dirty}
        for one in findings if not self.wreck else ():
            ours = any(names(one, key) for key in self.dirty)
            assert ours or self.may_miss(one) or one.group in lost, one

    def may_miss(self, one: Finding) -> bool:
        """Whether a finding is of a group that has not followed, of what a job that stopped has left undone, or of
        latents that were written again without a photo that is gone.
        """
        if one.group and one.array.startswith(markers.FOLDER) and self.written_again(one.shard):
            return True  # it was made of other latents, or a job was killed that makes it of these
        if one.what != "missing":
            return False
        if one.group:
            return one.shard >= self.whole.get(one.group, 0) or (
                one.shard < 0 and (not self.calm or one.group not in self.whole)
            )
        return (not self.calm or self.begun is not None) and one.shard not in range(self.rows.shards)

    def written_again(self, shard: int) -> bool:
        """Whether the latents of a shard may have been written anew without a photo, so that groups do not fit them."""
        return bool(self.unread & {*range(shard * SHARD, shard * SHARD + SHARD)})

    @rule()
    @precondition(lambda self: not self.wreck)
    def verify_all(self) -> None:
        if (findings := self.findings()) is not None and not self.dirty:
            for one in findings:
                assert self.may_miss(one), one

    @rule(group=groups, kill=kills)
    @precondition(lambda self: self.chain and not self.wreck)
    def repair(self, group: str, kill: int | None) -> None:
        if (findings := self.findings()) is None:
            return
        dirty = bool(self.dirty)
        damaged = [one.shard for one in findings if not one.group and one.shard in range(self.known.shards)]
        stopped = self.run(lambda: building.repair(experiment(group), findings), kill, damaged=damaged)
        if not stopped and dirty:
            assert all(chain.FOLDER in key for key in self.dirty), self.dirty.keys()

    @rule()
    @precondition(lambda self: self.dirty and not self.wreck)
    def put_back(self) -> None:
        for key, held in self.dirty.items():
            if key != "zarr.json" or layout.read_attributes(Memory(URL)) is None:
                WORLD.objects[f"{URL}/{key}"] = held
        findings = self.findings() or []
        self.dirty = {key: held for key, held in self.dirty.items() if any(names(one, key) for one in findings)}
        for one in findings:  # an old marker is not that of latents that a killed repair wrote without a photo
            ours = any(names(one, key) for key in self.dirty)
            assert not ours or one.what == "missing" or self.written_again(one.shard), findings

    # Snapshots and readers

    @rule(name=st.sampled_from(["one", "two"]), data=st.data(), kill=kills)
    @precondition(lambda self: self.chain and self.readable)
    def name_a_snapshot(self, name: str, data: st.DataObject, kill: int | None) -> None:
        number = data.draw(st.integers(0, len(self.chain) - 1))
        taken = self.names.get(name, number) != number
        WORLD.left = kill
        try:
            growth.name_snapshot(Memory(URL), name, number)
        except Killed:
            pass
        except LicError:
            assert taken
        else:
            assert not taken
        WORLD.left = None
        found = growth.snapshot_names(Memory(URL))
        assert found in (self.names, {**self.names, name: number} if not taken else self.names)
        self.names = found

    @property
    def readable(self) -> bool:
        return not self.wreck and "zarr.json" not in self.dirty

    @rule(data=st.data())
    @precondition(lambda self: self.chain and self.readable)
    def read(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.chain) - 1))
        called = data.draw(st.sampled_from([number, *(name for name, of in self.names.items() if of == number)]))
        cache = LatentCache.open(URL, snapshot=called)
        rows = Rows(self.chain[: number + 1])
        with self.errors_of_damage():
            assert cache.masked.tolist() == sorted(rows.masked)
        assert (cache.num_samples, cache.num_shards) == (len(rows.crops), rows.shards)
        with self.errors_of_damage():
            samples = cache.samples
            for row in range(len(cache)):
                status, crop = samples["status"][row], rows.crops.get(row)
                if crop is None or status == layout.UNWRITTEN:
                    assert status == layout.UNWRITTEN and (crop is None or row // SHARD in self.unmarked), row
                    continue
                told = Crop(
                    *(samples[name][row] for name in ("source", "digest", "crop_y", "crop_x", "flip", "held_out"))
                )
                assert told == crop
                assert (status == 254) == (row in rows.masked)
                assert status in (0, 254) or row in self.unread, (row, status)
        shard = data.draw(st.integers(0, rows.shards - 1))
        self.compare(cache, rows, shard, None)
        for group in data.draw(st.permutations(sorted(self.whole)))[:1]:
            self.compare(cache, rows, shard, group)

    @contextlib.contextmanager
    def errors_of_damage(self, allowed: bool = False) -> Iterator[None]:
        try:
            yield
        except LicError:
            if not (self.dirty or allowed):
                raise

    def compare(self, cache: LatentCache, rows: Rows, shard: int, group: str | None) -> None:
        """What a shard reads as is what its photos make, or nothing."""
        names = ["pixels", "latents/y", "latents/z", "samples/status"]
        if group:
            names = ["samples/status", *(f"quantized/{group}/{name}" for name in ("k", "bits", "distortion"))]
        allowed = bool(group) and (shard >= self.whole.get(group or "", 0) or self.written_again(shard))
        with self.errors_of_damage(allowed):
            found = cache.shard(shard, names)
            numbers = rows.of(shard)
            for at, row in enumerate(numbers):
                good = found["samples/status"][at] == 0
                assert good or row in self.unread
                pixels = pixels_of(rows.crops[row])[None] * good
                y, z = encoded(pixels)
                made = {"pixels": pixels, "latents/y": y, "latents/z": z}
                if group:
                    made = {f"quantized/{group}/{name}": one for name, one in searched(y, GROUPS[group][1]).items()}
                for name, values in made.items():
                    assert np.array_equal(found[name][at], values[0]), (name, row)

    @invariant()
    def snapshots_stay(self) -> None:
        if not self.chain or not self.readable:
            return
        header = layout.read_header(Memory(URL))
        assert header.complete.snapshot + 1 == len(self.chain)
        digests = [one.digest for one in header.complete.chain]
        assert digests[: len(self.digests)] == self.digests
        self.digests = digests

    @invariant()
    def an_object_of_data_has_one_content_for_ever(self) -> None:
        for key, contents in WORLD.written.items():
            shard = shard_of(key)
            assert len(contents) == 1 or self.wreck or self.written_again(shard), key
