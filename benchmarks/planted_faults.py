"""Faults planted in rows, and where `lorafit rows` ranks them.

    python -m benchmarks.planted_faults MODEL ROWS.json [--rows 300] [--share 0.05] [--seed 0] [--work FOLDER]

Takes the first rows of ROWS.json (Alpaca rows) whose answers have at most --longest words, and spoils a share of
them, from a seed: two answers are swapped, an answer ends early, an answer stands in another language. A run trains all
of them with the defaults. Prints how many planted faults the first tenth of the list names, by kind, and the rows in
this tenth that were not planted. A run that is in --work already is continued, or not trained again. The score of the
list reads the losses of the first visits only, so one epoch is enough.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import table

KINDS = ("swapped", "cut", "language")
OTHER_LANGUAGES = (
    "Das hängt davon ab, wie viel Zeit Sie haben. Beginnen Sie mit einer kurzen Liste der wichtigsten Schritte.",
    "Primero hay que leer el texto con calma y después escribir las ideas principales en una hoja aparte.",
    "Il vaut mieux commencer par les exemples les plus simples, puis passer aux questions plus difficiles.",
    "가장 중요한 것은 매일 조금씩 연습하는 것입니다. 처음에는 쉬운 것부터 시작해 보세요.",
    "Conviene controllare prima i dati, poi confrontare i risultati con quelli della settimana scorsa.",
    "Först bör man läsa instruktionen noga och sedan skriva ner de viktigaste punkterna i rätt ordning.",
)


def spoil(rows: list[dict[str, str]], share: float, seed: int) -> dict[int, str]:
    """Plant faults in `rows`; returns the kind of each by the index of its row."""
    random_ = random.Random(seed)
    count = max(len(KINDS), round(share * len(rows)))
    swapped = max(2, count // 3 // 2 * 2)
    chosen = random_.sample(range(len(rows)), count)
    kinds = dict.fromkeys(chosen[:swapped], "swapped")
    for one, other in zip(chosen[:swapped:2], chosen[1:swapped:2], strict=True):
        rows[one]["output"], rows[other]["output"] = rows[other]["output"], rows[one]["output"]
    for number, index in enumerate(chosen[swapped:]):
        kinds[index] = KINDS[1 + number % 2]
        if kinds[index] == "cut":
            text = rows[index]["output"]
            rows[index]["output"] = text[: max(3, round(len(text) * random_.uniform(0.3, 0.7)))].rstrip()
        else:
            rows[index]["output"] = OTHER_LANGUAGES[number // 2 % len(OTHER_LANGUAGES)]
    return kinds


def lorafit(*words: str) -> str:
    """What the command prints."""
    return subprocess.run(
        [sys.executable, "-m", "lorafit", *words], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def measure(work: Path, arguments: argparse.Namespace) -> list[tuple[dict[str, Any], str]]:
    """Each row of the list in its order, with the kind of its fault, or ""."""
    rows = json.loads(arguments.rows_file.read_text(encoding="utf-8"))
    rows = [row for row in rows if len(row["output"].split()) <= arguments.longest][: arguments.rows]
    kinds = spoil(rows, arguments.share, arguments.seed)
    (work / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    run = work / "run"
    if (run / "adapter").exists():
        pass
    elif (run / "checkpoints").exists():
        lorafit("train", "--resume", str(run))
    else:
        words = [f"train.epochs={arguments.epochs}", "data.holdout=0", "run.samples=0", "run.verify=false"]
        words += ["train.save_every=10"]
        words += ["--model", arguments.model, "--data", str(work / "rows.json"), "--output", str(run)]
        lorafit("train", "run.check=warn", *words)
    second = ["--second-pass"] if arguments.second_pass else []
    found = lorafit("rows", str(run), "--top", "0", "--json", *second).splitlines()
    return [(row, kinds.get(row["row"] - 1, "")) for row in map(json.loads, found) if "rank" in row]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("rows_file", type=Path, metavar="ROWS.json")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--longest", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--second-pass", action="store_true", help="with the losses without the questions")
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        ranked = measure(work, arguments)
    first = ranked[: -(-len(ranked) // 10)]
    lines = [
        [kind, sum(kind == other for _, other in first), sum(kind == other for _, other in ranked)]
        for kind in KINDS
    ]
    lines.append(["all", sum(line[1] for line in lines), sum(line[2] for line in lines)])
    cells = [[str(cell) for cell in line] for line in lines]
    print(table(["fault", f"in the first {len(first)} of {len(ranked)}", "planted"], cells))
    for row, kind in first:
        print(
            f"{row['rank']:4} row {row['row']}: {kind or 'NOT PLANTED'}: {row['reason']}: {row['answer'][:100]}"
        )


if __name__ == "__main__":
    main()
