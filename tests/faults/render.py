"""The table of docs/reliability.md, made of the figures that a run of ``make faults`` recorded: ``render.py FIGURES_FOLDER PAGE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

START, END = "<!-- made by tests/faults/render.py -->", "<!-- end -->"
ROWS = {
    "kill": "SIGKILL while training", "writes": "refused writes", "flips": "flipped bits", "shards": "bad shards", "hostile": "hostile files",
    "fuzz": "fuzzing", "numbers": "NaN and infinity", "arguments": "bad arguments", "memory": "out of memory",
    "backends": "GPU, Triton, compiler, cache", "determinism": "the same bits", "readers": "readers", "soak": "soak",
}  # fmt: skip


def table(folder: Path) -> str:
    """Markdown: a line a figure (the latest of each), then a line a guard."""
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for line in (folder / "figures.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["form"] == "full" and record["wanted"] != "-":
            latest[record["row"], record["what"]] = record
    records = sorted(latest.values(), key=lambda r: list(ROWS).index(r["row"]))
    if not records:
        raise SystemExit("no figures of a full run there")
    total = sum(r["reached"] for r in records if r["row"] == "fuzz" and isinstance(r["reached"], int))
    one = records[-1]
    dates = sorted({r["date"] for r in records})
    lines = [
        f"`make faults`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}: {one['machine']}, {one['cores']} cores, Python {one['python']}, torch {one['torch']}.",
        "",
        "| fault | figure | reached | asked for |",
        "|---|---|---|---|",
    ]
    lines += [f"| {ROWS[r['row']]} | {r['what']} | {_number(r['reached'])} | {_number(r['wanted'])} |" for r in records]
    if total:
        lines.append(f"| {ROWS['fuzz']} | inputs in all | {total:,} | 1,000,000 |")
    guards = folder / "guards.json"
    if guards.exists():
        lines += ["", "| guard taken out | its test | fails |", "|---|---|---|"]
        lines += [
            f"| {g['guard']} | `{g['test'].rpartition('/')[2]}` | {'yes' if g['fails'] else '**no**'} |"
            for g in json.loads(guards.read_text())
        ]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(folder: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{START}\n\n{table(folder)}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
