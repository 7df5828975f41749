import math
from pathlib import Path

import pytest

from medseg_diff.errors import UserError
from medseg_diff.training.history import History


def test_what_was_saved_is_read_to_the_last_digit(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    history = History(path)
    history.add({"train/loss": 0.1 + 0.2, "val/dice/a, b": 1 / 3}, 20)
    history.add({"train/loss": float("nan"), "val/dice/a, b": 0.5}, 40)
    history.save()
    again = History(path)
    assert list(again.values) == list(history.values)
    assert again.curve("val/dice/a, b") == ([20, 40], [1 / 3, 0.5])
    steps, losses = again.curve("train/loss")
    assert steps == [20, 40]
    assert losses[0] == 0.1 + 0.2
    assert math.isnan(losses[1])
    assert path.read_text().splitlines()[0] == "step,metric,value"


def test_the_newest_value_of_every_metric(tmp_path: Path):
    history = History(tmp_path / "metrics.csv")
    history.add({"val/dice": 0.7, "val/loss": 2}, 10)
    history.add({"val/dice": 0.6, "train/loss": 1}, 20)
    assert history.last("val/") == {"val/dice": 0.6, "val/loss": 2}


def test_a_resumed_run_writes_over_what_the_killed_one_noted(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    history = History(path)
    for step in (20, 40, 60):
        history.add({"train/loss": float(step), "val/dice": step / 100}, step)
    history.save()
    resumed = History(path)
    resumed.forget_after(40)
    resumed.add({"val/dice": 0.9}, 40)  # killed between validation and state: step 40 is validated again
    resumed.add({"train/loss": 1.0}, 60)
    resumed.save()
    again = History(path)
    assert again.curve("val/dice") == ([20, 40], [0.2, 0.9])
    assert again.curve("train/loss") == ([20, 40, 60], [20.0, 40.0, 1.0])


@pytest.mark.parametrize("text", ["step,metric\n1,a\n", "step,metric,value\nx,a,1\n", "step,metric,value\n1,a\n"])
def test_a_damaged_table_is_named(tmp_path: Path, text: str):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"metrics\.csv.*--fresh"):
        History(path)
