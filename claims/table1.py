"""The paper's Table 1 in miniature: every row trained for as many steps, with several seeds.

    python -m claims.table1                        # three seeds, 600 steps a row
    python -m claims.table1 --seed 1 --seeds 1     # one of them: several processes can share the work

A row is train.py with other flags, sampled with the teacher's guidance. Prints and writes OUT/ablate/table.md
and table.json: mean and standard deviation over seeds, and row against row. What is done is not run again;
rows of another budget are refused.
"""

import argparse
import os
from dataclasses import dataclass

import numpy as np

import sample
import t2md
import train
from claims.scores import command_parser, evaluate, relative_errors
from data import files
from data.shapes import TAGS, heldout_records, write_shards


@dataclass(frozen=True)
class Row:
    name: str
    against: str | None = None  # the row to compare it with
    paper: tuple = ()  # the paper's scores, GenEval at full scale: of each of TAGS, then overall
    flags: tuple = ()  # for train.py; a row without --init spends a quarter of its steps on forcing


@dataclass(frozen=True)
class Study:
    """What all rows share."""

    args: argparse.Namespace  # of the command line
    budget: dict  # what a result depends on
    teacher_path: str
    teacher: t2md.T2MD
    vae: t2md.VAE
    text_encoder: t2md.TextEncoder

    @property
    def folder(self):
        return os.path.join(self.args.out, "ablate")


BASE = 128  # pixels: the shapes world's base size
COPIED = "+ non-Mamba weights from the teacher"
MIXER_LOSS = "+ token mixer loss"
FORCED = "+ teacher forcing: T2MD"
# fmt: off
ROWS = (
    Row("teacher", paper=(.97, .47, .48, .81, .08, .08, .481)),
    Row("from scratch", paper=(.08, .18, .18, .60, .02, .04, .301),  # .08 is a misprint: .80 fits the overall
        flags=("--init", "scratch", "--soft-weight", "0", "--mixer-weight", "0")),
    Row(COPIED, against="from scratch", paper=(.94, .37, .27, .71, .05, .06, .397),
        flags=("--init", "teacher", "--soft-weight", "0", "--mixer-weight", "0")),
    Row("+ soft loss", against=COPIED, paper=(.98, .41, .42, .79, .05, .08, .452),
        flags=("--init", "teacher", "--mixer-weight", "0")),
    Row(MIXER_LOSS, against="+ soft loss", paper=(.96, .40, .47, .81, .07, .08, .462),
        flags=("--init", "teacher")),
    Row(FORCED, against=MIXER_LOSS, paper=(.96, .49, .44, .79, .10, .14, .485)),
    Row("attention-to-Mamba initialisation", against=FORCED, paper=(.95, .36, .40, .77, .06, .06, .433),
        flags=("--init", "llama")),
    Row("one direction", against=FORCED, paper=(.96, .39, .44, .77, .06, .07, .448),
        flags=("--pattern", "Sv>v>v>")),
    Row("no self-attention", against=FORCED, paper=(.96, .31, .38, .77, .05, .05, .420),
        flags=("--pattern", "HWHWHWH")),
    Row("four-way scan", against=FORCED, flags=("--pattern", "S><v^><")),
    Row("padding tokens", against=FORCED, flags=("--padding-tokens",)),
    Row("local enhancement", against=FORCED, flags=("--local-enhancement",)),
)
# fmt: on


# -- one row, one seed ---------------------------------------------------------------------------------------
def kd_job(flags):
    """Return the plan of stage kd with these flags of train.py; nothing is loaded or trained."""
    return train.plan(train.parse_arguments(["--stage", "kd", *flags]))[-1]


def train_row(row, folder, seed, study):
    """Run or continue a row's training into `folder`, by train.py's command line. Rows share their data."""
    args = study.args
    settings = kd_job([]).settings
    count = min(settings.pictures, args.steps * (args.batch_size or settings.batch_size))
    shared = os.path.join(study.folder, f"seed-{seed}")
    pictures = write_shards(os.path.join(shared, "pictures"), BASE, count, seed)
    flags = ["--out", folder, "--data", pictures, "--cache", os.path.join(shared, "features")]
    flags += [
        "--seed",
        str(seed),
        "--teacher",
        study.teacher_path,
        "--dtype",
        args.dtype,
        "--device",
        args.device,
    ]
    flags += ["--examples", "0", *row.flags]
    if args.batch_size:
        flags += ["--batch-size", str(args.batch_size)]
    forcing = 0
    if "--init" not in row.flags:
        forcing = max(1, args.steps // 4)
        train.run(train.parse_arguments(["--stage", "forcing", "--steps", str(forcing), *flags]))
    train.run(train.parse_arguments(["--stage", "kd", "--steps", str(args.steps - forcing), *flags]))


def measure(row, folder, seed, study):
    """Return a trained row's scores and errors; under "forcing" its errors after the first stage."""
    teacher = study.teacher
    vae = study.vae
    text_encoder = study.text_encoder
    records = heldout_records(study.args.records, seed)
    prompts = [record["prompt"] for record in records]
    models = []  # after each stage
    for stage in ("forcing", "kd"):
        if os.path.isdir(os.path.join(folder, stage)):
            models.append(t2md.load_denoiser(os.path.join(folder, stage), study.args.device))
    if row.name == "teacher":
        models = [teacher]
    errors = []
    for model in models:
        errors.append(relative_errors(model, teacher, vae, text_encoder, records[:96], BASE, seed))
    images = sample.generate_all(
        models[-1],
        vae,
        text_encoder,
        prompts,
        (BASE, BASE),
        seed,
        guidance=teacher.config.guidance,
        guidance_interval=teacher.config.guidance_interval,
    )
    return {**evaluate(images, records), **errors[-1], "forcing": errors[0]}


def result_of(row, seed, study):
    """Return a row's result with one seed; train and measure it unless that is done."""
    folder = os.path.join(study.folder, f"{files.slug(row.name)}-{seed}")
    path = os.path.join(folder, "result.json")
    if not os.path.exists(path):
        print(f"ablate: {row.name}, seed {seed}")
        if row.name != "teacher":
            train_row(row, folder, seed, study)
        result = measure(row, folder, seed, study)
        files.note_made_with(study.folder, study.budget)
        files.write_json(path, result)
    return files.read_json(path)


# -- the tables ----------------------------------------------------------------------------------------------
def means(runs, column):
    """Return a column of a row's results, one value a seed; of the mixers the mean over the blocks."""
    return np.array([np.mean(run[column]) for run in runs])


def cell(values, digits):
    """Return "mean ± standard deviation" of one value a seed."""
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return f"{values.mean():.{digits}f} ± {deviation:.{digits}f}"


def score_table(rows, results):
    """Return the lines of the first table, in Markdown: every row's scores and errors, beside the paper's."""
    lines = [f"| | {' | '.join(TAGS)} | overall | noise error | mixer error |", "|---" * 10 + "|"]
    for row in rows:
        cells = [cell(means(results[row.name], tag), 2) for tag in TAGS]
        cells.append(cell(means(results[row.name], "overall"), 2))
        if row.paper:
            digits = [2] * len(TAGS) + [3]  # as the paper prints them
            for n, value in enumerate(row.paper):
                cells[n] += f" ({value:.{digits[n]}f})"
        cells.append(cell(means(results[row.name], "noise"), 4))
        cells.append(cell(means(results[row.name], "mixers"), 3))
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return lines


def versus_table(rows, results):
    """Return the lines of the second table: in how many seeds a row is better than another one."""
    lines = [
        "| | against | overall higher | noise error lower | mixer error lower | paper |",
        "|---" * 6 + "|",
    ]
    papers = {row.name: row.paper for row in rows}
    for row in rows:
        if row.against is None:
            continue
        mine = results[row.name]
        other = results[row.against]
        higher = means(mine, "overall") > means(other, "overall")
        less_noise = means(mine, "noise") < means(other, "noise")
        less_mixers = means(mine, "mixers") < means(other, "mixers")
        cells = [f"{won.sum()} of {len(won)}" for won in (higher, less_noise, less_mixers)]
        paper = ""
        if row.paper:
            paper = "higher" if row.paper[-1] > papers[row.against][-1] else "lower"
        lines.append(f"| {row.name} | {row.against} | {' | '.join(cells)} | {paper} |")
    return lines


def tabulate(rows, results, args):
    """Return both tables.  results: {name of a row: its results, one a seed}."""
    budget = f"{args.steps} optimiser steps a row, {args.seeds} seeds, {args.records} held-out records a seed"
    lines = [f"{budget}; mean and standard deviation; in brackets the paper's", ""]
    lines += score_table(rows, results)
    lines += ["", "Row against row, in how many seeds:", ""]
    lines += versus_table(rows, results)
    return "\n".join(lines) + "\n"


# -- the command ---------------------------------------------------------------------------------------------
def open_study(args):
    """Find and load the teacher.  Raises ValueError if OUT has results of another budget."""
    flags = ["--out", args.out]
    if args.teacher:
        flags += ["--teacher", args.teacher]
    path = kd_job(flags).teacher
    budget = dict(steps=args.steps, records=args.records, dtype=args.dtype, batch_size=args.batch_size)
    budget["teacher"] = files.fingerprint(path)
    files.check_made_with(os.path.join(args.out, "ablate"), budget)
    teacher, vae, text_encoder = sample.load_networks(path, args.device)
    return Study(args, budget, path, teacher, vae, text_encoder)


def run(args):
    study = open_study(args)
    results = {}
    for number, row in enumerate(ROWS, 1):
        results[row.name] = []
        for seed in range(args.seed, args.seed + args.seeds):
            with files.lock(os.path.join(study.folder, f"seed-{seed}")):  # whose pictures the rows share
                results[row.name].append(result_of(row, seed, study))
        finished = ROWS[:number]
        text = tabulate(finished, results, args)
        table = {row.name: dict(paper=row.paper, runs=results[row.name]) for row in finished}
        files.write_json(os.path.join(study.folder, "table.json"), table)
        files.write_text(os.path.join(study.folder, "table.md"), text)
    print(text, end="")


def parse_arguments(argv=None):
    parser = command_parser("table1", __doc__)
    add = parser.add_argument
    add("--steps", type=int, default=600, help="optimiser steps a row, forcing included (default 600)")
    add("--seeds", type=int, default=3, help="how many each row is run with, from --seed on (default 3)")
    add("--records", type=int, default=552, help="how many held-out records a row is scored on (default 552)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of training, as train.py's")
    add("--batch-size", type=int, help="as train.py's")
    add("--teacher", help="as train.py's")
    return parser.parse_args(argv)


if __name__ == "__main__":
    files.as_command("claims.table1", run, parse_arguments(), "stopped; the same command goes on from there")
