"""The published autoencoder, configured by its config keys: same parameters, names, order and initial values from a seed.

The ``pytorch`` type is a stack of ``nn.TransformerEncoderLayer`` fed batch-first data as if it were sequence-first: published,
attention runs over the models of a batch at one token position. The ``gpt2`` type is the core's transformer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..codes.transformer import ProjectionHead, Transformer
from ..errors import WslfastError, describe, require
from .feedforward import feed_forward
from .semantics import Choice, resolve

TYPES = ("pytorch", "gpt2")
_STD = 0.02
_PROJECTION = 30
_SIZES = {
    "ae:i_dim": 1,
    "ae:d_model": 2,
    "ae:nhead": 1,
    "ae:num_layers": 0,
    "ae:lat_dim": 1,
    "training::windowsize": 1,
}  # the least of each
_DECODER_DROPOUT = 0.1  # torch's default: the published decoder does not pass its own
# keys of forks that change the network; they are not built here
_FOREIGN = (
    "ae:weight_init_type",
    "ae:aggregate_embeddings",
    "ae:pos_emb_type",
    "ae:num_pos_buckets",
    "ae:use_relative_pos",
    "ae:use_layer_embs",
    "ae:use_layer_embs_enc_only",
    "ae:decoder:use_hidden_layer",
    "ae:decoder:use_skip_connection",
)
_HARMLESS = {"ae:weight_init_type": "normal", "ae:aggregate_embeddings": "mean"}


class PositionEmbs(nn.Module):
    """Learned positions: ``concat(E1[token] + E2[layer], E3[channel])``, or ``concat(E1, E2)`` for two tables; added to the input."""

    def __init__(self, max_positions: Any = (48, 256), embedding_dim: int = 128) -> None:
        super().__init__()
        require(len(max_positions) in (2, 3), f"ae:max_positions: expected two or three sizes, got {max_positions!r}")
        self.max_positions, self.embedding_dim = list(max_positions), embedding_dim
        self.pe1 = nn.Embedding(max_positions[0], embedding_dim // 2)
        self.pe2 = nn.Embedding(max_positions[1], embedding_dim // 2)
        self.pe3 = nn.Embedding(max_positions[2], embedding_dim // 2) if len(max_positions) == 3 else None

    def forward(self, inputs: Tensor, pos: Tensor) -> Tensor:
        """``inputs [k, T, d]``, ``pos [k, T, 2 or 3]`` of any integer type."""
        expected = (*inputs.shape[:2], len(self.max_positions))
        require(inputs.ndim == 3 and tuple(pos.shape) == expected, f"p: expected positions {list(expected)}, got {describe(pos)}")
        pos = pos.long()
        first, second = self.pe1(pos[:, :, 0]), self.pe2(pos[:, :, 1])
        parts = [first, second] if self.pe3 is None else [first + second, self.pe3(pos[:, :, 2])]
        return inputs + torch.cat(parts, 2)


class AE(nn.Module):
    """Autoencoder of token sequences, from the published config keys.

    Args:
        config: ``ae:i_dim`` (201), ``ae:d_model`` (512), ``ae:nhead`` (8), ``ae:num_layers`` (6), ``ae:lat_dim`` (16),
            ``ae:dropout`` (0), ``ae:max_positions`` ([48, d]), ``ae:transformer_type`` ("pytorch" or "gpt2"),
            ``training::windowsize`` (16, the projection head's T).
        semantics, flags: see :class:`~wslfast.sane.semantics.Semantics`; ``batch_attention`` and ``decoder_dropout`` matter here.

    Raises:
        WslfastError: naming the key, what was expected and what came.
    """

    def __init__(self, config: Mapping[str, Any], *, semantics: Choice = "published", **flags: bool) -> None:
        super().__init__()
        self.semantics = resolve(semantics, flags)
        _check(config)
        d = config.get("ae:d_model", 512)
        heads, layers, latent = config.get("ae:nhead", 8), config.get("ae:num_layers", 6), config.get("ae:lat_dim", 16)
        window, i_dim = config.get("training::windowsize", 16), config.get("ae:i_dim", 201)
        dropout, kind = float(config.get("ae:dropout", 0.0) or 0.0), config.get("ae:transformer_type", "pytorch")
        self.transformer_type = kind

        def stack(p: float) -> nn.Module:
            if kind == "gpt2":
                return Transformer(d, heads, layers, dropout)
            layer = nn.TransformerEncoderLayer(d_model=d, nhead=heads, dropout=p)
            return nn.TransformerEncoder(layer, num_layers=layers, enable_nested_tensor=False)

        # in this order the seed gives the published initial values
        self.tokenizer = nn.Linear(i_dim, d)
        self.transformer_encoder = stack(dropout)
        self.encoder_comp = nn.Linear(d, latent)
        self.detokenizer = nn.Linear(d, i_dim)
        self.transformer_decoder = stack(_DECODER_DROPOUT if self.semantics.decoder_dropout else dropout)
        self.decoder_comp = nn.Linear(latent, d)
        self.pe = PositionEmbs(config.get("ae:max_positions", [48, d]), d)
        self.projection_head = ProjectionHead(latent * window, _PROJECTION)
        self.dropout = nn.Dropout(dropout)
        self.apply(_initialise)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=_STD / math.sqrt(2 * layers))

    def forward(self, x: Tensor, p: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``x [k, T, D]`` and positions ``p [k, T, 3]`` to ``(z [k, T, latent], y [k, T, D], projection [k, 30])``."""
        z = self.forward_encoder(x, p, mask)
        return z, self.forward_decoder(z, p, mask), self.projection_head(z)

    def forward_encoder(self, x: Tensor, p: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x [k, T, D] -> z [k, T, latent]``; ``mask`` is an attention mask, as the transformer type takes it."""
        x = self.dropout(self.pe(self.tokenizer(x), p))
        return self.encoder_comp(self._transform(self.transformer_encoder, x, mask))

    def forward_decoder(self, z: Tensor, p: Tensor, mask: Tensor | None = None) -> Tensor:
        """``z [k, T, latent] -> y [k, T, D]``."""
        z = self.dropout(self.pe(self.decoder_comp(z), p))
        return self.detokenizer(self._transform(self.transformer_decoder, z, mask))

    def forward_embeddings(self, x: Tensor, p: Tensor) -> Tensor:
        """One vector per model: z averaged over tokens, ``[k, latent]``."""
        return self.forward_encoder(x, p).mean(1)

    def _transform(self, stack: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.transformer_type == "gpt2":
            if mask is None:
                return stack(x)
            for block in stack.transformer:  # type: ignore[union-attr]
                x = _masked(block, x, mask)
            return x
        over_models = self.semantics.batch_attention
        if mask is not None:
            return stack(x, mask=mask) if over_models else stack(x.transpose(0, 1), mask=mask).transpose(0, 1)
        for layer in stack.layers:  # type: ignore[union-attr]
            x = _post_norm(layer, x, over_models)
        return x

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, and reads what was saved from a compiled model (``_orig_mod.`` names) or a parallel one (``module.``)."""
        return super().load_state_dict({_plain(name): value for name, value in state_dict.items()}, strict=strict, assign=assign)


def _post_norm(layer: nn.TransformerEncoderLayer, x: Tensor, over_models: bool) -> Tensor:
    """One ``nn.TransformerEncoderLayer`` on ``[k, T, d]``, attending over models or over tokens, without copies to and fro."""
    attention = layer.self_attn
    k, t, d = x.shape
    heads = attention.num_heads
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).view(k, t, 3, heads, d // heads)
    # [3, others, heads, sequence, d / heads]
    q, key, v = (qkv.permute(2, 1, 3, 0, 4) if over_models else qkv.permute(2, 0, 3, 1, 4)).unbind(0)
    p = attention.dropout if layer.training else 0.0
    y = F.scaled_dot_product_attention(q, key, v, dropout_p=p)
    y = (y.permute(2, 0, 1, 3) if over_models else y.permute(0, 2, 1, 3)).reshape(k, t, d)
    y = F.linear(y, attention.out_proj.weight, attention.out_proj.bias)
    x = layer.norm1(x + layer.dropout1(y))
    one, two = layer.linear1, layer.linear2
    y = feed_forward(x, one.weight, one.bias, two.weight, two.bias, layer.dropout.p, layer.training)
    return layer.norm2(x + layer.dropout2(y))


def _masked(block: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """One block of the core's transformer under an attention mask, which the core has no use for."""
    attention: Any = block.attn
    q, k, v = rearrange(attention.c_attn(block.ln_1(x)), "b t (qkv h d) -> qkv b h t d", qkv=3, h=attention.heads)  # type: ignore[operator]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=attention.dropout if block.training else 0.0)
    x = x + F.dropout(attention.c_proj(rearrange(y, "b h t d -> b t (h d)")), attention.dropout, block.training)
    return x + block.mlp(block.ln_2(x))  # type: ignore[operator]


def _check(config: Any) -> None:
    """Raises WslfastError naming the key that :class:`AE` cannot be built with."""
    require(isinstance(config, Mapping), f"config: expected a mapping of published keys, got {describe(config)}")
    for key, least in _SIZES.items():
        _check_size(key, config.get(key, least), least)
    d, heads, kind = config.get("ae:d_model", 512), config.get("ae:nhead", 8), config.get("ae:transformer_type", "pytorch")
    require(d % heads == 0 and d % 2 == 0, f"ae:d_model: expected a multiple of 2 and of ae:nhead={heads}, got {d}")
    dropout, places = config.get("ae:dropout") or 0.0, config.get("ae:max_positions", (48, d))
    number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool) and 0 <= dropout <= 1
    require(number, f"ae:dropout: expected a number from 0 to 1, got {dropout!r}")
    tables = hasattr(places, "__len__") and len(places) in (2, 3)
    require(tables, f"ae:max_positions: expected two or three sizes, got {places!r}")
    for size in places:
        _check_size("ae:max_positions", size, 1)
    require(kind in TYPES, f"ae:transformer_type: expected one of {list(TYPES)}, got {kind!r}")
    for key in _FOREIGN:
        value = config.get(key)
        require(not value or _HARMLESS.get(key) == value, f"config: {key}={value!r} is a fork's network, which is not built here")


def _check_size(key: str, value: Any, least: int) -> None:
    whole = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least  # numpy's, too
    require(whole, f"{key}: expected a whole number of at least {least}, got {value!r}")


def supports(config: Any) -> str | None:
    """None if :class:`AE` builds what the published class would, else the reason."""
    try:
        _check(config)
    except WslfastError as error:
        return str(error)
    return None


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=_STD)


def _plain(name: str) -> str:
    for prefix in ("module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name
