"""Files and seeds: nothing that exists is ever lost, every random draw is a function of its place."""

import contextlib
import ctypes
import datetime
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import socket
import sys
import textwrap
import uuid
import zlib

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

# Set by torchrun; where it has not launched us, a cluster may have left variables of these names.
RANK, WORLD = 0, 1
if dist.is_torchelastic_launched():
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def generator(seed, stage, step, index):
    """The torch.Generator of one sample. It depends on no restart, nor on how processes share a batch."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def numpy_generator(seed, stage, step, index):
    """The same for numpy."""
    return np.random.default_rng([seed, zlib.crc32(stage.encode()), step, index])


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


def start_processes(folder):
    """Under torchrun: meet the others, and see that `folder` is one for all, on whichever node they are."""
    # Each device has its own backend; a week: others wait while the first process draws, encodes or saves.
    dist.init_process_group(timeout=datetime.timedelta(days=7))
    name, seen = [f".{uuid.uuid4().hex}"], [None] * WORLD
    dist.broadcast_object_list(name)
    mark = os.path.join(folder, *name)
    with rank_zero_first():
        if not RANK:
            write_text(mark, "")
    dist.all_gather_object(seen, os.path.exists(mark))
    if not RANK:
        os.remove(mark)
    if not all(seen):
        dist.destroy_process_group()
        raise ValueError(f"{folder} is not one folder for all processes; on several nodes it must be shared")
    if RANK:
        sys.stdout = open(os.devnull, "w")


def write_atomically(path, write):
    """write(temporary path), then rename: whoever reads `path` finds the old or the new."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_text(path, text):
    """`write_atomically` for a string."""

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    write_atomically(path, write)


def write_json(path, value):
    """`write_atomically` for what JSON can hold."""
    write_text(path, json.dumps(value, indent=1))


def read_json(path):
    """The value in a JSON file.  Raises ValueError, naming the file, if it holds none."""
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not readable: {error}") from error


def write_png(path, image, **text_fields):
    """`write_atomically` for a PIL picture, with text fields of the PNG."""
    info = PngInfo()
    for name, value in text_fields.items():
        info.add_itxt(name, str(value))
    write_atomically(path, functools.partial(image.save, format="PNG", pnginfo=info))


@functools.lru_cache(maxsize=None)
def file_digest(path, size, mtime):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path_or_repo):
    """A short name of a model: of all bytes of a folder's configs, tokenizer and weights; a repository is its
    own name."""
    if not os.path.isdir(path_or_repo):
        return path_or_repo
    kinds = ("config.json", "tokenizer.json", "spiece.model", ".safetensors", ".bin")
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(path_or_repo).rglob("*")):
        if path.name.endswith(kinds):
            content = file_digest(path, path.stat().st_size, path.stat().st_mtime_ns)
            digest.update(f"{path.relative_to(path_or_repo)} {content}".encode())
    return digest.hexdigest()[:16]


def claim(folder, made_with):
    """Note in `folder` what it is made with, or find that it was begun with the same.

    Raises ValueError, naming what differs.
    """
    path, made_with = os.path.join(folder, "made_with.json"), json.loads(json.dumps(made_with))
    with rank_zero_first():
        noted = read_json(path) if os.path.exists(path) else None
        if noted is None:
            write_json(path, made_with)
        elif noted != made_with:
            names = sorted(k for k in noted.keys() | made_with.keys() if noted.get(k) != made_with.get(k))
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

    largest: also what is over 32 MiB. Half the time of a Mamba mixer at 2048 px, for a third more memory.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its highest
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        if largest:
            libc.mallopt(-4, 0)  # M_MMAP_MAX


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
        message = textwrap.shorten(str(error), 400, placeholder=" ...")
        sys.exit(f"{name}: {type(error).__name__}: {message}; --debug shows where")
