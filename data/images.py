"""Aspect-ratio buckets of captioned images; batches of latents and text, from the images or from a cache.

    python -m data.images SOURCE [--size 512]   # what is in a data set: buckets, what is skipped and why

Every random draw is a function of (seed, stage, step, index in the global batch).
Sections: 1 how an image looks - 2 buckets - 3 the cache's files - 4 ImageData - 5 batches ahead - 6 command.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import json
import os
import threading
import zlib

import numpy as np
import torch
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as tables
from PIL import Image, ImageCms, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from data import files
from data.index import FORMATS, Index, progress
from t2md import load_part

# -- 1. how an image looks -----------------------------------------------------------------------------------


def to_rgb(image):
    """Return any PIL image as a person sees it: upright, in sRGB by its colour profile, over white.

    16 bits, and floats up to 1 or up to 255, are scaled to 8 bits.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # integers of 16 or 32 bits, floats
        grey = np.nan_to_num(np.asarray(image, np.float32))
        if image.mode[0] == "I":
            grey = grey / 257
        elif grey.max() <= 1:
            grey = grey * 255
        image = Image.fromarray(np.uint8(grey.clip(0, 255)))
    alpha = None
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
    if image.mode != "CMYK":  # whose profile is for its own four colours
        image = image.convert("RGB")
    # There may be no profile, or one that cannot be read, or one of other colours.
    with contextlib.suppress(ImageCms.PyCMSError, OSError, KeyError):
        profile = io.BytesIO(image.info["icc_profile"])
        image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    image = image.convert("RGB")
    if alpha is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def to_pixels(images):
    """Turn a list of equally large PIL images into pixels in [-1, 1], (b, 3, height, width)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


# -- 2. buckets ----------------------------------------------------------------------------------------------


def aspect_ratios(pixels, multiple=16, ratios=None):
    """Return the buckets of a base size, {name, about height / width: (height, width)} in pixels.

    They are the tables that diffusers ships, scaled for sizes that it has none for.
    multiple: sides are multiples of it, such as VAE factor x patch size.
    ratios: the names of those that are used, such as ("1.0",) for squares alone; None: all.
    """
    table = getattr(tables, f"ASPECT_RATIO_{pixels}_BIN", None)
    scale = 1.0
    if table is None:
        table = tables.ASPECT_RATIO_1024_BIN
        scale = pixels / 1024
    buckets = {}
    for name in ratios or table:
        height, width = (max(1, round(scale * side / multiple)) * multiple for side in table[name])
        buckets[name] = (height, width)
    return buckets


def nearest_buckets(heights, widths, pixels, multiple=16, ratios=None):
    """Return the bucket of each of n images, (n, 2): what diffusers' classify_height_width_bin chooses."""
    buckets = aspect_ratios(pixels, multiple, ratios)
    table = sorted((float(name), sides) for name, sides in buckets.items())
    names = np.array([name for name, _ in table])
    sides = np.array([sides for _, sides in table], np.int32)
    halfway = (names[1:] + names[:-1]) / 2
    return sides[np.searchsorted(halfway, heights / widths)]


# -- 3. the cache's files ------------------------------------------------------------------------------------

SHARD = 1000  # entries of a file
OPEN = 20_000  # files kept mapped at once; Linux allows 65,530 maps


class Packed:
    """Tensors in half precision, numbered, a thousand a file, which are read by memory map.

    A file holds `values`, all its tensors joined along their first axis; `offsets`, where each begins, and
    the end; and `seen`, the number of the image or caption that each was really made of.
    name: of the files; it must stand for all that the tensors depend on.  count: how many tensors there are.
    """

    def __init__(self, folder, name, count):
        self.prefix = os.path.join(folder, name)
        self.count = count
        self.opened = {}

    def path(self, k):
        """Return the path of the file that tensor k is in."""
        return f"{self.prefix}-{k // SHARD:05}.safetensors"

    def missing(self):
        """Return the number ranges of the files that are not there: this process's share of them."""
        starts = range(0, self.count, SHARD)[files.RANK :: files.WORLD]
        return [range(k, min(k + SHARD, self.count)) for k in starts if not os.path.exists(self.path(k))]

    def write(self, first, entries):
        """Write the file that begins with number `first`.  entries: its [(seen, tensor)]."""
        lengths = [len(tensor) for _, tensor in entries]
        packed = dict(
            values=torch.cat([tensor.half() for _, tensor in entries]),
            offsets=torch.tensor(list(itertools.accumulate(lengths, initial=0))),
            seen=torch.tensor([seen for seen, _ in entries]),
        )
        files.write_atomically(self.path(first), lambda temporary: save_file(packed, temporary))

    def open(self, path):
        """Map a file into memory and return its three tensors.  Raises ValueError if it is damaged."""
        try:
            with safe_open(path, "pt") as file:  # its tensors are views of the map
                return [file.get_tensor(name) for name in ("values", "offsets", "seen")]
        except Exception as error:  # a SafetensorError does not name the file
            raise ValueError(f"{path} is damaged ({error}); remove it, and it is made again") from error

    def get(self, k):
        """Return (seen, tensor) of a number; the tensor is in half precision, and read when it is used."""
        path = self.path(k)
        shard = self.opened.get(path)
        if shard is None:
            if len(self.opened) >= OPEN:
                self.opened.clear()
            shard = self.open(path)
            self.opened[path] = shard
        values, offsets, seen = shard
        start, end = offsets[k % SHARD : k % SHARD + 2].tolist()
        return int(seen[k % SHARD]), values[start:end]


# -- 4. ImageData --------------------------------------------------------------------------------------------


class ImageData:
    """Captioned images in buckets of like aspect ratio, as batches for training.

    source: see data/README.md.  pixels: base size of the buckets.  multiple: see `aspect_ratios`.
    vae, text_encoder: None if the images are only looked at.
    cache: None, or a folder: moments and caption features come from there, once `fill_cache` has made them.
    enlarge: an image that would have to be enlarged more than so many times is skipped.
    ratios: see `aspect_ratios`; an image is cut to the nearest.
    Attributes: buckets: {(height, width): numbers of images}.  skipped: {reason: count}.
    digest: the name of what the images and captions are, wherever they lie.
    Raises ValueError, saying what was looked for, if nothing is usable.
    """

    # fmt: off
    def __init__(self, source, pixels, vae, text_encoder, seed, cache=None,
                 multiple=16, enlarge=2.0, ratios=None):
        # fmt: on
        self.vae = vae
        self.text_encoder = text_encoder
        self.pixels = pixels
        self.seed = seed
        self.index = Index(source)
        self.digest = self.index.digest
        self.skipped = self.index.skipped
        self.fill_buckets(source, multiple, enlarge, ratios)
        self.decoders = concurrent.futures.ThreadPoolExecutor()
        self.lock = threading.Lock()
        self.broken = set()  # numbers of images that could not be decoded
        self.cached = cache is not None
        if self.cached:
            files.make_folder(cache)
            of_t5 = files.fingerprint(text_encoder.source, "text_encoder")
            of_vae = files.fingerprint(vae.source, "vae")
            of_captions = [self.digest, of_t5, text_encoder.max_length]
            of_images = [self.digest, of_vae, pixels, multiple, float(enlarge), ratios]
            captions = cache_name("captions", of_captions)
            images = cache_name(f"{pixels}px", of_images)
            self.cached_captions = Packed(cache, captions, self.index.caption_count)
            self.cached_images = Packed(cache, images, len(self.rows))

    def fill_buckets(self, source, multiple, enlarge, ratios):
        """Number the images that are large enough, and sort them into buckets."""
        images = self.index.images
        heights = images[:, 0]
        widths = images[:, 1]
        sizes = nearest_buckets(heights, widths, self.pixels, multiple, ratios)
        large = (sizes[:, 0] <= enlarge * heights) & (sizes[:, 1] <= enlarge * widths)
        small = len(images) - int(large.sum())
        if small:
            limit = f"more than {enlarge:g} times for {self.pixels} pixels"
            self.skipped[f"too small: would have to be enlarged {limit}"] = small
        if small == len(images):
            what = "metadata.jsonl or .csv, images with a .txt beside each, or tar shards"
            raise ValueError(f"{source} has no usable image; looked for {what}, skipped {dict(self.skipped)}")
        self.rows = np.flatnonzero(large).astype(np.int32)  # number of an image here -> its row of the index
        self.caption_numbers = images[large, 2]
        self.sizes = sizes[large].astype(np.int16)
        self.buckets = {}
        for height, width in sorted(set(aspect_ratios(self.pixels, multiple, ratios).values())):
            members = np.flatnonzero((self.sizes[:, 0] == height) & (self.sizes[:, 1] == width))
            if len(members):
                self.buckets[height, width] = members.astype(np.int32)

    def order(self, batch_size, stage):
        """Yield batches without end: each is a list of image numbers of one bucket.

        The order is a function of seed, stage and epoch. In an epoch every image comes once; images that are
        too few for a batch of their bucket come first in the next epoch.
        """
        left = {bucket: np.zeros(0, np.int32) for bucket in self.buckets}
        for epoch in itertools.count():
            rng = np.random.default_rng([self.seed, zlib.crc32(f"order/{stage}".encode()), epoch])
            batches = []
            for bucket, members in self.buckets.items():
                stream = np.concatenate([left[bucket], rng.permutation(members)])
                whole = len(stream) // batch_size * batch_size
                batches.append(stream[:whole].reshape(-1, batch_size))
                left[bucket] = stream[whole:]
            batches = np.concatenate(batches)
            for k in rng.permutation(len(batches)):
                yield batches[k].tolist()

    def caption(self, k):
        """Return the caption of image k."""
        return self.index.caption(self.caption_numbers[k])

    def substitutes(self, k):
        """Yield image k, then the others of its bucket from there on, then all images."""
        height, width = self.sizes[k].tolist()
        members = self.buckets[height, width]
        place = int(np.searchsorted(members, k))
        for step in range(len(members)):
            yield int(members[(place + step) % len(members)])
        yield from range(len(self.rows))

    def picture(self, k):
        """Return (the number of the image seen, its middle scaled to cover image k's bucket).

        The image seen is k, or where that is broken the first of its substitutes that is not. A file that
        cannot be read ends the run: a drive that fails for a minute must not change what a cache holds.
        """
        height, width = self.sizes[k].tolist()
        for number in self.substitutes(k):
            content = self.index.bytes_of(self.rows[number])
            try:
                image = to_rgb(Image.open(io.BytesIO(content), formats=FORMATS))
                return number, ImageOps.fit(image, (width, height), Image.LANCZOS)
            except Exception as error:  # decoders raise anything
                with self.lock:
                    if number not in self.broken:
                        self.broken.add(number)
                        self.skipped[f"not decodable ({type(error).__name__})"] += 1
        raise ValueError(f"not one of {len(self.rows)} images can be decoded")

    def fill_cache(self):
        """Compute the files that the cache lacks, this process's share; a run that was cut off goes on.

        Both encoders' weights are let go then: nothing asks them any more.
        """
        if not self.cached:
            return
        kinds = [
            (self.cached_captions, self.encode_captions, "captions", self.text_encoder),
            (self.cached_images, self.encode_images, f"images of {self.pixels} px", self.vae),
        ]
        for packed, encode, what, part in kinds:
            missing = packed.missing()
            if missing:
                for numbers in progress(missing, f"encoding {what}"):
                    entries = []
                    for k in range(0, len(numbers), 16):
                        entries.extend(encode(numbers[k : k + 16]))
                    packed.write(numbers[0], entries)
            part.unload()
        files.wait_for_all()

    def encode_captions(self, numbers):
        """Encode captions. Return [(number, features of its tokens (s, width))]."""
        features, mask = self.text_encoder([self.index.caption(n) for n in numbers])
        return [(n, features[i, mask[i].bool()].cpu()) for i, n in enumerate(numbers)]

    def encode_images(self, numbers):
        """Encode images. Return [(number seen, flat moments)]: mean, then deviation, (c, height, width)."""
        seen, moments = self.encode_pictures(numbers)
        return [(number, both.flatten()) for number, both in zip(seen, moments)]

    def encode_pictures(self, numbers):
        """Decode and encode images. Return the numbers of those that are seen, and the moments of each."""
        seen = []
        moments = []
        for number, picture in self.decoders.map(self.picture, numbers):
            seen.append(number)
            # One by one: the VAE's memory does not grow with the number of images.
            mean_and_std = self.vae.moments(to_pixels([picture]))
            moments.append(torch.cat(mean_and_std).cpu())
        return seen, moments

    def moments_of(self, numbers):
        """Return the numbers of the images seen, of one bucket, and their moments (2, c, height, width)."""
        if not self.cached:
            return self.encode_pictures(numbers)
        height, width = self.sizes[numbers[0]].tolist()
        latent_size = (height // self.vae.factor, width // self.vae.factor)
        seen = []
        moments = []
        for k in numbers:
            number, flat = self.cached_images.get(k)
            seen.append(number)
            moments.append(flat.view(2, -1, *latent_size))
        return seen, moments

    def text_of(self, numbers):
        """Return captions' features (b, s, width) and mask (b, s), 1 for a token; s: the longest's length."""
        if not self.cached:
            features, mask = self.text_encoder([self.index.caption(n) for n in numbers])
            return features.float().cpu(), mask.cpu()
        found = [self.cached_captions.get(n)[1] for n in numbers]
        longest = max(len(features) for features in found)
        text = torch.empty(len(found), longest, found[0].shape[1])
        mask = torch.zeros(len(found), longest, dtype=torch.long)
        for i, features in enumerate(found):
            length = len(features)
            text[i, :length] = features  # from half precision
            text[i, length:] = 0
            mask[i, :length] = 1
        return text, mask

    def batch(self, chosen, generators, timesteps=None, drop=0.1):
        """Make a batch: z0 and noise (b, c, height, width), t (b,), text (b, s, width), mask (b, s).

        chosen: numbers of images of one bucket.  generators: a torch.Generator for each.
        timesteps: None for uniform ones, or (mean, deviation) of a normal distribution, cut to [0, 1000).
        drop: the probability that a caption is replaced by the empty one, for guidance.
        It may be called from several threads at once.
        """
        seen, moments = self.moments_of(chosen)
        captions = []
        t = []
        z0 = torch.empty(len(chosen), *moments[0].shape[1:])
        noise = torch.empty_like(z0)
        for i, generator in enumerate(generators):
            dropped = torch.rand((), generator=generator) < drop
            captions.append(0 if dropped else int(self.caption_numbers[seen[i]]))
            t.append(draw_timestep(generator, timesteps))
            mean, std = moments[i]
            torch.randn(mean.shape, generator=generator, out=z0[i])
            z0[i].mul_(std).add_(mean)
            torch.randn(mean.shape, generator=generator, out=noise[i])
        text, mask = self.text_of(captions)
        return dict(z0=z0, noise=noise, t=torch.stack(t), text=text, mask=mask)


def draw_timestep(generator, timesteps):
    """Draw a timestep in [0, 1000): uniform, or of a normal distribution (mean, deviation), cut to that."""
    if timesteps is None:
        return torch.randint(1000, (), generator=generator)
    mean, deviation = timesteps
    while True:
        t = (mean + deviation * torch.randn((), generator=generator)).floor().long()
        if 0 <= t < 1000:
            return t


def cache_name(kind, made_of):
    """Name the files of a cache after what their tensors are made of: a list of numbers and strings."""
    return f"{kind}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]}"


# -- 5. batches ahead ----------------------------------------------------------------------------------------


def ahead(make, jobs, steps=3, threads=2):
    """Yield make(*job) of each job, in order, while up to `steps` more are computed in threads.

    An exception is raised at its place. Closing the generator stops the threads.
    """
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    pending = collections.deque()
    try:
        for job in jobs:
            pending.append(pool.submit(make, *job))
            if len(pending) > steps:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# -- 6. the command ------------------------------------------------------------------------------------------


def look(args):
    """Print how many images each bucket has, what was skipped and why; write 24 of them to OUT/data.png."""
    data = ImageData(args.source, args.size, None, None, 0, enlarge=args.enlarge)
    print(f"{len(data.rows)} images in {len(data.buckets)} buckets of about {args.size} x {args.size} px:")
    for (height, width), members in data.buckets.items():
        print(f"  {width:5} x {height:<5} {len(members):8}")
    shown = []
    captions = []
    for batch in itertools.islice(data.order(1, "look"), min(24, len(data.rows))):
        number, picture = data.picture(batch[0])
        shown.append(picture)
        captions.append(data.caption(number))
    print(f"{sum(data.skipped.values())} skipped")
    for reason, count in data.skipped.most_common():
        print(f"  {count:8} {reason}")
    enlarged = (data.sizes / data.index.images[data.rows, :2]).max(axis=1)
    for limit in (1.25, 2.0):  # those of the stages: see train.py
        count = int((enlarged > limit).sum())
        if count:
            print(f"{count} would be enlarged more than {limit:g} times: a stage with that limit skips them")
    if args.text_encoder:
        print(f"{count_long(data.index, args.text_encoder)} captions longer than 120 tokens are cut")
    path = os.path.join(args.out, "data.png")
    rows = [shown[k : k + 6] for k in range(0, len(shown), 6)]
    below = [captions[k : k + 6] for k in range(0, len(shown), 6)]
    files.write_png(path, files.contact_sheet(rows, 192, below))
    print(path)


def count_long(index, text_encoder):
    """Return how many captions of an Index are longer than 120 tokens of a text encoder's tokenizer."""
    tokenizer = load_part(AutoTokenizer.from_pretrained, text_encoder, "tokenizer")
    count = 0
    for number in range(index.caption_count):
        caption = index.caption(number).lower().strip()
        count += len(tokenizer(caption, verbose=False).input_ids) > 120
    return count


def main():
    parser = argparse.ArgumentParser(description="Show what is in a data set of captioned images.")
    parser.add_argument("source", help="a folder, or a quoted pattern of tar shards (see data/README.md)")
    parser.add_argument("--size", type=int, default=512, help="base size of the buckets (default 512)")
    limit = "skip images that would be enlarged more than so many times (default 4)"
    parser.add_argument("--enlarge", type=float, default=4.0, metavar="TIMES", help=limit)
    parser.add_argument("--out", default="runs/data", help="folder of data.png (default runs/data)")
    parser.add_argument("--text-encoder", help="count captions that are too long for its tokenizer")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    files.as_command("data.images", look, parser.parse_args())


if __name__ == "__main__":
    main()
