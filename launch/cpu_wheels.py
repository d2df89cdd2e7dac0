"""Makes torchaudio and torchvision wheels that were built against CUDA importable beside a CPU-only torch.

The package index offers only the CUDA builds. Their extensions link libraries that a CPU-only torch does not bring:
- torchaudio stops at import with an OSError. Without its extensions it imports, and what is written in Python works
  (resample, MelSpectrogram, kaldi.fbank; not rnnt_loss).
- torchvision then misses the *schemas* of two operators, and takes transformers' image processors down, and the Omni
  processor with them. Declaring the schemas is enough; calling the operators still fails, loudly.

Nothing is touched where torch is a CUDA build or where the libraries load. Mending twice changes nothing more.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

PROBE = """
import json, torch
errors = {}
for name in ("torchaudio", "torchvision"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            errors[name] = str(error)
    except (OSError, RuntimeError) as error:
        errors[name] = str(error)
print(json.dumps({"cuda": torch.version.cuda, "errors": errors}))
"""

MARK = "# --- schemas for a torch without CUDA, added by launch/cpu_wheels.py ---"
SCHEMAS = f"""

{MARK}
if not _has_ops():
    _cpu_schemas = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _cpu_schemas.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def mend_torchaudio(packages: Path) -> bool:
    """Puts the extensions aside under another name. True if there were any."""
    libraries = sorted((packages / "torchaudio" / "lib").glob("*.so"))
    for library in libraries:
        library.replace(library.with_name(library.name + ".disabled"))
    return bool(libraries)


def mend_torchvision(packages: Path) -> bool:
    """Appends the missing schemas to torchvision/extension.py. True if they were not there yet."""
    extension = packages / "torchvision" / "extension.py"
    text = extension.read_text()
    if MARK in text:
        return False
    mended = extension.with_name("extension.py.new")  # renamed over it: a cache may share the old file by a hard link
    mended.write_text(text + SCHEMAS)
    mended.replace(extension)
    return True


MENDERS = {"torchaudio": mend_torchaudio, "torchvision": mend_torchvision}


def mend(packages: Path, cuda: str | None, errors: dict[str, str]) -> list[str]:
    """Mends those libraries in `packages` that failed to import with `errors`; returns their names."""
    if cuda is not None:
        return []
    return [name for name in sorted(errors) if MENDERS[name](packages)]


def probe(python: Path) -> tuple[str | None, dict[str, str]]:
    """Asks `python` for its torch's CUDA version (or None) and for the libraries that do not import (name -> error)."""
    answer = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(answer.stderr)
    report = json.loads(answer.stdout.splitlines()[-1])
    return report["cuda"], report["errors"]
