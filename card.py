"""What an export says about itself: model card, preprocessor_config.json, the adapter's card.

preprocess.py is copied into every export. The snippets of the cards are run by the tests.
"""
import json
import os
import re

CANNOT_CLIP = ("AutoImageProcessor cannot make this input: use preprocess.py of this folder, as "
               "the README says")
SNIPPET = '''import sys

import torch
from transformers import AutoModel

folder = "FOLDER"  # from a hub: huggingface_hub.snapshot_download("USER/NAME")
sys.path.insert(0, folder)
from preprocess import preprocess  # needs numpy, torch and Pillow

model = AutoModel.from_pretrained(folder).eval()
image = IMAGE
with torch.no_grad():
    features = model(pixel_values=preprocess(image)).last_hidden_state[:, 0]  # CLS, [1,D]
'''
PIPELINE = '''from transformers import pipeline

extract = pipeline("image-feature-extraction", model="FOLDER")
features = extract("picture.png", return_tensors=True)[:, 0]  # CLS, [1,D]
'''
SCALING = {  # of data.scale_image
    "image": """step = 2 if image.size > 10**5 else 1  # each image by itself, to 0..1
low, high = numpy.percentile(image[::step, ::step], (0.5, 99.5))
image = ((image.astype("float32") - low) / max(high - low, 1e-6)).clip(0, 1)
""",
    "dtype": """if image.dtype.kind != "f":  # the range of its type, to 0..1
    low, high = numpy.iinfo(image.dtype).min, numpy.iinfo(image.dtype).max
    image = ((image.astype("float32") - low) / (high - low)).clip(0, 1)
"""}


def takes_pictures(num_channels, intensity_range, intensity_scaling="set"):
    """True if AutoImageProcessor can make an export's input: from 8-bit pictures, grey or RGB. It
    cannot clip, nor scale an image by itself, and it takes one or three channels."""
    is_8bit = tuple(intensity_range) == (0, 255) and intensity_scaling == "set"
    return is_8bit and num_channels in (1, 3)


def processor_config(size, intensity_range, mean, std, window=None, intensity_scaling="set"):
    """preprocessor_config.json of an export, as a dict.

    A processor computes (pixel * factor - mean) / std. So the lower end of the range goes into its
    mean. intensity_range is kept beside it, for preprocess.py and weights.pretrained_input. If
    AutoImageProcessor cannot make the input, it stops at `size`, and prints the text there.
    window: of the one-channel network whose window the 8-bit pictures show (export.to_rgb);
    intensity_scaling: the key of train.py.
    """
    low, high = intensity_range
    factor = 1 / (high - low)
    is_picture = takes_pictures(len(mean), intensity_range, intensity_scaling)
    config = dict(image_processor_type="BitImageProcessor", do_resize=True,
                  size={"shortest_edge": size} if is_picture else CANNOT_CLIP, resample=3,
                  do_center_crop=True, crop_size={"height": size, "width": size}, do_rescale=True,
                  rescale_factor=factor, do_normalize=True,
                  image_mean=[m + low * factor for m in mean], image_std=list(std),
                  do_convert_rgb=len(mean) == 3, intensity_range=[low, high])
    if window:
        config["window"] = list(window)
    if intensity_scaling != "set":
        config["intensity_scaling"] = intensity_scaling
    return config


def usage(num_channels, intensity_range, window=None, intensity_scaling="set"):
    """The part of a model card that shows how to get features, in Markdown. The last two are as
    in processor_config."""
    low, high = intensity_range
    is_picture = takes_pictures(num_channels, intensity_range, intensity_scaling)
    if is_picture:
        image = '"picture.png"  # or a PIL image, or an array [H,W] or [H,W,3], uint8'
        if num_channels == 1:
            image = '"picture.png"  # or a PIL image, or an array [H,W], uint8'
    else:
        shape = "[H,W]" if num_channels == 1 else f"[H,W,{num_channels}]"
        image = f'numpy.load("image.npy")  # array {shape} of intensities (CT: Hounsfield units)'
    snippet = SNIPPET.replace("IMAGE", image)
    if not is_picture:
        snippet = snippet.replace("import torch\n", "import numpy\nimport torch\n", 1)
    if intensity_scaling != "set":
        snippet = snippet.replace("with torch", f"{SCALING[intensity_scaling]}with torch")
    text = f"```python\n{snippet}```\n\n"
    if window:
        text += (f"The pictures show the window {window[0]}..{window[1]} (CT: Hounsfield units) of "
                 "the network that this one was made from: 0 is its lower end, 255 its upper. "
                 "Intensities are for that network.\n\n")
    elif not is_picture:
        text += (f"Intensities are clipped to {low}..{high}, which AutoImageProcessor cannot do: "
                 "it refuses to be loaded. 8-bit pictures have lost their intensities.\n\n")
    if is_picture and num_channels == 3:
        text += (f"Or, for 8-bit pictures:\n\n```python\n{PIPELINE}```\n\nA pipeline resizes "
                 "before it cuts the centre square, so the features of pictures that are no "
                 "squares differ a little.\n\n")
    elif num_channels == 1:
        text += ("A pipeline loads RGB and cannot take one channel; export.py --rgb=true makes a "
                 "network of three equal channels, for pipelines.\n\n")
    return text + ("A ViT's pooler is not trained: use last_hidden_state[:, 0], or the mean of "
                   "the patches. timm has no converter for these files: load them with "
                   "transformers, as above.\n")


def measured_text(knn):
    """What was measured, in Markdown: run.Run.knn."""
    label_free = knn.get("label_free", {})
    numbers = "".join(f"- {what}: {value}\n" for what, value in knn.items() if what != "label_free")
    text = "5-NN accuracy of the CLS token:\n\n" + (numbers or "- no labels, not measured\n")
    if "pixels" not in knn and numbers:  # best is a score (verdict.score)
        text = f"Without labels, on held-out images:\n\n{numbers}"
    for when, found in label_free.items():
        listed = ", ".join(f"{what} {value:.4g}" for what, value in found.items())
        text += f"- without labels, {when}: {listed}\n"
    return text


def model_card(name, iteration, knn, config, config_text, num_channels=3,
               intensity_range=(0, 255), window=None, intensity_scaling="set", choice=None):
    """README.md of an export: where the weights come from, what was measured, how to get features.

    knn: run.Run.knn; config: dict of all keys; choice: of candidates.hand_back, or None; the rest:
    of the network and its input (usage).
    """
    numbers = measured_text(knn)
    if choice:
        numbers += (f"\nThese weights are *{choice['candidate']}*, chosen among these candidates "
                    f"on val:\n\n{choice['table']}\n")
        if len(choice["blocks"]) > 1:
            numbers += ("\nThe readout that val prefers is CLS of blocks "
                        f"{', '.join(map(str, choice['blocks']))} (0 is the first), each after the "
                        "final norm and at unit length, side by side.\n")
    start = f"random weights ({config['model_type']})"
    if config["use_pretrained"]:
        start = config["model_type"]
    if teacher := config.get("distilled_model_type"):
        start += f", distilled from the frozen teacher {teacher}"
    task = ""
    if num_channels == 3 and takes_pictures(num_channels, intensity_range, intensity_scaling):
        task = "pipeline_tag: image-feature-extraction\n"
    return (f"---\nlibrary_name: transformers\n{task}tags: [dino-mx, self-supervised]\n---\n\n"
            f"# {name}\n\n"
            f"EMA teacher of a DINO-MX run after {iteration} of {config['max_iterations']} "
            f"iterations on {config['dataset_path']}, started from {start}. "
            "For research on methods only, not for clinical use.\n\n"
            f"## Numbers\n\n{numbers}\n"
            f"## Use\n\n{usage(num_channels, intensity_range, window, intensity_scaling)}\n"
            f"## Config\n\n```python\n{config_text}```\n")


def adapter_card(backbone, size, intensity_range, mean, std, card):
    """README.md of an adapter alone. Args: backbone: a peft wrapper; card: text of the model card,
    whose numbers are taken; the others: of checkpoint.export_hf."""
    lora, network = backbone.peft_config["default"], backbone.get_base_model()
    base, channels = lora.base_model_name_or_path, network.config.num_channels
    numbers = card.partition("## Numbers\n\n")[2].partition("\n## ")[0]
    scale = "alpha / sqrt(rank)" if lora.use_rslora else "alpha / rank"
    whole = ""
    if lora.modules_to_save:
        names = ", ".join(lora.modules_to_save)
        whole = f"- trained whole, and held by the adapter, too: {names}\n"
    base_model = ""  # the hub refuses a card with another
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base or "") and not os.path.exists(base):
        base_model = f"base_model: {base}\n"
    return (f"---\nlibrary_name: peft\n{base_model}tags: [dino-mx, lora]\n---\n\n# LoRA adapter\n\n"
            f"- base: {base or 'random weights'}\n- rank {lora.r}, alpha {lora.lora_alpha}, scaled "
            f"by {scale}, on {len(lora.target_modules)} linear layers\n{whole}"
            f"- patch embedding: {channels} channel(s); the filters of a base with another number "
            f"are averaged over its channels, copied, and multiplied by that number / {channels}\n"
            f"- input: {size} x {size} pixels, intensities {tuple(intensity_range)} to 0..1, then "
            f"mean {tuple(mean)}, std {tuple(std)}\n\n"
            "The folder above has the merged network, which needs no base, and preprocess.py, "
            f"which makes its input.\n\n{numbers}")


def write_text(path, text):
    """Write a text file."""
    with open(path, "w") as file:
        file.write(text)


def edit_json(path, **values):
    """Set keys of a JSON file, in place."""
    with open(path) as file:
        content = json.load(file) | values
    write_text(path, json.dumps(content, indent=2))
