"""Writes a benchmark's report into its folder: numbers as JSON, tables as Markdown, figures, and one page of it all.

results.json    every number, the tables' too
table.md        the tables as GitHub shows them
<figure>.png    each figure
report.html     all of it on a page that needs no other file, no network and no script
"""

import math
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from peft_psr.evaluation.methods.method import PLAIN, PROMPT
from peft_psr.files import as_json, as_png, read_json, write_whole
from peft_psr.hub.facts import package_versions

from .pages import render_page
from .report import Column, Report, SideBySide, Table


RESULTS, TABLES, PAGE = "results.json", "table.md", "report.html"
RUN = "run.json"
BOLD = f"Bold: the best of its column, {PLAIN!r} left out."
BRACKETS = "In brackets: 95 % confidence intervals, unless it is said otherwise."


def write_report(folder: str | Path, report: Report) -> list[Path]:
    """Write a report's files, the page last, into a run's folder; each is whole or as it was before.

    The page ends with the recipe and the versions that the folder's `run.json` holds.

    Raises:
        OSError: a file can't be written.
        ValueError: a figure's name is no file name, a row lacks a column, or a column's `best` is unknown; nothing is
            written then.
    """
    folder = Path(folder)
    _check(report)
    run = _run_of(folder)
    images = {f"{name}.png": as_png(figure) for name, (figure, _) in report.figures.items()}
    tables = [_cells(table) for table in report.tables]
    files: dict[str, str | bytes] = {
        RESULTS: as_json(_as_data(report, run), allow_nan=False),
        TABLES: _markdown(report, tables),
        **images,
        PAGE: _page(report, tables, run, images),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)
    return [folder / name for name in files]


def _check(report: Report) -> None:
    for name in report.figures:
        if not re.fullmatch(r"[\w+-][\w.+-]*", name):
            raise ValueError(f"figures: {name!r} is no file name; use letters, digits, '_', '-', '+' and '.'.")
    for table in report.tables:
        for column in table.columns:
            if column.best not in ("high", "low", "none"):
                raise ValueError(f"Column {column.name!r}: best={column.best!r}; it must be 'high', 'low' or 'none'.")
        for row, values in table.rows.items():
            if missing := [column.name for column in table.columns if column.name not in values]:
                raise ValueError(f"{table.title}: row {row!r} has no {missing[0]!r}; give a Value(None, why=...).")


def _run_of(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / RUN)
    except FileNotFoundError:
        return {"versions": package_versions()}


# ---------------------------------------------------------------- tables


def _cells(table: Table) -> dict[str, Any]:
    """A table as text; each cell has `text`, `interval`, whether it is `best`, `why` and `note`, its footnote."""
    best = {column.name: _best(table, column) for column in table.columns}
    notes: dict[str, int] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, values in table.rows.items():
        rows[name] = []
        for column in table.columns:
            value = values[column.name]
            cell = {"text": "-", "interval": "", "best": name in best[column.name], "why": value.why, "note": None}
            if value.mean is not None:
                cell["text"] = _number(value.mean, column.digits)
            if value.mean is not None and value.low is not None and value.high is not None:
                cell["interval"] = f"[{_number(value.low, column.digits)}, {_number(value.high, column.digits)}]"
            if value.why:
                cell["note"] = notes.setdefault(value.why, len(notes) + 1)
            rows[name].append(cell)
    cells = [cell for row in rows.values() for cell in row]
    marks = {BOLD: any(cell["best"] for cell in cells), BRACKETS: any(cell["interval"] for cell in cells)}
    legend = " ".join(mark for mark, used in marks.items() if used)
    return {"title": table.title, "columns": table.columns, "rows": rows, "legend": legend, "notes": list(notes)}


def _best(table: Table, column: Column) -> set[str]:
    """Names of the rows that hold a column's best number, as far as its digits tell."""
    sign = {"high": 1, "low": -1, "none": 0}[column.best]
    numbers = {
        row: sign * float(f"{mean:.{column.digits}f}")
        for row, values in table.rows.items()
        if row != PLAIN and (mean := values[column.name].mean) is not None and math.isfinite(mean)
    }
    return {row for row, number in numbers.items() if sign and len(numbers) > 1 and number == max(numbers.values())}


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text  # no "-0.0"


def _markdown(report: Report, tables: list[dict[str, Any]]) -> str:
    lines = [f"# {_md(report.title)}", "", _md(report.description), ""]
    for table in tables:
        columns: tuple[Column, ...] = table["columns"]
        lines += [f"## {_md(table['title'])}", ""]
        lines += ["| | " + " | ".join(_md(column.name) for column in columns) + " |"]
        lines += ["|---|" + "---:|" * len(columns)]
        for name, cells in table["rows"].items():
            lines += ["| " + " | ".join([_md(name), *map(_md_cell, cells)]) + " |"]
        lines += [""]
        lines += [f"- {_md(column.name)}: {_md(column.help)}" for column in columns]
        lines += ["", _md(table["legend"]), ""] if table["legend"] else [""]
        lines += [f"<sup>{number}</sup> {_md(note)}\n" for number, note in enumerate(table["notes"], 1)]
    if report.notes:
        lines += ["## Notes", "", *(f"- {_md(note)}" for note in report.notes), ""]
    return "\n".join(lines).rstrip() + "\n"


def _md_cell(cell: Mapping[str, Any]) -> str:
    text = f"**{cell['text']}**" if cell["best"] else cell["text"]
    note = f"<sup>{cell['note']}</sup>" if cell["note"] else ""
    return f"{text}{note} {cell['interval']}".strip()


def _md(text: str) -> str:
    """Plain text as Markdown of one line that shows just that."""
    return re.sub(r"([\\`*_{}\[\]<>|~#$])", r"\\\1", " ".join(text.split()))


# ---------------------------------------------------------------- JSON


def _as_data(report: Report, run: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "title": report.title,
        "description": report.description,
        "notes": list(report.notes),
        **{name: run[name] for name in ("benchmark", "recipe", "versions") if name in run},
        "tables": [
            {
                "title": table.title,
                "columns": [asdict(column) for column in table.columns],
                "rows": {
                    name: {column.name: _plain(asdict(values[column.name])) for column in table.columns}
                    for name, values in table.rows.items()
                },
            }
            for table in report.tables
        ],
        "results": _plain(report.results),
        "samples": [asdict(sample) for sample in report.samples],
        "figures": {f"{name}.png": caption for name, (_, caption) in report.figures.items()},
    }


def _plain(data: Any) -> Any:
    """Data that strict JSON can hold: infinite numbers and those that are none as the words Python has for them."""
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


# ---------------------------------------------------------------- the page


def _page(report: Report, tables: list[dict[str, Any]], run: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    figures = [
        {
            "name": f"{name}.png",
            "source": "data:image/png;base64," + b64encode(images[f"{name}.png"]).decode("ascii"),
            "caption": caption,
            "alt": in_words(figure),
        }
        for name, (figure, caption) in report.figures.items()
    ]
    recipe = run.get("recipe")
    return render_page(
        "report_page",
        title=report.title,
        report=report,
        tables=tables,
        figures=figures,
        samples=[_side_by_side(sample) for sample in report.samples],
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else "",
        versions=", ".join(f"{package} {number}" for package, number in run.get("versions", {}).items()),
    )


def _side_by_side(sample: SideBySide) -> dict[str, Any]:
    """The plain model's answer and the prompted one's first, as far as they are there."""
    first = [name for name in (PLAIN, PROMPT) if name in sample.answers]
    names = [*first, *(name for name in sample.answers if name not in first)]
    answers = [(name, sample.answers[name], sample.scores.get(name, "")) for name in names]
    return {"trait": sample.trait, "prompt": sample.prompt, "answers": answers}


def in_words(figure: Figure) -> str:
    """What a figure shows, for those who can't see it: titles, axes, names of the lines."""
    parts = ["Figure"]
    if figure.get_suptitle():
        parts.append(figure.get_suptitle())
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        parts += _filled([axes.get_title(loc="left") or axes.get_title()])
        parts += _filled([axes.get_xlabel()], "horizontal: ") + _filled([axes.get_ylabel()], "vertical: ")
        lines = [str(line.get_label()) for line in axes.lines]
        parts += _filled([", ".join(name for name in lines if not name.startswith("_"))], "lines: ")
    return ". ".join(parts) + "."


def _filled(texts: Iterable[str], before: str = "") -> list[str]:
    return [before + text for text in texts if text]
