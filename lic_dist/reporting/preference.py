"""What viewers preferred: the answers of a study's page, and a score for each curve by the model of Bradley and Terry.

The model: a is chosen over b with probability 1 / (1 + exp(b's score - a's score)). R. A. Bradley and M. E. Terry, Rank
analysis of incomplete block designs, Biometrika 39 (1952); fitted by the iteration of D. R. Hunter, MM algorithms for
generalized Bradley-Terry models, Annals of Statistics 32 (2004). "No difference" is half an answer for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from lic_dist.errors import LicError
from lic_dist.reporting.pairs import KEY

DRAWS = 1000  # of the bootstrap
PRIOR = 0.5  # of an answer for each pair of curves, even: what was always chosen has a finite score
FEW = 5  # below so many sessions answers are drawn anew, and not sessions
Side = Literal["first", "second"]


class _Picture(BaseModel):
    curve: str
    image: str
    lmbda: float | None
    bpp: float


class _Key(BaseModel):
    study: str
    curves: Annotated[list[str], Field(min_length=2)]
    trials: dict[str, dict[Side, _Picture]]


class _Answer(BaseModel):
    trial: str
    left: Side
    choice: Literal["left", "right", "same"]
    seconds: float


class _Session(BaseModel):
    study: str
    session: str
    answers: list[_Answer]


@dataclass(frozen=True)
class Preferred:
    """A curve: how often it was chosen, found even and not chosen, its score against the anchor's, which is zero.

    `chosen` is the percentage of answers in which the model has it chosen over the anchor, with its 95 % interval.
    """

    curve: str
    won: int
    even: int
    lost: int
    score: float
    chosen: tuple[float, float, float]


@dataclass(frozen=True)
class Preference:
    """Scores by falling score; of how many sessions and answers, and whether sessions were drawn for the intervals."""

    anchor: str
    rows: tuple[Preferred, ...]
    sessions: int
    answers: int
    by_session: bool


def preference(files: Sequence[Path], folder: Path, anchor: str) -> Preference:
    """Read answers of the study that was written into `folder`, and score its curves.

    A session that lies in several files counts once. The anchor is the curve of that name, or the study's first.

    Raises:
        LicError: a file that is none of answers to this study, or no key of a study in the folder.
    """
    try:
        key = _Key.model_validate_json(_text(folder / KEY, "no study was written here (`report --study`)"))
    except ValidationError:
        raise LicError(f"{folder / KEY} is no key of a study") from None
    sessions = {one.session: one for one in (_session(path, key) for path in files)}
    names = key.curves
    won = np.zeros((len(sessions), len(names), len(names)))  # by session, who over whom; half for an even one
    counts = np.zeros((3, len(names)), int)
    flat: list[tuple[int, int, float]] = []
    for number, one in enumerate(sessions.values()):
        for answer in one.answers:
            pictures = key.trials[answer.trial]
            left = pictures[answer.left]
            right = pictures["second" if answer.left == "first" else "first"]
            a, b = names.index(left.curve), names.index(right.curve)
            part = {"left": 1.0, "right": 0.0, "same": 0.5}[answer.choice]
            won[number, a, b] += part
            won[number, b, a] += 1 - part
            flat.append((a, b, part))
            for who, mine in ((a, part), (b, 1 - part)):
                counts[{1.0: 0, 0.5: 1, 0.0: 2}[mine], who] += 1
    if not flat:
        raise LicError(f"no answers in {', '.join(map(str, files))}")
    by_session = len(sessions) >= FEW
    drawn = _drawn(won if by_session else _of_answers(flat, len(names)))
    base = names.index(anchor) if anchor in names else 0
    scores, spread = scores_of(won.sum(axis=0)[None])[0], scores_of(drawn)
    scores, spread = scores - scores[base], spread - spread[:, [base]]
    chosen = [100 / (1 + np.exp(-one)) for one in (scores, *np.quantile(spread, [0.025, 0.975], axis=0))]
    rows = [
        Preferred(name, *map(int, counts[:, n]), float(scores[n]), (chosen[0][n], chosen[1][n], chosen[2][n]))
        for n, name in enumerate(names)
    ]
    rows.sort(key=lambda row: -row.score)
    return Preference(names[base], tuple(rows), len(sessions), len(flat), by_session)


def scores_of(won: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores [studies, curves] of answers [studies, curves, curves]: how often each row was chosen over each column."""
    curves = won.shape[-1]
    won = won + PRIOR / 2 * (1 - np.eye(curves))
    both, wins = won + won.swapaxes(1, 2), won.sum(axis=2)
    strength = np.ones(won.shape[:2])
    for _ in range(10_000):
        new = wins / (both / (strength[:, :, None] + strength[:, None, :])).sum(axis=2)
        new /= np.exp(np.log(new).mean(axis=1, keepdims=True))
        if np.abs(np.log(new / strength)).max() < 1e-9:
            break
        strength = new
    return np.asarray(np.log(new))


def _drawn(won: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of as many units [units, curves, curves] as there are, drawn anew: [DRAWS, curves, curves]."""
    drawn = np.random.default_rng(0).multinomial(len(won), np.full(len(won), 1 / len(won)), DRAWS)
    return np.asarray(np.tensordot(drawn.astype(np.float64), won, 1))


def _of_answers(flat: Sequence[tuple[int, int, float]], curves: int) -> NDArray[np.float64]:
    won = np.zeros((len(flat), curves, curves))
    for number, (a, b, part) in enumerate(flat):
        won[number, a, b], won[number, b, a] = part, 1 - part
    return won


def _session(path: Path, key: _Key) -> _Session:
    text = _text(path, "no such file")
    try:
        found = _Session.model_validate_json(text)
    except ValidationError:
        raise LicError(f"{path} is no file of a study's answers") from None
    if found.study != key.study or any(one.trial not in key.trials for one in found.answers):
        raise LicError(f"{path} has answers to another study", hint=f"this one is {key.study}, by {KEY}")
    return found


def _text(path: Path, else_: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        raise LicError(f"cannot read {path}: {else_}") from None
