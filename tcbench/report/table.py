"""A table and its four faces: CSV for programs, Markdown, LaTeX and HTML for people."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from tabulate import tabulate

from tcbench.errors import UserError
from tcbench.record.files import PROVENANCE, sha256, write_text
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


@cache
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
        lead: columns of `formatted` that decide first; a page shows them and the rest on demand. Empty: all.
    """

    title: str
    caption: str
    tidy: pd.DataFrame
    formatted: pd.DataFrame
    groups: list[str] = field(default_factory=list)
    text_columns: tuple[str, ...] = ()
    preface: list[str] = field(default_factory=list)
    lead: tuple[str, ...] = ()

    @property
    def in_order(self) -> tuple[str, ...]:
        """All columns, those of `lead` first."""
        return (*self.lead, *(column for column in self.formatted.columns if column not in self.lead))

    def lead_text(self) -> str:
        """Title and leading columns for a terminal."""
        columns = list(self.lead or self.formatted.columns)
        lines = [self.title.replace("`", "")]
        for heading, rows in self.row_groups(columns):
            right = ["left" if column in self.text_columns else "right" for column in columns]
            body = tabulate(rows, headers=columns, tablefmt="simple", colalign=right, disable_numparse=True)
            lines += ["", heading, body] if heading else ["", body]
        return "\n".join(lines) + "\n"

    @property
    def alignment(self) -> str:
        """One of l, r per column of `formatted`."""
        return "".join("l" if column in self.text_columns else "r" for column in self.formatted.columns)

    def css_class(self, column: str) -> str:
        """The HTML classes of a column: words, the paper's numbers, or ours; and whether it is shown on demand."""
        kind = "text" if column in self.text_columns else "paper" if column.startswith("paper ") else "ours"
        return kind if not self.lead or column in self.lead else f"{kind} rest"

    @property
    def csv_uri(self) -> str:
        """`tidy` as an address that a page can offer to save."""
        text = self.tidy.to_csv(index=False, lineterminator="\n")
        return f"data:text/csv;base64,{base64.b64encode(text.encode()).decode()}"

    def row_groups(self, columns: Sequence[str] | None = None) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
        """Yield (heading, rows of cell texts) for each run of equal headings; of some columns, or of all."""
        headings = self.groups or [""] * len(self.formatted)
        shown = self.formatted if columns is None else self.formatted[list(columns)]
        rows = shown.itertuples(index=False, name=None)
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

    @property
    def records(self) -> list[dict[str, Any]]:
        """`tidy` as JSON has it, missing numbers as None."""
        return json.loads(self.tidy.to_json(orient="records"))  # type: ignore[no-any-return]

    def write(self, folder: Path, name: str, suite: str | None = None, overwrite: bool = True) -> None:
        """Write `folder/name.{csv,md,tex,html}`, and their digests to `folder/name.json`, with the suite they are of.

        The same table always gives the same bytes.

        Args:
            overwrite: also where another table is published.

        Raises:
            UserError: another one is, and may not be overwritten.
        """
        faces = {
            "csv": self.tidy.to_csv(index=False, lineterminator="\n"),
            "md": self.markdown(),
            "tex": self.latex(),
            "html": self.html(),
        }
        for suffix, text in faces.items():
            path = Path(folder) / f"{name}.{suffix}"
            if not overwrite and is_published(path) and path.read_text(encoding="utf-8") != text:
                raise UserError(
                    f"{path}: published, and rendered differently now; copy the folder, or give --overwrite"
                )
        for suffix, text in faces.items():
            write_text(Path(folder) / f"{name}.{suffix}", text)
        files = {f"{name}.{suffix}": hashlib.sha256(text.encode()).hexdigest() for suffix, text in faces.items()}
        of = {"suite": suite} if suite else {}
        RENDERED.write(Path(folder) / f"{name}.json", {"title": self.title, **of, "files": files})


def is_published(path: Path) -> bool:
    """Whether a rendered file is there and among published results: its suite's folder, or one beside it, has their
    provenance."""
    parents = (path.parent.parent, *(beside.parent for beside in path.parent.glob(f"*/{PROVENANCE}")))
    return path.exists() and any((folder / PROVENANCE).exists() for folder in parents)


def check_face(path: Path, suite: str | None = None) -> None:
    """Compare a table's file with the digest in the record beside it, and that with the suite that it should be of.

    Raises:
        UserError: they differ, or there is no record.
    """
    record = path.with_suffix(".json")
    if RENDERED.read(record, suite=suite)["files"].get(path.name) != sha256(path):
        raise UserError(f"{path}: truncated or changed: it is not the file that {record.name} lists; render it again")
