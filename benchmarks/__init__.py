"""Measurements behind the documents' tables and figures."""

import csv


def write_csv(path: str, rows: list[dict]) -> None:
    """Raw numbers: a header from the first row's keys, then a line per row."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
