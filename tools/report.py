"""A run as one page to look at: learning curves, scores, samples beside the truth, ablations, cost.

    python tools/report.py --run runs/recall runs/refine --output report.html
    python tools/report.py --run runs/refine --output report.html --document docs/RESULTS.md

Reads what training and `lightning test` wrote to TensorBoard. The page needs no network and no other file. With
``--document`` the scores replace, as Markdown tables, what lies between that file's two marker lines; a file without
them gets a section with both at its end. Curves need matplotlib (``pip install -e ".[results]"``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from univigu.cli import exit_code
from univigu.training.report import RunLog, markdown_table, page, score_rows, split_around

BEGIN, END = "<!-- runs: written by tools/report.py -->", "<!-- end of runs -->"


def run(options: argparse.Namespace) -> None:
    logs = [RunLog.read(folder) for folder in options.run]
    pictures = sorted(options.ablations.glob("*.png")) if options.ablations else []
    if options.ablations and not pictures:
        raise ValueError(f"--ablations {options.ablations}: no .png files there")
    if options.document:  # first: a wrong one leaves nothing half done
        tables = [f"`{log.folder}`:\n\n{markdown_table(*score_rows(log.scores()))}" for log in logs]
        text = with_markers(options.document.read_text(), str(options.document))
        before, after = split_around(text, BEGIN, END, str(options.document))
    content = page(logs, pictures, options.title)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(content)
    if options.document:
        options.document.write_text("\n\n".join([before, *tables, after]))
    print(f"wrote {options.output}")


def with_markers(text: str, name: str) -> str:
    """A document's text, with a section for the scores at its end if it has no place for them yet.

    Raises:
        ValueError: the document of that name has one of the markers alone, or several, or the end first: what lies
            between them cannot be told from what has to stay.
    """
    begins, ends = text.count(BEGIN), text.count(END)
    if begins == ends == 0:
        blank = "" if not text or text.endswith("\n\n") else "\n" if text.endswith("\n") else "\n\n"
        return f"{text}{blank}## Runs\n\n{BEGIN}\n{END}\n"
    if (begins, ends) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{name}: expected the lines {BEGIN!r} and {END!r} once each, in this order, or neither")
    return text


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="folders of runs")
    parser.add_argument("--output", type=Path, required=True, help="the page, an .html file")
    parser.add_argument("--document", type=Path, help="Markdown file that the scores are written into")
    parser.add_argument("--ablations", type=Path, help="folder of plots that tools/ablate.py made")
    parser.add_argument("--title", default="Uni-ViGU")
    options = parser.parse_args(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
