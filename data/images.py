"""Captioned images -> aspect-ratio buckets, batches of latents and text, from the images or from a cache.

    python -m data.images SOURCE [--size 512]   # what is in a data set: buckets, what is skipped and why

Every random draw is a function of (seed, stage, step, index in the global batch).
"""

import argparse
import concurrent.futures
import contextlib
import functools
import io
import itertools
import os
import zlib

import numpy as np
import torch
import torch.distributed as dist
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as tables
from PIL import Image, ImageCms, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from data import files
from data.index import Index, progress
from t2md import load_part, pad_features

SHARD = 1000  # entries of a file of the cache


def to_rgb(image):
    """Any PIL image as a person sees it, in sRGB: upright, by its colour profile, over white; 16 bits and
    floats (up to 1, or up to 255) scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        grey = np.nan_to_num(np.asarray(image, np.float32))
        grey = grey / 257 if image.mode[0] == "I" else grey * (255 if grey.max() <= 1 else 1)
        image = Image.fromarray(np.uint8(grey.clip(0, 255)))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    image = image if image.mode == "CMYK" else image.convert("RGB")
    # it may have no profile, or one that cannot be read, or of other colours
    with contextlib.suppress(ImageCms.PyCMSError, OSError, KeyError):
        profile = io.BytesIO(image.info["icc_profile"])
        image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    image = image.convert("RGB")
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha) if alpha else image


def to_pixels(images):
    """List of equally large PIL images -> (B, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def aspect_ratios(pixels):
    """The buckets of a base size: {height / width: (height, width)}, from the tables that diffusers ships."""
    scaled = {}
    for ratio, sides in tables.ASPECT_RATIO_1024_BIN.items():
        scaled[ratio] = [max(16, round(side * pixels / 1024 / 16) * 16) for side in sides]
    return getattr(tables, f"ASPECT_RATIO_{pixels}_BIN", scaled)


def nearest_buckets(heights, widths, pixels):
    """Sizes of n images -> their buckets', (n, 2); diffusers' classify_height_width_bin, for all at once."""
    table = sorted((float(ratio), sides) for ratio, sides in aspect_ratios(pixels).items())
    ratios = np.array([ratio for ratio, _ in table])
    nearest = np.searchsorted((ratios[1:] + ratios[:-1]) / 2, heights / widths)
    return np.array([sides for _, sides in table], int)[nearest]


class ImageData:
    """Captioned images in buckets of like aspect ratio, as batches for training.

    source: see `find_pieces`.  pixels: base size of the buckets.  folder: where the index is kept.
    vae, text_encoder: None if the images are only looked at.
    cache: None, or a folder: moments and caption features are computed once, into it, and both parts let go.
    Attributes: buckets: {(height, width): numbers of images}.  skipped: {reason: count}.
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
            what = "metadata.jsonl or .csv, tar shards, or images with a .txt beside each"
            raise ValueError(f"{source} has no usable image; looked for {what}, skipped {dict(self.skipped)}")
        self.rows, self.sizes = np.flatnonzero(large), buckets[large]
        self.captions, self.buckets = self.index.images[large, 2], {}
        for bucket in np.unique(self.sizes, axis=0).tolist():
            self.buckets[tuple(bucket)] = np.flatnonzero((self.sizes == bucket).all(1))
        self.decoders = concurrent.futures.ThreadPoolExecutor()
        if cache:
            self.open_shard = functools.lru_cache(maxsize=64)(self.open_shard)  # each is a memory map
            made_with = dict(vae=vae.source, text_encoder=text_encoder.source)
            files.claim(cache, {part: files.fingerprint(source) for part, source in made_with.items()})
            self.fill_cache()
            self.vae = self.text_encoder = None  # nothing asks them any more: they may leave the device

    def order(self, images):
        """Endless: the images of one batch after the other, each of one bucket. In an epoch every image comes
        once; what fills no batch of its bucket comes first in the next."""
        streams = {bucket: np.zeros(0, int) for bucket in self.buckets}
        for epoch in itertools.count():
            generator, batches = np.random.default_rng([self.seed, zlib.crc32(b"order"), epoch, 0]), []
            for bucket, members in self.buckets.items():
                stream = np.concatenate([streams[bucket], generator.permutation(members)])
                whole = len(stream) // images * images
                batches.append(stream[:whole].reshape(-1, images))
                streams[bucket] = stream[whole:]
            batches = np.concatenate(batches)
            yield from (batches[k].tolist() for k in generator.permutation(len(batches)))

    def picture(self, k):
        """Image k -> (its number, its middle, scaled to cover its bucket). Where it is broken the next of its
        bucket, or if need be of all, takes its place."""
        size = tuple(self.sizes[k].tolist())
        members = self.buckets[size]
        for number in itertools.chain(members[members >= k], members, range(len(self.rows))):
            try:
                image = to_rgb(Image.open(io.BytesIO(self.index.bytes_of(self.rows[number]))))
                return int(number), ImageOps.fit(image, size[::-1], Image.LANCZOS)
            except Exception as error:  # decoders raise anything
                self.skipped[f"not decodable ({type(error).__name__})"] += number == k
        raise ValueError(f"not one of {len(self.rows)} images can be decoded")

    def caption(self, k):
        return self.index.caption(self.captions[k])

    # the cache: a file for every SHARD captions, or images, each a tensor that is named by its number

    def path(self, kind, k):
        return os.path.join(self.cache, f"{kind}-{self.index.digest}-{k // SHARD:05}.safetensors")

    def open_shard(self, path):
        try:
            return safe_open(path, "pt")
        except Exception as error:  # a SafetensorError that does not name it
            raise ValueError(f"{path} is damaged ({error}); remove it, and it is made again") from error

    def fill_cache(self):
        """Compute the files that the cache lacks, this process's share; a run that was cut off goes on."""
        captions = "captions", self.index.count, self.encoded_captions
        images = f"{self.pixels}px", len(self.rows), self.encoded_images
        for kind, count, encoded in (captions, images):
            for first in progress(range(0, count, SHARD)[files.RANK :: files.WORLD], f"encoding {kind}"):
                if not os.path.exists(path := self.path(kind, first)):
                    tensors, last = {}, min(first + SHARD, count)
                    for k in range(first, last, 16):
                        tensors.update(encoded(range(k, min(k + 16, last))))
                    files.write_atomically(path, functools.partial(save_file, tensors))
        if files.WORLD > 1:
            dist.barrier()

    def encoded_captions(self, numbers):
        """Pairs of a number and the features of its tokens."""
        for n, features, mask in zip(numbers, *self.text_of(numbers)):
            yield f"{n}", features[mask.bool()].half()

    def encoded_images(self, numbers):
        """Pairs of a number and its moments, and of "number shown" and the image that they are of."""
        for n, seen, moments in zip(numbers, *self.moments_of(numbers)):
            yield f"{n}", moments.half().contiguous()
            yield f"{n} shown", torch.tensor(seen)

    def moments_of(self, numbers):
        """Images -> the numbers of those that are seen, and of each mean and deviation, (2, C, h, w)."""
        if self.vae is None:  # all is in the cache
            shards = [self.open_shard(self.path(f"{self.pixels}px", k)) for k in numbers]
            seen = [int(shard.get_tensor(f"{k} shown")) for shard, k in zip(shards, numbers)]
            return seen, [shard.get_tensor(f"{k}").float() for shard, k in zip(shards, numbers)]
        # one by one: the VAE's memory does not grow with the number of images
        seen, pictures = zip(*self.decoders.map(self.picture, numbers))
        return seen, [torch.cat(self.vae.moments(to_pixels([picture]))).cpu() for picture in pictures]

    def text_of(self, numbers):
        """Numbers of captions -> features (B, T, width) and mask (B, T)."""
        if self.text_encoder is None:
            found = (self.open_shard(self.path("captions", n)).get_tensor(f"{n}") for n in numbers)
            return pad_features([features.float() for features in found])
        features, mask = self.text_encoder([self.index.caption(n) for n in numbers])
        return features.float().cpu(), mask.cpu()

    def batch(self, chosen, generators, timesteps=None, drop=0.1):
        """Numbers of images of one size, a torch.Generator for each -> dict of latents z0 and noise
        (B, C, h, w), t (B,), text (B, T, width), mask (B, T).

        timesteps: None, uniform; (mean, deviation) of a normal distribution, drawn again outside [0, 1000).
        A caption is dropped (replaced by the empty one) with probability `drop`, for guidance.
        """
        numbers, moments = self.moments_of(chosen)
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


def look(args):
    """Print how many images each bucket has, what was skipped and why; write OUT/data.png, 24 of them."""
    data = ImageData(args.source, args.size, None, None, 0, os.path.join(args.out, "index"))
    print(f"{len(data.rows)} images in {len(data.buckets)} buckets of about {args.size} x {args.size} px:")
    for (height, width), members in data.buckets.items():
        print(f"  {width:5} x {height:<5} {len(members):8}")
    found = [data.picture(*batch) for batch in itertools.islice(data.order(1), min(24, len(data.rows)))]
    print(f"{sum(data.skipped.values())} skipped")
    for reason, count in data.skipped.most_common():
        print(f"  {count:8} {reason}")
    if args.text_encoder:
        tokenizer = load_part(AutoTokenizer, args.text_encoder, "tokenizer")
        captions = (data.index.caption(n).lower().strip() for n in range(data.index.count))
        cut = sum(len(tokenizer(caption, verbose=False).input_ids) > 120 for caption in captions)
        print(f"{cut} captions longer than 120 tokens are cut")
    print(path := os.path.join(args.out, "data.png"))
    shown, captions = [picture for _, picture in found], [data.caption(k) for k, _ in found]
    rows, captions = ([part[k : k + 6] for k in range(0, len(found), 6)] for part in (shown, captions))
    files.write_png(path, files.contact_sheet(rows, 192, captions))


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
