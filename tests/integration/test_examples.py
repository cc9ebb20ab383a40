"""The examples do what they say."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_demo(run_script):
    done = run_script(EXAMPLES / "demo.py")
    assert (done.returncode, done.stdout) == (0, "328350\n"), done.stderr


def test_word_count(tmp_path: Path, run_script):
    """Failed tasks are reported, the others counted."""
    (tmp_path / "a").write_text("to be or not to be")
    (tmp_path / "b").write_text("to be is to do")
    done = run_script(
        EXAMPLES / "word_count.py", tmp_path / "a", tmp_path / "missing", tmp_path / "b"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["     4 to", "     3 be"]
    assert "missing: " in done.stderr


def test_the_demo_command_counts_right(run_script):
    done = run_script("-m", "cluster", "demo", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "50,847,534 primes: right" in done.stdout
    assert "200, done in" in done.stdout
