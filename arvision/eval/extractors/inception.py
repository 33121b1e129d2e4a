"""The 2015 Inception network of the ADM evaluator: the only extractor whose distance is FID."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, InputError, optional, unknown_name
from ...files import user_path
from ..features import EXTRACTORS, Extractor, ExtractorFacts, file_sha256, safe_load
from ..features import resize as resize_bytes

FILE = "weights-inception-2015-12-05-6726825d.pth"
SHA256_START = "6726825d"
SPATIAL_CHANNELS = 7
PREPROCESS = {
    "tf1": "tf1-bilinear-299 (x-128)/128",
    "clean": "bicubic-aa-299 rounded (x-128)/128",
}


def find_weights(weights: str | Path | None, download: bool) -> Path:
    """The weight file: a given path, the one that torch keeps, or a download that was asked for.

    Raises:
        InputError: no file, and no leave to download one.
    """
    if weights is not None:
        return user_path(weights)
    kept = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if kept.exists():
        return kept
    if not download:
        raise InputError(
            f"extractor inception-adm has no weights: give weights=PATH of {FILE}, "
            "or download=True to fetch 96 MB from torch-fidelity's release page"
        )
    with optional("eval", "extractor inception-adm"):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(URL_INCEPTION_V3, str(kept), hash_prefix=SHA256_START)
    return kept


@EXTRACTORS.register("inception-adm")
class InceptionADM(Extractor):
    """Pool features, spatial features and unbiased logits, as ADM's TensorFlow graph gives them.

    torch-fidelity's port with its TensorFlow-1 bilinear resize. `features` is the pool [B, 2048];
    `spatial` [B, 2023] the first 7 channels of the 1x1 branch of Mixed_6d, flattened height, width,
    channel; `logits` [B, 1008] the pool times the weights, without bias.

    Args:
        weights: local path of the published file.
        download: fetch the file if it is nowhere; never done unasked.
        resize: "tf1" (ADM's) or "clean": antialiased bicubic to 299 on whole grey levels first,
            close to clean-fid's, which keeps fractions of a level.
        verify: refuse another checksum. Without it any file that fits is taken, and its distances
            are not labelled FID.

    Raises:
        InputError: no weights.
        CheckpointError: a wrong checksum, or a file that does not fit or is not plain tensors.

    Paper: Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", section 2.2.
    """

    network: Any

    def __init__(
        self,
        weights: str | Path | None = None,
        download: bool = False,
        resize: str = "tf1",
        verify: bool = True,
    ) -> None:
        with optional("eval", "extractor inception-adm"):
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        if resize not in PREPROCESS:
            raise unknown_name("resize", resize, PREPROCESS)
        path = find_weights(weights, download)
        digest = file_sha256(path)
        is_published = digest.startswith(SHA256_START)
        if verify and not is_published:
            start = digest[: len(SHA256_START)]
            raise CheckpointError(f"{path}: sha256 starts {start}, expected {SHA256_START}")
        super().__init__(
            ExtractorFacts(
                "inception-adm",
                2048,
                PREPROCESS[resize],
                digest,
                "Apache-2.0",
                is_fid=is_published,
                outputs=("features", "spatial", "logits"),
            )
        )
        plain = io.BytesIO()  # the port unpickles what it is given: give it bytes made from tensors
        torch.save(safe_load(path), plain)
        plain.seek(0)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-adm", ["2048", "logits_unbiased"], feature_extractor_weights_path=plain
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path} does not fit the network: {reason}") from error
        self.network, self.is_clean = network, resize == "clean"
        self._spatial: Tensor | None = None
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self.eval().requires_grad_(False)

    def _keep_spatial(self, module: object, inputs: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """The three outputs."""
        if self.is_clean:
            images = resize_bytes(images, 299).to(torch.uint8)
        features, logits = self.network(images)
        spatial, self._spatial = self._spatial, None
        assert spatial is not None
        return {"features": features, "spatial": spatial, "logits": logits}
