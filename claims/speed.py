"""The paper's claims of speed: what a step takes here, and what the paper's training costs by count.

    python -m claims.speed model      # all attention against the hybrid, at every size: time, memory, ratio
    python -m claims.speed scan       # `ssd` and a mixer: time, memory, share of the machine's matmul rate
    python -m claims.speed forcing    # where the time of a training step goes; or kd
    python -m claims.speed kernels    # errors of every scan that runs here, mamba-ssm's among them
    python -m claims.speed bill       # operations, H100-days and disk of the paper's stages
    python -m claims.speed card       # all that a GPU has to show, at full size, in about half an hour

Weights are random: time does not depend on them. Ratios are of medians, measured in turn in one run; shares
of the machine's matmul rate are by the operation counts of claims/counts.py.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import itertools
import statistics
import sys
import tempfile
import time
import types
from unittest import mock

import torch
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

import sample
import t2md
import train
from claims.counts import count_call, count_step, count_training, print_bill, print_row
from t2md import T2MD, VAE, Attention, MambaMixer, TextEncoder, predict_noise, ssd

# what can compute self-attention; flash-attn is a package
ATTENTION = {
    "flash-attn": None,
    "SDPA's cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA's flash": SDPBackend.FLASH_ATTENTION,
    "SDPA's efficient": SDPBackend.EFFICIENT_ATTENTION,
}

# ---------------------------------------------------------------------------------------------------
# 1. Measuring
# ---------------------------------------------------------------------------------------------------


def seconds(functions, repeats, device):
    """Call each function `repeats` times, in turn -> for each (median, largest deviation from it) in s."""
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


def profiled(device, **kwargs):
    kinds = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[kinds.CUDA if device == "cuda" else kinds.CPU], **kwargs)


def extra_memory(function, device):
    """GiB that `function` holds at once, beyond what is there when it is called."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    with profiled(device, profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 2**30


def print_kernels(function, device, rows):
    """What `function` spends most time in: kernels of a GPU, operators on a CPU."""
    with profiled(device) as profile:
        function()
    time_of = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    spent = {event: getattr(event, time_of) for event in profile.key_averages()}
    for event in sorted(spent, key=spent.get, reverse=True)[:rows]:
        share = spent[event] / sum(spent.values())
        print(f"{spent[event] / 1e3:>12.2f} ms {share:>4.0%} {event.count:>6} x {event.key[:76]}")


def matmul_rate(device, dtype):
    """Operations a second of a large matrix product, the best of seven."""
    n = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds([lambda: a @ b], 1, device)[0][0] for _ in range(7))


def print_machine(device, dtype):
    """Prints what all timings depend on -> `matmul_rate`."""
    packages = ((d.metadata["Name"], d.version) for d in importlib.metadata.distributions())
    installed = {name.lower().replace("_", "-"): version for name, version in packages}
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    wanted = ("torch", "triton", "transformers", "mamba-ssm", "flash-attn")
    print(", ".join([name, *(f"{p} {installed[p]}" if p in installed else f"no {p}" for p in wanted)]))
    rate = matmul_rate(device, dtype)
    print(f"a large matrix product in {str(dtype)[6:]}: {rate / 1e12:.3g} TFLOP/s")
    return rate


# ---------------------------------------------------------------------------------------------------
# 2. The denoiser
# ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def attention_by(way, alone=False):
    """Self-attention by one of ATTENTION; a mask, which some cannot do, by what can, unless alone."""
    package, backend = t2md.flash_attention, ATTENTION[way]
    t2md.flash_attention = None if backend else package
    others = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    allowed = [backend] if alone and backend else list(dict.fromkeys([backend or others[0], *others]))
    try:
        with sdpa_kernel(allowed, set_priority=True):
            yield
    finally:
        t2md.flash_attention = package


@torch.no_grad()
def fastest_attention(model, batch, tokens):
    """The fastest of what computes this model's self-attention here; all are printed."""
    width, heads, times = model.config.width, model.config.heads, {}
    q, k, v = torch.randn(3, batch, tokens, width, device=model.device, dtype=model.dtype)
    run = functools.partial(t2md.attention, q, k, v, heads)
    for way in ATTENTION:
        if way != "flash-attn" or t2md.flash_runs(model.device.type, model.dtype):
            with contextlib.suppress(RuntimeError), attention_by(way, alone=True):
                times[way] = seconds([run], 2, model.device.type)[0]
    least = {way: median - spread for way, (median, spread) in times.items()}  # the first one warms up
    said = ", ".join(f"{1e3 * least[way]:.1f} ms by {way}" for way in least)
    print(f"self-attention of {tokens} tokens, {heads} heads of {width // heads}: {said}")
    return min(least, key=least.get)


def make_models(args):
    """Self-attention in every block, and the hybrid with the same weights elsewhere."""
    torch.manual_seed(0)
    shape = dict(width=args.width, heads=args.width // 72)
    models = [T2MD(pattern=pattern, **shape) for pattern in ("S" * len(args.pattern), args.pattern)]
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    return [sample.freeze(model, args.device, getattr(torch, args.dtype)) for model in models]


def time_model(args):
    """The denoiser with self-attention in every block against the hybrid: a step with guidance (both branches
    in one batch), and an image of --steps steps, without T5 and VAE. At each size both attend by what is
    fastest there; flash kernels pad heads of 72 to 96."""
    if args.width % 288 or args.width < 1:
        raise ValueError("--width must be a multiple of 288")
    if args.plain:
        t2md.mamba_scan = None
    models, rate = make_models(args), print_machine(args.device, getattr(torch, args.dtype))
    scan = "mamba-ssm" if t2md.scan_runs(args.device, models[0].dtype) else "plain PyTorch"
    print(f"{'compiled' if args.compile else 'not compiled'}, scan by {scan}, guidance {args.guidance}")
    print(f"a step: median of {args.repeats} +- the largest deviation, after a first one to warm up")
    widths = 10, 6, max(9, len(args.pattern)), 7, 17, 9, 10, 6, 7, 9
    heads = "s / step", "s / image", "images / s", "GiB", "TFLOP", "of matmul"
    print_row(widths, "pixels", "tokens", "pattern", "first s", *heads)
    for size in args.sizes.split(","):
        time_size(args, models, rate, widths, *sample.parse_size(size, 16))


def time_size(args, models, rate, widths, width, height):
    """Lines of `time_model` for one size."""
    noise, branches = sample.noise_for(0, 4, height // 8, width // 8), 2 if args.guidance > 1 else 1
    text = torch.randn(1, 120, 4096), torch.ones(1, 120, dtype=torch.long)
    way = fastest_attention(models[0], branches, width * height // 256)
    torch._dynamo.reset()
    if args.compile:
        for model in models:
            model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    how = dict(steps=args.steps, guidance=args.guidance)
    images = [functools.partial(sample.denoise, model, text, text, noise, **how) for model in models]
    steps = [functools.partial(image, steps=1) for image in images]
    with attention_by(way):
        first = seconds(steps, 1, args.device)  # compiles and tunes
        extra = [extra_memory(step, args.device) for step in steps]
        times = seconds(steps, args.repeats, args.device)
        whole = times if args.steps == 1 else seconds(images, 1, args.device)
        for n, model in enumerate(models):
            (median, spread), (image, _) = times[n], whole[n]
            count = count_step(model, noise.shape[1:], branches)
            gib = sum(p.nbytes for p in model.parameters()) / 2**30 + extra[n]
            cells = f"{width}x{height}", width * height // 256, model.config.pattern, f"{first[n][0]:.1f}"
            rates = f"{image:.2f}", f"{1 / image:.3f}", f"{gib:.2f}", f"{count / 1e12:.3g}"
            share = f"{count / median / rate:.0%}"
            print_row(widths, *cells, f"{median:.3f} +- {spread:.3f}", *rates, share)
            if args.kernels:
                print_kernels(steps[n], args.device, args.kernels)
    step, image = (own[0][0] / own[1][0] for own in (times, whole))
    print(f"all attention / hybrid: {step:.2f} a step, {image:.2f} an image, attention by {way}", flush=True)


# ---------------------------------------------------------------------------------------------------
# 3. The scan
# ---------------------------------------------------------------------------------------------------


def scan_arguments(tokens, heads=36, head_dim=64, state=256, groups=1, device="cpu"):
    """x, dt, A, B, C, D of one sequence, by default of the paper's shape."""
    normal = functools.partial(torch.randn, device=device)
    x, B, C = (normal(1, tokens, *more) for more in ((heads, head_dim), (groups, state), (groups, state)))
    dt, A = 0.1 * torch.rand(1, tokens, heads, device=device), -16 * torch.rand(heads, device=device)
    return x, dt, A, B, C, normal(heads)


@torch.no_grad()
def time_scan(args):
    """`ssd` against the torch path of transformers' Mamba2, at the paper's shape: 36 heads of 64, state 256;
    and a whole mixer of the paper's width. One image, float32."""
    device, rate = args.device, print_machine(args.device, torch.float32)
    print(f"one image, float32, medians of {args.repeats} +- the largest deviation")
    widths = 6, 12, 5, 17, 10, 9, 11, 6, 9
    columns = "us / token", "extra GiB", "/ ssd at 64", "TFLOP", "of matmul"
    print_row(widths, "tokens", "", "chunk", "seconds", *columns)
    for size in args.sizes.split(","):
        width, height = sample.parse_size(size, 16)
        tokens, mixer = width * height // 256, MambaMixer("W", 1152).to(device)
        *given, D = scan_arguments(tokens, device=device)
        scans = [("ssd", ssd, chunk) for chunk in (64, 32, 128, 256)]
        if tokens <= 8192:  # beyond, it needs more memory than many machines have
            scans += [("transformers", mamba2_chunk_scan, chunk) for chunk in (32, 64, 128, 256)]
        calls = [functools.partial(scan, *given, chunk, D=D) for _, scan, chunk in scans]
        x = torch.randn(1, tokens, 1152, device=device)
        calls.append(functools.partial(mixer, x, (height // 16, width // 16)))
        extra = [extra_memory(call, device) for call in calls]
        times = seconds(calls, args.repeats, device)
        names = [(name, chunk) for name, _, chunk in scans] + [("mixer", "")]
        for name, call, more, (median, spread) in zip(names, calls, extra, times):
            cells = f"{median:.3f} +- {spread:.3f}", f"{median / tokens * 1e6:.2f}", f"{more:.2f}"
            counted = count_call(call)
            shares = f"{median / times[0][0]:.2f}", f"{counted / 1e12:.2g}", f"{counted / median / rate:.0%}"
            print_row(widths, tokens, *name, *cells, *shares)


@contextlib.contextmanager
def triton_interpreter():
    """On a CPU there is no device to switch to, and nothing to tune for."""
    own = [vars(module) for name, module in sys.modules.items() if name.startswith("mamba_ssm.ops.triton")]
    for kernel in itertools.chain(*(names.values() for names in own)):
        if hasattr(kernel, "configs"):
            kernel.configs = kernel.configs[:1]
    processors = types.SimpleNamespace(multi_processor_count=1)
    with mock.patch("torch.cuda.device", lambda _: contextlib.nullcontext()):
        with mock.patch("torch.cuda.get_device_properties", lambda _: processors):
            yield


def with_gradients(scan, chunk, given):
    """y of a scan and the gradients of all it is given, under a loss that is not linear in y."""
    y = scan(*given[:5], chunk, D=given[5])
    return [y.detach(), *torch.autograd.grad((y * y.detach().cos()).sum(), given)]


def check_kernels(args):
    """Every scan that runs here against `ssd` in float64: relative errors of value and gradients, and time.

    Raises ArithmeticError if one is larger than rounding explains.
    """
    cuda, widths = args.device == "cuda", (10, 9, *[8] * 8)
    scans = {"ssd": (ssd, 128 if cuda else 32), "mamba-ssm": (t2md.mamba_scan, 256 if cuda else 32)}
    print_machine(args.device, torch.float32)
    if not t2md.scan_runs(args.device, torch.float32):
        print("mamba-ssm does not run here: it must be installed, and there be a GPU or TRITON_INTERPRET=1")
    print_row(widths, "scan", "dtype", "y", "dx", "d dt", "dA", "dB", "dC", "dD", "ms")
    for dtype, bound in ((torch.float32, 0.005), (torch.bfloat16, 0.1)):  # the kernels take tf32 for float32
        x, dt, A, B, C, D = scan_arguments(*((4000,) if cuda else (80, 4, 16, 16, 2)), device=args.device)
        given = [v.requires_grad_() for v in (x.to(dtype), dt, A, B.to(dtype), C.to(dtype), D)]
        exact = with_gradients(ssd, 64, [v.detach().double().requires_grad_() for v in given])
        for name, (scan, chunk) in scans.items():
            # products of bfloat16 come out wrong in Triton's interpreter
            runs = t2md.scan_runs(args.device, dtype) and (cuda or dtype == torch.float32)
            if scan is not ssd and not runs:
                continue
            with contextlib.nullcontext() if cuda else triton_interpreter():
                got = with_gradients(scan, chunk, given)
                call = functools.partial(with_gradients, scan, chunk, given)
                (took, _), *_ = seconds([call], 3, args.device)
                seen = got[0] if scan is ssd else t2md.compiled_mamba_scan(*given[:5], chunk, D)
                if not torch.equal(seen, got[0]):
                    raise ArithmeticError("mamba-ssm as torch.compile sees it gives another result")
            errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact)]
            print_row(widths, name, str(dtype)[6:], *(f"{e:.1e}" for e in errors), f"{1e3 * took:.1f}")
            if not max(errors) < bound:
                raise ArithmeticError(f"{name} is off by {max(errors):.1e}")


# ---------------------------------------------------------------------------------------------------
# 4. A training step
# ---------------------------------------------------------------------------------------------------


def training_pair(stage, config, device):
    """Student and teacher of random weights, in float32, as a stage has them."""
    torch.manual_seed(0)
    whole = T2MD(pattern="S" * len(config["pattern"]), pos_embed="pixart", **config.get("model", {}))
    student = T2MD.from_teacher(whole, config["pattern"]).to(device)
    teacher = sample.freeze(whole, device, torch.float32)
    for block in (*student.blocks, *teacher.blocks):
        if isinstance(block.mixer, Attention):
            block.mixer.float32 = config["float32_attention"]
    return train.ready(student, stage, config["checkpointing"]), teacher


def shapes_batches(folder, images):
    """Draws and encodes some of the shapes world into `folder` -> what makes a batch of it."""
    command = ["--stage", "forcing", "--out", folder, "--steps", "4", "--batch-size", str(images)]
    args, turns = train.parse_arguments(command), itertools.count()
    vae = VAE(train.part_for("vae", "forcing", args))
    text_encoder = TextEncoder(train.part_for("text_encoder", "forcing", args))
    base = train.CONFIGS["shapes"]["model"]["sample_size"] * vae.factor
    data = train.open_data("forcing", args, vae, text_encoder, base)[1]

    def batch():
        turn = next(turns)
        generators = [sample.draw(0, "forcing", turn, k) for k in range(images)]
        return data.batch(turn, range(images), images, generators)

    return batch


def random_batch(student, images):
    """Like a batch of data, of random numbers."""
    side, width = student.config.sample_size, student.config.caption_width
    text, mask = torch.randn(images, 120, width), torch.ones(images, 120, dtype=torch.long)
    z0, noise = torch.randn(2, images, student.config.in_channels, side, side)
    return dict(z0=z0, noise=noise, t=torch.randint(1000, (images,)), text=text, mask=mask)


def training_parts(stage, plan, student, teacher, batch):
    """{what a training step does: a function that does it}; two parts of the third first."""
    given = [batch[name] for name in ("z0", "t", "text", "mask")]
    backward, inputs = torch.Tensor.backward, []
    optimizer = train.Optimizer(student, plan, stage.faster(student))
    ema, averaged = EMAModel(student.parameters(), decay=plan["ema"]), list(student.parameters())

    @torch.no_grad()
    def ask_teacher(visit=None):
        predict_noise(teacher, *given, visit)

    ask_teacher(lambda n, x, y: inputs.append((student.blocks[n].mixer, x)))
    grid = [side // student.config.patch_size for side in given[0].shape[2:]]

    def learn():
        if stage.trains is train.mamba_mixers:
            for mixer, x in inputs:
                if isinstance(mixer, MambaMixer):
                    mixer(x, grid).sum().backward()
        else:
            predict_noise(student, *given).sum().backward()

    loss = functools.partial(stage.loss, student, teacher, given, batch["noise"], backward, {})
    return {
        "teacher, forward": ask_teacher,
        "what learns, forward and backward": learn,
        "loss and gradients": functools.partial(loss, weights=(0.5, 0.2)),
        "optimiser": functools.partial(optimizer.step, 0),
        "EMA": functools.partial(ema.step, averaged),
    }


def time_training(args):
    """Where the time of a forcing or kd step goes: its parts and their shares of it, medians."""
    device, stage, config = args.device, train.STAGES[args.command], train.CONFIGS[args.config]
    plan = dict(getattr(stage, args.config))
    images = args.batch_size or plan["batch_size"]
    rate = print_machine(device, getattr(torch, args.dtype))
    student, teacher = training_pair(stage, config, device)
    with tempfile.TemporaryDirectory() as folder:
        shapes = args.config == "shapes"
        data = shapes_batches(folder, images) if shapes else functools.partial(random_batch, student, images)
        batch = {name: value.to(device) for name, value in data().items()}
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            parts = training_parts(stage, plan, student, teacher, batch) | ({"data": data} if shapes else {})
            seconds(parts.values(), 1, device)
            times = dict(zip(parts, seconds(parts.values(), args.repeats, device)))
    whole = sum(median for median, _ in list(times.values())[2:])
    print(f"{student.config.pattern}, {images} images of {8 * student.config.sample_size} px, {args.dtype}")
    for name, (median, spread) in times.items():
        print(f"{name:34}{median:9.4f} +- {spread:.4f} s {median / whole:>5.0%}")
    count = images * count_training(stage, config["pattern"], student.config.sample_size, args.config)
    print(f"{f'a {args.command} step: all but the first two':43}{whole:.4f} s")
    at_rate = f"its {count / 1e12:.3g} TFLOP at the rate above"
    print(f"{at_rate:43}{count / rate:.4f} s {count / rate / whole:>12.0%}")
    print(f"peak memory {train.peak_memory(device):.1f} GiB")


# ---------------------------------------------------------------------------------------------------
# 5. Command line
# ---------------------------------------------------------------------------------------------------

COMMANDS = dict(model=time_model, scan=time_scan, forcing=time_training, kd=time_training)
COMMANDS |= dict(kernels=check_kernels, bill=print_bill)
FULL = "--dtype bfloat16 --repeats 3"
MODEL = f"model {FULL} --sizes 512,1024,2048,3840x2160 --steps 1 --kernels 12"
CARD = ("kernels", MODEL, MODEL + " --compile", f"forcing --config t2md --batch-size 8 {FULL}")
CARD += (f"kd --config t2md --batch-size 8 {FULL}", MODEL + " --compile --plain")  # --plain is for good


def measure_card(args):
    """Every measurement of a GPU: errors of the kernels, a step of the denoiser eager and compiled, with
    mamba-ssm's scan and without, a step of forcing and kd. What fails is said, the others go on."""
    for line in CARD:
        print(f"\npython -m claims.speed {line}", flush=True)
        try:
            run(parse_arguments([*line.split(), "--device", args.device]))
        except (RuntimeError, ArithmeticError, ValueError) as error:
            print(f"failed: {error}", flush=True)


COMMANDS["card"] = measure_card


def parse_arguments(argv=None):
    raw, shown = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("python -m claims.speed", description=__doc__, formatter_class=raw)
    commands, adds = parser.add_subparsers(dest="command", required=True), {}
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, description=function.__doc__, formatter_class=shown)
        add = adds[name] = command.add_argument
        if name != "bill":
            add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
        if name not in ("bill", "kernels", "card"):
            add("--repeats", type=int, default=5, help="of each measurement")
        if name in ("model", "forcing", "kd"):
            add("--dtype", default="float32", choices=("float32", "bfloat16"), help="in training by autocast")
        if name in ("forcing", "kd"):
            add("--config", default="shapes", choices=train.CONFIGS, help="of train.py")
            add("--batch-size", type=int, help="images a step, else the stage's")
        if name in ("model", "scan"):
            sizes = "256,512,1024,2048,3840x2160" if name == "model" else "512x1024,1024x2048,3840x2160"
            add("--sizes", default=sizes, help="pixels, with commas between; a token is 16 x 16 of them")
    add = adds["model"]
    add("--width", type=int, default=1152, help="a multiple of 288")
    add("--pattern", default="SHWHWHW" * 4, help="of the hybrid")
    add("--steps", type=int, default=20, help="of DPM-Solver++, for an image")
    add("--guidance", type=float, default=4.5, help="1 switches it off")
    add("--compile", action="store_true", help="torch.compile each block")
    add("--plain", action="store_true", help="the scan in plain PyTorch, whatever is installed")
    add("--kernels", type=int, default=0, metavar="N", help="print the N that take most of a step")
    add = adds["bill"]
    add("--images", type=int, default=200_000_000, help="captioned images of the data set")
    add("--caption-tokens", type=int, default=120, help="of a caption, on average")
    add("--utilisation", type=float, default=0.4, help="share of an H100's rate that training reaches")
    args = parser.parse_args(argv)
    for name in ("repeats", "steps", "batch_size", "images"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def run(args):
    COMMANDS[args.command](args)


def main():
    sample.keep_freed_memory(largest=True)
    sample.as_command("claims.speed", run, parse_arguments())


if __name__ == "__main__":
    main()
