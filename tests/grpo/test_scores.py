"""The figures of an evaluation, against values worked by hand."""

import pytest

from grpo.scores import mcnemar, paired, permuted, summary, table, wilson


def row(name, strict, chosen=0, **changes):
    return {"id": name, "strict": strict, "official": strict, "official_verbatim": False, "chosen": chosen,
            "choices": ["x", "y"], "order": [0, 1], "letter": "A", "gold_letter": "B", "state": "ok",
            "think": "one two", "tokens": 3, "meta": {}} | changes  # fmt: skip


def test_wilson():
    # n = 10, z = 1.96: 7 right: (0.7 + 0.19207 ± 1.96 sqrt(0.021 + 0.0096)) / 1.38415
    assert wilson(7, 10) == pytest.approx((0.39678, 0.89221), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-4)
    assert wilson(700, 1000)[1] - wilson(700, 1000)[0] == pytest.approx(2 * 0.0284, abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(10, 2) == mcnemar(2, 10) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32)


def test_pairs_are_of_shared_items():
    mine = [row("a", True), row("b", True), row("c", False), row("x", True)]
    theirs = [row("c", True), row("a", False), row("b", True), row("y", True)]
    assert paired(mine, theirs, "strict") == {
        "n": 3, "not_shared": 2, "only_this": 1, "only_other": 1, "difference": 0.0, "p": 1.0
    }  # fmt: skip


def test_consistency_and_correctness():
    # a: chosen 0 0 1: one of three pairs agrees, one of three right; b: never an option: nothing agrees
    def said(strict, chosen, order):
        choices = ["xyz"[i] for i in order]
        return [row("a", strict, chosen, choices=choices, order=order), row("b", False, None, order=order)]

    runs = [said(True, 0, [0, 1, 2]), said(False, 0, [1, 2, 0]), said(False, 1, [2, 1, 0])]
    figures = permuted(runs)
    assert figures == {"runs": 3, "consistency": pytest.approx(1 / 6), "correctness": pytest.approx(1 / 6)}
    # The same order again is no second opinion; a row without an order, that was not asked, agrees with nothing.
    bad = [row("c", False, None, order=[], choices=[])]
    assert permuted([runs[0], runs[0]])["consistency"] == 0.0 and permuted([bad, bad])["consistency"] == 0.0
    # a: 1 of 3 pairs, b and c: none
    assert permuted([run + bad for run in (*runs, runs[2])])["consistency"] == pytest.approx(1 / 9)


def test_an_option_printed_twice_is_one_option():
    a = row("a", True, 0, choices=["x", "y", "x"], order=[0, 1, 2])
    b = row("a", True, 2, choices=["x", "y", "x"], order=[2, 1, 0])
    assert permuted([[a], [b]])["consistency"] == 1.0


def test_withheld_answers_are_not_compared():
    mine = [row("a", True), row("b", False, hidden=True)]
    theirs = [row("a", False), row("b", False, hidden=True)]
    assert paired(mine, theirs, "strict")["n"] == 1 and paired(mine, theirs, "strict")["difference"] == 1.0


def test_summary_and_table():
    rows = [
        row("a", True, meta={"task": "sound", "category": ["Reasoning"]}),
        row("b", False, meta={"task": "music", "difficulty": "hard"}, state="no tag", think=None, letter=None),
        row("c", False, meta={"task": "music|x"}, tokens=6),
    ]
    figures = summary(rows)
    assert figures["total"]["strict"]["n"] == 3 and figures["total"]["strict"]["accuracy"] == pytest.approx(1 / 3)
    assert figures["groups"]["task"]["sound"]["strict"]["right"] == 1
    assert figures["groups"]["category"]["Reasoning"]["official"]["n"] == 1
    assert figures["states"] == {"ok": 2, "no tag": 1} and (figures["think_words"], figures["tokens"]) == (2, 4)
    assert figures["chosen"] == {"A": 2, "none": 1}
    text = "\n".join(table("toy", figures | {"against": {"strict": paired(rows, rows, "strict")}}))
    assert "| all |  | 3 | 0.333 | 0.061 to 0.792 |" in text and "music/x" in text and "p = 1" in text
