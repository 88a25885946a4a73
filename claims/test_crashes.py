"""What must hold when things break: kills lose nothing; damaged files give a sentence, and are left alone."""

import contextlib
import functools
import io
import json
import os
import random
import signal
import struct
import tarfile

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import sample
import t2md
import train
from claims import figures
from data import parts
from data.images import ImageData
from t2md import T2MD
from test_t2md import TINY, call, run

SECONDS = 20  # what takes longer hangs


def test_kills_lose_nothing():
    """A few; the hundred are in the command."""
    result = run("-m", "claims.crashes", "--kills", "3")
    assert result.returncode == 0 and "bit for bit" in result.stdout, result.stdout + result.stderr


# -- damages -------------------------------------------------------------------------------------------------

# No huge whole numbers in configs: of a model with 2^31 layers the libraries begin to make each.
VALUES = (None, True, False, 0, -1, 3, 0.5, 1e30, float("nan"), float("inf"), "", "x", "\0", "\ud800", "..")
VALUES += ([], [0], ["x"], [[]], {}, {"x": 0})


def damaged_bytes(content, rng):
    """Bytes, flipped, cut, lost, doubled, zeroed or replaced."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    kind = rng.randrange(8)
    if kind < 3:
        content = bytearray(content)
        ahead = len(content) if kind else min(len(content), 600)  # headers matter most
        for _ in range(rng.choice((1, 1, 3, 30))):
            content[rng.randrange(ahead)] = rng.randrange(256)
        return bytes(content)
    inside = (b"", content[a:b] * 2, bytes(b - a), rng.randbytes(min(b - a, 99)))[kind % 4]
    return content[:a] if kind == 7 else content[:a] + inside + content[b:]


def damaged_value(value, rng):
    """A tree of dicts and lists with one value, anywhere in it, replaced, lost or renamed."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        value = value.copy()
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = rng.randrange(8)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[f"{key}x"] = value.pop(key)
        else:
            value[key] = damaged_value(value[key], rng)
        return value
    return rng.choice(VALUES)


def damaged_json(content, rng):
    """The same of a JSON file, or of a line of one with a record a line; now and then nested without end."""
    if not rng.randrange(20):
        return b"[" * 100_000
    lines = [content] if content.startswith(b"{\n") else content.splitlines(keepends=True)
    k = rng.randrange(len(lines))
    lines[k] = json.dumps(damaged_value(json.loads(lines[k]), rng)).encode() + b"\n"
    return b"".join(lines)


def damaged_safetensors(content, rng):
    """The same of a safetensors file's header: names, shapes, types, offsets."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(damaged_value(json.loads(content[8 : 8 + length]), rng)).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def damaged_state(content, rng):
    """The same of what torch.save wrote."""
    file = io.BytesIO()
    torch.save(damaged_value(torch.load(io.BytesIO(content), weights_only=True), rng), file)
    return file.getvalue()


def damaged(path, content, rng):
    """A damaged file's content: bytes anywhere, or values where it is known what they are."""
    kinds = {".json": damaged_json, ".jsonl": damaged_json, ".pt": damaged_state}
    kinds[".safetensors"] = damaged_safetensors
    known = kinds.get(os.path.splitext(path)[1], damaged_bytes)
    return (known if rng.random() < 0.6 else damaged_bytes)(content, rng)


# -- a world to damage ---------------------------------------------------------------------------------------


def make_images(root):
    """Five images and their captions, as a folder and as a tar shard."""
    (root / "folder").mkdir()
    with (
        tarfile.open(root / "shard.tar", "w", format=tarfile.USTAR_FORMAT) as tar,
        open(root / "folder" / "metadata.jsonl", "w") as metadata,
    ):
        for k, suffix in enumerate(("png", "jpg", "png", "webp", "gif")):
            name, file = f"{k}.{suffix}", io.BytesIO()
            Image.effect_noise((40, 32), 99).convert("RGB").save(file, {"jpg": "jpeg"}.get(suffix, suffix))
            (root / "folder" / name).write_bytes(file.getvalue())
            metadata.write(json.dumps(dict(file_name=name, text=f"a photo of {k} stars")) + "\n")
            record = json.dumps(dict(caption=f"a photo of {k} stars")).encode()
            for inside, content in ((name, file.getvalue()), (f"{k}.json", record)):
                info = tarfile.TarInfo(inside)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def command(root, *more):
    """train.py's, for kd in this world."""
    flags = f"--stage kd --init teacher --teacher {root}/teacher --data {root}/folder --cache {root}/cache"
    flags += f" --out {root}/out --pattern SH --batch-size 2 --examples 0 --device cpu --steps"
    return [*flags.split(), *(more or ["1"])]


def make_world(root):
    """Images, prompts, a tiny teacher with its VAE and T5, and a kd run of one step from it, with a cache."""
    torch.manual_seed(0)
    make_images(root)
    (root / "prompts.txt").write_text("a star\nan étoile\n", encoding="utf-8")
    (root / "prompts.jsonl").write_text('{"prompt": "a star", "tag": ["x"]}\n{"prompt": "two stars"}\n')
    tokenizer, ends = parts.new_tokenizer(), dict(layers_per_block=1, norm_num_groups=2)
    kinds = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    AutoencoderKL(3, 3, *kinds, (4, 4), mid_block_add_attention=False, **ends).save_pretrained(root / "vae")
    parts.new_text_encoder(len(tokenizer)).save_pretrained(root / "text_encoder")
    tokenizer.save_pretrained(root / "text_encoder")
    like = TINY | dict(caption_width=64, sample_size=16, pos_embed="pixart")
    T2MD("SS", **like, vae="../vae", text_encoder="../text_encoder").save_pretrained(root / "teacher")
    train.run(train.parse_arguments(command(root)))


# -- readers: of a damaged file each does what the commands do with it -------------------------------------


def look(root, source):
    """--data, without and with what is in an index already."""
    data = ImageData(f"{root}/{source}", 32, None, None, 0, f"{root}/{source}_index")
    for k in [k for batch in data.order(0, 2) for k in batch]:
        data.picture(k)
        len(data.prompts[k])


def read_cache(root):
    vae, text_encoder = networks(str(root))
    data = ImageData(f"{root}/folder", 32, vae, text_encoder, 0, f"{root}/out/index", f"{root}/cache")
    for turn in range(3):
        data.batch(turn, (0, 1), 2, [sample.draw(0, "kd", turn, i) for i in range(2)])


@functools.cache
def networks(root):
    return t2md.VAE(f"{root}/vae"), t2md.TextEncoder(f"{root}/text_encoder")


@functools.cache
def student(root):
    network = T2MD.from_config(T2MD.load_config(f"{root}/out/kd")).requires_grad_(False)
    for module in train.token_mixers(network):
        module.requires_grad_(True)
    return network


def read_prompts(root, name):
    args = ["--prompts", f"{root}/{name}", "--out", f"{root}/samples", "--device", "cpu"]
    sample.wanted_images(sample.parse_arguments(args))


MODEL = "--model ROOT/out/kd --out ROOT/samples --steps 1 --size 16 --device cpu".split()


def draw(root):
    args = [argument.replace("ROOT", str(root)) for argument in ("a star", *MODEL)]
    sample.run(sample.parse_arguments(args))


def resume(root):
    """What a stage does with its state: take it over, and a step from it."""
    plan, network = train.STAGES["kd"].shapes | dict(steps=2), student(str(root))
    optimizer = train.Optimizer(network, plan, train.mamba_mixers(network))
    started = train.Run("kd", f"{root}/out/kd", network, optimizer, plan)
    for p in optimizer.parameters:
        p.grad = torch.ones_like(p)
    optimizer.step(1)
    started.ema.step(network.parameters())


def curves(root):
    figures.curves([f"{root}/out/kd"])


# how often, who reads, which files, and is it the program's own file, which may be made again
READERS = (
    (250, functools.partial(look, source="folder"), "folder/metadata.jsonl", False),
    (100, functools.partial(look, source="folder"), "folder/[0-9].*", False),
    (250, functools.partial(look, source="shard.tar"), "shard.tar", False),
    (200, functools.partial(look, source="folder"), "folder_index/*", True),
    (120, read_cache, "cache/text-*", True),
    (120, read_cache, "cache/32px-*", True),
    (60, read_cache, "cache/made_with.json", True),
    (200, functools.partial(read_prompts, name="prompts.txt"), "prompts.txt", False),
    (200, functools.partial(read_prompts, name="prompts.jsonl"), "prompts.jsonl", False),
    (40, draw, "out/kd/config.json", False),
    (20, draw, "out/kd/*.safetensors", False),
    (20, draw, "vae/config.json", False),
    (10, draw, "vae/*.safetensors", False),
    (15, draw, "text_encoder/config.json", False),
    (10, draw, "text_encoder/tok*.json", False),
    (8, draw, "text_encoder/*.safetensors", False),
    (20, resume, "out/kd/training_state.pt", False),
    (8, resume, "out/kd/log.jsonl", True),
    (60, curves, "out/kd/log.jsonl", False),
)
# of these a few by the commands themselves
COMMANDS = (
    (8, "train.py", "--stage data --data ROOT/shard.tar --out ROOT/seen".split(), "shard.tar"),
    (8, "train.py", command("ROOT", "2"), "out/kd/training_state.pt"),
    (8, "train.py", command("ROOT", "2"), "out/kd/made_with.json"),
    (8, "sample.py", ["--prompts", "ROOT/prompts.jsonl", *MODEL], "prompts.jsonl"),
    (8, "sample.py", ["a star", *MODEL], "out/kd/config.json"),
)


def contents(root):
    """{path: (bytes, time)} of every file."""
    paths = (path for path in root.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@contextlib.contextmanager
def at_most(seconds):
    """No longer than that, and not a word."""

    def hangs(*_):
        pytest.fail(f"hangs for {seconds} seconds")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    for source in ("folder", "shard.tar"):
        look(root, source)
    return root, contents(root)


def restore(world):
    """Make all files as they were -> those that were not."""
    root, before = world
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    changed = [path for path in before if before[path][1] != after.get(path)] + [
        *(after.keys() - before.keys())
    ]
    for path in changed:
        path.unlink(missing_ok=True)
        if path in before:
            content, stamp = before[path]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            os.utime(path, ns=(stamp, stamp))
    return changed


def damage(world, pattern, times, rng):
    """Damage one of the files of `pattern`, as often as said, yield its path and content, then restore all.
    Fails where another file, that is not of a training or a cache, was changed."""
    root, before = world
    paths = sorted(path for path in before if path.match(f"{root}/{pattern}"))
    restore(world)
    for _ in range(times):
        path = rng.choice(paths)
        content = damaged(path.name, before[path][0], rng)
        path.write_bytes(content)
        yield path, content
        for other in restore(world):
            programs = other not in before or other.parent.name in ("kd", "cache")
            assert other == path or programs, f"{path} damaged, {other} changed: {content[:500]}"
    assert contents(root) == before


def sentence(error, path, content):
    """A refusal must be one line that says which file, or folder, or what is missing."""
    text, names = str(error), (path.name, path.parent.name, "there is no folder")
    assert len(text.splitlines()) == 1 and len(text) > 20, (text, path, content[:500])
    assert any(name in text for name in names), (text, path, content[:500])


@pytest.mark.parametrize("times, reader, pattern, own", READERS, ids=[f"{r[2]}-{r[0]}" for r in READERS])
def test_damages(world, times, reader, pattern, own):
    """Each is read as if whole, or refused in a sentence: no traceback, no hang, no file changed."""
    refused, rng = 0, random.Random(pattern)
    for path, content in damage(world, pattern, times, rng):
        try:
            with at_most(SECONDS):
                reader(world[0])
        except (OSError, ValueError) as error:
            sentence(error, path, content)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{path} damaged: {content[:500]}") from error
        assert own or path.read_bytes() == content, (path, content[:500])
    assert refused > 0 or pattern in ("folder/[0-9].*", "out/kd/log.jsonl")  # both can be done without


@pytest.mark.parametrize("times, script, arguments, pattern", COMMANDS, ids=[c[3] for c in COMMANDS])
def test_damages_by_the_commands(world, times, script, arguments, pattern):
    arguments = [argument.replace("ROOT", str(world[0])) for argument in arguments]
    for path, content in damage(world, pattern, times, random.Random(pattern)):
        with at_most(SECONDS):
            result = call(script, *arguments)
        if result.returncode:
            sentence(result.stderr.strip().splitlines()[-1], path, content)
            assert path.read_bytes() == content
