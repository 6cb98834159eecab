"""BPG, which is HEVC's still pictures, by its author's programs bpgenc and bpgdec (https://bellard.org/bpg)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PROGRAMS = ("bpgenc", "bpgdec")
LONGEST = 600  # seconds


def present() -> bool:
    """Return whether both programs are found on the PATH."""
    return all(map(which, PROGRAMS))


def library() -> str:
    """Return the encoder's version, as its help says it."""
    said = subprocess.run([PROGRAMS[0], "-h"], capture_output=True, text=True, check=False, timeout=LONGEST)
    found = re.search(r"version\s+(\S+)", said.stdout + said.stderr)
    return f"bpgenc {found[1] if found else 'of unknown version'}"


def encode(image: NDArray[np.uint8], options: Sequence[str]) -> bytes:
    """Return the file of a picture, uint8 [H, W, 3]. Raises OSError with what the program says where it fails."""
    with TemporaryDirectory() as folder:
        picture, file = Path(folder, "picture.png"), Path(folder, "picture.bpg")
        Image.fromarray(image).save(picture, compress_level=1)
        _run(PROGRAMS[0], *options, "-o", str(file), str(picture))
        return file.read_bytes()


def decode(data: bytes) -> NDArray[np.uint8]:
    """Return the picture of a file, uint8 [H, W, 3]. Raises OSError with what the program says where it fails."""
    with TemporaryDirectory() as folder:
        picture, file = Path(folder, "picture.png"), Path(folder, "picture.bpg")
        file.write_bytes(data)
        _run(PROGRAMS[1], "-o", str(picture), str(file))
        with Image.open(picture, formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} took longer than {LONGEST} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise OSError(f"{command[0]}: {said[-1] if said else f'exit code {done.returncode}'}")
