"""Phantom: seeded CT-like axial slices in Hounsfield units (HU), for the demo, tests and bench.

A slice is a painter's list of soft ellipses in a body frame: the half-width of the trunk is 1, x
goes to the right of the image (the patient's left), y to the back. A smooth random warp bends the
frame, and a pose puts it on the pixel grid. Pixels see only + - * / and sqrt, because the last bits
of other functions (sin, exp, BLAS, long sums) differ between machines. So a seed gives the same
bytes everywhere. The slices are drawn, not measured: nothing learned on them holds for patients.
"""
import numpy as np

# Painted in order: (tissue, x, y, rx, ry[, slope]), slope = dy/dx of the rx axis. A leading '2'
# adds the mirror image.
LEVELS = {  # name: (half-height of the trunk, ribs per side, parts)
    'lung apex': (.60, 4, [
        ('2lung', .36, .06, .24, .27), ('fat', 0, -.08, .18, .15), ('2bone', .80, -.04, .11, .11),
        ('2bone', .68, .28, .20, .03, -.7), ('2bone', .30, -.37, .22, .035, .3),
        ('2vessel', .15, -.14, .05, .05), ('2vessel', .22, -.22, .05, .035, .4),
        ('gas', 0, -.04, .06, .065)]),
    'aortic arch': (.68, 6, [
        ('2lung', .47, .02, .35, .45), ('fat', 0, -.12, .22, .25),
        ('2bone', .83, .30, .15, .03, -1.5), ('bone', 0, -.53, .15, .04),
        ('vessel', .07, -.07, .10, .22, -.45), ('vessel', -.14, -.14, .06, .07),
        ('gas', -.03, .08, .065, .06)]),
    'heart': (.72, 7, [
        ('2lung', .47, .03, .38, .53), ('fat', 0, -.15, .20, .35),
        ('heart', .12, -.17, .37, .28, .45), ('chamber', .27, -.08, .17, .11, .6),
        ('chamber', -.02, -.29, .15, .10, .7), ('chamber', .05, .03, .16, .07),
        ('chamber', -.14, -.12, .09, .12), ('vessel', .14, .23, .075, .075),
        ('bone', 0, -.60, .11, .035)]),
    'liver dome': (.70, 7, [
        ('2lung', .47, .10, .38, .47), ('fat', .10, -.10, .60, .40),
        ('liver', -.36, -.07, .47, .46, .2), ('liver', .10, -.33, .36, .18),
        ('spleen', .63, .15, .17, .27, -.2), ('bowel', .38, -.12, .24, .23, .5),
        ('gas', .36, -.27, .13, .08), ('vessel', -.17, .12, .07, .06),
        ('vessel', .10, .17, .065, .065)]),
    'kidney': (.66, 3, [
        ('fat', 0, -.06, .85, .50), ('liver', -.62, -.10, .22, .36, .2),
        ('2kidney', .44, .20, .15, .20, -.5), ('2soft', .20, .24, .09, .12),
        ('vessel', -.11, .06, .075, .055), ('vessel', .06, .05, .06, .06),
        ('bowel', .58, -.18, .13, .12), ('bowel', .25, -.30, .17, .09, .3),
        ('bowel', -.15, -.28, .18, .09, -.2), ('bowel', -.38, -.33, .10, .10),
        ('bowel', .33, -.08, .10, .08), ('gas', .57, -.22, .07, .05)]),
    'pelvis': (.62, 0, [
        ('fat', 0, -.14, .72, .34), ('2soft', .55, .30, .35, .22, -.5),
        ('2bone', .62, .02, .32, .055, -1.3), ('2soft', .42, -.08, .13, .14, -.8),
        ('2vessel', .27, -.02, .05, .05), ('2vessel', .30, .09, .05, .06),
        ('bowel', .10, -.28, .14, .10), ('bowel', -.22, -.26, .14, .09),
        ('bowel', 0, -.08, .15, .10), ('gas', -.20, -.30, .06, .04),
        ('2bone', .20, .33, .20, .09, -.35)])}
PHANTOM_CLASSES = list(LEVELS)


def _field(rng, size, cells):
    """Smooth noise [size, size]: unit normal at the nodes of a grid of about `cells` x `cells`,
    eased in between."""
    nodes = rng.normal(size=(cells + 2, cells + 2))
    t = (np.arange(size) + rng.random()) * (cells / size)
    i = t.astype(int)
    f = (t - i) * (t - i) * (3 - 2 * (t - i))
    lines = nodes[i] + (nodes[i + 1] - nodes[i]) * f[:, None]
    return lines[:, i] + (lines[:, i + 1] - lines[:, i]) * f


def _slice(rng, level, size):
    """One slice of a new patient: HU image (float) and calcification mask (bool) [size, size]."""
    U, (height, ribs, parts) = rng.uniform, LEVELS[level]
    # Pose and build vary enough to defeat raw-pixel neighbours. fat: rim of the trunk; t: tangent
    # of half the rotation, +-20 degrees; wide: width to height; breath: lung size; prone: one
    # patient in eight has half a turn; scale: pixels per body unit
    fat, t, wide, breath = U(.03, .25), U(-.18, .18), U(.82, 1.18), U(.7, 1.12)
    prone = -1 if U() < .12 else 1
    cos, sin = prone * (1 - t * t) / (1 + t * t), prone * 2 * t / (1 + t * t)
    scale = size * U(.32, .52) / (1 + fat)
    cx, cy = size * U(.36, .64), size * U(.36, .64)
    col, row = np.arange(size) + .5 - cx, (np.arange(size) + .5 - cy)[:, None]
    # the noise warps the frame, so that ellipses become organic shapes
    X = (cos * col + sin * row) / (scale * wide) + .035 * _field(rng, size, 5)
    Y = (cos * row - sin * col) / (scale / wide) + .035 * _field(rng, size, 5)
    # HU per patient. A quarter are without contrast agent. Bone, blood and bowel reach into the
    # range of the calcifications
    blood = U(30, 50) if U() < .25 else U(150, 500)
    image, walls = np.full((size, size), -1000.), []
    hu = dict(fat=U(-115, -85), soft=U(35, 65), lung=U(-870, -600), gas=-980, bone=U(600, 1300),
              vessel=blood, chamber=blood * U(.7, 1.1), heart=U(45, 110), liver=U(50, 110),
              spleen=U(50, 130), kidney=U(30, 45) + blood * U(.25, .5),
              bowel=U(0, 60) if U() < .5 else U(200, 700))

    def paint(value, x, y, rx, ry, axis=(1, 0)):
        """Blend a soft ellipse of `value` HU over the image: center x, y, half-widths rx (along
        `axis`) and ry."""
        px, py = x * scale * wide, y * scale / wide
        reach = (max(rx, ry) * 1.25 + .15) * scale + 1
        center = cy + sin * px + cos * py, cx + cos * px - sin * py
        box = tuple(slice(max(int(p - reach), 0), max(int(p + reach) + 2, 0))
                    for p in center)  # only around the shape, which is faster
        n = np.sqrt(axis[0] * axis[0] + axis[1] * axis[1])
        dx, dy = X[box] - x, Y[box] - y
        u, v = (axis[0] * dx + axis[1] * dy) / (n * rx), (axis[0] * dy - axis[1] * dx) / (n * ry)
        uu, vv = u * u, v * v
        # k is 1 on the edge; with 2 instead of 1.7 the shape would be a true ellipse
        k = np.sqrt(uu * uu + vv * vv + 1.7 * uu * vv) + 1e-9
        # distance to the edge in pixels, to first order: there pixels get their partial volume
        edge = (k - np.sqrt(k)) / np.sqrt(uu / (rx * rx) + vv / (ry * ry) + 1e-9) * scale
        image[box] += np.clip(.5 - edge, 0, 1) * (value - image[box])

    def organ(tissue, x, y, rx, ry, axis=(1, 0)):
        """Paint an organ, moved and resized at random, with the details of its tissue."""
        grow = 1
        if tissue == 'lung':
            grow = breath
        elif tissue == 'gas':
            grow = U(.8, 1.8)
        x, y = x + U(-.05, .05), y + U(-.05, .05)
        rx, ry = grow * rx * U(.85, 1.15), grow * ry * U(.85, 1.15)
        paint(hu[tissue] + U(-15, 15), x, y, rx, ry, axis)
        if tissue == 'bone':  # marrow; what remains around it is the cortex
            paint(hu['bone'] * U(.2, .5), x, y, rx * .75, ry * .6, axis)
        elif tissue == 'kidney':  # sinus: fat, or excreted contrast agent
            paint(U(-80, 300), x * .93, y, rx * .4, ry * .45, axis)
        elif tissue in ('vessel', 'heart'):  # calcifications may sit here
            walls.append((x, y, rx, ry, axis))
        elif tissue == 'lung':  # vessels fan out from the hilum
            for _ in range(7):
                dx, dy = rx * U(-.1, .45) * (1 if x > 0 else -1), ry * U(-.33, .33)
                paint(U(-450, 100), x * .7 + dx, y + dy, np.sqrt(dx * dx + dy * dy) + .02,
                      U(.008, .022), (dx, dy))

    if U() < .6:  # couch
        paint(U(-300, 100), U(-.1, .1), prone * (height + fat + U(.08, .2)), U(.8, 1.3),
              U(.02, .05))
    for value, rim in ((20, fat), (hu['fat'], fat - .03), (hu['soft'], 0)):  # skin, fat, muscles
        paint(value, 0, 0, 1 + rim, height + rim)
    for x in (-.25, .25):  # fat planes part the back muscles
        paint(hu['fat'], x, height * .62, .02, .15, (1, U(-.3, .3)))
    for tissue, x, y, rx, ry, *slope in parts:
        tilt = slope[0] if slope else U(-.15, .15)
        for side in (1, -1) if tissue[0] == '2' else (1,):
            organ(tissue.lstrip('2'), side * x, y, rx, ry, (1, side * tilt))
    has_arms, arm = U() < .35, U(-.2, .3)  # beside the trunk, or raised out of the slice
    for side in (-1, 1):
        if has_arms:
            for value, r in ((hu['fat'], .13), (hu['soft'], .11), (hu['bone'], .05)):
                paint(value, side * (1.2 + fat), arm, r, r)
        phase = U()  # ribs stand anywhere, because the oblique cut meets the wall anywhere
        for j in range(ribs):
            t = -.85 + 1.7 * (j + phase) / ribs
            x, y = side * .9 * (1 - t * t) / (1 + t * t), .9 * height * 2 * t / (1 + t * t)
            organ('bone', x, y, U(.06, .13), U(.025, .035), (-y / height, x * height))
    x, y = U(-.03, .03), height - .46  # vertebra: body, two processes, canal
    for dy, rx, ry in ((.10, .16, .125), (.25, .22, .035), (.34, .035, .09)):
        organ('bone', x, y + dy, rx, ry)
    paint(30, x, y + .245, .055, .045)
    mask = _calcify(rng, image, X, Y, walls)
    return _scan(rng, image), mask


def _calcify(rng, image, X, Y, walls):
    """Paint calcifications on random walls of half of the slices, in place. X, Y [size, size]: body
    coordinates of the pixels. Returns: mask [size, size] bool."""
    U, size, mask = rng.uniform, len(image), np.zeros(image.shape, bool)
    n_calcifications = rng.integers(1, 5) if U() < .5 else 0
    for _ in range(n_calcifications):
        x, y, rx, ry, (ax, ay) = walls[rng.integers(len(walls))]
        u, v, r = U(-1, 1), U(-1, 1), max(.6, U(.6, 1.6) * size / 64)
        n = np.sqrt((u * u + v * v) * (ax * ax + ay * ay)) + 1e-9
        u, v = u * rx / n, v * ry / n
        distance = (X - x - ax * u + ay * v) ** 2 + (Y - y - ay * u - ax * v) ** 2
        # drawn in pixel coordinates, so that none falls between pixels
        i, j = divmod(int(distance.argmin()), size)
        dy, dx = np.arange(size)[:, None] - i + U(-.4, .4), np.arange(size) - j + U(-.4, .4)
        cover = np.clip(.5 + r - np.sqrt(dy * dy + dx * dx), 0, 1)
        image += cover * (U(300, 800) - image)
        mask |= cover >= .5  # half a pixel or more; true at the center pixel
    return mask


def _scan(rng, image):
    """The scanner adds texture in tissue, an offset, partly correlated noise of 10 to 60 HU."""
    U, size = rng.uniform, len(image)
    image += (image > -400) * 12 * _field(rng, size, max(size // 5, 1)) + U(-40, 40)
    strength, white = U(10, 60), rng.normal(size=(size, size))
    return image + strength * (.6 * white + _field(rng, size, max(size // 2, 1)))


def make_phantom(n_images, size=64, seed=0):
    """Draw `n_images` CT-like axial slices. Slice i depends on (seed, i, size) only; use other
    seeds for other splits.

    Returns a dict: 'images' int16 [N, size, size], HU (air -1000, water 0) in the 12-bit range
    -1024..3071; 'labels' int64 [N], the slice level as an index into PHANTOM_CLASSES, balanced in
    every run of six; 'masks' uint8 [N, size, size], 1 on the pixels of small calcifications, which
    about half of the slices have.
    """
    k, images = len(LEVELS), np.empty((n_images, size, size), np.int16)
    masks, labels = np.zeros(images.shape, np.uint8), np.empty(n_images, np.int64)
    for i in range(n_images):
        # a generator per image and one per run of six: no image depends on how many are drawn
        order = np.random.default_rng([seed, i // k, 1]).random(k).argsort()
        labels[i] = order[i % k]
        rng = np.random.default_rng([seed, i, 2])
        image, masks[i] = _slice(rng, PHANTOM_CLASSES[labels[i]], size)
        images[i] = np.rint(np.clip(image, -1024, 3071))
    return {'images': images, 'labels': labels, 'masks': masks}
