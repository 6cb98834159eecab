r"""The tables of a report in LaTeX with booktabs: each a `tabular` to be \input, and a document that shows all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lic_dist.evaluation.jobs import distinct_file_names
from lic_dist.evaluation.results import write_whole
from lic_dist.reporting.tables import Section, Table, letter

ALL = "all"  # the name of the document
_HEAD = r"""\documentclass{article}
\usepackage[a4paper,landscape,margin=15mm]{geometry}
\usepackage[T1]{fontenc}
\usepackage{booktabs,graphicx}
\setlength{\parindent}{0pt}
\begin{document}
"""
_FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{\input{%s}}"
_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\`{}",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MINUS SIGN}": "$-$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{MIDDLE DOT}": r"$\cdot$",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
} | {sign: f"\\{sign}" for sign in "{}$&#_%"}


def write_latex(parts: Sequence[Section], folder: Path) -> None:
    """Write a file for each table, named after it, and all.tex, which has them with what explains them.

    Raises:
        LicError: the folder cannot be written.
    """
    tables = [(part, table) for part in parts for table in part.tables]
    titles = [table.title or part.title for part, table in tables]
    names = distinct_file_names([ALL, *titles])[1:]
    lines, section = [_HEAD], None
    for (part, table), name in zip(tables, names, strict=True):
        write_whole(folder / f"{name}.tex", tabular(table).encode())
        if part is not section:
            lines += [rf"\section*{{{escaped(part.title)}}}", _prose(part.says), ""]
            section = part
        lines += [rf"\subsection*{{{escaped(table.title)}}}"] if table.title else []
        lines += [_FITTED % name, "", _prose(table.says), "", *(f"{_note(*one)}\n" for one in enumerate(table.notes))]
    write_whole(folder / f"{ALL}.tex", "\n".join([*lines, r"\end{document}", ""]).encode())


def tabular(table: Table) -> str:
    r"""The text of a table's file: names to the left, figures to the right, its notes as comments."""
    columns = "l" * table.names + "r" * (len(table.columns) - table.names)
    rows = [_row([cell.text for cell in row]) for row in table.rows]
    notes = [f"% {_note(*one)}" for one in enumerate(table.notes)]
    begin, end = rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}", r"\end{tabular}"
    return "\n".join([*notes, begin, r"\toprule", _row(table.columns), r"\midrule", *rows, r"\bottomrule", end, ""])


def escaped(text: str) -> str:
    """Text as LaTeX prints it in any fonts: what is not Latin is a question mark."""
    signs = re.sub(r"(?<![\w.)-])-(?=[\d.])", "\N{MINUS SIGN}", text)
    return "".join(_ESCAPES.get(sign, sign if sign < "\u0180" and sign.isprintable() else "?") for sign in signs)


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(_cell, cells)) + r" \\"


def _cell(text: str) -> str:
    lines = [escaped(line) for line in text.split("\n")]
    lines = [f"{{}}{line}" if line[:1] in ("[", "*") else line for line in lines]  # no argument of the \\ before it
    return r"\shortstack[r]{" + r" \\ ".join(lines) + "}" if len(lines) > 1 else lines[0]


def _note(number: int, text: str) -> str:
    return f"{letter(number)}: {escaped(text)}"


def _prose(text: str) -> str:
    """Text of ours, in which backticks mark names."""
    pieces = enumerate(text.split("`"))
    return "".join(rf"\texttt{{{escaped(one)}}}" if number % 2 else escaped(one) for number, one in pieces)
