"""Which axes meet in layers with weights and in products, for the rules of ``following.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .names import Names
from .values import Value, moved

_GATES = {"lstm.input": 4, "gru.input": 3, "rnn_tanh.input": 1, "rnn_relu.input": 1}
NOTHING = torch.empty(1, 0, dtype=torch.long)  # what an axis of one place is called


class LayerRules:
    """One method a form of operation: arguments by name with values for tensors, and the shapes of the results, to values; None where the
    operation cannot be followed."""

    names: Names

    # -- parts of rules --------------------------------------------------------------------------------------------------

    def meet(self, *columns: Tensor) -> Tensor:
        """Names of places that are treated together, of axes of one size or of size 1, after their set has been made closed."""
        size = max(len(c) for c in columns)
        wide = [c for c in columns if len(c) == size and c.shape[1]]
        return self.names.close(torch.cat(wide, 1)) if wide else torch.empty(size, 0, dtype=torch.long)

    def along(self, columns: Tensor, *vectors: Value | None) -> Tensor:
        """The same of an axis and of the last axes of what is added or multiplied along it, where it is there."""
        return self.meet(columns, *(v.axes[-1] for v in vectors if v is not None and v.shape))

    def made(self, axes: Sequence[Tensor]) -> Value:
        """A value of these axes."""
        return Value(self.names, [len(columns) for columns in axes], axes)

    def places(self, size: int) -> Tensor:
        """Names of an axis whose order is kept."""
        return self.names.places(size).unsqueeze(1) if size > 1 else NOTHING

    def together(self, values: Sequence[Value]) -> Value:
        """A function of several tensors, number by number, after broadcasting."""
        if len(values) == 1:
            return values[0]
        rank = max(len(v.shape) for v in values)
        padded = [[NOTHING] * (rank - len(v.shape)) + v.axes for v in values]
        return self.made([self.meet(*columns) for columns in zip(*padded, strict=True)])

    def keep(self, columns: Tensor) -> None:
        """Keep the order of everything that an axis is called by."""
        self.names.fix_all(columns.T)

    # -- layers ------------------------------------------------------------------------------------------------------------

    def _linear(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        x, w = given["input"].axes, given["weight"].axes
        if len(w) != 2:
            return None
        self.meet(x[-1], w[1])
        return self.made([*x[:-1], self.along(w[0], given.get("bias"))])

    def _convolution(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        x, w, groups = given["input"], given["weight"], given.get("groups", 1)
        if len(x.shape) != len(w.shape):
            return None
        if groups == 1:
            self.meet(x.axes[1], w.axes[1])
            out = w.axes[0]
        else:
            group, each = self.names.new(groups), self.names.new(w.shape[0] // groups)
            self.meet(x.axes[1], _blocks(group, w.axes[1]))
            out = self.meet(w.axes[0], _blocks(group, each.unsqueeze(1)))
        return self._over(x, w, given, shapes, self.along(out, given.get("bias")))

    def _transposed(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        x, w, groups = given["input"], given["weight"], given.get("groups", 1)
        if len(x.shape) != len(w.shape):
            return None
        if groups == 1:
            self.meet(x.axes[1], w.axes[0])
            out = w.axes[1]
        else:
            group, each = self.names.new(groups), self.names.new(w.shape[0] // groups)
            self.meet(x.axes[1], w.axes[0], _blocks(group, each.unsqueeze(1)))
            out = _blocks(group, w.axes[1])
        return self._over(x, w, given, shapes, self.along(out, given.get("bias")))

    def _over(self, x: Value, w: Value, given: dict[str, Any], shape: tuple[int, ...], channels: Tensor) -> Value:
        """The outputs of a convolution: the order along an image is kept, but where each place is seen alone."""
        out = []
        for i in range(len(shape) - 2):
            numbers = [_of_axis(given.get(key, default), i) for key, default in (("stride", 1), ("padding", 0), ("output_padding", 0))]
            alone = w.shape[2 + i] == 1 and numbers[0] == 1 and numbers[1] in (0, "valid", "same") and numbers[2] == 0
            self.keep(w.axes[2 + i])
            if not alone:
                self.keep(x.axes[2 + i])
            out.append(x.axes[2 + i] if alone else self.places(shape[2 + i]))
        return self.made([x.axes[0], channels, *out])

    def _batch_norm(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        x = list(given["input"].axes)
        x[1] = self.along(x[1], *(given.get(key) for key in ("weight", "bias", "running_mean", "running_var")))
        return self.made(x)

    _instance_norm = _batch_norm

    def _group_norm(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        x, groups = list(given["input"].axes), given["num_groups"]
        each = self.names.new(len(x[1]) // groups)
        blocks = _blocks(self.names.new(groups), each.unsqueeze(1)) if groups > 1 else NOTHING
        x[1] = self.meet(self.along(x[1], given.get("weight"), given.get("bias")), blocks)
        return self.made(x)

    def _layer_norm(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        x, rank = list(given["input"].axes), len(given["normalized_shape"])
        scales = [given[key] for key in ("weight", "bias") if given.get(key) is not None]
        for axis in range(-rank, 0):
            x[axis] = self.meet(x[axis], *(scale.axes[axis] for scale in scales))
        return self.made(x)

    _rms_norm = _layer_norm

    def _prelu(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        x = list(given["self"].axes)
        if len(x) > 1:
            x[1] = self.along(x[1], given["weight"])
        return self.made(x)

    def _embedding(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        table = given["weight"].axes
        self.keep(table[0])
        return self.made([*given["indices"].axes, table[1]])

    def _recurrent(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        x, params = given["input"], list(given["params"])
        ways, gates = 2 if given["bidirectional"] else 1, _GATES[name]
        time = x.axes[0 if not given["batch_first"] else 1]
        self.keep(time)
        hidden, reaches = params[1].shape[0] // gates, shapes[0][-1] // ways
        each = (2 if given["has_biases"] else 0) + 2 + (reaches != hidden)
        states = list(given["hx"]) if name == "lstm.input" else [given["hx"]]
        features = x.axes[-1]
        last: list[list[Tensor]] = [[] for _ in states]
        for layer in range(given["num_layers"]):
            out = []
            for way in range(ways):
                first = (layer * ways + way) * each
                w_in, w_hidden, *rest = params[first : first + each]
                cells = self.names.new(hidden).unsqueeze(1)
                by_gate = torch.cat([self.names.places(gates).repeat_interleave(hidden).unsqueeze(1), cells.repeat(gates, 1)], 1)
                for part in (w_in, w_hidden, *rest[: 2 if given["has_biases"] else 0]):
                    self.meet(part.axes[0], by_gate if gates > 1 else cells)
                self.meet(w_in.axes[1], features)
                answer = cells
                if reaches != hidden:  # a projection of what the cells answer
                    self.meet(rest[-1].axes[1], cells)
                    answer = rest[-1].axes[0]
                self.meet(w_hidden.axes[1], answer)
                for at, state in enumerate(states):
                    mine = answer if at == 0 else cells
                    here = moved(self.names, _entry(layer * ways + way), [state], False)
                    self.meet(here.axes[-1], mine)
                    last[at].append(mine)
                out.append(answer)
            features = self._side_by_side(out)
        answers = self.made([*x.axes[:-1], features])
        return (answers, *(self._stacked(columns, shape) for columns, shape in zip(last, shapes[1:], strict=True)))

    def _side_by_side(self, parts: list[Tensor]) -> Tensor:
        """One axis made of several, told apart."""
        if len(parts) == 1:
            return parts[0]
        wide = max(p.shape[1] for p in parts)
        rows = torch.cat([torch.nn.functional.pad(p, (0, wide - p.shape[1]), value=-1) for p in parts])
        which = torch.cat([torch.full((len(p), 1), int(i)) for p, i in zip(parts, self.names.places(len(parts)), strict=True)])
        return torch.cat([rows, which], 1)

    def _stacked(self, columns: list[Tensor], shape: tuple[int, ...]) -> Value:
        """States ``[layers, 1, size]``, each layer's called in its own way."""
        values = [self.made([NOTHING, NOTHING, c]) for c in columns]
        return moved(self.names, torch.cat, values, True)  # type: ignore[no-any-return]

    # -- products ------------------------------------------------------------------------------------------------------------

    def _matmul(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        a, b = given["self"].axes, next(value for key, value in given.items() if key != "self").axes
        self.meet(a[-1], b[-2] if len(b) > 1 else b[0])
        rank = max(len(a), len(b)) - 2
        fronts = [[NOTHING] * (rank - len(x[:-2])) + x[:-2] for x in (a, b)]
        front = [self.meet(*columns) for columns in zip(*fronts, strict=True)] if rank > 0 else []
        return self.made([*front, *a[-2:-1], *(b[-1:] if len(b) > 1 else [])])

    def _addmm(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        left, right = (given[key] for key in (("mat1", "mat2") if name == "addmm" else ("batch1", "batch2")))
        return self.together([self._matmul("matmul", {"self": left, "other": right}, shapes), given["self"]])

    def _attention(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        q, k, v, mask = given["query"].axes, given["key"].axes, given["value"].axes, given.get("attn_mask")
        if given.get("enable_gqa") or not len(q) == len(k) == len(v):
            return None
        self.meet(q[-1], k[-1])
        seen, asked = self.meet(k[-2], v[-2]), q[-2]
        if given.get("is_causal"):
            self.keep(seen)
            self.keep(asked)
        scores = self.made([*(self.meet(*columns) for columns in zip(q[:-2], k[:-2], v[:-2], strict=True)), asked, seen])
        if mask is not None:
            scores = self.together([scores, mask])
        return self.made([*scores.axes[:-1], v[-1]])

    def einsum(self, equation: str, tensors: Sequence[Value]) -> Value | None:
        """A sum of products by its equation; every letter's axes meet."""
        inputs, arrow, output = equation.replace(" ", "").partition("->")
        terms = inputs.split(",")
        if "." in equation or not arrow or any(len(t) != len(v.shape) for t, v in zip(terms, tensors, strict=True)):
            return None
        by_letter: dict[str, list[Tensor]] = {}
        for term, value in zip(terms, tensors, strict=True):
            for letter, columns in zip(term, value.axes, strict=True):
                by_letter.setdefault(letter, []).append(columns)
        met = {letter: self.meet(*columns) for letter, columns in by_letter.items()}
        return self.made([met[letter] for letter in output])


def _blocks(group: Tensor, within: Tensor) -> Tensor:
    """Names of places in groups one after another: the group, and what the place in it is called."""
    outer = group.repeat_interleave(len(within)).unsqueeze(1)
    return torch.cat([outer, within.repeat(len(group), 1)], 1)


def _entry(i: int) -> Callable[[list[Tensor]], Tensor]:
    """Entry i of the first axis."""
    return lambda tensors: tensors[0].select(0, i)


def _of_axis(value: Any, i: int) -> Any:
    """What an argument says of axis i of an image."""
    return value if not isinstance(value, (list, tuple)) else value[i if len(value) > 1 else 0] if value else 1
