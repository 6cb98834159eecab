"""What pages print: their blocks, the commands that bash makes of these, and whether lic-dist takes them."""

from __future__ import annotations

import re
import subprocess
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer

from lic_dist.app.cli import app

FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- dry: (?P<dry>[^\n]+?) -->\n(?P=indent))?"
    r"```(?P<language>sh|python|yaml)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
# Programs that pages may call; a block that calls another fails in bash.
PROGRAMS = (
    *("lic-dist", "torchrun", "sbatch"),
    *("pip", "python3", "python3.11", "git", "curl", "ruff", "mypy", "pytest", "mkdocs"),
)


@dataclass(frozen=True)
class Block:
    """A fenced block; `dry` says why it is not run, empty: it is."""

    language: str
    text: str
    dry: str


def blocks(page: Path) -> list[Block]:
    """The sh, python and yaml blocks of a page, in order."""
    found = FENCE.finditer(page.read_text())
    return [Block(one["language"], textwrap.dedent(one["text"]), one["dry"] or "") for one in found]


def make_stubs(folder: Path) -> None:
    """Put a stub of each program into folder/.venv/bin that notes how it was called, in folder/.calls."""
    bin = folder / ".venv" / "bin"
    bin.mkdir(parents=True)
    (bin / "activate").write_text("")
    for name in PROGRAMS:
        stub = bin / name
        stub.write_text(f"#!/bin/bash\nprintf '%s\\0' $(($# + 1)) {name} \"$@\" >> '{folder}/.calls'\n")
        stub.chmod(0o755)


def calls(block: str, folder: Path) -> list[list[str]]:
    """The commands of a block as bash takes it apart in this folder, loops and quotes and all; nothing is run."""
    (folder / ".calls").write_bytes(b"")
    bash = ["/bin/bash", "-euo", "pipefail", "-c", block]
    done = subprocess.run(
        bash, cwd=folder, env={"PATH": str(folder / ".venv" / "bin")}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{block}\n{done.stderr}"
    words = (folder / ".calls").read_text().split("\0")[:-1]
    found = []
    while words:
        count = int(words[0])
        found.append(words[1 : 1 + count])
        words = words[1 + count :]
    return found


@cache
def lic_dist() -> Any:
    """The command `lic-dist`, which takes a moment to make."""
    return typer.main.get_command(app)


def parse_command(words: list[str]) -> str:
    """Parse what follows `lic-dist` as the app would, without running it; the name of the command it resolves to."""
    command: Any = lic_dist()
    names = ["lic-dist"]
    while hasattr(command, "commands") and (words or not command.invoke_without_command):
        name, command, words = command.resolve_command(command.context_class(command), words)
        names.append(str(name))
    command.make_context(names[-1], list(words))
    return " ".join(names[1:])
