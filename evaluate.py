"""How good are the features? Features and their k-NN with labels; health of a run without. train.py calls both.

k-NN needs no training and no choice of a learning rate, so a change in it is a change in the features.
"""
import contextlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from augment import Photometrics, resize_center
from configurator import UserError
from distributed import all_reduce_mean, gather_objects, is_main
from model import forward_features


class WholeImages(torch.utils.data.Dataset):
    """The images of a data set at one size: item i -> (i, [C,size,size] in native dtype, ''), or (i, None, error)."""

    def __init__(self, dataset, size):
        self.dataset, self.size = dataset, size

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        try:
            return i, resize_center(self.dataset[i][0], self.size), ""
        except UserError as error:                             # as text: an exception from a worker is a page long
            return i, None, str(error)


@torch.no_grad()
def extract_features(backbone, dataset, size=224, intensity_range=(0, 255), mean=(0.5,), std=(0.5,), batch_size=64,
                     num_workers=0, autocast=contextlib.nullcontext, on_bad_image="error"):
    """CLS features of the images of a data set, in its order.

    Args: backbone: any that forward_features takes, in eval mode, on its device; or None for the raw pixels (at `size`,
    intensities 0..1, flattened): the baseline that features have to beat. size: pixels of the square the images are
    resized to; intensity_range, mean, std: as in training; autocast: called for a context around the forward pass;
    on_bad_image: 'skip' leaves out what cannot be read, 'error' raises UserError.
    Returns: features [N,D] fp32 on the backbone's device (raw: CPU), labels [N] int64 ([N,c] multi-label), or None.
    """
    device = next(backbone.parameters()).device if backbone is not None else torch.device("cpu")
    photometrics = Photometrics("medical", intensity_range, mean, std)
    loader = DataLoader(WholeImages(dataset, size), batch_size=batch_size, num_workers=num_workers, collate_fn=list)
    features, kept = [], []
    for batch in loader:
        if on_bad_image == "error" and any(error for _, _, error in batch):
            raise UserError(next(error for _, _, error in batch if error))
        batch = [(i, image) for i, image, error in batch if not error]
        if not batch:
            continue
        kept += [i for i, _ in batch]
        pixels = photometrics.plain(torch.stack([image for _, image in batch]).to(device))  # [B,C,size,size]
        if backbone is None:
            features.append(pixels.flatten(1))
        else:
            with autocast():
                features.append(forward_features(backbone, pixels)[0].float())             # [B,D]
    labels = None if dataset.labels is None else torch.from_numpy(np.asarray(dataset.labels)[kept].astype(np.int64))
    return torch.cat(features), labels


@torch.no_grad()
def knn_classify(train_features, train_labels, test_features, k=5, temperature=None, chunk=1024):
    """Class of the k most similar training images by cosine.

    Args: train_features [N,D], train_labels [N] int, test_features [M,D]; k: where the set is smaller, all of it;
    temperature: None for a majority vote (the paper; among equal counts the class of the nearest neighbour wins), else
    votes weigh exp(similarity / temperature) (DINO uses 0.07). Computed in chunks of test images, on the features'
    device: memory is chunk * N, never M * N.
    Returns: [M] int64 predictions on that device.
    """
    train = F.normalize(train_features.float(), dim=1)
    labels = train_labels.to(train.device).long()
    k = min(k, len(train))
    predictions = []
    for test in F.normalize(test_features.float(), dim=1).to(train.device).split(chunk):
        similarity, neighbour = (test @ train.T).topk(k, dim=1)                            # [m,k], nearest first
        classes = labels[neighbour]                                                        # [m,k]
        weight = torch.ones_like(similarity) if temperature is None else (similarity / temperature).exp()
        votes = torch.zeros(len(test), int(labels.max()) + 1, device=train.device).scatter_add_(1, classes, weight)
        votes = votes.gather(1, classes)                                                   # [m,k], of each one's class
        if temperature is None:                               # counts are whole numbers: less than 1 only breaks ties
            votes = votes - torch.arange(k, device=train.device) / (k + 1)
        predictions.append(classes.gather(1, votes.argmax(dim=1, keepdim=True))[:, 0])
    return torch.cat(predictions)


def knn_accuracy(backbone, bank, queries, k=5, **settings):
    """{name: share of right predictions} for every data set of `queries` {name: Dataset}, neighbours from `bank`;
    settings: of extract_features; backbone None = raw pixels. Rank 0 measures, the others wait for its dict."""
    result = {}
    if is_main() and queries:
        train_features, train_labels = extract_features(backbone, bank, **settings)
        for name, dataset in queries.items():
            features, labels = extract_features(backbone, dataset, **settings)
            predictions = knn_classify(train_features, train_labels, features, k).cpu()
            result[name] = float((predictions == labels).float().mean())
    return gather_objects(result)[0]


# ---- without labels ----

def rankme(features, eps=1e-7):
    """Effective rank of features [N,D]: exp of the entropy of the normalised singular values (RankMe, arXiv 2210.02885
    equation 1-2). 1 = all images on one line: collapsed; at most min(N, D)."""
    singular = torch.linalg.svdvals(features.float())
    p = singular / singular.sum() + eps
    return float((-(p * p.log()).sum()).exp())


@torch.no_grad()
def monitor(teacher_cls, teacher_probs):
    """Health of a run, from one batch. Args: teacher_cls [N,D]; teacher_probs [N,K], the DINO targets.

    Returns: dict of floats. teacher_entropy: mean entropy of the targets, between 0 (one-hot) and ln K (uniform);
    prototype_use: exp of the entropy of the mean target over all ranks, as a share of K;
    rankme: of the CLS features of this rank.
    """
    entropy = -(teacher_probs * teacher_probs.clamp_min(1e-12).log()).sum(dim=1).mean()
    mean = all_reduce_mean(teacher_probs.mean(dim=0))                                      # [K]
    used = (-(mean * mean.clamp_min(1e-12).log()).sum()).exp() / len(mean)
    return dict(teacher_entropy=float(all_reduce_mean(entropy)), prototype_use=float(used), rankme=rankme(teacher_cls))


def diagnose(record, n_prototypes, early):
    """A sentence of advice where the numbers of a log record show a known failure, else ''. early: the run has just
    begun, when a loss at ln K is no failure yet."""
    ln_k = math.log(n_prototypes)
    if record["rankme"] < 1.5:
        return "COLLAPSED: all images get the same feature (RankMe near 1). " \
               "Try koleo_loss_weight=0.1, a larger batch, a lower lr, or the other centering."
    if record["prototype_use"] * n_prototypes < 1.5:
        return "COLLAPSED: one prototype takes all images. Try sinkhorn_knopp, a higher teacher_temp, or a lower lr."
    loss = record["dino_local_loss"] + record["dino_global_loss"]
    if not early and loss > 0.99 * ln_k and record["teacher_entropy"] > 0.95 * ln_k:
        return "NOT LEARNING: loss and teacher entropy are at ln K, the targets are uniform. " \
               "Try a lower teacher_temp, a larger batch, a lower lr, fewer prototypes, or sinkhorn_knopp."
    return ""
