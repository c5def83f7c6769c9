"""Plans that fold all norms of a chain at once: rows and gradients against their twin, the same rows under autograd."""

from __future__ import annotations

import pytest
import torch
from graph_oracle import close, rows_near
from segment_cases import CASES, found, traced

from wslfast.kernels.stacked.leaves import leaves_of
from wslfast.kernels.stacked.planned_fold import FoldPlan, can_be_planned
from wslfast.kernels.stacked.rows import rows_of

WHOLE = [name for name, case in CASES.items() if len(case.runs) == 1 and name not in ("tied convolutions", "unread output")]


@pytest.mark.parametrize("name", WHOLE)
def test_rows_and_their_gradient_are_those_of_autograd(name: str) -> None:
    module, arch, graph = traced(CASES[name])
    (segment,) = found(graph)
    assert can_be_planned(segment)
    weights = rows_near(module, arch, 5)  # float64
    leaf = weights.clone().requires_grad_()
    expected = rows_of(segment, {f"@w:{slot.name}": x for slot, x in zip(graph.slots, leaves_of(leaf, graph), strict=True)})
    slopes = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (slope,) = torch.autograd.grad(expected, leaf, slopes, materialize_grads=True)
    plan = FoldPlan(graph, segment)
    rows, saved = plan.fold(weights)
    out = torch.full_like(weights, torch.nan)
    plan.unfold(slopes, saved, out)
    close(rows, expected.detach(), 1e-6, "rows")  # eps is a float32
    close(out, slope, 1e-6, "gradient")


def test_a_models_rows_and_gradient_do_not_depend_on_the_others() -> None:
    module, arch, graph = traced(CASES["norms on both sides"])
    (segment,) = found(graph)
    weights, plan = rows_near(module, arch, 13).float(), FoldPlan(graph, segment)
    rows, saved = plan.fold(weights)
    slopes = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    out = torch.empty_like(weights)
    plan.unfold(slopes, saved, out)
    for part in (slice(0, 1), slice(12, 13), slice(2, 11)):
        mine, own = plan.fold(weights[part])
        assert torch.equal(mine, rows[part])
        alone = torch.empty_like(weights[part])
        plan.unfold(slopes[part], own, alone)
        assert torch.equal(alone, out[part])


def test_a_broken_model_breaks_nobody_else() -> None:
    module, arch, graph = traced(CASES["norm behind, no bias"])
    (segment,) = found(graph)
    weights, plan = rows_near(module, arch, 6).float(), FoldPlan(graph, segment)
    broken = weights.clone()
    broken[2] = torch.nan
    (rows, saved), (others, theirs) = plan.fold(weights), plan.fold(broken)
    slopes = torch.ones_like(rows)
    a, b = torch.empty_like(weights), torch.empty_like(weights)
    plan.unfold(slopes, saved, a)
    plan.unfold(slopes, theirs, b)
    good = [0, 1, 3, 4, 5]
    assert torch.equal(rows[good], others[good])
    assert torch.equal(a[good], b[good])
    assert others[2].isnan().any()


def test_a_parameter_that_two_layers_read_is_not_planned() -> None:
    _, _, graph = traced(CASES["tied convolutions"])
    assert not can_be_planned(found(graph)[0])
