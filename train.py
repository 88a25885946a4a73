"""Train T2MD: one script, stages by flag. With no data and no GPU it runs on the embedded world, "shapes".

    python train.py --stage kd                      # from the shipped teacher: forcing, if not done, then kd
    python train.py --stage kd --quick              # the same in three minutes: few pictures, few steps
    python train.py --stage all                     # the whole chain from no weights at all

    stage     starts from   trains                    loss           size (x base)
    teacher   nothing       VAE, T5, then the DiT     equation 8     1
    forcing   teacher       Mamba layers              equation 6     1
    kd        forcing       all token mixers          equation 11    1
    adapt     kd            everything                equation 8     1      (new embedding, schedule, VAE, T5)
    hires1    adapt         everything                equation 8     2 (80% of the images), 1; shapes: half
    hires2    hires1        everything                equation 8     4; shapes: 4, 2, 1

Each stage writes OUT/STAGE: config.json and safetensors (EMA weights, what sample.py and diffusers load),
made_with.json (all that its result depends on; a folder begun with other things is refused),
training_state.pt (what a restart needs), log.jsonl (a line a step) and pictures, the teacher's above.

Sections: 1 configurations - 2 stages - 3 what a stage needs - 4 the loop, its parts, the command line.
"""

import argparse
import copy
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import time
import types
import zipfile
import zlib
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel

import sample
import t2md
from data import files, parts, shapes
from data.files import RANK, WORLD
from data.images import ImageData
from data.index import canonical, progress
from t2md import T2MD, VAE, Attention, MambaMixer, TextEncoder

# ---------------------------------------------------------------------------------------------------
# 1. Configurations: what all stages of one share
# ---------------------------------------------------------------------------------------------------

CONFIGS = {
    "shapes": dict(
        out="runs/shapes",
        teacher=os.path.join(sample.HERE, "assets", "teacher"),
        pattern="SHWHWHW",
        checkpointing=False,
        float32_attention=False,
        adapt={},  # a second VAE and text encoder of its own, as shipped or from data/parts.py
        model=dict(  # of a teacher that starts from nothing
            **dict(width=128, heads=4, caption_width=64, d_state=32, chunk_size=32),
            sample_size=16,  # 128 px
            renoise=600,
            guidance=3.0,  # measured: claims/README.md
            guidance_interval=400,
        ),
    ),
    "t2md": dict(  # the paper's
        out="runs/t2md",
        teacher="PixArt-alpha/PixArt-XL-2-512x512",
        pattern="SHWHWHW" * 4,
        checkpointing=True,
        float32_attention=True,  # as PixArt trains
        adapt=dict(vae="stabilityai/sdxl-vae", text_encoder="google/flan-t5-xxl"),
    ),
}

# What a stage is trained with where neither its entry in STAGES nor a flag says otherwise.
PIXART = dict(  # the paper's optimiser is not given, so PixArt-alpha's own is used
    batch_size=256,  # images of base size a step, over all processes; larger ones fewer by their area
    lr=2e-5,  # at its peak
    new_lr=None,  # of the modules that a stage calls `faster`; None: lr
    warmup=1000,  # steps
    decay=0.0,  # share of the steps, the last ones, over which the rate falls to zero
    adamw=dict(betas=(0.9, 0.999), eps=1e-10),
    weight_decay=0.03,
    muon=False,  # Muon for the matrices of the blocks
    clip=0.01,  # gradient norm
    ema=0.9999,
    timesteps=None,  # uniform; else mean and deviation of a normal distribution, cut to [0, 1000)
    snr_weight=0.0,  # not the paper's: see `noise_weight`
    sizes={1: 1.0},  # {multiple of the base size: share of the images}
    sampler={},  # entries of the model's config that its sampler reads
    examples=4,  # pictures drawn with a checkpoint
    example_size=512,  # pixels; None: the largest size that the stage trains at
    save_every=1000,  # steps between checkpoints with pictures
    save_minutes=10,  # and between others
)
SMALL = dict(
    batch_size=32,
    lr=1e-3,
    warmup=50,
    decay=0.4,  # much of the score is gained while the rate falls
    adamw=dict(betas=(0.9, 0.99), eps=1e-8),
    weight_decay=0.0,
    muon=True,  # learns faster at this size
    clip=1.0,
    pictures=20_000,  # of the shapes world, of a stage's largest size; of half that size twice as many
    ratios=("1.0",),  # height / width of the pictures, by the names of diffusers' buckets
    examples=12,
    example_size=None,
    save_every=500,
    save_minutes=2,
)
RATIOS = ("1.0", "0.78", "1.29", "0.57", "1.75")  # 4:3 and 16:9, both ways
SETTINGS = {"t2md": PIXART, "shapes": PIXART | SMALL}

# ---------------------------------------------------------------------------------------------------
# 2. Stages: one record each; adding or changing one is an edit here
# ---------------------------------------------------------------------------------------------------


def modules(model, which):
    """The modules of a model that a stage trains, or that learn faster; the rest is frozen, or slower."""
    mixers = [block.mixer for block in model.blocks]
    dim = [m for m in model.children() if isinstance(m, (t2md.PaddingTokens, t2md.LocalEnhancement))]
    return dict(
        nothing=[],
        everything=[model],
        mamba=[mixer for mixer in mixers if isinstance(mixer, MambaMixer)],
        mixers=mixers + dim,  # self-attention and Mamba, and what else the teacher does not have
        ends=[model.patch_embed, model.caption_projection, model.proj_out],  # they meet another VAE and T5
    )[which]


@dataclass(frozen=True)
class Stage:
    after: str | None  # the stage whose model it starts from
    trains: str  # see `modules`
    loss: str  # "noise" is equation 8, "forcing" equation 6, "kd" equation 11
    shapes: dict  # its settings in each configuration, beside SETTINGS; {} where it is not trained
    t2md: dict
    faster: str = "nothing"  # what learns at new_lr
    changes: dict = field(default_factory=dict)  # entries of its predecessor's config that it replaces
    swaps: bool = False  # does it bring another VAE and text encoder


# fmt: off
STAGES = {
    "teacher": Stage(
        after=None, trains="everything", loss="noise", t2md={},
        shapes=dict(steps=7500, batch_size=64, lr=4e-3, decay=0.6, snr_weight=1.0,
                    timesteps=(580, 230))),  # where layout and binding are decided
    "forcing": Stage(
        after="teacher", trains="mamba", loss="forcing",
        shapes=dict(steps=300, batch_size=16, lr=2e-2, warmup=10, pictures=2_500),
        t2md=dict(steps=20_000, lr=1e-4, clip=1.0)),  # fresh layers: a higher rate, a looser clip
    "kd": Stage(
        after="forcing", trains="mixers", faster="mamba", loss="kd",
        shapes=dict(steps=1100, batch_size=16, lr=8e-3, decay=0.7, pictures=2_500),
        t2md=dict(steps=180_000, new_lr=1e-4, clip=0.1)),
    "adapt": Stage(
        after="kd", trains="everything", faster="ends", loss="noise", swaps=True,
        changes=dict(pos_embed="centered", beta_schedule="scaled_linear"),
        shapes=dict(steps=10_000, lr=2e-3, new_lr=4e-3, snr_weight=0.5, ratios=RATIOS,
                    warmup=400,  # what the blocks know survives until the new ends have learned
                    timesteps=(640, 240)),  # the quadratic schedule moves layout to later timesteps
        t2md=dict(steps=100_000)),
    "hires1": Stage(
        after="adapt", trains="everything", loss="noise",
        shapes=dict(steps=1200, sizes={2: 0.2, 1: 0.8},  # half of the steps each: 128 px is not forgotten
                    timesteps=(640, 260), pictures=5_000, ratios=RATIOS,
                    sampler=dict(start_size=16, renoise=60)),  # measured: claims/README.md
        t2md=dict(steps=40_000, sizes={2: 0.8, 1: 0.2})),  # "the ratio for 1024 data is 80%"
    "hires2": Stage(
        after="hires1", trains="everything", loss="noise",
        shapes=dict(steps=4000, batch_size=64, snr_weight=0.5, pictures=2_500, ratios=RATIOS,
                    sizes={4: 0.07, 2: 0.18, 1: 0.75}),  # of the steps .43, .28 and .29
        t2md=dict(steps=20_000, sizes={4: 1.0})),
}
# fmt: on
CHAIN = tuple(STAGES)
STUDENT = ("pattern", "padding_tokens", "local_enhancement")  # flags by which it differs from its teacher
QUICK = dict.fromkeys(("forcing", "kd"), dict(steps=200, pictures=1_000))  # --quick: worse pictures, soon


def settings(name, args):
    """A stage's settings; the command line's are for the stage it names, or for all."""
    chosen = SETTINGS[args.config] | getattr(STAGES[name], args.config)
    chosen |= QUICK.get(name, {}) if args.quick else {}
    if args.stage in (name, "all"):
        flags = ("steps", "batch_size", "lr", "timesteps", "snr_weight", "examples", "example_size")
        chosen |= {key: getattr(args, key) for key in flags if getattr(args, key) is not None}
        chosen |= dict(new_lr=None) if args.lr is not None else {}
    saving = ("save_every", "save_minutes")
    return chosen | {key: getattr(args, key) for key in saving if getattr(args, key) is not None}


def noise_schedule(model):
    """diffusers' forward process (equation 1) on the 1000-step schedule that a model's config names."""
    return DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2, beta_schedule=model.config.beta_schedule)


def noise_weight(schedule, t, amplitude):
    """What the error of each image in equation 8 is weighed by, (B, 1, 1, 1): 1 / sqrt(SNR), cut to [1, 8].
    Not the paper's: without it the small teacher learns last what is where and which colour is whose.
    amplitude: how much a picture's features stand out from the noise, beside latents of deviation 1 at base
    size: a shape of m times the size m times as well. 0: every image weighs 1."""
    alpha_bar = schedule.alphas_cumprod.to(t.device)[t]
    snr = amplitude**2 * alpha_bar / (1 - alpha_bar)
    return (snr.rsqrt().clamp(1.0, 8.0) if amplitude else torch.ones_like(snr))[:, None, None, None]


# ---------------------------------------------------------------------------------------------------
# 3. What a stage needs
# ---------------------------------------------------------------------------------------------------


def finished(folder):
    """Is there a model in it that is not half trained?"""
    state = read_state(folder, mmap=True) or dict(step=0, steps=0)
    return os.path.exists(os.path.join(folder, "config.json")) and state["step"] >= state["steps"]


def find_teacher(args):
    """--teacher; else the one in OUT, which --stage all trains; else the configuration's."""
    here = os.path.join(args.out, "teacher")
    from_nothing = args.stage == "all" and args.config == "shapes"
    own = from_nothing or os.path.exists(os.path.join(here, "config.json"))
    return args.teacher or (here if own else CONFIGS[args.config]["teacher"])


def before(name, args):
    """The stage whose model a stage starts from, or None."""
    return "teacher" if name == "kd" and args.init != "forcing" else STAGES[name].after


def stages_to_run(args):
    """Walk the chain back from what --stage names to what is finished -> names, first ones first."""
    trained = [name for name in CHAIN if getattr(STAGES[name], args.config)]
    if args.stage == "all":
        return [n for n in trained if not finished(os.path.join(args.out, n))]
    if args.stage not in trained:
        raise ValueError(f"{args.config} starts from {find_teacher(args)}, it trains no {args.stage}")
    names = [args.stage]
    while (name := before(names[0], args)) is not None:
        folder = find_teacher(args) if name == "teacher" else os.path.join(args.out, name)
        if folder != os.path.join(args.out, name) or finished(folder):
            break
        names.insert(0, name)
    return names


def find_part(part, name, start, args):
    """Where the VAE or text encoder of a stage is; one of the shapes world that is nowhere yet is trained."""
    swaps, adapt = STAGES[name].swaps, CONFIGS[args.config]["adapt"]
    if args.stage in (name, "all") and getattr(args, part):
        return getattr(args, part)
    if start and not swaps:
        return sample.component_path(start, t2md.load_config(start).get(part))
    if swaps and part in adapt:
        return adapt[part]
    part += "_adapt" if swaps else ""
    here, shipped = os.path.join(args.out, part), os.path.join(sample.HERE, "assets", part)
    with files.rank_zero_first():
        if finished(here):
            return here
        if start and args.stage != "all":  # only what starts from nothing takes nothing that is shipped
            return shipped
        parts.train_part(part, args.seed, here)
    return here


def resolve(name, args):
    """Find all that a stage needs, whose predecessors are finished -> one record of it:

    name, stage; folder: where it writes; start: the model it starts from, teacher: the one its loss asks, or
    None; vae, text_encoder: folders or repositories; settings; record: what its result depends on, but steps.
    """
    stage, first, start, teacher = STAGES[name], before(name, args), args.teacher, None
    if name == "kd" and args.init == "scratch":  # nothing of it is the teacher's, that it could keep
        stage = replace(stage, trains="everything", faster="everything")
    if first is not None:
        start = find_teacher(args) if first == "teacher" else os.path.join(args.out, first)
    paths = {part: find_part(part, name, start, args) for part in ("vae", "text_encoder")}
    chosen = settings(name, args)
    loose = ("steps", "examples", "example_size", "save_every", "save_minutes")
    record = {key: value for key, value in chosen.items() if key not in loose}
    record |= {part: files.fingerprint(path) for part, path in paths.items()}
    record |= dict(data=canonical(args.data), seed=args.seed, dtype=args.dtype)
    record["starts_from"] = files.fingerprint(start) if start else None
    if stage.loss != "noise":
        teacher = find_teacher(args)
        record["teacher"] = files.fingerprint(teacher)
    flags = dict(forcing=STUDENT, kd=(*STUDENT, "init", "soft_weight", "mixer_weight"), adapt=("pos_embed",))
    record |= {flag: getattr(args, flag) for flag in flags.get(name, ())}
    if first == "forcing":  # of another student or teacher it is no beginning of this kd
        beginning = os.path.join(args.out, first)
        shared = {key: record[key] for key in ("teacher", *STUDENT)}
        files.claim(beginning, files.read_json(os.path.join(beginning, "made_with.json")) | shared)
    found = dict(folder=os.path.join(args.out, name), start=start, teacher=teacher, **paths)
    return types.SimpleNamespace(name=name, stage=stage, settings=chosen, record=record, **found)


def start_model(job, args):
    """The network that a stage begins with, on the CPU."""
    torch.manual_seed(zlib.crc32(f"{args.seed}/{job.name}".encode()))
    if job.start is None:
        config = CONFIGS[args.config]["model"]
        return T2MD(pattern="S" * len(args.pattern), pos_embed="pixart", **config)
    changes = job.stage.changes
    if "pos_embed" in changes:
        changes = changes | dict(pos_embed=args.pos_embed)
    model = t2md.load_backbone(job.start, **changes)
    if job.teacher and job.start == job.teacher:  # the student's beginning
        shape = {key: getattr(args, key) for key in STUDENT if getattr(args, key)}  # with DiM's or without
        model = t2md.student_of(model, llama=job.name == "kd" and args.init == "llama", **shape)
        if job.name == "kd" and args.init == "scratch":
            model = type(model)(**model.arguments())
    first = before(job.name, args)
    model.register_to_config(**job.settings["sampler"])
    larger = max(job.settings["sizes"]) // max(settings(first, args)["sizes"]) if first else 1
    if larger > 1:  # it is sampled at that size unless told otherwise, at the same coordinates
        scale = larger * model.interpolation_scale
        model.register_to_config(sample_size=larger * model.config.sample_size, interpolation_scale=scale)
        model.register_to_config(use_additional_conditions=model.conditioned_on_size)
    return model


def ready(model, stage, checkpointing):
    """A model as a stage trains it: what the stage does not train is frozen."""
    model.requires_grad_(False)
    for module in modules(model, stage.trains):
        module.requires_grad_(True)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def load_networks(job, args):
    """(model, teacher or None, VAE, TextEncoder) on the device; the model's config names the latter two,
    local ones relative to its own folder."""
    config = CONFIGS[args.config]
    vae, text_encoder = VAE(job.vae, args.device), TextEncoder(job.text_encoder, device=args.device)
    model = ready(start_model(job, args).to(args.device), job.stage, config["checkpointing"])
    for part, path in dict(vae=job.vae, text_encoder=job.text_encoder).items():
        model.register_to_config(**{part: os.path.relpath(path, job.folder) if os.path.isdir(path) else path})
    teacher = sample.load_denoiser(job.teacher, args.device) if job.teacher else None
    for block in (*model.blocks, *(teacher.blocks if teacher else ())):
        if isinstance(block.mixer, Attention):
            block.mixer.float32 = config["float32_attention"]
    return model, teacher, vae, text_encoder


def open_data(job, args, vae, text_encoder, base):
    """{multiple of the base size: its ImageData}; the shapes world is drawn, and encoded once."""
    data, source, cache, config = {}, args.data, args.cache, job.settings
    if args.data == "shapes" and not cache:
        cache = os.path.join(args.out, files.slug("features {vae} {text_encoder}".format(**job.record)))
    for m in config["sizes"]:
        if args.data == "shapes":
            ratios, most = config["ratios"], config["pictures"] * max(config["sizes"]) // m
            count = min(most, config["steps"] * config["batch_size"])
            folder = os.path.join(args.out, "pictures", f"{m * base}px-{count}-{len(ratios)}-seed{args.seed}")
            source = shapes.write_shards(folder, m * base, count, args.seed, ratios)
        index = os.path.join(args.out, "index")
        data[m] = ImageData(source, m * base, vae, text_encoder, args.seed, index, cache)
    return data


def batches(job, args, data, first):
    """From step `first` on: (multiple of the base size, numbers of images).
    The shares of a stage are of its images: larger ones come in smaller batches, and so more often."""
    sizes = job.settings["sizes"]
    images = {m: max(1, job.settings["batch_size"] // m**2) for m in sizes}
    weights = torch.tensor([share / images[m] for m, share in sizes.items()])
    orders = {m: data[m].order(images[m]) for m in sizes}
    for step in range(job.settings["steps"]):
        generator = files.generator(args.seed, job.name, step, -1) if len(sizes) > 1 else None
        m = list(sizes)[int(torch.multinomial(weights, 1, generator=generator))] if generator else max(sizes)
        chosen = next(orders[m])
        if step >= first:
            yield m, chosen


def example_painter(job, args, teacher, vae, text_encoder, data, base):
    """show(model, path): a contact sheet of --examples pictures; above a student's, its teacher's."""
    images, side = data[min(data)], job.settings["example_size"] or base * max(data)
    captions = [images.caption(k) for k in range(min(job.settings["examples"], len(images.rows)))]
    if args.example_prompts:
        records = sample.read_prompts(args.example_prompts)[: job.settings["examples"]]
        captions = [record["prompt"] for record in records]
    encoded = sample.encode_first(text_encoder, ["", *captions])  # the device's is the data's alone
    rows = []
    if teacher and captions and not RANK:
        rows = [sample.generate_all(teacher, vae, encoded, captions, (base, base), args.seed)]

    def show(model, path):
        if captions:
            frozen = sample.freeze(copy.deepcopy(model), args.device, getattr(torch, args.dtype))
            images = sample.generate_all(frozen, vae, encoded, captions, (side, side), args.seed, direct=True)
            files.write_png(path, files.contact_sheet([*rows, images], base))

    return show


# ---------------------------------------------------------------------------------------------------
# 4. The loop; then its parts: what is on disk, the optimiser; the command line
# ---------------------------------------------------------------------------------------------------


def train_stage(job, args):
    """Run or continue one stage, in the order in which it runs. All processes do; the first one writes."""
    stage, config, folder, device = job.stage, job.settings, job.folder, args.device
    files.claim(folder, job.record)
    if (read_state(folder, mmap=True) or dict(step=0))["step"] >= config["steps"]:
        return print(f"{job.name}: finished, the model is in {folder}")
    model, teacher, vae, text_encoder = load_networks(job, args)
    base = model.config.sample_size * vae.factor // max(config["sizes"])  # pixels
    data = open_data(job, args, vae, text_encoder, base)
    show = example_painter(job, args, teacher, vae, text_encoder, data, base)
    cut, text_encoder = text_encoder.cut, None  # with a cache nothing asks it any more: it leaves the device
    schedule = noise_schedule(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = new_optimizers(model, config, modules(model, stage.faster))
    ema = EMAModel(model.parameters(), decay=config["ema"])
    first = resume(folder, model, ema, optimizers)
    log, saved, skipped, told_to_stop = open_log(folder, first), time.time(), 0, []
    default = signal.signal(signal.SIGTERM, lambda *_: told_to_stop.append(True))
    bar = progress(batches(job, args, data, first), job.name, config["steps"], initial=first)
    for step, (m, chosen) in enumerate(bar, first):
        began, terms, images = time.time(), {}, len(chosen)
        # 1. This process's share of the batch. All that is random in image i is a function of (seed, stage,
        # step, i), so it depends neither on restarts nor on how many processes there are.
        for part in torch.arange(RANK, images, WORLD).split(args.micro_batch or images):
            generators = [files.generator(args.seed, job.name, step, i) for i in part.tolist()]
            batch = data[m].batch([chosen[i] for i in part], generators, config["timesteps"])
            batch = {key: value.to(device) for key, value in batch.items()}
            # 2. The forward process (equation 1).
            noise, t = batch["noise"], batch["t"]
            z_t = schedule.add_noise(batch["z0"], noise, t)
            pixels = [side * vae.factor for side in z_t.shape[-2:]]
            conditions = sample.size_conditions(model, *pixels, len(part))
            inputs = dict(z_t=z_t, t=t, text=batch["text"], mask=batch["mask"], **conditions)
            # 3. Teacher, student and loss.
            with torch.autocast(z_t.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                if stage.loss == "forcing":  # equation 6
                    loss = t2md.forcing_loss(model, teacher, **inputs)
                    named = dict(forcing=loss.detach())
                elif stage.loss == "kd":  # equation 11
                    weights = dict(soft_weight=args.soft_weight, mixer_weight=args.mixer_weight)
                    loss, named = t2md.kd_loss(model, teacher, **inputs, noise=noise, **weights)
                else:  # equation 8
                    predicted = t2md.predict_noise(model, **inputs)
                    named = dict(mse=t2md.mse_loss(noise, predicted).detach())
                    root = noise_weight(schedule, t, m * config["snr_weight"]).sqrt()
                    loss = t2md.mse_loss(root * noise, root * predicted)
            # 4. Its gradient: of the mean over the global batch, once all parts and processes are summed.
            share = len(part) / images
            (share * loss).backward()
            terms = {name: terms.get(name, 0.0) + share * value.float() for name, value in named.items()}
        late = RANK == 0 and began - saved > 60 * config["save_minutes"]
        flags = (torch.tensor(float(flag), device=device) for flag in (bool(told_to_stop), late))
        shared = torch.stack([*terms.values(), *flags])
        sum_over_processes([*(p.grad for p in trained if p.grad is not None), shared])
        *values, stop, late = shared.tolist()
        # 5. The step. One whose loss or gradient is not finite is skipped.
        norm = float(torch.nn.utils.clip_grad_norm_(trained, config["clip"]))
        rate = set_rates(optimizers, step, config)
        skipped = 0 if all(map(math.isfinite, (norm, *values))) else skipped + 1
        if not skipped:
            for optimizer in optimizers:
                optimizer.step()
            ema.step(model.parameters())
        model.zero_grad(set_to_none=True)
        if skipped == 10:
            why = f"{job.name}: loss or gradient was not finite ten steps in a row (step {step})"
            raise FloatingPointError(f"{why}; the last checkpoint is as it was. Try a smaller --lr")
        # 6. What is said of it.
        seconds, terms = round(time.time() - began, 4), dict(zip(terms, values))
        line = dict(step=step, **terms, gradient=norm, lr=rate, skipped=skipped > 0, seconds=seconds)
        print(json.dumps(line), file=log, flush=True)
        loss = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        rates = f"lr {rate:.2g}, {images / max(seconds, 1e-4):.0f} images/s"
        bar.set_postfix_str(f"{loss}, {rates}", refresh=False)
        # 7. The checkpoint; told to stop, the last one.
        done, regular = step + 1, (step + 1) % config["save_every"] == 0 or step + 1 == config["steps"]
        if regular or late or stop:
            paint = show if regular and not stop else None
            save(folder, model, ema, optimizers, done, config["steps"], paint)
            saved = time.time()
        if stop:
            sys.exit(f"{job.name}: told to stop; saved after step {done}; the same command goes on")
    signal.signal(signal.SIGTERM, default)
    for m, images in data.items():
        for reason, count in images.skipped.items():
            print(f"{job.name}: {count} images skipped at {m * base} px: {reason}")
        cut = max(cut, images.text_encoder.cut if images.text_encoder else 0)
    print(f"{job.name}: {cut} captions were longer than the text encoder takes\n" * (cut > 0), end="")
    print(f"{job.name}: step {config['steps']} is done, the model and its pictures are in {folder}")


def read_state(folder, **kwargs):
    """The training state in `folder`, or None where there is none.  Raises ValueError if it is damaged."""
    path = os.path.join(folder, "training_state.pt")
    if not os.path.exists(path):
        return None
    try:
        if not kwargs and zipfile.ZipFile(path).testzip():  # torch.load asks for no check sum
            raise ValueError("its bytes are not what was written")
        return torch.load(path, map_location="cpu", weights_only=True, **kwargs)
    except Exception as error:  # torch raises anything
        advice = "move it away to train this stage again"
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); {advice}") from error


def save(folder, model, ema, optimizers, step, steps, show):
    """By the first process: the EMA weights as a model, their pictures, then the state to go on from."""
    with files.rank_zero_first():
        if RANK:
            return
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        temporary = os.path.join(folder, f".saving-{os.getpid()}")
        try:
            model.save_pretrained(temporary)
            for name in os.listdir(temporary):
                os.replace(os.path.join(temporary, name), os.path.join(folder, name))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if show:
            show(model, os.path.join(folder, f"step-{step:06d}.png"))
        ema.restore(model.parameters())
        state = dict(model=model.state_dict(), ema=ema.state_dict(), step=step, steps=steps)
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        path = os.path.join(folder, "training_state.pt")
        files.write_atomically(path, lambda temporary: torch.save(state, temporary))


def resume(folder, model, ema, optimizers):
    """Load what `save` wrote, if it is there -> steps done."""
    state = read_state(folder)
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    ema.to(model.device)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        saved["param_groups"] = optimizer.state_dict()["param_groups"]  # rates are the settings'
        optimizer.load_state_dict(saved)
    return state["step"]


def open_log(folder, done):
    """log.jsonl, opened to go on after `done` lines: those of steps that were lost are taken back."""
    path = os.devnull if RANK else os.path.join(folder, "log.jsonl")
    if not RANK:
        for stale in pathlib.Path(folder).glob(".*-*"):  # of a save that was killed
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        lines = open(path, encoding="utf-8", errors="replace").readlines() if os.path.exists(path) else []
        files.write_text(path, "".join(lines[:done]))
    return open(path, "a")


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024); agrees with
    torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), but in float32, where torch's bfloat16 is 15 times
    slower on many CPUs."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 0.05)
                    update = orthogonalise(p.grad.lerp(momentum, 0.95))  # Nesterov's
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


def orthogonalise(x, steps=5):
    """A matrix -> about U V^T of its singular value decomposition, by Newton-Schulz iteration."""
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def new_optimizers(model, config, faster):
    """AdamW, and where the settings say so Muon on the matrices of the blocks -> [optimiser].
    Weights decay; A_log, D and dt_bias do not (mamba-ssm marks them so), nor do biases, norms and tables.
    Each group's base_lr is its rate at the peak."""
    fast = {id(p) for module in faster for p in module.parameters()}
    groups = {}  # (muon, rate, weight decay) -> parameters
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = config["muon"] and "blocks." in name and p.ndim == 2 and "table" not in name
            rate = config["new_lr"] or config["lr"] if id(p) in fast else config["lr"]
            decay = config["weight_decay"] if p.ndim >= 2 and name.endswith("weight") else 0.0
            groups.setdefault((matrix, rate, decay), []).append(p)
    lists = {False: [], True: []}
    for (matrix, rate, decay), parameters in groups.items():
        lists[matrix].append(dict(params=parameters, lr=rate, base_lr=rate, weight_decay=decay))
    optimizers = [torch.optim.AdamW(lists[False], **config["adamw"])] if lists[False] else []
    return optimizers + ([Muon(lists[True], {})] if lists[True] else [])


def set_rates(optimizers, step, config):
    """Warm-up, then constant, then down to zero -> the rate of most parameters."""
    factor = min(1.0, (step + 1) / config["warmup"])
    if config["decay"]:
        factor *= min(1.0, (config["steps"] - step) / (config["decay"] * config["steps"]))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
    return config["lr"] * factor


def sum_over_processes(tensors):
    """Sum each tensor of a list over all processes, in place."""
    if WORLD > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))


def run(args):
    """What --stage names, and first whatever it needs."""
    if WORLD > 1 and not dist.is_initialized():
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        files.start_processes()
    names = stages_to_run(args)
    for name in names:
        fewest = settings(name, args)["batch_size"] // max(settings(name, args)["sizes"]) ** 2
        if max(1, fewest) < WORLD:
            why = f"{fewest} images of its largest size cannot be shared by {WORLD} processes"
            raise ValueError(f"{name}: {why}; give a larger --batch-size")
    print(f"{' then '.join(names)}, into {args.out}")
    print(t2md.kernels_in_use(args.device, getattr(torch, args.dtype)))
    for name in names:
        job = resolve(name, args)
        with files.lock(job.folder):
            train_stage(job, args)


# fmt: off
def parse_arguments(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--stage", required=True, choices=(*CHAIN, "all"), help="what to run, after what it needs")
    add("--config", default="shapes", choices=CONFIGS, help="the embedded world, or the paper's model")
    add("--quick", action="store_true", help="forcing and kd of the shapes world in three minutes")
    add("--data", default="shapes", help="shapes (default), a folder of images or tar shards, or a quoted "
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
    add("--steps", type=int, help="optimiser steps in all; more than before continues a finished stage")
    add("--batch-size", type=int, help="images of base size a step, over all processes")
    add("--lr", type=float, help="peak learning rate")
    add("--timesteps", type=float, nargs=2, metavar=("MEAN", "DEVIATION"), help="t is normal, not uniform")
    add("--snr-weight", type=float, metavar="A", help="see `noise_weight`; 0: no weights")
    add("--vae", help="folder or repository of the VAE (default: its predecessor's)")
    add("--text-encoder", help="the same for the T5 encoder and its tokenizer")
    add("--examples", type=int, help="pictures drawn at every checkpoint")
    add("--example-size", type=int, metavar="PX", help="their side")
    # fmt: on
    args = parser.parse_args(argv)
    args.out = args.out or CONFIGS[args.config]["out"]
    args.pattern = args.pattern or CONFIGS[args.config]["pattern"]
    if set(args.pattern) - {"S", *t2md.SCANS}:
        parser.error(f"--pattern {args.pattern} must be made of the letters S {' '.join(t2md.SCANS)}")
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
