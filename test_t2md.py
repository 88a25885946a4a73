"""Protects the method: model, losses, sampler and training agree with what we did not write.

    python -m pytest -q

That is diffusers, transformers, a recurrence in float64, and training steps taken apart by hand here.
No network, no GPU, no downloads. What real weights would provide is built here, small, in the real format.
"""

import ast
import codecs
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import http.server
import io
import itertools
import json
import math
import os
import pathlib
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.parse
import weakref
import zlib
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # what is no folder is refused at once, not after five tries

import accelerate
import huggingface_hub
import numpy as np
import pytest
import sentencepiece
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from PIL import Image
from torch.distributed.run import parse_args as torchrun
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

import sample
import t2md
import train
from data import checkpoints, files, index, parts
from data.images import ImageData, to_pixels
from data.prompts import read_prompts
from data.shapes import BACKGROUND, score_shapes
from t2md import T2MD, VAE, DiM, Mamba2, MambaMixer, TextEncoder, ssd, ssd_recurrence

HERE = os.path.dirname(os.path.abspath(__file__))
# One core is enough for small models, and the others have work: see `beside`.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started here
TINY = dict(width=48, heads=2, caption_width=20, d_state=8, head_dim=16, sample_size=16, chunk_size=16)
TINY64 = TINY | dict(caption_width=64)  # as wide as the text encoder of parts.py


@pytest.fixture(autouse=True, scope="session")
def indexes(tmp_path_factory):
    """Indexes of data sets go into a folder of the tests' own."""
    with mock.patch.object(index, "INDEX", str(tmp_path_factory.mktemp("index"))):
        yield


@pytest.fixture(autouse=True, scope="module")
def beside(request, tmp_path_factory):
    """{name: Future of (what it leaves, what it says, exit codes)} of what runs in processes of its own. They
    start first, if a test asks for them, and run beside the other tests of this file: imports take long."""
    starts = dict(
        two_nodes=start_two_nodes,
        by_name=start_by_name,
        exported=start_exported,
        readme_sample=start_readme_sample,
    )
    asked_for = {name for item in request.session.items for name in item.fixturenames}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = {}
        for name, start in starts.items():
            if name in asked_for:
                futures[name] = pool.submit(start(tmp_path_factory.mktemp(name)))
        yield futures


@pytest.fixture
def two_nodes(beside):
    return beside["two_nodes"].result()


@pytest.fixture
def by_name(beside):
    return beside["by_name"].result()


@pytest.fixture
def exported(beside):
    return beside["exported"].result()


@pytest.fixture
def readme_sample(beside):
    return beside["readme_sample"].result()


def start_python(*arguments, **where):
    """Start Python in a process of its own.  where: arguments of Popen, such as cwd and env."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **where)


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


def call(script, *arguments):
    """The same command without a new process, whose imports take seconds; a traceback fails the test that
    calls it."""
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    into_out = contextlib.redirect_stdout(out)
    into_err = contextlib.redirect_stderr(err)
    main = {"train.py": train, "sample.py": sample}[script].main
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
    model = as_teacher(reference, tmp_path)
    x = inputs(size=(h, w))
    resolution = torch.tensor([[512.0, 768], [1024, 1024]])
    conditions = dict(resolution=resolution, aspect_ratio=torch.tensor([[0.67], [1.0]]))
    conditions = dict(added_cond_kwargs=conditions if base == 128 else None)
    arguments = (x["z_t"], x["text"], x["t"])
    mask = x["mask"] if masked else None
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
    original = t2md.rename_pixart(reference.state_dict())
    weights = student.state_dict()
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
    return publish(tmp_path_factory.mktemp("published"))


def publish(folder):
    """PixArt-alpha's repository in miniature as it is published: a learned null caption that diffusers does
    not know, a tokenizer that is a spiece.model alone, configs of an older version."""
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
    model = io.BytesIO()
    settings = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
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


def test_a_teachers_scheduler_is_read(tmp_path):
    """What its file does not say is diffusers' default. What the method does not know is refused."""
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text("{}")
    t2md.check_scheduler(str(tmp_path))
    for other in (dict(prediction_type="v_prediction"), dict(beta_end=0.012), dict(beta_schedule="cosine")):
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"cannot be a teacher: .*{list(other)[0]}"):
            t2md.check_scheduler(str(tmp_path))


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


def write_images(folder, captions=("a red square", "a green square", "a blue square")):
    """Three captioned pictures in a folder."""
    (folder / "images").mkdir()
    with open(folder / "images" / "metadata.jsonl", "w") as file:
        for colour, caption in zip(("red", "green", "blue"), captions):
            Image.new("RGB", (600, 600), colour).save(folder / "images" / f"{colour}.png")
            file.write(json.dumps(dict(file_name=f"{colour}.png", text=caption)) + "\n")
    return str(folder / "images")


def test_what_works_with_pixart_works_here():
    """diffusers' and accelerate's hooks see modules that are called, so no weight is read beside them."""
    model = shuffled(T2MD(pattern="SHW>", **TINY)).requires_grad_(False)
    x = inputs()
    want = t2md.predict_noise(model, **x)
    offloaded = copy.deepcopy(model)
    cast = copy.deepcopy(model)
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
    a = u.clone().requires_grad_()
    b = u.clone().requires_grad_()
    out = ours(a)
    expected = theirs(b)
    assert relative(out, expected) < 1e-5
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert relative(a.grad, b.grad) < 1e-5
    for (name, p), (_, q) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters())):
        assert relative(p.grad, q.grad) < 1e-5, name


def scan_arguments(l=53, groups=1, dtype=torch.float64):
    random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = random(2, l, 4, 6)
    dt = random(2, l, 4).exp()
    A = -random(4).exp()
    drawn = x, dt, A, random(2, l, groups, 5), random(2, l, groups, 5), random(4)
    return [v.to(dtype).requires_grad_() for v in drawn]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 7, 16, 53, 64])
def test_ssd_is_the_recurrence(groups, chunk):
    x, dt, A, B, C, D = arguments = scan_arguments(groups=groups)
    y = ssd(x, dt, A, B, C, chunk, D=D)
    expected = ssd_recurrence(x, dt, A, B, C, D=D)
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
    y = kernel(*tensors, 16, D=D)
    expected = ssd_recurrence(*tensors, D=D)
    assert relative(y, expected) < 1e-3
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), arguments) for out in (y, expected))):
        assert relative(a, b) < 1e-2


def test_kernels_are_asked_for_what_they_compute(monkeypatch):
    """flash-attn knows no mask, so cross-attention goes without it; mamba-ssm's scan is given D as well."""
    model = shuffled(T2MD(pattern="SH", **TINY))
    expected = t2md.predict_noise(model, **inputs())
    asked = []

    def flash_attention(q, k, v):  # (b, l, heads, width of a head)
        asked.append("attention")
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def chunk_scan(x, dt, A, B, C, chunk_size, D):
        asked.append("scan")
        return ssd(x, dt, A, B, C, chunk_size, D=D)

    monkeypatch.setattr(t2md, "attention_kernel", lambda device, dtype: flash_attention)
    monkeypatch.setattr(t2md, "scan_kernel", lambda device, dtype: chunk_scan)
    assert relative(t2md.predict_noise(model, **inputs()), expected) < 1e-5
    assert asked == ["attention", "scan"]


def peak_memory(work):
    """The most bytes that autograd holds for backward at any time while `work` runs."""
    alive = weakref.WeakKeyDictionary()
    peak = 0

    def pack(tensor):
        nonlocal peak
        held = functools.partial(torch.Tensor.detach, tensor)
        alive[held] = tensor.nbytes
        peak = max(peak, sum(alive.values()))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held()):
        work()
    return peak


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


def test_initialisation_is_dits_and_pixarts():
    """Standard deviations of every kind of weight: Xavier, 0.02, tables of 1 / sqrt(d), zeros."""
    torch.manual_seed(0)
    model = DiM(True, True, pattern="SHW>", width=192, heads=4, caption_width=100, d_state=16, head_dim=32)
    xavier = {name: p for name, p in model.named_parameters() if p.ndim == 2 and name.endswith("weight")}
    small = ("timestep_embedder.", "caption_projection.", "adaln_single.")
    zero = ("cross_attention.to_out.0.weight", "proj_out.weight")
    for name, p in xavier.items():
        expected = (2 / sum(p.shape)) ** 0.5
        if name.startswith(small):
            expected = 0.02
        if name.endswith(zero) and ".mamba." not in name:
            expected = 0.0
        assert float(p.std()) == pytest.approx(expected, rel=0.1), name
    assert float(model.patch_embed.weight.std()) == pytest.approx((2 / (192 + 16)) ** 0.5, rel=0.1)
    for table in (model.scale_shift_table, model.blocks[1].scale_shift_table):
        assert float(table.std()) == pytest.approx(192**-0.5, rel=0.1)
    assert float(model.padding.tokens.std()) == pytest.approx(0.02, rel=0.2)
    for name, p in model.named_parameters():
        if (
            name.endswith("bias")
            and "conv1d" not in name
            and "dt_bias" not in name
            and "patch_embed" not in name
        ):
            assert not p.any(), name


@pytest.mark.parametrize("letter", t2md.SCANS)
def test_mixers_scan_in_the_order_of_their_letter(letter):
    """As one Mamba layer over tokens that were put in order here, row by row or column by column."""
    torch.manual_seed(0)
    mixer = MambaMixer(letter, 32, d_state=8, head_dim=16, chunk_size=8).double()
    x = torch.randn(2, 5 * 3, 32, dtype=torch.float64)
    rows = torch.arange(5 * 3)
    columns = torch.tensor([3 * y + x for x in range(3) for y in range(5)])
    orders = {">": [rows], "<": [rows.flip(0)], "v": [columns], "^": [columns.flip(0)]}
    orders |= dict(W=orders[">"] + orders["<"], H=orders["v"] + orders["^"])
    expected = sum(mixer.mamba(x[:, order])[:, order.argsort()] for order in orders[letter])
    expected = mixer.fuse(expected) if letter in "HW" else expected
    assert torch.allclose(mixer(x, (5, 3)), expected, atol=1e-12)


def test_folding_changes_nothing():
    """What sample.py runs: fuse folded into out_proj."""
    model = shuffled(T2MD(pattern="SHW>", **TINY)).double()
    x = inputs(dtype=torch.float64, size=(6, 10))
    folded = t2md.freeze(copy.deepcopy(model), "cpu", torch.float64)
    numbers, fewer = (sum(p.numel() for p in network.parameters()) for network in (model, folded))
    assert fewer == numbers - 2 * 48**2
    assert relative(t2md.predict_noise(folded, **x), t2md.predict_noise(model, **x)) < 1e-12


# -- 3. the paper's configuration ----------------------------------------------------------------------------


def test_paper_configuration():
    with torch.device("meta"):
        student = T2MD()
        teacher = T2MD(pattern="S" * 28, out_channels=8, pos_embed="pixart")
        theirs = PixArtTransformer2DModel(sample_size=64, caption_channels=4096)
    assert student.config.guidance == 4.5 and sample.parse_arguments(["a star"]).steps == 20
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
    padding = t2md.PaddingTokens(8)
    h = torch.randn(2, 4 * 5, 8)
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
    enhanced = t2md.student_of(teacher, "SW", DiM, d_state=8, head_dim=16, local_enhancement=True)
    enhanced.load_state_dict(plain.state_dict(), strict=False)
    x = inputs(size=(8, 12))
    with torch.no_grad():
        noise = t2md.predict_noise(plain, **x)
        assert torch.equal(t2md.predict_noise(enhanced, **x), noise)
        enhanced.enhance_last.conv.weight[:, 0, 0, 1] = 0.1  # sees the token above
        assert relative(t2md.predict_noise(enhanced, **x), noise) > 1e-3
        enhanced.enhance_last.conv.weight[:, 0, 1, 1] = 0.0
        h = torch.randn(2, 4 * 6, enhanced.config.width)
        above = enhanced.enhance_last(h, (4, 6)).unflatten(1, (4, 6))[:, 1:]
        assert torch.allclose(above, 0.1 * h.unflatten(1, (4, 6))[:, :-1], atol=1e-6)
    assert enhanced.enhance_first in train.modules(enhanced, train.STAGES["kd"].trains)


def test_attention_to_mamba_initialisation(tmp_path):
    """C, B and x of a Mamba layer are the attention's queries, keys and values, head by head."""
    teacher = as_teacher(shuffled(pixart()), tmp_path)
    student = t2md.student_of(teacher, "SW", **t2md.llama_shape(teacher))
    t2md.copy_attention(student.blocks[1].mixer, teacher.blocks[1].mixer)
    mamba = student.blocks[1].mixer.mamba
    attention = teacher.blocks[1].mixer
    u = torch.randn(1, 5, 48)
    assert (mamba.n_heads, mamba.n_groups, mamba.d_state, mamba.head_dim) == (2, 2, 24, 24)
    _, xBC, _ = mamba.in_proj(u).split(mamba.split_sizes, dim=-1)
    v, k, q = (layer(u) - layer.bias for layer in (attention.to_v, attention.to_k, attention.to_q))
    assert torch.allclose(xBC, torch.cat([v, k, q], dim=-1), atol=1e-6)
    same = attention.to_out[0](u)  # two directions that agree pass through fuse as one
    assert torch.allclose(student.blocks[1].mixer.fuse(2 * mamba.out_proj(u)), same, atol=1e-6)
    assert t2md.predict_noise(student, **inputs()).isfinite().all()


def test_save_and_load(tmp_path):
    config = dict(pattern="SHW", pos_embed="pixart", beta_schedule="scaled_linear", vae="../vae")
    model = shuffled(T2MD(**config, **TINY))
    x = inputs()
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors", "t2md.py"]
    for loaded in (T2MD.from_pretrained(tmp_path), t2md.load_backbone(str(tmp_path))):
        assert {name: loaded.config[name] for name in config} == config
        assert torch.equal(t2md.predict_noise(loaded, **x), t2md.predict_noise(model, **x))
    assert t2md.load_backbone(str(tmp_path), pos_embed="centered").config.pos_embed == "centered"


def test_gradient_checkpointing_changes_nothing():
    model = shuffled(T2MD(pattern="SHW", **TINY))
    gradients = []
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
    x = inputs(size=(8, 12))
    _, taken = t2md.predict_noise(teacher, **x, return_mixers=True)
    fed = [block.mixer(h, (4, 6)) for block, (h, _) in zip(student.blocks, taken)]
    expected = sum((fed[n] - taken[n][1]).square().mean() for n in range(1, 7))
    assert torch.isclose(t2md.forcing_loss(student, teacher, **x), expected, rtol=1e-5)


def test_checkpointed_forcing_has_the_same_gradients_and_the_memory_of_one_mixer():
    peaks = {}
    for depth in (7, 28):
        teacher = T2MD(pattern="S" * depth, pos_embed="pixart", **TINY).requires_grad_(False)
        student = T2MD(pattern="SHWHWHW" * (depth // 7), pos_embed="pixart", **TINY)
        gradients = []
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
    x = inputs()
    noise = torch.randn(2, 4, 16, 16)
    predictions = [t2md.predict_noise(model, **x, return_mixers=True) for model in pair]
    (soft_target, outputs), (predicted, mixers) = predictions
    mse = (predicted - noise).square().mean()
    soft = (predicted - soft_target).square().mean()
    mixer = sum((a - b).square().mean() for (_, a), (_, b) in zip(outputs, mixers)) / 7
    loss, terms = t2md.kd_loss(student, teacher, **x, noise=noise)
    assert torch.isclose(loss, mse + 0.5 * soft + 0.2 * mixer, rtol=1e-5)
    assert torch.isclose(terms["mse"], mse) and torch.isclose(terms["soft"], soft)
    assert torch.isclose(terms["mixer"], mixer, rtol=1e-5)
    assert loss.requires_grad and not any(t.requires_grad for t in terms.values())


def test_the_shapes_world_weighs_errors_by_their_noise():
    """By 1 / sqrt(SNR), in [1, 8]; the SNR of a shape grows with its area. The paper's config does not."""
    schedule = train.DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2)
    t = torch.tensor([300, 600, 900])
    alpha_bar = schedule.alphas_cumprod[t]
    for amplitude in (1.0, 0.5):
        snr = amplitude**2 * alpha_bar / (1 - alpha_bar)
        weights = torch.tensor([min(max(float(r) ** -0.5, 1.0), 8.0) for r in snr])
        assert torch.allclose(train.noise_weight(schedule, t, amplitude).flatten(), weights, rtol=1e-5)
    assert torch.equal(train.noise_weight(schedule, t, 0.0), torch.ones(3, 1, 1, 1))
    assert not any(settings.snr_weight for settings in train.T2MD_SETTINGS.values())


def test_bfloat16_holds_over_4096_tokens(tmp_path):
    """As sampled with --dtype bfloat16: near float32, and finite with activations a thousand times larger."""
    shuffled(T2MD(pattern="SHW>", **TINY)).save_pretrained(tmp_path)
    exact, rounded = (t2md.load_denoiser(str(tmp_path), dtype=d) for d in (torch.float32, torch.bfloat16))
    mamba = rounded.blocks[1].mixer.mamba
    assert mamba.A_log.dtype == mamba.dt_bias.dtype == torch.float32
    assert mamba.in_proj.weight.dtype == torch.bfloat16
    x = inputs(1, size=(128, 128))
    z = x["z_t"].bfloat16()
    text = x["text"].bfloat16()
    with torch.no_grad():
        want = t2md.predict_noise(exact, **x)
        got = t2md.predict_noise(rounded, z, x["t"], text, x["mask"]).float()
        large = t2md.predict_noise(rounded, 1000 * z, x["t"], 1000 * text, x["mask"])
    assert relative(got, want) < 0.03 and torch.isfinite(large).all()


# -- 5. the sampler is diffusers' ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    return save_components(tmp_path_factory.mktemp("chain") / "parts")


def save_components(folder):
    """A tiny VAE with a scale of its own, and a tiny T5 with tokenizer, saved in a pipeline's layout."""
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
    text_encoder = TextEncoder(components)
    vae = VAE(components)
    pieces = dict(tokenizer=text_encoder.tokenizer, text_encoder=text_encoder.model, vae=vae.model)
    pipeline = PixArtAlphaPipeline(**pieces, transformer=model, scheduler=sample.make_scheduler(schedule))
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a photo of a red star", "a photo of two circles"]
    noise = torch.cat([files.noise_for(s, 4, 16, 16) for s in (1, 2)])
    flags = dict(negative_prompt="a square", num_inference_steps=5, guidance_scale=3.0)
    flags |= dict(use_resolution_binning=False, clean_caption=False, latents=noise.clone())
    expected = pipeline(prompts, output_type="latent", **flags).images
    text, mask = text_encoder(["a square"] * 2 + prompts)
    settings = sample.SamplerSettings(steps=5, guidance=3.0)
    got = sample.denoise(model, text, mask, noise.clone(), settings)
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
    vae = VAE(components)
    encoder = TextEncoder(components)
    x = torch.rand(1, 3, 192, 256) * 2 - 1
    posterior = vae.model.encode(x).latent_dist
    features, _ = encoder(["a photo of a star"])
    vae.decode(torch.randn(1, 4, 16, 16), tile=64)
    with torch.autocast("cpu", torch.bfloat16):
        mean, std = vae.moments(x)
        assert torch.equal(encoder(["a photo of a star"])[0], features)
        decoded = vae.decode(mean)
    assert torch.allclose(mean, posterior.mean * 0.7) and torch.allclose(std, posterior.std * 0.7)
    assert mean.shape == (1, 4, 24, 32)
    assert torch.allclose(decoded, vae.model.decode(mean / 0.7).sample.clamp(-1, 1), atol=1e-5)
    assert not any(p.requires_grad for p in vae.model.parameters())


def test_tiled_decode_has_no_seams():
    """The shipped VAE on a flat sky of 1536 x 512 px in tiles of 1024, blended over pixels 768 to 1024, in
    1/255: equal to the plain decode, no step between neighbouring columns that it does not have."""
    vae = VAE(os.path.join(HERE, "assets", "vae"))
    latents, _ = vae.moments(to_pixels([Image.new("RGB", (1536, 512), BACKGROUND)]))
    tiled, plain = (127.5 * vae.decode(latents, tile) for tile in (1024, 1536))
    assert 0 < (tiled - plain).abs().mean() < 0.5
    steps = (tiled - plain).diff(dim=-1).abs().amax((0, 1, 2))
    assert steps[760:1032].max() < 0.25


def test_the_text_encoder_is_gone_before_the_denoiser_works(monkeypatch, tmp_path):
    """And what it said of each caption stands in for it, padded and masked."""
    encoders = []
    gone = []

    def load_parts(*arguments, **flags):
        pieces = real_load_parts(*arguments, **flags)
        encoders.append(pieces[1])
        return pieces

    def denoise(model, text, mask, noise, *_, **__):
        gone.append("model" not in vars(encoders[0]))
        return noise

    real_load_parts = t2md.load_parts
    monkeypatch.setattr(t2md, "load_parts", load_parts)
    monkeypatch.setattr(sample, "denoise", denoise)
    assert call("sample.py", "a photo of a star", "--out", str(tmp_path)).returncode == 0
    assert gone and all(gone)
    encoder = TextEncoder(os.path.join(HERE, "assets", "text_encoder"))
    captions = ["a photo of a red circle and a blue square", "", "a photo of a star"]
    features, mask = encoder(captions)
    looked_up, known = sample.EncodedCaptions(sample.encode_captions(encoder, captions))(captions)
    assert torch.equal(mask, known) and torch.allclose(features * mask[..., None], looked_up, atol=1e-5)


def test_frozen_parts_are_loaded_when_they_are_needed(components):
    """Config and tokenizer are read at once; the weights come with the first use, and go when told."""
    vae = VAE(components)
    encoder = TextEncoder(components)
    assert (vae.channels, vae.factor, encoder.width) == (4, 8, 64)
    assert "model" not in vars(vae) and "model" not in vars(encoder)
    first, _ = encoder(["a star"])
    for part in (vae, encoder):
        assert part.model is part.model
        part.unload()
        assert "model" not in vars(part)
    assert torch.equal(encoder(["a star"])[0], first)


def test_a_text_encoder_without_its_tokenizer_is_refused(components, tmp_path):
    """transformers makes an empty one, to which all words are the same."""
    shutil.copytree(os.path.join(components, "text_encoder"), tmp_path / "t5")
    with pytest.raises(ValueError, match="t5 lacks its tokenizer: spiece.model or tokenizer.json"):
        TextEncoder(str(tmp_path / "t5"))


def test_negative_and_upscale_reach_the_sampler(checkpoint, monkeypatch):
    seen = []

    def noted_text(model, text, mask, noise, *_):
        seen.append((text, noise.shape[-1]))
        return noise

    monkeypatch.setattr(sample, "denoise", noted_text)
    generate = sample.load(checkpoint)
    generate(["a star"], (128, 128), [0], negative="a red cross", upscale=2)
    ((text, side),) = seen
    _, _, text_encoder = generate.args
    assert torch.equal(text, text_encoder(["a red cross", "a star"])[0]) and side == 16


def test_picture_k_is_of_seed_plus_k(checkpoint, monkeypatch):
    """In the second batch too."""
    monkeypatch.setattr(sample, "images_at_once", lambda size: 2)
    generate = sample.load(checkpoint)
    prompts = ["a star", "a cross", "a circle"]
    drawn = sample.generate_all(*generate.args, prompts, (64, 64), 5, steps=2)
    (last,) = generate(["a circle"], (64, 64), [7], steps=2)
    assert np.abs(np.asarray(drawn[2], float) - np.asarray(last, float)).max() <= 1


def test_a_picture_that_is_not_finite_is_no_black_picture(checkpoint, monkeypatch):
    monkeypatch.setattr(sample, "denoise", lambda *_: torch.full((1, 4, 8, 8), torch.nan))
    with pytest.raises(FloatingPointError, match="not finite; try --dtype float32"):
        sample.load(checkpoint)(["a star"], (64, 64), [0])


@pytest.fixture
def passes(monkeypatch):
    """[(rows, side of the latents, timestep)] of every pass of the sampler through a model."""
    seen = []

    def spy(model, z_t, t, *rest, **conditions):
        seen.append((len(z_t), z_t.shape[-1], int(t)))
        return predict_noise(model, z_t, t, *rest, **conditions)

    predict_noise = t2md.predict_noise
    monkeypatch.setattr(t2md, "predict_noise", spy)
    return seen


def grid_of(beta_schedule, steps):
    scheduler = sample.make_scheduler(beta_schedule)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


def test_timesteps_are_diffusers_or_moved_up_as_by_its_scheduler_for_sd3():
    """All different, however many there are, so that the solver divides by no zero."""
    ours = sample.make_scheduler("scaled_linear")
    for steps in (1, 7, 20, 26, 999):
        sample.set_timesteps(ours, steps, 1)
        assert ours.timesteps.tolist() == grid_of("scaled_linear", steps)
    for shift in (0.5, 1.8, 3.35):
        sample.set_timesteps(ours, 20, shift)
        sd3 = FlowMatchEulerDiscreteScheduler(shift=shift)
        sd3.set_timesteps(sigmas=[t / 999 for t in grid_of("scaled_linear", 20)])
        assert ours.timesteps.tolist() == [round(999 * float(sigma)) for sigma in sd3.sigmas[:-1]]
    sample.set_timesteps(ours, 999, 3.35)
    assert (ours.timesteps.diff() < 0).all() and ours.timesteps[0] == 999


def test_guidance_in_an_interval(components, passes):
    """Below it the model sees b rows, not 2b; and each step is the guided or the plain one."""
    torch.manual_seed(0)
    model = shuffled(T2MD(pattern="SH", **TINY64)).double().eval()
    encoder = TextEncoder(components)
    text, mask = encoder(["", "", "a star", "a red cross"])
    noise = torch.randn(2, 4, 16, 16)
    grid = grid_of("linear", 8)

    def denoise(guidance, interval):
        passes.clear()
        settings = sample.SamplerSettings(steps=8, guidance=guidance, guidance_interval=interval)
        return sample.denoise(model, text, mask, noise, settings), [rows for rows, _, _ in passes]

    @torch.no_grad()
    def by_hand(z, interval):
        scheduler = sample.make_scheduler("linear")
        scheduler.set_timesteps(8)
        for t in scheduler.timesteps:
            with_text = t2md.predict_noise(model, z, t, text[2:].double(), mask[2:])
            without = t2md.predict_noise(model, z, t, text[:2].double(), mask[:2])
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
    abar = sample.make_scheduler("scaled_linear").alphas_cumprod.double()
    seen = []
    snr = [float(a / (1 - a)) for a in abar]

    def predict(z, t):
        seen.append((z.shape, int(t)))
        return 0.3 * z + float(t) / 1000

    noise = torch.randn(2, 4, 8, 12)
    z_t = torch.randn(2, 4, 8, 12)
    pool = torch.nn.functional.avg_pool2d
    for m, t in ((2, 999), (2, 700), (2, 850), (4, 999)):
        guided = sample.upsample_guidance(predict, z_t, t, noise, abar, m)
        nearest = min(range(t + 1), key=lambda s: abs(snr[s] - m**2 * snr[t]))
        assert seen[-1] == ((2, 4, 8 // m, 12 // m), nearest)
        power = (abar[t] + (1 - abar[t]) / m**2).float()
        small = 0.3 * pool(z_t, m) / power.sqrt() + nearest / 1000
        assert torch.allclose(pool(guided, m), small / m, atol=1e-5)
        for a, b in ((guided, noise), (noise, guided)):  # below the pooled means nothing changes
            means = torch.nn.functional.interpolate(pool(a, m), scale_factor=m)
            of_other = torch.nn.functional.interpolate(pool(b, m), scale_factor=m)
            assert torch.allclose(a - means, b - of_other, atol=1e-5)
    assert sample.upsample_guidance(predict, z_t, 699, noise, abar, 2) is noise
    pure = torch.randn(64, 4, 16, 16)  # as z_t at t = 999: pooled and scaled it is again of unit variance

    def noted_deviation(z, t):
        seen.append(z.std())
        return z

    sample.upsample_guidance(noted_deviation, pure, 999, pure, abar, 2)
    assert abs(seen[-1] - 1) < 0.02
    model = T2MD(pattern="S", **TINY64).eval()
    text, mask = TextEncoder(components)(["a star"] * 2)
    settings = sample.SamplerSettings(steps=10, upscale=2, guidance_interval=800)
    sample.denoise(model, text, mask, torch.randn(1, 4, 8, 8), settings)
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


@torch.no_grad()
def progressive_by_hand(model, vae, encoder):
    """The picture of seed 3 at 64, 128 and 256 px: enlarged, noised again up to 600, denoised."""
    text, mask = encoder(["", "a star"])
    pixels = None
    for level, side in enumerate((64, 128, 256)):
        z = files.noise_for(3, 4, side // 8, side // 8, level)
        scheduler = sample.make_scheduler("scaled_linear")
        scheduler.set_timesteps(10)
        steps = scheduler.timesteps
        if level:
            larger = torch.nn.functional.interpolate(pixels, size=(side, side), mode="bicubic").clamp(-1, 1)
            steps = steps[steps <= 600]
            scheduler.set_begin_index(10 - len(steps))
            abar = scheduler.alphas_cumprod[steps[0]]
            z = abar.sqrt() * vae.moments(larger)[0] + (1 - abar).sqrt() * z
        for t in steps:
            noise = t2md.predict_noise(model, z, t, text[1:], mask[1:])
            if t >= 700:
                without = t2md.predict_noise(model, z, t, text[:1], mask[:1])
                noise = without + 3.0 * (noise - without)
            z = scheduler.step(noise, t, z, return_dict=False)[0]
        pixels = vae.decode(z)
    return ((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()


def test_progressive_sampling(checkpoint, passes, monkeypatch):
    """From the trained size on; larger, only the remaining steps of the sampler's own grid run, guided where
    the checkpoint says; each size is decoded once; one seed is one picture in any batch."""
    generate = sample.load(checkpoint)
    decoded = []
    decode = VAE.decode
    moments = mock.Mock(side_effect=VAE.moments)
    monkeypatch.setattr(VAE, "moments", lambda vae, images, tile=None: moments(vae, images, tile))

    def noted_decode(vae, z):
        decoded.append(z.shape[-1])
        return decode(vae, z)

    monkeypatch.setattr(VAE, "decode", noted_decode)
    (image,) = generate(["a star"], (256, 256), [3], steps=10)
    timesteps = grid_of("scaled_linear", 10)
    later = [t for t in timesteps if t <= 600]
    assert image.size == (256, 256) and 0 < len(later) < 10 and decoded == [8, 16, 32]
    larger = [(1, side, t) for side in (16, 32) for t in later]
    assert passes == [(2 if t >= 700 else 1, 8, t) for t in timesteps] + larger
    assert moments.call_args.args[2] == 1024  # pixels of a tile; a 4K picture is encoded in several
    both = generate(["a cross", "a star"], (256, 256), [2, 3], steps=10)
    assert np.abs(np.asarray(both[1], float) - np.asarray(image, float)).max() <= 1
    assert np.abs(np.asarray(image, float) - progressive_by_hand(*generate.args)).max() <= 1
    passes.clear()
    generate(["a star"], (256, 256), [3], steps=10, direct=True, guidance=2.0, guidance_interval=0)
    assert passes == [(2, 32, t) for t in timesteps]
    passes.clear()
    generate(["a star"], (128, 128), [3], steps=10, guidance=1.0, timestep_shift=3, renoise=300)
    moved = [round(999 * 3 * t / (999 + 2 * t)) for t in timesteps]  # of what has no layout yet
    assert passes == [(1, 8, t) for t in moved] + [(1, 16, t) for t in timesteps if t <= 300]
    (wide,) = generate(["a star"], (256, 128), [3], steps=2)
    assert wide.size == (256, 128)
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
    model = t2md.freeze(T2MD("SHW", use_additional_conditions=True, **TINY64), "meta", torch.float32)
    text, mask = TextEncoder(components)(["a star"] * 2)
    picture = torch.randn(1, 4, 12, 8, device="meta")
    enlarging, renoising = (sample.SamplerSettings(steps=10, upscale=u, renoise=600) for u in (2, 1))
    with NoFloat64():
        sample.denoise(model, text, mask, torch.randn(1, 4, 8, 8), enlarging)
        out = sample.denoise(model, text, mask, torch.randn(1, 4, 12, 8), renoising, start=picture)
        z_t = torch.randn(2, 4, 16, 16, device="meta")
        x = dict(z_t=z_t, t=torch.ones(2, device="meta").long(), text=text.to("meta"), mask=mask.to("meta"))
        x.update(t2md.size_conditions(model, 64, 64, 2))
        errors = t2md.pooled_loss(z_t, model, train.noise_schedule(model), 2, **x)
    assert errors.is_meta and errors.shape == (2,)
    assert out.is_meta and out.shape == (1, 4, 12, 8)
    with pytest.raises(AssertionError), NoFloat64():
        torch.zeros(2, dtype=torch.float64).to("meta")


PIPELINE = """
import json, sys, torch, diffusers
for folder, picture, steps in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(5))
    flags = dict(height=128, width=96, use_resolution_binning=False, latents=noise)
    flags.update(json.loads(steps))
    pipe("a photo of a Star " * 40, clean_caption=False, **flags).images[0].save(picture)
"""


def start_exported(root):
    """Let diffusers alone, in a folder and a process that know nothing of this repository, sample two
    exports: of a model trained at 2048 px, and of one that is told the size and has its timesteps moved up.
    """
    save_components(root / "parts")
    elsewhere = root / "elsewhere"
    arguments = []
    for name, conditioned, shift in (("plain", False, 1), ("conditioned", True, 3)):
        flags = dict(
            use_additional_conditions=conditioned, beta_schedule="scaled_linear", timestep_shift=shift
        )
        save_model(root / name, sample_size=256, interpolation_scale=3, **flags)
        result = call("sample.py", "--export", elsewhere / name, "--model", root / name)
        assert "height=2048, width=2048, use_resolution_binning=False" in result.stdout, result.stderr
        timesteps = re.search(r", timesteps=(\[.*?\])\)", result.stdout)
        assert (timesteps is None) == (shift == 1)
        steps = dict(timesteps=json.loads(timesteps[1])) if timesteps else dict(num_inference_steps=20)
        arguments += [f"./{name}", f"{name}.png", json.dumps(steps)]
    environment = os.environ | dict(PYTHONPATH="", HF_HOME=str(root / "cache"), HF_HUB_OFFLINE="1")
    process = start_python("-c", PIPELINE, *arguments, cwd=elsewhere, env=environment)

    def finish():
        _, errors = process.communicate()
        return root, errors, process.returncode

    return finish


def test_an_exported_pipeline_gives_the_same_image_anywhere(exported, tmp_path):
    """As `start_exported` says; a caption longer than was trained is cut where ours is."""
    root, errors, code = exported
    assert code == 0, errors[-2000:]
    for name in ("plain", "conditioned"):
        (here,) = sample.load(str(root / name))(["a photo of a Star " * 40], (96, 128), [5], direct=True)
        there = np.asarray(Image.open(root / "elsewhere" / f"{name}.png"), float)
        assert np.abs(there - np.asarray(here, float)).max() <= 1
        flags = ["--model", root / "elsewhere" / name, "--steps", 1, "--size", 64, "--out", tmp_path]
        assert call("sample.py", "a star", *flags).returncode == 0
    again = call("sample.py", "--export", root / "elsewhere" / "plain", "--model", root / "plain")
    refused(again, "is not empty")


def test_sample_command(checkpoint, tmp_path):
    """Nothing is ever overwritten; kernels are named once."""
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
    """Each prompt with its own seeds, in batches. Two processes, as torchrun starts them, share what is left:
    what is there is not made again."""
    prompts = tmp_path / "metadata.jsonl"
    out = tmp_path / "out"
    drawn_together = []
    generate = sample.generate

    def noted(model, vae, captions, prompts, size, seeds, *rest, **given):
        drawn_together.append(list(zip(prompts, seeds)))
        return generate(model, vae, captions, prompts, size, seeds, *rest, **given)

    monkeypatch.setattr(sample, "generate", noted)
    monkeypatch.setattr(sample, "images_at_once", lambda size: 4)
    records = [dict(tag="counting", prompt=f"a photo of {n} stars") for n in ("two", "three", "four")]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in records))
    flags = f"--prompts {prompts} --images 2 --seed 5 --model {checkpoint} --steps 2 --out {out}".split()
    assert torchrun(["sample.py", *flags]).training_script_args == flags
    assert call("sample.py", *flags).returncode == 0
    every = [(record["prompt"], 5 + 2 * i + k) for i, record in enumerate(records) for k in (0, 1)]
    assert drawn_together == [every[:4], every[4:]]
    for i, record in enumerate(records):
        assert json.loads((out / f"{i:05d}" / "metadata.jsonl").read_text()) == record
        drawn = sorted((out / f"{i:05d}" / "samples").iterdir())
        assert [path.name for path in drawn] == ["00000.png", "00001.png"]
        assert [Image.open(path).text["seed"] for path in drawn] == [str(5 + 2 * i), str(6 + 2 * i)]
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


def test_flags_reach_the_sampler(checkpoint, tmp_path, monkeypatch):
    """The size that --upscale makes, the denoiser's dtype, and a share of the seeds for each process."""
    asked = []

    def fake(model, vae, captions, prompts, size, seeds, progress, **settings):
        asked.append((model.dtype, size, seeds, settings["upscale"]))
        return [Image.new("RGB", size)] * len(seeds)

    monkeypatch.setattr(sample, "generate", fake)
    command = ["sample.py", "a star", "--model", checkpoint, "--out", tmp_path, "--seed", 4, "--n", 3]
    assert call(*command, "--upscale", 2, "--dtype", "bfloat16").returncode == 0
    assert asked.pop() == (torch.bfloat16, (128, 128), [4, 5, 6], 2)
    monkeypatch.setattr(files, "WORLD", 2)
    monkeypatch.setattr(files, "RANK", 1)
    monkeypatch.setattr(torch.distributed, "init_process_group", mock.Mock())
    assert call(*command).returncode == 0
    assert asked.pop() == (torch.float32, (64, 64), [5], 1)


def test_the_vae_is_in_float32(checkpoint, chain, tmp_path):
    """In sampling and in training, whatever the dtype: SDXL's overflows in less. T5 is in that dtype."""
    _, vae, text_encoder = sample.load_networks(checkpoint, dtype=torch.bfloat16)
    copy_parts(chain, tmp_path, "vae text_encoder teacher")
    networks = train.build(jobs_of(f"--stage forcing --dtype bfloat16 --out {tmp_path}")["forcing"])
    for of_sampling, of_training in ((vae, networks.vae), (text_encoder, networks.text_encoder)):
        dtype = torch.float32 if isinstance(of_sampling, VAE) else torch.bfloat16
        assert of_sampling.dtype == of_training.dtype == dtype


def test_a_used_folder_is_refused_by_name(checkpoint, components, tmp_path):
    """For prompts from a file: another model, other prompts, seed, number, settings; nothing is touched."""
    (tmp_path / "a.txt").write_text("a photo of a star\n")
    (tmp_path / "b.txt").write_text("a photo of a cross\n")
    other = os.path.join(os.path.dirname(components), "other")
    out = tmp_path / "out"
    save_model(other, sample_size=8)

    def draw(changed="", prompts="a.txt", model=checkpoint):
        flags = f"--steps 2 --size 64 --out {out} --model {model} {changed}".split()
        return call("sample.py", "--prompts", tmp_path / prompts, *flags)

    assert draw().returncode == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused(draw(prompts="b.txt"), "prompts")
    refused(draw(model=other), "model")
    changes = "--seed 5,--n 2,--steps 3,--guidance 2,--guidance-interval 0,--negative red,--size 128,--direct"
    changes += ",--dtype bfloat16"
    for part in ("vae", "text_encoder"):
        shutil.copytree(components, tmp_path / part)
        with open(tmp_path / part / part / "config.json", "a") as file:
            file.write("\n")
        changes += f",--{part.replace('_', '-')} {tmp_path / part}"
    for changed in changes.split(","):
        refused(draw(changed), changed.split()[0][2:].replace("-", "_"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    again = draw("--guidance 3")  # the checkpoint's own
    assert again.returncode == 0 and ".png" not in again.stdout
    os.remove(out / "made_with.json")
    refused(draw(), "no made_with.json")
    for path in out.rglob("*.png"):
        path.unlink()
    assert draw("--size 128").returncode == 0  # a folder without pictures has nothing to lose


def test_compiling_survives_many_sizes_and_batches(components, tmp_path, monkeypatch):
    """Three kinds of mixer at two sizes, with one branch or two, are more graphs than Dynamo's limit."""
    compiled = functools.partialmethod(T2MD.compile_repeated_blocks, backend="eager", fullgraph=True)
    monkeypatch.setattr(T2MD, "compile_repeated_blocks", compiled)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch._dynamo.reset()
    settings = dict(sample_size=8, guidance_interval=700, chunk_size=256)  # fewer chunks to unroll
    model = save_model(components.replace("parts", "compiled"), **settings)
    flags = f"--compile --steps 3 --size 128 --model {model} --out".split()
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
    monkeypatch.setattr(t2md, "load_backbone", mock.Mock(side_effect=AssertionError("loaded")))
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
        return [record["prompt"] for record in read_prompts(str(tmp_path / name))]

    text = "a photo of a star\r\n\r\n  \r\na café\u2028 \r\n"
    wanted = ["a photo of a star", "a café"]
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
    order = ["t2md", "data", "sample", "train", "claims"]
    seen = set()
    rooms = {f"{name}.py": name for name in ("t2md", "sample", "train")}
    for room in ("data", "claims"):
        rooms |= {f"{room}/{path.name}": room for path in pathlib.Path(HERE, room).glob("*.py")}
    for name, room in rooms.items():
        path = pathlib.Path(HERE, name)
        if path.name.startswith("test_"):
            continue
        imports = [
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)
        ]
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
    muon = train.Muon([dict(params=weights, lr=0.02, weight_decay=0.1)])
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
    settings = train.T2MD_SETTINGS["kd"]
    (adamw,) = train.new_optimizers(model, settings, train.modules(model, train.STAGES["kd"].faster))
    assert adamw.defaults["betas"] == (0.9, 0.999) and adamw.defaults["eps"] == 1e-10
    groups = {id(p): group for group in adamw.param_groups for p in group["params"]}
    still = {name for name, p in model.named_parameters() if groups[id(p)]["weight_decay"] == 0}
    of_mamba = ("A_log", "D", "dt_bias", "norm.weight", "conv1d.bias")
    assert {"blocks.1.mixer.mamba." + name for name in of_mamba} <= still
    assert {"blocks.0.scale_shift_table", "scale_shift_table", "padding.tokens", "proj_out.bias"} <= still
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2 and name.endswith(".weight")}
    assert matrices and not matrices & still
    for name, p in model.named_parameters():
        if name not in still:
            assert name.endswith("weight") and p.ndim > 1 and groups[id(p)]["weight_decay"] == 0.03
        assert groups[id(p)]["base_lr"] == (1e-4 if ".mamba." in name or ".fuse." in name else 2e-5), name


def test_a_stage_trains_and_hurries_what_its_record_says():
    """By the names of the parameters: neither a module too many nor one too few."""
    model = DiM(True, True, pattern="SHW>", **TINY)
    names = {name for name, _ in model.named_parameters()}
    of_mamba = {name for name in names if ".mamba." in name or ".fuse." in name}
    mixers = {name for name in names if ".mixer." in name or name.startswith(("padding.", "enhance_"))}
    ends = {name for name in names if name.startswith(("patch_embed.", "caption_projection.", "proj_out."))}
    trains = dict(teacher=names, forcing=of_mamba, kd=mixers, adapt=names, hires1=names, hires2=names)
    hurries = dict(kd=of_mamba, adapt=ends)
    assert of_mamba < mixers < names and len(ends) == 8
    for name, stage in train.STAGES.items():
        train.freeze_all_but(model, stage.trains)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trains[name]
        fast = {id(p) for module in train.modules(model, stage.faster) for p in module.parameters()}
        assert {n for n, p in model.named_parameters() if id(p) in fast} == hurries.get(name, set())


def test_the_rate_warms_up_and_falls():
    model = T2MD(pattern="SH", **TINY)
    settings = train.ShapesSettings(steps=100, lr=1.0, new_lr=2.0, warmup=10, decay=0.4, muon=False)
    optimizers = train.new_optimizers(model, settings, train.modules(model, "mamba"))
    for step, rate in ((0, 0.1), (4, 0.5), (9, 1.0), (50, 1.0), (60, 1.0), (80, 0.5), (99, 1 / 40)):
        assert train.set_rates(optimizers, step, settings) == pytest.approx(rate)
        assert {group["lr"] for group in optimizers[0].param_groups} == {rate, 2 * rate}


def test_muon_has_the_blocks_matrices_and_the_same_rates():
    model = T2MD(pattern="SHW", **TINY)
    settings = train.ShapesSettings(steps=100, lr=1.0, new_lr=2.0, warmup=10)
    optimizers = train.new_optimizers(model, settings, train.modules(model, "mamba"))
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW, train.Muon]
    by_muon = {id(p) for group in optimizers[1].param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        is_matrix = name.startswith("blocks.") and name.endswith("weight") and p.ndim == 2
        assert (id(p) in by_muon) == is_matrix, name
    train.set_rates(optimizers, 4, settings)
    for optimizer in optimizers:
        assert {group["lr"] for group in optimizer.param_groups} == {0.5, 1.0}


def arguments(flags):
    return train.parse_arguments(flags.split())


def test_shares_are_of_the_images():
    """hires1: four fifths of the images, not of the batches, are of twice the size; a restart goes on."""
    settings = train.ShapesSettings(steps=4000, sizes=train.T2MD_SETTINGS["hires1"].sizes)
    job = types.SimpleNamespace(name="hires1", seed=0, settings=settings)
    endless = types.SimpleNamespace(
        order=lambda batch_size, stage: ([k] * batch_size for k in itertools.count())
    )
    steps = list(train.batches(job, {1: endless, 2: endless}, 0))
    seen = {m: sum(len(chosen) for _, k, chosen in steps if k == m) for m in (1, 2)}
    assert {(m, len(chosen)) for _, m, chosen in steps} == {(1, 32), (2, 8)}
    assert abs(seen[2] / sum(seen.values()) - 0.8) < 0.02
    assert [chosen[0] for _, m, chosen in steps if m == 2] == list(range(seen[2] // 8))
    assert list(train.batches(job, {1: endless, 2: endless}, 1000)) == steps[1000:]


def test_smaller_pictures_are_more(tmp_path, monkeypatch):
    """Of half the largest size the shapes world has twice as many, so that none comes back much sooner."""
    asked = []
    monkeypatch.setattr(train.shapes, "write_shards", lambda folder, *rest: asked.append(rest[:2]))
    monkeypatch.setattr(train, "ImageData", mock.Mock())
    job = jobs_of(f"--stage hires1 --steps 1000000 --out {tmp_path}")["hires1"]
    model = types.SimpleNamespace(config=types.SimpleNamespace(sample_size=32, patch_size=2))
    train.open_data(job, mock.Mock(model=model, vae=types.SimpleNamespace(factor=8)))
    pictures = train.SHAPES_SETTINGS["hires1"].pictures
    assert asked == [(256, pictures), (128, 2 * pictures)]


def test_the_last_part_of_a_stage_may_have_other_timesteps():
    """They change where the rate begins to fall."""

    class Data:
        def order(self, images, name):
            return itertools.repeat(list(range(images)))

        def batch(self, chosen, generators, timesteps):
            return dict(timesteps=timesteps)

    def seen(first=0, **changes):
        settings = train.ShapesSettings(steps=10, decay=0.4, timesteps=(900, 10), **changes)
        job = types.SimpleNamespace(name="x", seed=0, settings=settings, micro_batch=None, device="cpu")
        return [batches[0]["timesteps"] for _, _, batches in train.load_batches(job, {1: Data()}, first)]

    assert seen() == 10 * [(900, 10)]
    assert seen(last_timesteps=(100, 20)) == 6 * [(900, 10)] + 4 * [(100, 20)]
    assert seen(first=7, last_timesteps=(100, 20)) == 3 * [(100, 20)]
    of_shapes = {name for name, settings in train.SHAPES_SETTINGS.items() if settings.last_timesteps}
    assert of_shapes == {"hires2"}
    assert not any(settings.last_timesteps for settings in train.T2MD_SETTINGS.values())


def test_draws_differ_from_place_to_place():
    places = itertools.product((0, 1), ("kd", "adapt"), range(3), range(3))  # seed, stage, step, image
    generators = [files.generator(*place) for place in places]
    assert len({torch.rand(1, generator=generator).item() for generator in generators}) == 36


def refused(result, *words):
    error = result.stderr.strip()
    assert result.returncode != 0 and "Traceback" not in error, error
    assert all(word in error for word in words), error
    assert len(error.splitlines()[-1]) > 20


def jobs_of(flags):
    """{stage: its Job} of a command."""
    return {job.name: job for job in train.plan(arguments(flags))}


def test_flags_are_for_the_stage_that_is_named(tmp_path):
    jobs = jobs_of(f"--stage hires2 --steps 7 --timesteps 600 300 --snr-weight 0 --lr 1 --out {tmp_path}")
    changed = dict(steps=7, timesteps=[600, 300], last_timesteps=None, snr_weight=0.0, lr=1.0, new_lr=None)
    settings = train.SHAPES_SETTINGS["hires2"]
    assert jobs["hires2"].settings == dataclasses.replace(settings, **changed) != settings
    assert list(jobs) == ["adapt", "hires1", "hires2"]
    for name in ("adapt", "hires1"):
        assert jobs[name].settings == train.SHAPES_SETTINGS[name]
    quick = jobs_of(f"--stage kd --quick --steps 9 --out {tmp_path}")
    assert (quick["forcing"].settings.steps, quick["kd"].settings.steps) == (200, 9)
    full = ("--stage", "kd", "--quick", "--config", "t2md", "--data", "x")
    refused(call("train.py", *full), "--quick is for --config shapes")
    for numbers in (("600", "0"), ("-1", "9"), ("600", "nan")):
        refused(call("train.py", "--stage", "kd", "--timesteps", *numbers), "and a positive deviation")
    refused(call("train.py", "--stage", "distill"), "invalid choice", "kd")
    refused(call("train.py", "--stage", "kd", "--pattern", "SXW"), "--pattern SXW must be made of")
    refused(call("train.py", "--stage", "kd", "--config", "t2md"), "--config t2md needs --data")


def test_the_papers_numbers_are_in_the_table():
    """Section 4 of the paper: weights, lengths, shares; PixArt's optimiser; where attention is in float32."""
    settings = train.T2MD_SETTINGS
    assert {name: settings[name].sizes for name in ("adapt", "hires1", "hires2")} == {
        "adapt": {1: 1.0}, "hires1": {2: 0.8, 1: 0.2}, "hires2": {4: 1.0}}  # fmt: skip
    for name in ("adapt", "hires1", "hires2"):
        assert train.SHAPES_SETTINGS[name].sizes == settings[name].sizes
    assert [settings[name].steps for name in ("adapt", "hires1", "hires2")] == [100_000, 40_000, 20_000]
    assert {s.ema for s in settings.values()} == {0.9999} and {s.batch_size for s in settings.values()} == {
        256
    }
    as_pixart = [settings[name] for name in ("adapt", "hires1", "hires2")]
    assert {(s.lr, s.warmup, s.clip) for s in as_pixart} == {(2e-5, 1000, 0.01)}
    assert {name for name, s in settings.items() if not s.float32_attention} == {"hires2"}
    assert {name for name, s in settings.items() if s.ratios == train.SQUARE} == {"forcing", "kd"}
    assert {s.translate for s in settings.values()} == {0}
    assert {name: s.enlarge for name, s in settings.items() if s.enlarge != 2.0} == {
        "hires1": 1.25,
        "hires2": 1.25,
    }
    args = arguments("--stage kd")
    assert (args.soft_weight, args.mixer_weight) == (0.5, 0.2)
    config = train.CONFIGS["t2md"]
    assert config.pattern == "SHWHWHW" * 4 and config.student == dict(
        d_state=256, head_dim=64, chunk_size=256
    )
    assert config.checkpointing and config.second["text_encoder"] == "google/flan-t5-xxl"


@functools.cache
def make_chain():
    folder = tempfile.TemporaryDirectory()
    flags = f"--stage all --steps 2 --batch-size 2 --examples 1 --out {folder.name}"
    generate, train_part = (functools.partial(f, steps=2) for f in (sample.generate, parts.train_part))
    with (
        mock.patch.object(sample, "generate", generate),
        mock.patch.object(parts, "train_part", train_part),
        mock.patch.object(parts, "standardise"),  # it looks at 256 pictures
    ):
        result = call("train.py", *flags.split())
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def chain():
    """The whole path in miniature, from no weights at all, two steps a stage; made once for all files."""
    return make_chain().name


def raw_weights(out, stage):
    return checkpoints.read_state(os.path.join(out, stage))["model"]


def steps_done(folder):
    state = checkpoints.read_state(str(folder))
    return state["step"], state["steps"]


def test_the_chain_trains_what_it_should(chain):
    for stage in train.STAGES:
        log = read_log(os.path.join(chain, stage))
        assert [entry["step"] for entry in log] == [0, 1] and not any(entry["skipped"] for entry in log)
        rows = 2 if stage in ("forcing", "kd") else 1  # the teacher's above
        assert Image.open(os.path.join(chain, stage, "step-000002.png")).size == (128, rows * 128)
        config = json.load(open(os.path.join(chain, stage, "config.json")))
        adapted = stage in ("adapt", "hires1", "hires2")
        assert config["pattern"] == ("SSSSSSS" if stage == "teacher" else "SHWHWHW")
        assert config["pos_embed"] == ("centered" if adapted else "pixart")
        assert config["beta_schedule"] == ("scaled_linear" if adapted else "linear")
        assert config["guidance"] == 3.0
        assert config["guidance_interval"] == dict(hires1=561, hires2=699).get(stage, 400)
        assert train.SHAPES_SETTINGS[stage].sampler.items() <= config.items()
        assert config["vae"] == ("../vae_adapt" if adapted else "../vae")
        assert config["text_encoder"] == ("../text_encoder_adapt" if adapted else "../text_encoder")
        assert config["sample_size"] == 16 * {"hires1": 2, "hires2": 4}.get(stage, 1)
        if stage != "teacher":
            assert (config["d_state"], config["head_dim"]) == (32, 64)
        model = T2MD.from_pretrained(os.path.join(chain, stage))
        assert model.base / model.interpolation_scale == 8 and not model.conditioned_on_size


WITHIN = dict(forcing=(".mamba.", ".fuse."), kd=(".mixer.",), adapt=("",), hires1=("",), hires2=("",))


@pytest.mark.parametrize("stage", WITHIN)
def test_a_stage_starts_from_its_predecessor_and_moves_what_it_trains(chain, stage):
    """Weights that a stage does not train are bitwise as they were; all that it trains have moved."""
    job = redo(chain, stage)
    start = train.build(job).model.state_dict()
    before = T2MD.from_pretrained(os.path.join(chain, train.STAGES[stage].after)).state_dict()
    for name, weight in before.items():
        assert name not in start or torch.equal(start[name], weight)
    weights = raw_weights(chain, stage)
    moved = {name for name, weight in weights.items() if not torch.equal(weight, start[name])}
    assert moved == {name for name in weights if any(part in name for part in WITHIN[stage])}


def redo(chain, stage, flags=""):
    """The Job of a stage of the chain, once more."""
    return jobs_of(f"--stage {stage} --steps 2 --batch-size 2 --out {chain} {flags}")[stage]


def test_the_shapes_world_has_ratios_where_the_configuration_names_none(chain, tmp_path):
    """As with --config t2md --data shapes."""
    job = redo(chain, "adapt")
    settings = dataclasses.replace(job.settings, ratios=None)
    networks = train.build(job)
    job = dataclasses.replace(job, settings=settings, folder=f"{tmp_path}/adapt")
    (data,) = train.open_data(job, networks).values()
    assert len(data.buckets) > 1


def test_adapt_can_keep_the_teachers_embedding(chain):
    job = redo(chain, "adapt", "--pos-embed pixart")
    assert train.build(job).model.config.pos_embed == job.made_with["pos_embed"] == "pixart"


def test_the_base_size_is_the_teachers(chain, tmp_path):
    """PixArt's 1024 model: hires1 trains at 2048 and is sampled there, at the coordinates that it knows."""
    teacher = as_teacher(shuffled(pixart(128)), tmp_path)
    student = t2md.student_of(teacher, "SW", d_state=8, head_dim=16, caption_width=20)
    student = t2md.fit_ends(student, 4, 64)
    student.register_to_config(vae=f"{chain}/vae", text_encoder=f"{chain}/text_encoder")
    student.save_pretrained(tmp_path / "out" / "adapt")
    job = jobs_of(f"--config t2md --data x --stage hires1 --out {tmp_path}/out --teacher {tmp_path}")[
        "hires1"
    ]
    model = train.build(job).model
    scale = model.config.interpolation_scale
    assert model.conditioned_on_size and model.config.sample_size == 256 and scale == 4


def kd_command(chain, out, flags="--steps 6 --batch-size 2 --save-every 2 --examples 0"):
    return ["train.py", *f"--stage kd {flags} --teacher {chain}/teacher --out {out}".split()]


def test_kd_that_was_cut_off_goes_on(chain, tmp_path):
    """By the second Ctrl-C here; what kd only reads stays as it was; finished, it is not begun again."""
    frozen = [os.path.join(chain, name) for name in ("teacher", "vae", "text_encoder")]
    before = [files.fingerprint(folder) for folder in frozen]
    copy_parts(chain, tmp_path, "vae text_encoder forcing")
    command = kd_command(chain, tmp_path)
    effects = [*[mock.DEFAULT] * 3, KeyboardInterrupt]
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_a_stage_saves_its_step(chain, tmp_path, number):
    """By a scheduler, or by the first Ctrl-C; afterwards both signals are what they were."""
    copy_parts(chain, tmp_path, "vae text_encoder forcing")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    kd_loss = t2md.kd_loss
    calls = itertools.count()

    def told(*models, **inputs):
        if next(calls) == 2:
            os.kill(os.getpid(), number)
        return kd_loss(*models, **inputs)

    with mock.patch.object(t2md, "kd_loss", told):
        refused(
            call(*kd_command(chain, tmp_path)),
            "kd: told to stop; saved after step 3; the same command goes on",
        )
    assert steps_done(tmp_path / "kd") == (3, 6) and len(read_log(tmp_path / "kd")) == 3
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_stage_goes_on_with_what_it_was_begun_with(chain, tmp_path):
    """Or says so: neither a finished kd nor forcing is passed off as another row's, whatever differs."""
    other = tmp_path / "other"
    copy_parts(chain, tmp_path, "vae text_encoder teacher forcing kd")
    copy_parts(chain, other, "teacher vae text_encoder")
    shuffled(t2md.load_backbone(str(other / "teacher"))).save_pretrained(other / "teacher")
    shutil.copytree(other / "vae", other / "vae_2")
    shuffled(AutoencoderKL.from_pretrained(other / "vae_2")).save_pretrained(other / "vae_2")
    shutil.copytree(other / "text_encoder", other / "t5_2")
    shuffled(T5EncoderModel.from_pretrained(other / "t5_2")).save_pretrained(other / "t5_2")
    data = types.SimpleNamespace(digest="another")

    def begin(flags=""):
        job = jobs_of(f"--stage kd --steps 2 --batch-size 2 --out {tmp_path} {flags}")["kd"]
        made_with = train.all_made_with(job, {1: data})
        train.check_beginning(job, made_with)
        files.check_made_with(job.folder, made_with)

    begin()
    of_forcing_too = ["--pattern HWHWHWH", f"--teacher {other}/teacher"]
    changes = ["--seed 1", "--init llama", "--soft-weight 0", "--mixer-weight 1", "--data elsewhere"]
    changes += ["--lr 1", "--batch-size 5", "--dtype bfloat16", "--timesteps 500 100", "--snr-weight 1"]
    for flags in (*changes, f"--vae {other}/vae_2", f"--text-encoder {other}/t5_2"):
        what = flags.split()[0][2:].replace("-", "_")
        with pytest.raises(ValueError, match=f"kd was made with .*{what} .*, not .*; give the same again"):
            begin(flags)
    for flags in ("--padding-tokens", "--local-enhancement"):
        with pytest.raises(ValueError, match="forcing was made with .*dim .*, not .*; give the same again"):
            begin(flags)
    for flags in of_forcing_too:
        with pytest.raises(ValueError, match=f"forcing was made with .*{flags.split()[0][2:]} "):
            begin(flags)
    shuffled(t2md.load_backbone(str(tmp_path / "forcing"))).save_pretrained(tmp_path / "forcing")
    with pytest.raises(ValueError, match="was made with starts_from [^,]*, not [^,]*; give the same again"):
        begin()
    shutil.rmtree(tmp_path / "kd")
    begin("--seed 1 --data elsewhere --lr 1")  # these of kd itself matter, not of forcing


# What follows is written here once more, from the paper's equations, without train.py.

ABAR = {
    "linear": np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)),
    "quadratic": np.cumprod(1 - np.linspace(1e-2, 2e-2**0.5, 1000) ** 2),
}
SCHEDULE_OF = dict(teacher="linear", forcing="linear", kd="linear", adapt="quadratic", hires1="quadratic")


def drawn_by_hand(data, vae, k, generator, timesteps):
    """One image of a batch -> z0, noise, t, caption: each random draw in its order."""
    dropped = torch.rand((), generator=generator) < 0.1
    if timesteps is None:
        t = int(torch.randint(1000, (), generator=generator))
    else:
        t = -1
        while not 0 <= t < 1000:
            t = math.floor(timesteps[0] + timesteps[1] * torch.randn((), generator=generator))
    number, picture = data.picture(k)
    mean, std = vae.moments(to_pixels([picture]))
    z0 = mean + std * torch.randn(mean.shape[1:], generator=generator)
    noise = torch.randn(mean.shape[1:], generator=generator)[None]
    return z0, noise, t, "" if dropped else data.caption(number)


def terms_by_hand(stage, model, teacher, z_t, t, text, noise, abar, amplitude):
    """One image's loss and its terms, equation by equation; the caption is alone, so there is no mask."""
    x = dict(z_t=z_t, t=torch.tensor([t]), text=text, mask=None)
    if stage == "forcing":
        _, taught = t2md.predict_noise(teacher, **x, return_mixers=True)
        side = [s // 2 for s in z_t.shape[2:]]
        blocks = [n for n, letter in enumerate("SHWHWHW") if letter != "S"]
        loss = sum((model.blocks[n].mixer(taught[n][0], side) - taught[n][1]).square().mean() for n in blocks)
        return loss, dict(forcing=loss)
    if stage == "kd":
        soft_target, taught = t2md.predict_noise(teacher, **x, return_mixers=True)
        predicted, mixers = t2md.predict_noise(model, **x, return_mixers=True)
        mse = (predicted - noise).square().mean()
        soft = (predicted - soft_target).square().mean()
        mixer = sum((a - b).square().mean() for (_, a), (_, b) in zip(mixers, taught)) / 7
        return mse + 0.5 * soft + 0.2 * mixer, dict(mse=mse, soft=soft, mixer=mixer)
    mse = (t2md.predict_noise(model, **x) - noise).square().mean()
    weight = 1.0
    if amplitude:
        weight = min(max(((1 - abar) / (amplitude**2 * abar)) ** 0.5, 1.0), 8.0)
    return weight * mse, dict(mse=mse)


def batch_by_hand(job, data, orders, step):
    """The multiple of the base size, and the images, of a step: shares are of images, not of batches."""
    sizes = list(job.settings.sizes)
    images = [4 // m**2 for m in sizes]
    m = sizes[0]
    if len(sizes) > 1:
        frequency = torch.tensor([job.settings.sizes[m] / n for m, n in zip(sizes, images)])
        m = sizes[int(torch.multinomial(frequency, 1, generator=files.generator(5, job.name, step, -1)))]
    return m, next(orders[m])


@pytest.mark.parametrize("stage", SCHEDULE_OF)
def test_three_steps_of_each_stage_by_hand(chain, tmp_path, monkeypatch, stage):
    """The log, the weights and their average after three steps are those of the equations: draws, schedule,
    caption dropping, masks, loss terms and weights, gradient, clipping, AdamW at the warm-up's rates, EMA."""
    # With eps = 1 a step of AdamW depends on the gradient's size, so that a wrong scale or no clipping shows.
    changed = dict(muon=False, eps=1.0, lr=100.0, warmup=10, decay=0.0, clip=0.01, ema=0.2)
    if train.SHAPES_SETTINGS[stage].new_lr:
        changed.update(new_lr=300.0)
    settings = dataclasses.replace(train.SHAPES_SETTINGS[stage], **changed)
    monkeypatch.setitem(train.SHAPES_SETTINGS, stage, settings)
    copy_parts(chain, tmp_path, "vae text_encoder vae_adapt text_encoder_adapt teacher forcing kd adapt")
    for seed, name in enumerate(("teacher", "forcing", "kd", "adapt")):  # no zero hides the caption
        shuffled(t2md.load_backbone(f"{tmp_path}/{name}"), seed).save_pretrained(tmp_path / name)
        os.remove(tmp_path / name / "made_with.json")
    shutil.copytree(tmp_path / "teacher", tmp_path / "given")
    shutil.rmtree(tmp_path / stage, ignore_errors=True)
    imgs = write_images(
        tmp_path, captions=("a star", "a photo of a red circle and a blue square", "two crosses")
    )
    flags = f"--stage {stage} --steps 3 --batch-size 4 --seed 5 --examples 0 --data {imgs} --out {tmp_path}"
    second = "_adapt" if stage in ("adapt", "hires1") else ""
    if stage in ("teacher", "adapt"):
        flags += f" --vae {tmp_path}/vae{second} --text-encoder {tmp_path}/text_encoder{second}"
    if stage == "teacher":
        flags += f" --teacher {tmp_path}/given"
    (job,) = train.plan(arguments(flags))
    networks = train.build(job)
    model = networks.model
    if stage == "adapt":
        train.begin_with_translation(job, networks, train.open_data(job, networks))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train.run(arguments(flags))

    teacher = t2md.load_backbone(f"{tmp_path}/teacher").requires_grad_(False) if job.teacher else None
    vae = VAE(f"{tmp_path}/vae{second}")
    encoder = TextEncoder(f"{tmp_path}/text_encoder{second}")
    data = {m: ImageData(imgs, 128 * m, vae, encoder, 5, ratios=settings.ratios) for m in settings.sizes}
    orders = {m: data[m].order(4 // m**2, stage) for m in settings.sizes}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    mean, square = [{name: torch.zeros_like(p) for name, p in trained} for _ in range(2)]  # AdamW's moments
    average = {name: p.clone() for name, p in start.items()}
    fast = {name for name, _ in trained if name.startswith(("patch_embed", "caption_projection", "proj_out"))}
    for step, line in enumerate(read_log(tmp_path / stage)):
        m, chosen = batch_by_hand(job, data, orders, step)
        totals = {}
        loss = 0.0
        for i, k in enumerate(chosen):
            generator = files.generator(5, stage, step, i)
            z0, noise, t, caption = drawn_by_hand(data[m], vae, k, generator, settings.timesteps)
            abar = ABAR[SCHEDULE_OF[stage]][t]
            z_t = (abar**0.5 * z0 + (1 - abar) ** 0.5 * noise).float()
            text, _ = encoder([caption])
            amplitude = m * settings.snr_weight
            one, terms = terms_by_hand(stage, model, teacher, z_t, t, text, noise, abar, amplitude)
            loss = loss + one / len(chosen)
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + value.item() / len(chosen)
        gradients = torch.autograd.grad(loss, [p for _, p in trained], allow_unused=True)
        gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained, gradients)}
        norm = float(sum(g.square().sum() for g in gradients.values()) ** 0.5)
        assert norm > 0.01  # it is clipped
        assert {name: line[name] for name in totals} == pytest.approx(totals, rel=1e-3)
        assert line["gradient"] == pytest.approx(norm, rel=1e-3)
        assert line["lr"] == pytest.approx(100.0 * (step + 1) / 10)
        decay = 0.0 if step == 0 else min(0.2, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, p in trained:
                g = gradients[name] * 0.01 / norm
                mean[name].lerp_(g, 0.1)
                square[name].lerp_(g.square(), 0.01)
                unbiased = mean[name] / (1 - 0.9 ** (step + 1))
                deviation = (square[name] / (1 - 0.99 ** (step + 1))).sqrt()
                rate = (300.0 if stage == "adapt" and name in fast else 100.0) * (step + 1) / 10
                p.sub_(rate * unbiased / (deviation + 1.0))
            for name, p in model.named_parameters():
                average[name].lerp_(p, 1 - decay)

    raw = raw_weights(tmp_path, stage)
    saved = T2MD.from_pretrained(tmp_path / stage).state_dict()
    for of_run, of_hand in ((raw, dict(model.named_parameters())), (saved, average)):
        moved = torch.cat([(of_run[name] - start[name]).flatten() for name, _ in trained])
        expected = torch.cat([(of_hand[name].detach() - start[name]).flatten() for name, _ in trained])
        assert relative(moved, expected) < 1e-2
    assert any((raw[name] - saved[name]).abs().max() > 0 for name, _ in trained)


def test_training_and_sampling_have_one_schedule():
    for schedule, name in (("linear", "linear"), ("scaled_linear", "quadratic")):
        model = types.SimpleNamespace(config=types.SimpleNamespace(beta_schedule=schedule))
        for library in (train.noise_schedule(model), sample.make_scheduler(schedule)):
            assert np.allclose(library.alphas_cumprod.numpy(), ABAR[name], rtol=1e-4)


def test_the_solver_is_the_published_one():
    """DPM-Solver++ (2M), as PixArt-alpha's scheduler_config.json has it."""
    published = dict(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint")
    published.update(timestep_spacing="linspace", lower_order_final=True, prediction_type="epsilon")
    config = sample.make_scheduler("linear").config
    assert published.items() <= config.items() and not config.thresholding and not config.use_karras_sigmas


def test_training_tells_the_model_its_pictures_size(monkeypatch):
    model = T2MD(pattern="S", use_additional_conditions=True, **TINY)
    seen = []

    def noted_conditions(model, z_t, t, text, mask, **conditions):
        seen.append(conditions)
        return z_t

    monkeypatch.setattr(t2md, "predict_noise", noted_conditions)
    vae = types.SimpleNamespace(factor=8)
    schedule = train.noise_schedule(model)
    frozen = dict(teacher=None, smaller=None, vae=vae, text_encoder=None)
    networks = train.Networks(model=model, schedule=schedule, **frozen)
    stage = train.STAGES["adapt"]
    job = types.SimpleNamespace(stage=stage, settings=train.T2MD_SETTINGS["adapt"], growth=1)
    batch = dict(inputs(size=(8, 12)), noise=torch.randn(2, 4, 8, 12))
    batch["z0"] = batch.pop("z_t")
    train.loss_of(job, networks, batch)
    assert seen[0]["resolution"].tolist() == [[64, 96]] * 2
    assert torch.allclose(seen[0]["aspect_ratio"], torch.full((2, 1), 64 / 96))


def test_a_stages_shapes_and_limit_are_its_datas(chain, tmp_path):
    job = redo(chain, "adapt", f"--data {write_images(tmp_path)}")
    networks = train.build(job)

    def opened(**changed):
        settings = dataclasses.replace(job.settings, **changed)
        return train.open_data(dataclasses.replace(job, settings=settings), networks)[1]

    ((height, width),) = opened(ratios=("0.57",)).buckets
    assert height < width
    with pytest.raises(ValueError, match="enlarged more than 0.1 times"):
        opened(enlarge=0.1)


def test_weights_of_equation_11_are_the_flags(chain, tmp_path):
    copy_parts(chain, tmp_path, "vae text_encoder forcing")
    flags = f"--stage kd --soft-weight 3 --mixer-weight 7 --out {tmp_path}"
    job = jobs_of(flags)["kd"]
    networks = train.build(job)
    batch = dict(inputs(width=64), noise=torch.randn(2, 4, 16, 16))
    batch["z0"] = batch.pop("z_t")
    loss, terms = train.loss_of(job, networks, batch)
    assert torch.isclose(loss, terms["mse"] + 3 * terms["soft"] + 7 * terms["mixer"], rtol=1e-5)
    assert len({round(float(value), 6) for value in terms.values()}) == 3


def test_llama_copies_each_blocks_own_attention(tmp_path):
    job = jobs_of(f"--stage kd --init llama --out {tmp_path}")["kd"]
    model = train.build(job).model
    teacher = t2md.load_backbone(job.teacher)
    width = model.config.width
    for block, of_teacher in zip(model.blocks, teacher.blocks):
        if isinstance(block.mixer, MambaMixer):
            copied = block.mixer.mamba.in_proj.weight[width : 2 * width]
            assert torch.equal(copied, of_teacher.mixer.to_v.weight)


def test_pooled_noise_is_what_a_smaller_picture_has():
    """A smaller model that knows the noise agrees with the noise of the large picture, pooled.

    It is asked with the same captions. Where the pooled picture has little noise nothing is asked, and at odd
    sizes the last latents are left out.
    """
    schedule = train.DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="scaled_linear")
    t = torch.tensor([400, 460, 500, 750, 950])  # pooled, the first two are as noisy as at t = 248 and 300
    z0 = torch.randn(5, 4, 18, 26)
    noise = torch.randn(5, 4, 18, 26, requires_grad=True)
    z_t = schedule.add_noise(z0, noise, t).detach()
    text = torch.randn(5, 1, 8)
    mask = torch.ones(5, 1)
    asked = []

    class Knows:
        config = types.SimpleNamespace(patch_size=2)

        def __call__(self, hidden_states, timestep, **others):
            asked.append((timestep, hidden_states.shape))
            assert others["encoder_hidden_states"] is text and others["encoder_attention_mask"] is mask
            signal = schedule.alphas_cumprod[timestep].sqrt()[:, None, None, None]
            pooled = torch.nn.functional.avg_pool2d(z0[:, :, :16, :24], 2)
            return ((hidden_states - signal * pooled) / (1 - signal.square()).sqrt(),)

    errors = t2md.pooled_loss(noise, Knows(), schedule, 2, z_t, t, text, mask)
    timesteps, shape = asked[0]
    assert timesteps[0] == 248 and timesteps[1] == 300 and shape == (5, 4, 8, 12)
    assert errors[0] == 0.0
    assert errors[1:].max() < 1e-4  # of 1: timesteps are whole numbers
    other = t2md.pooled_loss(noise + 0.5, Knows(), schedule, 2, z_t, t, text, mask)
    assert other[0] == 0.0 and torch.allclose(other[1:], torch.tensor(1.0), atol=0.05)  # (2 x 0.5)^2
    other.sum().backward()
    assert not noise.grad[0].any() and noise.grad[1:, :, :16, :24].all()


def test_a_larger_pictures_layout_is_asked_of_the_model_it_starts_from(chain, tmp_path):
    """The shapes world's hires2 does so, and hires1 by the flag. The smaller model is frozen. Batches of base
    size ask nothing."""
    weights = {name: settings.pooled_weight for name, settings in train.SHAPES_SETTINGS.items()}
    assert weights == {name: 1.0 if name == "hires2" else None for name in weights}
    assert not any(settings.pooled_weight for settings in train.T2MD_SETTINGS.values())
    assert all(entry["pooled"] > 0 for entry in read_log(f"{chain}/hires2"))
    copy_parts(chain, tmp_path, "vae_adapt text_encoder_adapt adapt")
    job = jobs_of(f"--stage hires1 --pooled-weight 3 --out {tmp_path}")["hires1"]
    settings = dataclasses.replace(job.settings, float32_attention=True)
    job = dataclasses.replace(job, settings=settings)
    networks = train.build(job)
    shuffled(networks.model, 1)
    start = t2md.load_backbone(f"{tmp_path}/adapt")
    x = inputs(width=64)
    assert relative(t2md.predict_noise(networks.smaller, **x), t2md.predict_noise(start, **x)) < 1e-4
    assert networks.smaller.config.float32_attention
    assert not any(p.requires_grad for p in networks.smaller.parameters())
    batch = dict(inputs(width=64), noise=torch.randn(2, 4, 16, 16), t=torch.tensor([900, 600]))
    batch["z0"] = batch.pop("z_t")
    assert list(train.loss_of(job, networks, batch, 1)[1]) == ["mse"]
    loss, terms = train.loss_of(job, networks, batch, 2)
    without = train.loss_of(job, dataclasses.replace(networks, smaller=None), batch, 2)[0]
    assert terms["pooled"] > 0 and torch.isclose(loss, without + 3 * terms["pooled"], rtol=1e-5)
    # By hand; and in hires2, whose images are twice as large as hires1's and four times the base size.
    one = {name: tensor[:1] for name, tensor in batch.items()}
    z_t = networks.schedule.add_noise(one["z0"], one["noise"], one["t"])
    x = dict(t=one["t"], text=one["text"], mask=one["mask"])
    predicted = t2md.predict_noise(networks.model, z_t=z_t, **x)
    error = t2md.pooled_loss(predicted, networks.smaller, networks.schedule, 2, z_t=z_t, **x)
    hires2 = dataclasses.replace(job, settings=dataclasses.replace(settings, sizes={4: 1.0}))
    for stage, m in ((job, 2), (hires2, 4)):
        weight = float(train.noise_weight(networks.schedule, one["t"], m * settings.snr_weight))
        pooled = train.loss_of(stage, networks, one, m)[1]["pooled"]
        assert weight > 1 and float(pooled) == pytest.approx(weight * error.item(), rel=1e-4)


def test_the_smaller_model_is_told_the_smaller_size(monkeypatch):
    """If it is conditioned on the size in pixels, as PixArt's 1024 px model is."""
    told = []
    monkeypatch.setattr(t2md, "pooled_loss", lambda *_, **inputs: told.append(inputs) or torch.zeros(2))
    model = T2MD(pattern="S", **TINY)
    smaller = T2MD(pattern="S", **TINY, use_additional_conditions=True)
    schedule = train.noise_schedule(model)
    networks = train.Networks(model, None, smaller, types.SimpleNamespace(factor=8), None, schedule)
    settings = dataclasses.replace(train.SHAPES_SETTINGS["hires2"], sizes={2: 1.0})
    job = types.SimpleNamespace(stage=train.STAGES["hires2"], settings=settings, growth=2)
    batch = dict(inputs(), noise=torch.randn(2, 4, 16, 16), t=torch.tensor([900, 600]))
    batch["z0"] = batch.pop("z_t")
    train.loss_of(job, networks, batch, 2)
    assert told[0]["resolution"].tolist() == [[64.0, 64.0], [64.0, 64.0]]


@pytest.mark.parametrize("float32", [False, True])
def test_attention_in_float32_is_kept_out_of_autocast(monkeypatch, float32):
    """In self-attention, by the argument, in training alone; without autocast nothing is cast."""
    model = T2MD(pattern="SH", float32_attention=float32, **TINY)
    seen = []
    attention = t2md.attention

    def spy(q, k, v, heads, mask=None):
        seen.append((q.dtype, mask is None))
        return attention(q, k, v, heads, mask)

    monkeypatch.setattr(t2md, "attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        t2md.predict_noise(model, **inputs())
    alone = [dtype for dtype, is_self in seen if is_self]
    assert alone == [torch.float32 if float32 else torch.bfloat16]
    assert {dtype for dtype, is_self in seen if not is_self} == {torch.bfloat16}
    seen.clear()
    t2md.predict_noise(model.to(torch.bfloat16), **inputs(dtype=torch.bfloat16))
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}


@pytest.mark.parametrize("stage", ["teacher", "forcing", "kd", "adapt"])
def test_a_stage_sets_float32_attention_as_its_settings_say(chain, monkeypatch, stage):
    for wanted in (True, False):
        settings = dataclasses.replace(train.SHAPES_SETTINGS[stage], float32_attention=wanted)
        monkeypatch.setitem(train.SHAPES_SETTINGS, stage, settings)
        networks = train.build(redo(chain, stage))
        for model in (networks.model, networks.teacher):
            if model is not None:
                assert model.blocks[0].mixer.float32 == wanted
                assert not model.blocks[0].cross_attention.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_computes_in_its_dtype(chain, tmp_path, monkeypatch, dtype):
    """By autocast: the weights stay in float32."""
    seen = []
    loss_of = train.loss_of

    def noted_loss(job, networks, batch, m):
        seen.append((torch.is_autocast_enabled("cpu"), networks.model.dtype))
        return loss_of(job, networks, batch, m)

    monkeypatch.setattr(train, "loss_of", noted_loss)
    copy_parts(chain, tmp_path, "vae text_encoder")
    flags = f"--stage forcing --steps 1 --batch-size 2 --examples 0 --dtype {dtype}"
    train.run(arguments(f"{flags} --teacher {chain}/teacher --out {tmp_path}"))
    assert seen == [(dtype == "bfloat16", torch.float32)]


def test_activations_are_recomputed_where_the_configuration_says(chain):
    job = redo(chain, "kd")
    for wanted in (True, False):
        config = dataclasses.replace(job.config, checkpointing=wanted)
        networks = train.build(dataclasses.replace(job, config=config))
        assert networks.model.is_gradient_checkpointing == wanted


def test_pictures_are_of_the_weights_that_are_saved(chain, tmp_path, monkeypatch):
    """Of the average over steps, not of the last step's."""
    drawn = []

    def noted_pictures(model, vae, text_encoder, captions, *others, **flags):
        drawn.append(model)
        return [Image.new("RGB", (8, 8))] * len(captions)

    monkeypatch.setattr(sample, "generate_all", noted_pictures)
    copy_parts(chain, tmp_path, "vae text_encoder forcing")
    flags = "--steps 3 --batch-size 2 --examples 1 --lr 0.1"
    assert call(*kd_command(chain, tmp_path, flags)).returncode == 0
    saved = t2md.load_denoiser(str(tmp_path / "kd"))
    raw = t2md.load_backbone(str(tmp_path / "kd"))
    raw.load_state_dict(raw_weights(tmp_path, "kd"))
    x = inputs(width=64)
    noise = t2md.predict_noise(saved, **x)
    _, of_student = drawn
    assert relative(t2md.predict_noise(of_student, **x), noise) < 1e-5
    assert relative(t2md.predict_noise(raw, **x), noise) > 1e-3


def test_what_must_run_first(chain, tmp_path):
    """What OUT has is taken first, then what is shipped; the rest is trained before."""

    def names(flags):
        return list(jobs_of(f"--out {tmp_path} {flags}"))

    assert names("--stage kd") == ["forcing", "kd"]
    assert names("--stage kd --init llama") == ["kd"]
    assert names("--stage hires1") == ["adapt", "hires1"]
    assert names("--stage teacher") == ["teacher"]
    assert names("--stage all") == list(train.CHAIN)
    assert names("--stage all --vae v --text-encoder t") == list(train.STAGES)  # no parts that nobody uses
    shipped = jobs_of(f"--stage adapt --out {tmp_path}")["adapt"]
    assert shipped.start == os.path.join(train.ASSETS, "student_kd")
    assert shipped.vae == os.path.join(train.ASSETS, "vae_adapt")
    os.makedirs(tmp_path / "teacher")  # an empty one is none
    assert names("--stage kd") == ["forcing", "kd"]
    copy_parts(chain, tmp_path, "forcing vae text_encoder")
    assert names("--stage kd") == ["kd"]
    assert jobs_of(f"--stage teacher --out {tmp_path}")["teacher"].vae == str(tmp_path / "vae")
    torch.save(dict(step=2, steps=9), tmp_path / "forcing" / "training_state.pt")
    assert names("--stage kd") == ["forcing", "kd"]
    with pytest.raises(ValueError, match="starts from PixArt-alpha.*, it trains no teacher"):
        names("--stage teacher --config t2md --data x")


def test_a_stage_that_is_begun_is_neither_finished_nor_replaced(chain, tmp_path):
    """It goes on first, for as many steps as it was begun for; no shipped model takes its place."""
    copy_parts(chain, tmp_path, "forcing kd vae text_encoder")
    torch.save(dict(step=2, steps=9), tmp_path / "kd" / "training_state.pt")
    jobs = jobs_of(f"--stage hires1 --out {tmp_path}")
    assert list(jobs) == ["kd", "adapt", "hires1"] and jobs["adapt"].start == str(tmp_path / "kd")
    assert jobs["kd"].settings.steps == 9
    assert jobs_of(f"--stage kd --out {tmp_path}")["kd"].settings.steps == 9
    assert jobs_of(f"--stage kd --steps 5 --out {tmp_path}")["kd"].settings.steps == 5
    torch.save(dict(step=0, steps=9), tmp_path / "kd" / "training_state.pt")  # killed at the first checkpoint
    assert not checkpoints.finished(tmp_path / "kd")
    assert list(jobs_of(f"--stage adapt --out {tmp_path}")) == ["adapt"]
    settings = jobs_of(f"--stage kd --out {tmp_path}")["kd"].settings
    assert settings == train.SHAPES_SETTINGS["kd"]  # nothing is there that would bind the next command


def test_a_model_whose_training_state_is_gone_is_not_trained_over(chain, tmp_path):
    """A model without a state was put there by somebody, unless it was trained there."""
    copy_parts(chain, tmp_path, "forcing kd vae text_encoder")
    before = files.fingerprint(str(tmp_path / "kd"))
    os.remove(tmp_path / "kd" / "training_state.pt")
    for command in (kd_command(chain, tmp_path), ["train.py", "--stage", "adapt", "--out", str(tmp_path)]):
        refused(call(*command), "kd was trained here, and its training_state.pt is gone: put it back")
    os.remove(tmp_path / "kd" / "log.jsonl")
    assert checkpoints.finished(tmp_path / "kd")
    os.remove(tmp_path / "kd" / "made_with.json")
    assert "kd: finished" in call(*kd_command(chain, tmp_path)).stdout
    assert files.fingerprint(str(tmp_path / "kd")) == before
    os.remove(tmp_path / "kd" / "config.json")
    assert not checkpoints.finished(tmp_path / "kd")


def test_what_is_refused_encodes_nothing(chain, tmp_path):
    copy_parts(chain, tmp_path, "vae text_encoder forcing kd")
    write_images(tmp_path)
    cache = tmp_path / "cache"
    command = [*kd_command(chain, tmp_path), "--data", str(tmp_path / "images"), "--cache", str(cache)]
    refused(call(*command), "kd was made with")
    refused(call(*command, "--example-prompts", "nothere.txt"), "nothere.txt")
    assert not cache.exists() or not os.listdir(cache)


def test_pictures_that_cannot_be_drawn_lose_no_steps(chain, tmp_path):
    """The state is written before the pictures, and the error is a line in the output."""
    copy_parts(chain, tmp_path, "vae text_encoder forcing")
    command = kd_command(chain, tmp_path, "--steps 4 --batch-size 2 --save-every 2 --examples 1")
    fails = mock.Mock(side_effect=[[Image.new("RGB", (8, 8))], RuntimeError("out of memory"), MemoryError()])
    with mock.patch.object(sample, "generate_all", fails):
        result = call(*command)
    assert result.returncode == 0 and result.stderr.count("kd: no pictures") == 2, result.stderr
    assert steps_done(tmp_path / "kd") == (4, 4) and fails.call_count == 3


def test_a_run_that_never_began_leaves_its_folder_free(chain, tmp_path):
    copy_parts(chain, tmp_path, "vae text_encoder forcing")
    refused(call(*kd_command(chain, tmp_path), "--data", "nowhere"), "nowhere")
    with mock.patch.object(t2md, "kd_loss", side_effect=KeyboardInterrupt):
        refused(call(*kd_command(chain, tmp_path, "--steps 6 --batch-size 3 --examples 0")), "stopped")
    assert call(*kd_command(chain, tmp_path)).returncode == 0


def test_a_folder_in_use_and_a_damaged_one_are_refused_and_kept(chain, tmp_path):
    copy_parts(chain, tmp_path, "vae text_encoder forcing kd")
    state = tmp_path / "kd" / "training_state.pt"
    with files.lock(str(tmp_path / "kd")):
        refused(call(*kd_command(chain, tmp_path)), "kd is in use by another run")
    state.write_bytes(b"half")
    refused(call(*kd_command(chain, tmp_path)), "training_state.pt cannot be read")
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


def other_parts(folder):
    """A VAE of 16 latent channels, shifted, and a T5 of another width, for other pictures."""
    torch.manual_seed(0)
    kinds = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    shape = dict(layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False, latent_channels=16)
    vae = AutoencoderKL(3, 3, *kinds, (8, 8, 8, 8), scaling_factor=0.4, shift_factor=0.1, **shape)
    vae.save_pretrained(folder / "vae_16")
    tokenizer = parts.new_tokenizer()
    config = parts.new_text_encoder(len(tokenizer)).config
    config.d_model = 96
    T5EncoderModel(config).save_pretrained(folder / "t5_96")
    tokenizer.save_pretrained(folder / "t5_96")
    return f"--vae {folder}/vae_16 --text-encoder {folder}/t5_96"


def test_large_pictures_are_encoded_in_tiles(components):
    """A picture of a tile's size is encoded at once."""
    vae = VAE(components)
    x = torch.rand(1, 3, 96, 160) * 2 - 1
    plain, _ = vae.moments(x)
    tiled, _ = vae.moments(x, tile=64)
    assert tiled.shape == plain.shape and 0 < relative(tiled, plain) < 0.5
    whole, _ = vae.moments(x, tile=160)
    assert torch.equal(whole, plain)


def test_latents_that_are_scaled_otherwise_are_refused(components, tmp_path):
    """By channel, as newer VAEs are; and what a diffusers pipeline would decode wrongly is not exported."""
    config = json.load(open(f"{components}/vae/config.json"))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | dict(latents_mean=[0.0] * 4)))
    with pytest.raises(ValueError, match="latents_mean"):
        VAE(str(tmp_path))
    parts_of_16 = other_parts(tmp_path)
    model = save_model(tmp_path / "model", in_channels=16, out_channels=16, caption_width=96)
    command = ["sample.py", "--export", tmp_path / "exported", "--model", model, *parts_of_16.split()]
    refused(call(*command), "shift_factor")


def test_a_vaes_shift_is_taken_off_and_given_back(tmp_path):
    other_parts(tmp_path)
    vae = VAE(str(tmp_path / "vae_16"))
    x = torch.rand(1, 3, 64, 96) * 2 - 1
    posterior = vae.model.encode(x).latent_dist
    mean, std = vae.moments(x)
    assert torch.allclose(mean, (posterior.mean - 0.1) * 0.4, atol=1e-6)
    assert torch.allclose(std, posterior.std * 0.4)
    decoded = vae.model.decode(mean / 0.4 + 0.1).sample.clamp(-1, 1)
    assert torch.allclose(vae.decode(mean), decoded, atol=1e-5)


def test_a_small_transformer_of_anybodys_own_pictures(tmp_path):
    """A teacher from nothing takes its widths from VAE and T5; forcing, kd and adapt keep both."""
    given = other_parts(tmp_path)
    data = write_images(tmp_path)
    rest = f"--data {data} --batch-size 2 --examples 1 --steps 1 --out {tmp_path}/mine"
    refused(call("train.py", *f"--stage teacher {rest}".split()), "--vae", "--text-encoder")
    for stage in (f"teacher {given}", "forcing", "kd", "adapt"):
        result = call("train.py", *f"--stage {stage} {rest}".split())
        assert result.returncode == 0, result.stderr
        config = json.load(open(tmp_path / "mine" / stage.split()[0] / "config.json"))
        assert (config["in_channels"], config["out_channels"], config["caption_width"]) == (16, 16, 96)
        assert config["vae"] == "../../vae_16" and config["text_encoder"] == "../../t5_96"


def test_adapt_takes_any_vae_and_any_t5(chain, tmp_path):
    """Where they do not fit, the layers that meet them are new, all others kd's. Elsewhere it is refused."""
    copy_parts(chain, tmp_path, "vae text_encoder forcing kd")
    flags = f"{other_parts(tmp_path)} --data {write_images(tmp_path)} --batch-size 2 --examples 0"
    flags += f" --out {tmp_path}"
    job = jobs_of(f"--stage adapt --steps 1 {flags}")["adapt"]
    model = train.build(job).model
    before = T2MD.from_pretrained(tmp_path / "kd").state_dict()
    new = {name for name, weight in model.state_dict().items() if weight.shape != before[name].shape}
    assert new == {
        "patch_embed.weight",
        "caption_projection.linear_1.weight",
        "proj_out.weight",
        "proj_out.bias",
    }
    assert all(torch.equal(weight, before[n]) for n, weight in model.state_dict().items() if n not in new)
    result = call(*f"train.py --stage adapt --steps 1 {flags}".split())
    assert result.returncode == 0, result.stderr
    for stage in ("hires1", "kd"):
        wrong = f"--stage {stage} --steps 1 --vae {chain}/vae --text-encoder {tmp_path}/t5_96"
        wrong += f" --data {tmp_path}/images"
        refused(
            call(*f"train.py {wrong} --out {tmp_path} --examples 0 --init teacher".split()), "but the model's"
        )


def test_adapt_begins_by_reading_the_new_t5_as_the_old_one(chain, tmp_path, monkeypatch):
    """The first layer that reads captions gives of the data's tokens what kd's gives of the old T5's.

    A run that goes on does not ask the old one again.
    """
    copy_parts(chain, tmp_path, "vae text_encoder kd")
    captions = ("a star", "a photo of a red circle and a blue square", "two crosses")
    flags = f"--stage adapt --steps 1 --batch-size 2 --examples 0 --lr 1e-9 {other_parts(tmp_path)}"
    flags += f" --data {write_images(tmp_path, captions=captions)} --out {tmp_path}"
    train.run(arguments(flags))
    layers = [checkpoints.read_state(str(tmp_path / stage))["model"] for stage in ("kd", "adapt")]
    encoders = [TextEncoder(f"{tmp_path}/{name}") for name in ("text_encoder", "t5_96")]
    for caption in captions:
        read = []
        for weights, encoder in zip(layers, encoders):
            layer = [weights[f"caption_projection.linear_1.{name}"] for name in ("weight", "bias")]
            read.append(torch.nn.functional.linear(encoder([caption])[0], *layer))
        assert relative(read[1], read[0]) < 1e-3
    monkeypatch.setattr(train, "begin_with_translation", None)
    train.run(arguments(flags.replace("--steps 1", "--steps 2")))
    assert steps_done(tmp_path / "adapt") == (2, 2)


def test_another_tokenizer_is_not_translated(chain, published, tmp_path):
    """Its tokens are others; the new T5 is then read from the start."""
    folder, _, _ = published
    copy_parts(chain, tmp_path, "vae text_encoder kd")
    flags = f"--stage adapt --steps 1 --batch-size 2 --examples 0 --text-encoder {folder}"
    result = call(*f"train.py {flags} --data {write_images(tmp_path)} --out {tmp_path}".split())
    assert result.returncode == 0 and "the tokenizers differ" in result.stdout, result.stderr


def test_a_translation_is_the_best_affine_map():
    """Of features that it has not seen, where an affine map is all there is between two encoders."""
    torch.manual_seed(0)
    before = T2MD(pattern="S", **TINY)
    model = T2MD(pattern="S", **TINY | dict(caption_width=28))
    affine = torch.randn(28, 20)
    shift = torch.randn(20)
    seen = torch.randn(100, 28)
    unseen = torch.randn(10, 28)
    t2md.translate_text(model, before, seen, seen @ affine + shift)
    read = model.caption_projection.linear_1(unseen)
    assert relative(read, before.caption_projection.linear_1(unseen @ affine + shift)) < 1e-4
    few = torch.randn(5, 20)  # of an encoder that is the same: what five tokens do not span stays as well
    model = T2MD(pattern="S", **TINY)
    t2md.translate_text(model, before, few, few)
    of_before = before.caption_projection.linear_1.weight
    assert relative(model.caption_projection.linear_1.weight, of_before) < 1e-4


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
    """Though the loss that is said is finite: weights and EMA stay as they were. Steps between them count
    anew."""
    copy_parts(chain, tmp_path, "vae text_encoder forcing")
    calls = itertools.count()
    kd_loss = t2md.kd_loss

    def spoiled(*models, **inputs):
        loss, terms = kd_loss(*models, **inputs)
        return (loss if next(calls) in (0, 1, 2, 4) else loss * float("nan")), terms

    monkeypatch.setattr(t2md, "kd_loss", spoiled)
    command = kd_command(chain, tmp_path, "--steps 20 --batch-size 2 --save-every 2 --examples 0")
    refused(call(*command), "not finite ten steps in a row", "Try a smaller --lr")
    assert steps_done(tmp_path / "kd") == (14, 20)
    skipped = [line["skipped"] for line in read_log(tmp_path / "kd")]
    assert skipped == [False] * 3 + [True, False] + [True] * 9
    state = checkpoints.read_state(str(tmp_path / "kd"))
    assert all(torch.isfinite(w).all() for w in (*state["model"].values(), *state["ema"]["shadow_params"]))


def test_training_on_a_folder_of_images_with_a_cache(chain, tmp_path, monkeypatch):
    """From a full cache neither VAE nor T5 is loaded; captions that were cut are said; what a killed save has
    left is swept away; a data set that has moved is known again, a run that was begun goes on with it."""
    copy_parts(chain, tmp_path, "vae text_encoder teacher")
    data = write_images(tmp_path)
    seen = []
    loaded = []
    load_model = t2md.load_model
    with open(tmp_path / "images" / "metadata.jsonl", "a") as file:
        file.write(json.dumps(dict(file_name="red.png", text="red " * 200)))
    forcing_loss = t2md.forcing_loss

    def spy(*models, **x):
        seen.append(os.path.exists(tmp_path / "forcing" / ".saving-1"))
        return forcing_loss(*models, **x)

    def noted_load(model_class, *args, **kwargs):
        loaded.append(model_class)
        return load_model(model_class, *args, **kwargs)

    monkeypatch.setattr(t2md, "load_model", noted_load)
    monkeypatch.setattr(t2md, "forcing_loss", spy)
    (tmp_path / "forcing" / ".saving-1").mkdir(parents=True)
    flags = f"--stage forcing --batch-size 2 --examples 0 --out {tmp_path} --cache {tmp_path}/cache --data"
    first = call("train.py", *flags.split(), data, "--steps", 2)
    assert first.returncode == 0 and "1 captions were longer" in first.stdout, first.stderr
    assert {AutoencoderKL, T5EncoderModel} <= set(loaded)
    loaded.clear()
    os.rename(data, tmp_path / "moved")
    again = call("train.py", *flags.split(), f"{tmp_path}/moved/", "--steps", 3)
    assert again.returncode == 0 and seen == [False] * 3, again.stderr
    assert not {AutoencoderKL, T5EncoderModel} & set(loaded)
    shutil.rmtree(tmp_path / "forcing")
    refused(call("train.py", *flags.split(), "nowhere"), "nowhere")


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub; the repositories are folders, root/owner/name."""

    root = None

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        commit = "a" * 40
        names = urllib.parse.urlparse(self.path).path.strip("/").split("/")
        if names[:2] == ["api", "models"]:
            folder = self.root.joinpath(*names[2:4])
            base = folder.joinpath(*names[6:])
            found = [path for path in base.rglob("*") if path.is_file()]
            if names[4:5] == ["tree"] and found:
                rows = [
                    dict(type="file", path=str(p.relative_to(folder)), size=p.stat().st_size, oid="b" * 40)
                    for p in found
                ]
                return self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
            if folder.is_dir() and names[4:5] != ["tree"]:
                siblings = [dict(rfilename=str(path.relative_to(folder))) for path in found]
                about = dict(id="/".join(names[2:4]), sha=commit, siblings=siblings, tags=[], private=False)
                return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        elif len(names) > 4 and names[2] == "resolve":
            path = self.root.joinpath(*names[:2], *names[4:])
            if path.is_file():
                headers = dict(ETag=f'"{zlib.crc32(path.read_bytes())}"', X_Repo_Commit=commit)
                return self.answer(200, path.read_bytes(), **headers)
        return self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


BY_NAME = """
import sys
sys.path.insert(0, {here!r})
import train
from data import index
index.INDEX = "index"
for stage in ("forcing", "kd", "adapt"):
    flags = f"--stage {{stage}} --config t2md --pattern SHWHWHW --data images --out runs --steps 1"
    flags += " --batch-size 2 --examples 1 --example-size 64"
    train.run(train.parse_arguments(flags.split()))
"""


def start_by_name(root):
    """Run forcing, kd and adapt with every default of --config t2md, from a hub: PixArt's pipeline, SDXL's
    VAE alone, and flan-t5 as it is published: with a decoder, its tokenizer beside the weights."""
    hub = root / "hub"
    pixart_folder = hub / "PixArt-alpha" / "PixArt-XL-2-512x512"
    pixart_folder.mkdir(parents=True)
    _, _, weights = publish(pixart_folder)
    write_weights(pixart_folder / "transformer", weights, "safetensors")
    shutil.copytree(pixart_folder / "vae", hub / "stabilityai" / "sdxl-vae")
    vocabulary = t2md.TextEncoder(str(pixart_folder)).model.config.vocab_size
    shape = dict(d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, feed_forward_proj="gated-gelu")
    flan = T5ForConditionalGeneration(T5Config(vocab_size=vocabulary, tie_word_embeddings=False, **shape))
    flan.save_pretrained(hub / "google" / "flan-t5-xxl")
    for path in (pixart_folder / "tokenizer").iterdir():
        shutil.copy(path, hub / "google" / "flan-t5-xxl")
    write_images(root)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisTest", (Hub,), dict(root=hub)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hugging_face = dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(root / "home"))
    hugging_face |= dict(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    process = start_python("-c", BY_NAME.format(here=HERE), cwd=root, env=os.environ | hugging_face)

    def finish():
        _, errors = process.communicate()
        server.shutdown()
        server.server_close()
        return root / "runs", errors, process.returncode

    return finish


def test_the_papers_stages_run_by_name(by_name):
    runs, errors, code = by_name
    assert code == 0, errors[-2000:]
    config = json.load(open(runs / "adapt" / "config.json"))
    assert [config["vae"], config["text_encoder"]] == ["stabilityai/sdxl-vae", "google/flan-t5-xxl"]
    assert config["pattern"] == "SHWHWHW" and config["d_state"] == 256


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
    clock = iter(range(0, 10**6, 50))
    saved = []
    save = train.Saver.save

    def spy(checkpoints, model, ema, optimizers, step, draw):
        saved.append((step, draw))
        save(checkpoints, model, ema, optimizers, step, draw)

    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(train.Saver, "save", spy)
    flags = "--steps 12 --batch-size 2 --save-every 5 --save-minutes 10 --examples 0"
    assert call(*kd_command(chain, tmp_path, flags)).returncode == 0
    assert [step for step, regular in saved if regular] == [5, 10, 12] and len(saved) > 3
    # The first process's clock counts for all.
    reduce = train.reduce
    saved.clear()

    def late_after_two(trained, terms, told_to_stop, late, device):
        terms, stop, _ = reduce(trained, terms, told_to_stop, late, device)
        calls.append(terms)
        return terms, stop, len(calls) == 2

    calls = []
    monkeypatch.setattr(train, "reduce", late_after_two)
    flags = "--steps 15 --batch-size 2 --save-minutes 99999 --examples 0"
    assert call(*kd_command(chain, tmp_path, flags)).returncode == 0
    assert saved == [(14, False), (15, True)]


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
    assert t2md.load_denoiser(str(tmp_path / "kd")).config.pattern == "SHWHWHW"
    assert not [name for name in os.listdir(tmp_path / "kd") if "tmp" in name or "saving" in name]


# -- 7. several processes ------------------------------------------------------------------------------------

TWO_STAGES = """
import sys
sys.path.insert(0, {here!r})
import train
import dataclasses
from data import index
index.INDEX = {index!r}
for stage in ("forcing", "kd"):
    settings = train.SHAPES_SETTINGS[stage]
    train.SHAPES_SETTINGS[stage] = dataclasses.replace(settings, muon=False, pictures=15)
for command in sys.argv[1:]:
    sys.argv = ["train.py", *command.split()]
    train.main()
"""
THREE_STEPS = "--stage {stage} --steps 3 --batch-size 5 --lr 1e-3 --examples 0 --out {out}"


def start_two_nodes(root):
    """Run two nodes of torchrun, of one process each, that train forcing, kd, and forcing for 200 steps, in
    which one is told to stop; started as the README has it for several machines."""
    chain = make_chain().name
    script = root / "train_with_adam.py"
    log = root / "stopped" / "forcing" / "log.jsonl"
    script.write_text(TWO_STAGES.format(here=HERE, index=str(root / "index")))
    for name, have in (("forcing", ""), ("kd", " forcing"), ("stopped", "")):
        copy_parts(chain, root / name, "vae text_encoder teacher" + have)
    commands = [THREE_STEPS.format(stage=stage, out=root / stage) for stage in ("forcing", "kd")]
    commands += [f"--stage forcing --steps 200 --batch-size 2 --examples 0 --out {root}/stopped"]
    launch = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-id t2md --rdzv-backend c10d"
    launch += " --rdzv-endpoint localhost:29531 --node-rank"
    nodes = [start_python(*launch.split(), node, script, *commands, cwd=HERE) for node in range(2)]

    def finish():
        while nodes[0].poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
            time.sleep(0.1)
        nodes[1].terminate()
        errors = "".join(node.communicate(timeout=120)[1] for node in nodes)
        return root, errors, [node.returncode for node in nodes]

    return finish


def test_two_nodes_told_to_stop_save_and_exit(two_nodes):
    """By torchrun's SIGTERM to one of them: both finish their step, and the first process saves it."""
    root, errors, codes = two_nodes
    done, planned = steps_done(root / "stopped" / "forcing")
    assert 0 not in codes and 2 <= done < planned == 200, errors
    assert f"forcing: told to stop; saved after step {done}; the same command goes on" in errors
    assert len(read_log(root / "stopped" / "forcing")) == done


@pytest.mark.parametrize("stage", ["forcing", "kd"])
def test_two_processes_and_accumulation_equal_one_process(chain, two_nodes, tmp_path, monkeypatch, stage):
    """3 steps of 5 images: by one process; by two over gloo; by one, two images at a time, then the fifth."""
    settings = dataclasses.replace(train.SHAPES_SETTINGS[stage], muon=False, pictures=15)
    monkeypatch.setitem(train.SHAPES_SETTINGS, stage, settings)  # Muon magnifies rounding
    folders = dict(one=tmp_path / "one", two=two_nodes[0] / stage, accumulated=tmp_path / "accumulated")
    weights = {}
    logs = {}
    for name, out in folders.items():
        if name != "two":
            copy_parts(chain, out, "vae text_encoder teacher" + (" forcing" if stage == "kd" else ""))
            flags = THREE_STEPS.format(stage=stage, out=out).split()
            result = call("train.py", *flags, *(["--micro-batch", "2"] if name == "accumulated" else []))
            assert result.returncode == 0, result.stderr
        logs[name] = read_log(out / stage)
        assert len(logs[name]) == 3, two_nodes[1]
        weights[name] = torch.cat([w.flatten() for k, w in raw_weights(out, stage).items() if ".mamba." in k])
    for name in ("two", "accumulated"):
        assert 0 < (weights[name] - weights["one"]).norm() < 1e-5 * weights["one"].norm()
        for line, expected in zip(logs[name], logs["one"]):
            for term in set(expected) - {"seconds", "waited", "skipped"}:
                assert line[term] == pytest.approx(expected[term], rel=1e-3), term


def test_previews_are_cheap_at_full_size(monkeypatch, tmp_path):
    """In the training dtype, folded, four of them, at the base size unless asked; as of the paper's hires2,
    whose base size is a quarter of what it trains at."""
    drawn = []

    def generate_all(model, vae, encoder, captions, size, seed, **flags):
        fused = {type(m.fuse) for m in (block.mixer for block in model.blocks) if isinstance(m, MambaMixer)}
        drawn.append((model.patch_embed.weight.dtype, fused, captions, size))
        return [Image.new("RGB", (8, 8))] * len(captions)

    monkeypatch.setattr(sample, "generate_all", generate_all)
    monkeypatch.setattr(train, "encoded_examples", lambda *_: None)
    data = {4: types.SimpleNamespace(rows=range(9), caption=lambda _: "a star")}
    vae = types.SimpleNamespace(factor=8)
    trained = T2MD(pattern="SHW", **TINY | dict(sample_size=256))
    networks = train.Networks(
        model=trained, teacher=None, smaller=None, vae=vae, text_encoder=None, schedule=None
    )
    four = ["a star"] * 4
    for example_size, side, prompts in ((512, 512, None), (2048, 2048, None), (None, 2048, list("abcde"))):
        settings = dataclasses.replace(train.T2MD_SETTINGS["hires2"], example_size=example_size)
        job = types.SimpleNamespace(
            settings=settings, dtype="bfloat16", device="cpu", seed=0, example_prompts=prompts
        )
        train.example_painter(job, networks, data)(trained, str(tmp_path / "a.png"))
        captions = prompts[:4] if prompts else four
        assert drawn[-1] == (torch.bfloat16, {torch.nn.Identity}, captions, (side, side))


def test_batches_are_checked_against_processes_first(monkeypatch, tmp_path):
    """256 images at base size are 16 of 2048 px, too few for 32 processes; nothing has been looked at yet."""
    monkeypatch.setattr(train, "WORLD", 32)
    T2MD(pattern="S", **TINY).save_pretrained(tmp_path / "hires1")
    args = arguments(f"--config t2md --stage hires2 --data nowhere --teacher nowhere --out {tmp_path}")
    with pytest.raises(ValueError, match="16 images of its largest size cannot be shared by 32 processes"):
        train.plan(args)


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
        model = t2md.load_denoiser(str(shipped / name))
        vae, text_encoder = t2md.load_parts(model, str(shipped / name))
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert vae.channels == 4 and text_encoder.width == 64


def start_readme_sample(root):
    """Run README's first command as it is typed there."""
    with open(os.path.join(HERE, "README.md")) as file:
        command = re.search(r"^python (sample.py .*?) *#", file.read(), re.M)[1]
    process = start_python(*shlex.split(command), "--out", root, cwd=HERE)

    def finish():
        output, errors = process.communicate()
        return output, errors, process.returncode

    return finish


def test_readme_sample_command(readme_sample):
    prompt = "a photo of a red circle and a blue square"
    assert f'python sample.py "{prompt}"' in open(os.path.join(HERE, "README.md")).read()
    output, errors, code = readme_sample
    assert code == 0, errors
    picture = Image.open(output.strip())
    circle, square = (
        {"class": c, "color": k, "count": 1} for c, k in (("circle", "red"), ("square", "blue"))
    )
    assert picture.size == (512, 512) and score_shapes(picture, {"include": [circle, square]})
