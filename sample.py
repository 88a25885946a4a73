"""Sample images from a T2MD checkpoint (or any diffusers PixArt folder), at any size.

    python sample.py "a photo of a red circle and a blue square"          # the shipped student, its own size
    python sample.py "a photo of a star" --size 2048                      # far above the trained size
    python sample.py "prompt" --size 3840x2160 --n 4 --seed 7 --steps 20 --guidance 4.5 --negative "..."
    python sample.py --prompts evaluation_metadata.jsonl --n 4 --out DIR  # GenEval's layout
    torchrun --nproc-per-node 8 sample.py --prompts prompts.txt --images 4 --out DIR

From Python: `sample.load("assets/student")(["a photo of a star"], size=(512, 512), seeds=[0])` -> PIL images.

Sections: 1 the sampler - 2 whole pictures - 3 export - 4 prompts and files - 5 the command line.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import t2md
from data import files
from data.prompts import read_prompts

transformers_logging.disable_progress_bar()  # its bars for loading weights drown ours
HERE = os.path.dirname(os.path.abspath(__file__))
SHIPPED = os.path.join(HERE, "assets", "student")

# ---------------------------------------------------------------------------------------------------
# 1. The sampler
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplerSettings:
    """How a picture is sampled. The last four are the checkpoint's own unless they are given."""

    steps: int = 20  # of DPM-Solver++
    negative: str = ""  # prompt of the unconditional branch
    upscale: int = 1  # upsample guidance, for so many times the trained size
    direct: bool = False  # from noise at any size, as the paper does; else large sizes in turn: `generate`
    guidance: float = 4.5  # classifier-free guidance; at most 1: none
    guidance_interval: int = 0  # timestep below which there is no guidance (Kynkaanniemi et al. 2024)
    renoise: int = 500  # timestep up to which an enlarged picture is noised again
    timestep_shift: float = 1.0  # above 1, more of the steps at much noise: `set_timesteps`


CHECKPOINTS_OWN = ("guidance", "guidance_interval", "renoise", "timestep_shift")


def sampler_settings(model, **given):
    """Return a model's SamplerSettings: what is `given` and not None, then what its config.json says."""
    settings = {name: model.config[name] for name in CHECKPOINTS_OWN}
    for name, value in given.items():
        if value is not None:
            settings[name] = value
    return SamplerSettings(**settings)


@torch.no_grad()
def denoise(model, text, mask, noise, settings, pixels_per_latent=8, start=None, progress=False):
    """Turn noise into latents (b, c, height, width) by DPM-Solver++ with guidance (equation 2).

    Equals diffusers' PixArtAlphaPipeline.

    text (2b, s, caption_width), mask (2b, s): first of the unconditional branch, then of the captions.
    noise: standard normal (b, c, height, width).  settings: a SamplerSettings.
    start: latents (b, c, height, width) to add the noise to, at the first timestep <= settings.renoise.
    """
    # 1. The scheduler: the timesteps, and how one is left for the next.
    scheduler = make_scheduler(model.config.beta_schedule)
    shift = settings.timestep_shift if start is None else 1.0  # an enlarged picture has its layout
    set_timesteps(scheduler, settings.steps, shift)
    timesteps = scheduler.timesteps
    latents = noise
    if start is not None:
        first = first_step(timesteps, settings.renoise)
        scheduler.set_begin_index(first)
        timesteps = timesteps[first:]
        alpha_bar = scheduler.alphas_cumprod[timesteps[0]]
        latents = alpha_bar.sqrt() * start + (1 - alpha_bar).sqrt() * noise.to(start.device)
    latents = latents.to(model.device, model.dtype)
    text = text.to(model.device, model.dtype)
    mask = mask.to(model.device)
    for t in tqdm(timesteps, desc="denoising", disable=not progress):
        # 2. The predicted noise.
        guidance = settings.guidance if t >= settings.guidance_interval else 1.0
        predict = functools.partial(guided_noise, model, text, mask, guidance, pixels_per_latent)
        predicted = predict(latents, t)
        if settings.upscale > 1:
            alphas_cumprod = scheduler.alphas_cumprod
            predicted = upsample_guidance(predict, latents, t, predicted, alphas_cumprod, settings.upscale)
        # 3. The step.
        latents = scheduler.step(predicted, t, latents, return_dict=False)[0]
    return latents


def make_scheduler(beta_schedule):
    """Return diffusers' DPM-Solver++ (2M) on the 1000-step noise schedule of the model's training."""
    return DPMSolverMultistepScheduler(**t2md.SCHEDULE, beta_schedule=beta_schedule)


def set_timesteps(scheduler, steps, shift):
    """Set diffusers' even timesteps, each u = t / 999 moved up to shift u / (1 + (shift - 1) u).

    The larger a picture, the more noise its layout outlasts, so the more steps belong there (SD3 2403.03206,
    section 5.3.2). A shift of 1 moves nothing.
    """
    scheduler.set_timesteps(steps)
    even = scheduler.timesteps.double() / 999
    shifted = shift * even / (1 + (shift - 1) * even)
    timesteps = (999 * shifted).round().long().unique().flip(0)  # many steps, much shifted, can coincide
    scheduler.set_timesteps(timesteps=timesteps.tolist())


def first_step(timesteps, renoise):
    """Return the index of the first timestep that is at most `renoise`; of the last, if none is."""
    above = int((timesteps > renoise).sum())
    return min(above, len(timesteps) - 1)


def guided_noise(model, text, mask, guidance, pixels_per_latent, z_t, t):
    """Predict the noise in z_t (b, c, height, width) with classifier-free guidance.

    text and mask have 2b rows, as in `denoise`.
    If guidance is at most 1 the unconditional branch is not computed.
    """
    batch = len(z_t)
    height = z_t.shape[2] * pixels_per_latent
    width = z_t.shape[3] * pixels_per_latent
    if guidance <= 1:
        conditions = t2md.size_conditions(model, height, width, batch)
        return t2md.predict_noise(model, z_t, t, text[batch:], mask[batch:], **conditions)
    conditions = t2md.size_conditions(model, height, width, 2 * batch)
    noise = t2md.predict_noise(model, torch.cat([z_t, z_t]), t, text, mask, **conditions)
    unconditional, conditional = noise.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def upsample_guidance(predict, z_t, t, noise, alphas_cumprod, m):
    """Guide sampling at m times the size that a model knows, without training (upsample guidance, as in DiM).

    In the first 30% of sampling the means of m x m pixels of noise = predict(z_t, t), (b, c, height, width),
    are replaced by what is predicted for the pooled z_t, at the model's own size.
    """
    if t < 0.7 * len(alphas_cumprod):
        return noise
    pooled, matched = t2md.pool_noisy(z_t, t, alphas_cumprod, m)
    small = predict(pooled, matched)
    return noise + F.interpolate(small / m - F.avg_pool2d(noise, m), scale_factor=m, mode="nearest")


# ---------------------------------------------------------------------------------------------------
# 2. Whole pictures
# ---------------------------------------------------------------------------------------------------


def load_networks(folder, device="cpu", dtype=torch.float32, **overrides):
    """Load (model, vae, text_encoder) of a checkpoint folder, frozen.  overrides: entries of its config."""
    model = t2md.load_denoiser(folder, device, dtype, **overrides)
    vae, text_encoder = t2md.load_parts(model, folder, device, dtype)
    return model, vae, text_encoder


def load(folder, device="cpu", dtype=torch.float32, **overrides):
    """Return `generate` with a checkpoint's networks filled in: call it with prompts, size, seeds."""
    return functools.partial(generate, *load_networks(folder, device, dtype, **overrides))


@torch.no_grad()
def generate(model, vae, text_encoder, prompts, size, seeds, progress=False, **given):
    """Draw PIL images of size (width, height) pixels, of one prompt and one seed each.

    Both sides are multiples of vae.factor * patch_size.  given: entries of SamplerSettings.

    Far above the trained size progressively, in pixel space (not in the paper; relatives: SDEdit,
    DiffuseHigh): make the picture at that size, then repeat: decode, enlarge, encode, add noise up to the
    timestep `renoise`, denoise. With `direct` or `upscale`, as in the paper: from noise at the full size.
    """
    settings = sampler_settings(model, **given)
    text, mask = text_encoder([settings.negative] * len(prompts) + list(prompts))
    if settings.direct or settings.upscale > 1:
        sizes = [size]
    else:
        known = model.config.sample_size * vae.factor
        sizes = sizes_on_the_way(size, known, model.config.patch_size * vae.factor)
    start = None
    pixels = None
    for level, (width, height) in enumerate(sizes):
        noise = []
        for _, seed in zip(prompts, seeds, strict=True):
            noise.append(
                files.noise_for(seed, vae.channels, height // vae.factor, width // vae.factor, level)
            )
        if level > 0:
            pixels = F.interpolate(pixels, size=(height, width), mode="bicubic").clamp(-1, 1)
            start, _ = vae.moments(pixels, tile=1024)
        latents = denoise(model, text, mask, torch.cat(noise), settings, vae.factor, start, progress)
        if not latents.isfinite().all():
            raise FloatingPointError("the picture is not finite; try --dtype float32")
        pixels = vae.decode(latents)
    return to_images(pixels)


def sizes_on_the_way(size, known, multiple):
    """Return the sizes (width, height) in pixels at which progressive sampling makes a picture of `size`.

    Up to 1.5 times the `known` side there is one size, `size` itself. Above, the first size has the known
    area and the same shape, with sides that are multiples of `multiple`. Each further size doubles the sides;
    the last one is `size`. A last enlargement of less than 7% is joined to the one before.
    """
    width, height = size
    factor = (width * height) ** 0.5 / known
    if factor <= 1.5:
        return [size]
    first_width = max(1, round(width / factor / multiple)) * multiple
    first_height = max(1, round(height / factor / multiple)) * multiple
    doublings = math.ceil(math.log2(factor) - 0.1)
    sizes = [(first_width * 2**k, first_height * 2**k) for k in range(doublings)]
    return sizes + [size]


def images_at_once(size):
    """Return how many images of a size make a batch: 4,096 of PixArt's tokens, of 16 x 16 px each."""
    width, height = size
    return max(1, 4096 * 16**2 // (width * height))


def generate_all(model, vae, text_encoder, prompts, size, seed, **given):
    """Draw a PIL image of size (width, height) for each prompt, number k from the noise of seed + k."""
    images = []
    batch = images_at_once(size)
    for k in range(0, len(prompts), batch):
        some = prompts[k : k + batch]
        seeds = range(seed + k, seed + k + len(some))
        images += generate(model, vae, text_encoder, some, size, seeds, **given)
    return images


def to_images(pixels):
    """Turn pixels (b, 3, height, width) in [-1, 1] into a list of PIL images."""
    arrays = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def encode_captions(text_encoder, captions):
    """Return {caption: its features (s, width), on the CPU}, encoded one by one, so that none is padded."""
    features = {}
    for caption in captions:
        if caption not in features:
            encoded, _ = text_encoder([caption])
            features[caption] = encoded[0].cpu()
    return features


class EncodedCaptions:
    """Replaces the text encoder when all captions are encoded, so that its memory can be freed."""

    def __init__(self, features):
        self.features = features  # of `encode_captions`

    def __call__(self, captions):
        """Return the features (b, s, width) and mask (b, s) of b captions."""
        return t2md.pad_features([self.features[caption] for caption in captions])


# ---------------------------------------------------------------------------------------------------
# 3. Export
# ---------------------------------------------------------------------------------------------------


def export(checkpoint, folder, **overrides):
    """Write a checkpoint with its VAE, T5, tokenizer, scheduler and t2md.py as one diffusers pipeline.

    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads it on any machine.
    """
    if os.path.isdir(folder) and os.listdir(folder):
        raise ValueError(f"--export {folder} is not empty; name a new folder")
    model = t2md.load_backbone(checkpoint, **overrides)
    vae, text_encoder = t2md.load_parts(model, checkpoint)
    if vae.shift != 0:
        reason = "diffusers' PixArtAlphaPipeline does not know a VAE's shift_factor"
        raise ValueError(f"{checkpoint} cannot be exported with {vae.source}: {reason}")
    model.register_to_config(vae=None, text_encoder=None)  # both are in the pipeline now
    side = model.config.sample_size
    if model.conditioned_on_size:
        # The pipeline tells the size to models of sample_size 128 alone; the coordinates stay the same.
        scale = model.interpolation_scale * 128 / side
        model.register_to_config(sample_size=128, interpolation_scale=scale, use_additional_conditions=True)
    pipeline = PixArtAlphaPipeline(
        tokenizer=text_encoder.tokenizer,
        text_encoder=text_encoder.model,
        vae=vae.model,
        transformer=model,
        scheduler=make_scheduler(model.config.beta_schedule),
    )
    pipeline.save_pretrained(folder)
    pixels = side * vae.factor
    flags = f"height={pixels}, width={pixels}, use_resolution_binning=False"
    flags += f", guidance_scale={model.config.guidance}"
    if model.config.timestep_shift != 1:  # diffusers' scheduler has no such shift for this kind of noise
        set_timesteps(pipeline.scheduler, 20, model.config.timestep_shift)
        flags += f", timesteps={pipeline.scheduler.timesteps.tolist()}"
    load_it = f'DiffusionPipeline.from_pretrained("{folder}", trust_remote_code=True)'
    print(f'{load_it}("a photo of a star", {flags}).images[0]')


# ---------------------------------------------------------------------------------------------------
# 4. Prompts and files
# ---------------------------------------------------------------------------------------------------


def parse_size(text, multiple):
    """Turn "2048" or "3840x2160" (pixels) into (width, height), rounded to a multiple, and said."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None or int(match[1]) == 0 or match[2] and int(match[2]) == 0:
        raise ValueError(f"--size {text} is no size: give pixels, as 2048 or 3840x2160 (width x height)")
    asked_width = int(match[1])
    asked_height = int(match[2] or match[1])
    width = max(multiple, round(asked_width / multiple) * multiple)
    height = max(multiple, round(asked_height / multiple) * multiple)
    if (width, height) != (asked_width, asked_height):
        print(f"--size {text} is rounded to {width}x{height}, multiples of {multiple}", file=sys.stderr)
    return width, height


def missing_images(records, folder, n, first_seed):
    """Return (record, seed, path) of each image of a list that `folder` lacks, in GenEval's layout.

    Of several processes each gets its own share.
    """
    missing = []
    for i in range(files.RANK, len(records), files.WORLD):
        for k in range(n):
            path = os.path.join(folder, f"{i:05d}", "samples", f"{k:05d}.png")
            if not os.path.exists(path):
                missing.append((records[i], first_seed + i * n + k, path))
    return missing


def check_folder(folder, made_with):
    """Raise ValueError if the pictures that are in `folder` were made with anything else."""
    has_pictures = any(name.endswith(".png") for _, _, names in os.walk(folder) for name in names)
    if has_pictures and not os.path.isfile(os.path.join(folder, "made_with.json")):
        raise ValueError(f"{folder} holds pictures, and no made_with.json that says of what; name another")
    files.check_made_with(folder, made_with)


def write_listed_image(path, image, record, folder, made_with, **text_fields):
    """Write an image of a list of prompts, with its record beside it; the first one claims the folder."""
    claimed = os.path.join(folder, "made_with.json")
    if not os.path.exists(claimed):
        files.write_json(claimed, made_with)
    metadata = os.path.join(os.path.dirname(os.path.dirname(path)), "metadata.jsonl")
    files.write_text(metadata, json.dumps(record))
    files.write_png(path, image, **text_fields)


def free_path(folder, prompt, seed):
    """Return folder/the-prompt-seed.png, or with -1, -2, ... if it is taken; an empty file takes the name."""
    stem = os.path.join(folder, f"{files.slug(prompt)[:60] or 'image'}-{seed}")
    for k in itertools.count():
        path = f"{stem}-{k}.png" if k else f"{stem}.png"
        with contextlib.suppress(FileExistsError):
            open(path, "x").close()
            return path


# ---------------------------------------------------------------------------------------------------
# 5. The command line
# ---------------------------------------------------------------------------------------------------


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("prompt", nargs="?", help="what to draw")
    what("--prompts", help="a .txt, one prompt per line, or GenEval's metadata .jsonl; writes its layout")
    what("--export", metavar="DIR", help="draw nothing, write the checkpoint as a diffusers pipeline")
    add = parser.add_argument
    add("--model", default=SHIPPED, help="a T2MD checkpoint, or a diffusers PixArt folder or repository")
    add("--vae", help="a folder or repository, instead of what the checkpoint names")
    add("--text-encoder", help="the same for T5 and its tokenizer")
    add("--size", help="pixels, 2048 or 3840x2160 (width x height); the model's own size if not given")
    add("--n", "--images", type=int, default=1, help="of each prompt; torchrun itself stops at --n")
    add("--seed", type=int, default=0, help="of the first image's noise")
    add("--steps", type=int, default=20, help="of DPM-Solver++")
    add("--guidance", type=float, metavar="G", help="classifier-free guidance; 1 switches it off")
    add("--guidance-interval", type=int, metavar="T", help="timestep below which there is no guidance")
    add("--direct", action="store_true", help="sample large sizes from noise at once, as the paper does")
    add("--renoise", type=int, metavar="T", help="timestep up to which an enlarged picture is noised again")
    add("--timestep-shift", type=float, metavar="S", help="above 1, more of the steps at much noise")
    add("--upscale", type=int, default=1, metavar="M", help="upsample guidance, for M times the trained size")
    add("--negative", default="", help="prompt of the unconditional branch")
    add("--out", default="samples", help="folder for the images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of denoiser and text encoder")
    add("--compile", action="store_true", help="torch.compile each block; pays for many images of one size")
    add("--debug", action="store_true", help="show where an error was raised")
    args = parser.parse_args(argv)
    if args.prompt is not None and not args.prompt.strip():
        parser.error("the prompt is empty")
    if min(args.n, args.steps, args.upscale) < 1 or args.steps > 999:
        parser.error("--n, --steps and --upscale must be at least 1, --steps at most 999")
    if args.timestep_shift is not None and args.timestep_shift <= 0:
        parser.error("--timestep-shift must be above 0; 1 spaces the steps evenly")
    return args


def run(args):
    """Draw or export what the command line asks for."""
    # 1. What would fail late is tried first: processes, device, folder, list of prompts.
    if files.WORLD > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    torch.empty(0, device=args.device)
    os.makedirs(args.export or args.out, exist_ok=True)
    tempfile.TemporaryFile(dir=args.export or args.out).close()
    records = read_prompts(args.prompts) if args.prompts else []
    # 2. The checkpoint, its parts, and the settings, which are the checkpoint's where no flag gives them.
    overrides = part_overrides(args)
    if args.export:
        export(args.model, args.export, **overrides)
        return
    dtype = getattr(torch, args.dtype)
    model = t2md.load_denoiser(args.model, dtype=dtype, **overrides)
    vae, text_encoder = t2md.load_parts(model, args.model, args.device, dtype)
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(SamplerSettings)}
    settings = dataclasses.asdict(sampler_settings(model, **given))
    side = vae.factor * args.upscale
    size = parse_size(args.size or str(side * model.config.sample_size), side * model.config.patch_size)
    # 3. What is to be drawn: (record, seed, path).
    made_with = {}
    if args.prompts:
        made_with = describe(args, settings, size, records, vae, text_encoder)
        check_folder(args.out, made_with)
        wanted = missing_images(records, args.out, args.n, args.seed)
    else:
        seeds = range(args.seed + files.RANK, args.seed + args.n, files.WORLD)
        wanted = [(dict(prompt=args.prompt), seed, None) for seed in seeds]
    # 4. The text encoder, by far the largest part, is done and gone before the denoiser enters the card.
    prompts = [record["prompt"] for record, _, _ in wanted]
    features = encode_captions(text_encoder, [args.negative, *prompts])
    captions = EncodedCaptions(features)
    if text_encoder.cut > 0:
        cut = f"{text_encoder.cut} of {len(features)} prompts are cut"
        print(f"{cut} to the {text_encoder.max_length} tokens that the text encoder takes", file=sys.stderr)
    text_encoder.unload()
    torch.nn.Module.to(model, args.device)
    print(t2md.kernels_in_use(args.device, dtype), file=sys.stderr)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # graphs: mixers x sizes x batches
        model.compile_repeated_blocks()
    # 5. Draw.
    batch = images_at_once(size)
    for k in range(0, len(wanted), batch):
        some = wanted[k : k + batch]
        seeds = [seed for _, seed, _ in some]
        progress = files.RANK == 0
        images = generate(model, vae, captions, prompts[k : k + batch], size, seeds, progress, **settings)
        for image, (record, seed, path) in zip(images, some):
            about = json.dumps(dict(settings, size=size, model=args.model))
            text_fields = dict(prompt=record["prompt"], seed=seed, settings=about)
            if args.prompts:
                write_listed_image(path, image, record, args.out, made_with, **text_fields)
            else:
                path = free_path(args.out, args.prompt, seed)
                files.write_png(path, image, **text_fields)
            print(path)


def part_overrides(args):
    """Return --vae and --text-encoder as entries of the model's config, folders by their absolute path."""
    overrides = {}
    for name in ("vae", "text_encoder"):
        path = getattr(args, name)
        if path:
            overrides[name] = os.path.abspath(path) if os.path.isdir(path) else path
    return overrides


def describe(args, settings, size, records, vae, text_encoder):
    """Return all that the pictures of a list of prompts depend on, for made_with.json."""
    made_with = dict(settings, size=size, n=args.n, seed=args.seed, dtype=args.dtype)
    made_with["model"] = files.fingerprint(args.model)
    made_with["vae"] = files.fingerprint(vae.source, "vae")
    made_with["text_encoder"] = files.fingerprint(text_encoder.source, "text_encoder")
    made_with["prompts"] = hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16]
    return made_with


def main():
    files.keep_freed_memory(largest=True)
    files.as_command("sample.py", run, parse_arguments(), "stopped; the pictures finished so far are saved")


if __name__ == "__main__":
    main()
