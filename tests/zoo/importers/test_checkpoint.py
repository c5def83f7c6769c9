"""What training scripts save around a network: trainers' entries, numbers beside it, names in tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_networks import SHAPE
from torch import Tensor, nn

from wslfast import Population, WslfastError, load_zoo
from wslfast.cli import main
from wslfast.zoo import Imported, import_zoo
from wslfast.zoo.importers.checkpoint import written


def _imported(folder: Path, saved: list[Any], **arguments: Any) -> Imported:
    (folder / "models").mkdir()
    for i, value in enumerate(saved):
        torch.save(value, folder / "models" / f"{i:03d}.ckpt")
    return import_zoo(folder / "models", folder / "zoo", network=f"{folder}/net.py:Net", input_shape=SHAPE, **arguments)


def _under(head: str, net: nn.Module) -> dict[str, Tensor]:
    return {f"{head}{name}": value for name, value in net.state_dict().items()}


def _equals(zoo: Population, nets: list[nn.Module]) -> bool:
    pairs = [(zoo.state_dict(i), net.state_dict()) for i, net in enumerate(nets)]
    return all(torch.equal(mine[s.name], theirs[s.name]) for mine, theirs in pairs for s in zoo.architecture.parameters)


@pytest.mark.parametrize(
    ("head", "beside"),
    [
        ("model.", {"criterion.weight": torch.ones(3)}),
        ("a.net.module.", {"accuracy.right": torch.tensor(3), "log": torch.ones(())}),
        ("model._orig_mod.", {"loss.scale": torch.ones(2)}),
    ],
)
def test_a_trainers_own_entries_lie_beside_the_network(tmp_path: Path, nets: list[nn.Module], head: str, beside: dict[str, Tensor]) -> None:
    _imported(tmp_path, [{"state_dict": {**_under(head, net), **beside}, "epoch": 3} for net in nets])
    assert _equals(load_zoo(tmp_path / "zoo"), nets)


def test_the_same_network_under_two_names_is_one(tmp_path: Path, nets: list[nn.Module]) -> None:
    _imported(tmp_path, [{"state_dict": {**_under("model.", net), **_under("compiled._orig_mod.", net)}} for net in nets])
    assert _equals(load_zoo(tmp_path / "zoo"), nets)


def test_of_two_networks_none_is_chosen(tmp_path: Path, nets: list[nn.Module]) -> None:
    saved = [{"state_dict": {**_under("model.", net), **_under("ema.", nets[0])}} for net in nets[1:]]
    with pytest.raises(WslfastError, match=r"several networks of these names and shapes, \['model', 'ema'\]"):
        _imported(tmp_path, saved)


def test_numbers_that_are_tensors_or_numpys_are_kept(tmp_path: Path, nets: list[nn.Module]) -> None:
    """As torch's own ImageNet example saves its accuracy."""
    saved = [
        {
            "state_dict": net.state_dict(),
            "epoch": torch.tensor(i),
            "best_acc1": torch.tensor([0.5 + i / 16]),
            "loss": np.float64(0.25 * i),
            "steps": np.int64(-(10**10)),
            "small": np.float32(1.5),
            "several": torch.ones(2),
        }
        for i, net in enumerate(nets)
    ]
    _imported(tmp_path, saved)
    table = load_zoo(tmp_path / "zoo").properties
    assert table["epoch"] == (0, 1, 2, 3, 4, 5)
    assert table["best_acc1"] == tuple(0.5 + i / 16 for i in range(6))
    assert table["loss"] == tuple(0.25 * i for i in range(6))
    assert (set(table["steps"]), set(table["small"])) == ({-(10**10)}, {1.5})
    assert "several" not in table


def test_parameters_with_attributes_in_a_pickled_module(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\ndef Net():\n return nn.Linear(4, 3)\n")
    net = nn.Linear(4, 3)
    net.weight.group = "decayed"  # type: ignore[attr-defined]
    (tmp_path / "models").mkdir()
    torch.save(net, tmp_path / "models" / "a.pt")
    import_zoo(tmp_path / "models", tmp_path / "zoo", network=f"{tmp_path}/net.py:Net", input_shape=(4,))
    assert torch.equal(load_zoo(tmp_path / "zoo").state_dict(0)["weight"], net.weight)


def test_names_of_files_are_no_numbers(tmp_path: Path, nets: list[nn.Module]) -> None:
    (tmp_path / "t.csv").write_text("score,file\n" + "".join(f"{i / 8},{i:03d}\n" for i in range(5)) + "9,\n8\n")
    done = _imported(tmp_path, [net.state_dict() for net in nets], table=tmp_path / "t.csv")
    assert load_zoo(tmp_path / "zoo").properties["score"] == (0.0, 0.125, 0.25, 0.375, 0.5, None)
    assert dict(done.skipped) == {"no file": 2, "not in the table": 1}


def test_the_shell_tells_notes_from_what_is_left_out(tmp_path: Path, nets: list[nn.Module], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "models").mkdir()
    for i, net in enumerate(nets):
        torch.save(net.state_dict(), tmp_path / "models" / f"{i}.pt")
    (tmp_path / "models" / "5.pt").write_bytes(b"nothing")
    (tmp_path / "t.csv").write_text("file,score\n0,1\n1,1\n9,1\n")
    common = ["--network", f"{tmp_path}/net.py:Net", "--input-shape", *map(str, SHAPE)]
    main(["zoo", "import", str(tmp_path / "models"), str(tmp_path / "zoo"), *common, "--table", str(tmp_path / "t.csv")])
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert {"note: 3 x not in the table", "note: 1 x no file", "skipped: 1 x unreadable checkpoint"} <= set(said)


def test_single_numbers_in_npz(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\nclass Net(nn.Module):\n"
        " def __init__(s):\n  super().__init__(); s.fc = nn.Linear(4, 3); s.scale = nn.Parameter(torch.ones(()))\n"
        " def forward(s, x):\n  return s.fc(x) * s.scale\n"
    )
    rng, shapes = np.random.default_rng(0), {"fc.weight": (3, 4), "fc.bias": (3,), "scale": ()}
    arrays = {name: rng.standard_normal(shape).astype(kind) for (name, shape), kind in zip(shapes.items(), ("<f4", ">f4", "f8"))}
    arrays["fc.weight"] = np.asfortranarray(arrays["fc.weight"])
    (tmp_path / "models").mkdir()
    np.savez(tmp_path / "models" / "a.npz", **arrays)
    import_zoo(tmp_path / "models", tmp_path / "zoo", network=f"{tmp_path}/net.py:Net", input_shape=(4,))
    state = load_zoo(tmp_path / "zoo").state_dict(0)
    assert all(np.array_equal(state[name].numpy(), value.astype("f4")) for name, value in arrays.items())


@pytest.mark.parametrize(("name", "expected"), [("net é", "net é"), ("caf\udce9", "caf\\xe9"), ("half \ud800", "half \\ud800"), ("", "")])
def test_names_are_written_as_utf_8_can_hold_them(name: str, expected: str) -> None:
    assert written(name) == expected
    assert written(name).encode().decode() == expected
