"""The report's page, opened in a browser that has no network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kl_gpu.compare import Comparison, Scores, Windows, report
from kl_gpu.compare.scores import scored

from . import browser

COLUMNS, ROWS = 4096, 100
# Words that HTML, JavaScript and JSON trip over.
ODD = ("</script>", "\n", '"quoted"', "<b>", "\\", "\t", "&amp;", "é", "\u2028", "")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two models at 2 000 tokens."""
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    ids = torch.randint(COLUMNS, (20, ROWS + 1))
    windows = Windows(ids, 0)
    models = []
    for name, noise in (("close", 0.01), ("<far>", 0.4)):
        parts = [scored(*pair(noise, i), windows.labels[i]) for i in range(len(ids))]
        models.append(Scores(name, 1000, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}))
    found = Comparison("base", windows, models, {}, ["A note."])
    return report.write(found, tmp_path_factory.mktemp("page"), lambda token: ODD[token % len(ODD)])


def pair(noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = 3 * torch.randn(ROWS, COLUMNS, generator=generator)
    return base, base + noise * torch.randn(ROWS, COLUMNS, generator=generator)


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium, to open the page in")
def test_the_page_in_a_browser(page: Path, tmp_path: Path) -> None:
    assert page.stat().st_size < 5 << 20
    with browser.opened(page, tmp_path / "profile") as shown:
        tokens = shown.value("[...document.querySelectorAll('#tokens span')].map(x => x.textContent)")
        assert len(tokens) == 2000
        assert set(tokens) == {word.replace("\n", "⏎\n").replace("\t", "⇥") for word in ODD}
        assert shown.value("document.querySelectorAll('#tokens hr').length") == 19
        assert shown.value("document.querySelectorAll('figure svg').length") == 4
        assert shown.value("document.querySelectorAll('#worst li').length") == 25
        assert "A note." in shown.value("document.body.innerText")

        at, card = "document.activeElement.dataset.i", "document.getElementById('card').innerText"
        assert shown.value(card) == ""
        while shown.value("document.activeElement.tagName") != "SELECT":
            shown.press("Tab")
        shown.press("Tab")
        assert shown.value(at) == "0"
        first = shown.value(card)
        assert "KL " in first
        assert "close" in first
        # Five rows for each model's likeliest, below what they are headed by.
        assert shown.value("document.querySelectorAll('#card tr').length") == 6
        for key, place in (
            ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowDown", 22), ("ArrowLeft", 21), ("ArrowUp", 1),
            ("ArrowUp", 0),
        ):  # fmt: skip
            shown.press(key)
            assert shown.value(at) == str(place), key
        assert shown.value(card) == first
        shown.press("ArrowRight")
        assert shown.value(card) != first
        shown.press("Escape")
        assert shown.value(card) == ""
        # The other model colours the same words; Tab leads on to the worst tokens, not through 2000 of them.
        colours = "[...document.querySelectorAll('#tokens span')].map(x => x.style.background).join()"
        before = shown.value(colours)
        shown.value(
            "(m => { m.value = 1; m.dispatchEvent(new Event('change')); })(document.querySelector('select'))"
        )
        assert shown.value(colours) != before
        shown.value("document.querySelector('#tokens span').focus()")
        assert "<far>" in shown.value(card)
        shown.press("Tab")
        assert shown.value("document.activeElement.parentNode.id") == "worst"

        for width in (1280, 390):
            shown.picture(width, 900)
            assert shown.value("document.documentElement.scrollWidth") <= width
        assert shown.errors == []
        assert shown.requests[0] == page.resolve().as_uri()
        assert all(url.startswith("data:") for url in shown.requests[1:])
