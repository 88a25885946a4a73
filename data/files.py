"""Files, seeds and processes, for every command here.

Files are written whole or not at all, and a folder with results is never mixed with other settings.
Every random draw is a function of its place: seed, stage, step and index in the batch.
"""

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
import sys
import tempfile
import textwrap

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

# A cluster's launcher may set RANK and WORLD_SIZE too; they count only where torchrun started the process.
UNDER_TORCHRUN = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if UNDER_TORCHRUN else 0
WORLD = int(os.environ["WORLD_SIZE"]) if UNDER_TORCHRUN else 1

# -- seeds ---------------------------------------------------------------------------------------------------


def generator(seed, stage, step, index):
    """Return the torch.Generator of one sample.

    It depends neither on restarts nor on how processes share a batch.
    """
    digest = hashlib.sha256(f"{seed}/{stage}/{step}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def noise_for(seed, channels, h, w, level=0):
    """Return the noise of one image, (1, channels, h, w), drawn on the CPU from its seed.

    level: which size it is, where one picture is made at several; each has its own noise.
    """
    if level:
        of_image = generator(seed, "noise", level, 0)
    else:
        of_image = torch.Generator().manual_seed(seed)
    return torch.randn(1, channels, h, w, generator=of_image)


# -- processes -----------------------------------------------------------------------------------------------

COLLECTIVE = datetime.timedelta(minutes=30)  # a process that is silent for so long in a step is lost
FILES = datetime.timedelta(days=7)  # the first process may draw, encode or index for days
waiting_group = None  # the processes that wait for files; None: the default group


def start_processes():
    """Join the other processes that torchrun started. Only the first one prints."""
    global waiting_group
    dist.init_process_group(timeout=COLLECTIVE)  # each device has its own backend
    waiting_group = dist.new_group(backend="gloo", timeout=FILES)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def wait_for_all():
    """Wait, for days if need be, until every process has come here."""
    if WORLD > 1:
        dist.barrier(group=waiting_group)


@contextlib.contextmanager
def rank_zero_first():
    """Run the block in the first process, then in the others, which find its files on disk."""
    if RANK > 0:
        wait_for_all()
    yield
    if RANK == 0:
        wait_for_all()


# -- reading and writing -------------------------------------------------------------------------------------


def make_folder(folder):
    """Make a folder, and those above it, if absent.  Raises ValueError if a file is in the way."""
    try:
        os.makedirs(folder, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} is, or lies below, a file; give a folder, or a new name") from error


def flush(path):
    """Make a file, or a folder's list of files, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(written, path):
    """Rename a written file to `path`; after a power cut that is the old file or the whole new one."""
    flush(written)  # else the rename may survive, and the bytes not
    os.replace(written, path)
    with contextlib.suppress(OSError):  # some network drives refuse it for a folder
        flush(os.path.dirname(os.path.abspath(path)))


def write_atomically(path, write):
    """Call write(temporary path), then rename: a reader of `path` finds the old file or the whole new one."""
    folder, name = os.path.split(os.path.abspath(path))
    make_folder(folder)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as temporary:
        written = os.path.join(temporary, name)
        write(written)
        replace(written, path)


def write_text(path, text):
    """Write a string by `write_atomically`."""
    write_atomically(path, lambda temporary: pathlib.Path(temporary).write_text(text, encoding="utf-8"))


def write_json(path, value):
    """Write what JSON can hold by `write_atomically`."""
    write_text(path, json.dumps(value, indent=1))


def read_json(path):
    """Return the value in a JSON file.  Raises ValueError, naming the file, if it is not JSON."""
    try:
        return json.loads(pathlib.Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable: {error}") from error


def write_png(path, image, **text_fields):
    """Write a PIL picture by `write_atomically`, with text fields of the PNG."""
    info = PngInfo()
    for name, value in text_fields.items():
        info.add_itxt(name, str(value))
    write_atomically(path, lambda temporary: image.save(temporary, "PNG", pnginfo=info))


# What of a pipeline's folder belongs to a part of it; None: to all of it.
SUBFOLDERS = {"vae": ("vae",), "text_encoder": ("text_encoder", "tokenizer"), None: (".",)}


def fingerprint(path_or_repo, part=None):
    """Return a short name of a model: a repository's own, or a hash of a folder's files.

    Every byte of configs, tokenizer and weights counts; logs and pictures do not.
    part: "vae" or "text_encoder": of a pipeline's folder only this counts. What has no subfolder there is the
    folder itself, as in `t2md.load_part`.
    """
    if not os.path.isdir(path_or_repo):
        return path_or_repo
    root = pathlib.Path(path_or_repo)
    folders = {root / name if (root / name).is_dir() else root for name in SUBFOLDERS[part]}
    endings = ("config.json", "tokenizer.json", "spiece.model", ".safetensors", ".bin")
    digest = hashlib.sha256()
    for folder in sorted(folders):
        for path in sorted(folder.rglob("*")):
            if path.name.endswith(endings):
                found = path.stat()
                content = hash_of_file(path, found.st_size, found.st_mtime_ns)
                digest.update(f"{path.relative_to(folder)} {content}".encode())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=None)  # a stage asks several times, and T5-XXL has 19 GB
def hash_of_file(path, size, date):
    """Return the SHA-256 of a file's bytes; it is read again if size or date have changed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- what a folder was made with -----------------------------------------------------------------------------


def check_made_with(folder, made_with):
    """Raise ValueError, naming what differs, if `folder` was made with other things.

    made_with: a dict of what a result depends on. A folder without made_with.json is free.
    """
    path = os.path.join(folder, "made_with.json")
    if not os.path.exists(path):
        return
    noted = read_json(path)
    given = json.loads(json.dumps(made_with))  # tuples become lists, as in the file
    differences = []
    for name in sorted(noted.keys() | given.keys()):
        if noted.get(name) != given.get(name):
            differences.append(f"{name} {noted.get(name)}, not {given.get(name)}")
    if differences:
        differ = ", ".join(differences)
        raise ValueError(f"{folder} was made with {differ}; give the same again, or another folder")


def note_made_with(folder, made_with):
    """Check as `check_made_with`, then write made_with.json if it is absent.

    Call it when the folder is about to hold something that other settings would spoil.
    """
    path = os.path.join(folder, "made_with.json")
    with rank_zero_first():
        check_made_with(folder, made_with)
        if not os.path.exists(path):
            write_json(path, made_with)


@contextlib.contextmanager
def lock(folder):
    """Run the block in one run at a time.  Raises ValueError if another run is in it."""
    make_folder(folder)
    with open(os.path.join(folder, ".lock"), "a") as file:
        if RANK == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{folder} is in use by another run; wait, or give another") from error
            except OSError:
                pass  # some network drives have no locks
        yield


# -- pictures and names --------------------------------------------------------------------------------------


def slug(text):
    """Turn "+ teacher forcing: T2MD" into "teacher-forcing-t2md", for the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def contact_sheet(rows, side, captions=None):
    """Paste rows of PIL pictures into one, each fitted into a square of `side` pixels.

    captions: rows of strings like `rows`; each is written below its picture, in three lines at most.
    """
    below = 48 if captions else 0  # pixels for three lines of text
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (side * columns, (side + below) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        y = i * (side + below)
        for j, picture in enumerate(row):
            x = j * side
            sheet.paste(ImageOps.contain(picture, (side, side), Image.BOX), (x, y))
            if captions:
                lines = textwrap.wrap(captions[i][j], side // 6)
                draw.text((x + 2, y + side), "\n".join(lines[:3]), fill="black")
    return sheet


# -- commands ------------------------------------------------------------------------------------------------


def keep_freed_memory(largest=False):
    """Tell glibc to keep the memory that tensors free: giving it back costs page faults.

    What is kept falls into pieces, 5 GiB of them at full size. Where that is too much, set glibc's own
    MALLOC_MMAP_THRESHOLD_: then this does nothing.
    largest: also blocks over 32 MiB, which is quicker at 2048 px and takes more memory.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with contextlib.suppress(AttributeError):  # another C library has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its highest
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-8, 1)  # M_ARENA_MAX: a thread's own arena would give large blocks back
        if largest:
            mallopt(-4, 0)  # M_MMAP_MAX


def as_command(name, run, args, stopped="stopped"):
    """Call run(args) as a command: an exception becomes one sentence and exit code 1, so does Ctrl-C.

    stopped: what Ctrl-C says.  args.debug: show the whole traceback instead.
    """
    several = os.environ.get("WORLD_SIZE", "1") != "1" or os.environ.get("RANK", "0") != "0"
    if several and not UNDER_TORCHRUN:
        why = "RANK and WORLD_SIZE are set, but not by torchrun"
        print(f"{name}: {why}: this is a single process; start several by torchrun", file=sys.stderr)
    keep_freed_memory()
    try:
        return run(args)
    except KeyboardInterrupt:
        sys.exit(f"{name}: {stopped}")
    except Exception as error:
        if args.debug:
            raise
        sys.exit(f"{name}: {type(error).__name__}: {textwrap.shorten(str(error), 400)}; --debug shows where")
