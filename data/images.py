"""Captioned images -> aspect-ratio buckets, batches of latents and text, from the images or from a cache.

    python -m data.images SOURCE [--size 512]   # what is in a data set: buckets, what is skipped and why

Every random draw is a function of (seed, stage, step, index in the global batch).
"""

import argparse
import bisect
import collections
import concurrent.futures
import functools
import io
import itertools
import os

import numpy as np
import torch
import torch.distributed as dist
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as tables
from PIL import Image, ImageCms, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from data import files
from data.files import RANK, WORLD
from data.index import Index, progress
from t2md import load_part, pad_features

MODES = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK", "LAB": "LAB"}  # of colour profiles; else RGB
SHARD = 1000  # entries of a file of the cache
TOGETHER = 2**22  # pixels that the VAE encodes at once: 16 images of 512 x 512


def to_rgb(image):
    """Any PIL image as a person sees it, in sRGB: upright, by its colour profile, over white; 16 bits and
    floats (up to 1, or up to 255) scaled to 8."""
    image = ImageOps.exif_transpose(image)
    profile, clear = image.info.get("icc_profile"), image.info.get("transparency")
    if image.mode[0] in "IF":
        grey = np.nan_to_num(np.asarray(image, np.float32))
        grey = grey / 257 if image.mode[0] == "I" else grey * (255 if grey.max() <= 1 else 1)
        white = np.asarray(image) == clear if isinstance(clear, int) else False
        image = Image.fromarray(np.uint8(np.where(white, 255, grey.clip(0, 255))))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    lab, mode = image.mode == "LAB", MODES.get(image.mode, "RGB")
    try:
        source = ImageCms.createProfile("LAB") if lab else ImageCms.ImageCmsProfile(io.BytesIO(profile))
        sRGB = ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image.convert(mode), source, sRGB, outputMode="RGB")
    except (
        ImageCms.PyCMSError,
        OSError,
        TypeError,
    ):  # none, or not one that can be read, or of other colours
        pass
    image = image.convert("RGB")
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha) if alpha else image


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


class Prompts(collections.abc.Sequence):
    """Captions, by their numbers in the index, each read when it is asked for."""

    def __init__(self, index, numbers):
        self.index, self.numbers = index, numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, k):
        return self.index.caption(self.numbers[k])


class ImageData:
    """Captioned images in buckets of like aspect ratio, as batches for training.

    Args:
        source: see `find_pieces`.  pixels: base size of the buckets.  folder: where the index is kept.
        vae, text_encoder: None if the images are only looked at.
        cache: None, or a folder: latent moments and caption features are computed once, into it, and both
            parts let go. With a cache and without, it is the middle of an image that is seen.
    Attributes: prompts: captions of the images.  buckets: {(height, width): numbers of images}.
        skipped: {reason: count}.
    Raises ValueError, saying what was looked for, if nothing is usable; if the cache is of other parts.
    """

    def __init__(self, source, pixels, vae, text_encoder, seed, folder, cache=None):
        self.vae, self.text_encoder, self.cache = vae, text_encoder, cache
        self.pixels, self.seed, self.index = pixels, seed, Index(source, folder)
        sizes, self.skipped = self.index.images[:, :2], self.index.skipped
        buckets = nearest_buckets(*sizes.T, pixels)
        large = (buckets <= 4 * sizes).all(1)
        if not large.all():
            self.skipped[f"too small to be enlarged to about {pixels} pixels"] = int((~large).sum())
        if not large.any():
            why = ", ".join(f"{count} x {reason}" for reason, count in self.skipped.items()) or "nothing"
            what = "metadata.jsonl or .csv, tar shards, or images with a .txt beside each"
            raise ValueError(f"{source} has no usable image; looked for {what}, skipped {why}")
        self.rows, self.sizes = np.flatnonzero(large), buckets[large]
        self.captions = self.index.images[large, 2]
        self.prompts, self.buckets = Prompts(self.index, self.captions), {}
        for bucket in sorted(set(map(tuple, aspect_ratios(pixels).values()))):
            members = np.flatnonzero((self.sizes == bucket).all(1))
            if len(members):
                self.buckets[tuple(map(int, bucket))] = members
        self.epoch = functools.lru_cache(maxsize=2)(self.epoch)
        self.permutation = functools.lru_cache(maxsize=4 * len(self.buckets))(self.permutation)
        self.decoders, self.decoding = concurrent.futures.ThreadPoolExecutor(), {}
        if cache:
            self.open_shard = functools.lru_cache(maxsize=64)(self.open_shard)  # each is a memory map
            made_with = dict(vae=vae.source, text_encoder=text_encoder.source)
            files.claim(cache, {part: files.fingerprint(source) for part, source in made_with.items()})
            self.fill_cache()
            self.vae = self.text_encoder = None  # nothing asks them any more: they may leave the device

    # which images: a bucket is an endless stream of permutations, cut into batches

    def permutation(self, bucket, epoch):
        return files.numpy_generator(self.seed, str(bucket), epoch, 0).permutation(self.buckets[bucket])

    def epoch(self, epoch, images):
        """The batches that become full in this epoch -> (n, 2): bucket, number of the batch in its stream;
        what is left over fills the first one of the next epoch."""
        batches = []
        for k, members in enumerate(self.buckets.values()):
            numbers = range(epoch * len(members) // images, (epoch + 1) * len(members) // images)
            batches += [(k, number) for number in numbers]
        return files.numpy_generator(self.seed, "order", epoch, 0).permutation(batches)

    def choose(self, turn, indices, images):
        """The images that stand at `indices` of global batch number `turn`, which holds `images`."""
        sizes = [len(members) for members in self.buckets.values()]

        def before(epoch):  # how many batches
            return sum(epoch * size // images for size in sizes)

        end = (turn + len(sizes) + 1) * images // sum(sizes) + 2
        epoch = bisect.bisect_right(range(end), turn, key=before) - 1
        k, number = self.epoch(epoch, images)[turn - before(epoch)].tolist()
        places = (divmod(number * images + i, sizes[k]) for i in indices)
        return [int(self.permutation(list(self.buckets)[k], n)[place]) for n, place in places]

    # pictures and what VAE and T5 make of them

    def decode(self, k, size):
        """Image k, scaled to cover (height, width), its middle; or the exception that says it is broken."""
        try:
            image = to_rgb(Image.open(io.BytesIO(self.index.bytes_of(self.rows[k]))))
            return ImageOps.fit(image, size[::-1], Image.LANCZOS)
        except Exception as error:  # decoders raise anything
            return error

    def picture(self, k):
        """Image k -> (its number, picture). Where it is broken the next of its bucket, or if need be of all,
        takes its place."""
        size = tuple(self.sizes[k].tolist())
        members = self.buckets[size]
        for number in itertools.chain(members[members >= k], members, range(len(self.rows))):
            picture = self.decode(number, size)
            if isinstance(picture, Image.Image):
                return int(number), picture
            self.skipped[f"not decodable ({type(picture).__name__})"] += number == k
        raise ValueError(f"not one of {len(self.rows)} images can be decoded")

    def encode(self, pictures):
        """Pictures of one size -> means and standard deviations of their latents, (B, 2, C, h, w)."""
        together = max(1, TOGETHER // (pictures[0].width * pictures[0].height))
        parts = [self.vae.moments(part) for part in to_pixels(pictures).split(together)]
        return torch.cat([torch.stack(part, dim=1).cpu() for part in parts])

    def encode_text(self, numbers):
        """Numbers of captions -> their features (B, T, width) and mask (B, T)."""
        features, mask = self.text_encoder([self.index.caption(n) for n in numbers])
        return features.float().cpu(), mask.cpu()

    # the cache: files of SHARD captions, or images of one bucket

    def open_shard(self, path):
        try:
            return safe_open(path, "pt")
        except Exception as error:  # a SafetensorError that does not name it
            raise ValueError(f"{path} is damaged ({error}); remove it, and it is made again") from error

    def shard(self, kind, entry):
        return os.path.join(self.cache, f"{kind}-{self.index.digest}-{entry // SHARD:05}.safetensors")

    def fill_cache(self):
        """Compute the files that the cache lacks, this process's share of them. What is there stays, so a
        run that was cut off goes on."""
        kinds, self.places = (
            [("text", range(self.index.count), self.text_shard)],
            np.zeros(len(self.rows), int),
        )
        for (h, w), members in self.buckets.items():
            kinds.append((f"{self.pixels}px-{h}x{w}", members, self.image_shard))
            self.places[members] = np.arange(len(members))
        jobs = []
        for kind, entries, compute in kinds:
            for k in range(0, len(entries), SHARD):
                jobs.append((self.shard(kind, k), entries[k : k + SHARD], compute))
        missing = [job for job in jobs[RANK::WORLD] if not os.path.exists(job[0])]
        with progress(total=sum(len(job[1]) for job in missing), desc=f"encoding into {self.cache}") as bar:
            for path, entries, compute in missing:
                files.write_atomically(path, functools.partial(save_file, compute(entries)))
                bar.update(len(entries))
        if WORLD > 1:
            dist.barrier()

    def text_shard(self, numbers):
        """Features of captions: (tokens of all, width), and where each caption begins and ends."""
        features = []
        for k in range(0, len(numbers), 16):
            for feature, mask in zip(*self.encode_text(numbers[k : k + 16])):
                features.append(feature[mask.bool()].half())
        return dict(features=torch.cat(features), ends=torch.tensor([0, *map(len, features)]).cumsum(0))

    def image_shard(self, numbers):
        """Moments of images (n, 2, C, h, w), and which images they are; decoded 16 ahead of the VAE."""
        shown, moments, coming = [], [], self.decoders.map(self.picture, numbers[:16])
        for k in range(0, len(numbers), 16):
            found, coming = list(coming), self.decoders.map(self.picture, numbers[k + 16 : k + 32])
            shown += [number for number, _ in found]
            moments.append(self.encode([picture for _, picture in found]).half())
        return dict(moments=torch.cat(moments), images=torch.tensor(shown))

    # batches

    def moments_of(self, turn, indices, images):
        """The images at `indices` of batch `turn` -> their numbers, and their moments (B, 2, C, h, w)."""
        numbers, found = self.choose(turn, indices, images), []
        if self.cache:
            for k in numbers:
                h, w = self.sizes[k]
                file = self.open_shard(self.shard(f"{self.pixels}px-{h}x{w}", self.places[k]))
                row = int(self.places[k] % SHARD)
                found.append((int(file.get_slice("images")[row]), file.get_slice("moments")[row].float()))
            numbers, moments = zip(*found)
            return numbers, torch.stack(moments)
        following = self.choose(turn + 1, indices, images)  # decoded while the network works on this turn
        for key, k in zip(itertools.product((turn, turn + 1), indices), numbers + following):
            if key not in self.decoding:
                self.decoding[key] = self.decoders.submit(self.picture, k)
        numbers, pictures = zip(*(self.decoding.pop((turn, i)).result() for i in indices))
        return numbers, self.encode(pictures)

    def text_of(self, numbers):
        """Numbers of captions -> features (B, T, width) and mask (B, T)."""
        if not self.cache:
            return self.encode_text(numbers)
        features = []
        for n in numbers:
            file = self.open_shard(self.shard("text", n))
            first, end = file.get_slice("ends")[n % SHARD : n % SHARD + 2].tolist()
            features.append(file.get_slice("features")[first:end].float())
        return pad_features(features)

    def batch(self, turn, indices, images, generators, timesteps=None, drop=0.1):
        """Samples `indices` of global batch number `turn`, of `images` samples, a torch.Generator for each
        -> dict of latents z0 and noise (B, C, h, w), t (B,), text (B, T, width), mask (B, T).

        timesteps: None, uniform; (mean, deviation) of a normal distribution, drawn again outside [0, 1000).
        A caption is dropped (replaced by the empty one) with probability `drop`, for guidance.
        """
        numbers, moments = self.moments_of(turn, indices, images)
        captions, t, z0, noise = [], [], [], []
        for k, (mean, std), g in zip(numbers, moments, generators):
            captions.append(0 if torch.rand((), generator=g) < drop else int(self.captions[k]))
            t.append(torch.randint(1000, (), generator=g) if timesteps is None else torch.tensor(-1))
            while not 0 <= t[-1] < 1000:
                t[-1] = (timesteps[0] + timesteps[1] * torch.randn((), generator=g)).floor().long()
            z0.append(mean + std * torch.randn(mean.shape, generator=g))
            noise.append(torch.randn(mean.shape, generator=g))
        text, mask = self.text_of(captions)
        return dict(z0=torch.stack(z0), noise=torch.stack(noise), t=torch.stack(t), text=text, mask=mask)


# -- python -m data.images -----------------------------------------------------------------------------------


def look(args):
    """Print how many images each bucket has, what was skipped and why; write OUT/data.png, 24 of them."""
    data = ImageData(args.source, args.size, None, None, 0, os.path.join(args.out, "index"))
    count = len(data.prompts)
    found = [data.picture(*data.choose(turn, [0], 1)) for turn in range(min(24, count))]
    print(f"{count} images in {len(data.buckets)} buckets of about {args.size} x {args.size} px:")
    for (height, width), members in data.buckets.items():
        print(f"  {width:5} x {height:<5} {len(members):8}")
    print(f"{sum(data.skipped.values())} skipped")
    for reason, count in data.skipped.most_common():
        print(f"  {count:8} {reason}")
    if args.text_encoder:
        tokenizer = load_part(AutoTokenizer, args.text_encoder, "tokenizer")
        captions = (data.index.caption(n).lower().strip() for n in range(data.index.count))
        lengths = (len(tokenizer(caption, verbose=False).input_ids) for caption in captions)
        print(f"{sum(length > 120 for length in lengths)} captions longer than 120 tokens are cut")
    rows = [found[k : k + 6] for k in range(0, len(found), 6)]
    captions = [[data.prompts[k] for k, _ in row] for row in rows]
    path = os.path.join(args.out, "data.png")
    files.write_png(path, files.contact_sheet([[image for _, image in row] for row in rows], 192, captions))
    print(path)


def main():
    parser = argparse.ArgumentParser(description="Show what is in a data set of captioned images.")
    parser.add_argument("source", help="a folder, or a quoted pattern of tar shards (see data/README.md)")
    parser.add_argument("--size", type=int, default=512, help="base size of the buckets (default 512)")
    parser.add_argument("--out", default="runs/data", help="folder of the index and data.png")
    parser.add_argument("--text-encoder", help="count captions that are too long for its tokenizer")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    files.as_command("data.images", look, parser.parse_args())


if __name__ == "__main__":
    main()
