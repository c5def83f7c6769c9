"""Which architecture a published checkpoint is of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wslfast import Architecture, Population, WslfastError, load_zoo
from wslfast.zoo import export_zoo, import_zoo, save_zoo
from wslfast.zoo.importers.recognise import recognise


@pytest.mark.parametrize(
    "arch",
    [
        Architecture.cnn(), Architecture.cnn(3, "gelu", 0.2), Architecture.cnn2(), Architecture.cnn3(1, "tanh"), Architecture.lenet5(3, "silu", 0.1),
        Architecture.mlp(), Architecture.resnet18(width=8),
    ],
    ids=lambda a: a.name,
)  # fmt: skip
def test_architectures_are_recognised_from_their_config_and_shapes(tmp_path: Path, arch: Architecture) -> None:
    weights = 0.1 * torch.rand(2, arch.num_weights)
    save_zoo(Population(arch, weights, {"model": (0, 1), "epoch": (3, 3)}), tmp_path / "zoo", splits=("train", "test"), provenance={})
    export_zoo(tmp_path / "zoo", tmp_path / "ray")
    done = import_zoo(tmp_path / "ray", tmp_path / "back")
    assert done.architecture.to_dict() == arch.to_dict()
    assert torch.equal(load_zoo(tmp_path / "back").weights, weights)


def test_without_a_config_the_shapes_decide() -> None:
    for arch in (Architecture.cnn2(), Architecture.cnn3(), Architecture.lenet5(), Architecture.cnn(3)):
        shapes = {slot.name: slot.shape for slot in arch.parameters}
        assert recognise({}, shapes).to_dict() == arch.to_dict()
    with pytest.raises(WslfastError, match="no known network has these weights"):
        recognise({"model::type": "CNN"}, {"a.weight": (3, 4)})
