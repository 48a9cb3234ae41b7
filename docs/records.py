"""Write the committed records' numbers into the pages: ``python docs/records.py``.

Two markers, which no reader of a page sees, say what stands there:

    <!-- record: RECORD TABLE WORDS -->  (the lines below are this table)
    <!-- n: RECORD.RUN.MEASURE STATISTIC FORMAT -->0.9872 ± 0.0009<!-- /n -->

``quoted.py`` explains RECORD.RUN.MEASURE STATISTIC; without STATISTIC it is mean ± SEM
over the seeds. FORMAT is Python's, by default .4f. TABLE is one of ``TABLES``.
"""

import re
import sys

from quoted import ROOT, number, one_of, read, value

from experiments import permuted_mnist, split_cifar, split_mnist, sweep
from experiments.benchmark import findings as benchmark
from experiments.benchmark import runs
from experiments.engine.tables import table
from experiments.finetune import findings as finetune
from experiments.scenarios import findings as scenarios
from experiments.scenarios.config import SCENARIOS
from experiments.why import findings as why


def choices(*names):
    """By method and strength, a column a record: accuracy on held-out data."""
    found = {}
    for name in names:
        for title, run in read(name)["runs"].items():
            key = run["method"], run.get("strength", 0.0)
            row = found.setdefault(key, dict.fromkeys(names, ""))
            row[name] = number(f"{name}.{title}.test .3f")
    later = ["ewc", "kronecker"]  # behind SI, of which fine-tuning is c = 0
    first = sorted(
        found, key=lambda x: (later.index(x[0]) if x[0] in later else -1, x[1])
    )
    return [(method, f"{c:g}", *found[method, c].values()) for method, c in first]


def markdown(*rows):
    """A table, the first row its head."""
    head, *body = (
        "|" + "|".join(f" {x} " if x else " " for x in row) + "|" for row in rows
    )
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def choice_of_split_cifar(content):
    """A row a strength."""
    rows = choices(content["name"])
    return markdown(("c", "accuracy"), *(row[1:] for row in rows))


def choice_of_permuted_mnist(content, quick=None):
    """A row a method and strength, the small record beside the other."""
    titles = {
        "fine-tuning": "fine-tuning",
        "si": "SI",
        "ewc": "EWC, c = λ/2",
        "kronecker": "Kronecker, c = λ/2",
    }
    rows = choices(content["name"], *filter(None, [quick]))
    head = ("", "c", *(("the paper's", "small") if quick else ("accuracy",)))
    return markdown(head, *((titles[method], *row) for method, *row in rows))


def grid_of_sweep(content):
    """The mean over the seeds, a row a strength, a column a damping."""
    config = content["config"]
    shape = (config.seeds, len(config.strengths), len(config.dampings))
    return sweep.grid_table(value("sweep.grid.test").reshape(shape).mean(0), config)


def samples_of_finetune(content, *names):
    """How the first seed's go on with the first prompt; blanks drawn together."""
    width = max(map(len, names))
    lines = [
        f"{name:{width}}  {' '.join(content['samples'][name][0].split())[:84].rstrip()}"
        for name in names
    ]
    return "\n".join(lines)


TABLES = {
    ("split_mnist", "table"): lambda x, split: table(
        x["runs"], split, split_mnist.TITLES
    ),
    ("permuted_mnist", "table"): lambda x: permuted_mnist.table(
        x["runs"], permuted_mnist.published(x["config"])
    ),
    ("permuted_mnist", "choice"): choice_of_permuted_mnist,
    ("split_cifar", "table"): lambda x: split_cifar.table(
        x["runs"],
        "test",
        split_cifar.titles(x["config"]),
        split_cifar.published(x["config"]),
    ),
    ("split_cifar", "choice"): choice_of_split_cifar,
    ("sweep", "grid"): grid_of_sweep,
    ("scenarios", "choice"): lambda x: scenarios.choice_table(x["config"], x["runs"]),
    ("scenarios", "table"): lambda x: scenarios.table(
        {s: scenarios.of_scenario(x["runs"], s) for s in SCENARIOS}
    ),
    ("finetune", "equal"): lambda x: finetune.equal_table(x["config"], x["runs"]),
    ("finetune", "law"): lambda x: finetune.law_table(x["config"], x),
    ("finetune", "best"): lambda x: finetune.best_table(x["config"], x["runs"]),
    ("finetune", "held"): lambda x, name: finetune.held_table(x["held"][name]),
    ("finetune", "cost"): lambda x: finetune.cost_table(x["cost"]),
    ("finetune", "samples"): samples_of_finetune,
    ("why", "bias"): lambda x: why.bias_table(x["runs"]),
    ("why", "correlation"): lambda x: why.correlation_table(x["runs"], "si"),
    ("why", "choice"): lambda x: why.choice_table(x["config"], x["runs"]),
    ("why", "accuracy"): lambda x: why.accuracy_table(x["runs"]),
    ("benchmark", "table"): lambda x: benchmark.table(x["summary"]),
    ("benchmark_sweep", "table"): lambda x: runs.table(x["seconds"]),
}


def shown(words):
    """What stands below a table's marker: Markdown, or a block as in the terminal."""
    record, name, further = f"{words}  ".split(" ", 2)
    content = read(record)
    known = [x for experiment, x in TABLES if experiment == content["experiment"]]
    make = TABLES[content["experiment"], one_of(name, known, f"table of {record},")]
    text = make(content, *filter(None, further.strip().split(", ")))
    return f"{text}\n" if text.startswith("|") else f"```\n{text}\n```\n"


def written(page, text):
    """A page's text with its numbers as the records have them.

    Raises:
      ValueError: which marker, in which line of which page, means nothing, and why.
    """

    def at(position, make, words):
        line = text.count("\n", 0, position) + 1
        before = text[text.rfind("\n", 0, position) + 1 : position]
        try:
            if make is number and not before.strip(" -"):
                raise ValueError("at a line's beginning Markdown takes it for HTML")
            return make(words)
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{page}, line {line}, {words}: {error}") from error

    for pattern, make in ((NUMBER, number), (TABLE, shown)):
        text = re.sub(
            pattern,
            lambda x, make=make: x[1] + at(x.start(), make, x[2]) + x[3],
            text,
        )
    return text


NUMBER = r"(<!-- n: ([^\n]+?) -->)[^<]*?(<!-- /n -->)"
TABLE = r"(?m)(^ *<!-- record: (.+) -->\n)(?:```\n(?s:.*?)\n```\n|(?:\|.*\n)*)()"


def pages():
    """The README and the documentation's pages."""
    found = sorted((ROOT / "docs").glob("**/*.md"))
    return [ROOT / "README.md", *(x for x in found if "_build" not in x.parts)]


def main():
    """Write every page anew that is not as the records have it."""
    for page in pages():
        name, text = page.relative_to(ROOT), page.read_text()
        try:
            anew = written(name, text)
        except ValueError as error:
            sys.exit(str(error))
        if anew != text:
            page.write_text(anew)
            print(name)


if __name__ == "__main__":
    main()
