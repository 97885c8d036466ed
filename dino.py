"""One training step of DINO, DINOv2 and DINOv3, and of LeJEPA and DIET, which need no teacher. This
file and losses.py hold the whole method.

    schedules         the values of an iteration: learning rate, weight decay, temperature, momentum
    augment_batch     step 1  crops as the loader cut them -> crops as the networks see them
    forward_backward  step 2  the teacher's targets; step 3  the student's losses and gradients
    update            step 5  the student, the teacher and the centers move

train.py calls these four in its loop, bench.py times them, and tests/test_golden.py compares them
with trajectories of the reference implementations. There is no second copy of the step.
`config` is the namespace of train.py's keys, `state` a run.State. Shape letters are those of
model.py: B images, V global, L local and G guided crops, P patches, M masked patches.
"""
from types import SimpleNamespace

import torch

from augment import to_device
from checks import uses_prototypes
from distributed import no_sync, unwrap
from losses import (cls_anchor_loss, diet_loss, dino_loss, gram_loss, ibot_loss, koleo_loss,
                    lejepa_prediction_loss, move_center, random_directions, sigreg_loss,
                    sinkhorn_knopp, softmax_center, sum_rows)
from model import forward_cls, forward_features
from optim import clip_gradients, cosine_schedule, linear_schedule, warmup_factor


def schedules(config, iteration, heads_only_iterations):
    """The values of one iteration. They depend on its number only, so resuming needs no scheduler.

    Args: heads_only_iterations: the backbone waits for so many, then its rate rises to the full
    rate over as many.
    Returns: namespace of lr, last_layer_lr, backbone_factor, weight_decay, momentum, teacher_temp
    (floats) and last_layer_frozen (bool).
    """
    def cosine(start, end, warmup=0):
        return cosine_schedule(start, end, iteration, config.max_iterations, warmup,
                               reach_end=config.schedule_reaches_end)

    lr = cosine(config.lr, config.min_lr, config.warmup_iterations)
    frozen = iteration < config.freeze_last_layer
    return SimpleNamespace(
        lr=lr,
        last_layer_frozen=frozen,
        last_layer_lr=0.0 if frozen and config.freeze_last_layer_by == "lr" else lr,
        backbone_factor=warmup_factor(iteration, heads_only_iterations),
        weight_decay=cosine(config.weight_decay, config.weight_decay_end),
        momentum=cosine(config.momentum_teacher, config.final_momentum_teacher),
        teacher_temp=linear_schedule(config.warmup_teacher_temp, config.teacher_temp, iteration,
                                     config.warmup_teacher_temp_iterations))


# ---- step 1: crops ----

def augment_batch(batch, photometrics, config, device):
    """Turn the loader's native crops into augmented, normalised crops on the device.

    The first global crop of an image is blurred more often than the others (DINO).
    Returns dict: global [V*B,C,S,S]; local [L*B,C,s,s] or None; guided [G*B,C,s,s] or None, the
    last local crops, if the teacher sees them too; masks [V*B,P] bool or None, True = masked;
    masked, of augment.masked_tokens, or None; gram [V*B,C,g,g] or None, larger crops for the Gram
    anchor; plain [B,C,S,S] or None, the first global crops without augmentation, for the CLS
    anchor; index [B], numbers of the images; shared: None, see prefix.py. The crops are those of
    the batch's fresh samples; if there are none, global is None.
    """
    names = "global", "local", "guided", "masks", "masked", "gram", "plain", "shared"
    crops = dict.fromkeys(names)
    crops["index"] = to_device(batch["index"], device)
    if "global_crops" not in batch:
        return crops
    native, seeds = batch["global_crops"].to(device, non_blocking=True), batch["global_seeds"]
    B = len(native) // config.global_crops_number
    first = photometrics(native[:B], seeds[:B], "global1")
    others = photometrics(native[B:], seeds[B:], "global2")
    crops["global"] = torch.cat([first, others])  # [V*B,C,S,S]
    if len(batch["local_crops"]) > 0:
        local = batch["local_crops"].to(device, non_blocking=True)
        crops["local"] = photometrics(local, batch["local_seeds"], "local")  # [L*B,C,s,s]
    if config.label_guided_loss_weight > 0:
        crops["guided"] = crops["local"][-config.label_guided_crops_number * B:]
    if config.ibot_loss_weight > 0:
        crops["masks"] = batch["masks"].to(device, non_blocking=True)
        rows, most = batch["masked"]
        crops["masked"] = rows.to(device, non_blocking=True), most
    if "gram_crops" in batch:
        crops["gram"] = photometrics.plain(batch["gram_crops"].to(device, non_blocking=True))
    if config.cls_anchor_loss_weight > 0:
        crops["plain"] = photometrics.plain(native[:B])
    return crops


# ---- steps 2 and 3: targets and losses ----

def make_targets(teacher_out, centers, teacher_temp, config):
    """Turn the teacher's logits into the distributions that the student has to predict.

    Args: teacher_out: of Student.forward, where the local crops are the G guided ones;
    centers: {'dino': [1,K], 'ibot': [1,K]}, used by 'centering' only.
    Returns dict without gradients: 'dino' [V,B,K]; 'guided' [G,B,K] if the teacher saw guided
    crops; 'ibot' [M,K] if there are masks. Every row sums to 1.
    """
    def to_probs(logits, center):
        if config.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(logits, teacher_temp)
        return softmax_center(logits, center, teacher_temp)

    V, G = config.global_crops_number, config.label_guided_crops_number
    targets = {}
    probs = to_probs(teacher_out["global_logits"], centers["dino"])
    targets["dino"] = probs.unflatten(0, (V, -1))  # [V,B,K]
    if "local_logits" in teacher_out:  # Sinkhorn on its own: small crops use all prototypes, too
        probs = to_probs(teacher_out["local_logits"], centers["dino"])
        targets["guided"] = probs.unflatten(0, (G, -1))  # [G,B,K]
    if "masked_logits" in teacher_out:
        targets["ibot"] = to_probs(teacher_out["masked_logits"], centers["ibot"])  # [M,K]
    return targets


def anchor_targets(state, crops, gram_patches, shared, config, autocast, lap=lambda part: None):
    """What the student has to stay near: dict of patches for the Gram loss, start_cls [B,D] for the
    CLS anchor. gram_patches [V*B,P,D]: of the teacher, None if it is not the anchor; shared: what
    frozen blocks made of the global crops, or None."""
    targets = dict(patches=gram_patches)
    other_crops = crops["gram"] is not None
    if config.gram_loss_weight > 0 and gram_patches is None:
        gram_crops = crops["gram"] if other_crops else crops["global"]
        shared = None if other_crops else shared
        with (state.anchor or state.ema).teacher_weights(state.student) as anchor, autocast():
            _, targets["patches"] = forward_features(anchor.backbone, gram_crops, shared=shared)
        lap("Gram anchor")
    if config.cls_anchor_loss_weight > 0:
        with state.start.teacher_weights(state.student) as start, autocast():
            targets["start_cls"] = forward_cls(start.backbone, crops["plain"])
        lap("CLS anchor")
    return targets


def loss_weights(config):
    """{name of a term: its weight}, in the order of the sum. With prototypes the first six are
    there even if they are 0, for the paper's log line; all others only if they are above 0."""
    dino, lejepa, share = (config.dino_head_loss_weight, config.lejepa_loss_weight,
                           config.lejepa_sigreg_weight)
    weights = dict(dino_local_loss=dino * config.dino_local_loss_weight, dino_global_loss=dino,
                   ibot_loss=config.ibot_loss_weight, koleo_loss=config.koleo_loss_weight,
                   gram_loss=config.gram_loss_weight,
                   label_guided_loss=config.label_guided_loss_weight)
    n_always = len(weights) if uses_prototypes(config) else 0
    weights.update(cls_anchor_loss=config.cls_anchor_loss_weight,
                   lejepa_prediction_loss=lejepa * (1 - share), sigreg_loss=lejepa * share,
                   diet_loss=config.diet_loss_weight)
    always = list(weights)[:n_always]
    return {name: weight for name, weight in weights.items() if weight > 0 or name in always}


def compute_losses(student_out, targets, masks, teacher_patches, config):
    """(total, terms): the weighted sum of all loss terms, and {name: scalar} of every term.

    To add a loss: add its weight to train.py's config block and to loss_weights, its term here, and
    a word to train.log_line. Everything else (log.jsonl, curves, bench.py) follows the names in
    `terms`.

    The DINO loss is the mean over all pairs of a teacher crop and another student crop. Two terms
    show it: V * (V - 1) pairs have a global student crop, V * L a local one. Each term is the mean
    over its pairs times their share of all pairs (DINOv2, DINOv3), so their sum is DINO's loss.
    KoLeo is the sum over the global crops, as in DINOv2, and looks for neighbours on all ranks.

    The guided loss is not in the paper. It is the mean over all pairs of a teacher's guided crop
    and a student's global crop, plus the mean over pairs of two different guided crops. DINO's
    targets come from global crops, so a guided crop that only the student sees never asks a global
    crop to show the lesion. This loss asks for it.
    """
    V, G = config.global_crops_number, config.label_guided_crops_number
    temp, size = config.student_temp, config.koleo_group_size
    weights = loss_weights(config)
    zero = next(iter(student_out.values())).new_zeros((), dtype=torch.float32)
    terms = dict.fromkeys(weights, zero)

    if uses_prototypes(config):
        global_logits = student_out["global_logits"].unflatten(0, (V, -1))  # [V,B,K]
        L = len(student_out.get("local_logits", ())) // global_logits.shape[1]
        n_global, n_local = V * (V - 1), V * L  # numbers of pairs
        pairs = dino_loss(global_logits, targets["dino"], temp)  # [V,B,K] against [V,B,K]
        terms["dino_global_loss"] = n_global / (n_global + n_local) * pairs
        if L > 0:
            local_logits = student_out["local_logits"].unflatten(0, (L, -1))  # guided ones last
            pairs = dino_loss(local_logits, targets["dino"], temp, ignore_diagonal=False)
            terms["dino_local_loss"] = n_local / (n_global + n_local) * pairs
    if config.ibot_loss_weight > 0:
        terms["ibot_loss"] = ibot_loss(student_out["masked_logits"], targets["ibot"], masks, temp)
    if config.koleo_loss_weight > 0:  # before the head; per view: views of one image may be close
        views = student_out["global_cls"].chunk(V)
        terms["koleo_loss"] = sum(koleo_loss(cls, group_size=size) for cls in views)
    if config.gram_loss_weight > 0:
        terms["gram_loss"] = gram_loss(student_out["patches"], teacher_patches)
    if config.label_guided_loss_weight > 0:
        guided = targets["guided"]  # [G,B,K]
        terms["label_guided_loss"] = dino_loss(global_logits, guided, temp, ignore_diagonal=False)
        if G > 1:
            terms["label_guided_loss"] += dino_loss(local_logits[-G:], guided, temp)
    if "cls_anchor_loss" in weights:
        terms["cls_anchor_loss"] = cls_anchor_loss(student_out["plain_cls"], targets["start_cls"])
    if config.lejepa_loss_weight > 0:
        embeddings = student_out["embeddings"].unflatten(0, (-1, len(targets["index"])))  # [S,B,E]
        if "lejepa_prediction_loss" in weights:
            terms["lejepa_prediction_loss"] = lejepa_prediction_loss(embeddings, V)
        if "sigreg_loss" in weights:
            terms["sigreg_loss"] = sigreg_loss(embeddings, targets["directions"])
    if "diet_loss" in weights:
        logits = student_out["image_logits"].unflatten(0, (-1, len(targets["index"])))  # [S,B,N]
        terms["diet_loss"] = diet_loss(logits, targets["index"], config.diet_label_smoothing)
    return sum(weights[name] * term for name, term in terms.items()), terms


def forward_backward(state, crops, teacher_temp, config, autocast, n_micro=1, last=True,
                     lap=lambda part: None):
    """Steps 2 and 3 on one micro-batch. Gradients are added to those of the student's parameters.

    Args: crops: of augment_batch; autocast: of distributed.autocast_for; n_micro: micro-batches
    per iteration; last: True for the micro-batch after which DDP averages the gradients;
    lap: bench.py's clock, called with the name of each part as the part ends.
    Returns: terms, {name: scalar} without gradients and divided by n_micro, with 'loss' the total;
    row_sums, of the teacher's logits, for the centers; teacher_view, dict of the teacher's
    global_cls [V*B,D] and its targets [V*B,K], for metrics.monitor; without prototypes there is no
    teacher, and it is the student's global_cls and None.
    """
    # Step 2. The teacher sees the global crops without masks, and the guided crops if asked. It
    # runs only if there is something to predict: without prototypes the student is compared with
    # itself (LeJEPA) or told which image it sees (DIET)
    teacher_out, targets, row_sums = {}, {}, {}
    masked, with_gram = crops["masked"], config.gram_loss_weight > 0
    is_anchor = state.anchor is None and crops["gram"] is None  # the teacher, of the Gram loss
    if uses_prototypes(config):
        with state.ema.teacher_weights(state.student) as teacher, autocast():
            teacher_out = teacher(crops["global"], crops["guided"], masked=masked,
                                  with_patches=with_gram and is_anchor, shared=crops.get("shared"),
                                  n_shared_blocks=state.n_shared_blocks)
        lap("teacher")
        targets = make_targets(teacher_out, state.centers, teacher_temp, config)
        if config.centering == "centering":
            for name, key in (("dino", "global_logits"), ("ibot", "masked_logits")):
                if key in teacher_out:
                    row_sums[name] = sum_rows(teacher_out[key])
        lap("losses")
    shared = crops.get("shared") or teacher_out.get("shared")  # what frozen blocks made of them
    targets |= anchor_targets(state, crops, teacher_out.get("patches"), shared, config, autocast,
                              lap)
    if config.lejepa_loss_weight > 0:
        directions = random_directions(config.lejepa_out_dim, config.seed, state.iteration)
        targets["directions"] = to_device(directions, crops["index"].device)
    targets["index"] = crops.get("index")

    # Step 3. The student sees all crops, masked where iBOT asks
    with autocast():
        student_out = state.student(crops["global"], crops["local"], crops["masks"], masked,
                                    with_gram, shared=shared, plain_crops=crops.get("plain"))
    lap("student forward")
    total, terms = compute_losses(student_out, targets, crops["masks"], targets["patches"], config)
    lap("losses")
    with no_sync(state.student, last):
        state.scaler.scale(total / n_micro).backward()
    lap("backward")
    terms["loss"] = total
    terms = {name: term.detach() / n_micro for name, term in terms.items()}
    teacher_view = dict(cls=student_out["global_cls"].detach(), probs=None)
    if teacher_out:
        teacher_view = dict(cls=teacher_out["global_cls"], probs=targets["dino"].flatten(0, 1))
    return terms, row_sums, teacher_view


# ---- step 5: the update ----

def update(state, row_sums, values, config):
    """Step 5. Clip, step the optimizer, then move the teacher and the centers.

    Args: row_sums: of forward_backward, summed over the micro-batches; values: of schedules.
    Returns: gradient norm before clipping, a scalar tensor. state.iteration counts one more.
    """
    state.scaler.unscale_(state.optimizer)
    grad_norm = clip_gradients(unwrap(state.student), config.clip_grad, config.clip_grad_by)
    if values.last_layer_frozen and config.freeze_last_layer_by == "grad":
        for group in state.optimizer.param_groups:
            if group["is_last_layer"]:
                for param in group["params"]:
                    param.grad = None
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.student, values.momentum)
    for name, row_sum in row_sums.items():  # this step used the centers of the steps before it
        state.centers[name] = move_center(state.centers[name], row_sum)
    state.iteration += 1
    refresh = config.gram_refresh_iterations
    if state.anchor and refresh > 0 and state.iteration % refresh == 0:
        ema = state.ema.values
        state.anchor.load_state_dict({name: ema[name] for name in state.anchor.values})
    return grad_norm
