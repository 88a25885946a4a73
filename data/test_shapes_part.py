"""What must hold of the shapes world: its captions, pictures, detector, data set, VAE and text encoder."""

import itertools
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from data import parts, shapes
from data.images import to_pixels
from t2md import VAE, TextEncoder


def test_captions_follow_genevals_grammar():
    rng = np.random.default_rng(0)
    prompts = {tag: {shapes.make_record(tag, rng)["prompt"] for _ in range(4000)} for tag in shapes.TAGS}
    assert {"a photo of three crosses", "a photo of a star and a cross"} < set.union(*prompts.values())
    assert [len(prompts[tag]) for tag in shapes.TAGS] == [4, 12, 12, 24, 48, 360]
    first, second = (record := shapes.make_record("position", rng))["include"]
    assert record["prompt"] == "a photo of a {class} {position[0]} a ".format(**second) + first["class"]


def contradictions(record):
    """Records that no picture of this one shows: another count, class or colour, or the opposite position."""
    *others, last = record["include"]
    names = shapes.SHAPES, shapes.COLOURS
    shape, colour = (next(x for x in words if x not in record["prompt"]) for words in names)
    opposite = parts.OPPOSITE[last.get("position", ["none"])[0]]
    changes = {"class": shape, "count": last["count"] + 1, "color": colour, "position": [opposite, 0]}
    return [{"include": [*others, last | {key: changes[key]}]} for key in last]


@pytest.mark.parametrize("tag, size", [*zip(shapes.TAGS, itertools.repeat(128)), ("position", (256, 192))])
def test_the_detector_is_right_on_ground_truth(tag, size, monkeypatch):
    rng = np.random.default_rng(1)
    records = [shapes.make_record(tag, rng) for _ in range(50)]
    pictures = [shapes.draw_shapes(record, size, rng) for record in records]
    seen = {id(picture): shapes.detect_shapes(picture) for picture in pictures}  # once is enough
    monkeypatch.setattr(shapes, "detect_shapes", lambda picture: seen[id(picture)])
    assert np.mean([shapes.score_shapes(p, r) for p, r in zip(pictures, records)]) >= 0.99
    wrong = [(picture, w) for picture, record in zip(pictures, records) for w in contradictions(record)]
    assert np.mean([not shapes.score_shapes(picture, w) for picture, w in wrong]) >= 0.99


def test_the_detector_is_strict():
    record = {"include": [{"class": "circle", "count": 1}]}
    picture = shapes.draw_shapes(record, 128, np.random.default_rng(0))
    assert shapes.score_shapes(picture, record)
    pixels, noise = np.asarray(picture, float), np.random.default_rng(0).normal(0, 60, (128, 128, 3))
    blurred = picture.resize((12, 12), Image.BOX).resize((128, 128), Image.BICUBIC)
    noisy, grey = (Image.fromarray(np.uint8(np.clip(p, 0, 255))) for p in (pixels + noise, pixels * 0.7))
    extra = picture.copy()
    extra.paste((220, 50, 47), (2, 2, 10, 10))
    for wrong in (blurred, noisy, extra, grey, Image.new("RGB", (128, 128), shapes.BACKGROUND)):
        assert not shapes.score_shapes(wrong, record)


def test_a_picture_is_the_same_scene_at_every_size():
    record = {"include": [{"class": "star", "count": 1}, {"class": "cross", "count": 1}]}
    small, large = (shapes.draw_shapes(record, size, np.random.default_rng(5)) for size in (128, 512))
    assert np.abs(np.asarray(large.reduce(4), float) - np.asarray(small, float)).mean() < 2


def test_heldout_captions_are_never_trained_on():
    records, rng = shapes.heldout_records(552, 0), np.random.default_rng(0)
    assert [r["tag"] for r in records] == 92 * list(shapes.TAGS)
    held = {r["prompt"] for r in records if r["tag"] in shapes.COMBINING}
    assert len(held) > 40 and not held & {shapes.training_record(rng)["prompt"] for _ in range(5000)}


def test_every_word_of_the_world_is_a_token():
    tokenizer, rng = parts.new_tokenizer(), np.random.default_rng(0)
    for tag in shapes.TAGS * 20:
        prompt = shapes.make_record(tag, rng)["prompt"]
        assert len(tokenizer(prompt).input_ids) == len(prompt.split()) + 1
        assert tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True) == prompt
    assert tokenizer.unk_token_id not in tokenizer("zebra, 7?").input_ids
    assert parts.word_labels("a photo of a red circle and a blue square")[4:6] == [[0, 1, 1, 0]] * 2
    assert [word[3] for word in parts.word_labels("a photo of a star above a cross")[4::3]] == [3, 4]


def test_the_world_is_an_ordinary_data_set(tmp_path, monkeypatch):
    made, source = [], shapes.write_shards(str(tmp_path / "one"), 32, 1100, 0)  # by several processes
    monkeypatch.setattr(shapes, "in_processes", lambda write, jobs, _: itertools.starmap(write, jobs))
    shapes.write_shards(str(tmp_path / "two"), 32, 1100, 0)
    for name in ("00000.tar", "00001.tar"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    os.remove(tmp_path / "two" / "00000.tar")
    monkeypatch.setattr(shapes, "in_processes", lambda _, jobs, what: [made.append(job[0]) for job in jobs])
    assert shapes.write_shards(str(tmp_path / "two"), 32, 1100, 0) == source.replace("one", "two")
    assert made == [str(tmp_path / "two" / "00000.tar")]
    with pytest.raises(ValueError, match="two was made with seed 0, not 1"):
        shapes.write_shards(str(tmp_path / "two"), 32, 1100, 1)
    record = shapes.training_record(rng := np.random.default_rng([0, 32, 1099]))
    with tarfile.open(tmp_path / "two" / "00001.tar") as tar:
        assert tar.extractfile("00001099.txt").read().decode() == record["prompt"]
        png = Image.open(tar.extractfile("00001099.png"))
        assert png.tobytes() == shapes.draw_shapes(record, 32, rng).tobytes()


def test_a_trained_vae_has_latents_of_unit_size(tmp_path):
    parts.train_part("vae_adapt", 0, str(tmp_path / "vae"), steps=3)
    vae, rng = VAE(str(tmp_path / "vae")), np.random.default_rng(9)
    assert os.listdir(tmp_path) == ["vae"] and (vae.factor, vae.model.config.scaling_factor) == (8, 0.5)
    pictures = [shapes.draw_shapes(shapes.training_record(rng), 128, rng) for _ in range(32)]
    mean = vae.model.encode(to_pixels(pictures)).latent_dist.mean
    assert mean.mean((0, 2, 3)).abs().max() < 0.3 and (mean.std((0, 2, 3)) - 1).abs().max() < 0.3


def test_a_text_encoder_learns(tmp_path, monkeypatch, capfd):
    losses, text_loss = [], parts.text_loss
    monkeypatch.setattr(parts, "text_loss", lambda *args: losses.append(text_loss(*args)) or losses[-1])
    for folder in ("one", "two"):
        parts.train_part("text_encoder", 0, str(tmp_path / folder), steps=30)
    assert losses[29] < 0.7 * losses[0] and losses[:30] == losses[30:]
    assert capfd.readouterr().err.count("text_encoder:") <= 6  # in a log file no bar is drawn at every step
    features, mask = TextEncoder(str(tmp_path / "one"))(["a photo of a red star", "a photo of two crosses"])
    assert features.shape[::2] == (2, 64) and mask.sum(1).tolist() == [7, 6]
