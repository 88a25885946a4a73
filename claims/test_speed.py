"""What claims.speed must do: count what is counted by hand, measure what it says, run every command."""

import functools

import pytest
import torch

import sample
import t2md
import train
from claims import counts, speed
from t2md import T2MD, MambaMixer, predict_noise

D, CAPTION = 1152, 120


def command(*arguments):
    args = speed.parse_arguments(list(arguments))
    speed.COMMANDS[args.command](args)


@pytest.mark.parametrize("side, letter", [(64, "S"), (64, "H"), (128, "W")])
def test_operations_of_a_block_are_those_counted_by_hand(side, letter):
    """In multiply-adds a token."""
    tokens, totals = (side // 2) ** 2, {}
    for pattern in ("S", "S" + letter):
        model = counts.on_meta({}, pattern)
        with torch.no_grad():
            totals[pattern] = counts.operations(
                predict_noise, model, *counts.given_on_meta(model, 1, (4, side, side))
            )
    if letter == "S":
        mixer = 4 * D**2 + 2 * tokens * D
    else:  # projections; twice, in chunks of 64: C B^T of all heads, each head's product and its state
        scan = 64 * 256 + 36 * 64 * (64 + 2 * 256)
        mixer = D * (4 * D + 2 * 256 + 36) + 2 * D**2 + D**2 + 2 * scan
    text = 2 * D**2 + 2 * D**2 * CAPTION / tokens + 2 * D * CAPTION
    block = (totals["S" + letter] - totals["S"]) / 2 / tokens
    assert block == pytest.approx(mixer + text + 8 * D**2, rel=0.001 if letter == "S" else 0.01)


def test_operations_of_the_model_are_the_sum_of_its_blocks():
    model = sample.freeze(T2MD(pattern="SHWSH", width=288, heads=4), "meta", torch.float32)
    with torch.no_grad():
        whole = counts.operations(predict_noise, model, *counts.given_on_meta(model, 2, (4, 16, 16)))
    assert counts.count_step(model, (4, 16, 16), 2) == whole


def test_training_counts_what_learns():
    """Activations are computed anew: four forward passes of what learns, three of what is frozen above it."""
    adapt, kd, forcing = (
        counts.count_training(train.STAGES[name], "SH", 64) for name in ("adapt", "kd", "forcing")
    )
    model = counts.on_meta({}, "SH")
    with torch.no_grad():
        forward = counts.operations(predict_noise, model, *counts.given_on_meta(model, 1, (4, 64, 64)))
    assert adapt == pytest.approx(4 * forward, rel=0.03)
    assert 0.8 * forward < forcing < 2.5 * forward < 3.5 * forward < kd < adapt + forward


@pytest.mark.parametrize("name", train.CHAIN)
def test_the_plans_time_is_by_count(name):
    """GFLOP of an image of base size: of a larger one by its area."""
    stage, pattern = train.STAGES[name], "SSSSSSS" if name == "teacher" else "SHWHWHW"
    counted = {m: counts.count_training(stage, pattern, 16 * m, "shapes") / m**2 for m in stage.sizes}
    mean = sum(counted[m] * share * m**2 for m, share in stage.sizes.items())
    mean /= sum(share * m**2 for m, share in stage.sizes.items())
    assert train.GFLOP[name] == pytest.approx(mean / 1e9, rel=0.01)


def test_images_seen_keep_the_shares():
    seen = counts.images_seen(train.STAGES["hires1"])
    assert seen[2] / sum(seen.values()) == pytest.approx(0.8, abs=1e-3)
    assert seen[2] / 64 + seen[1] / 256 == pytest.approx(40_000, abs=1)
    assert counts.images_seen(train.STAGES["hires2"]) == {4: 20_000 * 16}


def test_operations_of_a_call_leave_it_as_it_is():
    mixer, x = MambaMixer("W", 288), torch.randn(1, 64, 288)
    call = functools.partial(mixer, x, (8, 8))
    with torch.no_grad():
        assert counts.count_call(call) > 2 * 64 * 288**2 and call().device == x.device


def test_extra_memory_counts_what_is_held_at_once():
    def hold():
        a = torch.ones(2**20)  # 4 MiB
        b = a + a
        del a
        return b + b

    assert abs(speed.extra_memory(hold, "cpu") * 1024 - 8) < 0.1


MODEL = ["model", "--width", "288", "--pattern", "SHW", "--sizes", "32,32x48", "--steps", "1"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            [*MODEL, "--guidance", "1", "--kernels", "2"],
            ["SSS", "SHW", "32x48", "a step", "of matmul", "aten::"],
        ),
        (["scan", "--sizes", "128"], ["ssd", "transformers", "mixer", "of matmul"]),
        (["forcing", "--batch-size", "2"], ["forcing step", "optimiser", "EMA", "data"]),
        (["kd", "--batch-size", "2"], ["kd step", "optimiser", "EMA", "data"]),
    ],
)
def test_commands(arguments, words, capsys):
    command(*arguments, "--repeats", "1", "--device", "cpu")
    printed = capsys.readouterr().out
    assert all(word in printed for word in [*words, "torch 2."])


def test_bill(monkeypatch, capsys):
    monkeypatch.setattr(counts, "count_training", lambda stage, pattern, side: 1e12 * len(set(pattern)))
    command("bill", "--images", "1000", "--utilisation", "0.5")
    printed = capsys.readouterr().out
    assert all(stage in printed for stage in ("forcing", "kd", "adapt", "hires1", "hires2", "in all"))
    hires2 = next(line.split() for line in printed.splitlines() if "hires2 " in line and "20,000" in line)
    assert hires2[3] == "320,000" and hires2[5] == f"{3 * 320:,}"


def test_card_runs_every_measurement_and_goes_on_after_one_that_fails(monkeypatch, capsys):
    ran = []

    def measure(args):
        ran.append((args.command, getattr(args, "config", None), getattr(args, "compile", None), args.device))
        if args.command == "kernels":
            raise ArithmeticError("off by 1")

    for name in ("kernels", "model", "forcing", "kd"):
        monkeypatch.setitem(speed.COMMANDS, name, measure)
    command("card", "--device", "cpu")
    of_model = [("model", None, compiled, "cpu") for compiled in (False, True)]
    training = [(name, "t2md", None, "cpu") for name in ("forcing", "kd")]
    assert ran == [("kernels", None, None, "cpu"), *of_model, *training, of_model[1]]
    assert "failed: off by 1" in capsys.readouterr().out


@pytest.mark.parametrize("works", [True, False])
def test_kernels(works, monkeypatch, capsys):
    if not works:
        monkeypatch.setattr(
            speed, "ssd", lambda *given, D: t2md.ssd(*given, D=D).mul(1 + 0.1 * (D.dtype != torch.float64))
        )
        with pytest.raises(ArithmeticError, match="off by"):
            command("kernels", "--device", "cpu")
    else:
        command("kernels", "--device", "cpu")
        assert "bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["model", "--repeats", "0"], ["bill", "--images", "0"], ["sort"]])
def test_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command(*arguments)
    assert "error:" in capsys.readouterr().err
