"""The paper's claims as pictures, all in OUT.

    python -m claims.figures                                        # field.png; depth.png after claims.table1
    python -m claims.figures --curves runs/shapes/kd runs/other/kd  # curves.png: losses; --prompts: scores
    python -m claims.figures --film "a photo of a red circle and a blue square"  # film.webp
    python -m claims.figures --sheet stages                         # stages.png; or sizes, control

field.png: what the student's mixers see. depth.png: the mixers' errors by depth, of claims.table1's rows with
and without teacher forcing. film.webp: teacher and student denoise; then the student's picture grows. The
sheets show the same twelve prompts in every row: of each stage; of sizes never trained at; of the control.
"""

import functools
import glob
import json
import os
from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib.figure import Figure  # without pyplot: no window, no display
from matplotlib.ticker import LogFormatter
from PIL import Image, ImageOps

import sample
import train
from claims.scores import SHIPPED, command_parser, evaluate, labelled_sheet
from claims.table1 import FORCED, MIXER_LOSS
from data import files
from data.images import to_pixels
from data.prompts import read_prompts
from data.shapes import detect_shapes, draw_shapes, heldout_records
from t2md import predict_noise

# -- what a mixer sees ---------------------------------------------------------------------------------------
STACKS = ("W", "H", "WH", "S", ">", "<", "v", "^")  # the mixers whose receptive field is drawn


def receptive_field(mixers, x, grid):
    """Return how much each token's input moves the middle token's output: the gradient's norm, largest 1.

    mixers: a stack with residuals.  x: the mixer inputs of some pictures (b, rows * columns, d).
    grid: (rows, columns), also the shape of what is returned.
    """
    rows, columns = grid
    x = x.detach().requires_grad_()
    h = x
    for mixer in mixers:
        h = h + mixer(h, grid)
    middle = rows // 2 * columns + columns // 2
    output = (h - x)[:, middle]  # (b, d)
    probe = torch.randn(output.shape, generator=files.generator(0, "field", 0, 0)).to(output)
    (gradient,) = torch.autograd.grad((output * probe).sum(), x)
    seen = gradient.norm(dim=2).mean(0).reshape(rows, columns)
    return seen / seen.max()


def mixer_inputs(model, vae, text_encoder, pixels, seed):
    """Return the input of each block's mixer at mid-noise, for twelve pictures, and the token grid."""
    records = heldout_records(12, seed)
    pictures = [
        draw_shapes(record, pixels, np.random.default_rng([seed, k])) for k, record in enumerate(records)
    ]
    latents, _ = vae.moments(to_pixels(pictures))
    noise = [files.noise_for(seed + k, *latents.shape[1:]) for k in range(len(records))]
    t = torch.full((len(records),), 500, device=latents.device)
    z_t = train.noise_schedule(model).add_noise(latents, torch.cat(noise).to(latents.device), t)
    text, mask = text_encoder([record["prompt"] for record in records])
    _, mixers = predict_noise(model, z_t, t, text, mask, return_mixers=True)
    grid = tuple(side // model.config.patch_size for side in latents.shape[2:])
    return [h for h, _ in mixers], grid


def field_sheet(model, vae, text_encoder, pixels, seed):
    """Draw the receptive fields of the first mixer of each kind, and of a W followed by an H."""
    inputs, grid = mixer_inputs(model, vae, text_encoder, pixels, seed)
    pattern = model.config.pattern
    panels = []
    names = []
    for letters in STACKS:
        if set(letters) <= set(pattern):
            blocks = [pattern.index(letter) for letter in letters]
            mixers = [model.blocks[n].mixer for n in blocks]
            seen = receptive_field(mixers, inputs[blocks[0]], grid)
            grey = 255 * (1 + seen.clamp(min=1e-4).log10() / 4)  # four decades, the largest white
            panel = Image.fromarray(grey.round().byte().cpu().numpy()).convert("RGB")
            panels.append(ImageOps.expand(panel.resize((188, 188), Image.NEAREST), 2, "white"))
            names.append(", then ".join(letters))
    return files.contact_sheet([panels], 192, [names])


# -- plots ---------------------------------------------------------------------------------------------------
# What log.jsonl has of each step, and is drawn.
LOGGED = {"forcing", "mse", "soft", "mixer", "pooled", "gradient"}


def panels(count):
    """Return a figure and its axes: `count` panels, two in a row."""
    rows = -(-count // 2)
    figure = Figure(figsize=(10, 4 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, 2, n + 1) for n in range(count)]


def read_log(folder):
    """Return what a training has logged, a dict a step; its last line may be half written."""
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def running_mean(values):
    """Return the mean over a fiftieth of all values, at each place where that many are."""
    width = max(1, len(values) // 50)
    return np.convolve(values, np.ones(width) / width, "valid")


def loss_lines(folders):
    """Return {loss term, or "gradient": {folder: (steps, values)}} of what trainings have logged."""
    lines = {}
    for folder in folders:
        entries = read_log(folder)
        names = set()
        for entry in entries:
            names.update(entry)
        for name in names & LOGGED:
            points = [(e["step"], e[name]) for e in entries if name in e and 0 < e[name] < float("inf")]
            if points:
                steps, values = zip(*points)
                lines.setdefault(name, {})[folder] = (running_mean(steps), running_mean(values))
    return lines


def scores_on_the_way(folder, records):
    """Return (steps, scores) of a training, by its checkpoints' pictures of the first of `records`."""
    steps = []
    scores = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "step-*.png"))):
        sheet = Image.open(path)
        side = int(sheet.text["side"])
        shown = records[: sheet.width // side]
        top = sheet.height - side  # the last row is the student's
        pictures = [sheet.crop((k * side, top, (k + 1) * side, sheet.height)) for k in range(len(shown))]
        scores.append(evaluate(pictures, shown)["overall"])
        steps.append(int(path[-10:-4]))
    return steps, scores


def curves(folders, records):
    """Draw a panel for each loss term, the gradient's norm and the score, a line for each training."""
    lines = loss_lines(folders)
    if not lines:
        raise ValueError(f"no step is logged yet in {', '.join(folders)}")
    figure, axes = panels(len(lines) + bool(records))
    for axis, name in zip(axes, sorted(lines)):
        for folder, (steps, values) in lines[name].items():
            axis.plot(steps, values, marker="." if len(steps) == 1 else None, label=folder)
        axis.set(title=name, xlabel="step", yscale="log")
        axis.yaxis.set_major_formatter(LogFormatter())  # 0.02, not a power of ten
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    if records:
        for folder in folders:
            steps, scores = scores_on_the_way(folder, records)
            axes[-1].plot(steps, scores, marker=".", label=folder)
        axes[-1].set(title="score", xlabel="step", ylim=(0, 1))
    for axis in axes:
        axis.grid(color="lightgrey")
        axis.legend(fontsize="small")
    return figure


def depth_chart(table):
    """Draw the mixers' errors by depth, means over seeds, of what claims.table1 has measured."""
    without = table[MIXER_LOSS]["runs"]
    forced = table[FORCED]["runs"]
    lines = {
        "kd, without teacher forcing": [run["mixers"] for run in without],
        "kd, with teacher forcing": [run["mixers"] for run in forced],
        "forcing alone, on its own hidden states": [run["forcing"]["mixers"] for run in forced],
        "forcing alone, on the teacher's": [run["forcing"]["forced"] for run in forced],
    }
    figure = Figure(figsize=(6, 5), layout="constrained")
    axis = figure.add_subplot()
    for name, runs in lines.items():
        axis.plot(np.mean(runs, axis=0), marker=".", label=name)
    axis.set(title="relative error of each block's mixer output", xlabel="block, from 0", ylim=(0, None))
    axis.set_xticks(range(len(forced[0]["mixers"])))
    axis.grid(color="lightgrey")
    axis.legend()
    return figure


# -- the film ------------------------------------------------------------------------------------------------
def pictures_on_the_way(model, vae, text_encoder, prompt, size, seed):
    """Return the pictures that a model predicts, step by step, while it samples one, and its result."""
    alphas_cumprod = train.noise_schedule(model).alphas_cumprod
    pictures = []

    def look(module, inputs, named, output):
        z_t = named["hidden_states"][-1:]  # the last row is the caption's, without guidance
        noise = output[0][-1:, : vae.channels]
        alpha_bar = alphas_cumprod[int(named["timestep"])]
        z_0 = (z_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        pictures.extend(sample.to_images(vae.decode(z_0)))

    hook = model.register_forward_hook(look, with_kwargs=True)
    result = sample.generate(model, vae, text_encoder, [prompt], (size, size), [seed])
    hook.remove()
    return pictures + result


def detail_of(picture):
    """Return a box of a twelfth of a picture, in shares of its side: the top of a circle, or of an object."""
    objects = detect_shapes(picture) or [("none", "none", (48, 64, 80, 96))]
    _, _, (x0, y0, x1, _) = min(objects)  # by name: a circle comes first
    x = (x0 + x1) / 256  # the detector's boxes are of 128 px
    y = y0 / 128
    return x - 1 / 24, y - 1 / 24, x + 1 / 24, y + 1 / 24


def film_frames(teacher, student, prompt, size, seed):
    """Return the frames of the film.  teacher, student: each (model, VAE, text encoder).

    Both denoise, from the same noise if they begin at one size; then the student's picture grows to
    size x size pixels, beside a detail of it.
    """
    teacher_side = teacher[0].config.sample_size * teacher[1].factor
    taught = pictures_on_the_way(*teacher, prompt, teacher_side, seed)
    pictures = pictures_on_the_way(*student, prompt, size, seed)
    first = [picture for picture in pictures if picture.width == pictures[0].width]
    frames = []
    for left, right in zip(taught, first):
        frames.append(files.contact_sheet([[left, right]], 320, [["teacher", "student"]]))
    box = detail_of(first[-1])
    for picture in pictures[len(first) :]:
        detail = picture.crop([round(picture.width * edge) for edge in box])
        names = [f"student, {picture.width} px", "a twelfth of it"]
        frames.append(files.contact_sheet([[picture, detail]], 320, [names]))
    return frames


# -- sheets --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SheetRow:
    name: str
    model: str  # a checkpoint; {out} is --out
    size: str | None = None  # pixels; None: the model's own
    settings: dict = field(default_factory=dict)  # of sample.generate


TEACHER, STUDENT_KD, STUDENT = SHIPPED
DIRECT = dict(direct=True)
SHEETS = {
    "stages": [  # the paper's figure 4
        SheetRow("teacher", TEACHER),
        SheetRow("after forcing", "{out}/forcing"),
        SheetRow("after kd", STUDENT_KD),
        SheetRow("after hires2", STUDENT),
    ],
    "sizes": [  # the paper's figure 5, and zero-shot sizes
        SheetRow("student_kd at 256 px, twice its size, directly", STUDENT_KD, "256", DIRECT),
        SheetRow("student_kd at 512 px, four times its size, directly", STUDENT_KD, "512", DIRECT),
        SheetRow("student at 512 px, its size", STUDENT, "512", DIRECT),
        SheetRow("student at 720 px, twice the area, directly", STUDENT, "720", DIRECT),
        SheetRow("student at 960 x 544 px, twice the area, directly", STUDENT, "960x544", DIRECT),
        SheetRow("student at 1024 px, twice its size, directly", STUDENT, "1024", DIRECT),
        SheetRow("student at 1024 px, by upsample guidance", STUDENT, "1024", dict(upscale=2)),
        SheetRow("student at 1024 px, progressively", STUDENT, "1024"),
    ],
    "control": [  # see claims/log.md
        SheetRow("centred embedding, 128 px", "{out}/adapt-centered", "128", DIRECT),
        SheetRow("centred embedding, 240 x 128 px", "{out}/adapt-centered", "240x128", DIRECT),
        SheetRow("centred embedding, 256 px", "{out}/adapt-centered", "256", DIRECT),
        SheetRow("the teacher's embedding, 128 px", "{out}/adapt-pixart", "128", DIRECT),
        SheetRow("the teacher's embedding, 240 x 128 px", "{out}/adapt-pixart", "240x128", DIRECT),
        SheetRow("the teacher's embedding, 256 px", "{out}/adapt-pixart", "256", DIRECT),
    ],
}


def sheet(rows, prompts, out, seed, device):
    """Sample the rows of a sheet: each picture from the noise of its own seed, the same in every row."""
    named = []
    for row in rows:
        model, vae, text_encoder = sample.load_networks(row.model.format(out=out), device)
        text = row.size or str(model.config.sample_size * vae.factor)
        size = sample.parse_size(text, vae.factor * model.config.patch_size)
        images = sample.generate_all(model, vae, text_encoder, prompts, size, seed, **row.settings)
        named.append((row.name, images))
    return labelled_sheet(named, prompts, 128)


# -- the command ---------------------------------------------------------------------------------------------
def save(path, write):
    """Write a picture whole or not at all, and say so.  write(path): what writes it."""
    files.write_atomically(path, write)
    print(path)


def save_plot(path, figure):
    save(path, functools.partial(figure.savefig, dpi=100))


def save_film(path, frames):
    milliseconds = [120] * (len(frames) - 1) + [3000]
    write = functools.partial(
        frames[0].save,
        format="WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=milliseconds,
        loop=0,
        quality=75,
    )
    save(path, write)


def run(args):
    if args.curves:
        records = read_prompts(args.prompts) if args.prompts else []
        save_plot(os.path.join(args.out, "curves.png"), curves(args.curves, records))
    elif args.film:
        teacher, student = (sample.load_networks(folder, args.device) for folder in args.models)
        frames = film_frames(teacher, student, args.film, args.size or 2048, args.seed)
        save_film(os.path.join(args.out, "film.webp"), frames)
    elif args.sheet:
        prompts = [record["prompt"] for record in heldout_records(12, args.seed)]
        picture = sheet(SHEETS[args.sheet], prompts, args.out, args.seed, args.device)
        save(os.path.join(args.out, f"{args.sheet}.png"), picture.save)
    else:
        model, vae, text_encoder = sample.load_networks(args.models[-1], args.device)
        pixels = args.size or model.config.sample_size * vae.factor
        picture = field_sheet(model, vae, text_encoder, pixels, args.seed)
        save(os.path.join(args.out, "field.png"), picture.save)
        path = os.path.join(args.out, "ablate", "table.json")
        table = files.read_json(path) if os.path.exists(path) else {}
        if FORCED in table:
            save_plot(os.path.join(args.out, "depth.png"), depth_chart(table))


def parse_arguments(argv=None):
    parser = command_parser("figures", __doc__)
    add = parser.add_argument
    add("--curves", nargs="+", metavar="DIR", help="draw the loss terms of these trainings, and nothing else")
    add("--prompts", help="what they drew, by train.py's --example-prompts and --examples: its score too")
    add("--film", metavar="PROMPT", help="draw a film of this prompt, and nothing else")
    add("--sheet", choices=SHEETS, help="draw this sheet of pictures, and nothing else")
    add("--models", nargs=2, metavar=("TEACHER", "STUDENT"), default=SHIPPED[::2], help="two checkpoints")
    add("--size", type=int, help="pixels (default: of a film 2048, else what the student was trained at)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    files.as_command("claims.figures", run, parse_arguments())
