"""The fuzzer finds what is planted, and a first handful of its inputs finds nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import run
from fuzz.corpus import damaged

from medseg_diff.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_damage_is_repeatable_and_varied():
    corpus = {"a": bytes(range(200)), "b": b"text: 1\n"}
    assert [damaged(corpus, 3, i) for i in range(50)] == [damaged(corpus, 3, i) for i in range(50)]
    assert len({damaged(corpus, 3, i)[1] for i in range(50)}) > 40


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, None),
        (UserError("x", "it is empty", "Copy it."), None),
        (UserError("x", "it needs more memory than there is", "Crop it."), "memory"),
        (ValueError("planted"), "ValueError in nothing of ours: planted"),
    ],
)
def test_only_a_user_error_is_an_answer(error, said):
    def reader(_: Path) -> None:
        if error:
            raise error

    found = run.trial(Path("x"), reader)
    assert found == said or said in found


@pytest.mark.slow
def test_a_handful_of_inputs_finds_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.run", "--inputs", "500", "--keep", tmp_path / "found"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split(" inputs")[0]) >= 500
    assert not list(tmp_path.iterdir())
