"""Attention maps of CLS: of every head of the last block, in fewer channels by PCA, and as strips in
which one sees them change over a run."""
import contextlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from augment import Photometrics, is_labelled, resize
from detection import scaled
from distributed import gather_objects, is_main, whole
from model import blocks, embed, run_blocks
from pictures import contact_sheet, outline, overlay, to_picture
from run_folder import whole_file

N_IMAGES, N_TRIED = 3, 200  # of AttentionSamples
SIDE = 112  # pixels of a picture in a strip


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


# ---- strips of a run ----

class AttentionSamples:
    """The same three images during a whole run, with the teacher's attention on them.

    The images are drawn by seed from the split that k-NN classifies, else from train; with
    label-guided crops from those with a label. draw() writes samples/ITERATION-attention.png.
    Drawing again gives the same file, so a run that is killed and resumed has the same pictures.
    """

    def __init__(self, train_set, measured, inputs, config):
        """Args: measured: of loader.open_splits; inputs: of loader.input_settings; config:
        namespace of train.py's or distill.py's keys. All ranks call it."""
        self.is_on, found = config.generate_samples, None
        self.inputs = dict(inputs, size=config.global_crops_size)
        if self.is_on and is_main():
            dataset = next(iter(measured.values()), train_set)
            n_guided = getattr(config, "label_guided_crops_number", 0)
            classes = getattr(config, "label_guided_classes", ())
            found = choose_images(dataset, config.seed, classes, n_guided > 0)
        # one reader: with FSDP the ranks have to call the network equally often
        self.images = gather_objects(found)[0] or []

    @torch.no_grad()
    def draw(self, run, state):
        """Write the picture of this moment. All ranks call it; run: a run.Run; state: its State."""
        if not self.images:
            return
        with run.clock_stopped(), state.ema.teacher_weights(state.student) as teacher:
            maps = []
            for image, _ in self.images:
                _, x = network_input(image, teacher.backbone, self.inputs)
                maps.append(cls_attention(teacher.backbone, x)[0].cpu())
            if is_main():
                rows = [self.strip(image, label, attention)
                        for (image, label), attention in zip(self.images, maps)]
                heads = [f"head {n}" for n in range(len(maps[0]))]
                title = (f"Attention of CLS in the last block, iteration {state.iteration}\nthe "
                         "teacher; each map from its least to its largest value; per cent = "
                         "attention on patches")
                path = f"{run.folder}/samples/{state.iteration:07d}-attention.png"
                with whole_file(path) as part:
                    contact_sheet(part, rows, title, SIDE,
                                  ["image", *heads, "heads, PCA 1", "PCA 1 to 3, RGB"],
                                  ("least", "largest of the map", "attention of CLS"))

    def strip(self, image, label, attention):
        """A row of contact_sheet: the image, its heads, their principal components. attention
        [heads,h,w]; label [H,W] bool or None."""
        picture = to_picture(image, self.inputs["intensity_range"])
        components = pca_heads(attention[None], 3)[0].numpy()  # [3,h,w]
        tiles = [(to_picture(picture, side=SIDE), "", None)]
        if label is not None and label.any():
            tiles = [(outline(tiles[0][0], label), "cyan: the label", None)]
        for head in attention:
            heat = overlay(picture, scaled(head.numpy(), ()), SIDE)
            tiles.append((heat, f"{head.sum():.0%}", None))
        tiles.append((overlay(picture, components[0], SIDE), "", None))
        tiles.append((mosaic(components.transpose(1, 2, 0), picture.size), "", None))
        return tiles


def choose_images(dataset, seed, classes, labelled_first):
    """[(image [H,W,C], what the label shows [H,W] bool or None)] of N_IMAGES images, drawn by seed
    from those that can be read. labelled_first: images that show a label come before others;
    classes: of augment.is_labelled."""
    found, others = [], []
    for i in np.random.default_rng(seed).permutation(len(dataset))[:N_TRIED]:
        with contextlib.suppress(Exception):  # where the image is trained on, its error is told
            image, mask = dataset[int(i)]
            label = None if mask is None else is_labelled(mask, classes)
            is_first = not labelled_first or label is not None and label.any()
            (found if is_first else others).append((image, label))
        if len(found) == N_IMAGES:
            break
    return (found + others)[:N_IMAGES]


def mosaic(colors, size):
    """Patch colours [h,w,3] in 0..1 as a picture of `size` (width, height), without smoothing."""
    small = Image.fromarray((colors * 255).round().astype(np.uint8))
    return small.resize(size, Image.NEAREST)
