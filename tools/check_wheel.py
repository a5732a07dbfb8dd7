"""Build the wheel, install it into an empty folder and use it: run, validate and report.

Usage: python tools/check_wheel.py. Its dependencies come from the environment that runs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "tests" / "data" / "dataset-v1" / "model"  # a ViT of 16x16 pixels
IMAGES = 5


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True)


def use(folder: Path, *arguments: str) -> str:
    """What a command prints, with the wheel's vitray in place of the checkout's."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "installed")}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.rmtree(ROOT / "build", ignore_errors=True)  # old modules there would be in the wheel
        pip("wheel", str(ROOT), "--no-deps", "-w", str(folder))
        (wheel,) = folder.glob("*.whl")
        pip("install", "--no-deps", "--target", str(folder / "installed"), str(wheel))
        place = use(folder, "-c", "import vitray; print(vitray.__file__)").strip()
        if not Path(place).is_relative_to(folder):
            sys.exit(f"imported {place}, not the wheel's")
        (folder / "photos").mkdir()
        for number in range(IMAGES):
            Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(folder / f"photos/{number}.png")
        job = ["--model", str(MODEL), "--set", "engine=torch", "--set", "device=cpu"]
        use(folder, "-m", "vitray", "run", "photos", *job, "--out", "labels")
        print(use(folder, "-m", "vitray", "validate", "labels", "--content").strip())
        use(folder, "-m", "vitray", "report", "labels")
        if not (folder / "labels-report.html").exists():
            sys.exit("no report was written")
        print(f"{wheel.name}: run, validate and report work")


if __name__ == "__main__":
    main()
