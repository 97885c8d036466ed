"""The linear probe: logistic regression from features to classes. Tensors in, tensors out."""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

STRENGTHS = np.logspace(-5, 1, 13)  # inverse L2 penalty C, as scikit-learn defines it


def fit_linear(x, y, strength, start=None, weights=None, max_iterations=200,
               tolerance=1e-5):
    """Logistic regression at one L2 strength, to convergence. It minimises over W [D,c], b [c]

        mean over images of weight * cross-entropy(x W + b, y)  +  |W|^2 / (2 * strength * N)

    like scikit-learn's LogisticRegression(C=strength), by full-batch L-BFGS in fp64: there are no
    learning rate and no epochs to choose.
    Args: x [N,D] fp64, standardised; y [N] int64, or [N,c] fp64 of 0/1 for independent outputs;
    start: (W, b) to begin from; weights: of the images, [N] fp64 or None. Returns: (W, b).
    """
    W, b = (value.clone().requires_grad_() for value in start)
    optimizer = torch.optim.LBFGS([W, b], max_iter=max_iterations, tolerance_grad=tolerance,
                                  tolerance_change=1e-12, history_size=20,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = probe_loss(x @ W + b, y, weights)
        loss = loss + (W * W).sum() / (2 * strength * len(x))
        loss.backward()
        return loss
    optimizer.step(closure)
    return W.detach(), b.detach()


def probe_loss(logits, y, weights=None):
    """Mean cross-entropy of logits [N,c]: over the softmax for y [N] int64; for y [N,c] of 0/1
    summed over independent outputs."""
    if y.ndim == 1:
        loss = F.cross_entropy(logits, y, reduction="none")  # [N]
    else:
        loss = F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(dim=1)
    if weights is not None:
        loss = loss * weights
    return loss.mean()


@dataclass
class Probe:
    """What fit_probe fitted: probe(features [M,D]) -> probabilities [M,c] fp32 on the CPU. mean,
    std [D], weight [D,c], bias [c]: fp64; multi_label: each class is an output of its own; loss:
    on val."""
    mean: torch.Tensor
    std: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    multi_label: bool
    loss: float = math.nan

    def __call__(self, features):
        x = features.to(self.mean.device).double()
        x = (x - self.mean) / self.std
        logits = x @ self.weight + self.bias  # [M,c]
        probs = logits.sigmoid() if self.multi_label else logits.softmax(dim=1)
        return probs.float().cpu()


def fit_probe(train_features, train_labels, val_features, val_labels, balanced=False,
              strengths=STRENGTHS):
    """Fit a linear probe on train, with the one of some strengths that has the lowest loss on val.

    Features are standardised by train; test images are never seen. The loss chooses because the
    accuracy is flat and noisy: on 250 val images of brain MRI the best accuracy chose C = 10 (test
    accuracy 0.797), the lowest loss C = 0.1 (test accuracy 0.871).

    Args: features [N,D]; labels [N] int64, or [N,c] 0/1 for multi-label; balanced: every class has
    the same total weight.
    Returns: (Probe, strength).
    """
    device, multi_label = train_features.device, train_labels.ndim == 2
    x = train_features.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    std = torch.where(std > 1e-8, std, 1.0)  # a constant feature must not divide by 0

    def image_weights(y):
        """[N] with the same sum for every class that occurs, or None."""
        if not balanced:
            return None
        per_class = len(y.unique()) * y.bincount().double()
        return len(y) / per_class[y]

    x_val = val_features.to(device).double()
    x, x_val = (x - mean) / std, (x_val - mean) / std
    axes = None
    if len(x) < x.shape[1]:  # W lies in the span of the images: fewer unknowns, the same solution
        axes, _ = torch.linalg.qr(x.T)  # [D,N]
        x, x_val = x @ axes, x_val @ axes
    y, y_val = train_labels.to(device), val_labels.to(device)
    if multi_label:
        y, y_val, n_outputs = y.double(), y_val.double(), y.shape[1]
    else:
        n_outputs = int(max(y.max(), y_val.max())) + 1
    solution = (x.new_zeros(x.shape[1], n_outputs), x.new_zeros(n_outputs))
    best = None
    for strength in strengths:  # the penalty falls, and each solution is the start of the next
        W, b = solution = fit_linear(x, y, strength, solution, image_weights(y))
        loss = float(probe_loss(x_val @ W + b, y_val, image_weights(y_val)))
        if best is None or loss < best[0]:
            best = (loss, float(strength), solution)
    loss, strength, solution = best
    W, b = fit_linear(x, y, strength, solution, image_weights(y), max_iterations=2000,
                      tolerance=1e-6)
    W = W if axes is None else axes @ W
    return Probe(mean, std, W, b, multi_label, loss), strength


def linear_probe(train_features, train_labels, val_features, val_labels, test_features):
    """Class probabilities [M,n_classes] fp32 of the test images, by logistic regression on
    standardised features; val chooses the penalty (paper section 3.1; DINOv2's logistic
    evaluation). Features [N,D]; labels [N] int64, or [N,c] 0/1 for independent outputs. See
    fit_probe."""
    probe, _ = fit_probe(train_features, train_labels, val_features, val_labels)
    return probe(test_features)
