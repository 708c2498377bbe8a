"""A training run: its folder, logs, checkpoints, Ctrl-C, progress. No reinforcement learning is in this file.

How a script uses it:

    args = parse(Args, DEFAULTS)              # command line > the task's settings > Args'; with --resume: the run's own
    run = Run(args, num_iterations, steps)    # seeds, threads, runs/<env>__<script>__<seed>__<time>/
    run.restore(policy, env, actor=actor)     # what checkpoint.pt holds; loads it with --resume
    for iteration in run:                     # saves when due; ends after the last, --stop-after, Ctrl-C or a NaN
        run.episodes(info)                    # after each step: episodes that ended
        run.lap("simulate")                   # seconds since the last lap
        run.mean({"losses/value_loss": x})    # of one of many updates: the row has the mean
        run.log({"losses/kl": 0.1})           # a number's TensorBoard tag; the last part is its column in metrics.csv
"""

import io
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections import defaultdict, deque
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from math import inf
from pathlib import Path

import numpy as np
import torch

from diffsim import memory, ranks, run_files
from diffsim.flags import explain, fail, load, one_line_errors, run_folder, script
from diffsim.play import record
from diffsim.policy import differences, evaluating, import_compiler, write_policy
from diffsim.program import tell, unwind
from diffsim.run_files import Tables, hold, make_folder, process_start, read_rows, release, try_folder, write_whole
from diffsim.tasks import is_file

PATIENCE = 20  # rows without one finite gradient; then the run stops
OF_A_RUN = "temperature", "return_scale"  # parts that depend on a run's flags and rewards: --init-from leaves them out
NONFINITE = "physics/nonfinite_states"
OF_A_RANK = "env", "return_scale"  # parts that differ between the processes of torchrun


def column(tag: str) -> str:
    """A number's name in metrics.csv: losses/kl is kl, eval/episodic_return is eval_return."""
    return tag.replace("eval/episodic", "eval").split("/")[-1]


class Run:
    """`num_iterations` iterations of `steps` environment steps each; averages are of the latest `episodes` episodes."""

    def __init__(self, args, num_iterations: int, steps: int, episodes: int = 100):
        self.args, self.total, self.steps = args, num_iterations, steps
        self.iteration = self.global_step = 0
        self.recent: deque = deque(maxlen=episodes)  # (return, length), of a task with goals successes, too
        self.ended: list = []  # the same of this process, since the last row
        self.numbers: dict[str, float] = {}  # of this iteration, by tag
        self.sums: dict[str, float] = defaultdict(float)  # since the last row: seconds of laps, bad states
        self.tags: dict[str, str] = {}  # by column
        self.means: dict[str, list] = defaultdict(list)  # since the last row, to be averaged
        self.start = process_start()  # compilation included; of a resumed run, less what it was away
        self.lap_start = self.shown = time.time()
        self.interrupted, self.nonfinite = 0, []  # by this signal, seen here; tags of the last row
        sys.excepthook = explain
        import_compiler()
        memory.limit(args.device)
        self.best, self.left_out = -inf, 0  # return of the best evaluation; successive rows without any gradient
        self.warned = self.moved = self.stuck = False  # some were left out; some were not; all were for too long
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(ranks.seed(args.seed))
        torch.set_num_threads(args.num_threads)
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # see _say
        flag, self.folder = "--run-dir", Path(args.run_dir)
        if args.resume is not None:
            flag, self.folder = "--resume", run_folder(args.resume)
        try:
            try_folder(self.folder)  # before anything is compiled
        except OSError as e:
            fail(f"{flag} {self.folder}: cannot write there ({e.strerror})")

    def restore(self, policy: torch.nn.Module, env, **parts):
        """Checkpoints hold env and `parts`, all with state_dict and load_state_dict; `policy` is what is exported."""
        self.policy, self.env, self.parts, rows = policy, env, dict(env=env, **parts), []
        if self.args.capture_video and env.mj_model is None:
            fail(f"--capture-video: {self.args.env} does not run on MuJoCo")
        if self.args.resume is not None:
            rows = self._load(load(self.args.resume))
        elif self.args.init_from is not None:
            self._init_from(load(self.args.init_from, "--init-from"))
        ranks.broadcast(*(x for name, x in parts.items() if hasattr(x, "buffers") and name not in OF_A_RANK))
        self.end = self._find_end()
        if ranks.RANK == 0:
            self._open(rows)
        own = [f"{f.name}={v}" for f in fields(self.args) if (v := getattr(self.args, f.name)) != f.default]
        more = f", {self.total - self.end} more after --stop-after" if self.end < self.total else ""
        self._say(f"{self.folder}: {self.end - self.iteration} iterations of {self.steps} steps{more}; {' '.join(own)}")

    def _open(self, rows: list[dict]):
        """The folder, config.json and the tables, which the first process keeps for all."""
        with one_line_errors():  # what cannot be exported is not trained for an hour first
            write_policy(self.policy, self.env.single_observation_space.shape[0], self.env.device, io.BytesIO())
            if self.args.resume is None:
                run_files.check_parts(self.parts)
        with self._writing():
            if self.args.resume is None:
                env = self.args.env.split(":")[-1].lower().replace("/", "-")
                name = f"{env}__{script()}__{self.args.seed}"
                self.folder = make_folder(self.folder / f"{name}__{time.strftime('%Y%m%d-%H%M%S')}")
            with one_line_errors():
                hold(self.folder)
            if changed := run_files.keep_code(self.folder, self.args.env, self.iteration):
                self._say(f"the code has changed since the run began: {self.folder} has {', '.join(changed)}, too")
            text = run_files.config(self.args, script(), self.iteration, self.folder / "config.json")
            write_whole(self.folder / "config.json", lambda path: path.write_text(text))
            self.tables = Tables(self.folder, self.args, rows, self.global_step)

    def _find_end(self) -> int:
        """The iteration before which this process stops. Ends the program with one line where none is to go."""
        flag, stop = f"--resume {self.args.resume}", self.args.stop_after
        if self.total < self.iteration:
            fail(f"--total-timesteps comes to {self.total} iterations, {flag} has done {self.iteration}")
        if self.iteration == self.total:
            self._say(f"{flag} is complete, {self.global_step} steps: a larger --total-timesteps lengthens it")
            raise SystemExit(0)
        if stop is not None and stop <= self.iteration:
            fail(f"--stop-after {stop} counts from the beginning: {flag} has done {self.iteration} of {self.total}")
        return min(self.total, stop or self.total)

    def _init_from(self, checkpoint: dict):
        """Networks and normalisers of another run; optimisers, counters and environments are new."""
        given = f"--init-from {self.args.init_from}"
        parts = {k: x for k, x in self.parts.items() if hasattr(x, "parameters") and k not in OF_A_RUN}
        if not checkpoint.keys() & (networks := [k for k, x in parts.items() if [*x.parameters()]]):
            fail(f"{given}: a run of {checkpoint['script']}.py, which has no {networks[0]}")
        for name, part in parts.items():
            try:
                if name in checkpoint:
                    part.load_state_dict(checkpoint[name])
                else:  # a fork's
                    self._say(f"{given} has no {name}: it begins new")
            except (RuntimeError, TypeError, AttributeError):
                fail(f"{given}: its {name} differs: {differences(checkpoint[name], part.state_dict())}")
        self._say(f"{given}: this run begins with its {', '.join(k for k in parts if k in checkpoint)}")

    def _load(self, checkpoint: dict) -> list[dict]:
        """The state of a checkpoint; returns the rows of metrics.csv up to it."""
        name, total = "iteration", getattr(self.args, "total_timesteps", None)
        if missing := [name for name in self.parts if name not in checkpoint]:
            fail(f"--resume {self.folder}: a checkpoint of another version, without {', '.join(missing)}")
        try:
            self.iteration, self.global_step = checkpoint["iteration"], checkpoint["global_step"]
            if ranks.RANK:
                checkpoint |= checkpoint["others"][ranks.RANK - 1]
            if type(self.iteration) is not int or self.global_step != self.iteration * self.steps:
                raise ValueError
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint[name])
            name = "state of the run"
            ranks.set_random_state(checkpoint, self.env.device)
            self.best, self.left_out = checkpoint["best"] + 0.0, checkpoint["left_out"] + 0
            self.moved = checkpoint["moved"] is True
            self.recent.extend(tuple(x + 0 for x in episode) for episode in checkpoint["recent"])  # they are numbers
            self.sums.update({tag: x + 0 for tag, x in checkpoint["sums"].items()})
            self.means.update({tag: [x.to(self.env.device) for x in xs] for tag, xs in checkpoint["means"].items()})
            self.start -= checkpoint["wall_time_s"]
            before = checkpoint["args"].get("total_timesteps")
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            fail(f"--resume {self.folder}: its {name} does not fit, so the task or the script is another version")
        if bad := self._nonfinite_tensors():
            fail(f"--resume {self.folder}: its {bad[0]} is not finite")
        if total != before and self.total > self.iteration:
            done, of_before = (f"{self.global_step / steps:.0%}" for steps in (total, before))
            said = f"--total-timesteps {total}, was {before}: {done} of the run is done, was {of_before}"
            self._say(f"{said}; learning rates that fall over a run go by that share")
        if not (self.folder / "metrics.csv").exists():
            self._say(f"--resume {self.folder}: no metrics.csv there; a new one begins at step {self.global_step:,}")
        with one_line_errors():
            return read_rows(self.folder / "metrics.csv", self.global_step)

    def __iter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)
        while self.iteration < self.end and not (stopped := ranks.agree(self.interrupted)):
            self.global_step += self.steps
            self.lap_start = time.time()
            yield self.iteration
            evaluated = self.numbers.get("eval/episodic_return", -inf)
            with self._writing():
                if self.numbers:
                    self._write_row()
                    self._stop_at_nan()
                if evaluated > self.best:
                    self.best = evaluated
                    self._save_policy("policy_best.pt2")
                self.iteration += 1
                if self.passed(self.args.save_every):
                    self.save()
        with self._writing():
            self.save()
            self._close()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, unwind)
        self._say_last_words(stopped)

    def _stop_at_nan(self):
        """What is not finite will not recover: the checkpoint of before is worth more than further steps."""
        pending = [tag for tag, x in self.means.items() if not torch.isfinite(torch.stack(x)).all()]
        bad = [t for t in self.nonfinite + pending if t.split("/")[0] in ("losses", "eval") or "return" in t][:1]
        bad += self._nonfinite_tensors()[:1]
        if bad := next(filter(None, ranks.gather(bad)), []):
            bad = ["a reward of the task" if name == "env.episode_return" else name for name in bad]
            self._stop(" is not finite, nor is ".join(bad) + " is not finite" * (len(bad) == 1))
        if self.stuck:
            self._stop(f"no gradient of the last {self.left_out} rows was finite: the policy stands still")

    def _nonfinite_tensors(self) -> list[str]:
        """Names of the parameters, buffers and environments' states that are not finite: "critic.members.0.0.bias"."""
        held = {k: x.state_dict() for k, x in self.parts.items() if k == "env" or hasattr(x, "named_buffers")}
        held["policy"] = held.get("policy", {}) | dict(self.policy.named_parameters())  # its bounds may be infinite
        tensors = {f"{k}.{n}": x.detach() for k, xs in held.items() for n, x in xs.items() if x.is_floating_point()}
        if not tensors or torch.cat([x.flatten().to(self.env.device) for x in tensors.values()]).sum().isfinite():
            return []
        return [n for n, x in tensors.items() if not torch.isfinite(x).all()]

    def _stop(self, why: str):
        """All processes come here, or none."""
        checkpoint = self.folder / "checkpoint.pt"
        before = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "nothing was saved before"
        self._close()
        print(end="\n" if sys.stdout.isatty() else "", flush=True)  # after the bar
        if ranks.RANK == 0:
            print(f"{script()}.py: iteration {self.global_step // self.steps - 1}: {why}; {before}", file=sys.stderr)
        ranks.leave(1)

    def _close(self):
        if ranks.RANK == 0:
            self.tables.writer.close()
            release(self.folder)

    def _interrupt(self, number, *_):
        """Ctrl-C, or a cluster's SIGTERM, lets the iteration finish, so that what is saved can be resumed bit for bit;
        twice: at once. A process of torchrun may get it from there, too, but torchrun waits for so long only."""
        if self.interrupted and ranks.WORLD == 1:
            unwind(number)
        self.interrupted = number
        then = "Ctrl-C again: at once, unsaved" if ranks.WORLD == 1 else "after 30 s torchrun ends it, unsaved"
        tell(f"finishing this iteration; {then}", number)

    def _say_last_words(self, stopped: int):
        python, of, folder = map(shlex.quote, (os.path.relpath(sys.executable), sys.argv[0], str(self.folder)))
        named = f" --env {shlex.quote(self.args.env)}" if is_file(self.args.env) else ""  # its code runs: see README
        self._say("", end="\n" if sys.stdout.isatty() else "")  # after the bar
        if self.iteration < self.total:
            said = "interrupted and saved" if stopped else "saved"
            self._say(f"{said}; continue with: {python}{ranks.launcher()} {of} --resume {folder}{named}")
            ranks.leave(128 + stopped if stopped else 0)
        ranks.disconnect()
        if self.args.capture_video and ranks.RANK == 0:
            with one_line_errors():
                record(self.folder, self.folder / "video.mp4")
        video = "" if self.env.mj_model is None else f" --video {shlex.quote(str(self.folder / 'video.mp4'))}"
        self._say(f"done; watch it: {python} -m diffsim.play {folder}{named}{video}")

    def _say(self, text: str, end: str = "\n"):
        """A line on stdout. When that fails (`| head`, a full disk), the run is saved and ends, as after Ctrl-C."""
        try:
            print(text, end=end, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.interrupted = signal.SIGINT

    @property
    def last(self) -> bool:
        """Whether this iteration is the last of the whole run."""
        return self.iteration == self.total - 1

    def passed(self, every: int) -> bool:
        """Whether this iteration came to another multiple of `every` environment steps; 0: never."""
        return bool(every) and self.global_step // every > (self.global_step - self.steps) // every

    # --- numbers --------------------------------------------------------------------------------------------------
    def episodes(self, info: dict):
        """Take note of the episodes that ended in a step."""
        if "episode" in info:
            ended = info["_episode"]
            self.ended.extend(zip(*(x[ended].tolist() for x in info["episode"].values())))
            if "nonfinite" in info:
                self.sums[NONFINITE] += int(info["nonfinite"].sum())

    def lap(self, name: str):
        """The seconds since the last lap, or since the iteration began, are `name`'s."""
        self.sums[f"time/{name}_s"] += (now := time.time()) - self.lap_start
        self.lap_start = now

    def log(self, numbers: dict):
        """Numbers of this iteration, by tag; an iteration that logs none has no row."""
        self._check(numbers)
        self.numbers |= {t: x.item() if isinstance(x, (torch.Tensor, np.generic)) else x for t, x in numbers.items()}

    def mean(self, numbers: dict):
        """Numbers of one of many updates, by tag: the row has their means since the last one."""
        self._check(numbers)
        for tag, x in numbers.items():
            self.means[tag].append(torch.as_tensor(x).detach().float())

    def _check(self, numbers: dict):
        for tag, x in numbers.items():
            if not isinstance(x, (torch.Tensor, np.generic, int, float)) or np.prod(np.shape(x)) != 1:
                fail(f"{tag} is a {type(x).__name__} of the shape {tuple(np.shape(x))}: a number is logged")
            if (other := self.tags.setdefault(column(tag), tag)) != tag:
                fail(f"{tag} and {other} would both be the column {column(tag)} of metrics.csv")

    def _gather(self) -> dict:
        """The numbers since the last row, those of all processes: their mean, or the largest of a maximum."""
        own = self.numbers | {tag: torch.stack(x).mean().item() for tag, x in self.means.items()}
        numbers, ended, nonfinite = zip(*ranks.gather((own, self.ended, self.sums.get(NONFINITE))))
        self.recent.extend(episode for episodes in ended for episode in episodes)
        if counts := [n for n in nonfinite if n is not None]:
            self.sums[NONFINITE] = sum(counts)
        together = {tag: [of_rank[tag] for of_rank in numbers] for tag in own}
        return {
            tag: xs[0] if len(set(xs)) == 1 else max(xs) if "max" in tag else sum(xs) / len(xs)
            for tag, xs in together.items()
        }

    def _write_row(self):
        wall = time.time() - self.start
        numbers = {"charts/SPS": int(self.global_step / wall)} | self._gather()
        if self.recent:
            tags = "charts/episodic_return", "charts/episodic_length", "charts/successes"
            numbers |= dict(zip(tags, np.mean(self.recent, 0).tolist()))
        numbers |= {tag: round(x, 4) for tag, x in self.sums.items()}
        if ranks.RANK == 0:
            row = dict(iteration=self.iteration, global_step=self.global_step, wall_time_s=round(wall, 3))
            self.tables.add(row | {column(tag): x for tag, x in numbers.items()}, numbers, self.global_step)
            self._show(numbers, wall)
        self.nonfinite = [tag for tag, x in numbers.items() if not np.isfinite(x)]
        if "grad/nonfinite" in numbers:
            self.left_out = self.left_out + 1 if numbers["grad/nonfinite"] == 1 else 0
            self.moved |= not self.left_out
            self.stuck = self.left_out >= PATIENCE or (self.last and not self.moved)
        self.numbers, self.sums, self.means, self.ended = {}, defaultdict(float), defaultdict(list), []

    def _show(self, numbers: dict, wall: float):
        """A bar on a terminal; elsewhere a line now and then, and for each evaluation."""
        bad, tty = numbers.get("grad/nonfinite", 0), sys.stdout.isatty()
        if bad and not self.warned:
            self.warned = True
            said = "gradients that are not finite are left out; metrics.csv has their share"
            print(f"iteration {self.iteration}: {said} (column nonfinite)", file=sys.stderr)
        evaluated = "eval/episodic_return" in numbers
        if tty or evaluated or self.iteration == 0 or time.time() - self.shown > 5:
            share, self.shown = (self.iteration + 1) / self.total, time.time()
            bar = f"\r[{'#' * int(20 * share):<20}] " if tty else ""
            shown = {column(t): x for t, x in numbers.items() if t.endswith(("_return", "SPS"))}
            text = "  ".join(f"{name} {x:.{2 * (abs(x) < 100 and name != 'SPS')}f}" for name, x in shown.items())
            self._say(f"{bar}step {self.global_step:>9,}  {text}  {wall:.0f} s", end="\n" * (evaluated or not tty))

    # --- files ----------------------------------------------------------------------------------------------------
    def save(self):
        """checkpoint.pt, and policy.pt2: observation -> action, a program that needs no script; never with a NaN."""
        self._stop_at_nan()
        with evaluating(self.policy):
            action = self.policy(torch.zeros(2, *self.env.single_observation_space.shape, device=self.env.device))
        if not torch.isfinite(action).all():  # parameters near the largest number
            self._stop("the policy's action is not finite")
        own = {name: self.parts[name].state_dict() for name in OF_A_RANK if name in self.parts}
        own = {name: {k: x.cpu() for k, x in state.items()} for name, state in own.items()}
        of_ranks = ranks.gather(own | ranks.random_state(self.env.device), everywhere=False)
        if ranks.RANK:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()} | of_ranks[0]
        state |= dict(script=script(), args=asdict(self.args), others=of_ranks[1:], recent=[*self.recent, *self.ended])
        state |= dict(sums=dict(self.sums), means=dict(self.means))  # of a row that is not yet due
        state |= dict(best=self.best, left_out=self.left_out, moved=self.moved)
        state |= dict(iteration=self.iteration, global_step=self.global_step, wall_time_s=time.time() - self.start)
        write_whole(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))
        self._save_policy("policy.pt2")

    def _save_policy(self, name: str):
        if ranks.RANK:
            return
        trained_on = {k: getattr(self.args, k, None) for k in ("env", "physics", "stiffness", "smoothing")}
        obs_dim, device = self.env.single_observation_space.shape[0], self.env.device
        write_whole(self.folder / name, lambda path: write_policy(self.policy, obs_dim, device, path, **trained_on))

    @contextmanager
    def _writing(self):
        """A disk that is full, or a folder that is gone, ends the run with one line."""
        try:
            yield
        except OSError as e:
            reason, kept = e.strerror or e, (self.folder / "checkpoint.pt").exists()
            with suppress(OSError):  # torch does not say that a disk is full
                reason = f"{reason}; {shutil.disk_usage(self.folder).free // 10**6} MB are free"
            kept = "the files of before are whole" if kept else "no checkpoint is there"
            fail(f"cannot write in {self.folder} ({reason}): {kept}", code=1)
