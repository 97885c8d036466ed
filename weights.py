"""Weights as they are found: on the hub, in folders of old and new transformers, in original files.

find_config and load_values make a network of transformers for model.build_backbone, or say in one
line why that is not possible. read_tensors reads a file without running code in it.
pretrained_input reads what the weights expect of their input.
"""
import argparse
import contextlib
import difflib
import glob
import os
import re

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers.activations import ACT2FN

from configurator import UserError, coerce
from convert import convert

FAMILIES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# of DINOv3's sat493m files
SATELLITE = dict(mean=(0.430, 0.411, 0.296), std=(0.213, 0.156, 0.143))

# ---- reading ----

def is_weights_file(name):
    """True if a model_type names a weights file, whether it exists or not."""
    names_a_file = name.endswith(ENDINGS) and not os.path.isdir(name)
    return names_a_file or os.path.isfile(name)


def problem_of(path):
    """What is wrong with a file of weights that cannot be read, in words; '' if nothing is seen."""
    if not os.path.isfile(path):
        return "is missing"
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; `git lfs pull` fetches them"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not the weights; download it again"
    return ""


def problem_of_folder(folder):
    """What is wrong with the weights in a folder of transformers, in words that name the file;
    '' if nothing is seen."""
    found = []
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        found += sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
    if os.path.isdir(folder) and not found:
        return f"{folder} has config.json but no weights; model.safetensors is missing"
    for path in found:
        if problem := problem_of(path):
            return f"{path} {problem}"
    return ""


def read_tensors(path, key="model_type"):
    """{name: tensor} of a checkpoint file, on the CPU. Nothing in the file can run code: torch
    reads it with weights_only, which builds tensors and plain values. Allowed beside them are the
    classes of what training scripts keep: argparse.Namespace, and numpy's numbers.

    The tensors may be below 'teacher', 'student', 'state_dict' or 'model'; a teacher comes before a
    student. The prefixes of wrappers ('module.', 'backbone.', ...) are taken off.
    key: the config key that names the file, for errors. Raises UserError.
    """
    if problem := problem_of(path):
        raise UserError(f"{key}={path!r} {problem}")
    kinds = (np.float32, np.float64, np.int64, np.bool_)
    numbers = [type(np.dtype(kind)) for kind in kinds]
    scalar = np.float64(0).__reduce__()[0]
    allowed = [argparse.Namespace, np.dtype, *numbers, scalar,
               (scalar, "numpy.core.multiarray.scalar")]  # the name in numpy 1
    try:
        if path.endswith(".safetensors"):
            values = load_file(path)
        else:
            with torch.serialization.safe_globals(allowed):
                values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise several kinds for a foreign file
        kind = type(error).__name__
        reason = "is it whole? It needs tensors, as .safetensors or as torch.save writes them"
        if found := re.search(r"(?i)unsupported \w+:? (?:GLOBAL )?(\S+)", str(error)):
            reason = f"it holds {found[1]}, which is no tensor; reading that could run code"
        raise UserError(f"{key}={path!r} cannot be read ({kind}): {reason}") from None
    while isinstance(values, dict):
        groups = [values.get(name) for name in ("teacher", "student", "state_dict", "model")]
        groups = [group for group in groups if isinstance(group, dict)]
        if not groups:
            break
        values = groups[0]
    if not isinstance(values, dict):
        raise UserError(f"{key}={path!r} holds a {type(values).__name__}; it needs named tensors")
    return _without_prefixes(values)


def _without_prefixes(values):
    """The tensors whose names begin with a wrapper's prefix, without it; then the next prefix."""
    for prefix in ("module.", "teacher.", "student.", "module.", "_orig_mod.", "backbone."):
        inside = {name.removeprefix(prefix): value for name, value in values.items()
                  if name.startswith(prefix)}
        values = inside or values
    return values


# ---- configs ----

def find_config(model_type, use_pretrained, size_keys):
    """(config, values): the transformers config of a family, a directory, a hub id or an original
    weights file, and the file's tensors (else None). Raises UserError if there is none."""
    if model_type in FAMILIES:
        if use_pretrained:
            raise UserError(f"model_type={model_type!r} is a family and has no weights; give a hub "
                            "id or a local directory, or --use_pretrained=false to train from "
                            "scratch")
        try:
            return _family_config(model_type, size_keys), None
        except (TypeError, ValueError) as error:  # transformers' own rules
            raise UserError(f"model_type={model_type!r}: {first_line(error)}") from None
    if is_weights_file(model_type):
        return convert(read_tensors(model_type), model_type)
    if problem := _no_model(model_type):
        raise UserError(f"model_type={model_type!r}: {problem}")
    try:
        config = transformers.AutoConfig.from_pretrained(model_type, trust_remote_code=False)
        family = config.model_type
    except Exception as error:  # config.json may hold anything
        text = ("cannot be loaded: neither a local directory with config.json nor a hub id that "
                f"can be reached; from scratch use one of {', '.join(FAMILIES)}")
        if os.path.isdir(model_type):
            text = "has a config.json that cannot be used"
        family = _family_of(model_type)
        if family in ("", *FAMILIES):
            raise UserError(gated(model_type, error) or f"model_type={model_type!r} {text} "
                            f"({first_line(error)})") from None
    if family not in FAMILIES:
        advice = "; timm:hf_hub:ORG/NAME is how distill.py's teacher and evaluate.py take it"
        raise UserError(f"model_type={model_type!r} is a {family!r} model; supported are "
                        f"{', '.join(FAMILIES)}{advice if family == 'timm_wrapper' else ''}")
    for key in ("image_size", "patch_size"):  # old exports have [height, width]
        sides = getattr(config, key, 0)
        if isinstance(sides, (list, tuple)):
            if len(set(sides)) > 1 and (config.model_type, key) != ("dinov3_vit", "image_size"):
                raise UserError(f"model_type={model_type!r}: {key}={sides} of its config.json is "
                                "no square; only squares are supported")
            setattr(config, key, max(sides))
    return config, None


def _no_model(name):
    """Why a model_type cannot be a model of transformers, in words; '' if it can."""
    if name.startswith("timm:"):
        return ("a model of timm, which can be distill.py's teacher and evaluated, not trained; "
                f"supported are {', '.join(FAMILIES)}")
    names_a_folder = os.path.sep in name and name[0] in "./~"
    if names_a_folder and not os.path.isdir(name):
        return "no such directory; give a directory with config.json, or a hub id"
    holds = {file: os.path.isfile(os.path.join(name, file))
             for file in ("config.json", "config.py", "adapter_config.json")}
    if not os.path.isdir(name) or holds["config.json"]:
        return ""
    if holds["config.py"]:
        return f"this is a run; its weights are in {os.path.join(name, 'checkpoints/best/hf')}"
    if holds["adapter_config.json"]:
        return "this is an adapter alone; the folder above it has the whole network"
    return "a directory without config.json"


def _family_config(family, size_keys):
    """A config of the family, with those of the keys that it has. The constructor gets the keys,
    because setattr would leave derived values (dinov2's stage names) as they were."""
    known = transformers.AutoConfig.for_model(family)
    size_keys = {key: value for key, value in size_keys.items() if hasattr(known, key)}
    if "hidden_size" in size_keys and hasattr(known, "intermediate_size"):  # dinov2: mlp_ratio = 4
        size_keys.setdefault("intermediate_size", 4 * size_keys["hidden_size"])
    return transformers.AutoConfig.for_model(family, **size_keys)


def with_entries(config, entries):
    """A transformers config with other values for some of its keys, those of the config key
    backbone_config, a dict. UserError if the family has no such key, or if the value does not fit.
    """
    family, known = config.model_type, config.to_dict()
    without_effect = {"use_mask_token", "encoder_stride", "pooler_output_size", "pooler_act",
                      "apply_layernorm", "reshape_hidden_states", "stage_names", "out_features",
                      "out_indices", *transformers.PretrainedConfig().to_dict()}
    names = sorted(known.keys() - without_effect)
    changed = {}
    for name, value in entries.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
            raise UserError(f"backbone_config: {family} has no key {name!r}; {advice}")
        given = f"backbone_config: {name} = {value!r}"
        try:
            changed[name] = value if known[name] is None else coerce(value, known[name])
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{given}, needs {error}") from None
        if isinstance(value, (int, float)):
            least = 1 if type(known[name]) is int else 0
            most = 0.99 if "dropout" in name else 2**16
            if not least <= value <= most:
                raise UserError(f"{given}: must be in {least}..{most}")
    if changed.get("hidden_act", "gelu") not in ACT2FN:
        raise UserError(f"backbone_config: hidden_act = {changed['hidden_act']!r}: choose one of "
                        f"{', '.join(sorted(ACT2FN))}")
    try:
        return type(config).from_dict(known | changed) if changed else config
    except Exception as error:  # transformers' own rules have their own kind
        raise UserError(f"backbone_config={entries}: {first_line(error)}") from None


# ---- values ----

def constructor_arguments(config):
    """What a family's constructor is given beside its config. DDP refuses an unused pooler, and
    ViT has a mask token on request only."""
    if config.model_type == "vit":
        return dict(add_pooling_layer=False, use_mask_token=True)
    return {}


def load_values(config, source, values, where):
    """The network of a config, in fp32, with the weights of a folder or hub id (source), or with
    given ones (values, {name: tensor}; else None). where: begins an error. Raises UserError if the
    weights cannot be read, or do not fit the config."""
    if values is None and (problem := problem_of_folder(source)):
        raise UserError(f"{where}: {problem}")  # transformers' own words name other causes
    try:
        with quiet_transformers():
            network, info = transformers.MODEL_MAPPING[type(config)].from_pretrained(
                source if values is None else None, config=config, state_dict=values,
                dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
                **constructor_arguments(config))
    except Exception as error:  # torch, safetensors and the hub raise a dozen kinds
        raise UserError(gated(source, error) or f"{where}: its weights cannot be read, is the file "
                        f"whole? ({type(error).__name__}: {first_line(error)})") from None
    missing = sorted(key for key in info["missing_keys"] if "mask_token" not in key)
    other_shape = sorted(key for key, *_ in info["mismatched_keys"])
    unexpected = sorted(info["unexpected_keys"])  # such as a classifier
    left_over = [key for key in unexpected if re.search(r"layers?\.\d", key)]
    if missing or other_shape or left_over:
        raise UserError(f"{where}: its weights do not fit its config.json; missing {missing[:3]}, "
                        f"of other shape {other_shape[:3]}, without a place {left_over[:3]}")
    return network


def _family_of(model_type):
    """The architecture that a config.json names, though transformers could not make it: it may need
    another package, or a newer transformers. '' if there is none."""
    try:
        settings, _ = transformers.PretrainedConfig.get_config_dict(model_type)
        return settings.get("model_type", "")
    except Exception:  # config.json may hold anything
        return ""


def first_line(error):
    """What an error of another library says, in a piece of one line."""
    line = str(error).split("\n")[0]
    return " ".join(line.split())[:160]


def gated(repository, error):
    """How to get weights whose owners ask for consent, in one line; '' for other errors."""
    causes = f"{error!r} {error.__cause__!r}".lower()
    if not any(sign in causes for sign in ("gated", "401", "403")):
        return ""
    return (f"{repository!r} is gated, or private, or misspelt: the hub refuses it without "
            "consent; log in with `hf auth login`, accept the licence at "
            f"https://huggingface.co/{repository}, and start again")


@contextlib.contextmanager
def quiet_transformers():
    """No loading bars and no report on missing weights: build_backbone checks them itself."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


# ---- the input ----

def pretrained_input(model_type):
    """The input that the weights were trained on, from their preprocessor_config.json: dict of mean
    and std (tuples of floats, of pixels in 0..1), size (pixels, or 0) and intensity_range (of our
    own exports, else None), with intensity_scaling if they have one; {} if there is no such file,
    or it has no mean and std. Old and new files of transformers differ in their keys. UserError if
    the file is damaged."""
    if is_weights_file(model_type):
        satellite = "sat493m" in os.path.basename(model_type)
        return dict(SATELLITE if satellite else IMAGENET, size=224, intensity_range=None)
    processor = transformers.image_processing_utils.BaseImageProcessor
    file = os.path.join(model_type, "preprocessor_config.json")
    try:
        settings, _ = processor.get_image_processor_dict(model_type)
    except OSError as error:
        if os.path.isfile(file):
            raise UserError(f"{file} cannot be read ({first_line(error)})") from None
        return {}
    try:
        return _input_of(settings)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{file} has values that cannot be used ({first_line(error)})") from None


def _input_of(settings):
    """pretrained_input of a processor's settings. The processor computes (pixel * factor - mean) /
    std; (low, high), which becomes 0..1, is intensity_range in our exports, else 0..255."""
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    default = getattr(transformers, f"{kind}Pil", None)  # its values are those of a missing key
    mean, std = (settings.get(key) or getattr(default, key, None)
                 for key in ("image_mean", "image_std"))
    if settings.get("do_normalize") is False:
        mean, std = 0.0, 1.0
    if mean is None or std is None:
        return {}
    if not isinstance(mean, (list, tuple)):
        mean = (mean,) * 3
    if not isinstance(std, (list, tuple)):
        std = (std,) * 3
    mean, std = list(map(float, mean)), list(map(float, std))
    low, high = settings.get("intensity_range") or (0, 255)
    factor = 1.0
    if settings.get("do_rescale", True):
        factor = settings.get("rescale_factor") or 1 / 255
    scale = round((high - low) * factor, 6)
    if low or scale != 1:
        mean = [round((m - low * factor) / scale, 6) for m in mean]
        std = [s / scale for s in std]
    size = _side(settings.get("crop_size"))
    if size == 0 or settings.get("do_center_crop") is False:
        size = _side(settings.get("size"))
    given = settings.get("window") or settings.get("intensity_range")
    intensity_range = tuple(given) if given else None
    scaling = {key: settings[key] for key in ("intensity_scaling",) if key in settings}
    return dict(mean=tuple(mean), std=tuple(std), size=size, intensity_range=intensity_range,
                **scaling)


def _side(size):
    """Pixels of a size: {"height": ...}, {"shortest_edge": ...}, or, before transformers 4.25, a
    number; 0 for anything else."""
    if isinstance(size, dict):
        size = next(iter(size.values()), 0)
    return int(size) if isinstance(size, (int, float)) else 0
