"""Is the number of a finished run the one that an exercise asks for?

    python tests/check.py ae-1 runs/ae-20260101-120000
    python tests/check.py ae-1 runs/ae-20260101-120000 --answer

The number may differ by the tolerance that exercises.json keeps for it: seeds and machines differ.
Exit status: 0 right, 1 not right, 2 no such exercise or run.
"""

import argparse
import json
import sys
from pathlib import Path

EXERCISES = Path(__file__).parent / "exercises.json"


def fail(message):
    print("error:", message, file=sys.stderr)
    sys.exit(2)


def look_up(metrics, key):
    """The value of a key like models.cnn.test_loss or g_gradient.1, a number; None if missing."""
    for part in key.split("."):
        try:
            metrics = metrics[int(part)] if isinstance(metrics, list) else metrics[part]
        except (LookupError, TypeError, ValueError):
            return None
    return metrics if isinstance(metrics, int | float) else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("exercise", help="such as ae-1: see the pages in results/")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of your finished run")
    parser.add_argument("--answer", action="store_true", help="say the answer, right or not")
    args = parser.parse_args()

    exercises = {e["id"]: e for e in json.loads(EXERCISES.read_text(encoding="utf-8"))}
    if args.exercise not in exercises:
        fail(f"no exercise {args.exercise} to check, only {', '.join(exercises)}")
    exercise = exercises[args.exercise]
    try:
        metrics = json.loads((args.run / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        if (args.run / "config.json").is_file():
            fail(f"the run in {args.run} is not finished: go on with --resume {args.run}")
        fail(f"{args.run} is no folder of a finished run: it has no metrics.json")
    number = look_up(metrics, exercise["key"])
    if number is None:
        fail(f"the run in {args.run} has no {exercise['key']}: is it the one of this exercise?")
    if metrics["fast"] or metrics["data"] != "fashion":
        fail(f"the run in {args.run} is a smoke test or on {metrics['data']}: the exercise takes "
             "all of FashionMNIST")

    right = abs(number - exercise["value"]) <= exercise["tolerance"]
    print(f"{exercise['key']} is {number:.4g}:", "right" if right else "not yet")
    if not right:
        print("hint:", exercise["hint"])
    if args.answer:
        print("answer:", exercise["answer"])
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
