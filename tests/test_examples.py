"""Every example runs, prints its numbers and draws its picture."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = sorted((pathlib.Path(__file__).parent.parent / "examples").glob("*.py"))
EXAMPLES = [example for example in EXAMPLES if example.stem != "multi_worker"]  # test_multi_worker.py runs it
NEEDS = {"japanese_vowels": "aeon", "hopper": "dm_control", "latent_hopper": "dm_control"}


def parameters():
    """The examples, with those left out whose data are in a package that is not installed."""
    for example in EXAMPLES:
        package = NEEDS.get(example.stem)
        missing = package is not None and importlib.util.find_spec(package) is None
        mark = pytest.mark.skipif(missing, reason=f"the data of {example.name} need {package}")
        yield pytest.param(example, id=example.stem, marks=mark)


@pytest.mark.parametrize("example", parameters())
def test_an_example_prints_its_numbers_and_draws_its_picture(example, tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, str(example), "--quick", "--out", str(picture)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert any(character.isdigit() for character in result.stdout)
    assert str(picture) in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
