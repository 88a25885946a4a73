"""The paper's claims as pictures: what a mixer sees, how errors grow with depth; and how losses fall.

    python -m claims.figures                                        # field.png; depth.png after claims.table1
    python -m claims.figures --curves runs/shapes/kd runs/other/kd  # curves.png: every loss term by step

All in OUT. field.png: receptive fields of a model's mixers. depth.png: the mixers' errors by depth with and
without teacher forcing, and after forcing alone, of the rows that claims.table1 has trained.
"""

import argparse
import glob
import itertools
import json
import os

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

import sample
import train
from claims.scores import OUT, relative_errors
from claims.table1 import BASE, FORCED, row_folder, teacher_folder
from data.images import to_pixels
from data.shapes import COLOURS, draw_shapes, heldout_records
from t2md import predict_noise, read_json

# the mixers whose receptive field is drawn, where a model has them
STACKS = ("W", "H", "WH", "S", ">", "<", "v", "^")


def receptive_field(mixers, x, grid):
    """How much each token's input moves the middle token's output through mixers stacked with residuals: the
    norm of the gradient, (H, W), largest 1. x: (B, H * W, d), the mixer inputs of some pictures."""
    x = x.detach().requires_grad_()
    h = x
    for mixer in mixers:
        h = h + mixer(h, grid)
    middle = grid[0] // 2 * grid[1] + grid[1] // 2
    out = (h - x)[:, middle]
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    (gradient,) = torch.autograd.grad((out * probe).sum(), x)
    field = gradient.norm(dim=2).mean(0).reshape(grid)
    return field / field.max()


def field_sheet(model, vae, text_encoder, pixels, seed):
    """The receptive fields of the first mixer of each kind, and of a W followed by an H -> PIL image."""
    pattern, inputs = model.config.pattern, []
    records = heldout_records(12, seed)
    drawn = [(record, pixels, np.random.default_rng([seed, k])) for k, record in enumerate(records)]
    pictures = [draw_shapes(*picture) for picture in drawn]
    mean, _ = vae.moments(to_pixels(pictures))
    noise = torch.cat([sample.noise_for(seed + k, *mean.shape[1:]) for k in range(len(records))])
    t = torch.full((len(records),), 500, device=mean.device)
    z_t = train.noise_schedule(model).add_noise(mean, noise.to(mean.device), t)
    text, mask = text_encoder([record["prompt"] for record in records])
    with torch.no_grad():
        predict_noise(model, z_t, t, text, mask, lambda n, mixer_input, _: inputs.append(mixer_input))
    grid, panels = [side // model.config.patch_size for side in mean.shape[2:]], {}
    for letters in STACKS:
        if set(letters) <= set(pattern):
            blocks = [pattern.index(letter) for letter in letters]
            field = receptive_field([model.blocks[n].mixer for n in blocks], inputs[blocks[0]], grid)
            shade = 255 * (1 - field.clamp(min=1e-4).log10() / -4)  # four decades, white the largest
            panel = Image.fromarray(shade.round().byte().cpu().numpy()).resize((188, 188), Image.NEAREST)
            panels[", then ".join(letters)] = ImageOps.expand(panel.convert("RGB"), 2, "white")
    return sample.contact_sheet([list(panels.values())], 192, [list(panels)])


def depth_lines(args):
    """{name of a line: each block's error}, of what claims.table1 has trained in OUT."""
    table, lines = os.path.join(args.out, "ablate", "table.json"), {}
    rows = read_json(table) if os.path.exists(table) else {}
    for name, row in (("without", "+ token mixer loss"), ("with", FORCED)):
        if row in rows:
            errors = [run["mixers"] for run in rows[row]["runs"]]
            lines[f"kd, {name} teacher forcing"] = np.mean(errors, axis=0)
    folders = glob.glob(os.path.join(row_folder(glob.escape(args.out), FORCED, "*"), "forcing"))
    if folders:
        teacher = teacher_folder(args)
        original = sample.load_denoiser(teacher, args.device)
        parts, records = sample.load_parts(original, teacher, args.device), heldout_records(96, args.seed)
        students = [sample.load_denoiser(folder, args.device) for folder in folders]
        errors = [relative_errors(s, original, *parts, records, BASE, args.seed) for s in students]
        for name, key in (("on its own hidden states", "mixers"), ("on the teacher's", "forced")):
            lines[f"forcing alone, {name}"] = np.mean([error[key] for error in errors], axis=0)
    return lines


def chart(lines, title, smooth=1, log=False, size=(640, 400)):
    """Lines {name: (x, y)} -> PIL image with axes and a legend.

    smooth: a line is the running mean over so many points, which lie pale behind it.
    log: a logarithmic y axis, for what is positive; otherwise it begins at 0.
    """
    image, margin, scale = Image.new("RGB", size, "white"), 48, np.log10 if log else np.asarray
    pen, colours = ImageDraw.Draw(image), dict(zip(lines, itertools.cycle(COLOURS.values())))
    xs, ys = (np.concatenate([line[axis] for line in lines.values()]) for axis in (0, 1))
    left, right, bottom, top = xs.min(), xs.max(), scale(ys.min()) if log else 0.0, scale(ys.max())

    def place(x, scaled):
        across = margin + (np.asarray(x) - left) / max(right - left, 1) * (size[0] - 2 * margin)
        up = (scaled - bottom) / ((top - bottom) or 1) * (size[1] - 3 * margin)
        return list(zip(across.tolist(), (size[1] - margin - up).tolist()))

    levels = np.linspace(bottom, top, 5)
    for level, (x, y) in zip(levels, place([left] * 5, levels)):
        pen.line([x, y, size[0] - margin, y], fill="lightgrey")
        pen.text((4, y - 6), f"{10**level if log else level:.2g}", fill="black")
    stops = np.unique(xs) if len(np.unique(xs)) < 30 else np.linspace(left, right, 5)
    for stop, (x, y) in zip(stops, place(stops, np.full(len(stops), bottom))):
        pen.text((x - 3, y + 8), f"{stop:.0f}", fill="black")
    pen.line([margin, 2 * margin, margin, size[1] - margin, size[0] - margin, size[1] - margin], fill="black")
    pen.text((margin, 8), title, fill="black")
    if smooth > 1:
        for name, (x, y) in lines.items():
            pen.line(place(x, scale(y)), fill=tuple((c + 3 * 255) // 4 for c in colours[name]))
    for n, (name, line) in enumerate(lines.items()):
        window = min(smooth, len(line[0]))
        x, y = (np.convolve(values, np.ones(window) / window, "valid") for values in line)
        pen.line(place(x, scale(y)), fill=colours[name], width=3)
        pen.text((margin + 8, 26 + 14 * n), name, fill=colours[name])
    return image


def read_log(folder):
    """What a training has logged -> {term: (steps, values)}: losses and gradient norms, where positive."""
    terms = {}
    path = os.path.join(folder, "log.jsonl")
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.endswith("\n")]  # the last may be half written yet
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, LookupError, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path}, line {number}, is no step of a training") from error
        for name in entry.keys() - {"step", "seconds", "skipped"}:
            if isinstance(entry[name], float) and 0 < entry[name] < float("inf"):
                steps, values = terms.setdefault(name, ([], []))
                steps.append(step)
                values.append(entry[name])
    return terms


def curves(folders):
    """A panel for each term that the trainings in `folders` have logged, a line a training -> PIL image."""
    logs = {folder: read_log(folder) for folder in folders}
    panels = []
    for term in sorted(set().union(*logs.values())):
        lines = {folder: log[term] for folder, log in logs.items() if term in log}
        longest = max(len(steps) for steps, _ in lines.values())
        panels.append(chart(lines, f"{term}, by step", smooth=max(1, longest // 50), log=True))
    if not panels:
        raise ValueError(f"no step is logged yet in {', '.join(folders)}")
    width, height = panels[0].size
    sheet = Image.new("RGB", (width * min(2, len(panels)), height * -(-len(panels) // 2)), "white")
    for n, panel in enumerate(panels):
        sheet.paste(panel, (n % 2 * width, n // 2 * height))
    return sheet


def save(image, path):
    sample.write_png(path, image)
    print(path)


def run(args):
    if args.curves:
        return save(curves(args.curves), os.path.join(args.out, "curves.png"))
    model = sample.load_denoiser(args.model, args.device)
    vae, text_encoder = sample.load_parts(model, args.model, args.device)
    multiple = vae.factor * model.config.patch_size
    pixels, _ = sample.parse_size(str(args.size or model.config.sample_size * vae.factor), multiple)
    save(field_sheet(model, vae, text_encoder, pixels, args.seed), os.path.join(args.out, "field.png"))
    lines = {name: (range(len(errors)), errors) for name, errors in depth_lines(args).items()}
    if lines:
        picture = chart(lines, "relative error of each block's mixer output, by depth")
        save(picture, os.path.join(args.out, "depth.png"))


def parse_arguments(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m claims.figures", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--curves", nargs="+", metavar="DIR", help="draw the loss terms of these trainings, and nothing else")
    add("--model", default=sample.SHIPPED, help="for field.png (default: the shipped student)")
    add("--size", type=int, help="pixels of its pictures (default: the size it was last trained at)")
    add("--seed", type=int, default=0, help="of records and noise (default 0)")
    add("--teacher", help="of the rows in OUT (default: as claims.table1's)")
    add("--out", default=OUT, help="folder that has ablate/ and gets the pictures (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.size is not None and args.size < 1:
        parser.error("--size must be at least 1")
    return args


def main():
    sample.as_command("claims.figures", run, parse_arguments())


if __name__ == "__main__":
    main()
