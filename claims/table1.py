"""The paper's Table 1 in miniature: every row trained for as many steps, with several seeds.

    python -m claims.table1                        # three seeds, 600 steps a row
    python -m claims.table1 --seed 1 --seeds 1     # one of them: several processes can share the work

A row is train.py with other flags, sampled with the teacher's guidance. Prints and writes OUT/ablate/table.md
and table.json: mean and standard deviation over seeds, and row against row. What is done is not run again;
rows of another budget are refused.
"""

import os
import typing

import numpy as np

import sample
import train
from claims.scores import command_parser, evaluate, relative_errors
from data import files
from data.shapes import TAGS, heldout_records, write_shards


class Row(typing.NamedTuple):
    name: str
    against: str | None = None  # the row to compare it with
    paper: tuple = ()  # what the paper has, GenEval at full scale: of each of TAGS, then overall
    flags: str = ""  # for train.py; a row without --init spends a quarter of its steps on forcing


BASE = 128  # pixels: the shapes world's base size
COPIED, FORCED = "+ non-Mamba weights from the teacher", "+ teacher forcing: T2MD"
# fmt: off
ROWS = (
    Row("teacher", None, (.97, .47, .48, .81, .08, .08, .481)),
    Row("from scratch", None, (.08, .18, .18, .60, .02, .04, .301),  # .08 is a misprint: .80 fits the overall
        "--init scratch --soft-weight 0 --mixer-weight 0"),
    Row(COPIED, "from scratch", (.94, .37, .27, .71, .05, .06, .397),
        "--init teacher --soft-weight 0 --mixer-weight 0"),
    Row("+ soft loss", COPIED, (.98, .41, .42, .79, .05, .08, .452), "--init teacher --mixer-weight 0"),
    Row("+ token mixer loss", "+ soft loss", (.96, .40, .47, .81, .07, .08, .462), "--init teacher"),
    Row(FORCED, "+ token mixer loss", (.96, .49, .44, .79, .10, .14, .485)),
    Row("attention-to-Mamba initialisation", FORCED, (.95, .36, .40, .77, .06, .06, .433), "--init llama"),
    Row("one direction", FORCED, (.96, .39, .44, .77, .06, .07, .448), "--pattern Sv>v>v>"),
    Row("no self-attention", FORCED, (.96, .31, .38, .77, .05, .05, .420), "--pattern HWHWHWH"),
    Row("four-way scan", FORCED, flags="--pattern S><v^><"),
    Row("padding tokens", FORCED, flags="--padding-tokens"),
    Row("local enhancement", FORCED, flags="--local-enhancement"),
)
# fmt: on
DIGITS = dict.fromkeys((*TAGS, "overall"), 2) | dict(noise=4, mixers=3)  # of the columns


def train_row(row, folder, seed, args, teacher_path):
    """Run or continue a row's training into `folder`, by train.py's command line."""
    shared = os.path.join(args.out, "ablate", f"seed-{seed}")
    settings = train.settings("kd", train.parse_arguments(["--stage", "kd"]))
    count = min(settings["pictures"], args.steps * (args.batch_size or settings["batch_size"]))
    pictures = write_shards(os.path.join(shared, "pictures"), BASE, count, seed)
    command = ["--out", folder, "--data", pictures, "--cache", f"{shared}/features", "--seed", str(seed)]
    command += ["--teacher", teacher_path, "--dtype", args.dtype, "--device", args.device, "--examples", "0"]
    command += row.flags.split()
    command += ["--batch-size", str(args.batch_size)] if args.batch_size else []
    forcing = 0 if "--init" in row.flags else max(1, args.steps // 4)
    for stage, steps in (("forcing", forcing), ("kd", args.steps - forcing)):
        if steps:
            train.run(train.parse_arguments(["--stage", stage, "--steps", str(steps), *command]))


def measure(row, seed, args, teacher_path, teacher, parts):
    """Train and measure a row with one seed, unless that is done -> its scores and errors; `forcing`: the
    errors after its first stage."""
    folder = os.path.join(args.out, "ablate", f"{files.slug(row.name)}-{seed}")
    path, records = os.path.join(folder, "result.json"), heldout_records(args.records, seed)
    if not os.path.exists(path):
        print(f"ablate: {row.name}, seed {seed}")
        if row.name != "teacher":
            train_row(row, folder, seed, args, teacher_path)
        stages = [stage for stage in ("forcing", "kd") if os.path.isdir(os.path.join(folder, stage))]
        models = [sample.load_denoiser(f"{folder}/{stage}", args.device) for stage in stages]
        models = models or [teacher]
        errors = [relative_errors(model, teacher, *parts, records[:96], BASE, seed) for model in models]
        settings = {name: teacher.config[name] for name in ("guidance", "guidance_interval")}
        prompts = [record["prompt"] for record in records]
        images = sample.generate_all(models[-1], *parts, prompts, (BASE, BASE), seed, **settings)
        files.write_json(path, evaluate(images, records) | dict(forcing=errors[0]) | errors[-1])
    return files.read_json(path)


def tabulate(results, args):
    """{Row: its runs, one a seed} -> two tables in Markdown: the rows, then row against row."""
    means, papers = {}, {row.name: row.paper for row in results}
    budget = f"{args.steps} optimiser steps a row, {args.seeds} seeds, {args.records} held-out records a seed"
    lines = [f"{budget}; mean and standard deviation; in brackets the paper's", ""]
    lines += [f"| | {' | '.join(TAGS)} | overall | noise error | mixer error |", "|---" * 10 + "|"]
    versus = ["", "Row against row, in how many seeds:", ""]
    versus += ["| | against | overall higher | noise error lower | mixer error lower | paper |"]
    versus += ["|---" * 6 + "|"]
    for row, runs in results.items():
        a = means[row.name] = {key: np.array([np.mean(run[key]) for run in runs]) for key in DIGITS}
        ddof = len(runs) > 1
        cells = [f"{a[key].mean():.{n}f} ± {a[key].std(ddof=ddof):.{n}f}" for key, n in DIGITS.items()]
        for n, value in enumerate(row.paper):
            cells[n] += f" ({value:.{2 + (n == len(TAGS))}f})"
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
        if row.against:
            b = means[row.against]
            wins = a["overall"] > b["overall"], a["noise"] < b["noise"], a["mixers"] < b["mixers"]
            cells = [f"{won.sum()} of {len(won)}" for won in wins]
            order = ("higher" if row.paper[-1] > papers[row.against][-1] else "lower") if row.paper else ""
            versus.append(f"| {row.name} | {row.against} | {' | '.join(cells)} | {order} |")
    return "\n".join(lines + versus) + "\n"


def run(args):
    folder, flags = os.path.join(args.out, "ablate"), ["--teacher", args.teacher] if args.teacher else []
    teacher_path = train.find_teacher(train.parse_arguments(["--stage", "kd", "--out", args.out, *flags]))
    budget = {key: getattr(args, key) for key in ("steps", "records", "dtype", "batch_size")}
    files.claim(folder, budget | dict(teacher=files.fingerprint(teacher_path)))
    (teacher, *parts), results = sample.load(teacher_path, args.device).args, {}
    for row in ROWS:
        results[row] = []
        for seed in range(args.seed, args.seed + args.seeds):
            with files.lock(os.path.join(folder, f"seed-{seed}")):  # whose features the rows share
                results[row].append(measure(row, seed, args, teacher_path, teacher, parts))
        text = tabulate(results, args)  # of what is measured so far
        runs = {row.name: dict(paper=row.paper, runs=runs) for row, runs in results.items()}
        files.write_json(os.path.join(folder, "table.json"), runs)
        files.write_text(os.path.join(folder, "table.md"), text)
    print(text, end="")


def parse_arguments(argv=None):
    parser, add = command_parser("table1", __doc__)
    add("--steps", type=int, default=600, help="optimiser steps a row, forcing included (default 600)")
    add("--seeds", type=int, default=3, help="how many each row is run with, from --seed on (default 3)")
    add("--records", type=int, default=552, help="how many held-out records a row is scored on (default 552)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of training, as train.py's")
    add("--batch-size", type=int, help="as train.py's")
    add("--teacher", help="as train.py's")
    return parser.parse_args(argv)


if __name__ == "__main__":
    files.as_command("claims.table1", run, parse_arguments(), "stopped; the same command goes on from there")
