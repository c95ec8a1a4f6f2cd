"""The documentation strings of Python's standard library, as one text: what `make demo-compare` reads."""

from __future__ import annotations

import argparse
import ast
import sysconfig
import warnings
from pathlib import Path

# Modules whose documentation is prose, in the order of their names; all of it is more than a demo reads.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="where the text goes")
    parser.add_argument("--characters", type=int, default=60_000, help="default: %(default)s")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    text = documentation(options.characters)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    except OSError as error:
        parser.error(f"{options.out}: {error.strerror}")
    print(f"{options.out}: {len(text)} characters")
    return 0


def documentation(characters: int) -> str:
    """The modules' own strings of 400 characters and more, up to so many in all."""
    root, found, size = Path(sysconfig.get_path("stdlib")), [], 0
    for file in sorted(root.rglob("*.py"), key=Path.as_posix):
        if _SKIPPED & set(file.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the parser's doubts, such as "\\d" in a string
                text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        if len(text) < 400:
            continue
        found.append(text)
        size += len(text) + 2
        if size >= characters:
            break
    return "\n\n".join(found)[:characters]
