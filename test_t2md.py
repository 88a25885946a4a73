"""What must hold, checked against what we did not write: diffusers, transformers, a recurrence in float64.

    python -m pytest -q

No network, no GPU, no downloads. What real weights would provide is built here, small, in the real format.
"""

import ast
import contextlib
import copy
import functools
import gc
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import types
import weakref
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

import sample
import t2md
import train
from data import parts
from data.images import to_pixels
from data.shapes import BACKGROUND, draw_shapes, heldout_records, score_shapes
from t2md import T2MD, VAE, Mamba2, MambaMixer, TextEncoder, ssd, ssd_recurrence

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = dict(width=48, heads=2, caption_width=20, d_state=8, head_dim=16, sample_size=16, chunk_size=16)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def inputs(batch=2, size=(16, 16), tokens=7, width=20, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, tokens)
    mask[-1, tokens // 2 :] = 0
    return dict(
        z=torch.randn(batch, 4, *size, generator=g).to(dtype),
        text=torch.randn(batch, tokens, width, generator=g).to(dtype),
        t=torch.linspace(3, 777, batch).long(),
        mask=mask,
    )


def shuffled(model, seed=0, std=0.05):
    """Random weights everywhere, so that no zero-initialised layer hides what is behind it."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn(p.shape, generator=g).to(p.dtype))
    return model


def pixart(sample_size=16, layers=2):
    torch.manual_seed(0)
    shape = dict(num_attention_heads=2, attention_head_dim=24, cross_attention_dim=48, caption_channels=20)
    return PixArtTransformer2DModel(num_layers=layers, sample_size=sample_size, **shape).eval()


def given(x):
    """What `predict_noise` takes of `inputs`."""
    return x["z"], x["t"], x["text"], x["mask"]


def run(*command, **kwargs):
    how = dict(capture_output=True, text=True, cwd=HERE, timeout=600)
    return subprocess.run([sys.executable, *command], **how, **kwargs)


def call(script, *arguments, anew=False):
    """The same command without a new process, whose imports take seconds; a traceback fails the test that
    calls it. anew: the file itself is run, as Python does it, not the module, of which tests patch parts."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    into_out, into_err = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with mock.patch.object(sys, "argv", [script, *arguments]), into_out, into_err:
        try:
            if anew:
                runpy.run_path(os.path.join(HERE, script), run_name="__main__")
            else:
                {"train.py": train, "sample.py": sample}[script].main()
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):  # a sentence, which Python prints as it exits with 1
                print(code, file=err)
                code = 1
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def read_log(folder):
    """The steps of a training, a dict each."""
    return [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]


def copy_parts(chain, folder, parts):
    """Some folders of the chain, "vae text_encoder ...", into another one."""
    for part in parts.split():
        shutil.copytree(os.path.join(chain, part), os.path.join(folder, part))


# -- 1. the backbone is PixArt -------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "sample_size, size", [(64, (16, 16)), (64, (12, 20)), (32, (32, 32)), (32, (8, 30)), (128, (16, 24))]
)
def test_all_attention_backbone_equals_diffusers(tmp_path, sample_size, size, masked):
    theirs = pixart(sample_size)
    theirs.save_pretrained(tmp_path)
    ours = T2MD.from_pixart(str(tmp_path), pattern="SS")
    x = inputs(size=size)
    mask = x["mask"] if masked else None
    resolution = torch.tensor([[512.0, 768], [1024, 1024]])
    conditions = dict(resolution=resolution, aspect_ratio=torch.tensor([[0.67], [1.0]]))
    how = dict(added_cond_kwargs=conditions if sample_size == 128 else None)
    expected = theirs(x["z"], x["text"], x["t"], encoder_attention_mask=mask, **how).sample
    got = ours(x["z"], x["text"], x["t"], encoder_attention_mask=mask, **how).sample
    assert got.shape == (2, 8, *size)
    assert relative(got, expected) < 1e-5
    if masked:  # the mask matters
        assert relative(ours(x["z"], x["text"], x["t"], **how).sample, expected) > 1e-3


def test_gradients_equal_diffusers(tmp_path):
    theirs = pixart()
    theirs.save_pretrained(tmp_path)
    ours = T2MD.from_pixart(str(tmp_path))
    x = inputs()
    for model in (theirs, ours):
        model(x["z"], x["text"], x["t"], encoder_attention_mask=x["mask"]).sample.square().sum().backward()
    assert relative(ours.patch_embed.weight.grad, theirs.pos_embed.proj.weight.grad) < 1e-5
    our_key, their_key = ours.blocks[1].mixer.to_k, theirs.transformer_blocks[1].attn1.to_k
    assert relative(our_key.weight.grad, their_key.weight.grad) < 1e-5


def test_students_copy_all_that_fits(tmp_path):
    theirs = pixart(layers=7)
    theirs.save_pretrained(tmp_path)
    teacher = T2MD.from_pixart(str(tmp_path))
    student = T2MD.from_pixart(str(tmp_path), pattern="SHWHWHW", d_state=8, head_dim=16)
    assert teacher.config.pattern == "S" * 7
    assert (teacher.config.out_channels, student.config.out_channels) == (8, 4)
    original, copied = theirs.state_dict(), 0
    for name, weight in student.state_dict().items():
        if ".mamba." in name or ".fuse." in name:
            continue
        for their_name, our_name in reversed(t2md.PIXART_NAMES):
            name = name.replace(our_name, their_name) if our_name else name
        if "embedder." in name:
            name = "adaln_single.emb." + name
        expected = original[name]
        if name.startswith("proj_out"):  # the noise half of every pixel of the patch
            expected = expected.unflatten(0, (2, 2, 8))[:, :, :4].flatten(0, 2)
        assert torch.equal(weight, expected), name
        copied += 1
    assert copied > 100
    x = inputs()
    assert t2md.predict_noise(teacher, *given(x)).shape == x["z"].shape


def test_size_conditions_are_required():
    model = T2MD(pattern="S", **TINY | dict(use_additional_conditions=True))
    x = inputs()
    with pytest.raises(ValueError, match="conditioned on size"):
        model(x["z"], x["text"], x["t"])


# -- 2. Mamba-2 and the scan ---------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_layer_equals_transformers(groups):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=groups, expand=2)
    theirs = Mamba2Mixer(Mamba2Config(**shape, chunk_size=16, conv_kernel=4), layer_idx=0)
    ours = Mamba2(32, d_state=8, expand=2, head_dim=16, n_groups=groups, chunk_size=16)
    ours.load_state_dict(theirs.state_dict())  # same names, same shapes
    shuffled(ours, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    u = torch.randn(2, 37, 32)
    weight = torch.randn(2, 37, 32)
    a, b = u.clone().requires_grad_(), u.clone().requires_grad_()
    out, expected = ours(a), theirs(b)
    assert relative(out, expected) < 1e-5
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert relative(a.grad, b.grad) < 1e-5
    for (name, p), (_, q) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters())):
        assert relative(p.grad, q.grad) < 1e-5, name


def scan_arguments(l=53, groups=1, dtype=torch.float64, decay=1.0):
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, dt, A = random(2, l, 4, 6), random(2, l, 4).exp() * decay, -random(4).exp()
    drawn = x, dt, A, random(2, l, groups, 5), random(2, l, groups, 5), random(4)
    return [v.to(dtype).requires_grad_() for v in drawn]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "chunk, at_once", [(1, 1), (1, 20), (7, 1), (7, 3), (16, 1), (16, 2), (16, 3), (53, 1), (64, 2)]
)
def test_ssd_is_the_recurrence(groups, chunk, at_once, monkeypatch):
    """Also with several chunks at once, as on a GPU; what is left of a block or a chunk comes last."""
    monkeypatch.setattr(t2md, "chunks_at_once", lambda *_: at_once)
    x, dt, A, B, C, D = arguments = scan_arguments(groups=groups)
    y, expected = ssd(x, dt, A, B, C, chunk, D=D), ssd_recurrence(x, dt, A, B, C, D=D)
    assert (y - expected).abs().max() < 1e-10
    weight = torch.randn_like(y)
    gradients = (torch.autograd.grad((out * weight).sum(), arguments) for out in (y, expected))
    for got, want in zip(*gradients):
        assert (got - want).abs().max() < 1e-10
    assert (ssd(x, dt, A, B, C, chunk) - ssd_recurrence(x, dt, A, B, C)).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strong_decay_stays_finite(dtype):
    x, dt, A, B, C, D = scan_arguments(dtype=dtype)
    dt = torch.full_like(dt, 100.0).requires_grad_()
    A = torch.full_like(A, -3.0).requires_grad_()  # dt * A = -300
    y = ssd(x, dt, A, B, C, 16, D=D)
    gradients = torch.autograd.grad(y.float().square().sum(), (x, dt, A, B, C, D))
    recurrent = ssd_recurrence(x, dt, A, B, C, D=D)
    assert all(torch.isfinite(values).all() for values in (y, recurrent, *gradients))
    assert relative(y.float(), recurrent.float()) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_mamba2_on_a_gpu_is_that_on_a_cpu(monkeypatch):
    """The convolution as shifted products, chunks at once, in value and gradient: a CPU taken for a GPU."""
    torch.manual_seed(0)
    layer, u = shuffled(Mamba2(32, d_state=8, head_dim=16), std=0.3), torch.randn(2, 300, 32)
    expected = layer(u)
    weights = list(layer.parameters())
    gradients = torch.autograd.grad(expected.square().sum(), weights)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(t2md, "AT_ONCE", 2 * 4 * 2 * 4 * (128**2 + 16 * 8))  # two chunks
    got = layer(u)
    assert relative(got, expected) < 1e-5
    for p, a, b in zip(weights, torch.autograd.grad(got.square().sum(), weights), gradients):
        assert relative(a, b) < 1e-4, p.shape


def test_ssd_compiles_to_one_graph(monkeypatch):
    monkeypatch.setattr(t2md, "chunks_at_once", lambda *_: 2)  # and a shorter one
    *tensors, D = scan_arguments()
    compiled = torch.compile(lambda: ssd(*tensors, 25, D=D), backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    y, expected = compiled(), ssd(*tensors, 25, D=D)
    assert (y - expected).abs().max() < 1e-10
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), tensors) for out in (y, expected))):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("broken", [False, True])
def test_kernels_of_a_build_without_a_compiler_are_imported(broken, tmp_path, monkeypatch, capsys):
    """As mamba-ssm's: Mamba-1's compiled scan is wanted at import and missing. Another failure is said."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"some_ssm_{broken}"
    works, breaks = (
        "import selective_scan_cuda\nscan = print",
        "raise RuntimeError('built for another torch')",
    )
    (tmp_path / f"{name}.py").write_text(breaks if broken else works)
    assert t2md.import_kernel("scan", name) is (None if broken else print)
    assert "selective_scan_cuda" not in sys.modules
    assert ("built for another torch" in capsys.readouterr().err) == broken
    assert t2md.import_kernel("scan", "no_such_package") is None and not capsys.readouterr().err


def test_initialisation_leaves_the_recurrence_alone():
    model = T2MD(pattern="SHW>", **TINY)
    for block in model.blocks[1:]:
        mamba = block.mixer.mamba
        dt = torch.nn.functional.softplus(mamba.dt_bias)
        assert dt.min() >= 1e-3 * 0.99 and dt.max() <= 0.1 * 1.01
        assert mamba.A_log.exp().min() >= 1 and mamba.A_log.exp().max() <= 16
        assert torch.equal(mamba.D, torch.ones_like(mamba.D)) and mamba.conv1d.weight.abs().max() > 0


# -- 3. scans ------------------------------------------------------------------------------------------------


def mixers(*directions):
    torch.manual_seed(0)
    first = MambaMixer(directions[0], 32, d_state=8, head_dim=16, chunk_size=8).double()
    result = [first]
    for d in directions[1:]:
        result.append(MambaMixer(d, 32, d_state=8, head_dim=16, chunk_size=8).double())
        result[-1].load_state_dict(first.state_dict())
    return result


def image_tokens(H, W, seed=1):
    return torch.randn(1, H * W, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def transposed(x, H, W):
    return x.unflatten(1, (H, W)).transpose(1, 2).flatten(1, 2)


def test_height_first_is_width_first_of_the_transpose():
    h, w = mixers("H", "W")
    x = image_tokens(5, 3)
    assert torch.allclose(h(x, (5, 3)), transposed(w(transposed(x, 5, 3), (3, 5)), 3, 5), atol=1e-12)
    down, right = mixers("v", ">")
    assert torch.allclose(down(x, (5, 3)), transposed(right(transposed(x, 5, 3), (3, 5)), 3, 5), atol=1e-12)


@pytest.mark.parametrize("direction", "HW")
def test_bidirectional_mixer_commutes_with_reversal(direction):
    (mixer,) = mixers(direction)
    x = image_tokens(5, 3)
    assert torch.allclose(mixer(x.flip(1), (5, 3)), mixer(x, (5, 3)).flip(1), atol=1e-12)


def test_backward_scan_is_the_forward_scan_reversed():
    right, left = mixers(">", "<")
    x = image_tokens(5, 3)
    assert torch.allclose(left(x, (5, 3)), right(x.flip(1), (5, 3)).flip(1), atol=1e-12)
    down, up = mixers("v", "^")
    assert torch.allclose(up(x, (5, 3)), down(x.flip(1), (5, 3)).flip(1), atol=1e-12)


def test_folding_changes_nothing():
    """What sample.py runs: fuse folded into out_proj."""
    model = shuffled(T2MD(pattern="SHW>", **TINY)).double().eval()
    x = inputs(dtype=torch.float64, size=(6, 10))
    want = t2md.predict_noise(model, *given(x))
    folded = sample.freeze(copy.deepcopy(model), "cpu", torch.float64)
    numbers, fewer = (sum(p.numel() for p in network.parameters()) for network in (model, folded))
    assert fewer == numbers - 2 * 48**2
    assert relative(t2md.predict_noise(folded, *given(x)), want) < 1e-12


def test_torch_compile_does_not_break_a_block():
    model = shuffled(T2MD(pattern="SHW>", **TINY)).eval().requires_grad_(False)
    want = t2md.predict_noise(model, *given(inputs()))
    model.compile_repeated_blocks(fullgraph=True, backend="eager")  # raises where a graph breaks
    assert relative(t2md.predict_noise(model, *given(inputs())), want) < 1e-6
    assert sum(isinstance(m, t2md.Block) and m._compiled_call_impl is not None for m in model.modules()) == 4


@pytest.mark.parametrize("direction", "><v^HWS")
def test_who_sees_whom(direction):
    """Which tokens move when token (2, 1) of a 5 x 3 grid changes: the later ones of the scan, or all."""
    mixer = t2md.Attention(32, 2).double() if direction == "S" else mixers(direction)[0]
    x = image_tokens(5, 3)
    moved = x.clone()
    moved[:, 2 * 3 + 1] += 1
    seen = (mixer(x, (5, 3)) - mixer(moved, (5, 3))).abs().amax(-1).view(5, 3) > 1e-14
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(3), indexing="ij")
    order = columns * 5 + rows if direction in "v^" else rows * 3 + columns
    here = order[2, 1]
    later, earlier, everyone = order >= here, order <= here, torch.ones(5, 3, dtype=bool)
    allowed = {">": later, "v": later, "<": earlier, "^": earlier}.get(direction, everyone)
    assert torch.equal(seen, allowed)


# -- 4. the paper's configuration ----------------------------------------------------------------------------


def test_paper_configuration():
    with torch.device("meta"):
        student, teacher = T2MD(), T2MD(pattern="S" * 28, out_channels=8, pos_embed="pixart")
        theirs = PixArtTransformer2DModel(sample_size=64, caption_channels=4096)
    pattern = student.config.pattern
    assert len(student.blocks) == 28 and [pattern.count(c) for c in "SHW"] == [4, 12, 12]

    def count(model):
        return sum(p.numel() for p in model.parameters())

    assert count(teacher) == count(theirs)
    assert round(count(student) / 1e9, 2) == 0.72 and round(count(teacher) / 1e9, 2) == 0.61
    mamba = student.blocks[1].mixer.mamba
    assert (mamba.d_state, mamba.chunk_size, mamba.head_dim) == (256, 256, 64)
    assert (mamba.n_heads, mamba.n_groups) == (36, 1)
    assert mamba.conv1d.kernel_size == (4,) and student.blocks[1].mixer.fuse.weight.shape == (1152, 1152)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(16, 16), (6, 22), (2, 2)])
def test_every_letter_at_any_size_and_dtype(dtype, size):
    torch.manual_seed(0)
    reference = shuffled(T2MD(pattern="SHW><v^", **TINY).double())
    model = copy.deepcopy(reference).to(dtype)
    x = inputs(size=size, dtype=dtype)
    out = model(x["z"], x["text"], x["t"], encoder_attention_mask=x["mask"]).sample
    assert out.dtype == dtype and out.shape == (2, 4, *size) and torch.isfinite(out).all()
    exact = reference(x["z"].double(), x["text"].double(), x["t"], encoder_attention_mask=x["mask"]).sample
    bound = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    assert relative(out.double(), exact) < bound


def test_padding_tokens_end_every_line_and_never_reach_the_output(tmp_path):
    padding = t2md.PaddingTokens(8)
    h = torch.randn(2, 4 * 5, 8)
    padded, grid = padding.add(h, (4, 5))
    removed, smaller = padding.remove(padded, grid)
    assert grid == (7, 8) and smaller == (4, 5) and torch.equal(removed, h)
    padded = padded.unflatten(1, grid)
    assert all(torch.equal(padded[0, y, 5:], padding.tokens) for y in range(7))
    assert all(torch.equal(padded[1, 4:, x], padding.tokens) for x in range(5))
    model = shuffled(T2MD(pattern="SHWv", padding_tokens=True, **TINY))
    x, seen = inputs(size=(8, 12)), []
    out = t2md.predict_noise(model, *given(x), visit=lambda n, *ends: seen.extend(ends))
    assert out.shape == x["z"].shape and {end.shape for end in seen} == {(2, 24, 48)}
    out.square().mean().backward()
    for p in (*model.padding.parameters(), *model.blocks[2].mixer.parameters()):
        assert p.grad is not None and p.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = t2md.load_backbone(str(tmp_path))
    assert again.config.padding_tokens and torch.equal(again.padding.tokens, model.padding.tokens)


def test_local_enhancement_starts_as_the_identity(tmp_path):
    shuffled(pixart()).save_pretrained(tmp_path)
    torch.manual_seed(0)
    plain = T2MD.from_pixart(str(tmp_path), "SW", d_state=8, head_dim=16)
    enhanced = T2MD.from_pixart(str(tmp_path), "SW", d_state=8, head_dim=16, local_enhancement=True)
    enhanced.load_state_dict(plain.state_dict(), strict=False)
    arguments = given(inputs(size=(8, 12)))
    with torch.no_grad():
        noise = t2md.predict_noise(plain, *arguments)
        assert torch.equal(t2md.predict_noise(enhanced, *arguments), noise)
        enhanced.enhance_last.conv.weight[:, 0, 0, 1] = 0.1  # sees the token above
        assert relative(t2md.predict_noise(enhanced, *arguments), noise) > 1e-3
    assert enhanced.enhance_first in train.STAGES["kd"].trains(enhanced)


def test_attention_to_mamba_initialisation(tmp_path):
    """C, B and x of a Mamba layer are the attention's queries, keys and values, head by head."""
    shuffled(pixart()).save_pretrained(tmp_path)
    student, teacher = T2MD.from_attention(str(tmp_path), "SW"), T2MD.from_pixart(str(tmp_path))
    mamba, attention, u = student.blocks[1].mixer.mamba, teacher.blocks[1].mixer, torch.randn(1, 5, 48)
    assert (mamba.n_heads, mamba.n_groups, mamba.d_state, mamba.head_dim) == (2, 2, 24, 24)
    _, xBC, _ = mamba.in_proj(u).split(mamba.split_sizes, dim=-1)
    v, k, q = (layer(u) - layer.bias for layer in (attention.to_v, attention.to_k, attention.to_q))
    assert torch.allclose(xBC, torch.cat([v, k, q], dim=-1), atol=1e-6)
    same = attention.to_out[0](u)  # two directions that agree pass through fuse as one
    assert torch.allclose(student.blocks[1].mixer.fuse(2 * mamba.out_proj(u)), same, atol=1e-6)
    assert t2md.predict_noise(student, *given(inputs())).isfinite().all()


@pytest.mark.parametrize("name, value", [
    ("pattern", "SXW"), ("pattern", ""), ("pos_embed", "rotary"),
    ("width", 50), ("head_dim", 17), ("beta_schedule", "cosine"),
])  # fmt: skip
def test_bad_configurations_are_refused(name, value):
    with pytest.raises(ValueError):
        T2MD(**{"pattern": "SH", **TINY, name: value})


def test_save_and_load(tmp_path):
    config = dict(pattern="SHW", pos_embed="pixart", beta_schedule="scaled_linear", vae="../vae")
    model = shuffled(T2MD(**config, **TINY))
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    x = inputs()
    for loaded in (T2MD.from_pretrained(tmp_path), t2md.load_backbone(str(tmp_path))):
        assert {name: loaded.config[name] for name in config} == config
        assert torch.equal(loaded(x["z"], x["text"], x["t"]).sample, model(x["z"], x["text"], x["t"]).sample)
    assert T2MD.from_pretrained(tmp_path, pos_embed="centered").config.pos_embed == "centered"


def test_gradient_checkpointing_changes_nothing():
    model = shuffled(T2MD(pattern="SHW", **TINY))
    x = inputs()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        seen = []
        out = t2md.predict_noise(model, *given(x), lambda n, a, b: seen.append(b))
        (out.square().mean() + sum(m.square().mean() for m in seen)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert len(seen) == 3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


# -- 5. the centred embedding --------------------------------------------------------------------------------


@pytest.mark.parametrize("H, W", [(32, 32), (33, 33), (96, 168), (168, 96), (7, 5)])
def test_centred_coordinates(H, W):
    y, x = t2md.centered_coordinates(H, W, 32, 1)
    for axis, n in ((y, H), (x, W)):
        assert torch.allclose(axis, -axis.flip(0))  # symmetric about the centre, odd sizes have a token on it
        assert torch.allclose(axis.diff(), torch.full((n - 1,), 32 / max(H, W), dtype=torch.float64))
    long, step = y if H >= W else x, 32 / max(H, W)
    ends = torch.stack([long[0] - step / 2, long[-1] + step / 2])
    assert torch.allclose(ends, torch.tensor([-16.0, 16.0], dtype=torch.float64))  # whatever the size


def test_centred_coordinates_are_consistent_between_sizes():
    def at(h, w):
        return t2md.centered_coordinates(h // 16, w // 16, 32, 1)

    (_, x512), (_, x1024), (ywide, xwide) = at(512, 512), at(1024, 1024), at(1536, 2688)
    assert torch.allclose(x1024.view(-1, 2).mean(1), x512)  # a token at 512 px is the mean of its two at 1024
    assert torch.isclose(xwide[0] - xwide.diff()[0] / 2, x512[0] - x512.diff()[0] / 2)
    assert torch.isclose(ywide.max() / xwide.max(), torch.tensor(95 / 167, dtype=torch.float64))
    _, teachers = t2md.pixart_coordinates(32, 32, 32, 1)
    assert torch.isclose(x512.diff()[0], teachers.double().diff()[0])


def test_embedding_puts_x_first():
    e = t2md.grid_embedding(torch.zeros(3), torch.arange(4.0), 16).view(3, 4, 16)
    assert torch.equal(e[0], e[2]) and torch.equal(e[0, 0, 8:], e[0, 1, 8:])
    assert not torch.equal(e[0, 0, :8], e[0, 1, :8])


# -- 6. losses -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    teacher = shuffled(T2MD(pattern="S" * 7, pos_embed="pixart", **TINY | dict(out_channels=8)), 1)
    student = shuffled(T2MD(pattern="SHWHWHW", pos_embed="pixart", **TINY), 2)
    return teacher.requires_grad_(False), student


def test_forcing_loss_by_hand(pair):
    teacher, student = pair
    arguments, taken, own = given(inputs()), [], []
    t2md.predict_noise(teacher, *arguments, lambda n, a, b: taken.append((a, b)))
    t2md.predict_noise(student, *arguments, lambda n, a, b: own.append((a, b)))
    ours = [student.blocks[n].mixer(taken[n][0], (8, 8)) for n in range(7)]
    expected = sum((ours[n] - taken[n][1]).square().mean() for n in range(1, 7))
    got = t2md.forcing_loss(student, teacher, *arguments)
    assert torch.isclose(got, expected, rtol=1e-5)
    wrong = sum((own[n][1] - taken[n][1]).square().mean() for n in range(1, 7))
    assert not torch.isclose(got, wrong, rtol=1e-2)  # not the student's own inputs


def test_kd_loss_by_hand(pair):
    teacher, student = pair
    x = inputs()
    noise = torch.randn_like(x["z"])
    outputs, predicted = ([], []), []
    for model, seen in zip(pair, outputs):
        how = dict(encoder_attention_mask=x["mask"], visit=lambda n, a, b: seen.append(b))
        predicted.append(model(x["z"], x["text"], x["t"], **how).sample[:, :4])
    mse, soft = (predicted[1] - noise).square().mean(), (predicted[1] - predicted[0]).square().mean()
    mixer = sum((a - b).square().mean() for a, b in zip(*outputs)) / 7
    loss, terms = t2md.kd_loss(student, teacher, *given(x), noise)
    assert torch.isclose(loss, mse + 0.5 * soft + 0.2 * mixer, rtol=1e-5)
    assert torch.isclose(terms["mse"], mse) and torch.isclose(terms["soft"], soft)
    assert torch.isclose(t2md.mse_loss(noise, predicted[1]), mse)
    assert torch.isclose(t2md.soft_loss(predicted[0], predicted[1]), soft)
    for value in (terms["mixer"], t2md.mixer_loss(*outputs)):
        assert torch.isclose(value, mixer, rtol=1e-5)
    assert loss.requires_grad and not any(t.requires_grad for t in terms.values())


def peak_of_saved_activations(work):
    """The most bytes that autograd holds for backward at any time while `work` runs."""
    alive, peak = weakref.WeakSet(), 0

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        nonlocal peak
        held = Held(tensor)
        alive.add(held)
        peak = max(peak, sum(h.tensor.nbytes for h in alive))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        work()
    return peak


def test_streamed_forcing_has_the_gradients_of_the_sum_and_memory_of_one_layer():
    x, peaks = inputs(batch=1), {}
    for depth in (7, 28):
        teacher = T2MD(pattern="S" * depth, pos_embed="pixart", **TINY).requires_grad_(False)
        student = T2MD(pattern="SHWHWHW" * (depth // 7), pos_embed="pixart", **TINY)
        arguments = (student, teacher, *given(x))

        def summed():
            t2md.forcing_loss(*arguments).backward()

        def streamed():
            t2md.forcing_loss(*arguments, backward=torch.Tensor.backward)

        gradients = []
        for work in (summed, streamed):
            student.zero_grad()
            peaks[depth, work.__name__] = peak_of_saved_activations(work)
            gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys() and all(".mixer." in name for name in gradients[0])
        assert all(torch.allclose(gradients[0][n], gradients[1][n], atol=1e-7) for n in gradients[0])
    assert peaks[28, "streamed"] <= 1.01 * peaks[7, "streamed"]
    assert peaks[28, "summed"] > 3.5 * peaks[7, "summed"]  # the measure does see depth


@pytest.mark.parametrize("stage", ["forcing", "kd", "adapt"])
def test_what_a_step_moves(pair, stage):
    teacher, student = pair[0], copy.deepcopy(pair[1])
    student.requires_grad_(False)
    for module in train.STAGES[stage].trains(student):
        module.requires_grad_(True)
    before, teacher_before = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    plan = train.plan_for(stage, train.parse_arguments(["--stage", stage])) | dict(warmup=1, decay=0.0)
    optimizer, x = train.Optimizer(student, plan), inputs()
    arguments = given(x)
    if stage == "forcing":
        t2md.forcing_loss(student, teacher, *arguments, backward=torch.Tensor.backward)
    elif stage == "kd":
        t2md.kd_loss(student, teacher, *arguments, torch.randn_like(x["z"]))[0].backward()
    else:
        t2md.mse_loss(torch.randn_like(x["z"]), t2md.predict_noise(student, *arguments)).backward()
    optimizer.step(0)
    after = student.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    within = {"forcing": (".mamba.", ".fuse."), "kd": (".mixer.",), "adapt": ("",)}[stage]
    assert moved == {name for name in before if any(part in name for part in within)}
    assert all(torch.equal(teacher_before[n], w) for n, w in teacher.state_dict().items())


def test_what_is_new_learns_at_its_own_rate(pair):
    student = copy.deepcopy(pair[1]).requires_grad_(True)
    stage = train.STAGES["kd"]
    optimizer = train.Optimizer(student, stage.t2md, stage.faster(student))
    groups = [group for part in optimizer.parts for group in part.param_groups]
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, p in student.named_parameters():
        assert rates[id(p)] == (1e-4 if ".mamba." in name or ".fuse." in name else 2e-5), name
    ends = [student.patch_embed, student.caption_projection, student.proj_out]
    assert train.STAGES["adapt"].faster(student) == ends


def test_the_shapes_world_weighs_errors_by_their_noise(pair):
    """By 1 / sqrt(SNR), in [1, 8]; the SNR of a shape grows with its area and amplitude. The paper's config
    does not."""
    student, x = copy.deepcopy(pair[1]).requires_grad_(False), inputs()
    noise, t = torch.randn_like(x["z"]), torch.tensor([300, 900])
    schedule, losses = train.noise_schedule(student), []
    batch = dict(z0=x["z"], noise=noise, t=t, text=x["text"], mask=x["mask"])
    for signal in (None, 1.0, 0.5):
        train.stage_terms("adapt", student, None, schedule, batch, losses.append, signal)
    z_t = schedule.add_noise(x["z"], noise, t)
    predicted = t2md.predict_noise(student, z_t, t, x["text"], x["mask"])
    errors, alpha_bar = (predicted - noise).square().mean((1, 2, 3)), schedule.alphas_cumprod[t]
    for loss, signal in zip(losses[1:], (1.0, 0.5)):
        snr = signal**2 * alpha_bar / (1 - alpha_bar)
        weights = torch.tensor([min(max(float(r) ** -0.5, 1.0), 8.0) for r in snr])
        assert torch.allclose(loss, (weights * errors).mean(), rtol=1e-5)
    assert torch.allclose(losses[0], errors.mean(), rtol=1e-5) and losses[0] < losses[1] < losses[2]
    weighed = [name for name, stage in train.STAGES.items() if stage.shapes.get("snr_weight")]
    assert weighed == ["teacher", "adapt", "hires2"]
    assert not any(stage.t2md.get("snr_weight") for stage in train.STAGES.values())


@pytest.mark.parametrize("stage", ["forcing", "kd", "adapt"])
def test_training_hands_size_conditions_to_weights_that_want_them(tmp_path, stage):
    shuffled(pixart(128)).save_pretrained(tmp_path)
    teacher = T2MD.from_pixart(str(tmp_path)).requires_grad_(False)
    student = T2MD.from_pixart(str(tmp_path), pattern="SW", d_state=8, head_dim=16)
    x = inputs()
    batch = dict(z0=x["z"], noise=torch.randn_like(x["z"]), t=x["t"], text=x["text"], mask=x["mask"])
    schedule = train.DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2)

    def terms(**conditions):
        return train.stage_terms(stage, student, teacher, schedule, batch, lambda loss: None, **conditions)

    sizes = (128, 128), (128, 128), (64, 2048)
    one, again, other = (terms(**sample.size_conditions(student, *size, 2)) for size in sizes)
    assert one == again and one.keys() == other.keys() and all(one[name] != other[name] for name in one)
    with pytest.raises(ValueError, match="conditioned on size"):
        terms()


def test_bfloat16_holds_over_4096_tokens(tmp_path):
    """As sampled with --dtype bfloat16: near float32, and finite with activations a thousand times larger."""
    model = shuffled(T2MD(pattern="SHW>", **TINY)).eval()
    model.save_pretrained(tmp_path)
    exact, rounded = (sample.load_denoiser(str(tmp_path), dtype=d) for d in (torch.float32, torch.bfloat16))
    mamba = rounded.blocks[1].mixer.mamba
    assert mamba.A_log.dtype == mamba.dt_bias.dtype == torch.float32
    assert mamba.in_proj.weight.dtype == torch.bfloat16
    x = inputs(1, size=(128, 128))
    z, text = x["z"].bfloat16(), x["text"].bfloat16()
    with torch.no_grad():
        want = t2md.predict_noise(exact, *given(x))
        got = t2md.predict_noise(rounded, z, x["t"], text, x["mask"]).float()
        large = t2md.predict_noise(rounded, 1000 * z, x["t"], 1000 * text, x["mask"])
    assert relative(got, want) < 0.03 and torch.isfinite(large).all()


# -- 7. the sampler is diffusers' ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    """A tiny VAE with a shift and a scale of its own, and a tiny T5 with tokenizer, saved in a pipeline's
    layout."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    tokenizer = parts.new_tokenizer()
    encoder = parts.new_text_encoder(len(tokenizer))
    kinds = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    shape = dict(layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False, scaling_factor=0.7)
    AutoencoderKL(3, 3, *kinds, (8, 8, 8, 8), **shape).save_pretrained(folder / "vae")
    encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return str(folder)


@pytest.mark.parametrize("pipeline_class, pattern, out_channels, schedule", [
    (PixArtAlphaPipeline, "SHW", 4, "scaled_linear"),
    (PixArtAlphaPipeline, "SS", 8, "linear"),
    (PixArtSigmaPipeline, "SHW", 4, "scaled_linear"),
])  # fmt: skip
def test_diffusers_pipeline_gives_our_latents(components, pipeline_class, pattern, out_channels, schedule):
    torch.manual_seed(0)
    shape = TINY | dict(caption_width=64, out_channels=out_channels)
    model = shuffled(T2MD(pattern=pattern, beta_schedule=schedule, **shape)).eval()
    text_encoder, vae = TextEncoder(components), VAE(components)
    parts = dict(tokenizer=text_encoder.tokenizer, text_encoder=text_encoder.model, vae=vae.model)
    pipeline = pipeline_class(**parts, transformer=model, scheduler=sample.make_scheduler(schedule))
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a photo of a red star", "a photo of two circles"]
    noise = torch.cat([sample.noise_for(s, 4, 16, 16) for s in (1, 2)])
    how = dict(negative_prompt="a square", num_inference_steps=5, guidance_scale=3.0)
    how |= dict(use_resolution_binning=False, clean_caption=False, latents=noise.clone())
    theirs = pipeline(prompts, output_type="latent", **how).images
    text, negative = text_encoder(prompts), text_encoder(["a square"] * 2)
    ours = sample.denoise(model, text, negative, noise.clone(), steps=5, guidance=3.0)
    assert relative(ours, theirs) < 1e-4
    image = pipeline(prompts, output_type="pt", **how).images
    assert torch.allclose((vae.decode(ours) + 1) / 2, image, atol=1e-4)


def test_upsample_guidance():
    """Its timestep by brute force; theta 0 is plain sampling; theta 1 puts the small image's prediction
    under the large one's."""
    scheduler = sample.make_scheduler("scaled_linear")
    abar = scheduler.alphas_cumprod.double()
    snr = [float(a / (1 - a)) for a in abar]
    for m, t in ((2, 999), (2, 700), (3, 850), (4, 0), (4, 999)):
        nearest = min(range(t + 1), key=lambda s: abs(snr[s] - m**2 * snr[t]))
        assert int(sample.matched_timestep(abar, t, m)) == nearest
    noise, z_t = torch.randn(2, 4, 8, 12), torch.randn(2, 4, 8, 12)
    seen = []

    def predict(z, t):
        return (seen.append((z.shape, int(t))), 0.3 * z + float(t) / 1000)[1]

    assert torch.equal(sample.upsample_guidance(predict, z_t, 900, noise, abar, 2, theta=0.0), noise)
    guided = sample.upsample_guidance(predict, z_t, 900, noise, abar, 2)
    assert seen[-1] == ((2, 4, 4, 6), int(sample.matched_timestep(abar, 900, 2)))
    pool, power = torch.nn.functional.avg_pool2d, (abar[900] + (1 - abar[900]) / 4).float()
    small = 0.3 * pool(z_t, 2) / power.sqrt() + seen[-1][1] / 1000
    assert torch.allclose(pool(guided, 2), small / 2, atol=1e-5)
    assert sample.upsample_guidance(predict, z_t, 699, noise, abar, 2) is noise
    pure = torch.randn(64, 4, 16, 16)  # as z_t at t = 999: pooled and scaled it is again of unit variance
    sample.upsample_guidance(lambda z, t: (seen.append(z.std()), z)[1], pure, 999, pure, abar, 2)
    assert abs(seen[-1] - 1) < 0.02


def test_text_encoder_agrees_and_truncates(components, capsys):
    encoder = TextEncoder(components)
    features, mask = encoder(["a photo of a star", "a photo of a red star and a blue cross"])
    assert features.shape[:2] == mask.shape and mask.sum(1).tolist() == [6, 11]
    alone, _ = encoder(["a photo of a star"])
    assert torch.allclose(features[0, :6], alone[0], atol=1e-5)
    assert capsys.readouterr().err == ""
    features, _ = encoder(["star " * 500])
    assert features.shape[1] == 120 and "truncated to the 120" in capsys.readouterr().err


def test_captions_are_prepared_as_diffusers_does(components):
    """Lower-cased and stripped: capitals and spaces change nothing, in our encoder or in the pipeline."""
    encoder = TextEncoder(components)
    plain, loud = encoder(["a photo of a red star"]), encoder(["  A Photo of a RED star \n"])
    assert torch.equal(plain[0], loud[0]) and torch.equal(plain[1], loud[1])
    pipeline = PixArtAlphaPipeline(encoder.tokenizer, encoder.model, VAE(components).model, None, None)
    how = dict(do_classifier_free_guidance=False, clean_caption=False)
    theirs, mask, *_ = pipeline.encode_prompt("  A Photo of a RED star \n", **how)
    assert torch.allclose(loud[0], theirs[:, : int(mask.sum())], atol=1e-5)


def test_a_large_preview_leaves_encoding_as_it_was(components):
    """Each call says for itself whether it tiles, and neither part runs in an autocast around it."""
    vae, encoder, x = VAE(components), TextEncoder(components), torch.rand(1, 3, 256, 256) * 2 - 1
    before, _ = vae.moments(x)
    vae.decode(torch.randn(1, 4, 16, 16), tile=64)
    assert torch.equal(vae.moments(x)[0], before)
    features, _ = encoder(["a photo of a star"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.moments(x)[0], before)
        assert torch.equal(encoder(["a photo of a star"])[0], features)


def test_what_cannot_be_loaded_says_why(components, tmp_path):
    """Nothing there is one error, something broken another; and both places that were tried are named."""
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        VAE(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no vae could be loaded"):
        VAE(str(tmp_path))
    shutil.copytree(components, tmp_path / "broken")
    (tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match="no vae could be loaded from .*broken"):
        VAE(str(tmp_path / "broken"))
    loader = mock.Mock()
    loader.from_pretrained.side_effect = [OSError("no vae/ inside"), OSError("nor at the top")]
    with pytest.raises(FileNotFoundError, match="no vae/ inside, and without a subfolder: nor at the top"):
        t2md.load_part(loader, "some/repository", "vae")


def test_vae_agrees_with_diffusers(components):
    vae = VAE(components)
    x = torch.rand(1, 3, 64, 96) * 2 - 1
    posterior = vae.model.encode(x).latent_dist
    mean, std = vae.moments(x)
    assert torch.allclose(mean, posterior.mean * 0.7) and torch.allclose(std, posterior.std * 0.7)
    assert mean.shape == (1, 4, 8, 12)
    assert torch.allclose(vae.decode(mean), vae.model.decode(posterior.mean).sample.clamp(-1, 1), atol=1e-5)
    assert not any(p.requires_grad for p in vae.model.parameters())


def test_the_text_encoder_is_gone_before_the_denoiser_works(monkeypatch, tmp_path):
    """And what it said of each caption stands in for it, padded and masked."""
    loaded, gone, load_parts = [], [], sample.load_parts

    def load(*arguments):
        parts = load_parts(*arguments)
        loaded.append(weakref.ref(parts[1].model))
        return parts

    def denoise(model, text, negative, latents, *_, **__):
        gc.collect()
        gone.append(loaded[0]() is None)
        return latents

    monkeypatch.setattr(sample, "load_parts", load)
    monkeypatch.setattr(sample, "denoise", denoise)
    monkeypatch.setattr(sys, "argv", ["sample.py", "a photo of a star", "--out", str(tmp_path)])
    sample.main()
    assert gone == [True]
    encoder = TextEncoder(os.path.join(HERE, "assets", "text_encoder"))
    captions = ["a photo of a red circle and a blue square", "", "a photo of a star"]
    features, mask = encoder(captions)
    looked_up, known = sample.encode_first(encoder, captions)(captions)
    assert torch.equal(mask, known) and torch.allclose(features * mask[..., None], looked_up, atol=1e-5)


# -- 8. seeds, and which way imports run ---------------------------------------------------------------------


def test_imports_run_one_way():
    """t2md <- sample <- data <- train <- claims: whoever reads one needs only what stands before it."""
    order, seen = ["t2md", "sample", "data", "train", "claims"], set()
    paths = [path for room in (".", "data", "claims") for path in pathlib.Path(HERE, room).glob("*.py")]
    for path in paths:
        room = path.parent.name if path.parent.name in order else path.stem
        if path.name.startswith("test_"):
            continue
        nodes, names = list(ast.walk(ast.parse(path.read_text()))), set()
        names |= {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        for other in {name.split(".")[0] for name in names} & set(order):
            earlier = order.index(other) < order.index(room)
            assert earlier or other == room in ("data", "claims"), f"{path} imports {other}"
            seen.add((room, other))
    assert {("sample", "t2md"), ("data", "sample"), ("train", "data"), ("claims", "train")} <= seen


def test_muon_is_torchs():
    """In value, from the same gradients, but for torch's rounding to bfloat16."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((24, 40), (24, 40), (40, 24), (16, 16))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    muon = train.Muon([dict(params=ours, lr=0.02, weight_decay=0.1)])
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        muon.step()
        reference.step()
    for a, b, before in zip(ours, theirs, start):
        assert relative(a - before, b - before) < 0.02


def test_files_keep_the_decays_in_float32(tmp_path):
    """Whatever the dtype of the rest: rounded, they would change what a long sequence remembers."""
    model = shuffled(T2MD(pattern="SHW", **TINY))
    train.save_model(model, str(tmp_path), torch.float16)
    saved = safetensors.torch.load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    precise = {name.split(".")[-1] for name, w in saved.items() if w.dtype == torch.float32}
    assert precise == {"A_log", "dt_bias"}
    again = t2md.load_backbone(str(tmp_path))
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert torch.equal(again.blocks[1].mixer.mamba.A_log, model.blocks[1].mixer.mamba.A_log)


def test_shares_are_of_the_images():
    """hires1: four fifths of the images, not of the batches, are of twice the size."""
    args, plan = train.parse_arguments(["--stage", "hires1"]), train.STAGES["hires1"].shapes
    multiples, images, turns = train.sizes_of_steps("hires1", args, plan | dict(steps=4000))
    seen = {m: sum(n for k, n in zip(multiples, images) if k == m) for m in (1, 2)}
    assert set(zip(multiples, images)) == {(1, 32), (2, 8)} and abs(seen[2] / sum(seen.values()) - 0.8) < 0.02
    assert [turn for m, turn in zip(multiples, turns) if m == 2] == list(range(multiples.count(2)))


def test_the_base_size_is_the_teachers(tmp_path):
    """PixArt's 1024 model: hires1 trains at 2048 and is sampled there, at the coordinates that it knows."""
    shuffled(pixart(128)).save_pretrained(tmp_path / "teacher")
    student = dict(pattern="SW", d_state=8, head_dim=16, pos_embed="centered")
    T2MD.from_pixart(str(tmp_path / "teacher"), **student).save_pretrained(tmp_path / "out" / "adapt")
    args = train.parse_arguments(["--config", "t2md", "--stage", "hires1", "--out", str(tmp_path / "out")])
    model = train.start_model("hires1", args)
    assert model.conditioned_on_size
    assert model.config.sample_size == 256 and model.config.interpolation_scale == 4
    assert model.config.sample_size * 8 // max(train.STAGES["hires1"].sizes) == 1024


def test_bfloat16_says_where_it_is_slower(monkeypatch, capsys):
    clock = iter([0, 1] * 10 + [0, 3] * 10)  # float32 takes a second each, bfloat16 three
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    train.say_if_slower()
    assert "multiply 3.0 times slower than in float32" in capsys.readouterr().out


def test_previews_are_of_the_datas_captions(tmp_path):
    """The first ones, or --example-prompts; and the teacher is asked once, its pictures are kept for later
    stages."""
    args = train.parse_arguments(["--stage", "kd", "--examples", "2", "--out", str(tmp_path)])
    prompts = ["a harbour at night", "two dogs", "a hill"]
    assert train.example_captions(args, prompts) == prompts[:2]
    (tmp_path / "own.txt").write_text("a lighthouse\n")
    args.example_prompts = str(tmp_path / "own.txt")
    assert train.example_captions(args, prompts) == ["a lighthouse"]
    drawn = Image.new("RGB", (64, 64), "red")
    with mock.patch.object(sample, "generate", return_value=[drawn]) as generate:
        rows = [
            train.teacher_row(stage, args, teacher, None, None, ["a lighthouse"], None, 64)
            for stage, teacher in (("kd", "teacher"), ("kd", "teacher"), ("adapt", None))
        ]
    assert generate.call_count == 1 and all(row[0].getpixel((5, 5)) == (255, 0, 0) for row in rows)


def test_what_runs_is_said(monkeypatch, capsys):
    """flash-attn takes half precision alone, and not attention that is kept in float32."""
    monkeypatch.setattr(t2md, "flash_attention", print)
    t2md.say_once.cache_clear()
    model = T2MD(pattern="SW", **TINY)

    def said(dtype, precise):
        model.blocks[0].mixer.float32 = precise
        t2md.say_once.cache_clear()
        t2md.say_kernels(model, types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype))
        return capsys.readouterr().err

    assert "self-attention by flash-attn" in said(torch.bfloat16, False)
    for dtype, precise in ((torch.float32, False), (torch.bfloat16, True)):
        assert "self-attention by PyTorch SDPA" in said(dtype, precise)


def test_what_does_not_decay():
    """mamba-ssm marks A_log, D and dt_bias; biases, norms and tables are left alone too."""
    model = T2MD(pattern="SHW", padding_tokens=True, **TINY)
    optimizer = train.Optimizer(model, train.STAGES["adapt"].t2md)
    groups = [group for part in optimizer.parts for group in part.param_groups]
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    still = {name for name, p in model.named_parameters() if decays[id(p)] == 0}
    of_mamba = ("A_log", "D", "dt_bias", "norm.weight", "conv1d.bias")
    assert {"blocks.1.mixer.mamba." + name for name in of_mamba} <= still
    assert {"blocks.0.scale_shift_table", "scale_shift_table", "padding.tokens", "proj_out.bias"} <= still
    for name, p in model.named_parameters():
        assert name in still or name.endswith("weight") and p.ndim > 1


def test_draws_depend_on_their_place_alone():
    values = {(s, i): torch.rand(3, generator=sample.draw(0, "kd", s, i)) for s in range(3) for i in range(3)}
    again = torch.rand(3, generator=sample.draw(0, "kd", 2, 1))
    assert torch.equal(values[2, 1], again)
    assert len({tuple(v.tolist()) for v in values.values()}) == 9
    assert not torch.equal(again, torch.rand(3, generator=sample.draw(1, "kd", 2, 1)))


# -- 9. the commands -----------------------------------------------------------------------------------------


def fingerprint(*folders):
    """Of every byte of the model files in some folders."""
    paths = [path for folder in folders for path in sorted(pathlib.Path(folder).iterdir())]
    kept = [path for path in paths if path.suffix in (".safetensors", ".json")]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def small_picture(record, size, rng):
    return draw_shapes(record, size // 4, rng)


@functools.cache
def make_chain():
    folder = tempfile.TemporaryDirectory()
    flags = f"--stage all --steps 2 --batch-size 2 --examples 1 --out {folder.name}"
    one_step = mock.patch.object(sample, "generate", functools.partial(sample.generate, steps=1))
    small = mock.patch.object(parts, "draw_shapes", small_picture)  # 256 of them standardise a VAE's latents
    with one_step, small:
        result = call("train.py", *flags.split(), anew=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def chain():
    """The whole path in miniature, from no weights at all, every stage a few steps; made once for all test
    files."""
    return make_chain().name


def raw_weights(out, stage):
    return torch.load(os.path.join(out, stage, "training_state.pt"), weights_only=True)["network"]


def test_the_chain_trains_what_it_should(chain):
    for stage in ("vae", "vae_adapt", "text_encoder", "text_encoder_adapt", *train.CHAIN):
        log = read_log(os.path.join(chain, stage))
        assert [entry["step"] for entry in log] == [0, 1] and not any(entry["skipped"] for entry in log)
    for stage in train.CHAIN:
        rows = 3 if stage == "hires1" else 2  # it trains at two sizes
        assert Image.open(os.path.join(chain, stage, "step-000002.png")).size == (128, rows * 128)
        config = json.load(open(os.path.join(chain, stage, "config.json")))
        adapted = stage in ("adapt", "hires1", "hires2")
        assert config["pattern"] == ("SSSSSSS" if stage == "teacher" else "SHWHWHW")
        assert config["pos_embed"] == ("centered" if adapted else "pixart")
        assert config["beta_schedule"] == ("scaled_linear" if adapted else "linear")
        assert config["vae"] == ("../vae_adapt" if adapted else "../vae")
        assert config["text_encoder"] == ("../text_encoder_adapt" if adapted else "../text_encoder")
        assert config["sample_size"] == 16 * {"hires1": 2, "hires2": 4}.get(stage, 1)
        model = T2MD.from_pretrained(os.path.join(chain, stage))
        assert model.base / model.interpolation_scale == 8 and not model.conditioned_on_size
    teacher = T2MD.from_pretrained(os.path.join(chain, "teacher")).state_dict()
    weights = {stage: raw_weights(chain, stage) for stage in train.CHAIN}
    exported = {stage: T2MD.from_pretrained(os.path.join(chain, stage)).state_dict() for stage in train.CHAIN}
    for name, weight in weights["forcing"].items():
        if ".mamba." not in name and ".fuse." not in name:
            assert torch.equal(weight, teacher[name]), name
    for name, weight in weights["kd"].items():
        assert torch.equal(weight, exported["forcing"][name]) == (".mixer." not in name), name
    for before, after in zip(("kd", "adapt", "hires1"), ("adapt", "hires1", "hires2")):
        assert not any(torch.equal(w, exported[before][name]) for name, w in weights[after].items())


def test_adapt_keeps_the_teachers_embedding_where_told(chain):
    for flags, embedding in (([], "centered"), (["--pos-embed", "pixart"], "pixart")):
        args = train.parse_arguments(["--stage", "adapt", "--out", chain, *flags])
        assert train.start_model("adapt", args).config.pos_embed == embedding
        assert train.made_with("adapt", args).get("pos_embed", "centered") == embedding  # no folder has both


def test_kd_that_was_cut_off_goes_on(chain, tmp_path):
    """By Ctrl-C here, in the middle of a step; claims/crashes.py has kill -9, and compares all that is left.
    What kd only reads stays as it was; finished, it is not begun again, nor taken for another row's."""
    frozen = [os.path.join(chain, name) for name in ("teacher", "vae", "text_encoder")]
    before = fingerprint(*frozen)
    copy_parts(chain, tmp_path, "vae text_encoder forcing")
    flags = f"--stage kd --steps 6 --batch-size 2 --save-every 2 --examples 0 --teacher {frozen[0]}".split()
    command = ["train.py", *flags, "--out", str(tmp_path)]
    effects = [*[mock.DEFAULT] * 3, KeyboardInterrupt]
    with mock.patch.object(train, "stage_terms", mock.Mock(wraps=train.stage_terms, side_effect=effects)):
        refused(call(*command), "stopped; the same command continues from the last checkpoint")
    assert train.saved_step(tmp_path / "kd") == (2, 6) and len(read_log(tmp_path / "kd")) == 3
    last = call(*command)
    assert last.returncode == 0 and "kd: continuing after step 2 of 6" in last.stdout, last.stderr
    assert [line["step"] for line in read_log(tmp_path / "kd")] == list(range(6))
    assert train.saved_step(tmp_path / "kd") == (6, 6) and fingerprint(*frozen) == before
    assert "kd: finished" in call(*command).stdout
    refused(
        call(*command, "--init", "teacher"),
        "kd was made with init forcing, not teacher; give the same again, or another folder",
    )


def test_a_stage_goes_on_with_what_it_was_begun_with(chain, tmp_path, capsys):
    """Or says so: a finished kd is not passed off as another row's, nor a student as one of another shape or
    seed; and kd does not take forcing done with another teacher or VAE."""
    other = tmp_path / "other"
    copy_parts(chain, tmp_path, "vae text_encoder teacher forcing kd")
    copy_parts(chain, other, "teacher vae text_encoder")
    noisy = shuffled(t2md.load_backbone(str(other / "teacher")))
    noisy.save_pretrained(other / "teacher")
    shuffled(VAE(str(other / "vae")).model).save_pretrained(other / "vae")

    def plan(flags=""):
        command = f"--stage kd --steps 2 --batch-size 2 --out {tmp_path} {flags}"
        return train.work_out(train.parse_arguments(command.split()))

    assert plan() == [] and "forcing" not in capsys.readouterr().out
    of_forcing_too = ["--pattern HWHWHWH", f"--teacher {other}/teacher", f"--vae {other}/vae"]
    changes = ["--seed 1", "--init llama", "--soft-weight 0", "--mixer-weight 1", "--padding-tokens"]
    changes += ["--local-enhancement", "--data elsewhere", "--lr 1", "--batch-size 5", "--dtype bfloat16"]
    for flags in (*changes, "--timesteps 500 100", *of_forcing_too):
        what = flags.split()[0][2:].replace("-", "_")
        with pytest.raises(ValueError, match=f"kd was made with {what} .*, not .*; give the same again"):
            plan(flags)
    shutil.rmtree(tmp_path / "kd")
    assert plan("--seed 1 --data elsewhere --lr 1") == ["kd"]  # these of kd itself matter, not of forcing
    for flags in of_forcing_too:
        with pytest.raises(ValueError, match=f"forcing was made with {flags.split()[0][2:]} "):
            plan(flags)
    os.remove(tmp_path / "forcing" / "made_with.json")
    assert plan() == ["kd"] and "forcing does not say with which" in capsys.readouterr().out


TWO_STAGES = """
import sys
sys.path.insert(0, {here!r})
import train
for stage in ("forcing", "kd"):
    train.STAGES[stage].shapes.update(muon=False, pictures=15)
for command in sys.argv[1:]:
    sys.argv = ["train.py", *command.split()]
    train.main()
"""
THREE_STEPS = "--stage {stage} --steps 3 --batch-size 5 --lr 1e-3 --examples 0 --out {out}"


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """What two nodes of torchrun, of one process each, leave and say that train forcing, kd, and forcing for
    200 steps, in which one is told to stop; started as the README has it for several machines."""
    chain, root = make_chain().name, tmp_path_factory.mktemp("two")
    script, log = root / "train_with_adam.py", root / "stopped" / "forcing" / "log.jsonl"
    script.write_text(TWO_STAGES.format(here=HERE))
    copy_parts(chain, root / "forcing", "vae text_encoder teacher")
    copy_parts(chain, root / "kd", "vae text_encoder teacher forcing")
    copy_parts(chain, root / "stopped", "vae text_encoder teacher")
    commands = [THREE_STEPS.format(stage=stage, out=root / stage) for stage in ("forcing", "kd")]
    commands += [f"--stage forcing --steps 200 --batch-size 2 --examples 0 --out {root}/stopped"]
    launch = f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-id t2md"
    launch += " --rdzv-backend c10d --rdzv-endpoint localhost:29531 --node-rank"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)
    starts = [[*launch.split(), str(node), str(script), *commands] for node in range(2)]
    nodes = [subprocess.Popen(start, **pipes) for start in starts]
    while nodes[0].poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.1)
    nodes[1].terminate()
    errors = "".join(node.communicate(timeout=120)[1] for node in nodes)
    return root, errors, [node.returncode for node in nodes]


def test_two_nodes_told_to_stop_save_and_exit(two_nodes):
    """By torchrun's SIGTERM to one of them: both finish the step they are in, and the first process saves
    it."""
    root, errors, codes = two_nodes
    assert "forcing: told to stop; saved after step" in errors, errors
    done, planned = train.saved_step(root / "stopped" / "forcing")
    assert 0 not in codes and 2 <= done < planned == 200
    assert f"saved after step {done}; the same command continues from there" in errors
    assert len(read_log(root / "stopped" / "forcing")) == done


@pytest.mark.parametrize("stage", ["forcing", "kd"])
def test_two_processes_and_gradient_accumulation_equal_one_process(
    chain, two_nodes, tmp_path, monkeypatch, stage
):
    """3 steps of 5 images: by one process; by two over gloo; by one, an image at a time."""
    monkeypatch.setitem(train.STAGES[stage].shapes, "muon", False)  # it magnifies rounding, as in the others
    folders = dict(one=tmp_path / "one", two=two_nodes[0] / stage, accumulated=tmp_path / "accumulated")
    weights = {}
    for name, out in folders.items():
        if name != "two":
            copy_parts(chain, out, "vae text_encoder teacher" + (" forcing" if stage == "kd" else ""))
            flags = THREE_STEPS.format(stage=stage, out=out).split()
            result = call("train.py", *flags, *(["--micro-batch", "1"] if name == "accumulated" else []))
            assert result.returncode == 0, result.stderr
        assert len(read_log(out / stage)) == 3, two_nodes[1]
        weights[name] = [w.flatten() for key, w in raw_weights(out, stage).items() if ".mamba." in key]
        weights[name] = torch.cat(weights[name])
    for name in ("two", "accumulated"):
        assert 0 < (weights[name] - weights["one"]).norm() < 1e-5 * weights["one"].norm()


def node_of_two(rank, out):
    """What one of two processes says whose --out may be its own."""
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29532")
    for module in (sample, train):  # which read the environment when they were imported
        module.RANK, module.WORLD = rank, 2
    return call("train.py", "--stage", "forcing", "--device", "cpu", "--out", out)


def test_nodes_that_share_no_folder_are_told_so(tmp_path):
    """Forked: they come no further than their first meeting."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        jobs = [(rank, str(tmp_path / str(rank))) for rank in range(2)]
        results = pool.starmap_async(node_of_two, jobs, chunksize=1).get(timeout=120)
    for result in results:
        which = "is not one folder for all processes; on several nodes it must be shared"
        refused(result, "train.py: --out", which)
    assert not list(tmp_path.rglob(".shared*"))


def test_a_teacher_can_be_trained_further(chain, tmp_path):
    command = f"--stage teacher --steps 1 --batch-size 2 --examples 0 --teacher {chain}/teacher --lr 1e-9"
    train.run(train.parse_arguments(f"{command} --out {tmp_path}".split()))
    before = T2MD.from_pretrained(os.path.join(chain, "teacher")).state_dict()
    after = raw_weights(tmp_path, "teacher")
    assert all((after[name] - weight).abs().max() < 1e-6 for name, weight in before.items())
    assert not torch.equal(after["proj_out.weight"], before["proj_out.weight"])
    vae = json.load(open(tmp_path / "teacher" / "config.json"))["vae"]
    assert os.path.samefile(tmp_path / "teacher" / vae, os.path.join(chain, "vae"))
    assert sorted(os.listdir(tmp_path)) == ["features", "index", "pictures", "teacher"]


def test_a_teacher_may_be_a_transformer_alone(chain, tmp_path):
    shape = dict(num_layers=2, num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64)
    shape |= dict(sample_size=16, caption_channels=64, use_additional_conditions=False)
    PixArtTransformer2DModel(**shape).save_pretrained(tmp_path / "alone")

    def run(flags):
        command = f"--config t2md --teacher {tmp_path}/alone --pattern SW --steps 1 --batch-size 1"
        train.run(train.parse_arguments(f"{command} --out {tmp_path}/out {flags}".split()))

    with pytest.raises(ValueError, match="no vae could be loaded from .*alone"):
        run("--stage forcing")
    for stage, of, pictures in (("forcing", "", 0), ("kd", "", 0), ("adapt", "_adapt", 1)):
        parts = f"--vae {chain}/vae{of} --text-encoder {chain}/text_encoder{of}"
        run(f"--stage {stage} --examples {pictures} {parts}")
    assert (tmp_path / "out" / "adapt" / "step-000001.png").exists()


def test_what_must_run_first_is_worked_out_before_anything_runs(chain, tmp_path, capsys):
    def plan(flags):
        return train.work_out(train.parse_arguments(f"--out {tmp_path} {flags}".split()))

    assert plan("--stage kd") == ["forcing", "kd"]
    steps = {name: f"to do, {stage.shapes['steps']:,} steps" for name, stage in train.STAGES.items()}
    said = f"teacher: shipped; forcing: {steps['forcing']}; kd: {steps['kd']}"
    assert said in capsys.readouterr().out
    assert plan("--stage kd --init llama") == ["kd"]
    assert plan(f"--stage hires1 --teacher {chain}") == ["forcing", "kd", "adapt", "hires1"]
    distilled = "vae text_encoder teacher forcing kd".split()
    assert plan("--stage all") == [*distilled, "vae_adapt", "text_encoder_adapt", *train.CHAIN[3:]]
    with pytest.raises(ValueError, match="trains no teacher: it starts from PixArt-alpha"):
        plan("--stage teacher --config t2md")


def test_sample_command(chain, tmp_path):
    model = os.path.join(chain, "hires2")
    flags = f"--model {model} --steps 2 --seed 5 --size 60x130 --out {tmp_path}".split()
    for n, name in enumerate(("a-photo-of-a-red-circle-5.png", "a-photo-of-a-red-circle-5-1.png"), 1):
        result = call("sample.py", "a photo of a red circle", *flags)
        assert result.returncode == 0, result.stderr
        assert "rounded to 64x128" in result.stderr and len(os.listdir(tmp_path)) == n
        assert result.stdout.strip() == os.path.join(tmp_path, name)
    first, second = (Image.open(tmp_path / name) for name in sorted(os.listdir(tmp_path)))
    assert first.size == (64, 128) and np.array_equal(np.asarray(first), np.asarray(second))
    assert first.text["prompt"] == "a photo of a red circle" and first.text["seed"] == "5"
    wanted = dict(steps=2, guidance=4.5, size=[64, 128], model=model)
    assert wanted.items() <= json.loads(first.text["settings"]).items()


def test_sizes_on_the_way():
    """Direct up to 1.5 times the trained side; then the trained area in the asked shape, doubled until
    there."""
    way = functools.partial(sample.sizes_on_the_way, trained=512, multiple=16)
    assert way((512, 512)) == [(512, 512)] and way((768, 768)) == [(768, 768)]
    assert way((960, 544)) == [(960, 544)]  # the paper's own ratio, 1.98 times the area in 16:9
    assert way((1024, 1024)) == [(512, 512), (1024, 1024)]
    assert way((2048, 2048)) == [(512, 512), (1024, 1024), (2048, 2048)]
    assert way((1536, 1536)) == [(512, 512), (1024, 1024), (1536, 1536)]
    first, second, last = way((3840, 2160), trained=1024)
    assert last == (3840, 2160) and second == (2 * first[0], 2 * first[1])
    assert abs(first[0] * first[1] / 1024**2 - 1) < 0.05 and abs(first[0] / first[1] - 16 / 9) < 0.05


def test_progressive_sampling(components, monkeypatch):
    """A picture at the trained size, enlarged, noised to a timestep of the sampler's own grid and denoised
    from there; only the remaining steps run at the new size, and one seed is one picture in any batch."""
    torch.manual_seed(0)
    shape = TINY | dict(caption_width=64, sample_size=8)
    model = shuffled(T2MD(pattern="SHW", beta_schedule="scaled_linear", **shape)).eval()
    vae, encoder, seen = VAE(components), TextEncoder(components), []
    predict_noise = sample.predict_noise

    def spy(model, z_t, t, *rest, **more):
        seen.append((z_t.shape[-1], int(t)))
        return predict_noise(model, z_t, t, *rest, **more)

    monkeypatch.setattr(sample, "predict_noise", spy)
    how = dict(steps=10, renoise=600)
    (image,) = sample.generate(model, vae, encoder, ["a star"], (256, 256), [3], **how)
    grid = sample.make_scheduler("scaled_linear")
    grid.set_timesteps(10)
    timesteps = grid.timesteps.tolist()
    later = [t for t in timesteps if t <= 600]
    assert image.size == (256, 256) and 0 < len(later) < 10
    assert seen == [(8, t) for t in timesteps] + [(16, t) for t in later] + [(32, t) for t in later]
    both = sample.generate(model, vae, encoder, ["a cross", "a star"], (256, 256), [2, 3], **how)
    assert np.abs(np.asarray(both[1], float) - np.asarray(image, float)).max() <= 1
    seen.clear()
    sample.generate(model, vae, encoder, ["a star"], (256, 256), [3], steps=10, direct=True)
    assert seen == [(32, t) for t in timesteps]


def test_denoising_from_a_picture_starts_at_its_own_noise_level(monkeypatch):
    """z_t = sqrt(abar) z + sqrt(1 - abar) eps, diffusers' forward process; a perfect model gives z back."""
    config = types.SimpleNamespace(beta_schedule="linear")
    model = types.SimpleNamespace(config=config, device="cpu", dtype=torch.float32)
    z, noise, started = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), []
    alpha_bar = sample.make_scheduler("linear").alphas_cumprod

    def perfect(model, z_t, t, *_, **__):
        started.append((z_t, int(t)))
        return (z_t - alpha_bar[int(t)].sqrt() * z) / (1 - alpha_bar[int(t)]).sqrt()

    text = torch.zeros(1, 1, 4), torch.ones(1, 1)
    monkeypatch.setattr(sample, "predict_noise", perfect)
    monkeypatch.setattr(sample, "size_conditions", lambda *_: {})
    out = sample.denoise(model, text, text, noise, steps=10, guidance=1.0, picture=z, renoise=600)
    z_t, t = started[0]
    schedule = train.DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2)
    expected = schedule.add_noise(z, noise, torch.tensor([t]))
    assert t <= 600 and torch.allclose(z_t, expected, atol=1e-5) and torch.allclose(out, z, atol=0.02)


def test_an_exported_pipeline_gives_the_same_image(chain, tmp_path):
    """In a fresh process, by diffusers alone; it asks that the module of the transformer be imported."""
    folder, model = tmp_path / "pipeline", os.path.join(chain, "hires1")
    assert call("sample.py", "--export", str(folder), "--model", model).returncode == 0
    script = (
        "import sys, torch, diffusers, t2md\n"
        "pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))\n"
        "how = dict(negative_prompt='', height=128, width=128, num_inference_steps=3, guidance_scale=4.5)\n"
        "how |= dict(use_resolution_binning=False, clean_caption=False)\n"
        "image = pipe('a photo of a Star ', latents=noise, **how).images[0]\n"
        "image.save(sys.argv[2])\n"
    )
    result = run("-c", script, str(folder), str(tmp_path / "theirs.png"))
    assert result.returncode == 0, result.stderr
    (ours,) = sample.load(model)(["a photo of a Star "], (128, 128), [5], steps=3)
    theirs = np.asarray(Image.open(tmp_path / "theirs.png"), float)
    assert np.abs(theirs - np.asarray(ours, float)).max() <= 1
    flags = f"--model {folder} --steps 1 --size 64 --out {tmp_path}".split()
    again = call("sample.py", "a star", *flags)
    assert again.returncode == 0, again.stderr
    refused(call("sample.py", "--export", str(folder)), "is not empty")


def test_sample_writes_genevals_layout_and_resumes(chain, tmp_path, monkeypatch):
    """And two processes, as torchrun starts them, share what is left: what is there is not made again."""
    prompts = tmp_path / "metadata.jsonl"
    records = heldout_records(3, 0)
    prompts.write_text("".join(json.dumps(r) + "\n" for r in records))
    flags = f"--prompts {prompts} --n 2 --model {chain}/kd --steps 2 --out {tmp_path}/out".split()
    assert call("sample.py", *flags).returncode == 0
    for i, record in enumerate(records):
        folder = tmp_path / "out" / f"{i:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == record
        assert sorted(os.listdir(folder / "samples")) == ["00000.png", "00001.png"]
    kept = tmp_path / "out" / "00001" / "samples" / "00001.png"
    (tmp_path / "out" / "00002" / "samples" / "00000.png").unlink()
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr(sample, "WORLD", 2)
    for rank, drawn in enumerate((1, 0)):
        monkeypatch.setattr(sample, "RANK", rank)
        share = call("sample.py", *flags)
        assert share.returncode == 0 and share.stdout.count(".png") == drawn
    assert kept.stat().st_mtime_ns == before
    text = tmp_path / "prompts.txt"
    text.write_text("a photo of a star\n\na photo of a cross\n")
    read = [record["prompt"] for record in sample.read_prompts(str(text))]
    assert read == ["a photo of a star", "a photo of a cross"]


# -- 10. bad input: one sentence, a non-zero exit, nothing lost ----------------------------------------------


def refused(result, *words):
    error = result.stderr.strip()
    assert result.returncode != 0 and "Traceback" not in error, error
    assert all(word in error for word in words), error
    assert len(error.splitlines()[-1]) > 20


def test_command_line_changes_the_plan_of_the_stage_it_names():
    args = train.parse_arguments("--stage hires2 --steps 7 --timesteps 600 300 --no-snr-weight".split())
    default, plan = train.STAGES["hires2"].shapes, train.plan_for("hires2", args)
    assert default["snr_weight"] and plan == default | dict(steps=7, timesteps=[600, 300], snr_weight=False)
    assert train.plan_for("hires1", args) == train.STAGES["hires1"].shapes


@pytest.mark.parametrize("numbers", [("600", "0"), ("-1", "9"), ("600", "nan")])
def test_timesteps_that_are_no_distribution_are_refused(numbers):
    refused(call("train.py", "--stage", "kd", "--timesteps", *numbers), "--timesteps", "positive deviation")


def test_unknown_stage():
    refused(call("train.py", "--stage", "distill"), "invalid choice", "kd")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["a star", "--size", "0"], ["--size 0 is no size"]),
        (["a star", "--size=-64x64"], ["is no size"]),
        (["a star", "--size", "big"], ["is no size"]),
        (["  "], ["the prompt is empty"]),
        ([], ["give one prompt"]),
        (["a star", "--n", "0"], ["at least 1"]),
        (["a star", "--model", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--prompts", "/nowhere.txt"], ["/nowhere.txt"]),
    ],
)
def test_sample_refuses(chain, tmp_path, arguments, words):
    model = [] if "--model" in arguments else ["--model", os.path.join(chain, "kd")]
    refused(call("sample.py", *arguments, *model, "--out", str(tmp_path)), *words)
    assert os.listdir(tmp_path) == []


def test_broken_prompt_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a star"}\n{"tag": "x"}\n')
    with pytest.raises(ValueError, match="line 2"):
        sample.read_prompts(str(path))


@pytest.mark.parametrize("damage", ["truncated", "config", "width", "missing"])
def test_damaged_checkpoints_are_refused(chain, tmp_path, damage):
    folder = tmp_path / "kd"
    copy_parts(chain, tmp_path, "kd vae text_encoder")
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "config":
        config.write_text(config.read_text()[:50])
    elif damage == "width":
        config.write_text(config.read_text().replace('"width": 128', '"width": 64'))
    else:
        weights.unlink()
    refused(call("sample.py", "a star", "--model", str(folder), "--out", str(tmp_path / "out")), "sample.py:")
    assert not (tmp_path / "out").exists()


def test_damaged_training_state_is_refused_and_kept(chain, tmp_path):
    copy_parts(chain, tmp_path, "forcing")
    state = tmp_path / "forcing" / "training_state.pt"
    state.write_bytes(b"half")
    flags = f"--stage forcing --out {tmp_path} --teacher {chain}/teacher".split()
    refused(call("train.py", *flags), "training_state.pt")
    assert state.read_bytes() == b"half"


def test_a_loss_that_is_not_finite_stops_with_the_checkpoint_intact(tmp_path):
    network = torch.nn.Linear(2, 2)
    args = train.parse_arguments(["--stage", "kd"])
    plan = train.plan_for("kd", args) | dict(steps=30, save_every=2)

    def export(folder):
        return sample.write_atomically(
            os.path.join(folder, "model"), lambda path: torch.save(network.state_dict(), path)
        )

    def loss_terms(step, indices, backward, bad=range(4, 30)):
        loss = network(torch.ones(1, 2)).square().sum() * (float("nan") if step in bad else 1.0)
        backward(loss)
        return dict(loss=loss.detach())

    with pytest.raises(FloatingPointError, match="not finite ten steps in a row"):
        train.fit("kd", str(tmp_path), network, loss_terms, export, plan | dict(save_every=4), args)
    assert train.saved_step(str(tmp_path)) == (12, 30)
    assert all(torch.isfinite(w).all() for w in raw_weights(tmp_path, "").values())
    assert [line["skipped"] for line in read_log(tmp_path)] == [False] * 4 + [True] * 9


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tmp_path):
    """Though its loss is finite: weights and EMA stay as they were."""
    network = torch.nn.Linear(1, 1, bias=False)
    args = train.parse_arguments(["--stage", "kd"])
    plan = train.plan_for("kd", args) | dict(steps=3, muon=False)

    def loss_terms(step, indices, backward):
        w = network.weight.sum()
        loss = (w - w.detach()).abs().sqrt() if step == 1 else w.square()  # the root's slope at 0 is infinite
        backward(loss)
        return dict(loss=loss.detach())

    train.fit("kd", str(tmp_path), network, loss_terms, lambda folder: None, plan, args)
    log = read_log(tmp_path)
    assert [line["skipped"] for line in log] == [False, True, False] and log[1]["loss"] == 0
    state = torch.load(tmp_path / "training_state.pt", weights_only=True)
    assert torch.isfinite(network.weight).all() and torch.isfinite(state["ema"]["shadow_params"][0]).all()


def test_a_checkpoint_is_due_by_time_too(tmp_path, monkeypatch):
    """Every --save-minutes, whatever --save-every says; pictures are drawn at the latter alone."""
    network, saved, shown, clock = torch.nn.Linear(1, 1), [], [], iter(range(0, 10**6, 100))
    args = train.parse_arguments("--stage kd --save-minutes 10 --save-every 5".split())
    plan = train.plan_for("kd", args) | dict(steps=12)
    monkeypatch.setattr(train.time, "time", lambda: float(next(clock)))  # 100 s a look

    def loss_terms(step, indices, backward):
        loss = network(torch.ones(1, 1)).square().sum()
        backward(loss)
        return dict(loss=loss.detach())

    def export(folder):
        saved.append(train.saved_step(folder)[0])

    train.fit("kd", str(tmp_path), network, loss_terms, export, plan, args, shown.append)
    assert [os.path.basename(path) for path in shown] == [f"step-0000{step}.png" for step in ("05", 10, 12)]
    assert len(saved) > len(shown) and train.saved_step(tmp_path) == (12, 12)


def test_no_space_left_keeps_the_previous_checkpoint(tmp_path):
    path = tmp_path / "state"
    sample.write_atomically(str(path), lambda p: open(p, "w").write("old"))

    def full(p):
        open(p, "w").write("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        sample.write_atomically(str(path), full)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["state"]


# too small for the model file; large enough for it, not for the state
@pytest.mark.parametrize("limit", [100_000, 12_000_000])
def test_a_save_that_fails_keeps_the_previous_checkpoint(chain, tmp_path, limit):
    copy_parts(chain, tmp_path, "forcing kd vae text_encoder")
    state = (tmp_path / "kd" / "training_state.pt").read_bytes()
    flags = f"--stage kd --steps 3 --batch-size 2 --examples 0 --teacher {chain}/teacher --out {tmp_path}"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # as good as a full disk
    try:
        result = call("train.py", *flags.split())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(result, "train.py:")
    assert (tmp_path / "kd" / "training_state.pt").read_bytes() == state
    assert sample.load_denoiser(str(tmp_path / "kd")).config.pattern == "SHWHWHW"
    assert not [name for name in os.listdir(tmp_path / "kd") if name.endswith(".tmp")]


# -- 11. what is shipped, and the README ---------------------------------------------------------------------

SHIPPED = os.path.join(HERE, "assets")


def test_shipped_weights_are_small_and_whole():
    files = (path for path in pathlib.Path(SHIPPED).rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20
    for name in ("teacher", "student_kd", "student"):
        model = sample.load_denoiser(os.path.join(SHIPPED, name))
        vae, text_encoder = sample.load_parts(model, os.path.join(SHIPPED, name))
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert vae.channels == 4 and text_encoder.width == 64


def test_tiled_decode_has_no_seams():
    """The shipped VAE on 1536 x 512 px in tiles of 1024, blended over their overlap (pixels 768 to 1024), in
    1/255.

    On a flat sky: equal to the plain decode, and no step between neighbouring columns that it does not have.
    On a picture: nearly equal, as the VAE's group norms see each tile's own statistics.
    """
    vae = VAE(os.path.join(SHIPPED, "vae"))
    record = dict(tag="single_object", include=[{"class": "star", "count": 1}], prompt="a photo of a star")
    sky, picture = (Image.new("RGB", (1536, 512), BACKGROUND) for _ in range(2))
    picture.paste(draw_shapes(record, 512, np.random.default_rng(0)), (1024, 0))
    for image, mean in ((sky, 0.5), (picture, 1.0)):
        latents, _ = vae.moments(to_pixels([image]))
        tiled, plain = (127.5 * vae.decode(latents, tile) for tile in (1024, 1536))
        assert (tiled - plain).abs().mean() < mean
        steps = (tiled - plain).diff(dim=-1).abs().amax((0, 1, 2))
        assert steps[760:1032].max() < 0.25
    assert score_shapes(sample.to_images(tiled / 127.5)[0].crop((1024, 0, 1536, 512)), record)


def test_readme_sample_command(tmp_path):
    prompt = "a photo of a red circle and a blue square"
    assert f'python sample.py "{prompt}"' in open(os.path.join(HERE, "README.md")).read()
    result = call("sample.py", prompt, "--out", str(tmp_path), anew=True)
    assert result.returncode == 0, result.stderr
    assert Image.open(result.stdout.strip()).size == (512, 512)
