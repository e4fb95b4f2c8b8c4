"""Several machines: two processes train with `fit` to the losses of one, through a crash and a restart."""

import csv
import pathlib
import subprocess
import sys

import numpy as np
import pytest

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "multi_worker.py"


def losses(directory):
    with open(directory / "log.csv") as file:
        return [(int(row["epoch"]), float(row["loss"])) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_two_workers_train_like_one_process_through_a_crash(tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, str(EXAMPLE), "--quick", "--directory", str(tmp_path), "--out", str(picture)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "killed after 2 epochs" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    alone, together = losses(tmp_path / "one_process"), losses(tmp_path / "two_workers")
    # Each epoch once: none is lost in the crash, and none is trained again.
    assert [epoch for epoch, _ in together] == [0, 1, 2, 3]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert together[-1][1] < together[0][1]
