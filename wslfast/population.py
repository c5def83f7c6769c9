"""A population: the weights of k models of one architecture, stacked, with a table of what is known about each."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from types import MappingProxyType
from typing import Any, Union

import torch
from torch import Tensor, nn

from .architecture import Architecture
from .errors import WslfastError, describe, require
from .kernels.default_device import on_the_cpu
from .tracing import effective_state, prepared, queries_for, rebuilt

_ROWS = 8  # a notebook shows the first rows of a longer table
Column = tuple[Any, ...]
Index = Union[int, slice, Sequence[int], Sequence[bool], Tensor]


@dataclass(frozen=True, eq=False)
class Population:
    """Immutable stacked weights ``[k, P]`` (fp32) and one column of values per property.

    Attributes:
        architecture: what every model is.
        weights: ``[k, P]``, parameters in state-dict key order, C-order within each.
        properties: name -> tuple of k values (numbers, strings or None), e.g. ``test_acc``, ``epoch``, ``model``.
    """

    architecture: Architecture
    weights: Tensor
    properties: Mapping[str, Column] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arch = self.architecture
        require(isinstance(arch, Architecture), f"architecture: expected an Architecture, got {describe(arch)}")
        weights = self.weights
        plain = isinstance(weights, Tensor) and not weights.is_nested
        require(
            plain and weights.ndim == 2 and weights.shape[1] == arch.num_weights and weights.is_floating_point(),
            f"weights: expected floating [k, {arch.num_weights}] for architecture {arch.name!r}, got {describe(weights)}",
        )
        object.__setattr__(self, "weights", weights.detach().to(torch.float32, copy=True))  # nobody else can write into it
        table = {str(name): tuple(column) for name, column in self.properties.items()}
        for name, column in table.items():
            require(len(column) == len(weights), f"properties[{name!r}]: expected {len(weights)} values, got {len(column)}")
        object.__setattr__(self, "properties", MappingProxyType(table))

    def __reduce__(self) -> tuple[Any, ...]:  # pickled, copied and saved as what it is made of
        return Population, (self.architecture, self.weights, dict(self.properties))

    def __len__(self) -> int:
        return self.weights.shape[0]

    @on_the_cpu
    def __getitem__(self, index: Index) -> Population:
        """The models at ``index`` (an integer keeps a population of one; slices, masks and index lists as in torch)."""
        rows = torch.arange(len(self))
        try:
            chosen = rows[index if isinstance(index, (int, slice)) else torch.as_tensor(index, device="cpu")].reshape(-1)
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            raise WslfastError(f"population[{index!r}]: {error}") from None
        picked = chosen.tolist()
        columns = {name: tuple(column[i] for i in picked) for name, column in self.properties.items()}
        return Population(self.architecture, self.weights[chosen.to(self.weights.device)], columns)

    def __iter__(self) -> Iterator[Population]:
        return (self[j] for j in range(len(self)))

    def __repr__(self) -> str:
        return f"Population({self.architecture.name!r}, k={len(self)}, P={self.weights.shape[1]}, properties={list(self.properties)})"

    def _repr_html_(self) -> str:
        """In a notebook: what is known of the first models."""
        names, k = list(self.properties), len(self)
        rows = [[j, *(self.properties[name][j] for name in names)] for j in range(min(k, _ROWS))]
        caption = f"{k:,} models of {self.architecture.name!r}, {self.weights.shape[1]:,} weights each"
        return html_table(["", *names], rows, caption, k)

    def to(self, device: torch.device | str) -> Population:
        """The same population with its weights on ``device``."""
        return Population(self.architecture, self.weights.to(device), self.properties)

    @on_the_cpu
    def column(self, name: str) -> Tensor:
        """A numeric property as float64 ``[k]``; None becomes NaN. Raises WslfastError for unknown or textual ones."""
        require(name in self.properties, f"property {name!r} is unknown; known: {list(self.properties)}")
        try:
            return torch.tensor([float("nan") if v is None else float(v) for v in self.properties[name]], dtype=torch.float64)
        except (TypeError, ValueError):
            raise WslfastError(f"property {name!r} is not numeric: {self.properties[name][:3]}...") from None

    @classmethod
    @on_the_cpu
    def from_state_dicts(
        cls, architecture: Architecture, state_dicts: Sequence[Mapping[str, Tensor]], properties: Mapping[str, Sequence[Any]] | None = None
    ) -> Population:
        """The population of these state dicts, in any key order; step counters of batch norm are ignored. Raises WslfastError naming the
        key and the model that do not fit."""
        require(len(state_dicts) > 0, "state_dicts: expected at least one model, got none")
        weights = torch.empty(len(state_dicts), architecture.num_weights, dtype=torch.float32)
        for j, state in enumerate(state_dicts):
            require(isinstance(state, Mapping), f"state_dicts[{j}]: expected a mapping of names to tensors, got {describe(state)}")
            state = effective_state(state, architecture.known)
            constants = architecture.constants
            expected = architecture.slots.keys() | architecture.aliases.keys() | constants.keys()
            extra = [key for key in state if key not in expected and not str(key).endswith("num_batches_tracked")]
            remedy = "; of this parametrisation a state dict alone does not tell the weights: load it, and use Population.from_modules"
            said = remedy if any("parametrizations." in str(key) for key in extra) else ""
            require(not extra, f"state_dicts[{j}]: unknown keys {extra[:5]}; expected {list(architecture.slots)[:5]} ...{said}")
            for key in constants.keys() & state.keys():
                same = isinstance(state[key], Tensor) and torch.equal(state[key].cpu(), constants[key])
                require(same, f"state_dicts[{j}][{key!r}]: expected the architecture's own values, which all models share, got others")
            for slot in architecture.parameters:
                require(slot.name in state, f"state_dicts[{j}]: key {slot.name!r} is missing")
                value = state[slot.name]
                require(
                    isinstance(value, Tensor) and tuple(value.shape) == slot.shape,
                    f"state_dicts[{j}][{slot.name!r}]: expected {list(slot.shape)}, got {describe(value)}",
                )
                weights[j, slot.offset : slot.stop] = value.detach().reshape(-1).to("cpu", torch.float32)
            for key, name in architecture.aliases.items():
                tied = key not in state or state[key] is state[name] or torch.equal(state[key], state[name])
                require(tied, f"state_dicts[{j}][{key!r}]: expected the values of {name!r}, to which the architecture ties it")
        return cls(architecture, weights, {name: tuple(column) for name, column in (properties or {}).items()})

    @classmethod
    @on_the_cpu
    def from_modules(
        cls,
        modules: Sequence[nn.Module],
        input_shape: Sequence[int],
        properties: Mapping[str, Sequence[Any]] | None = None,
        *,
        output: str | int | None = None,
        name: str | None = None,
    ) -> Population:
        """A population of trained modules, all of one network; the modules are not changed.

        The first one is traced (:meth:`wslfast.Architecture.from_module`); each of the others has to answer as its row does.

        Args:
            modules: k modules in any mode, on any device. What they compute in evaluation mode counts.
            input_shape: of one query.
            properties: name -> k values, e.g. ``test_acc``.
            output: which part of the answer counts, for modules that return a tuple (a number) or a dict (a name).
            name: of the architecture; default: the class's.

        Raises:
            WslfastError: naming the module that is another network than the first one, or is none.
        """
        require(isinstance(modules, Sequence) and not isinstance(modules, nn.Module) and len(modules) > 0, _not_modules(modules))
        for j, module in enumerate(modules):
            require(isinstance(module, nn.Module), f"modules[{j}]: expected a torch.nn.Module, got {describe(module)}")
        architecture = Architecture.from_module(modules[0], input_shape, name, output=output)
        plain = [prepared(module, f"modules[{j}]", architecture.input_shape, output) for j, module in enumerate(modules)]
        states = [module.state_dict() for module in plain]
        try:
            population = cls.from_state_dicts(architecture, states, properties)
        except WslfastError as error:
            raise WslfastError(f"{str(error).replace('state_dicts[', 'modules[')}; all modules have to be of one network") from None
        queries = queries_for(plain[0], 3, architecture.input_shape)
        with torch.no_grad():
            for j, module in enumerate(plain):
                theirs, ours = module(queries.clone()), population.module(j)(queries.clone())
                fits = theirs.shape == ours.shape and torch.allclose(theirs.float(), ours.float(), rtol=1e-3, atol=1e-4, equal_nan=True)
                what = "another network than modules[0]: same parameters, other answers (an activation, a stride?)"
                require(fits, f"modules[{j}]: {what}; all modules have to be of one network")
        return population

    @on_the_cpu
    def module(self, model: int) -> nn.Module:
        """One model as a module in evaluation mode, with its weights: torch's own layers for a plain chain, one reference call an
        operation for any other network. Its state dict loads into the network that the population was made from, unless that computes
        its weights from others (weight norm, spectral norm): the rows hold what is computed."""
        if self.architecture.graph is not None:
            module = rebuilt(self.architecture.graph)
        else:
            module = copy.deepcopy(self.architecture.module)  # type: ignore[assignment]
        state = module.state_dict()
        module.load_state_dict({key: value for key, value in self.state_dict(model).items() if key in state})
        return module.to(self.weights.device).eval()

    @on_the_cpu
    def state_dict(self, model: int) -> dict[str, Tensor]:
        """One model's parameters by name, ready for ``module.load_state_dict`` (copies)."""
        row = self[model].weights[0]
        state = {s.name: row[s.offset : s.stop].reshape(s.shape).clone() for s in self.architecture.parameters}
        state |= {key: state[name].clone() for key, name in self.architecture.aliases.items()}
        state |= {key: value.clone() for key, value in self.architecture.constants.items()}
        statistics = [name for name in state if name.endswith("running_var")]
        if statistics:  # a batch norm that is loaded back expects its step counter
            state |= {name.replace("running_var", "num_batches_tracked"): torch.tensor(0) for name in statistics}
        return state

    def state_dicts(self) -> list[dict[str, Tensor]]:
        """Every model's parameters by name."""
        return [self.state_dict(j) for j in range(len(self))]


def _not_modules(value: Any) -> str:
    one = "; a single one goes into a list: [module]" if isinstance(value, nn.Module) else ""
    return f"modules: expected a list of at least one torch.nn.Module, got {describe(value)}{one}"


def unstack(weights: Tensor, architecture: Architecture) -> dict[str, Tensor]:
    """Views of rows of weights by parameter name: ``[k, P] -> {name: [k, *shape]}``."""
    return {s.name: weights[:, s.offset : s.stop].reshape(len(weights), *s.shape) for s in architecture.parameters}


def stack(parameters: Mapping[str, Tensor], architecture: Architecture) -> Tensor:
    """The inverse of :func:`unstack`, differentiable: ``{name: [k, *shape]} -> [k, P]``. Entries without weights are passed over."""
    parameters = {key: value for key, value in effective_state(parameters, architecture.known).items() if key not in architecture.constants}
    unknown = [key for key in parameters if key not in architecture.slots and not str(key).endswith("num_batches_tracked")]
    require(not unknown, f"parameters: unknown keys {unknown[:5]}; expected {list(architecture.slots)}")
    rows = []
    for slot in architecture.parameters:
        require(slot.name in parameters, f"parameters: key {slot.name!r} is missing")
        value = parameters[slot.name]
        require(
            isinstance(value, Tensor) and value.ndim == len(slot.shape) + 1 and tuple(value.shape[1:]) == slot.shape,
            f"parameters[{slot.name!r}]: expected [k, {', '.join(map(str, slot.shape))}], got {describe(value)}",
        )
        rows.append(value.reshape(len(value), slot.size))
    require(len({len(r) for r in rows}) == 1, f"parameters: models differ in number: {sorted({len(r) for r in rows})}")
    return torch.cat(rows, 1)


def html_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "", total: int | None = None) -> str:
    """An HTML table, as a notebook shows an object. If only the first of ``total`` rows are given, a last line says how many follow."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in columns)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(_cell(value))}</td>' for value in row)}</tr>" for row in rows)
    more = f'<tr><td colspan="{len(columns)}">… {total - len(rows):,} more</td></tr>' if total is not None and total > len(rows) else ""
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{lines}{more}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1 or abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)
