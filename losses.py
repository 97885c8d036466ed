"""The losses of DINO, iBOT, KoLeo, Gram and distillation, and the two ways from teacher logits to
targets.

Tensors in, scalar out, no state. Everything computes in fp32, whatever the dtype of the input. A
statistic of the batch is taken over all ranks, so one process with B images and two with B/2 give
the same numbers. Shape letters are those of model.py: B images, S student crops, T teacher crops,
K prototypes, M masked patches, P patches, D width.
"""
import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError
from distributed import (add_over_ranks, all_reduce_max, all_reduce_sum, gather_rows,
                         world_size)


# ---- teacher logits -> targets ----

@torch.no_grad()
def softmax_center(teacher_logits, center, teacher_temp):
    """Targets by centering and sharpening: softmax((t - c) / temp). DINO (arXiv 2104.14294) 3.1.

    The center keeps one prototype from taking all images. The low temperature keeps the targets
    from becoming uniform.
    Args: teacher_logits [N,K]; center [1,K]; teacher_temp in (0, 0.1].
    Returns: probs [N,K] fp32, rows sum to 1.
    """
    probs = own_copy(teacher_logits).sub_(center).div_(teacher_temp)  # [N,K]
    for part in few_rows(probs):
        part.copy_(F.softmax(part, dim=-1))
    return probs


# [N,K] of masked patches is the largest tensor of a step, 160 MB in fp32 for 8 images. Work on it
# goes in place or by few rows at a time, because new memory costs more time than the maths.

def own_copy(logits):
    """A copy of [N,K] logits in fp32, to change in place."""
    return logits.to(torch.float32, copy=True)


def few_rows(x, elements=2**22):
    """[N,K] as views of a few rows each, about `elements` numbers: they fit into a CPU's cache, and
    fill a GPU."""
    return x.split(max(1, elements // x.shape[1]))


def update_center(center, teacher_logits, momentum=0.9):
    """The next center: momentum * c + (1 - momentum) * mean of the logits over all rows of all
    ranks. DINO equation 4.

    Call it after the loss: a step uses the center of the steps before it, as in the reference. A
    batch without rows (no masked patch on any rank) leaves the center as it is.
    Args: center [1,K]; teacher_logits [N,K], N may be 0 and may differ by rank.
    Returns: center [1,K] fp32.
    """
    return move_center(center, sum_rows(teacher_logits), momentum)


def sum_rows(teacher_logits):
    """[1,K+1] fp32: the sum of the rows of [N,K] logits, and their number N. The results of several
    micro-batches can be added."""
    n_rows = float(len(teacher_logits))
    n_rows = torch.full((1, 1), n_rows, device=teacher_logits.device)
    row_sum = teacher_logits.sum(dim=0, keepdim=True, dtype=torch.float32)
    return torch.cat([row_sum, n_rows], dim=1)


def move_center(center, row_sums, momentum=0.9):
    """update_center from this rank's row sums [1,K+1] (of sum_rows, added over the micro-batches of
    a step) instead of from logits."""
    total = all_reduce_sum(row_sums)  # one message
    row_sum, n_rows = total[:, :-1], total[:, -1:]
    batch_mean = row_sum / n_rows.clamp_min(1)
    moved = momentum * center + (1 - momentum) * batch_mean
    return torch.where(n_rows > 0, moved, center)


@torch.no_grad()
def sinkhorn_knopp(teacher_logits, teacher_temp, n_iterations=3):
    """Targets that use all prototypes equally: SwAV (arXiv 2006.09882) section 3.1 and appendix A,
    as in DINOv2.

    Q = exp(logits / temp). n_iterations times: scale every prototype (column) to one sum, then
    every row to sum 1, over the rows of all ranks. The common sum of the columns (1/K in the paper)
    cancels when the rows are scaled.

    The first iteration works on logarithms, because a row or a column may be far below the others:
    exp(-100) is 0 in fp32. After it no sum of a column is below 1/K, so the later iterations only
    keep a factor for every column and every row. The relative error is about 1e-7 times the range
    of logits / temp.
    Args: teacher_logits [N,K], N may be 0 and may differ by rank; n_iterations >= 1.
    Returns: probs [N,K] fp32, rows sum to 1, columns nearly to N/K.
    """
    q = own_copy(teacher_logits)  # [N,K], from here on in place
    largest = q.new_full((1, q.shape[1]), float("-inf"))
    if len(q) > 0:
        largest = q.amax(dim=0, keepdim=True)
    largest = all_reduce_max(largest)  # [1,K]
    columns = 0
    for part in few_rows(q):
        part.sub_(largest).div_(teacher_temp)
        columns += part.exp().sum(dim=0, keepdim=True)
    columns = all_reduce_sum(columns).log()  # [1,K]
    for part in few_rows(q):
        part.copy_(F.softmax(part.sub_(columns), dim=-1))
    row_factors, column_factors = q.new_ones(len(q)), q.new_ones(q.shape[1])
    for _ in range(n_iterations - 1):
        columns = all_reduce_sum(row_factors @ q)  # [K]
        column_factors = columns.mean() / columns
        row_factors = 1 / (q @ column_factors)  # [N]
    return q.mul_(column_factors).mul_(row_factors[:, None])


# ---- losses ----

def dino_loss(student_logits, teacher_probs, student_temp=0.1, ignore_diagonal=True):
    """Mean cross-entropy over all pairs of a teacher crop and a student crop. DINO equation 3,
    algorithm 1.

        pairs = 0; total = 0
        for t in range(T):
            for s in range(S):
                if ignore_diagonal and s == t: continue  # a crop is no target for itself
                log_probs = log_softmax(student_logits[s,b] / student_temp)
                total += mean over b of -sum_k teacher_probs[t,b,k] * log_probs[k]
                pairs += 1
        return total / pairs

    With S = 2 global + L local crops, T = 2 and ignore_diagonal this is the DINO loss. DINOv2 and
    DINOv3 split the same pairs into a global and a local term, and weight each term by its share of
    the pairs.
    Args: student_logits [S,B,K]; teacher_probs [T,B,K]. With ignore_diagonal, crop i of the student
    is crop i of the teacher.
    Returns: scalar fp32; ln K if the student is uniform. Raises ValueError if no pair is left.
    """
    S, B, K = student_logits.shape
    T = len(teacher_probs)
    pairs = S * T
    if ignore_diagonal:
        pairs -= min(S, T)
    if pairs == 0:
        raise ValueError(f"dino_loss: {S} student and {T} teacher crops leave no pair of different "
                         "crops; use more crops")
    log_probs = F.log_softmax(student_logits.float() / student_temp, dim=-1)  # [S,B,K]
    products = torch.einsum("sbk,tbk->st", log_probs, teacher_probs.float())
    cross_entropy = -products / B  # [S,T]
    if ignore_diagonal:
        diagonal = torch.eye(S, T, dtype=torch.bool, device=cross_entropy.device)
        cross_entropy = cross_entropy.masked_fill(diagonal, 0)
    return cross_entropy.sum() / pairs


def ibot_loss(student_logits, teacher_probs, masks, student_temp=0.1):
    """Cross-entropy on the masked patches: iBOT (arXiv 2111.07832) equation 2, weighted as in
    DINOv2.

        total = 0
        for crop in range(n_crops):  # crops without a mask count in the mean, with loss 0
            for m in masked patches of crop:
                log_probs = log_softmax(student_logits[m] / student_temp)
                total += -sum_k teacher_probs[m,k] * log_probs[k] / n_masked(crop)
        return total / n_crops

    Args: student_logits, teacher_probs [M,K], the rows of the masked patches in row-major order of
    masks; masks [n_crops,P] bool, True = masked.
    Returns: scalar fp32. If nothing is masked it is 0, with a gradient of zeros. If half of the
    crops have a mask, a uniform student has half of ln K.
    """
    per_crop, n_masked = masks.sum(dim=1), len(student_logits)  # [n_crops], M
    weight = torch.repeat_interleave(1.0 / per_crop, per_crop, output_size=n_masked)  # [M]
    cross_entropy = CrossEntropy.apply(student_logits, teacher_probs, student_temp)  # [M]
    return (cross_entropy * weight).sum() / len(masks)


class CrossEntropy(torch.autograd.Function):
    """-sum_k probs[n,k] * log_softmax(logits[n] / temp)[k] of every row n, [N,K] -> [N] fp32.

    The gradient is written out, because autograd would make and keep five tensors like probs:
        d / d logits[n] = (softmax(logits[n] / temp) * sum_k probs[n,k] - probs[n]) / temp
    There is no gradient for probs.
    """

    @staticmethod
    def forward(ctx, logits, probs, temp):
        ctx.save_for_backward(logits, probs)
        ctx.temp = temp
        parts = []
        for x, p in zip(few_rows(logits), few_rows(probs)):
            log_probs = F.log_softmax(x.float() / temp, dim=-1)
            parts.append(-(log_probs * p).sum(dim=-1))
        return torch.cat(parts)  # [N]

    @staticmethod
    def backward(ctx, grad):
        logits, probs = ctx.saved_tensors
        result = torch.empty_like(logits)  # [N,K]
        grad = (grad / ctx.temp)[:, None].expand_as(logits)  # a view, without memory of its own
        parts = map(few_rows, (result, logits, probs, grad))
        for out, x, p, g in zip(*parts):
            q = F.softmax(x.float() / ctx.temp, dim=-1)
            q.mul_(p.sum(dim=-1, keepdim=True)).sub_(p)
            out.copy_(q.mul_(g))
        return result, None, None


def koleo_loss(features, eps=1e-8, group_size=0):
    """Kozachenko-Leonenko entropy estimator. It pushes each feature away from its nearest neighbour
    in the batch, so that the features spread over the sphere. Sablayrolles et al. (arXiv
    1806.03198) equation 2; DINOv2 section 4.

        x = features / |features|; j(i) = argmax over j != i of <x_i, x_j>  # without gradient
        return -mean over i of log(|x_i - x_j(i) + eps| + eps)

    i and j run over the images of all ranks, as in DINOv3's KoLeoLossDistributed. (DINOv2 compares
    the images of one GPU.) Every rank computes the loss of all rows, so it is the same on all.
    Args: features [B,D], the CLS tokens of one crop, before the head, as many rows on every rank;
    group_size: neighbours are looked for among so many consecutive rows; 0, or more than there are
    rows = among all. DINOv3 at high resolution: 16.
    Returns: scalar fp32; two identical images cost about +18. Raises UserError if a row has no
    neighbour, or if group_size does not divide the rows.
    """
    with torch.autocast(features.device.type, enabled=False):  # bf16 would find wrong neighbours
        x = F.normalize(features.float(), eps=eps, dim=-1)
        x = gather_rows(x)  # [ranks*B,D]
        size = koleo_groups(len(x), group_size)
        with torch.no_grad():
            groups = x.unflatten(0, (-1, size))  # [G,size,D]
            similarity = groups @ groups.mT  # [G,size,size]
            # below -1: never its own neighbour, not even if all others are opposite
            similarity.diagonal(dim1=1, dim2=2).fill_(-2)
            first = torch.arange(0, len(x), size, device=x.device)  # of every group
            neighbour = (similarity.argmax(dim=2) + first[:, None]).flatten()
        distance = F.pairwise_distance(x, x[neighbour], p=2, eps=eps)
        return -(distance + eps).log().mean()


def koleo_groups(n_images, group_size):
    """The number of rows in each group of koleo_loss. n_images: of a micro-batch, over all ranks.
    train.py calls it before the first step, to raise its UserError there."""
    size = n_images if group_size == 0 else min(group_size, n_images)
    if size < 2:
        raise UserError(f"koleo_loss_weight needs 2 images to compare, there is {size} in a group "
                        f"(koleo_group_size={group_size}; {n_images} in a micro-batch over all "
                        "ranks); use a larger global_batch_size, fewer "
                        "gradient_accumulation_steps, or koleo_loss_weight=0")
    if n_images % size > 0:
        raise UserError(f"koleo_group_size={group_size} does not divide the {n_images} images of a "
                        "micro-batch over all ranks; use a divisor, or 0 for all of them")
    return size


def gram_loss(student_patches, teacher_patches, remove_neg=False, remove_only_teacher_neg=False,
              normalize=True):
    """Keep the patch similarities of the student near those of the teacher: DINOv3 (arXiv
    2508.10104) section 4.2.

    |S S^T - T T^T|^2, the mean over the entries of both Gram matrices, per image. Only similarities
    are compared, so the features themselves stay free to move. If the teacher saw a larger crop
    (more patches), its tokens are resized to the student's grid first: bicubic, before normalising.
    To compare all patches of a batch in one matrix, pass [1,B*P,D].
    Args: student_patches [B,P,D]; teacher_patches [B,Q,D]; P and Q are squares if they differ;
    remove_neg: negative similarities of both sides become 0; remove_only_teacher_neg: only the
    teacher's; normalize: unit-length tokens.
    Returns: scalar fp32. Raises ValueError if both remove options are set.
    """
    if remove_neg and remove_only_teacher_neg:
        raise ValueError("gram_loss: remove_neg and remove_only_teacher_neg exclude each other; "
                         "set one")
    student = student_patches.float()
    grid = round(student.shape[1] ** 0.5)
    teacher = resize_grid(teacher_patches.float(), grid, "bicubic")  # [B,P,D]
    if normalize:
        student = F.normalize(student, dim=-1)
        teacher = F.normalize(teacher, dim=-1)
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = student @ student.mT, teacher @ teacher.mT  # [B,P,P]
    if remove_neg:
        student = student.clamp_min(0)
    if remove_neg or remove_only_teacher_neg:
        teacher = teacher.clamp_min(0)
    return F.mse_loss(student, teacher)


def cls_anchor_loss(student_cls, start_cls):
    """Keep the CLS features near those of the network that training started from.

        mean over b of 1 - <s_b, t_b> / (|s_b| |t_b|)

    The Gram anchor keeps similarities and leaves the features free to turn; this one keeps the
    directions themselves. Both networks see the same crops, without augmentation, so the loss is 0
    at the start (with drop path, nearly).
    Args: student_cls [B,D]; start_cls [B,D], computed without gradient.
    Returns: scalar fp32, from 0 to 2.
    """
    student, start = student_cls.float(), start_cls.float()
    return 1 - F.cosine_similarity(student, start, dim=-1).mean()


# ---- losses without prototypes and without a teacher ----

def diet_loss(logits, index, label_smoothing=0.8):
    """Every training image is a class of its own, and every crop has to be told to its image: DIET
    (arXiv 2302.10260); DIET-CP (arXiv 2509.06990) for small sets and released weights.

        for s in range(S):
            for b in range(B):
                log_probs = log_softmax(logits[s,b])
                total += -(1 - smoothing) * log_probs[index[b]]
                total += -smoothing / N * sum_n log_probs[n]
        return total / (S * B)

    Args: logits [S,B,N] of a linear layer on CLS, N training images; index [B] int64, which image a
    column is; label_smoothing in [0, 1), DIET: 0.8.
    Returns: scalar fp32; ln N for a uniform prediction, whatever the smoothing.
    """
    target = index.expand(len(logits), -1).flatten()  # [S*B]
    return F.cross_entropy(logits.flatten(0, 1).float(), target, label_smoothing=label_smoothing)


def lejepa_prediction_loss(embeddings, n_global):
    """Every crop predicts the mean embedding of its image's global crops: LeJEPA (arXiv
    2511.08544), without a predictor and without a stopped gradient.

        mean over s, b, e of (embeddings[s,b,e] - mean over v < n_global of embeddings[v,b,e]) ** 2

    Args: embeddings [S,B,E] of all crops, the global ones first. Returns: scalar fp32.
    """
    embeddings = embeddings.float()
    center = embeddings[:n_global].mean(dim=0)  # [B,E]
    return (embeddings - center).square().mean()


def sigreg_loss(embeddings, directions, t_max=3.0, n_points=17):
    """Sketched isotropic Gaussian regularisation: LeJEPA (arXiv 2511.08544). It pushes
    the embeddings towards a Gaussian of mean 0 and covariance 1, so they can neither collapse to a
    point nor to a subspace.

    In every direction a the Epps-Pulley statistic compares the characteristic function of the
    projections with that of the standard normal. N images, per crop s:

        x_n = <embeddings[s,n], a>
        phi(t) = mean over n of exp(i t x_n)
        T = N * integral over -t_max < t < t_max of |phi(t) - exp(-t^2 / 2)|^2 * exp(-t^2 / 2)

    The loss is the mean of T over directions and crops. The integrand is even, so the trapezoid
    rule runs over n_points from 0 to t_max and counts twice, as in the authors' minimal code. N
    counts the images of all ranks, and so does the mean.
    Args: embeddings [S,B,E], B images of this rank; directions [E,A] of random_directions.
    Returns: scalar fp32, equal on all ranks; about 1.05 for a Gaussian of any N, 0.4 N for zeros.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        x = embeddings.float() @ directions  # [S,B,A]
        n_images = x.shape[1] * world_size()
        t = torch.linspace(0, t_max, n_points, device=x.device)  # [T]
        normal = torch.exp(-t.square() / 2)
        steps = torch.full_like(t, 2 * t_max / (n_points - 1))
        steps[::n_points - 1] /= 2  # both ends
        angles = x[..., None] * t  # [S,B,A,T]
        cosines = angles.cos().sum(dim=1)  # [S,A,T]
        sines = angles.sin().sum(dim=1)
        real, imaginary = add_over_ranks(torch.stack([cosines, sines])) / n_images
        distance = (real - normal).square() + imaginary.square()
        return n_images * (distance @ (steps * normal)).mean()


def random_directions(width, seed, iteration, number=256):
    """Unit vectors [width,number] on the CPU for sigreg_loss: others in every iteration, the same
    on all ranks. number: as in the authors' minimal code."""
    sequence = np.random.SeedSequence((seed, 7, iteration))  # stream 7 of the seed
    generator = np.random.default_rng(sequence)
    directions = torch.from_numpy(generator.standard_normal((width, number), dtype=np.float32))
    return F.normalize(directions, dim=0)


# ---- distillation from a network of another kind ----

def resize_grid(tokens, grid, mode="bilinear"):
    """Resize patch tokens [N,Q,D] of a square grid to a grid x grid one, [N,grid*grid,D]. Tokens
    that have this size are returned as they are."""
    own = round(tokens.shape[1] ** 0.5)
    if own == grid:
        return tokens
    square = tokens.transpose(1, 2).unflatten(2, (own, own))  # [N,D,q,q]
    resized = F.interpolate(square, size=(grid, grid), mode=mode)
    return resized.flatten(2).transpose(1, 2)  # [N,P,D]


def feature_loss(student, teacher, kind="cosine"):
    """How far the student's projected tokens are from the teacher's standardised ones.

    Standardised: mean 0 and variance 1 over the data in every dimension. Else the few large
    dimensions and the common mean of a ViT's tokens would hide the rest.

        cosine      mean over tokens of 1 - <s, t> / (|s| |t|)
        smooth_l1   mean over tokens and dimensions of d^2 / 2 if |d| < 1, else |d| - 1/2; d = s - t

    Args: student, teacher [...,D]; the teacher was computed without gradient.
    Returns: scalar fp32. A student of zeros has 1 with cosine, and about 0.4 with smooth_l1
    (measure it).
    """
    student, teacher = student.float(), teacher.float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()
    return F.smooth_l1_loss(student, teacher)
