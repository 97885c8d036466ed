"""The last block of a backbone, for the tokens that are used, and attention on a CPU.

After the last block training uses a few tokens: CLS, and the masked patches of iBOT. The other
tokens only give keys and values to the last attention. So the last block computes its queries, its
MLP and all the rest for the used tokens only: for CLS alone 15 % of a block of ViT-S/16. Values and
gradients are those of the whole block.
"""
import torch
import torch.nn.functional as F
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def plain_attention(module, query, key, value, attention_mask=None, scaling=None,
                    dropout=0.0, **_):
    """softmax(q k^T * scaling) v, for training on a CPU. ViTs have no attention masks.
    A block of ViT-S on 16 crops of 197 tokens takes 51 ms with torch's fused kernel, 25 ms with
    transformers' eager attention (which copies the scores to fp32 and back), 17 ms with this.
    Args: query [B,heads,n,d]; key, value [B,heads,N,d]. Returns: [B,n,heads,d], and None for the
    weights."""
    scores = (query * scaling) @ key.mT  # [B,heads,n,N]
    with torch.autocast(scores.device.type, enabled=False):
        weights = F.dropout(scores.softmax(dim=-1), dropout, module.training)
    return (weights @ value).transpose(1, 2), None


def use_plain_attention(backbone):
    """Let a backbone compute attention with plain_attention."""
    transformers.AttentionInterface.register("plain", plain_attention)
    backbone.set_attn_implementation("plain")


# ---- which tokens are used ----

def used_tokens(tokens, first_patch, masked=None):
    """The tokens that are used after the last block: CLS of every crop, then the masked patches.

    Args: tokens [B,N,D]; first_patch: number of the first patch among the N tokens of a crop;
    masked: of augment.masked_tokens, or None.
    Returns: crops, numbers, places, three [R] int64, and n_places, int. Token numbers[r] of crop
    crops[r] is used. places[r] < n_places is its place among the used tokens of its crop.
    """
    crops = torch.arange(len(tokens), device=tokens.device)
    zeros = torch.zeros_like(crops)
    if masked is None:
        return crops, zeros, zeros, 1
    (masked_crops, patches, before), most = masked
    numbers = torch.cat([zeros, first_patch + patches])
    places = torch.cat([zeros, 1 + before])
    return torch.cat([crops, masked_crops]), numbers, places, 1 + most


# ---- the last block ----

def split_last_block(block):
    """Let the last block of a backbone take `used`, in place: it gets a subclass of its class, so
    that FSDP, checkpointing, torch.compile and hooks see one call of one module. A block with other
    names, in some later transformers, stays as it is and computes all tokens."""
    has_norms = hasattr(block, "norm1") or hasattr(block, "layernorm_before")
    if has_norms and hasattr(block.attention, "q_proj") and hasattr(block.attention, "o_proj"):
        block.__class__ = type("LastBlock", (LastBlock, type(block)), {})


class LastBlock:
    """See split_last_block. A block is x + attention(norm(x)), then x + mlp(norm(x)). Family vit
    has dropout in both branches, the others have layer scale and drop path."""

    def forward(self, tokens, *args, used=None, **kwargs):
        """Tokens [B,N,D] -> [B,N,D]; with `used`, of used_tokens, only those tokens, [R,D]."""
        if used is None:
            return super().forward(tokens, *args, **kwargs)
        crops, numbers, _, _ = used
        is_vit = hasattr(self, "layernorm_before")
        norm1, norm2 = "norm1", "norm2"
        if is_vit:
            norm1, norm2 = "layernorm_before", "layernorm_after"

        def scaled(branch, layer_scale):
            if is_vit:
                return self.dropout(branch)
            branch = getattr(self, layer_scale)(branch)
            kept = self.drop_path(branch.new_ones(len(tokens), 1, 1))  # one draw for a crop
            return branch * kept[crops, 0]

        x = getattr(self, norm1)(tokens)  # [B,N,D]
        x = attend_used(self.attention, x, used, **kwargs)  # [R,D]
        tokens_used = tokens[crops, numbers] + scaled(x, "layer_scale1")
        x = self.mlp(getattr(self, norm2)(tokens_used))
        return tokens_used + scaled(x, "layer_scale2")


def attend_used(attention, x, used, position_embeddings=None):
    """The attention of a block for its used tokens, which look at all tokens.

    Args: attention: a module of transformers; x [B,N,D]; used: of used_tokens; position_embeddings:
    DINOv3's cos and sin [P,d]. Returns: [R,D].
    """
    crops, numbers, places, n_places = used
    split = (-1, attention.head_dim)
    q = attention.q_proj(x[crops, numbers]).unflatten(-1, split)  # [R,heads,d]
    k = attention.k_proj(x).unflatten(-1, split)  # [B,N,heads,d]
    v = attention.v_proj(x).unflatten(-1, split)
    if position_embeddings is not None:
        cos, sin = position_embeddings
        others = (0, 0, x.shape[1] - len(cos), 0)  # CLS and registers are not rotated
        cos = F.pad(cos, others, value=1.0)[:, None]  # [N,1,d]
        sin = F.pad(sin, others)[:, None]
        q = rotate(q, cos[numbers], sin[numbers])
        k = rotate(k, cos, sin)
    queries = q[:, None]  # [B,1,heads,d]
    if n_places > 1:  # crops differ in their number of used tokens: the rest is zeros
        queries = q.new_zeros(len(x), n_places, *q.shape[1:])
        queries = queries.index_put((crops, places), q)  # [B,n_places,heads,d]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation,
                                                   plain_attention)
    dropout = 0.0
    if attention.training:
        is_dinov3 = position_embeddings is not None
        dropout = attention.dropout if is_dinov3 else attention.attention_dropout
    heads_first = [part.transpose(1, 2) for part in (queries, k, v)]
    out, _ = attend(attention, *heads_first, None, dropout=dropout, scaling=attention.scaling)
    return attention.o_proj(out.flatten(2)[crops, places])


def rotate(x, cos, sin):
    """DINOv3's rotary positions: coordinates i and i + d/2 of x [...,d] turn by an angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
