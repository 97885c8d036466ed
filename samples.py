"""What a run draws beside its crops: where the teacher looks, as strips in which one sees it change
over the run, and where label-guided crops lie. train.py and distill.py draw into samples/."""
import contextlib

import numpy as np
import torch

from augment import is_labelled
from detection import scaled
from distributed import gather_objects, is_main
from maps import cls_attention, network_input, pca_heads
from pictures import contact_sheet, frames, mosaic, outline, overlay, to_picture
from run_folder import whole_file

N_IMAGES, N_TRIED = 3, 200  # shown, and looked at for a label
SIDE = 112  # pixels of a picture in a strip
GUIDED, RANDOM = "#ffa90e", "#3f90da"  # boxes of crops: orange and blue


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

    def start(self, run, state, train_set, multi_crop):
        """Before the first iteration: the first picture, and the boxes of guided crops if there are
        any. Args: as draw; multi_crop: the run's augment.MultiCrop."""
        if state.iteration == 0:
            self.draw(run, state)
            if self.is_on and multi_crop.guided[0] > 0 and is_main():
                draw_guided(f"{run.folder}/samples/guided.png", train_set, multi_crop,
                            self.inputs["intensity_range"], run.config.seed)

    @torch.no_grad()
    def draw(self, run, state):
        """Write the picture of this iteration if it is 0 or keeps a checkpoint. All ranks call it.
        Args: run: a run.Run; state: its run.State."""
        is_due = run.is_due(run.config.saveckp_freq, state.iteration)  # 0 is a multiple as well
        if not self.images or not is_due:
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
        colors = mosaic(components.transpose(1, 2, 0), picture.size)
        tiles.append((colors, "", None))
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


def draw_guided(path, dataset, multi_crop, value_range, seed):
    """Boxes of label-guided crops beside those of random ones on the same images (Figure 6 of the
    paper). The images are drawn by seed from those with a label, rank 0 calls it; without a label
    there is no picture.

    Args: multi_crop: an augment.MultiCrop; value_range: pixel values that become black and white.
    """
    rows, rng = [], np.random.default_rng((seed, 6))
    for image, label in choose_images(dataset, seed, multi_crop.classes, True):
        if label is None or not label.any():
            continue
        tiles = []
        for boxes, color in zip(multi_crop.boxes(image, label, rng), (GUIDED, RANDOM)):
            picture = outline(to_picture(image, value_range, 3 * SIDE), label)
            areas = [100 * h * w / label.size for _, _, h, w in boxes]
            caption = f"{len(boxes)} boxes, {min(areas):.1f} to {max(areas):.1f} % of the area"
            tiles.append((frames(picture, boxes, label.shape, color), caption, None))
        rows.append(tiles)
    if rows:
        with whole_file(path) as part:
            contact_sheet(part, rows, "Label-guided crops beside random crops\nlocal crops of an "
                          "image before they are resized; cyan: the label", 3 * SIDE,
                          ["label-guided", "random"])
