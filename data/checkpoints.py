"""A stage's folder: the model, the state that a restart needs, the log. All are whole or not there."""

import math
import os
import pathlib
import shutil
import zipfile

import torch

from data import files
from data.files import RANK

STATE = "training_state.pt"


def steps_of(folder):
    """Return (steps that are saved, steps that there were to be) of the stage in a folder.

    Where somebody put a model by hand both are infinite; where nothing is, (0, infinity).
    """
    state = read_state(folder)
    if state is not None:
        return state["step"], state["steps"]
    if os.path.exists(os.path.join(folder, "config.json")):
        return math.inf, math.inf
    return 0, math.inf


def finished(folder):
    """Return True if `folder` holds a completely trained model."""
    done, planned = steps_of(folder)
    return done >= planned


def read_state(folder, check=False):
    """Return the training state in `folder`, or None where no training was.  check: compare check sums.

    Raises ValueError if it is damaged, or gone while the model that was trained with it is there.
    """
    path = os.path.join(folder, STATE)
    if not os.path.exists(path):
        if all(os.path.exists(os.path.join(folder, name)) for name in ("log.jsonl", "config.json")):
            advice = "put it back, or remove log.jsonl to use the model as it is"
            raise ValueError(f"{folder} was trained here, and its training_state.pt is gone: {advice}")
        return None
    try:
        if check and zipfile.ZipFile(path).testzip():  # torch.load looks at no check sum
            raise ValueError("its bytes are not what was written")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises anything
        advice = "move it away to train this stage again"
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); {advice}") from error


def save_model(model, folder):
    """Write config.json and weights, each whole or not at all."""
    temporary = os.path.join(folder, f".saving-{os.getpid()}")
    try:
        model.save_pretrained(temporary)
        for name in os.listdir(temporary):
            files.replace(os.path.join(temporary, name), os.path.join(folder, name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_state(folder, model, ema, optimizers, step, steps):
    """Write all that a restart needs."""
    state = dict(
        step=step,
        steps=steps,
        model=model.state_dict(),
        ema=ema.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in optimizers],
    )
    write_state(folder, state)


def begin(folder, steps):
    """Write a state without weights, unless there is a state. If it is missing later, it was lost."""
    if not os.path.exists(os.path.join(folder, STATE)):
        write_state(folder, dict(step=0, steps=steps))


def write_state(folder, state):
    """Write training_state.pt; the file before it stays until this one is whole."""
    path = os.path.join(folder, STATE)
    files.write_atomically(path, lambda temporary: torch.save(state, temporary))


def resume(folder, model, ema, optimizers):
    """Load what `save_state` wrote, if it is there. Return how many steps are done."""
    state = read_state(folder, check=True)
    if state is None or state["step"] == 0:
        return 0
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    ema.to(model.device)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        saved["param_groups"] = optimizer.state_dict()["param_groups"]  # rates are the settings'
        optimizer.load_state_dict(saved)
    return state["step"]


def remove_leftovers(folder):
    """Remove what a save that was killed has left in a stage's folder."""
    for leftover in pathlib.Path(folder).glob(".*-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def open_log(folder, done):
    """Open log.jsonl to go on after `done` lines; those of steps that were lost are taken back."""
    if RANK > 0:
        return open(os.devnull, "a")
    path = os.path.join(folder, "log.jsonl")
    lines = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
    files.write_text(path, "".join(lines[:done]))
    return open(path, "a")
