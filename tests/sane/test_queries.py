"""The images that the published losses ask their networks about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loss_cases import case

from wslfast.errors import WslfastError
from wslfast.sane import (
    DistillationLoss,
    GammaContrastReconLoss,
    MaskedReconLoss,
)
from wslfast.sane.queries import Queries


def test_data_queries_are_the_images_a_fresh_loader_would_give(tmp_path: Path) -> None:
    checkpoint, params, *_ = case("CNN")
    images = torch.randn(23, 1, 28, 28)
    data = torch.utils.data.TensorDataset(images, torch.arange(23))
    torch.save({"trainset": data, "valset": data, "testset": data, "dataset_seed": 2020}, tmp_path / "dataset.pt")
    for dump in (tmp_path / "dataset.pt", str(tmp_path / "dataset.pt"), data, images, [(image, 0) for image in images]):
        for kind, n in (("data", 6), ("union", 3)):
            loss = DistillationLoss(checkpoint, params, kind, dump, 6)
            loader = torch.utils.data.DataLoader(data, batch_size=n, shuffle=True)
            for step in range(2):
                torch.manual_seed(step)
                mine = loss.generate_queries()
                torch.manual_seed(step)
                noise = [torch.rand(n, 1, 28, 28)] if kind == "union" else []
                assert torch.equal(mine, torch.cat([*noise, next(iter(loader))[0]]))
    assert DistillationLoss(checkpoint, params, "union", images, 5).n_queries == 3  # of each half
    torch.save({"trainset": torch.utils.data.Subset(data, [3, 5, 7])}, tmp_path / "split.pt")
    drawn = DistillationLoss(checkpoint, params, "data", tmp_path / "split.pt", 64).generate_queries()
    assert {float(image.sum()) for image in drawn} == {float(images[i].sum()) for i in (3, 5, 7)}


def test_settings_may_be_numpys() -> None:
    checkpoint, params, x, mask, p = case("CNN")
    plain, grid = (
        GammaContrastReconLoss(
            g, "mean", len(x) // 2, 0.1, beta=b, n_queries_distillation=n, reference_checkpoint=checkpoint, reference_params=params
        )
        for g, b, n in ((0.25, 0.5, 3), (np.float32(0.25), np.float32(0.5), np.int64(3)))
    )
    z = torch.randn(4, 5)
    values = []
    for loss in (plain, grid):
        torch.manual_seed(0)
        values.append(loss(z, z + 1, 1.1 * x, x, mask, p)["loss/loss"])
    assert values[0] == values[1]


class Unknown(torch.utils.data.TensorDataset):
    """A data set whose class is the script's own."""


def test_the_published_dump_of_several_data_sets_is_read(tmp_path: Path) -> None:
    """A ConcatDataset of Subsets whose indices are numpy arrays or ranges, as the multi-zoo script stores it."""
    sets = torch.utils.data
    pictures = [torch.rand(6, 1, 28, 28) for _ in range(2)]
    parts = [sets.TensorDataset(p, torch.zeros(6)) for p in pictures]
    file = tmp_path / "dump.pt"
    torch.save({"trainset": sets.ConcatDataset([sets.Subset(parts[0], np.array([4, 0])), sets.Subset(parts[1], range(1, 4))])}, file)
    found = Queries("data", 3, (1, 28, 28), file).images
    assert found is not None
    assert torch.equal(found, torch.cat([pictures[0][[4, 0]], pictures[1][1:4]]))


def test_bad_arguments_say_what_was_expected(tmp_path: Path) -> None:
    checkpoint, params, x, mask, p = case("CNN")
    other, _, *_ = case("LeNet5")
    (tmp_path / "noise.pt").write_bytes(b"no file of torch's")
    torch.save({"trainset": torch.utils.data.ConcatDataset([Unknown(torch.zeros(2))])}, tmp_path / "objects.pt")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"loss": "kl"}, "loss: expected one of"),
        ({"reduction": "none"}, "reduction: expected one of"),
        ({"queryset": "stl10"}, "queryset: expected one of"),
        ({"queryset": "data"}, "dump: expected"),
        ({"queryset": "data", "dump": tmp_path / "none.pt"}, "dump: expected a file"),
        ({"queryset": "data", "dump": tmp_path / "noise.pt"}, "dump: cannot be read from .*expected tensors, a TensorDataset"),
        ({"queryset": "data", "dump": tmp_path / "objects.pt"}, "dump: cannot be read from .*expected tensors, a TensorDataset"),
        ({"queryset": "data", "dump": iter([])}, "data set that can be indexed"),
        ({"queryset": "data", "dump": torch.randn(4, 3, 32, 32)}, r"dump: expected floating images \[Q, 1, 28, 28\]"),
        ({"n_queries": 0}, "n_queries: expected"),
        ({"semantics": "right"}, "'published' or 'corrected'"),
        ({"unmasked": True}, "expected a flag of"),
        ({"reference_params": params | {"model::type": "ResCNN"}}, "model::type: expected one of"),
        ({"reference_params": None}, "reference_params: expected"),
        ({"reference_checkpoint": other}, "reference_checkpoint: 'module_list"),
        ({"reference_params": {"model::type": "CNN", "model::nlin": "relu"}}, "model::channels_in"),
    ]
    for change, message in cases:
        with pytest.raises(WslfastError, match=message):
            DistillationLoss(**{"reference_checkpoint": checkpoint, "reference_params": params} | change)
    loss = DistillationLoss(checkpoint, params, n_queries=2)
    with pytest.raises(WslfastError, match="pos: expected the layers of all 48 tokens"):
        loss(x[:, :7], x[:, :7], mask[:, :7], p[:, :7])
    with pytest.raises(WslfastError, match="mask: expected the shape"):
        MaskedReconLoss("mean")(x, x, mask[:, :7])


def test_tokens_in_another_order_follow_their_positions() -> None:
    checkpoint, params, x, _, p = case("CNN3")
    queries = torch.randn(3, 3, 32, 32)
    plain = DistillationLoss(checkpoint, params).values(x * 1.2, x, queries, p)
    blocks = torch.cat([torch.arange(16, 93), torch.arange(16)])  # the layers' order changes, that within a layer does not
    moved = DistillationLoss(checkpoint, params).values((x * 1.2)[:, blocks], x[:, blocks], queries, p[:, blocks])
    assert torch.equal(plain, moved)
