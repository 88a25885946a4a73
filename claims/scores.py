"""Score checkpoints beside each other: the share of pictures that show what was asked for.

    python -m claims.scores                                                      # every checkpoint there is
    python -m claims.scores --model assets/student --size 512 1024 --records 36
    python -m claims.scores --model assets/teacher --seed 7 --records 138 \\
        --guidance 2 3 4.5 --guidance-interval 0 400                             # a grid: six rows

Each is scored at the size it was last trained at, or at every --size, on held-out records or on --prompts.
Prints a table with a row for every combination. Writes into OUT: eval.json, the same numbers; eval.png, a row
of pictures for each; fails.png, up to six pictures of the last row that are wrong.
"""

import argparse
import dataclasses
import itertools
import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

import sample
import train
from data import files
from data.images import to_pixels
from data.prompts import read_prompts
from data.shapes import TAGS, detect_shapes, draw_shapes, heldout_records, outline_overlap, score_objects
from t2md import predict_noise

OUT = train.CONFIGS["shapes"].out
SHIPPED = [os.path.join(train.ASSETS, name) for name in ("teacher", "student_kd", "student")]
COLUMNS = (*TAGS, "overall", "dirty", "outline")


# -- scores --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Verdict:
    """What the detector says of one picture."""

    tag: str  # the kind of its record
    right: bool
    dirty: bool  # does it hold something that is no clean object of one colour?
    outline: float | None  # see `outline_overlap`


def judge(image, record):
    """Return the Verdict on a picture of a record."""
    objects = detect_shapes(image)
    return Verdict(
        tag=record["tag"],
        right=score_objects(objects, record),
        dirty=objects is None,
        outline=outline_overlap(image, objects),
    )


def summarise(verdicts):
    """Return {tag: share of right pictures; "overall": the tags' mean; "dirty": share; "outline": mean}.

    outline: over the pictures in which the detector finds objects; None if there is no such picture.
    """
    scores = {}
    for tag in TAGS:
        right = [verdict.right for verdict in verdicts if verdict.tag == tag]
        if right:
            scores[tag] = float(np.mean(right))
    outlines = [verdict.outline for verdict in verdicts if verdict.outline is not None]
    scores["overall"] = float(np.mean(list(scores.values())))
    scores["dirty"] = float(np.mean([verdict.dirty for verdict in verdicts]))
    scores["outline"] = float(np.mean(outlines)) if outlines else None
    return scores


def evaluate(images, records):
    """Return the scores of pictures of records, GenEval in miniature; see `summarise`."""
    return summarise([judge(image, record) for image, record in zip(images, records, strict=True)])


@torch.no_grad()
def relative_errors(student, teacher, vae, text_encoder, records, pixels, seed):
    """Measure how far a student is from its teacher: ||student - teacher||^2 / ||teacher||^2, no detector.

    The pictures are those of `records`, of pixels x pixels; timesteps are spread over all.
    Returns {"noise": float, "mixers": [float], "forced": [float]}: of the predicted noise; of each block's
    mixer output, each model on its own hidden states; the same, both on the teacher's, as in equation 6.
    """
    schedule = train.noise_schedule(teacher)
    outputs = 1 + 2 * len(student.blocks)  # noise, mixers, forced
    distances = np.zeros(outputs)
    lengths = np.zeros(outputs)
    for first in range(0, len(records), 16):
        numbers = range(first, min(first + 16, len(records)))
        pictures = [draw_shapes(records[k], pixels, np.random.default_rng([seed, k])) for k in numbers]
        latents, _ = vae.moments(to_pixels(pictures))
        noise = [
            torch.randn(latents[0].shape, generator=files.generator(seed, "errors", 0, k)) for k in numbers
        ]
        t = torch.tensor([int((k + 0.5) * 1000 / len(records)) for k in numbers], device=latents.device)
        z_t = schedule.add_noise(latents, torch.stack(noise).to(latents.device), t)
        text, mask = text_encoder([records[k]["prompt"] for k in numbers])
        student_noise, student_mixers = predict_noise(student, z_t, t, text, mask, return_mixers=True)
        teacher_noise, teacher_mixers = predict_noise(teacher, z_t, t, text, mask, return_mixers=True)
        grid = tuple(side // student.config.patch_size for side in z_t.shape[2:])
        pairs = [(student_noise, teacher_noise)]
        for (_, output), (_, target) in zip(student_mixers, teacher_mixers):
            pairs.append((output, target))
        for block, (h, target) in zip(student.blocks, teacher_mixers):
            pairs.append((block.mixer(h, grid), target))
        distances += [(output - target).square().sum().item() for output, target in pairs]
        lengths += [target.square().sum().item() for _, target in pairs]
    noise, *errors = (distances / lengths).tolist()
    blocks = len(student.blocks)
    return dict(noise=noise, mixers=errors[:blocks], forced=errors[blocks:])


# -- a sheet of pictures -------------------------------------------------------------------------------------
def labelled_sheet(rows, prompts, side):
    """Return a sheet of pictures: each row below its name, each picture above its prompt.

    rows: [(name, PIL images)].  prompts: one for each column.  side: pixels of a picture on the sheet.
    """
    above = 18  # pixels for the name
    strips = []
    for name, images in rows:
        pictures = files.contact_sheet([images], side, [prompts[: len(images)]])
        strip = Image.new("RGB", (pictures.width, above + pictures.height), "white")
        ImageDraw.Draw(strip).text((2, 4), name, fill="black", font_size=12)
        strip.paste(pictures, (0, above))
        strips.append(strip)
    width = max(strip.width for strip in strips)
    height = sum(strip.height for strip in strips)
    sheet = Image.new("RGB", (width, height), "white")
    y = 0
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height
    return sheet


# -- the command ---------------------------------------------------------------------------------------------
def command_parser(name, description):
    """Return the parser of one of these commands, with the flags that all of them have."""
    parser = argparse.ArgumentParser(
        f"python -m claims.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of records and noise (default 0)")
    add("--out", default=OUT, help="folder of the results (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser


def parse_arguments(argv=None):
    parser = command_parser("scores", __doc__)
    add = parser.add_argument
    add("--model", nargs="+", metavar="DIR", help="checkpoints (default: the shipped ones and those in OUT)")
    add("--records", type=int, default=552, help="how many held-out records (default 552, 92 of each kind)")
    add("--prompts", help="GenEval-format metadata .jsonl, instead of held-out records")
    add("--size", nargs="+", help="pixels, 512 or 688x384 (default: the size each model was last trained at)")
    add("--guidance", nargs="+", type=float, metavar="G", help="classifier-free (default: the checkpoint's)")
    add("--guidance-interval", nargs="+", type=int, metavar="T", help="no guidance below this timestep")
    add("--direct", action="store_true", help="sample large sizes from noise at once, as the paper does")
    add("--renoise", type=int, metavar="T", help="of progressive sampling, see sample.py")
    add("--timestep-shift", type=float, metavar="S", help="of the solver's steps, see sample.py")
    add("--upscale", type=int, default=1, metavar="M", help="upsample guidance, at M times a known size")
    return parser.parse_args(argv)


def read_records(args):
    """Return the records to draw.  Raises ValueError if --prompts holds others than GenEval's."""
    if not args.prompts:
        return heldout_records(args.records, args.seed)
    records = read_prompts(args.prompts)
    for record in records:
        if record.get("tag") not in TAGS or not record.get("include"):
            needed = f"tag ({', '.join(TAGS)}) and include"
            raise ValueError(f"{args.prompts} holds other records than GenEval's, which have {needed}")
    return records


def checkpoints(args):
    """Return the folders to score: --model, or the shipped ones and those of the stages in OUT."""
    if args.model:
        return args.model
    made = [os.path.join(args.out, stage) for stage in train.STAGES]
    return [folder for folder in SHIPPED + made if os.path.exists(os.path.join(folder, "config.json"))]


def print_row(cells, rest):
    print("".join(f"{cell:>14}" for cell in cells) + rest, flush=True)


def run(args):
    records = read_records(args)
    prompts = [record["prompt"] for record in records]
    print(f"{len(records)} records, 20 steps, seed {args.seed}")
    print_row(COLUMNS, "  guidance  from t    pixels  model")
    results = []
    rows = []  # of the sheet
    sides = []
    for folder in checkpoints(args):
        model, vae, text_encoder = sample.load_networks(folder, args.device)
        trained_at = model.config.sample_size * vae.factor
        sides.append(trained_at // model.interpolation_scale)  # the base size
        multiple = vae.factor * model.config.patch_size * args.upscale
        sizes = args.size or [str(trained_at)]
        guidances = args.guidance or [model.config.guidance]
        intervals = args.guidance_interval or [model.config.guidance_interval]
        for size, guidance, interval in itertools.product(sizes, guidances, intervals):
            given = dict(guidance=guidance, guidance_interval=interval, renoise=args.renoise)
            given.update(timestep_shift=args.timestep_shift, direct=args.direct, upscale=args.upscale)
            settings = dataclasses.asdict(sample.sampler_settings(model, **given))
            pixels = sample.parse_size(size, multiple)
            images = sample.generate_all(model, vae, text_encoder, prompts, pixels, args.seed, **settings)
            verdicts = [judge(image, record) for image, record in zip(images, records, strict=True)]
            scores = summarise(verdicts)
            made = dict(model=folder, size=size, seed=args.seed, records=len(records))
            results.append({**made, **settings, **scores})
            rows.append((f"{os.path.basename(os.path.normpath(folder))}, {size} px", images[:12]))
            cells = ["-" if scores.get(name) is None else f"{scores[name]:.3f}" for name in COLUMNS]
            print_row(cells, f"  {guidance:8.2g}  {interval:6}  {size:>8}  {folder}")
    files.write_json(os.path.join(args.out, "eval.json"), results)
    files.write_png(os.path.join(args.out, "eval.png"), labelled_sheet(rows, prompts, int(min(sides))))
    wrong = [k for k, verdict in enumerate(verdicts) if not verdict.right][:6]  # of the last row
    if wrong:
        fails = files.contact_sheet([[images[k] for k in wrong]], 192, [[prompts[k] for k in wrong]])
        files.write_png(os.path.join(args.out, "fails.png"), fails)


if __name__ == "__main__":
    files.as_command("claims.scores", run, parse_arguments())
