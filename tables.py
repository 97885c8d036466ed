"""The paper's tables on your data set: makes the runs that are missing, then prints the table.

    python tables.py --table=11 --dataset_path=wbc_1.npz --models=facebook/dinov2-small
    python tables.py --table=12 --dataset_path=wbc_1.npz --teachers=facebook/dinov2-base
    python tables.py --table=5 --dataset_path=pathmnist --max_iterations=2000 --lr=1e-4 \\
        --global_batch_size=128 --n_processes=2 --global_crops_size=224 --local_crops_size=96 \\
        --local_crops_number=8 --dino_head_out_dim=65536        # the sizes of the paper

Every run is a process of train.py or distill.py, and every command is printed. The same command
again skips finished runs and resumes the others, so a table may be stopped at any time. Tables
share runs. The last teacher of a run is measured, without a choice. Cells are the mean (standard
deviation) over the seeds. The script writes out/tables/DATA/tableN.md and .json, beside each run
RUN/ its settings RUN.py, and in tableN/ what evaluate.py has measured.
"""
from types import SimpleNamespace

from configurator import HERE, list_keys, one_line_errors, read_command_line

# ==== config: the defaults are for small images and two CPU cores; the paper's sizes are above ====
# ---- what ----
table = 11                       # 5 = strategies, also as 6, 7, 8 | 9 = beside published numbers |
#                                10 = minutes and memory | 11 = recipes | 12 = distillation
dataset_path = 'pathmnist'       # as in train.py; table 9: several, comma-separated
dataset_size = 224               # pixels: of MedMNIST 28 | 64 | 128 | 224; of the phantom any size
models = 'facebook/dino-vits16,facebook/dinov2-small'  # start weights, comma-separated
teachers = ''                    # of table 12, comma-separated: hub ids, directories, timm:NAME
recipes = 'dinov1,dinov2'        # files of config/; a model takes its own, in table 11 all of them
strategies = 'standard,lora,freeze'  # of all tables but 11
n_seeds = 1                      # every run is repeated with the seeds 0, 1, ...
test_split = 'test'              # what is measured
out_dir = 'out/tables'           # runs and tables
cache_dir = ''                   # downloads and unpacked arrays; '' = ~/.cache/dino-mx
device = 'auto'                  # 'auto' | 'cpu' | 'cuda' | 'cuda:1'
n_processes = 1                  # of torchrun, for each run

# ---- every run ----
max_iterations = 150             # length of a run; paper: 2000
global_batch_size = 16           # images per optimizer step; paper: 64 for each of two GPUs
lr = 5e-5                        # peak, absolute; config/lora.py takes ten times as much
global_crops_size = 112          # pixels; rounded to a multiple of the model's patch size
local_crops_size = 56            # pixels; likewise
local_crops_number = 4           # small views; paper: 8
dino_head_out_dim = 512          # prototypes K; paper: 65536
freeze_backbone_layers = 6       # of the strategy freeze; paper: 6
flags = ''                       # more of train.py and distill.py: "--koleo_loss_weight=0.1 ..."
bench_steps = 0                  # table 10: also time so many bare steps by bench.py; 0 = none
config_keys = list_keys(globals())
if __name__ == "__main__":  # before the imports that take seconds: --help and a typo answer at once
    sources = read_command_line(globals(), config_keys)

import itertools
import json
import os
import shlex

from checks import Checks
from jobs import call, cost, items, knn_on_val, measure, published, rounded, short, train
from report import PAPER_COLUMNS, cells, data_title, jsonable, markdown
from run_folder import make_results, write_whole

STRATEGIES = dict(standard="Standard", lora="LoRA", freeze="Layer freezing")
LINEAR, KNN = ("linear", "accuracy"), ("knn", "accuracy")
SOURCE = ("\nBenchmark: test set, Table 3 of MedMNIST v2 (Yang et al., Scientific Data 10:41, "
          "2023), pixels in brackets. Ours: the best by k-NN on val of the runs.\n")


# ---- runs ----

def own_recipe(model):
    """The recipe that a model was released with, if it is one of `recipes`, else the first."""
    number = next((n for n in "32" if f"dinov{n}" in short(model).lower()), "1")
    return f"dinov{number}" if f"dinov{number}" in items(recipes) else items(recipes)[0]


def crop_sizes(model):
    sizes = dict(global_crops_size=global_crops_size, local_crops_size=local_crops_size)
    return {key: rounded(size, model) for key, size in sizes.items()}


def make_run(dataset, model, strategy, seed, recipe="", teacher=""):
    """The folder of a run, distilled if there is a teacher; makes it, unless it is finished."""
    recipe = "" if teacher else recipe or own_recipe(model)
    name = f"{short(model)}-{recipe or f'from-{short(teacher)}'}-{strategy}-{seed}"
    folder = f"{out_dir}/{data_title(dataset)}/{name}"
    settings = dict(
        model_name=name, out_dir=folder, seed=seed, device=device, dataset_path=dataset,
        dataset_size=dataset_size, cache_dir=cache_dir, model_type=model, lr=lr, eval_interval=0,
        max_iterations=max_iterations, warmup_iterations=max_iterations // 10,
        global_batch_size=global_batch_size, dino_head_out_dim=dino_head_out_dim,
        local_crops_number=0 if teacher else local_crops_number, **crop_sizes(model),
        momentum_teacher=min(0.996, 1 - 30 / max(max_iterations, 60)))  # as config/dinov1.py says
    words = ["train.py", f"{folder}.py"]
    if teacher:
        words[0], settings["distilled_model_type"] = "distill.py", teacher
    if recipe:
        words.append(f"{HERE}/config/{recipe}.py")
    words += dict(standard=[], lora=[f"{HERE}/config/lora.py"],
                  freeze=[f"--freeze_backbone_layers={freeze_backbone_layers}"])[strategy]
    words += [*shlex.split(flags), "--resume_from=auto"]
    train(words, settings, folder, n_processes)
    return folder


def make_runs(dataset, model, strategy="standard", **more):
    """The folders of make_run for every seed."""
    return [make_run(dataset, model, strategy, seed, **more) for seed in range(n_seeds)]


def by_strategy(dataset, **more):
    """{(model, strategy): folders of make_runs}."""
    pairs = itertools.product(items(models), items(strategies))
    return {pair: make_runs(dataset, *pair, **more) for pair in pairs}


def evaluate(dataset, folders, more=()):
    """jobs.measure of runs, their starts and other weights (more)."""
    folder = f"{out_dir}/{data_title(dataset)}/table{table}"
    return measure(folders, dict(
        compare=",".join([*more, *folders]), dataset_path=dataset, dataset_size=dataset_size,
        cache_dir=cache_dir, test_splits=test_split, out_dir=folder, device=device))


def titles(model, strategy):
    return [short(model), STRATEGIES[strategy]]


# ---- tables: each returns its header, its rows, text below it, and the networks ----

def strategies_table(dataset):
    """Tables 5 to 8: models and strategies, by linear probe and k-NN."""
    runs, columns, rows = by_strategy(dataset), [column[1:] for column in PAPER_COLUMNS], []
    networks = evaluate(dataset, sum(runs.values(), []))
    for (model, strategy), names in runs.items():
        if strategy == items(strategies)[0]:
            start = [networks[names[0]]["start"]]
            rows.append([short(model), "Pretrained", *cells(networks, start, *columns)])
        rows.append(titles(model, strategy) + cells(networks, names, *columns))
    return ["Model", "Adaptation", *(title for title, *_ in PAPER_COLUMNS)], rows, "", networks


def published_table(*datasets):
    """Table 9: the best runs beside published numbers."""
    rows, measured = [], {}
    for dataset in datasets:
        runs = by_strategy(dataset)
        networks = evaluate(dataset, sum(runs.values(), []))
        measured.update(networks)
        best = max(runs, key=lambda pair: knn_on_val(runs[pair]))
        ours = ["{} ({})".format(*titles(*best)),
                *cells(networks, runs[best], LINEAR, ("linear", "auc"))]
        for method, auc, accuracy in published(dataset):
            rows.append([data_title(dataset), method, f"{accuracy:.3f}", f"{auc:.3f}", *ours])
            ours = ["", "", ""]
    header = ["Dataset", "Benchmark model", "Accuracy", "AUC", "DINO-MX, linear probe"]
    return [*header, "Accuracy", "AUC"], rows, SOURCE, measured


def cost_table(dataset):
    """Table 10: minutes of training, without measurements, and memory of real runs."""
    runs, rows, text = by_strategy(dataset), [], ""
    folders = sum(runs.values(), [])
    networks = {name: dict(results=dict(cost=cost(name))) for name in folders}
    for pair, names in runs.items():
        minutes, gb = cells(networks, names, ("cost", "minutes"), ("cost", "gb"))
        rows.append([*titles(*pair), minutes, f"{gb} x {n_processes}"])
    for model in items(models) if bench_steps else ():
        path = f"{out_dir}/{data_title(dataset)}/bench-{short(model)}.txt"
        sizes = dict(crop_sizes(model), local_crops_number=local_crops_number, device=device,
                     dino_head_out_dim=dino_head_out_dim, batch_size=global_batch_size)
        words = ["bench.py", f"--model_type={model}", "--use_pretrained=true",
                 f"--n_steps={bench_steps}", *(f"--{key}={sizes[key]}" for key in sizes)]
        with open(path, "w") as file:
            call(words, output=file)
        text += f"\n{short(model)}, bare steps:\n```\n{open(path).read()}```\n"
    header = ["Model", "Adaptation strategy", "Training time (mins)"]
    return [*header, "Memory (GB x devices)"], rows, text, networks


def recipes_table(dataset):
    """Table 11: a model trained by its own recipe, and by the others; with the losses of each."""
    runs, rows = {}, []
    for model, recipe in itertools.product(items(models), items(recipes)):
        runs[model, recipe] = make_runs(dataset, model, recipe=recipe)
    networks = evaluate(dataset, sum(runs.values(), []))
    for (model, recipe), crossed in runs.items():
        own = runs[model, own_recipe(model)]
        start = [networks[own[0]]["start"]]
        for title, column in (("linear probe", LINEAR), ("k-NN", KNN)):
            row = [short(model), title, *cells(networks, start, column)]
            for names in (own, crossed):
                row.append(f"{cells(networks, names, column)[0]}: {networks[names[0]]['losses']}")
            rows += [row] if recipe != own_recipe(model) else []
    header = ["Model configuration", "Accuracy of", "Pretrained", "Standard approach"]
    return [*header, "Cross-training"], rows, "", networks


def distillation_table(dataset):
    """Table 12: students that were fine-tuned, beside those distilled from each teacher."""
    tuned, columns, rows = by_strategy(dataset), (LINEAR, KNN), []
    groups = {teacher: by_strategy(dataset, teacher=teacher) for teacher in items(teachers)}
    runs = [tuned, *groups.values()]
    folders = [sum(group.values(), []) for group in runs]
    networks = evaluate(dataset, sum(folders, []), items(teachers))
    for teacher in groups:
        numbers = cells(networks, [teacher], *columns)
        rows.append([short(teacher), *"----", *numbers])
    for teacher, group in groups.items():
        for pair, names in group.items():
            numbers = [cells(networks, which, *columns) for which in (tuned[pair], names)]
            row = [short(teacher), *titles(*pair)]
            rows.append(row + sum(numbers, []))
    header = ["Teacher", "Student", "Strategy", "Fine-tuning linear acc.", "k-NN acc."]
    return [*header, "Distill linear acc.", "k-NN acc."], rows, "", networks


def main(sources):
    """Make the table that the config in this module's globals names."""
    config = SimpleNamespace(**{key: globals()[key] for key in config_keys})
    check = Checks(config)
    for text in (models, teachers):
        names = [short(name) for name in items(text)]
        check.need(len(set(names)) == len(names), f"{text!r}: two names end alike; rename one")
    for name in items(recipes):
        check.need(os.path.isfile(f"{HERE}/config/{name}.py"), f"recipes={recipes!r}: no {name}.py "
                   "is in config/; name files like dinov1,dinov2")
    check.need(items(models), "models is empty; name start weights")
    check.need(items(strategies) and set(items(strategies)) <= set(STRATEGIES), f"strategies="
               f"{strategies!r}: choose from {', '.join(STRATEGIES)}")
    check.need(table != 12 or items(teachers), "table 12 has teachers; name them by --teachers")
    check.need(len(items(recipes)) > (table == 11), f"recipes={recipes!r}: too few for this table")
    check.report()
    make = {9: published_table, 10: cost_table, 11: recipes_table, 12: distillation_table}
    datasets = items(dataset_path) if table == 9 else [dataset_path]
    header, rows, text, networks = make.get(table, strategies_table)(*datasets)
    folder = f"{out_dir}/{'-'.join(map(data_title, datasets))}"
    make_results(folder)
    text = (f"# Table {table}: {', '.join(map(data_title, datasets))}, {test_split}\n\n"
            f"{markdown(header, rows)}\n\n{n_seeds} seed(s), {max_iterations} iterations of "
            f"{global_batch_size} images\n{text}")
    kept = dict(config=vars(config), header=header, rows=rows,
                results={name: networks[name]["results"] for name in networks})
    write_whole(f"{folder}/table{table}.json", json.dumps(jsonable(kept), indent=1))
    write_whole(f"{folder}/table{table}.md", text)
    print(f"\n{text}\nThe table is in {folder}/table{table}.md and .json")


if __name__ == "__main__":
    with one_line_errors():
        main(sources)
