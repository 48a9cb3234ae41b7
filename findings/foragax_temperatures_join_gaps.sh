#!/usr/bin/env bash
# The temperatures of continual-foragax have gaps of months and years in them, which are closed up.
#
# One would guess: they are daily means, so what load_data makes of a file has an entry a day, and
# the next entry is the next day's; get_temperature(rewards, clock, repeat) walks through the seasons.
# Seen: rows that are missing in a file, and those that are flagged as not valid, are left out and their
# neighbours become neighbours in time. In 106 of the 120 files days more than a month apart do, in
# the worst more than five years apart, and the season jumps there. Nothing says so.
# Who meets it: whoever has an agent learn the year's course, or makes forecasting series of these files.
# Go by the dates in the files instead, and take windows in which no day is missing.
# Versions: Python 3.11, continual-foragax 0.58.0, jax 0.10.2.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps continual-foragax==0.58.0
cat > "$folder/program.py" <<'PYTHON'
import csv
import importlib.metadata
import sys
from datetime import date

from foragax.weather import FILE_PATHS, load_data

version = importlib.metadata.version("continual-foragax")
print("Python", sys.version.split()[0], "continual-foragax", version)


def valid_days(path):
    """Of each entry of load_data, in order."""
    lines = open(path).read().splitlines()[21:]
    rows = csv.DictReader(lines, skipinitialspace=True)
    days = [x["DATE"] for x in rows if x["Q_TG"].strip() == "0"]
    return [date(int(x[:4]), int(x[4:6]), int(x[6:])) for x in days]


gaps = {}
for path in FILE_PATHS:
    days = valid_days(path)
    gaps[path] = max((b - a).days for a, b in zip(days, days[1:]))
worst = max(gaps, key=gaps.get)
days, entries = valid_days(worst), len(load_data(worst))
span = (days[-1] - days[0]).days + 1
months = sum(x > 31 for x in gaps.values())
print(f"{worst[-12:]}: {entries} entries for {span} days; the longest step {gaps[worst]} days")
print(f"{months} of {len(gaps)} files have a step of more than a month between neighbours")
print("guess: a step is a day")
assert entries == len(days) < span, "the behaviour has changed"
assert (months, len(gaps), gaps[worst]) == (106, 120, 1940), "the behaviour has changed"
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore "$folder/program.py"
