"""Let a store grow, and name its snapshots: declare an instalment, write its shards, finish it.

    upgrade, at the first append -> declare -> write_shard for every shard that `pending` lists -> finish

No object of data and no marker of an earlier instalment is touched. Who is killed in between leaves a valid store:

    zarr.json                                format 2, a chain of one instalment: what the store was built of
    _chain/<digest16>.parquet, .mask.json    manifest and mask of the instalment, named after their own digests
    _chain/<number>.json                     the claim, put once: whose instalment is the next
    _chain/root.json, zarr.json              the root with the instalment, incomplete; readers pass it over
    <array>/zarr.json                        longer; the rows beyond the root's count for nobody
    shards and their markers                 as in a build
    _chain/root.json, zarr.json              the instalment is complete: the newest snapshot from now on

A claim that the root does not know yet is taken up by `adopt`. Names of snapshots are objects of their own, put once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from lic_dist.cache import chain, layout, store
from lic_dist.cache.chain import FOLDER, Instalment
from lic_dist.cache.layout import Header
from lic_dist.cache.markers import size_and_digest
from lic_dist.cache.storage import Storage
from lic_dist.errors import LicError, UsageError
from lic_dist.text import counted

ROOT_COPY = f"{FOLDER}/root.json"  # of a store that has grown: its chain cannot be made anew from a plan
_INSTALMENT = TypeAdapter(Instalment)


@dataclass(frozen=True)
class Photos:
    """Photos of an instalment: their manifest as bytes with its digest, and the samples that were planned of them."""

    manifest: bytes
    manifest_sha256: str
    num_samples: int
    num_held_out: int
    source_bytes: int


def upgrade(storage: Storage, first: Photos) -> None:
    """Make a store of format 1 one of format 2, which knows the photos that it was built of; nothing else changes."""
    storage.put(chain.manifest_key(first.manifest_sha256), first.manifest)
    _rewrite_chain(storage, lambda known: (replace(known[0], manifest_sha256=first.manifest_sha256), *known[1:]))


def declare(storage: Storage, photos: Photos, masked: NDArray[np.int64]) -> Header:
    """Declare the next instalment of a store of format 2: photos, the numbers of the samples it masks, or both; return
    the store's header.

    Call `adopt` before: what a killed append has left comes first.

    Raises:
        LicError: another instalment is unfinished.
    """
    if photos.num_samples:
        storage.put(chain.manifest_key(photos.manifest_sha256), photos.manifest)
    mask = chain.mask_document(masked)
    mask_sha256 = size_and_digest(mask)["sha256"] if len(masked) else ""
    if mask_sha256:
        storage.put(chain.mask_key(mask_sha256), mask)
    header = layout.read_header(storage)
    if not header.chain[-1].complete:
        raise LicError(unfinished(storage, header.chain), hint="`lic-dist cache append` goes on with it")
    wanted = Instalment(
        first_shard=header.num_shards,
        num_samples=photos.num_samples,
        num_held_out=photos.num_held_out,
        source_bytes=photos.source_bytes,
        manifest_sha256=photos.manifest_sha256,
        num_masked=len(masked),
        mask_sha256=mask_sha256,
        digest=chain.next_digest(header.digest, photos.manifest_sha256, mask_sha256),
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        complete=False,
    )
    number = len(header.chain)
    storage.put_new(_claim_key(number), json.dumps(asdict(wanted), indent=1).encode())
    claimed = _claimed(storage, number)
    if claimed is None or claimed.content != wanted.content:
        known = (*header.chain, claimed) if claimed else header.chain
        raise LicError(unfinished(storage, known), hint="`lic-dist cache append` goes on with it")
    return adopt(storage)


def adopt(storage: Storage) -> Header:
    """Complete what a killed `declare` has left, if there is something: root and arrays; return the store's header."""
    header = layout.read_header(storage)
    claimed = _claimed(storage, len(header.chain)) if header.chain[-1].complete else None
    if claimed is not None:
        _rewrite_chain(storage, lambda known: (*known, claimed) if len(known) == len(header.chain) else known)
        header = layout.read_header(storage)
    if not header.chain[-1].complete:
        store.put_documents(storage, layout.arrays_of(header), header)
    return header


def finish(storage: Storage) -> Header:
    """Mark the last instalment as complete, and return the store's header.

    Raises:
        LicError: not all of its latents are written.
    """
    header = layout.read_header(storage)
    if header.chain[-1].complete:
        return header
    if left := store.pending(storage, since=header.chain[-1].first_shard):
        raise LicError(f"{storage} has {counted(len(left), 'unfinished shard')}", hint="`lic-dist cache append` again")
    number = header.snapshot
    _rewrite_chain(
        storage,
        lambda known: tuple(replace(one, complete=True) if at == number else one for at, one in enumerate(known)),
    )
    return layout.read_header(storage)


def unfinished(storage: Storage, known: tuple[Instalment, ...]) -> str:
    """Return the line that says which append is unfinished."""
    last = known[-1]
    what = f"{counted(last.num_samples, 'sample')}, {last.num_masked} masked, begun {last.time}"
    return f"append {len(known) - 1} of {storage} is unfinished ({what})"


def restore_root(storage: Storage) -> None:
    """Put back the root of a store that has grown, where it is lost or torn, from its copy."""
    if layout.read_attributes(storage) is None and storage.get_json(ROOT_COPY) is not None:
        storage.put("zarr.json", storage.get(ROOT_COPY))


def _rewrite_chain(storage: Storage, change: Callable[[tuple[Instalment, ...]], tuple[Instalment, ...]]) -> None:
    """Put the root with another chain, first its copy; a bucket has no locks: there one process at a time grows it."""
    with storage.lock("zarr.json.lock"):
        header, attributes = layout.read_header(storage), layout.read_attributes(storage) or {"format": None}
        known = change(header.chain)
        if known != header.chain or attributes["format"] != layout.GROWN:
            listed = [asdict(one) for one in known]
            document = layout.group_document({**attributes, "format": layout.GROWN, "chain": listed})
            storage.put(ROOT_COPY, document)
            storage.put("zarr.json", document)


def _claim_key(number: int) -> str:
    return f"{FOLDER}/{number}.json"


def _claimed(storage: Storage, number: int) -> Instalment | None:
    try:
        return _INSTALMENT.validate_json(storage.get(_claim_key(number)), strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError:
        raise LicError(f"{storage}/{_claim_key(number)} is torn", hint="remove it, then append again") from None


def header_at(storage: Storage, snapshot: int | str | None = None) -> Header:
    """Return the header of a snapshot by its number or name; None: the newest that is complete.

    Raises:
        LicError: no store, or no such snapshot.
    """
    newest = layout.read_header(storage).complete
    if snapshot is None:
        return newest
    names = snapshot_names(storage)
    number = int(snapshot) if str(snapshot).isdigit() else names.get(str(snapshot), -1)
    if not 0 <= number <= newest.snapshot:
        named = "".join(f", {name}" for name in names)
        raise LicError(f"{storage} has no snapshot {snapshot}", hint=f"it has 0 to {newest.snapshot}{named}")
    return newest.at(number)


def name_snapshot(storage: Storage, name: str, snapshot: int | str | None = None) -> int:
    """Name a snapshot (by default the newest that is complete) and return its number. A name stays for ever.

    Raises:
        UsageError: not a name.
        LicError: no such snapshot, or another one has this name.
    """
    if not store.GROUP_NAME.fullmatch(name) or name.isdigit():
        raise UsageError(f"'{name}' cannot name a snapshot", hint="letters, digits, and . _ @ - after the first")
    header = header_at(storage, snapshot)
    document = json.dumps({"snapshot": header.snapshot, "digest": header.digest}, indent=1).encode()
    storage.put_new(f"{chain.NAMES}/{name}", document)
    found = snapshot_names(storage).get(name)
    if found != header.snapshot:
        raise LicError(f"snapshot {found} of {storage} is '{name}' already", hint="give another name")
    return header.snapshot


def snapshot_names(storage: Storage) -> dict[str, int]:
    """Return the names of snapshots, sorted, each with its number; those of another store's chain are left out."""
    header, found = layout.read_header(storage), {}
    for name in storage.names(chain.NAMES):
        said = storage.get_json(f"{chain.NAMES}/{name}")
        number = said.get("snapshot") if isinstance(said, dict) else None
        if isinstance(number, int) and 0 <= number <= header.snapshot and header.at(number).digest == said["digest"]:
            found[name] = number
    return found
