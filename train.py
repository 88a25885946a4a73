"""Train T2MD: one script, stages by flag. With no data and no GPU it runs on the embedded world, "shapes".

    python train.py --stage kd           # from the shipped teacher: forcing first if there is none yet, then kd
    python train.py --stage all          # the whole chain from no weights at all
    python train.py --stage eval         # the six GenEval-type scores of teacher and students, beside each other

    stage     starts from   trains                    loss           size (x base)
    teacher   nothing       VAE, T5, then the DiT     their own      1
    forcing   teacher       Mamba layers              equation 6     1
    kd        forcing       all token mixers          equation 11    1
    adapt     kd            everything                equation 8     1      (new embedding, schedule, VAE, T5)
    hires1    adapt         everything                equation 8     2 (80%), 1 (20%)
    hires2    hires1        everything                equation 8     4

Each stage writes OUT/STAGE: config.json and safetensors (EMA weights, what sample.py and diffusers load),
training_state.pt (what a restart needs), log.jsonl (a line a step) and pictures, teacher above student.

Sections: 1 the shapes world - 2 configurations - 3 data - 4 VAE and T5 of the shapes world - 5 training -
6 evaluation - 7 command line.
"""

import argparse
import contextlib
import copy
import ctypes
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from sample import component_path, generate, load_denoiser, load_parts, read_prompts
from t2md import T2MD, VAE, MambaMixer, TextEncoder, forcing_loss, kd_loss, mse_loss, predict_noise

HERE = os.path.dirname(os.path.abspath(__file__))
CHAIN = ("teacher", "forcing", "kd", "adapt", "hires1", "hires2")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun

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

# steps; batch_size (images of base size; larger images come in batches smaller by their area); lr, and mamba_lr for
# the Mamba layers where it differs; clip (gradient norm); sizes {multiple of the base size: share of the batches};
# decay (share of the steps over which the rate falls to zero); timesteps (see ShapesData.batch); pictures (of the
# shapes world: how many are drawn and encoded, per size); save_every
PIXART = dict(batch_size=256, lr=2e-5, clip=0.01, weight_decay=0.03, eps=1e-10, betas=(0.9, 0.999), warmup=1000, decay=0.0,
              muon=False, sizes={1: 1.0}, pictures=20_000, save_every=1000)
TOY = dict(clip=1.0, weight_decay=0.0, eps=1e-8, betas=(0.9, 0.99), warmup=50, decay=0.4, muon=True, sizes={1: 1.0},
           pictures=20_000, save_every=500)
CONFIGS = {
    "shapes": dict(
        out="runs/shapes", teacher="assets/teacher", adapt={}, base_pixels=128, pattern="SHWHWHW", ema=0.9999, checkpointing=False,
        save_dtype=torch.float16,  # all weights shipped in assets/ stay under 20 MB; training goes on in float32
        model=dict(width=128, heads=4, caption_width=64, d_state=32, head_dim=32, chunk_size=32, sample_size=16),
        stages=dict(
            vae=TOY | dict(steps=2500, batch_size=16, lr=2e-3, decay=0.5, muon=False),
            text_encoder=TOY | dict(steps=1500, batch_size=128, lr=2e-3, muon=False),
            teacher=TOY | dict(steps=7500, batch_size=64, lr=4e-3, decay=0.6, timesteps=(580, 230)),
            forcing=TOY | dict(steps=1200, batch_size=16, lr=2e-2, warmup=10, pictures=5_000),
            kd=TOY | dict(steps=1300, batch_size=32, lr=4e-3, pictures=5_000),
            adapt=TOY | dict(steps=1500, batch_size=32, lr=2e-3, timesteps=(680, 220), pictures=8_000),
            hires1=TOY | dict(steps=600, batch_size=32, lr=1e-3, timesteps=(740, 200), sizes={2: 0.8, 1: 0.2}, pictures=4_000),
            hires2=TOY | dict(steps=300, batch_size=32, lr=5e-4, timesteps=(800, 180), sizes={4: 1.0}, pictures=1_000),
        ),
    ),
    "t2md": dict(  # the paper's; its optimiser is not given, so PixArt-alpha's own is used
        out="runs/t2md", teacher="PixArt-alpha/PixArt-XL-2-512x512", base_pixels=512, pattern="SHWHWHW" * 4, ema=0.9999,
        adapt=dict(vae="stabilityai/sdxl-vae", text_encoder="google/flan-t5-xxl"), checkpointing=True, save_dtype=torch.float32,
        stages=dict(
            forcing=PIXART | dict(steps=20_000, lr=1e-4, clip=1.0),
            kd=PIXART | dict(steps=180_000, mamba_lr=1e-4, clip=0.1),
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


class ShapesData:
    """Captioned pictures of the shapes world, encoded once: latent moments and caption features in memory.

    Picture k is drawn from (seed, k). The moments are kept in `folder` under a name made of everything they
    depend on, so that a restart finds them.
    """

    def __init__(self, pixels, count, vae, text_encoder, seed, folder):
        draws = [np.random.default_rng([seed, pixels, k]) for k in range(count)]
        records = [training_record(rng) for rng in draws]
        self.prompts = [record["prompt"] for record in records]
        weights = b"".join(p.detach().cpu().float().numpy().tobytes() for p in vae.model.parameters())
        name = hashlib.sha256(weights + f"{pixels}/{count}/{seed}".encode()).hexdigest()[:16]
        path = os.path.join(folder, f"{pixels}px-{count}-{name}.safetensors")
        with rank_zero_first():
            if not os.path.exists(path):
                moments = []
                size = max(1, 32 * 128**2 // pixels**2)
                for start in tqdm(range(0, count, size), desc=f"drawing and encoding {count} pictures of {pixels} px"):
                    chunk = slice(start, start + size)
                    images = [draw_shapes(record, pixels, rng) for record, rng in zip(records[chunk], draws[chunk])]
                    moments.append(torch.stack(vae.moments(to_pixels(images)), dim=1).half())
                os.makedirs(folder, exist_ok=True)
                save_file({"moments": torch.cat(moments)}, path + ".tmp")
                os.replace(path + ".tmp", path)
        self.moments = load_file(path)["moments"]  # (count, 2, C, h, w): mean and standard deviation
        captions = sorted({"", *self.prompts})
        features, mask = text_encoder(captions)
        self.features, self.mask = features.float().cpu(), mask.cpu()
        self.row = {caption: i for i, caption in enumerate(captions)}

    def batch(self, generators, timesteps=None, drop=0.1):
        """One sample per generator -> dict of latents z0 and noise (B, C, h, w), t (B,), text (B, T, width), mask.

        timesteps: uniform, or (mean, deviation) of a normal distribution cut to [0, 1000).
        A caption is dropped (replaced by the empty one) with probability `drop`, for classifier-free guidance.
        """
        z0, noise, t, rows = [], [], [], []
        for g in generators:
            k = int(torch.randint(len(self.prompts), (), generator=g))
            rows.append(self.row["" if torch.rand((), generator=g) < drop else self.prompts[k]])
            if timesteps is None:
                t.append(torch.randint(1000, (), generator=g))
            else:
                t.append((timesteps[0] + timesteps[1] * torch.randn((), generator=g)).clamp(0, 999).long())
            mean, std = self.moments[k].float()
            z0.append(mean + std * torch.randn(mean.shape, generator=g))
            noise.append(torch.randn(mean.shape, generator=g))
        mask = self.mask[rows]
        length = int(mask.sum(1).max())
        text, mask = self.features[rows][:, :length], mask[:, :length]
        return dict(z0=torch.stack(z0), noise=torch.stack(noise), t=torch.stack(t), text=text, mask=mask)


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

    def __init__(self, network, plan):
        fresh = {id(p) for m in network.modules() if isinstance(m, MambaMixer) for p in m.parameters()}
        matrices, groups = {}, {}
        for name, p in network.named_parameters():
            if p.requires_grad:
                lr = plan.get("mamba_lr", plan["lr"]) if id(p) in fresh else plan["lr"]
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
        copy.deepcopy(model)._apply(lambda w: w.to(dtype)).save_pretrained(temporary)
    except SafetensorError as error:
        raise OSError(f"{folder} could not be written ({error}); what was there is as it was") from error
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(temporary):
        os.replace(os.path.join(temporary, name), os.path.join(folder, name))
    os.rmdir(temporary)


def saved_step(folder):
    """(steps done, steps planned) of the training in `folder`; (0, None) if there is none. Raises ValueError if unreadable."""
    path = os.path.join(folder, "training_state.pt")
    if not os.path.exists(path):
        return 0, None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state["step"], state["steps"]
    except Exception as error:
        reason = f"is no readable training state ({type(error).__name__}); move it away to train this stage again"
        raise ValueError(f"{path} {reason}") from error


def fit(stage, folder, network, loss_terms, plan, args, export, show=None, images=None):
    """The training loop of every network here: resumes, logs, keeps an EMA, saves atomically.

    Args:
        network: what is trained; parameters that require no gradient stay as they are.
        loss_terms: see `gradient_parts`.  images: images(step), of the global batch; the plan's batch_size if not given.
        export: export(folder), called while `network` holds the EMA weights, writes the model files.
        show: show(path), likewise, draws pictures; called at every save.
    Under torchrun every process holds the whole network and takes its share of each batch; the first one writes.
    SIGTERM saves after the step it comes in, and exits.
    Raises FloatingPointError after ten steps in a row whose loss was not finite.
    """
    state_path, log_path = os.path.join(folder, "training_state.pt"), os.path.join(folder, "log.jsonl")
    optimizer = Optimizer(network, plan)
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
        state = dict(step=step, steps=plan["steps"], network=network.state_dict(), ema=ema.state_dict(),
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
        for name in ("steps", "batch_size", "lr", "save_every"):
            if getattr(args, name) is not None:
                plan[name] = getattr(args, name)
        if args.lr is not None:
            plan["mamba_lr"] = args.lr
    return plan


def finished(folder):
    """Has the training in `folder` done all the steps it was planned for?"""
    done, planned = saved_step(folder)
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


def trainable(stage, model):
    """The modules a stage trains: forcing Mamba layers, kd all token mixers, otherwise everything."""
    mixers = [block.mixer for block in model.blocks]
    return {"forcing": [m for m in mixers if isinstance(m, MambaMixer)], "kd": mixers}.get(stage, [model])


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
    if before == "teacher":
        return teacher_folder(args)
    folder = os.path.join(args.out, before)
    if not finished(folder):
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
        if stage == "forcing":
            overrides = dict(pattern=args.pattern)
        if stage == "adapt":
            overrides = dict(pos_embed="centered", beta_schedule="scaled_linear")
            parts = {name: adapted_component(name, args) for name in ("vae", "text_encoder")}
        torch.manual_seed(zlib.crc32(f"{args.seed}/{stage}".encode()))
        model = T2MD.from_pixart(before, **overrides)
        parts = parts or {name: component_path(before, model.config[name]) for name in ("vae", "text_encoder")}
    model.register_to_config(**{name: os.path.relpath(path, folder) if os.path.isdir(path) else path for name, path in parts.items()})
    return model


def adapted_component(name, args):
    """The VAE or text encoder that adapt swaps in: the config's; in the shapes world of the teacher's own origin."""
    if name in CONFIGS[args.config]["adapt"]:
        return CONFIGS[args.config]["adapt"][name]
    shipped = os.path.join(HERE, "assets", f"{name}_adapt")
    own_teacher = os.path.isdir(os.path.join(args.out, "teacher"))
    return shipped if os.path.isdir(shipped) and not own_teacher else make_component(f"{name}_adapt", args)


def stage_terms(stage, model, teacher, schedule, batch, backward):
    """One step's forward and backward pass on a batch of ShapesData -> {name: detached term}."""
    t, noise, text, mask = batch["t"], batch["noise"], batch["text"], batch["mask"]
    z_t = schedule.add_noise(batch["z0"], noise, t)
    if stage == "forcing":
        return dict(forcing=forcing_loss(model, teacher, z_t, t, text, mask, backward))
    if stage == "kd":
        loss, terms = kd_loss(model, teacher, z_t, t, text, mask, noise)
    elif stage == "teacher":
        # not the paper's: errors weigh 1 / sqrt(SNR), or what is where and which colour is whose is learned last
        alpha_bar = schedule.alphas_cumprod.to(t.device)[t]
        error = (predict_noise(model, z_t, t, text, mask).float() - noise).square().mean((1, 2, 3))
        loss, terms = ((alpha_bar / (1 - alpha_bar)).rsqrt().clamp(1.0, 8.0) * error).mean(), dict(mse=error.mean().detach())
    else:
        loss = mse_loss(noise, predict_noise(model, z_t, t, text, mask))
        terms = dict(mse=loss.detach())
    backward(loss)
    return terms


def run_stage(stage, args):
    """Run or continue one stage, and before it whatever it needs; returns its folder."""
    config = CONFIGS[args.config]
    if stage not in config["stages"]:
        raise ValueError(f"--config {args.config} trains no {stage}: it starts from {config['teacher']}, or give --teacher")
    folder, plan = os.path.join(args.out, stage), plan_for(stage, args)
    done, _ = saved_step(folder)
    if done >= plan["steps"]:
        print(f"{stage} is finished: {done} steps, its model is in {folder}")
        return folder

    model = start_model(stage, args, folder).to(args.device)
    if config["checkpointing"]:
        model.enable_gradient_checkpointing()
    model.requires_grad_(False)
    for module in trainable(stage, model):
        module.requires_grad_(True)
    vae, text_encoder = load_parts(model, folder, args.device)
    teacher = load_denoiser(teacher_folder(args), args.device) if stage in ("forcing", "kd") else None
    schedule = DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2, beta_schedule=model.config.beta_schedule)
    sizes, shares, base = list(plan["sizes"]), list(plan["sizes"].values()), config["base_pixels"]
    count = min(plan["pictures"], plan["steps"] * plan["batch_size"])
    data = {m: ShapesData(m * base, count, vae, text_encoder, args.seed, os.path.join(args.out, "cache")) for m in sizes}

    def multiple(step):
        return sizes[int(torch.multinomial(torch.tensor(shares), 1, generator=draw(args.seed, stage, step, -1)))]

    def loss_terms(step, indices, backward):
        batch = data[multiple(step)].batch([draw(args.seed, stage, step, i) for i in indices], plan.get("timesteps"))
        return stage_terms(stage, model, teacher, schedule, {k: v.to(args.device) for k, v in batch.items()}, backward)

    examples = heldout_records(12, args.seed)

    @functools.lru_cache(maxsize=None)
    def upper_row():
        if stage == "teacher":  # it has no teacher: beside it, what is asked for
            return [draw_shapes(record, base, np.random.default_rng(k)) for k, record in enumerate(examples)]
        original = teacher or load_denoiser(teacher_folder(args), args.device)
        parts = (vae, text_encoder) if teacher else load_parts(original, teacher_folder(args), args.device)
        return sample_records(original, *parts, examples, base)

    def show(path):
        grid = side_by_side(upper_row(), sample_records(model, vae, text_encoder, examples, base))
        write_atomically(path, lambda path: grid.save(path, format="PNG"))

    fit(stage, folder, model, loss_terms, plan, args, lambda folder: save_model(model, folder, config["save_dtype"]), show,
        images=lambda step: max(1, plan["batch_size"] // multiple(step) ** 2))
    print(f"{stage}: {plan['steps']} steps done, the model is in {folder}")
    return folder


# ----------------------------------------------------------------------------------------------------------
# 6. Evaluation
# ----------------------------------------------------------------------------------------------------------


def sample_records(model, vae, text_encoder, records, pixels, seed=0, batch=32, **how):
    """One picture for each record, image k from the noise of seed + k -> list of PIL images."""
    images = []
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


def run_eval(args):
    """Score checkpoints beside each other, on held-out records or --prompts; prints a table, writes OUT/eval.json
    and OUT/eval.png, a row of pictures for each model and, with --zero-shot, one more of the last at that size."""
    made = [os.path.join(args.out, stage) for stage in CHAIN]
    shipped = [os.path.join(HERE, "assets", name) for name in ("teacher", "student")]
    folders = args.model or [f for f in (*shipped, *made) if os.path.exists(os.path.join(f, "config.json"))]
    if not folders:
        raise ValueError(f"there is no checkpoint to score in {args.out}; name one with --model")
    records = read_prompts(args.prompts) if args.prompts else heldout_records(args.records, args.seed)
    if not all(r.get("tag") in TAGS and r.get("include") for r in records):
        raise ValueError(f"{args.prompts} must hold GenEval-format records: each with a tag of {', '.join(TAGS)}, and include")
    pixels, results, rows = args.size or CONFIGS[args.config]["base_pixels"], {}, []
    print(f"{len(records)} records at {pixels} px, 20 steps, guidance 4.5, seed {args.seed}")
    print("".join(f"{name:>14}" for name in (*TAGS, "overall")) + "  model")
    for folder in folders:
        model = load_denoiser(folder, args.device)
        parts = load_parts(model, folder, args.device)
        images = sample_records(model, *parts, records, pixels, args.seed)
        results[folder] = scores = evaluate(images, records)
        print("".join(f"{scores.get(name, float('nan')):14.3f}" for name in (*TAGS, "overall")) + f"  {folder}", flush=True)
        rows.append(images[:12])
    if args.zero_shot:
        large = sample_records(model, *parts, records[:12], args.zero_shot, args.seed, batch=1)
        rows.append([image.resize((pixels, pixels), Image.BOX) for image in large])
    write_atomically(os.path.join(args.out, "eval.json"), lambda path: open(path, "w").write(json.dumps(results, indent=1)))
    write_atomically(os.path.join(args.out, "eval.png"), lambda path: side_by_side(*rows).save(path, format="PNG"))


# ----------------------------------------------------------------------------------------------------------
# 7. Command line
# ----------------------------------------------------------------------------------------------------------


def keep_freed_memory():
    """Tell glibc to keep what tensors free: handing it back costs page faults, a sixth of a step on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its highest
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def parse_arguments(argv=None):
    epilog = ["defaults of each stage, by config:"]
    for config, settings in CONFIGS.items():
        for stage, plan in settings["stages"].items():
            epilog.append(f"  {config:7} {stage:13}" + ", ".join(f"{k} {v}" for k, v in plan.items()))
    parser = argparse.ArgumentParser(description=__doc__, epilog="\n".join(epilog),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, choices=(*CHAIN, "all", "eval"),
                        help="what to run; what it starts from is run first if it is missing")
    parser.add_argument("--config", default="shapes", choices=CONFIGS,
                        help="shapes, the embedded world (default), or t2md, the paper's model from PixArt-alpha")
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
    stage.add_argument("--save-every", type=int, help="steps between checkpoints")
    model = parser.add_argument_group("models")
    model.add_argument("--teacher", help="the teacher's folder (default: the one trained in OUT, else the shipped one); "
                       "with --stage teacher, one to train further")
    model.add_argument("--pattern", help="the student's mixers, a letter a block out of S H W > < v ^")
    evaluation = parser.add_argument_group("--stage eval")
    evaluation.add_argument("--model", nargs="+", help="checkpoints to score (default: all there are)")
    evaluation.add_argument("--prompts", help="GenEval-format metadata .jsonl (default: held-out records)")
    evaluation.add_argument("--records", type=int, default=552, help="how many held-out records (default 552, 92 of each kind)")
    evaluation.add_argument("--size", type=int, help="pixels of the scored pictures (default: the base size)")
    evaluation.add_argument("--zero-shot", type=int, metavar="PIXELS",
                            help="adds pictures of the last model at this size to OUT/eval.png")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "micro_batch", "save_every", "records", "size", "zero_shot"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
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
        if args.stage == "eval":
            run_eval(args)
        else:
            for stage in [s for s in CHAIN if s in CONFIGS[args.config]["stages"]] if args.stage == "all" else [args.stage]:
                run_stage(stage, args)
    except (OSError, ValueError, ArithmeticError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; the same command continues from the last checkpoint")


if __name__ == "__main__":
    main()
