"""Markdown tables of the JSON files that `nightslide evaluate --json` wrote: a row a file, with its command.

    python workflows/experiments/tables.py FOLDER [--mean] [--pooled]

First all images, then every split that was named, in a table of its own.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = {
    "dice": "Dice",
    "aji": "AJI",
    "aji_plus": "AJI+",
    "dq": "DQ = F1",
    "sq": "SQ",
    "pq": "PQ",
    "precision": "P",
    "recall": "R",
    "hausdorff_um": "Hausdorff um",
    "ap": "AP",
    "ap50": "AP50",
}
HEAD = ("", "weights", "stain", "views", "images", *COLUMNS.values(), "command")


def cells(scores: dict[str, Any]) -> list[str]:
    values = [scores[name] for name in COLUMNS]
    return [str(scores["images"]), *("-" if v is None else f"{v:.3f}" for v in values)]


def row(name: str, content: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    weights = f"{content['weights']} {content['weights_sha256'][:8]}"
    command = f"`{content['command']}`".replace("|", "\\|")
    return [name, weights, content["stain"], str(content["views"]), *cells(scores), command]


def mean_row(contents: list[dict[str, Any]]) -> list[str]:
    """The mean over the images of all files; a measure without meaning for an image leaves it out."""
    images = [scores for content in contents for scores in content["per_image"].values()]
    means: dict[str, Any] = {"images": len(images)}
    for name in COLUMNS:
        values = [scores[name] for scores in images if scores[name] is not None]
        means[name] = sum(values) / len(values) if values else None
    return ["**all images of all rows**", "", "", "", *cells(means), ""]


def markdown(rows: list[list[str]]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mean", action="store_true", help="a last row: the mean over the images of all files")
    parser.add_argument("--pooled", action="store_true", help="pooled scores instead of image means")
    arguments = parser.parse_args()
    if arguments.mean and arguments.pooled:
        parser.error("--mean is a row of image means: leave --pooled out")
    files = sorted(arguments.folder.glob("*.json"))
    if not files:
        print(f"{arguments.folder} holds no .json: need files of nightslide evaluate --json", file=sys.stderr)
        return 2
    contents = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    kind = "pooled" if arguments.pooled else "image_mean"
    print(f"All images, {kind.replace('_', ' ')}:\n")
    rows = [row(name, content, content["overall"][kind]) for name, content in contents.items()]
    print(markdown(rows + ([mean_row(list(contents.values()))] if arguments.mean else [])))
    for split in dict.fromkeys(s for content in contents.values() for s in content["within"].get("split", {})):
        print(f"\n{split}, {kind.replace('_', ' ')}:\n")
        having = {n: c for n, c in contents.items() if split in c["within"].get("split", {})}
        print(markdown([row(n, c, c["within"]["split"][split][kind]) for n, c in having.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
