"""The shapes world: a small stand-in for captioned photographs, whose pictures a program can score.

A record says what a picture shows, in GenEval's format. A caption and a picture are made of it. A detector
finds the objects of any picture, and a score compares them with a record. `write_shards` writes an ordinary
captioned data set, which `data.images` reads like any other.

Sections: captions - pictures - the detector - scores - the world as a data set.
"""

import functools
import glob
import io
import itertools
import json
import math
import os
import tarfile
import zlib

import numpy as np
from PIL import Image, ImageDraw

from data.files import note_made_with, rank_zero_first, write_atomically
from data.images import aspect_ratios
from data.index import in_processes, progress

SHAPES = ("circle", "square", "star", "cross")
COLOURS = {
    "red": (220, 50, 47),
    "green": (40, 160, 70),
    "blue": (38, 90, 210),
    "yellow": (245, 200, 40),
    "purple": (150, 60, 190),
    "black": (40, 40, 40),
}
BACKGROUND = (244, 242, 236)
POSITIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four")
PLURAL = {"circle": "circles", "square": "squares", "star": "stars", "cross": "crosses"}

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's six kinds
TAG_SHARE = (0.06, 0.14, 0.20, 0.08, 0.26, 0.26)  # of training captions: what is learned last is shown most
COMBINING = ("two_object", "position", "color_attr")  # the kinds of which some captions are held out


# -- captions ------------------------------------------------------------------------------------------------
def make_record(tag, rng):
    """Return a random record of one of the six kinds, in GenEval's metadata format.

    rng: a numpy Generator.  The record is {"tag", "include", "exclude", "prompt"}; `include` is a list of
    {"class", "count"}, where the kind asks for it with "color", or with "position": [where, of which object].
    """
    one, two = rng.choice(SHAPES, 2, replace=False).tolist()
    colour_one, colour_two = rng.choice(list(COLOURS), 2, replace=False).tolist()
    count = int(rng.integers(2, 5))
    position = str(rng.choice(POSITIONS))
    first = {"class": one, "count": 1}
    second = {"class": two, "count": 1}
    include = [first, second] if tag in COMBINING else [first]
    exclude = []
    if tag == "single_object":
        text = f"a {one}"
    elif tag == "two_object":
        text = f"a {one} and a {two}"
    elif tag == "counting":
        first["count"] = count
        exclude = [{"class": one, "count": count + 1}]
        text = f"{NUMBERS[count]} {PLURAL[one]}"
    elif tag == "colors":
        first["color"] = colour_one
        text = f"a {colour_one} {one}"
    elif tag == "position":
        second["position"] = [position, 0]
        text = f"a {two} {position} a {one}"
    else:  # color_attr
        first["color"] = colour_one
        second["color"] = colour_two
        text = f"a {colour_one} {one} and a {colour_two} {two}"
    return {"tag": tag, "include": include, "exclude": exclude, "prompt": f"a photo of {text}"}


def held_out(record):
    """Return True if the record's caption is kept out of training: one in six of those that combine objects.

    The other kinds need every word to be learned, so none of their captions is held out.
    """
    return record["tag"] in COMBINING and zlib.crc32(b"0" + record["prompt"].encode()) % 6 == 0


def training_record(rng):
    """Return a random record whose caption is not held out."""
    while True:
        tag = str(rng.choice(TAGS, p=TAG_SHARE))
        record = make_record(tag, rng)
        if not held_out(record):
            return record


def heldout_records(count, seed):
    """Return `count` records to score a model with, the six kinds in turn.

    Of the kinds that combine two objects they have only captions that training never saw.
    """
    rng = np.random.default_rng([seed, 1])
    records = []
    while len(records) < count:
        tag = TAGS[len(records) % len(TAGS)]
        record = make_record(tag, rng)
        if held_out(record) or tag not in COMBINING:
            records.append(record)
    return records


# -- pictures ------------------------------------------------------------------------------------------------
def star_corners():
    """Return the ten corners of a five-pointed star that fills the square from -1 to 1."""
    corners = []
    for k in range(10):
        angle = k * math.pi / 5
        length = 1 if k % 2 == 0 else 0.45
        x = math.sin(angle) * length
        y = -math.cos(angle) * length
        corners.append((x / 0.9511, (y + 1) / 0.9045 - 1))
    return corners


ARM = 0.34  # half the width of a cross's arm
CORNERS = {  # of the shapes that have any, in the square from -1 to 1; y grows downwards
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "cross": [
        *[(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM)],
        *[(ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)],
    ],
    "star": star_corners(),
}


def draw_object(canvas, shape, colour, x, y, r):
    """Paint one shape into the square of half side r around (x, y) of an ImageDraw, in pixels."""
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=colour)
    else:
        canvas.polygon([(x + r * u, y + r * v) for u, v in CORNERS[shape]], fill=colour)


def relation(a, b):
    """Return where box a (x0, y0, x1, y1) lies relative to box b, a set of POSITIONS, by GenEval's rule."""
    offset = np.array([a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]]) / 2  # between the centres
    sizes = np.array([a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]])
    if np.all(np.abs(offset) - 0.1 * sizes < 1e-3):  # too near to each other for any
        return set()
    dx, dy = np.maximum(np.abs(offset) - 0.1 * sizes, 0) * np.sign(offset) / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name in POSITIONS if holds[name]}


def gap(a, b):
    """Return the larger of two boxes' horizontal and vertical distance; negative if they overlap."""
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


def is_clear(boxes, record):
    """Return True if a record's boxes lie apart from each other and stand in the positions that it names."""
    if any(gap(a, b) < 0.05 for a, b in itertools.combinations(boxes, 2)):
        return False
    for k, wanted in enumerate(record["include"]):
        if "position" in wanted:
            where, other = wanted["position"]
            if relation(boxes[k], boxes[other]) != {where}:
                return False
    return True


HALF_SIDES = {1: (0.15, 0.25), 2: (0.13, 0.20), 3: (0.12, 0.16), 4: (0.11, 0.15)}  # by the number of objects


def place(record, width, height, rng):
    """Return a box for each of a record's objects; the short side of the picture is 1."""
    number = sum(wanted["count"] for wanted in record["include"])
    smallest, largest = HALF_SIDES[min(number, 4)]
    while True:
        boxes = []
        for _ in range(number):
            r = rng.uniform(smallest, largest)
            x = rng.uniform(r + 0.03, width - r - 0.03)
            y = rng.uniform(r + 0.03, height - r - 0.03)
            boxes.append((x - r, y - r, x + r, y + r))
        if is_clear(boxes, record):
            return boxes


def draw_shapes(record, size, rng):
    """Draw a record: its objects and nothing else, on a plain light background. Return an RGB PIL.Image.

    size: pixels of the square, or (width, height).  rng: a numpy Generator; the same state gives the same
    scene at every size.  Where the record names no colour it is random.
    """
    width, height = (size, size) if isinstance(size, int) else size
    short = min(width, height)
    fine = 4  # the picture is drawn four times finer and then averaged, which makes clean edges
    boxes = fine * short * np.array(place(record, width / short, height / short, rng))
    spare_colours = rng.permutation(list(COLOURS))
    image = Image.new("RGB", (fine * width, fine * height), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    drawn = 0
    for wanted, spare in zip(record["include"], spare_colours):
        colour = COLOURS[wanted.get("color", str(spare))]
        for x0, y0, x1, y1 in boxes[drawn : drawn + wanted["count"]]:
            draw_object(canvas, wanted["class"], colour, (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2)
        drawn += wanted["count"]
    return image.reduce(fine)


# -- the detector --------------------------------------------------------------------------------------------
SHORT_SIDE = 128  # pixels of the picture that the detector looks at
DIFFERENT = 60  # distance in RGB from which on a pixel is not of a colour


def palette_distances(image):
    """Return how far in RGB each pixel is from the background and from each colour, (height, width, 7)."""
    palette = np.array([BACKGROUND, *COLOURS.values()], dtype=float)
    pixels = np.asarray(image, dtype=float)
    return np.linalg.norm(pixels[:, :, None] - palette, axis=-1)


def connected_components(mask):
    """Return a label for each pixel of a boolean mask (height, width), 0 outside; diagonals do not connect.

    Every pixel starts with a number of its own and takes its neighbours' largest, until nothing changes.
    """
    numbers = np.arange(1, mask.size + 1).reshape(mask.shape)
    labels = np.where(mask, numbers, 0)
    while True:
        padded = np.pad(labels, 1)
        above = padded[:-2, 1:-1]
        below = padded[2:, 1:-1]
        left = padded[1:-1, :-2]
        right = padded[1:-1, 2:]
        largest = np.maximum.reduce([labels, above, below, left, right])
        spread = np.where(mask, largest, 0)
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def bounding_box(mask):
    """Return x0, y0, x1, y1 of a boolean mask (height, width); x1 and y1 are the first outside."""
    ys, xs = np.nonzero(mask)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def silhouette(shape, width, height):
    """Return what a shape looks like in its bounding box, (height, width) in [0, 1]."""
    side = max(width, height)
    image = Image.new("L", (4 * side, 4 * side))
    draw_object(ImageDraw.Draw(image), shape, 255, 2 * side, 2 * side, 2 * side)
    return np.asarray(image.reduce(4).resize((width, height), Image.BOX)) / 255


SILHOUETTES = {shape: silhouette(shape, 32, 32) for shape in SHAPES}


def overlap(a, b):
    """Return the intersection over union of two masks with values in [0, 1]."""
    return np.minimum(a, b).sum() / np.maximum(a, b).sum()


def detect_object(blob, distances):
    """Return a blob as (class, colour, box), or None if it is not a clean object of one colour.

    blob: boolean (height, width).  distances: of its pixels, see `palette_distances`.  A smear, two objects
    grown together, a patchwork and a speck are not clean.
    """
    x0, y0, x1, y1 = bounding_box(blob)
    outline = Image.fromarray(np.uint8(blob[y0:y1, x0:x1]) * 255).resize((32, 32), Image.BILINEAR)
    outline = np.asarray(outline) / 255
    likeness = {shape: overlap(outline, ideal) for shape, ideal in SILHOUETTES.items()}
    second, shape = sorted(SHAPES, key=likeness.get)[-2:]
    if likeness[shape] < max(0.72, likeness[second] + 0.08):
        return None
    to_colours = distances[blob][:, 1:]  # (pixels, colours)
    nearest = to_colours.argmin(1)
    votes = np.bincount(nearest[to_colours.min(1) < DIFFERENT], minlength=len(COLOURS))
    if votes.max() < 0.75 * blob.sum():
        return None
    if blob.sum() < 100 or not 0.75 < (x1 - x0) / (y1 - y0) < 1.33:
        return None
    return shape, list(COLOURS)[votes.argmax()], (x0, y0, x1, y1)


def detect_shapes(image):
    """Return all objects of a picture as (class, colour, box), or None if any part of it is not clean.

    A clean picture has only whole objects, each of one colour, on an even background. The detector scales the
    picture to a short side of 128 pixels; boxes are in these pixels.
    """
    scale = SHORT_SIDE / min(image.size)
    size = [round(side * scale) for side in image.size]
    distances = palette_distances(image.convert("RGB").resize(size, Image.BOX))
    to_background = distances[:, :, 0]
    mask = to_background > DIFFERENT
    if mask.all() or (to_background[~mask] > 30).mean() > 0.02:
        return None  # the background is uneven, or there is none
    labels = connected_components(mask)
    objects = []
    for label in np.unique(labels[mask]):
        blob = labels == label
        if blob.sum() > 3:  # up to three pixels are the ringing of an edge
            found = detect_object(blob, distances)
            if found is None:
                return None
            objects.append(found)
    return objects


# -- scores --------------------------------------------------------------------------------------------------
def score_shapes(image, record):
    """Return True if a picture shows its record: the objects asked for, each clean, and nothing else."""
    return score_objects(detect_shapes(image), record)


def score_objects(objects, record):
    """Return True if the objects that `detect_shapes` has found in a picture are those of its record."""
    if objects is None:
        return False
    boxes = []  # of each entry of `include`
    for wanted in record["include"]:
        found = [
            box
            for shape, colour, box in objects
            if shape == wanted["class"] and colour == wanted.get("color", colour)
        ]
        if len(found) != wanted["count"]:
            return False
        boxes.append(found)
    if len(objects) != sum(len(found) for found in boxes):
        return False
    for wanted, found in zip(record["include"], boxes):
        if "position" in wanted:
            where, other = wanted["position"]
            if not any(where in relation(a, b) for a in found for b in boxes[other]):
                return False
    return True


def object_mask(image, colour, box):
    """Return which pixels of a part of a picture are an object's, boolean (height, width).

    image: RGB.  box: x0, y0, x1, y1, cut where it leaves the picture.  A pixel is the object's if its colour
    is nearer to the object's than to the background's.
    """
    x0, y0, x1, y1 = box
    pixels = np.asarray(image)[max(y0, 0) : y1, max(x0, 0) : x1].astype(float)
    background = np.array(BACKGROUND, dtype=float)
    direction = np.array(COLOURS[colour]) - background
    return (pixels - background) @ direction > 0.5 * direction @ direction


def outline_overlap(image, objects):
    """Return how well a picture's outlines fit ideal shapes: intersection over union, the objects' mean.

    Each object is compared, at the picture's own size, with the ideal shape drawn into its bounding box.
    objects: what `detect_shapes` has found in the picture.  Returns None if that is nothing.
    """
    if not objects:
        return None
    image = image.convert("RGB")
    scale = min(image.size) / SHORT_SIDE
    overlaps = []
    for shape, colour, (x0, y0, x1, y1) in objects:
        # A margin of two pixels: the detector's box leaves out what covers too little of a pixel.
        around = (x0 - 2, y0 - 2, x1 + 2, y1 + 2)
        mask = object_mask(image, colour, [round(edge * scale) for edge in around])
        left, top, right, bottom = bounding_box(mask)
        ideal = silhouette(shape, right - left, bottom - top) > 0.5
        overlaps.append(overlap(mask[top:bottom, left:right], ideal))
    return float(np.mean(overlaps))


# -- the world as a data set ---------------------------------------------------------------------------------
def add_to_tar(tar, name, content):
    """Add a file to a tar file, dated 1970: the tar has the same bytes whenever it is written."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_shard(numbers, pixels, seed, ratios, path):
    """Write a tar file of pictures `numbers`, each as .png, .txt (its caption) and .json (its record)."""
    buckets = aspect_ratios(pixels)
    with tarfile.open(path, "w") as tar:
        for k in numbers:
            height, width = buckets[ratios[k % len(ratios)]]
            rng = np.random.default_rng([seed, pixels, k])
            record = training_record(rng)
            png = io.BytesIO()
            draw_shapes(record, (width, height), rng).save(png, "PNG")
            add_to_tar(tar, f"{k:08}.png", png.getvalue())
            add_to_tar(tar, f"{k:08}.txt", record["prompt"].encode())
            add_to_tar(tar, f"{k:08}.json", json.dumps(record).encode())


def write_shards(folder, pixels, count, seed, ratios=("1.0",)):
    """Write `count` training pictures as a WebDataset, 1,000 a shard. Return the glob of its shards.

    All cores draw what is not there yet. Picture k is a function of (seed, pixels, k); its sides are those of
    the buckets named `ratios`, in turn.  Raises ValueError if `folder` was made with other arguments.
    """
    note_made_with(folder, dict(pixels=pixels, count=count, seed=seed, ratios=ratios))
    with rank_zero_first():  # the other processes find what the first one has drawn
        missing = []
        for first in range(0, count, 1000):
            path = os.path.join(folder, f"{first // 1000:05}.tar")
            if not os.path.exists(path):
                numbers = range(first, min(first + 1000, count))
                missing.append((path, functools.partial(write_shard, numbers, pixels, seed, ratios)))
        if missing:
            what = f"drawing {count} pictures of {pixels} px"
            for _ in progress(in_processes(write_atomically, missing), what, len(missing)):
                pass
    return os.path.join(glob.escape(folder), "*.tar")
