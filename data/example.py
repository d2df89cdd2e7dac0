"""A folder of clips and a spreadsheet of questions, such as yours: `python -m data.example FOLDER`.

FOLDER/clips/*.flac      made-up sounds of data/synthetic.py
       train.csv         file, question, A, B, C, D, answer (the right option's text)
       test.csv          the same of other clips
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
from pathlib import Path
from string import ascii_uppercase

from data.synthetic import questions

OPTIONS = 4
HEADER = ("file", "question", *ascii_uppercase[:OPTIONS], "answer")


def write(folder: Path, train: int = 512, test: int = 100) -> None:
    """Write the clips and the two tables. Raises FileExistsError where `folder` has them, ValueError for no rows."""
    if any((folder / name).exists() for name in ("clips", "train.csv", "test.csv")):
        raise FileExistsError(f"{folder} has clips or tables already: name another folder")
    (folder / "clips").mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        for name, split, count in (("train", "train", train), ("test", "eval", test)):
            with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(HEADER)
                for i, q in enumerate(questions(made, split=split, count=count, options=OPTIONS).questions):
                    clip = f"{name}-{i:04d}.flac"
                    shutil.move(q.audio, folder / "clips" / clip)
                    table.writerow([clip, q.question, *q.choices, q.gold])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.example", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=512, help="questions to train on (default 512)")
    parser.add_argument("--test", type=int, default=100, help="questions to test on (default 100)")
    given = parser.parse_args(arguments)
    try:
        write(given.folder, given.train, given.test)
    except (FileExistsError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{given.folder}: clips/, train.csv ({given.train} questions), test.csv ({given.test})")


if __name__ == "__main__":
    main()
