"""``state.pt``: the published training state, read and written both ways.

The published optimiser also lists the template network of its behavior loss, whose weights never get a gradient. Ours does not,
so those entries are left out when such a file is read, and put back (they have no state) for the published code to read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import WslfastError, require
from ..files import write_tensors
from ..safe.state import load_plain
from .behavior import DistillationLoss

State = dict[str, Any]


def load_state(path: str | Path, device: Any = "cpu") -> State:
    """The content of a ``state.pt`` (or of the folder that holds it): nothing in it is run, and its checksums are right.

    Raises:
        WslfastError: where there is no such file, or none that is plain tensors.
    """
    file = Path(path) / "state.pt" if Path(path).is_dir() else Path(path)
    require(file.is_file(), f"state: expected a file state.pt, got {str(file)!r}")
    try:
        state = load_plain(file, device)
    except WslfastError as error:
        raise WslfastError(f"state: expected tensors and plain containers in {error}") from None
    require(isinstance(state, dict) and "model" in state, f"state: expected a key 'model' in {str(file)!r}")
    return state


def save_model(module: Any, experiment_dir: str | Path) -> None:
    """``state.pt`` of an ``AEModule``, ours or the published one, as the published code reads it."""
    model = getattr(module.model, "module", module.model)  # DistributedDataParallel keeps it one level down
    state = {"model": model.state_dict(), "optimizer": with_template(module.optimizer.state_dict(), _template_sizes(module))}
    if getattr(module, "scheduler", None) is not None:
        state["scheduler"] = module.scheduler.state_dict()
    write_tensors(Path(experiment_dir) / "state.pt", state)


def load_model(module: Any, experiment_dir: str | Path) -> None:
    """Read ``state.pt`` into an ``AEModule``: the model, the optimiser unless ``reset_optimizer``, and the schedule if both have one."""
    state = load_state(experiment_dir, getattr(module, "device", "cpu"))
    model = getattr(module.model, "module", module.model)
    model.load_state_dict(state["model"])
    if not module.reset_optimizer:
        sizes = [len(group["params"]) for group in module.optimizer.param_groups]
        module.optimizer.load_state_dict(without_template(state["optimizer"], sizes))
    if state.get("scheduler") is not None and module.scheduler is not None:
        module.scheduler.load_state_dict(state["scheduler"])


def without_template(state: State, sizes: list[int]) -> State:
    """An optimiser state cut to groups of these sizes: the autoencoder's parameters come first in each, the template's last."""
    groups = state["param_groups"]
    came = [len(group["params"]) for group in groups]
    fits = len(came) == len(sizes) and all(a >= b for a, b in zip(came, sizes))
    require(fits, f"state: optimizer: expected groups of {sizes} parameters or more, got {came}")
    kept = [group["params"][:size] for group, size in zip(groups, sizes)]
    extra = {i for group, size in zip(groups, sizes) for i in group["params"][size:]}
    stateful = sorted(extra & set(state["state"]))
    require(not stateful, f"state: optimizer: parameters {stateful[:5]} beyond the autoencoder's have been trained")
    ids = {old: new for new, old in enumerate(i for params in kept for i in params)}
    return {
        **state,
        "state": {ids[old]: value for old, value in state["state"].items()},
        "param_groups": [{**group, "params": [ids[i] for i in params]} for group, params in zip(groups, kept)],
    }


def with_template(state: State, sizes: list[int]) -> State:
    """An optimiser state with so many stateless entries more at the end of each group."""
    if len(sizes) != len(state["param_groups"]):
        sizes = [sum(sizes)] if len(state["param_groups"]) == 1 else [0] * len(state["param_groups"])
    ids: dict[int, int] = {}
    groups, count = [], 0
    for group, more in zip(state["param_groups"], sizes):
        places = range(count, count + len(group["params"]))
        ids |= dict(zip(group["params"], places))
        count += len(places) + more
        groups.append({**group, "params": [*places, *range(count - more, count)]})
    return {**state, "state": {ids[old]: value for old, value in state["state"].items()}, "param_groups": groups}


def _template_sizes(module: Any) -> list[int]:
    """How many weights (decayed) and biases (not decayed) the template network of the behavior loss would add."""
    losses = [part for part in module.criterion.modules() if isinstance(part, DistillationLoss)]
    axes = [len(slot.shape) for loss in losses for slot in loss.architecture.parameters]
    return [sum(a >= 2 for a in axes), sum(a < 2 for a in axes)]
