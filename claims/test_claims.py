"""These tests protect the claims: their commands count right, name what they show, and repeat nothing done.

They also protect what a user has made: a training survives kill -9, damaged files get a sentence.
"""

import dataclasses
import functools
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import sys
import threading
import time
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import t2md
import train
from claims import figures, scores, speed, table1
from data import checkpoints, files, index
from data import images as data_images
from data.images import ImageData
from data.prompts import read_prompts
from data.shapes import BACKGROUND, TAGS, draw_shapes, heldout_records
from test_t2md import HERE, chain, copy_parts

__all__ = ["chain"]  # a fixture, which pytest finds by its name here
SMEAR = Image.effect_noise((128, 128), 200).convert("RGB")
ASSETS = os.path.join(HERE, "assets")
BELOW = files.contact_sheet([[SMEAR]], 64, [["a prompt"]]).height - 64  # pixels of a sheet's text


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch, tmp_path_factory):
    """What a command writes beside --out, such as indexes, goes into no folder of the project's."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture(autouse=True, scope="module")
def forkserver():
    """Imports what a process needs beside the tests of this file, so that those that are killed need not."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, PYTHONPATH=HERE):  # an older Python does not tell it where modules are
        multiprocessing.forkserver.ensure_running()
    return context


def run(module, *arguments):
    module.run(module.parse_arguments([str(argument) for argument in arguments]))


# -- scores --------------------------------------------------------------------------------------------------


def test_scores_are_shares_of_right_pictures():
    """Half of each kind is right; a quarter of the pictures is dirty; only clean objects have outlines."""
    records = heldout_records(12, 0)
    rng = np.random.default_rng(0)
    blank = Image.new("RGB", (128, 128), BACKGROUND)
    pictures = [draw_shapes(record, 128, rng) for record in records[:6]] + [blank] * 3 + [SMEAR] * 3
    found = scores.evaluate(pictures, records)
    assert [found[tag] for tag in TAGS] == [0.5] * 6
    assert found["overall"] == 0.5 and found["dirty"] == 0.25
    assert 0.95 < found["outline"] < 1
    assert scores.evaluate([blank] * 12, records)["outline"] is None
    with pytest.raises(ValueError):
        scores.evaluate(pictures[:11], records)


def test_the_overall_score_is_the_mean_of_the_kinds_that_occur():
    records = heldout_records(3, 0)  # single_object, two_object, counting
    pictures = [draw_shapes(record, 128, np.random.default_rng(0)) for record in records]
    found = scores.evaluate([pictures[0], SMEAR, pictures[2], pictures[0]], [*records, records[0]])
    assert set(found) == {"single_object", "two_object", "counting", "overall", "dirty", "outline"}
    assert found["overall"] == pytest.approx(2 / 3)


def test_scores_samples_every_combination_and_writes_tables_and_sheets(chain, tmp_path, monkeypatch, capsys):
    """By default with the checkpoint's guidance; the last row's first wrong pictures have a sheet."""
    sampled = []
    others = []
    kd = os.path.join(chain, "kd")
    blank = Image.new("RGB", (8, 8), BACKGROUND)

    def fake(model, vae, text_encoder, prompts, size, seed, **given):
        sampled.append((size, given["guidance"], given["guidance_interval"], given["upscale"]))
        others.append((seed, given["direct"], given["renoise"], given["timestep_shift"]))
        return [blank] * len(prompts)

    monkeypatch.setattr(sample, "generate_all", fake)
    command = ["--records", 6, "--out", tmp_path, "--model", kd, "--upscale", 2, "--size"]
    run(scores, *command, "64x32", 128, "--guidance", 1, 2, "--guidance-interval", 500)
    sizes = [(64, 32), (128, 128)]
    assert sampled == [(size, guidance, 500, 2) for size in sizes for guidance in (1, 2)]
    rows = files.read_json(tmp_path / "eval.json")
    assert [(row["size"], row["guidance"]) for row in rows] == [*itertools.product(("64x32", "128"), (1, 2))]
    assert all({*TAGS, "overall", "dirty", "outline"} < row.keys() for row in rows)
    assert capsys.readouterr().out.count("\n") == 6
    assert Image.open(tmp_path / "eval.png").size == (6 * 128, 4 * (18 + 128 + BELOW))
    assert Image.open(tmp_path / "fails.png").size == (6 * 192, 192 + BELOW)
    run(scores, *command, 64)
    config = t2md.load_backbone(kd).config
    assert sampled[-1] == ((64, 64), config.guidance, config.guidance_interval, 2)
    assert others[-1] == (0, False, config.renoise, config.timestep_shift)
    hires2 = os.path.join(chain, "hires2")
    flags = "--seed 3 --direct --renoise 77 --timestep-shift 2".split()
    run(scores, *command[:4], "--model", hires2, *flags)
    assert sampled[-1][0] == (512, 512) and others[-1] == (3, True, 77, 2)
    made = dict(seed=3, records=6, direct=True, renoise=77, timestep_shift=2, upscale=1, steps=20)
    assert made.items() <= files.read_json(tmp_path / "eval.json")[0].items()


def test_a_sheet_has_the_rows_names_and_the_prompts_on_it():
    """A row: its name, the pictures, their prompts. Another name or prompt is another sheet."""
    red = Image.new("RGB", (32, 32), "red")
    blue = Image.new("RGB", (64, 64), "blue")
    sheet = np.asarray(scores.labelled_sheet([("first", [red] * 2), ("second", [blue])], ["a", "b"], 64))
    second = 18 + 64 + BELOW  # where the second row begins
    assert sheet.shape == (2 * second, 128, 3)
    assert (sheet[18:82] == (255, 0, 0)).all()
    assert (sheet[second + 18 : second + 82, :64] == (0, 0, 255)).all()
    for top in (0, second):
        assert sheet[top : top + 18].min() < 100  # the name
        assert sheet[top + 82 : top + second].min() < 100  # the prompts
    other = np.asarray(scores.labelled_sheet([("first", [red] * 2), ("third", [blue])], ["a", "c"], 64))
    assert (sheet[:82] == other[:82]).all()
    assert (sheet[82:second, 64:] != other[82:second, 64:]).any()
    assert (sheet[second : second + 18] != other[second : second + 18]).any()


def test_relative_errors_on_the_students_and_on_the_teachers_hidden_states():
    """The first block's input is the same either way; on the teacher's, no error reaches the next block."""
    teacher, vae, text_encoder = sample.load_networks(os.path.join(ASSETS, "teacher"))
    student = t2md.student_of(teacher, "HSSSSSS")
    errors = scores.relative_errors(student, teacher, vae, text_encoder, heldout_records(18, 0), 64, 0)
    assert errors["mixers"][0] == errors["forced"][0] > 0.1
    assert min(errors["mixers"][1:]) > 1e-3 and max(errors["forced"][1:]) < 1e-9
    same = scores.relative_errors(teacher, teacher, vae, text_encoder, heldout_records(2, 0), 64, 0)
    assert same == dict(noise=0.0, mixers=[0.0] * 7, forced=[0.0] * 7)
    with torch.no_grad():
        for parameter in student.proj_out.parameters():
            parameter.zero_()
    errors = scores.relative_errors(student, teacher, vae, text_encoder, heldout_records(2, 0), 64, 0)
    assert errors["noise"] == pytest.approx(1.0)  # of the teacher's own square


# -- table 1 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", table1.ROWS, ids=lambda row: files.slug(row.name))
def test_a_row_of_table1_trains_what_its_name_says(row, tmp_path):
    """The mixers, and beside them all of a student from scratch, or DiM's additions."""
    beside = {"from scratch": "", "padding tokens": "padding.", "local enhancement": "enhance_"}
    job = table1.kd_job(["--out", str(tmp_path), "--init", "teacher", *row.flags])
    model = train.build(job).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    more = beside.get(row.name, "nothing else")
    names = [name for name, _ in model.named_parameters()]
    assert trained == {name for name in names if ".mixer." in name or name.startswith(more)}
    off = {"from scratch": (0, 0), table1.COPIED: (0, 0), "+ soft loss": (0.5, 0)}
    assert (job.soft_weight, job.mixer_weight) == off.get(row.name, (0.5, 0.2))
    assert model.proj_out.weight.any() == (row.name != "from scratch")  # zero in a new model


def test_the_rows_of_table1_are_the_papers():
    """How each begins, which mixers it has, what it is compared with; and the paper's overall scores."""
    begins = {"from scratch": "scratch", "attention-to-Mamba initialisation": "llama"}
    begins.update({table1.COPIED: "teacher", "+ soft loss": "teacher", table1.MIXER_LOSS: "teacher"})
    patterns = {"one direction": "Sv>v>v>", "no self-attention": "HWHWHWH", "four-way scan": "S><v^><"}
    overall = [0.481, 0.301, 0.397, 0.452, 0.462, 0.485, 0.433, 0.448, 0.420]
    assert [row.paper[-1] for row in table1.ROWS if row.paper] == overall
    before = None
    for row in table1.ROWS[1:]:
        job = table1.kd_job(row.flags)
        assert job.init == begins.get(row.name, "forcing")
        assert job.pattern == patterns.get(row.name, "SHWHWHW")
        on_the_ladder = row.name in (table1.COPIED, "+ soft loss", table1.MIXER_LOSS, table1.FORCED)
        assert row.against == (before if on_the_ladder or before is None else table1.FORCED)
        before = row.name


@pytest.fixture
def small_table(tmp_path, monkeypatch):
    """Three rows at 64 px, two steps a picture -> the command that runs them."""
    monkeypatch.setattr(sample, "generate", functools.partial(sample.generate, steps=2))
    rows = {row.name: row for row in table1.ROWS}
    paper = (0.12,) * 6 + (0.345,)
    four_way = dataclasses.replace(rows["four-way scan"], against="from scratch", paper=paper)
    monkeypatch.setattr(table1, "ROWS", (rows["teacher"], rows["from scratch"], four_way))
    monkeypatch.setattr(table1, "BASE", 64)
    return ["--steps", 4, "--batch-size", 2, "--records", 6, "--out", tmp_path]


def test_table1_runs_every_row_once(tmp_path, small_table, monkeypatch, capsys):
    drawn = []
    generate_all = sample.generate_all

    def noted(model, *rest, **given):
        drawn.append(model)
        return generate_all(model, *rest, **given)

    monkeypatch.setattr(sample, "generate_all", noted)
    for seeds in (["--seeds", 1], ["--seeds", 2]):  # one seed first, then both
        run(table1, *small_table, *seeds)
        assert capsys.readouterr().out.count("ablate: ") == 3
    steps = {}
    for path in (tmp_path / "ablate").rglob("log.jsonl"):
        steps["/".join(path.parts[-3:-1])] = len(path.read_text().splitlines())
    expected = {}
    for seed in (0, 1):
        expected[f"from-scratch-{seed}/kd"] = 4
        expected[f"four-way-scan-{seed}/forcing"] = 1
        expected[f"four-way-scan-{seed}/kd"] = 3
    assert steps == expected
    assert t2md.load_backbone(f"{tmp_path}/ablate/four-way-scan-1/kd").config.pattern == "S><v^><"
    run(table1, *small_table, "--seeds", 2)  # all is done: the table again, and nothing else
    printed = capsys.readouterr().out
    table = files.read_json(tmp_path / "ablate" / "table.json")
    assert printed.strip() == (tmp_path / "ablate" / "table.md").read_text().strip()
    teacher, scratch, forced = (table[name]["runs"] for name in table)
    assert teacher[0]["noise"] == 0 and teacher[0]["mixers"] == teacher[0]["forced"] == [0] * 7
    assert scratch[0]["noise"] > 0.1 and forced[0]["forcing"]["mixers"] != forced[0]["mixers"]
    # What is scored is the model after kd, and the seed is the row's own.
    kd = t2md.load_denoiser(f"{tmp_path}/ablate/four-way-scan-1/kd")
    assert all(torch.equal(a, b) for a, b in zip(drawn[-1].parameters(), kd.parameters(), strict=True))
    networks = sample.load_networks(os.path.join(ASSETS, "teacher"))
    again = scores.relative_errors(kd, *networks, heldout_records(6, 1), 64, 1)
    assert forced[1]["noise"] == pytest.approx(again["noise"])
    assert files.read_json(f"{tmp_path}/ablate/four-way-scan-1/kd/made_with.json")["seed"] == 1
    assert heldout_records(6, 0) != heldout_records(6, 1)
    budget = dict(steps=(4, 5), records=(6, 7), dtype=("float32", "bfloat16"), batch_size=(2, 3))
    for name, (before, other) in budget.items():
        with pytest.raises(ValueError, match=f"made with {name} {before}, not {other};"):
            run(table1, *small_table, "--seeds", 2, f"--{name.replace('_', '-')}", other)


def test_a_table_that_never_began_refuses_no_other_budget(tmp_path, small_table, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(table1, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            run(table1, *small_table, "--steps", 999)
    table1.open_study(table1.parse_arguments([str(argument) for argument in small_table]))


def test_the_tables_of_table1_say_what_was_measured():
    """Means, deviations over seeds, the paper's beside them; and in how many seeds a row beats another."""
    low = dict.fromkeys(TAGS, 0.2) | dict(counting=0.25, overall=0.2, noise=0.5, mixers=[0.1, 0.2])
    high = dict.fromkeys(TAGS, 0.4) | dict(counting=0.45, overall=0.4, noise=0.25, mixers=[0.1, 0.3])
    rows = [
        table1.Row("one", paper=(0.12,) * 6 + (0.345,)),
        table1.Row("two", against="one", paper=(0.11,) * 6 + (0.2,)),
        table1.Row("three", against="two"),
    ]
    results = {"one": [low, low], "two": [low, high], "three": [high, high]}
    args = table1.parse_arguments(["--seeds", "2"])
    lines = table1.tabulate(rows, results, args).splitlines()
    one = ["0.20 ± 0.00 (0.12)"] * 6 + ["0.20 ± 0.00 (0.345)", "0.5000 ± 0.0000", "0.150 ± 0.000"]
    one[TAGS.index("counting")] = "0.25 ± 0.00 (0.12)"
    assert f"| one | {' | '.join(one)} |" in lines
    assert any(line.startswith("| two | 0.30 ± 0.14 (0.11) |") and "0.175 ± 0.035" in line for line in lines)
    assert "| two | one | 1 of 2 | 1 of 2 | 0 of 2 | lower |" in lines
    assert "| three | two | 1 of 2 | 1 of 2 | 0 of 2 |  |" in lines


# -- figures -------------------------------------------------------------------------------------------------


def test_field_and_depth(tmp_path):
    alone = dict(mixers=[0.1, 0.2, 0.5], forced=[0.1, 0.1, 0.2])
    forced = dict(mixers=[0.3, 0.3, 0.3], forced=[0.0, 0.0, 0.0], forcing=alone)
    without = dict(mixers=[0.4, 0.4, 0.6], forced=[0.0, 0.0, 0.0], forcing=alone)
    table = {figures.MIXER_LOSS: dict(runs=[without] * 2), figures.FORCED: dict(runs=[forced] * 2)}
    files.write_json(f"{tmp_path}/ablate/table.json", table)
    run(figures, "--out", tmp_path, "--size", 64)
    for name in ("field.png", "depth.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / name)))) > 8
    (axis,) = figures.depth_chart(table).axes
    drawn = [without["mixers"], forced["mixers"], alone["mixers"], alone["forced"]]
    assert [list(line.get_ydata()) for line in axis.lines] == drawn


def test_a_mixers_receptive_field_is_what_it_has_read():
    """A mixer that reads rows forwards sees nothing behind the middle token."""
    mixer = t2md.MambaMixer(">", 48, d_state=8, head_dim=16)
    field = figures.receptive_field([mixer], torch.randn(2, 6 * 10, 48), (6, 10))
    assert field.shape == (6, 10)
    middle = 3 * 10 + 5
    field = field.flatten()
    assert (field[middle + 1 :] == 0).all() and (field[: middle + 1] > 0).all() and field.max() == 1


def write_log(folder, steps):
    """A log of which a kill has left the last line half written."""
    lines = []
    for k in range(steps):
        terms = dict(step=k, mse=1 / (k + 1), soft=0.0 if k % 2 else 2.0, gradient=float("nan"))
        lines.append(json.dumps(terms | dict(lr=0.1, skipped=False, seconds=0.1, waited=0.0)))
    files.write_text(f"{folder}/log.jsonl", "\n".join([*lines, '{"step": 3, "ms']))


def test_curves_are_the_logged_losses(tmp_path):
    """A panel for each term, a line for each training; values that no logarithm has are left out."""
    folders = [f"{tmp_path}/{steps}" for steps in (500, 3, 0)]
    for folder in folders:
        write_log(folder, int(os.path.basename(folder)))
    run(figures, "--out", tmp_path, "--curves", *folders)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "curves.png")))) > 8
    mse, soft = figures.curves(folders, []).axes
    assert [axis.get_title() for axis in (mse, soft)] == ["mse", "soft"] and mse.get_yscale() == "log"
    long, short = mse.lines
    assert list(short.get_xdata()) == [0, 1, 2] and list(short.get_ydata()) == [1, 1 / 2, 1 / 3]
    ten = np.mean([1 / (k + 1) for k in range(10)])  # a fiftieth of 500 steps
    assert long.get_xdata()[0] == pytest.approx(4.5) and long.get_ydata()[0] == pytest.approx(ten)
    assert list(soft.lines[1].get_xdata()) == [0, 2]
    with pytest.raises(ValueError, match="no step is logged yet"):
        figures.curves(folders[2:], [])


def test_the_score_of_a_training_is_read_off_its_pictures(tmp_path):
    """Above the student's row is its teacher's; half of step 20's pictures are right, all of step 40's."""
    records = heldout_records(6, 0)
    rng = np.random.default_rng(0)
    right = [draw_shapes(record, 128, rng) for record in records]
    blank = Image.new("RGB", (128, 128), "white")
    for step, row in ((20, right[:3] + [blank] * 3), (40, right)):
        sheet = files.contact_sheet([[blank] * 6, row], 128)
        files.write_png(f"{tmp_path}/step-{step:06}.png", sheet, side=128)
    for shown in (records, heldout_records(12, 0)):  # a training draws the first ones of its prompts
        steps, overall = figures.scores_on_the_way(str(tmp_path), shown)
        assert steps == [20, 40] and overall == [0.5, 1.0]
    write_log(tmp_path, 3)
    score = figures.curves([str(tmp_path)], records).axes[-1]
    assert score.get_title() == "score" and list(score.lines[0].get_ydata()) == [0.5, 1.0]


def test_film(chain, tmp_path, monkeypatch):
    """The pictures on the way end, without guidance, in what is sampled; the film grows."""
    monkeypatch.setattr(sample, "generate", functools.partial(sample.generate, steps=2))
    folders = [os.path.join(chain, stage) for stage in ("teacher", "kd")]
    student = sample.load_networks(folders[1])
    student[0].register_to_config(guidance=1.0)
    *_, predicted, result = figures.pictures_on_the_way(*student, "a photo of a star", 128, 0)
    assert np.abs(np.asarray(predicted, int) - np.asarray(result, int)).max() <= 1
    pictures = figures.pictures_on_the_way(*student, "a photo of a star", 256, 0)
    assert [picture.width for picture in pictures] == [128, 128, 256, 256]
    run(figures, "--models", *folders, "--out", tmp_path, "--film", "a photo of a star", "--size", 256)
    film = Image.open(tmp_path / "film.webp")
    assert film.size == (640, 320 + BELOW) and film.n_frames >= 2


def test_sheets_are_sampled_as_their_rows_say(chain, tmp_path, monkeypatch):
    """Twelve prompts, the same noise in every row; models are shipped, or in --out."""
    sampled = []

    def fake(model, vae, text_encoder, prompts, size, seed, **given):
        sampled.append((model.config.pattern, size, seed, given))
        return [Image.new("RGB", (8, 8), "red")] * len(prompts)

    monkeypatch.setattr(sample, "generate_all", fake)
    rows = [
        figures.SheetRow("a", "{out}/teacher"),
        figures.SheetRow("b", "{out}/kd", "240x128", dict(upscale=2)),
    ]
    monkeypatch.setitem(figures.SHEETS, "stages", rows)
    copy_parts(chain, tmp_path, "teacher kd vae text_encoder")
    run(figures, "--sheet", "stages", "--out", tmp_path, "--seed", 3)
    assert sampled == [("S" * 7, (128, 128), 3, {}), ("SHWHWHW", (240, 128), 3, dict(upscale=2))]
    assert Image.open(tmp_path / "stages.png").size == (12 * 128, 2 * (18 + 128 + BELOW))


@pytest.mark.parametrize("name", ["stages", "sizes"])
def test_the_models_of_sheets_are_shipped_or_trained(name):
    for row in figures.SHEETS[name]:
        assert (row.settings == figures.DIRECT) == (", directly" in row.name or row.name.endswith("its size"))
        assert row.model.startswith("{out}/") or os.path.exists(os.path.join(row.model, "config.json"))


# -- the walkthrough -----------------------------------------------------------------------------------------


def test_the_walkthrough_shows_what_it_says(monkeypatch):
    """It runs as a script; its equalities hold, forcing lowers the error, the scans visit in their order."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # which it extends
    shown = runpy.run_path(os.path.join(HERE, "claims", "walkthrough.py"))
    assert shown["difference"] < 1e-5 and shown["matrix_difference"] < 1e-5
    assert shown["after"] < 0.5 < 0.9 < shown["before"]
    orders = {letter: order.flatten().tolist() for letter, order in shown["orders"].items()}
    rows = list(range(1, 17))
    columns = [1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 4, 8, 12, 16]
    assert orders == {">": rows, "<": rows[::-1], "v": columns, "^": columns[::-1]}
    assert all(
        shown["terms"]["trained"][name] < shown["terms"]["fresh"][name] for name in ("mse", "soft", "mixer")
    )
    for name in ("matrices.png", "teacher-and-student.png"):
        assert len(np.unique(np.asarray(Image.open(f"runs/walkthrough/{name}")))) > 8


# -- speed ---------------------------------------------------------------------------------------------------


def test_operations_are_those_counted_by_hand():
    """Of a block, in multiply-adds a token; of a model; of training."""
    d = 1152
    for side, letter in ((64, "S"), (64, "H"), (128, "W")):
        tokens = (side // 2) ** 2
        one, two = (speed.sampling_operations("t2md", p, 1, 8 * side, 8 * side) for p in ("S", "S" + letter))
        mixer = 4 * d**2 + 2 * tokens * d
        if letter != "S":  # projections; twice, in chunks of 64: C B^T, each head's product with it, state
            mixer = d * (4 * d + 2 * 256 + 36) + 2 * d**2 + 2 * (64 * 256 + 36 * 64 * (64 + 2 * 256))
        text = 2 * d**2 + 2 * d**2 * 120 / tokens + 2 * d * 120
        assert (two - one) / 2 / tokens == pytest.approx(mixer + text + 8 * d**2, rel=0.01)
    model = speed.sampler_model("shapes", "SHWSH")
    whole = speed.counted(speed.predict, model, speed.random_batch(model, 2, 128, 128))
    assert speed.sampling_operations("shapes", "SHWSH", 2, 128, 128) == whole > 1e8
    forward = speed.sampling_operations("t2md", "SH", 1, 512, 512)
    forcing, kd, adapt = (
        speed.training_operations(s, "t2md", "SH", 1, 512, 512) for s in ("forcing", "kd", "adapt")
    )
    assert adapt == pytest.approx(4 * forward, rel=0.05)  # activations are computed again, where it learns
    assert 0.8 * forward < forcing < 2.8 * forward < 3.5 * forward < kd < adapt + forward


def test_attention_in_float32_is_counted_by_stage():
    """4 tokens^2 d for each block that computes it; hires2, whose attention is not float32, has none."""
    once = 4 * 1024**2 * 1152
    q = torch.zeros(1, 1024, 1152, device="meta")
    assert speed.counted(t2md.attention, q, q, q, 16) == once
    pattern = "SHWHWHW" * 4
    count = functools.partial(speed.float32_operations, config="t2md", pattern=pattern, height=512, width=512)
    assert count("forcing") == 28 * once  # the teacher's
    assert count("kd") == (28 + 4 * 4) * once  # and four of the student's: twice, and the gradient
    assert count("adapt") == 4 * 4 * once
    assert count("hires2") == 0


def test_encoding_is_counted():
    """T5-XXL's encoder has 4.6 billion weights beside its embeddings; the VAE's work grows with the area."""
    assert speed.t5_operations() == pytest.approx(2 * 120 * 4.63e9, rel=0.02)
    small = speed.vae_operations(256)
    large = speed.vae_operations(512)
    assert 4 <= large / small < 4.5 and large > 1e12


def test_the_bill_is_in_days_of_a_gpu(monkeypatch, capsys):
    settings = train.CONFIGS["t2md"].settings["hires1"]
    seen = speed.images_seen(settings)
    assert seen[2] / sum(seen.values()) == pytest.approx(0.8, abs=1e-3)
    assert seen[2] / 64 + seen[1] / 256 == pytest.approx(40_000, abs=1)
    monkeypatch.setattr(speed, "training_operations", lambda *inputs: 3e12)
    monkeypatch.setattr(speed, "float32_operations", lambda *inputs: 1e12)
    monkeypatch.setattr(speed, "vae_operations", lambda pixels: 4e12)
    monkeypatch.setattr(speed, "t5_operations", lambda: 5e12)
    monkeypatch.setattr(speed, "stage_bill", functools.cache(speed.stage_bill))
    hires2 = speed.stage_bill("hires2", 0.5)
    with torch.device("meta"):
        model = speed.new_model("t2md", train.CONFIGS["t2md"].pattern)
    weights = sum(p.numel() for p in model.parameters())
    assert hires2["operations"] == 320_000 * 3e12
    assert (hires2["memory"], hires2["disk"]) == (20 * weights, 20 * weights)  # all is trained
    assert hires2["cache"] == 320_000 * (256**2 * 4 * 2 * 2 + 120 * 4096 * 2)  # mean, deviation; captions
    assert hires2["image_memory"] == 28 * 128**2 * 1152 * 4
    speed.print_bill(speed.parse_arguments(["bill", "--utilisation", "0.5"]))
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert set(speed.PAPER_STAGES) < set(rows) and rows["hires2"][1:4] == ["2048", "20,000", "320,000"]
    day = 86400 * 0.5
    float32 = 46_080_000e12 / (day * 67e12)
    assert float(rows["kd"][5]) == pytest.approx(2 * 46_080_000e12 / (day * 989e12) + float32, abs=0.05)
    assert float(rows["kd"][6]) == pytest.approx(float32, abs=0.05)
    assert float(rows["kd"][7]) == pytest.approx(46_080_000e12 / day * (4 / 494e12 + 5 / 989e12), abs=0.05)
    totals = [float(word) for word in re.findall(r"\d+\.\d", " ".join(rows["in"]))]
    bills = [speed.stage_bill(stage, 0.5) for stage in speed.PAPER_STAGES]
    assert totals[0] == pytest.approx(sum(bill["training"] for bill in bills), abs=0.05)
    assert totals[1] == pytest.approx(sum(bill["encoding"] for bill in bills), abs=0.05)


@pytest.mark.parametrize("command, words", [
    ("model --config shapes --blocks 3 --sizes 32 32x48", ["SSS", "SHW", "32x48", "ratio"]),
    ("scan --sizes 128", ["ssd, chunks of 64", "attention", "us / token"]),
    ("step forcing --config shapes --batch-size 2", ["2 images of 128 px", "TFLOP are"]),
    ("step kd --config shapes --dtype bfloat16 --blocks 1", ["1 images of 128 px", "TFLOP are"]),
])  # fmt: skip
def test_commands_of_speed(command, words, capsys):
    args = speed.parse_arguments([*command.split(), "--repeats", "1", "--device", "cpu"])
    speed.COMMANDS[args.command](args)
    printed = capsys.readouterr().out
    assert all(word in printed for word in [*words, "torch 2."])


def test_the_ratio_is_of_attention_to_the_hybrid(monkeypatch, capsys):
    """2.00 where attention takes twice as long."""
    monkeypatch.setattr(speed, "seconds", lambda steps, *_: [(2.0, 0.0), (1.0, 0.0)][: len(steps)])
    speed.time_model(
        speed.parse_arguments("model --config shapes --blocks 2 --sizes 32 --device cpu".split())
    )
    ratios = {line.split()[-1]: line.split()[-2] for line in capsys.readouterr().out.splitlines()}
    assert (ratios["SS"], ratios["SH"]) == ("1.00", "2.00")
    assert speed.sampler_model("shapes", "SH", "cpu", torch.bfloat16).dtype == torch.bfloat16


def test_a_gpus_time_ends_with_its_work(monkeypatch):
    synchronize = mock.Mock()
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert len(speed.seconds([lambda: None, lambda: None], 3, "cuda")) == 2
    assert synchronize.call_count == 8


def test_a_first_call_is_not_timed():
    pauses = itertools.chain([0.3], itertools.repeat(0))
    ((median, spread),) = speed.seconds([lambda: time.sleep(next(pauses))], 2, "cpu")
    assert median + spread < 0.3


def test_feed_times_the_path_of_a_training(tmp_path, monkeypatch, capsys):
    """Of random images, which leave nothing behind; and of a data set with a training's own cache."""
    monkeypatch.setattr(speed, "training_operations", lambda *inputs: H100_SECOND)
    monkeypatch.setattr(index, "INDEX", str(tmp_path / "index"))
    before = set(os.listdir(tmp_path))
    monkeypatch.setattr(speed.tempfile, "tempdir", str(tmp_path))
    small = "--repeats 1 --batch-size 2 --images 8 --pixels 128 --utilisation 0.5".split()
    speed.time_feed(speed.parse_arguments(["feed", *small]))
    assert set(os.listdir(tmp_path)) == before
    printed = capsys.readouterr().out
    assert (
        re.search(r"batches of 2 images of 128 px: \d+ images/s", printed) and "2000.0 ms an image" in printed
    )
    monkeypatch.setattr(index, "INDEX", str(tmp_path / "index"))
    path = str(tmp_path / "images.tar")
    speed.write_random_images(path, 8, 128)
    calls = []
    batch = data_images.ImageData.batch

    def noted_batch(data, chosen, *inputs):
        calls.append(chosen)
        return batch(data, chosen, *inputs)

    monkeypatch.setattr(ImageData, "batch", noted_batch)
    command = ["feed", "kd", "--config", "shapes", "--data", path, "--cache", str(tmp_path / "cache"), *small]
    speed.time_feed(speed.parse_arguments(command))
    assert len(calls) >= 8 and {len(numbers) for numbers in calls} == {2}
    assert len(os.listdir(tmp_path / "cache")) == 2


H100_SECOND = speed.H100  # operations


# -- pages and sentences -------------------------------------------------------------------------------------

PAGES = ("README.md", "claims/README.md", "claims/full_size.md", "data/README.md")  # log.md: of old commits


def commands_on(page):
    """(program, arguments) of each command in a page's code blocks, such as ("train.py", "--stage kd")."""
    with open(os.path.join(HERE, page), encoding="utf-8") as file:
        text = file.read().replace("\\\n", " ")
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.S | re.M))
    program = r"(?:python|torchrun [^\n]*?) (train\.py|sample\.py|-m (?:claims|data)\.\w+)"
    return re.findall(rf"^[^#$\n]*?{program}([^;&|#$\n]*)(?:#.*)?$", blocks, flags=re.M)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_on_the_page_is_one(page, monkeypatch):
    parsers = {f"-m {module.__name__}": module.parse_arguments for module in (scores, table1, figures, speed)}
    parsers |= {"train.py": train.parse_arguments, "sample.py": sample.parse_arguments}
    found = commands_on(page)
    assert found
    for program, arguments in found:
        words = shlex.split(arguments.strip().removesuffix('"'))
        words = [word for word in words if word != "$@"]  # a shell function's own
        if program == "-m data.images":
            assert words and not words[0].startswith("-")
        elif program == "-m claims.walkthrough":
            assert not words
        elif words:  # else the rest comes with "$@"
            parsers[program](words)


SMALLER = {  # what full_size.md's networks and pictures are made with -> the same in miniature
    "2048, 4": "512, 4",
    "dict(sample_size=64, caption_channels=4096,": "dict(num_layers=7, num_attention_heads=2, "
    "attention_head_dim=32, cross_attention_dim=64, sample_size=16, caption_channels=64,",
    "d_model=4096, num_heads=64, d_ff=10240": "d_model=64, num_heads=4, d_ff=64",
}


def test_full_sizes_step_of_every_stage_runs_as_it_is_printed(tmp_path, monkeypatch):
    """The page's own block: it makes the networks and pictures, trains each stage for a step, and samples."""
    text = open(os.path.join(HERE, "claims", "full_size.md")).read()
    block = next(b for b in re.findall(r"^```\n(.*?)^```", text, re.S | re.M) if "step() {" in b)
    setup = re.search(r"python - <<END\n(.*?)^END$", block, re.S | re.M).group(1)
    for large, small in SMALLER.items():
        assert setup.count(large) == 1, large
        setup = setup.replace(large, small)
    monkeypatch.chdir(tmp_path)
    exec(setup, {})
    shared = re.search(r'python train.py (.*) "\$@"', block).group(1)
    stages = re.findall(r"^step (.*?)(?:#.*)?$", block, re.M)
    assert [words.split()[1] for words in stages] == ["forcing", "kd", "adapt", "hires1", "hires2"]
    for words in stages:
        flags = f"{shared} {words} --pattern SHWHWHW"
        train.run(train.parse_arguments(flags.split()))
    sampling = re.search(r"^python sample.py (.*)$", block.replace("\\\n", " "), re.M).group(1)
    arguments = sample.parse_arguments(shlex.split(sampling.replace("3840x2160", "96x64")))
    sample.run(arguments)
    assert len(os.listdir("samples")) == 1


@pytest.mark.parametrize("command", ["scores --prompts no", "figures --curves no", "speed scan --sizes 0"])
def test_one_sentence_for_what_cannot_be_done(monkeypatch, command):
    module, *arguments = command.split()
    monkeypatch.setattr("sys.argv", ["", *arguments])
    with pytest.raises(SystemExit, match=rf"^claims.{module}: \w+: [^\n]+; --debug shows where$"):
        runpy.run_path(os.path.join(HERE, "claims", f"{module}.py"), run_name="__main__")


# -- nothing is lost -----------------------------------------------------------------------------------------


def train_forcing(out, teacher, dies_after=None, dies_saving=False):
    """What a process does until it is killed: after some seconds, or at its second checkpoint, half saved."""
    os.setpgid(0, 0)
    os.chdir(os.path.dirname(out))
    sys.stdout = open(os.devnull, "w")
    sys.stderr = sys.stdout
    saves = itertools.count(1)
    save = torch.save

    def save_or_die(*args):
        if next(saves) == 2:
            os.killpg(0, signal.SIGKILL)
        save(*args)

    if dies_saving:
        torch.save = save_or_die
    if dies_after:
        threading.Timer(dies_after, os.killpg, (0, signal.SIGKILL)).start()
    flags = "--stage forcing --steps 6 --batch-size 2 --save-every 2 --examples 0 --device cpu"
    train.run(train.parse_arguments([*flags.split(), "--out", str(out), "--teacher", teacher]))


def left_behind(folder):
    """All that a training leaves: its state's values, its log without times, its model."""
    leaves = torch.utils._pytree.tree_leaves(checkpoints.read_state(str(folder)))
    state = [v.numpy().tobytes() if torch.is_tensor(v) else v for v in leaves]
    log = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        log.append(json.loads(line) | dict(seconds=None, waited=None))
    models = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
    return state, log, models


def test_kills_lose_nothing(chain, forkserver, tmp_path):
    """kill -9, once in the middle of a save and twice at random: bit for bit as without, beside it."""
    rng = random.Random(0)

    def start(out, dies_after=None, dies_saving=False):
        inputs = (tmp_path / out, f"{chain}/teacher", dies_after, dies_saving)
        process = forkserver.Process(target=train_forcing, args=inputs)
        process.start()
        return process

    without = start("whole")
    codes = []
    for dies_after, dies_saving in ((None, True), (rng.uniform(0.2, 3), False), (rng.uniform(0.2, 3), False)):
        process = start("killed", dies_after, dies_saving)
        process.join()
        codes.append(process.exitcode)
    for process in (without, start("killed")):
        process.join()
        codes.append(process.exitcode)
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, -signal.SIGKILL, 0, 0]
    whole, killed = (left_behind(tmp_path / out / "forcing") for out in ("whole", "killed"))
    assert whole == killed and len(whole[1]) == 6


def damaged_copies(content, rng):
    """A file's content with a bit flipped, near its start or anywhere; cut; with a hole; in another order."""
    a, b = sorted(rng.randrange(len(content)) for _ in range(2))
    copies = []
    for k in (a, a // 50):
        copies.append(content[:k] + bytes([content[k] ^ 64]) + content[k + 1 :])
    copies.append(content[:a])
    copies.append(content[:a] + bytes(b - a) + content[b:])
    copies.append(content[b:] + content[a:])
    return copies


def test_damaged_files_give_a_sentence(chain, tmp_path, capsys, monkeypatch):
    """Each is read as if whole, or refused in one line; a training that goes on ends as with the whole."""
    out = shutil.copytree(chain, tmp_path / "out")
    monkeypatch.setattr(index, "INDEX", f"{out}/index")
    files.write_png(f"{out}/images/0.png", SMEAR)
    for name in ("prompts", "images/metadata"):
        (out / f"{name}.jsonl").write_text('{"file_name": "0.png", "text": "a star", "prompt": "a star"}')
    shutil.copyfile(next(out.glob("pictures/*/*.tar")), out / "images.tar")
    vae = t2md.VAE(f"{chain}/vae")
    text_encoder = t2md.TextEncoder(f"{chain}/text_encoder")
    results = []

    def go_on():
        shutil.rmtree(out / "begun", ignore_errors=True)
        copy_parts(out, out / "begun", "kd forcing vae text_encoder")
        flags = f"--stage kd --steps 3 --batch-size 2 --examples 0 --out {out}/begun --teacher {out}/teacher"
        train.run(train.parse_arguments(flags.split()))
        results.append(left_behind(out / "begun" / "kd"))

    def look(source):
        ImageData(f"{out}/{source}", 64, None, None, 0).picture(0)

    def encode():
        data = ImageData(f"{out}/images", 64, vae, text_encoder, 0, f"{out}/cache")
        data.fill_cache()
        data.batch([0], [files.generator(0, "kd", 0, 0)])

    readers = {
        "prompts.jsonl": lambda: read_prompts(f"{out}/prompts.jsonl"),
        "kd/training_state.pt": go_on,
        "kd/made_with.json": go_on,
        "kd/config.json": lambda: sample.load(f"{out}/kd"),
        "kd/*.safetensors": lambda: sample.load(f"{out}/kd"),
        "images/metadata.jsonl": lambda: look("images"),
        "images.tar": lambda: look("images.tar"),
        "cache/captions*": encode,
        "cache/64px*": encode,
    }
    rng = random.Random(0)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for name, read in readers.items():
        read()
        (path,) = out.glob(name)
        content = path.read_bytes()
        for damaged in damaged_copies(content, rng):
            path.write_bytes(damaged)
            signal.alarm(60)  # what takes longer hangs
            try:
                files.as_command("claims", lambda _, read=read: read(), scores.parse_arguments([]))
            except SystemExit as end:
                assert re.fullmatch(r"claims: \w+: [^\n]+; --debug shows where", end.code), name
            signal.alarm(0)
            path.write_bytes(content)
    assert all(result == results[0] for result in results)
