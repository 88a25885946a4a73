"""The paper's claims of speed: what a step takes here, and what the paper's training costs by count.

    python -m claims.speed model      # all attention against the hybrid, at every size: time and ratio
    python -m claims.speed scan       # `ssd`, mamba-ssm's scan where it runs, attention: time and error
    python -m claims.speed step kd    # a training step beside its operation count; or forcing, adapt, ...
    python -m claims.speed bill       # operations, H100-days, memory and disk of the paper's stages

Weights are random; times are medians, measured in turn in one run, shares are of this machine's matmul rate.
Operations are counted by running the code on tensors without data (device meta): those of matrix products,
convolutions and attention, two to a multiply-add, the scan in plain PyTorch.
"""

import argparse
import functools
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

import sample
import t2md
import train
from data import files
from t2md import T2MD

H100 = 989e12  # bfloat16 operations a second, by its data sheet
PAPER_STAGES = ("forcing", "kd", "adapt", "hires1", "hires2")


def make_models(stage, config, pattern, device="meta", dtype=torch.float32):
    """(student of this pattern, its teacher), of random weights, as a stage of train.py has them; without a
    stage the student as the sampler has it, and no teacher."""
    arguments = train.CONFIGS[config].get("model", {}) | dict(pos_embed="pixart")
    with torch.device("meta" if device == "meta" else "cpu"):
        student = T2MD(**arguments | dict(pattern=pattern))
        if stage is None:
            return sample.freeze(student, device, dtype), None
        teacher = T2MD(**arguments | dict(pattern="S" * len(pattern))).requires_grad_(False)
    student = train.ready(student, train.STAGES[stage], train.CONFIGS[config]["checkpointing"])
    return student.to(device), teacher.to(device)


def random_batch(model, images, height, width):
    """z_t, t, text, mask of images of height x width pixels, in a model's dtype and on its device."""
    with torch.device(model.device):
        z_t = torch.randn(images, 4, height // 8, width // 8, dtype=model.dtype)
        text = torch.randn(images, 120, model.config.caption_width, dtype=model.dtype)
        return z_t, torch.full((images,), 500), text, torch.ones(images, 120, dtype=torch.long)


def one_step(stage, student, teacher, batch):
    """A stage's loss, where z_t stands in for the noise, and its gradient; a frozen student predicts only."""
    kind = train.STAGES[stage].loss if stage else "noise"
    if kind == "forcing":
        loss = t2md.forcing_loss(student, teacher, *batch)
    elif kind == "kd":
        loss, _ = t2md.kd_loss(student, teacher, *batch, noise=batch[0])
    else:
        loss = t2md.mse_loss(batch[0], t2md.predict_noise(student, *batch))
    if getattr(loss, "requires_grad", False):
        loss.backward()


def operations(stage, config, pattern, images, height, width):
    """Floating-point operations of `one_step`. They are counted for patterns of one and two letters: every
    block of a letter counts the same."""
    # torch takes the gradient of a depthwise convolution, a negligible one, for that of a dense one
    no_gradient = {torch.ops.aten.convolution_backward: lambda *_, **__: 0}

    def count(pattern):
        models = make_models(stage, config, pattern)
        with FlopCounterMode(display=False, custom_mapping=no_gradient) as counter:
            one_step(stage, *models, random_batch(models[0], images, height, width))
        return counter.get_total_flops()

    one = count("S")
    block = {letter: count("S" + letter) - one for letter in {"S", *pattern}}
    return one - block["S"] + sum(block[letter] for letter in pattern)


def seconds(functions, repeats, device):
    """Call each function `repeats` times, in turn -> for each (median, largest deviation from it) in s."""
    times = [[] for _ in functions]
    for n in range(repeats * len(functions)):
        began = time.perf_counter()
        functions[n % len(functions)]()
        if device == "cuda":
            torch.cuda.synchronize()
        times[n % len(functions)].append(time.perf_counter() - began)
    medians = [statistics.median(taken) for taken in times]
    return [(median, max(abs(t - median) for t in taken)) for median, taken in zip(medians, times)]


def matmul_rate(args):
    """Operations a second of a large matrix product, the best of seven; prints what all times depend on."""
    n, dtype = 8192 if args.device == "cuda" else 1024, getattr(torch, args.dtype)
    a, b = torch.randn(2, n, n, device=args.device, dtype=dtype)
    rate = 2 * n**3 / min(seconds([lambda: a @ b], 1, args.device)[0][0] for _ in range(7))
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}: {rate / 1e12:.3g} TFLOP/s of a large matrix product")
    print(t2md.kernels_in_use(args.device, dtype))
    return rate


def print_row(*cells):
    print("".join(f"{cell:>12}" for cell in cells), flush=True)


def time_model(args):
    """A denoiser step with self-attention in every block against the hybrid's, without T5 and VAE."""
    rate, pattern = matmul_rate(args), train.CONFIGS[args.config]["pattern"][: args.blocks]
    patterns, dtype = ("S" * len(pattern), pattern), getattr(torch, args.dtype)
    models = [make_models(None, args.config, letters, args.device, dtype)[0] for letters in patterns]
    print_row("pixels", "tokens", "s / step", "+-", "TFLOP", "of matmul", "ratio", "  pattern")
    for width, height in (sample.parse_size(size, 16) for size in args.sizes):
        for model in models if args.compile else ():
            torch._dynamo.reset()
            model.compile_repeated_blocks(dynamic=False)
        batch = random_batch(models[0], args.batch_size, height, width)
        steps = [functools.partial(one_step, None, model, None, batch) for model in models]
        seconds(steps, 1, args.device)  # compiles, tunes, warms up
        times = seconds(steps, args.repeats, args.device)
        for letters, (median, spread) in zip(patterns, times):
            count = operations(None, args.config, letters, args.batch_size, height, width)
            cells = f"{width}x{height}", width * height // 256, f"{median:.3f}", f"{spread:.3f}"
            shares = f"{count / median / rate:.0%}", f"{times[0][0] / median:.2f}"
            print_row(*cells, f"{count / 1e12:.3g}", *shares, f"  {letters}")


@torch.no_grad()
def time_scan(args):
    """The scan of a sequence of the paper's shape (36 heads of 64, state 256) and self-attention (16 heads of
    72): time, and the error of the first 512 tokens beside the recurrence in float64."""
    dtype, normal = getattr(torch, args.dtype), functools.partial(torch.randn, device=args.device)
    rate, kernel = matmul_rate(args), t2md.scan_kernel(args.device, dtype)
    print_row("tokens", "seconds", "+-", "us / token", "of matmul", "error", "  ")
    for width, height in (sample.parse_size(size, 16) for size in args.sizes):
        tokens = width * height // 256
        x, B, C = (normal(1, tokens, *heads).to(dtype) for heads in ((36, 64), (1, 256), (1, 256)))
        inputs = x, 0.1 * normal(1, tokens, 36).abs(), -16 * normal(36).sigmoid(), B, C
        exact = t2md.ssd_recurrence(*(v.double() if v.ndim == 1 else v[:, :512].double() for v in inputs))
        calls = {f"ssd, chunks of {c}": (functools.partial(t2md.ssd, *inputs, c), c) for c in (64, 128, 256)}
        if kernel:
            calls["mamba-ssm"] = functools.partial(kernel, *inputs, 256), 256
        calls["attention"] = functools.partial(t2md.attention, *normal(3, 1, tokens, 1152).to(dtype), 16), 0
        times = seconds([call for call, _ in calls.values()], args.repeats, args.device)
        for (name, (call, chunk)), (median, spread) in zip(calls.items(), times):
            # in chunks: C B^T for all heads, then each head's product with it, and its state, made and read
            count = 2 * tokens * (chunk * 256 + 36 * 64 * (chunk + 512)) if chunk else 4 * tokens**2 * 1152
            error = f"{float((call()[:, :512] - exact).norm() / exact.norm()):.1e}" if chunk else ""
            cells = f"{median:.4f}", f"{spread:.4f}", f"{median / tokens * 1e6:.2f}"
            print_row(tokens, *cells, f"{count / median / rate:.0%}", error, f"  {name}")


def time_step(args):
    """Forward and backward pass of a stage's loss, of random latents of the largest size it trains at."""
    config, rate = train.CONFIGS[args.config], matmul_rate(args)
    pattern = config["pattern"][: args.blocks]
    student, teacher = make_models(args.stage, args.config, pattern, args.device)
    for block in (*student.blocks, *teacher.blocks):
        block.mixer.float32 = config["float32_attention"]
    pixels = 8 * student.config.sample_size * max(stage_settings(args.stage, args.config)["sizes"])
    batch = random_batch(student, args.batch_size, pixels, pixels)

    def step():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            one_step(args.stage, student, teacher, batch)

    step()
    ((median, spread),) = seconds([step], args.repeats, args.device)
    count = operations(args.stage, args.config, pattern, args.batch_size, pixels, pixels)
    print(f"{args.stage} step, {args.batch_size} images of {pixels} px: {median:.3f} +- {spread:.3f} s")
    print(f"its {count / 1e12:.3g} TFLOP are {count / median / rate:.0%} of the rate above")


def stage_settings(stage, config):
    return train.settings(stage, train.parse_arguments(["--stage", stage, "--config", config]))


def images_seen(settings):
    """{multiple of the base size: images of it that a stage takes in all}."""
    sizes, batches = settings["sizes"], {m: settings["batch_size"] // m**2 for m in settings["sizes"]}
    steps = settings["steps"] / sum(share / batches[m] for m, share in sizes.items())
    return {m: round(steps * share) for m, share in sizes.items()}


def print_bill(args):
    """The paper's stages by count, with the steps, batches and activation checkpointing of --config t2md.
    GiB: float32 weights, averages, gradients and AdamW's moments of what is trained, the teacher; and what is
    kept of the blocks for an image of the largest size: their inputs, for equations 6 and 11 those and the
    outputs of the mixers. TB: latents and captions that a stage sees, float16. GB: what it leaves on disk."""
    pattern, rate = train.CONFIGS["t2md"]["pattern"], H100 * args.utilisation
    print(f"an H100-day at {rate / 1e12:.0f} TFLOP/s; encoding not counted")
    print_row("", "px", "steps", "images", "PF / step", "H100-days", "GiB", "an image", "TB cache", "GB disk")
    for stage in PAPER_STAGES:
        settings = stage_settings(stage, "t2md")
        seen, (student, teacher) = images_seen(settings), make_models(stage, "t2md", pattern)
        count = sum(n * operations(stage, "t2md", pattern, 1, 512 * m, 512 * m) for m, n in seen.items())
        weights, taught = (sum(p.numel() for p in model.parameters()) for model in (student, teacher))
        taught *= train.STAGES[stage].loss != "noise"
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        tensors = len(pattern) * dict(noise=1, forcing=2, kd=5)[train.STAGES[stage].loss]
        image = tensors * student.config.width * (32 * max(seen)) ** 2
        cache = sum(n * (16 * (64 * m) ** 2 + 2 * 4096 * 120) for m, n in seen.items())
        cells = ", ".join(str(512 * m) for m in seen), f"{settings['steps']:,}", f"{sum(seen.values()):,}"
        cells += f"{count / settings['steps'] / 1e15:.2f}", f"{count / 86400 / rate:.1f}"
        cells += f"{4 * (2 * weights + 3 * trained + taught) / 2**30:.1f}", f"{4 * image / 2**30:.2f}"
        print_row(stage, *cells, f"{cache / 1e12:.2f}", f"{4 * (3 * weights + 2 * trained) / 1e9:.1f}")


COMMANDS = dict(model=time_model, scan=time_scan, step=time_step, bill=print_bill)


def parse_arguments(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m claims.speed", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("stage", nargs="?", default="kd", choices=PAPER_STAGES, help="of step (default kd)")
    add("--config", default="t2md", choices=train.CONFIGS, help="of model and step (default t2md)")
    add("--blocks", type=int, help="so many of its blocks, the first ones, instead of all")
    add("--batch-size", type=int, default=1, help="images a step (default 1)")
    add("--sizes", nargs="+", default="256 512 1024 2048 3840x2160".split(), help="pixels, of model and scan")
    add("--repeats", type=int, default=5, help="of each measurement (default 5)")
    add("--compile", action="store_true", help="torch.compile each block of model")
    add("--utilisation", type=float, default=0.4, help="share of an H100's rate, of bill (default 0.4)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of step by autocast")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser.parse_args(argv)


if __name__ == "__main__":
    files.keep_freed_memory(largest=True)
    files.as_command("claims.speed", lambda args: COMMANDS[args.command](args), parse_arguments())
