"""A folder for files that can be made again, where no other can be written: a read-only machine, a user without a
home.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def own_folder(name: str) -> Path | None:
    """Return a folder of this user's own among the temporary files, the same in every process; None without one.

    Its files are trusted, so a folder of that name which another user made or can write to is not used.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"lic-dist-{name}-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if own else None


def can_write(folder: Path) -> bool:
    """Return whether this user can write to a folder, or create it; False for a relative path, such as nobody's "~"."""
    there = next(one for one in (folder, *folder.parents) if one.exists())
    return folder.is_absolute() and os.access(there, os.W_OK | os.X_OK)
