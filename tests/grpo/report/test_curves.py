"""The picture of one run or several, and the command line that draws it."""

import pytest

from grpo.report.__main__ import main
from grpo.report.curves import curves
from tests.grpo.report.factory import write_run


@pytest.fixture
def drawn(monkeypatch):
    """Labels of the lines in each panel of the picture that was drawn last."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    yield lambda: [[line.get_label() for line in a.get_lines() if line.get_label()[0] != "_"] for a in figures[-1].axes]
    monkeypatch.undo()
    plt.close("all")


def test_one_run_shows_the_parts_of_its_reward(tmp_path, drawn):
    folder = write_run(tmp_path / "one")
    assert curves(folder) == folder / "curves.png"
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert drawn() == [["accuracy/heldout"], ["reward", "accuracy", "format", "length"], ["completions/mean_length"],
                       ["kl", "entropy"]]  # fmt: skip


def test_several_runs_share_the_panels_under_their_names(tmp_path, drawn, capsys):
    for name in ("a", "b"):
        write_run(tmp_path / name)
    main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", str(tmp_path / "both.png")])
    assert drawn() == [["a", "b"]] * 4 and (tmp_path / "both.png").exists()
    assert str(tmp_path / "both.png") in capsys.readouterr().out
    assert not (tmp_path / "a" / "curves.png").exists() and not list(tmp_path.rglob("report.html"))


def test_runs_of_one_name_are_not_mixed_up(tmp_path, drawn):
    curves(*(write_run(tmp_path / sweep / "seed=0") for sweep in ("x", "y")), to=tmp_path / "both.png")
    assert drawn() == [["x/seed=0", "y/seed=0"]] * 4


def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*holds no metrics\.jsonl"):
        main([str(tmp_path), "--to", str(tmp_path / "x.png")])
