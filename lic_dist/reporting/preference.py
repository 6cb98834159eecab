"""What viewers preferred: the answers of a study's page, and a score for each curve by the model of Bradley and Terry.

The model: a is chosen over b with probability 1 / (1 + exp(b's score - a's score)). R. A. Bradley and M. E. Terry, Rank
analysis of incomplete block designs, Biometrika 39 (1952); fitted by the iteration of D. R. Hunter, MM algorithms for
generalized Bradley-Terry models, Annals of Statistics 32 (2004). "No difference" is half an answer for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError, model_validator

from lic_dist.errors import LicError
from lic_dist.reporting.pairs import KEY

DRAWS = 1000  # of the bootstrap
PRIOR = 0.5  # of an answer for each pair of curves, even: what was always chosen has a finite score
FEW = 5  # below so many sessions answers are drawn anew, and not sessions


class _Picture(BaseModel):
    curve: str
    image: str
    lmbda: float | None
    bpp: float


class _Trial(BaseModel):
    first: _Picture
    second: _Picture


class _Key(BaseModel):
    study: str
    curves: list[str]
    trials: dict[str, _Trial]

    @model_validator(mode="after")
    def _names_its_curves(self) -> _Key:
        if any(one.curve not in self.curves for trial in self.trials.values() for one in (trial.first, trial.second)):
            raise ValueError("a curve that is not listed")
        return self


class _Answer(BaseModel):
    trial: str
    a: Literal["first", "second"]
    choice: Literal["a", "b", "same"]
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
    key = _key(folder / KEY)
    sessions = {one.session: one for one in (_session(path, key) for path in files)}
    answers = [(number, one) for number, session in enumerate(sessions.values()) for one in session.answers]
    if not answers:
        raise LicError(f"no answers in {', '.join(map(str, files))}")
    names = key.curves
    won = np.zeros((len(answers), len(names), len(names)))  # by answer, who over whom; half for an even one
    for one, (_, answer) in zip(won, answers, strict=True):
        trial = key.trials[answer.trial]
        pair = (trial.first, trial.second) if answer.a == "first" else (trial.second, trial.first)
        a, b = (names.index(picture.curve) for picture in pair)
        one[a, b] = {"a": 1.0, "b": 0.0, "same": 0.5}[answer.choice]
        one[b, a] = 1 - one[a, b]
    by_session = len(sessions) >= FEW
    of = np.array([number for number, _ in answers])
    units = np.stack([won[of == number].sum(axis=0) for number in range(len(sessions))]) if by_session else won
    base = names.index(anchor) if anchor in names else 0
    scores, drawn = scores_of(won.sum(axis=0)[None])[0], scores_of(_drawn(units))
    scores, drawn = scores - scores[base], drawn - drawn[:, [base]]
    chosen = [100 / (1 + np.exp(-one)) for one in (scores, *np.quantile(drawn, [0.025, 0.975], axis=0))]
    counts = (won == 1).sum(axis=(0, 2)), (won == 0.5).sum(axis=(0, 2)), (won == 1).sum(axis=(0, 1))
    rows = []
    for n, name in enumerate(names):
        victories, even, defeats = (int(one[n]) for one in counts)
        middle, low, high = (float(one[n]) for one in chosen)
        rows.append(Preferred(name, victories, even, defeats, float(scores[n]), (middle, low, high)))
    rows.sort(key=lambda row: -row.score)
    return Preference(names[base], tuple(rows), len(sessions), len(answers), by_session)


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


def _key(path: Path) -> _Key:
    text = _text(path, "no study was written here (`report --study`)")
    try:
        return _Key.model_validate_json(text)
    except ValidationError:
        raise LicError(f"{path} is no key of a study") from None


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
