"""The paper's claims as pictures, all in OUT.

    python -m claims.figures                                        # field.png; depth.png after claims.table1
    python -m claims.figures --curves runs/shapes/kd runs/other/kd  # curves.png: losses; --prompts: scores
    python -m claims.figures --film "a photo of a red circle and a blue square"  # film.webp

field.png: what the student's mixers see. depth.png: the mixers' errors by depth, of claims.table1's rows with
and without teacher forcing. film.webp: teacher and student denoise; then the student's picture grows.
"""

import functools
import glob
import itertools
import json
import os

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

import sample
import train
from claims.scores import SHIPPED, command_parser, evaluate
from claims.table1 import FORCED
from data import files
from data.images import to_pixels
from data.shapes import COLOURS, detect_shapes, draw_shapes, heldout_records
from t2md import predict_noise

STACKS = ("W", "H", "WH", "S", ">", "<", "v", "^")  # the mixers whose receptive field is drawn


def receptive_field(mixers, x, grid):
    """How much each token's input moves the middle token's output through mixers stacked with residuals: the
    norm of the gradient, (H, W), largest 1. x: (B, H * W, d), the mixer inputs of some pictures."""
    h = x = x.detach().requires_grad_()
    for mixer in mixers:
        h = h + mixer(h, grid)
    out = (h - x)[:, grid[0] // 2 * grid[1] + grid[1] // 2]
    probe = torch.randn(out.shape, generator=files.generator(0, "field", 0, 0)).to(out)
    (gradient,) = torch.autograd.grad((out * probe).sum(), x)
    field = gradient.norm(dim=2).mean(0).reshape(grid)
    return field / field.max()


def field_sheet(model, vae, text_encoder, pixels, seed):
    """The receptive fields of the first mixer of each kind, and of a W followed by an H -> PIL image."""
    records, pattern, panels = heldout_records(12, seed), model.config.pattern, {}
    pictures = [draw_shapes(r, pixels, np.random.default_rng([seed, k])) for k, r in enumerate(records)]
    mean, _ = vae.moments(to_pixels(pictures))
    noise = torch.cat([files.noise_for(seed + k, *mean.shape[1:]) for k in range(12)]).to(mean.device)
    t = torch.full((12,), 500, device=mean.device)
    z_t = train.noise_schedule(model).add_noise(mean, noise, t)
    text, mask = text_encoder([record["prompt"] for record in records])
    _, mixers = predict_noise(model, z_t, t, text, mask, return_mixers=True)
    grid = [side // model.config.patch_size for side in mean.shape[2:]]
    for letters in (stack for stack in STACKS if set(stack) <= set(pattern)):
        blocks = [pattern.index(letter) for letter in letters]
        field = receptive_field([model.blocks[n].mixer for n in blocks], mixers[blocks[0]][0], grid)
        shade = 255 * (1 - field.clamp(min=1e-4).log10() / -4)  # four decades, white the largest
        panel = Image.fromarray(shade.round().byte().cpu().numpy()).convert("RGB")
        panels[", then ".join(letters)] = ImageOps.expand(panel.resize((188, 188), Image.NEAREST), 2, "white")
    return files.contact_sheet([list(panels.values())], 192, [list(panels)])


def chart(lines, title, log=False, width=480, height=480, margin=48):
    """Lines {name: (x, y)} -> PIL image with axes and a legend; y from 0 or, if `log`, logarithmic."""
    image, scale = Image.new("RGB", (width, height), "white"), np.log10 if log else np.asarray
    pen = ImageDraw.Draw(image)
    xs, ys = (np.concatenate([line[axis] for line in lines.values()]) for axis in (0, 1))
    left, right, bottom, top = xs.min(), xs.max(), scale(ys.min()) if log else 0.0, scale(ys.max())

    def place(x, scaled):
        across = margin + (np.asarray(x) - left) / max(right - left, 1) * (width - 2 * margin)
        down = height - margin - (np.asarray(scaled) - bottom) / ((top - bottom) or 1) * (height - 3 * margin)
        return list(zip(across.tolist(), down.tolist()))

    pen.text((margin, 8), title, fill="black")
    for level, stop in zip(np.linspace(bottom, top, 7), np.linspace(left, right, 7)):
        ((x, y),) = place([stop], [level])
        pen.line([margin, y, width - margin, y], fill="lightgrey")
        pen.text((4, y - 6), f"{10**level if log else level:.2g}", fill="black")
        pen.text((x - 3, height - margin + 8), f"{stop:.0f}", fill="black")
    for n, ((name, (x, y)), colour) in enumerate(zip(lines.items(), itertools.cycle(COLOURS.values()))):
        pen.line(place(x, scale(y)), fill=colour, width=3)
        pen.text((margin + 8, 26 + 14 * n), name, fill=colour)
    return image


def scores_on_the_way(folder, records):
    """(images seen, scores) of a training, by the pictures of `records` that it drew at its checkpoints."""
    seen, scores = [], []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "step-*.png"))):
        sheet = Image.open(path)  # the last row is the student's
        side = sheet.width // len(records)
        corners = [(k * side, sheet.height - side) for k in range(len(records))]
        scores.append(evaluate([sheet.crop((x, y, x + side, y + side)) for x, y in corners], records))
        seen.append(int(path[-10:-4]))
    images = files.read_json(os.path.join(folder, "made_with.json"))["batch_size"]
    return images * np.array(seen), [score["overall"] for score in scores]


def curves(folders, records):
    """A panel for each loss term and gradient norm that the trainings in `folders` have logged, a line for
    each of them: the running mean over a fiftieth of its steps; and for the score -> PIL image."""
    panels = {}
    for folder in folders:
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as file:  # the end may be half written
            entries = [json.loads(line) for line in file if line.endswith("\n")]
        for term in set().union(*entries) - {"step", "lr", "skipped", "seconds"}:
            points = [(e["step"], e[term]) for e in entries if term in e and 0 < e[term] < float("inf")]
            if points:
                mean = np.ones(max(1, len(points) // 50)) / max(1, len(points) // 50)
                panels.setdefault(term, {})[folder] = [np.convolve(v, mean, "valid") for v in zip(*points)]
    if not panels:
        raise ValueError(f"no step is logged yet in {', '.join(folders)}")
    charts = [chart(panels[term], f"{term}, by step", log=True) for term in sorted(panels)]
    if records:
        scores = {folder: scores_on_the_way(folder, records) for folder in folders}
        charts.append(chart(scores, "score, by images seen"))
    return files.contact_sheet([charts[k : k + 2] for k in range(0, len(charts), 2)], 480)


def depth_chart(table):
    """Of what claims.table1 has measured -> the mixers' errors by depth, means over seeds, PIL image."""
    without, forced = (table[row]["runs"] for row in ("+ token mixer loss", FORCED))
    errors = {
        "kd, without teacher forcing": [run["mixers"] for run in without],
        "kd, with teacher forcing": [run["mixers"] for run in forced],
        "forcing alone, on its hidden states": [run["forcing"]["mixers"] for run in forced],
        "forcing alone, on the teacher's": [run["forcing"]["forced"] for run in forced],
    }
    lines = {name: (range(len(runs[0])), np.mean(runs, axis=0)) for name, runs in errors.items()}
    return chart(lines, "relative error of each block's mixer output, by depth")


def pictures_on_the_way(model, vae, text_encoder, prompt, size, seed):
    """The pictures that a model predicts, step by step, while `sample.generate` runs, and its result."""
    alphas_cumprod, pictures = train.noise_schedule(model).alphas_cumprod, []

    def look(_, inputs, output):  # the last row is the caption's, without guidance
        z_t, noise, alpha_bar = inputs[0][-1:], output[0][-1:, : vae.channels], alphas_cumprod[int(inputs[2])]
        z_0 = (z_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        pictures.extend(sample.to_images(vae.decode(z_0)))

    hook = model.register_forward_hook(look)
    result = sample.generate(model, vae, text_encoder, [prompt], (size, size), [seed])
    hook.remove()
    return pictures + result


def film_frames(teacher, student, prompt, size, seed):
    """Teacher and student, each (model, VAE, text encoder), denoise, from the same noise if they begin at one
    size; then the student's picture grows to size x size pixels, beside a detail of it -> PIL images."""
    taught = pictures_on_the_way(*teacher, prompt, teacher[0].config.sample_size * teacher[1].factor, seed)
    pictures = pictures_on_the_way(*student, prompt, size, seed)
    first = [picture for picture in pictures if picture.width == pictures[0].width]
    frames = [files.contact_sheet([pair], 320, [("teacher", "student")]) for pair in zip(taught, first)]
    # the detail is the top of an object, of a circle if there is one
    x0, y0, x1, _ = min(detect_shapes(first[-1]) or [("", "", (48, 64, 80, 96))])[2]
    box = (x0 + x1) / 256 - 1 / 24, y0 / 128 - 1 / 24, (x0 + x1) / 256 + 1 / 24, y0 / 128 + 1 / 24
    for picture in pictures[len(first) :]:
        pair = picture, picture.crop([round(picture.width * edge) for edge in box])
        captions = f"student, {picture.width} px", "a twelfth of it"
        frames.append(files.contact_sheet([pair], 320, [captions]))
    return frames


def run(args):
    out = functools.partial(os.path.join, args.out)
    if args.curves:
        records = sample.read_prompts(args.prompts) if args.prompts else []
        return save(out("curves.png"), curves(args.curves, records))
    if args.film:
        models = [sample.load(folder, args.device).args for folder in args.models]
        frames = film_frames(*models, args.film, args.size or 2048, args.seed)
        durations = [120] * (len(frames) - 1) + [3000]  # milliseconds
        settings = dict(save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=75)
        return save(out("film.webp"), frames[0], "WEBP", **settings)
    model, vae, text_encoder = sample.load(args.models[-1], args.device).args
    pixels = args.size or model.config.sample_size * vae.factor
    save(out("field.png"), field_sheet(model, vae, text_encoder, pixels, args.seed))
    table = files.read_json(out("ablate/table.json")) if os.path.exists(out("ablate/table.json")) else {}
    if FORCED in table:
        save(out("depth.png"), depth_chart(table))


def save(path, image, form="PNG", **settings):
    files.write_atomically(path, functools.partial(image.save, format=form, **settings))
    print(path)


def parse_arguments(argv=None):
    parser, add = command_parser("figures", __doc__)
    add("--curves", nargs="+", metavar="DIR", help="draw the loss terms of these trainings, and nothing else")
    add("--prompts", help="what they drew, by train.py's --example-prompts and --examples: its score too")
    add("--film", metavar="PROMPT", help="draw a film of this prompt, and nothing else")
    add("--models", nargs=2, metavar=("TEACHER", "STUDENT"), default=SHIPPED[::2], help="two checkpoints")
    add("--size", type=int, help="pixels (default: of a film 2048, else what the student was trained at)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    files.as_command("claims.figures", run, parse_arguments())
