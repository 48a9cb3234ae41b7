"""What an experiment leaves behind: its configuration, versions and accuracies."""

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import jax
import matplotlib
import numpy as np
from jax.experimental import multihost_utils
from matplotlib.figure import Figure

from experiments.engine.checkpoint import Checkpoints
from experiments.engine.command import Options, UserError
from experiments.engine.export import TensorBoard, tidy
from experiments.engine.measures import count, diverged, joined, part_of, summarize
from experiments.engine.run import Label, with_fields
from experiments.engine.text import nulls, numbers, plain, readable
from experiments.engine.versions import versions
from experiments.figures.style import STYLE

PLACES = [field.name for field in dataclasses.fields(Options)]
TRAINED_BY = "checkpoints/versions.json"


class Record:
    """The folder of one experiment: its configuration, results, metrics, checkpoints.

    Finished methods are kept: the same configuration goes on where it was left, another
    one is refused. More seeds may be added to what is finished, none taken away.

    Args:
      experiment: its name.
      config: its configuration.
      default: the folder in ``runs/EXPERIMENT`` if there is no ``--out``.

    Raises:
      UserError: if the folder holds another configuration, is in use by another
        process, is damaged, or cannot be written.
    """

    def __init__(self, experiment: str, config: Options, default: str = ""):
        self.config = config
        self.folder = config.out or Path("runs") / experiment / default
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._hold()
            if config.overwrite:
                self._clear()
        except OSError as error:
            raise UserError(
                f"cannot write to --out {self.folder}: {error.strerror or error}."
            ) from error
        self._tensorboard = (
            TensorBoard(self.folder / "tensorboard") if config.tensorboard else None
        )
        entries = plain(dataclasses.asdict(config))
        self._left_out = {*PLACES, *config.PICKS}
        self._defaults = plain(
            {field.name: field.default for field in dataclasses.fields(config)}
        )
        settings = {k: v for k, v in entries.items() if k not in self._left_out}
        head = {"experiment": experiment, "config": settings}
        finished = self._read("results.json") or {"runs": {}, "summary": {}}
        self._refuse_another({**head, **finished}, head)
        # A record that was copied here comes without one.
        started = self._read("config.json")
        if started is None:
            started = {**head, "versions": versions()}
            self.write("config.json", readable(started))
        self._refuse_another(started, head)
        self.content = {**started, **finished, "config": settings}
        self.content["runs"] = with_fields(numbers(self.content["runs"]))
        _say_another_jaxlib(self.folder, self.content)
        _wait_for_all("all have read")

    @property
    def runs(self) -> dict[str, Any]:
        """The finished methods' accuracies."""
        return self.content["runs"]

    def missing(self, method: str, seeds: int) -> list[range]:
        """The seeds below ``seeds`` that a method has not run, in the groups to run.

        Runs of one group are trained together. A group ends where one did that is
        finished or under way, so that methods share what they can, and what was
        interrupted goes on.

        Raises:
          UserError: if the method has run more.
        """
        done = count(self.runs[method]) if method in self.runs else 0
        if done > seeds:
            raise UserError(
                f"{self.folder} holds {done} seeds of {method}, which --seeds {seeds} "
                f"would not show: --seeds {done} or more, or another --out."
            )
        ends = {end for end in self._ends() if done < end < seeds}
        bounds = [done, *sorted(ends), *([seeds] if done < seeds else [])]
        return [range(*pair) for pair in itertools.pairwise(bounds)]

    def _ends(self) -> set[int]:
        """Where groups of seeds end that are finished or under way; not of grids."""
        ends = set()
        for run in (run for run in self.runs.values() if "points" not in run):
            groups = [part["seeds"] for part in run.get("parts", [])] or [count(run)]
            ends |= set(itertools.accumulate(groups))
        for folder in self.folder.glob("checkpoints/*"):
            if group := re.search(r"-seeds-(\d+)-(\d+)$", folder.name):
                ends |= {int(group[1]), int(group[2]) + 1}
        return ends

    def add(
        self,
        label: Label | str,
        run: dict[str, Any],
        summary: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        """Keep a finished method, or further seeds of one, with a summary of it.

        Args:
          label: what it is, or a name for what is no method's.
          run: its accuracies, with a first axis over the seeds. Those that diverged are
            listed, from 0, as ``diverged``.
          summary: of the run with all its seeds; :func:`summarize` by default.
        """
        method, fields = str(label), {}
        if isinstance(label, Label):
            fields = label.fields()
        run, now, earlier = plain(run), versions(), []
        if "test" in run:
            done = count(self.runs[method]) if method in self.runs else 0
            new_seeds = run.get("points", {}).get(
                "seed", range(done, done + count(run))
            )
            seeds = f"{min(new_seeds)}-{max(new_seeds)}"
            earlier = [
                x for x in self.trained_by(f"{method} seeds {seeds}") if x != now
            ]
            if self._tensorboard and is_first():
                self._tensorboard.add(method, seeds, run)
        if method in self.runs:
            before = self.runs[method]
            parts = before.get("parts") or [
                part_of(
                    before,
                    before.get("versions", self.content["versions"]),
                    before.get("earlier_versions", []),
                )
            ]
            parts = [*parts, part_of(run, now, earlier)]
            run = joined(before, run) | {"parts": parts}
        else:
            # A run names its versions where they are not the record's.
            if now != self.content["versions"]:
                run["versions"] = now
            if earlier:
                run["earlier_versions"] = earlier
        if gone := diverged(run):
            run["diverged"] = gone
        self.runs[method] = run = fields | run
        self.content["summary"][method] = plain((summary or summarize)(run))
        self.write("results.json", readable(self.content))
        if accurate := {k: x for k, x in self.runs.items() if "test" in x}:
            self.write("results.csv", tidy(accurate))

    def note(self, name: str, value: Any) -> None:
        """Keep something beside the runs, under a name of its own."""
        self.content[name] = plain(value)
        self.write("results.json", readable(self.content))

    def checkpoints(self, group: str) -> Checkpoints:
        """The checkpoints of a method's group of seeds that is under way."""
        return Checkpoints(
            self.folder / "checkpoints" / re.sub(r"[^\w.=+]+", "-", group)
        )

    def trained_by(self, group: str) -> list[dict[str, Any]]:
        """The versions that trained what a group's checkpoints hold, one by one."""
        return (self._read(TRAINED_BY) or {}).get(group, [])

    def keep_versions(
        self, groups: Iterable[str], stacks: list[dict[str, Any]]
    ) -> None:
        """Keep what :meth:`trained_by` says of some groups."""
        kept = self._read(TRAINED_BY) or {}
        if any(kept.get(group) != stacks for group in groups):
            (self.folder / TRAINED_BY).parent.mkdir(exist_ok=True)
            self.write(TRAINED_BY, readable(kept | dict.fromkeys(groups, stacks)))

    def log(self, *, method: str, seeds: str, position: int, **values: Any) -> None:
        """Append a line to ``metrics.jsonl``, of an epoch of a group of seeds."""
        path = self.folder / "metrics.jsonl"
        entry = {"method": method, "seeds": seeds, "position": position, **values}
        if is_first():
            with _writing(path), path.open("a") as file:
                file.write(json.dumps(nulls(plain(entry)), allow_nan=False) + "\n")
            if self._tensorboard:
                arrays = {k: x for k, x in values.items() if np.ndim(x)}
                self._tensorboard.log(method, seeds, position, arrays)

    def rewind(self, method: str, seeds: str, position: int) -> None:
        """Take back what was logged of a group of seeds after ``position`` epochs."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return

        def stays(line: str) -> bool:
            try:
                entry = json.loads(line)
            except ValueError:  # cut off in the middle
                return False
            another = (entry["method"], entry.get("seeds")) != (method, seeds)
            return another or entry["position"] < position

        lines = filter(stays, path.read_text().splitlines())
        self.write(path.name, "".join(line + "\n" for line in lines))

    def save(self, name: str, figure: Figure) -> None:
        """Write a figure as PNG and PDF."""
        for suffix in ("png", "pdf") if is_first() else ():
            path = self.folder / f"{name}.{suffix}"
            with _writing(path), matplotlib.rc_context(STYLE):
                figure.savefig(path)

    def _hold(self) -> filelock.BaseFileLock | None:
        """Keep others out of the folder for as long as this process lives.

        The processes of one run share it; the first holds it for all of them.
        """
        if not is_first():
            return None
        lock = filelock.FileLock(
            self.folder / ".lock", is_singleton=True, thread_local=False
        )
        holder = self.folder / ".holder"
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            who = holder.read_text() if holder.exists() else "another process"
            raise UserError(
                f"{self.folder} is in use by {who}. Wait for it, or choose another "
                "--out."
            ) from None
        now = datetime.datetime.now().isoformat(" ", "seconds")
        holder.write_text(f"process {os.getpid()} on {platform.node()} since {now}")
        return lock

    def _clear(self) -> None:
        if is_first():
            for file in ("config.json", "results.json", "results.csv", "metrics.jsonl"):
                (self.folder / file).unlink(missing_ok=True)
            for folder in ("checkpoints", "tensorboard"):
                shutil.rmtree(self.folder / folder, ignore_errors=True)
        _wait_for_all("the first has cleared")

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            if not isinstance(content, dict):
                raise ValueError("not an object")
            return content
        except ValueError as error:
            raise UserError(
                f"{path} is damaged ({error}): choose another --out, or --overwrite."
            ) from error

    def _refuse_another(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        if there.get("experiment") != here["experiment"]:
            difference = f"another experiment, {there.get('experiment')}"
        else:
            # What a record does not name was not there yet to be set.
            old, new = self._defaults | there.get("config", {}), here["config"]
            difference = ", ".join(
                f"{key}: {old.get(key)} there, {new.get(key)} now"
                for key in {**old, **new}
                if old.get(key) != new.get(key) and key not in self._left_out
            )
        if difference:
            raise UserError(
                f"{self.folder} holds the results of another configuration "
                f"({difference}). Choose another --out, or --overwrite."
            )

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder, whole or not at all."""
        path = self.folder / name
        part = path.with_suffix(".part")
        if is_first():
            with _writing(path):
                part.write_text(text)
                part.replace(path)


def _say_another_jaxlib(folder: Path, content: dict[str, Any]) -> None:
    """Numbers repeat bit for bit on one version alone."""
    runs = content["runs"].values()
    makers = [content, *runs, *(part for run in runs for part in run.get("parts", []))]
    made = [x["versions"] for x in makers if "versions" in x]
    made += [stack for x in makers for stack in x.get("earlier_versions", [])]
    theirs, here = {stack.get("jaxlib") for stack in made}, version("jaxlib")
    if is_first() and (others := theirs - {here, None}):
        print(
            f"{folder} was computed with jaxlib {', '.join(sorted(others))}, here is "
            f"{here}: runs repeat bit for bit on one version alone.",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A file that cannot be written, on a full disk say, is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error}. Make room and run the same command again: "
            "it goes on from the last checkpoint."
        ) from error


def is_first() -> bool:
    """Of several processes one writes; all read."""
    return jax.process_index() == 0


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
