"""What is replaced in published packages: names, the signatures they must have, and what takes their place.

Packages of one name differ (the paper's code is a fork of SANE's), so a name may have several known forms; one with no
replacement is known and left alone. A form that is not known is drift, and nothing is replaced then.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..errors import require, say_once
from . import (
    autoencoder,
    behavior,
    checkpoints,
    losses,
    module,
    multizoo,
    package_sane,
    permutations,
    probe,
    queries,
    rebasin,
    sampling,
    state,
    structure,
)
from .semantics import Semantics
from .v2 import classes
from .v2 import surface as second

PACKAGES = ("shrp", "SANE", "mzsane", second.PACKAGE)
_STEP = "self, x_i, m_i, p_i, x_j, m_j, p_j"
_RECON = "self, reduction"
_GAMMA = "self, gamma, reduction, batch_size, temperature, contrast='simclr', z_var_penalty=0.0, z_norm_penalty=0.0"
_BEHAVIOR = "queryset='random', dump=None, n_queries=64, loss='l2'"
_PAPER_GAMMA = (
    f"{_GAMMA}, beta=0.1, loss_distillation='l2', temperature_distillation=2.0, queryset_distillation='random', queryset_dump=None, "
    "n_queries_distillation=64, reference_checkpoint=None, reference_params=None, lambda_=0.0"
)
_SOLVE = "self, z_train, prop_train, z_test, prop_test, z_val=None, prop_val=None, verbosity=0, return_reg=False"
_SAMPLE = (
    "ae_model, checkpoint_ref, repetitions, anchor_z, anchor_pos, anchor_w_shape, mode='individual', batch_size=0, "
    "return_new_anchor=True, reset_classifier=False, halo=False, halo_wse=156, halo_hs=64"
)


@dataclass(frozen=True)
class Form:
    """One known form of a name.

    Attributes:
        signatures: of the function, or of methods by name.
        ours: our class or function, or None if this form is left alone.
        unsupported: why ours cannot serve a call (its arguments bound by name), or None.
    """

    signatures: dict[str, str]
    ours: Any
    unsupported: Callable[[dict[str, Any]], str | None] = lambda _: None


_PROBE = "models.def_downstream_module."
_MULTIZOO_TOKENS = {
    "datasets.dataset_auxiliaries.tokenize_checkpoint": (
        Form({"": "checkpoint, tokensize, return_mask=True, ignore_bn=False, device='cpu'"}, multizoo.tokenize_checkpoint),
    ),
    "datasets.dataset_auxiliaries.tokens_to_checkpoint": (
        Form({"": "tokens, pos, reference_checkpoint, ignore_bn=False"}, multizoo.tokens_to_checkpoint),
    ),
}


@dataclass(frozen=True)
class Item:
    """One name of a loaded package, checked: ``drift`` says what is wrong with its signature, if anything."""

    package: str
    name: str
    holder: Any
    attribute: str
    original: Any
    replacement: Any
    drift: str | None = None


def _network(arguments: dict[str, Any]) -> str | None:
    if arguments.get("beta", 0.0) >= 1 - 1e-10:
        return None
    why = behavior.supports(arguments.get("reference_params"), arguments.get("reference_checkpoint"))
    kind = arguments.get("queryset_distillation", arguments.get("queryset"))
    return why or (None if kind in (None, "random") else queries.unreadable(arguments.get("queryset_dump", arguments.get("dump"))))


def _config(arguments: dict[str, Any]) -> str | None:
    return autoencoder.supports(arguments.get("config"))


def _contrast(paper: bool, name: str) -> Form:
    kind = getattr(losses if paper else package_sane, name)
    return Form({"__init__": "self, batch_size, temperature", "forward": "self, z_i, z_j"}, kind)


def _forms(paper: bool) -> dict[str, tuple[Form, ...]]:
    """Known forms by ``module.name``; ``paper`` is whether the package has the behavior loss."""
    pair = "self, output, target, mask"
    tokens = "tokens, pos, reference_checkpoint, ignore_bn=False"
    forms: dict[str, tuple[Form, ...]] = {
        "models.def_loss.MaskedReconLoss": (
            Form({"__init__": _RECON, "forward": f"{pair}, _"}, structure.MaskedReconLoss),
            Form({"__init__": _RECON, "forward": pair}, package_sane.MaskedReconLoss),
            Form({"__init__": f"{_RECON}, standardize=False, std_eps=0.0001", "forward": pair}, multizoo.MaskedReconLoss),
        ),
        "models.def_loss.DistillationLoss": (
            Form(
                {
                    "__init__": f"self, reference_checkpoint, reference_params, {_BEHAVIOR}, reduction='mean', temperature=2.0",
                    "forward": "self, output, target, _, pos",
                },
                behavior.DistillationLoss,
                _network,
            ),
        ),
        "models.def_loss.ReconDistillationLoss": (
            Form(
                {
                    "__init__": f"self, reference_checkpoint, reference_params, beta=0.1, reduction='mean', {_BEHAVIOR}, temperature=2.0",
                    "forward": f"{pair}, pos",
                },
                behavior.ReconDistillationLoss,
                lambda arguments: _network(arguments | {"beta": 0.0}),
            ),
        ),
        "models.def_loss.NT_Xent": (_contrast(paper, "NT_Xent"),),
        "models.def_loss.NT_Xent_pos": (_contrast(paper, "NT_Xent_pos"),),
        "models.def_loss.GammaContrastReconLoss": (
            Form({"__init__": _PAPER_GAMMA, "forward": "self, z_i, z_j, y, t, m, p, z, z_hat"}, losses.GammaContrastReconLoss, _network),
            Form({"__init__": _GAMMA, "forward": "self, z_i, z_j, y, t, m"}, package_sane.GammaContrastReconLoss),
            Form(
                {"__init__": f"{_GAMMA}, standardize_token=False, standardize_std_eps=0.0001", "forward": "self, z_i, z_j, y, t, m"},
                multizoo.GammaContrastReconLoss,
            ),
        ),
        "models.def_AE.AE": (
            Form(
                {
                    "__init__": "self, config",
                    "forward": "self, x, p, mask=None",
                    "forward_encoder": "self, x, p, mask=None",
                    "forward_decoder": "self, z, p, mask=None",
                    "forward_embeddings": "self, x, p",
                },
                autoencoder.AE,
                _config,
            ),
            Form({"__init__": "self, config", "forward": "self, x, p, mask=None, return_z_stats=False"}, None),
        ),
        "datasets.dataset_auxiliaries.tokenize_checkpoint": (
            Form({"": "checkpoint, tokensize, return_mask=True, ignore_bn=False"}, checkpoints.tokenize_checkpoint),
        ),
        "datasets.dataset_auxiliaries.tokens_to_recipe": (
            Form({"": "pos, reference_checkpoint, ignore_bn=False"}, checkpoints.tokens_to_recipe),
        ),
        "datasets.dataset_auxiliaries.tokens_to_checkpoint": (
            Form({"": f"{tokens}, recipe=None"}, checkpoints.tokens_to_checkpoint),
            Form({"": tokens}, checkpoints.tokens_to_checkpoint_without_batchnorm),
        ),
        "git_re_basin.git_re_basin.apply_permutation": (Form({"": "ps, perm, params"}, permutations.apply_permutation),),
        "git_re_basin.git_re_basin.weight_matching": (
            Form({"": "ps, params_a, params_b, max_iter=100, init_perm=None"}, rebasin.weight_matching),
        ),
        "datasets.augmentations.precompute_permutations": (
            Form(
                {"": "ref_checkpoint, permutation_number, perm_spec, tokensize, ignore_bn, num_threads=6"},
                permutations.precompute_permutations,
            ),
        ),
        "datasets.augmentations.permute_model_vector": (Form({"": "wdx, idx_start, window, perm"}, permutations.permute_model_vector),),
        "sampling.sample_models.sample_models": (Form({"": _SAMPLE}, sampling.sample_models),),
        "models.def_downstream_module.DownstreamTaskLearner.compute_closed_form_solution": (
            Form({"": _SOLVE}, probe.DownstreamTaskLearner.compute_closed_form_solution),
        ),
    }
    if paper:
        methods = {
            "train_step": (_STEP, module.train_step),
            "test_step": (_STEP, module.test_step),
            "save_model": ("self, experiment_dir", state.save_model),
            "load_model": ("self, experiment_dir", state.load_model),
        }
        forms |= {f"models.def_AE_module.AEModule.{name}": (Form({"": signature}, ours),) for name, (signature, ours) in methods.items()}
    return forms


def surface_of(package: str, semantics: Semantics, strict: bool) -> list[Item]:
    """Every name of the package that is loaded, and not ours already; a package without published modules has none."""
    if package == second.PACKAGE:
        known: dict[str, tuple[Form, ...]] = {name: (Form({"": signature}, ours),) for name, (signature, ours) in second.TABLE.items()}
        return _items(package, known, semantics, strict) if second.is_loaded() else []
    forms = _forms(_is_paper(package))
    if _is_multizoo(package):  # its tokens leave running statistics out; what else handles tokens stays its own
        forms = {name: known for name, known in forms.items() if name.startswith(("models.def_loss.", "git_re_basin.", _PROBE))}
        forms |= _MULTIZOO_TOKENS
    return _items(package, forms, semantics, strict)


def additions() -> list[tuple[ModuleType, str, Any]]:
    """Classes of ours for loaded modules that lack them: ``(module, name, class)``."""
    home = _loaded(f"{second.PACKAGE}.loss")
    if home is None or not second.is_loaded():
        return []
    return [(home, name, classes.class_of(name)) for name in classes.LOSSES if name not in vars(home)]


def _is_multizoo(package: str) -> bool:
    loss, tokens = _loaded(f"{package}.models.def_loss"), _loaded(f"{package}.datasets.dataset_auxiliaries")
    named = (getattr(loss, "GammaContrastReconLoss", None), "standardize_token"), (getattr(tokens, "tokenize_checkpoint", None), "device")
    return any(thing is not None and parameter in inspect.signature(thing).parameters for thing, parameter in named)


def _is_paper(package: str) -> bool:
    loss, training = (_loaded(f"{package}.models.{name}") for name in ("def_loss", "def_AE_module"))
    if loss is not None:
        return hasattr(loss, "DistillationLoss")
    if training is not None and hasattr(training, "AEModule"):
        return "reference_params" in inspect.signature(training.AEModule.__init__).parameters
    return package == "shrp"


def _loaded(name: str) -> ModuleType | None:
    """A module that has been imported to its end."""
    loaded = sys.modules.get(name)
    if loaded is None or getattr(getattr(loaded, "__spec__", None), "_initializing", False):
        return None
    return loaded


def _items(package: str, forms: dict[str, tuple[Form, ...]], semantics: Semantics, strict: bool) -> list[Item]:
    out = []
    for name, known in forms.items():
        path, attribute = name.rsplit(".", 1)
        holder: Any = _loaded(f"{package}.{path}")
        if holder is None:  # a method: its class is one level up
            outer, _, kind = path.rpartition(".")
            holder = getattr(_loaded(f"{package}.{outer}"), kind, None)
        original = None if holder is None else vars(holder).get(attribute)
        if original is None or getattr(original, "_wslfast", False):
            continue
        form, wrong = _match(original, known)
        if form is None:
            out.append(Item(package, name, holder, attribute, original, None, f"{name}: {wrong}"))
        elif form.ours is not None:
            replacement = _replacement(original, form, semantics, strict)
            out.append(Item(package, name, holder, attribute, original, replacement))
    return out


def _match(original: Any, forms: tuple[Form, ...]) -> tuple[Form | None, str]:
    wrong = ""
    for form in forms:
        for method, expected in form.signatures.items():
            thing = getattr(original, method, None) if method else original
            came = "nothing" if thing is None else _text(thing)
            if came != expected:
                wrong = wrong or f"{method or 'it'}({came}), expected ({expected})"
                break
        else:
            return form, ""
    return None, wrong


def _text(function: Any) -> str:
    """Names and defaults, in order; annotations do not matter."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return "no signature"
    kind = inspect.Parameter
    stars: dict[Any, str] = {kind.VAR_POSITIONAL: "*", kind.VAR_KEYWORD: "**", kind.KEYWORD_ONLY: "keyword "}
    return ", ".join(stars.get(p.kind, "") + p.name + ("" if p.default is p.empty else f"={p.default!r}") for p in parameters)


# -- what takes their place --------------------------------------------------------------------------------------------


def _replacement(original: Any, form: Form, semantics: Semantics, strict: bool) -> Any:
    """A class or function of its own, so that undoing can tell it from ours, which scripts may have imported, too."""
    if not isinstance(original, type):
        ours, wanted = form.ours, inspect.signature(form.ours).parameters
        more = {name: value for name, value in {"semantics": semantics, "original": original}.items() if name in wanted}

        def replacement(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs, **more)

        return _like(replacement, original)

    class Replacement(form.ours, metaclass=_Standing):  # type: ignore[misc, name-defined]
        _original, _unsupported, _strict = original, staticmethod(form.unsupported), strict

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"semantics": semantics} | kwargs)

    Replacement.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return _like(Replacement, original)


class _Standing(type):
    """Makes a class of ours stand for a published one: for its objects, its attributes, and for calls that only it can serve."""

    _original: type
    _strict: bool

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """An object of ours, or the original's where ours does not serve; copying and unpickling do not come this way."""
        if "_original" in vars(cls):  # subclasses, which scripts make, are of ours
            original = cls._original
            reason = cls._unsupported(_bound(original, args, kwargs))
            if reason is not None:
                require(not cls._strict, f"{original.__name__} (strict=True): {reason}")
                say_once(f"wslfast.sane: {original.__module__}.{original.__name__} stays the original: {reason}")
                return original(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def __instancecheck__(cls, thing: Any) -> bool:
        """Objects made before the patch, and those that the original made since, are of the published name, too."""
        return super().__instancecheck__(thing) or ("_original" in vars(cls) and isinstance(thing, cls._original))

    def __getattr__(cls, name: str) -> Any:
        """Class attributes that ours lacks are read off the original: objects made before the patch may look them up by name."""
        if name.startswith("__") or name == "_original":
            raise AttributeError(name)
        return getattr(cls._original, name)


def _like(new: Any, original: Any) -> Any:
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(new, name, getattr(original, name))
    new._wslfast = True
    return new


def _bound(original: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults included; a call that does not fit is left for the constructor to refuse."""
    try:
        bound = inspect.signature(original).bind(*args, **kwargs)
    except TypeError:
        return dict(kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
