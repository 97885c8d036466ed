"""One run: its folder, log, k-NN record, checkpoints, and the wish to stop.

train.py and distill.py drive a Run. It calls no training code: it keeps what a run has to keep.
It writes nothing before open(), which a script calls when all input is known to be good. All ranks
call every method; rank 0 prints and writes.

    out/NAME/config.py              the resolved config; it runs again
    out/NAME/log.jsonl, logs/       the numbers, one object per line; the text that was printed
    out/NAME/checkpoints/last       the state to resume from
    out/NAME/checkpoints/best       the best weights by k-NN or verdict.score; best/hf: AutoModel
    out/NAME/checkpoints/0000250    the state of every saveckp_freq-th iteration
    out/NAME/results/summary.json   the numbers of a finished run
"""
import contextlib
import datetime
import functools
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from card import model_card
from checkpoint import export_hf, find_state, link_state, load_optimizer, save_state, start_from
from configurator import UserError, config_text
from distributed import (all_reduce_mean, any_rank, gather_full, gather_objects, is_main,
                         main_writes, rank, stop_together, unwrap, world_size)
from model import EMATeacher, core
from run_folder import RunFolder, is_inside, read_log, remove, truncate_log, write_whole
from signals import catch_signals
from verdict import in_one_line, judge, score


def whole_run(main):
    """Decorator of a script's main(sources, at_end), which then is called as main(sources).

    However main ends, the ExitStack at_end is closed: a Run has put there what it has to give back.
    """
    @functools.wraps(main)
    def main_with_end(sources):
        with contextlib.ExitStack() as at_end:
            return main(sources, at_end)
    return main_with_end


class Run:
    """See the head of this file."""

    def __init__(self, script, config, described_config, notes, at_end):
        """Args: script: 'train.py'; config: namespace of its keys; described_config: the text of
        configurator.describe; notes: sentences to print below it; at_end: of whole_run. Raises
        UserError if the folder is not ours or in use, or if the checkpoint to resume cannot be
        read."""
        self.script, self.config, self.at_end = script, config, at_end
        if not config.model_name:
            path = os.path.abspath(os.path.expanduser(config.dataset_path))
            config.model_name = os.path.basename(path).removesuffix(".npz") or "root"
        self.folder = os.path.normpath(config.out_dir or f"out/{config.model_name}")
        self.run_folder = RunFolder(self.folder, script, at_end)
        self.is_open, self.unwritten, self.choice = False, [], None
        self.signals, self.stopped_by, self.bad_images = [], 0, set()
        self.wandb = None
        self.losses = LossCheck()
        # pixels and untrained: {split: accuracy}; start, best, best_iteration; label_free: start
        # and now, of verdict.LabelFree. Without labels best is a score
        self.knn = {}
        self.say(described_config + "\n")
        for note in notes:
            self.say(f"note: {note}")
        main_writes(self.run_folder.enter)
        self.resumed_from, self.saved = find_state(config.resume_from, self.folder, vars(config),
                                                   self.say)
        self.goes_on = bool(self.resumed_from) and is_inside(self.resumed_from, self.folder)
        main_writes(lambda: self.run_folder.check_inputs(config, self.goes_on))

    # ---- words and numbers ----

    def say(self, text, stamped=False):
        """Print a text. Append it to logs/train.log as soon as the folder is open, with the time,
        the logger's name and the level, as the paper does (section 2.1.3). stamped: print them,
        too."""
        if not is_main():
            return
        now = datetime.datetime.now().isoformat(" ", "milliseconds").replace(".", ",")
        stamp = f"{now} - dino_trainer_rank{rank()} - INFO - "
        try:
            print(stamp + text if stamped else text, flush=True)
        except OSError:  # the reader has gone, as the terminal after SIGHUP: logs/train.log stays
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self.unwritten.append(f"{stamp}{text}\n")
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

    def open(self, state, inputs, **more):
        """Make the folder, or cut its log after state.iteration if the run goes on there.

        All that can fail has been tried before. From here on the signals only ask the loop to stop
        (stop_wanted). A kill may have left checkpoints/last without its links and exports: they are
        made up for. Args: what save() keeps: a State; a dict of intensity_range, mean, std for the
        export; further parts of a checkpoint.
        """
        self.state, self.inputs, self.more = state, inputs, more
        has_best = True
        if self.config.wandb_log:
            self.wandb, curve = start_curve(self.folder, self.config, self.goes_on)
        if self.wandb:
            self.at_end.callback(self.wandb.finish)

        def make_ready():
            nonlocal has_best
            self.run_folder.open(config_text(self.config), self.goes_on)
            with self.run_folder.writable():
                if self.wandb:
                    write_whole(f"{self.folder}/logs/wandb_id", curve)
                if state.iteration < self.config.max_iterations:  # that of a shorter run
                    remove(f"{self.folder}/results/summary.json")
                if self.goes_on:
                    truncate_log(f"{self.folder}/log.jsonl", state.iteration)
                if self.resumed_from:
                    has_best = start_from(self.resumed_from, self.folder, state.iteration,
                                          self.knn.get("best_iteration"))
        main_writes(make_ready)
        self.is_open = True
        if moved_to := self.run_folder.moved_to:
            self.say(f"{self.folder} held an earlier run: moved to {moved_to} (to continue a run: "
                     "--resume_from)")
        if not gather_objects(has_best)[0] and self.knn.pop("best", None) is not None:
            best_iteration = self.knn.pop("best_iteration")
            self.say(f"the best weights so far, of iteration {best_iteration}, are not there: "
                     "checkpoints/best begins anew")
        catch_signals(self.signals, self.at_end)
        self.began = self.last_logged_at = time.time()
        self.first_iteration = self.last_logged = state.iteration
        self.measured = 0.0  # seconds
        if self.resumed_from:
            self._publish()

    # ---- during the loop ----

    def stop_wanted(self, batch, may_stop):
        """True on all ranks if one of them got a signal and may stop.

        Raises UserError on all ranks if one of them could not read its batch.
        """
        stop, failed = any_rank(may_stop and self.signals, "error" in batch)  # one message
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
        per_iteration = (now - self.began - self.measured) / (iteration - self.first_iteration)
        left = int((max_iterations - iteration) * per_iteration)
        self.last_logged_at, self.last_logged = now, iteration
        return seconds, f"{left // 60}:{left % 60:02d}"

    @contextlib.contextmanager
    def clock_stopped(self):
        """Around a measurement: its time does not count in the seconds per iteration, nor in the
        time left."""
        began = time.time()
        yield
        self.last_logged_at += time.time() - began
        self.measured += time.time() - began

    def record_start(self, pixels, untrained, numbers):
        """Keep the results that all later ones are compared with.

        pixels, untrained: {split: k-NN accuracy} of the raw pixels, of the network before training,
        {} without labels; numbers: of verdict.LabelFree, of that network.
        """
        if pixels:
            self.knn.update(pixels=pixels, untrained=untrained)
            listed = ", ".join(f"{split} {value:.4f}" for split, value in pixels.items())
            self.say(f"raw pixels, k-NN (k=5): {listed}")
        if numbers:
            self.knn["label_free"] = dict(start=numbers)
        _, record = self.record_measures(untrained, numbers, 0)
        self.log(dict(iteration=0, **record))

    def record_measures(self, accuracies, numbers, iteration, advice=""):
        """Keep and print what was measured.

        Args: accuracies: {split: k-NN accuracy}, {} without labels; numbers: of verdict.LabelFree,
        {} = too few images; advice: what to try if k-NN is below the start; '' = do not compare.
        Returns: True if it is the best so far: in k-NN accuracy on eval_split, without labels in
        verdict.score; and its part of a log record.
        """
        record, value = {}, -math.inf
        if numbers:
            self.knn.setdefault("label_free", {})["now"] = record["label_free"] = numbers
            self.say(f"without labels at iteration {iteration}: {in_one_line(numbers)}")
            value = score(numbers)
        if accuracies:
            value = record["knn_accuracy"] = accuracies[self.config.eval_split]
            self.knn.setdefault("start", value)
        is_best = value > self.knn.get("best", -math.inf)
        if is_best:
            self.knn.update(best=value, best_iteration=iteration)
        if accuracies:
            start, best = self.knn["start"], self.knn["best"]
            self.say(f"k-NN (k=5, {self.config.eval_split}) at iteration {iteration}: {value:.4f}"
                     f"   start {start:.4f}, best {best:.4f} at {self.knn['best_iteration']}")
            if advice and value < start - 0.01:
                self.say(f"!!!! BELOW THE START by {start - value:.4f}: {advice} !!!!")
        return is_best, record

    def save(self):
        """Write checkpoints/last, and all else that the state is: `best`, a numbered one, the end.
        All ranks call it, because it gathers sharded tensors. UserError if a loss is no number."""
        self.losses.read()
        architecture = core(unwrap(self.state.student).backbone).config.to_dict()
        for key in ("architectures", "dtype", "torch_dtype"):
            architecture.pop(key, None)  # an export sets them: equal states must be equal files
        parts = dict(self.more, config=vars(self.config), knn=self.knn)
        parts.update(inputs=self.inputs, architecture=architecture)  # for export.py
        parts = gather_full(state_dict(self.state) | parts)

        def write():
            last = f"{self.folder}/checkpoints/last"
            remove(f"{last}/hf")  # of an earlier state
            save_state(last, parts)
        main_writes(write)
        self._publish()

    def _publish(self):
        """Link checkpoints/last as `best` and as a numbered one, and export for AutoModel, where
        this is due. If nothing is measured the best state is the last one. Doing it twice changes
        nothing."""
        state, config, iteration = self.state, self.config, self.state.iteration
        checkpoints, links, exports = f"{self.folder}/checkpoints", [], []
        choice_file = f"{checkpoints}/best/choice.json"
        was_chosen = gather_objects(os.path.isfile(choice_file))[0]
        if iteration == 0 and config.use_pretrained:  # for candidates.py
            links.append("start")
        if iteration > 0 and iteration % config.saveckp_freq == 0:
            links.append(f"{iteration:07d}")
        is_best = iteration == self.knn.get("best_iteration", config.max_iterations)
        if is_best and not (was_chosen and iteration == config.max_iterations):
            links.append("best")
            exports.append("best")
        if iteration == config.max_iterations:
            exports.append("last")

        def write():
            if "best" in links:
                remove(choice_file)
            for name in links:
                link_state(f"{checkpoints}/last", f"{checkpoints}/{name}")
        main_writes(write)
        if exports:
            self._export(exports)

    def _export(self, names, choice=None):
        """Write the EMA backbone as a Hugging Face folder into checkpoints of these names. choice:
        of candidates.hand_back, for the card."""
        state, config, backbone = self.state, self.config, unwrap(self.state.student).backbone
        with state.ema.teacher_weights(state.student) as network:
            weights = gather_full(network.backbone.state_dict())

        def write():
            card = model_card(config.model_name, state.iteration, self.knn, vars(config),
                              config_text(config), backbone.config.num_channels,
                              self.inputs["intensity_range"], choice=choice,
                              intensity_scaling=config.intensity_scaling)
            for name in names:
                export_hf(f"{self.folder}/checkpoints/{name}/hf", backbone,
                          config.global_crops_size, card=card, weights=weights,
                          intensity_scaling=config.intensity_scaling, **self.inputs)
        main_writes(write)

    def export_choice(self, choice):
        """Export the EMA as checkpoints/best/hf: it has the values that candidates.hand_back has
        chosen, and `choice` says how they came about."""
        self.choice = choice
        self._export(["best"], choice)
        path = f"{self.folder}/checkpoints/best/choice.json"
        main_writes(lambda: write_whole(path, json.dumps(choice, indent=1)))
        readout = ""
        if choice["blocks"]:
            readout = f", readout of blocks {','.join(map(str, choice['blocks']))}"
        changes = []
        for split, value in choice["knn"].items():
            start = self.knn.get("untrained", {}).get(split, math.nan)
            changes.append(f"{split} {start:.3f} -> {value:.3f}")
        if changes:
            readout += f"; 5-NN accuracy, start -> handed back: {', '.join(changes)}"
        self.say(f"\n{choice['table']}\nhanded back: {choice['candidate']}{readout}")

    # ---- the end ----

    def close(self):
        """List unreadable images. True if the run is finished and has to be summarized. Else print
        why not; for a run that was stopped and saved, with the command that resumes it."""
        if bad := sorted(set().union(*gather_objects(self.bad_images))):
            self.say(f"{len(bad)} image(s) could not be read and were replaced by their "
                     "neighbours:\n  " + "\n  ".join(bad))
        iteration = self.state.iteration
        if iteration == self.config.max_iterations:
            summary = f"{self.folder}/results/summary.json"
            was_complete = any_rank(is_main() and os.path.isfile(summary))[0]
            if was_complete:
                self.say(f"{self.folder} has finished all {iteration} iterations, nothing is "
                         "missing. To go on, raise max_iterations")
            return not was_complete
        signals = sum(gather_objects(self.signals), [])
        self.stopped_by = signals[0] if signals else 0
        start = "python"
        if world_size() > 1:
            per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            n_machines = world_size() // per_machine
            start = f"torchrun --nnodes={n_machines} --nproc_per_node={per_machine}"
            self.say("torchrun ends with status 1 and a traceback (SignalException or "
                     "ChildFailedError) after every signal, although all is saved")
        self.say(f"stopped by a signal after iteration {iteration}, saved. To go on:\n"
                 f"  {start} {self.script} {self.folder}/config.py --resume_from={self.folder}")
        return False

    def stop_signal(self):
        """The number for end_by: the signal that stopped the run. If the run was finished all the
        same, only Ctrl-C counts, which a shell's loop has to see. 0 = none."""
        if signal.SIGINT in self.signals:
            return signal.SIGINT
        return self.stopped_by

    def summarize(self, final, whose):
        """Write results/summary.json and print the closing sentences. Loss and RankMe are those of
        the log's last line.

        Args: final: {split: k-NN accuracy at the end}, {} without labels; whose: 'the teacher'.
        """
        if not is_main():
            return
        _, last = (read_log(f"{self.folder}/log.jsonl") or [("", {})])[-1]
        iteration, minutes = self.state.iteration, (time.time() - self.began) / 60
        word, sentence = judge(**self.knn.get("label_free", {}))
        summary = dict(self.knn, final=final, iterations=iteration, minutes=minutes,
                       loss=last.get("loss"), verdict=word, handed_back=self.choice)
        write_whole(f"{self.folder}/results/summary.json", json.dumps(summary))
        learned = f"no labels to measure with, RankMe {last.get('rankme', math.nan):.1f}"
        if final:
            changes = []
            for split, value in final.items():
                untrained, pixels = "not measured", "not measured"
                if split in self.knn.get("untrained", {}):  # not if a resumed run has other data
                    untrained = f"{self.knn['untrained'][split]:.3f}"
                    pixels = f"{self.knn['pixels'][split]:.3f}"
                changes.append(f"{split} {untrained} -> {value:.3f} (raw pixels {pixels})")
            learned = f"5-NN accuracy of {whose}'s CLS, start -> end: {', '.join(changes)}"
        if "best" in self.knn:
            learned += (f", best {self.config.eval_split if final else 'score'} "
                        f"{self.knn['best']:.3f} at {self.knn['best_iteration']}")
        export = f"{self.folder}/checkpoints/best/hf"
        self.say(f"\nwithout labels, {whose} at the end against its start: {sentence}")
        self.say(f"\nDone: {iteration} iterations in {minutes:.1f} min; {learned}. Everything is "
                 f"in {self.folder}. Look at samples/crops.png and log.jsonl. Use the features "
                 f"with AutoModel.from_pretrained('{export}'), or train on with "
                 f"--model_type={export}.")


def start_curve(folder, config, goes_on):
    """Start the curve of a run at Weights & Biases, or go on with its own.

    Returns: the module wandb and the curve's id on rank 0, else None and ''. UserError on all ranks
    if wandb is not installed, or if Weights & Biases refuses."""
    wandb, curve, problem, file = None, "", "", f"{folder}/logs/wandb_id"
    if is_main():
        try:
            import wandb
            curve = os.urandom(4).hex()
            if goes_on and os.path.isfile(file):
                with open(file) as found:
                    curve = found.read()
            wandb.init(project="dino-mx", name=config.model_name, config=vars(config), id=curve,
                       resume="allow")
        except ImportError:
            problem = "wandb_log=true needs wandb; pip install wandb, or --wandb_log=false"
        except Exception as error:  # no login, no network, a wrong project: each has its own kind
            problem = (f"wandb_log=true: Weights & Biases does not start ({str(error)[:200]!r}); "
                       "run wandb login, set WANDB_MODE=offline, or use --wandb_log=false")
    stop_together(problem)
    return wandb, curve


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
    start: EMATeacher = None  # the first weights, for the CLS anchor; may be the Gram anchor, too
    iteration: int = 0  # number of finished iterations
    n_shared_blocks: int = 0  # frozen blocks that run once for teacher and student


def state_dict(state):
    """What resuming needs; sharded tensors stay sharded (Run.save gathers them)."""
    return dict(iteration=state.iteration, student=unwrap(state.student).state_dict(),
                ema=state.ema.state_dict(), anchor=state.anchor and state.anchor.state_dict(),
                start=state.start and state.start.state_dict(),
                optimizer=state.optimizer.state_dict(), scaler=state.scaler.state_dict(),
                centers=state.centers)


def restore(state, run):
    """Put the checkpoint that a run resumes back into its state, except for the student's weights,
    which a script loads before FSDP shards them. If the config has changed, the checkpoint may lack
    the anchor or weights that only now are trained; those keep the values that they have."""
    saved, max_iterations = run.saved, run.config.max_iterations
    if saved["iteration"] > max_iterations:
        raise UserError(f"max_iterations={max_iterations}, but {run.resumed_from} has finished "
                        f"{saved['iteration']} iterations; raise it, or resume from an earlier "
                        "folder in checkpoints/")
    if saved["iteration"] == max_iterations:
        run.say(f"all {max_iterations} iterations are finished: only what is missing is made")
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
    if state.start:
        start = saved.get("start") or {}
        state.start.load_state_dict(state.start.state_dict() | start)
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


class LossCheck:
    """Step 4: losses, averaged over the ranks and checked. All ranks see the same numbers.

    A GPU works behind the CPU. To read a number of the step that it computes is to wait until it
    has nothing to do. So on a GPU add() reads the losses of the step before. A loss that is not a
    number then ends the run one step late, but never reaches the disk: Run.save and the log line
    read the latest losses first.
    """

    def __init__(self):
        self.waiting, self.losses = [], {}

    def add(self, terms, iteration, lr, indices):
        """Take the losses of an iteration, {name: scalar tensor}. Raises UserError as read().

        indices: numbers of this rank's images.
        """
        names, arrived = sorted(terms), None
        means = all_reduce_mean(torch.stack([terms[name] for name in names]))  # one message
        values = means.to("cpu", non_blocking=True)  # pinned
        if means.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self.waiting.append((names, values, arrived, iteration, lr, indices))
        self._check(n_left=1 if means.is_cuda else 0)

    def read(self):
        """{name: float} of the latest iteration; waits for them. UserError if a loss is not a
        number. All ranks call it."""
        self._check(n_left=0)
        return self.losses

    def _check(self, n_left):
        while len(self.waiting) > n_left:
            names, values, arrived, iteration, lr, indices = self.waiting.pop(0)
            if arrived:
                arrived.synchronize()
            self.losses = dict(zip(names, values.tolist()))
            if math.isfinite(self.losses["loss"]):
                continue
            terms = ", ".join(f"{name} {value:.4g}" for name, value in self.losses.items())
            images = sum(gather_objects(indices), [])
            raise UserError(f"loss is {self.losses['loss']} at iteration {iteration} ({terms}), lr "
                            f"{lr:.3g}; nothing of it was saved, checkpoints/last is good. Try a "
                            "lower lr or clip_grad, or mixed_precision=no. Its images: "
                            f"{images}")
