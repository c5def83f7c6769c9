"""The one error class, and saying something once."""

from __future__ import annotations

import logging

import pytest
import torch

from wslfast import errors
from wslfast.errors import WslfastError, check_positive, describe, first_line, present, require, say_once


def test_is_a_value_error() -> None:
    assert issubclass(WslfastError, ValueError)


def test_require() -> None:
    require(True, "never seen")
    with pytest.raises(WslfastError, match=r"^expected this, got that$"):
        require(False, "expected this, got that")


def test_present() -> None:
    assert present(0, "never seen") == 0
    with pytest.raises(WslfastError, match=r"^expected this$"):
        present(None, "expected this")


def test_check_positive() -> None:
    check_positive("k", 1)
    for value in (0, -3, 1.0, True, "1", None):
        with pytest.raises(WslfastError) as caught:
            check_positive("k", value)
        assert str(caught.value) == f"k: expected a positive integer, got {value!r}"


def test_say_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_said", set())
    with caplog.at_level(logging.INFO, logger="wslfast"):
        for _ in range(3):
            say_once("first")
        say_once("second", logging.INFO)
    assert [(r.message, r.levelname) for r in caplog.records] == [("first", "WARNING"), ("second", "INFO")]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2, 3), "[2, 3] float32 on cpu"),
        (torch.zeros(0, dtype=torch.bool, device="meta"), "[0] bool on meta"),
        (torch.tensor(1), "[] int64 on cpu"),
        (None, "None"),
        ("cnn3", "'cnn3'"),
        (3, "3"),
        (2.5, "2.5"),
        (True, "True"),
        ([1, 2], "list"),
        ({"a": 1}, "dict"),
        (torch.float32, "dtype"),
    ],
    ids=["tensor", "meta", "scalar", "none", "text", "int", "float", "bool", "list", "dict", "other"],
)
def test_describe(value: object, words: str) -> None:
    assert describe(value) == words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("one\ntwo"), "one"),
        (MemoryError(), "MemoryError"),
        (RuntimeError(" \n"), "RuntimeError"),
        (KeyError("x" * 400), "'" + "x" * 299),
    ],
    ids=["two lines", "no message", "blank", "long"],
)
def test_first_line(error: Exception, words: str) -> None:
    assert first_line(error) == words
