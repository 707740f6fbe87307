"""What reaches a terminal: one line, without anything that steers it, in whatever encoding it has."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from latentflow import console
from latentflow.cli.output import show
from latentflow.console import mute, notice, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain names, [markup] and ünïcode 日本", "plain names, [markup] and ünïcode 日本"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b]0;title\x07\x1b[31mred", r"\x1b]0;title\x07\x1b[31mred"),
        ("caf\udce9.jpg", r"caf\xe9.jpg"),
        ("txt.\u202egpj.exe", r"txt.\u202egpj.exe"),
        ("\x9b31m", r"\x9b31m"),
        ("می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),
    ],
)
def test_what_is_printed_is_one_harmless_line(text, shown):
    assert printable(text) == shown


def test_a_notice_is_given_once(caplog):
    with caplog.at_level(logging.WARNING, "latentflow"):
        notice("17 files are left out")
        notice("17 files are left out")
        notice("another\nthing")
    assert caplog.messages == ["17 files are left out", r"another\nthing"]


def test_only_the_first_of_several_processes_prints(caplog, monkeypatch):
    monkeypatch.setattr(console, "_muted", False)
    mute()
    notice("17 files are left out")
    assert caplog.messages == []


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_lines_fit_any_encoding(encoding):
    code = (
        "from latentflow.console import notice, open_streams, say\n"
        "open_streams(); say('日本 \\udce9 [bold]x'); notice('日本'); print('日本')"
    )
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, check=True)
    japan = "日本" if encoding == "utf-8" else r"\u65e5\u672c"
    assert done.stderr.decode(encoding).splitlines() == [rf"{japan} \xe9 [bold]x", f"note: {japan}"]
    assert done.stdout.decode(encoding) == f"{japan}\n"


def test_a_table_has_words_for_yes_no_and_none(capsys):
    show({"flips": True, "mirrored": False, "depth": None, "images": 1, "share": 0.0}, as_json=False)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        *(["flips", "yes"], ["mirrored", "no"], ["depth", "none"]),
        *(["images", "1"], ["share", "0.0"]),
    ]
