"""The mutation tool on a toy project; and its own list fits the program."""

from pathlib import Path

import mutants
import pytest
from mutants import MUTANTS, Mutant
from runs import ROOT

TOY = {
    "killed": Mutant("toy.py", "a + b", "a - b", "toy"),
    "survived": Mutant("toy.py", "a * b", "a * b * 1.0", "toy"),
    "stale": Mutant("toy.py", "a / b", "b / a", "toy"),
    "broken": Mutant("toy.py", "def plus", "def", "toy"),
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A program of two functions, and their tests."""
    (tmp_path / "toy.py").write_text(
        "def plus(a, b):\n    return a + b\n\n\ndef times(a, b):\n    return a * b\n"
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_toy.py").write_text(
        "from toy import plus, times\n\n\ndef test_both():\n"
        "    assert plus(2, 3) == 5 and times(2, 3) == 6\n"
    )
    return tmp_path


@pytest.mark.slow
def test_each_end_of_a_mutant_is_counted_and_the_project_is_left_as_it_was(toy, capsys):
    before = {p.name: p.read_text() for p in toy.rglob("*.py")}
    assert mutants.main([], TOY, toy) == 1
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [[name, name] for name in TOY]
    assert total == "1 killed, 1 survived, 1 stale, 1 broken"
    assert {p.name: p.read_text() for p in toy.rglob("*.py")} == before
    assert mutants.main(["--only", "killed"], TOY, toy) == 0


def test_nothing_is_judged_if_the_tests_fail_without_a_fault(toy, capsys):
    (toy / "tests/test_toy.py").write_text("def test_nothing():\n    assert False\n")
    assert mutants.main([], TOY, toy) == 1
    assert capsys.readouterr().out == "the tests fail without a fault: toy\n"


def test_the_mutants_are_faults_of_the_program_as_it_is():
    assert len(MUTANTS) >= 60
    for mutant in MUTANTS.values():
        assert (ROOT / mutant.file).read_text("utf-8").count(mutant.old) == 1, mutant
        assert all((ROOT / f"tests/test_{stem}.py").is_file() for stem in mutant.tests.split())
