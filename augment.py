"""From images to what the networks see: crops, flips, colours or intensities, and the iBOT masks.

There are two halves. Geometry runs in the loader's workers, one image at a time, on pixels as they
are (uint8, int16 Hounsfield units, float; any number of channels). Photometrics run on the training
device, a whole batch at once. Everything random comes from a generator or a seed that the caller
derives from (seed, sample number). So neither the number of workers nor the number of ranks changes
what a crop looks like.

The presets do the paper's Table 3: flips, crops and blur for all; solarization and colour jitter
for 'rgb'; brightness and noise for 'medical' (inverted or recoloured CT means nothing).
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

# Strengths of the photometrics; edit here. rgb is DINO's main_dino.py. medical was measured on the
# phantom and on brain MRI. noise is the largest sigma, as a share of the intensity range. In DINO
# the conversion to grey is part of the colour jitter: saturation all the way down.
PRESETS = {
    "rgb": dict(jitter_probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1,
                grayscale_probability=0.2, solarize_probability=0.2, noise_probability=0.0,
                noise=0.0),
    "medical": dict(jitter_probability=0.8, brightness=0.4, contrast=0.0, saturation=0.0, hue=0.0,
                    grayscale_probability=0.0, solarize_probability=0.0, noise_probability=0.5,
                    noise=0.05),
}
KINDS = ("global1", "global2", "local")  # DINO treats its two global crops differently
BLUR_SIGMA = (0.1, 2.0)  # pixels


def choose_preset(augmentation, num_channels):
    """The preset that the key `augmentation` means; 'auto': rgb for 3 channels, else medical."""
    if augmentation != "auto":
        return augmentation
    return "rgb" if num_channels == 3 else "medical"


def augmentation_values(preset):
    """Everything that a preset means, as a dict for JSON: cached features depend on it."""
    return dict(PRESETS[preset], blur_sigma=list(BLUR_SIGMA))


def numpy_generator(generator):
    """A numpy Generator from a numpy or torch one (which then moves on by one draw)."""
    if isinstance(generator, torch.Generator):
        device = generator.device
        seed = torch.randint(2**63 - 1, (1,), generator=generator, device=device)
        return np.random.default_rng(int(seed))
    return generator


# ---- geometry: one image, in the workers ----

def resize(image, size):
    """An [H,W,C] array as a [C,h,w] tensor of the same dtype: bicubic with antialiasing, as DINO
    and Pillow resize.

    Integers are rounded and clipped to their range. uint16, which torch cannot resize, comes back
    as float32.
    """
    if image.dtype == np.uint16:
        image = image.astype(np.float32)
    tensor = torch.from_numpy(np.array(image))  # a copy: a mapped page must not be written to
    dtype = tensor.dtype
    tensor = tensor.permute(2, 0, 1)[None]  # [1,C,H,W], channels last in memory: fast for uint8
    if dtype != torch.uint8:
        tensor = tensor.float()
    tensor = F.interpolate(tensor, size=size, mode="bicubic", antialias=True)[0]
    if dtype == torch.uint8 or dtype.is_floating_point:
        return tensor
    limits = torch.iinfo(dtype)
    return tensor.round_().clamp_(limits.min, limits.max).to(dtype)


def resize_center(image, size):
    """The whole image for evaluation: [H,W,C] array -> [C,size,size]. The shorter side becomes
    `size`, then the centre square is cut. There is no zoom from 256 to 224: small medical images
    fill their frame, and what lies at the border counts."""
    return resize(center_square(image), (size, size))


def center_square(image):
    """The largest centred square of an [H,W,...] array, a view of it."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top:top + side, left:left + side]


def is_labelled(mask, classes=()):
    """The pixels of a mask [H,W] that are labelled, [H,W] bool: the value is one of `classes`, or
    with () anything except 0."""
    return np.isin(mask, classes) if len(classes) else mask != 0


def foreground_share(image, background):
    """The share of an image's pixels above the value `background`, 0 to 1; of its values, if it has
    several channels."""
    return np.count_nonzero(image > background) / image.size


class MultiCrop:
    """Cuts V large crops of an image for student and teacher, and L small ones for the student
    (SwAV, DINO).

    A crop is a box with a random area (`*_scale`, share of the image area), aspect (3/4 to 4/3) and
    place, resized to a square and flipped: the random crop and the random resized crop of the
    paper's Table 3 in one. label_guided_crops_number further small crops are centred near a
    labelled pixel (paper section 2.2.4). Without labels they are random ones, so that the batch
    keeps its shape. A crop may come from a neighbouring slice of the image's volume.
    """

    def __init__(self, global_crops_size=224, global_crops_scale=(0.4, 1.0), global_crops_number=2,
                 local_crops_size=96, local_crops_scale=(0.1, 0.4), local_crops_number=8,
                 label_guided_crops_number=0, label_guided_crops_scale=(0.02, 0.1),
                 horizontal_flip=0.5, vertical_flip=0.5, gram_crops_size=0,
                 label_guided_classes=(), min_foreground=0.0, background=0.0):
        """gram_crops_size: 0, or cut the global crops once more at this size;
        label_guided_classes: of is_labelled; min_foreground: a random box with a smaller
        foreground_share above the value `background` is drawn anew, up to ten times. The other keys
        are those of train.py."""
        self.globals = (global_crops_number, global_crops_size, global_crops_scale)
        self.locals = (local_crops_number, local_crops_size, local_crops_scale)
        self.guided = (label_guided_crops_number, local_crops_size, label_guided_crops_scale)
        self.flip_probability = (horizontal_flip, vertical_flip)
        self.gram_crops_size, self.classes = gram_crops_size, label_guided_classes
        self.min_foreground, self.background = min_foreground, background
        self.n_crops = global_crops_number + local_crops_number + label_guided_crops_number

    def __call__(self, image, mask, generator, neighbours=()):
        """Args: image [H,W,C], any real dtype; mask [H,W] or None; generator: numpy or torch;
        neighbours: (image, mask) of each crop but the first one, n_crops - 1 of them; () = all
        crops come from `image`.

        Returns: dict of global_crops [V,C,S,S] and local_crops [L,C,s,s] in the dtype of the image,
        guided crops last; global_seeds [V] and local_seeds [L] int64, from which photometric draws;
        and gram_crops [V,C,g,g], the boxes and flips of the global crops, if gram_crops_size > 0.
        """
        rng = numpy_generator(generator)
        views, small = self.plan(image, mask, rng, neighbours)
        crops = dict(global_crops=self.cut_all(image, views, self.globals[1]),
                     local_crops=self.cut_all(image, small, self.locals[1]))
        for name, cuts in (("global_seeds", views), ("local_seeds", small)):
            seeds = rng.integers(2**63 - 1, size=len(cuts))
            crops[name] = torch.from_numpy(seeds)
        if self.gram_crops_size > 0:
            crops["gram_crops"] = self.cut_all(image, views, self.gram_crops_size)
        return crops

    def plan(self, image, mask, rng, neighbours):
        """[(image, mask, box, flips)] of the V large crops, and of the L small ones."""
        pairs, cuts = [(image, mask), *neighbours], []
        if len(pairs) == 1:
            pairs *= self.n_crops
        for kind in (self.globals, self.locals, self.guided):
            number, _, scale = kind
            sources, pairs = pairs[:number], pairs[number:]
            boxes, labelled = [], {}  # a mask is searched once: that takes milliseconds
            for image, mask in sources:
                if kind is self.guided and mask is not None and id(mask) not in labelled:
                    labelled[id(mask)] = np.argwhere(is_labelled(mask, self.classes))
                pixels = labelled.get(id(mask), ())
                boxes.append(self.box(image, scale, pixels, rng))
            for source, box in zip(sources, boxes):  # first all boxes of a kind, then all flips
                cuts.append((*source, box, rng.random(2) < self.flip_probability))
        V = self.globals[0]
        return cuts[:V], cuts[V:]

    def boxes(self, image, label, rng):
        """Boxes (top, left, height, width) in an image with a label, drawn as those of crops: a
        list of guided ones, and of random local ones, at least one. label [H,W] bool, not empty."""
        labelled = np.argwhere(label)
        n_guided, _, guided_scale = self.guided
        n_random, _, scale = self.locals
        guided = [self.box(image, guided_scale, labelled, rng) for _ in range(n_guided)]
        n_random = n_random or n_guided  # a run without random ones is compared all the same
        return guided, [self.box(image, scale, (), rng) for _ in range(n_random)]

    def box(self, image, scale, labelled, rng):
        """A guided_box if there are labelled pixels, else a random_box with min_foreground."""
        shape = image.shape[:2]
        if len(labelled) > 0:
            return self.guided_box(shape, scale, labelled, rng)
        for _ in range(11):
            box = self.random_box(shape, scale, rng)
            if self.min_foreground == 0:
                break
            top, left, height, width = box
            pixels = image[top:top + height, left:left + width]
            if foreground_share(pixels, self.background) >= self.min_foreground:
                break
        return box

    def cut_all(self, image, cuts, size):
        """The crops of a plan as one tensor [n,C,size,size]; [0,C,1,1] for none, C as in image."""
        if not cuts:
            return torch.zeros(0, image.shape[2], 1, 1)
        crops = [self.cut(source, *place, size) for source, _, *place in cuts]
        return torch.stack(crops)

    def least_side(self):
        """Pixels that the shorter side of an image needs, so that no crop is enlarged more than if
        the image were decoded whole. A box of area s H W and aspect 4/3 is at least
        sqrt(3/4 s) min(H, W) wide and high."""
        gram = (self.gram_crops_size, self.gram_crops_size, self.globals[2])
        sides = [0]
        for number, size, scale in (self.globals, self.locals, self.guided, gram):
            if number > 0:
                sides.append(math.ceil(size / math.sqrt(3 / 4 * scale[0])))
        return max(sides)

    def of_label(self, image, mask, generator, neighbours=()):
        """The crops of what the labels show (255, else 0), uint8, where __call__ cuts with the same
        generator. Args: as __call__. Returns: dict of global_crops [V,1,S,S] and local_crops."""
        def cut_labels(cuts, size):
            labels = []
            for source, mask, *place in cuts:
                label = np.zeros((*source.shape[:2], 1), np.uint8)
                if mask is not None:
                    label[is_labelled(mask, self.classes)] = 255
                labels.append((label, mask, *place))
            return self.cut_all(image[..., :1], labels, size)
        views, small = self.plan(image, mask, numpy_generator(generator), neighbours)
        return dict(global_crops=cut_labels(views, self.globals[1]),
                    local_crops=cut_labels(small, self.locals[1]))

    @staticmethod
    def random_box(shape, scale, rng):
        """(top, left, height, width) of a random resized crop; if ten boxes do not fit, the largest
        central one."""
        (height, width), (low, high) = shape, scale
        for area, log_aspect, y, x in rng.random((10, 4)):
            area = height * width * (low + (high - low) * area)
            log_range = math.log(4 / 3) - math.log(3 / 4)
            aspect = math.exp(math.log(3 / 4) + log_range * log_aspect)
            w = round(math.sqrt(area * aspect))
            h = round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = y * (height - h + 1), x * (width - w + 1)
                return int(top), int(left), h, w
        h = min(height, round(width * 4 / 3))
        w = min(width, round(height * 4 / 3))
        return (height - h) // 2, (width - w) // 2, h, w

    @staticmethod
    def guided_box(shape, scale, labelled, rng):
        """A square box that contains a random labelled pixel: centred on the pixel, shifted by up
        to a quarter of its side, and moved back into the image at the border.

        Every pixel is equally likely (paper section 2.2.4), so of several lesions the large ones
        get more crops. The side is at least 2 pixels.
        """
        (height, width), (low, high) = shape, scale
        y, x = labelled[rng.integers(len(labelled))]
        area, dy, dx = rng.random(3)
        area = height * width * (low + (high - low) * area)
        side = min(max(2, round(math.sqrt(area))), height, width)
        top = round(y - side / 2 + (dy - 0.5) * side / 2)
        left = round(x - side / 2 + (dx - 0.5) * side / 2)
        top = np.clip(top, 0, height - side)
        left = np.clip(left, 0, width - side)
        return int(top), int(left), side, side

    @staticmethod
    def cut(image, box, flips, size):
        """The box of the image as a [C,size,size] tensor, flipped as flips (x, y) says."""
        top, left, height, width = box
        crop = resize(image[top:top + height, left:left + width], (size, size))
        axes = [axis for axis, flip in zip((2, 1), flips) if flip]
        return crop.flip(axes) if axes else crop


# ---- photometrics: the whole batch, on the training device ----

def uniforms(seeds, n, stream=0):
    """n uniform numbers in [0, 1) for every seed, [N,n] float64: the splitmix64 hash of
    (seed, stream, column). A hash has no state, computes all rows at once, and gives a crop the
    same numbers in every process."""
    first = 1 + 1000 * stream
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is intended
        column = np.arange(first, first + n, dtype=np.uint64)
        step = column * np.uint64(0x9E3779B97F4A7C15)
        z = np.asarray(seeds).astype(np.uint64)[:, None] + step
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) >> np.uint64(11)
        return z.astype(np.float64) * 2.0**-53


def to_device(values, device):
    """An array or tensor of the CPU on a device. A GPU gets it from pinned memory, in its own time:
    the CPU does not wait until the GPU has done all that it was told before."""
    values = torch.as_tensor(values)
    if torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def to_unit(crops, intensity_range, seeds=None, window_jitter=0.0):
    """Pixels of any dtype [N,C,S,S] to float 0..1: intensity_range = (low, high) maps to (0, 1),
    and the rest is clipped.

    With window_jitter j > 0 both ends move per crop by up to j of the width: the random windows of
    CT augmentation.
    """
    low, high = intensity_range
    ends = torch.tensor([[low, high]], dtype=torch.float32)
    ends = ends.repeat(len(crops), 1)  # [N,2]
    if window_jitter > 0:
        shifts = torch.from_numpy(uniforms(seeds, 2, stream=1) * 2 - 1).float()
        ends += shifts * window_jitter * (high - low)
    ends = to_device(ends, crops.device)[:, :, None, None, None]
    low, high = ends.unbind(1)  # [N,1,1,1] each
    # in place, here and below, because fresh memory costs more time than the arithmetic
    return (crops.float() - low).div_(high - low).clamp_(0, 1)


def photometric(crops, preset, generator, kind, blur_probability=(1.0, 0.1, 0.5)):
    """Random colours, intensities, blur and noise for a batch of crops; every crop draws its own.

    In order: brightness, contrast, saturation, hue, grayscale as one colour matrix per crop;
    Gaussian blur; solarization (of global2 only, as in DINO); noise. The result is clipped once at
    the end, not after every operation as in torchvision. The hue turns in YIQ, a rotation;
    torchvision turns in HSV.
    Args: crops [N,C,S,S] float in 0..1, on any device (uint8 is divided by 255); preset: 'rgb' or
    'medical'; generator: numpy or torch, or int64 seeds [N], one per crop; kind: 'global1',
    'global2' or 'local'; blur_probability: of these three. The default is DINO's. The DINOv2 and
    DINOv3 code asks for the same, but an inversion in its GaussianBlur makes it (0.0, 0.9, 0.5);
    config/dinov2.py and dinov3.py do as the released weights.
    Returns: crops [N,C,S,S] float32 in 0..1. Saturation, hue and grayscale need three channels.
    """
    if preset not in PRESETS or kind not in KINDS:
        raise ValueError(f"photometric: preset={preset!r}, kind={kind!r}; "
                         f"presets are {', '.join(PRESETS)}, kinds {', '.join(KINDS)}")
    p, device = PRESETS[preset], crops.device
    x = crops.float() / 255 if crops.dtype == torch.uint8 else crops.float()
    if len(x) == 0:
        return x
    seeds = generator
    if not torch.is_tensor(generator) and not isinstance(generator, np.ndarray):
        seeds = numpy_generator(generator).integers(2**63 - 1, size=len(x))
    seeds = np.asarray(seeds)
    u = uniforms(seeds, 11)  # [N,11], one number per decision
    jitter = u[:, 0] < p["jitter_probability"]
    strengths = {}
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
        draw = np.where(jitter, 2 * u[:, column] - 1, 0)
        strengths[name] = draw * p[name]  # [N], 0 = no change
    gray = u[:, 5] < p["grayscale_probability"]
    matrix, offset = color_matrix(x, gray, **strengths)
    colored = torch.baddbmm(offset[:, :, None], matrix, x.flatten(2))
    x = colored.view(x.shape)  # [N,C,S,S]
    blurred = np.flatnonzero(u[:, 6] < blur_probability[KINDS.index(kind)])
    if len(blurred):
        # DINO blurs crops of 224 and 96 pixels alike; smaller ones would lose everything
        low, high = BLUR_SIGMA
        scale = min(1.0, x.shape[-1] / 96)
        sigma = (low + (high - low) * u[blurred, 7]) * scale
        sigma = to_device(sigma.astype(np.float32), device)
        blurred = to_device(blurred, device)
        x.index_copy_(0, blurred, gaussian_blur(x[blurred], sigma))
    if kind == "global2":
        solarized = to_device(u[:, 8] < p["solarize_probability"], device)
        solarized = solarized[:, None, None, None] & (x >= 0.5)
        x = torch.where(solarized, 1 - x, x)
    for row in np.flatnonzero(u[:, 9] < p["noise_probability"]):  # every crop has its own seed
        random = torch.Generator(device).manual_seed(int(seeds[row]))
        noise = torch.randn(x.shape[1:], generator=random, device=device)
        x[row] += p["noise"] * u[row, 10] * noise
    return x.clamp_(0, 1)


YIQ = np.array([[0.299, 0.587, 0.114],
                [0.596, -0.274, -0.322],
                [0.211, -0.523, 0.312]])


def color_matrix(x, gray, brightness, contrast, saturation, hue):
    """Per crop the matrix A [N,C,C] and offset b [N,C] of x -> A x + b: all colour operations.

    brightness: x (1 + s); contrast: away from the crop's mean grey; saturation: away from the
    pixel's grey; hue: turn by 2 pi s around the grey axis; gray: [N] bool, no saturation at all.
    Strengths [N], 0 = unchanged.
    """
    n, channels = x.shape[:2]
    weights = np.full(channels, 1 / channels)
    if channels == 3:
        weights = np.array([0.299, 0.587, 0.114])  # luma, ITU-R 601
    eye = np.eye(channels)
    to_gray = np.tile(weights, (channels, 1))  # [C,C], rows give grey
    scale = (1 + brightness) * (1 + contrast)  # [N]
    matrix = scale[:, None, None] * eye  # [N,C,C]
    if channels == 3:
        keep = np.where(gray, 0.0, 1 + saturation)[:, None, None]
        matrix = (keep * eye + (1 - keep) * to_gray) @ matrix
        angle = 2 * np.pi * hue
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.zeros((n, 3, 3))
        turn[:, 0, 0] = 1
        turn[:, 1, 1] = turn[:, 2, 2] = cos
        turn[:, 1, 2], turn[:, 2, 1] = -sin, sin
        matrix = np.linalg.inv(YIQ) @ turn @ YIQ @ matrix

    def on_device(array):
        return to_device(np.ascontiguousarray(array, dtype=np.float32), x.device)

    matrix, shift = on_device(matrix), on_device(-contrast * (1 + brightness))
    mean_gray = x.mean(dim=(2, 3)) @ on_device(weights)  # [N]
    return matrix, (shift * mean_gray)[:, None].expand(n, channels)


def gaussian_blur(x, sigma):
    """Blur every crop [C,S,S] with its own sigma [N] in pixels: two grouped one-dimensional
    convolutions with reflected borders."""
    n, channels, height, width = x.shape
    radius = min(math.ceil(3 * BLUR_SIGMA[1]), height - 1, width - 1)
    taps = torch.arange(-radius, radius + 1, device=x.device)
    variance = sigma[:, None]**2
    kernel = F.softmax(-taps**2 / (2 * variance), dim=1)  # [N,taps], sums to 1
    kernel = kernel.repeat_interleave(channels, 0)[:, None, None]  # [N*C,1,1,taps]
    x = F.pad(x, (radius,) * 4, mode="reflect")
    x = x.view(1, n * channels, height + 2 * radius, width + 2 * radius)
    x = F.conv2d(x, kernel, groups=n * channels)
    x = F.conv2d(x, kernel.transpose(2, 3), groups=n * channels)
    return x.view(n, channels, height, width)


class Photometrics:
    """The second half of the pipeline and its settings: native pixels of a batch -> normalised
    input of the network."""

    def __init__(self, preset, intensity_range, mean, std, window_jitter=0.0,
                 blur_probability=(1.0, 0.1, 0.5)):
        self.preset, self.intensity_range = preset, intensity_range
        self.window_jitter, self.blur_probability = window_jitter, blur_probability
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def normalize(self, x):
        """(x - mean) / std per channel, x [N,C,S,S] in 0..1."""
        mean, std = to_device(self.mean, x.device), to_device(self.std, x.device)
        return (x - mean[:, None, None]).div_(std[:, None, None])

    def plain(self, crops):
        """Native pixels to network input without augmentation, for evaluation."""
        return self.normalize(to_unit(crops, self.intensity_range))

    def augment(self, crops, seeds, kind):
        """Native pixels [N,C,S,S] to augmented ones in 0..1, float32, for networks that normalise
        differently.

        On a CPU a few crops at a time, 4 of 224 pixels: their intermediate results stay in the
        cache, and in memory that the process has. New pages cost as much as the work itself.
        """
        n = len(crops)
        if not crops.is_cuda:
            n = 4 * 3 * 224**2 // math.prod(crops.shape[1:])
        n, parts = max(1, n), []
        for i in range(0, max(1, len(crops)), n):
            part_seeds = seeds[i:i + n]
            part = to_unit(crops[i:i + n], self.intensity_range, part_seeds, self.window_jitter)
            parts.append(photometric(part, self.preset, part_seeds, kind, self.blur_probability))
        return torch.cat(parts)

    def __call__(self, crops, seeds, kind):
        """Native pixels [N,C,S,S] to augmented network input, float32; seeds [N] int64."""
        return self.normalize(self.augment(crops, seeds, kind))


# ---- iBOT masks ----

def sample_masks(n_crops, grid, generator, sample_probability=0.5, ratio_min_max=(0.1, 0.5),
                 exact=False, rows=None):
    """Block masks for a batch: iBOT section 3.2 with the sampling of DINOv2's collate.

    int(n_crops * sample_probability) crops are masked. The range of ratios is cut into as many
    equal bins, and each masked crop draws from a bin of its own, so the batch covers the range
    evenly. Then the crops are shuffled. A mask grows by rectangles until its number is reached or
    no rectangle fits: it may fall short, never exceed. exact=True is DINOv3: the top of each bin,
    filled up with single patches.
    Args: grid: patches per side, or (h, w); generator: numpy or torch; rows: build only these rows
    (a rank's share of the batch). The others stay False; these are as without `rows`.
    Returns: bool [n_crops,P], True = masked.
    """
    rng = numpy_generator(generator)
    if isinstance(grid, int):
        grid = (grid, grid)
    h, w = grid
    n_masked = int(n_crops * sample_probability)
    edges = np.linspace(*ratio_min_max, n_masked + 1)
    low, high = edges[:-1], edges[1:]
    share = high if exact else low + (high - low) * rng.random(n_masked)
    masked = (h * w * share).astype(int)
    counts = np.concatenate([masked, np.zeros(n_crops - n_masked, int)])
    counts = rng.permutation(counts)
    seeds = rng.integers(2**63 - 1, size=n_crops)
    masks = np.zeros((n_crops, h, w), dtype=bool)
    for row in range(n_crops) if rows is None else rows:
        if counts[row]:
            own_rng = np.random.default_rng(seeds[row])
            block_mask(masks[row], counts[row], own_rng, exact)
    return torch.from_numpy(masks.reshape(n_crops, h * w))


def masked_tokens(masks):
    """(rows, most): where the masked patches are. The loader calls it, so that a GPU never waits.

    Args: masks [B,P] bool, True = masked; or None.
    Returns: None without masks, else rows [3,M] int64: of every masked patch, in row-major order,
    its crop, its number in the crop, and how many masked patches of the crop come before it; most:
    int, the largest number of masked patches in a crop.
    """
    if masks is None:
        return None
    crops, patches = masks.nonzero(as_tuple=True)
    before = masks.cumsum(dim=1)[crops, patches] - 1
    most = int(masks.sum(dim=1).max())
    return torch.stack([crops, patches, before]), most


def block_mask(mask, target, rng, exact):
    """Mask up to `target` patches of one [h,w] bool array, in place.

    Rectangles of at least about 4 patches, aspect 0.3 to 1/0.3, at most half of the grid at once,
    ten tries each (BEiT's generator, as DINOv2 uses it).
    """
    h, w = mask.shape
    left = target
    while left > 0:
        limit, added = min(left, (h // 2) * w), 0
        for area, aspect, y, x in rng.random((10, 4)):
            area = 4 + (limit - 4) * area
            aspect = math.exp((2 * aspect - 1) * math.log(1 / 0.3))
            height = round(math.sqrt(area * aspect))
            width = round(math.sqrt(area / aspect))
            if height < h and width < w:
                top = int(y * (h - height + 1))
                start = int(x * (w - width + 1))
                block = mask[top:top + height, start:start + width]
                added = block.size - int(block.sum())
                if 0 < added <= limit:
                    block[:] = True
                    break
                added = 0
        if added == 0:
            break
        left -= added
    if exact and left > 0:
        mask.flat[rng.choice(np.flatnonzero(~mask), left, replace=False)] = True
