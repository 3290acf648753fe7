"""Runs a study: teachers shared, several runs at a time, resumable row by row; gathers what it came to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..config import ConfigError, one_line
from ..progress import bar
from ..recipe import Recipe, build, load_children
from ..recipe.wording import nearest
from ..training import runfolder
from ..training.lock import held
from ..training.place import cores
from .paired import Mean, difference, mean
from .pool import Workers
from .rows import Key, Study

Train = Callable[[Recipe], dict[str, float]]
"""Trains a recipe, or goes on with it, and gives its last evaluation; a function that other processes can import."""
Running = Future[dict[str, float]]


@dataclass
class Results:
    """What a study came to so far."""

    study: Study
    top1: dict[str, dict[int, float]] = field(default_factory=dict)
    """Row to seed to percent, teachers among them as ``taught`` names them."""
    failed: dict[str, str] = field(default_factory=dict)
    """Run to what went wrong."""

    def summary(self) -> Iterator[tuple[str, Mean, Mean | None, float | None]]:
        """(row, mean, its difference from the row it is compared with, share of the gap closed)."""
        low, high = (self._named(name) for name in self.study.gap or ("", ""))
        for name, values in self.top1.items():
            other = self.top1.get(self.study.against.get(name, ""))
            seeds = sorted(set(values) & set(low or {}) & set(high or {}))
            share = None
            if low and high and seeds:
                gained = mean([values[seed] - low[seed] for seed in seeds]).mean
                gap = mean([high[seed] - low[seed] for seed in seeds]).mean
                share = gained / gap if gap > 0 else None  # nothing can be closed that is not open
            yield name, mean(list(values.values())), difference(values, other) if other else None, share

    def _named(self, name: str) -> dict[int, float] | None:
        """A row by its name, or the only teacher whose name begins so."""
        found = _meant(name, self.top1)
        return self.top1[found[0]] if len(found) == 1 else None


def _meant(name: str, known: Collection[str]) -> list[str]:
    """The one that is called so, or the teachers whose names begin so."""
    teachers = [each for each in known if each.startswith("teacher ")]
    return [name] if name in known else [each for each in teachers if each.startswith(f"{name} ")]


def run(
    study: Study, planned: Mapping[Key, Recipe], train: Train, jobs: int, failed: dict[str, str] | None = None
) -> Results:
    """Trains what is not finished yet, each run once its teachers are there, and gathers the results.

    ``jobs`` runs at a time, those that others wait for first. A run that fails is told, and noted in ``failed``; the
    others go on. Stopped and started again, the study reads the finished runs back and the others go on from their
    last checkpoints.

    Raises:
        ConfigError: a folder that holds another run, or in which another study runs; data that are not there; a gap to
            a teacher that is not there.
    """
    _check_gap(study, planned)
    recipes, needs = _needs(planned)
    _check(recipes)
    failed = {} if failed is None else failed
    folder = next(iter(recipes)).parent  # that of all
    with _alone(folder), bar(study.title, len(recipes)) as shown, Workers(jobs) as workers:
        for text in _trained(recipes, needs, lambda recipe: workers.submit(train, _share(recipe, jobs)), jobs, failed):
            shown.say(text)
            shown.advance()
    return gather(study, planned, failed)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other study in the folder: two that share a teacher would each find its run taken.

    Raises:
        ConfigError: there is one, or the folder cannot be made.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(folder))
        except BlockingIOError as error:
            raise ConfigError([f"--out: {error}; wait until that study ends, or name another folder"]) from None
        except OSError as error:
            raise ConfigError([f"--out: {folder} cannot be written to ({error.strerror}); name another"]) from None
        yield


def _share(recipe: Recipe, jobs: int) -> Recipe:
    """The recipe on its share of the cores; each of several runs would take all of them where it does not say."""
    return recipe if recipe.threads or jobs == 1 else recipe.model_copy(update={"threads": max(1, cores() // jobs)})


def _check(recipes: Mapping[Path, Recipe]) -> None:
    """What all runs would fail of, before the first begins: folders that are taken, the data of the first."""
    try:
        for recipe in recipes.values():
            runfolder.check_free(recipe)
    except ConfigError as error:
        raise ConfigError([line.replace("output=…", "--out …") for line in error.lines]) from None
    if unfinished := [recipe for recipe in recipes.values() if _finished(recipe) is None]:
        build.open_data(unfinished[0], torch.device("cpu"), 0, 1)


def gather(study: Study, planned: Mapping[Key, Recipe], failed: Mapping[str, str] | None = None) -> Results:
    """What the runs that are finished came to, teachers first, in the order of the study.

    Raises:
        ConfigError: a folder that holds another run.
    """
    results = Results(study, failed=dict(failed or {}))
    for (name, seed), recipe in (taught(planned) | dict(planned)).items():
        if (found := _finished(recipe)) is not None:
            results.top1.setdefault(name, {})[seed] = found["top1"]
    return results


def taught(planned: Mapping[Key, Recipe]) -> dict[Key, Recipe]:
    """The runs of the teachers, as ``teacher NAME MODEL``, and ``… of ROW`` where rows have it from different recipes.

    ROW is the first row whose teacher it is.
    """
    found: dict[Key, dict[Path, tuple[str, Recipe]]] = {}
    for (row, seed), recipe in planned.items():
        for member, child in _children(recipe).items():
            own = found.setdefault((f"teacher {member} {child.student.name}", seed), {})
            own.setdefault(child.output, (row, child))
    several = {name for (name, _), own in found.items() if len(own) > 1}
    return {
        (f"{name} of {row}" if name in several else name, seed): child
        for (name, seed), own in found.items()
        for row, child in own.values()
    }


def _check_gap(study: Study, planned: Mapping[Key, Recipe]) -> None:
    """Makes sure that each name is that of one thing.

    Raises:
        ConfigError: it is that of no teacher, or of several.
    """
    known = list(dict.fromkeys(name for name, _ in taught(planned)))
    for name in study.gap or ():
        found = [] if name in study.rows else _meant(name, known)
        if len(found) > 1:
            raise ConfigError([f"gap: {name!r} are several; give one of {', '.join(map(repr, found))}"])
        if not found and name not in study.rows and not study.partial:
            hint = nearest(str(name), [*(" ".join(each.split(" ")[:2]) for each in known), *known])
            raise ConfigError([f"gap: no row of the study has {name!r}{hint} (known: {', '.join(known) or 'none'})"])


def _children(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes of the teachers that are trained first, by name, with the folders that they will have."""
    return {str(at[1]): runfolder.beside(child, recipe) for at, child in load_children(recipe).items() if len(at) > 1}


def _needs(planned: Mapping[Key, Recipe]) -> tuple[dict[Path, Recipe], dict[Path, set[Path]]]:
    """All runs by folder, those first that others need; and the folders of the runs that each needs."""
    recipes: dict[Path, Recipe] = {}
    needs: dict[Path, set[Path]] = {}

    def visit(recipe: Recipe) -> None:
        children = _children(recipe).values()
        recipes[recipe.output], needs[recipe.output] = recipe, {child.output for child in children}
        for child in children:
            visit(child)

    for recipe in planned.values():
        visit(recipe)
    needed = set().union(*needs.values())
    return {path: recipes[path] for path in sorted(recipes, key=lambda path: path not in needed)}, needs


def _trained(
    recipes: Mapping[Path, Recipe],
    needs: Mapping[Path, set[Path]],
    submit: Callable[[Recipe], Running],
    jobs: int,
    failed: dict[str, str],
) -> Iterator[str]:
    """Says of each run, as it ends, how it did. Only what a process is free for is submitted: where the study is
    stopped, nothing begins any more."""
    waiting, ended = dict(recipes), set[Path]()
    running: dict[Running, Path] = {}

    def lose(path: Path, reason: str) -> str:
        failed[path.name] = reason
        return f"{path.name} failed: {reason}"

    while waiting or running:
        known = len(ended)
        for path in [path for path in waiting if needs[path] <= ended]:
            if (result := _finished(waiting[path])) is not None:
                ended.add(path)
                yield f"{path.name} {result['top1']:.2f} %"
            elif lost := [need.name for need in needs[path] if need.name in failed]:
                ended.add(path)
                yield lose(path, f"its teacher {lost[0]} failed")
            elif len(running) < jobs:
                running[submit(waiting[path])] = path
            else:
                break
            del waiting[path]
        if len(ended) > known:
            continue  # others may have waited for what was just read back
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            path = running.pop(future)
            ended.add(path)
            try:
                yield f"{path.name} {future.result()['top1']:.2f} %"
            except Exception as error:  # a run may fail in any way; the others are worth their time all the same
                yield lose(path, _what_failed(error))


def _what_failed(error: Exception) -> str:
    if isinstance(error, BrokenProcessPool):
        return "its process, or that of a run beside it, was killed (for memory?); the same command goes on with it"
    return one_line(error, 300)


def _finished(recipe: Recipe) -> dict[str, float] | None:
    """The last evaluation of a run that is finished, without building anything."""
    runfolder.check_free(recipe)
    try:
        found = runfolder.summary(recipe.output)
    except ConfigError:
        return None  # the run itself will say what is wrong with it
    return found and found["result"]
