"""Writes the tables of `docs/layouts.md` from a test run and the tests' docstrings; that page has the commands."""

from __future__ import annotations

import ast
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from peft_psr.files import write_whole


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "layouts.md"
CHECKS = {
    "test_edit_equals_the_reference": "edit = reference",
    "test_generation_with_cache_equals_without": "cached = uncached",
    "test_saved_and_reloaded_bit_for_bit": "save, reload",
    "test_unload_restores_bit_for_bit": "unload",
    "test_gradient_reaches_every_unit_and_nothing_else": "gradients",
}
TABLES = {"modes": ("test_modes", "test_modes_training", "test_compile", "test_beside_lora"), "hooks": ("test_hooks",)}

Outcomes = dict[tuple[str, str], dict[str, str]]
"""(test file, test) -> {parameters: "passes", "fails" or "skipped"}."""


def read_outcomes(path: Path) -> Outcomes:
    """The outcome of every test in a JUnit report, in the report's order."""
    outcomes: Outcomes = defaultdict(dict)
    for case in ElementTree.parse(path).iter("testcase"):
        name, _, parameters = case.attrib["name"].partition("[")
        kinds = {child.tag for child in case}
        outcome = "fails" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passes"
        outcomes[case.attrib["classname"].rpartition(".")[2], name][parameters.removesuffix("]")] = outcome
    return outcomes


def summary(outcomes: Iterable[str]) -> str:
    """One cell for the outcomes of a test's runs: "passes", or what became of how many."""
    found = list(outcomes)
    kinds = sorted(set(found))
    return kinds[0] if len(kinds) == 1 else ", ".join(f"{found.count(kind)} {kind}" for kind in kinds)


def layouts_table(outcomes: Outcomes) -> str:
    """Layouts by checks; a dash where a check has no meaning."""
    runs = {check: outcomes["test_layouts", check] for check in CHECKS}
    layouts = runs["test_edit_equals_the_reference"]
    lines = ["| layout | " + " | ".join(CHECKS.values()) + " |", "|---" * (len(CHECKS) + 1) + "|"]
    for layout in layouts:
        cells = [runs[check].get(layout, "–") for check in CHECKS]
        lines.append(f"| {layout} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tests_table(outcomes: Outcomes, modules: Iterable[str]) -> str:
    """Each test's docstring, name and outcome."""
    lines = ["| what is seen | test | outcome |", "|---|---|---|"]
    for module in modules:
        tree = ast.parse((ROOT / "tests" / "adapter" / f"{module}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                runs = outcomes[module, node.name]
                count = f" ({len(runs)} runs)" if len(runs) > 1 else ""
                text = (ast.get_docstring(node) or "").replace("|", "\\|")
                lines.append(f"| {text} | `{node.name}`{count} | {summary(runs.values())} |")
    return "\n".join(lines)


def replace_table(text: str, name: str, table: str) -> str:
    """`text` with what stands between the comments `<!-- name -->` and `<!-- end -->` replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{DOCS.name} has no place for a table: `<!-- {name} -->` ... `<!-- end -->`.")
    return pattern.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text)


def main(report: Path) -> None:
    """Rewrite the documentation's tables; the file is replaced whole."""
    outcomes = read_outcomes(report)
    text = replace_table(DOCS.read_text(), "layouts", layouts_table(outcomes))
    for name, modules in TABLES.items():
        text = replace_table(text, name, tests_table(outcomes, modules))
    write_whole(DOCS, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
