"""Numbers that say what features are worth: k-NN, classification metrics; and numbers that say how
a run is doing.

Tensors in, numbers out: no files and no networks. features.py and evaluate.py bring features,
train.py and distill.py bring batches.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from distributed import all_reduce_mean

DINO_KNN = ((10, 0.07), (20, 0.07))  # k and temperature of DINO's weighted k-NN


# ---- k-NN: nothing is trained, so if the accuracy changes, the features have changed ----

@torch.no_grad()
def nearest_images(train_features, test_features, k=5, chunk=1024, train_groups=None,
                   test_groups=None, train_chunk=65536):
    """(similarity [M,k] fp32, indices [M,k] int64): of each of M images, features [M,D], the cosine
    with its k nearest of N images, features [N,D], nearest first, and which these are; at most N.

    Args: chunk, train_chunk: images at a time, so beside the features memory holds chunk *
    train_chunk numbers and train_chunk * D, on the device of train_features: 0.4 GB for any N;
    train_groups [N], test_groups [M] int: the similarity with images of the own group is -inf.
    """
    device, k = train_features.device, min(k, len(train_features))
    queries = F.normalize(test_features.float(), dim=1).to(device)
    queries = queries.split(chunk)
    has_groups = train_groups is not None and test_groups is not None
    if has_groups:
        train_groups = torch.as_tensor(train_groups, device=device).split(train_chunk)
        test_groups = torch.as_tensor(test_groups, device=device).split(chunk)
    found = [None] * len(queries)  # (similarity, indices) [m,k] of each part of the queries
    for n, train in enumerate(train_features.split(train_chunk)):
        train = F.normalize(train.float(), dim=1)
        for part, test in enumerate(queries):
            similarity = test @ train.T  # [m,n]
            if has_groups:
                similarity[test_groups[part][:, None] == train_groups[n]] = -torch.inf
            similarity, nearest = similarity.topk(min(k, len(train)), dim=1)
            nearest += n * train_chunk
            if n > 0:  # the k best of those before and these
                similarity = torch.cat([found[part][0], similarity], dim=1)
                nearest = torch.cat([found[part][1], nearest], dim=1)
                similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
                nearest = nearest.gather(1, order)
            found[part] = similarity, nearest
    similarities, indices = zip(*found)
    return torch.cat(similarities), torch.cat(indices)


@torch.no_grad()
def knn_vote(train_features, train_labels, test_features, k=5, temperature=None, chunk=1024,
             train_groups=None, test_groups=None):
    """(predictions, shares): the k most similar training images, by cosine, vote for their classes.

    A label of a multi-label set is predicted if more than half of the votes have it.

    Args: train_features [N,D]; train_labels [N] int, or [N,c] 0/1 for multi-label; test_features
    [M,D]; k: number of neighbours, at most N are used; temperature: None for a majority vote (the
    paper; if classes have equally many votes, the class of the nearest neighbour wins), else a vote
    weighs exp(similarity / temperature) (DINO uses 0.07); chunk: test images at a time, so memory
    is chunk * N numbers, on the device of train_features; train_groups [N], test_groups [M] int:
    training images of a test image's own group (patient) do not vote for it.
    Returns: predictions [M] int64 ([M,c] bool for multi-label); shares [M,c] fp32, the share of
    each class in the votes, which is a probability, to five decimals.
    """
    similarities, indices = nearest_images(train_features, test_features, k, chunk,
                                           train_groups, test_groups)
    labels = train_labels.to(indices.device).long()
    n_classes, k = int(labels.max()) + 1, indices.shape[1]
    predictions, shares = [], []
    for similarity, neighbours in zip(similarities.split(chunk), indices.split(chunk)):
        classes = labels[neighbours]  # [m,k] or [m,k,c]
        weights = similarity.isfinite().float()  # fewer than k images of other groups
        similarity = similarity.clamp_min(-2)  # cosines are larger; inf - inf is nan
        if temperature is not None:  # relative to the nearest: exp is finite at any temperature
            weights = weights * ((similarity - similarity[:, :1]) / temperature).exp()
        total = weights.sum(dim=1, keepdim=True).clamp_min(1e-12)  # [m,1]
        if labels.ndim == 2:
            votes = torch.einsum("mk,mkc->mc", weights, classes.float())
            predictions.append(votes > total / 2)
        else:
            votes = torch.zeros(len(classes), n_classes, device=classes.device)
            votes.scatter_add_(1, classes, weights)
            score = votes.gather(1, classes)  # [m,k], the votes for the class of each neighbour
            if temperature is None:  # votes are whole numbers: less than 1 only decides ties
                score = score - torch.arange(k, device=classes.device) / (k + 1)
            winner = score.argmax(dim=1, keepdim=True)
            predictions.append(classes.gather(1, winner)[:, 0])
        # cosines are right to 1e-7, so shares to 1e-6. An AUC must not rank the rounding of ties
        shares.append((votes / total).round(decimals=5))
    return torch.cat(predictions), torch.cat(shares)


def knn_classify(train_features, train_labels, test_features, k=5, temperature=None, chunk=1024,
                 train_groups=None, test_groups=None):
    """The predictions of knn_vote, [M] int64 ([M,c] bool for multi-label), on the device of
    train_features. Labels [N] may be any integers, such as codes; predictions are some of them."""
    values, labels = None, train_labels
    if train_labels.ndim == 1:
        values, labels = train_labels.unique(return_inverse=True)
    predictions, _ = knn_vote(train_features, labels, test_features, k, temperature, chunk,
                              train_groups, test_groups)
    return predictions if values is None else values.to(predictions.device)[predictions]


# ---- metrics ----

def weighted_auc(scores, positive, weights):
    """Area under the ROC curve, for R weightings of the same images at once.

    The area is the share of (positive, negative) pairs in which the positive image scores higher; a
    pair of equal scores counts half (Mann-Whitney).
    Args: scores [N]; positive [N] bool; weights [R,N] >= 0. Returns: [R] float, nan if the
    positive or the negative images have no weight.
    """
    order = np.argsort(scores, kind="stable")
    is_new = np.diff(scores[order]) > 0
    first = np.flatnonzero(np.r_[True, is_new])  # [G], where each group of equal scores begins
    weights, positive = weights[:, order], positive[order]
    above = np.add.reduceat(weights * positive, first, axis=1)  # [R,G]
    below = np.add.reduceat(weights * ~positive, first, axis=1)
    n_pairs = above.sum(axis=1) * below.sum(axis=1)
    n_lower = np.cumsum(below, axis=1) - below / 2  # negatives with a lower score, half of equals
    n_ordered = (above * n_lower).sum(axis=1)
    undefined = np.full(len(n_pairs), np.nan)
    return np.divide(n_ordered, n_pairs, out=undefined, where=n_pairs > 0)


def average_precision(scores, positive):
    """Area under precision over recall as a sum of steps: the sum over thresholds t, the distinct
    scores, of (recall_t - recall_t-1) * precision_t.

    Args: scores [N]; positive [N] bool. Returns: float, nan if no image is positive.
    """
    if not positive.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    is_lower = np.diff(scores[order]) < 0
    last = np.flatnonzero(np.r_[is_lower, True])  # [G], where each group of equal scores ends
    hits = positive[order].cumsum()[last]  # [G]
    steps = np.diff(hits, prepend=0) * hits / (last + 1)
    return float(steps.sum() / hits[-1])


def classification_metrics(probabilities_or_predictions, labels, predictions=None, bootstrap=0,
                           seed=0, groups=None):
    """Accuracy, balanced accuracy, precision, recall, F1 and AUC of a classification, as
    scikit-learn defines them.

    Args: probabilities [N,c] float, or predictions [N] int (then there is no AUC); labels [N] int,
    or [N,c] 0/1 for multi-label (predicted if above 0.5); predictions: if they are not the most
    probable classes, as in a vote with ties; bootstrap: number of resamples of the images for
    confidence intervals; seed: of the resamples; groups: [N] int or None: resample groups, such as
    patients, with all their images, because images of one group are not independent.
    Returns: dict of floats.
    accuracy: over images; multi-label: over all entries, as MedMNIST.
    balanced_accuracy: mean recall of the classes that occur.
    precision, recall, f1: each as _macro, the mean over classes, and _weighted, the mean weighted
    by the number of images of a class (the paper's tables show these).
    auc: of one class against the rest, mean over the classes that occur (MedMNIST), or nan.
    If bootstrap > 0 also {name}_ci, the 2.5 and 97.5 percentiles of each over the resamples.
    """
    scores, labels = np.asarray(probabilities_or_predictions), np.asarray(labels)
    has_scores = scores.ndim == 2 and scores.dtype.kind == "f"
    multi_label = labels.ndim == 2
    if predictions is not None:
        predictions = np.asarray(predictions)
    elif multi_label:
        predictions = scores > 0.5
    else:
        predictions = scores.argmax(axis=1) if has_scores else scores
    if multi_label:
        true, predicted = labels > 0, predictions > 0  # [N,c] bool
    else:
        columns = np.arange(scores.shape[1] if has_scores else 0)
        classes = np.unique(np.concatenate([columns, labels, predictions]))  # codes may be large
        true, predicted = labels[:, None] == classes, predictions[:, None] == classes  # [N,c] bool
    n_ranked = min(true.shape[1], scores.shape[1]) if has_scores else 0
    n_true = true.sum(axis=0)  # [c]
    ranked = [c for c in range(n_ranked) if 0 < n_true[c] < len(true)]

    def measure(weights):
        result = _rates(true, predicted, weights, multi_label)
        result["auc"] = _mean_auc(scores, true, weights, ranked)
        return result

    n = len(labels)
    once = measure(np.ones((1, n), np.float32))
    result = {name: float(value[0]) for name, value in once.items()}
    if not bootstrap:
        return result
    rng, draws, unit = np.random.default_rng(seed), [], np.arange(n)
    if groups is not None:
        unit = np.unique(groups, return_inverse=True)[1]
    n_units = unit.max() + 1
    for i in range(0, bootstrap, 50):  # fifty at a time: memory is 50 * N numbers
        size = min(50, bootstrap - i)
        # how often each image, or group of images, is drawn
        counts = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size)
        draws.append(measure(counts[:, unit].astype(np.float32)))
    for name in list(result):
        values = np.concatenate([draw[name] for draw in draws])
        values = values[np.isfinite(values)]
        interval = (math.nan, math.nan)
        if len(values) and n_units > 1:  # of one patient nothing is known
            interval = tuple(np.percentile(values, (2.5, 97.5)))
        result[f"{name}_ci"] = interval
    return result


def _rates(true, predicted, weights, multi_label):
    """Every metric without scores, for R weightings of the images: dict of [R]. true, predicted
    [N,c] bool; weights [R,N] fp32."""
    hits = true & predicted
    correct = hits.any(axis=1)  # [N]
    if multi_label:
        correct = (true == predicted).mean(axis=1)
    hit = weights @ hits.astype(np.float32)  # [R,c], images that have the class and are given it
    support, given = weights @ true, weights @ predicted  # [R,c]
    total = weights.sum(axis=1, keepdims=True)  # [R,1]
    per_class = dict(precision=hit / np.maximum(given, 1e-9),
                     recall=hit / np.maximum(support, 1e-9),
                     f1=2 * hit / np.maximum(support + given, 1e-9))
    balance, occurs = per_class["recall"], support > 0
    if multi_label:  # a label is two classes: the image has it, or has it not
        absent = total - support
        rejected = absent - given + hit
        balance = (balance + rejected / np.maximum(absent, 1e-9)) / 2
    n_occurring = np.maximum(occurs.sum(1), 1)
    result = dict(accuracy=weights @ correct / total[:, 0],
                  balanced_accuracy=(balance * occurs).sum(1) / n_occurring)
    known = support + given > 0
    n_known = np.maximum(known.sum(1), 1)
    n_images = np.maximum(support.sum(1), 1e-9)
    for name, value in per_class.items():
        result[f"{name}_macro"] = (value * known).sum(1) / n_known
        result[f"{name}_weighted"] = (value * support).sum(1) / n_images
    return result


def _mean_auc(scores, true, weights, classes):
    """[R] mean of weighted_auc over some classes, nan without any. A resample may have lost a
    class, which then does not count."""
    mean = np.full(len(weights), np.nan)
    if not classes:
        return mean
    areas = []
    for c in classes:
        areas.append(weighted_auc(scores[:, c], true[:, c], weights))
    total = np.nansum(areas, axis=0)
    n_finite = np.isfinite(areas).sum(axis=0)
    return np.divide(total, n_finite, out=mean, where=n_finite > 0)


# ---- what features know, without labels: verdict.py measures these on held-out images ----

def unit(x):
    """x [N,D] at unit length, float64."""
    return F.normalize(x.double(), dim=1)


def two_view_retrieval(a, b):
    """Share of crops that find the other crop of their image: of crop a_i the nearest b_j by
    cosine, among all N, is b_i; and the other way round. The mean over both directions,

        (mean_i [argmax_j cos(a_i, b_j) = i] + mean_i [argmax_j cos(b_i, a_j) = i]) / 2

    the top-1 accuracy of the task that SimCLR (arXiv 2002.05709) is trained on. If several are
    nearest, it is not found: one feature for all images gives 0. Args: a, b [N,D].
    """
    a, b = unit(a), unit(b)
    similarity = a @ b.T  # [N,N]
    own = similarity.diagonal() - 1e-9  # equal features differ by rounding
    others = similarity.clone().fill_diagonal_(-torch.inf)
    found = [own > others.max(dim=axis).values for axis in (1, 0)]
    return float(torch.stack(found).double().mean())


def lidar(views, delta=1e-4, eps=1e-7):
    """LiDAR, the rank of linear discriminant analysis with every image as its own class (Thilak et
    al. 2023, arXiv 2312.04000): the effective rank

        exp(-sum_k p_k ln p_k),  p_k = l_k / sum_k l_k + eps

    with l the D eigenvalues of S_w^-1/2 S_b S_w^-1/2; S_b the covariance of the images' mean
    features mu_i, S_w that of the views around them plus delta I (both divide by the number of
    terms). It counts the directions that tell images apart and that augmentation leaves alone.
    Args: views [N,q,D], q views of N images. Returns: 1 to about min(N - 1, D).

    The nonzero l are the eigenvalues of M S_w^-1 M^T, [N,N], with M = (mu_i - mu) / sqrt(N).
    """
    x = views.double()
    n, q, width = x.shape
    means = x.mean(dim=1, keepdim=True)  # [N,1,D]
    within = (x - means).flatten(0, 1)  # [N*q,D]
    within = within.T @ within / (n * q)
    within.diagonal().add_(delta)
    between = (means - means.mean(dim=0))[:, 0] / n**0.5  # [N,D]
    solved = torch.cholesky_solve(between.T, torch.linalg.cholesky(within))  # [D,N]
    values = torch.linalg.eigvalsh(between @ solved)  # [N], ascending
    values = values.flip(0)[:width].clamp_min(0)
    values = F.pad(values, (0, width - len(values)))  # [D], the others are 0
    p = values / values.sum().clamp_min(1e-300) + eps
    return float((-(p * p.log()).sum()).exp())


def uniformity(x, t=2):
    """log of the mean of exp(-t |x_i - x_j|^2) over all pairs i != j, with x at unit length (Wang
    and Isola 2020, arXiv 2005.10242, section 4.1.2): 0 = all features are equal; the lower, the
    more evenly they fill the sphere, to about -2 t. Args: x [N,D]."""
    squares = torch.pdist(unit(x)).square()  # [N*(N-1)/2]
    return float(squares.mul(-t).exp().mean().log())


def alignment(a, b):
    """Mean of |a_i - b_i|^2 over images, with a and b at unit length (Wang and Isola 2020, arXiv
    2005.10242, section 4.1.1): 0 = two views of an image have equal features. Args: a, b [N,D]."""
    difference = unit(a) - unit(b)
    return float(difference.square().sum(dim=1).mean())


def silhouette(x, k, seed=0):
    """Mean silhouette of the clusters that k-means finds (Rousseeuw 1987): the mean over images of

        (b - a) / max(a, b)

    a: mean distance to the other images of the own cluster; b: the least mean distance to the
    images of another cluster; 0 for an image that is alone in its cluster. Distances are Euclidean,
    between features at unit length. 1 = compact and far apart, 0 = no clusters, also if all images
    are in one. Args: x [N,D]; k, seed: of spherical_kmeans.
    """
    x = unit(x)
    nearest = (x @ spherical_kmeans(x, k, seed).T).argmax(dim=1)  # [N]
    clusters = F.one_hot(nearest)
    clusters = clusters[:, clusters.sum(dim=0) > 0].double()  # [N,c], those with images
    sizes = clusters.sum(dim=0)  # [c]
    if len(sizes) < 2:
        return 0.0
    sums = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") @ clusters  # [N,c]
    is_own = clusters.bool()
    inside = sums[is_own] / (clusters @ sizes - 1).clamp_min(1)  # [N]
    outside = (sums / sizes).masked_fill(is_own, torch.inf).min(dim=1).values
    values = (outside - inside) / torch.maximum(outside, inside).clamp_min(1e-12)
    is_alone = clusters @ sizes == 1
    return float(values.masked_fill(is_alone, 0).mean())


def spherical_kmeans(x, k, seed=0, n_iterations=20):
    """k directions around which the rows of x gather (Dhillon and Modha 2001).

    Starts from k rows drawn by seed. In each of n_iterations each row joins the centre with the
    largest cosine, then each centre becomes the mean of its rows at unit length. A centre that
    loses all rows stays as it is.
    Args: x [N,D], rows of unit length. Returns: [k,D], rows of unit length.
    """
    first = np.random.default_rng(seed).permutation(len(x))[:k]
    centres = x[torch.from_numpy(first).to(x.device)]
    for _ in range(n_iterations):
        nearest = (x @ centres.T).argmax(dim=1)  # [N]
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)  # [k,D]
        has_rows = sums.norm(dim=1, keepdim=True) > 0
        centres = torch.where(has_rows, F.normalize(sums, dim=1), centres)
    return centres


# ---- health of a run, without labels ----

def rankme(features, eps=1e-7):
    """Effective rank of features [N,D]: exp of the entropy of the normalised singular values
    (RankMe, arXiv 2210.02885, equations 1 and 2). It is 1 if all features lie on one line, which is
    a collapse, and at most min(N, D)."""
    singular = torch.linalg.svdvals(features.float())
    p = singular / singular.sum() + eps
    return float((-(p * p.log()).sum()).exp())


@torch.no_grad()
def monitor(teacher_cls, teacher_probs=None):
    """Health of a run, from one batch.

    Args: teacher_cls [N,D]; teacher_probs [N,K], the DINO targets. Without prototypes there are
    none, and the CLS features are the student's: then only rankme is measured.
    Returns: dict of floats.
    teacher_entropy: mean entropy of the targets over all ranks, from 0 (one-hot) to ln K (uniform).
    prototype_use: exp of the entropy of the mean target over all ranks, as a share of K.
    rankme: of the CLS features of this rank.
    """
    if teacher_probs is None:
        return dict(rankme=rankme(teacher_cls))
    logs = teacher_probs.clamp_min(1e-12).log()
    entropy = -(teacher_probs * logs).sum(dim=1).mean()
    mean = all_reduce_mean(teacher_probs.mean(dim=0))  # [K]
    mean_entropy = -(mean * mean.clamp_min(1e-12).log()).sum()
    used = mean_entropy.exp() / len(mean)
    return dict(teacher_entropy=float(all_reduce_mean(entropy)), prototype_use=float(used),
                rankme=rankme(teacher_cls))


def diagnose(record, n_prototypes, early):
    """A sentence of advice if the numbers of a log record show a known failure, else ''.

    early: the run has just begun, and a loss of ln K is not yet a failure. A record without
    prototype_use is that of a run without prototypes.
    """
    ln_k = math.log(n_prototypes)
    if record["rankme"] < 1.5:
        return ("COLLAPSED: all images get the same feature (RankMe near 1). Try "
                "koleo_loss_weight=0.1, a larger batch, a lower lr, or the other centering.")
    if "prototype_use" not in record:
        return ""
    if record["prototype_use"] * n_prototypes < 1.5:
        return ("COLLAPSED: one prototype takes all images. Try sinkhorn_knopp, a higher "
                "teacher_temp, or a lower lr.")
    loss = record["dino_local_loss"] + record["dino_global_loss"]
    if not early and loss > 0.99 * ln_k and record["teacher_entropy"] > 0.95 * ln_k:
        return ("NOT LEARNING: loss and teacher entropy are at ln K, the targets are uniform. Try "
                "a lower teacher_temp, a larger batch, a lower lr, fewer prototypes, or "
                "sinkhorn_knopp.")
    return ""
