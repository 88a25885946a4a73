"""The shapes world: pictures, captions in GenEval's grammar, a detector that scores them; and all of it as an
ordinary captioned data set, which `data.images` reads as it reads anybody's."""

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

from data.files import claim, rank_zero_first, write_atomically
from data.images import aspect_ratios
from data.index import in_processes

SHAPES = ("circle", "square", "star", "cross")
COLOURS = dict(red=(220, 50, 47), green=(40, 160, 70), blue=(38, 90, 210))
COLOURS |= dict(yellow=(245, 200, 40), purple=(150, 60, 190), black=(40, 40, 40))
BACKGROUND = (244, 242, 236)
POSITIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TAG_SHARE = (0.06, 0.14, 0.20, 0.08, 0.26, 0.26)  # of training captions: what is learned last is shown most
COMBINING = ("two_object", "position", "color_attr")  # the kinds of which some captions are held out
PLURAL = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}


# -- captions ------------------------------------------------------------------------------------------------
def make_record(tag, rng):
    """A random record of one of GenEval's six kinds, in its metadata format (create_prompts.py): {"tag",
    "include": [{"class", "count", "color", "position"}], "exclude", "prompt"}.  rng: numpy Generator."""
    one, two = map(str, rng.choice(SHAPES, 2, replace=False))
    colour1, colour2 = map(str, rng.choice(list(COLOURS), 2, replace=False))
    count, position = int(rng.integers(2, 5)), str(rng.choice(POSITIONS))
    first, second, exclude = {"class": one, "count": 1}, {"class": two, "count": 1}, []
    if tag == "counting":
        first["count"], exclude = count, [{"class": one, "count": count + 1}]
    elif tag == "position":
        second["position"] = [position, 0]
    elif tag in ("colors", "color_attr"):
        first["color"], second["color"] = colour1, colour2
    text = {
        "single_object": f"a {one}",
        "two_object": f"a {one} and a {two}",
        "counting": f"{NUMBERS[count]} {PLURAL[one]}",
        "colors": f"a {colour1} {one}",
        "position": f"a {two} {position} a {one}",
        "color_attr": f"a {colour1} {one} and a {colour2} {two}",
    }
    include = [first, second] if tag in COMBINING else [first]
    return {"tag": tag, "include": include, "exclude": exclude, "prompt": f"a photo of {text[tag]}"}


def held_out(record):
    """Is this caption kept from training? One in six of those that combine two objects; words never are."""
    return record["tag"] in COMBINING and zlib.crc32(b"0" + record["prompt"].encode()) % 6 == 0


def training_record(rng):
    record = make_record(str(rng.choice(TAGS, p=TAG_SHARE)), rng)
    return training_record(rng) if held_out(record) else record


def heldout_records(count, seed):
    """`count` records, the six kinds in turn: of the combining ones only captions that training never saw."""
    rng, records = np.random.default_rng([seed, 1]), []
    while len(records) < count:
        record = make_record(TAGS[len(records) % len(TAGS)], rng)
        if held_out(record) or record["tag"] not in COMBINING:
            records.append(record)
    return records


# -- pictures ------------------------------------------------------------------------------------------------
def draw_object(canvas, shape, colour, x, y, r):
    """Paint one shape into the square of half side r around (x, y) of an ImageDraw."""
    if shape == "circle":
        return canvas.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=colour)
    if shape == "square":
        points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif shape == "cross":
        a = 0.34
        points = zip((-a, a, a, 1, 1, a, a, -a, -a, -1, -1, -a), (-1, -1, -a, -a, a, a, 1, 1, a, a, -a, -a))
    else:  # a five-pointed star, stretched to fill its box
        tips = [(math.sin(k * math.pi / 5), -math.cos(k * math.pi / 5), (1, 0.45)[k % 2]) for k in range(10)]
        points = [(u * length / 0.9511, (v * length + 1) / 0.9045 - 1) for u, v, length in tips]
    canvas.polygon([(x + r * u, y + r * v) for u, v in points], fill=colour)


def relation(a, b):
    """GenEval's rule: where box a lies relative to box b (x0, y0, x1, y1); a subset of POSITIONS."""
    offset = np.array([a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]]) / 2
    sizes = np.array([a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]])
    if np.all(np.abs(offset) - 0.1 * sizes < 1e-3):
        return set()
    dx, dy = np.maximum(np.abs(offset) - 0.1 * sizes, 0) * np.sign(offset) / np.linalg.norm(offset)
    return {name for name, holds in zip(POSITIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)) if holds}


def place(record, width, height, rng):
    """Boxes for a record's objects, apart from each other and clear in position; the short side is 1."""
    number = sum(o["count"] for o in record["include"])
    smallest, largest = {1: (0.15, 0.25), 2: (0.13, 0.20), 3: (0.12, 0.16)}.get(number, (0.11, 0.15))
    asked = [(i, *o["position"]) for i, o in enumerate(record["include"]) if "position" in o]
    while True:
        boxes = []
        for _ in range(number):
            r = rng.uniform(smallest, largest)
            x, y = rng.uniform(r + 0.03, width - r - 0.03), rng.uniform(r + 0.03, height - r - 0.03)
            boxes.append((x - r, y - r, x + r, y + r))
        pairs = itertools.combinations(boxes, 2)
        gaps = [max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) for a, b in pairs]
        if min(gaps, default=1) >= 0.05 and all(relation(boxes[i], boxes[j]) == {w} for i, w, j in asked):
            return boxes


def draw_shapes(record, size, rng):
    """A picture of a GenEval-format record: its objects and nothing else, on a plain light background.

    size: pixels of the square, or (width, height).  rng: numpy Generator; the same rng state gives the same
    scene at every size.  Where the record names no colour it is random.  Returns an RGB PIL.Image.
    """
    width, height = (size, size) if isinstance(size, int) else size
    short, fine = min(width, height), 4  # drawn four times finer, then box-filtered: clean edges
    boxes = iter(fine * short * np.array(place(record, width / short, height / short, rng)))
    image = Image.new("RGB", (fine * width, fine * height), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    for wanted, spare in zip(record["include"], rng.permutation(list(COLOURS))):
        colour = COLOURS[wanted.get("color", str(spare))]
        for x0, y0, x1, y1 in itertools.islice(boxes, wanted["count"]):
            draw_object(canvas, wanted["class"], colour, (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2)
    return image.reduce(fine)


# -- the detector --------------------------------------------------------------------------------------------
def connected_components(mask):
    """Boolean (h, w) -> integer labels (h, w), 0 outside; 4-neighbourhood, by spreading the largest index."""
    labels, before = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0), None
    while not np.array_equal(labels, before):
        before, p = labels, np.pad(labels, 1)
        around = [labels, p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]]
        labels = np.where(mask, np.maximum.reduce(around), 0)
    return labels


def silhouette(shape):
    """What a shape looks like in its bounding box: (32, 32) in [0, 1]."""
    image = Image.new("L", (128, 128))
    draw_object(ImageDraw.Draw(image), shape, 255, 64, 64, 64)
    return np.asarray(image.reduce(4)) / 255


SILHOUETTES = {shape: silhouette(shape) for shape in SHAPES}


def detect_object(blob, to_palette):
    """A blob (h, w), boolean, as (class, colour, box), or None if it is no clean object of one colour.
    to_palette: (h, w, colours), how far each pixel is from each colour."""
    ys, xs = np.nonzero(blob)
    x0, x1, y0, y1 = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    crop = Image.fromarray(np.uint8(blob[y0:y1, x0:x1]) * 255).resize((32, 32), Image.BILINEAR)
    crop = np.asarray(crop) / 255
    overlap = {s: np.minimum(crop, m).sum() / np.maximum(crop, m).sum() for s, m in SILHOUETTES.items()}
    second, shape = sorted(overlap, key=overlap.get)[-2:]
    distance = to_palette[blob]
    votes = np.bincount(distance.argmin(1)[distance.min(1) < 60], minlength=len(COLOURS))
    clear = overlap[shape] >= max(0.72, overlap[second] + 0.08)
    even = votes.max() >= 0.75 * blob.sum()
    if not clear or not even or not 0.75 < (x1 - x0) / (y1 - y0) < 1.33 or blob.sum() < 100:
        return None  # a smear, a merger, a patchwork or a speck
    return shape, list(COLOURS)[votes.argmax()], (x0, y0, x1, y1)


def detect_shapes(image):
    """All objects of a picture as (class, colour, box), or None if any of it is not a clean object of one
    colour on an even background. Works on the picture scaled to a short side of 128."""
    scale = 128 / min(image.size)
    pixels = image.convert("RGB").resize([round(side * scale) for side in image.size], Image.BOX)
    palette = np.array([BACKGROUND, *COLOURS.values()], dtype=float)
    distance = np.linalg.norm(np.asarray(pixels, dtype=float)[:, :, None] - palette, axis=-1)
    mask = distance[:, :, 0] > 60
    if mask.all() or (distance[:, :, 0][~mask] > 30).mean() > 0.02:
        return None  # uneven background, or none
    labels = connected_components(mask)
    blobs = [labels == label for label in np.unique(labels[mask])]  # up to 3 pixels: an edge's ringing
    objects = [detect_object(blob, distance[:, :, 1:]) for blob in blobs if blob.sum() > 3]
    return None if None in objects else objects


def score_shapes(image, record):
    """Does the picture show the record: its objects, colours, counts, positions, clean, and nothing else?"""
    objects, include = detect_shapes(image) or [], record["include"]
    found = [[b for s, c, b in objects if (s, c) == (o["class"], o.get("color", c))] for o in include]
    if [len(b) for b in found] != [o["count"] for o in include] or len(objects) != sum(map(len, found)):
        return False
    asked = [(boxes, *o["position"]) for boxes, o in zip(found, include) if "position" in o]
    return all(any(where in relation(a, b) for a in boxes for b in found[k]) for boxes, where, k in asked)


# -- the world as a data set ---------------------------------------------------------------------------------
def write_shard(numbers, pixels, seed, ratios, path):
    """A tar file of pictures `numbers`, each as .png, .txt (its caption) and .json (its record)."""
    sides = [tuple(map(int, aspect_ratios(pixels)[ratio]))[::-1] for ratio in ratios]
    with tarfile.open(path, "w") as tar:
        for k in numbers:
            rng = np.random.default_rng([seed, pixels, k])
            record, png = training_record(rng), io.BytesIO()
            draw_shapes(record, sides[k % len(sides)], rng).save(png, "PNG")
            text, about = record["prompt"].encode(), json.dumps(record).encode()
            for suffix, content in dict(png=png.getvalue(), txt=text, json=about).items():
                info = tarfile.TarInfo(f"{k:08}.{suffix}")  # of 1970: the same bytes at any time
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_shards(folder, pixels, count, seed, ratios=("1.0",)):
    """The world as a WebDataset, `count` training pictures, 1,000 a shard, drawn by all cores if not there
    -> the glob of its shards. Picture k is a function of (seed, pixels, k), its sides those of the buckets
    named `ratios` in turn.  Raises ValueError if `folder` was made with other arguments."""
    claim(folder, dict(pixels=pixels, count=count, seed=seed, ratios=ratios))
    jobs = []
    for first in range(0, count, 1000):
        write = functools.partial(write_shard, range(count)[first : first + 1000], pixels, seed, ratios)
        jobs.append((os.path.join(folder, f"{first // 1000:05}.tar"), write))
    with rank_zero_first():
        if missing := [job for job in jobs if not os.path.exists(job[0])]:
            list(in_processes(write_atomically, missing, f"drawing {count} pictures of {pixels} px"))
    return os.path.join(glob.escape(folder), "*.tar")
