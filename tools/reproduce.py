"""Measure a row of docs/RESULTS.md again and compare it with the published figures.

    python tools/reproduce.py [shipped-captions]
Rows (docs/results.json) are commands of ``lightning`` and the last one's figures. Exit code 1: one is outside.
"""

import json
import sys
from pathlib import Path
from typing import Any

from univigu.cli import ToolParser, exit_code

ROWS = Path(__file__).parents[1] / "docs" / "results.json"


def compare(measured: dict[str, float], row: dict[str, Any]) -> bool:
    """Print measured beside published figures; whether all are within the row's tolerance."""
    outside = 0
    for name, published in row["published"].items():
        value = measured.get(name, float("nan"))
        outside += (bad := not abs(value - published) <= row["tolerance"])
        print(f"{name:28} measured {value:.4f}  published {published:.4f}{'  OUTSIDE' if bad else ''}")
    print(f"tolerance {row['tolerance']}: {'NOT reproduced' if outside else 'reproduced'}")
    return not outside


def reproduce(name: str | None, rows: dict[str, Any]) -> bool:
    """Run a row's commands; without a name list the rows."""
    if name is None:
        print("\n".join(f"{key:20} {row['about']}" for key, row in rows.items()))
        return True
    if name not in rows:
        raise ValueError(f"row {name!r}: expected one of {', '.join(rows)}")
    from univigu.training.lightning_cli import UniViGUCLI

    runs = [UniViGUCLI(args=arguments) for arguments in rows[name]["commands"]]
    return compare({key: float(value) for key, value in runs[-1].trainer.callback_metrics.items()}, rows[name])


def main(args: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("row", nargs="?", help="name of a row; without one all are listed")
    name, results = parser.parse_args(args).row, list[bool]()
    code = exit_code(lambda: results.append(reproduce(name, json.loads(ROWS.read_text()))))
    return code or int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
