"""Daily work by name: `nox -s quick`, in the present environment (`pip install -e '.[test,dev]'`)."""

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "quick"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format and types."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def quick(session: nox.Session) -> None:
    """The tests that take seconds, of every room; more arguments go to pytest."""
    session.run("pytest", "-n", "2", "-q", "-m", "not slow", *session.posargs)


@nox.session
def full(session: nox.Session) -> None:
    """All tests, with the lines that none of them reaches."""
    session.run("pytest", "-n", "2", "--cov", *session.posargs)


@nox.session
def nightly(session: nox.Session) -> None:
    """What takes hours: the life of a store, storms, and the commands of the longest benchmarks."""
    night = ("pytest", "--hypothesis-profile", "nightly")
    session.run(*night, "tests/building/test_life.py", *session.posargs)
    session.run(*night, "-m", "nightly", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, strictly, into site/."""
    session.run("mkdocs", "build", "--strict")


@nox.session
def bench(session: nox.Session) -> None:
    """The search beside its baselines, in half a minute."""
    session.run("lic-dist", "bench", "quantization", "--part", "speed", *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Faults put into copies of the kernels and the store, each of which some test has to notice."""
    session.run("python", "-m", "tests.mutants", *session.posargs)
