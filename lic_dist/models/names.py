"""Names of checkpoints. Imports nothing: configurations read it."""

from pathlib import Path

SUFFIX = ".pth.tar"


def label(checkpoint: str) -> str:
    """The name of a checkpoint: of a path its file, or the folder that holds `checkpoint.pth.tar`."""
    path = Path(checkpoint)
    name = path.name.removesuffix(SUFFIX)
    return path.parent.name if name == "checkpoint" and path.parent.name else name
