"""Sample images from a T2MD checkpoint (or any diffusers PixArt folder), at any size.

    python sample.py "a photo of a red circle and a blue square"          # the shipped student, base size
    python sample.py "a photo of a star" --size 2048                      # far above the trained size
    python sample.py "prompt" --size 3840x2160 --n 4 --seed 7 --steps 20 --guidance 4.5 --negative "..."
    python sample.py --prompts evaluation_metadata.jsonl --n 4 --out DIR  # GenEval's folder layout; torchrun splits it
    python sample.py --benchmark                                          # all attention against the hybrid, at every size

Sections: 1 loading - 2 the sampler - 3 files - 4 benchmarks - 5 command line.
"""

import argparse
import ctypes
import functools
import importlib.metadata
import itertools
import json
import os
import re
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from t2md import T2MD, VAE, MambaMixer, TextEncoder, predict_noise, ssd

transformers_logging.disable_progress_bar()  # its bars for loading weights drown ours
HERE = os.path.dirname(os.path.abspath(__file__))
SHIPPED = os.path.join(HERE, "assets", "student")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun

# ----------------------------------------------------------------------------------------------------------
# 1. Loading
# ----------------------------------------------------------------------------------------------------------


def load_denoiser(path_or_repo, device="cpu", dtype=torch.float32, **overrides):
    """A T2MD checkpoint folder, or the PixArt transformer of a diffusers folder or repository -> frozen, folded T2MD.

    overrides replace entries of its config, e.g. pos_embed="centered".
    Raises FileNotFoundError if there is none or it is half-written, ValueError if its config does not fit.
    """
    return freeze(T2MD.from_pixart(path_or_repo, **overrides), device, dtype)


def freeze(model, device, dtype):
    """A T2MD, made ready for sampling in `dtype`."""
    for block in model.blocks:
        if isinstance(block.mixer, MambaMixer):
            block.mixer.fold()
    for name, p in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):  # rounded, they would change every decay of a long sequence
            p.data = p.data.to(dtype)
    # nn.Module's `to`: diffusers' own warns of float32 modules that this model does not have
    return torch.nn.Module.to(model, device).eval().requires_grad_(False)


def component_path(checkpoint, reference):
    """Where a checkpoint's VAE or text encoder is: a folder relative to the checkpoint's own, or a repository.

    A plain PixArt pipeline names none: its parts are in the pipeline itself.
    """
    if reference is None:
        return checkpoint
    beside = os.path.normpath(os.path.join(checkpoint, reference))
    return beside if os.path.isdir(beside) else reference


def load_parts(model, folder, device="cpu", dtype=torch.float32):
    """The frozen (VAE, TextEncoder) that the config of the checkpoint in `folder` names; the latter in `dtype` (SDXL's VAE
    overflows in less than float32)."""
    vae = VAE(component_path(folder, model.config.vae), device)
    return vae, TextEncoder(component_path(folder, model.config.text_encoder), device=device, dtype=dtype)


# ----------------------------------------------------------------------------------------------------------
# 2. The sampler
# ----------------------------------------------------------------------------------------------------------


def make_scheduler(beta_schedule):
    """diffusers' DPM-Solver++ (2M) on the 1000-step noise schedule that the model was trained with."""
    return DPMSolverMultistepScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2, beta_schedule=beta_schedule)


def size_conditions(model, height, width, batch):
    """PixArt-1024's conditions for pixels height x width, or none."""
    if not model.conditioned_on_size:
        return {}
    like = dict(device=model.device, dtype=model.dtype)
    return dict(resolution=torch.tensor([[height, width]] * batch, **like),
                aspect_ratio=torch.tensor([[height / width]] * batch, **like))


def matched_timestep(alphas_cumprod, t, m):
    """The timestep up to t whose signal-to-noise ratio is nearest m^2 times that of t: pooling m x m pixels averages their
    noise, so a pooled z_t is as noisy as an image of that timestep."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return (snr[: t + 1] - m**2 * snr[t]).abs().argmin()


def upsample_guidance(predict, z_t, t, noise, alphas_cumprod, m, theta=1.0):
    """Training-free sampling at m times the size a model knows (upsample guidance, as DiM uses it): the means of m x m
    pixels of its prediction are replaced by what it predicts for the pooled z_t, at the size it was trained at.

    predict: predict(z, t) -> guided noise.  noise: predict(z_t, t), (B, C, h, w); h and w multiples of m.
    theta: 0 leaves the prediction alone. Only timesteps in the first 30% of sampling are guided.
    """
    if t < 0.7 * len(alphas_cumprod):
        return noise
    power = alphas_cumprod[t] + (1 - alphas_cumprod[t]) / m**2  # of a pooled z_t, per element
    small = predict(F.avg_pool2d(z_t, m) / power.sqrt(), matched_timestep(alphas_cumprod, t, m))
    return noise + theta * F.interpolate(small / m - F.avg_pool2d(noise, m), scale_factor=m, mode="nearest")


@torch.no_grad()
def denoise(model, text, negative, latents, steps=20, guidance=4.5, pixels_per_latent=8, progress=False, upscale=1):
    """Noise -> latents, by DPM-Solver++ with classifier-free guidance; equals diffusers' PixArtAlphaPipeline.

    Args:
        text, negative: (features, mask) of the captions and of the unconditional branch, B rows each.
        latents: standard normal noise (B, C, h, w).  guidance: 1 or less runs the conditional branch alone.
        upscale: see `upsample_guidance`.
    """
    scheduler = make_scheduler(model.config.beta_schedule)
    scheduler.set_timesteps(steps)
    if guidance > 1:
        # 1. one batch for both branches, padded to the same number of tokens
        pad = max(text[0].shape[1], negative[0].shape[1])
        stretch = lambda x: torch.cat([x, x.new_zeros(x.shape[0], pad - x.shape[1], *x.shape[2:])], dim=1)
        text = [torch.cat([stretch(n), stretch(t)]) for n, t in zip(negative, text)]
    projected = model.project_text(text[0].to(model.device, model.dtype), text[1].to(model.device))
    latents = latents.to(model.device, model.dtype)

    def predict(z_t, t):
        # 2. predict the noise, 3. push it away from the unconditional prediction
        size = (side * pixels_per_latent for side in z_t.shape[-2:])
        z_t = torch.cat([z_t, z_t]) if guidance > 1 else z_t
        noise = predict_noise(model, z_t, t, projected, None, **size_conditions(model, *size, len(z_t)))
        if guidance > 1:
            unconditional, conditional = noise.chunk(2)
            noise = unconditional + guidance * (conditional - unconditional)
        return noise

    for t in tqdm(scheduler.timesteps, desc="denoising", disable=not progress):
        noise = predict(latents, t)
        if upscale > 1:
            noise = upsample_guidance(predict, latents, t, noise, scheduler.alphas_cumprod, upscale)
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]  # 4. one solver step
    return latents


def noise_for(seed, channels, h, w):
    """The initial noise (1, channels, h, w) of one image: a function of its seed alone, drawn on the CPU."""
    return torch.randn(1, channels, h, w, generator=torch.Generator().manual_seed(seed))


def to_images(pixels):
    """(B, 3, h, w) in [-1, 1] -> list of PIL images."""
    return [Image.fromarray(p) for p in ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()]


def generate(model, vae, text_encoder, prompts, size, seeds, steps=20, guidance=4.5, negative="", progress=False, upscale=1):
    """Prompts and seeds (one each per image) -> PIL images of size (width, height) in pixels."""
    w, h = size[0] // vae.factor, size[1] // vae.factor
    latents = torch.cat([noise_for(seed, vae.channels, h, w) for seed in seeds])
    text, unconditional = text_encoder(prompts), text_encoder([negative] * len(prompts))
    return to_images(vae.decode(denoise(model, text, unconditional, latents, steps, guidance, vae.factor, progress, upscale)))


def pad_features(features):
    """List of (T_i, width) caption features -> features (B, T, width) and mask (B, T), as `TextEncoder` returns them."""
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(features), pad([torch.ones(len(f), dtype=torch.long) for f in features])


def encode_first(text_encoder, captions):
    """Run the text encoder on all captions it will be asked for -> what stands in for it from then on, kept on the CPU."""
    known = {caption: text_encoder([caption])[0][0].cpu() for caption in dict.fromkeys(captions)}
    return lambda captions: pad_features([known[caption] for caption in captions])


# ----------------------------------------------------------------------------------------------------------
# 3. Files: nothing that exists is ever overwritten
# ----------------------------------------------------------------------------------------------------------


def parse_size(text, multiple):
    """"2048" or "3840x2160" (width x height, pixels) -> (width, height), each rounded to a multiple, and said.

    Raises ValueError if it is no such size or not positive.
    """
    match = re.fullmatch(r"(-?\d+)(?:x(-?\d+))?", text.strip().lower())
    size = match and (int(match[1]), int(match[2] or match[1]))
    if not size or min(size) <= 0:
        raise ValueError(f"--size {text} is no size: give positive pixels, as 2048 or 3840x2160 (width x height)")
    rounded = tuple(max(multiple, round(side / multiple) * multiple) for side in size)
    if rounded != size:
        print(f"--size {text} is rounded to {rounded[0]}x{rounded[1]}: both sides must be multiples of {multiple}", file=sys.stderr)
    return rounded


def read_prompts(path):
    """A .txt with one prompt a line, or GenEval's evaluation_metadata.jsonl -> list of records with a "prompt".

    Raises ValueError, with the line's number, for what is not readable or has no prompt.
    """
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line) if path.endswith(".jsonl") else {"prompt": line.strip()}
                if not record["prompt"].strip():
                    raise KeyError
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f'{path}, line {number}, has no prompt: a .jsonl needs a JSON object with a "prompt" in each line') from None
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
    """"+ teacher forcing: T2MD" -> "teacher-forcing-t2md", for the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def free_path(folder, prompt, seed):
    """folder/the-prompt-seed.png, or with -1, -2, ... where that name is taken."""
    stem = f"{slug(prompt)[:60] or 'image'}-{seed}"
    paths = (os.path.join(folder, stem + suffix + ".png") for suffix in ("", *(f"-{k}" for k in range(1, 1_000_000))))
    return next(path for path in paths if not os.path.exists(path))


# ----------------------------------------------------------------------------------------------------------
# 4. Benchmarks: ratios of medians, measured side by side in one run
# ----------------------------------------------------------------------------------------------------------


def seconds(functions, repeats, device):
    """Call each function `repeats` times, in turn -> for each (median, largest deviation from it) in seconds."""
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, own in zip(functions, times):
            began = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            own.append(time.perf_counter() - began)
    medians = [statistics.median(own) for own in times]
    return [(median, max(abs(t - median) for t in own)) for median, own in zip(medians, times)]


def extra_memory(function, device):
    """GiB that `function` holds at once, beyond what is there when it is called."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))) / 2**30


def print_machine(device):
    def version(package):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"no {package}"

    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(", ".join([name, *map(version, ("torch", "transformers", "mamba-ssm", "flash-attn"))]))


def benchmark_model(args):
    """The denoiser with self-attention in every block against the hybrid, with the same weights elsewhere: a step with
    guidance (both branches in one batch), and an image of --steps steps, without T5 and VAE."""
    torch.manual_seed(0)
    shape = dict(width=args.width, heads=args.width // 72)
    models = [T2MD(pattern=pattern, **shape) for pattern in ("S" * len(args.pattern), args.pattern)]
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    models = [freeze(model, args.device, getattr(torch, args.dtype)) for model in models]
    if args.compile:
        for model in models:
            model.compile_repeated_blocks(fullgraph=True)
    print_machine(args.device)
    print(f"width {args.width}, {args.dtype}, guidance {args.guidance}; a step is the median of {args.repeats} +- the largest deviation")
    print(f"{'pixels':>10} {'tokens':>7} {'pattern':>{max(9, len(args.pattern))}} {'s / step':>17} {'s / image':>10} {'images / s':>10} {'GiB':>6}")
    text = (torch.randn(1, 120, 4096), torch.ones(1, 120, dtype=torch.long))
    weights = [sum(p.nbytes for p in model.parameters()) / 2**30 for model in models]
    for size in (args.sizes or "256,512,1024,2048,3840x2160").split(","):
        width, height = parse_size(size, 16)
        noise = noise_for(0, 4, height // 8, width // 8)
        run = lambda model, steps: denoise(model, text, text, noise, steps, args.guidance)
        extra = [extra_memory(lambda: run(model, 1), args.device) for model in models]  # and a warm-up
        step = seconds([functools.partial(run, model, 1) for model in models], args.repeats, args.device)
        image = step if args.steps == 1 else seconds([functools.partial(run, model, args.steps) for model in models], 1, args.device)
        for model, own, (median, spread), (whole, _), more in zip(models, weights, step, image, extra):
            print(f"{width:>5}x{height:<4} {width * height // 256:>7} {model.config.pattern:>{max(9, len(args.pattern))}} {median:>9.3f} +-{spread:>5.3f} "
                  f"{whole:>10.2f} {1 / whole:>10.3f} {own + more:>6.2f}")
        print(f"{'':>10} all attention / hybrid: {step[0][0] / step[1][0]:.2f} a step, {image[0][0] / image[1][0]:.2f} an image", flush=True)


def benchmark_scan(args):
    """`ssd` against the torch path of transformers' Mamba2, at the paper's shape: 36 heads of 64, state 256, one group."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    print_machine(args.device)
    print(f"medians of {args.repeats} +- the largest deviation, float32, one image")
    print(f"{'tokens':>7} {'scan':>12} {'chunk':>5} {'seconds':>17} {'us / token':>10} {'extra GiB':>9} {'/ ssd at 64':>12}")
    make = functools.partial(torch.randn, device=args.device)
    for size in (args.sizes or "512x1024,1024x2048,3840x2160").split(","):
        width, height = parse_size(size, 16)
        tokens = width * height // 256
        x, B, C, D = make(1, tokens, 36, 64), make(1, tokens, 1, 256), make(1, tokens, 1, 256), make(36)
        dt, A = 0.1 * torch.rand(1, tokens, 36, device=args.device), -16 * torch.rand(36, device=args.device)
        scans = [("ssd", ssd, chunk) for chunk in (64, 32, 128, 256)]
        if tokens <= 8192:  # beyond, it needs more memory than many machines have
            scans += [("transformers", mamba2_chunk_scan, chunk) for chunk in (32, 64, 128, 256)]
        calls = [functools.partial(scan, x, dt, A, B, C, chunk, D=D) for _, scan, chunk in scans]
        with torch.no_grad():
            extra = [extra_memory(call, args.device) for call in calls]
            times = seconds(calls, args.repeats, args.device)
        for (name, _, chunk), (median, spread), more in zip(scans, times, extra):
            print(f"{tokens:>7} {name:>12} {chunk:>5} {median:>9.3f} +-{spread:>5.3f} {median / tokens * 1e6:>10.2f} {more:>9.2f} {median / times[0][0]:>12.2f}", flush=True)


# ----------------------------------------------------------------------------------------------------------
# 5. Command line
# ----------------------------------------------------------------------------------------------------------


def keep_freed_memory(largest=False):
    """Tell glibc to keep what tensors free: handing it back costs page faults, a sixth of a training step on a CPU.

    largest: also what is over 32 MiB. Half the time of a Mamba mixer at 2048 px, for a third more memory.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its highest
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        if largest:
            libc.mallopt(-4, 0)  # M_MMAP_MAX


def parse_arguments():
    parser = argparse.ArgumentParser(description="Sample images from a T2MD checkpoint, at any size.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="what to draw")
    parser.add_argument("--prompts", help="a .txt with a prompt a line, or GenEval's metadata .jsonl: writes GenEval's folder layout, "
                                          "skips what is there")
    parser.add_argument("--model", default=SHIPPED, help="a T2MD checkpoint, or a diffusers PixArt folder or repository")
    parser.add_argument("--size", help="pixels, 2048 or 3840x2160 (width x height); the model's base size if not given")
    parser.add_argument("--n", type=int, default=1, help="images for each prompt, from seeds seed, seed + 1, ...")
    parser.add_argument("--seed", type=int, default=0, help="of the first image's noise")
    parser.add_argument("--steps", type=int, default=20, help="of DPM-Solver++")
    parser.add_argument("--guidance", type=float, default=4.5, help="classifier-free guidance; 1 switches it off")
    parser.add_argument("--upscale", type=int, default=1, metavar="M", help="for sizes M times larger than the model knows: "
                        "upsample guidance, no training")
    parser.add_argument("--negative", default="", help="prompt of the unconditional branch")
    parser.add_argument("--out", default="samples", help="folder for the images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of denoiser and text encoder")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block; pays for many images of one size")
    benchmark = parser.add_argument_group("benchmarks")
    benchmark.add_argument("--benchmark", nargs="?", const="model", choices=("model", "scan"), help="time all attention against the "
                           "hybrid, random weights; or `ssd` against transformers' torch path")
    benchmark.add_argument("--sizes", help="pixels, with commas between; a token is 16 x 16 of them (default: 256,512,1024,2048,"
                           "3840x2160; for scan 512x1024,1024x2048,3840x2160)")
    benchmark.add_argument("--width", type=int, default=1152, help="a multiple of 288")
    benchmark.add_argument("--pattern", default="SHWHWHW" * 4, help="of the hybrid")
    benchmark.add_argument("--repeats", type=int, default=5, help="of each measurement")
    args = parser.parse_args()
    if args.width % 288 or args.width < 1 or args.repeats < 1:
        parser.error("--width must be a multiple of 288 and --repeats at least 1")
    if args.benchmark:
        return args
    if (args.prompts is None) == (args.prompt is None):
        parser.error("give one prompt, or a file with --prompts")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("the prompt is empty")
    if min(args.n, args.steps, args.upscale) < 1:
        parser.error("--n, --steps and --upscale must be at least 1")
    return args


def main():
    args = parse_arguments()
    keep_freed_memory(largest=True)
    if WORLD > 1 and args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        {"model": benchmark_model, "scan": benchmark_scan, None: run}[args.benchmark](args)
    except (OSError, ValueError) as error:
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped; the pictures finished so far are saved")


def run(args):
    records = read_prompts(args.prompts) if args.prompts else [{"prompt": args.prompt}]
    dtype = getattr(torch, args.dtype)
    model = load_denoiser(args.model, dtype=dtype)
    vae, text_encoder = load_parts(model, args.model, args.device, dtype)
    patch = vae.factor * model.config.patch_size
    size = parse_size(args.size or str(model.config.sample_size * vae.factor * args.upscale), patch * args.upscale)
    how = dict(steps=args.steps, guidance=args.guidance, negative=args.negative, upscale=args.upscale)

    wanted = []  # (prompt, seed, path)
    for i, record in list(enumerate(records))[RANK::WORLD]:
        folder = os.path.join(args.out, f"{i:05d}")
        if args.prompts and not os.path.exists(os.path.join(folder, "metadata.jsonl")):
            os.makedirs(os.path.join(folder, "samples"), exist_ok=True)
            with open(os.path.join(folder, "metadata.jsonl"), "w") as file:
                json.dump(record, file)
        for k in range(args.n):
            seed = args.seed + i * args.n + k
            path = os.path.join(folder, "samples", f"{k:05d}.png") if args.prompts else free_path(args.out, record["prompt"], seed)
            if not os.path.exists(path):
                wanted.append((record["prompt"], seed, path))

    # the text encoder, by far the largest part at full size, is done and gone before the denoiser enters the card
    text_encoder = encode_first(text_encoder, [args.negative, *(prompt for prompt, _, _ in wanted)])
    torch.nn.Module.to(model, args.device)
    if args.compile:
        model.compile_repeated_blocks(fullgraph=True)
    tokens = size[0] * size[1] // patch**2
    at_once = max(1, 4096 // tokens)
    for start in range(0, len(wanted), at_once):
        prompts, seeds, paths = zip(*wanted[start : start + at_once])
        images = generate(model, vae, text_encoder, prompts, size, seeds, progress=True, **how)
        for image, prompt, seed, path in zip(images, prompts, seeds, paths):
            save_png(image, path, prompt=prompt, seed=seed, settings=json.dumps(dict(how, size=size, model=args.model)))
            print(path)


if __name__ == "__main__":
    main()
