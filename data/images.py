"""Captioned images: a folder or tar shards -> aspect-ratio buckets, batches of latents and text.

Sections: 1 pictures - 2 batches, from the images or from a cache of latents and features.
Every random draw is a function of (seed, stage, step, index in the global batch).
"""

import concurrent.futures
import functools
import hashlib
import io
import itertools
import os

import numpy as np
import torch
import torch.distributed as dist
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as tables
from PIL import Image, ImageOps
from safetensors.torch import save_file
from tqdm import tqdm

from data.index import RECORD, Strings, load_index, own_tensor, reading
from sample import RANK, WORLD, claim, fingerprint, pad_features, write_atomically

# ----------------------------------------------------------------------------------------------------------
# 1. Pictures
# ----------------------------------------------------------------------------------------------------------


def open_image(file, offset, length):
    """A PIL image, not yet decoded, from `length` bytes of a file."""
    with open(file, "rb") as f:
        f.seek(offset)
        return Image.open(io.BytesIO(f.read(length)))


def to_rgb(image):
    """Any PIL image as RGB: upright (EXIF), 16 bits scaled down, transparency over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray(np.uint8(np.asarray(image).clip(0, 65535) // 257))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_pixels(images):
    """List of equally large PIL images -> (B, 3, h, w) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def aspect_ratios(pixels):
    """The buckets of a base size: {height / width: (height, width)}, from the tables that diffusers ships."""
    shipped = getattr(tables, f"ASPECT_RATIO_{pixels}_BIN", None)
    if shipped:
        return shipped
    scaled = {}
    for ratio, sides in tables.ASPECT_RATIO_1024_BIN.items():
        scaled[ratio] = [max(16, round(side * pixels / 1024 / 16) * 16) for side in sides]
    return scaled


def nearest_buckets(heights, widths, pixels):
    """Sizes of n images -> their buckets', (n, 2); diffusers' classify_height_width_bin, for all at once."""
    table = sorted((float(ratio), sides) for ratio, sides in aspect_ratios(pixels).items())
    ratios = np.array([ratio for ratio, _ in table])
    nearest = np.searchsorted((ratios[1:] + ratios[:-1]) / 2, heights / widths)
    return np.array([sides for _, sides in table], int)[nearest]


# ----------------------------------------------------------------------------------------------------------
# 2. Batches
# ----------------------------------------------------------------------------------------------------------

SHARD = 1000  # entries of a file of the cache
TOGETHER = 2**22  # pixels that the VAE encodes at once: 16 images of 512 x 512


class ImageData:
    """Captioned images in buckets of like aspect ratio, as batches for training.

    Args:
        source: see `find_pieces`.  pixels: base size of the buckets.  folder: where the index is kept.
        vae, text_encoder: None if the images are only looked at.
        cache: None, or a folder: latent moments and caption features are computed once, into it, and both
            parts let go. With a cache and without, it is the middle of an image that is seen.
    Attributes: items (n,) of RECORD, with the bucket's height and width; prompts, theirs; buckets {(height,
    width): numbers of items}; skipped {reason: count}.
    Raises ValueError, saying what was looked for, if nothing is usable; if the cache is of other parts.
    """

    def __init__(self, source, pixels, vae, text_encoder, seed, folder, cache=None):
        self.vae, self.text_encoder, self.cache = vae, text_encoder, cache
        self.pixels, self.seed = pixels, seed
        images, self.files, self.captions, self.skipped = load_index(source, folder)
        sizes = np.stack([images["height"], images["width"]], axis=1)
        buckets = nearest_buckets(*sizes.T, pixels)
        large = (buckets <= 4 * sizes).all(1)
        self.skipped[f"too small to be enlarged to about {pixels} pixels"] += int((~large).sum())
        self.skipped = +self.skipped  # without what never happened
        if not large.any():
            why = ", ".join(f"{count} x {reason}" for reason, count in self.skipped.items()) or "it is empty"
            what = "looked for images with captions, skipped"
            raise ValueError(f"--data {source} has no usable image; {what}: {why}")
        self.items, buckets = images[large], buckets[large]
        self.items["height"], self.items["width"] = buckets.T
        self.prompts = Strings(self.captions.text, self.captions.ends, self.items["caption"])
        self.buckets = {}
        for height, width in sorted(set(map(tuple, aspect_ratios(pixels).values()))):
            members = np.flatnonzero((buckets == (height, width)).all(1))
            if len(members):
                self.buckets[int(height), int(width)] = members
        self.order = functools.lru_cache(maxsize=2)(self.order)
        self.decoders, self.decoding = concurrent.futures.ThreadPoolExecutor(), {}
        if cache:
            claim(cache, dict(vae=fingerprint(vae.source), text_encoder=fingerprint(text_encoder.source)))
            self.fill_cache()
            self.vae = self.text_encoder = None  # nothing asks them any more: they may leave the device

    # which images

    def order(self, epoch, images):
        """The batches of an epoch, [image numbers], each of one bucket: every bucket shuffled, cut into
        batches (the last one filled from its beginning), all batches shuffled."""
        rng, batches = np.random.default_rng([self.seed, epoch]), []
        for members in self.buckets.values():
            count = -(-len(members) // images)
            batches += list(np.resize(rng.permutation(members), count * images).reshape(count, images))
        return [batches[k] for k in rng.permutation(len(batches))]

    def choose(self, turn, indices, images):
        """The images that stand at `indices` of global batch number `turn`, which holds `images`."""
        per_epoch = sum(-(-len(members) // images) for members in self.buckets.values())
        batch = self.order(turn // per_epoch, images)[turn % per_epoch]
        return [int(batch[i]) for i in indices]

    # pictures and what VAE and T5 make of them

    def decode(self, k):
        """Image k, scaled to cover its bucket's size, its middle; or the exception that says it is broken."""
        item = self.items[k]
        try:
            image = to_rgb(open_image(self.files[item["file"]], int(item["offset"]), int(item["length"])))
            return ImageOps.fit(image, (int(item["width"]), int(item["height"])), Image.LANCZOS)
        except Exception as error:
            return error

    def picture(self, k):
        """Image k -> (its number, picture). Where it is broken, the next of its bucket takes its place."""
        item = self.items[k]
        members = self.buckets[int(item["height"]), int(item["width"])]
        first = np.searchsorted(members, k)
        for number in itertools.chain(members[first:], members[:first]):
            picture = self.decode(number)
            if isinstance(picture, Image.Image):
                return int(number), picture
            self.skipped[f"not decodable ({type(picture).__name__})"] += 1
        size = f"{item['width']} x {item['height']}"
        raise ValueError(f"not one image for {size} can be decoded, nor {self.files[item['file']]}")

    def encode(self, pictures):
        """Pictures of one size -> means and standard deviations of their latents, (B, 2, C, h, w)."""
        together = max(1, TOGETHER // (pictures[0].width * pictures[0].height))
        parts = [self.vae.moments(part) for part in to_pixels(pictures).split(together)]
        return torch.cat([torch.stack(part, dim=1).cpu() for part in parts])

    def encode_text(self, captions):
        """List of captions -> their features (B, T, width) and mask (B, T)."""
        features, mask = self.text_encoder(captions)
        return features.float().cpu(), mask.cpu()

    # the cache

    def cached(self, kind, strings, numbers=b""):
        """The path of a shard, named after what is in it: a data set that has grown keeps those it has."""
        digest = hashlib.sha256("\0".join(strings).encode(errors="surrogateescape") + numbers).hexdigest()
        return os.path.join(self.cache, f"{kind}-{digest[:16]}.safetensors")

    def shards(self):
        """All shards of this data set, [(path, range of captions)] and [(path, numbers of images)]."""
        texts, images = [], []
        for start in range(0, len(self.captions), SHARD):
            part = range(start, min(start + SHARD, len(self.captions)))
            texts.append((self.cached("text", map(self.captions.__getitem__, part)), part))
        for members in self.buckets.values():
            for part in np.split(members, range(SHARD, len(members), SHARD)):
                numbers = b"".join(self.items[name][part].tobytes() for name in RECORD.names[2:])
                files = map(self.files.__getitem__, self.items["file"][part])
                images.append((self.cached(f"{self.pixels}px", files, numbers), part))
        return texts, images

    def fill_cache(self):
        """Compute the shards that the cache lacks, this process's share of them. What is there stays, so a
        run that was cut off goes on. Images that turn out to be broken leave the data set."""
        texts, images = self.shards()
        kinds = (self.write_text, texts, "captions"), (self.write_moments, images, "images")
        for write, shards, what in kinds:
            missing = [shard for shard in shards[RANK::WORLD] if not os.path.exists(shard[0])]
            total = sum(len(part) for _, part in missing)
            doing = f"encoding {what} into {self.cache}"
            with tqdm(total=total, desc=doing, disable=RANK > 0 or not total) as bar:
                for path, part in missing:
                    write(path, part, bar.update)
        if WORLD > 1:
            dist.barrier()
        self.texts = []
        for path, part in texts:
            with reading(path) as file:
                ends = own_tensor(file, "ends", torch.int64, len(part) + 1)
                tokens = own_tensor(file, "features", torch.half, None, self.text_encoder.width)
            self.texts.append((tokens, ends))
        self.moments, self.place, broken = [], np.zeros((len(self.items), 2), int), []
        for path, part in images:
            with reading(path) as file:
                moments = own_tensor(file, "moments", torch.half, len(part), *self.latent_shape(part))
                broken.extend(part[~own_tensor(file, "whole", torch.bool, len(part)).numpy()])
            self.place[part, 0], self.place[part, 1] = len(self.moments), np.arange(len(part))
            self.moments.append(moments)
        if broken:
            self.skipped["not decodable"] += len(broken)
            kept = {bucket: np.setdiff1d(members, broken) for bucket, members in self.buckets.items()}
            self.buckets = {bucket: members for bucket, members in kept.items() if len(members)}
        if not self.buckets:
            raise ValueError("not one of the images can be decoded")

    def write_text(self, path, part, progress):
        """A shard of features: (tokens of all captions, width), and where each caption begins and ends."""
        features = []
        for start in range(part.start, part.stop, 16):
            captions = [self.captions[n] for n in range(start, min(start + 16, part.stop))]
            for feature, mask in zip(*self.encode_text(captions)):
                features.append(feature[mask.bool()].half())
            progress(len(captions))
        ends = torch.tensor([0, *map(len, features)]).cumsum(0)
        write_atomically(path, functools.partial(save_file, dict(features=torch.cat(features), ends=ends)))

    def latent_shape(self, part):
        """Of the moments of images of one bucket: (2, C, h, w)."""
        height, width = (int(self.items[name][part[0]]) // self.vae.factor for name in ("height", "width"))
        return 2, self.vae.channels, height, width

    def write_moments(self, path, part, progress):
        """A shard of moments (n, 2, C, h, w), and which images are whole; decoded 16 ahead of the VAE."""
        moments = torch.zeros(len(part), *self.latent_shape(part), dtype=torch.half)
        whole = torch.zeros(len(part), dtype=torch.bool)
        coming = self.decoders.map(self.decode, part[:16])
        for start in range(0, len(part), 16):
            pictures, coming = list(coming), self.decoders.map(self.decode, part[start + 16 : start + 32])
            rows = [k for k, picture in enumerate(pictures) if isinstance(picture, Image.Image)]
            if rows:
                moments[start:][rows] = self.encode([pictures[k] for k in rows]).half()
                whole[start:][rows] = True
            progress(len(pictures))
        write_atomically(path, functools.partial(save_file, dict(moments=moments, whole=whole)))

    # batches

    def fetch(self, turn, indices, images):
        """The images at `indices` of batch `turn` -> their numbers, and their moments (B, 2, C, h, w)."""
        numbers = self.choose(turn, indices, images)
        if self.cache:
            kept = [self.moments[shard][row].float() for shard, row in self.place[numbers]]
            return numbers, torch.stack(kept)
        following = self.choose(turn + 1, indices, images)  # decoded while the network works on this turn
        for key, k in zip(itertools.product((turn, turn + 1), indices), numbers + following):
            if key not in self.decoding:
                self.decoding[key] = self.decoders.submit(self.picture, k)
        numbers, pictures = zip(*(self.decoding.pop((turn, i)).result() for i in indices))
        return numbers, self.encode(pictures)

    def text_of(self, numbers):
        """Numbers of captions -> features (B, T, width) and mask (B, T)."""
        if not self.cache:
            return self.encode_text([self.captions[n] for n in numbers])
        features = []
        for shard, row in (divmod(n, SHARD) for n in numbers):
            tokens, ends = self.texts[shard]
            features.append(tokens[ends[row] : ends[row + 1]].float())
        return pad_features(features)

    def batch(self, turn, indices, images, generators, timesteps=None, drop=0.1):
        """Samples `indices` of global batch number `turn`, of `images` samples, a torch.Generator for each
        -> dict of latents z0 and noise (B, C, h, w), t (B,), text (B, T, width), mask (B, T).

        timesteps: uniform, or (mean, deviation) of a normal distribution cut to [0, 1000).
        A caption is dropped (replaced by the empty one) with probability `drop`, for guidance.
        """
        numbers, moments = self.fetch(turn, indices, images)
        mean, std = moments.unbind(1)
        captions, t, z0, noise = [], [], [], []
        for k, g in zip(numbers, generators):
            captions.append(0 if torch.rand((), generator=g) < drop else int(self.items["caption"][k]))
            if timesteps is None:
                t.append(torch.randint(1000, (), generator=g))
            else:
                t.append((timesteps[0] + timesteps[1] * torch.randn((), generator=g)).clamp(0, 999).long())
            z0.append(torch.randn(mean.shape[1:], generator=g))
            noise.append(torch.randn(mean.shape[1:], generator=g))
        text, mask = self.text_of(captions)
        z0 = mean + std * torch.stack(z0)
        return dict(z0=z0, noise=torch.stack(noise), t=torch.stack(t), text=text, mask=mask)
