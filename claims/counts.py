"""What the paper's computations cost by count: floating-point operations, H100-days, disk.

Operations are counted by running the code on tensors without data (device meta): those of matrix products,
convolutions and attention, two to a multiply-add, the scan in plain PyTorch. `python -m claims.speed bill`
prints the bill; its other commands set what they measure beside these counts.
"""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

import sample
import train
from t2md import T2MD, predict_noise

H100 = 989e12  # bfloat16 operations a second, by its data sheet


def operations(function, *args, **kwargs):
    """Floating-point operations of `function`, given tensors and modules of the device meta."""
    # torch takes the gradient of a depthwise convolution, a negligible one, for that of a dense one
    no_gradient = {torch.ops.aten.convolution_backward: lambda *_, **__: 0}
    with FlopCounterMode(display=False, custom_mapping=no_gradient) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def on_meta(config, pattern):
    """A T2MD of a config, but of this pattern, without data."""
    with torch.device("meta"):
        return T2MD(**{k: v for k, v in config.items() if not k.startswith("_")} | dict(pattern=pattern))


def given_on_meta(model, batch, latent):
    """z_t, t, text, mask as losses take them, for `batch` latents (C, h, w)."""
    with torch.device("meta"):
        text = torch.empty(batch, 120, model.config.caption_width)
        return torch.empty(batch, *latent), torch.empty(batch), text, torch.ones(batch, 120)


def by_letters(count, pattern):
    """count(pattern), from patterns of one and two letters: every block of a letter counts the same."""
    one = count("S")
    more = {letter: count("S" + letter) - one for letter in {"S", *pattern}}
    return one - more["S"] + sum(more[letter] for letter in pattern)


@torch.no_grad()
def count_step(model, latent, batch):
    """Operations of a denoiser step of a frozen T2MD with `batch` latents (C, h, w)."""

    def count(pattern):
        twin = sample.freeze(on_meta(model.config, pattern), "meta", torch.float32)
        return operations(predict_noise, twin, *given_on_meta(twin, batch, latent))

    return by_letters(count, model.config.pattern)


def count_call(call):
    """Operations of a functools.partial, from twins without data of what it was given."""

    def twin(thing):
        return copy.deepcopy(thing).to("meta") if hasattr(thing, "to") else thing

    keywords = {name: twin(value) for name, value in call.keywords.items()}
    return operations(twin(call.func), *map(twin, call.args), **keywords)


def print_row(widths, *cells):
    print(" ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)), flush=True)


def count_training(stage, pattern, side, config="t2md"):
    """Operations of a training step of a stage with one latent of side x side, of a model of `config`."""
    shape, checkpointing = (train.CONFIGS[config].get(name) for name in ("model", "checkpointing"))
    shape = dict(shape or {}, pos_embed="pixart")

    def count(letters):
        student, teacher = on_meta(shape, letters), on_meta(shape, "S" * len(letters))
        given = given_on_meta(student, 1, (4, side, side))
        args = train.ready(student, stage, checkpointing), teacher, given, given[0], torch.Tensor.backward, {}
        return operations(stage.loss, *args, weights=(0.5, 0.2))

    return by_letters(count, pattern)


def images_seen(stage):
    """{multiple of the base size: images of it that a stage of --config t2md takes in all}."""
    batches = {m: max(1, stage.t2md["batch_size"] // m**2) for m in stage.sizes}
    steps = stage.t2md["steps"] / sum(share / batches[m] for m, share in stage.sizes.items())
    return {m: round(steps * share) for m, share in stage.sizes.items()}


def print_bill(args):
    """What the paper's stages cost by count: the steps, batches and activation checkpointing of train.py's
    config t2md, for the hybrid and, where there is no teacher, for a model of self-attention alone."""
    days = 86400 * H100 * args.utilisation  # operations of an H100-day
    print(f"an H100-day at {args.utilisation:.0%} of {H100 / 1e12:.0f} TFLOP/s; encoding not counted")
    widths, columns = (8, 9, 8, 11, 17, 12, 10, 17, 12, 10), ("PFLOP / step", "PFLOP", "H100-days")
    print_row(widths, "", "px", "steps", "images", "hybrid: " + columns[0], *columns[1:], *columns)
    patterns, totals, most = (train.CONFIGS["t2md"]["pattern"], "S" * 28), [0.0, 0.0], {}
    stages = {name: stage for name, stage in train.STAGES.items() if stage.t2md}
    for name, stage in stages.items():
        seen, cells = images_seen(stage), []
        for n, pattern in enumerate(patterns[: 1 if stage.asks_teacher else 2]):
            total = sum(images * count_training(stage, pattern, 64 * m) for m, images in seen.items())
            totals[n] += total
            a_step = total / stage.t2md["steps"] / 1e15
            cells += f"{a_step:.2f}", f"{total / 1e15:,.0f}", f"{total / days:,.1f}"
        pixels = ", ".join(str(512 * m) for m in seen)
        print_row(widths, name, pixels, f"{stage.t2md['steps']:,}", f"{sum(seen.values()):,}", *cells)
        for m, images in seen.items():
            most[stage.adapted, m] = max(images, most.get((stage.adapted, m), 0))
    cells = [("", f"{total / 1e15:,.0f}", f"{total / days:,.1f}") for total in totals]
    print_row(widths, "in all", "", "", "", *cells[0], *cells[1])
    print_storage(args, stages.values(), patterns[0], most)


def print_storage(args, stages, pattern, most):
    """Disk for the cache (float16) and the checkpoints (float32, with all that a restart needs).

    most: {(with the second VAE and text encoder, multiple of 512 px): images that a stage sees of them}.
    """
    latents, text = 2 * 2 * 4 * 64**2, 2 * 4096 * args.caption_tokens  # bytes, of 512 px and of a caption
    columns = f"images, TB of latents, TB of text ({args.caption_tokens} tokens)"
    print(f"cache of one VAE and text encoder: {columns}")
    sizes = {f"a data set of {args.images:,}, 512 px": (args.images, 1)}
    for (adapted, m), images in most.items():
        sizes[f"what {'adapt to hires2' if adapted else 'forcing and kd'} see, {512 * m} px"] = images, m
    for name, (images, m) in sizes.items():
        print(f"{name:45} {images:>12,} {images * latents * m**2 / 1e12:8.2f} {images * text / 1e12:8.2f}")
    model = on_meta({}, pattern)
    weights, total = sum(p.numel() for p in model.parameters()), 0
    for stage in stages:
        trained = sum(p.numel() for module in stage.trains(model) for p in module.parameters())
        total += 4 * (3 * weights + 2 * trained)  # model; network, EMA and AdamW's moments
    print(f"checkpoints of the stages: {total / 1e9:.0f} GB")
