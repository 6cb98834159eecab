"""Read files of tensors (PyTorch's archives, safetensors) without running code that they contain."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lic_dist.errors import LicError

scalar = np.float64(0).__reduce__()[0]  # the function that pickles of numpy numbers call
_NUMBERS = [np.dtype(code) for code in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")]
HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    scalar,
    (scalar, "numpy.core.multiarray.scalar"),  # as numpy 1 names it
    *(type(dtype) for dtype in _NUMBERS),
]
"""What a training script's pickle may name beside tensors: objects of plain data, whose making runs no code."""

UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError)

_SAVE = "save its tensors alone: torch.save(model.state_dict(), path)"
_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to", "fetch it with git lfs pull"),
    (b"<", "a web page or XML", "the download went wrong; fetch the file itself"),
    (b"\x89PNG", "a PNG picture", _SAVE),
    (b"\xff\xd8\xff", "a JPEG picture", _SAVE),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"\x89HDF", "an HDF5 file, as Keras writes them", _SAVE),
)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint file to the CPU; from a pickle only tensors, plain data and `HARMLESS` objects.

    Raises:
        LicError: another kind of file, a damaged one, or one that holds objects whose creation could run code.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise LicError(f"cannot read {path}: {error.strerror or error}") from None
    except UNREADABLE as error:
        raise LicError(*_diagnose(path, str(error))) from None
    if not isinstance(content, dict):
        raise LicError(f"{path} is not a checkpoint: it holds a {type(content).__name__}", hint=_SAVE)
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise LicError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from None


def _diagnose(path: Path, reason: str) -> tuple[str, str]:
    """Return what an unreadable file is, and what to do about it."""
    start = path.read_bytes()[:512]
    if not start:
        return f"{path} is not a checkpoint: it is empty", "copy it again"
    for beginning, kind, hint in _BEGINNINGS:
        if start.lstrip().startswith(beginning):
            return f"{path} is not a checkpoint: it is {kind}", hint
    if "TorchScript" in reason:
        return f"{path} is not a checkpoint: it is a TorchScript archive", _SAVE
    if found := re.search(r"GLOBAL ([\w.]+)|(?:class|callable|function) ([\w.]+)", reason):
        name = found[1] or found[2]
        return f"{path} is not a checkpoint of tensors: it holds {name}, whose loading could run code", _SAVE
    if start.startswith(b"PK") or start.startswith(b"\x80"):
        return f"{path} is not a checkpoint: it is cut, damaged or no archive of PyTorch", "copy it again"
    if b"\0" not in start and start.decode(errors="replace").isprintable() or b"\n" in start and b"\0" not in start:
        return f"{path} is not a checkpoint: it is a text file", _SAVE
    return f"{path} is not a checkpoint: PyTorch cannot read it", _SAVE
