"""Train T2MD: one script, stages by flag. With no data and no GPU it runs on the embedded world, "shapes".

    python train.py --stage kd                      # from the shipped teacher: forcing, if not done, then kd
    python train.py --stage all                     # the whole chain from no weights at all
    python train.py --stage data --data DIR_OR_TARS # what a data set of images holds, bucket by bucket

    stage     starts from   trains                    loss           size (x base)
    teacher   nothing       VAE, T5, then the DiT     their own      1
    forcing   teacher       Mamba layers              equation 6     1
    kd        forcing       all token mixers          equation 11    1
    adapt     kd            everything                equation 8     1      (new embedding, schedule, VAE, T5)
    hires1    adapt         everything                equation 8     2 (80% of the images), 1 (20%)
    hires2    hires1        everything                equation 8     4

Each stage writes OUT/STAGE: config.json and safetensors (EMA weights, what sample.py and diffusers load),
made_with.json (all that its result depends on; a folder begun with other things is refused),
training_state.pt (what a restart needs), log.jsonl (a line a step) and pictures, the teacher's above.

Sections: 1 configurations - 2 stages - 3 the loop - 4 from a stage to the loop - 5 command line.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

import sample
import t2md
from data import parts, shapes
from data.images import ImageData
from sample import RANK, WORLD, claim, draw, fingerprint, rank_zero_first
from t2md import ALWAYS_FLOAT32, T2MD, VAE, Attention, MambaMixer, TextEncoder

HERE = os.path.dirname(os.path.abspath(__file__))

# ---------------------------------------------------------------------------------------------------
# 1. Configurations: what all stages of one share
# ---------------------------------------------------------------------------------------------------

# fmt: off
# The defaults of a stage:
#   steps; batch_size: images of base size a step (larger images come in batches smaller by their area)
#   lr, and new_lr for what learns faster; warmup: steps; decay: share of the steps in which lr falls to zero
#   clip: gradient norm; muon: for the matrices of the blocks; ema: decay of the averaged weights
#   timesteps: None is uniform, else mean and deviation of a normal one; snr_weight: see `by_noise`
#   pictures: of the shapes world, per size; save_every (steps) and save_minutes: whichever comes first
PIXART = dict(
    batch_size=256, lr=2e-5, warmup=1000, decay=0.0, betas=(0.9, 0.999), eps=1e-10, weight_decay=0.03,
    muon=False, clip=0.01, ema=0.9999, timesteps=None, snr_weight=False, save_every=1000, save_minutes=10)
TOY = dict(
    batch_size=32, lr=1e-3, warmup=50, decay=0.4, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, muon=True,
    clip=1.0, ema=0.9999, timesteps=None, snr_weight=False, pictures=20_000, save_every=500, save_minutes=2)

CONFIGS = {
    "shapes": dict(
        out="runs/shapes", teacher="assets/teacher", pattern="SHWHWHW", checkpointing=False,
        float32_attention=False, adapt={},  # a second VAE and text encoder of its own
        model=dict(width=128, heads=4, caption_width=64, d_state=32, head_dim=32, chunk_size=32,
                   sample_size=16, renoise=600),
        parts=dict(vae=TOY | dict(steps=2500, batch_size=16, lr=2e-3, decay=0.5, muon=False),
                   text_encoder=TOY | dict(steps=1500, batch_size=128, lr=2e-3, muon=False))),
    "t2md": dict(  # the paper's; its optimiser is not given, so PixArt-alpha's own is used
        out="runs/t2md", teacher="PixArt-alpha/PixArt-XL-2-512x512", pattern="SHWHWHW" * 4,
        checkpointing=True, float32_attention=True,
        adapt=dict(vae="stabilityai/sdxl-vae", text_encoder="google/flan-t5-xxl")),
}
# fmt: on
PARTS = ("vae", "text_encoder")
STATE = "training_state.pt"


# ---------------------------------------------------------------------------------------------------
# 2. Stages: one record each; adding or changing one is an edit here
# ---------------------------------------------------------------------------------------------------


def everything(model):
    return [model]


def mamba_mixers(model):
    return [block.mixer for block in model.blocks if isinstance(block.mixer, MambaMixer)]


def token_mixers(model):
    """Self-attention and Mamba, and what else the teacher does not have."""
    dim = [m for m in model.children() if isinstance(m, (t2md.PaddingTokens, t2md.LocalEnhancement))]
    return [block.mixer for block in model.blocks] + dim


def readers_and_writer(model):
    """The layers that meet another VAE's latents and another text encoder's features."""
    return [model.patch_embed, model.caption_projection, model.proj_out]


# A loss takes (student, teacher, given = (z_t, t, text, mask), noise, backward, conditions), and as keywords
# the weights of L_soft and L_mixer and each image's SNR; it calls backward, returns {name: detached term}.


def by_forcing(student, teacher, given, noise, backward, conditions, **_):
    return dict(forcing=t2md.forcing_loss(student, teacher, *given, backward, **conditions))


def by_distillation(student, teacher, given, noise, backward, conditions, weights, **_):
    loss, terms = t2md.kd_loss(student, teacher, *given, noise, *weights, **conditions)
    backward(loss)
    return terms


def by_noise(student, teacher, given, noise, backward, conditions, snr=None, **_):
    """Equation 8. snr: None, or not the paper's: (B,), each image's error is then weighed by 1 / sqrt(SNR),
    cut to [1, 8], without which what is where and which colour is whose is learned last."""
    predicted = t2md.predict_noise(student, *given, **conditions)
    loss = t2md.mse_loss(noise, predicted)
    terms = dict(mse=loss.detach())
    if snr is not None:
        root = snr.rsqrt().clamp(1.0, 8.0).sqrt()[:, None, None, None]
        loss = t2md.mse_loss(root * noise, root * predicted)
    backward(loss)
    return terms


@dataclass(frozen=True)
class Stage:
    """What a stage is:

    after: the stage whose model it starts from.  changes: entries of that model's config that it replaces.
    trains: model -> modules; the rest stays frozen.  faster: model -> modules that learn at new_lr.
    loss: see above.  asks_teacher: does its loss.  adapted: does it run on the second VAE and text encoder.
    sizes: {multiple of the base size: share of the images}; it is sampled at the largest.
    shapes, t2md: its defaults in each configuration, {} where it is not trained.
    """

    after: str | None
    trains: callable
    loss: callable
    shapes: dict
    t2md: dict
    faster: callable = lambda model: []
    changes: dict = field(default_factory=dict)
    adapted: bool = False
    asks_teacher: bool = False
    sizes: dict = field(default_factory=lambda: {1: 1.0})


# fmt: off
STAGES = {
    "teacher": Stage(
        after=None, trains=everything, loss=by_noise, t2md={},
        shapes=TOY | dict(steps=7500, batch_size=64, lr=4e-3, decay=0.6, timesteps=(580, 230),
                          snr_weight=True)),
    "forcing": Stage(
        after="teacher", trains=mamba_mixers, loss=by_forcing, asks_teacher=True,
        shapes=TOY | dict(steps=1200, batch_size=16, lr=2e-2, warmup=10, pictures=5_000),
        t2md=PIXART | dict(steps=20_000, lr=1e-4, clip=1.0)),
    "kd": Stage(
        after="forcing", trains=token_mixers, loss=by_distillation, asks_teacher=True, faster=mamba_mixers,
        shapes=TOY | dict(steps=1100, lr=4e-3, pictures=5_000),
        t2md=PIXART | dict(steps=180_000, new_lr=1e-4, clip=0.1)),
    "adapt": Stage(
        after="kd", trains=everything, loss=by_noise, faster=readers_and_writer, adapted=True,
        changes=dict(pos_embed="centered", beta_schedule="scaled_linear"),
        shapes=TOY | dict(steps=6000, new_lr=4e-3, warmup=400, timesteps=(640, 240), snr_weight=True,
                          pictures=8_000),
        t2md=PIXART | dict(steps=100_000)),
    "hires1": Stage(
        after="adapt", trains=everything, loss=by_noise, adapted=True, sizes={2: 0.8, 1: 0.2},
        shapes=TOY | dict(steps=3500, timesteps=(700, 230), pictures=2_500),
        t2md=PIXART | dict(steps=40_000)),
    "hires2": Stage(
        after="hires1", trains=everything, loss=by_noise, adapted=True, sizes={4: 1.0},
        shapes=TOY | dict(steps=8000, batch_size=64, timesteps=(800, 200), snr_weight=True,
                          pictures=2_000),
        t2md=PIXART | dict(steps=20_000)),
}
# fmt: on
CHAIN = tuple(STAGES)


def plan_for(name, args):
    """A stage's, or a part's, defaults; the command line's are for the stage it names, or for all."""
    if name in STAGES:
        plan = dict(getattr(STAGES[name], args.config))
    else:
        plan = dict(CONFIGS[args.config]["parts"][name.removesuffix("_adapt")])
    if args.stage in (name, "all"):
        for key in ("steps", "batch_size", "lr", "timesteps", "snr_weight"):
            if getattr(args, key) is not None:
                plan[key] = getattr(args, key)
        if args.lr is not None:
            plan.pop("new_lr", None)
    for key in ("save_every", "save_minutes"):
        if getattr(args, key) is not None:
            plan[key] = getattr(args, key)
    return plan


# ---------------------------------------------------------------------------------------------------
# 3. The loop, of every network here
# ---------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024); agrees with
    torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), but takes matrices of one shape together, and in
    float32, where torch's bfloat16 is 15 times slower on many CPUs."""

    def __init__(self, groups, weight_decay=0.0, momentum=0.95):
        super().__init__(groups, dict(lr=0.0, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, matrices in shapes.items():
                updates = []
                for p in matrices:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))  # Nesterov's
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                for p, update in zip(matrices, orthogonalise(torch.stack(updates))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def orthogonalise(x, steps=5):
    """Matrices (k, m, n) -> about U V^T of each singular value decomposition, by Newton-Schulz iteration."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Optimizer:
    """AdamW, and where the plan says so Muon on the matrices of the blocks, as one; with warm-up and decay.

    Weights decay; A_log, D and dt_bias do not (mamba-ssm marks them so), nor do biases, norms and tables.
    """

    def __init__(self, network, plan, faster=()):
        fast = {id(p) for module in faster for p in module.parameters()}
        groups = {}  # (muon, rate, weight decay) -> parameters
        for name, p in network.named_parameters():
            if p.requires_grad:
                matrix = plan["muon"] and "blocks." in name and p.ndim == 2 and "table" not in name
                rate = plan.get("new_lr", plan["lr"]) if id(p) in fast else plan["lr"]
                decay = plan["weight_decay"] if p.ndim >= 2 and name.endswith("weight") else 0.0
                groups.setdefault((matrix, rate, decay), []).append(p)
        self.parameters = [p for own in groups.values() for p in own]
        of = {False: [], True: []}
        for (matrix, rate, decay), own in groups.items():
            of[matrix].append(dict(params=own, lr=rate, base_lr=rate, weight_decay=decay))
        self.parts = [torch.optim.AdamW(of[False], betas=plan["betas"], eps=plan["eps"])] if of[False] else []
        self.parts += [Muon(of[True])] if of[True] else []
        self.plan = plan

    def step(self, step, skip=False):
        """One update at the rates of `step`, none if `skip` or if the gradient is not finite; returns its
        norm before clipping, nan if skipped."""
        steps, warmup, decay = self.plan["steps"], self.plan["warmup"], self.plan["decay"]
        factor = min(1.0, (step + 1) / warmup)
        if decay:
            factor *= min(1.0, (steps - step) / (decay * steps))
        sum_over_processes([p.grad for p in self.parameters if p.grad is not None])
        norm = math.nan if skip else float(torch.nn.utils.clip_grad_norm_(self.parameters, self.plan["clip"]))
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["base_lr"] * factor
            if math.isfinite(norm):
                part.step()
            part.zero_grad(set_to_none=True)
        return norm

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        """Take the states over; rates and the like stay the plan's.  Raises ValueError if they do not fit."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(part.state_dict() | dict(state=state["state"]))
            for p, own in part.state.items():
                if not all(torch.is_tensor(value) and value.shape in (p.shape, ()) for value in own.values()):
                    raise ValueError("the state of another parameter")


def sum_over_processes(tensors):
    """Sum each tensor of a list over all processes, in place. DistributedDataParallel would do it during the
    backward pass, but knows only of one backward pass a step: forcing has one for each block."""
    if WORLD > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))


def gradient_parts(loss_terms, step, images, micro_batch):
    """Backward passes over a global batch of `images`, each process its share, `micro_batch` at once.

    loss_terms: loss_terms(step, indices, backward) -> {name: detached mean over these indices}; it calls
        backward on every loss it makes.
    Returns {name: mean over the global batch}; gradients are the mean's, once summed over processes.
    Raises ValueError if there are fewer images than processes.
    """
    if images < WORLD:
        raise ValueError(
            f"a batch of {images} at this size cannot be shared by {WORLD} processes; "
            "give a larger --batch-size"
        )
    own, means = range(RANK, images, WORLD), {}
    for start in range(0, len(own), micro_batch):
        indices = own[start : start + micro_batch]
        share = len(indices) / images
        terms = loss_terms(step, indices, lambda loss, share=share: loss.backward(loss.new_tensor(share)))
        for name, term in terms.items():
            means[name] = means.get(name, 0.0) + share * float(term)
    return means


def save_model(model, folder, dtype=torch.float32):
    """save_pretrained into a temporary folder, renamed file by file; in `dtype`, but for ALWAYS_FLOAT32."""
    temporary = folder.rstrip("/") + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if dtype != torch.float32:
            model = copy.deepcopy(model)
            for name, p in model.named_parameters():
                p.data = p.data if name.endswith(ALWAYS_FLOAT32) else p.data.to(dtype)
        model.save_pretrained(temporary)
    except SafetensorError as error:
        raise OSError(f"{folder} could not be written ({error}); what was there is as it was") from error
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(temporary):
        os.replace(os.path.join(temporary, name), os.path.join(folder, name))
    os.rmdir(temporary)


@contextlib.contextmanager
def reading_state(folder, **how):
    """The training state in `folder`, left as it is.  Raises ValueError for all that is wrong with it."""
    path = os.path.join(folder, STATE)
    try:
        yield torch.load(path, map_location="cpu", weights_only=True, **how)
    except torch.OutOfMemoryError:  # not the file's fault
        raise
    except Exception as error:  # torch raises anything
        reason = f"is no readable training state ({type(error).__name__})"
        raise ValueError(f"{path} {reason}; move it away to train this stage again") from error


def saved_step(folder):
    """(steps done, steps planned) of the training in `folder`; (0, None) if there is none.

    Raises ValueError if its training state is not readable.
    """
    if not os.path.exists(os.path.join(folder, STATE)):
        return 0, None
    with reading_state(folder, mmap=True) as state:
        return int(state["step"]), int(state["steps"])


class Run:
    """What of a training is on disk, in `folder`: the log, and the state that a restart goes on from."""

    def __init__(self, name, folder, network, optimizer, plan):
        self.folder, self.steps, self.network, self.optimizer = folder, plan["steps"], network, optimizer
        self.ema = EMAModel(network.parameters(), decay=plan["ema"])
        self.start, _ = saved_step(folder)
        if self.start:
            with reading_state(folder) as state:
                if zipfile.ZipFile(os.path.join(folder, STATE)).testzip():  # torch.load asks no check sum
                    raise ValueError("bytes that are not what was written")
                network.load_state_dict(state["network"])
                self.ema.load_state_dict(state["ema"])
                if [p.shape for p in self.ema.shadow_params] != [p.shape for p in network.parameters()]:
                    raise ValueError("the averages of another network")
                self.ema.to(next(network.parameters()).device)
                optimizer.load_state_dict(state["optimizer"])
            print(f"{name}: continuing after step {self.start} of {self.steps}")
        log = os.path.join(folder, "log.jsonl")
        if not RANK:  # lines of steps that were lost are taken back
            lines = []
            if self.start and os.path.exists(log):
                with open(log, encoding="utf-8", errors="replace") as file:
                    lines = file.readlines()
            sample.write_text(log, "".join(lines[: self.start]))
        self.log = open(os.devnull if RANK else log, "a")
        self.saved = time.time()

    def write_line(self, **entries):
        self.log.write(json.dumps(entries) + "\n")
        self.log.flush()

    def save(self, step, export, show=None):
        """With the EMA weights in the network: export(folder), show(path of a picture); then the state."""
        with rank_zero_first():
            if not RANK:
                self.ema.store(self.network.parameters())
                self.ema.copy_to(self.network.parameters())
                export(self.folder)
                if show:
                    show(os.path.join(self.folder, f"step-{step:06d}.png"))
                self.ema.restore(self.network.parameters())
                parts = dict(network=self.network, ema=self.ema, optimizer=self.optimizer)
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= dict(step=step, steps=self.steps)
                path = os.path.join(self.folder, STATE)
                sample.write_atomically(path, functools.partial(torch.save, state))
        self.saved = time.time()


def fit(name, folder, network, loss_terms, export, plan, args, show=None, images=None, faster=()):
    """The training loop: resumes, logs, keeps an EMA, saves atomically; the first process writes.

    network: what is trained; parameters that require no gradient stay as they are.
    loss_terms: see `gradient_parts`.  images: images(step), of the global batch; None: the plan's batch_size.
    export: export(folder) writes the model files.  show: show(path) draws pictures, every save_every steps.
    faster: the modules that learn at the plan's new_lr.
    SIGTERM saves after the step it comes in, and exits.
    Raises FloatingPointError after ten steps in a row whose loss or gradient was not finite.
    """
    optimizer = Optimizer(network, plan, faster)
    run = Run(name, folder, network, optimizer, plan)
    skipped, stopping = 0, []
    default = signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    steps = range(run.start, plan["steps"])
    bar = tqdm(steps, name, initial=run.start, total=plan["steps"], mininterval=1, disable=RANK > 0)
    for step in bar:
        began = time.time()
        batch_size = images(step) if images else plan["batch_size"]
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            terms = gradient_parts(loss_terms, step, batch_size, args.micro_batch or batch_size)
        late = not RANK and began - run.saved > 60 * plan["save_minutes"]
        shared = torch.tensor([*terms.values(), bool(stopping), late], device=args.device).double()
        sum_over_processes([shared])
        *values, told_to_stop, late = shared.tolist()
        norm = optimizer.step(step, skip=not all(map(math.isfinite, values)))
        skipped = 0 if math.isfinite(norm) else skipped + 1
        if skipped == 10:
            why = f"loss or gradient was not finite ten steps in a row (step {step})"
            advice = f"the last checkpoint in {folder} is as it was. Try a smaller --lr"
            raise FloatingPointError(f"{name}: {why}; {advice}")
        if not skipped:
            run.ema.step(network.parameters())
        terms = dict(zip(terms, values), gradient=norm)
        run.write_line(step=step, **terms, skipped=skipped > 0, seconds=round(time.time() - began, 3))
        bar.set_postfix({key: f"{value:.4g}" for key, value in terms.items()})
        regular = (step + 1) % plan["save_every"] == 0 or step + 1 == plan["steps"]
        if regular or late or told_to_stop:
            run.save(step + 1, export, show if regular and not told_to_stop else None)
        if told_to_stop:
            done = f"saved after step {step + 1}; the same command continues from there"
            sys.exit(f"{name}: told to stop; {done}")
    signal.signal(signal.SIGTERM, default)


# ---------------------------------------------------------------------------------------------------
# 4. From a stage to the loop
# ---------------------------------------------------------------------------------------------------


def locate(name, args):
    """Where the model of a stage, or a part, is or will be: (path, origin); None: trained in OUT."""
    config, part = CONFIGS[args.config], name.removesuffix("_adapt")
    own, own_teacher = os.path.join(args.out, name), os.path.isdir(os.path.join(args.out, "teacher"))
    shipped = os.path.join(HERE, config["teacher"] if name == "teacher" else os.path.join("assets", name))
    from_nothing = args.config != "shapes" or args.stage == "all" or own_teacher
    may_be_shipped = not from_nothing and os.path.isdir(shipped)
    if name == "teacher" and args.stage != "teacher":
        if args.teacher or args.config != "shapes":
            return args.teacher or config["teacher"], "given"
        return (shipped, "shipped") if may_be_shipped else (own, None)
    if name.endswith("_adapt"):
        if part in config["adapt"]:
            return config["adapt"][part], "given"
        return (shipped, "shipped") if may_be_shipped else (own, None)
    return own, None


def needs(name, args):
    """What a stage or part cannot begin without."""
    if name not in STAGES:
        return []
    if name == "teacher":
        return [] if args.teacher else [part for part in PARTS if not getattr(args, part)]
    first = comes_after(name, args)
    swaps = STAGES[name].adapted and not STAGES[first].adapted
    return [first] + ["teacher"] * STAGES[name].asks_teacher + [f"{part}_adapt" for part in PARTS if swaps]


def comes_after(name, args):
    """The stage whose model `name` starts from."""
    return "teacher" if name == "kd" and args.init != "forcing" else STAGES[name].after


def starting_point(name, args):
    """The folder or repository of the model that a stage starts from; None: from nothing."""
    return args.teacher if name == "teacher" else locate(comes_after(name, args), args)[0]


def work_out(args):
    """What must run for what --stage names, first things first -> names; printed as a plan.

    Raises ValueError where a finished folder was made with other things than this run's.
    """
    states, to_do = {}, {}

    def need(name, asker=None):
        if name in states:
            return
        path, origin = locate(name, args)
        done, planned = saved_step(path) if origin is None else (0, 0)
        steps = plan_for(name, args)["steps"] if origin is None else 0
        if origin is None and (planned is None or done < (planned if asker else steps)):
            for other in needs(name, args):
                need(other, name)
            to_do[name] = steps - done
            states[name] = f"to do, {steps - done:,} steps"
        else:
            states[name] = origin or "finished"
        if origin is None and done and name in STAGES:
            claim(path, shared_with(asker, name, args) if asker else made_with(name, args), begun=True)

    trained = [name for name in CHAIN if getattr(STAGES[name], args.config)]
    if args.stage not in ("all", *trained):
        start = f"it starts from {CONFIGS[args.config]['teacher']}, or give --teacher"
        raise ValueError(f"--config {args.config} trains no {args.stage}: {start}")
    for name in trained if args.stage == "all" else [args.stage]:
        need(name)
    print("; ".join(f"{name}: {state}" for name, state in states.items()) + time_for(to_do, args))
    return list(to_do)


# Of a training step of the shapes world, for an image of base size or a caption; as claims/counts.py counts
GFLOP = dict(vae=1.88, text_encoder=0.006, teacher=0.93, forcing=0.63, kd=1.12, adapt=1.11, hires1=1.06)
GFLOP["hires2"] = 1.11


def matmul_rate(dtype):
    """Operations a second of 512 x 512 matrices on this CPU, the best of ten."""
    x, least = torch.ones(512, 512, dtype=dtype), math.inf
    for _ in range(10):
        began = time.perf_counter()
        x @ x
        least = min(least, time.perf_counter() - began)
    return 2 * 512**3 / least


def time_for(to_do, args):
    """About how long the plan {name: steps} takes: the shapes world trains at about a fifth of a CPU's rate
    for matrix products; of anything else nothing is said."""
    if args.config != "shapes" or args.device != "cpu" or not to_do:
        return ""
    images = {name: steps * plan_for(name, args)["batch_size"] for name, steps in to_do.items()}
    count = sum(GFLOP[name.removesuffix("_adapt")] * 1e9 * number for name, number in images.items())
    return f"; about {5 * count / (WORLD * matmul_rate(torch.float32)) / 60:,.0f} minutes on this CPU"


def named_part(checkpoint, part):
    """Where the VAE or text encoder is that a checkpoint names; a plain pipeline has its own inside."""
    return sample.component_path(checkpoint, t2md.read_config(checkpoint).get(part))


def part_for(part, name, args):
    """Where the VAE or text encoder is that a stage trains with."""
    if args.stage == name and getattr(args, part):
        return getattr(args, part)
    if name == "teacher":
        return named_part(args.teacher, part) if args.teacher else locate(part, args)[0]
    first = comes_after(name, args)
    if STAGES[name].adapted and not STAGES[first].adapted:
        return locate(f"{part}_adapt", args)[0]
    return named_part(locate(first, args)[0], part)


def student_shape(args):
    """The arguments of T2MD in which a student differs from its teacher."""
    names = ("pattern", "padding_tokens", "local_enhancement")
    return {name: getattr(args, name) for name in names}


def changes(name, args):
    """The entries of the config of its predecessor's model that a stage replaces."""
    own = STAGES[name].changes
    return own | {key: args.pos_embed for key in own if key == "pos_embed" and args.pos_embed}


def made_with(name, args):
    """All that the result of a stage depends on, but for the number of steps, which may grow."""
    made = {part: fingerprint(part_for(part, name, args)) for part in PARTS}
    if STAGES[name].asks_teacher:
        made = dict(teacher=fingerprint(locate("teacher", args)[0])) | student_shape(args) | made
    made |= dict(data=args.data, seed=args.seed, dtype=args.dtype) | plan_for(name, args)
    if name == "kd":
        made |= dict(init=args.init, soft_weight=args.soft_weight, mixer_weight=args.mixer_weight)
    if changes(name, args) != STAGES[name].changes:
        made |= changes(name, args)
    first = starting_point(name, args)
    if first and (os.path.isdir(first) or not os.path.isabs(first)):
        made["starts_from"] = fingerprint(first)
    return {key: value for key, value in made.items() if key not in ("steps", "save_every", "save_minutes")}


def shared_with(name, before, args):
    """Of `made_with`, what a stage must have in common with the finished one before it."""
    shared = {"vae", "text_encoder"} if STAGES[name].adapted == STAGES[before].adapted else set()
    if STAGES[name].asks_teacher and STAGES[before].asks_teacher:
        shared |= {"teacher", *student_shape(args)}
    return {key: value for key, value in made_with(name, args).items() if key in shared}


def start_model(name, args):
    """The network that a stage begins with."""
    stage, first = STAGES[name], starting_point(name, args)
    before = t2md.load_backbone(first, **changes(name, args)) if first else None
    torch.manual_seed(zlib.crc32(f"{args.seed}/{name}".encode()))
    if before is None:
        return T2MD(pattern="S" * len(args.pattern), pos_embed="pixart", **CONFIGS[args.config]["model"])
    if name != "teacher" and comes_after(name, args) == "teacher":  # the student's beginning
        if args.init == "llama" and name == "kd":
            before = T2MD.from_attention(first, **student_shape(args))
        else:
            before = T2MD.from_teacher(before, **student_shape(args))
        if args.init == "scratch" and name == "kd":
            before = T2MD(**before.arguments())
    larger = max(stage.sizes) // max(STAGES[stage.after].sizes) if stage.after else 1
    if larger > 1:  # it is sampled at that size unless told otherwise, at the same coordinates
        scale = larger * before.interpolation_scale
        before.register_to_config(sample_size=larger * before.config.sample_size, interpolation_scale=scale)
        before.register_to_config(use_additional_conditions=before.conditioned_on_size)
    return before


def noise_schedule(model):
    """diffusers' forward process (equation 1) on the 1000-step schedule that a model's config names."""
    return DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2, beta_schedule=model.config.beta_schedule)


def stage_terms(
    name, student, teacher, schedule, batch, backward, signal=None, weights=(0.5, 0.2), **conditions
):
    """One step's forward and backward pass on a batch of `ImageData` -> {name: detached term}.

    signal: None, or how much a picture's features stand out from the noise beside those that `schedule` was
    made for: a shape of m times the size m times as well, latents of 1/4 of the amplitude 1/4 as well.
    weights: of L_soft and L_mixer in kd.  conditions: see `sample.size_conditions`.
    """
    t, noise = batch["t"], batch["noise"]
    alpha_bar = schedule.alphas_cumprod.to(t.device)[t]
    given = schedule.add_noise(batch["z0"], noise, t), t, batch["text"], batch["mask"]
    snr = signal and signal**2 * alpha_bar / (1 - alpha_bar)
    return STAGES[name].loss(student, teacher, given, noise, backward, conditions, weights=weights, snr=snr)


def picture_source(args, pixels, count):
    """--data; of the shapes world the first process draws `count` pictures, unless they are there."""
    if args.data != "shapes":
        return args.data
    folder = os.path.join(args.out, "pictures", f"{pixels}px-{count}-seed{args.seed}")
    with rank_zero_first():
        return shapes.write_shards(folder, pixels, count, args.seed)


def open_data(name, args, vae, text_encoder, base):
    """{multiple of the base size: its ImageData}; the shapes world is always encoded once."""
    plan, index, cache, data = plan_for(name, args), os.path.join(args.out, "index"), args.cache, {}
    if args.data == "shapes":
        cache = cache or os.path.join(args.out, "features_adapt" if STAGES[name].adapted else "features")
    count = min(plan.get("pictures", 20_000), plan["steps"] * plan["batch_size"])
    for m in STAGES[name].sizes:
        source = picture_source(args, m * base, count)
        data[m] = ImageData(source, m * base, vae, text_encoder, args.seed, index, cache)
    return data


def sizes_of_steps(name, args, plan):
    """For every step: the multiple of the base size that it trains at, how many images that is, and how many
    steps of that size came before -> three lists.

    The shares of a stage are of its images: larger ones come in smaller batches, and so more often.
    """
    sizes = STAGES[name].sizes
    images = {m: max(1, plan["batch_size"] // m**2) for m in sizes}
    weights = torch.tensor([share / images[m] for m, share in sizes.items()])
    multiples, turns, seen = [], [], dict.fromkeys(sizes, 0)
    for step in range(plan["steps"]):
        m = list(sizes)[int(torch.multinomial(weights, 1, generator=draw(args.seed, name, step, -1)))]
        multiples.append(m)
        turns.append(seen[m])
        seen[m] += 1
    return multiples, [images[m] for m in multiples], turns


def example_captions(args, prompts):
    """The captions of what is drawn: of --example-prompts, or of the data, the first --examples."""
    if args.example_prompts:
        prompts = [record["prompt"] for record in sample.read_prompts(args.example_prompts)]
    return [prompts[k] for k in range(min(args.examples, len(prompts)))]


def teacher_row(name, args, teacher, vae, text_encoder, captions, data, base):
    """What stands above a student's pictures: its teacher's, kept on disk from forcing on, so that later
    stages need not load it; above the teacher's own, the pictures that its captions are of."""
    if name == "teacher":
        return [data.picture(k)[1] for k in range(len(captions))]
    row = []
    for k, caption in enumerate(captions):
        path = os.path.join(args.out, "teacher_pictures", f"{sample.slug(caption)[:80]}-{args.seed + k}.png")
        if teacher and not os.path.exists(path):
            (image,) = sample.generate(teacher, vae, text_encoder, [caption], (base, base), [args.seed + k])
            sample.write_png(path, image)
        row.append(Image.open(path) if os.path.exists(path) else Image.new("RGB", (base, base), "white"))
    return row


def ready(model, stage, checkpointing):
    """A model as a stage trains it: what the stage does not train is frozen."""
    model.requires_grad_(False)
    for module in stage.trains(model):
        module.requires_grad_(True)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def networks(name, args, folder):
    """What a stage works with: model, teacher (None if its loss asks none), VAE, TextEncoder; the model's
    config names the latter two, local ones relative to its own `folder`."""
    stage, config = STAGES[name], CONFIGS[args.config]
    paths = {part: part_for(part, name, args) for part in PARTS}
    vae, text_encoder = VAE(paths["vae"], args.device), TextEncoder(paths["text_encoder"], device=args.device)
    model = start_model(name, args).to(args.device)
    for part, path in paths.items():
        model.register_to_config(**{part: os.path.relpath(path, folder) if os.path.isdir(path) else path})
    teacher = sample.load_denoiser(locate("teacher", args)[0], args.device) if stage.asks_teacher else None
    model = ready(model, stage, config["checkpointing"])
    for block in (*model.blocks, *(teacher.blocks if teacher else ())):
        if isinstance(block.mixer, Attention):
            block.mixer.float32 = config["float32_attention"]
    return model, teacher, vae, text_encoder


def train_stage(name, args):
    """Run or continue one stage whose needs are met."""
    stage, plan, folder = STAGES[name], plan_for(name, args), locate(name, args)[0]
    claim(folder, made_with(name, args), begun=saved_step(folder)[0] > 0)
    model, teacher, vae, text_encoder = networks(name, args, folder)
    base = model.config.sample_size * vae.factor // max(stage.sizes)
    data = open_data(name, args, vae, text_encoder, base)
    smallest = data[min(data)]
    captions = example_captions(args, smallest.prompts)
    text_encoder = sample.encode_first(text_encoder, ["", *captions])  # the device's is the data's alone
    schedule, (multiples, images, turns) = noise_schedule(model), sizes_of_steps(name, args, plan)

    def loss_terms(step, indices, backward):
        m, generators = multiples[step], [draw(args.seed, name, step, i) for i in indices]
        batch = data[m].batch(turns[step], indices, images[step], generators, plan["timesteps"])
        batch = {key: value.to(args.device) for key, value in batch.items()}
        size = [side * vae.factor for side in batch["z0"].shape[-2:]]
        conditions = sample.size_conditions(model, *size, len(indices))
        signal = vae.scale * m if plan["snr_weight"] else None
        weights = args.soft_weight, args.mixer_weight
        return stage_terms(name, model, teacher, schedule, batch, backward, signal, weights, **conditions)

    row = [] if RANK else teacher_row(name, args, teacher, vae, text_encoder, captions, smallest, base)

    def show(path):
        sizes = [(m * base, m * base) for m in sorted(data)]
        rows = [sample.generate_all(model, vae, text_encoder, captions, size, args.seed) for size in sizes]
        sample.write_png(path, sample.contact_sheet([row, *rows], base))

    more = dict(show=show if captions else None, images=images.__getitem__, faster=stage.faster(model))
    fit(name, folder, model, loss_terms, functools.partial(save_model, model), plan, args, **more)
    for m, source in data.items():
        if source.skipped:
            skipped = ", ".join(f"{n} x {why}" for why, n in source.skipped.items())
            print(f"skipped at {m * base} px: {skipped}")
    memory, drawn = peak_memory(args.device), os.path.join(folder, f"step-{plan['steps']:06d}.png")
    print(f"{name}: {plan['steps']} steps done, peak memory {memory:.1f} GiB, the model is in {folder}")
    if captions:
        print(f"its pictures, under the teacher's: {drawn}")


def train_part(name, args):
    """Train a small VAE or text encoder of the shapes world into OUT/name."""
    folder, plan = locate(name, args)[0], plan_for(name, args)
    claim(folder, dict(seed=args.seed, dtype=args.dtype), begun=saved_step(folder)[0] > 0)
    args = argparse.Namespace(**vars(args) | dict(device="cpu"))  # small, and drawn on the CPU

    def fit_part(network, loss_terms, export):
        fit(name, folder, network, loss_terms, export, plan, args)

    parts.train_part(name, args.seed, fit_part, save_model)


def peak_memory(device):
    """GiB that this process has held at once: of the card's memory, or of the machine's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def look_at_data(args):
    """--stage data: print how many images each bucket of --data has and what was skipped and why, and write
    OUT/data.png, 24 of them with their captions."""
    pixels = args.size or {"shapes": 128, "t2md": 512}[args.config]
    path = os.path.join(args.out, "data.png")
    index = os.path.join(args.out, "index")
    data = ImageData(picture_source(args, pixels, 1000), pixels, None, None, args.seed, index)
    numbers = [k for batch in data.order(0, 1)[:24] for k in batch]
    found = [data.picture(k) for k in numbers]
    print(f"{len(data.items)} images in {len(data.buckets)} buckets of about {pixels} x {pixels} px:")
    for (height, width), members in sorted(data.buckets.items()):
        print(f"  {width:5} x {height:<5} {len(members):8}")
    print(f"{sum(data.skipped.values())} skipped")
    for reason, count in data.skipped.most_common():
        print(f"  {count:8} {reason}")
    rows = [found[k : k + 6] for k in range(0, len(found), 6)]
    captions = [[data.prompts[k] for k, _ in row] for row in rows]
    sheet = sample.contact_sheet([[image for _, image in row] for row in rows], 192, captions)
    sample.write_png(path, sheet)
    print(path)


# ---------------------------------------------------------------------------------------------------
# 5. Command line
# ---------------------------------------------------------------------------------------------------


def say_if_slower():
    """Without instructions for bfloat16 a CPU multiplies its matrices slower than float32's: say so."""
    ratio = matmul_rate(torch.float32) / matmul_rate(torch.bfloat16)
    if ratio > 1:
        print(f"--dtype bfloat16: on this CPU matrices multiply {ratio:.1f} times slower than in float32")


def run(args):
    """What --stage names, and first whatever it needs."""
    if WORLD > 1 and not dist.is_initialized():
        start_processes(args)
    if args.stage == "data":
        return look_at_data(args)
    if args.dtype == "bfloat16" and args.device == "cpu":
        say_if_slower()
    for name in work_out(args):
        (train_stage if name in STAGES else train_part)(name, args)


# fmt: off
def add_stage_flags(add):
    add("--steps", type=int, help="optimiser steps in all; more than before continues a finished stage")
    add("--batch-size", type=int, help="images of base size a step, over all processes")
    add("--micro-batch", type=int, help="images a process takes at once; their gradients add up")
    add("--lr", type=float, help="peak learning rate")
    add("--timesteps", type=float, nargs=2, metavar=("MEAN", "DEVIATION"), help="t is normal, not uniform")
    add("--snr-weight", action=argparse.BooleanOptionalAction, help="weigh errors of eq. 8 by 1 / sqrt(SNR)")
    add("--vae", help="folder or repository of the VAE (default: its predecessor's)")
    add("--text-encoder", help="the same for the T5 encoder and its tokenizer")
    add("--init", default="forcing", choices=("scratch", "teacher", "forcing", "llama"),
        help="what kd starts from: nothing, all of the teacher but its mixers, forcing, its attention too")
    add("--pos-embed", choices=t2md.COORDINATES, help="of adapt, the claim's control: the teacher's, pixart")
    add("--soft-weight", type=float, default=0.5, help="of L_soft in kd (default 0.5; 0 switches it off)")
    add("--mixer-weight", type=float, default=0.2, help="of L_mixer in kd (default 0.2; 0 switches it off)")


def add_flags(add):
    add("--stage", required=True, choices=(*CHAIN, "all", "data"), help="what to run, after what it needs")
    add("--config", default="shapes", choices=CONFIGS, help="the embedded world, or the paper's model")
    add("--data", default="shapes", help="shapes (default), a folder with metadata.jsonl, or a quoted "
        "glob of WebDataset tar shards; --stage data shows what is in it")
    add("--size", type=int, help="of --stage data: base size of the buckets, in pixels")
    add("--cache", metavar="DIR", help="encode images and captions once, into DIR, and train from there")
    add("--out", help="folder of all checkpoints, logs and pictures (default: runs/CONFIG)")
    add("--teacher", help="the teacher's folder (default: the one in OUT, else the config's); with --stage "
        "teacher, one to train further")
    add("--pattern", help="the student's mixers, a letter a block: S H W > < v ^ (default: the config's)")
    add("--padding-tokens", action="store_true", help="DiM's: 3 learned tokens end every row and column")
    add("--local-enhancement", action="store_true", help="DiM's: 3x3 convolutions around the blocks")
    add("--seed", type=int, default=0, help="of every random draw (default 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: by autocast")
    add("--examples", type=int, default=12, help="pictures drawn at every checkpoint (default 12)")
    add("--example-prompts", help="a .txt or .jsonl of captions for them (default: the data's first)")
    add("--save-every", type=int, help="steps between checkpoints with pictures")
    add("--save-minutes", type=float, help="minutes after which a checkpoint is due in any case")
# fmt: on


def parse_arguments(argv=None):
    epilog = ["defaults of each stage, by config:"]
    for config in CONFIGS:
        for name, stage in STAGES.items():
            plan = getattr(stage, config)
            defaults = ", ".join(f"{k} {v}" for k, v in plan.items())
            epilog += [f"  {config:7} {name:9}{defaults}"] if plan else []
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog="\n".join(epilog), formatter_class=raw)
    add_flags(parser.add_argument)
    add_stage_flags(
        parser.add_argument_group("the stage that --stage names (with all: every one)").add_argument
    )
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "micro_batch", "save_every", "size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.timesteps and not (0 <= args.timesteps[0] < 1000 and 0 < args.timesteps[1] < float("inf")):
        parser.error("--timesteps must be a mean in [0, 1000) and a positive deviation")
    args.out = args.out or CONFIGS[args.config]["out"]
    args.pattern = args.pattern or CONFIGS[args.config]["pattern"]
    return args


def start_processes(args):
    """Under torchrun: a device each, and one folder OUT that all of them see, on whichever node they are."""
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    # a week: others wait while the first process draws, encodes or saves
    dist.init_process_group("nccl" if "cuda" in args.device else "gloo", timeout=datetime.timedelta(days=7))
    mark = os.path.join(args.out, f".shared-{os.environ.get('TORCHELASTIC_RUN_ID', 'run')}")
    with rank_zero_first():
        if not RANK:
            sample.write_text(mark, "")
    seen = torch.tensor([float(os.path.exists(mark))], device=args.device)
    dist.all_reduce(seen)
    if not RANK:
        os.remove(mark)
    if int(seen) < WORLD:
        which = "is not one folder for all processes; on several nodes it must be shared"
        raise ValueError(f"--out {args.out} {which}")
    if RANK:
        sys.stdout = open(os.devnull, "w")


def main():
    stopped = "stopped; the same command continues from the last checkpoint"
    sample.as_command("train.py", run, parse_arguments(), stopped)


if __name__ == "__main__":
    main()
