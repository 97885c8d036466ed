"""One run: its folder, log, k-NN record, checkpoints, and the wish to stop.

train.py and distill.py drive a Run. It calls no training code: it keeps what a run has to keep.
It writes nothing before open(), which a script calls when all input is known to be good. All ranks
call every method; rank 0 prints and writes.

    out/NAME/config.py              the resolved config; it runs again
    out/NAME/log.jsonl, logs/       the numbers, one object per line; the text that was printed
    out/NAME/checkpoints/last       the state to resume from
    out/NAME/checkpoints/best       the weights with the highest k-NN; best/hf is for AutoModel
    out/NAME/checkpoints/0000250    the state of every saveckp_freq-th iteration
    out/NAME/results/summary.json   the numbers of a finished run
"""
import contextlib
import json
import math
import os
import signal
import time
from dataclasses import dataclass

import numpy as np
import torch

from checkpoint import (export_hf, find_state, link_state, load_optimizer, model_card, open_folder,
                        save_state, truncate_log)
from configurator import UserError, config_text
from distributed import (all_reduce_mean, any_rank, barrier, gather_full, gather_objects, is_main,
                         main_writes, rank, stop_together, unwrap, world_size)
from model import EMATeacher


class Run:
    """See the head of this file."""

    def __init__(self, script, config, described_config, notes=()):
        """Args: script: 'train.py'; config: namespace of its keys; described_config: the text of
        configurator.describe; notes: sentences to print below it. Raises UserError if the
        checkpoint to resume cannot be read."""
        self.script, self.config = script, config
        self.folder = config.out_dir or os.path.join("out", config.model_name)
        self.is_open, self.unwritten = False, []
        self.stop_signals, self.old_handlers, self.bad_images = [], {}, set()
        self.wandb = import_wandb() if config.wandb_log else None
        self.knn = {}  # pixels and untrained: {split: accuracy}; start, best, best_iteration
        self.say(described_config + "\n")
        for note in notes:
            self.say(f"note: {note}")
        self.resumed_from, self.saved = find_state(config.resume_from, self.folder, vars(config),
                                                   self.say)

    # ---- words and numbers ----

    def say(self, text):
        """Print a text. Append it to logs/train.log as soon as the folder is open."""
        if not is_main():
            return
        print(text, flush=True)
        self.unwritten.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self.is_open:
            with open(f"{self.folder}/logs/train.log", "a") as file:
                file.writelines(self.unwritten)
            self.unwritten.clear()

    def log(self, record):
        """Append a record, a dict with at least 'iteration', to log.jsonl."""
        if not is_main():
            return
        with open(f"{self.folder}/log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb:
            self.wandb.log(record, step=record["iteration"])

    def open(self, iteration):
        """Make the folder, or cut its log after `iteration` if the run was resumed.

        From here on SIGTERM and SIGINT only ask the loop to stop (stop_wanted).
        """
        moved_to = ""
        if is_main():
            moved_to = open_folder(self.folder, self.resumed_from, config_text(self.config),
                                   self.script)
            truncate_log(f"{self.folder}/log.jsonl", iteration)
        barrier()
        self.is_open = True
        if moved_to:
            self.say(f"{self.folder} held an earlier run: moved to {moved_to} (to continue a run: "
                     "--resume_from)")
        for number in (signal.SIGTERM, signal.SIGINT):  # preemption; Ctrl-C
            self.old_handlers[number] = signal.signal(
                number, lambda number, _: self.stop_signals.append(number))
        if self.wandb:
            start_curve(self.wandb, self.folder, self.config)
        self.began = self.last_logged_at = time.time()
        self.first_iteration = self.last_logged = iteration

    # ---- during the loop ----

    def stop_wanted(self, batch, may_stop):
        """True on all ranks if one of them got a signal and may stop.

        Raises UserError on all ranks if one of them could not read its batch.
        """
        stop, failed = any_rank(may_stop and self.stop_signals, "error" in batch)  # one message
        if failed:
            stop_together(batch.get("error"))
        self.bad_images.update(batch.get("bad", ()))
        return stop

    def is_due(self, interval, iteration):
        """True every `interval` iterations and at the end; with interval 0 at the end only."""
        at_end = iteration == self.config.max_iterations
        return at_end or (interval > 0 and iteration % interval == 0)

    def log_is_due(self, iteration):
        """True every log_interval iterations, at the end, and after the first iteration."""
        first = iteration == self.first_iteration + 1
        return first or self.is_due(self.config.log_interval, iteration)

    def tick(self, iteration):
        """(seconds per iteration since the last call, time left as text); call it per log line."""
        now, max_iterations = time.time(), self.config.max_iterations
        seconds = (now - self.last_logged_at) / (iteration - self.last_logged)
        per_iteration = (now - self.began) / (iteration - self.first_iteration)
        left = int((max_iterations - iteration) * per_iteration)
        self.last_logged_at, self.last_logged = now, iteration
        return seconds, f"{left // 60}:{left % 60:02d}"

    @contextlib.contextmanager
    def clock_stopped(self):
        """Around a measurement: its time does not count in the seconds per iteration."""
        began = time.time()
        yield
        self.last_logged_at += time.time() - began

    def record_start(self, pixels, untrained):
        """Keep the two results that all later ones are compared with.

        pixels, untrained: {split: k-NN accuracy} of the raw pixels, of the network before training.
        """
        self.knn.update(pixels=pixels, untrained=untrained)
        numbers = ", ".join(f"{split} {value:.4f}" for split, value in pixels.items())
        self.say(f"raw pixels, k-NN (k=5): {numbers}")
        self.record_knn(untrained[self.config.eval_split], 0)
        self.log(dict(iteration=0, knn_accuracy=self.knn["start"]))

    def record_knn(self, accuracy, iteration, advice=""):
        """Keep and print a k-NN accuracy; True if it is the best so far.

        advice: what to try if the accuracy is below the start; '' = do not compare.
        """
        self.knn.setdefault("start", accuracy)
        is_best = accuracy > self.knn.get("best", -1.0)
        if is_best:
            self.knn.update(best=accuracy, best_iteration=iteration)
        start, best = self.knn["start"], self.knn["best"]
        self.say(f"k-NN (k=5, {self.config.eval_split}) at iteration {iteration}: {accuracy:.4f}   "
                 f"start {start:.4f}, best {best:.4f} at {self.knn['best_iteration']}")
        if advice and accuracy < start - 0.01:
            self.say(f"!!!! BELOW THE START by {start - accuracy:.4f}: {advice} !!!!")
        return is_best

    def save(self, state, inputs, best=False, done=False, **more):
        """Write checkpoints/last, link it as `best` and as a numbered one, export for AutoModel.

        Args: state: a State; inputs: dict of intensity_range, mean, std, for the export; best: the
        EMA weights are the best so far; done: the run is finished; more: further parts of the
        state. All ranks call it, because it gathers sharded tensors.
        """
        iteration, config = state.iteration, self.config
        checkpoints = f"{self.folder}/checkpoints"
        parts = dict(state_dict(state), config=vars(config), knn=self.knn, **more)
        parts, weights = gather_full(parts), None
        if best or done:
            with state.ema.teacher_weights(state.student) as network:
                weights = gather_full(network.backbone.state_dict())
        links = ["best"] if best else []
        if iteration > 0 and iteration % config.saveckp_freq == 0:
            links.append(f"{iteration:07d}")
        exports = ["best"] if best else []
        if done:
            exports.append("last")

        def write():
            save_state(f"{checkpoints}/last", parts)
            for name in links:
                link_state(f"{checkpoints}/last", f"{checkpoints}/{name}")
            card = model_card(config.model_name, iteration, self.knn, vars(config),
                              config_text(config))
            for name in exports:
                export_hf(f"{checkpoints}/{name}/hf", unwrap(state.student).backbone,
                          config.global_crops_size, card=card, weights=weights,
                          intensity_scaling=config.intensity_scaling, **inputs)
        main_writes(write)

    # ---- the end ----

    def close(self, iteration):
        """Give the signals back and list unreadable images. True if the run is finished. Else it
        was stopped and has been saved, and close prints the command that resumes it."""
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        if bad := sorted(set().union(*gather_objects(self.bad_images))):
            self.say(f"{len(bad)} image(s) could not be read and were replaced by their "
                     "neighbours:\n  " + "\n  ".join(bad))
        if iteration == self.config.max_iterations:
            return True
        start = "python"
        if world_size() > 1:
            per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            n_machines = world_size() // per_machine
            start = f"torchrun --nnodes={n_machines} --nproc_per_node={per_machine}"
        self.say(f"stopped by a signal after iteration {iteration}, saved. To go on:\n"
                 f"  {start} {self.script} {self.folder}/config.py --resume_from={self.folder}")
        return False

    def summarize(self, iteration, final, loss, rankme, whose):
        """Write results/summary.json and print the closing sentences.

        Args: final: {split: k-NN accuracy at the end}, {} without labels; whose: 'the teacher'.
        """
        if not is_main():
            return
        minutes = (time.time() - self.began) / 60
        summary = dict(self.knn, final=final, iterations=iteration, minutes=minutes, loss=loss)
        with open(f"{self.folder}/results/summary.json", "w") as file:
            json.dump(summary, file)
        learned = f"no labels to measure with, RankMe {rankme:.1f}"
        if final:
            changes = []
            for split, value in final.items():
                untrained, pixels = "not measured", "not measured"
                if split in self.knn.get("untrained", {}):  # not if a resumed run has other data
                    untrained = f"{self.knn['untrained'][split]:.3f}"
                    pixels = f"{self.knn['pixels'][split]:.3f}"
                changes.append(f"{split} {untrained} -> {value:.3f} (raw pixels {pixels})")
            learned = (f"5-NN accuracy of {whose}'s CLS, start -> end: {', '.join(changes)}, "
                       f"best {self.config.eval_split} {self.knn['best']:.3f} at "
                       f"{self.knn['best_iteration']}")
        export = f"{self.folder}/checkpoints/best/hf"
        self.say(f"\nDone: {iteration} iterations in {minutes:.1f} min; {learned}. Everything is "
                 f"in {self.folder}. Look at samples/crops.png and log.jsonl. Use the features "
                 f"with AutoModel.from_pretrained('{export}'), or train on with "
                 f"--model_type={export}.")


def import_wandb():
    """The module wandb on rank 0, None on the other ranks; UserError on all if it is missing."""
    wandb, problem = None, ""
    if is_main():
        try:
            import wandb
        except ImportError:
            problem = "wandb_log=true needs wandb; pip install wandb, or --wandb_log=false"
    stop_together(problem)
    return wandb


def start_curve(wandb, folder, config):
    """Start the curve of a run at Weights & Biases; a resumed run goes on with its own."""
    file = f"{folder}/logs/wandb_id"
    if not os.path.isfile(file):
        with open(file, "w") as new:
            new.write(os.urandom(4).hex())
    wandb.init(project="dino-mx", name=config.model_name, config=vars(config),
               id=open(file).read(), resume="allow")


# ---- what training changes ----

@dataclass
class State:
    """What training changes. A checkpoint holds all of it except the last two lines."""
    student: torch.nn.Module  # plain, or wrapped for DDP or FSDP
    ema: EMATeacher  # averaged student weights: train.py's teacher, distill.py's product
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless mixed_precision is 'fp16'
    centers: dict  # {'dino': [1,K], 'ibot': [1,K]}, for centering
    anchor: EMATeacher = None  # fixed weights for the Gram loss, if it has an anchor of its own
    iteration: int = 0  # number of finished iterations
    n_shared_blocks: int = 0  # frozen blocks that run once for teacher and student


def state_dict(state):
    """What resuming needs; sharded tensors stay sharded (Run.save gathers them)."""
    return dict(iteration=state.iteration, student=unwrap(state.student).state_dict(),
                ema=state.ema.state_dict(), anchor=state.anchor and state.anchor.state_dict(),
                optimizer=state.optimizer.state_dict(), scaler=state.scaler.state_dict(),
                centers=state.centers)


def restore(state, run):
    """Put the checkpoint that a run resumes back into its state, except for the student's weights,
    which a script loads before FSDP shards them. If the config has changed, the checkpoint may lack
    the anchor or weights that only now are trained; those keep the values that they have."""
    saved, max_iterations = run.saved, run.config.max_iterations
    if saved["iteration"] >= max_iterations:
        raise UserError(f"resume_from={run.resumed_from!r} has finished {saved['iteration']} "
                        f"iterations; raise max_iterations={max_iterations} to go on")
    load_optimizer(state.optimizer, saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    for name, value in saved.get("centers", {}).items():
        state.centers[name] = value.to(state.centers[name].device)
    state.iteration = saved["iteration"]
    state.ema.load_state_dict(state.ema.state_dict() | saved["ema"])
    if state.anchor:
        anchor = saved.get("anchor")
        if not anchor:
            names = state.anchor.values.keys() & saved["ema"].keys()
            anchor = {name: saved["ema"][name] for name in names}
            run.say("the checkpoint has no Gram anchor; it begins as the teacher of iteration "
                    f"{state.iteration}")
        state.anchor.load_state_dict(state.anchor.state_dict() | anchor)
    run.knn = saved["knn"]
    run.saved = None  # every tensor of it, whole, would stay in memory on every rank


def gradient_scaler(device, mixed_precision):
    """The scaler that fp16 needs; with other precisions it does nothing."""
    if mixed_precision == "fp16" and device.type != "cuda":
        raise UserError(f"mixed_precision='fp16' on {device.type}: only CUDA has fast fp16; use "
                        "bf16")
    return torch.amp.GradScaler(device.type, enabled=mixed_precision == "fp16")


def seed_iteration(seed, iteration):
    """Seed torch's generator for one iteration of this rank, for dropout and drop path: a resumed
    run draws what the uninterrupted one draws. Stream 5 of the seed; crops and masks use 1 to 4."""
    sequence = np.random.SeedSequence((seed, 5, iteration, rank()))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]) // 2)  # below 2**63


def mean_over_ranks(terms):
    """{name: float}: each logged term, averaged over the ranks in one message."""
    names = sorted(terms)
    means = all_reduce_mean(torch.stack([terms[name] for name in names]))
    return dict(zip(names, means.tolist()))


def check_finite(losses, iteration, lr, indices):
    """Step 4. Raise UserError if the loss is not a number, before anything is touched.

    indices: numbers of this rank's images. All ranks call it and see the same losses.
    """
    if math.isfinite(losses["loss"]):
        return
    terms = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    images = sum(gather_objects(indices), [])
    raise UserError(f"loss is {losses['loss']} at iteration {iteration} ({terms}), lr {lr:.3g}; "
                    "neither weights nor teacher were touched, checkpoints/last is good. Try a "
                    f"lower lr or clip_grad, or mixed_precision=no. Its images: {images}")
