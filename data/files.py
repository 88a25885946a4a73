"""Files and seeds: nothing that exists is ever lost, every random draw is a function of its place."""

import contextlib
import ctypes
import datetime
import fcntl
import hashlib
import json
import os
import pathlib
import re
import sys
import tempfile
import textwrap

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

launched = dist.is_torchelastic_launched()  # else a cluster may have left variables of these names
RANK, WORLD = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)


def generator(seed, stage, step, index):
    """The torch.Generator of one sample. It depends on no restart, nor on how processes share a batch."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def noise_for(seed, channels, h, w, level=0):
    """The noise (1, channels, h, w) of one image, drawn on the CPU: a function of its seed and, where a
    picture is made at several sizes, of which one it is."""
    g = generator(seed, "noise", level, 0) if level else torch.Generator().manual_seed(seed)
    return torch.randn(1, channels, h, w, generator=g)


@contextlib.contextmanager
def rank_zero_first():
    """What is inside runs on the first process, then on the others: they find on disk what it has made."""
    if RANK:
        dist.barrier()
    yield
    if WORLD > 1 and not RANK:
        dist.barrier()


def start_processes():
    """Under torchrun: meet the others; the first process speaks for all."""
    # Each device has its own backend; a week: others wait while the first process draws, encodes or saves.
    dist.init_process_group(timeout=datetime.timedelta(days=7))
    if RANK:
        sys.stdout = open(os.devnull, "w")


def write_atomically(path, write):
    """write(temporary path), then rename: whoever reads `path` finds the old or the new."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as temporary:
        write(os.path.join(temporary, name))
        os.replace(os.path.join(temporary, name), path)


def write_text(path, text):
    """`write_atomically` for a string."""
    write_atomically(path, lambda temporary: pathlib.Path(temporary).write_text(text, encoding="utf-8"))


def write_json(path, value):
    """`write_atomically` for what JSON can hold."""
    write_text(path, json.dumps(value, indent=1))


def read_json(path):
    """The value in a JSON file.  Raises ValueError, naming the file, if it holds none."""
    try:
        return json.loads(pathlib.Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable: {error}") from error


def write_png(path, image, **text_fields):
    """`write_atomically` for a PIL picture, with text fields of the PNG."""
    info = PngInfo()
    for name, value in text_fields.items():
        info.add_itxt(name, str(value))
    write_atomically(path, lambda temporary: image.save(temporary, "PNG", pnginfo=info))


def fingerprint(path_or_repo):
    """A short name of a model: of all bytes of configs, tokenizer and weights; a repository is its own."""
    if not os.path.isdir(path_or_repo):
        return path_or_repo
    kinds = ("config.json", "tokenizer.json", "spiece.model", ".safetensors", ".bin")
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(path_or_repo).rglob("*")):
        if path.name.endswith(kinds):
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(path_or_repo)} {content}".encode())
    return digest.hexdigest()[:16]


def claim(folder, made_with):
    """Note in `folder` what it is made with.  Raises ValueError, naming what differs, if it was begun with
    anything else."""
    path, made_with = os.path.join(folder, "made_with.json"), json.loads(json.dumps(made_with))
    with rank_zero_first():
        if not os.path.exists(path):
            write_json(path, made_with)
        noted = read_json(path)
        if names := sorted(k for k in {*noted, *made_with} if noted.get(k) != made_with.get(k)):
            differ = ", ".join(f"{k} {noted.get(k)}, not {made_with.get(k)}" for k in names)
            raise ValueError(f"{folder} was made with {differ}; give the same again, or another folder")


@contextlib.contextmanager
def lock(folder):
    """What is inside runs in one process, or group of them, at a time.  Raises ValueError for a second."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "a") as file:
        if not RANK:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{folder} is in use by another run; wait, or give another") from error
            except OSError:  # some network drives have no locks
                pass
        yield


def slug(text):
    """ "+ teacher forcing: T2MD" -> "teacher-forcing-t2md", for the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def contact_sheet(rows, side, captions=None):
    """Rows of PIL pictures, each fitted into a square of `side` pixels, above its caption if there are any
    (rows of strings) -> one picture."""
    height = side + (36 if captions else 0)  # three lines of text
    sheet = Image.new("RGB", (side * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(ImageOps.contain(picture, (side, side), Image.BOX), (x * side, y * height))
            if captions:
                text = "\n".join(textwrap.wrap(captions[y][x], side // 6)[:3])
                ImageDraw.Draw(sheet).text((x * side + 2, y * height + side), text, fill="black")
    return sheet


def keep_freed_memory(largest=False):
    """Tell glibc to keep what tensors free: handing it back costs page faults, a sixth of a training step.
    largest: also what is over 32 MiB. Half the time of a Mamba mixer at 2048 px, for a third more memory."""
    with contextlib.suppress(AttributeError):  # another library has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its highest
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        if largest:
            mallopt(-4, 0)  # M_MMAP_MAX


def as_command(name, run, args, stopped="stopped"):
    """run(args), of any command here: whatever is wrong becomes one sentence and exit code 1; so does Ctrl-C,
    and `stopped` says what is kept."""
    keep_freed_memory()
    try:
        return run(args)
    except KeyboardInterrupt:
        sys.exit(f"{name}: {stopped}")
    except Exception as error:
        if args.debug:
            raise
        sys.exit(f"{name}: {type(error).__name__}: {textwrap.shorten(str(error), 400)}; --debug shows where")
