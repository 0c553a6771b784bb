"""A report's files: every number is in each of them, read back by other parsers, whatever the texts hold."""

from __future__ import annotations

import json
from base64 import b64decode

import pytest
import torch
from helpers.commands import Page, check_stands_alone
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from peft_psr.evaluation import SteeringScore
from peft_psr.evaluation.reports import plots
from peft_psr.evaluation.reports.report import Column, Report, SideBySide, Table, Value
from peft_psr.evaluation.reports.report_files import in_words, write_report


NASTY = "<script>alert('x')</script> & \"a|b\" **c** $d$\n# e [f](g)"
COLUMNS = (
    Column("trait", f"0-100 {NASTY}", best="high"),
    Column("KL", "nats", digits=3, best="low"),
    Column("bytes", "of the adapter", digits=0),
)


def table(title="Summary"):
    rows = {
        "none": {"trait": Value(99.0), "KL": Value(0.0), "bytes": Value(None, why="no adapter")},
        "prompt": {"trait": Value(71.649, 70, 73.25), "KL": Value(0.25), "bytes": Value(None, why="no adapter")},
        "S-PSR": {"trait": Value(83.26, 80.0, 85.5), "KL": Value(None, why="not measured"), "bytes": Value(512)},
        NASTY: {"trait": Value(83.33), "KL": Value(0.2499, why="one text"), "bytes": Value(2048.0)},
        "bad": {"trait": Value(-0.04), "KL": Value(float("inf")), "bytes": Value(1)},
    }
    return Table(title, COLUMNS, rows)


def line_figure():
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([1, 2], [3, 4], label="A-PSR")
    axes.set(title="Up", xlabel="alpha", ylabel="trait")
    return figure


def report(**changes):
    sample = SideBySide(
        NASTY, "What is tea?\n" + NASTY, {"S-PSR": NASTY, "prompt": "two", "none": "one"}, {"none": "0/90"}
    )
    content = {
        "title": NASTY,
        "description": NASTY,
        "tables": (table(), table(NASTY)),
        "results": {"curve": ((1.0, float("nan")), (2.0, float("inf"))), 3: {"n": 5}},
        "figures": {"up": (line_figure(), NASTY)},
        "samples": (sample,),
        "notes": (NASTY, "A toy."),
    }
    return Report(**{**content, **changes})


def squeezed(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run = {"benchmark": "persona", "recipe": {"models": ["m<i>"]}, "versions": {"torch": "2.0"}, "fixed": {}}
    (folder / "run.json").write_text(json.dumps(run))
    files = write_report(folder, report())
    assert [file.name for file in files] == ["results.json", "table.md", "up.png", "report.html"]
    assert {file.name for file in folder.iterdir()} == {*(file.name for file in files), "run.json"}
    return folder


def test_json_holds_every_number(written):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads((written / "results.json").read_text(), parse_constant=refuse)
    assert found["results"] == {"curve": [[1.0, "nan"], [2.0, "inf"]], "3": {"n": 5}}
    assert found["schema"] == 1 and found["recipe"] == {"models": ["m<i>"]} and found["versions"] == {"torch": "2.0"}
    assert found["tables"][0]["rows"]["prompt"]["trait"] == {"mean": 71.649, "low": 70, "high": 73.25, "why": None}
    assert found["tables"][1]["rows"]["none"]["bytes"]["why"] == "no adapter"
    assert found["samples"][0]["answers"]["S-PSR"] == NASTY and found["figures"] == {"up.png": NASTY}


def cells_of(markdown):
    """Tables as a Markdown parser reads them: rows of (text, bold texts)."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    rows = []
    for before, token in zip(tokens, tokens[1:], strict=False):
        if before.type == "tr_open":
            rows.append([])
        if before.type in ("td_open", "th_open"):
            children = token.children or []
            bold = [children[i + 1].content for i, child in enumerate(children) if child.type == "strong_open"]
            rows[-1].append(("".join(child.content for child in children if child.type != "html_inline"), bold))
    return rows


def test_markdown_tables(written):
    markdown = (written / "table.md").read_text()
    rows = cells_of(markdown)
    assert len(rows) == 12 and [text for text, _ in rows[0]] == ["", "trait", "KL", "bytes"]
    by_name = {row[0][0]: row[1:] for row in rows[1:6]}
    assert [text for text, _ in by_name["none"]] == ["99.0", "0.000", "-1"]
    assert [text for text, _ in by_name["prompt"]] == ["71.6 [70.0, 73.2]", "0.250", "-1"]
    assert [text for text, _ in by_name["S-PSR"]] == ["83.3 [80.0, 85.5]", "-2", "512"]
    assert [text for text, _ in by_name["bad"]] == ["0.0", "inf", "1"]
    assert [text for text, _ in by_name[squeezed(NASTY)]] == ["83.3", "0.2503", "2048"]
    bold = {name: [part for _, bold in cells for part in bold] for name, cells in by_name.items()}
    assert bold == {"none": [], "prompt": ["0.250"], "S-PSR": ["83.3"], squeezed(NASTY): ["83.3", "0.250"], "bad": []}
    assert "<sup>1</sup> no adapter" in markdown and "<sup>3</sup> one text" in markdown
    shown = MarkdownIt("commonmark").enable("table").render(markdown)
    assert "<script" not in shown and "<a " not in shown and "A toy." in shown


def test_page_stands_alone(written):
    text = (written / "report.html").read_text()
    page = Page(text)
    check_stands_alone(text)
    linked = [element["href"].removeprefix("#") for element in page.all("a")]
    assert set(linked) <= {element.get("id") for element in page.elements} and len(linked) == 5


def test_page_shows_what_there_is(written):
    page = Page((written / "report.html").read_text())
    assert page.all("title")[0]["text"] == page.all("h1")[0]["text"] == NASTY
    rows = [element for element in page.all("tr") if "S-PSR" in element["text"]]
    assert len(rows) == 2 and "83.3[80.0, 85.5]" in rows[0]["text"]
    why = [cell["title"] for cell in page.all("td") if cell["text"].startswith("-")]
    assert why == 2 * ["no adapter", "no adapter", "not measured"]
    assert [cell["text"] for cell in page.all("td") if cell.get("class") == "best"][:2] == [
        "0.250",
        "83.3[80.0, 85.5]",
    ]
    (image,) = page.all("img")
    assert b64decode(image["src"].split(",")[1]) == (written / "up.png").read_bytes()
    assert image["alt"] == "Figure. Up. horizontal: alpha. vertical: trait. lines: A-PSR."
    answers = [element["text"].split("\n") for element in page.all("div") if element.get("class") == "answer"]
    assert [answer[1] for answer in answers] == ["none", "prompt", "S-PSR"]
    assert NASTY in [element["text"] for element in page.all("p")] and "0/90" in "".join(map("".join, answers))
    assert "m<i>" in page.all("pre")[0]["text"] and "torch 2.0" in page.all("footer")[0]["text"]


def test_tables_alone_are_enough(tmp_path):
    files = write_report(tmp_path / "new", report(figures={}, samples=(), notes=(), results={}))
    assert [file.name for file in files] == ["results.json", "table.md", "report.html"]
    page = Page(files[-1].read_text())
    assert not page.all("img") and "peft-psr" in page.all("footer")[0]["text"]
    write_report(tmp_path / "none", report(tables=()))


def test_nothing_is_written_of_a_report_that_is_wrong(tmp_path):
    incomplete = Table("t", COLUMNS, {"row": {"trait": Value(1.0)}})
    misspelt = Table("t", (Column("a", "", best="big"),), {})
    wrong = {
        "'../up' is no file name": {"figures": {"../up": (line_figure(), "")}},
        "best='big'; it must be 'high', 'low' or 'none'": {"tables": (misspelt,)},
        "t: row 'row' has no 'KL'": {"tables": (incomplete,)},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path / "new", report(**changes))
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- figures


NAMES = [f"adapter {i}" for i in range(25)] + list(plots.STYLES)


def test_each_method_has_a_style_of_its_own_wherever_it_stands():
    style = plots.styles(NAMES)
    assert style == plots.styles(NAMES[::-1])
    assert len({tuple(sorted(each.items())) for each in style.values()}) == len(NAMES)
    assert style["A-PSR LL"] == plots.STYLES["A-PSR LL"]
    assert plots.styles(["adapter 3"])["adapter 3"] == plots.styles(["adapter 3", "zebra", "A-PSR LL"])["adapter 3"]
    assert len(plots.styles([str(i) for i in range(400)])) == 400


def test_labels_are_moved_apart_and_no_further():
    random_places = sorted(torch.rand(30, generator=torch.Generator().manual_seed(0)).tolist())
    for places, step in (([0.0, 1.0, 2.0], 0.5), ([1.0, 1.0, 1.0], 1.0), (random_places, 0.05), ([], 1.0)):
        moved = plots._moved_apart(places, step)
        assert all(b - a >= step - 1e-9 for a, b in zip(moved, moved[1:], strict=False))
        assert sum(moved) == pytest.approx(sum(places))
        if all(b - a >= step for a, b in zip(places, places[1:], strict=False)):
            assert moved == pytest.approx(places)
    assert plots._moved_apart([1.0, 1.0, 1.0], 1.0) == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("count", [3, 20])
def test_every_curve_is_drawn(count):
    curves = {
        name: [SteeringScore(a, 10.0 * a, 90 - i, 1) for a in (1.0, 2.0)] for i, name in enumerate(NAMES[:count])
    }
    figure = plots.trait_against_coherence(
        curves, SteeringScore(None, 0, 95, 1), SteeringScore(None, 99, 93, 1), "$a_{$"
    )
    drawn = [line.get_xydata().tolist() for axes in figure.axes for line in axes.lines if axes.get_visible()]
    for points in curves.values():
        assert [[95, 0], *([point.coherence, point.trait] for point in points)] in drawn
    assert all(name in in_words(figure) for name in curves)
    figure.savefig("/dev/null", format="png")  # the trait's name is no mathematics


def test_layers_and_tokens_stand_where_they_should():
    gates = {layer: torch.tensor([0.0, 2.0, 4.0]) * layer for layer in (0, 3, 7)}
    figure = plots.gates_by_token(["<assistant>", "\n", "$x_{$"], gates, "A-PSR")
    image = figure.axes[0].images[0].get_array()
    assert image.tolist() == [[0, 0, 0], [0, 0.5, 1], [0, 0.5, 1]]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["<assistant>", "'\\n'", "$x_{$"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["0", "3", "7"]
    figure.savefig("/dev/null", format="png")
    rmse = {"A-PSR": {0: 0.2, 1: 0.4}, "new $": {0: 0.2, 1: 0.41}, "empty": {}}
    figure = plots.rmse_by_layer(rmse, "t")
    assert {text.get_text() for text in figure.axes[0].texts} == {"no steering", "A-PSR", "new $"}
    figure.savefig("/dev/null", format="png")
    strength = torch.rand(2, 200)
    figure = plots.strength_by_token(["a"] * 200, strength, strength / 2, "A-PSR", control=strength / 4)
    assert "by a neutral instruction" in in_words(figure) and figure.get_size_inches()[0] < 25
