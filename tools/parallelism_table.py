"""Puts what `test_matrix.py` measured into docs/parallelism.md.

python -m pytest tests/distributed/test_matrix.py --slow --write-errors errors.jsonl
python -m tools.parallelism_table errors.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "parallelism.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
COLUMNS = {
    "logits": "logits",
    "likelihood": "likelihood's gradient",
    "objective": "objective's gradient",
    "loss": "loss",
    "gradient": "gradient",
    "displacement": "displacement",
}


def table(measured: list[dict[str, Any]]) -> str:
    """The errors of each family and layout, the last measurement of each, in the order of the first."""
    last = {(found["family"], found["layout"]): found for found in measured}
    order = {found["layout"]: (found["ranks"], number) for number, found in enumerate(measured)}
    lines = [
        f"| layout | ranks | family | {' | '.join(COLUMNS.values())} |",
        f"|---|---|---|{'---|' * len(COLUMNS)}",
    ]
    for family, layout in sorted(last, key=lambda key: (order[key[1]], key[0])):
        found = last[family, layout]
        errors = " | ".join(f"{found[name]:.1e}" if name in found else "—" for name in COLUMNS)
        lines.append(f"| {layout} | {found['ranks']} | {family} | {errors} |")
    worst = " | ".join(f"**{max(found.get(name, 0.0) for found in last.values()):.1e}**" for name in COLUMNS)
    return "\n".join([*lines, f"| **worst** | | | {worst} |"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("errors", type=Path, help="the file of --write-errors")
    measured = [json.loads(line) for line in parser.parse_args().errors.read_text().splitlines()]
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(before + BEGIN + table(measured) + END + after)
    print(f"{PAGE}: {len(measured)} measurements")


if __name__ == "__main__":
    main()
