"""Score checkpoints beside each other: the share of pictures that show what was asked for.

    python -m claims.scores                                                      # every checkpoint there is
    python -m claims.scores --model assets/student --size 512 1024 --records 36
    python -m claims.scores --model assets/student --records 12 --zero-shot 1024 --upscale 2

Each is scored at the size it was last trained at, or at every --size, on held-out records or on --prompts.
Prints a table; writes OUT/eval.json and OUT/eval.png, a row of pictures for each and one for --zero-shot.
"""

import argparse
import os

import numpy as np
import torch

import sample
import train
from data.images import to_pixels
from data.shapes import TAGS, draw_shapes, heldout_records, score_shapes
from t2md import predict_noise

OUT = train.CONFIGS["shapes"]["out"]
SHIPPED = [os.path.join(sample.HERE, "assets", name) for name in ("teacher", "student_kd", "student")]


def evaluate(images, records):
    """GenEval in miniature -> {tag: share of right pictures, "overall": mean over the tags that occur}."""
    right = {}
    for image, record in zip(images, records, strict=True):
        right.setdefault(record["tag"], []).append(score_shapes(image, record))
    scores = {tag: float(np.mean(right[tag])) for tag in TAGS if tag in right}
    return scores | {"overall": float(np.mean(list(scores.values())))}


def squares(student, teacher, z_t, *given):
    """Summed squares of (student - teacher, teacher): of the predicted noise, then of each mixer on its own
    model's hidden states, then of each on the teacher's.

    given: t, text and mask of `predict_noise`.  Returns [(float, float)], 1 + 2 * blocks of them.
    """
    own, wanted, forced = [], [], []
    grid = [side // student.config.patch_size for side in z_t.shape[2:]]

    def visit_student(n, mixer_input, mixer_output):
        own.append(mixer_output)

    def visit_teacher(n, mixer_input, mixer_output):
        wanted.append(mixer_output)
        forced.append(student.blocks[n].mixer(mixer_input, grid))

    with torch.no_grad():
        ours = predict_noise(student, z_t, *given, visit_student)
        theirs = predict_noise(teacher, z_t, *given, visit_teacher)
    pairs = [(ours, theirs), *zip(own, wanted), *zip(forced, wanted)]
    return [((s - t).square().sum().item(), t.square().sum().item()) for s, t in pairs]


def relative_errors(student, teacher, vae, text_encoder, records, pixels, seed):
    """How far a student is from its teacher, without a detector: ||student - teacher||^2 / ||teacher||^2 of
    the predicted noise and of each block's mixer output, on pictures of `records`, timesteps spread over all.

    Returns {"noise": float, "mixers": [float], "forced": [float]}. mixers: each model on its own hidden
    states; forced: the student's mixers too are fed with the teacher's, as in equation 6.
    """
    schedule, totals = train.noise_schedule(teacher), 0
    for start in range(0, len(records), 16):
        chunk = range(start, min(start + 16, len(records)))
        pictures = [draw_shapes(records[k], pixels, np.random.default_rng([seed, k])) for k in chunk]
        mean, _ = vae.moments(to_pixels(pictures))
        noise = [torch.randn(1, *mean.shape[1:], generator=sample.draw(seed, "errors", 0, k)) for k in chunk]
        t = torch.tensor([int((k + 0.5) * 1000 / len(records)) for k in chunk], device=mean.device)
        z_t = schedule.add_noise(mean, torch.cat(noise).to(mean.device), t)
        text = text_encoder([records[k]["prompt"] for k in chunk])
        totals = totals + np.array(squares(student, teacher, z_t, t, *text))
    wrong, size = totals.T
    noise_error, *errors = (wrong / size).tolist()
    return dict(noise=noise_error, mixers=errors[: len(student.blocks)], forced=errors[len(student.blocks) :])


def parse_arguments(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m claims.scores", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--model", nargs="+", metavar="DIR", help="checkpoints (default: the shipped ones and those in OUT)")
    add("--records", type=int, default=552, help="how many held-out records (default 552, 92 of each kind)")
    add("--prompts", help="GenEval-format metadata .jsonl, instead of held-out records")
    add("--size", nargs="+", help="pixels, 512 or 688x384 (default: the size each model was last trained at)")
    add("--direct", action="store_true", help="sample large sizes from noise at once, as the paper does")
    add("--renoise", type=int, metavar="T", help="of progressive sampling, see sample.py")
    add("--upscale", type=int, default=1, metavar="M", help="upsample guidance, at M times a known size")
    add("--zero-shot", metavar="PIXELS", help="more pictures of the last; for them alone the three above")
    add("--seed", type=int, default=0, help="of the records and of the noise (default 0)")
    add("--out", default=OUT, help="folder of the results (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if min(args.records, args.upscale) < 1:
        parser.error("--records and --upscale must be at least 1")
    return args


def found(out):
    """The checkpoints there are: the shipped ones, and those of the chain in `out`."""
    made = [os.path.join(out, stage) for stage in train.CHAIN]
    folders = [folder for folder in (*SHIPPED, *made) if os.path.exists(os.path.join(folder, "config.json"))]
    if not folders:
        raise ValueError(f"there is no checkpoint to score in {out}; name one with --model")
    return folders


def run(args):
    records = sample.read_prompts(args.prompts) if args.prompts else heldout_records(args.records, args.seed)
    if not all(record.get("tag") in TAGS and record.get("include") for record in records):
        which = f"tag, one of {', '.join(TAGS)}, and include"
        raise ValueError(f"{args.prompts} must hold GenEval's records: {which}")
    prompts, results, rows, shown = [record["prompt"] for record in records], {}, [], float("inf")
    special = dict(upscale=args.upscale, direct=args.direct, renoise=args.renoise)
    print(f"{len(records)} records, 20 steps, guidance 4.5, seed {args.seed}")
    print("".join(f"{name:>14}" for name in (*TAGS, "overall")) + "    pixels  model")
    for folder in args.model or found(args.out):
        model = sample.load_denoiser(folder, args.device)
        parts = sample.load_parts(model, folder, args.device)
        shown = min(shown, model.config.sample_size * parts[0].factor // model.interpolation_scale)
        multiple = parts[0].factor * model.config.patch_size * args.upscale
        for given in args.size or [str(model.config.sample_size * parts[0].factor)]:
            size, how = sample.parse_size(given, multiple), {} if args.zero_shot else special
            images = sample.generate_all(model, *parts, prompts, size, args.seed, **how)
            pixels = str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
            scores = results.setdefault(folder, {})[pixels] = evaluate(images, records)
            line = "".join(f"{scores.get(name, float('nan')):14.3f}" for name in (*TAGS, "overall"))
            print(f"{line}  {pixels:>8}  {folder}", flush=True)
            rows.append(images[:12])
    if args.zero_shot:
        size = sample.parse_size(args.zero_shot, multiple)
        rows.append(sample.generate_all(model, *parts, prompts[:12], size, args.seed, **special))
    sample.write_json(os.path.join(args.out, "eval.json"), results)
    sheet = sample.contact_sheet(rows, shown)  # all as large as the base size that they were distilled at
    sample.write_png(os.path.join(args.out, "eval.png"), sheet)


def main():
    sample.as_command("claims.scores", run, parse_arguments())


if __name__ == "__main__":
    main()
