"""The page as a reader sees it: its title and words, and in Debian's chromium, headless, where that is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from wslfast.measure.results import Unit, read_results, write_tables
from wslfast.page import headline, report
from wslfast.page.finding import small_samples

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def results(folder: Path, *, name: str = "a", margin: float = 0.3, networks: int = 4, zoo: str = "digits", **facts: Any) -> Path:
    """Tables of one run called ``name`` beside a closed-form code."""

    def unit(variant: str, kind: str, level: float, **about: Any) -> Unit:
        metrics = {
            "agreement": (level, level, 0.1), "agreement_others": (level - margin, level - margin, 0.1), "agreement_margin": (margin, margin, 0.1),
            "identified": (0.5, 0.5, None), "latent_share": (0.5, 0.5, None), "latent_numbers": (1200.0, 1200.0, None), "probe_r2": (0.4, 0.4, 0.1),
            "accuracy_change": (-0.02, -0.02, 0.05), "accuracy_original": (0.8, 0.8, 0.1), "accuracy_reconstructed": (0.78, 0.78, 0.1),
            "l2_masked": (3.0, 3.0, 0.1),
        }  # fmt: skip
        models = [
            {
                "model": j // 2,
                "epoch": j % 2,
                "agreement": level + 0.02 * (j // 2),
                "agreement_others": level - margin,
                "accuracy_original": 0.8,
                "accuracy_reconstructed": 0.78,
            }
            for j in range(2 * networks)
        ]
        curves = [{"step": s, "loss": 1 / s} for s in (1, 2, 3)]
        return Unit(
            zoo, variant, 0, kind, "f", about, metrics, {"models": models, "curves": curves} if kind == "run" else {"models": models}
        )

    write_tables(
        folder,
        [unit(name, "run", 0.7, losses="S+B", beta=0.1, steps=100), unit("linear-metric-50", "code", 0.65, baseline="closed form")],
        facts,
    )
    return folder


def words(page: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<(svg|style).*?</\1>", " ", page, flags=re.DOTALL))))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("wslfast.page.drawing.to_svg", lambda figure: "<svg></svg>")


def test_the_title_is_the_readers_own_finding(tmp_path: Path, undrawn: None) -> None:
    page = report(results(tmp_path)).read_text()
    assert "<title>“a”: 70.0 % agreement on digits</title>" in page
    assert "<h1>On digits, reconstructions by “a” agree with their originals on 70.0 % of images at 50 % of the numbers" in page
    assert "Structure is not enough" not in page.lower().capitalize()


def test_goals_are_this_projects_own(tmp_path: Path, undrawn: None) -> None:
    """Nobody else's run has met or missed anything."""
    text = words(report(results(tmp_path / "theirs")).read_text())
    assert "At a glance" in text
    assert "Agreement with the own original, share of images 70.0 % a" in text
    assert not re.search(r"\b(met|missed|goal|goals)\b", text, re.IGNORECASE)
    text = words(report(results(tmp_path / "ours", goals=True)).read_text())
    assert "Where we stand" in text
    assert "at least 95 % of images missed 70.0 % a" in text


def test_our_own_results_keep_their_goals() -> None:
    facts = json.loads((Path(__file__).resolve().parents[2] / "docs" / "results" / "report.json").read_text())
    assert facts["goals"] is True


def test_small_samples_are_called_small(tmp_path: Path, undrawn: None) -> None:
    few = read_results(results(tmp_path / "few", networks=4))
    assert "4 test networks, a small sample" in headline(few)
    # four networks of agreement .70 .72 .74 .76: standard deviation .0258, of their mean .0129, twice that
    assert "digits has 4 test networks, so that the agreement of “a” is known to about ±2.6 points" in small_samples(few)
    assert "Small samples: digits has 4" in words(report(tmp_path / "few").read_text())
    many = read_results(results(tmp_path / "many", networks=30))
    assert "small" not in headline(many)
    assert small_samples(many) == ""
    assert "small sample" not in words(report(tmp_path / "many").read_text()).lower()


def test_a_collapse_is_said_in_words(tmp_path: Path, undrawn: None) -> None:
    found = headline(read_results(results(tmp_path, margin=0.004, networks=40)))
    first = (
        "On digits, “a” has collapsed: its reconstructions agree with other models' originals (69.6 % of images) as much as with their own"
    )
    assert found.startswith(f"{first} (70.0 %)")
    page = report(tmp_path).read_text()
    assert "<title>“a”: collapse on digits</title>" in page
    assert escape("collapse: agrees with other models' originals as much as with its own") in page


_OUTER = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0"><iframe id="f" style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>
<pre id="found"></pre><script>
document.getElementById("f").addEventListener("load", () => {{
  const inner = document.getElementById("f").contentDocument, root = inner.documentElement, found = {{}};
  found.width = root.clientWidth; found.scroll = root.scrollWidth; found.wide = []; found.small = [];
  const scrolls = e => {{ for (; e; e = e.parentElement) if (/auto|scroll/.test(inner.defaultView.getComputedStyle(e).overflowX)) return true; return false; }};
  for (const e of inner.body.querySelectorAll("*")) {{
    const box = e.getBoundingClientRect();
    if (box.width && box.right > root.clientWidth + 1 && !scrolls(e)) found.wide.push(e.tagName + " " + e.textContent.slice(0, 40));
  }}
  for (const e of inner.body.querySelectorAll("svg text")) {{ const h = e.getBoundingClientRect().height; if (h && h < 6) found.small.push(e.textContent + " " + h); }}
  const style = inner.defaultView.getComputedStyle(inner.body);
  found.paper = style.backgroundColor; found.ink = style.color;
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script>"""


def browser(folder: Path, *arguments: str) -> tuple[str, str]:
    """What chromium prints of a page's document, and what it logs."""
    assert CHROMIUM is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
        f"--user-data-dir={folder}/profile",
    ]
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", "--virtual-time-budget=4000", *arguments], capture_output=True, text=True, timeout=120
    )
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_in_chromium_nothing_overflows_and_the_console_is_silent(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    long = "a-run-with-a-name-that-somebody-thought-would-explain-everything-about-it"
    page = report(results(tmp_path, name=long, zoo="a zoo of somebody's with a long name")).read_text()
    dom, log = browser(tmp_path, (tmp_path / "report.html").as_uri())
    assert "<h1>" in dom
    assert "CONSOLE" not in log, log
    for width in (400, 1200):
        outer = tmp_path / f"{width}.html"
        outer.write_text(_OUTER.format(width=width, page=escape(page)), encoding="utf-8")
        for dark in (False, True):
            flags = (
                ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
            )
            dom, log = browser(tmp_path, f"--window-size={width + 100},1000", *flags, outer.as_uri())
            assert "CONSOLE" not in log, log
            match = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
            assert match is not None
            found = json.loads(unescape(match[1]))
            assert found["width"] <= width
            assert found["scroll"] <= found["width"], found["wide"]
            assert found["wide"] == []
            assert found["small"] == []
            paper, ink = (sum(map(int, re.findall(r"\d+", found[name])[:3])) / 3 for name in ("paper", "ink"))
            assert abs(paper - ink) > 150
            assert (paper < ink) == dark
