"""Score checkpoints beside each other: the share of pictures that show what was asked for.

    python -m claims.scores                                                      # every checkpoint there is
    python -m claims.scores --model assets/student --size 512 1024 --records 36
    python -m claims.scores --model assets/teacher --seed 7 --records 138 \\
        --guidance 2 3 4.5 --guidance-interval 0 400                             # a grid: six rows

Each is scored at the size it was last trained at, or at every --size, on held-out records or on --prompts.
Prints a table, a row for every combination, and writes OUT/eval.json, an entry a row, OUT/eval.png, a row of
pictures for each, and OUT/fails.png, up to six of the last row's that are wrong.
"""

import argparse
import itertools
import os

import numpy as np
import torch

import sample
import train
from data import files
from data.images import to_pixels
from data.shapes import TAGS, detect_shapes, draw_shapes, heldout_records, score_shapes
from t2md import predict_noise

OUT = train.CONFIGS["shapes"]["out"]
SHIPPED = [os.path.join(sample.HERE, "assets", name) for name in ("teacher", "student_kd", "student")]


def evaluate(images, records):
    """GenEval in miniature -> {tag: share of right pictures; "overall": mean over the tags that occur;
    "dirty": share of the pictures in which the detector finds something that is no clean object}."""
    right = {}
    for image, record in zip(images, records, strict=True):
        right.setdefault(record["tag"], []).append(score_shapes(image, record))
    scores = {tag: float(np.mean(right[tag])) for tag in TAGS if tag in right}
    dirty = float(np.mean([detect_shapes(image) is None for image in images]))
    return scores | dict(overall=float(np.mean(list(scores.values()))), dirty=dirty)


@torch.no_grad()
def relative_errors(student, teacher, vae, text_encoder, records, pixels, seed):
    """The distance of a student from its teacher, without a detector: ||student - teacher||^2 / ||teacher||^2
    of the predicted noise and of each block's mixer output, on pictures of `records`, timesteps spread over
    all.

    Returns {"noise": float, "mixers": [float], "forced": [float]}. mixers: each model on its hidden states;
    forced: the student's mixers too are fed with the teacher's, as in equation 6.
    """
    schedule, totals, blocks = train.noise_schedule(teacher), 0, len(student.blocks)
    for numbers in np.array_split(range(len(records)), -(-len(records) // 16)):
        pictures = [draw_shapes(records[k], pixels, np.random.default_rng([seed, k])) for k in numbers]
        mean, _ = vae.moments(to_pixels(pictures))
        generators = [files.generator(seed, "errors", 0, k) for k in numbers]
        noise = torch.cat([torch.randn(1, *mean.shape[1:], generator=g) for g in generators])
        t = torch.tensor([int((k + 0.5) * 1000 / len(records)) for k in numbers], device=mean.device)
        z_t = schedule.add_noise(mean, noise.to(mean.device), t)
        text = text_encoder([records[k]["prompt"] for k in numbers])
        student_noise, student_mixers = predict_noise(student, z_t, t, *text, return_mixers=True)
        teacher_noise, teacher_mixers = predict_noise(teacher, z_t, t, *text, return_mixers=True)
        grid = [side // student.config.patch_size for side in z_t.shape[2:]]
        targets = [target for _, target in teacher_mixers]
        forced = [block.mixer(h, grid) for block, (h, _) in zip(student.blocks, teacher_mixers)]
        pairs = [(student_noise, teacher_noise), *zip([output for _, output in student_mixers], targets)]
        pairs += zip(forced, targets)
        totals += np.array([[(a - b).square().sum().item(), b.square().sum().item()] for a, b in pairs])
    errors = (totals[:, 0] / totals[:, 1]).tolist()
    return dict(noise=errors[0], mixers=errors[1 : 1 + blocks], forced=errors[1 + blocks :])


def command_parser(name, description):
    """The parser of one of these commands, with the flags that all of them have."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m claims.{name}", description=description, formatter_class=raw)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of records and noise (default 0)")
    add("--out", default=OUT, help="folder of the results (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser, add


def parse_arguments(argv=None):
    parser, add = command_parser("scores", __doc__)
    add("--model", nargs="+", metavar="DIR", help="checkpoints (default: the shipped ones and those in OUT)")
    add("--records", type=int, default=552, help="how many held-out records (default 552, 92 of each kind)")
    add("--prompts", help="GenEval-format metadata .jsonl, instead of held-out records")
    add("--size", nargs="+", help="pixels, 512 or 688x384 (default: the size each model was last trained at)")
    add("--guidance", nargs="+", type=float, metavar="G", help="classifier-free (default: the checkpoint's)")
    add("--guidance-interval", nargs="+", type=int, metavar="T", help="no guidance below this timestep")
    add("--direct", action="store_true", help="sample large sizes from noise at once, as the paper does")
    add("--renoise", type=int, metavar="T", help="of progressive sampling, see sample.py")
    add("--upscale", type=int, default=1, metavar="M", help="upsample guidance, at M times a known size")
    return parser.parse_args(argv)


def run(args):
    records = sample.read_prompts(args.prompts) if args.prompts else heldout_records(args.records, args.seed)
    if not all(record.get("tag") in TAGS and record.get("include") for record in records):
        raise ValueError(f"{args.prompts} holds no records of GenEval's: tag ({', '.join(TAGS)}) and include")
    prompts, results, sheet, shown = [record["prompt"] for record in records], [], [], float("inf")
    special = dict(upscale=args.upscale, direct=args.direct, renoise=args.renoise)
    columns, made = (*TAGS, "overall", "dirty"), [os.path.join(args.out, stage) for stage in train.CHAIN]
    heads = "".join(f"{name:>14}" for name in columns) + "  guidance  from t    pixels  model"
    print(f"{len(records)} records, 20 steps, seed {args.seed}\n{heads}")
    for folder in args.model or [f for f in (*SHIPPED, *made) if os.path.exists(f"{f}/config.json")]:
        model, *parts = sample.load(folder, args.device).args
        side = model.config.sample_size * parts[0].factor
        shown = min(shown, side // model.interpolation_scale)  # the base size, at which it was distilled
        multiple = parts[0].factor * model.config.patch_size * args.upscale
        guidances = args.guidance or [model.config.guidance]
        intervals = args.guidance_interval or [model.config.guidance_interval]
        for size, guidance, interval in itertools.product(args.size or [str(side)], guidances, intervals):
            settings = dict(guidance=guidance, guidance_interval=interval)
            inputs = model, *parts, prompts, sample.parse_size(size, multiple), args.seed
            images = sample.generate_all(*inputs, **settings, **special)
            results.append(dict(model=folder, size=size) | settings | evaluate(images, records))
            line = "".join(f"{results[-1].get(name, float('nan')):14.3f}" for name in columns)
            print(f"{line}  {guidance:8.2g}  {interval:6}  {size:>8}  {folder}", flush=True)
            sheet.append(images[:12])
    files.write_json(os.path.join(args.out, "eval.json"), results)
    files.write_png(os.path.join(args.out, "eval.png"), files.contact_sheet(sheet, shown))
    if wrong := [k for k, record in enumerate(records) if not score_shapes(images[k], record)][:6]:
        fails = files.contact_sheet([[images[k] for k in wrong]], 192, [[prompts[k] for k in wrong]])
        files.write_png(os.path.join(args.out, "fails.png"), fails)


if __name__ == "__main__":
    files.as_command("claims.scores", run, parse_arguments())
