"""What the commands must do: count right, run what is missing once, survive kill -9 and damaged files."""

import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import sys
import threading
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import t2md
import train
from claims import figures, scores, speed, table1
from data import files
from data.images import ImageData
from data.shapes import BACKGROUND, TAGS, draw_shapes, heldout_records
from test_t2md import HERE, chain, copy_parts

__all__ = ["chain"]  # a fixture, which pytest finds by its name here
SMEAR = Image.effect_noise((128, 128), 200).convert("RGB")


def run(module, *arguments):
    module.run(module.parse_arguments([str(argument) for argument in arguments]))


def test_scores_samples_counts_prints_and_writes(chain, tmp_path, monkeypatch, capsys):
    """By default with the checkpoint's guidance; the last row's first wrong pictures have a sheet."""
    sampled, kd, image = [], os.path.join(chain, "kd"), Image.new("RGB", (8, 8), BACKGROUND)

    def fake(model, vae, text_encoder, prompts, size, seed, guidance=None, upscale=1, **settings):
        sampled.append((*size, guidance, settings.get("guidance_interval"), upscale))
        return [image] * len(prompts)

    monkeypatch.setattr(sample, "generate_all", fake)
    command = ["--records", 6, "--out", tmp_path, "--model", kd, "--upscale", 2, "--size"]
    run(scores, *command, "64x32", 128, "--guidance", 1, 2, "--guidance-interval", 500)
    assert sampled == [(*s, guidance, 500, 2) for s in ((64, 32), (128, 128)) for guidance in (1, 2)]
    rows, printed = files.read_json(tmp_path / "eval.json"), capsys.readouterr().out
    assert [(row["size"], row["guidance"]) for row in rows] == [*itertools.product(("64x32", "128"), (1, 2))]
    assert all({*TAGS, "overall", "dirty"} < row.keys() for row in rows) and printed.count("\n") == 6
    assert Image.open(tmp_path / "eval.png").size == (6 * 128, 4 * 128)
    assert Image.open(tmp_path / "fails.png").size == (6 * 192, 192 + 36)
    run(scores, *command, 64)
    config = t2md.load_backbone(kd).config
    assert sampled[-1] == (64, 64, config.guidance, config.guidance_interval, 2)
    records, rng = heldout_records(12, 0), np.random.default_rng(0)
    images = [draw_shapes(record, 128, rng) for record in records[:6]]
    images += [Image.new("RGB", (128, 128), BACKGROUND)] * 3 + [SMEAR] * 3
    assert scores.evaluate(images, records) == dict.fromkeys([*TAGS, "overall"], 0.5) | dict(dirty=0.25)


def test_relative_errors_on_the_students_and_on_the_teachers_hidden_states():
    """The first block's input is the same either way; on the teacher's, no error reaches the next block."""
    teacher, *parts = sample.load(os.path.join(HERE, "assets", "teacher")).args
    student = t2md.student_of(teacher, "HSSSSSS")
    errors = scores.relative_errors(student, teacher, *parts, heldout_records(6, 0), 64, 0)
    assert errors["mixers"][0] == errors["forced"][0] > 0.1
    assert min(errors["mixers"][1:]) > 1e-3 and max(errors["forced"][1:]) < 1e-9


def test_table1_runs_every_row_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "generate", functools.partial(sample.generate, steps=2))
    rows = {row.name: row for row in table1.ROWS}
    beside = {"from scratch": "", "padding tokens": "padding.", "local enhancement": "enhance_"}
    for row in table1.ROWS:  # trains the mixers, and beside them what its name says
        args = train.parse_arguments(["--stage", "kd", "--init", "teacher", *row.flags.split()])
        job = train.resolve("kd", args)
        model = train.ready(train.start_model(job, args), job.stage, False)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        more = beside.get(row.name, "no")
        assert trained == {n for n in model.state_dict() if ".mixer." in n or n.startswith(more)}
    four_way = rows["four-way scan"]._replace(against="from scratch", paper=(0.12,) * 6 + (0.345,))
    monkeypatch.setattr(table1, "ROWS", [rows["teacher"], rows["from scratch"], four_way])
    monkeypatch.setattr(table1, "BASE", 64)
    command = ["--steps", 4, "--batch-size", 2, "--records", 6, "--out", tmp_path]
    for seeds in (["--seed", 1, "--seeds", 1], ["--seeds", 2]):  # one seed first, then both
        run(table1, *command, *seeds)
        assert capsys.readouterr().out.count("ablate: ") == 3
    logs = (tmp_path / "ablate").rglob("log.jsonl")
    steps = {"/".join(path.parts[-3:-1]): len(path.read_text().splitlines()) for path in logs}
    trained = {"from-scratch-{}/kd": 4, "four-way-scan-{}/forcing": 1, "four-way-scan-{}/kd": 3}
    assert steps == {path.format(seed): n for seed in range(2) for path, n in trained.items()}
    assert t2md.load_backbone(f"{tmp_path}/ablate/four-way-scan-1/kd").config.pattern == "S><v^><"
    run(table1, *command, "--seeds", 2)  # all done: the table again, and nothing else
    printed, table = capsys.readouterr().out, files.read_json(tmp_path / "ablate" / "table.json")
    assert printed.strip() == (tmp_path / "ablate" / "table.md").read_text().strip()
    teacher, scratch, forced = (table[name]["runs"] for name in table)
    assert teacher[0]["noise"] == 0 and teacher[0]["mixers"] == teacher[0]["forced"] == [0] * 7
    assert scratch[0]["noise"] > 0.1 and forced[0]["forcing"]["mixers"] != forced[0]["mixers"]
    assert printed.count("(0.12)") == 6 and printed.count("(0.345)") == printed.count("(0.301)") == 1
    wins = np.zeros(3, dtype=int)
    for a, b in zip(forced, scratch):
        wins += [a["overall"] > b["overall"], a["noise"] < b["noise"], sum(a["mixers"]) < sum(b["mixers"])]
    cells = " | ".join(f"{count} of 2" for count in wins)
    assert f"| four-way scan | from scratch | {cells} | higher |" in printed
    with pytest.raises(ValueError, match="steps 4, not 5"):
        run(table1, *command, "--seeds", 2, "--steps", 5)


def test_field_depth_and_curves(tmp_path):
    """1, 10 and 100 are evenly spaced on a logarithmic axis; a constant and a single point are drawn too."""
    errors = dict(mixers=[0.1, 0.2, 0.5], forced=[0.1, 0.1, 0.2])
    runs = dict(runs=[errors | dict(forcing=errors)] * 2)
    files.write_json(f"{tmp_path}/ablate/table.json", {"+ token mixer loss": runs, figures.FORCED: runs})
    run(figures, "--out", tmp_path, "--size", 64)
    for name in ("field.png", "depth.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / name)))) > 8
    mixer, x = t2md.MambaMixer(">", 48, d_state=8, head_dim=16), torch.randn(2, 6 * 10, 48)
    field = figures.receptive_field([mixer], x, (6, 10)).flatten()
    assert (field[3 * 10 + 5 + 1 :] == 0).all() and (field[: 3 * 10 + 5 + 1] > 0).all() and field.max() == 1
    with mock.patch.object(figures.ImageDraw.ImageDraw, "line") as line:
        figures.chart({"powers": ([0, 1, 2], [1.0, 10.0, 100.0])}, "", log=True)
    (x0, y0), (x1, y1), (x2, y2) = line.call_args.args[0]
    assert x1 - x0 == x2 - x1 > 0 and y1 - y0 == pytest.approx(y2 - y1) and y2 < y0
    for flat in (([0, 1], [1.0, 1.0]), ([7], [0.5])):
        figures.chart({"flat": flat}, "", log=True)
    folders = {f"{tmp_path}/{steps}": steps for steps in (500, 3, 0)}
    rest = dict(gradient=float("nan"), lr=0.1, skipped=False, seconds=0.1)
    for folder, steps in folders.items():
        lines = [dict(step=k, mse=1 / (k + 1), soft=0.0 if k % 2 else 2.0) | rest for k in range(steps)]
        log = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "ms'  # killed while it wrote
        files.write_text(f"{folder}/log.jsonl", log)
    run(figures, "--out", tmp_path, "--curves", *folders)
    sheet = np.asarray(Image.open(tmp_path / "curves.png"))
    assert sheet.shape == (480, 960, 3)  # mse and soft
    assert all(len(np.unique(half)) > 8 for half in np.split(sheet, 2, axis=1))
    with pytest.raises(ValueError, match="no step is logged yet"):
        figures.curves([*folders][2:], [])


def test_the_score_of_a_training_is_read_off_its_pictures(tmp_path):
    """Above the student's row is its teacher's; half of step 20's pictures are right, all of step 40's."""
    records, rng = heldout_records(6, 0), np.random.default_rng(0)
    right, blank = (
        [draw_shapes(record, 128, rng) for record in records],
        Image.new("RGB", (128, 128), "white"),
    )
    for step, row in ((20, right[:3] + [blank] * 3), (40, right)):
        files.write_png(f"{tmp_path}/step-{step:06}.png", files.contact_sheet([[blank] * 6, row], 128))
    files.write_json(f"{tmp_path}/made_with.json", dict(batch_size=32))
    seen, scores_seen = figures.scores_on_the_way(str(tmp_path), records)
    assert list(seen) == [640, 1280] and scores_seen == [0.5, 1.0]


def test_film(chain, tmp_path, monkeypatch):
    """The pictures on the way end, without guidance, in what is sampled; the film grows."""
    monkeypatch.setattr(sample, "generate", functools.partial(sample.generate, steps=2))
    folders = [os.path.join(chain, stage) for stage in ("teacher", "kd")]
    student = sample.load(folders[1]).args
    student[0].register_to_config(guidance=1.0)
    *_, predicted, result = figures.pictures_on_the_way(*student, "a photo of a star", 128, 0)
    assert np.abs(np.asarray(predicted, int) - np.asarray(result, int)).max() <= 1
    pictures = figures.pictures_on_the_way(*student, "a photo of a star", 256, 0)
    assert [picture.width for picture in pictures] == [128, 128, 256, 256]
    run(figures, "--models", *folders, "--out", tmp_path, "--film", "a photo of a star", "--size", 256)
    film = Image.open(tmp_path / "film.webp")
    assert film.size == (640, 356) and film.n_frames >= 2


def test_operations_and_the_bill_are_those_counted_by_hand(monkeypatch, capsys):
    """Of a block, in multiply-adds a token; of a model; of training; the bill in days of a GPU."""
    d, caption = 1152, 120
    for side, letter in ((64, "S"), (64, "H"), (128, "W")):
        tokens = (side // 2) ** 2
        one, two = (speed.operations(None, "t2md", p, 1, 8 * side, 8 * side) for p in ("S", "S" + letter))
        mixer = 4 * d**2 + 2 * tokens * d
        if letter != "S":  # projections; twice, in chunks of 64: C B^T, each head's product with it, state
            mixer = d * (4 * d + 2 * 256 + 36) + 2 * d**2 + 2 * (64 * 256 + 36 * 64 * (64 + 2 * 256))
        text = 2 * d**2 + 2 * d**2 * caption / tokens + 2 * d * caption
        assert (two - one) / 2 / tokens == pytest.approx(mixer + text + 8 * d**2, rel=0.01)
    model, _ = speed.make_models(None, "shapes", "SHWSH")
    with speed.FlopCounterMode(display=False) as counter, torch.no_grad():
        t2md.predict_noise(model, *speed.random_batch(model, 2, 128, 128))
    assert speed.operations(None, "shapes", "SHWSH", 2, 128, 128) == counter.get_total_flops() > 1e8
    stages = None, "forcing", "kd", "adapt"
    forward, forcing, kd, adapt = (speed.operations(s, "t2md", "SH", 1, 512, 512) for s in stages)
    assert adapt == pytest.approx(4 * forward, rel=0.05)  # activations are computed anew, where it learns
    assert 0.8 * forward < forcing < 2.8 * forward < 3.5 * forward < kd < adapt + forward
    seen = speed.images_seen(speed.stage_settings("hires1", "t2md"))
    assert seen[2] / sum(seen.values()) == pytest.approx(0.8, abs=1e-3)
    assert seen[2] / 64 + seen[1] / 256 == pytest.approx(40_000, abs=1)
    monkeypatch.setattr(speed, "operations", lambda *_: 1e12)
    speed.print_bill(speed.parse_arguments(["bill", "--utilisation", "0.5"]))
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert set(speed.PAPER_STAGES) < set(rows) and rows["hires2"][1:4] == ["2048", "20,000", "320,000"]
    assert float(rows["kd"][5]) == pytest.approx(46_080_000e12 / (86400 * 989e12 * 0.5), abs=0.05)


@pytest.mark.parametrize("command, words", [
    ("model --config shapes --blocks 3 --sizes 32 32x48", ["SSS", "SHW", "32x48", "ratio"]),
    ("scan --sizes 128", ["ssd, chunks of 64", "attention", "us / token"]),
    ("step forcing --config shapes --batch-size 2", ["2 images of 128 px", "TFLOP are"]),
    ("step kd --config shapes --dtype bfloat16 --blocks 2", ["1 images of 128 px", "TFLOP are"]),
])  # fmt: skip
def test_commands_of_speed(command, words, capsys):
    args = speed.parse_arguments([*command.split(), "--repeats", "1", "--device", "cpu"])
    speed.COMMANDS[args.command](args)
    printed = capsys.readouterr().out
    assert all(word in printed for word in [*words, "torch 2."])


@pytest.mark.parametrize("page", ["README.md", "claims/README.md"])
def test_every_command_on_the_page_is_one(page):
    parsers = {f"-m {module.__name__}": module for module in (scores, table1, figures, speed)}
    parsers |= {"train.py": train, "sample.py": sample}
    text = open(os.path.join(HERE, page)).read().replace("\\\n", " ")
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.S | re.M))
    pattern = r"^[^#$\n]*python (train\.py|sample\.py|-m claims\.\w+)([^;&|#$\n]*)(?:#.*)?$"
    commands = re.findall(pattern, blocks, flags=re.M)
    assert len(commands) > 4
    for program, arguments in commands:
        if arguments.count('"') % 2:  # the end of what is put into a variable
            arguments = arguments.rstrip('"')
        parsers[program].parse_arguments(shlex.split(arguments))


@pytest.mark.parametrize("command", ["scores --prompts no", "figures --curves no", "speed scan --sizes 0"])
def test_one_sentence_for_what_cannot_be_done(monkeypatch, command):
    module, *arguments = command.split()
    monkeypatch.setattr("sys.argv", ["", *arguments])
    with pytest.raises(SystemExit, match=rf"^claims.{module}: \w+: [^\n]+; --debug shows where$"):
        runpy.run_path(os.path.join(HERE, "claims", f"{module}.py"), run_name="__main__")


def train_forcing(out, teacher, dies_after=None, dies_saving=False):
    """What a process does until it is killed: after some seconds, or at its second checkpoint, half saved."""
    os.setpgid(0, 0)
    saves, save, sys.stdout, sys.stderr = itertools.count(1), torch.save, *[open(os.devnull, "w")] * 2
    if dies_saving:
        torch.save = lambda *args: save(*args) if next(saves) < 2 else os.killpg(0, signal.SIGKILL)
    if dies_after:
        threading.Timer(dies_after, os.killpg, (0, signal.SIGKILL)).start()
    flags = "--stage forcing --steps 6 --batch-size 2 --save-every 2 --examples 0 --device cpu"
    train.run(train.parse_arguments([*flags.split(), "--out", str(out), "--teacher", teacher]))


def left_behind(folder):
    """All that a training leaves: its state's values, log without seconds, model."""
    leaves = torch.utils._pytree.tree_leaves(train.read_state(str(folder)))
    log = [json.loads(line) | dict(seconds=None) for line in (folder / "log.jsonl").open()]
    models = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
    return [v.numpy().tobytes() if torch.is_tensor(v) else v for v in leaves], log, models


def test_kills_lose_nothing(chain, tmp_path):
    """kill -9, once in the middle of a save and twice at random: bit for bit as without."""
    context, rng, codes = multiprocessing.get_context("forkserver"), random.Random(0), []
    context.set_forkserver_preload([__name__])  # what is killed is its work, not Python's imports
    at_random = [("killed", rng.uniform(0.2, 3)) for _ in range(2)]
    for out, *dies in (("whole",), ("killed", None, True), *at_random, ("killed",)):
        process = context.Process(target=train_forcing, args=(tmp_path / out, f"{chain}/teacher", *dies))
        process.start()
        process.join()
        codes.append(process.exitcode)
    assert codes == [0, *[-signal.SIGKILL] * 3, 0]
    whole, killed = (left_behind(tmp_path / out / "forcing") for out in ("whole", "killed"))
    assert whole == killed and len(whole[1]) == 6


def test_damaged_files_give_a_sentence(chain, tmp_path, capsys):
    """Each is read as if whole, or refused in one line; a training that goes on ends as with the whole."""
    out, rng, results = shutil.copytree(chain, tmp_path / "out"), random.Random(0), []
    files.write_png(f"{out}/images/0.png", SMEAR)
    for name in ("prompts", "images/metadata"):
        (out / f"{name}.jsonl").write_text('{"file_name": "0.png", "text": "a star", "prompt": "a star"}')
    shutil.copyfile(next(out.glob("pictures/*/*.tar")), out / "images.tar")
    encoders = t2md.VAE(f"{chain}/vae"), t2md.TextEncoder(f"{chain}/text_encoder")

    def go_on():
        shutil.rmtree(out / "begun", ignore_errors=True)
        copy_parts(out, out / "begun", "kd forcing vae text_encoder")
        flags = f"--stage kd --steps 3 --batch-size 2 --examples 0 --out {out}/begun --teacher {out}/teacher"
        train.run(train.parse_arguments(flags.split()))
        results.append(left_behind(out / "begun" / "kd"))

    def look(source):
        ImageData(f"{out}/{source}", 64, None, None, 0, f"{out}/index").picture(0)

    def encode():
        data = ImageData(f"{out}/images", 64, *encoders, 0, f"{out}/index", f"{out}/cache")
        data.batch([0], [files.generator(0, "kd", 0, 0)])

    readers = {"prompts.jsonl": lambda: sample.read_prompts(f"{out}/prompts.jsonl")}
    readers |= dict.fromkeys(["kd/training_state.pt", "kd/made_with.json"], go_on)
    readers |= dict.fromkeys(["kd/config.json", "kd/*.safetensors"], lambda: sample.load(f"{out}/kd"))
    readers |= {"images/metadata.jsonl": lambda: look("images"), "images.tar": lambda: look("images.tar")}
    readers |= dict.fromkeys(["cache/captions*", "cache/64px*", "cache/made_with.json"], encode)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for name, read in readers.items():
        read()
        (path,) = out.glob(name)
        content = path.read_bytes()
        a, b = sorted(rng.randrange(len(content)) for _ in range(2))
        changed = [content[:k] + bytes([content[k] ^ 64]) + content[k + 1 :] for k in (a, a // 50)]
        without = [content[:a], content[:a] + bytes(b - a) + content[b:]]  # its end; zeros for its middle
        for damaged in (*changed, *without, content[:b] + content[a:]):
            path.write_bytes(damaged)
            signal.alarm(60)  # what takes longer hangs
            try:
                files.as_command("claims", lambda _, read=read: read(), scores.parse_arguments([]))
            except SystemExit as end:
                assert re.fullmatch(r"claims: \w+: [^\n]+; --debug shows where", end.code), name
            signal.alarm(0)
            path.write_bytes(content)
    assert all(result == results[0] for result in results)
