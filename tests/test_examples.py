"""Every example runs, prints its numbers and draws its picture."""

import pathlib
import subprocess
import sys

import pytest

EXAMPLES = sorted((pathlib.Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_its_numbers_and_draws_its_picture(example, tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, str(example), "--quick", "--out", str(picture)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert any(character.isdigit() for character in result.stdout)
    assert str(picture) in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
