"""The input of the network in this folder, as it was trained: numpy, torch and Pillow suffice."""
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def preprocess(image):
    """A path, a PIL image, or an array [H,W] or [H,W,C] (CT: Hounsfield units) -> pixel_values
    [1,C,size,size]: centre square, resized, clipped, normalised. ValueError if it cannot be."""
    config = json.loads(Path(__file__).with_name("preprocessor_config.json").read_text())
    (low, high), size = config["intensity_range"], config["crop_size"]["height"]
    mean = torch.tensor(config["image_mean"])[:, None, None]  # [C,1,1]
    std = torch.tensor(config["image_std"])[:, None, None]
    if isinstance(image, (str, Path)):
        image = Image.open(image)
    is_picture = isinstance(image, Image.Image) and image.mode[0] not in "IF"  # 8 bits
    if is_picture and len(mean) in (1, 3):
        image = image.convert("L" if len(mean) == 1 else "RGB")
    image = np.atleast_3d(np.array(image))  # [H,W,C]
    kind = image.dtype.name
    is_8bit = kind == "uint8" or (image.min() >= 0 and 1 < image.max() <= 255)
    if image.shape[2:] not in ((1,), (len(mean),)):
        raise ValueError(f"image of shape {image.shape}: needs [H,W] or [H,W,{len(mean)}]")
    if "intensity_scaling" in config and "float" not in kind:
        raise ValueError("needs numbers in 0..1, scaled as the README says")
    if kind == "uint8" and (low < 0 or high > 255):
        raise ValueError(f"8-bit picture: needs intensities, of which {low}..{high} are seen")
    if (low, high) == (0, 255) and not is_8bit:
        raise ValueError(f"values up to {image.max()}: needs a picture of 8 bits, 0..255")
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    x = image[top:top + side, left:left + side].transpose(2, 0, 1)
    x = torch.from_numpy(x.astype(kind if kind == "uint8" else "float32"))[None]  # [1,C,side,side]
    x = torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=True)
    x = x.round() if kind.startswith("int") else x  # as in training
    return (x.float().clamp(low, high) * config["rescale_factor"] - mean) / std
