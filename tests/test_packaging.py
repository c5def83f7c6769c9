"""What is shipped, what importing it needs, and the names it offers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import wslfast

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "AdaptiveCodec", "Architecture", "Autoencoder", "JointCodec", "LinearCodec", "Population", "QueryPool", "TargetCache", "TokenLayout", "TrainConfig", "WslfastError",
    "batched_behavioral_loss", "batched_forward", "build_zoo", "doctor", "evaluate", "generate", "load_zoo", "profiling", "save_zoo", "train",
}  # fmt: skip


def _toml() -> dict:
    tomllib = pytest.importorskip("tomllib") if sys.version_info >= (3, 11) else pytest.importorskip("tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_public_names_are_pinned() -> None:
    assert set(wslfast.__all__) == NAMES
    assert all(getattr(wslfast, name) is not None for name in NAMES)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        wslfast.trian  # noqa: B018


def test_every_name_of_the_pages_is_there_after_one_import(tmp_path: Path) -> None:
    """README, docs and examples name public objects and submodules; ``import wslfast`` alone reaches them all."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    names = {name.rstrip(".") for page in pages for name in re.findall(r"\bwslfast(?:\.[A-Za-z_]\w*)+", page.read_text())}
    names -= {name for name in names if name.endswith((".py", ".toml"))}
    assert {"wslfast.AdaptiveCodec", "wslfast.Architecture.cnn3", "wslfast.sane.patched"} <= names
    code = f"""
        import wslfast
        for name in {sorted(names)}:
            value = wslfast
            try:
                for part in name.split(".")[1:]:
                    value = getattr(value, part)
            except wslfast.WslfastError as error:  # made of another package's class, where that is installed
                assert "needs the package sane 2.x" in str(error), name
    """
    _run(code, tmp_path, PYTHONPATH=str(ROOT))


def test_packages_list_equals_the_folders_on_disk() -> None:
    folders = {p.parent.relative_to(ROOT) for base in ("wslfast", "kernels") for p in (ROOT / base).rglob("__init__.py")}
    names = {".".join(("wslfast", *f.parts) if f.parts[0] == "kernels" else f.parts) for f in folders}
    assert set(_toml()["tool"]["setuptools"]["packages"]) == names
    code = {p.parent.relative_to(ROOT) for base in ("wslfast", "kernels") for p in (ROOT / base).rglob("*.py")}
    assert code == folders  # every folder with code has an __init__.py


def test_torch_has_a_floor_and_no_cap() -> None:
    dependencies = _toml()["project"]["dependencies"]
    assert "torch>=2.10" in dependencies
    assert {d.split(">")[0].split(";")[0].strip() for d in dependencies} == {
        "torch",
        "numpy",
        "einops",
        "safetensors",
        "tyro",
        "rich",
        "tomli",
    }


BLOCKER = """
    import importlib.abc, sys
    BLOCKED = {"tyro", "rich", "sklearn", "scipy", "matplotlib", "torchvision", "nvtx", "triton", "tensorboard", "pytest", "hypothesis", "pandas"}
    class Absent(importlib.abc.MetaPathFinder):  # as if not installed: importing fails, and asking finds nothing
        def __init__(self, finder): self.finder = finder
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] not in BLOCKED and hasattr(self.finder, "find_spec"):
                return self.finder.find_spec(name, path, target)
    sys.meta_path[:] = [Absent(finder) for finder in sys.meta_path]
"""


def _run(code: str, cwd: Path, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_training_from_python_needs_four_packages_alone(tmp_path: Path) -> None:
    """torch, numpy, einops and safetensors: everything else is blocked in a subprocess that builds a zoo and trains on it."""
    code = textwrap.dedent(BLOCKER) + textwrap.dedent("""
        import numpy, wslfast
        for name in BLOCKED:
            try:
                __import__(name)
            except ImportError:
                continue
            raise SystemExit(f"{name} was not blocked")
        generator = numpy.random.default_rng(0)
        images = generator.random((120, 28, 28), dtype=numpy.float32)
        numpy.savez("images.npz", images=images, labels=generator.integers(0, 10, 120))
        wslfast.build_zoo("images.npz", "zoo", architecture=wslfast.Architecture.cnn(), models=8, epochs=2, seed=1)
        config = wslfast.TrainConfig(zoo="zoo", out="run", steps=2, queries=8, batch_size=4, d_model=16, heads=2, layers=1)
        print("steps", wslfast.train(config).step)
        print(sorted(m for m in sys.modules if m.partition(".")[0] in BLOCKED))
    """)
    assert _run(code, tmp_path, PYTHONPATH=str(ROOT)).splitlines()[-2:] == ["steps 2", "[]"]


def test_import_is_light_and_needs_no_kernels_package_on_the_path(tmp_path: Path) -> None:
    """From a bare tree: kernels/ beside the package is found, and nothing heavy is imported before a name is used."""
    code = """
        import sys, wslfast
        assert "torch" not in sys.modules and "kernels" not in sys.modules, "import wslfast pulled torch in"
        mine = {name for name in sys.modules if name.partition(".")[0] == "wslfast"}
        assert mine - {"wslfast.kernels"} == {"wslfast"}, mine
        import wslfast.kernels.layers, wslfast.kernels.reference
        print(wslfast.kernels.layers.__name__, wslfast.Architecture.cnn3().num_parameters)
    """
    assert _run(code, tmp_path, PYTHONPATH=str(ROOT)).split() == ["wslfast.kernels.layers", "10853"]


@pytest.mark.slow
def test_a_wheel_holds_everything_and_imports_elsewhere(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("wslfast", "kernels", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(tree)], check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist"), str(tree)], check=True)
    (wheel,) = (tmp_path / "dist").glob("wslfast-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    assert (site / "wslfast" / "kernels" / "layers.py").is_file()
    assert (site / "wslfast" / "py.typed").is_file()
    assert not (site / "kernels").exists()
    assert not (site / "benchmarks").exists()
    code = """
        import wslfast, wslfast.kernels.layers, wslfast.kernels.cpu.engine, wslfast.kernels.triton.schedule
        from wslfast.kernels import reference
        assert wslfast.batched_forward and wslfast.train
        print(wslfast.kernels.layers.__file__)
    """
    assert Path(_run(code, tmp_path, PYTHONPATH=str(site)).strip()).is_relative_to(site)


@pytest.mark.slow
def test_the_type_checker_sees_kernels_as_a_part_of_the_package(tmp_path: Path) -> None:
    links = tmp_path / "wslfast"
    links.mkdir()
    for path in (ROOT / "wslfast").iterdir():
        (links / path.name).symlink_to(path)
    (links / "kernels").symlink_to(ROOT / "kernels")
    user = tmp_path / "user.py"
    user.write_text(
        "from wslfast.kernels.layers import Conv2d\nimport wslfast\nwrong: str = wslfast.Architecture.cnn().num_weights\nreveal_type(Conv2d)\n"
    )
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", str(user)]
    out = subprocess.run(command, env=os.environ | {"MYPYPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True).stdout
    assert 'Incompatible types in assignment (expression has type "int", variable has type "str")' in out
    assert "wslfast.kernels.layers.Conv2d" in out


def test_the_makefile_names_tests_that_exist() -> None:
    root = Path(__file__).parents[1]
    named = re.findall(r"\btests/[\w./]+", (root / "Makefile").read_text())
    assert named
    assert [path for path in named if not (root / path).exists()] == []
