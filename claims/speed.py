"""The paper's claims of speed: what a step takes here, and what the paper's training costs, computed.

    python -m claims.speed model      # all attention against the hybrid, at every size: time and ratio
    python -m claims.speed scan       # `ssd`, mamba-ssm's scan where it runs, attention: time and error
    python -m claims.speed step kd    # a training step beside its operation count; or forcing, adapt, ...
    python -m claims.speed feed kd    # the data path without a model: images a second from a full cache
    python -m claims.speed bill       # operations, H100-days, memory and disk of the paper's stages

Weights are random. Times are medians, measured in turn in one run; shares are of this machine's matmul rate.
Operations are counted by running the code on tensors without data (device meta): those of matrix products,
convolutions and attention, two to a multiply-add, the scan in plain PyTorch.
"""

import argparse
import dataclasses
import functools
import io
import itertools
import os
import statistics
import tarfile
import tempfile
import time

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

import sample
import t2md
import train
from data import files, index
from data.images import ImageData
from data.shapes import add_to_tar
from t2md import T2MD

# Operations a second of an H100, by its data sheet, without sparsity.
H100 = 989e12  # bfloat16
H100_TF32 = 494e12  # float32 convolutions, by PyTorch's default
H100_FLOAT32 = 67e12  # float32 attention, which no tensor core computes
PAPER_STAGES = ("forcing", "kd", "adapt", "hires1", "hires2")
CAPTION_WIDTH = {"shapes": 64, "t2md": 4096}  # of the text encoders
TOKENS = 120  # of a caption


# -- models, batches and steps -------------------------------------------------------------------------------
def new_model(config, pattern, **arguments):
    """Return a T2MD of random weights with the shape that a configuration's students have."""
    return T2MD(
        pattern=pattern,
        pos_embed="pixart",
        caption_width=CAPTION_WIDTH[config],
        **train.CONFIGS[config].teacher,
        **train.CONFIGS[config].student,
        **arguments,
    )


def sampler_model(config, pattern, device="meta", dtype=torch.float32):
    """Return a model of random weights as the sampler has it: frozen, with its projections folded."""
    with torch.device("meta" if device == "meta" else "cpu"):
        model = new_model(config, pattern)
    return t2md.freeze(model, device, dtype)


def training_models(stage, config, pattern, device="meta"):
    """Return (student, teacher) of random weights as a stage of train.py has them."""
    attention = dict(float32_attention=train.CONFIGS[config].settings[stage].float32_attention)
    if device == "meta":  # which has no autocast, and no dtype matters to a count
        attention = {}
    with torch.device("meta" if device == "meta" else "cpu"):
        student = new_model(config, pattern, **attention)
        teacher = new_model(config, "S" * len(pattern), **attention)
    train.freeze_all_but(student, train.STAGES[stage].trains)
    train.freeze_all_but(teacher, "nothing")
    if train.CONFIGS[config].checkpointing:
        student.enable_gradient_checkpointing()
    return student.to(device), teacher.to(device)


def random_batch(model, images, height, width):
    """Return z_t, t, text, mask of images of height x width pixels, in a model's dtype and on its device."""
    with torch.device(model.device):
        z_t = torch.randn(images, 4, height // 8, width // 8, dtype=model.dtype)
        text = torch.randn(images, TOKENS, model.config.caption_width, dtype=model.dtype)
        return z_t, torch.full((images,), 500), text, torch.ones(images, TOKENS, dtype=torch.long)


@torch.no_grad()
def predict(model, batch):
    """One step of a sampler, without guidance."""
    t2md.predict_noise(model, *batch)


def train_once(stage, student, teacher, batch):
    """Compute a stage's loss, for which z_t stands in for the noise, and its gradient."""
    kind = train.STAGES[stage].loss
    if kind == "forcing":
        loss = t2md.forcing_loss(student, teacher, *batch)
    elif kind == "kd":
        loss, _ = t2md.kd_loss(student, teacher, *batch, noise=batch[0])
    else:
        loss = t2md.mse_loss(batch[0], t2md.predict_noise(student, *batch))
    if isinstance(loss, torch.Tensor):  # forcing has nothing to learn where no block is Mamba's
        loss.backward()


# -- counts --------------------------------------------------------------------------------------------------
def counted(function, *inputs):
    """Return the floating-point operations of function(*inputs)."""
    # torch takes the gradient of a depthwise convolution, a negligible one, for that of a dense one.
    no_gradient = {torch.ops.aten.convolution_backward: lambda *shapes, **named: 0}
    with FlopCounterMode(display=False, custom_mapping=no_gradient) as counter:
        function(*inputs)
    return counter.get_total_flops()


def by_blocks(count, pattern):
    """Return count(pattern), from counts of one and two blocks: every block of a letter counts the same."""
    one = count("S")
    block = {letter: count("S" + letter) - one for letter in {"S", *pattern}}
    ends = one - block["S"]  # all that is no block
    return ends + sum(block[letter] for letter in pattern)


@functools.cache
def count_sampling(config, pattern, images, height, width):
    """Count the operations of one step of a sampler, without guidance, on a model without weights."""
    model = sampler_model(config, pattern)
    return counted(predict, model, random_batch(model, images, height, width))


@functools.cache
def count_training(stage, config, pattern, images, height, width):
    """Count the operations of a stage's loss and its gradient, on models without weights."""
    student, teacher = training_models(stage, config, pattern)
    batch = random_batch(student, images, height, width)
    return counted(train_once, stage, student, teacher, batch)


def sampling_operations(config, pattern, images, height, width):
    """Return the operations of one step of a sampler, without guidance, from counts of its letters."""
    return by_blocks(lambda letters: count_sampling(config, letters, images, height, width), pattern)


def training_operations(stage, config, pattern, images, height, width):
    """Return the operations of a stage's loss and its gradient, from counts of its letters."""
    return by_blocks(lambda letters: count_training(stage, config, letters, images, height, width), pattern)


def float32_operations(stage, config, pattern, height, width):
    """Return those of `training_operations`, of one image, that are self-attention in float32.

    The product of queries and keys, and that with the values: 4 tokens^2 d each time. The student's blocks
    compute it, twice with checkpointing, and its gradient, twice as much; the teacher's compute it once.
    """
    settings = train.CONFIGS[config].settings[stage]
    if not settings.float32_attention:
        return 0
    model = sampler_model(config, "S")
    tokens = (height // 16) * (width // 16)
    once = 4 * tokens**2 * model.config.width
    loss = train.STAGES[stage].loss
    total = 0
    if loss != "noise":
        total += len(pattern) * once  # the teacher's
    if loss != "forcing":
        passes = 4 if train.CONFIGS[config].checkpointing else 3
        total += pattern.count("S") * passes * once
    return total


def vae_operations(pixels):
    """Return the operations of SD's and SDXL's VAE encoding an image of pixels x pixels."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        return counted(torch.no_grad()(vae.encode), torch.zeros(1, 3, pixels, pixels))


def t5_operations():
    """Return the operations of T5-XXL's encoder on a caption of 120 tokens."""
    config = T5Config(
        d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=1, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        encoder = T5EncoderModel(config)
        layer = counted(torch.no_grad()(encoder), torch.zeros(1, TOKENS, dtype=torch.long))
    return 24 * layer


# -- times ---------------------------------------------------------------------------------------------------
def seconds(functions, repeats, device):
    """Call each function `repeats` times, in turn. Return for each (median, largest deviation from it), s.

    A first call of each, which may compile and tune, is not counted.
    """
    times = [[] for _ in functions]
    for _ in range(1 + repeats):
        for function, taken in zip(functions, times):
            began = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
    results = []
    for _, *taken in times:
        median = statistics.median(taken)
        results.append((median, max(abs(t - median) for t in taken)))
    return results


def matmul_rate(args):
    """Return operations a second of a large matrix product, at its best; print what times depend on."""
    n = 8192 if args.device == "cuda" else 1024
    dtype = getattr(torch, args.dtype)
    a = torch.randn(n, n, device=args.device, dtype=dtype)
    b = torch.randn(n, n, device=args.device, dtype=dtype)
    best = min(seconds([lambda: a @ b], 1, args.device)[0][0] for _ in range(args.repeats))
    rate = 2 * n**3 / best
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}: {rate / 1e12:.3g} TFLOP/s of a large matrix product")
    print(t2md.kernels_in_use(args.device, dtype))
    return rate


def print_row(*cells):
    print("".join(f"{cell:>12}" for cell in cells), flush=True)


# -- model: one denoiser step --------------------------------------------------------------------------------
def time_model(args):
    """Time a denoiser step with self-attention in every block against the hybrid's, without T5 and VAE."""
    rate = matmul_rate(args)
    dtype = getattr(torch, args.dtype)
    hybrid = train.CONFIGS[args.config].pattern[: args.blocks]
    patterns = ["S" * len(hybrid), hybrid]
    models = [sampler_model(args.config, letters, args.device, dtype) for letters in patterns]
    print_row("pixels", "tokens", "s / step", "+-", "TFLOP", "of matmul", "ratio", "  pattern")
    for width, height in [sample.parse_size(size, 16) for size in args.sizes]:
        if args.compile:
            for model in models:
                torch._dynamo.reset()
                model.compile_repeated_blocks(dynamic=False)
        batch = random_batch(models[0], args.batch_size, height, width)
        steps = [functools.partial(predict, model, batch) for model in models]
        times = seconds(steps, args.repeats, args.device)
        attention_median, _ = times[0]
        for letters, (median, spread) in zip(patterns, times):
            count = sampling_operations(args.config, letters, args.batch_size, height, width)
            print_row(
                f"{width}x{height}",
                width * height // 256,
                f"{median:.3f}",
                f"{spread:.3f}",
                f"{count / 1e12:.3g}",
                f"{count / median / rate:.0%}",
                f"{attention_median / median:.2f}",
                f"  {letters}",
            )


# -- scan: one scan, one attention ---------------------------------------------------------------------------
HEADS = 36  # of Mamba, each HEAD_DIM wide; the paper's shape
HEAD_DIM = 64
STATE = 256
WIDTH = 1152  # of self-attention


def scan_operations(tokens, chunk):
    """Return the operations of `ssd` in chunks: C B^T for all heads; then for each its product with it, and
    the state, made and read."""
    return 2 * tokens * (chunk * STATE + HEADS * HEAD_DIM * (chunk + 2 * STATE))


def scan_inputs(tokens, device, dtype):
    """Return x, dt, A, B, C of the paper's shape, see `ssd_recurrence`."""
    x = torch.randn(1, tokens, HEADS, HEAD_DIM, device=device).to(dtype)
    dt = 0.1 * torch.randn(1, tokens, HEADS, device=device).abs()
    A = -16 * torch.randn(HEADS, device=device).sigmoid()
    B = torch.randn(1, tokens, 1, STATE, device=device).to(dtype)
    C = torch.randn(1, tokens, 1, STATE, device=device).to(dtype)
    return x, dt, A, B, C


def scan_calls(tokens, args, inputs):
    """Return {name: (what computes a scan, or self-attention; chunk)}; the chunk is None for attention."""
    dtype = getattr(torch, args.dtype)
    calls = {}
    for chunk in (64, 128, 256):
        calls[f"ssd, chunks of {chunk}"] = (functools.partial(t2md.ssd, *inputs, chunk), chunk)
    kernel = t2md.scan_kernel(args.device, dtype)
    if kernel is not None:
        calls["mamba-ssm"] = (functools.partial(kernel, *inputs, 256), 256)
    q, k, v = torch.randn(3, 1, tokens, WIDTH, device=args.device).to(dtype)
    calls["attention"] = (functools.partial(t2md.attention, q, k, v, 16), None)
    return calls


@torch.no_grad()
def time_scan(args):
    """Time the scan of a sequence of the paper's shape, and self-attention of its 16 heads of 72.

    The error is that of the first 512 tokens beside the recurrence in float64.
    """
    rate = matmul_rate(args)
    print_row("tokens", "seconds", "+-", "us / token", "of matmul", "error", "  ")
    for width, height in [sample.parse_size(size, 16) for size in args.sizes]:
        tokens = width * height // 256
        inputs = scan_inputs(tokens, args.device, getattr(torch, args.dtype))
        x, dt, A, B, C = [v.double() if v.ndim == 1 else v[:, :512].double() for v in inputs]
        exact = t2md.ssd_recurrence(x, dt, A, B, C)
        calls = scan_calls(tokens, args, inputs)
        times = seconds([call for call, _ in calls.values()], args.repeats, args.device)
        for (name, (call, chunk)), (median, spread) in zip(calls.items(), times):
            if chunk is None:
                count = 4 * tokens**2 * WIDTH
                error = ""
            else:
                count = scan_operations(tokens, chunk)
                error = f"{float((call()[:, :512] - exact).norm() / exact.norm()):.1e}"
            print_row(
                tokens,
                f"{median:.4f}",
                f"{spread:.4f}",
                f"{median / tokens * 1e6:.2f}",
                f"{count / median / rate:.0%}",
                error,
                f"  {name}",
            )


# -- step: one training step ---------------------------------------------------------------------------------
def time_step(args):
    """Time the forward and backward pass of a stage's loss, on random latents of its largest size."""
    rate = matmul_rate(args)
    config = train.CONFIGS[args.config]
    pattern = config.pattern[: args.blocks]
    student, teacher = training_models(args.stage, args.config, pattern, args.device)
    pixels = 8 * student.config.sample_size * max(config.settings[args.stage].sizes)
    batch = random_batch(student, args.batch_size, pixels, pixels)

    def step():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            train_once(args.stage, student, teacher, batch)

    ((median, spread),) = seconds([step], args.repeats, args.device)
    count = training_operations(args.stage, args.config, pattern, args.batch_size, pixels, pixels)
    print(f"{args.stage} step, {args.batch_size} images of {pixels} px: {median:.3f} +- {spread:.3f} s")
    print(f"its {count / 1e12:.3g} TFLOP are {count / median / rate:.0%} of the rate above")


# -- feed: the data path -------------------------------------------------------------------------------------
class RandomVAE:
    """Stands in for the VAE while a synthetic cache is filled: random moments of an image's shape."""

    source = "random"
    factor = 8

    def moments(self, images):
        latents = torch.randn(len(images), 4, images.shape[2] // 8, images.shape[3] // 8)
        return latents, torch.rand(latents.shape)

    def unload(self):
        pass


class RandomT5:
    """Stands in for T5-XXL: random features of 120 tokens for each caption."""

    source = "random"
    max_length = TOKENS
    cut = 0

    def __call__(self, captions):
        features = torch.randn(len(captions), TOKENS, CAPTION_WIDTH["t2md"], dtype=torch.float16)
        return features, torch.ones(len(captions), TOKENS, dtype=torch.long)

    def unload(self):
        pass


def write_random_images(path, count, pixels):
    """Write a tar shard of `count` grey images, each with a caption of its own."""
    png = io.BytesIO()
    Image.new("L", (pixels, pixels), 128).save(png, "PNG")
    with tarfile.open(path, "w") as tar:
        for k in range(count):
            for suffix, content in (("png", png.getvalue()), ("txt", f"image {k}".encode())):
                add_to_tar(tar, f"{k:08}.{suffix}", content)


def cached_data(args, job, folder):
    """Return ImageData with a cache: of --data, or of random images, 1 MiB a caption, in `folder`."""
    if args.data is None:
        index.INDEX = os.path.join(folder, "index")  # it goes when the folder goes
        path = os.path.join(folder, "images.tar")
        write_random_images(path, args.images, args.pixels)
        return ImageData(path, args.pixels, RandomVAE(), RandomT5(), 0, os.path.join(folder, "cache"))
    vae = t2md.VAE(job.vae)
    text_encoder = t2md.TextEncoder(job.text_encoder)
    return ImageData(
        args.data,
        args.pixels,
        vae,
        text_encoder,
        0,
        args.cache,
        enlarge=job.settings.enlarge,
        ratios=job.settings.ratios,
    )


def time_feed(args):
    """Time what train.py does for a batch before the model sees it: order, cache, noise, padding, threads.

    The step beside it is one of --config t2md on an H100, computed: one process feeds one card.
    """
    job = feed_job(args)
    with tempfile.TemporaryDirectory() as folder:
        data = cached_data(args, job, folder)
        data.fill_cache()
        batches = train.load_batches(job, {1: data}, 0)
        next(batches)  # threads start, files are opened
        batches_timed = args.repeats * 8
        began = time.perf_counter()
        for _ in itertools.islice(batches, batches_timed):
            pass
        rate = batches_timed * args.batch_size / (time.perf_counter() - began)
        batches.close()
    print(f"feed, batches of {args.batch_size} images of {args.pixels} px: {rate:.0f} images/s")
    pattern = train.CONFIGS["t2md"].pattern
    count = training_operations(args.stage, "t2md", pattern, 1, args.pixels, args.pixels)
    step = count / (H100 * args.utilisation)
    print(f"{1000 / rate:.2f} ms an image; on an H100 at {args.utilisation:.0%} a step of {args.stage} takes")
    print(f"{1000 * step:.1f} ms an image, computed: the feed is {1 / rate / step:.0%} of it")


def feed_job(args):
    """Return a record of train.py's, for its data path alone: so many images a step, without end."""
    flags = ["--stage", "kd"]
    if args.data is not None:
        flags = ["--stage", args.stage, "--config", args.config, "--data", args.data]
    job = train.plan(train.parse_arguments(flags))[-1]
    settings = dataclasses.replace(job.settings, batch_size=args.batch_size, sizes={1: 1.0}, steps=10**9)
    return dataclasses.replace(job, settings=settings, device="cpu")


# -- bill: the paper's stages --------------------------------------------------------------------------------
def images_seen(settings):
    """Return {multiple of the base size: images of it that a stage takes in all}."""
    batches = {m: settings.batch_size // m**2 for m in settings.sizes}
    steps = settings.steps / sum(share / batches[m] for m, share in settings.sizes.items())
    return {m: round(steps * share) for m, share in settings.sizes.items()}


def h100_days(operations, rate):
    return operations / rate / 86400


def print_bill(args):
    """Print what the paper's stages cost, with the steps, batches and checkpointing of --config t2md.

    H100-days: training in bfloat16; of it self-attention in float32; encoding each image that is seen, by the
    VAE in TF32 and T5-XXL in bfloat16.
    GiB: float32 weights, averages, gradients, AdamW's moments of what is trained, the teacher.
    GiB an image: what is kept of the blocks for an image of the largest size: their inputs; for equations 6
    and 11 also what the mixers take and give.
    TB of cache: latents and captions that a stage sees, in float16.  GB of disk: what it leaves.
    """
    print(f"an H100-day is one at {args.utilisation:.0%} of {H100 / 1e12:.0f} TFLOP/s")
    head = ["", "px", "steps", "images", "PF / step", "H100-days", "of it f32", "encoding"]
    print_row(*head, "GiB", "an image", "TB cache", "GB disk")
    training = 0.0
    encoding = 0.0
    for stage in PAPER_STAGES:
        bill = stage_bill(stage, args.utilisation)
        training += bill["training"]
        encoding += bill["encoding"]
        settings = train.CONFIGS["t2md"].settings[stage]
        print_row(
            stage,
            ", ".join(str(512 * m) for m in bill["seen"]),
            f"{settings.steps:,}",
            f"{sum(bill['seen'].values()):,}",
            f"{bill['operations'] / settings.steps / 1e15:.2f}",
            f"{bill['training']:.1f}",
            f"{bill['float32']:.1f}",
            f"{bill['encoding']:.1f}",
            f"{bill['memory'] / 2**30:.1f}",
            f"{bill['image_memory'] / 2**30:.2f}",
            f"{bill['cache'] / 1e12:.2f}",
            f"{bill['disk'] / 1e9:.1f}",
        )
    print(f"in all {training:.1f} H100-days of training and {encoding:.1f} of encoding")


def stage_bill(stage, utilisation):
    """Return what a stage of --config t2md costs: operations in all, H100-days, bytes; see `print_bill`."""
    pattern = train.CONFIGS["t2md"].pattern
    seen = images_seen(train.CONFIGS["t2md"].settings[stage])
    loss = train.STAGES[stage].loss
    operations = 0
    in_float32 = 0
    of_vae = 0
    cache = 0
    for m, images in seen.items():
        pixels = 512 * m
        operations += images * training_operations(stage, "t2md", pattern, 1, pixels, pixels)
        in_float32 += images * float32_operations(stage, "t2md", pattern, pixels, pixels)
        of_vae += images * vae_operations(pixels)
        cache += images * (2 * 2 * 4 * (pixels // 8) ** 2 + 2 * TOKENS * CAPTION_WIDTH["t2md"])
    of_t5 = sum(seen.values()) * t5_operations()
    float32_days = h100_days(in_float32, utilisation * H100_FLOAT32)
    student, teacher = training_models(stage, "t2md", pattern)
    weights = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    taught = 0 if loss == "noise" else sum(p.numel() for p in teacher.parameters())
    kept = {"noise": 1, "forcing": 2, "kd": 5}[loss]  # tensors of a block
    largest = (32 * max(seen)) ** 2  # tokens
    return dict(
        seen=seen,
        operations=operations,
        training=h100_days(operations - in_float32, utilisation * H100) + float32_days,
        float32=float32_days,
        encoding=h100_days(of_vae, utilisation * H100_TF32) + h100_days(of_t5, utilisation * H100),
        memory=4 * (2 * weights + 3 * trained + taught),
        image_memory=4 * len(pattern) * kept * student.config.width * largest,
        cache=cache,
        disk=4 * (3 * weights + 2 * trained),
    )


# -- the command ---------------------------------------------------------------------------------------------
COMMANDS = dict(model=time_model, scan=time_scan, step=time_step, feed=time_feed, bill=print_bill)


def parse_arguments(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m claims.speed", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("stage", nargs="?", default="kd", choices=PAPER_STAGES, help="of step and feed (default kd)")
    add("--config", default="t2md", choices=train.CONFIGS, help="of model and step (default t2md)")
    add("--blocks", type=int, help="so many of its blocks, the first ones, instead of all")
    add("--batch-size", type=int, help="images a step (default 1; of feed 32)")
    add("--sizes", nargs="+", default="256 512 1024 2048 3840x2160".split(), help="pixels, of model and scan")
    add("--repeats", type=int, default=5, help="of each measurement (default 5)")
    add("--compile", action="store_true", help="torch.compile each block of model")
    add("--utilisation", type=float, default=0.4, help="share of an H100's rate, of bill (default 0.4)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of step by autocast")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--debug", action="store_true", help="show where an error comes from")
    add = parser.add_argument_group("of feed").add_argument
    add("--pixels", type=int, default=512, help="size of the images (default 512)")
    add("--images", type=int, default=1000, help="how many random ones, 1 MiB each (default 1000)")
    add("--data", help="a data set, see train.py, instead of random images; with its --cache")
    add("--cache", metavar="DIR", help="the cache of --data; what it lacks is encoded first")
    args = parser.parse_args(argv)
    if args.batch_size is None:
        args.batch_size = 32 if args.command == "feed" else 1
    if args.data is not None and args.cache is None:
        parser.error("--data needs --cache")
    return args


if __name__ == "__main__":
    files.keep_freed_memory(largest=True)
    args = parse_arguments()
    files.as_command("claims.speed", COMMANDS[args.command], args)
