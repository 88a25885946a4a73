"""What must hold, checked against what we did not write: diffusers, transformers, a recurrence in float64.

    python -m pytest -q

No network, no GPU, no downloads. What real weights would provide is built here, small, in the real format.
"""

import ast
import codecs
import contextlib
import copy
import functools
import gc
import io
import itertools
import json
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

import accelerate
import huggingface_hub
import numpy as np
import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtTransformer2DModel
from PIL import Image
from torch.distributed.run import parse_args as torchrun
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

import sample
import t2md
import train
from data import files, parts
from data.images import to_pixels
from data.shapes import BACKGROUND
from t2md import T2MD, VAE, DiM, Mamba2, MambaMixer, TextEncoder, ssd, ssd_recurrence

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = dict(width=48, heads=2, caption_width=20, d_state=8, head_dim=16, sample_size=16, chunk_size=16)
TINY64 = TINY | dict(caption_width=64)  # as wide as the text encoder of parts.py


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def inputs(batch=2, size=(16, 16), tokens=7, width=20, dtype=torch.float32, seed=0):
    """What `predict_noise` takes: z_t, t, text, mask."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, tokens)
    mask[-1, tokens // 2 :] = 0
    z_t = torch.randn(batch, 4, *size, generator=g).to(dtype)
    text = torch.randn(batch, tokens, width, generator=g).to(dtype)
    return dict(z_t=z_t, t=torch.linspace(3, 777, batch).long(), text=text, mask=mask)


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


def as_teacher(model, folder):
    """A PixArtTransformer2DModel, saved and loaded as the T2MD that computes the same."""
    model.save_pretrained(folder)
    return t2md.load_backbone(str(folder))


def call(script, *arguments, anew=False):
    """The same command without a new process, whose imports take seconds; a traceback fails the test that
    calls it. anew: the file itself is run, as Python does it, not the module, of which tests patch parts."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    into_out, into_err = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    main = {"train.py": train, "sample.py": sample}[script].main
    if anew:
        main = functools.partial(runpy.run_path, os.path.join(HERE, script), run_name="__main__")
    with mock.patch.object(sys, "argv", [script, *map(str, arguments)]), into_out, into_err:
        try:
            main()
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
@pytest.mark.parametrize("base, h, w", [(64, 16, 16), (64, 12, 20), (32, 32, 32), (32, 8, 30), (128, 16, 24)])
def test_all_attention_backbone_equals_diffusers(tmp_path, base, h, w, masked):
    reference = pixart(base)
    model, x = as_teacher(reference, tmp_path), inputs(size=(h, w))
    resolution = torch.tensor([[512.0, 768], [1024, 1024]])
    conditions = dict(resolution=resolution, aspect_ratio=torch.tensor([[0.67], [1.0]]))
    conditions = dict(added_cond_kwargs=conditions if base == 128 else None)
    arguments, mask = (x["z_t"], x["text"], x["t"]), x["mask"] if masked else None
    expected = reference(*arguments, encoder_attention_mask=mask, **conditions).sample
    got = model(*arguments, encoder_attention_mask=mask, **conditions).sample
    assert got.shape == (2, 8, h, w) and relative(got, expected) < 1e-5
    for out in (got, expected):
        out.square().sum().backward()
    gradients = t2md.rename_pixart({name: p.grad for name, p in reference.named_parameters()})
    for name, p in model.named_parameters():
        if "to_k.bias" not in name:  # it has none: softmax does not see it
            assert relative(p.grad, gradients[name]) < 1e-5, name
    if masked:  # the mask matters
        assert relative(model(*arguments, **conditions).sample, expected) > 1e-3
    if base == 128:
        with pytest.raises(ValueError, match="conditioned on size"):
            model(*arguments)


def test_students_copy_all_that_fits(tmp_path):
    reference = pixart(layers=7)
    teacher = as_teacher(reference, tmp_path)
    student = t2md.student_of(teacher, "SHWHWHW", d_state=8, head_dim=16)
    configs = [(network.config.pattern, network.config.out_channels) for network in (teacher, student)]
    assert configs == [("S" * 7, 8), ("SHWHWHW", 4)]
    original, weights = t2md.rename_pixart(reference.state_dict()), student.state_dict()
    copied = [name for name in weights if ".mamba." not in name and ".fuse." not in name]
    assert len(copied) > 100
    for name in copied:
        expected = original[name]
        if name.startswith("proj_out"):  # the noise half of every pixel of the patch
            expected = expected.unflatten(0, (2, 2, 8))[:, :, :4].flatten(0, 2)
        assert torch.equal(weights[name], expected), name
    assert t2md.predict_noise(teacher, **inputs()).shape == (2, 4, 16, 16)
    with pytest.raises(ValueError, match="2 letters, but the teacher has 7 blocks"):
        t2md.student_of(teacher, "SH")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """PixArt-alpha's repository in miniature as it is published: a learned null caption that diffusers does
    not know, a tokenizer that is a spiece.model alone, configs of an older version."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    shape = dict(num_layers=7, num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64)
    transformer = shuffled(PixArtTransformer2DModel(sample_size=16, caption_channels=64, **shape))
    transformer.save_pretrained(folder / "transformer")
    config = json.load(open(folder / "transformer" / "config.json"))
    del config["interpolation_scale"], config["use_additional_conditions"]
    (folder / "transformer" / "config.json").write_text(json.dumps(config | dict(an_older_entry=1)))
    weights = transformer.state_dict() | {"caption_projection.y_embedding": torch.randn(120, 64)}
    parts.new_vae().save_pretrained(folder / "vae")
    spiece = tokenizer_as_published(folder / "tokenizer")
    parts.new_text_encoder(len(spiece)).save_pretrained(folder / "text_encoder")
    return folder, spiece, weights


def tokenizer_as_published(folder):
    """spiece.model and tokenizer_config.json alone -> sentencepiece's own processor of it, with T5's ids."""
    folder.mkdir()
    lines = ["a photo of a red star", "a blue circle and two squares", "photo of crosses left of a star"]
    model, settings = io.BytesIO(), dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(20 * lines),
        model_writer=model,
        vocab_size=30,
        model_type="unigram",
        **settings,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_weights(folder, weights, kind):
    """A transformer's weights in each of the forms that repositories have."""
    for path in folder.glob("diffusion_pytorch_model*"):
        path.unlink()
    pattern = "diffusion_pytorch_model{suffix}." + ("bin" if kind == "bin" else "safetensors")
    size = dict(max_shard_size="1MB" if kind == "sharded" else "1GB", safe_serialization=kind != "bin")
    huggingface_hub.save_torch_state_dict(weights, folder, filename_pattern=pattern, **size)


@pytest.mark.parametrize("kind", ["bin", "safetensors", "sharded"])
def test_pixarts_repository_loads_as_published(published, kind):
    folder, spiece, weights = published
    write_weights(folder / "transformer", weights, kind)
    assert (len(list((folder / "transformer").glob("*-of-*"))) > 1) == (kind == "sharded")
    model = t2md.load_backbone(str(folder))
    assert not model.conditioned_on_size and model.interpolation_scale == 1
    assert torch.equal(model.blocks[6].mixer.to_k.weight, weights["transformer_blocks.6.attn1.to_k.weight"])
    encoder = TextEncoder(str(folder))
    for caption in ("a photo of a red star", "two blue squares left of a circle"):
        assert encoder.tokenizer(caption).input_ids == [*spiece.encode(caption), 1]
    lacking = {name: weight for name, weight in weights.items() if name != "proj_out.bias"}
    write_weights(folder / "transformer", lacking, kind)
    with pytest.raises(ValueError, match="lacks 1 weights of PixArtTransformer2DModel: proj_out.bias"):
        t2md.load_backbone(str(folder))


def test_pixarts_repository_is_sampled_and_distilled(published, tmp_path):
    folder, _, weights = published
    write_weights(folder / "transformer", weights, "safetensors")
    drawn = call("sample.py", "a star", "--model", folder, "--steps", 2, "--out", tmp_path / "s")
    assert drawn.returncode == 0, drawn.stderr
    flags = f"--stage forcing --teacher {folder} --data {write_images(tmp_path)} --out {tmp_path}/t --steps 1"
    flags += " --config t2md --pattern SHWHWHW --batch-size 2 --examples 1 --example-size 64"
    trained = call("train.py", *flags.split())
    assert trained.returncode == 0, trained.stderr
    assert len(read_log(tmp_path / "t" / "forcing")) == 1


def write_images(folder):
    """Three captioned pictures in a folder."""
    (folder / "images").mkdir()
    with open(folder / "images" / "metadata.jsonl", "w") as file:
        for colour in ("red", "green", "blue"):
            Image.new("RGB", (600, 600), colour).save(folder / "images" / f"{colour}.png")
            file.write(json.dumps(dict(file_name=f"{colour}.png", text=f"a {colour} square")) + "\n")
    return str(folder / "images")


def test_what_works_with_pixart_works_here():
    """diffusers' and accelerate's hooks see modules that are called, so no weight is read beside them."""
    model, x = shuffled(T2MD(pattern="SHW>", **TINY)).requires_grad_(False), inputs()
    want, offloaded, cast = t2md.predict_noise(model, **x), copy.deepcopy(model), copy.deepcopy(model)
    accelerate.cpu_offload(offloaded, torch.device("cpu"))
    assert torch.equal(t2md.predict_noise(offloaded, **x), want)
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert cast.blocks[1].mixer.mamba.in_proj.weight.dtype == torch.float8_e4m3fn
    assert relative(t2md.predict_noise(cast, **x), want) < 0.2
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager")
    assert relative(t2md.predict_noise(model, **x), want) < 1e-6


# -- 2. Mamba-2 and its scans --------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_layer_equals_transformers(groups):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=groups, expand=2)
    theirs = Mamba2Mixer(Mamba2Config(**shape, chunk_size=16, conv_kernel=4), layer_idx=0)
    ours = Mamba2(32, d_state=8, expand=2, head_dim=16, n_groups=groups, chunk_size=16)
    shuffled(theirs, std=0.3)
    ours.load_state_dict(theirs.state_dict())  # same names, same shapes
    u, weight = torch.randn(2, 2, 37, 32)
    a, b = u.clone().requires_grad_(), u.clone().requires_grad_()
    out, expected = ours(a), theirs(b)
    assert relative(out, expected) < 1e-5
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert relative(a.grad, b.grad) < 1e-5
    for (name, p), (_, q) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters())):
        assert relative(p.grad, q.grad) < 1e-5, name


def scan_arguments(l=53, groups=1, dtype=torch.float64):
    random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, dt, A = random(2, l, 4, 6), random(2, l, 4).exp(), -random(4).exp()
    drawn = x, dt, A, random(2, l, groups, 5), random(2, l, groups, 5), random(4)
    return [v.to(dtype).requires_grad_() for v in drawn]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 7, 16, 53, 64])
def test_ssd_is_the_recurrence(groups, chunk):
    x, dt, A, B, C, D = arguments = scan_arguments(groups=groups)
    y, expected = ssd(x, dt, A, B, C, chunk, D=D), ssd_recurrence(x, dt, A, B, C, D=D)
    assert (y - expected).abs().max() < 1e-10
    weight = torch.randn_like(y)
    gradients = (torch.autograd.grad((out * weight).sum(), arguments) for out in (y, expected))
    for got, want in zip(*gradients):
        assert (got - want).abs().max() < 1e-10
    assert (ssd(x, dt, A, B, C, chunk) - ssd_recurrence(x, dt, A, B, C)).abs().max() < 1e-10


def test_mamba_ssms_kernel_is_the_recurrence():
    """On a GPU, or with TRITON_INTERPRET=1 on a CPU."""
    runs = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    kernel = runs and t2md.optional_kernel("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    if not kernel:
        pytest.skip("no mamba-ssm, or nothing that runs it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = [v.detach().to(device).requires_grad_() for v in scan_arguments(dtype=torch.float32)]
    *tensors, D = arguments
    y, expected = kernel(*tensors, 16, D=D), ssd_recurrence(*tensors, D=D)
    assert relative(y, expected) < 1e-3
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), arguments) for out in (y, expected))):
        assert relative(a, b) < 1e-2


def peak_memory(work):
    """The most bytes that autograd holds for backward at any time while `work` runs."""
    alive, peak = weakref.WeakKeyDictionary(), 0

    def pack(tensor):
        nonlocal peak
        held = functools.partial(torch.Tensor.detach, tensor)
        alive[held] = tensor.nbytes
        peak = max(peak, sum(alive.values()))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held()):
        work()
    return peak


def test_the_scan_holds_the_matrices_of_one_chunk():
    """Checkpointed: what is kept grows with the sequence by inputs and states, not by chunks' matrices."""
    *tensors, D = scan_arguments(l=256)
    whole, chunks = (peak_memory(lambda: ssd(*tensors, n, D=D).sum().backward()) for n in (256, 32))
    assert chunks < whole / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strong_decay_stays_finite(dtype):
    x, dt, A, B, C, D = scan_arguments(dtype=dtype)
    dt, A = (torch.full_like(v, n).requires_grad_() for v, n in ((dt, 100.0), (A, -3.0)))  # dt * A = -300
    y = ssd(x, dt, A, B, C, 16, D=D)
    gradients = torch.autograd.grad(y.float().square().sum(), (x, dt, A, B, C, D))
    recurrent = ssd_recurrence(x, dt, A, B, C, D=D)
    assert all(torch.isfinite(values).all() for values in (y, recurrent, *gradients))
    assert relative(y.float(), recurrent.float()) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_initialisation_leaves_the_recurrence_alone():
    for block in T2MD(pattern="SHW>", **TINY).blocks[1:]:
        mamba = block.mixer.mamba
        dt = torch.nn.functional.softplus(mamba.dt_bias)
        assert dt.min() >= 1e-3 * 0.99 and dt.max() <= 0.1 * 1.01
        assert mamba.A_log.exp().min() >= 1 and mamba.A_log.exp().max() <= 16
        assert torch.equal(mamba.D, torch.ones_like(mamba.D)) and mamba.conv1d.weight.abs().max() > 0


@pytest.mark.parametrize("letter", t2md.SCANS)
def test_mixers_scan_in_the_order_of_their_letter(letter):
    """As one Mamba layer over tokens that were put in order here, row by row or column by column."""
    torch.manual_seed(0)
    mixer = MambaMixer(letter, 32, d_state=8, head_dim=16, chunk_size=8).double()
    x, rows = torch.randn(2, 5 * 3, 32, dtype=torch.float64), torch.arange(5 * 3)
    columns = torch.tensor([3 * y + x for x in range(3) for y in range(5)])
    orders = {">": [rows], "<": [rows.flip(0)], "v": [columns], "^": [columns.flip(0)]}
    orders |= dict(W=orders[">"] + orders["<"], H=orders["v"] + orders["^"])
    expected = sum(mixer.mamba(x[:, order])[:, order.argsort()] for order in orders[letter])
    expected = mixer.fuse(expected) if letter in "HW" else expected
    assert torch.allclose(mixer(x, (5, 3)), expected, atol=1e-12)


def test_folding_changes_nothing():
    """What sample.py runs: fuse folded into out_proj."""
    model, x = shuffled(T2MD(pattern="SHW>", **TINY)).double(), inputs(dtype=torch.float64, size=(6, 10))
    folded = sample.freeze(copy.deepcopy(model), "cpu", torch.float64)
    numbers, fewer = (sum(p.numel() for p in network.parameters()) for network in (model, folded))
    assert fewer == numbers - 2 * 48**2
    assert relative(t2md.predict_noise(folded, **x), t2md.predict_noise(model, **x)) < 1e-12


# -- 3. the paper's configuration ----------------------------------------------------------------------------


def test_paper_configuration():
    with torch.device("meta"):
        student, teacher = T2MD(), T2MD(pattern="S" * 28, out_channels=8, pos_embed="pixart")
        theirs = PixArtTransformer2DModel(sample_size=64, caption_channels=4096)
    assert len(student.blocks) == 28 and [student.config.pattern.count(c) for c in "SHW"] == [4, 12, 12]
    sizes = [sum(p.numel() for p in model.parameters()) for model in (student, teacher, theirs)]
    assert sizes[1] == sizes[2] and [round(size / 1e9, 2) for size in sizes[:2]] == [0.72, 0.61]
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
    out = t2md.predict_noise(model, **inputs(size=size, dtype=dtype))
    assert out.dtype == dtype and out.shape == (2, 4, *size) and torch.isfinite(out).all()
    rounded = {k: v.double() if k != "mask" else v for k, v in inputs(size=size, dtype=dtype).items()}
    bound = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    assert relative(out.double(), t2md.predict_noise(reference, **rounded)) < bound


def test_padding_tokens_end_every_line_and_never_reach_the_output(tmp_path):
    padding, h = t2md.PaddingTokens(8), torch.randn(2, 4 * 5, 8)
    padded, grid = padding(h, (4, 5))
    assert grid == (7, 8) and torch.equal(padding.remove(padded, grid), h)
    padded = padded.unflatten(1, grid)
    assert all(torch.equal(padded[0, y, 5:], padding.tokens) for y in range(7))
    assert all(torch.equal(padded[1, 4:, x], padding.tokens) for x in range(5))
    model = shuffled(DiM(padding_tokens=True, pattern="SHWv", **TINY))
    out, mixers = t2md.predict_noise(model, **inputs(size=(8, 12)), return_mixers=True)
    assert out.shape == (2, 4, 8, 12) and {h.shape for pair in mixers for h in pair} == {(2, 24, 48)}
    out.square().mean().backward()
    for p in (*model.padding.parameters(), *model.blocks[2].mixer.parameters()):
        assert p.grad is not None and p.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = t2md.load_backbone(str(tmp_path))
    assert again.config.padding_tokens and torch.equal(again.padding.tokens, model.padding.tokens)
    assert type(again)(**again.arguments()).config.pattern == "SHWv"


def test_local_enhancement_starts_as_the_identity(tmp_path):
    teacher = as_teacher(shuffled(pixart()), tmp_path)
    plain = t2md.student_of(teacher, "SW", d_state=8, head_dim=16)
    enhanced = t2md.student_of(teacher, "SW", d_state=8, head_dim=16, local_enhancement=True)
    enhanced.load_state_dict(plain.state_dict(), strict=False)
    x = inputs(size=(8, 12))
    with torch.no_grad():
        noise = t2md.predict_noise(plain, **x)
        assert torch.equal(t2md.predict_noise(enhanced, **x), noise)
        enhanced.enhance_last.conv.weight[:, 0, 0, 1] = 0.1  # sees the token above
        assert relative(t2md.predict_noise(enhanced, **x), noise) > 1e-3
    assert enhanced.enhance_first in train.modules(enhanced, train.STAGES["kd"].trains)


def test_attention_to_mamba_initialisation(tmp_path):
    """C, B and x of a Mamba layer are the attention's queries, keys and values, head by head."""
    teacher = as_teacher(shuffled(pixart()), tmp_path)
    student = t2md.student_of(teacher, "SW", llama=True)
    mamba, attention, u = student.blocks[1].mixer.mamba, teacher.blocks[1].mixer, torch.randn(1, 5, 48)
    assert (mamba.n_heads, mamba.n_groups, mamba.d_state, mamba.head_dim) == (2, 2, 24, 24)
    _, xBC, _ = mamba.in_proj(u).split(mamba.split_sizes, dim=-1)
    v, k, q = (layer(u) - layer.bias for layer in (attention.to_v, attention.to_k, attention.to_q))
    assert torch.allclose(xBC, torch.cat([v, k, q], dim=-1), atol=1e-6)
    same = attention.to_out[0](u)  # two directions that agree pass through fuse as one
    assert torch.allclose(student.blocks[1].mixer.fuse(2 * mamba.out_proj(u)), same, atol=1e-6)
    assert t2md.predict_noise(student, **inputs()).isfinite().all()


def test_save_and_load(tmp_path):
    config = dict(pattern="SHW", pos_embed="pixart", beta_schedule="scaled_linear", vae="../vae")
    model, x = shuffled(T2MD(**config, **TINY)), inputs()
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    for loaded in (T2MD.from_pretrained(tmp_path), t2md.load_backbone(str(tmp_path))):
        assert {name: loaded.config[name] for name in config} == config
        assert torch.equal(t2md.predict_noise(loaded, **x), t2md.predict_noise(model, **x))
    assert t2md.load_backbone(str(tmp_path), pos_embed="centered").config.pos_embed == "centered"


def test_gradient_checkpointing_changes_nothing():
    model, gradients = shuffled(T2MD(pattern="SHW", **TINY)), []
    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        model.zero_grad()
        out, mixers = t2md.predict_noise(model, **inputs(), return_mixers=True)
        (out.square().mean() + sum(m.square().mean() for _, m in mixers)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


@pytest.mark.parametrize("base, scale", [(32, 1), (64, 2), (128, 4), (64, 1)])
@pytest.mark.parametrize("H, W", [(32, 32), (33, 33), (96, 168), (168, 96), (7, 5)])
def test_centred_coordinates(H, W, base, scale):
    y, x = t2md.centered_coordinates(H, W, base, scale)
    step = base / scale / max(H, W)
    for axis, n in ((y, H), (x, W)):
        assert torch.allclose(axis, -axis.flip(0))  # symmetric about the centre, odd sizes have a token on it
        assert torch.allclose(axis.diff(), torch.full((n - 1,), step, dtype=torch.float64))
    long = y if H >= W else x  # spans the same whatever the size; tokens are where the teacher has them
    assert torch.isclose(long[-1] - long[0] + step, torch.tensor(base / scale, dtype=torch.float64))
    _, teachers = t2md.pixart_coordinates(base, base, base, scale)
    _, centred = t2md.centered_coordinates(base, base, base, scale)
    assert torch.allclose(centred.diff(), teachers.double().diff())


# -- 4. losses -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    teacher = shuffled(T2MD(pattern="S" * 7, pos_embed="pixart", **TINY | dict(out_channels=8)), 1)
    student = shuffled(T2MD(pattern="SHWHWHW", pos_embed="pixart", **TINY), 2)
    return teacher.requires_grad_(False), student


def test_forcing_loss_by_hand(pair):
    teacher, student = pair
    _, taken = t2md.predict_noise(teacher, **inputs(), return_mixers=True)
    fed = [block.mixer(h, (8, 8)) for block, (h, _) in zip(student.blocks, taken)]
    expected = sum((fed[n] - taken[n][1]).square().mean() for n in range(1, 7))
    assert torch.isclose(t2md.forcing_loss(student, teacher, **inputs()), expected, rtol=1e-5)


def test_checkpointed_forcing_has_the_same_gradients_and_the_memory_of_one_mixer():
    peaks = {}
    for depth in (7, 28):
        teacher = T2MD(pattern="S" * depth, pos_embed="pixart", **TINY).requires_grad_(False)
        student, gradients = T2MD(pattern="SHWHWHW" * (depth // 7), pos_embed="pixart", **TINY), []
        for checkpointing in (False, True):
            if checkpointing:
                student.enable_gradient_checkpointing()
            student.zero_grad()
            loss = functools.partial(t2md.forcing_loss, student, teacher, **inputs(batch=1))
            peaks[depth, checkpointing] = peak_memory(lambda: loss().backward())
            gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys() and all(".mixer." in name for name in gradients[0])
        assert all(torch.allclose(gradients[0][n], gradients[1][n], atol=1e-7) for n in gradients[0])
    assert peaks[28, False] > 3.5 * peaks[7, False]  # the measure does see depth
    assert peaks[28, True] < 0.1 * peaks[28, False]


def test_kd_loss_by_hand(pair):
    teacher, student = pair
    x, noise = inputs(), torch.randn(2, 4, 16, 16)
    predictions = [t2md.predict_noise(model, **x, return_mixers=True) for model in pair]
    (soft_target, outputs), (predicted, mixers) = predictions
    mse, soft = (predicted - noise).square().mean(), (predicted - soft_target).square().mean()
    mixer = sum((a - b).square().mean() for (_, a), (_, b) in zip(outputs, mixers)) / 7
    loss, terms = t2md.kd_loss(student, teacher, **x, noise=noise)
    assert torch.isclose(loss, mse + 0.5 * soft + 0.2 * mixer, rtol=1e-5)
    assert torch.isclose(terms["mse"], mse) and torch.isclose(terms["soft"], soft)
    assert torch.isclose(terms["mixer"], mixer, rtol=1e-5)
    assert loss.requires_grad and not any(t.requires_grad for t in terms.values())


def test_the_shapes_world_weighs_errors_by_their_noise():
    """By 1 / sqrt(SNR), in [1, 8]; the SNR of a shape grows with its area. The paper's config does not."""
    schedule, t = train.DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2), torch.tensor([300, 600, 900])
    alpha_bar = schedule.alphas_cumprod[t]
    for amplitude in (1.0, 0.5):
        snr = amplitude**2 * alpha_bar / (1 - alpha_bar)
        weights = torch.tensor([min(max(float(r) ** -0.5, 1.0), 8.0) for r in snr])
        assert torch.allclose(train.noise_weight(schedule, t, amplitude).flatten(), weights, rtol=1e-5)
    assert torch.equal(train.noise_weight(schedule, t, 0.0), torch.ones(3, 1, 1, 1))
    weighed = [name for name, stage in train.STAGES.items() if stage.shapes.get("snr_weight")]
    assert weighed == ["teacher", "adapt", "hires2"]
    assert not any("snr_weight" in stage.t2md for stage in train.STAGES.values())


def test_bfloat16_holds_over_4096_tokens(tmp_path):
    """As sampled with --dtype bfloat16: near float32, and finite with activations a thousand times larger."""
    shuffled(T2MD(pattern="SHW>", **TINY)).save_pretrained(tmp_path)
    exact, rounded = (sample.load_denoiser(str(tmp_path), dtype=d) for d in (torch.float32, torch.bfloat16))
    mamba = rounded.blocks[1].mixer.mamba
    assert mamba.A_log.dtype == mamba.dt_bias.dtype == torch.float32
    assert mamba.in_proj.weight.dtype == torch.bfloat16
    x = inputs(1, size=(128, 128))
    z, text = x["z_t"].bfloat16(), x["text"].bfloat16()
    with torch.no_grad():
        want = t2md.predict_noise(exact, **x)
        got = t2md.predict_noise(rounded, z, x["t"], text, x["mask"]).float()
        large = t2md.predict_noise(rounded, 1000 * z, x["t"], 1000 * text, x["mask"])
    assert relative(got, want) < 0.03 and torch.isfinite(large).all()


# -- 5. the sampler is diffusers' ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    """A tiny VAE with a scale of its own, and a tiny T5 with tokenizer, saved in a pipeline's layout."""
    folder = tmp_path_factory.mktemp("chain") / "parts"
    torch.manual_seed(0)
    tokenizer = parts.new_tokenizer()
    kinds = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    shape = dict(layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False, scaling_factor=0.7)
    AutoencoderKL(3, 3, *kinds, (8, 8, 8, 8), **shape).save_pretrained(folder / "vae")
    parts.new_text_encoder(len(tokenizer)).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return str(folder)


def save_model(folder, **arguments):
    """A checkpoint of random weights, beside the components that it names."""
    torch.manual_seed(0)
    named = TINY64 | dict(pattern="SHW", vae="../parts", text_encoder="../parts")
    shuffled(T2MD(**named | arguments)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(components):
    settings = dict(beta_schedule="scaled_linear", renoise=600, guidance=3.0, guidance_interval=700)
    return save_model(components.replace("parts", "model"), sample_size=8, **settings)


@pytest.mark.parametrize("pattern, channels, schedule", [("SHW", 4, "scaled_linear"), ("SS", 8, "linear")])
def test_diffusers_pipeline_gives_our_latents(components, pattern, channels, schedule):
    torch.manual_seed(0)
    model = shuffled(T2MD(pattern, out_channels=channels, beta_schedule=schedule, **TINY64)).eval()
    text_encoder, vae = TextEncoder(components), VAE(components)
    pieces = dict(tokenizer=text_encoder.tokenizer, text_encoder=text_encoder.model, vae=vae.model)
    pipeline = PixArtAlphaPipeline(**pieces, transformer=model, scheduler=sample.make_scheduler(schedule))
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a photo of a red star", "a photo of two circles"]
    noise = torch.cat([files.noise_for(s, 4, 16, 16) for s in (1, 2)])
    flags = dict(negative_prompt="a square", num_inference_steps=5, guidance_scale=3.0)
    flags |= dict(use_resolution_binning=False, clean_caption=False, latents=noise.clone())
    expected = pipeline(prompts, output_type="latent", **flags).images
    text, negative = text_encoder(prompts), text_encoder(["a square"] * 2)
    got = sample.denoise(model, text, negative, noise.clone(), steps=5, guidance=3.0)
    assert relative(got, expected) < 1e-4


def test_captions_are_prepared_as_diffusers_does(components):
    """Lower-cased, stripped, cut to 120 tokens and counted; capitals and spaces change nothing."""
    encoder = TextEncoder(components)
    features, mask = encoder(["a photo of a star", "a photo of a red star and a blue cross"])
    assert features.shape[:2] == mask.shape and mask.sum(1).tolist() == [6, 11]
    alone, _ = encoder(["a photo of a star"])
    assert torch.allclose(features[0, :6], alone[0], atol=1e-5) and encoder.cut == 0
    assert encoder(["star " * 500, "star"])[0].shape[1] == 120 and encoder.cut == 1
    loud, _ = encoder(["  A Photo of a STAR \n"])
    assert torch.equal(loud, alone)
    pipeline = PixArtAlphaPipeline(encoder.tokenizer, encoder.model, VAE(components).model, None, None)
    flags = dict(do_classifier_free_guidance=False, clean_caption=False)
    expected, mask, *_ = pipeline.encode_prompt("  A Photo of a STAR \n", **flags)
    assert torch.allclose(loud[0], expected[:, : int(mask.sum())], atol=1e-5)


def test_vae_agrees_with_diffusers(components):
    """Also after a preview in tiles; and neither part runs in an autocast around it."""
    vae, encoder, x = VAE(components), TextEncoder(components), torch.rand(1, 3, 192, 256) * 2 - 1
    posterior, (features, _) = vae.model.encode(x).latent_dist, encoder(["a photo of a star"])
    vae.decode(torch.randn(1, 4, 16, 16), tile=64)
    with torch.autocast("cpu", torch.bfloat16):
        mean, std = vae.moments(x)
        assert torch.equal(encoder(["a photo of a star"])[0], features)
        decoded = vae.decode(mean)
    assert torch.allclose(mean, posterior.mean * 0.7) and torch.allclose(std, posterior.std * 0.7)
    assert mean.shape == (1, 4, 24, 32)
    assert torch.allclose(decoded, vae.model.decode(posterior.mean).sample.clamp(-1, 1), atol=1e-5)
    assert not any(p.requires_grad for p in vae.model.parameters())


def test_tiled_decode_has_no_seams():
    """The shipped VAE on a flat sky of 1536 x 512 px in tiles of 1024, blended over pixels 768 to 1024, in
    1/255: equal to the plain decode, no step between neighbouring columns that it does not have."""
    vae = VAE(os.path.join(HERE, "assets", "vae"))
    latents, _ = vae.moments(to_pixels([Image.new("RGB", (1536, 512), BACKGROUND)]))
    tiled, plain = (127.5 * vae.decode(latents, tile) for tile in (1024, 1536))
    assert (tiled - plain).abs().mean() < 0.5
    steps = (tiled - plain).diff(dim=-1).abs().amax((0, 1, 2))
    assert steps[760:1032].max() < 0.25


def test_the_text_encoder_is_gone_before_the_denoiser_works(monkeypatch, tmp_path):
    """And what it said of each caption stands in for it, padded and masked."""
    loaded, gone, load_parts = [], [], sample.load_parts

    def load(*arguments, **flags):
        pieces = load_parts(*arguments, **flags)
        loaded.append(weakref.ref(pieces[1].model))
        return pieces

    def denoise(model, text, negative, latents, *_, **__):
        gc.collect()
        gone.append(loaded[0]() is None)
        return latents

    monkeypatch.setattr(sample, "load_parts", load)
    monkeypatch.setattr(sample, "denoise", denoise)
    assert call("sample.py", "a photo of a star", "--out", str(tmp_path)).returncode == 0
    assert gone == [True] * 3  # at 128, 256 and 512 px
    encoder = TextEncoder(os.path.join(HERE, "assets", "text_encoder"))
    captions = ["a photo of a red circle and a blue square", "", "a photo of a star"]
    features, mask = encoder(captions)
    looked_up, known = sample.encode_first(encoder, captions)(captions)
    assert torch.equal(mask, known) and torch.allclose(features * mask[..., None], looked_up, atol=1e-5)


@pytest.fixture
def passes(monkeypatch):
    """[(rows, side of the latents, timestep)] of every pass of the sampler through a model."""
    seen = []

    def spy(model, z_t, t, *rest, **conditions):
        seen.append((len(z_t), z_t.shape[-1], int(t)))
        return t2md.predict_noise(model, z_t, t, *rest, **conditions)

    monkeypatch.setattr(sample, "predict_noise", spy)
    return seen


def grid_of(beta_schedule, steps):
    scheduler = sample.make_scheduler(beta_schedule)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


def test_guidance_in_an_interval(components, passes):
    """Below it the model sees B rows, not 2B; and each step is the guided or the plain one."""
    torch.manual_seed(0)
    model, encoder = shuffled(T2MD(pattern="SH", **TINY64)).double().eval(), TextEncoder(components)
    text, negative, noise = encoder(["a star", "a red cross"]), encoder([""] * 2), torch.randn(2, 4, 16, 16)
    grid = grid_of("linear", 8)

    def denoise(guidance, interval):
        passes.clear()
        settings = dict(steps=8, guidance=guidance, guidance_interval=interval)
        return sample.denoise(model, text, negative, noise, **settings), [rows for rows, _, _ in passes]

    @torch.no_grad()
    def by_hand(z, interval):
        scheduler = sample.make_scheduler("linear")
        scheduler.set_timesteps(8)
        for t in scheduler.timesteps:
            with_text, without = (t2md.predict_noise(model, z, t, f.double(), m) for f, m in (text, negative))
            noise = without + 4 * (with_text - without) if t >= interval else with_text
            z = scheduler.step(noise, t, z, return_dict=False)[0]
        return z

    for interval in (0, 500, grid[3], 1000):  # a limit is inside
        got, rows = denoise(4.0, interval)
        assert rows == [4 if t >= interval else 2 for t in grid]
        assert relative(got, by_hand(noise.double(), interval)) < 1e-9
    assert torch.equal(denoise(1.0, 0)[0], got) and relative(denoise(4.0, 0)[0], got) > 1e-4


def test_upsample_guidance(components, passes):
    """Its timestep by brute force; the small prediction goes under the large one; both are guided alike."""
    abar, seen = sample.make_scheduler("scaled_linear").alphas_cumprod.double(), []
    snr = [float(a / (1 - a)) for a in abar]

    def predict(z, t):
        return (seen.append((z.shape, int(t))), 0.3 * z + float(t) / 1000)[1]

    noise, z_t, pool = torch.randn(2, 4, 8, 12), torch.randn(2, 4, 8, 12), torch.nn.functional.avg_pool2d
    for m, t in ((2, 999), (2, 700), (2, 850), (4, 999)):
        guided = sample.upsample_guidance(predict, z_t, t, noise, abar, m)
        nearest = min(range(t + 1), key=lambda s: abs(snr[s] - m**2 * snr[t]))
        assert seen[-1] == ((2, 4, 8 // m, 12 // m), nearest)
        power = (abar[t] + (1 - abar[t]) / m**2).float()
        small = 0.3 * pool(z_t, m) / power.sqrt() + nearest / 1000
        assert torch.allclose(pool(guided, m), small / m, atol=1e-5)
    assert sample.upsample_guidance(predict, z_t, 699, noise, abar, 2) is noise
    pure = torch.randn(64, 4, 16, 16)  # as z_t at t = 999: pooled and scaled it is again of unit variance
    sample.upsample_guidance(lambda z, t: (seen.append(z.std()), z)[1], pure, 999, pure, abar, 2)
    assert abs(seen[-1] - 1) < 0.02
    model, text = T2MD(pattern="S", **TINY64).eval(), TextEncoder(components)(["a star"])
    sample.denoise(model, text, text, torch.randn(1, 4, 8, 8), steps=10, upscale=2, guidance_interval=800)
    large, small = ([(rows, t) for rows, side, t in passes if side == n] for n in (8, 4))
    assert small[2][1] < 800 and [rows for rows, _ in small] == [rows for rows, _ in large[:3]] == [2, 2, 1]


def test_sizes_on_the_way():
    """Direct up to 1.5 times the trained side; then the trained area, doubled until there."""
    way = functools.partial(sample.sizes_on_the_way, known=512, multiple=16)
    assert way((512, 512)) == [(512, 512)] and way((768, 768)) == [(768, 768)]
    assert way((960, 544)) == [(960, 544)]  # the paper's own ratio, 1.98 times the area in 16:9
    assert way((2048, 2048)) == [(512, 512), (1024, 1024), (2048, 2048)]
    assert way((1536, 1536)) == [(512, 512), (1024, 1024), (1536, 1536)]
    first, second, last = way((3840, 2160), known=1024)
    assert last == (3840, 2160) and second == (2 * first[0], 2 * first[1])
    assert abs(first[0] * first[1] / 1024**2 - 1) < 0.05 and abs(first[0] / first[1] - 16 / 9) < 0.05


def test_progressive_sampling(checkpoint, passes, monkeypatch):
    """From the trained size on; larger, only the remaining steps of the sampler's own grid run, guided where
    the checkpoint says; each size is decoded once; one seed is one picture in any batch."""
    generate, decoded, decode = sample.load(checkpoint), [], VAE.decode
    monkeypatch.setattr(VAE, "decode", lambda vae, z: (decoded.append(z.shape[-1]), decode(vae, z))[1])
    (image,) = generate(["a star"], (256, 256), [3], steps=10)
    timesteps = grid_of("scaled_linear", 10)
    later = [t for t in timesteps if t <= 600]
    assert image.size == (256, 256) and 0 < len(later) < 10 and decoded == [8, 16, 32]
    larger = [(1, side, t) for side in (16, 32) for t in later]
    assert passes == [(2 if t >= 700 else 1, 8, t) for t in timesteps] + larger
    both = generate(["a cross", "a star"], (256, 256), [2, 3], steps=10)
    assert np.abs(np.asarray(both[1], float) - np.asarray(image, float)).max() <= 1
    passes.clear()
    generate(["a star"], (256, 256), [3], steps=10, direct=True, guidance=2.0, guidance_interval=0)
    assert passes == [(2, 32, t) for t in timesteps]
    with pytest.raises(ValueError):
        generate(["a star", "a cross"], (64, 64), [1])


class NoFloat64(TorchDispatchMode):
    """As on Apple's MPS: no tensor of the device (here `meta`) is of float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            assert not (isinstance(leaf, torch.Tensor) and leaf.is_meta and leaf.dtype == torch.float64)
        return out


def test_no_float64_on_the_device(components):
    model = sample.freeze(T2MD("SHW", use_additional_conditions=True, **TINY64), "meta", torch.float32)
    text, picture = TextEncoder(components)(["a star"]), torch.randn(1, 4, 12, 8, device="meta")
    with NoFloat64():
        sample.denoise(model, text, text, torch.randn(1, 4, 8, 8), steps=10, upscale=2)
        out = sample.denoise(model, text, text, torch.randn(1, 4, 12, 8), picture=picture, renoise=600)
    assert out.is_meta and out.shape == (1, 4, 12, 8)
    with pytest.raises(AssertionError), NoFloat64():
        torch.zeros(2, dtype=torch.float64).to("meta")


PIPELINE = """
import sys, torch, diffusers
for folder, picture in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(5))
    flags = dict(height=128, width=96, use_resolution_binning=False, num_inference_steps=3, latents=noise)
    pipe("a photo of a Star " * 40, clean_caption=False, **flags).images[0].save(picture)
"""


def test_an_exported_pipeline_gives_the_same_image_anywhere(components, tmp_path):
    """By diffusers alone, in a folder and a process that know nothing of this repository: of a model trained
    at 2048 px, and of one that is told the size; a caption longer than was trained is cut where ours is."""
    shutil.copytree(components, tmp_path / "parts")
    models, elsewhere = [tmp_path / "plain", tmp_path / "conditioned"], tmp_path / "elsewhere"
    for model, conditioned in zip(models, (False, True)):
        save_model(model, sample_size=256, interpolation_scale=3, use_additional_conditions=conditioned)
        result = call("sample.py", "--export", elsewhere / model.name, "--model", model)
        assert "height=2048, width=2048, use_resolution_binning=False" in result.stdout, result.stderr
    arguments = [name for model in models for name in (f"./{model.name}", f"{model.name}.png")]
    environment = os.environ | dict(PYTHONPATH="", HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    subprocess.run([sys.executable, "-c", PIPELINE, *arguments], cwd=elsewhere, env=environment, check=True)
    for model in models:
        (here,) = sample.load(str(model))(["a photo of a Star " * 40], (96, 128), [5], steps=3, direct=True)
        there = np.asarray(Image.open(elsewhere / f"{model.name}.png"), float)
        assert np.abs(there - np.asarray(here, float)).max() <= 1
        flags = ["--model", elsewhere / model.name, "--steps", 1, "--size", 64, "--out", tmp_path]
        assert call("sample.py", "a star", *flags).returncode == 0
    refused(call("sample.py", "--export", elsewhere / "plain", "--model", models[0]), "is not empty")


def test_sample_command(checkpoint, tmp_path, monkeypatch):
    """Nothing is ever overwritten, and no hard link is needed for that; kernels are named once."""
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=PermissionError("no hard links here")))
    flags = f"--model {checkpoint} --steps 2 --seed 5 --size 60x130 --n 2 --out {tmp_path}".split()
    for suffix in ("", "-1"):
        result = call("sample.py", "a photo of a red circle", *flags)
        assert result.returncode == 0, result.stderr
        names = [f"a-photo-of-a-red-circle-{seed}{suffix}.png" for seed in (5, 6)]
        assert result.stdout.split() == [os.path.join(tmp_path, name) for name in names]
        assert "rounded to 64x128" in result.stderr and result.stderr.count("scan by") == 1
    first, second = (Image.open(tmp_path / f"a-photo-of-a-red-circle-5{s}.png") for s in ("", "-1"))
    assert first.size == (64, 128) and np.array_equal(np.asarray(first), np.asarray(second))
    assert first.text["prompt"] == "a photo of a red circle" and first.text["seed"] == "5"
    wanted = dict(steps=2, guidance=3.0, guidance_interval=700, size=[64, 128], model=checkpoint)
    assert wanted.items() <= json.loads(first.text["settings"]).items()


def test_sample_writes_genevals_layout_and_resumes(checkpoint, tmp_path, monkeypatch):
    """And two processes, as torchrun starts them, share what is left: what is there is not made again."""
    prompts, out = tmp_path / "metadata.jsonl", tmp_path / "out"
    records = [dict(tag="counting", prompt=f"a photo of {n} stars") for n in ("two", "three", "four")]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in records))
    flags = f"--prompts {prompts} --images 2 --model {checkpoint} --steps 2 --out {out}".split()
    assert torchrun(["sample.py", *flags]).training_script_args == flags
    assert call("sample.py", *flags).returncode == 0
    for i, record in enumerate(records):
        assert json.loads((out / f"{i:05d}" / "metadata.jsonl").read_text()) == record
        assert sorted(os.listdir(out / f"{i:05d}" / "samples")) == ["00000.png", "00001.png"]
    (out / "00002" / "samples" / "00000.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    monkeypatch.setattr(files, "WORLD", 2)
    for name in ("init_process_group", "barrier"):
        monkeypatch.setattr(torch.distributed, name, mock.Mock())
    for rank, drawn in enumerate((1, 0)):
        monkeypatch.setattr(files, "RANK", rank)
        share = call("sample.py", *flags)
        assert share.returncode == 0 and share.stdout.count(".png") == drawn, share.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_used_folder_is_refused_by_name(checkpoint, components, tmp_path):
    """For prompts from a file: another model, other prompts, seed, number, settings; nothing is touched."""
    (tmp_path / "a.txt").write_text("a photo of a star\n")
    (tmp_path / "b.txt").write_text("a photo of a cross\n")
    other, out = os.path.join(os.path.dirname(components), "other"), tmp_path / "out"
    save_model(other, sample_size=8)

    def draw(changed="", prompts="a.txt", model=checkpoint):
        flags = f"--steps 2 --size 64 --out {out} --model {model} {changed}".split()
        return call("sample.py", "--prompts", tmp_path / prompts, *flags)

    assert draw().returncode == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused(draw(prompts="b.txt"), "prompts")
    refused(draw(model=other), "model")
    changes = "--seed 5,--n 2,--steps 3,--guidance 2,--guidance-interval 0,--negative red,--size 128,--direct"
    for changed in changes.split(","):
        refused(draw(changed), changed.split()[0][2:].replace("-", "_"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    again = draw("--guidance 3")  # the checkpoint's own
    assert again.returncode == 0 and ".png" not in again.stdout
    os.remove(out / "made_with.json")
    refused(draw(), "no made_with.json")


def test_compiling_survives_many_sizes_and_batches(checkpoint, tmp_path, monkeypatch):
    """Three kinds of mixer at two sizes, with one branch or two, are more graphs than Dynamo's limit."""
    compiled = functools.partialmethod(T2MD.compile_repeated_blocks, backend="eager", fullgraph=True)
    monkeypatch.setattr(T2MD, "compile_repeated_blocks", compiled)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch._dynamo.reset()
    flags = f"--compile --steps 3 --size 128 --model {checkpoint} --out".split()
    assert call("sample.py", "a star", *flags, tmp_path).returncode == 0


@pytest.mark.parametrize("arguments, word", [
    (["a star", "--size", "0"], "--size 0 is no size"),
    (["a star", "--size=-64x64"], "is no size"),
    (["a star", "--size", "big"], "is no size"),
    (["  "], "the prompt is empty"),
    ([], "prompt --prompts --export is required"),
    (["a star", "--n", "0"], "at least 1"),
    (["a star", "--steps", "1000"], "at most 999"),
    (["a star", "--model", "/nowhere/at/all"], "/nowhere/at/all"),
    (["--prompts", "/nowhere.txt"], "/nowhere.txt"),
    (["a star", "--device", "gpu"], "gpu"),
    (["a star", "--device", "cuda:99"], "CUDA"),
])  # fmt: skip
def test_sample_refuses(checkpoint, tmp_path, arguments, word):
    refused(call("sample.py", "--model", checkpoint, *arguments, "--out", tmp_path), word)
    assert os.listdir(tmp_path) == []


def test_what_fails_late_is_tried_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_backbone", mock.Mock(side_effect=AssertionError("loaded")))
    for flags in (["a star", "--out"], ["--export"]):
        refused(call("sample.py", *flags, os.path.join(__file__, "folder")), "Error", "folder")
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(sample.tempfile, "TemporaryFile", full)
    refused(call("sample.py", "a star", "--out", tmp_path / "out"), "No space left")


def test_a_checkpoint_moved_away_from_its_parts(checkpoint, components, tmp_path):
    """Says what to do; and two flags name the parts anew, for pictures as for an export."""
    moved = shutil.copytree(checkpoint, tmp_path / "there" / "model")
    flags = ["a star", "--steps", 1, "--out", tmp_path / "out", "--model", moved]
    refused(call("sample.py", *flags), "relative to itself", "--vae", "--text-encoder", "--export")
    again = ["--vae", components, "--text-encoder", os.path.relpath(components)]
    for command in (flags, ["--export", tmp_path / "whole", "--model", moved]):
        result = call("sample.py", *command, *again)
        assert result.returncode == 0, result.stderr


def test_lists_of_prompts(checkpoint, tmp_path):
    """Read for what they are or refused, whatever wrote them; a cut prompt is said, once."""

    def read(name, data):
        (tmp_path / name).write_bytes(data)
        return [record["prompt"] for record in sample.read_prompts(str(tmp_path / name))]

    text, wanted = "a photo of a star\r\n\r\n  \r\na café\u2028 \r\n", ["a photo of a star", "a café"]
    assert read("a.txt", text.encode()) == read("a.TXT", codecs.BOM_UTF8 + text.encode()) == wanted
    assert read("a.txt", text.encode("utf-16")) == wanted
    assert read("a.txt", text.replace("\r\n", "\r").encode()) == wanted
    assert read("a.txt", codecs.BOM_UTF16_BE + text.encode("utf-16-be")) == wanted
    lines = '{"prompt": "a star\u2028", "tag": 1}\r\n\n{"prompt": "caf\\u00e9"}'
    assert read("a.jsonl", codecs.BOM_UTF8 + lines.encode()) == ["a star\u2028", "café"]
    bad = [b"a star\ncaf\xe9\n", b"a star\na\0b\n", text.encode("utf-16-le"), text.encode("utf-32")]
    bad += [b'{"prompt": "a star"}\n', b"{\\rtf1\\ansi a star}", b"", b"\n \n"]
    no_text = '{"prompt": " "}', '{"prompt": "\\ud83d"}', '{"prompt": "a\\u0000"}', "[" * 10**5
    lines = ['{"caption": "a star"}', '"a star"', '["a star"]', '{"prompt": 3}', "a star", *no_text]
    wrong = [("a.txt", data, "a.txt") for data in bad]
    wrong += [("a.jsonl", b'{"prompt": "a"}\n' + line.encode(), "a.jsonl, line 2") for line in lines]
    wrong += [(name, b"a star", "must be a .txt or a .jsonl") for name in ("a.json", "a.csv", "a")]
    for name, data, reason in wrong:
        with pytest.raises(ValueError, match=reason):
            read(name, data)
    read("long.txt", ("a star\n" + "a red star " * 50 + "\n" + "a blue star " * 50).encode())
    flags = f"--prompts {tmp_path}/long.txt --steps 1 --model {checkpoint} --out {tmp_path}"
    result = call("sample.py", *flags.split())
    assert result.returncode == 0 and result.stderr.count("2 of 4 prompts are cut to the 120") == 1


# -- 6. train.py and the chain of stages ---------------------------------------------------------------------


def test_imports_run_one_way():
    """t2md <- data <- sample <- train <- claims: whoever reads one needs only what stands before it."""
    order, seen = ["t2md", "data", "sample", "train", "claims"], set()
    paths = [path for room in (".", "data", "claims") for path in pathlib.Path(HERE, room).glob("*.py")]
    for path in paths:
        room = path.parent.name if path.parent.name in order else path.stem
        if path.name.startswith("test_"):
            continue
        imports = [n for n in ast.walk(ast.parse(path.read_text())) if hasattr(n, "names")]
        names = {getattr(n, "module", None) or n.names[0].name for n in imports}
        for other in {name.split(".")[0] for name in names} & set(order):
            earlier = order.index(other) < order.index(room)
            assert earlier or other == room in ("data", "claims"), f"{path} imports {other}"
            seen.add((room, other))
    assert {("data", "t2md"), ("sample", "data"), ("train", "sample"), ("claims", "train")} <= seen


def test_muon_is_torchs():
    """In value, from the same gradients, but for torch's rounding to bfloat16."""
    torch.manual_seed(0)
    start = [torch.randn(*shape) for shape in ((24, 40), (40, 24), (16, 16))]
    weights, copies = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    muon = train.Muon([dict(params=weights, lr=0.02, weight_decay=0.1)], {})
    reference = torch.optim.Muon(copies, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(weights, copies):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        muon.step()
        reference.step()
    for a, b, before in zip(weights, copies, start):
        assert relative(a - before, b - before) < 0.02


def test_rates_and_decay_of_each_parameter():
    """What is new learns faster; biases, norms and tables do not decay, nor what mamba-ssm marks so."""
    model = DiM(True, False, pattern="SHW", **TINY)
    plan = train.settings("kd", arguments("--stage kd --config t2md"))
    (adamw,) = train.new_optimizers(model, plan, train.modules(model, train.STAGES["kd"].faster))
    groups = {id(p): group for group in adamw.param_groups for p in group["params"]}
    still = {name for name, p in model.named_parameters() if groups[id(p)]["weight_decay"] == 0}
    of_mamba = ("A_log", "D", "dt_bias", "norm.weight", "conv1d.bias")
    assert {"blocks.1.mixer.mamba." + name for name in of_mamba} <= still
    assert {"blocks.0.scale_shift_table", "scale_shift_table", "padding.tokens", "proj_out.bias"} <= still
    for name, p in model.named_parameters():
        assert name in still or name.endswith("weight") and p.ndim > 1
        assert groups[id(p)]["base_lr"] == (1e-4 if ".mamba." in name or ".fuse." in name else 2e-5), name


def arguments(flags):
    return train.parse_arguments(flags.split())


def test_shares_are_of_the_images():
    """hires1: four fifths of the images, not of the batches, are of twice the size; a restart goes on."""
    args = arguments("--stage hires1 --steps 4000")
    job = types.SimpleNamespace(
        name="hires1", settings=train.settings("hires1", args) | dict(sizes={2: 0.8, 1: 0.2})
    )
    endless = types.SimpleNamespace(order=lambda images: ([k] * images for k in itertools.count()))
    steps = list(train.batches(job, args, {1: endless, 2: endless}, 0))
    seen = {m: sum(len(chosen) for k, chosen in steps if k == m) for m in (1, 2)}
    assert {(m, len(chosen)) for m, chosen in steps} == {(1, 32), (2, 8)}
    assert abs(seen[2] / sum(seen.values()) - 0.8) < 0.02
    assert [chosen[0] for m, chosen in steps if m == 2] == list(range(seen[2] // 8))
    assert list(train.batches(job, args, {1: endless, 2: endless}, 1000)) == steps[1000:]


def test_draws_differ_from_place_to_place():
    generators = [files.generator(0, "kd", step, image) for step in range(3) for image in range(3)]
    assert len({torch.rand(1, generator=generator).item() for generator in generators}) == 9


def refused(result, *words):
    error = result.stderr.strip()
    assert result.returncode != 0 and "Traceback" not in error, error
    assert all(word in error for word in words), error
    assert len(error.splitlines()[-1]) > 20


def test_flags_are_for_the_stage_that_is_named():
    args = arguments("--stage hires2 --steps 7 --timesteps 600 300 --snr-weight 0 --lr 1")
    default = train.PIXART | train.SMALL | train.STAGES["hires2"].shapes
    changed = default | dict(steps=7, timesteps=[600, 300], snr_weight=0.0, lr=1.0)
    assert default["snr_weight"] and train.settings("hires2", args) == changed
    assert train.settings("hires1", args) == train.PIXART | train.SMALL | train.STAGES["hires1"].shapes
    for numbers in (("600", "0"), ("-1", "9"), ("600", "nan")):
        refused(call("train.py", "--stage", "kd", "--timesteps", *numbers), "and a positive deviation")
    refused(call("train.py", "--stage", "distill"), "invalid choice", "kd")
    refused(call("train.py", "--stage", "kd", "--pattern", "SXW"), "--pattern SXW must be made of")


@functools.cache
def make_chain():
    folder = tempfile.TemporaryDirectory()
    flags = f"--stage all --steps 2 --batch-size 2 --examples 1 --out {folder.name}"
    generate, train_part = (functools.partial(f, steps=2) for f in (sample.generate, parts.train_part))
    with mock.patch.object(sample, "generate", generate), mock.patch.object(parts, "train_part", train_part):
        result = call("train.py", *flags.split())
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def chain():
    """The whole path in miniature, from no weights at all, two steps a stage; made once for all files."""
    return make_chain().name


def raw_weights(out, stage):
    return train.read_state(os.path.join(out, stage))["model"]


def steps_done(folder):
    state = train.read_state(str(folder))
    return state["step"], state["steps"]


def test_the_chain_trains_what_it_should(chain):
    for stage in train.CHAIN:
        log = read_log(os.path.join(chain, stage))
        assert [entry["step"] for entry in log] == [0, 1] and not any(entry["skipped"] for entry in log)
        rows = 2 if stage in ("forcing", "kd") else 1  # the teacher's above
        assert Image.open(os.path.join(chain, stage, "step-000002.png")).size == (128, rows * 128)
        config = json.load(open(os.path.join(chain, stage, "config.json")))
        adapted = stage in ("adapt", "hires1", "hires2")
        assert config["pattern"] == ("SSSSSSS" if stage == "teacher" else "SHWHWHW")
        assert config["pos_embed"] == ("centered" if adapted else "pixart")
        assert config["beta_schedule"] == ("scaled_linear" if adapted else "linear")
        sampler = [config.get(name) for name in ("guidance", "guidance_interval", "renoise", "start_size")]
        assert sampler == [3.0, 400, *((60, 16) if stage.startswith("hires") else (600, None))]
        assert config["vae"] == ("../vae_adapt" if adapted else "../vae")
        assert config["text_encoder"] == ("../text_encoder_adapt" if adapted else "../text_encoder")
        assert config["sample_size"] == 16 * {"hires1": 2, "hires2": 4}.get(stage, 1)
        model = T2MD.from_pretrained(os.path.join(chain, stage))
        assert model.base / model.interpolation_scale == 8 and not model.conditioned_on_size
    within = dict(forcing=(".mamba.", ".fuse."), kd=(".mixer.",), adapt=("",), hires1=("",), hires2=("",))
    for stage, parts_of_names in within.items():
        args = arguments(f"--stage all --out {chain}")
        start = train.start_model(train.resolve(stage, args), args).state_dict()
        before = T2MD.from_pretrained(os.path.join(chain, train.STAGES[stage].after)).state_dict()
        assert all(torch.equal(start[name], weight) for name, weight in before.items() if name in start)
        weights = raw_weights(chain, stage)
        moved = {name for name, weight in weights.items() if not torch.equal(weight, start[name])}
        assert moved == {name for name in weights if any(part in name for part in parts_of_names)}
    args = arguments(f"--stage adapt --out {chain} --pos-embed pixart")  # the teacher's
    job = train.resolve("adapt", args)
    assert train.start_model(job, args).config.pos_embed == job.record["pos_embed"] == "pixart"


def test_the_base_size_is_the_teachers(chain, tmp_path):
    """PixArt's 1024 model: hires1 trains at 2048 and is sampled there, at the coordinates that it knows."""
    student = t2md.student_of(as_teacher(shuffled(pixart(128)), tmp_path), "SW", d_state=8, head_dim=16)
    student.register_to_config(vae=f"{chain}/vae", text_encoder=f"{chain}/text_encoder")
    student.save_pretrained(tmp_path / "out" / "adapt")
    args = arguments(f"--config t2md --stage hires1 --out {tmp_path}/out")
    model = train.start_model(train.resolve("hires1", args), args)
    scale = model.config.interpolation_scale
    assert model.conditioned_on_size and model.config.sample_size == 256 and scale == 4


def kd_command(chain, out, flags="--steps 6 --batch-size 2 --save-every 2 --examples 0"):
    return ["train.py", *f"--stage kd {flags} --teacher {chain}/teacher --out {out}".split()]


def test_kd_that_was_cut_off_goes_on(chain, tmp_path):
    """By Ctrl-C here; what kd only reads stays as it was; finished, it is neither begun again nor another."""
    frozen = [os.path.join(chain, name) for name in ("teacher", "vae", "text_encoder")]
    before = [files.fingerprint(folder) for folder in frozen]
    copy_parts(chain, tmp_path, "vae text_encoder forcing")
    command, effects = kd_command(chain, tmp_path), [*[mock.DEFAULT] * 3, KeyboardInterrupt]
    with mock.patch.object(t2md, "kd_loss", mock.Mock(wraps=t2md.kd_loss, side_effect=effects)):
        refused(call(*command), "stopped; the same command continues from the last checkpoint")
    assert steps_done(tmp_path / "kd") == (2, 6) and len(read_log(tmp_path / "kd")) == 3
    last = call(*command)
    assert last.returncode == 0, last.stderr
    assert [line["step"] for line in read_log(tmp_path / "kd")] == list(range(6))
    assert steps_done(tmp_path / "kd") == (6, 6)
    assert [files.fingerprint(folder) for folder in frozen] == before
    assert "kd: finished" in call(*command).stdout
    other = call(*command, "--init", "teacher")
    refused(other, "was made with init forcing, not teacher", "give the same again")


def test_a_stage_goes_on_with_what_it_was_begun_with(chain, tmp_path):
    """Or says so: neither a finished kd nor forcing is passed off as another row's, whatever differs."""
    other = tmp_path / "other"
    copy_parts(chain, tmp_path, "vae text_encoder teacher forcing kd")
    copy_parts(chain, other, "teacher vae text_encoder")
    shuffled(t2md.load_backbone(str(other / "teacher"))).save_pretrained(other / "teacher")

    def begin(flags=""):
        args = arguments(f"--stage kd --steps 2 --batch-size 2 --out {tmp_path} {flags}")
        job = train.resolve("kd", args)
        files.claim(job.folder, job.record)

    begin()
    of_forcing_too = ["--pattern HWHWHWH", f"--teacher {other}/teacher"]
    changes = ["--seed 1", "--init llama", "--soft-weight 0", "--mixer-weight 1", "--padding-tokens"]
    changes += ["--local-enhancement", "--data elsewhere", "--lr 1", "--batch-size 5", "--dtype bfloat16"]
    for flags in (*changes, "--timesteps 500 100", f"--vae {other}/vae_2", *of_forcing_too):
        what = flags.split()[0][2:].replace("-", "_")
        with pytest.raises(ValueError, match=f"was made with .*{what} .*, not .*; give the same again"):
            begin(flags)
    shuffled(t2md.load_backbone(str(tmp_path / "forcing"))).save_pretrained(tmp_path / "forcing")
    with pytest.raises(ValueError, match="was made with starts_from [^,]*, not [^,]*; give the same again"):
        begin()
    shutil.rmtree(tmp_path / "kd")
    begin("--seed 1 --data elsewhere --lr 1")  # these of kd itself matter, not of forcing
    for flags in of_forcing_too:
        with pytest.raises(ValueError, match=f"forcing was made with .*{flags.split()[0][2:]} "):
            begin(flags)


def test_what_must_run_first(chain, tmp_path):
    def names(flags):
        return train.stages_to_run(arguments(f"--out {tmp_path} {flags}"))

    assert names("--stage kd") == ["forcing", "kd"]
    assert names("--stage kd --init llama") == ["kd"]
    assert names(f"--stage hires1 --teacher {chain}/teacher") == ["forcing", "kd", "adapt", "hires1"]
    assert names("--stage all") == list(train.CHAIN)
    os.makedirs(tmp_path / "teacher")  # an empty one is none
    assert names("--stage kd") == ["forcing", "kd"]
    copy_parts(chain, tmp_path, "forcing")
    assert names("--stage kd") == ["kd"]
    state = train.read_state(str(tmp_path / "forcing")) | dict(steps=9)
    torch.save(state, tmp_path / "forcing" / "training_state.pt")
    assert names("--stage kd") == ["forcing", "kd"]
    with pytest.raises(ValueError, match="starts from PixArt-alpha.*, it trains no teacher"):
        names("--stage teacher --config t2md")


def test_a_folder_in_use_and_a_damaged_one_are_refused_and_kept(chain, tmp_path):
    copy_parts(chain, tmp_path, "vae text_encoder forcing kd")
    state = tmp_path / "kd" / "training_state.pt"
    state.write_bytes(b"half")
    refused(call(*kd_command(chain, tmp_path)), "training_state.pt cannot be read")
    with files.lock(str(tmp_path / "kd")):
        refused(call(*kd_command(chain, tmp_path)), "kd is in use by another run")
    assert state.read_bytes() == b"half" and len(read_log(tmp_path / "kd")) == 2


def test_a_teacher_can_be_trained_further(chain, tmp_path):
    flags = f"--stage teacher --steps 1 --batch-size 2 --examples 0 --teacher {chain}/teacher --lr 1e-9"
    train.run(arguments(f"{flags} --out {tmp_path}"))
    before = T2MD.from_pretrained(os.path.join(chain, "teacher")).state_dict()
    after = raw_weights(tmp_path, "teacher")
    assert all((after[name] - weight).abs().max() < 1e-6 for name, weight in before.items())
    assert not torch.equal(after["proj_out.weight"], before["proj_out.weight"])
    vae = json.load(open(tmp_path / "teacher" / "config.json"))["vae"]
    assert os.path.samefile(tmp_path / "teacher" / vae, os.path.join(chain, "vae"))


def test_a_teacher_may_be_a_transformer_alone_conditioned_on_size(chain, tmp_path):
    shape = dict(num_layers=2, num_attention_heads=4, attention_head_dim=24, cross_attention_dim=96)
    shape |= dict(sample_size=16, caption_channels=64, use_additional_conditions=True)
    PixArtTransformer2DModel(**shape).save_pretrained(tmp_path / "alone")
    data = write_images(tmp_path)
    for stage, adapted in (("forcing", ""), ("kd", ""), ("adapt", "_adapt")):
        flags = f"--stage {stage} --config t2md --teacher {tmp_path}/alone --pattern SW --data {data}"
        flags += f" --vae {chain}/vae{adapted} --text-encoder {chain}/text_encoder{adapted}"
        flags += f" --steps 1 --batch-size 1 --examples 1 --example-size 64 --out {tmp_path}/out"
        train.run(arguments(flags))
    assert Image.open(tmp_path / "out" / "adapt" / "step-000001.png").size == (128, 128)


def test_a_gradient_that_is_not_finite_is_skipped_and_ten_end_the_run(chain, tmp_path, monkeypatch):
    """Though the loss that is said is finite: weights and EMA stay as they were."""
    copy_parts(chain, tmp_path, "vae text_encoder forcing")
    calls, kd_loss = itertools.count(), t2md.kd_loss

    def spoiled(*models, **inputs):
        loss, terms = kd_loss(*models, **inputs)
        return (loss * float("nan") if next(calls) >= 3 else loss), terms

    monkeypatch.setattr(t2md, "kd_loss", spoiled)
    command = kd_command(chain, tmp_path, "--steps 20 --batch-size 2 --save-every 2 --examples 0")
    refused(call(*command), "not finite ten steps in a row", "Try a smaller --lr")
    assert steps_done(tmp_path / "kd") == (12, 20)
    assert [line["skipped"] for line in read_log(tmp_path / "kd")] == [False] * 3 + [True] * 9
    state = train.read_state(str(tmp_path / "kd"))
    assert all(torch.isfinite(w).all() for w in (*state["model"].values(), *state["ema"]["shadow_params"]))


def test_training_on_a_folder_of_images_with_a_cache(chain, tmp_path, monkeypatch):
    """The text encoder is gone before the first step; captions that were cut are said once; what a killed
    save has left is swept away; the source may be spelled in another way, a cache of other parts not."""
    copy_parts(chain, tmp_path, "vae text_encoder teacher")
    data, seen, loaded = write_images(tmp_path), [], []
    with open(tmp_path / "images" / "metadata.jsonl", "a") as file:
        file.write(json.dumps(dict(file_name="red.png", text="red " * 200)))
    load, forcing_loss = train.load_networks, t2md.forcing_loss

    def load_networks(*arguments):
        networks = load(*arguments)
        loaded.append(weakref.ref(networks[3].model))
        return networks

    def spy(*models, **x):
        gc.collect()
        seen.append((loaded[-1]() is None, os.path.exists(tmp_path / "forcing" / ".saving-1")))
        return forcing_loss(*models, **x)

    monkeypatch.setattr(train, "load_networks", load_networks)
    monkeypatch.setattr(t2md, "forcing_loss", spy)
    (tmp_path / "forcing" / ".saving-1").mkdir(parents=True)
    flags = f"--stage forcing --batch-size 2 --examples 0 --out {tmp_path} --cache {tmp_path}/cache --data"
    first = call("train.py", *flags.split(), data, "--steps", 2)
    assert first.returncode == 0 and "1 captions were longer" in first.stdout, first.stderr
    again = call("train.py", *flags.split(), os.path.relpath(data) + "/", "--steps", 3)
    assert again.returncode == 0 and seen == [(True, False)] * 3, again.stderr
    shutil.rmtree(tmp_path / "forcing")
    refused(call("train.py", *flags.split(), data, "--vae", f"{chain}/vae_adapt"), "cache was made with vae")
    shutil.rmtree(tmp_path / "forcing")
    refused(call("train.py", *flags.split(), "nowhere"), "nowhere is neither a folder nor a pattern")


def test_offline_is_said_and_what_is_no_repository_is_not_asked_for(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="(?i)offline|connect|network|internet"):
        t2md.load_backbone("nobody/has-this-model")
    for path in ("nowhere", "./no/where", "/no/where", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            VAE(path)


def test_a_checkpoint_is_due_by_time_too(chain, tmp_path, monkeypatch):
    """Every --save-minutes, whatever --save-every says; pictures are drawn at the latter alone."""
    copy_parts(chain, tmp_path, "vae text_encoder forcing")
    clock, saved, save = iter(range(0, 10**6, 100)), [], train.save
    monkeypatch.setattr(train, "time", types.SimpleNamespace(time=lambda: float(next(clock))))  # 100 s a look
    monkeypatch.setattr(train, "save", lambda *a: (saved.append((a[4], a[6] is not None)), save(*a)))
    flags = "--steps 12 --batch-size 2 --save-every 5 --save-minutes 10 --examples 0"
    assert call(*kd_command(chain, tmp_path, flags)).returncode == 0
    assert [step for step, regular in saved if regular] == [5, 10, 12] and len(saved) > 3


# too small for the model file; large enough for it, not for the state
@pytest.mark.parametrize("limit", [100_000, 12_000_000])
def test_a_save_that_fails_keeps_the_previous_checkpoint(chain, tmp_path, limit):
    copy_parts(chain, tmp_path, "forcing kd vae text_encoder teacher")
    state = (tmp_path / "kd" / "training_state.pt").read_bytes()
    flags = f"--stage kd --steps 3 --batch-size 2 --examples 0 --out {tmp_path} --cache {chain}/features"
    os.remove(tmp_path / "kd" / "made_with.json")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # as good as a full disk
    try:
        result = call("train.py", *flags.split())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(result, "train.py:")
    assert (tmp_path / "kd" / "training_state.pt").read_bytes() == state
    assert sample.load_denoiser(str(tmp_path / "kd")).config.pattern == "SHWHWHW"
    assert not [name for name in os.listdir(tmp_path / "kd") if "tmp" in name or "saving" in name]


# -- 7. several processes ------------------------------------------------------------------------------------

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
    for name, have in (("forcing", ""), ("kd", " forcing"), ("stopped", "")):
        copy_parts(chain, root / name, "vae text_encoder teacher" + have)
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
    """By torchrun's SIGTERM to one of them: both finish their step, and the first process saves it."""
    root, errors, codes = two_nodes
    done, planned = steps_done(root / "stopped" / "forcing")
    assert 0 not in codes and 2 <= done < planned == 200, errors
    assert f"forcing: told to stop; saved after step {done}; the same command goes on" in errors
    assert len(read_log(root / "stopped" / "forcing")) == done


@pytest.mark.parametrize("stage", ["forcing", "kd"])
def test_two_processes_and_accumulation_equal_one_process(chain, two_nodes, tmp_path, monkeypatch, stage):
    """3 steps of 5 images: by one process; by two over gloo; by one, an image at a time."""
    monkeypatch.setitem(train.STAGES[stage].shapes, "muon", False)  # it magnifies rounding, as in the others
    monkeypatch.setitem(train.STAGES[stage].shapes, "pictures", 15)
    folders = dict(one=tmp_path / "one", two=two_nodes[0] / stage, accumulated=tmp_path / "accumulated")
    weights = {}
    for name, out in folders.items():
        if name != "two":
            copy_parts(chain, out, "vae text_encoder teacher" + (" forcing" if stage == "kd" else ""))
            flags = THREE_STEPS.format(stage=stage, out=out).split()
            result = call("train.py", *flags, *(["--micro-batch", "1"] if name == "accumulated" else []))
            assert result.returncode == 0, result.stderr
        assert len(read_log(out / stage)) == 3, two_nodes[1]
        weights[name] = torch.cat([w.flatten() for k, w in raw_weights(out, stage).items() if ".mamba." in k])
    for name in ("two", "accumulated"):
        assert 0 < (weights[name] - weights["one"]).norm() < 1e-5 * weights["one"].norm()


def test_no_backend_is_named():
    """So that tensors of the CPU and of a GPU each have their own."""
    with mock.patch.object(files.dist, "init_process_group", side_effect=InterruptedError) as started:
        with pytest.raises(InterruptedError):
            files.start_processes()
    assert not started.call_args.args and "backend" not in started.call_args.kwargs


def test_previews_are_cheap_at_full_size(monkeypatch, tmp_path):
    """In the training dtype, folded, four of them, at the base size unless asked; as of the paper's hires2,
    whose base size is a quarter of what it trains at."""
    drawn = []

    def generate_all(model, vae, encoder, captions, size, seed, **flags):
        fused = {type(m.fuse) for m in (block.mixer for block in model.blocks) if isinstance(m, MambaMixer)}
        drawn.append((model.patch_embed.weight.dtype, fused, len(captions), size))
        return [Image.new("RGB", (8, 8))] * len(captions)

    monkeypatch.setattr(sample, "generate_all", generate_all)
    monkeypatch.setattr(sample, "encode_first", lambda *_: None)
    data = {4: types.SimpleNamespace(rows=range(9), caption=lambda _: "a star")}
    for flags, side in (("", 512), ("--example-size 2048", 2048)):
        args = arguments(f"--config t2md --stage hires2 --dtype bfloat16 --device cpu {flags}")
        job = types.SimpleNamespace(settings=train.settings("hires2", args))
        show = train.example_painter(job, args, None, None, None, data, 512)
        show(T2MD(pattern="SHW", **TINY), str(tmp_path / "a.png"))
        assert drawn[-1] == (torch.bfloat16, {torch.nn.Identity}, 4, (side, side))


def test_batches_are_checked_against_processes_first(monkeypatch, tmp_path):
    """256 images at base size are 16 of 2048 px, too few for 32 processes; nothing has been looked at yet."""
    monkeypatch.setattr(train, "WORLD", 32)
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    args = arguments(f"--config t2md --stage hires2 --data nowhere --out {tmp_path}")
    with pytest.raises(ValueError, match="16 images of its largest size cannot be shared by 32 processes"):
        train.run(args)


def test_a_clusters_variables_are_not_torchruns():
    """RANK and WORLD_SIZE left behind by somebody else launch nothing."""
    command = [sys.executable, "-c", "from data.files import RANK, WORLD; print(RANK, WORLD)"]
    environment = os.environ | dict(RANK="3", WORLD_SIZE="8", LOCAL_RANK="3")
    assert subprocess.check_output(command, env=environment, cwd=HERE, text=True) == "0 1\n"


# -- 8. what is shipped, and the README ----------------------------------------------------------------------


def test_shipped_weights_are_small_and_whole():
    shipped = pathlib.Path(HERE, "assets")
    assert sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file()) <= 20 * 2**20
    for name in ("teacher", "student_kd", "student"):
        model = sample.load_denoiser(str(shipped / name))
        vae, text_encoder = sample.load_parts(model, str(shipped / name))
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert vae.channels == 4 and text_encoder.width == 64


def test_readme_sample_command(tmp_path):
    prompt = "a photo of a red circle and a blue square"
    assert f'python sample.py "{prompt}"' in open(os.path.join(HERE, "README.md")).read()
    result = call("sample.py", prompt, "--out", str(tmp_path), anew=True)
    assert result.returncode == 0, result.stderr
    assert Image.open(result.stdout.strip()).size == (512, 512)
