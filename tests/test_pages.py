"""The pages: links lead somewhere, the API page is what the docstrings say, and one spelling holds."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    p for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"), ROOT / "benchmarks/README.md"]
)


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in _anchors(place)):
            wrong.append(target)
    assert not wrong


def test_the_api_page_is_made_from_the_docstrings() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))
    assert made["PAGE"].read_text() == made["page"](), "docstrings have changed: run `make api` and commit docs/api.md"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [str(p.relative_to(ROOT / "docs")) for p in PAGES if p.is_relative_to(ROOT / "docs") and p.name != "README.md"]
    assert [name for name in missing if f"]({name})" not in index] == []


def test_one_spelling() -> None:
    """Behavioral; the published packages' own key ``loss_behaviour`` stays theirs."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    other = "behavio" + "ur"
    wrong = []
    for name in listed:
        path = ROOT / name
        if path.suffix not in (".py", ".md", ".toml", ".yaml", ".svg", ".cff", ".sh", "") or "data" in path.parts or not path.is_file():
            continue
        if path in (ROOT / "tests/support/sane_package.py", ROOT / "tests/sane/test_losses.py"):
            continue  # written in the published code's names
        left = path.read_text().replace(f"loss_{other}", "")
        wrong += [name] * (other in left.lower())
    assert not wrong


def test_the_readme_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Its Python blocks, one after another; a comment behind a print is what is printed."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    runnable = [block for block in blocks if "patched()" not in block]
    assert len(runnable) == 2
    expected = [line.rpartition("# ")[2] for block in runnable for line in block.splitlines() if line.startswith("print(")]
    for block in runnable:
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == expected
