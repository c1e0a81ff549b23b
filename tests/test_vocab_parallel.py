"""A vocabulary over ranks: gloo, on one machine. `make check-parallel` has 4 of them."""

from __future__ import annotations

import os

import pytest
import ranks
import vocab_cases

RANKS = int(os.environ.get("RANKS", "2"))
pytestmark = pytest.mark.xdist_group("parallel")  # one worker starts the ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks.run("vocab_cases", RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", vocab_cases.CASES)
def test_ranks_are_one_process(results, case):
    expected = dict.fromkeys(range(RANKS), "")
    if case == "a rank that is killed":
        expected[RANKS - 1] = f"rank {RANKS - 1} ended in it"
    of_ranks = results.get(case, {})
    assert of_ranks == expected, "\n".join(filter(None, of_ranks.values())) or "it did not run"
