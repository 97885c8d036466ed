"""Phantom: seeded CT-like axial slices in Hounsfield units (HU), for the demo, tests and bench.

make_phantom draws slices of as many patients, make_phantom_volumes bodies of many slices.

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


# A part of the body is an ellipsoid around its level and ends REACH levels above and below it.
# Between two levels a slice cuts the parts of both, and paints them in the order of LAYERS.
REACH = .9
LAYERS = ('lung', 'fat', 'heart', 'liver', 'spleen', 'kidney', 'soft', 'chamber', 'bowel', 'vessel',
          'bone', 'gas')


def _cut_parts(z):
    """The parts that a slice at height z cuts, as [(level, number, grow, part)] in painting order.

    z: 0 = the first of LEVELS, 5 = the last, fractions lie between two of them. grow: size of the
    cut, as a share of the largest.
    """
    parts = []
    for level, (_, _, parts_of_level) in enumerate(LEVELS.values()):
        away = (z - level) / REACH
        if away * away < .98:
            grow = np.sqrt(1 - away * away)
            parts += [(level, number, grow, part) for number, part in enumerate(parts_of_level)]
    if z != int(z):  # a slice at a level keeps the order of its list
        parts.sort(key=lambda entry: LAYERS.index(entry[3][0].lstrip('2')))
    return parts


def _between_levels(z, column):
    """A number of LEVELS at height z, a straight line between two levels."""
    values = [level[column] for level in LEVELS.values()]
    i = min(int(z), len(values) - 2)
    return values[i] + (values[i + 1] - values[i]) * (z - i)


def _slice(draw, z, size):
    """Draw a slice at height z (_cut_parts) of a patient, without calcifications and noise.

    draw(piece, *numbers) -> the Generator of one piece of the body. It is the same one for all
    pieces if the patient has one slice, and a fresh one by (piece, *numbers) if the patient has
    several: then a piece is alike in all of them.
    Returns: HU image [size,size] float; X, Y [size,size], body coordinates of the pixels; walls,
    [(level, (x, y, rx, ry, axis))] of the vessels and the heart.
    """
    rng = draw('pose')
    U, height, ribs = rng.uniform, _between_levels(z, 0), _between_levels(z, 1)
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

    def organ(rng, tissue, x, y, rx, ry, axis=(1, 0), level=0):
        """Paint an organ, moved and resized at random, with the details of its tissue."""
        U, grow = rng.uniform, 1
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
            walls.append((level, (x, y, rx, ry, axis)))
        elif tissue == 'lung':  # vessels fan out from the hilum
            for _ in range(7):
                dx, dy = rx * U(-.1, .45) * (1 if x > 0 else -1), ry * U(-.33, .33)
                paint(U(-450, 100), x * .7 + dx, y + dy, np.sqrt(dx * dx + dy * dy) + .02,
                      U(.008, .022), (dx, dy))

    U = draw('couch').uniform
    if U() < .6:
        paint(U(-300, 100), U(-.1, .1), prone * (height + fat + U(.08, .2)), U(.8, 1.3),
              U(.02, .05))
    for value, rim in ((20, fat), (hu['fat'], fat - .03), (hu['soft'], 0)):  # skin, fat, muscles
        paint(value, 0, 0, 1 + rim, height + rim)
    U = draw('muscle').uniform
    for x in (-.25, .25):  # fat planes part the back muscles
        paint(hu['fat'], x, height * .62, .02, .15, (1, U(-.3, .3)))
    for level, number, grow, (tissue, x, y, rx, ry, *slope) in _cut_parts(z):
        tilt = slope[0] if slope else draw('tilt', level, number).uniform(-.15, .15)
        for side in (1, -1) if tissue[0] == '2' else (1,):
            organ(draw('part', level, number, side + 1), tissue.lstrip('2'), side * x, y,
                  grow * rx, grow * ry, (1, side * tilt), level)
    U = draw('arms').uniform
    has_arms, arm = U() < .35, U(-.2, .3)  # beside the trunk, or raised out of the slice
    for side in (-1, 1):
        if has_arms:
            for value, r in ((hu['fat'], .13), (hu['soft'], .11), (hu['bone'], .05)):
                paint(value, side * (1.2 + fat), arm, r, r)
        phase = draw('phase', side + 1).uniform()  # where the oblique ribs meet this slice
        phase = (phase + 3 * (z - int(z))) % 1
        for j in range(int(ribs + .999)):
            t = -.85 + 1.7 * (j + phase) / ribs
            if t > .85:
                break
            x, y = side * .9 * (1 - t * t) / (1 + t * t), .9 * height * 2 * t / (1 + t * t)
            rng = draw('rib', side + 1, j)
            organ(rng, 'bone', x, y, rng.uniform(.06, .13), rng.uniform(.025, .035),
                  (-y / height, x * height))
    rng = draw('spine')
    x, y = rng.uniform(-.03, .03), height - .46  # vertebra: body, two processes, canal
    for dy, rx, ry in ((.10, .16, .125), (.25, .22, .035), (.34, .035, .09)):
        organ(rng, 'bone', x, y + dy, rx, ry)
    paint(30, x, y + .245, .055, .045)
    return image, X, Y, walls


def _calcify(rng, image, mask, X, Y, walls, grow=1):
    """Paint one calcification on a random wall into image and mask [size,size] bool, in place.
    X, Y, walls: of _slice; grow: factor on its radius, 0 to 1."""
    U, size = rng.uniform, len(image)
    _, (x, y, rx, ry, (ax, ay)) = walls[rng.integers(len(walls))]
    u, v, r = U(-1, 1), U(-1, 1), max(.6, grow * U(.6, 1.6) * size / 64)
    n = np.sqrt((u * u + v * v) * (ax * ax + ay * ay)) + 1e-9
    u, v = u * rx / n, v * ry / n
    distance = (X - x - ax * u + ay * v) ** 2 + (Y - y - ay * u - ax * v) ** 2
    # drawn in pixel coordinates, so that none falls between pixels
    i, j = divmod(int(distance.argmin()), size)
    dy, dx = np.arange(size)[:, None] - i + U(-.4, .4), np.arange(size) - j + U(-.4, .4)
    cover = np.clip(.5 + r - np.sqrt(dy * dy + dx * dx), 0, 1)
    image += cover * (U(300, 800) - image)
    mask |= cover >= .5  # half a pixel or more; true at the center pixel


def _scan(rng, image, patient_rng):
    """The scanner adds texture in tissue, an offset, partly correlated noise of 10 to 60 HU; offset
    and strength are drawn by patient_rng. Returns: int16 in the 12-bit range."""
    U, size = patient_rng.uniform, len(image)
    image += (image > -400) * 12 * _field(rng, size, max(size // 5, 1)) + U(-40, 40)
    strength, white = U(10, 60), rng.normal(size=(size, size))
    image += strength * (.6 * white + _field(rng, size, max(size // 2, 1)))
    return np.rint(np.clip(image, -1024, 3071)).astype(np.int16)


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
        image, X, Y, walls = _slice(lambda *key: rng, int(labels[i]), size)
        mask = np.zeros(image.shape, bool)
        n_calcifications = rng.integers(1, 5) if rng.uniform() < .5 else 0
        for _ in range(n_calcifications):
            _calcify(rng, image, mask, X, Y, walls)
        images[i], masks[i] = _scan(rng, image, rng), mask
    return {'images': images, 'labels': labels, 'masks': masks}


# ---- volumes ----

VOLUME_CLASSES = ('no calcification', 'calcification')
PIECES = ('volume', 'pose', 'couch', 'muscle', 'tilt', 'part', 'arms', 'phase', 'rib', 'spine',
          'spot', 'patient', 'scan')


def make_phantom_volumes(n_bodies, size=64, seed=0, n_slices=24):
    """Draw `n_bodies` CT-like volumes of `n_slices` axial slices, pelvis first, lung apex last.
    Body i depends on (seed, i, size, n_slices) only.

    The organs grow, shrink and change along the body. The first and the last level, the distance
    between levels, pose and build differ between bodies. A calcification lies in one to four
    neighbouring slices. The sizes in mm are as in the header of a scan of 4 to 6 mm a slice: the
    bodies are short.
    Returns a dict, for N = n_bodies * n_slices slices, body after body: 'images' and 'masks' as
    make_phantom; 'labels' int64 [N], 1 if the slice shows a calcification (VOLUME_CLASSES), about
    half do; 'volume' int32 [N], index of the body; 'position_mm' float32 [N], along the body;
    'spacing_mm' float32 [n_bodies, 3]: slice, row, column; 'groups' str [N], the names of the
    bodies, other ones for another seed.
    """
    images = np.empty((n_bodies, n_slices, size, size), np.int16)
    masks = np.zeros(images.shape, np.uint8)
    spacing = np.empty((n_bodies, 3), np.float32)
    for body in range(n_bodies):
        def draw(piece, *numbers):
            return np.random.default_rng([seed, body, 3, PIECES.index(piece), *numbers])
        U = draw('volume').uniform
        last, first, bend, pixel_mm = U(0, .4), U(4.6, 5), U(-.4, .4), U(300, 450) / size
        spacing[body] = round(U(4, 6), 1), pixel_mm, pixel_mm
        spots = [(U(last, first), U(.15, .38)) for _ in range(int(U(2, 10)))]  # height, half-length
        for i in range(n_slices):
            along = i / max(n_slices - 1, 1)
            z = first - (first - last) * (along + bend * along * (1 - along))
            image, X, Y, walls = _slice(draw, z, size)
            mask = np.zeros(image.shape, bool)
            for number, (height, half_length) in enumerate(spots):
                away, level = (z - height) / half_length, int(height + .5)
                if away * away < 1:
                    _calcify(draw('spot', number), image, mask, X, Y,
                             [wall for wall in walls if wall[0] == level],
                             np.sqrt(1 - away * away))
            images[body, i] = _scan(draw('scan', i), image, draw('patient'))
            masks[body, i] = mask
    slices, volume = np.arange(n_slices), np.arange(n_bodies, dtype=np.int32)
    position_mm = slices * spacing[:, :1]  # [V,D]
    groups = np.array([f'body {seed}-{body}' for body in volume], dtype=str)
    masks = masks.reshape(-1, size, size)
    return {'images': images.reshape(-1, size, size), 'masks': masks,
            'labels': masks.any(axis=(1, 2)).astype(np.int64),
            'volume': volume.repeat(n_slices), 'groups': groups.repeat(n_slices),
            'position_mm': position_mm.astype(np.float32).ravel(), 'spacing_mm': spacing}
