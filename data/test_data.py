"""What must hold of the data: the shapes world, its detector, any captioned images, their index and cache."""

import gc
import hashlib
import io
import itertools
import json
import os
import struct
import tarfile
import weakref
import zlib

import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor
from PIL import Image

import t2md
import train
from data import images, index, parts, shapes
from data.images import ImageData
from sample import draw
from t2md import T2MD, VAE, TextEncoder
from test_t2md import TINY, call, chain  # noqa: F401 (chain is a fixture)

# -- the shapes world ----------------------------------------------------------------------------------------


def test_captions_follow_genevals_grammar():
    rng = np.random.default_rng(0)
    prompts = {tag: {shapes.make_record(tag, rng)["prompt"] for _ in range(4000)} for tag in shapes.TAGS}
    assert prompts["single_object"] == {f"a photo of a {s}" for s in shapes.SHAPES}
    assert {"a photo of three crosses", "a photo of two circles"} < prompts["counting"]
    assert len(prompts["counting"]) == 12
    assert "a photo of a star and a square" in prompts["two_object"]
    assert "a photo of a red circle" in prompts["colors"]
    assert "a photo of a circle left of a star" in prompts["position"] and len(prompts["position"]) == 48
    assert "a photo of a red circle and a blue square" in prompts["color_attr"]
    assert len(prompts["color_attr"]) == 360
    records = (shapes.make_record("position", rng) for _ in range(1000))
    record = next(r for r in records if r["prompt"] == "a photo of a circle left of a star")
    circle = {"class": "circle", "count": 1, "position": ["left of", 0]}
    assert record["include"] == [{"class": "star", "count": 1}, circle]
    with pytest.raises(ValueError, match="unknown tag"):
        shapes.make_record("colour", rng)


def contradicts(a, b):
    """Is every picture of record b wrong for record a? (Different objects, or the opposite position.)"""
    objects = [sorted((o["class"], o["count"]) for o in r["include"]) for r in (a, b)]
    if objects[0] != objects[1]:
        return True
    mine, theirs = ({o["class"]: o.get("color") for o in r["include"]} for r in (a, b))
    if any(mine[c] and theirs[c] and mine[c] != theirs[c] for c in mine):
        return True
    if a["tag"] == b["tag"] == "position":
        seconds = a["include"][1], b["include"][1]
        (subject, where), (other, there) = ((o["class"], o["position"][0]) for o in seconds)
        return there == (parts.OPPOSITE[where] if subject == other else where)
    return False


@pytest.mark.parametrize("tag", shapes.TAGS)
@pytest.mark.parametrize("size", [128, (256, 192)])
def test_the_detector_is_right_on_ground_truth(tag, size, monkeypatch):
    rng = np.random.default_rng(1)
    records = [shapes.make_record(tag, rng) for _ in range(60)]
    pictures = [shapes.draw_shapes(record, size, rng) for record in records]
    assert pictures[0].size == (size if isinstance(size, tuple) else (size, size))
    seen = {id(picture): shapes.detect_shapes(picture) for picture in pictures}  # once is enough
    monkeypatch.setattr(shapes, "detect_shapes", lambda picture: seen[id(picture)])
    assert np.mean([shapes.score_shapes(p, r) for p, r in zip(pictures, records)]) >= 0.99
    others = zip(pictures, records, records[1:] + records[:1])
    pairs = [(picture, other) for picture, record, other in others if contradicts(other, record)]
    assert len(pairs) > 20
    assert np.mean([not shapes.score_shapes(p, r) for p, r in pairs]) >= 0.99


def test_the_detector_is_strict():
    circle = {"class": "circle", "count": 1}
    record = {"tag": "single_object", "include": [circle], "prompt": "a photo of a circle"}
    picture = shapes.draw_shapes(record, 128, np.random.default_rng(0))
    assert shapes.score_shapes(picture, record)
    pixels = np.asarray(picture, float)
    blurred = picture.resize((12, 12), Image.BOX).resize((128, 128), Image.BICUBIC)
    noise = np.random.default_rng(0).normal(0, 60, (128, 128, 3))
    noisy = Image.fromarray(np.uint8(np.clip(pixels + noise, 0, 255)))
    extra = picture.copy()
    extra.paste((220, 50, 47), (2, 2, 10, 10))
    grey = Image.fromarray(np.uint8(pixels * 0.7))
    for wrong in (blurred, noisy, extra, grey, Image.new("RGB", (128, 128), shapes.BACKGROUND)):
        assert not shapes.score_shapes(wrong, record)


def test_pictures_come_from_their_seed_and_scale():
    objects = [{"class": "star", "count": 1}, {"class": "cross", "count": 1}]
    record = {"tag": "two_object", "include": objects, "prompt": ""}
    sizes = 128, 128, 512
    small, again, large = (shapes.draw_shapes(record, size, np.random.default_rng(5)) for size in sizes)
    assert small.tobytes() == again.tobytes()
    assert np.abs(np.asarray(large.reduce(4), float) - np.asarray(small, float)).mean() < 2


def test_heldout_captions_are_never_trained_on():
    records = shapes.heldout_records(552, 0)
    held = {r["prompt"] for r in records if r["tag"] in ("two_object", "position", "color_attr")}
    rng = np.random.default_rng(0)
    trained = {shapes.training_record(rng)["prompt"] for _ in range(5000)}
    assert len(held) > 40 and not held & trained
    tags = [r["tag"] for r in records]
    assert all(tags.count(tag) == 92 for tag in shapes.TAGS)


def test_every_word_of_the_world_is_a_token():
    tokenizer, rng = parts.new_tokenizer(), np.random.default_rng(0)
    for tag in shapes.TAGS * 20:
        prompt = shapes.make_record(tag, rng)["prompt"]
        assert len(tokenizer(prompt).input_ids) == len(prompt.split()) + 1
        assert tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True) == prompt
    assert tokenizer("zebra, 7?").input_ids.count(tokenizer.unk_token_id) == 0
    assert parts.word_labels("a photo of a red circle and a blue square")[4:6] == [[0, 1, 1, 0]] * 2
    places = [word[3] for word in parts.word_labels("a photo of a star above a cross")]
    assert places == [-100, -100, -100, -100, 3, -100, -100, 4]


def here(function, jobs, what):
    return itertools.starmap(function, jobs)


def test_the_world_is_an_ordinary_data_set(tmp_path, monkeypatch):
    made = []
    for name in ("one", "two"):
        source = shapes.write_shards(str(tmp_path / name), 64, 1100, 0)
        made.append([(tmp_path / name / f"0000{k}.tar").read_bytes() for k in range(2)])
        # the first by several processes, the second and what follows by this one
        monkeypatch.setattr(shapes, "in_processes", here)
        monkeypatch.setattr(index, "in_processes", here)
    assert made[0] == made[1] and not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr(shapes, "write_shard", None)
    assert shapes.write_shards(str(tmp_path / "two"), 64, 1100, 0) == source  # once is enough
    with pytest.raises(ValueError, match="two was made with .*'seed': 0"):
        shapes.write_shards(str(tmp_path / "two"), 64, 1100, 1)
    data = ImageData(source, 64, None, None, 0, str(tmp_path / "index"))
    assert len(data.items) == 1100 and list(data.buckets) == [(64, 64)] and not data.skipped
    for k in (0, 999, 1099):
        rng = np.random.default_rng([0, 64, k])
        record = shapes.training_record(rng)
        assert data.prompts[k] == record["prompt"]
        number, picture = data.picture(k)
        assert number == k and picture.tobytes() == shapes.draw_shapes(record, 64, rng).tobytes()
    with tarfile.open(tmp_path / "two" / "00001.tar") as tar:
        assert json.load(tar.extractfile("00001099.json")) == record


# -- any captioned images ------------------------------------------------------------------------------------


def write_images(folder):
    """A small imagefolder with every kind of trouble; the usable ones are red at the left edge, upright."""
    pixels = np.full((60, 90, 3), 255, np.uint8)
    pixels[:, :30] = (200, 30, 30)
    image = Image.fromarray(pixels)
    rotated, grey16 = Image.Exif(), np.full((60, 90), 60000, np.uint16)
    rotated[274] = 6  # turn a quarter clockwise to see it upright
    grey16[:, :30] = 10000
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(np.uint8(np.arange(90) < 45)[None].repeat(60, 0) * 255))
    os.makedirs(folder / "images")
    saved = {
        "plain.png": image,
        "palette.png": image.quantize(8),
        "clear.png": clear,
        "grey.jpg": image.convert("L"),
        "cmyk.jpg": image.convert("CMYK"),
        "sixteen.png": Image.fromarray(grey16),
        "tall.png": image.rotate(-90, expand=True),
    }
    for name, picture in saved.items():
        picture.save(folder / "images" / name)
    image.rotate(90, expand=True).save(folder / "images" / "turned.jpg", exif=rotated)
    (folder / "images" / "broken.png").write_bytes(b"no image")
    whole = (folder / "images" / "cmyk.jpg").read_bytes()
    (folder / "images" / "half.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    names = (*saved, "turned.jpg", "half.jpg", "broken.png", "absent.png")
    lines = [{"file_name": f"images/{name}", "text": f"this is {name}"} for name in names]
    lines += [{"file_name": "images/plain.png", "text": " "}, {"file_name": "images/plain.png"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\nnot json\n")
    return [*saved, "turned.jpg"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    write_images(tmp_path / "folder")
    return tmp_path / "folder"


def write_tars(folder, names, pictures):
    """The same images as two tar shards, one caption as .json, the others as .txt; a third is cut short."""
    for shard in range(2):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for k, name in list(enumerate(names))[shard::2]:
                key, suffix = os.path.splitext(name)
                caption = f"this is {name}" if k else json.dumps({"caption": f"this is {name}"})
                (folder / "caption").write_text(caption)
                tar.add(folder / "caption", key + (".txt" if k else ".json"))
                tar.add(pictures / name, f"{key}{suffix}")
    whole = (folder / "shard-0.tar").read_bytes()
    (folder / "shard-2.tar").write_bytes(whole[:700])


@pytest.mark.parametrize("piece", [2**18, 100])
def test_images_come_out_right_from_folders_and_shards(tmp_path, folder, monkeypatch, piece):
    monkeypatch.setattr(index, "PIECE", piece)  # small ones have lines that run across them
    monkeypatch.setattr(index, "in_processes", here)
    good = [name for name in os.listdir(folder / "images") if name not in ("broken.png", "half.jpg")]
    write_tars(tmp_path, good, folder / "images")
    given = 128, None, None, 0, str(tmp_path / "index")
    of_folder, of_shards = (ImageData(str(source), *given) for source in (folder, tmp_path / "shard-*.tar"))
    assert of_folder.skipped == {
        "no such file": 1,
        "an empty caption": 1,
        "a line without file_name and text": 2,
        "not readable as an image (UnidentifiedImageError)": 1,
    }
    assert sorted(of_folder.prompts) == sorted(f"this is {name}" for name in (*good, "half.jpg"))
    assert sum(of_shards.skipped.values()) == 1 and "not a whole tar file" in next(iter(of_shards.skipped))
    assert sorted(of_shards.prompts) == sorted(f"this is {name}" for name in good)
    for data in (of_folder, of_shards):
        for k, prompt in enumerate(data.prompts):
            if "half" not in prompt:
                check_picture(prompt, np.asarray(data.picture(k)[1], float), data.items[k])
    half = list(of_folder.prompts).index("this is half.jpg")
    number, _ = of_folder.picture(half)
    assert number != half and of_folder.items["height"][number] == of_folder.items["height"][half]
    assert any("not decodable" in reason for reason in of_folder.skipped)


def check_picture(prompt, picture, item):
    height, width = item["height"], item["width"]
    assert picture.shape == (height, width, 3) and (height > width) == ("tall" in prompt)
    left = picture[:3, width // 2] if "tall" in prompt else picture[height // 2, :3]
    right = picture[-3:, -3:]
    if "sixteen" in prompt:
        assert np.allclose(left, 10000 // 257, atol=2) and np.allclose(right, 60000 // 257, atol=2)
    elif "grey" in prompt:
        assert np.allclose(left, left[0, 0]) and left.max() < 100 and right.min() > 250
    else:
        assert np.allclose(left, (200, 30, 30), atol=25) and right.min() > 250, prompt


@pytest.mark.parametrize("pixels", [128, 256, 512, 1024, 2048])
def test_buckets_are_diffusers(pixels):
    heights, widths = np.random.default_rng(0).integers(20, 5000, (2, 1000))
    table, classify = images.aspect_ratios(pixels), PixArtImageProcessor.classify_height_width_bin
    expected = [classify(int(h), int(w), table) for h, w in zip(heights, widths)]
    assert list(map(tuple, images.nearest_buckets(heights, widths, pixels).tolist())) == expected


def png_of(width, height):
    """A valid PNG of one white pixel whose header claims width x height."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1), 255).save(buffer, "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + buffer.getvalue()[24:29]
    return buffer.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + buffer.getvalue()[33:]


def write_tar(path, *members, outside):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("link.txt"))


def test_bad_images_and_captions_are_skipped_and_counted(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside.png"
    folder.mkdir()
    for name in (outside, folder / "good.png"):
        Image.new("RGB", (128, 128), "red").save(name)
    (folder / "point.png").write_bytes(png_of(1, 1))
    (folder / "giant.png").write_bytes(png_of(30_000, 30_000))
    (folder / "leads-out.png").symlink_to(outside)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    names = "good.png point.png giant.png ../outside.png leads-out.png loop.png".split() + [str(outside)]
    lines = [json.dumps({"file_name": name, "text": "a star"}).encode() for name in names]
    lines.append('{"file_name": "good.png", "text": "\u00e9toile"}'.encode("latin-1"))
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))

    def load(source, pixels=128):
        return ImageData(str(source), pixels, None, None, 0, str(tmp_path / "index"))

    data = load(folder)
    assert [data.files[item["file"]] for item in data.items] == [str(folder / "good.png")]
    assert data.skipped == {
        "too small to be enlarged to about 128 pixels": 1,
        "not readable as an image (DecompressionBombError)": 1,
        "a file outside the folder": 3,
        "no such file": 1,
        "text that is not UTF-8": 1,
    }
    with pytest.raises(ValueError, match="no usable image.*too small"):
        load(folder, 1024)

    good = (folder / "good.png").read_bytes()
    before = sorted(tmp_path.rglob("*"))
    climbing = (("../../climbing.png", good), ("../../climbing.txt", b"read where it lies"))
    french = (("latin.png", good), ("latin.txt", "\u00e9toile".encode("latin-1")))
    emoji = (("half.png", good), ("half.json", b'{"text": "half \\ud83d"}'))
    lone = ("alone.png", good), ("words.txt", b"a star")
    write_tar(tmp_path / "one.tar", *climbing, *lone, *french, outside=outside)
    twice = (("a.png", good), ("a.txt", b"first"), ("a.png", good), ("a.txt", b"second"))
    write_tar(tmp_path / "two.tar", *twice, ("b.png", good), ("b.txt", b"a circle"), *emoji, outside=outside)
    data = load(tmp_path / "*.tar")
    assert list(data.prompts) == ["read where it lies", "a circle", "half ?"]
    assert set(data.files) == {str(tmp_path / "one.tar"), str(tmp_path / "two.tar")}
    assert data.skipped == {
        "no image, or no caption beside it": 4,
        "text that is not UTF-8": 1,
        "a key that occurs twice": 1,
    }
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".png", ".txt") and p not in before]
    (tmp_path / "one.tar").rename(folder / "one.tar")
    with pytest.raises(ValueError, match="both metadata.jsonl and tar shards"):
        load(folder)


def test_every_image_comes_once_in_an_epoch_whoever_takes_it(tmp_path, folder):
    data = ImageData(str(folder), 128, None, None, 0, str(tmp_path / "index"))
    per_epoch = sum(-(-len(members) // 2) for members in data.buckets.values())
    epochs = [[data.choose(e * per_epoch + turn, (0, 1), 2) for turn in range(per_epoch)] for e in range(2)]
    for epoch in epochs:
        assert {k for batch in epoch for k in batch} == set(range(len(data.items)))
        assert sum(map(len, epoch)) <= len(data.items) + len(data.buckets)
        assert all(len(np.unique(data.items[["height", "width"]][batch])) == 1 for batch in epoch)
    assert epochs[0] != epochs[1]
    shared = [data.choose(turn, (0,), 2) + data.choose(turn, (1,), 2) for turn in range(per_epoch)]
    assert shared == epochs[0]


# -- the index and the cache ---------------------------------------------------------------------------------


def hashes(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_the_index_is_made_once_and_again_when_the_data_set_has_changed(tmp_path, folder, monkeypatch):
    def load():
        return ImageData(str(folder), 128, None, None, 0, str(tmp_path / "index"))

    before, list_images = load(), index.list_images
    monkeypatch.setattr(index, "list_images", None)
    again = load()
    assert list(again.prompts) == list(before.prompts) and again.skipped == before.skipped
    assert np.array_equal(again.items, before.items)
    monkeypatch.setattr(index, "list_images", list_images)
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "images/plain.png", "text": "one more"}\n')
    assert list(load().prompts) == [*before.prompts, "one more"]


@pytest.fixture
def components():
    """VAE and text encoder of the shapes world, untrained."""

    def load(root):
        torch.manual_seed(0)
        tokenizer = parts.new_tokenizer()
        parts.new_vae().save_pretrained(root / "vae")
        parts.new_text_encoder(len(tokenizer)).save_pretrained(root / "text_encoder")
        tokenizer.save_pretrained(root / "text_encoder")
        return VAE(str(root / "vae")), TextEncoder(str(root / "text_encoder"))

    return load


def test_batches_with_and_without_a_cache_are_the_same(tmp_path, folder, components, monkeypatch):
    monkeypatch.setattr(images, "SHARD", 3)
    (folder / "images" / "half.jpg").unlink()  # broken, it would leave the epochs of the cached run
    vae, text_encoder = components(tmp_path)
    given = (str(folder), 128, vae, text_encoder, 0, str(tmp_path / "index"))
    cached, uncached = ImageData(*given, str(tmp_path / "features")), ImageData(*given)
    assert cached.vae is cached.text_encoder is None

    def generators(turn):
        return [draw(0, "kd", turn, i) for i in range(2)]

    for turn in range(6):
        with torch.autocast("cpu", torch.bfloat16):  # the frozen parts run outside it
            a, b = (data.batch(turn, (0, 1), 2, generators(turn)) for data in (cached, uncached))
        for name in ("noise", "t", "mask"):
            assert torch.equal(a[name], b[name]), name
        inside = b["mask"].bool()
        for one, other in ((a["z0"], b["z0"]), (a["text"][inside], b["text"][inside])):
            assert one.dtype == other.dtype == torch.float32
            assert torch.allclose(one, other, rtol=2e-3, atol=2e-3)


def test_the_cache_is_a_few_files_and_goes_on_where_it_was_cut_off(tmp_path, folder, components, monkeypatch):
    monkeypatch.setattr(images, "SHARD", 3)
    vae, text_encoder = components(tmp_path)
    features = tmp_path / "features"

    def load(source=folder):
        return ImageData(str(source), 128, vae, text_encoder, 0, str(tmp_path / "index"), str(features))

    data = load()
    assert data.skipped["not decodable"] == 1 and sum(map(len, data.buckets.values())) == 8
    made = hashes(features)
    # 10 captions with the broken image's and the empty one; 8 images of one bucket, 1 of another; a note
    assert len(made) == 4 + (3 + 1) + 1
    gone = sorted(path for path in made if path.suffix == ".safetensors")[::2]
    for path in gone:
        path.unlink()
    load()
    assert hashes(features) == made
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "images/tall.png", "text": "one more"}\n')
    load()  # of a data set that has grown only the last shards are new
    assert made.items() <= hashes(features).items() and len(hashes(features)) == len(made) + 2
    vae.source = text_encoder.source
    with pytest.raises(ValueError, match="features was made with vae"):
        load()


def test_training_on_a_folder_and_looking_at_it(chain, tmp_path, folder):  # noqa: F811
    looked = call("train.py", "--stage", "data", "--data", str(folder), "--out", str(tmp_path / "out"))
    assert looked.returncode == 0, looked.stderr
    assert "9 images in 2 buckets" in looked.stdout and "6 skipped" in looked.stdout
    assert Image.open(tmp_path / "out" / "data.png").size[0] == 6 * 192
    common = f"--data {folder} --teacher {chain}/teacher --batch-size 2 --examples 0".split()
    common += ["--out", str(tmp_path / "out")]
    result = call("train.py", "--stage", "forcing", "--steps", "3", *common)
    assert result.returncode == 0 and "no such file" in result.stdout, result.stderr
    assert len(open(tmp_path / "out" / "forcing" / "log.jsonl").readlines()) == 3
    cached = [*common, "--cache", str(tmp_path / "features")]
    result = call("train.py", "--stage", "kd", "--steps", "2", *cached)
    assert result.returncode == 0 and "1 x not decodable" in result.stdout, result.stderr
    made = hashes(tmp_path / "features")
    assert len(made) == 1 + 2 + 1  # captions, images of two buckets, made_with.json
    result = call("train.py", "--stage", "kd", "--steps", "3", *cached)
    assert result.returncode == 0 and made == hashes(tmp_path / "features"), result.stderr
    for name in ("vae", "text_encoder"):
        other = f"--{name.replace('_', '-')} {chain}/{name}_adapt --out {tmp_path / name}".split()
        result = call("train.py", "--stage", "forcing", *cached, *other)
        assert result.returncode == 1 and f"features was made with {name}" in result.stderr, result.stderr


@pytest.mark.parametrize("source, why", [
    ("empty", "no usable image"),
    ("nothing", "neither shapes, nor a folder"),
    (".", "without metadata.jsonl"),
])  # fmt: skip
def test_data_that_is_none_is_refused(chain, tmp_path, source, why):  # noqa: F811
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metadata.jsonl").write_text('{"file_name": "absent.png", "text": "a"}\n')
    flags = f"--stage forcing --data {tmp_path / source} --out {tmp_path}/no --teacher {chain}/teacher"
    result = call("train.py", *flags.split())
    assert result.returncode == 1 and why in result.stderr and "Traceback" not in result.stderr


def test_with_a_cache_the_text_encoder_is_gone_before_training(chain, tmp_path, folder, monkeypatch):  # noqa: F811
    encoders, gone, networks = [], [], train.networks

    def load(*arguments):
        loaded = networks(*arguments)
        encoders.append(weakref.ref(loaded[-1].model))
        return loaded

    def fit(*_, **__):
        gc.collect()
        gone.append(encoders[0]() is None)

    monkeypatch.setattr(train, "networks", load)
    monkeypatch.setattr(train, "fit", fit)
    common = f"--data {folder} --teacher {chain}/teacher --out {tmp_path / 'out'}".split()
    for cache in ([], ["--cache", str(tmp_path / "features")]):
        train.run(train.parse_arguments(["--stage", "forcing", *common, *cache]))
        encoders.clear()
    assert gone == [False, True]


def test_hires_in_every_shape(chain, tmp_path, monkeypatch):  # noqa: F811
    """From a model of 128 px, hires1 at 256 x 256 and 336 x 192, hires2 at 512 x 512 and 672 x 384; in
    bfloat16, with self-attention in float32."""
    (tmp_path / "folder").mkdir()
    sizes = dict(wide=(675, 385), square=(525, 525))
    for name, size in sizes.items():
        Image.new("RGB", size, "skyblue").save(tmp_path / "folder" / f"{name}.png")
    lines = [json.dumps(dict(file_name=f"{name}.png", text=name)) for name in sizes]
    (tmp_path / "folder" / "metadata.jsonl").write_text("\n".join(lines))
    of_chain = {name: os.path.join(chain, name) for name in ("vae", "text_encoder")}
    torch.manual_seed(0)
    shape = TINY | dict(caption_width=64)
    model = T2MD(pattern="SHW", beta_schedule="scaled_linear", **shape, **of_chain)
    seen, types, original_predict_noise, original_attention = [], set(), t2md.predict_noise, t2md.attention

    def predict_noise(model, z_t, *rest, **more):
        seen.append(tuple(z_t.shape[-2:]))
        return original_predict_noise(model, z_t, *rest, **more)

    def attention(q, k, v, *rest):
        types.add((q.shape == k.shape, q.dtype))
        return original_attention(q, k, v, *rest)

    monkeypatch.setattr(t2md, "predict_noise", predict_noise)
    monkeypatch.setattr(t2md, "attention", attention)
    common = f"--config t2md --data {tmp_path / 'folder'} --out {tmp_path / 'out'} --examples 0".split()
    common += "--steps 2 --batch-size 4 --dtype bfloat16".split()
    model.save_pretrained(tmp_path / "out" / "adapt")
    torch.save(dict(step=1, steps=1), tmp_path / "out" / "adapt" / "training_state.pt")
    for stage, latents in dict(hires1=[(24, 42), (32, 32)], hires2=[(48, 84), (64, 64)]).items():
        seen.clear()
        train.run(train.parse_arguments(["--stage", stage, *common]))
        assert sorted(seen) == latents and types == {(True, torch.float32), (False, torch.bfloat16)}
        log = [json.loads(line) for line in open(tmp_path / "out" / stage / "log.jsonl")]
        assert all(np.isfinite(line["mse"]) and not line["skipped"] for line in log)
