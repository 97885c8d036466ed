"""What features are worth, in numbers: k-NN, linear probe, classification metrics, Dice, and the health of a run.

Tensors in, numbers out, no files and no networks: evaluate.py brings the features, train.py the batches.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from distributed import all_reduce_mean

STRENGTHS = np.logspace(-5, 1, 13)  # inverse L2 penalty C of the probe, scikit-learn's meaning; picked on val


# ---- k-NN: no training and no learning rate, so a change in it is a change in the features ----

@torch.no_grad()
def knn_vote(train_features, train_labels, test_features, k=5, temperature=None, chunk=1024):
    """(predictions, shares): the class of the k most similar training images by cosine, and each class's share [M,c] of
    their votes, a probability. Multi-label: every label by itself, predicted where more than half of the votes have it.

    Args: train_features [N,D], train_labels [N] int or [N,c] 0/1, test_features [M,D]; k: where the set is smaller, all
    of it; temperature: None for a majority vote (the paper; among equal counts the class of the nearest neighbour
    wins), else votes weigh exp(similarity / temperature) (DINO uses 0.07). Computed in chunks of test images, on the
    features' device: memory is chunk * N, never M * N. Returns: predictions [M] int64 ([M,c] bool), shares [M,c] fp32.
    """
    train = F.normalize(train_features.float(), dim=1)
    labels = train_labels.to(train.device).long()
    k = min(k, len(train))
    predictions, shares = [], []
    for test in F.normalize(test_features.float(), dim=1).to(train.device).split(chunk):
        similarity, neighbour = (test @ train.T).topk(k, dim=1)                            # [m,k], nearest first
        classes = labels[neighbour]                                                        # [m,k] or [m,k,c]
        # relative to the nearest, so that exp stays finite at any temperature
        weight = torch.ones_like(similarity) if temperature is None else \
            ((similarity - similarity[:, :1]) / temperature).exp()
        if labels.ndim == 2:
            votes = torch.einsum("mk,mkc->mc", weight, classes.float())
            predictions.append(votes > weight.sum(dim=1, keepdim=True) / 2)
        else:
            votes = torch.zeros(len(test), int(labels.max()) + 1, device=train.device).scatter_add_(1, classes, weight)
            won = votes.gather(1, classes)                                                 # [m,k], of each one's class
            if temperature is None:                           # counts are whole numbers: less than 1 only breaks ties
                won = won - torch.arange(k, device=train.device) / (k + 1)
            predictions.append(classes.gather(1, won.argmax(dim=1, keepdim=True))[:, 0])
        shares.append(votes / weight.sum(dim=1, keepdim=True))
    return torch.cat(predictions), torch.cat(shares)


def knn_classify(train_features, train_labels, test_features, k=5, temperature=None, chunk=1024):
    """[M] int64 predictions of knn_vote, on the features' device ([M,c] bool for multi-label)."""
    return knn_vote(train_features, train_labels, test_features, k, temperature, chunk)[0]


# ---- linear probe ----

def fit_linear(x, y, strength, start=None, weights=None, max_iterations=200, tolerance=1e-5):
    """Logistic regression at one L2 strength, to convergence: minimises over W [D,c], b [c]

        mean over images of weight * cross-entropy(x W + b, y)  +  |W|^2 / (2 * strength * N)

    which is scikit-learn's LogisticRegression(C=strength). Full-batch L-BFGS in fp64: no learning rate, no epochs.
    Args: x [N,D] fp64, standardised; y [N] int64, or [N,c] fp64 of 0/1: independent outputs; start: (W, b) to begin
    from; weights [N] fp64 or None. Returns: (W, b).
    """
    W, b = (value.clone().requires_grad_() for value in start)
    optimizer = torch.optim.LBFGS([W, b], max_iter=max_iterations, tolerance_grad=tolerance, tolerance_change=1e-12,
                                  history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = probe_loss(x @ W + b, y, weights) + (W * W).sum() / (2 * strength * len(x))
        loss.backward()
        return loss
    optimizer.step(closure)
    return W.detach(), b.detach()


def probe_loss(logits, y, weights=None):
    """Mean cross-entropy: softmax over classes for y [N] int64; for y [N,c] of 0/1 the sum over independent outputs."""
    loss = F.cross_entropy(logits, y, reduction="none") if y.ndim == 1 else \
        F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(dim=1)         # [N]
    return loss.mean() if weights is None else (loss * weights).mean()


def fit_probe(train_features, train_labels, val_features, val_labels, balanced=False):
    """Standardise with train, fit every strength of STRENGTHS, keep the one with the lowest loss on val; test is never
    seen. The loss and not the accuracy, which is flat and noisy over strengths: on 250 val images of brain MRI the best
    accuracy chose C = 10 (test 0.797), the lowest loss C = 0.1 (test 0.871).

    Args: features [N,D]; labels [N] int64, or [N,c] 0/1 for multi-label; balanced: every class weighs alike.
    Returns: (probe, strength): probe(features [M,D]) -> probabilities [M,c] fp32 on the CPU.
    """
    device, multi = train_features.device, train_labels.ndim == 2
    x = train_features.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    std = torch.where(std > 1e-8, std, 1.0)                   # a constant feature must not divide by 0

    def standardise(features):
        return (features.to(device).double() - mean) / std

    def weigh(y):                                             # [N], the same sum for every class that occurs
        return len(y) / (len(y.unique()) * y.bincount().double())[y] if balanced else None
    x, x_val = standardise(x), standardise(val_features)
    y, y_val = (labels.to(device).double() if multi else labels.to(device) for labels in (train_labels, val_labels))
    n_outputs = y.shape[1] if multi else int(max(y.max(), y_val.max())) + 1
    solution, best = (x.new_zeros(x.shape[1], n_outputs), x.new_zeros(n_outputs)), None
    for strength in STRENGTHS:                                # from strong to weak: each solution starts the next
        solution = fit_linear(x, y, strength, solution, weigh(y))
        loss = float(probe_loss(x_val @ solution[0] + solution[1], y_val, weigh(y_val)))
        if best is None or loss < best[0]:
            best = (loss, float(strength), solution)
    _, strength, solution = best
    W, b = fit_linear(x, y, strength, solution, weigh(y), max_iterations=2000, tolerance=1e-6)

    def probe(features):
        logits = standardise(features) @ W + b                                             # [M,c]
        return (logits.sigmoid() if multi else logits.softmax(dim=1)).float().cpu()
    return probe, strength


def linear_probe(train_features, train_labels, val_features, val_labels, test_features):
    """Class probabilities [M,n_classes] fp32 of the test images, by logistic regression on standardised features, the
    regularisation picked on val (paper section 3.1; DINOv2's logistic evaluation). Multi-label sets, labels [N,c], are
    c independent outputs. Features [N,D]; labels [N] int64. See fit_probe."""
    probe, _ = fit_probe(train_features, train_labels, val_features, val_labels)
    return probe(test_features)


# ---- numbers ----

def weighted_auc(scores, positive, weights):
    """Area under the ROC curve for R weightings of the same images at once: the share of (positive, negative) pairs in
    the right order, ties half (Mann-Whitney). scores [N]; positive [N] bool; weights [R,N] >= 0.
    Returns: [R] float, nan where one side has no weight."""
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])                        # of each run of equal scores
    weights, positive = weights[:, order], positive[order]
    up = np.add.reduceat(weights * positive, first, axis=1)                                # [R,G]
    down = np.add.reduceat(weights * ~positive, first, axis=1)
    pairs = up.sum(axis=1) * down.sum(axis=1)
    below = np.cumsum(down, axis=1) - down / 2
    return np.divide((up * below).sum(axis=1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def average_precision(scores, positive):
    """Area under precision over recall as a sum of steps: sum over thresholds t of (recall_t - recall_t-1) precision_t,
    equal scores being one threshold. scores [N], positive [N] bool. Returns: float, nan without a positive."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.r_[np.diff(scores[order]) < 0, True])                         # of each run of equal scores
    hits = positive[order].cumsum()[last]                                                  # [G]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / hits[-1]) if positive.any() else math.nan


def classification_metrics(probabilities_or_predictions, labels, predictions=None, bootstrap=0, seed=0):
    """Accuracy, balanced accuracy, precision, recall, F1 and AUC of a classification, as scikit-learn defines them.

    Args: probabilities [N,c] float, or predictions [N] int (no AUC then); labels [N] int, or [N,c] 0/1 for multi-label
    (predicted where above 0.5); predictions: where they are not the most probable class (a vote with ties).
    Returns: dict of floats. accuracy (multi-label: over all entries, as MedMNIST); balanced_accuracy: mean recall of
    the classes that occur; precision, recall, f1, each _macro (mean over classes) and _weighted (by their images: what
    the paper's tables show); auc: one class against the rest, mean over the classes that occur (MedMNIST), nan where
    there is none. bootstrap > 0: also {name}_ci, the 2.5 and 97.5 percentiles over as many resamples of the images.
    """
    scores, labels = np.asarray(probabilities_or_predictions), np.asarray(labels)
    ranked, multi = scores.ndim == 2 and scores.dtype.kind == "f", labels.ndim == 2
    guess = np.asarray(predictions) if predictions is not None else \
        scores > 0.5 if multi else scores.argmax(axis=1) if ranked else scores
    if multi:
        truth, guess = labels > 0, guess > 0                                               # [N,c]
    else:
        n_classes = 1 + int(max(labels.max(), guess.max(), scores.shape[1] - 1 if ranked else 0))
        truth, guess = np.eye(n_classes, dtype=bool)[labels], np.eye(n_classes, dtype=bool)[guess]
    hits, right = (truth & guess).astype(np.float32), (truth == guess).mean(axis=1) if multi else (truth & guess).any(1)
    columns = min(truth.shape[1], scores.shape[1]) if ranked else 0
    two_sided = [c for c in range(columns) if 0 < truth[:, c].sum() < len(truth)]

    def measure(weights):                                     # [R,N] -> dict of [R]
        hit, support, guessed = weights @ hits, weights @ truth, weights @ guess           # [R,c]
        total = weights.sum(axis=1, keepdims=True)                                         # [R,1]
        per_class = dict(precision=hit / np.maximum(guessed, 1e-9), recall=hit / np.maximum(support, 1e-9),
                         f1=2 * hit / np.maximum(support + guessed, 1e-9))
        occurs = support > 0
        balance = per_class["recall"]
        if multi:                                             # two classes each: has it, has it not
            absent = total - support
            balance = (balance + (absent - guessed + hit) / np.maximum(absent, 1e-9)) / 2
        result = dict(accuracy=weights @ right / total[:, 0],
                      balanced_accuracy=(balance * occurs).sum(1) / np.maximum(occurs.sum(1), 1))
        known = support + guessed > 0
        for name, value in per_class.items():
            result[f"{name}_macro"] = (value * known).sum(1) / np.maximum(known.sum(1), 1)
            result[f"{name}_weighted"] = (value * support).sum(1) / np.maximum(support.sum(1), 1e-9)
        areas = [weighted_auc(scores[:, c], truth[:, c], weights) for c in two_sided]
        counted = np.isfinite(areas).sum(axis=0)              # a resample may have lost a class
        result["auc"] = np.divide(np.nansum(areas, axis=0), counted, out=np.full(len(weights), np.nan),
                                  where=counted > 0) if areas else np.full(len(weights), np.nan)
        return result
    n = len(labels)
    result = {name: float(value[0]) for name, value in measure(np.ones((1, n), np.float32)).items()}
    if bootstrap:
        rng = np.random.default_rng(seed)
        draws = [measure(rng.multinomial(n, np.full(n, 1 / n), size=min(50, bootstrap - i)).astype(np.float32))
                 for i in range(0, bootstrap, 50)]            # fifty at a time: memory stays 50 * N
        for name in list(result):
            values = np.concatenate([draw[name] for draw in draws])
            values = values[np.isfinite(values)]
            result[f"{name}_ci"] = tuple(np.percentile(values, (2.5, 97.5)) if len(values) else (math.nan, math.nan))
    return result


def patch_classes(mask, grid, values):
    """The most frequent class of every patch: mask [S,S] of pixel values, grid patches a side, values [c]: the sorted
    values that are classes. Returns: [grid*grid] int, indices into values."""
    cells = np.searchsorted(values, mask).reshape(grid, len(mask) // grid, grid, -1).swapaxes(1, 2)   # [g,g,p,p]
    cells = cells.reshape(grid * grid, -1, 1)
    return (cells == np.arange(len(values))).sum(axis=1).argmax(axis=1)


def dice_per_class(truth, guess, n_classes):
    """Dice 2 |A and B| / (|A| + |B|) of every class, [c] float, nan where neither has it; truth, guess: [N] int."""
    both = np.bincount(truth[truth == guess], minlength=n_classes)
    size = np.bincount(truth, minlength=n_classes) + np.bincount(guess, minlength=n_classes)
    return np.divide(2 * both, size, out=np.full(n_classes, np.nan), where=size > 0)


# ---- health of a run, without labels: train.py logs it ----

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
