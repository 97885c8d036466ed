"""What frozen blocks make of an image, computed once per view and kept in memory.

With --fixed_views=4 an image is cropped in four ways, by turns. If the first blocks of the backbone
are frozen (train_last_blocks), what they compute of a view never changes. So it is computed when
the view comes for the first time; later only the last blocks run, and the loader cuts no crops.
config/minute.py trains so in a minute on a laptop.
"""
import torch

from configurator import UserError
from distributed import memory_gb, world_size
from model import blocks, core, first_blocks

RANDOM_POSITIONS = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")  # DINOv3's


def n_frozen_blocks(student, train_from):
    """How many leading blocks are never trained; 0 if the embeddings are, or if the student draws
    its positions at random. train_from: of optim.build_optimizer."""
    if any(getattr(student.backbone.config, key, None) for key in RANDOM_POSITIONS):
        return 0
    trained = {id(param) for name, param in student.named_parameters() if name in train_from}
    layers = blocks(student.backbone)
    for n, part in enumerate([core(student.backbone).embeddings, *layers]):
        if any(id(param) in trained for param in part.parameters()):
            return max(0, n - 1)
    return len(layers)


def why_not(config, n_blocks, n_ranks):
    """Why no tokens can be kept, as a text; '' if they can. n_blocks: of n_frozen_blocks."""
    if n_blocks == 0:
        return "the embeddings or the first block are trained; set train_last_blocks"
    if config.ibot_loss_weight > 0:
        return "the masks of ibot_loss_weight are new in every step"
    if config.local_crops_number + config.label_guided_crops_number > 0:
        return "local and guided crops are not kept; set local_crops_number=0"
    if config.gram_loss_weight > 0 and config.gram_crops_size > 0:
        return "crops of gram_crops_size are not kept"
    if config.cls_anchor_loss_weight > 0:
        return "the plain crops of cls_anchor_loss_weight are not kept"
    if config.min_foreground > 0 or config.slab_mm > 0:
        return "with min_foreground or slab_mm an image has other crops each time"
    if config.distribution == "fsdp" and n_ranks > 1:
        return "FSDP gathers the weights of whole forward passes only"
    return ""


def n_kept_blocks(student, train_from, config, device):
    """After how many frozen blocks the tokens of measured images are kept (features.KeptTokens):
    on a CPU, where measuring else takes as long as training. Not under FSDP, which gathers the
    weights of whole forward passes only. train_from: of optim.build_optimizer."""
    is_sharded = config.distribution == "fsdp" and world_size() > 1
    if device.type != "cpu" or is_sharded or config.compile:
        return 0
    return n_frozen_blocks(student, train_from)


def keep_prefix(student, train_from, config, n_images, autocast, say):
    """A PrefixCache for a run of n_images, or None; `say` gets a line if fixed_views is set.
    UserError if the machine has too little memory for it. train_from: of optim.build_optimizer."""
    if config.fixed_views == 0:
        return None
    n_blocks = n_frozen_blocks(student, train_from)
    if reason := why_not(config, n_blocks, world_size()):
        say(f"note: fixed_views={config.fixed_views} keeps no tokens of frozen blocks: {reason}")
        return None
    size = cache_bytes(config, student.backbone, n_images)
    say(f"fixed views: the output of the first {n_blocks} blocks is computed once per view and "
        f"kept in memory, at most {size / 1e6:.0f} MB")
    return PrefixCache(n_blocks, autocast)


class KnownViews(torch.utils.data.Sampler):
    """A loader.BatchOrder whose samples say if their view came in an earlier batch of this process:
    (n, index, is_known)."""

    def __init__(self, order, crop_set):
        self.order, self.crop_set = order, crop_set

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        known = set()
        for batch in self.order:
            rows = [(index, self.crop_set.view(n)) for n, index in batch]
            yield [(*sample, row in known) for sample, row in zip(batch, rows)]
            known.update(rows)


class PrefixCache:
    """Tokens of the global crops of fixed views after the first n_blocks, in fp16 in the memory of
    the machine. New tokens, too, go through fp16, so a resumed run, whose cache is empty at first,
    repeats the uninterrupted one."""

    def __init__(self, n_blocks, autocast):
        self.n_blocks, self.autocast = n_blocks, autocast
        self.kept = {}  # row of the view: tokens [V,T,D]
        self.rope = None  # of embed: all crops have one size

    @torch.no_grad()
    def __call__(self, batch, global_crops, backbone, device):
        """What Student.forward takes as `shared`: tokens [V*B,T,D] fp32 on the device, rope,
        n_blocks. Args: batch: of CropDataset.collate; global_crops: [V*b,C,S,S], of the b samples
        that are fresh, or None; backbone: of the student."""
        if batch["fresh"]:
            with self.autocast():
                tokens, self.rope, _ = first_blocks(backbone, global_crops, self.n_blocks)
            tokens = tokens.half().cpu()
            tokens = tokens.unflatten(0, (-1, len(batch["fresh"])))  # [V,b,T,D]
            for position, views in zip(batch["fresh"], tokens.unbind(1)):
                self.kept[batch["row"][position]] = views.clone()
        kept = [self.kept[row] for row in batch["row"]]  # B times [V,T,D]
        tokens = torch.stack(kept, dim=1).flatten(0, 1)  # [V*B,T,D]
        return tokens.float().to(device), self.rope, self.n_blocks


def cache_bytes(config, backbone, n_images):
    """The bytes that the cache will take at most; UserError if that is over half of the memory."""
    n_tokens = (config.global_crops_size // backbone.config.patch_size) ** 2 + 1
    n_tokens += getattr(backbone.config, "num_register_tokens", 0)
    views = min(config.fixed_views * n_images, config.max_iterations * config.global_batch_size)
    size = 2 * views * config.global_crops_number * n_tokens * backbone.config.hidden_size
    total = memory_gb(torch.device("cpu"))[1]
    if size / 1e9 > total / 2:
        raise UserError(f"fixed_views={config.fixed_views} of {n_images} images would keep "
                        f"{size / 1e9:.1f} GB of tokens, the machine has {total:.1f} GB: use fewer "
                        "views, smaller global_crops_size, or 0 to crop anew every time")
    return size
