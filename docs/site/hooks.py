"""Hooks of the docs site: pages from files outside of docs/, and tables of options from docstrings."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
TOP_FILES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
TABLE = re.compile(r"<!-- options of (\S+) as (\S+?)\.?(?: without (.+))? -->")


def on_files(files: Any, config: Any) -> Any:
    """Add the README as the home page, and the other pages at the top of the repository."""
    for source, page in TOP_FILES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](").replace("](README.md", "](index.md")
        files.append(File.generated(config, page, content=text))
    for name in ("CITATION.cff", "Dockerfile", "LICENSE"):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **rest: Any) -> str:
    """Lead links out of docs/ to the pages of ``on_files``; fill in tables of options."""
    for source, page in TOP_FILES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return TABLE.sub(lambda match: options_table(match[1], match[2], (match[3] or "").split()), markdown)


def options_table(path: str, prefix: str, without: list[str]) -> str:
    """A Markdown table of a class's parameters as options.

    Args:
        path: a dataclass with docstrings below its fields, or a class whose docstring has a section of arguments.
        prefix: what the command line puts before the names.
        without: names of parameters that are no options.
    """
    kind = package()[path.removeprefix("univigu.")]
    sections = [part for part in kind.docstring.parsed if part.kind is griffe.DocstringSectionKind.parameters]
    described = {item.name: item.description for part in sections for item in part.value}
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for item in kind.parameters:
        field = kind.members.get(item.name)
        meaning = described.get(item.name) or (field.docstring.value if field and field.docstring else "")
        default = str(item.default).replace("None", "null").replace("True", "true").replace("False", "false")
        default = "required" if item.required else f"`{default}`"
        if item.name in ("self", *without) or default == f"`{item.annotation}()`":  # such a group has its own table
            continue
        cells = [f"`{prefix}.{item.name}`", f"`{choices(kind, item.annotation)}`", default]
        rows.append("| " + " | ".join([*cells, meaning[:1].upper() + " ".join(meaning[1:].split())]) + " |")
    return "\n".join(rows)


def choices(kind: Any, annotation: Any) -> str:
    """A type as written, or the values that it allows."""
    named = kind.module.members.get(str(annotation))
    text = str(named.value if named is not None and named.is_attribute else annotation)
    return text.removeprefix("Literal[").removesuffix("]").replace("', '", "' or '") if "Literal" in text else text


@cache
def package() -> Any:
    return griffe.load("univigu", search_paths=[ROOT], docstring_parser="google")
