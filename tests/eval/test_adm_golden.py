"""ADM's published sample file scores as the TensorFlow evaluator scored it (needs 3 GB of files).

    ARVISION_ADM_FILES=FOLDER pytest -m network tests/eval/test_adm_golden.py

FOLDER holds VIRTUAL_imagenet256_labeled.npz, admnet_guided_upsampled_imagenet256.npz (both from
OpenAI's guided-diffusion) and weights-inception-2015-12-05-6726825d.pth (torch-fidelity's release).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from arvision.eval import evaluate, get_extractor
from arvision.eval.distributed import local_device

FOLDER = os.environ.get("ARVISION_ADM_FILES")


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason="ARVISION_ADM_FILES names no folder with ADM's files")
def test_figures_of_the_tensorflow_evaluator():
    place = Path(FOLDER or "")
    network = get_extractor(
        "inception-adm",
        device=local_device(),
        weights=place / "weights-inception-2015-12-05-6726825d.pth",
    )
    scores = evaluate(
        str(place / "admnet_guided_upsampled_imagenet256.npz"),
        str(place / "VIRTUAL_imagenet256_labeled.npz"),
        network,
        batch_size=64,
        allow_sorted=True,
    )
    assert scores is not None
    expected = {
        "fid": (3.94256, 0.005),
        "sfid": (6.14043, 0.002),
        "is": (215.8370, 0.3),
        "precision": (0.8265, 0.002),
        "recall": (0.5309, 0.004),
    }
    for name, (value, tolerance) in expected.items():
        assert scores[name].value == pytest.approx(value, abs=tolerance), name
