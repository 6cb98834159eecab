"""Errors that a user sees: one line, and a hint."""

from __future__ import annotations


class LicError(Exception):
    """A failure with one clear line and, where there is one, a hint at the remedy. Exit code 1."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(LicError):
    """Wrong usage or a wrong configuration. Exit code 2."""

    exit_code = 2


class ToleranceError(LicError):
    """The work is done, but more samples were set aside than `images.tolerate` allows. Exit code 3."""

    exit_code = 3


class SharedError(LicError):
    """An error that every rank of a training job raises alike; the first rank prints it. Exit code 1."""


class Stopped(SharedError):
    """A training job was told to leave, and did with a state on disk; it goes on when it is started again. The exit
    code is that of SIGTERM.
    """

    exit_code = 143


class LostRank(LicError):
    """Another rank of a training job died; the job resumes when it is started again. Exit code 1."""
