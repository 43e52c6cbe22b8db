"""Measurements behind the documents' tables and figures."""

import csv
import json
from pathlib import Path


def write_csv(path: str, rows: list[dict]) -> None:
    """Raw numbers: a header of all rows' keys, then a line per row."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(
            file, dict.fromkeys(key for row in rows for key in row), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: str, record: dict) -> None:
    """Raw numbers with what they were measured on."""
    Path(path).write_text(json.dumps(record, indent=1, default=str) + "\n")
