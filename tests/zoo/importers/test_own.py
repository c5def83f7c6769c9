"""A zoo of one's own, from files: state dicts of any form, beside a table, the module by name; and back out."""

from __future__ import annotations

import copy
import csv
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from own_networks import NET, SHAPE, images, module, own_answers
from tolerances import FP32, FP32_DEEP, FP64
from torch import Tensor, nn

import wslfast
from wslfast import Population, WslfastError, load_zoo, save_zoo
from wslfast.cli import main
from wslfast.measure.reconstruction import compare
from wslfast.zoo import export_zoo, import_zoo, load_dataset, load_parts, read_manifest
from wslfast.zoo.importers.own import Table

# -- in ------------------------------------------------------------------------------------------------------------------


def _write(state: dict[str, Tensor], file: Path, form: str) -> Path:
    match form:
        case "bare":
            torch.save(state, file.with_suffix(".pth"))
        case "safetensors":
            safetensors.torch.save_file(state, file.with_suffix(".safetensors"))
        case "npz":
            np.savez(file.with_suffix(".npz"), **{k: v.numpy() for k, v in state.items()})  # type: ignore[arg-type]
        case "parallel":
            torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, file.with_suffix(".pt"))
        case "tar":
            torch.save({"state_dict": state, "epoch": 2, "best_acc1": 0.5}, file.with_suffix(".pth.tar"))
        case "compiled":
            torch.save({"model": {f"_orig_mod.{k}": v for k, v in state.items()}, "optimizer": {"lr": 0.1}}, file.with_suffix(".pt"))
        case "lightning":
            torch.save({"state_dict": {f"net.{k}": v for k, v in state.items()}, "hyper_parameters": {}}, file.with_suffix(".ckpt"))
        case _:
            torch.save({form: state}, file.with_suffix(".pt"))
    return file


@pytest.mark.parametrize(
    "form", ["bare", "safetensors", "npz", "tar", "parallel", "compiled", "lightning", "model", "state_dict", "model_state_dict", "params"]
)
def test_every_form_of_a_state_dict_is_read_to_the_bit(tmp_path: Path, nets: list[nn.Module], form: str) -> None:
    (tmp_path / "models").mkdir()
    for i, net in enumerate(nets):
        _write(net.state_dict(), tmp_path / "models" / f"net_{i}", form)
    done = import_zoo(tmp_path / "models", tmp_path / "zoo", network=f"{tmp_path}/net.py:Net", input_shape=SHAPE)
    zoo, x = load_zoo(tmp_path / "zoo"), torch.randn(5, *SHAPE)
    assert (done.rows, done.models, dict(done.skipped)) == (6, 6, {})
    assert zoo.properties["name"] == tuple(f"net_{i}" for i in range(6))
    for i, net in enumerate(nets):
        mine, theirs = zoo.state_dict(i), net.state_dict()
        assert set(mine) == set(theirs)
        for key in theirs:
            assert key.endswith("num_batches_tracked") or torch.equal(mine[key], theirs[key]), key
    torch.testing.assert_close(wslfast.batched_forward(zoo.weights, x, zoo.architecture), own_answers(nets, x), rtol=FP32_DEEP, atol=FP32)


def test_a_folder_without_networks_says_what_is_there(tmp_path: Path, nets: list[nn.Module]) -> None:
    (tmp_path / "models" / "deep").mkdir(parents=True)
    for name in ("a.onnx", "deep/b.h5", "deep/README"):
        (tmp_path / "models" / name).write_text("")
    with pytest.raises(WslfastError, match=r"end in \.pt, .*; there are \.h5, \.onnx, README"):
        import_zoo(tmp_path / "models", tmp_path / "zoo", network=f"{tmp_path}/net.py:Net", input_shape=SHAPE)


def test_a_pickled_module_is_read_and_not_run(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Sequential(nn.Tanh(), nn.Linear(5, 2)))
    (tmp_path / "m").mkdir()
    torch.save(net, tmp_path / "m" / "whole.pt")
    (tmp_path / "s.py").write_text(
        "from torch import nn\ndef make():\n return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Sequential(nn.Tanh(), nn.Linear(5, 2)))\n"
    )
    import_zoo(tmp_path / "m", tmp_path / "zoo", network=f"{tmp_path}/s.py:make", input_shape=(4,))
    state = load_zoo(tmp_path / "zoo").state_dict(0)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())


def test_four_commands_and_the_owners_accuracies(tmp_path: Path, nets: list[nn.Module], capsys: pytest.CaptureFixture[str]) -> None:
    """Import, train, evaluate, generate: from the files alone, nothing else; the accuracies are the owner's."""
    file = images(tmp_path)
    data = np.load(file)
    x, y = torch.from_numpy(data["test_images"]).float().div(255).unsqueeze(1), torch.from_numpy(data["test_labels"])
    right = (own_answers(nets, x).argmax(-1) == y).double().mean(1)
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8-sig") as table:
        rows = csv.writer(table)
        rows.writerow(["file", "test_acc", "lr", "note", "split", "width"])
        (tmp_path / "models").mkdir()
        for i, net in enumerate(nets):
            torch.save({"model_state_dict": net.state_dict(), "epoch": 7}, tmp_path / "models" / f"n{i}.pt")
            split = ("train", "train", "train", "val", "test", "test")[i]
            rows.writerow([f"n{i}.pt", float(right[i]), "1e-3", "" if i else "first", split, 4])
    zoo, run, out = (str(tmp_path / name) for name in ("zoo", "run", "generated"))
    command = ["zoo", "import", str(tmp_path / "models"), zoo, "--network", f"{tmp_path}/net.py:Net"]
    main([*command, "--table", str(tmp_path / "t.csv"), "--dataset", str(file)])
    main(["train", "--zoo", zoo, "--out", run, "--steps", "2", "--queries", "8", "--layers", "1", "--d-model", "16"])
    capsys.readouterr()
    main(["evaluate", "--run", run, "--json"])
    figures = json.loads(capsys.readouterr().out)["variants"]["run"]
    main(["generate", "--run", run, "--samples", "2", "--out", out])
    held = read_manifest(zoo)
    assert held.properties["epoch"] == (7,) * 6
    assert held.properties["lr"] == (1e-3,) * 6
    assert held.properties["width"] == (4,) * 6
    assert held.properties["note"] == ("first", *(None,) * 5)
    assert held.properties["split"] == ("train", "train", "train", "val", "test", "test")
    assert held.provenance["dataset"]["standardise"] is False
    assert figures["accuracy_original"] == pytest.approx(float(right[4:].mean()), abs=FP64)
    made = load_zoo(out)
    assert all(value is not None for value in made.properties["val_acc"])  # measured: the table has no val_acc


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"network": "net.py"}, "expected FILE.py:NAME"),
        ({"network": "no.py:Net"}, "no such file"),
        ({"network": "net.py:Nothing"}, r"has no 'Nothing'; its modules are \['Net', 'Tanh', 'Needs'\]"),
        ({"network": "net.py:number"}, "expected a class or a function"),
        ({"network": "net.py:Needs"}, "it is called without arguments"),
        ({"network": "broken.py:Net"}, "broken.py does not run: SyntaxError"),
        ({"input_shape": None}, "--dataset .* or --input-shape"),
        ({"input_shape": (3, 6, 6)}, "does not take the images"),
        ({"network": "net.py:wide"}, r"another architecture: 6.*fc.weight is \[3, 4\], expected \[5, 4\]"),
        ({"table": "net.py"}, "net.py"),
        ({"table": "bad.csv"}, "expected a column 'file'"),
        ({"dataset": "images.npz", "input_shape": None, "mean": (0.5,)}, "mean, std: expected both or neither"),
        ({"network": None, "input_shape": None}, r"no known network.*--network FILE.py:NAME"),
        ({"network": None}, r"input_shape: expected None without network= \(--network FILE.py:NAME\)"),
    ],
)
def test_a_mistake_is_one_clear_error(
    tmp_path: Path, nets: list[nn.Module], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    images(tmp_path)
    Path("models").mkdir()
    Path("broken.py").write_text("class Net(:")
    Path("bad.csv").write_text("name,acc\nn0.pt,1\n")
    for i, net in enumerate(nets):
        torch.save(net.state_dict(), Path("models") / f"n{i}.pt")
    arguments: dict[str, Any] = {"network": "net.py:Net", "input_shape": SHAPE} | change
    with pytest.raises(WslfastError, match=says):
        import_zoo("models", "zoo", **arguments)
    assert not Path("zoo").exists()


def test_a_broken_file_and_a_link_do_not_hide_what_the_others_need(tmp_path: Path, nets: list[nn.Module]) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a").symlink_to(tmp_path)
    (tmp_path / "models" / "b.pt").write_bytes(b"PK\x03\x04 not an archive")
    for i, net in enumerate(nets):
        torch.save(net.state_dict(), tmp_path / "models" / f"n{i}.pt")
    with pytest.raises(WslfastError, match=r"n0.pt: no known network .*--network FILE.py:NAME"):
        import_zoo(tmp_path / "models", tmp_path / "zoo")


def test_what_is_not_there_is_said(tmp_path: Path, nets: list[nn.Module]) -> None:
    (tmp_path / "models" / "deep").mkdir(parents=True)
    torch.save(nets[0].state_dict(), tmp_path / "models" / "a.pt")
    torch.save(nets[1].state_dict(), tmp_path / "models" / "deep" / "b.pt")
    torch.save(nets[3].state_dict(), tmp_path / "models" / "e.pt")
    torch.save({k: v for k, v in nets[2].state_dict().items() if k != "fc.bias"}, tmp_path / "models" / "c.pt")
    (tmp_path / "models" / "d.pt").write_bytes(b"PK\x03\x04 not an archive")
    (tmp_path / "models" / "notes.txt").write_text("not a network")
    (tmp_path / "t.csv").write_text("file;acc\na;0.5\ndeep/b.pt;0.25\nz.pt;1\n")
    done = import_zoo(tmp_path / "models", tmp_path / "zoo", network=f"{tmp_path}/net.py:Net", input_shape=SHAPE, table=tmp_path / "t.csv")
    assert done.rows == 3
    said = {(e["where"], e["reason"]) for e in json.loads((tmp_path / "zoo" / "skipped.json").read_text())}
    # a row is missed of what is read alone: what is broken has its own reason
    expected = {("c.pt", "another architecture"), ("d.pt", "unreadable checkpoint"), ("e.pt", "not in the table")}
    assert said == expected | {("z.pt", "no file")}
    zoo = load_zoo(tmp_path / "zoo")
    assert dict(zip(zoo.properties["name"], zoo.properties["acc"], strict=True)) == {"a": 0.5, "b": 0.25, "e": None}


def test_a_split_has_its_usual_names_and_no_other(tmp_path: Path) -> None:
    """A split under another name was passed over without a word, and its test models were trained on."""
    usual = {
        "train": "train",
        "Training": "train",
        "Val": "val",
        "validation": "val",
        "valid": "val",
        "TEST": "test",
        " testing ": "test",
        "": None,
    }
    rows = "".join(f"m{i},{name}\n" for i, name in enumerate(usual))
    (tmp_path / "t.csv").write_text("file,split\n" + rows)
    assert [row["split"] for row in Table.read(tmp_path / "t.csv").rows.values()] == list(usual.values())
    (tmp_path / "t.csv").write_text("file,split\nm0,train\nm1,foo\n")
    with pytest.raises(WslfastError, match=r"t\.csv: line 3: split: expected one of train, val, test, got 'foo'"):
        Table.read(tmp_path / "t.csv")


def test_checkpoints_of_one_model_stay_together(tmp_path: Path, nets: list[nn.Module]) -> None:
    (tmp_path / "models").mkdir()
    lines = ["file,model,epoch"]
    for i, net in enumerate(nets):
        torch.save(net.state_dict(), tmp_path / "models" / f"n{i}.pt")
        lines.append(f"n{i}.pt,run{i // 2},{10 * (i % 2)}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    settings: dict[str, Any] = {"network": f"{tmp_path}/net.py:Net", "input_shape": SHAPE, "table": tmp_path / "t.csv"}
    done = import_zoo(tmp_path / "models", tmp_path / "zoo", **settings)
    zoo = load_zoo(tmp_path / "zoo")
    assert (done.rows, done.models) == (6, 3)
    assert zoo.properties["model"] == (0, 0, 1, 1, 2, 2)
    assert zoo.properties["epoch"] == (0, 10) * 3
    assert zoo.properties["model_name"] == ("run0", "run0", "run1", "run1", "run2", "run2")
    assert all(a == b for a, b in zip(zoo.properties["split"][::2], zoo.properties["split"][1::2], strict=True))
    assert import_zoo(tmp_path / "models", tmp_path / "last", epochs=[10], **settings).rows == 3


def test_an_epoch_of_a_model_comes_in_once(tmp_path: Path, nets: list[nn.Module]) -> None:
    (tmp_path / "models").mkdir()
    for name, net in zip("abc", nets, strict=False):
        torch.save(net.state_dict(), tmp_path / "models" / f"{name}.pt")
    (tmp_path / "t.csv").write_text("file,model,epoch\na.pt,7,1\nb.pt,7,1\nc.pt,3,1\n")
    settings: dict[str, Any] = {"network": f"{tmp_path}/net.py:Net", "input_shape": SHAPE, "table": tmp_path / "t.csv"}
    done = import_zoo(tmp_path / "models", tmp_path / "zoo", **settings)
    assert (done.rows, done.models, done.skipped) == (2, 2, {"epoch twice": 1})
    assert load_zoo(tmp_path / "zoo").properties["name"] == ("a", "c")
    assert "a.pt is read" in (tmp_path / "zoo" / "skipped.json").read_text()


def test_an_epoch_counts_once_it_is_read(tmp_path: Path, nets: list[nn.Module]) -> None:
    """Of two files of one epoch the first was no such network, or had numbers that are none: the second is read."""
    (tmp_path / "models").mkdir()
    broken = {name: value * float("nan") for name, value in nets[0].state_dict().items()}
    for name, state in {"a": {"moments": torch.ones(3)}, "b": broken, "c": nets[0].state_dict(), "d": nets[1].state_dict()}.items():
        torch.save(state, tmp_path / "models" / f"{name}.pt")
    (tmp_path / "t.csv").write_text("file,model,epoch\na.pt,7,1\nb.pt,7,1\nc.pt,7,1\nd.pt,7,1\n")
    settings: dict[str, Any] = {"network": f"{tmp_path}/net.py:Net", "input_shape": SHAPE, "table": tmp_path / "t.csv"}
    done = import_zoo(tmp_path / "models", tmp_path / "zoo", **settings)
    assert done.rows == 1
    assert done.skipped == {"another architecture": 1, "not finite": 1, "epoch twice": 1}
    assert load_zoo(tmp_path / "zoo").properties["name"] == ("c",)


def test_models_are_numbered_within_their_network(tmp_path: Path, nets: list[nn.Module]) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "two.py").write_text("from torch import nn\n\ndef Flat(): return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))\n")
    flat = nn.Linear(torch.Size(SHAPE).numel(), 3)
    lines = ["file,model,epoch,network"]
    for i, net in enumerate(nets[:2]):
        torch.save(net.state_dict(), tmp_path / "models" / f"n{i}.pt")
        torch.save({f"1.{name}": value + i for name, value in flat.state_dict().items()}, tmp_path / "models" / f"f{i}.pt")
        lines += [f"n{i}.pt,{i},1,Net", f"f{i}.pt,{i},1,Flat"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    names = [f"{tmp_path}/net.py:Net", f"{tmp_path}/two.py:Flat"]
    done = import_zoo(tmp_path / "models", tmp_path / "zoo", network=names, input_shape=SHAPE, table=tmp_path / "t.csv")
    assert (done.rows, done.models, done.skipped) == (4, 4, {})


def test_a_name_that_is_no_text_is_escaped_and_a_pipe_is_left_alone(tmp_path: Path, nets: list[nn.Module]) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for i, net in enumerate(nets[:2]):
        torch.save(net.state_dict(), folder / f"{i}.pt")
    os.rename(folder / "1.pt", os.fsencode(folder) + b"/caf\xe9.pt")
    (folder / "broken.pt").write_bytes(b"nothing")
    os.rename(folder / "broken.pt", os.fsencode(folder) + b"/\xff.pt")
    os.mkfifo(folder / "pipe.pt")
    done = import_zoo(folder, tmp_path / "zoo", network=f"{tmp_path}/net.py:Net", input_shape=SHAPE)
    assert (done.rows, done.skipped) == (2, {"unreadable checkpoint": 1})
    assert load_zoo(tmp_path / "zoo").properties["name"] == ("0", "caf\\xe9")


def test_a_zoo_is_not_written_among_the_users_files(tmp_path: Path, nets: list[nn.Module]) -> None:
    (tmp_path / "models").mkdir()
    torch.save(nets[0].state_dict(), tmp_path / "models" / "n.pt")
    with pytest.raises(WslfastError, match="expected another folder than the source"):
        import_zoo(tmp_path / "models", tmp_path / "models" / ".", network=f"{tmp_path}/net.py:Net", input_shape=SHAPE)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["n.pt"]


# -- figures of a zoo without classes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["m{i}_epoch{e}.pt", "m{i}/epoch_{e}.pt", "epoch{e}/m{i}.pt", "m{i}/epoch={e:02}-step={s}-val_loss=0.{s}.ckpt"]
)
def test_names_that_differ_in_their_epoch_alone_are_one_models(tmp_path: Path, nets: list[nn.Module], form: str) -> None:
    for i, net in enumerate(nets):
        for e in (1, 2, 10):
            file = tmp_path / "models" / form.format(i=i, e=e, s=100 * e + i)
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({k: v + e for k, v in net.state_dict().items()}, file)
    done = import_zoo(tmp_path / "models", tmp_path / "zoo", network=f"{tmp_path}/net.py:Net", input_shape=SHAPE)
    assert (done.rows, done.models) == (3 * len(nets), len(nets))
    assert done.skipped == {"epoch read from the file's name": 3 * len(nets)}
    zoo = load_zoo(tmp_path / "zoo")
    held = zip(*(zoo.properties[name] for name in ("model", "epoch", "split")), strict=True)
    by_model: dict[int, list[tuple[int, str]]] = {}
    for model, epoch, split in held:
        by_model.setdefault(model, []).append((epoch, split))
    assert all(sorted(epoch for epoch, _ in own) == [1, 2, 10] and len({split for _, split in own}) == 1 for own in by_model.values())
    last = import_zoo(tmp_path / "models", tmp_path / "last", network=f"{tmp_path}/net.py:Net", input_shape=SHAPE, epochs=[10])
    assert last.rows == len(nets)


def test_epochs_that_are_not_there_are_named(tmp_path: Path, nets: list[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "models").mkdir()
    for i, net in enumerate(nets):
        torch.save(net.state_dict(), tmp_path / "models" / f"n{i}_epoch3.pt")
    settings: dict[str, Any] = {"network": f"{tmp_path}/net.py:Net", "input_shape": SHAPE}
    with pytest.raises(WslfastError, match=f"none of its {len(nets)} models has a checkpoint of epoch 7, 99"):
        import_zoo(tmp_path / "models", tmp_path / "zoo", epochs=[99, 7], **settings)
    assert import_zoo(tmp_path / "models", tmp_path / "zoo", epochs=[3, 99], **settings).rows == len(nets)
    assert "no model has a checkpoint of epoch 99" in caplog.text


def test_a_zoo_is_no_source(tmp_path: Path, nets: list[nn.Module]) -> None:
    (tmp_path / "models").mkdir()
    torch.save(nets[0].state_dict(), tmp_path / "models" / "n.pt")
    settings: dict[str, Any] = {"network": f"{tmp_path}/net.py:Net", "input_shape": SHAPE}
    import_zoo(tmp_path / "models", tmp_path / "zoo", **settings)
    with pytest.raises(WslfastError, match="it is a zoo already, and is read as it is"):
        import_zoo(tmp_path / "zoo", tmp_path / "again", **settings)


def test_names_with_numbers_are_models_of_their_own(tmp_path: Path, nets: list[nn.Module]) -> None:
    (tmp_path / "models").mkdir()
    for i, net in enumerate(nets):
        torch.save(net.state_dict(), tmp_path / "models" / f"deep{i}_step{i}.pt")
    done = import_zoo(tmp_path / "models", tmp_path / "zoo", network=f"{tmp_path}/net.py:Net", input_shape=SHAPE)
    assert done.models == len(nets)
    assert done.skipped == {}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["file,test_acc", "n0,85.5%"], r"line 2: test_acc: expected a number such as 0.855, got '85.5%'"),
        (["file,lr,accuracy", "n0,abc,0.5", "n1,0.1,high"], "line 3: accuracy: expected a number"),
        (["file;val_loss", "n0;0,5"], "line 2: val_loss: expected a number"),
        (["file,lr", "n0,0.1", "n0.pt,0.2"], "several rows are of the file n0.pt: n0.pt, n0"),
    ],
)
def test_a_table_that_would_mislead_is_refused(tmp_path: Path, nets: list[nn.Module], lines: list[str], says: str) -> None:
    (tmp_path / "models").mkdir()
    for i, net in enumerate(nets):
        torch.save(net.state_dict(), tmp_path / "models" / f"n{i}.pt")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    with pytest.raises(WslfastError, match=says):
        import_zoo(tmp_path / "models", tmp_path / "zoo", network=f"{tmp_path}/net.py:Net", input_shape=SHAPE, table=tmp_path / "table.csv")
    assert not (tmp_path / "zoo").exists()


def test_figures_without_classes() -> None:
    """PSNR against its definition; the nearest outputs identify; accuracies are undefined."""
    arch = wslfast.Architecture.siren(2, (8,), 1)
    torch.manual_seed(0)
    rows = arch.initial_weights(["default"] * 4, range(4))
    near, x = rows + 0.003 * torch.randn_like(rows), torch.rand(20, 2)
    o, r = (wslfast.batched_forward(w, x, arch).double() for w in (rows, near))
    result = compare(rows, near, x, None, arch)
    expected = 10 * torch.log10((o.max() - o.min()) ** 2 / (r - o).square().mean((1, 2)))
    assert result.psnr is not None
    torch.testing.assert_close(result.psnr, expected, rtol=FP32, atol=FP32_DEEP)
    far = (r[:, None] - o[None]).square().sum((2, 3))
    assert result.identified.tolist() == (far.argmin(1) == torch.arange(4)).double().tolist()
    assert result.summary()["accuracy_original"] is None
    assert result.summary()["agreement"] is None
    peak = compare(rows, near, x, None, arch, peak=2.0).psnr
    assert peak is not None
    torch.testing.assert_close(peak, 10 * torch.log10(4.0 / (r - o).square().mean((1, 2))), rtol=FP32, atol=FP32_DEEP)


# -- several architectures -----------------------------------------------------------------------------------------------


def test_networks_of_two_kinds_are_one_zoo_and_come_back(tmp_path: Path, nets: list[nn.Module]) -> None:
    torch.manual_seed(1)
    wide = [module("wide") for _ in range(3)]
    tanh = [module("Tanh") for _ in range(3)]
    (tmp_path / "models").mkdir()
    lines = ["file,network"]
    for kind, those in (("Net", nets), ("Tanh", tanh), ("wide", wide)):
        for i, net in enumerate(those):
            torch.save(net.state_dict(), tmp_path / "models" / f"{kind}{i}.pt")
            lines.append(f"{kind}{i},{kind}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    names = [f"{tmp_path}/net.py:{name}" for name in ("Net", "Tanh", "wide")]
    done = import_zoo(tmp_path / "models", tmp_path / "zoo", network=names, input_shape=SHAPE, table=tmp_path / "t.csv")
    assert (done.rows, len(done.architectures)) == (12, 3)
    parts, x = load_parts(tmp_path / "zoo"), torch.randn(4, *SHAPE)
    for (label, part), those in zip(parts.items(), (nets, tanh, wide), strict=True):
        answers = wslfast.batched_forward(part.weights, x, part.architecture)
        torch.testing.assert_close(answers, own_answers(those, x), rtol=FP32_DEEP, atol=FP32, msg=label)
    for form in ("state-dicts", "ray"):
        export_zoo(tmp_path / "zoo", tmp_path / form, format=form)
        import_zoo(tmp_path / form, tmp_path / f"back-{form}")
        back = load_parts(tmp_path / f"back-{form}")
        assert [len(p) for p in back.values()] == [len(p) for p in parts.values()]
        for one, other in zip(parts.values(), back.values(), strict=True):
            assert torch.equal(one.weights, other.weights)
            assert one.architecture.same_network(other.architecture)


# -- back out ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("form", ["state-dicts", "ray"])
def test_exports_come_back_with_what_is_known(tmp_path: Path, nets: list[nn.Module], form: str, named: bool) -> None:
    known = {"name": [*"uvwxyz"], "test_acc": [0.5] * 6, "lr": [1e-3] * 6, "colour": ["red", "blue"] * 3}
    known["split"] = ["train", "test", "train", "train", "val", "test"]
    population = Population.from_modules(nets, SHAPE, known)
    save_zoo(population, tmp_path / "zoo", dataset=images(tmp_path))
    export_zoo(tmp_path / "zoo", tmp_path / "out", format=form)
    import_zoo(tmp_path / "out", tmp_path / "back", **({"network": f"{tmp_path}/net.py:Net", "input_shape": SHAPE} if named else {}))
    back = load_zoo(tmp_path / "back")
    assert torch.equal(back.weights, population.weights)
    assert back.architecture.same_network(population.architecture)
    for name in known:
        assert back.properties[name] == tuple(known[name]), name


def test_ones_own_networks_in_trials(tmp_path: Path, nets: list[nn.Module]) -> None:
    """A ray tree of a network of one's own: --network says what the trials are of, --table what is known of each."""
    for i, net in enumerate(nets):
        for epoch in (1, 2):
            place = tmp_path / "tree" / f"trial_{i}" / f"checkpoint_{epoch:06d}"
            place.mkdir(parents=True)
            torch.save(net.state_dict() if epoch == 2 else module().state_dict(), place / "checkpoints")
        (tmp_path / "tree" / f"trial_{i}" / "params.json").write_text(json.dumps({"lr": 0.1 * i, "model": "mine"}))
    torch.save(module("wide").state_dict(), tmp_path / "tree" / "trial_5" / "checkpoint_000001" / "checkpoints")
    (tmp_path / "t.csv").write_text("file,acc,split\n" + "".join(f"trial_{i},{i},{'train' if i else 'test'}\n" for i in range(7)))
    arguments: dict[str, Any] = {"network": f"{tmp_path}/net.py:Net", "input_shape": SHAPE, "table": tmp_path / "t.csv"}
    done = import_zoo(tmp_path / "tree", tmp_path / "zoo", **arguments)
    assert (done.rows, done.skipped["another architecture"], done.skipped["no file"]) == (11, 1, 1)
    zoo = load_zoo(tmp_path / "zoo")
    assert zoo.architecture.name == "Net"
    assert zoo.properties["acc"] == tuple(i for i in range(6) for _ in range(2 - i // 5))
    assert zoo.properties["split"] == tuple("train" if i else "test" for i in zoo.properties["acc"])
    last = [row for row, epoch in enumerate(zoo.properties["epoch"]) if epoch == 2]
    assert torch.equal(zoo.weights[last], Population.from_modules(nets, SHAPE).weights)


def test_every_architecture_has_models_in_every_split(tmp_path: Path, nets: list[nn.Module]) -> None:
    """And they are called what they were named, functions of one class too."""
    (tmp_path / "net.py").write_text(NET + "def first():\n    return Net()\n\ndef resnet18():\n    return Tanh()\n")
    (tmp_path / "models").mkdir()
    names = {"first": "Net", "Tanh": "Tanh", "wide": "wide"}
    for name, kind in names.items():
        for i in range(6):
            torch.save(module(kind).state_dict(), tmp_path / "models" / f"{name}{i}.pt")
    (tmp_path / "t.csv").write_text("file,network\n" + "".join(f"{n}{i},{n}\n" for n in names for i in range(6)))
    files = [f"{tmp_path}/net.py:{name}" for name in names]
    for seed in range(4):
        import_zoo(tmp_path / "models", tmp_path / f"{seed}", network=files, input_shape=SHAPE, table=tmp_path / "t.csv", seed=seed)
        parts = load_parts(tmp_path / f"{seed}")
        assert list(parts) == ["Tanh", "first", "wide"]
        assert all(set(part.properties["split"]) == {"train", "val", "test"} for part in parts.values())
    import_zoo(tmp_path / "models", tmp_path / "other", network=f"{tmp_path}/net.py:resnet18", input_shape=SHAPE)
    assert load_zoo(tmp_path / "other").architecture.name == "Tanh"  # the name of a published network is that network's


# -- from Python ---------------------------------------------------------------------------------------------------------


def test_modules_there_and_back(nets: list[nn.Module]) -> None:
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
    population, x = Population.from_modules(nets, input_shape=SHAPE), torch.randn(3, *SHAPE)
    torch.testing.assert_close(
        torch.stack([population.module(i)(x) for i in range(6)]).detach(), own_answers(nets, x), rtol=FP32_DEEP, atol=FP32
    )
    assert all(net.training for net in nets)
    assert all(torch.equal(net.state_dict()[k], v) for net, state in zip(nets, before, strict=True) for k, v in state.items())
    with pytest.raises(WslfastError, match=r"modules\[6\].*another network"):
        Population.from_modules([*nets, module("Tanh")], input_shape=SHAPE)
    with pytest.raises(WslfastError, match=r"modules\[1\]: expected a torch.nn.Module"):
        Population.from_modules([nets[0], 3], input_shape=SHAPE)  # type: ignore[list-item]


def test_lists_given_to_a_call_are_errors_that_name_the_way(nets: list[nn.Module]) -> None:
    population, x = Population.from_modules(nets, input_shape=SHAPE), torch.randn(3, *SHAPE)
    rows: Any
    for rows, way in (
        (nets, "from_modules"),
        ([n.state_dict() for n in nets], "from_state_dicts"),
        (list(population.weights), "torch.stack"),
    ):
        with pytest.raises(WslfastError, match=way):
            wslfast.batched_forward(rows, x, population.architecture)


def test_what_a_zoo_is_made_of_pickles_copies_and_saves(tmp_path: Path, nets: list[nn.Module]) -> None:
    population = Population.from_modules(nets, SHAPE, {"test_acc": [0.1] * 6})
    data = load_dataset(images(tmp_path), SHAPE, standardise=False)
    manifest = save_zoo(population, tmp_path / "zoo", dataset=data)
    for copied in (pickle.loads(pickle.dumps(population)), copy.deepcopy(population)):
        assert torch.equal(copied.weights, population.weights)
        assert copied.properties == population.properties
        assert copied.architecture == population.architecture
    for again in (pickle.loads(pickle.dumps(data)), copy.copy(data)):
        assert torch.equal(again.test_images, data.test_images)
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    torch.save(population, tmp_path / "p.pt")
    assert torch.equal(torch.load(tmp_path / "p.pt", weights_only=False).weights, population.weights)
    assert max(map(len, map(repr, (manifest, population, data, population.architecture)))) < 400
