"""The weight autoencoder: a transformer over a model's tokens (SANE, Schuerholt et al. 2024), and its linear start.

Attention runs over the tokens of one model, so what a model is encoded to does not depend on its neighbours in the batch.
Parameter names and order are those of the published ``gpt2`` variant, so its state dicts map one to one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import WslfastError, describe, require
from ..tokens import TokenLayout
from .activation_metric import Coordinates
from .linear import LinearCodec
from .token_groups import TokenGroups
from .transformer import PositionEmbedding, ProjectionHead, Transformer, Windows

STARTS = ("random", "linear", "paths")
COORDINATES = ("plain", "activation")
_STD = 0.02  # of every initial weight (the published recipe, GPT-2's)


class LinearPath(nn.Module):
    """The skip path of ``start="linear"`` and ``"paths"``: trainable maps, one matrix a token group, zero-padded.

    It works on tokens standardised by ``shift [G, D]`` and ``scale [G]`` (buffers), as the transformer does, so that one learning
    rate fits layers whose weights differ in size.
    """

    shift: Tensor
    scale: Tensor
    of_token: Tensor

    def __init__(self, groups: TokenGroups, token_size: int, latent: int) -> None:
        super().__init__()
        g = len(groups)
        self.groups = groups
        self.encoder = nn.Parameter(torch.zeros(g, token_size, latent))
        self.encoder_bias = nn.Parameter(torch.zeros(g, latent))
        self.decoder = nn.Parameter(torch.zeros(g, latent, token_size))
        self.decoder_bias = nn.Parameter(torch.zeros(g, token_size))
        self.register_buffer("shift", torch.zeros(g, token_size))
        self.register_buffer("scale", torch.ones(g))
        self.register_buffer("of_token", groups.of_token, persistent=False)

    @torch.no_grad()
    def fill(self, codec: LinearCodec, coordinates: Coordinates | None) -> None:
        """Become the code."""
        if coordinates is not None:  # w = t B + s, so z = (w - c) E = t B E + (s - c) E, and t = (z D + c - s) F
            off = (coordinates.shift - codec.center)[:, None].double()
            encoder, forward = codec.encoder.double(), coordinates.forward_map.double()
            self.encoder.copy_(coordinates.inverse_map.double() @ encoder)
            self.encoder_bias.copy_((off @ encoder)[:, 0])
            self.decoder.copy_(codec.decoder.double() @ forward)
            self.decoder_bias.copy_((-off @ forward)[:, 0])
            return
        self._standard(codec)
        scale = codec.scale.to(codec.encoder)[:, None, None]
        self.encoder.copy_(codec.encoder * scale)
        self.decoder.copy_(codec.decoder / scale)

    @torch.no_grad()
    def begin(self, codec: LinearCodec, coordinates: Coordinates | None) -> None:
        """Take the code's widths and, without coordinates that have their own, means and scales; random maps (normal, of variance
        1 / inputs)."""
        if coordinates is None:
            self._standard(codec)
        for group, size in enumerate(self.groups.sizes):
            width = int(codec.mask[self.of_token == group][0].sum())
            if width > 0:
                nn.init.normal_(self.encoder[group, :size, :width], std=size**-0.5)
                nn.init.normal_(self.decoder[group, :width, :size], std=width**-0.5)

    def _standard(self, codec: LinearCodec) -> None:
        self.shift.copy_(codec.center)
        self.scale.copy_(codec.scale)

    def standardise(self, tokens: Tensor) -> Tensor:
        """Tokens ``[k, T, D]`` about their group's mean row, in units of its standard deviation."""
        return (tokens - self.shift[self.of_token]) / self.scale[self.of_token].unsqueeze(-1)

    def restore(self, standard: Tensor) -> Tensor:
        """The inverse of :meth:`standardise`."""
        return standard * self.scale[self.of_token].unsqueeze(-1) + self.shift[self.of_token]

    def encode(self, standard: Tensor) -> Tensor:
        """``[k, T, D] -> [k, T, W]``."""
        # never in half precision: 1 % of error in the weights already costs agreement, and this path costs next to nothing
        with torch.autocast(standard.device.type, enabled=False):
            return self.groups.linear(standard, self.encoder) + self.encoder_bias[self.of_token]

    def decode(self, z: Tensor) -> Tensor:
        """``[k, T, W] -> [k, T, D]``, standardised."""
        with torch.autocast(z.device.type, enabled=False):
            return self.groups.linear(z, self.decoder) + self.decoder_bias[self.of_token]


class Autoencoder(nn.Module):
    """Transformer autoencoder of models as token sequences.

    Args:
        layout: how models become tokens; its mask and positions become buffers, so a state dict is complete.
        d_model, heads, layers: of the encoder and of the decoder each; 0 layers leave the linear maps alone.
        latent: numbers a token; default 64. With ``start="linear"`` the codec's width is used and ``latent`` is its upper bound.
        projection: size of the projection head's output.
        dropout: after the position embedding, in attention and after each branch.
        max_positions: sizes of the three position tables; default: what the layout needs.
        window: tokens that attend to each other; 0 is the whole sequence. Long sequences (a ResNet-18 has 39,000 tokens of 288 numbers)
            are cut into windows of this many consecutive tokens, as in SANE (Schuerholt et al. 2024); their activations are recomputed
            in the backward pass, so memory grows with a block of windows and not with the sequence.
        start: ``"random"``, the published initialisation, or ``"linear"``: at step 0 the autoencoder *is* ``codec``, and the
            transformer is a correction of latents and of tokens that starts at zero. A short training from random init shows the
            opposite of the paper; from a linear start it shows the paper's effect. ``"paths"`` is random, too: beside the transformer
            every layer of the networks has linear maps of its own, from its rows to their latents and back, and they begin random.
        codec: for ``start="linear"`` and ``"paths"``, fitted on the same layout. Latent numbers beyond its widths stay zero. ``"paths"``
            takes its widths and the layers' means and scales, and nothing else.
        coordinates: what the maps and the transformer see and make instead of weights
            (:meth:`~wslfast.codes.activation_metric.ActivationMetric.coordinates`); None: weights.

    Raises:
        WslfastError: naming the argument, what was expected and what came.
    """

    mask: Tensor
    positions: Tensor
    latent_mask: Tensor

    def __init__(
        self,
        layout: TokenLayout,
        *,
        d_model: int = 256,
        heads: int = 8,
        layers: int = 8,
        latent: int | None = None,
        projection: int = 30,
        dropout: float = 0.0,
        max_positions: tuple[int, int, int] | None = None,
        start: str = "random",
        codec: LinearCodec | None = None,
        window: int = 0,
        coordinates: Coordinates | None = None,
    ) -> None:
        super().__init__()
        require(start == "random" or codec is not None, f"codec: expected a LinearCodec for start={start!r}, got None")
        require(start != "random" or codec is None, f"codec: expected None for start={start!r}, got {describe(codec)}")
        if codec is not None:
            _check_codec(codec, layout)
            width = codec.mask.shape[1]
            require(latent is None or latent >= width, f"latent: expected None or at least the codec's width {width}, got {latent!r}")
            latent = width
        kind, width = "plain" if coordinates is None else "activation", 64 if latent is None else latent
        self._build(layout, d_model, heads, layers, width, projection, dropout, max_positions, start, window, kind)
        if coordinates is not None and self.coordinates is not None:
            self.coordinates.load_state_dict(coordinates.state_dict())
        if codec is not None:
            assert self.linear is not None
            if start == "linear":
                self.linear.fill(codec, coordinates)
            else:
                self.linear.begin(codec, coordinates)
            self.latent_mask.copy_(codec.mask)

    def _build(
        self,
        layout: TokenLayout,
        d_model: int,
        heads: int,
        layers: int,
        latent: int,
        projection: int,
        dropout: float,
        max_positions: tuple[int, int, int] | None,
        start: str,
        window: int = 0,
        coordinates: str = "plain",
    ) -> None:
        require(start in STARTS, f"start: expected one of {STARTS}, got {start!r}")
        require(coordinates in COORDINATES, f"coordinates: expected one of {COORDINATES}, got {coordinates!r}")
        for name, value in (("d_model", d_model), ("heads", heads), ("latent", latent), ("projection", projection)):
            require(isinstance(value, int) and value >= 1, f"{name}: expected a positive integer, got {value!r}")
        require(isinstance(layers, int) and layers >= 0, f"layers: expected a non-negative integer, got {layers!r}")
        require(isinstance(window, int) and window >= 0, f"window: expected a non-negative integer, got {window!r}")
        require(d_model % heads == 0 and d_model % 2 == 0, f"d_model: expected a multiple of 2 and of heads={heads}, got {d_model}")
        require(0 <= dropout < 1, f"dropout: expected a number in [0, 1), got {dropout!r}")
        positions = layout.positions.long()
        needed = tuple((positions.amax(0) + 1).tolist())
        sizes = needed if max_positions is None else tuple(max_positions)
        require(
            len(sizes) == 3 and all(s >= n for s, n in zip(sizes, needed, strict=True)),
            f"max_positions: expected at least {needed} for this layout, got {max_positions}",
        )
        self.layout, self.dropout = layout, dropout
        self._config = {
            "d_model": d_model,
            "heads": heads,
            "layers": layers,
            "latent": latent,
            "projection": projection,
            "dropout": dropout,
            "max_positions": list(sizes),
            "start": start,
            "window": window,
            **({} if coordinates == "plain" else {"coordinates": coordinates}),
        }
        t, d = layout.num_tokens, layout.token_size
        self._windows = Windows(t, window)
        self.register_buffer("mask", layout.mask.clone())
        self.register_buffer("positions", positions)
        self.register_buffer("latent_mask", torch.ones(t, latent, dtype=torch.bool))
        self.tokenizer = nn.Linear(d, d_model)
        self.transformer_encoder = Transformer(d_model, heads, layers, dropout)
        self.encoder_comp = nn.Linear(d_model, latent)
        self.detokenizer = nn.Linear(d_model, d)
        self.transformer_decoder = Transformer(d_model, heads, layers, dropout)
        self.decoder_comp = nn.Linear(latent, d_model)
        self.pe = PositionEmbedding(sizes, d_model)  # type: ignore[arg-type]
        self.projection_head = ProjectionHead(self._windows.size * latent, projection)
        self.linear = LinearPath(TokenGroups(layout), d, latent) if start != "random" else None
        self.coordinates = Coordinates(TokenGroups(layout), d) if coordinates == "activation" else None
        self._initialise(layers)

    @torch.no_grad()
    def _initialise(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.startswith("linear."):
                continue
            if name.endswith("c_proj.weight"):  # a sum of 2 * layers branches keeps its size
                nn.init.normal_(parameter, std=_STD / math.sqrt(2 * layers))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)  # LayerNorm weights are the other vectors; they start at one
        if self._config["start"] == "linear":
            for out in (self.encoder_comp, self.detokenizer):
                nn.init.zeros_(out.weight)

    # -- presets and persistence ---------------------------------------------------------------------------------------

    @classmethod
    def paper(cls, layout: TokenLayout, **changes: Any) -> Autoencoder:
        """The published size: d 256, 8 heads, 8 + 8 layers, 64 latent numbers a token; 13,035,485 parameters for CNN3."""
        positions = tuple(max(s, n) for s, n in zip((500, 50, 100), (layout.positions.amax(0) + 1).tolist(), strict=True))
        return cls(layout, **{"max_positions": positions} | changes)

    @classmethod
    def small(cls, layout: TokenLayout, codec: LinearCodec | None = None, **changes: Any) -> Autoencoder:
        """For a laptop's CPU: d 96, 4 heads, 2 + 2 layers; from a linear start if a codec is given."""
        preset = {"d_model": 96, "heads": 4, "layers": 2, "codec": codec, "start": "random" if codec is None else "linear"}
        return cls(layout, **preset | changes)

    def config(self) -> dict[str, Any]:
        """JSON-able sizes: with the layout and a state dict, all that :meth:`from_config` needs."""
        return dict(self._config)

    @classmethod
    def from_config(cls, layout: TokenLayout, config: Mapping[str, Any]) -> Autoencoder:
        """An autoencoder of :meth:`config`'s sizes, to load a state dict into: a linear start needs no codec here.

        Raises WslfastError for names that are no sizes.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        try:
            model._build(layout, **config)
        except TypeError as error:
            raise WslfastError(f"config: {error}") from None
        return model

    @property
    def latent_numbers(self) -> int:
        """Latent numbers a model, those masked to zero not counted (T * latent from a random start)."""
        return int(self.latent_mask.sum())

    # -- the maps ------------------------------------------------------------------------------------------------------

    def _embed_positions(self, x: Tensor) -> Tensor:
        return F.dropout(x + self.pe(self.positions), self.dropout, self.training)

    def encode(self, tokens: Tensor) -> Tensor:
        """``[k, T, D] -> z [k, T, latent]``. Padding is set to zero first, whatever it holds."""
        self._check("tokens", tokens, self.mask)
        tokens = torch.where(self.mask, tokens, 0)
        if self.coordinates is not None:
            tokens = self.coordinates(tokens)
        if self.linear is not None:
            tokens = self.linear.standardise(tokens)
        z = self.encoder_comp(self._windows.through(self.transformer_encoder, self._embed_positions(self.tokenizer(tokens))))
        if self.linear is not None:
            z = torch.where(self.latent_mask, self.linear.encode(tokens) + z, 0)
        return z

    def decode(self, z: Tensor, *, keep_padding: bool = False) -> Tensor:
        """``z [k, T, latent] -> tokens [k, T, D]``, padding zero unless it is to be kept (the published decoder's output)."""
        self._check("z", z, self.latent_mask)
        if self.linear is not None:
            z = torch.where(self.latent_mask, z, 0)
        tokens = self.detokenizer(self._windows.through(self.transformer_decoder, self._embed_positions(self.decoder_comp(z))))
        if self.linear is not None:
            tokens = self.linear.restore(self.linear.decode(z) + tokens)
        if self.coordinates is not None:
            tokens = self.coordinates.inverse(tokens)
        return tokens if keep_padding else torch.where(self.mask, tokens, 0)

    def project(self, z: Tensor) -> Tensor:
        """``z [k, T, latent] -> [k, projection]``, for the contrastive loss: the mean over windows."""
        count = self._windows.count
        return self.projection_head(self._windows.cut(z)).unflatten(0, (len(z), count)).mean(1) if count > 1 else self.projection_head(z)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``tokens [k, T, D] -> (z, reconstruction, projection)``."""
        z = self.encode(tokens)
        return z, self.decode(z), self.project(z)

    def embed(self, tokens: Tensor) -> Tensor:
        """One vector a model: z averaged over tokens, ``[k, T, D] -> [k, latent]``."""
        return self.encode(tokens).mean(1)

    @staticmethod
    def _check(name: str, value: Tensor, like: Tensor) -> None:
        require(
            isinstance(value, Tensor) and value.ndim == 3 and value.shape[1:] == like.shape and value.is_floating_point(),
            f"{name}: expected floating [k, {like.shape[0]}, {like.shape[1]}], got {describe(value)}",
        )


def _check_codec(codec: LinearCodec, layout: TokenLayout) -> None:
    require(isinstance(codec, LinearCodec), f"codec: expected a LinearCodec, got {describe(codec)}")
    require(codec.linear, f"codec: expected a linear one, whose maps are the same for every model, got {codec!r}")
    same = codec.layout.mask.shape == layout.mask.shape and torch.equal(codec.layout.index, layout.index)
    require(
        same and codec.architecture.parameters == layout.architecture.parameters,
        f"codec: fitted on {codec.layout!r}, expected the layout {layout!r}",
    )
