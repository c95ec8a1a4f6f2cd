"""What is left out of a slow backend's parameter sets, and that every pair of values stays."""

from __future__ import annotations

from itertools import product

import pytest

from pairs import covering, left_out, pairs_of

pytest_plugins = ["pytester"]


@pytest.mark.parametrize("sizes", [(7,), (7, 3), (7, 4, 4), (7, 2, 2, 2), (5, 3, 2, 2, 4)])
def test_every_pair_stays(sizes: tuple[int, ...]) -> None:
    sets = list(product(*map(range, sizes)))
    chosen = covering(sets)
    assert set().union(*(pairs_of(sets[at]) for at in chosen)) == set().union(*map(pairs_of, sets))
    first, second = sorted((*sizes, 1), reverse=True)[:2]
    assert len(chosen) <= 1.5 * first * second
    assert sorted([*chosen, *left_out(sets)]) == list(range(len(sets)))


def test_a_value_in_one_set_alone_stays() -> None:
    sets = [("kl", "fp32", 1), ("kl", "bf16", 1), ("js", "fp32", 1), ("js", "bf16", 1), ("tv", "fp32", 2)]
    assert 4 in covering(sets)


def test_marked_tests_run_a_few_sets_on_the_interpreter_and_all_elsewhere(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("pytest_plugins = ['thinned']\n")
    pytester.makeini("[pytest]\nmarkers = pairs: few\n exhaustive: many\naddopts = -m 'not exhaustive'\n")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.pairs
        @pytest.mark.parametrize("backend", ["triton", "eager"])
        @pytest.mark.parametrize("x", range(4))
        @pytest.mark.parametrize("y", range(3))
        @pytest.mark.parametrize("z", range(3))
        def test_marked(backend, x, y, z): pass

        @pytest.mark.parametrize("backend", ["triton"])
        @pytest.mark.parametrize("x", range(9))
        def test_plain(backend, x): pass
        """
    )
    done = pytester.inline_run()
    names = [report.nodeid for report in done.getreports("pytest_runtest_logreport") if report.when == "call"]
    marked = [name for name in names if "::test_marked" in name]
    on = {backend: [name for name in marked if f"-{backend}]" in name] for backend in ("triton", "eager")}
    assert len(on["eager"]) == 36
    assert 12 <= len(on["triton"]) <= 18
    assert len([name for name in names if "::test_plain" in name]) == 9
    done = pytester.inline_run("-m", "")
    done.assertoutcome(passed=81)
