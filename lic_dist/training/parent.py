"""What a retraining starts from: a parent, caches of it, and the groups that it is retrained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lic_dist import config
from lic_dist.building.job import check_cache
from lic_dist.building.pilot import check_record, record_location
from lic_dist.cache.mixture import Mixture
from lic_dist.errors import LicError
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.quantization.record import QuantizerRecord

Records = Mapping[str, QuantizerRecord]  # of each group, by the name under which the result carries it


@dataclass(frozen=True)
class Group:
    """A group of the cache and its record. `section` says how the quantizer is calibrated, and names the group under
    which the result carries it.
    """

    name: str
    record: QuantizerRecord
    section: config.Quantizer


@dataclass(frozen=True)
class Source:
    """What retraining starts from: a model, and groups of its cache, or of several as one."""

    parent: Checkpoint
    cache: Mixture
    groups: tuple[Group, ...]

    @property
    def records(self) -> Records:
        return {one.section.group: one.record for one in self.groups}

    @property
    def identity(self) -> dict[str, Any]:
        """What weights depend on in the stores and their groups."""
        headers = [one.header for one in self.cache.stores]
        found: dict[str, Any] = {"cache": headers[0].digest}
        if len(headers) > 1:
            weighted = zip(self.cache.weights, headers, strict=True)
            found = {"cache": [f"{weight:.15g} of {header.digest[:16]}" for weight, header in weighted]}
        elif headers[0].snapshot:
            found["snapshot"] = headers[0].snapshot
        if len(self.groups) > 1:
            return {**found, "groups": {one.name: one.record.digest for one in self.groups}}
        return {**found, "group": self.groups[0].name, "record": self.groups[0].record.digest}

    def check(self) -> None:
        """Refuse a store of another encoder, and a group of another quantizer or entropy model, or that not all stores
        have alike. Raises LicError, which names the store, and each differing field.
        """
        first = self.cache.stores[0].storage
        for one in self.groups:
            for store in self.cache.stores:
                where = f"{store.storage}/quantized/{one.name}"
                check_cache(store, self.parent, one.name)
                record = QuantizerRecord.from_json(store.record_json(one.name))
                check_record(record, one.section, self.parent, where)
                if record.digest != one.record.digest:
                    around, key = record_location(store.storage, one.name)
                    raise LicError(
                        f"{where} is another quantizer than that of {first}",
                        hint=f"build it with that record: copy {first}/quantized/{one.name}/record.json to "
                        f"{around}/{key} before `lic-dist cache build`",
                    )
