"""Names of checkpoints. Imports nothing: configurations read it."""

import re
from pathlib import Path

SUFFIX = ".pth.tar"
PACK = ".pack"
_WITH_GAIN = re.compile(r"(.+)@(\d+(?:\.\d+)?)")


def label(checkpoint: str) -> str:
    """The name of a checkpoint: of a path its file, or the folder that holds `checkpoint.pth.tar`; with its `@GAIN`
    and its packs, `base-0.013+screens`.
    """
    base, pack = split_pack(checkpoint)
    if pack:
        return f"{label(base)}+{Path(pack).name.removesuffix(PACK)}"
    file, gain = split_gain(checkpoint)
    path = Path(file)
    name = path.name.removesuffix(SUFFIX)
    name = path.parent.name if name == "checkpoint" and path.parent.name else name
    return with_gain(name, gain)


def split_pack(checkpoint: str) -> tuple[str, str]:
    """Split `CHECKPOINT+FILE.pack` at its last plus sign; "" in the place of the pack where there is none.

    A file or folder whose own name ends like that is not split.
    """
    base, _, pack = checkpoint.rpartition("+")
    return (base, pack) if base and pack.endswith(PACK) and not Path(checkpoint).exists() else (checkpoint, "")


def with_pack(checkpoint: str, pack: str) -> str:
    """Invert `split_pack`."""
    return f"{checkpoint}+{pack}" if pack else checkpoint


def split_gain(checkpoint: str) -> tuple[str, str]:
    """Split `FILE@GAIN` into the name or path of a checkpoint and the gain, "" where there is none.

    A file or folder whose own name ends like that is not split.
    """
    found = _WITH_GAIN.fullmatch(checkpoint)
    return (found[1], found[2]) if found and not Path(checkpoint).exists() else (checkpoint, "")


def with_gain(checkpoint: str, gain: str) -> str:
    """Invert `split_gain`."""
    return f"{checkpoint}@{gain}" if gain else checkpoint
