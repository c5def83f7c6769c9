"""FILE.py:NAME as research code has it: packages, modules beside it, settings that it changes, scripts."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from wslfast import WslfastError
from wslfast.zoo.importers.network_files import architecture_of, module_of

NET = "from torch import nn\n\n\nclass Net(nn.Linear):\n    def __init__(self, width=2):\n        super().__init__(3, width)\n"


@pytest.fixture(autouse=True)
def modules_of_this_test() -> Iterator[None]:
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    assert sys.path == path


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        file = folder / f"{name.replace('__', '/', 1) if not name.startswith('__') else name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.parametrize("code", ["from .layers import Net", "from layers_of_ours.layers import Net", "from layers import Net"])
@pytest.mark.parametrize("package", [True, False])
def test_what_a_file_imports_from_beside_it(tmp_path: Path, code: str, package: bool) -> None:
    folder = tmp_path / "layers_of_ours"
    write(folder, layers=NET, net=code + "\n", **({"__init__": ""} if package else {}))
    if not package and code.startswith("from layers_of_ours"):  # found where the command is given, as python -m finds it
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            assert isinstance(module_of("layers_of_ours/net.py:Net"), nn.Linear)
        return
    assert isinstance(module_of(f"{folder}/net.py:Net"), nn.Linear)


def test_a_package_in_a_package(tmp_path: Path) -> None:
    write(tmp_path / "outer_of_ours", __init__="", common=NET)
    write(tmp_path / "outer_of_ours" / "models", __init__="", net="from ..common import Net\n")
    assert isinstance(module_of(f"{tmp_path}/outer_of_ours/models/net.py:Net"), nn.Linear)


@pytest.mark.parametrize(
    "line",
    ["torch.set_default_dtype(torch.float64)", "torch.set_grad_enabled(False)", "torch.manual_seed(1)", "torch.set_default_device('meta')"],
)
def test_what_a_file_sets_is_undone(tmp_path: Path, line: str) -> None:
    write(tmp_path, net=f"import torch\n{line}\n{NET}")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    module_of(f"{tmp_path}/net.py:Net")
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.empty(0).device.type == "cpu"
    assert torch._C._len_torch_function_stack() == 0


def test_generators_of_gpus_are_kept_where_they_are_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {0: torch.arange(3), 1: torch.arange(4)}
    kept: dict[int, torch.Tensor] = {}
    for name, value in (
        ("is_initialized", lambda: True),
        ("device_count", lambda: 2),
        ("get_rng_state", states.__getitem__),
        ("set_rng_state", lambda state, device: kept.update({device: state})),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    write(tmp_path, net=NET)
    module_of(f"{tmp_path}/net.py:Net")
    assert kept == states


@pytest.mark.parametrize(
    ("code", "name", "says"),
    [
        ("raise SystemExit(2)", "Net", "if __name__ == '__main__'"),
        ("import nothing_of_that_name", "Net", "ModuleNotFoundError"),
        ("class Net(:", "Net", "SyntaxError"),
        (NET, "Nett", r"has no 'Nett'; its modules are \['Net'\]"),
        ("Net = 3", "Net", "expected a class or a function"),
        (NET.replace("width=2", "width"), "Net", "a function that gives the module will do"),
        (NET + "\ndef make():\n    return 3\n", "make", "expected a torch.nn.Module"),
    ],
)
def test_a_file_that_gives_no_network_is_one_error(tmp_path: Path, code: str, name: str, says: str) -> None:
    write(tmp_path, net=code)
    with pytest.raises(WslfastError, match=says):
        module_of(f"{tmp_path}/net.py:{name}")


def test_names_that_are_called(tmp_path: Path) -> None:
    more = "\nimport functools\nwide = functools.partial(Net, width=5)\nmade = Net(4)\n\n\ndef make():\n    return Net(6)\n"
    write(tmp_path, net=NET + more)
    widths = {name: architecture_of(f"{tmp_path}/net.py:{name}", (3,), None, None).output_shape for name in ("Net", "wide", "made", "make")}
    assert widths == {"Net": (2,), "wide": (5,), "made": (4,), "make": (6,)}


def test_a_part_of_an_answer_is_asked_for_with_the_flags_name(tmp_path: Path) -> None:
    write(tmp_path, net=NET + "\n    def forward(self, x):\n        return super().forward(x), x\n")
    with pytest.raises(WslfastError, match=re.escape("output= (--output)")):
        architecture_of(f"{tmp_path}/net.py:Net", (3,), None, None)
