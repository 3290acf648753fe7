"""From files and ``key=value`` to one dictionary; what YAML is here; every mistake is one line that names its place."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdlib import yaml12
from kdlib.config import ConfigError, Document, read
from kdlib.recipe import Recipe, load
from kdlib.yaml12 import YAMLError, dump, parse
from recipes.riformer import gfnet, model  # noqa: F401  registers the models
from tests.conftest import ROOT

DEFAULT = ROOT / "recipes" / "riformer" / "configs" / "default.yaml"


def wrong(*arguments: str | Path) -> str:
    """The one line that these arguments give."""
    with pytest.raises(ConfigError) as caught:
        read(map(str, arguments))
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


# what YAML is


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("2E5", 200000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5e+2", -150.0),
        ("012", 12),
        ("+7", 7),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0x1F", "0x1F"),
        ("no", "no"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("٣", "٣"),
        ("'1e-3'", "1e-3"),
        ("<<", "<<"),
    ],
)
def test_a_scalar_is_what_yaml_1_2_says(text: str, value: object) -> None:
    found = parse(f"key: {text}")["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.fault("hostile config")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (".inf", "not a finite number"),
        ("-.INF", "not a finite number"),
        (".nan", "not a finite number"),
        ("1e999", "not a finite number"),
        ("9" * 5000, "too many digits"),
        ("!!python/object/apply:os.system ['touch hacked']", "tag"),
        ("!!python/name:os.system", "tag"),
        ("!!int x", "tag"),
        ("!!bool x", "tag"),
        ("!!binary aGk=", "tag"),
        ("! x", "tag"),
        ("&a [*a]", "recursive"),
        ("*unknown", "undefined alias"),
        ("@labels", 'needs quotes: "@…"'),
        ("*.blocks", 'needs quotes: "*…"'),
        ("%x", 'needs quotes: "%…"'),
        ("[1, 2", "expected ',' or ']'"),
        ("{a: 1, a: 2}", "the key 'a' stands twice"),
        ("{1: 1, '1': 2}", "stands twice"),
        ("{[a]: 1}", "a key is text or a number"),
        ("{null: 1}", "a key is text or a number"),
        ("{true: 1}", "a key is text or a number"),
        ("a\0b", "#x0000"),
        ("\ud800", "#xd800"),
        ("[" * 3000, "nested"),
        ("{a: " * 3000, "nested"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
    ],
)
def test_what_is_no_plain_finite_data_is_refused_in_one_line(
    text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(YAMLError) as caught:
        parse(f"key: {text}")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("hostile config")
@pytest.mark.parametrize("kind", ["lists", "mappings"])
def test_an_alias_bomb_is_refused_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No node of the text is built twice, and of the billions of values that it stands for no more than are allowed."""
    pair, last = ("[", "]"), "[x]" if kind == "lists" else "{x: 1}"
    lines = [f"a0: &a0 {last}"]
    for i in range(1, 12):
        inner = [f"*a{i - 1}" if kind == "lists" else f"k{j}: *a{i - 1}" for j in range(9)]
        pair = ("[", "]") if kind == "lists" else ("{", "}")
        lines.append(f"a{i}: &a{i} {pair[0]}{', '.join(inner)}{pair[1]}")
    counts = {"nodes": 0, "values": 0}

    def counted(what: str, plain: Any) -> Any:
        def once_more(*given: Any, **named: Any) -> Any:
            counts[what] += 1
            assert counts[what] <= 20_001, f"more {what} than a config may hold"
            return plain(*given, **named)

        return once_more

    monkeypatch.setattr(yaml12._Loader, "compose_node", counted("nodes", yaml12._Loader.compose_node))
    monkeypatch.setattr(yaml12, "_copy", counted("values", yaml12._copy))
    with pytest.raises(YAMLError, match="holds more than 20,000 values"):
        parse("\n".join(lines))
    assert counts["nodes"] < 400 and counts["values"] == 20_001


def test_an_alias_gives_values_that_are_not_shared() -> None:
    found = parse("a: &x [1]\nb: *x")
    found["a"].append(2)
    assert found["b"] == [1]


def test_what_is_dumped_is_read_back_equal_by_either_version_of_yaml() -> None:
    texts = ["1e-3", "no", "012", "1:30", "0x1F", "", "~", "@x", "*x", "a: b", "é\n x", ".inf", "-", "true", "=", "1_0"]
    data = {"texts": texts, "numbers": [1, 1.0, 1e-5, -2, 1e20], "rest": [None, True, {"a": []}, {}], "1": {"2": 3}}
    assert parse(dump(data)) == data == yaml.safe_load(dump(data))
    assert [type(n) for n in parse(dump(data))["numbers"]] == [int, float, float, int, float]


# files


def test_a_file_may_have_a_byte_order_mark_and_any_line_ends(write) -> None:
    assert read([str(write("a.yaml", b"\xef\xbb\xbfa: 1\r\nb: {c: 2}\r\n"))]).data == {"a": 1, "b": {"c": 2}}


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n", "null\n"])
def test_an_empty_file_says_nothing(write, content: str) -> None:
    assert read([str(write("a.yaml", content))]).data == {}


@pytest.mark.fault("config")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- 1\n", "a config is a mapping of keys to values (got list)"),
        ("text\n", "(got str)"),
        ("3\n", "(got int)"),
        ("a: 1\n\tb: 2\n", "line 2, column 1: found character '\\t'"),
        ("a:\n  b: 1\n a: 2\n", "line 3"),
        ("a: 1\n---\nb: 1\n", "but found another document"),
        (b"\xff\xfe\xfa", "no UTF-8 text"),
        ("a: 1\0\n", "#x0000"),
        ("x" * 200_000, "larger than 100,000 bytes"),
        ("base: 3\n", "base: expected the path of a file beside this one (got 3)"),
        ("base: null\n", "base: expected the path"),
        ("base: [a.yaml, {}]\n", "base: "),
        ("terms: {base: nothere.yaml}\n", "terms.base: "),
        ('base: "a\\0b"\n', "base: "),
        (f"base: {'x' * 5000}\n", "base: "),
    ],
)
def test_a_file_that_cannot_be_a_config_is_named(write, content: str | bytes, says: str) -> None:
    path = write("broken.yaml", content)
    assert wrong(path).startswith(f"{path}: ") and says in wrong(path)


@pytest.mark.fault("config")
def test_a_missing_file_is_named_with_the_nearest_one_that_is_there(write, tmp_path: Path) -> None:
    there = write("imitate.yaml", "a: 1")
    assert wrong(tmp_path / "imitat.yaml").endswith(f"did you mean {there}?")
    assert "No such file" in wrong(tmp_path / "no" / "folder.yaml")
    assert "directory" in wrong(tmp_path)
    assert "values are written key=value" in wrong("epochs")


@pytest.mark.fault("hostile config")
def test_links_that_lead_nowhere_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to(tmp_path / "b.yaml")
    (tmp_path / "b.yaml").symlink_to(tmp_path / "a.yaml")
    assert "cannot be read" in wrong(tmp_path / "a.yaml")


def test_a_base_lies_under_the_mapping_that_names_it(write, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write("parts/one.yaml", "x: 1\ny: {a: 1, b: 1}\n")
    write("parts/two.yaml", "base: one.yaml\ny: {b: 2}\n")
    top = write("top.yaml", "inner: {base: parts/two.yaml, x: 9}\nbase: [parts/one.yaml, parts/two.yaml]\nz: 3\n")
    assert read([str(top)]).data == {
        "x": 1,
        "y": {"a": 1, "b": 2},
        "z": 3,
        "inner": {"x": 9, "y": {"a": 1, "b": 2}},
    }


@pytest.mark.fault("config")
def test_bases_in_a_circle_are_named(write) -> None:
    write("b.yaml", "base: a.yaml")
    assert "the files include each other in a circle" in wrong(write("a.yaml", "inner: {base: b.yaml}"))


def test_each_value_remembers_who_said_it(write) -> None:
    base = write("base.yaml", "a: {b: 1, c: [1, 2]}\nd: 1\n")
    top = write("top.yaml", "base: base.yaml\na: {b: 2}\n")
    document = read([str(top), "a.c.1=5"])
    assert document.data == {"a": {"b": 2, "c": [1, 5]}, "d": 1}
    said = {key: document.origin(tuple(key.split("."))) for key in ("a.b", "a.c.0", "a.c.1", "d", "d.nothing")}
    assert said == {
        "a.b": str(top),
        "a.c.0": str(base),
        "a.c.1": "command line",
        "d": str(base),
        "d.nothing": str(base),
    }
    assert Document().origin(("x",)) == "config"


# the command line


def test_later_wins_and_keys_are_dotted(write) -> None:
    first, second = write("1.yaml", "a: {b: 1, c: [1, {d: 2}]}\n"), write("2.yaml", "a: {b: 2}\n")
    document = read([str(first), "a.b=7", str(second), "a.c.1.d=3", "new.key={x: [1]}", "text=a=b", "none="])
    assert document.data == {
        "a": {"b": 2, "c": [1, {"d": 3}]},
        "new": {"key": {"x": [1]}},
        "text": "a=b",
        "none": None,
    }


@pytest.mark.fault("config")
@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("a..b=1", "a..b: a key is words joined by single dots"),
        ("a.=1", "a key is words"),
        (".".join("a" * 60) + "=1", "a key is words"),
        ("c.2=1", "c.2: the list has the indices 0 to 1 (got 2)"),
        ("c.x=1", "c.x: the list has the indices"),
        ("c.-1=1", "the list has the indices"),
        ("c.²=1", "the list has the indices"),
        ("c." + "9" * 5000 + "=1", "the list has the indices"),
        ("c.0.x=1", "c.0.x: what is above it is 1, not a mapping or a list"),
        ("a=[1", "a: expected ',' or ']'"),
        ("a=@x", 'needs quotes: "@…"'),
        ("a={b: .inf}", "a: .inf is not a finite number"),
        ("base=nothere.yaml", "base: nothere.yaml: cannot be read"),
        ("--epochs=3", "unknown option --epochs=3"),
        ("-v", "values are written key=value"),
    ],
)
def test_an_argument_that_fits_nowhere_is_named(argument: str, says: str) -> None:
    line = wrong("c=[1, 2]", argument)
    assert line.startswith("command line: ") and says in line


def test_a_base_may_come_from_the_command_line(write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("part.yaml", "epochs: 3\n")
    monkeypatch.chdir(tmp_path)
    expected = {"teacher": {"recipe": {"seed": 1, "epochs": 3}}}
    assert read(["teacher.recipe.seed=1", "teacher.recipe.base=part.yaml"]).data == expected
    assert read(["teacher.recipe={base: part.yaml, seed: 1}"]).data == expected


def test_a_loss_of_another_name_takes_none_of_the_old_arguments() -> None:
    two = ["t.loss={name: soft_target, temperature: 4}"]
    assert read([*two, "t.loss.temperature=2"]).data["t"]["loss"] == {"name": "soft_target", "temperature": 2}
    for other in ("t.loss=feature_mse", "t.loss.name=feature_mse", "t.loss={name: feature_mse}"):
        assert read([*two, other]).data["t"]["loss"] == {"name": "feature_mse"}
    assert read(["t.loss.temperature=2", "t.loss.name=soft_target"]).data["t"]["loss"]["temperature"] == 2


# any text at all

PIECES = [
    "{",
    "}",
    "[",
    "]",
    ":",
    ": ",
    "\n",
    "\t",
    "  ",
    "-",
    "&a ",
    "*a",
    "!!str ",
    "!",
    "'",
    '"',
    "#",
    "|",
    ">",
    "\0",
]
PIECES += ["\ufeff", "no", "~", ".nan", "1e400", "-1", "0", "true", "999999999999999999999", "{}", "[]", "é", "\u2028"]
PIECES += ["null: 1", "? ", "<<: ", "%", "@", "`", "loss: ", "terms: ", "name: ", "base: ", "x" * 300, "🙂", "soft.x"]
VALUES = [None, True, -1, 0, 1.5, 10**30, "", "x", "@labels", "wide", "@x", "a\nb", "\0", [], {}, [1], [[1], {"a": 1}]]
VALUES += [{"name": 3}, {"x": {"y": []}}, "x" * 500, {"name": "mgd", "ratio": "a"}, {"": 1}, {"a b": {"loss": "dkd"}}]


def mutated_text(generator: random.Random, text: str) -> str:
    for _ in range(generator.choice((1, 1, 2, 6))):
        at = generator.randrange(len(text))
        text = text[:at] + generator.choice(PIECES) + text[at + generator.choice((0, 0, 1, 5, 40)) :]
    return text


def mutated_value(generator: random.Random, data: Any) -> None:
    """Puts something else at a random place, adds a key there, or takes it away."""
    while True:
        key = generator.choice(list(data) if isinstance(data, dict) else range(len(data)))
        if not (isinstance(data[key], dict | list) and data[key]) or generator.random() < 0.2:
            break
        data = data[key]
    change = generator.random()
    if change < 0.7:
        data[key] = generator.choice(VALUES)
    elif change < 0.85 and isinstance(data, dict):
        data[generator.choice(("x", "name", "base", "weights", "1", "a\nb"))] = generator.choice(VALUES)
    else:
        del data[key]


@pytest.mark.parametrize("kind", ["text", "value"])
def test_no_mutated_document_gives_anything_but_a_recipe_or_lines(tmp_path: Path, kind: str) -> None:
    generator = random.Random(7)
    whole = read([str(DEFAULT)]).data
    recipes, refused = 0, 0
    for number in range(150 if kind == "text" else 300):
        data = copy.deepcopy(whole)
        if kind == "value":
            mutated_value(generator, data)
        text = mutated_text(generator, dump(data)) if kind == "text" else dump(data)
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            assert isinstance(load(read([str(path)])), Recipe)
        except ConfigError as error:
            refused += 1
            bad = [line for line in error.lines if not line.isprintable() or not line.startswith(f"{path}: ")]
        else:
            recipes += 1
            bad = []
        assert not bad
    assert recipes and refused > 50


def test_an_error_comes_whole_from_another_process() -> None:
    """A study's runs are processes, and what one raises is told by the study."""
    error = ConfigError(["a.yaml: epochs: expected a number", "b.yaml: no such file"])
    again = pickle.loads(pickle.dumps(error))
    assert again.lines == error.lines and str(again) == str(error)
