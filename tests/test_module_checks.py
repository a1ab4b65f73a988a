import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "decoding", "experiment", "scoring", "support", "texts")
# Those that put others together are tested whole, by tests/test_run_experiment.py.
ASSEMBLING = ("development", "grid", "inputs", "journalled", "learned_maps", "transfers")
WITHOUT_CHECK = ("__init__", "run_experiment", "errors", "vocabulary", *ASSEMBLING)
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.py")
    if path.stem not in WITHOUT_CHECK
)


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """Every module's self-check, two at a time, offline and without a filled cache."""
    cache = tmp_path_factory.mktemp("empty_cache")
    offline = {"HF_HUB_OFFLINE": "1", "PERSONA_TRANSFER_CACHE": str(cache), "OMP_NUM_THREADS": "1"}

    def check(name):
        command = [sys.executable, "-m", name]
        return subprocess.run(
            command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True, check=False
        )

    pool = ThreadPoolExecutor(2)
    yield {name: pool.submit(check, name) for name in MODULES}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", MODULES)
def test_module_checks_itself_offline(name, checks):
    finished = checks[name].result()
    assert finished.returncode == 0, finished.stderr
    assert "OK" in finished.stdout
