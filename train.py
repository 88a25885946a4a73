"""Train T2MD: one script, stages by flag. With no data and no GPU it runs on the embedded world, "shapes".

    python train.py --stage kd           # from the shipped teacher: forcing first if there is none yet, then kd
    python train.py --stage all          # the whole chain from no weights at all
    python train.py --stage eval         # the six GenEval-type scores of teacher and students, beside each other
    python train.py --stage ablate       # the paper's Table 1 in miniature
    python train.py --stage figures      # receptive fields; errors by depth with and without teacher forcing
    python train.py --stage data --data DIR_OR_TARS     # what a data set of images holds, bucket by bucket

    stage     starts from   trains                    loss           size (x base)
    teacher   nothing       VAE, T5, then the DiT     their own      1
    forcing   teacher       Mamba layers              equation 6     1
    kd        forcing       all token mixers          equation 11    1
    adapt     kd            everything                equation 8     1      (new embedding, schedule, VAE, T5)
    hires1    adapt         everything                equation 8     2 (80%), 1 (20%)
    hires2    hires1        everything                equation 8     4

Each stage writes OUT/STAGE: config.json and safetensors (EMA weights, what sample.py and diffusers load),
training_state.pt (what a restart needs), log.jsonl (a line a step) and pictures: teacher above student, at each size.

Sections: 1 the shapes world - 2 configurations - 3 data - 4 VAE and T5 of the shapes world - 5 training -
6 evaluation - 7 command line.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import datetime
import fcntl
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import tarfile
import textwrap
import time
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import (
    ASPECT_RATIO_256_BIN, ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN, ASPECT_RATIO_2048_BIN)
from diffusers.training_utils import EMAModel
from PIL import ExifTags, Image, ImageDraw, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from sample import RANK, WORLD, component_path, encode_first, generate, keep_freed_memory, load_denoiser, load_parts, noise_for, pad_features, read_prompts, seconds, size_conditions, slug
from t2md import T2MD, VAE, Attention, LocalEnhancement, MambaMixer, PaddingTokens, TextEncoder, forcing_loss, kd_loss, mse_loss, predict_noise

HERE = os.path.dirname(os.path.abspath(__file__))
CHAIN = ("teacher", "forcing", "kd", "adapt", "hires1", "hires2")

# ----------------------------------------------------------------------------------------------------------
# 1. The shapes world: pictures, captions in GenEval's grammar, and a detector that scores them
# ----------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "star", "cross")
COLOURS = {"red": (220, 50, 47), "green": (40, 160, 70), "blue": (38, 90, 210), "yellow": (245, 200, 40),
           "purple": (150, 60, 190), "black": (40, 40, 40)}
BACKGROUND = (244, 242, 236)
POSITIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# how often a training caption is of each kind: what takes longest to learn is shown most
TAG_SHARE = dict(single_object=0.06, two_object=0.14, counting=0.20, colors=0.08, position=0.26, color_attr=0.26)


def plural(noun):
    return noun + ("es" if noun.endswith("s") else "s")


def make_record(tag, rng):
    """A random record of one of GenEval's six kinds, in GenEval's metadata format (create_prompts.py).

    rng: numpy Generator.  Returns {"tag", "include": [{"class", "count", "color", "position"}], "exclude", "prompt"}.
    """
    one, two = map(str, rng.choice(SHAPES, 2, replace=False))
    colour1, colour2 = map(str, rng.choice(list(COLOURS), 2, replace=False))
    count, position = int(rng.integers(2, 5)), str(rng.choice(POSITIONS))
    article = lambda phrase: ("an " if phrase[0] in "aeiou" else "a ") + phrase
    first, second = {"class": one, "count": 1}, {"class": two, "count": 1}
    include, exclude = [first], []
    if tag == "single_object":
        text = article(one)
    elif tag == "two_object":
        include, text = [first, second], f"{article(one)} and {article(two)}"
    elif tag == "counting":
        first["count"], exclude = count, [{"class": one, "count": count + 1}]
        text = f"{NUMBERS[count]} {plural(one)}"
    elif tag == "colors":
        first["color"], text = colour1, article(f"{colour1} {one}")
    elif tag == "position":
        include, text = [first, second | {"position": [position, 0]}], f"{article(two)} {position} {article(one)}"
    elif tag == "color_attr":
        include = [first | {"color": colour1}, second | {"color": colour2}]
        text = f"{article(f'{colour1} {one}')} and {article(f'{colour2} {two}')}"
    else:
        raise ValueError(f"unknown tag {tag!r}: GenEval has {', '.join(TAGS)}")
    return {"tag": tag, "include": include, "exclude": exclude, "prompt": f"a photo of {text}"}


def held_out(record):
    """Is this caption kept from training? One in six of those that combine two objects; words are never held out."""
    return record["tag"] in ("two_object", "position", "color_attr") and zlib.crc32(b"0" + record["prompt"].encode()) % 6 == 0


def training_record(rng):
    while held_out(record := make_record(str(rng.choice(TAGS, p=[TAG_SHARE[t] for t in TAGS])), rng)):
        pass
    return record


def heldout_records(count, seed):
    """`count` records, the six kinds in turn: of the combining kinds only captions that training never saw."""
    rng = np.random.default_rng([seed, 1])
    records = []
    for tag in itertools.islice(itertools.cycle(TAGS), count):
        while tag in ("two_object", "position", "color_attr") and not held_out(record := make_record(tag, rng)):
            pass
        records.append(record if tag in ("two_object", "position", "color_attr") else make_record(tag, rng))
    return records


def draw_object(draw, shape, colour, x, y, r):
    """Paint one shape into the square of half side r around (x, y)."""
    if shape == "circle":
        return draw.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=colour)
    if shape == "square":
        points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif shape == "cross":
        a = 0.34
        points = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
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


def place(record, width, height, rng):
    """Boxes for a record's objects, apart from each other and clear in their position; the short side is 1."""
    number = sum(o["count"] for o in record["include"])
    smallest, largest = {1: (0.15, 0.25), 2: (0.13, 0.20), 3: (0.12, 0.16)}.get(number, (0.11, 0.15))
    gap = lambda a, b: max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])
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
    objects = [(o["class"], COLOURS[o.get("color", colour)]) for o, colour in zip(record["include"], spare) for _ in range(o["count"])]
    image = Image.new("RGB", (fine * width, fine * height), BACKGROUND)
    for (shape, colour), box in zip(objects, boxes):
        x0, y0, x1, y1 = (c * short * fine for c in box)
        draw_object(ImageDraw.Draw(image), shape, colour, (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2)
    return image.reduce(fine)


def connected_components(mask):
    """Boolean (h, w) -> integer labels (h, w), 0 outside; 4-neighbourhood, by spreading the largest index."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        p = np.pad(labels, 1)
        spread = np.where(mask, np.maximum.reduce([labels, p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]]), 0)
        if (spread == labels).all():
            return labels
        labels = spread


def silhouette(shape, side=32):
    """What a shape looks like in its bounding box: (side, side) in [0, 1]."""
    image = Image.new("L", (4 * side, 4 * side))
    draw_object(ImageDraw.Draw(image), shape, 255, 2 * side, 2 * side, 2 * side)
    return np.asarray(image.reduce(4)) / 255


SILHOUETTES = {shape: silhouette(shape) for shape in SHAPES}


def detect_shapes(image):
    """All objects of a picture as (class, colour, box), or None if any of it is not a clean object of one colour
    on an even background. Works on the picture scaled to a short side of 128."""
    scale = 128 / min(image.size)
    pixels = np.asarray(image.convert("RGB").resize([round(s * scale) for s in image.size], Image.BOX), dtype=float)
    distance = np.linalg.norm(pixels[:, :, None] - np.array([BACKGROUND, *COLOURS.values()], dtype=float), axis=-1)
    mask = distance[:, :, 0] > 60
    if mask.all() or (distance[:, :, 0][~mask] > 30).mean() > 0.02:
        return None  # uneven background, or none
    labels, objects = connected_components(mask), []
    for label in np.unique(labels[mask]):
        own = labels == label
        if own.sum() <= 3:
            continue  # a few pixels of ringing beside an edge
        ys, xs = np.nonzero(own)
        x0, x1, y0, y1 = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
        crop = Image.fromarray(np.uint8(own[y0:y1, x0:x1]) * 255).resize((32, 32), Image.BILINEAR)
        crop = np.asarray(crop) / 255
        overlap = {s: np.minimum(crop, m).sum() / np.maximum(crop, m).sum() for s, m in SILHOUETTES.items()}
        second, shape = sorted(overlap, key=overlap.get)[-2:]
        to_palette = distance[own][:, 1:]
        votes = np.bincount(to_palette.argmin(1)[to_palette.min(1) < 60], minlength=len(COLOURS))
        aspect = (x1 - x0) / (y1 - y0)
        even = votes.max() >= 0.75 * own.sum()
        if overlap[shape] < max(0.72, overlap[second] + 0.08) or not even or not 0.75 < aspect < 1.33 or own.sum() < 100:
            return None  # a smear, a merger, a patchwork or a speck
        objects.append((shape, list(COLOURS)[votes.argmax()], (x0, y0, x1, y1)))
    return objects


def score_shapes(image, record):
    """Does the picture show the record: its objects, colours, counts and positions, clean, and nothing else?"""
    objects = detect_shapes(image)
    if objects is None or len(objects) != sum(o["count"] for o in record["include"]):
        return False
    is_one = lambda shape, colour, o: shape == o["class"] and colour == o.get("color", colour)
    found = [[box for shape, colour, box in objects if is_one(shape, colour, o)] for o in record["include"]]
    for boxes, wanted in zip(found, record["include"]):
        if len(boxes) != wanted["count"]:
            return False
        if "position" in wanted:
            where, other = wanted["position"]
            if not any(where in relation(a, b) for a in boxes for b in found[other]):
                return False
    return True


# ----------------------------------------------------------------------------------------------------------
# 2. Configurations: every default of every stage
# ----------------------------------------------------------------------------------------------------------

# steps; batch_size (images of base size; larger images come in batches smaller by their area); lr, and new_lr for the
# layers that meet something new, where it differs (Mamba layers in kd, in adapt what reads and writes latents and text);
# clip (gradient norm); sizes {multiple of the base size: share of the batches};
# decay (share of the steps over which the rate falls to zero); timesteps (see ShapesData.batch); pictures (of the
# shapes world: how many are drawn and encoded, per size); snr_weight (see stage_terms); save_every
PIXART = dict(batch_size=256, lr=2e-5, clip=0.01, weight_decay=0.03, eps=1e-10, betas=(0.9, 0.999), warmup=1000, decay=0.0,
              muon=False, snr_weight=False, sizes={1: 1.0}, pictures=20_000, save_every=1000)
TOY = dict(clip=1.0, weight_decay=0.0, eps=1e-8, betas=(0.9, 0.99), warmup=50, decay=0.4, muon=True, snr_weight=False,
           sizes={1: 1.0}, pictures=20_000, save_every=500)
CONFIGS = {
    "shapes": dict(
        out="runs/shapes", teacher="assets/teacher", adapt={}, base_pixels=128, pattern="SHWHWHW", ema=0.9999,
        checkpointing=False, float32_attention=False,
        save_dtype=torch.float16,  # all weights shipped in assets/ stay under 20 MB; training goes on in float32
        model=dict(width=128, heads=4, caption_width=64, d_state=32, head_dim=32, chunk_size=32, sample_size=16),
        stages=dict(
            vae=TOY | dict(steps=2500, batch_size=16, lr=2e-3, decay=0.5, muon=False),
            text_encoder=TOY | dict(steps=1500, batch_size=128, lr=2e-3, muon=False),
            teacher=TOY | dict(steps=7500, batch_size=64, lr=4e-3, decay=0.6, timesteps=(580, 230), snr_weight=True),
            forcing=TOY | dict(steps=1200, batch_size=16, lr=2e-2, warmup=10, pictures=5_000),
            kd=TOY | dict(steps=1100, batch_size=32, lr=4e-3, pictures=5_000),
            adapt=TOY | dict(steps=6000, batch_size=32, lr=1e-3, new_lr=4e-3, warmup=400, timesteps=(640, 240), pictures=8_000,
                             snr_weight=True),
            hires1=TOY | dict(steps=3500, batch_size=32, lr=1e-3, timesteps=(700, 230), sizes={2: 0.8, 1: 0.2}, pictures=2_500),
            hires2=TOY | dict(steps=8000, batch_size=64, lr=1e-3, timesteps=(800, 200), snr_weight=True, sizes={4: 1.0}, pictures=2_000),
        ),
    ),
    "t2md": dict(  # the paper's; its optimiser is not given, so PixArt-alpha's own is used
        out="runs/t2md", teacher="PixArt-alpha/PixArt-XL-2-512x512", base_pixels=512, pattern="SHWHWHW" * 4, ema=0.9999,
        adapt=dict(vae="stabilityai/sdxl-vae", text_encoder="google/flan-t5-xxl"), checkpointing=True,
        float32_attention=True, save_dtype=torch.float32,
        stages=dict(
            forcing=PIXART | dict(steps=20_000, lr=1e-4, clip=1.0),
            kd=PIXART | dict(steps=180_000, new_lr=1e-4, clip=0.1),
            adapt=PIXART | dict(steps=100_000),
            hires1=PIXART | dict(steps=40_000, sizes={2: 0.8, 1: 0.2}),
            hires2=PIXART | dict(steps=20_000, sizes={4: 1.0}),
        ),
    ),
}


# ----------------------------------------------------------------------------------------------------------
# 3. Data: every random draw is a function of (seed, stage, step, index in the global batch)
# ----------------------------------------------------------------------------------------------------------


def draw(seed, stage, step, index):
    """The torch.Generator of one sample. No draw depends on restarts or on how many processes share the batch."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def numpy_draw(seed, stage, step, index):
    """The same for numpy."""
    return np.random.default_rng([seed, zlib.crc32(stage.encode()), step, index])


def to_pixels(images):
    """List of equally large PIL images -> (B, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


class Data:
    """What both kinds of data share. They have `prompts`; fetch(turn, indices, images, generators) -> the numbers of
    the samples and their latent moments (B, 2, C, h, w); text_of(captions) -> features and mask."""

    def batch(self, turn, indices, images, generators, timesteps=None, drop=0.1):
        """Samples `indices` of global batch number `turn`, of `images` samples, a torch.Generator for each
        -> dict of latents z0 and noise (B, C, h, w), t (B,), text (B, T, width), mask (B, T).

        timesteps: uniform, or (mean, deviation) of a normal distribution cut to [0, 1000).
        A caption is dropped (replaced by the empty one) with probability `drop`, for classifier-free guidance.
        """
        numbers, moments = self.fetch(turn, indices, images, generators)
        captions = ["" if torch.rand((), generator=g) < drop else self.prompts[k] for k, g in zip(numbers, generators)]
        (mean, std), t = moments.float().unbind(1), []
        for g in generators:
            if timesteps is None:
                t.append(torch.randint(1000, (), generator=g))
            else:
                t.append((timesteps[0] + timesteps[1] * torch.randn((), generator=g)).clamp(0, 999).long())
        normal = lambda: torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
        text, mask = self.text_of(captions)
        return dict(z0=mean + std * normal(), noise=normal(), t=torch.stack(t), text=text, mask=mask)


class ShapesData(Data):
    """Captioned pictures of the shapes world, encoded once: latent moments and caption features in memory.

    Picture k is drawn from (seed, k). The moments are kept in `folder` under a name made of everything they
    depend on, so that a restart finds them.
    """

    def __init__(self, pixels, count, vae, text_encoder, seed, folder):
        draws = [np.random.default_rng([seed, pixels, k]) for k in range(count)]
        records = [training_record(rng) for rng in draws]
        self.prompts = [record["prompt"] for record in records]
        path = os.path.join(folder, f"{pixels}px-{count}-seed{seed}-{fingerprint(vae.model)}.safetensors")
        with rank_zero_first():
            if not os.path.exists(path):
                moments = []
                size = max(1, 32 * 128**2 // pixels**2)
                for start in tqdm(range(0, count, size), desc=f"drawing and encoding {count} pictures of {pixels} px"):
                    chunk = slice(start, start + size)
                    images = [draw_shapes(record, pixels, rng) for record, rng in zip(records[chunk], draws[chunk])]
                    moments.append(torch.stack(vae.moments(to_pixels(images)), dim=1).half())
                write_atomically(path, lambda path: save_file({"moments": torch.cat(moments)}, path))
        self.moments = load_file(path)["moments"]  # (count, 2, C, h, w): mean and standard deviation
        captions = sorted({"", *self.prompts})
        features, mask = text_encoder(captions)
        self.features, self.mask = features.float().cpu(), mask.cpu()
        self.row = {caption: i for i, caption in enumerate(captions)}

    def fetch(self, turn, indices, images, generators):
        numbers = [int(torch.randint(len(self.prompts), (), generator=g)) for g in generators]
        return numbers, self.moments[numbers]

    def text_of(self, captions):
        rows = [self.row[caption] for caption in captions]
        length = int(self.mask[rows].sum(1).max())
        return self.features[rows][:, :length], self.mask[rows][:, :length]


def list_images(source):
    """The captioned images of a data set, none decoded: yields (file, offset, length, caption), or (file, reason) for
    a record that is none.

    source: a folder with metadata.jsonl (Hugging Face's imagefolder: file_name, text), or a glob of WebDataset tar
    shards: an image and a .txt, or a .json with "caption" or "text", of the same key. Shards stay packed: their image is
    the `length` bytes at `offset`.  Raises ValueError if there is neither, or both.
    """
    if os.path.isdir(source):
        metadata = os.path.join(source, "metadata.jsonl")
        if not os.path.exists(metadata):
            raise ValueError(f"--data {source} is a folder without metadata.jsonl, which names its images (file_name) and captions (text)")
        if glob.glob(os.path.join(glob.escape(source), "*.tar")):
            raise ValueError(f"--data {source} holds both metadata.jsonl and tar shards; name the shards ('{source}/*.tar') or move them away")
        inside = os.path.join(os.path.realpath(source), "")
        with open(metadata, "rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    path, caption = os.path.join(source, record["file_name"]), record["text"].strip()
                    if os.path.realpath(path).startswith(inside):
                        yield path, 0, os.path.getsize(path), caption
                    else:
                        yield path, "a file outside the folder"
                except OSError:
                    yield path, "no such file"
                except UnicodeDecodeError:
                    yield metadata, "text that is not UTF-8"
                except (ValueError, KeyError, TypeError, AttributeError):
                    yield metadata, "a line without file_name and text"
        return
    shards = sorted(glob.glob(source))
    if not shards:
        raise ValueError(f"--data {source} is neither shapes, nor a folder, nor a pattern that matches tar shards")
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as tar:
                for key, members in itertools.groupby((m for m in tar if m.isfile()), lambda m: m.name.rpartition("/")[0] + "/" + os.path.basename(m.name).split(".")[0]):
                    suffixes = [(os.path.splitext(m.name)[1].lower(), m) for m in members]
                    parts = dict(suffixes)
                    if len(parts) < len(suffixes):
                        yield f"{shard}:{key}", "a key that occurs twice"
                        continue
                    image = next((m for suffix, m in suffixes if suffix in Image.registered_extensions()), None)
                    try:
                        if ".txt" in parts:
                            caption = tar.extractfile(parts[".txt"]).read().decode()
                        else:
                            record = json.load(tar.extractfile(parts[".json"]))
                            caption = record.get("caption") or record["text"]
                        yield shard, image.offset_data, image.size, caption.strip()
                    except UnicodeDecodeError:
                        yield f"{shard}:{key}", "text that is not UTF-8"
                    except (ValueError, KeyError, AttributeError):
                        yield f"{shard}:{key}", "no image, or no caption beside it"
        except (tarfile.TarError, OSError) as error:
            yield shard, f"not a whole tar file ({error})"


def open_image(file, offset, length):
    """A PIL image, not yet decoded, from `length` bytes of a file."""
    with open(file, "rb") as f:
        f.seek(offset)
        return Image.open(io.BytesIO(f.read(length)))


def to_rgb(image):
    """Any PIL image as RGB: upright (EXIF), 16 bits scaled down, transparency over white, palette and CMYK converted."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray(np.uint8(np.asarray(image).clip(0, 65535) // 257))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def aspect_ratios(pixels):
    """The buckets of a base size: {height / width: (height, width)}, from the tables that diffusers ships."""
    tables = {256: ASPECT_RATIO_256_BIN, 512: ASPECT_RATIO_512_BIN, 1024: ASPECT_RATIO_1024_BIN, 2048: ASPECT_RATIO_2048_BIN}
    if pixels in tables:
        return tables[pixels]
    return {ratio: [max(16, round(side * pixels / 1024 / 16) * 16) for side in sides] for ratio, sides in ASPECT_RATIO_1024_BIN.items()}


class ImageData(Data):
    """Captioned images of a folder or of tar shards, in buckets of like aspect ratio.

    Every image is opened once to learn its size; that index is kept in `folder` under a name made of the files' names,
    sizes and dates. What cannot be opened or has no caption is skipped and counted.
    Attributes: items [(file, offset, length, caption, (height, width) of its bucket)], skipped {reason: count}.
    Raises ValueError, saying what was looked for, if nothing is usable.
    """

    def __init__(self, source, pixels, vae, text_encoder, seed, folder, cache=None):
        self.pixels, self.vae, self.text_encoder, self.seed, self.cache = pixels, vae, text_encoder, seed, cache
        listed, self.skipped, self.items = list(list_images(source)), collections.Counter(), []
        date = functools.lru_cache(maxsize=None)(lambda file: os.path.exists(file) and os.path.getmtime(file))  # a shard has many images
        stamp = json.dumps([[*entry, date(entry[0])] for entry in listed])
        path = os.path.join(folder, f"index-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.json")
        with rank_zero_first():
            if not os.path.exists(path):
                sizes = [self.look(*entry) for entry in tqdm(listed, desc=f"looking at the images of {source}", disable=RANK > 0)]
                write_atomically(path, lambda path: open(path, "w").write(json.dumps(sizes)))
        ratios = aspect_ratios(pixels)
        self.buckets = {}
        for entry, size in zip(listed, json.load(open(path))):
            if isinstance(size, str):
                self.skipped[size] += 1
                continue
            bucket = PixArtImageProcessor.classify_height_width_bin(*size, ratios)
            if max(wanted / there for wanted, there in zip(bucket, size)) > 4:
                self.skipped[f"too small to be enlarged to about {pixels} pixels"] += 1
                continue
            self.buckets.setdefault(bucket, []).append(len(self.items))
            self.items.append((*entry, bucket))
        if not self.items:
            why = ", ".join(f"{count} x {reason}" for reason, count in self.skipped.items()) or "it is empty"
            raise ValueError(f"--data {source} has no usable image; looked for images with captions, skipped: {why}")
        self.prompts = [item[3] for item in self.items]
        self.order = functools.lru_cache(maxsize=2)(self.order)
        self.decoders, self.decoding = concurrent.futures.ThreadPoolExecutor(), {}
        if cache:
            self.fill_cache()
            self.vae = self.text_encoder = None  # nothing asks them any more: they may leave the device

    @staticmethod
    def look(file, *entry):
        """(height, width) of an image, or the reason why it is skipped."""
        if len(entry) == 1:
            return entry[0]
        if not entry[2]:
            return "an empty caption"
        try:
            image = open_image(file, *entry[:2])
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        except Exception as error:  # decoders raise anything
            return f"not readable as an image ({type(error).__name__})"
        return image.size if turned else image.size[::-1]

    def order(self, epoch, images):
        """The batches of an epoch, [image numbers], each of one bucket: every bucket shuffled, cut into batches (the
        last one filled from its beginning), all batches shuffled."""
        rng, batches = np.random.default_rng([self.seed, epoch]), []
        for members in self.buckets.values():
            count = -(-len(members) // images)
            batches += list(np.resize(rng.permutation(members), count * images).reshape(count, images))
        return [batches[k] for k in rng.permutation(len(batches))]

    def choose(self, turn, indices, images):
        per_epoch = sum(-(-len(members) // images) for members in self.buckets.values())
        batch = self.order(turn // per_epoch, images)[turn % per_epoch]
        return [int(batch[i]) for i in indices]

    def from_here(self, k):
        """Image k, and only when that will not do, the others of its bucket after it (searching a bucket takes long)."""
        yield k
        members = self.buckets[self.items[k][4]]
        first = members.index(k)
        yield from members[first + 1 :] + members[:first]

    def picture(self, k, generator=None):
        """Image k, scaled to cover its bucket's size and cropped to it, at random or in the middle -> (its number, image).
        Where it turns out to be broken, the next one of its bucket takes its place."""
        height, width = self.items[k][4]
        for k in self.from_here(k):
            try:
                image = to_rgb(open_image(*self.items[k][:3]))
                break
            except Exception as error:
                self.skipped[f"not decodable ({type(error).__name__})"] += 1
        else:
            raise ValueError(f"not one image for {width} x {height} can be decoded")
        scale = max(width / image.width, height / image.height)
        image = image.resize((max(width, round(scale * image.width)), max(height, round(scale * image.height))), Image.LANCZOS)
        spare = image.width - width, image.height - height
        x, y = (int(torch.randint(s + 1, (), generator=generator)) if generator else s // 2 for s in spare)
        return k, image.crop((x, y, x + width, y + height))

    def encode(self, pictures):
        return torch.stack(self.vae.moments(to_pixels(pictures)), dim=1).cpu()

    def fetch(self, turn, indices, images, generators):
        numbers = self.choose(turn, indices, images)
        if self.cache:
            return numbers, torch.stack([load_file(self.cached(f"{self.pixels}px", self.items[k][:3]))["moments"] for k in numbers])
        following = self.choose(turn + 1, indices, images)  # decoded while the network works on this turn
        for key, k in zip(itertools.product((turn, turn + 1), indices), numbers + following):
            if key not in self.decoding:
                self.decoding[key] = self.decoders.submit(self.picture, k, draw(self.seed, "crop", *key))
        numbers, pictures = zip(*(self.decoding.pop((turn, i)).result() for i in indices))
        return numbers, self.encode(pictures)

    def text_of(self, captions):
        if self.cache:
            return pad_features([load_file(self.cached("text", caption))["features"].float() for caption in captions])
        features, mask = self.text_encoder(captions)
        return features.float().cpu(), mask.cpu()

    def cached(self, kind, what):
        name = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        return os.path.join(self.cache, kind, name[:2], name[2:20] + ".safetensors")

    def fill_cache(self):
        """Compute what the cache lacks, this process's share of it: text features trimmed to their tokens, and the
        moments of the middle crop. What is there stays, so a run that was cut off goes on. Images that turn out to be
        broken leave the data set."""
        # first this process's share, then what of it is missing: the others are writing already
        captions = [caption for caption in sorted({"", *self.prompts})[RANK::WORLD] if not os.path.exists(self.cached("text", caption))]
        for start in tqdm(range(0, len(captions), 16), desc="encoding captions, 16 at a time", disable=RANK > 0):
            chunk = captions[start : start + 16]
            for caption, features, mask in zip(chunk, *self.text_encoder(chunk)):
                self.store("text", caption, features=features[mask.bool()])
        there = lambda k: os.path.exists(self.cached(f"{self.pixels}px", self.items[k][:3]))
        for bucket, members in self.buckets.items():
            missing = [k for k in members[RANK::WORLD] if not there(k)]
            for start in tqdm(range(0, len(missing), 16), desc=f"encoding images of {bucket[1]} x {bucket[0]}, 16 at a time", disable=RANK > 0):
                chunk = missing[start : start + 16]
                for k, (number, picture) in zip(chunk, self.decoders.map(self.picture, chunk)):
                    if number == k:
                        self.store(f"{self.pixels}px", self.items[k][:3], moments=self.encode([picture])[0])
        if WORLD > 1:
            dist.barrier()
        self.buckets = {bucket: kept for bucket, members in self.buckets.items() if (kept := list(filter(there, members)))}

    def store(self, kind, what, **tensors):
        write_atomically(self.cached(kind, what), lambda path: save_file({k: v.half().cpu().contiguous() for k, v in tensors.items()}, path))


def fingerprint(module):
    """A short name of a network: of every parameter's shape and up to 64 of its values, and of a VAE's factors."""
    digest = hashlib.sha256(repr([getattr(module.config, f"{name}_factor", None) for name in ("scaling", "shift")]).encode())
    for p in module.parameters():
        values = p.detach().flatten()[:: max(1, p.numel() // 64)].cpu().float().numpy()
        digest.update(f"{tuple(p.shape)}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def differences(path, made_with):
    """What differs between made_with and the JSON file at `path`, which notes what its folder was made with and is written
    if there is none yet -> {name: (theirs, ours)}."""
    if not os.path.exists(path):
        write_atomically(path, lambda path: open(path, "w").write(json.dumps(made_with)))
    theirs = json.load(open(path))
    return {name: (theirs.get(name), ours) for name, ours in made_with.items() if theirs.get(name) != ours}


def claim_cache(folder, vae, text_encoder, pixels):
    """Make a folder the feature cache of these components and sizes, or find that it is.

    Raises ValueError, naming what differs, if it was made with another VAE, text encoder or size.
    """
    made_with = dict(vae=fingerprint(vae.model), text_encoder=fingerprint(text_encoder.model), pixels=sorted(pixels))
    with rank_zero_first():
        differ = differences(os.path.join(folder, "cache.json"), made_with)
    for what, (theirs, ours) in differ.items():
        raise ValueError(f"--cache {folder} was made with another {what.replace('_', ' ')} ({theirs}; this run has {ours}); "
                         "give this run a folder of its own")


# ----------------------------------------------------------------------------------------------------------
# 4. VAE and T5 of the shapes world: small ones of the real classes
# ----------------------------------------------------------------------------------------------------------


def new_vae():
    """AutoencoderKL, 8x down to 4 channels like SD1.5's and SDXL's, 0.9M parameters."""
    widths = (16, 32, 64, 64)
    return AutoencoderKL(3, 3, ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4, widths, layers_per_block=1,
                         latent_channels=4, norm_num_groups=8, sample_size=128, mid_block_add_attention=False)


def crowded_picture(rng, size=64):
    """A crop for the VAE: one to three shapes of the usual sizes anywhere, overlapping, also beyond the edge."""
    image = Image.new("RGB", (4 * size, 4 * size), BACKGROUND)
    for _ in range(rng.integers(1, 4)):
        x, y, r = rng.uniform(-0.1, 1.1) * 4 * size, rng.uniform(-0.1, 1.1) * 4 * size, rng.uniform(0.11, 0.25) * 4 * 128
        draw_object(ImageDraw.Draw(image), str(rng.choice(SHAPES)), COLOURS[str(rng.choice(list(COLOURS)))], x, y, r)
    return image.reduce(4)


def vae_loss(vae, stage, step, indices, seed):
    """L1 + 1e-4 KL on crowded pictures, and three latent channels held to the mean colour of their 8x8 pixels, in
    a colour basis that each VAE draws for itself -> loss, terms.

    The last term is for the denoiser's sake: without it the encoder lines all colours up along one direction,
    close to each other, and every part of an object picks its own.
    """
    images = to_pixels([crowded_picture(numpy_draw(seed, stage, step, i)) for i in indices])
    posterior = vae.encode(images).latent_dist
    noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=draw(seed, stage, step, i)) for i in indices])
    reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
    mean, variance = posterior.mean.float(), posterior.var.float()
    basis, _ = torch.linalg.qr(torch.randn(3, 3, generator=draw(seed, stage, 0, -1)))
    thumbnail = torch.einsum("ck,bkhw->bchw", basis, F.avg_pool2d(images, 8))
    terms = dict(l1=(reconstruction.float() - images).abs().mean(), kl=0.5 * (mean**2 + variance - 1 - variance.log()).mean(),
                 colour=F.mse_loss(mean[:, :3], thumbnail))
    return terms["l1"] + 1e-4 * terms["kl"] + terms["colour"], terms


@torch.no_grad()
def standardise(vae, seed):
    """Fold each latent channel's mean and standard deviation into the VAE's 1x1 convolutions, so that latents
    are N(0, 1)-like with scaling_factor 1, as a diffusion model wants them. Changes no reconstruction."""
    draws = [np.random.default_rng([seed, 2, k]) for k in range(256)]
    images = to_pixels([draw_shapes(training_record(rng), 128, rng) for rng in draws])
    means = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(32)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv  # rows of `into`: means, then log variances
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= std[None, :, None, None]
    into.weight[:4] /= std[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.bias[4:] -= 2 * std.log()
    vae.register_to_config(scaling_factor=1.0)


def new_tokenizer():
    """T5's tokenizer class with the world's words as pieces; any other word is spelled letter by letter."""
    words = ["a", "an", "photo", "of", "and", "left", "right", "above", "below", *NUMBERS, *COLOURS, *SHAPES, *map(plural, SHAPES)]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0)]
    return T5Tokenizer(vocab=pieces + [("▁" + w, -4.0) for w in words] + [(c, -9.0) for c in letters], extra_ids=0)


def new_text_encoder(vocabulary):
    config = T5Config(vocab_size=vocabulary, d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, dropout_rate=0.0,
                      feed_forward_proj="gated-gelu")
    return T5EncoderModel(config)


WORD_HEADS = dict(shape=SHAPES, colour=("none", *COLOURS), number=NUMBERS, place=("none", *POSITIONS))


def word_labels(prompt):
    """What each word of a caption says of the object it belongs to, as class indices: (words, 4); -100 = nothing.

    "a photo of a red circle and a blue square": both "red" and "circle" say (circle, red, one, no place).
    """
    words = prompt.split()
    nouns = {plural(s): s for s in SHAPES} | {s: s for s in SHAPES}
    labels = [[-100] * 4 for _ in words]
    where = next((p for p in POSITIONS if f" {p} " in prompt), "none")
    opposite = dict(zip(POSITIONS, ("right of", "left of", "below", "above")), none="none")
    begin, seen = 3, 0  # after "a photo of"
    for i, word in enumerate(words):
        if word in nouns:
            phrase = words[begin : i + 1]
            colour = next((w for w in phrase if w in COLOURS), "none")
            number = next((w for w in phrase if w in NUMBERS), "one")
            label = [SHAPES.index(nouns[word]), WORD_HEADS["colour"].index(colour), NUMBERS.index(number),
                     WORD_HEADS["place"].index(opposite[where] if seen else where)]
            for j in range(i - (colour != "none" or number != "one"), i + 1):
                labels[j] = label
            begin, seen = i + 1, seen + 1
    return labels


class Reader(torch.nn.Module):
    """T5 encoder with a linear head per question, for its own training: each word is asked for the shape, colour,
    number and place of the object it belongs to. Like the real T5 it has read captions before it sees a picture,
    so its tokens carry which colour and which place is whose."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.heads = torch.nn.ModuleList(torch.nn.Linear(encoder.config.d_model, len(c)) for c in WORD_HEADS.values())


def reader_loss(reader, tokenizer, stage, step, indices, seed):
    """Mean cross-entropy of the four questions -> loss, terms. Every word of the world is one token."""
    prompts = [training_record(numpy_draw(seed, stage, step, i))["prompt"] for i in indices]
    tokens = tokenizer(prompts, padding="longest", return_tensors="pt")
    labels = torch.full((*tokens.input_ids.shape, 4), -100)
    for row, prompt in zip(labels, prompts):
        words = torch.tensor(word_labels(prompt))
        row[: len(words)] = words
    features = reader.encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    terms = {name: F.cross_entropy(head(features).flatten(0, 1), labels[..., k].flatten())
             for k, (name, head) in enumerate(zip(WORD_HEADS, reader.heads))}
    return sum(terms.values()), terms


# ----------------------------------------------------------------------------------------------------------
# 5. Training
# ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def rank_zero_first():
    """What is inside runs on the first process, then on the others: they find on disk what it has made."""
    if RANK:
        dist.barrier()
    yield
    if WORLD > 1 and not RANK:
        dist.barrier()


def sum_over_processes(tensors):
    """Sum each tensor of a list over all processes, in place. DistributedDataParallel would do it during the backward
    pass, but knows only of one backward pass a step: forcing has one for each block."""
    if WORLD > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))


def gradient_parts(loss_terms, step, images, micro_batch):
    """Backward passes over a global batch of `images`, of which each process takes its share, `micro_batch` at once.

    loss_terms: loss_terms(step, indices, backward) -> {name: detached mean over these indices}; calls backward on
        every loss it makes.
    Returns {name: mean over the global batch}; the gradients are those of the mean, once summed over processes.
    Raises ValueError if there are fewer images than processes.
    """
    if images < WORLD:
        raise ValueError(f"a batch of {images} at this size cannot be shared by {WORLD} processes; give a larger --batch-size")
    own, means = range(RANK, images, WORLD), {}
    for start in range(0, len(own), micro_batch):
        indices = own[start : start + micro_batch]
        share = len(indices) / images
        for name, term in loss_terms(step, indices, lambda loss: loss.backward(loss.new_tensor(share))).items():
            means[name] = means.get(name, 0.0) + share * float(term)
    return means


class Optimizer:
    """AdamW, and where the plan says so Muon on the matrices of the blocks, as one; with warm-up and final decay."""

    def __init__(self, network, plan, new=()):
        new = {id(p) for module in new for p in module.parameters()}
        matrices, groups = {}, {}
        for name, p in network.named_parameters():
            if p.requires_grad:
                lr = plan.get("new_lr", plan["lr"]) if id(p) in new else plan["lr"]
                kind = matrices if plan["muon"] and "blocks." in name and p.ndim == 2 and "table" not in name else groups
                kind.setdefault(lr, []).append(p)
        self.parameters = [p for kind in (matrices, groups) for ps in kind.values() for p in ps]
        as_groups = lambda kind: [dict(params=ps, lr=lr) for lr, ps in kind.items()]
        self.parts = [torch.optim.AdamW(as_groups(groups), betas=plan["betas"], eps=plan["eps"], weight_decay=plan["weight_decay"])]
        if matrices:
            self.parts.append(torch.optim.Muon(as_groups(matrices), weight_decay=plan["weight_decay"], adjust_lr_fn="match_rms_adamw"))
        self.base_lr = [[group["lr"] for group in part.param_groups] for part in self.parts]
        self.plan = plan

    def step(self, step, clip):
        """One update at learning rates for `step`; returns the gradient norm before clipping."""
        steps, warmup, decay = self.plan["steps"], self.plan["warmup"], self.plan["decay"]
        factor = min(1.0, (step + 1) / warmup)
        if decay:
            factor *= min(1.0, (steps - step) / (decay * steps))
        sum_over_processes([p.grad for p in self.parameters if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for part, rates in zip(self.parts, self.base_lr):
            for group, lr in zip(part.param_groups, rates):
                group["lr"] = lr * factor
            part.step()
            part.zero_grad(set_to_none=True)
        return norm

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


def write_atomically(path, write):
    """write(temporary path), then rename: whoever reads `path` finds the old or the new, never half of one."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        write(path + ".tmp")
        os.replace(path + ".tmp", path)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}); what was there is as it was") from error
    finally:
        if os.path.isfile(path + ".tmp"):
            os.remove(path + ".tmp")


def save_model(model, folder, dtype=torch.float32):
    """save_pretrained, in `dtype`, into a temporary folder; then rename file by file into `folder`."""
    temporary = folder.rstrip("/") + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if any(w.dtype != dtype for w in model.parameters()):
            model = copy.deepcopy(model)._apply(lambda w: w.to(dtype))
        model.save_pretrained(temporary)
    except SafetensorError as error:
        raise OSError(f"{folder} could not be written ({error}); what was there is as it was") from error
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(temporary):
        os.replace(os.path.join(temporary, name), os.path.join(folder, name))
    os.rmdir(temporary)


def saved_step(folder, **shared):
    """(steps done, steps planned) of the training in `folder`; (0, None) if there is none.

    Raises ValueError if it is unreadable, or was begun with other settings than `shared`.
    """
    path = os.path.join(folder, "training_state.pt")
    if not os.path.exists(path):
        return 0, None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        done, planned, before = state["step"], state["steps"], state.get("shared", {})
    except Exception as error:
        reason = f"is no readable training state ({type(error).__name__}); move it away to train this stage again"
        raise ValueError(f"{path} {reason}") from error
    for name, value in shared.items():
        if before.get(name, value) != value:
            raise ValueError(f"{folder} was trained with --{name.replace('_', '-')} {before[name]}, not {value}; give the same again, or another --out")
    return done, planned


def fit(stage, folder, network, loss_terms, plan, args, export, show=None, images=None, new=()):
    """The training loop of every network here: resumes, logs, keeps an EMA, saves atomically.

    Args:
        network: what is trained; parameters that require no gradient stay as they are.
        loss_terms: see `gradient_parts`.  images: images(step), of the global batch; the plan's batch_size if not given.
        export: export(folder), called while `network` holds the EMA weights, writes the model files.
        show: show(path), likewise, draws pictures; called at every save.
        new: the modules that learn at the plan's new_lr.
    Under torchrun every process holds the whole network and takes its share of each batch; the first one writes.
    SIGTERM saves after the step it comes in, and exits.
    Raises FloatingPointError after ten steps in a row whose loss was not finite.
    """
    state_path, log_path = os.path.join(folder, "training_state.pt"), os.path.join(folder, "log.jsonl")
    optimizer = Optimizer(network, plan, new)
    ema = EMAModel(network.parameters(), decay=CONFIGS[args.config]["ema"])
    start, _ = saved_step(folder)
    if start:
        state = torch.load(state_path, map_location="cpu", weights_only=True)
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"{stage}: continuing after step {start} of {plan['steps']}")
    lines = open(log_path).read().splitlines()[:start] if start and os.path.exists(log_path) else []
    if not RANK:
        write_atomically(log_path, lambda path: open(path, "w").writelines(line + "\n" for line in lines))

    def save(step, draw_pictures):
        ema.store(network.parameters())
        ema.copy_to(network.parameters())
        export(folder)
        if show and draw_pictures:
            show(os.path.join(folder, f"step-{step:06d}.png"))
        ema.restore(network.parameters())
        state = dict(step=step, steps=plan["steps"], shared=plan.get("shared", {}), network=network.state_dict(), ema=ema.state_dict(),
                     optimizer=optimizer.state_dict())
        write_atomically(state_path, lambda path: torch.save(state, path))

    not_finite, stopping = 0, []
    default = signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    bar = tqdm(range(start, plan["steps"]), initial=start, total=plan["steps"], desc=stage, mininterval=1, disable=RANK > 0)
    with bar, open(os.devnull if RANK else log_path, "a") as log:
        for step in bar:
            began = time.time()
            with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                terms = gradient_parts(loss_terms, step, images(step) if images else plan["batch_size"], args.micro_batch or sys.maxsize)
            shared = torch.tensor([*terms.values(), float(bool(stopping))], device=args.device)
            sum_over_processes([shared])
            *values, told_to_stop = shared.tolist()
            terms = dict(zip(terms, values))
            finite = all(map(math.isfinite, values))
            not_finite = 0 if finite else not_finite + 1
            if not_finite == 10:
                raise FloatingPointError(f"{stage}: the loss was not finite ten steps in a row (step {step}); "
                                         f"the last checkpoint in {folder} is as it was. Try a smaller --lr")
            if finite:
                terms["gradient"] = float(optimizer.step(step, plan["clip"]))
                ema.step(network.parameters())
            else:
                network.zero_grad(set_to_none=True)
            log.write(json.dumps(dict(step=step, **terms, skipped=not finite, seconds=round(time.time() - began, 3))) + "\n")
            log.flush()
            bar.set_postfix({name: f"{value:.4g}" for name, value in terms.items()})
            if (step + 1) % plan["save_every"] == 0 or step + 1 == plan["steps"] or told_to_stop:
                with rank_zero_first():
                    if not RANK:
                        save(step + 1, draw_pictures=not told_to_stop)
                if told_to_stop:
                    sys.exit(f"{stage}: told to stop; saved after step {step + 1}; the same command continues from there")
    signal.signal(signal.SIGTERM, default)


def plan_for(stage, args):
    """The config's defaults for a stage; what the command line sets is meant for the stage it names, or for all."""
    plan = dict(CONFIGS[args.config]["stages"][stage.removesuffix("_adapt")])
    if args.stage in (stage, "all"):
        for name in ("steps", "batch_size", "lr", "timesteps", "snr_weight", "save_every"):
            if getattr(args, name) is not None:
                plan[name] = getattr(args, name)
        if args.lr is not None:
            plan["new_lr"] = args.lr
    return plan


def student_shape(args):
    """The arguments of T2MD in which a student differs from its teacher."""
    return dict(pattern=args.pattern, padding_tokens=args.padding_tokens, local_enhancement=args.local_enhancement)


def shared_settings(stage, args):
    """What all steps of a stage's training share: its seed; of forcing and kd the student's shape, of kd its row of Table 1."""
    shape = student_shape(args) if stage in ("forcing", "kd") else {}
    row = dict(init=args.init, soft_weight=args.soft_weight, mixer_weight=args.mixer_weight) if stage == "kd" else {}
    return dict(seed=args.seed) | shape | row


def finished(folder, **shared):
    """Has the training in `folder` done all the steps it was planned for? `shared`: see `saved_step`."""
    done, planned = saved_step(folder, **shared)
    return planned is not None and done >= planned


def make_component(name, args):
    """Train a small VAE or text encoder of the shapes world into OUT/name, unless that is done; returns the folder."""
    folder, plan, dtype = os.path.join(args.out, name), plan_for(name, args), CONFIGS[args.config]["save_dtype"]
    if finished(folder):
        return folder
    torch.manual_seed(zlib.crc32(f"{args.seed}/{name}".encode()))
    if name.startswith("vae"):
        network = new_vae()

        def export(folder):
            vae = copy.deepcopy(network)
            standardise(vae, args.seed)
            if name == "vae_adapt":  # or at 512 px shapes would still show at the last step of the quadratic schedule
                vae.register_to_config(scaling_factor=0.5)
            save_model(vae, folder, dtype)

        compute = lambda step, indices: vae_loss(network, name, step, indices, args.seed)
    else:
        tokenizer = new_tokenizer()
        network = Reader(new_text_encoder(len(tokenizer)))

        def export(folder):
            save_model(network.encoder, folder, dtype)
            tokenizer.save_pretrained(folder)

        compute = lambda step, indices: reader_loss(network, tokenizer, name, step, indices, args.seed)

    def loss_terms(step, indices, backward):
        loss, terms = compute(step, indices)
        backward(loss)
        return terms

    fit(name, folder, network, loss_terms, plan, args, export)
    return folder


def trainable(stage, model, init="forcing"):
    """The modules a stage trains: forcing Mamba layers, kd all token mixers (and what else the teacher does not have),
    otherwise, and from scratch, everything."""
    mixers = [block.mixer for block in model.blocks]
    if stage == "forcing":
        return [m for m in mixers if isinstance(m, MambaMixer)]
    if stage == "kd" and init != "scratch":
        return mixers + [m for m in model.children() if isinstance(m, (PaddingTokens, LocalEnhancement))]
    return [model]


def new_modules(stage, model):
    """What meets something new in a stage: Mamba layers in kd; a VAE's latents and a text encoder's features in adapt."""
    if stage == "adapt":
        return [model.patch_embed, model.caption_projection, model.proj_out]
    return [m for m in model.modules() if isinstance(m, MambaMixer)] if stage == "kd" else []


def teacher_folder(args):
    """--teacher, else the one trained in OUT, else the config's; in the shapes world trained first if there is none."""
    own, given = os.path.join(args.out, "teacher"), CONFIGS[args.config]["teacher"]
    if args.teacher:
        return args.teacher
    if finished(own):
        return own
    if args.config != "shapes":
        return given
    if os.path.isdir(os.path.join(HERE, given)) and not os.path.isdir(own):
        return os.path.join(HERE, given)
    print(f"there is no teacher yet: training one into {own} first")
    return run_stage("teacher", args)


def previous_folder(stage, args):
    """The checkpoint that a stage starts from; run first if it is missing."""
    before = CHAIN[CHAIN.index(stage) - 1]
    if before == "teacher" or stage == "kd" and args.init != "forcing":
        return teacher_folder(args)
    folder = os.path.join(args.out, before)
    if not finished(folder, **(student_shape(args) if stage == "kd" else {})):  # of any seed
        print(f"{stage} starts from {before}, which is not there yet: running {before} first")
        run_stage(before, args)
    return folder


def start_model(stage, args, folder):
    """The network a stage begins with; its config names its VAE and text encoder, local ones relative to `folder`."""
    overrides, parts = {}, {}
    further = args.teacher if stage == args.stage == "teacher" else None  # an existing teacher, to be trained further
    if stage == "teacher" and not further:
        parts = {name: make_component(name, args) for name in ("vae", "text_encoder")}
        torch.manual_seed(zlib.crc32(f"{args.seed}/{stage}".encode()))
        model = T2MD(pattern="S" * len(args.pattern), pos_embed="pixart", **CONFIGS[args.config]["model"])
    else:
        before = further or previous_folder(stage, args)
        if stage == "forcing" or stage == "kd" and args.init != "forcing":
            overrides = student_shape(args)
        if stage == "adapt":
            overrides = dict(pos_embed="centered", beta_schedule="scaled_linear")
            parts = {name: adapted_component(name, args) for name in ("vae", "text_encoder")}
        torch.manual_seed(zlib.crc32(f"{args.seed}/{stage}".encode()))
        if stage == "kd" and args.init == "llama":
            model = T2MD.from_attention(before, **overrides)
        else:
            model = T2MD.from_pixart(before, **overrides)
        if stage == "kd" and args.init == "scratch":
            model = T2MD.from_config(model.config)
        if stage in ("hires1", "hires2"):  # sampled at twice the size unless told otherwise; at the same coordinates
            model.register_to_config(sample_size=2 * model.config.sample_size, interpolation_scale=2 * model.interpolation_scale,
                                     use_additional_conditions=model.conditioned_on_size)
        parts = parts or {name: component_path(before, model.config[name]) for name in ("vae", "text_encoder")}
    parts |= {name: path for name in parts if stage == args.stage and (path := getattr(args, name))}
    model.register_to_config(**{name: os.path.relpath(path, folder) if os.path.isdir(path) else path for name, path in parts.items()})
    return model


def adapted_component(name, args):
    """The VAE or text encoder that adapt swaps in: the config's; in the shapes world of the teacher's own origin."""
    if name in CONFIGS[args.config]["adapt"]:
        return CONFIGS[args.config]["adapt"][name]
    shipped = os.path.join(HERE, "assets", f"{name}_adapt")
    own_teacher = os.path.isdir(os.path.join(args.out, "teacher"))
    return shipped if os.path.isdir(shipped) and not own_teacher else make_component(f"{name}_adapt", args)


def noise_schedule(model):
    """diffusers' forward process (equation 1) on the 1000-step schedule that a model's config names."""
    return DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2, beta_schedule=model.config.beta_schedule)


def stage_terms(stage, model, teacher, schedule, batch, backward, kd_weights=(0.5, 0.2), signal=None, **conditions):
    """One step's forward and backward pass on a batch of Data -> {name: detached term}.

    kd_weights: of L_soft and L_mixer.  conditions: `size_conditions`.
    signal: None, or not the paper's: equation 8 weighs each image's error by 1 / sqrt(SNR), cut to [1, 8], without which
    what is where and which colour is whose is learned last; the SNR is signal^2 times the schedule's, because a shape of m
    times the size stands out m times as well from the noise, and one of 1/4 of the amplitude 1/4 as well.
    """
    t, noise, text, mask = batch["t"], batch["noise"], batch["text"], batch["mask"]
    z_t = schedule.add_noise(batch["z0"], noise, t)
    if stage == "forcing":
        return dict(forcing=forcing_loss(model, teacher, z_t, t, text, mask, backward, **conditions))
    if stage == "kd":
        loss, terms = kd_loss(model, teacher, z_t, t, text, mask, noise, *kd_weights, **conditions)
    else:
        predicted = predict_noise(model, z_t, t, text, mask, **conditions)
        loss = mse_loss(noise, predicted)
        terms = dict(mse=loss.detach())
        if signal:
            alpha_bar = schedule.alphas_cumprod.to(t.device)[t]
            root = (signal**2 * alpha_bar / (1 - alpha_bar)).rsqrt().clamp(1.0, 8.0).sqrt()[:, None, None, None]
            loss = mse_loss(root * noise, root * predicted)
    backward(loss)
    return terms


def run_stage(stage, args):
    """Run or continue one stage, and before it whatever it needs; returns its folder."""
    config = CONFIGS[args.config]
    if stage not in config["stages"]:
        raise ValueError(f"--config {args.config} trains no {stage}: it starts from {config['teacher']}, or give --teacher")
    folder, plan = os.path.join(args.out, stage), plan_for(stage, args) | dict(shared=shared_settings(stage, args))
    done, _ = saved_step(folder, **plan["shared"])
    if done >= plan["steps"]:
        print(f"{stage} is finished: {done} steps, its model is in {folder}")
        return folder

    model = start_model(stage, args, folder).to(args.device)
    if config["checkpointing"]:
        model.enable_gradient_checkpointing()
    model.requires_grad_(False)
    for module in trainable(stage, model, args.init):
        module.requires_grad_(True)
    vae, text_encoder = load_parts(model, folder, args.device)
    teacher = load_denoiser(teacher_folder(args), args.device) if stage in ("forcing", "kd") else None
    for block in (*model.blocks, *(teacher.blocks if teacher else ())):
        if isinstance(block.mixer, Attention):
            block.mixer.float32 = config["float32_attention"]
    schedule = noise_schedule(model)
    sizes, shares, base = list(plan["sizes"]), list(plan["sizes"].values()), config["base_pixels"]
    kept = os.path.join(args.out, "cache")
    if args.data == "shapes":
        count = min(plan["pictures"], plan["steps"] * plan["batch_size"])
        data = {m: ShapesData(m * base, count, vae, text_encoder, args.seed, kept) for m in sizes}
    else:
        if args.cache:
            claim_cache(args.cache, vae, text_encoder, [m * base for m in sizes])
        data = {m: ImageData(args.data, m * base, vae, text_encoder, args.seed, kept, args.cache) for m in sizes}
    multiple = [sizes[int(torch.multinomial(torch.tensor(shares), 1, generator=draw(args.seed, stage, step, -1)))]
                for step in range(plan["steps"])]
    images = lambda step: max(1, plan["batch_size"] // multiple[step] ** 2)

    def loss_terms(step, indices, backward):
        turn, generators = multiple[:step].count(multiple[step]), [draw(args.seed, stage, step, i) for i in indices]
        batch = data[multiple[step]].batch(turn, indices, images(step), generators, plan.get("timesteps"))
        conditions = size_conditions(model, *(side * vae.factor for side in batch["z0"].shape[-2:]), len(indices))
        return stage_terms(stage, model, teacher, schedule, {k: v.to(args.device) for k, v in batch.items()}, backward,
                           (args.soft_weight, args.mixer_weight), vae.scale * multiple[step] if plan["snr_weight"] else None, **conditions)

    examples = heldout_records(args.examples, args.seed)
    if args.cache:  # the text encoder, by far the largest part at full size, leaves the device
        text_encoder = encode_first(text_encoder, ["", *(record["prompt"] for record in examples)])

    @functools.lru_cache(maxsize=None)
    def upper_row():
        if stage == "teacher":  # it has no teacher: beside it, what is asked for
            return [draw_shapes(record, base, np.random.default_rng(k)) for k, record in enumerate(examples)]
        if teacher:
            return sample_records(teacher, vae, text_encoder, examples, base)
        # after kd: its checkpoint names the VAE and text encoder that the teacher used, even of a teacher that names none
        folder, student = teacher_folder(args), os.path.join(args.out, "kd")
        named = T2MD.load_config(student) if os.path.isdir(student) else {}
        original = load_denoiser(folder, args.device, **{name: named[name] for name in ("vae", "text_encoder") if named})
        return sample_records(original, *load_parts(original, student if named else folder, args.device), examples, base)

    def show(path):
        rows = [upper_row(), *(sample_records(model, vae, text_encoder, examples, m * base) for m in sorted(data))]
        grid = side_by_side(*([image.resize((base, base), Image.BOX) for image in row] for row in rows))
        write_atomically(path, lambda path: grid.save(path, format="PNG"))

    fit(stage, folder, model, loss_terms, plan, args, lambda folder: save_model(model, folder, config["save_dtype"]),
        show if examples else None, images, new_modules(stage, model))
    for m, source in data.items():
        if getattr(source, "skipped", None):
            print(f"skipped at {m * base} px: " + ", ".join(f"{n} x {reason}" for reason, n in source.skipped.items()))
    print(f"{stage}: {plan['steps']} steps done, peak memory {peak_memory(args.device):.1f} GiB, the model is in {folder}")
    return folder


# ----------------------------------------------------------------------------------------------------------
# 6. Evaluation
# ----------------------------------------------------------------------------------------------------------


def sample_records(model, vae, text_encoder, records, pixels, seed=0, **how):
    """One picture for each record, image k from the noise of seed + k -> list of PIL images."""
    images, batch = [], max(1, 32 * 128**2 // pixels**2)
    for start in range(0, len(records), batch):
        prompts = [record["prompt"] for record in records[start : start + batch]]
        seeds = [seed + start + k for k in range(len(prompts))]
        images += generate(model, vae, text_encoder, prompts, (pixels, pixels), seeds, **how)
    return images


def side_by_side(*rows):
    """Rows of PIL images -> one picture."""
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            grid.paste(image, (x * width, y * height))
    return grid


def evaluate(images, records):
    """GenEval in miniature -> {tag: share of right pictures, "overall": mean over the tags that occur}."""
    right = {}
    for image, record in zip(images, records, strict=True):
        right.setdefault(record["tag"], []).append(score_shapes(image, record))
    scores = {tag: float(np.mean(right[tag])) for tag in TAGS if tag in right}
    return scores | {"overall": float(np.mean(list(scores.values())))}


def relative_errors(student, teacher, vae, text_encoder, records, pixels, seed):
    """How far a student is from its teacher, without a detector: ||student - teacher||^2 / ||teacher||^2 of the predicted noise
    and of each block's mixer output, each model on its own hidden states, on pictures of `records` at timesteps spread over
    all of them -> {"noise": float, "mixers": [float], "forced": [float]}; forced: the mixers fed with the teacher's hidden
    states, as in equation 6."""
    schedule, totals = noise_schedule(teacher), []
    for start in range(0, len(records), 16):
        chunk = range(start, min(start + 16, len(records)))
        mean, _ = vae.moments(to_pixels([draw_shapes(records[k], pixels, np.random.default_rng([seed, k])) for k in chunk]))
        noise = torch.cat([torch.randn(1, *mean.shape[1:], generator=draw(seed, "errors", 0, k)) for k in chunk]).to(mean.device)
        t = torch.tensor([int((k + 0.5) * 1000 / len(records)) for k in chunk], device=mean.device)
        text, mask = text_encoder([records[k]["prompt"] for k in chunk])
        given, own, wanted, forced = (schedule.add_noise(mean, noise, t), t, text, mask), [], [], []
        grid = [side // student.config.patch_size for side in mean.shape[2:]]

        def visit_teacher(n, mixer_input, mixer_output):
            wanted.append(mixer_output)
            forced.append(student.blocks[n].mixer(mixer_input, grid))

        with torch.no_grad():
            predicted = predict_noise(student, *given, lambda n, x, y: own.append(y)), predict_noise(teacher, *given, visit_teacher)
        pairs = [predicted, *zip(own, wanted), *zip(forced, wanted)]
        totals.append([((s - o).square().sum().item(), o.square().sum().item()) for s, o in pairs])
    wrong, size = np.array(totals).sum(0).T
    noise, *errors = (wrong / size).tolist()
    return dict(noise=noise, mixers=errors[: len(student.blocks)], forced=errors[len(student.blocks) :])


def scans(letters, attention=True):
    """A pattern's Mamba letters (without `attention` all its letters) replaced by these in turn."""
    def replaced(pattern):
        turn = itertools.cycle(letters)
        return "".join("S" if letter == "S" and attention else next(turn) for letter in pattern)
    return replaced


ABLATIONS = (  # (row, the paper's GenEval, the row to compare it with, what it varies)
    ("from scratch", 0.301, None, dict(init="scratch", soft_weight=0.0, mixer_weight=0.0)),
    ("+ non-Mamba weights from the teacher", 0.397, "from scratch", dict(init="teacher", soft_weight=0.0, mixer_weight=0.0)),
    ("+ soft loss", 0.452, "+ non-Mamba weights from the teacher", dict(init="teacher", mixer_weight=0.0)),
    ("+ token mixer loss", 0.462, "+ soft loss", dict(init="teacher")),
    ("+ teacher forcing: T2MD", 0.485, "+ token mixer loss", dict()),
    ("attention-to-Mamba initialisation", 0.433, "+ teacher forcing: T2MD", dict(init="llama")),
    ("one direction", 0.448, "+ teacher forcing: T2MD", dict(pattern=scans("v>"))),
    ("no self-attention", 0.420, "+ teacher forcing: T2MD", dict(pattern=scans("HW", attention=False))),
    ("four-way scan", None, "+ teacher forcing: T2MD", dict(pattern=scans("><v^"))),
    ("padding tokens", None, "+ teacher forcing: T2MD", dict(padding_tokens=True)),
    ("local enhancement", None, "+ teacher forcing: T2MD", dict(local_enhancement=True)),
)


def row_folder(args, name, seed):
    """Where --stage ablate trains and measures a row; seed "*" for a pattern of all its seeds."""
    return os.path.join(args.out, "ablate", f"{slug(name)}-{seed}")


@contextlib.contextmanager
def one_at_a_time(folder):
    """What is inside runs in one process at a time of those that share `folder`: of two that write one file at once, one fails."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_ablate(args):
    """Every row of ABLATIONS with every seed, at an equal number of optimiser steps (a quarter of them forcing, where a row has
    it), then OUT/ablate/table.md and .json: mean and standard deviation over seeds. What is done is not run again, so that
    several processes, each with its own --seed and --seeds 1, can share the work.
    Raises ValueError if OUT has rows of another budget."""
    steps, folder, teacher = args.steps or 600, os.path.join(args.out, "ablate"), teacher_folder(args)
    os.makedirs(os.path.join(args.out, "cache"), exist_ok=True)
    budget = dict(steps=steps, records=args.records) | {k: getattr(args, k) for k in ("dtype", "batch_size", "lr", "pattern", "teacher")}
    with one_at_a_time(folder):
        differ = differences(os.path.join(folder, "budget.json"), budget)
    if differ:
        listed = ", ".join(f"{name} {theirs} and not {ours}" for name, (theirs, ours) in differ.items())
        raise ValueError(f"{folder} holds rows of {listed}; to compare like with like, give another --out")
    original = load_denoiser(teacher, args.device)
    parts, pixels = load_parts(original, teacher, args.device), CONFIGS[args.config]["base_pixels"]

    def measure(model, seed):
        records = heldout_records(args.records, seed)
        return evaluate(sample_records(model, *parts, records, pixels, seed), records) | relative_errors(model, original, *parts, records[:96], pixels, seed)

    def result(name, seed, settings):
        own = row_folder(args, name, seed)
        path = os.path.join(own, "result.json")
        if not os.path.exists(path):
            print(f"ablate: {name}, seed {seed}")
            model = original
            if settings is not None:
                os.makedirs(own, exist_ok=True)
                if not os.path.lexists(os.path.join(own, "cache")):  # pictures, encoded once for all rows
                    os.symlink(os.path.relpath(os.path.join(args.out, "cache"), own), os.path.join(own, "cache"))
                row = argparse.Namespace(**vars(args) | settings | dict(out=own, seed=seed, teacher=teacher, examples=0))
                if "pattern" in settings:
                    row.pattern = settings["pattern"](args.pattern)
                forcing = steps // 4 if row.init == "forcing" else 0
                for row.stage, row.steps in (("forcing", forcing), ("kd", steps - forcing)):
                    if row.steps:
                        model = load_denoiser(run_stage(row.stage, row), args.device)
            write_atomically(path, lambda path: open(path, "w").write(json.dumps(measure(model, seed))))
        return json.load(open(path))

    seeds = range(args.seed, args.seed + args.seeds)
    lines = [f"{steps} optimiser steps a row, seeds {seeds[0]} to {seeds[-1]}, {args.records} held-out records a seed; mean and standard deviation", "",
             "| | " + " | ".join(TAGS) + " | overall | noise error | mixer error | paper: GenEval |", "|---" * (len(TAGS) + 5) + "|"]
    versus = ["", "Row against row, in how many seeds:", "", "| | against | overall higher | noise error lower | mixer error lower | paper |", "|---" * 6 + "|"]
    table, columns = {}, {}
    for name, paper, other, settings in (("teacher", 0.481, None, None), *ABLATIONS):
        runs = [result(name, seed, settings) for seed in seeds]
        table[name] = dict(paper=paper, runs=runs)
        own = columns[name] = {key: np.array([np.mean(run[key]) for run in runs]) for key in (*TAGS, "overall", "noise", "mixers")}
        cells = [f"{values.mean():.{digits}f} ± {values.std(ddof=len(seeds) > 1):.{digits}f}"
                 for digits, values in zip([2] * (len(own) - 2) + [4, 3], own.values())]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {f'{paper:.3f}' if paper else ''} |")
        if other:
            than = columns[other]
            better = own["overall"] > than["overall"], own["noise"] < than["noise"], own["mixers"] < than["mixers"]
            order = "" if not paper else "higher" if paper > table[other]["paper"] else "lower"
            versus.append(f"| {name} | {other} | " + " | ".join(f"{won.sum()} of {len(seeds)}" for won in better) + f" | {order} |")
        with one_at_a_time(folder):
            write_atomically(os.path.join(folder, "table.json"), lambda path: open(path, "w").write(json.dumps(table, indent=1)))
            write_atomically(os.path.join(folder, "table.md"), lambda path: open(path, "w").write("\n".join(lines + versus) + "\n"))
    print("\n".join(lines + versus))


def receptive_field(mixers, x, grid):
    """How much each token's input moves the middle token's output through mixers stacked with residuals: the norm of the
    gradient, (H, W), largest 1. x: (B, H * W, d), the mixer inputs of some pictures."""
    x = x.detach().requires_grad_()
    h = x
    for mixer in mixers:
        h = h + mixer(h, grid)
    middle = grid[0] // 2 * grid[1] + grid[1] // 2
    out = (h - x)[:, middle]
    gradient, = torch.autograd.grad((out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum(), x)
    field = gradient.norm(dim=2).mean(0).reshape(grid)
    return field / field.max()


def line_chart(path, lines, title, size=(640, 400)):
    """Lines {name: values >= 0} over block numbers -> PNG."""
    image, margin = Image.new("RGB", size, "white"), 48
    pen, top = ImageDraw.Draw(image), max(max(values) for values in lines.values())
    place = lambda k, v, n: (margin + k * (size[0] - 2 * margin) / max(1, n - 1), size[1] - margin - v / top * (size[1] - 3 * margin))
    pen.text((margin, 8), title, fill="black")
    for tick in np.linspace(0, top, 5):
        y = place(0, tick, 2)[1]
        pen.line([margin, y, size[0] - margin, y], fill="lightgrey")
        pen.text((8, y - 6), f"{tick:.2g}", fill="black")
    for n, ((name, values), colour) in enumerate(zip(lines.items(), COLOURS.values())):
        points = [place(k, v, len(values)) for k, v in enumerate(values)]
        pen.line(points, fill=colour, width=3)
        pen.text((margin + 8, 26 + 14 * n), name, fill=colour)
        for k, (x, _) in enumerate(points):
            pen.text((x - 3, size[1] - margin + 8), str(k), fill="black")
    write_atomically(path, lambda path: image.save(path, format="PNG"))


def run_figures(args):
    """OUT/field.png, the receptive fields of a student's W, H, W then H, and S mixers; and, once --stage ablate has run,
    OUT/depth.png, its mixers' errors by depth with and without teacher forcing, and after forcing alone."""
    folder, inputs = (args.model or [os.path.join(HERE, "assets", "student")])[0], []
    model = load_denoiser(folder, args.device)
    vae, text_encoder = load_parts(model, folder, args.device)
    pixels = (args.size or [model.config.sample_size * vae.factor])[0]
    records = heldout_records(12, args.seed)
    mean, _ = vae.moments(to_pixels([draw_shapes(record, pixels, np.random.default_rng([args.seed, k])) for k, record in enumerate(records)]))
    schedule = noise_schedule(model)
    noise, t = torch.cat([noise_for(args.seed + k, *mean.shape[1:]) for k in range(len(records))]), torch.full((len(records),), 500)
    text, mask = text_encoder([record["prompt"] for record in records])
    with torch.no_grad():
        predict_noise(model, schedule.add_noise(mean, noise, t), t, text, mask, lambda n, x, y: inputs.append(x))
    grid, first = [side // model.config.patch_size for side in mean.shape[2:]], {letter: model.config.pattern.index(letter) for letter in "SHW"}
    panels = []
    for letters in ("W", "H", "WH", "S"):
        field = receptive_field([model.blocks[first[letter]].mixer for letter in letters], inputs[first[letters[0]]], grid)
        shade = (255 * (1 - field.clamp(min=1e-4).log10() / -4)).round().byte().numpy()  # four decades, white the largest
        panels.append(Image.fromarray(shade).resize((192, 192), Image.NEAREST).convert("RGB"))
    sheet = contact_sheet(panels, ["W", "H", "W, then H", "S"], columns=4)
    write_atomically(os.path.join(args.out, "field.png"), lambda path: sheet.save(path, format="PNG"))
    print(os.path.join(args.out, "field.png"))
    table = os.path.join(args.out, "ablate", "table.json")
    if os.path.exists(table):
        runs = {name: json.load(open(table))[name]["runs"] for name in ("+ token mixer loss", "+ teacher forcing: T2MD")}
        lines = {label: np.mean([run["mixers"] for run in own], axis=0).tolist()
                 for label, own in zip(("kd, without teacher forcing", "kd, with teacher forcing"), runs.values())}
        teacher = teacher_folder(args)
        original = load_denoiser(teacher, args.device)
        parts, records, base = load_parts(original, teacher, args.device), heldout_records(96, args.seed), CONFIGS[args.config]["base_pixels"]
        errors = [relative_errors(load_denoiser(forced, args.device), original, *parts, records, base, args.seed)
                  for forced in glob.glob(os.path.join(row_folder(args, "+ teacher forcing: T2MD", "*"), "forcing"))]
        if errors:
            for label, key in (("on its own hidden states", "mixers"), ("on the teacher's", "forced")):
                lines["forcing alone, " + label] = np.mean([error[key] for error in errors], axis=0).tolist()
        line_chart(os.path.join(args.out, "depth.png"), lines, "relative error of each block's mixer output, by depth")
        print(os.path.join(args.out, "depth.png"))


def contact_sheet(pictures, captions, columns=6, side=192):
    """Pictures, scaled into squares, each above its caption -> one picture."""
    line, rows = 12, -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + 3 * line)), "white")
    for n, (picture, caption) in enumerate(zip(pictures, captions)):
        x, y = n % columns * side, n // columns * (side + 3 * line)
        sheet.paste(ImageOps.contain(picture, (side - 4, side - 4)), (x + 2, y + 2))
        text = "\n".join(textwrap.wrap(caption, side // 6)[:3])
        ImageDraw.Draw(sheet).text((x + 2, y + side), text, fill="black")
    return sheet


def run_benchmark(args):
    """Where the time of a forcing or kd step goes: its parts alone, then the step, medians of 5 in turn; no optimiser."""
    if args.stage not in ("forcing", "kd"):
        raise ValueError(f"--benchmark times the stages forcing and kd, not {args.stage}")
    config, plan, folder = CONFIGS[args.config], plan_for(args.stage, args), teacher_folder(args)
    teacher, student = load_denoiser(folder, args.device), T2MD.from_pixart(folder, pattern=args.pattern).to(args.device).requires_grad_(False)
    for module in trainable(args.stage, student):
        module.requires_grad_(True)
    side, batch = (args.size or [config["base_pixels"]])[0], plan["batch_size"]
    normal, latent = functools.partial(torch.randn, device=args.device), student.config.sample_size * side // config["base_pixels"]
    z_t, t = normal(batch, student.config.in_channels, latent, latent), torch.full((batch,), 500, device=args.device)
    text, mask = normal(batch, 20, student.config.caption_width), torch.ones(batch, 20, dtype=torch.long, device=args.device)
    given, grid, inputs = (z_t, t, text, mask), [latent // student.config.patch_size] * 2, []
    conditions = size_conditions(student, side, side, batch)
    with torch.no_grad():
        predict_noise(teacher, *given, lambda n, x, y: inputs.append((student.blocks[n].mixer, x)), **conditions)

    def teacher_forward():
        with torch.no_grad():
            predict_noise(teacher, *given, **conditions)

    parts = {"teacher, forward": teacher_forward}
    if args.stage == "forcing":
        parts["Mamba mixers, forward and backward"] = lambda: [mixer(x, grid).sum().backward() for mixer, x in inputs if isinstance(mixer, MambaMixer)]
        parts["forcing step"] = lambda: forcing_loss(student, teacher, *given, torch.Tensor.backward, **conditions)
    else:
        parts["student, forward and backward"] = lambda: predict_noise(student, *given, **conditions).sum().backward()
        parts["kd step"] = lambda: kd_loss(student, teacher, *given, torch.zeros_like(z_t), **conditions)[0].backward()
    print(f"{student.config.pattern}, {batch} images of {side} px, {args.dtype}")
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        seconds(parts.values(), 1, args.device)  # warm-up
        times = seconds(parts.values(), 5, args.device)
    for name, (median, spread) in zip(parts, times):
        print(f"{name:36}{median:9.3f} +- {spread:.3f} s")
    print(f"step / sum of its parts: {times[-1][0] / sum(median for median, _ in times[:-1]):.2f}")


def run_data(args):
    """Look at --data as training sees it: prints how many images each bucket has and what was skipped and why, and
    writes OUT/data.png, 24 of them with their captions."""
    pixels, path = (args.size or [CONFIGS[args.config]["base_pixels"]])[0], os.path.join(args.out, "data.png")
    if args.data == "shapes":
        rng = np.random.default_rng(args.seed)
        records = [training_record(rng) for _ in range(24)]
        pictures, captions = [draw_shapes(record, pixels, rng) for record in records], [record["prompt"] for record in records]
        print(f"shapes: drawn at {pixels} x {pixels}, as many as asked for")
    else:
        data = ImageData(args.data, pixels, None, None, args.seed, os.path.join(args.out, "cache"))
        shown = [k for batch in data.order(0, 1)[:24] for k in batch]
        pictures, captions = zip(*[(image, data.prompts[number]) for number, image in map(data.picture, shown)])
        print(f"{len(data.items)} images in {len(data.buckets)} buckets of about {pixels} x {pixels} px:")
        for (height, width), members in sorted(data.buckets.items()):
            print(f"  {width:5} x {height:<5} {len(members):8}")
        print(f"{sum(data.skipped.values())} skipped")
        for reason, count in data.skipped.most_common():
            print(f"  {count:8} {reason}")
    write_atomically(path, lambda path: contact_sheet(pictures, captions).save(path, format="PNG"))
    print(path)


def run_eval(args):
    """Score checkpoints beside each other, each at the size it was last trained at, or at every --size, on held-out records or
    --prompts; prints a table, writes OUT/eval.json and OUT/eval.png: a row of pictures for each and, with --zero-shot, one
    more of the last at that size."""
    made = [os.path.join(args.out, stage) for stage in CHAIN]
    shipped = [os.path.join(HERE, "assets", name) for name in ("teacher", "student_kd", "student")]
    folders = args.model or [f for f in (*shipped, *made) if os.path.exists(os.path.join(f, "config.json"))]
    if not folders:
        raise ValueError(f"there is no checkpoint to score in {args.out}; name one with --model")
    records = read_prompts(args.prompts) if args.prompts else heldout_records(args.records, args.seed)
    if not all(r.get("tag") in TAGS and r.get("include") for r in records):
        raise ValueError(f"{args.prompts} must hold GenEval-format records: each with a tag of {', '.join(TAGS)}, and include")
    results, rows, side = {}, [], CONFIGS[args.config]["base_pixels"]
    print(f"{len(records)} records, 20 steps, guidance 4.5, seed {args.seed}")
    print("".join(f"{name:>14}" for name in (*TAGS, "overall")) + "  pixels  model")
    for folder in folders:
        model = load_denoiser(folder, args.device)
        parts = load_parts(model, folder, args.device)
        for pixels in args.size or [model.config.sample_size * parts[0].factor]:
            images = sample_records(model, *parts, records, pixels, args.seed, upscale=1 if args.zero_shot else args.upscale)
            scores = results.setdefault(folder, {})[pixels] = evaluate(images, records)
            print("".join(f"{scores.get(name, float('nan')):14.3f}" for name in (*TAGS, "overall")) + f"  {pixels:6}  {folder}", flush=True)
            rows.append(images[:12])
    if args.zero_shot:
        rows.append(sample_records(model, *parts, records[:12], args.zero_shot, args.seed, upscale=args.upscale))
    rows = [[image.resize((side, side), Image.BOX) for image in row] for row in rows]
    write_atomically(os.path.join(args.out, "eval.json"), lambda path: open(path, "w").write(json.dumps(results, indent=1)))
    write_atomically(os.path.join(args.out, "eval.png"), lambda path: side_by_side(*rows).save(path, format="PNG"))


# ----------------------------------------------------------------------------------------------------------
# 7. Command line
# ----------------------------------------------------------------------------------------------------------


def peak_memory(device):
    """GiB that this process has held at once: of the card's memory, or of the machine's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


COMMANDS = {"eval": run_eval, "data": run_data, "ablate": run_ablate, "figures": run_figures}  # --stage, what trains no stage


def parse_arguments(argv=None):
    epilog = ["defaults of each stage, by config:"]
    for config, settings in CONFIGS.items():
        for stage, plan in settings["stages"].items():
            epilog.append(f"  {config:7} {stage:13}" + ", ".join(f"{k} {v}" for k, v in plan.items()))
    parser = argparse.ArgumentParser(description=__doc__, epilog="\n".join(epilog),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, choices=(*CHAIN, "all", *COMMANDS),
                        help="what to run; what it starts from is run first if it is missing")
    parser.add_argument("--config", default="shapes", choices=CONFIGS,
                        help="shapes, the embedded world (default), or t2md, the paper's model from PixArt-alpha")
    parser.add_argument("--data", default="shapes", help="shapes (default), a folder with metadata.jsonl (file_name, text), or a "
                        "quoted glob of WebDataset tar shards; --stage data shows what is in it")
    parser.add_argument("--cache", metavar="DIR", help="compute the text features and VAE moments of --data once, into DIR, and train "
                        "from them; one folder for each set of components and sizes")
    parser.add_argument("--out", help="folder of all checkpoints, logs and pictures (default: runs/CONFIG)")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (default 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: autocast over float32 weights")
    stage = parser.add_argument_group("the stage that --stage names (or every stage, with all)")
    stage.add_argument("--steps", type=int, help="optimiser steps in all; more than before continues a finished stage")
    stage.add_argument("--batch-size", type=int, help="images of base size a step, over all processes")
    stage.add_argument("--micro-batch", type=int, help="images a process takes through the network at once; the rest of its "
                       "share follows, gradients add up (default: all at once)")
    stage.add_argument("--lr", type=float, help="peak learning rate")
    stage.add_argument("--timesteps", type=float, nargs=2, metavar=("MEAN", "DEVIATION"), help="draw t from this normal distribution")
    stage.add_argument("--snr-weight", action=argparse.BooleanOptionalAction, help="weigh the errors of equation 8 by 1 / sqrt(SNR)")
    stage.add_argument("--save-every", type=int, help="steps between checkpoints")
    stage.add_argument("--benchmark", action="store_true", help="train nothing: print where the time of a forcing or kd step goes")
    stage.add_argument("--examples", type=int, default=12, help="pictures drawn beside the teacher's at every checkpoint (default 12; 0: none)")
    model = parser.add_argument_group("models")
    model.add_argument("--teacher", help="the teacher's folder (default: the one trained in OUT, else the shipped one); "
                       "with --stage teacher, one to train further")
    model.add_argument("--vae", help="folder or repository of the VAE that the stage trains with (default: the one of the model it "
                       "starts from; for adapt the config's)")
    model.add_argument("--text-encoder", help="the same for the T5 encoder and its tokenizer")
    model.add_argument("--pattern", help="the student's mixers, a letter a block out of S H W > < v ^ (default: the config's; the paper's "
                       "Table 1 has one direction, as S>v>v>v, and no self-attention, as HWHWHWH)")
    model.add_argument("--padding-tokens", action="store_true", help="DiM's: 3 learned tokens end every row and column")
    model.add_argument("--local-enhancement", action="store_true", help="DiM's: depthwise 3x3 convolutions around the blocks")
    ablation = parser.add_argument_group("--stage kd, the rows of the paper's Table 1; --stage ablate runs them all")
    ablation.add_argument("--seeds", type=int, default=3, help="--stage ablate: how many seeds each row is run with, "
                          "from --seed on (default 3)")
    ablation.add_argument("--init", default="forcing", choices=("scratch", "teacher", "forcing", "llama"), help="what kd starts from: nothing "
                          "(row 'from scratch', with both weights 0), the teacher with fresh Mamba layers ('+ non-Mamba weights'), the "
                          "forcing stage ('+ teacher forcing', the default), the attention's own weights (Mamba-in-the-Llama)")
    ablation.add_argument("--soft-weight", type=float, default=0.5, help="of L_soft (default 0.5; 0 switches it off: before row '+ soft loss')")
    ablation.add_argument("--mixer-weight", type=float, default=0.2, help="of L_mixer (default 0.2; 0: before row '+ token mixer loss')")
    evaluation = parser.add_argument_group("--stage eval")
    evaluation.add_argument("--model", nargs="+", help="checkpoints to score (default: all there are)")
    evaluation.add_argument("--prompts", help="GenEval-format metadata .jsonl (default: held-out records)")
    evaluation.add_argument("--records", type=int, default=552, help="how many held-out records (default 552, 92 of each kind)")
    evaluation.add_argument("--size", type=int, nargs="+", help="pixels of the scored pictures (default: the size each model was last "
                            "trained at); the first also of the buckets of --stage data and of --benchmark (default: the base size)")
    evaluation.add_argument("--upscale", type=int, default=1, metavar="M", help="sample with upsample guidance, at M times a known size")
    evaluation.add_argument("--zero-shot", type=int, metavar="PIXELS",
                            help="adds pictures of the last model at this size to OUT/eval.png; --upscale is then for these alone")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "micro_batch", "save_every", "records", "size", "zero_shot", "seeds", "upscale"):
        if getattr(args, name) is not None and np.min(getattr(args, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.timesteps and not (0 <= args.timesteps[0] < 1000 and 0 < args.timesteps[1] < float("inf")):
        parser.error("--timesteps must be a mean in [0, 1000) and a positive deviation")
    args.out = args.out or CONFIGS[args.config]["out"]
    args.pattern = args.pattern or CONFIGS[args.config]["pattern"]
    return args


def main():
    args = parse_arguments()
    keep_freed_memory()
    if WORLD > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        # a week: others wait while the first process draws, encodes or saves
        dist.init_process_group("nccl" if "cuda" in args.device else "gloo", timeout=datetime.timedelta(days=7))
        if RANK:
            sys.stdout = open(os.devnull, "w")
    try:
        if args.benchmark or args.stage in COMMANDS:
            (run_benchmark if args.benchmark else COMMANDS[args.stage])(args)
        else:
            for stage in [s for s in CHAIN if s in CONFIGS[args.config]["stages"]] if args.stage == "all" else [args.stage]:
                run_stage(stage, args)
    except (OSError, ValueError, ArithmeticError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; the same command continues from the last checkpoint")


if __name__ == "__main__":
    main()
