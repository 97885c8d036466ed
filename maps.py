"""Attention maps of CLS: of every head of the last block, and in fewer channels by PCA."""
import torch
import torch.nn.functional as F

from augment import Photometrics, resize
from distributed import whole
from model import blocks, embed, run_blocks


def cls_attention(backbone, pixels):
    """What the CLS token attends to in the last block, for each head: the CLS row of
    softmax(q k^T / sqrt(d)), equation 3 of the paper.

    The matrix of all tokens is never made: one query against all keys is O(heads * patches)
    numbers. For 12 heads and 4096 patches this is 0.2 MB, the matrix would take 0.8 GB.
    Args: backbone: of any family, or its peft wrapper, in eval mode; pixels [B,C,H,W], normalised,
    H and W multiples of the patch size.
    Returns: [B,heads,h,w] fp32. A head's map sums to less than 1: the attention on CLS itself and
    on registers is left out, so the map of a head that attends to them is dark.
    """
    tokens, rope = embed(backbone, pixels)
    tokens = run_blocks(backbone, tokens, rope, last=-1)  # [B,1+R+P,D]
    block, config = blocks(backbone)[-1], backbone.config
    norm = block.layernorm_before if hasattr(block, "layernorm_before") else block.norm1
    # LoRA may have wrapped the projections, so they are called. transformers 5 renamed them
    modules = block.attention.named_modules()
    layers = {name.split(".")[-1]: module for name, module in modules}
    query = layers.get("q_proj", layers.get("query"))
    key = layers.get("k_proj", layers.get("key"))
    heads = config.num_attention_heads
    with whole(block):
        tokens = norm(tokens)
        q = query(tokens[:, :1]).unflatten(-1, (heads, -1))  # [B,1,heads,d]
        k = key(tokens).unflatten(-1, (heads, -1))  # [B,1+R+P,heads,d]
    q, k = q.transpose(1, 2), k.transpose(1, 2)  # [B,heads,1,d], [B,heads,1+R+P,d]
    first_patch = 1 + getattr(config, "num_register_tokens", 0)
    if rope:  # DINOv3 rotates the keys of patches; CLS has no position
        cos, sin = rope["position_embeddings"]  # [P,d]
        others, patches = k[:, :, :first_patch], k[:, :, first_patch:]
        first, second = patches.chunk(2, dim=-1)
        rotated = torch.cat([-second, first], dim=-1)
        k = torch.cat([others, patches * cos + rotated * sin], dim=2)
    scores = q.float() @ k.float().transpose(2, 3)  # [B,heads,1,1+R+P]
    attention = (scores * q.shape[-1] ** -0.5).softmax(dim=-1)
    grid = [side // config.patch_size for side in pixels.shape[-2:]]
    return attention[:, :, 0, first_patch:].unflatten(-1, grid)  # [B,heads,h,w]


def pca_heads(attention, n_components=1):
    """The heads' maps in fewer channels: the principal components of each image (section 2.2.5 of
    the paper: 12 -> 1).

    A patch is a point with one coordinate for each head; the components are the directions in which
    the patches of one image differ most. Each image has its own, so no map depends on the batch.
    Args: attention [B,heads,h,w]. Returns: [B,n,h,w] fp32 in 0..1, each from its smallest to its
    largest value. PCA leaves the sign open; here high = attended (correlates with the mean over the
    heads). Zeros for components that the heads lack, and if all patches are alike.
    """
    x = attention.flatten(2).double()  # [B,heads,P]
    x = x - x.mean(dim=2, keepdim=True)
    _, directions = torch.linalg.eigh(x @ x.transpose(1, 2))  # smallest first
    directions = directions.flip(2)[:, :, :n_components]  # [B,heads,n]
    scores = directions.transpose(1, 2) @ x  # [B,n,P]
    mean = x.mean(dim=1, keepdim=True)
    agreement = (scores * mean).sum(dim=2, keepdim=True)
    scores = scores * torch.where(agreement < 0, -1.0, 1.0)
    low = scores.amin(dim=2, keepdim=True)
    span = scores.amax(dim=2, keepdim=True) - low
    flat = span <= 1e-12
    scores = (scores - low) / torch.where(flat, 1.0, span)
    scores = torch.where(flat, 0.0, scores)
    missing = n_components - scores.shape[1]
    scores = F.pad(scores, (0, 0, 0, missing)).float()
    return scores.unflatten(2, attention.shape[2:])


def network_input(image, backbone, inputs):
    """(pixels, x): an image [H,W,C] as [1,C,H',W'] in its own dtype, and as the network's input.
    The shorter side is inputs["size"], each side is rounded to a multiple of the patch size.
    Nothing is cut off or padded; the aspect changes by half a patch. inputs: of load_network."""
    patch = backbone.config.patch_size
    shorter = min(image.shape[:2])
    shape = [max(1, round(side * inputs["size"] / shorter / patch)) * patch
             for side in image.shape[:2]]
    pixels = resize(image, shape)[None]
    photometrics = Photometrics("medical", inputs["intensity_range"], inputs["mean"],
                                inputs["std"])
    return pixels, photometrics.plain(pixels.to(next(backbone.parameters()).device))
