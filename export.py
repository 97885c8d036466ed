"""A kept checkpoint of a run as a folder for AutoModel, as ONNX, or on the Hugging Face hub.

    python export.py out/phantom --output=phantom-hf                      # best, else last
    python export.py out/phantom/checkpoints/0000250 --output=phantom-250
    python export.py out/phantom --output=phantom-rgb --rgb=true          # for pipelines
    python export.py out/phantom --output=phantom-hf --onnx=true --push_to_hub=me/phantom

It needs the run's state.pt and nothing else: neither the start's weights nor the data, and the run
may have been interrupted. The weights are those of the EMA.
"""
import os
import re
import sys
from types import SimpleNamespace

from configurator import (UserError, config_text, describe, list_keys, one_line_errors,
                          read_command_line)

# ==== config ====
model = ''                       # a run, or one of its checkpoints; may stand without a key
output = ''                      # the folder to make
overwrite = False                # replace an earlier export in output
rgb = False                      # one channel -> three equal ones, which pipelines can load
onnx = False                     # also write model.onnx, checked with onnxruntime
push_to_hub = ''                 # also upload the folder as this repository, like me/phantom
config_keys = list_keys(globals())
if __name__ == "__main__":  # before the imports that take seconds: --help and a typo answer at once
    for i, word in enumerate(sys.argv):
        if i > 0 and not re.match("-|.*[.]py$", word):  # no key and no config file
            sys.argv[i] = f"--model={word}"
    sources = read_command_line(globals(), config_keys)

import glob
import tempfile

import torch
import transformers

from candidates import load_choice
from card import model_card
from checkpoint import export_hf, load_state, saved_states
from model import (add_adapters, backbone_from_config, build_backbone, forward_features,
                   set_channels)
from weights import constructor_arguments, first_line, pretrained_input

OURS = {"README.md", "adapter", "config.json", "model.onnx", "model.onnx.data", "model.safetensors",
        "preprocess.py", "preprocessor_config.json"}  # what an export holds


def find_checkpoint(path):
    """The folder with the state.pt that `model` means: best, else last, of a run. UserError if
    there is none."""
    checkpoints = os.path.join(path, "checkpoints")
    for folder in (path, f"{checkpoints}/best", f"{checkpoints}/last"):
        if os.path.isfile(f"{folder}/state.pt"):
            return folder
    run = path if os.path.isdir(checkpoints) else re.split("/checkpoints(?:/|$)", path)[0]
    kept = [file.split(os.sep)[-2] for file in saved_states(run)]
    raise UserError(f"model={path!r} has no state.pt; give a run or one of its checkpoints "
                    f"({run} has {', '.join(kept) or 'none'})")


def load_checkpoint(folder):
    """(state, backbone, inputs) of a checkpoint: the EMA backbone on the CPU, or its peft wrapper;
    dict of intensity_range, mean, std. States of before held neither the network's config, which
    is then taken from the start, nor the input, taken from an export of the run."""
    try:
        state = load_state(folder)
    except UserError as error:
        raise UserError(str(error).replace("resume_from=", "model=")) from None
    config, weights = SimpleNamespace(**state["config"]), {}
    for name, value in {**state["student"], **state["ema"]}.items():
        if name.startswith("backbone."):
            weights[name.removeprefix("backbone.")] = value
    if os.path.basename(folder) == "best":  # what the run has handed back may be a mixture
        values, choice = load_choice(os.path.dirname(os.path.dirname(folder)))
        if choice:
            state.update(choice=choice, iteration=choice["iteration"])
            weights.update((name.removeprefix("backbone."), values[name]) for name in values)
    filters = next(value for value in weights.values() if value.ndim == 4)  # [D,C,p,p]
    if "architecture" in state:
        shape = dict(state["architecture"])
        shape = transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
        arguments = constructor_arguments(shape)
        backbone = transformers.AutoModel.from_config(shape, **arguments).float()
    elif config.use_pretrained:
        backbone = build_backbone(config.model_type, False, filters.shape[1])
    else:
        backbone = backbone_from_config(vars(config), filters.shape[1])
    backbone.config.name_or_path = config.model_type if config.use_pretrained else ""
    backbone = add_adapters(backbone, config)
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"model={model!r}: its weights do not fit {config.model_type} "
                        f"({first_line(error)})") from None
    inputs = state.get("inputs")
    if not inputs:
        beside = glob.glob(f"{glob.escape(os.path.dirname(folder))}/*/hf")
        expected = pretrained_input(beside[0]) if beside else {}
        if not expected:
            raise UserError(f"model={model!r}: this state of an older version does not hold its "
                            "input, and the run has no export; resume the run to make one")
        inputs = {key: expected[key] for key in ("intensity_range", "mean", "std")}
    return state, backbone.eval(), inputs


def to_rgb(backbone, inputs):
    """A network of three equal channels for one of one channel: its features of a grey picture in
    RGB are the same. Pipelines load 8-bit pictures, so intensities (CT) have to be shown in them:
    0..255 is then the network's window. Returns: backbone, with LoRA merged; settings of input."""
    if backbone.config.num_channels != 1:
        raise UserError(f"rgb=true is for networks of one channel, and {model} has "
                        f"{backbone.config.num_channels}")
    if hasattr(backbone, "merge_and_unload"):
        backbone = backbone.merge_and_unload()
    set_channels(backbone, 3)
    mean, std = tuple(inputs["mean"]) * 3, tuple(inputs["std"]) * 3
    rgb_inputs = dict(intensity_range=(0, 255), mean=mean, std=std)
    if tuple(inputs["intensity_range"]) != (0, 255):
        rgb_inputs["window"] = inputs["intensity_range"]
    return backbone, rgb_inputs


def write_onnx(folder, size):
    """Write model.onnx of the export in a folder: pixel_values [B,C,S,S] -> cls [B,D] and patches
    [B,P,D]. Returns how far its features of two random images are from the network's; UserError if
    by 1e-3, or if a package is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("onnx=true needs more packages; pip install onnx onnxscript onnxruntime"
                        ) from None
    network = build_backbone(folder, num_channels=0).eval()
    network.forward = lambda pixel_values: forward_features(network, pixel_values)
    pixels = torch.randn(2, network.config.num_channels, size, size)
    path = os.path.join(folder, "model.onnx")
    with torch.no_grad():
        torch.onnx.export(network, (pixels,), path, input_names=["pixel_values"], dynamo=True,
                          output_names=["cls", "patches"], verbose=False,
                          external_data=sum(p.numel() for p in network.parameters()) > 4e8,
                          dynamic_shapes=dict(pixel_values={0: torch.export.Dim("batch")}))
        expected = forward_features(network, pixels)
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, dict(pixel_values=pixels.numpy()))
    pairs = zip(expected, found)
    distance = max(abs(ours.numpy() - theirs).max() for ours, theirs in pairs)
    if not distance < 1e-3:
        raise UserError(f"onnx=true: the graph differs from the network by {distance:.1e}")
    return distance


def upload(folder, name):
    """Upload a folder as a repository of the hub. UserError in one line, without the token."""
    import huggingface_hub
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(name, exist_ok=True)
        commit = hub.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # the hub's client, its server and the network raise a dozen kinds
        words = f"{type(error).__name__}: {first_line(error)}"
        if token := huggingface_hub.get_token():
            words = words.replace(token, "(token)")
        raise UserError(f"push_to_hub={name!r}: {words}; log in with `hf auth login` and a token "
                        f"that may write. The folder {folder} is complete") from None
    return commit.commit_url


def main(sources):
    """Export what the config in this module's globals names. sources: of configurator.override."""
    print(describe(globals(), config_keys, sources) + "\n")
    if not model or not output:
        raise UserError(f"model={model!r}, output={output!r}: give both, as in export.py out/NAME "
                        "--output=NAME-hf")
    if os.path.exists(output):
        names = set(os.listdir(output)) if os.path.isdir(output) else set()
        if "preprocess.py" not in names or names - OURS:
            raise UserError(f"output={output!r} exists and is no export, or has other files: name "
                            "another")
        if not overwrite:
            raise UserError(f"output={output!r} exists; --overwrite=true replaces it")
    checkpoint = find_checkpoint(os.path.normpath(model))
    state, backbone, inputs = load_checkpoint(checkpoint)
    config, size = state["config"], state["config"]["global_crops_size"]
    scaling = config.get("intensity_scaling", "set")
    if rgb:
        backbone, inputs = to_rgb(backbone, inputs)
        scaling = "set"  # of pictures
    card = model_card(config["model_name"], state["iteration"], state["knn"], config,
                      config_text(SimpleNamespace(**config)), backbone.config.num_channels,
                      inputs["intensity_range"], inputs.get("window"), scaling,
                      state.get("choice"))

    # ---- beside its place, then to its place: an earlier export stays until this one is whole ----
    parent = os.path.dirname(os.path.abspath(output))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".export-") as beside:
        folder = os.path.join(beside, "hf")
        export_hf(folder, backbone, size, card=card, intensity_scaling=scaling, **inputs)
        distance = write_onnx(folder, size) if onnx else 0.0
        if os.path.exists(output):
            os.rename(output, os.path.join(beside, "old"))
        os.rename(folder, output)
    print(f"iteration {state['iteration']} of {checkpoint} is in {output}, with a README.md")
    if onnx:
        print(f"{output}/model.onnx gives the same features to {distance:.0e}")
    if push_to_hub:
        print(f"uploaded: {upload(output, push_to_hub)}")


if __name__ == "__main__":
    with one_line_errors():
        main(sources)
