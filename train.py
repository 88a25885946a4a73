"""Train T2MD: one script, stages by flag. With no data and no GPU it runs on the embedded world, "shapes".

    python train.py --stage kd                      # from the shipped teacher: forcing, if not done, then kd
    python train.py --stage kd --quick              # the same in three minutes: few pictures, few steps
    python train.py --stage all                     # the whole chain from no weights at all

    stage     starts from   trains                    loss           size (x base)
    parts     nothing       two VAEs, two T5s         their own      of the shapes world alone
    teacher   nothing       the DiT                   equation 8     1
    forcing   teacher       Mamba layers              equation 6     1
    kd        forcing       all token mixers          equation 11    1
    adapt     kd            everything                equation 8     1      (new embedding, schedule, VAE, T5)
    hires1    adapt         everything                equation 8     2 (80% of the images), 1 (20%)
    hires2    hires1        everything                equation 8     4      (shapes: and pooled_loss)

A stage starts from what OUT has; what OUT lacks is taken from what is shipped, or else trained first.
Each stage writes OUT/STAGE: config.json and safetensors (EMA weights, what sample.py and diffusers load),
made_with.json (all that its result depends on; a folder begun with other things is refused),
training_state.pt (what a restart needs), log.jsonl (one line per step) and pictures, the teacher's above.

Sections: 1 settings - 2 stages - 3 the plan - 4 what a stage needs - 5 the loss - 6 the loop -
7 optimisers - 8 the command line.
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import signal
import sys
import textwrap
import time
import zlib
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel

import sample
import t2md
from data import checkpoints, files, parts, shapes
from data.files import RANK, WORLD
from data.images import ImageData, ahead
from data.index import progress
from data.prompts import read_prompts
from t2md import T2MD, VAE, MambaMixer, TextEncoder

ASSETS = os.path.join(sample.HERE, "assets")

# ---------------------------------------------------------------------------------------------------
# 1. Settings: one table for each configuration, an entry for each of its stages
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a stage is trained with. The defaults are PixArt-alpha's own, as the paper names no optimiser."""

    steps: int
    batch_size: int = 256  # images of base size per step, over all processes; larger ones fewer by their area
    sizes: dict = field(default_factory=lambda: {1: 1.0})  # {multiple of the base size: share of the images}
    lr: float = 2e-5  # at its peak
    new_lr: float | None = None  # of the modules that a stage calls `faster`; None: lr
    warmup: int = 1000  # steps
    decay: float = 0.0  # share of the steps, the last ones, over which the rate falls to zero
    betas: tuple = (0.9, 0.999)  # of AdamW
    eps: float = 1e-10  # of AdamW
    weight_decay: float = 0.03
    muon: bool = False  # Muon for the matrices of the blocks
    clip: float = 0.01  # gradient norm
    ema: float = 0.9999  # as the paper; diffusers' EMAModel warms up to it in about 90,000 steps
    timesteps: tuple | None = None  # uniform; else mean, deviation of a normal distribution within [0, 1000)
    last_timesteps: tuple | None = None  # while the rate falls; None: the same
    snr_weight: float = 0.0  # not the paper's: see `noise_weight`
    pooled_weight: float | None = None  # not the paper's: see `t2md.pooled_loss`
    translate: int = 0  # not the paper's: captions by which adapt first translates the new T5's features
    float32_attention: bool = True  # as PixArt trains; it matters only with --dtype bfloat16
    ratios: tuple | None = None  # height / width of the pictures: diffusers' buckets by name; None: all
    enlarge: float = 2.0  # a smaller picture than would have to be enlarged so much is skipped
    sampler: dict = field(default_factory=dict)  # entries of the model's config that its sampler reads
    examples: int = 4  # pictures drawn with a checkpoint
    example_size: int | None = 512  # pixels; None: the largest size that the stage trains at
    save_every: int = 1000  # steps between checkpoints with pictures
    save_minutes: float = 10  # and between others
    pictures: int = 20_000  # of the shapes world, of the largest size; of half that size twice as many


SQUARE = ("1.0",)
SHAPES_RATIOS = ("1.0", "0.78", "1.29", "0.57", "1.75")  # squares, 4:3 and 16:9, both ways


@dataclass(frozen=True)
class ShapesSettings(Settings):
    """What differs in the shapes world, whose model is a thousand times smaller."""

    batch_size: int = 32
    lr: float = 1e-3
    warmup: int = 50
    decay: float = 0.4  # much of the score is gained while the rate falls
    betas: tuple = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    muon: bool = True  # learns faster at this size
    clip: float = 1.0
    float32_attention: bool = False
    ratios: tuple | None = SQUARE
    examples: int = 12
    example_size: int | None = None
    save_every: int = 500
    save_minutes: float = 2


T2MD_SETTINGS = {
    "forcing": Settings(
        steps=20_000,
        lr=1e-4,  # fresh layers: a higher rate, a looser clip
        clip=1.0,
        ratios=SQUARE,  # the 512 px teacher is asked about the shape that it is best at
    ),
    "kd": Settings(
        steps=180_000,
        lr=2e-5,  # of self-attention
        new_lr=1e-4,  # of the Mamba layers
        clip=0.1,
        ratios=SQUARE,
    ),
    "adapt": Settings(steps=100_000),
    "hires1": Settings(
        steps=40_000,
        sizes={2: 0.8, 1: 0.2},  # "the ratio for 1024 data is 80%"
        enlarge=1.25,  # no blur is learned
    ),
    "hires2": Settings(
        steps=20_000,
        sizes={4: 1.0},
        enlarge=1.25,
        float32_attention=False,  # at 16,384 tokens it would cost more than all the rest
    ),
}

SHAPES_SETTINGS = {
    "teacher": ShapesSettings(
        steps=7500,
        batch_size=64,
        lr=4e-3,
        decay=0.6,
        snr_weight=1.0,
        timesteps=(580, 230),  # where layout and binding are decided
    ),
    "forcing": ShapesSettings(steps=300, batch_size=16, lr=2e-2, warmup=10, pictures=2_500),
    "kd": ShapesSettings(steps=1100, batch_size=16, lr=8e-3, decay=0.7, pictures=2_500),
    "adapt": ShapesSettings(
        steps=4_400,
        lr=2e-3,
        new_lr=4e-3,  # of the layers that meet another VAE and T5
        warmup=100,
        translate=1000,  # so that colours and places stay with their objects
        snr_weight=0.5,
        timesteps=(640, 240),  # the quadratic schedule moves layout to later timesteps
        ratios=SHAPES_RATIOS,
    ),
    "hires1": ShapesSettings(
        steps=5000,
        batch_size=64,
        sizes={2: 0.8, 1: 0.2},  # the paper's shares
        lr=2e-3,  # 4e-3 forgets what adapt has learned: claims/log.md
        decay=0.6,
        snr_weight=0.5,
        timesteps=(620, 250),
        ratios=SHAPES_RATIOS,
        pictures=10_000,
        sampler=dict(guidance_interval=561),  # the same SNR of a shape as 400 at base size
    ),
    "hires2": ShapesSettings(
        steps=7600,
        batch_size=128,
        sizes={4: 1.0},
        lr=2e-3,
        snr_weight=0.5,
        timesteps=(720, 220),  # the larger a picture, the later its layout is decided (SD3 2403.03206, 5.3.2)
        last_timesteps=(500, 280),  # outlines are learned from little noise
        pooled_weight=1.0,  # hires1 knows the layout; so it is learned from fewer pictures
        ratios=SHAPES_RATIOS,
        pictures=5_000,
        sampler=dict(
            guidance_interval=699,  # again the same SNR of a shape
            timestep_shift=3.35,  # half of the steps above 770, where a shape has the SNR of 500 at base size
            renoise=60,  # more noise, more wrong above 512 px: claims/log.md
        ),
    ),
}

QUICK = dict(steps=200, pictures=1_000)  # --quick, of forcing and kd: worse pictures, soon


@dataclass(frozen=True)
class Config:
    """What all stages of a configuration share."""

    settings: dict  # {stage: Settings}
    out: str
    pattern: str  # the student's mixers
    student: dict  # the shape of the student's Mamba layers: arguments of T2MD
    teacher: dict  # a teacher that starts from nothing: arguments of T2MD
    checkpointing: bool  # compute activations again in the backward pass
    shipped: dict  # {stage or part: what is taken where OUT has none}
    second: dict  # adapt's VAE and text encoder, where the stage `parts` does not make them


CONFIGS = {
    "shapes": Config(
        settings=SHAPES_SETTINGS,
        out="runs/shapes",
        pattern="SHWHWHW",
        student=dict(d_state=32, head_dim=64, chunk_size=32),
        teacher=dict(
            width=128,
            heads=4,
            sample_size=16,  # 128 px
            renoise=600,
            guidance=3.0,  # measured: claims/log.md
            guidance_interval=400,
        ),
        checkpointing=False,
        shipped=dict(
            parts=ASSETS,
            vae=os.path.join(ASSETS, "vae"),
            text_encoder=os.path.join(ASSETS, "text_encoder"),
            vae_adapt=os.path.join(ASSETS, "vae_adapt"),
            text_encoder_adapt=os.path.join(ASSETS, "text_encoder_adapt"),
            teacher=os.path.join(ASSETS, "teacher"),
            kd=os.path.join(ASSETS, "student_kd"),
        ),
        second={},
    ),
    "t2md": Config(  # the paper's
        settings=T2MD_SETTINGS,
        out="runs/t2md",
        pattern="SHWHWHW" * 4,
        student=dict(d_state=256, head_dim=64, chunk_size=256),
        teacher={},
        checkpointing=True,
        shipped=dict(teacher="PixArt-alpha/PixArt-XL-2-512x512"),
        second=dict(vae="stabilityai/sdxl-vae", text_encoder="google/flan-t5-xxl"),
    ),
}

# ---------------------------------------------------------------------------------------------------
# 2. Stages: one record each; adding or changing one is an edit here
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    after: str  # the stage whose model it starts from
    trains: str  # see `modules`; the rest is frozen
    loss: str  # "noise" is equation 8, "forcing" equation 6, "kd" equation 11
    faster: str = "nothing"  # what learns at new_lr
    changes: dict = field(default_factory=dict)  # entries of its predecessor's config that it replaces
    swaps: bool = False  # does it bring another VAE and text encoder


STAGES = {
    "teacher": Stage(after="parts", trains="everything", loss="noise"),
    "forcing": Stage(after="teacher", trains="mamba", loss="forcing"),
    "kd": Stage(after="forcing", trains="mixers", loss="kd", faster="mamba"),
    "adapt": Stage(
        after="kd",
        trains="everything",
        loss="noise",
        faster="ends",
        changes=dict(pos_embed="centered", beta_schedule="scaled_linear"),
        swaps=True,
    ),
    "hires1": Stage(after="adapt", trains="everything", loss="noise"),
    "hires2": Stage(after="hires1", trains="everything", loss="noise"),
}
PARTS = ("vae", "text_encoder", "vae_adapt", "text_encoder_adapt")  # what the stage `parts` trains
CHAIN = ("parts", *STAGES)


def modules(model, which):
    """Return the modules of a model that a stage trains, or that learn faster."""
    if which == "nothing":
        return []
    if which == "everything":
        return [model]
    if which == "mamba":
        return [block.mixer for block in model.blocks if isinstance(block.mixer, MambaMixer)]
    if which == "mixers":  # self-attention and Mamba, and what else the teacher does not have
        of_dim = [m for m in model.children() if isinstance(m, (t2md.PaddingTokens, t2md.LocalEnhancement))]
        return [block.mixer for block in model.blocks] + of_dim
    if which == "ends":  # they meet another VAE and T5
        return [model.patch_embed, model.caption_projection, model.proj_out]
    raise ValueError(f"no modules are called {which}")


def freeze_all_but(model, which):
    """Train the modules that are called `which`, and nothing else of a model."""
    model.requires_grad_(False)
    for module in modules(model, which):
        module.requires_grad_(True)


def noise_schedule(model):
    """Return diffusers' forward process (equation 1) on the schedule that a model's config names."""
    return DDPMScheduler(**t2md.SCHEDULE, beta_schedule=model.config.beta_schedule)


# ---------------------------------------------------------------------------------------------------
# 3. The plan: which stages run, and all that each needs, decided before anything is loaded
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """All that one stage needs. Nothing below `plan` sees the command line."""

    name: str
    stage: Stage
    settings: Settings
    config: Config
    folder: str  # where it writes
    start: str | None  # the model that it starts from: folder or repository; None: from nothing
    teacher: str | None  # the model that its loss asks
    vae: str
    text_encoder: str
    pattern: str  # the student's mixers
    dim: dict  # which of DiM's additions it has: arguments of DiM
    init: str  # how kd begins: "scratch", "teacher", "forcing" or "llama"
    pos_embed: str  # adapt's
    soft_weight: float  # of kd
    mixer_weight: float  # of kd
    growth: int  # how many times the side that its predecessor was trained at
    data: str
    cache: str | None
    seed: int
    device: str
    dtype: str
    micro_batch: int | None
    example_prompts: list | None  # captions of the pictures; None: the data's first
    made_with: dict  # what its result depends on, beside models and data


@dataclass(frozen=True)
class PartsJob:
    """The shapes world's VAEs and text encoders, as far as OUT lacks them."""

    name: str
    folder: str
    seed: int


def plan(args):
    """Return the job that --stage names, after the jobs that it needs. Load and train nothing."""
    config = CONFIGS[args.config]
    places = Places(args.out, config.shipped)
    if args.teacher:
        places["teacher"] = args.teacher
    stages = list(config.settings)
    if "parts" in config.shipped:
        stages.insert(0, "parts")
    # 1. Which stages run: with `all`, those that OUT lacks; else the named one, and what it needs before.
    if args.stage == "all":
        given = ("parts", "teacher") if args.teacher else ()
        if args.vae and args.text_encoder:
            given = (*given, "parts")
        names = [n for n in stages if n not in given and places[n] != place_of(n, args.out)]
    elif args.stage not in stages:
        raise ValueError(f"--config {args.config} starts from {places['teacher']}, it trains no {args.stage}")
    else:
        names = [args.stage]
        before = predecessor(args.stage, args.init)
        while before is not None and places[before] is None:
            names.insert(0, before)
            before = predecessor(before, args.init)
    # 2. A record for each.
    jobs = []
    for name in names:
        if name == "parts":
            jobs.append(PartsJob(name, args.out, args.seed))
            places.update({part: os.path.join(args.out, part) for part in PARTS})
        else:
            job = make_job(name, args, config, places, jobs)
            jobs.append(job)
            places[name] = job.folder
    return jobs


def place_of(name, out):
    """Return the folder into which a stage writes; `parts` writes several folders into OUT itself."""
    return out if name == "parts" else os.path.join(out, name)


class Places(dict):
    """{stage or part: where its result is}: in OUT if it is finished there, else what is shipped, else None.

    A stage that is begun in OUT and not finished has no place yet. Each is looked for when it is asked for.
    """

    def __init__(self, out, shipped):
        super().__init__()
        self.out = out
        self.shipped = shipped

    def __missing__(self, name):
        folder = place_of(name, self.out)
        if name == "parts":
            there = all(self[part] == place_of(part, self.out) for part in PARTS)
            return folder if there else self.shipped.get(name)
        done, planned = checkpoints.steps_of(folder)
        if done >= planned:
            return folder
        return self.shipped.get(name) if done == 0 else None


def predecessor(name, init):
    """Return the stage that must be there before this one, or None. kd may skip forcing (--init)."""
    if name == "parts":
        return None
    if name == "kd" and init != "forcing":
        return "teacher"
    return STAGES[name].after


def make_job(name, args, config, places, jobs):
    """Make the record of one stage, with all flags that concern it.  jobs: those that run before it."""
    named = args.stage in (name, "all")
    before = predecessor(name, args.init)
    start = args.teacher if name == "teacher" else places[before]
    stage = STAGES[name]
    if name == "kd" and args.init == "scratch":
        # It keeps nothing of the teacher, so there is nothing to freeze.
        stage = dataclasses.replace(stage, trains="everything", faster="everything")
    folder = place_of(name, args.out)
    settings = settings_with_flags(name, config.settings[name], vars(args), named, folder)
    check_batch(name, settings)
    dim = {key: True for key in ("padding_tokens", "local_enhancement") if getattr(args, key)}
    made_with = {k: v for k, v in dataclasses.asdict(settings).items() if k not in MAY_CHANGE}
    made_with.update(seed=args.seed, dtype=args.dtype)
    if name in ("forcing", "kd"):
        made_with.update(pattern=args.pattern, dim=dim)
    if name == "kd":
        made_with.update(init=args.init, soft_weight=args.soft_weight, mixer_weight=args.mixer_weight)
    if name == "adapt":
        made_with.update(pos_embed=args.pos_embed)
    if name == "teacher" and not start and args.data != "shapes" and not (args.vae and args.text_encoder):
        needed = "a VAE and a text encoder that were made for such pictures"
        hint = "such as --vae stabilityai/sd-vae-ft-mse --text-encoder google/flan-t5-small"
        raise ValueError(f"a teacher of --data {args.data} needs {needed}, {hint}")
    example_prompts = None
    if args.example_prompts:
        example_prompts = [record["prompt"] for record in read_prompts(args.example_prompts)]
    growth = 1
    if before in config.settings:
        growth = max(settings.sizes) // max(config.settings[before].sizes)
    part_paths = {}
    for part in ("vae", "text_encoder"):
        given = getattr(args, part) if named else None
        part_paths[part] = given or find_part(part, stage, config, places, start, jobs, args.data)
    return Job(
        name=name,
        stage=stage,
        settings=settings,
        config=config,
        folder=folder,
        start=start,
        teacher=places["teacher"] if stage.loss != "noise" else None,
        **part_paths,
        pattern=args.pattern,
        dim=dim,
        init=args.init if name == "kd" else "forcing",
        pos_embed=args.pos_embed,
        soft_weight=args.soft_weight,
        mixer_weight=args.mixer_weight,
        growth=growth,
        data=args.data,
        cache=args.cache,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        micro_batch=args.micro_batch,
        example_prompts=example_prompts,
        made_with=made_with,
    )


MAY_CHANGE = ("steps", "examples", "example_size", "save_every", "save_minutes")  # when a stage is continued
OF_NAMED_STAGE = (
    "steps",
    "batch_size",
    "lr",
    "timesteps",
    "snr_weight",
    "pooled_weight",
    "examples",
    "example_size",
)
OF_EVERY_STAGE = ("save_every", "save_minutes")


def settings_with_flags(name, settings, flags, named, folder):
    """Return a stage's settings with the flags that are given; most are for the stage that --stage names.

    A stage that is begun in `folder` goes on for as many steps as it was begun for.
    """
    changes = {}
    if flags["quick"] and name in ("forcing", "kd"):
        changes.update(QUICK)
    done, planned = checkpoints.steps_of(folder)
    if 0 < done < math.inf:
        changes["steps"] = planned
    for key in OF_NAMED_STAGE:
        if named and flags[key] is not None:
            changes[key] = flags[key]
    for key in OF_EVERY_STAGE:
        if flags[key] is not None:
            changes[key] = flags[key]
    if "lr" in changes:  # it is for all modules
        changes["new_lr"] = None
    if "timesteps" in changes:  # they are for the whole stage
        changes["last_timesteps"] = None
    return dataclasses.replace(settings, **changes)


def find_part(part, stage, config, places, start, jobs, data):
    """Return where a stage's VAE or text encoder is (folder or repository), if no flag names it."""
    if start is None:
        return places[part]
    if stage.swaps and part in config.second:
        return config.second[part]
    if stage.swaps and data == "shapes":
        return places[part + "_adapt"]
    for job in jobs:  # its predecessor's, which may have to be trained first
        if job.folder == start:
            return getattr(job, part)
    return t2md.component_path(start, t2md.load_config(start).get(part))


def check_batch(name, settings):
    """Raise ValueError if there are more processes than images in the smallest batch."""
    fewest = max(1, settings.batch_size // max(settings.sizes) ** 2)
    if fewest < WORLD:
        reason = f"{fewest} images of its largest size cannot be shared by {WORLD} processes"
        raise ValueError(f"{name}: {reason}; give a larger --batch-size")


# ---------------------------------------------------------------------------------------------------
# 4. What a stage needs: its networks, its data, its pictures
# ---------------------------------------------------------------------------------------------------


@dataclass
class Networks:
    model: T2MD  # what is trained
    teacher: T2MD | None  # frozen
    smaller: T2MD | None  # what a hires stage starts from, frozen
    vae: VAE  # frozen
    text_encoder: TextEncoder  # frozen
    schedule: DDPMScheduler  # equation 1


def build(job):
    """Return the networks that a stage begins with, on the device, frozen as the stage says."""
    vae = VAE(job.vae, job.device)
    text_encoder = TextEncoder(job.text_encoder, device=job.device, dtype=getattr(torch, job.dtype))
    # The weights of both are loaded when they are first used.
    torch.manual_seed(zlib.crc32(f"{job.seed}/{job.name}".encode()))
    model = first_model(job, vae, text_encoder)
    t2md.check_widths(model, vae, text_encoder)
    for part, path in dict(vae=job.vae, text_encoder=job.text_encoder).items():
        reference = os.path.relpath(path, job.folder) if os.path.isdir(path) else path
        model.register_to_config(**{part: reference})
    model.to(job.device)
    freeze_all_but(model, job.stage.trains)
    if job.config.checkpointing:
        model.enable_gradient_checkpointing()
    attention = dict(float32_attention=job.settings.float32_attention)
    teacher = None
    if job.teacher:
        teacher = t2md.load_denoiser(job.teacher, job.device, **attention)
    smaller = None
    if job.settings.pooled_weight and job.growth > 1:
        smaller = t2md.load_denoiser(job.start, job.device, **attention)
    return Networks(model, teacher, smaller, vae, text_encoder, noise_schedule(model))


def first_model(job, vae, text_encoder):
    """Return the model that a stage begins with: new, loaded, or made of its teacher; float32, on the CPU."""
    attention = dict(float32_attention=job.settings.float32_attention)
    if job.start is None:
        return T2MD(
            pattern="S" * len(job.pattern),
            pos_embed="pixart",
            in_channels=vae.channels,
            out_channels=vae.channels,
            caption_width=text_encoder.width,
            **job.config.teacher,
            **attention,
        )
    changes = dict(job.stage.changes)
    if "pos_embed" in changes:
        changes["pos_embed"] = job.pos_embed
    model = t2md.load_backbone(job.start, **changes, **attention)
    if job.start == job.teacher:  # there is no student yet
        model = first_student(job, model)
    if job.stage.swaps:
        model = t2md.fit_ends(model, vae.channels, text_encoder.width)
    model.register_to_config(**job.settings.sampler)
    if job.growth > 1:  # it is sampled at the larger size unless told otherwise, at the same coordinates
        model.register_to_config(
            sample_size=job.growth * model.config.sample_size,
            interpolation_scale=job.growth * model.interpolation_scale,
            use_additional_conditions=model.conditioned_on_size,
        )
    return model


def first_student(job, teacher):
    """Return the student with which forcing begins, or kd without forcing: see --init."""
    model_class = t2md.DiM if job.dim else T2MD
    shape = dict(job.config.student)
    if job.init == "llama":
        shape.update(t2md.llama_shape(teacher))
    student = t2md.student_of(teacher, job.pattern, model_class, **job.dim, **shape)
    if job.init == "llama":
        for block, of_teacher in zip(student.blocks, teacher.blocks):
            if isinstance(block.mixer, MambaMixer):
                t2md.copy_attention(block.mixer, of_teacher.mixer)
    if job.init == "scratch":
        return type(student)(**student.arguments())
    return student


def open_data(job, networks):
    """Return {multiple of the base size: its ImageData}. The shapes world is drawn here."""
    settings = job.settings
    vae = networks.vae
    base = base_pixels(job, networks)
    out = os.path.dirname(job.folder)
    cache = job.cache
    if job.data == "shapes" and cache is None:
        of_vae = files.fingerprint(job.vae, "vae")
        of_t5 = files.fingerprint(job.text_encoder, "text_encoder")
        cache = os.path.join(out, files.slug(f"features {of_vae} {of_t5}"))
    data = {}
    for m in settings.sizes:
        source = job.data
        if job.data == "shapes":
            most = settings.pictures * max(settings.sizes) // m
            count = min(most, settings.steps * settings.batch_size)
            ratios = settings.ratios or SHAPES_RATIOS
            name = f"{m * base}px-{count}-{len(ratios)}-seed{job.seed}"
            folder = os.path.join(out, "pictures", name)
            source = shapes.write_shards(folder, m * base, count, job.seed, ratios)
        data[m] = ImageData(
            source,
            m * base,
            vae,
            networks.text_encoder,
            job.seed,
            cache,
            multiple=vae.factor * networks.model.config.patch_size,
            enlarge=settings.enlarge,
            ratios=settings.ratios,
        )
    return data


def base_pixels(job, networks):
    """Return the side in pixels of the size 1 of a stage's `sizes`."""
    return networks.model.config.sample_size * networks.vae.factor // max(job.settings.sizes)


def begin_with_translation(job, networks, data):
    """Let adapt begin with a model that reads the new T5's features as the old one's."""
    before = t2md.load_backbone(job.start)
    old_encoder = TextEncoder(t2md.component_path(job.start, before.config.text_encoder))
    new_encoder = networks.text_encoder
    if old_encoder.tokenizer.get_vocab() != new_encoder.tokenizer.get_vocab():
        print(f"{job.name}: the captions are not translated, as the tokenizers differ")
        return
    dataset = data[max(data)]
    captions = [dataset.caption(k) for k in range(min(job.settings.translate, len(dataset.rows)))]
    features = sample.encode_captions(new_encoder, captions)
    features_before = sample.encode_captions(old_encoder, captions)
    tokens = torch.cat(list(features.values())).float()
    tokens_before = torch.cat(list(features_before.values()))
    t2md.translate_text(networks.model, before, tokens, tokens_before)


def all_made_with(job, data):
    """Return all that a stage's result depends on, for made_with.json: settings, models, data."""
    made_with = dict(job.made_with)
    made_with["vae"] = files.fingerprint(job.vae, "vae")
    made_with["text_encoder"] = files.fingerprint(job.text_encoder, "text_encoder")
    made_with["starts_from"] = files.fingerprint(job.start) if job.start else None
    if job.teacher:
        made_with["teacher"] = files.fingerprint(job.teacher)
    made_with["data"] = "shapes" if job.data == "shapes" else data[max(data)].digest
    return made_with


def check_beginning(job, made_with):
    """Raise ValueError if kd's forcing was made with another teacher, or is another student's."""
    noted = os.path.join(job.start or "", "made_with.json")
    if job.stage.loss == "kd" and job.start != job.teacher and os.path.exists(noted):
        of_forcing = files.read_json(noted)
        of_forcing.update({key: made_with[key] for key in ("teacher", "pattern", "dim")})
        files.check_made_with(job.start, of_forcing)


def batches(job, data, first):
    """Yield (step, multiple of the base size, numbers of images), from step `first` on.

    A stage's `sizes` are shares of its images. Batches of larger images are smaller, so they come more often.
    """
    sizes = job.settings.sizes
    batch_sizes = {m: max(1, job.settings.batch_size // m**2) for m in sizes}
    frequency = torch.tensor([share / batch_sizes[m] for m, share in sizes.items()])
    orders = {m: data[m].order(batch_sizes[m], job.name) for m in sizes}
    for step in range(job.settings.steps):
        m = max(sizes)
        if len(sizes) > 1:
            generator = files.generator(job.seed, job.name, step, -1)
            m = list(sizes)[int(torch.multinomial(frequency, 1, generator=generator))]
        chosen = next(orders[m])
        if step >= first:
            yield step, m, chosen


def timesteps_at(step, settings):
    """Return how the timesteps of a step are distributed: None for uniformly, or (mean, deviation)."""
    if settings.last_timesteps and step >= (1 - settings.decay) * settings.steps:
        return settings.last_timesteps
    return settings.timesteps


def load_batches(job, data, first):
    """Yield (m, images in the batch, this process's share of it as a list of micro-batches) of each step.

    Batches are made some steps ahead, in threads. Every random draw for image i of a batch is a function of
    (seed, stage, step, i), so it depends neither on restarts nor on the number of processes.
    """

    def make(step, m, chosen):
        mine = range(RANK, len(chosen), WORLD)
        size = job.micro_batch or len(mine)
        timesteps = timesteps_at(step, job.settings)
        micro_batches = []
        for k in range(0, len(mine), size):
            some = mine[k : k + size]
            generators = [files.generator(job.seed, job.name, step, i) for i in some]
            batch = data[m].batch([chosen[i] for i in some], generators, timesteps)
            if job.device.startswith("cuda"):
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            micro_batches.append(batch)
        return m, len(chosen), micro_batches

    return ahead(make, batches(job, data, first))


def example_painter(job, networks, data):
    """Return show(model, path), which draws a sheet of a model's pictures, its teacher's above a student's.

    The model is folded and cast in place, so it must be a copy.
    """
    settings = job.settings
    base = base_pixels(job, networks)
    side = settings.example_size or base * max(data)
    dataset = data[min(data)]
    captions = [dataset.caption(k) for k in range(min(settings.examples, len(dataset.rows)))]
    if job.example_prompts:
        captions = job.example_prompts[: settings.examples]
    if not captions or RANK > 0:
        return lambda model, path: None
    encoded = encoded_examples(job, networks.text_encoder, captions)
    teachers_row = []
    if networks.teacher is not None:
        size = (base, base)
        teachers_row = sample.generate_all(
            networks.teacher, networks.vae, encoded, captions, size, job.seed, direct=True
        )

    def show(model, path):
        frozen = t2md.freeze(model, job.device, getattr(torch, job.dtype))
        size = (side, side)
        row = sample.generate_all(frozen, networks.vae, encoded, captions, size, job.seed, direct=True)
        rows = [teachers_row, row] if teachers_row else [row]
        files.write_png(path, files.contact_sheet(rows, base), side=base)

    return show


def encoded_examples(job, text_encoder, captions):
    """Return the examples' captions, encoded. They are kept with the run: a restart need not load T5."""
    path = os.path.join(job.folder, "examples.pt")
    captions = ["", *captions]
    key = [files.fingerprint(job.text_encoder, "text_encoder"), captions]
    if os.path.exists(path):
        kept = torch.load(path, weights_only=True)
        if kept["key"] == key:
            return sample.EncodedCaptions(kept["features"])
    features = sample.encode_captions(text_encoder, captions)
    kept = dict(key=key, features=features)
    files.write_atomically(path, lambda temporary: torch.save(kept, temporary))
    return sample.EncodedCaptions(features)


# ---------------------------------------------------------------------------------------------------
# 5. The loss of a batch
# ---------------------------------------------------------------------------------------------------


def loss_of(job, networks, batch, m=1):
    """Return the stage's loss of one batch, and {name of a term: its value}.

    batch: latents z0 and noise (b, c, height, width), t (b,), text (b, s, caption_width), mask (b, s).
    m: how many times the base size its images are.
    """
    model = networks.model
    noise = batch["noise"]
    t = batch["t"]
    # Equation 1, the forward process: z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps
    z_t = networks.schedule.add_noise(batch["z0"], noise, t)
    height = z_t.shape[2] * networks.vae.factor
    width = z_t.shape[3] * networks.vae.factor
    inputs = dict(z_t=z_t, t=t, text=batch["text"], mask=batch["mask"])
    conditions = t2md.size_conditions(model, height, width, len(t))
    # Equation 6, layer-level teacher forcing
    if job.stage.loss == "forcing":
        loss = t2md.forcing_loss(model, networks.teacher, **inputs, **conditions)
        return loss, dict(forcing=loss.detach())
    # Equation 11, feature knowledge distillation
    if job.stage.loss == "kd":
        weights = dict(soft_weight=job.soft_weight, mixer_weight=job.mixer_weight)
        return t2md.kd_loss(model, networks.teacher, noise=noise, **weights, **inputs, **conditions)
    # Equation 8, the diffusion loss; in the shapes world each image's error is weighed by its noise
    predicted = t2md.predict_noise(model, **inputs, **conditions)
    mse = t2md.mse_loss(noise, predicted)
    weight = noise_weight(networks.schedule, t, m * job.settings.snr_weight)
    loss = (weight * (noise - t2md.upcast(predicted)).square()).mean()
    terms = dict(mse=mse.detach())
    # Not in the paper: what does the model that hires2 starts from predict for the pooled picture
    smaller = networks.smaller
    growth = job.growth * m // max(job.settings.sizes)  # the side of these images, beside the smaller model's
    if smaller is not None and growth > 1:
        of_smaller = t2md.size_conditions(smaller, height // growth, width // growth, len(t))
        errors = t2md.pooled_loss(predicted, smaller, networks.schedule, growth, **inputs, **of_smaller)
        pooled = (weight.flatten() * errors).mean()
        loss = loss + job.settings.pooled_weight * pooled
        terms["pooled"] = pooled.detach()
    return loss, terms


def noise_weight(schedule, t, amplitude):
    """Return the weight of each image's error in equation 8, (b, 1, 1, 1): 1 / sqrt(SNR), cut to [1, 8].

    Not in the paper. Without the weight the small teacher learns places and the objects' colours last.
    amplitude: how clearly a picture's features stand out from the noise, relative to latents of deviation 1
    at base size. Shapes of m times the size stand out m times as clearly. 0: every image weighs 1.
    """
    alpha_bar = schedule.alphas_cumprod.to(t.device)[t]
    if amplitude == 0:
        return torch.ones_like(alpha_bar)[:, None, None, None]
    snr = amplitude**2 * alpha_bar / (1 - alpha_bar)
    return snr.rsqrt().clamp(1.0, 8.0)[:, None, None, None]


# ---------------------------------------------------------------------------------------------------
# 6. The loop
# ---------------------------------------------------------------------------------------------------


def train(job):
    """Run or continue one stage. All processes do; the first one writes."""
    # 1. A stage that is continued needs the settings, models and data that it was begun with.
    settings = job.settings
    networks = build(job)
    data = open_data(job, networks)
    made_with = all_made_with(job, data)
    check_beginning(job, made_with)
    files.check_made_with(job.folder, made_with)
    done, _ = checkpoints.steps_of(job.folder)
    if done >= settings.steps:
        print(f"{job.name}: finished, the model is in {job.folder}")
        return
    print_settings(job)
    for dataset in data.values():
        dataset.fill_cache()
    if done == 0 and job.stage.swaps and settings.translate > 0:
        begin_with_translation(job, networks, data)
    # 2. The pictures' captions are encoded; with a cache nothing else asks the text encoder any more.
    show = example_painter(job, networks, data)
    if data[max(data)].cached:
        networks.text_encoder.unload()
    files.wait_for_all()  # the first process has encoded and drawn; no step of the others waits for that
    # 3. What is trained, from the last checkpoint if there is one.
    model = networks.model
    optimizers = new_optimizers(model, settings, modules(model, job.stage.faster))
    ema = EMAModel(model.parameters(), decay=settings.ema)
    first = checkpoints.resume(job.folder, model, ema, optimizers)
    if RANK == 0:
        checkpoints.remove_leftovers(job.folder)
        checkpoints.begin(job.folder, settings.steps)
    # 4. The steps.
    with StopSignal() as stop, checkpoints.open_log(job.folder, first) as log:
        run_steps(job, networks, data, optimizers, ema, first, Saver(job, made_with, show), stop, log)
    print_skipped(job, networks, data)
    print(f"{job.name}: step {settings.steps} is done, the model and its pictures are in {job.folder}")


def run_steps(job, networks, data, optimizers, ema, first, saver, stop, log):
    """Take the steps from `first` on, each in the order in which it runs."""
    settings = job.settings
    model = networks.model
    trained = [p for p in model.parameters() if p.requires_grad]
    bar = progress(load_batches(job, data, first), job.name, settings.steps, initial=first)
    skipped_in_a_row = 0
    asked = time.monotonic()
    for step, (m, batch_size, micro_batches) in enumerate(bar, first):
        began = time.monotonic()
        # 1. Loss and gradient: this process's share of the mean over the global batch.
        terms = {}
        for batch in micro_batches:
            batch = {name: tensor.to(job.device, non_blocking=True) for name, tensor in batch.items()}
            share = len(batch["t"]) / batch_size
            device_type = torch.device(job.device).type
            with torch.autocast(device_type, torch.bfloat16, enabled=job.dtype == "bfloat16"):
                loss, named = loss_of(job, networks, batch, m)
            (share * loss).backward()
            for name, value in named.items():
                terms[name] = terms.get(name, 0.0) + share * value.float()
        # 2. The sum over processes. All hear whether one was told to stop or the first one wants to save.
        late = saver.late()
        terms, stopping, late = reduce(trained, terms, stop.told, late, job.device)
        # 3. The step. One whose loss or gradient is not finite is skipped.
        norm = float(torch.nn.utils.clip_grad_norm_(trained, settings.clip))
        rate = set_rates(optimizers, step, settings)
        finite = all(math.isfinite(value) for value in (norm, *terms.values()))
        if finite:
            for optimizer in optimizers:
                optimizer.step()
            ema.step(model.parameters())
        model.zero_grad(set_to_none=True)
        skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
        if skipped_in_a_row == 10:
            what = f"{job.name}: loss or gradient was not finite ten steps in a row (step {step})"
            raise FloatingPointError(f"{what}; the last checkpoint is as it was. Try a smaller --lr")
        # 4. One line in the log: what the step took, and what it waited for its batch.
        now = time.monotonic()
        times = dict(seconds=round(now - asked, 4), waited=round(began - asked, 4))
        line = dict(step=step, **terms, gradient=norm, lr=rate, skipped=not finite, **times)
        print(json.dumps(line), file=log, flush=True)
        values = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        speed = f"{batch_size / (now - asked):.0f} images/s"
        bar.set_postfix_str(f"{values}, lr {rate:.2g}, {speed}", refresh=False)
        # 5. The checkpoint; told to stop, the last one.
        done = step + 1
        regular = done % settings.save_every == 0 or done == settings.steps
        if regular or late or stopping:
            saver.save(model, ema, optimizers, done, draw=regular and not stopping)
        if stopping:
            sys.exit(f"{job.name}: told to stop; saved after step {done}; the same command goes on")
        asked = time.monotonic()


def reduce(trained, terms, told_to_stop, late, device):
    """Sum gradients, in place, and loss terms over all processes. Return (terms, stop, late) as numbers.

    stop: was any process told to.  late: does the first process want a checkpoint.
    """
    flags = [float(told_to_stop), float(late and RANK == 0)]
    shared = torch.stack([*terms.values(), *torch.tensor(flags, device=device)])
    sum_over_processes([p.grad for p in trained if p.grad is not None] + [shared])
    *values, stop, late = shared.tolist()
    return dict(zip(terms, values)), stop > 0, late > 0


def sum_over_processes(tensors):
    """Sum each tensor of a list over all processes, in place."""
    if WORLD == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts_of_flat = flat.split([tensor.numel() for tensor in tensors])
    for tensor, total in zip(tensors, parts_of_flat):
        tensor.copy_(total.view_as(tensor))


class Saver:
    """Writes a stage's checkpoints: the EMA weights as a model, the state to go on from, then pictures."""

    def __init__(self, job, made_with, show):
        self.job = job
        self.made_with = made_with
        self.show = show
        self.saved = time.monotonic()

    def late(self):
        """Return True if the last checkpoint is longer ago than --save-minutes."""
        return time.monotonic() - self.saved > 60 * self.job.settings.save_minutes

    def save(self, model, ema, optimizers, step, draw):
        """Write a checkpoint by the first process; the others wait. The first one claims the folder."""
        folder = self.job.folder
        files.note_made_with(folder, self.made_with)
        with files.rank_zero_first():
            if RANK == 0:
                ema.store(model.parameters())
                ema.copy_to(model.parameters())
                checkpoints.save_model(model, folder)
                averaged = copy.deepcopy(model) if draw else None
                ema.restore(model.parameters())
                checkpoints.save_state(folder, model, ema, optimizers, step, self.job.settings.steps)
                if draw:
                    self.draw(averaged, os.path.join(folder, f"step-{step:06d}.png"))
        self.saved = time.monotonic()

    def draw(self, model, path):
        """Draw the examples. An error is printed and does not end the training."""
        try:
            self.show(model, path)
        except Exception as error:  # out of memory, a size that no patch fits, a full disk
            print(f"{self.job.name}: no pictures, {type(error).__name__}: {error}", file=sys.stderr)


class StopSignal:
    """Notes SIGTERM and the first Ctrl-C inside its block (`told`); a second Ctrl-C stops at once."""

    def __enter__(self):
        self.told = False
        self.before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in self.before:
            signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.told = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def print_settings(job):
    """Print what a stage starts from and its resolved settings."""
    print(f"{job.name}: from {job.start or 'nothing'}, into {job.folder}")
    pairs = [f"{name} {value}" for name, value in dataclasses.asdict(job.settings).items()]
    print(textwrap.fill(", ".join(pairs), 110, initial_indent="  ", subsequent_indent="  "))


def print_skipped(job, networks, data):
    """Print which images were left out and why, and how many captions were cut."""
    base = base_pixels(job, networks)
    for m, dataset in data.items():
        for reason, count in dataset.skipped.items():
            print(f"{job.name}: {count} images skipped at {m * base} px: {reason}")
    if networks.text_encoder.cut > 0:
        print(f"{job.name}: {networks.text_encoder.cut} captions were longer than the text encoder takes")


# ---------------------------------------------------------------------------------------------------
# 7. Optimisers
# ---------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024).

    Agrees with torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), but in float32, where torch's bfloat16 is 15
    times slower on many CPUs.
    """

    def __init__(self, groups):
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                momentum.lerp_(p.grad, 0.05)
                update = orthogonalise(p.grad.lerp(momentum, 0.95))  # Nesterov's
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


def orthogonalise(x, steps=5):
    """Return about U V^T of a matrix's singular value decomposition, by Newton-Schulz iteration."""
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.mT
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def new_optimizers(model, settings, faster):
    """Return the optimisers: AdamW, and where the settings say so Muon for the matrices of the blocks.

    Weights decay; A_log, D and dt_bias do not (mamba-ssm marks them so), nor do biases, norms and tables.
    faster: the modules that learn at new_lr.  Each group's base_lr is its rate at the peak.
    """
    fast = {id(p) for module in faster for p in module.parameters()}
    groups = {}  # (by Muon?, rate, weight decay) -> parameters
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        is_matrix = p.ndim >= 2 and name.endswith("weight")
        by_muon = settings.muon and is_matrix and "blocks." in name and p.ndim == 2
        rate = settings.lr
        if id(p) in fast and settings.new_lr is not None:
            rate = settings.new_lr
        weight_decay = settings.weight_decay if is_matrix else 0.0
        groups.setdefault((by_muon, rate, weight_decay), []).append(p)
    adamw = []
    muon = []
    for (by_muon, rate, weight_decay), parameters in groups.items():
        group = dict(params=parameters, lr=rate, base_lr=rate, weight_decay=weight_decay)
        (muon if by_muon else adamw).append(group)
    optimizers = []
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, betas=settings.betas, eps=settings.eps))
    if muon:
        optimizers.append(Muon(muon))
    return optimizers


def set_rates(optimizers, step, settings):
    """Set each group's rate: warm-up, then constant, then down to zero. Return `lr` at this step.

    The modules that a stage calls `faster` learn at new_lr, which rises and falls in the same way.
    """
    factor = min(1.0, (step + 1) / settings.warmup)
    if settings.decay > 0:
        factor *= min(1.0, (settings.steps - step) / (settings.decay * settings.steps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
    return settings.lr * factor


# ---------------------------------------------------------------------------------------------------
# 8. The command line
# ---------------------------------------------------------------------------------------------------


def run(args):
    """Train the stage that --stage names, after the stages that it needs."""
    if WORLD > 1 and not dist.is_initialized():
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        files.start_processes()
    torch.empty(0, device=args.device)  # a device that is not there is said before anything is looked at
    if args.device.startswith("cuda"):  # the CPU's memory is for batches alone, and enough for that
        files.keep_freed_memory(largest=True)
    jobs = plan(args)
    print(f"{' then '.join(job.name for job in jobs) or 'nothing is left to train'}, into {args.out}")
    for job in jobs:
        with files.lock(job.folder):
            if job.name == "parts":
                train_parts(job)
            else:
                attention = job.settings.float32_attention and job.dtype == "bfloat16"
                print(t2md.kernels_in_use(job.device, getattr(torch, job.dtype), attention))
                train(job)


def train_parts(job):
    """Train the shapes world's VAEs and text encoders, those that are not there yet."""
    with files.rank_zero_first():
        for part in PARTS:
            folder = os.path.join(job.folder, part)
            if RANK == 0 and not checkpoints.finished(folder):
                parts.train_part(part, job.seed, folder)


# fmt: off
def parse_arguments(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--stage", required=True, choices=(*CHAIN, "all"), help="what to run, after what it needs")
    add("--config", default="shapes", choices=CONFIGS, help="the embedded world, or the paper's model")
    add("--quick", action="store_true", help="forcing and kd of the shapes world in three minutes")
    add("--data", help="shapes (default with --config shapes), a folder of images or tar shards, or a quoted "
        "glob of shards; `python -m data.images SOURCE` shows what is in it")
    add("--cache", metavar="DIR", help="encode images and captions once, into DIR, and train from there")
    add("--out", help="folder of all checkpoints, logs and pictures (default: runs/CONFIG)")
    add("--teacher", help="the teacher's folder (default: the one in OUT, else the config's); with --stage "
        "teacher, one to train further")
    add("--pattern", help="the student's mixers, a letter a block: S H W > < v ^ (default: the config's)")
    add("--init", default="forcing", choices=("scratch", "teacher", "forcing", "llama"),
        help="kd from nothing (all is trained), the teacher but its mixers, forcing, or its attention too")
    add("--pos-embed", default="centered", choices=t2md.COORDINATES, help="adapt's (default centered)")
    add("--soft-weight", type=float, default=0.5, help="of L_soft in kd (default 0.5; 0 switches it off)")
    add("--mixer-weight", type=float, default=0.2, help="of L_mixer in kd (default 0.2; 0 switches it off)")
    add("--padding-tokens", action="store_true", help="DiM's: 3 learned tokens end every row and column")
    add("--local-enhancement", action="store_true", help="DiM's: 3x3 convolutions around the blocks")
    add("--seed", type=int, default=0, help="of every random draw (default 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: by autocast")
    add("--micro-batch", type=int, help="images a process takes at once; their gradients add up")
    add("--example-prompts", help="a .txt or .jsonl of captions for the pictures (default: the data's first)")
    add("--save-every", type=int, help="steps between checkpoints with pictures")
    add("--save-minutes", type=float, help="minutes after which a checkpoint is due in any case")
    add("--debug", action="store_true", help="show where an error comes from")
    add = parser.add_argument_group("of the stage that --stage names (with all: of every one)").add_argument
    add("--steps", type=int, help="optimiser steps in all (default: as begun, else the config's); more than "
        "before continues a finished stage")
    add("--batch-size", type=int, help="images of base size per step, over all processes")
    add("--lr", type=float, help="peak learning rate")
    add("--timesteps", type=float, nargs=2, metavar=("MEAN", "DEVIATION"), help="t is normal, not uniform")
    add("--pooled-weight", type=float, metavar="W", help="hires1, hires2: see `t2md.pooled_loss`; 0: none")
    add("--snr-weight", type=float, metavar="A", help="see `noise_weight`; 0: no weights")
    add("--vae", help="folder or repository of the VAE (default: its predecessor's, of adapt the config's)")
    add("--text-encoder", help="the same for the T5 encoder and its tokenizer")
    add("--examples", type=int, help="pictures drawn at every checkpoint")
    add("--example-size", type=int, metavar="PX", help="their side")
    # fmt: on
    args = parser.parse_args(argv)
    config = CONFIGS[args.config]
    args.out = args.out or config.out
    args.pattern = args.pattern or config.pattern
    if args.data is None and args.config != "shapes":
        parser.error(f"--config {args.config} needs --data: a folder of images or tar shards (or: shapes)")
    args.data = args.data or "shapes"
    unknown = set(args.pattern) - set("S") - set(t2md.SCANS)
    if unknown:
        parser.error(f"--pattern {args.pattern} must be made of the letters S {' '.join(t2md.SCANS)}")
    if args.quick and args.config != "shapes":
        parser.error("--quick is for --config shapes")
    for name in ("steps", "batch_size", "micro_batch", "save_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.timesteps and not (0 <= args.timesteps[0] < 1000 and 0 < args.timesteps[1] < math.inf):
        parser.error("--timesteps must be a mean in [0, 1000) and a positive deviation")
    return args


def main():
    stopped = "stopped; the same command continues from the last checkpoint"
    files.as_command("train.py", run, parse_arguments(), stopped)


if __name__ == "__main__":
    main()
