"""Every code block in the docs and the READMEs is executed, every page is found, and no link is dead."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from docs_blocks import Block, blocks, is_notebook, pages, toctrees
from docs_commands import COMMANDS, HELP, INSTALLS, READ, SHORT

import kdlib
from kdlib import cli, config, losses, recipe, yaml12
from kdlib.study.rows import load_study

DOCS = ROOT / "docs"
ELSEWHERE = {"docs/migration": "test_migration.py", "recipes/riformer/model_card.md": "test_cli.py"}
"""Pages with code of other libraries, and a template; and who tests them."""
BASE = """
student: {name: resnet18}
teachers: {big: {name: resnet34, pretrained: true}}
terms: {label: {loss: cross_entropy}}
data: {name: fashion-mnist-5k}
"""
"""What a fragment of a recipe is laid over."""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the working directory, with the repository's folders and a few photographs in it."""
    from PIL import Image

    for name in ("recipes", "benchmarks", "docs", "kdlib", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "photos").mkdir()
    for i in range(8):
        pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["docs"])
    known, backward = dict(losses.LOSSES), torch._functorch.config.backward_pass_autocast
    yield tmp_path
    torch._functorch.config.backward_pass_autocast = backward
    losses.LOSSES.clear()
    losses.LOSSES.update(known)
    for name in ("my_models", "my_losses", "run", "compare"):
        sys.modules.pop(name, None)


def elsewhere(page: Path) -> str | None:
    """Who tests a page that is not tested here."""
    place = page.relative_to(ROOT)
    return next((ELSEWHERE[str(above)] for above in (place, *place.parents) if str(above) in ELSEWHERE), None)


PAGES = [page for page in pages() if not is_notebook(page) and elsewhere(page) is None and blocks(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs(page: Path, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Python in one namespace in order, commands as docs_commands.py says, YAML as a recipe or a part of one."""
    if page.name == "export.md":
        execute(f"accelerate launch recipes/resnet/run.py {SHORT['resnet']}")
    space: dict[str, Any] = {"__name__": "docs"}
    found = blocks(page)
    for block, after in zip(found, [*found[1:], None], strict=True):
        capsys.readouterr()
        compared = True
        if block.language == "python" and block.snippet is None:
            run_python(block, space)
        elif block.language == "sh":
            compared = min([run_command(command, block.page, capsys) for command in block.commands])
            os.chdir(desk)
        elif block.language == "yaml" and block.snippet is None:
            check_yaml(block)
        else:
            assert block.language in ("text", "python", "yaml"), f"{block}: no way to test {block.language!r}"
            continue
        if compared and block.snippet is None and after is not None and after.is_output_of(block):
            assert plain(capsys.readouterr().out) == plain(after.text), f"{after}: is not what the block above prints"


def plain(text: str) -> str:
    """Text without spaces at the ends of its lines."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def run_python(block: Block, space: dict[str, Any]) -> None:
    """A block that begins with ``# name.py`` is written to that file and imported."""
    torch.manual_seed(0)
    if named := re.match(r"# (\w+)\.py\n", block.text):
        Path(f"{named[1]}.py").write_text(block.text)
        space.update(vars(importlib.import_module(named[1])))
        return
    exec(compile(block.text, str(block), "exec"), space)


def run_command(command: str, page: str, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether it was executed to the letter, so that its output is what the page shows."""
    if command.startswith("#!"):
        return check_script(command)
    if command.startswith(INSTALLS):
        return False
    name = next((name for name in (f"{page}: {command}", command) if name in COMMANDS), None)
    assert name, f"{page}: {command!r} has no entry in tests/docs_commands.py: say there how it is executed"
    changed = COMMANDS[name]
    with pytest.MonkeyPatch.context() as patch:
        if command in READ:
            patch.setattr("kdlib.study.command.dry_run", lambda recipe: None)
        execute(changed if changed is not None else command)
    if command in HELP:
        told = capsys.readouterr().out
        unknown = [word for word in shlex.split(command) if word.startswith("--") and word not in told]
        assert not unknown, f"{page}: {command}: no option {unknown}"
    return changed is None


def check_script(text: str) -> bool:
    """A job's script: bash reads it, and what it starts is a run that can be made."""
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    for recipe_and_words in re.findall(r"recipes/\w+/run\.py[^\n]*", text):
        execute(f"python {recipe_and_words} --dry-run")
    return False


def execute(command: str) -> None:
    """In this process where it is Python's, to save the seconds that imports take."""
    first, *rest = words = shlex.split(command)
    if words[:2] == ["accelerate", "launch"]:
        first, *rest = "python", *words[2:]
    if first == "cd":
        os.chdir(rest[0])
    elif first == "kdlib":
        assert cli.main(rest) == 0, command
    elif first == "python":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", rest)
            patch.syspath_prepend(str(Path(rest[0]).resolve().parent))  # as for a script
            code: object = 0
            try:
                runpy.run_path(rest[0], run_name="__main__")
            except SystemExit as end:
                code = end.code
            assert code in (0, None), command
    else:
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def check_yaml(block: Block) -> None:
    """A study where it has rows, a whole recipe where it names a student, else a part of one; one that begins with
    ``# name.yaml`` is written."""
    if named := re.match(r"# (\w+\.yaml)\n", block.text):
        Path(named[1]).write_text(block.text)
    said, document = yaml12.parse(block.text), config.Document()
    if "rows" in said:
        assert named and load_study(Path(named[1])).rows
        return
    if "student" not in said or "terms" not in said:
        document.overlay(yaml12.parse(BASE), "base")
    document.overlay(said, str(block))
    import recipes.riformer.run  # noqa: F401  registers its models

    assert recipe.load(document).terms


def test_pages_that_are_left_out_are_tested_elsewhere() -> None:
    for page in pages():
        if not is_notebook(page) and blocks(page) and (who := elsewhere(page)) is not None:
            assert (ROOT / "tests" / who).exists(), f"{page.relative_to(ROOT)} has blocks, and no tests/{who} runs them"


def test_no_entry_of_the_table_is_left_over() -> None:
    shells = [block for page in PAGES for block in blocks(page) if block.language == "sh"]
    shown = {name for block in shells for command in block.commands for name in (command, f"{block.page}: {command}")}
    assert not set(COMMANDS) - shown


def test_snippets_of_the_readme_are_tested_there() -> None:
    tested = (ROOT / "tests" / "test_readme.py").read_text()
    for page in PAGES:
        for block in blocks(page):
            assert block.snippet is None or (page.name == "README.md" and f'"{block.snippet}"' in tested), block


def test_every_page_is_in_the_toctree() -> None:
    found, todo = set(), [DOCS / "index.md"]
    while todo:
        page = todo.pop()
        if page not in found:
            found.add(page)
            todo += toctrees(page)
    assert found == {page for page in pages() if DOCS in page.parents}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_no_relative_link_is_dead(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.partition("#")[0]
        if path and "://" not in target:
            assert (page.parent / path).exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    told = set(re.findall(r":: kdlib\.(?:losses\.)?(\w+)$", text, re.M))
    missing = {*kdlib.__all__, *losses.__all__} - told - {"losses", "LOSSES", "View"}
    assert not missing


def test_a_block_without_an_entry_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="has no entry"):
        run_command("kdlib inspect resnet50", "page.md", capsys)
