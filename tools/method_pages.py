#!/usr/bin/env python
"""Writes the measured rows into the pages of the classification methods.

    python tools/method_pages.py docs/results/classification/plan.yaml docs/methods

On a page, what stands between `<!-- measured: ce kd -->` and `<!-- end -->` becomes a table of the
methods named: accuracies from the records beside the plan, step time and memory from its
step_time.json.
"""

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)

# isort: split
import argparse
import json
import re
from pathlib import Path

from sssd.engine import user_errors
from sssd.studies.classification_plan import Plan, final_records, load_plan
from sssd.studies.tables import comparison_rows, markdown_table

MARKED = re.compile(r"(<!-- measured: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def method_table(plan: Plan, folder: Path, methods: list[str]) -> str:
    """The rows of some methods: accuracy on each dataset, time and memory."""
    rows = {
        data: {
            row.method: row
            for row in comparison_rows(
                final_records(plan, folder, data), baseline=plan.baseline, metric=plan.metric
            )
        }
        for data in plan.data
    }
    costs = {}
    for cost in json.loads((folder / "step_time.json").read_text())["configs"]:
        costs.setdefault(cost["name"].partition("_cifar_resnet")[0], cost)
    columns = [("config", [f"`{method}`" for method in methods])]
    for data, of_data in rows.items():
        for title, field in (
            (data, "accuracy"),
            (f"to `ce`, {data}", "difference"),
            (f"ensemble, {data}", "ensemble"),
        ):
            columns.append((title, [getattr(of_data.get(m), field, "") for m in methods]))
    columns += [
        (
            "step time",
            [f"{costs[m]['ratio']['median']:.2f}" if m in costs else "" for m in methods],
        ),
        ("memory", [f"{costs[m]['memory_ratio']:.1f}" if m in costs else "" for m in methods]),
    ]
    # What none of them has is left out.
    columns = [(title, cells) for title, cells in columns if any(cells)]
    return markdown_table(
        [title for title, _ in columns], list(zip(*(cells for _, cells in columns), strict=True))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, help="YAML; its folder holds the records")
    parser.add_argument("pages", type=Path, help="folder of the pages")
    args = parser.parse_args()
    with user_errors():
        plan = load_plan(args.plan)

        def table(match: re.Match) -> str:
            rows = method_table(plan, args.plan.parent, match[2].split())
            return f"{match[1]}{rows}{match[3]}"

        for page in sorted(args.pages.glob("*.md")):
            page.write_text(MARKED.sub(table, page.read_text()))


if __name__ == "__main__":
    main()
