"""What a run hands back: its start, its end, its best checkpoint, or a mixture of start and end.

Training can harm released features. So at the end of a run the candidates are measured on val, and
the one that val prefers becomes checkpoints/best/hf. A mixture is start + share * (end - start) in
all trained weights (WiSE-FT: Wortsman et al. 2022, arXiv 2109.01903); of LoRA it is the scale of
the adapters. checkpoints/best/choice.json has the choice and the table.

The values are read from the disk, tensor by tensor, into those of the EMA teacher: there is no
second copy of the network.
"""
import contextlib
import json
import os

import torch

from checkpoint import saved_iteration
from distributed import gather_objects, local_shard, shard_like, unwrap
from features import block_choices, block_list, knn_score
from metrics import knn_vote
from probe import STRENGTHS, fit_probe
from verdict import in_one_line, judge

SHARES = (0.25, 0.5, 0.75)  # of the end, in mixtures
MOST_IMAGES = 500  # of train and of val, on which candidates are compared


# ---- the values of a candidate ----

def read_values(path):
    """{name: value} of the EMA backbone in a state.pt. Parameters that had not been trained until
    then have the student's values. The tensors stay on the disk until they are used."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    values = {**state["student"], **state["ema"]}
    return {name: value for name, value in values.items() if name.startswith("backbone.")}


def mix(name, start, end, share):
    """One parameter of a mixture: start + share * (end - start). LoRA's change is the product B A,
    and B is 0 at the start: B is mixed, A is the end's, so the change is share times that of the
    end."""
    if share == 1 or ".lora_A." in name:
        return end
    return start + share * (end - start)


@torch.no_grad()
def set_values(ema, start, end, share):
    """Turn the backbone of an EMATeacher into a mixture, in place. start, end: of read_values;
    share: of the end, 0 to 1."""
    for name, value in ema.values.items():
        if name.startswith("backbone."):
            mixed = shard_like(mix(name, start[name], end[name], share), value)
            local_shard(value).copy_(local_shard(mixed))


def find_candidates(best_iteration, end_iteration):
    """[(name, checkpoint whose values are mixed with the start's, share)], the start first. The
    best checkpoint is one of them if it is neither the start nor the end."""
    candidates = [("start", "last", 0.0)]
    for share in SHARES:
        candidates.append((f"{1 - share:g} start + {share:g} end", "last", share))
    candidates.append(("end", "last", 1.0))
    if best_iteration not in (0, end_iteration):
        candidates.append((f"iteration {best_iteration}", "best", 1.0))
    return candidates


def load_choice(run_folder):
    """{name: value} of the backbone that a finished run has handed back, and its choice.json; None,
    None if there is none, or if the run went on since."""
    checkpoints, choice = f"{run_folder}/checkpoints", read_choice(run_folder)
    if not choice or saved_iteration(f"{checkpoints}/last/state.pt") != choice["iteration"]:
        return None, None
    start = read_values(f"{checkpoints}/start/state.pt")
    values = read_values(f"{checkpoints}/{choice['checkpoint']}/state.pt")
    for name, end in values.items():
        values[name] = mix(name, start[name], end, choice["share"])
    return values, choice


def read_choice(run_folder):
    """The content of checkpoints/best/choice.json, None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        with open(f"{run_folder}/checkpoints/best/choice.json") as file:
            return json.load(file)


# ---- how good it is, and which one is chosen ----

def measure(backbone, knn, split, readouts):
    """[dict] of a network, one for each of some readouts, lists of block numbers.

    knn, probe: accuracy on the split of 5-NN and of a linear probe that learn from train; knn_loss,
    probe_loss: their mean -log of the share, or probability, of the true class; train_loss: like
    knn_loss, of the training images, whose own group (patient), or itself, does not vote. Losses
    choose, because val of a small set has some dozen images, or three patients. k-NN's share is
    that of DINO's vote (20 neighbours, temperature 0.07), at least 0.02.
    """
    numbers, rows = sorted(set(sum(readouts, []))), []
    train = knn.features(backbone, "train", block_numbers=numbers)
    val = knn.features(backbone, split, block_numbers=numbers)
    labels, own = val["labels"], train["groups"]
    if own is None:
        own = torch.arange(len(train["labels"]))
    for readout in readouts:
        columns = [numbers.index(number) for number in readout]
        for part in (train, val):
            x = part["readout"].unflatten(1, (len(numbers), -1))  # [N,n,D]
            part["features"] = x[:, columns].flatten(1)
        x, x_val = train["features"], val["features"]
        few = STRENGTHS[::3]
        probe, _ = fit_probe(x, train["labels"], x_val, labels, strengths=few)
        correct = probe(x_val).argmax(dim=1) == labels
        row = dict(blocks=readout, knn=knn_score(train, val), probe_loss=probe.loss)
        row["probe"] = float(correct.float().mean())
        row["knn_loss"] = knn_loss(train, val, train["groups"], val["groups"])
        row["train_loss"] = knn_loss(train, train, own, own)
        rows.append(row)
    return rows


def knn_loss(train, test, train_groups, test_groups):
    """Mean over test of -log of the share of the votes for the true class. train, test: dicts of
    features.shared_features."""
    labels = test["labels"]
    _, shares = knn_vote(train["features"], train["labels"], test["features"], 20, 0.07,
                         train_groups=train_groups, test_groups=test_groups)
    shares = shares.cpu()[torch.arange(len(labels)), labels]
    return float(-shares.clamp_min(0.02).log().mean())


def choose(rows):
    """(index of the candidate, index of its readout): the rule, fixed before it was tried on test.

    A candidate may win only if no readout has a higher loss than the same readout of the start: of
    k-NN, of the probe, of k-NN within train. Of those the sum of all losses of all readouts is
    lowest in the one that is chosen, and of its readouts in the one that is advised.
    rows: [[dict of measure for each readout] for each candidate], the start first.
    """
    def harms(candidate):
        for now, start in zip(candidate, rows[0]):
            if any(now[key] > start[key] for key in LOSSES):
                return True
        return False

    def total(readout):
        return sum(readout[key] for key in LOSSES)
    allowed = [i for i, candidate in enumerate(rows) if i == 0 or not harms(candidate)]
    best = min(allowed, key=lambda i: sum(map(total, rows[i])))
    totals = list(map(total, rows[best]))
    return best, totals.index(min(totals))


LOSSES = ("knn_loss", "probe_loss", "train_loss")


def choose_without_labels(rows):
    """Index of the half-way mixture, or 0, the start, if verdict.judge calls that one worse. No
    number without labels told more, and half of the way had most of the gain of 5-NN
    (docs/RESULTS.md). rows: [dict of LabelFree.measure] of find_candidates."""
    half = 1 + SHARES.index(0.5)
    return 0 if judge(rows[0], rows[half])[0] == "worse" else half


def table(names, rows, chosen, readout):
    """The candidates as a Markdown table; the chosen one and its readout are bold."""
    lines = ["| candidate | blocks | 5-NN | probe | k-NN loss | probe loss | in train |",
             "|" + "---|" * 7]
    for i, (name, candidate) in enumerate(zip(names, rows)):
        for j, row in enumerate(candidate):
            bold = "**" if (i, j) == (chosen, readout) else ""
            numbers = [f"{row[key]:.3f}" for key in ("knn", "probe", *LOSSES)]
            blocks = ",".join(map(str, row["blocks"]))
            lines.append(f"| {bold}{name}{bold} | {blocks} | {' | '.join(numbers)} |")
    return "\n".join(lines)


# ---- the end of a run ----

def hand_back(run, knn, label_free):
    """Compare the candidates of a finished run, and export the chosen one as checkpoints/best/hf.

    It is done for a run that started from released weights and measured its start. All ranks call
    it. Args: run: a run.Run at its end; knn: its features.KnnMeasure; label_free: its
    verdict.LabelFree.
    """
    state, config, checkpoints = run.state, run.config, f"{run.folder}/checkpoints"
    split, with_labels = config.eval_split, config.eval_split in knn.splits
    has_start = gather_objects(os.path.isfile(f"{checkpoints}/start/state.pt"))[0]
    if not has_start or not (with_labels or label_free):
        return
    values = {name: read_values(f"{checkpoints}/{name}/state.pt")
              for name in ("start", "best", "last")}
    candidates = find_candidates(run.knn["best_iteration"], state.iteration)
    small, rows, start = knn.limited(MOST_IMAGES), [], values["start"]
    choices = block_choices(len(block_list(unwrap(state.student).backbone)))
    readouts = [choices[0], choices[min(2, len(choices) - 1)]]
    for _, checkpoint, share in candidates:
        set_values(state.ema, start, values[checkpoint], share)
        with state.ema.teacher_weights(state.student) as teacher:
            if with_labels:
                rows.append(measure(teacher.backbone, small, split, readouts))
            else:
                rows.append(label_free.measure(teacher.backbone))
    rows = gather_objects(rows)[0]  # not each rank's own: they could differ by rounding
    if with_labels:
        chosen, readout = choose(rows)
        blocks = rows[chosen][readout]["blocks"]
        text = table([name for name, _, _ in candidates], rows, chosen, readout)
    else:
        chosen, blocks = choose_without_labels(rows), []
        lines = [f"- {name}: {in_one_line(row)}" for (name, _, _), row in zip(candidates, rows)]
        text = "\n".join(lines)
    name, checkpoint, share = candidates[chosen]
    set_values(state.ema, start, values[checkpoint], share)
    with state.ema.teacher_weights(state.student) as teacher:
        accuracy = knn.accuracy(teacher.backbone, list(knn.splits), blocks)
    run.export_choice(dict(candidate=name, checkpoint=checkpoint, share=share, blocks=blocks,
                           knn=accuracy, iteration=state.iteration, table=text))
    set_values(state.ema, start, values["last"], 1.0)
