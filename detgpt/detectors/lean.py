"""The same Grounding DINO with less work: modules of a loaded transformers model, replaced in place.

    make_lean(model)                  # the same boxes up to rounding
    make_lean(model, torch.bfloat16)  # its large matrix products in bfloat16

Nothing is trained or approximated in float32; the formulas are only evaluated in another order:

- Deformable attention (Zhu et al., arXiv:2010.04159) samples 64 weighted rows of the image features per query and
  head. That is an embedding bag, which torch sums without storing the samples.
- The bi-directional fusion of image and text (Li et al., GLIP, arXiv:2112.03857) projects every image token to
  1024 channels to compare it with a few text tokens. Multiplying the projection into the text tokens first gives
  the same scores for a fraction of the work, as both are linear.
- Image tokens pass the wide layers a piece at a time, so that what lies between two of them stays in the cache.
"""

from __future__ import annotations

import time
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.swin.modeling_swin import SwinAttention, SwinMLP

from detgpt.detectors.remembered import RememberedText

CHUNK = 2048  # image tokens at a time; 2048 of them with 2048 channels take 16 MB in float32


def make_lean(model: Any, dtype: torch.dtype = torch.float32) -> None:
    """Replace the costly modules of a float32 `(MM)GroundingDinoForObjectDetection`, in place, for inference.

    `dtype` is that of the large matrix products; everything between them stays in float32.
    """
    model.model.text_backbone = RememberedText(model.model.text_backbone)
    for layer in model.model.encoder.layers:
        layer.fusion_layer.attn = LowRankFusion(layer.fusion_layer.attn)
        layer.deformable_layer = ChunkedEncoderLayer(layer.deformable_layer, dtype)
    for layer in model.model.decoder.layers:
        layer.encoder_attn = BagDeformableAttention(layer.encoder_attn, dtype)
    make_swin_lean(model.model.backbone, dtype)


def make_swin_lean(backbone: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """The same for the blocks of a Swin; an image encoder without them stays as it is."""
    for block in list(backbone.modules()):
        for name, part in list(block.named_children()):
            if isinstance(part, SwinMLP):
                setattr(block, name, ChunkedMLP(part, dtype))
            elif isinstance(part, SwinAttention):
                setattr(block, name, WindowAttention(part, dtype))


def bfloat16_is_faster() -> bool:
    """Whether matrix products on this CPU gain at least a third from bfloat16, by trying (about 0.1 s)."""
    return 4 * _product_seconds(torch.bfloat16) < 3 * _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    tokens, weight = torch.ones(CHUNK, 256, dtype=dtype), torch.ones(2048, 256, dtype=dtype)
    seconds = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            F.linear(tokens, weight)
            seconds.append(time.perf_counter() - start)
    return min(seconds)


def _linear(layer: nn.Linear, values: torch.Tensor) -> torch.Tensor:
    """`layer` in the precision of its own weights, back in that of `values`."""
    return layer(values.to(layer.weight.dtype)).to(values.dtype)


def _feed_forward(values: torch.Tensor, fc1: nn.Linear, activation: nn.Module, fc2: nn.Linear) -> torch.Tensor:
    return fc2(activation(fc1(values.to(fc1.weight.dtype)))).to(values.dtype)


def _merged(*layers: nn.Linear) -> nn.Linear:
    """One layer whose outputs are those of `layers` side by side."""
    merged = nn.utils.skip_init(nn.Linear, layers[0].in_features, sum(layer.out_features for layer in layers))
    weights = [layer.weight.data for layer in layers]
    merged.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    biases = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias.data for layer in layers]
    merged.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return merged


class BagDeformableAttention(nn.Module):
    """Multi-scale deformable attention as a weighted embedding bag over the image features."""

    def __init__(self, original: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.levels, self.points = original.n_heads, original.n_levels, original.n_points
        # One product instead of two, its outputs sorted as all x, all y, all logits: (3, heads, levels * points).
        self.samples = _merged(original.sampling_offsets, original.attention_weights)
        width = self.heads * self.levels * self.points
        order = torch.cat(
            [torch.arange(0, 2 * width, 2), torch.arange(1, 2 * width, 2), torch.arange(2 * width, 3 * width)]
        )
        self.samples.weight.data = self.samples.weight.data[order]
        self.samples.bias.data = self.samples.bias.data[order]
        self.samples.to(dtype)
        self.value_proj = original.value_proj.to(dtype)
        self.output_proj = original.output_proj.to(dtype)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        encoder_hidden_states: torch.Tensor,
        reference_points: torch.Tensor,
        spatial_shapes_list: list[tuple[int, int]],
        attention_mask: torch.Tensor | None = None,
        position_embeddings: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """What `GroundingDinoMultiscaleDeformableAttention` returns, without the attention weights."""
        queries = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        table = self.table(encoder_hidden_states, attention_mask, spatial_shapes_list)
        return self.sample(table, queries, reference_points, spatial_shapes_list), None

    def table(self, features: torch.Tensor, mask: torch.Tensor | None, shapes: list[tuple[int, int]]) -> torch.Tensor:
        """Values of every pixel of every level, each map in a border of zeros: (rows, channels of a head).

        The border, and a spare stretch at the end, hold what a bilinear sample outside the map must read.
        """
        batch, _, channels = features.shape
        values = _linear(self.value_proj, features)
        if mask is not None and not mask.all():
            values = values.masked_fill(~mask[..., None], 0.0)
        *starts, end = _padded_starts(shapes)
        table = values.new_zeros(batch, end + max(width for _, width in shapes) + 4, channels)
        for start, level, (height, width) in zip(
            starts, values.split([height * width for height, width in shapes], dim=1), shapes, strict=True
        ):
            padded = table[:, start : start + (height + 2) * (width + 2)].view(batch, height + 2, width + 2, channels)
            padded[:, 1:-1, 1:-1] = level.view(batch, height, width, channels)
        return table.view(-1, channels // self.heads)

    def sample(
        self,
        table: torch.Tensor,
        queries: torch.Tensor,
        reference_points: torch.Tensor,
        shapes: list[tuple[int, int]],
    ) -> torch.Tensor:
        """Attend from `queries` (B, Q, C) at `reference_points` (B, Q, levels, 2 or 4) to the rows of `table`."""
        batch, count, channels = queries.shape
        points = _linear(self.samples, queries).view(batch, count, 3, self.heads, self.levels, self.points)
        x, y, logits = points.unbind(2)
        weights = logits.flatten(-2).softmax(-1).view_as(logits)
        size = torch.tensor(shapes, dtype=queries.dtype)  # (levels, 2) height, width
        height, width = size[:, :1], size[:, 1:]
        reference = reference_points[:, :, None, :, None]  # (B, Q, 1, levels, 1, 2 or 4)
        if reference.shape[-1] == 4:  # offsets in parts of the reference box, not in pixels
            x = x * (reference[..., 2] * width * (0.5 / self.points))
            y = y * (reference[..., 3] * height * (0.5 / self.points))
        # In pixels of the padded map, whose border stands half a pixel outside the first pixel's centre.
        x = x + (reference[..., 0] * width + 0.5)
        y = y + (reference[..., 1] * height + 0.5)
        rows, shares = _bilinear(x, y, weights, shapes, len(table) // batch)
        sampled = F.embedding_bag(
            rows.flatten(),
            table,
            torch.arange(0, rows.numel() + 1, 4 * self.levels * self.points, dtype=torch.int32),
            mode="sum",
            per_sample_weights=shares.flatten(),
            include_last_offset=True,
        )
        return _linear(self.output_proj, sampled.view(batch, count, channels))


def _padded_starts(shapes: list[tuple[int, int]]) -> list[int]:
    """The first row of each map when all stand one after the other in borders of one pixel, and the end."""
    return list(accumulate(((height + 2) * (width + 2) for height, width in shapes), initial=0))


def _bilinear(
    x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, shapes: list[tuple[int, int]], rows_per_image: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers (int32) and weights of the four pixels around each point, (B, Q, heads, 4, levels, points).

    `x`, `y`, `weights` (B, Q, heads, levels, points), in pixels of the padded maps; `x` and `y` are overwritten.
    """
    batch, _, heads, levels, _ = x.shape
    size = torch.tensor(shapes, dtype=x.dtype)
    height, width = size[:, :1], size[:, 1:]
    # Beyond the border there is nothing but zeros. On its far side a point reads one row further, with weight 0.
    x = torch.minimum(x.clamp_(min=0), width + 1)
    y = torch.minimum(y.clamp_(min=0), height + 1)
    left, top = x.floor(), y.floor()
    right_share, lower_share = x.sub_(left), y.sub_(top)

    rows = x.new_empty(*x.shape[:3], 4, *x.shape[3:], dtype=torch.int32)
    upper_left, upper_right, lower_left, lower_right = rows.unbind(3)
    starts = torch.tensor(_padded_starts(shapes)[:levels])[:, None] * heads
    first = starts + torch.arange(heads)[:, None, None]  # (heads, levels, 1)
    below = (width + 2) * heads
    # Whole numbers far below 2**24, so exact in float32.
    upper_left.copy_(top.mul_(below).add_(left, alpha=heads).add_(first))
    upper_left += torch.arange(batch, dtype=torch.int32)[:, None, None, None, None] * rows_per_image
    torch.add(upper_left, heads, out=upper_right)
    torch.add(upper_left, below.int(), out=lower_left)
    torch.add(upper_right, below.int(), out=lower_right)

    shares = torch.empty_like(rows, dtype=x.dtype)
    upper_left, upper_right, lower_left, lower_right = shares.unbind(3)
    lower = weights * lower_share
    upper = weights - lower
    torch.mul(upper, right_share, out=upper_right)
    torch.sub(upper, upper_right, out=upper_left)
    torch.mul(lower, right_share, out=lower_right)
    torch.sub(lower, lower_right, out=lower_left)
    return rows, shares


class ChunkedEncoderLayer(nn.Module):
    """The deformable half of an encoder layer, a piece of the image tokens at a time."""

    def __init__(self, original: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = BagDeformableAttention(original.self_attn, dtype)
        self.attention_norm = original.self_attn_layer_norm
        self.fc1, self.fc2 = original.fc1.to(dtype), original.fc2.to(dtype)
        self.activation = original.activation_fn
        self.final_norm = original.final_layer_norm

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        position_embeddings: torch.Tensor,
        reference_points: torch.Tensor,
        spatial_shapes_list: list[tuple[int, int]],
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """What `GroundingDinoDeformableLayer` returns, without the attention weights."""
        table = self.attention.table(hidden_states, attention_mask, spatial_shapes_list)
        output = torch.empty_like(hidden_states)
        size = max(1, CHUNK // len(hidden_states))
        for start in range(0, hidden_states.shape[1], size):
            part = slice(start, start + size)
            tokens = hidden_states[:, part]
            queries = tokens + position_embeddings[:, part]
            tokens = tokens + self.attention.sample(table, queries, reference_points[:, part], spatial_shapes_list)
            tokens = self.attention_norm(tokens)
            tokens = tokens + _feed_forward(tokens, self.fc1, self.activation, self.fc2)
            output[:, part] = self.final_norm(tokens)
        return output, None


class LowRankFusion(nn.Module):
    """Attention from image to text and back, with the image's projections multiplied into the text's."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.original = original

    def forward(
        self,
        vision_features: torch.Tensor,
        text_features: torch.Tensor,
        vision_attention_mask: torch.Tensor | None = None,
        text_attention_mask: torch.Tensor | None = None,
    ) -> tuple[tuple[torch.Tensor, None], tuple[torch.Tensor, None]]:
        """What `GroundingDinoBiMultiHeadAttention` returns, without the attention weights."""
        o = self.original
        batch, tokens, _ = text_features.shape
        heads = (o.num_heads, o.head_dim)
        keys = o.text_proj(text_features).view(batch, tokens, *heads) * o.scale
        text_values = o.values_text_proj(text_features).view(batch, tokens, *heads)

        # scores[b, i, h, t] = <image token i projected for head h, text token t projected for head h>
        weight, bias = o.vision_proj.weight.view(*heads, -1), o.vision_proj.bias.view(*heads)
        keys_in_vision = torch.einsum("bthd,hdc->bhtc", keys, weight).flatten(1, 2)
        scores = vision_features @ keys_in_vision.transpose(1, 2)  # (B, image tokens, heads * text tokens)
        scores += torch.einsum("bthd,hd->bht", keys, bias).flatten(1)[:, None]

        to_text = scores.view(batch, -1, heads[0], tokens)
        if text_attention_mask is not None:
            to_text = to_text.masked_fill(text_attention_mask[:, None, None], float("-inf"))
        weight = o.out_vision_proj.weight.view(-1, *heads)
        values_in_vision = torch.einsum("bthd,chd->bhtc", text_values, weight).flatten(1, 2)
        vision_output = to_text.softmax(-1).flatten(2) @ values_in_vision + o.out_vision_proj.bias

        to_vision = scores.transpose(1, 2)  # (B, heads * text tokens, image tokens)
        if vision_attention_mask is not None and vision_attention_mask.any():
            to_vision = to_vision.masked_fill(vision_attention_mask[:, None], float("-inf"))
        seen = (to_vision.softmax(-1) @ vision_features).view(batch, heads[0], tokens, -1)
        weight, bias = o.values_vision_proj.weight.view(*heads, -1), o.values_vision_proj.bias.view(*heads)
        text_output = torch.einsum("bhtc,hdc->bthd", seen, weight) + bias  # the shares sum to one
        return (vision_output, None), (o.out_text_proj(text_output.flatten(2)), None)


class ChunkedMLP(nn.Module):
    """The feed-forward half of a Swin block, a piece of the image tokens at a time."""

    def __init__(self, original: SwinMLP, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1, self.fc2 = original.fc1.to(dtype), original.fc2.to(dtype)
        self.activation = original.activation_fn

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(hidden_states)
        pairs = zip(hidden_states.flatten(0, 1).split(CHUNK), output.flatten(0, 1).split(CHUNK), strict=True)
        for tokens, out in pairs:
            out.copy_(_feed_forward(tokens, self.fc1, self.activation, self.fc2))
        return output


class WindowAttention(nn.Module):
    """Swin's attention within windows, with one product for queries, keys and values."""

    position_bias: torch.Tensor  # (1, heads, tokens, tokens)

    def __init__(self, original: SwinAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.scaling = original.num_attention_heads, original.scaling
        self.qkv = _merged(original.q_proj, original.k_proj, original.v_proj).to(dtype)
        self.o_proj = original.o_proj.to(dtype)
        with torch.no_grad():
            self.register_buffer("position_bias", original.relative_position_bias(), persistent=False)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states` (B * windows, tokens, C), `attention_mask` (windows, tokens, tokens)."""
        windows, tokens, channels = hidden_states.shape
        states = hidden_states.to(self.qkv.weight.dtype)
        query, key, value = self.qkv(states).view(windows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = self.position_bias
        if attention_mask is not None:
            repeats = windows // len(attention_mask)
            mask = (mask + attention_mask[:, None]).repeat(repeats, 1, 1, 1)
        attended = F.scaled_dot_product_attention(query, key, value, mask.to(query.dtype), scale=self.scaling)
        attended = attended.transpose(1, 2).reshape(windows, tokens, channels)
        return self.o_proj(attended).to(hidden_states.dtype), None
