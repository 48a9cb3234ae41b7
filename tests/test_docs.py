"""The documentation's code prints what it says; its numbers are the records'."""

import ast
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import permuted_mnist, split_cifar
from experiments.engine import command
from experiments.engine.record import Record
from experiments.finetune import findings as finetune
from experiments.finetune import methods as families
from si_jax.metrics import standard_error

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import quoted  # noqa: E402 (a script beside the pages)
import records  # noqa: E402
from quoted import lead, loss, lost, noisy, number, ranks, read, value  # noqa: E402, F401

PAGES = [*records.pages(), *ROOT.glob("C*.md")]
NOTEBOOK = (ROOT / "docs/learn.ipynb").read_text()
CELLS = "\n".join(
    "".join(cell["source"])
    for cell in json.loads(NOTEBOOK)["cells"]
    if cell["cell_type"] == "code"
)
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{i}")
    for page in PAGES
    if page.stem != "learn"  # the notebook's cells are its code
    for i, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    )
]
# All cells share their names; what is here already must not be installed.
EXAMPLES.append(pytest.param(CELLS.replace("%pip", "raise #"), id="notebook"))


@pytest.mark.parametrize("code", EXAMPLES)
def test_code_prints_what_it_says(code):
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        exec(compile(code, "example", "exec"), {})
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert printed.getvalue().splitlines() == expected


def test_the_notebook_is_made_of_the_page():
    pytest.importorskip("jupytext")
    notebook = runpy.run_path(str(ROOT / "docs/notebook.py"))["notebook"]
    made = notebook(ROOT / "docs/learn.md")
    assert made == NOTEBOOK, "python docs/notebook.py makes it anew"


# --- Numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("page", records.pages(), ids=lambda page: page.stem)
def test_the_numbers_are_the_records(page):
    text = page.read_text()
    assert records.written(page.name, text) == text, "python docs/records.py"


def test_a_marker_gets_its_number():
    page = "is <!-- n: split_mnist.si.test -->0<!-- /n -->, or\n"
    page += "<!-- record: split_mnist table test -->\n```\nold\n```\n"
    text = records.written("page.md", page)
    accuracy = [np.mean(x[-1]) for x in read("split_mnist")["runs"]["si c=1"]["test"]]
    error = np.std(accuracy, ddof=1) / np.sqrt(len(accuracy))
    assert f"-->{np.mean(accuracy):.4f} ± {error:.4f}<!--" in text
    assert "old" not in text
    assert records.written("page.md", text) == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("n: mnist.si.test", "page.md, line 3, .* no record 'mnist'; there is"),
        ("n: split_mnist.ewc.test", "no single run .*'ewc'; there is si c=1, "),
        ("n: permuted_mnist.ewc.test", "no single run .*'ewc'; .* ewc c=10000, "),
        ("n: split_mnist.si.tset", "no measure 'tset'; there is .*test, train"),
        ("n: split_mnist.si.test[9]", "out of bounds"),
        ("n: split_mnist", "no RECORD.RUN.MEASURE"),
        ("n: split_mnist.*.seconds", "many numbers: say mean, min, max"),
        ("record: split_mnist choice", "no table .*'choice'; there is table"),
    ],
)
def test_a_marker_that_means_nothing_says_where_and_what_there_is(words, message):
    before, end = ("", "") if "record:" in words else ("It is ", "0<!-- /n -->")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        records.written("page.md", f"\n\n{before}<!-- {words} -->{end}\n")


def test_a_number_that_begins_a_line_is_refused():
    page = "- <!-- n: split_mnist.si.test -->0<!-- /n -->\n"
    with pytest.raises(ValueError, match="a line's beginning"):
        records.written("page.md", page)


def test_every_marker_is_read():
    for page in records.pages():
        markers = re.findall(r"<!--\s*(?:n|record|/n)\b", page.read_text())
        read = re.findall(records.NUMBER, page.read_text())
        tables = re.findall(records.TABLE, page.read_text())
        assert len(markers) == 2 * len(read) + len(tables), page.name


# --- Claims ---------------------------------------------------------------------------


def claims():
    for page, of_page in tomllib.loads((ROOT / "docs/claims.toml").read_text()).items():
        for sentence, claim in of_page.items():
            yield pytest.param(page, sentence, claim, id=f"{page}: {sentence[:40]}")


@pytest.mark.parametrize(("page", "sentence", "claim"), [*claims()])
def test_what_a_page_claims_holds_in_the_records(page, sentence, claim):
    text = re.sub(r"<!--.*?-->|(?m:^#)", "", (ROOT / page).read_text())
    said = re.sub(r"\{(.+?)\}", lambda x: number(x[1]), sentence)
    assert " ".join(said.split()) in " ".join(text.split())
    code = re.sub(r"\{(\w+\..+?)\}", lambda x: f"value({x[1]!r})", claim)
    holds = eval(code, globals())  # with the functions below
    assert true(holds)


def true(holds):
    """All of it, however deep in tuples and lists."""
    return all(map(true, holds)) if isinstance(holds, tuple | list) else np.all(holds)


def config(record):
    return read(record)["config"]


def differ(record, other, **settings):
    """In nothing but these settings."""
    return read(other)["settings"] == read(record)["settings"] | settings


def seeds(record):
    return {len(run["test"]) for run in read(record)["runs"].values()}


def signs(differences, errors=2):
    """Of the means over the seeds, 0 where they are within some standard errors."""
    mean = np.mean(differences, 0)
    limit = np.asarray(standard_error(differences)) if errors else 0
    return np.sign(mean) * (abs(mean) > errors * limit)


def paired(record):
    """What a narrower state of SI loses on small permuted MNIST, by seeds."""
    wide = value("permuted_mnist_quick_squisher.si.test")
    return value(f"{record}.si.test") - wide


def mean(record, method):
    """By run of a method: its mean accuracy."""
    runs = [x for x in read(record)["runs"] if x.startswith(method)]
    return {run: value(f"{record}.{run}.test mean") for run in runs}


def best(record, method):
    found = mean(record, method)
    return max(found, key=found.get)


def within(record, method):
    """Whether the best of a method's strengths has a smaller and a larger one."""
    found = {read(record)["runs"][x]["strength"] for x in mean(record, method)}
    chosen = read(record)["runs"][best(record, method)]["strength"]
    return min(found) < chosen < max(found)


def told_apart(record, method):
    """Pairs of a method's runs that the seeds tell apart."""
    ends = {run: value(f"{record}.{run}.test") for run in mean(record, method)}
    pairs = itertools.combinations(ends, 2)
    return [(x, y) for x, y in pairs if signs(ends[x] - ends[y])]


def agree(run, measure):
    """With the authors' reset of Adam and without it, within a standard error."""
    kept, fresh = (
        value(f"{record}.{run}.{measure}")
        for record in ("split_cifar_keep_count", "split_cifar")
    )
    error = np.hypot(standard_error(kept), standard_error(fresh))
    return abs(kept.mean() - fresh.mean()) < error


def outside():
    """After how many tasks the authors' run is below (1) or above (-1) all of ours."""
    ours = value("permuted_mnist.fine-tuning.so_far")
    theirs = value("permuted_mnist.fine-tuning.authors[*]")
    sides = (theirs < ours.min(0)).astype(int) - (theirs > ours.max(0))
    return {i: side for i, side in enumerate(sides, start=1) if side}


def as_single():
    """The runs whose accuracies on the first task are those of the first alone."""
    runs = read("permuted_mnist")["runs"]
    firsts = {name: [x[0][0] for x in run["test"]] for name, run in runs.items()}
    return [name for name, x in firsts.items() if x == firsts["single"]]


def in_scenario(scenario, name, record="scenarios"):
    return value(f"{record}.{scenario}: {name}.test mean")


def by_strength(scenario, name):
    """Accuracy on held-out data, the mean over the seeds."""
    grid = read("scenarios")["runs"][f"{scenario}: {name}, grid"]
    seeds = len(set(grid["points"]["seed"]))
    accuracy = value(f"scenarios.{scenario}: {name}, grid.test")
    return accuracy.reshape(seeds, -1).mean(0)


PENALTIES = "l2", "ewc", "mas", "si", "si fisher"
TEXTS = read("finetune")["config"]


@functools.cache
def grew(fraction, record="finetune"):
    return {x: y.mean() for x, y in quoted.grew(record, fraction).items()}


def grown(name):
    """The same of the small record with Squisher, by seeds and fractions."""
    content = read("finetune_quick_squisher")
    fractions = (0.5, 0.75, 0.9)
    return finetune.at_equal_loss(content["config"], content["runs"], fractions)[name]


@functools.cache
def chosen():
    return finetune.choose(TEXTS, read("finetune")["runs"])


def after(run):
    """Mean loss on each text at a run's end."""
    return np.mean(read("finetune")["runs"][run]["test"], axis=0)[-1]


def third(name):
    """The same after the third text, of a family."""
    return after(str(families.third(chosen()[name][0])))


def forgotten():
    """By fine-tuning, of the prose, at its stopping points."""
    losses = np.mean(read("finetune")["runs"]["fine-tuning"]["test"], axis=0)[:, 0]
    return losses - after("pretraining")[0]


def of_cost(number, one, other):
    """A step of one kind of method by that of another."""
    cost = read("finetune")["cost"]
    return cost[one][number] / cost[other][number]


NETS = "split MNIST", "permuted MNIST"
MEASURED = "why", "why_quick", "why_permuted", "why_permuted_quick"


def step(method, net, number="to_plain"):
    return value(f"benchmark.{net}: {method}.{number} mean")


def grids(record, size):
    """Accuracy by strength, of each importance."""
    names = quoted.named(record, f"batch {size}: *, grid")
    return [value(f"{record}.{name}.test") for name in names]


def omega(size):
    return read("why_permuted")["runs"][f"batch {size}: measures"]["ω"]


def drops(size):
    """Σω by the loss drop."""
    return np.mean(np.divide(omega(size)["sum"], omega(size)["loss drop"]))


# --- The rest -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experiment", "name", "arguments"),
    [
        (permuted_mnist, "permuted_mnist", "--seeds 5 --ewc-strengths 1e4 1e6"),
        *(
            (permuted_mnist, name, f"--config configs/{name}.toml")
            for name in ("permuted_mnist_narrow", "permuted_mnist_narrow_choice")
        ),
        (split_cifar, "split_cifar", "--seeds 3 --micro-batch 0"),
        (split_cifar, "split_cifar_keep_count", "--seeds 3 --keep-count"),
        (
            split_cifar,
            "split_cifar10",
            "--config configs/split_cifar10.toml --seeds 10 --micro-batch 0",
        ),
        (
            split_cifar,
            "split_cifar10_choice",
            "--config configs/split_cifar10_choice.toml --micro-batch 0",
        ),
    ],
)
def test_a_record_is_what_its_command_makes(
    experiment, name, arguments, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    module = experiment.__name__.removeprefix("experiments.")
    config = command.parse(experiment.Config, module, arguments.split())
    config = dataclasses.replace(config, out=tmp_path)
    (tmp_path / "results.json").write_text(
        (quoted.RESULTS / f"{name}.json").read_text()
    )
    kept = Record(module, config)
    methods = [run.name for run in experiment.runs(config)]
    assert set(methods) == set(kept.runs)
    assert not any(kept.missing(method, config.seeds) for method in methods)


def test_every_deviation_has_a_test_that_exists():
    table, _ = (ROOT / "docs/deviations.md").read_text().split("| | read in |")
    rows = [row for row in table.splitlines() if row.startswith("|")][2:]
    assert len(rows) > 10
    for row in rows:
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert tests, row
        for file, name in tests:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            assert name in {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}


def anchors(page):
    """What GitHub calls the headings of a page."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x).lower().replace(" ", "-") for x in headings}


def test_links_and_images_lead_somewhere():
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target, anchor in re.findall(
            r"\]\((?!https?:|#)([^)#]+)#?([^)]*)\)", prose
        ):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
            if anchor and page.name == "README.md":  # of the others Sphinx says so
                assert anchor in anchors(ROOT / target), anchor


def test_records_that_configurations_name_exist():
    for config in (ROOT / "configs").glob("*.toml"):
        text = " ".join(line.strip("# ") for line in config.read_text().splitlines())
        for target in re.findall(r"experiments/results/\S+?\.json", text):
            assert (ROOT / target).exists(), f"{config.name}: {target}"


def test_commands_exist():
    for page in PAGES:
        for name in re.findall(r"python -m experiments\.(\w+)", page.read_text()):
            files = (f"{name}.py", f"{name}/__main__.py")
            assert any((ROOT / "experiments" / x).exists() for x in files), name
            assert (ROOT / "configs" / f"{name}.toml").exists(), name
