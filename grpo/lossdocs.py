"""Writes docs/losses/ and docs/advantages.md from conf/ and the code: `python -m grpo.lossdocs` (part of `make docs`).

A loss's page is made of the comments in its YAML (`# paper:`, `# differs:`, `# note:`), the equation that the built
objective prints, and a picture. Nothing on it is written by hand, so nothing on it can be out of date.
"""

from __future__ import annotations

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from grpo.advantage import advantages
from grpo.loss.formula import describe

ROOT = Path(__file__).resolve().parents[1]
MADE = "<!-- Made by `make docs` from {source}: edit that, not this. -->"


def built(path: Path):
    """The object that a YAML of conf/loss or conf/advantage describes; `${max_tokens}` and the like from train.yaml."""
    around = OmegaConf.load(ROOT / "conf" / "train.yaml")
    del around["defaults"], around["hydra"]
    cfg = OmegaConf.merge(around, {"this": OmegaConf.load(path)})
    return instantiate(cfg.this)


def comments(path: Path) -> dict[str, list[str]]:
    """The comment lines at the top of a YAML by their label; the unlabelled ones are `head`."""
    found: dict[str, list[str]] = {"head": [], "paper": [], "differs": [], "note": []}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        label, _, text = line[2:].partition(": ")
        found[label if label in found and text else "head"].append(text if label in found and text else line[2:])
    return found


def loss_page(path: Path) -> str:
    """docs/losses/NAME.md of one conf/loss/NAME.yaml. Raises ValueError where the YAML lacks a labelled comment."""
    said = comments(path)
    for label in ("head", "paper", "differs"):
        if not said[label]:
            raise ValueError(f"{path}: no `# {label}:` comment at the top, which its page is made of")
    notes = "".join(f"- {note}\n" for note in said["note"])
    picture = "one token's objective and its gradient by log π against the ratio, for A = +1 and A = -1"
    return (
        f"{MADE.format(source=f'conf/loss/{path.name}')}\n# {path.stem}\n\n{' '.join(said['head'])}\n\n"
        f"**Differs from GRPO:** {' '.join(said['differs'])}\n\n**Paper:** {' '.join(said['paper'])}\n\n"
        f"```text\n{built(path).describe()}\n```\n\n{notes}{chr(10) if notes else ''}"
        f"![{path.stem}: {picture}]({path.stem}.svg)\n\n"
        f"```yaml\n{path.read_text(encoding='utf-8')}```\n\n"
        f"    python -m grpo.train loss={path.stem}\n"
    )


def index_page(paths: list[Path]) -> str:
    rows = "".join(
        f"| [{p.stem}]({p.stem}.md) | {' '.join(comments(p)['differs'])} | {' '.join(comments(p)['paper'])} |\n"
        for p in paths
    )
    return (
        f"{MADE.format(source='conf/loss/')}\n# Losses\n\n"
        "All are compositions of the same small functions: [what is optimised](../../grpo/loss/objective.py). "
        "Your own: [change the loss](../change-the-loss.md).\n\n"
        "In the pictures a completion has one token and log π_old = 0; blue is A = +1, dashed red A = -1. "
        "The gradient is by log π, that is the weight on the token's policy gradient.\n\n"
        f"| `loss=` | differs from GRPO | paper |\n|---|---|---|\n{rows}"
    )


def advantage_page(paths: list[Path]) -> str:
    """docs/advantages.md: one row per conf/advantage/NAME.yaml, with its numbers on one small example."""
    reward_BG = torch.tensor([[1.0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.float64)
    inputs = {"component_BGR": reward_BG[..., None], "weights_R": torch.ones(1, dtype=torch.float64),
              "tokens_BG": torch.tensor([[10, 20, 10, 20, 10, 20], [10] * 6])}  # fmt: skip
    rows = ""
    for path in paths:
        function = built(path)
        a, b = advantages(function, reward_BG, **inputs)[0, :2].tolist()
        said = " ".join(comments(path)["head"])
        rows += f"| `{path.stem}` | {describe(function).removeprefix('A = ')} | {a:.6f} | {b:.6f} | {said} |\n"
    return (
        f"{MADE.format(source='conf/advantage/ and grpo/advantage.py')}\n# Advantages\n\n"
        "`advantage=NAME`. Systems that share a name for it compute different numbers; names with a system in front "
        "reproduce that system's. The numbers are A of the first two completions in a step of two questions: rewards "
        "1, 0, 0, 1, 0, 0 with 10, 20, 10, 20, 10, 20 tokens, and six rewards of 1 with 10 tokens each."
        "\n\n| name | A = | reward 1 | reward 0 | |\n|---|---|---|---|---|\n" + rows
    )


def pages() -> dict[Path, str]:
    """All text pages: path -> text. What `make docs` writes and a test compares."""
    losses = sorted((ROOT / "conf" / "loss").glob("*.yaml"))
    found = {ROOT / "docs" / "losses" / f"{p.stem}.md": loss_page(p) for p in losses}
    found[ROOT / "docs" / "losses" / "README.md"] = index_page(losses)
    found[ROOT / "docs" / "advantages.md"] = advantage_page(sorted((ROOT / "conf" / "advantage").glob("*.yaml")))
    return found


def write() -> list[Path]:
    """Write all pages and pictures; remove those of losses that are gone. Returns what was written."""
    from grpo.lossplot import draw

    folder = ROOT / "docs" / "losses"
    folder.mkdir(parents=True, exist_ok=True)
    texts = pages()
    pictures = {folder / f"{p.stem}.svg": p for p in (ROOT / "conf" / "loss").glob("*.yaml")}
    for old in folder.iterdir():
        if old not in texts and old not in pictures:
            old.unlink()
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    for path, source in sorted(pictures.items()):
        draw(built(source), path)
    return [*texts, *pictures]


if __name__ == "__main__":
    print(f"wrote {len(write())} files under docs/")
