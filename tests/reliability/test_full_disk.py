"""A disk that is full: one line, nothing half written, and once there is room the run goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

SIZES = {"generate": 400, "export": 500, "train": 8, "distill": 300, "compare": 32, "report": 4}
"""Kilobytes of the disk, less than each run needs."""

SPACE = ["unshare", "--user", "--map-root-user", "--mount"]
"""Mounts of a process of its own: they end with it."""

CHILD = f"""
import json, subprocess, sys, warnings
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
import runs
from test_soak import contents
from arvision.files import MARK
warnings.simplefilter("ignore")
disk, found = Path(sys.argv[1]), {{}}
mount = lambda *options: subprocess.run(["mount", *options], check=True)
def begin(size):
    mount("-t", "tmpfs", "-o", f"size={{size}}", "tmpfs", disk)
    for name in ("samples", "tiny"):
        (disk / name).symlink_to(disk.parent / name)
def end():
    subprocess.run(["umount", disk], check=True)
for kind, size in json.loads(sys.argv[2]).items():
    begin("64m")
    runs.RUNS[kind](disk / kind / "run")
    wanted = contents(disk / kind)
    end()
    begin(f"{{size}}k")
    try:
        runs.RUNS[kind](disk / kind / "run")
        refused = "went through"
    except OSError as error:
        refused = str(error)
    halves = [str(p) for p in disk.rglob("*") if MARK in p.name]
    mount("-o", "remount,size=64m", disk)
    runs.RUNS[kind](disk / kind / "run")
    now = contents(disk / kind)
    other = [name for name in sorted(wanted | now) if wanted.get(name) != now.get(name)]
    found[kind] = [refused, halves, other]
    end()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path):
    try_mount = [*SPACE, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(try_mount, capture_output=True).returncode:
        pytest.skip("nobody may mount a file system here")
    import runs

    from arvision.pipeline import ARPipeline
    from arvision.testing import tiny_llamagen

    teacher = ARPipeline.from_model(tiny_llamagen(sharpness=3.0), guidance_scale=1.5)
    teacher.save_pretrained(tmp_path / "tiny")
    runs.run_generate(tmp_path / "samples")
    (tmp_path / "disk").mkdir()
    arguments = [sys.executable, "-c", CHILD, str(tmp_path / "disk"), json.dumps(SIZES)]
    done = subprocess.run(
        [*SPACE, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for kind, (refused, halves, other) in found.items():
        assert "No space left on device" in refused, f"{kind}: {refused}"
        assert "\n" not in refused
        assert halves == [], f"{kind}: {halves}"
        assert other == [], f"{kind}: {other} differ from those without a full disk"
    assert list(found) == list(SIZES)
