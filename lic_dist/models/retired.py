"""Models that were shipped once and are not now: what became of one that a store or a file names by its digest."""

from __future__ import annotations

# The first digits of the sha256 of an encoder, which stores name, and the model ids of bitstreams.
RETIRED = {
    "base-0.0035": ("a0b418f21e263053", "b1ee162e"),
    "base-0.0067": ("f992b1a06c17bc48", "46c3aaac"),
    "base-0.013": ("4546a8781ed85d63", "ff25ab5b"),
    "base-0.025": ("0cc15793bb05f2c0", "275dc0d9"),
}


def retired(digest: str) -> str:
    """Return the name of the model of lic_dist 0.1.0 of which this is the encoder's sha256 or the model id, in
    hexadecimal digits; "" for any other.
    """
    return next((name for name, known in RETIRED.items() if digest[:16] in known), "")


def remedy(name: str) -> str:
    """Return what a user of a retired model can do, for the hint of an error."""
    return f"another model is shipped as {name} since; the old one is zoo/{name}.pth.tar of lic_dist 0.1.0"
