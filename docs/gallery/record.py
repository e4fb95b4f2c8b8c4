"""Runs examples in full and keeps what they print and draw for the gallery.

    python docs/gallery/record.py                   # all of them, about five hours
    python docs/gallery/record.py digits spiral     # these

Each run writes `NAME.txt`, what the example printed and how long it took, and `NAME.png`, its picture in 256 colours.
Both are kept with the code, since the site is built without running the examples.
"""

import os
import pathlib
import subprocess
import sys
import time

from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
EXAMPLES = HERE.parent.parent / "examples"


def record(name: str) -> None:
    """Runs one example and writes its two files."""
    picture = HERE / f"{name}.png"
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--out", picture],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "MPLBACKEND": "Agg"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=HERE,
    )
    seconds = time.perf_counter() - start
    lines = [line for line in run.stdout.splitlines() if str(picture) not in line]
    took = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"
    cores = len(os.sched_getaffinity(0))  # `taskset -c 0` gives one core, and a steadier time
    text = "\n".join(lines).rstrip() + f"\n\ntook {took} on {cores} core{'s' if cores > 1 else ''}\n"
    (HERE / f"{name}.txt").write_text(text)
    if picture.exists():
        Image.open(picture).convert("RGB").quantize(256).save(picture, optimize=True)
    print(f"{name}: {took}", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in EXAMPLES.glob("*.py")):
        record(name)
