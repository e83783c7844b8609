"""Fused attention kernels: their arguments, and the probabilities that they never return."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor

aten = torch.ops.aten
# CPU, then CUDA and other devices. What they do is the same; the names of some of their arguments differ.
FUSED = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}


@dataclass(frozen=True, eq=False)
class Scores:
    """What softmax is taken of: queries times keys, scaled and masked.

    Attributes:
        q: Queries `(b heads q e)`.
        k: Keys `(b kv_heads k e)`, each used by `heads / kv_heads` heads in a row.
        mask: Added to the scores, or where they are kept; broadcast against them. None: no mask.
        causal: Whether query i sees keys 0 to i only.
        scale: What the products are multiplied by; None: `e ** -0.5`.
        dropout: The share of probabilities that was dropped.
        change: What is made of the scaled scores `(b heads q k)`; None: nothing.
    """

    q: Float[Tensor, "b heads q e"]
    k: Float[Tensor, "b kv_heads k e"]
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0
    change: Callable[[Tensor], Tensor] | None = None

    @property
    def hidden(self) -> str:
        """What hides keys from queries, in words: "none", "causal", the shape of a mask, "a function", or several of these."""
        mask = [] if self.mask is None else [str(tuple(self.mask.shape))]
        return " and ".join(["causal"] * self.causal + mask + ["a function"] * (self.change is not None)) or "none"

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Scores":
        """The scores of a call of a fused kernel."""
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
        mask = named.get("attn_mask", named.get("attn_bias"))
        return cls(
            named["query"],
            named["key"],
            None if mask is None else mask.detach(),
            bool(named.get("is_causal", False)),
            named.get("scale"),
            float(named.get("dropout_p", 0.0)),
        )

    @classmethod
    def of_flex(cls, args: tuple[Any, ...]) -> "Scores":
        """The scores of a call of the operator behind `torch.nn.attention.flex_attention`."""
        q, k, _, score_mod, block_mask, scale, _, score_buffers, mask_buffers = args
        each = [(None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)]

        def change(scores: Tensor) -> Tensor:
            at = [torch.arange(size, device=scores.device) for size in scores.shape]
            modified, seen = score_mod, block_mask[-1]
            for dims in each:
                modified = torch.vmap(modified, (0, *dims, *[None] * len(score_buffers)))
                seen = torch.vmap(seen, (*dims, *[None] * len(mask_buffers)))
            wide: Tensor = modified(scores, *at, *score_buffers)
            return wide.masked_fill(~seen(*at, *mask_buffers), -torch.inf)

        return cls(q, k, scale=scale, change=change)

    def probs(self) -> Float[Tensor, "b heads q k"]:
        """`softmax(scale q k^T + mask)`, computed in at least float32; rows that see no key are zero, as kernels have it."""
        wide = torch.promote_types(self.q.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(self.q.device.type, enabled=False):
            q, k = self.q.to(wide), shared(self.k, self.q.shape[1]).to(wide)
            scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
            if self.causal:
                seen: Bool[Tensor, "q k"] = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
                scores = scores.masked_fill(~seen, -torch.inf)
            if self.mask is not None:
                mask = self.mask
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(wide)
            if self.change is not None:
                scores = self.change(scores)
            blind = (scores == -torch.inf).all(-1, keepdim=True)
            return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)


def shared(x: Float[Tensor, "b kv_heads n e"], heads: int) -> Float[Tensor, "b heads n e"]:
    """Keys or values with a row for each head of the queries (grouped-query attention)."""
    if x.shape[1] == heads:
        return x
    return repeat(x, "b kv n e -> b (kv group) n e", group=heads // x.shape[1])
