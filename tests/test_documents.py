"""Every Python block of README and docs/, and every example in a public docstring, runs as printed.

A block that cannot run here (it needs several processes, a GPU or a model from the network) is marked in the
page by `<!--- skip: next "why" --->`, and counted below.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kl_gpu
import kl_gpu.distributed

sybil = pytest.importorskip("sybil")
from sybil import Document  # noqa: E402
from sybil.evaluators.doctest import NUMBER  # noqa: E402
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser  # noqa: E402
from sybil.parsers.rest import DocTestParser  # noqa: E402

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
# How many blocks of a page are marked as not run.
NOT_RUN = {"docs/compare.md": 1}
ENTRIES = [name for name in kl_gpu.__all__ if callable(getattr(kl_gpu, name))]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Examples are small: threads would cost more than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def evaluate(document: Document) -> tuple[int, int]:
    """How many examples ran, and how many are marked as not run."""
    ran = skipped = 0
    for example in document:
        try:
            example.evaluate()
        except unittest.SkipTest:
            skipped += 1
        else:
            ran += 1
    return ran, skipped


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str) -> None:
    document = Document.parse(
        str(PAGES[page]), PythonCodeBlockParser(doctest_optionflags=NUMBER), SkipParser()
    )
    assert evaluate(document)[1] == NOT_RUN.get(page, 0)


def test_blocks_are_there() -> None:
    """That the parser finds them: a fence it does not know would never be run."""
    for page, path in PAGES.items():
        fences = re.findall(r"^ *```+(.*)$", path.read_text(), re.MULTILINE)
        assert len(fences) % 2 == 0, page
        for opening in fences[::2]:
            assert re.fullmatch(r"python|sh|text|c\+\+|\{[\w-]+\}.*", opening), f"{page}: ```{opening}"
    guides = [path.read_text().count("```python") for path in PAGES.values()]
    assert sum(guides) >= 20


@pytest.mark.parametrize("name", [*ENTRIES, *(f"distributed.{x}" for x in kl_gpu.distributed.__all__)])
def test_docstring_examples_run(name: str) -> None:
    found = kl_gpu.distributed if name.startswith("distributed.") else kl_gpu
    document = Document(inspect.getdoc(getattr(found, name.rpartition(".")[2])) or "", name)
    for region in DocTestParser(NUMBER)(document):
        document.add(region)
    assert list(document), f"{name} has no example"
    evaluate(document)


def _anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x.replace("`", "").lower()).replace(" ", "-") for x in headings}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Of the pages that the site does not have; its own are checked when it is built."""
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for target in (x or y for x, y in links):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        assert (ROOT / path).exists(), target
        assert not anchor or anchor in _anchors(ROOT / (path or page)), target
    assert page != "README.md" or len(links) >= 10


def test_every_key_of_a_summary_is_listed() -> None:
    page = (DOCS / "evaluation.md").read_text().partition("## Every key")[2]
    listed = set()
    for cell in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE):
        names = re.findall(r"`(\w[\w.]*)`", cell)
        whole = [name for name in names if not name.startswith("_")]
        listed |= set(whole) | {f"{name}_se" for name in whole if "each with `_se`" in cell}
        listed |= {whole[-1].rpartition("_")[0] + name for name in names if name.startswith("_p")}
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    summary = kl_gpu.token_stats(*logits, labels=torch.arange(4)).summary()
    assert listed == set(summary)


def test_site_builds_strictly(tmp_path: Path) -> None:
    """Without a warning, so that links, references and docstrings are whole; and without the network."""
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        str(DOCS),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    home = (tmp_path / "index.html").read_text()
    assert "kl_gpu" in home
    loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', home)
    assert not loaded, loaded
