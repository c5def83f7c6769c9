"""Ablation files: mistakes in them, zoos they describe, names of their values."""

from __future__ import annotations

from pathlib import Path

import pytest
from ablation_cases import BASE, write

from wslfast import WslfastError
from wslfast.study.ablation_file import Ablation
from wslfast.study.ablations import run_ablation


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zoo = [", "ablation"),
        ("[axis]\nbeta = [1]", "zoo: expected"),
        ('zoo = "z"', r"either \[axis\]"),
        ('zoo = "z"\n[axis]\nbeta = [1]\n[variants.a]\nbeta = 1', r"either \[axis\]"),
        ('zoo = "z"\n[axis]\nbeta = 1', "axis: beta: expected a list"),
        ('zoo = "z"\n[axis]\nbeta = []', "axis: beta: expected a list"),
        ('zoo = "z"\n[axis]\nbeta = [1, 1]', "distinct values"),
        ('zoo = "z"\n[axis]\nbeat = [1]', "beat"),
        ('zoo = "z"\n[axis]\nbeta = [2]', "beta=2: beta: expected a number in"),
        ('zoo = "z"\n[axis]\nseed = [1]', "seed: not a setting to vary"),
        ('zoo = "z"\n[base]\nout = "x"\n[axis]\nbeta = [1]', "out: not a setting"),
        ('zoo = "z"\nseeds = []\n[axis]\nbeta = [1]', "seeds: expected distinct"),
        ('zoo = "z"\nseeds = [1, 1]\n[axis]\nbeta = [1]', "seeds: expected distinct"),
        ('zoo = "z"\nseeds = ["a"]\n[axis]\nbeta = [1]', "seeds: expected integers"),
        ('zoo = "z"\nseeds = 3\n[axis]\nbeta = [1]', "seeds: expected a list"),
        ('zoo = "z"\nsplit = "train"\n[axis]\nbeta = [1]', "split: expected"),
        ('zoo = "z"\nmodels = 0\n[axis]\nbeta = [1]', "models: expected a positive integer, got 0"),
        ('zoo = "z"\nclock = "sun"\n[axis]\nbeta = [1]', "clock: expected"),
        ('zoo = "z"\nseconds = 0\n[axis]\nbeta = [1]', "seconds: expected a positive"),
        ('zoo = "z"\nseconds = 9\n[base]\nschedule = "onecycle"\n[axis]\nbeta = [1]', "schedule: expected constant"),
        ('zoo = "z"\ncolour = 1\n[axis]\nbeta = [1]', "unknown keys"),
        ("[zoo]\nsize = 3\n[axis]\nbeta = [1]", "zoo: unknown keys"),
        ('zoo = "z"\n[variants]\na = 3', "variants: expected tables"),
        ('zoo = "z"\nvariants = 3', "variants: expected a dict"),
        ('zoo = "z"\n[variants.a]\nsemantics = 3', "semantics: expected a name"),
        ("seeds = [{a = 1}]\nzoo = 'z'\n[axis]\nbeta = [1]", "seeds: expected integers"),
        ("[zoo]\ndataset = 3\n[axis]\nbeta = [1]", "zoo: dataset: expected str"),
        ("[zoo]\nmodels = 2.5\n[axis]\nbeta = [1]", "zoo: models: expected int"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(WslfastError, match=words) as error:
        Ablation.from_toml(tmp_path / "bad.toml")
    assert "bad.toml" in str(error.value)


def test_what_only_running_can_tell_is_told_before_training(tmp_path: Path, zoo: Path) -> None:
    with pytest.raises(WslfastError, match="such file"):
        Ablation.from_toml(tmp_path / "no.toml")
    unknown = Ablation.from_toml(write(tmp_path / "a.toml", zoo, '[axis]\nsemantics = ["core", "greek"]'))
    with pytest.raises(WslfastError, match="semantics: expected one of"):
        run_ablation(unknown, tmp_path)
    absent = Ablation.from_toml(write(tmp_path / "a.toml", tmp_path / "none", "[axis]\nbeta = [1]"))
    with pytest.raises(WslfastError, match="none"):
        run_ablation(absent, tmp_path)
    for axis, words in (('query_set = ["data", "nofile.npz"]', "nofile.npz"), ('device = ["cpu", "cuda:99"]', "does not have it")):
        late = Ablation.from_toml(write(tmp_path / "a.toml", zoo, f"[axis]\n{axis}"))
        with pytest.raises(WslfastError, match=words):
            run_ablation(late, tmp_path)
    assert not (tmp_path / "cells").exists()


def test_a_zoo_that_a_file_describes_is_built_once(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        f'seeds = [0]\n[zoo]\ndataset = "digits"\nmodels = 10\nepochs = 1\n[base]\n{BASE}\n[axis]\nbeta = [1.0]\n'
    )
    run_ablation(Ablation.from_toml(tmp_path / "a.toml"), tmp_path / "out")
    (folder,) = (tmp_path / "out").glob("zoo-*")
    before = (folder / "manifest.json").stat().st_mtime_ns
    run_ablation(Ablation.from_toml(tmp_path / "a.toml"), tmp_path / "out")
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_values_that_are_told_apart_have_names_that_are(tmp_path: Path, zoo: Path) -> None:
    text = '[axis]\nlr = [1.2345678e-4, 1.2345679e-4]\nquery_set = ["my file.npz", "data"]'
    ablation = Ablation.from_toml(write(tmp_path / "a.toml", zoo, text))
    assert len(ablation.variants) == 4
    assert sorted({ablation.value(v).split("*")[1] for v in ablation.variants}) == ["data", "my_file.npz"]
