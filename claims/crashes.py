"""The claim that no crash loses anything: a short kd run, killed again and again, ends in the same weights.

    python -m claims.crashes                # 100 kills at random moments
    python -m claims.crashes --kills 10 --seed 1

Forcing is run once, then kd without a disturbance, then kd again: kill -9 to its whole process group at a
random moment, the same command again, and so on until it is finished; and from the beginning, until there
were as many kills as asked for. Every run that was killed must have the weights, EMA, optimiser, log (without
seconds) and model files of the undisturbed one, bit for bit, and leave no temporary file.

The processes are forked from one that has only imported train.py: what is killed is its work, not Python's
imports. Exit code 1 if anything differs.
"""

import argparse
import functools
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time

import torch

import sample
import train

PARTS = ("loading", "a step", "a save")  # where a kill can come
KD = ["--stage", "kd", "--steps", "4", "--save-every", "2", "--batch-size", "1"]
FORCING = ["--stage", "forcing", "--steps", "1", "--batch-size", "2"]


def entering(function, before, after, now):
    """`function`, noting in now[0] in which part it is, and in which it leaves the process."""

    def noted(*args, **kwargs):
        now[0] = before
        result = function(*args, **kwargs)
        now[0] = after
        return result

    return noted


def begin(command, out, now):
    """train.py's command in a process, and a group, of its own, without what it prints -> its id."""
    now[0] = 0
    sys.stdout.flush()
    child = os.fork()
    os.setpgid(child, child)  # whichever is first
    if child:
        return child
    try:
        with open(os.path.join(out, "printed.txt"), "a") as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
        train.Run.__init__ = entering(train.Run.__init__, 0, 1, now)
        train.Run.save = entering(train.Run.save, 2, 1, now)
        sys.argv = ["train.py", *command, "--examples", "0", "--device", "cpu", "--out", out]
        train.main()
        sys.stdout.flush()
        os._exit(0)
    except BaseException as error:  # the fork must not go on as a second copy of this program
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


def finish(child, out, allowed=(0,)):
    """Wait for a process -> its exit code, -9 if killed.  Raises ValueError where it is none of `allowed`."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in allowed:
        with open(os.path.join(out, "printed.txt")) as printed:
            why = (printed.read().split("\n") + [""])[-2]
        raise ValueError(f"train.py ended with {code}: {why}")
    return code


def results(out):
    """All that a kd run leaves behind: {what: value}."""
    folder, found = os.path.join(out, "kd"), {}
    state = torch.load(os.path.join(folder, train.STATE), weights_only=True)
    for name in ("network", "ema", "optimizer"):
        leaves = torch.utils._pytree.tree_leaves(state[name])
        found[name] = [v.numpy().tobytes() if torch.is_tensor(v) else v for v in leaves]
    with open(os.path.join(folder, "log.jsonl")) as log:
        found["log"] = [{**json.loads(line), "seconds": None} for line in log]
    for name in sorted(os.listdir(folder)):
        if name.endswith((".json", ".safetensors")):
            with open(os.path.join(folder, name), "rb") as file:
                found[name] = file.read()
    names = (name for _, *both in os.walk(out) for name in sum(both, []))
    found["temporary files"] = [name for name in names if name.endswith(".tmp")]
    return found


def run(args, scratch):
    """Kill until there were args.kills; returns whether everything was as without."""
    now, rng, killed = mmap.mmap(-1, 1), random.Random(args.seed), dict.fromkeys(PARTS, 0)
    begun, whole, out = (os.path.join(scratch, name) for name in ("begun", "whole", "out"))
    os.makedirs(begun)
    finish(begin(FORCING, begun, now), begun)
    shutil.copytree(begun, whole)
    began = time.monotonic()
    finish(begin(KD, whole, now), whole)
    longest, expected, finished, wrong = time.monotonic() - began, results(whole), 0, set()
    while sum(killed.values()) < args.kills:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(begun, out)
        code = -9
        while code:
            child = begin(KD, out, now)
            if sum(killed.values()) < args.kills:
                time.sleep(rng.uniform(0, longest))
                os.killpg(child, signal.SIGKILL)  # one that is done, but not yet waited for, is still there
            code = finish(child, out, (0, -9))
            killed[PARTS[now[0]]] += code != 0
        finished += 1
        wrong |= {name for name, value in results(out).items() if value != expected.get(name)}
    where = ", ".join(f"{count} in {part}" for part, count in killed.items())
    print(f"{sum(killed.values())} kills ({where}), {finished} runs finished: ", end="")
    print(f"{', '.join(sorted(wrong))} differ" if wrong else f"{', '.join(expected)} as without, bit for bit")
    return not wrong


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m claims.crashes", description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=100, help="how many in all (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args()
    if args.kills < 1:
        parser.error("--kills must be at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(not sample.as_command("claims.crashes", functools.partial(run, scratch=scratch), args))


if __name__ == "__main__":
    main()
