"""The shapes world: pictures, captions in GenEval's grammar, and a detector that scores them.

`write_shards` makes of it an ordinary captioned data set, which `data.images` reads as it reads anybody's.
"""

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

from data.index import in_processes
from sample import read_json, write_atomically, write_json

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
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COMBINING = ("two_object", "position", "color_attr")  # the kinds of which some captions are held out
# how often a training caption is of each kind: what takes longest to learn is shown most
TAG_SHARE = dict(zip(TAGS, (0.06, 0.14, 0.20, 0.08, 0.26, 0.26)))


# -- captions ------------------------------------------------------------------------------------------------


def plural(noun):
    return noun + ("es" if noun.endswith("s") else "s")


def with_article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def make_record(tag, rng):
    """A random record of one of GenEval's six kinds, in GenEval's metadata format (create_prompts.py).

    rng: numpy Generator.  Returns {"tag", "include": [{"class", "count", "color", "position"}], "exclude",
    "prompt"}.  Raises ValueError for another kind.
    """
    one, two = map(str, rng.choice(SHAPES, 2, replace=False))
    colour1, colour2 = map(str, rng.choice(list(COLOURS), 2, replace=False))
    count, position = int(rng.integers(2, 5)), str(rng.choice(POSITIONS))
    first, second = {"class": one, "count": 1}, {"class": two, "count": 1}
    include, exclude = [first], []
    if tag == "single_object":
        text = with_article(one)
    elif tag == "two_object":
        include, text = [first, second], f"{with_article(one)} and {with_article(two)}"
    elif tag == "counting":
        first["count"], exclude = count, [{"class": one, "count": count + 1}]
        text = f"{NUMBERS[count]} {plural(one)}"
    elif tag == "colors":
        first["color"], text = colour1, with_article(f"{colour1} {one}")
    elif tag == "position":
        include = [first, second | {"position": [position, 0]}]
        text = f"{with_article(two)} {position} {with_article(one)}"
    elif tag == "color_attr":
        include = [first | {"color": colour1}, second | {"color": colour2}]
        text = f"{with_article(f'{colour1} {one}')} and {with_article(f'{colour2} {two}')}"
    else:
        raise ValueError(f"unknown tag {tag!r}: GenEval has {', '.join(TAGS)}")
    return {"tag": tag, "include": include, "exclude": exclude, "prompt": f"a photo of {text}"}


def held_out(record):
    """Is this caption kept from training? One in six of those that combine two objects; words never are."""
    return record["tag"] in COMBINING and zlib.crc32(b"0" + record["prompt"].encode()) % 6 == 0


def training_record(rng):
    while True:
        record = make_record(str(rng.choice(TAGS, p=[TAG_SHARE[tag] for tag in TAGS])), rng)
        if not held_out(record):
            return record


def heldout_records(count, seed):
    """`count` records, the six kinds in turn: of the combining ones only captions that training never saw."""
    rng, records = np.random.default_rng([seed, 1]), []
    for tag in itertools.islice(itertools.cycle(TAGS), count):
        record = make_record(tag, rng)
        while tag in COMBINING and not held_out(record):
            record = make_record(tag, rng)
        records.append(record)
    return records


# -- pictures ------------------------------------------------------------------------------------------------


def draw_object(draw, shape, colour, x, y, r):
    """Paint one shape into the square of half side r around (x, y)."""
    if shape == "circle":
        return draw.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=colour)
    if shape == "square":
        points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif shape == "cross":
        a = 0.34
        points = zip((-a, a, a, 1, 1, a, a, -a, -a, -1, -1, -a), (-1, -1, -a, -a, a, a, 1, 1, a, a, -a, -a))
    else:  # a five-pointed star, stretched to fill its box
        tips = [(math.sin(k * math.pi / 5), -math.cos(k * math.pi / 5), (1, 0.45)[k % 2]) for k in range(10)]
        points = [(u * length / 0.9511, (v * length + 1) / 0.9045 - 1) for u, v, length in tips]
    draw.polygon([(x + r * u, y + r * v) for u, v in points], fill=colour)


def relation(a, b):
    """GenEval's rule: where box a lies relative to box b (x0, y0, x1, y1); a subset of POSITIONS."""
    offset = np.array([a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]]) / 2
    sizes = np.array([a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]])
    revised = np.maximum(np.abs(offset) - 0.1 * sizes, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    return {name for name, holds in zip(POSITIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)) if holds}


def gap(a, b):
    """How far two boxes are apart, along the axis that parts them more; negative where they overlap."""
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


def place(record, width, height, rng):
    """Boxes for a record's objects, apart from each other and clear in position; the short side is 1."""
    number = sum(o["count"] for o in record["include"])
    smallest, largest = {1: (0.15, 0.25), 2: (0.13, 0.20), 3: (0.12, 0.16)}.get(number, (0.11, 0.15))
    while True:
        boxes = []
        for _ in range(number):
            r = rng.uniform(smallest, largest)
            x, y = rng.uniform(r + 0.03, width - r - 0.03), rng.uniform(r + 0.03, height - r - 0.03)
            boxes.append((x - r, y - r, x + r, y + r))
        apart = all(gap(a, b) >= 0.05 for a, b in itertools.combinations(boxes, 2))
        asked = [(i, *o["position"]) for i, o in enumerate(record["include"]) if "position" in o]
        if apart and all(relation(boxes[i], boxes[j]) == {where} for i, where, j in asked):
            return boxes


def draw_shapes(record, size, rng):
    """A picture of a GenEval-format record: its objects and nothing else, on a plain light background.

    size: pixels of the square, or (width, height).  rng: numpy Generator; the same rng state gives the same
    scene at every size.  Where the record names no colour it is random.  Returns an RGB PIL.Image.
    """
    width, height = (size, size) if isinstance(size, int) else size
    short, fine = min(width, height), 4  # drawn four times finer, then box-filtered: clean edges
    boxes = place(record, width / short, height / short, rng)
    spare = map(str, rng.permutation(list(COLOURS)))
    objects = []
    for wanted, colour in zip(record["include"], spare):
        objects += [(wanted["class"], COLOURS[wanted.get("color", colour)])] * wanted["count"]
    image = Image.new("RGB", (fine * width, fine * height), BACKGROUND)
    for (shape, colour), box in zip(objects, boxes):
        x0, y0, x1, y1 = (c * short * fine for c in box)
        draw_object(ImageDraw.Draw(image), shape, colour, (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2)
    return image.reduce(fine)


# -- the detector --------------------------------------------------------------------------------------------


def connected_components(mask):
    """Boolean (h, w) -> integer labels (h, w), 0 outside; 4-neighbourhood, by spreading the largest index."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        p = np.pad(labels, 1)
        around = [labels, p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]]
        spread = np.where(mask, np.maximum.reduce(around), 0)
        if (spread == labels).all():
            return labels
        labels = spread


def silhouette(shape, side=32):
    """What a shape looks like in its bounding box: (side, side) in [0, 1]."""
    image = Image.new("L", (4 * side, 4 * side))
    draw_object(ImageDraw.Draw(image), shape, 255, 2 * side, 2 * side, 2 * side)
    return np.asarray(image.reduce(4)) / 255


SILHOUETTES = {shape: silhouette(shape) for shape in SHAPES}


def detect_object(own, to_palette):
    """One blob of a picture, as (class, colour, box), or None if it is no clean object of one colour.

    own: (h, w) boolean, its pixels.  to_palette: (h, w, colours), how far each pixel is from each colour.
    """
    ys, xs = np.nonzero(own)
    x0, x1, y0, y1 = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    crop = Image.fromarray(np.uint8(own[y0:y1, x0:x1]) * 255).resize((32, 32), Image.BILINEAR)
    crop = np.asarray(crop) / 255
    overlap = {s: np.minimum(crop, m).sum() / np.maximum(crop, m).sum() for s, m in SILHOUETTES.items()}
    second, shape = sorted(overlap, key=overlap.get)[-2:]
    distance = to_palette[own]
    votes = np.bincount(distance.argmin(1)[distance.min(1) < 60], minlength=len(COLOURS))
    clear = overlap[shape] >= max(0.72, overlap[second] + 0.08)
    even = votes.max() >= 0.75 * own.sum()
    if not clear or not even or not 0.75 < (x1 - x0) / (y1 - y0) < 1.33 or own.sum() < 100:
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
    blobs = [labels == label for label in np.unique(labels[mask])]
    blobs = [own for own in blobs if own.sum() > 3]  # less is ringing beside an edge
    objects = [detect_object(own, distance[:, :, 1:]) for own in blobs]
    return None if None in objects else objects


def score_shapes(image, record):
    """Does the picture show the record: its objects, colours, counts, positions, clean, and nothing else?"""
    objects = detect_shapes(image)
    if objects is None or len(objects) != sum(o["count"] for o in record["include"]):
        return False
    found = []
    for wanted in record["include"]:
        alike = [o for o in objects if o[0] == wanted["class"] and o[1] == wanted.get("color", o[1])]
        found.append([box for _, _, box in alike])
    for boxes, wanted in zip(found, record["include"]):
        if len(boxes) != wanted["count"]:
            return False
        if "position" in wanted:
            where, other = wanted["position"]
            if not any(where in relation(a, b) for a in boxes for b in found[other]):
                return False
    return True


# -- the world as a data set ---------------------------------------------------------------------------------


def write_shard(path, numbers, pixels, seed):
    """One tar file of pictures `numbers`, each as .png, .txt (its caption) and .json (its record)."""
    if os.path.exists(path):
        return

    def write(path):
        with tarfile.open(path, "w") as tar:
            for k in numbers:
                rng = np.random.default_rng([seed, pixels, k])
                record, png = training_record(rng), io.BytesIO()
                draw_shapes(record, pixels, rng).save(png, "PNG")
                texts = dict(txt=record["prompt"].encode(), json=json.dumps(record).encode())
                for suffix, content in (dict(png=png.getvalue()) | texts).items():
                    info = tarfile.TarInfo(f"{k:08}.{suffix}")  # of 1970: the same bytes at any time
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

    write_atomically(path, write)


def write_shards(folder, pixels, count, seed):
    """The world as a WebDataset: `count` square training pictures, 1,000 a shard, drawn by all cores.

    Picture k is a function of (seed, pixels, k). The shards are drawn beside `folder`, which is renamed when
    all are there; a run that was cut off goes on with those it has. Of several processes let one come first.
    Returns the glob of the shards.  Raises ValueError if `folder` was made with other arguments.
    """
    made_with, note = dict(pixels=pixels, count=count, seed=seed), os.path.join(folder, "made_with.json")
    if not os.path.isdir(folder):
        unfinished, jobs = f"{folder.rstrip('/')}-{pixels}-{count}-{seed}.tmp", []
        for first in range(0, count, 1000):
            path = os.path.join(unfinished, f"{first // 1000:05}.tar")
            jobs.append((path, range(first, min(first + 1000, count)), pixels, seed))
        list(in_processes(write_shard, jobs, f"drawing {count} pictures of {pixels} px, 1,000 at a time"))
        write_json(os.path.join(unfinished, "made_with.json"), made_with)
        os.replace(unfinished, folder)
    if read_json(note) != made_with:
        raise ValueError(f"{folder} was made with {read_json(note)}, not {made_with}; name another folder")
    return os.path.join(glob.escape(folder), "*.tar")
