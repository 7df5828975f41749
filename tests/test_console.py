import os
import pty
import subprocess
import sys

import pytest

from medseg_diff.console import progress, say

BARS = """
from medseg_diff.console import progress, say
with progress("outer [bold]", 2) as outer:
    outer(0.5, note="step [1]")
    with progress("inner", 3) as inner:
        for _ in range(3):
            inner()
        say("talk between")
    outer(1.5)
"""


def test_control_characters_of_names_become_visible(capsys: pytest.CaptureFixture[str]):
    say("a\x1b[31mred\r\n\x07\u202eb\udcff.nii.gz, Größe 3 µm, 脳")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == r"a\x1b[31mred\r\n\x07\u202eb\udcff.nii.gz, Größe 3 µm, 脳" + "\n"


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]):
    with progress("work", 3) as advance:
        advance()
        advance(2, note="done")
    assert capsys.readouterr() == ("", "")


def test_bars_and_talk_share_a_terminal():
    reader, writer = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", BARS], stderr=writer, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment
    )
    os.close(writer)
    seen = b""
    while True:
        try:
            block = os.read(reader, 65536)
        except OSError:  # Linux says so where the other end is closed
            break
        if not block:
            break
        seen += block
    os.close(reader)
    out, _ = process.communicate()
    text = seen.decode()
    assert process.returncode == 0, text
    assert out == b""
    for shown in ("outer [bold]", "step [1]", "25%", "inner", "100%", "talk between"):
        assert shown in text
