"""What the commands must do: count right, run what is missing once, refuse what cannot be compared."""

import functools
import json
import multiprocessing
import os
import re
import shlex
import types

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from claims import figures, scores, speed, table1
from data.shapes import BACKGROUND, TAGS, draw_shapes, heldout_records
from t2md import T2MD, MambaMixer
from test_t2md import HERE, chain, refused

TEACHER = os.path.join(HERE, "assets", "teacher")
__all__ = ["chain"]  # a fixture, which pytest finds by its name here


def score(*arguments):
    scores.run(scores.parse_arguments(list(arguments)))


def test_evaluate_counts_what_the_detector_sees():
    records = heldout_records(12, 0)
    right = [draw_shapes(record, 128, np.random.default_rng(k)) for k, record in enumerate(records)]
    images = right[:6] + [Image.new("RGB", (128, 128), BACKGROUND)] * 6
    assert scores.evaluate(images, records) == {**{tag: 0.5 for tag in TAGS}, "overall": 0.5}


def in_two_steps(monkeypatch):
    """Pictures are sampled in two steps, not twenty."""
    monkeypatch.setattr(sample, "generate_all", functools.partial(sample.generate_all, steps=2))


def test_scores_prints_and_writes(chain, tmp_path, monkeypatch, capsys):
    in_two_steps(monkeypatch)
    folders = [os.path.join(chain, stage) for stage in ("teacher", "kd")]
    sizes = ["--zero-shot", "128", "--size", "64", "32"]
    score("--records", "6", "--out", str(tmp_path), *sizes, "--model", *folders)
    written, printed = json.loads((tmp_path / "eval.json").read_text()), capsys.readouterr().out
    assert Image.open(tmp_path / "eval.png").size == (6 * 128, 5 * 128)
    assert list(written) == folders
    assert all(set(own["32"]) == set(own["64"]) == {*TAGS, "overall"} for own in written.values())
    assert printed.count("\n") == 6 and all(tag in printed for tag in (*TAGS, "overall"))


def test_scores_upscales_all_pictures_or_those_of_zero_shot_alone(chain, tmp_path, monkeypatch):
    sampled = []

    def fake(model, vae, text_encoder, prompts, size, seed, upscale=1, direct=False, renoise=None):
        sampled.append((*size, upscale))
        return [Image.new("RGB", (8, 8))] * len(prompts)

    monkeypatch.setattr(sample, "generate_all", fake)
    command = ["--records", "6", "--size", "64", "--upscale", "2", "--model", os.path.join(chain, "kd")]
    for zero_shot in ([], ["--zero-shot", "256"]):
        score(*command, "--out", str(tmp_path), *zero_shot)
    assert sampled == [(64, 64, 2), (64, 64, 1), (256, 256, 2)]
    sampled.clear()
    score("--records", "6", "--size", "64x32", "--model", os.path.join(chain, "kd"), "--out", str(tmp_path))
    assert sampled == [(64, 32, 1)]  # width x height, as in sample.py


def test_relative_errors_on_own_and_on_the_teachers_hidden_states():
    """The first block's input is the same either way; on the teacher's, no error reaches the next block."""
    teacher = sample.load_denoiser(TEACHER)
    student = T2MD.from_teacher(teacher, "HSSSSSS")
    parts = sample.load_parts(teacher, TEACHER)
    errors = scores.relative_errors(student, teacher, *parts, heldout_records(6, 0), 64, 0)
    assert errors["mixers"][0] == errors["forced"][0] > 0.1
    assert min(errors["mixers"][1:]) > 1e-3 and max(errors["forced"][1:]) < 1e-9


def test_rows_of_table_1():
    rows = {row.name: row for row in table1.ABLATIONS}
    others = [row for row in table1.ABLATIONS if row.letters]
    patterns = {row.name: table1.scans("SHWHWHW", row.letters, row.attention) for row in others}
    wanted = {"one direction": "Sv>v>v>", "no self-attention": "HWHWHWH", "four-way scan": "S><v^><"}
    assert patterns == wanted
    assert table1.scans("SHWHWHW" * 2, "><v^") == "S><v^><Sv^><v^"
    assert all(row.against is None or row.against in rows for row in rows.values())
    for row in rows.values():
        train.parse_arguments(["--stage", "kd", *row.flags])


def test_table1_runs_every_row_once(tmp_path, monkeypatch, capsys):
    rows = {row.name: row for row in table1.ABLATIONS}
    four_way = rows["four-way scan"]._replace(against="from scratch")
    monkeypatch.setattr(table1, "ABLATIONS", [rows["from scratch"], four_way])
    monkeypatch.setitem(table1.PAPER, "four-way scan", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.35))
    monkeypatch.setattr(table1, "BASE", 64)
    in_two_steps(monkeypatch)
    command = ["--steps", "4", "--batch-size", "2", "--records", "6", "--out", str(tmp_path)]
    one = ["--seed", "1", "--seeds", "1"]  # a process may do one seed, another all
    for seeds in (one, ["--seeds", "2"]):
        table1.run(table1.parse_arguments([*command, *seeds]))
        assert capsys.readouterr().out.count("ablate: ") == 3
    logs = (tmp_path / "ablate").rglob("log.jsonl")
    steps = {"/".join(path.parts[-3:-1]): len(path.read_text().splitlines()) for path in logs}
    trained = (("from-scratch", "kd", 4), ("four-way-scan", "forcing", 1), ("four-way-scan", "kd", 3))
    assert steps == {f"{row}-{seed}/{stage}": n for seed in range(2) for row, stage, n in trained}
    for row, pattern in (("four-way-scan-1", "S><v^><"), ("from-scratch-0", "SHWHWHW")):
        assert sample.read_json(tmp_path / "ablate" / row / "kd" / "config.json")["pattern"] == pattern

    # all done: the table again, and nothing else
    table1.run(table1.parse_arguments([*command, "--seeds", "2"]))
    printed = capsys.readouterr().out
    assert "ablate: " not in printed
    assert printed.strip() == (tmp_path / "ablate" / "table.md").read_text().strip()
    table = json.loads((tmp_path / "ablate" / "table.json").read_text())
    teacher, scratch = (table[row]["runs"][0] for row in ("teacher", "from scratch"))
    assert teacher["noise"] == 0 and teacher["mixers"] == teacher["forced"] == [0] * 7
    assert scratch["noise"] > 0.1 and len(scratch["mixers"]) == 7
    assert table["from scratch"]["paper"][-1] == 0.301 and "(0.301)" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| four-way scan"))
    assert [cell[-7:-1] for cell in row.split("|")[2:8]] == [f"({k / 10:.2f})" for k in range(1, 7)]
    wins = np.zeros(3, dtype=int)
    for a, b in zip(table["four-way scan"]["runs"], table["from scratch"]["runs"]):
        wins += [a["overall"] > b["overall"], a["noise"] < b["noise"], sum(a["mixers"]) < sum(b["mixers"])]
    cells = " | ".join(f"{count} of 2" for count in wins)
    assert f"| four-way scan | from scratch | {cells} | higher |" in printed
    with pytest.raises(ValueError, match="steps 4, not 5"):
        table1.run(table1.parse_arguments([*command, "--seeds", "2", "--steps", "5"]))


def write_often(folder):
    for k in range(200):
        with table1.one_at_a_time(folder):
            sample.write_json(os.path.join(folder, "table"), dict(k=k))


def test_processes_that_share_an_ablation_write_in_turn(tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=write_often, args=(str(tmp_path),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sample.read_json(tmp_path / "table") == dict(k=199)


def test_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "heldout_records", lambda count, seed: heldout_records(6, seed))
    ablate = tmp_path / "ablate"
    student = T2MD.from_teacher(sample.load_denoiser(TEACHER), "SHWHWHW")
    student.save_pretrained(ablate / "teacher-forcing-t2md-0" / "forcing")
    runs = {name: {"runs": [{"mixers": [0.1, 0.2, top]}, {"mixers": [0.1, 0.3, top]}]} for name, top in
            (("+ token mixer loss", 0.5), ("+ teacher forcing: T2MD", 0.2))}  # fmt: skip
    (ablate / "table.json").write_text(json.dumps(runs))
    figures.run(figures.parse_arguments(["--out", str(tmp_path), "--size", "64"]))
    for name in ("field.png", "depth.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / name)))) > 8
    mixer, x = MambaMixer(">", 48, d_state=8, head_dim=16), torch.randn(2, 6 * 10, 48)
    field = figures.receptive_field([mixer], x, (6, 10)).flatten()
    assert (field[3 * 10 + 5 + 1 :] == 0).all() and (field[: 3 * 10 + 5 + 1] > 0).all() and field.max() == 1


def test_curves(tmp_path):
    folders = [tmp_path / name for name in ("long", "short", "empty")]
    for folder, steps in zip(folders, (500, 3, 0)):
        folder.mkdir()
        rest, lines = dict(gradient=float("nan"), skipped=False, seconds=0.1), ""
        for k in range(steps):
            lines += json.dumps(dict(step=k, mse=1 / (k + 1), soft=0.0 if k % 2 else 2.0) | rest) + "\n"
        (folder / "log.jsonl").write_text(lines + '{"step": 3, "ms')  # killed while it wrote
    terms = figures.read_log(folders[0])
    assert terms.keys() == {"mse", "soft"} and terms["soft"] == (list(range(0, 500, 2)), [2.0] * 250)
    figures.run(figures.parse_arguments(["--out", str(tmp_path), "--curves", *map(str, folders)]))
    sheet = np.asarray(Image.open(tmp_path / "curves.png"))
    assert sheet.shape == (400, 1280, 3)
    assert all(len(np.unique(half)) > 8 for half in np.split(sheet, 2, axis=1))
    with pytest.raises(ValueError, match="no step is logged yet"):
        figures.curves([str(folders[2])])


def test_a_chart_shows_its_values(monkeypatch):
    """1, 10 and 100 are evenly spaced on a logarithmic axis; a constant and a single point are drawn too."""
    drawn, line = [], figures.ImageDraw.ImageDraw.line

    def spy(pen, points, *rest, **how):
        drawn.append(points)
        line(pen, points, *rest, **how)

    monkeypatch.setattr(figures.ImageDraw.ImageDraw, "line", spy)
    figures.chart({"powers": ([0, 1, 2], [1.0, 10.0, 100.0])}, "", log=True)
    (x0, y0), (x1, y1), (x2, y2) = drawn[-1]
    assert x1 - x0 == x2 - x1 > 0 and y1 - y0 == pytest.approx(y2 - y1) and y2 < y0
    for lines in ({"flat": ([0, 1], [1.0, 1.0])}, {"point": ([7], [0.5])}):
        figures.chart(lines, "", log=True, smooth=2)
        figures.chart(lines, "")


@pytest.mark.parametrize("module, arguments, words", [
    (scores, ["--records", "0"], ["--records", "at least 1"]),
    (scores, ["--model", "nowhere"], ["claims.scores:", "nowhere"]),
    (table1, ["--steps", "3"], ["--steps", "at least 4"]),
    (figures, ["--curves", "nowhere"], ["claims.figures:", "nowhere"]),
])  # fmt: skip
def test_one_sentence_for_what_cannot_be_done(tmp_path, monkeypatch, capsys, module, arguments, words):
    monkeypatch.setattr("sys.argv", ["-m", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as end:
        module.main()
    said = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err
    refused(types.SimpleNamespace(returncode=1, stderr=said), *words)


@pytest.mark.parametrize("page", ["README.md", "claims/README.md"])
def test_every_command_on_the_page_is_one(page):
    """Each is parsed by the program it names, not run."""
    parsers = {f"-m {module.__name__}": module for module in (scores, table1, figures, speed)}
    parsers["train.py"] = train
    with open(os.path.join(HERE, page)) as file:
        blocks = re.findall(r"^```\w*\n(.*?)^```", file.read().replace("\\\n", " "), flags=re.S | re.M)
    lines = [re.sub(r"\s#.*", "", line) for line in "".join(blocks).splitlines() if "$" not in line]
    command = r"python (train\.py|-m claims\.(?:scores|table1|figures|speed))([^;&|\"]*)"
    found = [re.search(command, line) for line in lines]
    assert any(found)
    for program, arguments in (command.groups() for command in found if command):
        parsers[program].parse_arguments(shlex.split(arguments))
