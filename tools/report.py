"""A run as one page to look at: learning curves, scores, samples beside the truth, ablations, cost.

    python tools/report.py --run runs/recall runs/refine --output report.html
    python tools/report.py --run runs/refine --output report.html --document docs/RESULTS.md

Reads what training and `lightning test` wrote to TensorBoard. The page needs no network and no other file. With
``--document`` the scores replace, as Markdown tables, what lies between that file's two marker lines.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from univigu.cli import exit_code
from univigu.report import RunLog, markdown_table, page, score_rows, split_around

BEGIN, END = "<!-- runs: written by tools/report.py -->", "<!-- end of runs -->"


def run(options: argparse.Namespace) -> None:
    logs = [RunLog.read(folder) for folder in options.run]
    pictures = sorted(options.ablations.glob("*.png")) if options.ablations else []
    if options.ablations and not pictures:
        raise ValueError(f"--ablations {options.ablations}: no .png files there")
    if options.document:  # first: a wrong one leaves nothing half done
        tables = [f"`{log.folder}`:\n\n{markdown_table(*score_rows(log.scores()))}" for log in logs]
        before, after = split_around(options.document.read_text(), BEGIN, END, str(options.document))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(logs, pictures, options.title))
    if options.document:
        options.document.write_text("\n\n".join([before, *tables, after]))
    print(f"wrote {options.output}")


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="folders of runs")
    parser.add_argument("--output", type=Path, required=True, help="the page, an .html file")
    parser.add_argument("--document", type=Path, help="Markdown file with the two marker lines")
    parser.add_argument("--ablations", type=Path, help="folder of plots that tools/ablate.py made")
    parser.add_argument("--title", default="Uni-ViGU")
    options = parser.parse_args(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
