"""Sample images from a T2MD checkpoint (or any diffusers PixArt folder), at any size.

    python sample.py "a photo of a red circle and a blue square"          # the shipped student, base size
    python sample.py "a photo of a star" --size 2048                      # far above the trained size
    python sample.py "prompt" --size 3840x2160 --n 4 --seed 7 --steps 20 --guidance 4.5 --negative "..."
    python sample.py --prompts evaluation_metadata.jsonl --n 4 --out DIR  # GenEval's layout; or by torchrun

From Python: `sample.load("assets/student")(["a photo of a star"], size=(512, 512), seeds=[0])` -> PIL images.

Sections: 1 the sampler - 2 loading - 3 files and seeds - 4 command line.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import re
import sys
import textwrap
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from t2md import ALWAYS_FLOAT32, VAE, MambaMixer, TextEncoder, load_backbone, predict_noise, read_json

transformers_logging.disable_progress_bar()  # its bars for loading weights drown ours
HERE = os.path.dirname(os.path.abspath(__file__))
SHIPPED = os.path.join(HERE, "assets", "student")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun

# ---------------------------------------------------------------------------------------------------
# 1. The sampler
# ---------------------------------------------------------------------------------------------------


# fmt: off
@torch.no_grad()
def denoise(model, text, negative, latents, steps=20, guidance=4.5, pixels_per_latent=8, upscale=1,
            picture=None, renoise=1000, bar=None):
    # fmt: on
    """Noise -> latents, by DPM-Solver++ with guidance (equation 2); equals diffusers' PixArtAlphaPipeline.

    Args:
        text, negative: (features, mask) of the captions and of the unconditional branch, B rows each.
        latents: standard normal noise (B, C, h, w).  guidance: 1 or less runs the conditional branch alone.
        upscale: see `upsample_guidance`.  bar: a progress bar, moved on by each step.
        picture: latents (B, C, h, w) to start from instead, at the sampler's first timestep <= renoise.
    """
    scheduler = make_scheduler(model.config.beta_schedule)
    scheduler.set_timesteps(steps)
    if guidance > 1:  # 1. one batch for both branches
        text = pad_features([row[keep.bool()] for part in (negative, text) for row, keep in zip(*part)])
    features, mask = text[0].to(model.device, model.dtype), text[1].to(model.device)
    first, timesteps = first_step(scheduler, renoise), scheduler.timesteps
    if picture is not None:
        alpha_bar = scheduler.alphas_cumprod[timesteps[first]]
        latents = alpha_bar.sqrt() * picture + (1 - alpha_bar).sqrt() * latents.to(picture.device)
        scheduler.set_begin_index(first)
        timesteps = timesteps[first:]
    latents = latents.to(model.device, model.dtype)

    def predict(z_t, t):
        # 2. predict the noise, 3. push it away from the unconditional prediction
        size = [side * pixels_per_latent for side in z_t.shape[-2:]]
        z_t = torch.cat([z_t, z_t]) if guidance > 1 else z_t
        noise = predict_noise(model, z_t, t, features, mask, **size_conditions(model, *size, len(z_t)))
        if guidance > 1:
            unconditional, conditional = noise.chunk(2)
            noise = unconditional + guidance * (conditional - unconditional)
        return noise

    for t in timesteps:
        noise = predict(latents, t)
        if upscale > 1:
            noise = upsample_guidance(predict, latents, t, noise, scheduler.alphas_cumprod, upscale)
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]  # 4. one solver step
        if bar is not None:
            bar.update()
    return latents


def first_step(scheduler, renoise):
    """The index of a scheduler's first timestep that is at most `renoise`; its last, if none is."""
    return min(int((scheduler.timesteps > renoise).sum()), len(scheduler.timesteps) - 1)


def sizes_on_the_way(size, trained, multiple):
    """The sizes at which progressive sampling makes a picture of `size` (width, height), pixels.

    Up to 1.5 times the `trained` side that alone; beyond, first the trained area in the same shape, both
    sides multiples of `multiple`, then doubled, the last time by what remains.
    """
    factor = (size[0] * size[1]) ** 0.5 / trained
    if factor <= 1.5:
        return [size]
    first = [max(1, round(side / factor / multiple)) * multiple for side in size]
    doublings = math.ceil(math.log2(factor) - 0.1)
    return [(first[0] * 2**k, first[1] * 2**k) for k in range(doublings)] + [size]


# fmt: off
@torch.no_grad()
def generate(model, vae, text_encoder, prompts, size, seeds, steps=20, guidance=4.5, negative="", upscale=1,
             direct=False, renoise=None, progress=False):
    # fmt: on
    """Prompts and seeds (one each per image) -> PIL images of size (width, height) in pixels.

    Far above the trained size progressively, in pixel space (not in the paper; relatives: SDEdit,
    DiffuseHigh): the picture is made at the trained size, decoded, enlarged, encoded, noised up to the
    timestep `renoise` (the model's own if None) and denoised from there; the layout comes from the size that
    knows it. If `direct`, or with `upscale`, as the paper does: from noise at the full size.
    """
    trained, multiple = model.config.sample_size * vae.factor, vae.factor * model.config.patch_size
    sizes = [size] if direct or upscale > 1 else sizes_on_the_way(size, trained, multiple)
    renoise = model.config.renoise if renoise is None else renoise
    text, unconditional = text_encoder(prompts), text_encoder([negative] * len(prompts))
    scheduler = make_scheduler(model.config.beta_schedule)
    scheduler.set_timesteps(steps)
    total = steps + (len(sizes) - 1) * (steps - first_step(scheduler, renoise))
    picture, pixels = None, None
    with tqdm(desc="denoising", total=total, disable=not progress) as bar:
        for level, (width, height) in enumerate(sizes):
            shape = vae.channels, height // vae.factor, width // vae.factor
            noise = torch.cat([noise_for(seed, *shape, level) for seed in seeds])
            if level:
                pixels = F.interpolate(pixels, size=(height, width), mode="bicubic").clamp(-1, 1)
                picture, _ = vae.moments(pixels, tile=1024)
            how = dict(upscale=upscale, picture=picture, renoise=renoise, bar=bar)
            latents = denoise(model, text, unconditional, noise, steps, guidance, vae.factor, **how)
            pixels = vae.decode(latents)
    return to_images(pixels)


def generate_all(model, vae, text_encoder, prompts, size, seed, **how):
    """One picture for each prompt, of size (width, height), image k from the noise of seed + k -> PIL
    images; as many at once as have 4,096 tokens of PixArt's size."""
    at_once, images = max(1, 4096 * 16**2 // (size[0] * size[1])), []
    for start in range(0, len(prompts), at_once):
        some = prompts[start : start + at_once]
        seeds = range(seed + start, seed + start + len(some))
        images += generate(model, vae, text_encoder, some, size, seeds, **how)
    return images


def to_images(pixels):
    """(B, 3, h, w) in [-1, 1] -> list of PIL images."""
    arrays = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def make_scheduler(beta_schedule):
    """diffusers' DPM-Solver++ (2M) on the 1000-step noise schedule that the model was trained with."""
    return DPMSolverMultistepScheduler(1000, beta_start=1e-4, beta_end=2e-2, beta_schedule=beta_schedule)


def size_conditions(model, height, width, batch):
    """PixArt-1024's conditions for pixels height x width, or none."""
    if not model.conditioned_on_size:
        return {}
    like = dict(device=model.device, dtype=model.dtype)
    sizes = torch.tensor([[height, width, height / width]] * batch, **like)
    return dict(resolution=sizes[:, :2], aspect_ratio=sizes[:, 2:])


def matched_timestep(alphas_cumprod, t, m):
    """The timestep up to t whose signal-to-noise ratio is nearest m^2 times that of t: pooling m x m pixels
    averages their noise, so a pooled z_t is as noisy as an image of that timestep."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return (snr[: t + 1] - m**2 * snr[t]).abs().argmin()


def upsample_guidance(predict, z_t, t, noise, alphas_cumprod, m, theta=1.0):
    """Training-free sampling at m times the size a model knows (upsample guidance, as in DiM): the means
    of m x m pixels of its prediction are replaced by what it predicts for the pooled z_t, at its own size.

    predict: predict(z, t) -> guided noise.  noise: predict(z_t, t), (B, C, h, w); h and w multiples of m.
    theta: 0 leaves the prediction alone. Only timesteps in the first 30% of sampling are guided.
    """
    if t < 0.7 * len(alphas_cumprod):
        return noise
    power = alphas_cumprod[t] + (1 - alphas_cumprod[t]) / m**2  # of a pooled z_t, per element
    small = predict(F.avg_pool2d(z_t, m) / power.sqrt(), matched_timestep(alphas_cumprod, t, m))
    return noise + theta * F.interpolate(small / m - F.avg_pool2d(noise, m), scale_factor=m, mode="nearest")


# ---------------------------------------------------------------------------------------------------
# 2. Loading
# ---------------------------------------------------------------------------------------------------


def load(folder, device="cpu", dtype=torch.float32):
    """A checkpoint folder -> `generate` with all its parts filled in: call it with prompts, size, seeds.

    Raises FileNotFoundError if a part is missing, ValueError if config and weights do not fit.
    """
    model = load_denoiser(folder, device, dtype)
    return functools.partial(generate, model, *load_parts(model, folder, device, dtype))


def export(checkpoint, folder):
    """Write a checkpoint with its VAE, T5, tokenizer and scheduler as one diffusers pipeline, which
    `DiffusionPipeline.from_pretrained(folder)` loads once `import t2md` was said.

    Raises ValueError if there is something in `folder` already.
    """
    if os.path.isdir(folder) and os.listdir(folder):
        raise ValueError(f"--export {folder} is not empty; name a new folder")
    model = load_backbone(checkpoint)
    vae, text_encoder = load_parts(model, checkpoint)
    model.register_to_config(vae=None, text_encoder=None)  # both are in the pipeline now
    # Sigma's pipeline is Alpha's, but knows the sizes around 2048
    kind = PixArtSigmaPipeline if model.config.sample_size * vae.factor >= 2048 else PixArtAlphaPipeline
    scheduler = make_scheduler(model.config.beta_schedule)
    parts = dict(tokenizer=text_encoder.tokenizer, text_encoder=text_encoder.model, vae=vae.model)
    kind(**parts, transformer=model, scheduler=scheduler).save_pretrained(folder)
    print(folder)


def load_denoiser(path_or_repo, device="cpu", dtype=torch.float32, **overrides):
    """A T2MD checkpoint folder, or the PixArt transformer of diffusers' -> frozen, folded T2MD.

    overrides replace entries of its config, e.g. pos_embed="centered".
    Raises FileNotFoundError if there is none or it is half-written, ValueError if its config does not fit.
    """
    return freeze(load_backbone(path_or_repo, **overrides), device, dtype)


def freeze(model, device, dtype):
    """A T2MD, made ready for sampling in `dtype`."""
    for block in model.blocks:
        if isinstance(block.mixer, MambaMixer):
            block.mixer.fold()
    for name, p in model.named_parameters():
        if not name.endswith(ALWAYS_FLOAT32):
            p.data = p.data.to(dtype)
    # nn.Module's `to`: diffusers' own warns of float32 modules that this model does not have
    return torch.nn.Module.to(model, device).eval().requires_grad_(False)


def component_path(checkpoint, reference):
    """Where a checkpoint's VAE or text encoder is: a folder relative to it, or a repository.

    A plain PixArt pipeline names none: its parts are in the pipeline itself.
    """
    if reference is None:
        return checkpoint
    beside = os.path.normpath(os.path.join(checkpoint, reference))
    return beside if os.path.isdir(beside) else reference


def load_parts(model, folder, device="cpu", dtype=torch.float32):
    """The frozen (VAE, TextEncoder) that the config of the checkpoint in `folder` names; the latter in
    `dtype` (SDXL's VAE overflows in less than float32)."""
    vae = VAE(component_path(folder, model.config.vae), device)
    return vae, TextEncoder(component_path(folder, model.config.text_encoder), device=device, dtype=dtype)


def pad_features(features):
    """List of (T_i, width) caption features -> features (B, T, width) and mask (B, T), as `TextEncoder`'s."""
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(features), pad([torch.ones(len(f), dtype=torch.long) for f in features])


def encode_first(text_encoder, captions):
    """Run the text encoder on all captions it will be asked for -> what stands in for it then."""
    known = {caption: text_encoder([caption])[0][0].cpu() for caption in dict.fromkeys(captions)}

    def look_up(captions):
        return pad_features([known[caption] for caption in captions])

    return look_up


# ---------------------------------------------------------------------------------------------------
# 3. Files and seeds: nothing that exists is ever lost, every draw is a function of its place
# ---------------------------------------------------------------------------------------------------


def draw(seed, stage, step, index):
    """The torch.Generator of one sample. It depends on no restart, nor on how processes share a batch."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def numpy_draw(seed, stage, step, index):
    """The same for numpy."""
    return np.random.default_rng([seed, zlib.crc32(stage.encode()), step, index])


def noise_for(seed, channels, h, w, level=0):
    """The noise (1, channels, h, w) of one image, drawn on the CPU: a function of its seed and, where a
    picture is made at several sizes, of which one it is."""
    generator = draw(seed, "noise", level, 0) if level else torch.Generator().manual_seed(seed)
    return torch.randn(1, channels, h, w, generator=generator)


@contextlib.contextmanager
def rank_zero_first():
    """What is inside runs on the first process, then on the others: they find on disk what it has made."""
    if RANK:
        dist.barrier()
    yield
    if WORLD > 1 and not RANK:
        dist.barrier()


def write_atomically(path, write):
    """write(temporary path), then rename: whoever reads `path` finds the old or the new."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        write(path + ".tmp")
        os.replace(path + ".tmp", path)
    except RuntimeError as error:  # what torch.save makes of a full disk
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}); what was there is as it was") from error
    finally:
        if os.path.isfile(path + ".tmp"):
            os.remove(path + ".tmp")


def write_text(path, text):
    """`write_atomically` for a string."""

    def write(path):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    write_atomically(path, write)


def write_json(path, value):
    """`write_atomically` for what JSON can hold."""
    write_text(path, json.dumps(value, indent=1))


def write_png(path, image):
    """`write_atomically` for a PIL picture."""
    write_atomically(path, functools.partial(image.save, format="PNG"))


def fingerprint(path_or_repo):
    """A short name of a model: of a folder's config, tokenizer and weight files, each by its size and both
    ends; a repository is its own name."""
    if not os.path.isdir(path_or_repo):
        return path_or_repo
    digest = hashlib.sha256()
    for folder, _, names in sorted(os.walk(path_or_repo)):
        for name in sorted(names):
            if name in ("config.json", "tokenizer.json") or name.endswith(".safetensors"):
                with open(os.path.join(folder, name), "rb") as file:
                    size = file.seek(0, os.SEEK_END)
                    digest.update(f"{os.path.relpath(folder, path_or_repo)}/{name} {size}".encode())
                    for start in (0, max(0, size - 2**16)):
                        file.seek(start)
                        digest.update(file.read(2**16))
    return digest.hexdigest()[:16]


def claim(folder, made_with, begun=None):
    """Note in `folder` what it is made with, or find that it was begun with the same.

    begun: False makes the note anew, True misses it if there is none; None: there is a note or there is
    nothing. What an older note lacks is said, and added. Raises ValueError, naming what differs.
    """
    path, made_with = os.path.join(folder, "made_with.json"), json.loads(json.dumps(made_with))
    with rank_zero_first():
        there = os.path.exists(path)
        before = read_json(path) if there and begun is not False else {} if begun else None
        for name, ours in made_with.items():
            theirs = (before or {}).get(name, ours)
            if theirs != ours:
                which = f"{name} {theirs}, not {ours}"
                raise ValueError(f"{folder} was made with {which}; give the same again, or another folder")
        missing = [] if before is None else sorted(made_with.keys() - before.keys())
        if missing:
            print(f"{folder} does not say with which {', '.join(missing)} it was begun: taken to be the same")
        if before is None or missing:
            write_json(path, {**made_with, **(before or {})})


def contact_sheet(rows, side, captions=None):
    """Rows of PIL pictures, each fitted into a square of `side` pixels, above its caption if there are any
    (rows of strings) -> one picture."""
    height = side + (36 if captions else 0)  # three lines of text
    sheet = Image.new("RGB", (side * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(ImageOps.contain(picture, (side, side), Image.BOX), (x * side, y * height))
            if captions:
                text = "\n".join(textwrap.wrap(captions[y][x], side // 6)[:3])
                ImageDraw.Draw(sheet).text((x * side + 2, y * height + side), text, fill="black")
    return sheet


def parse_size(text, multiple):
    """ "2048" or "3840x2160" (width x height, pixels) -> (width, height), rounded to a multiple, and said.

    Raises ValueError if it is no such size or not positive.
    """
    match = re.fullmatch(r"(-?\d+)(?:x(-?\d+))?", text.strip().lower())
    size = match and (int(match[1]), int(match[2] or match[1]))
    if not size or min(size) <= 0:
        which = "give positive pixels, as 2048 or 3840x2160 (width x height)"
        raise ValueError(f"--size {text} is no size: {which}")
    width, height = (max(multiple, round(side / multiple) * multiple) for side in size)
    if (width, height) != size:
        why = f"both sides must be multiples of {multiple}"
        print(f"--size {text} is rounded to {width}x{height}: {why}", file=sys.stderr)
    return width, height


def read_prompts(path):
    """A .txt with one prompt a line, or GenEval's evaluation_metadata.jsonl -> records with a "prompt".

    Raises ValueError, with the line's number, for what is not readable or has no prompt.
    """
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = line.decode().strip()
                record = json.loads(text) if path.endswith(".jsonl") else {"prompt": text}
                if not record["prompt"].strip().encode():  # raises for half of an emoji, which is no text
                    raise KeyError
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                what = 'it must be UTF-8, and a .jsonl needs a JSON object with a "prompt" in each line'
                raise ValueError(f"{path}, line {number}, has no prompt: {what}") from None
            records.append(record)
    if not records:
        raise ValueError(f"{path} holds no prompts")
    return records


def save_png(image, path, **settings):
    """Write `image` under a temporary name, then rename it; its settings go into the PNG's text fields."""
    info = PngInfo()
    for name, value in settings.items():
        info.add_itxt(name, str(value))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = path + ".tmp"
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        os.link(temporary, path)  # unlike a rename, fails where the name is taken
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def slug(text):
    """ "+ teacher forcing: T2MD" -> "teacher-forcing-t2md", for the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def free_path(folder, prompt, seed):
    """folder/the-prompt-seed.png, or with -1, -2, ... where that name is taken."""
    stem = os.path.join(folder, f"{slug(prompt)[:60] or 'image'}-{seed}")
    path, k = stem + ".png", 0
    while os.path.exists(path):
        path, k = f"{stem}-{k + 1}.png", k + 1
    return path


def keep_freed_memory(largest=False):
    """Tell glibc to keep what tensors free: handing it back costs page faults, a sixth of a training step.

    largest: also what is over 32 MiB. Half the time of a Mamba mixer at 2048 px, for a third more memory.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its highest
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        if largest:
            libc.mallopt(-4, 0)  # M_MMAP_MAX


# ---------------------------------------------------------------------------------------------------
# 4. Command line
# ---------------------------------------------------------------------------------------------------


def as_command(name, run, args, stopped="stopped"):
    """run(args), of any command here: what is wrong with its input, or with the disk, becomes one sentence
    and exit code 1; so does Ctrl-C, and `stopped` says what is kept."""
    keep_freed_memory()
    try:
        return run(args)
    except (OSError, ValueError, ArithmeticError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: {stopped}")


HOW = ("steps", "guidance", "negative", "upscale", "direct", "renoise")  # flags that `generate` takes


def parse_arguments(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(description="Sample images from a T2MD checkpoint, at any size.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw")
    add("--prompts", help="a .txt with a prompt a line, or GenEval's metadata .jsonl, its layout is written")
    add("--model", default=SHIPPED, help="a T2MD checkpoint, or a diffusers PixArt folder or repository")
    add("--size", help="pixels, 2048 or 3840x2160 (width x height); the model's own size if not given")
    add("--n", type=int, default=1, help="images for each prompt, from seeds seed, seed + 1, ...")
    add("--seed", type=int, default=0, help="of the first image's noise")
    add("--steps", type=int, default=20, help="of DPM-Solver++")
    add("--guidance", type=float, default=4.5, help="classifier-free guidance; 1 switches it off")
    add("--direct", action="store_true", help="sample large sizes from noise at once, as the paper does")
    add("--renoise", type=int, metavar="T", help="timestep up to which an enlarged picture is noised again")
    add("--upscale", type=int, default=1, metavar="M", help="upsample guidance, for M times the trained size")
    add("--negative", default="", help="prompt of the unconditional branch")
    add("--out", default="samples", help="folder for the images")
    add("--export", metavar="DIR", help="draw nothing, write the checkpoint as a diffusers pipeline")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of denoiser and text encoder")
    add("--compile", action="store_true", help="torch.compile each block; pays for many images of one size")
    # fmt: on
    args = parser.parse_args(argv)
    if [args.prompts, args.prompt, args.export].count(None) != 2:
        parser.error("give one prompt, or a file with --prompts, or a folder with --export")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("the prompt is empty")
    if min(args.n, args.steps, args.upscale) < 1:
        parser.error("--n, --steps and --upscale must be at least 1")
    if args.renoise is not None and not 0 <= args.renoise < 1000:
        parser.error("--renoise must be a timestep, 0 to 999")
    return args


def wanted_images(args):
    """(prompt, seed, path) of every image asked for that is not there yet, this process's share of them; of
    prompts from a file, GenEval's folders are made."""
    records = read_prompts(args.prompts) if args.prompts else [{"prompt": args.prompt}]
    wanted = []
    for i, record in list(enumerate(records))[RANK::WORLD]:
        folder = os.path.join(args.out, f"{i:05d}")
        if args.prompts and not os.path.exists(os.path.join(folder, "metadata.jsonl")):
            os.makedirs(os.path.join(folder, "samples"), exist_ok=True)
            write_text(os.path.join(folder, "metadata.jsonl"), json.dumps(record))
        for k in range(args.n):
            seed = args.seed + i * args.n + k
            if args.prompts:
                path = os.path.join(folder, "samples", f"{k:05d}.png")
            else:
                path = free_path(args.out, record["prompt"], seed)
            if not os.path.exists(path):
                wanted.append((record["prompt"], seed, path))
    return wanted


def run(args):
    if WORLD > 1 and args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if args.export:
        return export(args.model, args.export)
    dtype = getattr(torch, args.dtype)
    model = load_denoiser(args.model, dtype=dtype)
    vae, text_encoder = load_parts(model, args.model, args.device, dtype)
    patch, own = vae.factor * model.config.patch_size, model.config.sample_size * vae.factor * args.upscale
    size = parse_size(args.size or str(own), patch * args.upscale)
    how = {name: getattr(args, name) for name in HOW}
    wanted = wanted_images(args)

    # the text encoder, by far the largest part, is done and gone before the denoiser enters the card
    text_encoder = encode_first(text_encoder, [args.negative, *(prompt for prompt, _, _ in wanted)])
    torch.nn.Module.to(model, args.device)
    if args.compile:
        model.compile_repeated_blocks(fullgraph=True)
    at_once = max(1, 4096 * patch**2 // (size[0] * size[1]))
    for start in range(0, len(wanted), at_once):
        prompts, seeds, paths = zip(*wanted[start : start + at_once])
        images = generate(model, vae, text_encoder, prompts, size, seeds, progress=True, **how)
        settings = json.dumps(dict(how, size=size, model=args.model))
        for image, prompt, seed, path in zip(images, prompts, seeds, paths):
            save_png(image, path, prompt=prompt, seed=seed, settings=settings)
            print(path)


def main():
    keep_freed_memory(largest=True)
    as_command("sample.py", run, parse_arguments(), "stopped; the pictures finished so far are saved")


if __name__ == "__main__":
    main()
