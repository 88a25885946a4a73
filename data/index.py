"""What images a data set holds: found once, by all cores, kept in one file, memory-mapped from then on."""

import collections
import concurrent.futures
import contextlib
import functools
import glob
import hashlib
import itertools
import json
import mmap
import multiprocessing
import os
import tarfile
import zlib

import numpy as np
import torch
from PIL import ExifTags, Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from sample import RANK, rank_zero_first, write_atomically

INDEX = ("images", "files", "file_ends", "captions", "caption_ends")  # the tensors of its file
PIECE = 2**18  # bytes of metadata.jsonl that are looked at together; of tar shards one is a piece
RECORD = np.dtype([(name, "i8") for name in ("file", "caption", "offset", "length", "height", "width")])


def in_processes(function, jobs, what):
    """Yields function(*job) of every job, in order, from as many processes as there are cores; a single job
    is done here. They are forked from a process that has only imported this module: no GPU, no threads."""
    progress = functools.partial(tqdm, total=len(jobs), desc=what, disable=RANK > 0)
    if len(jobs) < 2:
        yield from progress(itertools.starmap(function, jobs))
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    workers = min(len(jobs), os.cpu_count(), 32)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from progress(pool.map(function, *zip(*jobs)))


def find_pieces(source):
    """What of a data set can be looked at apart -> [(reader, path, start)].

    source: a folder with metadata.jsonl (Hugging Face's imagefolder: file_name, text), or a glob of
    WebDataset tar shards: an image and a .txt, or a .json with "caption" or "text", of the same key.
    Raises ValueError if there is neither, or both.
    """
    if os.path.isdir(source):
        metadata = os.path.join(source, "metadata.jsonl")
        if not os.path.exists(metadata):
            which = "which names its images (file_name) and captions (text)"
            raise ValueError(f"--data {source} is a folder without metadata.jsonl, {which}")
        if glob.glob(os.path.join(glob.escape(source), "*.tar")):
            which = f"name the shards ('{source}/*.tar') or move them away"
            raise ValueError(f"--data {source} holds both metadata.jsonl and tar shards; {which}")
        return [(read_metadata, metadata, start) for start in range(0, os.path.getsize(metadata), PIECE)]
    shards = sorted(glob.glob(source))
    if not shards:
        which = "neither shapes, nor a folder, nor a pattern that matches tar shards"
        raise ValueError(f"--data {source} is {which}")
    return [(read_shard, shard, 0) for shard in shards]


def read_metadata(path, start):
    """The lines of metadata.jsonl that begin in PIECE bytes -> (file, caption, offset, length, what to open)
    of each image, or why it is skipped."""
    folder = os.path.dirname(path)
    inside = os.path.join(os.path.realpath(folder), "")
    with open(path, "rb") as lines:
        lines.seek(max(0, start - 1))
        if start:
            lines.readline()  # the end of a line that begins in the piece before
        for line in iter(lines.readline, b""):
            if lines.tell() - len(line) >= start + PIECE:
                return
            try:
                record = json.loads(line)
                file, caption = os.path.join(folder, record["file_name"]), record["text"].strip()
                if os.path.realpath(file).startswith(inside):
                    yield file, caption, 0, os.path.getsize(file), file
                else:
                    yield "a file outside the folder"
            except OSError:
                yield "no such file"
            except UnicodeDecodeError:
                yield "text that is not UTF-8"
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                yield "a line without file_name and text"


def key_of(member):
    """WebDataset's: a tar member's folder, and its name up to the first dot."""
    folder, _, name = member.name.rpartition("/")
    return folder, name.split(".")[0]


def read_shard(path, _):
    """The same for a tar file, which stays packed: an image is `length` bytes of it, at `offset`."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            tar = tarfile.open(fileobj=mapped, mode="r:")
            for _, members in itertools.groupby((member for member in tar if member.isfile()), key_of):
                members = [(os.path.splitext(member.name)[1].lower(), member) for member in members]
                parts = dict(members)
                if len(parts) < len(members):
                    yield "a key that occurs twice"
                    continue
                image = next((m for suffix, m in members if suffix in Image.registered_extensions()), None)
                try:
                    if ".txt" in parts:
                        caption = tar.extractfile(parts[".txt"]).read().decode()
                    else:
                        record = json.load(tar.extractfile(parts[".json"]))
                        caption = record.get("caption") or record["text"]
                    yield path, caption.strip(), image.offset_data, image.size, tar.extractfile(image)
                except UnicodeDecodeError:
                    yield "text that is not UTF-8"
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    yield "no image, or no caption beside it"
    except (tarfile.TarError, OSError, ValueError) as error:  # the last: it is mapped, and ends too soon
        yield f"not a whole tar file ({error})"


def list_images(reader, path, start):
    """A piece -> [(file, caption, offset, length, height, width)], none decoded, and {why skipped: count}."""
    found, skipped = [], collections.Counter()
    for record in reader(path, start):
        if isinstance(record, str):
            skipped[record] += 1
            continue
        file, caption, *where, opened = record
        if not caption:
            skipped["an empty caption"] += 1
            continue
        try:
            with Image.open(opened) as image:
                # not a PNG's own getexif, which decodes it
                turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) > 4
                height, width = image.size if turned else image.size[::-1]
        except Exception as error:  # decoders raise anything
            skipped[f"not readable as an image ({type(error).__name__})"] += 1
            continue
        caption = caption.encode(errors="replace").decode()  # half of an emoji is no text
        found.append((file, caption, *where, height, width))
    return found, skipped


@contextlib.contextmanager
def reading(path):
    """A safetensors file that was written here.  Raises ValueError, naming it, if anything is wrong."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except Exception as error:  # SafetensorError, KeyError of a tensor, TypeError of what is no metadata
        raise ValueError(f"{path} is damaged ({error}); remove it, and it is made again") from error


def own_tensor(file, name, dtype, *shape):
    """A tensor of it, memory-mapped, of this type and shape (None: of any length)."""
    tensor = file.get_tensor(name)
    fits = tensor.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape))
    if tensor.dtype != dtype or not fits:
        raise ValueError(f"{name} is {tensor.dtype} of shape {list(tensor.shape)}")
    return tensor


def packed(strings):
    """Strings -> their bytes, in one tensor, and where each begins and ends."""
    encoded = [string.encode(errors="surrogateescape") for string in strings]
    ends = np.cumsum([0, *map(len, encoded)])
    return torch.frombuffer(bytearray(b"".join(encoded) + b"\0"), dtype=torch.uint8), torch.from_numpy(ends)


class Strings(collections.abc.Sequence):
    """Those strings again, each made when it is asked for; `numbers` says which they are, in which order."""

    def __init__(self, text, ends, numbers):
        self.text, self.ends, self.numbers = text, ends, numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, k):
        n = self.numbers[k]
        return self.text[self.ends[n] : self.ends[n + 1]].tobytes().decode(errors="surrogateescape")


def write_index(path, pieces, what):
    """All usable images of a data set, into one safetensors file; a file or caption that many share is in
    it once, caption 0 is the empty one."""
    files, captions, images, skipped = {}, {"": 0}, [np.empty(0, RECORD)], collections.Counter()
    for found, reasons in in_processes(list_images, pieces, what):
        rows = [
            (files.setdefault(file, len(files)), captions.setdefault(caption, len(captions)), *numbers)
            for file, caption, *numbers in found
        ]
        images.append(np.array(rows, RECORD))
        skipped.update(reasons)
    tensors = dict(images=torch.from_numpy(np.concatenate(images).view("i8")))
    tensors["files"], tensors["file_ends"] = packed(files)
    tensors["captions"], tensors["caption_ends"] = packed(captions)
    about = dict(skipped=json.dumps(skipped))
    about["check_sum"] = check_sum(about["skipped"], [tensors[name].numpy() for name in INDEX])
    write_atomically(path, functools.partial(save_file, tensors, metadata=about))


def check_sum(skipped, arrays):
    """Of what an index holds; a second for some ten million images."""
    total = zlib.crc32(skipped.encode())
    for array in arrays:
        total = zlib.crc32(array, total)
    return str(total)


def load_index(source, folder):
    """The index of a data set, made by the first process unless `folder` has it: of shards or metadata.jsonl
    of these names, sizes and dates -> images (n,) of RECORD, file names, captions, {why skipped: count}."""
    pieces = find_pieces(source)
    stamp = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for _, path, _ in pieces]
    path = os.path.join(folder, f"index-{hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]}.safetensors")
    with rank_zero_first():
        if not os.path.exists(path):
            write_index(path, pieces, f"looking at the images of {source}")
    with reading(path) as index:
        skipped, arrays = index.metadata()["skipped"], [index.get_tensor(name).numpy() for name in INDEX]
        if index.metadata()["check_sum"] != check_sum(skipped, arrays):
            raise ValueError("its check sum is another")
        images, *strings = arrays
        strings = (Strings(text, ends, range(len(ends) - 1)) for text, ends in (strings[:2], strings[2:]))
        return images.view(RECORD), *strings, collections.Counter(json.loads(skipped))
