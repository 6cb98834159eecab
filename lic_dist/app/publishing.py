"""What goes to a repository on Hugging Face: checkpoints, quantizers' records and cards.

Photos and latents do not, nor what names machines and paths: a store's provenance, a job's snapshot.json.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lic_dist.errors import LicError, UsageError
from lic_dist.models.names import SUFFIX

Kind = Literal["model", "dataset"]
CARD = "README.md"  # what a repository shows
CHECKPOINT, LOG = f"checkpoint{SUFFIX}", "log.jsonl"


def files_of(paths: Sequence[str]) -> dict[str, Path]:
    """Return the files that PATH or PATH=NAME stand for, by their names in the repository.

    A file goes by its own name; of a folder of a training go checkpoint and log, of a store its records, of both the
    card that lies there, below the folder's name, or below NAME, which may be `.`.

    Raises:
        UsageError: no such file, a folder with nothing of these, or two files of one name.
    """
    found: dict[str, Path] = {}
    for text in paths:
        given, _, name = text.partition("=") if not Path(text).exists() else (text, "", "")
        path = Path(given)
        chosen = {"": path} if path.is_file() else {str(one.relative_to(path)): one for one in _inside(path)}
        if not chosen:
            raise UsageError(
                f"nothing to push in {path}" if path.exists() else f"there is no {path}",
                hint=f"a file, a folder with {CHECKPOINT}, or a store; PATH=NAME names it",
            )
        for inner, file in chosen.items():
            target = os.path.normpath(os.path.join(name or path.name, inner)).replace(os.sep, "/")
            if target.startswith(("../", "/")) or target in (".", ".."):
                raise UsageError(
                    f"{text}: {target} is no name in a repository", hint="PATH=NAME, such as card.md=README.md"
                )
            if target in found:
                raise UsageError(f"{found[target]} and {file} would both be {target}", hint="PATH=NAME names one")
            found[target] = file
    return found


def _inside(folder: Path) -> Iterable[Path]:
    records = sorted(folder.glob("quantized/*/record.json"))
    names = [CARD] if records else [CHECKPOINT, LOG, CARD] if (folder / CHECKPOINT).is_file() else []
    yield from (*records, *(folder / name for name in names if (folder / name).is_file()))


def push(repository: str, files: Mapping[str, Path], kind: Kind, private: bool, message: str) -> str:
    """Make the repository where there is none, and put the files there in one commit; return its address.

    The token is that of HF_TOKEN, or of `hf auth login`; HF_ENDPOINT names another server.

    Raises:
        UsageError: huggingface_hub is not installed, or there is no token.
        LicError: the server refuses, or does not answer.
    """
    try:
        import huggingface_hub as hub
    except ModuleNotFoundError:
        raise UsageError("push needs huggingface_hub", hint="pip install huggingface_hub") from None
    if hub.get_token() is None:
        raise UsageError(
            "no token for Hugging Face", hint="export HF_TOKEN=..., one that may write; --dry-run needs none"
        )
    api: Any = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="lic_dist")
    try:
        api.create_repo(repository, repo_type=kind, private=private or None, exist_ok=True)
        operations = [hub.CommitOperationAdd(name, str(path)) for name, path in files.items()]
        done = api.create_commit(repository, operations, commit_message=message, repo_type=kind)
    except Exception as error:  # of its HTTP client, whichever that is
        line = " ".join(str(error).split())[:300]
        raise LicError(
            f"{repository} is not written: {type(error).__name__}: {line}", hint="may the token write there?"
        ) from error
    return str(done.commit_url)
