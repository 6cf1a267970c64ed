"""Scripts without ``if __name__ == "__main__"``: told at once, wherever processes are started."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers.checkout import ROOT

UNGUARDED = {
    "make_env": """
        from w2f_torchrl.envs import make_env

        env = make_env("cartpole", "balance", image_size=16, num_envs=2)
    """,
    "Trainer": """
        from w2f_torchrl.trainers import Trainer, to_run_config

        def start():
            environment = {"domain": "cartpole", "task": "balance", "num_envs": 2}
            settings = {"environment": environment, "collection": {"num_workers": 2}}
            Trainer(to_run_config(settings | {"run_dir": "run"})).train()

        if True:
            start()
    """,
    "make_collector": """
        from w2f_torchrl.data import make_collector

        make_collector(None, None, primers={}, num_envs=2, num_workers=2, frames_per_batch=4)
    """,
}


def run(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    return subprocess.run(
        [sys.executable, script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.render
@pytest.mark.parametrize("what", UNGUARDED)
def test_a_script_without_a_guard_is_told_in_its_last_line(tmp_path, what):
    done = run(tmp_path, UNGUARDED[what])
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"RuntimeError: {what}")
    assert 'under `if __name__ == "__main__":`' in last
    assert "script.py" in last
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]  # nothing was begun


GUARDS = [
    'if __name__ == "__main__":\n    call()',
    "if multiprocessing.parent_process() is None:\n    call()",
    'def main():\n    call()\nif __name__ == "__main__":\n    with open(__file__):\n        main()',
]
NO_GUARDS = [
    "call()",
    "if True:\n    call()",
    "def main():\n    call()\nfor _ in range(1):\n    main()",
]


@pytest.mark.parametrize("body", [*GUARDS, *NO_GUARDS])
def test_a_guard_is_recognised(tmp_path, body):
    # The module alone, without the packages that take seconds to import.
    module = (ROOT / "w2f_torchrl" / "utils" / "main_guard.py").read_text()
    (tmp_path / "guard.py").write_text(module)
    text = "import multiprocessing\nimport guard\ndef call():\n    guard.require_main_guard('it')\n"
    done = run(tmp_path, text + body)
    assert (done.returncode == 0) == (body in GUARDS), done.stderr


def test_where_nothing_is_imported_again_nothing_is_asked(tmp_path):
    (tmp_path / "guard.py").write_text((ROOT / "w2f_torchrl/utils/main_guard.py").read_text())
    for arguments, text in (
        (["-c", "import guard; guard.require_main_guard('it')"], None),
        (["-"], "import guard; guard.require_main_guard('it')"),
    ):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, input=text, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
