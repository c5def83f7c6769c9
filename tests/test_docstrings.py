"""Docstrings of the public names: there, with a first line that is a sentence, arguments named, and errors said."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

import wslfast


def _public() -> Iterator[tuple[str, Any]]:
    """Public functions and classes, and the public methods of the classes."""
    for name in wslfast.__all__:
        value = getattr(wslfast, name)
        if isinstance(value, ModuleType):
            continue
        yield name, value
        for member, held in vars(value).items() if inspect.isclass(value) else ():
            inner = held.__func__ if isinstance(held, (classmethod, staticmethod)) else held.fget if isinstance(held, property) else held
            if not member.startswith("_") and inspect.isfunction(inner):
                yield f"{name}.{member}", inner


NAMES = dict(_public())


@pytest.mark.parametrize("name", NAMES)
def test_the_first_paragraph_is_a_sentence(name: str) -> None:
    text = inspect.getdoc(NAMES[name]) or ""
    first = " ".join(text.split("\n\n")[0].split())
    assert len(first) > 10
    assert first[-1] in ".:)", first
    assert first[0].isupper() or first[0] in "`:1", first


def _raises(function: Callable[..., Any]) -> bool:
    """Whether its own lines refuse an argument."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return bool(calls & {"require", "WslfastError"})


@pytest.mark.parametrize("name", [n for n, v in NAMES.items() if inspect.isfunction(v)])
def test_what_is_refused_is_said(name: str) -> None:
    text = inspect.getdoc(NAMES[name]) or ""
    if _raises(NAMES[name]):
        assert "Raises" in text or "raises" in text or "error" in text, name


@pytest.mark.parametrize("name", [n for n, v in NAMES.items() if inspect.isfunction(v) and "." not in n])
def test_arguments_are_named(name: str) -> None:
    text = inspect.getdoc(NAMES[name]) or ""
    for parameter in inspect.signature(NAMES[name]).parameters.values():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            assert parameter.name in text, f"{name}: {parameter.name}"


@pytest.mark.parametrize("name", ["batched_forward", "batched_behavioral_loss"])
def test_shapes_types_and_source_of_the_library_calls(name: str) -> None:
    text = inspect.getdoc(NAMES[name]) or ""
    for word in ("[k, P]", "[k, T, D]", "[n, ", "float32", "float64", "Returns:", "Raises:"):
        assert word in text, word
    assert name == "batched_forward" or ("arXiv 2503.17138" in text and "L_B" in text)
