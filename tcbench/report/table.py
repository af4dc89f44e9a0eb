"""A table and its four faces: CSV for programs, Markdown, LaTeX and HTML for people."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from tcbench.errors import UserError
from tcbench.record.files import sha256, write_text
from tcbench.record.records import RENDERED

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "λ": r"$\lambda$",
    "−": "$-$",
    "–": "--",
    "—": "---",
}


def _latex(text: str) -> str:
    """Escape for LaTeX; `code` in backticks becomes typewriter."""
    escaped = "".join(_LATEX.get(character, character) for character in text)
    return re.sub(r"`(.+?)`", r"\\texttt{\1}", escaped)


def _html(text: str) -> Markup:
    """Escape for HTML; `code` in backticks becomes <code>."""
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", str(escape(text))))


def template(name: str) -> Template:
    """A template from the package's assets; values are escaped by default where the output is HTML."""
    environment = Environment(
        loader=PackageLoader("tcbench", "assets/report"),
        autoescape=name.endswith("html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"latex": _latex, "code": _html}
    return environment.get_template(name)


@dataclass(frozen=True)
class Table:
    """One table of a report.

    Attributes:
        title: one line; names the suite. `Backticks` mark code.
        caption: what a reader needs to read a cell: units, intervals, protocol.
        tidy: one record per row, numbers as numbers, missing as NaN; this is the CSV.
        formatted: the same rows as text, one column per printed column, first column first in sight.
        groups: a heading per row of `formatted`; equal neighbours form one group. Empty: no groups.
        text_columns: columns of `formatted` that hold words; all others are aligned as numbers.
        preface: paragraphs to read before the table.
    """

    title: str
    caption: str
    tidy: pd.DataFrame
    formatted: pd.DataFrame
    groups: list[str] = field(default_factory=list)
    text_columns: tuple[str, ...] = ()
    preface: list[str] = field(default_factory=list)

    @property
    def alignment(self) -> str:
        """One of l, r per column of `formatted`."""
        return "".join("l" if column in self.text_columns else "r" for column in self.formatted.columns)

    def css_class(self, column: str) -> str:
        """The HTML class of a column: words, the paper's numbers, or ours."""
        return "text" if column in self.text_columns else "paper" if column.startswith("paper ") else "ours"

    def row_groups(self) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
        """Yield (heading, rows of cell texts) for each run of equal headings."""
        headings = self.groups or [""] * len(self.formatted)
        rows = self.formatted.itertuples(index=False, name=None)
        for heading, pairs in groupby(zip(headings, rows, strict=True), key=lambda pair: pair[0]):
            yield heading, [cells for _, cells in pairs]

    def markdown(self) -> str:
        """Title, table and caption as GitHub-flavoured Markdown."""
        body = self.formatted.map(lambda cell: cell.replace("|", r"\|")).to_markdown(
            index=False,
            disable_numparse=True,
            colalign=["left" if a == "l" else "right" for a in self.alignment],
        )
        return "\n\n".join([f"## {self.title}", *self.preface, body, self.caption]) + "\n"

    def latex(self) -> str:
        """A `table*` with booktabs rules, a \\midrule between groups."""
        return template("table.tex.j2").render(table=self)

    def html(self) -> str:
        """A self-contained page."""
        return template("table.html.j2").render(table=self, zip=zip)

    def write(self, folder: Path, name: str, suite: str | None = None) -> None:
        """Write `folder/name.{csv,md,tex,html}`, and their digests to `folder/name.json`, with the suite they are of.

        The same table always gives the same bytes.
        """
        faces = {
            "csv": self.tidy.to_csv(index=False, lineterminator="\n"),
            "md": self.markdown(),
            "tex": self.latex(),
            "html": self.html(),
        }
        for suffix, text in faces.items():
            write_text(Path(folder) / f"{name}.{suffix}", text)
        files = {f"{name}.{suffix}": hashlib.sha256(text.encode()).hexdigest() for suffix, text in faces.items()}
        of = {"suite": suite} if suite else {}
        RENDERED.write(Path(folder) / f"{name}.json", {"title": self.title, **of, "files": files})


def check_face(path: Path, suite: str | None = None) -> None:
    """Compare a table's file with the digest in the record beside it, and that with the suite that it should be of.

    Raises:
        UserError: they differ, or there is no record.
    """
    record = path.with_suffix(".json")
    if RENDERED.read(record, suite=suite)["files"].get(path.name) != sha256(path):
        raise UserError(f"{path}: truncated or changed: it is not the file that {record.name} lists; render it again")
