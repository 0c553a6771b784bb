"""Prints the results of `psr demo --trait all --output FOLDER` as Markdown: python scripts/tabulate_demo.py FOLDER."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


COLUMNS = {
    "TA@C80": "ta_c80",
    "TA@Cp": "ta_cp",
    "prompt recovery": "prompt_recovery",
}


def cell(value: float | None, digits: int) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def main(folder: Path) -> None:
    """One table a quantity: methods by traits."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))]
    methods = [row["method"] for row in results[0]["rows"]]
    rows = {(r["trait"], row["method"]): row for r in results for row in r["rows"]}
    traits = [r["trait"] for r in results]
    header = "| method | " + " | ".join(traits) + " |\n|---|" + "---|" * len(traits)
    print("Trait / coherence at alpha 1\n\n" + header)
    for method in methods:
        scores = [rows[trait, method]["alpha1"] for trait in traits]
        print(f"| {method} | " + " | ".join(f"{s['trait']:.0f} / {s['coherence']:.0f}" for s in scores) + " |")
    for title, name in COLUMNS.items():
        print(f"\n{title}\n\n{header}")
        for method in methods[2:]:
            cells = [cell(rows[trait, method][name], 2 if "recovery" in name else 1) for trait in traits]
            print(f"| {method} | " + " | ".join(cells) + " |")
    print("\nSeconds to train, bytes of the adapter (mean over traits)\n")
    for method in methods[2:]:
        seconds = statistics.mean(rows[trait, method]["train_seconds"] for trait in traits)
        print(f"- {method}: {seconds:.1f} s, {rows[traits[0], method]['adapter_bytes']:.0f} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
