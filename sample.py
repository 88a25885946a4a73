"""Sample images from a T2MD checkpoint (or any diffusers PixArt folder), at any size.

    python sample.py "a photo of a red circle and a blue square"          # the shipped student, base size
    python sample.py "a photo of a star" --size 2048                      # far above the trained size
    python sample.py "prompt" --size 3840x2160 --n 4 --seed 7 --steps 20 --guidance 4.5 --negative "..."
    python sample.py --prompts evaluation_metadata.jsonl --n 4 --out DIR  # GenEval's layout
    torchrun --nproc-per-node 8 sample.py --prompts prompts.txt --images 4 --out DIR

From Python: `sample.load("assets/student")(["a photo of a star"], size=(512, 512), seeds=[0])` -> PIL images.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import t2md
from data import files
from t2md import ALWAYS_FLOAT32, VAE, MambaMixer, TextEncoder, load_backbone, pad_features, predict_noise

transformers_logging.disable_progress_bar()  # its bars for loading weights drown ours
HERE = os.path.dirname(os.path.abspath(__file__))
SHIPPED = os.path.join(HERE, "assets", "student")


# -- 1. the sampler ----------------------------------------------------------------------------------------
@torch.no_grad()
def denoise(model, text, negative, latents, steps=20, guidance=4.5, guidance_interval=0, pixels_per_latent=8,
            upscale=1, picture=None, renoise=1000, progress=False):  # fmt: skip
    """Noise -> latents, by DPM-Solver++ with guidance (equation 2); equals diffusers' PixArtAlphaPipeline.

    text, negative: (features, mask) of the captions and of the unconditional branch, B rows each; the latter
        is not computed if guidance is at most 1 or t < guidance_interval (Kynkaanniemi et al. 2024).
    latents: standard normal noise (B, C, h, w).  upscale: see `upsample_guidance`.
    picture: latents (B, C, h, w) to start from instead, at the sampler's first timestep <= renoise.
    """
    scheduler = make_scheduler(model.config.beta_schedule)
    scheduler.set_timesteps(steps)
    first = 0 if picture is None else first_step(scheduler, renoise)
    scheduler.set_begin_index(first)
    timesteps = scheduler.timesteps[first:]
    if picture is not None:
        alpha_bar = scheduler.alphas_cumprod[timesteps[0]]
        latents = alpha_bar.sqrt() * picture + (1 - alpha_bar).sqrt() * latents.to(picture.device)
    latents = latents.to(model.device, model.dtype)
    both = pad_features([row[keep.bool()] for part in (negative, text) for row, keep in zip(*part)])
    text, both = ((f.to(model.device, model.dtype), mask.to(model.device)) for f, mask in (text, both))

    def predict(guided, z_t, t):
        size = [side * pixels_per_latent for side in z_t.shape[-2:]]
        z_t, captions = (torch.cat([z_t, z_t]), both) if guided else (z_t, text)  # one batch, two branches
        noise = predict_noise(model, z_t, t, *captions, **size_conditions(model, *size, len(z_t)))
        if not guided:
            return noise
        unconditional, conditional = noise.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    for t in tqdm(timesteps, desc="denoising", disable=not progress):
        predict_t = functools.partial(predict, guidance > 1 and t >= guidance_interval)
        noise = predict_t(latents, t)
        if upscale > 1:
            noise = upsample_guidance(predict_t, latents, t, noise, scheduler.alphas_cumprod, upscale)
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


def first_step(scheduler, renoise):
    """The index of a scheduler's first timestep that is at most `renoise`; its last, if none is."""
    return min(int((scheduler.timesteps > renoise).sum()), len(scheduler.timesteps) - 1)


def sizes_on_the_way(size, known, multiple):
    """The sizes (width, height) in pixels at which progressive sampling makes a picture of `size`: up to 1.5
    times the `known` side that alone; beyond, first the known area in the same shape, both sides multiples
    of `multiple`, then doubled, the last time by what remains."""
    factor = (size[0] * size[1]) ** 0.5 / known
    if factor <= 1.5:
        return [size]
    first = [max(1, round(side / factor / multiple)) * multiple for side in size]
    doublings = math.ceil(math.log2(factor) - 0.1)
    return [(first[0] * 2**k, first[1] * 2**k) for k in range(doublings)] + [size]


@torch.no_grad()
def generate(model, vae, text_encoder, prompts, size, seeds, steps=20, guidance=None, guidance_interval=None,
             negative="", upscale=1, direct=False, renoise=None, progress=False):  # fmt: skip
    """Prompts and seeds (one each per image) -> PIL images of size (width, height), pixels, both multiples of
    vae.factor * patch_size. guidance, guidance_interval and renoise are the model config's if None.

    Far above the model's start_size progressively, in pixel space (not in the paper; relatives: SDEdit,
    DiffuseHigh): the picture is made at that size, decoded, enlarged, encoded, noised up to the timestep
    `renoise` and denoised from there. If `direct`, or with `upscale`, as the paper: from noise at full size.
    """
    config, picture, pixels = model.config, None, None
    settings = dict(guidance=guidance, guidance_interval=guidance_interval, renoise=renoise)
    settings = {name: config[name] if value is None else value for name, value in settings.items()}
    settings |= dict(steps=steps, pixels_per_latent=vae.factor, upscale=upscale, progress=progress)
    text, unconditional = text_encoder(prompts), text_encoder([negative] * len(prompts))
    known, multiple = (config.start_size or config.sample_size) * vae.factor, config.patch_size * vae.factor
    way = [size] if direct or upscale > 1 else sizes_on_the_way(size, known, multiple)
    for level, (width, height) in enumerate(way):
        shape = vae.channels, height // vae.factor, width // vae.factor
        noise = [files.noise_for(seed, *shape, level) for _, seed in zip(prompts, seeds, strict=True)]
        if level:
            pixels = F.interpolate(pixels, size=(height, width), mode="bicubic").clamp(-1, 1)
            picture, _ = vae.moments(pixels, tile=1024)
        latents = denoise(model, text, unconditional, torch.cat(noise), picture=picture, **settings)
        pixels = vae.decode(latents)
    return to_images(pixels)


def images_at_once(size):
    """How many images of size (width, height) make a batch: 4,096 of PixArt's tokens, of 16 x 16 px each."""
    return max(1, 4096 * 16**2 // (size[0] * size[1]))


def generate_all(model, vae, text_encoder, prompts, size, seed, **settings):
    """One PIL image of size (width, height) for each prompt, number k from the noise of seed + k."""
    images, batch = [], images_at_once(size)
    for k in range(0, len(prompts), batch):
        some = prompts[k : k + batch]
        seeds = range(seed + k, seed + k + len(some))
        images += generate(model, vae, text_encoder, some, size, seeds, **settings)
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
    sizes = torch.tensor([[height, width, height / width]] * batch, device=model.device, dtype=model.dtype)
    return dict(resolution=sizes[:, :2], aspect_ratio=sizes[:, 2:])


def upsample_guidance(predict, z_t, t, noise, alphas_cumprod, m):
    """Training-free sampling at m times the size a model knows (upsample guidance, as in DiM): in the first
    30% of it the means of m x m pixels of noise = predict(z_t, t), (B, C, h, w), are replaced by what is
    predicted for the pooled z_t, at the model's own size."""
    if t < 0.7 * len(alphas_cumprod):
        return noise
    # Pooling averages the noise of m x m pixels: the result is as noisy as an image of m^2 times the SNR.
    snr = alphas_cumprod / (1 - alphas_cumprod)
    matched = (snr[: t + 1] - m**2 * snr[t]).abs().argmin()
    power = alphas_cumprod[t] + (1 - alphas_cumprod[t]) / m**2  # of a pooled z_t, per element
    small = predict(F.avg_pool2d(z_t, m) / power.sqrt(), matched)
    return noise + F.interpolate(small / m - F.avg_pool2d(noise, m), scale_factor=m, mode="nearest")


# -- 2. loading and exporting ------------------------------------------------------------------------------
def load(folder, device="cpu", dtype=torch.float32, **overrides):
    """A checkpoint folder -> `generate` with all its parts filled in: call it with prompts, size, seeds."""
    model = load_denoiser(folder, device, dtype, **overrides)
    return functools.partial(generate, model, *load_parts(model, folder, device, dtype))


def load_denoiser(path_or_repo, device="cpu", dtype=torch.float32, **overrides):
    """A T2MD checkpoint, or PixArt transformer, with `overrides` of its config -> frozen, folded T2MD."""
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
    """Where a checkpoint's VAE or text encoder is: a folder relative to it, or a repository. A plain PixArt
    pipeline names none: its parts are in the pipeline itself."""
    beside = os.path.normpath(os.path.join(checkpoint, reference or ""))
    if reference and reference.startswith(".") and not os.path.isdir(beside):
        named = f"{checkpoint} names its VAE and text encoder relative to itself, and there is no {beside}"
        raise FileNotFoundError(f"{named}: copy it along, give --vae and --text-encoder, or use --export")
    return checkpoint if reference is None else beside if os.path.isdir(beside) else reference


def load_parts(model, folder, device="cpu", dtype=torch.float32):
    """The frozen (VAE, TextEncoder) that the config of the checkpoint in `folder` names; the latter in
    `dtype` (SDXL's VAE overflows in less than float32)."""
    vae = VAE(component_path(folder, model.config.vae), device)
    return vae, TextEncoder(component_path(folder, model.config.text_encoder), device=device, dtype=dtype)


def encode_first(text_encoder, captions):
    """Run the text encoder on all captions it will be asked for -> what stands in for it then."""
    known = {caption: text_encoder([caption])[0][0].cpu() for caption in dict.fromkeys(captions)}
    if text_encoder.cut:
        which = f"{text_encoder.cut} of {len(known)} prompts are cut to the {text_encoder.max_length} tokens"
        print(f"{which} that the text encoder takes", file=sys.stderr)
    return lambda captions: pad_features([known[caption] for caption in captions])


def export(checkpoint, folder, **overrides):
    """Write a checkpoint with its VAE, T5, tokenizer, scheduler and t2md.py as one diffusers pipeline, which
    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads on any machine."""
    if os.path.isdir(folder) and os.listdir(folder):
        raise ValueError(f"--export {folder} is not empty; name a new folder")
    model = load_backbone(checkpoint, **overrides)
    vae, text_encoder = load_parts(model, checkpoint)
    model.register_to_config(vae=None, text_encoder=None)  # both are in the pipeline now
    side = model.config.sample_size
    if model.conditioned_on_size:  # the pipeline tells the size to models of sample_size 128 alone
        same_coordinates = dict(sample_size=128, interpolation_scale=model.interpolation_scale * 128 / side)
        model.register_to_config(**same_coordinates, use_additional_conditions=True)
    parts = dict(tokenizer=text_encoder.tokenizer, text_encoder=text_encoder.model, vae=vae.model)
    parts |= dict(transformer=model, scheduler=make_scheduler(model.config.beta_schedule))
    PixArtAlphaPipeline(**parts).save_pretrained(folder)
    shutil.copy(t2md.__file__, os.path.join(folder, "transformer"))
    size = f"height={side * vae.factor}, width={side * vae.factor}, use_resolution_binning=False"
    load_it = f'DiffusionPipeline.from_pretrained("{folder}", trust_remote_code=True)'
    print(f'{load_it}("a photo of a star", {size}, guidance_scale={model.config.guidance}).images[0]')


# -- 3. the command line -----------------------------------------------------------------------------------
def parse_size(text, multiple):
    """ "2048" or "3840x2160" (width x height, pixels) -> (width, height), rounded to a multiple, and said."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    size = match and (int(match[1]), int(match[2] or match[1]))
    if not size or min(size) <= 0:
        raise ValueError(f"--size {text} is no size: give pixels, as 2048 or 3840x2160 (width x height)")
    width, height = (max(multiple, round(side / multiple) * multiple) for side in size)
    if (width, height) != size:
        print(f"--size {text} is rounded to {width}x{height}, multiples of {multiple}", file=sys.stderr)
    return width, height


def read_prompts(path):
    """A .txt with a prompt a line, or a .jsonl with a "prompt" in each, as GenEval's -> records.
    In UTF-8, or UTF-16 that begins with its mark; empty lines are passed over, anything else is refused."""
    kind, records = os.path.splitext(path)[1].lower(), []
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"{path} must be a .txt or a .jsonl, and be called so")
    with open(path, "rb") as file:
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with open(path, encoding=encoding, errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            try:  # `encode` raises for what was no text, and for half of an emoji
                record = json.loads(line) if kind == ".jsonl" and line.strip() else {"prompt": line.strip()}
                prompt = record["prompt"].encode().strip()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                prompt = b"\0"
            if b"\0" in prompt or not prompt and line.strip() or prompt.startswith((b'{"', rb"{\rtf")):
                what = 'a .txt has text in UTF-8, a .jsonl a JSON object with a "prompt" in each line'
                raise ValueError(f"{path}, line {number}, has no prompt: {what}")
            records += [record] if prompt else []
    if not records:
        raise ValueError(f"{path} holds no prompts")
    return records


def missing_images(records, args, made_with):
    """(prompt, seed, path) of each image of a list of prompts that is not in --out yet, this process's share
    of them; GenEval's folders are made. Raises ValueError if what is there was made with anything else."""
    if os.path.isdir(f"{args.out}/00000") and not os.path.isfile(f"{args.out}/made_with.json"):
        raise ValueError(f"{args.out} holds pictures, and no made_with.json that says of what; name another")
    files.claim(args.out, made_with)
    missing = []
    for i, record in list(enumerate(records))[files.RANK :: files.WORLD]:
        folder = f"{args.out}/{i:05d}"
        os.makedirs(f"{folder}/samples", exist_ok=True)
        files.write_text(f"{folder}/metadata.jsonl", json.dumps(record))
        paths = (f"{folder}/samples/{k:05d}.png" for k in range(args.n))
        seeds = itertools.count(args.seed + i * args.n)
        missing += [(record["prompt"], s, path) for s, path in zip(seeds, paths) if not os.path.exists(path)]
    return missing


def free_path(folder, prompt, seed):
    """folder/the-prompt-seed.png, or with -1, -2, ... where that name is taken; an empty file takes it."""
    stem = os.path.join(folder, f"{files.slug(prompt)[:60] or 'image'}-{seed}")
    for path in (f"{stem}-{k}.png" if k else f"{stem}.png" for k in itertools.count()):
        with contextlib.suppress(FileExistsError):
            open(path, "x").close()
            return path


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what, add = parser.add_mutually_exclusive_group(required=True).add_argument, parser.add_argument
    what("prompt", nargs="?", help="what to draw")
    what("--prompts", help="a .txt with a prompt a line, or GenEval's metadata .jsonl, its layout is written")
    what("--export", metavar="DIR", help="draw nothing, write the checkpoint as a diffusers pipeline")
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
    return args


def run(args):
    # 1. What would fail late is tried first.
    if files.WORLD > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    torch.empty(0, device=args.device)
    os.makedirs(args.export or args.out, exist_ok=True)
    tempfile.TemporaryFile(dir=args.export or args.out).close()
    records = read_prompts(args.prompts) if args.prompts else []
    # 2. Load; settings that were not given are the checkpoint's.
    parts = {name: getattr(args, name) for name in ("vae", "text_encoder") if getattr(args, name)}
    parts = {name: os.path.abspath(path) if os.path.isdir(path) else path for name, path in parts.items()}
    if args.export:
        return export(args.model, args.export, **parts)
    dtype = getattr(torch, args.dtype)
    model = load_denoiser(args.model, dtype=dtype, **parts)
    vae, text_encoder = load_parts(model, args.model, args.device, dtype)
    settings = "steps guidance guidance_interval negative upscale direct renoise".split()  # of `generate`
    settings = {name: getattr(args, name) for name in settings}
    settings = {name: model.config[name] if value is None else value for name, value in settings.items()}
    side = vae.factor * args.upscale
    size = parse_size(args.size or str(side * model.config.sample_size), side * model.config.patch_size)
    # 3. What is to be drawn, by seed.
    wanted = [(args.prompt, args.seed + k, None) for k in range(args.n)][files.RANK :: files.WORLD]
    if args.prompts:
        sources = dict(model=args.model, vae=vae.source, text_encoder=text_encoder.source)
        made_with = {name: files.fingerprint(source) for name, source in sources.items()} | settings
        made_with["prompts"] = hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16]
        made_with |= dict(size=size, n=args.n, seed=args.seed, dtype=args.dtype)
        wanted = missing_images(records, args, made_with)
    # 4. The text encoder, by far the largest part, is done and gone before the denoiser enters the card.
    text_encoder = encode_first(text_encoder, [args.negative, *(prompt for prompt, _, _ in wanted)])
    torch.nn.Module.to(model, args.device)
    print(t2md.kernels_in_use(args.device, dtype), file=sys.stderr)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # graphs: mixers x sizes x batches
        model.compile_repeated_blocks()
    for k in range(0, len(wanted), images_at_once(size)):
        prompts, seeds, paths = zip(*wanted[k : k + images_at_once(size)])
        images = generate(model, vae, text_encoder, prompts, size, seeds, progress=not files.RANK, **settings)
        for image, prompt, seed, path in zip(images, prompts, seeds, paths):
            path = path or free_path(args.out, prompt, seed)
            made_with = json.dumps(dict(settings, size=size, model=args.model))
            files.write_png(path, image, prompt=prompt, seed=seed, settings=made_with)
            print(path)


def main():
    files.keep_freed_memory(largest=True)
    files.as_command("sample.py", run, parse_arguments(), "stopped; the pictures finished so far are saved")


if __name__ == "__main__":
    main()
