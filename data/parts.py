"""The shapes world's VAE and T5: small ones of the real classes, trained from nothing in minutes on a CPU.

A photograph model's VAE and T5 are trained before it, on images and on text. So are these: the VAE rebuilds
crowded pictures of shapes, the T5 encoder reads the world's captions.
"""

import os
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from data import shapes
from data.images import to_pixels
from data.index import progress
from data.shapes import COLOURS, NUMBERS, PLURAL, POSITIONS, SHAPES

VAE_STEPS = 2500
TEXT_STEPS = 1500


# -- the VAE -------------------------------------------------------------------------------------------------
def new_vae():
    """Return an AutoencoderKL of fresh weights, 0.9M parameters: 8x down to 4 channels, as SD1.5's."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
    )


def crowded_picture(rng):
    """Draw 64 x 64 px for the VAE: one to three shapes anywhere, as large as in a picture, some cut off."""
    side = 256  # drawn four times finer, then averaged
    image = Image.new("RGB", (side, side), shapes.BACKGROUND)
    canvas = ImageDraw.Draw(image)
    number = rng.integers(1, 4)
    for x, y in side * rng.uniform(-0.1, 1.1, (number, 2)):
        shape = rng.choice(SHAPES)
        colour = COLOURS[str(rng.choice(list(COLOURS)))]
        r = 2 * side * rng.uniform(0.11, 0.25)
        shapes.draw_object(canvas, shape, colour, x, y, r)
    return image.reduce(4)


def vae_loss(vae, basis, rng):
    """Return the loss of the VAE on 16 pictures: L1, 1e-4 times KL, and how far latents are from colours.

    Three latent channels are held to the mean colour of their 8 x 8 pixels, in the coordinates of `basis`
    (3, 3). Without it the encoder puts all colours near each other on one line, and the denoiser picks
    another colour for every part of an object.
    """
    images = to_pixels([crowded_picture(rng) for _ in range(16)])  # (16, 3, 64, 64)
    posterior = vae.encode(images).latent_dist
    mean = posterior.mean  # (16, 4, 8, 8)
    variance = posterior.var
    rebuilt = vae.decode(posterior.sample()).sample
    l1 = F.l1_loss(rebuilt, images)
    kl = 0.5 * (mean**2 + variance - 1 - variance.log()).mean()
    colours = torch.einsum("ck,bkhw->bchw", basis, F.avg_pool2d(images, 8))  # (16, 3, 8, 8)
    return l1 + 1e-4 * kl + F.mse_loss(mean[:, :3], colours)


@torch.no_grad()
def standardise(vae, seed):
    """Give each latent channel mean 0 and deviation 1, as a diffusion model wants them, over 256 pictures.

    The VAE's own 1x1 convolutions take it up: `quant_conv` divides and `post_quant_conv` multiplies again, so
    no reconstruction changes.
    """
    pictures = []
    for k in range(256):
        rng = np.random.default_rng([seed, 2, k])
        pictures.append(shapes.draw_shapes(shapes.training_record(rng), 128, rng))
    means = [vae.encode(chunk).latent_dist.mean for chunk in to_pixels(pictures).split(8)]
    latents = torch.cat(means)  # (256, 4, 16, 16)
    mean = latents.mean((0, 2, 3))
    std = latents.std((0, 2, 3))
    out = vae.post_quant_conv
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= std[None, :, None, None]
    into = vae.quant_conv  # its first four rows are means, the others log variances
    into.weight[:4] /= std[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.bias[4:] -= 2 * std.log()


def train_vae(name, steps, basis, rng):
    """Train a VAE of the shapes world and return it; adapt's is called vae_adapt."""
    vae = new_vae()
    fit(name, steps, list(vae.parameters()), lambda: vae_loss(vae, basis, rng), decay=0.5)
    return vae


# -- the text encoder ----------------------------------------------------------------------------------------
def new_tokenizer():
    """Return T5's tokenizer with the world's words as pieces; it spells any other word letter by letter."""
    grammar = "a an photo of and left right above below".split()
    words = [*grammar, *NUMBERS, *COLOURS, *SHAPES, *PLURAL.values()]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0)]
    pieces += [("▁" + word, -4.0) for word in words]
    pieces += [(letter, -9.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def new_text_encoder(vocabulary):
    """Return a T5 encoder of fresh weights, for a tokenizer of so many pieces."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=64,
        d_kv=16,
        num_heads=4,
        d_ff=128,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


QUESTIONS = {  # about the object that a word belongs to, and the possible answers
    "shape": SHAPES,
    "colour": ("none", *COLOURS),
    "number": NUMBERS,
    "place": ("none", *POSITIONS),
}
OPPOSITE = {"none": "none", "left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def word_labels(record):
    """Return what each word of a caption says of the object it belongs to, class indices (words, 4).

    "a photo of a red circle and a blue square": both "red" and "circle" say (circle, red, one, no place).
    -100: the word says nothing. The order of the four is that of QUESTIONS.
    """
    where = record["include"][-1].get("position", ["none"])[0]  # of the last object; seen from the others:
    places = [OPPOSITE[where]] * (len(record["include"]) - 1) + [where]
    labels = []
    for word in record["prompt"].split():
        label = [-100] * len(QUESTIONS)
        for wanted, place in zip(record["include"], places):
            shape = wanted["class"]
            number = NUMBERS[wanted["count"]]
            if word in (shape, PLURAL[shape], wanted.get("color"), number):
                answers = (shape, wanted.get("color", "none"), number, place)
                label = [options.index(answer) for options, answer in zip(QUESTIONS.values(), answers)]
        labels.append(label)
    return labels


def text_loss(encoder, heads, tokenizer, rng):
    """Return the loss of the text encoder on 128 captions: cross-entropies of the four questions, summed.

    Each word is one token. One linear head per question predicts from the token the shape, colour, number or
    place of the word's object. So the encoder, like the real T5, has read captions before any picture is
    learned, and its tokens carry which colour and which place belong to which object.
    """
    records = [shapes.training_record(rng) for _ in range(128)]
    tokens = tokenizer([record["prompt"] for record in records], padding="longest", return_tensors="pt")
    labels = [torch.tensor(word_labels(record)) for record in records]
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)  # (128, words, 4)
    features = encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    features = features[:, :-1]  # without the end's token: (128, words, width)
    loss = 0.0
    for question, head in enumerate(heads):
        logits = head(features).transpose(1, 2)  # (128, answers, words)
        loss = loss + F.cross_entropy(logits, labels[:, :, question])
    return loss


def train_text_encoder(name, steps, rng, tokenizer):
    """Train a T5 encoder of the shapes world and return it; adapt's is called text_encoder_adapt."""
    encoder = new_text_encoder(len(tokenizer))
    heads = [torch.nn.Linear(encoder.config.d_model, len(answers)) for answers in QUESTIONS.values()]
    parameters = list(encoder.parameters())
    for head in heads:
        parameters += head.parameters()
    fit(name, steps, parameters, lambda: text_loss(encoder, heads, tokenizer, rng), decay=0.4)
    return encoder


# -- both ----------------------------------------------------------------------------------------------------
def fit(name, steps, parameters, next_loss, decay):
    """Minimise what next_loss() returns by AdamW; the rate falls to nothing over the last share `decay`."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
    bar = progress(range(steps), desc=name)
    for step in bar:
        loss = next_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        warmup = (step + 1) / 50
        falling = (steps - step) / (decay * steps)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, warmup, falling)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4g}", refresh=False)


def train_part(name, seed, folder, steps=None):
    """Train a VAE or a text encoder and write it into `folder`, in its library's format, once it is done.

    name: vae or text_encoder; or vae_adapt or text_encoder_adapt, which the stage adapt swaps in.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    torch.manual_seed(int(rng.integers(2**63)))
    # Each VAE has colour coordinates of its own. The text encoders do not use theirs.
    basis, _ = torch.linalg.qr(torch.randn(3, 3))
    temporary = folder.rstrip("/") + ".tmp"
    if name.startswith("vae"):
        model = train_vae(name, steps or VAE_STEPS, basis, rng)
        standardise(model, seed)
        # At 1.0 shapes of 512 px would show through the noise of the quadratic schedule's last step.
        model.register_to_config(scaling_factor=0.5 if name == "vae_adapt" else 1.0)
    else:
        tokenizer = new_tokenizer()
        model = train_text_encoder(name, steps or TEXT_STEPS, rng, tokenizer)
        tokenizer.save_pretrained(temporary)
    model.save_pretrained(temporary)
    os.replace(temporary, folder)
