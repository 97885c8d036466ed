"""samples.py: which images a run draws again and again, and the boxes of its guided crops."""
import os

import numpy as np
import pytest
from PIL import Image, ImageColor

from augment import MultiCrop
from data import Dataset
from pictures import frames, patch_groups, patch_heat
from run_folder import remove_parts, whole_file
from samples import GUIDED, RANDOM, choose_images, draw_guided



class Unreadable(list):
    """Images of which some cannot be read."""
    num_channels = 1

    def __init__(self, images, bad):
        super().__init__(images)
        self.bad = bad

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError("torn")
        return super().__getitem__(i)


def dataset(n=20, labelled=(3, 11), bad=()):
    images = [np.full((30, 40, 1), i, np.uint8) for i in range(n)]
    masks = [np.zeros((30, 40), np.uint8) for _ in range(n)]
    for i in labelled:
        masks[i][10:14, 20:26] = 2
    return Dataset(Unreadable(images, bad), None, masks, name="drawn", split="val")


def numbers(found):
    return [int(image[0, 0, 0]) for image, _ in found]


def test_images_are_drawn_by_seed_and_those_with_a_label_come_first():
    plain = numbers(choose_images(dataset(), 0, (), False))
    assert plain == numbers(choose_images(dataset(), 0, (), False)) and len(set(plain)) == 3
    assert plain != numbers(choose_images(dataset(), 1, (), False))
    found = choose_images(dataset(), 0, (2,), True)
    assert set(numbers(found)[:2]) == {3, 11} and len(found) == 3
    assert found[0][1].sum() == 24 and found[2][1].sum() == 0
    assert choose_images(dataset(), 0, (1,), True)[0][1].sum() == 0  # 2 is no label here


def test_images_that_cannot_be_read_are_left_out():
    order = np.random.default_rng(0).permutation(20).tolist()
    found = numbers(choose_images(dataset(bad=order[:2]), 0, (), False))
    assert found == order[2:5]
    assert choose_images(dataset(bad=range(20)), 0, (), False) == []


@pytest.mark.parametrize("n_random", [0, 3])
def test_guided_boxes_hold_a_labelled_pixel(n_random):
    crop = MultiCrop(16, (0.4, 1), 2, 16, (0.1, 0.4), n_random, 4, (0.02, 0.1))
    label = np.zeros((60, 80), bool)
    label[20:24, 50:56] = True
    guided, free = crop.boxes(np.zeros((60, 80, 1), np.uint8), label, np.random.default_rng(0))
    assert len(guided) == 4 and len(free) == (n_random or 4)
    for top, left, height, width in guided:
        assert height == width and label[top:top + height, left:left + width].any()
    for top, left, height, width in free:
        assert 0.09 < height * width / label.size < 0.42


def test_the_picture_of_guided_crops(tmp_path):
    crop = MultiCrop(16, (0.4, 1), 2, 16, (0.1, 0.4), 2, 4, (0.05, 0.1))
    draw_guided(f"{tmp_path}/guided.png", dataset(), crop, (0, 255), 0)
    image = np.asarray(Image.open(tmp_path / "guided.png")).astype(int)
    left, right = image[:, :380], image[:, 380:]
    for color, here, elsewhere in ((GUIDED, left, right), (RANDOM, right, left)):
        color = np.array(ImageColor.getrgb(color))
        assert (here == color).all(axis=2).sum() > 500
        assert not (elsewhere == color).all(axis=2).any()
    draw_guided(f"{tmp_path}/none.png", dataset(labelled=()), crop, (0, 255), 0)
    assert os.listdir(tmp_path) == ["guided.png"]  # no label, no picture


def test_frames_lie_where_the_image_lies():
    """An image of 20 x 40 pixels fills a square of 80 in width, and 20 pixels are above it."""
    framed = np.asarray(frames(Image.new("RGB", (80, 80)), [(5, 10, 10, 20)], (20, 40), "#ff0000"))
    rows, columns = np.nonzero(framed[..., 0] == 255)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (30, 49, 20, 59)
    assert framed[40, 40].sum() == 0  # only the frame


def test_patches_over_a_picture_keep_their_places():
    picture = Image.new("RGB", (40, 20), "white")
    heat = np.zeros((2, 4))
    heat[1, 3] = 1
    shades = np.asarray(patch_heat(picture, heat, 80)).astype(int)
    assert (shades[:20] == 0).all() and (shades[25:35, 5:50] == 178).all()  # a dim grey picture
    assert shades[55, 75].tolist() != [178] * 3 and shades[55, 75, 0] > shades[55, 75, 2]
    groups = np.zeros((2, 4), int)
    groups[0, 0], groups[0, 2] = 1, 2
    shades = np.asarray(patch_groups(picture, groups, 80)).astype(int)
    one, two, none = shades[30, 10], shades[30, 50], shades[50, 30]
    assert len({tuple(color) for color in (one, two, none)}) == 3 and none.tolist() == [178] * 3


def test_a_picture_that_is_not_finished_has_no_name(tmp_path):
    (tmp_path / "samples").mkdir()
    path = f"{tmp_path}/samples/a.png"
    with pytest.raises(KeyboardInterrupt), whole_file(path) as part:
        Image.new("RGB", (4, 4)).save(part)
        assert os.listdir(tmp_path / "samples") == ["a.png.part.png"]
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "samples") == []
    (tmp_path / "samples/b.png.part.png").write_text("torn")  # what SIGKILL leaves
    remove_parts(str(tmp_path))
    assert os.listdir(tmp_path / "samples") == []
    with whole_file(path) as part:
        Image.new("RGB", (4, 4)).save(part)
    assert os.listdir(tmp_path / "samples") == ["a.png"]
