"""Write docs/api.md from the docstrings of the public names: ``python docs/make_api.py`` (``make api``)."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import wslfast
import wslfast.zoo

PAGE = Path(__file__).with_name("api.md")
HEAD = """# The public names

Made by `make api` from the docstrings; do not edit. Everything here is there after `import wslfast`. Errors are
[`WslfastError`](#wslfasterror), a `ValueError`, and say what was expected and what came. k models, n queries, P parameters, T tokens of D
numbers, K classes.
"""
GROUPS = {
    "Networks and their weights": ["Architecture", "Population", "TokenLayout"],
    "Running many networks": ["batched_forward", "batched_behavioral_loss", "QueryPool", "TargetCache", "doctor"],
    "Zoos": ["build_zoo", "load_zoo", "save_zoo"],
    "Codes and training": ["LinearCodec", "AdaptiveCodec", "JointCodec", "Autoencoder", "TrainConfig", "train"],
    "What comes of it": ["evaluate", "generate", "profiling", "WslfastError"],
}
_SECTIONS = ("Args:", "Returns:", "Raises:", "Attributes:", "Yields:")


def page() -> str:
    """The whole page."""
    listed = [name for names in GROUPS.values() for name in names]
    others = [name for name in wslfast.__all__ if name not in listed]
    lines = [HEAD]
    for title, names in {**GROUPS, **({"Others": others} if others else {})}.items():
        lines.append(f"## {title}\n")
        for name in names:
            if name in wslfast.__all__:
                lines.append(_entry(name, getattr(wslfast, name)))
    lines.append("## `wslfast.zoo`\n\nMore of zoos, by their full names: `wslfast.zoo.import_zoo`.\n")
    for name in wslfast.zoo.__all__:
        if name not in wslfast.__all__:
            lines.append(_entry(name, getattr(wslfast.zoo, name), short=True))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _entry(name: str, value: Any, short: bool = False) -> str:
    text = _prose(inspect.getdoc(value) or "")
    if short:
        return f"- `{name}{_signature(value)}`: {_first(value)}"
    if isinstance(value, ModuleType):
        return f"### {name}\n\n{text}\n"
    parts = [f"### {name}\n", f"```text\n{name}{_signature(value)}\n```\n", text, ""]
    if inspect.isclass(value):
        parts += [f"- `{label}`: {_first(member)}" for label, member in _members(value)] + [""]
    return "\n".join(parts)


def _members(value: type) -> list[tuple[str, Any]]:
    found = []
    for name, member in vars(value).items():
        inner = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(inner) or not inner.__doc__:
            continue
        found.append((f".{name}" if isinstance(member, property) else f".{name}{_signature(inner)}", inner))
    return found


def _signature(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    if inspect.isclass(value) and issubclass(value, Exception):
        return ""
    given = []
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in given and not any(g.startswith("*") for g in given):
            given.append("*")
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={_default(parameter.default)}"
        given.append(f"{star}{parameter.name}{default}")
    return f"({', '.join(given)})"


def _default(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 and " at 0x" not in text and "<" not in text else "..."


def _first(value: Any) -> str:
    return _inline(" ".join((inspect.getdoc(value) or "").split("\n\n")[0].split()))


def _inline(text: str) -> str:
    text = re.sub(r":(?:meth|class|func|data|mod):`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def _prose(text: str) -> str:
    """A docstring as Markdown: sections become lists of their entries."""
    out: list[str] = []
    section = ""
    for line in text.splitlines():
        if line.strip() in _SECTIONS:
            section = line.strip()
            out += ["", f"**{section[:-1]}**", ""]
        elif section and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = line.strip().partition(": ")
            listed = section != "Returns:" and bool(colon)
            out.append(f"- `{name}`: {rest}" if listed and "`" not in name else f"- {line.strip()}" if listed else line.strip())
        elif section and line.strip():
            out.append("  " + line.strip())
        else:
            section = section if not line.strip() else ""
            out.append(line)
    return _inline("\n".join(out)).strip()


if __name__ == "__main__":
    PAGE.write_text(page())
