"""Are the features worse than at the start? An answer without labels.

LabelFree measures a network on held-out images, from random crops of them and from whole images.
judge compares two such measurements and says worse, or cannot tell; score is what chooses
the best checkpoint if there are no labels. train.py and distill.py measure where they measure k-NN,
evaluate.py prints a table.
"""
import copy
import itertools
import math

import numpy as np
import torch
from torch.utils.data import DataLoader

import metrics
from augment import MultiCrop, Photometrics, choose_preset, resize_center
from configurator import UserError
from data import error_text
from distributed import (gather_objects, is_main, item_bytes, loader_workers, rank,
                         workers_that_fit, world_size)
from features import stack_tensors
from loader import LEAST_HELD_OUT
from model import first_blocks, used_features
from positions import position_r2, relative_positions
from signals import ignore_signals
from teachers import FrozenTeacher

MOST_IMAGES = 200  # that are measured, drawn by seed: seconds
N_VIEWS = 2  # random crops of each image
N_CLUSTERS = 10  # of the silhouette
# How views are made: keys of train.py and distill.py, with train.py's defaults
VIEWS = dict(augmentation="auto", global_crops_scale=(0.4, 1.0), min_foreground=0.0,
             horizontal_flip=0.5, vertical_flip=0.5, blur_probability=(1.0, 0.1, 0.5),
             window_jitter=0.0)
TITLES = dict(retrieval="two-view retrieval", lidar="LiDAR", rankme="RankMe",
              uniformity="uniformity", alignment="alignment", silhouette="silhouette",
              position_r2="R2 of slice position")


# ---- measure ----

class ViewedImages(torch.utils.data.Dataset):
    """Images and fixed random crops of them. Item i is a dict with i, pixels [1+q,C,S,S] in the
    images' dtype, the whole image first, and seeds [q] int64, from which photometric draws; for an
    unreadable image a dict with i and error, a text. Crop v of image i is a function of (seed, i,
    v): stream 6 of the seed (run.seed_iteration counts the others)."""

    def __init__(self, dataset, multi_crop, seed, n_views):
        """multi_crop: an augment.MultiCrop of one global and no local crop."""
        self.dataset = dataset.at_least(multi_crop.least_side())
        self.multi_crop, self.seed, self.n_views = multi_crop, seed, n_views

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        i = int(i)
        try:
            image, mask = self.dataset[i]
            pixels, seeds = [resize_center(image, self.multi_crop.globals[1])[None]], []
            for view in range(self.n_views):
                rng = np.random.default_rng((self.seed, 6, i, view))
                crop = self.multi_crop(image, mask, rng)
                pixels.append(crop["global_crops"])
                seeds.append(crop["global_seeds"])
            seeds = torch.cat(seeds) if seeds else torch.zeros(0, dtype=torch.int64)
            return dict(i=i, pixels=torch.cat(pixels), seeds=seeds)
        except Exception as error:  # as text: an exception from a worker fills a page
            return dict(i=i, error=error_text(error, self.dataset, i))


class LabelFree:
    """What a network knows of held-out images, without labels: see `measure`."""

    def __init__(self, held_out, train_set, config, inputs, autocast, n_frozen=0):
        """Args: held_out: Dataset; train_set: Dataset, on which the places of slices are learned,
        or None = no position_r2; config: namespace of train.py's or distill.py's keys; those of
        VIEWS may be missing; inputs: of loader.input_settings; autocast: of
        distributed.autocast_for; n_frozen: so many first blocks are frozen, and what they make of
        the images is kept for the next measurement."""
        self.config, self.inputs, self.autocast = config, inputs, autocast
        self.n_frozen, self.kept = n_frozen, {}  # {id of a Dataset: [(rows, tokens, rope)]}
        self.held_out = with_relative_positions(held_out).limited(MOST_IMAGES, config.seed)
        self.train_set = None
        if train_set is not None and held_out.volume is not None and train_set.volume is not None:
            part = with_relative_positions(train_set)
            known = np.flatnonzero(np.isfinite(part.position_mm))
            self.train_set = part.subset(known, "train").limited(MOST_IMAGES, config.seed)
        views = {key: getattr(config, key, value) for key, value in VIEWS.items()}
        preset = choose_preset(views["augmentation"], held_out.num_channels)
        self.photometrics = Photometrics(preset, **inputs, window_jitter=views["window_jitter"],
                                         blur_probability=views["blur_probability"])
        self.crop_keys = dict(global_crops_scale=views["global_crops_scale"],
                              global_crops_number=1, local_crops_number=0,
                              horizontal_flip=views["horizontal_flip"],
                              vertical_flip=views["vertical_flip"],
                              min_foreground=views["min_foreground"],
                              background=inputs["intensity_range"][0])

    def __bool__(self):
        """False if there are too few images: then nothing is measured."""
        return len(self.held_out) >= LEAST_HELD_OUT

    def measure(self, backbone):
        """{name: float} of a network; {} with less than LEAST_HELD_OUT images.

        retrieval, alignment: mean over all pairs of the N_VIEWS views; lidar: of the views; rankme,
        uniformity, silhouette: of the whole images (functions of the same names in metrics.py);
        position_r2: positions.position_r2 from train to the held-out images, where slices have a
        place; images: how many were measured. Args: backbone: of features.stream_features.
        All ranks work and get equal numbers; the same network always gets the same ones.
        """
        if not self:
            return {}
        size, numbers = self.config.global_crops_size, {}
        if backbone is None:
            size = min(32, size)
        rows, x = self.features(backbone, self.held_out, size, N_VIEWS)
        if self.train_set is not None:
            train_rows, train = self.features(backbone, self.train_set, size, 0)
        if is_main() and len(x) >= LEAST_HELD_OUT:
            numbers = label_free_numbers(x, self.config.seed)
            if self.train_set is not None:
                train, whole = train[:, 0], x[:, 0]
                numbers.update(self.position(train_rows, train, rows, whole))
        return gather_objects(numbers)[0]  # not each rank's own: they could differ by rounding

    def position(self, train_rows, train, rows, x):
        """dict of position_r2, {} if train has one volume, or too few places are known. Args:
        features [n,D] of the images `rows` [n] of train_set and held_out."""
        known = np.isfinite(self.held_out.position_mm[rows])
        volume = self.train_set.volume[train_rows]
        if len(np.unique(volume)) < 2 or known.sum() < LEAST_HELD_OUT:
            return {}
        r2 = position_r2(train, self.train_set.position_mm[train_rows], volume,
                         x[torch.from_numpy(known)], self.held_out.position_mm[rows[known]])
        return dict(position_r2=r2)

    def features(self, backbone, dataset, size, n_views):
        """(rows [n] int, CLS features [n,1+n_views,D] fp32 on the CPU) of the images that can be
        read, whole image first. Every rank computes a share, all ranks get all. The shares have
        the same length, because all ranks must call a sharded network equally often."""
        if id(dataset) in self.kept and backbone is not None:
            return self.from_kept(backbone, dataset, n_views)
        n = math.ceil(len(dataset) / world_size())
        share = np.arange(rank() * n, rank() * n + n) % len(dataset)
        crop = MultiCrop(global_crops_size=size, **self.crop_keys)
        images = ViewedImages(dataset, crop, self.config.seed, n_views)
        batch_size = max(1, 80 // (1 + n_views))
        workers = loader_workers(self.config.num_workers)
        if workers > 0:
            workers = workers_that_fit(workers, item_bytes(images[share[0]]) * batch_size)
        batches = DataLoader(images, batch_size, sampler=share.tolist(), num_workers=workers,
                             collate_fn=stack_tensors, worker_init_fn=ignore_signals)
        rows, found, new = [], [], []
        nothing = dict(pixels=torch.zeros(1, 1 + n_views, dataset.num_channels, size, size),
                       seeds=torch.zeros(1, n_views, dtype=torch.int64))
        for items, errors, tensors in batches:
            if errors and self.config.on_bad_image == "error":
                raise UserError(errors[0])
            cls, shared = self.forward(backbone, **(tensors or nothing))  # as often as other ranks
            if items:
                batch_rows = [item["i"] for item in items]
                rows += batch_rows
                found.extend(cls.numpy())
                new.append((batch_rows, shared))
        if self.n_frozen > 0 and backbone is not None:
            self.kept[id(dataset)] = new
        return self.gather(dataset, rows, found)

    def from_kept(self, backbone, dataset, n_views):
        """`features` of a network whose frozen blocks have been there before."""
        rows, found = [], []
        for batch_rows, shared in self.kept[id(dataset)]:
            with torch.no_grad(), self.autocast():
                cls, _, _ = used_features(backbone, *shared)
            cls = cls.float().cpu().unflatten(0, (1 + n_views, -1))  # [1+q,b,D]
            rows += batch_rows
            found.extend(cls.transpose(0, 1).numpy())
        return self.gather(dataset, rows, found)

    @staticmethod
    def gather(dataset, rows, found):
        """`features` from this rank's rows and [1+q,D] arrays."""
        parts = gather_objects((rows, found))
        rows, found = (list(itertools.chain(*part)) for part in zip(*parts))
        if not rows:
            raise UserError(f"{dataset.name}, {dataset.split}: not one of {len(dataset)} images "
                            "can be read")
        rows, first = np.unique(rows, return_index=True)  # each image once, in order
        return rows, torch.from_numpy(np.stack(found)[first])

    @torch.no_grad()
    def forward(self, backbone, pixels, seeds):
        """CLS features [b,1+q,D] of pixels [b,1+q,C,S,S] and seeds [b,q] of ViewedImages, and what
        the frozen blocks made of them (used_features). Crops are augmented as in training."""
        device = torch.device("cpu")
        if backbone is not None:
            device = next(backbone.parameters()).device
        pixels, seeds = pixels.transpose(0, 1).to(device), seeds.T  # [1+q,b,C,S,S], [q,b]
        batch = [self.photometrics.plain(pixels[0])]
        for view, (crops, crop_seeds) in enumerate(zip(pixels[1:], seeds)):
            kind = ("global1", "global2")[view % 2]
            batch.append(self.photometrics(crops, crop_seeds, kind))
        batch, shared = torch.cat(batch), None  # [(1+q)*b,C,S,S]
        if backbone is None:
            cls = batch.flatten(1)
        else:
            with self.autocast():
                if isinstance(backbone, FrozenTeacher):
                    cls, _ = backbone(batch)
                else:
                    shared = first_blocks(backbone, batch, self.n_frozen)
                    cls, _, _ = used_features(backbone, *shared)
        cls = cls.float().cpu()
        cls = cls.unflatten(0, (-1, pixels.shape[1]))  # [1+q,b,D]
        return cls.transpose(0, 1), shared


def with_relative_positions(dataset):
    """A data set whose position_mm [N] are shares of the volume, 0 to 1 (relative_positions); of
    the whole volume, so before some slices are drawn. Unchanged without volumes."""
    if dataset.volume is None:
        return dataset
    part, mm = copy.copy(dataset), dataset.position_mm
    if mm is None:
        mm = np.full(len(dataset), np.nan)
    part.position_mm = relative_positions(mm, dataset.volume)
    return part


def label_free_numbers(x, seed):
    """The numbers of LabelFree.measure, but for position_r2, of features [n,1+q,D]: of the whole
    images and of q views of each."""
    whole, views = x[:, 0], x[:, 1:]
    pairs = list(itertools.combinations(views.unbind(1), 2))

    def mean_over_pairs(metric):
        return sum(metric(a, b) for a, b in pairs) / len(pairs)
    return dict(images=len(x), retrieval=mean_over_pairs(metrics.two_view_retrieval),
                lidar=metrics.lidar(views), rankme=metrics.rankme(whole),
                uniformity=metrics.uniformity(whole),
                alignment=mean_over_pairs(metrics.alignment),
                silhouette=metrics.silhouette(whole, min(N_CLUSTERS, len(x) // 2), seed))


# ---- the verdict ----

def score(numbers):
    """What the best checkpoint has most of, if there are no labels: two-view retrieval, 0 to 1."""
    return numbers["retrieval"]


def decide(start, now):
    """'worse' or 'cannot tell': the rule. It is worse if two-view retrieval falls by more than its
    noise, the binomial standard error of a share p of n images, sqrt(p (1 - p) / n), and by one
    image at least.

    Nothing is called better, because no number here beat the answer "it helps". Retrieval rose in
    three runs on CT sarcomas whose 5-NN fell, and no number told how a linear probe changes
    (docs/RESULTS.md, "Verdicts without labels"). start, now: of LabelFree.measure."""
    n, p = now["images"], (start["retrieval"] + now["retrieval"]) / 2
    noise = max(1 / n, math.sqrt(p * (1 - p) / n))
    return "worse" if now["retrieval"] - start["retrieval"] < -noise else "cannot tell"


def judge(start=None, now=None):
    """(word, sentence): 'worse' or 'cannot tell', and why. start, now: of LabelFree.measure; None =
    not measured."""
    if not start or not now:
        return "cannot tell", (f"cannot tell: less than {LEAST_HELD_OUT} images could be held out, "
                               "or the start was not measured")
    word = decide(start, now)
    names = [name for name in TITLES if name in start and name in now]
    listed = [f"{TITLES[name]} {start[name]:.3f} -> {now[name]:.3f}" for name in names]
    why = "these numbers may rise while k-NN or a probe falls; some labels would tell"
    if word == "worse":
        why = "crops find their image less often"
    return word, f"{word}: {why}; {now['images']} held-out images, {', '.join(listed)}"


def in_one_line(numbers):
    """The numbers of LabelFree.measure as text."""
    listed = [f"{TITLES[name]} {numbers[name]:.3f}" for name in TITLES if name in numbers]
    return f"{', '.join(listed)} ({numbers['images']} images)"
